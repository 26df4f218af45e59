"""Layers, on one process: gradients, dtypes, empty batches, dropout's masks, BatchNorm's statistics."""

from collections.abc import Callable
from itertools import pairwise
from math import erf, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mpicoll.train.layers import (
    EVALUATION,
    GELU,
    AveragePool2d,
    BatchNorm,
    Context,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Tanh,
)
from mpicoll.train.model import Sequential

from .gradients import numerical_gradient

AnyArray = npt.NDArray[Any]
Case = tuple[Callable[[], Layer], tuple[int, ...]]

CASES: dict[str, Case] = {  # a layer and the shape of its samples
    "Linear": (lambda: Linear(6, 5), (6,)),
    "ReLU": (ReLU, (7,)),
    "Tanh": (Tanh, (2, 3, 1)),
    "GELU": (GELU, (7,)),
    "Flatten": (Flatten, (2, 3, 4)),
    "Dropout": (lambda: Dropout(0.4), (2, 3, 2)),
    "BatchNorm of vectors": (lambda: BatchNorm(3), (3,)),
    "BatchNorm of images": (lambda: BatchNorm(3), (3, 2, 5)),
    "Conv2d": (lambda: Conv2d(2, 3, 3), (2, 5, 4)),
    "Conv2d of one pixel": (lambda: Conv2d(3, 2, 1), (3, 2, 3)),
    "Conv2d with stride and padding": (lambda: Conv2d(2, 3, 3, stride=2, padding=1), (2, 6, 5)),
    "Conv2d with gaps": (lambda: Conv2d(1, 2, 2, stride=3, padding=2), (1, 4, 7)),
    "MaxPool2d": (lambda: MaxPool2d(2), (2, 5, 4)),
    "MaxPool2d with overlaps": (lambda: MaxPool2d(3, stride=2), (2, 7, 6)),
    "MaxPool2d with gaps": (lambda: MaxPool2d(2, stride=3), (1, 6, 8)),
    "AveragePool2d": (lambda: AveragePool2d(2), (3, 4, 5)),
}
every_layer = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
in_use_and_in_training = pytest.mark.parametrize("training", [False, True], ids=["in use", "in training"])


def one_layer(layer: Layer, dtype: npt.DTypeLike = np.float64) -> Sequential:
    """A model of it, with parameters that are nothing special, and something left over as gradients."""
    model = Sequential(layer, seed=3, dtype=dtype)
    model.parameters += 0.2 * np.random.default_rng(4).random(model.parameters.size).astype(dtype)
    model.gradients[...] = 77
    return model


def context_of(n: int, training: bool = True, share: float = 1.0) -> Context:
    return Context(training=training, step=5, positions=np.arange(n), share=share, seed=2)


def normal(*shape: int, seed: int = 0) -> AnyArray:
    return np.random.default_rng(seed).standard_normal(shape)


# Every layer ----------------------------------------------------------------------------------------


@every_layer
@in_use_and_in_training
def test_gradients_are_those_of_finite_differences(case: Case, training: bool) -> None:
    make, shape = case
    model = one_layer(make())
    x = normal(5, *shape)
    context = context_of(5, training)
    y, saved = model.forward(x, context)
    dy = normal(*y.shape, seed=1)
    dx = model.backward(dy.copy(), saved)

    def loss() -> float:
        return float((model.forward(x, context)[0] * dy).sum())

    trained = slice(0, model.tensors.trainable)
    expected = numerical_gradient(loss, model.parameters[trained])
    np.testing.assert_allclose(model.gradients[trained], expected, atol=1e-7)
    np.testing.assert_allclose(dx, numerical_gradient(loss, x), atol=1e-7)


