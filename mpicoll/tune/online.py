"""The choice of an algorithm while a program trains: the first steps try the candidates.

Each bucket of gradients is reduced by one candidate for a few steps, then by the next, and so on; all buckets
at once, so that it takes as many steps as for one. The first step of a candidate connects ranks and is not
counted. Then every rank has a median time for each bucket and candidate, and that of the slowest rank
decides: what "auto" stands for stays, unless another one takes `GAIN` less. All ranks come to the same.

    step          1          2-4          5          6-8          ...    then
    bucket 0      first of   timed        first of   timed               the best for bucket 0
    bucket 1      auto                    ring                           the best for bucket 1

The times are those of the allreduce alone, beside the backward pass, as the program goes on having it. Sums
are right in every step; the order of their terms is each algorithm's own, so bits may differ between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.kernels.tasks import Task
from mpicoll.requests import Series
from mpicoll.trace.chrome import COLLECTIVE
from mpicoll.trace.stamps import Stamps
from mpicoll.tune.search import GAIN

CANDIDATES = ("ring", "two_shot", "rabenseifner", "recursive_doubling")  # besides "auto"
AUTO = "auto"
NOT_YET = "not done yet"
WARMUP, TIMED = 1, 3  # steps
ROOM = 1000  # stamps; a bucket of many pieces has some dozens in a step


class Trials:
    """Which algorithm each of ``nbuckets`` buckets is reduced by, step after step."""

    def __init__(self, nbuckets: int, candidates: Sequence[str] = (AUTO, *CANDIDATES)) -> None:
        self._candidates = list(candidates)
        self._medians: list[list[float]] = []  # seconds, of each candidate so far and each bucket
        self._nbuckets = nbuckets
        self._steps = 0
        self._chosen: list[str] = []  # of each bucket, when all have been tried
        self._forget()

    def _forget(self) -> None:
        self._steps = 0
        self._stamps = [Stamps(ROOM) for _ in range(self._nbuckets)]

    @property
    def over(self) -> bool:
        """Whether all have been tried."""
        return len(self._medians) == len(self._candidates)

    @property
    def outcome(self) -> str:
        """The algorithm of each bucket, when all have been tried."""
        chosen = (f"bucket {b}: {name}" for b, name in enumerate(self._chosen))
        return ", ".join(chosen) if self.over else NOT_YET

    def algorithm(self, bucket: int) -> str:
        """What reduces this bucket now."""
        return self._chosen[bucket] if self.over else self._candidates[len(self._medians)]

    def timed(self, bucket: int, tasks: list[Task], series: Series) -> list[Task]:
        """The tasks of a bucket, with stamps in between while there is something to find out."""
        return tasks if self.over else self._stamps[bucket].between(tasks, series)

    def end_step(self, comm: MPI.Intracomm) -> bool:
        """A step is over; whether tasks are to be made anew, which is so on all ranks. Collective."""
        self._steps += 1
        if self.over or self._steps < WARMUP + TIMED:
            return False
        self._medians.append([self._median(stamps) for stamps in self._stamps])
        if len(self._medians) == len(self._candidates):
            seconds = np.array(self._medians)
            comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
            self._chosen = best(seconds, self._candidates)
        self._forget()
        return True

    def _median(self, stamps: Stamps) -> float:
        """Of the timed steps, the seconds of a bucket's reductions."""
        events = [end - begin for label, begin, end in stamps.events() if label.category == COLLECTIVE]
        each = len(events) // self._steps
        sums = [sum(events[step * each : (step + 1) * each]) for step in range(WARMUP, self._steps)]
        return median(sums) / 1e9


def best(seconds: npt.NDArray[np.float64], candidates: Sequence[str]) -> list[str]:
    """For each bucket, of ``[candidates, buckets]``, the one that takes least; the first unless it gains."""
    least = seconds.argmin(axis=0)
    gains = seconds.min(axis=0) <= (1 - GAIN) * seconds[0]
    return [candidates[number] if gain else candidates[0] for number, gain in zip(least, gains, strict=True)]
