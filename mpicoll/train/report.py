"""What the user sees while training and at its end.

`Lines` and `LiveBar` know the steps and samples so far, and how long they took:

    samples/s  = samples / seconds, of the epoch so far             (at its end those of its figures)
    time left  = seconds since the training began / steps taken in them * steps left

A step may take no more than 0.1 ms, so that counting one must cost next to nothing: the clock is looked at
every few steps only, and something shown, which takes milliseconds, now and then.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from mpicoll.files import replacing, why_unwritable
from mpicoll.train.elastic import Lost
from mpicoll.train.errors import InputError

if TYPE_CHECKING:
    from mpicoll.train.loop import Epoch

LOOKING = 0.01  # seconds between looks at the clock, about
MOST_UNSEEN = 64  # steps between looks, at most: should they take seconds suddenly, somebody still notices
LINES_EVERY = 10.0  # seconds
BAR_EVERY = 0.5  # seconds; drawing it takes some milliseconds, which every rank waits for


class Progress:
    """Hears what the loop does; this one keeps silent, as all ranks but rank 0 should.

    On the rank that hears, the end of `of` and `epoch` may raise `InputError` where files are written; `step`
    raises nothing.
    """

    @contextmanager
    def of(self, epochs: int, steps: int, done: int) -> Iterator[None]:
        """Around ``epochs`` of ``steps`` each, of which ``done`` steps have been taken in an earlier run."""
        yield

    def step(self, samples: int) -> None:
        """After each step, on as many samples over all ranks."""

    def epoch(self, epoch: Epoch) -> None:
        """After each epoch."""

    def note(self, text: str) -> None:
        """Something that whoever watches should know."""


class FromRankZero(Progress):
    """The observers that ``make()`` makes, where ``is_rank_zero()``: also on a rank that becomes that."""

    def __init__(self, is_rank_zero: Callable[[], bool], make: Callable[[], Progress]) -> None:
        self._is_rank_zero, self._make = is_rank_zero, make
        self._observer: Progress | None = None

    def open(self) -> None:
        """Make the observers, if they are to be made here. Raises `InputError`."""
        if self._observer is None and self._is_rank_zero():
            self._observer = self._make()

    @contextmanager
    def of(self, epochs: int, steps: int, done: int) -> Iterator[None]:
        self.open()
        with (self._observer or Progress()).of(epochs, steps, done):
            yield

    def step(self, samples: int) -> None:
        if self._observer is not None:
            self._observer.step(samples)

    def epoch(self, epoch: Epoch) -> None:
        if self._observer is not None:
            self._observer.epoch(epoch)

    def note(self, text: str) -> None:
        if self._observer is not None:
            self._observer.note(text)


class Several(Progress):
    """Hands on to each of ``observers``, in order."""

    def __init__(self, *observers: Progress) -> None:
        self.observers = observers

    @contextmanager
    def of(self, epochs: int, steps: int, done: int) -> Iterator[None]:
        with ExitStack() as stack:
            for observer in self.observers:
                stack.enter_context(observer.of(epochs, steps, done))
            yield

    def step(self, samples: int) -> None:
        for observer in self.observers:
            observer.step(samples)

    def epoch(self, epoch: Epoch) -> None:
        for observer in self.observers:
            observer.epoch(epoch)

    def note(self, text: str) -> None:
        for observer in self.observers:
            observer.note(text)


class Meter:
    """Counts the steps of a training, and says every ``interval`` seconds that something is to be shown."""

    def __init__(self, epochs: int, steps: int, done: int, interval: float) -> None:
        self.epochs, self.steps = epochs, steps
        self.done = self.taken = done
        self.samples = 0  # of the epoch so far
        self.begin = self.epoch_begin = self._looked = self._shown = perf_counter()
        self._interval = interval
        self._every, self._next_look = 1, done + 1

    def step(self, samples: int) -> bool:
        """Count one; whether to show something."""
        self.taken += 1
        self.samples += samples
        return self.taken >= self._next_look and self._look()

    def _look(self) -> bool:
        now = perf_counter()
        self._every = min(2 * self._every, MOST_UNSEEN) if now - self._looked < LOOKING else 1
        self._looked, self._next_look = now, self.taken + self._every
        is_time = now - self._shown >= self._interval
        if is_time:
            self._shown = now
        return is_time

    def epoch(self) -> None:
        """An epoch has ended, and the next one begins."""
        self.samples = 0
        self.epoch_begin = perf_counter()

    def shown(self) -> None:
        """Something has been shown anyway: it is time again in ``interval`` seconds."""
        self._shown = perf_counter()

    @property
    def position(self) -> tuple[int, int]:
        """The epoch and the step of it that has been taken last, both from 1."""
        epoch, step = divmod(self.taken - 1, self.steps)
        return epoch + 1, step + 1

    @property
    def samples_per_second(self) -> float:
        """In the epoch so far."""
        return self.samples / max(1e-9, perf_counter() - self.epoch_begin)  # a clock may stand still

    @property
    def time_left(self) -> str:
        """For the steps to come, as ``1:02:03 left``; empty with none to come, or none to tell it from."""
        taken, left = self.taken - self.done, self.epochs * self.steps - self.taken
        if taken < 1 or left < 1:
            return ""
        return f"{_clock((perf_counter() - self.begin) / taken * left)} left"


class Lines(Progress):
    """Lines on stderr, for logs: one per epoch, and in long epochs one every 10 s."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    @contextmanager
    def of(self, epochs: int, steps: int, done: int) -> Iterator[None]:
        self.meter = Meter(epochs, steps, done, LINES_EVERY)
        yield

    def step(self, samples: int) -> None:
        if self.meter.step(samples):
            epoch, step = self.meter.position
            speed = f"{self.meter.samples_per_second:,.0f} samples/s"
            self._say(epoch, f"step {step}/{self.meter.steps}", speed, self.meter.time_left)

    def epoch(self, epoch: Epoch) -> None:
        self.meter.epoch()
        self.meter.shown()
        self._say(epoch.number, *_losses(epoch), *_speed(epoch), self.meter.time_left)

    def note(self, text: str) -> None:
        self.console.print(f"note: {text}", highlight=False, soft_wrap=True)

    def _say(self, epoch: int, *figures: str) -> None:
        line = _joined(f"epoch {epoch}/{self.meter.epochs}", *figures)
        self.console.print(line, highlight=False, soft_wrap=True)


