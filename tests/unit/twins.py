"""What a kernel and its twin, on the CPU, on a GPU or in the simulator, must all do; against NumPy.

A check gets a `Twin`: the module, and how arrays get to where it works and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Dtype = np.dtype[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALVES = [np.dtype(np.float16), BFLOAT16]
FLOATS = [*HALVES, np.dtype(np.float32), np.dtype(np.float64)]
INTEGERS = [np.dtype(code) for code in "bhilBHIL"]
COMPLEX = [np.dtype(np.complex64), np.dtype(np.complex128)]

SLOT = 16  # bytes
ALIGNMENT = 64  # bytes, of what `aligned` makes: a cache line
GUARD = 5  # elements before and behind what a kernel may write
UNTOUCHED = 77  # what they hold
SIZES = (3, 0, 1, 300, 64, 7, 1000, 129)
OFFSETS = (0, 1, 3)  # elements from an aligned address


def aligned(array: Array) -> Array:
    """A copy that begins at a multiple of `ALIGNMENT`."""
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype)
    copy[:] = array
    return copy


class Twin(NamedTuple):
    """A module with kernels, and copies of flat arrays: to its memory, aligned, and from there."""

    module: Any
    upload: Callable[[Array], Any] = aligned
    download: Callable[[Any], Array] = np.array


class Guarded:
    """Values in a twin's memory, ``by`` elements behind an aligned address, with guards around them."""

    def __init__(self, twin: Twin, values: Array, by: int = 0) -> None:
        self._start = by + ALIGNMENT // values.dtype.itemsize
        room = np.full(self._start + len(values) + GUARD, UNTOUCHED).astype(values.dtype)
        self._stop = self._start + len(values)
        room[self._start : self._stop] = values
        self._twin, self._room = twin, twin.upload(room)
        self.array = self._room[self._start : self._stop]

    def read(self) -> Array:
        """The values now. Fails where a guard was overwritten."""
        room = self._twin.download(self._room)
        guards = np.concatenate([room[: self._start], room[self._stop :]])
        assert_same(guards, np.full(len(guards), UNTOUCHED).astype(room.dtype), "a guard was overwritten")
        return room[self._start : self._stop]


def numbers(dtype: Dtype, count: int, seed: int) -> Array:
    """Any integers; floats of both signs that differ in magnitude; zeros among them.

    Complex numbers are small integers, whose products are exact however they are computed.
    """
    random = np.random.default_rng((seed, count))
    if dtype.kind == "c":
        found = random.integers(-4, 5, 2 * count).astype(f"f{dtype.itemsize // 2}").view(dtype)
    elif dtype.kind in "iub":
        found = random.integers(0, 256, count * dtype.itemsize, np.uint8).view(f"u{dtype.itemsize}")
        found = (found % 2).astype(bool) if dtype.kind == "b" else found.view(dtype)
    else:
        found = (random.standard_normal(count) * 2.0 ** random.integers(-6, 6, count)).astype(dtype)
    found[::5] = 0
    return found


