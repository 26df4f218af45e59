"""Parallel aggregated trees (PAT): Bruck's rounds backwards, far and few first, near and many last.

Vocabulary: the ``offset`` of a chunk is how far it has come from its owner, in ranks. In the round of a
``distance``, a power of two, every rank sends to ``rank + distance``: chunks at offsets that are multiples of
twice the distance, those that have got there. Each chunk so spreads down a binomial tree whose root is its
owner; the trees of all chunks run in parallel, and what goes to one rank in a round is aggregated into one
message.

The idea: Bruck's allgather ends with half of all data going p/2 ranks far, over the links that a large
network has least of. Here the first round sends one chunk p/2 far, and the last one half of all data to the
next rank. As many rounds and as much data, and the longest way is for the least data. The last round sends
only what is missing, so any p works without folding. The price: the chunks of a message do not lie together
in memory.

Worked example, 5 ranks; distances 4, 2, 1:

                            rank 0         rank 1         rank 2         rank 3         rank 4
    round 0  sends          0 -> 4         1 -> 0         2 -> 1         3 -> 2         4 -> 3
             then holds     0 1            1 2            2 3            3 4            0 4
    round 1  sends          0 -> 2         1 -> 3         2 -> 4         3 -> 0         4 -> 1
             then holds     0 1 3          1 2 4          0 2 3          1 3 4          0 2 4
    round 2  sends          0 3 -> 1       1 4 -> 2       0 2 -> 3       1 3 -> 4       2 4 -> 0
             then holds     all            all            all            all            all

Reduce-scatter is the same backwards: half of the data goes to the neighbour first, and one chunk, nearly
complete, comes from far in the end.

Cost for n bytes, p ranks, in latency α, time per byte β and per byte reduced γ: allgather ⌈log2 p⌉α +
n(p-1)/p β, reduce-scatter the same plus n(p-1)/p γ. As every chunk travels on its own, a round of p ranks is
as long as p times its number of chunks.

Source: S. Jeaugey, "PAT: a new algorithm for all-gather and reduce-scatter operations at scale",
arXiv:2506.20252 (2025); of it, the case in which buffers hold all that a round sends.
"""

import numpy as np

from mpicoll.schedule import COPY, Round, Schedule, check_shape, mirrored


def pat_allgather(nranks: int) -> Schedule:
    """Rank r starts with chunk r; every rank ends with all of them, in ⌈log2 p⌉ rounds."""
    check_shape(nranks)
    rank = np.arange(nranks)
    nrounds = (nranks - 1).bit_length()

    def make_round(k: int) -> Round:
        distance = 1 << (nrounds - 1 - k)
        offset = np.arange(0, nranks - distance, 2 * distance)
        chunk = np.sort((rank[:, None] - offset) % nranks, axis=1)
        src = np.repeat(rank, len(offset))
        return Round.of(src, (src + distance) % nranks, chunk.ravel(), COPY)

    return Schedule("pat", "allgather", nranks, nranks, nrounds, make_round)


def pat_reduce_scatter(nranks: int) -> Schedule:
    """Rank r ends with the sum of every rank's chunk r, in ⌈log2 p⌉ rounds."""
    return mirrored(pat_allgather(nranks), "reduce_scatter")
