"""The quickest way from Python into the shared transport: methods that are compiled themselves.

Python needs longer to look at two arrays than two ranks need to add a few numbers. So the blocking
collectives of a `Communicator` on one node, and ``Start`` and ``Wait`` of its persistent calls, are C
functions: Numba compiles them, and CPython gets them as it gets the functions of any extension module. They
read the address, size and dtype of NumPy arrays where these lie in memory, look up the dtype and operation
among those seen before, and run the job.

Whatever is not an ordinary call on plain arrays of a known dtype goes to the Python method of the same name,
with the same arguments; so does what takes long enough for signals to be handled.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from mpi4py import MPI
from numba import njit, types

from mpicoll.kernels.memory import call, call_long, int64s
from mpicoll.kernels.tasks import DONE, Task
from mpicoll.transports import steps
from mpicoll.transports.machine import CACHED, address_of
from mpicoll.transports.shared import PATIENT, Reduction, SharedPlan
from mpicoll.transports.steps import (
    ALLGATHER,
    ALLREDUCE,
    ALLTOALL,
    AVERAGE,
    BARRIER,
    BROADCAST,
    CHANNEL,
    FIRST,
    FOLD,
    ITEM,
    NARROW,
    NRANKS,
    OPERATION,
    RANK,
    RECV,
    REDUCE,
    REDUCE_SCATTER,
    SEND,
    SPIN,
)

# -- a method's state, all int64
JOB = 0  # address of its job
COLLECTIVE = 1
ACTIVE = 2  # whether a persistent call has been started
SLOW = 3  # addresses of Python objects: the method to fall back on, and the one that completes the job
FINISH = 4
ARRAY = 5  # numpy.ndarray, int, None, True, IN_PLACE, SUM, "op", "root"
INT = 6
NONE = 7
TRUE = 8
IN_PLACE = 9
SUM = 10
OP_NAME = 11
ROOT_NAME = 12
INCREF = 13  # addresses of functions of CPython
VECTORCALL = 14
RELEASE_GIL = 15
TAKE_GIL = 16
AS_LONG = 17
ADVANCE = 18  # and of the transport
SET_UP = 19
KNOWN = 20  # how many kinds of elements are known, and what is known of them
KINDS = 21
KIND_WIDTH = 8  # words: dtype, operation, and the fields of a Reduction
MAX_KINDS = 24
STATE_SIZE = KINDS + KIND_WIDTH * MAX_KINDS

# -- where CPython and NumPy keep what, in words of 8 bytes; `_layout_is_known` makes sure of it
TYPE = 1  # of any object
DATA, NDIM, DIMENSIONS, DTYPE, FLAGS = 2, 3, 4, 7, 8  # of an array
ITEMS = 3  # of a tuple
CONTIGUOUS, BEHAVED, WRITABLE = 0x3, 0x100, 0x400
METH_FASTCALL, METH_KEYWORDS = 0x80, 0x02
DESCRIPTION = 4  # words that tell an array from others

QUICK = 32 << 10  # bytes up to which no other Python thread is let in at once: that takes as long as the call

METHODS = {
    "Allreduce": ALLREDUCE,
    "Reduce": REDUCE,
    "Reduce_scatter_block": REDUCE_SCATTER,
    "Bcast": BROADCAST,
    "Allgather": ALLGATHER,
    "Alltoall": ALLTOALL,
    "Barrier": BARRIER,
}


@njit
def _is_plain(s, thing, flags):  # type: ignore[no-untyped-def]
    """Whether an object is an array in one piece that has these flags."""
    words = int64s(thing)
    return words[TYPE] == s[ARRAY] and words[FLAGS] & CONTIGUOUS != 0 and words[FLAGS] & flags == flags


@njit
def _size(thing):  # type: ignore[no-untyped-def]
    """How many elements an array has."""
    words = int64s(thing)
    dimensions = int64s(words[DIMENSIONS])
    size = types.int64(1)
    for axis in range(words[NDIM] & 0xFFFFFFFF):
        size *= dimensions[axis]
    return size


@njit
def _find_kind(s, dtype, operation):  # type: ignore[no-untyped-def]
    """Where the state says how elements are reduced, or how large they are; 0 if they are not known."""
    for index in range(s[KNOWN]):
        at = KINDS + index * KIND_WIDTH
        if s[at] == dtype and s[at + 1] == operation:
            return at
    return 0


@njit
def _use_kind(s, j, at):  # type: ignore[no-untyped-def]
    j[OPERATION], j[ITEM], j[FIRST] = s[at + 2], s[at + 3], s[at + 4]
    j[FOLD], j[AVERAGE], j[NARROW] = s[at + 5], s[at + 6], s[at + 7]


@njit
def _set_up(s, buffers, nbuffers, operation, root):  # type: ignore[no-untyped-def]
    """Make the job of a call; the bytes that it is about, or -1 if it is no plain one."""
    j = int64s(s[JOB])
    c = int64s(j[CHANNEL])
    collective, nranks, me = s[COLLECTIVE], c[NRANKS], c[RANK]
    if root < 0 or root >= nranks:
        return -1
    if collective == BARRIER:
        j[OPERATION] = 0
        call(s[SET_UP], (s[JOB], collective, types.int64(0), types.int64(0)))
        return 0
    last = buffers[nbuffers - 1]
    writes = collective != BROADCAST or root != me
    if not _is_plain(s, last, BEHAVED | WRITABLE if writes else BEHAVED):
        return -1
    dtype, recv, count = int64s(last)[DTYPE], int64s(last)[DATA], _size(last)
    in_place = buffers[0] == s[IN_PLACE]
    send = recv
    sent = count
    if nbuffers == 2 and not in_place:
        if not _is_plain(s, buffers[0], BEHAVED) or int64s(buffers[0])[DTYPE] != dtype:
            return -1
        send, sent = int64s(buffers[0])[DATA], _size(buffers[0])
    at = _find_kind(s, dtype, operation)
    if at == 0:
        return -1
    item = s[at + 3]
    if collective in (ALLREDUCE, REDUCE):
        fits = sent == count and (not in_place or collective == ALLREDUCE or me == root)
    elif collective == REDUCE_SCATTER:
        fits = sent == count * nranks and not in_place
    elif collective == ALLGATHER:
        count = count // nranks if in_place else sent
        fits = _size(last) == count * nranks
        send += me * count * item if in_place else 0
    elif collective == ALLTOALL:
        fits = sent == count and count % nranks == 0 and not in_place
        count //= nranks
    else:
        fits = True
    if not fits:
        return -1
    _use_kind(s, j, at)
    j[SEND], j[RECV] = send, recv
    length = count if collective <= REDUCE_SCATTER else count * item
    call(s[SET_UP], (s[JOB], collective, length, root))
    return max(sent, count) * item


@njit
def _number(s, thing):  # type: ignore[no-untyped-def]
    """The value of an int; -1 for anything else, and for what is too large."""
    if int64s(thing)[TYPE] != s[INT]:
        return types.int64(-1)
    value = call_long(s[AS_LONG], (thing,))
    return value if 0 <= value < 1 << 24 else types.int64(-1)


@njit
def _parse(s, args, nargs, names):  # type: ignore[no-untyped-def]
    """Set up the job of a call; -1 for no plain call."""
    nbuffers, operation, root = _arguments(s, args, nargs, names)
    if nbuffers < 0:
        return -1
    return _set_up(s, int64s(args), nbuffers, operation, root)


@njit
def _arguments(s, args, nargs, names):  # type: ignore[no-untyped-def]
    """How many buffers the arguments begin with, -1 for no plain call; operation and root."""
    none = types.int64(0)
    unknown = (types.int64(-1), none, none)
    collective = s[COLLECTIVE]
    given = int64s(args)
    nbuffers = types.int64(0 if collective == BARRIER else 1 if collective == BROADCAST else 2)
    reduces = collective <= REDUCE_SCATTER
    if nargs < nbuffers:
        return unknown
    operation = s[SUM] if reduces else none
    root = types.int64(0)
    at = nbuffers
    if reduces and at < nargs:
        operation = given[at]
        at += 1
    if (collective in (REDUCE, BROADCAST)) and at < nargs:
        root = _number(s, given[at])
        at += 1
    if at < nargs:
        return unknown
    if names != 0:
        for index in range(int64s(names)[ITEMS - 1]):
            name, value = int64s(names)[ITEMS + index], given[nargs + index]
            if name == s[OP_NAME] and reduces:
                operation = value
            elif name == s[ROOT_NAME] and (collective in (REDUCE, BROADCAST)):
                root = _number(s, value)
            else:
                return unknown
    return nbuffers, operation, root


@njit
def _result(s, thing):  # type: ignore[no-untyped-def]
    """Return a Python object."""
    call(s[INCREF], (thing,))
    return thing


@njit
def _complete(s, nbytes):  # type: ignore[no-untyped-def]
    """Run the job; false if that takes so long that signals must be looked after, or if it goes wrong."""
    if nbytes <= QUICK and call_long(s[ADVANCE], (s[JOB], types.int64(SPIN))) == DONE:
        return True
    thread = call_long(s[RELEASE_GIL], ())
    result = call_long(s[ADVANCE], (s[JOB], types.int64(PATIENT)))
    call(s[TAKE_GIL], (thread,))
    return result == DONE


@njit
def _finish(s):  # type: ignore[no-untyped-def]
    """Leave the rest to Python."""
    none = types.int64(0)
    return call_long(s[VECTORCALL], (s[FINISH], none, none, none))


@CACHED.cfunc("int64(int64, int64, int64, int64)")
def _call_collective(me, args, nargs, names):  # type: ignore[no-untyped-def]
    s = int64s(int64s(me)[DATA])
    nbytes = _parse(s, args, nargs, names)
    if nbytes < 0:
        return call_long(s[VECTORCALL], (s[SLOW], args, nargs, names))
    if _complete(s, nbytes):
        return _result(s, s[NONE])
    return _finish(s)


@CACHED.cfunc("int64(int64, int64, int64, int64)")
def _start(me, args, nargs, names):  # type: ignore[no-untyped-def]
    s = int64s(int64s(me)[DATA])
    if s[ACTIVE] != 0 or nargs != 0 or names != 0:
        return call_long(s[VECTORCALL], (s[SLOW], args, nargs, names))
    # An error comes again in Wait, where it is handled.
    s[ACTIVE] = call_long(s[ADVANCE], (s[JOB], types.int64(0))) != DONE
    return _result(s, s[NONE])


@CACHED.cfunc("int64(int64, int64, int64, int64)")
def _wait(me, args, nargs, names):  # type: ignore[no-untyped-def]
    s = int64s(int64s(me)[DATA])
    if nargs != 0 or names != 0:
        return call_long(s[VECTORCALL], (s[FINISH], args, nargs, names))
    if s[ACTIVE] != 0:
        if not _complete(s, 0):
            return _finish(s)
        s[ACTIVE] = 0
    return _result(s, s[TRUE])


@CACHED.cfunc("int64(int64, int64, int64, int64)")
def _describe(sequence, is_list, array, table):  # type: ignore[no-untyped-def]
    """Write down where arrays in a list or tuple are, and what they hold; false if not all are arrays."""
    length = int64s(sequence)[ITEMS - 1]
    items = int64s(int64s(sequence)[ITEMS]) if is_list != 0 else int64s(sequence + 8 * ITEMS)
    for i in range(length):
        words, row = int64s(items[i]), int64s(table + 8 * DESCRIPTION * i)
        if words[TYPE] != array:
            return 0
        row[0], row[1] = words[DATA], _size(items[i])
        row[2], row[3] = words[DTYPE], words[FLAGS] & 0xFFFFFFFF
    return 1


class _Definition(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


@cache
def _definition(name: str, address: int, doc: str | None) -> _Definition:
    """Kept for good, for functions refer to it."""
    return _Definition(name.encode(), address, METH_FASTCALL | METH_KEYWORDS, doc and doc.encode())


class _State(np.ndarray[Any, np.dtype[np.int64]]):
    """A method's state, which is its ``self``; ``owned`` is what it refers to by address."""

    owned: tuple[Any, ...]


