"""Tensors as `Communicator` takes them, and torch's reductions as ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from mpi4py import MPI
from torch.distributed import ReduceOp

from mpicoll.buffers import BFLOAT16
from mpicoll.calls import AVG, Operation

Tensor: TypeAlias = torch.Tensor

_OPERATIONS: dict[Any, Operation] = {
    ReduceOp.SUM: MPI.SUM,
    ReduceOp.PREMUL_SUM: MPI.SUM,
    ReduceOp.AVG: AVG,
    ReduceOp.PRODUCT: MPI.PROD,
    ReduceOp.MIN: MPI.MIN,
    ReduceOp.MAX: MPI.MAX,
    ReduceOp.BAND: MPI.BAND,
    ReduceOp.BOR: MPI.BOR,
    ReduceOp.BXOR: MPI.BXOR,
}
_BITWISE = (MPI.BAND, MPI.BOR, MPI.BXOR)
# Of truth values, which are bytes of 0 and 1: their sum is whether any is true.
_OF_BOOL: dict[Any, Operation] = {
    ReduceOp.SUM: MPI.MAX,
    ReduceOp.PRODUCT: MPI.MIN,
    ReduceOp.MIN: MPI.MIN,
    ReduceOp.MAX: MPI.MAX,
    ReduceOp.BAND: MPI.BAND,
    ReduceOp.BOR: MPI.BOR,
    ReduceOp.BXOR: MPI.BXOR,
}
_REDUCED = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
}


_STRIDED = torch.strided


class Reduction(NamedTuple):
    """Our operation, and whether tensors are multiplied by torch's ``op.factor`` before."""

    operation: Operation
    scaled: bool


_known: dict[tuple[Any, torch.dtype], Reduction] = {}  # by operation, whatever its factor, and dtype


def reduction(op: Any, tensor: Tensor) -> Reduction:
    """Ours for torch's reduction ``op`` of tensors like ``tensor``; RuntimeError if there is none."""
    key = (op, tensor.dtype)
    found = _known.get(key)
    if found is None:
        scaled = op.op == ReduceOp.PREMUL_SUM
        found = _known[key] = Reduction(_operation(op, tensor), scaled)
    return found


def _operation(op: Any, tensor: Tensor) -> Operation:
    dtype, kind = tensor.dtype, op.op
    if dtype not in _REDUCED:
        raise RuntimeError(f"expected a dtype that can be reduced, got {_name(tensor)}; cast it first")
    found = (_OF_BOOL if dtype == torch.bool else _OPERATIONS).get(kind)
    if found is None:
        raise RuntimeError(f"op: {kind} is not defined for {_name(tensor)}")
    if found in _BITWISE and (dtype.is_floating_point or dtype.is_complex):
        raise RuntimeError(f"op: {kind} is defined for integers and bool, got {_name(tensor)}")
    if found in (MPI.MIN, MPI.MAX) and dtype.is_complex:
        raise RuntimeError(f"op: complex numbers have no order, so no {kind}, got {_name(tensor)}")
    if found is AVG and not (dtype.is_floating_point or dtype.is_complex):
        raise RuntimeError(f"op: {kind} is defined for floating and complex dtypes, got {_name(tensor)}")
    return found


def _name(tensor: Tensor) -> str:
    return f"a tensor of {tensor.dtype}"


def premultiplied(op: Any, ours: Reduction, tensor: Tensor) -> Tensor:
    """What is reduced: for PREMUL_SUM a multiple of ``tensor``, else the tensor itself."""
    return tensor * op.factor if ours.scaled else tensor


def checked(tensors: Sequence[Tensor], argument: str) -> None:
    """Raise TypeError or RuntimeError, as torch does, if we cannot send and receive these."""
    for tensor in tensors:
        if not (type(tensor) is Tensor and tensor.is_cpu and tensor.layout is _STRIDED):
            _check_closely(tensors, argument)
            return


def _check_closely(tensors: Sequence[Any], argument: str) -> None:
    for number, tensor in enumerate(tensors):
        name = f"{argument}[{number}]"
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{name}: expected a CPU or CUDA tensor, got one on {tensor.device}")
        if tensor.layout is not torch.strided:
            raise NotImplementedError(f"{name}: expected a dense tensor, got {tensor.layout}")


