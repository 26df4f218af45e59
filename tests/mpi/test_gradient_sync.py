"""Gradient synchronisation: layouts, transports, settings, ranks of different speeds, and what goes wrong."""

from __future__ import annotations

import gc
import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll import GradientSync
from mpicoll.compression import BFloat16, Compression, Float16, Int8, PowerSGD, RandomK, TopK
from mpicoll.faults import RankFailedError
from mpicoll.requests import Series
from mpicoll.transports import shared

from .examples import Array, data, everyday, total
from .test_hierarchical import TWO, needs_nodes
from .test_hierarchical import communicator as on_nodes

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
LAST = SIZE - 1
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]
INTEGERS = [np.dtype(code) for code in ("i1", "u1", "i2", "i4", "i8")]
KIB = 1024
HUGE = 1 << 40
PROMPT = 5.0  # seconds within which a rank that waits in vain says so
# Numbers, nothing, odd sizes, several axes, and one that is reduced by itself where memory is shared.
SHAPES: list[tuple[int, ...]] = [(), (3,), (0,), (5, 7), (1,), (2, 3, 4), (20_001,), (2, 0), (257,), (17, 3)]
SMALL: list[tuple[int, ...]] = [(3,), (), (5, 2), (0,), (9,)]
BUCKETS = (1, 300, HUGE)  # bytes: a bucket for each gradient, a few together, one for all
TRANSPORTS = ["shared", "messages", pytest.param("nodes", marks=needs_nodes)]


