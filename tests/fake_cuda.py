"""A stand-in for NVIDIA's driver, for machines that have no GPU: memory, streams, events, sharing between
processes.

`FakeLibrary` has the functions that `mpicoll.gpu.driver` calls, and takes what they take. Memory of its
devices is memory of the host that other processes can map. Each stream is a thread, which does what is put
on it in order, now and then after a pause: so work that forgets to wait for other work finds garbage.
`FakeArray` is an array in such memory, as CuPy has them; `use` lets the transports find all this in place of
CUDA, and kernels too.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import mmap
import os
import queue
import random
import resource
import struct
import threading
import time
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from mpicoll.kernels import packing
from mpicoll.kernels.tasks import run

from mpicoll.gpu import driver
from mpicoll.gpu.driver import (
    BETWEEN_PROCESSES,
    BUFFER_ID,
    DEVICE_MEMORY,
    DEVICE_ORDINAL,
    MEMORY_TYPE,
    NOT_READY,
    OUT_OF_MEMORY,
)
from mpicoll.gpu.memory import LEGACY_STREAM, _Tensor

INVALID = 1  # CUDA_ERROR_INVALID_VALUE
INVALID_CONTEXT = 201
INVALID_HANDLE = 400
NOT_SUPPORTED = 801
LONGEST_PAUSE = 0.001  # seconds before something that a stream does
PAUSES = 0.2  # of all that streams do
STREAM_THREAD = "fake-stream"
POLL = 20e-6  # seconds between looks at another process's event
EVENTS = 4096  # of a process
POISON = 0xA5  # what new memory is full of, and what has been freed
ERRORS = {
    INVALID: b"CUDA_ERROR_INVALID_VALUE",
    OUT_OF_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY",
    INVALID_CONTEXT: b"CUDA_ERROR_INVALID_CONTEXT",
    INVALID_HANDLE: b"CUDA_ERROR_INVALID_HANDLE",
    NOT_SUPPORTED: b"CUDA_ERROR_NOT_SUPPORTED",
}
# Functions that may answer INVALID_CONTEXT, as the reference says: here they do where no context is current.
NEED_CONTEXT = {
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyAsync",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuIpcCloseMemHandle",
    "cuIpcOpenEventHandle",
}


class _Shared:
    """Memory that other processes open as /proc/PID/fd/FD."""

    def __init__(self, nbytes: int, number: int = 0) -> None:
        self.fd = os.memfd_create(f"fake-cuda-{number}")
        os.ftruncate(self.fd, max(nbytes, 1))
        self.map = mmap.mmap(self.fd, max(nbytes, 1))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.size = nbytes


class _Opened:
    """Another process's `_Shared`."""

    def __init__(self, pid: int, fd: int, nbytes: int, number: int = 0) -> None:
        """Raises OSError if it has been freed."""
        path = f"/proc/{pid}/fd/{fd}"
        if not os.readlink(path).startswith(f"/memfd:fake-cuda-{number} "):
            raise FileNotFoundError(path)
        mine = os.open(path, os.O_RDWR)
        self.map = mmap.mmap(mine, max(nbytes, 1))
        os.close(mine)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.size = nbytes


class _Stream:
    """A thread that does things in order."""

    def __init__(self, seed: int) -> None:
        self._things: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._random = random.Random(seed)
        self._undone, self._turn = 0, threading.RLock()
        self._has_no_thread = threading.Lock()  # until somebody takes it, for good

    def begin(self) -> None:
        """Start the thread, if nobody has; while garbage is collected that is left to whoever comes next.

        For it means to wait until the thread runs, and garbage may be collected by that very thread, before.
        So who begins must not hold what finalizers take.
        """
        if not _is_collecting() and self._has_no_thread.acquire(blocking=False):
            threading.Thread(target=self._run, daemon=True, name=STREAM_THREAD).start()

    def put(self, thing: Callable[[], object] | None) -> None:
        self.begin()
        with self._turn:
            self._undone += 1
        self._things.put(thing)

    def _run(self) -> None:
        while (thing := self._things.get()) is not None:
            if self._random.random() < PAUSES:
                time.sleep(self._random.uniform(0, LONGEST_PAUSE))
            thing()
            with self._turn:
                self._undone -= 1

    def synchronise(self) -> None:
        if not self._undone or _is_collecting():
            return
        done = threading.Event()
        self.put(done.set)
        done.wait()


