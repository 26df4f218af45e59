"""How a value lies over ranks, and which collectives follow from that: a little algebra.

A value v, over T ranks of which rank t holds v_t, is

    REPLICATED     v_t = v
    Split(axis)    v_t = a slice of v, one after the other along ``axis``; as even as it goes, some empty
    PARTIAL        v = v_0 + v_1 + ... + v_(T-1)

**Products.** y = x W is y[n, o] = sum over i of x[n, i] W[i, o]. Ranks share that work by dividing one of
the three indices: each computes what has its own values of it. An operand that has this index is split along
it, the others are replicated; and so is y, but if the index is i, each rank has a summand of y:

    divided    x            W            y
    n          Split(0)     REPLICATED   Split(0)       data parallelism
    i          Split(1)     Split(0)     PARTIAL        row-split
    o          REPLICATED   Split(1)     Split(1)       column-split

A product is linear, so one PARTIAL operand beside a replicated one gives a PARTIAL y. Nothing else goes: two
indices divided over the same ranks would leave out blocks.

**Gradients.** Each summand of a PARTIAL y has the gradient of the sum, dL/dy_t = dL/dy. So a layer needs dy

    REPLICATED for a replicated or a PARTIAL y,        Split(axis) for a Split(axis) y

and dx = dy Wᵀ, dW = xᵀ dy are products like any other. Between two layers, what one gives is brought into the
layout that the next one takes, forward, and backward the same with gradients:

                   x            y                        dy           dx = dy Wᵀ                dW
    column-split   REPLICATED   Split(1)                 Split(1)     PARTIAL: an allreduce     Split(1)
    row-split      Split(1)     PARTIAL: an allreduce    REPLICATED   Split(1)                  Split(0)
    by samples     Split(0)     Split(0)                 Split(0)     Split(0)                  PARTIAL

These are the conjugate operators f (nothing forward, an allreduce backward, before column-split weights) and
g (an allreduce forward, nothing backward, after row-split ones) of M. Shoeybi et al., "Megatron-LM",
arXiv:1909.08053 (2019); and the allreduce of dW in data parallelism. Nothing here knows of either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from mpicoll.schedule import chunk_bounds
from mpicoll.train.arrays import Array, array_module


class LayoutError(ValueError):
    """Layouts that do not go together, or an array that has not the layout that it is said to have."""


class Layout:
    """How a value lies over ranks: one of the three below."""


@dataclass(frozen=True)
class Replicated(Layout):
    def __str__(self) -> str:
        return "REPLICATED"


@dataclass(frozen=True)
class Partial(Layout):
    def __str__(self) -> str:
        return "PARTIAL"


@dataclass(frozen=True)
class Split(Layout):
    axis: int

    def __post_init__(self) -> None:
        if self.axis < 0:
            raise LayoutError(f"axis: expected 0 or more, got {self.axis}")

    def __str__(self) -> str:
        return f"Split({self.axis})"


REPLICATED = Replicated()
PARTIAL = Partial()


# -- products


def _lies(indices: str, divided: str, otherwise: Layout = REPLICATED) -> Layout:
    """The layout of a matrix with these two indices, where ranks have different values of ``divided``."""
    return Split(indices.index(divided)) if divided in indices else otherwise


PRODUCTS: dict[tuple[Layout, Layout], Layout] = {
    **{(_lies("ni", index), _lies("io", index)): _lies("no", index, otherwise=PARTIAL) for index in "nio"},
    (REPLICATED, REPLICATED): REPLICATED,
    (PARTIAL, REPLICATED): PARTIAL,
    (REPLICATED, PARTIAL): PARTIAL,
}


def product(x: Layout, w: Layout) -> Layout:
    """The layout of y = x W, [n, i] times [i, o], that ranks compute from what they hold.

    Raises `LayoutError` where that would not be x W.
    """
    if (x, w) not in PRODUCTS:
        possible = ", ".join(f"{a} and {b}" for a, b in PRODUCTS)
        raise LayoutError(f"x W: expected the layouts of x and W to be one of {possible}; got {x} and {w}")
    return PRODUCTS[x, w]


def transposed(matrix: Layout) -> Layout:
    """The layout of a matrix's transpose."""
    if not isinstance(matrix, Split):
        return matrix
    if matrix.axis not in (0, 1):
        raise LayoutError(f"transposed: expected the layout of a matrix, got {matrix}")
    return Split(1 - matrix.axis)


