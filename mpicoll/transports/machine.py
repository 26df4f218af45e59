"""What compiled transports do that Python has no words for: atomics, the clock, the processor's hints.

Raw memory and calls of C functions are in `mpicoll.kernels.memory`.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from mpicoll.kernels import memory
from mpicoll.kernels.caching import CachedCode
from mpicoll.kernels.memory import call, int64s

_HERE = Path(__file__).parent
_CALLERS = [_HERE.parent / name for name in ("schedule.py", "fastcalls.py", "fastmessages.py", "progress.py")]
CACHED = CachedCode([*_HERE.glob("*.py"), *_CALLERS, Path(memory.__file__)])

CLOCK_MONOTONIC = 1  # of Linux

_X86 = platform.machine() == "x86_64"
_WORD = ir.IntType(64)


@intrinsic
def read_int32(typingctx: Any, address: Any) -> Any:
    """The int at ``address``, read anew each time."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.load(builder.inttoptr(args[0], ir.IntType(32).as_pointer()))

    return types.int32(types.int64), codegen


@njit(nogil=True)
def read_clock(clock_gettime, timespec):  # type: ignore[no-untyped-def]
    """Nanoseconds on a clock that only goes forward. The addresses of the C function and of its result."""
    call(clock_gettime, (types.int32(CLOCK_MONOTONIC), timespec))
    time = int64s(timespec)
    return time[0] * 1_000_000_000 + time[1]


@intrinsic
def load_acquire(typingctx: Any, address: Any) -> Any:
    """The int64 at ``address``; what its writer wrote before it is there for all later reads."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.load_atomic(builder.inttoptr(args[0], _WORD.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store_release(typingctx: Any, address: Any, value: Any) -> Any:
    """Write an int64; who reads it with `load_acquire` sees all that was written before it."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.store_atomic(args[1], builder.inttoptr(args[0], _WORD.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def try_claim(typingctx: Any, address: Any) -> Any:
    """Make the int64 at ``address`` 1 if it is 0; whether it was: so one thread at a time owns something."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = builder.inttoptr(args[0], _WORD.as_pointer())
        outcome = builder.cmpxchg(pointer, _WORD(0), _WORD(1), "acq_rel", "acquire")
        return builder.extract_value(outcome, 1)

    return types.boolean(types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the processor that this is a loop that waits, where it has a word for that."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if _X86:
            nothing = ir.FunctionType(ir.VoidType(), ())
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), nothing), ())
        return context.get_dummy_value()

    return types.void(), codegen


def address_of(function: Any) -> int:
    """Where a function of a C library begins."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def aligned_zeros(words: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Zeros that begin a cache line: what different threads write must not share one."""
    raw = np.zeros(words + 8, np.int64)
    skipped = -raw.ctypes.data // 8 % 8
    return raw[skipped : skipped + words]
