"""Packing, unpacking and the fused update on the CPU, by the checks that its twin on a GPU passes, too."""

from __future__ import annotations

import numpy as np
import pytest
from mpicoll.kernels import packing

from tests.unit import twins
from tests.unit.twins import FLOATS, INTEGERS, OFFSETS, SETTINGS, Dtype, Settings, Twin

CPU = Twin(packing)
FLOAT32 = FLOATS[2]
PAIRS = [(dtype, bucket) for dtype in FLOATS for bucket in FLOATS]
UPDATES = [(FLOAT32, bucket) for bucket in FLOATS[:3]] + [(FLOATS[3], bucket) for bucket in FLOATS]


def test_slots() -> None:
    twins.check_slots(CPU)


@pytest.mark.parametrize("dtype", [np.dtype(bool), *INTEGERS, *FLOATS], ids=str)
def test_copies(dtype: Dtype) -> None:
    for by in OFFSETS:
        twins.check_pack(CPU, dtype, dtype, by=by)
        twins.check_unpack(CPU, dtype, dtype, by=by)


@pytest.mark.parametrize("dtype, bucket", PAIRS, ids=str)
def test_conversions(dtype: Dtype, bucket: Dtype) -> None:
    for by in OFFSETS:
        twins.check_pack(CPU, dtype, bucket, 1 / 3, by)
        twins.check_unpack(CPU, dtype, bucket, 1 / 3, by)


def test_shapes() -> None:
    twins.check_shapes(CPU)


def test_what_goes_past_the_caches() -> None:
    sizes = [packing.STREAMED // 4 + 3, 5, packing.STREAMED_EACH // 4 + 1]
    twins.check_pack(CPU, FLOAT32, FLOAT32, by=1, sizes=sizes)
    twins.check_unpack(CPU, FLOAT32, FLOAT32, by=1, sizes=sizes)


@pytest.mark.parametrize("dtype, bucket", PAIRS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_nonfinite(dtype: Dtype, bucket: Dtype, scale: float) -> None:
    twins.check_nonfinite(CPU, dtype, bucket, scale)


@pytest.mark.parametrize("dst", FLOATS[:3], ids=str)
def test_overflow(dst: Dtype) -> None:
    twins.check_overflow(CPU, dst)


def test_many_tensors() -> None:
    twins.check_many(CPU, 10_000)


def test_nothing() -> None:
    twins.check_nothing(CPU)


def test_packing_refuses() -> None:
    twins.check_packing_refuses(CPU, pytest.raises)


@pytest.mark.parametrize("dtype, bucket", UPDATES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_update(dtype: Dtype, bucket: Dtype, settings: Settings) -> None:
    for by in OFFSETS:
        twins.check_update(CPU, dtype, bucket, settings, by)


def test_update_nonfinite() -> None:
    twins.check_update_nonfinite(CPU)


def test_update_refuses() -> None:
    twins.check_update_refuses(CPU, pytest.raises)
