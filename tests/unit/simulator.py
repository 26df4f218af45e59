"""Numba's CUDA simulator, made quick, and its threads made to take turns often; importing this changes it.

For `cuda_cases`, where NUMBA_ENABLE_CUDASIM is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from queue import SimpleQueue
from threading import Barrier, BrokenBarrierError, Lock, Thread
from typing import Any

import numpy as np
from mpicoll.kernels import device_cuda
from numba.cuda.simulator import kernel, kernelapi

# A block's threads take turns often, as a GPU's do: those that forget to wait for each other fail.
sys.setswitchinterval(1e-5)  # seconds; otherwise 5 ms

ALLOCATING = Lock()
LONGEST_WAIT = 60  # seconds for the others of a block


def shared_array(self: Any, shape: int, dtype: Any) -> Any:
    """The array of the calling line. The simulator's own gives two threads that ask at once one each."""
    caller = sys._getframe(1)
    with ALLOCATING:
        return self._allocations.setdefault((caller.f_code, caller.f_lineno), np.empty(shape, str(dtype)))


kernelapi.FakeCUDAShared.array = shared_array


class BlockThread(Thread):
    """One of a block's threads. It stays for the next block: to start it takes longer than what it does."""

    def __init__(self, index: int) -> None:
        super().__init__(daemon=True)
        self.threadIdx = kernelapi.Dim3(index, 0, 0)
        self.work: SimpleQueue[tuple[Any, Callable[..., None], tuple[Any, ...]]] = SimpleQueue()
        self.start()

    def run(self) -> None:
        while True:
            self.blockIdx, function, arguments = self.work.get()
            try:
                FAILURES.put(function(*arguments))
            except BaseException as failure:
                SYNCHRONISED.abort()
                FAILURES.put(failure)

    def syncthreads(self) -> None:
        SYNCHRONISED.wait(LONGEST_WAIT)


def run_block(self: Any, block: tuple[int, ...], *arguments: Any) -> None:
    """All threads of a block. The simulator polls its own ones, which takes the interpreter from them."""
    for thread in BLOCK:
        thread.work.put((kernelapi.Dim3(*block), self._f, arguments))
    failures = [failure for failure in [FAILURES.get() for _ in BLOCK] if failure]
    if failures:
        SYNCHRONISED.reset()
        raise min(failures, key=lambda failure: isinstance(failure, BrokenBarrierError))


FAILURES: SimpleQueue[BaseException | None] = SimpleQueue()
SYNCHRONISED = Barrier(device_cuda.THREADS)
BLOCK = [BlockThread(i) for i in range(device_cuda.THREADS)]
kernel.BlockManager.run = run_block
