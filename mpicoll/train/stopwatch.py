"""How long parts of a training take, on the host or on a GPU.

A call that gives work to a GPU returns before that is done, so the host's clock says nothing about it. There
events take the time: one before the work and one after it, both in the order of the stream on which it is.

    host    a = clock       work         b = clock      seconds += b - a
    GPU     record event a  work begins  record event b ... later, when b has come: seconds += time of b - a
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

from mpicoll.train.arrays import Array, array_module


class Stopwatch:
    """Adds up the time between the beginnings and the ends of some blocks, by the host's clock."""

    def __init__(self) -> None:
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time spent here, unless it ends in an exception."""
        start = perf_counter()
        yield
        self._seconds += perf_counter() - start

    @property
    def seconds(self) -> float:
        """So far."""
        return self._seconds


class GpuStopwatch(Stopwatch):
    """By the clock of the GPU, on the current stream; ``cuda`` is CuPy's module of that name."""

    def __init__(self, cuda: Any) -> None:
        super().__init__()
        self._cuda = cuda
        self._pairs: deque[tuple[Any, Any]] = deque()  # of events, that are not counted yet

    @contextmanager
    def running(self) -> Iterator[None]:
        begin, end = self._cuda.Event(), self._cuda.Event()
        begin.record()
        yield
        end.record()
        self._pairs.append((begin, end))
        while self._pairs[0][1].done and len(self._pairs) > 1:
            self._count()

    @property
    def seconds(self) -> float:
        """So far; waits for the last block to have ended."""
        while self._pairs:
            self._pairs[0][1].synchronize()
            self._count()
        return self._seconds

    def _count(self) -> None:
        self._seconds += self._cuda.get_elapsed_time(*self._pairs.popleft()) / 1000  # from milliseconds


def stopwatch(like: Array) -> Stopwatch:
    """One for work on arrays like this one."""
    xp = array_module(like)
    return Stopwatch() if xp is np else GpuStopwatch(xp.cuda)
