"""``mpirun -np N python -m mpicoll.bench.gpu_collectives``: collectives on GPU memory, by all our transports.

Beside them, in the same run, are the MPI library's own, NCCL, and gloo, as far as they work here. Contenders
take turns; every result is checked. How fast memory is copied is measured in the same run: see `gpu_limits`.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from mpi4py import MPI
from rich.console import Console
from rich.table import Table

from mpicoll import Communicator
from mpicoll.sizes import format_size

from .about import layout
from .contenders import GUARD, MAX_ITEMSIZE, Memory
from .data import Problem
from .gpu_arrays import Arrays, cupy_arrays, gpu_facts
from .gpu_contenders import OTHERS, OURS, THROUGH_HOST, field
from .gpu_limits import COPIED, PINNED, Limits, least_bytes, measure_limits
from .gpu_timing import Checked, Stock, measure
from .jobs import WRONG, about_job, agreed, main, parsed, refusing, say
from .kinds import DTYPES, KINDS, NO_OPERATION, NO_ROOT, OPERATIONS, count_of, sizes
from .options import as_size, json_option

PROGRAM = "python -m mpicoll.bench.gpu_collectives"
COLLECTIVES = tuple(name for name, kind in KINDS.items() if kind.ours)
SUMMED = OPERATIONS[:-1]  # an average is rounded, and results are compared bit by bit
ROOM = 6  # times the largest size: three buffers, input and result, and what comparing them takes
WIDTH = 200  # characters; tables are not to be broken into lines

Facts = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the command line says. Sizes are in bytes, ``limit`` in seconds."""

    collectives: tuple[str, ...]
    min: int
    max: int
    factor: int
    types: tuple[str, ...]
    ops: tuple[str, ...]
    transports: tuple[str, ...]
    compare: tuple[str, ...]
    turns: int
    limit: float
    copied: int
    json: Path | None


