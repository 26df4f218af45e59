"""CIFAR-10 in its binary form (https://www.cs.toronto.edu/~kriz/cifar.html).

A file is records of 3,073 bytes: a label from 0 to 9, then 32 x 32 pixels of red, of green and of blue.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpicoll.train.data import Dataset, black_of, fitted
from mpicoll.train.errors import InputError
from mpicoll.train.mapped import blocks
from mpicoll.train.readers.files import content_of

AnyArray = npt.NDArray[Any]

CLASSES = 10
IMAGE = 3, 32, 32  # channels, height, width
RECORD = 1 + 3 * 32 * 32  # bytes
TRAINING_FILES = [f"data_batch_{i}.bin" for i in range(1, 6)]
TEST_FILE = "test_batch.bin"


def read_cifar10(directory: Path) -> Dataset:
    """The six binary files of CIFAR-10 in ``directory``; x is uint8 [n, 3, 32, 32], standardised per batch.

    Raises `InputError` for files that are missing, cut short or hold labels above 9.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: expected a directory with CIFAR-10's binary files; see --data-dir")
    missing = [name for name in [*TRAINING_FILES, TEST_FILE] if not (directory / name).is_file()]
    if missing:
        raise InputError(
            f"{directory}: expected data_batch_1.bin to data_batch_5.bin and {TEST_FILE} in it, "
            f"not found: {', '.join(missing)}; see --data-dir"
        )
    train = [_read_records(directory / name) for name in TRAINING_FILES]
    train_x, train_y = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    transform = fitted(blocks(train_x), axis=None)
    return Dataset(
        f"cifar10:{directory}",
        CLASSES,
        train_x,
        train_y,
        *_read_records(directory / TEST_FILE),
        transform=transform,
        black=black_of(transform),
    )


def _read_records(path: Path) -> tuple[AnyArray, AnyArray]:
    """Images uint8 [n, 3, 32, 32] and labels int64 [n]."""
    content = content_of(path)
    count, rest = divmod(len(content), RECORD)
    if rest or not count:
        raise InputError(
            f"{path}: expected records of {RECORD} bytes, found {count} and {rest} bytes more; truncated?"
        )
    records = np.frombuffer(content, np.uint8).reshape(count, RECORD)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= CLASSES:
        i = int((labels >= CLASSES).argmax())
        raise InputError(
            f"{path}: expected labels from 0 to {CLASSES - 1}, found {labels[i]} in record {i} (from 0); "
            f"is it CIFAR-10's binary version?"
        )
    return records[:, 1:].reshape(count, *IMAGE), labels
