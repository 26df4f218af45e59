"""One clock for all ranks: how far each rank's is from rank 0's.

Rank 0 sends a message, rank r answers with the time of its own clock:

    rank 0    a ----.          .----> b         offset = t - (a + b) / 2
    rank r          '--> t ----'                uncertainty = (b - a) / 2

The answer was given at some time between a and b, so the true offset is within the uncertainty of that. Of
several round trips the shortest counts. Ranks that read the very same clock, as all on one machine do, need
none: their offset is 0. Ranks do so at the beginning and at the end; in between, a clock is taken to drift
evenly:

    offset(t) = first + (last - first) (t - t_first) / (t_last - t_first)

Source: D. Mills, RFC 5905 (the Network Time Protocol), clock offset and delay.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mpi4py import MPI

ROUNDS = 20  # round trips, at the least
GOOD = 20_000  # nanoseconds: a round trip that is worth no further attempt
ENOUGH = 200_000_000  # nanoseconds of attempts with one rank
NAP = 1e-4  # seconds between looks for rank 0's first message: waiting ranks leave it the processor

AGAIN, DONE = 1, 0  # what rank 0 says: answer, or that was all

Clock = Callable[[], int]


@dataclass(frozen=True)
class Meeting:
    """What came of round trips with rank 0, all in nanoseconds: when, by the rank's own clock, and what."""

    at: int
    offset: int
    uncertainty: int


def meet(comm: MPI.Intracomm, clock: Clock) -> Meeting:
    """This rank's meeting with rank 0, on a communicator that nothing else uses meanwhile. Collective.

    ``clock`` gives nanoseconds.
    """
    clocks = comm.allgather(_name(clock, comm.rank))
    if clocks[comm.rank] == clocks[0]:
        for rank in range(1, comm.size if comm.rank == 0 else 0):
            if clocks[rank] != clocks[0]:
                comm.Send(np.array(_ask(comm, rank, clock), np.int64), rank)
        return Meeting(clock(), 0, 0)
    return _answer(comm, clock)


def _name(clock: Clock, rank: int) -> str:
    """The same for two ranks only if they read the same clock."""
    if clock is not time.perf_counter_ns:
        return f"the clock of rank {rank}"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    namespace = Path("/proc/self/ns/time")  # containers may set a clock of their own
    return f"{boot} {namespace.readlink() if namespace.exists() else ''}"


def _ask(comm: MPI.Intracomm, rank: int, clock: Clock) -> tuple[int, int, int]:
    """The shortest round trip: when, by the other's clock, its offset, the uncertainty."""
    theirs = np.zeros(1, np.int64)
    trips: list[tuple[int, int, int]] = []
    started = clock()
    while len(trips) < ROUNDS or (min(trips)[0] > GOOD and clock() - started < ENOUGH):
        theirs[0] = AGAIN
        begin = clock()
        comm.Send(theirs, rank)
        comm.Recv(theirs, rank)
        end = clock()
        at = int(theirs[0])
        trips.append((end - begin, at, at - (begin + end) // 2))
    theirs[0] = DONE
    comm.Send(theirs, rank)
    length, at, offset = min(trips)
    return at, offset, (length + 1) // 2


def _answer(comm: MPI.Intracomm, clock: Clock) -> Meeting:
    own, found = np.zeros(1, np.int64), np.zeros(3, np.int64)
    while not comm.Iprobe(0):
        time.sleep(NAP)
    comm.Recv(own, 0)
    while own[0] == AGAIN:
        own[0] = clock()
        comm.Send(own, 0)
        comm.Recv(own, 0)
    comm.Recv(found, 0)
    return Meeting(*map(int, found))


@dataclass(frozen=True)
class Correction:
    """From a rank's clock to rank 0's; without a ``last`` meeting the offset is taken to stay."""

    first: Meeting
    last: Meeting | None = None

    def __call__(self, at: int) -> int:
        """The time of rank 0's clock when this rank's shows ``at``; both in nanoseconds."""
        return at - self.first.offset - round(self.drift * (at - self.first.at))

    @property
    def drift(self) -> float:
        """Nanoseconds that the rank's clock gains in each of its own."""
        if self.last is None or self.last.at <= self.first.at:
            return 0.0
        return (self.last.offset - self.first.offset) / (self.last.at - self.first.at)

    @property
    def uncertainty(self) -> int:
        """Of a corrected time, in nanoseconds, as far as clocks drift evenly."""
        return max(meeting.uncertainty for meeting in (self.first, self.last) if meeting is not None)
