"""PyTorch on the task of `mpicoll.bench.training_throughput`: the same weights, batches and optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from mpi4py import MPI
from torch.nn.parallel import DistributedDataParallel

from mpicoll.train import Dataset, Sequential
from mpicoll.train.sampling import global_batches, own_part

Measured = tuple[float, float]  # seconds of an epoch, and its mean loss


class TorchTrainer:
    """Trains what ``model``, a perceptron with ReLUs, is now; with more ranks than one by DDP over gloo.

    A rank takes the same rows of the same batches as with `mpicoll.train.Trainer`. It has one thread, the
    fused optimizer, and gradients that are views of DDP's buckets.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        model: Sequential,
        data: Dataset,
        batch_size: int,
        rate: float,
        momentum: float,
    ):
        torch.set_num_threads(1)
        self.comm = comm
        self.x, self.y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
        self.batch_size = batch_size
        self.epochs = 0
        self.model: Any = perceptron(model)
        if comm.size > 1:
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=momentum, fused=True)

    def epoch(self) -> Measured:
        """Train for one more: the slowest rank's seconds, and the mean loss. Collective."""
        self.epochs += 1
        count = len(self.y)
        total = torch.zeros(())
        begin = perf_counter()
        for batch in global_batches(count, self.batch_size, 0, self.epochs):
            own = torch.from_numpy(batch[own_part(self.comm.rank, self.comm.size, len(batch))])
            total += self._step(self.x[own], self.y[own]) * len(own)
        seconds = self.comm.allreduce(perf_counter() - begin, MPI.MAX)
        return seconds, self.comm.allreduce(float(total)) / count

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One step; the mean loss of these samples, before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss: Any = torch.nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        mean: torch.Tensor = loss.detach()
        return mean


def perceptron(model: Sequential) -> torch.nn.Sequential:
    """The same layers, with copies of the same weights."""
    layers: list[torch.nn.Module] = [torch.nn.Flatten()]
    pairs: Sequence[Any] = list(zip(model.parameter_views[::2], model.parameter_views[1::2], strict=True))
    for number, (weight, bias) in enumerate(pairs, start=1):
        linear = torch.nn.Linear(*weight.shape)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(weight.T))
            linear.bias.copy_(torch.from_numpy(bias))
        layers += [linear, torch.nn.ReLU()] if number < len(pairs) else [linear]
    return torch.nn.Sequential(*layers)
