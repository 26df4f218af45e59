"""The training benchmarks on the ranks of this job, with little to train; and the program in the document."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from mpicoll.bench import training_runs as runs
from mpicoll.bench import training_throughput as throughput
from mpicoll.bench import training_uneven as uneven
from mpicoll.bench import training_workload as workload
from mpicoll.bench.jobs import USAGE_ERROR, WRONG
from mpicoll.bench.training_report import SECTIONS, Job
from mpicoll.bench.training_setups import EXACT, ROUNDING, Setup, setups

import mpicoll
from mpicoll.train import Dataset
from mpicoll.train.backprop import Backprop

COMM = mpicoll.Communicator(MPI.COMM_WORLD)
RANKS = COMM.size
RING = 2 * (RANKS - 1) / RANKS
DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "training.md"
HIDDEN = (24,)
ABOUT = {"mpi": "", "date": "", "command": "", "machine": {"cpu": "", "cores": 2}, "binding": ""}


def named(name: str) -> Setup:
    return next(setup for setup in setups(RANKS) if setup.name == name)


@pytest.fixture(scope="module")
def data() -> Dataset:
    found: Dataset = runs.digits(COMM)
    return found


# --- training_runs ---


def test_a_job_writes_a_row_for_each_setup(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    names = [setup.name for setup in setups(RANKS) if setup.mesh or setup.name in ("deterministic", "local")]
    assert runs.run(COMM, [str(file), "1", *names], "training_runs") == 0
    job = Job.loads(COMM.bcast(file.read_text() if COMM.rank == 0 else None))
    assert job.mpi
    assert [row.name for row in job.rows] == names
    for row in job.rows:
        assert row.ranks == RANKS
        assert row.bound is None or row.difference <= row.bound
        assert row.accuracy > 0.8
        assert row.steps_per_second > 0
        assert (row.sent > 0) == (RANKS > 1)


def test_a_difference_is_that_of_the_worst_parameter(data: Dataset) -> None:
    alone = runs.references_of(data) if COMM.rank == 0 else {}
    reference = dict(alone.get(None, {}))
    allreduce = named("allreduce")
    assert runs.difference_from(COMM, data, allreduce, reference) <= ROUNDING
    assert runs.difference_from(COMM, data, named("deterministic"), alone.get(8, {})) == EXACT
    if COMM.rank == 0:
        reference["1.bias"] = reference["1.bias"] + np.arange(128) / 1024
    assert runs.difference_from(COMM, data, allreduce, reference) == pytest.approx(127 / 1024)


def test_bytes_are_those_of_steps_alone(data: Dataset) -> None:
    nbytes = 4 * (64 * 128 + 128 + 128 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10)
    allreduce, server = (runs.row(COMM, data, named(name), 2, 0.0).sent for name in ("allreduce", "ps-sync"))
    assert allreduce == pytest.approx(RING * nbytes)
    # What others read of an epoch's last parameters may be counted after the epoch.
    assert server == pytest.approx(RING * nbytes, rel=1 / 40)


@pytest.mark.skipif(RANKS != 2, reason="a pipeline of two stages")
def test_bytes_of_a_pipeline_do_not_count_evaluation(data: Dataset) -> None:
    """Activations and their gradients of 1438 samples, as wide as where the stages meet."""
    found = runs.row(COMM, data, named("data=1,pipeline=2,tensor=1"), 1, 0.0)
    floats = found.sent * 45 * RANKS / 4 / (2 * len(data.train_y))
    assert floats in (pytest.approx(64), pytest.approx(128), pytest.approx(32), pytest.approx(10))


# --- throughput ---


def test_throughput_says_how_fast_and_with_which_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    if RANKS != 2:  # importing PyTorch takes seconds
        monkeypatch.setattr(throughput, "find_spec", lambda name: None)
    options = throughput.Options(batch=12 * RANKS, steps=3, repeat=2, json=None)
    report = throughput.measure(COMM, options, 17, HIDDEN)
    assert report["parameters"] == 17 * 24 + 24 + 24 * 10 + 10
    assert bool(report["notes"]) == (len(report["rows"]) == 1)
    for row in report["rows"]:
        assert len(row["seconds_alone"]) == len(row["seconds_together"]) == 2
        assert row["efficiency"] == pytest.approx(row["together"] / row["alone"] / RANKS)
        assert row["losses"] == pytest.approx([report["rows"][0]["loss"]] * 2, rel=1e-4)
    if COMM.rank == 0:
        assert "mpicoll, allreduce" in SECTIONS["throughput-512"][1]({**ABOUT, "ranks": RANKS, **report})


def test_other_work_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": "ours", "alone": 1.0, "together": 2.0, "efficiency": 1.0, "losses": [2.0, 2.01]}
    monkeypatch.setattr(throughput, "measure", lambda *given: {"notes": [], "rows": [row]})
    monkeypatch.setattr(throughput, "check_cores", lambda comm: None)
    assert throughput.run(COMM, ["--batch", str(RANKS)], "training_throughput") == WRONG
    assert capsys.readouterr().err.count("expected equal losses") == (COMM.rank == 0)


# --- uneven ---


@pytest.mark.skipif(RANKS == 1, reason="for a fast rank and a slow one")
def test_uneven_says_who_waits_for_whom() -> None:
    options = uneven.Options(batch=8 * RANKS, steps=4, repeat=1, json=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uneven, "SETTLED", 24)
        report = uneven.measure(COMM, options, 17, HIDDEN)
    assert report["ideal"] == pytest.approx((RANKS - 1) * report["fast"] + report["slow"])
    assert len(report["shares"]) == RANKS and sum(report["shares"]) == pytest.approx(1)
    assert all(report[name] > 0 for name in ("even", "balanced", "async_beside_slow", "async_beside_fast"))
    assert COMM.allgather(report)[0] == report
    if COMM.rank == 0:
        assert "of which the last needs 3 times" in SECTIONS["uneven"][1]({**ABOUT, "ranks": RANKS, **report})


def test_a_slowed_rank_needs_three_times_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.0, 11.5, 12.9, 13.0])
    monkeypatch.setattr(uneven, "perf_counter", clock.__next__)
    monkeypatch.setattr(Backprop, "gradients", lambda self, part, ready: 5.0)
    nothing: Any = None
    slowed = uneven.Slowed(Backprop(nothing, nothing), 3.0)
    assert slowed.gradients(nothing, nothing) == 5.0
    assert next(clock, None) is None  # it looked until 10 + 3


def test_only_the_last_rank_is_slow() -> None:
    single = mpicoll.Communicator(MPI.COMM_SELF)
    task = uneven.Task(COMM, single, workload.synthetic(8 * RANKS, 5), HIDDEN, 4 * RANKS)
    for together in (True, False):
        for slow in (True, False):
            trainer = task.trainer(slow, together)
            is_slow = slow and COMM.rank == RANKS - 1
            assert isinstance(trainer.backprop, uneven.Slowed) == is_slow
            trainer.close()
    single.Free()


# --- both ---


def test_alone_is_one_rank_and_all_hear_of_it() -> None:
    called: list[int] = []

    def action() -> int:
        called.append(COMM.rank)
        return 7 + COMM.rank

    assert workload.alone(COMM, action, rank=RANKS - 1) == 7 + RANKS - 1
    assert COMM.allgather(called) == [[]] * (RANKS - 1) + [[RANKS - 1]]


def test_a_rank_has_one_core_for_a_while() -> None:
    before = os.sched_getaffinity(0)
    with workload.own_core(COMM):
        own = os.sched_getaffinity(0)
        assert len(own) == 1 and own <= before
        everyones = COMM.allgather(own)
    assert len(set.union(*everyones)) == min(RANKS, len(before))
    assert os.sched_getaffinity(0) == before


def test_synthetic_data_are_the_same_everywhere_and_have_all_classes() -> None:
    data = workload.synthetic(300, 20)
    assert len({x.tobytes() for x in COMM.allgather(data.train_x)}) == 1
    assert len(np.unique(data.train_y)) == workload.CLASSES
    assert len(data.test_x) == 0


@pytest.mark.parametrize(
    ("bench", "arguments", "message"),
    [
        (throughput, f"--batch {RANKS + 1}", f"expected a multiple of the {RANKS} ranks"),
        (uneven, f"--batch {2 * RANKS + 1}", f"expected a multiple of the {RANKS} ranks"),
        (uneven, f"--batch {4 * RANKS} --json /nowhere/uneven.json", "No such file or directory"),
    ],
)
@pytest.mark.skipif(RANKS == 1, reason="one rank has every multiple, and no slow rank")
def test_bad_input_ends_every_rank(
    bench: Any, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.run(COMM, arguments.split(), "bench") == USAGE_ERROR
    assert capsys.readouterr().err.count(message) == (COMM.rank == 0)


def test_too_few_cores_end_every_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workload.os, "sched_getaffinity", lambda pid: set())
    assert throughput.run(COMM, ["--batch", str(RANKS)], "bench") == USAGE_ERROR
    said = capsys.readouterr().err
    assert said.count(f"with a core for each, got {RANKS} ranks and 0 cores") == (COMM.rank == 0)


# --- the document ---


def test_the_program_in_the_document_trains(capsys: pytest.CaptureFixture[str]) -> None:
    program = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[0]
    assert program.count("\n") <= 22
    names: dict[str, Any] = {}
    exec(compile(program, str(DOCUMENT), "exec"), names)
    assert names["history"][-1].test_accuracy > 0.9
    assert capsys.readouterr().out.count("test accuracy") == (COMM.rank == 0)
    names["comm"].Free()
