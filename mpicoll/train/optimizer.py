"""Optimizers: from a gradient to new parameters, both flat vectors: a whole model's, or a shard's.

An optimizer is bound to the vector that it updates, and then holds as much state as that is long. Vocabulary
of the equations: w the parameters, g their gradient, r the learning rate, d the weight decay, t the step from
1. Every step is elementwise, but for norms, which are those of whole tensors, wherever their parts lie (see
`mpicoll.train.tensors`): ranks with equal w and g stay equal, bit for bit.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mpicoll.train.arrays import Array, array_module
from mpicoll.train.tensors import Tensors


class Optimizer:
    """What a strategy asks of an optimizer. ``vectors`` are the names of its state.

    ``clip_norm`` scales gradients whose norm, over all tensors together, is larger down to it.
    """

    vectors: tuple[str, ...] = ()

    def __init__(self, weight_decay: float = 0.0, clip_norm: float | None = None):
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        self.steps = 0

    def bind(self, parameters: Array, tensors: Tensors) -> None:
        """Take the vector to update, and what lies where in it; the state becomes zeros."""
        self.tensors = tensors
        self.parameters, self.statistics = parameters[: tensors.trainable], parameters[tensors.trainable :]
        self.state = {name: array_module(parameters).zeros_like(self.parameters) for name in self.vectors}

    def step(self, gradients: Array, rate: float) -> None:
        """Update the parameters in place, and the statistics; ``gradients`` may be scaled."""
        self.steps += 1
        trained = gradients[: self.tensors.trainable]
        if self.clip_norm is not None:
            norm = self.tensors.norm(trained)
            if norm > self.clip_norm:
                trained *= self.clip_norm / norm
        self.update(trained, rate)
        self.statistics -= gradients[self.tensors.trainable :]

    def update(self, g: Array, rate: float) -> None:
        """One step of the equations."""
        raise NotImplementedError


class SGD(Optimizer):
    """Stochastic gradient descent with momentum m (Polyak 1964; Nesterov as Sutskever et al., ICML 2013):

        g = g + d w
        v = m v + g
        w = w - r v                     or, with ``nesterov``, r (g + m v)

    in one pass over memory.
    """

    vectors = ("velocity",)

    def __init__(
        self,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ):
        super().__init__(weight_decay, clip_norm)
        self.momentum = momentum
        self.nesterov = nesterov

    def bind(self, parameters: Array, tensors: Tensors) -> None:
        super().bind(parameters, tensors)
        self._address = -1  # of no gradient
        self._fused: Any = None

    def update(self, g: Array, rate: float) -> None:
        address = _address(g)
        if address != self._address:
            self._address = address
            self._fused = _kernels(g).Update(g, [self.parameters], [self.state["velocity"]])
        self._fused.step(rate, self.momentum, self.weight_decay, self.nesterov)


class Adam(Optimizer):
    """Adam (Kingma, Ba, ICLR 2015):

    g = g + d w
    m = b1 m + (1 - b1) g,     v = b2 v + (1 - b2) g²
    w = w - r (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)
    """

    vectors = ("mean", "square")

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ):
        super().__init__(weight_decay, clip_norm)
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon

    def update(self, g: Array, rate: float) -> None:
        xp = array_module(g)
        if self.weight_decay:
            g += self.weight_decay * self.parameters
        mean, square = self.state["mean"], self.state["square"]
        mean *= self.beta1
        mean += (1 - self.beta1) * g
        g *= g
        square *= self.beta2
        square += (1 - self.beta2) * g
        length = rate / (1 - self.beta1**self.steps)
        root = xp.sqrt(square / (1 - self.beta2**self.steps))
        root += self.epsilon
        self.parameters -= length * mean / root


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman, Ginsburg, arXiv:1708.03888), for each tensor:

    q = trust |w| / (|g| + d |w|)          1 for tensors of one dimension, and where a norm is 0
    v = m v + q r (g + d w)                d = 0 for tensors of one dimension
    w = w - v
    """

    vectors = ("velocity",)

    def __init__(
        self,
        momentum: float = 0.9,
        trust: float = 0.001,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ):
        super().__init__(weight_decay, clip_norm)
        self.momentum, self.trust = momentum, trust

    def update(self, g: Array, rate: float) -> None:
        tensors, velocity = self.tensors, self.state["velocity"]
        w_norms, g_norms = tensors.squares(self.parameters) ** 0.5, tensors.squares(g) ** 0.5
        velocity *= self.momentum
        for i, (begin, end) in enumerate(tensors.bounds[: tensors.trained]):
            part = slice(begin, end)
            w, adapts = self.parameters[part], tensors.ndims[i] > 1
            decay = self.weight_decay if adapts else 0.0
            length = g_norms[i] + decay * w_norms[i]
            ratio = self.trust * w_norms[i] / length if adapts and w_norms[i] > 0 and length > 0 else 1.0
            velocity[part] += float(ratio * rate) * (g[part] + decay * w)
        self.parameters -= velocity


def _address(array: Array) -> int:
    interface = getattr(array, "__cuda_array_interface__", None) or array.__array_interface__
    return int(interface["data"][0])


def _kernels(array: Array) -> Any:
    """The module of kernels for the device that an array is on."""
    device = "_cuda" if array_module(array).__name__ == "cupy" else ""
    return import_module(f"mpicoll.kernels.packing{device}")
