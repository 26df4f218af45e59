"""A short form of ``mpicoll.bench.stress``, and that it finds what is wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from mpicoll.bench import stress

import mpicoll

WORLD = MPI.COMM_WORLD
SECONDS = 2.0  # of each kind of calls


@pytest.fixture(scope="module")
def comm() -> Iterator[mpicoll.Communicator]:
    comm = mpicoll.Communicator(WORLD, transport="shared")
    yield comm
    comm.Free()


@pytest.mark.algorithms
def test_random_calls(comm: mpicoll.Communicator) -> None:
    *_, number = stress.random_calls(comm, SECONDS, seed=20, largest=1 << 18)
    assert number >= stress.TOGETHER


def test_random_calls_over_messages() -> None:
    comm = mpicoll.Communicator(WORLD, transport="messages")
    *_, number = stress.random_calls(comm, SECONDS / 4, seed=21, largest=1 << 14)
    assert number >= stress.TOGETHER
    comm.Free()


@pytest.mark.algorithms
def test_many_small_calls(comm: mpicoll.Communicator) -> None:
    *_, number = stress.small_calls(comm, 100_000, SECONDS)
    assert number >= stress.SMALL_TOGETHER


def test_the_same_seed_draws_the_same_calls() -> None:
    first, second = random.Random(3), random.Random(3)
    cases = [stress.draw(first, number, WORLD.size) for number in range(200)]
    assert cases == [stress.draw(second, number, WORLD.size) for number in range(200)]
    assert {case.method for case in cases} == {*stress.REDUCTIONS, *stress.MOVES}
    assert {case.form for case in cases} == set(stress.FORMS)


class Wrong(mpicoll.Communicator):
    """One whose broadcast loses the last byte, and whose sums are written too far."""

    def Bcast(self, buf: Any, root: int = 0) -> None:
        MPI.Intracomm(self).Bcast(buf, root)
        if buf.size:
            buf.view(np.uint8)[-1] ^= 1

    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: Any = MPI.SUM) -> None:
        MPI.Intracomm(self).Allreduce(sendbuf, recvbuf, op)
        np.lib.stride_tricks.as_strided(recvbuf, (recvbuf.size + 1,))[-1] = 0


@pytest.mark.parametrize("method", ["Bcast", "Allreduce"])
def test_what_is_wrong_is_found(method: str) -> None:
    counts = ((5,) * WORLD.size,) * WORLD.size
    case = stress.Case(17, method, "i", "SUM", counts, 0, False, "blocking")
    with (
        Wrong(WORLD, transport="messages") as comm,
        pytest.raises(
            stress.Difference, match=rf"output of Case\(number=17, method='{method}'.* seed 3: 1 of"
        ),
    ):
        stress.check(case, comm, MPI.Intracomm(comm), 3, random.Random(0))


def test_what_is_wrong_in_a_small_call_is_found() -> None:
    class Late(mpicoll.Communicator):
        def Allgather(self, sendbuf: Any, recvbuf: Any) -> None:
            recvbuf[...] = 1

    with (
        Late(WORLD, transport="messages") as comm,
        pytest.raises(stress.Difference, match=r"small call \d on rank "),
    ):
        list(stress.small_calls(comm, 100))
