"""Every collective on ranks of several hosts: ``python -m tests.hosts.collectives 2,1`` on 2 + 1 ranks.

What must come out is computed on each rank without MPI, from data that differ per rank, index and call.
"""

from __future__ import annotations

import faulthandler
import itertools
import random
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from mpi4py import MPI
from mpicoll.kernels.reduce import OPERATIONS, supports

import mpicoll
from mpicoll import info
from mpicoll.faults import abort_on_exception
from tests.hosts.rig import CONTROL, NETWORKS
from tests.hosts.rig import MPI as MPI_NETWORK
from tests.mpi.examples import EXAMPLES, data, in_place_or_not, roots, total
from tests.mpi.test_operations import contribution, reference

DEADLINE = 60.0  # seconds, after which every rank says where it is
EAGER = 20_001  # elements, of 8 bytes: more than Open MPI's TCP sends before it is asked to
LARGE = 150_001  # several segments of messages
FROM_MEMORY = 9_001  # elements of 1 byte: the hierarchical allreduce takes it
DTYPES = [np.dtype(code) for code in ("bool", "u1", "i4", "f2", ml_dtypes.bfloat16, "f4", "f8", "c8")]


def check_placement(comm: mpicoll.Communicator, ranks_per_host: Sequence[int]) -> None:
    """mpicoll must see as many nodes as there are hosts, and not one machine."""
    hosts = [f"host{host}" for host, count in enumerate(ranks_per_host) for _ in range(count)]
    assert comm.allgather(socket.gethostname()) == hosts
    node = MPI.Intracomm(comm).Split_type(MPI.COMM_TYPE_SHARED)
    assert node.Get_size() == hosts.count(hosts[comm.rank])
    node.Free()
    hierarchical = f"hierarchical: shared memory on {len(ranks_per_host)} nodes"
    assert comm.transport.startswith("messages" if max(ranks_per_host) == 1 else hierarchical), comm.transport
    facts = info.render(info.gather())
    assert f"{comm.size} on {len(ranks_per_host)} nodes" in facts, facts


def check_network(comm: mpicoll.Communicator) -> None:
    """What one host sends to another takes the cable for messages: no memory, and not the other cable."""
    before = {name: sent_bytes(name) for name in NETWORKS}
    example = EXAMPLES["Allreduce"](comm, LARGE, 0, False)
    comm.Allreduce(*example.args)
    sent = {name: sent_bytes(name) - before[name] for name in NETWORKS}
    assert sent[CONTROL] < example.args[0].nbytes / 4 < sent[MPI_NETWORK], sent


def sent_bytes(device: str) -> int:
    """By this host, on one of its networks, so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.split()[0] == f"{device}:")


def check_blocking(comm: mpicoll.Communicator) -> None:
    counts = sorted({0, 1, comm.size - 1, comm.size, comm.size + 1, 1003})
    for method, count in itertools.product(EXAMPLES, counts):
        for root, in_place in itertools.product(roots(method, comm.size), in_place_or_not(method)):
            check_once(comm, method, count, root, in_place)
    for method in EXAMPLES:
        check_once(comm, method, EAGER, comm.size - 1, False)
    for count in (FROM_MEMORY, LARGE):
        check_once(comm, "Allreduce", count, 0, True)


def check_once(comm: mpicoll.Communicator, method: str, count: int, root: int, in_place: bool) -> None:
    example = EXAMPLES[method](comm, count, root, in_place)
    example.fill(salt=count + root)
    getattr(comm, method)(*example.args)
    example.check(count + root, f"{method} {count=} {root=} {in_place=} {comm.rank=}")


def check_barrier(comm: mpicoll.Communicator) -> None:
    """Nobody leaves before all have come; the hosts have one clock."""
    for late in range(comm.size):
        time.sleep(0.01 if comm.rank == late else 0)
        entered = time.clock_gettime(time.CLOCK_MONOTONIC)
        comm.Barrier()
        left = time.clock_gettime(time.CLOCK_MONOTONIC)
        assert left >= max(MPI.Intracomm(comm).allgather(entered)), f"{late=} {comm.rank=}"


def check_nonblocking(comm: mpicoll.Communicator) -> None:
    """All of them under way at once, waited for in another order on each rank."""
    running = []
    for salt, method in enumerate(list(EXAMPLES) * 2):
        count = (37, EAGER)[salt % 2]
        example = EXAMPLES[method](comm, count, salt % comm.size, False)
        example.fill(salt)
        running.append((salt, method, example, getattr(comm, f"I{method.lower()}")(*example.args)))
    random.Random(comm.rank).shuffle(running)
    for salt, method, example, request in running:
        request.Wait()
        example.check(salt, f"I{method.lower()} {salt=} {comm.rank=}")


def check_persistent(comm: mpicoll.Communicator) -> None:
    for method, count in itertools.product(EXAMPLES, (37, FROM_MEMORY)):
        for in_place in in_place_or_not(method):
            example = EXAMPLES[method](comm, count, comm.size - 1, in_place)
            plan = getattr(comm, f"{method}_init")(*example.args)
            for salt in range(3):
                example.fill(salt)
                plan.Start()
                plan.Wait()
                example.check(salt, f"{method}_init {count=} {in_place=} {salt=} {comm.rank=}")
            plan.Free()


def check_operations(comm: mpicoll.Communicator) -> None:
    """Few elements go in messages, many of them over the hosts' memory where a host has several ranks."""
    for op, dtype in itertools.product(OPERATIONS, DTYPES):
        if not supports(op, dtype):
            continue
        for count in (3, FROM_MEMORY):
            send, recv = contribution(dtype, comm.rank, op, count), np.zeros(count, dtype)
            comm.Allreduce(send, recv, getattr(MPI, op))
            np.testing.assert_array_equal(recv, reference(op, dtype, count), f"{op} {dtype} {count}")


