"""The benchmarks of faults: what they draw, how they judge, what they leave out; and one small job."""

from __future__ import annotations

import ast
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mpicoll.bench import check_cost, mismatches
from mpicoll.bench.check_cost import VARIANTS, rows, without_comparison
from mpicoll.bench.mismatch_cases import (
    CLEAR,
    HANG,
    KINDS,
    METHODS,
    OUTCOMES,
    TRANSPORTS,
    UNCLEAR,
    UNNOTICED,
    WRONG,
    Call,
    Case,
    Outcome,
    judge,
    ranks_named,
)
from mpicoll.bench.mismatches import drawn, is_last, jobs, judged, row, summary, table

from mpicoll import launch
from mpicoll.transports import steps
from tests.unit.rank_jobs import needs_launcher

SUM = Call("Allreduce", 5, "float32", "SUM", 0, "blocking")
COPY = Call("Bcast", 5, "float32", "SUM", 0, "blocking")
CASE = Case(0, "collective", "auto", 3, 2, (SUM,), (COPY,))


# -- what is drawn


def test_cases_come_back_with_their_seed() -> None:
    assert drawn(50, 3) == drawn(80, 3)[:50]
    assert drawn(50, 3) != drawn(50, 4)
    assert [case.number for case in drawn(5, 3)] == list(range(5))


def test_everything_is_drawn_and_differs() -> None:
    cases = drawn(2000, 1)
    assert {case.kind for case in cases} == set(KINDS)
    assert {case.transport for case in cases} == set(TRANSPORTS)
    assert {case.nranks for case in cases} == {2, 3, 4}
    assert {case.usual[0].method for case in cases} == set(METHODS)
    assert {call.form for case in cases for call in case.usual} == {"blocking", "nonblocking", "persistent"}
    for case in cases:
        assert case.usual != case.other and 0 <= case.odd < case.nranks
        assert case.transport != "nodes" or case.nranks > 2, "two nodes, one of them of two ranks"
        if case.kind == "order":
            assert case.usual == case.other[::-1] and case.usual[0].method != case.usual[1].method
        elif case.other:
            differing = {
                name for name in asdict(SUM) if getattr(case.usual[0], name) != getattr(case.other[0], name)
            }
            assert differing == {"method" if case.kind == "collective" else case.kind}


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_survives_the_journey_to_the_ranks(kind: str) -> None:
    case = next(case for case in drawn(500, 2) if case.kind == kind)
    assert Case.of(json.loads(json.dumps(asdict(case)))) == case


def test_cases_share_jobs_unless_a_rank_ends() -> None:
    cases = drawn(300, 1)
    made = jobs(cases)
    assert sorted(case.number for job in made for case in job) == list(range(300))
    for job in made:
        assert len({(case.transport, case.nranks) for case in job}) == 1
        assert len(job) <= mismatches.TOGETHER
        assert len(job) == 1 or all(case.kind != "exit" for case in job)


# -- judging

TEXT = (
    "the ranks are in different calls: rank 2 in Bcast(20 bytes, root=0) at a.py:1 in f; "
    "ranks 0-1 in Allreduce(float32[5], SUM) at a.py:2 in f"
)
TOLD = Outcome("MismatchError", TEXT, 0, 0, 0.1)
SILENT = Outcome("", "", 1, 0, 0.1)


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        (TEXT, [0, 1, 2]),
        ("rank 5 has been in A, is in B; ranks 0-2, 4 in no collective, at a.py:1", [0, 1, 2, 4, 5]),
        ("rank 1: process 12 on n2 has ended", []),
        ("in step 3 of a rank", []),
    ],
)
def test_ranks_that_an_error_names(text: str, ranks: list[int]) -> None:
    assert ranks_named(text) == ranks


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, CLEAR),
        ({1: replace(TOLD, text=TEXT.replace("ranks 0-1", "rank 0"))}, UNCLEAR),
        ({1: replace(TOLD, text=TEXT.replace("Bcast", "a collective"))}, UNCLEAR),
        ({1: replace(TOLD, error="RankFailedError")}, UNCLEAR),
        ({1: SILENT}, UNCLEAR),
        ({1: replace(TOLD, wrong=1)}, WRONG),
        ({1: replace(TOLD, error="DeadlineError")}, HANG),
        ({0: SILENT, 1: SILENT, 2: SILENT}, UNNOTICED),
        ({0: SILENT, 1: SILENT, 2: replace(SILENT, wrong=1)}, WRONG),
    ],
)
def test_outcomes(changes: dict[int, Outcome], outcome: str) -> None:
    assert judge(CASE, {**dict.fromkeys(range(3), TOLD), **changes}) == outcome


