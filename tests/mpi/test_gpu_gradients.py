"""Gradients on a GPU that is a stand-in: its work is late, and what does not wait for it finds garbage."""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll import GradientSync
from mpicoll.compression import Int8
from mpicoll.faults import RankFailedError
from mpicoll.gpu import driver, fusion
from mpicoll.gpu.driver import GpuError

from .examples import Array, data, total

pytest.importorskip("numba_cuda", reason="numba-cuda[cu13] is not installed")

from tests import fake_cuda
from tests.fake_cuda import FakeArray, FakeLibrary

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
LAST = SIZE - 1
FLOATS = [np.dtype(kind) for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]
HUGE = 1 << 40
STREAM = 1  # where the program works
LOOSE = 2000  # bytes from which on gradients are not packed, here
# Numbers, nothing, odd sizes, several axes, and one that is reduced by itself.
SHAPES: list[tuple[int, ...]] = [(1,), (3,), (0,), (5, 7), (2, 3, 4), (2001,), (2, 0), (257,), (17, 3)]
SMALL: list[tuple[int, ...]] = [(3,), (1,), (5, 2), (0,), (9,)]
BUCKETS = (1, 300, HUGE)  # bytes: a bucket for each gradient, a few together, one for all
TRANSPORTS = ("ipc", "staged")
PROMPT = 5.0  # seconds within which a rank that waits in vain says so

several_ranks = pytest.mark.skipif(SIZE == 1, reason="needs another rank")


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Iterator[FakeLibrary]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, "LOOSE", LOOSE)
        library = fake_cuda.use(patch, FakeLibrary(ndevices=2))
        yield library
        communicator.cache_clear()
        gc.collect()
        WORLD.Barrier()
        library.close()


def look_functions_up_again() -> None:
    """The driver asks its library once for each function, which then takes note."""
    driver.driver()._functions.clear()


@cache
def communicator(transport: str) -> mpicoll.Communicator:
    """One for all tests that leave it as it was."""
    return mpicoll.Communicator(WORLD, gpu_transport=transport)


def given(rank: int, number: int, shape: Sequence[int], step: int) -> Array:
    """What ``rank`` puts into a gradient: from -6 to 6, so that sums are exact in every dtype."""
    index = np.arange(math.prod(shape))
    return ((index * 5 + rank * 3 + number * 7 + step * 11) % 13 - 6).reshape(shape)


def summed(number: int, shape: Sequence[int], step: int) -> Array:
    return np.asarray(sum(given(rank, number, shape, step) for rank in range(SIZE)))


_made: list[FakeArray] = []  # by this test


@pytest.fixture(autouse=True)
def memory(gpu: FakeLibrary) -> Iterator[None]:
    """What a test has allocated is given back."""
    yield
    WORLD.Barrier()
    while _made:
        _made.pop().free()


def gpu_array(values: Any, **named: Any) -> FakeArray:
    _made.append(FakeArray(values, **named))
    return _made[-1]


def joined(
    shapes: Sequence[tuple[int, ...]], dtype: Any = np.float32, stream: int = STREAM, gap: int = 0
) -> list[FakeArray]:
    """Gradients that are parts of one array, ``gap`` elements apart."""
    counts = [math.prod(shape) + gap for shape in shapes]
    whole = gpu_array(np.full(sum(counts) + gap, 77, dtype), stream=stream)
    begins = np.cumsum([gap, *counts]).tolist()
    return [whole.part(begin, shape) for begin, shape in zip(begins, shapes, strict=False)]


def arrays(
    shapes: Sequence[tuple[int, ...]], dtype: Any = np.float32, stream: int = STREAM
) -> list[FakeArray]:
    """Gradients that do not touch each other, at any address."""
    return joined(shapes, dtype, stream, gap=1)


LAYOUTS: dict[str, Callable[..., list[FakeArray]]] = {"arrays": arrays, "joined": joined}


def fill(gradients: Sequence[FakeArray], step: int) -> None:
    for i, gradient in enumerate(gradients):
        gradient.put(given(RANK, i, gradient.shape, step))