# Garbage is collected in any thread and between any two steps of Python: also while it holds a lock, such as
# one of `threading`, without which no other thread goes on or begins. So nothing may wait for a stream then.
_collecting = threading.local()


def _note(phase: str, _: object) -> None:
    _collecting.now = phase == "start"


gc.callbacks.append(_note)


def _is_collecting() -> bool:
    return getattr(_collecting, "now", False)


def _after_all(streams: Sequence[_Stream], thing: Callable[[], object]) -> None:
    """Do this when all that is on the streams now is done."""
    left = itertools.count(len(streams) - 1, -1)  # whose next() no thread interrupts
    for stream in streams:
        stream.put(lambda: thing() if next(left) == 0 else None)
    if not streams:
        thing()


class _Event:
    """How often it has been recorded, and which of these records is done."""

    def __init__(self) -> None:
        self.words: Any = np.zeros(2, np.int64)
        self._last: threading.Event | None = None

    def record(self, stream: _Stream) -> None:
        self.words[0] += 1
        number, last = self.words[0], threading.Event()
        self._last = last

        def done() -> None:
            self.words[1] = number
            last.set()

        stream.put(done)

    def wait(self, stream: _Stream) -> None:
        if self._last is not None:
            stream.put(self._last.wait)

    @property
    def done(self) -> bool:
        return self._last is None or self._last.is_set()


class _SharedEvent(_Event):
    """One whose words other processes see, and nothing else: a record is done when any later one is.

    So whoever records it on one stream and then on another must see to the order of the two.
    """

    def __init__(self, words: Any) -> None:
        super().__init__()
        self.words = words

    def wait(self, stream: _Stream) -> None:
        number = self.words[0]

        def wait() -> None:
            while self.words[1] < number:
                time.sleep(POLL)

        stream.put(wait)

    @property
    def done(self) -> bool:
        return bool(self.words[1] >= self.words[0])


def _at(pointer: Any) -> Any:
    """What an argument made by ``byref`` refers to."""
    return pointer._obj


def _write(pointer: Any, data: bytes) -> None:
    ctypes.memmove(ctypes.addressof(_at(pointer)), data, len(data))


