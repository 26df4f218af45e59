"""Training on GPUs beside one process on the CPU: the same parameters, how fast, and how much is waiting.

Every job is what a user starts, `mpirun -np N python train.py`, twice: in float64, whose parameters at the
end must be those of the CPU, but for rounding, and with a larger model in float32, for the figures.

\b
Examples:
  python -m mpicoll.bench.gpu_training --ranks 1,2,4 --json training.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from mpicoll.cli import parse_ranks
from mpicoll.info import visible_gpus
from mpicoll.train.checkpoint import newest

from .about import write_report
from .gpu_arrays import driver_version
from .jobs import WRONG
from .options import check_writable, found_launcher, json_option
from .training import run_limited

MODULE = "mpicoll.bench.gpu_training"
SAME = ["--precision", "f64", "--epochs", "2", "--batch-size", "48"]
FAST = ["--hidden", "1024,1024", "--epochs", "3", "--batch-size", "256"]
# Of the largest difference between parameters, which are of the order of one: rounding stays a thousand times
# below that in so few steps, and a gradient that lacks a sample is a thousand times above.
BOUND = 1e-7
CPU, CUDA = "cpu", "cuda"
LIMIT = 120.0  # seconds for a job
WIDTH = 120

Tensors = Mapping[str, npt.NDArray[Any]]
Row = dict[str, Any]


class JobError(Exception):
    """A job failed; the message says how."""


def train(device: str, ranks: int, *arguments: str) -> Row:
    """What ``train.py`` says at the end. Raises `JobError`."""
    with tempfile.TemporaryDirectory(prefix="mpicoll-gpu-") as directory:
        result = Path(directory) / "result.json"
        launch = [sys.executable, "-m", "mpicoll.launch", "-np", str(ranks)]
        program = [sys.executable, "-m", "mpicoll.train", "--device", device, "--json", str(result)]
        failure = run_limited([*launch, *program, *arguments], LIMIT)
        if failure or not result.exists():
            raise JobError(f"{device}, {ranks} ranks: {failure or 'no result'}")
        found: Row = json.loads(result.read_text())
        return found


def train_and_keep(device: str, ranks: int, *arguments: str) -> tuple[Row, Tensors]:
    """`train`, and the parameters at the end."""
    with tempfile.TemporaryDirectory(prefix="mpicoll-gpu-") as directory:
        result = train(device, ranks, *arguments, "--checkpoint", directory)
        kept = newest(Path(directory))
    if kept is None:
        raise JobError(f"{device}, {ranks} ranks: no checkpoint")
    # Beside the parameters are vectors of the optimizer, whose names say so.
    return result, {name: array for name, array in kept[0].arrays.items() if "/" not in name}


def difference(found: Tensors, wanted: Tensors) -> float:
    """The largest of a parameter; NaN where any is no number, infinite where not all are there."""
    if found.keys() != wanted.keys():
        return float("inf")
    return float(np.max([np.abs(found[name] - wanted[name]).max() for name in wanted]))


def measure(device: str, ranks: Sequence[int]) -> Iterator[Row]:
    """A row for one process on the CPU, and for each number of ranks on ``device``. Raises `JobError`."""
    reference: Tensors = {}
    for where, nranks in [(CPU, 1), *((device, n) for n in ranks)]:
        click.echo(f"training: {where}, {nranks} ranks", err=True)
        same, parameters = train_and_keep(where, nranks, *SAME)
        fast = train(where, nranks, *FAST)
        reference = reference or parameters
        yield {
            "device": where,
            "ranks": nranks,
            "difference": difference(parameters, reference),
            "accuracy": same["test_accuracy"],
            "samples_per_second": fast["samples_per_second"],
            "communication": fast["communication"],
        }


def table(rows: Sequence[Row]) -> Table:
    """A line for each job; the difference is from the first one's parameters."""
    found = Table(box=None)
    for heading in ("device", "ranks", "difference", "accuracy", "samples/s", "communicating"):
        found.add_column(heading, justify="right")
    for row in rows:
        share = row["communication"]
        found.add_row(
            row["device"],
            str(row["ranks"]),
            f"{row['difference']:.1e}",
            f"{row['accuracy']:.3f}",
            f"{row['samples_per_second']:,.0f}",
            "-" if share is None else f"{share:.0%}",
        )
    return found


@click.command(help=__doc__, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--ranks", metavar="LIST", default="1,2,4", help="On the GPUs.")
@click.option(
    "--device", type=click.Choice([CPU, CUDA]), default=CUDA, help="Held against one process on cpu."
)
@json_option
@click.pass_context
def main(ctx: click.Context, ranks: str, device: str, json: Path | None) -> None:
    try:
        numbers = parse_ranks(ranks)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--ranks") from None
    if json is not None:
        check_writable("--json", json)
    found_launcher()
    rows: list[Row] = []
    facts = {"gpus": visible_gpus()[0], "driver": driver_version(), "bound": BOUND, "rows": rows}
    try:
        for row in measure(device, numbers):
            rows.append(row)
            if json is not None:  # so that a job that fails takes nothing away from those before it
                write_report(json, MODULE, {"ranks": ranks, "device": device}, facts)
    except JobError as error:
        raise click.ClickException(str(error)) from None
    Console(width=WIDTH, force_terminal=False).print(table(rows))
    others = [row for row in rows if not row["difference"] <= BOUND]
    for row in others:
        click.echo(
            f"Error: {row['device']}, {row['ranks']} ranks: expected parameters within {BOUND:g}, "
            f"got a difference of {row['difference']:g}",
            err=True,
        )
    if others:
        ctx.exit(WRONG)


if __name__ == "__main__":
    main()
