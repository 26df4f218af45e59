"""What the training benchmarks found, as JSON, as tables, and in ``docs/training.md``.

    python -m mpicoll.bench.training_report docs/training.md

writes anew what stands in a document between ``<!-- begin NAME -->`` and ``<!-- end -->``: the tables of
`SECTIONS` from the JSON files in ``bench/results``, and drawings of pipeline schedules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from .compression_report import as_markdown, as_rich
from .training_setups import BATCH, EXACT, SHORTFALL, STEPS

WIDTH = 160  # characters that a table needs
MISSING = "–"
SHOWN_RANKS = (2, 4, 8)  # of the strategies, side by side
RESULTS = Path(__file__).parent / "results"
SECTION = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
DRAWN = (("gpipe", 3, 4), ("1f1b", 3, 4))  # schedule, stages, pieces

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One setup at one number of ranks.

    ``difference`` is the largest of a parameter from one process, ``bound`` what it may be (None: it takes
    other steps), ``accuracy`` a fraction of the test set, ``sent`` bytes per step, the mean over ranks.
    """

    ranks: int
    name: str
    mesh: dict[str, int]
    bound: float | None
    difference: float
    accuracy: float
    sent: float
    steps_per_second: float


@dataclass(frozen=True)
class Job:
    """What one job has found so far, and which MPI library it ran on."""

    mpi: str
    rows: list[Row]

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Job:
        """The inverse of `dumps`."""
        content = json.loads(text)
        return cls(content["mpi"], [Row(**row) for row in content["rows"]])


@dataclass(frozen=True)
class Results:
    """All that the tables need. ``failures``: a line for each setup that could not be trained."""

    command: str
    date: str
    machine: dict[str, Any]
    mpi: str
    epochs: int
    failures: list[str]
    rows: list[Row]


def dumps(results: Results) -> str:
    """As JSON."""
    return json.dumps(asdict(results), indent=1) + "\n"


def loads(text: str) -> Results:
    """The inverse of `dumps`; an exception of some kind for any other text."""
    content = json.loads(text)
    return Results(**{**content, "rows": [Row(**row) for row in content["rows"]]})


def on_ranks(number: int) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number} rank{'s' * (number != 1)}"


def complaints(results: Results) -> list[str]:
    """What is not as it should be, a line each."""
    return [*results.failures, *filter(None, (_complaint(row, results.rows) for row in results.rows))]


def _complaint(row: Row, rows: Sequence[Row]) -> str:
    where = f"{row.name} on {on_ranks(row.ranks)}"
    if row.bound is not None and not row.difference <= row.bound:
        return f"{where}: expected parameters within {row.bound:g} of one process's, got {row.difference:.2g}"
    best = max((other.accuracy for other in rows if other.name == "allreduce"), default=0.0)
    if row.bound is None and not row.accuracy >= best - SHORTFALL:
        return f"{where}: expected an accuracy of at least {best - SHORTFALL:.1%}, got {row.accuracy:.1%}"
    return ""


# -- tables


def strategies(results: Results) -> list[list[str]]:
    """A line for each strategy, over all numbers of ranks; ranks side by side for what depends on them."""
    rows = [row for row in results.rows if not row.mesh]
    shown = [ranks for ranks in SHOWN_RANKS if any(row.ranks == ranks for row in rows)]
    ranks = [f"{n} ranks" for n in shown]
    headings = [
        "strategy",
        "difference",
        "accuracy %",
        *(f"KB per step, {text}" for text in ranks),
        *(f"steps/s, {text}" for text in ranks),
    ]
    most = sorted(rows, key=lambda row: -row.ranks)  # one rank does not have all of them
    names = dict.fromkeys(row.name for row in most)
    return [headings, *(_strategy([row for row in rows if row.name == name], shown) for name in names)]


def _strategy(rows: Sequence[Row], shown: Sequence[int]) -> list[str]:
    by_ranks = {row.ranks: row for row in rows}
    found = [by_ranks.get(ranks) for ranks in shown]
    lowest, highest = (f"{100 * choice(row.accuracy for row in rows):.1f}" for choice in (min, max))
    return [
        rows[0].name,
        _difference(rows[0].bound, max(row.difference for row in rows)),
        lowest if lowest == highest else f"{lowest} to {highest}",
        *(MISSING if row is None else _kilobytes(row) for row in found),
        *(MISSING if row is None else f"{row.steps_per_second:,.0f}" for row in found),
    ]


def meshes(results: Results) -> list[list[str]]:
    """A line for each mesh."""
    headings = ["ranks", "data × pipeline × tensor", "difference", "accuracy %", "KB per step", "steps/s"]
    return [headings, *(_mesh(row) for row in results.rows if row.mesh)]


def _mesh(row: Row) -> list[str]:
    return [
        str(row.ranks),
        " × ".join(map(str, row.mesh.values())),
        _difference(row.bound, row.difference),
        f"{100 * row.accuracy:.1f}",
        _kilobytes(row),
        f"{row.steps_per_second:,.0f}",
    ]


def _difference(bound: float | None, difference: float) -> str:
    if bound is None:
        return "other steps"
    return "none" if difference == EXACT else f"{difference:.0e}"


def _kilobytes(row: Row) -> str:
    return f"{row.sent / 1000:.1f}"


