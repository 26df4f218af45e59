"""Trainings whose ranks are killed at random moments, one after the other, until one is left.

    python -m mpicoll.bench.elastic --kills 200 --seed 1 --json elastic.json

Each job is `train.py --elastic` on the digits, on 3 or 4 ranks: with allreduce, with sharded optimizer state,
or deterministic. From its first step to its last, ranks get SIGKILL at moments drawn from the seed, rank 0 as
often as others. A kill counts if it comes before the training has ended. A job has

- **survived** if those that are left report a whole training,
- **hung** if it has to be ended, after `LIMIT` seconds,
- **failed** in all other cases.

With shards kills are `APART` seconds apart: that neighbours die together is a loss that is known of. Beside
each job stand the accuracy and the hash of the parameters of one in which nobody died. The exit status is 1
unless all have survived, and all deterministic ones have come to the same bits. Needs Open MPI on this
machine, and starts jobs of its own: not to be run under mpirun.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from mpicoll import launch

from .about import write_report
from .options import check_writable, json_option

KINDS: dict[str, list[str]] = {
    "allreduce": [],
    "sharded": ["--strategy", "sharded", "--optimizer", "adam"],
    "deterministic": ["--deterministic"],
}
RANKS = (3, 4)
EPOCHS = 60  # some seconds
APART = 1.0  # seconds: far more than a recovery takes
LIMIT = 120.0  # seconds for a job of five; the first may compile
DYING = 5.0  # seconds that a launcher gets to end its ranks
LOOK = 0.002  # seconds between looks at a job
SURVIVED, HUNG, FAILED = "survived", "hung", "failed"

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A job, and which of its ranks die, in this order, at which part of the undisturbed training's time."""

    number: int
    kind: str
    nranks: int
    victims: tuple[int, ...] = ()
    moments: tuple[float, ...] = ()


def draw(common: random.Random, number: int) -> Case:
    """One after the other dies, until one is left, unless the training ends before."""
    kind = list(KINDS)[number % len(KINDS)]
    nranks = common.choice(RANKS)
    victims = common.sample(range(nranks), nranks - 1)
    return Case(number, kind, nranks, tuple(victims), tuple(sorted(common.random() for _ in victims)))


def times(case: Case, seconds: float) -> Iterator[float]:
    """When ranks die, in seconds from the beginning of a training that would take so many."""
    earliest = 0.0
    for moment in case.moments:
        yield max(moment * seconds, earliest)
        earliest = max(moment * seconds, earliest) + APART * (case.kind == "sharded")


# A job -----------------------------------------------------------------------------------------------


def run(case: Case, seconds: float, epochs: int) -> Row:
    """What came of it. ``seconds`` is what the training takes on all ranks."""
    with tempfile.TemporaryDirectory(prefix="mpicoll-elastic-") as name:
        folder = Path(name)
        program = [sys.executable, "-m", "mpicoll.train", "--elastic", "--epochs", str(epochs)]
        program += [*KINDS[case.kind], "--metrics", f"{folder}/metrics", "--json", f"{folder}/result"]
        line = launch.command(case.nranks, program, elastic=True)
        with (folder / "output").open("w") as output:
            process = subprocess.Popen(
                line, stdout=output, stderr=subprocess.STDOUT, env=launch.environment(line[0])
            )
        killed: dict[int, float] = {}
        outcome = disturbed(process, folder, case, seconds, killed)
        result = json.loads((folder / "result").read_text()) if (folder / "result").exists() else None
        if outcome != HUNG:
            outcome = SURVIVED if result is not None and result["epochs"] == epochs else FAILED
        found = row(case, outcome, killed, result)
        return found if outcome == SURVIVED else {**found, "output": (folder / "output").read_text()[-4000:]}


