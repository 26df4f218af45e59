"""Bad input: refused at once, with a fitting type, in words that name the argument; then all is well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll import algorithms

WORLD = MPI.COMM_WORLD
COMM = mpicoll.Communicator(WORLD)
RANK, SIZE = WORLD.rank, WORLD.size
X = np.arange(4.0 * SIZE)


def y(count: int = 4 * SIZE, dtype: str = "f8") -> Any:
    return np.zeros(count, dtype)


def read_only() -> Any:
    frozen = y()
    frozen.flags.writeable = False
    return frozen


Bad = tuple[Callable[[], Any], type[Exception], str]
EVERYWHERE: dict[str, Bad] = {
    "wrong dtype": (
        lambda: COMM.Allreduce(X, y(dtype="f4")),
        TypeError,
        "recvbuf: expected elements of float64 as in sendbuf, got float32",
    ),
    "bytes in a reduction": (
        lambda: COMM.Allreduce(X, y(8 * len(X), "u1")),
        TypeError,
        "recvbuf: expected elements of float64 as in sendbuf, got uint8",
    ),
    "fewer bytes in a reduction": (
        lambda: COMM.Reduce_scatter_block(X, y(4, "u1")),
        TypeError,
        "recvbuf: expected elements of float64 as in sendbuf, got uint8",
    ),
    "wrong dtype in allgather": (
        lambda: COMM.Allgather(X, y(len(X) * SIZE, "i8")),
        TypeError,
        "recvbuf: expected elements of float64 as in sendbuf, got int64",
    ),
    "wrong datatype": (
        lambda: COMM.Allreduce(X, [y(), MPI.FLOAT]),
        TypeError,
        "recvbuf: expected elements of float64 as in sendbuf, got float32",
    ),
    "short": (
        lambda: COMM.Allreduce(X, y(4 * SIZE - 1)),
        ValueError,
        f"recvbuf: expected {4 * SIZE} elements, as in sendbuf; got {4 * SIZE - 1}",
    ),
    "long": (lambda: COMM.Allreduce(X, y(4 * SIZE + 1)), ValueError, f"recvbuf: .* got {4 * SIZE + 1}"),
    "no receive buffer": (lambda: COMM.Allreduce(X, None), (TypeError, ValueError), "recvbuf: expected"),  # type: ignore[dict-item]
    "short allgather": (
        lambda: COMM.Allgather(X, y(3 * SIZE)),
        ValueError,
        f"recvbuf: expected {32 * SIZE} bytes for rank {RANK}, as much as sendbuf has, got 24",
    ),
    "allgather in unequal blocks": (
        lambda: COMM.Allgather(X, np.zeros(SIZE * 8 + 1, "u1")),
        ValueError,
        f"recvbuf: expected {SIZE} equal blocks of uint8, got {SIZE * 8 + 1} bytes"
        if SIZE > 1
        else "recvbuf",
    ),
    "short reduce-scatter": (
        lambda: COMM.Reduce_scatter_block(X, y(3)),
        ValueError,
        "recvbuf: expected 4 el.*3$",
    ),
    "short block for a rank": (
        lambda: COMM.Allgatherv(X, [y(), [1] * SIZE]),
        ValueError,
        f"recvbuf: expected {32 * SIZE} bytes for rank {RANK}",
    ),
    "read-only": (
        lambda: COMM.Allreduce(X, read_only()),
        ValueError,
        "recvbuf: expected memory that may be written, got a read-only buffer",
    ),
    "read-only in place": (
        lambda: COMM.Allreduce(MPI.IN_PLACE, b"12345678"),
        ValueError,
        "recvbuf: .* read-only",
    ),
    "strided input": (
        lambda: COMM.Allreduce(np.zeros(8 * SIZE)[::2], y()),
        ValueError,
        r"sendbuf: expected contiguous memory, got an array of shape \(.*\) with strides \(16,\)",
    ),
    "strided output": (
        lambda: COMM.Allreduce(X, np.zeros(8 * SIZE)[::2]),
        ValueError,
        "recvbuf: expected contig",
    ),
    "strided broadcast": (lambda: COMM.Bcast(np.zeros((4, 4))[:, 1]), ValueError, "buf: expected contiguous"),
    "objects": (
        lambda: COMM.Bcast(np.array([None])),
        TypeError,
        "buf: expected numbers or bytes, got .*objects",
    ),
    "not a buffer": (lambda: COMM.Bcast(3), TypeError, "buf: expected an array or .* got int"),
    "too much": (
        lambda: COMM.Bcast([y(3), 5, MPI.DOUBLE]),
        ValueError,
        r"buf: expected room for 5 elements of float64 \(40 bytes\), got 24 bytes",
    ),
    "too far": (
        lambda: COMM.Bcast([y(3), (1, 3)]),
        ValueError,
        "buf: expected room for 4 elements of float64",
    ),
    "negative": (
        lambda: COMM.Bcast([y(3), -1]),
        ValueError,
        "buf: expected a count and displacement of 0 or more",
    ),
    "half": (lambda: COMM.Bcast([y(3), 1.5]), TypeError, "buf: expected whole numbers as counts, got 1.5"),
    "five items": (
        lambda: COMM.Bcast([y(3), 1, 0, 0, "d"]),
        ValueError,
        r"buf: expected \[data, count, datatype\]",
    ),
    "counts for other ranks": (
        lambda: COMM.Allgatherv(X, [y(), [4] * (SIZE + 1)]),
        ValueError,
        f"recvbuf: expected {SIZE} counts, one for each rank",
    ),
    "block behind the end": (
        lambda: COMM.Allgatherv([X, 1], [y(), ([1] * SIZE, [4 * SIZE] * SIZE)]),
        ValueError,
        f"recvbuf: expected room for {4 * SIZE + 1} elements of float64",
    ),
    "recvcounts": (
        lambda: COMM.Reduce_scatter(X, y(4), [4] * (SIZE + 1)),
        ValueError,
        f"recvcounts: expected {SIZE} counts of 0 or more",
    ),
    "negative recvcounts": (
        lambda: COMM.Reduce_scatter(X, y(4), [-4] * SIZE),
        ValueError,
        f"recvcounts: expected {SIZE} counts of 0 or more",
    ),
    "recvcounts that do not fit": (
        lambda: COMM.Reduce_scatter(X, y(3), [3] * SIZE),
        ValueError,
        f"sendbuf: expected {3 * SIZE} elements, the sum",
    ),
    "recvcounts in place": (
        lambda: COMM.Reduce_scatter(MPI.IN_PLACE, y()),
        ValueError,
        "recvcounts: expected a count for each rank with IN_PLACE, got None",
    ),
    "algorithm": (
        lambda: COMM.Allreduce(X, y(), algorithm="quick"),
        ValueError,
        f"algorithm: .* {', '.join(algorithms.names('allreduce'))}, shared, hierarchical for .*'quick'",
    ),
    "algorithm of another collective": (
        lambda: COMM.Bcast(X, algorithm="ring"),
        ValueError,
        "algorithm: expected auto or one of binomial, .*got 'ring'",
    ),
    "algorithm that must know all sizes": (
        lambda: COMM.Gatherv(X, [y(SIZE * len(X)), [len(X)] * SIZE], algorithm="binomial"),
        ValueError,
        "algorithm: expected auto or one of direct, shared for gather, got 'binomial'",
    ),
    "root": (
        lambda: COMM.Bcast(X, root=SIZE),
        ValueError,
        f"root: expected a rank from 0 to {SIZE - 1}, got {SIZE}",
    ),
    "negative root": (
        lambda: COMM.Reduce(X, y(), root=-1),
        ValueError,
        "root: expected a rank from 0 .* got -1",
    ),
    "root that is no number": (lambda: COMM.Bcast(X, root="0"), TypeError, "root: expected .* got '0'"),
    "root of gather": (lambda: COMM.Gather(X, None, root=99), ValueError, "root: expected .* got 99"),
    "root of scatter": (lambda: COMM.Scatter(None, X, root=99), ValueError, "root: expected .* got 99"),
    "operation": (
        lambda: COMM.Allreduce(X, y(), op=MPI.BXOR),
        TypeError,
        "op: BXOR is not defined for float64; allowed: SUM, PROD, MIN, MAX",
    ),
    "average of integers": (
        lambda: COMM.Allreduce(y(3, "i4"), y(3, "i4"), op=mpicoll.AVG),
        TypeError,
        "op: AVG is defined for floating and complex dtypes, got int32",
    ),
    "maximum of complex numbers": (
        lambda: COMM.Allreduce(y(3, "c8"), y(3, "c8"), op=MPI.MAX),
        TypeError,
        "op: MAX is not defined for complex64; allowed: SUM, PROD",
    ),
    "not an operation": (lambda: COMM.Allreduce(X, y(), op="sum"), TypeError, "op: expected"),
}


def works() -> None:
    """All ranks come together and get the right answer: nothing of the bad call has been sent."""
    result = np.zeros(3, np.int64)
    COMM.Allreduce(np.full(3, RANK + 1), result)
    assert result.tolist() == [SIZE * (SIZE + 1) // 2] * 3


@pytest.mark.parametrize("bad", EVERYWHERE)
def test_on_every_rank(bad: str) -> None:
    call, error, words = EVERYWHERE[bad]
    with pytest.raises(error, match=words):
        call()
    works()


@pytest.mark.parametrize("bad", EVERYWHERE)
def test_on_one_rank_alone(bad: str) -> None:
    """The others have not called, and need not: the refusal needs no communication."""
    call, error, words = EVERYWHERE[bad]
    if RANK == SIZE - 1:
        with pytest.raises(error, match=words):
            call()
    works()


def test_what_only_the_root_may_do() -> None:
    other = (RANK + 1) % SIZE
    if SIZE > 1:
        for method in (COMM.Reduce, COMM.Gather):
            with pytest.raises((TypeError, ValueError), match="sendbuf: expected"):
                method(MPI.IN_PLACE, y(), root=other)
        with pytest.raises((TypeError, ValueError), match="recvbuf: expected"):
            COMM.Scatter(y(), MPI.IN_PLACE, root=other)
    with pytest.raises((TypeError, ValueError), match="recvbuf: expected"):
        COMM.Gather(X, None, root=RANK)
    with pytest.raises((TypeError, ValueError), match="sendbuf: expected"):
        COMM.Scatter(None, X, root=RANK)
    works()


def test_the_constructor() -> None:
    with pytest.raises(TypeError, match="comm: expected an mpi4py intracommunicator, got str"):
        mpicoll.Communicator("world")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"algorithm: expected auto or one of .*ring.*; got 'fastest'"):
        mpicoll.Communicator(WORLD, algorithm="fastest")
    works()


def test_a_freed_communicator_says_so() -> None:
    comm = COMM.Dup()
    comm.Free()
    with pytest.raises((MPI.Exception, ValueError, RuntimeError)):
        comm.Allreduce(X, y())
    works()