@every_layer
@in_use_and_in_training
def test_float32_stays_float32(case: Case, training: bool) -> None:
    make, shape = case
    results = []
    for dtype in np.float64, np.float32:
        model = one_layer(make(), dtype)
        y, saved = model.forward(normal(5, *shape).astype(dtype), context_of(5, training))
        dx = model.backward(normal(*y.shape, seed=1).astype(dtype), saved)
        assert y.dtype == dx.dtype == dtype
        results.append([y, dx, model.gradients])
    for single, double in zip(results[1], results[0], strict=True):
        np.testing.assert_allclose(single, double, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("error")
@every_layer
@in_use_and_in_training
def test_an_empty_batch_has_gradients_of_zero(case: Case, training: bool) -> None:
    make, shape = case
    model = one_layer(make())
    samples, _ = model.forward(normal(1, *shape), context_of(1, training))
    x = np.empty((0, *shape))
    y, saved = model.forward(x, context_of(0, training))
    dx = model.backward(np.empty_like(y), saved)
    assert y.shape == (0, *samples.shape[1:]) and dx.shape == x.shape
    assert (model.gradients == 0).all()


@every_layer
@in_use_and_in_training
def test_what_goes_in_is_left_as_it_is(case: Case, training: bool) -> None:
    """Others may have saved it; and what comes out can be sent."""
    make, shape = case
    model = one_layer(make())
    x = normal(5, *shape)
    y, saved = model.forward(x, context_of(5, training))
    dy = normal(*y.shape, seed=1)
    dx = model.backward(dy, saved)
    np.testing.assert_array_equal(x, normal(5, *shape))
    np.testing.assert_array_equal(dy, normal(*y.shape, seed=1))
    assert y.flags.c_contiguous and dx.flags.c_contiguous


@pytest.mark.parametrize(
    "layer, shape, message",
    [
        (Linear(64, 3), (128,), "(Linear): expected samples of 64 numbers, got 128"),
        (Linear(64, 3), (8, 8), "(Linear): expected samples of 64 numbers, got 8 x 8"),
        (Linear(64, 3), (), "(Linear): expected samples of 64 numbers, got 1"),
        (BatchNorm(3), (4,), "(BatchNorm): expected samples of 3 numbers, got 4"),
        (
            BatchNorm(3),
            (4, 3, 3),
            "(BatchNorm): expected samples of 3 x height x width numbers, got 4 x 3 x 3",
        ),
        (Conv2d(3, 2, 5), (64,), "(Conv2d): expected samples of 3 x height x width numbers, got 64"),
        (
            Conv2d(3, 2, 5),
            (1, 9, 9),
            "(Conv2d): expected samples of 3 x height x width numbers, got 1 x 9 x 9",
        ),
        (Conv2d(3, 2, 5, padding=1), (3, 2, 9), "(Conv2d): expected images of 3 x 3 or more, got 2 x 9"),
        (MaxPool2d(2), (64,), "(MaxPool2d): expected samples of channels x height x width numbers, got 64"),
        (AveragePool2d(4), (1, 9, 3), "(AveragePool2d): expected images of 4 x 4 or more, got 9 x 3"),
    ],
)
def test_samples_that_do_not_fit(layer: Layer, shape: tuple[int, ...], message: str) -> None:
    model = Sequential(layer, numbers=[3])
    with pytest.raises(ValueError) as error:
        model.forward(np.zeros((2, *shape), np.float32))
    assert str(error.value) == "layer 3 " + message


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Dropout(1), "rate: expected a share from 0 to below 1, got 1"),
        (lambda: Dropout(-0.1), "rate: expected a share from 0 to below 1, got -0.1"),
        (lambda: Conv2d(1, 1, 0), "kernel: expected 1 or more, got 0"),
        (lambda: Conv2d(1, 1, 3, stride=0), "stride: expected 1 or more, got 0"),
        (lambda: Conv2d(1, 1, 3, padding=-1), "padding: expected 0 or more, got -1"),
        (lambda: MaxPool2d(2, stride=0), "stride: expected 1 or more, got 0"),
        (lambda: AveragePool2d(0), "size: expected 1 or more, got 0"),
    ],
)
def test_settings_that_make_no_sense(make: Callable[[], Layer], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


# Activations and images ------------------------------------------------------------------------------


def test_gelu_is_near_the_normal_distribution_function() -> None:
    x = np.linspace(-5, 5, 101)
    y, _ = GELU().forward(x[:, None])
    exact = [v * (1 + erf(v / sqrt(2))) / 2 for v in x]
    np.testing.assert_allclose(y[:, 0], exact, atol=5e-4)


def test_a_convolution_is_its_sum() -> None:
    model = one_layer(Conv2d(2, 3, 3, stride=2, padding=1))
    weight, bias = model.parameter_views
    x = normal(2, 2, 6, 5)
    padded = np.zeros((2, 2, 8, 7))
    padded[:, :, 1:-1, 1:-1] = x
    expected = np.empty((2, 3, 3, 3))
    for s, o, i, j in np.ndindex(expected.shape):
        expected[s, o, i, j] = (
            bias[o] + (weight[o] * padded[s, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]).sum()
        )
    np.testing.assert_allclose(model.forward(x)[0], expected, atol=1e-13)


def test_pools_are_maxima_and_means_of_windows() -> None:
    x = normal(2, 3, 7, 6)
    largest, overlapping, mean = (
        layer.forward(x)[0] for layer in (MaxPool2d(2), MaxPool2d(3, 2), AveragePool2d(2))
    )
    assert largest.shape == mean.shape == (2, 3, 3, 3) and overlapping.shape == (2, 3, 3, 2)
    for i, j in np.ndindex(3, 3):
        window = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_array_equal(largest[:, :, i, j], window.max(axis=(2, 3)))
        np.testing.assert_allclose(mean[:, :, i, j], window.mean(axis=(2, 3)), rtol=1e-12)
    for i, j in np.ndindex(3, 2):
        window = x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        np.testing.assert_array_equal(overlapping[:, :, i, j], window.max(axis=(2, 3)))


def test_the_first_of_equal_maxima_takes_the_gradient() -> None:
    layer = MaxPool2d(2)
    _, saved = layer.forward(np.zeros((1, 1, 2, 4)))
    dx = layer.backward(np.array([[[[3.0, 5.0]]]]), saved)
    np.testing.assert_array_equal(dx, [[[[3, 0, 5, 0], [0, 0, 0, 0]]]])


def test_a_maximum_hides_no_nan() -> None:
    x = np.zeros((1, 1, 2, 2))
    x[0, 0, 0, 1] = np.nan
    assert np.isnan(MaxPool2d(2).forward(x)[0]).all()


@pytest.mark.parametrize("layer, fan_in", [(Linear(300, 100), 300), (Conv2d(30, 100, 3), 270)])
def test_first_weights_keep_the_variance_through_relus(layer: Layer, fan_in: int) -> None:
    weight, bias = Sequential(layer).parameter_views
    assert weight.var() == pytest.approx(2 / fan_in, rel=0.05) and (bias == 0).all()


# Dropout ---------------------------------------------------------------------------------------------


def dropped(x: AnyArray, context: Context, number: int = 4, first_feature: int = 0) -> AnyArray:
    layer = Dropout(0.3)
    layer.number = number
    layer.first_feature = first_feature
    y: AnyArray = layer.forward(x, context)[0]
    return y


def at(positions: Any, step: int = 5, seed: int = 2) -> Context:
    return Context(training=True, step=step, positions=np.asarray(positions), seed=seed)


def test_dropout_drops_a_share_and_keeps_the_mean() -> None:
    y = dropped(np.ones((200, 500)), at(range(200)))
    assert set(np.unique(y)) == {0.0, 1 / 0.7}
    assert y.mean() == pytest.approx(1, abs=0.01)
    assert y.mean(axis=0).std() == pytest.approx((0.3 / 0.7 / 200) ** 0.5, rel=0.2)  # no feature is special


def test_a_sample_is_dropped_alike_in_any_company() -> None:
    x = normal(9, 2, 3, 5)
    whole = dropped(x, at(range(9)))
    parts = [dropped(x[a:b], at(range(a, b))) for a, b in pairwise([0, 4, 4, 5, 9])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    order = [7, 0, 3]
    np.testing.assert_array_equal(dropped(x[order], at(order)), whole[order])


def test_features_are_dropped_alike_where_a_layer_sees_some_of_them() -> None:
    x = normal(9, 20)
    whole = dropped(x, at(range(9)))
    np.testing.assert_array_equal(dropped(x[:, 7:12], at(range(9)), first_feature=7), whole[:, 7:12])


def test_each_step_seed_and_layer_drops_others() -> None:
    x = np.ones((9, 20))
    contexts = [(at(range(9)), 4), (at(range(9), step=6), 4), (at(range(9), seed=3), 4), (at(range(9)), 5)]
    drops = {dropped(x, context, number).tobytes() for context, number in contexts}
    assert len(drops) == len(contexts)


def test_dropout_in_use_is_nothing() -> None:
    x = normal(3, 4)
    y, saved = Dropout(0.3).forward(x)
    assert y is x and Dropout(0.3).backward(x, saved) is x


def test_dropout_without_positions() -> None:
    with pytest.raises(ValueError, match=r"layer 4 \(Dropout\): expected the samples' positions"):
        dropped(np.ones((2, 3)), Context(training=True))


# BatchNorm -------------------------------------------------------------------------------------------


def batch_norm(**options: Any) -> Sequential:
    """Of three features; running statistics unlike those that it begins with."""
    model = Sequential(BatchNorm(3, **options), dtype=np.float64)
    model.parameter_views[2][...] = [1, 2, 3]
    model.parameter_views[3][...] = [4, 5, 6]
    return model


def statistics_after(model: Sequential, x: AnyArray, share: float = 1.0) -> tuple[AnyArray, AnyArray]:
    """The statistics' gradients."""
    y, saved = model.forward(x, context_of(len(x), share=share))
    model.backward(np.ones_like(y), saved)
    return model.gradient_views[2].copy(), model.gradient_views[3].copy()


def test_batch_norm_begins_as_the_identity() -> None:
    x = normal(4, 3)
    model = Sequential(BatchNorm(3), dtype=np.float64)
    np.testing.assert_array_equal(model.parameters.reshape(4, 3), [[1] * 3, [0] * 3, [0] * 3, [1] * 3])
    np.testing.assert_allclose(model.forward(x)[0], x, rtol=1e-5)


def test_batch_norm_in_training_has_mean_beta_and_deviation_gamma() -> None:
    model = batch_norm(epsilon=0)
    model.parameter_views[0][...] = gamma = [1, 2, 3]
    model.parameter_views[1][...] = beta = [4, 5, 6]
    for x, axes in (normal(50, 3), 0), (normal(5, 3, 4, 2), (0, 2, 3)):
        y, _ = model.forward(7 * x + 1, context_of(len(x)))
        np.testing.assert_allclose(y.mean(axis=axes), beta)
        np.testing.assert_allclose(y.std(axis=axes), gamma)


def test_batch_norm_in_use_takes_the_running_statistics() -> None:
    x = normal(4, 3, 2, 2)
    by_channel = np.moveaxis(x, 1, -1)
    expected = (by_channel - [1, 2, 3]) / np.sqrt(np.array([4, 5, 6]) + 1e-5)
    np.testing.assert_allclose(batch_norm().forward(x)[0], np.moveaxis(expected, -1, 1))


@pytest.mark.parametrize("shape, axes", [((8, 3), 0), ((2, 3, 2, 2), (0, 2, 3))])
def test_running_statistics_move_by_the_momentum(shape: tuple[int, ...], axes: Any) -> None:
    x = normal(*shape)
    mean, variance = statistics_after(batch_norm(momentum=0.25), x)
    np.testing.assert_allclose([1, 2, 3] - mean, 0.75 * np.array([1, 2, 3]) + 0.25 * x.mean(axis=axes))
    unbiased = x.var(axis=axes, ddof=1)
    np.testing.assert_allclose([4, 5, 6] - variance, 0.75 * np.array([4, 5, 6]) + 0.25 * unbiased)


def test_parts_move_running_statistics_by_their_shares() -> None:
    x = normal(12, 3)
    model = batch_norm(momentum=0.25)
    moves = [
        statistics_after(model, x[rows], len(x[rows]) / 12) for rows in (np.s_[:3], np.s_[3:3], np.s_[3:])
    ]
    mean, variance = (sum(move) for move in zip(*moves, strict=True))
    np.testing.assert_allclose(mean, 0.25 * ([1, 2, 3] - x.mean(axis=0)))
    parts = 0.25 * x[:3].var(axis=0, ddof=1) + 0.75 * x[3:].var(axis=0, ddof=1)
    np.testing.assert_allclose(variance, 0.25 * ([4, 5, 6] - parts))


@pytest.mark.filterwarnings("error")
def test_a_single_sample_is_normalised_to_beta_and_says_nothing_of_the_variance() -> None:
    model = batch_norm()
    model.parameter_views[1][...] = beta = [7, 8, 9]
    y, saved = model.forward(normal(1, 3), context_of(1))
    dx = model.backward(normal(1, 3, seed=1), saved)
    np.testing.assert_array_equal(y, [beta])
    np.testing.assert_array_equal(dx, np.zeros((1, 3)))
    np.testing.assert_allclose(model.gradient_views[2], 0.1 * ([1, 2, 3] - normal(1, 3)[0]))
    assert (model.gradient_views[3] == 0).all()


def test_the_variance_of_numbers_far_from_zero() -> None:
    x = (normal(500, 3) + 10_000).astype(np.float32)
    y, _ = Sequential(BatchNorm(3)).forward(x, context_of(500))
    np.testing.assert_allclose(y.std(axis=0), 1, rtol=1e-3)


class NobodyThere:
    """A communicator of two ranks on which nobody may communicate."""

    size = 2


@pytest.mark.parametrize("synchronised, context", [(True, EVALUATION), (False, context_of(4))])
def test_batch_norm_in_use_or_by_itself_does_not_communicate(synchronised: bool, context: Context) -> None:
    model = batch_norm(synchronised=synchronised)
    comm: Any = NobodyThere()
    model.layers[0].connect(comm)
    y, saved = model.forward(normal(4, 3), context)
    model.backward(y, saved)


# PyTorch's, where there is PyTorch -------------------------------------------------------------------


def compare_with_torch(torch: Any, layer: Layer, twin: Any, x: AnyArray) -> None:
    """Outputs, dx and the parameters' gradients; and what becomes of the statistics."""
    model = one_layer(layer)
    trained = len(layer.shapes) - layer.statistics
    twin = twin.double()
    for parameter, values in zip(twin.parameters(), model.parameter_views, strict=False):
        parameter.data = torch.tensor(values)
    running = [twin.running_mean, twin.running_var] if layer.statistics else []
    for buffer, values in zip(running, model.parameter_views[trained:], strict=True):
        buffer.copy_(torch.tensor(values))

    y, saved = model.forward(x, context_of(len(x)))
    dy = normal(*y.shape, seed=1)
    dx = model.backward(dy, saved)
    twin_x = torch.tensor(x, requires_grad=True)
    twin_y = twin(twin_x)
    twin_y.backward(torch.tensor(dy))

    pairs = [(y, twin_y.detach()), (dx, twin_x.grad)]
    pairs += [(g, p.grad) for g, p in zip(model.gradient_views[:trained], twin.parameters(), strict=True)]
    moved = [p - g for p, g in zip(model.parameter_views, model.gradient_views, strict=True)][trained:]
    for own, other in [*pairs, *zip(moved, running, strict=True)]:
        np.testing.assert_allclose(own, other.numpy(), rtol=1e-10, atol=1e-12)


def test_layers_are_those_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    images = normal(4, 3, 9, 8)
    compare_with_torch(torch, Conv2d(3, 5, 3), torch.nn.Conv2d(3, 5, 3), images)
    options = {"stride": 2, "padding": 1}
    compare_with_torch(torch, Conv2d(3, 5, 4, **options), torch.nn.Conv2d(3, 5, 4, **options), images)
    compare_with_torch(torch, MaxPool2d(2), torch.nn.MaxPool2d(2), images)
    compare_with_torch(torch, MaxPool2d(3, 2), torch.nn.MaxPool2d(3, 2), images)
    compare_with_torch(torch, AveragePool2d(2), torch.nn.AvgPool2d(2), images)
    compare_with_torch(torch, BatchNorm(3), torch.nn.BatchNorm2d(3), images)
    compare_with_torch(torch, BatchNorm(7), torch.nn.BatchNorm1d(7), normal(5, 7))
    compare_with_torch(torch, GELU(), torch.nn.GELU(approximate="tanh"), normal(5, 7))
    compare_with_torch(torch, Tanh(), torch.nn.Tanh(), normal(5, 7))
