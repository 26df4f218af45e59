"""What the CUDA kernels share: memory by address, lanes, chunks of many arrays, and launches.

A kernel gets numbers alone, because every array argument makes a launch slower: addresses are int64. It moves
elements in **lanes**, a tuple of values which `loader` and `storer` read and write with accesses of up to 16
bytes; `mapped` and `folded` apply a function to them. 16-bit floats are float32 in lanes, and rounded to
nearest even when they are stored.

Where ``NUMBA_ENABLE_CUDASIM=1`` the kernels run in Numba's simulator, on NumPy arrays; what is made of
intrinsics here has a stand-in in Python there, which refuses misaligned accesses as a GPU does.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, reduce
from operator import attrgetter
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import cuda, types
from numba.core import cgutils, config
from numba.core.targetconfig import ConfigStack
from numba.cuda.extending import intrinsic

from .elements import BFLOAT16, BFLOAT16_DTYPE, Half, element_type, narrow

SIMULATED = bool(config.ENABLE_CUDASIM)
if not SIMULATED:  # needs NVIDIA's bindings
    from cuda.bindings.driver import cuCtxGetCurrent
    from cuda.core import LaunchConfig, Stream, launch

Dtype = np.dtype[Any]
Function = Callable[..., Any]

_code_of = attrgetter("library")  # of a compiled kernel: what is loaded into a context

ACCESS = 16  # bytes of the widest access that all GPUs have
# Of a block: enough to hide the memory's latency, few enough that a multiprocessor holds several blocks at
# once, and one can begin where another ends. In the simulator each is a thread of the operating system.
THREADS = 8 if SIMULATED else 256
# Accesses that a thread has under way at once. The compiler cannot move a load before an earlier store, so
# each thread loads several times, and then stores several times.
PIECES = 4
# About as many blocks as a large GPU runs at once (132 multiprocessors, eight blocks each). With more than
# these, each block may as well do more, and look up what it works on less often.
MANY_BLOCKS = 1024
MOST_TILES = 4  # for each block: with more of them the last blocks would leave much of the GPU idle

FLOATS = (np.dtype(np.float16), BFLOAT16_DTYPE, np.dtype(np.float32), np.dtype(np.float64))
DTYPES = frozenset(np.dtype(code) for code in "?bhilqBHILQ") | frozenset(FLOATS)

_WORD = ir.IntType(32)
_BFLOAT16 = element_type(BFLOAT16_DTYPE)


def device_function(function: Function) -> Function:
    """Make a function that kernels call."""
    return function if SIMULATED else cuda.jit(function, device=True)


def widest(*dtypes: Dtype) -> int:
    """The lanes of which every dtype fits in one access."""
    return ACCESS // max(dtype.itemsize for dtype in dtypes)


# -- lanes


def _value_type(dtype: Dtype) -> Any:
    element = element_type(dtype)
    return types.float32 if isinstance(element, Half) else element


def _words(lanes: int, dtype: Dtype) -> ir.VectorType:
    """An access as a vector of words of at most 32 bits: more, smaller elements become several accesses."""
    nbytes = lanes * dtype.itemsize
    return ir.VectorType(ir.IntType(min(32, 8 * nbytes)), -(-nbytes // 4))


def _elements(lanes: int, dtype: Dtype) -> ir.VectorType:
    if dtype.kind == "c":  # pairs of floats
        return _elements(2 * lanes, np.dtype(f"f{dtype.itemsize // 2}"))
    kinds = {"f": {2: ir.HalfType(), 4: ir.FloatType(), 8: ir.DoubleType()}}
    return ir.VectorType(kinds.get(dtype.kind, {}).get(dtype.itemsize, ir.IntType(8 * dtype.itemsize)), lanes)


def _pointer(
    builder: ir.IRBuilder, address: ir.Value, piece: int, stride: ir.Value, kind: ir.Type
) -> ir.Value:
    """To a piece in global memory, the first of which begins at ``address``."""
    begin = builder.add(address, builder.mul(stride, stride.type(piece)))
    return builder.inttoptr(begin, kind.as_pointer(1))


def _at(index: int) -> ir.Constant:
    return _WORD(index)


def _unpack(builder: ir.IRBuilder, words: ir.Value, lanes: int, dtype: Dtype) -> list[ir.Value]:
    """The values in an access."""
    if dtype == BFLOAT16_DTYPE:
        return _unpack_bfloat16(builder, words, lanes)
    if dtype.kind in "biu" and dtype.itemsize < 4 and lanes > 1:
        return _unpack_small(builder, words, lanes, dtype)
    vector = builder.bitcast(words, _elements(lanes, dtype))
    values = [builder.extract_element(vector, _at(i)) for i in range(vector.type.count)]
    if dtype.kind == "c":
        return [cgutils.pack_struct(builder, values[i : i + 2]) for i in range(0, len(values), 2)]
    return [builder.fpext(value, ir.FloatType()) for value in values] if dtype == np.float16 else values


def _unpack_bfloat16(builder: ir.IRBuilder, words: ir.Value, lanes: int) -> list[ir.Value]:
    """bfloat16 is the upper half of a float32."""
    values = []
    for i in range(lanes):
        word = builder.extract_element(words, _at(i // 2))
        if lanes == 1:
            word = builder.zext(word, _WORD)
        bits = builder.and_(word, _WORD(0xFFFF0000)) if i % 2 else builder.shl(word, _WORD(16))
        values.append(builder.bitcast(bits, ir.FloatType()))
    return values


def _unpack_small(builder: ir.IRBuilder, words: ir.Value, lanes: int, dtype: Dtype) -> list[ir.Value]:
    """Integers out of words: were the words cast, the access would become several narrow ones."""
    bits = 8 * dtype.itemsize
    values = []
    for i in range(lanes):
        word = builder.extract_element(words, _at(i * bits // 32))
        values.append(builder.trunc(builder.lshr(word, _WORD(i * bits % 32)), ir.IntType(bits)))
    return values


def _pack_small(builder: ir.IRBuilder, values: list[ir.Value], bits: int) -> list[ir.Value]:
    words = []
    for first in range(0, len(values), 32 // bits):
        word = _WORD(0)
        for i in range(32 // bits):
            word = builder.or_(word, builder.shl(builder.zext(values[first + i], _WORD), _WORD(i * bits)))
        words.append(word)
    return words


def _pack(builder: ir.IRBuilder, values: list[ir.Value], dtype: Dtype) -> ir.Value:
    """An access's words."""
    lanes = len(values)
    if dtype == BFLOAT16_DTYPE:
        return _vector(builder, _words(lanes, dtype), _pack_bfloat16(builder, values))
    if dtype.kind in "biu" and dtype.itemsize < 4 and lanes > 1:
        return _vector(builder, _words(lanes, dtype), _pack_small(builder, values, 8 * dtype.itemsize))
    if dtype == np.float16:
        values = [builder.fptrunc(value, ir.HalfType()) for value in values]
    if dtype.kind == "c":
        values = [part for value in values for part in cgutils.unpack_tuple(builder, value, 2)]
    return builder.bitcast(_vector(builder, _elements(lanes, dtype), values), _words(lanes, dtype))


