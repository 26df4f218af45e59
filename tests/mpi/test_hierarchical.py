"""Collectives over several nodes, which one machine pretends to be."""

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
from mpicoll.kernels.tasks import PENDING

import mpicoll
from mpicoll import algorithms, tuning
from mpicoll import communicator as communicators
from mpicoll.faults import RankFailedError
from mpicoll.transports import hierarchical, lanes, shared
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
        made = mpicoll.Communicator(WORLD, **more)
    WORLD.Barrier()  # or a rank that leaves it at once is an error for those that still make it
    return made


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
    """Several pieces, several segments in messages, and inputs read where they lie."""
    check(lasting(name), 300_007, 0)
    check_others(lasting(name), 70_001, 1)


def make_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Communicators that are made from now on cut everything up."""
    sizes = tuning.sizes
    monkeypatch.setattr(tuning, "EAGER", Pipeline(512, lookahead=2, early=2))
    monkeypatch.setattr(tuning, "piece", lambda nranks: 1600)
    monkeypatch.setattr(tuning, "one_slice_pays", lambda nbytes: nbytes < 100)
    narrow: dict[str, Any] = {"slot": 2048, "ring": 5 * 2048, "quiet": 256, "far": 1024, "large": 64}
    monkeypatch.setattr(tuning, "sizes", lambda *args: sizes(*args)._replace(**narrow))


@needs_nodes
def test_many_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    make_narrow(monkeypatch)
    for layout in {TWO, UNEVEN, LONELY, IN_TURN}:
        with communicator(layout) as comm:
            for salt, count in enumerate((5, 700, 3001)):
                check(comm, count, salt, algorithm="hierarchical")
                check_others(comm, count, salt)


# -- the other collectives


def counts_of(count: int) -> list[int]:
    """A block for each rank, of uneven size, some empty."""
    return [0 if rank % 4 == 1 else count + rank for rank in range(SIZE)]


def check_others(comm: mpicoll.Communicator, count: int, salt: int, in_arena: bool = False) -> None:
    """All but allreduce, with blocks of this size and of others, from several roots, in place and not."""
    for again in range(2):
        check_reduce_scatter(comm, count, salt + again, in_arena)
        check_allgather(comm, count, salt + again, in_arena)
        for root in {0, SIZE - 1, (salt + again) % SIZE}:
            check_broadcast(comm, count, salt + again, root, in_arena)


def check_reduce_scatter(comm: mpicoll.Communicator, count: int, salt: int, in_arena: bool) -> None:
    named = {"algorithm": "hierarchical"}
    whole, mine = count * SIZE, slice(count * RANK, count * (RANK + 1))
    send, recv = empty(whole, np.int64, in_arena), empty(count, np.int64, in_arena)
    send[:], recv[:] = data(RANK, whole, salt), -7
    comm.Reduce_scatter_block(send, recv, **named)
    np.testing.assert_array_equal(recv, total(SIZE, whole, salt)[mine])
    np.testing.assert_array_equal(send, data(RANK, whole, salt))
    comm.Reduce_scatter_block(MPI.IN_PLACE, send, **named)
    np.testing.assert_array_equal(send[:count], recv)
    counts = counts_of(count)
    begin = sum(counts[:RANK])
    send, recv = data(RANK, sum(counts), salt), np.full(counts[RANK], -7)
    comm.Reduce_scatter(send, recv, counts, **named)
    wanted = total(SIZE, sum(counts), salt)[begin : begin + counts[RANK]]
    np.testing.assert_array_equal(recv, wanted)


def check_allgather(comm: mpicoll.Communicator, count: int, salt: int, in_arena: bool) -> None:
    named = {"algorithm": "hierarchical"}
    send, recv = empty(count, np.int64, in_arena), empty(count * SIZE, np.int64, in_arena)
    send[:], recv[:] = data(RANK, count, salt), -7
    wanted = np.concatenate([data(rank, count, salt) for rank in range(SIZE)])
    comm.Allgather(send, recv, **named)
    np.testing.assert_array_equal(recv, wanted)
    recv[:] = -7
    recv[count * RANK : count * (RANK + 1)] = send
    comm.Allgather(MPI.IN_PLACE, recv, **named)
    np.testing.assert_array_equal(recv, wanted)
    counts = counts_of(count)
    begins = [sum(counts[rank + 1 :]) + 3 * (SIZE - rank) for rank in range(SIZE)]  # backwards, with gaps
    recv = np.full(sum(counts) + 3 * SIZE, -7)
    wanted = recv.copy()
    for rank, (begin, length) in enumerate(zip(begins, counts, strict=True)):
        wanted[begin : begin + length] = data(rank, length, salt)
    comm.Allgatherv(data(RANK, counts[RANK], salt), [recv, counts, begins, MPI.INT64_T], **named)
    np.testing.assert_array_equal(recv, wanted)


def check_broadcast(comm: mpicoll.Communicator, count: int, salt: int, root: int, in_arena: bool) -> None:
    buffer = empty(count, np.int64, in_arena)
    buffer[:] = data(root, count, salt) if root == RANK else -7
    comm.Bcast(buffer, root, algorithm="hierarchical")
    np.testing.assert_array_equal(buffer, data(root, count, salt), f"{count=} {root=}")


@needs_nodes
@pytest.mark.parametrize("name", USEFUL)
def test_every_count_of_the_others(name: str) -> None:
    for salt, count in enumerate((0, 1, 2, SIZE, 333, 2049)):
        check_others(lasting(name), count, salt, in_arena=salt % 2 == 1)


@needs_nodes
def test_every_root() -> None:
    for name, root in itertools.product(USEFUL, range(SIZE)):
        check_broadcast(lasting(name), 77, root, root, False)


@needs_nodes
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), *HALVES], ids=str)
def test_average_in_blocks(dtype: np.dtype[Any]) -> None:
    """Once, over all ranks; and 16-bit floats are rounded once."""
    for name, count in itertools.product(USEFUL, (1, 300)):
        send = np.full(count * SIZE, 256.0 if RANK == 0 else 1.0).astype(dtype)
        recv = np.zeros(count, dtype)
        lasting(name).Reduce_scatter_block(send, recv, mpicoll.AVG, algorithm="hierarchical")
        wanted = np.full(count, (256.0 + SIZE - 1) / SIZE).astype(dtype)
        np.testing.assert_allclose(recv.astype("f8"), wanted.astype("f8"), rtol=1e-6)


@needs_nodes
@pytest.mark.parametrize("op", ["PROD", "MAX", "BXOR"])
def test_operations_in_blocks(op: str) -> None:
    for name in USEFUL:
        send = contribution(np.dtype(np.int32), RANK, op, 5 * SIZE)
        recv = np.zeros(5, np.int32)
        lasting(name).Reduce_scatter_block(send, recv, getattr(MPI, op), algorithm="hierarchical")
        wanted = reference(op, np.dtype(np.int32), 5 * SIZE)[5 * RANK : 5 * RANK + 5]
        np.testing.assert_array_equal(recv, wanted)


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
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The collectives, and numbers of elements or bytes, that plans have been made for."""
    found: list[tuple[str, int]] = []
    for collective in hierarchical.COLLECTIVES:
        monkeypatch.setattr(hierarchical.Hierarchy, f"{collective}_plan", recording(collective, found))
    return found


