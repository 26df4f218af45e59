"""Gradients on a GPU: buckets in its memory, packed, reduced and unpacked beside the backward pass.

    the program's stream   [gradient d][gradient c] * [gradient b][gradient a] *               + [update]
                                                    |                          |               |
    our own stream                                  + [pack dc][reduce][unpack]+[pack ba]...   *

The program orders its backward pass and goes on. When it has ordered the last gradient of a bucket, an event
(*) is recorded on its stream. A thread lets our stream wait for that (+), and orders what reduces the bucket:
launches that have been prepared, with tables that lie on the GPU. In the end the program's streams wait for
ours. So the GPU computes and communicates at the same time, and nothing waits for a whole device.

What is large and is not cast is reduced where it lies.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mpicoll.gpu import driver
from mpicoll.gpu.driver import Driver
from mpicoll.gpu.memory import DEFAULT_STREAM, NO_DEVICE, GpuData, gpu_data
from mpicoll.kernels.tasks import Task
from mpicoll.progress import PythonTask

Dtype = np.dtype[Any]
Array = npt.NDArray[Any]

INT32 = np.dtype(np.int32)
# Bytes from which on memory is reduced by itself: packing and unpacking less takes a few microseconds, as do
# the launches of another reduction.
LOOSE = 4 << 20


@dataclass(frozen=True, eq=False)
class GpuArray:
    """Contiguous memory of a GPU, or of none where there are no elements: ``device`` is `NO_DEVICE` then.

    ``owner`` keeps it alive, ``stream`` is where it is used. ``fortran`` says in which order elements lie,
    ``waits`` that its library names no stream.
    """

    owner: Any
    address: int
    dtype: Dtype
    shape: tuple[int, ...]
    device: int
    stream: int
    fortran: bool = False
    waits: bool = False

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # There is no name for bfloat16; whoever needs one looks at ``dtype``.
        typestr = self.dtype.str if self.dtype.kind in "biufc" else f"<V{self.dtype.itemsize}"
        where = {"data": (self.address, False), "stream": self.stream}
        return {"version": 3, "shape": self.shape, "typestr": typestr, **where}

    def __getitem__(self, part: slice) -> GpuArray:
        """Elements of a flat array that follow each other."""
        begin, end, _ = part.indices(self.size)
        at = self.address + begin * self.dtype.itemsize
        return replace(self, address=at, shape=(max(end - begin, 0),))


def as_gpu_array(given: Any, data: GpuData) -> GpuArray:
    """A user's array, ``data`` being what `gpu_data` has found in it."""
    found = given.shape if hasattr(given, "shape") else given.__cuda_array_interface__["shape"]
    shape = tuple(int(n) for n in found)
    fortran = not _in_c_order(given, shape, data.dtype.itemsize)
    return GpuArray(given, data.address, data.dtype, shape, data.device, data.stream, fortran, data.waits)


def _in_c_order(given: Any, shape: Sequence[int], itemsize: int) -> bool:
    if hasattr(given, "is_contiguous"):  # PyTorch
        return bool(given.is_contiguous())
    strides = getattr(given, "__cuda_array_interface__", {}).get("strides")
    if strides is None or 0 in shape:
        return True
    expected = [int(np.prod(shape[axis + 1 :])) * itemsize for axis in range(len(shape))]
    return all(n == 1 or a == b for n, a, b in zip(shape, strides, expected, strict=True))


