"""The job's store, asked by all ranks at once. What each request does is tested in tests/unit."""

from __future__ import annotations

import pytest
from mpi4py import MPI

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402

from mpicoll.torch.store import job_store  # noqa: E402

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
TURNS = 10


@pytest.fixture
def store(request: pytest.FixtureRequest) -> dist.PrefixStore:
    return dist.PrefixStore(request.node.name, job_store())


def test_all_ranks_have_the_same(store: dist.PrefixStore) -> None:
    store.set(f"of rank {RANK}", bytes([RANK, 255, 0]))
    assert store.multi_get([f"of rank {rank}" for rank in range(SIZE)]) == [
        bytes([rank, 255, 0]) for rank in range(SIZE)
    ]
    WORLD.Barrier()
    assert store.delete_key(f"of rank {RANK}")
    WORLD.Barrier()
    assert not any(store.check([f"of rank {rank}"]) for rank in range(SIZE))


def test_sums_of_all_ranks(store: dist.PrefixStore) -> None:
    sums = [store.add("n", 1) for _ in range(TURNS)]
    assert sums == sorted(sums)
    everyones = sorted(total for part in WORLD.allgather(sums) for total in part)
    assert everyones == list(range(1, SIZE * TURNS + 1))
    assert store.get("n") == str(SIZE * TURNS).encode()
    store.append("text", "x" * (RANK + 1))
    WORLD.Barrier()
    assert store.get("text") == b"x" * (SIZE * (SIZE + 1) // 2)


def test_one_rank_comes_first(store: dist.PrefixStore) -> None:
    found = store.compare_set("first", "", str(RANK))
    firsts = WORLD.allgather(found)
    assert len(set(firsts)) == 1
    assert [rank for rank, first in enumerate(firsts) if first == str(rank).encode()] == [int(found)]


def test_ranks_wait_for_each_other(store: dist.PrefixStore) -> None:
    """One after the other, from the last rank to the first."""
    if RANK < SIZE - 1:
        store.wait([f"turn {RANK + 1}"])
        assert store.add("n", 1) == SIZE - RANK
    else:
        assert store.add("n", 1) == 1
    store.set(f"turn {RANK}", "")
