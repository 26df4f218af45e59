"""Our collectives beside the best that other libraries offer.

Makes a virtual environment for each MPI wheel, the first time, and runs `mpicoll bench` there, with the
library set up for its best. Prints a table for each collective and number of ranks: at each size the peer
that is fastest there, and our times in that peer's own jobs, where we took turns with it. Times are
microseconds of calls that are not in place, medians over the rounds; a ratio says how many times faster than
the peer we are.

What could not be measured is named below the tables. pip's own settings apply: for a torch without CUDA, say
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.

\b
Examples:
  python -m mpicoll.bench.peers --ranks 2,4 --json peers.json
  python -m mpicoll.bench.peers --from peers.json --markdown --plot peers.png
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click
import platformdirs
from click.core import ParameterSource

import mpicoll
from mpicoll.cli import parse_ranks
from mpicoll.sizes import format_size, parse_size

from .kinds import DTYPES, KINDS
from .options import read_results
from .peers_report import OURS, Job, Results, dumps, loads, show

LIMIT = 3600.0  # seconds for one job: an end to one that hangs; the longest take minutes
DYING = 10.0  # seconds that a launcher gets to end its ranks
LAST_LINES = 15  # of what a failed command said: the error, above what a launcher says about it

FUNNELED = {"MPI4PY_RC_THREAD_LEVEL": "funneled"}

T = TypeVar("T")


class PeerError(Exception):
    """A peer cannot be installed or measured; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A library, and how to set it up for its best: ``variables`` go to its launcher and to all ranks."""

    name: str
    wheel: str  # on PyPI; also the name of the environment
    variables: dict[str, str] = field(default_factory=dict)
    contender: str = "native"  # what `mpicoll bench` calls it
    packages: tuple[str, ...] = ()  # that it needs besides the wheel

    @property
    def settings(self) -> list[str]:
        return [f"{name}={value}" for name, value in self.variables.items()]


# Options of Open MPI's mpirun are given as variables, too: `--mca NAME VALUE` is OMPI_MCA_NAME=VALUE.
PEERS = (
    Peer("openmpi", "openmpi"),
    # Open MPI has collectives in shared memory, at priority 0: never chosen.
    Peer("openmpi-sm", "openmpi", {"OMPI_MCA_coll_sm_priority": "100"}),
    # Open MPI uses UCX on certain networks only, unless told that any transport and device will do.
    Peer(
        "openmpi-ucx",
        "openmpi",
        {"OMPI_MCA_pml": "ucx", "OMPI_MCA_pml_ucx_tls": "any", "OMPI_MCA_pml_ucx_devices": "any"},
    ),
    # MPICH's collectives in shared memory are off under MPI_THREAD_MULTIPLE.
    Peer("mpich", "mpich", FUNNELED),
    Peer("impi", "impi-rt", {"I_MPI_FABRICS": "shm", **FUNNELED}),
    Peer("gloo", "openmpi", contender="gloo", packages=("torch",)),
)


@dataclass(frozen=True)
class Task:
    """One run of ``mpicoll bench``."""

    round: int
    collective: str
    ranks: int
    peer: Peer

    def __str__(self) -> str:
        return f"{self.peer.name}, {self.collective} on {self.ranks} ranks, round {self.round}"


# --- environments ---


def prepare(peer: Peer, directory: Path) -> Path:
    """The Python of the peer's environment; what the environment lacks is installed."""
    environment = directory / peer.wheel
    python = environment / "bin" / "python"
    for package in (peer.wheel, *peer.packages):
        requirements = [*_ourselves(), package]
        marker = environment / f"ready-{package}"
        if marker.exists() and marker.read_text() == shlex.join(requirements):
            continue
        click.echo(f"installing {package} into {environment}", err=True)
        if not python.exists():
            _install(package, [sys.executable, "-m", "venv", str(environment)])
        _install(package, [str(python), "-m", "pip", "install", "--quiet", *requirements])
        marker.write_text(shlex.join(requirements))
    return python


def _ourselves() -> list[str]:
    """What pip is to install for an environment to have the mpicoll that runs here."""
    root = Path(mpicoll.__file__).parent.parent
    if (root / "pyproject.toml").exists():
        return ["--editable", str(root)]
    return [f"mpicoll=={version('mpicoll')}"]


def _install(package: str, line: Sequence[str]) -> None:
    try:
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise PeerError(f"{package} could not be installed: {error}") from None
    if done.returncode:
        raise PeerError(f"{package} could not be installed: {_failure(line, done.returncode, done.stdout)}")


