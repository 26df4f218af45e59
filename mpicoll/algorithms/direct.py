"""Direct algorithms: every rank reads what it needs straight from its owners, in one round.

Vocabulary: an ``owner`` of a chunk holds it at the start. A rank that needs a sum reads the parts of all
the owners at once and folds them, with its own, in ascending rank order (see ``schedule``): so every rank
gets the same bits, those of a plain loop over the ranks.

Worked example, 3 ranks: allreduce of the parts a, b, c, and reduce-scatter of their chunks 0, 1, 2.

    allreduce               rank 0                 rank 1                 rank 2
    round 0  sends          a -> 1, 2              b -> 0, 2              c -> 0, 1
             then holds     (a+b)+c                (a+b)+c                (a+b)+c
    reduce-scatter
    round 0  sends          a1 -> 1, a2 -> 2       b0 -> 0, b2 -> 2       c0 -> 0, c1 -> 1
             then holds     (a0+b0)+c0             (a1+b1)+c1             (a2+b2)+c2

"Two shot" allreduce is this reduce-scatter and then the direct allgather: the volume of the ring, in two
rounds. The allreduce above, "one shot", sends everything to everybody.

    allgather
    round 1  sends          0* -> 1, 2             1* -> 0, 2             2* -> 0, 1
             then holds     0* 1* 2*               0* 1* 2*               0* 1* 2*

Cost for n bytes (all chunks together), p ranks, in latency α, time per byte β and per byte reduced γ, one
message after the other: allreduce (p-1)(α + nβ + nγ), in two shots 2(p-1)α + 2n(p-1)/p β + n(p-1)/p γ;
reduce-scatter (p-1)α + n(p-1)/p (β + γ); allgather, gather and scatter (p-1)α + n(p-1)/p β; broadcast
(p-1)(α + nβ); reduce (p-1)(α + nβ + nγ). The formulas leave out what it is for: a rank waits for others once
(in two shots twice), not p - 1 times, and a wait is dear where ranks share cores.

Source: the "linear" algorithms of every MPI library; for allreduce "symmetric" in DeepSpeed's shared memory
path.
"""

import numpy as np

from mpicoll.schedule import COPY, REDUCE, IntArray, Round, Schedule, check_shape, in_sequence


def direct_allreduce(nranks: int) -> Schedule:
    """Every rank ends with the sum of all ranks' data, the same bits, in one round."""
    check_shape(nranks)
    src, dst = _all_pairs(nranks)
    return _one_round("allreduce", nranks, 1, Round.of(src, dst, 0, REDUCE))


def two_shot_allreduce(nranks: int) -> Schedule:
    """Every rank ends with the sum of all ranks' data, the same bits, in two rounds."""
    return in_sequence("two_shot", "allreduce", [direct_reduce_scatter(nranks), direct_allgather(nranks)])


def direct_reduce_scatter(nranks: int) -> Schedule:
    """Rank r ends with the sum of every rank's chunk r, in one round."""
    check_shape(nranks)
    src, dst = _all_pairs(nranks)
    return _one_round("reduce_scatter", nranks, nranks, Round.of(src, dst, dst, REDUCE))


def direct_allgather(nranks: int) -> Schedule:
    """Rank r starts with chunk r; every rank ends with all of them, in one round."""
    check_shape(nranks)
    src, dst = _all_pairs(nranks)
    return _one_round("allgather", nranks, nranks, Round.of(src, dst, src, COPY))


def direct_broadcast(nranks: int, root: int = 0) -> Schedule:
    """Every rank ends with the root's data, in one round."""
    check_shape(nranks, root)
    others = _all_but(root, nranks)
    return _one_round("broadcast", nranks, 1, Round.of(root, others, 0, COPY), root)


def direct_reduce(nranks: int, root: int = 0) -> Schedule:
    """The root ends with the sum of all ranks' data, in one round."""
    check_shape(nranks, root)
    others = _all_but(root, nranks)
    return _one_round("reduce", nranks, 1, Round.of(others, root, 0, REDUCE), root)


def direct_gather(nranks: int, root: int = 0) -> Schedule:
    """The root ends with chunk r of every rank r, in one round."""
    check_shape(nranks, root)
    others = _all_but(root, nranks)
    return _one_round("gather", nranks, nranks, Round.of(others, root, others, COPY), root)


def direct_scatter(nranks: int, root: int = 0) -> Schedule:
    """Rank r ends with the root's chunk r, in one round."""
    check_shape(nranks, root)
    others = _all_but(root, nranks)
    return _one_round("scatter", nranks, nranks, Round.of(root, others, others, COPY), root)


def _one_round(collective: str, nranks: int, nchunks: int, only: Round, root: int = 0) -> Schedule:
    return Schedule.from_rounds("direct", collective, nranks, nchunks, [only], root)


def _all_but(root: int, nranks: int) -> IntArray:
    """All ranks but the root, the next one first."""
    return (root + np.arange(1, nranks)) % nranks


def _all_pairs(nranks: int) -> tuple[IntArray, IntArray]:
    """Every (src, dst); each src begins with the next rank, so that not all begin with rank 0."""
    src = np.repeat(np.arange(nranks), nranks - 1)
    return src, (src + np.tile(np.arange(1, nranks), nranks)) % nranks
