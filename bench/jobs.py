"""Benchmarks as jobs of several ranks: options that all agree on, errors said once, facts about the job."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import click
from mpi4py import MPI

from mpicoll import Communicator
from mpicoll.faults import abort_on_exception

from .about import about
from .options import check_writable

USAGE_ERROR = 2  # the exit status of a command that was asked for what it cannot do
WRONG = 1  # ... of one that found a wrong result
THREAD_LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}

P = ParamSpec("P")
T = TypeVar("T")


@abort_on_exception()
def main(run: Callable[[Communicator, Sequence[str], str], int], args: Sequence[str], prog_name: str) -> None:
    """Measure as ``args`` say, on all ranks, and exit: 0, 1 after a wrong result, 2 if the user erred."""
    comm = Communicator(MPI.COMM_WORLD)
    status = run(comm, args, prog_name)
    comm.Free()
    sys.exit(status)


def refusing(run: Callable[Concatenate[Communicator, P], int]) -> Callable[Concatenate[Communicator, P], int]:
    """A decorator: `click.ClickException`, the same on every rank, becomes one message and a status."""

    @functools.wraps(run)
    def status(comm: Communicator, /, *args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return run(comm, *args, **kwargs)
        except click.ClickException as error:
            if comm.rank == 0:
                error.show()
            comm.Barrier()  # or the launcher might end rank 0 before it has spoken
            return USAGE_ERROR

    return status


def agreed(comm: Communicator, parse: Callable[[], T]) -> T:
    """This rank's options. What is wrong on any rank is raised on all of them; only rank 0 prints."""
    quiet = contextlib.nullcontext() if comm.rank == 0 else contextlib.redirect_stdout(StringIO())
    error = None
    try:
        with quiet:
            options = parse()
    except click.ClickException as raised:
        error = raised
    elsewhere = [message for message in comm.allgather(error and error.format_message()) if message]
    if error is not None:
        raise error
    if elsewhere:
        raise click.UsageError(elsewhere[0])
    return options


def parsed(
    comm: Communicator, command: click.Command, options: type[T], args: Sequence[str], prog_name: str
) -> T | None:
    """The ``options`` that ``command`` makes of ``args``, with a ``json`` that can be written.

    None if only ``--help`` was wanted. Raises `click.ClickException`.
    """
    outcome = command.main(list(args), prog_name, standalone_mode=False)
    if not isinstance(outcome, options):
        return None
    file: Path | None = outcome.json  # type: ignore[attr-defined]
    if file is not None and comm.rank == 0:  # which writes it
        check_writable("--json", file)
    return outcome


def say(comm: Communicator, text: str) -> None:
    """On stderr, once."""
    if comm.rank == 0:
        click.echo(text, err=True)


def about_job(
    comm: Communicator, prog_name: str, args: Sequence[str], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """What the results were measured on, and how."""
    library = MPI.Get_library_version().strip("\0").splitlines()[0].split(",")[0]
    return {
        "ranks": comm.size,
        **about(["mpirun", "-np", str(comm.size), *prog_name.split(), *args], flags),
        "mpi": " ".join(library.replace("Version:", "").split()),
        "thread_level": THREAD_LEVELS[MPI.Query_thread()],
    }
