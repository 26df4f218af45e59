"""The training command: ``mpirun -np N python train.py``, or ``python -m mpicoll.train``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from io import StringIO
from time import perf_counter
from typing import Any, NoReturn

import click
from mpi4py import MPI

import mpicoll
from mpicoll.faults import abort_on_exception
from mpicoll.trace.chrome import UnwritableError
from mpicoll.trace.recorder import Recorder, record
from mpicoll.trace.training import watch_training
from mpicoll.train.data import Dataset, share
from mpicoll.train.devices import CPU, choose_device
from mpicoll.train.elastic import leave
from mpicoll.train.errors import AloneError, InputError, on_rank_zero
from mpicoll.train.hashes import parameters_sha256
from mpicoll.train.keeping import Checkpoints, Keeper, resume
from mpicoll.train.layers import Layer
from mpicoll.train.learning_rate import LearningRate, scaled_rate
from mpicoll.train.loop import Epoch, Trainer
from mpicoll.train.metrics import JsonLines, LossCurve, TensorBoard
from mpicoll.train.networks import convolutional, perceptron
from mpicoll.train.optimizer import LARS, SGD, Adam, Optimizer
from mpicoll.train.options import (
    DETERMINISTIC_SHARDS,
    MIB,
    PRECISIONS,
    WIRE_DTYPES,
    Options,
    command,
    mesh_of,
)
from mpicoll.train.pipeline import SCHEDULES
from mpicoll.train.pipeline_drawing import draw_png
from mpicoll.train.preemption import PREEMPTED, Notice, PreemptedError
from mpicoll.train.readers import read_cifar10, read_csv, read_diabetes, read_digits, read_mnist, read_npy
from mpicoll.train.report import (
    FromRankZero,
    Progress,
    Several,
    check_writable,
    print_result,
    progress_for,
    write_json,
)
from mpicoll.train.sampling import parse_class_weights
from mpicoll.train.strategies.allreduce import Allreduce

USAGE_ERROR = 2  # the exit status of a command that was asked for what it cannot do


@abort_on_exception()
def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says, on all ranks, and exit: 0, 2 if the user erred, 75 if told to end."""
    comm = mpicoll.Communicator(MPI.COMM_WORLD)
    status = run(comm, arguments)
    comm.Free()  # waits for all ranks: not for a failed one to reach
    sys.exit(status)


def run(comm: MPI.Intracomm, arguments: Sequence[str] | None = None) -> int:
    """The exit status, the same on every rank. Where ranks were lost, the process ends here."""
    left, status = comm, 0
    try:
        options = parse(arguments, aloud=comm.rank == 0)
        if options is not None and train(comm, options)["lost"]:
            leave()
    except AloneError as error:
        click.echo(f"error: {error}", err=True)
        comm.Abort(USAGE_ERROR)
    except click.ClickException as error:
        status = _say(comm, f"error: {error.format_message()}", USAGE_ERROR)
    except InputError as error:
        left = error.comm or comm
        status = _say(left, f"error: {error}", USAGE_ERROR)
    except PreemptedError as error:
        left = error.comm
        status = _say(left, f"note: {error}", PREEMPTED)
    if left is not comm:
        leave(status)
    return status


def _say(comm: MPI.Intracomm, text: str, status: int) -> int:
    """Every rank has this to say; one of them does. Returns ``status``."""
    if comm.rank == 0:
        click.echo(text, err=True)
    comm.Barrier()  # Or the launcher might end rank 0 before it has spoken.
    return status


def parse(arguments: Sequence[str] | None, aloud: bool = True) -> Options | None:
    """The options; None if only ``--help`` was wanted. Raises `click.ClickException`."""
    with contextlib.nullcontext() if aloud else contextlib.redirect_stdout(StringIO()):
        outcome = command.main(arguments, standalone_mode=False)
    return outcome if isinstance(outcome, Options) else None


