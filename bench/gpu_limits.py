"""The limits that collectives on GPU memory are held against: how fast one process copies, alone.

- **copy**: from one part of the GPU's memory to another, in bytes that are read and bytes that are written;
- **pinned**: from the GPU to pinned host memory and back, both at the same time, in bytes that cross the bus.

A transport that stays on the GPU is bounded by the first, one that goes through the host by the second: a
collective has `least_bytes` to move, however it is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mpicoll.gpu import driver
from mpicoll.gpu.staging import Pinned

from .data import Problem

COPIED = 1 << 30  # bytes of one copy: many times what caches hold
SETS = 3  # of buffers, used in turn
PINNED = 256 << 20  # bytes in each direction
REPEAT = 5
PATTERN = 1 << 16  # bytes of random numbers, again and again: zeros may be faster than data


class Limits(NamedTuple):
    """10^9 bytes per second."""

    copy: float
    pinned: float

    def of(self, through_host: bool) -> float:
        return self.pinned if through_host else self.copy


def measure_limits(device: int, room: int, copied: int = COPIED, pinned: int = PINNED) -> Limits:
    """Of a GPU with ``room`` bytes free, which nobody else uses meanwhile. Raises `GpuError`, MemoryError."""
    copied = min(copied, room // (2 * SETS + 1))
    with driver.driver().on(device):
        return Limits(copy_bandwidth(device, copied), pinned_bandwidth(device, min(pinned, copied)))


def copy_bandwidth(device: int, nbytes: int) -> float:
    """Between buffers of so many bytes on the GPU, read and written, in 10^9 bytes per second."""
    gpu = driver.driver()
    stream, buffers = gpu.make_stream(device), []
    try:
        for _ in range(2 * SETS):
            buffers.append(gpu.allocate(nbytes, device))
            _fill(gpu, buffers[-1], nbytes, stream)
        pairs = list(zip(buffers[::2], buffers[1::2], strict=True))

        def copy() -> None:
            for source, target in pairs:
                gpu.copy(target, source, nbytes, stream)

        return 2 * SETS * nbytes / _seconds(gpu, copy, [stream]) / 1e9
    finally:
        for buffer in buffers:
            gpu.free(buffer)
        gpu.destroy_stream(stream)


def pinned_bandwidth(device: int, nbytes: int) -> float:
    """Of two copies at once, so many bytes to the host and so many to the GPU, in 10^9 bytes per second."""
    gpu = driver.driver()
    there = gpu.allocate(2 * nbytes, device)
    streams, hosts = [gpu.make_stream(device) for _ in range(2)], [Pinned(nbytes) for _ in range(2)]
    try:
        _fill(gpu, there, 2 * nbytes, streams[0])
        hosts[1].array[:nbytes] = np.resize(_pattern(), nbytes)

        def copy() -> None:
            gpu.copy(hosts[0].address, there, nbytes, streams[0])
            gpu.copy(there + nbytes, hosts[1].address, nbytes, streams[1])

        return 2 * nbytes / _seconds(gpu, copy, streams) / 1e9
    finally:
        for host in hosts:
            host.unpin()
        gpu.free(there)
        for stream in streams:
            gpu.destroy_stream(stream)


def _pattern() -> Any:
    return np.random.default_rng(7).integers(0, 256, PATTERN, np.uint8)


def _fill(gpu: driver.Driver, address: int, nbytes: int, stream: int) -> None:
    """Write a pattern, and then copy what is there behind itself."""
    pattern = _pattern()
    ends = [min(PATTERN << i, nbytes) for i in range(max(1, nbytes // PATTERN).bit_length() + 1)]
    gpu.copy(address, pattern.ctypes.data, ends[0], stream)
    for begin, end in pairwise(ends):
        gpu.copy(address + begin, address, end - begin, stream)
    gpu.synchronise(stream)


def _seconds(gpu: driver.Driver, copy: Callable[[], None], streams: Sequence[int]) -> float:
    """The median, after a first time that does not count."""
    found = []
    for _ in range(1 + REPEAT):
        start = time.perf_counter()
        copy()
        for stream in streams:
            gpu.synchronise(stream)
        found.append(time.perf_counter() - start)
    return float(np.median(found[1:]))


def least_bytes(problem: Problem) -> int:
    """What all ranks together must read and write: each rank's input once, and each rank's output once."""
    whole, part, n = problem.size, problem.count * problem.dtype.itemsize, problem.nranks
    inputs, outputs = {
        "allreduce": (n * whole, n * whole),
        "reduce_scatter": (n * whole, n * part),
        "broadcast": (whole, (n - 1) * whole),
        "allgather": (n * part, n * whole),
        "reduce": (n * whole, whole),
        "alltoall": (n * whole, n * whole),
    }[problem.collective]
    return inputs + outputs
