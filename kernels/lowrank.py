"""Products of narrow matrices, on the CPU: the parts of PowerSGD that must give the same bits on every rank.

A library's matrix product may add in another order on a machine of another kind, or with another number of
threads. Here the order is fixed.

Matrices are flat contiguous float32 arrays, row after row; no two arguments may overlap. Functions raise
ValueError for sizes that do not fit, `ctypes.ArgumentError` for wrong dtypes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .functions import COUNT, FLOAT, Reads, Writes, check_length, kernel

Array = npt.NDArray[Any]

# A column of which less than this part remains depends on those before it: what remains is mostly rounding,
# and is orthogonal to them only up to float32's 6e-8 over this.
DEPENDENT = 1e-4
_DEPENDENT_SQUARED = DEPENDENT**2


@kernel(Writes("f4"), COUNT, COUNT)
def _orthogonalise(p, rows, rank):  # type: ignore[no-untyped-def]
    before, products = np.zeros(rank), np.zeros(rank)
    for i in range(rows):
        for c in range(rank):
            before[c] += np.float64(p[i * rank + c]) * np.float64(p[i * rank + c])

    for c in range(rank):
        products[:] = 0
        for i in range(rows):
            for b in range(c, rank):
                products[b] += np.float64(p[i * rank + c]) * np.float64(p[i * rank + b])
        square = products[c]
        depends = square <= _DEPENDENT_SQUARED * before[c]
        scale = 0.0 if depends else 1 / math.sqrt(square)
        for i in range(rows):
            unit = p[i * rank + c] * scale
            p[i * rank + c] = unit
            for b in range(c + 1, rank):
                p[i * rank + b] -= unit * (products[b] * scale)


@kernel(FLOAT, Reads("f4"), Reads("f4"), Writes("f4"), COUNT, COUNT, COUNT)
def _add_product(factor, p, q, out, rows, rank, columns):  # type: ignore[no-untyped-def]
    for i in range(rows):
        for c in range(rank):
            weight = factor * p[i * rank + c]
            for j in range(columns):
                out[i * columns + j] += weight * q[c * columns + j]


def orthogonalise(p: Array, rank: int) -> None:
    """Make the columns of ``p`` [rows, rank] orthonormal, in place, by Gram-Schmidt (modified: Björck 1967).

    A column that is 0, or depends on those before it (see `DEPENDENT`), becomes 0. A column with a NaN or
    infinity has a NaN afterwards, and so have those behind it.
    """
    rows = len(p) // rank
    check_length("p", p, rows * rank)
    _orthogonalise(p, rows, rank)


def add_product(factor: float, p: Array, q: Array, out: Array, rank: int) -> None:
    """``out`` [rows, columns] += factor * ``p`` [rows, rank] @ ``q`` [rank, columns]."""
    rows, columns = len(p) // rank, len(q) // rank
    check_length("p", p, rows * rank)
    check_length("q", q, rank * columns)
    check_length("out", out, rows * columns)
    _add_product(factor, p, q, out, rows, rank, columns)
