"""Gradients as differences: what layers and models are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]


def numerical_gradient(function: Callable[[], float], at: AnyArray, step: float = 1e-6) -> AnyArray:
    """(f(x + h) - f(x - h)) / 2h for each number in ``at``."""
    gradient = np.empty_like(at)
    for i in range(at.size):
        kept = at.flat[i]
        at.flat[i] = kept + step
        above = function()
        at.flat[i] = kept - step
        gradient.flat[i] = (above - function()) / (2 * step)
        at.flat[i] = kept
    return gradient
