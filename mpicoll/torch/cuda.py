"""Work on CUDA tensors beside the program: on a stream of its own, ordered with the program's by events.

Nothing here waits for the device. What the program has put on its current stream before it asks for the work
comes first; ``wait()`` lets what it puts on its current stream from then on come after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Ordered:
    """``run()``, which puts work on tensors of one GPU on the current stream, on the side stream instead."""

    def __init__(self, run: Callable[[], None], tensors: Sequence[torch.Tensor]) -> None:
        self._run, self._device = run, tensors[0].device
        self._ready, self._done = torch.cuda.Event(), torch.cuda.Event()
        self._ready.record(torch.cuda.current_stream(self._device))
        self.side = _side_stream(self._device)
        for tensor in tensors:
            tensor.record_stream(self.side)  # their memory is not to serve again before

    def run(self) -> None:
        """In whatever thread."""
        with torch.cuda.stream(self.side):
            self.side.wait_event(self._ready)
            self._run()
            self._done.record(self.side)

    def join(self) -> None:
        """The current stream goes on when the work is done."""
        torch.cuda.current_stream(self._device).wait_event(self._done)
