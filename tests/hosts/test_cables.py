"""A host's cable is pulled while allreduces run."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from .rig import CONTROL, Rig

SHAPE = (2, 1)
PULLED = 1.0  # seconds
LIMIT = 60.0  # seconds for a whole job


def wait_for(file: Path, job: subprocess.Popen[str]) -> None:
    until = time.monotonic() + LIMIT
    while not file.exists():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < until, f"no {file.name} within {LIMIT} s"
        time.sleep(0.01)


def test_a_cable_that_is_mended_in_time_costs_nothing_but_time(tmp_path: Path) -> None:
    with Rig(len(SHAPE)) as rig:
        job = rig.start(SHAPE, [sys.executable, "-m", "tests.hosts.allreduces", str(tmp_path)])
        wait_for(tmp_path / "begun", job)
        rig.cut("host1")
        time.sleep(PULLED)
        rig.mend("host1")
        (tmp_path / "end").touch()
        done = rig.finish(job, LIMIT)
    assert done.returncode == 0, done.stdout
    longest = re.findall(r"rank \d: \d+ calls, the longest took ([\d.]+) s", done.stdout)
    assert len(longest) == sum(SHAPE), done.stdout
    assert min(map(float, longest)) > 0.9 * PULLED, done.stdout


def failing_job(rig: Rig, directory: Path, patience: str) -> subprocess.Popen[str]:
    """One whose cable for messages has been pulled for good, with patience in seconds."""
    program = [sys.executable, "-m", "tests.hosts.allreduces", str(directory)]
    job = rig.start(SHAPE, program, {"MPICOLL_TIMEOUT": patience})
    wait_for(directory / "begun", job)
    rig.cut("host1")
    return job


def errors(directory: Path, job: subprocess.Popen[str]) -> list[str]:
    """Every rank's error."""
    files = [directory / f"rank{rank}" for rank in range(sum(SHAPE))]
    for file in files:
        wait_for(file, job)
    return [file.read_text() for file in files]


def test_a_cable_that_stays_out_ends_the_job(tmp_path: Path) -> None:
    """Ranks still reach each other over the other network, and so they know where all are.

    They have the time to learn that the ranks of one host wait in different parts of the call.
    """
    with Rig(len(SHAPE)) as rig:
        job = failing_job(rig, tmp_path, "5")
        said = errors(tmp_path, job)
        done = rig.finish(job, LIMIT)
    assert done.returncode != 0
    for error in said:
        assert re.match(r"DeadlineError: no progress for 5[\d.]* s \(MPICOLL_TIMEOUT=5\): rank", error), error
        assert re.search(r"\b2 in \w+\(.*\) at allreduces.py:\d+ in run", error), error
        assert "does not answer" not in error, error
        assert error in done.stdout


def test_a_host_without_any_cable_does_not_answer(tmp_path: Path) -> None:
    """The launcher may wait for a host that it cannot reach for ever; the ranks do not."""
    with Rig(len(SHAPE)) as rig:
        job = failing_job(rig, tmp_path, "2")
        rig.cut("host1", CONTROL)
        on_host0, also_on_host0, on_host1 = errors(tmp_path, job)
    for error in (on_host0, also_on_host0, on_host1):
        assert re.match(r"DeadlineError: no progress for [\d.]+ s \(MPICOLL_TIMEOUT=2\): rank", error), error
    for error in (on_host0, also_on_host0):
        assert re.search(r"rank 2 process \d+ on host1 does not answer", error), error
    for rank in (0, 1):
        assert re.search(rf"rank {rank} process \d+ on host0 does not answer", on_host1), on_host1