# -- gradients


def gradient_layout(value: Layout) -> Layout:
    """The layout in which the gradient with respect to a value is needed where that value is computed."""
    return REPLICATED if value == PARTIAL else value


class Flow(NamedTuple):
    """The layouts of what goes through a layer: x and y forward, dy and dx backward; w and dw of weights."""

    x: Layout
    y: Layout
    dy: Layout
    dx: Layout
    w: Layout = REPLICATED
    dw: Layout = REPLICATED


def linear(x: Layout, w: Layout) -> Flow:
    """Of y = x W. Raises `LayoutError`."""
    y = product(x, w)
    dy = gradient_layout(y)
    return Flow(x, y, dy, product(dy, transposed(w)), w, product(transposed(x), dy))


def unchanged(x: Layout) -> Flow:
    """Of a layer that computes each element, or each whole value, from what lies at the same place."""
    if x == PARTIAL:
        raise LayoutError("expected a value that is whole or split, got PARTIAL: f(a + b) is not f(a) + f(b)")
    return Flow(x, x, x, x)


# -- from one layout to another

COLLECTIVES: dict[tuple[type[Layout], type[Layout]], str] = {
    (Partial, Replicated): "allreduce",
    (Partial, Split): "reduce_scatter",
    (Split, Replicated): "allgather",
    (Split, Split): "alltoall",  # a T-th of what an allgather sends
    (Replicated, Split): "slice",  # nothing is sent
}


def redistribution(before: Layout, after: Layout) -> str:
    """What brings a value from one layout to another: a collective's name, "slice" or "nothing".

    Raises `LayoutError` for anything else to PARTIAL, which nobody needs.
    """
    if before == after:
        return "nothing"
    if (type(before), type(after)) not in COLLECTIVES:
        raise LayoutError(f"expected {before} to be made REPLICATED or Split, got {after}")
    return COLLECTIVES[type(before), type(after)]


def bytes_sent(collective: str, nbytes: int, nranks: int) -> float:
    """What a rank sends at the least, on average, in a collective on ``nbytes`` altogether."""
    of_others = nbytes * (nranks - 1) / nranks
    return {
        "nothing": 0.0,
        "slice": 0.0,
        "allreduce": 2 * of_others,
        "reduce_scatter": of_others,
        "allgather": of_others,
        "alltoall": of_others / nranks,
    }[collective]


def own_slice(length: int, rank: int, nranks: int) -> slice:
    """What ``rank`` holds of an axis that is split."""
    begin, end = chunk_bounds(length, nranks)[rank : rank + 2].tolist()
    return slice(begin, end)


def redistribute(
    comm: MPI.Intracomm, array: Array, before: Layout, after: Layout, length: int = 0
) -> tuple[Array, float]:
    """From what this rank holds of a value in layout ``before`` to what it holds in ``after``; collective.

    ``length`` is that of the whole value along the axis of ``before``, if this is a `Split`. Also returns how
    many bytes that sent (see `bytes_sent`). The result may share memory with ``array``, which is not changed.
    Raises `LayoutError`.
    """
    collective = redistribution(before, after)
    shape = list(array.shape)
    if isinstance(before, Split):
        _check_slice(comm, array, before, length)
        shape[before.axis] = length
    if collective == "nothing" or comm.size == 1:
        return array, 0.0
    nbytes = math.prod(shape) * array.dtype.itemsize
    return _moved(comm, array, before, after, length), bytes_sent(collective, nbytes, comm.size)


