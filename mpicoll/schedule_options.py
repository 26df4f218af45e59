"""Options of commands that are about one schedule: which algorithm, of how many ranks, and on which nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from mpicoll import algorithms
from mpicoll.algorithms.hierarchical import NAME, Topology
from mpicoll.files import why_unwritable
from mpicoll.schedule import COLLECTIVES, Schedule

MAX_RANKS = 100_000  # more is a typing error: the largest machines have fewer nodes
MOST_DIGITS = len(str(MAX_RANKS))
MOST_CHUNKS = 100_000  # more is a typing error: each would be a message of its own

# What functions call their arguments, and the options that they come from.
OPTIONS = {"nranks": "--ranks", "root": "--root", "nchunks": "--chunks", "rounds": "--chunks"}

Command = TypeVar("Command", bound=Callable[..., Any])


def as_nodes(ctx: click.Context, param: click.Parameter, text: str | None) -> Topology | None:
    """An option's callback: the ranks of each node, such as 2,3."""
    if text is None:
        return None
    sizes = [part.strip() for part in text.split(",")]
    if not all(
        size.isdecimal() and len(size) <= MOST_DIGITS and 1 <= int(size) <= MAX_RANKS for size in sizes
    ):
        raise click.BadParameter(f"expected the number of ranks of each node, such as 2,3; got {text!r}")
    return Topology.of_sizes([int(size) for size in sizes])


def check_output(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """A callback of click's: a file, if one is given, that can be written at the end."""
    if path is not None and (reason := why_unwritable(path)):
        raise click.BadParameter(f"expected a file that can be written, got {str(path)!r}: {reason}")
    return path


def schedule_options(command: Command) -> Command:
    """Give a command the arguments of `chosen_schedule`."""
    for option in reversed(
        (
            click.argument(
                "collective", type=click.Choice(list(algorithms.ALGORITHMS)), metavar="COLLECTIVE"
            ),
            click.option(
                "--algorithm", metavar="NAME", required=True, help="Which algorithm; a wrong name lists them."
            ),
            click.option("--ranks", metavar="N", type=click.IntRange(1), default=4, show_default=True),
            click.option("--root", metavar="R", type=click.IntRange(0), default=0, show_default=True),
            click.option(
                "--chunks",
                metavar="N",
                type=click.IntRange(1, MOST_CHUNKS),
                help="How many, for algorithms that pipeline.",
            ),
            click.option(
                "--nodes",
                metavar="LIST",
                callback=as_nodes,
                help=f"Ranks of each node, such as 2,3, instead of --ranks; for --algorithm {NAME}.",
            ),
            click.option(
                "--across",
                metavar="NAME",
                help="The algorithm between nodes.  [default: the collective's first]",
            ),
        )
    ):
        command = option(command)
    return command


def chosen_schedule(
    purpose: str,
    most_ranks: int,
    instead: str,
    collective: str,
    algorithm: str,
    ranks: int,
    root: int,
    chunks: int | None,
    nodes: Topology | None,
    across: str | None,
) -> Schedule:
    """What the options ask for; `click.BadParameter` names those that do not go together.

    ``purpose`` is what at most ``most_ranks`` ranks can serve for, such as "draw"; ``instead`` says what can
    be done with more.
    """
    with named_options(nodes):
        pipelined = _checked(collective, algorithm, nodes, across)
        if chunks is not None and not algorithms.pipelines(collective, pipelined):
            refuse("chunks", f"{pipelined}, which knows its number of chunks")
        if not COLLECTIVES[collective].rooted:
            refuse("root", f"{collective}, which has none")
        nranks = ranks if nodes is None else nodes.nranks
        if nranks > most_ranks:  # before a schedule is made, which takes memory
            raise ValueError(
                f"nranks: expected at most {most_ranks} ranks to {purpose}, got {nranks}{instead}"
            )
        if nodes is not None:
            return algorithms.hierarchical_schedule(collective, nodes, pipelined, root, chunks)
        return algorithms.schedule(collective, algorithm, ranks, root, chunks)


@contextmanager
def named_options(nodes: Topology | None) -> Iterator[None]:
    """Within this block a `ValueError` about an argument is a `click.BadParameter` about its option."""
    try:
        yield
    except ValueError as error:
        name, _, problem = str(error).partition(": ")
        option = "--nodes" if name == "nranks" and nodes is not None else OPTIONS.get(name, f"--{name}")
        raise click.BadParameter(problem, param_hint=option) from None


def _checked(collective: str, algorithm: str, nodes: Topology | None, across: str | None) -> str:
    """The algorithm that may pipeline: the one, or the one between nodes."""
    if (nodes is not None) != (algorithm == NAME):
        given = f"--algorithm {algorithm}" + (" alone" if nodes is None else "")
        raise click.BadParameter(
            f"expected together with --algorithm {NAME}, and only with it; got {given}",
            param_hint="--nodes",
        )
    if nodes is None:
        refuse("across", f"--algorithm {algorithm}")
        algorithms.function(collective, algorithm)
        return algorithm
    refuse("ranks", "--nodes")
    if collective not in algorithms.HIERARCHICAL:
        allowed = ", ".join(algorithms.HIERARCHICAL)
        raise ValueError(f"nodes: expected COLLECTIVE to be one of {allowed}; got {collective}")
    pipelined = across or algorithms.names(collective)[0]
    if pipelined not in algorithms.names(collective):
        allowed = ", ".join(algorithms.names(collective))
        raise ValueError(f"across: expected one of {allowed} for {collective}; got {pipelined!r}")
    return pipelined


def refuse(option: str, beside: str) -> None:
    """End with a message if the user has given ``option``."""
    if click.get_current_context().get_parameter_source(option) != ParameterSource.DEFAULT:
        raise click.BadParameter(f"expected none beside {beside}", param_hint=f"--{option}")
