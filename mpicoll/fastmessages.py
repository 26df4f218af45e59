"""The quickest way from Python into calls that send messages: those that have been made before.

As `fastcalls`, for communicators whose ranks do not all share memory. A plan for messages is made for one
size, so what is recognised is a call like an earlier one: arrays of the same dtype, size and flags, the same
operation and root. It runs the earlier call's task on the new addresses. All else goes to the Python method
of the same name.

A call's first messages are sent before Python is told which call it is, for what others hear of this rank:
that goes on while they travel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI
from numba import njit, types

from mpicoll.calls import Average
from mpicoll.fastcalls import (
    ADVANCE,
    ARRAY,
    COLLECTIVE,
    DATA,
    DTYPE,
    FINISH,
    FLAGS,
    JOB,
    METHODS,
    NONE,
    SLOW,
    STATE_SIZE,
    TYPE,
    VECTORCALL,
    _arguments,
    _complete,
    _finish,
    _method,
    _new_state,
    _result,
    _size,
)
from mpicoll.gpu.plans import GpuPlan
from mpicoll.kernels.memory import call, call_long, int64s
from mpicoll.kernels.tasks import DONE, Task
from mpicoll.requests import Call
from mpicoll.transports.machine import CACHED, address_of
from mpicoll.transports.shared import SharedPlan
from mpicoll.transports.steps import REDUCE_SCATTER
from mpicoll.watch import What, mark_bits

# -- more of a method's state, where that of `fastcalls` has its kinds of elements
NKNOWN = STATE_SIZE  # how many calls are known
ENTRIES = STATE_SIZE + 1  # address of what is known of them
COUNT = STATE_SIZE + 2  # address of the two words of `CallCount`
NUMBERS = STATE_SIZE + 3  # its first begins anew here
MARKS = STATE_SIZE + 4  # bits that its second may have
DECREF = STATE_SIZE + 5  # address of a function of CPython
WIDE_STATE_SIZE = STATE_SIZE + 6

# -- what is known of a call
OPERATION = 0  # address of the Python object
ROOT = 1
LOOKS = 2  # for two arguments: dtype, size and flags, or the address of an object that is no array
ALIASED = 8  # whether what is sent lies where the result comes to
SEND_FROM = 9  # which argument is sent, and which is written; -1 for none
RECV_FROM = 10
FUNCTION = 11  # the task
STATE = 12
SEND_WORD = 13  # addresses of words that are to hold the addresses of buffers
RECV_WORD = 14
TAG_WORDS = 15  # address of a table of addresses of words that are to hold the tag, and its length
NTAGS = 16
MARK = 17  # the fingerprint, in the tag's upper bits
NBYTES = 18
BEGIN = 19  # Python functions: the call has begun, and complete it
COMPLETE = 20
ENTRY_SIZE = 21

NO_ARRAY = -1  # as a size
GONE = -2  # as a size: the call was broken off, and MPI may still use its plan
MAX_CALLS = 32

FACTOR = 31  # odd, so that what has once made marks differ is never multiplied away


@njit
def _looks(s, e, at, thing):  # type: ignore[no-untyped-def]
    """Whether an argument looks as it did."""
    if e[at + 1] == NO_ARRAY:
        return e[at] == thing
    words = int64s(thing)
    if words[TYPE] != s[ARRAY] or words[DTYPE] != e[at]:
        return False
    return words[FLAGS] & 0xFFFFFFFF == e[at + 2] and _size(thing) == e[at + 1]


@njit
def _address(given, index):  # type: ignore[no-untyped-def]
    return int64s(given[index])[DATA] if index >= 0 else types.int64(0)


@njit
def _find(s, args, nargs, names):  # type: ignore[no-untyped-def]
    """Where the state says what is known of a call like this; 0 if nothing is."""
    nbuffers, operation, root = _arguments(s, args, nargs, names)
    given = int64s(args)
    for number in range(s[NKNOWN] if nbuffers >= 0 else 0):
        at = s[ENTRIES] + 8 * ENTRY_SIZE * number
        e = int64s(at)
        if e[OPERATION] != operation or e[ROOT] != root:
            continue
        fits = True
        for i in range(nbuffers):
            fits = fits and _looks(s, e, LOOKS + 3 * i, given[i])
        if fits and (_address(given, e[SEND_FROM]) == _address(given, e[RECV_FROM])) == (e[ALIASED] != 0):
            return at
    return types.int64(0)


@njit
def _bind(s, e, args):  # type: ignore[no-untyped-def]
    """The next tag, as `CallCount.next_tag`, and the caller's buffers."""
    count = int64s(s[COUNT])
    count[0] = (count[0] + 1) % s[NUMBERS]
    count[1] = (count[1] * FACTOR + e[MARK]) & s[MARKS]
    tags = int64s(e[TAG_WORDS])
    for i in range(e[NTAGS]):
        int64s(tags[i])[0] = count[0] | count[1]
    given = int64s(args)
    int64s(e[SEND_WORD])[0] = _address(given, e[SEND_FROM])
    int64s(e[RECV_WORD])[0] = _address(given, e[RECV_FROM])


@CACHED.cfunc("int64(int64, int64, int64, int64)")
def _call_known(me, args, nargs, names):  # type: ignore[no-untyped-def]
    s = int64s(int64s(me)[DATA])
    entry = _find(s, args, nargs, names)
    if entry == 0:
        return call_long(s[VECTORCALL], (s[SLOW], args, nargs, names))
    e = int64s(entry)
    _bind(s, e, args)
    s[JOB], s[ADVANCE], s[FINISH] = e[STATE], e[FUNCTION], e[COMPLETE]
    result = call_long(s[ADVANCE], (s[JOB], types.int64(0)))
    none = types.int64(0)
    begun = call_long(s[VECTORCALL], (e[BEGIN], none, none, none))
    if begun == 0:
        return begun  # an exception
    call(s[DECREF], (begun,))
    if result == DONE or _complete(s, e[NBYTES]):
        return _result(s, s[NONE])
    return _finish(s)


