"""Placement: which of the job's processes this one is, as its launcher says, before MPI is asked.

Every launcher tells each process in its environment. Two uses:

- A GPU has to be chosen before CUDA starts: `visible_device`. As a command, before a program that knows
  nothing of GPUs and ranks, this module gives each rank of a node its own, in ``CUDA_VISIBLE_DEVICES``:

      mpirun -np 4 python -m mpicoll.placement python train.py

- A launcher that does not speak to the MPI library of mpi4py starts N processes, each of which believes that
  it is rank 0 of 1, and trains alone. `check_world` notices, and says what to do.

Who is asked, in this order, and for what (rank; size; rank on the node; number of ranks there):

    mpirun of Open MPI   OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE,
                         OMPI_COMM_WORLD_LOCAL_RANK, OMPI_COMM_WORLD_LOCAL_SIZE
    mpirun of MPICH and  PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS
      Intel MPI (Hydra)
    srun                 SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID,
                         SLURM_STEP_TASKS_PER_NODE at SLURM_NODEID

- ``mpirun`` comes before Slurm: it starts one daemon on each node as a task of a Slurm step, and the ranks
  inherit the variables of those tasks.
- ``srun --mpi=pmi2`` sets ``PMI_RANK`` and ``PMI_SIZE``, too, but not ``MPI_LOCALRANKID``.
- A batch script is no rank, though it has ``SLURM_NTASKS`` and ``SLURM_PROCID=0``. It has no
  ``SLURM_STEP_NUM_TASKS``, or that of the task which submitted it, while ``SLURM_NTASKS`` is its own; in
  the tasks of ``srun`` the two are equal.

Needs the standard library only.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpicoll.launch import INTEL, MPICH, OPEN_MPI

OPEN_MPI_VARIABLES = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
HYDRA_VARIABLES = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")

DEVICES = "CUDA_VISIBLE_DEVICES"
NO_DEVICES = ("", "-1", "NoDevFiles")  # of CUDA and Slurm: a value that begins so shows no device

# How each library is started under Slurm. Intel MPI finds Slurm through a library that it must be told.
UNDER_SLURM = {
    OPEN_MPI: "`srun --mpi=pmix` (if `srun --mpi=list` has it)",
    MPICH: "`srun --mpi=pmi2`",
    INTEL: "`srun --mpi=pmi2` with I_MPI_PMI_LIBRARY set to the path of Slurm's libpmi2.so",
}


class LaunchError(RuntimeError):
    """The launcher started several processes, and MPI, in each of them, knows of that one alone."""


@dataclass(frozen=True)
class Placement:
    """One process of a job: ``rank`` of ``size``, and ``local_rank`` of the ``local_size`` on its node.

    ``launcher`` is for people: "mpirun of Open MPI", "mpirun of MPICH", "mpirun of Intel MPI", "srun",
    "srun --mpi=pmi2" or "srun --mpi=pmix".
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str


def placement(environment: Mapping[str, str]) -> Placement | None:
    """What the launcher says in ``environment``; None in a process that no launcher started."""
    said = _said_by_mpirun(environment) or _said_by_slurm(environment)
    return said[0] if said else None


def _said_by_mpirun(environment: Mapping[str, str]) -> list[Placement]:
    """What variables of any mpirun say: of two where one was started by a rank of the other."""
    hydra = INTEL if "I_MPI_HYDRA_UUID" in environment else MPICH
    said = []
    for library, variables in ((OPEN_MPI, OPEN_MPI_VARIABLES), (hydra, HYDRA_VARIABLES)):
        if all(name in environment for name in variables):
            rank, size, local_rank, local_size = (int(environment[name]) for name in variables)
            said.append(Placement(rank, size, local_rank, local_size, f"mpirun of {library}"))
    return said


def _said_by_slurm(environment: Mapping[str, str]) -> list[Placement]:
    rank, size, local_rank, layout = (environment.get(name, "") for name in SLURM_VARIABLES)
    if not (rank and size and local_rank and layout) or environment.get("SLURM_NTASKS", size) != size:
        return []
    local_size = _tasks_per_node(layout)[int(environment.get("SLURM_NODEID", 0))]
    return [Placement(int(rank), int(size), int(local_rank), local_size, _srun(environment))]


def _tasks_per_node(layout: str) -> list[int]:
    """Slurm's "2(x3),1" is 2, 2, 2, 1."""
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", layout)
    return [int(tasks) for tasks, times in pairs for _ in range(int(times or 1))]


def _srun(environment: Mapping[str, str]) -> str:
    if "PMIX_RANK" in environment:
        return "srun --mpi=pmix"
    return "srun --mpi=pmi2" if "PMI_RANK" in environment else "srun"


