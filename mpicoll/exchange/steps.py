"""From rounds to the steps of each rank, and from steps back to rounds: what both formats share.

Vocabulary
----------
place    a chunk of a rank. A send reads its place; what arrives is written to the place at the receiver.
step     a line of a file: something that one rank does after the steps that it waits for.
message  a send step and its receive; ``write`` is the step that stores or reduces what came, often the same.

Files have no rounds. They say which step waits for which, so writing is finding out which steps must wait:
a read for the write before it, a write for the write and the reads before it, all of the same place.
Nothing else waits, and the order of the rounds holds nobody up.

Reading goes the other way. A total order of the steps tells the order in which each place is used; if the
file leaves open which of two uses comes first, and one of them writes, it is no schedule: two runs could
differ. From the order of uses follow the rounds, the first in which a transfer can be:

    use of a place   and the next one   the next one's round is at least
    write            read               the round after
    read             copy               the round after: a round may not overwrite what it sends
    read             reduce             the same: what is sent is the state at the round's start
    reduce           reduce             the same: a round's reductions of a place are one
    other writes     write              the round after

A file that adds to a place one after the other so becomes one sum in ascending order of ranks, as everywhere
in a `Schedule`: the same sum, perhaps other bits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from mpicoll.schedule import COLLECTIVES, REDUCE, Round, Schedule, Transfer
from mpicoll.verify import MOST_PLACES


class ExchangeError(ValueError):
    """A file is no schedule; the message begins with its line or element."""


class Action(NamedTuple):
    """What one rank does in a schedule: its half of ``transfer``.

    ``after``: which of the rank's actions, counted from 0, must have ended before; all are of the same chunk.
    """

    transfer: Transfer
    sends: bool
    after: tuple[int, ...]


def actions(schedule: Schedule) -> list[list[Action]]:
    """What every rank does, in an order in which it can be done one after the other.

    By rounds, then by turns (see `_turns`), and of a turn the sends first. If all ranks keep to this order
    on their way to each peer and from it, one message under way from a rank to another is enough: a step
    waits only for earlier rounds, earlier turns, or sends of its own turn, and those wait for none of it.
    """
    done: list[list[Action]] = [[] for _ in range(schedule.nranks)]
    writes: dict[tuple[int, int], int] = {}
    reads: dict[tuple[int, int], list[int]] = defaultdict(list)
    for round_ in schedule.rounds:
        turns = _turns(round_)
        for _, receives, transfer in sorted((turn, end, t) for t, turn in turns.items() for end in (0, 1)):
            rank = transfer.dst if receives else transfer.src
            place, number = (rank, transfer.chunk), len(done[rank])
            after: tuple[int, ...] = (writes[place],) if place in writes else ()
            if receives:
                # Whoever read the place has waited for the last write.
                after = tuple(reads.pop(place, ())) or after
                writes[place] = number
            else:
                reads[place].append(number)
            done[rank].append(Action(transfer, not receives, after))
    return done


def _turns(round_: Round) -> dict[Transfer, int]:
    """When in a round each transfer's turn is: those from one rank to another take one turn each.

    What is sent from a place and what is reduced into it in the same round have the same turn, so that the
    send can go first. Everything else goes as soon as it can: in a ring, all ranks send, and then receive.
    """
    turns: dict[Transfer, int] = {}
    free: Counter[tuple[int, int]] = Counter()  # the next turn from a rank to another
    for _, group in groupby(sorted(round_, key=lambda t: t.chunk), key=lambda t: t.chunk):
        transfers = list(group)
        senders, receivers = {t.src for t in transfers}, {t.dst for t in transfers}
        meeting = {t for t in transfers if t.dst in senders or t.src in receivers}
        common = max((free[t.src, t.dst] for t in meeting), default=0)
        for t in transfers:
            turns[t] = common if t in meeting else free[t.src, t.dst]
            free[t.src, t.dst] = turns[t] + 1
    return turns


@dataclass(frozen=True)
class Step:
    """A step of a file: its rank, what the file calls it, and the numbers of the steps that it waits for.

    Those are steps of the same rank; for its message a receive waits anyway.
    """

    rank: int
    name: str
    after: tuple[int, ...]


class Message(NamedTuple):
    """The numbers of the steps that send, receive and store or ``reduce`` a chunk."""

    send: int
    recv: int
    write: int
    chunk: int
    reduce: bool


class Head(NamedTuple):
    """What a file says of the whole; ``root`` None: it does not say."""

    name: str
    collective: str
    nranks: int
    nchunks: int
    root: int | None


def check_head(head: Head, where: str) -> None:
    """Raise `ExchangeError` for numbers that no schedule can have."""
    if head.collective not in COLLECTIVES:
        allowed = ", ".join(COLLECTIVES)
        raise ExchangeError(f"{where}: expected a collective of {allowed}; got {head.collective!r}")
    if head.nranks < 1 or head.nchunks < 1 or head.nranks * head.nchunks > MOST_PLACES:
        got = f"{head.nranks} ranks and {head.nchunks} chunks"
        allowed = f"at least one rank and one chunk, and at most {MOST_PLACES} chunks on all ranks together"
        raise ExchangeError(f"{where}: expected {allowed}; got {got}")
    if head.root is not None and not 0 <= head.root < head.nranks:
        raise ExchangeError(f"{where}: expected a root from 0 to {head.nranks - 1}, got {head.root}")


def in_order(steps: Sequence[Step], received: dict[int, int]) -> list[int]:
    """The numbers of all steps, each behind those that it waits for; ``received``: receive to send.

    `ExchangeError` names steps that wait for each other.
    """
    waits = [[*step.after, received[k]] if k in received else [*step.after] for k, step in enumerate(steps)]
    followers: dict[int, list[int]] = defaultdict(list)
    for k, before in enumerate(waits):
        for earlier in before:
            followers[earlier].append(k)
    left = [len(before) for before in waits]
    ready = [k for k, count in enumerate(left) if count == 0]
    for k in ready:
        for follower in followers[k]:
            left[follower] -= 1
            if left[follower] == 0:
                ready.append(follower)
    if len(ready) < len(steps):
        raise _circle(steps, waits, left)
    return ready


def _circle(steps: Sequence[Step], waits: list[list[int]], left: list[int]) -> ExchangeError:
    """Every step that is left waits for one that is left: following these ends in a circle."""
    path = [next(k for k, count in enumerate(left) if count)]
    while path[-1] not in path[:-1]:
        path.append(next(k for k in waits[path[-1]] if left[k]))
    circle = path[path.index(path[-1]) :]
    names = " waits for ".join(steps[k].name for k in circle)
    return ExchangeError(f"{steps[circle[0]].name}: expected an order of the steps, got a circle: {names}")


def to_schedule(
    head: Head, steps: Sequence[Step], messages: Sequence[Message], order: Sequence[int]
) -> Schedule:
    """The schedule of a file's messages; ``order`` is from `in_order`. `ExchangeError` as above."""
    root = _root(head, steps, messages)
    rounds: dict[int, list[Transfer]] = defaultdict(list)
    for k, message in zip(_rounds(steps, messages, order), messages, strict=True):
        op = REDUCE if message.reduce else "copy"
        ends = (steps[message.send].rank, steps[message.write].rank)
        rounds[k].append(Transfer(*ends, message.chunk, op))
    made = [Round.from_transfers(sorted(rounds[k])) for k in sorted(rounds)]
    return Schedule.from_rounds(head.name, head.collective, head.nranks, head.nchunks, made, root)


