"""CPU reduction kernels: ``dst[i] = a[i] op b[i]``, compiled for one operation and dtype when first used.

Each kernel is a C function ``void (dst*, a*, b*, intp count)`` found by its address, so the compiled
transports call whichever they are given and are themselves compiled once. ``dst`` may be ``a``, otherwise
the three do not overlap. 16-bit floats are computed in float32 and rounded once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit, types

from .caching import CACHED
from .elements import BFLOAT16_DTYPE, element_type, load, same_address, store
from .memory import as_float, call, int64s
from .tasks import DONE, Task


@njit(inline="always")
def _apply(combine, dst, a, b, count):  # type: ignore[no-untyped-def]
    # The in-place case has a loop of its own: LLVM's overlap test between dst and a would otherwise send it
    # to scalar code.
    if same_address(dst, a):
        for i in range(count):
            store(dst, i, combine(load(dst, i), load(b, i)))
    else:
        for i in range(count):
            store(dst, i, combine(load(a, i), load(b, i)))


@njit(inline="always")
def _sum_of(x, y):  # type: ignore[no-untyped-def]
    return x + y


@njit(inline="always")
def _prod_of(x, y):  # type: ignore[no-untyped-def]
    return x * y


@njit(inline="always")
def _min_of(x, y):  # type: ignore[no-untyped-def]
    return x if (x < y) | (x != x) else y  # a NaN on either side stays


@njit(inline="always")
def _max_of(x, y):  # type: ignore[no-untyped-def]
    return x if (x > y) | (x != x) else y


@njit(inline="always")
def _band_of(x, y):  # type: ignore[no-untyped-def]
    return x & y


@njit(inline="always")
def _bor_of(x, y):  # type: ignore[no-untyped-def]
    return x | y


@njit(inline="always")
def _bxor_of(x, y):  # type: ignore[no-untyped-def]
    return x ^ y


@njit(inline="always")
def _land_of(x, y):  # type: ignore[no-untyped-def]
    return (x != 0) & (y != 0)


@njit(inline="always")
def _lor_of(x, y):  # type: ignore[no-untyped-def]
    return (x != 0) | (y != 0)


@njit(inline="always")
def _lxor_of(x, y):  # type: ignore[no-untyped-def]
    return (x != 0) ^ (y != 0)


def _sum(dst, a, b, count):  # type: ignore[no-untyped-def]
    _apply(_sum_of, dst, a, b, count)


def _prod(dst, a, b, count):  # type: ignore[no-untyped-def]
    _apply(_prod_of, dst, a, b, count)


def _min(dst, a, b, count):  # type: ignore[no-untyped-def]
    _apply(_min_of, dst, a, b, count)


def _max(dst, a, b, count):  # type: ignore[no-untyped-def]
    _apply(_max_of, dst, a, b, count)


def _band(dst, a, b, count):  # type: ignore[no-untyped-def]
    _apply(_band_of, dst, a, b, count)


def _bor(dst, a, b, count):  # type: ignore[no-untyped-def]
    _apply(_bor_of, dst, a, b, count)


def _bxor(dst, a, b, count):  # type: ignore[no-untyped-def]
    _apply(_bxor_of, dst, a, b, count)


def _land(dst, a, b, count):  # type: ignore[no-untyped-def]
    _apply(_land_of, dst, a, b, count)


def _lor(dst, a, b, count):  # type: ignore[no-untyped-def]
    _apply(_lor_of, dst, a, b, count)


def _lxor(dst, a, b, count):  # type: ignore[no-untyped-def]
    _apply(_lxor_of, dst, a, b, count)


def _cast(dst, src, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        store(dst, i, load(src, i))


def _scale(dst, count, factor):  # type: ignore[no-untyped-def]
    for i in range(count):
        store(dst, i, load(dst, i) * factor)


_KERNELS: dict[str, Callable[..., None]] = {
    "SUM": _sum,
    "PROD": _prod,
    "MIN": _min,
    "MAX": _max,
    "BAND": _band,
    "BOR": _bor,
    "BXOR": _bxor,
    "LAND": _land,
    "LOR": _lor,
    "LXOR": _lxor,
}

# What an operation may be applied to, as NumPy dtype kinds (b bool, i u integers, f floats, c complex; V is
# how NumPy names bfloat16).
_KINDS = {
    "SUM": "iufcV",
    "PROD": "iufcV",
    "MIN": "iufV",
    "MAX": "iufV",
    "BAND": "iu",
    "BOR": "iu",
    "BXOR": "iu",
    "LAND": "biu",
    "LOR": "biu",
    "LXOR": "biu",
}

DTYPES = frozenset(np.dtype(code) for code in "?bhilqBHILQefdFD") | {BFLOAT16_DTYPE}
OPERATIONS = tuple(_KERNELS)


def supports(op: str, dtype: np.dtype[Any]) -> bool:
    """Whether a reduction kernel exists for ``op`` on ``dtype``."""
    return dtype in DTYPES and dtype.kind in _KINDS[op]


def check_supported(op: str, dtype: np.dtype[Any]) -> None:
    """Raise TypeError, naming what is allowed, where ``op`` is not defined for ``dtype``."""
    if not supports(op, dtype):
        allowed = [name for name in OPERATIONS if supports(name, dtype)]
        raise TypeError(f"op: {op} is not defined for {dtype}; allowed: {', '.join(allowed) or 'none'}")


def rounds_often(op: str, dtype: np.dtype[Any], nranks: int) -> bool:
    """Whether partial results need float32: sums of more than two 16-bit floats would be rounded twice.

    ``op`` may also be AVG, which divides after the sum.
    """
    half = dtype.itemsize == 2 and dtype.kind in "fV"
    return half and op not in ("MIN", "MAX") and (nranks > 2 or op == "AVG")


@cache
def _compiled(kernel: Callable[..., None], *arguments: types.Type) -> Any:
    """The kernel as a C function; kept for good, for compiled code holds its address."""
    return CACHED.cfunc(types.void(*arguments))(kernel)


def reduce_kernel(
    op: str, dtype: np.dtype[Any], total: np.dtype[Any] | None = None, first: np.dtype[Any] | None = None
) -> int:
    """Address of ``void (dst*, a*, b*, intp count)`` doing ``dst = a op b``.

    ``b`` has elements of ``dtype``; so have ``dst``, if ``total`` does not say otherwise, and ``a``, which
    ``first`` may say. Raises TypeError where ``op`` is not defined for ``dtype``.
    """
    check_supported(op, dtype)
    pointers = (types.CPointer(element_type(kind or dtype)) for kind in (total, first, dtype))
    return int(_compiled(_KERNELS[op], *pointers, types.intp).address)


def scale_kernel(dtype: np.dtype[Any]) -> int:
    """Address of ``void (dst*, intp count, double factor)`` doing ``dst *= factor``."""
    return int(_compiled(_scale, types.CPointer(element_type(dtype)), types.intp, types.float64).address)


# -- the state of a task that scales: address of the kernel, address, elements, and the factor, a float64


@CACHED.cfunc("int64(int64, int64)")
def _scale_array(state, patience):  # type: ignore[no-untyped-def]
    s = int64s(state)
    call(s[0], (s[1], s[2], as_float(s[3])))
    return DONE


def scale_task(array: np.ndarray[Any, Any], factor: float) -> Task:
    """``array *= factor``, for a contiguous array of floats."""
    state = np.array([scale_kernel(array.dtype), array.ctypes.data, array.size, 0])
    state[3:].view(np.float64)[0] = factor
    return Task(_scale_array.address, state.ctypes.data, (array, state))


# -- the state of a task that sums rows of 16-bit floats
FIRST, FOLD, SCALE, NARROW = range(4)  # addresses of kernels; SCALE is 0 for a sum that is not scaled
FACTOR = 4  # a float64
ROWS, NROWS, ROW_BYTES = 5, 6, 7  # address of the first, how many, and how far apart
TOTAL, COUNT = 8, 9  # address of the sum, elements of a row
SCRATCH = 10  # address of `SUMMED` float32
SUMMED = 4096  # elements that are summed over all rows before the next: they stay in the first-level cache


@CACHED.cfunc("int64(int64, int64)")
def _sum_rows(state, patience):  # type: ignore[no-untyped-def]
    s = int64s(state)
    for start in range(0, s[COUNT], SUMMED):
        count = min(SUMMED, s[COUNT] - start)
        row = s[ROWS] + 2 * start
        call(s[FIRST], (s[SCRATCH], row, row + s[ROW_BYTES], count))
        for i in range(2, s[NROWS]):
            call(s[FOLD], (s[SCRATCH], s[SCRATCH], row + i * s[ROW_BYTES], count))
        if s[SCALE] != 0:
            call(s[SCALE], (s[SCRATCH], count, as_float(s[FACTOR])))
        call(s[NARROW], (s[TOTAL] + 2 * start, s[SCRATCH], count))
    return DONE


def sum_rows_task(rows: np.ndarray[Any, Any], total: np.ndarray[Any, Any], factor: float | None) -> Task:
    """``total`` [m] = the sum of ``rows`` [p, m] times ``factor``, for 16-bit floats and two rows or more.

    Summed in float32, in the order of rows, and rounded once.
    """
    wide = np.dtype(np.float32)
    scratch = np.empty(SUMMED, wide)
    state = np.zeros(SCRATCH + 1, np.int64)
    state[FIRST] = reduce_kernel("SUM", rows.dtype, wide)
    state[FOLD] = reduce_kernel("SUM", rows.dtype, wide, wide)
    state[NARROW] = cast_kernel_address(rows.dtype, wide)
    if factor is not None:
        state[SCALE] = scale_kernel(wide)
        state[FACTOR : FACTOR + 1].view(np.float64)[0] = factor
    state[ROWS], state[NROWS], state[ROW_BYTES] = rows.ctypes.data, len(rows), rows.strides[0]
    state[TOTAL], state[COUNT] = total.ctypes.data, total.size
    state[SCRATCH] = scratch.ctypes.data
    return Task(_sum_rows.address, state.ctypes.data, (state, scratch, rows, total))


@cache
def cast_kernel(dst: np.dtype[Any], src: np.dtype[Any]) -> Callable[[int, int, int], None]:
    """``f(dst_address, src_address, count)`` converting elements, rounding to nearest even."""
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ssize_t)
    return prototype(cast_kernel_address(dst, src))


def cast_kernel_address(dst: np.dtype[Any], src: np.dtype[Any]) -> int:
    """Where `cast_kernel` begins, for compiled code to call."""
    pointers = (types.CPointer(element_type(dtype)) for dtype in (dst, src))
    return int(_compiled(_cast, *pointers, types.intp).address)
