"""The algebra of layouts, against arrays that are cut up and put together again; no MPI."""

from itertools import product as pairs
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mpicoll.schedule import chunk_bounds
from mpicoll.train.errors import InputError
from mpicoll.train.layers import GELU, BatchNorm, Dropout, Flatten, Layer, Linear, ReLU, Tanh
from mpicoll.train.layouts import (
    PARTIAL,
    PRODUCTS,
    REPLICATED,
    Flow,
    Layout,
    LayoutError,
    Split,
    bytes_sent,
    gradient_layout,
    linear,
    own_slice,
    product,
    redistribution,
    transposed,
    unchanged,
)
from mpicoll.train.tensor_parallel import Redistribute, SplitLinear, parallel_layers

Array = npt.NDArray[np.float64]
LAYOUTS = [REPLICATED, PARTIAL, Split(0), Split(1)]
T = 3
RANDOM = np.random.default_rng(5)
X, W, DY = (RANDOM.standard_normal(shape) for shape in [(4, 7), (7, 5), (4, 5)])


def laid_out(whole: Array, layout: Layout) -> list[Array]:
    """What each of T ranks holds."""
    if isinstance(layout, Split):
        return np.split(whole, chunk_bounds(whole.shape[layout.axis], T)[1:-1], axis=layout.axis)
    if layout == REPLICATED:
        return [whole] * T
    summands = [RANDOM.standard_normal(whole.shape) for _ in range(T - 1)]
    return [*summands, whole - np.sum(summands, axis=0)]


def is_laid_out(parts: list[Array], layout: Layout, whole: Array) -> bool:
    """Whether parts are what ranks hold of ``whole`` in this layout."""
    shapes = [part.shape for part in laid_out(whole, layout)]
    if [part.shape for part in parts] != shapes:
        return False
    if isinstance(layout, Split):
        return np.allclose(np.concatenate(parts, axis=layout.axis), whole)
    if layout == PARTIAL:
        return np.allclose(np.sum(parts, axis=0), whole)
    return all(np.allclose(part, whole) for part in parts)


