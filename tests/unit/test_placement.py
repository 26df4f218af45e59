"""What launchers say of a process: environments as the launchers made them, and what is made of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mpicoll.placement import LaunchError, Placement, check_world, devices_to_share, placement, visible_device

# Rank 3 of 4 on 2 nodes in each case, as the launchers set them under Slurm 22.05.
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
INTEL = {**MPICH, "I_MPI_HYDRA_UUID": "ba070000"}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
PMI2 = {**STEP, "PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "11"}
PMIX = {**STEP, "PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.7.0"}
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
DAEMON = {  # what mpirun's daemon on the second node hands on
    **STEP,
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}

LAUNCHED = {
    "mpirun of Open MPI": OPEN_MPI,
    "mpirun of MPICH": MPICH,
    "mpirun of Intel MPI": INTEL,
    "srun": STEP,
    "srun --mpi=pmi2": PMI2,
    "srun --mpi=pmix": PMIX,
}
# Under Slurm the ranks that mpirun starts on the first node have the batch script's variables, too.
UNDER_SLURM = {
    f"{launcher} under Slurm, node {node}": ({**slurm, **LAUNCHED[launcher]}, launcher)
    for launcher in ("mpirun of Open MPI", "mpirun of MPICH", "mpirun of Intel MPI")
    for node, slurm in enumerate((BATCH, DAEMON))
}

OPEN_MPI_LIBRARY = "Open MPI v5.0.11, package: Open MPI user@localhost Distribution, ident: 5.0.11"
MPICH_LIBRARY = "MPICH Version:      5.0.2\nMPICH Release date: unreleased\n"
INTEL_LIBRARY = "Intel(R) MPI Library 2021.17 for Linux* OS\n\0"


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_every_launcher(launcher: str) -> None:
    assert placement(LAUNCHED[launcher]) == Placement(3, 4, 1, 2, launcher)


@pytest.mark.parametrize("case", UNDER_SLURM)
def test_mpirun_comes_before_the_slurm_that_it_runs_under(case: str) -> None:
    environment, launcher = UNDER_SLURM[case]
    assert placement(environment) == Placement(3, 4, 1, 2, launcher)


@pytest.mark.parametrize(
    "layout, node, expected", [("2(x2),1", 0, 2), ("2(x2),1", 2, 1), ("1,12(x3)", 3, 12)]
)
def test_tasks_per_node_as_slurm_writes_them(layout: str, node: int, expected: int) -> None:
    found = placement({**STEP, "SLURM_STEP_TASKS_PER_NODE": layout, "SLURM_NODEID": str(node)})
    assert found is not None and found.local_size == expected


@pytest.mark.parametrize("environment", [{}, BATCH, {**STEP, **BATCH, "SLURM_NTASKS": "2"}])
def test_no_rank(environment: dict[str, str]) -> None:
    """A plain process; a batch script; a batch script that a task of another step has submitted."""
    assert placement(environment) is None
    check_world(1, environment, OPEN_MPI_LIBRARY)


@pytest.mark.parametrize(
    "environment, library, expected",
    [
        (STEP, OPEN_MPI_LIBRARY, ["srun started", "SLURM_PROCID=3", "Open MPI v5.0.11", "--mpi=pmix"]),
        (STEP, MPICH_LIBRARY, ["SLURM_STEP_NUM_TASKS=4", "MPICH Version:", "`srun --mpi=pmi2`,"]),
        (PMIX, MPICH_LIBRARY, ["srun --mpi=pmix started", "`srun --mpi=pmi2`,"]),
        (PMI2, OPEN_MPI_LIBRARY, ["srun --mpi=pmi2 started", "--mpi=pmix"]),
        (PMI2, INTEL_LIBRARY, ["I_MPI_PMI_LIBRARY", "the mpirun of Intel MPI"]),
        (OPEN_MPI, MPICH_LIBRARY, ["OMPI_COMM_WORLD_RANK=3", "Put the mpirun of MPICH first in the PATH"]),
        ({**DAEMON, **OPEN_MPI}, MPICH_LIBRARY, ["OMPI_COMM_WORLD_SIZE=4"]),
        (MPICH, OPEN_MPI_LIBRARY, ["mpirun of MPICH started", "PMI_SIZE=4", "the mpirun of Open MPI first"]),
        (STEP, "Another MPI 1.0", ["Another MPI 1.0", "the launcher of that library"]),
    ],
)
def test_every_rank_is_rank_0(environment: dict[str, str], library: str, expected: list[str]) -> None:
    with pytest.raises(LaunchError, match=r"expected 4 ranks.* got 1: every process thinks") as caught:
        check_world(1, environment, library)
    assert [words for words in expected if words not in str(caught.value)] == []


@pytest.mark.parametrize("environment", [*LAUNCHED.values(), *(case for case, _ in UNDER_SLURM.values())])
def test_a_world_as_it_should_be(environment: dict[str, str]) -> None:
    check_world(4, environment, OPEN_MPI_LIBRARY)


@pytest.mark.parametrize(
    "environment",
    [
        {**STEP, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {**STEP, **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
        {**STEP, "SLURM_PTY_PORT": "41237", "SLURM_PROCID": "0"},
        {**OPEN_MPI, **MPICH, "PMI_SIZE": "1"},
        {**MPICH, **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_one_process_that_is_meant(environment: dict[str, str]) -> None:
    """srun -n1; mpirun -np 1, also in a step of 4; a shell of srun --pty; an mpirun in another's rank."""
    check_world(1, environment, MPICH_LIBRARY)


