"""The arena: memory that other processes map, given back when nobody refers to it."""

from __future__ import annotations

import gc
import itertools
import os
import random
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mpicoll.transports import arena
from mpicoll.transports.arena import PAGE, ArenaError, Handle, new_array, own_arena
from tests.children import in_child

MIB = 1 << 20
LIMIT = 60  # seconds for a process that takes one
Array = np.ndarray[Any, Any]


def used() -> int:
    """Bytes of this process's arena that are there."""
    gc.collect()
    return os.fstat(own_arena().handle.fd).st_blocks * 512


def run_python(text: str, *arguments: object) -> str:
    """What a process of its own prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- arrays


@pytest.mark.parametrize(
    "dtype", [np.int8, "f4", float, "complex128", np.longdouble, bool, "S3", ml_dtypes.bfloat16]
)
def test_zeros_of_any_dtype(dtype: Any) -> None:
    for shape in (0, 1, 7, 3 * PAGE, (2, 3), [4, 5], (), (3, 0, 2), np.int64(5)):
        array, expected = new_array(shape, dtype), np.zeros(shape, dtype)
        assert array.dtype == expected.dtype
        assert array.shape == expected.shape
        assert array.flags.c_contiguous and array.flags.writeable
        assert (array == expected).all()
        assert array.ctypes.data % PAGE == 0
        array[...] = np.ones(1, dtype)[0]
        assert (array == np.ones(1, dtype)[0]).all()


def test_a_record_dtype() -> None:
    kind = np.dtype([("a", "i4"), ("b", "f8", 2)])
    array = new_array(5, kind)
    array["b"][3] = 1, 2
    assert array["b"].tolist() == [[0, 0]] * 3 + [[1, 2]] + [[0, 0]]
    assert not array["a"].any()


def test_memory_is_zero_again_when_it_is_used_again() -> None:
    for _ in range(5):
        array = new_array(10_000, np.int64)
        assert not array.any()
        array[:] = -1
        del array


def test_arrays_lie_apart() -> None:
    arrays = [new_array(100 + i, np.int64) for i in range(50)]
    for i, array in enumerate(arrays):
        array[:] = i
    assert all((array == i).all() for i, array in enumerate(arrays))
    places = sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))


def test_thousands_of_arrays_in_random_order_leave_nothing() -> None:
    generator = random.Random(1)
    before = used()
    for _ in range(3):
        arrays = [new_array(generator.randrange(20_000), np.uint8) for _ in range(1500)]
        generator.shuffle(arrays)
        while len(arrays) > 300:
            arrays.pop()
        arrays += [new_array(generator.randrange(20_000), np.uint8) for _ in range(500)]
        assert used() > before
        generator.shuffle(arrays)
        arrays.clear()
        assert used() <= before
    extents = own_arena()._extents
    whole = new_array(64 * MIB, np.uint8)  # there is room for one as large as ever
    assert whole.nbytes == 64 * MIB
    del whole
    new_array(1, np.uint8)  # takes back what has been returned
    assert len(extents._free) < 20


def test_memory_is_given_back_with_the_last_view() -> None:
    before = used()
    whole = new_array((4, MIB), np.uint8)
    whole[:] = 5
    assert used() >= before + 4 * MIB
    view = whole[1].view(np.int16)[10:20].reshape(2, 5)
    del whole
    other = new_array((4, MIB), np.uint8)
    other[:] = 7
    assert used() >= before + 8 * MIB
    assert (view == 0x0505).all()
    del view, other
    assert used() <= before


def test_resident_memory_shrinks() -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem"))

    before = resident()
    array = new_array(32 * MIB, np.uint8)
    array[:] = 1
    assert resident() >= before + 32 * MIB
    del array
    gc.collect()
    assert resident() < before + MIB


def test_no_file_is_made() -> None:
    before = set(os.listdir("/dev/shm"))
    array = new_array(MIB, np.uint8)
    array[:] = 1
    assert {name for name in os.listdir("/dev/shm") if "mpicoll" in name} <= before
    assert os.readlink(f"/proc/self/fd/{own_arena().handle.fd}") == "/memfd:mpicoll (deleted)"


def test_arrays_of_many_threads() -> None:
    """Arrays are made and forgotten at once everywhere, also by the collection of cycles."""
    before = used()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        generator = random.Random(number)
        try:
            for _ in range(200):
                arrays = [new_array(generator.randrange(1, 9000), np.int16) for _ in range(3)]
                for array in arrays:
                    assert not array.any()
                    array[:] = number
                cycle: list[Any] = [arrays]
                cycle.append(cycle)
                assert all((array == number).all() for array in arrays)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert used() <= before


# -- what is refused


def test_what_cannot_be_had() -> None:
    for nbytes in (1 << 44, 1 << 62, own_arena().size - PAGE):
        with pytest.raises(MemoryError, match=rf"expected at most \d+ bytes, .*, got {nbytes}$"):
            new_array(nbytes, np.uint8)
    with pytest.raises(MemoryError):
        new_array((1 << 40, 1 << 40), np.float64)
    assert not new_array(3, np.uint8).any()


def test_a_control_groups_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{300 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{100 * MIB}\n")
    monkeypatch.setattr(arena, "cgroups", lambda: [tmp_path])
    allowed = 200 * MIB - arena.RESERVE
    with pytest.raises(MemoryError, match=f"expected at most {allowed} bytes"):
        new_array(allowed + 1, np.uint8)
    (tmp_path / "memory.max").write_text("max\n")
    assert new_array(arena.RESERVE + 1, np.uint8).size


def test_a_failed_request_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before, free = used(), list(own_arena()._extents._free)

    def refuse(self: arena.Arena, offset: int, nbytes: int) -> None:
        raise MemoryError("no pages")

    with monkeypatch.context() as patch:
        patch.setattr(arena.Arena, "_touch", refuse)
        for _ in range(3):
            with pytest.raises(MemoryError, match="no pages"):
                new_array(MIB, np.uint8)
    new_array(1, np.uint8)
    new_array(1, np.uint8)
    assert used() <= before
    assert sum(end - start for start, end in own_arena()._extents._free) >= sum(b - a for a, b in free) - PAGE


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="dtype: expected numbers or bytes, got object"):
        new_array(3, object)
    with pytest.raises(TypeError, match="dtype: "):
        new_array(3, [("a", "i4"), ("b", object)])
    with pytest.raises(ValueError, match="shape: expected dimensions of 0 or more, got -1"):
        new_array(-1, np.uint8)
    with pytest.raises(ValueError, match=r"shape: .* got \(3, -2\)"):
        new_array((3, -2), np.uint8)


@pytest.mark.parametrize("shape", [2.5, (2, 2.5), "12", None])
def test_a_shape_is_made_of_integers(shape: Any) -> None:
    with pytest.raises(TypeError):
        new_array(shape, np.uint8)


# -- other processes


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gives_nothing_back() -> None:
    held = [new_array(MIB, np.uint8) for _ in range(3)]
    for number, array in enumerate(held):
        array[:] = number + 1
    before = used()

    def forget() -> None:
        assert all((array == number + 1).all() for number, array in enumerate(held))
        held.clear()
        gc.collect()
        mine = new_array(MIB, np.uint8)
        assert own_arena().handle.pid == os.getpid()
        assert not mine.any()
        mine[:] = 9

    in_child(forget)
    assert used() == before
    assert all((array == number + 1).all() for number, array in enumerate(held))


def test_a_childs_ordinary_end_gives_nothing_back() -> None:
    """With the interpreter's own clean-up, which a child made by fork goes through, too."""
    said = run_python(
        """
        import gc, os, sys, warnings
        import numpy as np
        from mpicoll.transports.arena import new_array
        warnings.simplefilter("ignore")
        array = new_array(100_000, np.int64)
        array[:] = 5
        view = array[10:]
        child = os.fork()
        if child == 0:
            del array
            gc.collect()
            sys.exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        print((array == 5).all() and (view == 5).all())
        """
    )
    assert said == "True"


