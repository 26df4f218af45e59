"""The binding of CUDA's driver, and what is learnt of arrays on a GPU: on a stand-in for the driver."""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mpicoll.gpu import driver, memory
from mpicoll.gpu.driver import Driver, GpuError
from mpicoll.gpu.memory import NO_DEVICE, gpu_data, on_gpu

pytest.importorskip("numba_cuda", reason="numba-cuda[cu13] is not installed")

from tests import fake_cuda
from tests.fake_cuda import DlpackArray, FakeArray, FakeLibrary

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    found = fake_cuda.use(monkeypatch, FakeLibrary(ndevices=2))
    yield found
    found.close()


@pytest.fixture
def gpu(library: FakeLibrary) -> Driver:
    return driver.driver()


# -- the driver itself


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libno-such-driver.so.1")
    with pytest.raises(GpuError, match=r"no NVIDIA driver here: libno-such-driver\.so\.1"):
        Driver()


def test_errors_have_names(gpu: Driver, library: FakeLibrary) -> None:
    with pytest.raises(GpuError, match=r"^cuMemFree_v2: CUDA_ERROR_INVALID_VALUE \(1\)$"):
        gpu.free(4096)
    library.without.add("cuEventQuery")
    with pytest.raises(GpuError, match=r"^cuEventQuery: CUDA_ERROR_NOT_SUPPORTED \(801\)$"):
        gpu.is_done(gpu.make_event(0))
    with pytest.raises(GpuError, match=r"^cuDeviceGet: CUDA_ERROR_UNKNOWN \(101\)$"):
        gpu.name(2)


def test_an_error_without_a_name() -> None:
    nameless = SimpleNamespace(cuInit=lambda flags: 999, cuGetErrorName=lambda status, text: 1)
    with pytest.raises(GpuError, match=r"^cuInit: an unknown error \(999\)$"):
        Driver(nameless)


def test_devices(gpu: Driver) -> None:
    assert gpu.ndevices == 2
    assert (gpu.name(1), gpu.bus(1), gpu.total_memory(1)) == ("Fake GPU", "0000:01:00.0", 1 << 30)


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.use(monkeypatch, FakeLibrary(memory=1000))
    gpu = driver.driver()
    kept = gpu.allocate(400, 0)
    with pytest.raises(MemoryError, match=r"^GPU 0: expected room for 601 bytes, got 600 free of 1000$"):
        gpu.allocate(601, 0)
    gpu.free(kept)
    gpu.allocate(1000, 0)
    with pytest.raises(GpuError, match="cuMemAlloc_v2: CUDA_ERROR_INVALID_VALUE"):
        gpu.allocate(0, 0)


def contexts(library: FakeLibrary) -> list[int]:
    """Of this thread, the current one last."""
    return list(library._contexts())


def test_contexts_are_put_back(gpu: Driver, library: FakeLibrary) -> None:
    with gpu.on(0):
        first = contexts(library)
        with gpu.on(0):
            assert contexts(library) == first
        with gpu.on(1):
            assert contexts(library)[:-1] == first
            with gpu.on(0):
                assert contexts(library)[-1] == first[0]
        assert contexts(library) == first
    with pytest.raises(ZeroDivisionError), gpu.on(1):
        raise ZeroDivisionError
    assert contexts(library) == []
    assert library.calls.count("cuDevicePrimaryCtxRetain") == 2


def test_what_needs_a_context_finds_one(gpu: Driver, library: FakeLibrary) -> None:
    """Also in a thread that has none, as finalizers may; nothing of it stays."""
    host = np.zeros(8, np.uint8)
    left: list[Any] = []

    def work() -> None:
        address, event, stream = gpu.allocate(8, 1), gpu.make_event(1), gpu.make_stream(1)
        gpu.register(host.ctypes.data, 8)
        gpu.unregister(host.ctypes.data)
        gpu.wait_for(event)
        gpu.destroy_event(event)
        gpu.destroy_stream(stream)
        gpu.free(address)
        left.append((contexts(library), dict(library.allocated), dict(library.events), library.registered))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert left == [([], {}, {}, {})]


