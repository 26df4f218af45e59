"""What is learned from, and in which order: data sets, sampling, augmentation, prefetching."""

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpicoll.schedule import chunk_bounds
from mpicoll.train.augmentation import Augmentation, parse_augmentation
from mpicoll.train.data import Dataset, Transform, check_labels, fitted, scaled, split, standardise
from mpicoll.train.errors import InputError
from mpicoll.train.mapped import Rows, blocks, finite_blocks, open_mapped
from mpicoll.train.prefetch import prefetched
from mpicoll.train.sampling import (
    class_weights,
    global_batches,
    own_part,
    parse_class_weights,
    parts,
    sample_weights,
)
from mpicoll.train.seeds import hashed_uniform, random_stream

from .foreign import ForeignArray, ForeignModule, foreign

AnyArray = npt.NDArray[Any]

# Order and parts --------------------------------------------------------------------------------------


@given(
    count=st.integers(1, 300),
    batch_size=st.integers(1, 70),
    nranks=st.integers(1, 40),
    epoch=st.integers(1, 9),
)
def test_the_parts_of_all_ranks_are_the_global_batch(
    count: int, batch_size: int, nranks: int, epoch: int
) -> None:
    seen = []
    for batch in global_batches(count, batch_size, 5, epoch):
        own = [batch[own_part(rank, nranks, len(batch))] for rank in range(nranks)]
        np.testing.assert_array_equal(np.concatenate(own), batch)
        sizes = [len(part) for part in own]
        assert max(sizes) - min(sizes) <= 1
        assert len(batch) <= batch_size
        seen.append(batch)
    assert all(len(batch) == batch_size for batch in seen[:-1])
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(count))


@given(count=st.integers(0, 10**6), shares=st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_parts_in_proportion_lose_nothing(count: int, shares: list[float]) -> None:
    if sum(shares) == 0:
        shares[0] = 1.0
    bounds = parts(count, shares)
    sizes = np.diff(bounds)
    assert bounds.dtype == np.int64 and (bounds[0], bounds[-1]) == (0, count)
    assert (sizes >= 0).all() and sizes[np.array(shares) == 0].sum() == 0
    assert np.abs(sizes - count * np.array(shares) / sum(shares)).max() < 1 + 1e-6


@pytest.mark.parametrize("count, nparts", [(0, 3), (1, 4), (5, 3), (6, 4), (64, 7), (1000, 33)])
@pytest.mark.parametrize("share", [1, 0.1, 1e9])
def test_equal_shares_give_the_even_parts(count: int, nparts: int, share: float) -> None:
    np.testing.assert_array_equal(parts(count, [share] * nparts), chunk_bounds(count, nparts))


def test_parts_by_largest_remainder() -> None:
    np.testing.assert_array_equal(parts(10, [1, 2, 4]), [0, 1, 4, 10])  # due: 1.43, 2.86, 5.71
    np.testing.assert_array_equal(parts(3, [0.6, 0.0, 0.4]), [0, 2, 2, 3])


@pytest.mark.parametrize(
    "shares, message",
    [
        ([], "shares: expected 1 numbers, got shape \\(0,\\)"),
        ([1.0, -1.0, 3.0], "shares: expected finite numbers from 0, got -1.0 as number 1"),
        ([1.0, np.nan], "got nan as number 1"),
        ([np.inf, 1.0], "got inf as number 0"),
        ([0.0, 0.0], "expected a finite sum above 0, got 0.0"),
    ],
)
def test_parts_of_no_shares(shares: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parts(10, shares)


def order(seed: int, epoch: int, weights: Any = None, first: int = 0) -> list[int]:
    return [int(i) for batch in global_batches(100, 32, seed, epoch, weights, first) for i in batch]


@pytest.mark.parametrize("weights", [None, np.arange(100.0)])
def test_epochs_and_seeds_have_orders_of_their_own(weights: Any) -> None:
    assert order(0, 1, weights) == order(0, 1, weights)
    assert len({tuple(order(seed, epoch, weights)) for seed in (0, 1) for epoch in (1, 2)}) == 4
    assert random_stream(0, "split").random() != random_stream(0, "shuffle").random()


@pytest.mark.parametrize("weights", [None, np.arange(100.0)])
@pytest.mark.parametrize("first", [0, 1, 3, 4, 7])
def test_an_epoch_is_taken_up_where_it_was_left(weights: Any, first: int) -> None:
    assert order(3, 2, weights, first) == order(3, 2, weights)[32 * first :]


def test_resampling_draws_by_weight() -> None:
    weights = np.array([1.0, 0.0, 3.0, 0.0])
    drawn = np.concatenate(
        [batch for epoch in range(2000) for batch in global_batches(4, 3, 0, epoch, weights)]
    )
    assert len(drawn) == 8000
    counts = np.bincount(drawn, minlength=4) / 8000
    np.testing.assert_allclose(counts, [0.25, 0, 0.75, 0], atol=0.02)
    assert counts[1] == counts[3] == 0


def test_no_draw_meets_a_sample_of_weight_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.array([0, 0.5, 1 - 2.0**-53])  # the least, one between two samples, the greatest
    stream = SimpleNamespace(random=lambda count: draws)
    monkeypatch.setattr("mpicoll.train.sampling.random_stream", lambda *purpose: stream)
    for scale in (1, 3, 0.1):
        weights = np.array([0, scale, 0, scale, 0])
        assert [list(batch) for batch in global_batches(5, 5, 0, 1, weights)] == [[1, 3, 3]]


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]])
def test_resampling_by_what_are_no_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights: expected"):
        global_batches(3, 2, 0, 0, np.array(weights))


