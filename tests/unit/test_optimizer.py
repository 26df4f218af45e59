"""Optimizers against their equations in NumPy and PyTorch; norms of shards cut anywhere; learning rates."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from mpicoll.train.learning_rate import SCHEDULES, LearningRate, scaled_rate
from mpicoll.train.optimizer import LARS, SGD, Adam, Optimizer
from mpicoll.train.tensors import Tensors

AnyArray = npt.NDArray[Any]

SHAPES = (5, 3), (3,), (3, 2), (2,), (4,), (4,)  # two layers; the last two tensors are statistics
TRAINED = 4
TENSORS = Tensors.of(SHAPES, TRAINED)
COUNT, TRAINABLE = 34, 26

MAKES: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda **o: SGD(0.9, **o),
    "nesterov": lambda **o: SGD(0.9, nesterov=True, **o),
    "adam": Adam,
    "lars": lambda **o: LARS(0.9, trust=0.1, **o),
}
every_optimizer = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def start(dtype: npt.DTypeLike = np.float64) -> AnyArray:
    return np.random.default_rng(1).standard_normal(COUNT).astype(dtype)


def gradient(step: int, dtype: npt.DTypeLike = np.float64) -> AnyArray:
    return np.random.default_rng([2, step]).standard_normal(COUNT).astype(dtype)


def rate_of(step: int) -> float:
    """Another one in every step."""
    return 0.1 / (1 + step)


def trained(optimizer: Optimizer, steps: int = 5, dtype: npt.DTypeLike = np.float64) -> AnyArray:
    parameters = start(dtype)
    optimizer.bind(parameters, TENSORS)
    for step in range(steps):
        optimizer.step(gradient(step, dtype), rate_of(step))
    return parameters


# Equations ------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum, decay", [(0.9, 0.0), (0.0, 0.3), (0.8, 0.01)])
def test_sgd_has_the_bits_of_its_equations(dtype: Any, nesterov: bool, momentum: float, decay: float) -> None:
    optimizer = SGD(momentum, nesterov, decay)
    found = trained(optimizer, dtype=dtype)[:TRAINABLE]
    w = start(dtype)[:TRAINABLE]
    v, m, d = np.zeros_like(w), dtype(momentum), dtype(decay)
    for step in range(5):
        r = dtype(rate_of(step))
        g = gradient(step, dtype)[:TRAINABLE] + d * w
        v = m * v + g
        w = w - r * (g + m * v if nesterov else v)
    np.testing.assert_array_equal(found, w)
    np.testing.assert_array_equal(optimizer.state["velocity"], v)


@dtypes
def test_adam_follows_its_equations(dtype: Any) -> None:
    optimizer = Adam(beta1=0.8, beta2=0.99, epsilon=0.01, weight_decay=0.2)
    found = trained(optimizer, dtype=dtype)[:TRAINABLE]
    w = start()[:TRAINABLE]
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, 6):
        g = gradient(t - 1)[:TRAINABLE] + 0.2 * w
        m = 0.8 * m + (1 - 0.8) * g
        v = 0.99 * v + (1 - 0.99) * g**2
        m_hat, v_hat = m / (1 - 0.8**t), v / (1 - 0.99**t)
        w = w - rate_of(t - 1) * m_hat / (np.sqrt(v_hat) + 0.01)
    close(found, w)
    close(optimizer.state["mean"], m)
    close(optimizer.state["square"], v)
    assert found.dtype == optimizer.state["square"].dtype == dtype


@dtypes
def test_lars_scales_the_rate_of_each_matrix_by_its_norms(dtype: Any) -> None:
    optimizer = LARS(momentum=0.8, trust=0.02, weight_decay=0.3)
    found = trained(optimizer, dtype=dtype)
    for (begin, end), shape in zip(TENSORS.bounds[:TRAINED], SHAPES, strict=False):
        w = start()[begin:end]
        v = np.zeros_like(w)
        for step in range(5):
            g, r = gradient(step)[begin:end], rate_of(step)
            if len(shape) == 2:
                norm = np.linalg.norm
                q = 0.02 * norm(w) / (norm(g) + 0.3 * norm(w))
                v = 0.8 * v + q * r * (g + 0.3 * w)
            else:
                v = 0.8 * v + r * g
            w = w - v
        close(found[begin:end], w)


def close(found: AnyArray, expected: AnyArray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-12 if found.dtype == np.float64 else 2e-5)


def test_lars_takes_ordinary_steps_where_a_norm_is_zero() -> None:
    parameters, optimizer = start(), LARS(momentum=0.0)
    first, second = (slice(*TENSORS.bounds[i]) for i in (0, 2))
    parameters[first] = 0
    before = parameters.copy()
    optimizer.bind(parameters, TENSORS)
    g = gradient(0)
    g[second] = 0
    optimizer.step(g, 0.5)
    np.testing.assert_allclose(parameters[first], -0.5 * g[first])
    np.testing.assert_array_equal(parameters[second], before[second])


@pytest.mark.parametrize(
    "make, torchs, options",
    [
        (SGD(0.9), "SGD", {"momentum": 0.9}),
        (SGD(0.0, weight_decay=0.1), "SGD", {"weight_decay": 0.1}),
        (
            SGD(0.7, nesterov=True, weight_decay=0.1),
            "SGD",
            {"momentum": 0.7, "nesterov": True, "weight_decay": 0.1},
        ),
        (Adam(), "Adam", {}),
        (
            Adam(0.7, 0.95, 1e-3, weight_decay=0.1),
            "Adam",
            {"betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.1},
        ),
    ],
)
def test_optimizers_are_those_of_pytorch(make: Optimizer, torchs: str, options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    w = torch.nn.Parameter(torch.from_numpy(start()[:TRAINABLE]))
    theirs = getattr(torch.optim, torchs)([w], **options)
    for step in range(7):
        theirs.param_groups[0]["lr"] = rate_of(step)
        w.grad = torch.from_numpy(gradient(step)[:TRAINABLE])
        theirs.step()
    np.testing.assert_allclose(trained(make, steps=7)[:TRAINABLE], w.detach().numpy(), rtol=1e-12)


@every_optimizer
def test_a_gradient_may_be_another_array_in_every_step(make: Callable[..., Optimizer]) -> None:
    """And may be scaled: nobody may take it for what it was."""
    own, buffer = start(), np.empty(COUNT)
    optimizer = make(clip_norm=1.0)
    optimizer.bind(own, TENSORS)
    kept = [gradient(step) for step in range(5)]
    for step, other in enumerate(kept):
        buffer[...] = other
        optimizer.step(other if step % 2 else buffer, rate_of(step))
    np.testing.assert_array_equal(own, trained(make(clip_norm=1.0)))


@every_optimizer
def test_state_is_what_it_takes_to_go_on(make: Callable[..., Optimizer]) -> None:
    parameters = start()
    before, after = make(), make()
    before.bind(parameters, TENSORS)
    for step in range(2):
        before.step(gradient(step), rate_of(step))
    after.bind(parameters, TENSORS)
    assert list(after.state) == list(after.vectors)
    assert all((vector == 0).all() and vector.size == TRAINABLE for vector in after.state.values())
    after.steps = before.steps
    for name, vector in before.state.items():
        after.state[name][...] = vector
    for step in range(2, 5):
        after.step(gradient(step), rate_of(step))
    np.testing.assert_array_equal(parameters, trained(make()))


# Clipping and statistics ----------------------------------------------------------------------------


@every_optimizer
def test_gradients_are_scaled_down_to_the_largest_norm(make: Callable[..., Optimizer]) -> None:
    clipped, plain = start(), start()
    optimizer, other = make(clip_norm=0.5), make()
    optimizer.bind(clipped, TENSORS)
    other.bind(plain, TENSORS)
    lengths = (10.0, 0.5, 0.3, 2.0)
    for step, length in enumerate(lengths):
        g = gradient(step)
        g[:TRAINABLE] *= length / np.linalg.norm(g[:TRAINABLE])
        shorter = g.copy()
        shorter[:TRAINABLE] *= min(1.0, 0.5 / length)
        optimizer.step(g, 0.1)
        other.step(shorter, 0.1)
        np.testing.assert_allclose(clipped, plain, rtol=1e-12)


@every_optimizer
def test_short_gradients_keep_their_bits(make: Callable[..., Optimizer]) -> None:
    np.testing.assert_array_equal(trained(make(clip_norm=1e6)), trained(make()))


@every_optimizer
def test_statistics_lose_their_gradients_and_nothing_else(make: Callable[..., Optimizer]) -> None:
    """No rate, momentum, decay or clipping; and their size has no say in the norm of gradients."""
    options: dict[str, Any] = {"weight_decay": 0.5, "clip_norm": 0.1}
    optimizer, other = make(**options), make(**options)
    parameters, others = start(), start()
    optimizer.bind(parameters, TENSORS)
    other.bind(others, TENSORS)
    expected = start()[TRAINABLE:]
    for step in range(4):
        g, small = gradient(step), gradient(step)
        g[TRAINABLE:] *= 1e6
        expected -= g[TRAINABLE:]
        small[TRAINABLE:] = 0
        optimizer.step(g, 0.1)
        other.step(small, 0.1)
    np.testing.assert_array_equal(parameters[TRAINABLE:], expected)
    np.testing.assert_array_equal(others[TRAINABLE:], start()[TRAINABLE:])
    np.testing.assert_array_equal(parameters[:TRAINABLE], others[:TRAINABLE])


@every_optimizer
def test_a_shard_may_be_empty_or_have_statistics_only(make: Callable[..., Optimizer]) -> None:
    alone = cast(MPI.Intracomm, Shards(1))
    for begin, end in (7, 7), (TRAINABLE, COUNT), (COUNT, COUNT):
        parameters = start()[begin:end]
        optimizer = make(weight_decay=0.1, clip_norm=1.0)
        optimizer.bind(parameters, TENSORS.cut(begin, end, alone))
        optimizer.step(gradient(0)[begin:end], 0.1)
        np.testing.assert_array_equal(parameters, (start() - gradient(0))[begin:end])


# Tensors, and shards of them ------------------------------------------------------------------------


class Shards:
    """What `Tensors` needs of a communicator, for ranks that are threads."""

    def __init__(self, nranks: int):
        self._barrier = threading.Barrier(nranks, timeout=30)
        self._given: list[AnyArray] = []

    def Allreduce(self, in_place: Any, array: AnyArray) -> None:
        assert in_place is MPI.IN_PLACE
        self._given.append(array.copy())
        self._barrier.wait()
        array[...] = [math.fsum(values) for values in zip(*self._given, strict=True)]
        if self._barrier.wait() == 0:
            self._given.clear()
        self._barrier.wait()


def on_shards(cuts: Sequence[int], function: Callable[[slice, Tensors], Any]) -> list[Any]:
    """What ``function(part, tensors)`` gives for each part of the vector, between ``cuts``."""
    parts = [slice(*bounds) for bounds in pairwise([0, *sorted(cuts), COUNT])]
    comm = cast(MPI.Intracomm, Shards(len(parts)))
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(lambda part: function(part, TENSORS.cut(part.start, part.stop, comm)), parts))


anywhere = st.lists(st.integers(0, COUNT), max_size=4)


def test_tensors_of_a_whole_model() -> None:
    assert TENSORS.bounds == ((0, 15), (15, 18), (18, 24), (24, 26), (26, 30), (30, 34))
    assert (TENSORS.ndims, TENSORS.trained, TENSORS.trainable) == ((2, 1, 2, 1, 1, 1), 4, TRAINABLE)
    assert (Tensors.of([], 0).trainable, Tensors.of([(3,)], 0).trainable) == (0, 0)
    assert Tensors.of([(), (2, 0), (3,)], 3).bounds == ((0, 1), (1, 1), (1, 4))


def test_squares_and_norm_of_a_whole_model() -> None:
    vector = start()
    expected = [float((vector[a:b] ** 2).sum()) for a, b in TENSORS.bounds[:TRAINED]]
    np.testing.assert_allclose(TENSORS.squares(vector), expected, rtol=1e-14)
    assert TENSORS.norm(vector) == pytest.approx(np.linalg.norm(vector[:TRAINABLE]), rel=1e-14)
    assert TENSORS.squares(vector.astype(np.float32)).dtype == np.float64


@settings(max_examples=40)
@given(cuts=anywhere)
def test_every_shard_knows_the_squares_of_whole_tensors(cuts: list[int]) -> None:
    vector = start()
    found = on_shards(cuts, lambda part, own: (own.squares(vector[part]), own.norm(vector[part])))
    for squares, norm in found:
        np.testing.assert_allclose(squares, TENSORS.squares(vector), rtol=1e-13)
        assert norm == pytest.approx(TENSORS.norm(vector), rel=1e-13)


@settings(max_examples=20)
@given(cuts=anywhere, name=st.sampled_from(sorted(MAKES)))
def test_shards_take_the_steps_of_the_whole(cuts: list[int], name: str) -> None:
    options: dict[str, Any] = {"weight_decay": 0.05, "clip_norm": 2.0}

    def shard(part: slice, tensors: Tensors) -> AnyArray:
        parameters, optimizer = start()[part], MAKES[name](**options)
        optimizer.bind(parameters, tensors)
        assert {vector.size for vector in optimizer.state.values()} == {tensors.trainable}
        for step in range(5):
            optimizer.step(gradient(step)[part], rate_of(step))
        return parameters

    together = np.concatenate(on_shards(cuts, shard))
    np.testing.assert_allclose(together, trained(MAKES[name](**options)), rtol=1e-11)


def test_tensors_that_ranks_hold_alike_count_once() -> None:
    """Two ranks with halves of tensor 0, and tensor 1 on both, as two layers of a model that has three."""
    comm = cast(MPI.Intracomm, Shards(2))
    halves = np.array([1.0, 2.0, 30.0]), np.array([3.0, 4.0, 30.0])

    def of(half: AnyArray) -> tuple[list[float], float]:
        tensors = Tensors(((0, 2), (2, 3)), (2, 1), 2, (1.0, 0.5), (comm,), offset=1, total=3)
        return tensors.squares(half).tolist(), tensors.norm(half)

    with ThreadPoolExecutor(2) as pool:
        for squares, norm in pool.map(of, halves):
            assert squares == [30.0, 900.0]
            assert norm == pytest.approx(math.sqrt(930))


# Learning rates -------------------------------------------------------------------------------------


def every_step(rate: LearningRate) -> list[float]:
    return [rate(step) for step in range(rate.steps)]


def cosine(peak: float, step: int, steps: int) -> float:
    return peak * (1 + math.cos(math.pi * step / steps)) / 2


EXPECTED: dict[str, tuple[dict[str, Any], list[float]]] = {
    "constant": ({}, [0.4] * 10),
    "step": ({"every": 3, "factor": 0.5}, [0.4] * 3 + [0.2] * 3 + [0.1] * 3 + [0.05]),
    "exponential": ({"factor": 0.01}, [0.4 * 0.01 ** (step / 10) for step in range(10)]),
    "cosine": ({}, [cosine(0.4, step, 10) for step in range(10)]),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_of_every_schedule(schedule: str) -> None:
    options, expected = EXPECTED[schedule]
    rate = LearningRate(0.4, schedule, steps=10, **options)
    assert every_step(rate) == pytest.approx(expected)
    assert rate(0) == 0.4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_begin_when_the_rate_has_risen(schedule: str) -> None:
    options, expected = EXPECTED[schedule]
    rate = LearningRate(0.4, schedule, steps=14, warmup=4, **options)
    assert every_step(rate) == pytest.approx([0.1, 0.2, 0.3, 0.4, *expected])


def test_rates_after_the_last_step_stay() -> None:
    """A run that is taken up with fewer epochs asks for them."""
    assert LearningRate(0.4, "cosine", steps=10)(25) == pytest.approx(0, abs=1e-15)
    assert LearningRate(0.4, "exponential", steps=10, factor=0.5)(25) == pytest.approx(0.2)


def test_a_warm_up_longer_than_the_training() -> None:
    assert every_step(LearningRate(0.4, "cosine", steps=2, warmup=4)) == pytest.approx([0.1, 0.2])


def test_settings_of_no_schedule() -> None:
    with pytest.raises(ValueError, match=r"^schedule: expected one of constant, .*; got 'linear'"):
        LearningRate(0.1, "linear")
    with pytest.raises(ValueError, match="every: expected at least 1 step, got 0"):
        LearningRate(0.1, "step", every=0)


def test_the_linear_scaling_rule() -> None:
    assert scaled_rate(0.1, batch_size=256, base_batch=32) == pytest.approx(0.8)
    assert scaled_rate(0.1, batch_size=16, base_batch=32) == pytest.approx(0.05)