class FakeLibrary:
    """The functions of ``libcuda.so.1``.

    ``without``: names of functions that a system refuses, as containers do with the sharing of memory;
    functions that need a context are refused where none is current. ``sealed`` are addresses of memory that
    other processes cannot open, as that of CUDA's memory pools is.
    """

    def __init__(self, ndevices: int = 1, memory: int = 1 << 30, without: Sequence[str] = ()) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each piece of memory is an open file
        self.ndevices, self.memory, self.without = ndevices, memory, set(without)
        self.calls: list[str] = []  # names, in order
        self.closed = False
        self.allocated: dict[int, tuple[_Shared, int, int]] = {}  # by address: memory, device, number
        self.sealed: set[int] = set()
        self.opened: dict[int, tuple[_Opened, int]] = {}
        self._open_handles: dict[tuple[bytes, int], list[int]] = {}  # address, how often
        self.registered: dict[int, int] = {}
        self.streams: dict[int, _Stream] = {}
        self.events: dict[int, _Event] = {}
        self._page = _Shared(16 * EVENTS)
        self._words = np.frombuffer(self._page.map, np.int64).reshape(EVENTS, 2)
        self._free_slots = list(range(EVENTS))
        self._slots: dict[int, int] = {}
        self._numbers = itertools.count(101)
        self._context = threading.local()
        self._turn = threading.RLock()  # memory may be given back while garbage is collected

    def close(self) -> None:
        """Give everything back to the system; whoever comes later is told that all is well."""
        self.closed = True
        for stream in self.streams.values():
            stream.put(None)
        for memory, _, _ in self.allocated.values():
            os.close(memory.fd)
        os.close(self._page.fd)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return partial(self._called, name, found) if name.startswith("cu") else found

    def _called(self, name: str, function: Callable[..., int], *arguments: Any) -> int:
        self.calls.append(name)
        if self.closed:
            return 0
        if name in self.without:
            return NOT_SUPPORTED
        if name in NEED_CONTEXT and not self._contexts():
            return INVALID_CONTEXT
        return function(*arguments)

    def _number(self) -> int:
        return next(self._numbers)

    def stream(self, handle: int | None) -> _Stream:
        number = 0 if handle in (None, LEGACY_STREAM) else handle
        with self._turn:
            if number not in self.streams:
                self.streams[number] = _Stream(os.getpid() + number)
            found = self.streams[number]
        found.begin()
        return found

    def _contexts(self) -> list[int]:
        if not hasattr(self._context, "stack"):
            self._context.stack = []
        return self._context.stack  # type: ignore[no-any-return]

    # -- as in NVIDIA's reference

    def cuInit(self, flags: int) -> int:
        return 0

    def cuGetErrorName(self, status: int, text: Any) -> int:
        _at(text).value = ERRORS.get(status, b"CUDA_ERROR_UNKNOWN")
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        _at(count).value = self.ndevices
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        _at(device).value = ordinal
        return 0 if ordinal < self.ndevices else 101

    def cuDeviceGetName(self, name: Any, length: int, device: int) -> int:
        name.value = b"Fake GPU"
        return 0

    def cuDeviceGetPCIBusId(self, name: Any, length: int, device: int) -> int:
        name.value = b"0000:%02d:00.0" % device
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: int) -> int:
        _at(size).value = self.memory
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        _at(context).value = 1000 + device
        return 0

    def cuCtxGetCurrent(self, context: Any) -> int:
        stack = self._contexts()
        _at(context).value = stack[-1] if stack else None
        return 0

    def cuCtxGetDevice(self, device: Any) -> int:
        _at(device).value = self._device()
        return 0

    def cuCtxPushCurrent_v2(self, context: int) -> int:
        self._contexts().append(context)
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        _at(context).value = self._contexts().pop()
        return 0

    def _device(self) -> int | None:
        stack = self._contexts()
        return stack[-1] - 1000 if stack else None

    def cuMemAlloc_v2(self, address: Any, nbytes: int) -> int:
        device = self._device()
        if device is None or not nbytes:
            return INVALID
        if nbytes > self._free_memory():
            return OUT_OF_MEMORY
        number = self._number()
        memory = _Shared(nbytes, number)
        ctypes.memset(memory.address, POISON, nbytes)
        self.allocated[memory.address] = (memory, device, number)
        _at(address).value = memory.address
        return 0

    def _free_memory(self) -> int:
        return self.memory - sum(memory.size for memory, _, _ in self.allocated.values())

    def cuMemFree_v2(self, address: int) -> int:
        streams = list(self.streams.values())
        for stream in streams:
            stream.synchronise()  # as CUDA does, which waits for what still uses it
        found = self.allocated.pop(address, None)
        if found is None:
            return INVALID

        def forget() -> None:
            ctypes.memset(address, POISON, found[0].size)  # other processes that look at it still are wrong
            os.close(found[0].fd)

        if _is_collecting():
            _after_all(streams, forget)
        else:
            forget()
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        _at(free).value, _at(total).value = self._free_memory(), self.memory
        return 0

    def _find(self, address: int) -> tuple[int, int, int, int] | None:
        """(base, size, device, number) of what ``address`` is in."""
        for base, (memory, device, number) in self.allocated.copy().items():
            if base <= address < base + memory.size:
                return base, memory.size, device, number
        for base, (opened, device) in self.opened.copy().items():
            if base <= address < base + opened.size:
                return base, opened.size, device, 0
        return None

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: int) -> int:
        found = self._find(address)
        if found is None:
            return INVALID
        _at(base).value, _at(size).value = found[:2]
        return 0

    def cuPointerGetAttribute(self, result: Any, attribute: int, address: int) -> int:
        found = self._find(address)
        if found is None:
            return INVALID
        values = {MEMORY_TYPE: DEVICE_MEMORY, DEVICE_ORDINAL: found[2], BUFFER_ID: found[3]}
        _at(result).value = values[attribute]
        return 0

    def cuMemHostRegister_v2(self, address: int, nbytes: int, flags: int) -> int:
        self.registered[address] = nbytes
        return 0

    def cuMemHostUnregister(self, address: int) -> int:
        return 0 if self.registered.pop(address, None) else INVALID

    def cuMemcpyAsync(self, target: int, source: int, nbytes: int, stream: int | None) -> int:
        self.stream(stream).put(partial(ctypes.memmove, target, source, nbytes))
        return 0

    def cuStreamCreate(self, stream: Any, flags: int) -> int:
        _at(stream).value = self._number()
        return 0

    def cuStreamDestroy_v2(self, stream: int) -> int:
        found = self.streams.pop(stream, None)
        if found is not None:
            found.put(None)  # its thread ends when all that is on the stream is done
        return 0

    def cuStreamSynchronize(self, stream: int | None) -> int:
        self.stream(stream).synchronise()
        return 0

    def cuStreamWaitEvent(self, stream: int | None, event: int, flags: int) -> int:
        self.events[event].wait(self.stream(stream))
        return 0

    def cuEventCreate(self, event: Any, flags: int) -> int:
        handle = self._number()
        if flags & BETWEEN_PROCESSES:
            slot = self._slots[handle] = self._free_slots.pop()
            self._words[slot] = 0
            self.events[handle] = _SharedEvent(self._words[slot])
        else:
            self.events[handle] = _Event()
        _at(event).value = handle
        return 0

    def cuEventDestroy_v2(self, event: int) -> int:
        if self.events.pop(event, None) is None:
            return INVALID
        if event in self._slots:
            self._free_slots.insert(0, self._slots.pop(event))
        return 0

    def cuEventRecord(self, event: int, stream: int | None) -> int:
        self.events[event].record(self.stream(stream))
        return 0

    def cuEventQuery(self, event: int) -> int:
        return 0 if self.events[event].done else NOT_READY

    def cuEventSynchronize(self, event: int) -> int:
        while not self.events[event].done:
            time.sleep(POLL)
        return 0

    def cuIpcGetMemHandle(self, handle: Any, base: int) -> int:
        if base not in self.allocated:
            return INVALID
        if base in self.sealed:
            return NOT_SUPPORTED
        memory, _, number = self.allocated[base]
        _write(handle, struct.pack("qqqq", os.getpid(), memory.fd, memory.size, number))
        return 0

    def cuIpcOpenMemHandle_v2(self, address: Any, handle: Any, flags: int) -> int:
        pid, fd, nbytes, number = struct.unpack("qqqq", bytes(handle)[:32])
        device = self._device()
        if pid == os.getpid() or device is None:
            return INVALID
        with self._turn:
            known = self._open_handles.get((bytes(handle), device))
            if known is None:
                try:
                    opened = _Opened(pid, fd, nbytes, number)
                except OSError:
                    return INVALID_HANDLE
                self.opened[opened.address] = (opened, device)
                known = self._open_handles[bytes(handle), device] = [opened.address, 0]
            known[1] += 1
        _at(address).value = known[0]
        return 0

    def cuIpcCloseMemHandle(self, address: int) -> int:
        with self._turn:
            for key, known in self._open_handles.items():
                if known[0] == address:
                    known[1] -= 1
                    if not known[1]:
                        del self._open_handles[key], self.opened[address]
                    return 0
        return INVALID

    def cuIpcGetEventHandle(self, handle: Any, event: int) -> int:
        if event not in self._slots:
            return INVALID
        _write(handle, struct.pack("qqq", os.getpid(), self._page.fd, self._slots[event]))
        return 0

    def cuIpcOpenEventHandle(self, event: Any, handle: Any) -> int:
        pid, fd, slot = struct.unpack("qqq", bytes(handle)[:24])
        try:
            opened = _Opened(pid, fd, 16 * EVENTS)
        except OSError:
            return INVALID_HANDLE
        number = self._number()
        self.events[number] = _SharedEvent(np.frombuffer(opened.map, np.int64).reshape(EVENTS, 2)[slot])
        _at(event).value = number
        return 0


