"""A job of `mpicoll.bench.check_cost`: ``mpirun ... -m mpicoll.bench.check_cost_runs FILE SECONDS BYTES...``

Rank 0 writes the times into FILE, with where the package lies that was measured.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
from mpi4py import MPI

import mpicoll

SIZES = tuple(4**k for k in range(1, 13))  # bytes: 4 B to 16 MiB
TURNS = 9
WARM_UP = 5  # calls
MOST = 20_000  # calls in a turn


def measure(comm: mpicoll.Communicator, call: Callable[[], None], seconds: float) -> float:
    """Seconds of one call: the median of some turns, each as long as the slower rank's."""
    library = MPI.Intracomm(comm)
    for _ in range(WARM_UP):
        call()
    calls = 1
    while (turn := timed(library, call, calls)) < seconds / TURNS and calls < MOST:
        calls = min(MOST, max(calls + 1, int(calls * min(10.0, seconds / TURNS / turn))))
    return float(np.median([timed(library, call, calls) / calls for _ in range(TURNS)]))


def timed(library: MPI.Intracomm, call: Callable[[], None], calls: int) -> float:
    """Seconds of so many calls, on the slower rank."""
    library.Barrier()
    start = time.perf_counter()
    for _ in repeat(None, calls):
        call()
    return float(library.allreduce(time.perf_counter() - start, MPI.MAX))


def main() -> None:
    file, seconds, *given = sys.argv[1:]
    comm = mpicoll.Communicator(MPI.COMM_WORLD, transport="shared")
    times = []
    for size in map(int, given):
        send, recv = np.zeros(size // 4, np.float32), np.zeros(size // 4, np.float32)
        for name, call in (
            ("allreduce", partial(comm.Allreduce, send, recv)),
            ("broadcast", partial(comm.Bcast, recv)),
        ):
            times.append((name, size, measure(comm, call, float(seconds))))
    if comm.rank == 0:
        package = str(Path(mpicoll.__file__).parent)
        Path(file).write_text(json.dumps({"package": package, "times": times}))
    comm.Free()


if __name__ == "__main__":
    main()
