"""Runs compiled programs of all ranks in plain Python, and objects to whatever MPI would not promise.

Two things are checked. Memory, rank by rank, in the order of the rows: what a pending send reads is not
written, what a pending receive fills is neither read nor written, nothing is read before it has a value,
nothing is written outside the rank's outputs and its scratch memory. And the ranks' messages together: the
n-th send from one rank to another meets the n-th receive, of the same length, and no rank waits for ever
though a send ends only when its receive is posted. As no receive takes "any" source, neither depends on
timing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mpicoll.schedule import Schedule
from mpicoll.transports.program import COLUMNS, Buffer, Layout, Op, Program

Bytes = npt.NDArray[np.uint8]
GARBAGE = 0xA5  # what memory holds that nobody has written
DELIVERIES = ("rendezvous", "late", "eager")


class ProgramError(AssertionError):
    """What a program does wrong: rank, row and reason."""


@dataclass(frozen=True)
class Row:
    op: int
    request: int
    peer: int
    count: int
    dst: int
    dst_at: int
    a: int
    a_at: int
    b: int
    b_at: int


assert tuple(column.name for column in fields(Row)) == COLUMNS


class Span(NamedTuple):
    """Bytes ``start`` to ``stop`` of a buffer."""

    buffer: int
    start: int
    stop: int

    def overlaps(self, other: Span) -> bool:
        return self.buffer == other.buffer and max(self.start, other.start) < min(self.stop, other.stop)


@dataclass
class Pending:
    """A send or receive that has not been waited for."""

    outgoing: bool
    peer: int
    span: Span
    data: Bytes | None = None  # what travels, once it has been read
    complete: bool = False


@dataclass
class Memory:
    """One buffer of one rank: its bytes, which of them have a value, and which may be written."""

    data: Bytes
    defined: npt.NDArray[np.bool_]
    writable: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, nbytes: int, writable: bool = False) -> Memory:
        return cls(np.full(nbytes, GARBAGE, np.uint8), np.zeros(nbytes, bool), np.full(nbytes, writable))


@dataclass
class Rank:
    """A program under execution."""

    rank: int
    program: Program
    memory: list[Memory]
    dtype: np.dtype[Any]
    rows: list[Row] = field(init=False)
    pc: int = 0
    requests: dict[int, Pending] = field(default_factory=dict)
    most_requests: int = 0

    def __post_init__(self) -> None:
        self.rows = [Row(*row) for row in self.program.rows.tolist()]

    @property
    def done(self) -> bool:
        return self.pc == len(self.rows)

    def fail(self, reason: str) -> ProgramError:
        row = "the end" if self.done else self.rows[self.pc]
        return ProgramError(f"rank {self.rank}, row {self.pc}, {row}: {reason}")

    def span(self, buffer: int, at: int, nbytes: int) -> Span:
        span = Span(buffer, at, at + nbytes)
        inside = 0 <= span.start <= span.stop <= len(self.memory[buffer].data)
        if nbytes and not inside:
            raise self.fail(f"{span} is not within {len(self.memory[buffer].data)} bytes")
        return span

    def to_read(self, span: Span) -> Bytes:
        """The bytes of ``span``, which an instruction may read."""
        for request, pending in self.requests.items():
            if not pending.outgoing and pending.span.overlaps(span):
                raise self.fail(f"reads {span} while request {request} receives into it")
        if not self.memory[span.buffer].defined[span.start : span.stop].all():
            raise self.fail(f"reads {span}, part of which has no value yet")
        return self.memory[span.buffer].data[span.start : span.stop]

    def to_write(self, span: Span) -> Bytes:
        """The bytes of ``span``, which an instruction may write."""
        for request, pending in self.requests.items():
            if pending.span.overlaps(span):
                verb = "sends from" if pending.outgoing else "receives into"
                raise self.fail(f"writes {span} while request {request} {verb} it")
        if not self.memory[span.buffer].writable[span.start : span.stop].all():
            raise self.fail(f"writes {span}, part of which is not its own to write")
        self.memory[span.buffer].defined[span.start : span.stop] = True
        return self.memory[span.buffer].data[span.start : span.stop]

    def open_request(self, row: Row, pending: Pending) -> None:
        if row.request in self.requests:
            raise self.fail("its request is still in use")
        if not 0 <= row.request < self.program.requests:
            raise self.fail(f"expected a request below {self.program.requests}")
        self.requests[row.request] = pending
        self.most_requests = max(self.most_requests, len(self.requests))


def execute(
    programs: Sequence[Program],
    memories: Sequence[list[Memory]],
    dtype: np.dtype[Any],
    delivery: str = "rendezvous",
    seed: int = 0,
) -> None:
    """Run all ranks' programs to their ends, in an order drawn from ``seed``. Raises `ProgramError`.

    ``delivery``: a "rendezvous" moves a message when both ends are posted; "late" when the first of the two
    waits for it; "eager" reads it when it is sent, as MPI does with small ones.
    """
    ranks = [Rank(r, p, m, dtype) for r, (p, m) in enumerate(zip(programs, memories, strict=True))]
    _Run(ranks, delivery, random.Random(seed)).run()


class _Run:
    def __init__(self, ranks: list[Rank], delivery: str, choice: random.Random) -> None:
        self.ranks = ranks
        self.delivery = delivery
        self.choice = choice
        self.sends: dict[tuple[int, int], list[Pending]] = {}  # by (src, dst), in the order of posting
        self.recvs: dict[tuple[int, int], list[Pending]] = {}
        self.matched: dict[int, tuple[Pending, Pending]] = {}  # send and receive, by id of either

    def run(self) -> None:
        active = list(self.ranks)
        while active:
            progressed = False
            self.choice.shuffle(active)
            for rank in active:
                # A rank may rush ahead as far as it can, or be held back after a few rows.
                budget = self.choice.choice((1, 3, len(rank.rows) + 1))
                while budget and not rank.done and self.step(rank):
                    progressed = True
                    budget -= 1
            active = [rank for rank in active if not rank.done]
            if active and not progressed:
                raise ProgramError("deadlock: " + "; ".join(str(rank.fail("waits")) for rank in active))
        self.check_end()

    def check_end(self) -> None:
        for rank in self.ranks:
            if rank.requests:
                raise rank.fail(f"requests {sorted(rank.requests)} were never waited for")
            if rank.most_requests != rank.program.requests:
                raise rank.fail(f"needs {rank.most_requests} requests, says {rank.program.requests}")
        for pair, posted in self.sends.items():
            if len(posted) != len(self.recvs.get(pair, [])):
                raise ProgramError(f"{pair} (src, dst): {len(posted)} sends, another number of receives")

    def step(self, rank: Rank) -> bool:
        """Execute one row; false if it has to wait."""
        row = rank.rows[rank.pc]
        if row.op == Op.WAIT:
            if not self.wait(rank, row):
                return False
        elif row.op in (Op.SEND, Op.RECV):
            self.post(rank, row)
        else:
            compute(rank, row)
        rank.pc += 1
        return True

    def post(self, rank: Rank, row: Row) -> None:
        outgoing = row.op == Op.SEND
        if row.peer == rank.rank or not 0 <= row.peer < len(self.ranks):
            raise rank.fail("no such peer")
        if outgoing:
            span = rank.span(row.a, row.a_at, row.count)
            data = rank.to_read(span).copy()
        else:
            span = rank.span(row.dst, row.dst_at, row.count)
            rank.to_write(span)
        pending = Pending(outgoing, row.peer, span)
        if outgoing and self.delivery == "eager":
            pending.data, pending.complete = data, True
        rank.open_request(row, pending)
        pair = (rank.rank, row.peer) if outgoing else (row.peer, rank.rank)
        mine, others = (self.sends, self.recvs) if outgoing else (self.recvs, self.sends)
        mine.setdefault(pair, []).append(pending)
        if len(mine[pair]) <= len(others.get(pair, [])):
            other = others[pair][len(mine[pair]) - 1]
            self.match(rank, *((pending, other) if outgoing else (other, pending)))

    def match(self, rank: Rank, send: Pending, recv: Pending) -> None:
        lengths = [p.span.stop - p.span.start for p in (send, recv)]
        if lengths[0] != lengths[1]:
            raise rank.fail(f"meets a message of another length: {lengths[0]} sent, {lengths[1]} received")
        self.matched[id(send)] = self.matched[id(recv)] = (send, recv)
        if self.delivery != "late":
            self.move(send, recv)

    def move(self, send: Pending, recv: Pending) -> None:
        if recv.complete:
            return
        src, dst = self.ranks[recv.peer], self.ranks[send.peer]
        source = src.memory[send.span.buffer].data[send.span.start : send.span.stop]
        data = source if send.data is None else send.data
        dst.memory[recv.span.buffer].data[recv.span.start : recv.span.stop] = data
        send.complete = recv.complete = True

    def wait(self, rank: Rank, row: Row) -> bool:
        pending = rank.requests.get(row.request)
        if pending is None:
            raise rank.fail("waits for a request that is not in use")
        if not pending.complete and id(pending) in self.matched:
            self.move(*self.matched[id(pending)])
        if not pending.complete:
            return False
        del rank.requests[row.request]
        return True


def compute(rank: Rank, row: Row) -> None:
    """COPY, REDUCE (a sum) or SCALE (by one over the number of ranks, which the memory's owner passed)."""
    nbytes = row.count * (1 if row.op == Op.COPY else rank.dtype.itemsize)
    if row.count < 0:
        raise rank.fail("expected a count of 0 or more")
    dst = rank.span(row.dst, row.dst_at, nbytes)
    if row.op == Op.SCALE:
        rank.to_read(dst)
        values = rank.to_write(dst).view(rank.dtype)
        values *= FACTOR
        return
    a = rank.span(row.a, row.a_at, nbytes)
    if row.op == Op.COPY:
        if a.overlaps(dst):
            raise rank.fail("copies to where it reads")
        rank.to_write(dst)[:] = rank.to_read(a)
        return
    if row.op != Op.REDUCE:
        raise rank.fail("no such instruction")
    b = rank.span(row.b, row.b_at, nbytes)
    if b.overlaps(dst) or b.overlaps(a) or (a.overlaps(dst) and a != dst):
        raise rank.fail("operands overlap in a way that kernels do not allow")
    total = rank.to_read(a).view(rank.dtype) + rank.to_read(b).view(rank.dtype)
    rank.to_write(dst).view(rank.dtype)[:] = total


FACTOR = 0.375  # of SCALE: exact, and its square is another number, so that scaling twice shows


def memory_of(
    schedule: Schedule, rank: int, layout: Layout, dtype: np.dtype[Any], scratch: int, size: int
) -> list[Memory]:
    """INPUT and OUTPUT, ``size`` elements each, and SCRATCH; only outputs and scratch may be written."""
    buffers = [Memory.of(size * dtype.itemsize), Memory.of(size * dtype.itemsize), Memory.of(scratch, True)]
    for chunk in schedule.outputs(rank).tolist():
        start, stop = extent(layout.output_at, layout, chunk, dtype)
        buffers[Buffer.OUTPUT].writable[start:stop] = True
    return buffers


def extent(at: npt.NDArray[np.int64], layout: Layout, chunk: int, dtype: np.dtype[Any]) -> tuple[int, int]:
    """Where a chunk begins and ends, in bytes."""
    return int(at[chunk]) * dtype.itemsize, int(at[chunk] + layout.counts[chunk]) * dtype.itemsize
