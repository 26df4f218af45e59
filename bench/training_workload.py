"""What the speed of training is measured on: synthetic samples, ranks on cores of their own, and turns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import click
import numpy as np
from mpi4py import MPI

from mpicoll import Communicator
from mpicoll.train import Dataset
from mpicoll.train.seeds import random_stream

from .options import check_writable

CLASSES = 10
LOOK = 0.002  # seconds between looks of a rank that waits: the cores are for the others

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    batch: int
    steps: int
    repeat: int
    json: Path | None


def parse(command: click.Command, comm: Communicator, args: Sequence[str], prog_name: str) -> Options | None:
    """This rank's options; None if only ``--help`` was wanted. Raises `click.ClickException`."""
    outcome = command.main(list(args), prog_name, standalone_mode=False)
    if not isinstance(outcome, Options):
        return None
    if outcome.batch % comm.size:  # or DDP's mean of means would not be the batch's
        raise click.BadParameter(
            f"expected a multiple of the {comm.size} ranks, got {outcome.batch}", param_hint="--batch"
        )
    if outcome.json is not None and comm.rank == 0:
        check_writable("--json", outcome.json)
    return outcome


def synthetic(samples: int, inputs: int, seed: int = 0) -> Dataset:
    """Points x [samples, inputs], and the largest of ten random projections of each; none to test with."""
    random = random_stream(seed, "synthetic")
    x = random.standard_normal((samples, inputs), np.float32)
    y = (x @ random.standard_normal((inputs, CLASSES), np.float32)).argmax(axis=1)
    return Dataset("synthetic", CLASSES, x, y, x[:0], y[:0])


def check_cores(comm: Communicator) -> None:
    """Raise `click.ClickException`, on every rank, unless each has a core of its own on this node."""
    node = MPI.Intracomm(comm).Split_type(MPI.COMM_TYPE_SHARED)
    cores: set[int] = set().union(*node.allgather(os.sched_getaffinity(0)))
    enough = comm.allreduce(len(cores) >= node.size == comm.size, MPI.LAND)
    node.Free()
    if not enough:
        raise click.ClickException(
            f"expected ranks on one node, with a core for each, got {comm.size} ranks and {len(cores)} "
            "cores; start fewer"
        )


@contextmanager
def own_core(comm: Communicator) -> Iterator[None]:
    """This thread on one core, another one on each rank; threads that there are already stay free."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {_core(comm, before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _core(comm: Communicator, cores: set[int]) -> int:
    """mpirun has bound the ranks itself, or else all have the same cores."""
    every = comm.allgather(cores)
    shared = all(cores == every[0] for cores in every)
    return sorted(cores)[comm.rank % len(cores) if shared else 0]


def alone(comm: Communicator, action: Callable[[], T], rank: int = 0) -> T:
    """What ``action()`` gives on ``rank``, on every rank; the others sleep meanwhile. Collective."""
    found = action() if comm.rank == rank else None
    done = MPI.Intracomm(comm).Ibarrier()
    while not done.Test():
        time.sleep(LOOK)
    result: T = comm.bcast(found, root=rank)
    return result
