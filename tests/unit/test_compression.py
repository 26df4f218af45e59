"""Every compression on simulated ranks: all in this process, stage by stage, with exchanges by NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mpicoll.compression import (
    BFloat16,
    Bundle,
    Codec,
    Compression,
    Exchange,
    Float16,
    HalfCodec,
    Int8,
    Int8Codec,
    PowerSGD,
    RandomK,
    TopK,
    parse,
)
from mpicoll.train.losses import softmax_cross_entropy
from mpicoll.train.model import Sequential
from mpicoll.train.networks import perceptron
from mpicoll.train.optimizer import SGD
from mpicoll.train.readers import read_digits
from mpicoll.train.sampling import global_batches, own_part

Array = npt.NDArray[Any]

RANKS = (1, 2, 3, 5)
ALL = ("fp16", "bf16", "int8", "topk:0.01", "topk:0.3", "randomk:0.1", "powersgd:1", "powersgd:3")
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "one number": [()],
    "vector": [(7,)],
    "matrix": [(33, 40)],
    "convolution": [(16, 8, 3, 3), (16,)],
    "layers": [(64, 32), (32,), (32, 10), (10,), (3, 2)],
}


def named(name: str) -> Compression:
    compression = parse(name)
    assert compression is not None
    return compression


class Job:
    """Simulated ranks with a bucket and a codec each."""

    def __init__(self, name: str, shapes: Sequence[tuple[int, ...]], nranks: int, factor: float = 1) -> None:
        self.compression, self.shapes, self.factor = named(name), shapes, factor
        sizes = [math.prod(shape) for shape in shapes]
        self.offsets = list(accumulate(sizes, initial=0))[:-1]
        self.count = sum(sizes)
        self.buckets = [np.zeros(self.count, np.float32) for _ in range(nranks)]
        self.codecs: list[Codec] = [
            self.compression.bind(Bundle(bucket, shapes, self.offsets, rank, nranks, factor, np.zeros))
            for rank, bucket in enumerate(self.buckets)
        ]

    def step(self, gradients: Sequence[Array]) -> Array:
        """The sum, which must have the same bits on all ranks."""
        for bucket, gradient in zip(self.buckets, gradients, strict=True):
            bucket[:] = gradient
        for stages in zip(*(codec.stages for codec in self.codecs), strict=True):
            exchanges = [stage for stage in stages if isinstance(stage, Exchange)]
            if exchanges:
                exchange(exchanges)
                continue
            for stage in stages:
                assert callable(stage)
                stage()
        for bucket in self.buckets[1:]:
            assert bucket.tobytes() == self.buckets[0].tobytes()
        result: Array = self.buckets[0].copy()
        return result

    def missing(self) -> Array:
        """What all ranks together have not got across, float64."""
        total = np.zeros(self.count)
        for codec in self.codecs:
            total += codec.residual
            if isinstance(codec, Int8Codec):
                total[codec.own] += codec.sum_residual
        return total


def exchange(calls: Sequence[Exchange]) -> None:
    """What MPI would do; it insists on equal sizes, too."""
    assert len({(c.collective, c.send.size, c.recv.size, c.send.dtype) for c in calls}) == 1
    sent = [call.send.copy() for call in calls]
    for rank, call in enumerate(calls):
        assert call.send.ndim == call.recv.ndim == 1
        if call.collective == "Allreduce":
            assert call.send is call.recv
            # In float32, rounded once, as our communicator does it.
            with np.errstate(over="ignore"):
                call.recv[:] = np.sum([part.astype(np.float32) for part in sent], axis=0)
        elif call.collective == "Allgather":
            call.recv[:] = np.concatenate(sent)
        else:
            assert call.collective == "Alltoall"
            call.recv[:] = np.concatenate([np.split(part, len(calls))[rank] for part in sent])


def bytes_sent(call: Exchange, nranks: int) -> float:
    per_byte = {"Allreduce": 2 / nranks, "Allgather": 1, "Alltoall": 1 / nranks}
    return per_byte[call.collective] * (nranks - 1) * call.send.nbytes


def normal(count: int, nranks: int, seed: int) -> list[Array]:
    """Gradients that differ from rank to rank, in what they have in common, too."""
    random = np.random.default_rng(seed)
    return list((random.standard_normal((nranks, count)) + np.arange(nranks)[:, None]).astype(np.float32))


@pytest.mark.parametrize("nranks", RANKS)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_what_the_results_lack_is_in_the_residuals(
    name: str, shapes: list[tuple[int, ...]], nranks: int
) -> None:
    """Also that all ranks have the same bits, at every step."""
    factor = 1 / nranks
    job = Job(name, shapes, nranks, factor)
    true, found = np.zeros(job.count), np.zeros(job.count)
    steps = 12
    for step in range(steps):
        gradients = normal(job.count, nranks, step)
        true += factor * np.sum(gradients, axis=0, dtype=np.float64)
        found += job.step(gradients)
    largest = 4.0 * steps  # of the numbers that are rounded to float32 on the way
    tolerance = 1e-6 * largest * steps + sum_rounding(job) * steps * 4
    np.testing.assert_allclose(found + job.missing(), true, rtol=0, atol=tolerance)


def sum_rounding(job: Job) -> float:
    """What part of a step's result may be lost where no residual sees it."""
    codec = job.codecs[0]
    if not isinstance(codec, HalfCodec) or len(job.codecs) == 1:
        return 0
    return 2.0**-11 if codec.halves.dtype == np.float16 else 2.0**-8


