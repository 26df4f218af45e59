"""``mpirun -np N python -m mpicoll.bench.training_uneven``: what one slow rank costs, and what helps.

The last rank is made three times as slow: after each of its gradients it computes something else for twice as
long. With s_r the samples per second of rank r alone,

    ideal = s_0 + s_1 + ... + s_(p-1)             nobody waits for anybody
    even  = p s_(p-1), at most                    equal parts of each batch: all wait for the slow rank

The strategy allreduce is measured with equal parts and with ``balance=True``; and of ps-async, where ranks do
not wait for each other, how fast a fast rank is beside the slow one, and beside fast ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click
import numpy as np
from mpi4py import MPI

from mpicoll import Communicator
from mpicoll.train import SGD, Dataset, Trainer, perceptron
from mpicoll.train.backprop import Backprop, Part
from mpicoll.train.balance import EVERY
from mpicoll.train.report import Progress

from .jobs import about_job, agreed, main, refusing, say
from .options import json_option
from .timing import no_collection
from .training_workload import CLASSES, Options, alone, check_cores, own_core, parse, synthetic

INPUTS, HIDDEN = 784, (1024, 1024)  # two million parameters
RATE, MOMENTUM = 0.01, 0.9
BINDING = "each rank bound to a core of its own, with one BLAS thread"
SLOWDOWN = 3.0
SETTLED = 10 * EVERY  # steps after which shares are within a percent or so of the speeds
SIDE = 64  # of the matrices that the slow rank multiplies: some microseconds each

Facts = dict[str, Any]


@click.command(
    "training_uneven", context_settings={"show_default": True, "help_option_names": ["-h", "--help"]}
)
@click.option("--batch", type=click.IntRange(min=2), default=256, help="Samples of a step, over all ranks.")
@click.option("--steps", type=click.IntRange(min=1), default=24, help="Of an epoch, which is a turn.")
@click.option("--repeat", type=click.IntRange(min=1), default=5, help="Turns of each; the median counts.")
@json_option
def _command(**given: Any) -> Options:
    """Train beside a rank that is three times as slow as the others, the last of those that mpirun started.

    Shown are samples per second: of ranks alone, their sum, of all ranks with equal parts of each batch and
    with balanced ones; and of a fast rank with an asynchronous parameter server, beside the slow rank and
    beside fast ones.

    \b
    Example:
      mpirun -np 2 python -m mpicoll.bench.training_uneven --json uneven.json
    """
    return Options(**given)


@refusing
def run(comm: Communicator, args: Sequence[str], prog_name: str) -> int:
    """0 or a usage error's status, the same on every rank."""
    options = agreed(comm, partial(parse, _command, comm, args, prog_name))
    if options is None:
        return 0
    if comm.size < 2:
        raise click.UsageError("expected two ranks or more: a fast one and a slow one")
    check_cores(comm)
    known = about_job(comm, prog_name, args, vars(options))
    report = {**known, "binding": BINDING, **measure(comm, options, INPUTS, HIDDEN)}
    if comm.rank == 0:
        _publish(report, options.json)
    return 0


command = partial(main, run)


class Slowed(Backprop):
    """Takes ``slowdown`` times as long. What fills the time lets other threads run, as gradients do."""

    def __init__(self, backprop: Backprop, slowdown: float):
        super().__init__(backprop.model, backprop.loss, backprop.pieces)
        self.slowdown = slowdown
        self.a, self.b, self.c = np.ones((3, SIDE, SIDE), np.float32)

    def gradients(self, part: Part, ready: Callable[[int], None]) -> Any:
        begin = perf_counter()
        loss = super().gradients(part, ready)
        now = perf_counter()
        end = begin + self.slowdown * (now - begin)
        while perf_counter() < end:
            np.matmul(self.a, self.b, out=self.c)
        return loss


