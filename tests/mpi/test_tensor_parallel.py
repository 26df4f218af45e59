"""Values brought from one layout to another, and models whose layers are split: the same as whole ones."""

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll.train.layers import GELU, BatchNorm, Context, Conv2d, Dropout, Flatten, Layer, Linear, ReLU, Tanh
from mpicoll.train.layouts import (
    PARTIAL,
    REPLICATED,
    Layout,
    LayoutError,
    Split,
    bytes_sent,
    own_slice,
    redistribute,
    redistribution,
)
from mpicoll.train.model import Sequential
from mpicoll.train.tensor_parallel import Redistribute, parallel_layers

Array = npt.NDArray[Any]
COMM = mpicoll.Communicator(MPI.COMM_WORLD)
T, RANK = COMM.size, COMM.rank

pytestmark = [pytest.mark.mpi, pytest.mark.algorithms]


class Recorder:
    """A communicator that notes which buffer collectives are called."""

    def __init__(self, comm: MPI.Intracomm):
        self._comm = comm
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        if name[0].isupper():
            self.calls[name] += 1
        return getattr(self._comm, name)


# Redistribution ------------------------------------------------------------------------------------

LAYOUTS = [REPLICATED, PARTIAL, Split(0), Split(1), Split(2)]
MOVES = [(before, after) for before, after in product(LAYOUTS, LAYOUTS) if after != PARTIAL]
CALLS = {
    "allreduce": "Allreduce",
    "reduce_scatter": "Reduce_scatter",
    "allgather": "Allgatherv",
    "alltoall": "Alltoallv",
}


def own_part(whole: Array, layout: Layout) -> Array:
    """What this rank holds. Summands differ from rank to rank; their sum is exact in any order."""
    if isinstance(layout, Split):
        index = [slice(None)] * whole.ndim
        index[layout.axis] = own_slice(whole.shape[layout.axis], RANK, T)
        return np.asarray(whole[tuple(index)])
    if layout == REPLICATED:
        return whole
    given_away = np.arange(whole.size).reshape(whole.shape) + 1
    factor = -RANK if RANK else T * (T - 1) // 2
    return np.asarray(whole * (RANK == 0) + factor * given_away, whole.dtype)


@pytest.mark.parametrize("before, after", MOVES, ids=str)
def test_redistribution(before: Layout, after: Layout) -> None:
    for shape in [(7, 5, 2), (3, 9, 1), (1, 0, 4), (0, 3, 2), (2, T, 3 * T + 1)]:
        whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) * 3 + 1
        own = own_part(whole, before)
        kept = own.copy()
        comm: Any = Recorder(COMM)
        length = shape[before.axis] if isinstance(before, Split) else 0
        got, nbytes = redistribute(comm, own, before, after, length)

        collective = redistribution(before, after)
        np.testing.assert_array_equal(got, own_part(whole, after), err_msg=str(shape))
        assert got.dtype == whole.dtype
        np.testing.assert_array_equal(own, kept)
        assert nbytes == bytes_sent(collective, whole.nbytes, T)
        assert list(comm.calls) == ([CALLS[collective]] if T > 1 and collective in CALLS else [])


@pytest.mark.parametrize("comm", [COMM, MPI.COMM_WORLD], ids=["mpicoll", "mpi4py"])
def test_arrays_that_are_not_contiguous(comm: MPI.Intracomm) -> None:
    whole = np.arange(35.0).reshape(5, 7).T
    for before, after in MOVES:
        if Split(2) not in (before, after):
            length = whole.shape[before.axis] if isinstance(before, Split) else 0
            own = np.asfortranarray(own_part(whole, before))
            got, _ = redistribute(comm, own, before, after, length)
            np.testing.assert_array_equal(got, own_part(whole, after))


def test_a_slice_of_the_wrong_size_is_refused() -> None:
    wrong = np.zeros((2, 8 * T + RANK + 1))
    with pytest.raises(
        LayoutError, match=rf"array: expected 8 of {8 * T} along axis 1, as rank {RANK} of {T}"
    ):
        redistribute(COMM, wrong, Split(1), REPLICATED, 8 * T)


# Models --------------------------------------------------------------------------------------------

Make = Callable[[], list[Layer]]


def pair() -> list[Layer]:
    return [Linear(5, 7), ReLU(), Linear(7, 3)]


def two_pairs() -> list[Layer]:
    return [Flatten(), Linear(5, 9), GELU(), Linear(9, 7), Tanh(), Linear(7, 8), ReLU(), Linear(8, 3)]


