"""What ``mpicoll bench kernels`` measures: each kernel on a list of tensors, beside NumPy or CuPy, checked.

An action returns what it has made, so that all who do the same task are checked in the same way. Tasks share
arrays. When one is timed these hold whatever the task before has left: ordinary finite numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .devices import Action, Array, Device
from .models import Shape, counts, nbytes

HostArray = npt.NDArray[Any]

OURS = "mpicoll"
SCALE = 1 / 3  # whose products are rounded
LEARNING_RATE, MOMENTUM = 0.01, 0.9
FRACTION = 0.01  # that top-k selects
SEED = 20

# Bytes of memory in all, beside those of the tensors: what `Data` holds, a peer's copy, and the copies that
# checks make, which are where the tensors are if that is the CPU.
ROOM = 13


class WrongResult(Exception):
    """Somebody's result is not what it should be; the message says where."""


@dataclass(frozen=True)
class Task:
    """A kernel's task, and who does it. ``nbytes``: that it has to read and write, whoever does it."""

    kernel: str
    nbytes: int
    contenders: dict[str, Action]
    prepare: Callable[[], None]  # the input, and what is wrong where the output will be
    check: Callable[[Any], None]  # of what an action has returned; raises WrongResult


class Data:
    """The list of tensors on a device, and other arrays of the same size.

    Every slot of a bucket is full, so a bucket holds the tensors one behind the other.
    """

    def __init__(self, device: Device, shapes: Sequence[Shape]) -> None:
        make = device.arrays
        self.device = device
        self.counts = counts(shapes)
        self.total = sum(self.counts)
        self.nbytes = nbytes(shapes)
        self.ends = np.cumsum(self.counts).tolist()
        values = np.random.default_rng(SEED).standard_normal(self.total, np.float32)
        parts = np.split(values, self.ends[:-1])
        self.tensors = [make.array(part.reshape(shape)) for part, shape in zip(parts, shapes, strict=True)]
        self.targets = [make.empty_like(tensor) for tensor in self.tensors]
        self.velocities = [make.empty_like(tensor) for tensor in self.tensors]
        self.bucket, self.second = (make.empty(self.total, np.float32) for _ in range(2))
        self.halves = [make.empty(self.total, ml_dtypes.bfloat16) for _ in range(2)]
        self.codes = make.empty(self.total, np.int8)
        self.scales = make.empty(device.quantise.blocks(self.total), np.float32)
        self.k = max(1, round(FRACTION * self.total))
        self.indices = make.empty(self.k, np.int32)
        self.selected = make.empty(self.k, np.float32)
        self.nonfinite = make.zeros(len(shapes), np.int32)

    def pack(self, out: Array) -> None:
        """The tensors' values, in any float dtype."""
        for part, tensor in zip(self.parts(out), self.tensors, strict=True):
            part[...] = tensor.ravel()

    def parts(self, flat: Array) -> list[Array]:
        """Each tensor's part of a flat array."""
        begins = [0, *self.ends[:-1]]
        return [flat[begin:end] for begin, end in zip(begins, self.ends, strict=True)]

    def packed(self) -> HostArray:
        """What a bucket of the tensors holds."""
        return self.flat(self.tensors)

    def flat(self, tensors: Sequence[Array]) -> HostArray:
        return np.concatenate([self.device.host(tensor).ravel() for tensor in tensors])


def tasks(data: Data) -> Iterator[Task]:
    """All, in an order in which each leaves finite numbers to the next."""
    yield _pack(data)
    yield _unpack(data)
    yield _pack_scaled(data, np.dtype(ml_dtypes.bfloat16))
    yield _pack_scaled(data, np.dtype(np.float16))
    yield _unpack_checked(data)
    yield _update(data)
    yield _reduce(data, data.bucket, data.second)
    yield _reduce(data, *data.halves)
    yield _quantise(data)
    yield _dequantise(data)
    yield _select(data)
    yield _scatter_add(data)


def memcpy(data: Data) -> Action:
    """The limit: a copy of as many bytes as the tensors have."""
    return lambda: data.device.arrays.copyto(data.second, data.bucket)


def _same(found: HostArray, expected: HostArray, tolerance: float = 0) -> None:
    """Raise WrongResult where they differ by more than ``tolerance``, relative and absolute."""
    wrong = found != expected
    if tolerance:
        wrong = ~np.isclose(found, expected, tolerance, tolerance)
    if wrong.any():
        i = int(wrong.argmax())
        raise WrongResult(
            f"{wrong.sum()} of {wrong.size} wrong; element {i}: expected {expected[i]}, got {found[i]}"
        )