def assert_same(found: Array, wanted: Array, what: str) -> None:
    """The same bits, except that one NaN is as good as another."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, what
    if found.dtype in COMPLEX:
        found, wanted = (array.view(f"f{array.itemsize // 2}") for array in (found, wanted))
    if found.dtype in FLOATS:
        nan = np.isnan(wanted)
        np.testing.assert_array_equal(np.isnan(found), nan, what)
        found, wanted = found[~nan], wanted[~nan]
    bits = f"u{found.dtype.itemsize}"
    np.testing.assert_array_equal(found.view(bits), wanted.view(bits), what)


def rounded(values: Array, dtype: Dtype) -> Array:
    """Converted to ``dtype``, to 16 bits by way of float32."""
    with np.errstate(over="ignore"):
        return (values.astype(np.float32) if dtype in HALVES else values).astype(dtype)


def scaled(values: Array, scale: float, dtype: Dtype) -> Array:
    """values * scale in float32, or float64 where either dtype is that, as ``dtype``."""
    if values.dtype not in FLOATS:
        return values
    wide = np.float64 if np.dtype(np.float64) in (values.dtype, dtype) else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        return rounded(values.astype(wide) * wide(scale), dtype)


def slots_of(sizes: Sequence[int], itemsize: int) -> tuple[list[slice], int]:
    """Where each tensor lies in a bucket, and the bucket's elements."""
    found, end = [], 0
    for size in sizes:
        found.append(slice(end, end + size))
        end += -(-size * itemsize // SLOT) * SLOT // itemsize
    return found, end


def filled(tensors: Sequence[Array], dtype: Dtype, background: Any) -> Array:
    """A bucket with tensors in their slots and ``background`` between them."""
    places, end = slots_of([len(tensor) for tensor in tensors], dtype.itemsize)
    bucket = np.full(end, background).astype(dtype)
    for place, tensor in zip(places, tensors, strict=True):
        bucket[place] = tensor
    return bucket


def guarded_tensors(twin: Twin, tensors: Sequence[Array], by: int) -> list[Guarded]:
    """The i-th begins ``i * by`` elements behind an aligned address."""
    return [Guarded(twin, tensor, i * by) for i, tensor in enumerate(tensors)]


def check_slots(twin: Twin) -> None:
    """Where slots begin, for every size of an element."""
    for itemsize in (1, 2, 4, 8):
        for sizes in (SIZES, (), (0,), (1,), (16, 16)):
            places, end = slots_of(sizes, itemsize)
            assert twin.module.slots(sizes, itemsize) == ([place.start for place in places], end)


def check_pack(
    twin: Twin, dtype: Dtype, bucket: Dtype, scale: float = 1.0, by: int = 0, sizes: Sequence[int] = SIZES
) -> None:
    """Tensors arrive scaled and converted, zeros lie between them, and nothing else changes."""
    tensors = [numbers(dtype, size, i) for i, size in enumerate(sizes)]
    given = guarded_tensors(twin, tensors, by)
    wanted = filled([scaled(tensor, scale, bucket) for tensor in tensors], bucket, 0)
    into = Guarded(twin, np.full(len(wanted), 1).astype(bucket))
    twin.module.Packing([tensor.array for tensor in given], into.array).pack(scale)
    assert_same(into.read(), wanted, f"{dtype} as {bucket}, {by} elements off")
    for tensor, before in zip(given, tensors, strict=True):
        assert_same(tensor.read(), before, "pack changed a tensor")


def check_unpack(
    twin: Twin, dtype: Dtype, bucket: Dtype, scale: float = 1.0, by: int = 0, sizes: Sequence[int] = SIZES
) -> None:
    """The reverse; what lies between slots is not looked at."""
    held = [numbers(bucket, size, i) for i, size in enumerate(sizes)]
    source = filled(held, bucket, 1)
    given = Guarded(twin, source)
    into = guarded_tensors(twin, [np.ones(size, dtype) for size in sizes], by)
    flags = Guarded(twin, np.full(len(sizes), 3, np.int32))
    arrays = [tensor.array for tensor in into]
    twin.module.Packing(arrays, given.array).unpack(scale, flags.array)
    for i, tensor in enumerate(into):
        assert_same(tensor.read(), scaled(held[i], scale, dtype), f"{bucket} as {dtype}, {by} elements off")
    assert_same(given.read(), source, "unpack changed the bucket")
    np.testing.assert_array_equal(flags.read(), 3, "nothing was wrong")


def check_shapes(twin: Twin) -> None:
    """Tensors keep their order in memory, whatever their shape."""
    tensor = numbers(FLOATS[2], 60, 1)
    given = Guarded(twin, tensor)
    into = Guarded(twin, np.ones(60, np.float32))
    for shape in ((60,), (3, 20), (3, 1, 4, 5), (60, 1)):
        twin.module.Packing([given.array.reshape(shape)], into.array).pack(2.0)
        assert_same(into.read(), tensor * np.float32(2), f"shape {shape}")


def spoilt(dtype: Dtype, size: int, at: int, value: float) -> Array:
    tensor = numbers(dtype, size, 1)
    tensor[at] = value
    return tensor


def check_nonfinite(twin: Twin, dtype: Dtype, bucket: Dtype, scale: float) -> None:
    """Entries of spoilt tensors become 1, the others stay; NaN and infinity are handed on."""
    spoils = [(0, np.nan), (499, np.inf), (250, -np.inf)]
    tensors = [spoilt(dtype, 500, at, value) for at, value in spoils]
    for at in (0, 1, 3):
        tensors.insert(at, numbers(dtype, 500, at))
    wanted = np.array([7, 7, 1, 7, 1, 1], np.int32)
    end = slots_of([500] * 6, bucket.itemsize)[1]
    given = guarded_tensors(twin, tensors, 1)
    into, flags = Guarded(twin, np.ones(end, bucket)), Guarded(twin, np.full(6, 7, np.int32))
    packing = twin.module.Packing([tensor.array for tensor in given], into.array)
    packing.pack(scale, flags.array)
    assert_same(flags.read(), wanted, "pack")
    values = [scaled(tensor, scale, bucket) for tensor in tensors]
    assert_same(into.read(), filled(values, bucket, 0), "pack")
    again = Guarded(twin, np.full(6, 7, np.int32))
    packing.unpack(scale, again.array)
    assert_same(again.read(), wanted, "unpack")
    for tensor, value in zip(given, values, strict=True):
        assert_same(tensor.read(), scaled(value, scale, dtype), "unpack")


def check_overflow(twin: Twin, dst: Dtype) -> None:
    """A number that becomes infinite by being rounded counts as infinite, its neighbour below does not."""
    largest = float(ml_dtypes.finfo(dst).max)
    step = np.spacing(np.float32(largest)) if dst != np.float32 else np.spacing(np.float64(largest))
    src = np.dtype(np.float32) if dst != np.float32 else np.dtype(np.float64)
    # Halfway to the number that would come next, ties go to even: to infinity.
    halfway = largest + (largest - float(np.nextafter(dst.type(largest), dst.type(0)))) / 2
    tensors = [
        np.array([value] * 33, src) for value in (halfway, halfway - step, -halfway, step - halfway, largest)
    ]
    flags, into = Guarded(twin, np.zeros(5, np.int32)), Guarded(twin, np.zeros(5 * 40, dst))
    given = guarded_tensors(twin, tensors, 0)
    twin.module.Packing([tensor.array for tensor in given], into.array).pack(1.0, flags.array)
    np.testing.assert_array_equal(flags.read(), [1, 0, 1, 0, 0])


def check_many(twin: Twin, count: int) -> None:
    """So many tensors at once, of sizes around those of a slot."""
    check_pack(twin, FLOATS[2], BFLOAT16, 0.5, sizes=[i % 11 for i in range(count)])


def check_nothing(twin: Twin) -> None:
    """No tensors, and only empty ones."""
    for sizes in ((), (0,), (0, 0, 0)):
        check_pack(twin, FLOATS[2], FLOATS[2], sizes=sizes)
        check_unpack(twin, FLOATS[2], BFLOAT16, 0.5, sizes=sizes)


def check_packing_refuses(twin: Twin, raises: Callable[..., Any]) -> None:
    """Wrong arguments are named. ``raises`` is pytest's."""
    Packing = twin.module.Packing
    one, other = (twin.upload(np.ones(8, dtype)) for dtype in (np.float32, np.int32))
    room = twin.upload(np.ones(32, np.float32))
    with raises(TypeError, match=r"tensors: .*one dtype.*float32.*int32|tensors: .*int32.*float32"):
        Packing([one, other], room)
    with raises(ValueError, match=r"tensors\[1\]: .*contiguous"):
        Packing([one, room[::2]], room)
    with raises(ValueError, match="bucket: .*16 elements, got 15"):
        Packing([one, one], room[:15])
    with raises(TypeError, match="bucket: .*float32"):
        Packing([one], twin.upload(np.ones(8, np.int32)))
    with raises(ValueError, match="bucket: .*flat"):
        Packing([one], room.reshape(4, 8))
    packing = Packing([one], room)
    for flags in (np.zeros(1, np.int64), np.zeros(2, np.int32)):
        with raises(ValueError, match="nonfinite: expected 1 int32"):
            packing.pack(1.0, twin.upload(flags))
    with raises(TypeError, match="scale: expected 1 for int32"):
        Packing([other], twin.upload(np.ones(8, np.int32))).pack(0.5)


class Settings(NamedTuple):
    """Of `Update.step`."""

    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    scale: float = 1.0


SETTINGS = [
    Settings(0.1),
    Settings(0.1, 0.9),
    Settings(0.3, 0.9, 1e-3, False, 0.25),
    Settings(0.3, 0.7, 1e-3, True, 1 / 3),
]


def updated(w: Array, v: Array, gradient: Array, settings: Settings) -> tuple[Array, Array]:
    """One operation after the other, in NumPy."""
    kind = w.dtype.type
    rate, momentum, decay, scale = (
        kind(settings.learning_rate),
        kind(settings.momentum),
        kind(settings.weight_decay),
        kind(settings.scale),
    )
    g = gradient.astype(kind) * scale
    g = g + decay * w
    v = momentum * v + g
    w = w - rate * (g + momentum * v if settings.nesterov else v)
    return w, v


def check_update(twin: Twin, dtype: Dtype, bucket: Dtype, settings: Settings, by: int = 0) -> None:
    """Two steps give NumPy's bits, and leave the gradients alone."""
    weights, moments, gradients = (
        [numbers(kind, size, 3 * i + j) for i, size in enumerate(SIZES)]
        for j, kind in enumerate((dtype, dtype, bucket))
    )
    held = filled(gradients, bucket, np.nan)
    given, flags = Guarded(twin, held), Guarded(twin, np.full(len(SIZES), 7, np.int32))
    ws, vs = guarded_tensors(twin, weights, by), guarded_tensors(twin, moments, 2 * by)
    update = twin.module.Update(given.array, [w.array for w in ws], [v.array for v in vs])
    for _ in range(2):
        update.step(*settings, flags.array)
        both = [updated(*arrays, settings) for arrays in zip(weights, moments, gradients, strict=True)]
        weights, moments = [w for w, _ in both], [v for _, v in both]
    for i, (w, v) in enumerate(zip(ws, vs, strict=True)):
        assert_same(v.read(), moments[i], f"velocity {i}, {settings}")
        assert_same(w.read(), weights[i], f"parameter {i}, {settings}")
    assert_same(given.read(), held, "step changed the bucket")
    np.testing.assert_array_equal(flags.read(), 7, "nothing was wrong")


def check_update_nonfinite(twin: Twin) -> None:
    """What scale makes infinite counts as infinite."""
    gradients = [
        numbers(FLOATS[2], 200, 1),
        spoilt(FLOATS[2], 200, 199, np.nan),
        spoilt(FLOATS[2], 200, 3, 1e30),
    ]
    given = Guarded(twin, filled(gradients, FLOATS[2], 0))
    arrays = [Guarded(twin, np.ones(200, np.float32)) for _ in range(6)]
    flags = Guarded(twin, np.full(3, 7, np.int32))
    update = twin.module.Update(given.array, [a.array for a in arrays[:3]], [a.array for a in arrays[3:]])
    update.step(0.1, scale=1e10, nonfinite=flags.array)
    np.testing.assert_array_equal(flags.read(), [7, 1, 1])
    assert [bool(np.isfinite(w.read()).all()) for w in arrays[:3]] == [True, False, False]


def check_update_refuses(twin: Twin, raises: Callable[..., Any]) -> None:
    """Wrong arguments are named. ``raises`` is pytest's."""
    Update = twin.module.Update
    one, double, half = (twin.upload(np.ones(8, dtype)) for dtype in (np.float32, np.float64, np.float16))
    with raises(TypeError, match="parameters: expected float32 or float64"):
        Update(half, [half], [half])
    with raises(TypeError, match="velocities: expected float32"):
        Update(one, [one], [double])
    with raises(ValueError, match="velocities: .*sizes"):
        Update(one, [one[:4]], [one])
    with raises(ValueError, match="bucket: .*16 elements, got 8"):
        Update(one, [one, one], [one, one])
    with raises(TypeError, match="bucket: expected elements of float32"):
        Update(twin.upload(np.ones(8, np.int32)), [one], [one])


# -- reductions

OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "SUM": np.add,
    "PROD": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
    "LAND": np.logical_and,
    "LOR": np.logical_or,
    "LXOR": np.logical_xor,
}


