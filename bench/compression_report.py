"""Accuracy beside bytes: from what `mpicoll.bench.compression` measured to tables and a picture. No MPI."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click
from rich.console import Console
from rich.table import Table

BASELINE = "float32"  # what all others are compared with
LAST_EPOCHS = 3  # whose mean accuracy counts: from one epoch to the next it goes up or down by a point
SHORTFALL = 0.01  # of accuracy: 1 point; float32 with other seeds differs by less
WIDTH = 130  # characters that a table needs
MISSING = "–"
HEADINGS = ("compression", "learning rate", "bytes per step", "times fewer", "accuracy %", "points")


@dataclass(frozen=True)
class Row:
    """One compression: ``sent`` are bytes that a rank sends per step.

    ``accuracies`` are fractions of the test set, one for each seed; None where the loss became no number.
    ``reason`` says why the learning rate is not float32's, or is empty.
    """

    compression: str
    learning_rate: float
    reason: str
    sent: float
    accuracies: list[float | None]

    @property
    def accuracy(self) -> float | None:
        """The mean over seeds; None if any seed has none."""
        known = [accuracy for accuracy in self.accuracies if accuracy is not None]
        return fmean(known) if len(known) == len(self.accuracies) else None

    @property
    def spread(self) -> float:
        """The standard deviation over seeds, of those that have an accuracy; 0 for fewer than two."""
        known = [accuracy for accuracy in self.accuracies if accuracy is not None]
        return stdev(known) if len(known) > 1 else 0.0


@dataclass(frozen=True)
class Outcome:
    """What one task was, and a row for each compression, float32 first."""

    task: str
    parameters: int
    train_samples: int
    test_samples: int
    batch_size: int
    epochs: int
    rows: list[Row]

    @property
    def baseline(self) -> Row:
        return next(row for row in self.rows if row.compression == BASELINE)


@dataclass(frozen=True)
class Results:
    """All that tables and picture need."""

    command: str
    date: str
    machine: dict[str, Any]
    mpi: str
    ranks: int
    seeds: list[int]
    outcomes: list[Outcome]


def dumps(results: Results) -> str:
    """As JSON."""
    return json.dumps(asdict(results), indent=1) + "\n"


def loads(text: str) -> Results:
    """The inverse of `dumps`; an exception of some kind for any other text."""
    content = json.loads(text)
    return Results(**{**content, "outcomes": [_outcome(fields) for fields in content["outcomes"]]})


def _outcome(fields: dict[str, Any]) -> Outcome:
    return Outcome(**{**fields, "rows": [Row(**row) for row in fields["rows"]]})


# --- tables ---


def table(outcome: Outcome) -> list[list[str]]:
    """Headings, and a line for each compression; "points" are those of accuracy above float32's."""
    return [list(HEADINGS), *(_cells(row, outcome.baseline) for row in outcome.rows)]


def _cells(row: Row, baseline: Row) -> list[str]:
    fewer = f"{baseline.sent / row.sent:,.1f}" if row.sent else MISSING  # one rank sends nothing
    about = [row.compression, f"{row.learning_rate:g}", f"{row.sent:,.0f}", fewer]
    if row.accuracy is None:
        return [*about, "diverged", MISSING]
    spread = f" ± {100 * row.spread:.1f}" if len(row.accuracies) > 1 else ""
    return [*about, f"{100 * row.accuracy:.1f}{spread}", _points(row.accuracy, baseline.accuracy)]


def _points(accuracy: float, expected: float | None) -> str:
    if expected is None:
        return MISSING
    return f"{round(100 * (accuracy - expected), 1) + 0.0:+.1f}"  # + 0.0: there is no -0.0


def heading(outcome: Outcome, ranks: int) -> str:
    """What stands above a task's table."""
    epochs = f"{outcome.epochs} epoch{'s' * (outcome.epochs != 1)} in batches of {outcome.batch_size}"
    sizes = f"{outcome.parameters:,} parameters, {outcome.train_samples:,} samples"
    return f"{outcome.task}: {sizes}, {epochs}, {ranks} rank{'s' * (ranks != 1)}"


