"""The ``mpicoll`` command. Every subcommand has ``--help`` with an example, and ``--json``.

Subcommands that need MPI, or packages that are slow to import, live in modules of their own, which are
imported when they are called: ``mpicoll verify`` works where mpi4py is not installed.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mpicoll import algorithms, exchange
from mpicoll.algorithms.hierarchical import NAME, Topology
from mpicoll.reproducible import OrderProof, verify_orders
from mpicoll.schedule import COLLECTIVES
from mpicoll.schedule_options import MAX_RANKS, as_nodes
from mpicoll.verify import (
    Row,
    ScheduleError,
    one_row,
    rank_list,
    verify,
    verify_all,
    verify_hierarchical,
)

ORDER_UP_TO = 16  # ranks; a sum over more does not fit on a line

# Subcommand: the module whose `command` it is, and its line in the list of subcommands.
DEFERRED = {
    "draw": ("mpicoll.draw.command", "Draw what an algorithm does: as text, a picture, or a page."),
    "bench": ("mpicoll.bench.command", "Measure collectives, gradients, kernels or DDP, beside their peers."),
    "trace": ("mpicoll.trace.command", "Sum up a trace: phases, overlap, stragglers, bytes; as HTML, too."),
    "export": ("mpicoll.exchange.command", "Write a schedule for other tools: MSCCL XML or GOAL."),
    "simulate": ("mpicoll.simulate.command", "Predict times on machines of any size; map the fastest."),
    "tune": ("mpicoll.tune.command", "Measure which algorithms are the fastest here; fit a machine."),
    "where": ("mpicoll.where", "Show where every rank of a running job is."),
    "info": ("mpicoll.info", "Show what a bug report needs: versions, MPI library, ranks, CPUs, GPUs."),
}


def parse_ranks(text: str) -> list[int]:
    """The numbers in a list such as ``1-33,64``, ascending, each once; `ValueError` says what is wrong."""
    ranks: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"expected numbers and ranges such as 1-33,64; got {part!r} in {text!r}")
        low, high = int(first), int(last if dash else first)
        if not 1 <= low <= high <= MAX_RANKS:
            allowed = f"numbers from 1 to {MAX_RANKS}, the smaller one of a range first"
            raise ValueError(f"expected {allowed}; got {part!r} in {text!r}")
        ranks.update(range(low, high + 1))
    return sorted(ranks)


def _ranks_option(ctx: click.Context, param: click.Parameter, text: str) -> list[int]:
    try:
        return parse_ranks(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mpicoll")
def main() -> None:
    """Collective communication written by hand, in Python, over any MPI.

    \b
    Example:
      mpicoll verify allreduce --algorithm ring --ranks 4
    """


@main.command("verify")
@click.argument(
    "collective", metavar="[COLLECTIVE]", required=False, type=click.Choice(list(algorithms.ALGORITHMS))
)
@click.option("--algorithm", metavar="NAME", help="Only this algorithm; COLLECTIVE must be given.")
@click.option("--all", "everything", is_flag=True, help="Every algorithm of every collective.")
@click.option(
    "--ranks",
    metavar="LIST",
    callback=_ranks_option,
    default="1-33,64,127,128",
    show_default=True,
    help="Rank counts to verify at; every root up to 33 ranks, four roots beyond.",
)
@click.option(
    "--shards",
    metavar="N",
    type=click.IntRange(1, MAX_RANKS),
    help="Prove that sums of N shards have the same order at all rank counts; for allreduce.",
)
@click.option(
    "--nodes",
    metavar="LIST",
    callback=as_nodes,
    help="Ranks of each node, such as 2,3; for --algorithm hierarchical.",
)
@click.option(
    "--file",
    "path",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help="The schedule in this file: MSCCL's XML or GOAL, see mpicoll export.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def verify_command(
    collective: str | None,
    algorithm: str | None,
    everything: bool,
    ranks: list[int],
    shards: int | None,
    nodes: Topology | None,
    path: str | None,
    as_json: bool,
) -> None:
    """Prove that algorithms compute their collective, symbolically and without MPI.

    COLLECTIVE is one of allreduce, reduce_scatter, allgather, broadcast, reduce, gather, scatter, alltoall,
    barrier.

    Every rank's contribution must reach the result exactly once, nothing may be read before it is there, and
    no two writes may meet. If an algorithm fails, the message names the round and the transfer, and the exit
    status is 1.

    For one algorithm at one number of ranks (up to 16) the order of the sums is shown, too.

    With --nodes, the proof is of what several nodes do, in the memory of each and in messages between them,
    with every algorithm that there is between nodes.

    With --file, the proof is of a schedule that was exported, here or by others. COLLECTIVE says what a GOAL
    file does that does not say it.

    With --shards, the proof is of what reproducible training does: every algorithm, at every number of ranks,
    adds N shards by one and the same tree, to the same bits. The table shows what that costs.

    \b
    Examples:
      mpicoll verify --all
      mpicoll verify allreduce --algorithm rabenseifner --ranks 6
      mpicoll verify broadcast --ranks 1-16,100 --json
      mpicoll verify allreduce --algorithm hierarchical --nodes 2,3
      mpicoll verify allreduce --shards 8 --ranks 1-8
      mpicoll verify --file ring.xml
    """
    if path is not None:
        _verify_file(path, collective, as_json)
        return
    _check_nodes(collective, algorithm, nodes, shards)
    if nodes is None:
        _check_selection(collective, algorithm, everything)
    if shards is not None:
        _verify_order(shards, collective, algorithm, _at_most(shards, ranks), as_json)
        return
    started = time.perf_counter()
    try:
        with _Progress() as progress:
            if nodes is not None:
                ranks = [nodes.nranks]
                rows = verify_hierarchical(str(collective), nodes, progress.show)
            else:
                chosen = None if collective is None else [collective]
                rows = verify_all(ranks, chosen, algorithm, progress.show)
    except ScheduleError as error:
        _report_failure(error, as_json)
        sys.exit(1)
    except ValueError as error:
        option = "--ranks" if nodes is None else "--nodes"
        raise click.BadParameter(str(error).removeprefix("nranks: "), param_hint=option) from None
    seconds = time.perf_counter() - started
    single = collective is not None and algorithm is not None and len(ranks) == 1 and ranks[0] <= ORDER_UP_TO
    orders = _orders(str(collective), str(algorithm), ranks[0], nodes) if single else []
    if as_json:
        result = {"ok": True, "seconds": seconds, "results": [asdict(row) for row in rows], "orders": orders}
        click.echo(json.dumps(result, indent=2))
        return
    _print_table(rows)
    proved = f"{sum(row.schedules for row in rows)} schedules proved right"
    click.echo(f"{proved} at {rank_list(ranks)} ranks in {seconds:.1f} s")
    for order in orders:
        click.echo(
            f"chunks {rank_list(order['chunks'])} on ranks {rank_list(order['ranks'])}: {order['order']}"
        )


def _verify_file(path: str, collective: str | None, as_json: bool) -> None:
    """Prove the schedule in a file; COLLECTIVE says what it does, if the file does not."""
    asked = click.get_current_context().get_parameter_source
    for option in ("algorithm", "everything", "ranks", "shards", "nodes"):
        if asked(option) != ParameterSource.DEFAULT:
            surplus = "--all" if option == "everything" else f"--{option}"
            raise click.BadParameter(f"expected no {surplus} beside it", param_hint="--file")
    started = time.perf_counter()
    try:
        schedule = exchange.load(path, collective)
        row = one_row(schedule)
    except (exchange.ExchangeError, OSError) as error:
        raise click.BadParameter(f"{path}: {error}", param_hint="--file") from None
    except ScheduleError as error:
        _report_failure(error, as_json)
        sys.exit(1)
    seconds = time.perf_counter() - started
    if as_json:
        result = {"ok": True, "seconds": seconds, "results": [asdict(row)], "orders": []}
        click.echo(json.dumps(result, indent=2))
        return
    _print_table([row])
    click.echo(f"{path}: proved right at {row.nranks} ranks in {seconds:.1f} s")


def _check_nodes(
    collective: str | None, algorithm: str | None, nodes: Topology | None, shards: int | None
) -> None:
    """Whether --nodes, --algorithm and COLLECTIVE go together."""
    if (nodes is not None) != (algorithm == NAME):
        given = f"--algorithm {algorithm}" if algorithm is not None else "no --algorithm"
        given += " alone" if nodes is None else ""
        raise click.BadParameter(
            f"expected together with --algorithm {NAME}, and only with it; got {given}",
            param_hint="--nodes",
        )
    if nodes is None:
        return
    if collective not in algorithms.HIERARCHICAL:
        allowed = ", ".join(algorithms.HIERARCHICAL)
        raise click.BadParameter(
            f"expected COLLECTIVE to be one of {allowed}; got {collective}", param_hint="--nodes"
        )
    asked = click.get_current_context().get_parameter_source("ranks") != ParameterSource.DEFAULT
    if shards is not None or asked:
        surplus = "--ranks" if asked else "--shards"
        raise click.BadParameter(f"expected no {surplus} beside it", param_hint="--nodes")


def _check_selection(collective: str | None, algorithm: str | None, everything: bool) -> None:
    if everything == (collective is not None):
        given = f"both {collective!r} and --all" if everything else "neither"
        raise click.UsageError(f"expected either a COLLECTIVE or --all; got {given}")
    if algorithm is None:
        return
    if collective is None:
        raise click.BadParameter(
            "expected only together with a COLLECTIVE; got --all", param_hint="--algorithm"
        )
    try:
        algorithms.function(collective, algorithm)
    except ValueError as error:
        raise click.BadParameter(str(error).removeprefix("algorithm: "), param_hint="--algorithm") from None


class _Progress(Progress):
    """A bar on stderr that is gone when it is done."""

    def __init__(self) -> None:
        super().__init__(console=Console(stderr=True), transient=True)
        self.task = self.add_task("verifying", total=None)

    def show(self, done: int, total: int) -> None:
        self.update(self.task, completed=done, total=total)


def _at_most(shards: int, ranks: list[int]) -> list[int]:
    """The rank counts to prove an order at: of the option's default, those with a shard for every rank."""
    few = [nranks for nranks in ranks if nranks <= shards]
    asked = click.get_current_context().get_parameter_source("ranks") != ParameterSource.DEFAULT
    if asked and few != ranks:
        many = rank_list(ranks[len(few) :])
        raise click.BadParameter(
            f"expected at most as many ranks as shards ({shards}), got {many}", param_hint="--ranks"
        )
    return few


