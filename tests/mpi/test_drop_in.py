"""A program that used MPI.COMM_WORLD gives the same answers with a Communicator in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

import mpicoll

from .examples import EXAMPLES, ROOTED, data, total

WORLD = MPI.COMM_WORLD
COMM = mpicoll.Communicator(WORLD)
RANK, SIZE = WORLD.rank, WORLD.size
DTYPES = ["i1", "u2", "i4", "i8", "f4", "f8", "c8", "c16"]
OPERATIONS = ["SUM", "PROD", "MIN", "MAX", "BAND", "BOR", "BXOR", "LAND", "LOR", "LXOR"]
Program = Callable[[MPI.Intracomm], object]


def same_answers(program: Program) -> None:
    """What ``program`` returns with MPI's communicator it returns with ours."""
    np.testing.assert_equal(program(COMM), program(WORLD))


def numbers(dtype: str, count: int, salt: int) -> Any:
    """Whole numbers from 0 to 4, different on each rank, so that neither order nor rounding matters."""
    return ((np.arange(count) * 3 + RANK * 7 + salt) % 5).astype(dtype)


# Drawn on every rank alike: the profile in tests/conftest.py takes no random seed.


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(sorted(EXAMPLES)), min_size=1, max_size=6),
    st.integers(0, 3000),
    st.integers(0, SIZE - 1),
    st.booleans(),
)
def test_any_sequence_of_collectives(methods: list[str], count: int, root: int, in_place: bool) -> None:
    def program(comm: MPI.Intracomm) -> None:
        for salt, method in enumerate(methods):
            aliased = in_place and method not in ("Bcast", "Barrier")
            example = EXAMPLES[method](comm, count, root if method in ROOTED else 0, aliased)
            example.fill(salt)
            getattr(comm, method)(*example.args)
            example.check(salt, f"{method} {type(comm).__name__}")

    program(WORLD)
    program(COMM)


@settings(max_examples=60)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(OPERATIONS),
    st.integers(0, 700),
    st.integers(0, SIZE - 1),
    st.integers(0, 9),
)
def test_reductions(dtype: str, op: str, count: int, root: int, salt: int) -> None:
    allowed = {"f": OPERATIONS[:4], "c": OPERATIONS[:2]}.get(dtype[0], OPERATIONS)
    operation = getattr(MPI, op if op in allowed else "SUM")

    def program(comm: MPI.Intracomm) -> object:
        send, whole = numbers(dtype, count, salt), np.zeros(count, dtype)
        at_root, part = np.zeros(count, dtype), np.zeros(count, dtype)
        comm.Allreduce(send, whole, operation)
        comm.Reduce(send, at_root, operation, root)
        comm.Reduce_scatter_block(numbers(dtype, count * SIZE, salt), part, operation)
        return whole, at_root, part

    same_answers(program)


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 2), min_size=SIZE, max_size=SIZE),
    st.lists(st.integers(-3, 3), min_size=SIZE, max_size=SIZE),
    st.integers(0, 300),
)
def test_splits(colors: list[int], keys: list[int], count: int) -> None:
    def program(comm: MPI.Intracomm) -> object:
        part = comm.Split(colors[RANK], keys[RANK])
        received, gathered = np.zeros(count, "i8"), np.zeros(part.size, "i8")
        part.Allreduce(data(RANK, count), received)
        part.Allgather(np.array([RANK]), gathered)
        part.Bcast(received, part.size - 1)
        answer = part.rank, part.size, received, gathered
        part.Free()
        return answer

    same_answers(program)


# -- what MPI itself does


def test_operations_of_the_user() -> None:
    def larger_square(a: Any, b: Any, datatype: MPI.Datatype) -> None:
        x, y = np.frombuffer(a, "f8"), np.frombuffer(b, "f8")
        y[:] = np.where(abs(x) > abs(y), x, y)

    op = MPI.Op.Create(larger_square, commute=True)
    send = np.array([RANK - 1.5, 0.25 * RANK, -RANK])

    def program(comm: MPI.Intracomm) -> object:
        whole, part = np.zeros(3), np.zeros(1)
        comm.Allreduce(send, whole, op)
        comm.Iallreduce(send, whole, op).Wait()
        comm.Reduce_scatter_block(np.repeat(send[:1], SIZE), part, op=op)
        return whole, part

    same_answers(program)
    op.Free()


