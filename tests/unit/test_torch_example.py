"""The example for PyTorch: it learns on any number of ranks, and says what is wrong with its arguments."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_train_cli import ROOT, job

pytest.importorskip("torch")
pytest.importorskip("sklearn")

EXAMPLE = ROOT / "examples" / "torch_ddp.py"
TESTED = 359  # digits, of 1,797
LINE = re.compile(r"epoch (\d+) loss \d+\.\d{4} accuracy [01]\.\d{4} [\d,]+ samples/s")


def example(nranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return job(nranks, [sys.executable, str(EXAMPLE)], *arguments)


def losses(path: Path) -> list[float]:
    """Of each epoch."""
    return [epoch["loss"] for epoch in json.loads(path.read_text())["history"]]


def learns(nranks: int, path: Path, *more: object) -> None:
    """Run the example; what it prints and writes is right."""
    ran = example(nranks, *more, "--target", 0.97, "--json", path)
    assert ran.returncode == 0, ran.stderr
    found = [LINE.fullmatch(line.strip()) for line in ran.stdout.splitlines()]
    assert [match and match[1] for match in found] == [str(epoch) for epoch in range(1, 16)]
    result = json.loads(path.read_text())
    assert (result["ranks"], result["backend"]) == (nranks, "mpicoll")
    assert result["accuracy"] >= 0.97
    assert result["accuracy"] * TESTED == pytest.approx(round(result["accuracy"] * TESTED))  # on all ranks
    assert result == {**result, **result["history"][-1]}
    assert result["samples_per_second"] > 0


@pytest.mark.parametrize(("nranks", "more"), [(1, []), (3, ["--compression", "topk:0.1", "--batch", "16"])])
def test_it_learns_the_digits(nranks: int, more: list[str], tmp_path: Path) -> None:
    learns(nranks, tmp_path / "result.json", *more)


def test_it_takes_the_steps_that_it_takes_over_gloo(tmp_path: Path) -> None:
    """On 2 ranks, each with other digits: gradients are averaged, and all losses counted."""
    ours, gloos = tmp_path / "ours.json", tmp_path / "gloo.json"
    learns(2, ours)
    ran = example(2, "--backend", "gloo", "--epochs", 2, "--target", 1, "--json", gloos)
    assert ran.returncode == 1, ran.stderr
    assert ran.stderr.count("error: accuracy: expected at least 1.0 (--target), got 0.") == 1
    assert "Traceback" not in ran.stderr
    assert losses(gloos) == pytest.approx(losses(ours)[:2], rel=1e-4)


def test_what_is_wrong_is_said_once_and_ends_all_ranks() -> None:
    ran = example(2, "--batch", 0)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.count("error: argument --batch: expected a whole number above 0, got '0'") == 1
    assert not ran.stdout


@pytest.fixture(scope="module")
def program() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("torch_ddp", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "--epochs: expected a whole number above 0, got '0'"),
        ("--batch 1.5", "--batch: expected a whole number above 0, got '1.5'"),
        ("--rate inf", "--rate: expected a number above 0, got 'inf'"),
        ("--seed x", "--seed: invalid int value: 'x'"),
        ("--backend nccl", "--backend: invalid choice: 'nccl'"),
        ("--compression int9", "--compression: expected bf16, int8, topk:0.01, ..."),
        ("--compression none", "--compression: expected bf16, int8, topk:0.01, ..."),
        ("--compression bf16 --backend gloo", "--compression: expected --backend mpicoll, got gloo"),
        ("--json /nowhere/x.json", "--json: expected a file in a directory that there is, got /nowhere/x"),
        ("--json /", "--json: expected a file in a directory that there is, got /"),
        ("--target 97", "--target: expected a part of 1, such as 0.97, got '97'"),
    ],
)
def test_wrong_arguments_are_named(
    program: Any,
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["torch_ddp.py", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        program.parse_options()
    assert ended.value.code == 2
    assert f"torch_ddp.py: error: argument {message}" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_training(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["torch_ddp.py", "--rate", "1e30"])
    with pytest.raises(SystemExit, match="error: loss: expected a number, got nan in epoch 1; try a smaller"):
        program.main()
