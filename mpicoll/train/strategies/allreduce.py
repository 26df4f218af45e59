"""Synchronous SGD by allreduce: every rank holds the whole model and makes the same update.

With g_r the gradients of rank r's samples over the size of the global batch, in every step

    g = g_0 + g_1 + ... + g_(p-1)       allreduce: the batch's mean gradient, the same bits on every rank
    w = optimizer(w, g)                 the same update everywhere, so the parameters w stay equal

The sums are begun while the backward pass goes on, bucket by bucket: see `mpicoll.fusion`.

Cost per step for n bytes of parameters: allreduces of n bytes together.
"""

from __future__ import annotations

from typing import Any

from mpi4py import MPI

from mpicoll.fusion import GradientSync
from mpicoll.train.arrays import Array
from mpicoll.train.model import Sequential
from mpicoll.train.optimizer import Optimizer
from mpicoll.train.strategies.base import Strategy


class Allreduce(Strategy):
    """See the module. ``options`` are those of `GradientSync`, such as ``algorithm`` or ``compression``."""

    name = "allreduce"

    def __init__(self, comm: MPI.Intracomm, model: Sequential, optimizer: Optimizer, **options: Any):
        super().__init__(comm, model, optimizer)
        optimizer.bind(model.parameters, model.tensors)
        self.sync = GradientSync(comm, model.gradient_views, names=model.names, average=False, **options)

    def start(self) -> None:
        """w_r = w_0, and the first sum."""
        super().start()
        # Summing zeros once connects the ranks and compiles the allreduce, which would otherwise count as
        # the first step's time. A compression may send what it has kept back, which is not to be lost.
        kept = {name: array.copy() for name, array in self.own_arrays().items()}
        self.model.gradients[...] = 0
        self.sync.ready_all()
        self.sync.wait()
        for name, array in self.own_arrays().items():
            array[...] = kept[name]

    def ready(self, i: int) -> None:
        """g[i] = sum of g_r[i], from now on."""
        self.sync.ready(i)

    def step(self, rate: float, share: float) -> None:
        """g = sum of g_r; w = optimizer(w, g)."""
        with self.communicating():
            right = self.sync.wait()
        self.bytes_sent += self.sync.bytes_sent_per_step
        if right:
            self.optimizer.step(self.model.gradients, rate)

    def own_arrays(self) -> dict[str, Array]:
        """What compression has not sent yet."""
        kept: dict[str, Array] = {}
        for b, codec in enumerate(self.sync.codecs):
            kept |= {f"bucket{b}.{name}": array for name, array in codec.arrays.items()}
        return kept

    def close(self) -> None:
        self.sync.close()