# Classes ----------------------------------------------------------------------------------------------


def test_class_weights_make_all_classes_count_alike() -> None:
    y = np.array([0, 0, 0, 0, 0, 3, 1, 1, 1])
    weights = class_weights(y, 5)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [9 / 25, 9 / 15, 0, 9 / 5, 0], rtol=1e-6)  # n / (classes n_c)
    np.testing.assert_allclose(np.bincount(y, weights[y]), [1.8, 1.8, 0, 1.8], rtol=1e-6)


def test_sample_weights_make_classes_equally_likely() -> None:
    y = np.array([0, 0, 0, 3, 1, 1, 0])
    weights = sample_weights(y, 4)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(np.bincount(y, weights, 4), [1 / 3, 1 / 3, 0, 1 / 3])


@pytest.mark.parametrize("function", [class_weights, sample_weights])
def test_values_have_no_class_weights(function: Any) -> None:
    with pytest.raises(InputError, match="expected data with classes, got values to predict"):
        function(np.zeros((4, 1)), 0)


def test_class_weights_in_words() -> None:
    weights = parse_class_weights(" 0:2, 2 : 0.5", 4)
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, [2, 1, 0.5, 1])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected CLASS:WEIGHT, such as 0:1,3:2.5, .*got ''"),
        ("balance", "got 'balance'"),
        ("0:1,1", "got '1'"),
        ("0:1,-1:2", "got '-1:2'"),
        ("1:x", "got '1:x'"),
        ("1:nan", "got '1:nan'"),
        ("1:inf", "got '1:inf'"),
        ("1:-0.5", "finite weights from 0, got '1:-0.5'"),
        ("0:1,3:2", "expected a class from 0 to 2, got 3"),
        ("0:1,0:2", "got class 0 twice"),
        ("0:0,1:0,2:0", "expected one above 0, got only zeros"),
    ],
)
def test_class_weights_in_the_wrong_words(text: str, message: str) -> None:
    with pytest.raises(InputError, match="class weights: .*" + message):
        parse_class_weights(text, 3)


# Data sets --------------------------------------------------------------------------------------------


def numbers(classes: int = 3) -> Dataset:
    """30 samples of 2 x 3 to train with and 7 to test with; classes, or two values."""
    random = np.random.default_rng(6)
    x = random.standard_normal((37, 2, 3)).astype(np.float32)
    y = np.arange(37) % classes if classes else random.standard_normal((37, 2)).astype(np.float32)
    return Dataset("numbers", classes, x[:30], y[:30], x[30:], y[30:])


def test_split_keeps_every_sample_once() -> None:
    x = np.arange(50.0).reshape(50, 1)
    data = split("numbers", 50, x, np.arange(50), seed=4)
    assert len(data.test_x) == 10
    np.testing.assert_array_equal(data.train_x[:, 0], data.train_y)
    np.testing.assert_array_equal(data.test_x[:, 0], data.test_y)
    assert sorted([*data.train_y, *data.test_y]) == list(range(50))
    assert (split("numbers", 50, x, np.arange(50), seed=5).test_y != data.test_y).any()
    with pytest.raises(InputError, match=r"one: expected at least 2 samples, .*found 1"):
        split("one", 0, x[:1], x[:1], seed=0)


