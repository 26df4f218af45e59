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

from mpicoll.buffers import address_getter
from mpicoll.calls import OPERATIONS, Average
from mpicoll.requests import Call

MAX_REMEMBERED = 64

_SIMPLE = (int, str, type(None), type(MPI.IN_PLACE), Average)
# By identity: these objects live as long as the process, and MPI's handles cannot be hashed.
_NAMES = {id(getattr(MPI, name)): name for name in OPERATIONS}
# All that matters of an array but its address; the flags say whether it is contiguous and may be written.
_look = attrgetter("dtype", "size", "flags.num")


def signature(prepare: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What a repeated call is recognised by; None if it may not be remembered."""
    if len(args) == 2 and not named and type(args[0]) is type(args[1]) is np.ndarray:
        return prepare, _look(args[0]), _look(args[1])  # as below, without the loop
    key: list[Any] = [prepare]
    for arg in (*args, *named, *named.values()):
        if type(arg) is np.ndarray:
            key.append(_look(arg))
        elif id(arg) in _NAMES:
            key.append(_NAMES[id(arg)])
        elif type(arg) in _SIMPLE:
            key.append(arg)
        else:
            return None
    return tuple(key)


def _nothing(arg: Any) -> int:
    return 0


class Remembered:
    """A completed call's plan, which arguments are its buffers and how to find their addresses."""

    __slots__ = (
        "aliased",
        "busy",
        "call",
        "plan",
        "recv",
        "recv_address",
        "recv_at",
        "send",
        "send_address",
        "send_at",
    )

    def __init__(self, call: Call, args: tuple[Any, ...], send: int | None, recv: int | None) -> None:
        self.call = call
        self.plan = call.plan
        self.aliased = call.send == call.recv
        self.busy = False
        self.send, self.send_address = _source(args, send)
        self.recv, self.recv_address = _source(args, recv)
        self.send_at = self.recv_at = 0

    def run(self, tag: int) -> None:
        """The call, on the arguments that it was matched with."""
        self.busy = True  # and so it stays if the call is broken off, for MPI may still use the plan
        self.plan.run(tag, self.send_at, self.recv_at)
        self.busy = False


def _source(args: tuple[Any, ...], index: int | None) -> tuple[int, Callable[[Any], int]]:
    """Where among the arguments a buffer is, and what gives its address: 0 if it is not there."""
    if index is None:
        return -1, _nothing
    return index, address_getter(args[index].dtype)


class RepeatedCalls:
    """The calls that one communicator remembers."""

    def __init__(self, release: Callable[[Call], None]) -> None:
        self._release = release
        self._calls: dict[Any, Remembered] = {}

    def match(self, key: Any, args: tuple[Any, ...]) -> Remembered | None:
        """The remembered call, to be run on these arguments; None if there is none."""
        known = self._calls.get(key)
        if known is None or known.busy:
            return None
        known.send_at = known.send_address(args[known.send])
        known.recv_at = known.recv_address(args[known.recv])
        return known if (known.send_at == known.recv_at) is known.aliased else None

    def remember(self, key: Any, call: Call, args: tuple[Any, ...]) -> bool:
        """Keep a completed call, if its buffers are its arguments; whether it was kept."""
        if key is None or key in self._calls or not args or call.before or call.after:
            return False
        arrays = {arg.ctypes.data: i for i, arg in enumerate(args) if type(arg) is np.ndarray and arg.size}
        if any(address and address not in arrays for address in (call.send, call.recv)):
            return False
        call.keep = ()  # the arrays are the caller's; only their likes are remembered
        self._calls[key] = Remembered(call, args, arrays.get(call.send), arrays.get(call.recv))
        if len(self._calls) > MAX_REMEMBERED:
            oldest = self._calls.pop(next(iter(self._calls)))
            if not oldest.busy:
                self._release(oldest.call)
        return True
