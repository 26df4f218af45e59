"""Counts above 2³¹ elements, which MPI's own functions take as a C int."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll

COMM = mpicoll.Communicator(MPI.COMM_WORLD)
COUNT = (1 << 31) + 17
PERIOD = 251  # a prime, so that no power of two that bounds a segment is a multiple of it
NEEDED = 6 * COUNT  # a buffer on each of two ranks, scratch memory, and room for others


def free_memory() -> int:
    """Bytes; the least that any rank sees, so that all skip or none."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return int(COMM.allreduce(kibibytes * 1024, MPI.MIN))


pytestmark = [
    pytest.mark.skipif(COMM.size != 2, reason="two ranks show it; more need more memory"),
    pytest.mark.skipif(free_memory() < NEEDED, reason=f"needs {NEEDED >> 30} GiB of free memory"),
    pytest.mark.deadline(240),
]


def pattern(scale: int) -> np.ndarray:
    return (np.arange(PERIOD) * scale % 256).astype(np.uint8)


def filled(scale: int) -> np.ndarray:
    return np.resize(pattern(scale), COUNT)


def holds(array: np.ndarray, scale: int) -> bool:
    """Whether every element is right, without temporaries as large as the array."""
    whole = array[: COUNT // PERIOD * PERIOD].reshape(-1, PERIOD)
    rest = array[COUNT // PERIOD * PERIOD :]
    same = all((part == pattern(scale)).all() for part in np.array_split(whole, 64))
    return bool(same and (rest == pattern(scale)[: len(rest)]).all())


def test_broadcast_and_allreduce() -> None:
    array = filled(3) if COMM.rank == 0 else np.zeros(COUNT, np.uint8)
    COMM.Bcast(array, root=0)
    assert holds(array, 3)
    COMM.Allreduce(MPI.IN_PLACE, array)
    assert holds(array, 6)
