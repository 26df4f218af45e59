"""Data sets: samples to learn from and to test with, and how every rank comes by them.

Every rank can take any sample. What is small is sent by rank 0 and held in every rank's memory; what lies in
NumPy files is mapped by every rank (`mapped`). Which samples a rank works on is `sampling`'s business.

    standardised x = (x - mean) scale,   scale = 1 / deviation, both over the training samples

is computed in advance where x is in memory anyway, and batch by batch, by the data set's ``transform``, where
x is mapped or would be four times as large.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.train.arrays import Array, array_module, beside
from mpicoll.train.errors import InputError
from mpicoll.train.mapped import Mapped, Rows, blocks, open_mapped
from mpicoll.train.seeds import random_stream

TEST_FRACTION = 0.2
ARRAYS = "train_x", "train_y", "test_x", "test_y"  # of a Dataset
ROUNDING = 8 * float(np.finfo(np.float64).eps)  # times the mean: a deviation that rounding may leave


@dataclass(frozen=True, eq=False)
class Transform:
    """(x - mean) scale, as float32; ``mean`` and ``scale`` are single numbers or one per feature."""

    mean: Array
    scale: Array

    def __call__(self, x: Array) -> Array:
        xp = array_module(x)
        dtype = np.result_type(x.dtype, np.float32)  # float64 for a table; a large set of images has bytes
        mean, scale = xp.asarray(self.mean, dtype), xp.asarray(self.scale, dtype)
        return ((x - mean) * scale).astype(np.float32)


def fitted(samples: Iterable[Array], axis: int | None) -> Transform:
    """The transform to mean 0 and deviation 1 of all samples in ``samples``, arrays [n, ...] of one shape.

    ``axis`` 0: each feature by itself; None: one mean and deviation for all, as for an image's pixels. What
    never varies becomes 0.

    With n_a samples before and n_b in the next block, delta the difference of their means, and M the sums of
    squared distances from the mean (T. Chan, G. Golub, R. LeVeque, 1979):

        mean = mean_a + delta n_b / n,   M = M_a + M_b + delta^2 n_a n_b / n
    """
    count, mean, squares = 0, np.float64(0), np.float64(0)
    for block in samples:
        added = len(block) if axis == 0 else block.size
        block_mean = block.mean(axis=axis, dtype=np.float64)
        delta = block_mean - mean
        total = count + added
        squares = squares + ((block - block_mean) ** 2).sum(axis=axis) + delta**2 * (count * added / total)
        mean, count = mean + delta * (added / total), total
    deviation = np.sqrt(squares / count)
    varies = deviation > ROUNDING * np.abs(mean)
    return Transform(np.asarray(mean), np.asarray(1 / np.where(varies, deviation, 1)))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples to learn from and samples to test with, along the first axis of each array.

    ``x`` [n, ...] is float32, or whatever ``transform`` makes float32 of; mapped arrays stay on the host.
    ``y`` holds class numbers [n] from 0 to ``classes`` - 1, or, with ``classes`` = 0, the float32 values
    [n, outputs] to predict. ``black`` is what a pixel of 0 has become in a batch.
    """

    name: str
    classes: int
    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array
    transform: Transform | None = None
    black: float = 0.0

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one sample: (features,), (height, width) or (channels, height, width)."""
        return tuple(self.train_x.shape[1:])

    @property
    def is_mapped(self) -> bool:
        """Whether a batch of training samples is read from a file."""
        return _is_mapped(self.train_x)

    @property
    def inputs(self) -> int:
        """Numbers per sample."""
        return math.prod(self.sample_shape)

    @property
    def outputs(self) -> int:
        """What a model has to put out: a score per class, or the values."""
        return self.classes or int(self.train_y.shape[1])

    def read(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """What a file has for `train_batch`, where samples are mapped; any thread may read it."""
        x: npt.NDArray[Any] = _taken(self.train_x, indices)
        return x

    def train_batch(
        self, indices: npt.NDArray[np.int64], read: npt.NDArray[Any] | None = None
    ) -> tuple[Array, Array]:
        """x and y of the training samples with these numbers [n], where ``y`` is: as they go into a model.

        ``read`` is what `read` has given for them, if it has been called.
        """
        x = _taken(self.train_x, indices) if read is None else read
        return self._batch(x, _taken(self.train_y, indices))

    def test_batch(self, part: slice) -> tuple[Array, Array]:
        """x and y of a part of the test samples."""
        return self._batch(_taken(self.test_x, part), _taken(self.test_y, part))

    def _batch(self, x: Array, y: Array) -> tuple[Array, Array]:
        x = beside(x, y)
        return (self.transform(x) if self.transform else x), y

    def beside(self, other: Array) -> Dataset:
        """The same data where ``other`` is: in the host's memory or a GPU's.

        What is mapped stays where it is; its batches come to ``other``.
        """
        xp = array_module(other)
        arrays = {name: getattr(self, name) for name in ARRAYS}
        moved = {name: xp.asarray(array) for name, array in arrays.items() if not _is_mapped(array)}
        transform = self.transform and Transform(
            xp.asarray(self.transform.mean), xp.asarray(self.transform.scale)
        )
        return replace(self, transform=transform, **moved)


def _taken(array: Array, which: Any) -> Array:
    if not isinstance(which, slice):
        which = array_module(array).asarray(which)
    return array[which]


def _is_mapped(array: Array) -> bool:
    """A whole file, or rows of one; a view of something mapped is an array like any other."""
    return isinstance(array, Rows) or (isinstance(array, np.memmap) and isinstance(array.base, mmap))


def check_labels(data: Dataset) -> None:
    """Raise `InputError` for a class number that is not whole or not from 0 to ``data.classes`` - 1."""
    if not data.classes:
        return
    for part, y in (("training", data.train_y), ("test", data.test_y)):
        bad = ~((y >= 0) & (y < data.classes) & (y == array_module(y).floor(y)))
        if bad.any():
            i = int(bad.argmax())
            raise InputError(
                f"{data.name}: expected labels that are whole numbers from 0 to {data.classes - 1}, "
                f"got {y[i]} for {part} sample {i}"
            )


# Preparation ------------------------------------------------------------------------------------------


def split_rows(name: str, count: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A random order of ``count`` samples, cut in two: those to train with, and a fifth to test with."""
    if count < 2:
        raise InputError(f"{name}: expected at least 2 samples, to train and to test with, found {count}")
    order = random_stream(seed, "split").permutation(count)
    test_count = max(1, round(TEST_FRACTION * count))
    return order[test_count:], order[:test_count]


