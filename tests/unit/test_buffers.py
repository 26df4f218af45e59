"""Every way of passing a buffer that mpi4py documents, and what is said of those that will not do."""

from __future__ import annotations

import array
import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

from mpicoll.buffers import check_same_type, parse, parse_blocks
from mpicoll.gpu import driver

DOUBLES = np.arange(12.0)
HERE = DOUBLES.ctypes.data


class DlpackOnly:
    """An array of another library: it has DLPack and no buffer protocol."""

    def __init__(self, values: np.ndarray[Any, Any], device: tuple[int, int] | None = None) -> None:
        self.values = values
        self.device = device or values.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


class OnGpu:
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (3,), "typestr": "<f8", "data": (4096, False), "version": 3}


@pytest.mark.parametrize(
    "spec, first, count",
    [
        (DOUBLES, 0, 12),
        ([DOUBLES, 5], 0, 5),
        ([DOUBLES, np.int32(5)], 0, 5),
        ([DOUBLES, MPI.DOUBLE], 0, 12),
        ([DOUBLES, "d"], 0, 12),
        ((DOUBLES, "d"), 0, 12),
        ([DOUBLES, 5, MPI.DOUBLE], 0, 5),
        ([DOUBLES, None, MPI.DOUBLE], 0, 12),
        ([DOUBLES, (5, 2)], 2, 5),
        ([DOUBLES, (5, 2), MPI.DOUBLE], 2, 5),
        ([DOUBLES, [5, 2], MPI.DOUBLE], 2, 5),
        ([DOUBLES, (None, 2), MPI.DOUBLE], 2, 10),
        ([DOUBLES, (5, None), "d"], 0, 5),
        ([DOUBLES, 5, 2, MPI.DOUBLE], 2, 5),
        ([DOUBLES, 0, 12, MPI.DOUBLE], 12, 0),
        ([DOUBLES, (None, 12), MPI.DOUBLE], 12, 0),
        (DOUBLES.reshape(3, 4), 0, 12),
        (DOUBLES.reshape(3, 4).T, 0, 12),
        (np.asfortranarray(DOUBLES.reshape(3, 4)).T[:1, :1], None, 1),
        (DOUBLES.data, 0, 12),
        (DOUBLES[3:7], 3, 4),
    ],
)
def test_one_message(spec: Any, first: int | None, count: int) -> None:
    message = parse(spec, "buf", writable=True)
    assert (message.count, message.dtype, message.size, message.extent) == (count, np.dtype("f8"), 8, 8)
    assert message.plain
    if first is not None:
        assert message.address == HERE + 8 * first


@pytest.mark.parametrize(
    "spec, count",
    [(DOUBLES, 4), ([DOUBLES, MPI.DOUBLE], 4), ([DOUBLES, 2], 2), ([DOUBLES, (None, 3), MPI.DOUBLE], 3)],
)
def test_one_message_of_a_block_for_each_rank(spec: Any, count: int) -> None:
    assert parse(spec, "buf", blocks=3).count == count


@pytest.mark.parametrize(
    "data, dtype, count",
    [
        (array.array("i", [1, 2, 3]), "i4", 3),
        (bytearray(b"abcd"), "u1", 4),
        (memoryview(bytearray(8)).cast("h"), "i2", 4),
        ((ctypes.c_float * 3)(), "f4", 3),
        (np.zeros(3, np.float16), "f2", 3),
        (np.zeros(3, ml_dtypes.bfloat16), ml_dtypes.bfloat16, 3),
        (np.zeros((), "c16"), "c16", 1),
        (np.zeros((2, 0), "f4"), "f4", 0),
        (np.zeros(3, "M8[s]"), "M8[s]", 3),
        (np.zeros(3, [("a", "i4"), ("b", "f8")]), [("a", "i4"), ("b", "f8")], 3),
        (np.ma.zeros(4), "f8", 4),
        (DlpackOnly(np.zeros(3, "f4")), "f4", 3),
    ],
)
def test_memory_of_any_kind(data: Any, dtype: Any, count: int) -> None:
    message = parse(data, "buf", writable=True)
    assert (message.dtype, message.count) == (np.dtype(dtype), count)


