"""Many tensors as one bucket, on the CPU: pack, unpack, and unpack fused with an optimizer's update.

A collective wants few large buffers, a model has many small tensors. `Packing` knows where the tensors are,
and where in the bucket each has its **slot**; one call copies them all, scaled and cast on the way if need
be. Its twin on the GPU is `packing_cuda`.

A compiled function walks through a table of addresses and calls a kernel for each tensor, made for the two
dtypes. So it is compiled once, and is a `Task` that other compiled code can call, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, types

from .caching import CACHED
from .elements import BFLOAT16_DTYPE, element_type, load, store
from .memory import as_float, call_long, copy_bytes, copy_streaming, int64s
from .tasks import DONE, Task, run

Array = npt.NDArray[Any]

SLOT = 16  # bytes of which every slot begins at a multiple: the widest access of a GPU
FLOATS = (np.dtype(np.float16), BFLOAT16_DTYPE, np.dtype(np.float32), np.dtype(np.float64))

# Bytes from which on copies go past the caches, which would not hold them anyway: a quarter of the traffic
# less.
STREAMED = 8 << 20
STREAMED_EACH = 4 << 10  # of a tensor; less does not pay for the detour

# -- a task's state, all int64
NTENSORS = 0
TABLE = 1  # address of the tensors' entries
BUCKET = 2  # address
KERNEL = 3  # address; 0 where bytes are only copied
FACTOR = 4  # a float64
FLAGS = 5  # address of an int32 for each tensor, 0 for none
UNPACKS = 6  # whether from the bucket to the tensors
STREAMS = 7
SETTINGS = 8  # learning rate, momentum, weight decay: float64
NESTEROV = 11
STATE_SIZE = 12

# -- a tensor's entry
ADDRESS = 0
COUNT = 1  # elements
AT = 2  # where its slot begins: bytes from the bucket's beginning
NBYTES = 3  # of its elements in the slot
PADDING = 4  # bytes behind them
VELOCITY = 5  # address, for updates
WIDTH = 6


def slots(counts: Sequence[int], itemsize: int) -> tuple[list[int], int]:
    """The element at which each tensor's slot begins, and the elements of the whole bucket.

    ``itemsize`` is the size of an element in bytes; every slot begins at a multiple of 16 bytes.
    """
    begins, end = [], 0
    for count in counts:
        begins.append(end)
        end += -(-count * itemsize // SLOT) * SLOT // itemsize
    return begins, end


@njit(inline="always")
def _convert(dst, src, count, factor):  # type: ignore[no-untyped-def]
    """dst = src * factor; whether that gives a NaN or an infinity anywhere."""
    bad = 0
    for i in range(count):
        value = load(src, i) * factor
        store(dst, i, value)
        stored = load(dst, i)
        bad |= (stored - stored) != 0
    return bad


def _convert_as_float32(dst, src, count, factor):  # type: ignore[no-untyped-def]
    return _convert(dst, src, count, types.float32(factor))


def _convert_as_float64(dst, src, count, factor):  # type: ignore[no-untyped-def]
    return _convert(dst, src, count, factor)


def _look(src, count):  # type: ignore[no-untyped-def]
    """Whether there is a NaN or an infinity anywhere."""
    bad = 0
    for i in range(count):
        value = load(src, i)
        bad |= (value - value) != 0
    return bad


@njit(inline="always")
def _sgd(w, v, gradient, count, factor, rate, momentum, decay, nesterov):  # type: ignore[no-untyped-def]
    bad = 0
    for i in range(count):
        g = load(gradient, i) * factor
        bad |= (g - g) != 0
        weight = load(w, i)
        g += decay * weight
        velocity = momentum * load(v, i) + g
        store(v, i, velocity)
        store(w, i, weight - rate * (g + momentum * velocity if nesterov else velocity))
    return bad


@njit(inline="always")
def _update(kind, w, v, gradient, count, state):  # type: ignore[no-untyped-def]
    s = int64s(state)
    factor, rate = kind(as_float(s[FACTOR])), kind(as_float(s[SETTINGS]))
    momentum, decay = kind(as_float(s[SETTINGS + 1])), kind(as_float(s[SETTINGS + 2]))
    if s[NESTEROV] != 0:
        return _sgd(w, v, gradient, count, factor, rate, momentum, decay, True)
    return _sgd(w, v, gradient, count, factor, rate, momentum, decay, False)


def _update_float32(w, v, gradient, count, state):  # type: ignore[no-untyped-def]
    return _update(types.float32, w, v, gradient, count, state)


def _update_float64(w, v, gradient, count, state):  # type: ignore[no-untyped-def]
    return _update(types.float64, w, v, gradient, count, state)


@CACHED.cfunc("int64(int64, int64)")
def _move(state, patience):  # type: ignore[no-untyped-def]
    """Pack, or unpack, tensor after tensor."""
    s = int64s(state)
    for i in range(s[NTENSORS]):
        entry = int64s(s[TABLE] + 8 * WIDTH * i)
        slot = s[BUCKET] + entry[AT]
        dst, src = (entry[ADDRESS], slot) if s[UNPACKS] != 0 else (slot, entry[ADDRESS])
        if s[KERNEL] != 0:
            bad = call_long(s[KERNEL], (dst, src, entry[COUNT], as_float(s[FACTOR])))
            if s[FLAGS] != 0 and bad != 0:
                copy_bytes(s[FLAGS] + 4 * i, state + 8 * STATE_SIZE, 4)  # a one
        elif s[STREAMS] != 0 and entry[NBYTES] >= STREAMED_EACH:
            copy_streaming(dst, src, entry[NBYTES])
        else:
            copy_bytes(dst, src, entry[NBYTES])
        if s[UNPACKS] == 0:
            copy_bytes(slot + entry[NBYTES], state + 8 * (STATE_SIZE + 1), entry[PADDING])  # zeros
    return DONE


@CACHED.cfunc("int64(int64, int64)")
def _find_nonfinite(state, patience):  # type: ignore[no-untyped-def]
    s = int64s(state)
    for i in range(s[NTENSORS]):
        entry = int64s(s[TABLE] + 8 * WIDTH * i)
        if call_long(s[KERNEL], (entry[ADDRESS], entry[COUNT])) != 0:
            copy_bytes(s[FLAGS] + 4 * i, state + 8 * STATE_SIZE, 4)
    return DONE


@CACHED.cfunc("int64(int64, int64)")
def _update_all(state, patience):  # type: ignore[no-untyped-def]
    s = int64s(state)
    for i in range(s[NTENSORS]):
        entry = int64s(s[TABLE] + 8 * WIDTH * i)
        parts = (entry[ADDRESS], entry[VELOCITY], s[BUCKET] + entry[AT], entry[COUNT], state)
        if call_long(s[KERNEL], parts) != 0 and s[FLAGS] != 0:
            copy_bytes(s[FLAGS] + 4 * i, state + 8 * STATE_SIZE, 4)
    return DONE


@cache
def _compiled(kernel: Callable[..., int], dtypes: tuple[np.dtype[Any], ...], *others: types.Type) -> int:
    pointers = (types.CPointer(element_type(dtype)) for dtype in dtypes)
    return int(CACHED.cfunc(types.int64(*pointers, *others))(kernel).address)


def _convert_kernel(dst: np.dtype[Any], src: np.dtype[Any]) -> int:
    kernel = _convert_as_float64 if np.dtype(np.float64) in (dst, src) else _convert_as_float32
    return _compiled(kernel, (dst, src), types.intp, types.float64)


def _check_tensors(tensors: Sequence[Array], name: str) -> np.dtype[Any]:
    """Their common dtype. Raises TypeError or ValueError."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise TypeError(f"{name}: expected one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    for i, tensor in enumerate(tensors):
        if not (tensor.flags.c_contiguous or tensor.flags.f_contiguous):
            raise ValueError(f"{name}[{i}]: expected contiguous memory, got strides {tensor.strides}")
    return dtypes.pop() if dtypes else np.dtype(np.float32)


