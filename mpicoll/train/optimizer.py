"""Optimizers: from a gradient to new parameters, both flat vectors: a whole model's, or a shard's."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

from mpicoll.train.model import Array, array_module


class Optimizer(Protocol):
    """What a strategy asks of an optimizer."""

    def step(self, gradients: Array) -> None:
        """Update the parameters in place."""


class SGD:
    """Stochastic gradient descent with momentum (Polyak 1964), w the parameters and g their gradient:

        v = momentum v + g
        w = w - learning_rate v

    in one pass over memory. Every step is elementwise and starts from v = 0: ranks with equal w and g stay
    equal, bit for bit.
    """

    def __init__(self, parameters: Array, learning_rate: float, momentum: float = 0.9):
        self.parameters = parameters
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.velocity = array_module(parameters).zeros_like(parameters)
        self._gradients: Array | None = None
        self._update: Any = None

    def step(self, gradients: Array) -> None:
        """Update the parameters in place."""
        if gradients is not self._gradients:
            self._gradients = gradients
            self._update = _kernels(gradients).Update(gradients, [self.parameters], [self.velocity])
        self._update.step(self.learning_rate, self.momentum)


def _kernels(array: Array) -> Any:
    """The module of kernels for the device that an array is on."""
    device = "_cuda" if array_module(array).__name__ == "cupy" else ""
    return import_module(f"mpicoll.kernels.packing{device}")
