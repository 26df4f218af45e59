"""What happened when, on every rank: record it, and read the record.

    from mpicoll import trace

    with trace.record(comm, "trace.json") as recorder:      # on every rank of an mpicoll.Communicator
        with recorder.phase("forward"):                     # what the program itself does, if you like
            ...
        comm.Allreduce(a, b)                                # collectives are recorded by themselves

``trace.json`` is for Perfetto (ui.perfetto.dev) and Chrome (chrome://tracing); ``mpicoll trace trace.json``
sums it up. Training writes it with ``train.py --trace trace.json``.

- An **event** has a begin, an end, a name and a category: ``compute`` (a phase of the program),
  ``collective`` (from a rank's call to its end), ``pack`` (into and out of buckets), ``wait`` (the program
  starts, or waits for, a collective that goes on beside it).
- Collectives have a **match**, such as ``world:17``: the same on all ranks for the same call.
- Times are those of rank 0's clock: see `mpicoll.trace.clocks`.

Nothing is written before the end. A communicator that is not recorded has none of this in its way.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpicoll.trace.recorder import Recorder, record

__all__ = ["Recorder", "record"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # which need MPI; reading a trace does not
        return getattr(import_module("mpicoll.trace.recorder"), name)
    raise AttributeError(f"module 'mpicoll.trace' has no attribute {name!r}")
