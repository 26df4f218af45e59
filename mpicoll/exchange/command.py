"""`mpicoll export`: an algorithm's schedule as a file for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mpicoll import exchange
from mpicoll.exchange import goal, msccl
from mpicoll.files import replacing
from mpicoll.schedule import Schedule, run_lengths
from mpicoll.schedule_options import check_output, chosen_schedule, named_options, schedule_options
from mpicoll.sizes import format_size, parse_size

MOST_RANKS = 10_000
MOST_TRANSFERS = 1 << 21  # a file of some 0.5 GB, and ten times as much memory to write it


def _size_option(ctx: click.Context, param: click.Parameter, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error).removeprefix("size: ")) from None


@click.command("export", context_settings={"help_option_names": ["-h", "--help"]})
@schedule_options
@click.option("--to", "format", type=click.Choice(exchange.FORMATS), required=True, help="Kind of file.")
@click.option(
    "--size",
    metavar="SIZE",
    callback=_size_option,
    default=format_size(goal.SIZE),
    show_default=True,
    help="Bytes of data, all chunks together, such as 64K; for goal.",
)
@click.option(
    "--gamma",
    metavar="NS",
    type=click.FloatRange(0, 1e9),
    default=goal.GAMMA,
    show_default=True,
    help="Nanoseconds to reduce a byte; for goal.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=check_output,
    help="Default: print it.",
)
def command(format: str, size: int, gamma: float, output: Path | None, **chosen: Any) -> None:
    """Write an algorithm's schedule for other tools: MSCCL's XML, or GOAL of LogGOPSim.

    COLLECTIVE is one of allreduce, reduce_scatter, allgather, broadcast, reduce, gather, scatter, alltoall,
    barrier. mpicoll verify --file FILE proves what is in such a file, also in one by others.

    \b
    Examples:
      mpicoll export allreduce --algorithm ring --ranks 8 --to msccl -o ring.xml
      mpicoll verify --file ring.xml
      mpicoll export broadcast --algorithm chain --ranks 4 --chunks 8 --root 1 --to goal --size 64M
      mpicoll export allreduce --algorithm hierarchical --nodes 4,4 --across ring --to goal
    """
    _check_goal_options(format)
    schedule = chosen_schedule("export", MOST_RANKS, "", **chosen)
    _check_transfers(schedule)
    with named_options(chosen["nodes"]):
        text = exchange.dumps(schedule, format, size=size, gamma=gamma)
    for excess in msccl.beyond_limits(text) if format == "msccl" else ():
        click.echo(f"Note: MSCCL's interpreter does not take {excess}; other tools may", err=True)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        with replacing(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.BadParameter(f"{output}: {error.strerror}", param_hint="--output") from None


def _check_transfers(schedule: Schedule) -> None:
    """Whether all transfers fit in memory, in which the file is made."""
    transfers, first = 0, 0
    for length in run_lengths(schedule):
        transfers += length * len(schedule.make_round(first))
        first += length
    if transfers > MOST_TRANSFERS:
        expected = f"at most {MOST_TRANSFERS:,} transfers to export"
        raise click.UsageError(
            f"expected {expected}, got {schedule.name} with {transfers:,} on {schedule.nranks:,} ranks"
        )


def _check_goal_options(format: str) -> None:
    context = click.get_current_context()
    for name in ("size", "gamma"):
        if format != "goal" and context.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise click.BadParameter(
                f"expected only with --to goal, got --to {format}", param_hint=f"--{name}"
            )
