"""The arena: memory of this process that the other processes of its node can map.

It is a memory file (``memfd_create``), so it is not bound by the size of ``/dev/shm``, has no name that
could be left behind, and is gone with the last process that maps it. Other processes of the same user open
it through ``/proc``. The file is as large as the machine's memory, but sparse: a page is there once it has
been touched, and given back when the array on it is freed. So peers map it once, at its full size, and every
allocation that comes later is already within their reach.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import operator
import os
import threading
import weakref
from bisect import insort
from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mpicoll.launch import cgroups

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20  # bytes; larger allocations begin on one, where the kernel may use huge pages
SMALLEST = 64 << 20  # bytes of address space below which an arena is of no use
RESERVE = 64 << 20  # bytes of memory that allocations leave to others
MADV_POPULATE_WRITE = 23  # of Linux 5.14; Python's mmap does not know it

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class ArenaError(OSError):
    """Memory cannot be shared between processes here; the message says why."""


class Handle(NamedTuple):
    """What another process needs to map an arena."""

    pid: int
    fd: int
    inode: int
    size: int


def _machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * PAGE


def available_memory() -> int:
    """Bytes of memory that could still be had: of the machine, and of this process's control groups."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min([free, *_cgroup_rooms()])


def _cgroup_rooms() -> list[int]:
    rooms = []
    for group in cgroups():
        try:
            limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        except OSError:
            continue
        if limit != "max":
            rooms.append(int(limit) - int(used))
    return rooms


def _create_file() -> tuple[int, int]:
    """A memory file of this machine's memory's size, or of as much as limits allow; and its size."""
    try:
        fd = os.memfd_create("mpicoll", os.MFD_CLOEXEC)
    except (OSError, AttributeError) as error:
        raise ArenaError(f"no memory file could be made: {error}") from error
    size = 1 << (_machine_memory() - 1).bit_length()
    while size >= SMALLEST:
        try:
            os.ftruncate(fd, size)
            _map(fd, size).close()
            return fd, size
        except (OSError, ValueError, OverflowError):  # limits on address space or file sizes (ulimit -v, -f)
            size //= 2
    os.close(fd)
    raise ArenaError(f"no memory file of {SMALLEST} bytes could be mapped: see ulimit -v and ulimit -f")


def _map(fd: int, size: int) -> mmap.mmap:
    return mmap.mmap(fd, size, mmap.MAP_SHARED | getattr(mmap, "MAP_NORESERVE", 0x4000))


class _Mapping:
    """A mapped memory file: its address in this process."""

    def __init__(self, fd: int, size: int) -> None:
        self.map = _map(fd, size)
        self.size = size
        self.address = np.frombuffer(self.map, np.uint8, 1).ctypes.data


