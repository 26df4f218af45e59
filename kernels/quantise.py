"""Fewer bits per number, on the CPU: blocks of 8-bit integers, and 16-bit floats, with error feedback.

**int8.** Every block of `BLOCK` numbers x, the last one may be shorter, has one float32 scale:

    scale = max |x| / 127        code = x / scale, rounded to nearest even, from -127 to 127
    decoded = scale * code

- A block whose largest magnitude is below `SMALLEST` has scale 0: it decodes to zeros, and its scale cannot
  lose bits as a subnormal number would. Error feedback keeps what it held.
- A block with a NaN or an infinity has scale NaN: it decodes to NaN throughout, its codes mean nothing, and
  its residual is 0, so that a bad step does not spoil those after it.

**Error feedback** (Seide et al. 2014, Interspeech; Karimireddy et al. 2019, arXiv 1901.09847): what rounding
takes away from x is the residual, which is added to the next step's x. ``factor`` scales the values before.

All arrays are flat and contiguous, of any size, also 0. Functions raise ValueError for sizes that do not fit,
`ctypes.ArgumentError` for wrong dtypes. No two arguments may overlap.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from .elements import load, store
from .functions import COUNT, FLOAT, Kernel, Reads, Writes, check_length, kernel

Array = npt.NDArray[Any]

BLOCK = 256  # numbers per scale: 1.6 % more bytes than the codes alone
LARGEST = 127  # not -128, so that the range is the same on both sides of zero
SMALLEST = np.float32(LARGEST * 2.0**-126)  # the scale of this is the smallest normal number
# The next one, times 127, is infinite: the quotient of the largest number and 127 is rounded up.
LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(LARGEST), np.float32(0))

_ZERO, _NAN = np.float32(0), np.float32(np.nan)
_LARGEST = np.float32(LARGEST)
_MAGNITUDE = np.uint32(0x7FFFFFFF)  # all bits but the sign; as integers they are in the order of magnitudes,
_INFINITY = np.uint32(0x7F800000)  # those of infinity and then of NaN above all others
_ROUNDER = np.float32(1.5 * 2**23)  # added to a small number, leaves it as an integer in the lowest bits


def blocks(count: int) -> int:
    """How many scales ``count`` numbers have."""
    return -(-count // BLOCK)


@njit(inline="always")
def _larger(top, x):  # type: ignore[no-untyped-def]
    """The larger magnitude, as bits. As floats they would be compared one by one, because of NaN."""
    return np.uint32(max(top, np.uint32(np.float32(x).view(np.uint32) & _MAGNITUDE)))


@njit(inline="always")
def _scales(top):  # type: ignore[no-untyped-def]
    """A block's scale, and what turns numbers into codes."""
    if top >= _INFINITY:
        return _NAN, _ZERO
    largest = np.uint32(top).view(np.float32)
    if largest < SMALLEST:
        return _ZERO, _ZERO
    return min(largest / _LARGEST, LARGEST_SCALE), _LARGEST / largest


@njit(inline="always")
def _code(x, inverse):  # type: ignore[no-untyped-def]
    return np.float32(x * inverse + _ROUNDER).view(np.int32)  # its lowest byte


