"""Who sums gradients over the ranks in ``mpicoll bench gradients``: MPI as people use it, and our ways.

Each sums the same list in place; those that compress sum other numbers, which do not repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI
from mpicoll.kernels.packing import slots

from mpicoll import Communicator, GradientSync, compression
from mpicoll.compression import Int8Codec

from .contenders import Action
from .data import Array, Problem
from .kinds import NO_ROOT
from .models import Shape, counts

PER_TENSOR = "MPI per tensor"
PACKED = "pack, MPI, unpack"
VIEWS = "GradientSync, views"
COMPRESSIONS = ("int8", "topk:0.01")
SEED = 30
TOLERANCE = 1e-5  # per rank: what rounding takes from a sum of numbers of a few units

# Gradients' bytes that a rank needs in all, beside those of the gradients: with each contender's own, their
# buckets, residuals and codes, and what it takes to check them.
ROOM = 16


@dataclass(frozen=True)
class Contender:
    """``sent``: bytes that a rank sends in a step, None where that is for the MPI library to know."""

    name: str
    run: Action
    fill: Callable[[], None]  # this rank's gradients, before a step
    count_wrong: Callable[[], int]  # elements, after the first step
    sent: float | None
    sync: GradientSync | None = None


class Setup:
    """A list of gradients on this rank."""

    def __init__(self, comm: Communicator, shapes: Sequence[Shape], bucket_bytes: int | None) -> None:
        self.comm = comm
        self.native = MPI.Intracomm(comm)
        self.shapes = shapes
        self.bucket_bytes = bucket_bytes
        self.counts = counts(shapes)
        self.total = sum(self.counts)
        # Numbers whose sums are exact in 16 bits, too.
        self._problem = Problem("allreduce", comm.rank, comm.size, self.total, "bfloat16", "sum", NO_ROOT)
        assert self._problem.given is not None
        self.exact = self._problem.given.astype(np.float32)
        self.random = np.random.default_rng((SEED, comm.rank)).standard_normal(self.total, np.float32)
        self.nbytes = self.exact.nbytes

    def allocate(self) -> list[Array]:
        """Arrays that lie anywhere."""
        return [np.empty(shape, np.float32) for shape in self.shapes]

    def fill(self, gradients: Sequence[Array], values: Array) -> None:
        for gradient, part in zip(gradients, self.parts(values), strict=True):
            gradient[...] = part.reshape(gradient.shape)

    def parts(self, flat: Array) -> list[Array]:
        """Each gradient's part of a flat array."""
        return np.split(flat, np.cumsum(self.counts)[:-1])

    def count_wrong(self, gradients: Sequence[Array]) -> int:
        return self._problem.count_wrong(np.concatenate([gradient.ravel() for gradient in gradients]))

    def sent_by_a_ring(self, itemsize: int = 4) -> float:
        """Bytes that a rank sends in an allreduce of all gradients, where no rank sends more than it must."""
        return 2 * (self.comm.size - 1) / self.comm.size * self.total * itemsize

    def sync(self, gradients: Sequence[Any], **settings: Any) -> GradientSync:
        # Sums, not averages, for MPI makes none.
        return GradientSync(self.comm, gradients, average=False, bucket_bytes=self.bucket_bytes, **settings)


def contenders(setup: Setup) -> Iterator[Contender]:
    """Everyone; collective."""
    comm, library, gradients = setup.comm, setup.native, setup.allocate()
    flat = np.empty(setup.total, np.float32)
    known = setup.sent_by_a_ring()
    exact = partial(_exact, setup, gradients)
    yield exact(PER_TENSOR, partial(_one_by_one, library, gradients), None)
    yield exact(PACKED, partial(_packed, library, gradients, flat, setup.parts(flat)), None)
    yield exact("Allreduce per tensor", partial(_one_by_one, comm, gradients), known)
    yield exact("Allreduce_many", partial(comm.Allreduce_many, gradients), known)
    sync = setup.sync(gradients)
    yield exact("GradientSync", partial(step, sync), known, sync)
    yield views(setup)
    sync = setup.sync(setup.shapes, wire_dtype="bfloat16")
    in_16_bits = setup.sent_by_a_ring(itemsize=2)
    yield _exact(setup, sync.gradients, f"{VIEWS}, bfloat16", partial(step, sync), in_16_bits, sync)
    for name in COMPRESSIONS:
        yield _compressed(setup, name)


