"""Progress: what is shown when, that counting steps costs little, and results as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mpicoll.files import replacing, why_unwritable
from mpicoll.train import report
from mpicoll.train.errors import InputError
from mpicoll.train.loop import Epoch
from mpicoll.train.report import (
    Lines,
    LiveBar,
    Meter,
    Progress,
    Several,
    as_json,
    check_writable,
    progress_for,
    throughput,
    write_json,
)

from .full_disk import files_no_longer_than


def figures(number: int) -> Epoch:
    """Of an epoch of 4 steps with 10 samples each, no two alike."""
    return Epoch(
        number, 4 * number, 0.1 / number, 2.5 / number, 3 / number, 1 - 0.5 / number, 40, 0.02, 0.127
    )


class Clock:
    """A clock that stands still until it is told to go on, and counts who looks at it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(report, "perf_counter", clock)
    return clock


def paper() -> Console:
    return Console(file=StringIO(), width=20)


def terminal() -> Console:
    return Console(file=StringIO(), width=90, force_terminal=True, color_system=None)


def text(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


# Counting ---------------------------------------------------------------------------------------------


def test_short_steps_look_at_the_clock_seldom(clock: Clock) -> None:
    meter = Meter(1, 100_000, 0, interval=10)
    clock.looks = 0
    for _ in range(6400):
        clock.now += 1e-4
        meter.step(1)
    assert 95 <= clock.looks <= 110


def test_long_steps_look_every_time(clock: Clock) -> None:
    meter = Meter(1, 100, 0, interval=10)
    clock.looks = 0
    for _ in range(50):
        clock.now += 1
        meter.step(1)
    assert clock.looks == 50


@pytest.mark.parametrize("seconds", [1e-4, 1e-3, 0.1, 3.0])
def test_it_is_time_every_interval_whatever_a_step_takes(clock: Clock, seconds: float) -> None:
    meter = Meter(1, 10**9, 0, interval=10)
    times = []
    for _ in range(int(60 / seconds)):
        clock.now += seconds
        if meter.step(1):
            times.append(clock.now)
    waits = np.diff([1000, *times])
    assert waits.min() >= 10 - 1e-6
    assert waits.max() <= 10 + max(0.02, seconds)


def test_steps_that_get_slow_are_noticed(clock: Clock) -> None:
    meter = Meter(1, 10**6, 0, interval=10)
    for _ in range(1000):
        clock.now += 1e-5
        meter.step(1)
    steps = 0
    is_time = False
    while not is_time:
        clock.now += 1
        steps += 1
        is_time = meter.step(1)
    assert steps <= report.MOST_UNSEEN


def test_positions_count_from_one() -> None:
    meter = Meter(3, 4, 5, interval=10)
    positions = []
    for _ in range(7):
        meter.step(1)
        positions.append(meter.position)
    assert positions == [(2, 2), (2, 3), (2, 4), (3, 1), (3, 2), (3, 3), (3, 4)]


def test_time_left_and_speed(clock: Clock) -> None:
    meter = Meter(5, 4, 8, interval=10)  # 12 steps left
    assert meter.time_left == ""
    clock.now += 300
    for samples in (10, 7, 3):
        meter.step(samples)
    assert meter.time_left == "15:00 left"  # 100 seconds for each of 9 steps
    assert meter.samples_per_second == pytest.approx(20 / 300)
    meter.epoch()
    clock.now += 60
    meter.step(9)
    assert meter.samples_per_second == pytest.approx(9 / 60)
    assert meter.time_left == "12:00 left"  # 90 seconds for each of 8 steps
    for _ in range(8):
        meter.step(1)
    assert meter.time_left == ""


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0:00"), (5, "0:05"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03"), (360_000, "100:00:00")],
)
def test_clock(seconds: float, shown: str) -> None:
    assert report._clock(seconds) == shown


# Lines and the bar ------------------------------------------------------------------------------------


def test_lines_of_short_epochs(clock: Clock) -> None:
    console = paper()
    lines = Lines(console)
    with lines.of(3, 4, 0):
        for number in (1, 2, 3):
            for _ in range(4):
                clock.now += 1
                lines.step(10)
            clock.now += 2  # tests
            lines.epoch(figures(number))
    assert text(console).splitlines() == [
        "epoch 1/3  train loss 2.5000  test accuracy 0.5000  2,000 samples/s  communication 13%  0:12 left",
        "epoch 2/3  train loss 1.2500  test accuracy 0.7500  2,000 samples/s  communication 13%  0:06 left",
        "epoch 3/3  train loss 0.8333  test accuracy 0.8333  2,000 samples/s  communication 13%",
    ]


def test_lines_within_long_epochs_of_a_training_that_goes_on(clock: Clock) -> None:
    console = paper()
    lines = Lines(console)
    with lines.of(2, 10, 4):
        for _ in range(6):
            clock.now += 4
            lines.step(2000)
        lines.epoch(figures(1))
        for _ in range(3):
            clock.now += 4
            lines.step(1000)
    assert text(console).splitlines() == [
        "epoch 1/2  step 7/10  500 samples/s  0:52 left",
        "epoch 1/2  step 10/10  500 samples/s  0:40 left",
        "epoch 1/2  train loss 2.5000  test accuracy 0.5000  2,000 samples/s  communication 13%  0:40 left",
        "epoch 2/2  step 3/10  250 samples/s  0:28 left",
    ]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"test_accuracy": None}, "train loss 1.2500  test loss 1.5000  2,000 samples/s"),
        ({"test_accuracy": None, "test_loss": math.nan}, "train loss 1.2500  2,000 samples/s"),
        ({"seconds": 0.0}, "test accuracy 0.7500  0 samples/s"),
    ],
)
def test_figures_that_there_are_not(changes: dict[str, float | None], shown: str) -> None:
    console = paper()
    lines = Lines(console)
    with lines.of(2, 4, 0):
        lines.epoch(replace(figures(2), **changes))  # type: ignore[arg-type]
    assert shown in text(console)


