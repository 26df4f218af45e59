"""What the command line says: the options of ``train.py``, checked against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from mpicoll import algorithms
from mpicoll.compression import Compression
from mpicoll.compression import parse as parse_compression
from mpicoll.train.augmentation import Augmentation, parse_augmentation
from mpicoll.train.devices import CPU, DEVICES
from mpicoll.train.elastic import ELASTIC
from mpicoll.train.learning_rate import SCHEDULES
from mpicoll.train.mesh import parse_mesh
from mpicoll.train.networks import ACTIVATIONS, BATCH_NORMS
from mpicoll.train.pipeline import SCHEDULES as PIPELINE_SCHEDULES
from mpicoll.train.strategies import GRAPHS, STRATEGIES

MIB = 1 << 20
WIRE_DTYPES = {"f32": None, "f16": "float16", "bf16": "bfloat16"}
PRECISIONS = {"f32": "float32", "f64": "float64"}
DIRECTORY_OF = ("mnist", "cifar10", "npy")  # kinds of data that are a directory
DETERMINISTIC_SHARDS = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """See ``--help``."""

    data: str
    data_dir: Path | None
    data_file: Path | None
    label: str | None
    task: str
    class_weights: str | None
    resample: bool
    augment: Augmentation | None
    model: str
    hidden: tuple[int, ...]
    activation: str
    dropout: float
    batch_norm: str
    precision: str
    device: str
    optimizer: str
    lr: float | None
    momentum: float
    nesterov: bool
    weight_decay: float
    clip_norm: float | None
    lr_schedule: str
    lr_factor: float
    lr_every: int
    warmup: int
    lr_batch: int | None
    epochs: int
    batch_size: int
    accumulate: int
    balance: bool
    seed: int
    strategy: str
    algorithm: str | None
    tune: bool
    bucket_mb: float | None
    dtype: str
    compression: Compression | None
    servers: int
    staleness: int | None
    average_every: int
    graph: str
    mesh: dict[str, int] | None
    tensor_parallel: int | None
    pipeline_parallel: int | None
    micro_batches: int | None
    pipeline_schedule: str
    draw_pipeline: Path | None
    deterministic: bool
    shards: int | None
    checkpoint: Path | None
    checkpoint_every: int | None
    keep: int
    resume: bool
    elastic: bool
    patience: int | None
    json: Path | None
    metrics: Path | None
    tensorboard: Path | None
    plot: Path | None
    trace: Path | None


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


def parsed(parse: Callable[[str], T]) -> Callable[[click.Context, click.Parameter, str | None], T | None]:
    """A callback that hands an option's text to ``parse``, whose ValueError says what is wrong with it."""

    def callback(context: click.Context, param: click.Parameter, value: str | None) -> T | None:
        if value is None:
            return None
        try:
            return parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return callback


