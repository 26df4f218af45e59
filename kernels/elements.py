"""Element types and typed pointers: how kernels read and write one element of any dtype.

Numba on the CPU computes in integers, float32, float64 and complex. float16 and bfloat16 exist here only
in memory: `load` widens them to float32 and `store` rounds back to nearest even, so a kernel written
once as ``store(dst, i, load(a, i) + load(b, i))`` works for every dtype and vectorises.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype


class Half(types.Type):  # type: ignore[misc]  # numba is untyped
    """A 16-bit float in memory: ``float16`` or ``bfloat16``."""


@register_default(Half)
class HalfModel(models.PrimitiveModel):  # type: ignore[misc]  # numba is untyped
    def __init__(self, manager: Any, fe_type: Half) -> None:
        super().__init__(manager, fe_type, ir.IntType(16))


FLOAT16 = Half("mpicoll.float16")
BFLOAT16 = Half("mpicoll.bfloat16")
BFLOAT16_DTYPE = np.dtype(ml_dtypes.bfloat16)


def element_type(dtype: np.dtype[Any]) -> types.Type:
    """The Numba type that kernels use for elements of ``dtype``."""
    if dtype == np.float16:
        return FLOAT16
    if dtype == BFLOAT16_DTYPE:
        return BFLOAT16
    if dtype == np.bool_:
        return types.uint8  # one byte of 0 or 1, as in C
    return from_dtype(dtype)


def _widen(builder: ir.IRBuilder, bits: ir.Value, half: Half) -> ir.Value:
    """float32 from the 16 bits of ``half``."""
    if half == FLOAT16:
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
    # bfloat16 is the upper half of a float32.
    upper = builder.shl(builder.zext(bits, ir.IntType(32)), ir.IntType(32)(16))
    return builder.bitcast(upper, ir.FloatType())


def narrow(builder: ir.IRBuilder, value: ir.Value, half: Half) -> ir.Value:
    """The 16 bits of ``half`` nearest to a float32, ties to even."""
    if half == FLOAT16:
        return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
    word = ir.IntType(32)
    bits = builder.bitcast(value, word)
    odd = builder.and_(builder.lshr(bits, word(16)), word(1))
    rounded = builder.add(bits, builder.add(odd, word(0x7FFF)))
    # Rounding may carry a NaN's payload into the exponent: keep the NaN, made quiet, instead.
    quiet = builder.or_(bits, word(0x400000))
    kept = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(kept, word(16)), ir.IntType(16))


@intrinsic
def load(typingctx: Any, pointer: Any, index: Any) -> Any:
    """Element ``index`` at ``pointer``; 16-bit floats come as float32."""
    element = pointer.dtype
    value_type = types.float32 if isinstance(element, Half) else element

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        at = cgutils.gep(builder, args[0], args[1])
        if isinstance(element, Half):
            return _widen(builder, builder.load(at), element)
        return context.unpack_value(builder, element, at)

    return value_type(pointer, types.intp), codegen


@intrinsic
def store(typingctx: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Write ``value`` as element ``index`` at ``pointer``, converted to the element's type."""
    element = pointer.dtype
    value_type = types.float32 if isinstance(element, Half) else element

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        at = cgutils.gep(builder, args[0], args[1])
        if isinstance(element, Half):
            builder.store(narrow(builder, args[2], element), at)
        else:
            context.pack_value(builder, element, args[2], at)
        return context.get_dummy_value()

    # Asking for value_type makes Numba convert what the kernel computed, such as int8 + int8 -> int64.
    return types.void(pointer, types.intp, value_type), codegen


@intrinsic
def same_address(typingctx: Any, a: Any, b: Any) -> Any:
    """Whether two pointers are equal."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        word = ir.IntType(64)
        return builder.icmp_unsigned("==", builder.ptrtoint(args[0], word), builder.ptrtoint(args[1], word))

    return types.boolean(a, b), codegen