def reduced(op: str, arrays: Sequence[Array], factor: float = 1.0) -> Array:
    """Folded in ascending order, 16-bit floats in float32; and scaled in float64."""
    dtype = arrays[0].dtype
    total = arrays[0].astype(np.float32) if dtype in HALVES else arrays[0]
    with np.errstate(all="ignore"):
        for array in arrays[1:]:
            total = OPERATIONS[op](total, array.astype(total.dtype)).astype(total.dtype)
        if factor != 1:
            parts = total.view(total.real.dtype)  # of complex numbers
            total = (parts * np.float64(factor)).astype(parts.dtype).view(total.dtype)
        return total.astype(dtype)


class Layout(NamedTuple):
    """Of what `check_fold` does. Each array begins ``apart`` elements further from an aligned address."""

    ntargets: int
    nsources: int
    by: int = 0  # elements that the first array begins behind an aligned address
    apart: int = 0
    in_place: bool = False  # the last target is the last source
    factor: float = 1.0


def check_fold(twin: Twin, op: str, dtype: Dtype, size: int, layout: Layout) -> None:
    """Every target has the result, and no source changes that is no target."""
    arrays = [numbers(dtype, size, i) for i in range(layout.nsources)]
    blank = [np.ones(size, dtype)] * (layout.ntargets - layout.in_place)
    given = [
        Guarded(twin, values, layout.by + i * layout.apart) for i, values in enumerate([*blank, *arrays])
    ]
    targets, sources = given[: len(blank)], given[len(blank) :]
    if layout.in_place:
        targets.append(sources[-1])
    factor = layout.factor if dtype.kind not in "biu" else 1.0
    places = [[twin.module.memory_of(g.array, "array").address for g in side] for side in (targets, sources)]
    twin.module.fold(op, dtype, *places, size, factor, 0)
    what = f"{op} of {size} {dtype}, {layout}"
    for target in targets:
        assert_same(target.read(), reduced(op, arrays, factor), what)
    for source, before in list(zip(sources, arrays, strict=True))[: len(sources) - layout.in_place]:
        assert_same(source.read(), before, f"{what}: a source changed")