def views(setup: Setup, overlap: bool = True) -> Contender:
    """Gradients that `GradientSync` has allocated; collective."""
    sync = setup.sync(setup.shapes, overlap=overlap)
    return _exact(setup, sync.gradients, VIEWS, partial(step, sync), setup.sent_by_a_ring(), sync)


def memcpy(setup: Setup) -> Contender:
    """The limit."""
    run = partial(np.copyto, np.zeros_like(setup.random), setup.random)
    return Contender("memcpy", run, lambda: None, lambda: 0, None)


def step(sync: GradientSync) -> None:
    """All gradients are there at once: the last is ready first, as after a backward pass."""
    for i in reversed(range(len(sync.gradients))):
        sync.ready(i)
    sync.wait()


def _exact(
    setup: Setup,
    gradients: Sequence[Array],
    name: str,
    run: Action,
    sent: float | None,
    sync: GradientSync | None = None,
) -> Contender:
    fill = partial(setup.fill, gradients, setup.exact)
    return Contender(name, run, fill, partial(setup.count_wrong, gradients), sent, sync)


def _one_by_one(comm: MPI.Intracomm, gradients: Sequence[Array]) -> None:
    for gradient in gradients:
        comm.Allreduce(MPI.IN_PLACE, gradient)


def _packed(comm: MPI.Intracomm, gradients: Sequence[Array], flat: Array, parts: Sequence[Array]) -> None:
    np.concatenate([gradient.ravel() for gradient in gradients], out=flat)
    comm.Allreduce(MPI.IN_PLACE, flat)
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.ravel()[...] = part


def _compressed(setup: Setup, name: str) -> Contender:
    chosen = compression.parse(name)
    assert chosen is not None
    sync = setup.sync(setup.shapes, compression=chosen)
    fill = partial(setup.fill, sync.gradients, setup.random)
    members = [[setup.shapes[i] for i in bucket.members] for bucket in sync.buckets]
    sizes = zip(sync.codecs, members, strict=True)
    sent = sum(chosen.volume(len(codec.residual), shapes, setup.comm.size) for codec, shapes in sizes)
    run, count_wrong = partial(step, sync), partial(_count_lost, setup, sync)
    return Contender(f"{VIEWS}, {name}", run, fill, count_wrong, sent, sync)


def _count_lost(setup: Setup, sync: GradientSync) -> int:
    """Elements of which, after the first step, result and residuals are not all ranks' gradients."""
    held, expected = _held(sync, setup.counts), setup.random.copy()
    setup.native.Allreduce(MPI.IN_PLACE, held)
    setup.native.Allreduce(MPI.IN_PLACE, expected)
    held += np.concatenate([gradient.ravel() for gradient in sync.gradients])
    tolerance = TOLERANCE * setup.comm.size
    return int(np.count_nonzero(~np.isclose(held, expected, tolerance, tolerance)))


def _held(sync: GradientSync, counts: Sequence[int]) -> Array:
    """What this rank keeps for the next step, gradient by gradient."""
    found: dict[int, Array] = {}
    for bucket, codec in zip(sync.buckets, sync.codecs, strict=True):
        held = codec.residual.copy()
        if isinstance(codec, Int8Codec):
            held[codec.own] += codec.sum_residual
        sizes = [counts[i] for i in bucket.members]
        for i, begin, size in zip(bucket.members, slots(sizes, held.itemsize)[0], sizes, strict=True):
            found[i] = held[begin : begin + size]
    return np.concatenate([found[i] for i in range(len(counts))])
