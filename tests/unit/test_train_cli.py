"""The training command and what becomes of a job when one rank fails: each test launches processes."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpicoll import launch

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [sys.executable, str(ROOT / "train.py")]
SECONDS = 120  # for one job, on a busy machine: an end to a hang


def launcher(nranks: int) -> list[str]:
    """MPICOLL_MPIRUN is a launcher up to its number of ranks, such as ``mpirun --oversubscribe -np``."""
    if given := os.environ.get("MPICOLL_MPIRUN"):
        return [*shlex.split(given), str(nranks)]
    try:
        return launch.command(nranks, [])
    except launch.LauncherError as error:
        pytest.skip(str(error))


def job(nranks: int, program: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run on ``nranks`` ranks, or, with 0, without a launcher."""
    prefix = launcher(nranks) if nranks else []
    environment = launch.environment(prefix[0]) if prefix else dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [*prefix, *program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)


@pytest.mark.parametrize("nranks", [0, 1, 2, 3])
def test_the_defaults_learn_the_digits(tmp_path: Path, nranks: int) -> None:
    path = tmp_path / "result.json"
    start = time.monotonic()
    ran = job(nranks, TRAIN, "--seed", 0, "--json", path)
    assert ran.returncode == 0, ran.stderr
    assert time.monotonic() - start < 30
    result = json.loads(path.read_text())
    assert result["test_accuracy"] >= 0.95
    assert result["parameters_identical"] is True
    assert (result["strategy"], result["ranks"]) == ("allreduce", nranks or 1)
    assert (result["epochs"], result["seed"]) == (20, 0)
    assert result["train_loss"] < 0.1 and result["samples_per_second"] > 0
    assert len(result["parameters_sha256"]) == 64
    assert result["parameters_sha256"][:16] in ran.stdout and "test accuracy" in ran.stdout
    assert "epoch 20/20" in ran.stderr and "\x1b" not in ran.stderr  # lines, as stderr is no terminal
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_csv_regression_through_the_module(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((200, 3))
    table = np.column_stack([x @ [1.0, -2.0, 0.5] + 0.01 * random.standard_normal(200), x])
    source = tmp_path / "table.csv"
    np.savetxt(source, table, delimiter=",", header="y,a,b,c", comments="")
    path = tmp_path / "result.json"
    options = ["--data", "csv", "--task", "regression", "--label", "y", "--hidden", "16,8", "--epochs", "40"]
    module = [sys.executable, "-m", "mpicoll.train"]
    ran = job(2, module, *options, "--data-file", source, "--json", path)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(path.read_text())
    assert result["test_accuracy"] is None
    assert result["test_loss"] < 0.05
    assert result["hidden"] == [16, 8]


def test_a_run_repeats_bit_for_bit(tmp_path: Path) -> None:
    def sha(seed: int) -> str:
        path = tmp_path / f"{seed}.json"
        assert (
            job(2, TRAIN, "--epochs", 2, "--seed", seed, "--algorithm", "ring", "--json", path).returncode
            == 0
        )
        return str(json.loads(path.read_text())["parameters_sha256"])

    first = sha(1)
    assert sha(1) == first
    assert sha(2) != first


def test_help_is_printed_once() -> None:
    ran = job(2, TRAIN, "--help")
    assert ran.returncode == 0
    assert ran.stdout.count("--algorithm") == 1


def test_bad_input_is_said_once_and_ends_the_job(tmp_path: Path) -> None:
    source = tmp_path / "table.csv"
    source.write_text("a,b\n1,2\n3\n")
    ran = job(3, TRAIN, "--data", "csv", "--data-file", source, "--json", tmp_path / "result.json")
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.count(f"error: {source}: expected 2 columns as in line 1, line 3 has 1") == 1
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "result.json").exists()


def test_a_json_path_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    ran = job(2, TRAIN, "--json", tmp_path / "nowhere" / "result.json")
    assert ran.returncode == 2
    assert "nowhere/result.json: expected a file that can be written (--json)" in ran.stderr
    assert "epoch" not in ran.stderr


