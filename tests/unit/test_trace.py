"""Traces as files, pages and numbers: checked on one that is small enough to be counted by hand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mpicoll.trace.chrome import (
    COLLECTIVE,
    COMPUTE,
    PACK,
    PROGRAM,
    WAIT,
    Part,
    RankFacts,
    TraceError,
    Track,
    lanes,
    process_lines,
    read,
    write,
)
from mpicoll.trace.clocks import Correction, Meeting
from mpicoll.trace.command import command
from mpicoll.trace.page import html
from mpicoll.trace.summary import Overlap, Straggler, Traffic, summarise

from .rank_jobs import needs_ulfm, running

BROWSER = shutil.which("chromium") or ""
OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update
--disable-background-networking --disable-sync --dump-dom""".split()

REDUCED = {
    "match": "world/1:0",
    "ranks": 2,
    "bytes": 4000,
    "dtype": "float32",
    "op": "SUM",
    "algorithm": "ring",
}
MET = {"match": "world:0", "ranks": 2}
Row = tuple[str, str, int, int, dict[str, Any]]  # name, category, begin and end in microseconds, args
RANKS: list[dict[str, list[Row]]] = [
    {
        PROGRAM: [
            ("forward", COMPUTE, 0, 100, {}),
            ("backward", COMPUTE, 100, 300, {}),
            ("Barrier", COLLECTIVE, 150, 170, MET),  # within backward
            ("gradients: wait", WAIT, 300, 360, {}),
            ("update", COMPUTE, 360, 400, {}),
        ],
        "gradients 1": [
            ("Allreduce", COLLECTIVE, 200, 350, REDUCED),
            ("unpack", PACK, 350, 355, {"bytes": 9}),
        ],
    },
    {
        PROGRAM: [
            ("forward", COMPUTE, 0, 120, {}),
            ("Barrier", COLLECTIVE, 168, 172, MET),
            ("<b>&", COMPUTE, 380, 390, {}),
        ],
        "gradients 1": [("Allreduce", COLLECTIVE, 201, 352, REDUCED)],
    },
]


def part(rank: int, tracks: dict[str, list[Row]], uncertainty: float = 0.0, dropped: int = 0) -> Part:
    lines = process_lines(rank, "node<1>")
    for number, (name, rows) in enumerate(tracks.items()):
        track = Track(rank, number, name)
        for row in rows:
            track.add(row[0], row[1], 1000 * row[2], 1000 * row[3], row[4])
        lines += track.lines
    facts = RankFacts(rank, "node<1>", uncertainty, 0.0, 0.0, True, dropped)
    return Part(facts, 77, 2, {"world": [0, 1]}, lines)


PARTS = [part(0, RANKS[0]), part(1, RANKS[1], uncertainty=2.0)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "trace.json", PARTS)
    return tmp_path / "trace.json"


def test_the_file_is_what_perfetto_opens(file: Path) -> None:
    """Complete events in microseconds, no process or thread 0, names, and tracks without overlaps."""
    content = json.loads(file.read_text())
    assert content["displayTimeUnit"] == "ms"
    tracks: dict[Any, list[tuple[float, float]]] = {}
    names = {}
    for event in content["traceEvents"]:
        assert event["pid"] >= 1 and event["tid"] >= 1 and isinstance(event["args"], dict)
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert "ts" not in event
            names[event["name"], event["pid"], event["tid"]] = event["args"]
            continue
        assert event["ph"] == "X" and event["ts"] >= 0 and event["dur"] >= 0
        assert {"name", "cat"} < set(event)
        tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for pid, tid in tracks:
        assert names["process_name", pid, 1] == {"name": f"rank {pid - 1} on node<1>"}
        assert names["process_sort_index", pid, 1] == {"sort_index": pid - 1}
        assert ("thread_name", pid, tid) in names
    for events in tracks.values():
        open_until: list[float] = []
        for begin, end in sorted(events, key=lambda pair: (pair[0], -pair[1])):
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1]
            open_until.append(end)
    assert len(tracks) == 4 and [p.name for p in file.parent.iterdir()] == ["trace.json"]


def test_what_is_written_is_read_again(file: Path) -> None:
    found = read([file])
    assert (found.nranks, found.communicators, found.span) == (2, {"world": [0, 1]}, (0, 400))
    assert found.ranks == [p.facts for p in PARTS]
    assert all(a.begin <= b.begin for a, b in pairwise(found.events))
    again = {
        (e.rank, e.thread, e.name, e.category, e.begin, e.end, tuple(e.args.items())) for e in found.events
    }
    assert again == {
        (rank, thread, *row[:4], tuple(row[4].items()))
        for rank, tracks in enumerate(RANKS)
        for thread, rows in tracks.items()
        for row in rows
    }