def memory(tensor: Tensor) -> Any:
    """A contiguous tensor's memory as `Communicator` takes it: elements, or bytes if nothing can reduce them.

    Of a tensor on the CPU this is an array that does not keep the memory: whoever calls keeps the tensor.
    """
    if tensor.is_cuda:
        return _device_memory(tensor)
    return _borrowed(tensor.data_ptr(), tensor.numel(), tensor.dtype)


def raw(tensor: Tensor) -> Any:
    """As `memory`, as bytes."""
    if tensor.is_cuda:
        return _flat(tensor).view(torch.uint8)
    return _borrowed(tensor.data_ptr(), tensor.nbytes, torch.uint8)


def owned(tensor: Tensor) -> Any:
    """As `memory`, of a tensor on the CPU, whose memory the array keeps."""
    return _flat(tensor).view(torch.uint8).numpy().view(_numpy_dtype(tensor.dtype))


def _flat(tensor: Tensor) -> Tensor:
    # A contiguous tensor of one element may have any strides, of which `view` allows but one.
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _device_memory(tensor: Tensor) -> Tensor:
    if tensor.dtype in _REDUCED and tensor.dtype != torch.bool:
        return tensor.detach()
    return _flat(tensor).view(torch.uint8)


@lru_cache(2048)
def _borrowed(address: int, count: int, dtype: torch.dtype) -> Any:
    """Made once for each place: torch takes longer to make an array than two ranks to add a few numbers."""
    if count == 0:
        return np.empty(0, _numpy_dtype(dtype))
    place = {"data": (address, False), "shape": (count * dtype.itemsize,), "typestr": "|u1", "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=place)).view(_numpy_dtype(dtype))


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Truth values are bytes of 0 and 1, and what nothing can reduce is bytes."""
    if dtype == torch.bool or dtype not in _REDUCED:
        return np.dtype(np.uint8)
    ours: np.dtype[Any] = BFLOAT16
    if dtype != torch.bfloat16:
        ours = torch.empty(0, dtype=dtype).numpy().dtype
    return ours


def is_plain(tensor: Tensor) -> bool:
    """Whether its memory holds its values in order, and nothing else."""
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def plain(tensor: Tensor) -> Tensor:
    """``tensor``, or a contiguous copy."""
    return tensor if is_plain(tensor) else tensor.detach().resolve_conj().resolve_neg().contiguous()


def put_back(tensor: Tensor, place: Tensor) -> None:
    """``tensor`` gets the values of ``place``, which `plain` has made of it, unless that is the tensor."""
    if place is not tensor:
        tensor.detach().copy_(place)


@contextmanager
def written_parts(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """One flat tensor to be written that holds these, one after the other; they get its values in the end."""
    first = tensors[0]
    sizes = [tensor.numel() for tensor in tensors]
    place = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
    yield place
    for tensor, part in zip(tensors, place.split(sizes), strict=True):
        tensor.detach().copy_(part.view(tensor.shape))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One flat tensor of all values, one tensor's after the other's."""
    return torch.cat([plain(tensor).detach().reshape(-1) for tensor in tensors])


def check_pair(output: Tensor, input: Tensor) -> None:
    """`checked` and `same_kind` of the two."""
    if (
        type(output) is Tensor
        and type(input) is Tensor
        and output.is_cpu
        and input.is_cpu
        and output.layout is _STRIDED
        and input.layout is _STRIDED
        and output.dtype is input.dtype
    ):
        return
    checked((output, input), "tensors")
    same_kind((output, input), "tensors")


def same_kind(tensors: Sequence[Tensor], argument: str) -> None:
    """Raise RuntimeError if dtypes or devices differ."""
    first = tensors[0]
    for number, tensor in enumerate(tensors):
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise RuntimeError(
                f"{argument}[{number}]: expected {first.dtype} on {first.device}, as the first tensor, got "
                f"{tensor.dtype} on {tensor.device}"
            )
