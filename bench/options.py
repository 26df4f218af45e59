"""The command line of ``mpicoll bench``: nccl-tests' flags and some of our own. Needs no MPI."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from mpicoll import algorithms
from mpicoll.launch import LauncherError, find_mpirun, library_of
from mpicoll.sizes import format_size, parse_size

from .kinds import DTYPES, KINDS, NO_OPERATION, OPERATIONS, SIGNIFICANT_BITS, Kind, sizes

ALL = "all"
AUTO = "auto"
T = TypeVar("T")

TORCH_MISSING = "gloo needs PyTorch, which is not installed: pip install 'mpicoll[torch]'"


def as_size(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """A callback of click's: bytes."""
    if text is None:
        return None
    try:
        size = parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error).removeprefix("size: ")) from None
    if size < 1:
        raise click.BadParameter(f"expected at least 1 byte, got {text!r}")
    return size


json_option = click.option(
    "--json", metavar="FILE", type=click.Path(path_type=Path, readable=False), help="Write the results here."
)


@dataclass(frozen=True)
class Options:
    """What the command line says, with what it leaves out filled in."""

    collective: str
    minbytes: int
    maxbytes: int
    stepfactor: int | None
    stepbytes: int | None
    iters: int | None
    warmup_iters: int
    check: bool
    datatypes: tuple[str, ...]
    ops: tuple[str, ...]
    root: int
    compare: tuple[str, ...]
    alloc: bool
    persistent: bool
    algorithms: tuple[str, ...]
    turns: int
    json: Path | None
    plot: Path | None

    @property
    def kind(self) -> Kind:
        return KINDS[self.collective]

    def sizes(self) -> Iterable[int]:
        return sizes(self.minbytes, self.maxbytes, self.stepfactor, self.stepbytes)

    def combinations(self) -> list[tuple[str, str]]:
        """Data types and operations, those together that go together."""
        pairs = itertools.product(self.datatypes, self.ops)
        return [(dtype, op) for dtype, op in pairs if op != "avg" or dtype in SIGNIFICANT_BITS]


