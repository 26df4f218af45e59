"""Hierarchical algorithms: memory within each node, messages between nodes, each doing what it is good at.

Vocabulary
----------
node      ranks that share memory. Their numbers need not follow each other, and nodes may differ in size.
team      a node's ranks are divided into as many teams as the smallest node has ranks, L, so there every team
          is one rank. Team i of a node is its i-th.
owner     the first rank of a team: it alone exchanges messages with other nodes, with the i-th owners there.
slice     what the i-th owners of all nodes exchange. So L ranks of a node drive the network at once.
stage     a collective of each node, or one of the i-th owners of all nodes for every i. It is a schedule for
          few ranks and chunks, **embedded** into one for all: its rank q plays ``ranks[q]``, its chunk c
          stands for ``chunks[c]``, which may be several or none.

Whatever schedule does the collective of N ranks can be the stage ``across`` N nodes.

Worked example: 2 nodes, the first with ranks a, b, the second with c, d, e; so L = 2, the teams are a | b and
c | d e. ``a1`` is rank a's part of slice 1, ``*`` marks a complete sum.

    allreduce             a             b             c             d             e
    starts with           a0 a1         b0 b1         c0 c1         d0 d1         e0 e1
    reduce-scatter        a0+b0  .      .  a1+b1      c0+d0+e0 .    .  c1+d1+e1   .  .
    allreduce across      0*  .         .  1*         0*  .         .  1*         .  .
    allgather             0*  1*        0*  1*        0*  1*        0*  1*        0*  1*

Reduce-scatter: slice i is the blocks of all i-th teams. Reduce-scatter on the node, reduce-scatter across,
after which an owner has the blocks of its team, and hands them out if it is not alone. Allgather: allgather
on the node, allgather across of the blocks of teams, allgather on the node of what came from others.
Broadcast: the root's node reads from the root, then each of its owners broadcasts a slice across, then the
other nodes allgather.

Where latency counts more than bytes, one slice is enough: only the first rank of a node exchanges messages.

Every sum is made in one place of each node, or in the same order, and then by one schedule: so every rank
gets the same bits.

Cost for n bytes, N nodes of p ranks, in latency α and time per byte β between nodes, α' and β' in memory, and
time per byte reduced γ, with the ring across: allreduce 2α' + 2n(p-1)/p β' + n(p-1)/p γ on the nodes, and
between them 2(N-1)α + 2(n/p)(N-1)/N β + (n/p)(N-1)/N γ. Each node sends 2n(N-1)/N bytes, the least possible,
from p ranks at once, and nobody waits for 2(pN-1) messages, as in a ring over all ranks. Reduce-scatter and
allgather are half of that; broadcast is nβ' and that of n/p bytes across.

Sources: M. Cho, U. Finkler, D. Kung, H. Hunter, "BlueConnect: Decomposing All-Reduce for Deep Learning on
Heterogeneous Network Hierarchy", MLSys (2019); H. Mikami et al., "Massively Distributed SGD:
ImageNet/ResNet-50 Training in a Flash", arXiv:1811.05233 (2018), where it is the 2D-torus all-reduce.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import numpy as np

from mpicoll.algorithms import direct
from mpicoll.schedule import (
    IntArray,
    RangeRound,
    Ranges,
    Round,
    Schedule,
    check_shape,
    chunk_bounds,
    in_sequence,
    run_lengths,
)

NAME = "hierarchical"


@dataclass(frozen=True)
class Topology:
    """``nodes[m]``: the ranks of node m, ascending. Every rank from 0 on is on one node.

    ``most``: slices, if not as many as the smallest node has ranks: with one, only the first rank of each
    node exchanges messages.
    """

    nodes: tuple[tuple[int, ...], ...]
    most: int | None = None

    def __post_init__(self) -> None:
        ranks = sorted(rank for node in self.nodes for rank in node)
        if not ranks or not all(self.nodes) or ranks != list(range(len(ranks))):
            raise ValueError(f"nodes: expected each rank from 0 on once, and no empty node; got {self.nodes}")
        if any(list(node) != sorted(node) for node in self.nodes):
            raise ValueError(f"nodes: expected the ranks of a node in ascending order; got {self.nodes}")

    @classmethod
    def of_ranks(cls, node_of_rank: Sequence[Hashable]) -> Topology:
        """From the node of each rank, whatever it is called; nodes are numbered as their first ranks are."""
        members: dict[Hashable, list[int]] = {}
        for rank, node in enumerate(node_of_rank):
            members.setdefault(node, []).append(rank)
        return cls(tuple(map(tuple, members.values())))

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> Topology:
        """From the number of ranks of each node, which are numbered node by node."""
        ends = np.cumsum([0, *sizes]).tolist()
        return cls(tuple(tuple(range(a, b)) for a, b in pairwise(ends)))

    @cached_property
    def nranks(self) -> int:
        return sum(map(len, self.nodes))

    @property
    def nnodes(self) -> int:
        return len(self.nodes)

    @cached_property
    def nslices(self) -> int:
        """The number of ranks of the smallest node, or ``most``."""
        smallest = min(map(len, self.nodes))
        return smallest if self.most is None else min(self.most, smallest)

    @cached_property
    def teams(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """``teams[m][i]``: the ranks of team i of node m; the first one is the owner of slice i."""
        return tuple(tuple(self._split(node)) for node in self.nodes)

    def _split(self, node: tuple[int, ...]) -> list[tuple[int, ...]]:
        ends = chunk_bounds(len(node), self.nslices).tolist()
        return [node[a:b] for a, b in pairwise(ends)]

    @property
    def even(self) -> bool:
        """Whether all nodes have equally many ranks."""
        return all(len(node) == len(self.nodes[0]) for node in self.nodes)

    def node_of(self, rank: int) -> int:
        """The number of the node that ``rank`` is on."""
        return next(m for m, node in enumerate(self.nodes) if rank in node)

    def owners(self, slice_: int) -> tuple[int, ...]:
        """The ranks that exchange a slice, one of each node."""
        return tuple(teams[slice_][0] for teams in self.teams)


@dataclass(frozen=True, eq=False)
class Part:
    """``schedule`` embedded: its rank q plays ``ranks[q]``, its chunk c stands for ``chunks[c]``."""

    schedule: Schedule
    ranks: Sequence[int]
    chunks: Sequence[Sequence[int]]

    def make_round(self, k: int) -> Round:
        """Round ``k`` in the numbers of the whole."""
        few, ranks = self.schedule.make_round(k), np.asarray(self.ranks, np.int64)
        compact = self._compact(few, ranks)
        if compact is not None:
            return compact
        counts = np.array([len(chunks) for chunks in self.chunks])
        taken = np.repeat(np.arange(len(few)), counts[few.chunk])
        nth = np.arange(len(taken)) - np.repeat(
            np.cumsum(counts[few.chunk]) - counts[few.chunk], counts[few.chunk]
        )
        flat = np.array([chunk for chunks in self.chunks for chunk in chunks], np.int64)
        chunk: IntArray = flat[(np.cumsum(counts) - counts)[few.chunk[taken]] + nth]
        return Round(ranks[few.src[taken]], ranks[few.dst[taken]], chunk, few.reduce[taken])

    def _compact(self, few: Round, ranks: IntArray) -> Round | None:
        """The round as ranges of chunks, if it can be: of 2,048 nodes single chunks would fill gigabytes."""
        if self._spans is None:
            return None
        first, end = self._spans
        if isinstance(few, RangeRound):
            rows = few.ranges.rows(few.ranges.count > 0)
            if rows.wraps or (first[1:] != end[:-1]).any():
                return None
        else:
            rows = Ranges(few.src, few.dst, few.chunk, np.ones_like(few.chunk), few.reduce, len(first))
        starts = first[rows.first]
        counts = end[rows.first + rows.count - 1] - starts
        nchunks = int(end.max(initial=1))
        return RangeRound(Ranges(ranks[rows.src], ranks[rows.dst], starts, counts, rows.reduce, nchunks))

    @cached_property
    def _spans(self) -> tuple[IntArray, IntArray] | None:
        """Where each chunk's range begins and ends; None unless all are ranges."""
        if not all(isinstance(chunks, range) for chunks in self.chunks):
            return None
        spans = [(chunks.start, chunks.stop) for chunks in self.chunks if isinstance(chunks, range)]
        first, end = np.array(spans, np.int64).reshape(-1, 2).T
        return first, end


