"""Who is measured on GPU memory: our transports, the MPI library in two ways, NCCL, and PyTorch's gloo.

Each is a `Contender`, as on the host, or is **left out** with a reason, on all ranks alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from mpicoll import Communicator
from mpicoll.gpu import driver, probe
from mpicoll.gpu.staging import Pinned

from .contenders import Action, Buffer, Contender, Memory, Placement, Unsupported, native, our_contenders
from .data import Problem
from .gpu_arrays import Array, Arrays
from .kinds import DTYPES

OURS = ("ipc", "messages", "staged")
OTHERS = ("native", "copied", "nccl", "gloo")
THROUGH_HOST = ("staged", "copied")

# From this version on NCCL lets ranks share a GPU, if it is told to; older ones say "Duplicate GPU detected".
SHARING_NCCL = 23000  # 2.30, as NCCL counts
SHARE_GPU = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}
NCCL_INSTALL = "pip install 'nvidia-nccl-cu13>=2.30'"


@dataclass(frozen=True)
class Field:
    """The contenders, and why others are not among them."""

    contenders: list[Contender]
    left_out: list[str]


@contextmanager
def field(
    comm: Communicator,
    arrays: Arrays,
    memory: Memory,
    transports: Sequence[str],
    others: Sequence[str],
    sharing: int,
) -> Iterator[Field]:
    """All of these that work here, for as long as the block lasts; ``sharing``: ranks on one GPU, at most.

    Collective.
    """
    found = Field([], [])
    with ExitStack() as stack:
        for kind in transports:
            try:
                found.contenders.extend(stack.enter_context(transport(comm, memory, kind)))
            except Unsupported as error:
                found.left_out.append(f"{kind}: {error}")
        for name in others:
            try:
                found.contenders.append(_other(stack, comm, arrays, memory, name, sharing))
            except Unsupported as error:
                found.left_out.append(f"{name}: {error}")
        yield found


def _other(
    stack: ExitStack, comm: Communicator, arrays: Arrays, memory: Memory, name: str, sharing: int
) -> Contender:
    if name == "native":
        return cuda_aware(comm, memory)
    if name == "copied":
        return stack.enter_context(copied(comm, arrays, memory))
    if name == "nccl":
        return stack.enter_context(nccl(comm, arrays, memory, sharing))
    return stack.enter_context(gloo(comm, arrays, memory))


def agree(comm: MPI.Intracomm, reason: str | None) -> None:
    """Raise `Unsupported` on all ranks if any has a reason."""
    reasons = [f"rank {rank}: {why}" for rank, why in enumerate(comm.allgather(reason)) if why is not None]
    if reasons:
        raise Unsupported(reasons[0])


def attempt(comm: MPI.Intracomm, action: Callable[[], Any]) -> Any:
    """What comes of it, if it works on all ranks. Libraries refuse by all sorts of exceptions."""
    result = reason = None
    try:
        result = action()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    agree(comm, reason)
    return result


@contextmanager
def transport(comm: MPI.Intracomm, memory: Memory, kind: str) -> Iterator[list[Contender]]:
    """Our collectives by one transport, blocking and persistent."""
    ours = Communicator(MPI.Intracomm(comm), gpu_transport=kind)
    reason = _refusal(ours, memory, kind)
    if reason is None:
        found = our_contenders(ours, ["auto"], {"": memory}, persistent=True)
        yield [replace(one, name=one.name.replace("auto", kind)) for one in found]
    ours.Free()  # which is collective: not after an exception, that others may not have
    if reason is not None:
        raise Unsupported(reason)


def _refusal(ours: Communicator, memory: Memory, kind: str) -> str | None:
    """Why collectives do not go this way; a communicator chooses in the first of them, and says so."""
    send, recv = (Buffer(room, np.dtype(np.float32), 1).array for room in (memory.send, memory.recv))
    try:
        ours.Allreduce(send, recv)
    except RuntimeError as error:  # on all ranks
        return str(error)
    return None if ours.gpu_transport.startswith(kind) else ours.gpu_transport


def cuda_aware(comm: MPI.Intracomm, memory: Memory) -> Contender:
    """The MPI library's own collectives, if it takes GPU memory."""
    aware, how = probe.is_cuda_aware(MPI.Intracomm(comm))
    if not aware:
        raise Unsupported(f"this MPI library is not CUDA-aware: {how}")
    return native(comm, memory)


@contextmanager
def copied(comm: MPI.Intracomm, arrays: Arrays, memory: Memory) -> Iterator[Contender]:
    """What a program does whose MPI library is not CUDA-aware: copies in pinned memory, and MPI on these."""
    rooms = [Pinned(memory.send.nbytes) for _ in range(2)]
    yield Contender("copied", memory, partial(_bind_copied, MPI.Intracomm(comm), arrays, rooms), ours=False)
    for room in rooms:
        room.unpin()


