"""The documentation: links lead somewhere, every page is in the menu, and what pages say to run runs.

What needs ranks is run by ``tests/mpi/test_docs.py``; `blocks` below finds it, too. Neither needs the tool
that builds the site.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import geometric_mean
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner
from mpicoll.bench import peers_report

import mpicoll.algorithms
from mpicoll.cli import main
from mpicoll.verify import ScheduleError, verify

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
FENCE = re.compile(
    r"(?:<!-- file: (?P<file>\S+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.S | re.M
)
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")


class Block(NamedTuple):
    """What stands between two fences: its ``language``, ``text``, and the file that it is to be, if any."""

    language: str
    text: str
    file: str | None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = FENCE.finditer((DOCS / page).read_text(encoding="utf-8"))
    return [Block(match["language"], match["text"], match["file"]) for match in found]


def prose(path: Path) -> str:
    """A page without its code, in which nothing is a link or a heading."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    return re.sub(r"^    .*$", "", text, flags=re.M)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for target in LINK.findall(prose(DOCS / page)):
            yield page, target


def script(name: str) -> ModuleType:
    """A script of docs/, imported."""
    spec = spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- links, menu, pictures


def test_links_lead_to_a_file_and_a_heading() -> None:
    lost = []
    for page, target in links():
        name, _, anchor = target.partition("#")
        path = (DOCS / name).resolve() if name else DOCS / page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            lost.append(f"{page}: {target}")
    assert not lost
    assert len(list(links())) > 50  # the pattern still finds them


def test_every_page_is_in_the_menu_once() -> None:
    menu = [f"{name}.md" for names in script("conf").PAGES.values() for name in names]
    assert sorted([*menu, "index.md"]) == PAGES


def test_every_picture_is_shown_and_can_be_made_again() -> None:
    shown = {Path(target).name for _, target in links() if target.startswith("pictures/")}
    there = {path.name for path in (DOCS / "pictures").iterdir()}
    assert shown == there
    assert {Path(name).stem for name in there} == set(script("make_pictures").pictures())


def test_a_drawing_is_what_the_script_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compared whole: that depends on matplotlib's version. The messages are in it by name."""
    pytest.importorskip("matplotlib")
    made = script("make_pictures")
    monkeypatch.setattr(made, "PICTURES", tmp_path)
    made.main(["pat-allgather"])
    drawn, committed = ((place / "pat-allgather.svg").read_text() for place in (tmp_path, DOCS / "pictures"))
    messages = re.findall(r'id="(message-[\d-]+)"', committed)
    assert messages == re.findall(r'id="(message-[\d-]+)"', drawn)
    assert len(messages) == 15  # three rounds of five


def test_pages_name_every_algorithm() -> None:
    text = (DOCS / "algorithms.md").read_text(encoding="utf-8")
    missing = {
        name for own in mpicoll.algorithms.ALGORITHMS.values() for name in own if f"`{name}`" not in text
    }
    assert not missing


def test_pages_name_no_address_that_a_browser_would_load() -> None:
    for page in PAGES:
        assert not re.search(r"!\[[^]]*\]\(https?:|<(script|img|link|iframe)\b", (DOCS / page).read_text())


# -- figures


def result(name: str) -> Any:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_figures_of_many_gradients_are_those_of_the_committed_rows() -> None:
    found = result("gradients-openmpi-2")
    times = [f"{row['time'] / 1e3:.1f}" for row in found["contenders"][:6]]
    section = part("performance.md", "Many gradients")
    assert re.findall(r"\| ([\d.]+) \|$", section, flags=re.M) == times
    assert f"{found['overlap'][0]['overlap']['hidden']:.0%}".replace("%", " %") in section


