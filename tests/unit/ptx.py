"""Kernels compiled for GPUs that are not there: the assembly, and what the assembler says of it."""

from __future__ import annotations

import re
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from mpicoll.kernels.device_cuda import Kernel
from numba import cuda

Capability = tuple[int, int]

nvjitlink: Any = import_module("cuda.bindings.nvjitlink")


def compiled(kernel: Kernel, capability: Capability) -> str:
    """The PTX of a kernel."""
    # Functions that a kernel calls are compiled for the GPU at hand, whatever the kernel is compiled for.
    device = SimpleNamespace(compute_capability=capability)
    with mock.patch("numba.cuda.dispatcher.get_current_device", return_value=device):
        code, _ = cuda.compile(kernel.function, kernel.signature, device=False, abi="numba", cc=capability)
    return str(code)


class Resources(NamedTuple):
    """Of each thread."""

    registers: int
    stack: int  # bytes
    spilled: int  # bytes of stores and loads


def resources(ptx: str, capability: Capability) -> Resources:
    """What the assembler needs for a kernel. It says so in the linker's log."""
    options = [f"-arch=sm_{capability[0]}{capability[1]}", "-verbose"]
    linker = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(linker, nvjitlink.InputType.PTX, ptx.encode(), len(ptx), "kernel")
        nvjitlink.complete(linker)
        log = bytearray(nvjitlink.get_info_log_size(linker))
        nvjitlink.get_info_log(linker, log)
    finally:
        nvjitlink.destroy(linker)
    return _resources(log.decode())


def _resources(log: str) -> Resources:
    def one(pattern: str) -> int:
        found = re.search(pattern, log)
        assert found, log
        return int(found[1])

    spilled = one(r"(\d+) bytes spill stores") + one(r"(\d+) bytes spill loads")
    return Resources(one(r"Used (\d+) registers"), one(r"(\d+) bytes stack frame"), spilled)


def accesses(ptx: str, kind: str) -> set[int]:
    """Bits of the global accesses of a kind, ``ld`` or ``st``."""
    found = re.findall(rf"\b{kind}\.global(?:\.v(\d))?\.[a-z](\d+)", ptx)
    return {int(lanes or 1) * int(bits) for lanes, bits in found}


def instructions(ptx: str) -> set[str]:
    """Names of the instructions, such as ``mul.rn.f32``."""
    return set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\w*(?:\.[a-z]\w*)+)\s", ptx, re.MULTILINE))
