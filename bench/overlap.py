"""How much of a synchronisation a backward pass hides: pretended passes, on a device and on the core.

A pass takes about as long as the synchronisation alone. Gradients become ready from the last to the first,
each after a part of the time in proportion to its size. With T the time of the synchronisation alone, B that
of the pass alone and S that of the pass and the wait behind it,

    hidden = 1 - (S - B) / T

which is 1 where the synchronisation costs nothing, and 0 where it might as well come after the pass. All
three are measured in turn: T is not the one that the pass was made for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from .contenders import Action
from .data import Array
from .gradient_contenders import Contender
from .timing import no_collection, turn

SIDE = 64  # of the matrices: small enough for some products per gradient, and for the first-level cache
TRIAL_PRODUCTS = 2000  # for which the time of one is measured
TRIALS = 5

Ready = Callable[[int], object]
Pass = Callable[[Ready], None]  # calls its argument with each gradient's number


@dataclass(frozen=True)
class Hidden:
    """Seconds of a synchronisation, of a backward pass, and of both: overlapping, and one after the other."""

    name: str
    sync: float
    alone: float
    overlapped: float
    afterwards: float

    def hidden(self, total: float) -> float:
        """The part of the synchronisation's time that does not show in ``total``."""
        return 1 - (total - self.alone) / self.sync


def measure_overlap(
    comm: MPI.Intracomm,
    overlapping: Contender,
    waiting: Contender,
    shares: Array,
    seconds: float,
    repeat: int,
) -> list[Hidden]:
    """Medians of ``repeat`` passes of each kind, of the slowest rank; collective.

    ``shares`` [gradients] add up to 1. ``waiting`` does all in `GradientSync.wait`.
    """
    passes = _passes(comm, shares, seconds)
    steps = [(overlapping, overlapping.run)]
    for backward in passes.values():
        steps.append((waiting, partial(backward, _ignore)))
        steps += [(contender, partial(_step, backward, contender)) for contender in (overlapping, waiting)]
    sync, *times = take_turns(comm, steps, repeat)
    return [Hidden(name, sync, *times[3 * i : 3 * i + 3]) for i, name in enumerate(passes)]


def take_turns(comm: MPI.Intracomm, steps: Sequence[tuple[Contender, Action]], repeat: int) -> list[float]:
    """Each step's seconds, on freshly filled gradients: the median of the slowest rank."""
    seconds = np.zeros((repeat, len(steps)))
    with no_collection():
        for row in seconds:
            for i, (contender, action) in enumerate(steps):
                contender.fill()
                row[i] = turn(comm, action, 1)
    comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
    return [float(middle) for middle in np.median(seconds, axis=0)]


def _ignore(i: int) -> None:
    pass


def _step(backward: Pass, contender: Contender) -> None:
    assert contender.sync is not None
    backward(contender.sync.ready)
    contender.sync.wait()


def _passes(comm: MPI.Intracomm, shares: Array, seconds: float) -> dict[str, Pass]:
    order = range(len(shares))[::-1]
    parts = seconds * shares[::-1]
    products = comm.allreduce(seconds / _seconds_of_a_product(comm), MPI.MIN)
    numbers = np.diff(np.rint(np.cumsum(shares[::-1]) * products), prepend=0).astype(int)
    return {
        "on a device": partial(_sleep, order, np.cumsum(parts).tolist()),
        "on the core": partial(_spin, order, parts.tolist()),
        "on the core, matrices": partial(_multiply, order, numbers.tolist()),
    }


def _sleep(order: Sequence[int], moments: Sequence[float], ready: Ready) -> None:
    """A device computes, whatever the rank does meanwhile."""
    start = time.perf_counter()
    for i, moment in zip(order, moments, strict=True):
        left = start + moment - time.perf_counter()
        if left > 0:
            time.sleep(left)
        ready(i)


def _spin(order: Sequence[int], parts: Sequence[float], ready: Ready) -> None:
    """The rank computes. Its thread's clock stands while another has the core: no work is done then."""
    for i, part in zip(order, parts, strict=True):
        start = time.thread_time()
        while time.thread_time() - start < part:
            pass
        ready(i)


def _multiply(order: Sequence[int], numbers: Sequence[int], ready: Ready) -> None:
    """The rank computes so many products of matrices for each gradient."""
    multiply = _product()
    for i, number in zip(order, numbers, strict=True):
        for _ in range(number):
            multiply()
        ready(i)


def _product() -> Callable[[], Any]:
    a, b, c = np.ones((3, SIDE, SIDE), np.float32)
    return partial(np.matmul, a, b, out=c)


def _seconds_of_a_product(comm: MPI.Intracomm) -> float:
    """While all ranks compute."""
    multiply = _product()
    return min(turn(comm, multiply, TRIAL_PRODUCTS) for _ in range(TRIALS))
