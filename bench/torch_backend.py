"""``mpirun -np N mpicoll bench torch``: torch.distributed over mpicoll, beside gloo and our bare collectives.

All three work on the same memory in the same job and take turns; every result is checked. ``--ddp`` measures
steps of DistributedDataParallel instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from mpicoll import Communicator
from mpicoll.sizes import format_size

from .about import layout
from .data import Problem
from .jobs import WRONG, about_job, agreed, main, refusing, say
from .kinds import DTYPES, KINDS, NO_OPERATION, NO_ROOT, OPERATIONS, count_of, sizes
from .options import as_size, check_writable, json_option
from .timing import Settings

TYPE = "float"
ITEMSIZE = DTYPES[TYPE].itemsize
# The functions of torch.distributed that are measured, and what the other benchmarks call the collective.
CALLS = {
    "all_reduce": "allreduce",
    "broadcast": "broadcast",
    "all_gather_into_tensor": "allgather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "alltoall",
}
OF_COLLECTIVES = ("collective", "minbytes", "maxbytes", "factor", "iters", "warmup")  # nothing to --ddp
NO_TORCH = "torch.distributed needs PyTorch, which is not installed: pip install 'mpicoll[torch]'"
WIDTH = 160  # characters; tables are not to be broken into lines

Facts = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the command line says. Sizes are in bytes."""

    collective: tuple[str, ...]
    minbytes: int
    maxbytes: int
    factor: int
    iters: int | None
    warmup: int
    turns: int
    ddp: bool
    json: Path | None