def recording(collective: str, found: list[tuple[str, int]]) -> Any:
    make = getattr(hierarchical.Hierarchy, f"{collective}_plan")

    def method(self: Any, *args: Any) -> Any:
        size = {"allreduce": 2, "reduce_scatter": 2}.get(collective, 0)
        found.append((collective, int(np.sum(args[size]))))
        return make(self, *args)

    return method


@needs_nodes
def test_auto_takes_it_where_it_pays(made: list[tuple[str, int]]) -> None:
    with communicator(TWO) as comm:
        for count in (0, 1, 5000):
            check(comm, count, 0)
        check(comm, 5001, 0, algorithm="ring")
        blocks = np.zeros(SIZE * 3000)
        for count in (10, 3000):
            comm.Bcast(blocks[: count * SIZE])
            comm.Allgather(np.zeros(count), blocks[: count * SIZE])
            comm.Reduce_scatter_block(blocks[: count * SIZE], np.zeros(count))
            comm.Reduce(blocks, blocks.copy() if RANK == 0 else None)
    whole = SIZE * 3000
    others = {("broadcast", whole * 8), ("allgather", whole * 8), ("reduce_scatter", whole)}
    assert set(made) == {("allreduce", 1), ("allreduce", 5000)} | others


@needs_nodes
def test_the_communicators_algorithm(made: list[tuple[str, int]]) -> None:
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
    assert {collective for collective, _ in made} == set(hierarchical.COLLECTIVES)


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
            made = used.copy()
        nnodes = len(set(layout))
        name = tuning.choose("allreduce", nnodes, 8 * 3000 // slices(layout), network=True)
        assert made == [(name, nnodes)]


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
@pytest.mark.parametrize("name", ["two", "uneven"])
def test_persistent_calls_of_the_others(name: str) -> None:
    comm, named = lasting(name), {"algorithm": "hierarchical"}
    for count in (0, 37, 5000):
        vector, part, copied = (
            np.empty(count * SIZE, np.int64),
            np.empty(count, np.int64),
            np.empty(count, np.int64),
        )
        gathered = np.empty(count * SIZE, np.int64)
        plans = [
            comm.Reduce_scatter_block_init(vector, part, **named),
            comm.Allgather_init(part, gathered, **named),
            comm.Bcast_init(copied, SIZE - 1, **named),
        ]
        for salt in range(3):
            vector[:], gathered[:] = data(RANK, count * SIZE, salt), -7
            copied[:] = data(RANK, count, salt)
            for plan in plans:
                plan.Start()
                plan.Wait()
            np.testing.assert_array_equal(gathered, total(SIZE, count * SIZE, salt))
            np.testing.assert_array_equal(copied, data(SIZE - 1, count, salt))
        for plan in plans:
            plan.Free()


@needs_nodes
def test_nonblocking_calls_send_messages(made: list[tuple[str, int]]) -> None:
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
    assert set(made) == {("allreduce", 3000)}


@needs_nodes
def test_communicators_in_turn() -> None:
    """Two of all ranks, with other nodes, and one of some ranks."""
    layouts = [LAYOUTS[name] for name in USEFUL[:2]] * 2
    comms = [communicator(layout) for layout in layouts[:2]]
    for salt, comm in enumerate(comms * 3):
        check(comm, 1500 + salt, salt)
        check_others(comm, 40 + salt, salt)
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
        with pytest.raises(ValueError, match=r"algorithm: .* for alltoall, got 'hierarchical'"):
            comm.Alltoall(np.zeros(SIZE), np.zeros(SIZE), algorithm="hierarchical")


@needs_nodes
def test_transport_in_words() -> None:
    for layout in (TWO, UNEVEN):
        with communicator(layout) as comm:
            nodes = f"shared memory on {len(set(layout))} nodes, messages between"
            assert comm.transport == f"hierarchical: {nodes}"
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

    def leave(address: int, patience: int) -> int:
        assert advance(address, 0) == PENDING  # its node's sum is under way
        raise KeyboardInterrupt

    advance = lanes.advance
    layout, values = LAYOUTS[name], np.zeros(100)
    with communicator(layout) as comm:
        another = communicator(layout)
        if RANK == 0:
            monkeypatch.setattr(lanes, "advance", leave)
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