def test_pairs_of_value_and_place() -> None:
    pairs = np.zeros(3, np.dtype([("value", "f8"), ("place", "i4")], align=True))
    pairs["value"] = [RANK, -RANK, 1]
    pairs["place"] = RANK

    def program(comm: MPI.Intracomm) -> object:
        answers = []
        for op in (MPI.MINLOC, MPI.MAXLOC):
            found = np.zeros_like(pairs)
            comm.Allreduce([pairs, 3, MPI.DOUBLE_INT], [found, 3, MPI.DOUBLE_INT], op)
            answers.append((found["value"].tolist(), found["place"].tolist()))
        return answers

    same_answers(program)


def test_dtypes_that_are_not_ours() -> None:
    def program(comm: MPI.Intracomm) -> object:
        found = np.zeros(3, np.longdouble)
        comm.Allreduce(np.full(3, RANK + 0.5, np.longdouble), found)
        return found

    same_answers(program)


def test_collectives_that_are_not_ours() -> None:
    def program(comm: MPI.Intracomm) -> object:
        scanned, before = np.zeros(3, "i8"), np.zeros(3, "i8")
        comm.Scan(data(RANK, 3), scanned)
        comm.Exscan(data(RANK, 3), before)
        received = bytearray(SIZE)
        comm.Alltoallw(
            [bytes([RANK] * SIZE), ([1] * SIZE, range(SIZE)), [MPI.BYTE] * SIZE],
            [received, ([1] * SIZE, range(SIZE)), [MPI.BYTE] * SIZE],
        )
        return scanned, before if RANK else None, bytes(received)

    same_answers(program)


def test_pickled_methods() -> None:
    mine = {"rank": RANK, "values": list(range(RANK))}
    root = SIZE - 1

    def program(comm: MPI.Intracomm) -> object:
        comm.barrier()
        return (
            comm.bcast(mine, root),
            comm.gather(mine, root),
            comm.scatter([(RANK, i) for i in range(SIZE)], root),
            comm.allgather(mine),
            comm.alltoall([(RANK, i) for i in range(SIZE)]),
            comm.reduce(RANK + 1, MPI.PROD, root),
            comm.allreduce([RANK]),
            comm.scan(RANK + 1),
            comm.exscan(RANK + 1),
        )

    same_answers(program)


# -- messages


def test_messages_between_both_communicators() -> None:
    """A Communicator is the communicator it was made from, seen in another way."""
    send_to, recv_from = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    for out, into in ((COMM, WORLD), (WORLD, COMM), (COMM, COMM)):
        request = out.Isend(data(RANK, 4), send_to, tag=5)
        got = np.zeros(4, "i8")
        status = MPI.Status()
        into.Recv(got, MPI.ANY_SOURCE, MPI.ANY_TAG, status)
        request.Wait()
        np.testing.assert_array_equal(got, data(recv_from, 4))
        assert (status.source, status.tag) == (recv_from, 5)
    assert COMM.sendrecv(RANK, send_to, source=recv_from) == recv_from
    assert COMM == WORLD
    assert isinstance(COMM, MPI.Intracomm)


def test_messages_in_flight_do_not_meet_ours() -> None:
    """Receives from anyone with any tag are open while collectives run, and messages lie about unreceived."""
    send_to, recv_from = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    open_receives = [np.zeros(8, "i8") for _ in range(3)]
    receives = [COMM.Irecv(x, MPI.ANY_SOURCE, MPI.ANY_TAG) for x in open_receives]
    unreceived = [COMM.Isend(data(RANK, 8, salt), send_to, tag) for salt, tag in enumerate((0, 1, 7))]
    COMM.Barrier()
    unexpected = [COMM.Isend(data(RANK, 8, 9), send_to, tag) for tag in (0, 1, 16_384)]
    for method, make in EXAMPLES.items():
        for count in (3, 20_000):
            example = make(COMM, count, SIZE - 1, False)
            example.fill(4)
            getattr(COMM, method)(*example.args)
            example.check(4, method)
    MPI.Request.Waitall(receives)
    for salt, got in enumerate(open_receives):
        np.testing.assert_array_equal(got, data(recv_from, 8, salt))
    for tag in (0, 1, 16_384):
        got = np.zeros(8, "i8")
        COMM.Recv(got, recv_from, tag)
        np.testing.assert_array_equal(got, data(recv_from, 8, 9))
    MPI.Request.Waitall([*unreceived, *unexpected])
    assert not COMM.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)


# -- communicators


def check_works(comm: MPI.Intracomm) -> None:
    received = np.zeros(5, "i8")
    comm.Allreduce(data(comm.rank, 5), received)
    np.testing.assert_array_equal(received, total(comm.size, 5))


