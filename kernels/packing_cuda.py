"""Many tensors as one bucket, on a GPU: the twin of `packing`, with the same meaning.

Each call is one launch, whatever the number of tensors and their sizes: a block finds its tensor, and its
part of it, in tables that are made once. Memory is read and written 16 bytes at a time where tensor and slot
allow that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numba import cuda, types
from numba.np.numpy_support import from_dtype

from .device_cuda import (
    DTYPES,
    FLOATS,
    OWN,
    THREADS,
    Chunks,
    Dtype,
    Function,
    Kernel,
    Memory,
    device_function,
    find_chunk,
    folded,
    int64_at,
    is_aligned,
    loader,
    mapped,
    memory_of,
    product,
    set_flag,
    storer,
    stream_of,
    sweeper,
    widest,
)
from .elements import BFLOAT16_DTYPE
from .packing import extent, slots

Array = Any  # of CuPy, PyTorch, or Numba; in the simulator of NumPy

SLOT = 16  # bytes of which every slot begins at a multiple
WORDS = np.dtype(np.uint32)
WIDTH = OWN + 2  # of a row of the table: a tensor's address, and its slot's
SEARCH_WIDTH = OWN + 1  # a tensor's address
UPDATE_WIDTH = OWN + 3  # a parameter's address, its velocity's, and the gradient's

# The magnitudes from which on numbers are infinite when they have been rounded.
_LIMITS = {np.dtype(np.float16): 65520.0, BFLOAT16_DTYPE: (2 - 2.0**-8) * 2.0**127}


def wide(*dtypes: Dtype) -> type[np.floating[Any]]:
    """What numbers of these dtypes are computed in."""
    return np.float64 if np.dtype(np.float64) in dtypes else np.float32


def limit(dtype: Dtype) -> Any:
    """The magnitude from which on a number is infinite when it has been rounded to ``dtype``."""
    return wide(dtype)(_LIMITS.get(dtype, np.inf))


@device_function
def _scaled(value, factor):  # type: ignore[no-untyped-def]
    return value * factor


@device_function
def _flag(found, nonfinite, array):  # type: ignore[no-untyped-def]
    if found and nonfinite != 0:
        set_flag(nonfinite + 4 * array)


def _finder(dtype: Dtype) -> Function:
    """``find(found, value)``: whether something was found, or ``value`` is not finite as a ``dtype``."""
    kind, bound = wide(dtype), limit(dtype)

    @device_function
    def find(found, value):  # type: ignore[no-untyped-def]
        return found | (not abs(kind(value)) < bound)  # of a NaN nothing is true

    return find


def _copier(itemsize: int) -> Function:
    """A sweep that copies elements of ``itemsize`` bytes."""

    def step(lanes: int, pieces: int) -> Function:
        dtype, number = (WORDS, SLOT // 4) if lanes > 1 else (np.dtype(f"u{itemsize}"), 1)
        load, store = loader(dtype, number, pieces), storer(dtype, number, pieces)

        @device_function
        def copy(i, stride, state):  # type: ignore[no-untyped-def]
            target, source, _ = state
            values = load(source + i * itemsize, stride * itemsize)
            store(target + i * itemsize, stride * itemsize, values)
            return False

        return copy

    return sweeper(step, SLOT // itemsize)


def _converter(dst: Dtype, src: Dtype) -> Function:
    """A sweep that multiplies, converts, and says whether something is not finite then."""
    dst_size, src_size, find = dst.itemsize, src.itemsize, _finder(dst)

    def step(lanes: int, pieces: int) -> Function:
        load, store = loader(src, lanes, pieces), storer(dst, lanes, pieces)

        @device_function
        def convert(i, stride, state):  # type: ignore[no-untyped-def]
            target, source, factor = state
            values = mapped(_scaled, load(source + i * src_size, stride * src_size), factor)
            store(target + i * dst_size, stride * dst_size, values)
            return folded(find, False, values)

        return convert

    return sweeper(step, widest(dst, src))


@cache
def move_kernel(dst: Dtype, src: Dtype, packs: bool) -> Kernel:
    """Tensors of ``src`` to slots of ``dst`` or, unless it ``packs``, the reverse; integers are copied."""
    source_at, target_at = (OWN, OWN + 1) if packs else (OWN + 1, OWN)
    dst_size, src_size, lanes = dst.itemsize, src.itemsize, widest(dst, src)
    sweep = _converter(dst, src) if dst in FLOATS else _copier(dst_size)
    zero = storer(np.dtype(f"u{dst_size}"), 1)

    def move(table, owners, chunk, nonfinite, factor):  # type: ignore[no-untyped-def]
        array, row, begin, left = find_chunk(cuda.blockIdx.x, table, WIDTH, owners, chunk)
        source = int64_at(row + 8 * source_at) + begin * src_size
        target = int64_at(row + 8 * target_at) + begin * dst_size
        aligned = is_aligned(source, lanes * src_size) and is_aligned(target, lanes * dst_size)
        found = sweep(cuda.threadIdx.x, min(left, chunk), aligned, (target, source, factor))
        _flag(found, nonfinite, array)
        if packs and left <= chunk:
            end = (left * dst_size + SLOT - 1) // SLOT * SLOT
            for i in range((left + cuda.threadIdx.x) * dst_size, end, THREADS * dst_size):
                zero(target + i, 0, (0,))

    return Kernel(move, *[types.int64] * 4, from_dtype(np.dtype(wide(dst, src))))


def _looker(dtype: Dtype) -> Function:
    """A sweep that says whether something is not finite."""
    size, find = dtype.itemsize, _finder(dtype)

    def step(lanes: int, pieces: int) -> Function:
        load = loader(dtype, lanes, pieces)

        @device_function
        def look(i, stride, source):  # type: ignore[no-untyped-def]
            return folded(find, False, load(source + i * size, stride * size))

        return look

    return sweeper(step, widest(dtype))


@cache
def search_kernel(dtype: Dtype) -> Kernel:
    """Tensors of ``dtype``, a float."""
    size, lanes, sweep = dtype.itemsize, widest(dtype), _looker(dtype)

    def search(table, owners, chunk, nonfinite):  # type: ignore[no-untyped-def]
        array, row, begin, left = find_chunk(cuda.blockIdx.x, table, SEARCH_WIDTH, owners, chunk)
        source = int64_at(row + 8 * OWN) + begin * size
        found = sweep(cuda.threadIdx.x, min(left, chunk), is_aligned(source, lanes * size), source)
        _flag(found, nonfinite, array)

    return Kernel(search, *[types.int64] * 4)


@device_function
def _gradient(g, w, factor, decay):  # type: ignore[no-untyped-def]
    return product(g, factor) + product(decay, w)


@device_function
def _velocity(g, v, momentum):  # type: ignore[no-untyped-def]
    return product(momentum, v) + g


@device_function
def _parameter(w, g, v, rate, momentum, nesterov):  # type: ignore[no-untyped-def]
    return w - product(rate, g + product(momentum, v) if nesterov != 0 else v)


def _updater(dtype: Dtype, bucket: Dtype) -> Function:
    """A sweep that updates parameters, and says whether a scaled gradient is not finite."""
    size, bucket_size, find = dtype.itemsize, bucket.itemsize, _finder(dtype)

    def step(lanes: int, pieces: int) -> Function:
        load, store = loader(dtype, lanes, pieces), storer(dtype, lanes, pieces)
        load_gradient = loader(bucket, lanes, pieces)

        @device_function
        def update(i, stride, state):  # type: ignore[no-untyped-def]
            parameters, velocities, gradients, factor, rate, momentum, decay, nesterov = state
            g = load_gradient(gradients + i * bucket_size, stride * bucket_size)
            w = load(parameters + i * size, stride * size)
            v = load(velocities + i * size, stride * size)
            found = folded(find, False, mapped(product, g, factor))
            g = mapped(_gradient, g, w, factor, decay)
            v = mapped(_velocity, g, v, momentum)
            store(velocities + i * size, stride * size, v)
            store(parameters + i * size, stride * size, mapped(_parameter, w, g, v, rate, momentum, nesterov))
            return found

        return update

    return sweeper(step, widest(dtype, bucket))


@cache
def update_kernel(dtype: Dtype, bucket: Dtype) -> Kernel:
    """Parameters and velocities of ``dtype``, gradients in slots of ``bucket``."""
    size, bucket_size, lanes = dtype.itemsize, bucket.itemsize, widest(dtype, bucket)
    sweep = _updater(dtype, bucket)

    def update(table, owners, chunk, nonfinite, factor, rate, momentum, decay, nesterov):  # type: ignore[no-untyped-def]
        array, row, begin, left = find_chunk(cuda.blockIdx.x, table, UPDATE_WIDTH, owners, chunk)
        w = int64_at(row + 8 * OWN) + begin * size
        v = int64_at(row + 8 * OWN + 8) + begin * size
        g = int64_at(row + 8 * OWN + 16) + begin * bucket_size
        aligned = is_aligned(w | v, lanes * size) and is_aligned(g, lanes * bucket_size)
        state = w, v, g, factor, rate, momentum, decay, nesterov
        found = sweep(cuda.threadIdx.x, min(left, chunk), aligned, state)
        _flag(found, nonfinite, array)

    return Kernel(update, *[types.int64] * 4, *[from_dtype(dtype)] * 4, types.int64)


def _common_dtype(memories: Sequence[Memory], name: str) -> Dtype:
    """Raises TypeError where there are several, or one that no kernel knows."""
    dtypes = {memory.dtype for memory in memories} or {np.dtype(np.float32)}
    if len(dtypes) > 1:
        raise TypeError(f"{name}: expected one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    if not dtypes <= DTYPES:
        raise TypeError(f"{name}: expected integers or real floats, got {dtypes.pop()}")
    return dtypes.pop()


def _check_bucket(bucket: Memory, elements: int, dtype: Dtype) -> None:
    if len(bucket.shape) != 1:
        raise ValueError(f"bucket: expected a flat array, got shape {bucket.shape}")
    if bucket.size < elements:
        raise ValueError(f"bucket: expected at least {elements} elements, got {bucket.size}")
    if bucket.address % SLOT:
        raise ValueError(f"bucket: expected memory that begins at a multiple of {SLOT} bytes")
    if bucket.dtype != dtype and not (bucket.dtype in FLOATS and dtype in FLOATS):
        raise TypeError(f"bucket: expected elements of {dtype} or another float dtype, got {bucket.dtype}")


def _flags_address(nonfinite: Array | None, ntensors: int) -> int:
    """0 for None. Raises ValueError."""
    if nonfinite is None:
        return 0
    flags = memory_of(nonfinite, "nonfinite")
    if flags.dtype != np.int32 or flags.shape != (ntensors,):
        raise ValueError(f"nonfinite: expected {ntensors} int32, got {flags.dtype} of shape {flags.shape}")
    return flags.address


def _memories(arrays: Sequence[Array], name: str) -> list[Memory]:
    return [memory_of(array, f"{name}[{i}]") for i, array in enumerate(arrays)]


def _slot_addresses(counts: Sequence[int], bucket: Memory) -> list[int]:
    begins, _ = slots(counts, bucket.dtype.itemsize)
    return [bucket.address + begin * bucket.dtype.itemsize for begin in begins]


class Launch:
    """The launch of a kernel, to be done again and again. ``keep`` owns the memory that it is about."""

    def __init__(
        self, kernel: Kernel, blocks: int, stream: int, arguments: tuple[Any, ...], keep: Any
    ) -> None:
        self._kernel, self._keep = kernel, keep
        self._arguments = blocks, stream, *arguments

    def __call__(self) -> None:
        self._kernel.launch(*self._arguments)


class Packing:
    """Many tensors of one dtype, and the slots of one bucket that hold them.

    ``tensors`` are contiguous arrays of any shape on one GPU, of integers or real floats, ``bucket`` a flat
    one that begins at a multiple of 16 bytes, with room for all `slots`; its dtype may differ if both are
    floats. Raises TypeError and ValueError that name the argument.
    """

    def __init__(self, tensors: Sequence[Array], bucket: Array) -> None:
        memories, memory = _memories(tensors, "tensors"), memory_of(bucket, "bucket")
        self._dtype, self._bucket_dtype = _common_dtype(memories, "tensors"), memory.dtype
        counts = [tensor.size for tensor in memories]
        _check_bucket(memory, slots(counts, memory.dtype.itemsize)[1], self._dtype)
        columns = [[tensor.address for tensor in memories], _slot_addresses(counts, memory)]
        self._chunks = Chunks(counts, columns, widest(self._dtype, memory.dtype))
        self._tensors, self._bucket = tuple(tensors), bucket

    def pack(self, scale: float = 1.0, nonfinite: Array | None = None, stream: Any = None) -> None:
        """bucket[slot i] = tensor i * ``scale``, and zeros between slots.

        Products are computed in float32, or float64 where either dtype is that, and rounded to the bucket's
        dtype. ``nonfinite``, int32 [ntensors]: entry i becomes 1 where the slot holds a NaN or infinity, the
        others stay. It happens in the order of ``stream``, by default the one on which the bucket's library
        works at present.
        """
        self.pack_launch(scale, nonfinite, stream)()

    def unpack(self, scale: float = 1.0, nonfinite: Array | None = None, stream: Any = None) -> None:
        """tensor i = bucket[slot i] * ``scale``; see `pack`, ``nonfinite`` being of what the tensors hold."""
        self.unpack_launch(scale, nonfinite, stream)()

    def pack_launch(self, scale: float = 1.0, nonfinite: Array | None = None, stream: Any = None) -> Launch:
        """`pack`, to be done later."""
        return self._launch(self._bucket_dtype, self._dtype, scale, nonfinite, stream, packs=True)

    def unpack_launch(self, scale: float = 1.0, nonfinite: Array | None = None, stream: Any = None) -> Launch:
        """`unpack`, to be done later."""
        return self._launch(self._dtype, self._bucket_dtype, scale, nonfinite, stream, packs=False)

    def _launch(
        self,
        dst: Dtype,
        src: Dtype,
        scale: float,
        nonfinite: Array | None,
        stream: Any,
        packs: bool,
    ) -> Launch:
        flags = _flags_address(nonfinite, len(self._tensors))
        if scale != 1 and dst not in FLOATS:
            raise TypeError(f"scale: expected 1 for {dst}, got {scale}; only floats are scaled")
        if dst == src and scale == 1 and (flags == 0 or dst not in FLOATS):
            dst = src = np.dtype(f"u{dst.itemsize}")
        chunks = self._chunks
        arguments = chunks.table, chunks.owners, chunks.chunk, flags, scale
        kernel, handle = move_kernel(dst, src, packs), stream_of(stream, self._bucket)
        return Launch(kernel, chunks.blocks, handle, arguments, (self, nonfinite))


class Search:
    """The search for NaN and infinity in tensors of one float dtype, where they are.

    ``tensors`` and ``nonfinite`` are as for `Packing` and its `pack`; and so is what is raised.
    """

    def __init__(self, tensors: Sequence[Array]) -> None:
        memories = _memories(tensors, "tensors")
        dtype = _common_dtype(memories, "tensors")
        if dtype not in FLOATS:
            raise TypeError(f"tensors: expected floats, got {dtype}")
        counts, addresses = [tensor.size for tensor in memories], [tensor.address for tensor in memories]
        self._chunks = Chunks(counts, [addresses], widest(dtype))
        self._kernel, self._tensors = search_kernel(dtype), tuple(tensors)

    def launch(self, nonfinite: Array, stream: Any = None) -> Launch:
        """The search, to be done later."""
        flags, chunks = _flags_address(nonfinite, len(self._tensors)), self._chunks
        arguments = chunks.table, chunks.owners, chunks.chunk, flags
        handle = stream_of(stream, nonfinite)
        return Launch(self._kernel, chunks.blocks, handle, arguments, (self, nonfinite))


class Update:
    """The update of many parameters by SGD, fused with unpacking their gradients.

    ``bucket`` holds the gradients of ``parameters`` in their `slots`, up to the last; ``velocities`` have the
    parameters' sizes and dtype, float32 or float64. Raises TypeError and ValueError that name the argument.
    """

    def __init__(self, bucket: Array, parameters: Sequence[Array], velocities: Sequence[Array]) -> None:
        weights, moments = _memories(parameters, "parameters"), _memories(velocities, "velocities")
        dtype, memory = _common_dtype(weights, "parameters"), memory_of(bucket, "bucket")
        if dtype not in FLOATS[2:]:
            raise TypeError(f"parameters: expected float32 or float64, got {dtype}")
        if any(v.dtype != dtype for v in moments):
            raise TypeError(
                f"velocities: expected {dtype} as parameters, got {_common_dtype(moments, 'velocities')}"
            )
        counts, sizes = [w.size for w in weights], [v.size for v in moments]
        if sizes != counts:
            raise ValueError(f"velocities: expected the parameters' sizes {counts}, got {sizes}")
        _check_bucket(memory, extent(counts, memory.dtype.itemsize), dtype)
        gradients = _slot_addresses(counts, memory)
        columns = [[w.address for w in weights], [v.address for v in moments], gradients]
        self._chunks = Chunks(counts, columns, widest(dtype, memory.dtype))
        self._kernel = update_kernel(dtype, memory.dtype)
        self._bucket, self._arrays = bucket, (tuple(parameters), tuple(velocities))

    def step(
        self,
        learning_rate: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        scale: float = 1.0,
        nonfinite: Array | None = None,
        stream: Any = None,
    ) -> None:
        """One step, g being the bucket's gradient, w a parameter and v its velocity:

            g = g scale + weight_decay w
            v = momentum v + g
            w = w - learning_rate v                     or, with ``nesterov``, learning_rate (g + momentum v)

        Every operation is rounded to the parameters' dtype, in this order. ``nonfinite`` is as for
        `Packing.pack`, of g scale.
        """
        flags, chunks = _flags_address(nonfinite, len(self._arrays[0])), self._chunks
        settings = scale, learning_rate, momentum, weight_decay, int(nesterov)
        arguments = chunks.table, chunks.owners, chunks.chunk, flags, *settings
        self._kernel.launch(chunks.blocks, stream_of(stream, self._bucket), *arguments)
