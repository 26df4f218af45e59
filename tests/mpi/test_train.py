"""Training on the ranks of this job: the same steps as one process, bad input on every rank alike."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll import algorithms
from mpicoll.train import (
    SGD,
    AllreduceStrategy,
    Dataset,
    InputError,
    Trainer,
    mean_squared_error,
    on_rank_zero,
    parameters_sha256,
    perceptron,
    read_csv,
    read_digits,
    read_mnist,
    share,
    softmax_cross_entropy,
)
from mpicoll.train.cli import USAGE_ERROR, blas_threads, parse, run, train

COMM = mpicoll.Communicator(MPI.COMM_WORLD)

pytestmark = pytest.mark.mpi


def digits() -> Dataset:
    return share(COMM, read_digits(seed=0) if COMM.rank == 0 else None)


def values() -> Dataset:
    """Six features and two values to predict, a number of samples that no rank count divides."""
    random = np.random.default_rng(3)
    x = random.standard_normal((151, 6)).astype(np.float32)
    y = np.stack([x[:, 0] * x[:, 1], x[:, 2:].sum(axis=1)], axis=1)
    return Dataset("values", 0, x[:120], y[:120], x[120:], y[120:])


def trained(
    comm: MPI.Intracomm,
    data: Dataset,
    loss: Any,
    epochs: int = 2,
    batch_size: int = 50,
    dtype: Any = np.float64,
    **options: Any,
) -> Any:
    """The trainer and its history; ranks begin with different parameters, but for the broadcast."""
    model = perceptron(data.inputs, [16], data.outputs, seed=comm.rank, dtype=dtype)
    strategy = AllreduceStrategy(comm, model, SGD(model.parameters, learning_rate=0.01), **options)
    trainer = Trainer(comm, model, loss, data, strategy, batch_size=batch_size)
    return trainer, trainer.train(epochs)


@pytest.mark.parametrize("make, loss", [(digits, softmax_cross_entropy), (values, mean_squared_error)])
@pytest.mark.parametrize(
    "batch_size, dtype, tolerance", [(50, "f8", 1e-11), (119, "f8", 1e-11), (50, "f4", 1e-4)]
)
def test_any_number_of_ranks_takes_the_steps_of_one(
    make: Callable[[], Dataset], loss: Any, batch_size: int, dtype: Any, tolerance: float
) -> None:
    data = make()
    trainer, history = trained(COMM, data, loss, batch_size=batch_size, dtype=dtype)
    alone, expected = trained(MPI.COMM_SELF, data, loss, batch_size=batch_size, dtype=dtype)
    np.testing.assert_allclose(trainer.model.parameters, alone.model.parameters, rtol=0, atol=tolerance)
    for epoch, single in zip(history, expected, strict=True):
        assert epoch.train_loss == pytest.approx(single.train_loss, rel=tolerance)
        assert epoch.test_loss == pytest.approx(single.test_loss, rel=tolerance)
        assert epoch.samples == len(data.train_x)
        if data.classes:
            assert epoch.test_accuracy == pytest.approx(single.test_accuracy, abs=2 / len(data.test_x))
        else:
            assert epoch.test_accuracy is None
    assert history[-1].train_loss < 0.9 * history[0].train_loss


@pytest.mark.parametrize("algorithm", ["auto", *algorithms.names("allreduce")])
def test_every_allreduce_algorithm_trains(algorithm: str) -> None:
    trainer, _ = trained(COMM, values(), mean_squared_error, algorithm=algorithm)
    alone, _ = trained(MPI.COMM_SELF, values(), mean_squared_error)
    np.testing.assert_allclose(trainer.model.parameters, alone.model.parameters, rtol=0, atol=1e-11)
    parameters_sha256(COMM, trainer.model)  # raises where ranks differ


@pytest.mark.parametrize("bucket_bytes", [1, 300, 1 << 20])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_buckets_of_any_size_train_alike(bucket_bytes: int, dtype: str) -> None:
    trainer, _ = trained(COMM, values(), mean_squared_error, dtype=dtype, bucket_bytes=bucket_bytes)
    whole, _ = trained(COMM, values(), mean_squared_error, dtype=dtype, bucket_bytes=1 << 30)
    np.testing.assert_array_equal(trainer.model.parameters, whole.model.parameters)


def test_mpi4py_s_own_communicator_does_as_well() -> None:
    trainer, _ = trained(MPI.COMM_WORLD, values(), mean_squared_error)
    alone, _ = trained(MPI.COMM_SELF, values(), mean_squared_error)
    np.testing.assert_allclose(trainer.model.parameters, alone.model.parameters, rtol=0, atol=1e-11)


def test_parameters_and_figures_are_the_same_on_all_ranks() -> None:
    trainer, history = trained(COMM, digits(), softmax_cross_entropy, dtype=np.float32)
    parameters = COMM.allgather(trainer.model.parameters.tobytes())
    assert len(set(parameters)) == 1
    assert len(set(COMM.allgather(parameters_sha256(COMM, trainer.model)))) == 1
    assert len(set(COMM.allgather(repr(history)))) == 1


def test_different_parameters_are_found_on_all_ranks() -> None:
    model = perceptron(4, [3], 2)
    if COMM.rank == COMM.size - 1:
        model.parameters[0] += 1
    if COMM.size == 1:
        assert len(parameters_sha256(COMM, model)) == 64
        return
    with pytest.raises(RuntimeError, match=rf"those of \[{COMM.size - 1}\] differ from rank 0's"):
        parameters_sha256(COMM, model)


def test_batches_smaller_than_the_ranks() -> None:
    """One sample per step: all ranks but one have an empty part, every time."""
    few = values()
    few = replace(
        few, train_x=few.train_x[:13], train_y=few.train_y[:13], test_x=few.test_x[:1], test_y=few.test_y[:1]
    )
    trainer, history = trained(COMM, few, mean_squared_error, batch_size=1)
    alone, expected = trained(MPI.COMM_SELF, few, mean_squared_error, batch_size=1)
    np.testing.assert_allclose(trainer.model.parameters, alone.model.parameters, rtol=0, atol=1e-11)
    assert history[-1].test_loss == pytest.approx(expected[-1].test_loss)


def test_share_gives_rank_zero_s_data() -> None:
    ours = values()
    data = share(COMM, ours if COMM.rank == 0 else None)
    assert (data.name, data.classes) == ("values", 0)
    for name in ("train_x", "train_y", "test_x", "test_y"):
        np.testing.assert_array_equal(getattr(data, name), getattr(ours, name))
        assert getattr(data, name).dtype == np.float32


def test_a_learning_rate_that_is_too_high_ends_on_all_ranks() -> None:
    data = values()
    model = perceptron(data.inputs, [16], data.outputs)
    strategy = AllreduceStrategy(COMM, model, SGD(model.parameters, learning_rate=1e6))
    trainer = Trainer(COMM, model, mean_squared_error, data, strategy, batch_size=8)
    with pytest.raises(InputError, match=r"training loss to be a number.*lower the learning rate"):
        trainer.train(3)


# Bad input ------------------------------------------------------------------------------------------

BAD = Path("/nowhere/at/all")


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
    with pytest.raises(InputError, match=message) as error:
        on_rank_zero(COMM, read)
    assert len(set(COMM.allgather(str(error.value)))) == 1


def test_only_rank_zero_reads() -> None:
    assert on_rank_zero(COMM, lambda: f"read by {COMM.rank}") == "read by 0"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dtype", "bf16", "--compression", "int8"], "expected one of them"),
        (["--compression", "topk:2"], "powersgd:RANK (1 or more), got 'topk:2'"),
        (["--bucket-mb", "0"], "0.0 is not in the range"),
        (["--bucket-mb", "nan"], "expected a finite number"),
        (["--algorithm", "rnig"], "'rnig' is not one of 'auto', 'ring', "),
        (["--hidden", "128,0"], "'128,0': expected whole numbers from 1"),
        (["--lr", "-1"], "-1.0 is not in the range"),
        (["--lr", "nan"], "expected a finite number"),
        (["--data", "mnist"], "--data mnist needs --data-dir"),
        (["--data", "mnist", "--data-dir", str(BAD)], "/nowhere/at/all: expected a directory"),
        (["--data-file", str(BAD)], "--data-file is for --data csv, not digits"),
        (["--data", "csv", "--data-file", str(BAD)], "/nowhere/at/all: expected a file that can be read"),
        (["--task", "regression"], "digits has classes"),
        (["--json", str(BAD)], "/nowhere/at/all: expected a file that can be written (--json)"),
        (["--json", "/"], "/: expected a file that can be written (--json), but: it is a directory"),
        (["--epochs", "0"], "0 is not in the range"),
        (["--wrong"], "No such option"),
        (["surplus"], "unexpected extra argument"),
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


@pytest.mark.parametrize(
    "arguments, least",
    [
        (["--dtype", "bf16"], 0.96),
        (["--dtype", "f16"], 0.96),
        (["--compression", "fp16"], 0.96),
        (["--compression", "bf16"], 0.96),
        (["--compression", "int8"], 0.96),
        (["--compression", "topk:0.01"], 0.96),
        (["--compression", "randomk:0.1"], 0.95),
        (["--compression", "powersgd:4"], 0.96),
    ],
)
def test_gradients_in_fewer_bytes_train_as_well(arguments: list[str], least: float) -> None:
    options = parse(arguments, aloud=False)
    assert options is not None
    result = train(COMM, options)
    assert result["test_accuracy"] >= least
    assert arguments[1] in (result["dtype"], result["compression"])


def test_blas_threads_of_all_ranks_fit_the_cores() -> None:
    node = COMM.Split_type(MPI.COMM_TYPE_SHARED)
    threads = blas_threads(COMM)
    assert threads >= 1
    assert node.allreduce(threads) <= max(node.size, os.cpu_count() or 1)
    node.Free()