def visible_device(local_rank: int, ndevices: int) -> int:
    """The index of the GPU for a rank that sees ``ndevices`` of them.

    Where Slurm shows each rank only its own (``--gpus-per-task=1``) that is 0; where ranks see all of the
    node, they take them in turn. Ranks beyond the number of GPUs share: that is slower, but right, and the
    command says so. Raises ValueError.
    """
    if local_rank < 0:
        raise ValueError(f"local_rank: expected 0 or more, got {local_rank}")
    if ndevices < 1:
        raise ValueError(f"ndevices: expected at least 1 GPU for a rank to use, got {ndevices}")
    return local_rank % ndevices


def check_world(size: int, environment: Mapping[str, str], library: str) -> None:
    """Raise `LaunchError` if this process is one of several that each believe to be rank 0 of 1.

    ``size``: that of ``MPI.COMM_WORLD``. ``library``: what ``MPI.Get_library_version()`` says. Nothing is
    raised without a launcher, where it started one process, in the shell of ``srun --pty``, from which a
    person starts programs, and where one mpirun was started below another, if either agrees with MPI.
    """
    by_mpirun = _said_by_mpirun(environment)
    said = by_mpirun or _said_by_slurm(environment)
    in_shell = not by_mpirun and "SLURM_PTY_PORT" in environment
    if size != 1 or not said or in_shell or any(one.size == 1 for one in said):
        return
    launched = said[0]
    variables = _variables(launched)
    spoken = ", ".join(f"{name}={environment[name]}" for name in variables)
    without = " ".join(f"-u {name}" for name in variables)
    raise LaunchError(
        f"MPI.COMM_WORLD: expected {launched.size} ranks, as {launched.launcher} started so many processes "
        f"({spoken}), got 1: every process thinks it is rank 0. mpi4py uses {_first_line(library)}, which "
        f"this launcher does not reach. {_advice(launched, library)} "
        f"Where {launched.size} programs on their own are meant: `env {without} python ...`."
    )


def _variables(launched: Placement) -> tuple[str, ...]:
    """The variables with the rank and the size."""
    if launched.launcher.startswith("srun"):
        return SLURM_VARIABLES[:2]
    return (OPEN_MPI_VARIABLES if OPEN_MPI in launched.launcher else HYDRA_VARIABLES)[:2]


def _first_line(library: str) -> str:
    return re.split(r"[,\n\0]", library.strip())[0].strip().replace("\t", " ")


def _advice(launched: Placement, library: str) -> str:
    name = next((name for name in (OPEN_MPI, INTEL, MPICH) if name.split()[0] in library), None)
    if name is None:
        return "Use the launcher of that library."
    own = f"the mpirun of {name}"
    if launched.launcher.startswith("srun"):
        return f"Use {UNDER_SLURM[name]}, or {own} in a batch script."
    return f"Put {own} first in the PATH; on one machine `python -m mpicoll.launch` finds it."


def devices_to_share(environment: Mapping[str, str], on_node: int) -> list[str]:
    """The GPUs that the node's ranks take in turn, as ``CUDA_VISIBLE_DEVICES`` names them.

    ``on_node``: how many there are, for where that variable is not set. Empty where there are none, where
    this process is not one of several on its node, and where ``srun`` has given it its own.
    """
    launched = placement(environment)
    devices = environment.get(DEVICES, ",".join(map(str, range(on_node)))).split(",")
    if launched is None or launched.local_size == 1 or devices[0] in NO_DEVICES:
        return []
    return [] if _has_own_devices(launched, environment, len(devices)) else devices


def _has_own_devices(launched: Placement, environment: Mapping[str, str], ndevices: int) -> bool:
    """Whether ``srun`` shows this rank only some of the node's GPUs: ``--gpus-per-task``, ``--gpu-bind``."""
    by_srun = launched.launcher.startswith("srun")
    return by_srun and int(environment.get("SLURM_GPUS_ON_NODE", ndevices)) > ndevices


def main() -> None:
    """Become the program of the command line, with one GPU for each rank."""
    program = sys.argv[1:]
    if not program:
        sys.exit("usage: mpirun -np N python -m mpicoll.placement PROGRAM [ARGUMENT ...]")
    launched = placement(os.environ)
    devices = devices_to_share(os.environ, len(list(Path("/dev").glob("nvidia[0-9]*"))))
    if launched and devices:
        if launched.local_rank == 0 and launched.local_size > len(devices):
            who, what = f"{launched.local_size} ranks of {platform.node()}", f"{len(devices)} GPUs"
            print(f"note: {who} share {what} ({','.join(devices)})", file=sys.stderr, flush=True)
        os.environ[DEVICES] = devices[visible_device(launched.local_rank, len(devices))]
    try:
        os.execvp(program[0], program)
    except OSError as error:
        sys.exit(f"mpicoll.placement: {program[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
