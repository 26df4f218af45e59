"""Who is measured: our collectives in all their forms, and the MPI library's own.

A contender is given a `Problem` and a `Placement`, which is one way of calling it, and returns a function of
no arguments that makes one call. What is timed is a `functools.partial` around the very method that users
call, with the same arguments for ours and theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from mpicoll import AVG, Communicator

from .data import Array, Problem
from .kinds import DTYPES, NO_OPERATION

GUARD = 64  # elements behind each buffer that no call may write to
GUARD_BYTE = 0x5A
MAX_ITEMSIZE = 8

OPERATIONS = {"sum": MPI.SUM, "prod": MPI.PROD, "min": MPI.MIN, "max": MPI.MAX, "avg": AVG}

Action = Callable[[], object]


class Unsupported(Exception):
    """A contender cannot do this; the message says why."""


class Buffer:
    """``count`` elements at the beginning of ``memory``, which is in bytes, and guards behind them."""

    def __init__(self, memory: Array, dtype: np.dtype[Any], count: int) -> None:
        end = count * dtype.itemsize
        self.array = memory[:end].view(dtype)
        self.guards = memory[end : end + GUARD * dtype.itemsize].reshape(GUARD, dtype.itemsize)


class Memory:
    """Room for three buffers of up to ``nbytes`` on this rank; ``allocate`` takes a number of bytes."""

    def __init__(self, allocate: Callable[[int], Array], nbytes: int) -> None:
        self.send, self.recv, self.own = (allocate(nbytes + GUARD * MAX_ITEMSIZE) for _ in range(3))


def private_memory(nbytes: int) -> Memory:
    # Written to, for reading memory that never was is reading one page of zeros: memcpy would seem faster.
    return Memory(lambda room: np.full(room, GUARD_BYTE, np.uint8), nbytes)


def allocated_memory(comm: Communicator, nbytes: int) -> Memory:
    """Memory that the other ranks of the node reach."""
    return Memory(lambda room: comm.alloc(room, np.uint8), nbytes)


@dataclass(frozen=True)
class Placement:
    """One way of calling a collective: its arguments, and where in them input and result lie, if any do."""

    args: tuple[Any, ...]
    source: Array | None
    target: Array | None
    buffers: tuple[Buffer, ...]
    in_place: bool = False

    def fill(self, problem: Problem) -> None:
        """Input where it belongs, and what is certainly wrong where the result will be."""
        for buffer in self.buffers:
            buffer.guards[...] = GUARD_BYTE
        if self.target is not None and problem.expected is not None:
            np.invert(problem.expected.view(np.uint8), out=self.target.view(np.uint8))
        if self.source is not None:
            self.source[...] = problem.given

    def count_wrong(self, problem: Problem) -> int:
        return 0 if self.target is None else problem.count_wrong(self.target)

    def count_outside(self) -> int:
        """Elements behind the buffers that were written to."""
        return sum(int((buffer.guards != GUARD_BYTE).any(axis=1).sum()) for buffer in self.buffers)


def placements(problem: Problem, memory: Memory) -> list[Placement]:
    """With two buffers first; then in place, where that is another call."""
    p, dtype = problem, problem.dtype
    operation = () if p.redop in ("sum", NO_OPERATION) else (OPERATIONS[p.redop],)
    own = Buffer(memory.own, dtype, p.whole)
    blocks = Buffer(memory.send, dtype, p.whole), Buffer(memory.recv, dtype, p.whole)
    single = Buffer(memory.send, dtype, p.count), Buffer(memory.recv, dtype, p.count)
    match p.collective:
        case "allreduce" | "alltoall":
            return [_apart(*blocks, *operation), _in_place(own, own.array, own.array, *operation)]
        case "reduce_scatter":
            front = own.array[: p.count]
            return [_apart(blocks[0], single[1], *operation), _in_place(own, own.array, front, *operation)]
        case "allgather":
            mine = own.array[p.rank * p.count :][: p.count]
            return [_apart(single[0], blocks[1]), _in_place(own, mine, own.array)]
        case "reduce":
            return _reduce(p, own, *single)
        case "broadcast":
            source = own.array if p.rank == p.root else None
            root = (p.root,) if p.root else ()
            return [Placement((own.array, *root), source, own.array, (own,))]
    return [_around_a_ring(p, *single)]  # sendrecv


def _apart(send: Buffer, recv: Buffer, *more: object) -> Placement:
    return Placement((send.array, recv.array, *more), send.array, recv.array, (send, recv))


def _in_place(own: Buffer, source: Array, target: Array, *more: object) -> Placement:
    return Placement((MPI.IN_PLACE, own.array, *more), source, target, (own,), in_place=True)


def _reduce(problem: Problem, own: Buffer, send: Buffer, recv: Buffer) -> list[Placement]:
    plain = (problem.redop, problem.root) == ("sum", 0)
    more = () if plain else (OPERATIONS[problem.redop], problem.root)
    if problem.rank == problem.root:
        return [_apart(send, recv, *more), _in_place(own, own.array, own.array, *more)]
    sender = Placement((send.array, None, *more), send.array, None, (send,))
    return [sender, replace(sender, in_place=True)]


def _around_a_ring(problem: Problem, send: Buffer, recv: Buffer) -> Placement:
    """To the next rank, and from the one before."""
    after, before = (problem.rank + 1) % problem.nranks, (problem.rank - 1) % problem.nranks
    args = (_as_integers(send.array), after, 0, _as_integers(recv.array), before)
    return Placement(args, send.array, recv.array, (send, recv))


def _as_integers(array: Any) -> Any:
    """mpi4py takes no bfloat16, and not every MPI library has float16: they can still be moved about."""
    halves = (DTYPES["half"], DTYPES["bfloat16"])
    return array.view(np.uint16) if isinstance(array, np.ndarray) and array.dtype in halves else array


@dataclass(frozen=True)
class Contender:
    """``bind`` makes the function that is timed, or raises `Unsupported`."""

    name: str
    memory: Memory
    bind: Callable[[Problem, Placement], Action]
    ours: bool = True  # others may be unable to do what we can


def our_contenders(
    comm: Communicator, names: Sequence[str], memories: Mapping[str, Memory], persistent: bool
) -> Iterator[Contender]:
    """Each algorithm in each kind of memory, whose names are added to the algorithm's."""
    for name in names:
        keywords = {} if name == "auto" else {"algorithm": name}  # as users write it
        for suffix, memory in memories.items():
            yield Contender(name + suffix, memory, partial(_one_shot, comm, keywords))
            if persistent:
                yield Contender(f"{name}{suffix} persistent", memory, partial(_persistent, comm, keywords))


def native(comm: MPI.Intracomm, memory: Memory) -> Contender:
    """The MPI library's own."""

    def bind(problem: Problem, placement: Placement) -> Action:
        if problem.redop == "avg":
            raise Unsupported("MPI has no average")
        args = placement.args if problem.kind.reduces else map(_as_integers, placement.args)
        return partial(getattr(library, problem.kind.method), *args)

    library = MPI.Intracomm(comm)
    return Contender("native", memory, bind, ours=False)


def _one_shot(comm: Communicator, keywords: dict[str, str], problem: Problem, placement: Placement) -> Action:
    return partial(getattr(comm, problem.kind.method), *placement.args, **keywords)


def _persistent(
    comm: Communicator, keywords: dict[str, str], problem: Problem, placement: Placement
) -> Action:
    plan = getattr(comm, f"{problem.kind.method}_init")(*placement.args, **keywords)

    def run() -> None:
        plan.Start()
        plan.Wait()

    return run
