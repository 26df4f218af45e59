"""What the user sees while training and at its end."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from mpicoll.train.errors import InputError

if TYPE_CHECKING:
    from mpicoll.train.loop import Epoch


class Progress:
    """Hears what the loop does; this one keeps silent, as all ranks but rank 0 should."""

    @contextmanager
    def of(self, epochs: int, steps: int) -> Iterator[None]:
        """Around ``epochs`` of ``steps`` each."""
        yield

    def step(self) -> None:
        """After each step."""

    def epoch(self, epoch: Epoch) -> None:
        """After each epoch."""


class Lines(Progress):
    """A line per epoch on stderr, for logs."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.epochs = 0

    @contextmanager
    def of(self, epochs: int, steps: int) -> Iterator[None]:
        self.epochs = epochs
        yield

    def epoch(self, epoch: Epoch) -> None:
        self.console.print(f"epoch {epoch.number}/{self.epochs}  {_figures(epoch)}")


class LiveBar(Progress):
    """A bar on stderr, for a terminal."""

    def __init__(self) -> None:
        self.bar = Bar(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

    @contextmanager
    def of(self, epochs: int, steps: int) -> Iterator[None]:
        self.task = self.bar.add_task("training", total=epochs * steps, figures="")
        with self.bar:
            yield

    def step(self) -> None:
        self.bar.advance(self.task)

    def epoch(self, epoch: Epoch) -> None:
        self.bar.update(self.task, figures=_figures(epoch))


def _figures(epoch: Epoch) -> str:
    test = f"loss {epoch.test_loss:.4f}"
    if epoch.test_accuracy is not None:
        test = f"accuracy {epoch.test_accuracy:.4f}"
    return f"train loss {epoch.train_loss:.4f}  test {test}  {epoch.samples / epoch.seconds:,.0f} samples/s"


def progress_for(rank: int, is_terminal: bool) -> Progress:
    """The fitting one: only rank 0 speaks, and a bar is for terminals."""
    if rank != 0:
        return Progress()
    return LiveBar() if is_terminal else Lines()


def print_result(result: Mapping[str, Any]) -> None:
    """The final table on stdout."""
    table = Table("figure", "value", title="mpicoll.train")
    for name, value in result.items():
        shown = f"{value:,.4f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), shown[:16] if name.endswith("sha256") else shown)
    Console(highlight=False).print(table)


def check_writable(path: Path) -> None:
    """Raise `InputError` now if `write_json` could not write to ``path`` later."""
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(
            f"{path}: expected a file that can be written (--json), but: {error.strerror}"
        ) from error


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write ``result`` whole or not at all: to a temporary name beside ``path``, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            json.dump(result, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
