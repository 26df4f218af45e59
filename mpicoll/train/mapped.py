"""NumPy files that are mapped, not read: a sample comes into memory when a batch takes it.

Ranks that map the same file share its pages, and it may be larger than the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpicoll.train.errors import InputError

Mapped = np.memmap[Any, Any]

BLOCK_BYTES = 16 << 20  # of float64, when a whole file is gone through: enough for the disk, little memory


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a mapped array, by their numbers [n], ascending, as if they were an array of their own."""

    array: Mapped
    numbers: npt.NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.numbers), *self.array.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self.array.dtype
        return dtype

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, which: Any) -> npt.NDArray[Any]:
        """The rows ``which``, an array of positions or a slice, read from the file."""
        return np.asarray(self.array[self.numbers[which]])


def open_mapped(path: Path) -> Mapped:
    """The array of a ``.npy`` file, mapped for reading.

    Raises `InputError` where it is none, is cut short, or holds Python objects: those are never unpickled.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise InputError(
            f"{path}: expected a file that can be read, but: {error.strerror or error}"
        ) from error
    except Exception as error:  # a damaged header ends in almost any of Python's: NumPy parses it as Python
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: expected a complete .npy file of numbers, but: {reason}") from error


def blocks(array: Mapped | Rows | npt.NDArray[Any]) -> Iterator[npt.NDArray[np.float64]]:
    """All of ``array``, some rows at a time, as float64."""
    rows = max(1, BLOCK_BYTES // (8 * max(1, math.prod(array.shape[1:]))))
    return (np.asarray(array[i : i + rows], np.float64) for i in range(0, len(array), rows))


def finite_blocks(name: str, array: Mapped | Rows | npt.NDArray[Any]) -> Iterator[npt.NDArray[np.float64]]:
    """`blocks`; raises `InputError`, with ``name`` and the sample's number, where one is not finite."""
    start = 0
    for block in blocks(array):
        finite = np.isfinite(block)
        if not finite.all():
            position = tuple(np.argwhere(~finite)[0])
            row = start + int(position[0])
            sample = array.numbers[row] if isinstance(array, Rows) else row
            raise InputError(f"{name}: expected finite numbers, found {block[position]} in sample {sample}")
        start += len(block)
        yield block
