"""Synchronous SGD with sharded optimizer state: each rank updates its shard of the parameters.

The vectors of parameters w and gradients g are cut into p shards; rank r has the optimizer's state s[r] for
shard r only, a p-th of it all. With g_r the gradients of rank r's samples, in every step

    g[r] = g_0[r] + g_1[r] + ... + g_(p-1)[r]       reduce-scatter: each rank gets the sum of its shard
    w[r], s[r] = optimizer(w[r], g[r], s[r])        a p-th of the work
    w = w[0], w[1], ... w[p-1]                      allgather

Cost per step for n bytes of parameters: a reduce-scatter and an allgather of n bytes, together what an
allreduce costs. Source: S. Rajbhandari et al., "ZeRO", SC 2020 (its stage 1).

A shard of the optimizer's state is lost with its rank, unless it is ``mirrored``: see `mpicoll.train.mirror`.
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

from mpicoll.grouped import new_bucket
from mpicoll.schedule import chunk_bounds
from mpicoll.train.arrays import Array, array_module
from mpicoll.train.layouts import bytes_sent
from mpicoll.train.mirror import Mirror
from mpicoll.train.model import Sequential
from mpicoll.train.optimizer import Optimizer
from mpicoll.train.strategies.base import Strategy


class Sharded(Strategy):
    """See the module."""

    name = "sharded"

    def __init__(self, comm: MPI.Intracomm, model: Sequential, optimizer: Optimizer, mirrored: bool = False):
        super().__init__(comm, model, optimizer)
        parameters = model.parameters
        bounds = chunk_bounds(parameters.size, comm.size, parameters.itemsize)
        self.begin, self.end = (int(bound) for bound in bounds[comm.rank : comm.rank + 2])
        self.counts = np.diff(bounds).tolist()
        self.trained = np.diff(np.minimum(bounds, model.tensors.trainable)).tolist()
        self.gradient = _room(self.end - self.begin, parameters)
        shard = parameters[self.begin : self.end]
        optimizer.bind(shard, model.tensors.cut(self.begin, self.end, comm))
        self.mirror: Mirror | None = None
        if mirrored:
            vectors, trainable = list(optimizer.state), model.tensors.trainable
            self.mirror = Mirror(comm, parameters, bounds.tolist(), vectors, trainable)

    def start(self) -> None:
        """w_r = w_0, and the first copies."""
        super().start()
        self._keep()

    def _keep(self) -> None:
        if self.mirror is not None:
            self.mirror.keep(self.optimizer.steps, self.model.parameters, self.optimizer.state)

    def step(self, rate: float, share: float) -> None:
        """Reduce-scatter, update, allgather."""
        with self.communicating():
            self.comm.Reduce_scatter(self.model.gradients, self.gradient, self.counts)
        self.optimizer.step(self.gradient, rate)
        with self.communicating():
            self.comm.Allgatherv(MPI.IN_PLACE, [self.model.parameters, self.counts])
            self._keep()
        self.bytes_sent += self.mirror.nbytes if self.mirror is not None else 0
        nbytes = self.model.parameters.nbytes
        for collective in ("reduce_scatter", "allgather"):
            self.bytes_sent += bytes_sent(collective, nbytes, self.comm.size)

    def whole(self, own: Array) -> Array:
        """All shards of a vector of the optimizer's."""
        whole = array_module(own).empty(sum(self.trained), own.dtype)
        self.comm.Allgatherv(own, [whole, self.trained])
        return whole

    def own(self, whole: Array) -> Array:
        """This rank's shard."""
        return whole[self.begin : self.end]


def _room(count: int, like: Array) -> Array:
    """For so many elements, where ``like`` is; on the host the node's other ranks can read it."""
    xp = array_module(like)
    return new_bucket(count, like.dtype) if xp is np else xp.empty(count, like.dtype)