def left_over() -> list[Layer]:
    return [Linear(5, 7), Tanh(), Linear(7, 6), ReLU(), Linear(6, 3)]


def narrow() -> list[Layer]:
    """Fewer features than ranks, also where they are split."""
    return [Linear(5, 1), Tanh(), Linear(1, 2), GELU(), Linear(2, 3)]


def alone() -> list[Layer]:
    return [Linear(5, 3)]


def ends_split() -> list[Layer]:
    return [Linear(5, 7), ReLU(), Linear(7, 4), Linear(4, 3), Tanh()]


def with_dropout() -> list[Layer]:
    """Of slices, and of whole values."""
    return [Dropout(0.2), Linear(5, 11), Dropout(0.5), ReLU(), Linear(11, 6), Dropout(0.4), Linear(6, 3)]


def with_batch_norm() -> list[Layer]:
    return [
        Linear(5, 7),
        BatchNorm(7),
        ReLU(),
        Linear(7, 9),
        Tanh(),
        Linear(9, 4),
        BatchNorm(4),
        Linear(4, 3),
    ]


MODELS = [pair, two_pairs, left_over, narrow, alone, ends_split, with_dropout, with_batch_norm]


def both(make: Make, comm: Any = COMM) -> tuple[Sequential, Sequential]:
    """The whole model, and this rank's part of the same one."""
    layers, numbers = parallel_layers(make(), comm)
    whole = Sequential(*make(), seed=4, dtype=np.float64)
    return whole, Sequential(*layers, seed=4, dtype=np.float64, numbers=numbers)


def slices(part: Sequential, whole: Sequential, views: list[Array]) -> list[Array]:
    """What this rank should have of the whole model's tensors, in the order of its own ones."""
    places = {
        f"{layer.number}.{name}": place
        for layer in part.layers
        for name, place in zip(layer.names, layer.placements, strict=True)
    }
    assert part.names == whole.names
    assert [places[name].shape for name in part.names] == whole.shapes
    return [view[places[name].index] for name, view in zip(whole.names, views, strict=True)]


def samples(n: int, step: int = 0) -> tuple[Array, Array, Context]:
    """x, dy and their context: the same on all ranks."""
    random = np.random.default_rng([n, step])
    context = Context(training=True, step=step, positions=np.arange(n) + 3, share=1.0, seed=8)
    return random.standard_normal((n, 5)), random.standard_normal((n, 3)), context


def assert_close(got: Array, expected: Array) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def assert_same_on_all_ranks(values: Array) -> None:
    assert len(set(COMM.allgather(values.tobytes()))) == 1


@pytest.mark.parametrize("make", MODELS)
def test_parameters_begin_as_slices_of_the_whole_ones(make: Make) -> None:
    whole, part = both(make)
    for own, expected in zip(part.parameter_views, slices(part, whole, whole.parameter_views), strict=True):
        np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize("make", MODELS)
def test_a_split_model_is_the_whole_one(make: Make) -> None:
    whole, part = both(make)
    for view in part.parameter_views + whole.parameter_views:
        if view.ndim == 1 and not view.any():
            view[...] = 0.25  # biases that do something
    for n in 6, 1, 0:
        check_step(whole, part, n)


def check_step(whole: Sequential, part: Sequential, n: int) -> None:
    x, dy, context = samples(n)
    y, saved = whole.forward(x, context)
    dx = whole.backward(dy, saved)
    own_y, own_saved = part.forward(x, context)
    own_dx = part.backward(dy, own_saved)

    assert_close(own_y, y)
    assert_close(own_dx, dx)
    assert_close(part.forward(x)[0], whole.forward(x)[0])  # in evaluation
    for own, expected in zip(part.gradient_views, slices(part, whole, whole.gradient_views), strict=True):
        assert_close(own, expected)


@pytest.mark.parametrize("make", MODELS)
def test_what_ranks_hold_together_is_the_whole_model(make: Make) -> None:
    """Each split element is on exactly one rank; what is not split is the same on all."""
    whole, part = both(make)
    held = [np.zeros(shape) for shape in whole.shapes]
    counts = slices(part, whole, held)
    for view in counts:
        view += 1
    places = {
        f"{layer.number}.{name}": place
        for layer in part.layers
        for name, place in zip(layer.names, layer.placements, strict=True)
    }
    for name, count in zip(whole.names, held, strict=True):
        COMM.Allreduce(MPI.IN_PLACE, count)
        assert (count == (1 if places[name].split else T)).all()


