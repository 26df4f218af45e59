"""Sums over shards in one order: the same bits with any number of ranks, any algorithm, any bucket size.

Vocabulary
----------
shard     one of the V vectors that are summed. Every rank holds a contiguous range of them.
node      of the fixed binary tree over the shards: the range (first, end). A leaf is one shard; every other
          node is the sum left + right of its two children, split where the left one gets the largest power of
          two of shards that leaves some for the right one.
partial   the nodes, none inside another, that a rank can compute from what has reached it; wherever it has
          both children of a node, it has added them, so that it holds the node in their place.
program   what one rank does, round by round: which nodes it sends, which it receives, what it then adds.

The fixed tree of five shards, and the partials of three ranks:

                  (0,5)
              (0,4)       4         rank 0 holds 0        partial {0}
         (0,2)     (2,4)            rank 1 holds 1, 2     partial {1, 2}
         0   1     2   3            rank 2 holds 3, 4     partial {3, 4}

The idea
--------
Floating-point addition is not associative, so the order in which an algorithm meets the parts shows in the
bits of their sum. Merging partials is: the union of two that share no shard, and then, wherever both
children of a node are there, their sum. What comes out depends neither on who merged what with whom, nor on
when, for the value of a node depends on its leaves alone:

    value(first, end) = value(first, middle) + value(middle, end)

So any `Schedule` that is right for sums of numbers, executed on partials in their place, gives every rank
the root of the fixed tree, to the last bit. The algorithm decides who sends what to whom and when; the tree
decides in which order it is added. `verify_order` proves it, by running the programs on expression trees.

Cost: the additions are those of the plain sum. A message carries a partial, which is up to 2 log2 V nodes,
where the plain algorithm sends one chunk: `OrderProof` counts them. It is one node, and the volume that of
the plain algorithm, where each rank's shards are a node and it is sent by itself ("direct", "two_shot"), or
with its sibling ("recursive_doubling" on powers of two). A rank keeps at most 2 log2 V vectors.

Source: the binary tree is that of pairwise summation (N. J. Higham, "The accuracy of floating point
summation", SIAM J. Sci. Comput. 14, 1993), whose rounding errors grow with log V only.

The first half, up to `ReproducibleSum`, needs NumPy only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from mpicoll import algorithms
from mpicoll.schedule import COPY, Round, Schedule, chunk_bounds
from mpicoll.verify import ScheduleError, Trees, verify

if TYPE_CHECKING:
    from mpi4py import MPI

BUCKET = 4 << 20  # bytes; long enough that messages run at full bandwidth, short enough for caches

Array = Any  # NumPy's or, where a docstring says so, CuPy's
Key = TypeVar("Key")
Value = TypeVar("Value")


class Node(NamedTuple):
    """The node of the fixed tree over the shards from ``first`` up to, not including, ``end``."""

    first: int
    end: int


class Piece(NamedTuple):
    """What is sent: one chunk of a node's value."""

    chunk: int
    node: Node


class FixedTree:
    """The binary tree over ``nshards`` shards that says in which order they are added."""

    def __init__(self, nshards: int) -> None:
        if nshards < 1:
            raise ValueError(f"nshards: expected at least 1, got {nshards}")
        self.root = Node(0, nshards)
        self._addition: dict[Node, tuple[Node, Node, Node]] = {}  # of either child: left, right, parent
        todo = [self.root] if nshards > 1 else []
        while todo:
            parent = todo.pop()
            middle = parent.first + (1 << ((parent.end - parent.first - 1).bit_length() - 1))
            left, right = Node(parent.first, middle), Node(middle, parent.end)
            self._addition[left] = self._addition[right] = (left, right, parent)
            todo += [child for child in (left, right) if child.end - child.first > 1]

    def merge(self, nodes: Iterable[Node]) -> tuple[list[tuple[Node, Node, Node]], list[Node]]:
        """What disjoint ``nodes`` let a rank add, and the partial, ascending, that it then holds.

        An addition is (left, right, parent); children are made before their parents.
        """
        held = set(nodes)
        additions = []
        todo = sorted(held)
        for node in todo:  # which grows: a parent may be the child that its sibling waits for
            addition = self._addition.get(node)
            if addition is not None and held.issuperset(addition[:2]):
                held.difference_update(addition[:2])
                held.add(addition[2])
                todo.append(addition[2])
                additions.append(addition)
        return additions, sorted(held)