def _verify_order(
    shards: int, collective: str | None, algorithm: str | None, ranks: list[int], as_json: bool
) -> None:
    if collective != "allreduce":
        given = "--all" if collective is None else collective
        raise click.BadParameter(f"expected only together with allreduce; got {given}", param_hint="--shards")
    started = time.perf_counter()
    try:
        with _Progress() as progress:
            proofs = verify_orders(shards, ranks, algorithm, progress.show)
    except ScheduleError as error:
        _report_failure(error, as_json)
        sys.exit(1)
    seconds = time.perf_counter() - started
    order = proofs[0].order
    if as_json:
        rows = [{name: n for name, n in asdict(proof).items() if name != "order"} for proof in proofs]
        click.echo(json.dumps({"ok": True, "seconds": seconds, "results": rows, "order": order}, indent=2))
        return
    _print_orders(proofs)
    proved = f"{len(proofs)} schedules proved to add {shards} shards in one order"
    click.echo(f"{proved} at {rank_list(ranks)} ranks in {seconds:.1f} s")
    if shards <= ORDER_UP_TO:
        click.echo(f"the order of all: {order}")


def _print_orders(proofs: list[OrderProof]) -> None:
    """One line for each algorithm, whatever the number of rank counts."""
    table = Table(caption="vectors that one rank sends, the most at any rank count")
    for heading in ("algorithm", "ranks", "rounds", "any order", "one order"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "algorithm" else "right")
    for name in dict.fromkeys(proof.algorithm for proof in proofs):
        own = [proof for proof in proofs if proof.algorithm == name]
        table.add_row(
            name,
            rank_list([proof.nranks for proof in own]),
            str(max(proof.rounds for proof in own)),
            f"{max(proof.plain / proof.nchunks for proof in own):.2f}",
            f"{max(proof.volume / proof.nchunks for proof in own):.2f}",
        )
    Console().print(table)


