"""One row of results: every contender on one problem, checked, and timed in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import numpy as np
from mpi4py import MPI

from .contenders import Action, Contender, Memory, Placement, Unsupported, placements
from .data import Problem

TURN = 0.02  # seconds that each contender gets in a turn: long beside a tick of the scheduler
CALLS = (2, 5000)  # the fewest and the most in a turn
TRIAL_CALLS = 3


@dataclass(frozen=True)
class Settings:
    """``iters``: calls in a turn, None to let `TURN` decide; ``warmup``: calls before the first turn."""

    turns: int
    iters: int | None
    warmup: int
    check: bool


@dataclass(frozen=True)
class Timed:
    """What came of one contender in one placement: seconds, and wrong elements on all ranks together."""

    contender: str
    in_place: bool
    seconds: float
    wrong: int | None  # None: not checked
    outside: int


@dataclass
class _Run:
    contender: Contender
    placement: Placement
    action: Action
    wrong: int = 0
    outside: int = 0

    def call(self, problem: Problem, check: bool) -> None:
        """Once, on fresh data."""
        self.placement.fill(problem)
        self.action()
        if check:
            self.wrong = max(self.wrong, self.placement.count_wrong(problem))
            self.outside = max(self.outside, self.placement.count_outside())


def measure(
    comm: MPI.Intracomm,
    problem: Problem,
    contenders: Sequence[Contender],
    memory: Memory,
    settings: Settings,
    say: Callable[[str], None],
) -> tuple[list[Timed], float]:
    """The contenders' times, and seconds that all ranks take at once to copy as many bytes within ``memory``.

    ``say`` is told who could not take part, and why.
    """
    library = MPI.Intracomm(comm)  # nothing between the timed calls is a contender
    runs = list(_prepared(library, problem, contenders, settings, say))
    copy = partial(np.copyto, memory.recv[: problem.size], memory.send[: problem.size])
    *seconds, copying = _take_turns(library, [*(run.action for run in runs), copy], settings)
    for run in runs:
        run.call(problem, settings.check)  # the first call need not go the way that later ones do
    counts = np.array([(run.wrong, run.outside) for run in runs], np.int64).reshape(-1, 2)
    library.Allreduce(MPI.IN_PLACE, counts)
    timed = [
        Timed(
            run.contender.name,
            run.placement.in_place,
            each,
            int(wrong) if settings.check else None,
            int(outside),
        )
        for run, each, (wrong, outside) in zip(runs, seconds, counts, strict=True)
    ]
    return timed, copying


def _prepared(
    comm: MPI.Intracomm,
    problem: Problem,
    contenders: Sequence[Contender],
    settings: Settings,
    say: Callable[[str], None],
) -> Iterator[_Run]:
    """Everyone who can do ``problem``, having done it once."""
    for contender in contenders:
        for placement in placements(problem, contender.memory):
            run, reason = _try(problem, contender, placement, settings.check)
            reasons = [why for why in comm.allgather(reason) if why is not None]
            if run is not None and not reasons:
                yield run
            elif reasons:
                how = " in place" if placement.in_place else ""
                what = " ".join([problem.collective, problem.type, problem.redop])
                say(f"{contender.name} is left out of {what}{how}: {reasons[0]}")


def _try(
    problem: Problem, contender: Contender, placement: Placement, check: bool
) -> tuple[_Run | None, str | None]:
    """A run, or why there is none. What goes wrong in our own collectives is raised."""
    try:
        run = _Run(contender, placement, contender.bind(problem, placement))
        run.call(problem, check)
    except Unsupported as error:
        return None, str(error)
    except Exception as error:
        # Libraries say by all sorts of exceptions that they do not know a dtype.
        if contender.ours:
            raise
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    return run, None


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage is collected in this block: it would be somebody's time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _take_turns(comm: MPI.Intracomm, actions: Sequence[Action], settings: Settings) -> list[float]:
    """Each action's seconds per call: the median over the turns of the slowest rank's mean in the turn."""
    for action in actions:
        for _ in range(settings.warmup):
            action()
    with no_collection():
        calls = [settings.iters or _calls_per_turn(comm, action) for action in actions]
        seconds = np.array(
            [
                [warm_turn(comm, action, count) for action, count in zip(actions, calls, strict=True)]
                for _ in range(settings.turns)
            ]
        )
    comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
    return [float(median) for median in np.median(seconds, axis=0)]


def _calls_per_turn(comm: MPI.Intracomm, action: Action) -> int:
    seconds = comm.allreduce(min(turn(comm, action, TRIAL_CALLS) for _ in range(2)), MPI.MAX)
    return int(np.clip(TURN / seconds, *CALLS))


def turn(comm: MPI.Intracomm, action: Action, calls: int) -> float:
    """This rank's mean seconds per call."""
    comm.Barrier()
    start = time.perf_counter()
    for _ in repeat(None, calls):
        action()
    return (time.perf_counter() - start) / calls


def warm_turn(comm: MPI.Intracomm, action: Action, calls: int) -> float:
    """`turn`, after a call that finds the caches as other contenders have left them."""
    action()
    return turn(comm, action, calls)