def join(
    values: dict[Key, Value], additions: Iterable[tuple[Key, Key, Key]], add: Callable[[Value, Value], Value]
) -> None:
    """Replace left and right in ``values`` by their parent, for each of ``additions`` in turn."""
    for left, right, parent in additions:
        values[parent] = add(values.pop(left), values.pop(right))


@dataclass(frozen=True)
class Step:
    """One round of one rank: pieces sent to and received from each peer, one message each, then additions."""

    sends: dict[int, list[Piece]] = field(default_factory=dict)
    receives: dict[int, list[Piece]] = field(default_factory=dict)
    additions: list[tuple[Piece, Piece, Piece]] = field(default_factory=list)


def plan(schedule: Schedule, bounds: Sequence[int], ranks: Collection[int]) -> dict[int, list[Step]]:
    """The programs of ``ranks``: what each does in every round of the allreduce ``schedule``.

    ``bounds``, of nranks + 1 numbers, say where each rank's shards begin and end; a rank may have none. Found
    by running the schedule on the partials of all ranks, without their values. What a rank is sent by a copy
    replaces what it had, which its program then never names again. Raises `ScheduleError` if a shard is
    counted twice, or is missing on any rank at the end; what else can be wrong, `verify` finds.
    """
    if schedule.collective != "allreduce":
        raise ValueError(f"schedule: expected an allreduce, got {schedule.name} {schedule.collective}")
    tree = FixedTree(bounds[-1])
    start = [tree.merge(Node(shard, shard + 1) for shard in range(*own))[1] for own in pairwise(bounds)]
    held = {(rank, c): start[rank] for rank in range(schedule.nranks) for c in range(schedule.nchunks)}
    programs: dict[int, list[Step]] = {rank: [] for rank in ranks}
    for k, round_ in enumerate(schedule.rounds):
        steps = {rank: Step() for rank in ranks}
        for (rank, chunk), nodes in _arrivals(round_, held, steps).items():
            if any(right.first < left.end for left, right in pairwise(nodes)):
                raise _counted_twice(schedule, k, rank, chunk, nodes)
            additions, held[rank, chunk] = tree.merge(nodes)
            if rank in steps:
                pieces = ((Piece(chunk, a), Piece(chunk, b), Piece(chunk, c)) for a, b, c in additions)
                steps[rank].additions.extend(pieces)
        for rank, step in steps.items():
            programs[rank].append(step)
    for (rank, chunk), nodes in held.items():
        if nodes != [tree.root]:
            raise _incomplete(schedule, rank, chunk, tree.root, nodes)
    return programs


def _arrivals(
    round_: Round, held: dict[tuple[int, int], list[Node]], steps: dict[int, Step]
) -> dict[tuple[int, int], list[Node]]:
    """The nodes, ascending, that meet at each (rank, chunk) written to. Notes the messages in ``steps``."""
    arrivals: dict[tuple[int, int], list[Node]] = {}
    for src, dst, chunk, op in round_:
        nodes = held[src, chunk]
        pieces = [Piece(chunk, node) for node in nodes]
        if src in steps:
            steps[src].sends.setdefault(dst, []).extend(pieces)
        if dst in steps:
            steps[dst].receives.setdefault(src, []).extend(pieces)
        arrivals.setdefault((dst, chunk), [] if op == COPY else list(held[dst, chunk])).extend(nodes)
    return {place: sorted(nodes) for place, nodes in arrivals.items()}