Stage = Sequence[Part]  # at once, each of other ranks


def _embedded(
    collective: str, topology: Topology, nchunks: int, stages: Sequence[Stage], root: int = 0
) -> Schedule:
    """All stages, one after the other."""
    phases = [
        Schedule(
            NAME,
            collective,
            topology.nranks,
            nchunks,
            max((part.schedule.nrounds for part in stage), default=0),
            partial(_side_by_side, stage),
            root,
            _runs(stage),
        )
        for stage in stages
    ]
    return in_sequence(NAME, collective, phases)


def _side_by_side(stage: Stage, k: int) -> Round:
    return Round.union([part.make_round(k) for part in stage if k < part.schedule.nrounds])


def _runs(stage: Stage) -> tuple[int, ...] | None:
    """The runs that all parts have, if a chunk stands for equally many in every part."""
    runs = {run_lengths(part.schedule) for part in stage}
    lengths = {len(chunks) for part in stage for chunks in part.chunks}
    return runs.pop() if len(runs) == len(lengths) == 1 else None


def hierarchical_allreduce(topology: Topology, across: Schedule) -> Schedule:
    """Every rank ends with the sum of all data, the same bits; ``across`` is an allreduce of N ranks."""
    _check_across(topology, across, "allreduce")
    width = across.nchunks
    slices = [range(i * width, (i + 1) * width) for i in range(topology.nslices)]
    scatter, gather = (
        [Part(make(len(node)), node, _owned(topology, m, slices)) for m, node in enumerate(topology.nodes)]
        for make in (direct.direct_reduce_scatter, direct.direct_allgather)
    )
    stages = [scatter, _across(topology, across, slices), gather]
    return _embedded("allreduce", topology, width * topology.nslices, stages)


