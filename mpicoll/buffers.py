"""What the caller passed as a buffer: where it is, how many elements of what type.

Every form that mpi4py documents is understood: an array, ``[data, count]``, ``[data, datatype]``,
``[data, count, datatype]``, ``[data, (count, displacement), datatype]``, for the v-collectives
``[data, counts, displacements, datatype]`` and its shorter forms, ``MPI.IN_PLACE`` and ``None``. ``data`` is
anything on the host with the buffer protocol or DLPack: NumPy (also float16 and bfloat16), PyTorch, bytes; or
memory of a GPU, see `gpu.memory`.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from mpi4py import MPI

from mpicoll.gpu.memory import GpuData, gpu_data, on_gpu

Dtype = np.dtype[Any]
BYTES = np.dtype(np.uint8)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, slots=True)
class Data:
    """Contiguous host memory: ``array`` keeps it alive and says its dtype and whether it may be written."""

    array: np.ndarray[Any, Any]
    address: int

    @property
    def dtype(self) -> Dtype:
        return self.array.dtype  # type: ignore[no-any-return]

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


@dataclass(frozen=True, slots=True)
class Message:
    """``count`` elements from ``address`` on.

    ``dtype`` is what one element is to NumPy; it is None for a datatype NumPy has no name for, which then is
    in ``datatype``. ``size`` is the data of one element in bytes, ``extent`` how far apart elements lie.
    """

    argument: str
    data: Data | GpuData | None
    address: int
    count: int
    dtype: Dtype | None
    datatype: MPI.Datatype | None
    size: int
    extent: int

    @property
    def plain(self) -> bool:
        """Whether elements lie one after the other without holes."""
        return self.dtype is not None or (self.size == self.extent and bool(self.datatype.is_predefined))  # type: ignore[union-attr]

    @property
    def type_name(self) -> str:
        return str(self.dtype) if self.dtype is not None else str(self.datatype.name or "a derived datatype")  # type: ignore[union-attr]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A message of one block per rank: ``counts`` elements at ``displacements`` elements from its start."""

    message: Message
    counts: list[int]
    displacements: list[int]


def data_of(obj: Any, argument: str, writable: bool) -> Data | GpuData:
    """The memory of ``obj``, wherever it is; raises TypeError or ValueError that names ``argument``."""
    if type(obj) is not np.ndarray and on_gpu(obj):
        return gpu_data(obj, argument, writable)
    return host_data(obj, argument, writable)


def host_data(obj: Any, argument: str, writable: bool) -> Data:
    """The memory of ``obj``; raises TypeError or ValueError that names ``argument``."""
    array = obj if type(obj) is np.ndarray else _as_array(obj, argument)
    flags = array.flags
    if not (flags.c_contiguous or flags.f_contiguous):
        raise ValueError(
            f"{argument}: expected contiguous memory, got an array of shape {array.shape} with strides "
            f"{array.strides}; pass numpy.ascontiguousarray(...) of it or a derived MPI datatype"
        )
    if writable and not flags.writeable:
        raise ValueError(f"{argument}: expected memory that may be written, got a read-only buffer")
    if array.dtype.hasobject:
        raise TypeError(f"{argument}: expected numbers or bytes, got an array of Python objects")
    return Data(array, address_getter(array.dtype)(array) if array.size else array.ctypes.data)


def address_getter(dtype: Dtype) -> Callable[[np.ndarray[Any, Any]], int]:
    """What gives the address of a contiguous, not empty array of ``dtype`` in the least time."""
    # Get_address is faster, but needs the buffer protocol, which knows no bfloat16 and no dates.
    return _data_pointer if dtype.kind in "VmM" else MPI.Get_address


def _data_pointer(array: np.ndarray[Any, Any]) -> int:
    return int(array.ctypes.data)


def _as_array(obj: Any, argument: str) -> np.ndarray[Any, Any]:
    """``obj``'s own memory as an array, whatever library it comes from."""
    if isinstance(obj, np.ndarray):
        return obj.view(np.ndarray)
    if obj is MPI.IN_PLACE:
        raise ValueError(f"{argument}: expected data, got IN_PLACE, which is not allowed here")
    if _on_device(obj):
        raise TypeError(
            f"{argument}: expected host memory, got {type(obj).__name__} on a device; copy it to the host"
        )
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(obj, torch.Tensor):
        return _from_torch(obj.detach(), torch, argument)
    if hasattr(obj, "__dlpack__"):
        return np.from_dlpack(obj)
    try:
        view = memoryview(obj)
    except TypeError:
        raise TypeError(
            f"{argument}: expected an array or another object with the buffer protocol, or a list such as "
            f"[data, count, datatype], got {type(obj).__name__}"
        ) from None
    return np.asarray(view)


