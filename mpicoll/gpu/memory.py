"""What the caller passed, where it is memory of a GPU: its address, its dtype, and the stream that it
belongs to.

Three ways lead there: PyTorch's tensors, ``__cuda_array_interface__`` (CuPy, Numba), and DLPack (JAX and
others). The stream is what matters most: data may still be on their way when they are passed, and are
complete only in the order of the stream that their library works on.

- PyTorch works on its current stream of the tensor's device.
- ``__cuda_array_interface__`` names a stream; CuPy's is its current one. None there says that the data are
  complete.
- DLPack's data are complete in the order of CUDA's default stream, because we ask for that.

Where no stream is named, nobody would wait for ours: a call then ends when its work is done (``waits``).

Sources: Numba's documentation, "CUDA Array Interface (Version 3)"; DLPack, "C API", "Python Specification".
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from mpicoll.gpu import driver

DEFAULT_STREAM = 0
LEGACY_STREAM = 1  # the default stream, as DLPack and the interface name it
THREADS_STREAM = 2  # each thread's own default stream
DLPACK_CUDA = (2, 13)  # memory of a device, and memory that CUDA moves about
NO_DEVICE = -1  # of what has no elements

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, slots=True)
class GpuData:
    """Contiguous memory of a GPU; ``owner`` keeps it alive.

    ``device`` is its number, `NO_DEVICE` where there are no elements. ``stream`` is a handle; ``waits`` says
    that its library does not work on that stream, so that whoever writes here must wait for the end.
    """

    owner: Any
    dtype: np.dtype[Any]
    nbytes: int
    address: int
    device: int
    stream: int
    waits: bool


def on_gpu(obj: Any) -> bool:
    """Whether ``obj`` says that it is GPU memory."""
    if hasattr(obj, "__dlpack_device__"):
        return obj.__dlpack_device__()[0] in DLPACK_CUDA
    return hasattr(obj, "__cuda_array_interface__")


def gpu_data(obj: Any, argument: str, writable: bool) -> GpuData:
    """The memory of ``obj``, for which `on_gpu` is true.

    Raises TypeError or ValueError that names ``argument``, `GpuError` where there is no driver.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(obj, torch.Tensor):
        return _from_torch(obj.detach(), torch, argument)
    if hasattr(obj, "__cuda_array_interface__"):
        return _from_interface(obj, argument, writable)
    return _from_dlpack(obj, argument)


def _from_torch(tensor: Any, torch: Any, argument: str) -> GpuData:
    name = str(tensor.dtype).removeprefix("torch.")
    itemsize, shape = tensor.element_size(), tuple(tensor.shape)
    _check_contiguous(argument, shape, tuple(stride * itemsize for stride in tensor.stride()), itemsize)
    dtype = _BFLOAT16 if name == "bfloat16" else _dtype(name, argument)
    stream = int(torch.cuda.current_stream(tensor.device).cuda_stream)
    return _data(tensor, argument, dtype, shape, tensor.data_ptr(), stream, waits=False)


def _from_interface(obj: Any, argument: str, writable: bool) -> GpuData:
    found = obj.__cuda_array_interface__
    address, read_only = found["data"]
    if writable and read_only:
        raise ValueError(f"{argument}: expected memory that may be written, got a read-only buffer")
    # The interface has no name for bfloat16; the array itself has.
    dtype = _dtype(getattr(obj, "dtype", found["typestr"]), argument)
    shape, strides, stream = tuple(found["shape"]), found.get("strides"), found.get("stream")
    if strides is not None:
        _check_contiguous(argument, shape, tuple(strides), dtype.itemsize)
    return _data(obj, argument, dtype, shape, int(address), stream or DEFAULT_STREAM, waits=stream is None)


def _dtype(given: Any, argument: str) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(given)
    except TypeError:
        raise TypeError(f"{argument}: expected a dtype that NumPy knows, got {given}") from None
    return dtype


def _data(
    owner: Any,
    argument: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    address: int,
    stream: int,
    waits: bool,
) -> GpuData:
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    device = driver.driver().device_of(address) if nbytes else NO_DEVICE
    if device is None:
        raise ValueError(f"{argument}: expected memory of a GPU, got {type(owner).__name__} elsewhere")
    return GpuData(owner, dtype, nbytes, address if nbytes else 0, device, stream, waits)


def _check_contiguous(argument: str, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> None:
    """Elements must lie one after the other, in C's or Fortran's order."""
    sides = [(n, stride) for n, stride in zip(shape, strides, strict=True) if n != 1]
    for order in (sides[::-1], sides):
        expected = itemsize
        for n, stride in order:
            if stride != expected:
                break
            expected *= n
        else:
            return
    if 0 not in shape:
        raise ValueError(
            f"{argument}: expected contiguous memory, got an array of shape {shape} with strides {strides}"
        )


# -- DLPack


class _Tensor(ctypes.Structure):
    """The beginning of a DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_NAMES = {0: "i1 i2 i4 i8", 1: "u1 u2 u4 u8", 2: "f2 f4 f8", 5: "c8 c16", 6: "b1"}  # by code
_DTYPES = {  # by code and bits
    (code, 8 * np.dtype(name).itemsize): np.dtype(name)
    for code, names in _NAMES.items()
    for name in names.split()
} | {(4, 16): _BFLOAT16}

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _from_dlpack(obj: Any, argument: str) -> GpuData:
    capsule = obj.__dlpack__(stream=LEGACY_STREAM)  # gives the memory back when it is collected
    found = _Tensor.from_address(_pointer_of(capsule, b"dltensor"))
    dtype = _DTYPES.get((found.code, found.bits)) if found.lanes == 1 else None
    if dtype is None:
        raise TypeError(
            f"{argument}: expected plain numbers, got DLPack's type {found.code}, {found.bits} bits"
        )
    shape = tuple(found.shape[: found.ndim])
    if found.strides:
        strides = tuple(stride * dtype.itemsize for stride in found.strides[: found.ndim])
        _check_contiguous(argument, shape, strides, dtype.itemsize)
    address = (found.data or 0) + found.byte_offset
    return _data((obj, capsule), argument, dtype, shape, address, DEFAULT_STREAM, waits=True)
