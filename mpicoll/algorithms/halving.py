"""Algorithms whose data halves: recursive halving reduce-scatter, Rabenseifner's allreduce.

Vocabulary: the ``core`` ranks are a power of two, every ``extra`` rank is folded into its neighbour (see
``doubling``). The chunks are cut into one ``block`` per core rank, contiguous and in rank order; ``half``
is the number of blocks a rank sends away, and keeps, in a round.

Recursive halving reduce-scatter
--------------------------------
Two groups of ranks face each other; each rank sends its partner the half of the data that the partner's
group will own, and adds what it gets to the half it keeps. Then each group splits in two, and so on: the
distance halves and so does the data, which stays one contiguous range.

3 ranks with the parts a, b, c of chunks 0, 1, 2; the core is ranks 0 (blocks: chunks 0 and 1) and 2 (chunk
2), rank 1 is extra; ``*`` marks a complete sum:

                            rank 0                 rank 1                 rank 2
    round 0  sends                                 b0 b1 b2 -> 0
             then holds     a0+b0  a1+b1  a2+b2    b0  b1  b2             c0  c1  c2
    round 1  sends          a2+b2 -> 2                                    c0 c1 -> 0
             then holds     0*  1*  .              .  .  .                .  .  2*
    round 2  sends          1* -> 1
             then holds     0*  .  .               .  1*  .               .  .  2*

Cost for n bytes, p ranks, L = log2 p, in latency α, time per byte β and per byte reduced γ:
Lα + n(p-1)/p (β + γ) for a power of two; otherwise folding adds 2α + n(1 + 1/p)β + nγ.

Rabenseifner's allreduce
------------------------
Recursive halving, then the same backwards with copies instead of sums (recursive doubling of the finished
blocks). There are as many chunks as core ranks. For 3 ranks, with chunks 0 and 1:

                            rank 0                 rank 1                 rank 2
    round 0  sends                                 b0 b1 -> 0
             then holds     a0+b0  a1+b1           b0  b1                 c0  c1
    round 1  sends          a1+b1 -> 2                                    c0 -> 0
             then holds     0*  .                  .  .                   .  1*
    round 2  sends          0* -> 2                                       1* -> 0
             then holds     0*  1*                 .  .                   0*  1*
    round 3  sends          0* 1* -> 1
             then holds     0*  1*                 0*  1*                 0*  1*

Cost: 2Lα + 2n(p-1)/p β + n(p-1)/p γ for a power of two; otherwise folding adds 2α + 2nβ + nγ, about twice
the bandwidth. As little data as the ring in log2 p rounds instead of p, over longer distances.

Source: R. Rabenseifner, "Optimization of collective reduction operations", ICCS 2004; R. Thakur,
R. Rabenseifner, W. Gropp, Int. J. High Perform. Comput. Appl. 19 (2005).
"""

import numpy as np

from mpicoll.algorithms.doubling import core_ranks
from mpicoll.schedule import (
    COPY,
    REDUCE,
    IntArray,
    Round,
    Schedule,
    check_shape,
    in_sequence,
    mirrored,
)


def recursive_halving_reduce_scatter(nranks: int) -> Schedule:
    """Rank r ends with the sum of every rank's chunk r, in log2 p rounds (+2 to fold)."""
    check_shape(nranks)
    core = core_ranks(nranks)
    host = core[: nranks - len(core)]
    extra = host + 1
    # The block of a core rank: its own chunk and, if it has an extra rank, that one's.
    bounds = np.append(core, nranks)
    unfold = Schedule.from_rounds(
        "unfold", "reduce_scatter", nranks, nranks, [Round.of(host, extra, extra, COPY)]
    )
    phases = [fold(nranks, nranks), _halving(nranks, bounds), unfold]
    return in_sequence("recursive_halving", "reduce_scatter", phases)


def rabenseifner_allreduce(nranks: int) -> Schedule:
    """Every rank ends with the sum of all ranks' data, in 2 log2 p rounds (+2 to fold)."""
    check_shape(nranks)
    ncore = len(core_ranks(nranks))
    reduce = in_sequence(
        "reduce", "reduce_scatter", [fold(nranks, ncore), _halving(nranks, np.arange(ncore + 1))]
    )
    return in_sequence("rabenseifner", "allreduce", [reduce, mirrored(reduce, "allgather")])


def fold(nranks: int, nchunks: int) -> Schedule:
    """Every extra rank's data is added to its neighbour's in the core: one round, or none."""
    core = core_ranks(nranks)
    host = core[: nranks - len(core)]

    def make_round(k: int) -> Round:
        return Round.of_ranges(host + 1, host, 0, nchunks, nchunks, REDUCE)

    return Schedule("fold", "reduce_scatter", nranks, nchunks, min(1, len(host)), make_round)


def _halving(nranks: int, bounds: IntArray) -> Schedule:
    """Core rank i ends with the sum over the core of the chunks from ``bounds[i]`` to ``bounds[i + 1]``."""
    core = core_ranks(nranks)
    index = np.arange(len(core))
    nchunks = int(bounds[-1])

    def make_round(k: int) -> Round:
        half = len(core) >> (k + 1)
        partner = index ^ half
        block = partner // half * half  # the first of the blocks that the partner keeps
        first, end = bounds[block], bounds[block + half]
        return Round.of_ranges(core, core[partner], first, end - first, nchunks, REDUCE)

    return Schedule("halving", "reduce_scatter", nranks, nchunks, len(core).bit_length() - 1, make_round)
