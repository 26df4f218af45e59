"""Schedules drawn as text and as pictures: everything that is sent is shown, and what is held is right."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from mpicoll import algorithms, draw
from mpicoll.algorithms.hierarchical import Topology
from mpicoll.cli import main
from mpicoll.draw.figure import draw_figure
from mpicoll.draw.story import tell, title
from mpicoll.draw.webpage import as_data
from mpicoll.schedule import COPY, REDUCE, Round, Schedule

from .full_disk import files_no_longer_than

EVERY = [(collective, name) for collective in algorithms.ALGORITHMS for name in algorithms.names(collective)]
RANKS = (1, 2, 3, 5)
HIERARCHICAL = algorithms.hierarchical_schedule("allreduce", Topology.of_sizes([2, 3]), "ring")

RING = """\
ring allreduce: 3 ranks, 4 rounds, 3 chunks

               rank 0 (a)   rank 1 (b)   rank 2 (c)
        holds  a0-2         b0-2         c0-2
round 0 sends  a2 +> 1      b0 +> 2      c1 +> 0
        holds  a0 (a+c)1    b1 (a+b)2    (b+c)0 c2
round 1 sends  (a+c)1 +> 1  (a+b)2 +> 2  (b+c)0 +> 0
        holds  0*           1*           2*
round 2 sends  0* -> 1      1* -> 2      2* -> 0
        holds  0,2*         0-1*         1-2*
round 3 sends  2* -> 1      0* -> 2      1* -> 0
        holds  0-2*         0-2*         0-2*