def _failure(line: Sequence[str], status: int, output: str) -> str:
    """Why a command failed, in one line; more of what it said goes to stderr."""
    said = [text.strip() for text in output.splitlines() if text.strip()][-LAST_LINES:]
    click.echo("\n".join([f"+ {shlex.join(line)}", *said]), err=True)
    errors = [text for text in said if re.search(r"Error\b|ERROR", text)]
    return f"status {status}, {[*errors, *said[-1:], 'without a word'][0]}"


def prepare_all(results: Results, environments: Path) -> tuple[Results, dict[str, Path]]:
    """The Python of each peer's environment, and a note on each peer that cannot be installed."""
    pythons: dict[str, Path] = {}
    for peer in PEERS:
        try:
            pythons[peer.name] = prepare(peer, environments)
        except PeerError as error:
            results = noted(results, f"{peer.name}: left out: {error}")
    return results, pythons


# --- measuring ---


def command(task: Task, python: Path, arguments: Sequence[str], output: Path) -> list[str]:
    """The command of a task."""
    bench = ["python", "-m", "mpicoll", "bench", task.collective, *arguments]
    chosen = ["--compare", task.peer.contender, "--persistent", "--alloc", "--json", str(output)]
    launch = [str(python), "-m", "mpicoll.launch", "-np", str(task.ranks)]
    return ["env", *task.peer.settings, *launch, *bench, *chosen]


