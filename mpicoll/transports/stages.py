"""The stages of a hierarchical collective, as one rank goes through them: what it does on its node and
across.

`algorithms.hierarchical` says which stages there are; here they get bounds in memory, and are **pipelined**.
The data are cut into **pieces**, each of which goes through all stages. A rank works in two **lanes**: one
with the steps on its node, in an order that all its ranks share, and one with the steps across, of which two
may be under way at once. So while piece k travels between nodes, piece k + 1 is reduced on the node, and
piece k - 1 is handed out. With three pieces of an allreduce:

    node     scatter 0   scatter 1   gather 0   scatter 2   gather 1   gather 2
    across         across 0 ---------   across 1 ---------   across 2 -----

A step says how many steps of the other lane must be complete before it begins (``after``). Between the stages
a piece lies in one of two slots of scratch memory, or where the caller wants it.

A vector is cut into pieces first, and pieces into slices. Blocks of ranks (of reduce-scatter and allgather)
stay blocks: piece (t, k) is the k-th part of the blocks of every team's t-th member. A team has one member,
unless nodes are uneven.

Everything here is a function of the topology and of sizes. Offsets and lengths are in elements; where data
are only moved, elements are bytes. There is no MPI in here: tests run all ranks' steps against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

from mpicoll.algorithms.hierarchical import Topology
from mpicoll.schedule import CACHE_LINE, Schedule, chunk_bounds
from mpicoll.transports.program import Buffer, Place

SLOTS = 2  # pieces that are under way across at once


class Blocks(NamedTuple):
    """For each rank of the node: where its block begins, and how long it is."""

    at: tuple[int, ...]
    lengths: tuple[int, ...]

    def moved(self, by: int) -> Blocks:
        """The same blocks, ``by`` elements further on; empty ones stay."""
        return Blocks(
            tuple(a + by if n else 0 for a, n in zip(self.at, self.lengths, strict=True)), self.lengths
        )


class Range(NamedTuple):
    """``length`` elements from ``at`` on."""

    at: int = 0
    length: int = 0


@dataclass(frozen=True)
class NodeStep:
    """A collective of the node's ranks.

    Blocks ``sent`` begin at places relative to ``source``, those ``received`` relative to ``target``.
    ``root`` is one of the node's ranks.
    """

    collective: str
    sent: Blocks
    received: Blocks
    source: Place
    target: Place
    root: int = 0
    after: int = 0


@dataclass(frozen=True)
class AcrossStep:
    """``schedule`` among the owners of a slice: chunk c has ``counts[c]`` elements.

    They lie at ``input_at[c]`` from ``source`` on, if the owner has them as inputs, and come to
    ``output_at[c]`` from ``target`` on, if they are its outputs. ``rank``: which of the owners this is.
    """

    schedule: Schedule
    rank: int
    counts: tuple[int, ...]
    input_at: tuple[int, ...]
    output_at: tuple[int, ...]
    source: Place
    target: Place
    after: int = 0


@dataclass(frozen=True)
class Steps:
    """Both lanes of one rank, and how many elements of scratch memory they need."""

    node: tuple[NodeStep, ...]
    across: tuple[AcrossStep, ...]
    scratch: int = 0


@dataclass
class _Piece:
    """What one piece goes through. ``ready``: what travels across is there from the beginning."""

    before: list[NodeStep] = field(default_factory=list)
    across: AcrossStep | None = None
    behind: list[NodeStep] = field(default_factory=list)
    ready: bool = False


def _pipelined(pieces: Sequence[_Piece], scratch: int = 0) -> Steps:
    """Piece k + 1 begins on the node before piece k ends there."""
    node: list[NodeStep] = []
    across: list[AcrossStep] = []
    complete = [0]  # steps across up to and with each piece

    def end(piece: _Piece, k: int) -> None:
        node.extend(replace(step, after=complete[k + 1]) for step in piece.behind)

    for k, piece in enumerate(pieces):
        # Its slot is that of the piece before the last, which must have left.
        node += [replace(step, after=complete[max(0, k + 1 - SLOTS)]) for step in piece.before]
        if piece.across is not None:
            across.append(replace(piece.across, after=0 if piece.ready else len(node)))
        complete.append(len(across))
        if k:
            end(pieces[k - 1], k - 1)
    if pieces:
        end(pieces[-1], len(pieces) - 1)
    return Steps(tuple(node), tuple(across), scratch)


class View:
    """A topology as ``rank`` sees it."""

    def __init__(self, topology: Topology, rank: int) -> None:
        self.topology, self.rank = topology, rank
        self.home = topology.node_of(rank)  # the number of its node
        self.node = topology.nodes[self.home]  # the ranks there
        owned = [i for i, team in enumerate(topology.teams[self.home]) if team[0] == rank]
        self.slice = owned[0] if owned else None  # the one that it owns

    def nothing(self) -> Blocks:
        """Empty blocks for all ranks of the node."""
        return Blocks((0,) * len(self.node), (0,) * len(self.node))

    def of_owners(self, ranges: Sequence[Range]) -> Blocks:
        """Blocks for the node's owners, slice by slice; the others have none."""
        owner = {team[0]: i for i, team in enumerate(self.topology.teams[self.home])}
        found = [ranges[owner[rank]] if rank in owner else Range() for rank in self.node]
        return Blocks(tuple(r.at for r in found), tuple(r.length for r in found))

    def own(self, at: int, length: int) -> Blocks:
        """One block of this rank, for all ranks of the node."""
        return Blocks((at,) * len(self.node), (length,) * len(self.node))

    def members(self, m: int, t: int) -> list[int | None]:
        """The t-th member of each team of node m; None where the team has fewer."""
        return [team[t] if t < len(team) else None for team in self.topology.teams[m]]