class _Extents:
    """Which parts of the arena are free: first fit, neighbours joined."""

    def __init__(self, size: int) -> None:
        self._free = [(0, size)]  # (start, end), ascending

    def take(self, nbytes: int, alignment: int) -> int | None:
        for index, (start, end) in enumerate(self._free):
            at = -(-start // alignment) * alignment
            if at + nbytes <= end:
                rest = [(start, at), (at + nbytes, end)]
                self._free[index : index + 1] = [(a, b) for a, b in rest if a < b]
                return at
        return None

    def give_back(self, start: int, nbytes: int) -> None:
        insort(self._free, (start, start + nbytes))
        index = self._free.index((start, start + nbytes))
        neighbours = self._free[max(0, index - 1) : index + 2]
        joined = neighbours[:1]
        for a, b in neighbours[1:]:
            if a == joined[-1][1]:
                joined[-1] = (joined[-1][0], b)
            else:
                joined.append((a, b))
        self._free[max(0, index - 1) : index + 2] = joined


class Block:
    """A piece of this process's arena, its bytes all zero at first; given back when it is collected.

    NumPy arrays made from it (``numpy.asarray``) keep it alive.
    """

    def __init__(self, arena: Arena, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.address = arena.address + offset
        # A copy of the process that fork made must not give back what its parent still uses.
        weakref.finalize(self, arena._give_back, offset, nbytes, os.getpid()).atexit = False

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "data": (self.address, False), "shape": (self.nbytes,), "typestr": "|u1"}


class Arena:
    """This process's arena, and those of other processes that it has mapped."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._fd, size = _create_file()
        self._own = _Mapping(self._fd, size)
        self.address = self._own.address
        self.size = size
        self._extents = _Extents(size)
        self._turn = threading.Lock()
        # Blocks are collected at any moment, also while another is taken: they wait here till that is done.
        self._returned: deque[tuple[int, int]] = deque()
        self._others: dict[Handle, _Mapping] = {}
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._own.map.madvise(mmap.MADV_HUGEPAGE)

    @property
    def handle(self) -> Handle:
        return Handle(os.getpid(), self._fd, os.fstat(self._fd).st_ino, self.size)

    def map(self, handle: Handle) -> int:
        """The address in this process of another process's arena. Raises `ArenaError`."""
        if handle == self.handle:
            return self.address
        with self._turn:
            if handle not in self._others:
                self._others[handle] = self._map_other(handle)
            return self._others[handle].address

    def _map_other(self, handle: Handle) -> _Mapping:
        path = f"/proc/{handle.pid}/fd/{handle.fd}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ArenaError(f"the memory of process {handle.pid} cannot be opened: {error}") from error
        try:
            if os.fstat(fd).st_ino != handle.inode:
                raise ArenaError(
                    f"{path} is not what it should be: other containers have other process numbers"
                )
            return _Mapping(fd, handle.size)
        except (OSError, ValueError) as error:
            raise ArenaError(f"the memory of process {handle.pid} cannot be mapped: {error}") from error
        finally:
            os.close(fd)

    def take(self, nbytes: int, touched: int | None = None) -> Block:
        """A block of at least ``nbytes`` zero bytes, in memory near this thread's processor.

        Only the first ``touched`` bytes are there at once, if that is given; the rest when it is used. Raises
        MemoryError if the machine has not that much left.
        """
        room = max(PAGE, -(-nbytes // PAGE) * PAGE)
        available = available_memory() if room > RESERVE else room + RESERVE
        if room + RESERVE > available:
            raise MemoryError(
                f"shared memory: expected at most {max(0, available - RESERVE)} bytes, which is what this "
                f"machine or its control group has left, got {nbytes}"
            )
        with self._turn:
            while self._returned:
                self._extents.give_back(*self._returned.popleft())
            offset = self._extents.take(room, HUGE_PAGE if room >= HUGE_PAGE else PAGE)
        if offset is None:
            raise MemoryError(
                f"shared memory: no {nbytes} bytes in one piece are left of this process's {self.size}"
            )
        try:
            self._touch(offset, room if touched is None else touched)
        except MemoryError:
            self._returned.append((offset, room))
            raise
        return Block(self, offset, room)

    def _touch(self, offset: int, nbytes: int) -> None:
        """Have the pages now, with an error if there are none, instead of a bus error when they are used."""
        if _libc.fallocate(self._fd, 0, offset, nbytes):
            error = os.strerror(ctypes.get_errno())
            raise MemoryError(f"shared memory: {nbytes} bytes could not be had: {error}")
        _libc.madvise(self.address + offset, nbytes, MADV_POPULATE_WRITE)  # older kernels do so at first use

    def _give_back(self, offset: int, nbytes: int, owner: int) -> None:
        if os.getpid() != owner:
            return
        self._own.map.madvise(mmap.MADV_REMOVE, offset, nbytes)
        self._returned.append((offset, nbytes))


@cache
def _arena_of(pid: int) -> Arena:
    return Arena()


def own_arena() -> Arena:
    """This process's arena, made when first asked for; a forked process gets one of its own."""
    return _arena_of(os.getpid())


def new_array(shape: int | Sequence[int], dtype: npt.DTypeLike) -> np.ndarray[Any, Any]:
    """An array of zeros in this process's arena; its memory is given back with its last view.

    Raises MemoryError if the machine has not that much left, `ArenaError` where memory cannot be shared.
    """
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise TypeError(f"dtype: expected numbers or bytes, got {kind}, which refers to Python objects")
    dimensions = tuple(map(operator.index, shape if isinstance(shape, Sequence) else (shape,)))
    if any(n < 0 for n in dimensions):
        raise ValueError(f"shape: expected dimensions of 0 or more, got {shape}")
    nbytes = math.prod(dimensions) * kind.itemsize
    block = own_arena().take(nbytes)
    return np.asarray(block)[:nbytes].view(kind).reshape(dimensions)