def _root(head: Head, steps: Sequence[Step], messages: Sequence[Message]) -> int:
    """The root, if a file does not say it: the one rank to which, or from which, nothing goes."""
    if not COLLECTIVES[head.collective].rooted:
        return 0
    if head.root is not None:
        return head.root
    starts_there = head.collective in ("broadcast", "scatter")
    others = {steps[m.recv if starts_there else m.send].rank for m in messages}
    alone = [rank for rank in range(head.nranks) if rank not in others]
    if len(alone) != 1:
        verb = "receives" if starts_there else "sends"
        raise ExchangeError(f"root: expected the file to say it, or one rank that never {verb}; got {alone}")
    return alone[0]


class _Use(NamedTuple):
    """One use of a place: when in the total order, whether it writes, and by which message and step."""

    when: int
    reads: bool  # behind the write, if one step does both: it sends what it has just received
    message: int
    step: int


def _rounds(steps: Sequence[Step], messages: Sequence[Message], order: Sequence[int]) -> list[int]:
    """The round of every message: the smallest that the uses of all places allow."""
    waits = _Waits(steps, messages, order)
    places: dict[tuple[int, int], list[_Use]] = defaultdict(list)
    for number, m in enumerate(messages):
        waits.check(m.recv, m.write, m.chunk)
        places[steps[m.send].rank, m.chunk].append(_Use(waits.when[m.send], True, number, m.send))
        places[steps[m.write].rank, m.chunk].append(_Use(waits.when[m.write], False, number, m.write))
    edges: list[tuple[int, int, int]] = []
    for (_, chunk), uses in places.items():
        for before, after, rounds in _conflicts(sorted(uses), messages):
            waits.check(before.step, after.step, chunk)
            edges.append((before.message, after.message, rounds))
    return _longest_paths(edges, steps, messages)