def check(
    gradients: Sequence[FakeArray], step: int, factor: float = 1 / SIZE, tolerance: float = 1e-6
) -> None:
    for i, gradient in enumerate(gradients):
        about = f"gradient {i}, {gradient.shape} of {gradient.dtype}, {step=}, {RANK=}"
        wanted, found = summed(i, gradient.shape, step) * factor, gradient.get()
        np.testing.assert_allclose(found.astype(float), wanted, rtol=tolerance, atol=0, err_msg=about)


def complete(sync: GradientSync, step: int, tolerance: float = 1e-6) -> None:
    """A whole step."""
    fill(sync.gradients, step)
    sync.ready_all()
    assert sync.wait()
    check(sync.gradients, step, tolerance=tolerance)


def check_like_host(transport: str, layout: str, dtypes: Sequence[np.dtype[Any]], **settings: Any) -> None:
    """Two steps on the GPU give what they give on the host, to the bit unless sums are multiplied."""
    wire = settings.get("wire_dtype")
    scaled = settings.get("average", True) or settings.get("scale", 1) != 1
    gradients = [LAYOUTS[layout]([shape], dtype)[0] for shape, dtype in zip(SHAPES, dtypes, strict=True)]
    if layout == "joined":
        gradients = joined(SHAPES, dtypes[0])
    likes = [np.empty(gradient.shape, gradient.dtype) for gradient in gradients]
    comm = communicator(transport)
    with GradientSync(comm, gradients, **settings) as sync, GradientSync(comm, likes, **settings) as on_host:
        assert sync.gradients == gradients
        for step in range(2):
            fill(gradients, step)
            for i, like in enumerate(likes):
                like[...] = given(RANK, i, like.shape, step).astype(like.dtype)
            for each in (sync, on_host):
                each.ready_all()
                assert each.wait()
            for i, gradient in enumerate(gradients):
                about = (
                    f"{transport}, gradient {i}, {gradient.shape} of {gradient.dtype}, {settings}, {step=}"
                )
                kinds = [gradient.dtype] if wire is None else [gradient.dtype, np.dtype(wire)]
                error = max(float(ml_dtypes.finfo(kind).eps) for kind in kinds) if scaled else 0
                found = gradient.get().astype(float)
                np.testing.assert_allclose(found, likes[i].astype(float), rtol=error, err_msg=about)


WIRES = [(dtype, None) for dtype in FLOATS] + [
    (FLOATS[a], FLOATS[b]) for a, b in ((0, 1), (1, 2), (2, 0), (2, 1), (3, 2))
]

# -- what comes out


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_buckets_of_every_size(transport: str, layout: str) -> None:
    for bucket_bytes in BUCKETS:
        with GradientSync(
            communicator(transport), LAYOUTS[layout](SHAPES), bucket_bytes=bucket_bytes
        ) as sync:
            for step in range(3):
                complete(sync, step)


@pytest.mark.parametrize("dtype, wire", WIRES, ids=str)
def test_the_same_as_on_the_host(dtype: np.dtype[Any], wire: np.dtype[Any] | None) -> None:
    ways = [(True, 3.0), (False, 1.0), (False, 0.25), (True, 1.0)]
    places = itertools.product(TRANSPORTS, LAYOUTS)
    for (average, scale), (transport, layout) in zip(ways, places, strict=True):
        settings: dict[str, Any] = {"average": average, "scale": scale, "wire_dtype": wire}
        check_like_host(transport, layout, [dtype] * len(SHAPES), bucket_bytes=300, **settings)


def test_several_dtypes_at_once() -> None:
    dtypes = [FLOATS[i % 4] for i in range(len(SHAPES))]
    for bucket_bytes in BUCKETS:
        check_like_host("ipc", "arrays", dtypes, bucket_bytes=bucket_bytes)


@pytest.mark.parametrize("nonfinite", ["pass", "raise"])
def test_integers_are_summed(nonfinite: str) -> None:
    for dtype in (np.int8, np.int64):
        dtypes = [np.dtype(dtype)] * len(SHAPES)
        check_like_host("ipc", "arrays", dtypes, average=False, nonfinite=nonfinite, bucket_bytes=300)


@pytest.mark.parametrize("shapes", [[(0,)], [(0,), (2, 0)], [(1,)]], ids=str)
def test_next_to_nothing(shapes: list[tuple[int, ...]]) -> None:
    with GradientSync(communicator("ipc"), arrays(shapes), nonfinite="raise") as sync:
        for step in range(2):
            complete(sync, step)