def notes(outcome: Outcome) -> list[str]:
    """What stands below a task's table: where accuracy is lost, and why learning rates differ."""
    reasons: dict[str, list[str]] = {}
    for row in outcome.rows:
        if row.reason:
            reasons.setdefault(row.reason, []).append(row.compression)
    shorter = [f"learning rate of {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return [*_losses(outcome), *shorter]


def _losses(outcome: Outcome) -> list[str]:
    """A note on each compression that spoils training."""
    found = []
    expected = outcome.baseline.accuracy
    for row in outcome.rows:
        accuracy = row.accuracy
        if accuracy is None:
            failed = f"{row.accuracies.count(None)} of {len(row.accuracies)} runs"
            found.append(f"{row.compression}: DIVERGED, the loss became no number in {failed}")
        elif expected is not None and accuracy < expected - SHORTFALL:
            points = 100 * (expected - accuracy)
            found.append(f"{row.compression}: LESS ACCURATE, by {points:.1f} points, than {BASELINE}")
    return found


def legend(results: Results) -> list[str]:
    """What stands below all tables: how to read them, where and how they were measured."""
    seeds = ", ".join(map(str, results.seeds))
    machine = f"{results.machine['cpu']}, {results.machine['cores']} usable"
    return [
        f"accuracy: on test samples after each of the last {LAST_EPOCHS} epochs, mean ± standard deviation "
        f"over seeds {seeds}; points: those above {BASELINE}'s",
        "bytes: what a rank sends for gradients if no byte is sent twice; an allreduce of n bytes among p "
        "ranks counts 2 n (p-1)/p",
        f"{results.date}, {machine}, {results.mpi}: {results.command}",
    ]


def show(results: Results, markdown: bool) -> None:
    """Print all tables, with their notes, and the legend."""
    # Open MPI gives ranks a terminal, also where what they say goes to a file.
    console = Console(width=WIDTH, force_terminal=False)
    for outcome in results.outcomes:
        click.echo(f"\n{heading(outcome, results.ranks)}:\n")
        lines = table(outcome)
        if markdown:
            click.echo(as_markdown(lines))
        else:
            console.print(as_rich(lines))
        if below := notes(outcome):
            click.echo("\n" + "\n".join(f"- {note}" for note in below))
    click.echo("\n" + "\n".join(f"- {line}" for line in legend(results)))


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["--:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def as_rich(lines: Sequence[Sequence[str]]) -> Table:
    found = Table(box=None)
    for column, title in enumerate(lines[0]):
        found.add_column(title, justify="right" if column else "left")
    for line in lines[1:]:
        found.add_row(*line)
    return found


# --- the picture ---


def plot(results: Results, file: Path) -> None:
    """A panel for each task: accuracy over bytes, which are above 0 with two ranks or more."""
    from matplotlib.figure import Figure  # optional, and slow to import

    count = len(results.outcomes)
    figure = Figure(figsize=(7 * count, 5), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)
    for axes, outcome in zip(panels.flat, results.outcomes, strict=True):
        _panel(axes, outcome)
        axes.set_title(heading(outcome, results.ranks), fontsize="small")
    figure.savefig(file, dpi=120)


def _panel(axes: Any, outcome: Outcome) -> None:
    for family, rows in _families(outcome.rows).items():
        sent = [row.sent for row in rows]
        accuracies = [100 * (row.accuracy or 0) for row in rows]
        spreads = [100 * row.spread for row in rows]
        axes.errorbar(sent, accuracies, spreads, marker="o", markersize=4, capsize=3, label=family)
        for row, x, y in zip(rows, sent, accuracies, strict=True):
            setting = row.compression.partition(":")[2]
            axes.annotate(setting, (x, y), (4, 4), textcoords="offset points", fontsize="small")
    axes.set(xscale="log", xlabel="bytes that a rank sends per step", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Compressions that differ in a number only are a line; what diverged is left out."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.accuracy is not None:
            found.setdefault(row.compression.partition(":")[0], []).append(row)
    return found
