"""``mpirun -np N mpicoll bench gradients``: many gradients together, and what a backward pass hides of it.

Contenders take turns: one step of each, again and again, on freshly filled gradients. "memcpy" is the limit:
all ranks copying as many bytes within their own memory at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any

import click
import numpy as np
from mpi4py import MPI
from rich.console import Console
from rich.table import Table

from mpicoll import Communicator
from mpicoll.transports import arena

from .gradient_contenders import PACKED, PER_TENSOR, ROOM, VIEWS, Contender, Setup, contenders, memcpy, views
from .jobs import WRONG, about_job, agreed, main, parsed, refusing, say
from .models import MODELS, check_room, nbytes
from .options import json_option
from .overlap import Hidden, measure_overlap, take_turns

WIDTH = 160  # characters; tables are not to be broken into lines

Facts = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    model: str
    repeat: int
    bucket_mb: float | None
    json: Path | None

    @property
    def bucket_bytes(self) -> int | None:
        return None if self.bucket_mb is None else max(1, round(self.bucket_mb * (1 << 20)))


@click.command("gradients", context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--model", type=click.Choice(list(MODELS)), default="resnet50", help="Whose gradients.")
@click.option("--repeat", type=click.IntRange(min=1), default=11, help="Steps of each; the median counts.")
@click.option(
    "--bucket-mb",
    type=click.FloatRange(min=0, min_open=True),
    help="MiB of a bucket of GradientSync.  [default: measured]",
)
@json_option
def _command(**given: Any) -> Options:
    """Sum a model's gradients over all ranks that mpirun started: tensor by tensor, packed, in buckets.

    Times are in milliseconds, of the slowest rank; GB/s are bytes of gradients per second. "sent" is what a
    rank sends in a step if it sends no more than it must; of the MPI library it is not known.

    The second table shows how much of GradientSync's time disappears behind a backward pass that takes as
    long: one on a device, while the rank sleeps, and two for which the rank computes.

    \b
    Examples:
      mpirun -np 2 mpicoll bench gradients
      mpirun -np 2 mpicoll bench gradients --model gpt2 --bucket-mb 16 --json gradients.json
    """
    return Options(**given)


@refusing
def run(comm: Communicator, args: Sequence[str], prog_name: str = "mpicoll bench gradients") -> int:
    """The exit status, the same on every rank."""
    options = agreed(comm, partial(parsed, comm, _command, Options, args, prog_name))
    if options is None:
        return 0
    report = {**about_job(comm, prog_name, args, vars(options)), **_measure(comm, options)}
    wrong = {row["name"]: row["nwrong"] for row in report["contenders"] if row["nwrong"]}
    if comm.rank == 0:
        _publish(report, options.json)
    if wrong:
        say(comm, f"Error: wrong elements: {', '.join(f'{n} of {name}' for name, n in wrong.items())}")
    return WRONG if wrong else 0


command = partial(main, run)


def _check_room(comm: Communicator, model: str) -> None:
    """Whether there is memory for all ranks of a node."""
    node = MPI.Intracomm(comm).Split_type(MPI.COMM_TYPE_SHARED)
    needed = node.size * ROOM * nbytes(MODELS[model])
    what = f"--model {model} with {node.size} ranks on a node"
    node.Free()
    agreed(comm, lambda: check_room(what, needed, arena.available_memory()))


def _measure(comm: Communicator, options: Options) -> Facts:
    shapes = MODELS[options.model]
    _check_room(comm, options.model)
    say(comm, f"{options.model}: setting up {len(shapes)} gradients")
    setup = Setup(comm, shapes, options.bucket_bytes)
    found = list(contenders(setup))
    rows = [_checked(setup, contender) for contender in found]
    say(comm, f"measuring: {options.repeat} steps of {len(found)} contenders")
    steps = [(contender, contender.run) for contender in [*found, memcpy(setup)]]
    *seconds, copying = take_turns(setup.native, steps, options.repeat)
    for row, each in zip(rows, seconds, strict=True):
        row |= {"time": each * 1e6, "alg_bw": setup.nbytes / each / 1e9}
    say(comm, f"measuring: {options.repeat} backward passes of each kind")
    place = [contender.name for contender in found].index(VIEWS)
    overlap = _overlap(setup, found[place], seconds[place], options.repeat)
    for contender in found:
        if contender.sync is not None:
            contender.sync.close()
    return {
        "model": options.model,
        "gradients": len(shapes),
        "size": setup.nbytes,
        "contenders": rows,
        "memcpy": {"size": setup.nbytes, "time": copying * 1e6},
        "overlap": overlap,
    }


def _checked(setup: Setup, contender: Contender) -> Facts:
    """A contender's first step; what is known of it then, on all ranks together."""
    contender.fill()
    contender.run()
    wrong = setup.native.allreduce(contender.count_wrong())
    return {"name": contender.name, "nwrong": wrong, "sent": contender.sent}


