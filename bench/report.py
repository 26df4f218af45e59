"""Results as JSON, with nccl-tests' keys, as its tables, and as a picture. Needs no MPI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mpicoll.sizes import format_size

from .data import Problem

if TYPE_CHECKING:
    from .timing import Timed

LARGE = 64 << 10  # bytes from which on means of ratios are taken

PLACES = ("out_of_place", "in_place")
HEADINGS = f"# {'size':>10}  {'count':>12}  {'type':>8}  {'redop':>6}  {'root':>6}"
UNITS = f"# {'(B)':>10}  {'(elements)':>12}  {'':8}  {'':6}  {'':6}"

Entry = dict[str, Any]
Contender = dict[str, Any]
Key = tuple[int, str, str]  # size, type, operation


def entry(problem: Problem, timed: Sequence[Timed]) -> Entry:
    """One contender's row: microseconds, and bandwidths in 10^9 bytes per second."""
    places: dict[str, Entry | None] = dict.fromkeys(PLACES)
    for time in timed:
        places[PLACES[time.in_place]] = _figures(problem, time)
    return {
        "size": problem.size,
        "count": problem.count,
        "type": problem.type,
        "redop": problem.redop,
        "root": problem.root,
        **places,
    }


def _figures(problem: Problem, timed: Timed) -> Entry:
    bandwidth = problem.size / timed.seconds / 1e9
    return {
        "time": timed.seconds * 1e6,
        "alg_bw": bandwidth,
        "bus_bw": bandwidth * problem.kind.factor(problem.nranks),
        "nwrong": timed.wrong,
    }


def nccl_table(heading: str, results: Sequence[Entry], outside: int | None) -> str:
    """As nccl-tests prints it; ``outside`` counts the elements that were written behind buffers."""
    titles = f"  {'time':>7}  {'algbw':>6}  {'busbw':>6}  {'#wrong':>6}"
    units = f"  {'(us)':>7}  {'(GB/s)':>6}  {'(GB/s)':>6}  {'':6}"
    values = [place["bus_bw"] for row in results for name in PLACES if (place := row[name]) is not None]
    verdict = "N/A" if outside is None else f"{outside} {'FAILED' if outside else 'OK'}"
    lines = [
        f"# {heading}",
        f"#{'':{len(HEADINGS)}}{'out-of-place':^{len(titles)}}{'in-place':^{len(titles)}}".rstrip(),
        HEADINGS + 2 * titles,
        (UNITS + 2 * units).rstrip(),
        *map(_row, results),
        f"# Out of bounds values : {verdict}",
        f"# Avg bus bandwidth    : {fmean(values):.6g}",
    ]
    return "\n".join(lines)


def _row(row: Entry) -> str:
    about = f"{row['size']:12}  {row['count']:12}  {row['type']:>8}  {row['redop']:>6}  {row['root']:6}"
    return about + "".join(_cells(row[name]) for name in PLACES)


def _cells(place: Entry | None) -> str:
    if place is None:
        return f"  {'N/A':>7}  {'N/A':>6}  {'N/A':>6}  {'N/A':>6}"
    wrong = "N/A" if place["nwrong"] is None else place["nwrong"]
    return f"  {_time(place['time']):>7}  {place['alg_bw']:6.2f}  {place['bus_bw']:6.2f}  {wrong:>6}"


def _time(microseconds: float) -> str:
    """With as many digits as mean something."""
    digits = 0 if microseconds >= 10_000 else 1 if microseconds >= 100 else 2
    return f"{microseconds:.{digits}f}"


def comparison(report: Mapping[str, Any]) -> Table:
    """Microseconds of calls with two buffers, and how many times faster than the MPI library's own."""
    times = {contender["name"]: _times(contender) for contender in report["contenders"]}
    native = times.get("native", {})
    compared = [f"{name} µs (×)" if native and name != "native" else f"{name} µs" for name in times]
    table = Table(box=None, title="# out-of-place", title_justify="left")
    for heading in ("size", "type", "redop", "memcpy µs", *compared):
        table.add_column(heading, justify="right")
    for key, copy in _copies(report).items():
        cells = [_compared(name, times[name].get(key), native.get(key)) for name in times]
        table.add_row(format_size(key[0]), *key[1:], _time(copy), *cells)
    if any(size >= LARGE for size, *_ in native):
        means = [_mean_ratio(times[name], native) if name != "native" else "" for name in times]
        table.add_row(f"mean ≥ {format_size(LARGE)}", "", "", "", *means)
    return table


def _times(contender: Contender) -> dict[Key, float]:
    rows = [row for row in contender["results"] if row["out_of_place"] is not None]
    return {_key(row): row["out_of_place"]["time"] for row in rows}


def _copies(report: Mapping[str, Any]) -> dict[Key, float]:
    """Microseconds of memcpy. The first contender is ours, and so has every row."""
    rows = report["contenders"][0]["results"]
    return {_key(row): copy["time"] for row, copy in zip(rows, report["memcpy"], strict=True)}


def _key(row: Entry) -> Key:
    return row["size"], row["type"], row["redop"]


def _compared(name: str, time: float | None, native: float | None) -> str:
    if time is None:
        return "-"
    ratio = f" ({native / time:.2f})" if native is not None and name != "native" else ""
    return _time(time) + ratio


def _mean_ratio(times: Mapping[Key, float], native: Mapping[Key, float]) -> str:
    ratios = [native[key] / time for key, time in times.items() if key in native and key[0] >= LARGE]
    return f"{geometric_mean(ratios):.2f}" if ratios else "-"


def plot(report: Mapping[str, Any], file: Path) -> None:
    """Time over size, a line for each contender, data type and operation, and the limit that copying sets."""
    from matplotlib.figure import Figure  # optional, and slow to import

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="bytes", ylabel="µs")
    lines = {"memcpy": _copies(report)} | {c["name"]: _times(c) for c in report["contenders"]}
    for name, times in lines.items():
        kinds = dict.fromkeys(key[1:] for key in times)
        for kind in kinds:
            points = [(key[0], time) for key, time in times.items() if key[1:] == kind]
            style = "k--" if name == "memcpy" else ".-"
            label = " ".join([name, *kind]) if len(kinds) > 1 else name
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_title(f"{report['collective']}, {report['ranks']} ranks, {report['mpi']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