def _check_slice(comm: MPI.Intracomm, array: Array, before: Split, length: int) -> None:
    expected = _counts(length, comm.size)[comm.rank]
    if array.shape[before.axis] != expected:
        raise LayoutError(
            f"array: expected {expected} of {length} along axis {before.axis}, as rank {comm.rank} of "
            f"{comm.size} holds in layout {before}; got shape {array.shape}"
        )


def _moved(comm: MPI.Intracomm, array: Array, before: Layout, after: Layout, length: int) -> Array:
    match before, after:
        case Partial(), Replicated():
            return _allreduce(comm, array)
        case Partial(), Split(axis):
            return _reduce_scatter(comm, array, axis)
        case Split(axis), Replicated():
            return _allgather(comm, array, axis, length)
        case Split(axis), Split(new_axis):
            return _alltoall(comm, array, axis, new_axis, length)
        case _, Split(axis):
            return array[_along(axis, own_slice(array.shape[axis], comm.rank, comm.size))]
    raise AssertionError(f"{before} to {after}")


def _allreduce(comm: MPI.Intracomm, array: Array) -> Array:
    xp = array_module(array)
    summand = xp.ascontiguousarray(array)
    total = xp.empty_like(summand)
    comm.Allreduce(summand, total)
    return total


def _reduce_scatter(comm: MPI.Intracomm, array: Array, axis: int) -> Array:
    """With ``axis`` the first one, each rank's slice is one piece of memory; so in `_allgather`."""
    xp = array_module(array)
    summand = _first(array, axis)
    counts = _counts(len(summand), comm.size)
    own = xp.empty((counts[comm.rank], *summand.shape[1:]), array.dtype)
    comm.Reduce_scatter(summand, own, [count * _width(summand) for count in counts])
    return _back(own, axis)


def _allgather(comm: MPI.Intracomm, array: Array, axis: int, length: int) -> Array:
    own = _first(array, axis)
    whole = array_module(array).empty((length, *own.shape[1:]), array.dtype)
    comm.Allgatherv(own, [whole, [count * _width(own) for count in _counts(length, comm.size)]])
    return _back(whole, axis)


def _alltoall(comm: MPI.Intracomm, array: Array, axis: int, new_axis: int, length: int) -> Array:
    """Rank s's block for rank t: s's slice along ``axis``, t's along ``new_axis``."""
    xp = array_module(array)
    new_bounds = chunk_bounds(array.shape[new_axis], comm.size)
    blocks = xp.split(array, new_bounds[1:-1].tolist(), axis=new_axis)
    given = xp.concatenate([block.ravel() for block in blocks])
    counts = _counts(length, comm.size)
    shape = list(blocks[comm.rank].shape)
    shapes = [(*shape[:axis], count, *shape[axis + 1 :]) for count in counts]
    sizes = [math.prod(shape) for shape in shapes]
    got = xp.empty(sum(sizes), array.dtype)
    comm.Alltoallv([given, [block.size for block in blocks]], [got, sizes])
    pieces = xp.split(got, np.cumsum(sizes)[:-1].tolist())
    return xp.concatenate([p.reshape(s) for p, s in zip(pieces, shapes, strict=True)], axis=axis)


def _counts(length: int, nranks: int) -> list[int]:
    counts: list[int] = np.diff(chunk_bounds(length, nranks)).tolist()
    return counts


def _width(array: Array) -> int:
    """Elements for each place along the first axis."""
    return math.prod(array.shape[1:])


def _first(array: Array, axis: int) -> Array:
    """A contiguous array whose first axis is ``axis``."""
    xp = array_module(array)
    return xp.ascontiguousarray(xp.moveaxis(array, axis, 0))


def _back(array: Array, axis: int) -> Array:
    xp = array_module(array)
    return xp.ascontiguousarray(xp.moveaxis(array, 0, axis))


def _along(axis: int, places: slice) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, places)
