"""Preemption: a training that is told to end keeps its state first, and goes on later.

A batch system that wants a job's nodes back sends a signal, and ends the job some time after it. Some ranks
may have been told and others not yet, so all agree to stop after the same step:

    a signal comes              the rank notes it, and goes on
    every quarter of a second   max of all ranks' notes, in one allreduce of two numbers: if it is 1, all stop

Which steps those are follows from the slowest rank's time, which is the allreduce's other number, so that all
ranks come to the same ones:

    steps to the next = min(2, PERIOD / seconds) times the steps from the last, at least 1

Gradients have no part in this, so deterministic training keeps its bits. In ps-async, where ranks are not in
step, each rank that is told stops by itself, and waits for the others at the end. A rank that only serves
does not listen.

Signals are for the ranks. Open MPI's mpirun hands SIGUSR1 on to them; when it gets SIGTERM itself, it ends
them a quarter of a second later.

Source of the status: sysexits.h of BSD, whose EX_TEMPFAIL asks to try again later.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from time import perf_counter
from types import FrameType, TracebackType
from typing import Any

from mpi4py import MPI

PREEMPTED = 75  # exit status, EX_TEMPFAIL: no success and no error, so that a script can start it again
SIGNALS = signal.SIGTERM, signal.SIGUSR1  # what batch systems send anyway, and what they are asked for
PERIOD = 0.25  # seconds between two agreements, about: far less than any grace that is given
SAME = 1.0  # seconds in which signals count as one, which a launcher and a batch system both have passed on


class PreemptedError(Exception):
    """The training was told to end, and has; says what was kept. On all ranks of ``comm``."""

    def __init__(self, message: str, comm: MPI.Intracomm) -> None:
        super().__init__(message)
        self.comm = comm


class Notice:
    """Whether this process has been told to end, by one of `SIGNALS`, while the block lasts.

    A second signal ends it at once. For the main thread.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def is_given(self) -> bool:
        """Whether a signal has come."""
        return self._first is not None

    def __enter__(self) -> Notice:
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first = perf_counter()
        elif perf_counter() - self._first > SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Rhythm:
    """After which steps all ranks talk to each other; see the module. The same on all of them."""

    def __init__(self, step: int) -> None:
        self._last, self.next = step, step + 1
        self._began = perf_counter()

    def seconds(self) -> float:
        """Since the last time."""
        return perf_counter() - self._began

    def go_on(self, seconds: float) -> None:
        """They have talked after step ``next``, ``seconds`` after the last time on the slowest rank."""
        steps = self.next - self._last
        fitting = int(steps * PERIOD / max(seconds, 1e-9))  # clocks may stand still
        self._last, self.next = self.next, self.next + max(1, min(2 * steps, fitting))
        self._began = perf_counter()


def agreed(
    rhythm: Rhythm, step: int, own: Callable[[], bool], slowest: Callable[[list[float]], list[float]]
) -> bool:
    """Whether any rank is to stop, if this is a step after which they ask; ``slowest`` gives maxima."""
    if step < rhythm.next:
        return False
    told, seconds = slowest([float(own()), rhythm.seconds()])
    rhythm.go_on(seconds)
    return told > 0
