"""MNIST, and any data set in the form of its IDX files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpicoll.train.data import Dataset, scaled
from mpicoll.train.errors import InputError
from mpicoll.train.readers.files import as_text, unzipped

AnyArray = npt.NDArray[Any]

IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


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
            f"found {as_text(train_x.shape[1:])} and {as_text(test_x.shape[1:])}"
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
        raise InputError(f"{image_file}: expected images of height x width, found {as_text(images.shape)}")
    if not np.isfinite(images).all():
        raise InputError(f"{image_file}: expected finite numbers, found {images[~np.isfinite(images)][0]}")
    if labels.ndim != 1 or labels.dtype.kind not in "ui" or labels.min(initial=0) < 0:
        raise InputError(
            f"{label_file}: expected a row of whole numbers from 0, "
            f"found {as_text(labels.shape)} of {labels.dtype}"
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
    content = unzipped(path)
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
            f"{path}: expected {expected} bytes for shape {as_text(shape)}, found {len(content)}; "
            f"{'truncated' if len(content) < expected else 'not an IDX file, or damaged'}?"
        )
    array: AnyArray = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))
