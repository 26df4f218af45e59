"""A model's layers over the ranks of this job: the gradients of the whole model, whatever the schedule."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll.train.backprop import Backprop, Part
from mpicoll.train.errors import InputError
from mpicoll.train.layers import EVALUATION, Context, Flatten, Layer, Linear, ReLU, Shape
from mpicoll.train.losses import mean_squared_error, softmax_cross_entropy
from mpicoll.train.model import Sequential
from mpicoll.train.pipeline import BACKWARD, FORWARD, SCHEDULES, Action, PipelineBackprop, partition

COMM = MPI.COMM_WORLD
CLASSES = 5

pytestmark = pytest.mark.mpi


class Channels(Layer):
    """y[n, d, ...] = sum over c of x[n, c, ...] W[c, d]: as a convolution, without its window.

    Neither y nor dx is contiguous.
    """

    def __init__(self, inputs: int, outputs: int):
        self.shapes = ((inputs, outputs),)
        self.names = ("weight",)

    def bind(self, parameters: Sequence[Any], gradients: Sequence[Any]) -> None:
        (self.weight,), (self.gradient,) = parameters, gradients

    def initialise(self, random: np.random.Generator) -> None:
        self.weight[...] = random.standard_normal(self.weight.shape)

    def forward(self, x: Any, context: Context = EVALUATION) -> tuple[Any, Any]:
        return np.moveaxis(np.tensordot(x, self.weight, (1, 0)), -1, 1), x

    def backward(self, dy: Any, saved: Any) -> Any:
        rest = (0, *range(2, dy.ndim))
        self.gradient[...] = np.tensordot(saved, dy, (rest, rest))
        return np.moveaxis(np.tensordot(dy, self.weight, (1, 1)), -1, 1)


class Masked(Layer):
    """Takes a third of the rows away, by position and step, in training only: it goes by its context."""

    def forward(self, x: Any, context: Context = EVALUATION) -> tuple[Any, Any]:
        mask = np.ones(len(x))
        if context.training:
            assert context.positions is not None
            mask *= ((context.positions + context.step + self.number) % 3 > 0) * (1 + context.share)
        return x * mask[:, None], mask

    def backward(self, dy: Any, saved: Any) -> Any:
        return dy * saved[:, None]


def flat_layers() -> list[Layer]:
    """At least as many as ranks, for samples [3, 4]."""
    middle = [ReLU(), Linear(7, 9), Masked(), Linear(9, 7)]
    return [Flatten(), Linear(12, 7), *middle, ReLU(), Masked(), Linear(7, CLASSES)]


def image_layers() -> list[Layer]:
    """For samples [2, 96, 96]; a piece of them is larger than what MPI sends before it is asked for."""
    return [Channels(2, 3), ReLU(), Channels(3, 2), ReLU(), Channels(2, 3), ReLU(), Channels(3, 1), Flatten()]


def part_of(rows: int, shape: Shape, dtype: Any = np.float64) -> Part:
    random = np.random.default_rng([rows, *shape])
    context = Context(training=True, step=4, positions=10 + np.arange(rows), share=0.5, seed=1)
    x = random.standard_normal((rows, *shape)).astype(dtype)
    counts = (random.integers(1, 4, rows) / max(1, rows)).astype(dtype)
    return Part(x, random.integers(0, CLASSES, rows), counts, context)


def stage_of(layers: list[Layer], comm: MPI.Intracomm, dtype: Any = np.float64) -> Sequential:
    own = partition([1.0] * len(layers), comm.size)[comm.rank]
    return Sequential(*layers[own], seed=2, dtype=dtype, numbers=range(len(layers))[own])


def computed(
    part: Part, pieces: int, schedule: Any, comm: MPI.Intracomm = COMM, **options: Any
) -> tuple[float, Sequential, PipelineBackprop]:
    """The loss, on all ranks, of a step after another one, the stage's model, and its closed pipeline."""
    layers = options.get("layers", flat_layers)
    loss = options.get("loss", softmax_cross_entropy)
    model = stage_of(layers(), comm, options.get("dtype", np.float64))
    backprop = PipelineBackprop(model, loss, comm, pieces, schedule)
    backprop.gradients(part_of(7, part.x.shape[1:], part.x.dtype), no_one)  # traces of which must not stay
    seen: dict[int, Any] = {}
    before = backprop.bytes_sent
    own_loss = backprop.gradients(part, lambda i: tell(seen, i, model))
    backprop.bytes_sent -= before
    assert list(seen) == told_by_backprop(model)
    for i, gradient in seen.items():
        assert np.array_equal(gradient, model.gradient_views[i]), "told before it was complete"
    assert comm.rank == comm.size - 1 or own_loss == 0.0
    backprop.close()
    return comm.bcast(own_loss, root=comm.size - 1), model, backprop


