"""The README's tables, from the committed results: ``python -m mpicoll.bench.table bench/results/*.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from mpicoll.bench.allreduce import LARGE, geometric_mean

from mpicoll.sizes import format_size


def ratios(rows: list[dict[str, Any]], contender: str) -> dict[int, float]:
    """How many times faster than the library's own, by bytes."""
    return {row["bytes"]: row["microseconds"]["native"] / row["microseconds"][contender] for row in rows}


def table(results: list[dict[str, Any]], contender: str) -> list[str]:
    """Lines of Markdown: a line for each result, a column for each size."""
    sizes = [row["bytes"] for row in results[0]["rows"]]
    lines = [f"| ranks, library | {' | '.join(map(format_size, sizes))} | mean ≥ {format_size(LARGE)} |"]
    lines.append("|---" * (len(sizes) + 2) + "|")
    for result in results:
        times = ratios(result["rows"], contender)
        cells = [f"{times[size]:.2f}" for size in sizes]
        mean = geometric_mean([times[size] for size in sizes if size >= LARGE])
        library = " ".join(result["mpi"].replace("Version:", "").split())
        lines.append(f"| {result['ranks']}, {library} | {' | '.join(cells)} | **{mean:.2f}** |")
    return lines


@click.command(help=__doc__)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(files: tuple[Path, ...]) -> None:
    results = [json.loads(file.read_text()) for file in files]
    for contender in ("auto", "auto persistent"):
        click.echo("\n".join([f"\n{contender}:\n", *table(results, contender)]))


if __name__ == "__main__":
    main()
