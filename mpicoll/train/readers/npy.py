"""NumPy's ``.npy`` files: what is to be learned from may be larger than the memory.

x is mapped, and standardised batch by batch; y, a few bytes per sample, is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpicoll.train.data import Dataset, black_of, fitted, split_rows, standardise
from mpicoll.train.errors import InputError
from mpicoll.train.mapped import Rows, finite_blocks, open_mapped
from mpicoll.train.readers.files import as_text

AnyArray = npt.NDArray[Any]
Mapped = np.memmap[Any, Any]

NUMBERS = "fiub"  # kinds of dtypes: floats, whole numbers with and without sign, True and False
LABELS = [("i", 1), ("u", 1), ("b", 1), ("f", 2)]  # kinds and dimensions

TOGETHER = "x.npy", "y.npy"
APART = "train_x.npy", "train_y.npy", "test_x.npy", "test_y.npy"


def read_npy(directory: Path, seed: int = 0) -> Dataset:
    """``x.npy`` and ``y.npy``, of which a random fifth is put aside to test with, or the same two for each of
    training and test: ``train_x.npy``, ``train_y.npy``, ``test_x.npy``, ``test_y.npy``.

    x [n, ...] are numbers: [n, features], each feature standardised by itself, or images [n, height, width]
    or [n, channels, height, width], standardised by one mean and deviation. y are whole numbers [n], the
    classes from 0, or floats [n, outputs], values to predict, which are standardised, too.

    x stays in its files and must stay unchanged while it is used. Raises `InputError` for missing or damaged
    files, shapes and types other than these, numbers that are not finite, and labels that are no classes.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: expected a directory with .npy files; see --data-dir")
    name = f"npy:{directory}"
    train, test = _together(name, directory, seed) if _is_together(directory) else _apart(directory)
    classes = _class_count(train, test)
    if classes:
        train_y, test_y = train.y.astype(np.int64), test.y.astype(np.int64)
    else:
        train_y, test_y = standardise(train.y, test.y, axis=0)

    per_feature = len(train.x.shape) == 2
    transform = fitted(finite_blocks(str(train.x_path), train.x), axis=0 if per_feature else None)
    for _ in finite_blocks(str(test.x_path), test.x):
        pass
    return Dataset(name, classes, train.x, train_y, test.x, test_y, transform, black_of(transform))


@dataclass(frozen=True, eq=False)
class Part:
    """The training or the test samples, and where they come from."""

    x: Mapped | Rows
    y: AnyArray
    x_path: Path
    y_path: Path


def _is_together(directory: Path) -> bool:
    """One pair of files to be split, in place of two pairs."""
    together, apart = ([name for name in names if (directory / name).exists()] for names in (TOGETHER, APART))
    complete = len(together) == len(TOGETHER) or len(apart) == len(APART)
    if not complete or (together and apart):
        raise InputError(
            f"{directory}: expected either {' and '.join(TOGETHER)} or {', '.join(APART)} in it, "
            f"found {', '.join(together + apart) or 'none of them'}; see --data-dir"
        )
    return bool(together)


def _together(name: str, directory: Path, seed: int) -> tuple[Part, Part]:
    x_path, y_path = (directory / file for file in TOGETHER)
    x, y = _open(x_path, y_path)
    train, test = (np.sort(rows) for rows in split_rows(name, len(x), seed))
    return Part(Rows(x, train), y[train], x_path, y_path), Part(Rows(x, test), y[test], x_path, y_path)


def _apart(directory: Path) -> tuple[Part, Part]:
    train_x_path, train_y_path, test_x_path, test_y_path = (directory / file for file in APART)
    train_x, train_y = _open(train_x_path, train_y_path)
    test_x, test_y = _open(test_x_path, test_y_path)
    _check_alike(test_x_path, train_x, test_x)
    _check_alike(test_y_path, train_y, test_y)
    return Part(train_x, train_y, train_x_path, train_y_path), Part(test_x, test_y, test_x_path, test_y_path)


def _check_alike(path: Path, train: AnyArray, test: AnyArray) -> None:
    if train.shape[1:] != test.shape[1:] or _is_values(train) != _is_values(test):
        raise InputError(
            f"{path}: expected samples like those to train with, {_form(train)}, found {_form(test)}"
        )


def _open(x_path: Path, y_path: Path) -> tuple[Mapped, AnyArray]:
    """x, mapped, and y, read; they go together, and y is what can be learned."""
    x, y = open_mapped(x_path), open_mapped(y_path)
    if x.dtype.kind not in NUMBERS or x.dtype.itemsize > 8 or x.ndim < 2 or x.size == 0:
        raise InputError(
            f"{x_path}: expected numbers, [samples, features] or images [samples, ..., height, width], "
            f"found {_form(x)}"
        )
    if (y.dtype.kind, y.ndim) not in LABELS or y.size == 0:
        raise InputError(
            f"{y_path}: expected whole numbers [samples], which are classes, or floats [samples, outputs], "
            f"which are values to predict, found {_form(y)}; save y.astype(int) or y[:, None]"
        )
    if len(x) != len(y):
        raise InputError(
            f"{y_path}: expected one for each of the {len(x)} samples in {x_path.name}, found {len(y)}"
        )
    return x, _checked(y_path, np.array(y))


def _form(array: AnyArray) -> str:
    return f"{array.dtype} of shape {as_text(array.shape)}"


def _is_values(array: AnyArray) -> bool:
    return array.ndim == 2 and array.dtype.kind == "f"


def _checked(path: Path, y: AnyArray) -> AnyArray:
    """``y`` if all is finite and, where they are classes, none is negative."""
    if _is_values(y):
        for _ in finite_blocks(str(path), y):
            pass
    elif y.min() < 0:
        i = int((y < 0).argmax())
        raise InputError(f"{path}: expected classes, whole numbers from 0, found {y[i]} in sample {i}")
    return y


def _class_count(train: Part, test: Part) -> int:
    """0 for values to predict."""
    if _is_values(train.y):
        return 0
    largest = max(int(train.y.max()), int(test.y.max()))
    if not 0 < largest < len(train.y):
        raise InputError(
            f"{train.y_path}: expected classes numbered from 0, at least 2 and fewer than there are samples, "
            f"found {largest} as the largest of {len(train.y)} training samples"
        )
    return largest + 1