def test_places_in_memory(gpu: Driver) -> None:
    first, second = gpu.allocate(100, 0), gpu.allocate(50, 1)
    host = np.zeros(4)
    assert [gpu.device_of(at) for at in (first, first + 99, second, host.ctypes.data)] == [0, 0, 1, None]
    found = gpu.allocation_of(first + 70)
    assert found[:2] == (first, 100)
    assert found.number == gpu.allocation_of(first).number != gpu.allocation_of(second).number
    with pytest.raises(GpuError, match="cuMemGetAddressRange_v2"):
        gpu.allocation_of(host.ctypes.data)


def test_memory_at_the_same_place_has_another_number(gpu: Driver) -> None:
    numbers = set()
    for _ in range(3):
        address = gpu.allocate(1 << 20, 0)
        numbers.add(gpu.allocation_of(address).number)
        gpu.free(address)
    assert len(numbers) == 3


def test_copies_and_events_are_in_order(gpu: Driver, library: FakeLibrary) -> None:
    gate, source, target = threading.Event(), np.arange(4.0), np.zeros(4)
    with gpu.on(0):
        ours, theirs = gpu.make_stream(0), gpu.make_stream(0)
        event, never = gpu.make_event(0), gpu.make_event(0)
        array = FakeArray(np.zeros(4), stream=ours)
        assert gpu.is_done(never)
        library.stream(ours).put(gate.wait)
        gpu.copy(array.address, source.ctypes.data, source.nbytes, ours)
        gpu.record(event, ours)
        gpu.wait(theirs, event)
        gpu.wait(theirs, never)
        gpu.copy(target.ctypes.data, array.address, target.nbytes, theirs)
        assert not gpu.is_done(event)
        gpu.destroy_event(event)  # others go on waiting for what has been recorded
        gate.set()
        gpu.synchronise(theirs)
    np.testing.assert_array_equal(target, source)


