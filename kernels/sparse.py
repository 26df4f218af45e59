"""A few numbers of many, on the CPU: the largest, or random ones, with error feedback; and adding them back.

Choosing the k largest of n exactly takes one pass over memory: a sample gives a threshold that a few more
than k pass; while x is computed, those that pass are listed; a radix selection among them finds the k-th
largest. Where the threshold was too high or far too low (data that the sample misjudged, many equal
numbers) the radix selection looks at everything: slower, never wrong.

Magnitudes are compared as integers: a float's bits without the sign. So infinity counts as larger than
all numbers, NaN as larger still, and every NaN as equal to every other.

All arrays are flat and contiguous; no two arguments may overlap. Functions raise ValueError for sizes that do
not fit, `ctypes.ArgumentError` for wrong dtypes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .functions import COUNT, FLOAT, Reads, Writes, check_length, kernel

Array = npt.NDArray[Any]
Words = npt.NDArray[np.uint64]

_SAMPLE = 8192  # numbers, at most: 3 standard deviations are 330 of 12,000 candidates for the largest 1 %
_EACH = 16  # and at most one of so many
_STRETCH = 1024  # numbers that are computed at once, and looked at while in the first-level cache
_LANES = 32  # compared at once
_DIGIT = 11  # bits: 31 bits of magnitude are three digits
_DIGITS = 1 << _DIGIT

_ZERO = np.float32(0)
_NAN = np.float32(np.nan)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_ANY_NAN = np.uint32(0x7F800001)


@intrinsic
def _reaching(typingctx: Any, numbers: Any, start: Any, threshold: Any) -> Any:
    """`_LANES` bits: bit i is set if the magnitude of ``numbers[start + i]`` is at least ``threshold``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        word = ir.IntType(32)
        lanes = ir.VectorType(word, _LANES)
        at = builder.bitcast(cgutils.gep(builder, args[0], args[1]), lanes.as_pointer())
        bits = builder.load(at, align=4)
        first = builder.insert_element(ir.Constant(lanes, ir.Undefined), args[2], word(0))
        threshold = builder.shuffle_vector(first, first, ir.Constant(lanes, [0] * _LANES))
        magnitudes = builder.and_(bits, ir.Constant(lanes, [int(_MAGNITUDE)] * _LANES))
        return builder.bitcast(builder.icmp_unsigned(">=", magnitudes, threshold), ir.IntType(_LANES))

    return types.uint32(numbers, types.intp, types.uint32), codegen


@intrinsic
def _lowest_bit(typingctx: Any, bits: Any) -> Any:
    """The number of the lowest bit that is set; one must be."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.zext(builder.cttz(args[0], ir.IntType(1)(1)), ir.IntType(64))

    return types.intp(types.uint32), codegen


@njit(inline="always")
def _magnitude(x):  # type: ignore[no-untyped-def]
    """A number's place in the order, as an integer."""
    return np.uint32(min(np.uint32(np.float32(x).view(np.uint32) & _MAGNITUDE), _ANY_NAN))


@njit(nogil=True)
def _kth_largest(numbers, count, k):  # type: ignore[no-untyped-def]
    """The k-th largest magnitude, and how many of those equal to it are among the k largest."""
    prefix = np.uint32(0)
    known = np.uint32(0)  # which of the bits are those of prefix
    left = k
    for shift in (2 * _DIGIT, _DIGIT, 0):
        tally = np.zeros(_DIGITS, np.intp)
        for i in range(count):
            magnitude = _magnitude(numbers[i])
            if (magnitude & known) == prefix:
                tally[(magnitude >> shift) % _DIGITS] += 1
        digit = _DIGITS - 1
        while tally[digit] < left:
            left -= tally[digit]
            digit -= 1
        prefix = np.uint32(prefix | (digit << shift))
        known = np.uint32(known | ((_DIGITS - 1) << shift))
    return prefix, left


@njit(nogil=True)
def _sampled_threshold(values, factor, residual, count, sample, size, place):  # type: ignore[no-untyped-def]
    """The magnitude at ``place`` in the order of ``size`` numbers, one from each stretch of equal length.

    Where in its stretch a number is taken changes irregularly: rows of a matrix have a length, too.
    """
    stretch = count // size
    state = np.uint32(1)
    for j in range(size):
        state = np.uint32(state * np.uint32(1664525) + np.uint32(1013904223))  # Numerical Recipes' generator
        i = j * stretch + np.intp((np.uint64(state) * np.uint64(stretch)) >> np.uint64(32))
        sample[j] = values[i] * factor + residual[i]
    return _kth_largest(sample, size, place)[0]


