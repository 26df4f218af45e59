"""Steps of DistributedDataParallel: over mpicoll, over gloo, and without communication.

The three begin with the same parameters and see the same samples, which differ from rank to rank. What a step
takes longer than one without communication (`no_sync`) is communication that the backward pass does not hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mpicoll import Communicator

from .jobs import say
from .timing import no_collection, warm_turn
from .torch_calls import GLOO, OURS, groups

ALONE = "no_sync"
SEED = 8
RATE = 0.01
WARMUP = 3  # steps: DDP divides gradients into buckets anew after the first
TOLERANCE = 1e-3  # relative, between gradients and losses: float32, and sums in other orders

Facts = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What is trained: ``batch`` samples of ``shape`` on each rank, in ``steps`` steps of a turn."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    batch: int
    steps: int


def perceptron(width: int = 256, depth: int = 10) -> nn.Module:
    """``depth`` layers of ``width`` neurons."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):  # type: ignore[misc]  # torch is typed as Any
    """Two convolutions, and a way around them."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(channels, filters, 3, stride), nn.ReLU(), *_convolution(filters, filters, 3, 1)
        )
        same = channels == filters and stride == 1
        self.around = nn.Identity() if same else nn.Sequential(*_convolution(channels, filters, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.around(x))


def _convolution(channels: int, filters: int, side: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, filters, side, stride, padding=side // 2, bias=False)
    return [convolution, nn.BatchNorm2d(filters)]


def resnet18() -> nn.Module:
    """He et al. 2015, arXiv 1512.03385: 11.7 million parameters."""
    layers = [*_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    channels = 64
    for filters in (64, 128, 256, 512):
        layers += [Block(channels, filters, 1 if filters == 64 else 2), Block(filters, filters, 1)]
        channels = filters
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


TASKS = {
    "MLP, 10 layers of 256": Task(perceptron, (256,), classes=256, batch=32, steps=10),
    # Small images: a step of a large one takes seconds on a core.
    "ResNet-18, 64 × 64 pixels": Task(resnet18, (3, 64, 64), classes=1000, batch=32, steps=1),
    "ResNet-18, few samples": Task(resnet18, (3, 64, 64), classes=1000, batch=8, steps=1),
}


class Replica:
    """A model under DDP over ``group``, with its optimizer, on this rank's samples; collective."""

    def __init__(self, task: Task, rank: int, group: Any, synchronised: bool) -> None:
        torch.manual_seed(SEED)
        # Gradients are views of DDP's buckets, which saves a copy.
        self.model = DistributedDataParallel(task.model(), process_group=group, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        self._synchronised = synchronised
        own = torch.Generator().manual_seed(SEED + 1 + rank)
        self._x = torch.randn(task.batch, *task.shape, generator=own)
        self._y = torch.randint(task.classes, (task.batch,), generator=own)
        self.loss = torch.zeros(())

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with nullcontext() if self._synchronised else self.model.no_sync():
            self.loss = nn.functional.cross_entropy(self.model(self._x), self._y)
            self.loss.backward()
        self.optimizer.step()

    def gradients(self) -> torch.Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])


def measured(comm: Communicator, turns: int) -> Iterator[Facts]:
    """A row for each of `TASKS`: microseconds of a step, the median over the turns; collective."""
    with groups(comm) as found:
        for name, task in TASKS.items():
            say(comm, f"{name}: {turns} turns of {task.steps} step{'s' * (task.steps != 1)} of each")
            yield {"model": name, **_measured(MPI.Intracomm(comm), task, found, turns)}


def _measured(comm: MPI.Intracomm, task: Task, found: dict[str, Any], turns: int) -> Facts:
    replicas = {
        OURS: Replica(task, comm.rank, found[OURS], True),
        GLOO: Replica(task, comm.rank, found[GLOO], True),
        ALONE: Replica(task, comm.rank, found[OURS], False),
    }
    for replica in replicas.values():
        replica.step()
    ours, theirs = (replicas[name].gradients() for name in (OURS, GLOO))
    gradients_differ = float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))
    seconds = _take_turns(comm, list(replicas.values()), task.steps, turns)
    ours, theirs = (replicas[name].loss.detach() for name in (OURS, GLOO))
    losses_differ = float(abs(ours - theirs) / abs(theirs))
    micros = dict(zip(replicas, (np.median(seconds, axis=0) * 1e6).tolist(), strict=True))
    return {
        "parameters": sum(parameter.numel() for parameter in replicas[OURS].model.parameters()),
        "batch": task.batch,
        **micros,
        "gloo_ratio": micros[GLOO] / micros[OURS],
        "not_hidden": 1 - micros[ALONE] / micros[OURS],
        "gloo_not_hidden": 1 - micros[ALONE] / micros[GLOO],
        "gradients_differ": _largest(comm, gradients_differ),
        "losses_differ": _largest(comm, losses_differ),
        "turns": dict(zip(replicas, (seconds.T * 1e6).tolist(), strict=True)),
    }


def _take_turns(comm: MPI.Intracomm, replicas: Sequence[Replica], steps: int, turns: int) -> Any:
    """Seconds of a step [turns, replicas], of the slowest rank."""
    for replica in replicas:
        for _ in range(WARMUP):
            replica.step()
    with no_collection():
        seconds = np.array(
            [[warm_turn(comm, replica.step, steps) for replica in replicas] for _ in range(turns)]
        )
    comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
    return seconds


def _largest(comm: MPI.Intracomm, difference: float) -> float:
    """Of all ranks' differences; NaN if one is."""
    return float(np.max(comm.allgather(difference)))