def test_a_shell_of_srun_can_still_start_mpirun_of_the_wrong_library() -> None:
    with pytest.raises(LaunchError):
        check_world(1, {**STEP, "SLURM_PTY_PORT": "41237", **OPEN_MPI}, MPICH_LIBRARY)


@pytest.mark.parametrize("local_rank, ndevices, expected", [(0, 1, 0), (5, 1, 0), (3, 4, 3), (5, 4, 1)])
def test_visible_device(local_rank: int, ndevices: int, expected: int) -> None:
    assert visible_device(local_rank, ndevices) == expected


@pytest.mark.parametrize("local_rank, ndevices, name", [(-1, 2, "local_rank"), (0, 0, "ndevices")])
def test_visible_device_refuses(local_rank: int, ndevices: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        visible_device(local_rank, ndevices)


@pytest.mark.parametrize(
    "changes, on_node, expected",
    [
        ({}, 0, []),
        ({}, 3, ["0", "1", "2"]),
        ({"CUDA_VISIBLE_DEVICES": "4,6"}, 8, ["4", "6"]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1a,GPU-2b"}, 1, ["MIG-1a", "GPU-2b"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, 2, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 2, []),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 2, []),
        ({"CUDA_VISIBLE_DEVICES": "1", "SLURM_GPUS_ON_NODE": "2"}, 2, []),  # --gpus-per-task=1
        ({"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_ON_NODE": "4"}, 4, []),  # --gpus-per-task=2
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"}, 2, ["0", "1"]),  # --gpus-per-node=2
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, 2, []),  # alone on its node: all of them are its own
    ],
)
def test_devices_to_share(changes: dict[str, str], on_node: int, expected: list[str]) -> None:
    assert devices_to_share({**PMIX, **changes}, on_node) == expected


def test_mpirun_shows_a_rank_what_its_daemon_sees() -> None:
    """The daemon's step may have fewer GPUs than the job has on that node: shared all the same."""
    environment = {**DAEMON, **OPEN_MPI, "CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "2"}
    assert devices_to_share(environment, 0) == ["0"]
    assert devices_to_share({"CUDA_VISIBLE_DEVICES": "0,1"}, 2) == []  # nobody to share with


@pytest.mark.parametrize(
    "environment, devices, noted",
    [
        ({**OPEN_MPI, "CUDA_VISIBLE_DEVICES": "4,6"}, "6", False),
        ({**MPICH, "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "5", "CUDA_VISIBLE_DEVICES": "4,6"}, "4", True),
        (
            {**MPICH, "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "5", "CUDA_VISIBLE_DEVICES": "4,6"},
            "6",
            False,
        ),
        ({"CUDA_VISIBLE_DEVICES": "4,6"}, "4,6", False),
    ],
)
def test_the_command(environment: dict[str, str], devices: str, noted: bool) -> None:
    show = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], *sys.argv[1:])"
    done = command([sys.executable, "-c", show, "--option", "two words"], environment)
    assert (done.returncode, done.stdout) == (0, f"{devices} --option two words\n")
    assert ("5 ranks of" in done.stderr and "share 2 GPUs (4,6)" in done.stderr) == noted
    assert noted or not done.stderr


def test_the_command_needs_a_program_that_is_there() -> None:
    assert "usage: mpirun" in command([], {}).stderr
    done = command(["no-such-program"], {})
    assert done.returncode == 1
    assert done.stderr == "mpicoll.placement: no-such-program: No such file or directory\n"


def command(program: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run ``python -m mpicoll.placement PROGRAM`` below no launcher but that of ``environment``."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMPI_", "PMI", "SLURM", "MPI_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "mpicoll.placement", *program],
        env={**own, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )
