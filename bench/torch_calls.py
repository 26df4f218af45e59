"""torch.distributed over mpicoll and over gloo, and the communicator below, as contenders on one memory.

`all_reduce` and `broadcast` of tensors are in place, the others have an input and an output. The communicator
makes the same call with the arrays whose memory the tensors have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

import mpicoll.torch
from mpicoll import Communicator

from .contenders import Action, Contender, Placement, Unsupported, private_memory
from .data import Problem
from .gloo import allgather, end_groups, reduce_scatter
from .jobs import say
from .timing import Settings, Timed, measure

OURS, GLOO, BELOW = "mpicoll", "gloo", "communicator"

Facts = dict[str, Any]


@contextmanager
def groups(comm: Communicator) -> Iterator[dict[str, Any]]:
    """A process group of all ranks over each backend, and one thread on each rank, within the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    node = MPI.Intracomm(comm).Split_type(MPI.COMM_TYPE_SHARED)
    if node.size == comm.size:
        # gloo would look up the name of this machine, which need not have an address.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    node.Free()
    mpicoll.torch.init()
    yield {OURS: dist.distributed_c10d._get_default_group(), GLOO: dist.new_group(backend=GLOO)}
    MPI.Intracomm(comm).Barrier()  # gloo's ends of a connection go together
    end_groups()
    torch.set_num_threads(threads)


def version() -> str:
    """PyTorch's."""
    return str(torch.__version__)


def measured(
    comm: Communicator, problems: Sequence[tuple[str, Problem]], settings: Settings
) -> Iterator[Facts]:
    """A row for each problem, which comes with the name of torch's function; collective."""
    memory = private_memory(max(problem.size for _, problem in problems))
    with groups(comm) as found:
        contenders = [
            Contender(OURS, memory, partial(_bind, found[OURS])),
            Contender(BELOW, memory, partial(_below, found[OURS].comm)),
            Contender(GLOO, memory, partial(_bind, found[GLOO])),
        ]
        for number, (call, problem) in enumerate(problems, 1):
            say(comm, f"{problem} ({number} of {len(problems)})")
            timed, copying = measure(comm, problem, contenders, memory, settings, _say_nothing)
            yield _row(call, problem, timed, copying)


def _say_nothing(text: str) -> None:
    """Each call has one form only, and the others are left out."""


def _row(call: str, problem: Problem, timed: Sequence[Timed], copying: float) -> Facts:
    micros = {each.contender: each.seconds * 1e6 for each in timed}
    return {
        "call": call,
        "size": problem.size,
        "count": problem.count,
        **micros,
        "memcpy": copying * 1e6,
        "gloo_ratio": micros[GLOO] / micros[OURS],
        "overhead": micros[OURS] - micros[BELOW],
        "communicator_ratio": micros[OURS] / micros[BELOW],
        "nwrong": {each.contender: (each.wrong or 0) + each.outside for each in timed},
    }


def _bind(group: Any, problem: Problem, placement: Placement) -> Action:
    _check_form(problem, placement)
    assert placement.target is not None
    target = torch.from_numpy(placement.target)
    if problem.collective == "allreduce":
        return partial(dist.all_reduce, target, group=group)
    if problem.collective == "broadcast":
        return partial(dist.broadcast, target, problem.root, group=group)
    functions = {
        "allgather": allgather,
        "reduce_scatter": reduce_scatter,
        "alltoall": dist.all_to_all_single,
    }
    return partial(functions[problem.collective], target, torch.from_numpy(placement.source), group=group)


def _below(comm: Communicator, problem: Problem, placement: Placement) -> Action:
    _check_form(problem, placement)
    return partial(getattr(comm, problem.kind.method), *placement.args)


def _check_form(problem: Problem, placement: Placement) -> None:
    """Raise `Unsupported` unless torch has this form of the collective."""
    if placement.in_place != (problem.collective == "allreduce"):
        raise Unsupported("torch has another form of it")