def _overlap(setup: Setup, overlapping: Contender, alone: float, repeat: int) -> list[Facts]:
    """``alone``: seconds of a step without a backward pass, which the passes take as long as."""
    waiting = views(setup, overlap=False)
    shares = np.array(setup.counts) / setup.total
    found = measure_overlap(setup.native, overlapping, waiting, shares, alone, repeat)
    assert waiting.sync is not None
    waiting.sync.close()
    return [_overlap_row(passes) for passes in found]


def _overlap_row(passes: Hidden) -> Facts:
    return {
        "backward": passes.name,
        "sync_time": passes.sync * 1e6,
        "time": passes.alone * 1e6,
        "overlap": {"time": passes.overlapped * 1e6, "hidden": passes.hidden(passes.overlapped)},
        "no_overlap": {"time": passes.afterwards * 1e6, "hidden": passes.hidden(passes.afterwards)},
    }


def _publish(report: Facts, file: Path | None) -> None:
    # Open MPI gives ranks a terminal, also where what they say goes to a file.
    console = Console(width=WIDTH, force_terminal=False)
    console.print(_contenders_table(report), "", _overlap_table(report), sep="\n")
    if file is not None:
        file.write_text(dumps(report, indent=1) + "\n")


def _contenders_table(report: Facts) -> Table:
    """A line for each contender; memcpy's last."""
    ranks = f"{report['ranks']} rank{'s' * (report['ranks'] != 1)}"
    size = f"{report['gradients']} gradients, {report['size'] / 1e6:.1f} MB"
    table = _table(f"{report['model']}: {size}, {ranks}, {report['mpi']}", "who sums")
    for title in ("ms", "GB/s", f"× {PER_TENSOR}", f"× {PACKED}", "MB sent"):
        table.add_column(title, justify="right")
    times = {row["name"]: row["time"] for row in report["contenders"]}
    for row in report["contenders"]:
        ratios = [f"{times[peer] / row['time']:.2f}" for peer in (PER_TENSOR, PACKED)]
        sent = "-" if row["sent"] is None else f"{row['sent'] / 1e6:.2f}"
        table.add_row(row["name"], _milliseconds(row), f"{row['alg_bw']:.2f}", *ratios, sent)
    copy = report["memcpy"]
    table.add_row("memcpy", _milliseconds(copy), f"{copy['size'] / copy['time'] / 1e3:.2f}")
    return table


def _overlap_table(report: Facts) -> Table:
    alone = report["overlap"][0]["sync_time"] / 1000
    table = _table(f"{VIEWS} ({alone:.3f} ms), behind a backward pass", "backward pass")
    for title in ("ms", "with overlap ms", "hidden", "without ms", "hidden"):
        table.add_column(title, justify="right")
    for row in report["overlap"]:
        cells = [cell for how in ("overlap", "no_overlap") for cell in _total_and_hidden(row[how])]
        table.add_row(row["backward"], _milliseconds(row), *cells)
    return table


def _table(title: str, first: str) -> Table:
    table = Table(box=None, title=f"# {title}", title_justify="left")
    table.add_column(first)
    return table


def _total_and_hidden(figures: Facts) -> tuple[str, str]:
    return _milliseconds(figures), f"{min(max(figures['hidden'], 0), 1):.0%}"


def _milliseconds(row: Facts) -> str:
    return f"{row['time'] / 1000:.3f}"
