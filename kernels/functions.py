"""CPU kernels as Python functions of NumPy arrays: compiled when first called, run without the GIL."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numba import types

from .caching import CACHED
from .elements import element_type

Array = npt.NDArray[Any]


class Reads:
    """A parameter: a flat contiguous array of this dtype."""

    flags: tuple[Literal["C_CONTIGUOUS", "WRITEABLE"], ...] = ("C_CONTIGUOUS",)

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.compiled = types.CPointer(element_type(self.dtype))
        self.called = np.ctypeslib.ndpointer(self.dtype, ndim=1, flags=self.flags)


class Writes(Reads):
    """A parameter: as `Reads`, and the kernel changes it."""

    flags = ("C_CONTIGUOUS", "WRITEABLE")


class _Number:
    def __init__(self, compiled: types.Type, called: Any) -> None:
        self.compiled = compiled
        self.called = called


COUNT = _Number(types.intp, ctypes.c_ssize_t)
FLOAT = _Number(types.float32, ctypes.c_float)


class Kernel:
    """A function for Numba that returns nothing, with its parameters.

    Calling it raises `ctypes.ArgumentError`, with the argument's number, for an array of another dtype, or
    one that is not flat, contiguous or writable.
    """

    def __init__(self, function: Callable[..., None], *parameters: Reads | _Number) -> None:
        self._function = function
        self._parameters = parameters

    def __call__(self, *arguments: Any) -> None:
        self._call(*arguments)

    @cached_property
    def _call(self) -> Callable[..., None]:
        self._code = CACHED.cfunc(types.void(*(p.compiled for p in self._parameters)))(self._function)
        return ctypes.CFUNCTYPE(None, *(p.called for p in self._parameters))(self._code.address)


def kernel(*parameters: Reads | _Number) -> Callable[[Callable[..., None]], Kernel]:
    """Makes a `Kernel` of the function below it."""
    return lambda function: Kernel(function, *parameters)


def check_length(name: str, array: Array, expected: int) -> None:
    """Raise ValueError unless ``array``, the argument ``name``, has so many elements."""
    if len(array) != expected:
        raise ValueError(f"{name}: expected {expected} elements, got {len(array)}")
