"""Allreduce over several nodes, which one machine pretends to be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from mpicoll.kernels.reduce import DTYPES, OPERATIONS, supports

import mpicoll
from mpicoll import algorithms, tuning
from mpicoll import communicator as communicators
from mpicoll.faults import RankFailedError
from mpicoll.transports import hierarchical, shared
from mpicoll.transports.arena import Arena, ArenaError, new_array
from mpicoll.transports.program import Pipeline

from .examples import EXAMPLES, Array, data, total
from .test_operations import contribution, reference

pytestmark = pytest.mark.algorithms

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
KIB = 1024
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALVES = [np.dtype(np.float16), BFLOAT16]

# Which node each rank is on: (ranks of the first node, of the second, ...), or one number a rank.
PAIRS = tuple(rank // 2 for rank in range(SIZE))
TWO = tuple(int(rank >= (SIZE + 1) // 2) for rank in range(SIZE))  # two nodes, as even as can be
IN_TURN = tuple(rank % 2 for rank in range(SIZE))  # two nodes, neighbours on different ones
LONELY = (0,) * (SIZE - 1) + (1,)  # the last rank is alone: one slice
UNEVEN = ((0,) * min(3, SIZE - 1) + (1,) + (2,) * SIZE)[:SIZE]  # 3 + 1 + the rest, if there are so many
LAYOUTS = {"pairs": PAIRS, "two": TWO, "in turn": IN_TURN, "lonely": LONELY, "uneven": UNEVEN}


def has_several_nodes(layout: Sequence[int]) -> bool:
    """Also such as have several ranks: otherwise there is nothing to do in memory."""
    return 1 < len(set(layout)) < SIZE


USEFUL = [name for name, layout in LAYOUTS.items() if has_several_nodes(layout)]
needs_nodes = pytest.mark.skipif(SIZE < 3, reason="needs two nodes, one of them of two ranks")


def slices(layout: Sequence[int]) -> int:
    return min(layout.count(node) for node in set(layout))


@contextmanager
def pretending(layout: Sequence[int]) -> Iterator[None]:
    """Communicators of all ranks that are made meanwhile see these nodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hierarchical, "node_of", lambda comm: MPI.Intracomm(comm.Split(layout[RANK])))
        # They share the cores of one machine: polling for long would keep the others from working.
        patch.setattr(communicators, "count_cores", lambda node: 0)
        yield


def communicator(layout: Sequence[int], **more: Any) -> mpicoll.Communicator:
    with pretending(layout):
        return mpicoll.Communicator(WORLD, **more)


@cache
def lasting(name: str) -> mpicoll.Communicator:
    """One for all tests that leave it as it was."""
    return communicator(LAYOUTS[name])


def empty(count: int, dtype: Any, in_arena: bool) -> Array:
    return new_array(count, dtype) if in_arena else np.empty(count, dtype)


def check(comm: mpicoll.Communicator, count: int, salt: int, **named: Any) -> None:
    """In place or not, in either kind of memory; the second time, the call is recognised as a repetition."""
    for in_place, in_arena in itertools.product((False, True), (False, True)):
        recv = empty(count, np.int64, in_arena)
        send = recv if in_place else empty(count, np.int64, in_arena)
        for again in range(2):
            recv[:] = -7
            send[:] = data(RANK, count, salt + again)
            comm.Allreduce(MPI.IN_PLACE if in_place else send, recv, **named)
            about = f"{count=}, {in_place=}, {in_arena=}, {again=}, {named}, {RANK=}"
            if not in_place:
                np.testing.assert_array_equal(send, data(RANK, count, salt + again), f"input; {about}")
                send[:] = 77  # what a caller may do at once, when others may still be in their calls
            np.testing.assert_array_equal(recv, total(SIZE, count, salt + again), about)


@needs_nodes
@pytest.mark.parametrize("name", USEFUL)
def test_every_count(name: str) -> None:
    comm, nslices = lasting(name), slices(LAYOUTS[name])
    around = {0, 1, nslices - 1, nslices, nslices + 1}
    for salt, count in enumerate(sorted(around | {n * 8 for n in around} | {37, 1003, 5001})):
        check(comm, count, salt, algorithm="hierarchical")


@needs_nodes
@pytest.mark.parametrize("name", USEFUL)
def test_large(name: str) -> None:
    """Several pieces in the channel, several segments in messages, and inputs read where they lie."""
    for salt, count in enumerate((100_003,)):
        check(lasting(name), count, salt)


