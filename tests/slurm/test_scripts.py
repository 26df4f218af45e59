"""The scripts of slurm/, submitted to a real Slurm of two nodes; see `cluster`.

Open MPI's cases need it beside this Python. Those of MPICH need ``MPICOLL_TEST_MPICH_PYTHON``, the path of a
Python that has mpi4py, mpicoll and MPICH, or run if MPICH is beside this one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpicoll import launch
from tests.slurm.cluster import Cluster, reason

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "slurm"
TRAIN = ROOT / "train.py"
WHERE = Path(__file__).with_name("where.py")
WORLD = Path(__file__).with_name("world.py")
STARTED = 120.0  # seconds for a job to start Python on all ranks and do a little; it takes two or three
TRAINED = 120.0  # seconds for a training of some seconds

EPOCHS = 30
STEPS = 45 * EPOCHS
TRAINING = f"--epochs {EPOCHS} --hidden 12 --deterministic --metrics metrics.jsonl".split()

# What Open MPI needs as root, in a container, with more ranks than cores, on nodes with the one address.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_btl_tcp_if_include": "lo",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One for all tests, but those that damage it."""
    yield from start_cluster()


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """One for a test that damages it."""
    yield from start_cluster()


def start_cluster() -> Iterator[Cluster]:
    why_not = reason()
    if why_not is not None:
        pytest.skip(why_not)
    with Cluster() as cluster:
        yield cluster


def settings(python: str, **more: str) -> dict[str, str]:
    """The environment of somebody who works with this Python."""
    path = f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {"PATH": path, "PYTHONUNBUFFERED": "1", **more}


@pytest.fixture(scope="module")
def open_mpi() -> dict[str, str]:
    """The environment of somebody who works with Open MPI."""
    if launch.launcher_library() != launch.OPEN_MPI:
        pytest.skip("needs Open MPI beside this Python")
    return settings(sys.executable, **OPEN_MPI)


