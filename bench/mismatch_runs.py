"""A job of `mpicoll.bench.mismatches`: ``mpirun ... python -m mpicoll.bench.mismatch_runs FOLDER``

Reads cases from ``FOLDER/cases``; each rank writes a line for each into ``FOLDER/rank R``, when it is over.
All ranks begin a case together, on a communicator of its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll import communicator as communicators
from mpicoll.communicator import Communicator
from mpicoll.faults import FAULTS
from mpicoll.transports import hierarchical

from .mismatch_cases import REDUCTIONS, Call, Case, Outcome

Array = npt.NDArray[Any]

TIMEOUT = 8.0  # seconds without progress that count as a hang
POLL = 0.001  # seconds between looks at a barrier
WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size


def values(call: Call, rank: int, blocks: int) -> Array:
    """What a rank gives, different from the others': small enough that a sum of all fits."""
    return np.asarray((np.arange(call.count * blocks) + 3 * rank) % 11 + 1, call.dtype)


def total(call: Call, blocks: int) -> Array:
    ufunc: Any = {"SUM": np.add, "MIN": np.minimum, "MAX": np.maximum}[call.operation]
    return np.asarray(reduce(ufunc, [values(call, rank, blocks) for rank in range(SIZE)]))


def prepared(call: Call) -> tuple[tuple[Any, ...], Array | None, Array | None]:
    """The arguments of a call, where its result comes, and what it is if all ranks make this call."""
    count, at_root = call.count, call.root == RANK
    mine = slice(RANK * count, (RANK + 1) * count)
    empty: Callable[[int], Array] = lambda blocks: np.zeros(blocks * count, call.dtype)  # noqa: E731
    if call.method == "Barrier":
        return (), None, None
    if call.method == "Bcast":
        data = values(call, RANK, 1)
        return (data, call.root), data, values(call, call.root, 1)
    if call.method in REDUCTIONS:
        blocks = SIZE if call.method == "Reduce_scatter_block" else 1
        whole = total(call, blocks)
        rooted = (call.root,) if call.method == "Reduce" else ()
        target = empty(1)
        arguments = (values(call, RANK, blocks), target, getattr(MPI, call.operation), *rooted)
        result = whole[mine] if blocks > 1 else whole
        return arguments, *((target, result) if at_root or not rooted else (None, None))
    if call.method == "Scatter":
        target = empty(1)
        return (values(call, RANK, SIZE), target, call.root), target, values(call, call.root, SIZE)[mine]
    target = empty(SIZE)
    if call.method == "Alltoall":
        return (
            (values(call, RANK, SIZE), target),
            target,
            np.concatenate([values(call, rank, SIZE)[mine] for rank in range(SIZE)]),
        )
    gathered = np.concatenate([values(call, rank, 1) for rank in range(SIZE)])
    if call.method == "Allgather":
        return (values(call, RANK, 1), target), target, gathered
    return (values(call, RANK, 1), target, call.root), *((target, gathered) if at_root else (None, None))


def perform(comm: Communicator, call: Call, arguments: tuple[Any, ...]) -> None:
    if call.form == "blocking":
        getattr(comm, call.method)(*arguments)
    elif call.form == "nonblocking":
        getattr(comm, f"I{call.method.lower()}")(*arguments).Wait()
    else:
        plan = getattr(comm, f"{call.method}_init")(*arguments)
        plan.Start()
        plan.Wait()


def meet(comm: Communicator, case: Case) -> Outcome:
    """This rank's part of a case."""
    returned = wrong = 0
    error: BaseException | None = None
    start = time.monotonic()
    try:
        for call in case.other if case.odd == RANK else case.usual:
            arguments, target, result = prepared(call)
            perform(comm, call, arguments)
            returned += 1
            if target is not None and result is not None:
                wrong += not np.array_equal(target, result)
        if case.kind == "exit" and case.odd == RANK:
            sys.exit()
        comm.Barrier()
        comm.Ibarrier().Wait()  # nonblocking calls travel in messages, which have an order of their own
    except FAULTS as met:
        error = met
    name = type(error).__name__ if error is not None else ""
    return Outcome(name, str(error or ""), returned, wrong, round(time.monotonic() - start, 3))


def together() -> None:
    """Wait for all ranks, and leave them the processor meanwhile."""
    barrier = WORLD.Ibarrier()
    while not barrier.Test():
        time.sleep(POLL)


def pretend_nodes() -> None:
    """From now on communicators see two nodes, the first half of the ranks on one."""
    here = int(RANK >= (SIZE + 1) // 2)
    hierarchical.node_of = lambda comm: MPI.Intracomm(comm.Split(here))
    # They share one machine's cores, and must not spin.
    communicators.count_cores = lambda node: 0  # type: ignore[attr-defined]


def cases(folder: Path) -> Iterator[Case]:
    return map(Case.of, json.loads((folder / "cases").read_text()))


def main() -> None:
    folder = Path(sys.argv[1])
    todo = list(cases(folder))
    transport = todo[0].transport
    if transport == "nodes":
        pretend_nodes()
    algorithm = "hierarchical" if transport == "nodes" else "auto"
    base = Communicator(WORLD, algorithm, "messages" if transport == "messages" else "auto", TIMEOUT)
    with (folder / f"rank {RANK}").open("w") as file:
        for case in todo:
            comm = base.Dup()  # never freed: nobody would come to that
            together()
            outcome = meet(comm, case)
            print(json.dumps({"number": case.number, "outcome": asdict(outcome)}), file=file, flush=True)
    # Communicators that are broken cannot be freed, nor can what they use.


if __name__ == "__main__":
    main()
