"""Whether MPI takes addresses of GPU memory. One that does is **CUDA-aware**.

What a library says of itself is no answer: an Open MPI built without CUDA says no, and yet it can, on a UCX
that knows CUDA. The proof is to send from GPU memory, which is a segmentation fault where it cannot. So a
process of its own, the **probe**, tries it, and how that ends is the **verdict**:

    is_cuda_aware(comm)      the first rank of each node that sees a GPU asks, and all ranks hear the same
      cached_probe(...)      is there a verdict on these libraries, with these settings, on this driver?
        probe()              if not, a process begins that runs ...
          send_from_gpu()

A probe takes a second, ten where a node has many GPUs; a verdict that is remembered, the reading of a file.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import platformdirs

from mpicoll.gpu import driver

if TYPE_CHECKING:
    from mpi4py import MPI

PROBE_LIMIT = 120  # seconds; starting CUDA on a node with many GPUs takes ten
MESSAGES = (64, 4 << 20)  # bytes; libraries send them differently: at once, and after asking

MPI_FILE = re.compile(r"lib(mpi|mpich|mpi_abi|mpi_cray)\.so")
NETWORK_FILE = re.compile(r"lib(ucp|fabric)\.so")  # to these libraries MPI may leave it
DRIVER_VERSION = Path("/proc/driver/nvidia/version")

# A probe must not think that it is a rank of the job which starts it ...
OF_THE_JOB = ("PMIX_", "PMI_", "PMI2_", "PRTE_", "OMPI_COMM_WORLD_", "SLURM_", "HYDRA_")
# ... but its answer depends on the library's settings.
SETTINGS = ("OMPI_MCA_", "UCX_", "MPIR_CVAR_", "MPICH_", "I_MPI_")
SET_BY_LAUNCHERS = ("OMPI_MCA_PREFIXES", "OMPI_MCA_cpu_type", "OMPI_MCA_initial_wdir", "OMPI_MCA_num_procs")


class Verdict(NamedTuple):
    """``aware`` is None where it could not be tried; ``how`` says in words why it is so."""

    aware: bool | None
    how: str


NO_GPU = Verdict(None, "no GPU here to send from")
WORST_FIRST = (False, None, True)


def is_cuda_aware(comm: MPI.Comm) -> tuple[bool, str]:
    """Whether MPI takes GPU memory on every node, and why. All ranks must call, and hear the same.

    A node whose ranks see no GPU is not asked; where no rank sees one, the answer is no.
    """
    verdict = ask(comm)
    return verdict.aware is True, verdict.how


def ask(comm: MPI.Comm) -> Verdict:
    """`is_cuda_aware`, which tells what cannot be tried from what was tried and failed."""
    from mpi4py import MPI

    places = comm.allgather((MPI.Get_processor_name(), sees_gpu()))
    asked: dict[str, int] = {}
    for rank, (node, sees) in enumerate(places):
        if sees:
            asked.setdefault(node, rank)
    verdicts = comm.allgather(verdict_here() if comm.rank in asked.values() else None)
    return together({node: verdicts[rank] for node, rank in asked.items()})


def together(verdicts: Mapping[str, Verdict]) -> Verdict:
    """The verdict on all nodes: the worst one."""
    if not verdicts:
        return NO_GPU
    node, verdict = min(verdicts.items(), key=lambda item: WORST_FIRST.index(item[1].aware))
    if verdict.aware or len(verdicts) == 1:
        return verdict
    return verdict._replace(how=f"node {node}: {verdict.how}")


def sees_gpu() -> bool:
    """Whether this process may use a GPU."""
    try:
        return driver.driver().ndevices > 0
    except driver.GpuError:
        return False


def verdict_here() -> Verdict:
    """The verdict on the libraries that this process has loaded. Raises nothing: other ranks wait for it."""
    try:
        maps = Path("/proc/self/maps").read_text()
        return cached_probe(loaded(MPI_FILE, maps), loaded(NETWORK_FILE, maps))
    except OSError as error:
        return Verdict(None, f"no process could be started that tries it: {error}")


def loaded(name: re.Pattern[str], maps: str) -> list[str]:
    """The libraries with such a name in the text of ``/proc/self/maps``."""
    paths = [line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line]
    return [path for path in dict.fromkeys(paths) if name.match(Path(path).name)]


def cached_probe(libraries: Sequence[str], networks: Sequence[str] = ()) -> Verdict:
    """`probe`, done once for these files of MPI and of what it sends with, their settings, and the driver."""
    if not libraries:
        return probe()
    key = build_key([*libraries, *networks], os.environ)
    file = Path(platformdirs.user_cache_dir("mpicoll")) / f"cuda-aware-{key}.json"
    try:
        verdict = Verdict(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        verdict = probe()
        if verdict.aware is not None:  # what kept it from being tried may pass
            remember(file, verdict)
        return verdict
    return verdict._replace(how=f"{verdict.how}; remembered in {file}")


def build_key(files: Sequence[str], environment: Mapping[str, str]) -> str:
    """Differs for two builds of a library, and for two settings of one that may change the verdict."""
    settings = {
        name: value
        for name, value in environment.items()
        if name.startswith(SETTINGS) and name not in SET_BY_LAUNCHERS
    }
    builds = [(file, os.stat(file).st_mtime_ns) for file in files]
    text = json.dumps([builds, sorted(settings.items()), driver_version()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def driver_version() -> str:
    """Of the part of NVIDIA's driver that is in the kernel."""
    try:
        return DRIVER_VERSION.read_text()
    except OSError:
        return ""


