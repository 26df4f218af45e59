"""What a process holds, and whether that has grown: memory, descriptors, shared memory, threads.

A library that leaks a little at every call, or at every communicator, fails after days. So what is held is
looked at twice, after a warm-up and at the end, and the difference is compared with what may differ. Open
requests of MPI cannot be counted; what they hold is seen here. Needs Linux's ``/proc``.
"""

from __future__ import annotations

import ctypes
import gc
import os
from dataclasses import asdict, dataclass
from pathlib import Path

KIB = 1024
SHARED = ("/memfd:", "/dev/shm/", "/SYSV")  # how the kernel names shared memory


@dataclass(frozen=True)
class Holdings:
    """Of one process. ``memory``: resident bytes that are no file's; ``shared``: pieces of shared memory."""

    memory: int
    descriptors: int
    shared: int
    threads: int


def holdings() -> Holdings:
    """What this process holds now, without what garbage collector and allocator keep for later."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    lines = (line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    status = {name: text.split() for name, text in lines}
    maps = Path("/proc/self/maps").read_text().splitlines()
    return Holdings(
        memory=sum(int(status[name][0]) * KIB for name in ("RssAnon", "RssShmem")),
        descriptors=len(os.listdir("/proc/self/fd")),
        shared=sum(any(name in line for name in SHARED) for line in maps),
        threads=int(status["Threads"][0]),
    )


def growth(before: Holdings, after: Holdings, allowed: Holdings) -> list[str]:
    """What has grown by more than ``allowed``, in words."""
    then, now, limits = asdict(before), asdict(after), asdict(allowed)
    return [
        f"{name}: expected at most {then[name]} + {limit}, got {now[name]}"
        for name, limit in limits.items()
        if now[name] > then[name] + limit
    ]
