"""What survivors of a training find out about each other; nobody dies here. See tests/unit for that.

Survivors are the ranks of a part of the communicator: who is not in it is dead to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll.schedule import chunk_bounds
from mpicoll.train import Trainer, elastic
from mpicoll.train.elastic import Remains, State, StateLostError, Tally, newest
from mpicoll.train.mirror import PARAMETERS, Mirror

from .training import (
    BATCH,
    COMM,
    FEATURES,
    alone,
    assert_same,
    classes,
    closing,
    messages_of,
    new_trainer,
    outcome_of,
    plain,
    trained,
)

RANKS, RANK = COMM.size, COMM.rank
COUNT, TRAINABLE = 117, 110  # elements of the parameters, and of the optimizer's vectors

several = pytest.mark.skipif(RANKS == 1, reason="for several ranks")


def facts(step: int, epoch: int = 3, samples: int = 100, loss: float | None = None) -> dict[str, Any]:
    return {"step": step, "epoch": epoch, "samples_of_epoch": samples, "loss_of_epoch": loss, "rank": RANK}


def vector(name: str, step: int) -> Any:
    """As it is after so many steps, the same on all ranks."""
    size = TRAINABLE if name else COUNT
    return np.arange(size) + 1000.0 * step + 0.5 * len(name)


def among(ranks: Sequence[int], find: Callable[[MPI.Intracomm], Any]) -> Any:
    """What ``find`` gives on these ranks; None on the others. Collective."""
    part = COMM.Split(int(RANK in ranks), RANK)
    found = find(part) if RANK in ranks else None
    part.Free()
    return found


# States ----------------------------------------------------------------------------------------------


def whole(step: int, **more: Any) -> Remains:
    state = State({name: vector(name, step) + RANK for name in (PARAMETERS, "velocity")}, facts(step, **more))
    tallies = {n: Tally(n, 10 + RANK, n * (10.0 + RANK)) for n in (step, step + 1)}
    return Remains(RANK, state.facts, state, None, tallies, np)


@pytest.mark.parametrize("ahead", range(min(RANKS, 3)))
def test_the_largest_step_of_whole_states(ahead: int) -> None:
    state = newest(COMM, whole(8 if ahead == RANK else 7))
    assert state.facts["step"] == 8 and state.facts["rank"] == ahead
    for name, found in state.vectors.items():
        np.testing.assert_array_equal(found, vector(name, 8) + ahead)
    assert state.facts["loss_of_epoch"] == pytest.approx(8 * 100)  # each sample's is 8


def test_of_equal_steps_that_whose_epoch_has_been_evaluated() -> None:
    state = newest(COMM, whole(7, epoch=4 if RANK == RANKS - 1 else 3, samples=0))
    assert state.facts["epoch"] == 4 and state.facts["rank"] == RANKS - 1
    assert state.facts["loss_of_epoch"] == 0


def test_losses_that_nobody_knows_are_as_the_others() -> None:
    remains = whole(7, samples=1000)
    tallies = remains.tallies if RANK == 0 else {}
    assert newest(COMM, replace(remains, tallies=tallies)).facts["loss_of_epoch"] == pytest.approx(7 * 1000)
    known = newest(COMM, whole(7, loss=5.5))
    assert known.facts["loss_of_epoch"] == 5.5


@several
def test_a_whole_state_is_better_than_shards() -> None:
    """Another rank has died while some had not yet been given the state."""
    part = shards([7])
    state = newest(COMM, whole(7) if RANK == 1 else part)
    np.testing.assert_array_equal(state.vectors["velocity"], vector("velocity", 7) + 1)


# Shards ----------------------------------------------------------------------------------------------


def mirror_after(steps: Sequence[int]) -> Mirror:
    """The copies of all ranks after these steps, the last of which is the newest."""
    bounds = chunk_bounds(COUNT, RANKS, 8).tolist()
    mirror = Mirror(COMM, vector(PARAMETERS, 0), bounds, ["mean", "square"], TRAINABLE)
    begin, end = bounds[RANK : RANK + 2]
    for step in steps:
        state = {name: vector(name, step)[begin:end] for name in ("mean", "square")}
        mirror.keep(step, vector(PARAMETERS, step), state)
    return mirror


def shards(steps: Sequence[int]) -> Remains:
    return Remains(RANK, facts(steps[-1]), None, mirror_after(steps), {}, np)


@pytest.mark.parametrize("dead", range(RANKS) if RANKS > 1 else [-1])
def test_the_shards_of_any_rank_that_dies(dead: int) -> None:
    remains = shards([6, 7, 8])
    state = among([rank for rank in range(RANKS) if rank != dead], lambda part: newest(part, remains))
    if dead != RANK:
        assert state.facts["step"] == 8
        for name, found in state.vectors.items():
            np.testing.assert_array_equal(found, vector(name, 8))
        assert sorted(state.vectors) == [PARAMETERS, "mean", "square"]


@several
@pytest.mark.parametrize("behind", range(RANKS))
def test_the_last_step_of_which_all_survivors_have_copies(
    behind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank is stopped while it takes the copies of step 8, when others have them."""
    mirror = mirror_after([6, 7])
    values = {name: vector(name, 8) for name in ("mean", "square")}
    begin, end = mirror.bounds["mean"][RANK : RANK + 2]
    if behind == RANK:
        monkeypatch.setattr(mirror, "comm", Interrupting(COMM))
        with pytest.raises(KeyboardInterrupt):
            mirror.keep(8, vector(PARAMETERS, 8), {name: v[begin:end] for name, v in values.items()})
        monkeypatch.undo()
    else:
        mirror.keep(8, vector(PARAMETERS, 8), {name: v[begin:end] for name, v in values.items()})
    remains = Remains(RANK, facts(7 if behind == RANK else 8), None, mirror, {}, np)
    dead = (behind + 1) % RANKS
    state = among([rank for rank in range(RANKS) if rank != dead], lambda part: newest(part, remains))
    if dead != RANK:
        assert state.facts["step"] == 7 and state.facts["rank"] == behind
        for name, found in state.vectors.items():
            np.testing.assert_array_equal(found, vector(name, 7))