def _pack(data: Data) -> Task:
    bucket, make = data.bucket, data.device.arrays
    flats = [tensor.ravel() for tensor in data.tensors]
    packing = data.device.packing.Packing(data.tensors, bucket)

    def ours() -> Array:
        packing.pack()
        return bucket

    def concatenate() -> Array:
        return make.concatenate(flats, out=bucket)

    return Task(
        "pack",
        2 * data.nbytes,
        {OURS: ours, f"{make.__name__}.concatenate": concatenate},
        lambda: bucket.fill(np.nan),
        lambda packed: _same(data.device.host(packed), data.packed()),
    )


def _unpack(data: Data) -> Task:
    bucket, targets = data.bucket, data.targets
    flats, parts = [target.ravel() for target in targets], data.parts(bucket)
    packing = data.device.packing.Packing(targets, bucket)

    def ours() -> Sequence[Array]:
        packing.unpack()
        return targets

    def copy_slices() -> Sequence[Array]:
        for flat, part in zip(flats, parts, strict=True):
            flat[...] = part
        return targets

    def prepare() -> None:
        data.pack(bucket)
        for target in targets:
            target.fill(np.nan)

    return Task(
        "unpack",
        2 * data.nbytes,
        {OURS: ours, f"{data.device.arrays.__name__} slices": copy_slices},
        prepare,
        lambda unpacked: _same(data.flat(unpacked), data.packed()),
    )


def _pack_scaled(data: Data, dtype: np.dtype[Any]) -> Task:
    half, make = data.halves[0].view(dtype), data.device.arrays
    flats, parts = [tensor.ravel() for tensor in data.tensors], data.parts(half)
    packing = data.device.packing.Packing(data.tensors, half)

    def ours() -> Array:
        packing.pack(SCALE)
        return half

    def multiply() -> Array:
        for flat, part in zip(flats, parts, strict=True):
            make.multiply(flat, SCALE, out=part, casting="unsafe")
        return half

    def check(packed: Array) -> None:
        expected = (data.packed() * np.float32(SCALE)).astype(dtype)
        _same(data.device.host(packed).view(np.uint16), expected.view(np.uint16))

    return Task(
        f"pack, scale, to {dtype}",
        data.nbytes + half.nbytes,
        {OURS: ours, f"{make.__name__}.multiply": multiply},
        lambda: half.fill(np.nan),
        check,
    )


def _unpack_checked(data: Data) -> Task:
    bucket, targets, nonfinite, make = data.bucket, data.targets, data.nonfinite, data.device.arrays
    flats, parts = [target.ravel() for target in targets], data.parts(bucket)
    packing = data.device.packing.Packing(targets, bucket)

    def ours() -> Array:
        packing.unpack(nonfinite=nonfinite)
        return nonfinite

    def copy_and_look() -> Array:
        for i, (flat, part) in enumerate(zip(flats, parts, strict=True)):
            flat[...] = part
            nonfinite[i] = ~make.isfinite(flat).all()
        return nonfinite

    def prepare() -> None:
        data.pack(bucket)
        bucket[-1] = np.inf
        nonfinite.fill(0)

    def check(flags: Array) -> None:
        expected = np.zeros(len(targets), np.int32)
        expected[-1] = 1
        _same(data.device.host(flags), expected)
        _same(data.flat(targets), data.device.host(bucket))
        data.pack(bucket)  # without what is infinite

    return Task(
        "unpack, look for NaN",
        2 * data.nbytes,
        {OURS: ours, f"{make.__name__} slices, isfinite": copy_and_look},
        prepare,
        check,
    )


def _update(data: Data) -> Task:
    """SGD with momentum, from gradients in a bucket; the targets are the parameters."""
    update = data.device.packing.Update(data.bucket, data.targets, data.velocities)

    def ours() -> Sequence[Array]:
        update.step(LEARNING_RATE, MOMENTUM)
        return data.targets

    def prepare() -> None:
        data.pack(data.bucket)
        data.bucket *= 0.5
        for target, velocity, tensor in zip(data.targets, data.velocities, data.tensors, strict=True):
            target[...] = tensor
            velocity[...] = 0.25 * tensor

    def check(parameters: Sequence[Array]) -> None:
        x = data.packed()
        velocity = np.float32(MOMENTUM) * (np.float32(0.25) * x) + np.float32(0.5) * x
        _same(data.flat(data.velocities), velocity, 1e-6)  # peers round in other places
        _same(data.flat(parameters), x - np.float32(LEARNING_RATE) * velocity, 1e-6)

    return Task("unpack, update by SGD", 5 * data.nbytes, {OURS: ours}, prepare, check)