def check_reduce(twin: Twin, op: str, dtype: Dtype, size: int, by: tuple[int, int]) -> None:
    """dst = dst op src, and src stays; ``by`` are their distances from aligned addresses, in elements."""
    a, b = numbers(dtype, size, 1), numbers(dtype, size, 2)
    dst, src = Guarded(twin, a, by[0]), Guarded(twin, b, by[1])
    twin.module.reduce(op, dst.array, src.array)
    assert_same(dst.read(), reduced(op, [a, b]), f"{op} of {size} {dtype}, {by} elements off")
    assert_same(src.read(), b, "reduce changed src")


def check_reduce_many(twin: Twin, op: str, dtype: Dtype, nsources: int, size: int, by: int = 0) -> None:
    """dst = s0 op s1 op ..., into an array of its own and into each source."""
    arrays = [numbers(dtype, size, i) for i in range(nsources)]
    wanted = reduced(op, arrays)
    sources = guarded_tensors(twin, arrays, by)
    into = Guarded(twin, np.ones(size, dtype))
    twin.module.reduce_many(op, into.array, [source.array for source in sources])
    assert_same(into.read(), wanted, f"{op} of {nsources} {dtype}")
    for source, before in zip(sources, arrays, strict=True):
        assert_same(source.read(), before, "reduce_many changed a source")
    last = sources[-1]
    twin.module.reduce_many(op, last.array, [source.array for source in sources])
    assert_same(last.read(), wanted, f"{op} of {nsources} {dtype} in place")


