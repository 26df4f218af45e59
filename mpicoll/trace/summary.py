"""What a trace says: where the time went, what was hidden, who came late, how many bytes. Needs no MPI.

Events of a thread lie in each other, and a moment belongs to the innermost:

    evaluation    |---------------------------------|       evaluation      a + c
    Allreduce            |------------|                     communication   b
                   a           b            c

**Overlap**: the part of the time in which collectives are under way, on any of a rank's threads, in which its
program computes. What is not hidden in this way makes the training longer.

**Stragglers**: of each collective, the rank whose call came last, and by how much: the time for which all
others waited for this rank alone. Less than the clocks' uncertainty does not count.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpicoll.trace.chrome import COLLECTIVE, COMPUTE, PACK, PROGRAM, Event, Trace

COMMUNICATION = "communication"  # what the program does in collectives, or waiting for them
OTHER = "other"  # what nobody has recorded
SECOND = 1e6  # microseconds

Interval = tuple[float, float]


@dataclass(frozen=True)
class Overlap:
    """Of one rank: seconds in which collectives are under way, and how many of them it computes in."""

    rank: int
    communication: float
    hidden: float

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.hidden / self.communication if self.communication else 0.0


@dataclass(frozen=True)
class Straggler:
    """How often a rank came last, in so many collectives that it took part in, and by how many seconds."""

    rank: int
    collectives: int
    last: int
    total: float
    most: float


@dataclass(frozen=True)
class Traffic:
    """Collectives of a kind: calls, bytes and seconds, of the rank that has the most of each."""

    name: str
    op: str
    dtype: str
    algorithm: str
    calls: int
    bytes: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bytes of a rank's buffers per second."""
        return self.bytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Summary:
    """``phases``: seconds by rank and phase, on the program's thread; they add up to ``seconds``."""

    nranks: int
    seconds: float
    nevents: int
    phases: Mapping[int, Mapping[str, float]]
    overlap: Sequence[Overlap]
    stragglers: Sequence[Straggler]
    traffic: Sequence[Traffic]
    notes: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        for rows, own in ((found["overlap"], "share"), (found["traffic"], "bandwidth")):
            for row, each in zip(rows, self.overlap if own == "share" else self.traffic, strict=True):
                row[own] = getattr(each, own)
        return {**found, "phases": {str(rank): dict(own) for rank, own in self.phases.items()}}


def summarise(trace: Trace) -> Summary:
    """See the module."""
    begin, end = trace.span
    by_rank: dict[int, list[Event]] = {facts.rank: [] for facts in trace.ranks}
    for event in trace.events:
        by_rank[event.rank].append(event)
    return Summary(
        trace.nranks,
        (end - begin) / SECOND,
        len(trace.events),
        {rank: _phases(own, end - begin) for rank, own in by_rank.items()},
        [_overlap(rank, own) for rank, own in by_rank.items()],
        _stragglers(trace),
        _traffic(by_rank),
        _notes(trace),
    )


def phase(event: Event) -> str:
    """What the time of an event counts as."""
    if event.category == COMPUTE:
        return event.name
    return PACK if event.category == PACK else COMMUNICATION


def innermost(events: Iterable[Event]) -> list[tuple[float, float, Event]]:
    """Pieces of time, one after the other, with the innermost event; of a thread's, in order of begins."""
    pieces: list[tuple[float, float, Event]] = []
    under_way: list[Event] = []
    now = 0.0

    def go_on(until: float) -> None:
        nonlocal now
        while under_way and now < until:
            end = min(under_way[-1].end, until)
            if end > now:
                pieces.append((now, end, under_way[-1]))
                now = end
            if under_way[-1].end <= now:
                under_way.pop()
        now = until

    for event in events:
        go_on(event.begin)
        under_way.append(event)
    go_on(math.inf)
    return pieces


def _phases(events: Sequence[Event], span: float) -> dict[str, float]:
    """Seconds by phase, as they come, and what is left of ``span`` microseconds."""
    found: dict[str, float] = defaultdict(float)
    for begin, end, event in innermost(event for event in events if event.thread == PROGRAM):
        found[phase(event)] += (end - begin) / SECOND
    found[OTHER] = max(0.0, span / SECOND - sum(found.values()))
    return dict(found)


def _overlap(rank: int, events: Sequence[Event]) -> Overlap:
    collectives = _union((event.begin, event.end) for event in events if event.category == COLLECTIVE)
    pieces = innermost(event for event in events if event.thread == PROGRAM)
    computing = _union((begin, end) for begin, end, event in pieces if event.category == COMPUTE)
    both = _intersection(collectives, computing)
    return Overlap(rank, _length(collectives) / SECOND, _length(both) / SECOND)


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times, in intervals that do not meet."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _intersection(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """The times in both, of which each has intervals that do not meet."""
    common: list[Interval] = []
    i = j = 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            common.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def _stragglers(trace: Trace) -> list[Straggler]:
    uncertainty = {facts.rank: facts.uncertainty for facts in trace.ranks}
    calls: dict[str, list[Event]] = defaultdict(list)
    for event in trace.events:
        if "match" in event.args and event.args["ranks"] > 1:
            calls[event.args["match"]].append(event)
    taken: dict[int, int] = defaultdict(int)
    late: dict[int, list[float]] = defaultdict(list)  # microseconds
    for arrivals in calls.values():
        if len(arrivals) < arrivals[0].args["ranks"]:
            continue  # not everybody has written what it did
        *_, before, last = sorted(arrivals, key=lambda event: event.begin)
        for event in arrivals:
            taken[event.rank] += 1
        waited = last.begin - before.begin
        if waited > uncertainty[last.rank] + uncertainty[before.rank]:
            late[last.rank].append(waited)
    return [
        Straggler(rank, taken[rank], len(own), sum(own) / SECOND, max(own, default=0.0) / SECOND)
        for rank, own in ((facts.rank, late[facts.rank]) for facts in trace.ranks)
    ]


def _traffic(by_rank: Mapping[int, Sequence[Event]]) -> list[Traffic]:
    """What takes longest first."""
    most: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for events in by_rank.values():
        own: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0, 0, 0.0])
        for event in events:
            if event.category == COLLECTIVE:
                kind = (event.name, *(event.args.get(key, "") for key in ("op", "dtype", "algorithm")))
                found = 1, event.args.get("bytes", 0), (event.end - event.begin) / SECOND
                own[kind] = [a + b for a, b in zip(own[kind], found, strict=True)]
        for kind, sums in own.items():
            most[kind] = [max(a, b) for a, b in zip(most[kind], sums, strict=True)]
    rows = [
        Traffic(kind[0], kind[1], kind[2], kind[3], int(calls), int(nbytes), seconds)
        for kind, (calls, nbytes, seconds) in most.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)


def _notes(trace: Trace) -> list[str]:
    """What a reader should know before believing the rest."""
    notes = []
    for facts in trace.ranks:
        if facts.dropped:
            notes.append(f"rank {facts.rank}: no room for the last {facts.dropped} events")
        if not facts.at_the_end:
            notes.append(f"rank {facts.rank}: clocks were compared at the beginning only")
    if missing := trace.nranks - len(trace.ranks):
        notes.append(f"{missing} of {trace.nranks} ranks are missing")
    worst = max(trace.ranks, key=lambda facts: facts.uncertainty)
    if worst.uncertainty:
        notes.append(f"clocks agree within {worst.uncertainty:.1f} µs (rank {worst.rank})")
    else:
        notes.append("all ranks read the same clock")
    return notes
