"""Files that tell how a training went, epoch by epoch, for people and programs that watch it.

Observers such as `mpicoll.train.report` has, for rank 0 alone: `JsonLines` for programs, `TensorBoard`, and
`LossCurve`, a picture. All find out when they are made, before the training, whether they can write.

A training that goes on from a checkpoint adds to what the interrupted run has left. That may have come
further than its last checkpoint; hence one rule, for all who read it:

    an epoch takes the place of all that were written before with the same or a larger number
"""

from __future__ import annotations

import importlib
import json
import math
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from mpicoll.files import replacing
from mpicoll.train.errors import InputError
from mpicoll.train.report import Progress, as_json, check_writable, throughput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mpicoll.train.loop import Epoch

ABOUT = "about"  # the first name in a file of JSON lines
BLOCK = bytes(4096)  # as little as a disk gives
DRAWING = 0.05  # of the time of training, at most: a picture takes some 0.1 s, an epoch sometimes less
LOGARITHMIC = 20  # the ratio of the largest loss to the smallest from which a linear axis hides the end


class JsonLines(Progress):
    """Lines of JSON in the file ``path``.

    Each run writes ``{"about": {...}, "time": ...}`` first, what the run is, when this is made; then a line
    per epoch, the fields of `Epoch` and the time, ISO 8601 in UTC::

        {"number": 1, "step": 45, "rate": 0.05, ..., "time": "2026-01-31T12:00:00.000+00:00"}

    NaN and infinities are null. Runs are appended: a line stands for its epoch only until one comes with the
    same or a smaller number, of a run that has begun anew or gone on from before it. A last line that a crash
    has left incomplete is removed by the next run.

    Raises `InputError`, also from `epoch`, if the file cannot be written, or is one of something else.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        with _writing(path):
            _mend(path)
        self._append({ABOUT: about})

    def epoch(self, epoch: Epoch) -> None:
        self._append(asdict(epoch))

    def _append(self, facts: Mapping[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps(as_json({**facts, "time": now}), allow_nan=False, default=str)
        with _writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _mend(path: Path) -> None:
    """Remove an incomplete last line. Raises OSError, and `InputError` rather than touch a file of others."""
    if not path.is_file():
        return
    content = path.read_bytes()
    if content and not content.startswith(f'{{"{ABOUT}": '.encode()):
        raise InputError(
            f"{path}: expected a new file, or one that a training has written its metrics to, found another; "
            "choose another name"
        )
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


class TensorBoard(Progress):
    """Scalars for TensorBoard in ``directory``, which is made if need be.

    ``loss/train``, ``loss/test``, ``accuracy/test``, ``samples_per_second``, ``communication`` and
    ``learning_rate`` at the epochs' last steps, without those that there are not. TensorBoard leaves out what
    an interrupted run has written beyond the step where this one goes on.

    Raises `InputError` if the directory cannot be written to, also from `epoch`, and if neither tensorboardX
    nor PyTorch with tensorboard is installed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._module = _tensorboard(directory)
        self._writer: Any = None
        self._check_room()

    @contextmanager
    def of(self, epochs: int, steps: int, done: int) -> Iterator[None]:
        self._first_step = done + 1
        try:
            yield
        finally:
            self._close()

    def epoch(self, epoch: Epoch) -> None:
        self._check_room()
        with _writing(self.directory):
            if self._writer is None:
                self._writer = self._module.SummaryWriter(str(self.directory), purge_step=self._first_step)
            for name, value in _scalars(epoch).items():
                self._writer.add_scalar(name, value, epoch.step)
            self._writer.flush()

    def _check_room(self) -> None:
        """A full disk ends the thread in which tensorboardX writes without a word; then it waits for that."""
        with _writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.directory) as file:
                file.write(BLOCK)

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with _writing(self.directory):
                writer.close()