# -- kernels


def _array(address: int, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    found: npt.NDArray[Any] = np.frombuffer(memoryview(memory), dtype)
    return found


_FOLDS: dict[str, Any] = {
    "SUM": np.add,
    "PROD": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
    "LAND": np.logical_and,
    "LOR": np.logical_or,
    "LXOR": np.logical_xor,
}


def fold(
    operation: str,
    dtype: np.dtype[Any],
    targets: Sequence[int],
    sources: Sequence[int],
    count: int,
    factor: float,
    stream: int,
) -> None:
    """What `mpicoll.kernels.reduce_cuda.fold` does, on a stream of the `FakeLibrary` in use."""
    from mpicoll.kernels import reduce_cuda

    reduce_cuda.checked(operation, dtype, targets, sources, count, factor)  # raises what that raises

    def work() -> None:
        wide = (
            np.dtype(np.float32) if dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)) else dtype
        )
        total = _array(sources[0], dtype, count).astype(wide)
        with np.errstate(all="ignore"):
            for source in sources[1:]:
                total = _FOLDS[operation](total, _array(source, dtype, count).astype(wide)).astype(wide)
            if factor != 1:
                parts = total.view(total.real.dtype)  # of complex numbers
                total = (parts * np.float64(factor)).astype(parts.dtype).view(wide)
        for target in targets:
            _array(target, dtype, count)[:] = total.astype(dtype)

    if count:
        in_use().stream(stream).put(work)


