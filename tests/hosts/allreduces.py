"""Allreduces until a file appears, every result checked: ``python -m tests.hosts.allreduces DIRECTORY``.

Rank 0 makes DIRECTORY/begun when calls are on their way. Some calls after somebody has made DIRECTORY/end all
ranks end together, and say how long the longest call took. Where a call fails, each rank writes its error to
DIRECTORY/rank0 or the like; the job ends when all have done so.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

import mpicoll
from mpicoll.faults import abort_on_exception
from tests.mpi.examples import data, total

COUNTS = (3, 9_001, 150_001)  # of 8 bytes: in messages, over memory and messages, in messages
SOME = 10 * len(COUNTS)  # calls
OTHER_RANKS = 10.0  # seconds that they get to meet their errors


def contribution(comm: mpicoll.Communicator, count: int, number: int, end: bool) -> np.ndarray:
    """What this rank gives; its last element says whether it has seen the end."""
    return np.append(data(comm.rank, count, number), int(end))


def run(comm: mpicoll.Communicator, directory: Path) -> None:
    number, last, longest = 0, math.inf, 0.0
    while number <= last:
        count = COUNTS[number % len(COUNTS)]
        buffer = contribution(comm, count, number, comm.rank == 0 and (directory / "end").exists())
        began = time.monotonic()
        comm.Allreduce(MPI.IN_PLACE, buffer)
        if number >= SOME:
            longest = max(longest, time.monotonic() - began)
        np.testing.assert_array_equal(buffer[:-1], total(comm.size, count, number), f"call {number}")
        if buffer[-1]:
            last = min(last, number + SOME)
        if number == SOME and comm.rank == 0:
            (directory / "begun").touch()
        number += 1
    print(f"rank {comm.rank}: {number} calls, the longest took {longest:.3f} s", flush=True)


def report(directory: Path, comm: mpicoll.Communicator, error: str) -> None:
    """Write this rank's error, and wait until the others have written theirs: the hosts share their files."""
    files = [directory / f"rank{rank}" for rank in range(comm.size)]
    draft = directory / f"draft{comm.rank}"
    draft.write_text(error)
    draft.rename(files[comm.rank])
    until = time.monotonic() + OTHER_RANKS
    while time.monotonic() < until and not all(file.exists() for file in files):
        time.sleep(0.01)


@abort_on_exception()
def main() -> None:
    directory = Path(sys.argv[1])
    with mpicoll.Communicator(MPI.COMM_WORLD) as comm:
        try:
            run(comm, directory)
        except Exception as error:
            report(directory, comm, f"{type(error).__name__}: {error}")
            raise


if __name__ == "__main__":
    main()
