"""Models, losses, and gradients of parts of a batch, without other ranks."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpicoll.kernels import packing

from mpicoll.train import convolutional, perceptron
from mpicoll.train.arrays import array_module
from mpicoll.train.backprop import Backprop, Part, weighted_loss
from mpicoll.train.errors import InputError
from mpicoll.train.layers import BatchNorm, Context, Dropout, Flatten, Layer, Linear, ReLU, Tanh
from mpicoll.train.losses import mean_squared_error, softmax_cross_entropy
from mpicoll.train.model import Sequential
from mpicoll.train.networks import BATCH_NORMS
from mpicoll.train.optimizer import LARS, SGD, Adam
from mpicoll.train.sampling import own_part

from .foreign import ForeignArray, ForeignModule, foreign, to_host
from .gradients import numerical_gradient

AnyArray = npt.NDArray[Any]

losses_and_targets = pytest.mark.parametrize("loss", [softmax_cross_entropy, mean_squared_error])


def small_model(seed: int = 0, dtype: npt.DTypeLike = np.float64) -> Sequential:
    model = Sequential(Flatten(), Linear(6, 5), ReLU(), Linear(5, 4), Tanh(), Linear(4, 3), dtype=dtype)
    model.parameters += 0.1 * normal(model.parameters.size, seed=seed).astype(dtype)  # biases, too
    return model


def mixed_layers() -> list[Layer]:
    """Parameters and statistics in turn, and layers with neither."""
    return [Linear(6, 5), BatchNorm(5), Tanh(), Linear(5, 4), BatchNorm(4), ReLU(), Linear(4, 3)]


def normal(*shape: int, seed: int = 0) -> AnyArray:
    return np.random.default_rng(seed).standard_normal(shape)


def targets(loss: Any, n: int) -> AnyArray:
    return np.arange(n) * 7 % 3 if loss is softmax_cross_entropy else normal(n, 3, seed=5)


def part_of(loss: Any, n: int, counts: AnyArray | None = None, training: bool = True) -> Part:
    counts = np.random.default_rng(6).random(n) if counts is None else counts
    return Part(normal(n, 6), targets(loss, n), counts, Context(training, 3, np.arange(n) + 10, 0.5, 1))


# Losses ---------------------------------------------------------------------------------------------


@losses_and_targets
def test_gradients_are_those_of_finite_differences(loss: Any) -> None:
    x, y = normal(7, 2, 3), targets(loss, 7)
    model = small_model()
    outputs, saved = model.forward(x)
    losses, dy = loss(outputs, y)
    dx = model.backward(dy, saved)

    def total() -> float:
        return float(loss(model.forward(x)[0], y)[0].sum())

    assert losses.shape == (7,) and dx.shape == x.shape
    np.testing.assert_allclose(model.gradients, numerical_gradient(total, model.parameters), atol=1e-7)
    np.testing.assert_allclose(dx, numerical_gradient(total, x), atol=1e-7)


def test_losses_are_their_equations() -> None:
    losses, _ = softmax_cross_entropy(np.log([[1.0, 3.0], [5.0, 5.0]]), np.array([1, 0]))
    np.testing.assert_allclose(losses, [np.log(4 / 3), np.log(2)])
    losses, _ = mean_squared_error(np.array([[1.0, 5.0]]), np.array([[0.0, 2.0]]))
    np.testing.assert_allclose(losses, [(1 + 9) / 2])


def test_cross_entropy_of_huge_scores_is_finite() -> None:
    losses, gradient = softmax_cross_entropy(np.array([[1e4, -1e4], [0.0, 0.0]]), np.array([1, 0]))
    np.testing.assert_allclose(losses, np.array([2e4, np.log(2)]))
    np.testing.assert_allclose(gradient, np.array([[1, -1], [-0.5, 0.5]]))


@losses_and_targets
def test_losses_and_gradients_have_the_dtype_of_the_outputs(loss: Any) -> None:
    y = targets(loss, 4)
    y = y if loss is softmax_cross_entropy else y.astype(np.float32)
    losses, gradient = loss(normal(4, 3).astype(np.float32), y)
    assert losses.dtype == gradient.dtype == np.float32


@losses_and_targets
def test_each_sample_counts_as_much_as_its_weight(loss: Any) -> None:
    outputs, part = normal(4, 3), part_of(loss, 4, np.array([0.0, 0.25, 2.0, 0.5]))
    losses, gradient = loss(outputs, part.y)
    value, weighted = weighted_loss(loss, outputs, part)
    assert value == pytest.approx(0.25 * losses[1] + 2 * losses[2] + 0.5 * losses[3], rel=1e-14)
    np.testing.assert_allclose(weighted, part.counts[:, None] * gradient, rtol=1e-14)


def test_a_weighted_loss_is_summed_in_float64_and_its_gradient_is_not() -> None:
    part = part_of(softmax_cross_entropy, 4, np.array([1.0, 1e-9, 1e-9, 1e-9]))
    outputs = normal(4, 3).astype(np.float32)
    losses, _ = softmax_cross_entropy(outputs, part.y)
    value, gradient = weighted_loss(softmax_cross_entropy, outputs, part)
    assert gradient.dtype == np.float32
    assert value == pytest.approx(float(losses.astype(np.float64) @ part.counts), rel=1e-15)
    assert value > float(losses[0])


# Models ---------------------------------------------------------------------------------------------


def test_parameters_and_gradients_are_views_into_two_vectors() -> None:
    model = Sequential(*perceptron(64, [32, 16], 10))
    linear = [layer for layer in model.layers if isinstance(layer, Linear)]
    assert model.parameters.dtype == model.gradients.dtype == np.float32
    assert model.parameters.size == 64 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10
    model.parameters[:] = np.arange(model.parameters.size)
    model.gradients[:] = -1
    together = np.concatenate([p.ravel() for layer in linear for p in (layer.weight, layer.bias)])
    np.testing.assert_array_equal(together, np.arange(model.parameters.size))
    assert all((layer.weight_gradient == -1).all() and (layer.bias_gradient == -1).all() for layer in linear)


def test_statistics_come_last() -> None:
    model = Sequential(*mixed_layers(), dtype=np.float64)
    assert model.names == [
        *("0.weight", "0.bias", "1.gamma", "1.beta", "3.weight", "3.bias", "4.gamma", "4.beta"),
        *("6.weight", "6.bias", "1.mean", "1.variance", "4.mean", "4.variance"),
    ]
    assert model.shapes[:4] == [(6, 5), (5,), (5,), (5,)] and model.shapes[-4:] == [(5,), (5,), (4,), (4,)]
    assert (model.tensors.trained, model.tensors.trainable) == (10, 30 + 5 + 10 + 20 + 4 + 8 + 12 + 3)
    assert model.parameters.size == model.tensors.trainable + 18
    for i, view in enumerate(model.parameter_views):
        view[...] = i
    first, second = model.layers[1], model.layers[4]
    assert isinstance(first, BatchNorm) and isinstance(second, BatchNorm)
    held = [first.gamma, first.beta, first.mean, first.variance, second.gamma, second.mean, second.variance]
    assert [array.flat[0] for array in held] == [2, 3, 10, 11, 6, 12, 13]
    first.mean_gradient[...], second.beta_gradient[...] = 8, 9
    assert (model.gradient_views[10] == 8).all() and (model.gradient_views[7] == 9).all()


def test_what_allocate_gives_is_used_and_cleared_of_gradients() -> None:
    given: list[AnyArray] = []

    def allocate(count: int, dtype: npt.DTypeLike) -> AnyArray:
        given.append(np.full(count, 7, dtype))
        return given[-1]

    model = Sequential(Linear(3, 2), dtype=np.float64, allocate=allocate)
    assert [array.dtype for array in given] == [np.float64] * 2
    assert model.parameters is given[0] and model.gradients is given[1]
    assert (model.parameters != 7).all() and (model.gradients == 0).all()


def test_first_parameters_are_the_seed_s_and_of_he_s_variance() -> None:
    model = Sequential(Linear(500, 400), seed=3)
    linear: Any = model.layers[0]
    np.testing.assert_array_equal(model.parameters, Sequential(Linear(500, 400), seed=3).parameters)
    assert (model.parameters != Sequential(Linear(500, 400), seed=4).parameters).any()
    assert linear.weight.std() == pytest.approx(np.sqrt(2 / 500), rel=0.02)
    assert (linear.bias == 0).all()


def test_a_part_of_a_model_has_the_names_and_first_parameters_of_the_whole() -> None:
    whole = Sequential(*mixed_layers(), seed=2)
    stage = Sequential(*mixed_layers()[3:6], seed=2, numbers=range(3, 6))
    assert stage.names == ["3.weight", "3.bias", "4.gamma", "4.beta", "4.mean", "4.variance"]
    by_name = dict(zip(whole.names, whole.parameter_views, strict=True))
    for name, view in zip(stage.names, stage.parameter_views, strict=True):
        np.testing.assert_array_equal(view, by_name[name])


def test_a_model_without_parameters() -> None:
    model = Sequential(Flatten(), ReLU())
    y, saved = model.forward(normal(2, 1, 3))
    assert model.parameters.size == model.tensors.trainable == 0
    np.testing.assert_array_equal(model.backward(np.ones((2, 3)), saved), (y > 0).reshape(2, 1, 3))


def test_several_batches_may_be_on_their_way() -> None:
    """As in a pipeline: nothing of a batch is kept in the layers."""
    model = small_model()
    batches = [normal(n, 6, seed=n) for n in (4, 1, 3)]
    dys = [normal(n, 3, seed=n + 10) for n in (4, 1, 3)]
    alone = []
    for x, dy in zip(batches, dys, strict=True):
        dx = model.backward(dy, model.forward(x)[1])
        alone.append((dx, model.gradients.copy()))
    every = [model.forward(x)[1] for x in batches]
    for i in 1, 2, 0:
        np.testing.assert_array_equal(model.backward(dys[i], every[i]), alone[i][0])
        np.testing.assert_array_equal(model.gradients, alone[i][1])


def test_gradients_can_be_added_to_those_before() -> None:
    model = Sequential(*mixed_layers(), dtype=np.float64)
    context = Context(training=True, positions=np.arange(5))
    x, dy = normal(5, 6), normal(5, 3, seed=1)
    model.backward(dy, model.forward(x, context)[1])
    once = model.gradients.copy()
    before = normal(once.size, seed=2)
    model.gradients[...] = before
    dx = model.backward(dy, model.forward(x, context)[1], add=True)
    np.testing.assert_allclose(model.gradients, before + once, rtol=1e-14, atol=1e-14)
    assert (once[-18:] != 0).all() and dx.shape == x.shape


@pytest.mark.parametrize("add", [False, True])
def test_gradients_are_ready_from_the_last_layer_to_the_first_and_complete(add: bool) -> None:
    model = Sequential(*mixed_layers(), dtype=np.float64)
    context = Context(training=True, positions=np.arange(5))
    dy = normal(5, 3, seed=1)
    _, saved = model.forward(normal(5, 6), context)
    model.gradients[...] = before = normal(model.gradients.size, seed=2)
    before = before.copy()
    model.backward(dy, saved, add=add)
    expected = model.gradients.copy()
    model.gradients[...] = before if add else np.nan
    order: list[int] = []

    def ready(i: int) -> None:
        order.append(i)
        offset = sum(view.size for view in model.gradient_views[:i])
        view = model.gradient_views[i]
        np.testing.assert_array_equal(view.ravel(), expected[offset : offset + view.size])

    model.backward(dy, saved, ready, add)
    assert order == [9, 8, 13, 12, 7, 6, 5, 4, 11, 10, 3, 2, 1, 0]


@losses_and_targets
def test_an_empty_part_of_a_batch_gives_zero_gradients(loss: Any) -> None:
    model = small_model()
    model.gradients[:] = 7  # left over from the step before
    outputs, saved = model.forward(np.empty((0, 2, 3)))
    part = Part(np.empty((0, 2, 3)), targets(loss, 0)[:0], np.empty(0), Context())
    value, dy = weighted_loss(loss, outputs, part)
    assert model.backward(dy, saved).shape == (0, 2, 3)
    assert value == 0
    assert (model.gradients == 0).all()


# Networks -------------------------------------------------------------------------------------------


def kinds(layers: list[Layer]) -> list[str]:
    return [type(layer).__name__ for layer in layers]


def test_a_perceptron_has_what_was_asked_for() -> None:
    assert kinds(perceptron(4, [], 2)) == ["Flatten", "Linear"]
    plain = ["Flatten", "Linear", "Tanh", "Linear", "Tanh", "Linear"]
    assert kinds(perceptron(4, [3, 5], 2, "tanh")) == plain
    full = perceptron(4, [3], 2, "gelu", dropout=0.5, batch_norm="synchronised")
    assert kinds(full) == ["Flatten", "Linear", "BatchNorm", "GELU", "Dropout", "Linear"]
    norm, drop = full[2], full[4]
    assert isinstance(norm, BatchNorm) and norm.synchronised and norm.shapes[0] == (3,)
    assert isinstance(drop, Dropout) and drop.rate == 0.5
    own = perceptron(4, [3], 2, batch_norm="rank")[2]
    assert isinstance(own, BatchNorm) and not own.synchronised


@pytest.mark.parametrize("shape", [(8, 8), (1, 4, 4), (3, 9, 14)])
@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
def test_a_convolutional_network_fits_its_images(shape: tuple[int, ...], batch_norm: str) -> None:
    layers = convolutional(shape, [6], 5, dropout=0.1, batch_norm=batch_norm)
    model = Sequential(*layers)
    y, saved = model.forward(normal(2, *shape).astype(np.float32), Context(True, positions=np.arange(2)))
    assert y.shape == (2, 5)
    assert model.backward(np.ones_like(y), saved).shape == (2, *shape)
    assert kinds(layers).count("Conv2d") == 2
    assert kinds(layers).count("BatchNorm") == (0 if batch_norm == "none" else 3)


@pytest.mark.parametrize("shape", [(64,), (3, 8), (1, 4, 3), (2, 1, 8, 8)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"^model: expected images of 4 x 4 .* for a cnn, got .*--model"):
        convolutional(shape, [6], 5)


# Parts of a batch, and pieces of these --------------------------------------------------------------


@given(count=st.integers(0, 20), number=st.integers(1, 7))
def test_pieces_are_the_part(count: int, number: int) -> None:
    part = part_of(softmax_cross_entropy, count)
    pieces = list(part.pieces(number))
    assert len(pieces) == number
    sizes = [len(piece) for piece in pieces]
    assert sum(sizes) == len(part) == count and max(sizes) - min(sizes) <= 1
    for name in "x", "y", "counts":
        whole = np.concatenate([getattr(piece, name) for piece in pieces])
        np.testing.assert_array_equal(whole, getattr(part, name))
    contexts = [piece.context for piece in pieces]
    positions = np.concatenate([np.asarray(context.positions) for context in contexts])
    np.testing.assert_array_equal(positions, np.arange(count) + 10)
    assert sum(context.share for context in contexts) == pytest.approx(0.5 if count else 0)
    assert all(c.share == pytest.approx(0.5 * n / count) for c, n in zip(contexts, sizes, strict=True) if n)
    assert {(c.training, c.step, c.seed) for c in contexts} == {(True, 3, 1)}


def test_pieces_of_a_part_whose_positions_nobody_knows() -> None:
    part = Part(normal(3, 6), targets(softmax_cross_entropy, 3), np.ones(3), Context())
    assert [piece.context.positions for piece in part.pieces(2)] == [None, None]


@losses_and_targets
@pytest.mark.parametrize("pieces", [1, 2, 5, 11])  # with 11, some are empty
def test_pieces_add_up_to_the_gradients_of_the_part(loss: Any, pieces: int) -> None:
    """With dropout, too: it goes by positions."""
    part = part_of(loss, 7)
    whole, cut = (Sequential(Linear(6, 5), Dropout(0.5), Linear(5, 3), dtype=np.float64) for _ in range(2))
    told: list[int] = []
    expected = Backprop(whole, loss).gradients(part, told.append)
    cut.gradients[...] = np.nan  # left over
    found = Backprop(cut, loss, pieces).gradients(part, told.append)
    assert found == pytest.approx(expected, rel=1e-13)
    np.testing.assert_allclose(cut.gradients, whole.gradients, rtol=1e-12, atol=1e-14)
    assert told == [3, 2, 1, 0] * 2


def test_statistics_follow_all_pieces() -> None:
    """running -= momentum share (running - new), summed over pieces of 2 and 1 of 3 samples."""
    model = Sequential(BatchNorm(6, momentum=0.1), Linear(6, 3), dtype=np.float64)
    norm: Any = model.layers[0]
    part = part_of(softmax_cross_entropy, 3)
    Backprop(model, softmax_cross_entropy, 2).gradients(part, lambda i: None)
    first, last = part.x[:2].mean(axis=0), part.x[2]
    moved = 0.1 * 0.5 * (2 / 3 * first + 1 / 3 * last)  # from a mean of 0, by the part's share of 0.5
    np.testing.assert_allclose(-norm.mean_gradient, moved, rtol=1e-12)


def test_outputs_are_those_in_use() -> None:
    model = Sequential(Dropout(0.9), Linear(6, 3), dtype=np.float64)
    x = normal(4, 6)
    np.testing.assert_array_equal(
        Backprop(model, softmax_cross_entropy).outputs(x), model.layers[1].forward(x)[0]
    )


@settings(max_examples=50)
@given(count=st.integers(1, 50), nranks=st.integers(1, 9))
def test_the_sum_over_ranks_is_the_mean_gradient_of_the_batch(count: int, nranks: int) -> None:
    x, y = normal(count, 6, seed=count), np.arange(count) % 3
    model = small_model()
    backprop = Backprop(model, softmax_cross_entropy)

    def gradients(rows: slice) -> tuple[float, AnyArray]:
        n = len(x[rows])
        part = Part(x[rows], y[rows], np.full(n, 1 / count), Context(True, positions=np.arange(n)))
        loss = backprop.gradients(part, lambda i: None)
        return loss, np.array(model.gradients)

    parts = [gradients(own_part(rank, nranks, count)) for rank in range(nranks)]
    loss, expected = gradients(slice(None))
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(np.sum([part[1] for part in parts], axis=0), expected, atol=1e-12)


# Arrays of CuPy -------------------------------------------------------------------------------------


@losses_and_targets
@pytest.mark.parametrize(
    "make", [lambda: SGD(nesterov=True), Adam, lambda: LARS(trust=0.1)], ids=["sgd", "adam", "lars"]
)
def test_the_same_source_trains_on_arrays_of_cupy(
    monkeypatch: pytest.MonkeyPatch, loss: Any, make: Callable[[], Any]
) -> None:
    """A stand-in for CuPy, which needs a GPU: no function of NumPy's may get its arrays."""
    cupy = ForeignModule("cupy")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    kernels = SimpleNamespace(Update=lambda *arrays: packing.Update(*map(to_host, arrays)))
    monkeypatch.setitem(sys.modules, "mpicoll.kernels.packing_cuda", kernels)
    part = part_of(loss, 5)

    def trained(there: Callable[[Any], Any], **options: Any) -> Any:
        model = Sequential(Linear(6, 4), BatchNorm(4), Tanh(), Linear(4, 3), dtype=np.float64, **options)
        optimizer = make()
        optimizer.weight_decay, optimizer.clip_norm = 0.1, 0.5
        optimizer.bind(model.parameters, model.tensors)
        own = Part(there(part.x), there(part.y), there(part.counts), part.context)
        for _ in range(3):
            assert isinstance(Backprop(model, loss, 2).gradients(own, lambda i: None), float)
            optimizer.step(model.gradients, 0.1)
        return model.parameters

    expected = trained(lambda array: array).copy()
    found = trained(foreign, allocate=cupy.zeros)
    assert isinstance(found, ForeignArray) and array_module(found) is cupy
    np.testing.assert_array_equal(found.host, expected)


def test_two_models_of_the_same_layers_are_apart() -> None:
    layers = [Linear(4, 3), ReLU(), Linear(3, 2)]
    one, other = Sequential(*layers, seed=1), Sequential(*layers, seed=2)
    x = np.ones((1, 4), np.float32)
    before = one.forward(x)[0].copy()
    other.parameters[...] = 0
    np.testing.assert_array_equal(one.forward(x)[0], before)
    assert before.any() and not other.forward(x)[0].any()