def _tensorboard(directory: Path) -> Any:
    """A module with a ``SummaryWriter``: the first that is there, without loading PyTorch if possible."""
    for name in ("tensorboardX", "torch.utils.tensorboard"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise InputError(
        f"{directory}: expected tensorboardX, or PyTorch with tensorboard, to write what TensorBoard shows, "
        "found neither; pip install tensorboardX"
    )


def _scalars(epoch: Epoch) -> dict[str, float]:
    scalars = {
        "loss/train": epoch.train_loss,
        "loss/test": epoch.test_loss,
        "accuracy/test": math.nan if epoch.test_accuracy is None else epoch.test_accuracy,
        "samples_per_second": throughput(epoch),
        "communication": epoch.communication,
        "learning_rate": epoch.rate,
    }
    return {name: float(value) for name, value in scalars.items() if not math.isnan(value)}


class LossCurve(Progress):
    """A picture, the PNG file ``path``: losses, and the accuracy if there is one, over epochs.

    ``about`` is its title, ``history`` has the epochs of earlier runs. It is drawn again after each epoch
    (where epochs are short, as often as takes a twentieth of the time) and at the end, and replaced whole.

    Raises `InputError` if the file cannot be written, also from `epoch`, and if matplotlib is not installed.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], history: Sequence[Epoch] = ()) -> None:
        if path.suffix.lower() != ".png":
            raise InputError(f"{path}: expected a name that ends in .png for the loss curve")
        _check_matplotlib(path)
        check_writable(path, "the loss curve")
        self.path, self.about = path, about
        self.history = list(history)
        self._drawn = len(self.history)  # epochs
        self._next = 0.0  # when to draw again, in seconds

    @contextmanager
    def of(self, epochs: int, steps: int, done: int) -> Iterator[None]:
        try:
            yield
        finally:
            if self._drawn < len(self.history):
                self._draw()

    def epoch(self, epoch: Epoch) -> None:
        self.history.append(epoch)
        if perf_counter() >= self._next:
            self._draw()

    def _draw(self) -> None:
        begin = perf_counter()
        with _writing(self.path), replacing(self.path) as temporary:
            loss_figure(self.history, self.about).savefig(temporary, format="png")
        end = perf_counter()
        self._next = end + (end - begin) / DRAWING
        self._drawn = len(self.history)


def _check_matplotlib(path: Path) -> None:
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise InputError(
            f"{path}: expected matplotlib, which draws the loss curve, but: {error}; pip install matplotlib"
        ) from error


def loss_figure(history: Sequence[Epoch], about: Mapping[str, Any]) -> Figure:
    """The picture of at least one epoch, apart from matplotlib's state that all figures share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    numbers = [epoch.number for epoch in history]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="epoch", ylabel="mean loss per sample")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.plot(numbers, [epoch.train_loss for epoch in history], "C0.-", label="train loss")
    losses = [epoch.test_loss for epoch in history]
    if not all(map(math.isnan, losses)):
        axes.plot(numbers, losses, "C1.-", label="test loss")
    if _is_wide([epoch.train_loss for epoch in history] + losses):
        axes.set_yscale("log")
    accuracies = [math.nan if e.test_accuracy is None else e.test_accuracy for e in history]
    if not all(map(math.isnan, accuracies)):
        right = axes.twinx()
        right.set_ylabel("test accuracy")
        right.plot(numbers, accuracies, "C2.--", label="test accuracy")
    # The user's words: a dollar sign in them begins no formula.
    figure.suptitle(_title(about), fontsize="medium", parse_math=False)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _is_wide(losses: Sequence[float]) -> bool:
    finite = [loss for loss in losses if math.isfinite(loss)]
    return bool(finite) and 0 < LOGARITHMIC * min(finite) < max(finite)


def _title(about: Mapping[str, Any]) -> str:
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items())
    return textwrap.fill(facts, 90)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise `InputError` for what goes wrong in writing to ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: expected to write metrics there, but: {reason}") from error
