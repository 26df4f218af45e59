"""Traces as files: the JSON that Perfetto and Chrome open, written and read. Needs no MPI.

    {"traceEvents": [{"name": "Bcast", "cat": "collective", "ph": "X", "ts": 12.5, "dur": 3.25, ...}, ...],
     "displayTimeUnit": "ms",
     "otherData": {"mpicoll": {...}}}           which ranks there were, how exact their clocks are

``ts`` and ``dur`` are in microseconds, with three decimals. A rank is a process there, and its number is
``pid`` - 1: Perfetto and Linux take process 0 for the processor that idles, and thread 0 as well.

Ranks that could not meet at the end leave a file each. `read` puts such parts together.

Source: the Trace Event Format of the Chromium project; Perfetto's issues 394 and 560 about process 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import mpicoll
from mpicoll.files import replacing

COMPUTE = "compute"
COLLECTIVE = "collective"
PACK = "pack"
WAIT = "wait"
CATEGORIES = (COMPUTE, COLLECTIVE, PACK, WAIT)

PROGRAM = "program"  # the name of each rank's main thread
NANOSECONDS = 1000  # in a microsecond


class Event(NamedTuple):
    """What took from ``begin`` to ``end``, in microseconds, on a thread of a rank."""

    rank: int
    thread: str
    name: str
    category: str
    begin: float
    end: float
    args: Mapping[str, Any]


@dataclass(frozen=True)
class RankFacts:
    """About one rank's events. ``uncertainty``: microseconds by which its times may differ from rank 0's.

    ``offset`` is what has been taken off them, in microseconds, at the beginning; ``drift`` how much more for
    each microsecond that went by. ``at_the_end``: whether clocks were compared there, too. ``dropped``:
    events that there was no room for, the last ones.
    """

    rank: int
    host: str
    uncertainty: float
    offset: float
    drift: float
    at_the_end: bool
    dropped: int


@dataclass(frozen=True)
class Part:
    """A rank's events, as it writes them; ``communicators``: the ranks of each that it has used, by name."""

    facts: RankFacts
    origin: int  # nanoseconds of rank 0's clock, from which times count
    nranks: int
    communicators: Mapping[str, list[int]]
    lines: Sequence[str]  # an event each, in JSON


@dataclass(frozen=True)
class Trace:
    """What has been read: events in the order of their begins, and the facts of the ranks they are of."""

    nranks: int
    ranks: Sequence[RankFacts]
    communicators: Mapping[str, list[int]]
    events: Sequence[Event]

    @property
    def span(self) -> tuple[float, float]:
        """From the first begin to the last end, in microseconds."""
        return self.events[0].begin, max(event.end for event in self.events)


class TraceError(ValueError):
    """A file that is no trace, or that does not go with the others; the text begins with its name."""


class UnwritableError(OSError):
    """A trace that cannot be written where it should be; known on all ranks."""


# -- writing


class Track:
    """Events of one thread of a rank, as lines of JSON."""

    def __init__(self, rank: int, number: int, name: str) -> None:
        self._pid, self._tid = rank + 1, number + 1
        self.lines = [
            json.dumps({"name": what, "ph": "M", "pid": self._pid, "tid": self._tid, "args": args})
            for what, args in (("thread_name", {"name": name}), ("thread_sort_index", {"sort_index": number}))
        ]

    def add(self, name: str, category: str, begin: int, end: int, args: Mapping[str, Any]) -> None:
        """An event; times are nanoseconds since the origin."""
        times = {"ts": begin / NANOSECONDS, "dur": (end - begin) / NANOSECONDS}
        event = {"name": name, "cat": category, "ph": "X", **times, "pid": self._pid, "tid": self._tid}
        self.lines.append(json.dumps({**event, "args": args}))


def process_lines(rank: int, host: str) -> list[str]:
    """What a rank is called."""
    named = {"process_name": {"name": f"rank {rank} on {host}"}, "process_sort_index": {"sort_index": rank}}
    return [
        json.dumps({"name": k, "ph": "M", "pid": rank + 1, "tid": 1, "args": v}) for k, v in named.items()
    ]


