"""``mpirun -np N mpicoll tune``: measure which algorithms are the fastest here, and remember it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from mpi4py import MPI
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mpicoll import Communicator
from mpicoll.bench.about import layout
from mpicoll.bench.jobs import about_job, agreed, main, refusing
from mpicoll.bench.options import as_size
from mpicoll.files import replacing, why_unwritable
from mpicoll.sizes import format_size
from mpicoll.tune import calibrate, measure, search, table

LIMIT, QUICK_LIMIT = 90.0, 20.0  # seconds
WIDTH = 110  # characters; where ranks print, Rich knows no terminal


@dataclass(frozen=True)
class Options:
    """What the command line says; ``out`` is None where nothing is written."""

    collectives: tuple[str, ...]
    smallest: int
    largest: int
    limit: float
    calibrate: bool
    out: Path | None
    as_json: bool


@click.command("tune", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--collective",
    "collectives",
    multiple=True,
    type=click.Choice(list(measure.METHODS)),
    help="Only this one; may be given several times.",
)
@click.option("--min", "smallest", default="4", show_default=True, callback=as_size, help="Bytes.")
@click.option("--max", "largest", default="16M", show_default=True, callback=as_size, help="Bytes.")
@click.option("--quick", is_flag=True, help=f"Take {QUICK_LIMIT:g} s at most, not {LIMIT:g} s.")
@click.option("--calibrate", is_flag=True, help="Fit the machine of `mpicoll simulate` to this one instead.")
@click.option(
    "-o",
    "--output",
    "out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write there.  [default: what programs read; nothing for --calibrate]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all that was measured.")
def _command(
    collectives: tuple[str, ...],
    smallest: int,
    largest: int,
    quick: bool,
    calibrate: bool,
    out: Path | None,
    as_json: bool,
) -> Options:
    """Measure which algorithm is the fastest here for which size, and remember it.

    From then on "auto" chooses what was found, wherever as many ranks send messages on such a machine with
    the same MPI library: between nodes, in nonblocking calls, and with transport="messages". In the memory of
    a node there is nothing to choose. What is not clearly faster than the static choice is not kept.

    Programs read tuning.json in the user's cache directory, or what the environment variable MPICOLL_TUNING
    names; MPICOLL_TUNING=off stands for none. The file can be handed on: it says for which processors, MPI
    library and ranks it is. `mpicoll info` says which one is used.

    With --calibrate, algorithms are timed on 2, 3 and 4 of the ranks, and a machine for `mpicoll simulate
    --machine` is fitted to the times.

    \b
    Examples:
      mpirun -np 2 mpicoll tune --quick
      mpirun -np 4 mpicoll tune --collective allreduce --min 1K --max 4M
      mpirun -np 2 mpicoll tune --quick -o cluster.json
      mpirun -np 4 mpicoll tune --calibrate -o machine.toml
    """
    if smallest > largest:
        raise click.BadParameter(
            f"expected at most --max ({format_size(largest)}), got {format_size(smallest)}",
            param_hint="--min",
        )
    if calibrate:
        for name, option in {"collectives": "--collective", "smallest": "--min", "largest": "--max"}.items():
            if click.get_current_context().get_parameter_source(name) != ParameterSource.DEFAULT:
                raise click.BadParameter("expected none beside --calibrate", param_hint=option)
    limit = QUICK_LIMIT if quick else LIMIT
    return Options(collectives or tuple(measure.METHODS), smallest, largest, limit, calibrate, out, as_json)


def _parse(comm: Communicator, args: Sequence[str], prog_name: str) -> tuple[Options, Path | None] | None:
    """The options, and the file to write; None if only ``--help`` was wanted."""
    options = _command.main(list(args), prog_name, standalone_mode=False)
    if not isinstance(options, Options):
        return None
    if comm.size < 2:
        raise click.UsageError(
            f"expected 2 ranks or more, got {comm.size}: start it as `mpirun -np 2 mpicoll tune`"
        )
    return options, _checked_file(options) if comm.rank == 0 else options.out


def _checked_file(options: Options) -> Path | None:
    """The file to write, which can be; hours later would be late to say that it cannot."""
    path = options.out
    if path is None and not options.calibrate:
        path = table.file_of(os.environ)
        if path is None:
            raise click.UsageError(f"{table.VARIABLE}={table.OFF}: expected -o FILE beside it")
        _make_directory(path.parent)
    if path is None:
        return None
    if reason := why_unwritable(path):
        raise click.BadParameter(
            f"expected a file that can be written, got {path}: {reason}", param_hint="-o"
        )
    if not options.calibrate and path.exists():
        try:
            table.read(path)
        except (table.TableError, OSError) as error:
            raise click.BadParameter(f"{error}; remove it, or name another", param_hint="-o") from None
    return path


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"{directory}: {error.strerror}; name a file with -o") from None


def run(comm: Communicator, args: Sequence[str], prog_name: str = "mpicoll tune") -> int:
    """The exit status, the same on every rank."""
    return int(refusing(_run)(comm, args, prog_name))


def _run(comm: Communicator, args: Sequence[str], prog_name: str) -> int:
    parsed = agreed(comm, partial(_parse, comm, args, prog_name))
    if parsed is None:
        return 0
    options, path = parsed
    if options.calibrate:
        return _calibrate(comm, options, path, about_job(comm, prog_name, args, vars(options)))
    return _tune(comm, options, path)


def command(args: Sequence[str], prog_name: str) -> None:
    """Tune, on all ranks, and exit."""
    # A table that is not there yet, or is damaged, is this command's business.
    warnings.filterwarnings("ignore", ".*not used for tuning", RuntimeWarning)
    main(run, args, prog_name)


@contextmanager
def _progress(comm: Communicator, limit: float) -> Iterator[Callable[[int, int, str], None]]:
    """Rank 0's bar on stderr; a function that moves it."""
    if comm.rank:
        yield lambda done, total, what: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %")
    click.echo(f"this takes {limit:g} s at most", err=True)
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


