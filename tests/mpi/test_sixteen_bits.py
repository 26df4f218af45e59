"""Gradients in 16 bits: summed in float32, rounded once, and not widened on their way in messages."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll import calls
from mpicoll.compression import BFloat16, Float16

from .test_hierarchical import TWO, needs_nodes
from .test_hierarchical import communicator as on_nodes

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(params=["shared", "messages", pytest.param("nodes", marks=needs_nodes)])
def comm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One on which nothing that is to travel in 16 bits may be widened."""

    def refuse(*args: Any) -> None:
        raise AssertionError("16-bit floats travel as float32")

    if SIZE > 1:  # or nothing travels
        monkeypatch.setattr(calls, "_widen", refuse)
    made = on_nodes(TWO) if request.param == "nodes" else mpicoll.Communicator(WORLD, transport=request.param)
    yield made
    made.Free()


def values(rank: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Numbers whose sum in 16 bits depends on where it is rounded."""
    index = np.arange(count)
    return ((index * 37 + rank * 101) % 257 + 256 * (rank == 0)).astype(np.float32)


def expected(count: int, dtype: np.dtype[Any], factor: float) -> np.ndarray[Any, Any]:
    """Summed in float32 in the order of ranks, and rounded once."""
    total = np.zeros(count, np.float32)
    for rank in range(SIZE):
        total += values(rank, count).astype(dtype).astype(np.float32)
    rounded: np.ndarray[Any, Any] = (total * np.float32(factor)).astype(dtype)
    return rounded


@pytest.mark.algorithms
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
@pytest.mark.parametrize("average", [False, True])
def test_sums_are_rounded_once(comm: mpicoll.Communicator, dtype: np.dtype[Any], average: bool) -> None:
    for count in (0, 1, SIZE - 1, SIZE + 1, 1000, 9001):
        with mpicoll.GradientSync(comm, [(count,)], wire_dtype=dtype, average=average) as sync:
            for _ in range(2):
                sync.gradients[0][:] = values(RANK, count)
                sync.ready(0)
                assert sync.wait()
                wanted = expected(count, dtype, 1 / SIZE if average else 1)
                np.testing.assert_array_equal(sync.gradients[0], wanted.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_lists_of_arrays(comm: mpicoll.Communicator, dtype: np.dtype[Any]) -> None:
    for op, factor in ((MPI.SUM, 1.0), (mpicoll.AVG, 1 / SIZE)):
        arrays = [values(RANK, count).astype(dtype) for count in (5, 0, 70_001, 3)]
        comm.Allreduce_many(arrays, op)
        for array in arrays:
            np.testing.assert_array_equal(array, expected(array.size, dtype, factor))


@pytest.mark.parametrize("compression", [Float16(), BFloat16()], ids=lambda c: c.name)
def test_codecs(comm: mpicoll.Communicator, compression: Any) -> None:
    with mpicoll.GradientSync(comm, [(1001,)], compression=compression, average=False) as sync:
        sync.gradients[0][:] = values(RANK, 1001)
        sync.ready(0)
        assert sync.wait()
        wanted = expected(1001, np.dtype(compression.dtype), 1)
        np.testing.assert_array_equal(sync.gradients[0], wanted.astype(np.float32))


def test_a_named_algorithm_sends_16_bits_as_well() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "_widen", lambda *args: pytest.fail("16-bit floats travel as float32"))
        comm = mpicoll.Communicator(WORLD)
        with mpicoll.GradientSync(comm, [(1001,)], wire_dtype=BFLOAT16, algorithm="ring") as sync:
            sync.gradients[0][:] = values(RANK, 1001)
            sync.ready(0)
            assert sync.wait()
            wanted = expected(1001, BFLOAT16, 1 / SIZE)
            np.testing.assert_array_equal(sync.gradients[0], wanted.astype(np.float32))
        comm.Free()