def test_the_summary_is_what_one_counts_by_hand(file: Path) -> None:
    found = summarise(read([file]))
    us = 1e-6
    assert found.seconds == pytest.approx(400 * us)
    expected = [
        {"forward": 100, "backward": 180, "communication": 20 + 60, "update": 40, "other": 0},
        {"forward": 120, "communication": 4, "<b>&": 10, "other": 266},
    ]
    for rank, phases in enumerate(expected):
        assert found.phases[rank] == pytest.approx({name: us * t for name, t in phases.items()})
    # Rank 0 computes from 200 to 300 while its gradients are reduced; its barrier interrupts the backward.
    assert _rounded(found.overlap) == [Overlap(0, 170, 100), Overlap(1, 155, 0)]
    assert found.overlap[0].share == pytest.approx(100 / 170)
    # One microsecond, as for the allreduce, is less than the clocks are good for.
    assert _rounded(found.stragglers) == [Straggler(0, 2, 0, 0, 0), Straggler(1, 2, 1, 18, 18)]
    assert _rounded(found.traffic) == [
        Traffic("Allreduce", "SUM", "float32", "ring", 1, 4000, 151),
        Traffic("Barrier", "", "", "", 1, 0, 20),
    ]
    assert found.traffic[0].bandwidth == pytest.approx(4000 / (151 * us))
    assert found.notes == ["clocks agree within 2.0 µs (rank 1)"]


def _rounded(rows: Sequence[Any]) -> list[Any]:
    """Seconds as whole microseconds."""
    return [
        replace(row, **{k: round(1e6 * v) for k, v in vars(row).items() if isinstance(v, float)})
        for row in rows
    ]


def test_parts_make_a_trace_and_what_is_missing_is_said(tmp_path: Path) -> None:
    paths = [tmp_path / f"trace.rank{rank}.json" for rank in (0, 1)]
    facts = replace(PARTS[1].facts, dropped=7, at_the_end=False)
    for path, one in zip(paths, [PARTS[0], replace(PARTS[1], facts=facts)], strict=True):
        write(path, [one])
    together = read(paths)
    assert [each.rank for each in together.ranks] == [0, 1] and len(together.events) == 11
    assert summarise(together).notes == [
        "rank 1: no room for the last 7 events",
        "rank 1: clocks were compared at the beginning only",
        "clocks agree within 2.0 µs (rank 1)",
    ]
    alone = summarise(read(paths[:1]))
    assert alone.notes == ["1 of 2 ranks are missing", "all ranks read the same clock"]
    assert alone.stragglers[0].collectives == 0  # without the other rank nobody knows who was late
    with pytest.raises(TraceError, match=r"rank0.json: expected other ranks .* got rank 0 again"):
        read([paths[0], paths[0]])
    write(paths[1], [replace(PARTS[1], origin=78)])
    with pytest.raises(TraceError, match=r"rank1.json: expected a part of the same trace as .*rank0.json"):
        read(paths)


