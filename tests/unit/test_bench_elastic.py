"""What the benchmark of killed ranks draws, counts and says; it is run itself where it is measured."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpicoll.bench import elastic
from mpicoll.bench.elastic import FAILED, HUNG, SURVIVED, Case, Row, draw, is_good, row, summary, table, times


def test_every_kind_and_every_rank_has_its_turn() -> None:
    cases = [draw(random.Random(f"7 {number}"), number) for number in range(60)]
    assert {case.kind for case in cases} == set(elastic.KINDS)
    for case in cases:
        assert len(case.victims) == case.nranks - 1 == len(set(case.victims))
        assert list(case.moments) == sorted(case.moments)
    assert {case.victims[0] for case in cases} == {0, 1, 2, 3}
    assert draw(random.Random(3), 1) == draw(random.Random(3), 1) != draw(random.Random(4), 1)


def test_shards_get_time_to_recover() -> None:
    moments = (0.1, 0.2, 0.9)
    assert list(times(Case(0, "allreduce", 4, (1, 2, 3), moments), 5.0)) == [0.5, 1.0, 4.5]
    assert list(times(Case(0, "sharded", 4, (1, 2, 3), moments), 5.0)) == [0.5, 1.5, 4.5]


def result(*lost: tuple[int, int, float], sha: str = "a", accuracy: float = 0.97) -> Row:
    entries = [{"ranks": [rank], "step": step, "seconds": s, "at": 100.0 + s} for rank, step, s in lost]
    return {
        "lost": entries,
        "steps": 90,
        "test_accuracy": accuracy,
        "parameters_sha256": sha,
        "seconds": 2.0,
    }


def test_kills_after_the_end_do_not_count() -> None:
    case = Case(5, "sharded", 3, (2, 0), (0.1, 0.9))
    found = row(case, SURVIVED, {2: 99.5, 0: 120.0}, result((2, 7, 0.25)))
    assert found["kills"] == [{"rank": 2, "step": 7, "recovery": 0.25, "since_kill": 0.75}]
    assert row(case, HUNG, {2: 99.5, 0: 120.0}, None)["kills"] == [{"rank": 2}, {"rank": 0}]


def rows(*, sha: str = "a", outcome: str = SURVIVED) -> list[Row]:
    killed = {0: 99.0, 1: 99.0}
    return [
        row(Case(0, "allreduce", 3), SURVIVED, killed, result((0, 3, 0.5), sha="b")),
        row(Case(1, "deterministic", 3), SURVIVED, killed, result((1, 9, 0.1), (0, 20, 0.2), sha=sha)),
        row(Case(2, "deterministic", 3), outcome, killed, result() if outcome == SURVIVED else None),
    ]


UNDISTURBED = {(kind, 3): result(accuracy=0.98) for kind in elastic.KINDS}


def test_the_summary() -> None:
    found = {each["kind"]: each for each in summary(rows(), UNDISTURBED)}
    assert sorted(found) == ["all", "allreduce", "deterministic"]
    assert (found["all"]["jobs"], found["all"]["kills"], found["all"]["of_rank_0"]) == (3, 3, 2)
    assert found["all"]["survived"] == 3 and found["all"]["recovery_max"] == 0.5
    assert found["all"]["recovery_median"] == 0.2 and found["all"]["since_kill_max"] == 1.5
    assert found["deterministic"]["same_bits"] == "2 of 2"
    assert found["allreduce"]["least_undisturbed_accuracy"] == 0.98
    assert table(list(found.values())).splitlines()[0].split() == ["kind", *found]


def test_what_is_not_good() -> None:
    assert is_good(rows(), UNDISTURBED)
    assert not is_good(rows(sha="c"), UNDISTURBED)
    for outcome in (HUNG, FAILED):
        assert not is_good(rows(outcome=outcome), UNDISTURBED)
        counted = summary(rows(outcome=outcome), UNDISTURBED)[-1]
        assert (counted["survived"], counted[outcome], counted["kills"]) == (2, 1, 5)


SLEEPING = "import time; time.sleep(60)"


def test_ranks_are_found_killed_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that starts two ranks, which say that they train and then hang."""
    monkeypatch.setattr(elastic, "DYING", 0.2)
    monkeypatch.setattr(elastic, "LIMIT", 0.5)
    text = f"""
import os, pathlib, subprocess, sys, time
ranks = [subprocess.Popen([sys.executable, "-c", {SLEEPING!r}],
                          env={{**os.environ, "OMPI_COMM_WORLD_RANK": str(rank)}}) for rank in range(2)]
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", text, str(tmp_path / "metrics")])
    killed: dict[int, float] = {}
    try:
        began = time.time()
        outcome = elastic.disturbed(process, tmp_path, Case(0, "allreduce", 2, (1,), (0.0,)), 1.0, killed)
        assert outcome == HUNG and process.returncode is not None
        assert list(killed) == [1] and began <= killed[1] < began + 30
    finally:
        elastic.end(process)
