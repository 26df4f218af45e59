"""A second opinion on schedules: plain numbers instead of trees, written without looking at ``verify``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mpicoll import algorithms
from mpicoll.schedule import COPY, Schedule

Array = npt.NDArray[Any]
State = list[dict[int, Array]]
Contribution = Callable[[int, int], Array]

CASES = [(collective, name) for collective in algorithms.ALGORITHMS for name in algorithms.names(collective)]
# Algorithms that pay on many ranks only; their programs consist of the same operations as all others.
AT_SCALE = {"bidirectional_ring", "torus", "two_level", "swing", "swing_latency", "bine", "pat"}
SUMS = {"allreduce", "reduce_scatter", "reduce"}
ROOTED = {"broadcast", "reduce", "gather", "scatter"}
BITS = 3  # of a sum for each rank: it shows how often each of up to 17 ranks was counted


def roots(collective: str, nranks: int) -> range:
    return range(nranks if collective in ROOTED else 1)


def contribution(rank: int, chunk: int) -> Array:
    """Differs per rank, chunk and index, and sums exactly."""
    offset = (1 << BITS * rank) + 3 * chunk
    return np.arange(offset, offset + 3)


def owners(collective: str, chunk: int, nranks: int, root: int) -> list[int]:
    """The ranks that hold ``chunk`` at the start."""
    everyone = list(range(nranks))
    return {
        "broadcast": [root],
        "scatter": [root],
        "allgather": [chunk],
        "gather": [chunk],
        "alltoall": [chunk // nranks],
    }.get(collective, everyone)


def receivers(collective: str, chunk: int, nranks: int, root: int) -> list[int]:
    """The ranks that must hold ``chunk``, complete, at the end."""
    everyone = list(range(nranks))
    return {
        "reduce": [root],
        "gather": [root],
        "scatter": [chunk],
        "reduce_scatter": [chunk],
        "alltoall": [chunk % nranks],
    }.get(collective, everyone)


def start(schedule: Schedule, contribute: Contribution = contribution) -> State:
    """What every rank holds before the first round."""
    state: State = [{} for _ in range(schedule.nranks)]
    for chunk in range(schedule.nchunks):
        for rank in owners(schedule.collective, chunk, schedule.nranks, schedule.root):
            state[rank][chunk] = contribute(rank, chunk)
    return state


def execute(schedule: Schedule, contribute: Contribution = contribution) -> State:
    """What every rank holds after the last round; `KeyError` if it sends what it does not have."""
    state = start(schedule, contribute)
    combine = np.bitwise_or if schedule.collective == "barrier" else np.add
    for transfers in schedule.rounds:
        before = [dict(held) for held in state]
        operands: dict[tuple[int, int], dict[int, Array]] = {}
        for src, dst, chunk, op in transfers:
            if op == COPY:
                state[dst][chunk] = before[src][chunk]
            else:
                operands.setdefault((dst, chunk), {dst: before[dst][chunk]})[src] = before[src][chunk]
        for (dst, chunk), values in operands.items():
            total, *others = (values[rank] for rank in sorted(values))
            for other in others:
                total = combine(total, other)
            state[dst][chunk] = total
    return state


def expected(schedule: Schedule, chunk: int) -> Array:
    """The value of ``chunk`` wherever it is an output."""
    ranks = owners(schedule.collective, chunk, schedule.nranks, schedule.root)
    parts = [contribution(rank, chunk) for rank in ranks]
    if schedule.collective == "barrier":
        return np.asarray(np.bitwise_or.reduce(parts))
    return np.asarray(np.sum(parts, axis=0))


def wrong_outputs(schedule: Schedule) -> list[str]:
    """What numbers find wrong with the schedule: nothing, or a line for each wrong output."""
    try:
        state = execute(schedule)
    except KeyError as error:
        return [f"chunk {error} is sent or reduced into where it is not"]
    return [
        f"rank {rank} chunk {chunk}: expected {expected(schedule, chunk)}, got {state[rank].get(chunk)}"
        for chunk in range(schedule.nchunks)
        for rank in receivers(schedule.collective, chunk, schedule.nranks, schedule.root)
        if not np.array_equal(state[rank].get(chunk, np.empty(0)), expected(schedule, chunk))
    ]