def test_a_rank_without_a_word_hangs_but_not_one_that_was_to_end() -> None:
    ended = replace(TOLD, error="RankFailedError", text="rank 2 has broken off a collective")
    case = replace(CASE, kind="exit", other=())
    assert judge(CASE, {0: TOLD, 1: TOLD}) == HANG
    assert is_last(CASE, {0: {0: TOLD, 1: TOLD}}) and not is_last(CASE, {0: dict.fromkeys(range(3), TOLD)})
    assert judge(case, {0: ended, 1: ended}) == CLEAR
    assert judge(case, {0: ended, 1: replace(ended, text="rank 1 has ended")}) == UNCLEAR
    assert judge(case, {0: ended}) == HANG


def test_the_table_counts() -> None:
    met = {0: dict.fromkeys(range(3), TOLD)}
    made = [row(CASE, CLEAR, met), row(replace(CASE, transport="messages"), WRONG, {})]
    assert "ranks" not in made[0] and made[0]["seconds"] == 0.1
    assert made[1]["ranks"] == {} and made[1]["seconds"] is None
    counts = summary(made)
    assert counts["all"] == {**dict.fromkeys(OUTCOMES, 0), CLEAR: 1, WRONG: 1}
    assert counts["collective"] == counts["all"]
    assert counts["auto"][CLEAR] == counts["messages"][WRONG] == 1
    assert table(made).splitlines()[1].split() == ["all", "1", "0", "0", "1", "0"]


def test_after_a_hang_the_rest_has_a_job_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [replace(CASE, number=number) for number in range(4)]
    started: list[list[int]] = []

    def run(rest: list[Case], mpirun: str) -> Any:
        started.append([case.number for case in rest])
        return {
            case.number: dict.fromkeys(range(3), TOLD)
            for case in rest
            if case.number != 1 or len(started) > 1
        }

    def cut(rest: list[Case], mpirun: str) -> Any:
        """A job that ends with case 1 says nothing of what follows."""
        return {number: met for number, met in run(rest, mpirun).items() if len(started) > 1 or number < 1}

    monkeypatch.setattr(mismatches, "run", cut)
    assert [made["outcome"] for made in judged(cases, "mpirun")] == [CLEAR, HANG, CLEAR, CLEAR]
    assert started == [[0, 1, 2, 3], [2, 3]]


# -- the command


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "no" / "file.json")
    for command, arguments, message in (
        (mismatches.command, ["--count", "0"], "--count"),
        (mismatches.command, ["--json", missing], "--json"),
        (check_cost.command, ["--jobs", "0"], "--jobs"),
        (check_cost.command, ["--seconds", "0"], "--seconds"),
        (check_cost.command, ["--json", missing], "--json"),
    ):
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 2 and message in result.output


@needs_launcher
def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [
        replace(CASE, number=0, nranks=2, odd=1),
        replace(CASE, number=1, nranks=2, odd=0, kind="skip", other=()),
    ]
    monkeypatch.setattr(mismatches, "drawn", lambda count, seed: chosen[:count])
    file = tmp_path / "found.json"
    result = CliRunner().invoke(mismatches.command, ["--count", "2", "--seed", "9", "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert [row["outcome"] for row in report["rows"]] == [CLEAR, CLEAR]
    assert report["command"] == "python -m mpicoll.bench.mismatches --count 2 --seed 9"
    assert report["flags"] == {"count": 2, "seed": 9}
    assert {"machine", "date", "mpi", "seconds"} <= set(report)
    assert report["summary"]["all"][CLEAR] == 2
    assert report["mpi"] == launch.launcher_library()


# -- what comparing costs


def test_only_the_comparison_is_left_out() -> None:
    assert steps.__file__ is not None
    source = Path(steps.__file__).read_text()
    usual, least = (ast.parse(text).body for text in (source, without_comparison(source)))
    (left_out,) = (pair for pair in zip(usual, least, strict=True) if ast.dump(pair[0]) != ast.dump(pair[1]))
    assert "LINE_CALL" in ast.unparse(left_out[0])
    assert ast.unparse(left_out[1]) == "@njit(nogil=True)\ndef _differs(line, kind, size):\n    return False"
    with pytest.raises(ValueError, match="expected one function _differs, got 0"):
        without_comparison("def differs(): pass")


def test_the_cost_is_that_of_the_median_turn() -> None:
    turns = [([103e-6, 1.0], [100e-6, 99e-6]), ([51.5e-6], [50e-6])]  # of two jobs, one of which is fast
    jobs = [
        [{"collective": "allreduce", "bytes": 4, "seconds": dict(zip(VARIANTS, each, strict=True))}]
        for each in turns
    ]
    (made,) = rows(jobs)
    assert made["us_with"] == pytest.approx(103) and made["us_without"] == pytest.approx(99)
    assert made["cost"] == pytest.approx(0.03) and made["below"] is False
    assert check_cost.table([made]).splitlines()[1].split() == [
        "allreduce",
        "4",
        "103.000",
        "99.000",
        "3.0%",
    ]