def _functions() -> dict[int, int]:
    api = ctypes.pythonapi
    found = {INCREF: api.Py_IncRef, VECTORCALL: api.PyObject_Vectorcall, AS_LONG: api.PyLong_AsLong}
    found |= {RELEASE_GIL: api.PyEval_SaveThread, TAKE_GIL: api.PyEval_RestoreThread}
    addresses = {slot: address_of(function) for slot, function in found.items()}
    return addresses | {SET_UP: steps.SET_UP}


_OBJECTS = {
    ARRAY: np.ndarray,
    INT: int,
    NONE: None,
    TRUE: True,
    IN_PLACE: MPI.IN_PLACE,
    SUM: MPI.SUM,
    OP_NAME: sys.intern("op"),
    ROOT_NAME: sys.intern("root"),
}


def _new_state(
    task: Task, slow: Callable[..., Any], finish: Callable[[], Any], size: int = STATE_SIZE
) -> _State:
    state = np.zeros(size, np.int64).view(_State)
    state.owned = (task, slow, finish)
    for slot, thing in _OBJECTS.items():
        state[slot] = id(thing)
    for slot, address in _functions().items():
        state[slot] = address
    state[JOB], state[ADVANCE], state[SLOW], state[FINISH] = task.state, task.function, id(slow), id(finish)
    return state


