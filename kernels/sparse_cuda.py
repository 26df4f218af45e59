"""A few numbers of many, on a GPU: the twin of `sparse`, with the same meaning and the same bits.

The k-th largest magnitude is found digit by digit, from the highest: all blocks together tally the digits of
those numbers whose higher digits are known, then one block picks the digit. After three digits the magnitude
is exact. Then every block counts what it will take, one block adds these counts up, and every block writes
what it takes from where its share begins: so indices ascend, and of equal magnitudes the lower indices are
taken.

Functions raise TypeError and ValueError that name the argument. What they do happens in the order of
``stream``, by default the one on which the library of the first argument works at present.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
from numba import cuda, types

from .device_cuda import (
    SIMULATED,
    THREADS,
    Function,
    Kernel,
    add_at,
    chunk_elements,
    device_function,
    flat_address,
    folded,
    int32_at,
    int64_at,
    is_aligned,
    loader,
    mapped,
    memory_of,
    on_device,
    product,
    storer,
    stream_of,
    sweeper,
    widest,
)

Array = Any  # of CuPy, PyTorch, or Numba; in the simulator of NumPy

__all__ = ["scatter_add", "select", "select_at"]

FLOAT32, INT32, INT64 = (np.dtype(kind) for kind in (np.float32, np.int32, np.int64))

# Bits: 31 bits of magnitude are three digits. The simulator spends its time on tallies of many digits.
DIGIT = 4 if SIMULATED else 11
DIGITS = 1 << DIGIT
SHIFTS = tuple(reversed(range(0, 31, DIGIT)))
EACH = DIGITS // THREADS  # digits for each thread of one block
SEGMENT = 16  # numbers one after the other that a thread takes from: four whole accesses
CHUNK = THREADS * SEGMENT

# -- the workspace, offsets in bytes
PREFIX = 0  # int32: what is known of the k-th largest magnitude
LEFT = 4  # int32: how many of those numbers that begin so are taken
TALLY = 8  # int32 for each digit; zeros whenever a selection begins
SHARES = TALLY + 4 * DIGITS  # int64 for each block: numbers above the k-th, and 2**32 times those equal to it

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_ANY_NAN = np.int32(0x7F800001)
_EQUAL = 1 << 32

_ZERO, _NAN = np.float32(0), np.float32(np.nan)

_load, _store = loader(FLOAT32, 1), storer(FLOAT32, 1)
_load_segment = loader(FLOAT32, 4, SEGMENT // 4)
_store_int32, _store_int64 = storer(INT32, 1), storer(INT64, 1)


@device_function
def _accumulated(value, factor, rest):  # type: ignore[no-untyped-def]
    return product(value, factor) + rest


@device_function
def _magnitude(x):  # type: ignore[no-untyped-def]
    """A number's place in the order, as an integer."""
    return np.int32(min(np.int32(np.float32(x).view(np.int32) & _MAGNITUDE), _ANY_NAN))


@device_function
def _tally(total, x, tally, prefix, shift):  # type: ignore[no-untyped-def]
    magnitude = _magnitude(x)
    digit = (magnitude >> shift) & (DIGITS - 1)
    # Zeros, of which there are often many, are not counted: what no other digit has is theirs.
    if (magnitude >> shift) >> DIGIT == prefix and digit > 0:
        cuda.atomic.add(tally, digit, 1)
    return total


def _tallier(accumulates: bool) -> Function:
    """A sweep over x, which the first of them also computes."""

    def step(lanes: int, pieces: int) -> Function:
        load, store = loader(FLOAT32, lanes, pieces), storer(FLOAT32, lanes, pieces)

        @device_function
        def handle(i, stride, state):  # type: ignore[no-untyped-def]
            values, factor, residual, tally, prefix, shift = state
            x = load(residual + 4 * i, 4 * stride)
            if accumulates:
                x = mapped(_accumulated, load(values + 4 * i, 4 * stride), factor, x)
                store(residual + 4 * i, 4 * stride, x)
            folded(_tally, 0, x, tally, prefix, shift)
            return False

        return handle

    return sweeper(step, widest(FLOAT32))