@pytest.mark.parametrize("make", [two_pairs, narrow, with_dropout, with_batch_norm])
def test_training_stays_the_same(make: Make) -> None:
    """Biases of row-split layers and other parameters that all ranks have do not drift apart."""
    whole, part = both(make)
    for step in range(4):
        x, dy, context = samples(6, step)
        for model in (whole, part):
            _, saved = model.forward(x, context)
            model.backward(dy, saved)
            model.parameters -= 0.01 * model.gradients
    for own, expected in zip(part.parameter_views, slices(part, whole, whole.parameter_views), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-11, atol=1e-11)
    for layer in part.layers:
        shared = [i for i, place in enumerate(layer.placements) if not place.split]
        for i in shared:
            assert_same_on_all_ranks(
                part.parameter_views[part.names.index(f"{layer.number}.{layer.names[i]}")]
            )


def test_images_go_through_whole_layers_first() -> None:
    def make() -> list[Layer]:
        return [Conv2d(1, 3, 3), ReLU(), Flatten(), Linear(27, 7), Tanh(), Linear(7, 3)]

    whole, part = both(make)
    random = np.random.default_rng(2)
    x, dy = random.standard_normal((4, 1, 5, 5)), random.standard_normal((4, 3))
    y, saved = whole.forward(x)
    own_y, own_saved = part.forward(x)
    assert_close(own_y, y)
    assert_close(part.backward(dy, own_saved), whole.backward(dy, saved))
    for own, expected in zip(part.gradient_views, slices(part, whole, whole.gradient_views), strict=True):
        assert_close(own, expected)


def test_several_batches_may_be_on_their_way() -> None:
    """As in a pipeline: layers keep nothing of a batch."""
    whole, part = both(two_pairs)
    (x, dy, context), (other_x, other_dy, other) = samples(6), samples(2, 1)
    ways = [model.forward(x, context)[1] for model in (whole, part)]
    others = [model.forward(other_x, other)[1] for model in (whole, part)]
    assert_close(part.backward(other_dy, others[1]), whole.backward(other_dy, others[0]))
    assert_close(part.backward(dy, ways[1]), whole.backward(dy, ways[0]))


# What is communicated ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, forward, backward",
    [
        (pair, ["allreduce"], ["allreduce"]),
        (two_pairs, ["allreduce"] * 2, ["allreduce"] * 2),
        (left_over, ["allreduce", "allgather"], ["allreduce"] * 2),
        (alone, ["allgather"], ["allreduce"]),
    ],
)
def test_each_pair_takes_two_allreduces(make: Make, forward: list[str], backward: list[str]) -> None:
    """One forward and one backward, for any width between; a slice of dy is free."""
    comm = Recorder(COMM)
    _, part = both(make, comm)
    assert not comm.calls  # to build it, ranks need not talk
    x, dy, context = samples(6)
    _, saved = part.forward(x, context)
    assert comm.calls == Counter(CALLS[name] for name in forward if T > 1)
    comm.calls.clear()
    part.backward(dy, saved)
    assert comm.calls == Counter(CALLS[name] for name in backward if T > 1)


def test_gradients_need_not_that_of_the_samples() -> None:
    comm: Any = Recorder(COMM)
    layers, numbers = parallel_layers(pair(), comm, input_gradient=False)
    part = Sequential(*layers, seed=4, dtype=np.float64, numbers=numbers)
    whole, _ = both(pair)
    x, dy, context = samples(6)
    for model in (whole, part):
        model.backward(dy, model.forward(x, context)[1])
    assert comm.calls["Allreduce"] == (T > 1)
    for own, expected in zip(part.gradient_views, slices(part, whole, whole.gradient_views), strict=True):
        assert_close(own, expected)


def test_bytes_are_those_of_theory() -> None:
    """2 (T - 1) / T of n inputs' and n outputs' bytes for a pair; (T - 1) / T of n outputs' to gather."""
    _, part = both(left_over)
    x, dy, context = samples(6)
    for _ in range(2):
        part.backward(dy, part.forward(x, context)[1])
    sent = sum(layer.bytes_sent for layer in part.layers if isinstance(layer, Redistribute))
    allreduced, gathered = 5 + 6 + 6, 3  # dx and y of the pair, dx of the last layer; its y
    expected = 2 * 6 * 8 * (2 * allreduced + gathered) * (T - 1) / T
    assert sent == pytest.approx(expected)
