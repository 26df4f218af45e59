"""Time stamps in a list of tasks that compiled code does, without Python.

Gradients are packed, reduced and unpacked by a thread that knows no Python (`mpicoll.progress`). To see when,
tasks are put in between that write the time down, each with a number that says what has just ended:

    tasks     [0]  pack  [1]  allreduce  [2]  unpack  [3]         [0] begins: nothing has ended
    log        0    10 µs    1   14 µs    2   59 µs    3  62 µs   the allreduce took from 14 to 59 µs

The clock is that of ``time.perf_counter_ns``. A stamp costs about 50 ns. A log that is full stays as it is.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numba import types

from mpicoll.calls import OPERATIONS
from mpicoll.kernels import packing
from mpicoll.kernels.memory import call, int64s
from mpicoll.kernels.tasks import DONE, Task
from mpicoll.progress import PythonTask, PythonTurns
from mpicoll.requests import Call, Series
from mpicoll.trace.chrome import COLLECTIVE, PACK
from mpicoll.transports.machine import CACHED, address_of

CLOCK_MONOTONIC = 1  # of Linux
SECOND = 1_000_000_000  # nanoseconds
BEGIN = 0  # the label of a stamp at which nothing ends

# -- a stamp's state, all int64
LOG = 0  # address
LABEL = 1
GET_TIME = 2  # address of clock_gettime
TIME = 3  # two words: seconds and nanoseconds
STATE_SIZE = 5

# -- a log, all int64: how many stamps there would be, room for how many, then a label and a time for each
COUNT = 0
ROOM = 1
FIRST = 2


@CACHED.cfunc("int64(int64, int64)")
def _stamp(state, patience):  # type: ignore[no-untyped-def]
    s = int64s(state)
    log = int64s(s[LOG])
    count = log[COUNT]
    log[COUNT] = count + 1
    if count < log[ROOM]:
        call(s[GET_TIME], (types.int64(CLOCK_MONOTONIC), state + 8 * TIME))
        log[FIRST + 2 * count] = s[LABEL]
        log[FIRST + 2 * count + 1] = s[TIME] * SECOND + s[TIME + 1]
    return DONE


class Label(NamedTuple):
    """What a piece of work is."""

    name: str
    category: str
    nbytes: int = 0
    dtype: str = ""
    op: str = ""
    algorithm: str = ""


class Stamps:
    """The stamps of one list of tasks, ``limit`` at most."""

    def __init__(self, limit: int) -> None:
        self._log = np.zeros(FIRST + 2 * limit, np.int64)  # memory that nobody touches costs nothing
        self._log[ROOM] = limit
        self._labels: list[Label | None] = [None]

    @property
    def dropped(self) -> int:
        """How many there was no room for."""
        return max(0, int(self._log[COUNT] - self._log[ROOM]))

    def between(self, tasks: Sequence[Task], series: Series) -> list[Task]:
        """``tasks``, with a stamp before the first and one after each; ``series`` made them."""
        calls = {task.state: made for made in series.calls for task in getattr(made.plan, "tasks", ())}
        stamped = [self._task(BEGIN)]
        for task in tasks:
            made = calls.get(task.state)
            self._labels.append(_call_label(made) if made is not None else _task_label(task))
            stamped += task, self._task(len(self._labels) - 1)
        return stamped

    def _task(self, label: int) -> Task:
        state = np.zeros(STATE_SIZE, np.int64)
        state[LOG], state[LABEL] = self._log.ctypes.data, label
        state[GET_TIME] = address_of(ctypes.CDLL(None).clock_gettime)
        return Task(_stamp.address, state.ctypes.data, (state, self._log))

    def events(self) -> Iterator[tuple[Label, int, int]]:
        """What was done, from when to when."""
        count = int(min(self._log[COUNT], self._log[ROOM]))
        before = 0
        for number, at in self._log[FIRST : FIRST + 2 * count].reshape(-1, 2).tolist():
            label = self._labels[number]
            if label is not None:
                yield label, before, at
            before = at


def _task_label(task: Task) -> Label:
    """A task that is no collective."""
    if task.function == packing._move.address:
        state, tensors = task.keep[0], task.keep[2]
        name = "unpack" if state[packing.UNPACKS] else "pack"
        return Label(name, PACK, sum(tensor.nbytes for tensor in tensors), str(tensors[0].dtype))
    if isinstance(task.keep, PythonTask):
        return Label("convert", PACK)  # compress, widen, and back
    if isinstance(task.keep, PythonTurns):
        return Label("reduction on a GPU", COLLECTIVE)
    return Label("prepare", PACK)


def _call_label(made: Call) -> Label:
    """From a call in words, such as ``Allreduce(float32[100], AVG)``."""
    name, _, arguments = made.what.text.rstrip(")").partition("(")
    operation = re.search(rf"\b({'|'.join((*OPERATIONS, 'AVG'))})\b", arguments)
    data = [each for each in made.keep if hasattr(each, "nbytes")]
    return Label(
        name,
        COLLECTIVE,
        max((each.nbytes for each in data), default=0),
        str(data[0].dtype) if data and operation else "",
        operation[0] if operation else "",
        made.what.algorithm,
    )
