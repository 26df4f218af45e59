"""Two lanes of tasks that go on beside each other: what a rank does on its node, and across nodes.

The loop is compiled and does not know what the tasks are. A row of a lane says which function to call with
which state until it is `DONE`, where to write the addresses of its buffers before, and how many rows of the
other lane must be complete before it begins. Rows of the node's lane are done one after the other, for the
ranks of a node share a channel; of the lane across, `IN_FLIGHT` may be under way at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from mpicoll.kernels.memory import call, call_long, int64s
from mpicoll.kernels.tasks import DONE, PENDING, Task
from mpicoll.transports.machine import CACHED, address_of, aligned_zeros, read_clock
from mpicoll.transports.messages import POLLS_BETWEEN_LOOKS, SHORT_SLEEP, YIELDS
from mpicoll.transports.stages import SLOTS

# -- a row
FUNCTION = 0  # of the task, and its state
STATE = 1
PROGRESS = 2  # address of a word that changes whenever the task gets on
SEND_WORD = 3  # addresses of the words that are to hold the addresses of its buffers
RECV_WORD = 4
SEND = 5  # which buffer, and the offset in it
SEND_AT = 6
RECV = 7
RECV_AT = 8
AFTER = 9  # rows of the other lane that must be complete
WIDTH = 10

# -- the state of two lanes. All int64.
NODE = 0  # words of a lane: its rows' address, their number, the first that is not complete
ACROSS = 3
ROWS, COUNT, FIRST = range(3)
STARTED = 6  # of the lane across: rows that have begun
AHEAD = 7  # whether the second of those is complete before the first
BUFFERS = 8  # addresses of input, output, scratch
FAILED = 11  # which lane the last error is from
SPINS = 12  # rounds without progress before the core is yielded
YIELD = 13  # addresses of functions
SLEEP = 14
CLOCK = 15
TIME = 16  # address of a timespec, and the timespec
NAP = 19  # address of the timespec that says how long to sleep, and the timespec
STATE_SIZE = 24

IN_FLIGHT = SLOTS


@njit(nogil=True)
def _row(s, lane, number):  # type: ignore[no-untyped-def]
    return int64s(s[lane + ROWS] + 8 * WIDTH * number)


@njit(nogil=True)
def _begin(s, row):  # type: ignore[no-untyped-def]
    """Tell a task where its buffers are."""
    int64s(row[SEND_WORD])[0] = s[BUFFERS + row[SEND]] + row[SEND_AT]
    int64s(row[RECV_WORD])[0] = s[BUFFERS + row[RECV]] + row[RECV_AT]


@njit(nogil=True)
def _step_across(s):  # type: ignore[no-untyped-def]
    """Go on with what is under way, and may begin, across: PENDING, DONE if it has got on, or an error."""
    if s[STARTED] < s[ACROSS + COUNT] and s[STARTED] - s[ACROSS + FIRST] < IN_FLIGHT:
        row = _row(s, ACROSS, s[STARTED])
        if row[AFTER] <= s[NODE + FIRST]:
            _begin(s, row)
            s[STARTED] += 1
    result = types.int64(PENDING)
    for number in range(s[ACROSS + FIRST], s[STARTED]):
        second = number > s[ACROSS + FIRST]
        if second and s[AHEAD] != 0:
            continue
        row = _row(s, ACROSS, number)
        before = int64s(row[PROGRESS])[0]
        found = call_long(row[FUNCTION], (row[STATE], types.int64(0)))
        if found == DONE and second:
            s[AHEAD] = 1
        elif found == DONE:
            s[ACROSS + FIRST] += 1 + s[AHEAD]
            s[AHEAD] = 0
        if found == DONE or (found == PENDING and int64s(row[PROGRESS])[0] != before):
            return types.int64(DONE)
        if found != PENDING:
            return found
    return result


@njit(nogil=True)
def _step_on_node(s):  # type: ignore[no-untyped-def]
    """Go on with the present row of the node's lane: PENDING, DONE if it has got on, or an error."""
    number = s[NODE + FIRST]
    if number == s[NODE + COUNT]:
        return types.int64(PENDING)
    row = _row(s, NODE, number)
    if row[AFTER] > s[ACROSS + FIRST]:
        return types.int64(PENDING)
    before = int64s(row[PROGRESS])[0]
    if before == 0:
        _begin(s, row)
    found = call_long(row[FUNCTION], (row[STATE], types.int64(0)))
    if found == DONE:
        s[NODE + FIRST] += 1
    elif found == PENDING and int64s(row[PROGRESS])[0] != before:
        return types.int64(DONE)
    return found


