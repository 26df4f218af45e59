"""A trace as one page of HTML, which needs nothing else: tables, and the timeline drawn as SVG. Needs no MPI.

The timeline has a row for each thread of each rank, as many columns as a screen, and in each column the
phase that takes most of it: so a picture of a million events is no larger than one of a thousand. Below it is
a part from the middle in which single events can be told from each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from string import Template
from zlib import crc32

from mpicoll.trace.chrome import PACK, PROGRAM, Event, Trace
from mpicoll.trace.summary import COMMUNICATION, OTHER, Summary, innermost, phase

COLUMNS = 1100  # of the timeline
ROW, GAP, LEFT, TOP = 16, 4, 150, 4  # pixels
EXCERPT = 60  # events of one program that the second timeline shows

# Colours that are told apart by those who do not see all of them (Okabe and Ito).
COLOURS = {
    COMMUNICATION: "#d55e00",
    PACK: "#cc79a7",
    "forward": "#56b4e9",
    "backward": "#0072b2",
    "update": "#009e73",
    "loss": "#6a3d9a",
    "setup": "#c9b8a8",
    "data": "#f0e442",
    "evaluation": "#999999",
    OTHER: "#ffffff",
}
MORE_COLOURS = ("#e69f00", "#8dd3c7", "#bebada", "#b3de69", "#fccde5", "#80b1d3")

Rows = dict[tuple[int, str], list[Event]]


def html(trace: Trace, summary: Summary, title: str) -> str:
    """The page."""
    rows: Rows = defaultdict(list)
    for event in trace.events:
        rows[event.rank, event.thread].append(event)
    begin, end = _excerpt(trace)
    names = list(dict.fromkeys(name for own in summary.phases.values() for name in own))
    beside = [phase(event) for event in trace.events if event.thread != PROGRAM]
    shown = list(dict.fromkeys([*(name for name in names if name != OTHER), *sorted(set(beside))]))
    template = Template((files("mpicoll.trace") / "report.html").read_text())
    return template.substitute(
        title=escape(title),
        about=f"{summary.nranks} ranks, {_seconds(summary.seconds)}, {summary.nevents:,} events",
        notes="".join(f"<li>{escape(note)}</li>" for note in summary.notes),
        legend="".join(
            f'<span><i style="background:{colour(name)}"></i>{escape(name)}</span>' for name in shown
        ),
        timeline=_timeline(rows, *trace.span, trace.span[0]),
        excerpt=_timeline(rows, begin, end, trace.span[0]),
        phases=_table(
            ["rank", *names],
            [
                [str(rank), *(_seconds(own.get(name, 0.0)) for name in names)]
                for rank, own in summary.phases.items()
            ],
        ),
        overlap=_table(
            ["rank", "communication", "hidden behind compute", "share"],
            [
                [str(o.rank), _seconds(o.communication), _seconds(o.hidden), f"{o.share:.0%}"]
                for o in summary.overlap
            ],
        ),
        stragglers=_table(
            ["rank", "collectives", "came last", "others waited", "at most"],
            [
                [str(s.rank), str(s.collectives), str(s.last), _seconds(s.total), _seconds(s.most)]
                for s in summary.stragglers
            ],
        ),
        traffic=_table(
            ["collective", "calls", "bytes", "time", "bytes/call", "GB/s"],
            [
                [
                    " ".join(
                        filter(None, [t.name, t.op, t.dtype, f"by {t.algorithm}" if t.algorithm else ""])
                    ),
                    f"{t.calls:,}",
                    f"{t.bytes:,}",
                    _seconds(t.seconds),
                    f"{t.bytes / t.calls:,.0f}",
                    f"{t.bandwidth / 1e9:.3f}",
                ]
                for t in summary.traffic
            ],
        ),
    )


def colour(name: str) -> str:
    """Of a phase, the same on every page."""
    return COLOURS.get(name) or MORE_COLOURS[crc32(name.encode()) % len(MORE_COLOURS)]


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return (
                f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:,.0f} {unit}"
            )
    return f"{seconds * 1e6:.3g} µs"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{escape(head)}</th>" for head in heads)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _excerpt(trace: Trace) -> tuple[float, float]:
    """From the middle of the first rank's program."""
    own = [event for event in trace.events if event.rank == trace.ranks[0].rank and event.thread == PROGRAM]
    some = own[max(0, (len(own) - EXCERPT) // 2) :][:EXCERPT] or trace.events[:EXCERPT]
    return some[0].begin, max(event.end for event in some)


def _timeline(rows: Rows, begin: float, end: float, origin: float) -> str:
    """SVG of the time from ``begin`` to ``end``, in microseconds; the axis counts from ``origin``."""
    ordered = sorted(rows, key=lambda row: (row[0], row[1] != PROGRAM, row[1]))
    height = TOP + len(ordered) * (ROW + GAP) + ROW
    drawn = [f'<svg viewBox="0 0 {LEFT + COLUMNS} {height}" width="100%" role="img">']
    for number, (rank, thread) in enumerate(ordered):
        y = TOP + number * (ROW + GAP)
        label = f"rank {rank}" if thread == PROGRAM else thread
        drawn.append(f'<text x="{LEFT - 6}" y="{y + ROW - 4}" text-anchor="end">{escape(label)}</text>')
        for first, last, name in _runs(rows[rank, thread], begin, end):
            place = f'x="{LEFT + first}" y="{y}" width="{last - first}" height="{ROW}"'
            drawn.append(f'<rect {place} fill="{colour(name)}"><title>{escape(name)}</title></rect>')
    for tenth in range(0, 11, 2):
        at = _seconds((begin + (end - begin) * tenth / 10 - origin) / 1e6)
        x = LEFT + COLUMNS * tenth / 10
        anchor = "end" if tenth == 10 else "middle"
        drawn.append(f'<text x="{x:g}" y="{height - 3}" text-anchor="{anchor}">{at}</text>')
    return "\n".join(drawn) + "</svg>"


def _runs(events: Sequence[Event], begin: float, end: float) -> Iterator[tuple[int, int, str]]:
    """(first column, the one after the last, phase) of a row, without those in which little happens."""
    width = max(end - begin, 1e-9) / COLUMNS  # microseconds of a column
    filled: list[dict[str, float]] = [defaultdict(float) for _ in range(COLUMNS)]
    for since, until, event in innermost(events):
        since, until = max(since, begin), min(until, end)
        if since >= until:
            continue
        first, last = int((since - begin) / width), min(int((until - begin) / width), COLUMNS - 1)
        for column in range(first, last + 1):
            left = begin + column * width
            filled[column][phase(event)] += min(until, left + width) - max(since, left)
    chosen = []
    for times in filled:
        times[OTHER] = width - sum(times.values())
        chosen.append(max(times, key=lambda name: times[name]))
    for name, run in groupby(range(COLUMNS), key=chosen.__getitem__):
        columns = list(run)
        if name != OTHER:
            yield columns[0], columns[-1] + 1, name
