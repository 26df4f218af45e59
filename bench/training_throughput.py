"""``mpirun -np N python -m mpicoll.bench.training_throughput``: samples per second of one rank, and of N.

Beside it PyTorch, from the same weights, on the same rows of the same batches, with the same optimizer:
alone, and as DDP over gloo. All four take turns, an epoch each; the losses of the last one must agree.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from mpi4py import MPI

from mpicoll import Communicator
from mpicoll.train import SGD, Dataset, Sequential, Trainer, perceptron

from .contenders import private_memory
from .jobs import WRONG, about_job, agreed, main, refusing, say
from .options import json_option
from .timing import no_collection
from .training_workload import CLASSES, Options, alone, check_cores, own_core, parse, synthetic

INPUTS, HIDDEN = 784, (1024, 2048, 1024)  # five million parameters
RATE, MOMENTUM = 0.01, 0.9
BINDING = "each rank's computing thread bound to a core of its own, with one BLAS thread"
LOSS_TOLERANCE = 1e-3  # relative: float32, and sums in other orders

OURS, TORCH = "mpicoll, allreduce", "PyTorch, DDP over gloo"
NO_TORCH = "PyTorch is not installed: pip install 'mpicoll[torch]'"

Facts = dict[str, Any]
Measured = tuple[float, float]  # seconds of an epoch, and its mean loss
Epoch = Callable[[], Measured]


@click.command(
    "training_throughput", context_settings={"show_default": True, "help_option_names": ["-h", "--help"]}
)
@click.option("--batch", type=click.IntRange(min=1), default=512, help="Samples of a step, over all ranks.")
@click.option("--steps", type=click.IntRange(min=1), default=8, help="Of an epoch, which is a turn.")
@click.option("--repeat", type=click.IntRange(min=1), default=7, help="Turns of each; the median counts.")
@json_option
def _command(**given: Any) -> Options:
    """Train a perceptron of five million parameters, on one rank and on all that mpirun started.

    A rank's computing thread is bound to a core of its own, and has one BLAS thread. The same is done with
    PyTorch, if it is installed: DDP over gloo on all ranks, a plain module on one. The exit status is 1 if
    the losses differ, for then they have not done the same work.

    \b
    Example:
      mpirun -np 2 python -m mpicoll.bench.training_throughput --json throughput.json
    """
    return Options(**given)


@refusing
def run(comm: Communicator, args: Sequence[str], prog_name: str) -> int:
    """The exit status, the same on every rank."""
    options = agreed(comm, partial(parse, _command, comm, args, prog_name))
    if options is None:
        return 0
    check_cores(comm)
    known = about_job(comm, prog_name, args, vars(options))
    report = {**known, "binding": BINDING, **measure(comm, options, INPUTS, HIDDEN)}
    if comm.rank == 0:
        _publish(report, options.json)
    losses = [loss for row in report["rows"] for loss in row["losses"]]
    if not np.allclose(losses, losses[0], rtol=LOSS_TOLERANCE, atol=0):
        say(comm, f"Error: expected equal losses, of the same work, got {losses}")
        return WRONG
    return 0


command = partial(main, run)


def measure(comm: Communicator, options: Options, inputs: int, hidden: Sequence[int]) -> Facts:
    """Medians over the turns, on every rank. Collective."""
    data = synthetic(options.batch * options.steps, inputs)
    has_torch = comm.allreduce(find_spec("torch") is not None, MPI.LAND)
    with ExitStack() as stack:
        ours = _ours(comm, data, hidden, options.batch)
        parameters = ours.model.parameters.size
        epochs = {OURS: stack.enter_context(_epochs(comm, data, hidden, options.batch, ours))}
        if has_torch:
            epochs[TORCH] = stack.enter_context(_torch_epochs(comm, data, options.batch, ours.model))
        with own_core(comm), no_collection():
            rows = [
                _row(comm, name, len(data.train_y), measured)
                for name, measured in _take_turns(comm, epochs, options.repeat).items()
            ]
    notes = [] if has_torch else [NO_TORCH]
    return {"batch": options.batch, "parameters": parameters, "notes": notes, "rows": rows}


def _ours(comm: Communicator, data: Dataset, hidden: Sequence[int], batch: int) -> Trainer:
    layers = perceptron(data.inputs, hidden, CLASSES)
    return Trainer(comm, layers, data, optimizer=SGD(MOMENTUM), learning_rate=RATE, batch_size=batch)


@contextmanager
def _epochs(
    comm: Communicator, data: Dataset, hidden: Sequence[int], batch: int, together: Trainer
) -> Iterator[tuple[Epoch, Epoch]]:
    """One more epoch alone, and one together."""
    single = Communicator(MPI.COMM_SELF)
    yield partial(_epoch, _ours(single, data, hidden, batch)), partial(_epoch, together)
    together.close()
    single.Free()


def _epoch(trainer: Trainer) -> Measured:
    last = trainer.train(len(trainer.history) + 1)[-1]
    return last.seconds, last.train_loss


@contextmanager
def _torch_epochs(
    comm: Communicator, data: Dataset, batch: int, model: Sequential
) -> Iterator[tuple[Epoch, Epoch]]:
    """The same of PyTorch."""
    from .gloo import gloo  # optional, and takes seconds to import
    from .training_torch import TorchTrainer

    with gloo(comm, private_memory(0)):
        single, together = (
            TorchTrainer(ranks, model, data, batch, RATE, MOMENTUM) for ranks in (MPI.COMM_SELF, comm)
        )
        yield single.epoch, together.epoch


def _take_turns(
    comm: Communicator, epochs: dict[str, tuple[Epoch, Epoch]], repeat: int
) -> dict[str, list[tuple[Measured, Measured]]]:
    """(alone, together) of each turn; the first, in which all is set up and warms up, does not count."""
    measured: dict[str, list[tuple[Measured, Measured]]] = {name: [] for name in epochs}
    for number in range(1 + repeat):
        say(comm, f"turn {number} of {repeat}")
        for name, (single, together) in epochs.items():
            found = alone(comm, single)
            comm.Barrier()
            measured[name].append((found, together()))
    return {name: turns[1:] for name, turns in measured.items()}


def _row(comm: Communicator, name: str, samples: int, turns: Sequence[tuple[Measured, Measured]]) -> Facts:
    single, together = (samples / median(turn[i][0] for turn in turns) for i in range(2))
    losses = [loss for _, loss in turns[-1]]
    return {
        "name": name,
        "alone": single,
        "together": together,
        "efficiency": together / single / comm.size,
        "seconds_alone": [turn[0][0] for turn in turns],
        "seconds_together": [turn[1][0] for turn in turns],
        "loss": losses[1],
        "losses": losses,
    }


def _publish(report: Facts, file: Path | None) -> None:
    for row in report["rows"]:
        click.echo(
            f"{row['name']}: {row['alone']:,.0f} samples/s on 1 rank, {row['together']:,.0f} on "
            f"{report['ranks']}, efficiency {row['efficiency']:.0%}; losses {row['losses']}"
        )
    for note in report["notes"]:
        click.echo(note)
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    command(sys.argv[1:], "python -m mpicoll.bench.training_throughput")
