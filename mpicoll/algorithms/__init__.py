"""Every algorithm by collective and name. Each is a pure function that returns a `Schedule`.

Adding one is adding its function here: it is then verified, tested and offered everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from mpicoll.algorithms import (
    alltoall,
    bidirectional_ring,
    bine,
    chain,
    direct,
    double_tree,
    doubling,
    halving,
    hierarchical,
    pat,
    ring,
    swing,
    torus,
    tree,
)
from mpicoll.algorithms.hierarchical import Topology
from mpicoll.schedule import Schedule, check_shape

ALGORITHMS: dict[str, dict[str, Callable[..., Schedule]]] = {
    "allreduce": {
        "ring": ring.ring_allreduce,
        "recursive_doubling": doubling.recursive_doubling_allreduce,
        "rabenseifner": halving.rabenseifner_allreduce,
        "double_tree": double_tree.double_tree_allreduce,
        "direct": direct.direct_allreduce,
        "two_shot": direct.two_shot_allreduce,
        "bidirectional_ring": bidirectional_ring.bidirectional_ring_allreduce,
        "torus": torus.torus_allreduce,
        "two_level": torus.two_level_allreduce,
        "swing": swing.swing_allreduce,
        "swing_latency": swing.swing_latency_allreduce,
    },
    "reduce_scatter": {
        "ring": ring.ring_reduce_scatter,
        "recursive_halving": halving.recursive_halving_reduce_scatter,
        "direct": direct.direct_reduce_scatter,
        "bidirectional_ring": bidirectional_ring.bidirectional_ring_reduce_scatter,
        "torus": torus.torus_reduce_scatter,
        "swing": swing.swing_reduce_scatter,
        "pat": pat.pat_reduce_scatter,
    },
    "allgather": {
        "ring": ring.ring_allgather,
        "bruck": doubling.bruck_allgather,
        "direct": direct.direct_allgather,
        "bidirectional_ring": bidirectional_ring.bidirectional_ring_allgather,
        "torus": torus.torus_allgather,
        "swing": swing.swing_allgather,
        "pat": pat.pat_allgather,
    },
    "broadcast": {
        "binomial": tree.binomial_broadcast,
        "scatter_allgather": tree.scatter_allgather_broadcast,
        "chain": chain.chain_broadcast,
        "double_tree": double_tree.double_tree_broadcast,
        "direct": direct.direct_broadcast,
        "bine": bine.bine_broadcast,
    },
    "reduce": {
        "binomial": tree.binomial_reduce,
        "chain": chain.chain_reduce,
        "double_tree": double_tree.double_tree_reduce,
        "direct": direct.direct_reduce,
        "bine": bine.bine_reduce,
    },
    "gather": {
        "binomial": tree.binomial_gather,
        "direct": direct.direct_gather,
        "bine": bine.bine_gather,
    },
    "scatter": {
        "binomial": tree.binomial_scatter,
        "direct": direct.direct_scatter,
        "bine": bine.bine_scatter,
    },
    "alltoall": {"pairwise": alltoall.pairwise_alltoall, "bruck": alltoall.bruck_alltoall},
    "barrier": {"dissemination": doubling.dissemination_barrier},
}

# Of several nodes: what makes a schedule for all from one between the nodes.
HIERARCHICAL: dict[str, Callable[..., Schedule]] = {
    "allreduce": hierarchical.hierarchical_allreduce,
    "reduce_scatter": hierarchical.hierarchical_reduce_scatter,
    "allgather": hierarchical.hierarchical_allgather,
    "broadcast": hierarchical.hierarchical_broadcast,
}


def names(collective: str) -> tuple[str, ...]:
    """The algorithms that do ``collective``; `ValueError` if there is no such collective."""
    if collective not in ALGORITHMS:
        raise ValueError(f"collective: expected one of {', '.join(ALGORITHMS)}; got {collective!r}")
    return tuple(ALGORITHMS[collective])


def function(collective: str, algorithm: str) -> Callable[..., Schedule]:
    """The function that makes the schedule; `ValueError` names what is allowed."""
    if algorithm not in names(collective):
        allowed = ", ".join(names(collective))
        raise ValueError(f"algorithm: expected one of {allowed} for {collective}; got {algorithm!r}")
    return ALGORITHMS[collective][algorithm]


def schedule(
    collective: str, algorithm: str, nranks: int, root: int = 0, nchunks: int | None = None
) -> Schedule:
    """The schedule of ``algorithm`` for ``nranks`` ranks.

    ``root`` matters to collectives that have one. ``nchunks`` matters to algorithms that pipeline (see
    `pipelines`) and defaults to the algorithm's own; all others know how many chunks they need.
    """
    make = function(collective, algorithm)
    given = {"root": root, "nchunks": nchunks}
    taken = inspect.signature(make).parameters
    return make(nranks, **{name: n for name, n in given.items() if name in taken and n is not None})


def hierarchical_schedule(
    collective: str, topology: Topology, across: str, root: int = 0, nchunks: int | None = None
) -> Schedule:
    """The hierarchical schedule of a topology's ranks, ``across`` being the algorithm between its nodes.

    ``root`` is one of all ranks. ``nchunks``: as for `schedule`, of each slice.
    """
    if collective not in HIERARCHICAL:
        raise ValueError(f"collective: expected one of {', '.join(HIERARCHICAL)}; got {collective!r}")
    if collective != "broadcast":
        small = schedule(collective, across, topology.nnodes, nchunks=nchunks)
        return HIERARCHICAL[collective](topology, small)
    check_shape(topology.nranks, root)
    small = schedule(collective, across, topology.nnodes, topology.node_of(root), nchunks)
    return HIERARCHICAL[collective](topology, small, root)


def pipelines(collective: str, algorithm: str) -> bool:
    """Whether the number of chunks is the caller's choice."""
    return "nchunks" in inspect.signature(function(collective, algorithm)).parameters