BAD = {
    "nothing": "",
    "text": "no trace",
    "a list": "[]",
    "an empty object": "{}",
    "another program's": json.dumps({"traceEvents": [], "otherData": {}}),
    "an event without times": json.dumps(
        {"traceEvents": [{"name": "a", "ph": "X", "pid": 1, "tid": 1}], "otherData": {"mpicoll": {}}}
    ),
    "brackets": "[" * 100_000,
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_file_that_is_no_trace_is_one_line_and_status_2(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    ran = CliRunner().invoke(command, [str(path)])
    assert ran.exit_code == 2
    assert f"{path}: expected a trace that mpicoll has written, got something else" in ran.output


DAMAGED = {
    "no origin": ('"origin"', '"begin"'),
    "no communicators": ('"communicators"', '"groups"'),
    "a number of ranks that is none": ('"nranks": 2', '"nranks": "two"'),
    "a rank that is no number": ('"rank": 1', '"rank": "one"'),
    "a fact that there is not": ('"rank": 1', '"rank": 1, "colour": 2'),
    "events of a rank that is not listed": ('"rank": 1', '"rank": 2'),
    "no time": ('"ts": ', '"ts": NaN, "at": '),
    "a time without end": ('"dur": ', '"dur": 1e999, "at": '),
    "a time that goes back": ('"dur": ', '"dur": -1, "at": '),
    "bytes that are no number": ('"bytes": ', '"bytes": "x", "at": '),
    "a call of nobody knows how many": ('"ranks": 2', '"others": 2'),
    "args that are none": ('"args": {"match"', '"args": null, "at": {"match"'),
}


@pytest.mark.parametrize(("old", "new"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_trace_is_one_line_and_status_2(tmp_path: Path, file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    path, page = tmp_path / "damaged.json", tmp_path / "page.html"
    path.write_text(text.replace(old, new))
    ran = CliRunner().invoke(command, [str(path), "--html", str(page)])
    assert (ran.exit_code, page.exists()) == (2, False)
    assert f"{path}: expected a trace that mpicoll has written, got something else" in ran.output


def test_an_empty_trace_and_missing_files_are_named(tmp_path: Path, file: Path) -> None:
    write(tmp_path / "empty.json", [part(0, {PROGRAM: []})])
    ran = CliRunner().invoke(command, [str(tmp_path / "empty.json")])
    assert ran.exit_code == 2 and "empty.json: expected events, got an empty trace" in ran.output
    ran = CliRunner().invoke(command, [str(tmp_path / "none.json")])
    assert ran.exit_code == 2 and "none.json' does not exist" in ran.output
    ran = CliRunner().invoke(command, [str(file), "--html", str(tmp_path / "missing" / "it.html")])
    assert ran.exit_code == 2 and "No such file or directory" in ran.output


def test_the_command_prints_tables_and_json(file: Path) -> None:
    ran = CliRunner().invoke(command, [str(file), "--json"])
    assert ran.exit_code == 0
    found = json.loads(ran.output)
    assert found["phases"]["0"]["backward"] == pytest.approx(180e-6)
    assert found["overlap"][0]["share"] == pytest.approx(100 / 170)
    assert found["stragglers"][1]["last"] == 1
    assert found["traffic"][0]["bandwidth"] == pytest.approx(4000 / 151e-6)
    ran = CliRunner().invoke(command, [str(file)])
    assert ran.exit_code == 0
    for words in ("2 ranks, 0.40 ms", "backward", "59%", "ring", "4,000", "note: clocks agree within 2.0"):
        assert words in ran.output


@pytest.mark.skipif(not BROWSER, reason="chromium is not installed")
def test_a_browser_shows_the_page(file: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert CliRunner().invoke(command, [str(file), "--html", str(page)]).exit_code == 0
    options = [*OPTIONS, f"--user-data-dir={tmp_path / 'user'}", page.as_uri()]
    shown = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=60, check=True).stdout
    assert shown.count("<svg") == 2 and shown.count("<table>") == 4
    titles = re.findall(r"<rect[^>]*>\s*<title>([^<]*)</title>", shown)
    assert {"forward", "backward", "communication", "pack", "update", "&lt;b&gt;&amp;"} == set(titles)
    first = shown[: shown.index("A part from the middle")]
    rows = re.findall(r'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="16" fill="([^"]+)">', first)
    # Of 1100 columns for 400 µs, rank 0: forward to 100, backward around a barrier at 150, wait, update.
    own = [number for x, y, width, _ in rows if y == "4" for number in (int(x) - 150, int(width))]
    assert own == pytest.approx([0, 275, 275, 138, 413, 55, 468, 357, 825, 165, 990, 110], abs=1)
    assert "180 µs" in shown and "59%" in shown and "18 µs" in shown
    assert "http" not in page.read_text()  # it needs no network


def test_no_two_pages_differ_in_colours(file: Path) -> None:
    found = read([file])
    pages = {html(found, summarise(found), "a<b") for _ in range(2)}
    assert len(pages) == 1 and "<h1>a&lt;b</h1>" in pages.pop()


def test_lanes_keep_overlapping_events_apart() -> None:
    assert list(lanes([(0, 5), (1, 3), (2, 9), (3, 4), (5, 6), (5, 7)])) == [0, 1, 2, 1, 0, 1]


def test_a_clock_is_corrected_along_a_line() -> None:
    """It shows 1000 when rank 0's shows 900, and 3000 when that shows 2880: 10 ns gained in 1000."""
    corrected = Correction(Meeting(1000, 100, 3), Meeting(3000, 120, 8))
    assert [corrected(at) for at in (1000, 2000, 3000, 4000)] == [900, 1890, 2880, 3870]
    assert corrected.uncertainty == 8 and corrected.drift == pytest.approx(0.01)
    early = Correction(Meeting(1000, 100, 3))
    assert (early(4000), early.uncertainty, early.drift) == (3900, 3, 0)


DYING = """
from mpicoll import trace

comm = mpicoll.Communicator(MPI.COMM_WORLD)
a, b = np.zeros(3), np.zeros(3)
try:
    with trace.record(comm, folder / "trace.json"):
        comm.Allreduce(a, b)
        if world == 1:
            die()  # which the others meet at the end of the block
except RankFailedError as error:
    write(f"rank {world}", str(error))
os._exit(0)
"""


@needs_ulfm
def test_survivors_of_a_killed_rank_write_what_they_have(tmp_path: Path) -> None:
    with running(tmp_path, 3, DYING, elastic=True) as job:
        said = [job.said(f"rank {rank}") for rank in (0, 2)]
        job.status()
    assert all("rank 1" in text and "recorder.py" not in text for text in said)
    folder = tmp_path / "said"
    assert not (folder / "trace.json").exists()
    found = read([folder / f"trace.rank{rank}.json" for rank in (0, 2)])
    assert {(event.rank, event.name) for event in found.events} == {(0, "Allreduce"), (2, "Allreduce")}
    assert "1 of 3 ranks are missing" in summarise(found).notes
