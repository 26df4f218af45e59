"""Which tensors lie where in a vector of parameters, and their norms, wherever the rest of them lies.

A rank may hold a whole model, a shard of its vector (cut anywhere), or its slices of tensors that are split
over ranks. The sum of a tensor's squares is that of its parts, each counted once:

    squares[i] = sum over ranks of  weight[i] |own part of tensor i|²

with weight 1, or 1/k for a tensor that k ranks hold alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.train.arrays import Array, array_module, on_host
from mpicoll.train.layers import Shape

Squares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tensors:
    """``bounds`` says where each tensor begins and ends in a vector; the first ``trained`` are parameters.

    The others are statistics, and have no part in norms. ``ndims``: each tensor's dimensions. Squares are
    summed over ``comms``, one after the other; these tensors are those from ``offset`` on of ``total`` there.
    """

    bounds: tuple[tuple[int, int], ...]
    ndims: tuple[int, ...]
    trained: int
    weights: tuple[float, ...]
    comms: tuple[MPI.Intracomm, ...] = ()
    offset: int = 0
    total: int = 0

    @classmethod
    def of(cls, shapes: Sequence[Shape], trained: int) -> Tensors:
        """Those of a whole model."""
        ends = np.cumsum([0, *(math.prod(shape) for shape in shapes)]).tolist()
        bounds = tuple(pairwise(ends))
        return cls(bounds, tuple(map(len, shapes)), trained, (1.0,) * trained, total=trained)

    @property
    def trainable(self) -> int:
        """How many elements, the first ones, are parameters."""
        return self.bounds[self.trained - 1][1] if self.trained else 0

    def cut(self, begin: int, end: int, comm: MPI.Intracomm) -> Tensors:
        """The elements from ``begin`` to ``end``, where the ranks of ``comm`` have the other ones."""
        bounds = np.clip(self.bounds, begin, end) - begin
        return replace(self, bounds=tuple(map(tuple, bounds.tolist())), comms=(comm, *self.comms))

    def squares(self, vector: Array) -> Squares:
        """The sum of squares of each parameter tensor [trained]; collective over ``comms``."""
        return self._everywhere(vector)[self.offset : self.offset + self.trained]

    def norm(self, vector: Array) -> float:
        """The norm of all parameters of the model, also of those that this rank has no part of."""
        return math.sqrt(math.fsum(self._everywhere(vector)))

    def _own(self, vector: Array) -> Squares:
        """Of this rank's parts [trained]; from a GPU they come all at once."""
        xp = array_module(vector)
        parts = [vector[begin:end] for begin, end in self.bounds[: self.trained]]
        return on_host(xp.stack([xp.vdot(part, part) for part in parts])).astype(np.float64)

    def _everywhere(self, vector: Array) -> Squares:
        every = np.zeros(self.total)
        if self.trained:
            every[self.offset : self.offset + self.trained] = self.weights * self._own(vector)
        for comm in self.comms:
            comm.Allreduce(MPI.IN_PLACE, every)
        return every