def train(comm: MPI.Intracomm, options: Options) -> dict[str, Any]:
    """Read, train, report: the result, on every rank that is left. Raises `PreemptedError` if told to end."""
    with Notice() as notice:
        choose_device(comm, options.device)  # before data are read: one that is not there is soon known
        data = load(comm, options)
        with _recording(comm, options) as recorder:
            return _train(comm, options, data, notice, recorder)


@contextlib.contextmanager
def _recording(comm: MPI.Intracomm, options: Options) -> Iterator[Recorder | None]:
    """What records all that follows, if it is to be recorded."""
    if options.trace is None:
        yield None
        return
    assert isinstance(comm, mpicoll.Communicator)
    try:
        with record(comm, options.trace, alike=(InputError, PreemptedError)) as recorder:
            yield recorder
    except UnwritableError as error:
        raise InputError(str(error)) from error


def _train(
    comm: MPI.Intracomm, options: Options, data: Dataset, notice: Notice, recorder: Recorder | None
) -> dict[str, Any]:
    with contextlib.nullcontext() if recorder is None else recorder.phase("setup"):
        trainer = make_trainer(comm, options, data)
        notes = resume(trainer, options.checkpoint) if options.resume and options.checkpoint else []
        keeper: Keeper = Keeper()
        if options.checkpoint:
            keeper = Checkpoints(comm, options.checkpoint, options.checkpoint_every, options.keep)
        progress = make_progress(options, trainer)
    if recorder is not None:
        watch_training(recorder, trainer, keeper)
    if comm.rank == 0:
        for note in filter(None, [trainer.device.note, *notes, _no_choice(trainer)]):
            click.echo(f"note: {note}", err=True)
    begin = perf_counter()
    given = progress, keeper, notice, begin, recorder
    try:
        result = trainer.elastically(lambda: _trained(trainer, options, *given))
    except AloneError:
        _save_alone(recorder, options)
        raise
    except (InputError, PreemptedError) as error:
        error.comm = trainer.comm
        if trainer.lost:
            _save_alone(recorder, options)
        trainer.close()  # which lets go of ranks that wait for this one
        raise
    if result["lost"]:
        _save_alone(recorder, options)
    trainer.close()
    return result


def _tuning(trainer: Trainer) -> str:
    """What came of --tune; empty without it."""
    return trainer.strategy.sync.tuning if isinstance(trainer.strategy, Allreduce) else ""


def _no_choice(trainer: Trainer) -> str:
    """Why --tune tries nothing; empty if it does, or is not given."""
    tuning = _tuning(trainer)
    return f"--tune: {tuning}" if tuning.startswith("none") else ""


def _save_alone(recorder: Recorder | None, options: Options) -> None:
    """Keep what this rank has recorded, where not all ranks come to write it together."""
    if recorder is not None and options.trace is not None:
        recorder.save_alone(options.trace)


def _trained(
    trainer: Trainer,
    options: Options,
    progress: Progress,
    keeper: Keeper,
    notice: Notice,
    begin: float,
    recorder: Recorder | None,
) -> dict[str, Any]:
    """Train, and report: the result."""
    history = trainer.train(options.epochs, progress, keeper, options.patience, notice.is_given)
    seconds = perf_counter() - begin
    if trainer.strategy.lost:
        _save_alone(recorder, options)
        _end_without(trainer, options, history, seconds)
    comm = trainer.comm
    if any(comm.allgather(trainer.stopped)):
        raise PreemptedError(_farewell(trainer, options), comm)
    result = _result(trainer, options, *comm.bcast((history, seconds)))
    _report(comm, options, result)
    if trainer.elastic:
        comm.Barrier()  # if rank 0 dies before it has reported, another one will
    return result


def _farewell(trainer: Trainer, options: Options) -> str:
    kept = "which was not kept: there is no --checkpoint"
    if options.checkpoint:
        kept = f"whose state is in {options.checkpoint}: go on with --resume"
    return f"told to end, after step {trainer.position.step}, {kept}"


