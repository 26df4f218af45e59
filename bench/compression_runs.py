"""The training that `mpicoll.bench.compression` compares: tasks, compressions, their learning rates.

Steps and batches are the same for every compression and at every number of ranks. A task's learning rate is
the best of three for float32. The other compressions have the same, but for random k: there it is the best of
four, from a half to a fiftieth. They were chosen with seeds 10 to 12, of which none is a default one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import click
import numpy as np

from mpicoll import Communicator
from mpicoll.compression import parse
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
from mpicoll.train.data import scaled, split
from mpicoll.train.seeds import random_stream
from mpicoll.train.strategies import Allreduce

from . import compression_options
from .compression_options import Options, check_plot
from .compression_report import BASELINE, LAST_EPOCHS, Outcome, Results, Row, dumps, plot, show
from .jobs import about_job, agreed, main, refusing, say
from .options import check_writable

BUCKET_BYTES = 4 << 20  # fixed: buckets of a measured size might differ, and with them what is chosen in each

SAMPLES, INPUTS, CLASSES = 20_000, 256, 32
LATENT, TEACHER_UNITS = 6, 32  # with more of them so few samples would teach little
NOISE = 0.2  # times an input's standard deviation


@dataclass(frozen=True)
class Task:
    """What is learned, and how; the same for all compressions."""

    name: str
    read: Callable[[int], Dataset]  # from a seed
    hidden: tuple[int, ...]
    batch_size: int
    epochs: int
    learning_rate: float


@dataclass(frozen=True)
class Method:
    """A way of sending gradients: ``options`` are those of `GradientSync`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    shorter: float = 1.0  # the learning rate, times float32's
    reason: str = ""  # of that


def synthetic(seed: int) -> Dataset:
    """The classes that a random teacher, 6-32-32 with ReLUs, gives to 20,000 points.

    What is seen of a point z is x = z A + noise, in 256 dimensions.
    """
    random = random_stream(seed, "teacher")
    z = random.standard_normal((SAMPLES, LATENT))
    hidden = np.maximum(z @ random.standard_normal((LATENT, TEACHER_UNITS)), 0)
    scores = hidden @ random.standard_normal((TEACHER_UNITS, CLASSES))
    y = (scores - scores.mean(axis=0)).argmax(axis=1)
    x = z @ random.standard_normal((LATENT, INPUTS)) / LATENT**0.5
    x += NOISE * random.standard_normal(x.shape)
    return scaled(split("synthetic", CLASSES, x, y, seed), axis=None)


TASKS = (
    Task("digits", read_digits, (128,), batch_size=32, epochs=20, learning_rate=0.05),
    Task("synthetic", synthetic, (512, 512), batch_size=128, epochs=10, learning_rate=0.01),
)


def _compressed(name: str, shorter: float = 1.0, reason: str = "") -> Method:
    return Method(name, {"compression": parse(name)}, shorter, reason)


WAITING = "gradients wait 1/fraction steps on average and then come all at once, where long steps overshoot"

METHODS = (
    Method(BASELINE),
    Method("wire bfloat16", {"wire_dtype": "bfloat16"}),
    Method("wire float16", {"wire_dtype": "float16"}),
    *map(_compressed, ("bf16", "fp16", "int8", "topk:0.1", "topk:0.01", "topk:0.001")),
    _compressed("randomk:0.1", 0.2, WAITING),
    _compressed("randomk:0.01", 0.1, WAITING),
    *map(_compressed, ("powersgd:1", "powersgd:4")),
)


@refusing
def run(comm: Communicator, args: Sequence[str], prog_name: str) -> int:
    """The exit status, the same on every rank."""
    options = agreed(comm, partial(_parse, comm, args, prog_name))
    if options is None:
        return 0
    try:
        outcomes = measure(comm, TASKS, METHODS, options.epochs, options.seeds)
    except InputError as error:  # every rank has it
        raise click.ClickException(str(error)) from None
    about = about_job(comm, prog_name, args, vars(options))
    known = {name: about[name] for name in ("command", "date", "machine", "mpi", "ranks")}
    if comm.rank == 0:
        _publish(Results(**known, seeds=options.seeds, outcomes=outcomes), options)
    return 0