def _method(name: str, function: Any, state: _State, doc: str | None) -> Any:
    new = ctypes.pythonapi.PyCFunction_NewEx
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.py_object, ctypes.py_object)
    return new(ctypes.addressof(_definition(name, function.address, doc)), state, __name__)


@cache
def available() -> bool:
    """Whether objects lie in memory as the compiled functions believe; they do in CPython with its lock."""
    if sys.implementation.name != "cpython" or getattr(sys, "_is_gil_enabled", lambda: True)() is False:
        return False
    array = np.zeros((3, 5), np.float32)
    words = (ctypes.c_int64 * (FLAGS + 1)).from_address(id(array))
    names = ("op", "root")
    items = (ctypes.c_int64 * (ITEMS + 2)).from_address(id(names))
    listed = list(names)
    in_list = (ctypes.c_int64 * (ITEMS + 1)).from_address(id(listed))
    dimensions = (ctypes.c_int64 * 2).from_address(words[DIMENSIONS])
    return (
        words[TYPE] == id(np.ndarray)
        and words[DATA] == array.ctypes.data
        and words[NDIM] & 0xFFFFFFFF == array.ndim
        and tuple(dimensions) == array.shape
        and words[DTYPE] == id(array.dtype)
        and words[FLAGS] & 0xFFFFFFFF == array.flags.num
        and items[ITEMS - 1] == len(names)
        and list(items[ITEMS:]) == [id(name) for name in names]
        and in_list[ITEMS - 1] == len(listed)
        and list((ctypes.c_int64 * 2).from_address(in_list[ITEMS])) == [id(name) for name in listed]
    )