@cache
def tally_kernel(accumulates: bool) -> Kernel:
    """How often each digit occurs; if this ``accumulates``, residual = values * factor + residual first."""
    sweep, lanes = _tallier(accumulates), widest(FLOAT32)

    def tally(values, factor, residual, workspace, shift, count, chunk):  # type: ignore[no-untyped-def]
        tally = cuda.shared.array(DIGITS, types.int32)
        thread = cuda.threadIdx.x
        for digit in range(thread, DIGITS, THREADS):
            tally[digit] = 0
        cuda.syncthreads()
        begin = cuda.blockIdx.x * chunk
        x, given = residual + 4 * begin, values + 4 * begin
        prefix = 0 if accumulates else int32_at(workspace + PREFIX) >> shift >> DIGIT
        state = given, factor, x, tally, prefix, shift
        aligned = is_aligned(x, 4 * lanes) and (not accumulates or is_aligned(given, 4 * lanes))
        sweep(thread, min(chunk, count - begin), aligned, state)
        cuda.syncthreads()
        for digit in range(thread, DIGITS, THREADS):
            if tally[digit] != 0:
                add_at(workspace + TALLY + 4 * digit, tally[digit])

    return Kernel(tally, types.int64, types.float32, *[types.int64] * 5)


@device_function
def _pick(sums, tally, left):  # type: ignore[no-untyped-def]
    """(the digit of the ``left``-th largest, how many with this digit are taken)."""
    part = THREADS - 1
    while part > 0 and sums[part] < left:
        left -= sums[part]
        part -= 1
    digit = part * EACH + EACH - 1
    while digit > part * EACH and int32_at(tally + 4 * digit) < left:
        left -= int32_at(tally + 4 * digit)
        digit -= 1
    return digit, left


def _pick_digit(workspace, k, shift):  # type: ignore[no-untyped-def]
    """One block picks a digit, and makes the tally zero again."""
    sums = cuda.shared.array(THREADS, types.int32)
    thread = cuda.threadIdx.x
    own = workspace + TALLY + 4 * EACH * thread
    total = 0
    for i in range(EACH):
        total += int32_at(own + 4 * i)
    sums[thread] = total
    cuda.syncthreads()
    if thread == 0:
        first = shift == SHIFTS[0]
        left = k if first else int32_at(workspace + LEFT)
        digit, left = _pick(sums, workspace + TALLY, left)
        prefix = 0 if first else int32_at(workspace + PREFIX)
        _store_int32(workspace + PREFIX, 0, (prefix | (digit << shift),))
        _store_int32(workspace + LEFT, 0, (left,))
    cuda.syncthreads()
    for i in range(EACH):
        _store_int32(own + 4 * i, 0, (0,))


pick_kernel = Kernel(_pick_digit, *[types.int64] * 3)


@device_function
def _hit(total, x, kth):  # type: ignore[no-untyped-def]
    magnitude = _magnitude(x)
    return total + (1 if magnitude > kth else (_EQUAL if magnitude == kth else 0))


@device_function
def _segment_hits(residual, begin, end, kth):  # type: ignore[no-untyped-def]
    """How many numbers of a segment are above ``kth``, and 2**32 times how many are equal."""
    hits = 0
    if end - begin == SEGMENT and is_aligned(residual, 16):
        return folded(_hit, hits, _load_segment(residual + 4 * begin, 16), kth)
    for i in range(begin, end):
        hits = _hit(hits, _load(residual + 4 * i, 0)[0], kth)
    return hits


@device_function
def _scan(shared, thread):  # type: ignore[no-untyped-def]
    """shared[i] = the sum of shared[0] to shared[i]; each thread has written its own."""
    cuda.syncthreads()
    distance = 1
    while distance < THREADS:
        total = shared[thread]
        if thread >= distance:
            total += shared[thread - distance]
        cuda.syncthreads()
        shared[thread] = total
        cuda.syncthreads()
        distance *= 2


def _count(residual, workspace, count):  # type: ignore[no-untyped-def]
    """Every block's share."""
    shared = cuda.shared.array(THREADS, types.int64)
    thread = cuda.threadIdx.x
    begin = cuda.blockIdx.x * CHUNK + thread * SEGMENT
    kth = int32_at(workspace + PREFIX)
    shared[thread] = _segment_hits(residual, begin, min(begin + SEGMENT, count), kth)
    _scan(shared, thread)
    if thread == THREADS - 1:
        _store_int64(workspace + SHARES + 8 * cuda.blockIdx.x, 0, (shared[thread],))


count_kernel = Kernel(_count, *[types.int64] * 3)


