"""Pipelined chains: broadcast along the ranks in order, and its mirror, reduce.

Vocabulary: the ``place`` of a rank is its distance from the root, ``(rank - root) % nranks``; each place
sends to the next one. ``nchunks`` is how many pieces the data travels in.

The idea: a rank passes a chunk on while it receives the next one. Once the pipeline is full every link is
busy in every round, and a rank sends and receives the data exactly once: for long data and few ranks
nothing is faster, but the last rank waits p - 1 rounds for its first chunk.

Worked example, 3 ranks, root 0, chunks 0, 1, 2:

                            rank 0                 rank 1                 rank 2
    round 0  sends          0 -> 1
    round 1  sends          1 -> 1                 0 -> 2
    round 2  sends          2 -> 1                 1 -> 2
    round 3  sends                                 2 -> 2
             then holds     0 1 2                  0 1 2                  0 1 2

Reduce is the same backwards: sums travel towards the root, the last chunk first.

Cost for n bytes in k chunks, p ranks, in latency α, time per byte β and per byte reduced γ:
broadcast (p - 2 + k)(α + nβ/k), least for k = √((p-2)nβ/α); reduce (p - 2 + k)(α + nβ/k + nγ/k).

Source: J. Watts, R. van de Geijn, "A pipelined broadcast for multidimensional meshes", Parallel Process.
Lett. 5 (1995).
"""

import numpy as np

from mpicoll.schedule import COPY, Round, Schedule, check_shape, mirrored

NCHUNKS = 8  # fills the pipeline of some 8 ranks; long data wants more


def chain_broadcast(nranks: int, root: int = 0, nchunks: int = NCHUNKS) -> Schedule:
    """Every rank ends with the root's data, in p - 2 + nchunks rounds."""
    check_shape(nranks, root, nchunks)
    nrounds = nranks - 2 + nchunks if nranks > 1 else 0

    def make_round(k: int) -> Round:
        # Chunk c leaves place i in round i + c.
        place = np.arange(max(0, k - nchunks + 1), min(k, nranks - 2) + 1)
        return Round.of((place + root) % nranks, (place + 1 + root) % nranks, k - place, COPY)

    return Schedule("chain", "broadcast", nranks, nchunks, nrounds, make_round, root)


def chain_reduce(nranks: int, root: int = 0, nchunks: int = NCHUNKS) -> Schedule:
    """The root ends with the sum of all ranks' data, in p - 2 + nchunks rounds."""
    return mirrored(chain_broadcast(nranks, root, nchunks), "reduce")
