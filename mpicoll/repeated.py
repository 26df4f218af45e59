"""Calls remembered by what their arguments look like.

Training calls the same collective on arrays of the same size again and again. Checking the arguments anew
costs ten times what a small message does; looking them up costs little. Only plain calls are
remembered: contiguous NumPy arrays used where they lie. Nothing here is tidier than it is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import numpy as np
from mpi4py import MPI

from mpicoll.calls import OPERATIONS
from mpicoll.requests import Call

MAX_REMEMBERED = 64

# By identity: these objects live as long as the process, and MPI's handles cannot be hashed.
_NAMES = {id(getattr(MPI, name)): name for name in OPERATIONS}
# All that matters of an array but its address; the flags say whether it is contiguous and may be written.
_look = attrgetter("dtype", "size", "flags.num")


def signature(prepare: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What a repeated call is recognised by: not hashable if it may not be remembered."""
    if len(args) == 2 and type(args[0]) is type(args[1]) is np.ndarray:
        looks: Any = (_look(args[0]), _look(args[1]))  # as below, without the loop
    else:
        looks = tuple([_look(x) if type(x) is np.ndarray else _NAMES.get(id(x), x) for x in args])
    if not named:
        return prepare, looks
    return prepare, looks, tuple([(name, _NAMES.get(id(x), x)) for name, x in named.items()])


def _get_data(array: np.ndarray[Any, Any]) -> int:
    return int(array.ctypes.data)


def _nothing(arg: Any) -> int:
    return 0


class _Remembered:
    """A completed call's plan, which arguments are its buffers and how to find their addresses."""

    __slots__ = ("aliased", "busy", "call", "plan", "recv", "recv_address", "send", "send_address")

    def __init__(self, call: Call, args: tuple[Any, ...], send: int | None, recv: int | None) -> None:
        self.call = call
        self.plan = call.plan
        self.aliased = call.send == call.recv
        self.busy = False
        self.send, self.send_address = _source(args, send)
        self.recv, self.recv_address = _source(args, recv)


def _source(args: tuple[Any, ...], index: int | None) -> tuple[int, Callable[[Any], int]]:
    """Where among the arguments a buffer is, and what gives its address: 0 if it is not there."""
    if index is None:
        return -1, _nothing
    exported = args[index].dtype.kind not in "VmM"  # the buffer protocol knows no bfloat16 and no dates
    return index, MPI.Get_address if exported else _get_data


def _is_new(key: Any, calls: Mapping[Any, _Remembered]) -> bool:
    try:
        return key not in calls
    except TypeError:
        return False


class RepeatedCalls:
    """The calls that one communicator remembers."""

    def __init__(self, release: Callable[[Call], None]) -> None:
        self._release = release
        self._calls: dict[Any, _Remembered] = {}

    def run(self, key: Any, args: tuple[Any, ...], tag: int) -> bool:
        """Run the remembered call on these arguments; false if there is none."""
        try:
            known = self._calls.get(key)
        except TypeError:  # lists, datatypes, operations of the user's
            return False
        if known is None or known.busy:
            return False
        send = known.send_address(args[known.send])
        recv = known.recv_address(args[known.recv])
        if (send == recv) is not known.aliased:
            return False
        known.busy = True  # and so it stays if the call is broken off, for MPI may still use the plan
        known.plan.run(tag, send, recv)
        known.busy = False
        return True

    def remember(self, key: Any, call: Call, args: tuple[Any, ...]) -> bool:
        """Keep a completed call, if its buffers are its arguments; whether it was kept."""
        plain = args and call.before is None and call.after is None
        if not plain or not _is_new(key, self._calls):
            return False
        arrays = {arg.ctypes.data: i for i, arg in enumerate(args) if type(arg) is np.ndarray and arg.size}
        if any(address and address not in arrays for address in (call.send, call.recv)):
            return False
        call.keep = ()  # the arrays are the caller's; only their likes are remembered
        self._calls[key] = _Remembered(call, args, arrays.get(call.send), arrays.get(call.recv))
        if len(self._calls) > MAX_REMEMBERED:
            oldest = self._calls.pop(next(iter(self._calls)))
            if not oldest.busy:
                self._release(oldest.call)
        return True