class OwnTime(Progress):
    """This rank's seconds from the first step's end to the last one's, and the steps between."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step(self, samples: int) -> None:
        self.ends.append(perf_counter())

    @property
    def per_step(self) -> float:
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


@dataclass(frozen=True)
class Task:
    """What is trained, and by whom."""

    comm: Communicator
    single: Communicator
    data: Dataset
    hidden: Sequence[int]
    batch: int

    @property
    def part(self) -> int:
        """Samples of a batch for one rank of all."""
        return self.batch // self.comm.size

    def trainer(self, slow: bool, together: bool = True, **given: Any) -> Trainer:
        """Of this rank alone or of all; ``slow``: with the last rank slowed."""
        comm, batch = (self.comm, self.batch) if together else (self.single, self.part)
        layers = perceptron(self.data.inputs, self.hidden, CLASSES)
        optimizer = SGD(MOMENTUM)
        trainer = Trainer(
            comm, layers, self.data, optimizer=optimizer, learning_rate=RATE, batch_size=batch, **given
        )
        if slow and self.comm.rank == self.comm.size - 1:
            assert isinstance(trainer.backprop, Backprop)
            trainer.backprop = Slowed(trainer.backprop, SLOWDOWN)
        return trainer


def measure(comm: Communicator, options: Options, inputs: int, hidden: Sequence[int]) -> Facts:
    """Samples per second, medians over the turns, on every rank. Collective."""
    data = synthetic(options.batch * options.steps, inputs)
    single = Communicator(MPI.COMM_SELF)
    task = Task(comm, single, data, hidden, options.batch)
    with own_core(comm), no_collection():
        facts = _measure(task, options)
    single.Free()
    return facts


def _measure(task: Task, options: Options) -> Facts:
    comm = task.comm
    single = task.trainer(slow=True, together=False)
    even, balanced = task.trainer(slow=True), task.trainer(slow=True, balance=True)
    say(comm, "warming up: until shares have settled")
    for trainer, steps in ((single, 1), (even, 1), (balanced, SETTLED)):
        trainer.train(-(-steps // trainer.steps_per_epoch))
    turns: dict[str, list[float]] = {}
    for number in range(1, options.repeat + 1):
        say(comm, f"turn {number} of {options.repeat}")
        found = {
            "fast": alone(comm, partial(_speed, single), rank=0),
            "slow": alone(comm, partial(_speed, single), rank=comm.size - 1),
            "even": _speed(even),
            "balanced": _speed(balanced),
            "async_beside_slow": _speed_of_fast(task, slow=True),
            "async_beside_fast": _speed_of_fast(task, slow=False),
        }
        for name, speed in found.items():
            turns.setdefault(name, []).append(speed)
    assert balanced.balance is not None
    shares = balanced.balance.history[-1][1].tolist()
    for trainer in (single, even, balanced):
        trainer.close()
    speeds = {name: median(speeds) for name, speeds in turns.items()}
    return {
        "batch": options.batch,
        "slowdown": SLOWDOWN,
        **speeds,
        "ideal": (comm.size - 1) * speeds["fast"] + speeds["slow"],
        "shares": shares,
        "turns": turns,
    }


def _speed(trainer: Trainer) -> float:
    """Samples per second of one more epoch. Collective over the trainer's ranks."""
    last = trainer.train(len(trainer.history) + 1)[-1]
    return last.samples / last.seconds


def _speed_of_fast(task: Task, slow: bool) -> float:
    """Rank 0's samples per second with an asynchronous parameter server, on every rank. Collective."""
    trainer = task.trainer(slow, strategy="ps-async")
    own = OwnTime()
    trainer.train(1, own)
    trainer.close()
    speed: float = task.comm.bcast(task.part / own.per_step)
    return speed


def _publish(report: Facts, file: Path | None) -> None:
    for name in ("fast", "slow", "ideal", "even", "balanced", "async_beside_fast", "async_beside_slow"):
        click.echo(f"{name:18} {report[name]:10,.0f} samples/s")
    click.echo(f"shares of the balanced batch: {report['shares']}")
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    command(sys.argv[1:], "python -m mpicoll.bench.training_uneven")