def legend(results: Results) -> list[str]:
    """How to read the tables."""
    ranks = [str(ranks) for ranks in sorted({row.ranks for row in results.rows})]
    return [
        f"difference: the largest of any parameter from one process's, after {STEPS} steps of {BATCH} "
        f"samples in float64, at {_listed(ranks)} ranks; none: the same bits",
        f"accuracy: on test samples after {results.epochs} epochs in float32, the lowest and highest over "
        "these numbers of ranks",
        "KB per step: 1000 bytes that a rank sends, the mean over ranks; steps/s: of the slowest rank",
        _measured(asdict(results)),
    ]


def _listed(texts: Sequence[str]) -> str:
    *rest, last = texts
    return f"{', '.join(rest)} and {last}" if rest else last


def _measured(facts: Facts) -> str:
    machine = facts["machine"]
    where = f"{machine['cpu']}, {machine['cores']} usable, {facts['mpi']}"
    return f"measured {facts['date']}, {where}: `{facts['command']}`"


def show(results: Results, markdown: bool) -> None:
    """Print the tables and how to read them."""
    # Open MPI gives ranks a terminal, also where what they say goes to a file.
    console = Console(width=WIDTH, force_terminal=False)
    for lines in (strategies(results), meshes(results)):
        if markdown:
            click.echo(as_markdown(lines) + "\n")
        else:
            console.print(as_rich(lines), "")
    click.echo(_bullets(legend(results)))


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


# -- sections of the document


def _strategies_section(facts: Facts) -> str:
    results = loads(json.dumps(facts))
    return f"{as_markdown(strategies(results))}\n\n{_bullets(legend(results))}"


def _meshes_section(facts: Facts) -> str:
    return as_markdown(meshes(loads(json.dumps(facts))))


def _throughput_section(facts: Facts) -> str:
    ranks = on_ranks(facts["ranks"])
    lines = [["", "samples/s, 1 rank", f"samples/s, {ranks}", "efficiency", "loss"]]
    for row in facts["rows"]:
        speeds = [f"{row['alone']:,.0f}", f"{row['together']:,.0f}"]
        lines.append([row["name"], *speeds, f"{row['efficiency']:.0%}", f"{row['loss']:.4f}"])
    below = [
        f"{facts['parameters']:,} parameters, batches of {facts['batch']} over all ranks, SGD with momentum; "
        f"{facts['binding']}",
        f"efficiency: samples/s on {ranks} over {facts['ranks']} times those of 1; loss: of the last epoch, "
        f"on {ranks}",
        *facts["notes"],
        _measured(facts),
    ]
    return f"{as_markdown(lines)}\n\n{_bullets(below)}"


def _uneven_section(facts: Facts) -> str:
    every = [
        ("a fast rank alone", "fast"),
        ("the slow rank alone", "slow"),
        ("ideal: the sum of all ranks alone", "ideal"),
        ("allreduce, equal parts", "even"),
        ("allreduce, `balance=True`", "balanced"),
        ("ps-async: a fast rank beside fast ones", "async_beside_fast"),
        ("ps-async: a fast rank beside the slow one", "async_beside_slow"),
    ]
    lines = [["", "samples/s", "of the ideal", "of that beside fast ones"]]
    for text, name in every:
        ratios = [MISSING, f"{facts[name] / facts['async_beside_fast']:.0%}"]
        if not name.startswith("async"):
            ratios = [f"{facts[name] / facts['ideal']:.0%}", MISSING]
        lines.append([text, f"{facts[name]:,.0f}", *ratios])
    shares = _listed([f"{share:.0%}" for share in facts["shares"]])
    below = [
        f"{facts['ranks']} ranks, of which the last needs {facts['slowdown']:g} times as long for its "
        f"gradients; batches of {facts['batch']}; {facts['binding']}",
        f"balanced shares of a batch, at the end: {shares}",
        _measured(facts),
    ]
    return f"{as_markdown(lines)}\n\n{_bullets(below)}"


def _pipelines_section() -> str:
    """Drawings of schedules."""
    from mpicoll.train.pipeline import SCHEDULES  # starts MPI
    from mpicoll.train.pipeline_drawing import draw_text

    drawings = [
        f"{name}, {stages} stages, {pieces} pieces\n\n{draw_text(SCHEDULES[name](stages, pieces))}"
        for name, stages, pieces in DRAWN
    ]
    return "```text\n" + "\n\n".join(drawings) + "\n```"


SECTIONS: dict[str, tuple[str, Callable[[Facts], str]]] = {
    "strategies": ("training.json", _strategies_section),
    "meshes": ("training.json", _meshes_section),
    "throughput-512": ("training-throughput-512.json", _throughput_section),
    "throughput-1024": ("training-throughput-1024.json", _throughput_section),
    "uneven": ("training-uneven.json", _uneven_section),
}


def section(name: str, results: Path) -> str:
    """What stands in the section of this name."""
    if name == "pipelines":
        return _pipelines_section()
    file, write = SECTIONS[name]
    return write(json.loads((results / file).read_text()))


def updated(document: str, results: Path = RESULTS) -> str:
    """``document`` with all of its sections written anew; ``results``: the folder of the JSON files."""
    return SECTION.sub(lambda found: f"{found[1]}\n{section(found[2], results)}\n\n{found[3]}", document)


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--results", type=click.Path(exists=True, file_okay=False, path_type=Path), default=RESULTS)
def main(file: Path, results: Path) -> None:
    """Write the tables and drawings in FILE anew, from what the training benchmarks have written."""
    file.write_text(updated(file.read_text(), results))


if __name__ == "__main__":
    main()
