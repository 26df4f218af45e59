"""Files about a training: their contents, runs that go on, and what can keep them from being written."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

from mpicoll.train import metrics
from mpicoll.train.errors import InputError
from mpicoll.train.loop import Epoch
from mpicoll.train.metrics import JsonLines, LossCurve, TensorBoard

from .full_disk import files_no_longer_than

ABOUT = {"data": "digits", "ranks": 3, "hidden": (128, 64)}


def figures(number: int, **changes: Any) -> Epoch:
    """Of an epoch of 4 steps; no two alike."""
    epoch = Epoch(number, 4 * number, 0.1 / number, 2 / number, 3 / number, 1 - 0.5 / number, 40, 0.02, 0.25)
    return replace(epoch, **changes)


# JSON lines -------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def current(path: Path) -> dict[int, float | None]:
    """What a reader makes of the file by its one rule: the training losses of the epochs that stand."""
    losses: dict[int, float | None] = {}
    for line in read(path):
        if "about" not in line:
            losses = {number: loss for number, loss in losses.items() if number < line["number"]}
            losses[line["number"]] = line["train_loss"]
    return losses


def test_json_lines_begin_with_the_run_and_have_one_for_each_epoch(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    begin = datetime.now(timezone.utc) - timedelta(seconds=1)
    lines = JsonLines(path, {**ABOUT, "file": Path("a/b.csv"), "lr": np.float32(0.5)})
    with lines.of(2, 4, 0):
        for number in (1, 2):
            lines.step(10)
            lines.epoch(figures(number))
            assert len(read(path)) == number + 1  # for whoever watches
    first, *rest = read(path)
    times = [datetime.fromisoformat(line.pop("time")) for line in (first, *rest)]
    expected = {"data": "digits", "ranks": 3, "hidden": [128, 64], "file": "a/b.csv", "lr": 0.5}
    assert first == {"about": expected}
    assert rest == [asdict(figures(1)), asdict(figures(2))]
    assert times == sorted(times) and begin < times[0] and times[-1].utcoffset() == timedelta(0)


def test_json_lines_have_null_for_what_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, {"lr": math.nan})
    lines.epoch(figures(1, test_loss=math.nan, train_loss=math.inf, test_accuracy=None))
    about, epoch = read(path)
    assert about["about"] == {"lr": None}
    assert (epoch["test_loss"], epoch["train_loss"], epoch["test_accuracy"]) == (None, None, None)


def test_json_lines_of_a_run_that_goes_on_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, ABOUT)
    for number in (1, 2, 3):
        lines.epoch(figures(number))
    before = path.read_bytes()
    lines = JsonLines(path, {**ABOUT, "ranks": 2})  # from a checkpoint within the second epoch
    lines.epoch(figures(2, train_loss=7.0))
    assert path.read_bytes().startswith(before)
    assert [line["about"]["ranks"] for line in read(path) if "about" in line] == [3, 2]
    assert current(path) == {1: 2.0, 2: 7.0}
    JsonLines(path, ABOUT).epoch(figures(1, train_loss=9.0))  # a new training
    assert current(path) == {1: 9.0}


def test_a_full_disk_is_said_and_what_it_cut_off_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, ABOUT)
    lines.epoch(figures(1))
    whole = path.read_bytes()
    with (
        files_no_longer_than(len(whole) + 10),
        pytest.raises(
            InputError, match=r"metrics.jsonl: expected to write metrics there, but: File too large"
        ),
    ):
        lines.epoch(figures(2))
    assert path.read_bytes() != whole
    JsonLines(path, ABOUT)
    assert path.read_bytes().startswith(whole)
    assert [next(iter(line)) for line in read(path)] == ["about", "number", "about"]


def test_no_space_left(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"/dev/full: .*No space left on device"):
        JsonLines(Path("/dev/full"), ABOUT)


@pytest.mark.parametrize(
    ("place", "reason"), [("", "Is a directory"), ("none/metrics.jsonl", "No such file or directory")]
)
def test_json_lines_that_cannot_be_written(tmp_path: Path, place: str, reason: str) -> None:
    path = tmp_path / place
    with pytest.raises(InputError) as raised:
        JsonLines(path, ABOUT)
    assert str(raised.value) == f"{path}: expected to write metrics there, but: {reason}"


@pytest.mark.parametrize("content", ["a,b\n1,2\n3,4", '{"a": 1}\n'])
def test_files_of_others_are_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=r"table.csv: expected a new file, or one that .* found another"):
        JsonLines(path, ABOUT)
    assert path.read_text() == content


def test_an_empty_file_will_do(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.touch()
    JsonLines(path, ABOUT)
    assert len(read(path)) == 1


# TensorBoard ------------------------------------------------------------------------------------------


class Writer:
    """In place of tensorboardX's or PyTorch's."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, directory: str, *, purge_step: int) -> None:
        self.directory, self.purge_step = directory, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.flushed = 0
        self.closed = False
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        self.flushed = len(self.scalars)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if of all that write for TensorBoard these were there."""
    monkeypatch.setattr(Writer, "made", [])
    for name in ("tensorboardX", "torch.utils.tensorboard"):
        module: Any = ModuleType(name) if name in names else None
        if module is not None:
            module.SummaryWriter = Writer
        for part in {name, name.partition(".")[0]}:
            monkeypatch.setitem(sys.modules, part, module)
    if "torch.utils.tensorboard" in names:
        monkeypatch.setitem(sys.modules, "torch.utils", ModuleType("torch.utils"))


@pytest.mark.parametrize("name", ["tensorboardX", "torch.utils.tensorboard"])
def test_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install(monkeypatch, name)
    directory = tmp_path / "runs" / "a"
    board = TensorBoard(directory)
    assert directory.is_dir()
    with board.of(3, 4, 0):
        board.step(10)
        board.epoch(figures(1))
        (writer,) = Writer.made
        assert writer.flushed == 6 and not writer.closed
        board.epoch(figures(2, test_accuracy=None))
    assert writer.scalars == [
        ("loss/train", 2.0, 4),
        ("loss/test", 3.0, 4),
        ("accuracy/test", 0.5, 4),
        ("samples_per_second", 2000.0, 4),
        ("communication", 0.25, 4),
        ("learning_rate", 0.1, 4),
        ("loss/train", 1.0, 8),
        ("loss/test", 1.5, 8),
        ("samples_per_second", 2000.0, 8),
        ("communication", 0.25, 8),
        ("learning_rate", 0.05, 8),
    ]
    assert (writer.directory, writer.flushed, writer.closed) == (str(directory), 11, True)
    assert Writer.made == [writer]
    assert list(directory.iterdir()) == []


def test_no_test_set_is_no_scalar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorboardX")
    board = TensorBoard(tmp_path)
    with board.of(3, 4, 0):
        board.epoch(figures(1, test_loss=math.nan, test_accuracy=None))
    names = [name for name, _, _ in Writer.made[0].scalars]
    assert names == ["loss/train", "samples_per_second", "communication", "learning_rate"]


def test_a_run_that_goes_on_hides_the_steps_that_it_takes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "tensorboardX", "torch.utils.tensorboard")
    for done in (0, 6):
        board = TensorBoard(tmp_path)
        with board.of(3, 4, done):
            board.epoch(figures(2))
    assert [writer.purge_step for writer in Writer.made] == [1, 7]


def test_the_board_is_closed_when_the_training_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorboardX")
    board = TensorBoard(tmp_path)

    def train() -> None:
        with board.of(3, 4, 0):
            board.epoch(figures(1))
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert Writer.made[0].closed


def test_nothing_to_write_for_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(InputError, match=r"runs: expected tensorboardX, or .* pip install tensorboardX"):
        TensorBoard(tmp_path / "runs")


def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorboardX")
    (tmp_path / "file").touch()
    for place, reason in (("file", "File exists"), ("file/runs", "Not a directory")):
        with pytest.raises(InputError, match=f"{place}: expected to write metrics there, but: {reason}"):
            TensorBoard(tmp_path / place)


def test_a_full_disk_is_found_before_the_writer_meets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "tensorboardX")
    board = TensorBoard(tmp_path)
    with board.of(3, 4, 0):
        board.epoch(figures(1))
        with files_no_longer_than(100), pytest.raises(InputError, match="but: File too large"):
            board.epoch(figures(2))
    (writer,) = Writer.made
    assert {step for _, _, step in writer.scalars} == {4}
    assert writer.closed


# The loss curve ---------------------------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The numbers of the epochs in each picture; a second passes whenever somebody looks at the clock."""
    pytest.importorskip("matplotlib")
    pictures: list[list[int]] = []
    draw = metrics.loss_figure

    def recorded(history: Any, about: Any) -> Any:
        pictures.append([epoch.number for epoch in history])
        return draw(history, about)

    seconds = iter(range(10**6))
    monkeypatch.setattr(metrics, "loss_figure", recorded)
    monkeypatch.setattr(metrics, "perf_counter", lambda: float(next(seconds)))
    return pictures


