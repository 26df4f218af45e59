"""Collectives on GPU memory: every one of them, by every transport, in every form of a call and of a buffer.

The GPU is that of `fake_cuda`, whose streams are threads. What is late is held up on purpose: a call that
forgets to wait for somebody's work finds what was there before.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from mpicoll.kernels.reduce import DTYPES, OPERATIONS, supports

import mpicoll
from mpicoll import watch
from mpicoll.faults import MismatchError, RankFailedError
from mpicoll.gpu import calls as gpu_calls
from mpicoll.gpu import driver, ipc, probe, staging
from mpicoll.gpu.driver import GpuError

from .examples import EXAMPLES, Array, Example, data, in_place_or_not, roots, total
from .test_operations import contribution

pytest.importorskip("numba_cuda", reason="numba-cuda[cu13] is not installed")

from mpicoll.kernels import reduce_cuda

from tests import fake_cuda
from tests.fake_cuda import DlpackArray, FakeArray, FakeLibrary, in_use

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
ODD = SIZE - 1  # the rank that is late, or does something else
METHODS = [method for method in EXAMPLES if method != "Barrier"]
KINDS = ("ipc", "hosts wait", "staged", "messages")  # in the second, others' events cannot be opened
COUNTS = sorted({0, 1, SIZE - 1, SIZE, SIZE + 1, 37})
MANY = 1003  # elements: many sections of SECTION bytes
SECTION = 512  # bytes
LARGE = 9001  # elements of 8 bytes: too many for one shot
LATE = 0.004  # seconds; far longer than it takes to order a collective
PROMPT = 5.0  # seconds within which all ranks know what is wrong
ALL = sorted(DTYPES, key=str)
HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

Comm = mpicoll.Communicator
several_ranks = pytest.mark.skipif(SIZE == 1, reason="needs another rank")
threads = pytest.mark.skipif(
    MPI.Query_thread() < MPI.THREAD_MULTIPLE, reason="nonblocking collectives need threads"
)


# -- GPUs, and communicators that use them


@contextmanager
def fake_gpu(**options: Any) -> Iterator[FakeLibrary]:
    """In place of CUDA, until everybody has done with it."""
    with pytest.MonkeyPatch.context() as patch:
        found = fake_cuda.use(patch, FakeLibrary(**options))
        patch.setattr(fake_cuda, "LONGEST_PAUSE", 0.0003)
        yield found
        for stream in list(found.streams.values()):
            stream.synchronise()
        wait_for_all()
        found.close()


@pytest.fixture(scope="module")
def shared_gpu() -> Iterator[FakeLibrary]:
    with fake_gpu() as found:
        yield found


@pytest.fixture
def gpu(shared_gpu: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    """That of most tests. Their arrays are given back in the end."""
    made: list[tuple[FakeArray, int]] = []
    allocate = FakeArray.__init__

    def noted(self: FakeArray, *args: Any, **more: Any) -> None:
        allocate(self, *args, **more)
        made.append((self, shared_gpu.allocated[self._base][2]))

    monkeypatch.setattr(FakeArray, "__init__", noted)
    yield shared_gpu
    for array, number in made:
        if array._base in shared_gpu.allocated and shared_gpu.allocated[array._base][2] == number:
            array.free()
    shared_gpu.sealed.clear()
    shared_gpu.without.clear()


@pytest.fixture(scope="module")
def comms(shared_gpu: FakeLibrary) -> Iterator[dict[str, Comm]]:
    """A communicator of each kind, that has met GPU memory."""
    with pytest.MonkeyPatch.context() as patch:  # MPI can send this GPU's memory
        patch.setattr(probe, "is_cuda_aware", lambda comm: (True, "it was tried"))
        made = {kind: communicator(kind) for kind in KINDS}
    assert made["messages"].gpu_transport.startswith("messages: MPI takes GPU memory, for it was tried")
    assert made["staged"].gpu_transport.startswith("staged through host memory, because the communicator")
    assert made["ipc"].gpu_transport.endswith("; streams wait for each other's events")
    assert made["hosts wait"].gpu_transport.endswith("; hosts wait for their streams")
    yield made
    for comm in made.values():
        comm.Free()


def communicator(kind: str, **more: Any) -> Comm:
    comm = Comm(WORLD, gpu_transport="ipc" if kind == "hosts wait" else kind, **more)
    if kind == "hosts wait":
        in_use().without.add("cuIpcGetEventHandle")
    check_sums(comm)
    in_use().without.clear()
    return comm


@pytest.fixture(params=KINDS)
def comm(request: pytest.FixtureRequest, comms: dict[str, Comm], gpu: FakeLibrary) -> Comm:
    return comms[request.param]


def check_sums(comm: Comm, count: int = 37) -> None:
    send, recv = FakeArray(data(RANK, count)), FakeArray(np.zeros(count, np.int64))
    comm.Allreduce(send, recv)
    np.testing.assert_array_equal(recv.get(), total(SIZE, count))
    send.free()
    recv.free()


def wait_for_all() -> None:
    """Until all ranks are here, with MPI's own means."""
    barrier = MPI.Intracomm(WORLD).Ibarrier()
    while not barrier.Test():
        time.sleep(0.0005)


def stream(number: int) -> int:
    """A stream of the caller's."""
    return 10 + number


def hold(stream: int | None, seconds: float = LATE) -> None:
    """What is put on the stream from now on is late."""
    in_use().stream(stream).put(lambda: time.sleep(seconds))


# -- examples on a GPU