def test_garbage_may_be_collected_by_the_thread_of_a_new_stream(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the stand-in: finalizers take its lock, which nobody may hold who waits for that thread."""
    run = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def collect(thread: threading.Thread) -> None:
        if thread.name == fake_cuda.STREAM_THREAD:
            with library._turn:
                pass
        run(thread)

    monkeypatch.setattr(threading.Thread, "_bootstrap_inner", collect)
    done = threading.Thread(target=lambda: library.stream(12345).synchronise(), daemon=True)
    done.start()
    done.join(10)
    assert not done.is_alive()


def test_nothing_is_copied_where_there_is_nothing_to_copy(gpu: Driver, library: FakeLibrary) -> None:
    gpu.copy(4096, 8192, 0, 0)
    gpu.copy(4096, 4096, 16, 0)
    assert "cuMemcpyAsync" not in library.calls


def test_an_event_is_what_was_recorded_last(gpu: Driver, library: FakeLibrary) -> None:
    gate = threading.Event()
    with gpu.on(0):
        event, slow, quick = gpu.make_event(0), gpu.make_stream(0), gpu.make_stream(0)
        library.stream(slow).put(gate.wait)
        gpu.record(event, quick)
        gpu.record(event, slow)
        gpu.synchronise(quick)
        assert not gpu.is_done(event)
        gpu.record(event, quick)
        gpu.wait_for(event)
    gate.set()


def test_handles(gpu: Driver) -> None:
    address, event, own = gpu.allocate(100, 0), gpu.make_event(0, shared=True), gpu.make_event(0)
    with gpu.on(0):
        assert len(gpu.export_memory(address)) == len(gpu.export_event(event)) == driver.HANDLE_SIZE
        assert gpu.export_memory(address) == gpu.export_memory(address)
        with pytest.raises(GpuError, match="cuIpcGetMemHandle"):
            gpu.export_memory(address + 8)
        with pytest.raises(GpuError, match="cuIpcGetEventHandle"):
            gpu.export_event(own)
        with pytest.raises(GpuError, match="cuIpcOpenMemHandle_v2"):  # CUDA lets only other processes
            gpu.open_memory(gpu.export_memory(address), 0)


# What the reference calls the types of arguments, as ctypes has them; pointers are any pointers.
C_TYPES: dict[str, Any] = {
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "size_t": ctypes.c_size_t,
    "CUdevice": ctypes.c_int,
    "CUresult": ctypes.c_int,
    "CUpointer_attribute": ctypes.c_int,
    "CUdeviceptr": ctypes.c_uint64,
    "CUstream": ctypes.c_void_p,
    "CUevent": ctypes.c_void_p,
    "CUcontext": ctypes.c_void_p,
    "CUipcMemHandle": driver._Handle,
    "CUipcEventHandle": driver._Handle,
}


def is_pointer(kind: Any) -> bool:
    return kind in (ctypes.c_void_p, ctypes.c_char_p) or issubclass(kind, ctypes._Pointer)


def test_functions_are_called_as_nvidia_declares_them() -> None:
    """By the names and types of its own bindings, which ship their declarations."""
    bindings = pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    declarations = Path(bindings.__path__[0]) / "_internal" / "driver.pxd"
    if not declarations.exists():
        pytest.skip(f"these bindings have no {declarations.name}")
    found = re.findall(r"cdef CUresult _(cu\w+)\((.*?)\) except", declarations.read_text())
    declared = {name: arguments.split(", ") for name, arguments in found}
    for name, types in driver._TYPES.items():
        newer = declared.get(f"{name}_v2", [])
        assert len(newer) != len(declared[name]), f"there is a newer {name}"
        given = [argument.rpartition(" ")[0].removeprefix("const ") for argument in declared[name]]
        assert len(given) == len(types), name
        for c_type, kind in zip(given, types, strict=True):
            right = is_pointer(kind) if c_type.endswith("*") else kind is C_TYPES[c_type]
            assert right, f"{name}: expected {c_type}, got {kind}"


def test_constants_are_nvidias() -> None:
    cuda = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    attributes, events = cuda.CUpointer_attribute, cuda.CUevent_flags
    assert driver.MEMORY_TYPE == attributes.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
    assert driver.BUFFER_ID == attributes.CU_POINTER_ATTRIBUTE_BUFFER_ID
    assert driver.DEVICE_ORDINAL == attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    assert driver.DEVICE_MEMORY == cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE
    assert driver.WITHOUT_TIMING == events.CU_EVENT_DISABLE_TIMING
    assert driver.BETWEEN_PROCESSES == events.CU_EVENT_INTERPROCESS
    assert driver.NON_BLOCKING == cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
    assert driver.FOR_ALL_CONTEXTS == cuda.CU_MEMHOSTREGISTER_PORTABLE
    assert driver.LAZY_PEER_ACCESS == cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    assert driver.HANDLE_SIZE == cuda.CU_IPC_HANDLE_SIZE
    assert driver.OUT_OF_MEMORY == cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    assert driver.NOT_READY == cuda.CUresult.CUDA_ERROR_NOT_READY
    assert driver.INVALID_VALUE == cuda.CUresult.CUDA_ERROR_INVALID_VALUE
    assert driver.INVALID_CONTEXT == cuda.CUresult.CUDA_ERROR_INVALID_CONTEXT
    assert memory.LEGACY_STREAM == cuda.CU_STREAM_LEGACY


# -- arrays


class Array:
    """Says of itself what is given; ``dtype`` is an attribute only if it is given."""

    def __init__(self, found: dict[str, Any], **attributes: Any) -> None:
        self.__cuda_array_interface__ = {"version": 3, **found}
        self.__dict__.update(attributes)


def interface(array: FakeArray, **changes: Any) -> Array:
    return Array({**array.__cuda_array_interface__, **changes})


def test_an_array_of_cupys_kind(gpu: Driver) -> None:
    array = FakeArray(np.zeros((3, 5), np.int16), device=1, stream=7, offset=64)
    found = gpu_data(array, "buf", writable=True)
    assert found.owner is array
    assert (found.dtype, found.nbytes, found.address) == (np.dtype(np.int16), 30, array.address)
    assert (found.device, found.stream, found.waits) == (1, 7, False)


@pytest.mark.parametrize("stream, expected", [(None, (0, True)), (1, (1, False)), (2, (2, False))])
def test_streams(gpu: Driver, stream: int | None, expected: tuple[int, bool]) -> None:
    array = FakeArray(np.zeros(3))
    for said in (interface(array, stream=stream), FakeArray(np.zeros(3), stream=stream)):
        found = gpu_data(said, "buf", writable=True)
        assert (found.stream, found.waits) == expected


def test_an_interface_of_an_older_version(gpu: Driver) -> None:
    """It has no stream, and need not have strides."""
    array = FakeArray(np.zeros(3, np.complex64))
    said = array.__cuda_array_interface__
    del said["stream"]
    found = gpu_data(Array({**said, "version": 2}), "buf", writable=True)
    assert (found.dtype, found.stream, found.waits) == (np.dtype(np.complex64), 0, True)


def test_a_dtype_that_the_interface_has_no_name_for(gpu: Driver) -> None:
    array = FakeArray(np.zeros(3, BFLOAT16))
    assert array.__cuda_array_interface__["typestr"] == "<V2"
    assert gpu_data(array, "buf", writable=True).dtype == BFLOAT16
    with pytest.raises(TypeError, match=r"^buf: expected a dtype that NumPy knows, got quark"):
        gpu_data(Array(array.__cuda_array_interface__, dtype="quark"), "buf", writable=True)


CONTIGUOUS = [
    ((), ()),
    ((4,), (8,)),
    ((2, 3), (24, 8)),
    ((2, 3), (8, 16)),
    ((1, 4), (999, 8)),
    ((4, 1), (8, 3)),
]
HOLES = [((4,), (16,)), ((4,), (-8,)), ((2, 3), (32, 8)), ((2, 3), (8, 8)), ((4,), (0,)), ((2, 2), (8, 24))]


@pytest.mark.parametrize("shape, strides", CONTIGUOUS)
def test_contiguous_in_any_order(gpu: Driver, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    array = FakeArray(np.zeros(64))
    found = gpu_data(interface(array, shape=shape, strides=strides), "buf", writable=True)
    assert found.nbytes == 8 * int(np.prod(shape))
    elements = tuple(stride // 8 for stride in strides)
    assert gpu_data(DlpackArray(array.part(0, shape), elements), "buf", True).nbytes == found.nbytes


@pytest.mark.parametrize("shape, strides", HOLES)
def test_not_contiguous(gpu: Driver, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    array = FakeArray(np.zeros(64))
    words = f"^buf: expected contiguous memory, got an array of shape {shape} with strides {strides}$"
    with pytest.raises(ValueError, match=re.escape(words)[2:-2]):
        gpu_data(interface(array, shape=shape, strides=strides), "buf", writable=True)
    elements = tuple(stride // 8 for stride in strides)
    with pytest.raises(ValueError, match="buf: expected contiguous memory"):
        gpu_data(DlpackArray(array.part(0, shape), elements), "buf", writable=True)


def test_no_elements(gpu: Driver) -> None:
    """Then address and strides say nothing."""
    array = FakeArray(np.zeros((3, 0)))
    for said in (array, interface(array, data=(12345, False), strides=(7, 7)), DlpackArray(array, (7, 7))):
        found = gpu_data(said, "buf", writable=True)
        assert (found.nbytes, found.device, found.address) == (0, NO_DEVICE, 0)


def test_memory_that_may_not_be_written(gpu: Driver) -> None:
    array = FakeArray(np.zeros(3))
    said = interface(array, data=(array.address, True))
    assert gpu_data(said, "sendbuf", writable=False).address == array.address
    with pytest.raises(ValueError, match=r"^recvbuf: expected memory that may be written, got a read-only"):
        gpu_data(said, "recvbuf", writable=True)


def test_memory_of_the_host_that_claims_to_be_a_gpus(gpu: Driver) -> None:
    host = np.zeros(3)
    said = interface(FakeArray(host), data=(host.ctypes.data, False))
    with pytest.raises(ValueError, match=r"^buf: expected memory of a GPU, got Array elsewhere$"):
        gpu_data(said, "buf", writable=True)


def test_what_is_on_a_gpu(gpu: Driver) -> None:
    array = FakeArray(np.zeros(3))
    assert all(map(on_gpu, (array, DlpackArray(array), DlpackArray(array, device_type=13))))
    host = DlpackArray(array, device_type=3)  # that CUDA has pinned
    assert not any(map(on_gpu, (np.zeros(3), bytearray(3), host, None, 3.5)))


# -- DLPack


@pytest.mark.parametrize("dtype", ["i1", "u2", "i8", "f2", "f4", "f8", "c8", "c16", "?", BFLOAT16], ids=str)
def test_dlpack(gpu: Driver, dtype: Any) -> None:
    array = FakeArray(np.zeros((2, 3), dtype), device=1, stream=9, offset=32)
    found = gpu_data(DlpackArray(array), "buf", writable=True)
    assert (found.dtype, found.nbytes) == (array.dtype, 6 * array.dtype.itemsize)
    assert (found.address, found.device, found.stream, found.waits) == (array.address, 1, 0, True)


def test_dlpack_memory_begins_at_an_offset(gpu: Driver) -> None:
    array = FakeArray(np.zeros(30))
    assert gpu_data(DlpackArray(array.part(0, 5), byte_offset=80), "buf", True).address == array.address + 80


def test_dlpack_memory_is_kept_and_given_back(gpu: Driver) -> None:
    said = DlpackArray(FakeArray(np.zeros(3)))
    found = gpu_data(said, "buf", writable=True)
    assert (said.asked, said.given_back) == ([1], 0)  # on the default stream
    del found
    assert said.given_back == 1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"lanes": 4}, "expected plain numbers, got DLPack's type 2, 32 bits"),
        ({"code": 3}, "expected plain numbers, got DLPack's type 3, 32 bits"),
        ({"code": 10, "bits": 8}, "expected plain numbers, got DLPack's type 10, 8 bits"),
        ({"code": 0, "bits": 4}, "expected plain numbers, got DLPack's type 0, 4 bits"),
        ({"code": 2, "bits": 8}, "expected plain numbers, got DLPack's type 2, 8 bits"),
    ],
)
def test_types_of_dlpack_that_numpy_does_not_have(gpu: Driver, changes: dict[str, int], words: str) -> None:
    with pytest.raises(TypeError, match=f"^buf: {words}"):
        gpu_data(DlpackArray(FakeArray(np.zeros(3, np.float32)), None, **changes), "buf", writable=True)


# -- PyTorch


class Tensor:
    """As much of PyTorch's as is asked for."""

    def __init__(self, array: FakeArray, dtype: str, strides: tuple[int, ...] | None = None) -> None:
        self._array, self.dtype, self.shape = array, f"torch.{dtype}", array.shape
        self._strides = strides or tuple(s // array.dtype.itemsize for s in array._view().strides)
        self.device = f"cuda:{array.device}"
        self.requires_grad = True

    def detach(self) -> Tensor:
        found = Tensor(self._array, self.dtype.removeprefix("torch."), self._strides)
        found.requires_grad = False
        return found

    def element_size(self) -> int:
        return int(self._array.dtype.itemsize)

    def stride(self) -> tuple[int, ...]:
        return self._strides

    def data_ptr(self) -> int:
        return self._array.address

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._array.device

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise RuntimeError("not of a tensor that requires a gradient")


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In place of PyTorch; its current stream of device n is 40 + n."""
    streams = {f"cuda:{n}": SimpleNamespace(cuda_stream=40 + n) for n in range(2)}
    found = SimpleNamespace(Tensor=Tensor, cuda=SimpleNamespace(current_stream=streams.__getitem__))
    monkeypatch.setitem(sys.modules, "torch", found)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "bool", "uint8", "complex64"])
def test_tensors(gpu: Driver, torch: SimpleNamespace, dtype: str) -> None:
    numpys = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    array = FakeArray(np.zeros((2, 3), numpys), device=1)
    found = gpu_data(Tensor(array, dtype), "buf", writable=True)
    assert (found.dtype, found.nbytes, found.address) == (numpys, 6 * numpys.itemsize, array.address)
    assert (found.device, found.stream, found.waits) == (1, 41, False)
    assert not found.owner.requires_grad


def test_tensors_that_will_not_do(gpu: Driver, torch: SimpleNamespace) -> None:
    array = FakeArray(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"^buf: expected contiguous memory, .* strides \(4, 12\)"):
        gpu_data(Tensor(array, "float32", (1, 3)), "buf", writable=True)
    with pytest.raises(TypeError, match=r"^buf: expected a dtype that NumPy knows, got quint8"):
        gpu_data(Tensor(array, "quint8"), "buf", writable=True)
    transposed = gpu_data(Tensor(array, "float32", (1, 2)), "buf", writable=True)
    assert transposed.nbytes == 24