def hierarchical_reduce_scatter(topology: Topology, across: Schedule) -> Schedule:
    """Rank r ends with the sum of every rank's chunk r; ``across`` is a reduce-scatter of N ranks."""
    _check_across(topology, across, "reduce_scatter")
    scatter = [
        Part(direct.direct_reduce_scatter(len(node)), node, _owned(topology, m, _blocks(topology)))
        for m, node in enumerate(topology.nodes)
    ]
    hand_out = [
        Part(direct.direct_scatter(len(team)), team, [[rank] for rank in team])
        for teams in topology.teams
        for team in teams
    ]
    stages = [scatter, _across_teams(topology, across), hand_out]
    return _embedded("reduce_scatter", topology, topology.nranks, stages)


def hierarchical_allgather(topology: Topology, across: Schedule) -> Schedule:
    """Rank r starts with chunk r; every rank ends with all of them; ``across`` is an allgather of N ranks."""
    _check_across(topology, across, "allgather")
    collect = [
        Part(direct.direct_allgather(len(node)), node, [[rank] for rank in node]) for node in topology.nodes
    ]
    spread = [
        Part(direct.direct_allgather(len(node)), node, _owned(topology, m, _blocks(topology, without=m)))
        for m, node in enumerate(topology.nodes)
    ]
    stages = [collect, _across_teams(topology, across), spread]
    return _embedded("allgather", topology, topology.nranks, stages)


def hierarchical_broadcast(topology: Topology, across: Schedule, root: int = 0) -> Schedule:
    """Every rank ends with the root's data; ``across`` is a broadcast of N ranks from the root's node."""
    check_shape(topology.nranks, root)
    home = topology.node_of(root)
    _check_across(topology, across, "broadcast", home)
    width = across.nchunks
    slices = [range(i * width, (i + 1) * width) for i in range(topology.nslices)]
    node = topology.nodes[home]
    whole = range(width * topology.nslices)
    read = [Part(direct.direct_broadcast(len(node), node.index(root)), node, [whole])]
    gather = [
        Part(direct.direct_allgather(len(node)), node, _owned(topology, m, slices))
        for m, node in enumerate(topology.nodes)
        if m != home
    ]
    stages = [read, _across(topology, across, slices), gather]
    return _embedded("broadcast", topology, len(whole), stages, root)


def _owned(topology: Topology, m: int, slices: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """For each rank of node m the chunks of its slice; those that own none have none."""
    of_owner = {team[0]: chunks for team, chunks in zip(topology.teams[m], slices, strict=True)}
    return [of_owner.get(rank, range(0)) for rank in topology.nodes[m]]


def _blocks(topology: Topology, without: int | None = None) -> list[list[int]]:
    """For each slice the ranks of its teams, on all nodes or on all but one: their blocks are its chunks."""
    nodes = [teams for m, teams in enumerate(topology.teams) if m != without]
    return [[rank for teams in nodes for rank in teams[i]] for i in range(topology.nslices)]


def _across(topology: Topology, across: Schedule, slices: Sequence[Sequence[int]]) -> Stage:
    """The i-th owners do ``across`` with chunks of slice i."""
    return [
        Part(across, topology.owners(i), [range(chunk, chunk + 1) for chunk in part])
        for i, part in enumerate(slices)
    ]


def _across_teams(topology: Topology, across: Schedule) -> Stage:
    """The i-th owners do ``across`` with the blocks of the i-th teams: chunk m are those of node m."""
    return [
        Part(across, topology.owners(i), [teams[i] for teams in topology.teams])
        for i in range(topology.nslices)
    ]


def _check_across(topology: Topology, across: Schedule, collective: str, root: int = 0) -> None:
    wanted = (collective, topology.nnodes, root)
    given = (across.collective, across.nranks, across.root)
    if given != wanted:
        expected, got = (f"a schedule of {c} on {n} ranks with root {r}" for c, n, r in (wanted, given))
        raise ValueError(f"across: expected {expected}, one rank for each node; got {got}")
