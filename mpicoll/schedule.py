"""Transfer, Round, Schedule: the one description of a collective algorithm.

Vocabulary
----------
chunk     the unit an algorithm moves, a number from 0 to nchunks - 1. The same number means the same
          data on every rank; where it lies in memory is decided later, when a schedule is compiled.
transfer  ``(src, dst, chunk, op)``: rank ``src`` sends its ``chunk`` to rank ``dst``, which stores it
          (``copy``) or combines it with its own (``reduce``). One transfer describes both ends, so a send
          without its receive cannot be written.
round     transfers that may all happen at once.
message   all that one rank sends another in one round by one ``op``: what travels together.
run       rounds that follow each other and have the same messages, of other chunks. A ring is two runs.

A Rabenseifner round of 65,536 ranks has two billion transfers in 65,536 messages. So a round made of ranges
of chunks keeps the ranges; the columns of its transfers are made when somebody reads them.

The meaning of a round
----------------------
1. Every read sees the state at the round's start.
2. A chunk of a rank is written by one ``copy``, or by any number of ``reduce`` transfers. Several
   reductions into one chunk are *one* reduction of all their sources and the rank's own value, folded
   in ascending rank order: so ranks that reduce the same sources get the same bits.
3. A chunk may be sent and reduced into in one round (both ends of an exchange do so), but not sent and
   overwritten by a copy.
4. There is no barrier between rounds: a rank waits for its own transfers only.

``verify`` proves these rules kept and the result right, ``transports`` execute the same object.
This module needs NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

COPY = "copy"
REDUCE = "reduce"
CACHE_LINE = 64  # bytes; chunks begin on a line of their own so that two ranks never write to one

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Ints = int | Sequence[int] | npt.NDArray[np.integer]


class Transfer(NamedTuple):
    """Rank ``src`` sends ``chunk`` to rank ``dst``, which copies or reduces it (``op``)."""

    src: int
    dst: int
    chunk: int
    op: str


class Messages(NamedTuple):
    """What travels together, as columns: rank ``src`` sends ``dst`` as many as ``nchunks`` chunks.

    ``src``, ``dst``, ``nchunks``: int64 ``[m]``; ``reduce``: bool ``[m]``. A pair of ranks is in it once, or
    twice if it both copies and reduces.
    """

    src: IntArray
    dst: IntArray
    nchunks: IntArray
    reduce: BoolArray


@dataclass(frozen=True, eq=False)
class Round:
    """Transfers that may all happen at once, as columns of equal length.

    ``src``, ``dst`` and ``chunk`` are int64, ``reduce`` is bool (False means copy). Iterating yields
    `Transfer` objects; use the columns where speed matters.
    """

    src: IntArray
    dst: IntArray
    chunk: IntArray
    reduce: BoolArray

    @classmethod
    def of(cls, src: Ints, dst: Ints, chunk: Ints, op: str) -> Round:
        """A round of transfers that all do the same ``op``; single numbers are repeated as needed."""
        columns = np.broadcast_arrays(
            np.atleast_1d(np.asarray(src, np.int64)), np.asarray(dst, np.int64), np.asarray(chunk, np.int64)
        )
        return cls(columns[0], columns[1], columns[2], np.full(len(columns[0]), op == REDUCE))

    @classmethod
    def of_ranges(cls, src: Ints, dst: Ints, first: Ints, count: Ints, nchunks: int, op: str) -> Round:
        """A round in which each ``src`` sends its ``dst`` the ``count`` chunks from ``first`` on.

        Chunk numbers wrap around after ``nchunks - 1``; each pair's chunks are listed in ascending order.
        The columns are made when they are read.
        """
        given = (np.atleast_1d(np.asarray(column, np.int64)) for column in (src, dst, first, count))
        senders, receivers, firsts, counts = np.broadcast_arrays(*given)
        reduce = np.full(len(senders), op == REDUCE)
        return RangeRound(Ranges(senders, receivers, firsts, counts, reduce, nchunks))

    @classmethod
    def from_transfers(cls, transfers: Sequence[Transfer]) -> Round:
        """A round from `Transfer` objects, for small or irregular rounds."""
        src, dst, chunk = np.array([t[:3] for t in transfers], np.int64).reshape(-1, 3).T
        return cls(src, dst, chunk, np.array([t.op == REDUCE for t in transfers], bool))

    @classmethod
    def union(cls, rounds: Sequence[Round]) -> Round:
        """All transfers of ``rounds`` in one round."""
        compact = [r.ranges for r in rounds if isinstance(r, RangeRound)]
        if rounds and len(compact) == len(rounds) and Ranges.joinable(compact):
            return RangeRound(Ranges.joined(compact))
        names = ("src", "dst", "chunk", "reduce")
        return cls(*(np.concatenate([getattr(r, name) for r in rounds]) for name in names))

    def __len__(self) -> int:
        return len(self.src)

    def __iter__(self) -> Iterator[Transfer]:
        columns = (self.src.tolist(), self.dst.tolist(), self.chunk.tolist(), self.reduce.tolist())
        for src, dst, chunk, reduce in zip(*columns, strict=True):
            yield Transfer(src, dst, chunk, REDUCE if reduce else COPY)

    def involving(self, rank: int) -> Round:
        """The transfers that ``rank`` sends or receives, in the same order."""
        return self.where((self.src == rank) | (self.dst == rank))

    def where(self, kept: npt.NDArray[np.bool_]) -> Round:
        """The transfers for which ``kept`` is true."""
        return Round(self.src[kept], self.dst[kept], self.chunk[kept], self.reduce[kept])

    def backwards(self, reduces: bool) -> Round:
        """Every receiver a sender; all transfers reduce, or all copy."""
        return Round(self.dst, self.src, self.chunk, np.full(len(self), reduces))

    def messages(self) -> Messages:
        """The transfers, those that travel together as one."""
        return _joined(Messages(self.src, self.dst, np.ones(len(self), np.int64), self.reduce))


@dataclass(frozen=True, eq=False)
class Ranges:
    """Row i: ``src[i]`` sends ``dst[i]`` the ``count[i]`` chunks from ``first[i]`` on, modulo ``nchunks``.

    All columns are int64, but ``reduce``, which is bool.
    """

    src: IntArray
    dst: IntArray
    first: IntArray
    count: IntArray
    reduce: BoolArray
    nchunks: int

    @property
    def wraps(self) -> bool:
        """Whether any range begins anew at chunk 0."""
        return bool((self.first + self.count > self.nchunks).any())

    @staticmethod
    def joinable(ranges: Sequence[Ranges]) -> bool:
        """Whether all that wrap around do so at one number of chunks, and no other has more."""
        most = max(r.nchunks for r in ranges)
        return all(r.nchunks == most or not r.wraps for r in ranges)

    @classmethod
    def joined(cls, ranges: Sequence[Ranges]) -> Ranges:
        """The rows of all, which are `joinable`."""
        src, dst, first, count = (
            np.concatenate([getattr(r, name) for r in ranges]) for name in ("src", "dst", "first", "count")
        )
        nchunks = max(r.nchunks for r in ranges)
        return cls(src, dst, first, count, np.concatenate([r.reduce for r in ranges]), nchunks)

    def rows(self, kept: BoolArray) -> Ranges:
        """The rows for which ``kept`` is true."""
        src, dst, first, count = self.src[kept], self.dst[kept], self.first[kept], self.count[kept]
        return Ranges(src, dst, first, count, self.reduce[kept], self.nchunks)


class RangeRound(Round):
    """A round of ranges of chunks; its columns are made when they are first read."""

    ranges: Ranges

    def __init__(self, ranges: Ranges) -> None:
        object.__setattr__(self, "ranges", ranges)

    def __len__(self) -> int:
        return int(self.ranges.count.sum())

    @cached_property
    def _row(self) -> IntArray:
        """The row of each transfer."""
        return np.repeat(np.arange(len(self.ranges.src)), self.ranges.count)

    @cached_property
    def src(self) -> IntArray:
        return self.ranges.src[self._row]

    @cached_property
    def dst(self) -> IntArray:
        return self.ranges.dst[self._row]

    @cached_property
    def reduce(self) -> BoolArray:
        return self.ranges.reduce[self._row]

    @cached_property
    def chunk(self) -> IntArray:
        row, count = self._row, self.ranges.count
        nth = np.arange(len(row)) - (np.cumsum(count) - count)[row]
        chunk: IntArray = (self.ranges.first[row] + nth) % self.ranges.nchunks
        return chunk[np.lexsort((chunk, row))]

    def involving(self, rank: int) -> Round:
        """The transfers that ``rank`` sends or receives, in the same order."""
        return RangeRound(self.ranges.rows((self.ranges.src == rank) | (self.ranges.dst == rank)))

    def backwards(self, reduces: bool) -> Round:
        """Every receiver a sender; all transfers reduce, or all copy."""
        reduce = np.full(len(self.ranges.src), reduces)
        return RangeRound(replace(self.ranges, src=self.ranges.dst, dst=self.ranges.src, reduce=reduce))

    def messages(self) -> Messages:
        """The transfers, those that travel together as one."""
        kept = self.ranges.rows(self.ranges.count > 0)
        return _joined(Messages(kept.src, kept.dst, kept.count, kept.reduce))


def _joined(rows: Messages) -> Messages:
    """Rows of the same ranks and operation as one; in the order of src, dst, operation if there are any."""
    if len(rows.src) < 2:
        return rows
    key = (rows.src * (rows.dst.max() + 1) + rows.dst) * 2 + rows.reduce
    _, first, message = np.unique(key, return_index=True, return_inverse=True)
    if len(first) == len(key):
        return rows
    nchunks = np.bincount(message, rows.nchunks).astype(np.int64)
    return Messages(rows.src[first], rows.dst[first], nchunks, rows.reduce[first])


@dataclass(frozen=True)
class Collective:
    """What a collective starts from and must end with, in chunks.

    ``inputs`` and ``outputs`` take (rank, nranks, nchunks, root) and return chunk numbers: those that the
    rank holds at the start, and those it must hold at the end. ``reduces``: the output is the reduction of
    every rank's chunk; otherwise it is the one input. ``idempotent``: a contribution may count twice.
    """

    name: str
    inputs: Callable[[int, int, int, int], IntArray]
    outputs: Callable[[int, int, int, int], IntArray]
    reduces: bool = False
    rooted: bool = False
    idempotent: bool = False


def _all(rank: int, nranks: int, nchunks: int, root: int) -> IntArray:
    return np.arange(nchunks)


def _own(rank: int, nranks: int, nchunks: int, root: int) -> IntArray:
    return np.array([rank])


def _all_at_root(rank: int, nranks: int, nchunks: int, root: int) -> IntArray:
    return np.arange(nchunks if rank == root else 0)


def _sent(rank: int, nranks: int, nchunks: int, root: int) -> IntArray:
    return rank * nranks + np.arange(nranks)


def _received(rank: int, nranks: int, nchunks: int, root: int) -> IntArray:
    return np.arange(nranks) * nranks + rank


COLLECTIVES = {
    c.name: c
    for c in (
        Collective("allreduce", _all, _all, reduces=True),
        Collective("reduce_scatter", _all, _own, reduces=True),
        Collective("reduce", _all, _all_at_root, reduces=True, rooted=True),
        Collective("allgather", _own, _all),
        Collective("broadcast", _all_at_root, _all, rooted=True),
        Collective("gather", _own, _all_at_root, rooted=True),
        Collective("scatter", _all_at_root, _own, rooted=True),
        # Chunk i * nranks + j is what rank i sends to rank j.
        Collective("alltoall", _sent, _received),
        # One empty chunk; that every rank's contribution arrives is what makes it a barrier.
        Collective("barrier", _all, _all, reduces=True, idempotent=True),
    )
}


@dataclass(frozen=True, eq=False)
class Schedule:
    """An algorithm for ``nranks`` ranks: ``nrounds`` rounds, each made when it is asked for.

    A 4,096-rank ring has 33 million transfers; nothing but the round in hand is ever in memory.
    ``root`` is 0 for collectives without one. ``runs``: the lengths of the runs that the rounds are made of,
    as far as the algorithm knows; None: each round is one. They only save time: to simulate a schedule,
    one round of each run is made.
    """

    name: str
    collective: str
    nranks: int
    nchunks: int
    nrounds: int
    make_round: Callable[[int], Round]
    root: int = 0
    runs: tuple[int, ...] | None = None

    @classmethod
    def from_rounds(
        cls, name: str, collective: str, nranks: int, nchunks: int, rounds: Sequence[Round], root: int = 0
    ) -> Schedule:
        """A schedule from rounds that are already made; empty rounds are left out."""
        kept = [r for r in rounds if len(r)]
        return cls(name, collective, nranks, nchunks, len(kept), kept.__getitem__, root)

    @property
    def rounds(self) -> Iterator[Round]:
        """The rounds in order, made one at a time."""
        return (self.make_round(k) for k in range(self.nrounds))

    def inputs(self, rank: int) -> IntArray:
        """The chunks that ``rank`` holds at the start."""
        return COLLECTIVES[self.collective].inputs(rank, self.nranks, self.nchunks, self.root)

    def outputs(self, rank: int) -> IntArray:
        """The chunks that ``rank`` must hold, complete, at the end."""
        return COLLECTIVES[self.collective].outputs(rank, self.nranks, self.nchunks, self.root)


def in_sequence(name: str, collective: str, phases: Sequence[Schedule]) -> Schedule:
    """One schedule that runs ``phases`` one after the other; they share ranks, chunks and root."""
    first = phases[0]
    ends = np.cumsum([phase.nrounds for phase in phases])

    def make_round(k: int) -> Round:
        phase = int(np.searchsorted(ends, k, side="right"))
        return phases[phase].make_round(k - int(ends[phase]) + phases[phase].nrounds)

    runs = tuple(length for phase in phases for length in run_lengths(phase))
    return Schedule(
        name, collective, first.nranks, first.nchunks, int(ends[-1]), make_round, first.root, runs
    )


def run_lengths(schedule: Schedule) -> tuple[int, ...]:
    """The rounds of each run, none of them 0."""
    if schedule.runs is None:
        return (1,) * schedule.nrounds
    return tuple(length for length in schedule.runs if length)


def mirrored(schedule: Schedule, collective: str) -> Schedule:
    """``schedule`` backwards: the last round first, every receiver a sender.

    Data that spread from one rank to many then comes together from many in one, so this turns a broadcast
    into a reduce, a scatter into a gather, and a reduce-scatter into an allgather. ``collective`` says what
    it has become, and with that whether its transfers copy or reduce.
    """
    reduces = COLLECTIVES[collective].reduces

    def make_round(k: int) -> Round:
        return schedule.make_round(schedule.nrounds - 1 - k).backwards(reduces)

    runs = None if schedule.runs is None else schedule.runs[::-1]
    return replace(schedule, collective=collective, make_round=make_round, runs=runs)


def chunk_start(count: Any, nchunks: Any, chunk: Any, itemsize: Any) -> Any:
    """Where a chunk begins; see `chunk_bounds`. For numbers and arrays, and compiled by the transports."""
    per_line = max(1, CACHE_LINE // itemsize)
    lines = -(-count // per_line)
    return np.minimum((chunk * lines // nchunks) * per_line, count)


def chunk_bounds(count: int, nchunks: int, itemsize: int = CACHE_LINE) -> IntArray:
    """Where each chunk of ``count`` elements begins and ends: int64 ``[nchunks + 1]``, in elements.

    Chunks are as even as whole cache lines of ``itemsize``-byte elements allow and lie one after the other;
    with few elements some are empty. The default ``itemsize`` makes every element a line of its own: the
    most even split.
    """
    bounds: IntArray = chunk_start(count, nchunks, np.arange(nchunks + 1, dtype=np.int64), itemsize)
    return bounds


def check_shape(nranks: int, root: int = 0, nchunks: int = 1) -> None:
    """Raise `ValueError` for arguments that no algorithm can work with."""
    if nranks < 1:
        raise ValueError(f"nranks: expected at least 1, got {nranks}")
    if not 0 <= root < nranks:
        raise ValueError(f"root: expected a rank from 0 to {nranks - 1}, got {root}")
    if nchunks < 1:
        raise ValueError(f"nchunks: expected at least 1, got {nchunks}")