def _conflicts(uses: Sequence[_Use], messages: Sequence[Message]) -> list[tuple[_Use, _Use, int]]:
    """Uses of a place, the next one that must wait for it, and for how many rounds."""
    found = []
    write: _Use | None = None
    reads: list[_Use] = []
    for use in uses:
        if use.reads:
            if write is not None:
                found.append((write, use, 1))
            reads.append(use)
            continue
        reduces = messages[use.message].reduce
        found += [(read, use, 0 if reduces else 1) for read in reads]
        if write is not None:
            found.append((write, use, 0 if reduces and messages[write.message].reduce else 1))
        write, reads = use, []
    return found


def _longest_paths(
    edges: Sequence[tuple[int, int, int]], steps: Sequence[Step], messages: Sequence[Message]
) -> list[int]:
    """The smallest rounds that are as far apart as ``edges`` (before, after, rounds) say.

    Both ends of an exchange are in the same round, so there are circles of edges of no round. A circle that
    adds up to more has no solution: then the rounds grow beyond the number of messages.
    """
    before, after, rounds = np.array(edges, np.int64).reshape(-1, 3).T
    found = np.zeros(len(messages), np.int64)
    while True:
        later = found.copy()
        np.maximum.at(later, after, found[before] + rounds)
        if np.array_equal(later, found):
            return [int(k) for k in found]
        found = later
        if found.max() > len(messages):
            step = steps[messages[int(found.argmax())].send]
            raise ExchangeError(
                f"{step.name}: expected transfers that fall into rounds; got some that each use "
                "a chunk both before and after another does"
            )


class _Waits:
    """Which step surely ends before another one starts, on the same rank."""

    def __init__(self, steps: Sequence[Step], messages: Sequence[Message], order: Sequence[int]) -> None:
        self.steps = steps
        self.when = dict(zip(order, range(len(order)), strict=True))
        self._received: dict[int, set[int]] = defaultdict(set)
        for m in messages:
            self._received[m.recv].add(m.send)
        # For each step its number on its rank, and the set of that rank's steps before it, as bits. This
        # finds nearly all; to see what waits by way of other ranks the whole file has to be searched.
        self._number: dict[int, int] = {}
        self._before: dict[int, int] = {}
        counts: Counter[int] = Counter()
        for k in order:
            self._number[k] = counts[steps[k].rank]
            counts[steps[k].rank] += 1
            known = 0
            for earlier in steps[k].after:
                known |= self._before[earlier] | 1 << self._number[earlier]
            self._before[k] = known

    def check(self, first: int, second: int, chunk: int) -> None:
        """Raise `ExchangeError` unless ``second`` waits for ``first``; both use ``chunk`` of a rank."""
        if first == second or self._before[second] >> self._number[first] & 1:
            return
        if not self._waits(first, second):
            steps = self.steps
            raise ExchangeError(
                f"{steps[second].name}: expected it to wait for {steps[first].name}, or the other way round: "
                f"both use chunk {chunk} of rank {steps[first].rank}; got no order"
            )

    def _waits(self, first: int, second: int) -> bool:
        seen = {second}
        todo = [second]
        while todo:
            k = todo.pop()
            earlier = {*self.steps[k].after, *self._received[k]} - seen
            if first in earlier:
                return True
            todo += (k for k in earlier if self.when[k] > self.when[first])
            seen |= earlier
        return False