@click.command("torch", context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option(
    "--collective",
    type=click.Choice(list(CALLS)),
    multiple=True,
    help="Measure this one. May be repeated.  [default: all]",
)
@click.option(
    "-b", "--min", "minbytes", metavar="SIZE", callback=as_size, default="4", help="The smallest size."
)
@click.option(
    "-e", "--max", "maxbytes", metavar="SIZE", callback=as_size, default="64M", help="The largest size."
)
@click.option("-f", "--factor", type=click.IntRange(min=2), default=4, help="From one size to the next.")
@click.option(
    "-n", "--iters", type=click.IntRange(min=1), help="Calls in a turn.  [default: as many as take 20 ms]"
)
@click.option("-w", "--warmup", type=click.IntRange(min=0), default=5, help="Calls before the first.")
@click.option("--turns", type=click.IntRange(min=1), default=5, help="Turns of each; the median counts.")
@click.option("--ddp", is_flag=True, help="Measure steps of DistributedDataParallel, not collectives.")
@json_option
def _command(**given: Any) -> Options:
    """Measure torch.distributed over mpicoll, beside gloo, on all ranks that mpirun started.

    Collectives are those of float32 tensors, on the same memory over mpicoll, over gloo, and by the process
    group's `Communicator` itself. Times are in microseconds, of the slowest rank, each rank with one thread;
    sizes are those of `mpicoll bench COLLECTIVE`.

    With --ddp: a step (forward, backward, optimizer) of a multilayer perceptron and of ResNet-18, in
    milliseconds, with gradients averaged over mpicoll, over gloo, and not at all (no_sync). "not hidden" is
    the part of a step by which it is longer than one without communication.

    The exit status is 1 if a collective gives a wrong result, or if gradients or losses over mpicoll and over
    gloo differ by more than a thousandth.

    \b
    Examples:
      mpirun -np 2 mpicoll bench torch --json torch.json
      mpirun -np 2 mpicoll bench torch --ddp --json torch-ddp.json
    """
    options = Options(**{**given, "collective": tuple(dict.fromkeys(given["collective"])) or tuple(CALLS)})
    if options.ddp:
        _refuse_with_ddp(click.get_current_context())
    if options.minbytes > options.maxbytes:
        smallest, largest = format_size(options.minbytes), format_size(options.maxbytes)
        raise click.UsageError(f"expected -b/--min up to -e/--max; got {smallest} and {largest}")
    if options.minbytes % ITEMSIZE:
        raise click.BadParameter(
            f"expected a multiple of {ITEMSIZE}, the bytes of an element; got {options.minbytes}",
            param_hint="-b/--min",
        )
    return options


def _refuse_with_ddp(context: click.Context) -> None:
    """What cannot make a difference is refused, rather than thought to have made one."""
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") != ParameterSource.DEFAULT
        if given and parameter.name in OF_COLLECTIVES:
            flag = parameter.opts[-1]
            raise click.UsageError(f"{flag} is for collectives; expected only --turns and --json with --ddp")


@refusing
def run(comm: Communicator, args: Sequence[str], prog_name: str = "mpicoll bench torch") -> int:
    """The exit status, the same on every rank."""
    options = agreed(comm, partial(_parse, comm, args, prog_name))
    if options is None:
        return 0
    known = about_job(comm, prog_name, args, vars(options))
    measured, table, errors = (_steps if options.ddp else _collectives)(comm, options)
    if comm.rank == 0:
        # Open MPI gives ranks a terminal, also where what they say goes to a file.
        Console(width=WIDTH, force_terminal=False).print(table)
        if options.json is not None:
            options.json.write_text(layout({**known, **measured}))
    for error in errors:
        say(comm, f"Error: {error}")
    return WRONG if errors else 0


command = partial(main, run)


def _parse(comm: Communicator, args: Sequence[str], prog_name: str) -> Options | None:
    """None if only ``--help`` was wanted."""
    outcome = _command.main(list(args), prog_name, standalone_mode=False)
    if not isinstance(outcome, Options):
        return None
    if find_spec("torch") is None:
        raise click.UsageError(NO_TORCH)
    if outcome.json is not None and comm.rank == 0:
        check_writable("--json", outcome.json)
    return outcome


# -- collectives


def _collectives(comm: Communicator, options: Options) -> tuple[Facts, Table, list[str]]:
    """The report's part, its table, and what is wrong; collective."""
    from .torch_calls import measured, version  # PyTorch is optional, and takes seconds to import

    problems = [
        (call, _problem(comm, CALLS[call], count))
        for call in options.collective
        for count in _counts(CALLS[call], options, comm.size)
    ]
    settings = Settings(options.turns, options.iters, options.warmup, check=True)
    rows = list(measured(comm, problems, settings))
    errors = [
        f"{row['call']} {format_size(row['size'])}: {wrong} wrong elements, {name}"
        for row in rows
        for name, wrong in row["nwrong"].items()
        if wrong
    ]
    return {"torch": version(), "rows": rows}, _collectives_table(comm.size, rows), errors


def _counts(collective: str, options: Options, nranks: int) -> list[int]:
    """Sizes that are rounded to the same come once."""
    counts = [
        count_of(KINDS[collective], nbytes, ITEMSIZE, nranks)
        for nbytes in sizes(options.minbytes, options.maxbytes, options.factor, None)
    ]
    return list(dict.fromkeys(counts))


def _problem(comm: Communicator, collective: str, count: int) -> Problem:
    kind = KINDS[collective]
    operation, root = OPERATIONS[0] if kind.reduces else NO_OPERATION, 0 if kind.rooted else NO_ROOT
    return Problem(collective, comm.rank, comm.size, count, TYPE, operation, root)


def _collectives_table(nranks: int, rows: Sequence[Facts]) -> Table:
    title = f"float32 tensors, {_ranks(nranks)}; µs"
    table = _table(title, "call")
    for heading in ("size", "mpicoll", "Communicator", "gloo", "memcpy"):
        table.add_column(heading, justify="right")
    for heading in ("gloo / mpicoll", "mpicoll - Communicator", "mpicoll / Communicator", "#wrong"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = [f"{row[name]:.2f}" for name in ("mpicoll", "communicator", "gloo", "memcpy")]
        ratios = f"{row['gloo_ratio']:.2f}", f"{row['overhead']:.2f}", f"{row['communicator_ratio']:.3f}"
        wrong = str(sum(row["nwrong"].values()))
        table.add_row(row["call"], format_size(row["size"]), *times, *ratios, wrong)
    return table


# -- steps


def _steps(comm: Communicator, options: Options) -> tuple[Facts, Table, list[str]]:
    """As `_collectives`."""
    from .torch_calls import version
    from .torch_steps import TOLERANCE, measured

    rows = list(measured(comm, options.turns))
    errors = [
        f"{row['model']}: expected {what} over mpicoll and gloo that agree to {TOLERANCE:g}, got a relative "
        f"difference of {row[key]:.2g}"
        for row in rows
        for key, what in (("gradients_differ", "gradients"), ("losses_differ", "losses"))
        if not row[key] <= TOLERANCE  # NaN is no agreement
    ]
    return {"torch": version(), "steps": rows}, _steps_table(comm.size, rows), errors


def _steps_table(nranks: int, rows: Sequence[Facts]) -> Table:
    table = _table(f"a step of DistributedDataParallel, {_ranks(nranks)}; ms", "model")
    for heading in ("parameters", "batch a rank", "mpicoll", "gloo", "no_sync"):
        table.add_column(heading, justify="right")
    for heading in ("gloo / mpicoll", "not hidden", "gloo's"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = [f"{row[name] / 1000:.3f}" for name in ("mpicoll", "gloo", "no_sync")]
        parts = [f"{row[name]:.1%}" for name in ("not_hidden", "gloo_not_hidden")]
        sizes_ = f"{row['parameters']:,}", str(row["batch"])
        table.add_row(row["model"], *sizes_, *times, f"{row['gloo_ratio']:.2f}", *parts)
    return table


def _ranks(nranks: int) -> str:
    return f"{nranks} rank{'s' * (nranks != 1)}"


def _table(title: str, first: str) -> Table:
    table = Table(box=None, title=f"# {title}", title_justify="left")
    table.add_column(first)
    return table
