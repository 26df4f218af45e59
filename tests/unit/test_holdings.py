"""What a process holds is counted right, and growth is an error."""

from __future__ import annotations

import mmap
import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from mpicoll.bench import stress
from mpicoll.bench.holdings import Holdings, growth, holdings

MIB = 1 << 20
SIZE = 64 * MIB
SOME = 8 * MIB  # what the interpreter may take or give back meanwhile


def test_what_is_held_is_seen() -> None:
    before = holdings()
    file = os.memfd_create("test")
    os.truncate(file, SIZE)
    # Not of malloc, which may have freed memory left that counts already.
    shared, private = mmap.mmap(file, SIZE), mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for memory in (shared, private):
        memory[::4096] = b"x" * (SIZE // 4096)
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    during = holdings()
    assert during.memory - before.memory == pytest.approx(2 * SIZE, abs=SOME)
    # A mapped file keeps a descriptor of its own.
    assert (during.descriptors - before.descriptors, during.shared - before.shared) == (2, 1)
    assert during.threads - before.threads == 1
    end.set()
    thread.join()
    shared.close()
    os.close(file)
    private.close()
    assert growth(before, holdings(), Holdings(memory=SOME, descriptors=0, shared=0, threads=0)) == []


def test_growth_in_words() -> None:
    before, after = Holdings(1000, 20, 4, 7), Holdings(1500, 23, 4, 6)
    assert growth(before, after, Holdings(500, 3, 0, 0)) == []
    assert growth(before, after, Holdings(499, 0, 0, 0)) == [
        "memory: expected at most 1000 + 499, got 1500",
        "descriptors: expected at most 20 + 0, got 23",
    ]


def test_a_stress_that_leaves_something_behind_fails() -> None:
    comm: Any = SimpleNamespace(rank=1, size=2, allgather=lambda mine: [mine])
    found: list[Holdings] = []
    numbers = list(stress.watched(iter((16, 32, 48)), 32, found))
    assert numbers == [16, 32, 48] and len(found) == 2
    before = found[0]
    leaky = Holdings(before.memory, before.descriptors + 5, before.shared, before.threads)
    with pytest.raises(stress.Growth, match=r"rank 1 of 2 .*: descriptors: expected at most \d+ \+ 4, got"):
        stress.check_growth(comm, [before, leaky], 1024)
    report = stress.check_growth(comm, [before, before], 1024)
    assert report and report[0]["before"] == report[0]["after"]


def test_a_stress_that_ends_in_its_warm_up_judges_nothing() -> None:
    found: list[Holdings] = []
    assert list(stress.watched(iter((16, 32)), 33, found)) == [16, 32]
    comm: Any = SimpleNamespace(rank=0, size=1)
    assert stress.check_growth(comm, found, 1024) is None
