"""A schedule as text: a column for each rank, and for each round what it sends and what it then holds.

                   rank 0 (a)  rank 1 (b)        ``a1``      a's part of chunk 1
            holds  a0-1        b0-1              ``(a+c)1``  its sum with c's
    round 0 sends  a1 +> 1     b0 +> 0           ``0*``      chunk 0, complete
            holds  0*          1*                ``+>``      is added to what the receiver has
    round 1 sends  0* -> 1     1* -> 0           ``->``      is copied there
            holds  0-1*        0-1*

Ranks that do not fit side by side follow below.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from mpicoll.draw.story import Held, Message, Story, chunk_names, runs, tell, title
from mpicoll.schedule import COLLECTIVES, Schedule

MOST_RANKS = 16
ELSEWHERE = "draw it to a file (mpicoll draw --output), up to 32 ranks, or see its time: mpicoll simulate"
WIDTH = 110
WIDEST = 24  # characters of a cell, if it can be broken
GAP = 2  # between columns
UNBROKEN = "\N{NO-BREAK SPACE}"  # around an arrow, until a cell is broken into lines

Cell = list[str]  # its lines


def text(schedule: Schedule, width: int = WIDTH) -> str:
    """A table of ``schedule`` with a legend below, in lines of at most ``width`` characters where possible.

    Raises `ValueError` for more than 16 ranks, 64 rounds, or 64 chunks on a rank.
    """
    story = tell(schedule, MOST_RANKS, ELSEWHERE)
    margin = _margin(story)
    columns = [_column(story, rank) for rank in range(schedule.nranks)]
    blocks = [_side_by_side([margin, *band]) for band in _bands(columns, width - _width(margin))]
    return "\n\n".join([title(schedule), *blocks, _legend(story)])


def _margin(story: Story) -> list[Cell]:
    rows = [[""], ["holds"]]
    for k in range(len(story.steps)):
        rows += [[f"round {k} sends"], ["holds"]]
    longest = max(len(line) for (line,) in rows)
    return [[line.rjust(longest)] for (line,) in rows]


def _column(story: Story, rank: int) -> list[Cell]:
    name = f" ({_letter(rank)})" if COLLECTIVES[story.schedule.collective].reduces else ""
    cells = [[f"rank {rank}{name}"], _holds(story, story.start, rank)]
    before = story.start
    for step in story.steps:
        sent = [_sends(story, before, message) for message in step.messages if message.src == rank]
        cells.append(_wrapped(", ".join(sent)))
        cells.append(_holds(story, step.held, rank))
        before = step.held
    return cells


def _sends(story: Story, before: Held, message: Message) -> str:
    values = _values(story, before, message.src, message.chunks)
    return f"{values}{UNBROKEN}{'+>' if message.reduce else '->'}{UNBROKEN}{message.dst}"


def _holds(story: Story, held: Held, rank: int) -> Cell:
    return _wrapped(_values(story, held, rank, [chunk for owner, chunk in held if owner == rank]) or ".")


def _values(story: Story, held: Held, rank: int, chunks: Iterable[int]) -> str:
    """The values of ``chunks`` as text, those with the same contributions together."""
    alike: dict[str, list[int]] = {}
    for chunk in chunks:
        alike.setdefault(_value(story, held, rank, chunk), []).append(chunk)
    return " ".join(form.format(chunk_names(story.schedule, group)) for form, group in alike.items())


def _value(story: Story, held: Held, rank: int, chunk: int) -> str:
    """The form of a value: ``{}`` stands for its chunk."""
    contributions = held.get((rank, chunk), frozenset())
    if not COLLECTIVES[story.schedule.collective].reduces:
        return "{}"
    if story.is_complete((rank, chunk), contributions):
        return "{}*"
    return _sum(sorted(contributions)) + "{}"


def _sum(ranks: Sequence[int]) -> str:
    parts: list[str] = []
    for first, last in runs(ranks):
        between = [_letter(rank) for rank in range(first, last + 1)]
        parts += between if len(between) < 3 else [f"{between[0]}..{between[-1]}"]
    return parts[0] if len(ranks) == 1 else f"({'+'.join(parts)})"


def _letter(rank: int) -> str:
    return chr(ord("a") + rank)


def _wrapped(line: str) -> Cell:
    """``line`` in pieces of at most `WIDEST` characters, broken at spaces only."""
    pieces = textwrap.wrap(line, WIDEST, break_long_words=False, break_on_hyphens=False)
    return [piece.replace(UNBROKEN, " ") for piece in pieces] or [""]


def _bands(columns: Sequence[list[Cell]], width: int) -> Iterator[list[list[Cell]]]:
    """As many columns as fit into ``width``, at least one, then the next ones."""
    band: list[list[Cell]] = []
    for column in columns:
        if band and sum(map(_width, [*band, column])) > width:
            yield band
            band = []
        band.append(column)
    yield band


def _width(column: Sequence[Cell]) -> int:
    return GAP + max(len(line) for cell in column for line in cell)


def _side_by_side(columns: Sequence[list[Cell]]) -> str:
    lines = []
    for row in zip(*columns, strict=True):
        for i in range(max(map(len, row))):
            pieces = (
                (cell[i] if i < len(cell) else "").ljust(_width(column))
                for cell, column in zip(row, columns, strict=True)
            )
            lines.append("".join(pieces).rstrip())
    return "\n".join(lines)


def _legend(story: Story) -> str:
    """What the signs mean: those that may occur."""
    schedule = story.schedule
    signs = {"->": "is copied", ".": "nothing; what is not needed again is left out"}
    if COLLECTIVES[schedule.collective].reduces:
        added = {"a0": "a's part of chunk 0", "(a+b)0": "its sum with b's", "0*": "chunk 0, complete"}
        signs = added | {"+>": "is added to the receiver's"} | signs
    if schedule.collective == "alltoall":
        signs = {"0.1": "what rank 0 has for rank 1"} | signs
    return "\n".join(f"{sign:6}  {meaning}" for sign, meaning in signs.items())
