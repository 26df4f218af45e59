"""Every algorithm of every collective on real messages: all roots, odd counts, in place or not."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll import algorithms, tuning
from mpicoll.transports.program import Pipeline
from tests.unit.reference import AT_SCALE

from .examples import EXAMPLES, everyday, in_place_or_not, roots

pytestmark = pytest.mark.algorithms

METHODS = {
    "allreduce": ["Allreduce"],
    "reduce": ["Reduce"],
    "reduce_scatter": ["Reduce_scatter_block", "Reduce_scatter"],
    "broadcast": ["Bcast"],
    "gather": ["Gather", "Gatherv"],
    "scatter": ["Scatter", "Scatterv"],
    "allgather": ["Allgather", "Allgatherv"],
    "alltoall": ["Alltoall", "Alltoallv"],
}
# Where only sender and receiver know a block's size, no rank can pass on another's.
ONLY_DIRECTLY = {"Gatherv": "direct", "Scatterv": "direct", "Alltoallv": "pairwise"}
CASES = [
    (method, name)
    for collective, methods in METHODS.items()
    for method in methods
    for name in ("auto", *everyday(collective))
    if name in ("auto", ONLY_DIRECTLY.get(method, name))
]
CASES_AT_SCALE = [
    (methods[0], names)
    for collective, methods in METHODS.items()
    if (names := [name for name in algorithms.names(collective) if name in AT_SCALE])
]
SEGMENT = 512  # bytes: small, so that few elements make many segments
LARGE = 1003  # elements: 16 segments of 8-byte elements


def communicator() -> Iterator[mpicoll.Communicator]:
    with mpicoll.Communicator(MPI.COMM_WORLD) as comm:
        yield comm


whole = pytest.fixture(communicator, name="whole")


@pytest.fixture
def segmented(monkeypatch: pytest.MonkeyPatch) -> Iterator[mpicoll.Communicator]:
    """A communicator whose messages are cut into many small segments."""
    monkeypatch.setattr(tuning, "pipeline", lambda *args: Pipeline(SEGMENT))
    yield from communicator()


def check(comm: mpicoll.Communicator, method: str, name: str, count: int, salt: int) -> None:
    for root in roots(method, comm.size):
        for in_place in in_place_or_not(method):
            example = EXAMPLES[method](comm, count, root, in_place)
            example.fill(salt)
            getattr(comm, method)(*example.args, algorithm=name)
            example.check(salt, f"{method} by {name}, {count=}, {root=}, {in_place=}, {comm.rank=}")


@pytest.mark.parametrize(("method", "name"), CASES)
def test_results(whole: mpicoll.Communicator, method: str, name: str) -> None:
    nranks = whole.size
    for salt, count in enumerate(sorted({0, 1, nranks - 1, nranks, nranks + 1, 37})):
        check(whole, method, name, count, salt)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_results_in_many_segments(segmented: mpicoll.Communicator, method: str, name: str) -> None:
    check(segmented, method, name, LARGE, salt=3)


@pytest.mark.parametrize(("method", "names"), CASES_AT_SCALE)
def test_results_of_algorithms_for_many_ranks(
    segmented: mpicoll.Communicator, method: str, names: list[str]
) -> None:
    """Some chunks empty; and in many segments."""
    for salt, (name, count) in enumerate(itertools.product(names, (segmented.size - 1, LARGE))):
        check(segmented, method, name, count, salt)


@pytest.mark.parametrize("method", [method for methods in METHODS.values() for method in methods])
def test_large_messages(whole: mpicoll.Communicator, method: str) -> None:
    """Several segments of the size that is really used, beyond what MPI sends eagerly."""
    example = EXAMPLES[method](whole, 150_001, whole.size - 1, False)
    example.fill(1)
    getattr(whole, method)(*example.args)
    example.check(1)


def test_ranks_that_send_much_and_little_agree_on_segments() -> None:
    """Where blocks are uneven no rank knows how much there is in all."""
    with mpicoll.Communicator(MPI.COMM_WORLD, transport="messages") as comm:
        much, little = 17 << 20, 1 << 20  # bytes; the first is beyond where two ranks' segments change
        block = {0: much, comm.size - 1: 0}
        counts = [
            [block.get(i, little) if i == j else little for j in range(comm.size)] for i in range(comm.size)
        ]
        sent = np.concatenate(
            [np.full(n, 10 * comm.rank + j, np.uint8) for j, n in enumerate(counts[comm.rank])]
        )
        received = [row[comm.rank] for row in counts]
        found = np.zeros(sum(received), np.uint8)
        comm.Alltoallv([sent, counts[comm.rank]], [found, received])
        expected = [np.full(n, 10 * i + comm.rank, np.uint8) for i, n in enumerate(received)]
        np.testing.assert_array_equal(found, np.concatenate(expected))


@pytest.mark.parametrize("name", ["auto", *algorithms.names("barrier")])
def test_nobody_leaves_a_barrier_before_all_have_come(whole: mpicoll.Communicator, name: str) -> None:
    whole.Barrier(algorithm=name)
    for late in range(whole.size):
        if whole.rank == late:
            time.sleep(0.02)
        entered = time.clock_gettime(time.CLOCK_MONOTONIC)  # one clock for all processes of a machine
        whole.Barrier(algorithm=name)
        left = time.clock_gettime(time.CLOCK_MONOTONIC)
        assert left >= max(MPI.COMM_WORLD.allgather(entered))


@pytest.mark.parametrize("name", everyday("allreduce"))
def test_every_rank_gets_the_same_bits(whole: mpicoll.Communicator, name: str) -> None:
    """Also where the order of addition matters."""
    random = np.random.default_rng(whole.rank)
    for count in (1, 5, 3001):
        send = random.standard_normal(count) * 10.0 ** random.integers(-6, 6, count)
        recv = np.empty(count)
        whole.Allreduce(send, recv, algorithm=name)
        assert len(set(MPI.COMM_WORLD.allgather(recv.tobytes()))) == 1
        again = np.empty(count)
        whole.Allreduce(send, again, algorithm=name)
        assert recv.tobytes() == again.tobytes()


@pytest.mark.parametrize("method", [method for methods in METHODS.values() for method in methods])
def test_on_parts_of_the_ranks(whole: mpicoll.Communicator, method: str) -> None:
    """In both halves at once, ranks in reverse order."""
    with whole.Split(color=whole.rank % 2, key=-whole.rank) as part:
        check(part, method, "auto", 37, salt=whole.rank % 2)


def test_the_communicators_algorithm_is_used_where_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, str]] = []
    schedule = algorithms.schedule

    def recording(collective: str, algorithm: str, *args: int) -> object:
        if collective != "barrier":  # with which a communicator is freed
            used.append((collective, algorithm))
        return schedule(collective, algorithm, *args)

    monkeypatch.setattr(algorithms, "schedule", recording)
    with mpicoll.Communicator(MPI.COMM_WORLD, algorithm="double_tree", transport="messages") as comm:
        x, y = np.arange(4.0), np.empty(4)
        comm.Allreduce(x, y)
        comm.Bcast(x)
        comm.Allgather(x, np.empty(4 * comm.size))
        comm.Allreduce(x, y, algorithm="ring")
        with comm.Dup() as duplicate:
            duplicate.Reduce(x, y)
    assert used[:2] == [("allreduce", "double_tree"), ("broadcast", "double_tree")]
    assert used[2][0] == "allgather"
    assert used[3:] == [("allreduce", "ring"), ("reduce", "double_tree")]