def test_one_rank_alone() -> None:
    with mpicoll.Communicator(MPI.COMM_SELF) as alone:
        for dtype, wire, scale in itertools.product(FLOATS, (None, np.float16), (1.0, 0.5)):
            gradients = arrays(SHAPES, dtype)
            with GradientSync(alone, gradients, scale=scale, wire_dtype=wire, bucket_bytes=300) as sync:
                fill(gradients, 0)
                sync.ready_all()
                assert sync.wait()
                for i, gradient in enumerate(gradients):
                    wanted = scale * given(RANK, i, gradient.shape, 0)
                    np.testing.assert_array_equal(gradient.get().astype(float), wanted)


def test_what_lies_together_or_is_large_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []

    class Packing(fake_cuda.Packing):
        def __init__(self, tensors: Sequence[Any], bucket: Any) -> None:
            packed.append(len(tensors))
            super().__init__(tensors, bucket)

    monkeypatch.setattr("mpicoll.kernels.packing_cuda.Packing", Packing)
    large, full = (LOOSE // 4,), [shape for shape in SMALL if 0 not in shape]
    for gradients, wire, counts in (
        (joined(full), None, []),
        (joined(full), np.float16, [4]),
        (arrays([large, (4,), large, (LOOSE // 4 - 1,)]), None, [2]),
        (arrays([large]), None, []),
    ):
        packed.clear()
        with GradientSync(communicator("ipc"), gradients, wire_dtype=wire, bucket_bytes=HUGE) as sync:
            assert packed == counts
            complete(sync, 0, tolerance=1e-3 if wire else 1e-6)


def test_bucket_bytes_are_measured(gpu: FakeLibrary) -> None:
    with GradientSync(communicator("ipc"), arrays([(150_000,)] * 4)) as sync:
        assert all(memory.size < 1 << 24 for memory, _, _ in gpu.allocated.values())  # what that took is free
        assert len(set(WORLD.allgather(tuple(sync.buckets)))) == 1
        complete(sync, 0)


# -- the order of things


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nobody_waits_between_steps(transport: str) -> None:
    """The program puts the next step on its stream at once, and what it does with the results of this one."""
    gradients = arrays(SHAPES)
    results = [arrays(SHAPES) for _ in range(6)]
    with GradientSync(communicator(transport), gradients, bucket_bytes=300) as sync:
        for step, copies in enumerate(results):
            for i in reversed(range(len(SHAPES))):
                gradients[i].put(given(RANK, i, SHAPES[i], step))
                sync.ready(i)
            assert sync.wait()
            with driver.driver().on(0):
                for gradient, copy in zip(gradients, copies, strict=True):
                    driver.driver().copy(copy.address, gradient.address, gradient.size * 4, STREAM)
        for step, copies in enumerate(results):
            check(copies, step)


def test_gradients_of_several_streams() -> None:
    """Each waits for its own, and goes on when the gradients are reduced."""
    gradients = [arrays([shape], stream=[STREAM, 7, 8][i % 3])[0] for i, shape in enumerate(SHAPES)]
    with GradientSync(communicator("ipc"), gradients, bucket_bytes=300) as sync:
        for step in range(6):
            complete(sync, step)
            if step == 2:  # as where the program chooses another stream
                for gradient in gradients:
                    gradient.get()
                    gradient.stream = 9


@several_ranks
def test_the_host_does_not_wait_for_the_gpu(gpu: FakeLibrary) -> None:
    with GradientSync(communicator("ipc"), arrays(SHAPES), bucket_bytes=300) as sync:
        complete(sync, 0)
        complete(sync, 1)  # the order has been learnt, and buckets made anew
        fill(sync.gradients, 2)
        gpu.calls.clear()
        look_functions_up_again()
        sync.ready_all()
        assert sync.wait()
        called = set(gpu.calls)
        assert "cuEventRecord" in called
        assert not {name for name in called if "ynchronize" in name or "Alloc" in name or "Create" in name}
        check(sync.gradients, 2)


def ready_in(sync: GradientSync, order: Sequence[int], own: random.Random) -> None:
    """Mark gradients ready, now and then after a pause that differs between ranks."""
    for i in order:
        if own.random() < 0.3:
            time.sleep(own.uniform(0, 3e-4))
        sync.ready(i)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_gradients_may_come_in_another_order_on_each_rank(transport: str) -> None:
    own = random.Random(RANK)
    for bucket_bytes in BUCKETS[:2]:
        with GradientSync(communicator(transport), arrays(SHAPES), bucket_bytes=bucket_bytes) as sync:
            for step in range(5):
                fill(sync.gradients, step)
                ready_in(sync, own.sample(range(len(SHAPES)), len(SHAPES)), own)
                assert sync.wait()
                check(sync.gradients, step)


def test_the_order_is_learnt_from_rank_0() -> None:
    seen = [3, 0, 7, 1, 2, 6, 5, 4]
    with GradientSync(communicator("ipc"), arrays([(5,)] * 8), bucket_bytes=40) as sync:
        fill(sync.gradients, 0)
        ready_in(sync, seen if RANK == 0 else range(8), random.Random(RANK))
        sync.wait()
        check(sync.gradients, 0)
        assert [bucket.members for bucket in sync.buckets] == [(0, 3), (1, 7), (2, 6), (4, 5)]
        for step in range(1, 4):
            fill(sync.gradients, step)
            ready_in(sync, seen, random.Random(f"{RANK} {step}"))
            sync.wait()
            check(sync.gradients, step)
            assert sync.late == []


def test_late_gradients_are_named() -> None:
    gradients = dict(zip(("first", "second", "third"), arrays([(3,), (4,), (5,)]), strict=True))
    with GradientSync(communicator("ipc"), gradients, bucket_bytes=1) as sync:
        for order, late in (([2, 1, 0], []), ([0, 1, 2], ["third"]), ([2, 0, 1], ["second"])):
            for i in order:
                sync.ready(sync.names[i])
            sync.wait()
            assert sync.late == late


@several_ranks
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_gradients_are_reduced_before_the_program_waits(transport: str) -> None:
    with GradientSync(communicator(transport), arrays([(5000,), (300,)]), bucket_bytes=1) as sync:
        for step in range(3):
            fill(sync.gradients, step)
            sync.ready(sync.buckets[0].members[0])
            first, until = sync.gradients[1], time.monotonic() + 20
            wanted = summed(1, first.shape, step) / SIZE
            while not np.allclose(first.get(), wanted) and time.monotonic() < until:
                time.sleep(0.001)
            np.testing.assert_allclose(first.get(), wanted, rtol=1e-6)
            np.testing.assert_array_equal(sync.gradients[0].get(), given(RANK, 0, (5000,), step))
            sync.ready_all()
            sync.wait()
            check(sync.gradients, step)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_other_collectives_between_gradients(transport: str) -> None:
    comm, common = communicator(transport), random.Random(0)
    sums, device = np.zeros(700, np.int64), FakeArray(np.zeros(700, np.int64))
    with GradientSync(comm, arrays(SHAPES), bucket_bytes=300) as sync:
        for step in range(8):
            fill(sync.gradients, step)
            for i in reversed(range(len(SHAPES))):
                sync.ready(i)
                what = common.randrange(3)
                if what == 0:
                    comm.Allreduce(data(RANK, 700, i), sums)
                    np.testing.assert_array_equal(sums, total(SIZE, 700, i))
                elif what == 1:
                    device.put(data(RANK, 700, i))
                    comm.Allreduce(MPI.IN_PLACE, device)
                    np.testing.assert_array_equal(device.get(), total(SIZE, 700, i))
            assert sync.wait()
            check(sync.gradients, step)


@pytest.mark.parametrize("overlap", [True, False])
def test_two_at_once(overlap: bool) -> None:
    """One on the GPU, and one on the host."""
    comm = communicator("ipc")
    with (
        GradientSync(comm, arrays(SMALL), bucket_bytes=30, overlap=overlap) as first,
        GradientSync(comm, SMALL, bucket_bytes=30, overlap=overlap) as second,
    ):
        for step in range(8):
            fill(first.gradients, step)
            for i, gradient in enumerate(second.gradients):
                gradient[...] = given(RANK, i, gradient.shape, step)
            for i in reversed(range(len(SMALL))):
                first.ready(i)
                second.ready(i)
            for sync in (first, second)[:: -1 if step % 2 else 1]:
                assert sync.wait()
            check(first.gradients, step)
            for i, gradient in enumerate(second.gradients):
                np.testing.assert_allclose(gradient, summed(i, gradient.shape, step) / SIZE, rtol=1e-6)


def test_no_sync_accumulates() -> None:
    with GradientSync(communicator("ipc"), arrays(SMALL), bucket_bytes=30) as sync:
        for step in range(3):
            fill(sync.gradients, step)
            with sync.no_sync():
                sync.ready_all()
                assert not sync.wait()
            for i, gradient in enumerate(sync.gradients):
                own = given(RANK, i, gradient.shape, step)
                np.testing.assert_array_equal(gradient.get(), own)
                gradient.put(3 * own)
            sync.ready_all()
            assert sync.wait()
            check(sync.gradients, step, 3 / SIZE)


# -- what is wrong with gradients


def test_gradients_that_are_not_ready() -> None:
    gradients = dict(zip("abcde", arrays(SMALL), strict=True))
    with GradientSync(communicator("ipc"), gradients, bucket_bytes=30) as sync:
        for step in range(3):
            fill(sync.gradients, step)
            for name in "edca" if RANK == LAST else "edcba":
                sync.ready(name)
            with pytest.raises(RuntimeError, match=f"never marked ready in this step: 'b' on rank {LAST};"):
                sync.wait()
            complete(sync, step)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_unused_gradients_count_as_zeros(transport: str) -> None:
    gradients = arrays(SMALL)
    for i, gradient in enumerate(gradients):
        gradient.get()  # what has made it is done on the stream that it had
        gradient.stream = 20 + i  # which nothing else is on
    with GradientSync(communicator(transport), gradients, unused="zero", bucket_bytes=30) as sync:
        for step in range(4):
            fill(sync.gradients, step)
            unused = step if RANK == LAST else -1
            for i in reversed(range(len(SMALL))):
                if i != unused:
                    sync.ready(i)
            assert sync.wait()
            for i, gradient in enumerate(sync.gradients):
                wanted = summed(i, gradient.shape, step)
                if i == step:
                    wanted = wanted - given(LAST, i, gradient.shape, step)
                np.testing.assert_allclose(gradient.get(), wanted / SIZE, rtol=1e-6, err_msg=f"{i=} {step=}")


@pytest.mark.parametrize("transport, bucket_bytes", [("ipc", 1), ("staged", 300), ("ipc", HUGE)])
def test_nonfinite_gradients(transport: str, bucket_bytes: int) -> None:
    """They are named, be they packed or reduced where they lie; and forgotten in the next step."""
    comm = communicator(transport)
    with (
        GradientSync(comm, arrays(SHAPES), nonfinite="raise", bucket_bytes=bucket_bytes) as raising,
        GradientSync(comm, arrays(SHAPES), nonfinite="skip", bucket_bytes=bucket_bytes) as skipping,
    ):
        for number, value in ((1, np.nan), (5, np.inf), (7, -np.inf)):
            for sync in (raising, skipping):
                complete(sync, number)
                fill(sync.gradients, 1)
                if RANK == LAST:
                    bad = given(RANK, number, SHAPES[number], 1).astype(np.float32)
                    bad[-1] = value
                    sync.gradients[number].put(bad)
                sync.ready_all()
            with pytest.raises(FloatingPointError, match=f"in gradients: '{number}' on rank {LAST}$"):
                raising.wait()
            assert not skipping.wait()


@several_ranks
@pytest.mark.filterwarnings("ignore:overflow")
def test_sums_that_overflow() -> None:
    gradients = arrays([(3,), (LOOSE // 2,)], np.float16)
    with GradientSync(
        communicator("ipc"), gradients, average=False, nonfinite="raise", bucket_bytes=1
    ) as sync:
        for number in range(2):
            fill(gradients, 0)
            gradients[number].put(np.full(gradients[number].shape, 60_000))
            sync.ready_all()
            with pytest.raises(FloatingPointError, match=f"have sums that are not: '{number}'$"):
                sync.wait()


# -- bad input


class Strided(FakeArray):
    """Every other element."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**super().__cuda_array_interface__, "strides": (2 * self.dtype.itemsize,)}


Bad = tuple[Callable[[], Any], type[Exception], str]
BAD: dict[str, Bad] = {
    "host": (
        lambda: {"a": gpu_array(np.zeros(3)), "b": np.zeros(3)},
        TypeError,
        "gradient 'b': expected memory of GPU 0 as gradient 'a', got memory of the host",
    ),
    "gpu": (
        lambda: {"a": np.zeros(3), "b": gpu_array(np.zeros(3))},
        TypeError,
        "gradient 'b': expected memory of the host as gradient 'a', got memory of GPU 0",
    ),
    "another gpu": (
        lambda: {
            "a": gpu_array(np.zeros(0)),
            "b": gpu_array(np.zeros(3)),
            "c": gpu_array(np.zeros(3), device=1),
        },
        ValueError,
        "gradient 'c': expected memory of GPU 0 as gradient 'b', got memory of GPU 1",
    ),
    "shapes": (
        lambda: [gpu_array(np.zeros(3)), (3,)],
        TypeError,
        "gradients: expected either arrays or shapes",
    ),
    "strided": (lambda: {"w": Strided(np.zeros(6))}, ValueError, "gradient 'w': expected contiguous memory"),
    "twice the same": (
        lambda: [gpu_array(np.zeros(3))] * 2,
        ValueError,
        "gradient '1': expected memory of its own",
    ),
    "dates": (lambda: {"w": gpu_array(np.zeros(3, "M8[s]"))}, TypeError, "gradient 'w': "),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_gradients(what: str) -> None:
    make, kind, text = BAD[what]
    comm = communicator("ipc")
    with pytest.raises(kind, match=text):
        GradientSync(comm, make())
    with GradientSync(comm, arrays(SMALL)) as sync:
        complete(sync, 0)


def test_compression_is_for_the_host() -> None:
    with pytest.raises(TypeError, match=r"compression: expected none for gradients on a GPU, got Int8"):
        GradientSync(communicator("ipc"), arrays(SMALL), compression=Int8())


@several_ranks
def test_ranks_that_differ_are_all_told() -> None:
    own: list[Any] = [np.zeros(3, np.float32)] if RANK == LAST else arrays([(3,)])
    text = rf"gradient '0': expected float32\[3\] on a GPU as on rank 0; rank {LAST} has float32\[3\]"
    with pytest.raises(ValueError, match=text):
        GradientSync(communicator("ipc"), own)


# -- the end


def test_closing_gives_memory_back(gpu: FakeLibrary) -> None:
    gradients, comm = arrays(SHAPES), communicator("ipc")
    gc.collect()
    before = len(gpu.allocated), len(gpu.events)
    for turn in range(2):
        sync = GradientSync(comm, gradients, bucket_bytes=300, nonfinite="raise")
        for step in range(2):
            fill(gradients, step)
            for i in (0, *reversed(range(1, len(SHAPES)))):  # not as expected: buckets are made anew
                sync.ready(i)
            assert sync.wait()
        if turn % 2:
            sync.close()
        del sync
    until = time.monotonic() + 20
    while (len(gpu.allocated), len(gpu.events)) != before and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)  # threads are ending
    assert (len(gpu.allocated), len(gpu.events)) == before


@several_ranks
@pytest.mark.parametrize("function", ["cuEventRecord", "cuMemcpyAsync"])
def test_the_others_learn_what_a_rank_has_met(gpu: FakeLibrary, function: str) -> None:
    """In `ready`, or where a bucket is reduced."""
    comm = communicator("ipc").Dup()
    start = time.monotonic()
    expected = (
        (GpuError, "NOT_SUPPORTED") if RANK == LAST else (RankFailedError, f"rank {LAST} .*NOT_SUPPORTED")
    )
    sync = GradientSync(comm, arrays(SHAPES), bucket_bytes=300)
    complete(sync, 0)
    refused = {function} if RANK == LAST else set()
    gpu.without |= refused
    look_functions_up_again()
    with pytest.raises(expected[0], match=expected[1]), sync:
        complete(sync, 1)
    gpu.without -= refused
    look_functions_up_again()
    assert time.monotonic() - start < PROMPT
    WORLD.Barrier()