@pytest.fixture(autouse=True)
def spare_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a thread take part wherever a test does not say otherwise, however few cores there are."""
    monkeypatch.setattr(Series, "has_spare_cores", True)


several_ranks = pytest.mark.skipif(SIZE == 1, reason="needs another rank")


@cache
def communicator(transport: str) -> mpicoll.Communicator:
    """One for all tests that leave it as it was."""
    if transport == "nodes":
        return on_nodes(TWO, algorithm="hierarchical")
    return mpicoll.Communicator(WORLD, transport=transport)


def given(rank: int, number: int, shape: Sequence[int], step: int) -> Array:
    """What ``rank`` puts into a gradient: from -6 to 6, so that sums are exact in every dtype."""
    index = np.arange(math.prod(shape))
    return ((index * 5 + rank * 3 + number * 7 + step * 11) % 13 - 6).reshape(shape)


def summed(number: int, shape: Sequence[int], step: int) -> Array:
    return np.asarray(sum(given(rank, number, shape, step) for rank in range(SIZE)))


def fill(gradients: Sequence[Array], step: int) -> None:
    for i, gradient in enumerate(gradients):
        gradient[...] = given(RANK, i, gradient.shape, step).astype(gradient.dtype)


def check(gradients: Sequence[Array], step: int, factor: float = 1, tolerance: float = 0) -> None:
    """They hold ``factor`` times the sum; ``tolerance`` is relative."""
    for i, gradient in enumerate(gradients):
        about = f"gradient {i}, {gradient.shape} of {gradient.dtype}, {step=}, {RANK=}"
        wanted = summed(i, gradient.shape, step) * factor
        if gradient.dtype.kind in "iu":
            np.testing.assert_array_equal(gradient, wanted.astype(gradient.dtype), about)
        else:
            np.testing.assert_allclose(gradient.astype(float), wanted, rtol=tolerance, atol=0, err_msg=about)


def rounding(*dtypes: np.dtype[Any]) -> float:
    """A relative error of two roundings to the coarsest of these dtypes."""
    return 2 * max(float(ml_dtypes.finfo(dtype).eps) for dtype in dtypes)


def complete(sync: GradientSync, step: int, factor: float = 1 / SIZE, tolerance: float = 1e-6) -> None:
    """A whole step."""
    fill(sync.gradients, step)
    sync.ready_all()
    assert sync.wait()
    check(sync.gradients, step, factor, tolerance)


def apart(shapes: Sequence[tuple[int, ...]], dtype: Any = np.float32) -> list[Array]:
    """Arrays that do not touch each other, whatever the allocator does."""
    return [np.zeros(math.prod(shape) + 2, dtype)[1:-1].reshape(shape) for shape in shapes]


def joined(shapes: Sequence[tuple[int, ...]], dtype: Any = np.float32) -> list[Array]:
    """Views of one vector."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = np.split(np.zeros(ends[-1], dtype), ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def with_gap(shapes: Sequence[tuple[int, ...]], dtype: Any = np.float32) -> list[Array]:
    """Views of one vector, but for one in the middle that the last rank has elsewhere."""
    arrays = joined(shapes, dtype)
    if RANK == LAST:
        arrays[len(arrays) // 2] = arrays[len(arrays) // 2].copy()
    return arrays


def fortran(shapes: Sequence[tuple[int, ...]], dtype: Any = np.float32) -> list[Array]:
    return [array.copy(order="F") for array in apart(shapes, dtype)]


def in_arena(shapes: Sequence[tuple[int, ...]], dtype: Any = np.float32) -> list[Array]:
    return [communicator("shared").alloc(shape, dtype) for shape in shapes]


def on_some_ranks_in_arena(shapes: Sequence[tuple[int, ...]], dtype: Any = np.float32) -> list[Array]:
    return in_arena(shapes, dtype) if RANK % 2 else apart(shapes, dtype)


def as_shapes(shapes: Sequence[tuple[int, ...]], dtype: Any = np.float32) -> list[tuple[int, ...]]:
    return list(shapes)


Layout = Callable[..., list[Any]]
LAYOUTS: dict[str, Layout] = {
    function.__name__: function
    for function in (as_shapes, apart, joined, with_gap, fortran, in_arena, on_some_ranks_in_arena)
}


# -- what comes out


@pytest.mark.algorithms
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_layout(transport: str, layout: str) -> None:
    comm = communicator(transport)
    for bucket_bytes in BUCKETS:
        gradients = LAYOUTS[layout](SHAPES)
        with GradientSync(comm, gradients, bucket_bytes=bucket_bytes) as sync:
            assert [gradient.shape for gradient in sync.gradients] == SHAPES
            for step in range(3):
                complete(sync, step)
            if layout != "as_shapes":
                assert all(
                    np.shares_memory(a, b) for a, b in zip(gradients, sync.gradients, strict=True) if a.size
                )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_float(transport: str, dtype: np.dtype[Any]) -> None:
    for layout in ("as_shapes", "apart", "joined"):
        for average, scale in ((True, 1.0), (False, 1.0), (False, 0.25), (True, 3.0)):
            gradients = LAYOUTS[layout](SHAPES, dtype)
            sync = GradientSync(
                communicator(transport),
                gradients,
                dtype=dtype,
                average=average,
                scale=scale,
                bucket_bytes=300,
            )
            with sync:
                for step in range(2):
                    exact = not average and scale == 1
                    complete(sync, step, scale / SIZE if average else scale, 0 if exact else rounding(dtype))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_are_summed(dtype: np.dtype[Any]) -> None:
    for layout, nonfinite in itertools.product(("as_shapes", "apart"), ("pass", "raise")):
        gradients = LAYOUTS[layout](SHAPES, dtype)
        comm = communicator("shared")
        with GradientSync(comm, gradients, dtype=dtype, average=False, nonfinite=nonfinite) as sync:
            for step in range(2):
                complete(sync, step, 1)


@pytest.mark.algorithms
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_several_dtypes_at_once(transport: str) -> None:
    dtypes = [FLOATS[i % 4] for i in range(len(SHAPES))]
    for bucket_bytes in BUCKETS:
        gradients = [
            array for shape, dtype in zip(SHAPES, dtypes, strict=True) for array in apart([shape], dtype)
        ]
        with GradientSync(communicator(transport), gradients, bucket_bytes=bucket_bytes) as sync:
            assert [gradient.dtype for gradient in sync.gradients] == dtypes
            for step in range(2):
                complete(sync, step, 1 / SIZE, rounding(BFLOAT16))


@pytest.mark.parametrize("wire", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_wire_dtype(dtype: np.dtype[Any], wire: np.dtype[Any]) -> None:
    for layout, transport in (("as_shapes", "shared"), ("apart", "shared"), ("apart", "messages")):
        gradients, comm = LAYOUTS[layout](SHAPES, dtype), communicator(transport)
        with GradientSync(comm, gradients, dtype=dtype, wire_dtype=wire, bucket_bytes=300) as sync:
            for step in range(2):
                complete(sync, step, 1 / SIZE, rounding(dtype, wire))


@needs_nodes
@pytest.mark.algorithms
def test_wire_dtypes_between_nodes() -> None:
    for wire in ("float16", "bfloat16"):
        with GradientSync(communicator("nodes"), SHAPES, wire_dtype=wire) as sync:
            for step in range(2):
                complete(sync, step, 1 / SIZE, rounding(np.dtype(wire)))


@pytest.mark.parametrize("wire", ["float16", "bfloat16"])
def test_sums_in_16_bits_are_rounded_once(wire: str) -> None:
    """2048 + 1 + 1 + ... never leaves 2048 in float16 if each sum is rounded, nor does 256 in bfloat16."""
    large = 256.0 if wire == "bfloat16" else 2048.0
    for layout in ("as_shapes", "apart"):
        gradients = LAYOUTS[layout]([(3,), (700,)])
        with GradientSync(communicator("shared"), gradients, average=False, wire_dtype=wire) as sync:
            for gradient in sync.gradients:
                gradient[:] = large if RANK == 0 else 1
            sync.ready_all()
            sync.wait()
            wanted = np.float64(large + SIZE - 1).astype(wire)
            assert all((gradient == float(wanted)).all() for gradient in sync.gradients)


@pytest.mark.algorithms
@pytest.mark.parametrize("name", [*everyday("allreduce"), "auto"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_algorithm(transport: str, name: str) -> None:
    for layout in ("as_shapes", "apart"):
        gradients, comm = LAYOUTS[layout](SHAPES), communicator(transport)
        with GradientSync(comm, gradients, algorithm=name, bucket_bytes=4 * KIB) as sync:
            for step in range(2):
                complete(sync, step)


def test_bucket_bytes_are_measured() -> None:
    shapes = [(150_000,)] * 4
    with GradientSync(communicator("shared"), shapes) as sync:
        assert len(set(WORLD.allgather(tuple(sync.buckets)))) == 1
        assert len(sync.buckets) > 1  # the first one is small
        complete(sync, 0)


def floats(rank: int, count: int, salt: int) -> Array:
    """Of sizes so different that the order of addition shows."""
    generator = np.random.default_rng([rank, count, salt])
    return (generator.standard_normal(count) * 10.0 ** generator.integers(-6, 6, count)).astype(np.float32)


@pytest.mark.algorithms
@pytest.mark.parametrize("average", [False, True])
def test_same_bits_as_a_loop_of_allreduce(average: bool) -> None:
    comm = communicator("shared")
    wanted = [floats(RANK, math.prod(shape), i) for i, shape in enumerate(SHAPES)]
    for array in wanted:
        comm.Allreduce(MPI.IN_PLACE, array, mpicoll.AVG if average else MPI.SUM)
    for layout, bucket_bytes, overlap in itertools.product(
        ("as_shapes", "apart", "with_gap"), (*BUCKETS, None), (True, False)
    ):
        gradients = LAYOUTS[layout](SHAPES)
        with GradientSync(
            comm, gradients, average=average, bucket_bytes=bucket_bytes, overlap=overlap
        ) as sync:
            for _ in range(2):
                for i, gradient in enumerate(sync.gradients):
                    gradient[...] = floats(RANK, gradient.size, i).reshape(gradient.shape)
                sync.ready_all()
                sync.wait()
                found = [gradient.tobytes() for gradient in sync.gradients]
                assert found == [array.tobytes() for array in wanted], (layout, bucket_bytes, overlap)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_overlap_changes_no_bit(transport: str) -> None:
    results = []
    for overlap in (True, False):
        with GradientSync(communicator(transport), SHAPES, overlap=overlap, bucket_bytes=300) as sync:
            for i, gradient in enumerate(sync.gradients):
                gradient[...] = floats(RANK, gradient.size, i).reshape(gradient.shape)
            sync.ready_all()
            sync.wait()
            results.append([gradient.tobytes() for gradient in sync.gradients])
    assert results[0] == results[1]
    assert len(set(WORLD.allgather(tuple(results[0])))) == 1


def test_many_small_gradients() -> None:
    shapes: list[tuple[int, ...]] = [(1 + i % 7,) for i in range(2000)]
    for gradients in (shapes, apart(shapes)):
        with GradientSync(communicator("shared"), gradients, bucket_bytes=2 * KIB) as sync:
            for step in range(2):
                complete(sync, step)


@pytest.mark.parametrize("shapes", [[], [(0,)], [(0,), (2, 0)], [()]], ids=str)
def test_next_to_nothing(shapes: list[tuple[int, ...]]) -> None:
    for gradients in (shapes, apart(shapes)):
        with GradientSync(communicator("shared"), gradients, nonfinite="raise") as sync:
            for step in range(2):
                complete(sync, step)


# -- the order of gradients, and of ranks


def ready_in(sync: GradientSync, order: Sequence[int], own: random.Random, pause: float = 3e-4) -> None:
    """Mark gradients ready, now and then after a pause that differs between ranks."""
    for i in order:
        if own.random() < 0.3:
            time.sleep(own.uniform(0, pause))
        sync.ready(i)


@pytest.mark.algorithms
@pytest.mark.parametrize("layout", ["as_shapes", "apart"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_gradients_may_come_in_another_order_on_each_rank(transport: str, layout: str) -> None:
    own = random.Random(f"{RANK} {layout}")
    for bucket_bytes in BUCKETS[:2]:
        gradients = LAYOUTS[layout](SHAPES)
        with GradientSync(communicator(transport), gradients, bucket_bytes=bucket_bytes) as sync:
            for step in range(8):
                fill(sync.gradients, step)
                ready_in(sync, own.sample(range(len(SHAPES)), len(SHAPES)), own)
                assert sync.wait()
                check(sync.gradients, step, 1 / SIZE, 1e-6)


def test_the_order_is_learnt_from_rank_0() -> None:
    shapes: list[tuple[int, ...]] = [(5,)] * 8
    seen = [3, 0, 7, 1, 2, 6, 5, 4]
    with GradientSync(communicator("shared"), apart(shapes), bucket_bytes=40) as sync:
        assert [bucket.members for bucket in sync.buckets] == [(6, 7), (4, 5), (2, 3), (0, 1)]
        fill(sync.gradients, 0)
        ready_in(sync, seen if RANK == 0 else range(8), random.Random(RANK))
        sync.wait()
        check(sync.gradients, 0, 1 / SIZE, 1e-6)
        assert [bucket.members for bucket in sync.buckets] == [(0, 3), (1, 7), (2, 6), (4, 5)]
        for step in range(1, 4):
            fill(sync.gradients, step)
            ready_in(sync, seen, random.Random(f"{RANK} {step}"))
            sync.wait()
            check(sync.gradients, step, 1 / SIZE, 1e-6)
            assert sync.late == []


def test_an_order_that_is_given_is_kept() -> None:
    shapes: list[tuple[int, ...]] = [(5,)] * 4
    with GradientSync(communicator("shared"), apart(shapes), order=[2, 0, 3, 1], bucket_bytes=1) as sync:
        for step in range(2):
            fill(sync.gradients, step)
            ready_in(sync, [1, 3, 0, 2], random.Random(RANK))
            sync.wait()
            check(sync.gradients, step, 1 / SIZE, 1e-6)
            assert [bucket.members for bucket in sync.buckets] == [(2,), (0,), (3,), (1,)]


def test_late_gradients_are_named() -> None:
    names = ["first", "second", "third"]
    with GradientSync(communicator("shared"), [3, 4, 5], names=names, bucket_bytes=1) as sync:
        assert sync.late == []
        for order, late in (
            ([2, 1, 0], []),
            ([0, 1, 2], ["third"]),
            ([2, 0, 1], ["second"]),
            ([2, 1, 0], []),
        ):
            for i in order:
                sync.ready(i)
            assert sync.late != late or not late  # of the last step, until the next is complete
            sync.wait()
            assert sync.late == late


def test_ready_by_name_and_by_number() -> None:
    gradients = dict(zip(("weight", "bias", "2"), apart(SMALL[:3]), strict=True))
    with GradientSync(communicator("shared"), gradients, bucket_bytes=1) as sync:
        assert sync.names == ["weight", "bias", "2"]
        fill(sync.gradients, 0)
        sync.ready("bias")
        sync.ready(np.int64(0))
        sync.ready("2")
        sync.wait()
        check(list(gradients.values()), 0, 1 / SIZE, 1e-6)


def test_ready_all_marks_what_is_left() -> None:
    with GradientSync(communicator("shared"), SHAPES, bucket_bytes=1) as sync:
        for step in range(len(SHAPES)):
            fill(sync.gradients, step)
            sync.ready((step + RANK) % len(SHAPES))
            sync.ready_all()
            sync.ready_all()
            sync.wait()
            check(sync.gradients, step, 1 / SIZE, 1e-6)


def test_another_thread_may_mark_gradients_ready() -> None:
    """As PyTorch's does that runs the backward pass."""
    with GradientSync(communicator("shared"), apart(SHAPES), bucket_bytes=300) as sync:
        for step in range(5):
            fill(sync.gradients, step)
            order = random.Random(f"{RANK} {step}").sample(range(len(SHAPES)), len(SHAPES))
            backward = threading.Thread(target=ready_in, args=(sync, order, random.Random(step)))
            backward.start()
            backward.join()
            sync.wait()
            check(sync.gradients, step, 1 / SIZE, 1e-6)


@several_ranks
def test_gradients_are_reduced_before_the_program_waits() -> None:
    """The thread does so by itself, as soon as a bucket is complete on all ranks."""
    for transport in ("shared", "messages"):
        with GradientSync(communicator(transport), apart([(5000,), (300,)]), bucket_bytes=1) as sync:
            for step in range(3):
                fill(sync.gradients, step)
                sync.ready(sync.buckets[0].members[0])
                first, until = sync.gradients[1], time.monotonic() + 20
                wanted = summed(1, first.shape, step) / SIZE
                while not np.allclose(first, wanted) and time.monotonic() < until:
                    time.sleep(0.001)
                np.testing.assert_allclose(first, wanted, rtol=1e-6)
                np.testing.assert_array_equal(sync.gradients[0], given(RANK, 0, (5000,), step))
                sync.ready_all()
                sync.wait()
                check(sync.gradients, step, 1 / SIZE, 1e-6)


@pytest.mark.algorithms
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_steps_of_ranks_at_different_speeds(transport: str) -> None:
    own = random.Random(RANK)
    turns = 300 if transport == "shared" and SIZE <= 2 else 40
    with GradientSync(communicator(transport), SMALL, bucket_bytes=30) as sync:
        for step in range(turns):
            fill(sync.gradients, step)
            if own.random() < 0.1:
                time.sleep(0.001)
            order = range(len(SMALL))[:: -1 if own.random() < 0.8 else 1]
            ready_in(sync, order, own, 1e-4)
            assert sync.wait()
            check(sync.gradients, step, 1 / SIZE, 1e-6)


# -- beside other calls


def interleaved(sync: GradientSync, comm: mpicoll.Communicator, step: int) -> None:
    """A step with other collectives between its gradients, which all ranks call alike."""
    sums, common = np.zeros(700, np.int64), random.Random(step)
    fill(sync.gradients, step)
    for i in reversed(range(len(sync.gradients))):
        sync.ready(i)
        what = common.randrange(4)
        if what == 0:
            comm.Allreduce(data(RANK, 700, step + i), sums)
            np.testing.assert_array_equal(sums, total(SIZE, 700, step + i))
        elif what == 1:
            comm.Barrier()
        elif what == 2:
            assert comm.bcast((step, i) if i % SIZE == RANK else None, i % SIZE) == (step, i)
    assert sync.wait()
    check(sync.gradients, step, 1 / SIZE, 1e-6)


@pytest.mark.algorithms
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_other_collectives_between_gradients(transport: str) -> None:
    comm = communicator(transport)
    with GradientSync(comm, SHAPES, bucket_bytes=300) as sync:
        for step in range(10):
            interleaved(sync, comm, step)


@pytest.mark.algorithms
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_two_at_once_on_one_communicator(transport: str) -> None:
    """Each rank's gradients take turns in another order; all wait for the two in one, which changes."""
    comm, own = communicator(transport), random.Random(RANK)
    first, second = (
        GradientSync(comm, LAYOUTS[kind](SMALL), bucket_bytes=30) for kind in ("as_shapes", "apart")
    )
    for step in range(15):
        for sync in (first, second):
            fill(sync.gradients, step)
        turns = [(sync, i) for i in reversed(range(len(SMALL))) for sync in (first, second)]
        for sync, i in turns if RANK % 2 else own.sample(turns, len(turns)):
            sync.ready(i)
        for sync in (first, second)[:: -1 if step % 2 else 1]:
            assert sync.wait()
        for sync in (first, second):
            check(sync.gradients, step, 1 / SIZE, 1e-6)
    first.close()
    complete(second, 0)
    second.close()


def test_nonblocking_and_persistent_calls_under_way() -> None:
    comm = communicator("shared")
    received, repeated = np.zeros(700, np.int64), np.zeros(700, np.int64)
    plan = comm.Allreduce_init(data(RANK, 700, 1), repeated)
    with GradientSync(comm, SHAPES, bucket_bytes=300) as sync:
        for step in range(5):
            request = comm.Iallreduce(data(RANK, 700), received)
            plan.Start()
            interleaved(sync, comm, step)
            plan.Wait()
            request.Wait()
            np.testing.assert_array_equal(received, total(SIZE, 700))
            np.testing.assert_array_equal(repeated, total(SIZE, 700, 1))
    plan.Free()


@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_no_sync_accumulates(transport: str) -> None:
    with GradientSync(communicator(transport), apart(SMALL), bucket_bytes=30) as sync:
        for step in range(3):
            fill(sync.gradients, step)
            own = [gradient.copy() for gradient in sync.gradients]
            with sync.no_sync():
                for _ in range(3):  # the same gradients are ready again and again
                    sync.ready_all()
                    sync.ready(0)
                    assert not sync.wait()
            for gradient, before in zip(sync.gradients, own, strict=True):
                np.testing.assert_array_equal(gradient, before)
                gradient += 2 * before
            sync.ready_all()
            assert sync.wait()
            check(sync.gradients, step, 3 / SIZE, 1e-6)


def test_no_sync_ends_with_an_exception_too() -> None:
    with GradientSync(communicator("shared"), SMALL) as sync:
        with pytest.raises(ZeroDivisionError), sync.no_sync(), sync.no_sync():
            raise ZeroDivisionError
        complete(sync, 0)


# -- communicators


def test_a_plain_communicator() -> None:
    before = len(shared._in_use)
    for _ in range(3):
        with GradientSync(WORLD, SHAPES, bucket_bytes=300) as sync:
            for step in range(2):
                complete(sync, step)
    assert len(shared._in_use) == before


def test_parts_of_a_communicator() -> None:
    with communicator("shared").Split(RANK % 2) as part, GradientSync(part, [(7,)], average=False) as sync:
        members = range(RANK % 2, SIZE, 2)
        sync.gradients[0][:] = given(RANK, 0, (7,), 0)
        sync.ready_all()
        sync.wait()
        wanted = np.sum([given(rank, 0, (7,), 0) for rank in members], axis=0)
        np.testing.assert_array_equal(sync.gradients[0], wanted)


@pytest.mark.parametrize("compression", [None, Int8(), TopK(1.0)], ids=str)
@pytest.mark.parametrize("transport", ["auto", "messages"])
def test_one_rank_alone(transport: str, compression: Compression | None) -> None:
    with mpicoll.Communicator(MPI.COMM_SELF, transport=transport) as alone:
        for scale, layout in itertools.product((1.0, 0.5), ("as_shapes", "apart")):
            gradients = LAYOUTS[layout](SHAPES)
            with GradientSync(
                alone, gradients, scale=scale, compression=compression, bucket_bytes=300
            ) as sync:
                fill(sync.gradients, 0)
                sync.ready_all()
                assert sync.wait()
                for i, gradient in enumerate(sync.gradients):
                    wanted = scale * given(RANK, i, gradient.shape, 0)
                    np.testing.assert_allclose(gradient, wanted, atol=0.05 if compression else 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_rank_alone_scales_every_float(dtype: np.dtype[Any]) -> None:
    for wire, layout in itertools.product([None, *FLOATS], ("as_shapes", "apart")):
        gradients = LAYOUTS[layout](SMALL, dtype)
        with GradientSync(MPI.COMM_SELF, gradients, dtype=dtype, scale=0.5, wire_dtype=wire) as sync:
            fill(sync.gradients, 0)
            sync.ready_all()
            sync.wait()
            for i, gradient in enumerate(sync.gradients):
                np.testing.assert_array_equal(gradient.astype(float), given(RANK, i, gradient.shape, 0) / 2)


# -- PyTorch


def test_pytorch_tensors() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
        with GradientSync(communicator("shared"), tensors, bucket_bytes=300) as sync:
            for step in range(2):
                for i, tensor in enumerate(tensors):
                    tensor.copy_(torch.from_numpy(given(RANK, i, tensor.shape, step)))
                sync.ready_all()
                sync.wait()
                found = [tensor.to(torch.float64).numpy() for tensor in tensors]
                check(found, step, 1 / SIZE, rounding(sync.gradients[0].dtype))


def test_pytorch_gradients_in_a_backward_pass() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    inputs = [torch.full((5, 6), 0.1 * (rank + 1)) for rank in range(SIZE)]
    wanted = [torch.autograd.grad(model(x).square().sum(), list(parameters.values())) for x in inputs]
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    with GradientSync(communicator("shared"), gradients, bucket_bytes=200) as sync:
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: sync.ready(name))
        for _ in range(3):
            model.zero_grad(set_to_none=False)
            model(inputs[RANK]).square().sum().backward()
            assert sync.wait()
            for parameter, *each in zip(parameters.values(), *wanted, strict=True):
                torch.testing.assert_close(parameter.grad, sum(each) / SIZE)


# -- compression

COMPRESSIONS: list[Compression] = [
    Float16(),
    BFloat16(),
    Int8(),
    TopK(0.5),
    RandomK(0.5),
    PowerSGD(2),
]


def same_everywhere(gradients: Sequence[Array]) -> bool:
    return len(set(WORLD.allgather(b"".join(gradient.tobytes() for gradient in gradients)))) == 1


@pytest.mark.algorithms
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda compression: compression.name)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_compressed_gradients_are_right_on_average(transport: str, compression: Compression) -> None:
    """Error feedback: what is missing in one step comes in the next ones."""
    nsteps, shapes = 12, [*SMALL, (40, 30)]
    for layout in ("as_shapes", "apart", "joined"):
        gradients, comm = LAYOUTS[layout](shapes), communicator(transport)
        with GradientSync(comm, gradients, compression=compression, bucket_bytes=60) as sync:
            means = [np.zeros(shape) for shape in shapes]
            for _ in range(nsteps):
                fill(sync.gradients, 0)
                sync.ready_all()
                assert sync.wait()
                assert same_everywhere(sync.gradients)
                for mean, gradient in zip(means, sync.gradients, strict=True):
                    mean += gradient / nsteps
            for i, mean in enumerate(means):
                wanted = summed(i, mean.shape, 0) / SIZE
                # What is missing at the end is of the size of the ranks' gradients, whose mean may be small.
                size = max(np.linalg.norm(given(rank, i, mean.shape, 0)) for rank in range(SIZE))
                assert np.linalg.norm(mean - wanted) <= 0.4 * size, (layout, i)


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda compression: compression.name)
def test_a_nan_shows_once_in_compressed_gradients(compression: Compression) -> None:
    """On all ranks; then it is gone, also from the gaps between gradients of odd sizes."""
    for layout in ("as_shapes", "apart", "joined"):
        gradients = LAYOUTS[layout]([(3,), (5,), (2, 3)])
        with GradientSync(communicator("shared"), gradients, compression=compression) as sync:
            for step in range(3):
                for gradient in sync.gradients:
                    gradient[...] = 1 + RANK
                if step == 0 and RANK == LAST:
                    sync.gradients[1][2] = np.nan
                sync.ready_all()
                sync.wait()
                assert same_everywhere(sync.gradients)
                finite = [bool(np.isfinite(gradient).all()) for gradient in sync.gradients]
                assert finite[1] if step else not finite[1], (layout, step)
                assert all(finite) or step == 0, (layout, step)


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda compression: compression.name)
@pytest.mark.parametrize("way", ["raise", "skip"])
def test_a_nan_in_compressed_gradients_is_told(compression: Compression, way: str) -> None:
    with GradientSync(communicator("shared"), apart(SMALL), compression=compression, nonfinite=way) as sync:
        for step in range(4):
            fill(sync.gradients, step)
            spoilt = step == 1
            if spoilt and RANK == LAST:
                sync.gradients[2][1, 1] = np.inf
            sync.ready_all()
            if spoilt and way == "raise":
                with pytest.raises(FloatingPointError, match=f"'2' on rank {LAST}"):
                    sync.wait()
            else:
                assert sync.wait() is not spoilt


# -- NaN and infinity

SPOILT = 6  # the gradient that a test spoils: one that is reduced by itself where memory is shared


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", ["as_shapes", "apart", "joined"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_is_not_finite_is_named_on_all_ranks(transport: str, layout: str, value: float) -> None:
    comm = communicator(transport)
    for wire, bucket_bytes in itertools.product((None, "bfloat16"), (1, HUGE)):
        for culprit, spoilt in ((LAST, SPOILT), (0, 1)):
            gradients = LAYOUTS[layout](SHAPES)
            sync = GradientSync(
                comm, gradients, nonfinite="raise", wire_dtype=wire, bucket_bytes=bucket_bytes
            )
            with sync:
                fill(sync.gradients, 0)
                if culprit == RANK:
                    sync.gradients[spoilt].flat[-1] = value
                sync.ready_all()
                with pytest.raises(FloatingPointError) as caught:
                    sync.wait()
                assert str(caught.value) == f"NaN or infinity in gradients: '{spoilt}' on rank {culprit}"
                complete(sync, 1, 1 / SIZE, 1e-6 if wire is None else rounding(BFLOAT16))


def test_the_step_is_skipped_on_all_ranks() -> None:
    for layout in ("as_shapes", "apart"):
        with GradientSync(communicator("shared"), LAYOUTS[layout](SHAPES), nonfinite="skip") as sync:
            for step in range(6):
                fill(sync.gradients, step)
                if step % 2 and step % SIZE == RANK:
                    sync.gradients[SPOILT][-1] = np.nan
                sync.ready_all()
                assert sync.wait() is (step % 2 == 0)
                if step % 2 == 0:
                    check(sync.gradients, step, 1 / SIZE, 1e-6)


def test_nobody_looks_where_all_may_pass() -> None:
    with GradientSync(communicator("shared"), apart(SHAPES)) as sync:
        fill(sync.gradients, 0)
        if RANK == LAST:
            sync.gradients[SPOILT][-1] = np.nan
        sync.ready_all()
        assert sync.wait()
        assert np.isnan(sync.gradients[SPOILT][-1])


@several_ranks
def test_a_sum_that_overflows_is_named() -> None:
    """Every rank's own gradient is finite."""
    for layout in ("as_shapes", "apart"):
        gradients = LAYOUTS[layout]([(3,), (70,)], np.float16)
        sync = GradientSync(
            communicator("shared"),
            gradients,
            dtype=np.float16,
            average=False,
            nonfinite="raise",
            names=["a", "b"],
        )
        with sync:
            for gradient in sync.gradients:
                gradient[:] = 1
            sync.gradients[1][5] = 60_000
            sync.ready_all()
            with pytest.raises(FloatingPointError, match="'b'") as caught:
                sync.wait()
            assert "'a'" not in str(caught.value)


def test_many_names_are_cut_short() -> None:
    with GradientSync(communicator("shared"), [3] * 14, nonfinite="raise") as sync:
        for gradient in sync.gradients:
            gradient[:] = np.nan
        sync.ready_all()
        with pytest.raises(FloatingPointError, match=r"'9' on rank .* and 4 more$"):
            sync.wait()


@pytest.mark.parametrize("problem", ["not finite", "never ready"])
def test_names_are_right_in_the_step_that_learns_the_order(problem: str) -> None:
    order, spoilt = [0, 2, 1, 3], 3
    gradients = apart([(3,)] * 4)
    sync = GradientSync(
        communicator("shared"), gradients, names=list("abcd"), nonfinite="raise", bucket_bytes=24
    )
    with sync:
        fill(sync.gradients, 0)
        culprit = RANK == LAST
        if culprit and problem == "not finite":
            gradients[spoilt][1] = np.nan
        for i in order:
            if not (culprit and problem == "never ready" and i == spoilt):
                sync.ready(i)
        kind = FloatingPointError if problem == "not finite" else RuntimeError
        with pytest.raises(kind, match=f": 'd' on rank {LAST}($|;)"):
            sync.wait()
        assert [bucket.members for bucket in sync.buckets] == [(0, 2), (1, 3)]
        complete(sync, 1)


# -- gradients that are never ready


@pytest.mark.algorithms
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layout", ["as_shapes", "apart"])
def test_what_was_never_ready_is_named_on_all_ranks(layout: str, transport: str) -> None:
    for bucket_bytes, missing in itertools.product(BUCKETS, (0, SPOILT, len(SHAPES) - 1)):
        gradients = LAYOUTS[layout](SHAPES)
        with GradientSync(communicator(transport), gradients, bucket_bytes=bucket_bytes) as sync:
            complete(sync, 0)
            for i in range(len(SHAPES)):
                if RANK != LAST or i != missing:
                    sync.ready(i)
            with pytest.raises(
                RuntimeError, match=f"never marked ready in this step: '{missing}' on rank {LAST};"
            ):
                sync.wait()
            complete(sync, 1)


def test_a_step_without_anything_ready() -> None:
    with GradientSync(communicator("shared"), SMALL, names=list("abcde")) as sync:
        ranks = ", ".join(map(str, range(SIZE)))
        with pytest.raises(RuntimeError, match=f"'a' on rank {ranks}; 'b' on rank {ranks}; 'c'"):
            sync.wait()
        complete(sync, 1)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layout", ["as_shapes", "apart"])
def test_unused_gradients_may_count_as_zeros(layout: str, transport: str) -> None:
    """On some ranks, on all of them, and in the step that learns the order."""
    for bucket_bytes in BUCKETS:
        gradients = LAYOUTS[layout](SHAPES)
        sync = GradientSync(communicator(transport), gradients, unused="zero", bucket_bytes=bucket_bytes)
        with sync:
            for step in range(4):
                fill(sync.gradients, step)
                unused = step % len(SHAPES) if step else SPOILT
                takes_part = [rank != step % SIZE and step != 2 for rank in range(SIZE)]
                for i in range(len(SHAPES)):
                    if i != unused or takes_part[RANK]:
                        sync.ready(i)
                assert sync.wait()
                shape = SHAPES[unused]
                parts = [given(rank, unused, shape, step) * takes_part[rank] for rank in range(SIZE)]
                np.testing.assert_allclose(sync.gradients[unused], np.sum(parts, axis=0) / SIZE, rtol=1e-6)
                sync.gradients[unused][...] = summed(unused, shape, step) / SIZE  # only the others are left
                check(sync.gradients, step, 1 / SIZE, 1e-6)


@pytest.mark.parametrize("way", ["raise", "skip"])
def test_never_ready_counts_more_than_not_finite(way: str) -> None:
    """What the last step has left in a gradient says nothing about this one."""
    with GradientSync(communicator("shared"), SMALL, nonfinite=way) as sync:
        complete(sync, 0)
        sync.gradients[0][:] = np.nan
        for i in range(1, len(SMALL)):
            sync.ready(i)
        with pytest.raises(RuntimeError, match="never marked ready in this step: '0'"):
            sync.wait()


# -- what a program may do wrong


def test_ready_twice_is_an_error_of_that_rank() -> None:
    with GradientSync(communicator("shared"), SMALL, names=list("abcde"), bucket_bytes=1) as sync:
        for step in range(2):
            fill(sync.gradients, step)
            sync.ready_all()
            if RANK == LAST:
                with pytest.raises(
                    RuntimeError, match=f"'c' was marked ready twice in one step on rank {LAST}"
                ):
                    sync.ready("c")
            assert sync.wait()
            check(sync.gradients, step, 1 / SIZE, 1e-6)


@pytest.mark.parametrize("unknown", ["f", "0", -1, 5, None, 1.0])
def test_an_unknown_gradient(unknown: Any) -> None:
    with GradientSync(communicator("shared"), SMALL, names=list("abcde")) as sync:
        with pytest.raises(ValueError, match="gradient: expected a name or a number below 5, got "):
            sync.ready(unknown)
        complete(sync, 0)


def test_after_an_exception_between_ready_and_wait() -> None:
    """What was begun must be completed; the program may have left its loop on some ranks for a while."""
    with GradientSync(communicator("shared"), apart(SHAPES), bucket_bytes=1) as sync:
        for step in range(3):
            fill(sync.gradients, step)
            try:
                sync.ready(len(SHAPES) - 1)
                if step % SIZE == RANK:
                    raise ZeroDivisionError
                sync.ready(0)
            except ZeroDivisionError:
                time.sleep(0.03)  # longer than a rank waits without a look around
            sync.ready_all()
            assert sync.wait()
            check(sync.gradients, step, 1 / SIZE, 1e-6)


def read_only() -> Array:
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    return array


def overlapping() -> list[Array]:
    whole = np.zeros(10, np.float32)
    return [whole[:6], whole[5:]]


Bad = tuple[Callable[[mpicoll.Communicator], Any], type[Exception], str]
BAD: dict[str, Bad] = {
    "mixed": (
        lambda c: GradientSync(c, [(3,), read_only().copy()]),
        TypeError,
        "gradients: expected either arrays or",
    ),
    "names beside a mapping": (
        lambda c: GradientSync(c, {"a": 3}, names=["a"]),
        ValueError,
        "names: expected none",
    ),
    "too few names": (
        lambda c: GradientSync(c, [3, 4], names=["a"]),
        ValueError,
        "names: expected 2 different names",
    ),
    "equal names": (
        lambda c: GradientSync(c, [3, 4], names=["a", "a"]),
        ValueError,
        "names: expected 2 different",
    ),
    "negative": (
        lambda c: GradientSync(c, {"w": (3, -1)}),
        ValueError,
        "gradient 'w': expected dimensions of 0",
    ),
    "floats as a shape": (lambda c: GradientSync(c, {"w": [1.0, 2.0]}), TypeError, "gradient 'w': "),
    "strided": (
        lambda c: GradientSync(c, {"w": np.zeros(6, np.float32)[::2]}),
        ValueError,
        "gradient 'w': expected contiguous memory",
    ),
    "read-only": (
        lambda c: GradientSync(c, {"w": read_only()}),
        ValueError,
        "gradient 'w': expected memory that may",
    ),
    "no array": (lambda c: GradientSync(c, {"w": "weight"}), TypeError, "gradient 'w': expected an array"),
    "overlapping": (lambda c: GradientSync(c, overlapping()), ValueError, "gradient '1': "),
    "twice the same": (lambda c: GradientSync(c, overlapping()[:1] * 2), ValueError, "gradient '1': "),
    "integers": (
        lambda c: GradientSync(c, {"w": 3}, dtype=np.int32),
        TypeError,
        "gradient 'w': expected .*float32.* got int32; only average=False",
    ),
    "scaled integers": (
        lambda c: GradientSync(c, {"w": 3}, dtype=np.int32, average=False, scale=2),
        TypeError,
        "gradient 'w'",
    ),
    "dates": (lambda c: GradientSync(c, {"w": 3}, dtype="M8[s]", average=False), TypeError, "gradient 'w'"),
    "dates that are looked at": (
        lambda c: GradientSync(c, {"w": 3}, dtype="M8[s]", average=False, nonfinite="raise"),
        TypeError,
        "gradient 'w'",
    ),
    "compressed float64": (
        lambda c: GradientSync(c, {"w": 3}, dtype=float, compression=Int8()),
        TypeError,
        "gradient 'w': compression is for float32, got float64",
    ),
    "wire_dtype": (
        lambda c: GradientSync(c, [3], wire_dtype=np.int8),
        TypeError,
        "wire_dtype: expected 'float16'",
    ),
    "no wire_dtype": (lambda c: GradientSync(c, [3], wire_dtype="bfloat"), TypeError, "wire_dtype: "),
    "wire_dtype and compression": (
        lambda c: GradientSync(c, [3], wire_dtype="float16", compression=Int8()),
        ValueError,
        "wire_dtype: expected none beside compression",
    ),
    "compression by name": (lambda c: GradientSync(c, [3], compression="int8"), TypeError, "compression: "),  # type: ignore[arg-type]
    "nonfinite": (lambda c: GradientSync(c, [3], nonfinite="stop"), ValueError, "nonfinite: .* got 'stop'"),
    "unused": (
        lambda c: GradientSync(c, [3], unused="skip"),
        ValueError,
        "unused: expected 'raise' or 'zero', got",
    ),
    "bucket_bytes": (lambda c: GradientSync(c, [3], bucket_bytes=0), ValueError, "bucket_bytes: .* got 0"),
    "order": (
        lambda c: GradientSync(c, [3, 4], order=[0, 0]),
        ValueError,
        "order: expected the numbers from 0 to 1",
    ),
    "no order": (lambda c: GradientSync(c, [3, 4], order=3), TypeError, "order: "),  # type: ignore[arg-type]
    "scale": (lambda c: GradientSync(c, [3], scale="twice"), TypeError, "scale: "),  # type: ignore[arg-type]
    "algorithm": (
        lambda c: GradientSync(c, [3], algorithm="rings"),
        ValueError,
        r"algorithm: expected auto or one of ring, .* got 'rings'",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what: str) -> None:
    call, kind, text = BAD[what]
    comm = communicator("shared")
    if SIZE == 1 and what == "algorithm":
        pytest.skip("nothing is reduced")
    with pytest.raises(kind, match=text):
        call(comm)
    with GradientSync(comm, SMALL) as sync:
        complete(sync, 0)


# Settings are compared before they are used, so of these all ranks hear that they differ.
COMPARED = {"algorithm"}


@several_ranks
@pytest.mark.parametrize("what", [what for what in BAD if what not in COMPARED])
def test_bad_arguments_of_one_rank_are_told_to_all(what: str) -> None:
    call, kind, text = BAD[what]
    comm = communicator("shared")
    if RANK == LAST:
        with pytest.raises(kind, match=text):
            call(comm)
    else:
        with pytest.raises(RuntimeError, match=f"rank {LAST} could not take part: {kind.__name__}: .*{text}"):
            GradientSync(comm, [3])
    with GradientSync(comm, SMALL) as sync:
        complete(sync, 0)


def differing(odd: Any, common: Any) -> Any:
    """What the last rank has, and what the others have."""
    return odd if RANK == LAST else common


DIFFERENT: dict[str, tuple[Callable[[mpicoll.Communicator], Any], str]] = {
    "shapes": (
        lambda c: GradientSync(c, {"a": 3, "b": differing((2, 2), (4,))}),
        rf"gradient 'b': expected float32\[4\] as on rank 0; rank {LAST} has float32\[2, 2\]",
    ),
    "dtypes": (
        lambda c: GradientSync(c, [np.zeros(3, differing("f8", "f4"))]),
        rf"gradient '0': expected float32\[3\] as on rank 0; rank {LAST} has float64\[3\]",
    ),
    "dtype of shapes": (
        lambda c: GradientSync(c, [3], dtype=differing("f2", "f4")),
        rf"gradient '0': expected float32\[3\] as on rank 0; rank {LAST} has float16",
    ),
    "names": (
        lambda c: GradientSync(c, {"a": 3, differing("b", "c"): 3}),
        f"gradients: expected 'c' as on rank 0; rank {LAST} has 'b'",
    ),
    "number": (
        lambda c: GradientSync(c, [3] * differing(3, 2)),
        f"gradients: expected 2 as on rank 0; rank {LAST} has 3",
    ),
    "none": (
        lambda c: GradientSync(c, [3] * differing(0, 2)),
        f"gradients: expected 2 as on rank 0; rank {LAST} has 0",
    ),
    "arrays or shapes": (
        lambda c: GradientSync(c, [differing(np.zeros(3, "f4"), 3)]),
        f"gradients: expected shapes as on rank 0; rank {LAST} has",
    ),
    "memory order": (
        lambda c: GradientSync(c, {"w": np.zeros((2, 3), "f4", differing("F", "C"))}),
        f"gradient 'w': .*rank {LAST}",
    ),
    "bucket_bytes": (
        lambda c: GradientSync(c, [3], bucket_bytes=differing(5, 6)),
        f"bucket_bytes: expected 6 as on rank 0; rank {LAST} has 5",
    ),
    "wire_dtype": (
        lambda c: GradientSync(c, [3], wire_dtype=differing("float16", None)),
        f"wire_dtype: expected None as on rank 0; rank {LAST} has .*float16",
    ),
    "average": (
        lambda c: GradientSync(c, [3], average=differing(False, True)),
        "average: expected True as on",
    ),
    "scale": (lambda c: GradientSync(c, [3], scale=differing(2.0, 1.0)), "scale: expected 1.0 as on rank 0"),
    "order": (lambda c: GradientSync(c, [3, 3], order=differing([0, 1], [1, 0])), "order: expected "),
    "nonfinite": (
        lambda c: GradientSync(c, [3], nonfinite=differing("skip", "raise")),
        "nonfinite: expected 'raise' as",
    ),
    "unused": (
        lambda c: GradientSync(c, [3], unused=differing("zero", "raise")),
        "unused: expected 'raise' as",
    ),
    "algorithm": (
        lambda c: GradientSync(c, [3], algorithm=differing("ring", None)),
        "algorithm: expected None",
    ),
    "compression": (
        lambda c: GradientSync(c, [3], compression=differing(TopK(0.1), TopK(0.2))),
        f"compression: expected .*0.2.* as on rank 0; rank {LAST} has .*0.1",
    ),
    "seeds": (
        lambda c: GradientSync(c, [3], compression=RandomK(0.5, differing(1, 0))),
        f"compression: .*rank {LAST}",
    ),
}


@several_ranks
@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_differ_are_all_told(what: str) -> None:
    call, text = DIFFERENT[what]
    for transport in ("shared", "messages"):
        comm = communicator(transport)
        with pytest.raises(ValueError, match=text):
            call(comm)
        with GradientSync(comm, SMALL) as sync:
            complete(sync, 0)


@several_ranks
def test_one_rank_may_do_without_a_thread() -> None:
    with GradientSync(communicator("shared"), SHAPES, overlap=RANK != LAST, bucket_bytes=300) as sync:
        for step in range(3):
            complete(sync, step)


# -- the end


def task_threads() -> int:
    return sum(thread.name == "mpicoll-tasks" for thread in threading.enumerate())


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """Neither threads nor shared memory; what was retired last goes when the next channel is made."""
    gc.collect()
    before = task_threads(), len(shared._in_use)
    yield
    gc.collect()
    until = time.monotonic() + 20
    while task_threads() > before[0] and time.monotonic() < until:
        time.sleep(0.001)
    with GradientSync(communicator("shared"), SMALL):
        pass
    assert task_threads() == before[0]
    assert len(shared._in_use) <= before[1] + 2


def test_closing_ends_the_thread_and_gives_memory_back() -> None:
    with leaving_nothing():
        for turn in range(30):
            sync = GradientSync(
                communicator("shared"), SHAPES if turn % 2 else apart(SHAPES), bucket_bytes=300
            )
            complete(sync, turn)
            assert task_threads() > 0 or SIZE == 1
            sync.close()


def test_what_is_dropped_ends_its_thread_and_gives_memory_back() -> None:
    with leaving_nothing():
        for turn in range(20):
            compression = Int8() if turn % 3 == 0 else None
            sync = GradientSync(communicator("shared"), SHAPES, bucket_bytes=300, compression=compression)
            if turn % 2:
                fill(sync.gradients, turn)
                sync.ready_all()
                sync.wait()
            del sync


@several_ranks
def test_what_is_dropped_in_the_middle_of_a_step_ends_its_thread() -> None:
    with leaving_nothing():
        for turn in range(4):
            sync = GradientSync(communicator("shared"), SHAPES, bucket_bytes=300)
            if turn % SIZE == RANK:
                sync.ready(len(SHAPES) - 1)
                sync.ready(len(SHAPES) - 2)
                time.sleep(0.002)
            del sync
            WORLD.Barrier()


@several_ranks
def test_closing_in_the_middle_of_a_step() -> None:
    """Nobody else has begun it."""
    for transport in ("shared", "messages"):
        sync = GradientSync(communicator(transport), SHAPES, bucket_bytes=300)
        if RANK == LAST:
            for i in reversed(range(6, len(SHAPES))):
                sync.ready(i)
            time.sleep(0.002)
        sync.close()
        with GradientSync(communicator(transport), SHAPES) as another:
            complete(another, 0)


def test_gradients_outlive_what_made_them() -> None:
    with GradientSync(communicator("shared"), SHAPES) as sync:
        complete(sync, 0)
        gradients = sync.gradients
    del sync
    gc.collect()
    others = [np.full(20_000, -1.0, np.float32) for _ in range(4)]
    check(gradients, 0, 1 / SIZE, 1e-6)
    assert others[0][0] == -1


@pytest.mark.parametrize("comm", ["shared", "messages", "plain"])
def test_closed_is_closed(comm: str) -> None:
    sync = GradientSync(WORLD if comm == "plain" else communicator(comm), SMALL)
    complete(sync, 0)
    sync.close()
    for use in (sync.ready_all, sync.wait):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    sync.close()


def begin_and_fail(sync: GradientSync) -> None:
    with sync:
        sync.ready(len(SHAPES) - 1)
        raise ZeroDivisionError("own")


def begin_and_wait(sync: GradientSync) -> None:
    with sync:
        sync.ready_all()
        sync.wait()


@several_ranks
def test_the_others_learn_of_an_exception_that_leaves_the_block() -> None:
    comm = communicator("shared").Dup()
    sync = GradientSync(comm, SHAPES, bucket_bytes=1)
    start = time.monotonic()
    if RANK == LAST:
        with pytest.raises(ZeroDivisionError, match="own"):
            begin_and_fail(sync)
    else:
        with pytest.raises(RankFailedError, match=f"rank {LAST} .*ZeroDivisionError: own"):
            begin_and_wait(sync)
    assert time.monotonic() - start < PROMPT
    WORLD.Barrier()
    check_that_it_works(comm)
    comm.Free()


def test_an_exception_on_all_ranks_leaves_the_block_at_once() -> None:
    comm = communicator("shared").Dup()
    with pytest.raises(ZeroDivisionError):
        begin_and_fail(GradientSync(comm, SHAPES, bucket_bytes=1))
    check_that_it_works(comm)
    comm.Free()


def check_that_it_works(comm: mpicoll.Communicator) -> None:
    """A broken step leaves the communicator, and what is made on it later, as they were."""
    sums = np.zeros(700, np.int64)
    comm.Allreduce(data(RANK, 700), sums)
    np.testing.assert_array_equal(sums, total(SIZE, 700))
    with GradientSync(comm, SMALL) as sync:
        complete(sync, 0)
