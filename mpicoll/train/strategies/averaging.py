"""Ranks that take steps of their own, and average parameters now and then: local SGD and gossip.

With h_r the mean gradient of rank r's samples of a batch, every rank takes its own step

    w_r = optimizer(w_r, h_r)

and then they mix. **Local SGD** (S. Stich, ICLR 2019), every H steps:

    w_r = (w_0 + w_1 + ... + w_(p-1)) / p                       allreduce of n bytes, every H steps

**Gossip** (X. Lian et al., NeurIPS 2017; B. Ying et al., NeurIPS 2021), with neighbours only, in every step:

    w_r = (w_(r-1) + w_r + w_(r+1)) / 3                         ring: 2 n bytes; the average of two for p = 2
    w_r = (w_r + w_(r - 2^j)) / 2,  j = step mod ceil(log2 p)   exponential graph: n bytes

Mixing leaves the mean over ranks as it is. It is what is evaluated, kept, and what all ranks end with. The
optimizer's state stays each rank's own; a checkpoint has its mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from mpi4py import MPI

from mpicoll.calls import AVG
from mpicoll.communicator import Communicator
from mpicoll.train.arrays import Array, beside, host_copy
from mpicoll.train.layouts import bytes_sent
from mpicoll.train.model import Sequential
from mpicoll.train.optimizer import Optimizer
from mpicoll.train.strategies.base import Strategy, check_choice

GRAPHS = ("ring", "exponential")


class Averaging(Strategy):
    """What local SGD and gossip have in common."""

    synchronous = False

    def __init__(self, comm: MPI.Intracomm, model: Sequential, optimizer: Optimizer):
        super().__init__(comm, model, optimizer)
        self._means = comm if isinstance(comm, Communicator) else Communicator(comm)
        self._frees = self._means is not comm
        optimizer.bind(model.parameters, model.tensors)

    def step(self, rate: float, share: float) -> None:
        """The own step, without which a rank stays that has no samples; then all mix."""
        if share > 0:
            self.model.gradients /= share
            self.optimizer.step(self.model.gradients, rate)
        else:
            self.optimizer.steps += 1  # by which ranks know when to mix, and with whom
        with self.communicating():
            self.mix()

    def mix(self) -> None:
        """Come nearer to the other ranks."""
        raise NotImplementedError

    def finish(self) -> None:
        """w_r = the mean."""
        self._average(self.model.parameters)

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """The mean for a while."""
        own = self.model.parameters.copy()
        self._average(self.model.parameters)
        yield
        self.model.parameters[...] = own

    def whole(self, own: Array) -> Array:
        """The mean of a vector of the optimizer's."""
        mean = own.copy()
        self._average(mean)
        return mean

    def close(self) -> None:
        if self._frees:
            self._means.Free()

    def _average(self, vector: Array) -> None:
        self._means.Allreduce(MPI.IN_PLACE, vector, op=AVG)


class Local(Averaging):
    """Local SGD that averages after every ``every`` steps."""

    name = "local"

    def __init__(self, comm: MPI.Intracomm, model: Sequential, optimizer: Optimizer, every: int = 8):
        if every < 1:
            raise ValueError(f"every: expected at least 1 step, got {every}")
        super().__init__(comm, model, optimizer)
        self.every = every

    def mix(self) -> None:
        """The mean of all ranks, when it is time."""
        if self.optimizer.steps % self.every == 0:
            self._average(self.model.parameters)
            self.bytes_sent += bytes_sent("allreduce", self.model.parameters.nbytes, self.comm.size)


class Gossip(Averaging):
    """Gossip over a ``graph``: "ring" or "exponential"."""

    name = "gossip"

    def __init__(self, comm: MPI.Intracomm, model: Sequential, optimizer: Optimizer, graph: str = "ring"):
        check_choice("graph", graph, GRAPHS)
        super().__init__(comm, model, optimizer)
        self.graph = graph
        self._received = np.empty(model.parameters.size, model.parameters.dtype)

    def mix(self) -> None:
        """The mean with this step's neighbours."""
        nranks, w = self.comm.size, self.model.parameters
        if nranks == 1:
            return
        distances = self._distances(nranks)
        # Messages are MPI's own, which may know nothing of GPUs.
        sent_parameters = host_copy(w)  # neighbours get what there was before any of it is mixed
        for distance in distances:
            send_to, recv_from = (self.comm.rank + distance) % nranks, (self.comm.rank - distance) % nranks
            self.comm.Sendrecv(sent_parameters, send_to, recvbuf=self._received, source=recv_from)
            w += beside(self._received, w)
        w /= len(distances) + 1
        self.bytes_sent += w.nbytes * len(distances)

    def _distances(self, nranks: int) -> list[int]:
        if self.graph == "exponential":
            return [1 << (self.optimizer.steps - 1) % (nranks - 1).bit_length()]
        return [1, -1] if nranks > 2 else [1]
