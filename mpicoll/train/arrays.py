"""What the trainer computes on: arrays of NumPy or of CuPy, in the same source."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = Any  # numpy.ndarray or cupy.ndarray


def on_host(x: Array) -> npt.NDArray[Any]:
    """``x`` in the host's memory: itself, if it is there."""
    array: npt.NDArray[Any] = x.get() if hasattr(x, "get") else x  # CuPy's way to the host
    return array


def host_copy(x: Array) -> npt.NDArray[Any]:
    """``x`` in memory of its own on the host."""
    array: npt.NDArray[Any] = x.get() if hasattr(x, "get") else np.array(x)
    return array


def beside(x: Array, other: Array) -> Array:
    """``x``, of the host or of where ``other`` is, there."""
    return array_module(other).asarray(x)


def synchronise(x: Array) -> None:
    """Wait until all is done that a GPU was given so far to compute ``x``; other streams go on."""
    xp = array_module(x)
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def array_module(x: Array) -> ModuleType:
    """The module that ``x`` belongs to, numpy or cupy; both have the functions used here."""
    if type(x).__module__.partition(".")[0] == "cupy":
        return import_module("cupy")  # only where there are CuPy arrays is there CuPy
    return np
