"""The hosts themselves: apart from each other and from the machine, and gone without a trace."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from . import rig as rigs
from .rig import Rig, RigError

WITHIN = 10.0  # seconds for what takes a fraction of one
NAMESPACES = ("net", "uts", "ipc", "mnt")


@pytest.fixture
def mark(request: pytest.FixtureRequest) -> str:
    """What no other process has on its command line."""
    return f"{request.node.name} of {os.getpid()}"


def sleeping(mark: str) -> list[str]:
    """A program that says that it has begun, and whose processes have ``mark`` on their command lines."""
    return [sys.executable, "-S", "-c", f"import time; print('begun', flush=True); time.sleep(60)  # {mark}"]


def processes(mark: str) -> list[str]:
    """The command lines of this machine, namespaces included, that have ``mark``."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(file.read_text(errors="replace"))
        except OSError:  # it has ended meanwhile
            continue
    return [line for line in found if mark in line]


def on(rig: Rig, host: str, script: str) -> str:
    command = rig.on(host, ["sh", "-c", script])
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=WITHIN).stdout


def test_ranks_are_where_they_were_asked_for() -> None:
    with Rig(3) as rig:
        done = rig.run([2, 0, 1], ["hostname"], WITHIN)
    assert done.returncode == 0, done.stdout
    assert sorted(done.stdout.split()) == ["host0", "host0", "host2"]


def test_hosts_are_apart() -> None:
    ask = "readlink " + " ".join(f"/proc/self/ns/{name}" for name in NAMESPACES)
    with Rig(2) as rig:
        here = [os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES]
        host0, host1 = (on(rig, host, ask).split() for host in rig.hosts)
        assert len({*here, *host0, *host1}) == 3 * len(NAMESPACES)
        on(rig, "host0", "touch /dev/shm/mine")
        assert [on(rig, host, "ls /dev/shm") for host in rig.hosts] == ["mine\n", ""]
        assert on(rig, "host1", "ls /sys/class/net").split() == ["control", "lo", "mpi"]


def test_two_rigs_do_not_meet() -> None:
    with Rig(2) as one, Rig(2) as other:
        on(one, "host1", "touch /run/scratch/mine")
        assert [on(rig, "host0", "ls /run/scratch") for rig in (one, other)] == ["mine\n", ""]
        assert {*other.run([1, 1], ["hostname"], WITHIN).stdout.split()} == {"host0", "host1"}


def test_a_deadline_ends_every_process(mark: str) -> None:
    with Rig(2) as rig:
        began = time.monotonic()
        with pytest.raises(subprocess.TimeoutExpired) as expired:
            rig.run([1, 1], sleeping(mark), timeout=1.5)
        assert time.monotonic() - began < WITHIN
        assert expired.value.output.split() == ["begun", "begun"]
        assert processes(mark) == []
        assert rig.run([1, 1], ["true"], WITHIN).returncode == 0


def test_a_job_that_fails_leaves_hosts_as_new() -> None:
    with Rig(2) as rig:
        on(rig, "host0", "touch /run/scratch/mine")
        assert rig.run([1, 1], ["sh", "-c", "exit 3"], WITHIN).returncode == 3
        assert on(rig, "host0", "ls /run/scratch") == ""


def heeding_interrupts() -> None:
    """Which what a shell starts in the background does not, and so the tests may not, either."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_rig_ends_its_hosts(number: signal.Signals, mark: str) -> None:
    command = [sys.executable, rigs.__file__, "--ranks", "1,1", "--", *sleeping(mark)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=heeding_interrupts,
    ) as job:
        assert job.stdout is not None
        assert [job.stdout.readline() for _ in range(2)] == [b"begun\n"] * 2
        job.send_signal(number)
        job.wait(WITHIN)
    until = time.monotonic() + WITHIN
    while left := processes(mark):
        assert time.monotonic() < until, left
        time.sleep(0.01)


def test_from_the_command_line() -> None:
    command = [
        sys.executable,
        rigs.__file__,
        "--ranks",
        "1,2",
        "--",
        "sh",
        "-c",
        "hostname; sleep 0.3; exit 3",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=WITHIN)
    assert done.returncode == 3
    assert sorted(re.findall(r"^host\d$", done.stdout, re.MULTILINE)) == ["host0", "host1", "host1"]


def test_wrong_arguments() -> None:
    with Rig(2) as rig:
        with pytest.raises(RigError, match=r"ranks_per_host: expected 2 counts, got \[1, 1, 1\]"):
            rig.command([1, 1, 1], ["true"])
        with pytest.raises(RigError, match="host: expected one of host0, host1, got 'host2'"):
            rig.cut("host2")
        with pytest.raises(RigError, match="network: expected one of control, mpi, got 'tcp'"):
            rig.mend("host1", "tcp")


def test_a_machine_that_allows_no_hosts_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rigs, "setup", lambda hosts: ["echo mount: not permitted >&2", "exit 32"])
    assert Rig.reason() == "no network namespaces on this machine: mount: not permitted"
    monkeypatch.setattr(rigs, "START_LIMIT", 0.1)
    monkeypatch.setattr(rigs, "setup", lambda hosts: ["exec sleep 60"])
    assert Rig.reason() == "no network namespaces on this machine: no answer"
    monkeypatch.setenv("PATH", "/nowhere")
    assert Rig.reason() == "no unshare (of util-linux) here"