def _on_device(obj: Any) -> bool:
    if hasattr(obj, "__dlpack_device__"):
        return bool(obj.__dlpack_device__()[0] not in (1, 3))  # CPU, or host memory pinned by CUDA
    return hasattr(obj, "__cuda_array_interface__")


def _from_torch(tensor: Any, torch: Any, argument: str) -> np.ndarray[Any, Any]:
    if not tensor.is_contiguous():
        raise ValueError(f"{argument}: expected a contiguous tensor, got strides {tuple(tensor.stride())}")
    if tensor.dtype == torch.bfloat16:  # NumPy knows it only through ml_dtypes
        return tensor.view(torch.int16).numpy().view(BFLOAT16)  # type: ignore[no-any-return]
    return tensor.numpy()  # type: ignore[no-any-return]


def _datatype_dtype(datatype: MPI.Datatype) -> Dtype | None:
    """NumPy's name for a predefined MPI datatype, None where it has none."""
    if not datatype.is_predefined:
        return None
    try:
        code = datatype.tocode()
        dtype = np.dtype(code)
    except (ValueError, TypeError):
        return None
    return dtype if dtype.itemsize == datatype.Get_size() else None


_known: dict[int, tuple[Dtype | None, int, int]] = {}


def _element(datatype: MPI.Datatype) -> tuple[Dtype | None, int, int]:
    """(dtype, size, extent) of an MPI datatype; predefined ones are remembered."""
    handle = MPI._handleof(datatype)
    if handle in _known:
        return _known[handle]
    element = (_datatype_dtype(datatype), datatype.Get_size(), datatype.Get_extent()[1])
    if datatype.is_predefined:
        _known[handle] = element
    return element


def _is_datatype(item: Any) -> bool:
    return isinstance(item, (MPI.Datatype, str))


def _split(spec: Any, argument: str) -> tuple[Any, Any, Any, MPI.Datatype | None]:
    """(data, counts, displacements, datatype) of a buffer in any of its forms."""
    if not isinstance(spec, (list, tuple)):
        return spec, None, None, None
    if not 2 <= len(spec) <= 4:
        raise ValueError(f"{argument}: expected [data, count, datatype] with 2 to 4 items, got {len(spec)}")
    data, *rest = spec
    datatype = rest.pop() if _is_datatype(rest[-1]) else None
    if isinstance(datatype, str):
        datatype = MPI.Datatype.fromcode(datatype)
    counts = rest[0] if rest else None
    displacements = rest[1] if len(rest) > 1 else None
    return data, counts, displacements, datatype


def _base(data: Any, datatype: MPI.Datatype | None, argument: str, writable: bool) -> tuple[Message, int]:
    """A message of no elements yet, and the bytes that are there."""
    memory = None if data is None or data is MPI.BOTTOM else data_of(data, argument, writable)
    if datatype is not None:
        dtype, size, extent = _element(datatype)
    elif memory is not None:
        dtype = memory.dtype
        size = extent = dtype.itemsize
    else:
        dtype, size, extent = BYTES, 1, 1
    address = memory.address if memory is not None else 0
    available = memory.nbytes if memory is not None else 0
    return Message(argument, memory, address, 0, dtype, datatype, size, extent), available


def parse(spec: Any, argument: str, writable: bool = False, blocks: int = 1) -> Message:
    """The message that ``spec`` describes; without a count it is 1 / ``blocks`` of the whole data.

    Raises TypeError or ValueError naming ``argument``; nothing has been sent then.
    """
    data, count, displacement, datatype = _split(spec, argument)
    if isinstance(count, (list, tuple)):
        if len(count) != 2:
            raise ValueError(f"{argument}: expected a count or (count, displacement), got {count}")
        count, displacement = count
    count, displacement = _whole_number(count, argument), _whole_number(displacement, argument) or 0
    base, available = _base(data, datatype, argument, writable)
    address = base.address + displacement * base.extent
    if count is None:
        count = _whole_count(base, available, displacement, blocks)
    elif data is not MPI.BOTTOM:
        _check_room(base, displacement + count * blocks, available)
    return replace(base, address=address, count=count)


