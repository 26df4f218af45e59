"""What `gpu.fusion` says of users' arrays, whatever library they come from."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mpicoll.gpu.fusion import GpuArray, as_gpu_array, stream_getter
from mpicoll.gpu.memory import DEFAULT_STREAM, GpuData
from mpicoll.gradients import Gradient
from mpicoll.grouped import address, follows

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


class Foreign:
    """What CuPy's and Numba's arrays say of themselves."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, **others: Any) -> None:
        self.shape = shape
        self.__cuda_array_interface__ = {"shape": shape, "strides": strides, **others}


class Tensor:
    """What PyTorch's do."""

    device = "cuda:1"

    def __init__(self, shape: tuple[int, ...], contiguous: bool) -> None:
        self.shape = shape
        self.is_contiguous: Callable[[], bool] = lambda: contiguous


def gpu_array(given: Any) -> GpuArray:
    nbytes = 4 * int(np.prod(given.shape))
    return as_gpu_array(given, GpuData(given, FLOAT32, nbytes, 4096, 0, 5, False))


@pytest.mark.parametrize(
    "given, fortran",
    [
        (Foreign((3, 4)), False),
        (Foreign((3, 4), (16, 4)), False),
        (Foreign((3, 4), (4, 12)), True),
        (Foreign((3, 1, 4), (16, 99, 4)), False),
        (Foreign((1, 4), (99, 4)), False),
        (Foreign((4,), (4,)), False),
        (Foreign(()), False),
        (Foreign((0, 4), (7, 7)), False),
        (Tensor((3, 4), True), False),
        (Tensor((3, 4), False), True),
    ],
)
def test_the_order_in_memory(given: Any, fortran: bool) -> None:
    array = gpu_array(given)
    assert (array.fortran, array.shape, array.size) == (fortran, given.shape, int(np.prod(given.shape)))
    order = " in Fortran's order" if fortran else ""
    assert str(Gradient("w", array.shape, FLOAT32, array)) == f"float32{list(given.shape)}{order} on a GPU"


def test_parts() -> None:
    array = gpu_array(Foreign((10,)))
    part = array[3:7]
    assert (part.address, part.shape, part.nbytes, part.stream) == (4096 + 12, (4,), 16, 5)
    assert (array[7:3].size, array[8:99].size) == (0, 2)
    assert address(part) == part.address
    assert follows(array[3:], array[:3])
    assert not follows(array[4:], array[:3])


def test_others_find_its_memory_and_stream() -> None:
    for dtype, typestr in ((FLOAT32, "<f4"), (BFLOAT16, "<V2")):
        array = GpuArray(None, 4096, dtype, (3,), 0, 7)
        interface = array.__cuda_array_interface__
        assert (interface["typestr"], interface["data"], interface["stream"]) == (typestr, (4096, False), 7)


@pytest.mark.parametrize("stream, found", [(7, 7), (1, 1), (None, DEFAULT_STREAM)])
def test_the_stream_of_an_interface(stream: int | None, found: int) -> None:
    given = Foreign((3,), stream=stream)
    current = stream_getter(given, "w")
    assert current() == found
    given.__cuda_array_interface__["stream"] = 9
    assert current() == 9


def test_the_stream_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's current one, of the tensor's device."""
    streams = {"cuda:1": 7}
    torch: Any = types.ModuleType("torch")
    torch.Tensor = Tensor
    torch.cuda = types.SimpleNamespace(
        current_stream=lambda device: types.SimpleNamespace(cuda_stream=streams[device])
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    current = stream_getter(Tensor((3,), True), "w")
    assert current() == 7
    streams["cuda:1"] = 8
    assert current() == 8
