"""``mpicoll.bench.training`` without jobs: setups, tables of invented figures, its command, the document."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mpicoll.bench import training, training_report
from mpicoll.bench.training_report import Job, Results, Row, complaints, dumps, loads, meshes, strategies
from mpicoll.bench.training_setups import setups

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = ROOT / "docs" / "training.md"
STORED = ROOT / "bench" / "results"


def row(name: str, ranks: int = 2, **given: Any) -> Row:
    usual = {"mesh": {}, "bound": 1e-10, "difference": 3e-16, "accuracy": 0.975, "sent": 75944.0}
    return Row(**{"ranks": ranks, "name": name, "steps_per_second": 1234.0, **usual, **given})


def results(*rows: Row, failures: Sequence[str] = ()) -> Results:
    machine = {"cpu": "2 × Xeon", "cores": 2}
    given = "python -m mpicoll.bench.training", "2026-11-21", machine, "Open MPI v5.0.11"
    return Results(*given, epochs=8, failures=[*failures], rows=[*rows])


# --- what is trained ---


@pytest.mark.parametrize("nranks", range(1, 9))
def test_meshes_are_all_factorisations(nranks: int) -> None:
    found = [tuple(setup.mesh.values()) for setup in setups(nranks) if setup.mesh]
    expected = {
        (data, pipeline, nranks // data // pipeline)
        for data in range(1, nranks)
        for pipeline in range(1, nranks + 1)
        if nranks % (data * pipeline) == 0
    } | {(1, pipeline, nranks // pipeline) for pipeline in range(1, nranks + 1) if nranks % pipeline == 0}
    assert len(found) == len(set(found))
    assert set(found) == expected - {(nranks, 1, 1)}


def test_strategies_have_names_of_their_own_and_a_server_only_beside_a_worker() -> None:
    one, two = ([setup.name for setup in setups(nranks)] for nranks in (1, 2))
    assert len(set(two)) == len(two)
    assert {*two} - {*one} == {
        "ps-sync, 1 server",
        "ps-async, 1 server",
        "data=1,pipeline=2,tensor=1",
        "data=1,pipeline=1,tensor=2",
    }


# --- complaints ---


def test_what_is_right_is_not_complained_about() -> None:
    fine = row("local", bound=None, difference=0.3, accuracy=0.93)
    assert complaints(results(row("allreduce"), row("deterministic", bound=0.0, difference=0.0), fine)) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row("sharded", difference=1e-9), "sharded on 2 ranks: expected parameters within 1e-10"),
        (row("sharded", difference=math.nan), "sharded on 2 ranks: expected parameters within 1e-10"),
        (row("deterministic", 1, bound=0.0), "deterministic on 1 rank: expected parameters within 0"),
        (row("local", bound=None, accuracy=0.9), "local on 2 ranks: expected an accuracy of at least 92.5%"),
    ],
)
def test_what_is_wrong_is_named(wrong: Row, message: str) -> None:
    (complaint,) = complaints(results(row("allreduce"), wrong))
    assert complaint.startswith(message)


# --- tables ---


def test_a_strategy_is_a_line_over_all_ranks() -> None:
    found = results(
        row("allreduce", 1, sent=0.0),
        row("allreduce", 2, accuracy=0.981, difference=2e-15),
        row("allreduce", 4, sent=113_916.0),
        row("local", 4, bound=None, difference=0.2),
        row("deterministic", 2, bound=0.0, difference=0.0),
        row("data=1,pipeline=2,tensor=1", mesh={"data": 1, "pipeline": 2, "tensor": 1}),
    )
    headings, *lines = strategies(found)
    assert headings[3:] == [f"{text}, {n} ranks" for text in ("KB per step", "steps/s") for n in (2, 4)]
    assert lines == [
        ["allreduce", "2e-15", "97.5 to 98.1", "75.9", "113.9", "1,234", "1,234"],
        ["local", "other steps", "97.5", "–", "75.9", "–", "1,234"],
        ["deterministic", "none", "97.5", "75.9", "–", "1,234", "–"],
    ]


def test_a_mesh_is_a_line() -> None:
    found = results(row("a", 6, mesh={"data": 3, "pipeline": 1, "tensor": 2}), row("allreduce"))
    assert meshes(found)[1:] == [["6", "3 × 1 × 2", "3e-16", "97.5", "75.9", "1,234"]]


def test_results_and_jobs_survive_json() -> None:
    found = results(row("allreduce"), row("local", bound=None), failures=["gossip: status 1"])
    assert loads(dumps(found)) == found
    job = Job("MPICH 5.0", found.rows)
    assert Job.loads(job.dumps()) == job


# --- the command ---


def call(*arguments: str) -> Result:
    return CliRunner().invoke(training.main, arguments)


class Jobs:
    """In place of launched jobs: each trains the setups that are not in ``broken``."""

    def __init__(self, broken: Sequence[str] = (), dies_late: bool = False):
        self.broken = broken
        self.dies_late = dies_late
        self.launched: list[tuple[int, int, list[str]]] = []

    def run(self, nranks: int, epochs: int, names: Sequence[str]) -> tuple[Job, str]:
        self.launched.append((nranks, epochs, list(names)))
        rows: list[Row] = []
        for name in names:
            if name in self.broken:
                return Job("MPICH 5.0" if rows else "", rows), "status 3"
            rows.append(row(name, nranks))
        return Job("MPICH 5.0", rows), "status 9" if self.dies_late else ""


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    found = Jobs()
    monkeypatch.setattr(training, "run", lambda *args: found.run(*args))
    return found


def test_a_job_for_each_number_of_ranks(jobs: Jobs, tmp_path: Path) -> None:
    file = tmp_path / "training.json"
    done = call("--ranks", "1,3", "--epochs", "2", "--json", str(file))
    assert done.exit_code == 0, done.output
    assert jobs.launched == [(n, 2, [setup.name for setup in setups(n)]) for n in (1, 3)]
    found = loads(file.read_text())
    assert (found.epochs, found.mpi, found.failures) == (2, "MPICH 5.0", [])
    assert [(each.ranks, each.name) for each in found.rows] == [
        (n, s.name) for n in (1, 3) for s in setups(n)
    ]
    assert call("--from", str(file)).stdout == done.stdout


def test_after_a_failure_the_rest_is_trained(jobs: Jobs) -> None:
    jobs.broken = "allreduce", "local"
    done = call("--ranks", "2")
    names = [setup.name for setup in setups(2)]
    assert [launched[2] for launched in jobs.launched] == [
        names,
        names[1:],
        names[names.index("local") + 1 :],
    ]
    assert done.exit_code == training.WRONG
    assert "allreduce on 2 ranks: status 3\nlocal on 2 ranks: status 3\n" in done.stderr


def test_a_job_that_dies_after_all_is_trained(jobs: Jobs) -> None:
    jobs.dies_late = True
    done = call("--ranks", "2")
    assert (len(jobs.launched), done.exit_code) == (1, training.WRONG)
    assert "2 ranks: status 9 at the end" in done.stderr


def test_a_command_that_hangs_is_ended() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert training.run_limited(sleeper, 0.1) == "not done after 0.1 s"
    assert training.run_limited([sys.executable, "-c", "raise SystemExit(3)"], 60) == "status 3"
    assert training.run_limited([sys.executable, "-c", ""], 60) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ranks 0", "expected numbers from 1"),
        ("--ranks 1-9", "expected numbers up to 8, got 9"),
        ("--from missing.json", "missing.json"),
        ("--from missing.json --ranks 2", "--from trains nothing: expected no --ranks"),
        ("--json /nowhere/training.json", "No such file or directory"),
    ],
)
def test_bad_arguments(arguments: str, message: str, jobs: Jobs) -> None:
    done = call(*arguments.split())
    assert (done.exit_code, jobs.launched) == (2, [])
    assert message in done.stderr


def test_a_file_that_is_no_result(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"rows": [1]}))
    done = call("--from", str(file))
    assert done.exit_code == 2
    assert "not what --json writes" in done.stderr


# --- the document ---


def test_the_document_is_up_to_date() -> None:
    """``python -m mpicoll.bench.training_report docs/training.md`` makes it so."""
    text = DOCUMENT.read_text()
    assert training_report.updated(text, STORED) == text


def test_the_document_has_every_section_and_what_it_links_to() -> None:
    text = DOCUMENT.read_text()
    found = re.findall(r"<!-- begin (\S+) -->", text)
    assert sorted(found) == sorted([*training_report.SECTIONS, "pipelines"])
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (DOCUMENT.parent / target).exists(), target


def test_what_is_stored_is_as_it_should_be() -> None:
    assert complaints(loads((STORED / "training.json").read_text())) == []


def test_sections_are_written_anew_and_nothing_else(tmp_path: Path) -> None:
    found = results(row("allreduce"), row("b", mesh={"data": 1, "pipeline": 1, "tensor": 2}))
    (tmp_path / "training.json").write_text(dumps(found))
    document = tmp_path / "document.md"
    document.write_text("above\n<!-- begin meshes -->\nold\n<!-- end -->\nbelow\n")
    done = CliRunner().invoke(training_report.main, [str(document), "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    lines = document.read_text().splitlines()
    assert "| 2 | 1 × 1 × 2 | 3e-16 | 97.5 | 75.9 | 1,234 |" in lines
    assert (lines[0], lines[-2:]) == ("above", ["<!-- end -->", "below"])
    assert "old" not in lines
    again = training_report.updated(document.read_text(), tmp_path)
    assert again == document.read_text()


def test_strategies_section_says_how_it_was_measured() -> None:
    found = replace(results(row("allreduce", 1), row("allreduce", 3)), epochs=5)
    text = training_report.SECTIONS["strategies"][1](asdict(found))
    assert "in float64, at 1 and 3 ranks" in text
    assert "after 5 epochs" in text
    assert "Open MPI v5.0.11: `python -m mpicoll.bench.training`" in text
