"""Calls without end, whose results must be right.

    python -m mpicoll.launch -np 4 python -m mpicoll.bench.stress --seconds 120 --calls 1000000
    python -m mpicoll.launch -np 4 python -m mpicoll.bench.stress --random-calls 100000 --seconds 3600

Two kinds, one after the other. Random calls: collective, dtype, operation, size, root, memory and form are
drawn from a seed, and the MPI library does the same call, whose result ours must equal byte for byte; the
communicator is a new one now and then. Small calls: very many in quick succession, each one's result known
beforehand. What differs ends the job with the call, the rank, the index, what was expected and what came; the
seed brings it back.

Nothing may be left behind: what each process holds after `WARM_UP` random calls may not have grown by the
end of them beyond `allowed_growth`. A leak of 300 bytes a call shows in 100,000 calls of up to 64 KiB.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from mpi4py import MPI
from mpicoll.kernels.reduce import supports

from mpicoll.communicator import Communicator
from mpicoll.faults import abort_on_exception

from .holdings import Holdings, growth, holdings
from .jobs import about_job

Array = npt.NDArray[Any]

LARGEST = 4 << 20  # bytes of a rank's block
GUARD = 8  # elements around every array that must stay
GUARD_BYTE = 0xA5
TOGETHER = 16  # random calls between two looks at the clock
STRETCH = 32 * TOGETHER  # random calls on one communicator
WARM_UP = 4 * STRETCH  # random calls until caches are full, and the allocator has what it needs
MEMORY = 24 << 20  # bytes: what caches and the allocator may still take then
SMALL_TOGETHER = 2000  # small ones
REPORT = 5.0  # seconds between two lines

DTYPES = [np.dtype(code) for code in "bhiqBHIQfdFD"]
OPERATIONS = ("SUM", "PROD", "MIN", "MAX", "BAND", "BOR", "BXOR")
REDUCTIONS = ("Allreduce", "Reduce", "Reduce_scatter_block", "Reduce_scatter")
MOVES = (
    "Bcast",
    "Gather",
    "Gatherv",
    "Scatter",
    "Scatterv",
    "Allgather",
    "Allgatherv",
    "Alltoall",
    "Alltoallv",
)
IN_PLACE = ("Allreduce", "Allgather")
FORMS = ("blocking",) * 8 + ("persistent", "nonblocking")


class Difference(AssertionError):
    """A result that is not what it should be."""


class Growth(AssertionError):
    """A process holds more than it should."""


@dataclass(frozen=True)
class Case:
    """A call as all ranks draw it; what rank r sends to rank s has ``counts[r][s]`` elements."""

    number: int
    method: str
    dtype: str
    operation: str
    counts: tuple[tuple[int, ...], ...]
    root: int
    in_place: bool
    form: str


def draw(common: random.Random, number: int, nranks: int, largest: int = LARGEST) -> Case:
    method = common.choice(REDUCTIONS + MOVES)
    dtype = common.choice(DTYPES)
    operation = common.choice([name for name in OPERATIONS if supports(name, dtype)])
    count = (
        0 if common.random() < 0.03 else int(math.exp(common.uniform(0, math.log(largest)))) // dtype.itemsize
    )
    counts = [[count] * nranks for _ in range(nranks)]
    if method in ("Reduce_scatter", "Gatherv", "Scatterv", "Allgatherv"):
        counts = [[common.randint(0, count) for _ in range(nranks)]] * nranks
    elif method == "Alltoallv":
        counts = [[common.randint(0, count) for _ in range(nranks)] for _ in range(nranks)]
    in_place = method in IN_PLACE and common.random() < 0.3
    root, form = common.randrange(nranks), common.choice(FORMS)
    return Case(number, method, dtype.char, operation, tuple(map(tuple, counts)), root, in_place, form)


def lengths(case: Case, rank: int) -> tuple[int, int]:
    """Elements of this rank's input and output."""
    nranks, counts, count = len(case.counts), case.counts[rank], case.counts[0][0]
    at_root = rank == case.root
    return {
        "Allreduce": (count, count),
        "Reduce": (count, count if at_root else 0),
        "Reduce_scatter_block": (count * nranks, count),
        "Reduce_scatter": (sum(counts), counts[rank]),
        "Bcast": (0, count),
        "Gather": (count, count * nranks if at_root else 0),
        "Gatherv": (counts[rank], sum(counts) if at_root else 0),
        "Scatter": (count * nranks if at_root else 0, count),
        "Scatterv": (sum(counts) if at_root else 0, counts[rank]),
        "Allgather": (count, count * nranks),
        "Allgatherv": (counts[rank], sum(counts)),
        "Alltoall": (count * nranks, count * nranks),
        "Alltoallv": (sum(counts), sum(row[rank] for row in case.counts)),
    }[case.method]