def _scan_shares(workspace, blocks):  # type: ignore[no-untyped-def]
    """One block replaces each share by the sum of those before it."""
    shared = cuda.shared.array(THREADS, types.int64)
    thread = cuda.threadIdx.x
    each = (blocks + THREADS - 1) // THREADS
    begin, end = min(thread * each, blocks), min((thread + 1) * each, blocks)
    own = 0
    for block in range(begin, end):
        own += int64_at(workspace + SHARES + 8 * block)
    shared[thread] = own
    _scan(shared, thread)
    before = shared[thread] - own
    for block in range(begin, end):
        at = workspace + SHARES + 8 * block
        share = int64_at(at)
        _store_int64(at, 0, (before,))
        before += share


scan_kernel = Kernel(_scan_shares, *[types.int64] * 2)


@device_function
def _take_segment(residual, begin, end, kth, equals, before, indices, selected):  # type: ignore[no-untyped-def]
    """Take what is above ``kth``, and the first ``equals`` equal to it; ``before`` is what came before."""
    above, equal = before & (_EQUAL - 1), before >> 32
    for i in range(begin, end):
        x = _load(residual + 4 * i, 0)
        magnitude = _magnitude(x[0])
        taken = magnitude > kth or (magnitude == kth and equal < equals)
        if taken:
            at = above + min(equal, equals)
            _store_int32(indices + 4 * at, 0, (i,))
            _store(selected + 4 * at, 0, x)
        if taken or magnitude >= _INFINITY:
            _store(residual + 4 * i, 0, (_ZERO,))
        above += magnitude > kth
        equal += magnitude == kth


def _take(residual, workspace, count, indices, selected):  # type: ignore[no-untyped-def]
    """Every block writes what it takes."""
    shared = cuda.shared.array(THREADS, types.int64)
    thread = cuda.threadIdx.x
    begin = cuda.blockIdx.x * CHUNK + thread * SEGMENT
    end = min(begin + SEGMENT, count)
    kth, equals = int32_at(workspace + PREFIX), int32_at(workspace + LEFT)
    hits = _segment_hits(residual, begin, end, kth)
    shared[thread] = hits
    _scan(shared, thread)
    if hits != 0 or kth >= _INFINITY:
        before = int64_at(workspace + SHARES + 8 * cuda.blockIdx.x) + shared[thread] - hits
        _take_segment(residual, begin, end, kth, equals, before, indices, selected)


take_kernel = Kernel(_take, *[types.int64] * 5)


def _accumulator() -> Function:
    """A sweep: residual = x, or 0 where x is not finite; whether that is so anywhere."""

    @device_function
    def find(found, x):  # type: ignore[no-untyped-def]
        return found | (x - x != _ZERO)

    @device_function
    def finite(x):  # type: ignore[no-untyped-def]
        return x if x - x == _ZERO else _ZERO

    def step(lanes: int, pieces: int) -> Function:
        load, store = loader(FLOAT32, lanes, pieces), storer(FLOAT32, lanes, pieces)

        @device_function
        def handle(i, stride, state):  # type: ignore[no-untyped-def]
            values, factor, residual = state
            given, rest = load(values + 4 * i, 4 * stride), load(residual + 4 * i, 4 * stride)
            x = mapped(_accumulated, given, factor, rest)
            store(residual + 4 * i, 4 * stride, mapped(finite, x))
            return folded(find, False, x)

        return handle

    return sweeper(step, widest(FLOAT32))


_accumulate = _accumulator()


def _accumulate_all(values, factor, residual, bad, count, chunk):  # type: ignore[no-untyped-def]
    begin = cuda.blockIdx.x * chunk
    given, rest = values + 4 * begin, residual + 4 * begin
    aligned = is_aligned(given | rest, 16)
    if _accumulate(cuda.threadIdx.x, min(chunk, count - begin), aligned, (given, factor, rest)):
        _store(bad, 0, (_NAN,))


def _clear(at):  # type: ignore[no-untyped-def]
    if cuda.threadIdx.x == 0:
        _store(at, 0, (_ZERO,))


def _take_at(residual, indices, selected, k):  # type: ignore[no-untyped-def]
    j = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if j < k:
        at = residual + 4 * int32_at(indices + 4 * j)
        _store(selected + 4 * j, 0, _load(at, 0))
        _store(at, 0, (_ZERO,))


