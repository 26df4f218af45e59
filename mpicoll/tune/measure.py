"""How times are taken: of the collectives that a program would run, on all ranks of a communicator.

Each candidate is a persistent collective, so that its own segments, and nobody else's, are in it. A turn of
one is as many calls as fit into a few milliseconds; its time is that of the slowest rank. All ranks get the
same times, and so come to the same conclusions.

Before each call a rank writes its buffers, as programs do: gradients are computed anew in every step; and all
begin together. Calls that follow each other without that are another thing. A rank that only sends runs
ahead of the others. What has not changed since the last call lies in the other ranks' caches, and costs
nothing to send; what a rank writes into memory that others have read costs more, for it is taken from their
caches first. On 2 ranks an allreduce of 64 KiB in two halves took 42 µs, where its halves by themselves took
9 µs each; in memory written anew 25 and 13.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from itertools import repeat
from typing import Any

import numpy as np
from mpi4py import MPI

from mpicoll import algorithms
from mpicoll.bench.timing import no_collection
from mpicoll.calls import HIERARCHICAL
from mpicoll.communicator import Communicator
from mpicoll.transports.hierarchical import COLLECTIVES as HIERARCHICAL_COLLECTIVES
from mpicoll.transports.hierarchical import node_of, share_of_cores
from mpicoll.transports.messages import count_cores
from mpicoll.tune.search import Candidate, Case, Finding, FloatArray, examine
from mpicoll.tune.table import NO_CHOICES, Choices, Place, Rule, machine_name, mpi_build

ITEM = np.dtype(np.float32)
TURN = 1e-2  # seconds of each candidate, at most: longer than the scheduler's tick
LEAST_TURN = 5e-4
MOST_CALLS = 1000
HEATS = 12  # turns of one case, roughly, for each of its algorithms: what a turn's length is derived from
FACTOR = 4  # from one size to the next

# Collectives that have several algorithms: mpi4py's method, and whether a size counts a block for each rank.
METHODS = {
    "allreduce": ("Allreduce", False),
    "reduce_scatter": ("Reduce_scatter_block", True),
    "allgather": ("Allgather", True),
    "broadcast": ("Bcast", False),
    "reduce": ("Reduce", False),
    "alltoall": ("Alltoall", True),
    "gather": ("Gather", True),
    "scatter": ("Scatter", True),
}


def cases(collectives: Sequence[str], smallest: int, largest: int, nranks: int) -> list[Case]:
    """Every collective at sizes from ``smallest`` up to ``largest`` bytes, the small sizes of all first."""
    made: dict[Case, None] = {}
    size = smallest
    while size <= largest:
        for collective in collectives:
            blocks = nranks if METHODS[collective][1] else 1
            unit = ITEM.itemsize * blocks
            actual = max(1, size // unit) * unit
            # An alltoall is counted as what all ranks send together.
            counted = actual * (nranks if collective == "alltoall" else 1)
            made[Case(collective, actual, counted, unit)] = None
        size *= FACTOR
    return list(made)


def place_of(comm: MPI.Intracomm) -> Place:
    """What the table calls this: rank 0's view, on all ranks. Collective."""
    whole = MPI.Intracomm(comm)  # of which no part is to become a Communicator
    node = node_of(whole)
    cores = min(count_cores(node), share_of_cores(whole, node))
    own = Place(
        machine_name(),
        mpi_build(MPI.Get_library_version()),
        comm.size,
        node.Get_size(),
        node.Get_size() < comm.size,
        node.Get_size() > cores,
    )
    node.Free()
    place: Place = whole.bcast(own)
    return place


@contextmanager
def measured_communicator(comm: MPI.Intracomm, place: Place) -> Iterator[Communicator]:
    """A communicator of the same ranks whose messages are measured, without any table. Collective."""
    transport = "auto" if place.network else "messages"
    with Communicator(MPI.Intracomm(comm), transport=transport) as made:
        made.choices = NO_CHOICES
        yield made


def candidates(comm: Communicator, collective: str) -> list[str]:
    """The algorithms that there are for it on ``comm``."""
    several = comm.transport.startswith(HIERARCHICAL) and collective in HIERARCHICAL_COLLECTIVES
    return [*algorithms.names(collective), *([HIERARCHICAL] if several else [])]


