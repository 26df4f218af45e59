"""The ring both ways: every rank sends to both its neighbours at once, so that chunks go half way around.

Vocabulary: ``forward`` is to rank + 1, ``backward`` to rank - 1, both modulo ``nranks``; as many chunks as
ranks, of which rank ``r`` owns chunk ``r``.

The idea: links carry data both ways at once, and a one-way ring uses one of them. Here each chunk leaves its
owner on both sides, and the two copies meet opposite of it: ⌊p/2⌋ rounds instead of p - 1, with as much data
in each direction in a round as in a one-way ring. A reduce-scatter is the same backwards: the parts of a
chunk come to its owner from both sides, who adds both to its own in the last round. With an even number of
ranks one rank is opposite of each; it is served by the forward ring alone.

Worked example, allgather on 4 ranks (``+`` is sent forward, ``-`` backward), and what rank r then holds:

                            rank 0             rank 1             rank 2             rank 3
    round 0  sends          +0  -0             +1  -1             +2  -2             +3  -3
             then holds     0 1 3              0 1 2              1 2 3              0 2 3
    round 1  sends          +3                 +0                 +1                 +2
             then holds     0 1 2 3            0 1 2 3            0 1 2 3            0 1 2 3

Cost for n bytes, p ranks, in latency α, time per byte β of one direction and per byte reduced γ, both
directions at once: allgather ⌊p/2⌋(α + n/p β); reduce-scatter the same plus n(p-1)/p γ; allreduce the sum of
both: half of what the ring takes, where links work both ways at once and each rank can feed two of them.

Source: E. Chan, M. Heimlich, A. Purkayastha, R. van de Geijn, "Collective communication: theory, practice,
and experience", Concurrency Computat.: Pract. Exper. 19 (2007), for rings as reduce-scatter and allgather;
the same in both directions is what bidirectional tori are used with."""

import numpy as np

from mpicoll.schedule import COPY, Round, Schedule, check_shape, in_sequence, mirrored


def bidirectional_ring_allgather(nranks: int) -> Schedule:
    """Rank r starts with chunk r; every rank ends with all of them, in ⌊p/2⌋ rounds."""
    check_shape(nranks)
    rank = np.arange(nranks)

    def make_round(k: int) -> Round:
        forward = Round.of(rank, (rank + 1) % nranks, (rank - k) % nranks, COPY)
        if 2 * (k + 1) == nranks:  # both sides would bring the same chunk
            return forward
        backward = Round.of(rank, (rank - 1) % nranks, (rank + k) % nranks, COPY)
        return Round.union([forward, backward])

    runs = ((nranks - 1) // 2, int(nranks % 2 == 0))
    return Schedule("bidirectional_ring", "allgather", nranks, nranks, nranks // 2, make_round, runs=runs)


def bidirectional_ring_reduce_scatter(nranks: int) -> Schedule:
    """Rank r ends with the sum of every rank's chunk r, in ⌊p/2⌋ rounds."""
    return mirrored(bidirectional_ring_allgather(nranks), "reduce_scatter")


def bidirectional_ring_allreduce(nranks: int) -> Schedule:
    """Every rank ends with the sum of all ranks' data, in 2 ⌊p/2⌋ rounds."""
    phases = [bidirectional_ring_reduce_scatter(nranks), bidirectional_ring_allgather(nranks)]
    return in_sequence("bidirectional_ring", "allreduce", phases)
