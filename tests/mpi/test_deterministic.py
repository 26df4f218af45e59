"""The same bits at any number of ranks, with any algorithm and any bucket size, and after a checkpoint."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll.train import (
    SGD,
    Adam,
    Augmentation,
    BatchNorm,
    Dropout,
    Layer,
    Linear,
    ReLU,
    Tanh,
)

from .examples import everyday
from .training import (
    ALONE,
    BATCH,
    CLASSES,
    COMM,
    INPUTS,
    Outcome,
    everywhere,
    figures,
    interrupted,
    on_a_part,
    resumed,
    trained,
)

pytestmark = pytest.mark.algorithms

SHARDS = 8  # of which at most one has a sample in the last batch of each epoch
DTYPES = ("f4", "f8")


def noisy() -> list[Layer]:
    """Lots for each sample, and statistics of each shard."""
    first, second = BatchNorm(8), BatchNorm(7)
    return [
        *[Linear(INPUTS, 8), first, ReLU(), Dropout(0.3)],
        *[Linear(8, 7), second, Tanh(), Dropout(0.2)],
        Linear(7, CLASSES),
    ]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"layers": noisy, "batch_size": 23},
    "all": {
        "layers": noisy,
        "optimizer": lambda: Adam(weight_decay=0.01, clip_norm=0.5),
        "learning_rate": 0.01,
        "pieces": 3,
        "weights": "balanced",
        "resample": True,
        "augmentation": Augmentation(noise=0.1),
    },
    "nesterov": {"layers": noisy, "optimizer": lambda: SGD(nesterov=True, weight_decay=0.01, clip_norm=0.3)},
}


@cache
def alone(name: str, dtype: str) -> Outcome:
    return trained(ALONE, shards=SHARDS, dtype=dtype, **SETTINGS[name])


def assert_same_bits(got: Outcome, expected: Outcome) -> None:
    assert set(COMM.allgather(got.sha256)) == {expected.sha256}
    assert [figures(epoch) for epoch in got.history] == [figures(epoch) for epoch in expected.history]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_any_number_of_ranks_comes_to_the_bits_of_one(name: str, dtype: str) -> None:
    assert_same_bits(trained(COMM, shards=SHARDS, dtype=dtype, **SETTINGS[name]), alone(name, dtype))


BUCKETS = (36, 100, 1 << 20)  # bytes: of 164 altogether


@pytest.mark.parametrize("bucket_bytes", BUCKETS)
@pytest.mark.parametrize("algorithm", everyday("allreduce"))
def test_every_algorithm_and_bucket_size_comes_to_them(algorithm: str, bucket_bytes: int) -> None:
    options = {"algorithm": algorithm, "bucket_bytes": bucket_bytes}
    settings: dict[str, Any] = {"layers": small, "batch_size": BATCH, "dtype": "f4", "shards": SHARDS}
    assert trained(COMM, epochs=1, options=options, **settings).sha256 == small_alone().sha256


def small() -> list[Layer]:
    return [Linear(INPUTS, 3), Tanh(), Linear(3, CLASSES)]


@cache
def small_alone() -> Outcome:
    return trained(ALONE, epochs=1, layers=small, dtype="f4", shards=SHARDS)


def test_mpi4py_s_own_communicator_does_as_well() -> None:
    outcome = trained(MPI.COMM_WORLD, shards=SHARDS, dtype="f4", **SETTINGS["plain"])
    assert_same_bits(outcome, alone("plain", "f4"))


def test_as_many_shards_as_ranks() -> None:
    settings: dict[str, Any] = {"shards": COMM.size, "dtype": "f4", **SETTINGS["plain"]}
    assert_same_bits(trained(COMM, **settings), trained(ALONE, **settings))


def test_other_shards_come_to_other_bits() -> None:
    """Near to these: so the order of sums is what the others agree in."""
    eight = trained(COMM, epochs=1, layers=small, dtype="f4", shards=8)
    twelve = trained(COMM, epochs=1, layers=small, dtype="f4", shards=12)
    assert eight.sha256 != twelve.sha256
    for name, value in eight.parameters.items():
        np.testing.assert_allclose(twelve.parameters[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, dtype", [("plain", "f4"), ("all", "f8")])
def test_a_checkpoint_goes_on_to_the_same_bits_on_fewer_ranks(tmp_path: Path, name: str, dtype: str) -> None:
    """From within an epoch. Its loss is then added up in two pieces, the other figures are the same."""
    settings = {"shards": SHARDS, "dtype": dtype, **SETTINGS[name]}
    directory = interrupted(COMM, everywhere(tmp_path), every=5, step=5, **settings)
    expected = alone(name, dtype)
    for ranks in sorted({1, max(1, COMM.size - 1), COMM.size}):
        outcome = on_a_part(ranks, lambda comm: resumed(comm, directory, **settings))
        assert outcome.sha256 == expected.sha256
        got, wanted = ([epoch.train_loss for epoch in each.history] for each in (outcome, expected))
        assert got == pytest.approx(wanted, rel=1e-14)
        got, wanted = ([epoch.test_loss for epoch in each.history] for each in (outcome, expected))
        assert got == wanted