def cast(dst: np.dtype[Any], src: np.dtype[Any], target: int, source: int, count: int, stream: int) -> None:
    """What `mpicoll.kernels.cast_cuda.cast` does."""

    def work() -> None:
        with np.errstate(over="ignore"):
            _array(target, dst, count)[:] = _array(source, src, count).astype(dst)

    if count:
        in_use().stream(stream).put(work)


def _on_host(array: Any) -> npt.NDArray[Any]:
    """The memory of an array on a GPU, flat."""
    found = array.__cuda_array_interface__
    return _array(found["data"][0], np.dtype(array.dtype), int(np.prod(found["shape"])))


class Packing:
    """What `mpicoll.kernels.packing_cuda.Packing` does, by its twin for the host."""

    def __init__(self, tensors: Sequence[Any], bucket: Any) -> None:
        self._twin = packing.Packing([_on_host(tensor) for tensor in tensors], _on_host(bucket))

    def pack_launch(self, scale: float, nonfinite: Any, stream: int) -> Callable[[], object]:
        flags = None if nonfinite is None else _on_host(nonfinite)
        return lambda: in_use().stream(stream).put(lambda: self._twin.pack(scale, flags))

    def unpack_launch(self, scale: float, nonfinite: Any, stream: int) -> Callable[[], object]:
        flags = None if nonfinite is None else _on_host(nonfinite)
        return lambda: in_use().stream(stream).put(lambda: self._twin.unpack(scale, flags))


class Search:
    """What `mpicoll.kernels.packing_cuda.Search` does."""

    def __init__(self, tensors: Sequence[Any]) -> None:
        self._tensors = [_on_host(tensor) for tensor in tensors]

    def launch(self, nonfinite: Any, stream: int) -> Callable[[], object]:
        task = packing.nonfinite_task(self._tensors, _on_host(nonfinite))
        return lambda: in_use().stream(stream).put(lambda: run(task))


def in_use() -> FakeLibrary:
    """The one in use."""
    found = driver.driver()._library
    assert isinstance(found, FakeLibrary)
    return found


def use(monkeypatch: pytest.MonkeyPatch, fake: FakeLibrary | None = None) -> FakeLibrary:
    """Let everything use ``fake`` in place of CUDA until the test ends."""
    from mpicoll.kernels import cast_cuda, packing_cuda, reduce_cuda

    found = driver.Driver(fake or FakeLibrary())
    monkeypatch.setattr(driver, "driver", lambda: found)
    monkeypatch.setattr(reduce_cuda, "fold", fold, raising=False)
    monkeypatch.setattr(cast_cuda, "cast", cast)
    monkeypatch.setattr(packing_cuda, "Packing", Packing)
    monkeypatch.setattr(packing_cuda, "Search", Search)
    return found._library  # type: ignore[no-any-return]


