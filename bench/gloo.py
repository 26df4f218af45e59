"""PyTorch's gloo as a contender: ``torch.distributed`` between the ranks of an MPI job.

gloo's reductions and its broadcast are in place only. Whoever wants the result elsewhere copies the input
there first, and so does the call that is timed beside ours with two buffers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed
from mpi4py import MPI

from .contenders import Action, Contender, Memory, Placement, Unsupported
from .data import Array, Problem
from .kinds import DTYPES

dist: Any = torch.distributed  # its types know neither TCPStore nor that every isend has a request

# Names by which newer versions call these without a warning at every call.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
allgather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "prod": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}


_ended: list[Any] = []  # gloo's groups that nobody uses any more


def end_groups() -> None:
    """Leave all of PyTorch's process groups, as ``destroy_process_group`` does, but do not wait for ever.

    Some time after a gradient's sum is complete one of gloo's threads lets go of it, for which it needs
    Python's lock. A group's destructor holds that lock while it waits for these threads to end. So a group is
    kept until others have been made and left, long after its threads have nothing more to do.
    """
    groups = dist.distributed_c10d._world.pg_map.items()
    _ended[:] = [group for group, (backend, _) in groups if "gloo" in backend]
    dist.destroy_process_group()


@contextmanager
def gloo(comm: MPI.Intracomm, memory: Memory) -> Iterator[Contender]:
    """gloo on the ranks of ``comm``, which are on one node, for as long as the block lasts."""
    # gloo would look up the name of this machine, which need not have an address.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    port = comm.bcast(server and server.port)
    store = server or dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    yield Contender("gloo", memory, _bind, ours=False)
    comm.Barrier()  # the store is rank 0's, and the others may still be talking to it
    end_groups()


def _bind(problem: Problem, placement: Placement) -> Action:
    if problem.kind.reduces and problem.redop not in OPERATIONS:
        raise Unsupported(f"it has no {problem.redop}")
    if problem.collective in ("allreduce", "reduce"):
        return _reduction(problem, placement)
    assert placement.target is not None
    target = _tensor(placement.target)
    if problem.collective == "broadcast":
        return partial(dist.broadcast, target, problem.root)
    if placement.in_place:
        raise Unsupported(f"it has no {problem.collective} in place")
    assert placement.source is not None
    return _move(problem, _tensor(placement.source), target)


def _reduction(problem: Problem, placement: Placement) -> Action:
    source = placement.source
    assert source is not None
    # Where a rank gets no result, gloo still needs memory for partial ones.
    target = np.empty_like(source) if placement.target is None else placement.target
    operation, tensor = OPERATIONS[problem.redop], _tensor(source if placement.in_place else target)
    if problem.collective == "allreduce":
        reduce = partial(dist.all_reduce, tensor, operation)
    else:
        reduce = partial(dist.reduce, tensor, problem.root, operation)
    if placement.in_place:
        return reduce

    def copy_and_reduce() -> None:
        np.copyto(target, source)
        reduce()

    return copy_and_reduce


def _move(problem: Problem, source: Any, target: Any) -> Action:
    match problem.collective:
        case "reduce_scatter":
            return partial(reduce_scatter, target, source, OPERATIONS[problem.redop])
        case "allgather":
            return partial(allgather, target, source)
        case "alltoall":
            return partial(dist.all_to_all_single, target, source)
    if problem.nranks == 1:
        raise Unsupported("it sends nothing from a rank to itself")
    after, before = (problem.rank + 1) % problem.nranks, (problem.rank - 1) % problem.nranks

    def around_a_ring() -> None:
        request = dist.isend(source, after)
        dist.recv(target, before)
        request.wait()

    return around_a_ring


def _tensor(array: Array) -> Any:
    """The same memory as torch sees it."""
    if array.dtype == DTYPES["bfloat16"]:  # torch takes no bfloat16 from NumPy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
