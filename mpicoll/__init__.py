"""mpicoll: collective communication by hand over any MPI.

``Communicator`` and ``AVG`` load mpi4py when they are first used; ``mpicoll.schedule``, ``algorithms`` and
``verify`` work without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpicoll.calls import AVG
    from mpicoll.communicator import Communicator

__all__ = ["AVG", "Communicator"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Communicator":
        from mpicoll.communicator import Communicator

        return Communicator
    if name == "AVG":
        from mpicoll.calls import AVG

        return AVG
    raise AttributeError(f"module 'mpicoll' has no attribute {name!r}")
