"""Random numbers that all ranks agree on.

A **stream** gives numbers one after the other. A **hash** gives the number that belongs to some counters (an
epoch, a sample, a pixel), wherever and in whatever order they are asked for: so what is random about a sample
does not depend on the rank that has it, nor on the samples beside it.

    h_0 = seed and purpose,   h_k = output number c_k of SplitMix64 in state h_{k-1},   u = h_K / 2^64

with SplitMix64's output number c in state h = mix(h + (c + 1) GOLDEN), so that one call costs a few integer
operations per number. Source: G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014, with the constants of its mix variant 13 (D. Stafford).
"""

from __future__ import annotations

import zlib

import numpy as np

from mpicoll.train.arrays import Array, array_module

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
ONE = np.uint64(1)
DROPPED = np.uint64(64 - 53)  # bits that a float64's fraction has no room for


def random_stream(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """A random stream of its own for each seed, purpose ("parameters", "shuffle") and position (epoch).

    The same on every rank and every machine, and independent of what was drawn from other streams: so a run
    can be taken up at any epoch, at any rank count.
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *position])


def hashed_uniform(seed: int, purpose: str, *counters: int | Array) -> Array:
    """Uniform numbers in [0, 1), one for each combination of ``counters``: float64, broadcast together.

    ``counters`` are whole numbers or integer arrays whose shapes broadcast, such as an epoch, sample numbers
    [n, 1] and pixels [m] for numbers [n, m]; all arrays of one module, NumPy or CuPy, with the same bits from
    either. Give the counter with the fewest values first: then the least is computed.
    """
    state = np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64, of which NumPy warns for single numbers
        for counter in counters:
            state = _mixed(state + (_unsigned(counter) + ONE) * GOLDEN)
    return (state >> DROPPED) * 2.0**-53


def _unsigned(counter: int | Array) -> Array:
    if isinstance(counter, int):
        return np.uint64(counter % 2**64)
    return array_module(counter).asarray(counter).astype(np.uint64)


def _mixed(z: Array) -> Array:
    z = (z ^ (z >> SHIFTS[0])) * MIX[0]
    z = (z ^ (z >> SHIFTS[1])) * MIX[1]
    return z ^ (z >> SHIFTS[2])