def _pack_bfloat16(builder: ir.IRBuilder, values: list[ir.Value]) -> list[ir.Value]:
    """Rounded to nearest even by the hardware: without it, that would take as long as the memory does."""
    if ConfigStack().top().compute_capability < (8, 0):
        halves = [narrow(builder, value, BFLOAT16) for value in values]
        return halves if len(halves) == 1 else _pack_small(builder, halves, 16)
    real = ir.FloatType()
    if len(values) == 1:
        one = ir.InlineAsm(ir.FunctionType(ir.IntType(16), [real]), "cvt.rn.bf16.f32 $0, $1;", "=h,f")
        return [builder.call(one, values)]
    two = ir.InlineAsm(ir.FunctionType(_WORD, [real, real]), "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f")
    return [builder.call(two, [values[i + 1], values[i]]) for i in range(0, len(values), 2)]


def _vector(builder: ir.IRBuilder, kind: ir.VectorType, values: list[ir.Value]) -> ir.Value:
    vector = kind(ir.Undefined)
    for i, value in enumerate(values):
        vector = builder.insert_element(vector, value, _at(i))
    return vector


@cache
def loader(dtype: Dtype, lanes: int, pieces: int = 1) -> Function:
    """``load(address, stride)``: the values of ``pieces`` accesses, which begin ``stride`` bytes apart.

    Each is of ``lanes`` elements, and begins at a multiple of its size.
    """
    if SIMULATED:
        return _simulated_loader(dtype, lanes, pieces)
    result = types.UniTuple(_value_type(dtype), lanes * pieces)

    @intrinsic
    def load(typingctx: Any, address: Any, stride: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            loaded = []
            for piece in range(pieces):
                words = builder.load(_pointer(builder, args[0], piece, args[1], _words(lanes, dtype)))
                words.align = lanes * dtype.itemsize
                loaded.append(words)
            values = [value for words in loaded for value in _unpack(builder, words, lanes, dtype)]
            return context.make_tuple(builder, result, values)

        return result(types.int64, types.int64), codegen

    return load  # type: ignore[no-any-return]


@cache
def storer(dtype: Dtype, lanes: int, pieces: int = 1) -> Function:
    """``store(address, stride, values)``: the reverse of `loader`, converting to ``dtype``."""
    if SIMULATED:
        return _simulated_storer(dtype, lanes, pieces)
    wanted = _value_type(dtype)

    @intrinsic
    def store(typingctx: Any, address: Any, stride: Any, values: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            given = [builder.extract_value(args[2], i) for i in range(lanes * pieces)]
            cast = [context.cast(builder, value, values.dtype, wanted) for value in given]
            for piece in range(pieces):
                words = _pack(builder, cast[piece * lanes : (piece + 1) * lanes], dtype)
                stored = builder.store(words, _pointer(builder, args[0], piece, args[1], words.type))
                stored.align = lanes * dtype.itemsize
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, values), codegen

    return store  # type: ignore[no-any-return]


def _simulated_memory(address: int, lanes: int, dtype: Dtype) -> Any:
    nbytes = lanes * dtype.itemsize
    if address % nbytes:
        raise ValueError(f"misaligned access of {nbytes} bytes at {address:#x}")
    return np.frombuffer(memoryview((ctypes.c_byte * nbytes).from_address(int(address))), dtype)


def _simulated_loader(dtype: Dtype, lanes: int, pieces: int) -> Function:
    def load(address: int, stride: int) -> Any:
        found = [_simulated_memory(address + piece * stride, lanes, dtype) for piece in range(pieces)]
        values = np.concatenate(found)
        if dtype.kind in "biu":
            return tuple(values.astype(np.uint8 if dtype.kind == "b" else dtype).tolist())
        return tuple(values.astype(np.float32) if dtype.itemsize == 2 else values)

    return load


def _simulated_storer(dtype: Dtype, lanes: int, pieces: int) -> Function:
    def converted(values: Any) -> Any:
        if dtype.kind not in "biu":
            return np.array(values).astype(np.float32 if dtype.itemsize == 2 else dtype).astype(dtype)
        mask = (1 << 8 * dtype.itemsize) - 1
        return np.array([int(value) & mask for value in values], f"u{dtype.itemsize}").view(dtype)

    def store(address: int, stride: int, values: Any) -> None:
        for piece in range(pieces):
            target = _simulated_memory(address + piece * stride, lanes, dtype)
            target[:] = converted(values[piece * lanes : (piece + 1) * lanes])

    return store


def _lanes(kind: Any) -> bool:
    return isinstance(kind, types.BaseTuple)


def _call(
    context: Any, builder: ir.IRBuilder, function: Any, signature: Any, kinds: Sequence[Any], values: Any
) -> ir.Value:
    """Call ``function`` with values of these kinds, converted to those of the signature."""
    implementation = context.get_function(function, signature)
    context.add_linking_libs(getattr(implementation, "libs", ()))
    wanted = zip(values, kinds, signature.args, strict=True)
    return implementation(builder, [context.cast(builder, *conversion) for conversion in wanted])


@intrinsic
def _compiled_mapped(typingctx: Any, function: Any, *arguments: Any) -> Any:
    count = max(len(kind) for kind in arguments if _lanes(kind))
    kinds = tuple(kind.dtype if _lanes(kind) else kind for kind in arguments)
    signature = typingctx.resolve_function_type(function, kinds, {})
    result = types.UniTuple(signature.return_type, count)

    def codegen(context: Any, builder: ir.IRBuilder, whole: Any, args: Any) -> ir.Value:
        given = [builder.extract_value(args[1], i) for i in range(len(arguments))]
        values = []
        for lane in range(count):
            parts = [
                builder.extract_value(value, lane) if _lanes(kind) else value
                for kind, value in zip(arguments, given, strict=True)
            ]
            values.append(_call(context, builder, function, signature, kinds, parts))
        return context.make_tuple(builder, result, values)

    return result(function, types.StarArgTuple(arguments)), codegen


@intrinsic
def _compiled_folded(typingctx: Any, function: Any, start: Any, values: Any, *others: Any) -> Any:
    kinds = [(start, kind, *others) for kind in values]
    signatures = [typingctx.resolve_function_type(function, kind, {}) for kind in kinds]

    def codegen(context: Any, builder: ir.IRBuilder, whole: Any, args: Any) -> ir.Value:
        total = args[1]
        rest = [builder.extract_value(args[3], i) for i in range(len(others))]
        for i, signature in enumerate(signatures):
            parts = [total, builder.extract_value(args[2], i), *rest]
            total = _call(context, builder, function, signature, kinds[i], parts)
            total = context.cast(builder, total, signature.return_type, start)
        return total

    return start(function, start, values, types.StarArgTuple(others)), codegen


@intrinsic
def _compiled_product(typingctx: Any, x: Any, y: Any) -> Any:
    kind = types.float64 if types.float64 in (x, y) else types.float32
    name = "llvm.nvvm.mul.rn.d" if kind == types.float64 else "llvm.nvvm.mul.rn.f"

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        real = ir.DoubleType() if kind == types.float64 else ir.FloatType()
        multiply = builder.module.declare_intrinsic(name, (), ir.FunctionType(real, [real, real]))
        return builder.call(multiply, args)

    return kind(kind, kind), codegen


@intrinsic
def _compiled_add_at(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        at = builder.inttoptr(args[0], _WORD.as_pointer(1))
        builder.atomic_rmw("add", at, args[1], "monotonic")
        return context.get_dummy_value()

    return types.void(types.int64, types.int32), codegen


def _simulated_mapped(function: Function, *arguments: Any) -> tuple[Any, ...]:
    count = max(len(values) for values in arguments if isinstance(values, tuple))
    lanes = (values if isinstance(values, tuple) else (values,) * count for values in arguments)
    return tuple(map(function, *lanes))


def _simulated_folded(function: Function, start: Any, values: Any, *others: Any) -> Any:
    return reduce(lambda total, value: function(total, value, *others), values, start)


def _simulated_product(x: Any, y: Any) -> Any:
    return x * y


_adding = Lock()


def _simulated_add_at(address: int, value: Any) -> None:
    with _adding:
        _simulated_memory(address, 1, np.dtype(np.int32))[0] += value


# mapped(f, a, b, ...): f of each lane; what is not lanes goes into every call.
mapped = _simulated_mapped if SIMULATED else _compiled_mapped
# folded(f, start, values, ...): f(f(start, values[0], ...), values[1], ...) and so on.
folded = _simulated_folded if SIMULATED else _compiled_folded
# product(x, y): x * y of floats, rounded before anything is added; compilers would fuse the two operations.
product = _simulated_product if SIMULATED else _compiled_product
# add_at(address, value): add to an int32, whoever else does so at the same time.
add_at = _simulated_add_at if SIMULATED else _compiled_add_at


@cache
def rounder(dtype: Dtype) -> Function:
    """``round(x)``: the float32 x rounded to ``dtype``, a 16-bit float, as a float32."""
    if SIMULATED:
        return lambda x: x.astype(dtype).astype(np.float32)

    @intrinsic
    def narrow(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return _unpack(builder, _pack(builder, list(args), dtype), 1, dtype)[0]

        return types.float32(types.float32), codegen

    return narrow  # type: ignore[no-any-return]


_int32, _int64 = loader(np.dtype(np.int32), 1), loader(np.dtype(np.int64), 1)
_store_int32 = storer(np.dtype(np.int32), 1)


@device_function
def int32_at(address):  # type: ignore[no-untyped-def]
    return _int32(address, 0)[0]


@device_function
def int64_at(address):  # type: ignore[no-untyped-def]
    return _int64(address, 0)[0]


@device_function
def is_aligned(address, nbytes):  # type: ignore[no-untyped-def]
    """Whether it is a multiple of ``nbytes``, a power of 2."""
    return address & (nbytes - 1) == 0


@device_function
def set_flag(address):  # type: ignore[no-untyped-def]
    """Write a one; any number of threads may do so at the same time."""
    _store_int32(address, 0, (1,))


# -- many elements by many threads


def tile(lanes: int) -> int:
    """Elements that a block moves at once."""
    return THREADS * PIECES * lanes


def sweeper(step: Callable[[int, int], Function], lanes: int) -> Function:
    """``sweep(thread, count, aligned, state)``: the block's threads together go through ``count`` elements.

    ``step(lanes, pieces)`` makes what handles pieces of that many elements, the first at ``i`` and ``stride``
    elements apart: ``f(i, stride, state)``, which says whether something was found. The sweep says whether
    this thread found it anywhere. Where memory is not ``aligned`` to whole accesses, elements go one by one.
    """
    wide, single, last = step(lanes, PIECES), step(1, PIECES), step(1, 1)

    @device_function
    def sweep(thread, count, aligned, state):  # type: ignore[no-untyped-def]
        found = False
        done = count // (THREADS * PIECES * lanes) * (THREADS * PIECES * lanes) if aligned else 0
        for i in range(lanes * thread, done, THREADS * PIECES * lanes):
            found |= wide(i, THREADS * lanes, state)
        rest = done
        done += (count - rest) // (THREADS * PIECES) * (THREADS * PIECES)
        for i in range(rest + thread, done, THREADS * PIECES):
            found |= single(i, THREADS, state)
        for i in range(done + thread, count, THREADS):
            found |= last(i, THREADS, state)
        return found

    return sweep


def chunk_elements(count: int, lanes: int) -> int:
    """Elements for each block when there are ``count`` in all: whole tiles, several where there is much."""
    tiles = count // (tile(lanes) * MANY_BLOCKS)
    return tile(lanes) * min(max(tiles, 1), MOST_TILES)


# What a table's row begins with; columns of its own follow.
FIRST = 0  # block
COUNT = 1  # elements
OWN = 2


class Chunks:
    """Which chunk of which array each block of a launch works on.

    The table, one row of int64 for each array, and the array of each block are in the device's memory. All
    chunks but an array's last are equally long, so that blocks have as much to do, however the sizes differ.
    """

    def __init__(self, counts: Sequence[int], columns: Sequence[Sequence[int]], lanes: int) -> None:
        self.chunk = chunk_elements(sum(counts), lanes)
        blocks = [-(-count // self.chunk) for count in counts]
        self.blocks = sum(blocks)
        firsts = np.cumsum([0, *blocks])[:-1]
        rows = np.stack([np.array(column, np.int64) for column in (firsts, counts, *columns)], axis=1)
        self._memory = on_device(rows), on_device(np.repeat(np.arange(len(counts), dtype=np.int32), blocks))
        self.table, self.owners = (memory_of(array, "table").address for array in self._memory)


@device_function
def find_chunk(block, table, width, owners, chunk):  # type: ignore[no-untyped-def]
    """(array, its row's address, first element of the chunk, elements from there to the array's end)."""
    array = int32_at(owners + 4 * block)
    row = table + 8 * width * array
    begin = (block - int64_at(row)) * chunk
    return array, row, begin, int64_at(row + 8) - begin


# -- memory


class Memory(NamedTuple):
    """Where an array is."""

    address: int
    dtype: Dtype
    shape: tuple[int, ...]
    size: int  # elements


def _is_contiguous(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether elements lie one behind the other, in C's or Fortran's order."""

    def ascending(axes: Sequence[int]) -> bool:
        expected = itemsize
        for axis in axes:
            if shape[axis] != 1 and strides[axis] != expected:
                return False
            expected *= shape[axis]
        return True

    axes = range(len(shape))
    return 0 in shape or ascending(axes) or ascending(axes[::-1])


def _torch_tensor(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _torch_memory(tensor: Any) -> tuple[int, Dtype, tuple[int, ...], tuple[int, ...]]:
    name = str(tensor.dtype).removeprefix("torch.")
    dtype = BFLOAT16_DTYPE if name == "bfloat16" else np.dtype(name)
    strides = tuple(stride * dtype.itemsize for stride in tensor.stride())
    return tensor.data_ptr(), dtype, tuple(tensor.shape), strides


def _interface_memory(array: Any) -> tuple[int, Dtype, tuple[int, ...], tuple[int, ...] | None]:
    found = array.__cuda_array_interface__
    # The interface has no name for bfloat16, the array itself has.
    dtype = np.dtype(array.dtype if hasattr(array, "dtype") else found["typestr"])
    return found["data"][0], dtype, tuple(found["shape"]), found.get("strides")


def _simulated(array: Any) -> Any:
    """The NumPy array that stands for memory of the simulated device."""
    return array if isinstance(array, np.ndarray) else array._ary


def memory_of(array: Any, name: str) -> Memory:
    """The memory of a CuPy array, a PyTorch tensor, or another array on a GPU.

    Raises TypeError and ValueError that name the argument where it is elsewhere or not contiguous.
    """
    if SIMULATED:
        host = _simulated(array)
        address, dtype, shape, strides = host.ctypes.data, host.dtype, host.shape, host.strides
    elif _torch_tensor(array) and array.is_cuda:
        address, dtype, shape, strides = _torch_memory(array)
    elif hasattr(array, "__cuda_array_interface__") and not _torch_tensor(array):
        address, dtype, shape, strides = _interface_memory(array)
    else:
        raise TypeError(f"{name}: expected an array on a GPU, got {type(array).__name__} in host memory")
    if strides is not None and not _is_contiguous(shape, strides, dtype.itemsize):
        raise ValueError(f"{name}: expected contiguous memory, got shape {shape} with strides {strides}")
    return Memory(address, dtype, shape, int(np.prod(shape, dtype=np.int64)))


def flat_address(array: Any, name: str, dtype: npt.DTypeLike, count: int) -> int:
    """Where a flat array begins. Raises TypeError and ValueError unless it is ``count`` times ``dtype``."""
    memory = memory_of(array, name)
    if memory.dtype != dtype:
        raise TypeError(f"{name}: expected elements of {np.dtype(dtype)}, got {memory.dtype}")
    if memory.shape != (count,):
        raise ValueError(f"{name}: expected {count} elements, got an array of shape {memory.shape}")
    return memory.address


def on_device(array: Any) -> Any:
    """A copy in the device's memory, complete when this returns."""
    copied = cuda.to_device(array)
    if not SIMULATED:
        cuda.default_stream().synchronize()
    return copied


# -- launches


def stream_of(stream: Any, array: Any) -> int:
    """The handle of ``stream``; for None, of the stream on which ``array``'s library works at present.

    ``stream`` is a handle, or a stream of CuPy, PyTorch, Numba or cuda.core.
    """
    if SIMULATED or isinstance(stream, int):
        return stream or 0
    if stream is None:
        return _current_stream(array)
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for attribute in ("cuda_stream", "ptr"):  # PyTorch's, CuPy's
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    raise TypeError(f"stream: expected a CUDA stream or its handle, got {type(stream).__name__}")


def _current_stream(array: Any) -> int:
    if _torch_tensor(array):
        return int(sys.modules["torch"].cuda.current_stream(array.device).cuda_stream)
    return int(array.__cuda_array_interface__.get("stream") or 0)


class Kernel:
    """A CUDA kernel whose arguments are numbers of the given Numba types, or tuples of numbers.

    It is compiled when first launched. Launches do not go through Numba, which takes ten times as long for
    each, the longer the more arguments there are, and warns of small ones.
    """

    def __init__(self, function: Function, *arguments: Any) -> None:
        self.function = function
        self.signature = types.void(*arguments)
        self._kernel = cuda.jit(function)
        floats: dict[Any, Any] = {types.float32: np.float32, types.float64: np.float64}
        self._convert = [
            tuple if isinstance(kind, types.BaseTuple) else floats.get(kind, int) for kind in arguments
        ]
        self._loaded: dict[int, Any] = {}  # by the handle of the context

    def launch(self, blocks: int, stream: int, *arguments: Any) -> None:
        """Start it, unless there is nothing to do. It runs when what is before it on the stream is done."""
        if blocks == 0:
            return
        given = [convert(value) for convert, value in zip(self._convert, arguments, strict=True)]
        if SIMULATED:
            self._kernel[blocks, THREADS](*given)
        else:
            kernel = self._loaded.get(_context()) or self._load()
            launch(_stream(stream), _grid(blocks), kernel, *_flat(given))

    def _load(self) -> Any:
        """Compile it for the current context, which is made where there is none."""
        loaded = _code_of(self._kernel.compile(self.signature.args)).get_cufunc().kernel
        self._loaded[_context()] = loaded
        return loaded


def _context() -> int:
    """The handle of this thread's current context, 0 where there is none."""
    return int(cuCtxGetCurrent()[1] or 0)


@lru_cache(maxsize=256)
def _grid(blocks: int) -> Any:
    return LaunchConfig(grid=blocks, block=THREADS)


@lru_cache(maxsize=256)
def _stream(handle: int) -> Any:
    return Stream.from_handle(handle)


def _flat(values: Sequence[Any]) -> list[Any]:
    """With the elements of tuples in their place, as kernels take them."""
    numbers: list[Any] = []
    for value in values:
        if isinstance(value, tuple):
            numbers += value
        else:
            numbers.append(value)
    return numbers