def extent(counts: Sequence[int], itemsize: int) -> int:
    """Elements of a bucket up to the end of the last tensor: those that are read. See `slots`."""
    begins, _ = slots(counts, itemsize)
    return begins[-1] + counts[-1] if counts else 0


def _check_bucket(bucket: Array, elements: int, dtype: np.dtype[Any]) -> None:
    if bucket.ndim != 1 or not bucket.flags.c_contiguous:
        raise ValueError(f"bucket: expected a flat contiguous array, got shape {bucket.shape}")
    if bucket.size < elements:
        raise ValueError(f"bucket: expected at least {elements} elements, got {bucket.size}")
    if bucket.dtype != dtype and not (bucket.dtype in FLOATS and dtype in FLOATS):
        raise TypeError(f"bucket: expected elements of {dtype} or another float dtype, got {bucket.dtype}")


def _check_nonfinite(flags: Array | None, ntensors: int) -> None:
    if flags is not None and (flags.dtype != np.int32 or flags.shape != (ntensors,)):
        raise ValueError(f"nonfinite: expected {ntensors} int32, got {flags.dtype} of shape {flags.shape}")


def _table(tensors: Sequence[Array], itemsize: int) -> npt.NDArray[np.int64]:
    """Entries for tensors whose slots have elements of ``itemsize`` bytes."""
    counts = [tensor.size for tensor in tensors]
    begins, end = slots(counts, itemsize)
    table = np.zeros((len(tensors), WIDTH), np.int64)
    table[:, ADDRESS] = [tensor.ctypes.data for tensor in tensors]
    table[:, COUNT] = counts
    table[:, AT] = np.multiply(begins, itemsize)
    table[:, NBYTES] = np.multiply(counts, itemsize)
    table[:, PADDING] = np.diff(np.append(table[:, AT], end * itemsize)) - table[:, NBYTES]
    return table


