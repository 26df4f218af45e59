"""A model: layers one after the other, with all parameters in one vector and all gradients in another.

The layers hold views of the two. So one broadcast synchronises a whole model, gradients need no packing, and
an optimizer works on vectors. First come all parameters, in the order of layers, then all statistics:

    [0.weight | 0.bias | 1.weight | 1.bias | 3.weight | ...         | 1.mean | 1.variance | ...]
     <------------------- the optimizer's ------------------------>  <------ statistics ------>
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from mpicoll.train.arrays import Array
from mpicoll.train.layers import EVALUATION, Context, Layer, Shape
from mpicoll.train.seeds import random_stream
from mpicoll.train.tensors import Tensors

Saved = list[Any]


class Sequential:
    """Layers one after the other.

    ``allocate(count, dtype)`` makes the two vectors, and so says where the model lives: ``numpy.zeros``,
    ``cupy.zeros``, or a communicator's ``alloc``. ``numbers`` are the layers' numbers where they are a part
    of a larger model: names and first values go by them. Without ``input_gradient`` nobody needs the dx of
    the first layer that learns, nor what comes before it, and so they are not computed.
    """

    def __init__(
        self,
        *layers: Layer,
        seed: int = 0,
        dtype: npt.DTypeLike = np.float32,
        allocate: Callable[[int, npt.DTypeLike], Array] = np.zeros,
        numbers: Sequence[int] | None = None,
        input_gradient: bool = True,
    ):
        self.layers = layers = tuple(map(copy.copy, layers))  # another model may be made of the same ones
        learning = (k for k, layer in enumerate(layers) if layer.shapes)
        self._first = 0 if input_gradient else next(learning, len(layers))
        if not input_gradient and self._first < len(layers):
            layers[self._first].is_first = True
        for layer, number in zip(layers, numbers or range(len(layers)), strict=True):
            layer.number = number
        slots = _slots(layers)
        self.shapes = [layers[a].shapes[b] for a, b in slots]
        self.placements = [layers[a].placements[b] for a, b in slots]
        self.names = [f"{layers[a].number}.{layers[a].names[b]}" for a, b in slots]
        sizes = [math.prod(shape) for shape in self.shapes]
        trained = sum(len(layer.shapes) - layer.statistics for layer in layers)
        self.tensors = Tensors.of(self.shapes, trained)

        self.parameters = allocate(sum(sizes), dtype)
        self.gradients = allocate(sum(sizes), dtype)
        self.gradients[...] = 0
        self.parameter_views = views(self.parameters, self.shapes)
        self.gradient_views = views(self.gradients, self.shapes)
        self._indices = [[i for i, (a, _) in enumerate(slots) if a == k] for k in range(len(layers))]
        for layer, own in zip(layers, self._indices, strict=True):
            layer.bind([self.parameter_views[i] for i in own], [self.gradient_views[i] for i in own])
            layer.initialise(random_stream(seed, "parameters", layer.number))

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Saved]:
        """The last layer's y, and what `backward` needs."""
        saved = []
        for layer in self.layers:
            x, kept = layer.forward(x, context)
            saved.append(kept)
        return x, saved

    def backward(
        self,
        dy: Array,
        saved: Saved,
        ready: Callable[[int], None] = lambda i: None,
        add: bool = False,
    ) -> Array:
        """The first layer's dx, if there is an ``input_gradient``; fills ``gradients``, or adds to them.

        ``ready(i)`` is called when ``gradient_views[i]`` is complete.
        """
        for k in reversed(range(self._first, len(self.layers))):
            layer, own, kept = self.layers[k], self._indices[k], saved[k]
            before = [self.gradient_views[i].copy() for i in own] if add else []
            dy = layer.backward(dy, kept)
            for i, sum_before in zip(own, before, strict=False):
                self.gradient_views[i][...] += sum_before
            for i in reversed(own):
                ready(i)
        return dy


def _slots(layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """(layer, which of its shapes) in the order of the vectors: parameters first, statistics last."""
    every = [(a, b) for a, layer in enumerate(layers) for b in range(len(layer.shapes))]
    return sorted(every, key=lambda slot: slot[1] >= len(layers[slot[0]].shapes) - layers[slot[0]].statistics)


def views(flat: Array, shapes: Sequence[Shape]) -> list[Array]:
    """Consecutive pieces of ``flat`` in these shapes."""
    bounds = np.cumsum([0, *(math.prod(shape) for shape in shapes)]).tolist()
    return [flat[a:b].reshape(shape) for (a, b), shape in zip(pairwise(bounds), shapes, strict=True)]