def check_halves(comm: mpicoll.Communicator) -> None:
    """Sums of 16-bit floats are rounded once: 256 + 1 + 1 in steps never leaves 256 in bfloat16."""
    for dtype, large in ((np.dtype(np.float16), 2048.0), (np.dtype(ml_dtypes.bfloat16), 256.0)):
        for count, op in itertools.product((3, FROM_MEMORY), (MPI.SUM, mpicoll.AVG)):
            send, recv = np.full(count, 1.0 if comm.rank else large).astype(dtype), np.zeros(count, dtype)
            comm.Allreduce(send, recv, op)
            exact = (large + comm.size - 1) / (1 if op is MPI.SUM else comm.size)
            assert recv.tobytes() == np.full(count, exact).astype(dtype).tobytes(), f"{dtype} {count} {op}"


def check_lists(comm: mpicoll.Communicator) -> None:
    counts = (3, 0, 1, 700, EAGER, 17)
    for salt in range(2):
        arrays = [data(comm.rank, count, salt + i) for i, count in enumerate(counts)]
        comm.Allreduce_many(arrays)
        for i, array in enumerate(arrays):
            np.testing.assert_array_equal(array, total(comm.size, array.size, salt + i))


def check_parts(comm: mpicoll.Communicator) -> None:
    """In two groups of ranks at once, each across hosts as far as there are such, in reverse order."""
    with comm.Split(color=comm.rank % 2, key=-comm.rank) as part:
        for method, count in itertools.product(EXAMPLES, (5, FROM_MEMORY)):
            check_once(part, method, count, part.size - 1, False)


def check_same_bits(comm: mpicoll.Communicator) -> None:
    """Every rank gets the same result, also where the order of addition matters."""
    generator = np.random.default_rng(comm.rank)
    for count in (1, 5, 3001, EAGER):
        send = generator.standard_normal(count) * 10.0 ** generator.integers(-6, 6, count)
        recv = np.empty(count)
        comm.Allreduce(send, recv)
        assert len(set(MPI.Intracomm(comm).allgather(recv.tobytes()))) == 1, count


CHECKS: list[Callable[[mpicoll.Communicator], None]] = [
    check_network,
    check_blocking,
    check_barrier,
    check_nonblocking,
    check_persistent,
    check_operations,
    check_halves,
    check_lists,
    check_parts,
    check_same_bits,
]


@abort_on_exception()
def main() -> None:
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    ranks_per_host = [int(count) for count in sys.argv[1].split(",")]
    with mpicoll.Communicator(MPI.COMM_WORLD) as comm:
        check_placement(comm, ranks_per_host)
        for check in CHECKS:
            began = time.monotonic()
            check(comm)
            MPI.Intracomm(comm).Barrier()
            if comm.rank == 0:
                print(f"{time.monotonic() - began:6.2f} s  {check.__name__}", flush=True)
        if comm.rank == 0:
            print("all right", flush=True)


if __name__ == "__main__":
    main()
