"""A job of `mpicoll.bench.training`: ``mpirun ... python -m mpicoll.bench.training_runs FILE EPOCHS NAME...``

It trains with each of the setups that are named, in turn, and rewrites FILE after each.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from mpicoll import Communicator
from mpicoll.train import (
    SGD,
    Dataset,
    InputError,
    Trainer,
    on_rank_zero,
    parameters_sha256,
    perceptron,
    read_digits,
    share,
)
from mpicoll.train.keeping import assembled
from mpicoll.train.loop import Epoch, blas_threads
from mpicoll.train.pipeline import PipelineBackprop
from mpicoll.train.report import Progress
from mpicoll.train.tensor_parallel import Redistribute

from .jobs import about_job, main, refusing, say
from .training_report import Job, Row, on_ranks
from .training_setups import BATCH, HIDDEN, SHARDS, STEPS, Setup, setups

Tensors = Mapping[str, npt.NDArray[Any]]


@refusing
def run(comm: Communicator, args: Sequence[str], prog_name: str) -> int:
    """0, on every rank."""
    file, epochs, *names = args
    by_name = {setup.name: setup for setup in setups(comm.size)}
    data = digits(comm)
    references = references_of(data) if comm.rank == 0 else {}
    job = Job(about_job(comm, prog_name, args, {})["mpi"], [])
    for name in names:
        say(comm, f"{on_ranks(comm.size)}: {name}")
        setup = by_name[name]
        difference = difference_from(comm, data, setup, references.get(setup.shards, {}))
        job.rows.append(row(comm, data, setup, int(epochs), difference))
        if comm.rank == 0:
            Path(file).write_text(job.dumps())
    return 0


command = partial(main, run)


def digits(comm: Communicator) -> Dataset:
    """scikit-learn's, on every rank."""
    held: list[Dataset] = []
    try:
        on_rank_zero(comm, lambda: held.append(read_digits(seed=0)))
    except InputError as error:  # every rank has it
        raise click.ClickException(str(error)) from None
    return share(comm, held[0] if held else None)


def make_trainer(comm: Communicator, data: Dataset, setup: Setup, **given: Any) -> Trainer:
    """With the defaults of ``train.py``, but for the hidden layers, and what is ``given``."""
    return Trainer(
        comm,
        perceptron(data.inputs, HIDDEN, data.outputs),
        data,
        optimizer=SGD(momentum=0.9),
        strategy=setup.strategy,
        options=setup.options,
        mesh=setup.mesh,
        pieces=2 * setup.mesh.get("pipeline", 1),
        shards=setup.shards,
        **given,
    )


# -- the same steps as one process


def references_of(data: Dataset) -> dict[int | None, Tensors]:
    """The parameters that one process arrives at, with shards (their number) and without (None)."""
    alone = Communicator(MPI.COMM_SELF)
    return {shards: short_training(alone, data, Setup("alone", shards=shards)) for shards in (None, SHARDS)}


def difference_from(comm: Communicator, data: Dataset, setup: Setup, reference: Tensors) -> float:
    """The largest of a parameter from rank 0's ``reference``, on every rank. Collective."""
    found = short_training(comm, data, setup)
    largest = max((float(np.abs(found[name] - reference[name]).max()) for name in reference), default=0.0)
    return float(comm.bcast(largest))


def short_training(comm: Communicator, data: Dataset, setup: Setup) -> Tensors:
    """All parameters after some steps in float64, on rank 0. Collective.

    Raises `RuntimeError` where ranks that should have the same ones differ.
    """
    samples = slice(STEPS * BATCH)
    data = replace(data, train_x=data.train_x[samples], train_y=data.train_y[samples])
    trainer = make_trainer(comm, data, setup, batch_size=BATCH, dtype=np.float64)
    trainer.train(epochs=1)
    parameters_sha256(trainer)
    tensors = assembled(trainer, {"": trainer.model.parameters})
    trainer.close()
    return tensors


# -- accuracy, bytes, steps


class SentInSteps(Progress):
    """What a rank sends in steps, and not for evaluation between epochs."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.bytes = 0.0
        self._before = self._now = bytes_sent(trainer)

    def step(self, samples: int) -> None:
        self._now = bytes_sent(self.trainer)

    def epoch(self, epoch: Epoch) -> None:
        self.bytes += self._now - self._before
        self._before = bytes_sent(self.trainer)


def bytes_sent(trainer: Trainer) -> float:
    """By this rank so far: gradients and parameters, and values between the parts of a model."""
    total = trainer.strategy.bytes_sent
    if isinstance(trainer.backprop, PipelineBackprop):
        total += trainer.backprop.bytes_sent
    return total + sum(layer.bytes_sent for layer in trainer.model.layers if isinstance(layer, Redistribute))


def row(comm: Communicator, data: Dataset, setup: Setup, epochs: int, difference: float) -> Row:
    """Train, and say what came of it, on every rank. Collective."""
    trainer = make_trainer(comm, data, setup)
    counter = SentInSteps(trainer)
    history = comm.bcast(trainer.train(epochs, counter))
    # A rank that only serves takes no steps: what it sends is what it is asked for in them.
    sent = comm.allreduce(bytes_sent(trainer) if trainer.strategy.serves_only else counter.bytes)
    with threadpool_limits(blas_threads(comm), user_api="blas"):
        accuracy = comm.bcast(trainer.evaluate()[1])
    trainer.close()
    steps = history[-1].step
    return Row(
        ranks=comm.size,
        name=setup.name,
        mesh=setup.mesh,
        bound=setup.bound,
        difference=difference,
        accuracy=accuracy,
        sent=sent / steps / comm.size,
        steps_per_second=steps / sum(epoch.seconds for epoch in history),
    )


if __name__ == "__main__":
    command(sys.argv[1:], "python -m mpicoll.bench.training_runs")
