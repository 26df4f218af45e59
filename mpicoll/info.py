"""``mpicoll info``: what somebody needs to know about the machine and the MPI library behind a bug report.

`gather` asks every rank and makes one dictionary of the answers, `render` makes one screen of that. A broken
installation is what bug reports are about, so whatever is missing is an entry in the answer, not an error.

Whether an MPI library can send from GPU memory is not a question that it answers reliably. The proof is to do
so, and where it cannot, that is a segmentation fault: so a process of its own tries, once for a build of MPI.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import platformdirs

from mpicoll import launch

if TYPE_CHECKING:
    from mpi4py import MPI

PACKAGES = ("numpy", "numba", "mpi4py", "ml_dtypes", "cupy-cuda13x", "numba-cuda", "torch")
MPI_FILE = re.compile(r"lib(mpi|mpich|mpi_abi|mpi_cray)\.so")
SHOWN_NODES = 8  # more do not fit on a screen; the JSON has them all
PROBE_LIMIT = 120  # seconds; starting CUDA on a node with many GPUs takes ten

# A probe must not think that it is a rank of the job which starts it ...
OF_THE_JOB = ("PMIX_", "PMI_", "PMI2_", "PRTE_", "OMPI_COMM_WORLD_", "SLURM_", "HYDRA_")
# ... but its answer depends on the library's settings.
SETTINGS = ("OMPI_MCA_", "UCX_", "MPIR_CVAR_", "MPICH_", "I_MPI_")
SET_BY_LAUNCHERS = ("OMPI_MCA_PREFIXES", "OMPI_MCA_cpu_type", "OMPI_MCA_initial_wdir", "OMPI_MCA_num_procs")

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
            "cuda_aware": no_gpu_here(),
        }
    comm = MPI.COMM_WORLD
    ranks = comm.allgather(rank_facts(MPI.Get_processor_name()))
    library = mpi_facts(MPI)
    return {
        **comm.bcast(software()),
        "mpi": comm.bcast(library),
        "ranks": ranks,
        "transport": transport(comm),
        "cuda_aware": cuda_awareness(comm, ranks, library),
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


class Driver:
    """NVIDIA's driver library, with no package around it; calls raise `OSError` with its status."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: object) -> None:
        status = getattr(self.cuda, name)(*arguments)
        if status:
            raise OSError(f"{name} returned {status}")

    def number(self, name: str, *arguments: object) -> int:
        """The result of a function that writes an int to its first argument."""
        result = ctypes.c_int()
        self.call(name, ctypes.byref(result), *arguments)
        return result.value

    def text(self, name: str, device: int) -> str:
        """The result of a function that writes a string about a device."""
        buffer = ctypes.create_string_buffer(256)
        self.call(name, buffer, len(buffer), device)
        return buffer.value.decode()


def visible_gpus() -> tuple[list[Facts], str]:
    """The GPUs that this process may use, and how they were looked for."""
    try:
        driver = Driver()
        count = driver.number("cuDeviceGetCount")
        return [gpu_facts(driver, index) for index in range(count)], "libcuda.so.1"
    except OSError as error:
        return [], str(error)


def gpu_facts(driver: Driver, index: int) -> Facts:
    device = driver.number("cuDeviceGet", index)
    memory = ctypes.c_size_t()
    driver.call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    return {
        "name": driver.text("cuDeviceGetName", device),
        "pci": driver.text("cuDeviceGetPCIBusId", device),
        "memory": memory.value,
    }


def mpi_facts(mpi: Any) -> Facts:
    """The MPI library, as it says itself, and which file it is; ``mpi`` is the module ``mpi4py.MPI``."""
    import mpi4py

    levels = {
        mpi.THREAD_SINGLE: "single",
        mpi.THREAD_FUNNELED: "funneled",
        mpi.THREAD_SERIALIZED: "serialized",
        mpi.THREAD_MULTIPLE: "multiple",
    }
    path = loaded_library(Path("/proc/self/maps").read_text())
    return {
        "library": " ".join(mpi.Get_library_version().strip("\0").splitlines()[0].split()),
        "standard": ".".join(map(str, mpi.Get_version())),
        "file": path,
        "threads_asked": mpi4py.rc.thread_level if mpi4py.rc.threads else "single",
        "threads_provided": levels[mpi.Query_thread()],
        "claims_cuda": claimed_cuda_support(path),
    }


def loaded_library(maps: str) -> str | None:
    """The MPI library that mpi4py has loaded, from the text of ``/proc/self/maps``."""
    paths = [line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line]
    return next((path for path in paths if MPI_FILE.match(Path(path).name)), None)


def claimed_cuda_support(path: str | None) -> bool | None:
    """What the library says when asked; None if it cannot be asked."""
    query = getattr(ctypes.CDLL(path), "MPIX_Query_cuda_support", None) if path else None
    return bool(query()) if query else None


def transport(comm: MPI.Intracomm) -> str:
    """How collectives of all ranks would travel, and why; every rank must call this."""
    # No rank may begin to make a communicator unless all can.
    failures = [failure for failure in comm.allgather(import_failure()) if failure]
    if failures:
        return f"unknown, because mpicoll cannot be imported: {failures[0]}"
    from mpicoll.communicator import Communicator

    try:
        with Communicator(comm) as whole:
            return whole.transport
    except Exception as error:
        return f"unknown, because no communicator can be made: {one_line(error)}"


