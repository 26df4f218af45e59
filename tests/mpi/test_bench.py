"""``mpicoll bench`` on the ranks of this job: every collective, its JSON, and what it finds wrong."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI
from mpicoll.bench.collectives import run
from mpicoll.bench.jobs import USAGE_ERROR, WRONG
from mpicoll.bench.kinds import KINDS

import mpicoll

COMM = mpicoll.Communicator(MPI.COMM_WORLD)
QUICK = "-w 0 -n 2 --turns 1".split()
REDUCTIONS = [name for name, kind in KINDS.items() if kind.reduces]
ONE_PLACE = ("broadcast", "sendrecv")


def bench(file: Path, *arguments: str, status: int = 0) -> Any:
    """The report, on every rank; ``file`` matters on rank 0."""
    assert run(COMM, [*arguments, *QUICK, "--json", str(file)]) == status
    return COMM.bcast(json.loads(file.read_text()) if COMM.rank == 0 else None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "report.json"


def places(report: Any, name: str) -> list[Any]:
    """Everything measured of a contender."""
    (rows,) = (contender["results"] for contender in report["contenders"] if contender["name"] == name)
    found = [row[place] for row in rows for place in ("out_of_place", "in_place")]
    return [place for place in found if place is not None]


@pytest.mark.algorithms
@pytest.mark.parametrize("collective", KINDS)
def test_every_collective_beside_the_librarys_own(
    collective: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forms = ["--persistent"] if KINDS[collective].ours else []
    report = bench(file, collective, "-b", "64", "-e", "4K", "-f", "64", "--compare", "native", *forms)
    assert report["collective"] == collective
    assert report["ranks"] == COMM.size
    assert report["command"].startswith(f"mpirun -np {COMM.size} mpicoll bench {collective} -b 64 ")
    assert set(report["machine"]) == {"cpu", "cores"}
    assert {"date", "mpi", "thread_level", "flags"} < set(report)
    names = ["auto", "auto persistent", "native"] if forms else ["auto", "native"]
    assert [contender["name"] for contender in report["contenders"]] == names
    for contender in report["contenders"]:
        assert len(contender["results"]) == len(report["memcpy"]) == 2
        for row, copy in zip(contender["results"], report["memcpy"], strict=True):
            check_row(collective, row)
            assert copy["size"] == row["size"]
            assert copy["time"] > 0
    text = capsys.readouterr().out
    assert text.count("# Out of bounds values : 0 OK") == (len(names) if COMM.rank == 0 else 0)


def check_row(collective: str, row: Any) -> None:
    kind = KINDS[collective]
    assert list(row) == ["size", "count", "type", "redop", "root", "out_of_place", "in_place"]
    assert row["size"] == 4 * row["count"] * (COMM.size if kind.blocks else 1)
    assert (row["redop"], row["root"]) == ("sum" if kind.reduces else "none", 0 if kind.rooted else -1)
    assert (row["in_place"] is None) == (collective in ONE_PLACE)
    for place in (row["out_of_place"], row["in_place"]):
        if place is not None:
            assert place["nwrong"] == 0
            assert place["alg_bw"] == pytest.approx(row["size"] / place["time"] / 1000)
            assert place["bus_bw"] == pytest.approx(place["alg_bw"] * kind.factor(COMM.size))


@pytest.mark.parametrize("collective", REDUCTIONS)
def test_every_type_and_operation(collective: str, file: Path) -> None:
    """Native is not wrong in what it can do, and left out of what it cannot."""
    root = ["-r", str(COMM.size - 1)] if KINDS[collective].rooted else []
    sizes = ["-b", "96", "-e", "96"]
    report = bench(file, collective, *sizes, "-d", "all", "-o", "all", "--compare", "native", *root)
    ours, native = (contender["results"] for contender in report["contenders"])
    assert len({(row["type"], row["redop"]) for row in ours}) == len(ours) == 44
    done = {(row["type"], row["redop"]) for row in native}
    assert ("int64", "min") in done
    assert not [op for _, op in done if op == "avg"]


@pytest.mark.parametrize("collective", [name for name in KINDS if name not in REDUCTIONS])
def test_every_type_can_be_moved(collective: str, file: Path) -> None:
    root = ["-r", str(COMM.size - 1)] if KINDS[collective].rooted else []
    report = bench(file, collective, "-b", "96", "-e", "96", "-d", "all", "--compare", "native", *root)
    assert [len(contender["results"]) for contender in report["contenders"]] == [10, 10]


def test_contenders_are_named_by_algorithm_memory_and_form(file: Path) -> None:
    report = bench(file, *"allreduce -b 8 -e 64K -f 64 --algorithm auto,ring --alloc --persistent".split())
    forms = ["", " persistent", " alloc", " alloc persistent"]
    names = [name + form for name in ("auto", "ring") for form in forms]
    assert [contender["name"] for contender in report["contenders"]] == names


@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize("collective", KINDS)
def test_gloo(collective: str, file: Path) -> None:
    report = bench(file, collective, "-b", "256", "-e", "256", "--compare", "gloo")
    if COMM.size == 1 and collective == "sendrecv":  # gloo sends nothing to itself
        assert [contender["name"] for contender in report["contenders"]] == ["auto"]
    else:
        assert places(report, "gloo")[0]["nwrong"] == 0


def test_wrong_results_are_counted_and_end_with_status_1(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = mpicoll.Communicator.Allreduce

    def wrong(self: mpicoll.Communicator, send: Any, recv: Any) -> None:
        right(self, send, recv)
        if self.rank == self.size - 1:
            recv[[1, 5]] += 1

    monkeypatch.setattr(COMM, "Allreduce", partial(wrong, COMM))
    report = bench(file, "allreduce", "-b", "1K", "-e", "1K", "--compare", "native", status=WRONG)
    assert [place["nwrong"] for place in places(report, "auto")] == [2, 2]
    assert [place["nwrong"] for place in places(report, "native")] == [0, 0]
    if COMM.rank == 0:
        assert "Error: 4 wrong elements, 0 outside of buffers" in capsys.readouterr().err


def test_a_result_that_never_comes_is_wrong_everywhere(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COMM, "Alltoall", lambda send, recv: None)
    report = bench(file, "alltoall", "-b", "1K", "-e", "1K", status=WRONG)
    count = report["contenders"][0]["results"][0]["count"]
    assert places(report, "auto")[0]["nwrong"] == count * COMM.size**2


def test_a_later_call_that_goes_wrong_is_seen(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = mpicoll.Communicator.Bcast, []

    def wrong(self: mpicoll.Communicator, buf: Any) -> None:
        right(self, buf)
        calls.append(1)
        if len(calls) > 1:
            buf[0] = -1

    monkeypatch.setattr(COMM, "Bcast", partial(wrong, COMM))
    report = bench(file, "broadcast", "-b", "64", "-e", "64", status=WRONG)
    assert places(report, "auto")[0]["nwrong"] == COMM.size


def test_writing_behind_a_buffer_is_seen(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = mpicoll.Communicator.Allgather

    def wrong(self: mpicoll.Communicator, send: Any, recv: Any) -> None:
        right(self, send, recv)
        if self.rank == 0:
            recv.base[recv.nbytes + 5] ^= 1

    monkeypatch.setattr(COMM, "Allgather", partial(wrong, COMM))
    report = bench(file, "allgather", "-b", "1K", "-e", "1K", status=WRONG)
    assert [place["nwrong"] for place in places(report, "auto")] == [0, 0]
    if COMM.rank == 0:
        said = capsys.readouterr()
        assert "# Out of bounds values : 2 FAILED" in said.out
        assert "Error: 0 wrong elements, 2 outside of buffers" in said.err


def test_unchecked_results_have_no_count(file: Path) -> None:
    report = bench(file, "reduce", "-b", "64", "-e", "64", "-c", "0")
    assert [place["nwrong"] for place in places(report, "auto")] == [None, None]


def test_turns_end_by_themselves(file: Path) -> None:
    """Without -n a turn is as many calls as fit into some milliseconds."""
    assert run(COMM, "sendrecv -b 64 -e 64 --turns 1".split()) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("allsum", "'allsum' is not one of"),
        ("allreduce -d flot", "'flot' is not one of"),
        (f"reduce -r {COMM.size}", f"expected a rank from 0 to {COMM.size - 1}, got {COMM.size}"),
        ("allreduce --json /nowhere/report.json", "No such file or directory"),
    ],
)
def test_bad_input_is_said_once_and_ends_every_rank(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(COMM, arguments.split()) == USAGE_ERROR
    said = capsys.readouterr()
    assert said.err.count(message) == (1 if COMM.rank == 0 else 0)
    assert said.out == ""


def test_help_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(COMM, ["--help"]) == 0
    assert capsys.readouterr().out.count("--stepfactor") == (1 if COMM.rank == 0 else 0)