def multiplied(a: list[Array], b: list[Array]) -> list[Array]:
    """Every rank's product; raises ValueError where shapes do not fit."""
    return [x @ y for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("x, w", list(pairs(LAYOUTS, LAYOUTS)), ids=str)
def test_a_product_has_the_layout_that_the_rule_says_or_none(x: Layout, w: Layout) -> None:
    try:
        parts = multiplied(laid_out(X, x), laid_out(W, w))
    except ValueError:
        parts = []
    if (x, w) in PRODUCTS:
        assert is_laid_out(parts, product(x, w), X @ W)
    else:
        assert not any(is_laid_out(parts, layout, X @ W) for layout in LAYOUTS)
        with pytest.raises(LayoutError, match=r"x W: expected .*; got .* and") as error:
            product(x, w)
        assert str(error.value).endswith(f"got {x} and {w}")


def test_which_products_there_are() -> None:
    """The table of the module's documentation, and the linear ones."""
    assert {
        (Split(0), REPLICATED): Split(0),
        (Split(1), Split(0)): PARTIAL,
        (REPLICATED, Split(1)): Split(1),
        (REPLICATED, REPLICATED): REPLICATED,
        (PARTIAL, REPLICATED): PARTIAL,
        (REPLICATED, PARTIAL): PARTIAL,
    } == PRODUCTS


@pytest.mark.parametrize("x, w", list(PRODUCTS), ids=str)
def test_gradients_of_a_product_have_the_layouts_that_the_rule_says(x: Layout, w: Layout) -> None:
    flow = linear(x, w)
    assert (flow.x, flow.w, flow.y) == (x, w, product(x, w))
    xs, ws, dys = laid_out(X, x), laid_out(W, w), laid_out(DY, flow.dy)
    assert is_laid_out(multiplied(dys, [part.T for part in ws]), flow.dx, DY @ W.T)
    assert is_laid_out(multiplied([part.T for part in xs], dys), flow.dw, X.T @ DY)


def test_each_summand_has_the_gradient_of_the_sum() -> None:
    """d sum(c (y_0 + y_1 + ...)) / dy_t = c."""
    assert gradient_layout(PARTIAL) == REPLICATED
    assert [gradient_layout(layout) for layout in LAYOUTS if layout != PARTIAL] == [
        REPLICATED,
        Split(0),
        Split(1),
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_transposing(layout: Layout) -> None:
    assert is_laid_out([part.T for part in laid_out(X, layout)], transposed(layout), X.T)
    assert transposed(transposed(layout)) == layout


def ways_between(before: Flow, after: Flow) -> tuple[str, str]:
    """What happens between two layers, forward and backward."""
    return redistribution(before.y, after.x), redistribution(after.dx, before.dy)


WHOLE = unchanged(REPLICATED)


def test_megatrons_f_and_g_follow() -> None:
    """Shoeybi et al. (2019): f is the identity forward and an allreduce backward, g the other way round."""
    columns, rows = linear(REPLICATED, Split(1)), linear(Split(1), Split(0))
    assert ways_between(WHOLE, columns) == ("nothing", "allreduce")  # f
    assert ways_between(columns, unchanged(columns.y)) == ("nothing", "nothing")
    assert ways_between(unchanged(columns.y), rows) == ("nothing", "nothing")
    assert ways_between(rows, WHOLE) == ("allreduce", "nothing")  # g
    assert (columns.dw, rows.dw) == (columns.w, rows.w)  # nothing to do for the parameters


def test_data_parallelism_follows() -> None:
    flow = linear(Split(0), REPLICATED)
    assert (flow.y, flow.dy, flow.dx) == (Split(0), Split(0), Split(0))
    assert redistribution(flow.dw, flow.w) == "allreduce"


def test_other_edges_follow() -> None:
    """Columns whose output is gathered; the sequence-parallel pair of reduce-scatter and allgather."""
    columns, rows = linear(REPLICATED, Split(1)), linear(Split(1), Split(0))
    assert ways_between(columns, WHOLE) == ("allgather", "slice")
    assert ways_between(rows, unchanged(Split(0))) == ("reduce_scatter", "allgather")
    assert ways_between(unchanged(Split(0)), columns) == ("allgather", "reduce_scatter")


def test_every_redistribution() -> None:
    kinds = {
        (PARTIAL, REPLICATED): "allreduce",
        (PARTIAL, Split(0)): "reduce_scatter",
        (PARTIAL, Split(1)): "reduce_scatter",
        (Split(0), REPLICATED): "allgather",
        (Split(1), REPLICATED): "allgather",
        (Split(0), Split(1)): "alltoall",
        (Split(1), Split(0)): "alltoall",
        (REPLICATED, Split(0)): "slice",
        (REPLICATED, Split(1)): "slice",
        **{(layout, layout): "nothing" for layout in LAYOUTS},
    }
    for before, after in pairs(LAYOUTS, LAYOUTS):
        if (before, after) in kinds:
            assert redistribution(before, after) == kinds[before, after]
        else:
            with pytest.raises(LayoutError, match=f"got {PARTIAL}"):
                redistribution(before, after)


def test_what_is_no_layout_here() -> None:
    with pytest.raises(LayoutError, match="axis: expected 0 or more, got -1"):
        Split(-1)
    with pytest.raises(LayoutError, match=r"expected the layout of a matrix, got Split\(2\)"):
        transposed(Split(2))
    with pytest.raises(LayoutError, match=r"got REPLICATED and Split\(2\)"):
        product(REPLICATED, Split(2))
    with pytest.raises(LayoutError, match="got PARTIAL"):
        unchanged(PARTIAL)


@pytest.mark.parametrize("nranks", [1, 2, 3, 5])
def test_bytes(nranks: int) -> None:
    sent = {name: bytes_sent(name, 120, nranks) for name in ("allreduce", "reduce_scatter", "allgather")}
    assert sent["allgather"] == sent["reduce_scatter"] == 120 - 120 / nranks
    assert sent["allreduce"] == 2 * sent["allgather"]
    # each rank's T-th of the value, but for the T-th of that which it keeps
    assert bytes_sent("alltoall", 120, nranks) == pytest.approx(120 / nranks - 120 / nranks**2)
    assert bytes_sent("slice", 120, nranks) == bytes_sent("nothing", 120, nranks) == 0


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7])
def test_slices_lie_one_after_the_other(length: int) -> None:
    places = [list(range(length))[own_slice(length, rank, T)] for rank in range(T)]
    assert [place for own in places for place in own] == list(range(length))
    assert max(map(len, places)) - min(map(len, places)) <= 1


# Layers of a model, planned ------------------------------------------------------------------------


def rank_of_three(rank: int = 1) -> Any:
    return SimpleNamespace(rank=rank, size=T)


def planned(*layers: Layer, input_gradient: bool = True) -> list[Any]:
    """What the ranks' layers are, in short: redistributions by what they do, Linear by its split."""
    own, _ = parallel_layers(layers, rank_of_three(), input_gradient=input_gradient)
    return [short(layer) for layer in own]


def short(layer: Layer) -> Any:
    if isinstance(layer, Redistribute):
        return layer.collectives
    if isinstance(layer, SplitLinear):
        weight, bias = layer.placements
        return ("columns" if bias.split else "rows"), weight.shape
    return type(layer)


F, G, GATHER = ("nothing", "allreduce"), ("allreduce", "nothing"), ("allgather", "slice")


