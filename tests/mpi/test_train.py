"""Training on the ranks of this job: the same steps as one process, bad input on every rank alike."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll.compression import parse as parse_compression
from mpicoll.schedule import chunk_bounds
from mpicoll.train import (
    SGD,
    Adam,
    Dataset,
    Layer,
    Linear,
    ReLU,
    Tanh,
    on_rank_zero,
    parameters_sha256,
    perceptron,
    read_csv,
    read_digits,
    read_mnist,
    share,
)
from mpicoll.train.backprop import Part
from mpicoll.train.balance import EVERY
from mpicoll.train.cli import USAGE_ERROR, run
from mpicoll.train.loop import blas_threads
from mpicoll.train.model import Sequential
from mpicoll.train.strategies import GRAPHS, Gossip, Sharded

from .examples import everyday
from .training import (
    ALONE,
    BATCH,
    CLASSES,
    COMM,
    EPOCHS,
    FEATURES,
    INPUTS,
    STEPS_PER_EPOCH,
    Array,
    alone,
    assert_same,
    classes,
    closing,
    messages_of,
    new_trainer,
    normalised,
    outcome_of,
    plain,
    trained,
    values,
)

every_rank_count = pytest.mark.algorithms
several_ranks = pytest.mark.skipif(COMM.size == 1, reason="needs another rank")

SYNCHRONOUS = ("allreduce", "sharded")


@every_rank_count
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("strategy", SYNCHRONOUS)
def test_any_number_of_ranks_takes_the_steps_of_one(strategy: str, feature: str) -> None:
    assert_same(trained(COMM, strategy=strategy, **FEATURES[feature]), alone(feature))


@pytest.mark.parametrize("feature", sorted({*FEATURES} - {"accumulated", "values"}))
def test_every_feature_makes_a_difference(feature: str) -> None:
    """So those above are not all the same."""
    changed, plain = alone(feature), alone()
    assert any(
        name not in plain.parameters or np.abs(value - plain.parameters[name]).max() > 1e-4
        for name, value in changed.parameters.items()
    )


def test_training_learns() -> None:
    for feature in FEATURES:
        first, *_, last = alone(feature).history
        assert last.train_loss < first.train_loss


BUCKET_BYTES = cycle([1, 300, 1 << 20])


@every_rank_count
@pytest.mark.parametrize(
    "algorithm, bucket_bytes", [*zip(["auto", *everyday("allreduce")], BUCKET_BYTES, strict=False)]
)
def test_every_allreduce_algorithm_trains(algorithm: str, bucket_bytes: int) -> None:
    options = {"algorithm": algorithm, "bucket_bytes": bucket_bytes}
    assert_same(trained(COMM, options=options), alone())


def test_buckets_of_any_size_give_the_same_bits() -> None:
    sizes = (1, 300, 1 << 20)
    assert len({trained(COMM, epochs=1, options={"bucket_bytes": size}).sha256 for size in sizes}) == 1


def test_single_precision() -> None:
    assert_same(trained(COMM, dtype=np.float32), trained(ALONE, dtype=np.float32), tolerance=1e-4)


@pytest.mark.parametrize("strategy", [*SYNCHRONOUS, "local", "gossip"])
def test_mpi4py_s_own_communicator_does_as_well(strategy: str) -> None:
    ours, theirs = (trained(comm, epochs=2, strategy=strategy) for comm in (COMM, MPI.COMM_WORLD))
    assert_same(theirs, ours)


@every_rank_count
def test_less_parameters_than_there_are_shards_for() -> None:
    """Shards begin at cache lines: most ranks have none."""
    tiny: dict[str, Any] = {"layers": lambda: [Linear(6, 1), Linear(1, 2)], "data": values}
    assert_same(trained(COMM, strategy="sharded", **tiny), trained(ALONE, **tiny))


@every_rank_count
def test_a_part_for_each_rank_and_test_sets_smaller_than_the_ranks() -> None:
    data = values()
    few = replace(data, test_x=data.test_x[:1], test_y=data.test_y[:1])
    settings = {**FEATURES["values"], "data": lambda: few, "batch_size": COMM.size, "learning_rate": 0.002}
    assert_same(trained(COMM, epochs=2, **settings), trained(ALONE, epochs=2, **settings))


@pytest.mark.parametrize("strategy", [*SYNCHRONOUS, "local", "gossip"])
def test_all_ranks_have_the_same_history(strategy: str) -> None:
    history = trained(COMM, epochs=2, strategy=strategy).history
    assert len(set(COMM.allgather(repr(history)))) == 1
    assert [(epoch.number, epoch.step, epoch.samples) for epoch in history] == [(1, 6, 61), (2, 12, 61)]
    assert all(epoch.seconds > 0 and 0 <= epoch.communication <= 1 for epoch in history)


@pytest.mark.parametrize("strategy", ["allreduce", "sharded", "ps-sync"])
@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_training_goes_on_when_it_is_asked_to(strategy: str, optimizer: Callable[[], Any]) -> None:
    with closing(new_trainer(COMM, strategy=strategy, optimizer=optimizer, learning_rate=0.01)) as trainer:
        for epochs in range(EPOCHS + 1):
            trainer.train(epochs)
        got = outcome_of(trainer)
    assert_same(got, trained(ALONE, optimizer=optimizer, learning_rate=0.01))


def test_different_parameters_are_found_on_all_ranks() -> None:
    with closing(new_trainer(COMM)) as trainer:
        trainer.train(1)
        assert len(set(COMM.allgather(parameters_sha256(trainer)))) == 1
        if COMM.size == 1:
            return
        trainer.model.parameters[0] += COMM.rank == COMM.size - 1
        with pytest.raises(RuntimeError, match=rf"those of \[{COMM.size - 1}\] differ from rank 0's"):
            parameters_sha256(trainer)


@every_rank_count
def test_each_rank_holds_its_share_of_the_optimizer_s_state() -> None:
    with closing(new_trainer(COMM, strategy="sharded", optimizer=Adam, layers=normalised)) as trainer:
        strategy, model = trainer.strategy, trainer.model
        assert isinstance(strategy, Sharded)
        bounds = chunk_bounds(model.parameters.size, COMM.size, 8)
        own = np.clip(bounds, 0, model.tensors.trainable)[COMM.rank :][:2]
        state = strategy.optimizer.state
        assert sorted(state) == ["mean", "square"]
        assert {vector.size for vector in state.values()} == {int(own[1] - own[0])}
        sizes = COMM.allgather(state["mean"].size)
        line = 64 // model.parameters.itemsize
        assert sum(sizes) == model.tensors.trainable
        assert max(sizes) <= model.parameters.size / COMM.size + line


# Steps of one's own ---------------------------------------------------------------------------------


def even_parts() -> Dataset:
    """Batches of which all ranks have the same number of samples."""
    data = classes()
    count = len(data.train_y) // BATCH_OF_ALL * BATCH_OF_ALL
    return replace(data, train_x=data.train_x[:count], train_y=data.train_y[:count])


BATCH_OF_ALL = 3 * COMM.size


@every_rank_count
def test_averages_of_every_step_are_synchronous_steps() -> None:
    """mean of (w - r h_r) = w - r mean of h_r, for as long as the update is linear in the gradient."""
    settings: dict[str, Any] = {"data": even_parts, "batch_size": BATCH_OF_ALL}
    settings["optimizer"] = lambda: SGD(momentum=0.0, weight_decay=0.05)
    local = trained(COMM, strategy="local", options={"every": 1}, **settings)
    assert_same(local, trained(ALONE, **settings))


@several_ranks
def test_averages_now_and_then_are_others() -> None:
    local = trained(COMM, strategy="local", options={"every": 3}).parameters
    assert any(np.abs(local[name] - value).max() > 1e-4 for name, value in alone().parameters.items())


def digits() -> Dataset:
    return share(COMM, read_digits(seed=0) if COMM.rank == 0 else None)


AVERAGING: dict[str, dict[str, Any]] = {
    "local": {"strategy": "local", "options": {"every": 4}},
    **{graph: {"strategy": "gossip", "options": {"graph": graph}} for graph in GRAPHS},
}


FEWER_BYTES: dict[str, dict[str, Any]] = {
    "bf16 wire": {"options": {"wire_dtype": "bfloat16"}},
    "topk": {"options": {"compression": parse_compression("topk:0.05")}},
    "powersgd": {"options": {"compression": parse_compression("powersgd:4")}},
}


@pytest.mark.parametrize("way", [*AVERAGING, *FEWER_BYTES])
def test_digits_are_learned(way: str) -> None:
    settings = (AVERAGING | FEWER_BYTES)[way]
    data = digits()
    network = partial(perceptron, data.inputs, [32], data.outputs)
    outcome = trained(COMM, 3, layers=network, data=lambda: data, dtype=np.float32, batch_size=32, **settings)
    accuracy = outcome.history[-1].test_accuracy
    assert accuracy is not None and accuracy >= 0.93
    assert len(set(COMM.allgather(outcome.sha256))) == 1


@every_rank_count
@pytest.mark.parametrize("graph", GRAPHS)
def test_gossip_leaves_the_mean_as_it_is(graph: str) -> None:
    model = Sequential(Linear(5, 3), dtype=np.float64)
    strategy = Gossip(COMM, model, SGD(), graph)
    model.parameters[...] = np.random.default_rng(COMM.rank).standard_normal(model.parameters.size)
    first = everyones(model.parameters)
    mean = first.mean(axis=0)
    for _ in range(4):
        before = everyones(model.parameters)
        strategy.optimizer.steps += 1  # which says with whom
        strategy.mix()
        after = everyones(model.parameters)
        np.testing.assert_allclose(after.mean(axis=0), mean, rtol=0, atol=1e-14)
        if graph == "ring" and COMM.size > 2:
            expected = (before + np.roll(before, 1, axis=0) + np.roll(before, -1, axis=0)) / 3
            np.testing.assert_allclose(after, expected, rtol=0, atol=1e-14)
    assert COMM.size == 1 or (after.std(axis=0) < 0.9 * first.std(axis=0)).all()
    strategy.close()


@several_ranks
@every_rank_count
def test_the_exponential_graph_averages_powers_of_two_exactly() -> None:
    rounds = (COMM.size - 1).bit_length()
    if COMM.size != 1 << rounds:
        pytest.skip("for powers of two")
    model = Sequential(Linear(5, 3), dtype=np.float64)
    strategy = Gossip(COMM, model, SGD(), "exponential")
    model.parameters[...] = (COMM.rank + 1) ** 2 * np.arange(model.parameters.size)
    mean = everyones(model.parameters).mean(axis=0)
    for _ in range(rounds):
        strategy.optimizer.steps += 1  # which says with whom
        strategy.mix()
    np.testing.assert_allclose(model.parameters, mean, rtol=1e-14)
    strategy.close()


def everyones(vector: Array) -> Array:
    return np.array(COMM.allgather(vector))


# Uneven machines ------------------------------------------------------------------------------------

SLOW = COMM.size - 1
SECONDS = np.where(np.arange(COMM.size) == SLOW, 4.0, 1.0)  # for a sample, on each rank


@every_rank_count
@pytest.mark.parametrize(
    "strategy, feature", [("allreduce", "dropout"), ("allreduce", "augmented"), ("sharded", "accumulated")]
)
def test_a_slow_rank_gets_less_and_the_steps_stay_the_same(
    strategy: str, feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adjustments = 3
    epochs = 1 + adjustments * EVERY // STEPS_PER_EPOCH
    now = 0.0

    def slowly(part: Part, ready: Callable[[int], None]) -> Any:
        nonlocal now
        now += SECONDS[COMM.rank] * len(part)
        return gradients(part, ready)

    monkeypatch.setattr("mpicoll.train.loop.perf_counter", lambda: now)
    with closing(new_trainer(COMM, strategy=strategy, balance=True, **FEATURES[feature])) as trainer:
        gradients = trainer.backprop.gradients
        monkeypatch.setattr(trainer.backprop, "gradients", slowly)
        history = trainer.train(epochs)
        parameters = trainer.model.parameters
        assert len(set(COMM.allgather(parameters.tobytes()))) == 1
        balance = trainer.balance
        assert balance is not None
        steps = range(trainer.position.step - EVERY, trainer.position.step)
        bounds = [balance.bounds(step, count) for step in steps for count in (BATCH, 1, 0)]
        shares = balance.history[-1][1]

    with closing(new_trainer(ALONE, **FEATURES[feature])) as single:
        expected = single.train(epochs)
        np.testing.assert_allclose(parameters, single.model.parameters, rtol=0, atol=1e-10)
    assert [e.train_loss for e in history] == pytest.approx([e.train_loss for e in expected], rel=1e-10)
    assert [e.test_loss for e in history] == pytest.approx([e.test_loss for e in expected], rel=1e-10)

    for own, count in zip(bounds, cycle((BATCH, 1, 0)), strict=False):
        assert own[0] == 0 and own[-1] == count and (np.diff(own) >= 0).all()
        if count >= COMM.size:
            assert (np.diff(own) >= 1).all()  # each is measured
    assert len(set(COMM.allgather(repr((bounds, shares))))) == 1
    due = 1 / SECONDS / (1 / SECONDS).sum()
    np.testing.assert_allclose(shares, due + (1 / COMM.size - due) / 2**adjustments, rtol=1e-9)
    if COMM.size > 1:
        sizes = np.diff(bounds[-3])  # of the last full batch
        assert sizes[SLOW] == sizes.min() < sizes.max()


# Bad input ------------------------------------------------------------------------------------------

BAD = Path("/nowhere/at/all")


@pytest.mark.parametrize("strategy", [*SYNCHRONOUS, "local", "gossip"])
def test_a_learning_rate_that_is_too_high_ends_on_all_ranks(strategy: str) -> None:
    with closing(new_trainer(COMM, strategy=strategy, learning_rate=1e200, **FEATURES["values"])) as trainer:
        messages = messages_of(lambda: trainer.train(3))
    assert len(set(messages)) == 1
    assert "expected the training loss to be a number, found" in messages[0]
    assert "lower the learning rate" in messages[0]


def untested() -> Dataset:
    """No samples to test with."""
    data = classes()
    return replace(data, test_x=data.test_x[:0], test_y=data.test_y[:0])


def unfitting() -> list[Layer]:
    """Layers that do not go with each other: in a pipeline not all ranks have one of the two."""
    return [Linear(INPUTS, 8), ReLU(), ReLU(), ReLU(), ReLU(), ReLU(), Tanh(), Linear(9, CLASSES)]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"mesh": {"pipeline": COMM.size + 1}}, f"mesh: expected sizes that multiply to the {COMM.size} ranks"),
    ({"mesh": {"data": 2 * COMM.size}}, f"got data={2 * COMM.size}, pipeline=1, tensor=1"),
    ({"mesh": {"tensor": COMM.size}, "strategy": "ps-sync"}, "strategy: expected allreduce, sharded, local"),
    ({"shards": COMM.size - 1}, f"shards: expected at least as many as ranks .{COMM.size}."),
    ({"shards": 8, "batch_size": 7}, "batch size: expected at least 8 samples"),
    ({"shards": 8, "strategy": "sharded"}, "shards: deterministic training is for the strategy allreduce"),
    ({"shards": 8, "balance": True}, "shards: .*balance True"),
    ({"shards": 8, "mesh": {"tensor": COMM.size}}, "shards: .*'tensor': "),
    ({"batch_size": COMM.size - 1}, f"batch size: expected at least {COMM.size} samples"),
    ({"balance": True, "strategy": "local"}, "balance: expected the strategy allreduce or sharded"),
    ({"balance": True, "strategy": "gossip"}, "balance: .*got gossip"),
    ({"balance": True, "layers": normalised}, "batch norm: expected it per rank, .* waits"),
    ({"shards": 8, "layers": normalised}, "batch norm: .* not deterministic"),
    ({"strategy": "local", "layers": normalised}, "batch norm: .* strategy local"),
    (
        {"weights": "balanced", "data": values, "layers": lambda: plain(2)},
        "class weights: expected a data set with classes, got values",
    ),
    ({"resample": True, "data": values, "layers": lambda: plain(2)}, "resample: expected a data set with"),
    ({"layers": lambda: plain(3)}, "layers: expected outputs of 5 numbers for each sample of classes, got 3"),
    ({"layers": unfitting}, r"layer \d \(Linear\): expected samples of 9 numbers, got 8"),
    ({"layers": unfitting, "mesh": {"pipeline": COMM.size}}, r"\(Linear\): expected samples of 9 numbers"),
]


@every_rank_count
@pytest.mark.parametrize("settings, message", WRONG)
def test_what_does_not_go_together_is_an_error_on_all_ranks(settings: dict[str, Any], message: str) -> None:
    if COMM.size == 1 and "tensor" in settings.get("mesh", {}):
        pytest.skip("one rank divides nothing")
    messages = messages_of(lambda: new_trainer(COMM, **settings))
    assert len(set(messages)) == 1
    assert re.search(message, messages[0])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"strategy": "ps-async"}, "patience: expected none, got 2, but rank 0 alone evaluates"),
        ({"data": untested}, "patience: .* there are no test samples in classes"),
    ],
)
def test_patience_needs_figures_on_all_ranks(settings: dict[str, Any], message: str) -> None:
    with closing(new_trainer(COMM, **settings)) as trainer:
        messages = messages_of(lambda: trainer.train(2, patience=2))
    assert len(set(messages)) == 1
    assert re.search(message, messages[0])


@pytest.mark.parametrize(
    "read, message",
    [
        (partial(read_mnist, BAD), "/nowhere/at/all: expected a directory"),
        (partial(read_csv, BAD, None, False, 0), "/nowhere/at/all: expected a file that can be read"),
    ],
)
def test_what_rank_zero_cannot_read_is_an_error_on_all_ranks(
    read: Callable[[], object], message: str
) -> None:
    messages = messages_of(lambda: on_rank_zero(COMM, read))
    assert len(set(messages)) == 1
    assert message in messages[0]


def test_only_rank_zero_reads() -> None:
    assert on_rank_zero(COMM, lambda: f"read by {COMM.rank}") == "read by 0"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--compression", "topk:2"], "powersgd:RANK (1 or more), got 'topk:2'"),
        (["--data", "mnist", "--data-dir", str(BAD)], "/nowhere/at/all: expected a directory"),
        (["--data", "csv", "--data-file", str(BAD)], "/nowhere/at/all: expected a file that can be read"),
        (["--json", str(BAD)], "/nowhere/at/all: expected a file that can be written (--json)"),
        (["--mesh", f"data={2 * COMM.size}"], "mesh: expected sizes that multiply to the"),
        (["--batch-size", "1", "--deterministic"], "batch size: expected at least 8 samples"),
        (["--wrong"], "No such option"),
    ],
)
def test_the_command_says_what_is_wrong_once(
    capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(COMM, arguments) == USAGE_ERROR
    printed = capfd.readouterr()
    assert printed.out == ""
    if COMM.rank == 0:
        assert message in printed.err
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    else:
        assert printed.err == ""


def test_blas_threads_of_all_ranks_fit_the_cores() -> None:
    node = COMM.Split_type(MPI.COMM_TYPE_SHARED)
    threads = blas_threads(COMM)
    assert threads >= 1
    assert node.allreduce(threads) <= max(node.size, os.cpu_count() or 1)
    node.Free()


def test_one_seed_is_one_training() -> None:
    """With the same seed the same bits, with another another order, and other first values."""
    first, again, other = (trained(COMM, epochs=1, seed=seed).sha256 for seed in (1, 1, 2))
    assert first == again != other
    assert EPOCHS * STEPS_PER_EPOCH > 20  # what the tests above count on
