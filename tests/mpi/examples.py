"""One example of every collective, for whatever way of calling it: buffers, what goes in, what must come out.

Data differ per rank, per index and per ``salt``, and sums are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll import algorithms
from tests.unit.reference import AT_SCALE

Array = npt.NDArray[Any]
UNTOUCHED = -7  # what a receive buffer holds before


def everyday(collective: str) -> tuple[str, ...]:
    """The algorithms that every layer is tested with; those at scale have a test in ``test_collectives``."""
    return tuple(name for name in algorithms.names(collective) if name not in AT_SCALE)


@dataclass
class Example:
    """Arguments of one call on one rank.

    ``source``: where this rank's input ``given(salt)`` goes, if it has any; ``target``: where the result
    ``expected(salt)`` must be, if it gets any. In place, the one may lie in the other.
    """

    args: tuple[Any, ...]
    source: Array | None
    given: Callable[[int], Array]
    target: Array | None
    expected: Callable[[int], Array]

    def fill(self, salt: int = 0) -> None:
        if self.target is not None:
            self.target[...] = UNTOUCHED
        if self.source is not None:
            self.source[...] = self.given(salt)

    def check(self, salt: int = 0, about: str = "") -> None:
        if self.target is not None:
            np.testing.assert_array_equal(self.target, self.expected(salt), err_msg=about)
        if self.source is not None and not (
            self.target is not None and np.shares_memory(self.source, self.target)
        ):
            np.testing.assert_array_equal(self.source, self.given(salt), err_msg=f"input changed; {about}")


Maker = Callable[[MPI.Intracomm, int, int, bool], Example]


def data(rank: int, count: int, salt: int = 0) -> Array:
    """What ``rank`` contributes: exact in int64 and float64, also summed over many ranks."""
    return np.arange(count, dtype=np.int64) * 3 + rank * 1_000_003 + salt * 17_011


def total(nranks: int, count: int, salt: int = 0) -> Array:
    return np.sum([data(rank, count, salt) for rank in range(nranks)], axis=0, dtype=np.int64).reshape(count)


def uneven(count: int, nranks: int) -> list[int]:
    """Block sizes about ``count``, some of them empty."""
    return [(count, 0, count // 2 + 1)[rank % 3] for rank in range(nranks)]


def spread(counts: Sequence[int]) -> list[int]:
    """Displacements that put the last block first and leave gaps of two elements."""
    ends = np.cumsum([count + 2 for count in reversed(counts)])
    return [int(end) - 2 - count for end, count in zip(reversed(ends), counts, strict=True)]


def even(count: int, nranks: int) -> tuple[list[int], list[int]]:
    return [count] * nranks, [rank * count for rank in range(nranks)]


def assembled(size: int, at: Sequence[int], blocks: Sequence[Array]) -> Array:
    whole = np.full(size, UNTOUCHED, np.int64)
    for start, block in zip(at, blocks, strict=True):
        whole[start : start + len(block)] = block
    return whole


def empty(count: int) -> Array:
    return np.empty(count, np.int64)


def allreduce(comm: MPI.Intracomm, count: int, root: int, in_place: bool) -> Example:
    recv = empty(count)
    send = recv if in_place else empty(count)
    return Example(
        (MPI.IN_PLACE if in_place else send, recv, MPI.SUM),
        send,
        lambda salt: data(comm.rank, count, salt),
        recv,
        lambda salt: total(comm.size, count, salt),
    )


def reduce(comm: MPI.Intracomm, count: int, root: int, in_place: bool) -> Example:
    recv = empty(count) if comm.rank == root else None
    send = recv if in_place and recv is not None else empty(count)
    return Example(
        (MPI.IN_PLACE if send is recv else send, recv, MPI.SUM, root),
        send,
        lambda salt: data(comm.rank, count, salt),
        recv,
        lambda salt: total(comm.size, count, salt),
    )


def _reduce_scatter(
    comm: MPI.Intracomm, counts: list[int], in_place: bool, given: tuple[Any, ...]
) -> Example:
    mine, start, size = counts[comm.rank], sum(counts[: comm.rank]), sum(counts)
    send = empty(size)
    recv = send if in_place else empty(mine)
    return Example(
        (MPI.IN_PLACE if in_place else send, recv, *given, MPI.SUM),
        send,
        lambda salt: data(comm.rank, size, salt),
        recv[:mine],
        lambda salt: total(comm.size, size, salt)[start : start + mine],
    )


def reduce_scatter_block(comm: MPI.Intracomm, count: int, root: int, in_place: bool) -> Example:
    return _reduce_scatter(comm, [count] * comm.size, in_place, ())


def reduce_scatter(comm: MPI.Intracomm, count: int, root: int, in_place: bool) -> Example:
    counts = uneven(count, comm.size)
    # Without in place, the counts may be left out: they are the sizes of the receive buffers.
    given = counts if in_place or count % 2 else None
    return _reduce_scatter(comm, counts, in_place, (given,))


def bcast(comm: MPI.Intracomm, count: int, root: int, in_place: bool) -> Example:
    buf = empty(count)
    return Example(
        (buf, root),
        buf if comm.rank == root else None,
        lambda salt: data(root, count, salt),
        buf,
        lambda salt: data(root, count, salt),
    )


def _gather(
    comm: MPI.Intracomm,
    counts: list[int],
    at: list[int],
    receives: bool,
    in_place: bool,
    spec: Callable[[Array], Any],
    root: tuple[int, ...],
) -> Example:
    mine = counts[comm.rank]
    size = max((start + count for start, count in zip(at, counts, strict=True)), default=0) + 1
    recv = empty(size) if receives else None
    send = empty(mine)
    if recv is not None and in_place:
        send = recv[at[comm.rank] : at[comm.rank] + mine]
    aliased = recv is not None and in_place
    return Example(
        (MPI.IN_PLACE if aliased else send, None if recv is None else spec(recv), *root),
        send,
        lambda salt: data(comm.rank, mine, salt),
        recv,
        lambda salt: assembled(size, at, [data(r, n, salt) for r, n in enumerate(counts)]),
    )


def gather(comm: MPI.Intracomm, count: int, root: int, in_place: bool) -> Example:
    counts, at = even(count, comm.size)
    return _gather(comm, counts, at, comm.rank == root, in_place, lambda recv: recv[:-1], (root,))


def gatherv(comm: MPI.Intracomm, count: int, root: int, in_place: bool) -> Example:
    counts = uneven(count, comm.size)
    at = spread(counts)
    receives = comm.rank == root
    return _gather(
        comm, counts, at, receives, in_place, lambda recv: [recv, counts, at, MPI.INT64_T], (root,)
    )


def allgather(comm: MPI.Intracomm, count: int, root: int, in_place: bool) -> Example:
    counts, at = even(count, comm.size)
    return _gather(comm, counts, at, True, in_place, lambda recv: recv[:-1], ())


def allgatherv(comm: MPI.Intracomm, count: int, root: int, in_place: bool) -> Example:
    counts = uneven(count, comm.size)
    at = spread(counts)
    return _gather(comm, counts, at, True, in_place, lambda recv: [recv, (counts, at)], ())


def _scatter(
    comm: MPI.Intracomm,
    counts: list[int],
    at: list[int],
    root: int,
    in_place: bool,
    spec: Callable[[Array], Any],
) -> Example:
    mine, start = counts[comm.rank], at[comm.rank]
    size = max((begin + count for begin, count in zip(at, counts, strict=True)), default=0) + 1
    send = empty(size) if comm.rank == root else None
    recv = None if in_place and send is not None else empty(mine)
    return Example(
        (None if send is None else spec(send), MPI.IN_PLACE if recv is None else recv, root),
        send,
        lambda salt: data(root, size, salt),
        recv,
        lambda salt: data(root, size, salt)[start : start + mine],
    )


def scatter(comm: MPI.Intracomm, count: int, root: int, in_place: bool) -> Example:
    counts, at = even(count, comm.size)
    return _scatter(comm, counts, at, root, in_place, lambda send: send[:-1])


def scatterv(comm: MPI.Intracomm, count: int, root: int, in_place: bool) -> Example:
    counts = uneven(count, comm.size)
    at = spread(counts)
    return _scatter(comm, counts, at, root, in_place, lambda send: [send, counts, at, MPI.INT64_T])


def alltoall(comm: MPI.Intracomm, count: int, root: int, in_place: bool) -> Example:
    size, mine = count * comm.size, slice(comm.rank * count, (comm.rank + 1) * count)
    recv = empty(size)
    send = recv if in_place else empty(size)
    return Example(
        (MPI.IN_PLACE if in_place else send, recv),
        send,
        lambda salt: data(comm.rank, size, salt),
        recv,
        lambda salt: np.concatenate([data(r, size, salt)[mine] for r in range(comm.size)]),
    )


def alltoallv(comm: MPI.Intracomm, count: int, root: int, in_place: bool) -> Example:
    """Ranks i and j exchange as much in one direction as in the other, which in place asks for."""

    def layout(rank: int) -> tuple[list[int], list[int]]:
        counts = [(count, 0, count // 2 + 1)[(rank + other) % 3] for other in range(comm.size)]
        return counts, spread(counts)

    def block(src: int, dst: int, salt: int) -> Array:
        counts, at = layout(src)
        return data(src, size, salt)[at[dst] : at[dst] + counts[dst]]

    counts, at = layout(comm.rank)
    size = comm.size * (count + 3)
    recv = empty(size)
    send = recv if in_place else empty(size)

    def expected(salt: int) -> Array:
        whole = assembled(size, at, [block(rank, comm.rank, salt) for rank in range(comm.size)])
        gaps = whole == UNTOUCHED
        if in_place:
            whole[gaps] = data(comm.rank, size, salt)[gaps]
        return whole

    return Example(
        (MPI.IN_PLACE if in_place else [send, counts, at, MPI.INT64_T], [recv, counts, at, MPI.INT64_T]),
        send,
        lambda salt: data(comm.rank, size, salt),
        recv,
        expected,
    )


def barrier(comm: MPI.Intracomm, count: int, root: int, in_place: bool) -> Example:
    nothing = empty(0)
    return Example((), None, lambda salt: nothing, None, lambda salt: nothing)


EXAMPLES: dict[str, Maker] = {
    "Allreduce": allreduce,
    "Reduce": reduce,
    "Reduce_scatter_block": reduce_scatter_block,
    "Reduce_scatter": reduce_scatter,
    "Bcast": bcast,
    "Gather": gather,
    "Gatherv": gatherv,
    "Allgather": allgather,
    "Allgatherv": allgatherv,
    "Scatter": scatter,
    "Scatterv": scatterv,
    "Alltoall": alltoall,
    "Alltoallv": alltoallv,
    "Barrier": barrier,
}
ROOTED = {"Reduce", "Bcast", "Gather", "Gatherv", "Scatter", "Scatterv"}
NEVER_IN_PLACE = {"Bcast", "Barrier"}


def roots(method: str, nranks: int) -> range:
    return range(nranks if method in ROOTED else 1)


def in_place_or_not(method: str) -> tuple[bool, ...]:
    return (False,) if method in NEVER_IN_PLACE else (False, True)
