"""The CUDA kernels without a GPU: run in Numba's simulator, and really compiled.

Numbers come from the simulator, in a process of its own, see `cuda_cases`. What the compiler makes of the
kernels is looked at here: wide accesses, no memory for what belongs into registers, no float64 by accident.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda[cu13] is not installed")
pytest.importorskip("cuda.bindings.nvjitlink", reason="CUDA's compiler is not installed: numba-cuda[cu13]")

from mpicoll.kernels import cast_cuda, device_cuda, packing_cuda, quantise_cuda, reduce_cuda, sparse_cuda

from tests.unit import ptx
from tests.unit.launches import SAID
from tests.unit.twins import COMPLEX, FLOATS, INTEGERS, Dtype

pytestmark = pytest.mark.skipif(
    device_cuda.SIMULATED, reason="NUMBA_ENABLE_CUDASIM=1 puts the simulator in the compiler's place"
)

HERE = Path(__file__).parent
CAPABILITIES = [(8, 0), (9, 0), (10, 0)]
REALS = FLOATS[2:]
FLOAT32, FLOAT64, INT8 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int8)
RAW = [np.dtype(code) for code in ("u1", "u2", "u4", "u8")]  # what is only copied
MOVES = [(kind, kind) for kind in RAW] + [(dst, src) for dst in FLOATS for src in FLOATS]
UPDATES = [(dtype, bucket) for dtype in REALS for bucket in FLOATS]
# Operation, dtype, targets, sources, and whether the result is scaled.
FOLDS = (
    [("SUM", dtype, 1, 2, False) for dtype in (*INTEGERS, *FLOATS)]
    + [("SUM", dtype, 2, 3, True) for dtype in FLOATS]
    + [("SUM", dtype, 8, 8, False) for dtype in (*FLOATS, INT8)]
    + [("SUM", FLOATS[0], 1, 1, False), ("MAX", FLOATS[1], 1, 64, True), ("BOR", INTEGERS[7], 9, 9, False)]
    + [("PROD", dtype, 1, 2, scaled) for dtype in COMPLEX for scaled in (False, True)]
    + [("PROD", np.dtype(code), 1, 2, False) for code in "bfd"]
    + [("MIN", dtype, 1, 2, False) for dtype in (*FLOATS[1:3], *INTEGERS[::7])]
    + [("MAX", dtype, 3, 2, False) for dtype in (FLOATS[0], FLOAT64, INTEGERS[4])]
    + [(op, dtype, 1, 2, False) for op, dtype in zip(("BAND", "BOR", "BXOR"), INTEGERS, strict=False)]
    + [
        (op, np.dtype(code), 1, 2, False)
        for op, code in (("LAND", "?"), ("LOR", "?"), ("LXOR", "?"), ("LAND", "i"))
    ]
)


@pytest.fixture(scope="module", autouse=True)
def simulation() -> Iterator[subprocess.Popen[str]]:
    """Runs while kernels are compiled here: either takes half a minute."""
    environment = {name: value for name, value in os.environ.items() if name != "MPICOLL_TEST_RECORD"}
    environment["NUMBA_ENABLE_CUDASIM"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "cuda_cases.py")]
    # NumPy warns of overflow and NaN in single numbers, which a GPU does not.
    command += ["-W", "ignore::RuntimeWarning"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=HERE.parents[1],
    ) as running:
        yield running
        running.kill()


def check_compiled(
    kernel: device_cuda.Kernel, dtypes: list[Dtype], capabilities: Sequence[ptx.Capability] = CAPABILITIES
) -> str:
    """The PTX of the last capability. ``dtypes`` are those of the numbers in memory."""
    for capability in capabilities:
        code = ptx.compiled(kernel, capability)
        names = ptx.instructions(code)
        assert ".local" not in code, "something lies in local memory"
        assert not [name for name in names if name.startswith("call")], "something is not inlined"
        if not {FLOAT64, COMPLEX[1]} & set(dtypes):
            assert not [name for name in names if name.endswith("f64")], "float64 by accident"
        used = ptx.resources(code, capability)
        assert (used.stack, used.spilled) == (0, 0), used
        assert used.registers * device_cuda.THREADS <= 65536 // 2, "two blocks do not fit on a multiprocessor"
    return code


def lanes_of(*dtypes: Dtype) -> int:
    """How many of the largest make an access of 16 bytes."""
    return 16 // max(dtype.itemsize for dtype in dtypes)


def check_widths(code: str, lanes: int, read: list[Dtype], written: list[Dtype]) -> None:
    assert {8 * lanes * dtype.itemsize for dtype in read} <= ptx.accesses(code, "ld")
    assert {8 * lanes * dtype.itemsize for dtype in written} <= ptx.accesses(code, "st")


@pytest.mark.parametrize("dst, src", MOVES, ids=str)
def test_moves(dst: Dtype, src: Dtype) -> None:
    code = check_compiled(packing_cuda.move_kernel(dst, src, True), [dst, src])
    check_widths(code, lanes_of(dst, src), [src], [dst])


def test_a_move_from_the_bucket() -> None:
    """It differs in what is written between slots only."""
    code = check_compiled(packing_cuda.move_kernel(FLOATS[2], FLOATS[1], False), FLOATS[1:3])
    check_widths(code, 4, [FLOATS[1]], [FLOATS[2]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_searches(dtype: Dtype) -> None:
    check_widths(check_compiled(packing_cuda.search_kernel(dtype), [dtype]), lanes_of(dtype), [dtype], [])


@pytest.mark.parametrize("dtype, bucket", UPDATES, ids=str)
def test_updates(dtype: Dtype, bucket: Dtype) -> None:
    code = check_compiled(packing_cuda.update_kernel(dtype, bucket), [dtype, bucket])
    check_widths(code, lanes_of(dtype, bucket), [dtype, bucket], [dtype])
    kind = "f64" if FLOAT64 in (dtype, bucket) else "f32"
    # A product without a rounding of its own is one that the assembler may fuse with a sum.
    products = {name for name in ptx.instructions(code) if re.match(r"(mul|fma).*\.f(32|64)$", name)}
    assert f"mul.rn.{kind}" in products
    assert products <= {"mul.rn.f32", "mul.rn.f64"}


@pytest.mark.parametrize("number", range(len(FOLDS)), ids=lambda i: "-".join(map(str, FOLDS[i])))
def test_folds(number: int) -> None:
    """Elements are accessed alone or 16 bytes at a time, in all sources and all targets."""
    op, dtype, ntargets, nsources, scaled = FOLDS[number]
    kernel = reduce_cuda.fold_kernel(op, dtype, ntargets, nsources, scaled)
    capability = CAPABILITIES[number % len(CAPABILITIES)]  # one of them: others change little
    code = check_compiled(kernel, [dtype, FLOAT64] if scaled else [dtype], [capability])
    widths = {8 * dtype.itemsize, 128}
    assert (ptx.accesses(code, "ld"), ptx.accesses(code, "st")) == (widths, widths)


def test_bfloat16_without_hardware_that_rounds() -> None:
    """Before compute capability 8.0."""
    kernel = reduce_cuda.fold_kernel.__wrapped__(
        "SUM", FLOATS[1], 1, 2, False
    )  # of its own, compiled for nothing else
    code = check_compiled(kernel, [FLOATS[1]], [(7, 5)])
    assert "bf16" not in code
    assert ptx.accesses(code, "st") == {16, 128}


@pytest.mark.parametrize("half", FLOATS[:2], ids=str)
def test_casts(half: Dtype) -> None:
    for dst, src in ((FLOAT32, half), (half, FLOAT32)):
        code = check_compiled(cast_cuda.cast_kernel(dst, src), [dst, src])
        check_widths(code, 4, [src], [dst])


QUANTISE: dict[str, tuple[Callable[[], device_cuda.Kernel], list[Dtype], list[Dtype]]] = {
    "quantise": (lambda: quantise_cuda.quantise_kernel(False), [FLOAT32], [INT8]),
    "quantise_feedback": (lambda: quantise_cuda.quantise_kernel(True), [FLOAT32], [FLOAT32, INT8]),
    "dequantise": (lambda: quantise_cuda.dequantise_kernel(False), [INT8], [FLOAT32]),
    "dequantise_add": (lambda: quantise_cuda.dequantise_kernel(True), [FLOAT32, INT8], [FLOAT32]),
    **{
        f"narrow {half}": (partial(quantise_cuda.narrow_kernel, half), [FLOAT32], [FLOAT32, half])
        for half in FLOATS[:2]
    },
    **{
        f"widen {half}": (partial(quantise_cuda.widen_kernel, half), [half], [FLOAT32]) for half in FLOATS[:2]
    },
}


@pytest.mark.parametrize("name", QUANTISE)
def test_quantise(name: str) -> None:
    kernel, read, written = QUANTISE[name]
    check_widths(check_compiled(kernel(), [*read, *written]), 4, read, written)


SPARSE: dict[str, tuple[Callable[[], device_cuda.Kernel], list[Dtype], list[Dtype]]] = {
    "tally first digits": (lambda: sparse_cuda.tally_kernel(True), [FLOAT32], [FLOAT32]),
    "tally other digits": (lambda: sparse_cuda.tally_kernel(False), [FLOAT32], []),
    "pick": (lambda: sparse_cuda.pick_kernel, [], []),
    "count": (lambda: sparse_cuda.count_kernel, [FLOAT32], []),
    "scan": (lambda: sparse_cuda.scan_kernel, [], []),
    "take": (lambda: sparse_cuda.take_kernel, [FLOAT32], []),
    "accumulate": (lambda: sparse_cuda.accumulate_kernel, [FLOAT32], [FLOAT32]),
    "clear": (lambda: sparse_cuda.clear_kernel, [], []),
    "take_at": (lambda: sparse_cuda.take_at_kernel, [], []),
    "add_at": (lambda: sparse_cuda.add_at_kernel, [], []),
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse(name: str) -> None:
    kernel, read, written = SPARSE[name]
    check_widths(check_compiled(kernel(), [FLOAT32]), 4, read, written)


def test_arguments_are_numbers() -> None:
    """Every array argument makes a launch slower."""
    kernels: list[Any] = [
        packing_cuda.move_kernel(FLOAT32, FLOAT32, True),
        packing_cuda.update_kernel(FLOAT32, FLOAT32),
        reduce_cuda.fold_kernel("SUM", FLOATS[2], 1, 2, False),
        cast_cuda.cast_kernel(FLOAT32, FLOATS[0]),
    ]
    for kernel in kernels:
        assert "array" not in str(kernel.signature)


def test_host_memory_is_refused() -> None:
    with pytest.raises(TypeError, match=r"tensors\[0\]: expected an array on a GPU, got ndarray"):
        packing_cuda.Packing([np.ones(4)], np.ones(4))
    with pytest.raises(TypeError, match="dst: expected an array on a GPU, got ndarray"):
        reduce_cuda.reduce("SUM", np.ones(4), np.ones(4))


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
def test_launches(tmp_path: Path) -> None:
    """What reaches the driver: the device of the current context, stream, blocks, threads and numbers."""
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "libcuda.c"], check=True, timeout=60)
    found = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.unit.launches"],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        cwd=HERE.parents[1],
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
    launched = [(0, stream, 3) for stream in (0, 1, 2, 0xABC0) for _ in range(2)]
    # On the second GPU; in a thread that has no context and gets the first; on the second again.
    launched += [(1, 0, 4), (0, 0, 5), (1, 0, 6)]
    wanted = [[*launch, device_cuda.THREADS, *SAID] for launch in launched]
    assert [[int(number) for number in line.split()] for line in found.stdout.splitlines()] == wanted


class OnDevice:
    """What another library's array says of itself."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, **others: Any) -> None:
        self.dtype = np.dtype(np.float32)
        self.__cuda_array_interface__ = {
            "data": (4096, False),
            "shape": shape,
            "strides": strides,
            "typestr": "<f4",
            "version": 3,
            **others,
        }


