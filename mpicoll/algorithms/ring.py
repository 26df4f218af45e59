"""Ring algorithms: every rank sends to the next rank and receives from the one before.

Vocabulary: ``send_to = rank + 1``, ``recv_from = rank - 1``, both modulo ``nranks``; as many chunks as
ranks; after a reduce-scatter rank ``r`` owns chunk ``r``.

The idea: cut the data into one chunk per rank and let every chunk travel once around the ring while the
ranks it passes add their part (reduce-scatter), then once more while they keep the sum (allgather). All
links are busy in every round, and each rank sends 2 (p - 1) / p of its data in all, the least possible.

Worked example, 3 ranks. Rank r starts with its parts of chunks 0, 1, 2; ``a1`` is rank a's part of
chunk 1, ``*`` marks a complete sum, ``->`` what is sent to the next rank.

    reduce-scatter          rank 0 (a)             rank 1 (b)             rank 2 (c)
    round 0  sends          a2 -> 1                b0 -> 2                c1 -> 0
             then holds     a0  c1+a1  a2          b0  b1  a2+b2          b0+c0  c1  c2
    round 1  sends          c1+a1 -> 1             a2+b2 -> 2             b0+c0 -> 0
             then holds     0*  .  .               .  1*  .               .  .  2*
    allgather
    round 2  sends          0* -> 1                1* -> 2                2* -> 0
             then holds     0*  .  2*              0*  1*  .              .  1*  2*
    round 3  sends          2* -> 1                0* -> 2                1* -> 0
             then holds     0*  1*  2*             0*  1*  2*             0*  1*  2*

Cost for n bytes, p ranks, in latency α, time per byte β and per byte reduced γ:
allreduce 2(p-1)α + 2n(p-1)/p β + n(p-1)/p γ; reduce-scatter and allgather half of the first two terms each.

Source: P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
J. Parallel Distrib. Comput. 69 (2009).
"""

import numpy as np

from mpicoll.schedule import COPY, REDUCE, Round, Schedule, check_shape, in_sequence


def ring_reduce_scatter(nranks: int) -> Schedule:
    """Rank r ends with the sum of every rank's chunk r, in p - 1 rounds."""
    check_shape(nranks)
    rank = np.arange(nranks)
    send_to = (rank + 1) % nranks

    def make_round(k: int) -> Round:
        # Chunk c starts at rank c + 1, so that after p - 1 steps it arrives, complete, at rank c.
        return Round.of(rank, send_to, (rank - 1 - k) % nranks, REDUCE)

    return Schedule("ring", "reduce_scatter", nranks, nranks, nranks - 1, make_round, runs=(nranks - 1,))


def ring_allgather(nranks: int) -> Schedule:
    """Rank r starts with chunk r; every rank ends with all of them, in p - 1 rounds."""
    check_shape(nranks)
    rank = np.arange(nranks)
    send_to = (rank + 1) % nranks

    def make_round(k: int) -> Round:
        return Round.of(rank, send_to, (rank - k) % nranks, COPY)

    return Schedule("ring", "allgather", nranks, nranks, nranks - 1, make_round, runs=(nranks - 1,))


def ring_allreduce(nranks: int) -> Schedule:
    """Every rank ends with the sum of all ranks' data, in 2 (p - 1) rounds."""
    return in_sequence("ring", "allreduce", [ring_reduce_scatter(nranks), ring_allgather(nranks)])