AT_LEAST_1 = click.IntRange(min=1)
ABOVE_0 = click.FloatRange(0, min_open=True)
BELOW_1 = click.FloatRange(0, 1, max_open=True)
FILE = click.Path(path_type=Path)


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
# data
@click.option(
    "--data",
    type=click.Choice(["digits", "diabetes", "mnist", "cifar10", "csv", "npy"]),
    default="digits",
    help="The data set.",
)
@click.option("--data-dir", type=FILE, help="For mnist, cifar10 and npy: the directory with its files.")
@click.option("--data-file", type=FILE, help="For csv: the file.")
@click.option(
    "--label", metavar="COLUMN", help="For csv: the column to predict, name or number.  [default: last]"
)
@click.option(
    "--task",
    type=click.Choice(["classification", "regression"]),
    default="classification",
    help="For csv: what the label is, a class or a number.",
)
@click.option(
    "--class-weights",
    metavar="balanced|0:1,1:5",
    help="What each class counts for in the loss; balanced: all classes alike.",
)
@click.option("--resample", is_flag=True, help="Draw samples so that all classes are seen equally often.")
@click.option(
    "--augment",
    metavar="KIND[,KIND...]",
    callback=parsed(parse_augmentation),
    help="Change samples in every epoch: shift:PIXELS, flip, noise:SIGMA.",
)
# model
@click.option("--model", type=click.Choice(["mlp", "cnn"]), default="mlp", help="cnn is for images.")
@click.option(
    "--hidden", metavar="N[,N...]", default="128", callback=sizes, help="Sizes of the hidden layers."
)
@click.option("--activation", type=click.Choice(list(ACTIVATIONS)), default="relu")
@click.option("--dropout", type=BELOW_1, default=0.0, callback=finite, help="After each hidden layer.")
@click.option(
    "--batch-norm",
    type=click.Choice(BATCH_NORMS),
    default="none",
    help="Before each activation: over each rank's samples, or over all ranks'.",
)
@click.option("--precision", type=click.Choice(list(PRECISIONS)), default="f32", help="Of the parameters.")
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default=CPU,
    help="Where to compute; cuda: on the GPUs of each node, with CuPy.",
)
# optimizer
@click.option("--optimizer", type=click.Choice(["sgd", "adam", "lars"]), default="sgd")
@click.option(
    "--lr",
    type=ABOVE_0,
    callback=finite,
    help="Learning rate.  [default: sgd 0.05, or 0.002 for values to predict; adam 0.001; lars 1]",
)
@click.option("--momentum", type=BELOW_1, default=0.9, callback=finite, help="Of sgd and lars.")
@click.option("--nesterov", is_flag=True, help="Nesterov's momentum, for sgd.")
@click.option("--weight-decay", type=click.FloatRange(0), default=0.0, callback=finite)
@click.option(
    "--clip-norm", type=ABOVE_0, callback=finite, help="The largest norm of all gradients together."
)
@click.option("--lr-schedule", type=click.Choice(SCHEDULES), default="constant")
@click.option(
    "--lr-factor", type=ABOVE_0, default=0.1, callback=finite, help="Of the schedules step and exponential."
)
@click.option(
    "--lr-every", type=AT_LEAST_1, default=10, help="Epochs between the drops of the schedule step."
)
@click.option(
    "--warmup", type=click.IntRange(min=0), default=0, help="Epochs in which the rate rises to --lr."
)
@click.option(
    "--lr-batch",
    type=AT_LEAST_1,
    help="The batch size that --lr is for: it is scaled by --batch-size over this.  [default: --batch-size]",
)
# steps
@click.option("--epochs", type=AT_LEAST_1, default=20)
@click.option("--batch-size", type=AT_LEAST_1, default=32, help="Per step, over all ranks.")
@click.option("--accumulate", type=AT_LEAST_1, default=1, help="Pieces that each rank cuts its part into.")
@click.option("--balance", is_flag=True, help="Give faster ranks larger parts of each batch.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of all that is random.")
# strategy
@click.option(
    "--strategy",
    type=click.Choice(list(STRATEGIES)),
    default="allreduce",
    help="How ranks that share batches arrive at new parameters.",
)
@click.option(
    "--algorithm",
    type=click.Choice(["auto", *algorithms.names("allreduce")]),
    help="The allreduce that sums the gradients, for the strategy allreduce.  [default: ring; two_shot for "
    "--deterministic, auto for --device cuda]",
)
@click.option(
    "--tune",
    is_flag=True,
    help="For allreduce: try algorithms in the first steps, where gradients travel in messages.",
)
@click.option(
    "--bucket-mb",
    type=ABOVE_0,
    callback=finite,
    help="Megabytes (2^20 bytes) of gradients that are summed together.  [default: measured]",
)
@click.option(
    "--dtype",
    type=click.Choice(list(WIRE_DTYPES)),
    default="f32",
    help="What gradients are sent as, for allreduce; sums are accumulated in f32.",
)
@click.option(
    "--compression",
    metavar="NAME[:NUMBER]",
    default="none",
    callback=parsed(parse_compression),
    help="For allreduce: fp16, bf16, int8, topk:0.01, randomk:0.01 or powersgd:4, with error feedback.",
)
@click.option(
    "--servers",
    type=click.IntRange(min=0),
    default=0,
    help="For ps-sync and ps-async: so many ranks only serve; 0: every rank works and serves a shard.",
)
@click.option(
    "--staleness",
    type=click.IntRange(min=0),
    help="For ps-async: steps that a rank may be ahead of the slowest.  [default: any number]",
)
@click.option("--average-every", type=AT_LEAST_1, default=8, help="For local: steps between averages.")
@click.option(
    "--graph", type=click.Choice(GRAPHS), default="ring", help="For gossip: who averages with whom."
)
# mesh
@click.option(
    "--mesh",
    metavar="data=D,pipeline=P,tensor=T",
    callback=parsed(parse_mesh),
    help="Divide the model, too: into P stages of layers, and the layers over T ranks.",
)
@click.option("--tensor-parallel", type=AT_LEAST_1, metavar="T", help="As --mesh tensor=T.")
@click.option("--pipeline-parallel", type=AT_LEAST_1, metavar="P", help="As --mesh pipeline=P.")
@click.option(
    "--micro-batches", type=AT_LEAST_1, help="Of each part, for a pipeline.  [default: 2 for each stage]"
)
@click.option("--pipeline-schedule", type=click.Choice(list(PIPELINE_SCHEDULES)), default="1f1b")
@click.option(
    "--draw-pipeline", type=FILE, metavar="FILE.png", help="Draw the schedule of the pipeline's stages."
)
# the same bits
@click.option("--deterministic", is_flag=True, help="The same bits at any number of ranks up to --shards.")
@click.option(
    "--shards",
    type=AT_LEAST_1,
    help=f"Logical parts of each batch, for --deterministic.  [default: {DETERMINISTIC_SHARDS}]",
)
# keeping
@click.option("--checkpoint", type=FILE, metavar="DIR", help="Keep the state of the training there.")
@click.option("--checkpoint-every", type=AT_LEAST_1, metavar="N", help="Steps.  [default: an epoch]")
@click.option("--keep", type=AT_LEAST_1, default=3, help="Checkpoints that stay, besides the best.")
@click.option("--resume", is_flag=True, help="Go on from the newest good checkpoint, at any number of ranks.")
@click.option(
    "--elastic",
    is_flag=True,
    help="When ranks die, go on with the others, at the same step; under `mpirun --with-ft ulfm`.",
)
@click.option("--patience", type=AT_LEAST_1, help="Stop after so many epochs without a smaller test loss.")
# results
@click.option("--json", type=FILE, metavar="FILE", help="Write the result to this file, too.")
@click.option("--metrics", type=FILE, metavar="FILE", help="Append each epoch's figures, as lines of JSON.")
@click.option("--tensorboard", type=FILE, metavar="DIR", help="Write each epoch's figures for TensorBoard.")
@click.option("--plot", type=FILE, metavar="FILE.png", help="Draw the loss while training.")
@click.option(
    "--trace",
    type=FILE,
    metavar="FILE.json",
    help="Record what happens when on every rank, for Perfetto and `mpicoll trace`.",
)
def command(**values: Any) -> Options:
    """Train a neural network on all ranks that mpirun started.

    The ranks share every batch, so that any number of them takes the same steps.

    Told to end, by SIGTERM or SIGUSR1, it finishes its step, keeps its state if there is a --checkpoint, and
    ends with status 75.
    """
    options = Options(**values)
    _check_data(options)
    _check_strategy(options)
    _check_mesh(options)
    _check_device(options)
    _check_others(options)
    return options


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_data(options: Options) -> None:
    """Each kind of data has options of its own."""
    kinds = {"data_dir": DIRECTORY_OF, "data_file": ("csv",), "label": ("csv",)}
    for name, users in kinds.items():
        given = getattr(options, name) is not None
        if given and options.data not in users:
            raise click.UsageError(f"{_flag(name)} is for --data {' or '.join(users)}, not {options.data}")
        if not given and options.data in users and name != "label":
            raise click.UsageError(f"--data {options.data} needs {_flag(name)}")
    if options.task == "regression" and options.data != "csv":
        what = {"diabetes": "has values to predict anyway", "npy": "says what it is by the numbers in y"}
        raise click.UsageError(
            f"--task regression is for --data csv; {options.data} {what.get(options.data, 'has classes')}"
        )


