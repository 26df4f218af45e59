"""Binomial trees: broadcast, reduce, scatter, gather; and broadcast as scatter + allgather.

Vocabulary: the ``place`` of a rank is its distance from the root, ``(rank - root) % nranks``. In a round of
a given ``distance`` every ``parent`` (a place that is a multiple of twice the distance) serves the
``child`` at its place plus the distance; the child's ``subtree`` is the ``distance`` places from its own
on.

Broadcast and scatter go from the largest distance to 1. In a broadcast the ranks that know double in each
round; in a scatter a parent hands over the chunks of the child's whole subtree, a contiguous range.
Reduce and gather are the same backwards: subtrees come together from distance 1 up.

3 ranks, root 0; the distances are 2 and 1. Broadcast of x; scatter of chunks 0, 1, 2; reduce of a, b, c:

    broadcast               rank 0                 rank 1                 rank 2
    round 0  sends          x -> 2
    round 1  sends          x -> 1
             then holds     x                      x                      x
    scatter
    round 0  sends          2 -> 2
    round 1  sends          1 -> 1
             then holds     0                      1                      2
    reduce
    round 0  sends                                 b -> 0
             then holds     a+b                    b                      c
    round 1  sends                                                        c -> 0
             then holds     (a+b)+c                .                      .

Scatter-allgather broadcast (van de Geijn): scatter one chunk to each rank, then let all the chunks travel
around the ring at once, leaving out ranks that have them from the scatter. More rounds than the tree, but
each rank sends the data less than twice, not ⌈log2 p⌉ times.

    round 0  sends          2 -> 2
    round 1  sends          1 -> 1
             then holds     0 1 2                  1                      2
    round 2  sends          0 -> 1                 1 -> 2
             then holds     0 1 2                  0 1                    1 2
    round 3  sends          2 -> 1                 0 -> 2
             then holds     0 1 2                  0 1 2                  0 1 2

Cost for n bytes (all chunks together), p ranks, L = log2 p, in latency α, time per byte β and per byte
reduced γ: broadcast ⌈L⌉(α + nβ); reduce ⌈L⌉(α + nβ + nγ); scatter and gather ⌈L⌉α + n(p-1)/p β;
scatter-allgather (⌈L⌉ + p - 1)α + 2n(p-1)/p β.

Source: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations in MPICH",
Int. J. High Perform. Comput. Appl. 19 (2005); M. Barnett, L. Shuler, R. van de Geijn et al., "Interprocessor
collective communication library (InterCom)", SHPCC 1994.
"""

import numpy as np

from mpicoll.algorithms.ring import ring_allgather
from mpicoll.schedule import COPY, IntArray, Round, Schedule, check_shape, in_sequence, mirrored


def binomial_broadcast(nranks: int, root: int = 0) -> Schedule:
    """Every rank ends with the root's data, in ⌈log2 p⌉ rounds."""
    check_shape(nranks, root)

    def make_round(k: int) -> Round:
        parent, child, _ = _edges(nranks, k)
        return Round.of((parent + root) % nranks, (child + root) % nranks, 0, COPY)

    return Schedule("binomial", "broadcast", nranks, 1, (nranks - 1).bit_length(), make_round, root)


def binomial_reduce(nranks: int, root: int = 0) -> Schedule:
    """The root ends with the sum of all ranks' data, in ⌈log2 p⌉ rounds."""
    return mirrored(binomial_broadcast(nranks, root), "reduce")


def binomial_scatter(nranks: int, root: int = 0) -> Schedule:
    """Rank r ends with the root's chunk r, in ⌈log2 p⌉ rounds."""
    check_shape(nranks, root)

    def make_round(k: int) -> Round:
        parent, child, subtree = _edges(nranks, k)
        src, dst = (parent + root) % nranks, (child + root) % nranks
        return Round.of_ranges(src, dst, dst, subtree, nranks, COPY)

    return Schedule("binomial", "scatter", nranks, nranks, (nranks - 1).bit_length(), make_round, root)


def binomial_gather(nranks: int, root: int = 0) -> Schedule:
    """The root ends with chunk r of every rank r, in ⌈log2 p⌉ rounds."""
    return mirrored(binomial_scatter(nranks, root), "gather")


def scatter_allgather_broadcast(nranks: int, root: int = 0) -> Schedule:
    """Every rank ends with the root's data, in ⌈log2 p⌉ + p - 1 rounds."""
    ring = ring_allgather(nranks)

    def make_round(k: int) -> Round:
        everything = ring.make_round(k)
        place, chunk_place = (everything.dst - root) % nranks, (everything.chunk - root) % nranks
        return everything.where((chunk_place < place) | (chunk_place >= place + _subtree(place, nranks)))

    allgather = Schedule("ring", "allgather", nranks, nranks, ring.nrounds, make_round, root)
    phases = [binomial_scatter(nranks, root), allgather]
    return in_sequence("scatter_allgather", "broadcast", phases)


def _subtree(place: IntArray, nranks: int) -> IntArray:
    """How many chunks, from its own on, a place has been given by the scatter."""
    size = np.where(place == 0, nranks, place & -place)
    return np.minimum(size, nranks - place)


def _edges(nranks: int, k: int) -> tuple[IntArray, IntArray, IntArray]:
    """The places of parents and children in round ``k``, and the size of each child's subtree."""
    distance = 1 << ((nranks - 1).bit_length() - 1 - k)
    parent = np.arange(0, nranks - distance, 2 * distance)
    child = parent + distance
    return parent, child, np.minimum(distance, nranks - child)