@cache
def _describe_function() -> Callable[[int, bool, int, int], int]:
    """It keeps the GIL, without which another thread might change the list."""
    return ctypes.PYFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)(_describe.address)


def described(arrays: Sequence[Any]) -> bytes | None:
    """What tells a list or tuple of arrays from others: address, size, dtype and flags of each.

    None if they are not all plain NumPy arrays. A dtype counts as another when it is another object.
    """
    if type(arrays) not in (list, tuple) or not available():
        return None
    table = np.empty(DESCRIPTION * len(arrays), np.int64)
    known = _describe_function()(id(arrays), type(arrays) is list, id(np.ndarray), table.ctypes.data)
    return table.tobytes() if known else None


class FastMethod:
    """A compiled collective, ``call``, before the Python method ``slow`` of the same name."""

    def __init__(self, name: str, plan: SharedPlan, slow: Callable[..., None]) -> None:
        self._state = _new_state(plan.tasks[0], slow, plan.finish)
        self._state[COLLECTIVE] = METHODS[name]
        self.call = _method(name, _call_collective, self._state, slow.__doc__)

    def learn(self, dtype: np.dtype[Any], operation: Any, reduction: Reduction) -> None:
        """From now on do calls on elements of ``dtype``; ``operation`` is None where nothing is reduced."""
        state = self._state
        key = (id(dtype), 0 if operation is None else id(operation))
        known = int(state[KNOWN])
        if known == MAX_KINDS or key in [tuple(row[:2]) for row in self._kinds()[:known]]:
            return
        state.owned += (dtype, operation)
        self._kinds()[known] = [*key, *reduction]
        state[KNOWN] = known + 1

    def _kinds(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self._state[KINDS:].view(np.ndarray).reshape(MAX_KINDS, KIND_WIDTH)


class FastStart:
    """Compiled ``start`` and ``wait`` of a persistent call's ``task``, before the methods ``slow_...``.

    ``state[ACTIVE]`` says whether the call is under way.
    """

    def __init__(self, task: Task, slow_start: Callable[[], None], slow_wait: Callable[[], bool]) -> None:
        state = _new_state(task, slow_start, slow_wait)
        self.state = state
        self.start = _method("Start", _start, state, slow_start.__doc__)
        self.wait = _method("Wait", _wait, state, slow_wait.__doc__)