def _end_without(trainer: Trainer, options: Options, history: list[Epoch], seconds: float) -> NoReturn:
    """Report, and end where other ranks were lost: the end that MPI has would wait for them."""
    if trainer.comm.rank == 0 and trainer.stopped:
        click.echo(f"note: {_farewell(trainer, options)}", err=True)
    elif trainer.comm.rank == 0:
        _report(trainer.comm, options, _result(trainer, options, history, seconds))
    leave(PREEMPTED if trainer.stopped else 0)


def _report(comm: MPI.Intracomm, options: Options, result: dict[str, Any]) -> None:
    if comm.rank == 0:
        print_result(result)
        if options.json:
            write_json(options.json, result)


def make_trainer(comm: MPI.Intracomm, options: Options, data: Dataset) -> Trainer:
    """What the options describe. Raises `InputError`, on all ranks."""
    stages = mesh_of(options).get("pipeline", 1)
    micro_batches = options.micro_batches or 2 * stages
    if options.draw_pipeline:
        on_rank_zero(comm, lambda: _draw_pipeline(options, stages, micro_batches))
    if options.augment:
        options.augment.check(data.sample_shape)
    return Trainer(
        comm,
        make_layers(options, data),
        data,
        optimizer=make_optimizer(options),
        learning_rate=make_learning_rate(options, data),
        strategy=options.strategy,
        options=_strategy_options(options),
        mesh=mesh_of(options),
        batch_size=options.batch_size,
        pieces=micro_batches if stages > 1 else options.accumulate,
        schedule=options.pipeline_schedule,
        shards=(options.shards or DETERMINISTIC_SHARDS) if options.deterministic else None,
        balance=options.balance,
        weights=_class_weights(options, data),
        resample=options.resample,
        augmentation=options.augment,
        elastic=options.elastic,
        seed=options.seed,
        dtype=PRECISIONS[options.precision],
        device=options.device,
    )


def _draw_pipeline(options: Options, stages: int, micro_batches: int) -> None:
    assert options.draw_pipeline is not None
    check_writable(options.draw_pipeline, "--draw-pipeline")
    draw_png(SCHEDULES[options.pipeline_schedule](stages, micro_batches), options.draw_pipeline)


def make_layers(options: Options, data: Dataset) -> list[Layer]:
    """The network that the options describe."""
    rest = data.outputs, options.activation, options.dropout, options.batch_norm
    if options.model == "cnn":
        return convolutional(data.sample_shape, options.hidden, *rest)
    return perceptron(data.inputs, options.hidden, *rest)


def make_optimizer(options: Options) -> Optimizer:
    """The optimizer that the options describe."""
    both = options.weight_decay, options.clip_norm
    if options.optimizer == "adam":
        return Adam(weight_decay=both[0], clip_norm=both[1])
    if options.optimizer == "lars":
        return LARS(options.momentum, weight_decay=both[0], clip_norm=both[1])
    return SGD(options.momentum, options.nesterov, *both)


