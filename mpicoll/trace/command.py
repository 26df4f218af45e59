"""`mpicoll trace FILE`: sum up what `record` or ``train.py --trace`` has written. Needs no MPI."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import click

from mpicoll.files import replacing, why_unwritable
from mpicoll.trace.chrome import TraceError, read
from mpicoll.trace.page import html
from mpicoll.trace.summary import Summary, summarise


def _check_out(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and (reason := why_unwritable(path)):
        raise click.BadParameter(f"{path}: expected a file that can be written, but: {reason}")
    return path


@click.command("trace", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument(
    "files",
    metavar="FILE.json...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--html",
    "out",
    metavar="FILE.html",
    type=click.Path(path_type=Path),
    callback=_check_out,
    help="Write a page with the timeline and the tables; it needs no network.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(files: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Sum up a trace: time per phase, overlap, stragglers, bytes.

    FILE.json is what `train.py --trace FILE.json` or mpicoll.trace.record has written; several are the parts
    that ranks have left where a job broke off. Perfetto (ui.perfetto.dev) opens it, too.

    \b
    Example:
      mpirun -np 2 python train.py --epochs 2 --trace trace.json
      mpicoll trace trace.json --html trace.html
    """
    try:
        trace = read(files)
    except (TraceError, OSError) as error:
        raise click.BadParameter(str(error), param_hint="FILE.json") from None
    summary = summarise(trace)
    if out is not None:
        with replacing(out) as temporary:
            temporary.write_text(html(trace, summary, files[0].name))
    if as_json:
        click.echo(json.dumps(summary.as_dict(), indent=2))
    else:
        _print(summary)


SHOWN_RANKS = 6  # columns that fit beside each other


def _print(summary: Summary) -> None:
    """Tables in the terminal, times in milliseconds."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)

    def show(title: str, heads: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title, title_justify="left")
        for i, head in enumerate(heads):
            table.add_column(head, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)

    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:,.2f}"

    console.print(f"{summary.nranks} ranks, {ms(summary.seconds)} ms, {summary.nevents:,} events")
    _show_phases(summary, show, ms)
    overlap = [[str(o.rank), ms(o.communication), ms(o.hidden), f"{o.share:.0%}"] for o in summary.overlap]
    show("overlap", ["rank", "ms of collectives", "hidden behind compute", "share"], overlap)
    late = [
        [str(s.rank), str(s.collectives), str(s.last), ms(s.total), ms(s.most)] for s in summary.stragglers
    ]
    show("stragglers", ["rank", "collectives", "came last", "ms others waited", "at most"], late)
    traffic = [
        [
            " ".join(filter(None, [t.name, t.op, t.dtype])),
            t.algorithm,
            f"{t.calls:,}",
            f"{t.bytes:,}",
            ms(t.seconds),
            f"{t.bandwidth / 1e9:.3f}",
        ]
        for t in summary.traffic
    ]
    show("collectives", ["", "algorithm", "calls", "bytes", "ms", "GB/s"], traffic)
    for note in summary.notes:
        console.print(f"note: {note}")


def _show_phases(summary: Summary, show: Callable[..., None], ms: Callable[[float], str]) -> None:
    """Each rank's time in each phase; of many ranks the mean, the least and the most."""
    names = list(dict.fromkeys(name for own in summary.phases.values() for name in own))
    heads = [f"rank {rank}" for rank in summary.phases]
    times = {name: [own.get(name, 0.0) for own in summary.phases.values()] for name in names}
    if len(heads) > SHOWN_RANKS:
        heads = ["mean", "least", "most"]
        times = {name: [mean(own), min(own), max(own)] for name, own in times.items()}
    show("ms per phase", ["", *heads], [[name, *map(ms, own)] for name, own in times.items()])
