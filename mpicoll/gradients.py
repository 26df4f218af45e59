"""What the gradients of a model are, and that all ranks mean the same by them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from mpicoll.buffers import Data, Dtype, data_of
from mpicoll.compression import Compression
from mpicoll.gpu.fusion import GpuArray, as_gpu_array
from mpicoll.gpu.memory import NO_DEVICE
from mpicoll.grouped import AnyArray, check_apart, check_dtype
from mpicoll.kernels.packing import FLOATS

NONFINITE_WAYS = ("pass", "raise", "skip")
UNUSED_WAYS = ("raise", "zero")


@dataclass(frozen=True)
class Gradient:
    """One tensor; ``array`` is None where it is yet to be allocated."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    array: AnyArray | None

    @property
    def on_gpu(self) -> bool:
        return isinstance(self.array, GpuArray)

    def __str__(self) -> str:
        if isinstance(self.array, GpuArray):
            fortran = self.array.fortran
        else:
            fortran = self.array is not None and not self.array.flags.c_contiguous
        order, place = " in Fortran's order" if fortran else "", " on a GPU" if self.on_gpu else ""
        return f"{self.dtype}{list(self.shape)}{order}{place}"


@dataclass(frozen=True)
class Settings:
    """How gradients are reduced; see `mpicoll.fusion.GradientSync`."""

    average: bool
    scale: float
    wire_dtype: Dtype | None
    compression: Compression | None
    bucket_bytes: int | None
    order: tuple[int, ...] | None
    nonfinite: str
    unused: str
    algorithm: str | None
    tune: bool

    @classmethod
    def of(cls, **given: Any) -> Settings:
        """From a user's arguments. Raises TypeError that names the argument."""
        for name, convert in _CONVERSIONS.items():
            if given[name] is not None:
                given[name] = _converted(name, given[name], convert)
        compression = given["compression"]
        if compression is not None and not hasattr(compression, "bind"):
            raise TypeError(f"compression: expected one of mpicoll.compression, got {compression!r}")
        return cls(**given)


def _numbers(given: Any) -> tuple[int, ...]:
    return tuple(map(operator.index, given))


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "scale": float,
    "wire_dtype": np.dtype,
    "bucket_bytes": operator.index,
    "order": _numbers,
}


def _converted(name: str, given: Any, convert: Callable[[Any], Any]) -> Any:
    try:
        return convert(given)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got {given!r}: {error}") from None


def parse(
    gradients: Mapping[str, Any] | Sequence[Any], names: Sequence[str] | None, dtype: Dtype
) -> list[Gradient]:
    """From arrays, or shapes of arrays of ``dtype``. TypeError and ValueError name the gradient."""
    if isinstance(gradients, Mapping):
        if names is not None:
            raise ValueError("names: expected none beside a mapping, whose keys are the names")
        names, gradients = list(gradients), list(gradients.values())
    if names is None:
        names = [str(i) for i in range(len(gradients))]
    if len(names) != len(gradients) or len(set(names)) != len(names):
        raise ValueError(f"names: expected {len(gradients)} different names, got {list(names)}")
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"names: expected strings, got {list(names)}")
    parsed = [_parse_one(name, given, dtype) for name, given in zip(names, gradients, strict=True)]
    if len({gradient.array is None for gradient in parsed}) > 1:
        raise TypeError("gradients: expected either arrays or shapes, got both")
    return parsed


def _parse_one(name: str, given: Any, dtype: Dtype) -> Gradient:
    if isinstance(given, (int, np.integer)):
        given = (given,)
    if isinstance(given, (tuple, list)):
        shape = _converted(f"gradient {name!r}", given, _numbers)
        if any(n < 0 for n in shape):
            raise ValueError(f"gradient {name!r}: expected dimensions of 0 or more, got {shape}")
        return Gradient(name, shape, dtype, None)
    data = data_of(given, f"gradient {name!r}", writable=True)
    array = data.array if isinstance(data, Data) else as_gpu_array(given, data)
    return Gradient(name, array.shape, array.dtype, array)


