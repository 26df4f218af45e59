"""`mpicoll draw`: shows a schedule as text, as a picture, or as a page on which one steps through it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click

from mpicoll.draw.figure import SUFFIXES, picture
from mpicoll.draw.story import tell
from mpicoll.draw.table import WIDTH, text
from mpicoll.draw.webpage import ELSEWHERE, MOST_RANKS, as_data, page
from mpicoll.files import replacing
from mpicoll.schedule import Schedule
from mpicoll.schedule_options import chosen_schedule, named_options, schedule_options

ALLOWED = (*SUFFIXES, ".html")


def _output_option(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    if path is None:
        return None
    if path.suffix.lower() not in ALLOWED:
        raise click.BadParameter(f"expected a name that ends in {', '.join(ALLOWED)}; got {str(path)!r}")
    if not path.parent.is_dir():
        raise click.BadParameter(f"expected a file in a directory that is there, got {str(path)!r}")
    return path


@click.command("draw", context_settings={"help_option_names": ["-h", "--help"]})
@schedule_options
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_output_option,
    help="Write a picture (.svg, .png) or a page to step through (.html).",
)
@click.option("--json", "as_json", is_flag=True, help="Print what is drawn as JSON.")
def command(output: Path | None, as_json: bool, **chosen: Any) -> None:
    """Draw what an algorithm does: who sends which chunk in which round, and what every rank then holds.

    COLLECTIVE is one of allreduce, reduce_scatter, allgather, broadcast, reduce, gather, scatter, alltoall,
    barrier.

    Without --output: as text, up to 16 ranks. Pictures and pages show up to 32. A page needs no network: the
    arrow keys step through the rounds, and a click follows a chunk.

    \b
    Examples:
      mpicoll draw allreduce --algorithm ring --ranks 4
      mpicoll draw broadcast --algorithm chain --ranks 5 --root 2 --chunks 3 -o chain.svg
      mpicoll draw allreduce --algorithm hierarchical --nodes 2,3 -o nodes.html
    """
    if as_json and output is not None:
        raise click.BadParameter("expected no --output beside it", param_hint="--json")
    schedule = chosen_schedule("draw", MOST_RANKS, f"; {ELSEWHERE}", **chosen)
    with named_options(chosen["nodes"]):
        if as_json:
            click.echo(json.dumps(as_data(tell(schedule, MOST_RANKS, ELSEWHERE))))
        elif output is None:
            click.echo(text(schedule, shutil.get_terminal_size((WIDTH, 24)).columns))
        else:
            _write(schedule, output)


def _write(schedule: Schedule, output: Path) -> None:
    try:
        if output.suffix.lower() == ".html":
            with replacing(output) as temporary:
                temporary.write_text(page(schedule), encoding="utf-8")
        else:
            picture(schedule, output)
    except ModuleNotFoundError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise click.BadParameter(f"{error.strerror}: {str(output)!r}", param_hint="--output") from None
