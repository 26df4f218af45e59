"""Where kernels are measured: this machine's processor, or a GPU. All else is the same for both."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import click
import numpy as np
import numpy.typing as npt
from mpicoll.kernels import packing, quantise, reduce, sparse

from mpicoll.info import visible_gpus
from mpicoll.transports import arena

Array = Any  # of NumPy or CuPy
Action = Callable[[], object]


class Device(Protocol):
    """``arrays`` is NumPy or what stands for it there; the kernels' modules have the same functions."""

    name: str
    packages: tuple[str, ...]
    arrays: Any
    packing: Any
    quantise: Any
    sparse: Any

    def reduce(self, op: str, dst: Array, src: Array) -> None:
        """dst = dst op src."""
        ...

    def host(self, array: Array) -> npt.NDArray[Any]:
        """The array where NumPy can look at it."""
        ...

    def seconds(self, action: Action) -> float:
        """What one call takes."""
        ...

    def room(self) -> int:
        """Bytes of memory that are free."""
        ...

    def gpus(self) -> list[dict[str, Any]]:
        """What is to be said of the GPU, if it is one."""
        ...


class Cpu:
    """This process, in one thread."""

    name = "cpu"
    packages: tuple[str, ...] = ("numpy", "numba", "torch")
    arrays: Any = np
    packing: Any = packing
    quantise: Any = quantise
    sparse: Any = sparse

    def reduce(self, op: str, dst: Array, src: Array) -> None:
        """As transports do it: a compiled function gets addresses."""
        address = dst.ctypes.data
        _function(reduce.reduce_kernel(op, dst.dtype))(address, address, src.ctypes.data, dst.size)

    def host(self, array: Array) -> npt.NDArray[Any]:
        return np.asarray(array)

    def seconds(self, action: Action) -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    def room(self) -> int:
        return arena.available_memory()

    def gpus(self) -> list[dict[str, Any]]:
        return []


@cache
def _function(address: int) -> Callable[[int, int, int, int], None]:
    pointers = [ctypes.c_void_p] * 3
    return ctypes.CFUNCTYPE(None, *pointers, ctypes.c_ssize_t)(address)


class Cuda:
    """The GPU that CuPy uses at present. Raises `click.UsageError` where there is none, or no CuPy."""

    name = "cuda"
    packages: tuple[str, ...] = ("numpy", "numba-cuda", "cupy-cuda13x", "torch")
    CALLS = 10  # in one timing: a kernel may take less time than its launch, which the one before it hides

    def __init__(self) -> None:
        for package in ("cupy", "numba_cuda"):
            if find_spec(package) is None:
                install = "pip install 'mpicoll[cuda]'"
                raise click.UsageError(f"--device cuda needs {package}, which is not installed: {install}")
        gpus, looked_for = visible_gpus()
        if not gpus:
            raise click.UsageError(f"--device cuda needs a GPU, and none was found: {looked_for}")
        import cupy
        from mpicoll.kernels import packing_cuda, quantise_cuda, reduce_cuda, sparse_cuda

        self.arrays: Any = cupy
        self.packing: Any = packing_cuda
        self.quantise: Any = quantise_cuda
        self.sparse: Any = sparse_cuda
        self._reduce: Callable[[str, Array, Array], None] = reduce_cuda.reduce

    def reduce(self, op: str, dst: Array, src: Array) -> None:
        self._reduce(op, dst, src)

    def host(self, array: Array) -> npt.NDArray[Any]:
        return np.asarray(self.arrays.asnumpy(array))

    def seconds(self, action: Action) -> float:
        start, end = self.arrays.cuda.Event(), self.arrays.cuda.Event()
        start.record()
        for _ in range(self.CALLS):
            action()
        end.record()
        end.synchronize()
        return float(self.arrays.cuda.get_elapsed_time(start, end)) / 1000 / self.CALLS

    def room(self) -> int:
        return int(self.arrays.cuda.runtime.memGetInfo()[0])

    def gpus(self) -> list[dict[str, Any]]:
        return [visible_gpus()[0][self.arrays.cuda.Device().id]]


DEVICES: dict[str, Callable[[], Device]] = {Cpu.name: Cpu, Cuda.name: Cuda}