def _bind_copied(
    library: MPI.Intracomm, arrays: Arrays, rooms: Sequence[Pinned], problem: Problem, placement: Placement
) -> Action:
    gpu = driver.driver()
    hosts = {
        _address(buffer.array): room.array[: buffer.array.nbytes].view(problem.dtype)
        for buffer, room in zip(placement.buffers, rooms, strict=False)
    }
    args = [
        hosts[_address(arg)] if hasattr(arg, "__cuda_array_interface__") else arg for arg in placement.args
    ]
    call = partial(getattr(library, problem.kind.method), *args)

    def move(array: Array, to_host: bool) -> None:
        if array is not None:
            # Results of a collective in place begin where its buffer does, or a block further on.
            base = max(address for address in hosts if address <= _address(array))
            host = hosts[base].ctypes.data + _address(array) - base
            places = (host, _address(array)) if to_host else (_address(array), host)
            with gpu.on(arrays.device):
                gpu.copy(*places, array.nbytes, arrays.stream)
            arrays.synchronise()

    def copy_and_call() -> None:
        move(placement.source, to_host=True)
        call()
        move(placement.target, to_host=False)

    return copy_and_call


# -- NCCL, by way of CuPy


@contextmanager
def nccl(comm: MPI.Intracomm, arrays: Arrays, memory: Memory, sharing: int) -> Iterator[Contender]:
    """NVIDIA's NCCL, with as many ranks on a GPU as there are here."""
    from cupy.cuda import nccl as library

    agree(comm, _nccl_lacks(library, sharing))
    os.environ.update(SHARE_GPU if sharing > 1 else {})
    token = comm.bcast(attempt(comm, lambda: library.get_unique_id() if comm.rank == 0 else None))
    clique = attempt(comm, lambda: library.NcclCommunicator(comm.size, token, comm.rank))
    yield Contender("nccl", memory, partial(_bind_nccl, library, clique, arrays.stream), ours=False)
    clique.destroy()


def _nccl_lacks(library: Any, sharing: int) -> str | None:
    if not library.available:
        return f"CuPy finds no NCCL: {NCCL_INSTALL}"
    version = library.get_version()
    if sharing > 1 and version < SHARING_NCCL:
        return f"NCCL {version} lets no ranks share a GPU; {SHARING_NCCL} and newer do: {NCCL_INSTALL}"
    return None


def _bind_nccl(library: Any, clique: Any, stream: int, problem: Problem, placement: Placement) -> Action:
    names = {"float": "FLOAT32", "double": "FLOAT64", "half": "FLOAT16", "bfloat16": "BFLOAT16"}
    dtype = getattr(library, f"NCCL_{names.get(problem.type, problem.type.upper())}")
    source, target = (_address(array) for array in (placement.source, placement.target))
    if problem.collective == "broadcast":
        return partial(clique.broadcast, target, target, problem.count, dtype, problem.root, stream)
    if problem.collective == "allgather":
        return partial(clique.allGather, source, target, problem.count, dtype, stream)
    if problem.collective not in ("allreduce", "reduce_scatter", "reduce"):
        raise Unsupported(f"NCCL in CuPy has no {problem.collective}")
    op = getattr(library, f"NCCL_{problem.redop.upper()}")
    if problem.collective == "reduce":
        return partial(clique.reduce, source, target, problem.count, dtype, op, problem.root, stream)
    method = clique.allReduce if problem.collective == "allreduce" else clique.reduceScatter
    return partial(method, source, target, problem.count, dtype, op, stream)


def _address(array: Array) -> int:
    return 0 if array is None else int(array.__cuda_array_interface__["data"][0])


# -- PyTorch's gloo, with tensors on the GPU


@contextmanager
def gloo(comm: MPI.Intracomm, arrays: Arrays, memory: Memory) -> Iterator[Contender]:
    """gloo on the ranks of ``comm``, which are on one node."""
    agree(comm, _torch_lacks())
    node = MPI.Intracomm(comm).Split_type(MPI.COMM_TYPE_SHARED)
    apart = node.size < comm.size
    node.Free()
    agree(comm, "gloo is compared with on one node only" if apart else None)
    from .gloo import gloo as group

    with group(comm, memory) as contender:
        yield replace(contender, bind=partial(_bind_gloo, f"cuda:{arrays.device}"))


def _torch_lacks() -> str | None:
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed: pip install 'mpicoll[torch]'"
    return None if torch.cuda.is_available() else f"PyTorch {torch.__version__} finds no GPU"


def _bind_gloo(device: str, problem: Problem, placement: Placement) -> Action:
    from . import gloo as library

    if problem.kind.reduces and problem.redop not in library.OPERATIONS:
        raise Unsupported(f"it has no {problem.redop}")
    target = _tensor(placement.target, device)
    if problem.collective == "broadcast":
        return partial(library.dist.broadcast, target, problem.root)
    if problem.collective != "allreduce" or placement.in_place:
        raise Unsupported("gloo on GPUs is compared with in allreduce and broadcast")
    source, operation = _tensor(placement.source, device), library.OPERATIONS[problem.redop]

    def copy_and_reduce() -> None:
        target.copy_(source)  # for it reduces in place only
        library.dist.all_reduce(target, operation)

    return copy_and_reduce


def _tensor(array: Array, device: str) -> Any:
    """The same memory as torch sees it."""
    import torch

    if array.dtype == DTYPES["bfloat16"]:  # the interface between the two has no name for it
        return torch.as_tensor(array.view(np.int16), device=device).view(torch.bfloat16)
    return torch.as_tensor(array, device=device)
