"""``mpirun -np N mpicoll bench COLLECTIVE``: our collectives, as nccl-tests measures NVIDIA's.

For each size the contenders take turns: some calls of one, then of the next, several times over. Every result
is checked. "memcpy" is the limit: all ranks copying as many bytes within their own memory at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from io import StringIO
from typing import Any

import click
from mpi4py import MPI
from rich.console import Console

from mpicoll import Communicator
from mpicoll.faults import abort_on_exception
from mpicoll.info import cpu_model
from mpicoll.launch import usable_cpus

from . import options as command_line
from .contenders import Contender, Memory, allocated_memory, native, our_contenders, private_memory
from .data import Problem
from .kinds import DTYPES, NO_ROOT, count_of
from .options import Options
from .report import comparison, entry, nccl_table, plot
from .timing import Settings, Timed, measure

USAGE_ERROR = 2  # the exit status of a command that was asked for what it cannot do
WRONG = 1  # ... of one that found a wrong result
WIDTH = 250  # characters; a comparison of many contenders is not to be broken into lines
THREAD_LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}


@abort_on_exception()
def command(args: Sequence[str], prog_name: str) -> None:
    """Measure as ``args`` say, on all ranks, and exit: 0, 1 after a wrong result, 2 if the user erred."""
    comm = Communicator(MPI.COMM_WORLD)
    status = run(comm, args, prog_name)
    comm.Free()
    sys.exit(status)


def run(comm: Communicator, args: Sequence[str], prog_name: str = "mpicoll bench") -> int:
    """The exit status, the same on every rank."""
    try:
        options = _agreed_options(comm, args, prog_name)
        if options is None:
            return 0
        results, outside = _measure_all(comm, options)
    except click.ClickException as error:  # the same on every rank
        if comm.rank == 0:
            error.show()
        comm.Barrier()  # or the launcher might end rank 0 before it has spoken
        return USAGE_ERROR
    report = {**_about(comm, options, args), **results}
    if comm.rank == 0:
        _publish(report, outside, options)
    return WRONG if any(outside.values()) or _count_wrong(report) else 0


def _agreed_options(comm: Communicator, args: Sequence[str], prog_name: str) -> Options | None:
    """None if only ``--help`` was wanted. What is wrong on any rank is raised on all of them."""
    error = options = None
    quiet = contextlib.nullcontext() if comm.rank == 0 else contextlib.redirect_stdout(StringIO())
    try:
        with quiet:
            outcome = command_line.command.main(list(args), prog_name, standalone_mode=False)
        options = outcome if isinstance(outcome, Options) else None
        if options is not None:
            command_line.check_here(options, comm.rank, comm.size)
    except click.ClickException as raised:
        error = raised
    elsewhere = [message for message in comm.allgather(error and error.format_message()) if message]
    if error is not None:
        raise error
    if elsewhere:
        raise click.UsageError(elsewhere[0])
    return options


def _measure_all(comm: Communicator, options: Options) -> tuple[dict[str, Any], dict[str, int]]:
    """Results for the report; and for each contender, elements written outside of buffers."""
    problems = list(_problems(comm, options))
    settings = Settings(options.turns, options.iters, options.warmup_iters, options.check)
    results: dict[str, list[dict[str, Any]]] = {}
    outside: dict[str, int] = {}
    memcpy = []
    said: set[str] = set()

    def say_once(text: str) -> None:
        if text not in said:
            _say(comm, text)
        said.add(text)

    with _contenders(comm, options, max(problem.size for problem in problems)) as (contenders, memory):
        for number, problem in enumerate(problems, 1):
            _say(comm, f"{problem} ({number} of {len(problems)})")
            timed, copying = measure(comm, problem, contenders, memory, settings, say_once)
            memcpy.append({"size": problem.size, "time": copying * 1e6})
            for name, times in _by_contender(timed).items():
                results.setdefault(name, []).append(entry(problem, times))
                outside[name] = outside.get(name, 0) + sum(each.outside for each in times)
    contestants = [{"name": name, "results": rows} for name, rows in results.items()]
    return {"contenders": contestants, "memcpy": memcpy}, outside


def _problems(comm: Communicator, options: Options) -> Iterator[Problem]:
    """Every data type and operation in every size; sizes that are rounded to the same come once."""
    kind = options.kind
    root = options.root if kind.rooted else NO_ROOT
    for dtype, op in options.combinations():
        itemsize = DTYPES[dtype].itemsize
        counts = [count_of(kind, nbytes, itemsize, comm.size) for nbytes in options.sizes()]
        for count in dict.fromkeys(counts):
            yield Problem(options.collective, comm.rank, comm.size, count, dtype, op, root)


@contextlib.contextmanager
def _contenders(
    comm: Communicator, options: Options, nbytes: int
) -> Iterator[tuple[list[Contender], Memory]]:
    """Everyone to be measured, and the private memory among theirs."""
    private = private_memory(nbytes)
    memories = {"": private}
    if options.alloc:
        memories[" alloc"] = allocated_memory(comm, nbytes)
    found = list(our_contenders(comm, options.algorithms, memories, options.persistent))
    with contextlib.ExitStack() as stack:
        for name in options.compare:
            found.append(native(comm, private) if name == "native" else _gloo(stack, comm, private))
        yield found, private


def _gloo(stack: contextlib.ExitStack, comm: Communicator, memory: Memory) -> Contender:
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    apart = node.size < comm.size
    node.Free()
    if apart:
        raise click.BadParameter("gloo is compared with on one node only", param_hint="--compare")
    from .gloo import gloo  # PyTorch is optional, and takes seconds to import

    return stack.enter_context(gloo(comm, memory))


def _by_contender(timed: Sequence[Timed]) -> dict[str, list[Timed]]:
    found: dict[str, list[Timed]] = {}
    for each in timed:
        found.setdefault(each.contender, []).append(each)
    return found


def _say(comm: Communicator, text: str) -> None:
    if comm.rank == 0:
        click.echo(text, err=True)


def _about(comm: Communicator, options: Options, args: Sequence[str]) -> dict[str, Any]:
    """What the results were measured on, and how."""
    library = MPI.Get_library_version().strip("\0").splitlines()[0].split(",")[0]
    flags = {name: value for name, value in vars(options).items() if name not in ("json", "plot")}
    return {
        "collective": options.collective,
        "ranks": comm.size,
        "command": shlex.join(["mpirun", "-np", str(comm.size), "mpicoll", "bench", *args]),
        "date": date.today().isoformat(),
        "machine": {"cpu": f"{os.cpu_count()} × {cpu_model()}", "cores": usable_cpus()},
        "mpi": " ".join(library.replace("Version:", "").split()),
        "thread_level": THREAD_LEVELS[MPI.Query_thread()],
        "flags": flags,
    }


def _publish(report: dict[str, Any], outside: dict[str, int], options: Options) -> None:
    ranks_text = f"{report['ranks']} rank{'s' * (report['ranks'] != 1)}"
    for contender in report["contenders"]:
        name = contender["name"]
        heading = f"{report['collective']}, {name}, {ranks_text}, {report['mpi']}"
        written = outside[name] if options.check else None
        click.echo(nccl_table(heading, contender["results"], written) + "\n")
    if len(report["contenders"]) > 1:
        # Open MPI gives ranks a terminal, also where what they say goes to a file.
        Console(width=WIDTH, force_terminal=False).print(comparison(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot is not None:
        plot(report, options.plot)
    wrong = _count_wrong(report)
    if wrong or any(outside.values()):
        click.echo(f"Error: {wrong} wrong elements, {sum(outside.values())} outside of buffers", err=True)


def _count_wrong(report: dict[str, Any]) -> int:
    places = [
        row[place]
        for contender in report["contenders"]
        for row in contender["results"]
        for place in ("out_of_place", "in_place")
    ]
    return sum(place["nwrong"] or 0 for place in places if place is not None)