@needs_nodes
def test_many_small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = tuning.sizes
    monkeypatch.setattr(tuning, "pipeline", lambda *args: Pipeline(512))
    narrow: dict[str, Any] = {"slot": 2048, "ring": 5 * 2048, "quiet": 256, "far": 1024, "large": 64}
    monkeypatch.setattr(tuning, "sizes", lambda *args: sizes(*args)._replace(**narrow))
    for layout in (TWO, UNEVEN, LONELY):
        with communicator(layout) as comm:
            for salt, count in enumerate((5, 700, 3001)):
                check(comm, count, salt, algorithm="hierarchical")


# -- operations and dtypes


@needs_nodes
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_on_every_dtype(op: str) -> None:
    for dtype in sorted((dtype for dtype in DTYPES if supports(op, dtype)), key=str):
        for name, count in zip(("two", "lonely"), (3, 301), strict=True):
            wanted = reference(op, dtype, count)
            send, recv = contribution(dtype, RANK, op, count), np.zeros(count, dtype)
            lasting(name).Allreduce(send, recv, getattr(MPI, op), algorithm="hierarchical")
            np.testing.assert_array_equal(recv, wanted, f"{op} {dtype} {count}")
            lasting(name).Allreduce(MPI.IN_PLACE, send, getattr(MPI, op), algorithm="hierarchical")
            np.testing.assert_array_equal(send, wanted, f"in place {op} {dtype} {count}")


@needs_nodes
@pytest.mark.parametrize("dtype", sorted((d for d in DTYPES if d.kind in "fcV"), key=str), ids=str)
def test_average(dtype: np.dtype[Any]) -> None:
    """Over all ranks, and once: not over those of a node, and of a slice."""
    wide = np.complex128 if dtype.kind == "c" else np.longdouble if dtype == np.longdouble else np.float64
    tolerance = 2 * float(ml_dtypes.finfo(np.zeros(1, dtype).real.dtype).eps)
    for name, count in itertools.product(USEFUL, (3, 301)):
        send, recv = contribution(dtype, RANK, "SUM", count), np.zeros(count, dtype)
        wanted = reference("SUM", np.dtype(wide), count) / SIZE
        for buffers in ((send, recv), (send, recv), (MPI.IN_PLACE, send)):
            lasting(name).Allreduce(*buffers, mpicoll.AVG, algorithm="hierarchical")
            result = buffers[1].astype(wide)
            np.testing.assert_allclose(result, wanted, rtol=tolerance, atol=tolerance / 8)


@needs_nodes
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_floats_are_rounded_once(dtype: np.dtype[Any]) -> None:
    """256 + 1 + 1 + ... never leaves 256 in bfloat16 if each sum is rounded, nor does 2048 in float16."""
    large = 256.0 if dtype == BFLOAT16 else 2048.0
    for name, count, op in itertools.product(USEFUL, (3, 5000), (MPI.SUM, mpicoll.AVG)):
        send, recv = np.full(count, large if RANK == 0 else 1.0).astype(dtype), np.zeros(count, dtype)
        lasting(name).Allreduce(send, recv, op, algorithm="hierarchical")
        exact = np.float64(large + SIZE - 1) / (SIZE if op is mpicoll.AVG else 1)
        assert recv.tobytes() == np.full(count, exact).astype(dtype).tobytes(), (name, count, op)


@needs_nodes
@pytest.mark.parametrize("name", USEFUL)
def test_every_rank_gets_the_same_bits(name: str) -> None:
    """Also where the order of addition matters."""
    generator = np.random.default_rng(RANK)
    for count in (1, 70, 5000, 60_000):
        send = generator.standard_normal(count) * 10.0 ** generator.integers(-6, 6, count)
        recv, again = np.empty(count), np.empty(count)
        lasting(name).Allreduce(send, recv, algorithm="hierarchical")
        lasting(name).Allreduce(send, again, algorithm="hierarchical")
        assert recv.tobytes() == again.tobytes()
        assert len(set(WORLD.allgather(recv.tobytes()))) == 1, count