def test_figures_of_training_are_those_of_the_committed_rows() -> None:
    section = part("performance.md", "Training")
    for batch in (1024, 512):
        for row in result(f"training-throughput-{batch}")["rows"]:
            cells = [f"{row['alone']:,.0f}", f"{row['together']:,.0f}", f"{100 * row['efficiency']:.0f} %"]
            assert f"| {batch} | {row['name'].replace('mpicoll, allreduce', 'mpicoll')} | " in section
            assert " | ".join(cells) in section
    small, large, _ = result("torch-ddp-2")["steps"]
    steps = [f"{small[name] / 1e3:.1f} ms" for name in ("mpicoll", "gloo")]
    steps += [f"{large[name] / 1e3:.0f} ms" for name in ("mpicoll", "gloo")]
    assert all(time in section for time in steps)


def test_figures_of_pytorch_are_those_of_the_committed_rows() -> None:
    section = part("torch.md", "How fast it is")
    rows = result("torch-2")["rows"]
    for call in {row["call"] for row in rows}:
        own = [row for row in rows if row["call"] == call]
        few, many = ([row for row in own if row["size"] <= most << 10] for most in (16, 64))
        large = [row["gloo_ratio"] for row in own if row["size"] >= 16 << 20]
        cells = [span(row[name] for row in few) for name in ("mpicoll", "overhead")]
        cells += [span(row["gloo_ratio"] for row in many), span(large, ".1f")]
        assert f"| `{call}` | {' | '.join(cells)} |" in re.sub(r"(\d) times", r"\1", section)
    for row in result("torch-ddp-2")["steps"]:
        digits = ".1f" if row["mpicoll"] < 1e4 else ".0f"
        times = [f"{row[name] / 1e3:{digits}}" for name in ("mpicoll", "gloo", "no_sync")]
        assert f"| {row['batch']} | {' | '.join(times)} | {100 * row['not_hidden']:.2g} % | " in section


def span(numbers: Iterable[float], digits: str = ".0f") -> str:
    found = list(numbers)
    return f"{min(found):{digits}} to {max(found):{digits}}"


def test_figures_of_one_node_are_those_of_the_committed_rows() -> None:
    found = peers_report.loads((ROOT / "bench" / "results" / "peers-2.json").read_text(encoding="utf-8"))
    section = part("performance.md", "On one node")
    for (collective, _), jobs in peers_report.groups(found.jobs).items():
        rows = peers_report.compare(jobs)
        ratios = [[row.ratio(f"auto{way}") for row in rows] for way in ("", " persistent", " alloc")]
        cells = [f"{min(own):.2f} / {geometric_mean(own):.2f}" for own in ratios]
        assert f"| {collective} | {' | '.join(cells)} |" in section


def test_the_cost_of_comparing_is_that_of_the_committed_rows() -> None:
    worst = max(row["cost"] for row in result("check-cost")["rows"])
    assert f"at most {100 * worst:.1f} % of a call" in part("performance.md", "Errors")


def flowing(page: str) -> str:
    """Its text in one line."""
    return " ".join(prose(DOCS / page).split())


def test_the_calibration_s_error_is_that_of_the_committed_rows() -> None:
    found = result("calibration-2")
    within = sum(abs(row["error"]) <= 0.2 for row in found["measurements"])
    said = f"{found['median_error']:.0%} in the median, {within} of {len(found['measurements'])} within 20 %"
    assert re.sub(r"(?<=\d)%", " %", said) in flowing("tuning.md")


def test_the_cost_of_recording_is_that_of_the_committed_rows() -> None:
    small, large = result("trace-cost")["rows"]
    event = (small["us_on"] - small["us_off"]) / small["events_per_step"]
    assert 2 < event < 3, "two to three microseconds an event"
    assert large["cost"] < 0.02 and large["cost"] < abs(large["again"])
    assert 6e3 < large["us_off"] < 6.5e3
    assert 300 < small["us_off"] < 360
    assert f"of one of a third of a millisecond, {small['cost'] * 100:.0f} % ([" in flowing("trace.md")