def _add_at(indices, selected, out, k):  # type: ignore[no-untyped-def]
    j = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if j < k:
        at = out + 4 * int32_at(indices + 4 * j)
        _store(at, 0, (_load(at, 0)[0] + _load(selected + 4 * j, 0)[0],))


accumulate_kernel = Kernel(_accumulate_all, types.int64, types.float32, *[types.int64] * 4)
clear_kernel = Kernel(_clear, types.int64)
take_at_kernel = Kernel(_take_at, *[types.int64] * 4)
add_at_kernel = Kernel(_add_at, *[types.int64] * 4)


@lru_cache(maxsize=64)
def _workspace(device: int, stream: int, blocks: int) -> Any:
    """Of a stream, because selections on different ones may run at the same time."""
    return on_device(np.zeros(SHARES // 8 + blocks, np.int64))


def _workspace_address(stream: int, blocks: int) -> int:
    device = 0 if SIMULATED else cuda.get_current_device().id
    return memory_of(_workspace(device, stream, blocks), "workspace").address


def select(
    values: Array, factor: float, residual: Array, k: int, indices: Array, selected: Array, stream: Any = None
) -> None:
    """The ``k`` largest magnitudes of x = values * factor + residual, all float32 [n]; k is 1 to n.

    ``indices`` int32 [k] = where they are, ascending; of equal magnitudes those with the lower index are
    taken. ``selected`` float32 [k] = x there. residual = x, with 0 where x was selected.

    NaN and infinity are the largest. Should there be more than k of them, the rest is dropped from the
    residual, for those that are selected say that the step is spoilt.
    """
    n = memory_of(values, "values").size
    if not min(n, 1) <= k <= n < 2**31:
        raise ValueError(f"k: expected 1 to {n}, the length of values, which must be below 2**31, got {k}")
    given, rest = flat_address(values, "values", FLOAT32, n), flat_address(residual, "residual", FLOAT32, n)
    to, found = flat_address(indices, "indices", INT32, k), flat_address(selected, "selected", FLOAT32, k)
    handle, chunk, blocks = stream_of(stream, values), chunk_elements(n, widest(FLOAT32)), -(-n // CHUNK)
    if n == 0:
        return
    workspace = _workspace_address(handle, blocks)
    for shift in SHIFTS:
        kernel = tally_kernel(shift == SHIFTS[0])
        kernel.launch(-(-n // chunk), handle, given, factor, rest, workspace, shift, n, chunk)
        pick_kernel.launch(1, handle, workspace, k, shift)
    count_kernel.launch(blocks, handle, rest, workspace, n)
    scan_kernel.launch(1, handle, workspace, blocks)
    take_kernel.launch(blocks, handle, rest, workspace, n, to, found)


def select_at(
    values: Array, factor: float, residual: Array, indices: Array, selected: Array, stream: Any = None
) -> None:
    """x = values * factor + residual at given ``indices`` int32 [k], which differ and lie below n.

    ``selected`` float32 [k + 1] = x there; its last element is 0, or NaN if there is a NaN or infinity
    anywhere in x. residual = x, with 0 where x was selected or is not finite. Arrays without a size given are
    float32 [n].
    """
    n, k = memory_of(values, "values").size, memory_of(indices, "indices").size
    given, rest = flat_address(values, "values", FLOAT32, n), flat_address(residual, "residual", FLOAT32, n)
    at, found = flat_address(indices, "indices", INT32, k), flat_address(selected, "selected", FLOAT32, k + 1)
    handle, chunk = stream_of(stream, values), chunk_elements(n, widest(FLOAT32))
    bad = found + 4 * k
    clear_kernel.launch(1, handle, bad)
    accumulate_kernel.launch(-(-n // chunk), handle, given, factor, rest, bad, n, chunk)
    take_at_kernel.launch(-(-k // THREADS), handle, rest, at, found, k)


def scatter_add(indices: Array, selected: Array, out: Array, stream: Any = None) -> None:
    """out[indices] += selected; ``indices`` int32 [k] differ and lie below n, ``out`` is float32 [n]."""
    k, n = memory_of(indices, "indices").size, memory_of(out, "out").size
    at, added = flat_address(indices, "indices", INT32, k), flat_address(selected, "selected", FLOAT32, k)
    to = flat_address(out, "out", FLOAT32, n)
    add_at_kernel.launch(-(-k // THREADS), stream_of(stream, indices), at, added, to, k)
