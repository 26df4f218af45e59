"""Conversions between floats on a GPU, rounding to nearest even: the twin of `reduce.cast_kernel`."""

from __future__ import annotations

from functools import cache

from numba import cuda, types

from .device_cuda import (
    Dtype,
    Function,
    Kernel,
    chunk_elements,
    device_function,
    is_aligned,
    loader,
    storer,
    sweeper,
    widest,
)


def _converter(dst: Dtype, src: Dtype) -> Function:
    """A sweep that converts."""
    dst_size, src_size = dst.itemsize, src.itemsize

    def step(lanes: int, pieces: int) -> Function:
        load, store = loader(src, lanes, pieces), storer(dst, lanes, pieces)

        @device_function
        def convert(i, stride, state):  # type: ignore[no-untyped-def]
            target, source = state
            store(target + i * dst_size, stride * dst_size, load(source + i * src_size, stride * src_size))
            return False

        return convert

    return sweeper(step, widest(dst, src))


@cache
def cast_kernel(dst: Dtype, src: Dtype) -> Kernel:
    """``target`` and ``source`` being addresses."""
    sweep, lanes, dst_size, src_size = _converter(dst, src), widest(dst, src), dst.itemsize, src.itemsize

    def cast(target, source, count, chunk):  # type: ignore[no-untyped-def]
        begin = cuda.blockIdx.x * chunk
        to, given = target + begin * dst_size, source + begin * src_size
        aligned = is_aligned(to, lanes * dst_size) and is_aligned(given, lanes * src_size)
        sweep(cuda.threadIdx.x, min(count - begin, chunk), aligned, (to, given))

    return Kernel(cast, *[types.int64] * 4)


def cast(dst: Dtype, src: Dtype, target: int, source: int, count: int, stream: int) -> None:
    """Convert ``count`` numbers of ``src`` at address ``source`` to ``dst`` at ``target``, on ``stream``.

    The two do not overlap. ``dst`` and ``src`` are two of `device_cuda.FLOATS`.
    """
    chunk = chunk_elements(count, widest(dst, src))
    cast_kernel(dst, src).launch(-(-count // chunk), stream, target, source, count, chunk)
