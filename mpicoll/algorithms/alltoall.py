"""All-to-all: every rank has something different for every rank. Pairwise exchange, and Bruck's algorithm.

Vocabulary: chunk ``i * nranks + j`` is what rank i sends to rank j, here written ij; its ``distance`` is
(j - i) modulo ``nranks``. A rank's own chunk ii stays where it is.

Pairwise: in round k - 1 rank r sends straight to rank r + k and receives from rank r - k. Each chunk travels
once, and in every round each rank sends to one and receives from one, for any number of ranks.

                            rank 0                 rank 1                 rank 2
    round 0  sends          01 -> 1                12 -> 2                20 -> 0
    round 1  sends          02 -> 2                10 -> 0                21 -> 1
             then holds     00 10 20               01 11 21               02 12 22

Bruck: in round k every rank sends to rank r + 2^k, together, all the chunks it holds whose distance has bit
k set. A chunk hops once for every bit of its distance, over ranks it does not belong to: fewer messages,
more data.

                            rank 0                 rank 1                 rank 2
    round 0  sends          01 -> 1                12 -> 2                20 -> 0
    round 1  sends          02 -> 2                10 -> 0                21 -> 1
             then holds     00 10 20               01 11 21               02 12 22

(With 3 ranks every distance is a single bit, so both agree; with 4 ranks chunk 03 goes 0 -> 1 -> 3.)

Cost, each rank sending n bytes in all to p ranks, L = log2 p, in latency α and time per byte β: pairwise
(p-1)α + n(p-1)/p β; Bruck ⌈L⌉α + ⌈L⌉n/2 β for a power of two, less otherwise.

Source: J. Bruck, C.-T. Ho, S. Kipnis, E. Upfal, D. Weathersby, "Efficient algorithms for all-to-all
communications in multiport message-passing systems", IEEE Trans. Parallel Distrib. Syst. 8 (1997); R.
Thakur, R. Rabenseifner, W. Gropp, Int. J. High Perform. Comput. Appl. 19 (2005).
"""

import numpy as np

from mpicoll.schedule import COPY, Round, Schedule, check_shape


def pairwise_alltoall(nranks: int) -> Schedule:
    """Rank j ends with chunk i * p + j of every rank i, in p - 1 rounds."""
    check_shape(nranks)
    rank = np.arange(nranks)

    def make_round(k: int) -> Round:
        send_to = (rank + k + 1) % nranks
        return Round.of(rank, send_to, rank * nranks + send_to, COPY)

    return Schedule("pairwise", "alltoall", nranks, nranks**2, nranks - 1, make_round)


def bruck_alltoall(nranks: int) -> Schedule:
    """Rank j ends with chunk i * p + j of every rank i, in ⌈log2 p⌉ rounds."""
    check_shape(nranks)
    rank = np.arange(nranks)

    def make_round(k: int) -> Round:
        hop = 1 << k
        distance = rank[rank & hop > 0]
        owner = rank[:, np.newaxis]
        chunk = (owner * nranks + (owner + distance) % nranks).ravel()
        src = ((owner + distance % hop) % nranks).ravel()  # where the hops for the lower bits have led
        order = np.lexsort((chunk, src))
        return Round.of(src[order], (src[order] + hop) % nranks, chunk[order], COPY)

    return Schedule("bruck", "alltoall", nranks, nranks**2, (nranks - 1).bit_length(), make_round)