def test_the_memory_is_the_callers_own_whatever_holds_it() -> None:
    for data in (bytearray(6), array.array("b", bytes(6)), DlpackOnly(np.zeros(6, "i1"))):
        message = parse(data, "buf", writable=True)
        ctypes.memmove(message.address, b"abcdef", 6)
        seen = data.values if isinstance(data, DlpackOnly) else data
        assert bytes(seen) == b"abcdef"


def test_read_only_memory_may_be_sent() -> None:
    for data in (b"abc", np.broadcast_to(np.float64(1), ()), np.frombuffer(b"abc", "u1")):
        assert parse(data, "sendbuf").count == (1 if isinstance(data, np.ndarray) and not data.shape else 3)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool", "float16", "bfloat16", "complex64"])
def test_torch_tensors(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(5, dtype=getattr(torch, dtype))
    message = parse(tensor, "buf", writable=True)
    assert message.address == tensor.data_ptr()
    assert message.count == 5
    assert str(message.dtype) == dtype
    with pytest.raises(ValueError, match="buf: expected a contiguous tensor, got strides"):
        parse(torch.zeros(4, 6)[:, 1], "buf")
    gradient = torch.zeros(3, requires_grad=True)
    assert parse(gradient, "buf").address == gradient.data_ptr()


def test_nothing_and_bottom() -> None:
    assert parse(None, "buf").count == 0
    assert parse([None, 0, MPI.DOUBLE], "buf").count == 0
    message = parse([MPI.BOTTOM, 2, MPI.DOUBLE], "buf")
    assert (message.address, message.count) == (0, 2)


def test_derived_datatypes() -> None:
    every_other = MPI.DOUBLE.Create_vector(3, 1, 2).Commit()
    resized = MPI.DOUBLE.Create_resized(0, 32).Commit()
    try:
        message = parse([DOUBLES, 2, every_other], "buf")
        assert (message.count, message.dtype, message.size, message.extent) == (2, None, 24, 40)
        assert not message.plain
        assert parse([DOUBLES, resized], "buf").count == 3
        assert parse([DOUBLES[1:], (2, 1), resized], "buf").address == HERE + 8 + 32
        # The last element needs no room behind its own data.
        assert parse([DOUBLES[:9], 3, resized], "buf").count == 3
        with pytest.raises(
            ValueError, match=r"buf: expected room for 3 elements .*\(120 bytes\), got 96 bytes"
        ):
            parse([DOUBLES, 3, every_other], "buf")
        with pytest.raises(
            ValueError, match=r"buf: expected room for 1 elements .*\(40 bytes\), got 32 bytes"
        ):
            parse([DOUBLES[:4], 1, every_other], "buf")
    finally:
        every_other.Free()
        resized.Free()


@pytest.mark.parametrize(
    "spec, writable, error, words",
    [
        (DOUBLES[::2], False, ValueError, r"buf: expected contiguous memory, got .* strides \(16,\)"),
        (
            DOUBLES.reshape(3, 4)[:, 1],
            False,
            ValueError,
            r"buf: expected contiguous memory, got .*shape \(3,\)",
        ),
        (DOUBLES[::-1], False, ValueError, r"buf: expected contiguous memory"),
        (DOUBLES.data[::2], False, ValueError, r"buf: expected contiguous memory"),
        (b"abc", True, ValueError, "buf: expected memory that may be written, got a read-only buffer"),
        (np.frombuffer(b"abc", "u1"), True, ValueError, "buf: expected memory that may be written"),
        ([np.frombuffer(b"abc", "u1"), 3], True, ValueError, "buf: expected memory that may be written"),
        (
            np.array([1, "a"], object),
            False,
            TypeError,
            "buf: expected numbers or bytes, got .*Python objects",
        ),
        (
            [np.array([None]), MPI.BYTE],
            False,
            TypeError,
            "buf: expected numbers or bytes, got .*Python objects",
        ),
        (3.5, False, TypeError, "buf: expected an array or .*buffer protocol, .* got float"),
        (MPI.IN_PLACE, False, ValueError, "buf: expected data, got IN_PLACE, which is not allowed here"),
        ("text", False, TypeError, "buf: expected an array or .* got str"),
        (DlpackOnly(DOUBLES, (10, 0)), False, TypeError, "buf: expected host memory, got DlpackOnly on a"),
        ([DOUBLES], False, ValueError, r"buf: expected \[data, count, datatype\] with 2 to 4 items, got 1"),
        ([DOUBLES, 1, 2, 3, "d"], False, ValueError, "buf: expected .* with 2 to 4 items, got 5"),
        (
            [DOUBLES, 13],
            False,
            ValueError,
            r"buf: expected room for 13 .* float64 \(104 bytes\), got 96 bytes",
        ),
        ([DOUBLES, (5, 8)], False, ValueError, "buf: expected room for 13 elements of float64"),
        ([DOUBLES, (None, 13), "d"], False, ValueError, "buf: expected room for 13 elements of float64"),
        ([DOUBLES, 1 << 61], False, ValueError, "buf: expected room for 2305843009213693952 elements"),
        ([DOUBLES, -1], False, ValueError, "buf: expected a count and displacement of 0 or more, got -1"),
        (
            [DOUBLES, (1, -1)],
            False,
            ValueError,
            "buf: expected a count and displacement of 0 or more, got -1",
        ),
        ([DOUBLES, 2.5], False, TypeError, "buf: expected whole numbers as counts, got 2.5"),
        (
            [bytearray(10), MPI.DOUBLE],
            False,
            ValueError,
            "buf: expected whole elements of float64, got 10 bytes",
        ),
        (
            [None, 3, MPI.DOUBLE],
            False,
            ValueError,
            "buf: expected room for 3 elements of float64 .* got 0 bytes",
        ),
    ],
)
def test_what_will_not_do(spec: Any, writable: bool, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parse(spec, "buf", writable=writable)
    with pytest.raises(error):
        parse_blocks(spec, "buf", 3, writable=writable)


def test_memory_of_a_gpu_needs_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libno-such-driver.so.1")
    monkeypatch.setattr(driver, "driver", driver.Driver)
    with pytest.raises(driver.GpuError, match="no NVIDIA driver here: libno-such-driver"):
        parse(OnGpu(), "buf")
    with pytest.raises(driver.GpuError, match="no NVIDIA driver here: libno-such-driver"):
        parse_blocks([OnGpu(), MPI.DOUBLE], "buf", 3)


def test_a_pair_is_a_count_and_a_displacement() -> None:
    with pytest.raises(
        ValueError, match=r"buf: expected a count or \(count, displacement\), got \(1, 2, 3\)"
    ):
        parse([DOUBLES, (1, 2, 3)], "buf")


def test_data_that_cannot_be_cut_into_equal_blocks() -> None:
    with pytest.raises(ValueError, match="recvbuf: expected 5 equal blocks of float64, got 96 bytes"):
        parse(DOUBLES, "recvbuf", blocks=5)


@pytest.mark.parametrize(
    "spec, nranks, counts, displacements",
    [
        (DOUBLES, 5, [3, 3, 2, 2, 2], [0, 3, 6, 8, 10]),
        ([DOUBLES, MPI.DOUBLE], 3, [4, 4, 4], [0, 4, 8]),
        ([DOUBLES, [5, 0, 2]], 3, [5, 0, 2], [0, 5, 5]),
        ([DOUBLES, np.array([5, 0, 2])], 3, [5, 0, 2], [0, 5, 5]),
        ([DOUBLES, [5, 0, 2], "d"], 3, [5, 0, 2], [0, 5, 5]),
        ([DOUBLES, ([5, 0, 2], [7, 0, 1])], 3, [5, 0, 2], [7, 0, 1]),
        ([DOUBLES, ([5, 0, 2], None), "d"], 3, [5, 0, 2], [0, 5, 5]),
        ([DOUBLES, [5, 0, 2], [7, 0, 1], MPI.DOUBLE], 3, [5, 0, 2], [7, 0, 1]),
        ([DOUBLES, (None, [8, 4, 0])], 3, [4, 4, 4], [8, 4, 0]),
        ([DOUBLES, 2], 3, [2, 2, 2], [0, 2, 4]),
        ([DOUBLES, (2, 4)], 3, [2, 2, 2], [0, 4, 8]),
        ([DOUBLES, 2, 4, "d"], 3, [2, 2, 2], [0, 4, 8]),
        ([DOUBLES, (2, 4)], 2, [2, 2], [0, 4]),
        ([DOUBLES, [2, 4]], 2, [2, 4], [0, 2]),
        ([DOUBLES, ((2, 4), (5, 0))], 2, [2, 4], [5, 0]),
        ([DOUBLES, [0, 12], [99, 0], "d"], 2, [0, 12], [99, 0]),
    ],
)
def test_blocks(spec: Any, nranks: int, counts: list[int], displacements: list[int]) -> None:
    blocks = parse_blocks(spec, "buf", nranks)
    assert (blocks.counts, blocks.displacements) == (counts, displacements)
    assert blocks.message.address == HERE


@pytest.mark.parametrize(
    "spec, error, words",
    [
        ([DOUBLES, [1, 2]], ValueError, r"buf: expected 3 counts, one for each rank, got \[1, 2\]"),
        ([DOUBLES, [1, 2, 3, 4]], ValueError, "buf: expected 3 counts, one for each rank"),
        ([DOUBLES, [1, 2, 3], [0, 1], "d"], ValueError, r"buf: expected 3 displacements, .*got \[0, 1\]"),
        ([DOUBLES, [1, 2, -3]], ValueError, "buf: expected a count and displacement of 0 or more, got -3"),
        ([DOUBLES, ([1, 1, 1], [0, 1, -1])], ValueError, "buf: .* 0 or more, got -1"),
        ([DOUBLES, [1, 2, 2.5]], TypeError, "buf: expected whole numbers as counts, got 2.5"),
        ([DOUBLES, [1, None, 2]], ValueError, "buf: expected 3 counts, one for each rank"),
        ([DOUBLES, [5, 5, 5]], ValueError, r"buf: expected room for 15 elements .*\(120 bytes\), got 96"),
        ([DOUBLES, ([1, 1, 1], [0, 12, 1])], ValueError, "buf: expected room for 13 elements of float64"),
        ([bytearray(10), MPI.DOUBLE], ValueError, "buf: expected whole elements of float64, got 10 bytes"),
    ],
)
def test_blocks_that_will_not_do(spec: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parse_blocks(spec, "buf", 3)


def test_two_messages_of_one_call_hold_the_same_elements() -> None:
    doubles, ints = parse(DOUBLES, "sendbuf"), parse(np.zeros(3, "i8"), "recvbuf")
    raw = parse(bytearray(24), "recvbuf")
    check_same_type(doubles, doubles, arithmetic=True)
    check_same_type(doubles, raw)
    with pytest.raises(TypeError, match="recvbuf: expected elements of float64 as in sendbuf, got int64"):
        check_same_type(doubles, ints)
    with pytest.raises(TypeError, match="recvbuf: expected elements of float64 as in sendbuf, got uint8"):
        check_same_type(doubles, raw, arithmetic=True)
    with pytest.raises(TypeError, match="expected elements of float64"):
        check_same_type(doubles, parse(DOUBLES.astype(">f8"), "recvbuf"))