def _report_failure(error: ScheduleError, as_json: bool) -> None:
    click.echo(f"Error: {error}", err=True)
    if as_json:
        transfer = None if error.transfer is None else error.transfer._asdict()
        fault = {"problem": error.problem, "expected": error.expected, "got": error.got}
        result = {"ok": False, "error": {**fault, "round": error.round, "transfer": transfer}}
        click.echo(json.dumps(result, indent=2))


def _orders(collective: str, algorithm: str, nranks: int, nodes: Topology | None) -> list[dict[str, Any]]:
    """The order of every sum, once for all chunks and ranks that share it; none where nothing is summed.

    Of several algorithms between nodes, the first one's.
    """
    if not COLLECTIVES[collective].reduces:
        return []
    if nodes is not None:
        across = algorithms.names(collective)[0]
        proof = verify(algorithms.hierarchical_schedule(collective, nodes, across))
    else:
        proof = verify(algorithms.schedule(collective, algorithm, nranks))
    found: dict[str, dict[str, Any]] = {}
    for rank in range(nranks):
        for chunk in proof.schedule.outputs(rank).tolist():
            order = proof.order(rank, chunk)
            entry = found.setdefault(order, {"order": order, "chunks": [], "ranks": []})
            entry["chunks"] = sorted({*entry["chunks"], chunk})
            entry["ranks"] = sorted({*entry["ranks"], rank})
    return list(found.values())


