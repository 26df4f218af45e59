"""The double binary tree: two trees at once, so that no rank's links are idle; broadcast, reduce, allreduce.

Vocabulary: the ``place`` of a rank is its distance from the root, ``(rank - root) % nranks``. Places 1 to p
- 1 form two binary trees, and place 0, the root, feeds both. Even chunks take tree 0, odd chunks tree 1.
The ``colour`` of an edge, 0 or 1, says in which rounds it is used, the even or the odd ones.

The idea: in one binary tree half the ranks are leaves and send nothing. Tree 1 is tree 0 mirrored (or
shifted by one place), so that whoever has children in one is a leaf in the other: everyone receives each
chunk once and sends, on average, as many. The edges can be coloured such that a rank's two parents, and its
two children, use different rounds: then every rank sends at most one chunk and receives at most one in a
round, and chunks follow each other every two rounds down each tree. Reduce is the same backwards;
allreduce is reduce, then broadcast.

Worked example, broadcast of chunks 0 to 3 from rank 0 to 3 ranks. Tree 0 is 0 -> 2 -> 1 with edges of
colour 0, tree 1 is 0 -> 1 -> 2 with edges of colour 1:

                            rank 0                 rank 1                 rank 2
    round 0  sends          0 -> 2
    round 1  sends          1 -> 1
    round 2  sends          2 -> 2                                        0 -> 1
    round 3  sends          3 -> 1                 1 -> 2
    round 4  sends                                                        2 -> 1
    round 5  sends                                 3 -> 2
             then holds     0 1 2 3                0 1 2 3                0 1 2 3

Cost for n bytes in k chunks, p ranks, L = log2 p, in latency α, time per byte β and per byte reduced γ:
broadcast at most (2⌈L⌉ - 2 + k)(α + nβ/k), near 2Lα + nβ for many chunks; reduce the same with β + γ for β;
allreduce the sum of both: the ring's bandwidth after log2 p rounds instead of p.

Source: P. Sanders, J. Speck, J. L. Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and
scan", Parallel Computing 35 (2009).
"""

import numpy as np

from mpicoll.schedule import COPY, IntArray, Round, Schedule, check_shape, in_sequence, mirrored

NCHUNKS = 8  # four in each tree: enough to keep both filled up to some 16 ranks; long data wants more


def double_tree_broadcast(nranks: int, root: int = 0, nchunks: int = NCHUNKS) -> Schedule:
    """Every rank ends with the root's data, in at most 2 ⌈log2 p⌉ - 2 + nchunks rounds."""
    check_shape(nranks, root, nchunks)
    parent = _two_trees(nranks)
    arrival = _arrivals(parent, _colours(parent))
    tree, place = np.indices(arrival.shape)[:, :, 1:].reshape(2, -1)
    src = (parent[tree, place] + root) % nranks
    dst = (place + root) % nranks
    first = arrival[tree, place]
    last = first + 2 * ((nchunks - 1 - tree) // 2)

    def make_round(k: int) -> Round:
        active = (first <= k) & (k <= last) & ((k - first) % 2 == 0)
        return Round.of(src[active], dst[active], (k - first + tree)[active], COPY)

    nrounds = int(last.max(initial=-1)) + 1
    return Schedule("double_tree", "broadcast", nranks, nchunks, nrounds, make_round, root)


def double_tree_reduce(nranks: int, root: int = 0, nchunks: int = NCHUNKS) -> Schedule:
    """The root ends with the sum of all ranks' data, in at most 2 ⌈log2 p⌉ - 2 + nchunks rounds."""
    return mirrored(double_tree_broadcast(nranks, root, nchunks), "reduce")


def double_tree_allreduce(nranks: int, nchunks: int = NCHUNKS) -> Schedule:
    """Every rank ends with the sum of all ranks' data, in at most 4 ⌈log2 p⌉ - 4 + 2 nchunks rounds."""
    broadcast = double_tree_broadcast(nranks, 0, nchunks)
    return in_sequence("double_tree", "allreduce", [mirrored(broadcast, "reduce"), broadcast])


def _two_trees(nranks: int) -> IntArray:
    """``parent[tree, place]`` for both trees over the places from 1 on; place 0 is above both."""
    last = nranks - 1
    place = np.arange(1, nranks)
    # Tree 0 in in-order numbering: odd places are leaves, a place's height is its lowest set bit.
    lowest = place & -place
    above = (place ^ lowest) | (lowest << 1)
    parent = np.where(above <= last, above, place ^ lowest)
    # Tree 1 is tree 0 with other labels, chosen so that its inner places are odd.
    label = np.append(0, place[::-1] if last % 2 == 0 else np.roll(place, -1))
    trees = np.zeros((2, nranks), np.int64)
    trees[0, 1:] = parent
    trees[1, label[1:]] = label[parent]
    return trees


def _colours(parent: IntArray) -> IntArray:
    """``colour[tree, place]`` of the edge to each place from its parent in that tree.

    An edge's colour in tree 1 is the opposite of the same place's in tree 0, so one colour per place says
    all: siblings in either tree differ, and the tops of the two trees, both fed by place 0, have the same.
    """
    nplaces = parent.shape[1]
    siblings = _siblings(parent)
    colour = [-1] * nplaces
    tops = [place for tree in parent for place in range(1, nplaces) if tree[place] == 0]
    for start in [*tops, *range(1, nplaces)]:
        # Sibling links of tree 0 and tree 1 alternate, so a walk along them can never contradict itself.
        waiting = [(start, 0)]
        while waiting:
            place, value = waiting.pop()
            if colour[place] < 0:
                colour[place] = value
                waiting += [(sibling, 1 - value) for sibling in siblings[place]]
    return np.array([colour, [1 - value for value in colour]])


def _siblings(parent: IntArray) -> list[list[int]]:
    """For each place the other children of its parents, place 0 left out: at most one in each tree."""
    siblings: list[list[int]] = [[] for _ in range(parent.shape[1])]
    for tree in parent.tolist():
        first_child: dict[int, int] = {}
        for place, above in list(enumerate(tree))[1:]:
            other = first_child.setdefault(above, place)
            if other != place:
                siblings[place].append(other)
                siblings[other].append(place)
    return siblings


def _arrivals(parent: IntArray, colour: IntArray) -> IntArray:
    """``arrival[tree, place]``: the round in which the tree's first chunk comes, -1 for place 0."""
    arrival = np.full(parent.shape, -1)
    for _ in range(parent.shape[1].bit_length()):  # at least the depth of the trees
        sent = np.take_along_axis(arrival, parent, axis=1) + 1
        arrival[:, 1:] = (sent + (sent + colour) % 2)[:, 1:]
    return arrival
