"""Calls remembered by what their arguments look like.

Training calls the same collective on arrays of the same size again and again. Checking the arguments anew
costs ten times what a small message does; looking them up costs little. Only plain calls are
remembered: contiguous NumPy arrays used where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from mpi4py import MPI

from mpicoll.calls import OPERATIONS, Average
from mpicoll.requests import Call

MAX_REMEMBERED = 64
_SIMPLE = (int, str, type(None), type(MPI.IN_PLACE), Average)
# By identity: these objects live as long as the process, and comparing MPI handles is slower.
_NAMES = {id(getattr(MPI, name)): name for name in OPERATIONS}


def signature(prepare: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What a repeated call is recognised by; None if it may not be remembered."""
    key: list[Any] = [prepare]
    for arg in args:
        if type(arg) is np.ndarray:
            flags = arg.flags
            if not flags.forc:
                return None
            key.append((arg.dtype, arg.size, flags.writeable))
        elif type(arg) in _SIMPLE:
            key.append(arg)
        elif id(arg) in _NAMES:
            key.append(_NAMES[id(arg)])
        else:
            return None
    for name, arg in named.items():
        if type(arg) not in _SIMPLE and id(arg) not in _NAMES:
            return None
        key += (name, _NAMES.get(id(arg), arg))
    return tuple(key)


def _address(arg: Any) -> int:
    try:
        return MPI.Get_address(arg)
    except (TypeError, BufferError, ValueError):  # what the buffer protocol cannot export, such as bfloat16
        return int(arg.ctypes.data)


class _Remembered:
    """A call and which of its arguments are its buffers."""

    def __init__(self, call: Call, send: int | None, recv: int | None) -> None:
        self.call = call
        self.send = send
        self.recv = recv
        self.aliased = call.send == call.recv


class RepeatedCalls:
    """The calls that one communicator remembers, the least recently used first."""

    def __init__(self, release: Callable[[Call], None]) -> None:
        self._release = release
        self._calls: dict[Any, _Remembered] = {}

    def run(self, key: Any, args: tuple[Any, ...], next_tag: Callable[[], int]) -> bool:
        """Run the remembered call on these arguments; false if there is none."""
        known = self._calls.get(key)
        if known is None:
            return False
        call = known.call
        send = 0 if known.send is None else _address(args[known.send])
        recv = 0 if known.recv is None else _address(args[known.recv])
        if (send == recv) != known.aliased:
            return False
        del self._calls[key]  # comes back as the last; and stays away if it is broken off
        call.send = send
        call.recv = recv
        call.run(next_tag())
        self._calls[key] = known
        return True

    def remember(self, key: Any, call: Call, args: tuple[Any, ...]) -> bool:
        """Keep a completed call, if its buffers are its arguments; whether it was kept."""
        if call.before is not None or call.after is not None or key in self._calls:
            return False
        arrays = {_address(arg): i for i, arg in enumerate(args) if type(arg) is np.ndarray and arg.size}
        if any(address and address not in arrays for address in (call.send, call.recv)):
            return False
        call.keep = ()  # the arrays are the caller's; only their likes are remembered
        self._calls[key] = _Remembered(call, arrays.get(call.send), arrays.get(call.recv))
        if len(self._calls) > MAX_REMEMBERED:
            oldest = next(iter(self._calls))
            self._release(self._calls.pop(oldest).call)
        return True
