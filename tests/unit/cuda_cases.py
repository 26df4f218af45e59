"""The CUDA kernels in Numba's simulator; `test_cuda_kernels` runs this file in a process of its own.

There NUMBA_ENABLE_CUDASIM is 1 before Numba is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
import pytest
from mpicoll.kernels import device_cuda, packing_cuda, quantise_cuda, reduce_cuda, sparse_cuda
from numba.cuda.simulator import kernelapi

from tests.unit import compression_twins, twins
from tests.unit.twins import FLOATS, HALVES, INTEGERS, OFFSETS, SETTINGS, Dtype, Settings, Twin

PACKING = Twin(packing_cuda)
REDUCE = Twin(reduce_cuda)
COMPRESSION = compression_twins.Memory(put=twins.aligned, sizes=(0, 1, 255, 257, 1000))
SELECTION = compression_twins.Memory(put=twins.aligned, sizes=(0, 1, 33, 140), large=1000)
FLOAT32 = FLOATS[2]
PAIRS = [(dtype, bucket) for dtype in FLOATS for bucket in FLOATS]
UPDATES = [(FLOAT32, bucket) for bucket in FLOATS[:3]] + [(FLOATS[3], FLOATS[3])]
# The simulator's main thread polls for the others, which get the interpreter only when this time is over.
sys.setswitchinterval(1e-5)  # seconds; otherwise 5 ms

ALLOCATING = Lock()


def shared_array(self: Any, shape: int, dtype: Any) -> Any:
    """The array of the calling line. The simulator's own gives two threads that ask at once one each."""
    caller = sys._getframe(1)
    with ALLOCATING:
        return self._allocations.setdefault((caller.f_code, caller.f_lineno), np.empty(shape, str(dtype)))


kernelapi.FakeCUDAShared.array = shared_array

TILE = device_cuda.tile(4)  # elements of float32 that a simulated block moves at once


def test_it_is_the_simulator() -> None:
    assert device_cuda.SIMULATED


def test_slots() -> None:
    twins.check_slots(PACKING)


@pytest.mark.parametrize("dtype", [np.dtype(bool), *INTEGERS, *FLOATS], ids=str)
@pytest.mark.parametrize("by", OFFSETS)
def test_copies(dtype: Dtype, by: int) -> None:
    twins.check_pack(PACKING, dtype, dtype, by=by)
    twins.check_unpack(PACKING, dtype, dtype, by=by)


@pytest.mark.parametrize("dtype, bucket", PAIRS, ids=str)
def test_conversions(dtype: Dtype, bucket: Dtype) -> None:
    for by in OFFSETS:
        twins.check_pack(PACKING, dtype, bucket, 1 / 3, by)
        twins.check_unpack(PACKING, dtype, bucket, 1 / 3, by)


def test_shapes() -> None:
    twins.check_shapes(PACKING)


@pytest.mark.parametrize("size", [TILE - 1, TILE, TILE + 1, 9 * TILE + 5])
def test_sizes_around_those_of_blocks(size: int) -> None:
    twins.check_pack(PACKING, FLOAT32, FLOAT32, sizes=[size, 1, size])
    twins.check_pack(PACKING, FLOAT32, HALVES[1], 0.5, sizes=[size, 1, size])


def test_chunks_are_longer_where_there_is_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_cuda, "MANY_BLOCKS", 2)
    assert device_cuda.chunk_elements(5 * TILE, 4) == 2 * TILE
    assert device_cuda.chunk_elements(99 * TILE, 4) == device_cuda.MOST_TILES * TILE
    twins.check_pack(PACKING, FLOAT32, FLOAT32, sizes=[3, 5 * TILE + 7, 0, 2 * TILE])


@pytest.mark.parametrize(
    "dtype, bucket", [(FLOAT32, FLOAT32), (FLOAT32, HALVES[0]), (HALVES[1], HALVES[1])], ids=str
)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_nonfinite(dtype: Dtype, bucket: Dtype, scale: float) -> None:
    twins.check_nonfinite(PACKING, dtype, bucket, scale)


@pytest.mark.parametrize("dst", FLOATS[:3], ids=str)
def test_overflow(dst: Dtype) -> None:
    twins.check_overflow(PACKING, dst)


def test_many_tensors() -> None:
    twins.check_many(PACKING, 1000)


def test_nothing() -> None:
    twins.check_nothing(PACKING)


def test_packing_refuses() -> None:
    twins.check_packing_refuses(PACKING, pytest.raises)


def test_packing_refuses_a_misaligned_bucket() -> None:
    room = twins.aligned(np.ones(32, np.float32))
    with pytest.raises(ValueError, match=r"bucket: .*multiple of 16 bytes"):
        packing_cuda.Packing([room[:4]], room[1:])


@pytest.mark.parametrize("dtype, bucket", UPDATES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_update(dtype: Dtype, bucket: Dtype, settings: Settings) -> None:
    twins.check_update(PACKING, dtype, bucket, settings)


def test_update_at_any_address() -> None:
    twins.check_update(PACKING, FLOAT32, HALVES[0], SETTINGS[3], by=1)


def test_update_nonfinite() -> None:
    twins.check_update_nonfinite(PACKING)


def test_update_refuses() -> None:
    twins.check_update_refuses(PACKING, pytest.raises)


@pytest.mark.parametrize("op", ["SUM", "PROD", "MIN", "MAX"])
@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS], ids=str)
def test_reduce(op: str, dtype: Dtype) -> None:
    for size in (0, 1, 63, 1000):
        for by in ((0, 0), (1, 1), (0, 3)):
            twins.check_reduce(REDUCE, op, dtype, size, by)


@pytest.mark.parametrize("op", ["BAND", "BOR", "BXOR", "LAND", "LOR", "LXOR"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_reduce_bits(op: str, dtype: Dtype) -> None:
    for size in (0, 33, 300):
        twins.check_reduce(REDUCE, op, dtype, size, (0, 1))
        twins.check_reduce(REDUCE, op, dtype, size, (0, 0))


@pytest.mark.parametrize("op", ["LAND", "LOR", "LXOR"])
def test_reduce_bool(op: str) -> None:
    twins.check_reduce(REDUCE, op, np.dtype(bool), 300, (0, 0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reduce_nan(dtype: Dtype) -> None:
    twins.check_reduce_nan(REDUCE, dtype)


@pytest.mark.parametrize("nsources", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [*HALVES, FLOAT32, np.dtype(np.int8)], ids=str)
def test_reduce_many(nsources: int, dtype: Dtype) -> None:
    for size, by in ((0, 0), (300, 0), (300, 1)):
        twins.check_reduce_many(REDUCE, "SUM", dtype, nsources, size, by)
    twins.check_reduce_many(REDUCE, "MAX", dtype, nsources, 300)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_are_rounded_once(dtype: Dtype) -> None:
    twins.check_every_half(REDUCE, dtype, 5000)


def test_reduce_refuses() -> None:
    twins.check_reduce_refuses(REDUCE, pytest.raises)


@pytest.mark.parametrize("check", compression_twins.QUANTISE, ids=lambda check: check.__name__)
def test_quantise(check: Callable[..., None]) -> None:
    check(quantise_cuda, COMPRESSION)


@pytest.mark.parametrize("check", compression_twins.SPARSE, ids=lambda check: check.__name__)
def test_sparse(check: Callable[..., None]) -> None:
    check(sparse_cuda, SELECTION)
