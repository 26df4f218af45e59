"""Reductions on a GPU: s0 op s1 op s2 op ... times a factor, into one array or several, in one launch.

16-bit floats are computed in float32 and rounded once. Arrays are contiguous, of one dtype and one size, and
begin at multiples of an element's size. Where all begin equally far from a multiple of 16 bytes, as the same
slice of several arrays does, they are read and written 16 bytes at a time from there on; elsewhere, an
element at a time.

Cost: (nsources + ntargets) count elements through the GPU's memory, and a launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import or_
from typing import Any

import numpy as np
from numba import cuda, types

from .device_cuda import (
    ACCESS,
    THREADS,
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
    product,
    storer,
    stream_of,
    sweeper,
    widest,
)
from .reduce import check_supported, supports

Array = Any  # of CuPy, PyTorch, or Numba; in the simulator of NumPy

__all__ = ["MOST", "checked", "fold", "fold_kernel", "reduce", "reduce_many", "supports"]

MOST = 64  # sources, and targets, of one launch


@device_function
def _sum(x, y):  # type: ignore[no-untyped-def]
    return x + y


@device_function
def _prod(x, y):  # type: ignore[no-untyped-def]
    return x * y


@device_function
def _complex_prod(x, y):  # type: ignore[no-untyped-def]
    real = product(x.real, y.real) - product(x.imag, y.imag)
    return complex(real, product(x.real, y.imag) + product(x.imag, y.real))


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


@device_function
def _scaled(value, factor):  # type: ignore[no-untyped-def]
    return value * factor


@device_function
def _complex_scaled(value, factor):  # type: ignore[no-untyped-def]
    return complex(value.real * factor, value.imag * factor)


@device_function
def _differing(bits, address, first):  # type: ignore[no-untyped-def]
    return bits | (address ^ first)


def _folder(op: str, dtype: Dtype, ntargets: int, nsources: int, scaled: bool) -> Callable[..., Function]:
    """A step, see `sweeper`, that folds the sources in ascending order and stores into all targets.

    Its state is (targets, sources, offset, factor): tuples of addresses, and bytes behind these. The compiler
    writes the loops over them out where they are short. Where they stay loops, a thread has fewer loads under
    way, but needs fewer registers, so that more threads have some.
    """
    combine = _complex_prod if op == "PROD" and dtype.kind == "c" else _OPERATIONS[op]
    scale = _complex_scaled if dtype.kind == "c" else _scaled
    size = dtype.itemsize

    def step(lanes: int, pieces: int) -> Function:
        load, store = loader(dtype, lanes, pieces), storer(dtype, lanes, pieces)

        @device_function
        def join(total, source, at, stride):  # type: ignore[no-untyped-def]
            return mapped(combine, total, load(source + at, stride))

        @device_function
        def fold(i, stride, state):  # type: ignore[no-untyped-def]
            targets, sources, offset, factor = state
            at, stride = offset + i * size, stride * size
            total = load(sources[0] + at, stride)
            for k in range(1, nsources):
                total = folded(join, total, (sources[k],), at, stride)  # which keeps the type of the total
            values = mapped(scale, total, factor) if scaled else total
            for k in range(ntargets):
                store(targets[k] + at, stride, values)
            return False

        return fold

    return functools.cache(step)


def _check_counts(ntargets: int, nsources: int) -> None:
    for name, count in (("targets", ntargets), ("sources", nsources)):
        if not 1 <= count <= MOST:
            raise ValueError(f"{name}: expected 1 to {MOST}, got {count}")


@functools.cache
def fold_kernel(op: str, dtype: Dtype, ntargets: int, nsources: int, scaled: bool) -> Kernel:
    """Of the targets' addresses, the sources', elements, elements for each block, and the factor.

    Raises TypeError and ValueError where there is no such kernel.
    """
    check_supported(op, dtype)
    _check_counts(ntargets, nsources)
    if scaled and dtype.kind in "biu":
        raise TypeError(f"factor: expected 1 for {dtype}; only floats are scaled")
    step, size = _folder(op, dtype, ntargets, nsources, scaled), dtype.itemsize
    sweep, single = sweeper(step, widest(dtype)), step(1, 1)

    def fold(targets, sources, count, chunk, factor):  # type: ignore[no-untyped-def]
        first, block, thread = targets[0], cuda.blockIdx.x, cuda.threadIdx.x
        differing = folded(_differing, folded(_differing, 0, targets, first), sources, first)
        aligned = is_aligned(differing, ACCESS)
        head = min((-first & (ACCESS - 1)) // size, count) if aligned else 0
        for i in range(thread, head if block == 0 else 0, THREADS):
            single(i, 1, (targets, sources, 0, factor))
        begin = head + block * chunk
        left = min(count - begin, chunk)
        if left > 0:
            sweep(thread, left, aligned, (targets, sources, begin * size, factor))

    numbers = types.int64, types.int64, types.float64
    return Kernel(
        fold, types.UniTuple(types.int64, ntargets), types.UniTuple(types.int64, nsources), *numbers
    )


def _check_addresses(targets: Sequence[int], sources: Sequence[int], itemsize: int) -> None:
    if functools.reduce(or_, (*targets, *sources)) % itemsize == 0:
        return
    for name, addresses in (("targets", targets), ("sources", sources)):
        for i, address in enumerate(addresses):
            if address % itemsize:
                raise ValueError(f"{name}[{i}]: expected a multiple of {itemsize} bytes, got {address:#x}")


def checked(
    operation: str, dtype: Dtype, targets: Sequence[int], sources: Sequence[int], count: int, factor: float
) -> tuple[Kernel, Dtype, int]:
    """The kernel for `fold`, and the elements that it works on; raises what `fold` raises."""
    if dtype.kind == "c" and operation == "SUM":  # as twice as many floats, which may lie at more addresses
        dtype, count = np.dtype(f"f{dtype.itemsize // 2}"), 2 * count
    kernel = fold_kernel(operation, dtype, len(targets), len(sources), factor != 1)
    _check_addresses(targets, sources, dtype.itemsize)
    return kernel, dtype, count


def fold(
    operation: str,
    dtype: Dtype,
    targets: Sequence[int],
    sources: Sequence[int],
    count: int,
    factor: float,
    stream: int,
) -> None:
    """Every target = (s0 op s1 op s2 op ...) * ``factor``, in this order, elementwise.

    ``targets`` and ``sources``, 1 to `MOST` each, are addresses of ``count`` elements, and multiples of an
    element's size. A target may be one of the sources, else it overlaps none. ``operation`` is as for
    `reduce`. Floats and complex numbers are scaled in float64 as on the CPU, and then rounded to float32
    where that is computed in; for integers ``factor`` is 1. It happens in the order of ``stream``, a handle,
    on the GPU whose context is current. Raises TypeError and ValueError that name the argument.
    """
    kernel, dtype, count = checked(operation, dtype, targets, sources, count, factor)
    chunk = chunk_elements(count, widest(dtype))
    kernel.launch(-(-count // chunk), stream, targets, sources, count, chunk, factor)


def _check_alike(name: str, found: Memory, dst: Memory) -> None:
    if found.dtype != dst.dtype:
        raise TypeError(f"{name}: expected elements of {dst.dtype} as dst, got {found.dtype}")
    if found.size != dst.size:
        raise ValueError(f"{name}: expected {dst.size} elements as dst, got {found.size}")


def reduce(op: str, dst: Array, src: Array, stream: Any = None) -> None:
    """dst = dst op src, elementwise; the two must not overlap.

    ``op`` is SUM, PROD, MIN or MAX, where NaN stays; for integers also BAND, BOR, BXOR, LAND, LOR, LXOR, of
    which bool has the logical ones alone; complex numbers have SUM and PROD. It happens in the order of
    ``stream``, by default the one on which dst's library works at present. Raises TypeError and ValueError
    that name the argument.
    """
    target, source = memory_of(dst, "dst"), memory_of(src, "src")
    _check_alike("src", source, target)
    _fold(op, target, (target, source), stream_of(stream, dst))


def reduce_many(op: str, dst: Array, sources: Sequence[Array], stream: Any = None) -> None:
    """dst = s0 op s1 op s2 op ..., in this order, of at most `MOST` sources; see `reduce`.

    16-bit floats are rounded once, at the end. ``dst`` may be one of the sources, else it overlaps none.
    """
    target = memory_of(dst, "dst")
    memories = [memory_of(source, f"sources[{i}]") for i, source in enumerate(sources)]
    for i, memory in enumerate(memories):
        _check_alike(f"sources[{i}]", memory, target)
    _fold(op, target, memories, stream_of(stream, dst))


def _fold(op: str, target: Memory, sources: Sequence[Memory], stream: int) -> None:
    addresses = [source.address for source in sources]
    fold(op, target.dtype, (target.address,), addresses, target.size, 1.0, stream)
