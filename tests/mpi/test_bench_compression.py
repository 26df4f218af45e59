"""``mpicoll.bench.compression`` on the ranks of this job: small tasks, what they write, and bytes by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from mpicoll.bench import compression_runs as runs
from mpicoll.bench.compression_report import BASELINE, Results, loads
from mpicoll.bench.compression_runs import Method, Task
from mpicoll.bench.jobs import USAGE_ERROR

import mpicoll
from mpicoll.train import Dataset, InputError, Trainer
from mpicoll.train.data import split
from mpicoll.train.strategies import Allreduce

COMM = mpicoll.Communicator(MPI.COMM_WORLD)
RANKS = COMM.size
RING = 2 * (RANKS - 1) / RANKS  # bytes sent for a byte that is allreduced
PROGRAM = "python -m mpicoll.bench.compression"
METHODS = {method.name: method for method in runs.METHODS}
TASKS = runs.TASKS


def points(seed: int) -> Dataset:
    """Four classes, each around a corner of a cube of eight dimensions: to be learned in a few steps."""
    random = np.random.default_rng(seed)
    y = np.arange(640) % 4
    x = np.eye(8)[y] + 0.2 * random.standard_normal((640, 8))
    return split("points", 4, x.astype(np.float32), y, seed)


TASK = Task("points", points, (16,), batch_size=32, epochs=7, learning_rate=0.05)
PARAMETERS = 8 * 16 + 16 + 16 * 4 + 4


def bench(file: Path, *arguments: str) -> Results:
    """What it writes, on every rank; ``file`` matters on rank 0."""
    assert runs.run(COMM, [*arguments, "--json", str(file)], PROGRAM) == 0
    return loads(COMM.bcast(file.read_text() if COMM.rank == 0 else None))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "report.json"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, [METHODS[name] for name in (BASELINE, "wire float16", "topk:0.1", "randomk:0.1")])


def choose(monkeypatch: pytest.MonkeyPatch, methods: Sequence[Method], task: Task = TASK) -> None:
    monkeypatch.setattr(runs, "TASKS", [task])
    monkeypatch.setattr(runs, "METHODS", methods)


def test_json_says_what_was_trained_and_how(file: Path) -> None:
    results = bench(file, "--epochs", "5", "--seeds", "3,4")
    assert results.command.startswith(f"mpirun -np {RANKS} {PROGRAM} --epochs 5 --seeds 3,4 --json ")
    assert (results.ranks, results.seeds) == (RANKS, [3, 4])
    assert set(results.machine) >= {"cpu", "cores"}
    assert results.mpi and results.date
    (outcome,) = results.outcomes
    assert (outcome.task, outcome.parameters, outcome.batch_size, outcome.epochs) == (
        "points",
        PARAMETERS,
        32,
        5,
    )
    assert (outcome.train_samples, outcome.test_samples) == (512, 128)
    rows = {row.compression: row for row in outcome.rows}
    assert list(rows) == [BASELINE, "wire float16", "topk:0.1", "randomk:0.1"]
    assert all(len(row.accuracies) == 2 for row in outcome.rows)
    for name in (BASELINE, "wire float16", "topk:0.1"):
        assert rows[name].accuracy == pytest.approx(1, abs=0.05)
        assert (rows[name].learning_rate, rows[name].reason) == (0.05, "")
    assert rows["randomk:0.1"].learning_rate == pytest.approx(0.01)
    assert "wait" in rows["randomk:0.1"].reason
    assert [row.sent for row in outcome.rows] == [
        pytest.approx(RING * 4 * PARAMETERS),
        pytest.approx(RING * 2 * PARAMETERS),
        8 * 21 * (RANKS - 1),
        pytest.approx(RING * 4 * (21 + 1)),
    ]


def test_every_task_has_its_own_number_of_epochs(file: Path) -> None:
    (outcome,) = bench(file, "--seeds", "0").outcomes
    assert outcome.epochs == 7


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wire bfloat16", RING * 2 * 410_656),
        ("topk:0.001", 8 * (279 + 132) * (RANKS - 1)),
        ("randomk:0.01", RING * 4 * (2791 + 1 + 1316 + 1)),
        # Matrices [512, 32] and [512, 512], then [256, 512]; and all vectors.
        ("powersgd:4", RING * 4 * (4 * (544 + 1024 + 768) + 32 + 512 + 512)),
    ],
)
def test_bytes_are_those_of_all_buckets(name: str, expected: float) -> None:
    """A model of two buckets, of 279,072 and 131,584 numbers: each has entries and matrices of its own."""
    _, task = TASKS
    with trainer_of(task, METHODS[name], nothing(256, 32)) as trainer:
        assert len(sync_of(trainer).buckets) == 2
        assert runs.bytes_sent(trainer) == pytest.approx(expected)


@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_what_each_compression_says_of_itself(name: str) -> None:
    task = Task("odd", points, (33, 17), batch_size=32, epochs=1, learning_rate=0.05)
    with trainer_of(task, METHODS[name], nothing(7, 5)) as trainer:
        sync = sync_of(trainer)
        compression = METHODS[name].options.get("compression")
        if compression is None:
            itemsize = 2 if name.startswith("wire") else 4
            expected = RING * itemsize * trainer.model.parameters.size
        else:
            (bucket,) = sync.buckets
            shapes = [sync.gradients[i].shape for i in bucket.members]
            expected = compression.volume(trainer.model.parameters.size, shapes, RANKS)
        assert runs.bytes_sent(trainer) == pytest.approx(expected)


def nothing(inputs: int, classes: int) -> Dataset:
    """What sizes of a model are known by."""
    empty = np.zeros((0, inputs), np.float32)
    return Dataset("none", classes, empty, empty, empty, empty)


@contextmanager
def trainer_of(task: Task, method: Method, data: Dataset) -> Iterator[Trainer]:
    trainer = runs._trainer(COMM, task, method, data, seed=0)
    yield trainer
    trainer.close()


def sync_of(trainer: Trainer) -> mpicoll.GradientSync:
    assert isinstance(trainer.strategy, Allreduce)
    return trainer.strategy.sync


def test_only_rank_zero_prints(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(file, "--epochs", "1", "--seeds", "0", "--markdown")
    said = capsys.readouterr()
    ours = COMM.rank == 0
    assert said.out.count("| compression | learning rate |") == ours
    assert said.err.count("points, topk:0.1, seed 0 (1 of 1)") == ours


def test_a_compression_that_diverges_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choose(monkeypatch, [METHODS[BASELINE], Method("hasty", shorter=1e30)])
    (outcome,) = bench(file, "--epochs", "2", "--seeds", "0,1").outcomes
    assert outcome.rows[1].accuracies == [None, None]
    expected = "hasty: DIVERGED, the loss became no number in 2 of 2 runs"
    assert capsys.readouterr().out.count(expected) == (COMM.rank == 0)


def test_every_rank_learns_from_the_data_of_rank_zero() -> None:
    task = Task("points", lambda seed: points(seed + COMM.rank), (16,), 32, 1, 0.05)
    assert runs._data(COMM, task, 0).train_x.tobytes() == points(0).train_x.tobytes()


def test_a_seed_makes_the_synthetic_data() -> None:
    if COMM.rank > 0:
        return
    first, again, other = (runs.synthetic(seed) for seed in (0, 0, 1))
    assert (first.train_x.shape, first.test_x.shape, first.classes) == ((16_000, 256), (4_000, 256), 32)
    assert (first.train_x == again.train_x).all() and (first.train_y == again.train_y).all()
    assert (first.train_x != other.train_x).any()
    assert len(np.unique(first.train_y)) > 24


def test_data_that_rank_zero_cannot_read_end_every_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(seed: int) -> Any:
        raise InputError("points: expected them, found none")

    choose(monkeypatch, runs.METHODS, Task("points", missing, (16,), 32, 1, 0.05))
    assert runs.run(COMM, [], PROGRAM) == USAGE_ERROR
    assert capsys.readouterr().err.count("expected them, found none") == (COMM.rank == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 1,x", "expected whole numbers from 0, separated by commas; got '1,x'"),
        ("--epochs 0", "0 is not in the range"),
        ("--json /nowhere/report.json", "No such file or directory"),
    ],
)
def test_bad_input_is_said_once_and_ends_every_rank(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.run(COMM, arguments.split(), PROGRAM) == USAGE_ERROR
    said = capsys.readouterr()
    assert said.err.count(message) == (COMM.rank == 0)
    assert said.out == ""


@pytest.mark.skipif(RANKS > 1, reason="for one rank")
def test_one_rank_sends_nothing_that_could_be_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.run(COMM, ["--plot", "picture.png"], PROGRAM) == USAGE_ERROR
    assert "one rank sends none" in capsys.readouterr().err
