"""Our collectives beside the best peer: from what `mpicoll.bench.peers` measured to tables and a picture."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from mpicoll.sizes import format_size

# What `mpicoll bench` calls us, and how we are called in tables.
OURS = {"auto": "ours", "auto persistent": "persistent", "auto alloc": "alloc"}
WIDTH = 130  # characters that a table needs


@dataclass(frozen=True)
class Job:
    """One run of ``mpicoll bench``; ``times`` are µs, by bytes and then by "peer", "memcpy" and `OURS`."""

    round: int
    collective: str
    ranks: int
    peer: str
    settings: str
    mpi: str
    thread_level: str
    times: dict[int, dict[str, float]]


@dataclass(frozen=True)
class Results:
    """All that the tables need."""

    command: str
    date: str
    machine: dict[str, Any]
    notes: list[str]
    jobs: list[Job]


def dumps(results: Results) -> str:
    """As JSON."""
    return json.dumps(asdict(results), indent=1) + "\n"


def loads(text: str) -> Results:
    """The inverse of `dumps`; an exception of some kind for any other text."""
    content = json.loads(text)
    return Results(**{**content, "jobs": [_job(fields) for fields in content["jobs"]]})


def _job(fields: dict[str, Any]) -> Job:
    return Job(**{**fields, "times": {int(size): times for size, times in fields["times"].items()}})


# --- comparing ---


@dataclass(frozen=True)
class Row:
    """The comparison at one size: microseconds, in the best peer's jobs unless said otherwise."""

    size: int
    peer: str
    theirs: float
    ours: dict[str, float]  # by the names in `OURS`, as far as they were measured
    memcpy: float
    everywhere: tuple[float, float]  # ours, one-shot: fastest and slowest in all peers' jobs

    def ratio(self, name: str) -> float:
        """How many times faster than the best peer."""
        return self.theirs / self.ours[name]


def compare(jobs: Sequence[Job]) -> list[Row]:
    """A row for each size of jobs that share their collective and their number of ranks."""
    return [_row(jobs, size) for size in sorted({size for job in jobs for size in job.times})]


def _row(jobs: Sequence[Job], size: int) -> Row:
    runs: dict[str, list[dict[str, float]]] = {}
    for job in jobs:
        if size in job.times:
            runs.setdefault(job.peer, []).append(job.times[size])
    medians = {peer: _medians(times) for peer, times in runs.items()}
    peer = min(medians, key=lambda name: medians[name]["peer"])
    best = medians[peer]
    ours = {name: best[name] for name in OURS if name in best}
    everywhere = [times["auto"] for rounds in runs.values() for times in rounds]
    return Row(size, peer, best["peer"], ours, best["memcpy"], (min(everywhere), max(everywhere)))


def _medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for times in rounds for name in times)
    return {name: statistics.median(times[name] for times in rounds if name in times) for name in names}


def groups(jobs: Iterable[Job]) -> dict[tuple[str, int], list[Job]]:
    """Jobs by collective and number of ranks."""
    found: dict[tuple[str, int], list[Job]] = {}
    for job in jobs:
        found.setdefault((job.collective, job.ranks), []).append(job)
    return found


# --- tables ---


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Headings, a line for each size, the geometric means of the ratios, and the least of them."""
    names = [name for name in OURS if any(name in row.ours for row in rows)]
    compared = [heading for name in names for heading in (f"{OURS[name]} µs", "ratio")]
    headings = [
        "size",
        "best peer",
        "its µs",
        *compared,
        "memcpy µs",
        "ours / memcpy",
        "ours in all jobs, µs",
    ]
    return [headings, *(_cells(row, names) for row in rows), *_summary(rows, names)]


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    cells = [format_size(row.size), row.peer, f"{row.theirs:.1f}"]
    for name in names:
        known = name in row.ours
        cells += [f"{row.ours[name]:.1f}", f"{row.ratio(name):.2f}"] if known else ["–", "–"]
    low, high = row.everywhere
    return [*cells, f"{row.memcpy:.1f}", f"{row.ours['auto'] / row.memcpy:.2f}", f"{low:.1f}–{high:.1f}"]


def _summary(rows: Sequence[Row], names: Sequence[str]) -> list[list[str]]:
    mean, least = ["mean", "", ""], ["least", "", ""]
    for name in names:
        ratios = [row.ratio(name) for row in rows if name in row.ours]
        mean += ["", f"{statistics.geometric_mean(ratios):.2f}"]
        least += ["", f"{min(ratios):.2f}"]
    return [[*mean, "", "", ""], [*least, "", "", ""]]


def legend(results: Results) -> list[str]:
    """What stands below the tables: what each peer was, what is missing, where and how it was measured."""
    peers = {job.peer: f"{job.peer}: {_library(job)}" for job in results.jobs}
    machine = f"{results.machine['cpu']}, {results.machine['cores']} usable"
    return [*peers.values(), *results.notes, f"{results.date}, {machine}: {results.command}"]


def _library(job: Job) -> str:
    library = " ".join(job.mpi.replace("Version:", "").split())
    return f"{library}, thread level {job.thread_level}" + (f", {job.settings}" if job.settings else "")


def show(results: Results, markdown: bool, picture: Path | None) -> None:
    """Print all tables, and the legend; draw ``picture``. Raises `click.ClickException` without any job."""
    if not results.jobs:
        raise click.ClickException("\n".join(["nothing could be measured", *results.notes]))
    for (collective, ranks), jobs in groups(results.jobs).items():
        lines = table(compare(jobs))
        click.echo(f"\n{collective}, {ranks} ranks:\n")
        if markdown:
            click.echo(as_markdown(lines))
        else:
            console = Console()
            console.width = max(console.width, WIDTH)
            console.print(as_rich(lines))
    click.echo("\n" + "\n".join(f"- {line}" for line in legend(results)))
    if picture is not None:
        plot(results, picture)


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", "---", *["--:"] * (len(lines[0]) - 2)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def as_rich(lines: Sequence[Sequence[str]]) -> Table:
    found = Table(box=None)
    for column, heading in enumerate(lines[0]):
        found.add_column(heading, justify="left" if column < 2 else "right")
    for line in lines[1:]:
        found.add_row(*line)
    return found


# --- the picture ---


def plot(results: Results, file: Path) -> None:
    """A panel for each collective (down) and number of ranks (across): the ratios over size."""
    from matplotlib.figure import Figure

    found = groups(results.jobs)
    collectives = list(dict.fromkeys(collective for collective, _ in found))
    ranks = sorted({number for _, number in found})
    figure = Figure(figsize=(5.5 * len(ranks), 3.5 * len(collectives)), layout="constrained")
    panels = figure.subplots(len(collectives), len(ranks), squeeze=False)
    places = itertools.product(collectives, ranks)
    for axes, (collective, number) in zip(panels.flat, places, strict=True):
        if (collective, number) in found:
            _panel(axes, f"{collective}, {number} ranks", compare(found[collective, number]))
        else:
            axes.set_axis_off()
    figure.savefig(file, dpi=150)


def _panel(axes: Any, title: str, rows: Sequence[Row]) -> None:
    for name, label in OURS.items():
        points = [(row.size, row.ratio(name)) for row in rows if name in row.ours]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)  # half as fast is as far from 1 as twice as fast
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), max(high, 2))  # small differences look small
    axes.yaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    marked = [row.size for row in rows[:: 1 + len(rows) // 8]]  # more labels would touch
    axes.set_xticks(marked, [format_size(size) for size in marked])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set(title=title, xlabel="bytes", ylabel="times as fast as the best peer")
    axes.legend()
