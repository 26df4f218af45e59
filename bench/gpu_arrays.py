"""Arrays on the GPU that a rank works on, and what GPU that is. They are CuPy's; tests bring others."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any, Protocol

import click
import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.gpu import probe
from mpicoll.info import visible_gpus
from mpicoll.train.devices import CUDA, choose_device
from mpicoll.train.errors import InputError

Array = Any  # flat, contiguous; can be sliced, viewed as another dtype, and reshaped
HostArray = npt.NDArray[Any]

VERSION = re.compile(r"\b\d{3,}(\.\d+)+\b")  # as a driver's
ASKING = 20  # seconds for nvidia-smi


class Arrays(Protocol):
    """Makes arrays, and does what must be done to them; all of it in the order of ``stream``.

    ``device`` is the GPU's number for this process, ``stream`` a handle; ``note`` what the user should know.
    """

    device: int
    stream: int
    note: str

    def empty(self, nbytes: int) -> Array:
        """New bytes, whatever is in them."""
        ...

    def write(self, array: Array, values: HostArray) -> None:
        """Copy from the host."""
        ...

    def read(self, array: Array) -> HostArray:
        """A copy on the host."""
        ...

    def fill(self, array: Array, byte: int) -> None:
        """The same number in every byte."""
        ...

    def copy(self, target: Array, source: Array) -> None:
        """Copy on the GPU."""
        ...

    def count_different(self, found: Array, wanted: Array) -> int:
        """Elements whose bits differ."""
        ...

    def synchronise(self) -> None:
        """Wait for all that is on the stream."""
        ...

    def room(self) -> int:
        """Bytes that are free on the GPU."""
        ...


class CupyArrays:
    """CuPy's, on its current device and stream."""

    def __init__(self, note: str) -> None:
        import cupy

        self._cupy = cupy
        self.device: int = cupy.cuda.Device().id
        self.stream: int = cupy.cuda.get_current_stream().ptr
        self.note = note

    def empty(self, nbytes: int) -> Array:
        return self._cupy.empty(nbytes, np.uint8)

    def write(self, array: Array, values: HostArray) -> None:
        array.view(np.uint8).set(np.ascontiguousarray(values).view(np.uint8))

    def read(self, array: Array) -> HostArray:
        return np.asarray(self._cupy.asnumpy(array))

    def fill(self, array: Array, byte: int) -> None:
        array.view(np.uint8).fill(byte)

    def copy(self, target: Array, source: Array) -> None:
        target.view(np.uint8)[...] = source.view(np.uint8)

    def count_different(self, found: Array, wanted: Array) -> int:
        bits = f"u{found.dtype.itemsize}"
        return int(self._cupy.count_nonzero(found.view(bits) != wanted.view(bits)))

    def synchronise(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()

    def room(self) -> int:
        return int(self._cupy.cuda.runtime.memGetInfo()[0])


def cupy_arrays(comm: MPI.Intracomm) -> CupyArrays:
    """Those of each rank; ranks take the GPUs of their node in turn.

    Collective. Raises `click.UsageError`, on all ranks, where any has no GPU or no CuPy.
    """
    try:
        return CupyArrays(choose_device(MPI.Intracomm(comm), CUDA).note)
    except InputError as error:
        raise click.UsageError(str(error).replace("device: expected", "benchmarks of GPUs need")) from None


def gpu_facts(device: int) -> dict[str, Any]:
    """For reports: the GPU, and the version of its driver."""
    return {**visible_gpus()[0][device], "driver": driver_version()}


def driver_version() -> str | None:
    """As NVIDIA counts, such as 580.95.05; None if nobody says."""
    found = VERSION.search(probe.driver_version()) or VERSION.search(_asked())
    return found and found[0]


def _asked() -> str:
    """What nvidia-smi says: a container may not show what the kernel does."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=ASKING).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
