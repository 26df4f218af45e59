"""The CUDA kernels, run: in Numba's simulator, or on a GPU.

`test_cuda_kernels` runs this file in a process of its own, where NUMBA_ENABLE_CUDASIM is 1 before Numba is
imported. On a machine with a GPU, and without that, ``pytest tests/unit/cuda_cases.py`` runs it there, with
CuPy's arrays; ``bench/gpu.sh`` does so.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpicoll.kernels import cast_cuda, device_cuda, packing_cuda, quantise_cuda, reduce_cuda, sparse_cuda
from mpicoll.kernels.reduce import DTYPES as REDUCED
from mpicoll.kernels.reduce import OPERATIONS, supports

from tests.unit import compression_twins, twins
from tests.unit.twins import FLOATS, HALVES, INTEGERS, OFFSETS, SETTINGS, Dtype, Layout, Settings, Twin

simulated = pytest.mark.skipif(
    not device_cuda.SIMULATED, reason="only in the simulator is the host's memory taken for a GPU's"
)

if device_cuda.SIMULATED:
    from tests.unit import simulator  # noqa: F401 (changes Numba's)

    MEMORY: tuple[Callable[..., Any], Callable[..., Any]] = twins.aligned, np.array
    COMPRESSION = compression_twins.Memory(put=twins.aligned, sizes=(0, 1, 255, 257, 1000))
    SELECTION = compression_twins.Memory(put=twins.aligned, sizes=(0, 1, 33, 140), large=1000)
else:
    cupy = pytest.importorskip("cupy", reason="on a GPU arrays are CuPy's; NUMBA_ENABLE_CUDASIM=1: no GPU")

    def to_gpu(array: twins.Array) -> Any:
        """A copy; as bytes, for not every dtype is known there."""
        return cupy.asarray(np.ascontiguousarray(array).view(np.uint8)).view(array.dtype)

    def from_gpu(array: Any) -> Any:
        return cupy.asnumpy(array.view(np.uint8)).view(array.dtype)

    MEMORY = to_gpu, from_gpu
    COMPRESSION = SELECTION = compression_twins.Memory(put=to_gpu, get=from_gpu)

PACKING = Twin(packing_cuda, *MEMORY)
REDUCE = Twin(reduce_cuda, *MEMORY)
FLOAT32 = FLOATS[2]
PAIRS = [(dtype, bucket) for dtype in FLOATS for bucket in FLOATS]
UPDATES = [(FLOAT32, bucket) for bucket in FLOATS[:3]] + [(FLOATS[3], FLOATS[3])]
TILE = device_cuda.tile(4)  # elements of float32 that a simulated block moves at once


@simulated
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


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_search(dtype: Dtype) -> None:
    """Spoilt tensors are found, at any address and however long they are; none is changed."""
    spoils = {1: (0, np.nan), 2: (2 * TILE, np.inf), 4: (TILE - 1, -np.inf), 5: (4, np.nan)}
    tensors = [twins.numbers(dtype, size, i) for i, size in enumerate((700, 1, 2 * TILE + 1, 0, TILE, 5, 33))]
    for i, (at, value) in spoils.items():
        tensors[i][at] = value
    for by in OFFSETS:
        given = twins.guarded_tensors(PACKING, tensors, by)
        flags = twins.Guarded(PACKING, np.full(7, 7, np.int32))
        packing_cuda.Search([tensor.array for tensor in given]).launch(flags.array)()
        np.testing.assert_array_equal(flags.read(), [7, 1, 1, 7, 1, 1, 7])
        for tensor, before in zip(given, tensors, strict=True):
            twins.assert_same(tensor.read(), before, "the search changed a tensor")


def test_launches_keep_what_they_need() -> None:
    """Nobody else has the tables of addresses."""
    values = np.arange(5, dtype=np.float32)
    tensor, bucket, flags = (
        PACKING.upload(array) for array in (values, np.zeros(8, np.float32), np.zeros(1, np.int32))
    )
    packing, search = packing_cuda.Packing([tensor], bucket), packing_cuda.Search([tensor])
    launches = [packing.pack_launch(), packing.unpack_launch(2.0), search.launch(flags)]
    kept = [weakref.ref(packing), weakref.ref(search)]
    del packing, search
    assert all(one() is not None for one in kept)
    for launch in launches * 2:
        launch()
    np.testing.assert_array_equal(PACKING.download(tensor), 4 * values)
    assert not PACKING.download(flags).any()


@simulated
def test_search_refuses() -> None:
    with pytest.raises(TypeError, match="tensors: expected floats, got int32"):
        packing_cuda.Search([np.ones(3, np.int32)])
    with pytest.raises(ValueError, match="nonfinite: expected 1 int32"):
        packing_cuda.Search([np.ones(3)]).launch(np.zeros(2, np.int32))


@pytest.mark.parametrize("dst", FLOATS[:3], ids=str)
def test_overflow(dst: Dtype) -> None:
    twins.check_overflow(PACKING, dst)


def test_many_tensors() -> None:
    twins.check_many(PACKING, 1000)


def test_nothing() -> None:
    twins.check_nothing(PACKING)


def test_packing_refuses() -> None:
    twins.check_packing_refuses(PACKING, pytest.raises)


@simulated
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


# Each with some operations and dtypes: with all, compiling for a GPU would take minutes.
LAYOUTS = [
    Layout(1, 2, in_place=True),
    Layout(1, 2, 1, in_place=True),
    Layout(2, 3, 3, 0, factor=1 / 3),
    Layout(3, 1, 0, 1, factor=-2.5),
    Layout(1, 5, 2, 0, factor=0.7),
    Layout(3, 8, 1, 0, in_place=True, factor=1 / 3),
    Layout(1, 3, 0, 3),
]
FOLDS = [(op, dtype) for dtype in sorted(REDUCED, key=str) for op in OPERATIONS if supports(op, dtype)]


@pytest.mark.parametrize("number", range(len(FOLDS)), ids=lambda i: f"{FOLDS[i][0]}-{FOLDS[i][1]}")
def test_fold(number: int) -> None:
    """Enough elements for a block and a half, in whole accesses, in parts of them, and before and behind."""
    op, dtype = FOLDS[number]
    tile = device_cuda.tile(device_cuda.widest(dtype))
    for size in (0, 37, tile + tile // 2 + 39):
        twins.check_fold(REDUCE, op, dtype, size, LAYOUTS[number % len(LAYOUTS)])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fold_layouts(layout: Layout) -> None:
    for dtype in (FLOAT32, HALVES[1], INTEGERS[0]):
        for size in (1, 2, 3, 2 * device_cuda.tile(device_cuda.widest(dtype)) + 5):
            twins.check_fold(REDUCE, "SUM", dtype, size, layout)


def test_fold_of_many() -> None:
    twins.check_fold(REDUCE, "SUM", HALVES[0], 300, Layout(64, 64, 1, factor=0.1))
    twins.check_fold(REDUCE, "MAX", FLOAT32, 5, Layout(17, 9, 0, 1))


@simulated
@pytest.mark.parametrize("apart, widths", [(0, {4, 16}), (1, {4})])
def test_what_begins_alike_is_accessed_16_bytes_at_a_time(
    monkeypatch: pytest.MonkeyPatch, apart: int, widths: set[int]
) -> None:
    memory, found = device_cuda._simulated_memory, []

    def recording(address: int, lanes: int, dtype: Dtype) -> Any:
        found.append(lanes * dtype.itemsize)
        return memory(address, lanes, dtype)

    monkeypatch.setattr(device_cuda, "_simulated_memory", recording)
    size = 5 * TILE + 3
    twins.check_fold(REDUCE, "SUM", FLOAT32, size, Layout(2, 3, 1, apart))
    assert set(found) == widths
    # Three elements are before the first aligned address: what is behind them fills whole tiles.
    assert found.count(4) == 5 * (size if apart else 3)


def test_fold_refuses() -> None:
    twins.check_fold_refuses(REDUCE, pytest.raises)


@pytest.mark.parametrize(
    "op, dtype", [("SUM", FLOAT32), ("MIN", HALVES[0]), ("LXOR", np.dtype(bool))], ids=str
)
def test_reduce(op: str, dtype: Dtype) -> None:
    for size, by in ((0, (0, 0)), (300, (1, 1)), (300, (0, 3))):
        twins.check_reduce(REDUCE, op, dtype, size, by)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reduce_nan(dtype: Dtype) -> None:
    twins.check_reduce_nan(REDUCE, dtype)


@pytest.mark.parametrize("nsources", [1, 3])
def test_reduce_many(nsources: int) -> None:
    twins.check_reduce_many(REDUCE, "SUM", HALVES[0], nsources, 300)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_are_rounded_once(dtype: Dtype) -> None:
    twins.check_every_half(REDUCE, dtype, 3000)


@pytest.mark.parametrize("dst, src", PAIRS, ids=str)
def test_casts(dst: Dtype, src: Dtype) -> None:
    for size in (0, 1, 63, 1000):
        for by in ((0, 0), (1, 0), (3, 3)):
            values = twins.numbers(src, size, 1)
            source = twins.Guarded(REDUCE, values, by[0])
            target = twins.Guarded(REDUCE, np.ones(size, dst), by[1])
            into, of = (device_cuda.memory_of(guarded.array, "x").address for guarded in (target, source))
            cast_cuda.cast(dst, src, into, of, size, 0)
            twins.assert_same(target.read(), twins.rounded(values, dst), f"{size} {src}, {by} elements off")
            twins.assert_same(source.read(), values, "cast changed its source")


def test_reduce_refuses() -> None:
    twins.check_reduce_refuses(REDUCE, pytest.raises)


@pytest.mark.parametrize("check", compression_twins.QUANTISE, ids=lambda check: check.__name__)
def test_quantise(check: Callable[..., None]) -> None:
    check(quantise_cuda, COMPRESSION)


@pytest.mark.parametrize("check", compression_twins.SPARSE, ids=lambda check: check.__name__)
def test_sparse(check: Callable[..., None]) -> None:
    check(sparse_cuda, SELECTION)