# How many steps' worth of gradients may be missing in the results.
BEHIND = {"topk:0.01": 60, "topk:0.3": 2, "randomk:0.1": 20, "powersgd:1": 20, "powersgd:3": 8}


@pytest.mark.parametrize("name", ALL)
def test_results_do_not_fall_behind(name: str) -> None:
    """With gradients that are always the same, which is the worst for a residual."""
    job = Job(name, SHAPES["layers"], 3)
    gradients = normal(job.count, 3, 0)
    one_step = np.linalg.norm(np.sum(gradients, axis=0))
    behind = []
    for _ in range(600):
        job.step(gradients)
        behind.append(float(np.linalg.norm(job.missing()) / one_step))
    assert max(behind) < BEHIND.get(name, 0.02)


@pytest.mark.parametrize("nranks", RANKS)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_volume(name: str, shapes: list[tuple[int, ...]], nranks: int) -> None:
    job = Job(name, shapes, nranks)
    calls = [stage for stage in job.codecs[0].stages if isinstance(stage, Exchange)]
    stated = job.compression.volume(job.count, shapes, nranks)
    assert stated == pytest.approx(sum(bytes_sent(call, nranks) for call in calls))


def test_volumes_of_a_large_bucket() -> None:
    """As the table at the module's head says, of float32's 8 n (p-1)/p."""
    shapes = [(1000, 1000)]
    float32 = 8 * 1_000_000 * 3 / 4
    parts = {name: named(name).volume(1_000_000, shapes, 4) / float32 for name in ALL}
    assert parts == pytest.approx(
        {
            "fp16": 0.5,
            "bf16": 0.5,
            "int8": 0.254,
            "topk:0.01": 0.04,
            "topk:0.3": 1.2,
            "randomk:0.1": 0.1,
            "powersgd:1": 0.002,
            "powersgd:3": 0.006,
        },
        rel=1e-3,
    )


@pytest.mark.parametrize("name", ALL)
def test_zero_gradients(name: str) -> None:
    """They give zeros, and what comes after them is not spoilt."""
    job = Job(name, SHAPES["layers"], 2)
    for _ in range(3):
        assert not job.step([np.zeros(job.count, np.float32)] * 2).any()
        assert not job.missing().any()
    gradients = normal(job.count, 2, 1)
    total = np.sum([job.step(gradients) for _ in range(10)], axis=0) + job.missing()
    np.testing.assert_allclose(total / 10, np.sum(gradients, axis=0), atol=0.02)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("nranks", RANKS)
@pytest.mark.parametrize("name", ALL)
def test_nonfinite_gradients_show_on_all_ranks_and_are_gone_then(name: str, nranks: int, bad: float) -> None:
    for everywhere in (False, True):
        job = Job(name, SHAPES["layers"], nranks)
        ordinary = normal(job.count, nranks, 2)
        job.step(ordinary)
        for at in (0, 5, 2047, 2050, job.count - 1):
            spoilt = [gradient.copy() for gradient in ordinary]
            spoilt[-1][slice(None) if everywhere else at] = bad
            result = job.step(spoilt)
            assert not np.isfinite(result[at] if name[:4] != "topk" else result).all()
            for _ in range(3):
                assert np.isfinite(job.step(ordinary)).all()
                assert np.isfinite(job.missing()).all()


@pytest.mark.parametrize("name", ["fp16", "int8", "topk:0.01", "randomk:0.1", "powersgd:3"])
def test_where_a_nan_shows(name: str) -> None:
    job = Job(name, SHAPES["layers"], 2)
    gradients = normal(job.count, 2, 3)
    gradients[1][600] = np.nan
    bad = set(np.flatnonzero(np.isnan(job.step(gradients))).tolist())
    assert bad == {
        "fp16": {600},
        "int8": set(range(512, 768)),
        "topk:0.01": {600},
        "randomk:0.1": set(range(job.count)),
        "powersgd:3": set(range(64 * 32)),
    }.get(name)


@pytest.mark.parametrize("name", ["fp16", "bf16", "int8", "powersgd:3"])
@pytest.mark.parametrize("magnitude", [1e-3, 1, 1e3])
def test_one_step_is_about_right(name: str, magnitude: float) -> None:
    """For PowerSGD, of a matrix that has that rank."""
    job = Job(name, [(50, 40)], 3)
    random = np.random.default_rng(5)
    left, right = random.standard_normal((3, 50, 1)), random.standard_normal((3, 1, 40))
    gradients = list((magnitude * left * right).astype(np.float32).reshape(3, 2000))
    true = np.sum(gradients, axis=0)
    relative = {"fp16": 2**-9, "bf16": 2**-6, "int8": 1 / 40, "powersgd:3": 1e-5}[name]
    np.testing.assert_allclose(job.step(gradients), true, rtol=0, atol=relative * np.abs(true).max())


