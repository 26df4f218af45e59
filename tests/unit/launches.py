"""Launches of a kernel, by the driver of ``libcuda.c``, which says what it is asked; see `test_launches`."""

from __future__ import annotations

import threading

import numpy as np
from cuda.bindings import driver
from mpicoll.kernels.device_cuda import Kernel
from numba import types

# Of what has 8 bytes the driver says the lower 4.
VALUES = (1 << 40 | 3, 0.1, (5, 6), 0.1, np.int32(-7))
SAID = [3, np.float32(0.1).view(np.uint32), 5, 6, np.float64(0.1).view(np.uint64) & 0xFFFFFFFF, 2**32 - 7]


def nothing(a, b, c, d, e):
    pass


def main() -> None:
    pair = types.UniTuple(types.int64, 2)
    kernel = Kernel(nothing, types.int64, types.float32, pair, types.float64, types.int64)
    for stream in (0, 1, 2, 0xABC0):
        for _ in range(2):
            kernel.launch(3, stream, *VALUES)
    kernel.launch(0, 0, *VALUES)
    driver.cuCtxSetCurrent(driver.cuDevicePrimaryCtxRetain(1)[1])
    kernel.launch(4, 0, *VALUES)
    without_context = threading.Thread(target=kernel.launch, args=(5, 0, *VALUES))
    without_context.start()
    without_context.join()
    kernel.launch(6, 0, *VALUES)


if __name__ == "__main__":
    main()
