"""``mpirun -np N mpicoll bench COLLECTIVE``: our collectives, as nccl-tests measures NVIDIA's.

For each size the contenders take turns: some calls of one, then of the next, several times over. Every result
is checked. "memcpy" is the limit: all ranks copying as many bytes within their own memory at once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import click
from mpi4py import MPI
from rich.console import Console

from mpicoll import Communicator

from . import options as command_line
from .contenders import Contender, Memory, allocated_memory, native, our_contenders, private_memory
from .data import Problem
from .jobs import WRONG, about_job, agreed, main, refusing, say
from .kinds import DTYPES, NO_ROOT, count_of
from .options import Options
from .report import comparison, entry, nccl_table, plot
from .timing import Settings, Timed, measure

WIDTH = 250  # characters; a comparison of many contenders is not to be broken into lines


@refusing
def run(comm: Communicator, args: Sequence[str], prog_name: str = "mpicoll bench") -> int:
    """The exit status, the same on every rank."""
    options = agreed(comm, partial(_parse, comm, args, prog_name))
    if options is None:
        return 0
    results, outside = _measure_all(comm, options)
    report = {
        "collective": options.collective,
        **about_job(comm, prog_name, args, vars(options)),
        **results,
    }
    if comm.rank == 0:
        _publish(report, outside, options)
    return WRONG if any(outside.values()) or _count_wrong(report) else 0


command = partial(main, run)


def _parse(comm: Communicator, args: Sequence[str], prog_name: str) -> Options | None:
    """None if only ``--help`` was wanted."""
    outcome = command_line.command.main(list(args), prog_name, standalone_mode=False)
    if not isinstance(outcome, Options):
        return None
    command_line.check_here(outcome, comm.rank, comm.size)
    return outcome


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
            say(comm, text)
        said.add(text)

    with _contenders(comm, options, max(problem.size for problem in problems)) as (contenders, memory):
        for number, problem in enumerate(problems, 1):
            say(comm, f"{problem} ({number} of {len(problems)})")
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