def test_memory_of_another_library() -> None:
    assert device_cuda.memory_of(OnDevice((3, 4)), "x") == (4096, np.float32, (3, 4), 12)
    assert device_cuda.memory_of(OnDevice((3, 4), (4, 12)), "x").size == 12  # in Fortran's order
    assert device_cuda.memory_of(OnDevice((1, 4), (999, 4)), "x").size == 4
    assert device_cuda.memory_of(OnDevice((0, 4), (999, 999)), "x").size == 0
    assert device_cuda.memory_of(OnDevice(()), "x").size == 1
    with pytest.raises(ValueError, match=r"x: expected contiguous memory, got shape \(3, 4\)"):
        device_cuda.memory_of(OnDevice((3, 4), (32, 4)), "x")


class Stream:
    """A stream as other libraries have it."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class Protocol:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 7


def test_streams() -> None:
    array = OnDevice((3,))
    for stream in (7, Stream(ptr=7), Stream(cuda_stream=7), Protocol()):
        assert device_cuda.stream_of(stream, array) == 7
    assert device_cuda.stream_of(0, OnDevice((3,), stream=5)) == 0
    assert device_cuda.stream_of(None, array) == 0
    assert device_cuda.stream_of(None, OnDevice((3,), stream=5)) == 5
    assert device_cuda.stream_of(None, OnDevice((3,), stream=None)) == 0
    with pytest.raises(TypeError, match="stream: expected a CUDA stream or its handle, got str"):
        device_cuda.stream_of("7", array)


def test_every_kernel_in_the_simulator(simulation: subprocess.Popen[str]) -> None:
    """The last test, for it waits for all others' time."""
    report, _ = simulation.communicate(timeout=600)
    assert simulation.returncode == 0, report
    assert re.search(r"[1-9]\d* passed", report), report