# -- which calls


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The counts of elements that plans have been made for."""
    counts: list[int] = []
    make = hierarchical.Hierarchy.allreduce_plan

    def recording(self: Any, operation: str, dtype: Any, count: int) -> Any:
        counts.append(count)
        return make(self, operation, dtype, count)

    monkeypatch.setattr(hierarchical.Hierarchy, "allreduce_plan", recording)
    return counts


@needs_nodes
def test_auto_takes_it_from_a_few_kib_on(made: list[int]) -> None:
    with communicator(TWO) as comm:
        for count in (1, 1023, 1024, 5000):
            check(comm, count, 0)
        check(comm, 5001, 0, algorithm="ring")
    assert set(made) == {1024, 5000}


@needs_nodes
def test_the_communicators_algorithm(made: list[int]) -> None:
    with communicator(TWO, transport="messages") as comm:
        check(comm, 5000, 0)
    with communicator(TWO, algorithm="ring") as comm:
        check(comm, 5000, 0)
    assert not made
    with communicator(TWO, algorithm="hierarchical") as comm:
        for method in EXAMPLES:
            example = EXAMPLES[method](comm, 5, SIZE - 1, False)
            example.fill(1)
            getattr(comm, method)(*example.args)
            example.check(1, method)
    assert made == [5]  # the one of Allreduce


@needs_nodes
def test_between_two_nodes_and_between_more(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, int]] = []
    schedule = algorithms.schedule

    def recording(collective: str, algorithm: str, nranks: int, *more: int) -> Any:
        used.append((algorithm, nranks))
        return schedule(collective, algorithm, nranks, *more)

    monkeypatch.setattr(algorithms, "schedule", recording)
    for layout in {TWO, PAIRS, UNEVEN, LONELY}:
        used.clear()
        with communicator(layout) as comm:
            comm.Allreduce(np.zeros(3000), np.zeros(3000), algorithm="hierarchical")
        nnodes, mates = len(set(layout)), [r for r in range(RANK) if layout[r] == layout[RANK]]
        name = tuning.choose("allreduce", 2, 8 * 3000 // slices(layout)) if nnodes == 2 else "ring"
        assert used == ([(name, nnodes)] if len(mates) < slices(layout) else [])


@needs_nodes
@pytest.mark.parametrize("name", ["two", "uneven"])
def test_persistent_calls(name: str) -> None:
    comm = lasting(name)
    for count in (0, 37, 5000):
        send, recv, own = (np.empty(count, np.int64) for _ in range(3))
        halves = np.full(count, 256.0 if RANK == 0 else 1.0).astype(BFLOAT16)
        sums = np.zeros(count, BFLOAT16)
        plans = [
            comm.Allreduce_init(send, recv, algorithm="hierarchical"),
            comm.Allreduce_init(MPI.IN_PLACE, own, algorithm="hierarchical"),
            comm.Allreduce_init(halves, sums, algorithm="hierarchical"),
        ]
        for salt in range(3):
            send[:], own[:] = data(RANK, count, salt), data(RANK, count, salt + 7)
            sums[:] = 0
            started = plans[salt:] + plans[:salt]  # calls of other kinds may come in between
            type(plans[0]).Startall(started)
            check(comm, 300, salt, algorithm="hierarchical")
            type(plans[0]).Waitall(plans)
            np.testing.assert_array_equal(recv, total(SIZE, count, salt))
            np.testing.assert_array_equal(own, total(SIZE, count, salt + 7))
            assert (sums == np.array(256.0 + SIZE - 1).astype(BFLOAT16)).all()
        for plan in plans:
            plan.Free()


@needs_nodes
def test_nonblocking_calls_send_messages(made: list[int]) -> None:
    for algorithm in ("auto", "hierarchical"):
        with communicator(TWO, algorithm=algorithm) as comm:
            recv = np.empty(5000, np.int64)
            request = comm.Iallreduce(data(RANK, 5000), recv)
            check(comm, 3000, 1)
            request.Wait()
            np.testing.assert_array_equal(recv, total(SIZE, 5000))
            with pytest.raises(
                ValueError, match="got hierarchical, but nonblocking calls only send messages"
            ):
                comm.Iallreduce(data(RANK, 5000), recv, algorithm="hierarchical")
    assert set(made) == {3000}


@needs_nodes
def test_communicators_in_turn() -> None:
    """Two of all ranks, with other nodes, and one of some ranks."""
    layouts = [LAYOUTS[name] for name in USEFUL[:2]] * 2
    comms = [communicator(layout) for layout in layouts[:2]]
    for salt, comm in enumerate(comms * 3):
        check(comm, 1500 + salt, salt)
    with pretending(PAIRS), comms[0].Split(RANK == SIZE - 1) as part, comms[1].Dup() as duplicate:
        check(duplicate, 2000, 1)
        recv = np.empty(3000, np.int64)
        part.Allreduce(data(part.rank, 3000), recv)
        np.testing.assert_array_equal(recv, total(part.size, 3000))
    for comm in comms:
        comm.Free()


# -- where there is none


@pytest.mark.parametrize(
    ("layout", "transport", "reason"),
    [
        ((0,) * SIZE, "auto", "all ranks are on one node"),
        ((0,) * SIZE, "shared", "all ranks are on one node"),
        (TWO, "messages", "the communicator was made with transport='messages'"),
        (tuple(range(SIZE)), "auto", "every rank is on a node of its own"),
    ],
)
def test_why_there_is_no_hierarchy(layout: tuple[int, ...], transport: str, reason: str) -> None:
    if len(set(layout)) == 1:
        reason = "all ranks are on one node" if transport != "messages" else reason
    with communicator(layout, transport=transport) as comm:
        with pytest.raises(ValueError, match=rf"algorithm: .*, got hierarchical, but {reason}"):
            comm.Allreduce(np.zeros(3), np.zeros(3), algorithm="hierarchical")
        check(comm, 3000, 0)
        with pytest.raises(ValueError, match=r"algorithm: .* for broadcast, got 'hierarchical'"):
            comm.Bcast(np.zeros(3), algorithm="hierarchical")


@needs_nodes
def test_transport_in_words() -> None:
    for layout in (TWO, UNEVEN):
        with communicator(layout) as comm:
            nodes = f"shared memory on {len(set(layout))} nodes, messages between"
            assert comm.transport == f"hierarchical: {nodes}; all but large allreduces in messages only"
    with communicator((0,) * SIZE) as comm:
        reads = "yes" if comm._channel is not None and comm._channel.reads_foreign_memory else "no"
        assert (
            comm.transport == f"shared memory (memory files; other ranks' memory is read directly: {reads})"
        )
    with communicator(range(SIZE)) as comm:
        assert comm.transport == "messages, because every rank is on a node of its own"
    with communicator(TWO, transport="messages") as comm:
        assert comm.transport == "messages, because the communicator was made with transport='messages'"
    with pytest.raises(RuntimeError, match="got shared, but the ranks are on several nodes"):
        communicator(TWO, transport="shared")


def refuse(*args: Any, **more: Any) -> Any:
    raise MemoryError("no memory today")


@needs_nodes
def test_all_send_messages_where_one_node_cannot_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    if RANK == SIZE - 1:
        monkeypatch.setattr(Arena, "take", refuse)
    comm = communicator(TWO)
    monkeypatch.undo()
    first, place = TWO.index(1), TWO.count(1) - 1
    reason = f"on the node of rank {first}, rank {place}: no memory today"
    assert comm.transport == f"messages, because {reason}"
    with comm, pytest.raises(ValueError, match=f"got hierarchical, but {reason}"):
        comm.Allreduce(np.zeros(3), np.zeros(3), algorithm="hierarchical")
    with communicator(TWO) as comm:
        check(comm, 3000, 0)


@needs_nodes
def test_no_persistent_call_where_one_node_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with communicator(TWO) as comm:
        recv = np.empty(3000, np.int64)
        comm.Allreduce(data(RANK, 3000), recv)
        if RANK == SIZE - 1:
            monkeypatch.setattr(shared, "own_arena", refuse)
        with pytest.raises(ArenaError, match="no memory today"):
            comm.Allreduce_init(data(RANK, 3000), recv)
        monkeypatch.undo()
        plan = comm.Allreduce_init(data(RANK, 3000), recv)
        recv[:] = 0
        plan.Start()
        plan.Wait()
        np.testing.assert_array_equal(recv, total(SIZE, 3000))


@needs_nodes
def test_slices_may_lie_in_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some ranks, those whose arena is full."""
    if RANK % 3 == 1:
        monkeypatch.setattr(hierarchical, "new_array", refuse)
    for layout in (TWO, UNEVEN):
        with communicator(layout) as comm:
            for count in (37, 5000, 100_003):
                check(comm, count, 0, algorithm="hierarchical")


