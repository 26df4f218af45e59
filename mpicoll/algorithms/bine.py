"""Bine (binomial negabinary) trees: a rank serves others on both its sides, so that nobody is far.

Vocabulary: the ``place`` of a rank is its distance from the root, ``(rank - root) % nranks``; places form a
ring. An ``arc`` is a range of places that get their data from one of them, its ``holder``; at first one arc
is everyone and its holder is place 0. In each round every arc is cut in two, and the holder serves the
``child``, the holder of the other part. Some arcs are ``mirrored``: what is said of left is right for them.

The idea: a binomial tree puts the root at the end of its range and serves places p/2, p/4, ... away. Bine
trees put the holder about a third from the end, and cut on the far side of it and on the near side by
turns; the child's arc is the holder's mirror image. The root of 8 so serves 3, -1 and 1 instead of 4, 2 and
1: the distances are (1 - (-2)^j)/3, digits of numbers to the base -2, a third less, on both sides of the
root.

    places   -2 -1  0  1  2  3  4  5        root 0 holds the arc from -2 to 5
    round 0         0 ------> 3             it keeps -2 to 1; child 3 gets 2 to 5, the mirror image
    round 1     -1 <0         3> 4          0 keeps 0 and 1, child -1 gets -2 and -1; 3 keeps 2 and 3
    round 2  -2 <-1 0> 1   2 <3  4> 5

Other numbers of ranks than powers of two: an arc is cut as evenly as can be, the holder keeps the larger
part. So any p works without folding, in ⌈log2 p⌉ rounds.

Broadcast and scatter go down the tree; the chunks of a child's arc are a range. Reduce and gather are the
same backwards. A butterfly of the same distances is what ``swing`` does.

Worked example, 3 ranks, root 0: broadcast of x, scatter of chunks 0, 1, 2. The arc is 2, 0, 1; the root keeps
0 and 1, and rank 2 is the child; then rank 1 is:

    broadcast               rank 0                 rank 1                 rank 2
    round 0  sends          x -> 2
    round 1  sends          x -> 1
             then holds     x                      x                      x
    scatter
    round 0  sends          2 -> 2
    round 1  sends          1 -> 1
             then holds     0                      1                      2

Cost for n bytes (all chunks together), p ranks, L = log2 p, in latency α, time per byte β and per byte
reduced γ: as the binomial tree's, broadcast ⌈L⌉(α + nβ); reduce ⌈L⌉(α + nβ + nγ); scatter and gather
⌈L⌉α + n(p-1)/p β. What differs is how far messages go.

Source: D. De Sensi, S. Pasqualoni, L. Piarulli, T. Bonato, S. Ba, M. Turisini, J. Domke, T. Hoefler, "Bine
trees: enhancing collective operations by optimizing communication locality", SC 2025, arXiv:2508.17311, for
powers of two; cutting arcs of any size is ours.
"""

from typing import NamedTuple

import numpy as np

from mpicoll.schedule import COPY, BoolArray, IntArray, Round, Schedule, check_shape, mirrored


class Arcs(NamedTuple):
    """Arcs as columns: ``size`` places from ``first`` on (modulo the number of ranks), and who holds each."""

    first: IntArray
    size: IntArray
    holder: IntArray
    mirrored: BoolArray


def bine_broadcast(nranks: int, root: int = 0) -> Schedule:
    """Every rank ends with the root's data, in ⌈log2 p⌉ rounds."""
    check_shape(nranks, root)
    tree = _tree(nranks)

    def make_round(k: int) -> Round:
        parent, children = tree[k]
        return Round.of((parent + root) % nranks, (children.holder + root) % nranks, 0, COPY)

    return Schedule("bine", "broadcast", nranks, 1, len(tree), make_round, root)


def bine_reduce(nranks: int, root: int = 0) -> Schedule:
    """The root ends with the sum of all ranks' data, in ⌈log2 p⌉ rounds."""
    return mirrored(bine_broadcast(nranks, root), "reduce")


def bine_scatter(nranks: int, root: int = 0) -> Schedule:
    """Rank r ends with the root's chunk r, in ⌈log2 p⌉ rounds."""
    check_shape(nranks, root)
    tree = _tree(nranks)

    def make_round(k: int) -> Round:
        parent, children = tree[k]
        src, dst = (parent + root) % nranks, (children.holder + root) % nranks
        return Round.of_ranges(src, dst, (children.first + root) % nranks, children.size, nranks, COPY)

    return Schedule("bine", "scatter", nranks, nranks, len(tree), make_round, root)


def bine_gather(nranks: int, root: int = 0) -> Schedule:
    """The root ends with chunk r of every rank r, in ⌈log2 p⌉ rounds."""
    return mirrored(bine_scatter(nranks, root), "gather")


def _tree(nranks: int) -> list[tuple[IntArray, Arcs]]:
    """Of every round: the places that send, and the arcs of the children to whom they send."""
    levels = (nranks - 1).bit_length()
    size = np.array([nranks])
    arcs = Arcs(-_offset(size, levels), size, np.array([0]), np.array([False]))
    rounds = []
    for level in range(levels, 0, -1):
        kept, given = _cut(arcs, level)
        served = given.size > 0
        given = _where(given, served)
        rounds.append((kept.holder[served], given))
        arcs = _joined(kept, given)
    return rounds


def _where(arcs: Arcs, chosen: BoolArray) -> Arcs:
    return Arcs(arcs.first[chosen], arcs.size[chosen], arcs.holder[chosen], arcs.mirrored[chosen])


def _joined(a: Arcs, b: Arcs) -> Arcs:
    return Arcs(
        np.concatenate([a.first, b.first]),
        np.concatenate([a.size, b.size]),
        np.concatenate([a.holder, b.holder]),
        np.concatenate([a.mirrored, b.mirrored]),
    )


def _cut(arcs: Arcs, level: int) -> tuple[Arcs, Arcs]:
    """The parts that holders keep, and the children's, when ``level`` cuts are left, this one counted."""
    first, size, holder, mirrored = arcs
    given = size // 2
    kept = size - given
    keeps_left = mirrored ^ _keeps_left(level)
    at = _offset(given, level - 1)
    child_first = np.where(keeps_left, first + kept, first)
    child = child_first + np.where(mirrored, at, given - 1 - at)
    own = Arcs(np.where(keeps_left, first, first + given), kept, holder, mirrored)
    return own, Arcs(child_first, given, child, ~mirrored)


def _keeps_left(level: int) -> bool:
    """Whether the holder of an arc that is not mirrored keeps its left part: by turns."""
    return level % 2 == 1


def _offset(size: IntArray, level: int) -> IntArray:
    """How far from the left the holder of an arc of ``size`` is that will be cut ``level`` times."""
    offset = np.zeros_like(size)
    for cut in range(level, 0, -1):
        given = size // 2
        offset += 0 if _keeps_left(cut) else given
        size = size - given
    return offset