def test_standardise_uses_the_training_samples_only() -> None:
    train = np.array([[1.0, 5.0], [3.0, 5.0]])
    standardised, test = standardise(train, np.array([[5.0, 6.0]]), axis=0)
    np.testing.assert_array_equal(standardised, [[-1, 0], [1, 0]])
    np.testing.assert_array_equal(test, [[3, 1]])
    assert standardised.dtype == test.dtype == np.float32


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("sizes", [[100], [1, 99], [33, 33, 34], [50, 49, 1]])
def test_mean_and_deviation_do_not_depend_on_the_blocks(axis: int | None, sizes: list[int]) -> None:
    x = np.random.default_rng(1).standard_normal((100, 3)) * [1, 10, 1e-3] + [1e3, 0, -5]
    transform = fitted(np.split(x, np.cumsum(sizes)[:-1]), axis)
    np.testing.assert_allclose(transform.mean, x.mean(axis=axis), rtol=1e-12)
    np.testing.assert_allclose(1 / transform.scale, x.std(axis=axis), rtol=1e-9)


def test_what_never_varies_becomes_zero_in_spite_of_rounding() -> None:
    x = np.full((1001, 1), 0.1)
    assert x.std() > 0  # the rounding
    transform = fitted([x[:700], x[700:]], axis=0)
    assert np.abs(transform(x)).max() < 1e-9


def test_a_far_mean_costs_no_digits() -> None:
    x = np.array([[1e9], [1e9 + 1], [1e9 + 2]])
    np.testing.assert_allclose(fitted([x], axis=0)(x)[:, 0], [-np.sqrt(1.5), 0, np.sqrt(1.5)], rtol=1e-6)


def test_values_to_predict_are_scaled_and_classes_are_not() -> None:
    values = scaled(numbers(classes=0), axis=0)
    np.testing.assert_allclose(values.train_y.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(values.train_y.std(axis=0), 1, rtol=1e-5)
    assert values.train_y.dtype == values.test_y.dtype == np.float32
    np.testing.assert_array_equal(scaled(numbers(), axis=None).train_y, numbers().train_y)


def test_black_is_what_a_pixel_of_zero_becomes() -> None:
    data = numbers()
    data.train_x[4, 1, 2] = 0
    data = scaled(replace(data, train_x=data.train_x + 0), axis=None)
    assert data.train_x[4, 1, 2] == np.float32(data.black) != 0


def test_batches_are_the_samples_asked_for_and_standardised() -> None:
    data = numbers()
    as_bytes = replace(
        data, train_x=(data.train_x * 50 + 128).astype(np.uint8), transform=fitted([data.train_x], None)
    )
    indices = np.array([7, 0, 29, 7])
    x, y = as_bytes.train_batch(indices)
    expected = (as_bytes.train_x[indices].astype("f8") - data.train_x.mean(dtype="f8")) / data.train_x.std(
        dtype="f8"
    )
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, expected, rtol=1e-5)
    np.testing.assert_array_equal(y, data.train_y[indices])

    x, y = data.test_batch(slice(2, 5))
    np.testing.assert_array_equal(x, data.test_x[2:5])
    np.testing.assert_array_equal(y, data.test_y[2:5])
    assert len(as_bytes.train_batch(indices[:0])[0]) == 0


def test_sizes() -> None:
    data = numbers()
    assert (data.sample_shape, data.inputs, data.outputs, numbers(0).outputs) == ((2, 3), 6, 3, 2)


@pytest.mark.parametrize("kind", [float, np.int64])
@pytest.mark.parametrize("label", [-1, 3])
@pytest.mark.parametrize("part", ["train", "test"])
def test_labels_that_are_no_classes(kind: Any, label: int, part: str) -> None:
    data = numbers()
    check_labels(data)
    check_labels(numbers(classes=0))
    y = getattr(data, f"{part}_y").astype(kind)
    check_labels(replace(data, **{f"{part}_y": y}))
    y[[4, 6]] = label
    with pytest.raises(InputError, match=f"numbers: .* from 0 to 2, got {label}.* for {part}.* sample 4"):
        check_labels(replace(data, **{f"{part}_y": y}))


@pytest.mark.parametrize("label", [0.5, np.nan, np.inf])
def test_labels_that_are_not_whole(label: float) -> None:
    y = numbers().train_y.astype(float)
    y[0] = label
    with pytest.raises(
        InputError, match=f"expected labels that are whole numbers .*got {label} for training sample 0"
    ):
        check_labels(replace(numbers(), train_y=y))