def lanes(intervals: Iterable[tuple[int, int]]) -> Iterator[int]:
    """For each (begin, end), ascending, the first lane that is free then: in a track nothing may overlap."""
    ends: list[int] = []
    for begin, end in intervals:
        lane = next((i for i, free_from in enumerate(ends) if free_from <= begin), len(ends))
        ends[lane : lane + 1] = [end]
        yield lane


def write(path: Path, parts: Sequence[Part]) -> None:
    """Write the parts of one trace, whole or not at all. Raises OSError."""
    facts = {
        "version": mpicoll.__version__,
        "origin": parts[0].origin,
        "nranks": parts[0].nranks,
        "communicators": {name: ranks for part in parts for name, ranks in part.communicators.items()},
        "ranks": [asdict(part.facts) for part in parts],
    }
    with replacing(path) as temporary, temporary.open("w") as file:
        file.write('{"traceEvents": [\n')
        for i, part in enumerate(parts):
            file.write(",\n" * (i > 0))
            file.write(",\n".join(part.lines))
        file.write(f'\n],\n"displayTimeUnit": "ms",\n"otherData": {{"mpicoll": {json.dumps(facts)}}}}}\n')


# -- reading


def read(paths: Sequence[Path]) -> Trace:
    """The trace in a file, or in several that are parts of one. Raises `TraceError`, and OSError."""
    facts: list[RankFacts] = []
    communicators: dict[str, list[int]] = {}
    events: list[Event] = []
    origin, nranks = None, 0
    for path in paths:
        about, own, found = _read_one(path)
        origin, nranks = origin or about["origin"], about["nranks"]
        if about["origin"] != origin:
            raise TraceError(f"{path}: expected a part of the same trace as {paths[0]}, got one of another")
        if twice := {each.rank for each in own} & {each.rank for each in facts}:
            raise TraceError(
                f"{path}: expected other ranks than the files before, got rank {min(twice)} again"
            )
        facts += own
        communicators |= about["communicators"]
        events += found
    if not events:
        raise TraceError(f"{paths[0]}: expected events, got an empty trace")
    events.sort(key=lambda event: (event.begin, -event.end))
    return Trace(nranks, sorted(facts, key=lambda each: each.rank), communicators, events)


def _read_one(path: Path) -> tuple[dict[str, Any], list[RankFacts], list[Event]]:
    """What holds for all ranks, what for each of those in the file, and their events."""
    try:
        content = json.loads(path.read_text(), parse_constant=_no_number)
        about, raw = content["otherData"]["mpicoll"], content["traceEvents"]
        facts = [RankFacts(**each) for each in about["ranks"]]
        _expect(type(about["origin"]) is int and type(about["nranks"]) is int, "origin and nranks", about)
        _expect(isinstance(about["communicators"], dict), "communicators", about["communicators"])
        ranks = {each.rank for each in facts}
        threads = {
            (event["pid"], event["tid"]): event["args"]["name"]
            for event in raw
            if event["name"] == "thread_name"
        }
        events = [
            Event(
                event["pid"] - 1,
                threads[event["pid"], event["tid"]],
                event["name"],
                event["cat"],
                event["ts"],
                event["ts"] + event["dur"],
                event["args"],
            )
            for event in raw
            if event["ph"] == "X"
        ]
        for event in events:
            _check(event, ranks)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise TraceError(
            f"{path}: expected a trace that mpicoll has written, got something else ({why})"
        ) from None
    return about, facts, events


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no time")


def _expect(right: bool, what: str, got: Any) -> None:
    if not right:
        raise ValueError(f"{what}: {got!r:.60}")


def _check(event: Event, ranks: set[int]) -> None:
    """Raise `ValueError` for what a summary could not be made of."""
    args = event.args
    _expect(event.rank in ranks, "an event of a rank that is not listed", event.rank)
    _expect(0 <= event.end - event.begin < inf, "the times of an event", event)
    _expect(isinstance(args, dict), "the args of an event", args)
    numbers = [args.get("bytes", 0), args["ranks"] if "match" in args else 0]
    _expect(all(type(number) is int for number in numbers), "the args of an event", args)