def _print_table(rows: list[Row]) -> None:
    """One line for each algorithm, whatever the number of rank counts."""
    table = Table(caption="rounds, and chunks sent by one rank: the most at any rank count")
    for heading in ("collective", "algorithm"):
        table.add_column(heading, no_wrap=True)
    for heading in ("schedules", "rounds", "chunks", "same bits"):
        table.add_column(heading, justify="right")
    for key in dict.fromkeys((row.collective, row.algorithm) for row in rows):
        table.add_row(*key, *_summary([row for row in rows if (row.collective, row.algorithm) == key]))
    Console().print(table)


def _summary(rows: list[Row]) -> list[str]:
    collective = COLLECTIVES[rows[0].collective]
    agree = "yes" if all(row.identical for row in rows) else "no"
    return [
        str(sum(row.schedules for row in rows)),
        str(max(row.rounds for row in rows)),
        str(max(row.volume for row in rows)),
        "-" if collective.idempotent else agree,
    ]


def _deferred(name: str, module: str, summary: str) -> click.Command:
    """A subcommand that imports its ``module`` when it is called, and hands its arguments over unread."""

    def run(arguments: tuple[str, ...]) -> None:
        command: Callable[..., None] = importlib.import_module(module).command
        command(args=list(arguments), prog_name=f"mpicoll {name}")

    arguments = click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)
    settings = {"ignore_unknown_options": True, "help_option_names": []}
    return click.Command(name, settings, run, [arguments], short_help=summary, add_help_option=False)


for _name, (_module, _line) in DEFERRED.items():
    main.add_command(_deferred(_name, _module, _line))
