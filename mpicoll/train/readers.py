"""Readers: scikit-learn's digits, MNIST's IDX files, CSV files.

They raise `InputError` for whatever is wrong with a file, naming the file, what was expected and what was
found there.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpicoll.train.data import Dataset, split, standardise
from mpicoll.train.errors import InputError

AnyArray = npt.NDArray[Any]

IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
GZIP_MAGIC = b"\x1f\x8b"
DELIMITERS = ",;\t"


def read_digits(seed: int) -> Dataset:
    """1,797 images of 8 x 8 grey levels, handwritten digits, that come with scikit-learn."""
    try:
        from sklearn.datasets import load_digits  # takes a second, and only rank 0 needs it
    except ImportError as error:
        raise InputError(
            f"digits: expected scikit-learn to be installed ({error}); pip install 'mpicoll[train]'"
        ) from error

    digits = load_digits()
    return scaled(split("digits", 10, digits.images, digits.target.astype(np.int64), seed), axis=None)


def scaled(data: Dataset, axis: int | None) -> Dataset:
    """``data`` with its x standardised."""
    train_x, test_x = standardise(data.train_x, data.test_x, axis)
    return replace(data, train_x=train_x, test_x=test_x)


# MNIST ------------------------------------------------------------------------------------------------


def read_mnist(directory: Path) -> Dataset:
    """The four IDX files of MNIST, or of any data set in its form, from ``directory``; plain or gzipped.

    Training and test samples come as the files divide them.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: expected a directory with MNIST's files; see --data-dir")
    train_x, train_y = _read_images_and_labels(directory, "train")
    test_x, test_y = _read_images_and_labels(directory, "t10k")
    if train_x.shape[1:] != test_x.shape[1:]:
        raise InputError(
            f"{directory}: expected training and test images of one size, "
            f"found {_by(train_x.shape[1:])} and {_by(test_x.shape[1:])}"
        )
    classes = int(max(train_y.max(), test_y.max())) + 1
    if classes > len(train_y):
        raise InputError(
            f"{directory}: expected labels numbered from 0, fewer than there are samples, "
            f"found {classes - 1} as the largest label of {len(train_y)} training samples"
        )
    data = Dataset(f"mnist:{directory}", classes, train_x, train_y, test_x, test_y)
    return scaled(data, axis=None)


def _read_images_and_labels(directory: Path, part: str) -> tuple[AnyArray, AnyArray]:
    image_file = _find_idx(directory, f"{part}-images", "idx3-ubyte")
    label_file = _find_idx(directory, f"{part}-labels", "idx1-ubyte")
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.ndim < 2 or images.size == 0:
        raise InputError(f"{image_file}: expected images of height x width, found {_by(images.shape)}")
    if labels.ndim != 1 or labels.dtype.kind not in "ui" or labels.min(initial=0) < 0:
        raise InputError(
            f"{label_file}: expected a row of whole numbers from 0, "
            f"found {_by(labels.shape)} of {labels.dtype}"
        )
    if len(images) != len(labels):
        raise InputError(
            f"{label_file}: expected one label for each of the {len(images)} images "
            f"in {image_file.name}, found {len(labels)}"
        )
    return images, labels.astype(np.int64)


def _find_idx(directory: Path, stem: str, suffix: str) -> Path:
    names = [f"{stem}{separator}{suffix}{ending}" for separator in "-." for ending in ("", ".gz")]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise InputError(f"{directory}: expected {names[0]} or {names[1]} in it, found neither; see --data-dir")


def read_idx(path: Path) -> AnyArray:
    """The array in an IDX file, plain or gzipped, in this machine's byte order.

    The format: two zero bytes, a byte for the type, a byte for the number of dimensions, each dimension as
    4 bytes and then the elements, all big-endian (http://yann.lecun.com/exdb/mnist).
    """
    content = _unzipped(path, _content(path))
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise InputError(
            f"{path}: expected an IDX file, which begins with 00 00, a type and the number of dimensions, "
            f"found {content[:4].hex(' ') or 'nothing'}"
        )
    dtype, ndim = np.dtype(IDX_TYPES[content[2]]), content[3]
    start = 4 + 4 * ndim
    if len(content) < start:
        raise InputError(f"{path}: expected {ndim} dimensions of 4 bytes, found the end; truncated?")
    shape = np.frombuffer(content, ">u4", ndim, offset=4).tolist()
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise InputError(
            f"{path}: expected {expected} bytes for shape {_by(shape)}, found {len(content)}; "
            f"{'truncated' if len(content) < expected else 'not an IDX file, or damaged'}?"
        )
    array: AnyArray = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a file that can be read, but: {error.strerror}") from error


