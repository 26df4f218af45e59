"""The collectives that ``mpicoll bench`` measures, and how their sizes and bandwidths are counted.

With n ranks and a call of ``size`` bytes that takes t seconds, algbw = size / t and busbw = algbw * factor.
The factor is what the busiest link must carry for each byte, so that busbw can be held against the hardware
at any number of ranks. Where a rank has a block for every rank or from every rank, ``size`` counts n blocks;
everywhere else it is one rank's buffer.

Source: nccl-tests, doc/PERFORMANCE.md and the ``get*CollByteCount`` functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


def _all(nranks: int) -> float:
    return 1.0


def _others(nranks: int) -> float:
    return (nranks - 1) / nranks


def _others_twice(nranks: int) -> float:
    return 2 * (nranks - 1) / nranks


@dataclass(frozen=True)
class Kind:
    """One collective: mpi4py's name for it, and what nccl-tests makes of its sizes."""

    method: str
    factor: Callable[[int], float]
    blocks: bool = False  # a size counts a block for every rank
    reduces: bool = False
    rooted: bool = False
    ours: bool = True  # whether it has algorithms of ours, and a persistent form


KINDS = {
    "allreduce": Kind("Allreduce", _others_twice, reduces=True),
    "reduce_scatter": Kind("Reduce_scatter_block", _others, blocks=True, reduces=True),
    "broadcast": Kind("Bcast", _all, rooted=True),
    "allgather": Kind("Allgather", _others, blocks=True),
    "reduce": Kind("Reduce", _all, reduces=True, rooted=True),
    "alltoall": Kind("Alltoall", _others, blocks=True),
    "sendrecv": Kind("Sendrecv", _all, ours=False),
}

# NumPy's names by NCCL's.
DTYPES: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "half": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "int32": np.dtype(np.int32),
    "uint32": np.dtype(np.uint32),
    "int64": np.dtype(np.int64),
    "uint64": np.dtype(np.uint64),
}
SIGNIFICANT_BITS = {"float": 24, "double": 53, "half": 11, "bfloat16": 8}  # of the floating ones
OPERATIONS = ("sum", "prod", "min", "max", "avg")
NO_OPERATION = "none"
NO_ROOT = -1


def sizes(smallest: int, largest: int, factor: int | None, step: int | None) -> Iterator[int]:
    """Bytes from ``smallest`` up to ``largest``, times ``factor`` or plus ``step`` each time."""
    size = smallest
    while size <= largest:
        yield size
        size = size * factor if factor is not None else size + (step or 0)


def count_of(kind: Kind, nbytes: int, itemsize: int, nranks: int) -> int:
    """The elements of a buffer, or of each block, in a call of ``nbytes``: rounded down, but one at least."""
    return max(1, nbytes // (itemsize * (nranks if kind.blocks else 1)))