class Measurer:
    """Takes the times of candidates on ``comm``; `seconds_per_turn` may be changed between cases.

    ``crowded``: whether ranks share cores.
    """

    def __init__(self, comm: Communicator, crowded: bool) -> None:
        self._comm = comm
        self._native = MPI.Intracomm(comm)  # nothing between the timed calls is measured
        # After MPI's own, ranks go on at nearly the same time; ours leaves cores to ranks that share them.
        self._barrier = comm.Barrier if crowded else self._native.Barrier
        self.seconds_per_turn = TURN

    def times(self, case: Case, candidates: Sequence[Candidate], turns: int) -> FloatArray:
        """Seconds of the slowest rank, ``[turns, candidates]``, the same on all ranks. Collective."""
        buffers = _arguments(case, self._comm)  # of all candidates: where memory lies makes a difference, too
        timed: list[_Timed] = []
        try:
            for candidate in candidates:
                timed.append(self._timed(case, candidate, buffers))
            with no_collection():
                calls = [self._calls(each) for each in timed]
                pairs = list(zip(timed, calls, strict=True))
                seconds = np.array([[each.turn(count) for each, count in pairs] for _ in range(turns)])
            self._native.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
        finally:
            for each in timed:
                each.plan.Free()
        return seconds

    def _timed(self, case: Case, candidate: Candidate, buffers: Sequence[Any]) -> _Timed:
        # What is sent last, as programs do: it may still lie in a cache.
        written = [buffer for buffer in reversed(buffers) if buffer is not None]
        return _Timed(self._barrier, self._plan(case, candidate, buffers), written)

    def _plan(self, case: Case, candidate: Candidate, buffers: Sequence[Any]) -> Any:
        """A persistent call."""
        rule = Rule(
            case.collective,
            0,
            1 << 62,
            self._comm.choose(case.collective, case.nbytes),
            candidate.algorithm,
            candidate.segment,
        )
        self._comm.choices = NO_CHOICES if candidate.segment is None else Choices((rule,))
        try:
            begin = getattr(self._comm, f"{METHODS[case.collective][0]}_init")
            return begin(*buffers, algorithm=candidate.algorithm)
        finally:
            self._comm.choices = NO_CHOICES

    def _calls(self, timed: _Timed) -> int:
        """How many fit into a turn. The first connects ranks that have never met."""
        timed.turn(1)
        begin = time.perf_counter()
        timed.turn(1)
        seconds = self._native.allreduce((time.perf_counter() - begin) / 2, MPI.MAX)  # of two calls
        return int(np.clip(self.seconds_per_turn / seconds, 1, MOST_CALLS))


@dataclass(frozen=True)
class _Timed:
    """A persistent call, and the buffers of this rank, which are ``written`` before each start."""

    barrier: Callable[[], object]
    plan: Any
    written: Sequence[Any]

    def turn(self, calls: int) -> float:
        """This rank's mean seconds per call, after one that finds the caches as others have left them."""
        self._seconds()
        return sum(self._seconds() for _ in repeat(None, calls)) / calls

    def _seconds(self) -> float:
        for buffer in self.written:
            buffer.fill(1)
        begin, end, clock = self.plan.Start, self.plan.Wait, time.perf_counter
        self.barrier()
        start = clock()
        begin()
        end()
        return clock() - start


def _arguments(case: Case, comm: MPI.Intracomm) -> tuple[Any, ...]:
    """Buffers for mpi4py's method; root 0."""
    own = case.size // ITEM.itemsize
    part = own // comm.size
    at_root = comm.rank == 0
    match case.collective:
        case "allreduce" | "alltoall":
            return _buffer(own), _buffer(own)
        case "reduce":
            return _buffer(own), _buffer(own) if at_root else None
        case "broadcast":
            return (_buffer(own),)
        case "reduce_scatter":
            return _buffer(own), _buffer(part)
        case "allgather":
            return _buffer(part), _buffer(own)
        case "gather":
            return _buffer(part), _buffer(own) if at_root else None
    return _buffer(own) if at_root else None, _buffer(part)


def _buffer(count: int) -> Any:
    return np.ones(count, ITEM)  # written to: memory that never was is one page of zeros


@dataclass(frozen=True)
class Survey:
    """What was found in the time that there was, and the cases that there was none for."""

    place: Place
    measured: str
    findings: list[Finding]
    left_out: list[Case]
    seconds: float


def survey(
    comm: MPI.Intracomm,
    chosen: Sequence[Case],
    limit: float,
    progress: Callable[[int, int, str], None],
) -> Survey:
    """Examine the cases one after the other for ``limit`` seconds, and not much longer. Collective.

    ``progress`` is called with how many of how many are done, and with what comes next.
    """
    begin = time.perf_counter()
    place = place_of(comm)
    findings: list[Finding] = []
    left_out: list[Case] = []
    with measured_communicator(comm, place) as measured:
        measurer = Measurer(measured, place.crowded)
        names = {case.collective: candidates(measured, case.collective) for case in chosen}
        for done, case in enumerate(chosen):
            rest = sum(len(names[each.collective]) for each in chosen[done:])
            left = MPI.Intracomm(comm).bcast(limit - (time.perf_counter() - begin))
            if left <= 0:
                left_out = list(chosen[done:])
                break
            progress(done, len(chosen), case.collective)
            measurer.seconds_per_turn = float(np.clip(left / rest / HEATS, LEAST_TURN, TURN))
            default = measured.choose(case.collective, case.nbytes)
            findings.append(examine(case, default, names[case.collective], measurer.times))
    seconds = time.perf_counter() - begin
    return Survey(place, date.today().isoformat(), findings, left_out, seconds)