def _unzipped(path: Path, content: bytes) -> bytes:
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: expected a complete gzip file, but: {error}; truncated?") from error


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "of no dimensions"


# CSV --------------------------------------------------------------------------------------------------


def read_csv(path: Path, label: str | None, regression: bool, seed: int) -> Dataset:
    """A table of numbers with one sample per line, separated by comma, semicolon or tab; a gzipped one too.

    ``label`` is the column to predict, by its number from 1 or its name; None: the last. A first line that
    names it, or has no number in the other columns, is a header. Classes may have any names and are numbered
    in sorted order. In regression the values to predict are standardised like the features, so that a mean
    squared error of 1 is that of always predicting the mean.
    """
    lines = _table(path)
    first = [cell.strip() for cell in lines[0][1]]
    column = _column(path, first, label)
    features = [j for j in range(len(first)) if j != column]
    has_header = first[column] == label or not any(_is_number(first[j]) for j in features)
    rows = lines[has_header:]
    if len(rows) < 2:
        raise InputError(f"{path}: expected at least 2 lines with samples, found {len(rows)}")

    x = _numbers(path, rows, features)
    if regression:
        y = _numbers(path, rows, [column])
        data = scaled(split(f"csv:{path}", 0, x, y, seed), axis=0)
        train_y, test_y = standardise(data.train_y, data.test_y, axis=0)
        return replace(data, train_y=train_y, test_y=test_y)
    y, classes = _class_numbers(path, rows, column)
    return scaled(split(f"csv:{path}", classes, x, y, seed), axis=0)


Line = tuple[int, list[str]]  # the line's number in the file, from 1, and its cells


def _table(path: Path) -> list[Line]:
    """The lines that are not empty; all have the same number of cells, at least 2."""
    try:
        text = _unzipped(path, _content(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected a CSV file, which is text in UTF-8, but: {error}") from error
    if not text.strip():
        raise InputError(f"{path}: expected a CSV file, found it empty")
    if "\0" in text:
        raise InputError(f"{path}: expected a CSV file, which is text, found bytes of zero")

    text_lines = text.splitlines()
    first = next(line for line in text_lines if line.strip())
    reader = csv.reader(text_lines, delimiter=max(DELIMITERS, key=first.count), strict=True)
    try:
        lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(f"{path}: expected a CSV file, but line {reader.line_num}: {error}") from error
    if not lines:
        raise InputError(f"{path}: expected a CSV file, found only empty cells")

    width = len(lines[0][1])
    if width < 2:
        raise InputError(
            f"{path}: expected the label and at least one more column, "
            f"separated by comma, semicolon or tab, found one column"
        )
    for number, row in lines:
        if len(row) != width:
            raise InputError(
                f"{path}: expected {width} columns as in line {lines[0][0]}, line {number} has {len(row)}"
            )
    return lines


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _column(path: Path, first: list[str], label: str | None) -> int:
    """The label's column, from 0."""
    if label is None:
        return len(first) - 1
    if label.isdecimal() and 1 <= int(label) <= len(first):
        return int(label) - 1
    if label in first:
        return first.index(label)
    raise InputError(
        f"{path}: expected --label to be a column, by number from 1 to {len(first)} or by name, "
        f"found {label!r}; the first line is: {', '.join(first)}"
    )


def _numbers(path: Path, rows: list[Line], columns: list[int]) -> AnyArray:
    """These columns as float64 [rows, columns]."""
    try:
        values = np.array([[float(row[j]) for j in columns] for _, row in rows])
    except ValueError:
        values = np.array([np.nan])
    if np.isfinite(values).all():
        return values
    for number, row in rows:
        for j in columns:
            if not _is_number(row[j]) or not math.isfinite(float(row[j])):
                raise InputError(
                    f"{path}: expected a finite number in line {number}, column {j + 1}, found {row[j]!r}"
                )
    raise AssertionError("a cell that is no finite number must have been found")


def _class_numbers(path: Path, rows: list[Line], column: int) -> tuple[AnyArray, int]:
    """The label of each row as a number from 0, and how many classes there are."""
    labels = [row[column].strip() for _, row in rows]
    if "" in labels:
        number = rows[labels.index("")][0]
        raise InputError(f"{path}: expected a label in line {number}, column {column + 1}, found it empty")
    names, y = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise InputError(f"{path}: expected at least 2 classes, found one, {labels[0]!r}; see --label")
    if len(names) == len(labels) > 2:
        raise InputError(
            f"{path}: expected classes, but all {len(labels)} labels differ; "
            f"for values to predict use --task regression, for another column --label"
        )
    return y.astype(np.int64), len(names)