def test_the_picture_is_drawn_after_epochs_and_at_the_end(tmp_path: Path, drawn: list[list[int]]) -> None:
    path = tmp_path / "loss.png"
    curve = LossCurve(path, ABOUT, history=[figures(1), figures(2)])
    assert not path.exists()
    pictures = []
    with curve.of(40, 4, 8):
        for number in range(3, 28):
            curve.epoch(figures(number))
            pictures.append(path.read_bytes())
    # A picture takes a second: after 20 it is time for the next one.
    assert [numbers[-1] for numbers in drawn] == [3, 23, 27]
    assert drawn[0] == [1, 2, 3] and drawn[-1] == [*range(1, 28)]
    assert all(picture.startswith(PNG) for picture in pictures)
    assert len({*pictures, path.read_bytes()}) == 3
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_new_is_not_drawn_again(tmp_path: Path, drawn: list[list[int]]) -> None:
    curve = LossCurve(tmp_path / "loss.png", ABOUT, history=[figures(1)])
    with curve.of(2, 4, 4):
        pass
    assert drawn == []
    with curve.of(2, 4, 4):
        curve.epoch(figures(2))
    assert drawn == [[1, 2]]


def axes_of(history: list[Epoch], about: dict[str, Any] = ABOUT) -> Any:
    pytest.importorskip("matplotlib")
    figure = metrics.loss_figure(history, about)
    figure.canvas.draw()
    return figure


