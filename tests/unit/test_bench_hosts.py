"""``mpicoll.bench.hosts`` with invented times: no hosts are made."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mpicoll.bench import hosts
from mpicoll.bench.hosts import Shape

from tests.unit.test_peers import bench_output


def call(*arguments: str) -> Result:
    return CliRunner().invoke(hosts.main, arguments)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of all jobs, which write invented results instead of running; han's second one fails."""
    found: list[list[str]] = []

    def run(line: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert options["timeout"] > 0
        found.append(line)
        if "coll_han_priority" in line and "2,1" in line:
            return subprocess.CompletedProcess(line, 1, "no such host")
        nranks = sum(Shape.parse(line[line.index("--ranks") + 1]).ranks)
        Path(line[-1]).write_text(json.dumps(bench_output(ranks=nranks)))
        return subprocess.CompletedProcess(line, 0, "")

    monkeypatch.setattr(subprocess, "run", run)
    return found


def test_every_shape_is_measured_beside_both_peers(lines: list[list[str]], tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    options = ["--ranks", "1,1", "--ranks", "2,1", "-b", "4096", "-e", "1M", "--turns", "3"]
    result = call(*options, "--json", str(file))
    assert result.exit_code == 0, result.output
    assert len(lines) == 4
    first, han = lines[:2]
    assert first[1:4] == [str(hosts.RIG), "--ranks", "1,1"] and "--mca" not in first
    assert han[4:8] == ["--mca", "coll_han_priority", "100", "--"]
    bench = first[first.index("bench") :]
    assert bench[:8] == ["bench", "allreduce", "-b", "4K", "-e", "1M", "-f", "4"]
    assert "allreduce on 2 hosts (2,1), 3 ranks" in result.output
    assert "round 1, 2,1: left out: status 1" in result.output
    assert "no such host" in result.output
    again = call("--from", str(file), "--markdown")
    assert "| 1K | tuned | 8.0 | 2.0 | 4.00 |" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "2,0"], "expected the number of ranks on each host, such as 2,2; got '2,0'"),
        (["--ranks", "two"], "got 'two'"),
        (["--collectives", "sum"], "got 'sum'"),
        (["-b", "4Q"], "4Q"),
        (["--from", "nowhere.json"], "not what --json writes"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, lines: list[list[str]]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not lines


def test_without_a_checkout_there_are_no_hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hosts, "RIG", tmp_path / "rig.py")
    result = call("--ranks", "1,1")
    assert result.exit_code == 1
    assert "rig.py is missing: the hosts are made by a file of a checkout" in result.output
