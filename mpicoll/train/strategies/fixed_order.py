"""Synchronous SGD whose sums have one order, whatever the number of ranks: the same bits on 1 and on 100.

A batch is V logical shards, each rank works on some that follow each other, and their gradients are added
along one binary tree over the shards:

    g = ((g_0 + g_1) + (g_2 + g_3)) + ...       see `mpicoll.reproducible`: any allreduce algorithm
    w = optimizer(w, g)

A shard's gradient has the same bits on every rank, for it is computed from the same samples in the same
order; so have the sums, and the parameters.

Cost per step: that of the algorithm, with up to 2 log2 V vectors for one at its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpi4py import MPI

from mpicoll.communicator import Communicator
from mpicoll.reproducible import BUCKET, ReproducibleSum
from mpicoll.train.model import Sequential
from mpicoll.train.optimizer import Optimizer
from mpicoll.train.strategies.base import Strategy

_broken_off: list[ReproducibleSum] = []  # MPI may still read and write their memory


class FixedOrder(Strategy):
    """Sums over ``shards`` of each batch in a fixed order; ``algorithm`` is that of an allreduce."""

    name = "allreduce"

    def __init__(
        self,
        comm: MPI.Intracomm,
        model: Sequential,
        optimizer: Optimizer,
        shards: int,
        algorithm: str = "two_shot",  # it sends each vector once
        bucket_bytes: int = BUCKET,
    ):
        super().__init__(comm, model, optimizer)
        optimizer.bind(model.parameters, model.tensors)
        with self._understood():
            self.sum = ReproducibleSum(comm, shards, algorithm, bucket_bytes)
        self.parts, self.own_parts = shards, self.sum.own_shards

    def complete(self, part: int) -> None:
        """g_part is known."""
        self.sum.add(part, self.model.gradients)

    def step(self, rate: float, share: float) -> None:
        """g = the sum over all shards; w = optimizer(w, g)."""
        before = self.sum.bytes_sent
        with self.communicating(), self._understood():
            self.sum.finish(self.model.gradients)
        self.bytes_sent += self.sum.bytes_sent - before
        self.optimizer.step(self.model.gradients, rate)

    def break_off(self) -> None:
        self.sum.revoke()
        _broken_off.append(self.sum)

    def close(self) -> None:
        self.sum.close()

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """What MPI's own messages, which the sum sends, raise for a dead rank is raised as what it means."""
        if isinstance(self.comm, Communicator):
            with self.comm._watch.understanding():
                yield
        else:
            yield