def _counted_twice(schedule: Schedule, k: int, rank: int, chunk: int, nodes: list[Node]) -> ScheduleError:
    transfer = next(t for t in schedule.make_round(k) if (t.dst, t.chunk) == (rank, chunk))
    expected = f"partials that share no shard to meet on rank {rank}"
    return ScheduleError(schedule, "a shard is counted twice", expected, _text(nodes), k, transfer)


def _incomplete(schedule: Schedule, rank: int, chunk: int, root: Node, nodes: list[Node]) -> ScheduleError:
    problem = f"chunk {chunk} of rank {rank} lacks shards at the end"
    return ScheduleError(schedule, problem, _text([root]), _text(nodes))


def _text(nodes: list[Node]) -> str:
    return "shards " + (", ".join(f"{node.first}-{node.end - 1}" for node in nodes) or "none")


@dataclass(frozen=True)
class OrderProof:
    """All ranks add all shards by the fixed tree, whose expression is ``order``, such as ``((0+1)+2)``.

    ``volume`` is the largest number of pieces that any rank sends; ``plain``, how many chunks it would be
    if the order did not matter.
    """

    algorithm: str
    nranks: int
    nshards: int
    rounds: int
    nchunks: int
    volume: int
    plain: int
    order: str


def verify_order(schedule: Schedule, nshards: int) -> OrderProof:
    """Proof that ``schedule`` on partials gives every rank the fixed tree's bits, or `ScheduleError`.

    ``nshards`` are shared out as evenly as possible; there may be fewer than ranks.
    """
    plain = verify(schedule)
    bounds = chunk_bounds(nshards, schedule.nranks).tolist()
    programs = plan(schedule, bounds, range(schedule.nranks))
    trees = Trees(nshards)
    fixed = _fixed(trees, nshards, (nshards - 1).bit_length(), 0)
    for (rank, chunk), result in _replay(schedule, bounds, programs, trees).items():
        if result != fixed:
            problem = f"chunk {chunk} of rank {rank} is not added in the fixed order"
            raise ScheduleError(schedule, problem, trees.text(fixed), trees.text(result))
    sent = [sum(len(p) for step in steps for p in step.sends.values()) for steps in programs.values()]
    sizes = (schedule.nrounds, schedule.nchunks, max(sent), plain.volume)
    return OrderProof(schedule.name, schedule.nranks, nshards, *sizes, trees.text(fixed))


def _fixed(trees: Trees, nshards: int, level: int, index: int) -> int:
    """Node ``index`` of ``level``, over the shards from index 2^level up to (index + 1) 2^level.

    The tree's other definition, which knows nothing of merging: a node without a right child is its left one.
    """
    if level == 0:
        return index
    left = _fixed(trees, nshards, level - 1, 2 * index)
    if (2 * index + 1) << (level - 1) >= nshards:
        return left
    return trees.add(left, _fixed(trees, nshards, level - 1, 2 * index + 1))


def _replay(
    schedule: Schedule, bounds: Sequence[int], programs: dict[int, list[Step]], trees: Trees
) -> dict[tuple[int, int], int]:
    """The tree that each (rank, chunk) ends with, when all ranks run their programs on trees."""
    tree = FixedTree(bounds[-1])
    values: list[dict[Piece, int]] = []
    for own in pairwise(bounds):
        local: dict[Node, int] = {}
        for shard in range(*own):
            local[Node(shard, shard + 1)] = shard
            join(local, tree.merge(local)[0], trees.add)
        chunks = range(schedule.nchunks)
        values.append({Piece(chunk, node): value for node, value in local.items() for chunk in chunks})
    for k in range(schedule.nrounds):
        messages = {
            (src, dst): [values[src][piece] for piece in pieces]
            for src, steps in programs.items()
            for dst, pieces in steps[k].sends.items()
        }
        for dst, steps in programs.items():
            for src, pieces in steps[k].receives.items():
                values[dst].update(zip(pieces, messages[src, dst], strict=True))
            join(values[dst], steps[k].additions, trees.add)
    places = ((rank, chunk) for rank in programs for chunk in range(schedule.nchunks))
    return {(rank, chunk): values[rank][Piece(chunk, tree.root)] for rank, chunk in places}