@pytest.fixture(scope="module")
def mpich() -> dict[str, str]:
    """The environment of somebody who works with MPICH."""
    python = os.environ.get("MPICOLL_TEST_MPICH_PYTHON")
    if python is None and launch.launcher_library() == launch.MPICH:
        python = sys.executable
    if python is None:
        pytest.skip("needs MPICOLL_TEST_MPICH_PYTHON, the path of a Python with MPICH")
    return settings(python)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the training comes to with one rank and without Slurm."""
    directory = tmp_path_factory.mktemp("alone")
    command = [sys.executable, str(TRAIN), *TRAINING, "--json", "result.json"]
    subprocess.run(command, cwd=directory, env={**os.environ, **OPEN_MPI}, check=True, timeout=TRAINED)
    return result(directory)


def result(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return content


def where(text: str) -> list[list[Any]]:
    """What `where.py` has printed: rank, node and GPUs."""
    found = re.search("where: (.*)", text)
    assert found, text
    content: list[list[Any]] = json.loads(found[1])
    return content


def need_pmix(cluster: Cluster, launcher: str) -> None:
    if launcher == "pmix" and "pmix" not in cluster.run("sh", "-c", "srun --mpi=list 2>&1"):
        pytest.skip("this Slurm has no PMIx: apt-get install libpmix-dev")


def test_a_signal_before_the_limit_costs_no_step(
    cluster: Cluster, open_mpi: dict[str, str], expected: dict[str, Any], tmp_path: Path
) -> None:
    """SIGUSR1 to the script, as Slurm sends it; a checkpoint; back into the queue; on to the same bits."""
    environment = {**open_mpi, "PROGRAM": str(TRAIN)}
    command = [str(SCRIPTS / "train.sbatch"), *TRAINING, "--checkpoint-every", "7", "--json", "result.json"]
    job = cluster.submit(command, tmp_path, environment, "-N2", "--ntasks-per-node=1", "--time=5")
    checkpoints = tmp_path / f"checkpoints-{job.number}"
    job.until(lambda: any(checkpoints.glob("step-*.safetensors")), STARTED, "a first checkpoint")
    job.signal("USR1")
    text = job.finish(TRAINED)

    assert "start 1: 2 ranks on n[1-2]" in text and "goes back into the queue" in text
    assert "start 2: 2 ranks on n[1-2]" in text
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    epochs = [line["number"] for line in lines if "number" in line]
    assert epochs == list(range(1, EPOCHS + 1))  # the second start went on, it did not begin again
    assert result(tmp_path)["steps"] == STEPS
    assert result(tmp_path)["parameters_sha256"] == expected["parameters_sha256"]


def test_train_with_srun_pmi2(
    cluster: Cluster, mpich: dict[str, str], expected: dict[str, Any], tmp_path: Path
) -> None:
    environment = {**mpich, "PROGRAM": str(TRAIN), "LAUNCH": "pmi2"}
    command = [str(SCRIPTS / "train.sbatch"), *TRAINING, "--json", "result.json"]
    job = cluster.submit(command, tmp_path, environment, "-N2", "--ntasks-per-node=2", "--time=5")
    job.finish(TRAINED)
    assert result(tmp_path)["ranks"] == 4
    assert result(tmp_path)["parameters_sha256"] == expected["parameters_sha256"]


def test_bench_with_srun_pmix(cluster: Cluster, open_mpi: dict[str, str], tmp_path: Path) -> None:
    need_pmix(cluster, "pmix")
    command = [
        str(SCRIPTS / "bench.sbatch"),
        "allreduce",
        *"-b 8 -e 32K -f 4096 --turns 1 --iters 20".split(),
    ]
    job = cluster.submit(
        command, tmp_path, {**open_mpi, "LAUNCH": "pmix"}, "-N2", "--ntasks-per-node=2", "--time=5"
    )
    job.finish(STARTED)
    record = json.loads((tmp_path / f"allreduce-{job.number}.json").read_text())
    assert record["ranks"] == 4
    assert [contender["name"] for contender in record["contenders"]] == ["auto", "native"]
    for contender in record["contenders"]:
        assert [row["size"] for row in contender["results"]] == [8, 32 << 10]
        assert not any(row["out_of_place"]["nwrong"] for row in contender["results"])


def test_torch(cluster: Cluster, open_mpi: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    environment = {**open_mpi, "PROGRAM": str(SCRIPTS / "torch_example.py")}
    command = [str(SCRIPTS / "torch.sbatch"), "--steps", "41"]
    text = cluster.submit(command, tmp_path, environment, "-N2", "--ntasks-per-node=1", "--time=5").finish(
        STARTED
    )
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]
    assert len(losses) == 3 and losses[-1] < losses[0] / 2
    assert "2 ranks have equal parameters" in text


@pytest.mark.parametrize(
    "library, launcher, gpus",
    [
        ("open_mpi", "mpirun", "--gpus-per-task=1"),
        ("mpich", "mpirun", "--gpus-per-node=2"),
        ("mpich", "pmi2", "--gpus-per-task=1"),
        ("open_mpi", "pmix", "--gpus-per-node=2"),
    ],
)
def test_every_rank_has_its_gpu(
    library: str, launcher: str, gpus: str, cluster: Cluster, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """On both nodes; whether Slurm shows it that one alone, or all of the node."""
    need_pmix(cluster, launcher)
    environment = {**request.getfixturevalue(library), "LAUNCH": launcher, "PROGRAM": str(WHERE)}
    job = cluster.submit(
        [str(SCRIPTS / "torch.sbatch")], tmp_path, environment, "-N2", "--ntasks-per-node=2", "--time=5", gpus
    )
    assert where(job.finish(STARTED)) == [[0, "n1", "0"], [1, "n1", "1"], [2, "n2", "0"], [3, "n2", "1"]]


def test_a_launcher_that_mpi_does_not_hear_of(
    cluster: Cluster, open_mpi: dict[str, str], tmp_path: Path
) -> None:
    """srun --mpi=none gives the error, on each rank; everything else in the same job does not."""
    script = tmp_path / "script"
    script.write_text(
        textwrap.dedent(f"""\
            #!/bin/bash
            echo batch; python {WORLD}
            echo one; srun --nodes=1 --ntasks=1 python {WORLD}
            echo mpirun; mpirun python {WORLD}
            echo none; srun --mpi=none python {WORLD}
            """)
    )
    job = cluster.submit([str(script)], tmp_path, open_mpi, "-N2", "--ntasks-per-node=1", "--time=5")
    said = re.split(r"^(?:batch|one|mpirun|none)\n", job.finish(STARTED), flags=re.MULTILINE)[1:]
    batch, one, mpirun, none = (text.splitlines() for text in said)
    assert batch == ["1 ranks, and that is right"]
    assert one[-1:] == ["1 ranks, and that is right"]
    assert mpirun == ["2 ranks, and that is right"] * 2
    assert len(none) == 2
    for rank in range(2):
        message = next(line for line in none if f"SLURM_PROCID={rank}" in line)
        assert "LaunchError: MPI.COMM_WORLD: expected 2 ranks" in message
        assert "Open MPI v5" in message and "srun --mpi=pmix" in message


def test_training_outlives_a_rank_and_a_node(
    own_cluster: Cluster, open_mpi: dict[str, str], expected: dict[str, Any], tmp_path: Path
) -> None:
    """A rank is killed: the others lose no step. Its node is: on with the other one. To the same bits."""
    command = [str(SCRIPTS / "elastic.sbatch"), *TRAINING, "--checkpoint-every", "7"]
    environment = {**open_mpi, "PROGRAM": str(TRAIN)}
    job = own_cluster.submit(command, tmp_path, environment, "-N2", "--ntasks-per-node=2", "--time=5")
    checkpoints = tmp_path / f"checkpoints-{job.number}"
    job.until(lambda: any(checkpoints.glob("step-*.safetensors")), STARTED, "a first checkpoint")
    (rank,) = own_cluster.processes("OMPI_COMM_WORLD_RANK=3")
    os.kill(rank, signal.SIGKILL)
    job.until(lambda: "rank 3 died" in job.text(), STARTED, "three survivors")
    own_cluster.fail_node("n2")
    result = checkpoints / f"result-{job.number}.json"
    job.until(result.exists, TRAINED, "a result")  # Slurm waits minutes for the node
    assert "ranks on n1:2,n2:2" in job.text() and "ranks on n1:2\n" in job.text()
    assert json.loads(result.read_text())["parameters_sha256"] == expected["parameters_sha256"]


def test_scripts_start_ranks_alike() -> None:
    """The lines that say so are copied into each script, so that each is complete."""
    texts = [(SCRIPTS / f"{name}.sbatch").read_text() for name in ("train", "bench", "torch")]
    found = {text[text.index("# How the ranks") : text.index("# Threads of a rank")] for text in texts}
    assert len(found) == 1


def test_launch_is_checked() -> None:
    environment = {**os.environ, "LAUNCH": "pmi1"}
    done = subprocess.run(
        ["bash", str(SCRIPTS / "torch.sbatch")], env=environment, capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stderr) == (2, "LAUNCH: expected mpirun, pmix or pmi2, got pmi1\n")