def run(task: Task, python: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """What ``mpicoll bench`` writes."""
    with tempfile.TemporaryDirectory(prefix="mpicoll-peers-") as directory:
        output, log = Path(directory) / "result.json", Path(directory) / "log"
        line = command(task, python, arguments, output)
        status = _run_limited(line, log)
        if status or not output.exists():
            raise PeerError(_failure(line, status, log.read_text(errors="replace")))
        result: dict[str, Any] = json.loads(output.read_text())
    return result


def _run_limited(line: Sequence[str], log: Path) -> int:
    """The command's status. What it says goes to a file: ranks that outlive it would keep a pipe open."""
    with log.open("w") as said:
        process = subprocess.Popen(line, stdout=said, stderr=subprocess.STDOUT)
    with process:
        try:
            return process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()  # politely, so that a launcher can end its ranks
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(DYING)
            process.kill()
    raise PeerError(f"not done after {LIMIT:g} s")


def condense(task: Task, output: dict[str, Any]) -> Job:
    """What the tables need of what ``mpicoll bench`` wrote; `PeerError` if it is not fit for them."""
    if output["ranks"] != task.ranks:  # such as 1: ranks and launcher belong to different libraries
        raise PeerError(f"expected {task.ranks} ranks, got {output['ranks']} of {output['mpi']}")
    names = {task.peer.contender: "peer", **{name: name for name in OURS}}
    times: dict[int, dict[str, float]] = {row["size"]: {"memcpy": row["time"]} for row in output["memcpy"]}
    times.pop(0, None)  # bytes that are less than an element for each rank
    for contender in output["contenders"]:
        for row in contender["results"]:
            if contender["name"] in names and row["size"] in times and row["out_of_place"] is not None:
                times[row["size"]][names[contender["name"]]] = _time(contender["name"], row)
    for size, found in times.items():
        if missing := {"peer", "auto"} - found.keys():
            raise PeerError(f"no time of {' and '.join(sorted(missing))} at {format_size(size)}")
    settings = " ".join([*task.peer.settings, *(f"with {package}" for package in task.peer.packages)])
    of_peer = (task.peer.name, settings, output["mpi"], output["thread_level"])
    return Job(task.round, task.collective, task.ranks, *of_peer, times)


def _time(name: str, row: dict[str, Any]) -> float:
    time, wrong = row["out_of_place"]["time"], row["out_of_place"]["nwrong"]
    if wrong:
        raise PeerError(f"{name}: {wrong} wrong elements at {format_size(row['size'])}")
    return float(time)


def measure(
    tasks: Sequence[Task],
    results: Results,
    pythons: dict[str, Path],
    arguments: Sequence[str],
    json_file: Path | None,
) -> Results:
    """``results`` and those of all tasks; written after each, so that an interruption loses little."""
    started = time.monotonic()
    for done, task in enumerate(tasks):
        click.echo(progress(task, done, len(tasks), time.monotonic() - started), err=True)
        results = attempt(results, task, pythons[task.peer.name], arguments)
        if json_file is not None:
            json_file.write_text(dumps(results))
    return results


def progress(task: Task, done: int, total: int, seconds: float) -> str:
    """Which task begins; and, after the first, how long all that are left should take."""
    left = f" ({math.ceil(seconds / done * (total - done) / 60)} min left)" if done else ""
    return f"job {done + 1} of {total}: {task}{left}"


def attempt(results: Results, task: Task, python: Path, arguments: Sequence[str]) -> Results:
    """``results`` with one more job, or with a note on why there is none."""
    try:
        output = run(task, python, arguments)
        job = condense(task, output)
    except PeerError as error:
        return noted(results, f"{task}: left out: {error}")
    return replace(results, machine=output["machine"], jobs=[*results.jobs, job])


def noted(results: Results, note: str) -> Results:
    click.echo(note, err=True)
    return replace(results, notes=[*results.notes, note])


# --- the command ---


def _checked(parse: Callable[[str], T]) -> Callable[[click.Context, click.Parameter, str], T]:
    """An option's callback, from a function that raises `ValueError`."""

    def callback(ctx: click.Context, param: click.Parameter, text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return callback


def parse_collectives(text: str) -> list[str]:
    allowed = [name for name, kind in KINDS.items() if kind.ours]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in allowed:
            raise ValueError(f"expected some of {', '.join(allowed)}; got {name!r}")
    return names


def parse_elements(text: str) -> int:
    size = parse_size(text)
    if size == 0 or size % DTYPES["float"].itemsize:
        raise ValueError(f"expected one or more elements of {DTYPES['float'].itemsize} bytes, got {text!r}")
    return size


def _check_options(ctx: click.Context) -> None:
    """What click does not check; before the hours of measuring, not after them."""
    options = ctx.params
    given = [name for name in options if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    surplus = [name for name in given if name not in ("source", "markdown", "picture")]
    if options["source"] and surplus:
        flags = [param.opts[0] for param in ctx.command.params if param.name in surplus]
        raise click.UsageError(f"--from measures nothing: expected no {' and no '.join(flags)}")
    if options["begin"] > options["end"]:
        sizes = f"{format_size(options['begin'])} and {format_size(options['end'])}"
        raise click.UsageError(f"expected -b no larger than -e, got {sizes}")
    if options["picture"] and find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib: pip install 'mpicoll[plots]'")


FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option(
    "--collectives",
    metavar="LIST",
    callback=_checked(parse_collectives),
    default="allreduce,reduce_scatter,broadcast,allgather",
    help="By comma.",
)
@click.option(
    "--ranks", metavar="LIST", callback=_checked(parse_ranks), default="2", help="Rank counts, such as 2,4,8."
)
@click.option(
    "-b",
    "begin",
    metavar="SIZE",
    callback=_checked(parse_elements),
    default="8",
    help="Smallest size, in bytes.",
)
@click.option(
    "-e", "end", metavar="SIZE", callback=_checked(parse_elements), default="64M", help="Largest size."
)
@click.option("-f", "factor", type=click.IntRange(2), default=4, help="From one size to the next.")
@click.option("--turns", type=click.IntRange(1), default=5, help="Turns of each contender in a job.")
@click.option("--rounds", type=click.IntRange(1), default=1, help="How often all jobs are run.")
@click.option(
    "--environments",
    metavar="DIRECTORY",
    type=click.Path(file_okay=False, path_type=Path),
    default=platformdirs.user_cache_path("mpicoll") / "peers",
    show_default="in the user's cache",
    help="Where the virtual environments are, or are to be.",
)
@click.option("--json", "json_file", metavar="FILE", type=FILE, help="Write all results here.")
@click.option("--from", "source", metavar="FILE", type=FILE, help="Show what --json wrote; measure nothing.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--plot", "picture", metavar="FILE", type=FILE, help="Draw the ratios, as PNG, PDF or SVG.")
@click.pass_context
def main(
    ctx: click.Context,
    collectives: list[str],
    ranks: list[int],
    begin: int,
    end: int,
    factor: int,
    turns: int,
    rounds: int,
    environments: Path,
    json_file: Path | None,
    source: Path | None,
    markdown: bool,
    picture: Path | None,
) -> None:
    _check_options(ctx)
    if source is not None:
        results = read_results(source, loads)
    else:
        line = shlex.join(["python", "-m", "mpicoll.bench.peers", *sys.argv[1:]])
        results = Results(line, date.today().isoformat(), machine={}, notes=[], jobs=[])
        results, pythons = prepare_all(results, environments.absolute())
        peers = [peer for peer in PEERS if peer.name in pythons]
        tasks = [Task(*task) for task in itertools.product(range(1, rounds + 1), collectives, ranks, peers)]
        arguments = ["-b", str(begin), "-e", str(end), "-f", str(factor), "--turns", str(turns)]
        results = measure(tasks, results, pythons, arguments, json_file)
    show(results, markdown, picture)


if __name__ == "__main__":
    main()