def _check_strategy(options: Options) -> None:
    """Each strategy has options of its own."""
    if options.compression is not None and options.dtype != "f32":
        raise click.UsageError(
            "--dtype and --compression both say how gradients travel: expected one of them"
        )
    servers = ("ps-sync", "ps-async")
    users = {
        "algorithm": (None, ("allreduce",)),
        "tune": (False, ("allreduce",)),
        "bucket_mb": (None, ("allreduce",)),
        "dtype": ("f32", ("allreduce",)),
        "compression": (None, ("allreduce",)),
        "servers": (0, servers),
        "staleness": (None, ("ps-async",)),
        "average_every": (8, ("local",)),
        "graph": ("ring", ("gossip",)),
        "balance": (False, ("allreduce", "sharded")),
        "elastic": (False, ELASTIC),
    }
    for name, (default, strategies) in users.items():
        if getattr(options, name) != default and options.strategy not in strategies:
            raise click.UsageError(
                f"{_flag(name)} is for --strategy {' or '.join(strategies)}, not {options.strategy}"
            )
    if options.tune and options.deterministic:
        raise click.UsageError(
            "--tune does not go with --deterministic: each algorithm adds in an order of its own"
        )
    if options.tune and options.algorithm not in (None, "auto"):
        raise click.UsageError(f"--tune looks for an algorithm: expected no --algorithm {options.algorithm}")
    for name in ("dtype", "compression"):
        if options.deterministic and getattr(options, name) != users[name][0]:
            raise click.UsageError(f"{_flag(name)} does not go with --deterministic, whose sums are exact")
    if options.precision == "f64" and (options.dtype != "f32" or options.compression is not None):
        raise click.UsageError("--dtype and --compression are for --precision f32")