@dataclass
class Moved:
    """An example whose arrays are on a GPU, on ``streams`` in turn, ``offset`` bytes into their memory."""

    example: Example
    streams: Sequence[int] = (1,)
    offset: int = 0
    arrays: list[tuple[Array, FakeArray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.args = tuple(self._moved(arg) for arg in self.example.args)

    def _moved(self, arg: Any) -> Any:
        if isinstance(arg, np.ndarray):
            return self._array(arg)
        if isinstance(arg, list) and isinstance(arg[0], np.ndarray):
            return [self._array(arg[0]), *arg[1:]]
        return arg

    def _array(self, host: Array) -> FakeArray:
        whole = host if host.base is None else host.base
        assert isinstance(whole, np.ndarray)
        found = next((array for known, array in self.arrays if known is whole), None)
        if found is None:
            on = self.streams[len(self.arrays) % len(self.streams)]
            found = FakeArray(whole, stream=on, offset=self.offset)
            self.arrays.append((whole, found))
        return found.part((host.ctypes.data - whole.ctypes.data) // host.itemsize, host.shape)

    def put(self, salt: int) -> None:
        self.example.fill(salt)
        for host, array in self.arrays:
            array.put(host)

    def check(self, salt: int, about: str) -> None:
        for host, array in self.arrays:
            host[...] = array.get()
        self.example.check(salt, about)

    def spoil(self) -> None:
        """Overwrite what is input only, which nobody needs any more."""
        target = self.example.target
        for host, array in self.arrays:
            if target is None or not np.shares_memory(host, target):
                array.put(np.full(host.shape, -3))

    def check_output(self, salt: int, about: str) -> None:
        target = self.example.target
        for host, array in self.arrays:
            if target is not None and np.shares_memory(host, target):
                host[...] = array.get()
        if target is not None:
            np.testing.assert_array_equal(target, self.example.expected(salt), about)

    def free(self) -> None:
        for _, array in self.arrays:
            array.free()


def moved(comm: Comm, method: str, count: int, root: int = 0, in_place: bool = False, **more: Any) -> Moved:
    return Moved(EXAMPLES[method](comm, count, root, in_place), **more)


def check(comm: Comm, method: str, count: int, salt: int, **more: Any) -> None:
    for root in roots(method, SIZE):
        for in_place in in_place_or_not(method):
            example = moved(comm, method, count, root, in_place, **more)
            example.put(salt)
            getattr(comm, method)(*example.args)
            example.check(salt, f"{method}, {count=}, {root=}, {in_place=}, {RANK=}, {comm.gpu_transport}")
            example.free()


@pytest.mark.algorithms
@pytest.mark.parametrize("method", METHODS)
def test_results(comm: Comm, method: str) -> None:
    for salt, count in enumerate(COUNTS):
        check(comm, method, count, salt, streams=(1, stream(salt)), offset=8 * (salt % 3 + RANK))


@pytest.mark.parametrize("kind", ["ipc", "staged"])
@pytest.mark.parametrize("method", METHODS)
def test_in_steps_and_sections(
    comms: dict[str, Comm], gpu: FakeLibrary, monkeypatch: pytest.MonkeyPatch, method: str, kind: str
) -> None:
    """In two steps where it could be one shot; in more sections than there are slots."""
    monkeypatch.setattr(ipc, "ONE_SHOT", 0)
    monkeypatch.setattr(staging, "SECTION", SECTION)
    check(comms[kind], method, MANY, salt=3)


@pytest.mark.parametrize("method", METHODS)
def test_large(comm: Comm, method: str) -> None:
    example = moved(comm, method, LARGE, SIZE - 1)
    for salt in range(2):
        example.put(salt)
        getattr(comm, method)(*example.args)
        example.check(salt, method)


@pytest.mark.algorithms
@pytest.mark.parametrize("kind", ["ipc", "staged"])
@pytest.mark.parametrize("method", METHODS)
def test_host_in_messages(gpu: FakeLibrary, message_comms: dict[str, Comm], method: str, kind: str) -> None:
    """Where the ranks share no memory but that of their GPUs."""
    for count in (0, 37, LARGE):
        check_once(message_comms[kind], method, count, count % 7)


@pytest.fixture(scope="module")
def message_comms(shared_gpu: FakeLibrary) -> Iterator[dict[str, Comm]]:
    made = {kind: communicator(kind, transport="messages") for kind in ("ipc", "staged")}
    yield made
    for comm in made.values():
        comm.Free()


def check_once(comm: Comm, method: str, count: int, salt: int) -> None:
    example = moved(comm, method, count, SIZE - 1)
    example.put(salt)
    getattr(comm, method)(*example.args)
    example.check(salt, f"{method}, {count=}, {RANK=}")


# -- nonblocking, persistent


def two(comm: Comm, method: str, in_place: bool) -> list[Moved]:
    """A small example, and one that is too large for one shot."""
    return [
        moved(comm, method, count, SIZE - 1, in_place, streams=(1, stream(7)), offset=8)
        for count in (37, LARGE)
    ]


@threads
@pytest.mark.parametrize("kind", ["ipc", "messages"])
@pytest.mark.parametrize("method", METHODS)
def test_nonblocking(comms: dict[str, Comm], gpu: FakeLibrary, method: str, kind: str) -> None:
    comm = comms[kind]
    for in_place in in_place_or_not(method):
        examples = two(comm, method, in_place)
        for salt in range(2):
            for example in examples:
                example.put(salt)
            requests = [getattr(comm, f"I{method.lower()}")(*example.args) for example in examples]
            check_once(comm, "Allreduce", 5, salt)  # others go on meanwhile
            for request in reversed(requests) if RANK % 2 else requests:
                request.Wait()
            for example in examples:
                example.check(salt, f"{method}, {in_place=}, {RANK=}")


@threads
def test_mpis_own_functions_wait_for_requests(comms: dict[str, Comm], gpu: FakeLibrary) -> None:
    comm, examples = comms["ipc"], two(comms["ipc"], "Allreduce", False)
    for example in examples:
        example.put(1)
    MPI.Request.Waitall([comm.Iallreduce(*example.args) for example in examples])
    for example in examples:
        example.check(1, "")


@pytest.mark.parametrize("method", METHODS)
def test_persistent(comm: Comm, method: str) -> None:
    """Two that have been started together are waited for in this order, and in the other."""
    for in_place in in_place_or_not(method):
        examples = two(comm, method, in_place)
        plans = [getattr(comm, f"{method}_init")(*example.args) for example in examples]
        for salt in range(3):
            for example in examples:
                example.put(salt)
            for plan in plans:
                plan.Start()
            for plan in reversed(plans) if salt % 2 else plans:
                plan.Wait()
            for example in examples:
                example.check(salt, f"{method}, {in_place=}, {salt=}, {RANK=}")
        for plan in plans:
            plan.Free()


@pytest.mark.parametrize("kind", ["ipc", "staged"])
def test_persistent_in_messages(message_comms: dict[str, Comm], gpu: FakeLibrary, kind: str) -> None:
    comm = message_comms[kind]
    examples = two(comm, "Allreduce", False)
    plans = [comm.Allreduce_init(*example.args) for example in examples]
    for salt in range(3):
        for example in examples:
            example.put(salt)
        for plan in plans:
            plan.Start()
        mpicoll.requests.PersistentCall.Waitall(plans[::-1] if RANK % 2 else plans)
        for example in examples:
            example.check(salt, "")


# -- operations


@pytest.mark.parametrize("kind", ["ipc", "staged", "messages"])
@pytest.mark.parametrize("op", [*OPERATIONS, "AVG"])
def test_every_operation_on_every_dtype(comms: dict[str, Comm], gpu: FakeLibrary, op: str, kind: str) -> None:
    """As on the host, bit by bit."""
    comm = comms[kind]
    plain = "SUM" if op == "AVG" else op
    given = mpicoll.AVG if op == "AVG" else getattr(MPI, op)
    for dtype in ALL:
        if not supports(plain, dtype) or (op == "AVG" and dtype.kind in "iu"):
            continue
        send = values(dtype, op, kind)
        wanted = np.zeros(send.size, dtype)
        comm.Allreduce(send, wanted, given)
        a, b = FakeArray(send), FakeArray(np.zeros(send.size, dtype))
        comm.Allreduce(a, b, given)
        comm.Allreduce(MPI.IN_PLACE, a, given)
        for found in (a, b):
            assert found.get().tobytes() == wanted.tobytes(), (op, dtype)
        a.free()
        b.free()


def values(dtype: np.dtype[Any], op: str, kind: str) -> Array:
    """Numbers whose sums in floats have to be rounded, but where messages add in an order of their own."""
    if dtype.kind in "fcV" and op in ("SUM", "AVG") and kind != "messages":
        return np.random.default_rng(RANK).standard_normal(101).astype(dtype)
    return contribution(dtype, RANK, "SUM" if op == "AVG" else op, 101)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("method", ["Reduce", "Reduce_scatter_block", "Reduce_scatter"])
def test_16_bit_floats_are_rounded_once(comm: Comm, method: str, dtype: np.dtype[Any]) -> None:
    send = (np.random.default_rng(RANK).integers(-255, 256, 3 * SIZE) / 64).astype(dtype)  # exact in float32
    for op in (MPI.SUM, mpicoll.AVG):
        wanted = np.zeros(3 if "scatter" in method else 3 * SIZE, dtype)
        getattr(comm, method)(send, wanted, op=op)
        a, b = FakeArray(send), FakeArray(np.zeros(wanted.size, dtype))
        getattr(comm, method)(a, b, op=op)
        assert b.get().tobytes() == wanted.tobytes()


def test_operations_that_only_mpi_knows(comm: Comm) -> None:
    x = FakeArray(np.ones(3))
    own = MPI.Op.Create(lambda a, b, t: None, commute=True)
    for method in ("Allreduce", "Reduce", "Reduce_scatter_block"):
        y = FakeArray(np.zeros(3))
        with pytest.raises(TypeError, match="op: expected a predefined operation on numbers for GPU memory"):
            getattr(comm, method)(FakeArray(np.ones(3 * SIZE)) if "scatter" in method else x, y, own)
    own.Free()
    with pytest.raises(TypeError, match="op: BAND"):
        comm.Allreduce(MPI.IN_PLACE, x, MPI.BAND)
    with pytest.raises(TypeError, match="op: AVG is defined for floating"):
        comm.Allreduce(MPI.IN_PLACE, FakeArray(np.ones(3, "i4")), mpicoll.AVG)
    check_sums(comm)


# -- the order of things


@pytest.fixture
def slow_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when this is called on, reductions on the odd rank take their time."""
    fold = reduce_cuda.fold

    def slowly(*args: Any) -> None:
        hold(args[-1], LATE / 2)
        fold(*args)

    return lambda: monkeypatch.setattr(reduce_cuda, "fold", slowly) if RANK == ODD else None


class Gate:
    """What the odd rank's GPU comes to only when all ranks have ordered what they want to."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def bar(self, *streams: int | None) -> None:
        if RANK == ODD:
            for each in streams:
                in_use().stream(each).put(self._open.wait)

    def open(self) -> None:
        wait_for_all()
        time.sleep(LATE / 2)  # for what does not wait to be done by now
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    monkeypatch.setattr(ipc, "MOST_OPEN", 1 << 20)  # hosts wait for the GPU before they close any
    made = Gate()
    yield made
    made._open.set()


@pytest.mark.parametrize("method", METHODS)
def test_late_inputs(comm: Comm, slow_kernels: Callable[[], None], method: str) -> None:
    """Inputs come late on one rank, outputs are late on another, and inputs are overwritten at once."""
    slow_kernels()
    for salt, count in enumerate((37, LARGE, 37)):
        example = moved(comm, method, count, salt % SIZE, streams=(stream(1), stream(2)))
        for _, array in example.arrays:
            array.put(np.full(array.shape, -5))
            hold(array.stream, LATE * ((RANK + salt) % 2))
        example.put(salt)
        getattr(comm, method)(*example.args)
        example.spoil()
        example.check_output(salt, f"{method}, {count=}, {RANK=}")


@pytest.mark.parametrize("method", METHODS)
def test_the_host_does_not_wait(comms: dict[str, Comm], gpu: FakeLibrary, gate: Gate, method: str) -> None:
    """Four calls are ordered before one rank's GPU begins; what comes after them waits for it."""
    comm = comms["ipc"]
    streams = stream(1), stream(2)
    if method != "Alltoallv":  # which is staged
        gate.bar(*streams)
    examples = [
        moved(comm, method, count, root, streams=streams) for count in (37, LARGE) for root in (0, ODD)
    ]
    for salt, example in enumerate(examples):
        example.put(salt)
        getattr(comm, method)(*example.args)
        example.spoil()
    gate.open()
    for salt, example in enumerate(examples):
        example.check_output(salt, f"{method}, {salt=}, {RANK=}")


@pytest.mark.parametrize("count", [37, LARGE])
@pytest.mark.parametrize("changing", [False, True])
def test_one_call_after_the_other(
    comms: dict[str, Comm],
    gpu: FakeLibrary,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    changing: bool,
) -> None:
    """On one stream, or each on another: nobody's slots and buffers are written while others read them."""
    comm, fold, numbers = comms["ipc"], reduce_cuda.fold, range(5)

    def late(*args: Any) -> None:
        gate.bar(args[-1])
        fold(*args)

    monkeypatch.setattr(reduce_cuda, "fold", late)
    streams = [stream(3 + number if changing else 3) for number in numbers]
    sends = [FakeArray(data(RANK, count, number), stream=on) for number, on in enumerate(streams)]
    recvs = [FakeArray(np.zeros(count, np.int64), stream=on) for on in streams]
    for send, recv in zip(sends, recvs, strict=True):
        comm.Allreduce(send, recv)
        send.put(np.full(count, -3))
    gate.open()
    for number, recv in enumerate(recvs):
        np.testing.assert_array_equal(recv.get(), total(SIZE, count, number), f"{number=} {RANK=}")


def test_memory_that_names_no_stream(comm: Comm, slow_kernels: Callable[[], None]) -> None:
    """Its owner would not wait: results are there when the call ends."""
    slow_kernels()
    for count in (37, LARGE):
        send = FakeArray(data(RANK, count))
        recv = FakeArray(np.zeros(count, np.int64), stream=None)
        comm.Allreduce(send, recv)
        np.testing.assert_array_equal(recv._view(), total(SIZE, count))
        plan = comm.Allreduce_init(send, recv)
        recv.put(np.zeros(count))
        recv.get()
        plan.Start()
        plan.Wait()
        np.testing.assert_array_equal(recv._view(), total(SIZE, count))


def test_dlpack(comm: Comm, slow_kernels: Callable[[], None]) -> None:
    slow_kernels()
    for count in (37, LARGE):
        zeros = np.zeros(count, np.int64)
        array, result = FakeArray(zeros, stream=stream(1)), FakeArray(zeros)
        hold(array.stream)
        array.put(data(RANK, count))
        send, recv = DlpackArray(array), DlpackArray(result)
        comm.Allreduce(send, recv)
        np.testing.assert_array_equal(result._view(), total(SIZE, count))
        assert send.asked == recv.asked == [1]  # the default stream


def test_a_persistent_call_that_nobody_needs_any_more(
    comms: dict[str, Comm], gpu: FakeLibrary, slow_kernels: Callable[[], None]
) -> None:
    """While the GPU is at it on other ranks."""
    comm = comms["ipc"]
    slow_kernels()
    for count in (37, LARGE):
        for number in range(3):
            send, recv = FakeArray(data(RANK, count, number)), FakeArray(np.zeros(count, np.int64))
            plan = comm.Allreduce_init(send, recv)
            plan.Start()
            plan.Wait()
            plan.Free()
            del plan
            np.testing.assert_array_equal(recv.get(), total(SIZE, count, number))


def test_a_communicator_that_nobody_needs_any_more(
    gpu: FakeLibrary, slow_kernels: Callable[[], None]
) -> None:
    """While the GPU is at it on other ranks."""
    slow_kernels()
    send, recv = FakeArray(data(RANK, 37)), FakeArray(np.zeros(37, np.int64))
    comm = Comm(WORLD, gpu_transport="ipc")
    comm.Allreduce(send, recv)
    comm.Free()
    del comm
    np.testing.assert_array_equal(recv.get(), total(SIZE, 37))


@threads
@several_ranks
@pytest.mark.deadline(20)
@pytest.mark.parametrize("kind", ["ipc", "staged"])
def test_the_first_call_may_be_a_nonblocking_one(gpu: FakeLibrary, kind: str) -> None:
    """Which waits for nobody: here one rank waits for a message that comes after another's call."""
    x, y = FakeArray(data(RANK, 37)), FakeArray(np.zeros(37, np.int64))
    with Comm(WORLD, gpu_transport=kind) as comm:
        if RANK == ODD:
            WORLD.recv(source=0)
        request = comm.Iallreduce(x, y)
        if RANK == 0:
            WORLD.send(None, ODD)
        request.Wait()
        np.testing.assert_array_equal(y.get(), total(SIZE, 37))


# -- memory


@pytest.mark.parametrize("kind", ["ipc", "staged"])
def test_memory_that_comes_and_goes(comms: dict[str, Comm], gpu: FakeLibrary, kind: str) -> None:
    """At other places and at the same, of the same size and another."""
    comm, places = comms[kind], []
    sizes = [LARGE, LARGE, 2 * LARGE, LARGE, 3 * LARGE, 3 * LARGE, LARGE, 2 * LARGE]
    kept = []
    for number, count in enumerate(sizes):
        send, recv = FakeArray(data(RANK, count, number)), FakeArray(np.zeros(count, np.int64))
        places.append(send.address)
        comm.Allreduce(send, recv)
        send.free()
        np.testing.assert_array_equal(recv.get(), total(SIZE, count, number), f"{number=}, {RANK=}")
        if number % 3 == RANK % 3:
            kept.append(recv)
        else:
            recv.free()
    assert len(set(places)) < len(places), "no memory came back to the same place"


def test_more_memory_than_may_stay_open(
    comms: dict[str, Comm], gpu: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one rank still reads stays open."""
    monkeypatch.setattr(ipc, "MOST_OPEN", 2 * SIZE)  # what one call needs
    comm = comms["ipc"]
    arrays = [FakeArray(np.zeros(LARGE, np.int64)) for _ in range(8)]
    for number in range(4):
        arrays[number].put(data(RANK, LARGE, number))
    hold(1, 5 * LATE * (RANK == ODD))
    for number in range(4):
        comm.Allreduce(arrays[number], arrays[4 + number])
    for number in range(4):
        wanted = total(SIZE, LARGE, number)
        np.testing.assert_array_equal(arrays[4 + number].get(), wanted, f"{number=}, {RANK=}")


@pytest.mark.parametrize("method", METHODS)
def test_some_memory_cannot_be_opened(comms: dict[str, Comm], gpu: FakeLibrary, method: str) -> None:
    """That of one rank: all go by way of the host."""
    for in_place in in_place_or_not(method):
        example = moved(comms["ipc"], method, LARGE, 0, in_place)
        if RANK == ODD and example.arrays:
            gpu.sealed.add(example.arrays[-1][1].address)
        for salt in range(2):
            example.put(salt)
            getattr(comms["ipc"], method)(*example.args)
            example.check(salt, f"{method}, {in_place=}, {RANK=}")
    gpu.sealed.clear()


def test_persistent_calls_on_memory_that_cannot_be_opened(comms: dict[str, Comm], gpu: FakeLibrary) -> None:
    comm = comms["ipc"]
    examples = [moved(comm, "Allreduce", count) for count in (LARGE, LARGE + 1)]
    gpu.sealed.update(array.address for example in examples for _, array in example.arrays)
    plans = [comm.Allreduce_init(*example.args) for example in examples]
    for salt in range(3):
        for example in examples:
            example.put(salt)
        for plan in plans:
            plan.Start()
        for plan in reversed(plans) if salt % 2 else plans:
            plan.Wait()
        for example in examples:
            example.check(salt, f"{salt=}, {RANK=}")
    gpu.sealed.clear()


def test_memory_that_the_driver_knows_little_of(comms: dict[str, Comm], gpu: FakeLibrary) -> None:
    """On one rank it does not say where the allocation begins."""
    if RANK == ODD:
        gpu.without.add("cuMemGetAddressRange_v2")
    check_sums(comms["ipc"], LARGE)
    gpu.without.clear()


def test_nothing_at_the_end_of_an_allocation(comm: Comm) -> None:
    """Counts of zero, at a place where no memory is any more."""
    counts = [3 * (rank != ODD) for rank in range(SIZE)]
    whole = FakeArray(np.zeros(sum(counts), np.int64))
    mine, at = counts[RANK], sum(counts[:RANK])
    given = np.zeros(sum(counts), np.int64)
    given[at : at + mine] = data(RANK, mine)
    whole.put(given)
    comm.Allgatherv(MPI.IN_PLACE, [whole, counts])
    wanted = np.concatenate([data(rank, n) for rank, n in enumerate(counts)])
    np.testing.assert_array_equal(whole.get(), wanted)
    x = FakeArray(data(RANK, 5))
    comm.Allreduce([x, (0, 5)], [FakeArray(np.ones(5, np.int64)), (0, 5)])
    part = FakeArray(np.zeros(3, np.int64))
    comm.Allgatherv([part, mine if mine else (0, 3)], [whole, counts])


@pytest.mark.parametrize("first", [0, 20_000])
def test_a_part_of_the_receive_buffer_is_sent(
    comm: Comm, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Both begin at one place, and have different sizes: so has the host memory, where it is staged."""
    made: list[Array] = []
    beyond = 8 * 20_000 * SIZE  # bytes that nobody is to touch

    def guarded(nbytes: int, dtype: Any) -> Array:
        made.append(np.full(nbytes + beyond, 77, np.uint8))
        return made[-1][:nbytes]

    counts = [first, *[20_000] * ODD]
    monkeypatch.setattr(staging, "pool", staging._Pool())
    monkeypatch.setattr(gpu_calls, "pool", staging.pool)
    monkeypatch.setattr(staging, "new_array", guarded)
    whole = FakeArray(np.zeros(sum(counts), np.int64))
    mine = Named(whole.part(0, first)) if RANK == 0 else FakeArray(np.zeros(counts[RANK], np.int64))
    mine.put(data(RANK, counts[RANK]))
    comm.Allgatherv(mine, [whole, counts])
    wanted = np.concatenate([data(rank, n) for rank, n in enumerate(counts)])
    np.testing.assert_array_equal(whole.get(), wanted)
    assert all((each[-beyond:] == 77).all() for each in made)
    assert made or not comm.gpu_transport.startswith("staged")


class Named(FakeArray):
    """An array without elements that has an address all the same, as views in some libraries have."""

    def __init__(self, array: FakeArray) -> None:
        self.__dict__.update(array.__dict__)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**super().__cuda_array_interface__, "data": (self.address, False)}


# -- forms of buffers

Call = Callable[[Comm, Any, Any], Any]
COUNT = 6


def same_as_on_the_host(comm: Comm, call: Call, send_size: int, recv_size: int) -> None:
    """``call`` with memory of both kinds: every byte of both buffers must agree."""
    send, recv = data(RANK, send_size, 1), np.full(recv_size, -1)
    arrays = FakeArray(send, offset=16), FakeArray(recv)
    call(comm, send, recv)
    call(comm, *arrays)
    for found, wanted in zip(arrays, (send, recv), strict=True):
        np.testing.assert_array_equal(found.get(), wanted)


SIMPLE: dict[str, Callable[[Any], Any]] = {
    "data, count": lambda x: [x, COUNT],
    "data, datatype": lambda x: [x, MPI.LONG],
    "data, code": lambda x: (x, "l"),
    "data, count, datatype": lambda x: [x, COUNT, MPI.LONG],
    "data, pair, datatype": lambda x: [x, (COUNT, 0), MPI.LONG],
    "none": lambda x: [x, None, "l"],
}


@pytest.mark.parametrize("form", SIMPLE)
def test_simple_forms(comm: Comm, form: str) -> None:
    make, n, whole = SIMPLE[form], COUNT, COUNT * SIZE
    calls: list[tuple[Call, int, int]] = [
        (lambda c, x, y: c.Allreduce(make(x), make(y)), n, n),
        (lambda c, x, y: c.Reduce(make(x), make(y), root=ODD), n, n),
        (lambda c, x, y: c.Bcast(make(x), ODD), n, 1),
        (lambda c, x, y: c.Allgather(make(x), make(y)), n, whole),
        (lambda c, x, y: c.Gather(make(x), make(y), ODD), n, whole),
        (lambda c, x, y: c.Scatter(make(x), make(y), ODD), whole, n),
        (lambda c, x, y: c.Alltoall(make(x), make(y)), whole, whole),
        (lambda c, x, y: c.Reduce_scatter_block(make(x), make(y)), whole, n),
        (lambda c, x, y: c.Reduce_scatter(x, make(y), [n] * SIZE), whole, n),
    ]
    for call in calls:
        same_as_on_the_host(comm, *call)


def test_displacements(comm: Comm) -> None:
    def shifted(x: Any) -> list[Any]:
        return [x, (COUNT, 2), MPI.LONG]

    n, whole = COUNT + 3, COUNT * SIZE + 3
    counts = [(rank * 2 + 1) % 4 for rank in range(SIZE)]
    gaps = [5 * (SIZE - 1 - rank) for rank in range(SIZE)]
    mine, room = counts[RANK], 5 * SIZE
    calls: list[tuple[Call, int, int]] = [
        (lambda c, x, y: c.Allreduce(shifted(x), shifted(y)), n, n),
        (lambda c, x, y: c.Bcast(shifted(x)), n, 1),
        (lambda c, x, y: c.Allgather(shifted(x), shifted(y)), n, whole),
        (lambda c, x, y: c.Scatter(shifted(x), shifted(y)), whole, n),
        (lambda c, x, y: c.Alltoall(shifted(x), shifted(y)), whole, whole),
        (lambda c, x, y: c.Reduce_scatter_block(shifted(x), shifted(y)), whole, n),
        (lambda c, x, y: c.Allgatherv([x, mine], [y, counts, gaps, MPI.LONG]), 4, room),
        (lambda c, x, y: c.Gatherv([x, mine], [y, (counts, gaps)], ODD), 4, room),
        (lambda c, x, y: c.Scatterv([x, counts, gaps, "l"], [y, mine], ODD), room, 4),
        (lambda c, x, y: c.Alltoallv([x, (2, 3), MPI.LONG], [y, (2, 3), MPI.LONG]), room, room),
        (lambda c, x, y: c.Allgatherv(MPI.IN_PLACE, [y, counts, gaps, MPI.LONG]), 1, room),
    ]
    for call in calls:
        same_as_on_the_host(comm, *call)


@pytest.fixture
def every_other() -> Iterator[MPI.Datatype]:
    """Three elements with as many holes, so that the next one begins where the last hole ends."""
    vector = MPI.LONG.Create_vector(3, 1, 2)
    made = vector.Create_resized(0, 6 * 8).Commit()
    vector.Free()
    yield made
    made.Free()


@pytest.mark.parametrize("kind", ["ipc", "staged"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_datatypes_with_holes(
    comms: dict[str, Comm], gpu: FakeLibrary, every_other: MPI.Datatype, everywhere: bool, kind: str
) -> None:
    """On all ranks, or on the odd one alone, which sends and receives as many bytes as the others."""
    comm = comms[kind]

    def six(x: Any) -> list[Any]:
        return [x, 2, every_other] if everywhere or RANK == ODD else [x, 6, MPI.LONG]

    size = 6 * 2 * SIZE
    calls: list[tuple[Call, int, int]] = [
        (lambda c, x, y: c.Allgather(six(x), six(y)), size, size),
        (lambda c, x, y: c.Gather(six(x), six(y), ODD), size, size),
        (lambda c, x, y: c.Scatter(six(x), six(y), 0), size, size),
        (lambda c, x, y: c.Alltoall(six(x), six(y)), size, size),
        (lambda c, x, y: c.Allgather(MPI.IN_PLACE, six(y)), 1, size),
    ]
    for call in calls:
        same_as_on_the_host(comm, *call)


def test_datatypes_with_holes_that_are_refused(comms: dict[str, Comm], every_other: MPI.Datatype) -> None:
    words = "buf: expected elements without holes between them in GPU memory"
    for comm in comms.values():
        with pytest.raises(TypeError, match=words):
            comm.Bcast([FakeArray(np.zeros(12)), 2, every_other])
    with pytest.raises(TypeError, match=f"send{words}"):
        comms["messages"].Allgather([FakeArray(np.zeros(12)), 2, every_other], here(6 * SIZE))


@threads
def test_nonblocking_calls_do_not_write_between_others_elements(
    comms: dict[str, Comm], gpu: FakeLibrary, every_other: MPI.Datatype
) -> None:
    """Two of them may be at one array at the same time."""
    whole = FakeArray(np.full(6 * SIZE, -1))
    with pytest.raises(TypeError, match="recvbuf: expected elements without holes between them"):
        comms["staged"].Iallgather(here(3), [whole, 1, every_other])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_bytes_of_any_kind(comm: Comm, dtype: np.dtype[Any]) -> None:
    given = np.arange(5).astype(dtype) + np.asarray(RANK, dtype)
    x, y = FakeArray(given.reshape(1, 5), offset=2), FakeArray(np.zeros((SIZE, 5), dtype), offset=6)
    comm.Allgather(x, y)
    assert y.get().tolist() == [(np.arange(5) + rank).tolist() for rank in range(SIZE)]


# -- what does not work


class Strange(FakeArray):
    """Says something else of itself."""

    def __init__(self, host: Any, **changes: Any) -> None:
        super().__init__(host)
        self.changes = changes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**super().__cuda_array_interface__, **self.changes}


def ones(count: int = 6 * SIZE, dtype: str = "i8") -> Any:
    return np.ones(count, dtype)


def here(count: int = 6 * SIZE, dtype: str = "i8", **more: Any) -> FakeArray:
    return FakeArray(ones(count, dtype), **more)


def read_only() -> Strange:
    array = Strange(ones())
    array.changes["data"] = (array.address, True)
    return array


Refused = tuple[Callable[[Comm], Any], type[Exception], str]
REFUSED: dict[str, Refused] = {
    "host and GPU": (
        lambda c: c.Allreduce(here(), ones()),
        TypeError,
        "recvbuf: expected GPU memory, as sendbuf is, got host memory",
    ),
    "GPU and host": (
        lambda c: c.Allgather(ones(1), here(SIZE)),
        TypeError,
        "sendbuf: expected GPU memory, as recvbuf is, got host memory",
    ),
    "read-only": (
        lambda c: c.Allreduce(here(), read_only()),
        ValueError,
        "recvbuf: expected memory that may be written, got a read-only buffer",
    ),
    "strides": (
        lambda c: c.Bcast(Strange(ones(6), shape=(3,), strides=(16,))),
        ValueError,
        r"buf: expected contiguous memory, got an array of shape \(3,\) with strides \(16,\)",
    ),
    "no memory of a GPU": (
        lambda c: c.Bcast(Strange(ones(6), data=(ones().ctypes.data, False))),
        ValueError,
        "buf: expected memory of a GPU, got Strange elsewhere",
    ),
    "two dtypes": (
        lambda c: c.Allreduce(here(), here(dtype="i4")),
        TypeError,
        "recvbuf: expected elements of int64 as in sendbuf, got int32",
    ),
    "too small": (
        lambda c: c.Allreduce(here(7), here(6)),
        ValueError,
        "recvbuf: expected 7 elements, as in sendbuf; got 6",
    ),
    "too many": (
        lambda c: c.Bcast([here(6), 7]),
        ValueError,
        "buf: expected room for 7 elements of int64",
    ),
    "an algorithm that is none": (
        lambda c: c.Allreduce(here(), here(), algorithm="magic"),
        ValueError,
        "algorithm: expected auto or one of",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(comm: Comm, case: str) -> None:
    call, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        call(comm)
    check_sums(comm)


def test_read_only_memory_may_be_sent(comm: Comm) -> None:
    result = here()
    comm.Allreduce(read_only(), result)
    np.testing.assert_array_equal(result.get(), SIZE * ones())


def test_two_gpus() -> None:
    with fake_gpu(ndevices=2), Comm(WORLD) as first, Comm(WORLD) as second:
        with pytest.raises(ValueError, match=r"recvbuf: expected memory of GPU 0, .* got memory of GPU 1"):
            first.Allreduce(here(), here(device=1))
        check_sums(first)
        for device, comm in enumerate((first, second)):
            result = here(device=device)
            comm.Allreduce(here(device=device), result)
            np.testing.assert_array_equal(result.get(), SIZE * ones())
        with pytest.raises(ValueError, match="expected memory of GPU 0, which this communicator has worked"):
            first.Allreduce(here(device=1), here(device=1))


@pytest.mark.parametrize("kind", ["ipc", "staged"])
def test_the_first_call_gives_one_rank_nothing(kind: str) -> None:
    """Then it works with the GPU that is the current one."""
    with fake_gpu(ndevices=2), Comm(WORLD, gpu_transport=kind) as comm, driver.driver().on(1):
        counts = [3 * (rank != ODD) for rank in range(SIZE)]
        part = here(counts[RANK], device=1)
        comm.Scatterv([here(sum(counts), device=1), counts] if RANK == 0 else None, part)
        result = here(device=1)
        comm.Allreduce(here(device=1), result)
        np.testing.assert_array_equal(result.get(), SIZE * ones())


# -- what a system does not allow


@dataclass
class Refusal:
    """``change`` makes a GPU to refuse something, and the transport is then ``text``."""

    change: Callable[[FakeLibrary], None]
    text: str


def without(name: str, everywhere: bool = False) -> Callable[[FakeLibrary], None]:
    return lambda gpu: gpu.without.add(name) if everywhere or RANK == ODD else None


def short(gpu: FakeLibrary) -> None:
    if RANK == ODD:
        gpu.memory = 100_000


def foreign(gpu: FakeLibrary) -> None:
    """What is opened is other memory."""
    open_memory = FakeLibrary.cuIpcOpenMemHandle_v2

    def opened(address: Any, handle: Any, flags: int) -> int:
        open_memory(gpu, address, handle, flags)
        gpu.opened[address._obj.value + 64] = gpu.opened[address._obj.value]
        address._obj.value += 64
        return 0

    if RANK == ODD:
        gpu.cuIpcOpenMemHandle_v2 = opened  # type: ignore[method-assign]


REFUSALS = {
    "memory everywhere": Refusal(
        without("cuIpcGetMemHandle", True),
        "staged .* rank 0 cannot share GPU memory: cuIpcGetMemHandle: CUDA_ERROR_NOT_SUPPORTED",
    ),
    "memory on one rank": Refusal(
        without("cuIpcGetMemHandle"),
        f"staged .* rank {ODD} cannot share GPU memory: cuIpcGetMemHandle: CUDA_ERROR_NOT_SUPPORTED",
    ),
    "others' memory": Refusal(
        without("cuIpcOpenMemHandle_v2"),
        f"staged .* rank {ODD} cannot open another's GPU memory: cuIpcOpenMemHandle_v2: CUDA_ERROR_NOT",
    ),
    "wrong memory": Refusal(foreign, f"staged .* rank {ODD} has read wrong data from GPU memory of rank 0"),
    "room": Refusal(
        short,
        f"staged .* rank {ODD} cannot share GPU memory: GPU 0: expected room for 131072 bytes, got "
        r"\d+ free of 100000",
    ),
    "events": Refusal(without("cuIpcGetEventHandle"), "ipc: .*; hosts wait for their streams"),
    "others' events": Refusal(without("cuIpcOpenEventHandle"), "ipc: .*; hosts wait for their streams"),
    "pinned memory": Refusal(without("cuMemHostRegister_v2"), "ipc: .*; streams wait"),
}


@several_ranks
@pytest.mark.parametrize("case", REFUSALS)
def test_what_a_system_refuses(case: str) -> None:
    """All ranks hear why, and go the same way."""
    refusal = REFUSALS[case]
    with fake_gpu() as gpu, Comm(WORLD) as comm, Comm(WORLD, gpu_transport="ipc") as strict:
        refusal.change(gpu)
        if refusal.text.startswith("staged"):
            words = refusal.text.removeprefix("staged .* ")
            with pytest.raises(RuntimeError, match=f"gpu_transport: expected .*, got ipc, but {words}"):
                check_sums(strict)
        check_sums(comm)
        assert len(set(WORLD.allgather(comm.gpu_transport))) == 1
        assert re.match(refusal.text, comm.gpu_transport), comm.gpu_transport
        gpu.memory = 1 << 30
        for method in ("Allreduce", "Alltoall"):
            check_once(comm, method, LARGE, 1)


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_calls, "has_kernels", lambda: RANK != ODD)
    with fake_gpu(), Comm(WORLD) as comm:
        check_sums(comm)
        assert f"because rank {ODD}: numba-cuda is not installed: pip install" in comm.gpu_transport


@several_ranks
def test_there_is_no_room_for_a_persistent_call() -> None:
    with fake_gpu() as gpu, Comm(WORLD) as comm:
        check_sums(comm)
        x, y = here(), here()
        if RANK == ODD:
            gpu.memory = 150_000
        words = rf"rank {ODD} .*: GPU 0: expected room for 131072 bytes, got \d+ free of 150000"
        with pytest.raises((GpuError, MemoryError), match=words):
            comm.Allreduce_init(x, y)
        gpu.memory = 1 << 30
        check_sums(comm)


# -- ranks that do not agree, or do not come


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, gpu: FakeLibrary) -> Iterator[Callable[..., Comm]]:
    """Makes communicators that ask soon: these tests have other things to do than to wait."""
    monkeypatch.setattr(watch, "FIRST_LOOK", 0.03)
    monkeypatch.setattr(watch, "SETTLED", 0.1)
    monkeypatch.setattr(watch, "DEADLOCKED", 0.3)
    made: list[Comm] = []

    def make(kind: str, transport: str, met: bool = True) -> Comm:
        made.append(Comm(WORLD, transport=transport, gpu_transport=kind, timeout=2 * PROMPT))
        if met:
            check_sums(made[-1])
        return made[-1]

    yield make
    wait_for_all()
    for comm in made:
        comm.Free()


both_transports = pytest.mark.parametrize("transport", ["auto", "messages"])
both_kinds = pytest.mark.parametrize("kind", ["ipc", "staged"])
Do = Callable[[Comm], Any]


def summing(count: int = 5, dtype: str = "f4", op: MPI.Op = MPI.SUM, make: Any = here) -> Do:
    return lambda comm: comm.Allreduce(make(count, dtype), make(count, dtype), op)


def casting(count: int = 5, root: int = 0) -> Do:
    return lambda comm: comm.Bcast(here(count), root)


def in_order(*calls: Do) -> Do:
    return lambda comm: [call(comm) for call in calls]


MISMATCHES: dict[str, tuple[Do, Do, str, str]] = {
    "count": (summing(5), summing(6), "Allreduce(float32[5] on a GPU, SUM)", "float32[6] on a GPU, SUM)"),
    "zero": (summing(5), summing(0), "Allreduce(float32[5] on a GPU, SUM)", "float32[0] on a GPU, SUM)"),
    "large": (summing(50_000), summing(50_001), "float32[50000] on a GPU, SUM)", "float32[50001] on a GPU"),
    "steps": (summing(5), summing(50_000), "Allreduce(float32[5] on a GPU", "float32[50000] on a GPU, SUM)"),
    "op": (summing(), summing(op=MPI.MAX), "(float32[5] on a GPU, SUM)", "(float32[5] on a GPU, MAX)"),
    "dtype": (summing(), summing(dtype="i4"), "(float32[5] on a GPU, SUM)", "(int32[5] on a GPU, SUM)"),
    "collective": (summing(), casting(), "float32[5] on a GPU, SUM)", "Bcast(40 bytes on a GPU, root=0)"),
    "root": (casting(), casting(root=1), "Bcast(40 bytes on a GPU, root=0)", "bytes on a GPU, root=1)"),
    "place": (summing(), summing(make=ones), "float32[5] on a GPU, SUM)", "Allreduce(float32[5], SUM)"),
}


@several_ranks
@pytest.mark.parametrize(
    "case, transport", [*[(case, "auto") for case in MISMATCHES], ("zero", "messages"), ("place", "messages")]
)
@both_kinds
def test_ranks_in_different_calls(
    impatient: Callable[..., Comm], case: str, kind: str, transport: str
) -> None:
    usual, other, ours, theirs = MISMATCHES[case]
    comm, begun = impatient(kind, transport), time.monotonic()
    with pytest.raises(MismatchError) as caught:
        in_order(other if RANK == ODD else usual, summing())(comm)  # or it is heard of now
    assert time.monotonic() - begun < PROMPT
    assert ours in str(caught.value)
    assert theirs in str(caught.value)


@several_ranks
@both_transports
@both_kinds
def test_host_memory_on_one_rank_in_the_first_call(
    impatient: Callable[..., Comm], kind: str, transport: str
) -> None:
    comm, begun = impatient(kind, transport, met=False), time.monotonic()
    with pytest.raises(MismatchError):
        in_order(summing(make=ones if RANK == ODD else here), summing())(comm)
    assert time.monotonic() - begun < PROMPT


@several_ranks
@both_transports
@both_kinds
@pytest.mark.parametrize("met", [True, False])
def test_a_rank_that_leaves(impatient: Callable[..., Comm], kind: str, transport: str, met: bool) -> None:
    comm, begun = impatient(kind, transport, met), time.monotonic()
    leaving = comm.Dup()
    if met:
        check_sums(leaving)
    wait_for_all()
    if RANK == ODD:
        with pytest.raises(ZeroDivisionError), leaving:
            raise ZeroDivisionError
    else:
        with pytest.raises(RankFailedError, match=f"rank {ODD} .*ZeroDivisionError"), leaving:
            # In messages not so much that MPI waits for the rank that has left, whoever else calls it later.
            summing(50_000 if transport == "auto" else 37)(leaving)
    assert time.monotonic() - begun < PROMPT
    check_sums(comm)


@several_ranks
@both_kinds
@pytest.mark.parametrize("function", ["cuMemcpyAsync", "cuEventRecord"])
def test_a_rank_whose_gpu_fails(
    impatient: Callable[..., Comm], gpu: FakeLibrary, kind: str, function: str
) -> None:
    comm, begun = impatient(kind, "auto"), time.monotonic()
    x, y = here(37), here(37)
    if RANK == ODD:
        gpu.without.add(function)
        with pytest.raises(GpuError, match=f"{function}: CUDA_ERROR_NOT_SUPPORTED"):
            comm.Allreduce(x, y)
        gpu.without.clear()
    else:
        with pytest.raises(RankFailedError, match=f"rank {ODD} has broken off a collective: GpuError"):
            comm.Allreduce(x, y)
    assert time.monotonic() - begun < PROMPT


def test_copies_of_a_communicator(comms: dict[str, Comm], gpu: FakeLibrary) -> None:
    with comms["staged"].Dup() as duplicate, comms["ipc"].Split(RANK % 2, -RANK) as part:
        check_sums(duplicate)
        assert duplicate.gpu_transport.startswith("staged")
        x, y = FakeArray(data(RANK, 37)), FakeArray(np.zeros(37, np.int64))
        part.Allreduce(x, y)
        wanted = np.sum([data(rank, 37) for rank in range(RANK % 2, SIZE, 2)], axis=0)
        np.testing.assert_array_equal(y.get(), wanted)
        assert part.gpu_transport.startswith("ipc")
