"""Tensor parallelism: each layer's parameters, and its work, divided over ranks that have the same samples.

    layers, numbers = parallel_layers([Linear(64, 128), ReLU(), Linear(128, 10)], comm)
    model = Sequential(*layers, numbers=numbers)

computes on the ranks of ``comm`` together what the given layers compute: the same y and dx on every rank, and
of the gradients each rank its slices. Every rank passes equal x and dy.

For each layer the first way is taken that works on values as they come, or else on whole values:

    Linear               weights split into columns, or into rows: whichever goes with x
    ELEMENTWISE layers   on the values that are there
    other layers         on whole values

and what lies between follows from the layouts (`mpicoll.train.layouts`): so for Linear, ReLU, Linear

    x -> [f] -> x W0[:, t] + b0[t] -> ReLU -> h[t] W1[t, :] -> [g] -> + b1

where f is an allreduce of dx, and g one of y. Between the two the wide values are never in one place.

Cost for n samples, T ranks: 1/T of the parameters, gradients, optimizer state and products; an allreduce of
[n, inputs] (which the first pair need not have) and one of [n, outputs] for each such pair, and nothing for
the gradients of parameters. A last layer that is left over, split into columns, has its y gathered.

A rank may have an empty slice, where there are more ranks than columns.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from mpicoll.train.arrays import Array, array_module
from mpicoll.train.errors import InputError
from mpicoll.train.layers import (
    EVALUATION,
    GELU,
    Context,
    Dropout,
    Layer,
    Linear,
    Placement,
    ReLU,
    Tanh,
)
from mpicoll.train.layouts import (
    PRODUCTS,
    REPLICATED,
    Flow,
    Layout,
    Split,
    gradient_layout,
    linear,
    own_slice,
    redistribute,
    redistribution,
    unchanged,
)

COLUMNS, ROWS = Split(1), Split(0)  # of weights
FEATURES = Split(1)  # of values [n, features]
ELEMENTWISE = ReLU, GELU, Tanh, Dropout


class SplitLinear(Linear):
    """y = x W + b, with this rank's columns of W and elements of b, or with its rows of W and all of b.

    ``weight_layout``: COLUMNS, for x [n, inputs] and y [n, own outputs]; or ROWS, for x [n, own inputs] and a
    summand of y [n, outputs]. Of these b is added to rank 0's only, but all ranks have b, and the same
    gradient of it.
    """

    def __init__(self, inputs: int, outputs: int, weight_layout: Layout, comm: MPI.Intracomm):
        rows = own_slice(inputs, comm.rank, comm.size) if weight_layout == ROWS else slice(0, inputs)
        columns = own_slice(outputs, comm.rank, comm.size) if weight_layout == COLUMNS else slice(0, outputs)
        super().__init__(rows.stop - rows.start, columns.stop - columns.start)
        self._placements = (
            Placement((inputs, outputs), (rows, columns), split=True),
            Placement((outputs,), (columns,), split=weight_layout == COLUMNS),
        )
        self.adds_bias = weight_layout == COLUMNS or comm.rank == 0

    @property
    def placements(self) -> tuple[Placement, ...]:
        return self._placements

    def initialise(self, random: np.random.Generator) -> None:
        """The slices of what `Linear` begins with: all of it is made for that, for a moment, on the host."""
        whole = Linear(*self._placements[0].shape)
        values = [np.empty(placement.shape, self.weight.dtype) for placement in self._placements]
        whole.bind(values, values)
        whole.initialise(random)
        for own, value, placement in zip((self.weight, self.bias), values, self._placements, strict=True):
            own[...] = array_module(own).asarray(value[placement.index])

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Any]:
        self._expect(x, self.weight.shape[0])
        y = x @ self.weight
        if self.adds_bias:
            y += self.bias
        return y, x


class Redistribute(Layer):
    """y = x in another layout, and dx = dy in another; ``ahead`` and ``back`` are (before, after).

    ``length`` is that of the whole value along its split axis. ``bytes_sent`` is added up over all calls.
    """

    def __init__(
        self, comm: MPI.Intracomm, ahead: tuple[Layout, Layout], back: tuple[Layout, Layout], length: int
    ):
        self.comm = comm
        self.ahead = ahead
        self.back = back
        self.length = length
        self.collectives = redistribution(*ahead), redistribution(*back)
        self.bytes_sent = 0.0

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Any]:
        return self._redistribute(x, self.ahead), None

    def backward(self, dy: Array, saved: Any) -> Array:
        return self._redistribute(dy, self.back)

    def _redistribute(self, value: Array, layouts: tuple[Layout, Layout]) -> Array:
        value, nbytes = redistribute(self.comm, value, *layouts, length=self.length)
        self.bytes_sent += nbytes
        return value


def parallel_layers(
    layers: Sequence[Layer],
    comm: MPI.Intracomm,
    numbers: Sequence[int] | None = None,
    input_gradient: bool = True,
) -> tuple[list[Layer], list[int]]:
    """This rank's layers for the same model on all ranks of ``comm``, and the number of each.

    ``numbers`` are those of the given ``layers``, which stay as they are; without, these count from 0. A
    `Redistribute` that is put in has the number of the layer before which it comes (the last one, of the
    layer after which).

    Without ``input_gradient`` nothing is sent for the first layers' dx, which no parameter's gradient depends
    on: the model's dx is then of no use, as it need not be where the model's x are samples. Raises
    `InputError`.
    """
    numbers = range(len(layers)) if numbers is None else numbers
    if len(numbers) != len(layers):
        raise InputError(f"numbers: expected one for each of the {len(layers)} layers, got {len(numbers)}")
    own: list[tuple[int, Layer]] = []
    y: Layout = REPLICATED
    length = 0  # of the features, where y is split
    for layer, number in zip(layers, numbers, strict=True):
        flow = layouts_of(layer, y)
        if type(layer) is Linear and flow.x == FEATURES and layer.shapes[0][0] != length:
            raise InputError(
                f"layers: expected layer {number} to be Linear({length}, ...), as the layers before it give "
                f"{length} features; got Linear({layer.shapes[0][0]}, ...)"
            )
        dx = flow.dx if input_gradient else gradient_layout(y)
        own += [(number, between) for between in _between(comm, y, flow.x, dx, length)]
        own.append((number, _own_part(layer, flow, length, comm)))
        y, length = flow.y, layer.shapes[0][1] if type(layer) is Linear else length
        input_gradient = input_gradient or bool(layer.shapes)
    own += [(numbers[-1], between) for between in _between(comm, y, REPLICATED, REPLICATED, length)]
    return [layer for _, layer in own], [number for number, _ in own]


def layouts_of(layer: Layer, y: Layout) -> Flow:
    """How ``layer`` computes, where the layer before gives its output in layout ``y``."""
    return [*_ways(layer, y), *_ways(layer, REPLICATED)][0]


def _ways(layer: Layer, x: Layout) -> list[Flow]:
    """In which ways a layer can compute on x in this layout, if it can."""
    if type(layer) is Linear:
        return [linear(x, w) for w in (COLUMNS, ROWS) if (x, w) in PRODUCTS]
    takes = (REPLICATED, FEATURES) if type(layer) in ELEMENTWISE else (REPLICATED,)
    return [unchanged(x)] if x in takes else []


def _between(comm: MPI.Intracomm, y: Layout, x: Layout, dx: Layout, length: int) -> list[Layer]:
    """From one layer's y to the next one's x, and from this one's dx to the first one's dy."""
    if redistribution(y, x) == redistribution(dx, gradient_layout(y)) == "nothing":
        return []
    return [Redistribute(comm, (y, x), (dx, gradient_layout(y)), length)]


def _own_part(layer: Layer, flow: Flow, length: int, comm: MPI.Intracomm) -> Layer:
    if type(layer) is Linear:
        inputs, outputs = layer.shapes[0]
        return SplitLinear(inputs, outputs, flow.w, comm)
    own = copy.copy(layer)
    if isinstance(own, Dropout) and flow.x == FEATURES:
        own.first_feature = own_slice(length, comm.rank, comm.size).start
    return own