def test_another_process_reads_and_writes() -> None:
    array = new_array(1000, np.int64)
    array[:] = np.arange(1000)
    later = new_array(10 * MIB, np.uint8)  # larger than anything before
    later[-1] = 77
    here = own_arena().address
    said = run_python(
        """
        import ctypes, sys
        import numpy as np
        from mpicoll.transports.arena import Handle, own_arena
        *handle, offset, last = map(int, sys.argv[1:])
        there = own_arena().map(Handle(*handle))
        assert own_arena().map(Handle(*handle)) == there
        words = np.frombuffer((ctypes.c_char * 8000).from_address(there + offset), np.int64)
        assert words.tolist() == list(range(1000))
        words[5] = -1
        print(ctypes.c_uint8.from_address(there + last).value)
        """,
        *own_arena().handle,
        array.ctypes.data - here,
        later.ctypes.data + later.size - 1 - here,
    )
    assert said == "77"
    assert array[5] == -1


def test_the_own_arena_is_not_mapped_again() -> None:
    assert own_arena().map(own_arena().handle) == own_arena().address


def test_what_cannot_be_mapped() -> None:
    pid, fd, inode, size = own_arena().handle
    with pytest.raises(ArenaError, match="is not what it should be: other containers have other process"):
        own_arena().map(Handle(pid, fd, inode + 1, size))
    with pytest.raises(ArenaError, match=f"the memory of process {pid} cannot be opened"):
        own_arena().map(Handle(pid, 1 << 20, inode, size))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(ArenaError, match=f"the memory of process {ended.pid} cannot be opened"):
        own_arena().map(Handle(ended.pid, fd, inode, size))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ArenaError, match=r"cannot be mapped|is not what it should be"):
        own_arena().map(Handle(pid, fd, inode, 1 << 60))
    assert len(os.listdir("/proc/self/fd")) == before


LIMITED = """
import resource, sys
import numpy as np
from mpicoll.transports.arena import ArenaError, new_array, own_arena
name, more = sys.argv[1], int(sys.argv[2])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() if name == "AS" else 0
resource.setrlimit(getattr(resource, "RLIMIT_" + name), (used + more, used + more))
try:
    array = new_array(1000, np.int64)
except ArenaError as error:
    print(error)
else:
    array[:] = 1
    print(own_arena().size)
"""


@pytest.mark.parametrize("name", ["AS", "FSIZE"])
def test_limits_make_a_smaller_arena(name: str) -> None:
    size = int(run_python(LIMITED, name, 300 * MIB))
    assert arena.SMALLEST <= size <= 300 * MIB


@pytest.mark.parametrize("name", ["AS", "FSIZE"])
def test_too_strict_limits_are_an_error(name: str) -> None:
    said = run_python(LIMITED, name, arena.SMALLEST - MIB)
    assert said == f"no memory file of {arena.SMALLEST} bytes could be mapped: see ulimit -v and ulimit -f"


def test_no_memory_file_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise OSError("not in this kernel")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(ArenaError, match="no memory file could be made: not in this kernel"):
        arena.Arena()
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ArenaError, match="no memory file could be made"):
        arena.Arena()
