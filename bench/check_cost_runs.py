"""A job of `mpicoll.bench.check_cost`, with the arguments FOLDER SECONDS BYTES...

FOLDER has a copy of ``transports/steps.py`` for each of `VARIANTS`, and gets the file ``times``: of each
collective and size the seconds of one call, for each variant and turn.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import repeat
from pathlib import Path

import numpy as np
from mpi4py import MPI

import mpicoll
from mpicoll.fastcalls import ADVANCE
from mpicoll.transports.steps import EXPECTED, NOTHING

VARIANTS = ("with", "without")
SIZES = tuple(4**k for k in range(1, 13))  # bytes: 4 B to 16 MiB
TURNS = 40  # of each variant
WARM_UP = 5  # calls


def measure(
    comm: mpicoll.Communicator, method: str, call: Callable[[], None], ways: dict[str, int], seconds: float
) -> dict[str, list[float]]:
    """Seconds of one call in each turn; the variants take turns, in ``seconds`` all together."""
    library, channel = MPI.Intracomm(MPI.COMM_WORLD), comm._channel
    assert channel is not None
    for _ in range(WARM_UP):
        call()
    once = timed(library, call, 50) / 50
    calls = max(1, int(seconds / once / TURNS / len(ways)))
    times: dict[str, list[float]] = {variant: [] for variant in ways}
    for turn in range(TURNS):
        for variant in list(ways)[:: 1 if turn % 2 else -1]:
            comm._fast[method]._state[ADVANCE] = ways[variant]
            channel.state[EXPECTED] = NOTHING  # the variant without leaves it as it is
            times[variant].append(timed(library, call, calls) / calls)
    return times


def timed(library: MPI.Intracomm, call: Callable[[], None], calls: int) -> float:
    """Seconds of so many calls, on the slower rank."""
    library.Barrier()
    start = time.perf_counter()
    for _ in repeat(None, calls):
        call()
    return float(library.allreduce(time.perf_counter() - start, MPI.MAX))


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    comm = mpicoll.Communicator(MPI.COMM_WORLD, transport="shared")
    sys.path.insert(0, str(folder))
    ways = {variant: int(import_module(f"steps_{variant}").ADVANCE) for variant in VARIANTS}
    found = []
    for size in map(int, sys.argv[3:]):
        send, recv = np.zeros(size // 4, np.float32), np.zeros(size // 4, np.float32)
        calls = {"allreduce": partial(comm.Allreduce, send, recv), "broadcast": partial(comm.Bcast, recv)}
        for (name, call), method in zip(calls.items(), ("allreduce", "bcast"), strict=True):
            times = measure(comm, method, call, ways, seconds)
            found.append({"collective": name, "bytes": size, "seconds": times})
    if comm.rank == 0:
        (folder / "times").write_text(json.dumps(found))
    comm.Free()


if __name__ == "__main__":
    main()
