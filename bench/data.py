"""What goes into a measured collective, and what must come out.

Data differ for each rank and index, and sums and products are exact in every dtype: nothing is rounded, and
no integer overflows, for some MPI libraries saturate and others wrap. Data repeat after a prime number of
elements, which hardly any block or segment is a multiple of: a piece that arrives in another's place is seen,
and a large buffer costs no more than its copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mpicoll.sizes import format_size

from .kinds import DTYPES, KINDS, SIGNIFICANT_BITS, Kind

Array = npt.NDArray[Any]

PRIMES = (1009, 509, 251, 113, 61, 29, 13, 5, 3, 2)
# NumPy's reductions over the ranks, by NCCL's names of the operations.
REFERENCES: dict[str, Callable[..., Any]] = {
    "sum": np.sum,
    "prod": np.prod,
    "min": np.min,
    "max": np.max,
    "avg": np.mean,
}


@dataclass(frozen=True)
class Problem:
    """One collective as one rank calls it. ``count`` is of one buffer, or of one rank's block."""

    collective: str
    rank: int
    nranks: int
    count: int
    type: str
    redop: str
    root: int

    def __str__(self) -> str:
        operation = f" {self.redop}" if self.kind.reduces else ""
        return f"{self.collective} {self.type}{operation} {format_size(self.size)}"

    @property
    def kind(self) -> Kind:
        return KINDS[self.collective]

    @property
    def dtype(self) -> np.dtype[Any]:
        return DTYPES[self.type]

    @property
    def whole(self) -> int:
        """Elements of the largest buffer."""
        return self.count * (self.nranks if self.kind.blocks else 1)

    @property
    def size(self) -> int:
        """Bytes, as nccl-tests counts them."""
        return self.whole * self.dtype.itemsize

    @cached_property
    def given(self) -> Array | None:
        """This rank's input; None if it has none."""
        if self.collective == "broadcast" and self.rank != self.root:
            return None
        return self._from(self.rank, 0, self.count if self.collective == "allgather" else self.whole)

    @cached_property
    def expected(self) -> Array | None:
        """What this rank must get; None if it gets nothing."""
        block = self.rank * self.count
        match self.collective:
            case "allreduce":
                return self._reduced(0)
            case "reduce":
                return self._reduced(0) if self.rank == self.root else None
            case "reduce_scatter":
                return self._reduced(block)
            case "broadcast":
                return self._from(self.root, 0, self.count)
            case "allgather":
                return np.concatenate([self._from(rank, 0, self.count) for rank in range(self.nranks)])
            case "alltoall":
                return np.concatenate([self._from(rank, block, self.count) for rank in range(self.nranks)])
        return self._from((self.rank - 1) % self.nranks, 0, self.count)  # sendrecv, around a ring

    def _from(self, rank: int, start: int, count: int) -> Array:
        """Elements of what ``rank`` gives, from ``start`` on."""
        return _repeat(self._period(rank).astype(self.dtype), start, count)

    def _reduced(self, start: int) -> Array:
        """``count`` elements of the reduction over all ranks."""
        periods = np.stack([self._period(rank) for rank in range(self.nranks)])
        reduced: Array = REFERENCES[self.redop](periods, axis=0)
        return _repeat(reduced.astype(self.dtype), start, self.count)

    def _period(self, rank: int) -> Array:
        """What ``rank`` gives, until it begins anew."""
        index = np.arange(prime := _largest_prime(self.type, self.nranks))
        values = (7 * index + 31 * rank) % prime
        if self.redop == "prod":  # ones, and at each index at most six ranks' twos
            values = 1 + ((index + rank) % max(2, self.nranks // 4) == 0)
        return values.astype(np.float64 if self.type in SIGNIFICANT_BITS else np.int64)

    def count_wrong(self, got: Array) -> int:
        """How many elements are not as expected."""
        if self.redop != "avg":
            return int(np.count_nonzero(got != self.expected))
        # An average is a multiplication by 1 / ranks, itself rounded.
        tolerance = 2.0 ** (2 - SIGNIFICANT_BITS[self.type])
        right = np.asarray(self.expected, np.float64)
        close = np.abs(got.astype(np.float64) - right) <= tolerance * np.abs(right)
        return int(np.count_nonzero(~close))  # NaN is close to nothing


def _largest_prime(name: str, nranks: int) -> int:
    """The longest period whose values, all below it, add up exactly."""
    exact = 2 ** SIGNIFICANT_BITS[name] if name in SIGNIFICANT_BITS else np.iinfo(DTYPES[name]).max
    return next((prime for prime in PRIMES if (prime - 1) * nranks <= exact), PRIMES[-1])


def _repeat(period: Array, start: int, count: int) -> Array:
    return np.tile(np.roll(period, -start), count // len(period) + 1)[:count]
