"""Strategies: how ranks that hold parts of a batch arrive at new parameters. One file of equations each."""

from __future__ import annotations

from typing import Protocol

from mpicoll.train.strategies.allreduce import AllreduceStrategy


class Strategy(Protocol):
    """What the training loop asks of a strategy.

    Between ``start`` and the end every rank's ``model.gradients`` holds, before each ``step``, its own
    samples' gradients divided by the size of the *global* batch: their sum over ranks is the mean gradient
    of the batch, however unevenly its samples are spread.
    """

    name: str

    def start(self) -> None:
        """Before the first step: all ranks begin with rank 0's parameters."""

    def ready(self, i: int) -> None:
        """In the backward pass, when ``model.gradient_views[i]`` is complete."""

    def step(self) -> None:
        """From every rank's ``model.gradients`` to new ``model.parameters``."""


__all__ = ["AllreduceStrategy", "Strategy"]