class Interrupting:
    """A communicator whose second all-to-all is broken off on this rank, when it is complete."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.calls = 0

    def Alltoallv(self, *arguments: Any) -> None:
        self.comm.Alltoallv(*arguments)
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt


@pytest.mark.skipif(RANKS < 3, reason="needs a survivor")
def test_neighbours_that_die_together() -> None:
    remains = shards([7])
    survivors = [rank for rank in range(RANKS) if rank not in (0, RANKS - 1)]  # the last one is the first's

    def fail(part: MPI.Intracomm) -> None:
        with pytest.raises(StateLostError, match=rf"rank 0 is lost: .*got \[0, {RANKS - 1}\] of {RANKS} at"):
            newest(part, remains)

    among(survivors, fail)


def test_no_copies_yet() -> None:
    remains = replace(shards([7]), mirror=Mirror(COMM, np.zeros(9), [0] * RANKS + [9], [], 9))
    with pytest.raises(StateLostError, match="--resume"):
        newest(COMM, remains)


# Trainings -------------------------------------------------------------------------------------------


@pytest.fixture
def ulfm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a job could outlive its ranks: as long as none dies that makes no difference."""
    monkeypatch.setattr(elastic, "outlives_ranks", lambda: True)


@pytest.mark.usefixtures("ulfm")
@pytest.mark.parametrize("feature", ["", "adam", "dropout", "normalised"])
@pytest.mark.parametrize("strategy", ["allreduce", "sharded"])
def test_as_long_as_nobody_dies_nothing_changes(strategy: str, feature: str) -> None:
    outcome = trained(COMM, strategy=strategy, elastic=True, **FEATURES.get(feature, {}))
    assert_same(outcome, alone(feature))


@pytest.mark.usefixtures("ulfm")
@pytest.mark.parametrize(
    "settings", [{}, {"strategy": "sharded"}, {"shards": 5}], ids=["", "sharded", "fixed"]
)
def test_moving_in_the_middle_of_an_epoch(settings: dict[str, Any]) -> None:
    """To a communicator of the same ranks, from what they have after 9 steps."""
    with closing(new_trainer(COMM, elastic=True, **settings)) as trainer:
        trainer.train(4, stops=lambda: trainer.position.step >= 3)
        done = trainer.position.step
        assert trainer.stopped and 3 <= done < 24
        remains = Remains.of(trainer)
        part = COMM.Dup()
        trainer.move(part, newest(part, remains))
        trainer.train(4)
        assert trainer.position.step == 24 and trainer.comm is part
        assert_same(outcome_of(trainer), alone())


def test_what_cannot_be_elastic() -> None:
    def refused(**settings: Any) -> list[str]:
        return messages_of(lambda: new_trainer(COMM, elastic=True, **settings))

    expected = "elastic: expected the strategy allreduce or sharded, got ps-sync"
    assert refused(strategy="ps-sync") == [expected] * RANKS
    native = MPI.COMM_WORLD
    found = messages_of(lambda: Trainer(native, plain(), classes(), batch_size=BATCH, elastic=True))
    assert found == ["elastic: expected an mpicoll.Communicator, got Intracomm"] * RANKS
    if RANKS > 1:
        assert "elastic: expected whole models on all ranks" in refused(mesh={"tensor": RANKS})[0]
        assert "mpirun --with-ft ulfm" in refused()[0]
