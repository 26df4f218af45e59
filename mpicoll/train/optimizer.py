"""Optimizers: from a gradient to new parameters, both flat vectors: a whole model's, or a shard's."""

from __future__ import annotations

from typing import Protocol

from mpicoll.train.model import Array, array_module


class Optimizer(Protocol):
    """What a strategy asks of an optimizer."""

    def step(self, gradients: Array) -> None:
        """Update the parameters in place."""


class SGD:
    """Stochastic gradient descent with momentum (Polyak 1964), w the parameters and g their gradient:

        v = momentum v + g
        w = w - learning_rate v

    Every step is elementwise and starts from v = 0: ranks with equal w and g stay equal, bit for bit.
    """

    def __init__(self, parameters: Array, learning_rate: float, momentum: float = 0.9):
        self.parameters = parameters
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.velocity = array_module(parameters).zeros_like(parameters)

    def step(self, gradients: Array) -> None:
        """Update the parameters in place."""
        self.velocity *= self.momentum
        self.velocity += gradients
        self.parameters -= self.learning_rate * self.velocity
