"""Random streams that all ranks agree on."""

from __future__ import annotations

import zlib

import numpy as np


def random_stream(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """A random stream of its own for each seed, purpose ("parameters", "shuffle") and position (epoch).

    The same on every rank and every machine, and independent of what was drawn from other streams: so a run
    can be taken up at any epoch, at any rank count.
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *position])
