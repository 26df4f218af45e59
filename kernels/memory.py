"""Raw memory in compiled code: calls and tables by address, and copies.

Everything is an address, a 64-bit integer. A compiled function gets one address, of a table of int64 that
holds its state and the addresses of all else, so that it is compiled once for whatever it works on.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_BYTE, _WORD = ir.IntType(8), ir.IntType(64)
_LINE = ir.VectorType(_WORD, 8)  # of the cache


@intrinsic
def call(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call the C function at ``address`` with these numbers; its result is an int."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        return _c_call(builder, values[0], values[1], len(arguments), ir.IntType(32))

    return types.int32(types.int64, arguments), codegen


@intrinsic
def call_long(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call the C function at ``address`` with these numbers; its result is 64 bits wide."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        return _c_call(builder, values[0], values[1], len(arguments), _WORD)

    return types.int64(types.int64, arguments), codegen


def _c_call(
    builder: ir.IRBuilder, address: ir.Value, given: ir.Value, count: int, result: ir.Type
) -> ir.Value:
    unpacked = [builder.extract_value(given, i) for i in range(count)]
    function = ir.FunctionType(result, [value.type for value in unpacked])
    return builder.call(builder.inttoptr(address, function.as_pointer()), unpacked)


@intrinsic
def int64s(typingctx: Any, address: Any) -> Any:
    """The int64 array at ``address``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.inttoptr(args[0], _WORD.as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def as_float(typingctx: Any, bits: Any) -> Any:
    """The float64 with these bits."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """Everything written before, also by `copy_streaming`, is seen before anything written after."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def copy_bytes(typingctx: Any, dst: Any, src: Any, nbytes: Any) -> Any:
    """memmove: an input may be given as the output, too."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = _BYTE.as_pointer()
        move = builder.module.declare_intrinsic("llvm.memmove", [pointer, pointer, _WORD])
        dst, src = (builder.inttoptr(arg, pointer) for arg in args[:2])
        builder.call(move, [dst, src, args[2], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _copy_one_line(builder: ir.IRBuilder, args: Any) -> Any:
    """Copy a cache line to where another begins; returns the store."""
    target, source = (builder.inttoptr(arg, _LINE.as_pointer()) for arg in args)
    value = builder.load(source)
    value.align = 1
    store = builder.store(value, target)
    store.align = 64
    return store


@intrinsic
def _copy_line(typingctx: Any, dst: Any, src: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _copy_one_line(builder, args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _stream_line(typingctx: Any, dst: Any, src: Any) -> Any:
    """As `_copy_line`, past the caches."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        store = _copy_one_line(builder, args)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@njit(nogil=True)
def _ends(dst, src, nbytes):  # type: ignore[no-untyped-def]
    """Copy what lies before the first and after the last whole line of ``dst``; where these begin and end."""
    head = min(nbytes, -dst & 63)
    done = head + (nbytes - head) // 64 * 64
    copy_bytes(dst, src, head)
    copy_bytes(dst + done, src + done, nbytes - done)
    return head, done


@njit(nogil=True)
def copy_lines(dst, src, nbytes):  # type: ignore[no-untyped-def]
    """Copy what another core has written; the two must not overlap.

    Where the lines are far away this is twice as fast as the C library's copy, whose single instruction for
    long copies does not fetch as many of them at once.
    """
    begin, end = _ends(dst, src, nbytes)
    for at in range(begin, end, 64):
        _copy_line(dst + at, src + at)


@njit(nogil=True)
def copy_streaming(dst, src, nbytes):  # type: ignore[no-untyped-def]
    """Copy to memory that is not read again soon: it goes past the caches, and is not fetched before.

    Half the traffic of an ordinary copy is saved that way. The two must not overlap. Others see the copy
    after a `fence` only.
    """
    begin, end = _ends(dst, src, nbytes)
    for at in range(begin, end, 64):
        _stream_line(dst + at, src + at)
