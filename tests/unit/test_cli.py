"""The command as a user types it: output, JSON, exit status, and what it says about bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from mpicoll import algorithms
from mpicoll.cli import main, parse_ranks
from mpicoll.schedule import REDUCE, Round, Schedule
from mpicoll.verify import rank_list


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def broken_ring(nranks: int) -> Schedule:
    """An allreduce that forgets to hand out the sum."""
    first = Round.of(0, 1, 0, REDUCE)
    return Schedule.from_rounds("ring", "allreduce", nranks, 1, [first])


# --- rank lists ---


def test_rank_lists_are_sorted_and_count_each_number_once() -> None:
    assert parse_ranks("64,1-4, 3 ,127") == [1, 2, 3, 4, 64, 127]
    assert parse_ranks("5") == parse_ranks("5-5") == [5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected numbers and ranges such as 1-33,64; got '' in ''"),
        ("1,,2", "got '' in '1,,2'"),
        ("1-", "got '1-' in '1-'"),
        ("-3", "got '-3' in '-3'"),
        ("two", "got 'two' in 'two'"),
        ("1.5", "got '1.5' in '1.5'"),
        ("1-2-3", "got '1-2-3' in '1-2-3'"),
        ("0", "expected numbers from 1 to 100000, the smaller one of a range first; got '0' in '0'"),
        ("1,9-3", "got '9-3' in '1,9-3'"),
        ("100001", "got '100001' in '100001'"),
    ],
)
def test_what_is_no_rank_list_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="expected") as raised:
        parse_ranks(text)
    assert message in str(raised.value)


@given(st.sets(st.integers(1, 300), min_size=1))
def test_a_rank_list_as_text_is_parsed_back(ranks: set[int]) -> None:
    assert parse_ranks(rank_list(sorted(ranks))) == sorted(ranks)


# --- verify ---


def test_one_algorithm_shows_the_order_of_its_sums() -> None:
    result = call("verify", "allreduce", "--algorithm", "rabenseifner", "--ranks", "6")
    assert result.exit_code == 0
    assert "chunks 0-3 on ranks 0-5: (((0+1)+4)+((2+3)+5))" in result.stdout
    assert "1 schedules proved right at 6 ranks" in result.stdout


def test_a_collective_lists_all_its_algorithms() -> None:
    result = call("verify", "broadcast", "--ranks", "1-4")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in algorithms.names("broadcast"))
    assert "chunks 0 on" not in result.stdout


def test_all_lists_every_collective() -> None:
    result = call("verify", "--all", "--ranks", "2,3")
    assert result.exit_code == 0
    assert all(collective in result.stdout for collective in algorithms.ALGORITHMS)


def test_json_holds_a_row_for_every_rank_count_and_the_orders() -> None:
    result = call("verify", "reduce_scatter", "--algorithm", "ring", "--ranks", "3", "--json")
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert report["seconds"] > 0
    assert report["results"] == [
        {
            "collective": "reduce_scatter",
            "algorithm": "ring",
            "nranks": 3,
            "roots": 1,
            "schedules": 1,
            "rounds": 2,
            "transfers": 6,
            "volume": 2,
            "identical": True,
        }
    ]
    assert report["orders"][0] == {"order": "(0+(1+2))", "chunks": [0], "ranks": [0]}
    rows = json.loads(call("verify", "allgather", "--ranks", "1-3,9", "--json").stdout)["results"]
    assert [row["nranks"] for row in rows if row["algorithm"] == "bruck"] == [1, 2, 3, 9]


def test_nodes_are_verified_with_every_algorithm_between_them() -> None:
    result = call("verify", "allreduce", "--algorithm", "hierarchical", "--nodes", "2,3")
    assert result.exit_code == 0
    assert all(f"hierarchical, {name}" in result.stdout for name in algorithms.names("allreduce"))
    assert "schedules proved right at 5 ranks" in result.stdout
    assert "chunks 0-3 on ranks 0-4: ((0+1)+((2+3)+4))" in result.stdout


def test_nodes_as_json() -> None:
    options = ["--algorithm", "hierarchical", "--nodes", "1, 3 ,2", "--json"]
    rows = json.loads(call("verify", "broadcast", *options).stdout)["results"]
    assert [row["algorithm"] for row in rows] == [f"hierarchical, {n}" for n in algorithms.names("broadcast")]
    assert {(row["nranks"], row["roots"], row["identical"]) for row in rows} == {(6, 6, True)}


def test_shards_are_added_in_one_order_by_every_algorithm_at_every_rank_count() -> None:
    result = call("verify", "allreduce", "--shards", "6", "--ranks", "2-6")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in algorithms.names("allreduce"))
    proved = 5 * len(algorithms.names("allreduce"))
    assert f"{proved} schedules proved to add 6 shards in one order at 2-6 ranks" in result.stdout
    assert "the order of all: (((0+1)+(2+3))+(4+5))" in result.stdout


def test_the_order_of_shards_as_json() -> None:
    options = ["--shards", "3", "--algorithm", "two_shot", "--ranks", "2", "--json"]
    report = json.loads(call("verify", "allreduce", *options).stdout)
    assert report.pop("seconds") > 0
    # Rank 1 has the shards 1 and 2, no siblings: half a vector of each, then the half it has summed.
    row = {
        "algorithm": "two_shot",
        "nranks": 2,
        "nshards": 3,
        "rounds": 2,
        "nchunks": 2,
        "volume": 3,
        "plain": 2,
    }
    assert report == {"ok": True, "results": [row], "order": "((0+1)+2)"}


def test_without_a_list_of_ranks_there_are_at_most_as_many_as_shards() -> None:
    rows = json.loads(call("verify", "allreduce", "--shards", "5", "--json").stdout)["results"]
    assert {row["nranks"] for row in rows} == {1, 2, 3, 4, 5}


def test_a_wrong_schedule_has_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(algorithms.ALGORITHMS["allreduce"], "ring", broken_ring)
    result = call("verify", "allreduce", "--shards", "4", "--ranks", "3")
    assert result.exit_code == 1
    assert "ring allreduce on 3 ranks: no round, no transfer: chunk 0 of rank 0 is not" in result.stderr


def test_a_wrong_schedule_ends_with_status_1_and_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(algorithms.ALGORITHMS["allreduce"], "ring", broken_ring)
    result = call("verify", "allreduce", "--algorithm", "ring", "--ranks", "3", "--json")
    assert result.exit_code == 1
    assert (
        "ring allreduce on 3 ranks: no round, no transfer: chunk 0 of rank 0 is not complete" in result.stderr
    )
    report = json.loads(result.stdout)
    assert report["ok"] is False
    assert report["error"]["expected"] == "contributions of ranks 0-2"
    assert report["error"]["got"] == "ranks 0, without 1-2"

    monkeypatch.setitem(algorithms.ALGORITHMS["allreduce"], "ring", lambda nranks: broken_ring(2))
    result = call("verify", "allreduce", "--algorithm", "ring", "--ranks", "2")
    assert result.exit_code == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["allreduce", "--algorithm", "rings"], "--algorithm: expected one of ring, recursive_doubling, "),
        (["allreduce", "--algorithm", "rings"], "for allreduce; got 'rings'"),
        (
            ["allreduce", "--algorithm", "ring", "--ranks", "100000"],
            "--ranks: expected at most 16,777,216 ch",
        ),
        (["allreduce", "--algorithm", "hierarchical"], "got --algorithm hierarchical alone"),
        (["allreduce", "--ranks", "9-3"], "'--ranks': expected numbers from 1 to 100000"),
        (["sum"], "'sum' is not one of 'allreduce', 'reduce_scatter', "),
        ([], "expected either a COLLECTIVE or --all; got neither"),
        (["reduce", "--all"], "expected either a COLLECTIVE or --all; got both 'reduce' and --all"),
        (["--all", "--algorithm", "ring"], "--algorithm: expected only together with a COLLECTIVE"),
        (["reduce", "--shards", "4"], "--shards: expected only together with allreduce; got reduce"),
        (["--all", "--shards", "4"], "--shards: expected only together with allreduce; got --all"),
        (["allreduce", "--nodes", "2,3"], "--nodes: expected together with --algorithm hierarchical"),
        (
            ["gather", "--algorithm", "hierarchical", "--nodes", "2"],
            "--nodes: expected COLLECTIVE to be one of allreduce, reduce_scatter, allgather, broadcast; got",
        ),
        (
            ["allreduce", "--algorithm", "hierarchical", "--nodes", "2", "--ranks", "2"],
            "--nodes: expected no --ranks beside it",
        ),
        (["allreduce", "--algorithm", "hierarchical", "--nodes", "2,0"], "such as 2,3; got '2,0'"),
        (["allreduce", "--shards", "0"], "'--shards': 0 is not in the range 1<=x<=100000"),
        (
            ["allreduce", "--shards", "4", "--ranks", "3-9"],
            "--ranks: expected at most as many ranks as shards (4), got 5-9",
        ),
    ],
)
def test_bad_input_names_the_option_and_what_is_allowed(arguments: list[str], message: str) -> None:
    result = call("verify", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


# --- the group ---


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"], ["-h"]])
def test_help_has_an_example_that_works(arguments: list[str]) -> None:
    text = call(*arguments).stdout
    example = next(
        line.split() for line in text.splitlines() if line.strip().startswith("mpicoll verify allr")
    )
    assert call(*example[1:]).exit_code == 0


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_subcommand_takes_the_short_option_for_help(name: str) -> None:
    short, long = (call(name, option) for option in ("-h", "--help"))
    assert (short.exit_code, short.stdout) == (0, long.stdout)


def test_info_is_imported_when_it_is_called_and_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.delitem(sys.modules, "mpicoll.info", raising=False)
    assert "info" in call("--help").stdout
    assert "mpicoll.info" not in sys.modules
    fake = SimpleNamespace(command=lambda **arguments: calls.append(arguments))
    monkeypatch.setitem(sys.modules, "mpicoll.info", fake)
    assert call("info", "--json", "--help").exit_code == 0
    assert calls == [{"args": ["--json", "--help"], "prog_name": "mpicoll info"}]


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "mpicoll", "verify", "barrier", "--ranks", "1-5"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "5 schedules proved right at 1-5 ranks" in outcome.stdout