def arguments(case: Case, rank: int, send: Array, recv: Array) -> tuple[Any, ...]:
    """What the method is called with."""
    counts, at_root = list(case.counts[rank]), rank == case.root
    source: Any = MPI.IN_PLACE if case.in_place else send
    if case.method in REDUCTIONS:
        more = {"Reduce": (case.root,)}.get(case.method, ())
        between = (counts,) if case.method == "Reduce_scatter" else ()
        return (source, recv, *between, getattr(MPI, case.operation), *more)
    rooted = (case.root,) if case.method in ("Bcast", "Gather", "Gatherv", "Scatter", "Scatterv") else ()
    if case.method == "Bcast":
        return (recv, *rooted)
    if case.method in ("Gather", "Gatherv"):
        whole: Any = recv if case.method == "Gather" else [recv, counts]
        return (source, whole if at_root else None, *rooted)
    if case.method in ("Scatter", "Scatterv"):
        whole = send if case.method == "Scatter" else [send, counts]
        return (whole if at_root else None, recv, *rooted)
    if case.method == "Allgatherv":
        return (source, [recv, counts])
    if case.method == "Alltoallv":
        return ([send, counts], [recv, [row[rank] for row in case.counts]])
    return (source, recv)


class Buffers:
    """An array with guards around it, in ordinary memory or in the arena."""

    def __init__(
        self, comm: Communicator, count: int, dtype: np.dtype[Any], shared: bool, offset: int
    ) -> None:
        length = offset + count + GUARD
        self.whole = comm.alloc(length, dtype) if shared else np.empty(length, dtype)
        self.whole.view(np.uint8)[:] = GUARD_BYTE
        self.part = self.whole[offset : offset + count]


