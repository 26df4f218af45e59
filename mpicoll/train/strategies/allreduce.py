"""Synchronous SGD by allreduce: every rank holds the whole model and makes the same update.

With g_r the gradients of rank r's samples over the size of the global batch, in every step

    g = g_0 + g_1 + ... + g_(p-1)       allreduce: the batch's mean gradient, the same bits on every rank
    w = optimizer(w, g)                 the same update everywhere, so the parameters w stay equal

Cost per step for n bytes of parameters: one allreduce of n bytes.
"""

from __future__ import annotations

from mpi4py import MPI

from mpicoll.train.model import Sequential
from mpicoll.train.optimizer import Optimizer


class AllreduceStrategy:
    """See the module. ``algorithm`` names the allreduce; None for a communicator that offers no choice."""

    name = "allreduce"

    def __init__(
        self, comm: MPI.Intracomm, model: Sequential, optimizer: Optimizer, algorithm: str | None = None
    ):
        self.comm = comm
        self.model = model
        self.optimizer = optimizer
        self.options = {} if algorithm is None else {"algorithm": algorithm}

    def start(self) -> None:
        """w_r = w_0."""
        self.comm.Bcast(self.model.parameters, root=0)
        # The gradients are still zero. Summing them once connects the ranks and compiles the allreduce, which
        # would otherwise count as the first step's time.
        self._sum_gradients()

    def step(self) -> None:
        """g = sum of g_r; w = optimizer(w, g)."""
        self._sum_gradients()
        self.optimizer.step(self.model.gradients)

    def _sum_gradients(self) -> None:
        self.comm.Allreduce(MPI.IN_PLACE, self.model.gradients, op=MPI.SUM, **self.options)