command = partial(main, run)


def _parse(comm: Communicator, args: Sequence[str], prog_name: str) -> Options | None:
    """None if only ``--help`` was wanted."""
    outcome = compression_options.command.main(list(args), prog_name, standalone_mode=False)
    if not isinstance(outcome, Options):
        return None
    check_plot(outcome, comm.size)
    for flag, path in (("--json", outcome.json), ("--plot", outcome.plot)):
        if path is not None and comm.rank == 0:
            check_writable(flag, path)
    return outcome


def _publish(results: Results, options: Options) -> None:
    show(results, options.markdown)
    if options.json is not None:
        options.json.write_text(dumps(results))
    if options.plot is not None:
        plot(results, options.plot)


def measure(
    comm: Communicator, tasks: Sequence[Task], methods: Sequence[Method], epochs: int | None, seeds: list[int]
) -> list[Outcome]:
    """Train every task with every method from every seed; ``epochs`` None: as many as each task says.

    Raises `InputError`, on all ranks, where data are missing.
    """
    return [_outcome(comm, task, methods, epochs or task.epochs, seeds) for task in tasks]


def _outcome(
    comm: Communicator, task: Task, methods: Sequence[Method], epochs: int, seeds: list[int]
) -> Outcome:
    accuracies: dict[str, list[float | None]] = {method.name: [] for method in methods}
    sent: dict[str, float] = {}
    for number, seed in enumerate(seeds, 1):
        data = _data(comm, task, seed)
        for method in methods:
            say(comm, f"{task.name}, {method.name}, seed {seed} ({number} of {len(seeds)})")
            trainer = _trainer(comm, task, method, data, seed)
            parameters, sent[method.name] = trainer.parameter_count(), bytes_sent(trainer)
            accuracies[method.name].append(_accuracy(trainer, epochs))
            trainer.close()
    rows = [
        Row(
            method.name,
            task.learning_rate * method.shorter,
            method.reason,
            sent[method.name],
            accuracies[method.name],
        )
        for method in methods
    ]
    return Outcome(task.name, parameters, len(data.train_x), len(data.test_x), task.batch_size, epochs, rows)


def _data(comm: Communicator, task: Task, seed: int) -> Dataset:
    """Rank 0's on every rank: a teacher's scores, computed by another processor, might differ a little."""
    held: list[Dataset] = []
    on_rank_zero(comm, lambda: held.append(task.read(seed)))
    return share(comm, held[0] if held else None)


def _trainer(comm: Communicator, task: Task, method: Method, data: Dataset, seed: int) -> Trainer:
    return Trainer(
        comm,
        perceptron(data.inputs, task.hidden, data.outputs),
        data,
        optimizer=SGD(momentum=0.9),
        learning_rate=task.learning_rate * method.shorter,
        strategy=Allreduce.name,
        options={"bucket_bytes": BUCKET_BYTES, **method.options},
        batch_size=task.batch_size,
        seed=seed,
    )


def _accuracy(trainer: Trainer, epochs: int) -> float | None:
    """The mean after each of the last epochs; None if the loss became no number.

    Raises RuntimeError, on all ranks, if their parameters have come to differ.
    """
    try:
        history = trainer.train(epochs)
    except InputError:
        return None
    parameters_sha256(trainer)
    return fmean(epoch.test_accuracy or 0.0 for epoch in history[-LAST_EPOCHS:])


def bytes_sent(trainer: Trainer) -> float:
    """Bytes that one rank sends per step: see `mpicoll.GradientSync.bytes_sent_per_step`."""
    assert isinstance(trainer.strategy, Allreduce)
    return trainer.strategy.sync.bytes_sent_per_step
