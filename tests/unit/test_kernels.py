"""Every kernel on every dtype, against Python's integers and NumPy's widest numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from mpicoll.kernels.reduce import (
    DTYPES,
    OPERATIONS,
    cast_kernel,
    check_supported,
    reduce_kernel,
    scale_kernel,
    supports,
)

Array = npt.NDArray[Any]
Dtype = np.dtype[Any]
ALL = sorted(DTYPES, key=str)
FLOAT16, BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
HALVES = [FLOAT16, BFLOAT16]
REALS = [dtype for dtype in ALL if dtype.kind in "fV"]
SIZES = (0, 1, 7, 63, 64, 65, 1000)
OFFSETS = (0, 1, 3)  # elements from an aligned address
GUARD = 5  # elements behind the result, which must stay
REFERENCES: dict[str, Callable[[Any, Any], Any]] = {
    "SUM": lambda x, y: x + y,
    "PROD": lambda x, y: x * y,
    "MIN": min,
    "MAX": max,
    "BAND": lambda x, y: x & y,
    "BOR": lambda x, y: x | y,
    "BXOR": lambda x, y: x ^ y,
    "LAND": lambda x, y: bool(x) and bool(y),
    "LOR": lambda x, y: bool(x) or bool(y),
    "LXOR": lambda x, y: bool(x) != bool(y),
}
CASES = [(op, dtype) for op in OPERATIONS for dtype in ALL if supports(op, dtype)]
_REDUCE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ssize_t)
_SCALE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_double)


def call_reduce(op: str, dst: Array, a: Array, b: Array, count: int | None = None) -> None:
    kernel = _REDUCE(reduce_kernel(op, dst.dtype))
    kernel(dst.ctypes.data, a.ctypes.data, b.ctypes.data, len(dst) if count is None else count)


def reduced(op: str, a: Array, b: Array) -> Array:
    result = np.zeros_like(a)
    call_reduce(op, result, a, b)
    return result


def values(dtype: Dtype, count: int, seed: int) -> Array:
    """Any numbers for integers; for floats such as differ in magnitude; zeros among them."""
    random = np.random.default_rng((seed, count))
    if dtype.kind in "bu" or dtype.kind == "i":
        bits = random.integers(0, 256, count * dtype.itemsize, np.uint8).view(
            dtype if dtype.kind != "b" else "u1"
        )
        found = bits % 2 == 1 if dtype.kind == "b" else bits
    else:
        wide = random.standard_normal(count) * 2.0 ** random.integers(-6, 6, count)
        found = (wide + 1j * random.standard_normal(count)) if dtype.kind == "c" else wide
    found = found.astype(dtype)
    found[::5] = 0
    return found


def expected(op: str, a: Array, b: Array) -> Array:
    """Exact, then rounded or wrapped to the dtype once."""
    dtype = a.dtype
    if dtype.kind in "biu":
        mask = (1 << 8 * dtype.itemsize) - 1
        exact = [int(REFERENCES[op](int(x), int(y))) & mask for x, y in zip(a, b, strict=True)]
        return np.array(exact, f"u{dtype.itemsize}").view(dtype)
    if dtype.itemsize <= 4 and dtype.kind != "c":
        # float64 holds products of two, and the sums of these magnitudes, exactly.
        wide = [REFERENCES[op](float(x), float(y)) for x, y in zip(a, b, strict=True)]
        return np.array(wide, np.float64).astype(dtype)
    return np.array([REFERENCES[op](x, y) for x, y in zip(a, b, strict=True)], dtype)


def offset(values: Array, by: int) -> Array:
    """The same values ``by`` elements behind an aligned address, with a guard behind them."""
    room = np.zeros(len(values) + by + GUARD + 64, values.dtype)
    start = -room.ctypes.data % 64 // values.dtype.itemsize + by
    room[start : start + len(values)] = values
    return room[start : start + len(values) + GUARD]


@pytest.mark.parametrize("op, dtype", CASES, ids=str)
def test_reductions(op: str, dtype: Dtype) -> None:
    for size in SIZES:
        a, b = values(dtype, size, 1), values(dtype, size, 2)
        wanted = expected(op, a, b)
        for by in OFFSETS:
            x, y = offset(a, by), offset(b, 2 * by % 5)
            into = offset(np.ones(size, dtype), by)
            call_reduce(op, into, x, y, size)
            check(into[:size], wanted, op)
            np.testing.assert_array_equal(x[:size], a)
            np.testing.assert_array_equal(y[:size], b)
            call_reduce(op, x, x, y, size)  # in place
            check(x[:size], wanted, op)
            for guarded in (into, x, y):
                assert not guarded[size:].astype(bool).any()


def check(found: Array, wanted: Array, op: str) -> None:
    if found.dtype.kind == "c" and op == "PROD":  # a compiler may fuse a product and a sum
        eps = np.finfo(found.dtype).eps
        np.testing.assert_allclose(found, wanted, rtol=4 * eps, atol=64 * eps)
    else:
        assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("op", ["SUM", "PROD"])
def test_every_16_bit_float_is_rounded_once(op: str, dtype: Dtype) -> None:
    """All 65,536 bit patterns, among them subnormal numbers, infinities and NaN."""
    a = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    for seed in range(3):
        b = np.random.default_rng(seed).permutation(a)
        found = reduced(op, a, b)
        with np.errstate(all="ignore"):
            exact = np.add if op == "SUM" else np.multiply
            wide = exact(a.astype(np.float64), b.astype(np.float64))
            # float32 first: what the kernel computes in, and for these operands no second rounding shows.
            wanted = exact(a.astype(np.float32), b.astype(np.float32)).astype(dtype)
            error = np.abs(found.astype(np.float64) - wide)
        nan = np.isnan(wanted)
        assert (np.isnan(found) == nan).all()
        assert found[~nan].tobytes() == wanted[~nan].tobytes()
        ordinary = np.isfinite(wide) & np.isfinite(found.astype(np.float64))
        info = ml_dtypes.finfo(dtype)
        bound = np.maximum(np.abs(wide) * float(info.eps) / 2, float(info.smallest_subnormal) / 2)
        assert (error[ordinary] <= bound[ordinary] * (1 + 2.0**-12)).all()


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_nan_and_infinity(dtype: Dtype) -> None:
    nan, inf = np.nan, np.inf
    a = np.array([nan, 1, nan, inf, -inf, inf, 2, -0.0], np.float64).astype(dtype)
    b = np.array([1, nan, nan, 1, 1, -inf, inf, 0.0], np.float64).astype(dtype)

    def results(op: str) -> Array:
        return reduced(op, a, b).astype(np.float64)

    np.testing.assert_array_equal(results("MIN"), [nan, nan, nan, 1, -inf, -inf, 2, 0])
    np.testing.assert_array_equal(results("MAX"), [nan, nan, nan, inf, 1, inf, inf, 0])
    np.testing.assert_array_equal(results("SUM"), [nan, nan, nan, inf, -inf, nan, inf, 0])
    np.testing.assert_array_equal(results("PROD"), [nan, nan, nan, inf, -inf, -inf, inf, 0])


@pytest.mark.parametrize("dtype", [d for d in ALL if d.kind in "fcV"], ids=str)
def test_scale(dtype: Dtype) -> None:
    for size in SIZES:
        for by in OFFSETS:
            x = values(dtype, size, 3)
            scaled = offset(x, by)
            _SCALE(scale_kernel(dtype))(scaled.ctypes.data, size, 0.375)
            wide = np.complex128 if dtype.kind == "c" else np.float64
            assert scaled[:size].tobytes() == (x.astype(wide) * 0.375).astype(dtype).tobytes()
            assert not scaled[size:].astype(bool).any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_casts(dtype: Dtype) -> None:
    wide = np.dtype(np.float32)
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    widened = np.zeros(1 << 16, wide)
    cast_kernel(wide, dtype)(widened.ctypes.data, every.ctypes.data, 1 << 16)
    np.testing.assert_array_equal(widened, every.astype(wide))
    # Halfway between neighbours, and one bit to either side of it; infinities and NaN among them.
    bits = np.random.default_rng(1).integers(0, 1 << 32, 100_000, np.uint32)
    bits[:50_000] &= np.uint32(0xFFFF8000 if dtype == BFLOAT16 else 0xFFFFF000)
    bits[:1000] += np.uint32(1)
    bits[1000:2000] -= np.uint32(1)
    numbers = bits.view(wide)
    for size in (*SIZES, len(numbers)):
        found = np.zeros(size, dtype)
        cast_kernel(dtype, wide)(found.ctypes.data, numbers.ctypes.data, size)
        with np.errstate(all="ignore"):
            wanted = numbers[:size].astype(dtype)
        nan = np.isnan(wanted)
        assert (np.isnan(found) == nan).all()
        assert found[~nan].tobytes() == wanted[~nan].tobytes()


def test_a_nan_whose_payload_is_in_its_last_bits_stays_one() -> None:
    """Cutting or rounding its bits would make it an infinity."""
    nan = np.array([0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], np.uint32).view(np.float32)
    for dtype in HALVES:
        found = np.zeros(3, dtype)
        cast_kernel(dtype, np.dtype(np.float32))(found.ctypes.data, nan.ctypes.data, 3)
        assert np.isnan(found).all()


def test_operations_that_a_dtype_does_not_have() -> None:
    refused = [(op, dtype) for op in OPERATIONS for dtype in ALL if not supports(op, dtype)]
    assert {("BAND", "float32"), ("MAX", "complex64"), ("SUM", "bool"), ("LXOR", "bfloat16")} <= {
        (op, str(dtype)) for op, dtype in refused
    }
    for op, dtype in refused:
        allowed = ", ".join(name for name in OPERATIONS if supports(name, dtype))
        with pytest.raises(TypeError, match=f"^op: {op} is not defined for {dtype}; allowed: {allowed}$"):
            reduce_kernel(op, dtype)
    for dtype in map(np.dtype, ("longdouble", "S3", "M8[s]", ">f4" if np.little_endian else "<f4")):
        with pytest.raises(TypeError, match=r"op: SUM is not defined for .*; allowed: none"):
            check_supported("SUM", dtype)


def test_a_kernel_is_compiled_once() -> None:
    assert reduce_kernel("SUM", np.dtype("f4")) == reduce_kernel("SUM", np.dtype("float32"))
    assert reduce_kernel("SUM", np.dtype("f4")) != reduce_kernel("PROD", np.dtype("f4"))
