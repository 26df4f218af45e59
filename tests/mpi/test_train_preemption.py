"""Trainings that are told to end: all ranks stop after the same step, and go on from there later."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpicoll.train import Checkpoints, Trainer, preemption
from mpicoll.train.cli import parse, run, train
from mpicoll.train.preemption import PREEMPTED

from .training import (
    COMM,
    STEPS_PER_EPOCH,
    alone,
    assert_same,
    closing,
    everywhere,
    new_trainer,
    outcome_of,
    resumed,
    step_files,
    trained,
    with_dropout,
)

RANKS, LAST = COMM.size, COMM.size - 1  # the rank that is told


def stopped_at(step: int, directory: Path, **settings: Any) -> tuple[int, bool]:
    """Where a training is that is told to end, on the last rank alone, when it has taken ``step`` steps."""
    with closing(new_trainer(COMM, **settings)) as trainer:
        told = lambda: COMM.rank == LAST and trainer.position.step >= step  # noqa: E731
        trainer.train(4, keeper=Checkpoints(COMM, directory), stops=told)
        return trainer.position.step, trainer.stopped


# The first, the last of an epoch, one in the middle, and the last of all.
@pytest.mark.parametrize("step", [1, STEPS_PER_EPOCH, 8, 4 * STEPS_PER_EPOCH])
def test_all_stop_after_the_same_step_and_go_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(preemption, "PERIOD", 0.0)  # the ranks ask each other after each step
    directory = everywhere(tmp_path)
    assert stopped_at(step, directory) == (step, True)
    if COMM.rank == 0:
        assert step_files(directory)[-1].stem == f"step-{step:010}"
    assert_same(resumed(COMM, directory), alone())


def test_ranks_ask_each_other_more_and_more_rarely(tmp_path: Path) -> None:
    """Steps are short here: after steps 1, 3, 7, 15, ..., or sooner on a busy machine."""
    found, stopped = stopped_at(8, everywhere(tmp_path))
    assert stopped and COMM.allgather(found) == [found] * RANKS
    assert 8 <= found <= 15


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "sharded"},
        {"shards": 5},
        {"layers": with_dropout, "strategy": "sharded"},
        {"strategy": "ps-sync"},
    ],
    ids=["sharded", "deterministic", "dropout", "ps-sync"],
)
def test_synchronous_strategies(tmp_path: Path, settings: dict[str, Any]) -> None:
    directory = everywhere(tmp_path)
    found, stopped = stopped_at(4, directory, **settings)
    assert stopped and COMM.allgather(found) == [found] * RANKS and found <= 7
    feature = "dropout" if "layers" in settings else ""
    assert_same(resumed(COMM, directory, **settings), alone(feature))


def test_the_same_bits_as_if_nobody_had_been_told(tmp_path: Path) -> None:
    directory = everywhere(tmp_path)
    stopped_at(4, directory, shards=6, dtype=np.float32)
    got = resumed(COMM, directory, shards=6, dtype=np.float32)
    assert got.sha256 == trained(COMM, shards=6, dtype=np.float32).sha256


@pytest.mark.parametrize("strategy", ["local", "gossip"])
def test_ranks_with_parameters_of_their_own(tmp_path: Path, strategy: str) -> None:
    """What is kept, and gone on from, is the mean."""
    directory = everywhere(tmp_path)
    found, stopped = stopped_at(4, directory, strategy=strategy)
    assert stopped and COMM.allgather(found) == [found] * RANKS
    outcome = resumed(COMM, directory, strategy=strategy)
    assert [epoch.step for epoch in outcome.history] == [STEPS_PER_EPOCH * n for n in range(1, 5)]


def test_ranks_that_are_not_in_step(tmp_path: Path) -> None:
    """Each rank that is told stops where it is; what counts is rank 0."""
    directory = everywhere(tmp_path)
    with closing(new_trainer(COMM, strategy="ps-async")) as trainer:
        keeper = Checkpoints(COMM, directory)
        trainer.train(4, keeper=keeper, stops=lambda: trainer.position.step >= 8 + COMM.rank)
        assert trainer.stopped and trainer.position.step == 8 + COMM.rank
    if COMM.rank == 0:
        assert step_files(directory)[-1].stem == f"step-{8:010}"
    assert resumed(COMM, directory, strategy="ps-async").history[-1].number == 4


def test_nobody_is_told(tmp_path: Path) -> None:
    with closing(new_trainer(COMM)) as trainer:
        trainer.train(4, stops=lambda: False)
        assert not trainer.stopped
        assert_same(outcome_of(trainer), alone())


def command(place: Path, *more: str) -> list[str]:
    return ["--epochs", "3", "--hidden", "4", "--json", str(place / "result.json"), *more]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Signals this process, if it is the last rank, when it begins its ``nth`` step."""

    def at(nth: int, number: int) -> None:
        step, left = Trainer._step, iter(range(nth - 1, -1, -1))

        def stepping(self: Trainer, batch: Any) -> None:
            if COMM.rank == LAST and next(left, None) == 0:
                os.kill(os.getpid(), number)
            step(self, batch)

        monkeypatch.setattr(Trainer, "_step", stepping)

    return at


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_command_ends_with_a_status_of_its_own(
    tmp_path: Path, told: Any, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    place = everywhere(tmp_path)
    before = signal.getsignal(number)
    arguments = command(place, "--checkpoint", str(place / "kept"))
    told(50, number)
    assert COMM.allgather(run(COMM, arguments)) == [PREEMPTED] * RANKS
    assert signal.getsignal(number) == before
    said = capfd.readouterr().err.splitlines()
    if COMM.rank == 0:
        [line] = [line for line in said if line.startswith("note: ")]
        assert line.startswith("note: told to end, after step ") and line.endswith("go on with --resume")
        assert not (place / "result.json").exists()
    options = parse([*arguments, "--resume"], aloud=False)
    assert options is not None
    result = train(COMM, options)
    assert (result["epochs"], result["steps"]) == (3, 135)


def test_nothing_is_kept_without_a_directory(
    tmp_path: Path, told: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    told(3, signal.SIGTERM)
    assert run(COMM, command(everywhere(tmp_path))) == PREEMPTED
    if COMM.rank == 0:
        assert "which was not kept: there is no --checkpoint" in capfd.readouterr().err