def _some(allowed: Sequence[str]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """A callback for some of these, with commas, or all."""

    def parse(ctx: click.Context, param: click.Parameter, text: str) -> tuple[str, ...]:
        names = tuple(allowed) if text == "all" else tuple(filter(None, map(str.strip, text.split(","))))
        for name in names:
            if name not in allowed:
                raise click.BadParameter(f"expected all or some of {', '.join(allowed)}; got {name!r}")
        return names

    return parse


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option(
    "--collectives",
    metavar="LIST",
    callback=_some(COLLECTIVES),
    default="allreduce,reduce_scatter,broadcast,allgather",
    help="By comma, or all.",
)
@click.option(
    "-b", "--min", metavar="SIZE", callback=as_size, default="4", help="The smallest size, in bytes."
)
@click.option("-e", "--max", metavar="SIZE", callback=as_size, default="1G", help="The largest size.")
@click.option("-f", "--factor", type=click.IntRange(min=2), default=4, help="From one size to the next.")
@click.option("-d", "--types", metavar="LIST", callback=_some(tuple(DTYPES)), default="float", help="Or all.")
@click.option("-o", "--ops", metavar="LIST", callback=_some(SUMMED), default="sum", help="Or all.")
@click.option("--transports", metavar="LIST", callback=_some(OURS), default="all", help="Ours.")
@click.option("--compare", metavar="LIST", callback=_some(OTHERS), default="", help="Others, or all.")
@click.option(
    "--turns",
    type=click.IntRange(min=0),
    default=5,
    help="Of each; the median counts. 0: only check.",
)
@click.option(
    "--limit",
    type=click.FloatRange(0, min_open=True),
    default=3600,
    help="Begin nothing after these seconds",
)
@click.option(
    "--copied",
    metavar="SIZE",
    callback=as_size,
    default=format_size(COPIED),
    help="Of a copy, for the limit.",
)
@json_option
def _command(**given: Any) -> Options:
    """Measure collectives on GPU memory, on all ranks that mpirun started.

    Ranks take the GPUs of their node in turn, and may share one. Times are in microseconds, of the slowest
    rank. Behind each is its share of the limit: what it would take to read every input once and write every
    output once, of all ranks, as fast as one process copies on the first rank's GPU; for staged and copied,
    as fast as it copies to pinned memory of the host and back.

    Others are native, the MPI library's own collectives, if it is CUDA-aware; copied, the same on copies in
    pinned memory of the host; nccl; and gloo, of PyTorch.

    \b
    Examples:
      mpirun -np 4 python -m mpicoll.bench.gpu_collectives --compare all --json gpu.json
      mpirun -np 3 python -m mpicoll.bench.gpu_collectives --collectives all -d all -o all -e 1M --turns 0
    """
    options = Options(**given)
    if options.min > options.max:
        raise click.UsageError(
            f"expected --min up to --max; got {format_size(options.min)} and {format_size(options.max)}"
        )
    return options


@refusing
def run(
    comm: Communicator,
    args: Sequence[str],
    prog_name: str = PROGRAM,
    make_arrays: Callable[[MPI.Intracomm], Arrays] = cupy_arrays,
) -> int:
    """The exit status, the same on every rank."""
    started = time.monotonic()
    options = agreed(comm, partial(parsed, comm, _command, Options, args, prog_name))
    if options is None:
        return 0
    arrays = make_arrays(comm)
    if arrays.note:
        say(comm, f"note: {arrays.note}")
    report = {**about_job(comm, prog_name, args, vars(options)), **_about_gpu(comm, arrays, options)}
    _measure(comm, arrays, options, report, started + options.limit)
    wrong = Counter[str]()
    for row in report["results"]:
        wrong[row["by"]] += row["nwrong"] + row["outside"]
    if comm.rank == 0:
        _publish(report, options)
    found = ", ".join(f"{count} of {name}" for name, count in wrong.items() if count)
    if found:
        say(comm, f"Error: wrong elements: {found}")
    return WRONG if found else 0


command = partial(main, run)


def _about_gpu(comm: Communicator, arrays: Arrays, options: Options) -> Facts:
    """What is measured on, and the limits. Nobody else works meanwhile."""
    gpus = comm.allgather(gpu_facts(arrays.device))
    limits = None
    if comm.rank == 0:
        limits = measure_limits(arrays.device, arrays.room(), options.copied, min(PINNED, options.copied))
    limits = comm.bcast(limits)
    nodes = comm.allgather(MPI.Get_processor_name())
    places = [(node, gpu["pci"]) for node, gpu in zip(nodes, gpus, strict=True)]
    return {
        "gpus": [gpu for i, gpu in enumerate(gpus) if places.index(places[i]) == i],
        "ranks_per_gpu": max(Counter(places).values()),
        "limits": limits._asdict(),
        "left_out": [],
        "results": [],
    }


def _measure(comm: Communicator, arrays: Arrays, options: Options, report: Facts, deadline: float) -> None:
    """Fill in the report's results, and who was left out. Collective."""
    left_out = report["left_out"]

    def leave_out(text: str) -> None:
        if text not in left_out:
            say(comm, f"left out: {text}")
            left_out.append(text)

    largest = _largest(comm, arrays, options, report["ranks_per_gpu"])
    if largest < max(_sizes(options)):
        leave_out(f"sizes above {format_size(largest)}: there is no more room on the GPU")
    memory, stock = Memory(arrays.empty, largest), Stock(arrays, largest + GUARD * MAX_ITEMSIZE)
    limits = Limits(**report["limits"])
    with field(comm, arrays, memory, options.transports, options.compare, report["ranks_per_gpu"]) as found:
        for reason in found.left_out:
            leave_out(reason)
        for problem in _problems(comm, options, largest):
            if comm.bcast(time.monotonic() > deadline):
                leave_out(f"{problem} and what comes after it: {options.limit:g} s are over")
                break
            say(comm, f"{problem}")
            checked = measure(comm, arrays, problem, found.contenders, stock, options.turns, leave_out)
            report["results"] += [_row(problem, each, limits) for each in checked]
            if comm.rank == 0 and options.json is not None:  # so that an interruption loses little
                options.json.write_text(layout(report))


def _largest(comm: Communicator, arrays: Arrays, options: Options, sharing: int) -> int:
    """Bytes of the largest buffer that all ranks have room for. `click.UsageError` if there is none."""
    room = comm.allreduce(arrays.room(), MPI.MIN) // (ROOM * sharing) - GUARD * MAX_ITEMSIZE
    largest = max((size for size in _sizes(options) if size <= room), default=0)
    if not largest:
        raise click.UsageError(
            f"--min {format_size(options.min)} needs {ROOM * sharing} times as much on the GPU; "
            f"{format_size(max(room, 0))} are free for each"
        )
    return largest


def _sizes(options: Options) -> list[int]:
    return list(sizes(options.min, options.max, options.factor, None))


def _problems(comm: Communicator, options: Options, largest: int) -> Iterator[Problem]:
    """Every collective, data type, operation and size; sizes that are rounded to the same come once."""
    for name, dtype, op in itertools.product(options.collectives, options.types, options.ops):
        kind = KINDS[name]
        if not kind.reduces and op != options.ops[0]:
            continue
        operation, root = op if kind.reduces else NO_OPERATION, 0 if kind.rooted else NO_ROOT
        itemsize = DTYPES[dtype].itemsize
        counts = [count_of(kind, size, itemsize, comm.size) for size in _sizes(options) if size <= largest]
        for count in dict.fromkeys(counts):
            yield Problem(name, comm.rank, comm.size, count, dtype, operation, root)


def _row(problem: Problem, checked: Checked, limits: Limits) -> Row:
    """Microseconds, 10^9 bytes per second, and the share of the limit."""
    row = {
        "collective": problem.collective,
        "size": problem.size,
        "count": problem.count,
        "type": problem.type,
        "redop": problem.redop,
        "by": checked.contender,
        "in_place": checked.in_place,
        "nwrong": checked.wrong,
        "outside": checked.outside,
    }
    if checked.seconds is None:
        return row
    bandwidth = problem.size / checked.seconds / 1e9
    limit = limits.of(through_host=checked.contender.startswith(THROUGH_HOST))
    return {
        **row,
        "time": checked.seconds * 1e6,
        "alg_bw": bandwidth,
        "bus_bw": bandwidth * problem.kind.factor(problem.nranks),
        "of_limit": least_bytes(problem) / checked.seconds / 1e9 / limit,
    }


def _publish(report: Facts, options: Options) -> None:
    console = Console(width=WIDTH, force_terminal=False)
    for gpu in report["gpus"]:
        click.echo(f"# {gpu['name']}, driver {gpu['driver']}")
    shared = f"{report['ranks']} ranks, up to {report['ranks_per_gpu']} on a GPU, {report['mpi']}"
    click.echo(f"# {shared}; copy {{copy:.0f}} GB/s, pinned {{pinned:.1f}} GB/s".format(**report["limits"]))
    rows = report["results"]
    for key in dict.fromkeys((row["collective"], row["type"], row["redop"]) for row in rows if "time" in row):
        console.print(_table(" ".join(key), [row for row in rows if _key(row) == key]))
    right = sum(row["nwrong"] + row["outside"] == 0 for row in rows)
    click.echo(f"# right: {right} of {len(rows)}")
    for text in report["left_out"]:
        click.echo(f"# left out: {text}")
    if options.json is not None:
        options.json.write_text(layout(report))


def _key(row: Row) -> tuple[str, str, str]:
    return row["collective"], row["type"], row["redop"]


def _table(title: str, rows: Sequence[Row]) -> Table:
    """A line for each size, a column for each contender: microseconds (share of the limit)."""
    names = dict.fromkeys(row["by"] for row in rows)
    table = Table(box=None, title=f"# {title}: µs (share of the limit)", title_justify="left")
    for heading in ("size", *names):
        table.add_column(heading, justify="right")
    cells = {(row["size"], row["by"]): f"{row['time']:.1f} ({row['of_limit']:.2f})" for row in rows}
    for size in dict.fromkeys(row["size"] for row in rows):
        table.add_row(format_size(size), *(cells.get((size, name), "-") for name in names))
    return table


if __name__ == "__main__":
    command(sys.argv[1:], PROGRAM)