def _whole_number(value: Any, argument: str) -> int | None:
    """A count or displacement; None stays None."""
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument}: expected whole numbers as counts, got {value!r}") from None
    if number < 0:
        raise ValueError(f"{argument}: expected a count and displacement of 0 or more, got {number}")
    return number


def _whole_count(base: Message, available: int, displacement: int, blocks: int) -> int:
    left = available - displacement * base.extent
    if left < 0:
        _check_room(base, displacement, available)
    count, rest = divmod(left, base.extent * blocks) if base.extent > 0 else (0, 0)
    if rest:
        unit = (
            f"{blocks} equal blocks of {base.type_name}"
            if blocks > 1
            else f"whole elements of {base.type_name}"
        )
        raise ValueError(f"{base.argument}: expected {unit}, got {left} bytes")
    return count


def _check_room(base: Message, count: int, available: int) -> None:
    needed = _room(base, count)
    if needed > available:
        raise ValueError(
            f"{base.argument}: expected room for {count} elements of {base.type_name} ({needed} bytes), "
            f"got {available} bytes"
        )


def _room(base: Message, count: int) -> int:
    """The bytes from the first to the end of the last of ``count`` elements."""
    if not count or not base.size:
        return 0
    if base.plain:
        return count * base.extent
    lower, extent = base.datatype.Get_true_extent()  # type: ignore[union-attr]
    return (count - 1) * base.extent + lower + extent


def parse_blocks(spec: Any, argument: str, nranks: int, writable: bool = False) -> Blocks:
    """The blocks, one per rank, of a v-collective's buffer.

    Counts that are not given divide the data evenly, the first ranks getting one more; displacements that
    are not given put blocks one after the other. Raises TypeError or ValueError naming ``argument``.
    """
    data, counts, displacements, datatype = _split(spec, argument)
    if displacements is None and isinstance(counts, (list, tuple)) and _is_pair(counts):
        counts, displacements = counts
    base, available = _base(data, datatype, argument, writable)
    if counts is None:
        share, rest = divmod(_whole_count(base, available, 0, 1), nranks)
        counts = [share + (rank < rest) for rank in range(nranks)]
    counts = _per_rank(counts, argument, "counts", nranks)
    if displacements is None:
        displacements = np.cumsum([0, *counts[:-1]])
    elif isinstance(displacements, (int, np.integer)):  # how far apart blocks begin
        displacements = np.arange(nranks) * displacements
    displacements = _per_rank(displacements, argument, "displacements", nranks)
    end = max((d + c for c, d in zip(counts, displacements, strict=True) if c), default=0)
    if data is not MPI.BOTTOM:
        _check_room(base, end, available)
    return Blocks(base, counts, displacements)


def _is_pair(counts: Sequence[Any]) -> bool:
    """Whether this is (counts, displacements), as a tuple always is, and not counts for two ranks."""
    return len(counts) == 2 and (isinstance(counts, tuple) or not isinstance(counts[0], (int, np.integer)))


def _per_rank(values: Any, argument: str, what: str, nranks: int) -> list[int]:
    listed = [values] * nranks if isinstance(values, (int, np.integer)) else list(values)
    numbers = [_whole_number(value, argument) for value in listed]
    if len(numbers) != nranks or None in numbers:
        raise ValueError(f"{argument}: expected {nranks} {what}, one for each rank, got {numbers}")
    return numbers  # type: ignore[return-value]


def check_same_type(send: Message, recv: Message, arithmetic: bool = False) -> None:
    """Raise TypeError where two messages of one call cannot hold the same elements.

    Raw bytes hold any elements, but are none that can be added to them (``arithmetic``).
    """
    if send.dtype is None or recv.dtype is None or send.dtype == recv.dtype:
        return
    raw = any(dtype.itemsize == 1 and dtype.kind in "uSV" for dtype in (send.dtype, recv.dtype))
    if raw and not arithmetic:
        return
    raise TypeError(
        f"{recv.argument}: expected elements of {send.type_name} as in {send.argument}, got {recv.type_name}"
    )
