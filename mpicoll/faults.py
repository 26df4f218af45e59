"""Faults: the errors of a collective that cannot be completed, and what happens to the job when a rank fails.

MPI knows nothing of Python's exceptions. A rank that leaves with a traceback finalises MPI on its way out,
and the others wait for it for ever. Here such an exception ends the whole job, with its traceback, at once.
How ranks find out what is wrong with others is in `mpicoll.watch`.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from mpi4py import MPI


class MismatchError(RuntimeError):
    """The ranks of a communicator are in different collectives, or in one with different arguments."""


class RankFailedError(RuntimeError):
    """Another rank, for which this one waits, has ended or has left the collective with an exception.

    ``ranks``: those of the communicator that are known to have ended; empty where a rank lives on.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class DeadlineError(RuntimeError):
    """A collective has made no progress for ``MPICOLL_TIMEOUT`` seconds; says where every rank is."""


FAULTS = (MismatchError, RankFailedError, DeadlineError)  # after which a communicator is of no use


def outlives_ranks() -> bool:
    """Whether this job goes on when a rank has died: with Open MPI's ``mpirun --with-ft ulfm``."""
    enabled = os.environ.get("OMPI_MCA_mpi_ft_enable", "")  # noqa: SIM112  (so Open MPI writes it)
    return enabled.lower() in ("1", "true", "yes")


ABORT_CODE = 1  # the job's exit status; what Python itself uses for an unhandled exception


@contextmanager
def abort_on_exception(comm: MPI.Comm | None = None) -> Iterator[None]:
    """An exception that leaves this block on any rank ends the job of all ranks of ``comm`` (default: world).

    Also a decorator: ``@abort_on_exception()`` before ``def main():``. The failing rank prints its rank,
    host and traceback; the job's exit status is 1. `SystemExit` passes, for it is no failure. With one
    rank, or without a running MPI, the exception is raised as usual.
    """
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        _abort_job(comm, error)
        raise


def abort_job_on_exception(comm: MPI.Comm | None = None) -> None:
    """From now on an unhandled exception on any rank ends the job of all ranks of ``comm`` (default: world).

    One line at the top of any mpi4py program. It puts a hook before `sys.excepthook`, which is still called
    with one rank, or without a running MPI. See `abort_on_exception` for the same around a block.
    """
    previous_hook = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _abort_job(comm, error.with_traceback(trace))
        previous_hook(kind, error, trace)

    sys.excepthook = hook


def _abort_job(comm: MPI.Comm | None, error: BaseException) -> None:
    """Print ``error`` and end the job; return where there are no other ranks to end."""
    if not MPI.Is_initialized() or MPI.Is_finalized():
        return
    world = MPI.COMM_WORLD if comm is None else comm
    if world.size == 1:
        return
    where = f"rank {world.rank} of {world.size} on {MPI.Get_processor_name()}"
    lines = traceback.format_exception(error)
    sys.stdout.flush()
    # One write, so that the ranks' reports do not mix when several fail together.
    sys.stderr.write(f"mpicoll: unhandled exception on {where}; the whole job ends\n{''.join(lines)}")
    sys.stderr.flush()
    world.Abort(ABORT_CODE)
    os._exit(ABORT_CODE)  # MPICH's Abort may return before the job has ended; nothing is to follow it