class CallCount:
    """How many calls of a communicator have travelled in messages, up to ``numbers``, and which.

    Every call's fingerprint changes the marks of all later ones, so that after a mismatch that no rank has
    noticed, because all only sent, the next call that waits does not meet the others'.
    """

    def __init__(self, numbers: int) -> None:
        self.numbers = numbers
        self.words = np.zeros(2, np.int64)

    @property
    def number(self) -> int:
        """That of the last call."""
        return int(self.words[0])

    def next_tag(self, what: What) -> int:
        """The tag of the next call: its number, and the mark of it and those before."""
        number, mark = self.words.tolist()
        number, mark = (number + 1) % self.numbers, (mark * FACTOR + what.mark) & mark_bits()
        self.words[:] = number, mark
        return int(number | mark)


class KnownMethod:
    """A compiled collective, ``call``, before the Python method ``slow`` of the same name.

    ``count`` is that of the communicator's calls in messages.
    """

    def __init__(self, name: str, slow: Callable[..., None], count: CallCount) -> None:
        nothing = Task(0, 0, None)
        self._state = _new_state(nothing, slow, slow, WIDE_STATE_SIZE)
        self._entries = np.zeros((MAX_CALLS, ENTRY_SIZE), np.int64)
        self._state.owned += (self._entries, count)
        self._state[COLLECTIVE] = METHODS[name]
        self._state[ENTRIES], self._state[COUNT] = self._entries.ctypes.data, count.words.ctypes.data
        self._state[NUMBERS], self._state[MARKS] = count.numbers, mark_bits()
        self._state[DECREF] = address_of(ctypes.pythonapi.Py_DecRef)
        self.call = _method(name, _call_known, self._state, slow.__doc__)

    def learn(
        self, call: Call, begin: Callable[[What], None], args: tuple[Any, ...], named: Mapping[str, Any]
    ) -> bool:
        """From now on do calls like ``call``, whose arguments these were; whether that is possible.

        ``begin`` is told which call has begun.
        """
        number, nbuffers = int(self._state[NKNOWN]), _nbuffers(int(self._state[COLLECTIVE]))
        buffers = args[:nbuffers]
        places, rest = _places(call, buffers), _rest((*args[nbuffers:], *named.values()))
        if places is None or rest is None or number == MAX_CALLS or call.before or call.after:
            return False
        if isinstance(call.plan, (SharedPlan, GpuPlan)):
            return False
        if int(self._state[COLLECTIVE]) > REDUCE_SCATTER:
            rest = (None, rest[1])
        send_word, recv_word, tags = call.plan.bound_words
        words, (task,) = np.array(tags, np.int64), call.plan.tasks
        begun = partial(self._guarded, number, call, partial(begin, call.what))
        complete = partial(self._guarded, number, call, partial(_to_the_end, call))
        entry = self._entries[number]
        entry[LOOKS : LOOKS + 3 * nbuffers] = [word for arg in buffers for word in _looks_of(arg)]
        entry[[OPERATION, ROOT]] = 0 if rest[0] is None else id(rest[0]), rest[1]
        entry[ALIASED], entry[[SEND_FROM, RECV_FROM]] = call.send == call.recv, places
        entry[[FUNCTION, STATE, SEND_WORD, RECV_WORD]] = task.function, task.state, send_word, recv_word
        entry[[TAG_WORDS, NTAGS, MARK]] = words.ctypes.data, len(words), call.what.mark
        entry[NBYTES] = max((arg.nbytes for arg in buffers if type(arg) is np.ndarray), default=0)
        entry[[BEGIN, COMPLETE]] = id(begun), id(complete)
        call.keep = ()  # the arrays are the caller's; only their likes are remembered
        kept = [arg.dtype if type(arg) is np.ndarray else arg for arg in buffers]
        self._state.owned += (call, task, words, begun, complete, rest, kept)
        self._state[NKNOWN] = number + 1
        return True

    def _guarded(self, number: int, call: Call, function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException:
            self._entries[number, [LOOKS + 1, LOOKS + 4]] = GONE
            _broken_off.append(call)
            raise


_broken_off: list[Call] = []  # MPI may still write into their memory, so it is never freed


def _to_the_end(call: Call) -> None:
    while not call.plan.advance():
        pass


def _looks_of(arg: Any) -> tuple[int, int, int]:
    return (id(arg.dtype), arg.size, arg.flags.num) if type(arg) is np.ndarray else (id(arg), NO_ARRAY, 0)


def _rest(given: tuple[Any, ...]) -> tuple[Any, int] | None:
    """Operation and root among what follows the buffers; None if there is anything else."""
    operations = [arg for arg in given if isinstance(arg, (MPI.Op, Average))]
    roots = [arg for arg in given if type(arg) is int]
    if len(operations) + len(roots) < len(given):
        return None
    return (operations[0] if operations else MPI.SUM), (roots[0] if roots else 0)


def _nbuffers(collective: int) -> int:
    return {METHODS["Barrier"]: 0, METHODS["Bcast"]: 1}.get(collective, 2)


def _places(call: Any, args: tuple[Any, ...]) -> tuple[int, int] | None:
    """Which arguments are sent and written, -1 for none; None if other memory is."""
    arrays = {arg.ctypes.data: i for i, arg in enumerate(args) if type(arg) is np.ndarray and arg.size}
    if any(address and address not in arrays for address in (call.send, call.recv)):
        return None
    return arrays.get(call.send, -1), arrays.get(call.recv, -1)
