"""`mpicoll where`: what it asks of whom, what it shows, and what it says when there is nobody to ask."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mpicoll import where
from mpicoll.cli import main
from mpicoll.service import local_name
from mpicoll.where import processes_below, ranks_below
from tests.unit.rank_jobs import LIMIT, Job, needs_launcher, running

TEXT = re.compile(r"rank (\d) \((.+), process (\d+)\): (.+)")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["where", *map(str, arguments)])


def no_process() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(LIMIT)
    return process.pid


# -- which processes


def test_processes_are_found_below_each_other() -> None:
    script = "sleep 60 & sleep 60 & wait"
    with subprocess.Popen(["sh", "-c", f"sh -c '{script}' & wait"], start_new_session=True) as process:
        until = time.monotonic() + LIMIT
        while len(found := processes_below(process.pid)) < 4:
            assert time.monotonic() < until
            time.sleep(0.01)
        names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in found]
        assert found[0] == process.pid and len(set(found)) == 4
        assert names == ["sh", "sh", "sleep", "sleep"]
        assert found[2] < found[3]
        os.killpg(process.pid, signal.SIGKILL)


def test_a_process_with_a_strange_name_is_found() -> None:
    """The kernel writes the name between the numbers, whatever is in it."""
    name = "a) b ("
    rename = f"ctypes.CDLL(None).prctl(15, {name.encode()!r})"
    program = f"import ctypes, time; {rename}; print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert Path(f"/proc/{process.pid}/comm").read_text().strip() == name
        assert process.pid in processes_below(os.getpid())
        process.kill()


# -- nobody to ask


def test_no_such_process() -> None:
    pid = no_process()
    result = call(pid)
    assert result.exit_code == 1
    assert f"PID: expected a running process, got {pid}" in result.output


def test_no_rank() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        result = call(process.pid)
        process.kill()
    assert result.exit_code == 1
    expected = (
        f"PID: expected a rank of a job, or its launcher, got {process.pid}: neither it nor what it has"
    )
    assert expected in result.output


@pytest.mark.parametrize("given", ["0", "-1", "train.py", ""])
def test_what_is_no_number_of_a_process_is_refused(given: str) -> None:
    result = call("--", given)
    assert result.exit_code == 2
    assert "PID" in result.output


def test_a_rank_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, "WITHIN", 0.2)
    silent = socket.socket(socket.AF_UNIX)
    with silent, subprocess.Popen(["sleep", "60"]) as process:
        silent.bind(local_name(process.pid))
        silent.listen()
        assert ranks_below(process.pid) == [process.pid]
        result = call(process.pid)
        process.kill()
    assert result.exit_code == 1
    assert f"process {process.pid} does not answer: timed out" in result.output
    assert "it may be in code that keeps Python's lock" in result.output


def test_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "rank": 0,
        "host": "n1",
        "pid": 5,
        "call": "Barrier()",
        "waited": 2.34,
        "line": "a.py:3 in f",
        "silence": None,
    }
    rows = [row, {**row, "rank": 1, "pid": 6, "call": None, "waited": 0.0}]
    monkeypatch.setattr(where, "ranks_below", lambda pid: [5, 6])
    monkeypatch.setattr(where, "ask_here", lambda pid, *_: rows if pid == 5 else None)
    assert call(os.getpid()).output.splitlines() == [
        "rank 0 (n1, process 5): in Barrier() at a.py:3 in f, waiting for 2.3 s",
        "rank 1 (n1, process 6): in no collective, at a.py:3 in f",
    ]
    assert json.loads(call(os.getpid(), "--json").output) == rows


# -- a job

PROGRAM = """
comm = mpicoll.Communicator(MPI.COMM_WORLD, transport="messages", timeout=60)
small = comm.Split(comm.rank > 0)
comm.Barrier()
write(f"ready {world}", True)

def compute():
    wait_for("go on")

def step():
    comm.Allreduce(np.ones(5), np.zeros(5))

if world == 2:
    compute()
step()
write(f"done {world}", True)
wait_for("end")
small.Free()
comm.Free()
os.kill(os.getpid(), signal.SIGUSR2)  # when nobody can be asked
time.sleep(0.2)
"""


def where_all_are(text: str, job: Job) -> list[str]:
    """What is said of each rank, in a report in lines."""
    found = [match.groups() for match in TEXT.finditer(text)]
    assert [int(rank) for rank, *_ in found] == [0, 1, 2], text
    assert [int(pid) for _, _, pid, _ in found] == [job.pid(rank) for rank in range(3)]
    assert {host for _, host, _, _ in found} == {socket.gethostname()}
    return [what for *_, what in found]


@needs_launcher
def test_a_job_says_where_it_is(tmp_path: Path) -> None:
    with running(tmp_path, 3, PROGRAM) as job:
        for rank in range(3):
            job.said(f"ready {rank}")
        time.sleep(0.3)
        places = [
            r"in Allreduce\(float64\[5\], SUM\) at program.py:\d+ in step, waiting for \d+\.\d s",
            r"in Allreduce\(float64\[5\], SUM\) at program.py:\d+ in step, waiting for \d+\.\d s",
            r"in no collective, at program.py:\d+ in wait_for",
        ]
        for pid in (job.process.pid, job.pid(2), job.pid(0)):  # the launcher, and any rank
            result = call(pid)
            assert result.exit_code == 0, result.output
            for said, expected in zip(where_all_are(result.output, job), places, strict=True):
                assert re.fullmatch(expected, said), said
        check_json(json.loads(call(job.pid(1), "--json").output), job)
        check_stopped(job)
        check_signal(job)
        job.write("go on")
        for rank in range(3):
            job.said(f"done {rank}")  # nobody was disturbed
        job.write("end")
        assert job.status() == 0
        assert "Traceback" not in job.output()


def check_json(rows: list[dict[str, object]], job: Job) -> None:
    assert [row["rank"] for row in rows] == [0, 1, 2]
    assert [row["pid"] for row in rows] == [job.pid(rank) for rank in range(3)]
    assert [row["call"] for row in rows] == ["Allreduce(float64[5], SUM)"] * 2 + [None]
    assert all(
        isinstance(row["waited"], float) and (row["waited"] > 0) == (row["call"] is not None) for row in rows
    )
    assert [row["silence"] for row in rows] == [None] * 3


def check_stopped(job: Job) -> None:
    """One that does not answer does not keep the others from it."""
    os.kill(job.pid(1), signal.SIGSTOP)
    said = where_all_are(call(job.pid(0)).output, job)
    os.kill(job.pid(1), signal.SIGCONT)
    time.sleep(0.3)  # until it has looked around again
    assert said[1] == f"process {job.pid(1)} on {socket.gethostname()} does not answer"
    assert said[0].startswith("in Allreduce") and said[2].startswith("in no collective")


def check_signal(job: Job) -> None:
    """All ranks get the signal, as if from the launcher; one report comes, from rank 0."""
    before = len(job.output())
    for rank in (2, 1, 0):
        os.kill(job.pid(rank), signal.SIGUSR2)
    until = time.monotonic() + LIMIT
    while len(TEXT.findall(job.output()[before:])) < 3:
        assert time.monotonic() < until, job.output()
        time.sleep(0.02)
    time.sleep(0.3)
    said = where_all_are(job.output()[before:], job)
    assert said[1].startswith("in Allreduce") and said[2].startswith("in no collective")
