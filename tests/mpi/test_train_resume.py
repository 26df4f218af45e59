"""Checkpoints of trainings, and going on from them: on as many ranks or others, in the same way or not."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpicoll.compression import parse as parse_compression
from mpicoll.train import (
    LARS,
    SGD,
    Adam,
    Augmentation,
    Checkpoints,
    Epoch,
    Keeper,
    Linear,
    Trainer,
    on_rank_zero,
    resume,
)
from mpicoll.train.checkpoint import load
from mpicoll.train.strategies import AsyncParameterServer

from .training import (
    ALONE,
    BATCH,
    COMM,
    INPUTS,
    Outcome,
    alone,
    assert_same,
    closing,
    everywhere,
    interrupted,
    messages_of,
    new_trainer,
    normalised,
    on_a_part,
    outcome_of,
    resumed,
    step_files,
    trained,
    with_dropout,
)

EVERY, STOP = 5, 10  # steps: 4 steps into the second epoch of 6
LAST = 3  # epochs

several_ranks = pytest.mark.skipif(COMM.size == 1, reason="needs another rank")

Settings = dict[str, Any]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The same on all ranks."""
    return everywhere(tmp_path)


# Which ranks hold what: all of these take the same steps.
WAYS: dict[str, Settings] = {
    "allreduce": {},
    "sharded": {"strategy": "sharded"},
    "pipeline": {"mesh": {"pipeline": COMM.size if COMM.size < 4 else 2}, "pieces": 2},
    "tensor": {"mesh": {"tensor": COMM.size}},
}

FROM_TO = [
    *((way, way, "nesterov") for way in WAYS),
    ("sharded", "allreduce", "adam"),
    ("pipeline", "allreduce", "nesterov"),
    ("allreduce", "sharded", "normalised"),
    ("tensor", "sharded", "lars"),
    ("pipeline", "tensor", "dropout"),
]

KINDS: dict[str, Settings] = {
    "nesterov": {
        "optimizer": lambda: SGD(0.8, nesterov=True, weight_decay=0.02),
        "augmentation": Augmentation(noise=0.2),
        "resample": True,
    },
    "adam": {
        "optimizer": lambda: Adam(clip_norm=0.5),
        "learning_rate": lambda step: 0.01 / (1 + step),
        "weights": "balanced",
    },
    "lars": {"optimizer": lambda: LARS(trust=0.05), "learning_rate": 0.2},
    "dropout": {"layers": with_dropout},
    "normalised": {"layers": normalised},
}


@cache
def uninterrupted(kind: str) -> Outcome:
    """What one process comes to."""
    return trained(ALONE, LAST, **KINDS[kind])


def figures_go_on(outcome: Outcome) -> None:
    """One history, as if nothing had happened."""
    assert [epoch.number for epoch in outcome.history] == list(range(1, LAST + 1))


@pytest.mark.parametrize("first, then, kind", FROM_TO)
def test_going_on_is_as_if_it_had_never_stopped(directory: Path, first: str, then: str, kind: str) -> None:
    interrupted(COMM, directory, EVERY, STOP, **KINDS[kind], **WAYS[first])
    outcome = resumed(COMM, directory, LAST, **KINDS[kind], **WAYS[then])
    figures_go_on(outcome)
    assert outcome.notes == ()
    assert_same(outcome, uninterrupted(kind), tolerance=1e-12)


@several_ranks
@pytest.mark.parametrize("way, kind", [("allreduce", "nesterov"), ("sharded", "adam"), ("pipeline", "lars")])
def test_going_on_with_other_numbers_of_ranks(directory: Path, way: str, kind: str) -> None:
    interrupted(COMM, directory, EVERY, STOP, **KINDS[kind], **WAYS[way])
    expected = uninterrupted(kind)
    for ranks in sorted({1, COMM.size - 1}):
        for then in ("allreduce", "sharded"):
            again = {"directory": directory, "epochs": LAST, "strategy": then, **KINDS[kind]}
            fewer = on_a_part(ranks, partial(resumed, **again))
            assert fewer.notes == ()
            assert_same(fewer, expected, tolerance=1e-12)


@several_ranks
@pytest.mark.parametrize("way", WAYS)
def test_what_one_process_has_kept_goes_on_with_many(directory: Path, way: str) -> None:
    on_a_part(1, lambda comm: trained(comm, 2, Checkpoints(comm, directory, keep=9), **KINDS["adam"]))
    assert_same(resumed(COMM, directory, LAST, **KINDS["adam"], **WAYS[way]), uninterrupted("adam"), 1e-12)


def test_keeping_checkpoints_changes_nothing(directory: Path) -> None:
    kept = trained(COMM, keeper=Checkpoints(COMM, directory, every=1, keep=2))
    assert kept.sha256 == trained(COMM).sha256
    assert_same(kept, alone())


# Steps of one's own ---------------------------------------------------------------------------------