class FakeArray:
    """An array in the memory of a `FakeLibrary`'s device, like CuPy's; written and read on its stream."""

    def __init__(self, host: Any, device: int = 0, stream: int | None = 1, offset: int = 0) -> None:
        host = np.ascontiguousarray(host)
        self.dtype, self.shape, self.size, self.stream, self.device = (
            host.dtype,
            host.shape,
            host.size,
            stream,
            device,
        )
        self._driver = driver.driver()
        self._base = self._driver.allocate(max(host.nbytes, 1) + offset, device)
        self.address = self._base + offset
        self.put(host)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # What the interface has no name for it calls raw bytes, as CuPy does with bfloat16.
        typestr = self.dtype.str if self.dtype.kind in "biufc" else f"<V{self.dtype.itemsize}"
        data = (self.address if self.size else 0, False)
        return {"shape": self.shape, "typestr": typestr, "data": data, "version": 3, "stream": self.stream}

    def put(self, host: Any) -> None:
        """Write these values, sometime: what follows on the stream will find them."""
        values = np.array(host, self.dtype)
        in_use().stream(self.stream).put(lambda: self._view().__setitem__(..., values.reshape(self.shape)))

    def __setitem__(self, part: Any, value: Any) -> None:
        """Write a value there, sometime."""
        in_use().stream(self.stream).put(lambda: self._view().__setitem__(part, value))

    def part(self, begin: int, shape: int | tuple[int, ...]) -> FakeArray:
        """Elements from ``begin`` on, where they lie."""
        found = copy(self)
        found.shape = (shape,) if isinstance(shape, int) else shape
        found.size = int(np.prod(found.shape))
        found.address += begin * self.dtype.itemsize
        return found

    def _view(self) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = _array(self.address, self.dtype, self.size).reshape(self.shape)
        return found

    def get(self) -> npt.NDArray[Any]:
        """A copy on the host, once all that is on the stream is done."""
        in_use().stream(self.stream).synchronise()
        found: npt.NDArray[Any] = self._view().copy()
        return found

    def free(self) -> None:
        with self._driver.on(self.device):
            self._driver.free(self._base)


# -- DLPack

_KINDS = {"i": 0, "u": 1, "f": 2, "V": 4, "c": 5, "b": 6}  # V is bfloat16's
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class DlpackArray:
    """The memory of a `FakeArray`, of which others learn through DLPack only.

    ``strides`` are in elements; ``changes`` replace fields of what is told.
    """

    def __init__(self, array: FakeArray, strides: Sequence[int] | None = None, **changes: int) -> None:
        self.array, self.strides, self.changes = array, strides, changes
        self.asked: list[int | None] = []  # for which streams
        self.given_back = 0  # capsules
        self._told: list[Any] = []
        self._destructor = _Destructor(self._destroyed)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.changes.get("device_type", 2), self.array.device

    def __dlpack__(self, stream: int | None = None) -> Any:
        self.asked.append(stream)
        self._order(stream)
        array, ndim = self.array, len(self.array.shape)
        side = ctypes.c_int64 * ndim
        told = _Tensor(
            data=array.address,
            device_type=2,
            device_id=array.device,
            ndim=ndim,
            code=_KINDS[array.dtype.kind],
            bits=8 * array.dtype.itemsize,
            lanes=1,
            shape=side(*array.shape),
            strides=None if self.strides is None else side(*self.strides),
        )
        for name, value in self.changes.items():
            setattr(told, name, value)
        self._told.append(told)
        destructor = ctypes.cast(self._destructor, ctypes.c_void_p)
        return _new_capsule(ctypes.addressof(told), b"dltensor", destructor)

    def _order(self, stream: int | None) -> None:
        """What is put on the stream from now on finds what the array's own has written."""
        done = threading.Event()
        in_use().stream(self.array.stream).put(done.set)
        in_use().stream(stream).put(done.wait)

    def _destroyed(self, capsule: int) -> None:
        self.given_back += 1