def remember(file: Path, verdict: Verdict) -> None:
    """Write a whole file or none: other jobs may be reading it."""
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(verdict._asdict()))
        draft.replace(file)
    except OSError:
        pass  # no home directory to write to: the next call asks again


def probe(program: str = "from mpicoll.gpu.probe import send_from_gpu; send_from_gpu()") -> Verdict:
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
        return Verdict(False, f"a Sendrecv of GPU memory did not end within {PROBE_LIMIT} s")
    return verdict_on(done.returncode, done.stdout, done.stderr)


def verdict_on(status: int, output: str, errors: str) -> Verdict:
    """What the end of a probe means."""
    attempt = "a Sendrecv of GPU memory in a process of its own"
    if output.strip().endswith("right"):
        return Verdict(True, f"{attempt} gave the right data")
    if output.strip().endswith("wrong"):
        return Verdict(False, f"{attempt} gave wrong data")
    if "sending" in output:
        return Verdict(False, f"{attempt} crashed (status {status})")
    reason = (errors.strip().splitlines() or ["no message"])[-1]
    return Verdict(None, f"{attempt} could not be tried (status {status}): {reason}")


def send_from_gpu() -> None:
    """The probe: a small and a large message from GPU memory to GPU memory, of this process to itself."""
    from mpi4py import MPI

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is an answer, nothing to look into
    gpu = driver.driver()
    stream = gpu.make_stream(0)
    with gpu.on(0):
        for nbytes in MESSAGES:
            sent = (bytes(range(1, 8)) * (nbytes // 7 + 1))[:nbytes]
            source, target = (_on_gpu(gpu, stream, data) for data in (sent, bytes(nbytes)))
            print("sending", flush=True)
            MPI.COMM_SELF.Sendrecv(
                [MPI.buffer.fromaddress(source, nbytes), MPI.BYTE],
                dest=0,
                recvbuf=[MPI.buffer.fromaddress(target, nbytes), MPI.BYTE],
                source=0,
            )
            received = ctypes.create_string_buffer(nbytes)
            gpu.copy(ctypes.addressof(received), target, nbytes, stream)
            gpu.synchronise(stream)
            if received.raw != sent:
                print("wrong", flush=True)
                return
    print("right", flush=True)


def _on_gpu(gpu: driver.Driver, stream: int, data: bytes) -> int:
    """The address of new GPU memory that holds ``data``."""
    address = gpu.allocate(len(data), 0)
    host = ctypes.create_string_buffer(data, len(data))
    gpu.copy(address, ctypes.addressof(host), len(data), stream)
    gpu.synchronise(stream)
    return address
