"""What a schedule does, round by round, as all drawings show it.

Vocabulary
----------
message        all chunks that one rank sends to another in one round, to be copied or to be reduced.
contributions  the ranks whose parts a value contains: those of ``a+c`` are 0 and 2.
needed         a value is needed if somebody sends it later, or adds to it, or if it is a result. Drawings
               leave out the others: old parts that a rank has sent on would hide what it has to show.
story          what is held at the start, then for each round its messages and what is held after it.

How it works: once forward through the rounds with the set of contributions of every value, then once backward
to find which values are needed. Schedules are drawn as they are, right or wrong; `verify` proves them.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpicoll.schedule import COLLECTIVES, REDUCE, Round, Schedule

MOST_ROUNDS = 64  # a ring of 32 ranks has 62
MOST_CHUNKS = 64  # held by one rank; more are too small to be told apart

Place = tuple[int, int]  # rank, chunk
Held = Mapping[Place, frozenset[int]]  # contributions of each needed value


@dataclass(frozen=True)
class Message:
    """Rank ``src`` sends ``chunks``, ascending, to rank ``dst``, which adds or copies them."""

    src: int
    dst: int
    chunks: tuple[int, ...]
    reduce: bool


@dataclass(frozen=True)
class Step:
    """A round: its ``messages`` in the order of the ranks, and what is ``held`` when it is over."""

    messages: tuple[Message, ...]
    held: Held


@dataclass(frozen=True, eq=False)
class Story:
    """``start``: held before the first round. ``complete[c]``: the contributions of the whole chunk c."""

    schedule: Schedule
    start: Held
    steps: tuple[Step, ...]
    complete: tuple[frozenset[int], ...]

    def is_complete(self, place: Place, contributions: frozenset[int]) -> bool:
        """Whether a value contains every contribution that there is."""
        return contributions == self.complete[place[1]]


def tell(schedule: Schedule, most_ranks: int, elsewhere: str) -> Story:
    """The story of ``schedule``; `ValueError` if it is too large to be drawn.

    ``elsewhere`` says what to do with more than ``most_ranks`` ranks.
    """
    _check_size(schedule, most_ranks, elsewhere)
    held = {
        (rank, chunk): frozenset({rank})
        for rank in range(schedule.nranks)
        for chunk in schedule.inputs(rank).tolist()
    }
    complete = tuple(
        frozenset(rank for rank, held_chunk in held if held_chunk == chunk)
        for chunk in range(schedule.nchunks)
    )
    rounds = list(schedule.rounds)
    states = [held]
    for round_ in rounds:
        states.append(_after(round_, states[-1]))
    needed = _needed(schedule, rounds)
    start, *after = (
        {place: state[place] for place in sorted(places & state.keys())}
        for state, places in zip(states, needed, strict=True)
    )
    steps = tuple(Step(_messages(round_), state) for round_, state in zip(rounds, after, strict=True))
    return Story(schedule, start, steps, complete)


def title(schedule: Schedule) -> str:
    """Such as ``ring allreduce: 4 ranks, 6 rounds, 4 chunks``."""
    sizes = [_count(schedule.nranks, "rank"), _count(schedule.nrounds, "round")]
    sizes.append(_count(schedule.nchunks, "chunk"))
    if COLLECTIVES[schedule.collective].rooted:
        sizes.append(f"root {schedule.root}")
    return f"{schedule.name} {schedule.collective}: {', '.join(sizes)}"


def chunk_name(schedule: Schedule, chunk: int) -> str:
    """The chunk's number; in an alltoall ``0.3``: what rank 0 sends to rank 3."""
    if schedule.collective == "alltoall":
        return "{}.{}".format(*divmod(chunk, schedule.nranks))
    return str(chunk)


def chunk_names(schedule: Schedule, chunks: Sequence[int]) -> str:
    """Ascending ``chunks`` as text, such as ``0-3,5``."""
    if schedule.collective == "alltoall":
        return " ".join(chunk_name(schedule, chunk) for chunk in chunks)
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs(chunks))


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """The first and last of each run of consecutive numbers in ascending ``numbers``."""
    here = set(numbers)
    firsts = [n for n in numbers if n - 1 not in here]
    lasts = [n for n in numbers if n + 1 not in here]
    return list(zip(firsts, lasts, strict=True))


def colours(schedule: Schedule) -> list[str]:
    """A colour for each chunk, ``#rrggbb``; in an alltoall for each rank's chunks, so that there are few."""
    kinds = schedule.nranks if schedule.collective == "alltoall" else schedule.nchunks
    each = schedule.nchunks // kinds
    return [_colour(chunk // each, kinds) for chunk in range(schedule.nchunks)]


def _colour(kind: int, kinds: int) -> str:
    """Hues all around the circle; of neighbours one is darker, which also tells them apart without hues."""
    lightness = (0.42, 0.6)[kind % 2]
    parts = colorsys.hls_to_rgb((0.58 + kind / kinds) % 1, lightness, 0.62)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def _check_size(schedule: Schedule, most_ranks: int, elsewhere: str) -> None:
    if schedule.nranks > most_ranks:
        raise ValueError(
            f"nranks: expected at most {most_ranks} ranks to draw, got {schedule.nranks}; {elsewhere}"
        )
    if schedule.nrounds > MOST_ROUNDS:
        raise ValueError(f"rounds: expected at most {MOST_ROUNDS} rounds to draw, got {schedule.nrounds}")
    most = max(
        len(held(rank)) for rank in range(schedule.nranks) for held in (schedule.inputs, schedule.outputs)
    )
    if most > MOST_CHUNKS:
        raise ValueError(f"nchunks: expected at most {MOST_CHUNKS} chunks on a rank to draw, got {most}")


def _after(round_: Round, before: Mapping[Place, frozenset[int]]) -> dict[Place, frozenset[int]]:
    """What is held after a round, needed or not. Every read sees the state at the round's start."""
    after = dict(before)
    for src, dst, chunk, op in round_:
        sent = before.get((src, chunk), frozenset())
        after[dst, chunk] = sent | after.get((dst, chunk), frozenset()) if op == REDUCE else sent
    return after


def _needed(schedule: Schedule, rounds: Sequence[Round]) -> list[set[Place]]:
    """The places whose values are needed: at the start, and after each round."""
    results = {(rank, chunk) for rank in range(schedule.nranks) for chunk in schedule.outputs(rank).tolist()}
    needed = [results]
    for round_ in reversed(rounds):
        overwritten = {(t.dst, t.chunk) for t in round_ if t.op != REDUCE}
        read = {(t.src, t.chunk) for t in round_} | {(t.dst, t.chunk) for t in round_ if t.op == REDUCE}
        needed.append(needed[-1] - overwritten | read)
    return needed[::-1]


def _messages(round_: Round) -> tuple[Message, ...]:
    chunks: dict[tuple[int, int, bool], list[int]] = {}
    for src, dst, chunk, op in round_:
        chunks.setdefault((src, dst, op == REDUCE), []).append(chunk)
    return tuple(
        Message(src, dst, tuple(sorted(chunks[src, dst, add])), add) for src, dst, add in sorted(chunks)
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