def contribution(case: Case, rank: int, seed: int, count: int) -> Array:
    """Random numbers whose sums and products fit into a byte: where they do not, libraries differ."""
    nranks = len(case.counts)
    generator = np.random.default_rng([seed, case.number, rank])
    if case.method in REDUCTIONS and case.operation == "PROD":
        values = 1 + (np.arange(count) % nranks == rank) * generator.integers(0, 3, count)
    elif case.method in REDUCTIONS and case.operation == "SUM":
        values = generator.integers(0, 127 // nranks + 1, count)
    else:
        values = generator.integers(0, 128, count)
    return np.asarray(values, case.dtype)


def check(case: Case, comm: Communicator, native: MPI.Intracomm, seed: int, own: random.Random) -> None:
    """Our result against the library's, guards and input included. Raises `Difference`."""
    rank, dtype = comm.rank, np.dtype(case.dtype)
    sent, received = lengths(case, rank)
    buffers = [Buffers(comm, n, dtype, own.random() < 0.4, own.choice((0, 1, 5))) for n in (sent, received)]
    send, recv = buffers[0].part, buffers[1].part
    send[:] = contribution(case, rank, seed, sent)
    if case.in_place:
        at = rank * sent if case.method == "Allgather" else 0
        recv[at : at + sent] = send
    if case.method == "Bcast" and rank == case.root:
        recv[:] = contribution(case, rank, seed, received)
    given, expected = send.copy(), [buffer.whole.copy() for buffer in buffers]
    offset = buffers[1].whole.size - GUARD - received
    wanted = expected[1][offset : offset + received]
    run(case, comm, arguments(case, rank, send, recv))
    getattr(native, case.method)(*arguments(case, rank, given, wanted))
    for buffer, whole, name in zip(buffers, expected, ("input", "output"), strict=True):
        compare(buffer.whole, whole, f"{name} of {case} on rank {rank} of {comm.size}, seed {seed}")


def run(case: Case, comm: Communicator, given: tuple[Any, ...]) -> None:
    if case.form == "blocking":
        getattr(comm, case.method)(*given)
    elif case.form == "nonblocking":
        getattr(comm, f"I{case.method.lower()}")(*given).Wait()
    else:
        plan = getattr(comm, f"{case.method}_init")(*given)
        plan.Start()
        plan.Wait()
        plan.Free()


def compare(got: Array, expected: Array, about: str) -> None:
    if got.tobytes() == expected.tobytes():
        return
    differs = (got.view(np.uint8) != expected.view(np.uint8)).reshape(got.size, -1).any(axis=1)
    index = int(np.flatnonzero(differs)[0])
    raise Difference(
        f"{about}: {int(differs.sum())} of {got.size} elements, guards included, differ; at index {index} "
        f"expected {expected[index]!r}, got {got[index]!r}"
    )


def random_calls(
    comm: Communicator, seconds: float, seed: int, largest: int = LARGEST, calls: float = math.inf
) -> Iterator[int]:
    """Go on for ``seconds``, or ``calls`` calls; gives how many there have been, now and then."""
    common, own = random.Random(seed), random.Random(f"{seed} {comm.rank}")
    until = time.monotonic() + seconds
    number = 0
    part = comm.Dup()
    while number < calls and MPI.Intracomm(comm).bcast(time.monotonic() < until):
        if number % STRETCH == 0:
            part.Free()
            part = comm.Split(key=common.choice((-1, 1)) * comm.rank)
        for _ in range(TOGETHER):
            check(draw(common, number, comm.size, largest), part, MPI.Intracomm(part), seed, own)
            number += 1
        yield number
    part.Free()


def watched(numbers: Iterator[int], warm_up: int, found: list[Holdings]) -> Iterator[int]:
    """``numbers``; what this process holds after ``warm_up`` calls, and at the end, goes to ``found``."""
    for number in numbers:
        if number >= warm_up and not found:
            found.append(holdings())
        yield number
    found.append(holdings())


def allowed_growth(nranks: int, largest: int) -> Holdings:
    """The allocator may keep a call's arrays: two buffers, what is expected in them, and the input again."""
    return Holdings(memory=MEMORY + 6 * nranks * largest, descriptors=4, shared=4, threads=1)


def check_growth(comm: Communicator, found: list[Holdings], largest: int) -> list[dict[str, Any]] | None:
    """What each rank held before and at the end, where there were enough calls. Raises `Growth`."""
    if len(found) < 2:
        return None
    before, after = found
    grown = growth(before, after, allowed_growth(comm.size, largest))
    if grown:
        raise Growth(f"rank {comm.rank} of {comm.size} holds more than after the warm-up: {'; '.join(grown)}")
    held: list[dict[str, Any]] = comm.allgather({"before": asdict(before), "after": asdict(after)})
    return held


def small_calls(comm: Communicator, calls: int, seconds: float = math.inf) -> Iterator[int]:
    """As `random_calls`: at most ``calls`` calls of a few bytes, for at most ``seconds``."""
    native, rank, nranks = MPI.Intracomm(comm), comm.rank, comm.size
    send, recv, whole = np.zeros(3, np.int64), np.zeros(3, np.int64), np.zeros(3 * nranks, np.int64)
    ranks, between = nranks * (nranks - 1) // 2, np.arange(nranks).repeat(3).tolist()
    kinds: list[tuple[Callable[[int], None], Array, Callable[[int], list[int]]]] = [
        (lambda n: comm.Allreduce(send, recv), recv, lambda n: [nranks * n + ranks] * 3),
        (lambda n: comm.Allgather(send, whole), whole, lambda n: [n + other for other in between]),
        (lambda n: comm.Allreduce(send, recv, MPI.MAX), recv, lambda n: [n + nranks - 1] * 3),
        (lambda n: comm.Bcast(send, n % nranks), send, lambda n: [n + n % nranks] * 3),
    ]
    until = time.monotonic() + seconds
    done = 0
    while done < calls and native.bcast(time.monotonic() < until):
        for number in range(done, min(done + SMALL_TOGETHER, calls)):
            call, result, expected = kinds[number % len(kinds)]
            send[:] = number + rank
            call(number)
            if result.tolist() != expected(number):
                where = f"small call {number} on rank {rank} of {nranks}"
                raise Difference(f"{where}: expected {expected(number)}, got {result.tolist()}")
        done = number + 1
        yield done


def follow(comm: Communicator, what: str, numbers: Iterator[int]) -> int:
    """Go through to the end, saying on rank 0 how far it is; the number of calls."""
    began = said = time.monotonic()
    number = 0
    for number in numbers:
        if comm.rank == 0 and time.monotonic() > said + REPORT:
            said = time.monotonic()
            click.echo(f"{said - began:7.1f} s  {number:9} {what}")
    return number


@click.command()
@click.option("--seconds", default=120.0, show_default=True, help="Of random calls, at most.")
@click.option("--random-calls", "at_most", type=int, help="Random calls, at most; by default as time allows.")
@click.option("--calls", default=1_000_000, show_default=True, help="Small calls after that.")
@click.option("--seed", type=int, help="Of the random calls; by default another one each time.")
@click.option("--largest", default=LARGEST, show_default=True, help="Bytes of a rank's block, at most.")
@click.option(
    "--warm-up", default=WARM_UP, show_default=True, help="Random calls that may leave something behind."
)
@click.option("--transport", default="auto", show_default=True, help="As in mpicoll.Communicator.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write what was done to this file.")
def main(
    seconds: float,
    at_most: int | None,
    calls: int,
    seed: int | None,
    largest: int,
    warm_up: int,
    transport: str,
    file: Path | None,
) -> None:
    """Random collectives beside the MPI library's own, then many small ones; all must be right."""
    world = MPI.COMM_WORLD
    with abort_on_exception():
        seed = world.bcast(random.randrange(1 << 30) if seed is None else seed)
        comm = Communicator(world, transport=transport)
        flags = {"seed": seed, "transport": transport, "largest": largest, "warm_up": warm_up}
        report = about_job(comm, "python -m mpicoll.bench.stress", sys.argv[1:], flags)
        report["hosts"] = len(set(MPI.Intracomm(comm).allgather(MPI.Get_processor_name())))
        if comm.rank == 0:
            click.echo(f"{comm.size} ranks on {report['hosts']} hosts, {report['mpi']}, seed {seed}")
        began = time.monotonic()
        found: list[Holdings] = []
        numbers = random_calls(comm, seconds, seed, largest, math.inf if at_most is None else at_most)
        report["random_calls"] = follow(comm, "random calls", watched(numbers, warm_up, found))
        report["holdings"] = check_growth(comm, found, largest)
        report["small_calls"] = follow(comm, "small calls", small_calls(comm, calls))
        report["seconds"] = round(time.monotonic() - began, 1)
        comm.Free()
        if comm.rank == 0:
            conclude(report, file)


def conclude(report: dict[str, Any], file: Path | None) -> None:
    click.echo(f"all right: {report['random_calls']} random calls, {report['small_calls']} small calls")
    for rank, held in enumerate(report["holdings"] or ()):
        changes = [f"{name} {value} -> {held['after'][name]}" for name, value in held["before"].items()]
        click.echo(f"rank {rank} after the warm-up -> at the end: {', '.join(changes)}")
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
