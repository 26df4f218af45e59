"""Data sets, and who works on which samples.

Every rank holds the whole data set and draws the same order of samples for every epoch. Each *global* batch
is then cut into one part per rank, as even as it goes: the union of the parts is the same at any rank
count, so that 1 rank and 100 ranks take the same steps. A part may be empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.schedule import chunk_bounds
from mpicoll.train.errors import InputError
from mpicoll.train.model import Array, array_module
from mpicoll.train.seeds import random_stream

TEST_FRACTION = 0.2

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples to learn from and samples to test with, along the first axis of each array.

    ``x`` is float32. ``y`` holds class numbers [n] from 0 to ``classes`` - 1, or, with ``classes`` = 0, the
    float32 values [n, outputs] to predict.
    """

    name: str
    classes: int
    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array

    @property
    def inputs(self) -> int:
        """Numbers per sample."""
        return int(np.prod(self.train_x.shape[1:]))

    @property
    def outputs(self) -> int:
        """What a model has to put out: a score per class, or the values."""
        return self.classes or int(self.train_y.shape[1])

    def beside(self, other: Array) -> Dataset:
        """The same data where ``other`` is: in the host's memory or a GPU's."""
        xp = array_module(other)
        return replace(self, **{name: xp.asarray(array) for name, array in _arrays(self).items()})


def _arrays(data: Dataset) -> dict[str, Array]:
    values = {field.name: getattr(data, field.name) for field in fields(data)}
    return {name: value for name, value in values.items() if hasattr(value, "dtype")}


def split(name: str, classes: int, x: Array, y: Array, seed: int) -> Dataset:
    """Put a random fifth of the samples (at least one) aside to test with."""
    if len(x) < 2:
        raise InputError(f"{name}: expected at least 2 samples, to train and to test with, found {len(x)}")
    order = random_stream(seed, "split").permutation(len(x))
    test_count = max(1, round(TEST_FRACTION * len(x)))
    test, train = order[:test_count], order[test_count:]
    return Dataset(name, classes, x[train], y[train], x[test], y[test])


def standardise(train: Array, test: Array, axis: int | None) -> tuple[Array, Array]:
    """Both with the training samples' mean taken away and over their standard deviation, as float32.

    ``axis`` 0: each feature by itself; None: one mean and deviation for all, as for an image's pixels. What
    never varies becomes 0. The test samples have no say, or the test would not be one.
    """
    dtype = np.result_type(train, np.float32)  # float64 for a table; a large set of images has bytes
    mean = train.mean(axis=axis, dtype=dtype)
    deviation = train.std(axis=axis, dtype=dtype)
    scale = (1 / np.where(deviation > 0, deviation, 1)).astype(dtype)
    return ((train - mean) * scale).astype(np.float32), ((test - mean) * scale).astype(np.float32)


def global_batches(count: int, batch_size: int, seed: int, epoch: int) -> Iterator[Indices]:
    """An epoch's batches of sample numbers, the same on every rank; the last may be smaller."""
    order = random_stream(seed, "shuffle", epoch).permutation(count)
    return (order[start : start + batch_size] for start in range(0, count, batch_size))


def own_part(rank: int, nranks: int, count: int) -> slice:
    """Which of ``count`` samples, a global batch or the test set, ``rank`` works on."""
    bounds = chunk_bounds(count, nranks)
    return slice(int(bounds[rank]), int(bounds[rank + 1]))


def share(comm: MPI.Intracomm, data: Dataset | None) -> Dataset:
    """Rank 0's ``data`` (the others pass None) on every rank."""
    header: dict[str, Any] = {}
    if data is not None:
        arrays = {name: np.ascontiguousarray(array) for name, array in _arrays(data).items()}
        header = {"name": data.name, "classes": data.classes}
        header |= {name: (array.shape, array.dtype.str) for name, array in arrays.items()}
    header = comm.bcast(header, root=0)
    if data is None:
        arrays = {name: np.empty(*form) for name, form in header.items() if isinstance(form, tuple)}
    for array in arrays.values():
        comm.Bcast(array, root=0)
    return Dataset(header["name"], header["classes"], **arrays)