def stream_getter(given: Any, argument: str) -> Callable[[], int]:
    """What says, in little time, where an array is used at present; as `gpu_data` does."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(given, torch.Tensor):
        return lambda: int(torch.cuda.current_stream(given.device).cuda_stream)
    if hasattr(given, "__cuda_array_interface__"):
        return lambda: int(given.__cuda_array_interface__.get("stream") or DEFAULT_STREAM)
    return lambda: gpu_data(given, argument, writable=True).stream


class OnGpu:
    """How arrays on a GPU are reduced: `grouped.OnHost` is for those of the host.

    There is a stream, memory and kernels for it. Tasks put work on the stream, in their order; a step is a
    `ready` for each array, a `complete` for each bucket, its tasks, and `end`.
    """

    has_spare_cores = True  # the GPU computes

    def __init__(self, arrays: Sequence[GpuArray], names: Sequence[str]) -> None:
        self._driver: Driver = driver.driver()
        self.device = max(0, *(array.device for array in arrays))
        self._stream = self._driver.make_stream(self.device)
        self._done = self._driver.make_event(self.device)
        given = [(array.owner, name) for array, name in zip(arrays, names, strict=True)]
        self._streams = [stream_getter(*one) for one in given]
        # One array of each library, which may be used elsewhere now than it was in the backward pass.
        self._libraries = [stream_getter(*one) for one in {type(one[0]): one for one in given}.values()]
        self._waits = any(array.waits for array in arrays)
        self._seen: dict[int, None] = {}  # streams of the step, in order
        self._events: dict[int, list[int]] = {}  # of a bucket, one for each stream
        self._awaited: dict[int, int] = {}  # how many of these there are in this step
        self._memory: list[int] = []  # of buckets
        self._own_memory: list[int] = []
        self._flags: GpuArray | None = None
        owned = (self.device, self._stream, self._done, self._events, self._memory, self._own_memory)
        self._give_back = weakref.finalize(self, _give_back, self._driver, *owned)
        self._give_back.atexit = False  # CUDA may have ended before

    # -- memory

    def bucket(self, count: int, dtype: npt.DTypeLike) -> GpuArray:
        """A flat array, with anything in it; it exists until `forget`."""
        return self._allocated(count, np.dtype(dtype), self._memory)

    def _allocated(self, count: int, dtype: Dtype, kept: list[int]) -> GpuArray:
        kept.append(self._driver.allocate(max(count, 1) * dtype.itemsize, self.device))
        device = self.device if count else NO_DEVICE
        return GpuArray(self, kept[-1], dtype, (count,), device, self._stream)

    def forget(self) -> None:
        """Give all buckets back."""
        self.finish()
        with self._driver.on(self.device):
            while self._memory:
                self._driver.free(self._memory.pop())

    def finish(self) -> None:
        """Wait until all that is on the stream is done."""
        with self._driver.on(self.device):
            self._driver.synchronise(self._stream)

    def close(self) -> None:
        """Give everything back, unless a step has been begun: other ranks may still be at it."""
        if not self._seen:
            self._give_back()

    def flat(self, arrays: Sequence[GpuArray]) -> GpuArray:
        """Arrays that lie one behind the other, as one."""
        first, count = arrays[0], sum(array.size for array in arrays)
        device = max(array.device for array in arrays)
        return GpuArray(list(arrays), first.address, first.dtype, (count,), device, self._stream)

    def least(self, shares_memory: bool) -> int:
        """Bytes from which on memory is reduced by itself."""
        return LOOSE

    # -- tasks

    def _task(self, *launches: Callable[[], None]) -> Task:
        def launch() -> None:
            with self._driver.on(self.device):
                for each in launches:
                    each()

        return PythonTask(launch).task

    def input_task(self, bucket: int) -> list[Task]:
        """The stream waits until the bucket of this number is complete."""

        def wait() -> None:
            for event in self._events[bucket][: self._awaited[bucket]]:
                self._driver.wait(self._stream, event)

        return [self._task(wait)]

    def packing(self, arrays: Sequence[GpuArray], bucket: GpuArray) -> _Packing:
        """See `kernels.packing_cuda.Packing`."""
        from mpicoll.kernels import packing_cuda  # takes a while to import, and needs numba-cuda

        with self._driver.on(self.device):
            return _Packing(self, packing_cuda.Packing(arrays, bucket))

    def nonfinite_task(self, arrays: Sequence[GpuArray], flags: GpuArray) -> Task:
        """See `kernels.packing_cuda.Search`; integers are finite."""
        from mpicoll.kernels import packing_cuda

        if arrays[0].dtype not in packing_cuda.FLOATS:
            return self._task()
        with self._driver.on(self.device):
            return self._task(packing_cuda.Search(arrays).launch(flags, self._stream))

    def scale_task(self, array: GpuArray, factor: float) -> Task:
        """array = array * factor"""
        from mpicoll.kernels import reduce_cuda

        at = (array.address,)
        return self._task(
            lambda: reduce_cuda.fold("SUM", array.dtype, at, at, array.size, factor, self._stream)
        )

    def flags(self, host: Array) -> GpuArray:
        """int32 in place of those on the host, zeros when a step begins; `collect_task` copies them there."""
        if self._flags is None:
            self._flags = self._allocated(2 * host.size, INT32, self._own_memory)
            zeros = np.zeros(2 * host.size, np.int32)
            with self._driver.on(self.device):
                self._driver.copy(self._flags.address, zeros.ctypes.data, zeros.nbytes, self._stream)
            self.finish()
        return self._flags[: host.size]

    def collect_task(self, host: Array) -> list[Task]:
        """What kernels have written to the `flags` comes to ``host``."""
        flags, address, nbytes = self.flags(host), host.ctypes.data, host.nbytes

        def collect() -> None:
            self._driver.copy(address, flags.address, nbytes, self._stream)
            self._driver.copy(flags.address, flags.address + nbytes, nbytes, self._stream)  # zeros
            self.finish()

        return [self._task(collect)]

    # -- at work

    def ready(self, i: int) -> None:
        """The program has ordered all that writes array i."""
        self._seen[self._streams[i]()] = None

    def complete(self, buckets: range) -> None:
        """All arrays of these buckets are ready; their tasks may be done."""
        with self._driver.on(self.device):
            for bucket in buckets:
                events = self._events.setdefault(bucket, [])
                while len(events) < len(self._seen):
                    events.append(self._driver.make_event(self.device))
                for event, stream in zip(events, self._seen, strict=False):
                    self._driver.record(event, stream)
                self._awaited[bucket] = len(self._seen)

    def end(self) -> None:
        """All tasks are done; what the program orders from now on comes after them."""
        for current in self._libraries:
            self._seen[current()] = None
        with self._driver.on(self.device):
            self._driver.record(self._done, self._stream)
            for stream in self._seen:
                self._driver.wait(stream, self._done)
        if self._waits:
            self.finish()
        self._seen.clear()


class _Packing:
    """Arrays and their bucket; see `kernels.packing.Packing`."""

    def __init__(self, place: OnGpu, packing: Any) -> None:
        self._place, self._packing = place, packing

    def pack_task(self, scale: float = 1.0, nonfinite: GpuArray | None = None) -> Task:
        return self._place._task(self._packing.pack_launch(scale, nonfinite, self._place._stream))

    def unpack_task(self, scale: float = 1.0, nonfinite: GpuArray | None = None) -> Task:
        return self._place._task(self._packing.unpack_launch(scale, nonfinite, self._place._stream))


def _give_back(
    found: Driver, device: int, stream: int, done: int, events: dict[int, list[int]], *memory: list[int]
) -> None:
    with found.on(device):
        found.synchronise(stream)
        for base in (base for bases in memory for base in bases):
            found.free(base)
        for event in (done, *(event for of_bucket in events.values() for event in of_bucket)):
            found.destroy_event(event)
        found.destroy_stream(stream)