def split(name: str, classes: int, x: Array, y: Array, seed: int) -> Dataset:
    """Put a random fifth of the samples (at least one) aside to test with."""
    train, test = split_rows(name, len(x), seed)
    return Dataset(name, classes, x[train], y[train], x[test], y[test])


def standardise(train: Array, test: Array, axis: int | None) -> tuple[Array, Array]:
    """Both with the training samples' mean taken away and over their standard deviation, as float32.

    ``axis`` as for `fitted`. The test samples have no say, or the test would not be one.
    """
    transform = fitted(blocks(train), axis)
    return transform(train), transform(test)


def scaled(data: Dataset, axis: int | None) -> Dataset:
    """``data`` with its x standardised, along ``axis`` as for `fitted`, and each value to predict by itself.

    So a mean squared error of 1 is that of always predicting the mean.
    """
    transform = fitted(blocks(data.train_x), axis)
    data = replace(data, train_x=transform(data.train_x), test_x=transform(data.test_x))
    if not data.classes:
        train_y, test_y = standardise(data.train_y, data.test_y, axis=0)
        return replace(data, train_y=train_y, test_y=test_y)
    return replace(data, black=black_of(transform))


def black_of(transform: Transform) -> float:
    """What ``transform`` makes of a pixel of 0; 0 where each feature has a transform of its own: no image."""
    return float(transform(np.zeros((), np.float32))) if transform.mean.ndim == 0 else 0.0


# To every rank ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """An array of rank 0: what the other ranks need to make room for it, or to map it themselves."""

    shape: tuple[int, ...]
    dtype: str
    path: Path | None  # of a mapped array's file
    rows: int | None  # how many of the file's are meant; None: all

    @staticmethod
    def of(array: Array) -> Form:
        if isinstance(array, Rows):
            return replace(Form.of(array.array), rows=len(array))
        path = Path(array.filename) if _is_mapped(array) else None
        return Form(tuple(array.shape), array.dtype.str, path, None)


def share(comm: MPI.Intracomm, data: Dataset | None) -> Dataset:
    """Rank 0's ``data`` (the others pass None) on every rank.

    Mapped files are mapped by every rank. Raises `InputError`, on every rank, where one of them cannot.
    """
    header: dict[str, Any] | None = None
    if data is not None:
        header = {
            "name": data.name,
            "classes": data.classes,
            "transform": data.transform,
            "black": data.black,
        }
        header |= {name: Form.of(getattr(data, name)) for name in ARRAYS}
    header = comm.bcast(header, root=0)
    forms: dict[str, Form] = {name: header.pop(name) for name in ARRAYS}
    maps = _mapped_by_all(comm, {name: form for name, form in forms.items() if form.path is not None})
    arrays = {
        name: _from_rank_zero(comm, form, maps.get(name), getattr(data, name) if data else None)
        for name, form in forms.items()
    }
    return Dataset(**header, **arrays)


def _mapped_by_all(comm: MPI.Intracomm, forms: dict[str, Form]) -> dict[str, Mapped]:
    """Every array of ``forms`` mapped by every rank, or an `InputError` on all of them."""
    maps: dict[str, Mapped] = {}
    problem = ""
    try:
        maps = {name: _mapped_as(form) for name, form in forms.items()}
    except InputError as error:
        problem = f"{error} (rank {comm.rank} on {MPI.Get_processor_name()})"
    problems: list[str] = list(filter(None, comm.allgather(problem)))
    if problems:
        raise InputError(
            f"{problems[0]}; {len(problems)} of {comm.size} ranks could not map the files: each opens "
            "them by itself, so put them where all can"
        )
    return maps


def _mapped_as(form: Form) -> Mapped:
    assert form.path is not None
    array = open_mapped(form.path)
    if (array.shape, array.dtype.str) != (form.shape, form.dtype):
        raise InputError(
            f"{form.path}: expected {form.dtype} of shape {form.shape}, as rank 0 has found, "
            f"got {array.dtype.str} of shape {array.shape}"
        )
    return array


def _from_rank_zero(
    comm: MPI.Intracomm, form: Form, mapped: Mapped | None, held: Array | Rows | None
) -> Array:
    if mapped is None:
        return _broadcast(comm, form.shape, form.dtype, held)
    if form.rows is None:
        return mapped
    numbers = held.numbers if isinstance(held, Rows) else None
    return Rows(mapped, _broadcast(comm, (form.rows,), "<i8", numbers))


def _broadcast(comm: MPI.Intracomm, shape: tuple[int, ...], dtype: str, held: Array | None) -> Array:
    array = np.empty(shape, dtype) if held is None else np.ascontiguousarray(held)
    comm.Bcast(array, root=0)
    return array
