"""Nonblocking and persistent collectives: all of them, in every order, beside MPI's own requests."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll

from .examples import EXAMPLES, Example, data, in_place_or_not, total

WORLD = MPI.COMM_WORLD
COMM = mpicoll.Communicator(WORLD)
RANK, SIZE = WORLD.rank, WORLD.size
ROOT = SIZE - 1
COUNT = 41
LARGE = 40_000  # elements: a message that MPI does not send eagerly


def started(method: str, count: int = COUNT, in_place: bool = False, salt: int = 0) -> tuple[Example, Any]:
    """An example whose nonblocking form is under way."""
    example = EXAMPLES[method](COMM, count, ROOT, in_place)
    example.fill(salt)
    return example, getattr(COMM, f"I{method.lower()}")(*example.args)


def test_a_limit() -> None:
    assert MPI.Query_thread() == MPI.THREAD_MULTIPLE, "nonblocking collectives cannot be tested without it"


@pytest.mark.parametrize("method", EXAMPLES)
def test_wait_and_test(method: str) -> None:
    for in_place in in_place_or_not(method):
        for salt, count in enumerate((0, 1, COUNT, LARGE // 10)):
            example, request = started(method, count, in_place, salt)
            assert isinstance(request, MPI.Request)
            assert request.Wait() is True
            example.check(salt, f"Wait {method} {count} {in_place}")
            example, request = started(method, count, in_place, salt)
            while not request.Test():
                time.sleep(0)  # the others need the processor, too
            example.check(salt, f"Test {method} {count} {in_place}")
            assert request == MPI.REQUEST_NULL


def test_many_outstanding_complete_in_any_order() -> None:
    for seed in range(3):
        order = list(EXAMPLES) * 2
        random.Random(seed).shuffle(order)  # the same on every rank
        running = [started(method, COUNT + i, salt=i) for i, method in enumerate(order)]
        numbered = list(enumerate(running))
        random.Random(f"{seed} {RANK}").shuffle(numbered)  # not the same
        for salt, (example, request) in numbered:
            request.Wait()
            example.check(salt, order[salt])


@pytest.mark.deadline(20)
def test_ranks_may_wait_in_opposite_orders() -> None:
    """Whoever waits for the second call must go on with the first, for which the other ranks wait."""
    for salt in range(30):
        if RANK == 0:  # by then all others wait, and their progress threads are between the two calls
            time.sleep(0.005)
        running = [started("Allreduce", LARGE // 4, salt=salt + i) for i in range(2)]
        for i in (0, 1) if RANK % 2 else (1, 0):
            example, request = running[i]
            request.Wait()
            example.check(salt + i)


def test_waitall_beside_mpis_own_requests() -> None:
    partner = (RANK + 1) % SIZE
    sent, got = data(RANK, 5), np.zeros(5, np.int64)
    running = [started(method, LARGE // 40, salt=i) for i, method in enumerate(EXAMPLES)]
    own = [COMM.Isend(sent, partner), COMM.Irecv(got, (RANK - 1) % SIZE), WORLD.Ibarrier()]
    requests = [request for _, request in running]
    MPI.Request.Waitall([own[0], *requests[:5], own[1], *requests[5:], own[2]])
    for salt, (example, _) in enumerate(running):
        example.check(salt)
    np.testing.assert_array_equal(got, data((RANK - 1) % SIZE, 5))


def test_waitany_gives_each_request_once() -> None:
    running = [started(method, salt=i) for i, method in enumerate(EXAMPLES)]
    requests = [request for _, request in running] + [WORLD.Ibarrier()]
    seen = set()
    for _ in requests:
        index = MPI.Request.Waitany(requests)
        assert index not in seen
        seen.add(index)
        if index < len(running):
            running[index][0].check(index)
    assert seen == set(range(len(requests)))
    assert MPI.Request.Waitany(requests) == MPI.UNDEFINED


def test_testall_and_waitsome() -> None:
    running = [started(method, salt=i) for i, method in enumerate(EXAMPLES)]
    while not MPI.Request.Testall([request for _, request in running]):
        time.sleep(0)
    again = [started(method, salt=i) for i, method in enumerate(EXAMPLES)]
    left = len(again)
    while left:
        left -= len(MPI.Request.Waitsome([request for _, request in again]) or [])
    for salt, (example, _) in [*enumerate(running), *enumerate(again)]:
        example.check(salt)


def test_lower_case_wait_and_test() -> None:
    example, request = started("Allreduce")
    request.wait()
    example.check()
    example, request = started("Allreduce")
    while not request.test()[0]:
        time.sleep(0)
    example.check()


def test_communicators_may_be_used_in_another_order_on_each_rank() -> None:
    comms = [COMM.Dup() for _ in range(4)]
    for turn in range(4):
        order = sorted(range(4), key=lambda i: (i + RANK + turn) % 4)
        received = [np.zeros(COUNT, np.int64) for _ in comms]
        requests = {}
        for i in order:
            requests[i] = comms[i].Iallreduce(data(RANK, COUNT, i), received[i])
        for i in order[::-1]:
            requests[i].Wait()
        for i, found in enumerate(received):
            np.testing.assert_array_equal(found, total(SIZE, COUNT, i))
    for comm in comms:
        comm.Free()


def test_progress_goes_on_while_the_program_computes() -> None:
    """The progress thread completes what nobody waits for."""
    received = np.zeros(LARGE, np.int64)
    request = COMM.Iallreduce(data(RANK, LARGE), received)
    until = time.monotonic() + 20
    while not (received == total(SIZE, LARGE)).all() and time.monotonic() < until:
        time.sleep(0.01)
    np.testing.assert_array_equal(received, total(SIZE, LARGE))
    request.Wait()


def test_blocking_calls_while_others_are_under_way() -> None:
    first, request = started("Allreduce", LARGE)
    second = EXAMPLES["Allgather"](COMM, COUNT, 0, False)
    second.fill(1)
    COMM.Allgather(*second.args)
    COMM.Barrier()
    second.check(1)
    request.Wait()
    first.check()


def test_buffers_live_as_long_as_their_request() -> None:
    received = np.zeros(LARGE, np.int64)
    request = COMM.Iallreduce(data(RANK, LARGE), received)  # nobody else holds the input
    rubbish = [np.full(LARGE, -1) for _ in range(4)]
    request.Wait()
    np.testing.assert_array_equal(received, total(SIZE, LARGE))
    assert rubbish[0][0] == -1


# -- persistent


@pytest.mark.parametrize("method", EXAMPLES)
def test_persistent_calls_take_the_data_of_each_start(method: str) -> None:
    for in_place in in_place_or_not(method):
        for count in (0, COUNT, LARGE // 40):
            example = EXAMPLES[method](COMM, count, ROOT, in_place)
            plan = getattr(COMM, f"{method}_init")(*example.args)
            for salt in range(4):
                example.fill(salt)
                plan.Start()
                if salt % 2:
                    while not plan.Test():
                        time.sleep(0)
                plan.Wait()
                example.check(salt, f"{method} {count} {in_place}")
            plan.Free()


def test_several_persistent_calls_at_once() -> None:
    examples = [EXAMPLES[method](COMM, COUNT, ROOT, False) for method in EXAMPLES]
    plans = [getattr(COMM, f"{m}_init")(*example.args) for m, example in zip(EXAMPLES, examples, strict=True)]
    for salt in range(3):
        for example in examples:
            example.fill(salt)
        type(plans[0]).Startall(plans)
        type(plans[0]).Waitall(plans if RANK % 2 else plans[::-1])
        for example in examples:
            example.check(salt)


def test_a_persistent_call_and_one_shot_calls_do_not_meet() -> None:
    example = EXAMPLES["Allreduce"](COMM, LARGE, 0, False)
    plan = COMM.Allreduce_init(*example.args)
    for salt in range(3):
        example.fill(salt)
        plan.Start()
        other = EXAMPLES["Allreduce"](COMM, COUNT, 0, False)
        other.fill(salt + 5)
        COMM.Allreduce(*other.args)
        other.check(salt + 5)
        plan.Wait()
        example.check(salt)


def test_a_persistent_call_reads_16_bit_floats_at_each_start() -> None:
    x, y = np.zeros(5, np.float16), np.zeros(5, np.float16)
    plan = COMM.Allreduce_init(x, y)
    for turn in range(3):
        x[:] = RANK + turn
        plan.Start()
        plan.Wait()
        assert y.tolist() == [sum(range(SIZE)) + turn * SIZE] * 5


def test_misuse_of_persistent_calls() -> None:
    x, y = np.zeros(LARGE), np.zeros(LARGE)
    plan = COMM.Allreduce_init(x, y)
    assert plan.Wait()
    assert plan.Test()
    if SIZE > 1:
        WORLD.Barrier()
        if RANK == 0:  # the others come later, so it cannot be complete
            plan.Start()
            with pytest.raises(RuntimeError, match=r"Start: the previous start is not complete; call Wait"):
                plan.Start()
            with pytest.raises(RuntimeError, match="Free: a start is not complete"):
                plan.Free()
        WORLD.Barrier()
        if RANK:
            plan.Start()
        plan.Wait()
    plan.Free()
    plan.Free()
    with pytest.raises(RuntimeError, match="Start: this persistent call has been freed"):
        plan.Start()
    own = MPI.Op.Create(lambda a, b, datatype: None)
    with pytest.raises(TypeError, match="persistent collectives take predefined operations"):
        COMM.Allreduce_init(x, y, op=own)
    own.Free()


def test_arguments_are_checked_at_once() -> None:
    short = np.zeros(COUNT - 1)
    for method in ("Iallreduce", "Allreduce_init"):
        with pytest.raises(ValueError, match="recvbuf: expected 41 elements, as in sendbuf; got 40"):
            getattr(COMM, method)(np.zeros(COUNT), short)
    with pytest.raises(ValueError, match="root: expected a rank from 0"):
        COMM.Ibcast(short, root=SIZE)
    example, request = started("Allreduce")
    request.Wait()
    example.check()


def test_an_error_in_mpi_reaches_whoever_waits() -> None:
    """On a communicator of one rank, so that nobody else is left waiting."""
    with mpicoll.Communicator(MPI.COMM_SELF) as alone:
        x = np.zeros(2)
        for finish in ("Wait", "Test"):
            request = alone.Iallreduce(x, x)
            error = MPI.Exception(MPI.ERR_OTHER)
            request._error = error
            with pytest.raises(MPI.Exception) as caught:
                getattr(request, finish)()
            assert caught.value is error


def test_a_datatype_may_be_freed_while_its_call_is_under_way() -> None:
    every_third = MPI.DOUBLE.Create_vector(LARGE, 1, 3).Commit()
    values = np.zeros(3 * LARGE)
    if RANK == ROOT:
        values[::3] = np.arange(LARGE)
    request = COMM.Ibcast([values, 1, every_third], root=ROOT)
    every_third.Free()
    # What comes next gets the freed handle, where the library uses handles again.
    others = [MPI.DOUBLE.Create_vector(2, 1, n + 2).Commit() for n in range(8)]
    request.Wait()
    assert np.array_equal(values[::3], np.arange(LARGE))
    assert not values[1::3].any()
    for other in others:
        other.Free()
