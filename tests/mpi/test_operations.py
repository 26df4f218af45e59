"""Every operation on every dtype, against a reference that loops over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from mpicoll.kernels.reduce import DTYPES, OPERATIONS, supports

import mpicoll

from .examples import Array

COMM = mpicoll.Communicator(MPI.COMM_WORLD)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
ALL = sorted(DTYPES, key=str)
FLOATS = [dtype for dtype in ALL if dtype.kind in "fcV"]
COUNT = 37
REFERENCES: dict[str, Callable[[Any, Any], Any]] = {
    "SUM": np.add,
    "PROD": np.multiply,
    "MIN": np.minimum,  # a NaN stays, as in the kernels
    "MAX": np.maximum,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
    "LAND": np.logical_and,
    "LOR": np.logical_or,
    "LXOR": np.logical_xor,
}


def contribution(dtype: np.dtype[Any], rank: int, op: str, count: int = COUNT) -> Array:
    """Small integers, signed where that is possible, whose sums and products are exact in every dtype."""
    index = np.arange(count)
    if op == "PROD":  # 1, 2 or -1: at most 2 ** ranks
        values = np.array([1, 2, 1, -1 if dtype.kind not in "bu" else 1])[(index + rank) % 4]
    elif op in ("LAND", "LOR", "LXOR"):
        values = (index >> rank % 3) % 2 * (1 + rank)
    else:
        values = (index * 5 + rank * 3) % 13 - (6 if dtype.kind not in "bu" else 0)
    if dtype.kind == "c":
        return (values + 1j * ((values * 3) % 5)).astype(dtype) if op != "PROD" else values.astype(dtype)
    return values.astype(dtype)


def reference(op: str, dtype: np.dtype[Any], count: int = COUNT) -> Array:
    parts = [contribution(dtype, rank, op, count) for rank in range(COMM.size)]
    return np.asarray(reduce(REFERENCES[op], parts)).astype(dtype)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_on_every_dtype(op: str) -> None:
    for dtype in ALL:
        if not supports(op, dtype):
            continue
        send = contribution(dtype, COMM.rank, op)
        recv = np.zeros(COUNT, dtype)
        COMM.Allreduce(send, recv, op=getattr(MPI, op))
        np.testing.assert_array_equal(recv, reference(op, dtype), err_msg=f"{op} {dtype}")
        COMM.Allreduce(MPI.IN_PLACE, send, getattr(MPI, op))
        np.testing.assert_array_equal(send, recv, err_msg=f"in place {op} {dtype}")


@pytest.mark.parametrize("op", ["SUM", "MAX"])
def test_every_dtype_in_reduce_and_reduce_scatter(op: str) -> None:
    root = COMM.size - 1
    for dtype in ALL:
        if not supports(op, dtype):
            continue
        count = 3 * COMM.size
        send, whole = contribution(dtype, COMM.rank, op, count), reference(op, dtype, count)
        recv, part = np.zeros(count, dtype), np.zeros(3, dtype)
        COMM.Reduce(send, recv if COMM.rank == root else None, getattr(MPI, op), root)
        if COMM.rank == root:
            np.testing.assert_array_equal(recv, whole, err_msg=str(dtype))
        COMM.Reduce_scatter_block(send, part, getattr(MPI, op))
        np.testing.assert_array_equal(part, whole[3 * COMM.rank :][:3], err_msg=str(dtype))


@pytest.mark.parametrize("collective", ["Allreduce", "Reduce", "Reduce_scatter_block", "Reduce_scatter"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_average(collective: str, dtype: np.dtype[Any]) -> None:
    """The sum divided by the number of ranks, within a rounding of the dtype."""
    per_rank = 3
    count = per_rank * COMM.size
    send, recv = contribution(dtype, COMM.rank, "SUM", count), np.zeros(count, dtype)
    wide = np.complex128 if dtype.kind == "c" else np.float64
    wanted = reference("SUM", np.dtype(wide), count) / COMM.size
    if collective.startswith("Reduce_scatter"):
        mine = slice(COMM.rank * per_rank, (COMM.rank + 1) * per_rank)
        recv, wanted = recv[mine].copy(), wanted[mine]
    getattr(COMM, collective)(send, recv, op=mpicoll.AVG)
    if collective != "Reduce" or COMM.rank == 0:
        # Dividing is multiplying by 1 / ranks, itself rounded: two roundings where that is not exact.
        tolerance = 2 * float(ml_dtypes.finfo(np.zeros(1, dtype).real.dtype).eps)
        np.testing.assert_allclose(recv.astype(wide), wanted, rtol=tolerance, atol=tolerance / 8)


def nearest(values: list[Fraction], dtype: np.dtype[Any]) -> Array:
    """Exact numbers rounded to ``dtype`` once, ties to even."""
    # float64 holds these sums exactly, and from float64 both casts round to nearest even.
    return np.array([float(value) for value in values], np.float64).astype(dtype)


@pytest.mark.algorithms
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("collective", ["Allreduce", "Reduce", "Reduce_scatter_block", "Allreduce in place"])
def test_sums_of_16_bit_floats_round_once(collective: str, dtype: np.dtype[Any]) -> None:
    """Multiples of 1/64 below 4: float32 adds them exactly, so only the last rounding is left.

    Rounding after every addition, as an MPI library would, gives other numbers from three ranks on.
    """
    count = 40 * COMM.size
    parts = [
        (np.random.default_rng(rank).integers(1, 256, count) / 64).astype(np.float32).astype(dtype)
        for rank in range(COMM.size)
    ]
    exact = [sum(map(Fraction, column)) for column in zip(*(p.astype(float) for p in parts), strict=True)]
    wanted = nearest([Fraction(value) for value in exact], dtype)
    send = parts[COMM.rank].copy()
    recv = np.zeros(count, dtype)
    if collective == "Allreduce in place":
        COMM.Allreduce(MPI.IN_PLACE, send)
        recv = send
    elif collective == "Reduce_scatter_block":
        recv = recv[:40].copy()
        COMM.Reduce_scatter_block(send, recv)
        wanted = wanted[COMM.rank * 40 :][:40]
    else:
        getattr(COMM, collective)(send, recv)
    if collective != "Reduce" or COMM.rank == 0:
        assert recv.tobytes() == wanted.tobytes()


@pytest.mark.algorithms
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_sums_of_any_16_bit_floats_are_as_near_as_one_rounding_allows(dtype: np.dtype[Any]) -> None:
    count = 500
    parts = [
        (np.random.default_rng(100 + rank).standard_normal(count) * 10).astype(np.float32).astype(dtype)
        for rank in range(COMM.size)
    ]
    recv = np.zeros(count, dtype)
    for name in ("ring", "recursive_doubling", "direct"):
        COMM.Allreduce(parts[COMM.rank], recv, algorithm=name)
        wide = np.array([part.astype(np.float64) for part in parts])
        exact = wide.sum(axis=0)
        half_ulp = np.abs(exact) * float(ml_dtypes.finfo(dtype).eps) / 2
        from_float32 = np.abs(wide).sum(axis=0) * COMM.size * 2.0**-24
        smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal) / 2
        assert (np.abs(recv.astype(np.float64) - exact) <= half_ulp + from_float32 + smallest).all(), name


@pytest.mark.parametrize("dtype", [d for d in FLOATS if d.kind != "c"], ids=str)
@pytest.mark.parametrize("op", ["MIN", "MAX"])
def test_a_nan_of_any_rank_stays(op: str, dtype: np.dtype[Any]) -> None:
    count = COMM.size + 1  # the last element has none
    send = np.arange(count).astype(np.float32).astype(dtype)
    send[COMM.rank] = np.nan
    recv = np.zeros(count, dtype)
    COMM.Allreduce(send, recv, op=getattr(MPI, op))
    assert np.isnan(recv.astype(np.float64)).tolist() == [True] * COMM.size + [False]
    assert float(recv[-1]) == COMM.size


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_infinities_and_overflow(dtype: np.dtype[Any]) -> None:
    send = np.array([np.inf, -np.inf, 1, np.nan], np.float32).astype(dtype)
    if COMM.rank == 0:
        send[2] = np.inf
    recv = np.zeros(4, dtype)
    COMM.Allreduce(send, recv)
    assert np.isinf(recv[:3].astype(np.complex128).real).all()
    assert np.isnan(recv[3].astype(np.complex128))
    assert recv[1].astype(np.complex128).real < 0


@pytest.mark.parametrize("dtype", [d for d in ALL if d.kind in "iu"], ids=str)
def test_integer_sums_wrap_around(dtype: np.dtype[Any]) -> None:
    send = np.full(5, np.iinfo(dtype).max, dtype)
    recv = np.zeros(5, dtype)
    COMM.Allreduce(send, recv)
    bits = 8 * dtype.itemsize
    wanted = (int(np.iinfo(dtype).max) * COMM.size) % (1 << bits)
    assert [int(value) % (1 << bits) for value in recv] == [wanted] * 5


def test_what_a_dtype_cannot_do_is_refused_on_all_ranks_before_anything_is_sent() -> None:
    refused = [(op, dtype) for op in OPERATIONS for dtype in ALL if not supports(op, dtype)]
    assert refused
    for op, dtype in refused:
        allowed = [name for name in OPERATIONS if supports(name, dtype)]
        with pytest.raises(TypeError) as caught:
            COMM.Allreduce(np.zeros(3, dtype), np.zeros(3, dtype), op=getattr(MPI, op))
        words = str(caught.value)
        assert words.startswith(f"op: {op} is not defined for {dtype}; allowed: ")
        assert words.split("allowed: ")[1].split(", ") == allowed
    for dtype in (d for d in ALL if d.kind not in "fcV"):
        with pytest.raises(
            TypeError, match=f"op: AVG is defined for floating and complex dtypes, got {dtype}"
        ):
            COMM.Allreduce(np.zeros(3, dtype), np.zeros(3, dtype), op=mpicoll.AVG)
    recv = np.zeros(1, np.int64)
    COMM.Allreduce(np.array([COMM.rank]), recv)
    assert recv[0] == sum(range(COMM.size))


@pytest.mark.parametrize("op", ["BAND", "LAND"])
def test_a_refusal_on_one_rank_alone_leaves_the_communicator_usable(op: str) -> None:
    if COMM.rank == COMM.size - 1:
        with pytest.raises(TypeError, match=f"op: {op} is not defined for float32"):
            COMM.Allreduce(np.zeros(2, "f4"), np.zeros(2, "f4"), op=getattr(MPI, op))
    recv = np.zeros(2, "i4")
    COMM.Allreduce(np.array([1, COMM.rank], "i4"), recv)
    assert recv.tolist() == [COMM.size, sum(range(COMM.size))]


def test_bytes_of_a_bool_stay_zero_or_one() -> None:
    for op in ("LAND", "LOR", "LXOR"):
        send = np.array([COMM.rank % 2 == 0, True, False])
        recv = np.ones(3, bool)
        COMM.Allreduce(send, recv, op=getattr(MPI, op))
        parts = [np.array([rank % 2 == 0, True, False]) for rank in range(COMM.size)]
        np.testing.assert_array_equal(recv.view(np.uint8), reduce(REFERENCES[op], parts).view(np.uint8))