a0      a's part of chunk 0
(a+b)0  its sum with b's
0*      chunk 0, complete
+>      is added to the receiver's
->      is copied
.       nothing; what is not needed again is left out"""


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["draw", *arguments])


def messages(schedule: Schedule) -> list[tuple[int, int, int, bool]]:
    """Round, source, destination, and whether it is added, of each message."""
    sent = {(k, t.src, t.dst, t.op == REDUCE) for k, round_ in enumerate(schedule.rounds) for t in round_}
    return sorted(sent)


# --- the story ---


@pytest.mark.parametrize(("collective", "algorithm"), EVERY)
def test_a_story_ends_with_the_results_and_nothing_else(collective: str, algorithm: str) -> None:
    for nranks in RANKS:
        schedule = algorithms.schedule(collective, algorithm, nranks)
        story = tell(schedule, 5, "")
        end = story.steps[-1].held if story.steps else story.start
        results = [
            (rank, chunk) for rank in range(nranks) for chunk in sorted(schedule.outputs(rank).tolist())
        ]
        assert list(end) == results
        assert all(story.is_complete(place, contributions) for place, contributions in end.items())


def test_an_exchange_reads_what_was_there_before_it() -> None:
    story = tell(algorithms.schedule("allreduce", "recursive_doubling", 4), 4, "")
    assert [sorted(held) for held in story.steps[0].held.values()] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_a_value_is_held_until_it_is_sent_for_the_last_time_or_overwritten() -> None:
    rounds = [Round.of(0, 1, 0, REDUCE), Round.of(2, 1, 0, REDUCE), Round.of(1, 0, 0, COPY)]
    story = tell(Schedule.from_rounds("odd", "reduce", 3, 1, rounds), 3, "")
    held = [{rank: sorted(ranks) for (rank, _), ranks in step.held.items()} for step in story.steps]
    assert held == [{1: [0, 1], 2: [2]}, {1: [0, 1, 2]}, {0: [0, 1, 2]}]


def test_what_is_wrong_is_drawn_as_it_is() -> None:
    lost = Schedule.from_rounds("lost", "allreduce", 3, 1, [Round.of([0, 1], [1, 2], 0, REDUCE)])
    assert re.search(r"holds  a0 +\(a\+b\)0 +\(b\+c\)0\n", draw.text(lost))


# --- text ---


def test_a_ring_as_text() -> None:
    assert draw.text(algorithms.schedule("allreduce", "ring", 3)) == RING


@pytest.mark.parametrize(("collective", "algorithm"), EVERY)
def test_text_has_an_arrow_for_every_message(collective: str, algorithm: str) -> None:
    for nranks in RANKS:
        schedule = algorithms.schedule(collective, algorithm, nranks)
        drawn, _, _ = draw.text(schedule).rpartition("\n\n")
        added = [reduce for *_, reduce in messages(schedule)]
        assert (drawn.count("+>"), drawn.count("->")) == (sum(added), len(added) - sum(added))
        assert drawn.startswith(title(schedule) + "\n\n")


def test_columns_that_do_not_fit_follow_below() -> None:
    schedule = algorithms.schedule("allreduce", "ring", 16)
    drawn = draw.text(schedule, width=100)
    assert max(map(len, drawn.splitlines())) <= 100
    assert re.findall(r"rank (\d+)", drawn) == [str(rank) for rank in range(16)]
    assert drawn.count("round 29 sends") > 1
    assert "(a+c..p)1" in drawn


def test_long_cells_are_broken_between_values_but_not_at_arrows() -> None:
    drawn, _, _ = draw.text(algorithms.schedule("alltoall", "bruck", 13), width=1).rpartition("\n\n")
    assert "0.3 0.5 0.7 0.9 0.11\n" in drawn
    assert len(re.findall(r"\d+\.\d+ -> \d+$", drawn, re.MULTILINE)) == 4 * 13
    assert max(map(len, drawn.splitlines()[1:])) <= len("round 0 sends  ") + 24


# --- pictures ---


def arrows(figure: Any) -> list[str]:
    """The names of the arrows."""
    return sorted(patch.get_gid() for patch in figure.axes[0].patches if patch.get_gid())


@pytest.mark.parametrize(("collective", "algorithm"), EVERY)
def test_a_figure_has_an_arrow_for_every_message(collective: str, algorithm: str) -> None:
    check_figure(algorithms.schedule(collective, algorithm, 3))


@pytest.mark.parametrize("nranks", [1, 2, 5])
def test_figures_of_other_numbers_of_ranks(nranks: int) -> None:
    check_figure(algorithms.schedule("allreduce", "rabenseifner", nranks))
    check_figure(algorithms.schedule("alltoall", "bruck", nranks))


def check_figure(schedule: Schedule) -> None:
    pytest.importorskip("matplotlib")
    names = sorted(f"message-{k}-{src}-{dst}" for k, src, dst, _ in messages(schedule))
    assert arrows(draw_figure(tell(schedule, 5, ""))) == names


def test_an_svg_is_xml_with_the_arrows_and_the_title(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    schedule = replace(HIERARCHICAL, name="<odd & name>")
    for name in ("first.svg", "second.svg"):
        draw.picture(schedule, tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    root = ElementTree.parse(tmp_path / "first.svg").getroot()
    found = [element.get("id", "") for element in root.iter()]
    assert len([name for name in found if name.startswith("message-")]) == len(messages(schedule)) == 20
    texts = ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "<odd & name> allreduce: 5 ranks, 4 rounds, 4 chunks" in texts
    assert {"rank 4", "round 3", "+2-3", "0-1"} <= set(texts)


def test_labels_of_a_round_lie_apart() -> None:
    pytest.importorskip("matplotlib")
    figure = draw_figure(tell(algorithms.schedule("allreduce", "ring", 4), 4, ""))
    labels = [t for t in figure.axes[0].texts if re.fullmatch(r"\+?[\d-]+", t.get_text())]
    figure.draw_without_rendering()
    boxes = [label.get_bbox_patch().get_window_extent() for label in labels]
    assert len(boxes) == 24
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw.picture(algorithms.schedule("barrier", "dissemination", 1), tmp_path / "one.PNG")
    assert (tmp_path / "one.PNG").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = call("allreduce", "--algorithm", "ring", "-o", str(tmp_path / "ring.svg"))
    assert outcome.exit_code == 2
    assert "matplotlib is missing: pip install 'mpicoll[plots]'" in outcome.output


@pytest.mark.parametrize("name", ["ring.svg", "ring.png", "ring.html"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib.font_manager")  # which has files of its own to write
    with files_no_longer_than(1000):
        outcome = call("allreduce", "--algorithm", "ring", "-o", str(tmp_path / name))
    assert (outcome.exit_code, list(tmp_path.iterdir())) == (2, [])


# --- too large ---


def test_what_is_too_large_is_refused() -> None:
    ring, chain = algorithms.ALGORITHMS["allreduce"]["ring"], algorithms.ALGORITHMS["broadcast"]["chain"]
    with pytest.raises(ValueError, match=r"^nranks: expected at most 16 ranks to draw, got 17; .*simulate$"):
        draw.text(ring(17))
    for drawing in (draw.page, lambda schedule: draw.picture(schedule, "x.svg")):
        with pytest.raises(
            ValueError, match=r"^nranks: expected at most 32 ranks to draw, got 33; .*simulate"
        ):
            drawing(ring(33))
    with pytest.raises(ValueError, match=r"^rounds: expected at most 64 rounds to draw, got 65$"):
        draw.text(chain(4, nchunks=63))
    with pytest.raises(ValueError, match=r"^nchunks: expected at most 64 chunks on a rank to draw, got 65$"):
        draw.text(chain(1, nchunks=65))
    with pytest.raises(ValueError, match=r"^path: expected a name that ends in .svg or .png, got 'x.pdf'$"):
        draw.picture(ring(3), "x.pdf")


# --- the command ---


def test_the_command_prints_text() -> None:
    outcome = call("allreduce", "--algorithm", "ring", "--ranks", "3")
    assert (outcome.exit_code, outcome.output) == (0, RING + "\n")


def test_the_command_prints_json() -> None:
    options = "--algorithm chain --ranks 5 --root 2 --chunks 3 --json".split()
    told = json.loads(call("broadcast", *options).stdout)
    schedule = algorithms.schedule("broadcast", "chain", 5, 2, 3)
    assert told == as_data(tell(schedule, 5, ""))
    assert told["start"] == [[2, 0, [2]], [2, 1, [2]], [2, 2, [2]]]
    assert told["rounds"][0]["messages"] == [{"src": 2, "dst": 3, "op": "copy", "chunks": [0]}]


def test_the_examples_of_the_help_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^\s+mpicoll draw (.*)$", call("--help").stdout, re.MULTILINE)
    assert len(examples) == 3
    for example in examples:
        assert call(*example.split()).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"chain.svg", "nodes.html"}
    assert "hierarchical allreduce: 5 ranks" in (tmp_path / "nodes.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("allreduce", "Missing option '--algorithm'"),
        ("gossip --algorithm ring", "'gossip' is not one of"),
        ("allreduce --algorithm foo", "--algorithm: expected one of ring, "),
        ("allreduce --algorithm ring --ranks 0", "0 is not in the range x>=1"),
        ("allreduce --algorithm ring --ranks 17", "--ranks: expected at most 16 ranks to draw, got 17"),
        ("allreduce --algorithm ring --ranks 1000000000", "--ranks: expected at most 32 ranks to draw"),
        (
            "allreduce --algorithm ring -o x.gif",
            "expected a name that ends in .svg, .png, .html; got 'x.gif'",
        ),
        ("allreduce --algorithm ring -o nowhere/x.svg", "directory that is there, got 'nowhere/x.svg'"),
        ("allreduce --algorithm ring -o x.svg --json", "--json: expected no --output beside it"),
        ("allreduce --algorithm ring -o /proc/x.html", "--output: No such file or directory: '/proc/x.html'"),
        ("allreduce --algorithm ring --root 1", "--root: expected none beside allreduce"),
        ("allreduce --algorithm ring --chunks 2", "--chunks: expected none beside ring"),
        ("broadcast --algorithm chain --root 4", "--root: expected a rank from 0 to 3, got 4"),
        ("broadcast --algorithm chain --chunks 65", "--chunks: expected at most 64 rounds to draw, got 67"),
        ("allreduce --algorithm hierarchical", "only with it; got --algorithm hierarchical alone"),
        ("allreduce --algorithm ring --nodes 2,3", "got --algorithm ring"),
        ("allreduce --algorithm ring --across ring", "--across: expected none beside --algorithm ring"),
        ("allreduce --algorithm hierarchical --nodes 2,x", "got '2,x'"),
        ("allreduce --algorithm hierarchical --nodes 30,3", "expected at most 32 ranks to draw, got 33"),
        ("allreduce --algorithm hierarchical --nodes 2,3 --ranks 5", "--ranks: expected none beside --nodes"),
        ("allreduce --algorithm hierarchical --nodes 2,3 --across foo", "--across: expected one of ring, "),
        ("reduce --algorithm hierarchical --nodes 2,3", "expected COLLECTIVE to be one of allreduce, "),
        ("broadcast --algorithm hierarchical --nodes 2,3 --root 5", "--root: expected a rank from 0 to 4"),
    ],
)
def test_bad_input_ends_in_a_line_that_names_it(arguments: str, message: str) -> None:
    outcome = call(*arguments.split())
    assert outcome.exit_code == 2
    assert message in outcome.output.splitlines()[-1]
