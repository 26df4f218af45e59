"""The command line of ``python -m mpicoll.bench.compression``. Needs no MPI."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .compression_report import loads, plot, show
from .options import json_option, read_results


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    epochs: int | None
    seeds: list[int]
    json: Path | None
    plot: Path | None
    markdown: bool
    source: Path | None


def _parse_seeds(ctx: click.Context, param: click.Parameter, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"expected whole numbers from 0, separated by commas; got {text!r}")
    return list(dict.fromkeys(map(int, parts)))


@click.command("compression", context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--epochs", type=click.IntRange(min=1), help="Of every task.  [default: 20 and 10]")
@click.option("--seeds", metavar="LIST", callback=_parse_seeds, default="0,1,2", help="Such as 0,1,2.")
@json_option
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw it, as PNG, PDF or SVG.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option(
    "--from",
    "source",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Show what --json wrote; train nothing. Needs no mpirun.",
)
@click.pass_context
def command(ctx: click.Context, /, **given: Any) -> Options | None:
    """Train with every compression of gradients, on all ranks that mpirun started.

    Two models: one for scikit-learn's digits, of 9,610 parameters, and one of 410,656 for a random teacher's
    classes. All runs of a task have the same steps. The tables show the accuracy on test samples and the
    bytes that a rank sends per step; below them stands which compressions train worse, and why some need
    another learning rate.

    \b
    Examples:
      mpirun -np 2 python -m mpicoll.bench.compression --json compression.json
      python -m mpicoll.bench.compression --from compression.json --markdown --plot compression.png
    """
    options = Options(**given)
    _check_options(ctx, options)
    if options.source is None:
        return options
    results = read_results(options.source, loads)
    check_plot(options, results.ranks)
    show(results, options.markdown)
    if options.plot is not None:
        plot(results, options.plot)
    return None


def _check_options(ctx: click.Context, options: Options) -> None:
    """What click does not check."""
    given = [name for name in ctx.params if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    surplus = [name for name in given if name not in ("source", "markdown", "plot")]
    if options.source is not None and surplus:
        raise click.UsageError(f"--from trains nothing: expected no --{' and no --'.join(surplus)}")


def check_plot(options: Options, ranks: int) -> None:
    """Raise `click.UsageError` if there can be no picture, before the minutes of training."""
    if options.plot is not None and ranks == 1:
        raise click.UsageError("--plot draws accuracy over bytes sent, and one rank sends none: start more")
    if options.plot is not None and find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib: pip install 'mpicoll[plots]'")