def lines_of(axes: Any) -> dict[str, Any]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_what_is_in_the_picture() -> None:
    figure = axes_of([figures(1), figures(2), figures(4)])
    left, right = figure.axes
    assert lines_of(left) == {
        "train loss": ([1, 2, 4], [2.0, 1.0, 0.5]),
        "test loss": ([1, 2, 4], [3.0, 1.5, 0.75]),
    }
    assert lines_of(right) == {"test accuracy": ([1, 2, 4], [0.5, 0.75, 0.875])}
    assert (left.get_xlabel(), left.get_ylabel()) == ("epoch", "mean loss per sample")
    assert (right.get_ylabel(), left.get_yscale()) == ("test accuracy", "linear")
    assert figure.get_suptitle() == "data digits, ranks 3, hidden (128, 64)"
    assert all(tick == int(tick) for tick in left.get_xticks())
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["train loss", "test loss", "test accuracy"]


def test_no_lines_for_what_there_is_not() -> None:
    figure = axes_of([figures(n, test_loss=math.nan, test_accuracy=None) for n in (1, 2)])
    (axes,) = figure.axes
    assert list(lines_of(axes)) == ["train loss"]


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([100.0, 4.0], "log"),
        ([100.0, 6.0], "linear"),
        ([100.0, 0.0], "linear"),
        ([math.inf, math.nan], "linear"),
        ([-1.0, 100.0], "linear"),
    ],
)
def test_a_wide_range_of_losses_is_logarithmic(losses: list[float], scale: str) -> None:
    epochs = [figures(n, train_loss=loss, test_loss=50.0) for n, loss in enumerate(losses, 1)]
    assert axes_of(epochs).axes[0].get_yscale() == scale


def test_titles_are_no_formulas() -> None:
    figure = axes_of([figures(1)], {"data_file": "a$\\frac$.csv", **{f"option{i}": i for i in range(20)}})
    title = figure.get_suptitle()
    assert title.startswith("data file a$\\frac$.csv, option0 0")
    assert max(map(len, title.splitlines())) <= 90


def test_drawing_does_without_pyplot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it would fail
    curve = LossCurve(tmp_path / "loss.png", ABOUT)
    curve.epoch(figures(1))
    assert curve.path.read_bytes().startswith(PNG)


def test_curves_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for place, message in (
        ("loss.pdf", "loss.pdf: expected a name that ends in .png"),
        ("none/loss.png", r"none/loss.png: .* \(the loss curve\), but: No such file or directory"),
    ):
        with pytest.raises(InputError, match=message):
            LossCurve(tmp_path / place, ABOUT)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"loss.png: expected matplotlib, .* pip install matplotlib"):
        LossCurve(tmp_path / "loss.png", ABOUT)


def test_a_full_disk_leaves_the_last_picture(tmp_path: Path, drawn: list[list[int]]) -> None:
    path = tmp_path / "loss.png"
    curve = LossCurve(path, ABOUT)
    curve.epoch(figures(1))
    before = path.read_bytes()
    with (
        files_no_longer_than(1000),
        pytest.raises(InputError, match=r"loss.png: .*but: File too large"),
        curve.of(2, 4, 0),
    ):
        curve.epoch(figures(2))  # too soon for a picture: it is drawn at the end
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