def allreduce_steps(view: View, across: Schedule, count: int, piece: int, itemsize: int) -> Steps:
    """`hierarchical_allreduce` of ``count`` elements, in pieces of ``piece``."""
    if view.topology.nslices == 1:
        return _allreduce_in_one_slice(view, across, count, piece, itemsize)
    slot = _whole_lines(-(-min(piece, count) // view.topology.nslices), itemsize) + CACHE_LINE
    pieces = []
    for k, (begin, length) in enumerate(_cut(count, piece)):
        slices = _slices(view, length, itemsize)
        blocks = view.of_owners(slices)
        part = Place(Buffer.SCRATCH, k % SLOTS * slot)
        mine = slices[view.slice].length if view.slice is not None else 0
        received = Blocks(view.nothing().at, blocks.lengths)
        scatter = NodeStep("reduce_scatter", blocks, received, Place(Buffer.INPUT, begin), part)
        gather = NodeStep("allgather", view.own(0, mine), blocks, part, Place(Buffer.OUTPUT, begin))
        pieces.append(_Piece([scatter], _in_place(view, across, Range(0, mine), part, itemsize), [gather]))
    return _pipelined(pieces, SLOTS * slot)


def _allreduce_in_one_slice(view: View, across: Schedule, count: int, piece: int, itemsize: int) -> Steps:
    """Reduce-scatter to one owner is reduce, allgather from one is broadcast: both need less waiting."""
    pieces = []
    for begin, length in _cut(count, piece):
        whole, into = view.own(0, length), Place(Buffer.OUTPUT, begin)
        reduce = NodeStep("reduce", whole, whole, Place(Buffer.INPUT, begin), into)
        hand_out = NodeStep("broadcast", whole, whole, into, into)
        travels = _in_place(view, across, Range(0, length), into, itemsize)
        pieces.append(_Piece([reduce], travels, [hand_out]))
    return _pipelined(pieces)


def broadcast_steps(view: View, across: Schedule, count: int, piece: int, root: int) -> Steps:
    """`hierarchical_broadcast` of ``count`` bytes, which lie in OUTPUT on the root, too."""
    at_home = root in view.node
    pieces = []
    for begin, length in _cut(count, piece):
        slices, into = _slices(view, length, 1), Place(Buffer.OUTPUT, begin)
        whole, blocks = view.own(0, length), view.of_owners(slices)
        mine = slices[view.slice] if view.slice is not None else Range()
        travels = _in_place(view, across, mine, into, 1)
        if at_home:
            read = NodeStep("broadcast", whole, whole, into, into, view.node.index(root))
            pieces.append(_Piece([read], travels, ready=view.rank == root))
        else:
            gather = NodeStep("allgather", view.own(*mine), blocks, into, into)
            pieces.append(_Piece([], travels, [gather]))
    return _pipelined(pieces)


def reduce_scatter_steps(
    view: View, across: Schedule, counts: Sequence[int], piece: int, itemsize: int
) -> Steps:
    """`hierarchical_reduce_scatter`: ``counts[r]`` elements for rank r, of which ``piece`` go at once."""
    nnodes, home = view.topology.nnodes, view.home
    width = _whole_lines(min(piece, max(counts)), itemsize)
    slot = (nnodes + 1) * width
    pieces = []
    for number, (t, parts, start) in enumerate(_parts(view, _block_ranges(counts), piece)):
        at = number % SLOTS * slot
        done = _Piece()
        for m, ranges in enumerate(parts):
            if not any(r.length for r in ranges):
                continue
            base, blocks = _rebased(view.of_owners(ranges))
            received = Blocks(view.nothing().at, blocks.lengths)
            source, into = Place(Buffer.INPUT, base), Place(Buffer.SCRATCH, at + m * width)
            done.before.append(NodeStep("reduce_scatter", blocks, received, source, into))
        # The first member of a team is its owner; to others it hands out what it has.
        owned = Place(Buffer.OUTPUT, start) if t == 0 else Place(Buffer.SCRATCH, at + nnodes * width)
        if view.slice is not None:
            lengths = tuple(ranges[view.slice].length for ranges in parts)
            places = tuple(m * width for m in range(nnodes))
            nowhere = (0,) * nnodes
            source = Place(Buffer.SCRATCH, at)
            done.across = _unless_empty(AcrossStep(across, home, lengths, places, nowhere, source, owned))
        if t > 0 and any(r.length for r in parts[home]):
            done.behind.append(_handed_out(view, t, parts[home], owned, Place(Buffer.OUTPUT, start)))
        pieces.append(done)
    return _pipelined(pieces, SLOTS * slot)


def _handed_out(view: View, t: int, ranges: Sequence[Range], source: Place, target: Place) -> NodeStep:
    """Owners send the t-th members of their teams what is theirs."""
    sent, received = [0] * len(view.node), [0] * len(view.node)
    for i, member in enumerate(view.members(view.home, t)):
        owner = view.topology.teams[view.home][i][0]
        if member is not None and view.rank == owner:
            sent[view.node.index(member)] = ranges[i].length
        if member == view.rank:
            received[view.node.index(owner)] = ranges[i].length
    nowhere = view.nothing().at
    return NodeStep(
        "alltoall", Blocks(nowhere, tuple(sent)), Blocks(nowhere, tuple(received)), source, target
    )


def allgather_steps(view: View, across: Schedule, blocks: Sequence[Range], piece: int) -> Steps:
    """`hierarchical_allgather`: rank r's bytes come to ``blocks[r]``, ``piece`` of each at once."""
    home = view.home
    pieces = []
    for t, parts, start in _parts(view, blocks, piece):
        done = _Piece()
        mine = view.rank in view.members(home, t)
        own = min(piece, max(0, blocks[view.rank].length - start)) if mine else 0
        if any(r.length for r in parts[home]):
            base, received = _rebased(_of_members(view, t, parts[home]))
            source = Place(Buffer.INPUT, start if own else 0)
            into = Place(Buffer.OUTPUT, base)
            done.before.append(NodeStep("allgather", view.own(0, own), received, source, into))
        if view.slice is not None:
            lengths = tuple(ranges[view.slice].length for ranges in parts)
            places = tuple(ranges[view.slice].at for ranges in parts)
            whole = Place(Buffer.OUTPUT, 0)
            done.across = _unless_empty(AcrossStep(across, home, lengths, places, places, whole, whole))
        for m, ranges in enumerate(parts):
            if m == home or not any(r.length for r in ranges):
                continue
            base, received = _rebased(view.of_owners(ranges))
            theirs = ranges[view.slice] if view.slice is not None else Range()
            source = Place(Buffer.OUTPUT, theirs.at if theirs.length else 0)
            step = NodeStep(
                "allgather", view.own(0, theirs.length), received, source, Place(Buffer.OUTPUT, base)
            )
            done.behind.append(step)
        pieces.append(done)
    return _pipelined(pieces)


# -- bounds


def _cut(count: int, piece: int) -> Iterator[tuple[int, int]]:
    """Where each piece begins, and its length. All but the last are equally long, so they share a plan."""
    return ((begin, min(piece, count - begin)) for begin in range(0, count, piece))


def _slices(view: View, length: int, itemsize: int) -> list[Range]:
    ends = chunk_bounds(length, view.topology.nslices, itemsize).tolist()
    return [Range(a, b - a) for a, b in pairwise(ends)]


def _block_ranges(counts: Sequence[int]) -> list[Range]:
    """Blocks of these lengths, one after the other."""
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + count)
    return [Range(at, count) for at, count in zip(ends, counts, strict=False)]


def _parts(view: View, blocks: Sequence[Range], piece: int) -> Iterator[tuple[int, list[list[Range]], int]]:
    """Every piece (t, k): t, for each node and slice what it has of it, and where in the blocks it begins."""
    nodes = range(view.topology.nnodes)
    for t in range(max(len(team) for teams in view.topology.teams for team in teams)):
        members = [view.members(m, t) for m in nodes]
        whole = [[blocks[rank] if rank is not None else Range() for rank in ranks] for ranks in members]
        longest = max(r.length for ranges in whole for r in ranges)
        for start in range(0, longest, piece):
            yield t, [[_part(r, start, piece) for r in ranges] for ranges in whole], start


def _part(whole: Range, start: int, piece: int) -> Range:
    length = min(piece, whole.length - start)
    return Range(whole.at + start, length) if length > 0 else Range()


def _of_members(view: View, t: int, ranges: Sequence[Range]) -> Blocks:
    """Blocks for the t-th members of this node's teams."""
    found = dict(zip(view.members(view.home, t), ranges, strict=True))
    of_ranks = [found.get(rank, Range()) for rank in view.node]
    return Blocks(tuple(r.at for r in of_ranks), tuple(r.length for r in of_ranks))


def _rebased(blocks: Blocks) -> tuple[int, Blocks]:
    """Where the first block begins, and the blocks from there on: so pieces that look alike share a plan."""
    base = min(at for at, length in zip(*blocks, strict=True) if length)
    return base, blocks.moved(-base)


def _in_place(view: View, across: Schedule, part: Range, base: Place, itemsize: int) -> AcrossStep | None:
    """``part``, from ``base`` on, is an owner's slice, before and after."""
    if view.slice is None or not part.length:
        return None
    ends = chunk_bounds(part.length, across.nchunks, itemsize).tolist()
    counts = tuple(b - a for a, b in pairwise(ends))
    at = tuple(ends[:-1])
    place = Place(base.buffer, base.at + part.at)
    return AcrossStep(across, view.home, counts, at, at, place, place)


def _unless_empty(step: AcrossStep) -> AcrossStep | None:
    return step if any(step.counts) else None


def _whole_lines(count: int, itemsize: int) -> int:
    """``count`` elements or a little more: whole cache lines."""
    per_line = max(1, CACHE_LINE // itemsize)
    return -(-count // per_line) * per_line


STEPS: dict[str, Callable[..., Steps]] = {
    "allreduce": allreduce_steps,
    "reduce_scatter": reduce_scatter_steps,
    "broadcast": broadcast_steps,
    "allgather": allgather_steps,
}