# Mapped data ------------------------------------------------------------------------------------------


@pytest.fixture
def mapped(tmp_path: Path) -> Dataset:
    """30 samples in one file of 40 rows, and 7 in a file of their own."""
    random = np.random.default_rng(6)
    for name, count in (("both", 40), ("test", 7)):
        np.save(tmp_path / f"{name}.npy", random.standard_normal((count, 2, 3)) * 3 + 1)
    both = open_mapped(tmp_path / "both.npy")
    rows = Rows(both, np.sort(random.permutation(40)[:30]))
    train_y, test_y = np.arange(30) % 3, np.arange(7) % 3
    test_x = open_mapped(tmp_path / "test.npy")
    return Dataset("mapped", 3, rows, train_y, test_x, test_y, fitted(blocks(rows), axis=None))


def test_mapped_samples_are_read_by_the_batch(mapped: Dataset) -> None:
    rows = mapped.train_x
    assert isinstance(rows.array, np.memmap) and isinstance(mapped.test_x, np.memmap)
    assert (len(rows), rows.shape, rows.dtype) == (30, (30, 2, 3), np.float64)
    everything = np.array(rows.array)[rows.numbers]
    indices = np.array([29, 3, 3, 0])
    x, y = mapped.train_batch(indices)
    assert type(x) is np.ndarray and x.dtype == np.float32
    np.testing.assert_allclose(x, ((everything - everything.mean()) / everything.std())[indices], rtol=1e-5)
    np.testing.assert_array_equal(y, indices % 3)
    test_x, _ = mapped.test_batch(slice(1, 4))
    expected = (np.array(mapped.test_x[1:4]) - everything.mean()) / everything.std()
    np.testing.assert_allclose(test_x, expected, rtol=1e-5)