@CACHED.cfunc("int64(int64, int64)")
def _advance(state, patience):  # type: ignore[no-untyped-def]
    """Go on with both lanes, until they are done, an error, or no progress for ``patience`` nanoseconds."""
    s = int64s(state)
    idle = 0
    deadline = types.int64(0)
    while s[NODE + FIRST] < s[NODE + COUNT] or s[ACROSS + FIRST] < s[ACROSS + COUNT]:
        across = _step_across(s)
        if across != DONE and across != PENDING:
            s[FAILED] = ACROSS
            return across
        node = _step_on_node(s)
        if node != DONE and node != PENDING:
            s[FAILED] = NODE
            return node
        if across == DONE or node == DONE:
            idle = 0
            deadline = 0
            continue
        idle += 1
        if s[SPINS] == 0 and idle > YIELDS and patience != 0:
            call(s[SLEEP], (s[NAP], types.int64(0)))
        elif idle > s[SPINS]:
            call(s[YIELD], ())
        if patience != 0 and idle % POLLS_BETWEEN_LOOKS != 0:
            continue
        now = read_clock(s[CLOCK], s[TIME])
        if deadline == 0:
            deadline = now + patience
        if now >= deadline:
            return PENDING
    s[NODE + FIRST] = s[ACROSS + FIRST] = s[STARTED] = 0  # ready for the next start
    return DONE


advance = _advance.ctypes  # other Python threads go on meanwhile


@cache
def _functions() -> dict[int, int]:
    libc = ctypes.CDLL(None)
    found = {YIELD: libc.sched_yield, CLOCK: libc.clock_gettime, SLEEP: libc.nanosleep}
    return {slot: address_of(f) for slot, f in found.items()}


class Row(NamedTuple):
    """One task of a lane, and its buffers: addresses of words, which buffer, and the bytes before in it."""

    task: Task
    progress: int
    send_word: int
    recv_word: int
    send: tuple[int, int]
    recv: tuple[int, int]
    after: int


class Lanes:
    """Both lanes, to be gone through again and again; ``scratch`` is an address."""

    def __init__(self, node: Sequence[Row], across: Sequence[Row], scratch: int, spins: int) -> None:
        self._keep = (node, across)
        self._rows = [self._table(rows) for rows in self._keep]
        self.state = state = aligned_zeros(STATE_SIZE)
        for lane, rows in zip((NODE, ACROSS), self._rows, strict=True):
            state[lane + ROWS], state[lane + COUNT] = rows.ctypes.data, len(rows)
        state[BUFFERS + 2], state[SPINS] = scratch, spins
        for slot, address in _functions().items():
            state[slot] = address
        self.address = state.ctypes.data
        for slot in (TIME, NAP):
            state[slot] = self.address + 8 * (slot + 1)
        state[NAP + 2] = SHORT_SLEEP
        self._memory = memoryview(state.data)

    @staticmethod
    def _table(rows: Sequence[Row]) -> np.ndarray[Any, np.dtype[np.int64]]:
        flat = [(*r.task[:2], r.progress, r.send_word, r.recv_word, *r.send, *r.recv, r.after) for r in rows]
        return np.array(flat, np.int64).reshape(-1, WIDTH)

    def bind(self, send: int, recv: int) -> None:
        """Use the caller's buffers at these addresses."""
        self._memory[BUFFERS] = send
        self._memory[BUFFERS + 1] = recv

    def task(self, keep: Any) -> Task:
        """All of it as one task, which ``keep`` owns."""
        return Task(_advance.address, self.address, keep)

    @property
    def failed_on_node(self) -> bool:
        """Whether the last error is one of the node's lane."""
        return bool(self.state[FAILED] == NODE)

    @property
    def on_node(self) -> int | None:
        """The present row of the node's lane; None where all are complete."""
        first = int(self.state[NODE + FIRST])
        return first if first < self.state[NODE + COUNT] else None

    @property
    def across(self) -> range:
        """The rows that are under way across."""
        return range(int(self.state[ACROSS + FIRST]), int(self.state[STARTED]))