# -- when something goes wrong


@needs_nodes
@pytest.mark.parametrize("name", ["lonely", "two"])
def test_a_rank_that_leaves_is_noticed_on_its_node(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the others wait for its slice, or for messages from another node, which does not send any."""

    def leave(self: hierarchical.HierarchicalPlan, patience: int) -> bool:
        raise KeyboardInterrupt

    layout, values = LAYOUTS[name], np.zeros(100)
    with communicator(layout) as comm:
        another = communicator(layout)
        if RANK == 0:
            monkeypatch.setattr(hierarchical.HierarchicalPlan, "_advance_across", leave)
            with pytest.raises(KeyboardInterrupt):
                another.Allreduce(MPI.IN_PLACE, values, algorithm="hierarchical")
            monkeypatch.undo()
        elif layout[RANK] == 0:
            with pytest.raises(RankFailedError, match=r"rank 0 .*: KeyboardInterrupt"):
                another.Allreduce(MPI.IN_PLACE, values, algorithm="hierarchical")
        check(comm, 3000, 0)


@needs_nodes
def test_communicators_leave_nothing() -> None:
    before = len(shared._in_use)
    for salt in range(3):
        with communicator(TWO) as comm:
            check(comm, 1500, salt)
            plan = comm.Allreduce_init(np.zeros(3000), np.zeros(3000))
            plan.Free()
    assert len(shared._in_use) == before