@njit(nogil=True)
def _list_stretch(residual, start, stop, threshold, groups, masks, listed, numbers, found):  # type: ignore[no-untyped-def]
    """List the numbers from ``start`` to ``stop`` that reach ``threshold``; how many are listed now.

    Without branches that depend on the numbers: which ones reach it is nothing that a processor can guess.
    """
    whole = start + (stop - start) // _LANES * _LANES
    hits = 0
    for group in range(start, whole, _LANES):
        mask = _reaching(residual, group, threshold)
        groups[hits], masks[hits] = group, mask
        hits += mask != 0
    j = 0
    while j < hits:
        mask = masks[j]
        i = groups[j] + _lowest_bit(mask)
        listed[found], numbers[found] = i, residual[i]
        found += 1
        masks[j] = mask & np.uint32(mask - np.uint32(1))
        j += masks[j] == 0
    for i in range(whole, stop):
        listed[found], numbers[found] = i, residual[i]
        found += _magnitude(residual[i]) >= threshold
    return found


@njit(nogil=True)
def _accumulate(values, factor, residual, count, threshold, listed, numbers, room):  # type: ignore[no-untyped-def]
    """residual = x; lists those that reach ``threshold``. How many there are, or more than ``room``."""
    groups, masks = np.empty(_STRETCH // _LANES, np.intp), np.empty(_STRETCH // _LANES, np.uint32)
    found = 0
    for start in range(0, count, _STRETCH):
        stop = min(start + _STRETCH, count)
        for i in range(start, stop):
            residual[i] = values[i] * factor + residual[i]
        if found <= room:
            found = _list_stretch(residual, start, stop, threshold, groups, masks, listed, numbers, found)
    return found


@njit(nogil=True)
def _take_listed(residual, listed, numbers, found, kth, equals, indices, selected):  # type: ignore[no-untyped-def]
    """Take what is above ``kth``, and the first ``equals`` that are equal to it."""
    taken = 0
    for j in range(found):
        magnitude = _magnitude(numbers[j])
        if magnitude < kth or (magnitude == kth and equals == 0):
            continue
        equals -= magnitude == kth
        indices[taken] = listed[j]
        selected[taken] = numbers[j]
        residual[listed[j]] = _ZERO
        taken += 1


@njit(nogil=True)
def _take_any(residual, count, kth, equals, indices, selected):  # type: ignore[no-untyped-def]
    """As `_take_listed`, from everything."""
    taken = 0
    for i in range(count):
        magnitude = _magnitude(residual[i])
        if magnitude < kth or (magnitude == kth and equals == 0):
            continue
        equals -= magnitude == kth
        indices[taken] = i
        selected[taken] = residual[i]
        residual[i] = _ZERO
        taken += 1


@njit(nogil=True)
def _drop_nonfinite(residual, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        residual[i] = residual[i] if residual[i] - residual[i] == _ZERO else _ZERO


@kernel(
    *(Reads("f4"), FLOAT, Writes("f4"), COUNT, COUNT, Writes("i4"), Writes("f4")),
    *(Writes("f4"), COUNT, COUNT, Writes("i4"), Writes("f4"), COUNT),
)
def _select(  # type: ignore[no-untyped-def]
    values, factor, residual, count, k, indices, selected, sample, size, place, listed, numbers, room
):
    # At least 1, so that zeros are never listed: what has mostly zeros would be listed whole.
    threshold = np.uint32(1)
    if place < size:
        threshold = max(threshold, _sampled_threshold(values, factor, residual, count, sample, size, place))
    found = _accumulate(values, factor, residual, count, threshold, listed, numbers, room)
    if k <= found <= room:
        kth, equals = _kth_largest(numbers, found, k)
        _take_listed(residual, listed, numbers, found, kth, equals, indices, selected)
    else:
        kth, equals = _kth_largest(residual, count, k)
        _take_any(residual, count, kth, equals, indices, selected)
    if kth >= _INFINITY:
        _drop_nonfinite(residual, count)


@kernel(Reads("f4"), FLOAT, Writes("f4"), COUNT, Reads("i4"), Writes("f4"), COUNT)
def _select_at(values, factor, residual, count, indices, selected, k):  # type: ignore[no-untyped-def]
    bad = np.uint32(0)
    for i in range(count):
        x = values[i] * factor + residual[i]
        finite = x - x == _ZERO
        bad |= not finite
        residual[i] = x if finite else _ZERO
    for j in range(k):
        selected[j] = residual[indices[j]]
        residual[indices[j]] = _ZERO
    selected[k] = _NAN if bad else _ZERO


@kernel(Reads("i4"), Reads("f4"), Writes("f4"), COUNT)
def _scatter_add(indices, selected, out, k):  # type: ignore[no-untyped-def]
    for j in range(k):
        out[indices[j]] += selected[j]


def select(values: Array, factor: float, residual: Array, k: int, indices: Array, selected: Array) -> None:
    """The ``k`` largest magnitudes of x = values * factor + residual, all float32 [n]; k is 1 to n.

    ``indices`` int32 [k] = where they are, ascending; of equal magnitudes the lower indices are taken.
    ``selected`` float32 [k] = x there. residual = x, with 0 where x was selected.

    NaN and infinity are the largest. Should there be more than k of them, the rest is dropped from the
    residual, for those that are selected say that the step is spoilt.
    """
    n = len(values)
    if not min(n, 1) <= k <= n < 2**31:
        raise ValueError(f"k: expected 1 to {n}, the length of values, which must be below 2**31, got {k}")
    check_length("residual", residual, n)
    check_length("indices", indices, k)
    check_length("selected", selected, k)
    size = min(_SAMPLE, n // _EACH)
    mean = size * k / max(n, 1)
    place = math.ceil(mean + 3 * math.sqrt(mean) + 3)
    room = min(n, 2 * place * n // max(size, 1))
    sample = np.empty(size, np.float32)
    listed, numbers = np.empty(room + _STRETCH, np.int32), np.empty(room + _STRETCH, np.float32)
    _select(
        *(values, factor, residual, n, k, indices, selected, sample, size, place, listed, numbers, room),
    )


def select_at(values: Array, factor: float, residual: Array, indices: Array, selected: Array) -> None:
    """x = values * factor + residual at given ``indices`` int32 [k], which differ and lie below n.

    ``selected`` float32 [k + 1] = x there; its last element is 0, or NaN if there is a NaN or infinity
    anywhere in x. residual = x, with 0 where x was selected or is not finite. The others are float32 [n].
    """
    check_length("residual", residual, len(values))
    check_length("selected", selected, len(indices) + 1)
    _select_at(values, factor, residual, len(values), indices, selected, len(indices))


def scatter_add(indices: Array, selected: Array, out: Array) -> None:
    """out[indices] += selected; ``indices`` int32 [k] differ and lie below n, ``out`` is float32 [n]."""
    check_length("selected", selected, len(indices))
    _scatter_add(indices, selected, out, len(indices))


def random_indices(seed: int, step: int, n: int, k: int) -> Array:
    """``k`` of the numbers from 0 to ``n`` - 1, int32, ascending: one from each of k parts of equal length.

    The same wherever ``seed`` and ``step`` are the same, with any version of NumPy. In another step they are
    others, and each number comes once in n / k steps on average. Raises ValueError unless k is 0 to n.
    """
    if not 0 <= k <= n < 2**31:
        raise ValueError(f"k: expected 0 to {n}, with n below 2**31, got {k}")
    bounds: Words = np.arange(k + 1, dtype=np.uint64) * np.uint64(n) // np.uint64(max(k, 1))
    stream = _mixed(np.array([seed], np.uint64))
    stream += np.uint64(step)
    counter: Words = np.arange(k, dtype=np.uint64)
    counter += _mixed(stream)
    random = _mixed(counter) >> np.uint64(32)
    within = random * np.diff(bounds) >> np.uint64(32)  # a fraction of 32 bits, times the part's length
    indices: Array = (bounds[:-1] + within).astype(np.int32)
    return indices


def _mixed(state: Words) -> Words:
    """Random bits from each number: a step of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA)."""
    z: Words = (state + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
