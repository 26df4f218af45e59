"""Tasks: pieces of work that compiled code can do without knowing what they are."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

DONE = 0
PENDING = -1  # to be called again; any other result is an error


class Task(NamedTuple):
    """A call ``function(state, patience)``, both being addresses; ``patience`` is in nanoseconds.

    It returns `DONE`, `PENDING` when nothing has come from other ranks for so long, or an error's number.
    ``keep`` is what owns the memory that is used.
    """

    function: int
    state: int
    keep: Any


@cache
def _function(address: int) -> Callable[[int, int], int]:
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(address)


def run(task: Task) -> None:
    """Do a task that waits for nobody. Other Python threads go on meanwhile."""
    _function(task.function)(task.state, 0)
