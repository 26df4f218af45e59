"""``mpicoll.bench.compression`` without MPI: tables, notes, picture of invented accuracies; its command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mpicoll.bench import compression_options
from mpicoll.bench.compression_report import (
    BASELINE,
    Outcome,
    Results,
    Row,
    dumps,
    loads,
    notes,
    plot,
    table,
)

SENT = 38_440.0


def row(compression: str, *accuracies: float | None, sent: float = SENT / 10, **changes: Any) -> Row:
    usual = {"learning_rate": 0.05, "reason": ""}
    return Row(compression, sent=sent, accuracies=[*accuracies], **{**usual, **changes})


def outcome(*rows: Row, baseline: tuple[float | None, ...] = (0.98, 0.96)) -> Outcome:
    about = {"parameters": 9610, "train_samples": 1438, "test_samples": 359, "batch_size": 32, "epochs": 20}
    return Outcome("digits", **about, rows=[row(BASELINE, *baseline, sent=SENT), *rows])


def results(*outcomes: Outcome, ranks: int = 2) -> Results:
    machine = {"cpu": "2 × Xeon", "cores": 2}
    command = "mpirun -np 2 python -m mpicoll.bench.compression"
    return Results(command, "2026-11-21", machine, "Open MPI v5.0.11", ranks, [0, 1], [*outcomes])


def call(*arguments: str) -> Result:
    return CliRunner().invoke(compression_options.command, arguments)


def stored(directory: Path, found: Results) -> str:
    file = directory / "report.json"
    file.write_text(dumps(found))
    return str(file)


# --- tables and notes ---


def test_table() -> None:
    _, baseline, lossy = table(outcome(row("topk:0.01", 0.95, 0.97, sent=768.0)))
    assert baseline == ["float32", "0.05", "38,440", "1.0", "97.0 ± 1.4", "+0.0"]
    assert lossy == ["topk:0.01", "0.05", "768", "50.1", "96.0 ± 1.4", "-1.0"]


def test_points_of_a_hair_have_no_sign_of_a_loss() -> None:
    assert table(outcome(row("bf16", 0.96999, 0.96999)))[2][-1] == "+0.0"


def test_one_seed_has_no_spread() -> None:
    assert table(outcome(baseline=(0.9812,)))[1][4] == "98.1"


def test_one_rank_sends_nothing() -> None:
    found = Outcome("digits", 1, 1, 1, 1, 1, [row(BASELINE, 0.9, sent=0.0), row("int8", 0.9, sent=0.0)])
    assert [cells[2:4] for cells in table(found)[1:]] == [["0", "–"], ["0", "–"]]


def test_notes_name_what_trains_worse_by_more_than_a_point() -> None:
    found = notes(outcome(row("int8", 0.961, 0.961), row("topk:0.001", 0.93, 0.95)))
    assert found == ["topk:0.001: LESS ACCURATE, by 3.0 points, than float32"]


def test_what_diverges_with_any_seed_has_no_accuracy_and_is_named() -> None:
    found = outcome(row("randomk:0.01", 0.98, None))
    assert table(found)[2][4:] == ["diverged", "–"]
    assert notes(found) == ["randomk:0.01: DIVERGED, the loss became no number in 1 of 2 runs"]


def test_nothing_is_compared_with_a_baseline_that_diverged() -> None:
    found = outcome(row("int8", 0.5, 0.5), baseline=(None, 0.9))
    assert table(found)[2][4:] == ["50.0 ± 0.0", "–"]
    assert notes(found) == ["float32: DIVERGED, the loss became no number in 1 of 2 runs"]


def test_a_reason_is_given_once_for_all_that_have_it() -> None:
    found = [row(name, 0.98, 0.98, learning_rate=0.01, reason="late") for name in ("a:1", "a:2")]
    assert notes(outcome(*found)) == ["learning rate of a:1, a:2: late"]


def test_results_survive_json() -> None:
    found = results(outcome(row("int8", 0.9, None)))
    assert loads(dumps(found)) == found


# --- the command, without MPI ---


def test_a_stored_result_needs_no_mpi(tmp_path: Path) -> None:
    file = stored(tmp_path, results(outcome(row("topk:0.01", 0.9, 0.91))))
    program = """
import runpy, sys
sys.modules["mpi4py"] = None
sys.argv[1:] = ["--from", sys.argv[1]]
runpy.run_module("mpicoll.bench.compression", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "digits: 9,610 parameters, 1,438 samples, 20 epochs in batches of 32, 2 ranks:" in done.stdout
    assert "topk:0.01: LESS ACCURATE, by 6.5 points, than float32" in done.stdout
    assert "over seeds 0, 1" in done.stdout
    assert "Open MPI v5.0.11: mpirun -np 2 python -m mpicoll.bench.compression" in done.stdout


def test_markdown(tmp_path: Path) -> None:
    lines = call("--from", stored(tmp_path, results(outcome())), "--markdown").stdout.splitlines()
    assert "| compression | learning rate | bytes per step | times fewer | accuracy % | points |" in lines
    assert "| --- | --: | --: | --: | --: | --: |" in lines
    assert "| float32 | 0.05 | 38,440 | 1.0 | 97.0 ± 1.4 | +0.0 |" in lines


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = (row("topk:0.1", 0.97, 0.97), row("topk:0.01", 0.9, 0.9), row("randomk:0.01", None, 0.1))
    found, picture = results(outcome(*rows), outcome(rows[0])), tmp_path / f"picture.{suffix}"
    plot(found, picture)
    assert picture.stat().st_size > 1000
    if suffix == "svg":
        assert "<!-- topk -->" in picture.read_text()
        assert "<!-- randomk -->" not in picture.read_text()


def test_plot_of_one_rank_is_refused(tmp_path: Path) -> None:
    found = replace(results(outcome()), ranks=1)
    done = call("--from", stored(tmp_path, found), "--plot", str(tmp_path / "picture.png"))
    assert done.exit_code == 2
    assert "one rank sends none" in done.stderr
    assert done.stdout == ""


def test_plot_is_refused_at_once_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression_options, "find_spec", lambda name: None)
    done = call("--from", stored(tmp_path, results(outcome())), "--plot", str(tmp_path / "picture.png"))
    assert "pip install 'mpicoll[plots]'" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"outcomes": [1]}', json.dumps({"outcomes": [], "ranks": 2})]
)
def test_files_that_are_no_results(text: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    done = call("--from", str(file))
    assert done.exit_code == 2
    assert "not what --json writes" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "missing.json"], "missing.json"),
        (["--from", "missing.json", "--epochs", "2"], "--from trains nothing: expected no --epochs"),
        (["--seeds", "0,-1"], "expected whole numbers from 0"),
        (["--seeds", ""], "expected whole numbers from 0"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