@kernel(Reads("f4"), Writes("i1"), Writes("f4"), COUNT)
def _quantise(values, codes, scales, count):  # type: ignore[no-untyped-def]
    for block in range((count + BLOCK - 1) // BLOCK):
        start = block * BLOCK
        stop = min(start + BLOCK, count)
        top = np.uint32(0)
        for i in range(start, stop):
            top = _larger(top, values[i])
        scale, inverse = _scales(top)
        scales[block] = scale
        for i in range(start, stop):
            codes[i] = _code(values[i], inverse)


@kernel(Reads("f4"), FLOAT, Writes("f4"), Writes("i1"), Writes("f4"), COUNT)
def _quantise_feedback(values, factor, residual, codes, scales, count):  # type: ignore[no-untyped-def]
    for block in range((count + BLOCK - 1) // BLOCK):
        start = block * BLOCK
        stop = min(start + BLOCK, count)
        top = np.uint32(0)
        for i in range(start, stop):
            x = values[i] * factor + residual[i]
            residual[i] = x
            top = _larger(top, x)
        scale, inverse = _scales(top)
        scales[block] = scale
        for i in range(start, stop):
            code = np.int8(_code(residual[i], inverse))
            codes[i] = code
            rest = residual[i] - scale * np.float32(code)
            residual[i] = rest if top < _INFINITY else _ZERO


@kernel(Reads("i1"), Reads("f4"), Writes("f4"), COUNT)
def _dequantise(codes, scales, out, count):  # type: ignore[no-untyped-def]
    for block in range((count + BLOCK - 1) // BLOCK):
        for i in range(block * BLOCK, min(block * BLOCK + BLOCK, count)):
            out[i] = scales[block] * np.float32(codes[i])


@kernel(Reads("i1"), Reads("f4"), Writes("f4"), COUNT)
def _dequantise_add(codes, scales, out, count):  # type: ignore[no-untyped-def]
    for block in range((count + BLOCK - 1) // BLOCK):
        for i in range(block * BLOCK, min(block * BLOCK + BLOCK, count)):
            out[i] += scales[block] * np.float32(codes[i])


def _narrow_feedback(values, factor, residual, halves, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        x = values[i] * factor + residual[i]
        store(halves, i, x)
        rest = x - load(halves, i)
        residual[i] = rest if rest - rest == _ZERO else _ZERO  # a number minus itself


def _widen(halves, out, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        out[i] = load(halves, i)


@cache
def _narrow_kernel(dtype: np.dtype[Any]) -> Kernel:
    return Kernel(_narrow_feedback, Reads("f4"), FLOAT, Writes("f4"), Writes(dtype), COUNT)


@cache
def _widen_kernel(dtype: np.dtype[Any]) -> Kernel:
    return Kernel(_widen, Reads(dtype), Writes("f4"), COUNT)


def quantise(values: Array, codes: Array, scales: Array) -> None:
    """``values`` float32 [n] as ``codes`` int8 [n] and ``scales`` float32 [`blocks` (n)]."""
    check_length("codes", codes, len(values))
    check_length("scales", scales, blocks(len(values)))
    _quantise(values, codes, scales, len(values))


def quantise_feedback(values: Array, factor: float, residual: Array, codes: Array, scales: Array) -> None:
    """`quantise` x = values * factor + residual; residual = x - decoded x.

    ``residual`` is float32 [n]. An x that overflows is an infinity and shows as NaN.
    """
    check_length("residual", residual, len(values))
    check_length("codes", codes, len(values))
    check_length("scales", scales, blocks(len(values)))
    _quantise_feedback(values, factor, residual, codes, scales, len(values))


def dequantise(codes: Array, scales: Array, out: Array) -> None:
    """``out`` float32 [n] = decoded ``codes`` int8 [n]."""
    check_length("scales", scales, blocks(len(codes)))
    check_length("out", out, len(codes))
    _dequantise(codes, scales, out, len(codes))


def dequantise_add(codes: Array, scales: Array, out: Array) -> None:
    """``out`` float32 [n] += decoded ``codes`` int8 [n]."""
    check_length("scales", scales, blocks(len(codes)))
    check_length("out", out, len(codes))
    _dequantise_add(codes, scales, out, len(codes))


def narrow_feedback(values: Array, factor: float, residual: Array, halves: Array) -> None:
    """``halves``, float16 or bfloat16 [n], = x = values * factor + residual, rounded to nearest even;
    residual = x - halves.

    Where x is NaN, infinite or too large for the 16 bits, so is halves, and residual is 0.
    """
    check_length("residual", residual, len(values))
    check_length("halves", halves, len(values))
    _narrow_kernel(halves.dtype)(values, factor, residual, halves, len(values))


def widen(halves: Array, out: Array) -> None:
    """``out`` float32 [n] = ``halves``, float16 or bfloat16 [n]."""
    check_length("out", out, len(halves))
    _widen_kernel(halves.dtype)(halves, out, len(halves))
