"""Checks of the compression kernels, the same for those of the CPU and those of a GPU.

Each takes the module and the memory that its arrays live in. Where a result is compared bit by bit, the
numbers are such that neither a product nor a sum is rounded: compilers for GPUs fuse the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SIZES = (0, 1, 2, 31, 33, 255, 256, 257, 1000, 1023, 1025, 4099, 70_001)
HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
GUARDS = (64, 67)  # elements before and behind an array: aligned, and one element before that
FILL = 0xA5  # what guards and fresh outputs hold
EPS = 2.0**-23

quiet = np.errstate(invalid="ignore")  # NumPy speaks of every NaN whose quiet bit is not set


@dataclass(frozen=True)
class Memory:
    """How arrays come to where the kernels work, and back."""

    put: Callable[[Array], Any] = np.array
    get: Callable[[Any], Array] = np.array
    sizes: tuple[int, ...] = SIZES  # a simulated GPU is slow
    large: int = 1 << 20


HOST = Memory()


def floats(numbers: list[Any]) -> Array:
    return np.array(numbers, np.float32)


class Buffer:
    """An array between guards."""

    def __init__(self, memory: Memory, content: Array, guard: int = GUARDS[0]) -> None:
        fence = np.full(guard * content.itemsize, FILL, np.uint8).view(content.dtype)
        self._memory, self._guard = memory, guard
        self._whole = memory.put(np.concatenate([fence, content, fence]))
        self.array = self._whole[guard : guard + len(content)]

    def content(self) -> Array:
        """The array now; the guards must be as they were."""
        whole = self._memory.get(self._whole)
        end = len(whole) - self._guard
        for fence in (whole[: self._guard], whole[end:]):
            assert (fence.view(np.uint8) == FILL).all()
        return whole[self._guard : end]


class Buffers:
    """Makes buffers for one call."""

    def __init__(self, memory: Memory, guard: int) -> None:
        self.memory, self.guard = memory, guard

    def of(self, content: Array) -> Buffer:
        return Buffer(self.memory, content, self.guard)

    def empty(self, count: int, dtype: npt.DTypeLike) -> Buffer:
        """An output: full of what must not be seen again."""
        return self.of(np.full(count * np.dtype(dtype).itemsize, FILL, np.uint8).view(dtype))


def runs(memory: Memory) -> Iterator[tuple[int, Buffers, np.random.Generator]]:
    """Every size, aligned and not."""
    for guard in GUARDS:
        for size in memory.sizes:
            yield size, Buffers(memory, guard), np.random.default_rng([size, guard])


def normal(random: np.random.Generator, size: int) -> Array:
    """Float32 whose magnitude differs from block to block."""
    scales = 10.0 ** random.integers(-6, 7, -(-size // 256))
    return (random.standard_normal(size) * np.repeat(scales, 256)[:size]).astype(np.float32)


def blockwise_largest(x: Array) -> Array:
    """For each element the largest magnitude of its block of 256."""
    largest = [np.abs(x[start : start + 256]).max() for start in range(0, len(x), 256)]
    return np.repeat(np.array(largest, x.dtype), 256)[: len(x)]


# -- 8-bit integers --------------------------------------------------------------------------------------


def exact_blocks(random: np.random.Generator, size: int) -> tuple[Array, Array, Array]:
    """x in halves of a power of two that is different in each block and is its scale; codes; scales."""
    scales = (2.0 ** random.integers(-20, 20, -(-size // 256))).astype(np.float32)
    units = random.integers(-253, 254, size).astype(np.float32) / 2  # many ties between two codes
    units[::256] = 127
    return units * np.repeat(scales, 256)[:size], np.rint(units).astype(np.int8), scales


def check_quantise(module: ModuleType, memory: Memory = HOST) -> None:
    """Codes and scales, exactly where nothing is rounded but to codes, else within half a code."""
    for size, buffers, random in runs(memory):
        x, codes, scales = exact_blocks(random, size)
        found = _quantised(module, buffers, x)
        np.testing.assert_array_equal(found[0], codes)
        np.testing.assert_array_equal(found[1], scales)

        x = normal(random, size)
        codes, scales = _quantised(module, buffers, x)
        largest = blockwise_largest(x)
        np.testing.assert_allclose(scales, largest[::256] / 127, rtol=2 * EPS)
        assert (np.abs(codes.astype(int)) <= 127).all()
        error = np.abs(x - codes * np.repeat(scales.astype(np.float64), 256)[:size])
        assert (error <= largest / 254 * 1.0001).all()


def _quantised(module: ModuleType, buffers: Buffers, x: Array) -> tuple[Array, Array]:
    count = module.blocks(len(x))
    assert count == -(-len(x) // 256)
    values, codes, scales = buffers.of(x), buffers.empty(len(x), np.int8), buffers.empty(count, np.float32)
    module.quantise(values.array, codes.array, scales.array)
    assert values.content().tobytes() == x.tobytes()
    return codes.content(), scales.content()


def check_quantise_feedback(module: ModuleType, memory: Memory = HOST) -> None:
    """x = values * factor + residual; the new residual is what the codes miss."""
    for size, buffers, random in runs(memory):
        x, codes, scales = exact_blocks(random, size)
        block_scales = np.repeat(scales, 256)[:size]
        residual = random.integers(-100, 101, size).astype(np.float32) * block_scales
        found = _fed_back(module, buffers, (x - residual) * 4, 0.25, residual)
        np.testing.assert_array_equal(found[0], codes)
        np.testing.assert_array_equal(found[1], scales)
        np.testing.assert_array_equal(found[2], x - codes * block_scales)

        values, residual = normal(random, size), normal(random, size)
        found = _fed_back(module, buffers, values, 0.3, residual)
        wide = values.astype(np.float64) * np.float32(0.3) + residual
        tolerance = 4 * EPS * (np.abs(values) + np.abs(residual))
        decoded = found[0] * np.repeat(found[1].astype(np.float64), 256)[:size]
        largest = blockwise_largest(wide)
        assert (np.abs(found[2] + decoded - wide) <= tolerance + largest * EPS).all()
        assert (np.abs(found[2]) <= largest / 254 * 1.0001).all()


def _fed_back(
    module: ModuleType, buffers: Buffers, values: Array, factor: float, residual: Array
) -> tuple[Array, Array, Array]:
    given, rest = buffers.of(values), buffers.of(residual)
    codes, scales = buffers.empty(len(values), np.int8), buffers.empty(module.blocks(len(values)), np.float32)
    module.quantise_feedback(given.array, factor, rest.array, codes.array, scales.array)
    assert given.content().tobytes() == values.tobytes()
    return codes.content(), scales.content(), rest.content()


def check_quantise_extremes(module: ModuleType, memory: Memory = HOST) -> None:
    """Zeros, the smallest and the largest numbers."""
    buffers = Buffers(memory, GUARDS[1])
    smallest = np.float32(127 * 2.0**-126)
    assert float(module.SMALLEST) == smallest
    blocks = {
        "zeros": (floats([0, -0.0]), 0),
        "too small": (floats([np.nextafter(smallest, np.float32(0)), -1e-45]), 0),
        "small": (floats([-smallest, smallest / 127]), 2.0**-126),
        "large": (floats([3.4028235e38, -1e38]), np.float32(3.4028235e38) / np.float32(127)),
    }
    for name, (x, scale) in blocks.items():
        codes, scales, residual = _fed_back(module, buffers, x, 1, np.zeros(2, np.float32))
        np.testing.assert_allclose(scales, [scale], rtol=2 * EPS, err_msg=name)
        wanted = np.rint(x.astype(np.float64) / scale) if scale else np.zeros(2)
        np.testing.assert_array_equal(codes, wanted, err_msg=name)
        np.testing.assert_allclose(residual, x - wanted * scale, rtol=0, atol=np.abs(x).max() * EPS)
        if not scale:
            np.testing.assert_array_equal(residual, x)


def check_quantise_nonfinite(module: ModuleType, memory: Memory = HOST) -> None:
    """A NaN or infinity makes its block NaN, keeps nothing of it, and is not seen in the others."""
    buffers = Buffers(memory, GUARDS[0])
    for bad in (np.nan, np.inf, -np.inf, 3e38):
        for at in (0, 256, 300, 511, 999):
            x, residual = np.ones(1000, np.float32), np.full(1000, 0.5, np.float32)
            x[at] = bad
            factor = 2 if bad == 3e38 else 1  # 6e38 is infinite
            codes, scales, rest = _fed_back(module, buffers, x, factor, residual)
            spoilt = np.arange(1000) // 256 == at // 256
            assert np.isnan(scales).tolist() == spoilt[::256].tolist()
            assert (rest[spoilt] == 0).all()
            assert np.isnan(_decoded(module, buffers, codes, scales)).tolist() == spoilt.tolist()
            if factor == 1:
                assert np.isnan(_quantised(module, buffers, x)[1]).tolist() == spoilt[::256].tolist()


def check_dequantise(module: ModuleType, memory: Memory = HOST) -> None:
    """Scale times code, alone and added to what is there."""
    for size, buffers, random in runs(memory):
        codes = random.integers(-127, 128, size).astype(np.int8)
        scales = random.standard_normal(-(-size // 256)).astype(np.float32)
        wanted = codes.astype(np.float32) * np.repeat(scales, 256)[:size]
        np.testing.assert_array_equal(_decoded(module, buffers, codes, scales), wanted)

        given = (buffers.of(codes), buffers.of(scales))
        before = random.standard_normal(size).astype(np.float32)
        total = buffers.of(before)
        module.dequantise_add(given[0].array, given[1].array, total.array)
        bound = 2 * EPS * (np.abs(wanted) + np.abs(before))
        assert (np.abs(total.content() - (before.astype(np.float64) + wanted)) <= bound).all()
        assert given[0].content().tobytes() == codes.tobytes()
        assert given[1].content().tobytes() == scales.tobytes()


def _decoded(module: ModuleType, buffers: Buffers, codes: Array, scales: Array) -> Array:
    out = buffers.empty(len(codes), np.float32)
    module.dequantise(buffers.of(codes).array, buffers.of(scales).array, out.array)
    return out.content()


# -- 16-bit floats ---------------------------------------------------------------------------------------


def check_halves(module: ModuleType, memory: Memory = HOST) -> None:
    """Rounded as NumPy does; the residual is exactly what was lost; widening loses nothing."""
    for dtype in HALVES:
        for size, buffers, random in runs(memory):
            x = random.standard_normal(size).astype(np.float32)
            halves, rest = _narrowed(module, buffers, x * 2, 0.5, np.zeros(size, np.float32), dtype)
            assert halves.tobytes() == x.astype(dtype).tobytes()
            np.testing.assert_array_equal(rest, x - halves.astype(np.float32))

            # Numbers of few bits: neither the product nor the sum is rounded.
            values, residual = random.integers(-4096, 4096, (2, size)).astype(np.float32)
            halves, rest = _narrowed(module, buffers, values, 0.5, residual / 512, dtype)
            x = values / 2 + residual / 512
            assert halves.tobytes() == x.astype(dtype).tobytes()
            np.testing.assert_array_equal(rest, x - halves.astype(np.float32))

            out = buffers.empty(size, np.float32)
            module.widen(buffers.of(halves).array, out.array)
            np.testing.assert_array_equal(out.content(), halves.astype(np.float32))


def check_halves_nonfinite(module: ModuleType, memory: Memory = HOST) -> None:
    """NaN, infinity and what the 16 bits cannot hold show, and leave no residual."""
    buffers = Buffers(memory, GUARDS[1])
    x = np.array([np.nan, np.inf, -np.inf, 1e5, -1e5, 3.4e38, 65504, 1], np.float32)
    for dtype in HALVES:
        with np.errstate(all="ignore"):
            wanted = x.astype(dtype)
            lost = x - wanted.astype(np.float32)
        halves, rest = _narrowed(module, buffers, x, 1, np.zeros(8, np.float32), dtype)
        np.testing.assert_array_equal(halves.astype(np.float32), wanted.astype(np.float32))
        finite = np.isfinite(wanted.astype(np.float32))
        assert (rest[~finite] == 0).all()
        np.testing.assert_array_equal(rest[finite], lost[finite])


def _narrowed(
    module: ModuleType, buffers: Buffers, values: Array, factor: float, residual: Array, dtype: np.dtype[Any]
) -> tuple[Array, Array]:
    given, rest, halves = buffers.of(values), buffers.of(residual), buffers.empty(len(values), dtype)
    module.narrow_feedback(given.array, factor, rest.array, halves.array)
    assert given.content().tobytes() == values.tobytes()
    return halves.content(), rest.content()


# -- a few numbers of many -------------------------------------------------------------------------------


def selected_by_numpy(x: Array, k: int) -> tuple[Array, Array, Array]:
    """Indices, numbers and residual that `select` must find."""
    nan_last = np.where(np.isnan(x), np.inf, np.abs(x))
    order = np.lexsort((np.arange(len(x)), -nan_last, ~np.isnan(x)))
    indices = np.sort(order[:k]).astype(np.int32)
    residual = x.copy()
    residual[indices] = 0
    if k and not np.isfinite(x[indices]).any():
        residual[~np.isfinite(residual)] = 0
    return indices, x[indices], residual


def hard_cases(random: np.random.Generator, size: int) -> dict[str, Array]:
    """Float32 of few bits whose largest are hard to find: many are equal, or lie in an unusual order."""
    few = random.integers(-50, 51, size).astype(np.float32)
    wide = random.integers(-(2**20), 2**20, size).astype(np.float32)
    spikes = np.where(
        np.arange(size) % 16 == 5, wide, few
    )  # where a regular sample might always look, or never
    rare = np.where(random.random(size) < 0.001, wide, 0).astype(np.float32)
    return {
        "ordinary": wide,
        "few values": few,
        "equal": np.full(size, -3, np.float32),
        "zeros": np.zeros(size, np.float32) * np.where(random.random(size) < 0.5, -1, 1).astype(np.float32),
        "mostly zeros": rare,
        "ascending": np.sort(wide),
        "descending": np.sort(np.abs(wide))[::-1].copy(),
        "spikes": spikes,
        "some bad": np.where(random.random(size) < 0.003, np.float32(np.nan), wide),
        "many bad": np.where(random.random(size) < 0.6, random.choice(BAD, size), wide),
    }


BAD = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)


@quiet
def check_select(module: ModuleType, memory: Memory = HOST) -> None:
    """Exactly the k largest, for every kind of numbers."""
    for size, buffers, random in runs(memory):
        for name, x in hard_cases(random, size).items():
            for k in sorted({min(size, 1), -(-size // 100), size // 3, max(0, size - 1), size} - {0}):
                residual = random.integers(-8, 8, size).astype(np.float32)
                values = (x - np.where(np.isfinite(x), residual, 0)) * 2
                found = _selected(module, buffers, values, 0.5, residual, k)
                for a, b in zip(found, selected_by_numpy(values / 2 + residual, k), strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=f"{name}, {k} of {size}")


def check_select_large(module: ModuleType, memory: Memory = HOST) -> None:
    """Enough numbers for every shortcut to be taken; also none and one."""
    buffers = Buffers(memory, GUARDS[1])
    x = np.random.default_rng(1).standard_normal(memory.large).astype(np.float32)
    for size, k in ((memory.large, memory.large // 100), (memory.large - 7, 100), (0, 0), (1, 1)):
        part, zeros = x[:size], np.zeros(size, np.float32)
        found = _selected(module, buffers, part, 1, zeros, k)
        for a, b in zip(found, selected_by_numpy(part, k), strict=True):
            np.testing.assert_array_equal(a, b)


def _selected(
    module: ModuleType, buffers: Buffers, values: Array, factor: float, residual: Array, k: int
) -> tuple[Array, Array, Array]:
    given, rest = buffers.of(values), buffers.of(residual)
    indices, selected = buffers.empty(k, np.int32), buffers.empty(k, np.float32)
    module.select(given.array, factor, rest.array, k, indices.array, selected.array)
    assert given.content().tobytes() == values.tobytes()
    return indices.content(), selected.content(), rest.content()


@quiet
def check_select_at(module: ModuleType, memory: Memory = HOST) -> None:
    """Given places, and whether anything is not finite."""
    for size, buffers, random in runs(memory):
        for bad in (None, *BAD):
            if size == 0 and bad is not None:
                continue
            values, residual = random.integers(-1000, 1000, (2, size)).astype(np.float32)
            if bad is not None:
                values[random.integers(size)] = bad
            indices = np.sort(random.permutation(size)[: -(-size // 7)]).astype(np.int32)
            rest = _check_selected_at(module, buffers, values, residual, indices, bad is None)
            x = np.where(np.isfinite(values), values / 4 + residual, 0)
            x[indices] = 0
            np.testing.assert_array_equal(rest, x)


@quiet
def _check_selected_at(
    module: ModuleType, buffers: Buffers, values: Array, residual: Array, indices: Array, finite: bool
) -> Array:
    """The residual."""
    given, rest, at = buffers.of(values), buffers.of(residual), buffers.of(indices)
    selected = buffers.empty(len(indices) + 1, np.float32)
    module.select_at(given.array, 0.25, rest.array, at.array, selected.array)
    found = selected.content()
    assert given.content().tobytes() == values.tobytes()
    assert at.content().tobytes() == indices.tobytes()
    np.testing.assert_array_equal(found[-1], 0 if finite else np.nan)
    wanted = (values / 4 + residual)[indices]
    good = np.isfinite(wanted)
    np.testing.assert_array_equal(found[:-1][good], wanted[good])
    return rest.content()


@quiet
def check_scatter_add(module: ModuleType, memory: Memory = HOST) -> None:
    """Added where the indices say, and nowhere else."""
    for size, buffers, random in runs(memory):
        before = random.standard_normal(size).astype(np.float32)
        indices = np.sort(random.permutation(size)[: size // 3]).astype(np.int32)
        added = random.standard_normal(len(indices)).astype(np.float32)
        added[: len(BAD)] = BAD[: len(added)]
        out = buffers.of(before)
        module.scatter_add(buffers.of(indices).array, buffers.of(added).array, out.array)
        wanted = before.copy()
        wanted[indices] += added
        np.testing.assert_array_equal(out.content(), wanted)


QUANTISE = (
    check_quantise,
    check_quantise_feedback,
    check_quantise_extremes,
    check_quantise_nonfinite,
    check_dequantise,
    check_halves,
    check_halves_nonfinite,
)
SPARSE = (check_select, check_select_large, check_select_at, check_scatter_add)