def verify_orders(
    nshards: int,
    ranks: Sequence[int],
    algorithm: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[OrderProof]:
    """`verify_order` of every allreduce (or that named ``algorithm``) at each number of ``ranks``.

    ``progress`` is called with how many of how many proofs are done. Raises the first `ScheduleError`.
    """
    names = [name for name in algorithms.names("allreduce") if algorithm in (None, name)]
    cases = [(name, nranks) for name in names for nranks in ranks]
    proofs = []
    for done, (name, nranks) in enumerate(cases, start=1):
        proofs.append(verify_order(algorithms.schedule("allreduce", name, nranks), nshards))
        if progress:
            progress(done, len(cases))
    return proofs


class Message(NamedTuple):
    """What travels to or from ``peer`` in one round: ``data``, whose ``parts`` are views of it."""

    peer: int
    data: Array
    parts: dict[Piece, Array]


class BoundStep(NamedTuple):
    """A `Step` with the memory of its messages."""

    sends: list[Message]
    receives: list[Message]
    additions: list[tuple[Piece, Piece, Piece]]


class ReproducibleSum:
    """Sums one vector per shard over all ranks of ``comm``, the same bits however many ranks there are.

        total = ReproducibleSum(comm, shards=8)
        for shard in total.own_shards:
            total.add(shard, gradient)      # copied: the same array may be used for the next shard
        total.finish(out)                   # collective; then begin again with the first shard

    Making one is collective, with equal arguments on all ranks. ``own_shards`` is this rank's `range`,
    ``bytes_sent`` counts what it has sent so far. The first vector sets size and dtype for all others: flat
    NumPy or CuPy arrays of any size, float16, float32 or float64; CuPy's are exchanged through host memory.
    ``bucket_bytes`` of a vector are exchanged at a time. Raises ValueError for arguments that cannot be.
    """

    def __init__(
        self, comm: MPI.Intracomm, shards: int, algorithm: str = "ring", bucket_bytes: int = BUCKET
    ) -> None:
        from mpi4py import MPI

        if shards < comm.size:
            raise ValueError(f"shards: expected at least as many as ranks ({comm.size}), got {shards}")
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes: expected at least 1, got {bucket_bytes}")
        schedule = algorithms.schedule("allreduce", algorithm, comm.size)
        bounds = chunk_bounds(shards, comm.size).tolist()
        self.own_shards = range(bounds[comm.rank], bounds[comm.rank + 1])
        self.bytes_sent = 0
        self._steps = plan(schedule, bounds, [comm.rank])[comm.rank]
        self._nchunks = schedule.nchunks
        self._bucket_bytes = bucket_bytes
        self._tree = FixedTree(shards)
        self._next = self.own_shards.start
        self._kind: tuple[int, np.dtype[Any]] | None = None  # size and dtype of all vectors
        self._held: dict[Node, Array] = {}
        self._free: list[Array] = []  # vectors to use again
        self._bound: dict[int, list[BoundStep]] = {}  # by the bucket's elements: full buckets, and the last
        self._wait = MPI.Request.Wait  # one by one: of many, an error does not say what it is
        self._comm = MPI.Intracomm(comm).Dup()  # a Communicator's own Dup would make another Communicator

    def add(self, shard: int, vector: Array) -> None:
        """Add the vector of ``shard``, the next of ``own_shards``. A call of each rank by itself."""
        self._check("vector", vector)
        if shard != self._next or shard not in self.own_shards:
            due = f"shard {self._next}" if self._next in self.own_shards else "finish() next"
            raise ValueError(f"shard: expected {due} (own_shards is {self.own_shards}), got {shard}")
        copy = self._free.pop() if self._free else vector.copy()
        copy[...] = vector
        self._held[Node(shard, shard + 1)] = copy
        join(self._held, self._tree.merge(self._held)[0], self._add_into_left)
        self._next += 1

    def finish(self, out: Array) -> None:
        """Write the sum of all shards of all ranks into ``out``; collective."""
        if self._next != self.own_shards.stop:
            raise ValueError(
                f"shard: expected {self._next} before finish() (own_shards is {self.own_shards})"
            )
        self._check("out", out)
        on_host = {node: v.get() if hasattr(v, "get") else v for node, v in self._held.items()}
        total = out if isinstance(out, np.ndarray) else np.empty(out.shape, out.dtype)
        bucket = max(1, self._bucket_bytes // out.dtype.itemsize)
        for begin in range(0, out.size, bucket):
            part = slice(begin, begin + bucket)
            self._sum_bucket({node: vector[part] for node, vector in on_host.items()}, total[part])
        if total is not out:
            out.set(total)
        self._free += self._held.values()
        self._held.clear()
        self._next = self.own_shards.start

    def revoke(self) -> None:
        """Let `finish` fail on the ranks that are in it, or come to it, where MPI can do that (ULFM)."""
        self._comm.Revoke()

    def close(self) -> None:
        """Free the communicator; collective."""
        self._comm.Free()

    def _check(self, name: str, vector: Array) -> None:
        if vector.ndim != 1 or vector.dtype.kind != "f":
            raise ValueError(f"{name}: expected a flat float vector, got {vector.dtype} {vector.shape}")
        self._kind = self._kind or (vector.size, vector.dtype)
        if self._kind != (vector.size, vector.dtype):
            size, dtype = self._kind
            raise ValueError(
                f"{name}: expected {size} elements of {dtype}, got {vector.size} of {vector.dtype}"
            )

    def _add_into_left(self, left: Array, right: Array) -> Array:
        left += right
        self._free.append(right)
        return left

    def _sum_bucket(self, held: dict[Node, Array], out: Array) -> None:
        """Exchange one bucket of every held node, which are overwritten, and write the sum into ``out``."""
        bounds = chunk_bounds(out.size, self._nchunks).tolist()
        chunks = [slice(*ends) for ends in pairwise(bounds)]
        values = {Piece(c, node): held[node][chunk] for node in held for c, chunk in enumerate(chunks)}
        if out.size not in self._bound:
            self._bound[out.size] = self._bind(bounds, out.dtype)
        for step in self._bound[out.size]:
            self._exchange(step, values)
        for c, chunk in enumerate(chunks):
            out[chunk] = values[Piece(c, self._tree.root)]

    def _bind(self, bounds: list[int], dtype: np.dtype[Any]) -> list[BoundStep]:
        """The program with messages for a bucket whose chunks have these ``bounds``."""
        sizes = [end - begin for begin, end in pairwise(bounds)]

        def messages(pieces_of: dict[int, list[Piece]]) -> list[Message]:
            return [_message(peer, pieces, sizes, dtype) for peer, pieces in pieces_of.items()]

        return [BoundStep(messages(s.sends), messages(s.receives), s.additions) for s in self._steps]

    def _exchange(self, step: BoundStep, values: dict[Piece, Array]) -> None:
        # Sums are made in place. That is safe: what is sent is a copy, what arrives has memory of its own.
        requests = [self._comm.Irecv(m.data.view(np.uint8), m.peer) for m in step.receives]
        for message in step.sends:
            for piece, part in message.parts.items():
                part[...] = values[piece]
            requests.append(self._comm.Isend(message.data.view(np.uint8), message.peer))
            self.bytes_sent += message.data.nbytes
        for request in requests:
            self._wait(request)
        for message in step.receives:
            values.update(message.parts)
        join(values, step.additions, operator.iadd)


def _message(peer: int, pieces: list[Piece], sizes: list[int], dtype: np.dtype[Any]) -> Message:
    ends = np.cumsum([sizes[piece.chunk] for piece in pieces], dtype=np.int64)
    data = np.empty(int(ends[-1]) if pieces else 0, dtype)
    parts = dict(zip(pieces, np.split(data, ends), strict=False))  # the last of the split is empty
    return Message(peer, data, parts)
