"""Pipelines without MPI ranks: schedules and their proofs, pictures, layers by cost."""

import sys
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpicoll.train import pipeline
from mpicoll.train.errors import InputError
from mpicoll.train.layers import EVALUATION, Context, Layer, Linear, ReLU
from mpicoll.train.pipeline import (
    BACKWARD,
    FORWARD,
    SCHEDULES,
    Action,
    gpipe,
    measure_costs,
    one_forward_one_backward,
    partition,
    timeline,
)
from mpicoll.train.pipeline_drawing import draw_figure, draw_png, draw_text

F0, F1, B0, B1 = Action(FORWARD, 0), Action(FORWARD, 1), Action(BACKWARD, 0), Action(BACKWARD, 1)
SIZES = list(product(range(1, 9), range(1, 10)))  # (stages, pieces)

# Schedules ------------------------------------------------------------------------------------------


def test_the_schedules_are_those_of_the_papers() -> None:
    assert gpipe(2, 2) == [[F0, F1, B0, B1], [F0, F1, B0, B1]]
    assert one_forward_one_backward(2, 2) == [[F0, F1, B0, B1], [F0, B0, F1, B1]]
    assert one_forward_one_backward(1, 2) == [[F0, B0, F1, B1]]
    assert one_forward_one_backward(4, 2)[0] == [F0, F1, B0, B1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_begins_when_what_it_needs_has_ended(name: str) -> None:
    for stages, pieces in SIZES:
        random = np.random.default_rng([stages, pieces])
        forward, backward = random.uniform(0.5, 3, (2, stages))
        spans = timeline(SCHEDULES[name](stages, pieces), list(forward), list(backward)).stages
        begins = {(s, span.action): span.begin for s in range(stages) for span in spans[s]}
        ends = {(s, span.action): span.end for s in range(stages) for span in spans[s]}
        for s, m in product(range(stages), range(pieces)):
            f, b = Action(FORWARD, m), Action(BACKWARD, m)
            assert ends[s, f] - begins[s, f] == pytest.approx(forward[s])
            assert ends[s, b] - begins[s, b] == pytest.approx(backward[s])
            assert begins[s, f] >= (ends[s - 1, f] if s else 0)
            assert begins[s, b] >= max(ends[s, f], ends[s + 1, b] if s + 1 < stages else 0)
        for own in spans:
            assert all(after.begin >= before.end for before, after in pairwise(own))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("forward, backward", [(1.0, 2.0), (1.0, 1.0), (3.0, 1.0)])
def test_time_and_bubble_are_those_of_the_formulas(name: str, forward: float, backward: float) -> None:
    for stages, pieces in SIZES:
        found = timeline(SCHEDULES[name](stages, pieces), forward, backward)
        assert found.duration == (pieces + stages - 1) * (forward + backward)
        assert found.bubble == pytest.approx((stages - 1) / (pieces + stages - 1))


def test_1f1b_keeps_few_activations_and_gpipe_all() -> None:
    for stages, pieces in SIZES:
        kept = timeline(one_forward_one_backward(stages, pieces)).most_kept
        assert kept == tuple(min(stages - s, pieces) for s in range(stages))
        assert timeline(gpipe(stages, pieces)).most_kept == (pieces,) * stages


@pytest.mark.parametrize("name", SCHEDULES)
def test_both_go_backward_through_the_pieces_in_ascending_order(name: str) -> None:
    for stages, pieces in SIZES:
        for actions in SCHEDULES[name](stages, pieces):
            assert [a.piece for a in actions if a.kind == BACKWARD] == list(range(pieces))


@pytest.mark.parametrize(
    "schedule, said",
    [
        ([[F0, B0], [B0, F0]], "on stage 0 the backward of piece 0 waits for ever .* piece 0 on stage 1"),
        (
            [[B0, F0]],
            "on stage 0 the backward of piece 0 waits for ever for the forward of piece 0 on stage 0",
        ),
        (
            [[F0, B0, F1, B1], [F0, F1, B0, B1]],
            "on stage 0 the backward of piece 0 waits for ever for the backward of piece 0 on stage 1",
        ),
        ([[F0, F1, B0, B1], [F0, B0, B1]], "expected the forward of piece 1 1 times on stage 1, got 0"),
        ([[F0, B0, B0]], "expected the backward of piece 0 1 times on stage 0, got 2"),
        ([[F0, B0, Action(FORWARD, -1)]], "expected the forward of piece -1 0 times on stage 0, got 1"),
        ([[F1, B1]], "expected the forward of piece 0 1 times on stage 0, got 0"),
        ([[], []], "at least one stage and one piece"),
        ([], "at least one stage and one piece"),
    ],
)
def test_a_wrong_schedule_is_refused_by_the_name_of_its_action(schedule: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        timeline(schedule)


def test_impossible_numbers_are_refused() -> None:
    for make in SCHEDULES.values():
        with pytest.raises(InputError, match="stages: expected at least 1, got 0"):
            make(0, 3)
        with pytest.raises(InputError, match="pieces: expected at least 1, got -1"):
            make(2, -1)
    for cost in (0.0, [1.0, 2.0, 3.0], [1.0, float("nan")]):
        with pytest.raises(
            InputError, match="backward: expected a time above 0, or one for each of 2 stages"
        ):
            timeline(gpipe(2, 2), 1.0, cost)


# Pictures -------------------------------------------------------------------------------------------


def test_the_text_shows_each_stage_at_each_time() -> None:
    assert draw_text(one_forward_one_backward(2, 2)).splitlines() == [
        "stage 0  F0 F1 .  .  B0 B0 .  B1 B1",
        "stage 1  .  F0 B0 B0 F1 B1 B1 .  .",
        "bubble 33%, pieces kept 2 1",
    ]
    assert draw_text(gpipe(1, 2), forward=2, backward=1).splitlines()[0] == "stage 0  F0 F0 F1 F1 B0 B1"
    lines = draw_text(gpipe(11, 11), [1] * 10 + [2]).splitlines()
    assert lines[1].startswith("stage 1   .   F0  F1  F2 ") and "F10 F10" in lines[10]
    with pytest.raises(InputError, match=r"expected whole units of time, got 1, 1\.5"):
        draw_text(gpipe(2, 2), 1, 1.5)  # type: ignore[arg-type]


def test_the_schedules_in_the_documentation_are_the_real_ones() -> None:
    assert pipeline.__doc__ is not None
    for name, make in SCHEDULES.items():
        first, *others = draw_text(make(3, 4)).splitlines()[:-1]
        rows = [f"    {name:7}  {first}", *(f"{'':13}{row}" for row in others)]
        assert "\n".join(rows) in pipeline.__doc__


def test_the_picture_has_a_bar_for_each_action(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    schedule = one_forward_one_backward(3, 5)
    draw_png(schedule, tmp_path / "picture.png", [0.1, 0.2, 0.1], unit="s")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    drawn = timeline(schedule)
    axes = draw_figure(drawn, "s").axes[0]
    bars = {(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in axes.patches}
    assert {(round(y), x, width) for y, x, width in bars} == {
        (s, span.begin, span.end - span.begin) for s, spans in enumerate(drawn.stages) for span in spans
    }
    assert sorted(text.get_text() for text in axes.texts) == sorted("01234" * 6)
    assert axes.get_xlabel() == "time / s" and "pieces kept 3 2 1" in axes.get_title()


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'mpicoll\[plots\]'"):
        draw_png(gpipe(2, 2), tmp_path / "picture.png")


# Layers by cost -------------------------------------------------------------------------------------


def test_the_costliest_stage_costs_as_little_as_can_be() -> None:
    random = np.random.default_rng(5)
    for layers in range(1, 9):
        costs = random.integers(0, 20, layers).tolist()
        for stages in range(1, layers + 1):
            parts = partition(costs, stages)
            assert [i for part in parts for i in range(layers)[part]] == list(range(layers))
            assert len(parts) == stages and all(part.stop > part.start for part in parts)
            every = [
                max(sum(costs[a:b]) for a, b in pairwise([0, *inner, layers]))
                for inner in combinations(range(1, layers), stages - 1)
            ]
            assert max(sum(costs[part]) for part in parts) == min(every)


def test_equal_costs_give_equal_parts_and_a_costly_layer_stands_alone() -> None:
    assert partition([1.0] * 6, 3) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert partition([1, 9, 1, 1], 3) == [slice(0, 1), slice(1, 2), slice(2, 4)]


def test_bad_partitions_are_refused() -> None:
    with pytest.raises(ValueError, match="at least as many layers as stages, got 2 layers and 3 stages"):
        partition([1, 2], 3)
    with pytest.raises(ValueError, match="stages: expected at least 1, got 0"):
        partition([1, 2], 0)
    for cost in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="costs: expected numbers of at least 0"):
            partition([1.0, cost], 1)


class Clock:
    """A time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(Layer):
    """Every other element of the last axis; takes the next of ``forwards``, and ``backward``, of a clock."""

    def __init__(self, clock: Clock, forwards: list[float], backward: float):
        self.clock, self.forwards, self.backward_cost = clock, iter(forwards), backward
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Any, context: Context = EVALUATION) -> tuple[Any, Any]:
        assert context.training and context.positions is not None and len(context.positions) == len(x)
        self.seen.append(x.shape)
        self.clock.now += next(self.forwards)
        return x[..., ::2], x.shape

    def backward(self, dy: Any, saved: Any) -> Any:
        self.clock.now += self.backward_cost
        assert dy.shape == (*saved[:-1], (saved[-1] + 1) // 2)
        return np.zeros(saved)


def test_costs_are_the_median_of_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(pipeline, "perf_counter", clock)
    # The first call, which is not to count, then three that do, and one for the next layer's input.
    layers = [Slow(clock, [100, 5, 1, 2, 70], 10), Slow(clock, [50, 3, 3, 8, 60], 0.5)]
    assert measure_costs(layers, np.ones((3, 4, 7)), repeats=3) == [12, 3.5]
    assert layers[1].seen == [(3, 4, 4)] * 5


def test_real_layers_are_measured_and_stay_as_they_are() -> None:
    layers: list[Layer] = [Linear(6, 5), ReLU(), Linear(5, 2)]
    layers[2].number = 7
    costs = measure_costs(layers, np.ones((4, 6)), dtype=np.float64, repeats=1)
    assert len(costs) == 3 and all(cost > 0 for cost in costs)
    assert not hasattr(layers[0], "weight") and layers[2].number == 7


def test_parameters_have_the_dtype_that_is_measured() -> None:
    seen = []

    class Seen(ReLU):
        def forward(self, x: Any, context: Context = EVALUATION) -> tuple[Any, Any]:
            seen.append(x.dtype)
            return super().forward(x, context)

    measure_costs([Linear(3, 3), Seen()], np.ones((2, 3), np.float32), dtype=np.float64, repeats=1)
    assert set(seen) == {np.dtype(np.float64)}
