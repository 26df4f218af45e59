"""``mpicoll bench gradients`` on the ranks of this job: its tables, its JSON, and what it finds wrong."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from mpicoll.bench import gradients, models
from mpicoll.bench.gradient_contenders import Setup, contenders, views
from mpicoll.bench.gradients import run
from mpicoll.bench.jobs import USAGE_ERROR, WRONG
from mpicoll.bench.overlap import Hidden, measure_overlap

import mpicoll

COMM = mpicoll.Communicator(MPI.COMM_WORLD)
SHAPES = ((40, 25), (7,), (3, 8, 32), (5000,))
NAMES = [
    "MPI per tensor",
    "pack, MPI, unpack",
    "Allreduce per tensor",
    "Allreduce_many",
    "GradientSync",
    "GradientSync, views",
    "GradientSync, views, bfloat16",
    "GradientSync, views, int8",
    "GradientSync, views, topk:0.01",
]


def test_the_tables_and_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gradients.json"
    arguments = ["--model", "mlp", "--repeat", "2", "--bucket-mb", "0.5", "--json", str(file)]
    assert run(COMM, arguments) == 0
    said = capsys.readouterr()
    if COMM.rank:
        assert said.out == said.err == ""
        return
    report = json.loads(file.read_text())
    assert report["command"].startswith(
        f"mpirun -np {COMM.size} mpicoll bench gradients --model mlp --repeat 2"
    )
    assert {"date", "machine", "mpi", "thread_level"} < set(report)
    assert report["flags"] == {"model": "mlp", "repeat": 2, "bucket_mb": 0.5}
    assert (report["ranks"], report["gradients"]) == (COMM.size, 6)
    assert report["size"] == models.nbytes(models.MODELS["mlp"])
    check_contenders(report)
    assert [row["backward"] for row in report["overlap"]] == [
        "on a device",
        "on the core",
        "on the core, matrices",
    ]
    for row in report["overlap"]:
        for how in ("overlap", "no_overlap"):
            shown = 1 - (row[how]["time"] - row["time"]) / row["sync_time"]
            assert row[how]["hidden"] == pytest.approx(shown)
    assert all(f"\n {name}" in said.out for name in NAMES)
    assert "\n memcpy" in said.out
    assert "% " in said.out


def check_contenders(report: Any) -> None:
    rows = report["contenders"]
    assert [row["name"] for row in rows] == NAMES
    for row in rows:
        assert row["nwrong"] == 0
        assert row["alg_bw"] == pytest.approx(report["size"] / row["time"] / 1000)
    ring = 2 * (COMM.size - 1) / COMM.size * report["size"]
    assert [row["sent"] for row in rows[:7]] == [None, None, ring, ring, ring, ring, ring / 2]
    assert rows[7]["sent"] < 0.3 * ring + 1
    assert report["memcpy"]["time"] > 0


def test_every_contender_sums_and_its_errors_are_counted() -> None:
    setup = Setup(COMM, SHAPES, bucket_bytes=4096)
    for contender in contenders(setup):
        for _ in range(2):  # the second step is not the first once more, but for those that keep nothing
            contender.fill()
            contender.run()
            if "int8" in contender.name or "topk" in contender.name:
                break
        assert contender.count_wrong() == 0, contender.name
        if contender.sync is not None:
            contender.sync.gradients[0][1, 2] += 3
            assert contender.count_wrong() == 1, contender.name
            contender.sync.close()


def test_wrong_sums_end_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = mpicoll.Communicator.Allreduce_many

    def wrong(self: mpicoll.Communicator, arrays: Any) -> None:
        right(self, arrays)
        arrays[1][3] += 1

    monkeypatch.setitem(models.MODELS, "mlp", SHAPES)  # quicker
    monkeypatch.setattr(COMM, "Allreduce_many", partial(wrong, COMM))
    assert run(COMM, ["--model", "mlp", "--repeat", "1"]) == WRONG
    if COMM.rank == 0:
        assert f"Error: wrong elements: {COMM.size} of Allreduce_many" in capsys.readouterr().err


def test_backward_passes_take_the_time_they_are_made_for() -> None:
    setup = Setup(COMM, SHAPES, bucket_bytes=None)
    both = views(setup), views(setup, overlap=False)
    shares = np.array(setup.counts) / setup.total
    seconds = 0.02
    found = measure_overlap(setup.native, *both, shares, seconds, repeat=1)
    assert [passes.name for passes in found] == ["on a device", "on the core", "on the core, matrices"]
    for passes in found[:2]:  # how long products take depends on who else computes
        assert passes.alone > 0.99 * seconds
        assert min(passes.overlapped, passes.afterwards) > 0.99 * seconds
    for contender in both:
        assert contender.count_wrong() == 0
        assert contender.sync is not None
        contender.sync.close()


def test_hidden() -> None:
    passes = Hidden("", sync=2.0, alone=3.0, overlapped=3.5, afterwards=5.0)
    assert passes.hidden(passes.overlapped) == 0.75
    assert passes.hidden(passes.afterwards) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model vgg", "'vgg' is not one of 'resnet50', 'gpt2', 'mlp'"),
        ("--repeat 0", "0 is not in the range x>=1"),
        ("--bucket-mb 0", "0.0 is not in the range x>0"),
        ("--json /nowhere/gradients.json", "No such file or directory"),
    ],
)
def test_bad_input_is_said_once_and_ends_every_rank(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(COMM, arguments.split()) == USAGE_ERROR
    said = capsys.readouterr()
    assert said.err.count(message) == (1 if COMM.rank == 0 else 0)
    assert said.out == ""


def test_models_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gradients.arena, "available_memory", lambda: 1 << 30)
    assert run(COMM, ["--model", "gpt2"]) == USAGE_ERROR
    message = f"--model gpt2 with {COMM.size} ranks on a node needs"
    assert capsys.readouterr().err.count(message) == (1 if COMM.rank == 0 else 0)