def check(gradients: Sequence[Gradient], settings: Settings) -> None:
    """Raise TypeError or ValueError, naming the argument, for settings that these gradients cannot have."""
    if settings.nonfinite not in NONFINITE_WAYS:
        raise ValueError(f"nonfinite: expected {_any_of(NONFINITE_WAYS)}, got {settings.nonfinite!r}")
    if settings.unused not in UNUSED_WAYS:
        raise ValueError(f"unused: expected {_any_of(UNUSED_WAYS)}, got {settings.unused!r}")
    if settings.bucket_bytes is not None and settings.bucket_bytes < 1:
        raise ValueError(f"bucket_bytes: expected a positive number, got {settings.bucket_bytes}")
    if settings.order is not None and sorted(settings.order) != list(range(len(gradients))):
        raise ValueError(f"order: expected the numbers from 0 to {len(gradients) - 1}, each once")
    if settings.wire_dtype is not None and settings.compression is not None:
        raise ValueError("wire_dtype: expected none beside compression, which says how gradients travel")
    if settings.wire_dtype is not None and settings.wire_dtype not in FLOATS:
        raise TypeError(f"wire_dtype: expected {_any_of(map(str, FLOATS))}, got {settings.wire_dtype}")
    if settings.tune and settings.algorithm not in (None, "auto"):
        raise ValueError(f"tune: expected no algorithm beside it, got {settings.algorithm!r}")
    for gradient in gradients:
        _check_dtype(gradient, settings)
    _check_place(gradients, settings)
    arrays = [gradient.array for gradient in gradients if gradient.array is not None]
    check_apart(arrays, [f"gradient {gradient.name!r}" for gradient in gradients])


def _check_dtype(gradient: Gradient, settings: Settings) -> None:
    check_dtype(gradient.dtype, f"gradient {gradient.name!r}")
    if settings.compression is not None and gradient.dtype != np.float32:
        raise TypeError(f"gradient {gradient.name!r}: compression is for float32, got {gradient.dtype}")
    computes = settings.average or settings.scale != 1 or settings.wire_dtype is not None
    if computes and gradient.dtype not in FLOATS:
        raise TypeError(
            f"gradient {gradient.name!r}: expected {_any_of(map(str, FLOATS))}, got {gradient.dtype}; only "
            "average=False without scale and wire_dtype sums other dtypes"
        )


def _check_place(gradients: Sequence[Gradient], settings: Settings) -> None:
    """All gradients lie on the host, or all on one GPU."""
    for gradient in gradients:
        if gradient.on_gpu != gradients[0].on_gpu:
            raise TypeError(_elsewhere(gradient, gradients[0]))
    placed = [gradient for gradient in gradients if _device(gradient) != NO_DEVICE]
    for gradient in placed:
        if _device(gradient) != _device(placed[0]):
            raise ValueError(_elsewhere(gradient, placed[0]))
    if gradients and gradients[0].on_gpu and settings.compression is not None:
        raise TypeError(
            f"compression: expected none for gradients on a GPU, got {settings.compression!r}; wire_dtype "
            "halves what travels there, too"
        )


def _device(gradient: Gradient) -> int:
    """Of the GPU that it lies on, if it has elements."""
    return gradient.array.device if isinstance(gradient.array, GpuArray) else NO_DEVICE


def _elsewhere(gradient: Gradient, expected: Gradient) -> str:
    places = [
        f"GPU {_device(one)}" if _device(one) != NO_DEVICE else "a GPU" if one.on_gpu else "the host"
        for one in (expected, gradient)
    ]
    return (
        f"gradient {gradient.name!r}: expected memory of {places[0]} as gradient {expected.name!r}, "
        f"got memory of {places[1]}"
    )


def _any_of(allowed: Any) -> str:
    return " or ".join(map(repr, allowed))


@contextmanager
def on_all_ranks(comm: MPI.Intracomm) -> Iterator[None]:
    """An exception in this block on any rank is one on all: nobody is left waiting. Collective."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    errors = comm.allgather(error and f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [(rank, text) for rank, text in enumerate(errors) if text]
    if failed:
        raise RuntimeError(f"rank {failed[0][0]} could not take part: {failed[0][1]}")


def check_agreement(comm: MPI.Intracomm, gradients: Sequence[Gradient], settings: Settings) -> None:
    """Raise ValueError on all ranks, naming the first gradient or setting, where ranks differ. Collective."""
    own = ([(g.name, str(g)) for g in gradients], gradients[0].array is None if gradients else None)
    described = comm.allgather((*own, {name: repr(value) for name, value in vars(settings).items()}))
    expected = described[0]
    for rank, found in enumerate(described):
        if found != expected:
            raise ValueError(_difference(expected, found, rank))


def _difference(expected: Any, found: Any, rank: int) -> str:
    theirs = f"as on rank 0; rank {rank} has"
    for (name, like), (other_name, other_like) in zip(expected[0], found[0], strict=False):
        if name != other_name:
            return f"gradients: expected {name!r} {theirs} {other_name!r} in its place"
        if like != other_like:
            return f"gradient {name!r}: expected {like} {theirs} {other_like}"
    if len(expected[0]) != len(found[0]):
        return f"gradients: expected {len(expected[0])} {theirs} {len(found[0])}"
    if expected[1] != found[1]:
        return f"gradients: expected {'shapes' if expected[1] else 'arrays'} {theirs} the other"
    name = next(name for name in expected[2] if expected[2][name] != found[2][name])
    return f"{name}: expected {expected[2][name]} {theirs} {found[2][name]}"
