"""The compression kernels of the CPU; what those of a GPU must do as well is in `compression_twins`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mpicoll.kernels import lowrank, quantise, sparse
from mpicoll.kernels.sparse import random_indices

from tests.unit import compression_twins as twins

Array = npt.NDArray[Any]


@pytest.mark.parametrize("check", twins.QUANTISE)
def test_quantise(check: Callable[..., None]) -> None:
    check(quantise)


@pytest.mark.parametrize("check", twins.SPARSE)
def test_sparse(check: Callable[..., None]) -> None:
    check(sparse)


def test_error_feedback_is_exact_to_the_last_bit_on_the_cpu() -> None:
    """No product is fused with a sum, so ranks on different machines agree."""
    random = np.random.default_rng(1)
    values, residual = random.standard_normal((2, 10_000)).astype(np.float32)
    x = values * np.float32(0.3) + residual
    codes, scales = np.zeros(10_000, np.int8), np.zeros(40, np.float32)
    quantise.quantise_feedback(values, 0.3, residual, codes, scales)
    decoded = codes * np.repeat(scales, 256)[:10_000]
    assert residual.tobytes() == (x - decoded).tobytes()


# -- random places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k", [(0, 0), (1, 1), (7, 0), (10, 3), (10, 10), (1000, 999), (10**6, 12_345)])
def test_random_indices_are_distinct_and_ascending(n: int, k: int) -> None:
    indices = random_indices(3, 5, n, k)
    assert indices.dtype == np.int32 and len(indices) == k
    assert (np.diff(indices) > 0).all()
    assert ((indices >= 0) & (indices < n)).all()


def test_random_indices_are_known_to_every_rank_and_change_with_seed_and_step() -> None:
    assert random_indices(1, 0, 100, 5).tolist() == random_indices(1, 0, 100, 5).tolist()
    drawn = {tuple(random_indices(seed, step, 10**6, 5)) for seed in range(10) for step in range(10)}
    assert len(drawn) == 100
    # Whatever the machine and its NumPy.
    assert random_indices(1, 0, 100, 5).tolist() == [1, 20, 55, 62, 82]


def test_random_indices_come_equally_often() -> None:
    counts = np.zeros(100)
    for step in range(2000):
        counts[random_indices(0, step, 100, 10)] += 1
    assert abs(counts - 200).max() < 5 * np.sqrt(200)


def test_indices_that_int32_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k: expected 0 to 2147483648, with n below 2\*\*31"):
        random_indices(0, 0, 2**31, 1)


# -- narrow matrices -------------------------------------------------------------------------------------


def orthogonalised(matrix: Array) -> Array:
    flat = np.array(matrix, np.float32).ravel()
    lowrank.orthogonalise(flat, matrix.shape[1])
    return flat.reshape(matrix.shape)


@pytest.mark.parametrize("rows, rank", [(1, 1), (5, 1), (7, 3), (8, 8), (1000, 5)])
@pytest.mark.parametrize("magnitude", [1e-30, 1, 1e30])
def test_orthogonalise(rows: int, rank: int, magnitude: float) -> None:
    matrix = np.random.default_rng(rows).standard_normal((rows, rank)) * magnitude
    q = orthogonalised(matrix).astype(np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(rank), atol=1e-5)
    expected = np.linalg.qr(matrix)[0]
    np.testing.assert_allclose(np.abs(np.diag(expected.T @ q)), 1, atol=1e-4)  # the same directions


def test_dependent_and_zero_columns_become_zero() -> None:
    random = np.random.default_rng(2)
    a, b = random.standard_normal((2, 50))
    q = orthogonalised(np.stack([a, 0 * a, 2 * a, b, a + b, a + 1e-6 * random.standard_normal(50)], axis=1))
    assert q.any(axis=0).tolist() == [True, False, False, True, False, False]
    used = q[:, [0, 3]].astype(np.float64)
    np.testing.assert_allclose(used.T @ used, np.eye(2), atol=1e-6)
    assert not orthogonalised(np.zeros((4, 2))).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_columns_become_nan_and_not_zero(bad: float) -> None:
    matrix = np.random.default_rng(3).standard_normal((20, 3))
    matrix[4, 1] = bad
    q = orthogonalised(matrix)
    assert np.isfinite(q[:, 0]).all()
    assert np.isnan(q[:, 1:]).any(axis=0).all()


@pytest.mark.parametrize("rows, rank, columns", [(1, 1, 1), (3, 2, 5), (64, 4, 33), (5, 3, 0)])
def test_add_product(rows: int, rank: int, columns: int) -> None:
    random = np.random.default_rng(4)
    p, q = random.standard_normal((rows, rank)), random.standard_normal((rank, columns))
    p, q = p.astype(np.float32), q.astype(np.float32)
    before = random.standard_normal((rows, columns)).astype(np.float32)
    out = np.append(before.ravel(), np.float32(9))
    lowrank.add_product(-2, p.ravel(), q.ravel(), out[:-1], rank)
    wanted = before.copy()
    for c in range(rank):
        wanted += np.float32(-2) * p[:, c : c + 1] * q[c]
    assert out.tobytes() == np.append(wanted.ravel(), np.float32(9)).tobytes()


# -- arguments -------------------------------------------------------------------------------------------


def floats(count: int) -> Array:
    return np.zeros(count, np.float32)


def ints(count: int, dtype: npt.DTypeLike = np.int32) -> Array:
    return np.zeros(count, dtype)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: quantise.quantise(floats(9), ints(8, "i1"), floats(1)), "codes: expected 9 elements, got 8"),
        (lambda: quantise.quantise(floats(257), ints(257, "i1"), floats(1)), "scales: expected 2"),
        (
            lambda: quantise.quantise_feedback(floats(9), 1, floats(8), ints(9, "i1"), floats(1)),
            "residual: expected 9",
        ),
        (lambda: quantise.dequantise(ints(9, "i1"), floats(1), floats(8)), "out: expected 9"),
        (lambda: quantise.dequantise_add(ints(9, "i1"), floats(0), floats(9)), "scales: expected 1"),
        (lambda: quantise.narrow_feedback(floats(9), 1, floats(9), ints(8, "f2")), "halves: expected 9"),
        (lambda: quantise.widen(ints(9, "f2"), floats(8)), "out: expected 9"),
        (lambda: sparse.select(floats(9), 1, floats(9), 0, ints(0), floats(0)), "k: expected 1 to 9"),
        (lambda: sparse.select(floats(9), 1, floats(9), 10, ints(10), floats(10)), "k: expected 1 to 9"),
        (lambda: sparse.select(floats(9), 1, floats(9), 3, ints(3), floats(2)), "selected: expected 3"),
        (lambda: sparse.select_at(floats(9), 1, floats(9), ints(3), floats(3)), "selected: expected 4"),
        (lambda: sparse.scatter_add(ints(3), floats(2), floats(9)), "selected: expected 3"),
        (lambda: random_indices(0, 0, 3, 4), "k: expected 0 to 3"),
        (lambda: lowrank.orthogonalise(floats(7), 2), "p: expected 6"),
        (lambda: lowrank.add_product(1, floats(6), floats(8), floats(11), 2), "out: expected 12"),
    ],
)
def test_sizes_that_do_not_fit(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_arrays_that_kernels_cannot_take() -> None:
    constant = floats(4)
    constant.flags.writeable = False
    quantise.quantise(constant, ints(4, "i1"), floats(1))  # read only
    for values, out in (
        (np.zeros(4), floats(4)),
        (floats(8)[::2], floats(4)),
        (floats(4), constant),
        (floats(4), floats(8)[::2]),
        (floats(4).reshape(4, 1), floats(4)),
    ):
        with pytest.raises(ctypes.ArgumentError):
            sparse.select(values, 1, out, 1, ints(1), floats(1))
