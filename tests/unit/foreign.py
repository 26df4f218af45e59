"""A stand-in for CuPy, which needs a GPU: arrays that only their own module's functions take."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np

OPERATIONS = (
    "add radd sub rsub mul rmul truediv rtruediv floordiv mod matmul pow neg and or xor invert rshift "
    "eq ne lt le gt ge getitem setitem iadd isub imul itruediv float int bool"
)


class ForeignArray:
    """Like CuPy's arrays it says so when it gets into NumPy's hands."""

    __module__ = "cupy"
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, host: Any) -> None:
        self.host = host

    def __array_function__(self, function: Callable[..., Any], kinds: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} got an array of another module")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("an array of another module must not become NumPy's by itself")

    def __len__(self) -> int:
        return len(self.host)

    def get(self) -> Any:
        return self.host.copy()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.host, name)
        return foreign_function(value) if callable(value) else foreign(value)


def foreign(value: Any) -> Any:
    """``value``, an array, as one of the other module's."""
    return ForeignArray(value) if isinstance(value, np.ndarray) else value


def to_host(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(to_host(item) for item in value)
    return value.host if isinstance(value, ForeignArray) else value


def foreign_function(function: Callable[..., Any], takes_host: bool = False) -> Callable[..., Any]:
    """``function`` of NumPy for arrays of the other module; like CuPy's, it refuses NumPy's."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not takes_host and any(isinstance(value, np.ndarray) for value in (*args, *kwargs.values())):
            raise TypeError("an array of NumPy's must become one of this module by asarray")
        return foreign(function(*to_host(args), **{name: to_host(value) for name, value in kwargs.items()}))

    return call


for name in (f"__{operation}__" for operation in OPERATIONS.split()):
    method = foreign_function(lambda a, *rest, name=name: getattr(a, name)(*rest))
    setattr(ForeignArray, name, method)


class ForeignModule(types.ModuleType):
    """Has NumPy's functions, for its own arrays."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        return value if isinstance(value, type) else foreign_function(value, takes_host=name == "asarray")