def test_local_steps_go_on_where_all_ranks_were_equal(directory: Path) -> None:
    settings: Settings = {"strategy": "local", "options": {"every": EVERY}, "optimizer": lambda: SGD(0.0)}
    interrupted(COMM, directory, EVERY, STOP, **settings)
    outcome = resumed(COMM, directory, LAST, **settings)
    figures_go_on(outcome)
    assert_same(outcome, trained(COMM, LAST, **settings), tolerance=1e-12)


@pytest.mark.parametrize("strategy, options", [("local", {"every": 4}), ("gossip", {"graph": "exponential"})])
def test_else_from_their_mean(directory: Path, strategy: str, options: Settings) -> None:
    settings: Settings = {"strategy": strategy, "options": options, "optimizer": Adam, "learning_rate": 0.01}
    interrupted(COMM, directory, EVERY, STOP, **settings)
    with closing(new_trainer(COMM, **settings)) as trainer:
        assert resume(trainer, directory) == []
        assert trainer.strategy.optimizer.steps == STOP
        assert len(set(COMM.allgather(trainer.model.parameters.tobytes()))) == 1
        trainer.train(LAST)
        outcome = outcome_of(trainer)  # raises where ranks differ
    figures_go_on(outcome)
    assert outcome.history[-1].train_loss < outcome.history[0].train_loss
    for name, value in trained(COMM, LAST, **settings).parameters.items():  # not the same, but near
        np.testing.assert_allclose(outcome.parameters[name], value, rtol=0, atol=0.05)


# What only a rank has -------------------------------------------------------------------------------


def compressed(spec: str) -> Settings:
    return {"options": {"compression": parse_compression(spec)}, "dtype": np.float32}


@pytest.mark.parametrize("spec", ["topk:0.1", "randomk:0.2", "powersgd:2", "int8"])
def test_what_compression_has_kept_back_is_sent_later(directory: Path, spec: str) -> None:
    settings = compressed(spec)
    interrupted(COMM, directory, EVERY, STOP, **settings)
    outcome = resumed(COMM, directory, LAST, **settings)
    assert outcome.notes == ()
    assert outcome.sha256 == trained(COMM, LAST, **settings).sha256


@several_ranks
def test_with_other_ranks_it_begins_anew(directory: Path) -> None:
    settings = compressed("topk:0.1")
    interrupted(COMM, directory, EVERY, STOP, **settings)
    fewer = on_a_part(COMM.size - 1, lambda comm: resumed(comm, directory, LAST, **settings))
    assert len(fewer.notes) == 1
    assert "error feedback of compression begins anew" in fewer.notes[0]
    assert fewer.sha256 != trained(COMM, LAST, **settings).sha256
    figures_go_on(fewer)


# Which files ----------------------------------------------------------------------------------------


class Scripted(Trainer):
    """A training whose test losses are known."""

    test_losses: Iterator[float]

    def evaluate(self) -> tuple[float, float | None]:
        return next(self.test_losses), None


def with_losses(losses: Sequence[float], **settings: Any) -> Trainer:
    trainer = new_trainer(COMM, **settings)
    trainer.__class__ = Scripted
    assert isinstance(trainer, Scripted)
    trainer.test_losses = iter(losses)
    return trainer


def test_the_best_is_that_of_the_smallest_test_loss(directory: Path) -> None:
    with closing(with_losses([3, 1, 2, 1])) as trainer:
        trainer.train(4, keeper=Checkpoints(COMM, directory, keep=1))
    COMM.Barrier()
    best = load(directory / "best.safetensors")
    assert (best.step, best.facts["epoch"], best.facts["batch"]) == (12, 3, 0)
    second = trained(COMM, 2).parameters
    for name, value in second.items():
        np.testing.assert_array_equal(best.arrays[name], value)
    COMM.Barrier()

    with closing(with_losses([1.5, 0.5])) as trainer:  # what was best before still counts
        resume(trainer, directory)
        trainer.train(5, keeper=Checkpoints(COMM, directory))
        assert load(directory / "best.safetensors").step == 12
        COMM.Barrier()
        trainer.train(6, keeper=Checkpoints(COMM, directory))
        assert load(directory / "best.safetensors").step == 36


@pytest.mark.parametrize(
    "losses, patience, epochs", [([3, 1, 2, 1, 0], 2, 4), ([3, 2, 2, 1, 5], 1, 3), ([5, 4, 3, 2, 1], 1, 5)]
)
def test_training_ends_when_it_gets_no_better(losses: list[float], patience: int, epochs: int) -> None:
    with closing(with_losses(losses)) as trainer:
        history = trainer.train(5, patience=patience)
        assert [epoch.test_loss for epoch in history] == losses[:epochs]
        assert trainer.train(5, patience=patience) == history  # it knows


def test_as_many_checkpoints_stay_as_are_asked_for(directory: Path) -> None:
    trained(COMM, 3, Checkpoints(COMM, directory, every=4, keep=2))
    COMM.Barrier()
    assert [path.stem for path in step_files(directory)] == ["step-0000000016", "step-0000000018"]
    assert sorted(path.name for path in directory.iterdir())[0] == "best.safetensors"
    assert len(list(directory.iterdir())) == 3


