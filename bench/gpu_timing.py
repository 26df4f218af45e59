"""One row of results on GPU memory: every contender on one problem, checked, and timed in turns.

A call of ours ends when its work is ordered, so a turn is some calls, one behind the other, and the wait for
the last one's work. Its time is the slowest rank's, divided by the number of calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from .contenders import GUARD_BYTE, Action, Buffer, Contender, Memory, Placement, Unsupported, placements
from .data import Problem
from .gpu_arrays import Array, Arrays, HostArray
from .timing import no_collection

TURN = 0.02  # seconds
CALLS = 1000  # the most in a turn
BUDGET = 0.5  # seconds of all turns of a contender: who is slow gets fewer
POISON = 0xFF  # fills the result before a call: NaN, -1, or more than any sum; none is ever right

Say = Callable[[str], None]


class Checked(NamedTuple):
    """What came of one contender in one placement, on all ranks together.

    ``wrong`` and ``outside`` count elements: of the result, and of what must not change. ``seconds``, of a
    call, are None where nothing was timed.
    """

    contender: str
    in_place: bool
    wrong: int
    outside: int
    seconds: float | None


class Stock:
    """Where one problem's input and right result are on the GPU, too."""

    def __init__(self, arrays: Arrays, nbytes: int) -> None:
        self._arrays = arrays
        self._given, self._expected = arrays.empty(nbytes), arrays.empty(nbytes)

    def bring(self, problem: Problem) -> None:
        """Those of this problem from now on."""
        self.given, self.expected = (
            self._written(room, values)
            for room, values in ((self._given, problem.given), (self._expected, problem.expected))
        )

    def _written(self, room: Array, values: HostArray | None) -> Array:
        if values is None:
            return None
        part = Buffer(room, values.dtype, values.size).array
        self._arrays.write(part, values)
        return part


@dataclass
class Trial:
    """One contender in one placement."""

    contender: Contender
    placement: Placement
    action: Action
    wrong: int = 0
    outside: int = 0

    def call(self, arrays: Arrays, stock: Stock) -> None:
        """Once, on fresh data, and look at what came of it."""
        place = self.placement
        for buffer in place.buffers:
            arrays.fill(buffer.guards, GUARD_BYTE)
        if place.target is not None:
            arrays.fill(place.target, POISON)
        if place.source is not None:
            arrays.copy(place.source, stock.given)
        if not self.contender.ours:
            arrays.synchronise()  # ours are to keep to the stream's order, others need not know of it
        self.action()
        if place.target is not None:
            self.wrong = max(self.wrong, arrays.count_different(place.target, stock.expected))
        self.outside = max(self.outside, self._count_outside(arrays, stock))

    def _count_outside(self, arrays: Arrays, stock: Stock) -> int:
        """Elements that were written, of guards and of an input that is to stay."""
        guards = [arrays.read(buffer.guards) for buffer in self.placement.buffers]
        found = sum(int((guard != GUARD_BYTE).any(axis=1).sum()) for guard in guards)
        if self.placement.in_place or self.placement.source is None:
            return found
        return found + arrays.count_different(self.placement.source, stock.given)


def measure(
    comm: MPI.Intracomm,
    arrays: Arrays,
    problem: Problem,
    contenders: Sequence[Contender],
    stock: Stock,
    turns: int,
    say: Say,
) -> list[Checked]:
    """Check all contenders, in place and not; with ``turns``, time what is not in place.

    ``say`` is told who could not take part, and why. Collective.
    """
    library = MPI.Intracomm(comm)
    stock.bring(problem)
    trials = list(_prepared(library, arrays, problem, contenders, stock, turns == 0, say))
    seconds: list[float | None] = [None] * len(trials)
    if turns:
        seconds[:] = _medians(library, arrays, [trial.action for trial in trials], turns)
        for trial in trials:
            trial.call(arrays, stock)  # the first call need not go the way that later ones do
    counts = np.array([(trial.wrong, trial.outside) for trial in trials], np.int64).reshape(-1, 2)
    library.Allreduce(MPI.IN_PLACE, counts)
    return [
        Checked(trial.contender.name, trial.placement.in_place, int(wrong), int(outside), each)
        for trial, each, (wrong, outside) in zip(trials, seconds, counts, strict=True)
    ]


def _prepared(
    comm: MPI.Intracomm,
    arrays: Arrays,
    problem: Problem,
    contenders: Sequence[Contender],
    stock: Stock,
    in_place: bool,
    say: Say,
) -> Iterator[Trial]:
    """Everyone who can do ``problem``, having done it once."""
    for contender in contenders:
        for placement in _places(problem, contender.memory, in_place):
            trial, reason = _try(arrays, problem, contender, placement, stock)
            reasons = [why for why in comm.allgather(reason) if why is not None]
            if trial is not None and not reasons:
                yield trial
            elif reasons:
                how = " in place" if placement.in_place else ""
                say(f"{contender.name}: not in {problem.collective} of {problem.type}{how}: {reasons[0]}")


def _places(problem: Problem, memory: Memory, in_place: bool) -> list[Placement]:
    return [place for place in placements(problem, memory) if in_place or not place.in_place]


def _try(
    arrays: Arrays, problem: Problem, contender: Contender, placement: Placement, stock: Stock
) -> tuple[Trial | None, str | None]:
    """A trial, or why there is none. What goes wrong in our own collectives is raised."""
    try:
        trial = Trial(contender, placement, contender.bind(problem, placement))
        trial.call(arrays, stock)
    except Unsupported as error:
        return None, str(error)
    except Exception as error:
        if contender.ours:
            raise
        return None, " ".join(f"{type(error).__name__}: {error}".split())
    return trial, None


def _medians(comm: MPI.Intracomm, arrays: Arrays, actions: Sequence[Action], turns: int) -> list[float]:
    """Each action's seconds per call: the median over the turns of the slowest rank's mean in the turn."""
    found: list[list[float]] = [[] for _ in actions]
    with no_collection():
        shares = [_share(comm, arrays, action, turns) for action in actions]
        for number in range(turns):
            for action, (calls, its_turns), seconds in zip(actions, shares, found, strict=True):
                if number < its_turns:
                    seconds.append(_turn(comm, arrays, action, calls))
    return [float(np.median(np.max(comm.allgather(seconds), axis=0))) for seconds in found]


def _share(comm: MPI.Intracomm, arrays: Arrays, action: Action, turns: int) -> tuple[int, int]:
    """Calls in a turn, and turns."""
    once = comm.allreduce(_turn(comm, arrays, action, 1), MPI.MAX)
    calls = int(np.clip(TURN / once, 1, CALLS))
    return calls, int(np.clip(BUDGET / (calls * once), 1, turns))


def _turn(comm: MPI.Intracomm, arrays: Arrays, action: Action, calls: int) -> float:
    """This rank's mean seconds per call."""
    arrays.synchronise()
    comm.Barrier()
    start = time.perf_counter()
    for _ in range(calls):
        action()
    arrays.synchronise()
    return (time.perf_counter() - start) / calls
