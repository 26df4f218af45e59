"""The CUDA driver, as far as collectives need it: memory, copies, streams, events, and sharing all of them.

`Driver` calls NVIDIA's library, ``libcuda.so.1``, which every machine with a GPU has, with no package around
it. Its words:

- an **address** is an int, of GPU memory or of the host's; CUDA knows which from its value;
- a **device** is a GPU's number among those that the process sees;
- a **stream** is a handle (0 stands for CUDA's default stream), and what is put on it happens in order;
- an **event** is a place on a stream, which other streams, also of other processes, can wait for;
- a **handle** is the 64 bytes by which another process opens memory, or an event.

Nothing here waits for a whole device. Needs the standard library only.

Source: NVIDIA, "CUDA Driver API Reference".
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from functools import cache
from typing import Any, NamedTuple

LIBRARY = "libcuda.so.1"
HANDLE_SIZE = 64

INVALID_VALUE = 1
OUT_OF_MEMORY = 2
INVALID_CONTEXT = 201
NOT_READY = 600

# Of CUpointer_attribute, CUmemorytype, and the flags of events, streams, registered and opened memory.
MEMORY_TYPE, BUFFER_ID, IS_MANAGED, DEVICE_ORDINAL = 2, 7, 8, 9
DEVICE_MEMORY = 2
WITHOUT_TIMING, BETWEEN_PROCESSES = 2, 4
NON_BLOCKING = 1
FOR_ALL_CONTEXTS = 1
LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", c_ubyte * HANDLE_SIZE),)


_ADDRESS, _STREAM, _EVENT, _CONTEXT = c_uint64, c_void_p, c_void_p, c_void_p

# What each function takes; all return a status.
_TYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetPCIBusId": (c_char_p, c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(_CONTEXT), c_int),
    "cuCtxGetCurrent": (POINTER(_CONTEXT),),
    "cuCtxGetDevice": (POINTER(c_int),),
    "cuCtxPushCurrent_v2": (_CONTEXT,),
    "cuCtxPopCurrent_v2": (POINTER(_CONTEXT),),
    "cuMemAlloc_v2": (POINTER(_ADDRESS), c_size_t),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemGetAddressRange_v2": (POINTER(_ADDRESS), POINTER(c_size_t), _ADDRESS),
    "cuPointerGetAttribute": (c_void_p, c_int, _ADDRESS),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemcpyAsync": (_ADDRESS, _ADDRESS, c_size_t, _STREAM),
    "cuStreamCreate": (POINTER(_STREAM), c_uint),
    "cuStreamDestroy_v2": (_STREAM,),
    "cuStreamSynchronize": (_STREAM,),
    "cuStreamWaitEvent": (_STREAM, _EVENT, c_uint),
    "cuEventCreate": (POINTER(_EVENT), c_uint),
    "cuEventDestroy_v2": (_EVENT,),
    "cuEventRecord": (_EVENT, _STREAM),
    "cuEventQuery": (_EVENT,),
    "cuEventSynchronize": (_EVENT,),
    "cuIpcGetMemHandle": (POINTER(_Handle), _ADDRESS),
    "cuIpcOpenMemHandle_v2": (POINTER(_ADDRESS), _Handle, c_uint),
    "cuIpcCloseMemHandle": (_ADDRESS,),
    "cuIpcGetEventHandle": (POINTER(_Handle), _EVENT),
    "cuIpcOpenEventHandle": (POINTER(_EVENT), _Handle),
}


class GpuError(RuntimeError):
    """What the CUDA driver refuses, or a GPU that is not there."""


class Allocation(NamedTuple):
    """GPU memory as it was allocated; ``number`` tells it from all others of the process, also freed ones."""

    base: int
    size: int  # bytes
    number: int


class Driver:
    """Calls the CUDA driver, from any thread. Every method raises `GpuError`, or MemoryError.

    ``library``: what to call instead of ``libcuda.so.1``, whose absence is a `GpuError`, too.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = library
        self._functions: dict[str, Any] = {}
        self._contexts: dict[int, int] = {}
        if library is None:
            try:
                self._library = ctypes.CDLL(LIBRARY)
            except OSError as error:
                raise GpuError(f"no NVIDIA driver here: {error}") from None
        self.call("cuInit", 0)

    def _function(self, name: str) -> Any:
        function = self._functions.get(name)
        if function is None:
            function = getattr(self._library, name)
            if isinstance(self._library, ctypes.CDLL):
                function.argtypes = _TYPES[name]
            self._functions[name] = function
        return function

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver."""
        status = self._function(name)(*arguments)
        if status:
            self._fail(name, status)

    def _fail(self, name: str, status: int) -> None:
        text = c_char_p()
        self._function("cuGetErrorName")(status, byref(text))
        known = (text.value or b"an unknown error").decode()
        raise GpuError(f"{name}: {known} ({status})")

    def _got(self, kind: Any, name: str, *arguments: Any) -> Any:
        """What a function writes to its first argument."""
        result = kind()
        self.call(name, byref(result), *arguments)
        return result.value or 0

    # -- devices

    @property
    def ndevices(self) -> int:
        """GPUs that the process sees."""
        return int(self._got(c_int, "cuDeviceGetCount"))

    @property
    def current_device(self) -> int:
        """The one that this thread works with; 0 if it has not met CUDA."""
        if not self._got(_CONTEXT, "cuCtxGetCurrent"):
            return 0
        return int(self._got(c_int, "cuCtxGetDevice"))

    def name(self, device: int) -> str:
        """The GPU's name, as of a product."""
        return self._text("cuDeviceGetName", device)

    def bus(self, device: int) -> str:
        """Where the GPU is in the machine: tells GPUs of one node from each other, whatever a rank calls
        them.
        """
        return self._text("cuDeviceGetPCIBusId", device)

    def total_memory(self, device: int) -> int:
        """Bytes."""
        return int(self._got(c_size_t, "cuDeviceTotalMem_v2", self._got(c_int, "cuDeviceGet", device)))

    def _text(self, function: str, device: int) -> str:
        buffer = ctypes.create_string_buffer(256)
        self.call(function, buffer, len(buffer), self._got(c_int, "cuDeviceGet", device))
        return buffer.value.decode()

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        """What is called in here is for this device; the caller's own stays as it was."""
        context = self._context(device)
        if self._got(_CONTEXT, "cuCtxGetCurrent") == context:
            yield
            return
        self.call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._got(_CONTEXT, "cuCtxPopCurrent_v2")

    @contextmanager
    def _anywhere(self) -> Iterator[None]:
        """For what is the same on all devices, in a thread that may not have met CUDA so far."""
        if self._got(_CONTEXT, "cuCtxGetCurrent"):
            yield
            return
        with self.on(next(iter(self._contexts), 0)):
            yield

    def _context(self, device: int) -> int:
        """The primary context, which CuPy, PyTorch and Numba use, too."""
        if device not in self._contexts:
            number = self._got(c_int, "cuDeviceGet", device)
            self._contexts[device] = self._got(_CONTEXT, "cuDevicePrimaryCtxRetain", number)
        return self._contexts[device]

    # -- memory

    def allocate(self, nbytes: int, device: int) -> int:
        """The address of new memory, which other processes can open. MemoryError says what there is."""
        with self.on(device):
            address = c_uint64()
            status = self._function("cuMemAlloc_v2")(byref(address), nbytes)
            if status == OUT_OF_MEMORY:
                free, total = c_size_t(), c_size_t()
                self.call("cuMemGetInfo_v2", byref(free), byref(total))
                raise MemoryError(
                    f"GPU {device}: expected room for {nbytes} bytes, got {free.value} free of {total.value}"
                )
            if status:
                self._fail("cuMemAlloc_v2", status)
        return int(address.value)

    def free(self, address: int) -> None:
        """Give back what `allocate` has made."""
        with self._anywhere():
            self.call("cuMemFree_v2", address)

    def device_of(self, address: int) -> int | None:
        """The device whose memory this is; None for the host's, also where CUDA has registered it."""
        if self._attribute(c_uint, MEMORY_TYPE, address) != DEVICE_MEMORY:
            return None
        return int(self._attribute(c_int, DEVICE_ORDINAL, address))

    def _attribute(self, kind: Any, attribute: int, address: int) -> int:
        """0 for memory that CUDA knows nothing of."""
        result = kind()
        status = self._function("cuPointerGetAttribute")(byref(result), attribute, address)
        if status == INVALID_CONTEXT:
            with self._anywhere():
                status = self._function("cuPointerGetAttribute")(byref(result), attribute, address)
        if status not in (0, INVALID_VALUE):
            self._fail("cuPointerGetAttribute", status)
        return int(result.value)

    def allocation_of(self, address: int) -> Allocation:
        """The allocation of GPU memory that this is a part of."""
        base, size = c_uint64(), c_size_t()
        self.call("cuMemGetAddressRange_v2", byref(base), byref(size), address)
        return Allocation(base.value, size.value, self._attribute(c_uint64, BUFFER_ID, base.value))

    def register(self, address: int, nbytes: int) -> None:
        """Keep host memory where it is, so that copies from and to it go on beside everything else."""
        with self._anywhere():
            self.call("cuMemHostRegister_v2", address, nbytes, FOR_ALL_CONTEXTS)

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        with self._anywhere():
            self.call("cuMemHostUnregister", address)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy between any two memories, in the stream's order."""
        if nbytes and target != source:
            self.call("cuMemcpyAsync", target, source, nbytes, stream)

    # -- streams and events

    def make_stream(self, device: int) -> int:
        """One that does not wait for the default stream."""
        with self.on(device):
            return int(self._got(_STREAM, "cuStreamCreate", NON_BLOCKING))

    def destroy_stream(self, stream: int) -> None:
        """Once what is on it is done."""
        with self._anywhere():
            self.call("cuStreamDestroy_v2", stream)

    def synchronise(self, stream: int) -> None:
        """Wait until all that is on the stream is done."""
        self.call("cuStreamSynchronize", stream)

    def make_event(self, device: int, shared: bool = False) -> int:
        """One that streams of this device may record; other processes can open it if ``shared``."""
        with self.on(device):
            flags = WITHOUT_TIMING | (BETWEEN_PROCESSES if shared else 0)
            return int(self._got(_EVENT, "cuEventCreate", flags))

    def destroy_event(self, event: int) -> None:
        """Once nobody waits for it any more."""
        with self._anywhere():
            self.call("cuEventDestroy_v2", event)

    def record(self, event: int, stream: int) -> None:
        """The event is now what has been put on the stream so far."""
        self.call("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """What is put on the stream from now on waits for the event as it was last recorded."""
        self.call("cuStreamWaitEvent", stream, event, 0)

    def is_done(self, event: int) -> bool:
        """Whether all of the event as it was last recorded is done."""
        status = self._function("cuEventQuery")(event)
        if status not in (0, NOT_READY):
            self._fail("cuEventQuery", status)
        return bool(status == 0)

    def wait_for(self, event: int) -> None:
        """Wait until the event as it was last recorded is done."""
        with self._anywhere():
            self.call("cuEventSynchronize", event)

    # -- between processes

    def export_memory(self, base: int) -> bytes:
        """The handle of an allocation that begins here; not every kind can be opened by others."""
        handle = _Handle()
        self.call("cuIpcGetMemHandle", byref(handle), base)
        return bytes(handle)

    def open_memory(self, handle: bytes, device: int) -> int:
        """The address of another process's allocation here; ``device`` is to work with it."""
        with self.on(device):
            given = _Handle.from_buffer_copy(handle)
            return int(self._got(_ADDRESS, "cuIpcOpenMemHandle_v2", given, LAZY_PEER_ACCESS))

    def close_memory(self, address: int) -> None:
        """Undo `open_memory`."""
        with self._anywhere():
            self.call("cuIpcCloseMemHandle", address)

    def export_event(self, event: int) -> bytes:
        """The handle of a shared event."""
        handle = _Handle()
        self.call("cuIpcGetEventHandle", byref(handle), event)
        return bytes(handle)

    def open_event(self, handle: bytes, device: int) -> int:
        """Another process's event, for streams of this device to wait for."""
        with self.on(device):
            return int(self._got(_EVENT, "cuIpcOpenEventHandle", _Handle.from_buffer_copy(handle)))


@cache
def driver() -> Driver:
    """The process's own. Raises `GpuError` where there is no driver."""
    return Driver()
