"""What a user can set right: one exception for it, and how it reaches every rank."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mpi4py import MPI

T = TypeVar("T")


class InputError(ValueError):
    """Bad input from the user: one line that names it, what was expected and what to do.

    ``comm`` has the ranks that meet it, where those are not all that there were; see `mpicoll.train.elastic`.
    """

    comm: MPI.Intracomm | None = None


class AloneError(InputError):
    """Bad input that only this rank has met, while others go on and do not listen: it is to end the job."""


@contextmanager
def alone(in_step: bool) -> Iterator[None]:
    """An `InputError` in this block becomes an `AloneError`, unless ranks are ``in_step`` and share it."""
    try:
        yield
    except InputError as error:
        raise error if in_step else AloneError(str(error)) from error


def raise_on_all(comm: MPI.Intracomm, problem: str) -> None:
    """Raise `InputError`, on all ranks, if any has a ``problem``: the text, and who has it. Collective."""
    problems = comm.allgather((problem, platform.node()))
    found = [rank for rank, (text, _) in enumerate(problems) if text]
    if found:
        text, node = problems[found[0]]
        others = {0: "", 1: " and 1 other"}.get(len(found) - 1, f" and {len(found) - 1} others")
        raise InputError(f"{text} (rank {found[0]} on {node}{others})")


def on_rank_zero(comm: MPI.Intracomm, function: Callable[[], T]) -> T:
    """What ``function()`` returns on rank 0, on every rank.

    For what only rank 0 can see, such as files. An `InputError` on rank 0 is raised on every rank alike, so
    that nobody waits for a rank that has given up. The result travels pickled: keep it small.
    """
    value: T | None = None
    error: InputError | None = None
    if comm.rank == 0:
        try:
            value = function()
        except InputError as bad_input:
            error = bad_input
    value, error = comm.bcast((value, error), root=0)
    if error is not None:
        raise error
    return value