def test_blocks_are_all_rows_once(mapped: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpicoll.train.mapped.BLOCK_BYTES", 7 * 6 * 8)
    rows = mapped.train_x
    pieces = list(finite_blocks("rows", rows))
    assert [len(piece) for piece in pieces] == [7, 7, 7, 7, 2]
    np.testing.assert_array_equal(np.concatenate(pieces), rows[:])


def test_a_number_that_is_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpicoll.train.mapped.BLOCK_BYTES", 3 * 2 * 8)
    x = np.arange(40.0).reshape(20, 2)
    x[13, 1], x[17, 0] = np.nan, np.inf
    np.save(tmp_path / "x.npy", x)
    array = open_mapped(tmp_path / "x.npy")
    with pytest.raises(InputError, match="x: expected finite numbers, found nan in sample 13"):
        list(finite_blocks("x", array))
    with pytest.raises(InputError, match="found inf in sample 17"):
        list(finite_blocks("x", Rows(array, np.array([1, 2, 12, 14, 17, 19]))))


# Where CuPy's arrays are ------------------------------------------------------------------------------


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> ForeignModule:
    module = ForeignModule("cupy")
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_batches_come_to_the_model_s_arrays(cupy: ForeignModule, mapped: Dataset) -> None:
    in_memory = scaled(numbers(), axis=None)
    as_bytes = replace(numbers(), transform=Transform(np.float64(3), np.float64(0.5)))
    indices = np.array([3, 28, 3])
    for data in (in_memory, as_bytes, mapped):
        there = data.beside(foreign(np.zeros(1)))
        for ours, expected in (
            (there.train_batch(indices), data.train_batch(indices)),
            (there.test_batch(slice(0, 2)), data.test_batch(slice(0, 2))),
        ):
            for got, wanted in zip(ours, expected, strict=True):
                assert isinstance(got, ForeignArray)
                np.testing.assert_array_equal(got.host, wanted)
    there = mapped.beside(foreign(np.zeros(1)))
    assert isinstance(there.train_x, Rows)  # the samples stay where they are, what is small goes along
    assert isinstance(there.transform, Transform) and isinstance(there.transform.mean, ForeignArray)


def test_augmentation_and_its_random_numbers_are_the_same_there(cupy: ForeignModule) -> None:
    x, sample_numbers = images(6), np.arange(6) + 4
    expected = EVERYTHING.apply(x, sample_numbers, 1, 2, fill=-1)
    there = EVERYTHING.apply(foreign(x), sample_numbers, 1, 2, fill=-1)
    assert isinstance(there, ForeignArray)
    np.testing.assert_array_equal(there.host, expected)


# Random numbers by counters ---------------------------------------------------------------------------


def test_hashed_numbers_are_splitmix64_s() -> None:
    """Counters 0, 1, 2 are its first three outputs; those of seed 0 are widely published."""
    from mpicoll.train import seeds

    z = (np.arange(3, dtype=np.uint64) + seeds.ONE) * seeds.GOLDEN
    assert [int(h) for h in seeds._mixed(z)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_hashed_numbers_depend_on_their_own_counters_only() -> None:
    together = hashed_uniform(3, "drop", 5, np.arange(9)[:, None], np.arange(7))
    assert together.shape == (9, 7) and together.dtype == np.float64
    assert together[8, 2] == hashed_uniform(3, "drop", 5, 8, 2)
    np.testing.assert_array_equal(
        together[[4, 1]], hashed_uniform(3, "drop", 5, np.array([[4], [1]]), np.arange(7))
    )
    others = [
        hashed_uniform(4, "drop", 5, 8, 2),
        hashed_uniform(3, "flip", 5, 8, 2),
        hashed_uniform(3, "drop", 6, 8, 2),
        hashed_uniform(3, "drop", 5, 2, 8),
        hashed_uniform(3, "drop", 5, 8),
    ]
    assert len({float(u) for u in [together[8, 2], *others]}) == 6


def test_hashed_numbers_stay_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpicoll.train.seeds._mixed", lambda z: z | np.uint64(2**64 - 1))
    assert hashed_uniform(0, "test", np.arange(2)).tolist() == [1 - 2.0**-53] * 2


def test_hashed_numbers_never_change() -> None:
    """Checkpoints go on with them."""
    assert float(hashed_uniform(0, "test", 1, 2)) == 0.8682549729079752
    assert float(hashed_uniform(2**70, "test", -1)) == float(hashed_uniform(2**70, "test", np.array([-1]))[0])


def test_hashed_numbers_are_uniform_and_independent() -> None:
    u = hashed_uniform(0, "test", np.arange(400)[:, None], np.arange(500))
    assert 0 <= u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    histogram = np.histogram(u, 100, (0, 1))[0]
    chi_squared = ((histogram - 2000) ** 2 / 2000).sum()
    assert 50 < chi_squared < 160  # 99 degrees of freedom: 1 in 10,000 lies outside
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01


# Augmentation -----------------------------------------------------------------------------------------

EVERYTHING = Augmentation(shift=2, flip=True, noise=0.25)


def images(count: int) -> AnyArray:
    """[count, 3, 5, 7], every pixel another."""
    return np.arange(1, count * 105 + 1, dtype=np.float32).reshape(count, 3, 5, 7)


@pytest.mark.parametrize(
    "augmentation", [Augmentation(2), Augmentation(flip=True), Augmentation(noise=1.0), EVERYTHING]
)
def test_augmentation_does_not_depend_on_the_batch(augmentation: Augmentation) -> None:
    x, sample_numbers = images(50), np.random.default_rng(0).permutation(1000)[:50]
    kept = x.copy()
    whole = augmentation.apply(x, sample_numbers, seed=1, epoch=2)
    np.testing.assert_array_equal(x, kept)
    assert whole.dtype == np.float32 and whole.shape == x.shape and (whole != x).any()
    for part in (np.array([3]), np.array([7, 49, 3, 12]), np.array([], np.int64)):
        apart = augmentation.apply(x[part], sample_numbers[part], seed=1, epoch=2)
        np.testing.assert_array_equal(apart, whole[part])
    assert (augmentation.apply(x, sample_numbers, seed=1, epoch=3) != whole).any()
    assert (augmentation.apply(x, sample_numbers, seed=2, epoch=2) != whole).any()


def shifted(image: AnyArray, down: int, right: int, fill: float) -> AnyArray:
    height, width = image.shape[-2:]
    room = np.full((*image.shape[:-2], 3 * height, 3 * width), fill, image.dtype)
    room[..., height + down : 2 * height + down, width + right : 2 * width + right] = image
    return room[..., height : 2 * height, width : 2 * width]


def test_shifts_are_by_whole_pixels_and_black_moves_in() -> None:
    x = images(500)
    moved = Augmentation(shift=2).apply(x, np.arange(500), seed=0, epoch=0, fill=-7)
    seen = np.zeros((5, 5), int)
    for before, after in zip(x, moved, strict=True):
        found = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if (shifted(before, down, right, -7) == after).all()
        ]
        assert len(found) == 1
        seen[found[0][0] + 2, found[0][1] + 2] += 1
    assert seen.min() > 5 and seen.max() < 40  # 20 are expected of each


def test_flips_mirror_half_of_the_images() -> None:
    x = images(500)
    flipped = Augmentation(flip=True).apply(x, np.arange(500), seed=0, epoch=0)
    mirrored = (flipped == x[..., ::-1]).all(axis=(1, 2, 3))
    assert ((flipped == x).all(axis=(1, 2, 3)) ^ mirrored).all()
    assert 200 < mirrored.sum() < 300


def test_noise_is_normal_and_of_its_deviation() -> None:
    x = np.full((300, 40), 5.0)
    noise = Augmentation(noise=0.1).apply(x, np.arange(300), seed=0, epoch=0) - x
    assert abs(noise.mean()) < 0.003 and noise.std() == pytest.approx(0.1, rel=0.02)
    assert (noise**4).mean() / (noise**2).mean() ** 2 == pytest.approx(3, rel=0.1)
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.2


@pytest.mark.parametrize(
    "augmentation, shape, message",
    [
        (Augmentation(shift=1), (5,), r"expected images, .*got samples of shape \(5,\)"),
        (Augmentation(flip=True), (5,), "expected images, "),
        (Augmentation(shift=8), (3, 8, 9), "shifts smaller than the images, 8 x 9, got shift:8"),
    ],
)
def test_augmentation_of_what_it_does_not_fit(augmentation: Augmentation, shape: Any, message: str) -> None:
    for call in (
        lambda: augmentation.check(shape),
        lambda: augmentation.apply(np.zeros((2, *shape)), np.arange(2), 0, 0),
    ):
        with pytest.raises(InputError, match="augmentation: .*" + message):
            call()
    Augmentation(noise=0.1).check(shape)


def test_augmentation_in_words() -> None:
    assert parse_augmentation("none") is None
    assert parse_augmentation("flip") == Augmentation(flip=True)
    assert parse_augmentation(" noise:0.25, flip ,shift:2") == EVERYTHING


@pytest.mark.parametrize(
    "text, message",
    [
        ("blur", "expected some of shift, flip, noise, as in .*got 'blur'"),
        ("flip,", "expected some of shift, flip, noise, .*got ''"),
        ("shift", "expected shift:PIXELS, a whole number from 1, got 'shift'"),
        ("shift:0", "got 'shift:0'"),
        ("shift:1.5", "got 'shift:1.5'"),
        ("shift:-1", "got 'shift:-1'"),
        ("flip:0.5", "expected flip without a number, got 'flip:0.5'"),
        ("noise", "expected noise:DEVIATIONS, .*got 'noise'"),
        ("noise:-1", "got 'noise:-1'"),
        ("noise:nan", "got 'noise:nan'"),
        ("noise:inf", "got 'noise:inf'"),
        ("flip,shift:1,flip", "expected flip once"),
    ],
)
def test_augmentation_in_the_wrong_words(text: str, message: str) -> None:
    with pytest.raises(InputError, match="augmentation: .*" + message):
        parse_augmentation(text)


# Prefetching ------------------------------------------------------------------------------------------


def prefetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetched_items_are_all_and_in_order(count: int, depth: int) -> None:
    assert list(prefetched(range(count), depth)) == list(range(count))
    assert not prefetchers()


def test_items_are_computed_ahead_in_one_other_thread() -> None:
    computed: list[int] = []
    fourth = threading.Event()

    def items() -> Iterator[int]:
        for i in range(9):
            assert threading.current_thread().name.startswith("prefetch")
            computed.append(i)
            if i == 3:
                fourth.set()
            yield i

    ahead = prefetched(items(), depth=3)
    assert next(ahead) == 0
    assert fourth.wait(10)  # while the first is worked on, three more come
    time.sleep(0.01)
    assert computed == [0, 1, 2, 3]
    assert list(ahead) == list(range(1, 9))


def test_an_error_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise InputError("the fourth is bad")

    ahead = prefetched(items(), depth=2)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="the fourth is bad"):
        next(ahead)
    assert not prefetchers()


def test_closing_early_ends_the_thread() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    ahead: Any = prefetched(items())
    next(ahead)
    assert len(prefetchers()) == 1
    ahead.close()
    assert not prefetchers()
    del ahead
    assert closed.wait(10)


def test_a_depth_below_one() -> None:
    with pytest.raises(ValueError, match="depth: expected at least 1, got 0"):
        prefetched([1], depth=0)