def test_columns_and_rows_take_turns() -> None:
    layers = Flatten(), Linear(6, 7), ReLU(), Dropout(0.5), Linear(7, 5), GELU(), Linear(5, 3), Tanh()
    assert planned(*layers, Linear(3, 2)) == [
        Flatten,
        F,
        ("columns", (6, 7)),
        ReLU,
        Dropout,
        ("rows", (7, 5)),
        G,
        GELU,
        F,
        ("columns", (5, 3)),
        Tanh,
        ("rows", (3, 2)),
        G,
    ]


def test_two_redistributions_in_one_place_are_one() -> None:
    """G, then F: between them nothing."""
    both = ("allreduce", "allreduce")
    layers = [Linear(4, 5) if i % 2 == 0 else Linear(5, 4) for i in range(4)]
    shapes = [("columns", (4, 5)), ("rows", (5, 4))]
    assert planned(*layers) == [F, *shapes, both, *shapes, G]


def test_a_last_linear_layer_alone_is_gathered_after_what_works_on_slices() -> None:
    assert planned(Linear(4, 5), ReLU()) == [F, ("columns", (4, 5)), ReLU, GATHER]


def test_layers_that_need_whole_values_get_them() -> None:
    assert planned(Linear(4, 5), BatchNorm(5), ReLU(), Linear(5, 2)) == [
        F,
        ("columns", (4, 5)),
        GATHER,
        BatchNorm,
        ReLU,
        F,
        ("columns", (5, 2)),
        GATHER,
    ]
    assert planned(Flatten(), ReLU()) == [Flatten, ReLU]
    assert planned() == []


def test_gradients_of_samples_are_not_sent() -> None:
    """But those that parameters before depend on."""
    linears = Linear(4, 5), Linear(5, 4), Linear(4, 3)
    split = [("columns", (4, 5)), ("rows", (5, 4)), ("allreduce", "allreduce"), ("columns", (4, 3)), GATHER]
    assert planned(Flatten(), ReLU(), *linears, input_gradient=False) == [Flatten, ReLU, *split]
    assert planned(Flatten(), ReLU(), *linears) == [Flatten, ReLU, F, *split]
    after_parameters = planned(BatchNorm(4), *linears, input_gradient=False)
    assert after_parameters == [BatchNorm, F, *split]


class Scaled(Linear):
    """Somebody's layer, of which nothing is known."""


def test_unknown_layers_get_whole_values() -> None:
    assert planned(Linear(4, 5), Scaled(5, 5)) == [F, ("columns", (4, 5)), GATHER, Scaled]


def test_numbers_are_those_of_the_whole_model() -> None:
    layers = [Linear(4, 5), ReLU(), Linear(5, 2)]
    own, numbers = parallel_layers(layers, rank_of_three(), [3, 4, 7])
    assert [short(layer) for layer in own] == [F, ("columns", (4, 5)), ReLU, ("rows", (5, 2)), G]
    assert numbers == [3, 3, 4, 7, 7]
    assert parallel_layers(layers, rank_of_three())[1] == [0, 0, 1, 2, 2]
    with pytest.raises(InputError, match="numbers: expected one for each of the 3 layers, got 2"):
        parallel_layers(layers, rank_of_three(), [0, 1])


def test_widths_that_do_not_fit_are_found_on_all_ranks() -> None:
    """Else a rank whose slices fit by chance would wait for one whose do not."""
    layers = [Linear(4, 7), ReLU(), Linear(8, 2)]
    for rank in range(T):
        with pytest.raises(InputError, match=r"layer 2 to be Linear\(7, ...\).* got Linear\(8, ...\)"):
            parallel_layers(layers, rank_of_three(rank))


@pytest.mark.parametrize("rank", range(T))
def test_dropout_knows_which_features_it_sees(rank: int) -> None:
    inside, outside = Dropout(0.5), Dropout(0.5)
    layers = [Linear(4, 7), inside, Linear(7, 5), outside]
    own, _ = parallel_layers(layers, rank_of_three(rank))
    seen = [layer.first_feature for layer in own if isinstance(layer, Dropout)]
    assert seen == [own_slice(7, rank, T).start, 0]
    assert inside.first_feature == 0  # the given layers stay as they are


@pytest.mark.parametrize("rank", range(T))
def test_placements(rank: int) -> None:
    whole_weight = np.arange(28.0).reshape(4, 7)
    for layout in (Split(1), Split(0)):
        layer = SplitLinear(4, 7, layout, rank_of_three(rank))
        weight, bias = layer.placements
        assert (weight.shape, weight.split) == ((4, 7), True)
        assert (bias.shape, bias.split) == ((7,), layout == Split(1))
        np.testing.assert_array_equal(whole_weight[weight.index], laid_out(whole_weight, layout)[rank])
        assert layer.shapes == (whole_weight[weight.index].shape, np.arange(7)[bias.index].shape)
        assert layer.shapes[1][0] == layer.shapes[0][1]
