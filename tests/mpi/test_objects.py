"""Collectives of Python objects do as mpi4py's own; what cannot be pickled is an error on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll.faults import MismatchError

from .test_hierarchical import TWO, has_several_nodes
from .test_hierarchical import communicator as on_nodes

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
ODD = SIZE - 1
TRANSPORTS = ["messages", "auto", *(["hierarchical"] if has_several_nodes(TWO) else [])]
Comm = mpicoll.Communicator


@pytest.fixture(params=TRANSPORTS)
def comm(request: pytest.FixtureRequest) -> Iterator[Comm]:
    hierarchical = request.param == "hierarchical"
    with on_nodes(TWO) if hierarchical else Comm(WORLD, transport=request.param) as made:
        yield made


def thing(rank: int, other: int = 0) -> Any:
    """Of another kind and size on each rank: from nothing to more than one piece of any transport."""
    things = (None, {"rank": rank, "other": other}, list(range(97 * rank + other)), "x" * (300_000 + rank))
    return things[(rank + other) % len(things)]


@pytest.mark.parametrize("root", range(SIZE))
def test_one_to_all_and_all_to_one(comm: Comm, root: int) -> None:
    assert comm.bcast(thing(RANK, 3) if root == RANK else None, root) == thing(root, 3)
    everyones = [thing(rank) for rank in range(SIZE)]
    assert comm.gather(thing(RANK), root) == (everyones if root == RANK else None)
    assert comm.scatter(everyones if root == RANK else None, root) == thing(RANK)


def test_all_to_all(comm: Comm) -> None:
    assert comm.allgather(thing(RANK)) == [thing(rank) for rank in range(SIZE)]
    assert comm.alltoall([thing(RANK, to) for to in range(SIZE)]) == [
        thing(rank, RANK) for rank in range(SIZE)
    ]
    comm.barrier()


@pytest.mark.parametrize("root", range(SIZE))
def test_reductions_fold_in_the_order_of_ranks(comm: Comm, root: int) -> None:
    join: Callable[[str, str], str] = lambda a, b: f"({a}{b})"  # noqa: E731  (which does not commute)
    joined = reduce(join, map(str, range(SIZE)))
    assert comm.allreduce(RANK + 1) == SIZE * (SIZE + 1) // 2
    assert comm.allreduce((RANK % 2, RANK), MPI.MAXLOC) == (int(SIZE > 1), int(SIZE > 1))
    assert comm.allreduce(str(RANK), join) == joined
    assert comm.reduce(str(RANK), join, root) == (joined if root == RANK else None)
    np.testing.assert_array_equal(comm.allreduce(np.arange(3) * RANK), np.arange(3) * sum(range(SIZE)))


def unpicklable(rank: int) -> Any:
    return (lambda: 0) if rank == ODD else rank


CALLS: dict[str, Callable[[Comm], Any]] = {
    "bcast": lambda comm: comm.bcast(unpicklable(RANK), ODD),
    "gather": lambda comm: comm.gather(unpicklable(RANK), 0),
    "allgather": lambda comm: comm.allgather(unpicklable(RANK)),
    "allreduce": lambda comm: comm.allreduce(unpicklable(RANK)),
    "scatter": lambda comm: comm.scatter([unpicklable(RANK)] * SIZE, ODD),
    "too few": lambda comm: comm.scatter([0] * (SIZE + (RANK == ODD)), ODD),
    "nothing": lambda comm: comm.scatter(None, ODD),
    "alltoall": lambda comm: comm.alltoall([unpicklable(RANK)] * SIZE),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_sent_is_an_error_on_all_ranks(comm: Comm, name: str) -> None:
    with pytest.raises(Exception) as caught:  # pickle raises what it likes
        CALLS[name](comm)
    if RANK != ODD:
        assert type(caught.value) is ValueError
        assert f"got none from rank {ODD}" in str(caught.value)
    elif name in ("too few", "nothing"):
        assert str(caught.value).startswith(f"sendobj: expected {SIZE} objects, one for each rank, got ")
    else:
        assert "pickle" in str(caught.value)
    assert comm.allgather(RANK) == list(range(SIZE))


@pytest.mark.skipif(SIZE == 1, reason="needs another rank")
def test_different_calls_are_a_mismatch(comm: Comm) -> None:
    def odd() -> None:
        comm.bcast(1, 0)
        comm.barrier()

    with pytest.raises(MismatchError, match=r"Allgather\(.*Bcast\(|Bcast\(.*Allgather\("):
        odd() if RANK == ODD else comm.allgather(1)