def make_learning_rate(options: Options, data: Dataset) -> LearningRate:
    """The learning rate of each step."""
    steps = -(-len(data.train_y) // options.batch_size)
    return LearningRate(
        scaled_rate(_peak_rate(options, data), options.batch_size, options.lr_batch or options.batch_size),
        options.lr_schedule,
        steps=steps * options.epochs,
        warmup=steps * options.warmup,
        factor=options.lr_factor,
        every=steps * options.lr_every,
    )


def _peak_rate(options: Options, data: Dataset) -> float:
    if options.lr is not None:
        return options.lr
    return {"sgd": 0.05 if data.classes else 0.002, "adam": 0.001, "lars": 1.0}[options.optimizer]


def _strategy_options(options: Options) -> dict[str, Any]:
    bucket = None if options.bucket_mb is None else max(1, int(options.bucket_mb * MIB))
    if options.deterministic:
        given = {} if bucket is None else {"bucket_bytes": bucket}
        return {"algorithm": options.algorithm or "two_shot", **given}
    every: dict[str, dict[str, Any]] = {
        "allreduce": {
            "algorithm": options.algorithm or ("auto" if options.tune or options.device != CPU else "ring"),
            "tune": options.tune,
            "bucket_bytes": bucket,
            "wire_dtype": WIRE_DTYPES[options.dtype],
            "compression": options.compression,
        },
        "ps-sync": {"servers": options.servers},
        "ps-async": {"servers": options.servers, "staleness": options.staleness},
        "local": {"every": options.average_every},
        "gossip": {"graph": options.graph},
    }
    return every.get(options.strategy, {})


def _class_weights(options: Options, data: Dataset) -> Any:
    if options.class_weights in (None, "balanced") or not data.classes:
        return options.class_weights
    return parse_class_weights(str(options.class_weights), data.classes)


def make_progress(options: Options, trainer: Trainer) -> Progress:
    """Who hears of the training: the terminal, and the files that the options name; on rank 0 only."""

    def make() -> Progress:
        about = {"data": trainer.data.name, "strategy": options.strategy, "ranks": trainer.comm.size}
        held = [progress_for(0, sys.stderr.isatty())]
        if options.metrics:
            held.append(JsonLines(options.metrics, about))
        if options.tensorboard:
            held.append(TensorBoard(options.tensorboard))
        if options.plot:
            held.append(LossCurve(options.plot, about, trainer.history))
        return Several(*held)

    progress = FromRankZero(lambda: trainer.comm.rank == 0, make)
    on_rank_zero(trainer.comm, progress.open)
    return progress


def _result(trainer: Trainer, options: Options, history: list[Epoch], seconds: float) -> dict[str, Any]:
    last = history[-1]
    strategy = trainer.strategy
    return {
        "strategy": strategy.name,
        "algorithm": _strategy_options(options).get("algorithm"),
        "tuning": _tuning(trainer),
        "device": options.device,
        "dtype": options.dtype,
        "compression": options.compression.name if options.compression is not None else "none",
        "mesh": trainer.mesh.sizes,
        "shards": trainer.shards,
        "data": trainer.data.name,
        "ranks": trainer.comm.size,
        "lost_ranks": [*strategy.lost, *(rank for lost in trainer.lost for rank in lost.ranks)],
        "lost": [asdict(lost) for lost in trainer.lost],
        "epochs": len(history),
        "steps": last.step,
        "batch_size": options.batch_size,
        "optimizer": options.optimizer,
        "lr": _peak_rate(options, trainer.data),
        "momentum": options.momentum,
        "hidden": list(options.hidden),
        "seed": options.seed,
        "train_loss": last.train_loss,
        "test_loss": last.test_loss,
        "test_accuracy": last.test_accuracy,
        "seconds": seconds,
        "samples_per_second": sum(e.samples for e in history) / sum(e.seconds for e in history),
        "communication": last.communication,
        "bytes_sent_per_step": strategy.bytes_sent / max(1, last.step),
        "parameters": trainer.parameter_count(),
        "parameters_sha256": parameters_sha256(trainer),
        "parameters_identical": True,  # or parameters_sha256 would have raised
    }


def load(comm: MPI.Intracomm, options: Options) -> Dataset:
    """The data on every rank; only rank 0 touches files. Raises `InputError` on every rank alike."""
    held: list[Dataset] = []

    def read_on_rank_zero() -> None:
        if options.json:
            check_writable(options.json)
        if options.trace:
            check_writable(options.trace, "--trace")
        held.append(_read(options))

    on_rank_zero(comm, read_on_rank_zero)
    return share(comm, held[0] if held else None)


def _read(options: Options) -> Dataset:
    if options.data == "csv" and options.data_file:
        return read_csv(options.data_file, options.label, options.task == "regression", options.seed)
    if options.data_dir:
        if options.data == "npy":
            return read_npy(options.data_dir, options.seed)
        return {"mnist": read_mnist, "cifar10": read_cifar10}[options.data](options.data_dir)
    return {"digits": read_digits, "diabetes": read_diabetes}[options.data](options.seed)