def _check_mesh(options: Options) -> None:
    for name, axis in (("tensor_parallel", "tensor"), ("pipeline_parallel", "pipeline")):
        if getattr(options, name) is not None and options.mesh is not None:
            raise click.UsageError(f"{_flag(name)} is short for --mesh {axis}=...: expected one of them")
    stages = mesh_of(options).get("pipeline", 1)
    for name in ("micro_batches", "draw_pipeline"):
        if getattr(options, name) is not None and stages == 1:
            raise click.UsageError(f"{_flag(name)} is for a pipeline; see --pipeline-parallel")
    if stages > 1 and options.accumulate > 1:
        raise click.UsageError("--accumulate is not for a pipeline, which has --micro-batches")


def _check_device(options: Options) -> None:
    """What a GPU is not for."""
    reasons = {
        "deterministic": "a GPU's sums are not shown to have the same bits at any number of ranks",
        "elastic": "what a GPU is doing when a rank dies cannot be broken off",
        "compression": "it is work for a CPU; --dtype makes messages smaller, too",
    }
    for name, reason in reasons.items():
        if options.device != CPU and getattr(options, name):
            raise click.UsageError(f"{_flag(name)} is for --device {CPU}, not {options.device}: {reason}")


def _check_others(options: Options) -> None:
    if options.shards is not None and not options.deterministic:
        raise click.UsageError("--shards is for --deterministic")
    for name in ("checkpoint_every", "resume"):
        if getattr(options, name) and options.checkpoint is None:
            raise click.UsageError(f"{_flag(name)} needs --checkpoint")
    if options.nesterov and options.optimizer != "sgd":
        raise click.UsageError(f"--nesterov is for --optimizer sgd, not {options.optimizer}")


def mesh_of(options: Options) -> dict[str, int]:
    """The sizes of the mesh that were given, in either way."""
    if options.mesh is not None:
        return options.mesh
    short = {"tensor": options.tensor_parallel, "pipeline": options.pipeline_parallel}
    return {axis: size for axis, size in short.items() if size is not None}