# -- a table of tuning


def _tune(comm: Communicator, options: Options, path: Path | None) -> int:
    chosen = measure.cases(options.collectives, options.smallest, options.largest, comm.size)
    with _progress(comm, options.limit) as progress:
        found = measure.survey(comm, chosen, options.limit, progress)
    if comm.rank == 0:
        assert path is not None
        rules = tuple(search.rules(found.findings))
        table.write(path, table.Entry(found.place, found.measured, rules))
        _report(found, rules, path, options.as_json)
    MPI.Intracomm(comm).Barrier()  # or the launcher might end rank 0 before it has spoken
    return 0


def _report(found: measure.Survey, rules: Sequence[table.Rule], path: Path, as_json: bool) -> None:
    if as_json:
        result = {
            "place": asdict(found.place),
            "measured": found.measured,
            "seconds": found.seconds,
            "file": str(path),
            "rules": [asdict(rule) for rule in rules],
            "findings": [finding.as_dict() for finding in found.findings],
            "left_out": [asdict(case) for case in found.left_out],
        }
        click.echo(json.dumps(result, indent=2))
        return
    _print_findings(found)
    if found.left_out:
        names = ", ".join(f"{case.collective} {format_size(case.size)}" for case in found.left_out)
        click.echo(f"no time was left for: {names}")
    if not found.place.network:
        click.echo("all ranks are on one node: this is for nonblocking calls and transport='messages'")
    click.echo(f"{path}: {len(rules)} rules for {found.place.ranks} ranks, after {found.seconds:.0f} s")


def _print_findings(found: measure.Survey) -> None:
    shown = Table(title=f"{found.place.ranks} ranks, {found.place.mpi}", caption="*: kept")
    columns = {"collective": "left", "size": "right", "default": "left", "µs": "right"}
    for heading, justify in (*columns.items(), ("best", "left"), ("µs", "right"), ("gain", "right")):
        shown.add_column(heading, no_wrap=True, justify=justify)  # type: ignore[arg-type]
    for each in sorted(found.findings, key=lambda each: (each.case.collective, each.case.size)):
        better = each.best != each.default
        shown.add_row(
            each.case.collective,
            format_size(each.case.size),
            str(each.default),
            f"{each.default_seconds * 1e6:,.1f}",
            *((str(each.best), f"{each.best_seconds * 1e6:,.1f}") if better else ("", "")),
            f"{each.gain:.0%}{'*' if each.pays else ' '}" if better else "",
        )
    Console(width=WIDTH, force_terminal=False).print(shown)


# -- a machine for the simulator


def _calibrate(comm: Communicator, options: Options, path: Path | None, about: dict[str, Any]) -> int:
    try:
        levels = calibrate.level_name(comm)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    counts = calibrate.rank_counts(comm)
    if not counts:
        raise click.UsageError("--calibrate: expected a core for each of 2 ranks at least, got one core")
    if comm.rank == 0 and counts[-1] < min(comm.size, calibrate.RANKS[-1]):
        click.echo(f"measured with {counts[-1]} ranks at most: more would share cores", err=True)
    with _progress(comm, options.limit) as progress:
        rows = calibrate.measure_rows(comm, counts, options.limit, progress)
    if comm.rank == 0:
        fitted = calibrate.fit(rows)
        text = calibrate.to_toml(fitted, levels, comm.size)
        if path is not None:
            with replacing(path) as temporary:
                temporary.write_text(text, "utf-8")
        _report_fit(fitted, rows, text, path, about if options.as_json else None)
    MPI.Intracomm(comm).Barrier()
    return 0


def _report_fit(
    fitted: calibrate.Fit,
    rows: Sequence[calibrate.Row],
    text: str,
    path: Path | None,
    about: dict[str, Any] | None,
) -> None:
    """As a table, or as JSON that begins with what it is ``about``."""
    errors = fitted.errors
    if about is not None:
        result: dict[str, Any] = {
            **about,
            "machine": asdict(fitted.parameters),
            "file": None if path is None else str(path),
            "median_error": fitted.median_error,
            "worst_error": fitted.worst_error,
            "within_20_percent": fitted.share_within(0.2),
            "measurements": [
                {**asdict(row), "predicted_seconds": row.seconds * (1 + error), "error": error}
                for row, error in zip(rows, errors, strict=True)
            ],
        }
        click.echo(layout(result))
        return
    shown = Table(title="predicted beside measured", caption="error: (predicted - measured) / measured")
    for heading in ("collective", "algorithm", "ranks", "size", "measured µs", "predicted µs", "error"):
        shown.add_column(heading, no_wrap=True, justify="left" if heading[0] in "ca" else "right")
    for row, error in zip(rows, errors, strict=True):
        times = (f"{seconds * 1e6:,.1f}" for seconds in (row.seconds, row.seconds * (1 + error)))
        cells = row.collective, row.algorithm, str(row.ranks), format_size(row.nbytes)
        shown.add_row(*cells, *times, f"{error:+.0%}")
    Console(width=WIDTH, force_terminal=False).print(shown)
    within = fitted.share_within(0.2)
    click.echo(
        f"error: median {fitted.median_error:.0%}, worst {fitted.worst_error:.0%}, "
        f"{within:.0%} of {len(rows)} within 20 %"
    )
    click.echo(text if path is None else f"{path}: for `mpicoll simulate --machine {path}`")