def check_reduce_nan(twin: Twin, dtype: Dtype) -> None:
    """NaN on either side stays; infinities are compared."""
    a = np.array([np.nan, 1, np.nan, np.inf, -np.inf, np.inf, 2] * 9).astype(dtype)
    b = np.array([1, np.nan, np.nan, 1, 1, -np.inf, np.inf] * 9).astype(dtype)
    for op in ("MIN", "MAX", "SUM", "PROD"):
        dst, src = Guarded(twin, a), Guarded(twin, b)
        twin.module.reduce(op, dst.array, src.array)
        assert_same(dst.read(), reduced(op, [a, b]), op)


def check_every_half(twin: Twin, dtype: Dtype, size: int) -> None:
    """16-bit patterns, among them subnormal numbers, are rounded to nearest even once: of a SUM of three."""
    patterns = np.random.default_rng(1).permutation(1 << 16).astype(np.uint16)
    arrays = [np.roll(patterns, 1000 * i)[:size].view(dtype) for i in range(3)]
    sources = guarded_tensors(twin, arrays, 0)
    into = Guarded(twin, np.ones(size, dtype))
    twin.module.reduce_many("SUM", into.array, [source.array for source in sources])
    assert_same(into.read(), reduced("SUM", arrays), str(dtype))


def check_reduce_refuses(twin: Twin, raises: Callable[..., Any]) -> None:
    """Wrong arguments are named. ``raises`` is pytest's."""
    reduce, reduce_many = twin.module.reduce, twin.module.reduce_many
    one, double, integers = (twin.upload(np.ones(8, dtype)) for dtype in (np.float32, np.float64, np.int32))
    with raises(TypeError, match="src: expected elements of float32 as dst, got float64"):
        reduce("SUM", one, double)
    with raises(ValueError, match="src: expected 8 elements as dst, got 7"):
        reduce("SUM", one, one[:7])
    with raises(ValueError, match=r"dst: .*contiguous"):
        reduce("SUM", one[::2], one[:4])
    with raises(TypeError, match="op: BAND is not defined for float32"):
        reduce("BAND", one, one)
    with raises(TypeError, match="op: MAX is not defined for complex64; allowed: SUM, PROD"):
        reduce("MAX", one.view(np.complex64), one.view(np.complex64))
    with raises(ValueError, match="sources: expected 1 to 64, got 0"):
        reduce_many("SUM", one, [])
    with raises(TypeError, match=r"sources\[1\]: .*int32"):
        reduce_many("SUM", one, [one, integers])


def check_fold_refuses(twin: Twin, raises: Callable[..., Any]) -> None:
    """Wrong arguments are named. ``raises`` is pytest's."""
    fold, at = twin.module.fold, twin.module.memory_of(twin.upload(np.ones(99)), "array").address
    float32, int32 = np.dtype(np.float32), np.dtype(np.int32)
    with raises(ValueError, match="targets: expected 1 to 64, got 65"):
        fold("SUM", float32, [at] * 65, [at], 1, 1.0, 0)
    with raises(ValueError, match="sources: expected 1 to 64, got 0"):
        fold("SUM", float32, [at], [], 1, 1.0, 0)
    with raises(TypeError, match="factor: expected 1 for int32"):
        fold("SUM", int32, [at], [at], 1, 0.5, 0)
    with raises(TypeError, match="op: BOR is not defined for float32"):
        fold("BOR", float32, [at], [at], 1, 1.0, 0)
    with raises(ValueError, match=r"sources\[1\]: expected a multiple of 4 bytes, got 0x[0-9a-f]+2$"):
        fold("SUM", float32, [at], [at, at + 2 - at % 16], 1, 1.0, 0)