def _state(table: Array, bucket: int, kernel: int, factor: float, flags: Array | None) -> Array:
    """What a task needs. Behind it stand a one and two zeros, to be copied."""
    state = np.zeros(STATE_SIZE + 3, np.int64)
    state[NTENSORS], state[TABLE], state[BUCKET] = len(table), table.ctypes.data, bucket
    state[KERNEL] = kernel
    state[FACTOR : FACTOR + 1].view(np.float64)[0] = factor
    state[FLAGS] = flags.ctypes.data if flags is not None else 0
    state[STATE_SIZE] = 1
    return state


class Packing:
    """Many tensors of one dtype, and the slots of one bucket that hold them.

    ``tensors`` are contiguous arrays of any shape, ``bucket`` a flat one with room for all `slots`; its dtype
    may differ if both are floats. Raises TypeError and ValueError that name the argument.
    """

    def __init__(self, tensors: Sequence[Array], bucket: Array) -> None:
        self._dtype = _check_tensors(tensors, "tensors")
        counts = [tensor.size for tensor in tensors]
        _check_bucket(bucket, slots(counts, bucket.dtype.itemsize)[1], self._dtype)
        self._tensors, self._bucket = tuple(tensors), bucket
        self._table = _table(tensors, bucket.dtype.itemsize)

    def pack(self, scale: float = 1.0, nonfinite: Array | None = None, stream: None = None) -> None:
        """bucket[slot i] = tensor i * ``scale``, and zeros between slots.

        Products are computed in float32, or float64 where either dtype is that, and rounded to the bucket's
        dtype. ``nonfinite``, int32 [ntensors]: entry i becomes 1 where the slot holds a NaN or infinity, the
        others stay. There is no ``stream`` on the CPU.
        """
        run(self.pack_task(scale, nonfinite))

    def unpack(self, scale: float = 1.0, nonfinite: Array | None = None, stream: None = None) -> None:
        """tensor i = bucket[slot i] * ``scale``; see `pack`, ``nonfinite`` being of what the tensors hold."""
        run(self.unpack_task(scale, nonfinite))

    def pack_task(self, scale: float = 1.0, nonfinite: Array | None = None) -> Task:
        """`pack`, to be done later."""
        return self._task(self._bucket.dtype, self._dtype, scale, nonfinite, unpacks=False)

    def unpack_task(self, scale: float = 1.0, nonfinite: Array | None = None) -> Task:
        """`unpack`, to be done later."""
        return self._task(self._dtype, self._bucket.dtype, scale, nonfinite, unpacks=True)

    def _task(
        self,
        dst: np.dtype[Any],
        src: np.dtype[Any],
        scale: float,
        nonfinite: Array | None,
        unpacks: bool,
    ) -> Task:
        _check_nonfinite(nonfinite, len(self._tensors))
        if scale != 1 and dst not in FLOATS:
            raise TypeError(f"scale: expected 1 for {dst}, got {scale}; only floats are scaled")
        converts = dst != src or scale != 1 or (nonfinite is not None and dst in FLOATS)
        kernel = _convert_kernel(dst, src) if converts else 0
        state = _state(self._table, self._bucket.ctypes.data, kernel, scale, nonfinite)
        state[UNPACKS] = unpacks
        state[STREAMS] = self._table[:, NBYTES].sum() >= STREAMED
        keep = (state, self._table, self._tensors, self._bucket, nonfinite)
        return Task(_move.address, state.ctypes.data, keep)