@click.command("bench", context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("collective", metavar="COLLECTIVE", type=click.Choice(list(KINDS)))
@click.option(
    "-b",
    "--minbytes",
    metavar="SIZE",
    callback=as_size,
    default="8",
    help="The smallest size, such as 8, 4K or 64M.",
)
@click.option("-e", "--maxbytes", metavar="SIZE", callback=as_size, default="64M", help="The largest size.")
@click.option("-f", "--stepfactor", type=click.IntRange(min=2), help="Multiply sizes by this.  [default: 2]")
@click.option("-i", "--stepbytes", metavar="SIZE", callback=as_size, help="Add this to sizes instead.")
@click.option(
    "-n", "--iters", type=click.IntRange(min=1), help="Calls in a turn.  [default: as many as take 20 ms]"
)
@click.option("-w", "--warmup_iters", type=click.IntRange(min=0), default=5, help="Calls before the first.")
@click.option("-c", "--check", type=click.IntRange(0, 1), default=1, help="Whether to check results.")
@click.option("-d", "--datatype", type=click.Choice([*DTYPES, ALL]), default="float", help="NCCL's names.")
@click.option("-o", "--op", type=click.Choice([*OPERATIONS, ALL]), help="For reductions.  [default: sum]")
@click.option("-r", "--root", type=int, help="For broadcast and reduce: the rank.  [default: 0]")
@click.option(
    "--compare",
    type=click.Choice(["native", "gloo"]),
    multiple=True,
    help="Measure others, too, in turn with ours: the MPI library's own, PyTorch's gloo. May be repeated.",
)
@click.option("--alloc", is_flag=True, help="Measure buffers from comm.alloc, too.")
@click.option("--persistent", is_flag=True, help="Measure persistent calls, too.")
@click.option("--algorithm", metavar="NAME[,NAME...]", default=AUTO, help="Measure each of these.")
@click.option("--turns", type=click.IntRange(min=1), default=5, help="Turns of each; the median counts.")
@json_option
@click.option(
    "--plot",
    metavar="FILE.png",
    type=click.Path(path_type=Path, readable=False),
    help="Draw time over size here.",
)
def command(datatype: str, op: str | None, algorithm: str, root: int | None, **given: Any) -> Options:
    """Measure a collective on all ranks that mpirun started, as nccl-tests does on GPUs.

    COLLECTIVE is one of allreduce, reduce_scatter, broadcast, allgather, reduce, alltoall, sendrecv.

    Three others have options of their own: `mpicoll bench gradients --help` (many gradients at once, beside
    the backward pass), `mpicoll bench torch --help` (torch.distributed over mpicoll, beside gloo) and
    `mpicoll bench kernels --help` (what ranks do by themselves; without mpirun).

    Times are in microseconds, bandwidths in 10^9 bytes per second. Those who are measured take turns; a turn
    is some calls, one after the other, and its time is the slowest rank's mean. #wrong counts the wrong
    elements of all ranks. The exit status is 1 if there are any.

    Sizes are of one rank's buffer; for reduce_scatter, allgather and alltoall of all blocks that a rank
    gives or gets, rounded down to whole elements in each block. Broadcast has one buffer, and sendrecv sends
    around a ring; both have the first column only.

    \b
    Examples:
      mpirun -np 2 mpicoll bench allreduce -e 1M
      mpirun -np 2 mpicoll bench allreduce --compare native --persistent --json allreduce.json
    """
    kind = KINDS[given["collective"]]
    _check_relevance(given["collective"], kind, op, root, given["alloc"] or given["persistent"])
    if given["stepbytes"] is not None and given["stepfactor"] is not None:
        raise click.UsageError("expected -f/--stepfactor or -i/--stepbytes; got both")
    if given["stepbytes"] is None and given["stepfactor"] is None:
        given["stepfactor"] = 2
    operations = OPERATIONS if op == ALL else (op or OPERATIONS[0],)
    options = Options(
        datatypes=tuple(DTYPES) if datatype == ALL else (datatype,),
        ops=operations if kind.reduces else (NO_OPERATION,),
        root=root or 0,
        algorithms=_algorithms(given["collective"], kind, algorithm),
        **{**given, "check": bool(given["check"]), "compare": tuple(dict.fromkeys(given["compare"]))},
    )
    _check_sizes(options)
    return options


def _check_relevance(collective: str, kind: Kind, op: str | None, root: int | None, forms: bool) -> None:
    """What cannot make a difference is refused, rather than thought to have made one."""
    if op is not None and not kind.reduces:
        raise click.UsageError(f"-o/--op is for reductions; {collective} is none")
    if root is not None and not kind.rooted:
        raise click.UsageError(f"-r/--root is for broadcast and reduce; {collective} has no root")
    if forms and not kind.ours:
        raise click.UsageError(f"--alloc and --persistent are for our collectives; {collective} is MPI's own")


def _algorithms(collective: str, kind: Kind, text: str) -> tuple[str, ...]:
    allowed = (AUTO, *(algorithms.names(collective) if kind.ours else ()))
    chosen = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in chosen:
        if name not in allowed:
            expected = f"expected one of {', '.join(allowed)} for {collective}, or several with commas"
            raise click.BadParameter(f"{expected}; got {name!r}", param_hint="--algorithm")
    return chosen


def _check_sizes(options: Options) -> None:
    if options.minbytes > options.maxbytes:
        smallest, largest = format_size(options.minbytes), format_size(options.maxbytes)
        raise click.UsageError(f"expected -b/--minbytes up to -e/--maxbytes; got {smallest} and {largest}")
    if not options.combinations():
        raise click.UsageError(f"avg is for floating data types; {options.datatypes[0]} is none")
    itemsize = max(DTYPES[name].itemsize for name in options.datatypes)
    for flag, size in (("-b/--minbytes", options.minbytes), ("-i/--stepbytes", options.stepbytes or 0)):
        if size % itemsize:
            raise click.BadParameter(
                f"expected a multiple of {itemsize}, the bytes of an element; got {size}", param_hint=flag
            )


def check_here(options: Options, rank: int, nranks: int) -> None:
    """What depends on this rank and where it runs. `click.UsageError`, before anything is measured."""
    if not 0 <= options.root < nranks:
        raise click.BadParameter(
            f"expected a rank from 0 to {nranks - 1}, got {options.root}", param_hint="-r/--root"
        )
    if "gloo" in options.compare and find_spec("torch") is None:
        raise click.BadParameter(TORCH_MISSING, param_hint="--compare")
    if rank == 0:  # which writes the files
        _check_files(options)


def _check_files(options: Options) -> None:
    if options.plot is not None and options.plot.suffix != ".png":
        raise click.BadParameter(f"expected a name in .png, got {options.plot}", param_hint="--plot")
    if options.plot is not None and find_spec("matplotlib") is None:
        raise click.BadParameter(
            "needs matplotlib, which is not installed: pip install 'mpicoll[plots]'", param_hint="--plot"
        )
    for flag, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None:
            check_writable(flag, path)


def check_writable(flag: str, path: Path) -> None:
    """Raise `click.BadParameter` unless there is, or can be, a file that can be written."""
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise click.BadParameter(
            f"expected a file that can be written, but {path}: {error.strerror}", param_hint=flag
        ) from error
    if not existed:
        path.unlink()


def read_results(file: Path, loads: Callable[[str], T]) -> T:
    """What ``--json`` wrote, by the report's ``loads``. Raises `click.BadParameter` for any other file."""
    try:
        return loads(file.read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise click.BadParameter(f"{file}: not what --json writes: {error!r}", param_hint="--from") from None


def found_launcher() -> tuple[str, str]:
    """The `mpirun` that starts a benchmark's jobs, and its library. Raises `click.ClickException`."""
    try:
        mpirun = find_mpirun()
        return mpirun, library_of(mpirun)
    except LauncherError as error:
        raise click.ClickException(str(error)) from None
