"""mpicoll: collective communication by hand over any MPI.

The names below load mpi4py when they are first used; ``mpicoll.schedule``, ``algorithms`` and ``verify`` work
without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpicoll.calls import AVG
    from mpicoll.communicator import Communicator
    from mpicoll.faults import DeadlineError, MismatchError, RankFailedError
    from mpicoll.fusion import GradientSync

__all__ = ["AVG", "Communicator", "DeadlineError", "GradientSync", "MismatchError", "RankFailedError"]
__version__ = "0.1.0"


_HOMES = {
    "AVG": "mpicoll.calls",
    "Communicator": "mpicoll.communicator",
    "DeadlineError": "mpicoll.faults",
    "GradientSync": "mpicoll.fusion",
    "MismatchError": "mpicoll.faults",
    "RankFailedError": "mpicoll.faults",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mpicoll' has no attribute {name!r}")