def test_without_a_number_of_steps_each_epoch_is_kept(directory: Path) -> None:
    trained(COMM, 3, Checkpoints(COMM, directory, keep=9))
    COMM.Barrier()
    assert [path.stem for path in step_files(directory)] == [f"step-{step:010}" for step in (6, 12, 18)]


def test_a_torn_checkpoint_is_passed_over(directory: Path) -> None:
    interrupted(COMM, directory, EVERY, STOP)
    if COMM.rank == 0:
        newest = step_files(directory)[-1]
        newest.write_bytes(newest.read_bytes()[:-9])
    COMM.Barrier()
    outcome = resumed(COMM, directory, LAST)
    assert len(outcome.notes) == 1 and "torn file" in outcome.notes[0]
    assert_same(outcome, trained(ALONE, LAST), tolerance=1e-12)


# What is refused, on all ranks ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layers": lambda: [Linear(INPUTS, 5)]}, "found one of another: 0.bias is 5 here and 8 there"),
        ({"layers": normalised}, "found one of another: 1.beta is 8 here and missing there"),
        ({"batch_size": BATCH + 1}, "expected a checkpoint with batch size 13, as in this run, found 12"),
        ({"seed": 1}, "expected a checkpoint with seed 1, as in this run, found 0"),
        ({"optimizer": Adam}, "expected a checkpoint with optimizer Adam, as in this run, found SGD"),
        ({"shards": 8}, "expected a checkpoint with shards 8, as in this run, found None"),
    ],
)
def test_another_training_is_refused(directory: Path, settings: Settings, message: str) -> None:
    trained(COMM, 1, Checkpoints(COMM, directory))
    with closing(new_trainer(COMM, **settings)) as trainer:
        messages = messages_of(lambda: resume(trainer, directory))
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"{directory}: ")
    assert message in messages[0]


@pytest.mark.parametrize("name", ["", "missing"])
def test_no_checkpoint_at_all(directory: Path, name: str) -> None:
    with closing(new_trainer(COMM)) as trainer:
        messages = messages_of(lambda: resume(trainer, directory / name))
    assert len(set(messages)) == 1
    assert "expected checkpoints to resume from, found none" in messages[0]


def test_a_directory_that_cannot_be(directory: Path) -> None:
    if COMM.rank == 0:
        (directory / "file").write_text("no directory")
    COMM.Barrier()
    messages = messages_of(lambda: Checkpoints(COMM, directory / "file"))
    assert len(set(messages)) == 1
    assert "expected a directory that checkpoints can be written to" in messages[0]


@pytest.mark.parametrize("good", [0, 1, 3])
def test_a_full_disk_ends_on_all_ranks_and_leaves_whole_files_only(
    directory: Path, good: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After as many good writes, of which each syncs a file and its directory."""
    syncs = iter(range(2 * good))

    def sync(descriptor: int, fsync: Any = os.fsync) -> None:
        if next(syncs, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    if COMM.rank == 0:
        monkeypatch.setattr("mpicoll.train.checkpoint.os.fsync", sync)
    keeper = Checkpoints(COMM, directory, every=2, keep=9)
    with closing(new_trainer(COMM, learning_rate=1e-4)) as trainer:
        messages = messages_of(lambda: trainer.train(1, keeper=keeper))
    assert len(set(messages)) == 1
    assert "expected to write a checkpoint of " in messages[0]
    assert "but: No space left on device" in messages[0]
    COMM.Barrier()
    files = step_files(directory)
    assert [path.stem for path in files] == [f"step-{2 * i:010}" for i in range(1, good + 1)]
    assert sorted(directory.iterdir()) == files
    assert [load(path).step for path in files] == [2 * i for i in range(1, good + 1)]
    monkeypatch.undo()
    COMM.Barrier()
    if good:
        assert_same(resumed(COMM, directory, 1, learning_rate=1e-4), trained(ALONE, 1, learning_rate=1e-4))


class Curious(Keeper):
    """Looks on."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.epochs: list[int] = []

    def is_due(self, step: int) -> bool:
        return step % 4 == 0

    def keep(self, trainer: Trainer) -> None:
        self.steps.append(trainer.position.step)

    def epoch(self, trainer: Trainer, epoch: Epoch) -> None:
        self.epochs.append(epoch.number)


def test_a_keeper_hears_of_steps_and_epochs() -> None:
    keeper = Curious()
    trained(COMM, 2, keeper)
    assert (keeper.steps, keeper.epochs) == ([4, 8], [1, 2])  # step 12 ends an epoch


def test_what_rank_zero_keeps_alone_leaves_figures_together(directory: Path) -> None:
    """Workers of ps-async put figures together by counting them, and rank 0 alone knows the best epoch."""
    with closing(new_trainer(COMM, strategy="ps-async", learning_rate=0.01)) as trainer:
        trainer.train(3, keeper=Checkpoints(COMM, directory, 2))
        strategy = trainer.strategy
        assert isinstance(strategy, AsyncParameterServer)
        assert len(set(COMM.allgather(strategy._reports))) == 1
    assert on_rank_zero(COMM, lambda: (directory / "best.safetensors").exists())
