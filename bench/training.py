"""Every strategy and every mesh of `mpicoll.train`, at some numbers of ranks, beside one process.

\b
For each of them:
- 20 steps in float64, and how far the parameters are from those of one process;
- a training on scikit-learn's digits, and its accuracy on test samples;
- the bytes that a rank sends per step, and how many steps there are in a second.

Jobs are launched one after the other: start this without mpirun. The exit status is 1 if any training
failed, if one that should take the steps of one process does not, or if an asynchronous one is more than 5
points less accurate; the last lines name it.

\b
Examples:
  python -m mpicoll.bench.training --ranks 1-8 --json training.json
  python -m mpicoll.bench.training --from bench/results/training.json --markdown
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from mpicoll.cli import parse_ranks

from .about import about
from .options import check_writable, read_results
from .training_report import Job, Results, complaints, dumps, loads, on_ranks, show
from .training_setups import MOST_RANKS, setups

WRONG = 1  # the exit status after a complaint
LIMIT = 120.0  # seconds for a job, and as many for each of its setups: they take a second or ten
DYING = 10.0  # seconds that a launcher gets to end its ranks


def measure(ranks: Sequence[int], epochs: int) -> tuple[list[Job], list[str]]:
    """What the jobs found at each number of ranks, and a line for each setup that failed."""
    jobs: list[Job] = []
    failures: list[str] = []
    for nranks in ranks:
        names = [setup.name for setup in setups(nranks)]
        while names:  # another job, after a failure, for those that are left
            job, error = run(nranks, epochs, names)
            jobs.append(job)
            names = names[len(job.rows) :]
            if error and not names:
                failures.append(f"{on_ranks(nranks)}: {error} at the end")
            elif error:
                failures.append(f"{names.pop(0)} on {on_ranks(nranks)}: {error}")
    return jobs, failures


def run(nranks: int, epochs: int, names: Sequence[str]) -> tuple[Job, str]:
    """One job, as far as it came, and why it came no further, if so."""
    with tempfile.TemporaryDirectory(prefix="mpicoll-training-") as directory:
        output = Path(directory) / "job.json"
        launch = [sys.executable, "-m", "mpicoll.launch", "-np", str(nranks)]
        program = [sys.executable, "-m", "mpicoll.bench.training_runs", str(output), str(epochs), *names]
        error = run_limited([*launch, *program], LIMIT * (1 + len(names)))
        return (Job.loads(output.read_text()) if output.exists() else Job("", [])), error


def run_limited(line: Sequence[str], limit: float) -> str:
    """Why the command failed, or nothing."""
    with subprocess.Popen(line) as process:
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # politely, so that a launcher can end its ranks
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(DYING)
            process.kill()
            return f"not done after {limit:g} s"
    return f"status {status}" if status else ""


def _parse_ranks(ctx: click.Context, param: click.Parameter, text: str) -> list[int]:
    try:
        ranks = parse_ranks(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if ranks[-1] > MOST_RANKS:
        raise click.BadParameter(f"expected numbers up to {MOST_RANKS}, got {ranks[-1]}")
    return ranks


def _check_options(ctx: click.Context) -> None:
    given = [name for name in ctx.params if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    surplus = [
        param.opts[0]
        for param in ctx.command.params
        if param.name in {"ranks", "epochs", "json_file"} & {*given}
    ]
    if ctx.params["source"] and surplus:
        raise click.UsageError(f"--from trains nothing: expected no {' and no '.join(surplus)}")


FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(help=__doc__, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--ranks", metavar="LIST", callback=_parse_ranks, default="1-4,8", help="Such as 1-8.")
@click.option("--epochs", type=click.IntRange(min=1), default=8, help="Of the training on digits.")
@click.option("--json", "json_file", metavar="FILE", type=FILE, help="Write all results here.")
@click.option("--from", "source", metavar="FILE", type=FILE, help="Show what --json wrote; train nothing.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.pass_context
def main(
    ctx: click.Context,
    ranks: list[int],
    epochs: int,
    json_file: Path | None,
    source: Path | None,
    markdown: bool,
) -> None:
    _check_options(ctx)
    if source is not None:
        results = read_results(source, loads)
    else:
        if json_file is not None:
            check_writable("--json", json_file)
        known = about(["python", "-m", "mpicoll.bench.training", *sys.argv[1:]], {})
        facts = {name: known[name] for name in ("command", "date", "machine")}
        jobs, failures = measure(ranks, epochs)
        rows = [row for job in jobs for row in job.rows]
        mpi = next((job.mpi for job in jobs if job.mpi), "no MPI library")
        results = Results(**facts, mpi=mpi, epochs=epochs, failures=failures, rows=rows)
        if json_file is not None:
            json_file.write_text(dumps(results))
    show(results, markdown)
    if found := complaints(results):
        click.echo("\n".join(["", *found]), err=True)
        ctx.exit(WRONG)


if __name__ == "__main__":
    main()
