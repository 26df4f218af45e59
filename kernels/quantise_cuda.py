"""Fewer bits per number, on a GPU: the twin of `quantise`, with the same meaning and the same bits.

A warp works on a block of 256 numbers at a time and keeps them in registers, so that each is read once.
Functions raise TypeError and ValueError that name the argument. What they do happens in the order of
``stream``, by default the one on which the library of the first argument works at present.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda, types

from .device_cuda import (
    SIMULATED,
    THREADS,
    Dtype,
    Function,
    Kernel,
    chunk_elements,
    device_function,
    flat_address,
    folded,
    is_aligned,
    loader,
    mapped,
    memory_of,
    product,
    rounder,
    storer,
    stream_of,
    sweeper,
    widest,
)
from .elements import BFLOAT16_DTYPE
from .quantise import BLOCK, LARGEST, LARGEST_SCALE, SMALLEST, blocks

Array = Any  # of CuPy, PyTorch, or Numba; in the simulator of NumPy

__all__ = [
    "BLOCK",
    "SMALLEST",
    "blocks",
    "dequantise",
    "dequantise_add",
    "narrow_feedback",
    "quantise",
    "quantise_feedback",
    "widen",
]

FLOAT32, INT8 = np.dtype(np.float32), np.dtype(np.int8)
HALVES = (np.dtype(np.float16), BFLOAT16_DTYPE)

# Threads that share a block of numbers. The simulator knows no warps, only blocks of threads.
WARP = THREADS if SIMULATED else 32
WARPS = THREADS // WARP  # in a block of threads
LANES = 4
PIECES = BLOCK // (WARP * LANES)  # accesses of each thread
STRIDE = WARP * LANES  # numbers from one of these to the next

_ZERO, _NAN = np.float32(0), np.float32(np.nan)
_LARGEST = np.float32(LARGEST)
_MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits but the sign; as integers they are in the order of magnitudes
_INFINITY = np.int32(0x7F800000)
_ROUNDER = np.float32(1.5 * 2**23)  # added to a small number, leaves it as an integer in the lowest bits

_load_wide, _load_one = loader(FLOAT32, LANES, PIECES), loader(FLOAT32, 1)
_store_wide, _store_one = storer(FLOAT32, LANES, PIECES), storer(FLOAT32, 1)
_load_codes, _load_code = loader(INT8, LANES, PIECES), loader(INT8, 1)
_store_codes, _store_code = storer(INT8, LANES, PIECES), storer(INT8, 1)


@device_function
def _larger(top, x):  # type: ignore[no-untyped-def]
    """The larger magnitude, as bits."""
    return np.int32(max(top, np.int32(np.float32(x).view(np.int32) & _MAGNITUDE)))


@device_function
def _accumulated(value, factor, rest):  # type: ignore[no-untyped-def]
    return product(value, factor) + rest


@device_function
def _code(x, inverse):  # type: ignore[no-untyped-def]
    return np.int8(np.float32(product(x, inverse) + _ROUNDER).view(np.int32))  # the lowest byte


@device_function
def _missed(x, code, scale, top):  # type: ignore[no-untyped-def]
    """What ``code`` does not say of x: nothing of it in a block that is spoilt."""
    return x - product(scale, np.float32(code)) if top < _INFINITY else _ZERO


@device_function
def _decoded(code, scale):  # type: ignore[no-untyped-def]
    return product(scale, np.float32(code))


@device_function
def _decoded_sum(code, scale, before):  # type: ignore[no-untyped-def]
    return before + product(scale, np.float32(code))


@device_function
def _scale_of(top):  # type: ignore[no-untyped-def]
    if top >= _INFINITY:
        return _NAN
    largest = np.int32(top).view(np.float32)
    return min(largest / _LARGEST, LARGEST_SCALE) if largest >= SMALLEST else _ZERO


@device_function
def _inverse_of(top):  # type: ignore[no-untyped-def]
    largest = np.int32(top).view(np.float32)
    return _LARGEST / largest if top < _INFINITY and largest >= SMALLEST else _ZERO


def _simulated_warp_largest(top: Any) -> Any:
    shared = cuda.shared.array(THREADS, types.int32)
    shared[cuda.threadIdx.x] = top
    cuda.syncthreads()
    largest = max(shared)
    cuda.syncthreads()
    return largest


@device_function
def _compiled_warp_largest(top):  # type: ignore[no-untyped-def]
    for distance in (16, 8, 4, 2, 1):
        top = max(top, cuda.shfl_xor_sync(0xFFFFFFFF, top, distance))
    return top


_warp_largest = _simulated_warp_largest if SIMULATED else _compiled_warp_largest


@device_function
def _place(block, thread):  # type: ignore[no-untyped-def]
    """(block of numbers, place in the warp) for a thread."""
    return block * WARPS + thread // WARP, thread % WARP


@cache
def quantise_kernel(feedback: bool) -> Kernel:
    """x = values, or with ``feedback`` values * factor + residual."""

    @device_function
    def whole(lane, values, factor, residual, codes):  # type: ignore[no-untyped-def]
        """A block of 256 numbers, from aligned memory. The largest magnitude."""
        x = _load_wide(values + 4 * LANES * lane, 4 * STRIDE)
        if feedback:
            x = mapped(_accumulated, x, factor, _load_wide(residual + 4 * LANES * lane, 4 * STRIDE))
        top = _warp_largest(folded(_larger, np.int32(0), x))
        found = mapped(_code, x, _inverse_of(top))
        _store_codes(codes + LANES * lane, STRIDE, found)
        if feedback:
            rest = mapped(_missed, x, found, _scale_of(top), top)
            _store_wide(residual + 4 * LANES * lane, 4 * STRIDE, rest)
        return top

    @device_function
    def number(i, values, factor, residual):  # type: ignore[no-untyped-def]
        x = _load_one(values + 4 * i, 0)
        if feedback:
            x = mapped(_accumulated, x, factor, _load_one(residual + 4 * i, 0))
        return x

    @device_function
    def partly(lane, count, values, factor, residual, codes):  # type: ignore[no-untyped-def]
        """The same for ``count`` numbers, one by one, and each twice."""
        top = np.int32(0)
        for i in range(lane, count, WARP):
            top = _larger(top, number(i, values, factor, residual)[0])
        top = _warp_largest(top)
        for i in range(lane, count, WARP):
            x = number(i, values, factor, residual)
            found = mapped(_code, x, _inverse_of(top))
            _store_code(codes + i, 0, found)
            if feedback:
                _store_one(residual + 4 * i, 0, mapped(_missed, x, found, _scale_of(top), top))
        return top

    def quantise(values, factor, residual, codes, scales, count):  # type: ignore[no-untyped-def]
        block, lane = _place(cuda.blockIdx.x, cuda.threadIdx.x)
        begin = BLOCK * block
        if begin < count:
            x, rest, bytes_ = values + 4 * begin, residual + 4 * begin, codes + begin
            if is_aligned(x | rest, 16) and is_aligned(bytes_, LANES) and begin + BLOCK <= count:
                top = whole(lane, x, factor, rest, bytes_)
            else:
                top = partly(lane, min(BLOCK, count - begin), x, factor, rest, bytes_)
            if lane == 0:
                _store_one(scales + 4 * block, 0, (_scale_of(top),))

    return Kernel(quantise, types.int64, types.float32, *[types.int64] * 4)


@cache
def dequantise_kernel(adds: bool) -> Kernel:
    """out = decoded codes, or out plus these."""

    @device_function
    def whole(lane, codes, scale, out):  # type: ignore[no-untyped-def]
        found = _load_codes(codes + LANES * lane, STRIDE)
        at = out + 4 * LANES * lane
        if adds:
            _store_wide(at, 4 * STRIDE, mapped(_decoded_sum, found, scale, _load_wide(at, 4 * STRIDE)))
        else:
            _store_wide(at, 4 * STRIDE, mapped(_decoded, found, scale))

    @device_function
    def partly(lane, count, codes, scale, out):  # type: ignore[no-untyped-def]
        for i in range(lane, count, WARP):
            found, at = _load_code(codes + i, 0), out + 4 * i
            if adds:
                _store_one(at, 0, mapped(_decoded_sum, found, scale, _load_one(at, 0)))
            else:
                _store_one(at, 0, mapped(_decoded, found, scale))

    def dequantise(codes, scales, out, count):  # type: ignore[no-untyped-def]
        block, lane = _place(cuda.blockIdx.x, cuda.threadIdx.x)
        begin = BLOCK * block
        if begin < count:
            bytes_, x = codes + begin, out + 4 * begin
            scale = _load_one(scales + 4 * block, 0)[0]
            if is_aligned(x, 16) and is_aligned(bytes_, LANES) and begin + BLOCK <= count:
                whole(lane, bytes_, scale, x)
            else:
                partly(lane, min(BLOCK, count - begin), bytes_, scale, x)

    return Kernel(dequantise, *[types.int64] * 4)


def _narrower(dtype: Dtype) -> Function:
    """A sweep for `narrow_kernel`."""
    narrow, size = rounder(dtype), dtype.itemsize

    @device_function
    def lost(x):  # type: ignore[no-untyped-def]
        rest = x - narrow(x)
        return rest if rest - rest == _ZERO else _ZERO  # a number minus itself

    def step(lanes: int, pieces: int) -> Function:
        load, store = loader(FLOAT32, lanes, pieces), storer(FLOAT32, lanes, pieces)
        store_halves = storer(dtype, lanes, pieces)

        @device_function
        def handle(i, stride, state):  # type: ignore[no-untyped-def]
            values, factor, residual, halves = state
            given, rest = load(values + 4 * i, 4 * stride), load(residual + 4 * i, 4 * stride)
            x = mapped(_accumulated, given, factor, rest)
            store_halves(halves + size * i, size * stride, x)
            store(residual + 4 * i, 4 * stride, mapped(lost, x))
            return False

        return handle

    return sweeper(step, widest(FLOAT32))


@cache
def narrow_kernel(dtype: Dtype) -> Kernel:
    """float32 to 16-bit floats, with error feedback."""
    sweep, lanes, size = _narrower(dtype), widest(FLOAT32), dtype.itemsize

    def narrow(values, factor, residual, halves, count, chunk):  # type: ignore[no-untyped-def]
        begin = cuda.blockIdx.x * chunk
        x, rest, target = values + 4 * begin, residual + 4 * begin, halves + size * begin
        aligned = is_aligned(x | rest, 4 * lanes) and is_aligned(target, size * lanes)
        sweep(cuda.threadIdx.x, min(chunk, count - begin), aligned, (x, factor, rest, target))

    return Kernel(narrow, types.int64, types.float32, *[types.int64] * 4)


def _widener(dtype: Dtype) -> Function:
    """A sweep for `widen_kernel`."""
    size = dtype.itemsize

    def step(lanes: int, pieces: int) -> Function:
        load, store = loader(dtype, lanes, pieces), storer(FLOAT32, lanes, pieces)

        @device_function
        def handle(i, stride, state):  # type: ignore[no-untyped-def]
            halves, out = state
            store(out + 4 * i, 4 * stride, load(halves + size * i, size * stride))
            return False

        return handle

    return sweeper(step, widest(FLOAT32))


@cache
def widen_kernel(dtype: Dtype) -> Kernel:
    """16-bit floats to float32."""
    sweep, lanes, size = _widener(dtype), widest(FLOAT32), dtype.itemsize

    def widen(halves, out, count, chunk):  # type: ignore[no-untyped-def]
        begin = cuda.blockIdx.x * chunk
        source, target = halves + size * begin, out + 4 * begin
        aligned = is_aligned(target, 4 * lanes) and is_aligned(source, size * lanes)
        sweep(cuda.threadIdx.x, min(chunk, count - begin), aligned, (source, target))

    return Kernel(widen, *[types.int64] * 4)


def _half(array: Array) -> Dtype:
    dtype = memory_of(array, "halves").dtype
    if dtype not in HALVES:
        raise TypeError(f"halves: expected elements of float16 or bfloat16, got {dtype}")
    return dtype


def _launch_warps(kernel: Kernel, count: int, stream: int, *arguments: Any) -> None:
    kernel.launch(-(-blocks(count) // WARPS), stream, *arguments, count)


def _launch_chunks(kernel: Kernel, count: int, stream: int, *arguments: Any) -> None:
    chunk = chunk_elements(count, widest(FLOAT32))
    kernel.launch(-(-count // chunk), stream, *arguments, count, chunk)


def quantise(values: Array, codes: Array, scales: Array, stream: Any = None) -> None:
    """``values`` float32 [n] as ``codes`` int8 [n] and ``scales`` float32 [`blocks` (n)]."""
    n = memory_of(values, "values").size
    given, to = flat_address(values, "values", FLOAT32, n), flat_address(codes, "codes", INT8, n)
    scale = flat_address(scales, "scales", FLOAT32, blocks(n))
    _launch_warps(quantise_kernel(False), n, stream_of(stream, values), given, 1.0, 0, to, scale)


def quantise_feedback(
    values: Array, factor: float, residual: Array, codes: Array, scales: Array, stream: Any = None
) -> None:
    """`quantise` x = values * factor + residual; residual = x - decoded x.

    ``residual`` is float32 [n]. An x that overflows is an infinity and shows as NaN.
    """
    n = memory_of(values, "values").size
    given, rest = flat_address(values, "values", FLOAT32, n), flat_address(residual, "residual", FLOAT32, n)
    to, scale = flat_address(codes, "codes", INT8, n), flat_address(scales, "scales", FLOAT32, blocks(n))
    _launch_warps(quantise_kernel(True), n, stream_of(stream, values), given, factor, rest, to, scale)


def dequantise(codes: Array, scales: Array, out: Array, stream: Any = None) -> None:
    """``out`` float32 [n] = decoded ``codes`` int8 [n]."""
    _dequantise(codes, scales, out, stream, adds=False)


def dequantise_add(codes: Array, scales: Array, out: Array, stream: Any = None) -> None:
    """``out`` float32 [n] += decoded ``codes`` int8 [n]."""
    _dequantise(codes, scales, out, stream, adds=True)


def _dequantise(codes: Array, scales: Array, out: Array, stream: Any, adds: bool) -> None:
    n = memory_of(codes, "codes").size
    given, scale = flat_address(codes, "codes", INT8, n), flat_address(scales, "scales", FLOAT32, blocks(n))
    to = flat_address(out, "out", FLOAT32, n)
    _launch_warps(dequantise_kernel(adds), n, stream_of(stream, codes), given, scale, to)


def narrow_feedback(values: Array, factor: float, residual: Array, halves: Array, stream: Any = None) -> None:
    """``halves``, float16 or bfloat16 [n], = x = values * factor + residual, rounded to nearest even;
    residual = x - halves.

    Where x is NaN, infinite or too large for the 16 bits, so is halves, and residual is 0.
    """
    n, dtype = memory_of(values, "values").size, _half(halves)
    given, rest = flat_address(values, "values", FLOAT32, n), flat_address(residual, "residual", FLOAT32, n)
    to = flat_address(halves, "halves", dtype, n)
    _launch_chunks(narrow_kernel(dtype), n, stream_of(stream, values), given, factor, rest, to)


def widen(halves: Array, out: Array, stream: Any = None) -> None:
    """``out`` float32 [n] = ``halves``, float16 or bfloat16 [n]."""
    n, dtype = memory_of(halves, "halves").size, _half(halves)
    given, to = flat_address(halves, "halves", dtype, n), flat_address(out, "out", FLOAT32, n)
    _launch_chunks(widen_kernel(dtype), n, stream_of(stream, halves), given, to)
