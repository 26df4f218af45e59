"""Signals that ask a training to end, and how often its ranks talk about them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest

from mpicoll import launch
from mpicoll.train import preemption
from mpicoll.train.preemption import PREEMPTED, SIGNALS, Notice, Rhythm, agreed

from .test_train_cli import TRAIN, launcher

LIMIT = 60.0  # seconds for a job of two or three


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_handlers_come_back(number: int) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with Notice() as notice:
        assert not notice.is_given()
        os.kill(os.getpid(), number)
        assert notice.is_given()
        os.kill(os.getpid(), number)  # the same one, on another way
        assert notice.is_given()
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_second_signal_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "SAME", 0.0)
    pid = os.fork()
    if pid == 0:
        with Notice() as notice:
            os.kill(os.getpid(), signal.SIGUSR1)
            if notice.is_given():
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(preemption, "perf_counter", lambda: self.now)


def asked(clock: Clock, seconds_per_step: float, steps: int) -> list[int]:
    """The steps after which ranks talk."""
    rhythm, found = Rhythm(10), []

    def slowest(own: list[float]) -> list[float]:
        found.append(step)
        return [own[0], 2 * own[1]]  # another rank is half as fast

    for step in range(11, 11 + steps):
        clock.now += seconds_per_step
        assert not agreed(rhythm, step, lambda: False, slowest)
    return found


def test_short_steps_are_asked_about_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most twice as many steps as the last time, and a quarter of a second of the slowest rank's."""
    found = asked(Clock(monkeypatch), 1 / 1024, 400)
    assert found[:4] == [11, 13, 17, 25]
    assert {b - a for a, b in pairwise(found[6:])} == {128}


def test_long_steps_are_asked_about_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(Clock(monkeypatch), 1.0, 5) == [11, 12, 13, 14, 15]
    assert asked(Clock(monkeypatch), 0.0, 5) == [11, 13]  # a clock that stands still


def test_any_rank_is_heard() -> None:
    assert agreed(Rhythm(0), 1, lambda: False, lambda own: [1.0, own[1]])
    assert agreed(Rhythm(0), 1, lambda: True, lambda own: own)
    assert not agreed(Rhythm(1), 1, lambda: True, lambda own: own)  # not the step to ask


def test_the_whole_job_ends_with_the_status(tmp_path: Path) -> None:
    """The launcher hands SIGUSR1 on to all ranks, and their status back."""
    command = [*launcher(2), *TRAIN, "--epochs", "100000", "--checkpoint", str(tmp_path / "kept")]
    environment = launch.environment(command[0])
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        until = time.monotonic() + LIMIT
        while "epoch 2/" not in said and time.monotonic() < until:
            said += process.stderr.readline()
        process.send_signal(signal.SIGUSR1)
        said += process.communicate(timeout=LIMIT)[1]
    assert process.returncode == PREEMPTED, said
    assert "note: told to end, after step " in said
    assert len(list((tmp_path / "kept").glob("step-*.safetensors"))) == 3