def disturbed(
    process: subprocess.Popen[bytes], folder: Path, case: Case, seconds: float, killed: dict[int, float]
) -> str | None:
    """Kill ranks as the case says, noting when, and wait for the job's end; `HUNG` if it does not come."""
    until = time.monotonic() + LIMIT
    pids: dict[int, int] = {}
    while not (folder / "metrics").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(LOOK)
    begin = time.monotonic()
    if case.victims:
        pids = ranks_of(process.pid)
    for victim, at in zip(case.victims, times(case, seconds), strict=True):
        time.sleep(max(0.0, begin + at - time.monotonic()))
        with suppress(ProcessLookupError, KeyError):  # the job has ended before
            os.kill(pids[victim], signal.SIGKILL)
            killed[victim] = time.time()
    try:
        process.wait(max(DYING, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        end(process)
        return HUNG
    return None


def ranks_of(launcher: int) -> dict[int, int]:
    """The process numbers of a launcher's ranks here; Open MPI's have their ranks in their environment."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            settings = (path / "environ").read_bytes().split(b"\0") if parent == launcher else []
            ranks = [entry for entry in settings if entry.startswith(b"OMPI_COMM_WORLD_RANK=")]
            found |= {int(entry.partition(b"=")[2]): int(path.name) for entry in ranks}
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """All ranks, too: a launcher that waits for one that hangs may not."""
    for pid in ranks_of(process.pid).values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(DYING)
    process.kill()
    process.wait()


def row(case: Case, outcome: str, killed: Mapping[int, float], result: Mapping[str, Any] | None) -> Row:
    """A kill counts if the training has noticed it; if that has not come to its end, all do."""
    found: Row = {"number": case.number, "kind": case.kind, "ranks": case.nranks, "outcome": outcome}
    if result is None:
        return {**found, "kills": [{"rank": rank} for rank in killed]}
    kills = [
        {
            "rank": rank,
            "step": lost["step"],
            "recovery": lost["seconds"],
            "since_kill": lost["at"] - killed[rank],
        }
        for lost in result["lost"]
        for rank in lost["ranks"]
        if rank in killed
    ]
    names = ("steps", "test_accuracy", "parameters_sha256", "seconds")
    return {**found, "kills": kills, **{name: result[name] for name in names}}


# All of them -----------------------------------------------------------------------------------------


def summary(rows: Sequence[Row], undisturbed: Mapping[tuple[str, int], Row]) -> list[Row]:
    """For each kind of training, and for all."""
    groups = [(kind, [row for row in rows if row["kind"] == kind]) for kind in KINDS]
    return [_summed(name, group, undisturbed) for name, group in [*groups, ("all", list(rows))] if group]


def _summed(name: str, rows: Sequence[Row], undisturbed: Mapping[tuple[str, int], Row]) -> Row:
    kills = [kill for row in rows for kill in row["kills"]]
    recoveries = [kill["recovery"] for kill in kills if "recovery" in kill]
    since = [kill["since_kill"] for kill in kills if "since_kill" in kill]
    exact = [row for row in rows if row["kind"] == "deterministic" and row["outcome"] == SURVIVED]
    same = [row for row in exact if is_same(row, undisturbed)]
    accuracies = [row["test_accuracy"] for row in rows if row["outcome"] == SURVIVED]
    beside = [row["test_accuracy"] for (kind, _), row in undisturbed.items() if name in (kind, "all")]
    return {
        "kind": name,
        "jobs": len(rows),
        "kills": len(kills),
        "of_rank_0": sum(kill["rank"] == 0 for kill in kills),
        **{outcome: sum(row["outcome"] == outcome for row in rows) for outcome in (SURVIVED, HUNG, FAILED)},
        "recovery_median": median(recoveries) if recoveries else None,
        "recovery_max": max(recoveries, default=None),
        "since_kill_max": max(since, default=None),
        "least_accuracy": min(accuracies, default=None),
        "least_undisturbed_accuracy": min(beside, default=None),
        "same_bits": f"{len(same)} of {len(exact)}",
    }


def is_same(row: Row, undisturbed: Mapping[tuple[str, int], Row]) -> bool:
    """Whether the parameters are those of the undisturbed training, bit for bit."""
    expected: str = undisturbed[row["kind"], row["ranks"]]["parameters_sha256"]
    return bool(row["parameters_sha256"] == expected)


def table(summed: Sequence[Row]) -> str:
    """A line for each figure."""
    lines = []
    for name in summed[0]:
        cells = [f"{v:.4f}" if isinstance(v := row[name], float) else f"{v}" for row in summed]
        lines.append(f"{name:28}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def is_good(rows: Sequence[Row], undisturbed: Mapping[tuple[str, int], Row]) -> bool:
    """Whether all have survived, with the same bits where that is promised."""
    exact = [row for row in rows if row["kind"] == "deterministic" and row["outcome"] == SURVIVED]
    return all(row["outcome"] == SURVIVED for row in rows) and all(is_same(row, undisturbed) for row in exact)


@click.command("elastic", context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--kills", type=click.IntRange(1), default=200, help="How many ranks to kill, at least.")
@click.option("--seed", type=int, default=1, help="What ranks and moments are drawn from.")
@click.option("--epochs", type=click.IntRange(1), default=EPOCHS, help="Of each training.")
@json_option
def command(kills: int, seed: int, epochs: int, **given: Any) -> None:
    """Kill ranks of trainings at random moments, and count how they go on.

    Example: python -m mpicoll.bench.elastic --kills 20 --json elastic.json
    """
    file: Path | None = given["json"]
    if file is not None:
        check_writable("--json", file)
    try:
        launch.command(2, [], elastic=True)
    except launch.LauncherError as error:
        raise click.ClickException(str(error)) from None
    start, common = time.monotonic(), random.Random(seed)
    undisturbed: dict[tuple[str, int], Row] = {}
    rows: list[Row] = []
    done = 0
    click.echo(f"{kills} kills of seed {seed}", err=True)
    while done < kills:
        case = draw(common, len(rows))
        key = case.kind, case.nranks
        if key not in undisturbed:
            undisturbed[key] = run(Case(-1, *key), 0.0, epochs)
            if undisturbed[key]["outcome"] != SURVIVED:
                raise click.ClickException(f"without any kill: {undisturbed[key]}")
        rows.append(run(case, undisturbed[key]["seconds"], epochs))
        done += len(rows[-1]["kills"])
        click.echo(f"{done} of {kills}: {_line(rows[-1])}  {time.monotonic() - start:.0f} s", err=True)
    summed = summary(rows, undisturbed)
    click.echo(table(summed))
    for each in rows:
        if each["outcome"] != SURVIVED:
            click.echo(json.dumps(each))
    if file is not None:
        found = {"seconds": round(time.monotonic() - start, 1), "summary": summed}
        found |= {"undisturbed": list(undisturbed.values()), "rows": rows}
        flags = {"kills": kills, "seed": seed, "epochs": epochs}
        write_report(file, "mpicoll.bench.elastic", flags, found)
    sys.exit(not is_good(rows, undisturbed))


def _line(row: Row) -> str:
    what = f"{row['kind']} on {row['ranks']} ranks {row['outcome']}"
    where = [f"rank {kill['rank']} after step {kill['step']}" for kill in row["kills"] if "step" in kill]
    return f"{what}; {', '.join(where)}" if where else what


if __name__ == "__main__":
    command()
