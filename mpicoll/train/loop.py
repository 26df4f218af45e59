"""The training loop: the same steps on every rank, each with its own part of every batch.

    for each epoch:
        for each global batch:                          the same on every rank
            forward, loss, backward on the own part     gradients over the size of the global batch,
                                                        communicated as they come
            strategy.step()                             communicate the rest, update
        evaluate on the test set                        each rank its part, counts summed

With one rank this is ordinary SGD; with more, the same up to the rounding of sums.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from mpi4py import MPI

from mpicoll.train.data import Dataset, global_batches, own_part
from mpicoll.train.errors import InputError
from mpicoll.train.model import Array, Sequential, array_module
from mpicoll.train.report import Progress
from mpicoll.train.strategies import Strategy

Loss = Callable[[Array, Array], tuple[Array, Array]]


@dataclass(frozen=True)
class Epoch:
    """One epoch's figures over all ranks.

    ``train_loss`` is the mean over the epoch's samples, each at the step that learned from it; the test
    figures are those of the epoch's end. ``seconds`` is the slowest rank's time in the steps alone.
    ``test_accuracy`` is None where there are no classes.
    """

    number: int
    train_loss: float
    test_loss: float
    test_accuracy: float | None
    samples: int
    seconds: float


class Trainer:
    """Trains ``model`` on ``data`` in global batches of ``batch_size`` samples, on all ranks of ``comm``.

    ``comm`` is any communicator with mpi4py's interface; every rank passes equal arguments.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        model: Sequential,
        loss: Loss,
        data: Dataset,
        strategy: Strategy,
        batch_size: int = 64,
        seed: int = 0,
    ):
        self.comm = comm
        self.model = model
        self.loss = loss
        self.data = data.beside(model.parameters)
        self.strategy = strategy
        self.batch_size = batch_size
        self.seed = seed

    def train(self, epochs: int, progress: Progress | None = None) -> list[Epoch]:
        """Every epoch's figures. Raises `InputError`, on all ranks, when the loss is no number any more."""
        progress = progress or Progress()
        self.strategy.start()
        history = []
        steps = math.ceil(len(self.data.train_x) / self.batch_size)
        # A learning rate that is too high ends in the check of the loss, not in warnings from every rank.
        with np.errstate(over="ignore", invalid="ignore"), progress.of(epochs, steps):
            for number in range(1, epochs + 1):
                epoch = self._epoch(number, progress)
                if not math.isfinite(epoch.train_loss):
                    raise InputError(
                        f"expected the training loss to be a number, found {epoch.train_loss} in epoch "
                        f"{number}; lower the learning rate (--lr)"
                    )
                history.append(epoch)
                progress.epoch(epoch)
        return history

    def evaluate(self) -> tuple[float, float | None]:
        """Mean loss and, with classes, accuracy over the whole test set."""
        x, y = self.data.test_x, self.data.test_y
        part = own_part(self.comm.rank, self.comm.size, len(x))
        outputs = self.model.forward(x[part])
        losses, _ = self.loss(outputs, y[part])
        right = outputs.argmax(axis=1) == y[part] if self.data.classes else losses[:0]
        loss, accuracy = self._over_ranks([losses.sum(), right.sum()], MPI.SUM) / len(x)
        return float(loss), float(accuracy) if self.data.classes else None

    def _epoch(self, number: int, progress: Progress) -> Epoch:
        x, y = self.data.train_x, self.data.train_y
        loss_sum = 0.0
        start = perf_counter()
        for batch in global_batches(len(x), self.batch_size, self.seed, number):
            loss_sum += self._step(x, y, batch)
            progress.step()
        seconds = perf_counter() - start

        train_loss = self._over_ranks([loss_sum], MPI.SUM)[0] / len(x)
        slowest = self._over_ranks([seconds], MPI.MAX)[0]
        test_loss, test_accuracy = self.evaluate()
        return Epoch(number, float(train_loss), test_loss, test_accuracy, len(x), float(slowest))

    def _step(self, x: Array, y: Array, batch: Array) -> float:
        """One step on the global ``batch``; the sum of the own samples' losses."""
        own = batch[own_part(self.comm.rank, self.comm.size, len(batch))]
        own = array_module(x).asarray(own)
        losses, gradients = self.loss(self.model.forward(x[own]), y[own])
        self.model.backward(gradients / len(batch), self.strategy.ready)
        self.strategy.step()
        return float(losses.sum())

    def _over_ranks(self, values: list[float], op: MPI.Op) -> np.ndarray:
        """Each of ``values`` reduced over all ranks, in float64."""
        totals = np.array([float(value) for value in values])
        self.comm.Allreduce(MPI.IN_PLACE, totals, op=op)
        return totals


def parameters_sha256(comm: MPI.Intracomm, model: Sequential) -> str:
    """The hash of the parameters' bytes; raises `RuntimeError`, on all ranks, where ranks differ."""
    parameters = model.parameters
    on_host = parameters.get() if hasattr(parameters, "get") else parameters  # CuPy's way to the host
    digests: list[str] = comm.allgather(hashlib.sha256(on_host.tobytes()).hexdigest())
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise RuntimeError(
            f"expected the same parameters on all ranks, those of {differing} differ from rank 0's"
        )
    return digests[0]
