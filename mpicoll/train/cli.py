"""The training command: ``mpirun -np N python train.py``, or ``python -m mpicoll.train``."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any

import click
from mpi4py import MPI
from threadpoolctl import threadpool_limits

import mpicoll
from mpicoll import algorithms
from mpicoll.compression import Compression
from mpicoll.compression import parse as parse_compression
from mpicoll.faults import abort_on_exception
from mpicoll.grouped import new_bucket
from mpicoll.launch import usable_cpus
from mpicoll.train.data import Dataset, share
from mpicoll.train.errors import InputError, on_rank_zero
from mpicoll.train.loop import Trainer, parameters_sha256
from mpicoll.train.model import mean_squared_error, perceptron, softmax_cross_entropy
from mpicoll.train.optimizer import SGD
from mpicoll.train.readers import read_csv, read_digits, read_mnist
from mpicoll.train.report import check_writable, print_result, progress_for, write_json
from mpicoll.train.strategies import AllreduceStrategy

MIB = 1 << 20
WIRE_DTYPES = {"f32": None, "f16": "float16", "bf16": "bfloat16"}
USAGE_ERROR = 2  # the exit status of a command that was asked for what it cannot do


@dataclass(frozen=True)
class Options:
    """What the command line says; see ``--help``."""

    data: str
    data_dir: Path | None
    data_file: Path | None
    label: str | None
    task: str
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    hidden: tuple[int, ...]
    seed: int
    algorithm: str
    bucket_mb: float | None
    dtype: str
    compression: Compression | None
    json: Path | None


@abort_on_exception()
def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says, on all ranks, and exit: with 0, or with 2 if the user erred."""
    comm = mpicoll.Communicator(MPI.COMM_WORLD)
    status = run(comm, arguments)
    comm.Free()  # waits for all ranks: not for a failed one to reach
    sys.exit(status)


def run(comm: MPI.Intracomm, arguments: Sequence[str] | None = None) -> int:
    """The exit status, the same on every rank."""
    try:
        options = parse(arguments, aloud=comm.rank == 0)
        if options is not None:
            train(comm, options)
    except (InputError, click.ClickException) as error:
        # Every rank has this error; one of them says it.
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        if comm.rank == 0:
            click.echo(f"error: {message}", err=True)
        comm.Barrier()  # Or the launcher might end rank 0 before it has spoken.
        return USAGE_ERROR
    return 0


def parse(arguments: Sequence[str] | None, aloud: bool = True) -> Options | None:
    """The options; None if only ``--help`` was wanted. Raises `click.ClickException`."""
    with contextlib.nullcontext() if aloud else contextlib.redirect_stdout(StringIO()):
        outcome = command.main(arguments, standalone_mode=False)
    return outcome if isinstance(outcome, Options) else None


