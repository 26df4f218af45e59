"""What it costs that ranks compare their calls in shared memory.

    python -m mpicoll.bench.check_cost --json check_cost.json

Two ranks of one node; allreduce and broadcast of 4 B to 16 MiB, with the comparison and without. There is no
option to leave it out, so a job compiles `transports.steps` twice, once with a `_differs` that says no at
once, which the compiler leaves out; the two take turns in calls with the same buffers. A size's cost is the
median over all turns of all jobs. What is asked is less than `ASKED` at every size.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from mpicoll import launch
from mpicoll.sizes import format_size
from mpicoll.transports import steps

from .about import write_report
from .check_cost_runs import SIZES, VARIANTS
from .options import check_writable, found_launcher, json_option

ASKED = 0.02  # of the time without the comparison
NRANKS = 2
COMPARISON = "_differs"  # of transports/steps.py
LIMIT = 600.0  # seconds for one job, the first of which compiles

Found = list[dict[str, Any]]  # what a job has written


def without_comparison(source: str) -> str:
    """The source, with a comparison that says no at once. Raises ValueError if it has no comparison."""
    tree = ast.parse(source)
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == COMPARISON]
    if len(found) != 1:
        raise ValueError(f"source: expected one function {COMPARISON}, got {len(found)}")
    found[0].body = ast.parse("return False").body
    return ast.unparse(tree)


def write_variants(folder: Path) -> None:
    assert steps.__file__ is not None
    source = Path(steps.__file__).read_text()
    for variant, text in zip(VARIANTS, (source, without_comparison(source)), strict=True):
        (folder / f"steps_{variant}.py").write_text(text)


def run(folder: Path, mpirun: str, sizes: Sequence[int], seconds: float) -> Found:
    """One job with the variants in ``folder``."""
    given = [str(folder), str(seconds), *map(str, sizes)]
    answer = subprocess.run(
        launch.command(NRANKS, [sys.executable, "-m", "mpicoll.bench.check_cost_runs", *given]),
        env=launch.environment(mpirun),
        timeout=LIMIT,
        capture_output=True,
        text=True,
    )
    if answer.returncode:
        raise click.ClickException(f"a job ended with {answer.returncode}: {answer.stdout}{answer.stderr}")
    found: Found = json.loads((folder / "times").read_text())
    return found


def rows(jobs: Sequence[Found]) -> list[dict[str, Any]]:
    """Medians of each collective and size, and what the comparison adds, in the median turn."""
    made = []
    for entries in zip(*jobs, strict=True):
        usual, least = ([each for e in entries for each in e["seconds"][variant]] for variant in VARIANTS)
        cost = median(w / o for w, o in zip(usual, least, strict=True)) - 1
        row = {key: entries[0][key] for key in ("collective", "bytes")}
        row |= {"us_with": 1e6 * median(usual), "us_without": 1e6 * median(least)}
        made.append({**row, "cost": cost, "below": cost < ASKED})
    return made


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'':10}{'size':>6}{'µs with':>12}{'without':>12}{'cost':>9}"]
    for row in rows:
        times = f"{row['us_with']:12.3f}{row['us_without']:12.3f}{100 * row['cost']:8.1f}%"
        lines.append(f"{row['collective']:10}{format_size(row['bytes']):>6}{times}")
    return "\n".join(lines)


@click.command("check_cost", context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--jobs", type=click.IntRange(1), default=5, help="How many.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=0.8,
    help="For each collective and size in a job.",
)
@json_option
def command(jobs: int, seconds: float, json: Path | None) -> None:
    """Measure what comparing calls costs. Starts jobs of its own; not to be run under mpirun.

    Example: python -m mpicoll.bench.check_cost --json check_cost.json
    """
    if json is not None:
        check_writable("--json", json)
    mpirun, library = found_launcher()
    measured = rows(measure(jobs, mpirun, SIZES, seconds))
    click.echo(table(measured))
    if json is not None:
        found = {"mpi": library, "ranks": NRANKS, "asked": ASKED, "rows": measured}
        write_report(json, "mpicoll.bench.check_cost", {"jobs": jobs, "seconds": seconds}, found)
    sys.exit(not all(row["below"] for row in measured))


def measure(jobs: int, mpirun: str, sizes: Sequence[int], seconds: float) -> list[Found]:
    """What each job has found."""
    found = []
    with tempfile.TemporaryDirectory(prefix="mpicoll-check-cost-") as name:
        folder = Path(name)
        write_variants(folder)
        for job in range(jobs):
            found.append(run(folder, mpirun, sizes, seconds))
            click.echo(f"{job + 1} of {jobs}", err=True)
    return found


if __name__ == "__main__":
    command(prog_name="python -m mpicoll.bench.check_cost")