def no_one(i: int) -> None:
    pass


def tell(seen: dict[int, Any], i: int, model: Sequential) -> None:
    assert i not in seen
    seen[i] = model.gradient_views[i].copy()


def told_by_backprop(model: Sequential) -> list[int]:
    """The order in which a model's gradients become complete: the last layer's last one first."""
    order = [(layer.number, b) for layer in model.layers for b in range(len(layer.shapes))]
    return list(reversed(range(len(order))))


def check_against_backprop(part: Part, pieces: int, schedule: Any, **options: Any) -> None:
    loss = options.get("loss", softmax_cross_entropy)
    dtype = options.get("dtype", np.float64)
    whole = Sequential(*options.get("layers", flat_layers)(), seed=2, dtype=dtype)
    whole.gradients[...] = np.nan
    expected = Backprop(whole, loss, pieces).gradients(part, no_one)
    assert np.isfinite(whole.gradients).all()
    assert len(part) == 0 or abs(whole.gradients).max() > 1e-3
    found, model, _ = computed(part, pieces, schedule, **options)
    assert found == pytest.approx(expected, rel=1e-12)
    gradients = dict(zip(whole.names, whole.gradient_views, strict=True))
    for name, gradient in zip(model.names, model.gradient_views, strict=True):
        np.testing.assert_allclose(gradient, gradients[name], rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.algorithms
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rows, pieces", [(13, 1), (13, 4), (16, 4), (3, 5), (1, 2), (0, 3), (40, 11)])
def test_the_gradients_are_those_of_the_whole_model(schedule: str, rows: int, pieces: int) -> None:
    check_against_backprop(part_of(rows, (3, 4)), pieces, schedule)


@pytest.mark.algorithms
@pytest.mark.parametrize("rows, pieces", [(29, 6), (4, 6), (31, 1)])
def test_both_schedules_give_the_same_bits(rows: int, pieces: int) -> None:
    part = part_of(rows, (3, 4), np.float32)
    losses, models, _ = zip(*(computed(part, pieces, s, dtype=np.float32) for s in SCHEDULES), strict=True)
    assert losses[0] == losses[1]
    assert np.array_equal(models[0].gradients, models[1].gradients)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_large_activations_of_several_axes(schedule: str) -> None:
    def loss(outputs: Any, y: Any) -> tuple[Any, Any]:
        return mean_squared_error(outputs, np.outer(y, np.arange(outputs.shape[1]) % 3))

    check_against_backprop(part_of(11, (2, 96, 96)), 5, schedule, layers=image_layers, loss=loss)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sixteen_bits_on_the_way(schedule: str) -> None:
    """NumPy computes them by itself, without a library whose bits depend on where arrays lie."""
    part = part_of(13, (2, 5), np.float16)
    layers = lambda: [Channels(2, 3), ReLU(), Channels(3, 4), Flatten()]  # noqa: E731
    whole = Sequential(*layers(), seed=2, dtype=np.float16)
    Backprop(whole, softmax_cross_entropy, 3).gradients(part, no_one)
    _, model, _ = computed(part, 3, schedule, layers=layers, dtype=np.float16)
    gradients = dict(zip(whole.names, whole.gradient_views, strict=True))
    for name, gradient in zip(model.names, model.gradient_views, strict=True):
        assert np.array_equal(gradient, gradients[name])


@pytest.mark.algorithms
def test_own_schedules_that_take_pieces_in_any_order() -> None:
    """The same sums in another order; each message finds its piece."""
    pieces = 5
    schedule = []
    for stage in range(COMM.size):
        orders = np.random.default_rng(stage).permuted([range(pieces)] * 2, axis=1).tolist()
        schedule.append(
            [Action(kind, m) for kind, o in zip((FORWARD, BACKWARD), orders, strict=True) for m in o]
        )
    check_against_backprop(part_of(18, (3, 4)), pieces, schedule)


def test_messages_of_others_are_left_to_them() -> None:
    neighbours = [rank for rank in (COMM.rank - 1, COMM.rank + 1) if 0 <= rank < COMM.size]
    strangers = [COMM.isend(f"for {rank}", rank, tag=0) for rank in neighbours]
    check_against_backprop(part_of(5, (3, 4)), 2, "1f1b")
    assert [COMM.recv(source=rank, tag=0) for rank in neighbours] == [f"for {COMM.rank}"] * len(neighbours)
    MPI.Request.waitall(strangers)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_go_by_the_communicators_order(schedule: str) -> None:
    backwards = COMM.Split(0, -COMM.rank)
    assert backwards.rank == COMM.size - 1 - COMM.rank
    check_against_backprop(part_of(9, (3, 4)), 3, schedule, comm=backwards)
    backwards.Free()


@pytest.mark.algorithms
@pytest.mark.parametrize("pieces", [1, 3, 9])
def test_how_many_activations_are_kept(pieces: int) -> None:
    part = part_of(20, (3, 4))
    *_, backprop = computed(part, pieces, "gpipe")
    assert backprop.most_kept == pieces
    *_, backprop = computed(part, pieces, "1f1b")
    assert backprop.most_kept == min(COMM.size - COMM.rank, pieces)


def test_bytes_sent_are_activations_and_their_gradients() -> None:
    rows = 10
    layers = lambda: [Linear(12, 8), ReLU(), ReLU(), Linear(8, CLASSES)]  # noqa: E731
    *_, backprop = computed(part_of(rows, (12,)), 3, "1f1b", layers=layers)
    neighbours = (COMM.rank > 0) + (COMM.rank < COMM.size - 1)
    assert backprop.bytes_sent == neighbours * rows * 8 * 8


@pytest.mark.algorithms
@pytest.mark.parametrize("rows, pieces", [(17, 4), (2, 3), (0, 2)])
def test_outputs_are_those_of_the_whole_model_on_the_last_stage(rows: int, pieces: int) -> None:
    x = part_of(rows, (3, 4)).x
    backprop = PipelineBackprop(stage_of(flat_layers(), COMM), softmax_cross_entropy, COMM, pieces)
    for _ in range(2):
        found = backprop.outputs(x)
        if COMM.rank == COMM.size - 1:
            expected, _ = Sequential(*flat_layers(), seed=2, dtype=np.float64).forward(x)
            assert found is not None and found.shape == (rows, CLASSES)
            np.testing.assert_allclose(found, expected, rtol=1e-12)
        else:
            assert found is None
        backprop.gradients(part_of(rows + 1, (3, 4)), no_one)  # one does not disturb the other
    backprop.close()


def test_samples_of_another_form_find_their_way() -> None:
    """The same layers serve images of any size; what stages exchange then has another shape, and dtype."""
    layers = [Channels(2, 3), ReLU(), Channels(3, 2), ReLU()]
    whole = Sequential(Channels(2, 3), ReLU(), Channels(3, 2), ReLU(), seed=2, dtype=np.float32)
    backprop = PipelineBackprop(stage_of(layers, COMM, np.float32), mean_squared_error, COMM, 2)
    for shape, dtype in [((2, 3), np.float32), ((2, 4, 5), np.float32), ((2, 3), np.float64)]:
        x = part_of(5, shape, dtype).x
        found = backprop.outputs(x)
        if found is not None:
            assert found.dtype == dtype
            np.testing.assert_allclose(found, whole.forward(x)[0], rtol=1e-5)
    backprop.close()


# Bad input ------------------------------------------------------------------------------------------


def refused(said: str, *arguments: Any) -> None:
    with pytest.raises(InputError, match=said):
        PipelineBackprop(stage_of(flat_layers(), COMM), softmax_cross_entropy, COMM, *arguments)


def test_wrong_schedules_are_refused_on_every_rank() -> None:
    f, b = Action(FORWARD, 0), Action(BACKWARD, 0)
    stuck = [[f, b]] * (COMM.size - 1) + [[b, f]]
    refused("waits for ever for the forward of piece 0" if COMM.size == 1 else "waits for ever", 1, stuck)
    refused(f"expected one of {COMM.size} stages and 1 pieces", 1, [[f, b]] * (COMM.size + 1))
    refused(f"and 2 pieces, got one of {COMM.size} stages and 1 pieces", 2, [[f, b]] * COMM.size)
    refused("schedule: expected one of gpipe, 1f1b, got 'chimera'", 1, "chimera")
    refused("pieces: expected at least 1, got 0", 0)


@pytest.mark.skipif(COMM.size == 1, reason="one rank agrees with itself")
def test_ranks_that_disagree_are_told() -> None:
    last = COMM.size - 1
    refused(f"pieces: expected the same on all ranks, got 2 on rank 0, 3 on {last}", 2 + COMM.rank // last)
    refused("schedule: expected the same on all ranks", 2, "1f1b" if COMM.rank < last else "gpipe")


@pytest.mark.skipif(COMM.size != 2, reason="needs 2 ranks: on more, the others would wait")
def test_parts_that_differ_are_no_silent_mistake() -> None:
    backprop = PipelineBackprop(stage_of(flat_layers(), COMM), softmax_cross_entropy, COMM, 1)
    x = part_of(3 + COMM.rank, (3, 4)).x
    if COMM.rank == 0:
        backprop.outputs(x)
    else:
        with pytest.raises(RuntimeError, match="part: expected the same rows on all stages, but stage 0"):
            backprop.outputs(x)
    backprop.close()
