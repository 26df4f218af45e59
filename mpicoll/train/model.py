"""Layers and losses, each as its equations; the same source for NumPy and CuPy arrays.

Vocabulary: ``x`` what goes into a layer, ``y = f(x)`` what comes out, ``dx`` and ``dy`` the loss's gradients
with respect to them. The first axis is always the sample. A batch may be empty: then a rank has no part in
it, and all its gradients are zero.

All parameters of a model lie in one flat vector and all gradients in another; the layers hold views of them.
So one broadcast synchronises a whole model, gradients need no packing, and an optimizer works on vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import islice, pairwise
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from mpicoll.train.seeds import random_stream

Array = Any  # numpy.ndarray or cupy.ndarray
Shape = tuple[int, ...]


def array_module(x: Array) -> ModuleType:
    """The module that ``x`` belongs to, numpy or cupy; both have the functions used here."""
    if type(x).__module__.partition(".")[0] == "cupy":
        return import_module("cupy")  # only where there are CuPy arrays is there CuPy
    return np


class Layer:
    """A function y = f(x; parameters). ``forward`` keeps what ``backward`` needs."""

    shapes: tuple[Shape, ...] = ()  # of the parameters
    names: tuple[str, ...] = ()

    def bind(self, parameters: Sequence[Array], gradients: Sequence[Array]) -> None:
        """Take these views, one per shape, as parameters and as the place for their gradients."""

    def initialise(self, random: np.random.Generator) -> None:
        """Give the parameters their first values."""

    def forward(self, x: Array) -> Array:
        """y = f(x)."""
        raise NotImplementedError

    def backward(self, dy: Array) -> Array:
        """dx; writes (not adds) the parameters' gradients, summed over samples, on the way."""
        raise NotImplementedError


class Linear(Layer):
    """y = x W + b, with x [n, inputs], W [inputs, outputs], b [outputs]."""

    def __init__(self, inputs: int, outputs: int):
        self.shapes = ((inputs, outputs), (outputs,))
        self.names = ("weight", "bias")

    def bind(self, parameters: Sequence[Array], gradients: Sequence[Array]) -> None:
        self.weight, self.bias = parameters
        self.weight_gradient, self.bias_gradient = gradients

    def initialise(self, random: np.random.Generator) -> None:
        """W ~ N(0, 2 / inputs): keeps the variance through ReLUs (He et al., ICCV 2015); b = 0."""
        inputs, outputs = self.weight.shape
        weight = random.standard_normal((inputs, outputs)) * math.sqrt(2 / inputs)
        self.weight[...] = array_module(self.weight).asarray(weight)
        self.bias[...] = 0

    def forward(self, x: Array) -> Array:
        self.x = x
        return x @ self.weight + self.bias

    def backward(self, dy: Array) -> Array:
        array_module(dy).matmul(self.x.T, dy, out=self.weight_gradient)
        dy.sum(axis=0, out=self.bias_gradient)
        return dy @ self.weight.T


class ReLU(Layer):
    """y = max(x, 0)."""

    def forward(self, x: Array) -> Array:
        self.positive = x > 0
        return array_module(x).maximum(x, 0)

    def backward(self, dy: Array) -> Array:
        return dy * self.positive


class Flatten(Layer):
    """[n, a, b, ...] to [n, a b ...]."""

    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        # Not reshape(n, -1): for an empty batch NumPy cannot tell what -1 stands for.
        return x.reshape(len(x), math.prod(x.shape[1:]))

    def backward(self, dy: Array) -> Array:
        return dy.reshape(self.shape)


class Sequential:
    """Layers one after the other, with all parameters in one vector and all gradients in another.

    ``allocate(count, dtype)`` makes the two vectors, and so says where the model lives: ``numpy.zeros``,
    ``cupy.zeros``, or a communicator's ``alloc``.
    """

    def __init__(
        self,
        *layers: Layer,
        seed: int = 0,
        dtype: npt.DTypeLike = np.float32,
        allocate: Callable[[int, npt.DTypeLike], Array] = np.zeros,
    ):
        shapes = [shape for layer in layers for shape in layer.shapes]
        count = sum(math.prod(shape) for shape in shapes)
        self.layers = layers
        self.parameters = allocate(count, dtype)
        self.gradients = allocate(count, dtype)
        self.gradients[...] = 0

        self.names = [f"{i}.{name}" for i, layer in enumerate(layers) for name in layer.names]
        self.gradient_views = views(self.gradients, shapes)

        parameters = iter(views(self.parameters, shapes))
        gradients = iter(self.gradient_views)
        random = random_stream(seed, "parameters")
        for layer in layers:
            n = len(layer.shapes)
            layer.bind(list(islice(parameters, n)), list(islice(gradients, n)))
            layer.initialise(random)

    def forward(self, x: Array) -> Array:
        """The last layer's y."""
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dy: Array, ready: Callable[[int], None] = lambda i: None) -> Array:
        """The first layer's dx; fills ``gradients``. ``ready(i)``: ``gradient_views[i]`` is full."""
        i = len(self.gradient_views)
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
            for _ in layer.shapes:
                i -= 1
                ready(i)
        return dy


def views(flat: Array, shapes: Sequence[Shape]) -> list[Array]:
    """Consecutive pieces of ``flat`` in these shapes."""
    bounds = np.cumsum([0, *(math.prod(shape) for shape in shapes)]).tolist()
    return [flat[a:b].reshape(shape) for (a, b), shape in zip(pairwise(bounds), shapes, strict=True)]


def perceptron(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    seed: int = 0,
    dtype: npt.DTypeLike = np.float32,
    allocate: Callable[[int, npt.DTypeLike], Array] = np.zeros,
) -> Sequential:
    """Linear layers of the ``hidden`` sizes with ReLUs between them, for samples of any shape."""
    sizes = [inputs, *hidden, outputs]
    layers: list[Layer] = [Flatten()]
    for n_in, n_out in pairwise(sizes):
        layers += [Linear(n_in, n_out), ReLU()]
    return Sequential(*layers[:-1], seed=seed, dtype=dtype, allocate=allocate)


# A loss takes the model's outputs [n, outputs] and the targets, and returns each sample's loss [n] and
# gradient [n, outputs]. They are not averaged: a rank sees its part of a batch only, not the batch's size.


def softmax_cross_entropy(outputs: Array, labels: Array) -> tuple[Array, Array]:
    """loss = -log p[label] with p = exp(outputs) / sum(exp(outputs)); gradient = p - onehot(label).

    ``labels`` [n] are class numbers from 0.
    """
    xp = array_module(outputs)
    shifted = outputs - outputs.max(axis=1, keepdims=True)  # the same p, and exp cannot overflow
    log_p = shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))
    own = (xp.arange(len(labels)), labels)
    losses = -log_p[own]
    gradient = xp.exp(log_p)
    gradient[own] -= 1
    return losses, gradient


def mean_squared_error(outputs: Array, targets: Array) -> tuple[Array, Array]:
    """loss = mean over k outputs of (output - target)²; gradient = 2 (output - target) / k.

    ``targets`` has the shape of ``outputs``, [n, k].
    """
    difference = outputs - targets
    return (difference**2).mean(axis=1), difference * (2 / difference.shape[1])
