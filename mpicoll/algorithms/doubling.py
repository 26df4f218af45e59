"""Algorithms whose distances double: recursive doubling allreduce, Bruck allgather, dissemination barrier.

Vocabulary: ``distance`` 1, 2, 4, ... between the partners of a round, so that ⌈log2 p⌉ rounds reach
everyone. Recursive doubling wants a power of two: the ``core`` ranks take part, each of the others (the
``extra`` ranks) is folded into its neighbour in the core before, and gets the result from it after.

Recursive doubling allreduce
----------------------------
Partners exchange everything they have and both add it up: after k rounds the sum over 2^k ranks is known to
all of them. Both partners fold in ascending rank order, so every rank gets the same bits.

3 ranks with the parts a, b, c; the core is ranks 0 and 2, rank 1 is extra:

                            rank 0                 rank 1                 rank 2
    round 0  sends                                 b -> 0
             then holds     a+b                    b                      c
    round 1  sends          a+b -> 2                                      c -> 0
             then holds     (a+b)+c                b                      (a+b)+c
    round 2  sends          (a+b)+c -> 1
             then holds     (a+b)+c                (a+b)+c                (a+b)+c

Cost for n bytes, p ranks, L = log2 p, in latency α, time per byte β and per byte reduced γ:
L(α + nβ + nγ) for a power of two; otherwise (⌊L⌋ + 2)(α + nβ) + (⌊L⌋ + 1)nγ.
Least latency of all, and all data in every round: for small n.

Bruck allgather
---------------
Rank r holds the chunks r, r + 1, ... modulo p; it sends them to rank ``r - distance``, for which they are the
next ones. The last round sends only what is missing, so any p works without folding.

                            rank 0                 rank 1                 rank 2
    round 0  sends          0 -> 2                 1 -> 0                 2 -> 1
             then holds     0 1                    1 2                    2 0
    round 1  sends          0 -> 1                 1 -> 2                 2 -> 0
             then holds     0 1 2                  1 2 0                  2 0 1

Cost, n bytes being all chunks together: ⌈L⌉α + n(p-1)/p β.

Dissemination barrier
---------------------
In each round rank r tells ``r + distance`` about everyone it has heard of. Hearing of a rank twice is no
harm, so any p works. The sets heard of, for 3 ranks:

                            rank 0                 rank 1                 rank 2
    round 0  sends          {0} -> 1               {1} -> 2               {2} -> 0
             then knows     {2 0}                  {0 1}                  {1 2}
    round 1  sends          {2 0} -> 2             {0 1} -> 0             {1 2} -> 1
             then knows     all                    all                    all

Cost: ⌈L⌉α.

Sources: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations in MPICH",
Int. J. High Perform. Comput. Appl. 19 (2005); J. Bruck et al., "Efficient algorithms for all-to-all
communications in multiport message-passing systems", IEEE Trans. Parallel Distrib. Syst. 8 (1997);
D. Hensgen, R. Finkel, U. Manber, "Two algorithms for barrier synchronization", Int. J. Parallel Program. 17
(1988).
"""

import numpy as np

from mpicoll.schedule import COPY, REDUCE, IntArray, Round, Schedule, check_shape


def core_ranks(nranks: int) -> IntArray:
    """The power-of-two many ranks that stay when every extra rank is folded into the rank before it.

    The first ``nranks - len(core)`` of them have an extra rank: the next number. Neighbours are folded
    because they are the likeliest to share a node, and because sums stay in rank order.
    """
    size = 1 << (nranks.bit_length() - 1)
    nextra = nranks - size
    return np.concatenate([np.arange(0, 2 * nextra, 2), np.arange(2 * nextra, nranks)])


def recursive_doubling_allreduce(nranks: int) -> Schedule:
    """Every rank ends with the sum of all ranks' data, the same bits, in log2 p rounds (+2 to fold)."""
    check_shape(nranks)
    core = core_ranks(nranks)
    index = np.arange(len(core))
    host = core[: nranks - len(core)]
    extra = host + 1
    fold = Round.of(extra, host, 0, REDUCE)
    unfold = Round.of(host, extra, 0, COPY)
    distances = [1 << k for k in range(len(core).bit_length() - 1)]
    exchanges = [Round.of(core, core[index ^ distance], 0, REDUCE) for distance in distances]
    return Schedule.from_rounds("recursive_doubling", "allreduce", nranks, 1, [fold, *exchanges, unfold])


def bruck_allgather(nranks: int) -> Schedule:
    """Rank r starts with chunk r; every rank ends with all of them, in ⌈log2 p⌉ rounds."""
    check_shape(nranks)
    rank = np.arange(nranks)

    def make_round(k: int) -> Round:
        distance = 1 << k
        missing = min(distance, nranks - distance)
        return Round.of_ranges(rank, (rank - distance) % nranks, rank, missing, nranks, COPY)

    return Schedule("bruck", "allgather", nranks, nranks, (nranks - 1).bit_length(), make_round)


def dissemination_barrier(nranks: int) -> Schedule:
    """No rank ends before every rank has begun, in ⌈log2 p⌉ rounds."""
    check_shape(nranks)
    rank = np.arange(nranks)

    def make_round(k: int) -> Round:
        return Round.of(rank, (rank + (1 << k)) % nranks, 0, REDUCE)

    return Schedule("dissemination", "barrier", nranks, 1, (nranks - 1).bit_length(), make_round)
