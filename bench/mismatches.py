"""How ranks that disagree end: many mismatches at random, and what every rank is told.

    python -m mpicoll.bench.mismatches --count 1000 --seed 1 --json mismatches.json

Ranks 2 to 4; in shared memory, in messages, and on pretended nodes; all collectives, blocking, nonblocking
and persistent. One rank calls another collective, or with another count, dtype, operation or root, makes two
calls in the other order, leaves one out, or ends its program. Then all call `Barrier` and
`Ibarrier`, so who need not wait in the calls that differ may learn it there. A case is

- **clear** if every rank gets an error with every rank's place and both calls, or who has ended,
- **unclear** if some error says less,
- **unnoticed** if nobody gets an error, though nobody has wrong data,
- **wrong** if a call returns with data that it would not give if all ranks had made it,
- a **hang** if a rank waits for longer than `mismatch_runs.TIMEOUT`.

The exit status is 1 unless all are clear. The seed brings a case back.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mpicoll import launch

from .about import write_report
from .mismatch_cases import CLEAR, HANG, KINDS, OUTCOMES, TRANSPORTS, Case, Outcome, draw, judge
from .options import check_writable, found_launcher, json_option

TOGETHER = 60  # cases in one job: what a broken communicator holds is freed with its process
STUCK = 30.0  # seconds without a word from any rank after which a job is ended
STARTING = 120.0  # ... before the first word: kernels may have to be compiled
DYING = 10.0  # seconds that a launcher gets to end its ranks
Met = dict[int, dict[int, Outcome]]  # of each case, of each rank


def drawn(count: int, seed: int) -> list[Case]:
    common = random.Random(seed)
    return [draw(common, number) for number in range(count)]


def jobs(cases: Iterable[Case]) -> list[list[Case]]:
    """Those that may share a job: the same ranks and transport; a rank that ends has one of its own."""
    groups: dict[tuple[str, int], list[Case]] = {}
    alone = []
    for case in cases:
        if case.kind == "exit":
            alone.append([case])
        else:
            groups.setdefault((case.transport, case.nranks), []).append(case)
    parts = [group[i : i + TOGETHER] for group in groups.values() for i in range(0, len(group), TOGETHER)]
    return parts + alone


def run(cases: Sequence[Case], mpirun: str) -> Met:
    """What came of these cases, in one job; those after a hang have nothing."""
    with tempfile.TemporaryDirectory(prefix="mpicoll-mismatches-") as name:
        folder = Path(name)
        (folder / "cases").write_text(json.dumps([asdict(case) for case in cases]))
        program = [sys.executable, "-m", "mpicoll.bench.mismatch_runs", name]
        with (folder / "output").open("w+") as output:
            process = subprocess.Popen(
                launch.command(cases[0].nranks, program),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=launch.environment(mpirun),
            )
            stuck = ended_when_stuck(process, folder)
            met = read(folder, cases[0].nranks)
            if not met and not stuck and process.returncode:
                output.seek(0)
                raise click.ClickException(f"a job ended with {process.returncode}: {output.read()}")
        return met


def ended_when_stuck(process: subprocess.Popen[bytes], folder: Path) -> bool:
    """Wait for the end of a job; whether it had to be ended, for no rank had a word to say."""
    size, since = -1, time.monotonic()
    while process.poll() is None:
        now = sum(file.stat().st_size for file in folder.glob("rank *"))
        if now != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > (STUCK if now else STARTING):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(DYING)
            process.kill()
            process.wait()
            return True
        time.sleep(0.05)
    return False


def read(folder: Path, nranks: int) -> Met:
    met: Met = {}
    for rank in range(nranks):
        file = folder / f"rank {rank}"
        lines = file.read_text().splitlines() if file.exists() else []
        for line in lines:
            row = json.loads(line)
            met.setdefault(row["number"], {})[rank] = Outcome(**row["outcome"])
    return met


def judged(cases: Sequence[Case], mpirun: str) -> list[dict[str, Any]]:
    """A row for each case, in as many jobs as that takes: a hang ends one."""
    rows: list[dict[str, Any]] = []
    rest = list(cases)
    while rest:
        met = run(rest, mpirun)
        outcomes = [judge(case, met.get(case.number, {})) for case in rest]
        done = 1 + next(
            (i for i, case in enumerate(rest) if outcomes[i] == HANG and is_last(case, met)), len(rest)
        )
        rows += [row(case, outcome, met) for case, outcome in zip(rest[:done], outcomes, strict=False)]
        rest = rest[done:]
    return rows


def is_last(case: Case, met: Met) -> bool:
    """Whether the job came no further."""
    return len(met.get(case.number, {})) < case.nranks


def row(case: Case, outcome: str, met: Met) -> dict[str, Any]:
    ranks = met.get(case.number, {})
    seconds = max((each.seconds for each in ranks.values()), default=None)
    found = {**asdict(case), "outcome": outcome, "seconds": seconds}
    return (
        found
        if outcome == CLEAR
        else {**found, "ranks": {rank: asdict(each) for rank, each in ranks.items()}}
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many of each outcome: in all, of each kind and of each transport."""
    groups = {"all": list(rows)}
    groups |= {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    groups |= {name: [row for row in rows if row["transport"] == name] for name in TRANSPORTS}
    counts = {name: Counter(row["outcome"] for row in group) for name, group in groups.items()}
    return {name: {outcome: count[outcome] for outcome in OUTCOMES} for name, count in counts.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'':12}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES)]
    for name, counts in summary(rows).items():
        lines.append(f"{name:12}" + "".join(f"{counts[outcome]:11}" for outcome in OUTCOMES))
    return "\n".join(lines)


@click.command("mismatches", context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--count", type=click.IntRange(1), default=1000, help="How many mismatches.")
@click.option("--seed", type=int, default=1, help="What they are drawn from.")
@json_option
def command(count: int, seed: int, **given: Any) -> None:
    """Let ranks disagree, and count how that ends. Starts jobs of its own; not to be run under mpirun.

    Example: python -m mpicoll.bench.mismatches --count 100 --json mismatches.json
    """
    file: Path | None = given["json"]
    if file is not None:
        check_writable("--json", file)
    mpirun, library = found_launcher()
    click.echo(f"{count} mismatches of seed {seed}, {library}", err=True)
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    for cases in jobs(drawn(count, seed)):
        rows += judged(cases, mpirun)
        bad = len([row for row in rows if row["outcome"] != CLEAR])
        click.echo(f"{len(rows)} of {count}, {bad} not clear, {time.monotonic() - start:.0f} s", err=True)
    rows.sort(key=lambda row: row["number"])
    click.echo(table(rows))
    for each in rows:
        if each["outcome"] != CLEAR:
            click.echo(json.dumps(each))
    if file is not None:
        seconds = round(time.monotonic() - start, 1)
        found = {"mpi": library, "seconds": seconds, "summary": summary(rows), "rows": rows}
        write_report(file, "mpicoll.bench.mismatches", {"count": count, "seed": seed}, found)
    sys.exit(any(each["outcome"] != CLEAR for each in rows))


if __name__ == "__main__":
    command(prog_name="python -m mpicoll.bench.mismatches")