def import_failure() -> str | None:
    """What keeps this rank from using mpicoll. It compiles code, and so there is much that may."""
    try:
        import mpicoll.communicator  # noqa: F401
    except Exception as error:
        return one_line(error)
    return None


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def cuda_awareness(comm: MPI.Comm, ranks: Sequence[Facts], library: Facts) -> Facts:
    """Ask the first rank that sees a GPU; the answer for all ranks."""
    asked = next((rank for rank, facts in enumerate(ranks) if facts["gpus"]), None)
    if asked is None:
        return no_gpu_here()
    mine = cached_probe(library["file"]) if comm.rank == asked else None
    answer: Facts = comm.bcast(mine, root=asked)
    return answer


def no_gpu_here() -> Facts:
    return {"aware": None, "how": "no GPU here to send from"}


def cached_probe(library: str | None) -> Facts:
    """`probe`, done once for every build of MPI, its settings, and the driver being there."""
    if library is None:
        return probe()
    file = Path(platformdirs.user_cache_dir("mpicoll")) / f"cuda-aware-{build_key(library, os.environ)}.json"
    try:
        answer: Facts = json.loads(file.read_text())
    except (OSError, ValueError):
        answer = probe()
        remember(file, answer)
        return answer
    return {**answer, "how": f"{answer['how']}; remembered in {file}"}


def build_key(library: str, environment: os._Environ[str] | dict[str, str]) -> str:
    """Differs for two builds of a library, and for two settings of one that may change the answer."""
    settings = {
        name: value
        for name, value in environment.items()
        if name.startswith(SETTINGS) and name not in SET_BY_LAUNCHERS
    }
    text = json.dumps([library, os.stat(library).st_mtime_ns, sorted(settings.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def remember(file: Path, answer: Facts) -> None:
    """Write a whole file or none: other jobs may be reading it."""
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(answer))
        draft.replace(file)
    except OSError:
        pass  # no home directory to write to: the next call asks again


def probe(program: str = "from mpicoll.info import send_from_gpu; send_from_gpu()") -> Facts:
    """Send from GPU memory in a process of its own, and see what becomes of it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_JOB)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return {"aware": False, "how": f"a Sendrecv of GPU memory did not end within {PROBE_LIMIT} s"}
    return verdict(done.returncode, done.stdout, done.stderr)


def verdict(status: int, output: str, errors: str) -> Facts:
    """What the end of a probe means."""
    attempt = "a Sendrecv of GPU memory in a process of its own"
    if output.strip().endswith("right"):
        return {"aware": True, "how": f"{attempt} gave the right data"}
    if output.strip().endswith("wrong"):
        return {"aware": False, "how": f"{attempt} gave wrong data"}
    if "sending" in output:
        return {"aware": False, "how": f"{attempt} crashed (status {status})"}
    reason = (errors.strip().splitlines() or ["no message"])[-1]
    return {"aware": None, "how": f"{attempt} could not be tried (status {status}): {reason}"}


def send_from_gpu() -> None:
    """The probe: a small and a large message from GPU memory to GPU memory, of this process to itself."""
    from mpi4py import MPI

    driver = Driver()
    context = ctypes.c_void_p()
    driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), driver.number("cuDeviceGet", 0))
    driver.call("cuCtxSetCurrent", context)
    for nbytes in (64, 4 << 20):  # libraries send them differently: at once, and after asking
        source, target = (filled(driver, nbytes, value) for value in (7, 0))
        print("sending", flush=True)
        MPI.COMM_SELF.Sendrecv(
            [MPI.buffer.fromaddress(source, nbytes), MPI.BYTE],
            dest=0,
            recvbuf=[MPI.buffer.fromaddress(target, nbytes), MPI.BYTE],
            source=0,
        )
        received = ctypes.create_string_buffer(nbytes)
        driver.call("cuMemcpyDtoH_v2", received, ctypes.c_uint64(target), ctypes.c_size_t(nbytes))
        if received.raw != b"\7" * nbytes:
            print("wrong", flush=True)
            return
    print("right", flush=True)


def filled(driver: Driver, nbytes: int, value: int) -> int:
    """The address of new GPU memory."""
    address = ctypes.c_uint64()
    driver.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
    driver.call("cuMemsetD8_v2", address, ctypes.c_ubyte(value), ctypes.c_size_t(nbytes))
    return address.value


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


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every rank in it.")
def command(as_json: bool) -> None:
    """Show what a bug report needs: versions, MPI library, ranks, CPUs, GPUs.

    \b
    Examples:
      mpicoll info
      mpirun -np 4 mpicoll info
    """
    facts = gather()
    if facts["mpi"].get("error") or is_first_rank():
        click.echo(json.dumps(facts, indent=2) if as_json else render(facts))


def is_first_rank() -> bool:
    from mpi4py import MPI

    return MPI.COMM_WORLD.rank == 0
