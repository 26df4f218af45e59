"""Where a rank trains: on the cores of the host, or on a GPU with CuPy.

Ranks take the GPUs of their node in turn, by their number among the training's ranks there:

    a node with 2 GPUs          rank 0: GPU 0     rank 1: GPU 1     rank 2: GPU 0     rank 3: GPU 1
    srun --gpus-per-task=1      each rank sees one GPU, its own, and calls it GPU 0

So ranks beyond the number of GPUs share; that is right, but slower, and a note says so. Whatever a rank calls
its GPU, it is known by its place in the machine.

On a GPU all that is as long as the parameters lives in CuPy arrays: parameters, gradients, the optimizer's
state; samples too, unless they are mapped from files. The host gives out work, runs ahead of the GPU, and
waits for it where it needs a number: once for the losses of an epoch, once for those of the test samples.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.gpu import driver
from mpicoll.gpu.driver import GpuError
from mpicoll.grouped import new_bucket
from mpicoll.placement import DEVICES as VISIBLE
from mpicoll.placement import visible_device
from mpicoll.train.arrays import Array
from mpicoll.train.errors import InputError, raise_on_all

CPU, CUDA = "cpu", "cuda"
DEVICES = CPU, CUDA
INSTALL = "pip install 'mpicoll[cuda]'"


@dataclass(frozen=True)
class Device:
    """Where this rank trains. ``note``: what the user should know of it, the same on all ranks, or empty."""

    name: str
    note: str = ""

    @property
    def is_gpu(self) -> bool:
        """Whether the arrays are CuPy's."""
        return self.name == CUDA

    @property
    def module(self) -> ModuleType:
        """What makes arrays there: numpy or cupy."""
        return import_module("cupy" if self.is_gpu else "numpy")

    def zeros(self, count: int, dtype: npt.DTypeLike) -> Array:
        """A vector there; the host's can be read by the node's other ranks."""
        return self.module.zeros(count, dtype) if self.is_gpu else new_bucket(count, dtype)


class _Place(NamedTuple):
    """The GPU of a rank: which it is, whatever ranks call it, and the name of its node."""

    machine: str
    bus: str
    node: str


def choose_device(comm: MPI.Intracomm, name: str) -> Device:
    """Let this process train on the CPU, or on one of its node's GPUs: CuPy works on that from now on.

    Collective. Raises `InputError`, on all ranks, where any of them cannot.
    """
    if name not in DEVICES:
        raise InputError(f"device: expected {' or '.join(DEVICES)}, got {name!r}")
    if name == CPU:
        return Device(CPU)
    machine = Path("/proc/sys/kernel/random/boot_id").read_text()
    local_rank = comm.allgather(machine)[: comm.rank].count(machine)
    bus = problem = ""
    try:
        bus = _take_gpu(local_rank)
    except InputError as error:
        problem = str(error)
    raise_on_all(comm, problem)
    return Device(CUDA, _note(comm.allgather(_Place(machine, bus, platform.node()))))


def _take_gpu(local_rank: int) -> str:
    """Make CuPy work on the GPU of a rank; where that is. Raises `InputError`."""
    try:
        cupy = import_module("cupy")
    except ImportError as error:
        raise InputError(f"device: expected CuPy for cuda, but: {_first_line(error)}; {INSTALL}") from error
    try:
        found = driver.driver()
        ndevices = found.ndevices
        if not ndevices:
            raise GpuError("the driver shows none")
        number = visible_device(local_rank, ndevices)
        bus, name = found.bus(number), found.name(number)
    except GpuError as error:
        shown = f" with {VISIBLE}={os.environ[VISIBLE]}" if VISIBLE in os.environ else ""
        raise InputError(f"device: expected a GPU for cuda, but: {error}{shown}") from error
    try:
        cupy.cuda.Device(number).use()
        _try(cupy)
    except Exception as error:  # of any of the libraries below it, which are loaded when they are needed
        raise InputError(
            f"device: expected CuPy to compute on GPU {number} ({name}), but: {_first_line(error)}; "
            f"{INSTALL} has all that it needs"
        ) from error
    return bus


def _try(cupy: Any) -> None:
    """A product of matrices, and an update: for these, libraries are loaded and kernels compiled.

    That takes a second or two, which is no step's time.
    """
    gradient = (cupy.full((2, 2), 2, np.float32) @ cupy.full((2, 2), 3, np.float32)).ravel()
    parameters, velocity = cupy.ones(4, np.float32), cupy.zeros(4, np.float32)
    import_module("mpicoll.kernels.packing_cuda").Update(gradient, [parameters], [velocity]).step(0.5)
    if parameters.get().tolist() != [1 - 0.5 * 12] * 4:
        raise ArithmeticError("its results are wrong")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _note(places: Sequence[_Place]) -> str:
    """Of the nodes where ranks share GPUs."""
    crowded: list[tuple[str, int, int]] = []
    for machine in dict.fromkeys(place.machine for place in places):
        there = [place for place in places if place.machine == machine]
        ngpus = len({place.bus for place in there})
        if ngpus < len(there):
            crowded.append((there[0].node, len(there), ngpus))
    if not crowded:
        return ""
    node, nranks, ngpus = crowded[0]
    others = f" (and on {_several(len(crowded) - 1, 'other node')})" if len(crowded) > 1 else ""
    return (
        f"{nranks} ranks share {_several(ngpus, 'GPU')} on node {node}{others}: the same steps, but ranks "
        "take turns on it; one rank for each GPU is faster"
    )


def _several(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"
