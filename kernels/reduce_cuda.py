"""Reductions on a GPU: dst = dst op src, and dst = s0 op s1 op s2 op ... in one launch.

16-bit floats are computed in float32 and rounded once. Arrays are contiguous, of one dtype and one size;
where all begin at multiples of 16 bytes, they are read and written 16 bytes at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from numba import cuda, types

from .device_cuda import (
    DTYPES,
    Dtype,
    Function,
    Kernel,
    Memory,
    chunk_elements,
    device_function,
    folded,
    is_aligned,
    loader,
    mapped,
    memory_of,
    storer,
    stream_of,
    sweeper,
    widest,
)
from .reduce import check_supported

Array = Any  # of CuPy, PyTorch, or Numba; in the simulator of NumPy


@device_function
def _sum(x, y):  # type: ignore[no-untyped-def]
    return x + y


@device_function
def _prod(x, y):  # type: ignore[no-untyped-def]
    return x * y


@device_function
def _min(x, y):  # type: ignore[no-untyped-def]
    return x if (x < y) | (x != x) else y  # a NaN on either side stays


@device_function
def _max(x, y):  # type: ignore[no-untyped-def]
    return x if (x > y) | (x != x) else y


@device_function
def _band(x, y):  # type: ignore[no-untyped-def]
    return x & y


@device_function
def _bor(x, y):  # type: ignore[no-untyped-def]
    return x | y


@device_function
def _bxor(x, y):  # type: ignore[no-untyped-def]
    return x ^ y


@device_function
def _land(x, y):  # type: ignore[no-untyped-def]
    return (x != 0) & (y != 0)


@device_function
def _lor(x, y):  # type: ignore[no-untyped-def]
    return (x != 0) | (y != 0)


@device_function
def _lxor(x, y):  # type: ignore[no-untyped-def]
    return (x != 0) ^ (y != 0)


_OPERATIONS = {
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


def _folder(op: str, dtype: Dtype) -> Function:
    """A sweep that folds the sources in ascending order."""
    combine, size = _OPERATIONS[op], dtype.itemsize

    def step(lanes: int, pieces: int) -> Function:
        load, store = loader(dtype, lanes, pieces), storer(dtype, lanes, pieces)

        @device_function
        def join(total, source, at, stride):  # type: ignore[no-untyped-def]
            return mapped(combine, total, load(source + at, stride))

        @device_function
        def fold(i, stride, state):  # type: ignore[no-untyped-def]
            target, sources = state
            at, stride = i * size, stride * size
            store(target + at, stride, folded(join, load(sources[0] + at, stride), sources[1:], at, stride))
            return False

        return fold

    return sweeper(step, widest(dtype))


@cache
def reduce_kernel(op: str, dtype: Dtype, nsources: int) -> Kernel:
    """``sources`` being a tuple of addresses."""
    sweep = _folder(op, dtype)
    size, nbytes = dtype.itemsize, widest(dtype) * dtype.itemsize

    def fold(target, sources, count, chunk):  # type: ignore[no-untyped-def]
        begin = cuda.blockIdx.x * chunk
        addresses = mapped(_sum, sources, begin * size)
        target += begin * size
        aligned = is_aligned(folded(_bor, target, addresses), nbytes)
        sweep(cuda.threadIdx.x, min(count - begin, chunk), aligned, (target, addresses))

    return Kernel(fold, types.int64, types.UniTuple(types.int64, nsources), types.int64, types.int64)


def _check_alike(name: str, found: Memory, dst: Memory) -> None:
    if found.dtype != dst.dtype:
        raise TypeError(f"{name}: expected elements of {dst.dtype} as dst, got {found.dtype}")
    if found.size != dst.size:
        raise ValueError(f"{name}: expected {dst.size} elements as dst, got {found.size}")


def _fold(op: str, dst: Array, memory: Memory, sources: Sequence[Memory], stream: Any) -> None:
    dtype = memory.dtype
    check_supported(op, dtype)
    if dtype not in DTYPES:
        raise TypeError(f"dst: expected integers or real floats, got {dtype}")
    chunk = chunk_elements(memory.size, widest(dtype))
    addresses = tuple(source.address for source in sources)
    kernel = reduce_kernel(op, dtype, len(addresses))
    kernel.launch(
        -(-memory.size // chunk), stream_of(stream, dst), memory.address, addresses, memory.size, chunk
    )


def reduce(op: str, dst: Array, src: Array, stream: Any = None) -> None:
    """dst = dst op src, elementwise; the two must not overlap.

    ``op`` is SUM, PROD, MIN or MAX, where NaN stays; for integers also BAND, BOR, BXOR, LAND, LOR, LXOR, of
    which bool has the logical ones alone. It happens in the order of ``stream``, by default the one on which
    dst's library works at present. Raises TypeError and ValueError that name the argument.
    """
    target, source = memory_of(dst, "dst"), memory_of(src, "src")
    _check_alike("src", source, target)
    _fold(op, dst, target, (target, source), stream)


def reduce_many(op: str, dst: Array, sources: Sequence[Array], stream: Any = None) -> None:
    """dst = s0 op s1 op s2 op ..., in this order; see `reduce`.

    16-bit floats are rounded once, at the end. ``dst`` may be one of the sources, else it overlaps none.
    """
    if not sources:
        raise ValueError("sources: expected at least one array, got none")
    target = memory_of(dst, "dst")
    memories = [memory_of(source, f"sources[{i}]") for i, source in enumerate(sources)]
    for i, memory in enumerate(memories):
        _check_alike(f"sources[{i}]", memory, target)
    _fold(op, dst, target, memories, stream)
