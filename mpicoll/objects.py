"""Collectives of Python objects: pickled, their sizes are exchanged first, then their bytes.

So they travel as arrays do, and whatever holds of those holds here: ranks in different calls, dead ranks and
ranks that stand still are errors. A rank that cannot pickle what it sends says so by a size, and raises its
exception; the others raise ValueError.

Reductions fold in the order of ranks, on every rank that gets the result: any operation will do, such as one
that does not commute, and all get the same.

Source of the interface: mpi4py's methods with lower-case names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce as fold
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.calls import CallMaker
from mpicoll.watch import numbers

UNABLE = -1  # as a size

Bytes = npt.NDArray[np.uint8]
Sizes = npt.NDArray[np.int64]


class ObjectCalls:
    """``run(prepare, *arguments)`` does a collective on arrays, which a method of `CallMaker` prepares."""

    def __init__(self, rank: int, nranks: int, run: Callable[..., None]) -> None:
        self._rank, self._nranks, self._run = rank, nranks, run

    def bcast(self, thing: Any, root: int) -> Any:
        sizes, data, error = self._packed([thing], 1) if self._rank == root else (_empty(1), None, None)
        self._run(CallMaker.bcast, sizes, root)
        _check("bcast", error, sizes, [root])
        data = data if data is not None else np.empty(int(sizes[0]), np.uint8)
        self._run(CallMaker.bcast, data, root)
        return _unpacked(data, sizes)[0]

    def allgather(self, thing: Any) -> list[Any]:
        data, sizes = self._exchanged("allgather", thing)
        everything = np.empty(int(sizes.sum()), np.uint8)
        self._run(CallMaker.allgatherv, data, [everything, sizes])
        return _unpacked(everything, sizes)

    def gather(self, thing: Any, root: int) -> list[Any] | None:
        data, sizes = self._exchanged("gather", thing)  # of all to all: an error is to be everybody's
        if self._rank != root:
            self._run(CallMaker.gatherv, data, None, root)
            return None
        everything = np.empty(int(sizes.sum()), np.uint8)
        self._run(CallMaker.gatherv, data, [everything, sizes], root)
        return _unpacked(everything, sizes)

    def scatter(self, things: Sequence[Any] | None, root: int) -> Any:
        own, sizes, everything, error = _empty(1), None, None, None
        if self._rank == root:
            sizes, everything, error = self._packed(things, self._nranks)
        self._run(CallMaker.scatter, sizes, own, root)
        _check("scatter", error, own, [root])
        data = np.empty(int(own[0]), np.uint8)
        self._run(CallMaker.scatterv, None if sizes is None else [everything, sizes], data, root)
        return _unpacked(data, own)[0]

    def alltoall(self, things: Sequence[Any]) -> list[Any]:
        sent, data, error = self._packed(things, self._nranks)
        received = _empty(self._nranks)
        self._run(CallMaker.alltoall, sent, received)
        _check("alltoall", error, received)
        everything = np.empty(int(received.sum()), np.uint8)
        self._run(CallMaker.alltoallv, [data, sent], [everything, received])
        return _unpacked(everything, received)

    def allreduce(self, thing: Any, op: Any) -> Any:
        return fold(op, self.allgather(thing))

    def reduce(self, thing: Any, op: Any, root: int) -> Any:
        things = self.gather(thing, root)
        return None if things is None else fold(op, things)

    def _exchanged(self, name: str, thing: Any) -> tuple[Bytes, Sizes]:
        """This rank's object as bytes, and the sizes of all ranks'."""
        own, data, error = self._packed([thing], 1)
        sizes = _empty(self._nranks)
        self._run(CallMaker.allgather, own, sizes)
        _check(name, error, sizes)
        return data, sizes

    def _packed(self, things: Sequence[Any] | None, count: int) -> tuple[Sizes, Bytes, Exception | None]:
        """The size of each object, all in one array, and why that is impossible."""
        try:
            if things is None or len(things) != count:
                got = "None" if things is None else len(things)
                raise ValueError(f"sendobj: expected {count} objects, one for each rank, got {got}")
            parts = [MPI.pickle.dumps(thing) for thing in things]
        except Exception as error:
            return np.full(count, UNABLE), np.empty(0, np.uint8), error
        data = bytearray().join(parts)
        return np.array([len(part) for part in parts]), np.frombuffer(data, np.uint8), None


def _empty(count: int) -> Sizes:
    return np.zeros(count, np.int64)


def _check(name: str, error: Exception | None, sizes: Sizes, ranks: Sequence[int] | None = None) -> None:
    """Raise if this rank, or one that it gets something from, could not pickle it."""
    if error is not None:
        raise error
    unable = np.flatnonzero(sizes == UNABLE)
    if unable.size:
        who = numbers(unable.tolist() if ranks is None else ranks)
        raise ValueError(f"{name}: expected an object to be pickled from every rank, got none from {who}")


def _unpacked(data: Bytes, sizes: Sizes) -> list[Any]:
    ends = np.cumsum(sizes).tolist()
    return [MPI.pickle.loads(data[end - size : end]) for end, size in zip(ends, sizes.tolist(), strict=True)]
