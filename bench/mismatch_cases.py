"""Mismatches as they are drawn, and what came of them as it is judged. Needs no MPI."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

KINDS = ("collective", "count", "dtype", "operation", "root", "order", "skip", "exit")
WEIGHTS = (8, 8, 8, 8, 8, 8, 8, 3)  # an exit needs a job of its own, which takes seconds
TRANSPORTS = ("auto", "messages", "nodes")  # nodes: the ranks pretend to be on two
RANKS = range(2, 5)
COUNTS = (1, 2, 7, 100, 5000, 70_000)
DTYPES = ("float32", "float64", "int16")  # of different sizes: what only moves is compared in bytes
OPERATIONS = ("SUM", "MIN", "MAX")
REDUCTIONS = ("Allreduce", "Reduce", "Reduce_scatter_block")
ROOTED = ("Reduce", "Bcast", "Gather", "Scatter")
METHODS = (*REDUCTIONS, "Bcast", "Allgather", "Gather", "Scatter", "Alltoall", "Barrier")
FORMS = ("blocking",) * 4 + ("nonblocking", "persistent")

CLEAR, UNCLEAR, UNNOTICED, WRONG, HANG = "clear", "unclear", "unnoticed", "wrong", "hang"
OUTCOMES = (CLEAR, UNCLEAR, UNNOTICED, WRONG, HANG)


@dataclass(frozen=True)
class Call:
    """A collective as one rank calls it; ``count`` elements, in each block where there are blocks."""

    method: str
    count: int
    dtype: str
    operation: str
    root: int
    form: str


@dataclass(frozen=True)
class Case:
    """Rank ``odd`` makes the calls ``other``, the others ``usual``; then all `Barrier` and `Ibarrier`."""

    number: int
    kind: str
    transport: str
    nranks: int
    odd: int
    usual: tuple[Call, ...]
    other: tuple[Call, ...]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Case:
        """From `asdict`, by way of JSON."""
        usual, other = (tuple(Call(**call) for call in row[name]) for name in ("usual", "other"))
        return cls(**{**row, "usual": usual, "other": other})


def draw(common: random.Random, number: int) -> Case:
    """One case of any kind; the same for the same ``common``."""
    kind = common.choices(KINDS, WEIGHTS)[0]
    transport = common.choice(TRANSPORTS)
    nranks = common.choice([n for n in RANKS if n > 2 or transport != "nodes"])
    methods = {
        "operation": REDUCTIONS,
        "root": ROOTED,
        "count": METHODS[:-1],
        "dtype": METHODS[:-1],
        "skip": METHODS[:-1],  # a barrier that is left out would be made good by the last one
        "exit": ("Allreduce", "Allgather", "Alltoall", "Barrier"),  # in which everybody is waited for
    }.get(kind, METHODS)
    call = draw_call(common, methods, nranks)
    usual: tuple[Call, ...] = (call,)
    other: tuple[Call, ...] = (call,)
    if kind in ("skip", "exit"):
        other = ()
    elif kind == "order":
        second = draw_call(common, [name for name in METHODS if name != call.method], nranks, call.form)
        usual, other = (call, second), (second, call)
    else:
        other = (changed(common, call, kind, nranks),)
    return Case(number, kind, transport, nranks, common.randrange(nranks), usual, other)


def draw_call(common: random.Random, methods: Sequence[str], nranks: int, form: str | None = None) -> Call:
    return Call(
        common.choice(methods),
        common.choice(COUNTS),
        common.choice(DTYPES),
        common.choice(OPERATIONS),
        common.randrange(nranks),
        form or common.choice(FORMS),
    )


def changed(common: random.Random, call: Call, kind: str, nranks: int) -> Call:
    """The same call but for what ``kind`` says."""

    def another(values: Sequence[Any], value: Any) -> Any:
        return common.choice([each for each in values if each != value])

    values: dict[str, Any] = asdict(call)
    if kind == "collective":
        values["method"] = another(METHODS, call.method)
    elif kind == "count":
        values["count"] = common.choice([call.count + 1, another(COUNTS, call.count)])
    else:
        field, choices = {
            "dtype": ("dtype", DTYPES),
            "operation": ("operation", OPERATIONS),
            "root": ("root", range(nranks)),
        }[kind]
        values[field] = another(choices, values[field])
    return Call(**values)


# -- judging


@dataclass(frozen=True)
class Outcome:
    """What one rank met: an error, or none; calls that returned, and those whose data were not theirs."""

    error: str
    text: str
    returned: int
    wrong: int
    seconds: float


def ranks_named(text: str) -> list[int]:
    """Those that a message says something of, ascending: ``"rank 2 in ...; ranks 0-1, 3 in ..."``."""
    found: set[int] = set()
    for run in re.findall(r"\branks? ((?:\d+(?:-\d+)?(?:, )?)+) (?:in|has|is|process)\b", text):
        for part in run.split(", "):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return sorted(found)


def is_named(call: Call, text: str) -> bool:
    """Whether a message names the call: `Reduce_scatter_block` is a `Reduce_scatter` of equal blocks."""
    name = call.method.removesuffix("_block")
    return f"{name}(" in text or (call.form == "persistent" and f"{name}_init(" in text)


def is_clear(case: Case, outcome: Outcome) -> bool:
    """Whether this rank's error says what is wrong: every rank's place, and both calls; or who has ended."""
    if case.kind == "exit":
        return outcome.error == "RankFailedError" and f"rank {case.odd}" in outcome.text
    if outcome.error != "MismatchError" or ranks_named(outcome.text) != list(range(case.nranks)):
        return False
    calls = [*case.usual[:1], *case.other[:1]]
    return all(is_named(call, outcome.text) for call in calls)


def judge(case: Case, outcomes: Mapping[int, Outcome]) -> str:
    """One of `OUTCOMES`; ``outcomes`` of the ranks that have come to an end of the case."""
    expected = [rank for rank in range(case.nranks) if case.kind != "exit" or rank != case.odd]
    if any(rank not in outcomes for rank in expected):
        return HANG
    found = [outcomes[rank] for rank in expected]
    if any(outcome.wrong for outcome in found):
        return WRONG
    if not any(outcome.error for outcome in found):
        return UNNOTICED
    if any(outcome.error == "DeadlineError" for outcome in found):
        return HANG
    return CLEAR if all(is_clear(case, outcome) for outcome in found) else UNCLEAR