class LiveBar(Progress):
    """A bar on stderr, for a terminal, with a line above it for each epoch."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    @contextmanager
    def of(self, epochs: int, steps: int, done: int) -> Iterator[None]:
        self.meter = Meter(epochs, steps, done, BAR_EVERY)
        self.communication = ""  # in the epoch before
        # Drawn here alone: a thread that draws would take the GIL from the training, whatever that is doing.
        self.bar = Bar(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            auto_refresh=False,
            expand=True,
        )
        first = f"{min(done // max(1, steps) + 1, epochs)}/{epochs}"
        self.task = self.bar.add_task("", total=epochs * steps, completed=done, epoch=first, figures="")
        with self.bar:
            yield

    def step(self, samples: int) -> None:
        if self.meter.step(samples):
            speed = f"{self.meter.samples_per_second:,.0f} samples/s"
            self._update(self.meter.position[0], speed, self.communication)
            self.bar.refresh()

    def epoch(self, epoch: Epoch) -> None:
        self.meter.epoch()
        speed, self.communication = _speed(epoch)
        self._update(epoch.number, speed, self.communication)
        line = _joined(f"epoch {epoch.number}/{self.meter.epochs}", *_losses(epoch), speed)
        self.console.print(line, highlight=False)

    def note(self, text: str) -> None:
        self.console.print(f"note: {text}", highlight=False)

    def _update(self, epoch: int, *figures: str) -> None:
        """What is drawn next time."""
        text = _joined(*figures, self.meter.time_left)
        label = f"{epoch}/{self.meter.epochs}"
        self.bar.update(self.task, completed=self.meter.taken, epoch=label, figures=text)


def throughput(epoch: Epoch) -> float:
    """Samples per second in the steps of an epoch; 0 if none was left to take."""
    return epoch.samples / epoch.seconds if epoch.seconds else 0.0


def _losses(epoch: Epoch) -> list[str]:
    """What was learned, with nothing about tests where there are none."""
    figures = [f"train loss {epoch.train_loss:.4f}"]
    if epoch.test_accuracy is not None:
        figures.append(f"test accuracy {epoch.test_accuracy:.4f}")
    elif not math.isnan(epoch.test_loss):
        figures.append(f"test loss {epoch.test_loss:.4f}")
    return figures


def _speed(epoch: Epoch) -> tuple[str, str]:
    return f"{throughput(epoch):,.0f} samples/s", f"communication {epoch.communication:.0%}"


def _joined(*figures: str) -> str:
    return "  ".join(filter(None, figures))


def _clock(seconds: float) -> str:
    """``0:05``, ``59:59`` or ``100:00:00``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def progress_for(rank: int, is_terminal: bool) -> Progress:
    """The fitting one: only rank 0 speaks, and a bar is for terminals."""
    if rank != 0:
        return Progress()
    return LiveBar() if is_terminal else Lines()


def print_result(result: Mapping[str, Any]) -> None:
    """The final table on stdout."""
    table = Table("figure", "value", title="mpicoll.train")
    for name, value in result.items():
        if name == "lost":
            continue  # below, in words
        shown = f"{value:,.4f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), shown[:16] if name.endswith("sha256") else shown)
    console = Console(highlight=False)
    console.print(table)
    for lost in result.get("lost", ()):
        console.print(f"{Lost(**lost)}; the others went on after {lost['seconds']:.3f} s")


def check_writable(path: Path, use: str = "--json") -> None:
    """Raise `InputError` now if ``path`` could not be written later, by `write_json` or with `replacing`."""
    if reason := why_unwritable(path):
        raise InputError(f"{path}: expected a file that can be written ({use}), but: {reason}")


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write ``result`` whole or not at all; null for numbers that are none, which JSON does not have."""
    with replacing(path) as temporary, temporary.open("w") as file:
        json.dump(as_json(result), file, indent=2, allow_nan=False)
        file.write("\n")


def as_json(value: Any) -> Any:
    """``value`` with Python's own numbers for NumPy's, and None for NaN and infinities, unknown to JSON."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): as_json(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(one) for one in value]
    return value
