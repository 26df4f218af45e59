"""Our collectives beside Open MPI's own, between hosts that one machine pretends to be, over real TCP.

Two peers, each in jobs of its own, where we take turns with it: Open MPI as it is ("tuned"), and with its
collectives for several nodes raised ("han"). The hosts are network namespaces (tests/hosts/rig.py, so this
works in a checkout only), and share the processors. Everything else is as in `mpicoll.bench.peers`, the
tables too.

\b
Examples:
  python -m mpicoll.bench.hosts --ranks 1,1 --ranks 2,2 --json hosts.json
  python -m mpicoll.bench.hosts --collectives broadcast --ranks 2,2 -e 1M
  python -m mpicoll.bench.hosts --from hosts.json --markdown
"""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import click

import mpicoll
from mpicoll.sizes import format_size, parse_size

from .options import read_results
from .peers import Peer, PeerError, Task, condense, noted, parse_collectives
from .peers_report import Job, Results, dumps, loads, show

LIMIT = 900.0  # seconds for one job; the longest take two minutes
RIG = Path(mpicoll.__file__).parent.parent / "tests" / "hosts" / "rig.py"

PEERS = (Peer("tuned", "openmpi"), Peer("han", "openmpi", {"coll_han_priority": "100"}))

FILE = click.Path(dir_okay=False, path_type=Path)


@dataclass(frozen=True)
class Shape:
    """How many ranks each host has."""

    ranks: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Shape:
        counts = text.split(",")
        if not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
            raise ValueError(f"expected the number of ranks on each host, such as 2,2; got {text!r}")
        return cls(tuple(map(int, counts)))

    def __str__(self) -> str:
        return ",".join(map(str, self.ranks))


def command(task: Task, shape: Shape, sizes: list[str], output: Path) -> list[str]:
    """What runs one job: ``mpicoll bench`` on the rig, with the peer's settings."""
    settings = [word for setting in task.peer.variables.items() for word in ("--mca", *setting)]
    bench = ["python", "-m", "mpicoll", "bench", task.collective, *sizes]
    chosen = ["--compare", "native", "--persistent", "--json", str(output)]
    return [sys.executable, str(RIG), "--ranks", str(shape), *settings, "--", *bench, *chosen]


def run(task: Task, shape: Shape, sizes: list[str]) -> tuple[Job, dict[str, object]]:
    """One job, and the machine that it ran on; `PeerError` says why there is none."""
    with tempfile.TemporaryDirectory(prefix="mpicoll-hosts-") as directory:
        output = Path(directory) / "result.json"
        line = command(task, shape, sizes, output)
        try:
            done = subprocess.run(
                line, timeout=LIMIT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except subprocess.TimeoutExpired:
            raise PeerError(f"not done after {LIMIT:g} s") from None
        if done.returncode or not output.exists():
            click.echo(f"+ {shlex.join(line)}\n{done.stdout[-2000:]}", err=True)
            raise PeerError(f"status {done.returncode}")
        found = json.loads(output.read_text())
    where = f"{task.collective} on {len(shape.ranks)} hosts ({shape})"
    return replace(condense(task, found), collective=where), found["machine"]


def measure(
    tasks: list[tuple[Task, Shape]], results: Results, sizes: list[str], file: Path | None
) -> Results:
    """``results`` and those of all tasks, written after each."""
    for number, (task, shape) in enumerate(tasks, 1):
        click.echo(f"job {number} of {len(tasks)}: {task}, {shape}", err=True)
        try:
            job, machine = run(task, shape, sizes)
            results = replace(results, machine=machine, jobs=[*results.jobs, job])
        except PeerError as error:
            results = noted(results, f"{task}, {shape}: left out: {error}")
        if file is not None:
            file.write_text(dumps(results))
    return results


def _shapes(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> list[Shape]:
    try:
        return [Shape.parse(text) for text in texts]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _collectives(ctx: click.Context, param: click.Parameter, text: str) -> list[str]:
    try:
        return parse_collectives(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _size(ctx: click.Context, param: click.Parameter, text: str) -> str:
    try:
        return format_size(parse_size(text))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--collectives", metavar="LIST", callback=_collectives, default="allreduce", help="By comma.")
@click.option(
    "--ranks",
    "shapes",
    metavar="N,N",
    callback=_shapes,
    multiple=True,
    default=("1,1", "2,2"),
    help="Ranks on each host. May be repeated.",
)
@click.option("-b", "begin", metavar="SIZE", callback=_size, default="1K", help="Smallest size, in bytes.")
@click.option("-e", "end", metavar="SIZE", callback=_size, default="64M", help="Largest size.")
@click.option("-f", "factor", type=click.IntRange(2), default=4, help="From one size to the next.")
@click.option("--turns", type=click.IntRange(1), default=5, help="Turns of each contender in a job.")
@click.option("--rounds", type=click.IntRange(1), default=1, help="How often all jobs are run.")
@click.option("--json", "json_file", metavar="FILE", type=FILE, help="Write all results here.")
@click.option("--from", "source", metavar="FILE", type=FILE, help="Show what --json wrote; measure nothing.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--plot", "picture", metavar="FILE", type=FILE, help="Draw the ratios, as PNG, PDF or SVG.")
def main(
    collectives: list[str],
    shapes: list[Shape],
    begin: str,
    end: str,
    factor: int,
    turns: int,
    rounds: int,
    json_file: Path | None,
    source: Path | None,
    markdown: bool,
    picture: Path | None,
) -> None:
    if source is not None:
        results = read_results(source, loads)
    elif not RIG.exists():
        raise click.ClickException(f"{RIG} is missing: the hosts are made by a file of a checkout")
    else:
        line = shlex.join(["python", "-m", "mpicoll.bench.hosts", *sys.argv[1:]])
        results = Results(line, date.today().isoformat(), machine={}, notes=[], jobs=[])
        planned = itertools.product(range(1, rounds + 1), collectives, shapes, PEERS)
        tasks = [(Task(n, name, sum(shape.ranks), peer), shape) for n, name, shape, peer in planned]
        sizes = ["-b", begin, "-e", end, "-f", str(factor), "--turns", str(turns)]
        results = measure(tasks, results, sizes, json_file)
    show(results, markdown, picture)


if __name__ == "__main__":
    main()