def part(page: str, heading: str) -> str:
    """What stands below a heading."""
    return (DOCS / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


# -- what pages say to run


@pytest.mark.parametrize("page, count", [("adding.md", 3), ("at-scale.md", 2), ("tutorial.md", 6)])
def test_the_commands_of_a_page_run(
    page: str, count: int, circulant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page == "tutorial.md":
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    alone = [line for line in commands(page) if not needs_ranks(line)]
    assert len(alone) == count
    said = "".join(run(line) for line in alone)
    if page == "tutorial.md":
        text = (DOCS / page).read_text(encoding="utf-8")
        shown = re.findall(r"^    ((?:round \d sends|        holds)  .*)$", text, flags=re.M)
        assert len(shown) == 9 and all(line in said for line in shown)
        assert all(Path(name).stat().st_size for name in ("ring.svg", "ring.html"))


def commands(page: str) -> list[str]:
    """The lines of a page's shell blocks."""
    return [line for b in blocks(page) if b.language == "bash" for line in b.text.splitlines()]


def needs_ranks(line: str) -> bool:
    """Whether ``tests/mpi/test_docs.py`` runs a command: mpirun, and what reads files that it leaves."""
    return line.startswith("mpirun") or "trace.json" in line


def run(line: str) -> str:
    """What a command of ``mpicoll`` prints."""
    program, *arguments = line.split()
    outcome = CliRunner().invoke(main, arguments)
    assert (program, outcome.exit_code) == ("mpicoll", 0), f"{line}: {outcome.output}"
    return outcome.output


@pytest.mark.parametrize("page", ["algorithms.md", "at-scale.md"])
def test_the_python_of_a_page_that_needs_no_ranks_runs(page: str) -> None:
    run_python(page)


def run_python(page: str) -> None:
    """Run a page's Python, block after block, as one program."""
    names: dict[str, Any] = {"__name__": page}
    for block in blocks(page):
        if block.language == "python" and block.file is None:
            exec(compile(block.text, page, "exec"), names)


@pytest.fixture
def circulant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The algorithm of ``adding.md``, where its page says that it goes."""
    return add_circulant(tmp_path, monkeypatch)


def add_circulant(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the files of ``adding.md`` into ``directory`` and register the algorithm."""
    for block in blocks("adding.md"):
        if block.file is not None:
            (directory / block.file).write_text(block.text, encoding="utf-8")
    monkeypatch.setattr(mpicoll.algorithms, "__path__", [*mpicoll.algorithms.__path__, str(directory)])
    monkeypatch.delitem(sys.modules, "mpicoll.algorithms.circulant", raising=False)
    from mpicoll.algorithms.circulant import circulant_reduce_scatter  # type: ignore[import-not-found]

    monkeypatch.setitem(
        mpicoll.algorithms.ALGORITHMS["reduce_scatter"], "circulant", circulant_reduce_scatter
    )
    return directory


def test_the_algorithm_that_is_added_passes_its_test(circulant: Path) -> None:
    names: dict[str, Any] = {}
    exec((circulant / "test_circulant.py").read_text(encoding="utf-8"), names)
    tests = [thing for name, thing in names.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()


def test_the_mistake_that_the_page_shows_is_found() -> None:
    text = (DOCS / "adding.md").read_text(encoding="utf-8")
    shown = re.findall(r"^    Error: (.*\n    .*)$", text, flags=re.M)[0].replace("\n    ", " ")
    code = next(b.text for b in blocks("adding.md") if b.file == "circulant.py")
    names: dict[str, Any] = {}
    exec(code.replace("(held[-1] + 1) // 2", "held[-1] // 2"), names)
    verify(names["circulant_reduce_scatter"](8))
    with pytest.raises(ScheduleError, match=f"^{re.escape(shown)}$"):
        verify(names["circulant_reduce_scatter"](3))


def test_the_allreduce_that_is_made_of_it_is_right(circulant: Path) -> None:
    names: dict[str, Any] = {}
    exec((circulant / "circulant_allreduce.py").read_text(encoding="utf-8"), names)
    for nranks in (1, 2, 3, 5, 8, 13):
        proof = verify(names["circulant_allreduce"](nranks))
        assert proof.volume == 2 * (nranks - 1) and proof.identical
