"""Shards that outlive their rank: each rank keeps a copy of its right neighbour's, of the same step.

With sharded optimizer state rank r alone has w[r] and s[r], what it updates. Here it also has those of rank
r + 1 (the last rank those of rank 0), as they were after the last two steps:

    rank 0 keeps    w[0], s[0] and w[1], s[1]       each after step k - 1 and after step k
    rank 1 keeps    w[1], s[1] and w[2], s[2]
    rank 2 keeps    w[2], s[2] and w[0], s[0]

So any rank may be lost, and any ranks that are no neighbours. The parameters w are on all ranks anyway; s
travels after each step.

Why two steps are enough, and one is not
----------------------------------------
In step k each rank does 1. the reduce-scatter of gradients, 2. the allgather of parameters, and 3. puts its
copies after step k in the place of those after step k - 2. When a rank dies, some of the others may have
been through 3, and some have only the copies after step k - 1: with one copy on each rank they might have
none in common. But nobody needs one older than k - 1 while a rank is at 3. For it has been through 2, where
each shard that is not empty came from a rank that was through 1, and that takes a gradient from every rank.
So all ranks have been in step k, and have finished step k - 1, copies included.

Hence the newest step of which *all* survivors have copies is the last one of the survivor who is behind.

Cost per step: s[r], a p-th of the optimizer's state, is sent once and copied twice. Memory: four p-ths of the
parameters and the state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from mpi4py import MPI

from mpicoll.train.arrays import Array, array_module

PARAMETERS = ""  # the name of their vector, beside those of the optimizer's
Shards = dict[int, dict[str, Array]]  # by the rank that updates them: its part of each vector
STEPS = 2  # that are kept


class Mirror:
    """The copies of one rank of ``comm``: of its shard and the next one, after the last two steps.

    ``bounds`` [ranks + 1] say where shards of ``parameters`` begin and end; the optimizer's ``vectors`` are
    cut alike, but have the first ``trainable`` elements only.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        parameters: Array,
        bounds: Sequence[int],
        vectors: Sequence[str],
        trainable: int,
    ):
        self.comm = comm
        self.rank, self.right = comm.rank, (comm.rank + 1) % comm.size
        self.bounds = {PARAMETERS: list(bounds)}
        self.bounds |= {name: [min(bound, trainable) for bound in bounds] for name in vectors}
        xp = array_module(parameters)
        self._kept: list[Shards] = [
            {rank: self._empty(xp, rank, parameters) for rank in (self.rank, self.right)}
            for _ in range(STEPS)
        ]
        self._steps = [-1] * STEPS
        sizes = np.diff(self.bounds[vectors[0]] if vectors else bounds).tolist()
        left = (comm.rank - 1) % comm.size
        self._sent = [sizes[self.rank] if rank == left else 0 for rank in range(comm.size)]
        self._received = [sizes[self.right] if rank == self.right else 0 for rank in range(comm.size)]

    def _empty(self, xp: Array, rank: int, like: Array) -> dict[str, Array]:
        sizes = {name: bounds[rank + 1] - bounds[rank] for name, bounds in self.bounds.items()}
        return {name: xp.empty(size, like.dtype) for name, size in sizes.items()}

    @property
    def nbytes(self) -> int:
        """What a rank sends in each step."""
        return sum(own.nbytes for name, own in self._kept[0][self.rank].items() if name != PARAMETERS)

    def keep(self, step: int, parameters: Array, state: Mapping[str, Array]) -> None:
        """After ``step`` steps: the whole ``parameters``, and this rank's part of the optimizer's ``state``.

        Collective.
        """
        place = step % STEPS
        self._steps[place] = -1  # until all of it is there
        kept = self._kept[place]
        for rank, (begin, end) in enumerate(pairwise(self.bounds[PARAMETERS])):
            if rank in kept:
                kept[rank][PARAMETERS][...] = parameters[begin:end]
        for name, vector in state.items():
            kept[self.rank][name][...] = vector
            received = kept[self.right][name]
            self.comm.Alltoallv([kept[self.rank][name], self._sent], [received, self._received])
        self._steps[place] = step

    @property
    def newest(self) -> int:
        """After how many steps the newest copies are that are whole; -1 if there are none."""
        return max(self._steps)

    def after(self, step: int) -> Shards:
        """The copies after so many steps."""
        return self._kept[self._steps.index(step)]
