"""What it costs that ranks compare their calls in shared memory.

    python -m mpicoll.bench.check_cost --json check_cost.json

Two ranks of one node; allreduce and broadcast of 4 B to 16 MiB, with the comparison and without. There is no
option to leave it out, so the package is copied twice, and in one copy `transports.steps._agree` is made to
say yes at once, which the compiler leaves out. Jobs of the two copies alternate; a size's time is the median
over the jobs. What is asked is less than `ASKED` at every size.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

import mpicoll
from mpicoll import kernels, launch
from mpicoll.sizes import format_size

from . import check_cost_runs
from .about import about
from .options import check_writable, found_launcher, json_option

ASKED = 0.02  # of the time without the comparison
NRANKS = 2
COMPARISON = "_agree"  # of transports/steps.py
LIMIT = 600.0  # seconds for one job, the first of which compiles
VARIANTS = ("with", "without")

Times = dict[tuple[str, int], float]  # of each collective and size, in seconds


def without_comparison(source: str) -> str:
    """The source, with a comparison that says yes at once. Raises ValueError if it has no comparison."""
    tree = ast.parse(source)
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == COMPARISON]
    if len(found) != 1:
        raise ValueError(f"source: expected one function {COMPARISON}, got {len(found)}")
    found[0].body = ast.parse("return True").body
    return ast.unparse(tree)


def copy_package(folder: Path, compares: bool) -> None:
    """The package and its kernels, with caches of compiled code, as ``folder/mpicoll``."""
    package = folder / "mpicoll"
    shutil.copytree(Path(mpicoll.__file__).parent, package)
    for module in (kernels, sys.modules[__package__]):
        assert module.__file__ is not None
        source = Path(module.__file__).parent
        shutil.copytree(source, package / module.__name__.rpartition(".")[2], dirs_exist_ok=True)
    if not compares:
        steps = package / "transports" / "steps.py"
        steps.write_text(without_comparison(steps.read_text()))


def run(folder: Path, mpirun: str, sizes: Sequence[int], seconds: float) -> Times:
    """One job of the copy in ``folder``."""
    results = folder / "results"
    given = [str(results), str(seconds), *map(str, sizes)]
    program = [sys.executable, "-m", "mpicoll.bench.check_cost_runs", *given]
    environment = {**launch.environment(mpirun), "PYTHONPATH": str(folder)}
    answer = subprocess.run(
        launch.command(NRANKS, program),
        env=environment,
        cwd=folder,
        timeout=LIMIT,
        capture_output=True,
        text=True,
    )
    if answer.returncode:
        raise click.ClickException(f"a job ended with {answer.returncode}: {answer.stdout}{answer.stderr}")
    report = json.loads(results.read_text())
    if Path(report["package"]) != folder / "mpicoll":
        raise click.ClickException(f"expected a job of {folder}/mpicoll, got {report['package']}")
    return {(name, size): each for name, size, each in report["times"]}


def rows(found: Mapping[str, Sequence[Times]]) -> list[dict[str, Any]]:
    """Medians of each collective and size, and what the comparison adds."""
    made = []
    for name, size in found["with"][0]:
        usual, least = (median(times[name, size] for times in found[variant]) for variant in VARIANTS)
        cost = usual / least - 1
        row = {"collective": name, "bytes": size, "us_with": 1e6 * usual, "us_without": 1e6 * least}
        made.append({**row, "cost": cost, "below": cost < ASKED})
    return made


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'':10}{'size':>6}{'µs with':>12}{'without':>12}{'cost':>9}"]
    for row in rows:
        times = f"{row['us_with']:12.3f}{row['us_without']:12.3f}{100 * row['cost']:8.1f}%"
        lines.append(f"{row['collective']:10}{format_size(row['bytes']):>6}{times}")
    return "\n".join(lines)


@click.command("check_cost", context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--jobs", type=click.IntRange(1), default=15, help="How many of each copy.")
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), default=0.3, help="For each size in a job."
)
@json_option
def command(jobs: int, seconds: float, json: Path | None) -> None:
    """Measure what comparing calls costs. Starts jobs of its own; not to be run under mpirun.

    Example: python -m mpicoll.bench.check_cost --json check_cost.json
    """
    if json is not None:
        check_writable("--json", json)
    mpirun, library = found_launcher()
    measured = rows(measure(jobs, mpirun, check_cost_runs.SIZES, seconds))
    click.echo(table(measured))
    if json is not None:
        line = ["python", "-m", "mpicoll.bench.check_cost", "--jobs", str(jobs), "--seconds", str(seconds)]
        flags = {"jobs": jobs, "seconds": seconds}
        write(json, {**about(line, flags), "mpi": library, "ranks": NRANKS, "asked": ASKED, "rows": measured})
    sys.exit(not all(row["below"] for row in measured))


def write(file: Path, report: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(report, indent=1) + "\n")


def measure(jobs: int, mpirun: str, sizes: Sequence[int], seconds: float) -> dict[str, list[Times]]:
    """The times of each job; the two copies take turns, and each has one job before that compiles."""
    with tempfile.TemporaryDirectory(prefix="mpicoll-check-cost-") as name:
        folders = {variant: Path(name).resolve() / variant for variant in VARIANTS}
        for variant, folder in folders.items():
            folder.mkdir()
            copy_package(folder, compares=variant == "with")
            run(folder, mpirun, sizes[:1], 0.001)
        found: dict[str, list[Times]] = {variant: [] for variant in VARIANTS}
        for job in range(jobs):
            for variant in VARIANTS if job % 2 == 0 else VARIANTS[::-1]:
                found[variant].append(run(folders[variant], mpirun, sizes, seconds))
            click.echo(f"{job + 1} of {jobs}", err=True)
        return found


if __name__ == "__main__":
    command(prog_name="python -m mpicoll.bench.check_cost")