def test_a_loss_that_is_no_number_is_said_once_and_ends_the_job(tmp_path: Path) -> None:
    """In the midst of the training, with a thread that writes checkpoints."""
    ran = job(3, TRAIN, "--lr", 1e30, "--checkpoint", tmp_path / "kept", "--checkpoint-every", 5)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.count("error: expected the training loss to be a number, found nan in epoch 1") == 1
    assert "Traceback" not in ran.stderr
    assert not list((tmp_path / "kept").glob("step-*"))  # nobody needs parameters that are no numbers


WITH_BLOCK = """
from mpi4py import MPI
from mpicoll.faults import abort_on_exception
with abort_on_exception():
    FAIL
    MPI.COMM_WORLD.Barrier()
"""

WITH_HOOK = """
from mpi4py import MPI
from mpicoll.faults import abort_job_on_exception
abort_job_on_exception()
FAIL
MPI.COMM_WORLD.Barrier()
"""

FAILING_RANK = "1 / (MPI.COMM_WORLD.rank - 1)"  # divides by zero on rank 1 only


@pytest.mark.parametrize("program", [WITH_BLOCK, WITH_HOOK])
def test_an_exception_on_one_rank_ends_the_job_with_its_traceback(program: Any) -> None:
    ran = job(3, [sys.executable, "-c", program.replace("FAIL", FAILING_RANK)])
    assert ran.returncode != 0
    assert ran.stderr.count("unhandled exception on rank 1 of 3") == 1
    assert ran.stderr.count("ZeroDivisionError: division by zero") == 1
    assert "unhandled exception on rank 0" not in ran.stderr


@pytest.mark.parametrize("program", [WITH_BLOCK, WITH_HOOK])
def test_with_one_rank_an_exception_is_python_s_own(program: Any) -> None:
    ran = job(0, [sys.executable, "-c", program.replace("FAIL", "raise KeyError('k')")])
    assert ran.returncode == 1
    assert ran.stderr.count("KeyError: 'k'") == 1
    assert "mpicoll: unhandled" not in ran.stderr


def test_an_exit_is_no_failure() -> None:
    ran = job(2, [sys.executable, "-c", WITH_BLOCK.replace("FAIL", "raise SystemExit(0)")])
    assert ran.returncode == 0, ran.stderr


def test_a_bug_on_one_rank_ends_training_with_its_traceback() -> None:
    program = """
from mpi4py import MPI
from mpicoll.train import cli, loop
step = loop.Trainer._step
def failing_step(self, batch):
    if self.comm.rank == 1:
        raise RuntimeError("a bug on rank 1 only")
    return step(self, batch)
loop.Trainer._step = failing_step
cli.main([])
"""
    ran = job(2, [sys.executable, "-c", program])
    assert ran.returncode == 1
    assert "unhandled exception on rank 1 of 2" in ran.stderr
    assert ran.stderr.count("RuntimeError: a bug on rank 1 only") == 1


@pytest.mark.parametrize("servers", [0, 1])
def test_a_disk_that_is_full_ends_a_job_whose_ranks_are_not_in_step(tmp_path: Path, servers: int) -> None:
    """Rank 0 alone writes, and the other workers of ps-async would train on without end."""
    program = f"""
import errno, os
from mpicoll.train import checkpoint, cli
def full(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
checkpoint._sync = full
options = "--strategy ps-async --servers {servers} --epochs 1000000 --checkpoint {tmp_path}"
cli.main(options.split())
"""
    ran = job(2, [sys.executable, "-c", program])
    assert ran.returncode != 0
    # Anywhere in its line: the launcher of a job that is aborted may put blanks or a stray byte before it.
    line = rf"error: {re.escape(str(tmp_path))}\S* expected to write a checkpoint of .*"
    told = re.findall(line, ran.stderr)
    assert len(told) == 1, ran.stderr
    assert "No space left on device" in told[0]
