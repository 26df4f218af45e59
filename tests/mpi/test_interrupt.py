"""Ctrl-C reaches a rank that waits in a collective, and what was broken off does no harm afterwards."""

from __future__ import annotations

import signal
import threading
import time

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll

WORLD = MPI.COMM_WORLD
DELAY = 0.3  # seconds until the signal: the rank is well inside the collective by then
PROMPT = 5.0  # seconds; it takes milliseconds where the machine has nothing else to do


def interrupt_soon() -> None:
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(DELAY, signal.pthread_kill, (main, signal.SIGINT)).start()


@pytest.mark.skipif(WORLD.size != 2, reason="needs 2 ranks: on more, the others could not complete the call")
def test_ctrl_c_ends_the_wait_and_the_communicator_works_on() -> None:
    comm = mpicoll.Communicator(WORLD)
    values, sums = np.arange(100.0) + comm.rank, np.zeros(100)
    for _ in range(2):  # the second is recognised as a repetition of the first
        comm.Allreduce(values, sums)
    comm.Bcast(np.ones(3))  # which rank 0 compares with the others' in its next call
    if comm.rank == 0:
        interrupt_soon()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            comm.Allreduce(values, sums)
        assert time.monotonic() - start < DELAY + PROMPT
        WORLD.send("interrupted", dest=1)
    else:
        assert WORLD.recv(source=0) == "interrupted"
        comm.Allreduce(values, sums)  # meets the message that rank 0 had sent
        assert np.array_equal(sums, 2 * np.arange(100.0) + 1)
    for factor in (1, 2, 3):
        comm.Allreduce(factor * values, sums)
        assert np.array_equal(sums, factor * (2 * np.arange(100.0) + 1))
    comm.Free()