def sizes(context: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """``128`` or ``128,64``: numbers above 0."""
    numbers = tuple(int(part) if part.strip().isdecimal() else 0 for part in value.split(","))
    if min(numbers) < 1:
        raise click.BadParameter(f"{value!r}: expected whole numbers from 1, separated by commas")
    return numbers


def finite(context: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """A range does not keep NaN out, which is below and above nothing."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value}: expected a finite number")
    return value


def compression(context: click.Context, param: click.Parameter, value: str) -> Compression | None:
    """What ``--compression`` names."""
    try:
        return parse_compression(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--data", type=click.Choice(["digits", "mnist", "csv"]), default="digits", help="The data set.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="For mnist: where its four IDX files are.")
@click.option("--data-file", type=click.Path(path_type=Path), help="For csv: the file.")
@click.option(
    "--label", metavar="COLUMN", help="For csv: the column to predict, name or number.  [default: last]"
)
@click.option(
    "--task",
    type=click.Choice(["classification", "regression"]),
    default="classification",
    help="For csv: what the label is, a class or a number.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=20)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, help="Per step, over all ranks.")
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    default=0.05,
    callback=finite,
    help="Learning rate.",
)
@click.option("--momentum", type=click.FloatRange(0, 1, max_open=True), default=0.9, callback=finite)
@click.option(
    "--hidden", metavar="N[,N...]", default="128", callback=sizes, help="Sizes of the hidden layers."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of all that is random.")
@click.option(
    "--algorithm",
    type=click.Choice(["auto", *algorithms.names("allreduce")]),
    default="ring",
    help="The allreduce that sums the gradients.",
)
@click.option(
    "--bucket-mb",
    type=click.FloatRange(0, min_open=True),
    callback=finite,
    help="Megabytes (2^20 bytes) of gradients that are summed together.  [default: measured]",
)
@click.option(
    "--dtype",
    type=click.Choice(list(WIRE_DTYPES)),
    default="f32",
    help="What gradients are sent as; sums are accumulated in f32.",
)
@click.option(
    "--compression",
    metavar="NAME[:NUMBER]",
    default="none",
    callback=compression,
    help="fp16, bf16, int8, topk:0.01, randomk:0.01 or powersgd:4, with error feedback.",
)
@click.option("--json", type=click.Path(path_type=Path), help="Write the result to this file, too.")
def command(**values: Any) -> Options:
    """Train a neural network on all ranks that mpirun started, by synchronous SGD.

    The ranks share every batch, so that any number of them takes the same steps.
    """
    options = Options(**values)
    _check_data_options(options)
    return options


def _check_data_options(options: Options) -> None:
    """Each kind of data has options of its own."""
    required = {"mnist": "data_dir", "csv": "data_file"}.get(options.data)
    if required and getattr(options, required) is None:
        raise click.UsageError(f"--data {options.data} needs --{required.replace('_', '-')}")
    for name, kind in (("data_dir", "mnist"), ("data_file", "csv"), ("label", "csv")):
        if getattr(options, name) is not None and options.data != kind:
            raise click.UsageError(f"--{name.replace('_', '-')} is for --data {kind}, not {options.data}")
    if options.compression is not None and options.dtype != "f32":
        raise click.UsageError(
            "--dtype and --compression both say how gradients travel: expected one of them"
        )
    if options.task == "regression" and options.data != "csv":
        raise click.UsageError(f"--task regression is for --data csv; {options.data} has classes")


def train(comm: MPI.Intracomm, options: Options) -> dict[str, Any]:
    """Read, train, report: the result, on every rank."""
    data = load(comm, options)
    model = perceptron(data.inputs, options.hidden, data.outputs, options.seed, allocate=new_bucket)
    optimizer = SGD(model.parameters, options.lr, options.momentum)
    strategy = AllreduceStrategy(comm, model, optimizer, **_sync_options(options))
    loss = softmax_cross_entropy if data.classes else mean_squared_error
    trainer = Trainer(comm, model, loss, data, strategy, options.batch_size, options.seed)

    start = perf_counter()
    with threadpool_limits(blas_threads(comm), user_api="blas"):
        history = trainer.train(options.epochs, progress_for(comm.rank, sys.stderr.isatty()))
    seconds = perf_counter() - start

    last = history[-1]
    result = {
        "strategy": strategy.name,
        "algorithm": options.algorithm,
        "dtype": options.dtype,
        "compression": options.compression.name if options.compression is not None else "none",
        "buckets": len(strategy.sync.buckets),
        "data": data.name,
        "ranks": comm.size,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "momentum": options.momentum,
        "hidden": list(options.hidden),
        "seed": options.seed,
        "train_loss": last.train_loss,
        "test_loss": last.test_loss,
        "test_accuracy": last.test_accuracy,
        "seconds": seconds,
        "samples_per_second": sum(e.samples for e in history) / sum(e.seconds for e in history),
        "parameters": model.parameters.size,
        "parameters_sha256": parameters_sha256(comm, model),
        "parameters_identical": True,  # or parameters_sha256 would have raised
    }
    if comm.rank == 0:
        print_result(result)
        if options.json:
            write_json(options.json, result)
    return result


def _sync_options(options: Options) -> dict[str, Any]:
    return {
        "algorithm": options.algorithm,
        "bucket_bytes": None if options.bucket_mb is None else max(1, int(options.bucket_mb * MIB)),
        "wire_dtype": WIRE_DTYPES[options.dtype],
        "compression": options.compression,
    }


def load(comm: MPI.Intracomm, options: Options) -> Dataset:
    """The data on every rank; only rank 0 touches files. Raises `InputError` on every rank alike."""
    held: list[Dataset] = []

    def read_on_rank_zero() -> None:
        if options.json:
            check_writable(options.json)
        held.append(_read(options))

    on_rank_zero(comm, read_on_rank_zero)
    return share(comm, held[0] if held else None)


def _read(options: Options) -> Dataset:
    if options.data_dir:
        return read_mnist(options.data_dir)
    if options.data_file:
        return read_csv(options.data_file, options.label, options.task == "regression", options.seed)
    return read_digits(options.seed)


def blas_threads(comm: MPI.Intracomm) -> int:
    """How many threads this rank's BLAS may use: its cores, shared with the node's ranks that use them too.

    Each rank's BLAS would otherwise start a thread per core, and the ranks would keep each other waiting.
    """
    own = os.sched_getaffinity(0)
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    sharers = sum(bool(own & other) for other in node.allgather(own))
    node.Free()
    return max(1, usable_cpus() // sharers)