def _reduce(data: Data, dst: Array, src: Array) -> Task:
    make = data.device.arrays

    def ours() -> Array:
        data.device.reduce("SUM", dst, src)
        return dst

    def add() -> Array:
        return make.add(dst, src, out=dst)

    def prepare() -> None:
        data.pack(dst)
        data.pack(src)
        src[: data.total // 2] *= 0.5

    def check(total: Array) -> None:
        added = data.packed().astype(dst.dtype).astype(np.float32)
        expected = added.copy()
        expected[: data.total // 2] *= 0.5
        expected = (expected + added).astype(dst.dtype)
        _same(data.device.host(total).astype(np.float32), expected.astype(np.float32))

    contenders = {OURS: ours, f"{make.__name__}.add": add}
    return Task(f"reduce, {dst.dtype} SUM", 3 * dst.nbytes, contenders, prepare, check)


def _quantise(data: Data) -> Task:
    values, residual, codes, scales = data.bucket, data.second, data.codes, data.scales

    def ours() -> tuple[Array, ...]:
        data.device.quantise.quantise_feedback(values, 1.0, residual, codes, scales)
        return codes, scales

    def prepare() -> None:
        data.pack(values)
        residual.fill(0)

    def check(made: tuple[Array, ...]) -> None:
        decoded, steps = _decoded(data)
        missing = data.device.host(values) - decoded
        _same(data.device.host(residual), missing, 1e-6)  # a fused multiplication and addition rounds once
        _same(np.maximum(np.abs(missing), 0.5001 * steps), 0.5001 * steps)

    moved = 3 * data.nbytes + codes.nbytes + scales.nbytes
    return Task("quantise to int8, with feedback", moved, {OURS: ours}, prepare, check)


def _decoded(data: Data) -> tuple[HostArray, HostArray]:
    """What the codes stand for, and each one's scale."""
    scales, codes = data.device.host(data.scales), data.device.host(data.codes)
    steps = np.repeat(scales, data.device.quantise.BLOCK)[: data.total]
    return steps * codes.astype(np.float32), steps


def _dequantise(data: Data) -> Task:
    values, codes, scales = data.bucket, data.codes, data.scales

    def ours() -> Array:
        data.device.quantise.dequantise(codes, scales, values)
        return values

    def prepare() -> None:
        data.pack(values)
        data.device.quantise.quantise(values, codes, scales)
        values.fill(np.nan)

    def check(out: Array) -> None:
        _same(data.device.host(out), _decoded(data)[0])

    moved = codes.nbytes + scales.nbytes + data.nbytes
    return Task("dequantise from int8", moved, {OURS: ours}, prepare, check)


def _select(data: Data) -> Task:
    values, residual, indices, selected = data.bucket, data.second, data.indices, data.selected

    def ours() -> tuple[Array, ...]:
        data.device.sparse.select(values, 1.0, residual, data.k, indices, selected)
        return indices, selected

    def prepare() -> None:
        data.pack(values)
        residual.fill(0)

    def check(made: tuple[Array, ...]) -> None:
        at, taken = (data.device.host(array) for array in made)
        rest, expected = data.device.host(residual), data.packed()
        _same(at, np.clip(at, 0, data.total - 1))
        _same(np.diff(at) > 0, np.ones(data.k - 1, bool))
        _same(taken, expected[at])
        expected[at] = 0
        _same(rest, expected)
        _same(np.abs(taken) >= np.abs(rest).max(), np.ones(data.k, bool))

    moved = 3 * data.nbytes + indices.nbytes + selected.nbytes
    return Task(f"select top {FRACTION:.0%}, with feedback", moved, {OURS: ours}, prepare, check)


def _scatter_add(data: Data) -> Task:
    out, indices, selected = data.bucket, data.indices, data.selected

    def ours() -> Array:
        data.device.sparse.scatter_add(indices, selected, out)
        return out

    def add() -> Array:
        out[indices] += selected
        return out

    def prepare() -> None:
        data.pack(out)
        data.second.fill(0)
        data.device.sparse.select(out, 1.0, data.second, data.k, indices, selected)

    def check(result: Array) -> None:
        expected = data.packed()
        expected[data.device.host(indices)] += data.device.host(selected)
        _same(data.device.host(result), expected)

    moved = indices.nbytes + 3 * selected.nbytes
    contenders = {OURS: ours, f"{data.device.arrays.__name__} indices": add}
    return Task(f"scatter-add {FRACTION:.0%}", moved, contenders, prepare, check)