def test_bar_is_drawn_seldom_with_epochs_above_it(clock: Clock) -> None:
    console = terminal()
    bar = LiveBar(console)
    drawn = []
    with bar.of(3, 1000, 500):
        assert not bar.bar.live.auto_refresh
        bar.bar.refresh = lambda: drawn.append(bar.bar.tasks[0].completed)  # type: ignore[method-assign]
        for _ in range(500):
            clock.now += 0.004
            bar.step(10)
        bar.epoch(figures(1))
        for _ in range(300):
            clock.now += 0.004
            bar.step(10)
        fields = bar.bar.tasks[0].fields
        assert fields["epoch"] == "2/3"
        assert fields["figures"] == "2,500 samples/s  communication 13%  0:07 left"
    # Every half a second there are 125 steps; some are taken until somebody looks at the clock.
    assert drawn == pytest.approx([625, 750, 875, 1000, 1125, 1250], abs=20)
    assert "epoch 1/3  train loss 2.5000  test accuracy 0.5000" in text(console)


def test_bar_begins_where_an_earlier_run_ended_and_ends_where_this_one_does(clock: Clock) -> None:
    console = terminal()
    bar = LiveBar(console)
    with bar.of(4, 100, 150):
        task = bar.bar.tasks[0]
        assert (task.completed, task.total, task.fields["epoch"]) == (150, 400, "2/4")
        for _ in range(50):
            bar.step(1)
        clock.now += 3
        bar.epoch(figures(2))
    last = text(console).splitlines()[-2]  # then the cursor comes back
    assert "epoch 2/4" in last and "2,000 samples/s  communication 13%  0:12 left" in last


def test_bar_ends_when_the_training_fails() -> None:
    console = terminal()
    bar = LiveBar(console)
    with pytest.raises(InputError), bar.of(2, 3, 0):
        raise InputError("lower the learning rate")
    assert bar.bar.finished or not bar.bar.live.is_started
    assert text(console).endswith("\x1b[?25h")  # the cursor is there again


def test_progress_for() -> None:
    assert type(progress_for(0, True)) is LiveBar
    assert type(progress_for(0, False)) is Lines
    assert type(progress_for(1, True)) is Progress


def test_the_silent_one_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    silent = Progress()
    with silent.of(2, 3, 1):
        silent.step(5)
        silent.epoch(figures(1))
    assert capfd.readouterr() == ("", "")


# Several ----------------------------------------------------------------------------------------------


class Diary(Progress):
    def __init__(self, name: str, pages: list[tuple[object, ...]]) -> None:
        self.name, self.pages = name, pages

    @contextmanager
    def of(self, epochs: int, steps: int, done: int) -> Iterator[None]:
        self.pages.append((self.name, "of", epochs, steps, done))
        yield
        self.pages.append((self.name, "end"))

    def step(self, samples: int) -> None:
        self.pages.append((self.name, samples))

    def epoch(self, epoch: Epoch) -> None:
        self.pages.append((self.name, epoch))


def test_several_hear_all() -> None:
    pages: list[tuple[object, ...]] = []
    several = Several(Diary("a", pages), Diary("b", pages))
    with several.of(5, 6, 7):
        several.step(8)
        several.epoch(figures(9))
    said = [("of", 5, 6, 7), (8,), (figures(9),)]
    expected = [(name, *what) for what in said for name in "ab"]
    assert pages == [*expected, ("b", "end"), ("a", "end")]


# Files ------------------------------------------------------------------------------------------------


def test_throughput() -> None:
    assert throughput(figures(1)) == 2000
    assert throughput(replace(figures(1), seconds=0.0)) == 0


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": math.nan, "b": [1, math.inf], "c": {"d": np.float32("nan"), "e": np.int64(3)}})
    assert json.loads(path.read_text()) == {"a": None, "b": [1, None], "c": {"d": None, "e": 3}}
    assert list(tmp_path.iterdir()) == [path]


def test_as_json_keeps_the_rest() -> None:
    value = {"a": (1, 2.5, "x", None, True)}
    assert as_json(value) == {"a": [1, 2.5, "x", None, True]}


def test_replacing_leaves_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    with files_no_longer_than(5), pytest.raises(OSError), replacing(path) as temporary:
        temporary.write_text("new, but half")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_writes_to_what_is_no_file_and_keeps_links(tmp_path: Path) -> None:
    pipe, link, file = tmp_path / "pipe", tmp_path / "link.json", tmp_path / "result.json"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert why_unwritable(pipe) == ""
    with replacing(pipe) as target:
        target.write_text("piped")
    assert os.read(reader, 100) == b"piped" and pipe.is_fifo()
    os.close(reader)
    link.symlink_to(file)
    assert why_unwritable(link) == ""
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and file.read_text() == "new"
    link.unlink()
    link.symlink_to(tmp_path / "missing" / "result.json")
    assert why_unwritable(link) == "No such file or directory"


def test_check_writable(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    check_writable(path)
    assert not path.exists()
    with pytest.raises(InputError, match=r"written \(--json\), but: it is a directory"):
        check_writable(tmp_path)
    with pytest.raises(InputError, match=r"none/x: expected .* \(a curve\), but: No such file or directory"):
        check_writable(tmp_path / "none" / "x", "a curve")