def test_every_way_of_making_one() -> None:
    group = COMM.Get_group()
    made = [
        COMM.Dup(),
        COMM.Clone(),
        COMM.Split(0, -RANK),
        COMM.Split_type(MPI.COMM_TYPE_SHARED),
        COMM.Create(group),
        COMM.Create_group(group, tag=3),
        COMM.Dup().Dup(),
    ]
    for comm in made:
        assert type(comm) is mpicoll.Communicator
        check_works(comm)
        comm.Free()
    group.Free()
    check_works(COMM)


def test_ranks_that_are_left_out() -> None:
    evens = COMM.Get_group().Incl(range(0, SIZE, 2))
    for part in (COMM.Create(evens), COMM.Split(0 if RANK % 2 == 0 else MPI.UNDEFINED)):
        if RANK % 2:
            assert part == MPI.COMM_NULL
        else:
            assert part.size == (SIZE + 1) // 2
            check_works(part)
            part.Free()
    evens.Free()


def test_the_context_manager_frees_what_it_was_given_to_free() -> None:
    with COMM.Dup() as duplicate:
        check_works(duplicate)
    assert duplicate == MPI.COMM_NULL
    plain = WORLD.Dup()
    with mpicoll.Communicator(plain) as ours:
        check_works(ours)
    assert plain != MPI.COMM_NULL
    assert plain.allreduce(1) == SIZE
    plain.Free()


def test_it_is_freed_after_an_exception_too() -> None:
    duplicate = COMM.Dup()

    def fail() -> None:
        with duplicate:
            check_works(duplicate)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert duplicate == MPI.COMM_NULL


def test_many_communicators_one_after_the_other() -> None:
    """MPI libraries have a few thousand context numbers: freeing must give them back."""
    for _ in range(300):
        with COMM.Dup() as duplicate:
            pass
    check_works(COMM)
    assert duplicate == MPI.COMM_NULL


def test_repeated_calls_on_changing_buffers() -> None:
    """Calls are remembered by the look of their arguments: looks must not deceive."""
    root = SIZE - 1
    for salt in range(6):
        x = data(RANK, 12, salt).reshape(3, 4)
        received = np.zeros((3, 4), "i8")
        COMM.Allreduce(x if salt % 2 else np.asfortranarray(x), received)
        wanted = total(SIZE, 12, salt).reshape(3, 4)
        np.testing.assert_array_equal(received.ravel(), wanted.ravel("C" if salt % 2 else "F"))
        y = data(RANK, 12, salt)
        COMM.Allreduce(y, y)
        np.testing.assert_array_equal(y, total(SIZE, 12, salt))
        z = data(RANK, 12, salt).astype("f8" if salt % 3 else "i8")
        COMM.Bcast(z, root)
        np.testing.assert_array_equal(z, data(root, 12, salt))
        COMM.Reduce(y, received.ravel() if root == RANK else None, MPI.MAX, root)
        frozen = np.zeros(12, "i8")
        frozen.flags.writeable = salt < 3
        if salt >= 3:
            with pytest.raises(ValueError, match="recvbuf: expected memory that may be written"):
                COMM.Allreduce(y, frozen)
        else:
            COMM.Allreduce(y, frozen, MPI.MIN)
            np.testing.assert_array_equal(frozen, y)


def test_receive_counts_that_change_on_other_ranks_only() -> None:
    """Without counts, Reduce_scatter learns them from all ranks' buffers, at each call anew."""
    for shift in (0, 0, 1, 0, 2):
        counts = [4] * SIZE
        if SIZE > 2:  # rank 0 always has the same
            counts[1] -= shift
            counts[2] += shift
        start, received = sum(counts[:RANK]), np.zeros(counts[RANK], "i8")
        COMM.Reduce_scatter(data(RANK, 4 * SIZE, shift), received)
        np.testing.assert_array_equal(received, total(SIZE, 4 * SIZE, shift)[start : start + counts[RANK]])


def test_a_subclass_may_do_a_collective_in_its_own_way() -> None:
    class Doubled(mpicoll.Communicator):
        def Allreduce(self, sendbuf: Any, recvbuf: Any, op: Any = MPI.SUM, **named: Any) -> None:
            super().Allreduce(sendbuf, recvbuf, op, **named)
            recvbuf *= 2

    with Doubled(WORLD) as comm:
        values, sums = np.arange(10) + RANK, np.zeros(10, int)
        for _ in range(3):
            comm.Allreduce(values, sums)
            np.testing.assert_array_equal(sums, 2 * (np.arange(10) * SIZE + sum(range(SIZE))))