def nonfinite_task(tensors: Sequence[Array], nonfinite: Array) -> Task:
    """Look for NaN and infinity in tensors of one float dtype, where they are; see `Packing.pack`."""
    dtype = _check_tensors(tensors, "tensors")
    _check_nonfinite(nonfinite, len(tensors))
    table = _table(tensors, dtype.itemsize)
    state = _state(table, 0, _compiled(_look, (dtype,), types.intp), 1, nonfinite)
    return Task(_find_nonfinite.address, state.ctypes.data, (state, table, tuple(tensors), nonfinite))


class Update:
    """The update of many parameters by SGD, fused with unpacking their gradients.

    ``bucket`` holds the gradients of ``parameters`` in their `slots`, up to the last; ``velocities`` have the
    parameters' sizes and dtype, float32 or float64. Raises TypeError and ValueError that name the argument.
    """

    def __init__(self, bucket: Array, parameters: Sequence[Array], velocities: Sequence[Array]) -> None:
        dtype = _check_tensors(parameters, "parameters")
        if dtype not in FLOATS[2:]:
            raise TypeError(f"parameters: expected float32 or float64, got {dtype}")
        if _check_tensors(velocities, "velocities") != dtype:
            raise TypeError(f"velocities: expected {dtype} as parameters, got {velocities[0].dtype}")
        sizes, expected = [v.size for v in velocities], [w.size for w in parameters]
        if sizes != expected:
            raise ValueError(f"velocities: expected the parameters' sizes {expected}, got {sizes}")
        _check_bucket(bucket, extent(expected, bucket.dtype.itemsize), dtype)
        self._bucket, self._arrays = bucket, (tuple(parameters), tuple(velocities))
        self._table = _table(parameters, bucket.dtype.itemsize)
        self._table[:, VELOCITY] = [v.ctypes.data for v in velocities]
        wide = dtype == np.float64
        kernel = _update_float64 if wide else _update_float32
        self._kernel = _compiled(kernel, (dtype, dtype, bucket.dtype), types.intp, types.int64)

    def step(
        self,
        learning_rate: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        scale: float = 1.0,
        nonfinite: Array | None = None,
        stream: None = None,
    ) -> None:
        """One step, g being the bucket's gradient, w a parameter and v its velocity:

            g = g scale + weight_decay w
            v = momentum v + g
            w = w - learning_rate v                     or, with ``nesterov``, learning_rate (g + momentum v)

        Every operation is rounded to the parameters' dtype, in this order. ``nonfinite`` is as for
        `Packing.pack`, of g scale.
        """
        _check_nonfinite(nonfinite, len(self._table))
        state = _state(self._table, self._bucket.ctypes.data, self._kernel, scale, nonfinite)
        state[SETTINGS : SETTINGS + 3].view(np.float64)[:] = learning_rate, momentum, weight_decay
        state[NESTEROV] = nesterov
        run(Task(_update_all.address, state.ctypes.data, (state, nonfinite)))
