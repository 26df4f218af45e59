"""Calls in messages that are like earlier ones: compiled methods do them, and only them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll import communicator as communicators
from mpicoll import fastcalls, fastmessages
from mpicoll.transports.messages import MessagePlan

from .examples import data, total

pytestmark = [
    pytest.mark.algorithms,
    pytest.mark.skipif(not fastcalls.available(), reason="objects do not lie where compiled methods look"),
]

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
LAST = SIZE - 1


class WentSlowError(Exception):
    pass


@pytest.fixture
def comm() -> Iterator[mpicoll.Communicator]:
    with mpicoll.Communicator(WORLD, transport="messages") as comm:
        yield comm


@contextmanager
def only_compiled() -> Iterator[None]:
    """The Python methods raise."""

    def refuse(*args: Any) -> Any:
        raise WentSlowError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communicators, "signature", refuse)
        yield


def is_slow(comm: mpicoll.Communicator, method: str, *args: Any, **named: Any) -> bool:
    """Whether a call goes to the Python method, which all ranks find out without sending anything."""
    try:
        with only_compiled():
            getattr(comm, method)(*args, **named)
    except WentSlowError:
        return True
    return False


def vectors(count: int, salt: int = 0) -> tuple[Any, Any]:
    return data(RANK, count, salt), np.full(count, -7)


@pytest.mark.parametrize("count", [1, 700, 40_000])
def test_the_second_call_is_compiled_also_with_other_arrays(comm: mpicoll.Communicator, count: int) -> None:
    comm.Allreduce(*vectors(count))
    with only_compiled():
        for salt in range(5):
            send, recv = vectors(count, salt)
            comm.Allreduce(send, recv)
            np.testing.assert_array_equal(recv, total(SIZE, count, salt))
            np.testing.assert_array_equal(send, data(RANK, count, salt))


def run_all(comm: mpicoll.Communicator, count: int, salt: int) -> dict[str, Any]:
    """Every method once; what each gives this rank."""
    whole, mine = data(RANK, count * SIZE, salt), data(RANK, count, salt)
    found = {name: np.zeros(count, np.int64) for name in ("Allreduce", "Reduce", "Reduce_scatter_block")}
    found |= {name: np.zeros(count * SIZE, np.int64) for name in ("Allgather", "Alltoall")}
    found["Bcast"] = mine.copy()
    comm.Allreduce(mine, found["Allreduce"], MPI.MAX)
    comm.Reduce(mine, found["Reduce"] if RANK == LAST else None, root=LAST)
    comm.Reduce_scatter_block(whole, found["Reduce_scatter_block"], op=MPI.SUM)
    comm.Allgather(mine, found["Allgather"])
    comm.Alltoall(whole, found["Alltoall"])
    comm.Bcast(found["Bcast"], LAST)
    comm.Barrier()
    return found


def test_every_method(comm: mpicoll.Communicator) -> None:
    count, own = 30, slice(30 * RANK, 30 * (RANK + 1))
    run_all(comm, count, 0)
    for salt in range(3):
        with only_compiled():
            found = run_all(comm, count, salt)
        parts, wholes = ([data(r, n, salt) for r in range(SIZE)] for n in (count, count * SIZE))
        wanted = {
            "Allreduce": np.max(parts, axis=0),
            "Reduce": np.sum(parts, axis=0) if RANK == LAST else np.zeros(count),
            "Reduce_scatter_block": np.sum(wholes, axis=0)[own],
            "Allgather": np.concatenate(parts),
            "Alltoall": np.concatenate([whole[own] for whole in wholes]),
            "Bcast": parts[LAST],
        }
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name], name)


def test_in_place(comm: mpicoll.Communicator) -> None:
    for salt in range(4):
        values = data(RANK, 500, salt)
        assert is_slow(comm, "Allreduce", MPI.IN_PLACE, values) is (salt == 0)
        if salt == 0:
            comm.Allreduce(MPI.IN_PLACE, values)
        np.testing.assert_array_equal(values, total(SIZE, 500, salt))


def test_what_differs_is_another_call(comm: mpicoll.Communicator) -> None:
    send, recv = vectors(60)
    comm.Allreduce(send, recv)
    readable = data(RANK, 60)
    readable.flags.writeable = False
    matrix = send.reshape(6, 10)
    different: list[tuple[Any, ...]] = [
        (send[:59], recv[:59]),
        (send, recv, MPI.MIN),
        (send.astype(np.int32), np.zeros(60, np.int32)),
        (send.astype(">i8"), recv),
        (readable, recv),
        (recv, recv),
        (MPI.IN_PLACE, recv),
        (matrix.T, recv),
        (np.arange(120)[::2], recv),
        (send.tolist(), recv),
        ([send, 60, MPI.INT64_T], recv),
        (np.ma.masked_array(send), recv),
        (send,),
        (send, recv, MPI.SUM, 0),
    ]
    assert all(is_slow(comm, "Allreduce", *args) for args in different)
    assert is_slow(comm, "Allreduce", send, recv, algorithm="ring")
    assert is_slow(comm, "Allreduce", sendbuf=send, recvbuf=recv)
    assert not is_slow(comm, "Allreduce", send, recv)
    np.testing.assert_array_equal(recv, total(SIZE, 60))


@pytest.mark.skipif(SIZE < 2, reason="needs another root")
def test_each_root_is_a_call_of_its_own(comm: mpicoll.Communicator) -> None:
    values = np.zeros(9)
    comm.Bcast(values, np.int64(LAST))  # a root that is no int is left to Python
    assert is_slow(comm, "Bcast", values, 0) and is_slow(comm, "Bcast", values, LAST)
    for root in (0, LAST):
        comm.Bcast(values, root)
    for root in (LAST, 0, LAST, 0):
        values[:] = RANK
        with only_compiled():
            comm.Bcast(values, root)
        assert (values == root).all()


def test_few_calls_are_known_and_all_work(comm: mpicoll.Communicator) -> None:
    for again in range(2):
        for count in range(1, fastmessages.MAX_CALLS + 9):
            send, recv = vectors(count, again)
            comm.Allreduce(send, recv)
            np.testing.assert_array_equal(recv, total(SIZE, count, again))


def test_compiled_and_python_methods_number_calls_together(comm: mpicoll.Communicator) -> None:
    send, recv = vectors(50)
    for salt in range(40):
        comm.Allreduce(send, recv)
        request = comm.Iallreduce(data(RANK, 50, salt), out := np.zeros(50, np.int64))
        comm.Allreduce(send, recv, algorithm="ring")
        comm.Allreduce(send, recv)
        request.Wait()
        np.testing.assert_array_equal(recv, total(SIZE, 50))
        np.testing.assert_array_equal(out, total(SIZE, 50, salt))


def test_the_number_begins_anew(comm: mpicoll.Communicator) -> None:
    send, recv = vectors(5)
    comm.Allreduce(send, recv)
    comm._count.words[0] = communicators.ONE_SHOT_TAGS - 3
    for salt in range(6):
        send[:] = data(RANK, 5, salt)
        with only_compiled():
            comm.Allreduce(send, recv)
        np.testing.assert_array_equal(recv, total(SIZE, 5, salt))
    assert comm._count.number == 3


@pytest.mark.skipif(SIZE < 2, reason="needs another rank")
def test_a_call_that_is_broken_off_is_known_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    comm = mpicoll.Communicator(WORLD, transport="messages")
    values = np.zeros(3000)
    comm.Allreduce(MPI.IN_PLACE, values)

    def leave(self: MessagePlan, patience: int = 0) -> bool:
        raise KeyboardInterrupt

    if RANK == 0:  # the others do not come for a while
        monkeypatch.setattr(MessagePlan, "advance", leave)
        with pytest.raises(KeyboardInterrupt), only_compiled():
            comm.Allreduce(MPI.IN_PLACE, values)
        monkeypatch.undo()
    WORLD.Barrier()
    if RANK == 0:
        assert is_slow(comm, "Allreduce", MPI.IN_PLACE, values)


def test_persistent_calls_in_messages_are_compiled(comm: mpicoll.Communicator) -> None:
    send, recv = vectors(200)
    plan = comm.Allreduce_init(send, recv)
    assert "Start" in vars(plan) and "Wait" in vars(plan)
    for salt in range(4):
        send[:], recv[:] = data(RANK, 200, salt), -7
        plan.Start()
        if salt % 2:
            while not plan.Test():
                pass
        plan.Wait()
        np.testing.assert_array_equal(recv, total(SIZE, 200, salt))
    plan.Free()
