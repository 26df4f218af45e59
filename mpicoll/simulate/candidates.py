"""Which schedules there are for a collective on a machine, and which of them is the fastest.

Besides the algorithms of all ranks there are the hierarchical ones, named ``hierarchical, ring`` and so on
after the algorithm between nodes, where ranks fill several nodes of equal or different size.

Some algorithms send p^2 messages. Their number at many ranks is estimated from that at few, and those that
have too many are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log2

from mpicoll import algorithms
from mpicoll.algorithms.hierarchical import Topology
from mpicoll.schedule import RangeRound, Schedule, run_lengths
from mpicoll.simulate.engine import Prediction, simulate_sizes
from mpicoll.simulate.machine import Machine

HIERARCHICAL = "hierarchical"
MOST_ROWS = 1 << 23  # rows of rounds that are looked at; some 2 GB and ten seconds if all are in one round
FEW, MORE = 32, 64  # ranks at which rows are counted

Make = Callable[[], Schedule]


class TooManyError(ValueError):
    """An algorithm that sends more messages, at this number of ranks, than can be simulated."""


def names(collective: str, machine: Machine, nranks: int) -> list[str]:
    """Every algorithm for ``collective``; `MachineError` if the ranks do not fit."""
    flat = list(algorithms.names(collective))
    nodes = len(machine.node_sizes(nranks))
    if collective not in algorithms.HIERARCHICAL or not 1 < nodes < nranks:
        return flat
    return [*flat, *(f"{HIERARCHICAL}, {across}" for across in flat)]


def schedule(
    collective: str, name: str, machine: Machine, nranks: int, root: int = 0, nchunks: int | None = None
) -> Schedule:
    """The schedule of one of `names`; `TooManyError` if it is too large to be simulated."""
    sizes = machine.node_sizes(nranks)
    inner = name.removeprefix(f"{HIERARCHICAL}, ")
    if inner == name:
        _check_rows(name, nranks, estimated_rows(collective, name, nranks, nchunks))
        return algorithms.schedule(collective, name, nranks, root, nchunks)
    topology = Topology.of_sizes(sizes)
    across = topology.nslices * estimated_rows(collective, inner, topology.nnodes, nchunks)
    # Of these the parts of a node's owner, one chunk for each node, are no ranges of chunks.
    within = nranks * max(sizes) * (topology.nnodes if collective in ("reduce_scatter", "allgather") else 1)
    _check_rows(name, nranks, across + within)
    return algorithms.hierarchical_schedule(collective, topology, inner, root, nchunks)


def _check_rows(name: str, nranks: int, rows: float) -> None:
    if rows > MOST_ROWS:
        raise TooManyError(
            f"algorithm: expected one with at most {MOST_ROWS:,} messages to look at, "
            f"got {name}, which has about {rows:,.0f} on {nranks:,} ranks"
        )


def estimated_rows(collective: str, algorithm: str, nranks: int, nchunks: int | None = None) -> float:
    """How many rows the rounds have of which one is made: counted at few ranks, extrapolated to many."""
    if nranks <= MORE:
        return _rows(algorithms.schedule(collective, algorithm, nranks, nchunks=nchunks))
    few, more = (_rows(algorithms.schedule(collective, algorithm, n, nchunks=nchunks)) for n in (FEW, MORE))
    return float(more * (more / few) ** log2(nranks / MORE))


def _rows(schedule: Schedule) -> int:
    rows, first = 0, 0
    for length in run_lengths(schedule):
        made = schedule.make_round(first)
        rows += len(made.ranges.src) if isinstance(made, RangeRound) else len(made)
        first += length
    return rows


def predict(
    collective: str,
    machine: Machine,
    nranks: int,
    sizes: Sequence[int],
    chosen: Sequence[str] | None = None,
    root: int = 0,
    nchunks: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, list[Prediction]], list[str]]:
    """For each algorithm (of ``chosen``) its predictions for ``sizes`` bytes; and those that were left out.

    ``nchunks`` is for those that pipeline. ``progress`` is called with how many of how many are done.
    """
    found: dict[str, list[Prediction]] = {}
    left_out: list[str] = []
    wanted = names(collective, machine, nranks) if chosen is None else chosen
    for done, name in enumerate(wanted, start=1):
        own = nchunks if pipelines(collective, name) else None
        try:
            found[name] = simulate_sizes(
                schedule(collective, name, machine, nranks, root, own), sizes, machine
            )
        except TooManyError:
            left_out.append(name)
        if progress:
            progress(done, len(wanted))
    return found, left_out


def pipelines(collective: str, name: str) -> bool:
    """Whether the number of chunks of one of `names` is the caller's choice."""
    return algorithms.pipelines(collective, name.removeprefix(f"{HIERARCHICAL}, "))
