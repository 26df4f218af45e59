"""Where no core is idle: communication after the backward pass, by the thread that is through with it.

DDP asks for the sum of a bucket of gradients as soon as it is complete, and waits for all when the backward
pass ends. Meanwhile a thread does what it can, which pays where it has a core to itself. Where all cores
compute, it takes from the backward pass what it gains, and waking it and waiting for it come on top: with 2
ranks on 2 cores, a fifth of the step of a small model. So there the pass does it all at its end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch.autograd import Variable

# The frame of Python that C++ is called from which runs a backward pass; DDP's reducer has none of its own.
_PASS: CodeType = torch.autograd.graph._engine_run_backward.__code__
_OURS = __name__.rpartition(".")[0]
_NONE = -1  # torch's number of no pass


class EndOfPass:
    """``finish()`` is called once at the end of each pass that `awaits` has said so of."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish
        self._last = _NONE

    def awaits(self) -> bool:
        """Whether this is asked by DDP within a pass, which then calls ``finish`` when it ends.

        Not if it is asked by a hook that somebody has written in Python, who may wait for something else.
        """
        if not _is_asked_by_ddp():
            return False
        number = torch._C._current_graph_task_id()
        if number == _NONE:
            return False
        if number != self._last:
            Variable._execution_engine.queue_callback(self._finish)
            self._last = number
        return True


def _is_asked_by_ddp() -> bool:
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
        frame = frame.f_back
    return frame is not None and frame.f_code is _PASS