def test_powersgd_finds_what_was_not_there_before() -> None:
    """A direction that had no gradient would have none for ever if its part of Q stayed 0."""
    job = Job("powersgd:3", [(50, 40)], 2)
    random = np.random.default_rng(7)
    for rank in (0, 1, 3, 2, 0, 3):
        matrix = random.standard_normal((50, rank)) @ random.standard_normal((rank, 40))
        gradient = matrix.astype(np.float32).ravel()
        for _ in range(4):  # the first steps turn to the new directions
            result = job.step([gradient, 2 * gradient])
        np.testing.assert_allclose(result, 3 * gradient, rtol=0, atol=0.01)


def test_powersgd_begins_with_the_same_q_on_all_ranks() -> None:
    codecs = Job("powersgd:2", [(50, 40), (40, 50)], 3).codecs
    assert len({codec.arrays["q"].tobytes() for codec in codecs}) == 1
    first, second = np.split(codecs[0].arrays["q"], [80])
    assert not np.isin(first, second).any()


@pytest.mark.parametrize("count", [1, 5, 255, 1027])
def test_int8_scales_are_aligned(count: int) -> None:
    """Not every processor can read a float32 anywhere."""
    for codec in Job("int8", [(count,)], 3).codecs:
        assert isinstance(codec, Int8Codec)
        rows = [*codec.parts, *codec.received, *codec.everything, codec.own_sum]
        assert all(row.scales.flags.aligned for row in rows)


@pytest.mark.parametrize("magnitude", [1e-25, 1e25])
def test_powersgd_with_tiny_and_huge_gradients(magnitude: float) -> None:
    job = Job("powersgd:2", [(50, 40)], 2)
    left, right = np.random.default_rng(6).standard_normal((2, 50, 1))
    gradient = (magnitude * left * right[:40].T).astype(np.float32).ravel()
    for _ in range(5):
        np.testing.assert_allclose(job.step([gradient, gradient]), 2 * gradient, rtol=1e-4)


def test_float16_overflow_is_infinity_and_not_kept() -> None:
    job = Job("fp16", [(3,)], 2)
    result = job.step([np.array([1e6, 6e4, 1], np.float32)] * 2)
    assert result.tolist() == [np.inf, np.inf, 2]
    assert job.step([np.ones(3, np.float32)] * 2).tolist() == [2, 2, 2]


@pytest.mark.parametrize("name", ALL)
def test_arrays_are_all_that_a_checkpoint_needs(name: str) -> None:
    """A job that gets another's arrays goes on as that one does."""
    job, copy = Job(name, SHAPES["layers"], 3), Job(name, SHAPES["layers"], 3)
    for step in range(3):
        job.step(normal(job.count, 3, step))
    for source, target in zip(job.codecs, copy.codecs, strict=True):
        assert "residual" in source.arrays
        for key, array in source.arrays.items():
            target.arrays[key][...] = array
    for step in range(3, 6):
        gradients = normal(job.count, 3, step)
        assert job.step(gradients).tobytes() == copy.step(gradients).tobytes()


# -- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp16", "bf16", "int8", "topk:0.01", "randomk:0.1", "powersgd:2"])
def test_training(name: str) -> None:
    """A perceptron recognises 98 % of scikit-learn's digits, as without compression."""
    data = read_digits(seed=0)
    model = Sequential(*perceptron(data.inputs, [64], data.outputs), seed=0)
    optimizer = SGD(momentum=0.9)
    optimizer.bind(model.parameters, model.tensors)
    job = Job(name, model.shapes, nranks=3)
    for epoch in range(12):
        for batch in global_batches(len(data.train_x), 32, 0, epoch):
            gradients = []
            for rank in range(3):
                own = batch[own_part(rank, 3, len(batch))]
                outputs, saved = model.forward(data.train_x[own])
                _, dy = softmax_cross_entropy(outputs, data.train_y[own])
                model.backward(dy / len(batch), saved)
                gradients.append(model.gradients.copy())
            # With 0.05, which is well without compression, the delays of randomk make it diverge.
            optimizer.step(job.step(gradients), rate=0.02)
    right = model.forward(data.test_x)[0].argmax(axis=1) == data.test_y
    assert right.mean() >= 0.97


# -- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_names(name: str) -> None:
    assert named(name).name == name
    assert parse(named(name).name) == named(name)


def test_parse() -> None:
    assert parse("none") is None
    assert [parse("fp16"), parse("bf16"), parse("int8")] == [Float16(), BFloat16(), Int8()]
    assert [parse("topk:0.01"), parse("randomk:1"), parse("powersgd:4")] == [
        TopK(0.01),
        RandomK(1),
        PowerSGD(4),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fp32",
        "topk",
        "topk:",
        "topk:0",
        "topk:1.1",
        "topk:nan",
        "randomk:x",
        "powersgd:0",
        "powersgd:1.5",
        "int8:3",
    ],
)
def test_what_is_no_compression(text: str) -> None:
    with pytest.raises(ValueError, match=r"^compression: expected none, fp16, .* got '" + text):
        parse(text)
