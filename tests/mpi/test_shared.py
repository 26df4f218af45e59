"""The shared transport: every collective on every way it may take, whatever memory the arrays lie in."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial, reduce
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from mpicoll.kernels.reduce import DTYPES, OPERATIONS, supports

import mpicoll
from mpicoll import tuning
from mpicoll.faults import MismatchError, RankFailedError
from mpicoll.transports import shared
from mpicoll.transports.arena import Arena, ArenaError, new_array, own_arena
from tests.children import in_child

from . import examples
from .examples import EXAMPLES, Array, Example, data, in_place_or_not, roots, total
from .test_operations import contribution, reference

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
KIB = 1024
GUARD = -9  # what surrounds an array
BEHIND = 5  # elements of it
OFFSETS = (3, 0)  # elements of it before: in the middle of an array, and at the beginning of a page
MEMORY = ("ordinary", "shared", "mixed", "first rank's")
TURNS = 150 if SIZE <= 2 else 40  # of random calls
PROMPT = 1.0  # seconds within which a rank that waits in vain says so
HUGE = 1 << 40
ELEMENTS = 512  # of int64 in a slot of the narrow ways
SLOT = 8 * ELEMENTS
NARROW = {
    "slot": SLOT,
    "ring": 5 * SLOT,
    "small": 512,
    "quiet": 1024,
    "far": int(shared.NOT_FAR),
    "large": HUGE,
}

# How the transport works, where it is not as `tuning` says: slots that are full at once, results that go past
# the caches or not, other processes' memory read from some bytes on or never, no polling.
WAYS: dict[str, dict[str, Any]] = {
    "narrow": NARROW,
    "streaming": {**NARROW, "large": 64},
    "far": {**NARROW, "small": 64, "quiet": 64, "far": 65},
    "at once": {**NARROW, "small": SLOT, "quiet": SLOT, "far": SLOT + 1},
    "only in steps": {**NARROW, "small": 0, "quiet": 0, "far": SLOT // 2, "large": 64, "spins": 0},
}
# Elements: in the control line or not, one shot or not, asking where inputs lie or not, one slot or more.
COUNTS = (0, 1, 4, 5, 8, 9, 64, 65, 128, 129, ELEMENTS - 1, ELEMENTS, ELEMENTS + 1, 3 * ELEMENTS + 37)


def communicator(way: str, comm: MPI.Intracomm = WORLD, **more: Any) -> mpicoll.Communicator:
    """One that works in this way, in every test that uses it on all ranks alike."""
    sizes = tuning.sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "sizes", lambda nranks, cores: sizes(nranks, cores)._replace(**WAYS[way]))
        return mpicoll.Communicator(comm, transport="shared", **more)


@cache
def lasting(way: str) -> mpicoll.Communicator:
    """One for all tests that leave it as it was."""
    return communicator(way)


@contextmanager
def using(comm: mpicoll.Communicator) -> Iterator[mpicoll.Communicator]:
    """Free it at the end, unless the test has failed: then others would be waited for, and nothing said."""
    yield comm
    comm.Free()


class Memory:
    """Makes arrays that have guards around them: in ordinary memory, in the arena or sometimes there."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.made: list[tuple[Array, int, int]] = []

    def is_shared(self) -> bool:
        mixed = (RANK + len(self.made)) % 2 == 0
        return {"ordinary": False, "shared": True, "mixed": mixed, "first rank's": RANK == 0}[self.kind]

    def empty(self, count: int, dtype: Any = np.int64) -> Array:
        before = OFFSETS[len(self.made) % len(OFFSETS)]
        length = before + count + BEHIND
        whole = new_array(length, dtype) if self.is_shared() else np.empty(length, dtype)
        whole[:] = np.array(GUARD).astype(dtype)
        self.made.append((whole, before, count))
        return whole[before : before + count]

    def check(self, about: str) -> None:
        for whole, before, count in self.made:
            guards = np.concatenate([whole[:before], whole[before + count :]])
            assert (guards == np.array(GUARD).astype(whole.dtype)).all(), f"written outside; {about}"


def example_in(kind: str, comm: MPI.Intracomm, method: str, *args: Any) -> tuple[Example, Memory]:
    memory = Memory(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "empty", memory.empty)
        return EXAMPLES[method](comm, *args), memory


def spoil_input(example: Example) -> None:
    """What the caller may do as soon as the call is over, when others may still be in theirs."""
    apart = example.target is None or not np.shares_memory(example.source, example.target)
    if example.source is not None and apart:
        example.source[...] = 77


def check_call(
    comm: mpicoll.Communicator, method: str, kind: str, count: int, root: int, in_place: bool, salt: int = 0
) -> None:
    """The call twice, the second being recognised as a repetition; its input is spoilt at once."""
    example, memory = example_in(kind, comm, method, count, root, in_place)
    about = f"{method} in {kind} memory, {count=}, {root=}, {in_place=}, {salt=}, {comm.rank=}"
    example.fill(salt)
    getattr(comm, method)(*example.args)
    example.check(salt, about)
    example.fill(salt + 1)
    getattr(comm, method)(*example.args)
    spoil_input(example)
    if example.target is not None:
        np.testing.assert_array_equal(example.target, example.expected(salt + 1), f"second {about}")
    memory.check(about)


def every(cases: Sequence[Any], kinds: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """All cases in all kinds of memory; each in one kind only on many ranks, which take long."""
    if SIZE <= 2:
        return itertools.product(cases, kinds)
    return zip(cases, itertools.cycle(kinds), strict=False)


# -- every collective, every way


@pytest.mark.algorithms
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", EXAMPLES)
def test_every_way(method: str, way: str) -> None:
    comm = lasting(way)
    turns = itertools.count()
    for count, kind in every(COUNTS, MEMORY):
        for in_place in in_place_or_not(method):
            turn = next(turns)
            check_call(comm, method, kind, count, turn % SIZE, in_place, turn)
    for root, kind in every(roots(method, SIZE), MEMORY):
        check_call(comm, method, kind, ELEMENTS + 5, root, False, root)


IN_PARTS = {"Reduce_scatter_block", "Reduce_scatter", "Scatter", "Scatterv", "Alltoall", "Alltoallv"}


def counts_as_tuned(method: str) -> list[int]:
    """Elements of a block around every limit of the sizes that are really used here."""
    comm = mpicoll.Communicator(WORLD)
    sizes = comm._channel.sizes if comm._channel is not None else None
    comm.Free()
    assert sizes is not None
    parts = SIZE if method in IN_PARTS else 1  # a slot is divided among the blocks for all ranks
    limits = {n // 8 // parts for n in (sizes.small, sizes.quiet, sizes.slot, min(sizes.far, sizes.slot))}
    around = {limit + beside for limit in limits for beside in (-1, 0, 1)}
    several = {2 * sizes.slot // 8 // parts + 77} if SIZE <= 4 else set()
    return sorted({0, 1, 3, 4, 5} | around | several)


@pytest.mark.algorithms
@pytest.mark.parametrize("method", EXAMPLES)
def test_every_size_as_tuned(method: str) -> None:
    counts = counts_as_tuned(method) if method != "Barrier" else [0]
    with using(mpicoll.Communicator(WORLD, transport="shared")) as comm:
        for turn, count in enumerate(counts):
            in_place = in_place_or_not(method)[-1] and turn % 2 == 1
            check_call(comm, method, MEMORY[turn % 3], count, turn % SIZE, in_place, turn)


# -- operations and dtypes


@pytest.mark.parametrize("way", ["narrow", "far"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_on_every_dtype(op: str, way: str) -> None:
    comm = lasting(way)
    for dtype in sorted((dtype for dtype in DTYPES if supports(op, dtype)), key=str):
        for kind, count in itertools.product(
            ("ordinary", "shared"), (3, 2 * 8 * ELEMENTS // dtype.itemsize + 7)
        ):
            check_reductions(comm, op, dtype, kind, count)


def check_reductions(
    comm: mpicoll.Communicator, op: str, dtype: np.dtype[Any], kind: str, count: int
) -> None:
    memory = Memory(kind)
    send, recv = memory.empty(count, dtype), memory.empty(count, dtype)
    send[:] = contribution(dtype, RANK, op, count)
    wanted = reference(op, dtype, count)
    about = f"{op} of {count} {dtype} in {kind} memory"
    comm.Allreduce(send, recv, getattr(MPI, op))
    np.testing.assert_array_equal(recv, wanted, about)
    part = memory.empty(count // SIZE, dtype)
    comm.Reduce_scatter_block(send[: SIZE * part.size], part, getattr(MPI, op))
    np.testing.assert_array_equal(part, wanted[RANK * part.size :][: part.size], about)
    root = count % SIZE
    comm.Reduce(
        MPI.IN_PLACE if root == RANK else send, send if root == RANK else None, getattr(MPI, op), root
    )
    if root == RANK:
        np.testing.assert_array_equal(send, wanted, about)
    memory.check(about)


@pytest.mark.parametrize("dtype", sorted((d for d in DTYPES if d.kind in "fcV"), key=str), ids=str)
def test_average(dtype: np.dtype[Any]) -> None:
    wide = np.complex128 if dtype.kind == "c" else np.longdouble if dtype == np.longdouble else np.float64
    tolerance = 2 * float(ml_dtypes.finfo(np.zeros(1, dtype).real.dtype).eps)
    comm = lasting("narrow")
    for kind, count in itertools.product(("ordinary", "mixed"), (3, 2 * 8 * ELEMENTS // dtype.itemsize + 7)):
        memory = Memory(kind)
        send, recv = memory.empty(count, dtype), memory.empty(count, dtype)
        send[:] = contribution(dtype, RANK, "SUM", count)
        comm.Allreduce(send, recv, mpicoll.AVG)
        wanted = reference("SUM", np.dtype(wide), count) / SIZE
        np.testing.assert_allclose(recv.astype(wide), wanted, rtol=tolerance, atol=tolerance / 8)
        memory.check(str(dtype))


@pytest.mark.algorithms
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_sums_of_16_bit_floats_are_rounded_once(way: str, dtype: str) -> None:
    """256 + 1 + 1 + ... never leaves 256 in bfloat16 if each sum is rounded, nor does 2048 in float16."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    large = 256.0 if dtype == "bfloat16" else 2048.0
    comm = lasting(way)
    for count in (3, 5000):
        send, recv = np.full(count, large if RANK == 0 else 1.0).astype(kind), np.zeros(count, kind)
        comm.Allreduce(send, recv)
        wanted = np.full(count, large + SIZE - 1, np.float64).astype(kind)
        assert recv.tobytes() == wanted.tobytes()


def ascending_sum(count: int, salt: int) -> Array:
    return reduce(np.add, [floats(rank, count, salt) for rank in range(SIZE)])


def floats(rank: int, count: int, salt: int) -> Array:
    """Of sizes so different that the order of addition shows."""
    generator = np.random.default_rng([rank, count, salt])
    return generator.standard_normal(count) * 10.0 ** generator.integers(-6, 6, count)


@pytest.mark.algorithms
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_bits(way: str) -> None:
    """Ranks are added in ascending order, on every rank and whatever the size and the memory."""
    comm = lasting(way)
    for salt, (count, kind) in enumerate(every((1, 5, 70, 600, 5000), MEMORY)):
        memory = Memory(kind)
        send, recv = memory.empty(count, np.float64), memory.empty(count, np.float64)
        send[:] = floats(RANK, count, salt)
        comm.Allreduce(send, recv)
        assert recv.tobytes() == ascending_sum(count, salt).tobytes(), (kind, count)


@pytest.mark.parametrize("way", WAYS)
def test_arrays_at_odd_addresses(way: str) -> None:
    comm = lasting(way)
    for count, shared_memory in itertools.product((1, 5, 700), (False, True)):
        room = 8 * count + 1
        raw = [comm.alloc(room, np.uint8) if shared_memory else np.zeros(room, np.uint8) for _ in range(2)]
        send, recv = (array[1:].view(np.float64) for array in raw)
        send[:] = data(RANK, count)
        comm.Allreduce(send, recv)
        np.testing.assert_array_equal(recv, total(SIZE, count))
        comm.Bcast(send, count % SIZE)
        np.testing.assert_array_equal(send, data(count % SIZE, count))


# -- many calls, one after the other


def random_call(comm: mpicoll.Communicator, common: random.Random, salt: int) -> None:
    """A call that all ranks draw alike."""
    method = common.choice(list(EXAMPLES))
    count = common.choice([0, 1, 3, 5, common.randrange(200), common.randrange(4 * ELEMENTS)])
    in_place = common.choice(in_place_or_not(method))
    check_call(comm, method, common.choice(MEMORY), count, common.randrange(comm.size), in_place, salt)


@pytest.mark.algorithms
@pytest.mark.parametrize("way", WAYS)
def test_calls_in_quick_succession(way: str) -> None:
    common, own = random.Random(way), random.Random(RANK)
    comm = lasting(way)
    for salt in range(TURNS):
        if own.random() < 0.05:  # now and then a rank is late
            time.sleep(0.001)
        random_call(comm, common, salt)


@pytest.mark.algorithms
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["shared", "mixed", "ordinary"])
def test_a_caller_may_spoil_its_input_at_once(way: str, kind: str) -> None:
    """Also when another rank is late, and all others wait for it or have gone on."""
    comm = lasting(way)
    for turn, method in enumerate(EXAMPLES):
        example, _ = example_in(kind, comm, method, ELEMENTS + 9, turn % SIZE, False)
        for late in range(SIZE):
            example.fill(late)
            if late == RANK:
                time.sleep(0.002)
            getattr(comm, method)(*example.args)
            spoil_input(example)
            if example.target is not None:
                np.testing.assert_array_equal(example.target, example.expected(late), method)


def test_operations_and_dtypes_in_quick_succession() -> None:
    """Small sums whose results are checked at the end only, so that nothing slows the ranks down."""
    common = random.Random(5)
    cases = []
    for salt in range(300):
        op = common.choice(OPERATIONS)
        dtype = common.choice(sorted((d for d in DTYPES if supports(op, d)), key=str))
        count = common.choice([1, 2, 5, 40])
        cases.append((op, dtype, count, np.roll(contribution(dtype, RANK, op, count), salt), salt))
    results = [np.zeros(count, dtype) for _, dtype, count, _, _ in cases]
    comm = lasting("narrow")
    for (op, _, _, send, _), recv in zip(cases, results, strict=True):
        comm.Allreduce(send, recv, getattr(MPI, op))
    for (op, dtype, count, _, salt), recv in zip(cases, results, strict=True):
        np.testing.assert_array_equal(recv, np.roll(reference(op, dtype, count), salt), f"{op} {dtype}")


@pytest.mark.algorithms
def test_two_communicators_in_turn() -> None:
    common = random.Random(2)
    with using(communicator("narrow")) as one, using(communicator("far")) as two, using(one.Dup()) as three:
        for salt in range(TURNS):
            random_call(common.choice([one, two, three]), common, salt)


@pytest.mark.algorithms
def test_uneven_groups() -> None:
    """The first rank alone, the others together, in reverse order; and all together in between."""
    group = MPI.Intracomm(WORLD.Split(min(RANK, 1), -RANK))
    with using(communicator("narrow")) as whole, using(communicator("narrow", group)) as part:
        everyone, ours = random.Random(1), random.Random(min(RANK, 1))
        for salt in range(20):
            for _ in range(1 + 2 * min(RANK, 1)):
                random_call(part, ours, salt)
            random_call(whole, everyone, salt)


def test_algorithms_over_messages_in_between() -> None:
    comm = lasting("narrow")
    for salt in range(20):
        received = np.zeros(ELEMENTS, np.int64)
        request = comm.Iallreduce(data(RANK, ELEMENTS, salt), received)
        for algorithm in ("ring", "shared", "auto", "recursive_doubling"):
            sums = np.zeros(700, np.int64)
            comm.Allreduce(data(RANK, 700, salt + 1), sums, algorithm=algorithm)
            np.testing.assert_array_equal(sums, total(SIZE, 700, salt + 1), algorithm)
        request.Wait()
        np.testing.assert_array_equal(received, total(SIZE, ELEMENTS, salt))


def test_each_thread_may_have_a_communicator_of_its_own() -> None:
    nthreads = 3
    comms = [communicator("narrow") for _ in range(nthreads)]

    def work(number: int) -> None:
        common, comm = random.Random(number), comms[number]
        for salt in range(40):
            method = common.choice(list(EXAMPLES))
            example = EXAMPLES[method](comm, common.randrange(3 * ELEMENTS), common.randrange(SIZE), False)
            example.fill(salt)
            getattr(comm, method)(*example.args)
            example.check(salt, f"{method} in thread {number}")

    with ThreadPoolExecutor(nthreads) as threads:
        for done in [threads.submit(work, number) for number in range(nthreads)]:
            done.result()
    for comm in comms:
        comm.Free()


# -- persistent calls


@pytest.mark.algorithms
@pytest.mark.parametrize("method", EXAMPLES)
@pytest.mark.parametrize("way", ["narrow", "far"])
def test_persistent_calls(method: str, way: str) -> None:
    comm = lasting(way)
    for turn, (count, kind) in enumerate(every((0, 5, ELEMENTS + 1, 3000), MEMORY)):
        in_place = in_place_or_not(method)[-1] and turn % 2 == 1
        example, memory = example_in(kind, comm, method, count, turn % SIZE, in_place)
        plan = getattr(comm, f"{method}_init")(*example.args)
        for salt in range(2):
            example.fill(salt)
            plan.Start()
            plan.Wait()
            example.check(salt, f"{method} in {kind} memory, {count=}, {in_place=}")
        plan.Free()
        memory.check(method)


@pytest.mark.algorithms
def test_persistent_calls_may_start_in_any_order() -> None:
    comm = lasting("narrow")
    running = [(EXAMPLES[method](comm, 700, 0, False), method) for method in EXAMPLES]
    plans = [getattr(comm, f"{method}_init")(*example.args) for example, method in running]
    for salt in range(3):
        for example, _ in running:
            example.fill(salt)
        order = random.Random(f"{salt} {RANK}").sample(plans, len(plans))
        type(plans[0]).Startall(order)
        sums = np.zeros(5, np.int64)
        comm.Allreduce(data(RANK, 5, salt), sums)
        np.testing.assert_array_equal(sums, total(SIZE, 5, salt))
        type(plans[0]).Waitall(order[::-1])
        for example, method in running:
            example.check(salt, method)


# -- nothing is left


def resources() -> dict[str, int]:
    """Open files, mapped pieces of memory, and KiB of the arena that are there."""
    for pid in WORLD.allgather(os.getpid()):
        shared.has_ended(pid)  # which whoever waits for long asks; it keeps a file for each
    gc.collect()
    return {
        "files": sum(not is_socket(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "arena": os.fstat(own_arena().handle.fd).st_blocks // 2,
    }


def is_socket(path: str) -> bool:
    """As one is for a moment, when another rank asks where this one is; or closed already."""
    try:
        return os.readlink(path).startswith("socket:")
    except FileNotFoundError:
        return True


def use_a_communicator(salt: int) -> None:
    with using(communicator("narrow")) as comm:
        array = comm.alloc(2000, np.int64)
        array[:] = data(RANK, 2000, salt)
        sums = np.zeros(2000, np.int64)
        plan = comm.Allreduce_init(array, sums)
        plan.Start()
        plan.Wait()
        comm.Allreduce(data(RANK, 2000, salt), sums)
        np.testing.assert_array_equal(sums, total(SIZE, 2000, salt))
        plan.Free()


def test_communicators_leave_nothing() -> None:
    for salt in range(20):
        use_a_communicator(salt)
    before = resources()
    for salt in range(2 * TURNS):
        use_a_communicator(salt)
    after = resources()
    assert after["files"] <= before["files"]
    assert after["mappings"] <= before["mappings"] + 20, "of which a few may be Python's own"
    assert after["arena"] <= before["arena"] + 64


def test_persistent_calls_leave_nothing() -> None:
    with using(communicator("narrow")) as comm:
        values, sums = np.ones(2000), np.zeros(2000)

        def start_some() -> None:
            for _ in range(20):
                plan = comm.Allreduce_init(values, sums)
                plan.Start()
                plan.Wait()
            del plan
            gc.collect()
            comm.Allreduce_init(values, sums)  # making one gives back what no rank needs any more

        start_some()
        before = resources()
        for _ in range(5):
            start_some()
        after = resources()
    assert after["files"] <= before["files"]
    assert after["arena"] <= before["arena"] + 64


def test_no_file_is_made() -> None:
    before = set(os.listdir("/dev/shm"))
    WORLD.Barrier()
    comms = [communicator("narrow") for _ in range(3)]
    arrays = [comm.alloc(1000) for comm in comms]
    found = set(os.listdir("/dev/shm"))
    WORLD.Barrier()
    assert not {name for name in found - before if "mpicoll" in name}
    assert len(arrays) == 3
    for comm in comms:
        comm.Free()


# -- ranks that are not in the same call


def one_way_or_another(first: Callable[[Any], None], others: Callable[[Any], None]) -> Callable[[Any], None]:
    return first if RANK == 0 else others


def _allreduce(count: int, dtype: str = "i8", op: MPI.Op = MPI.SUM) -> Callable[[Any], None]:
    return lambda comm: comm.Allreduce(np.zeros(count, dtype), np.zeros(count, dtype), op)


def _reduce(root: int) -> Callable[[Any], None]:
    return lambda comm: comm.Reduce(np.zeros(9), np.zeros(9), MPI.SUM, root)


def _bcast(count: int, root: int = 0) -> Callable[[Any], None]:
    return lambda comm: comm.Bcast(np.zeros(count), root)


def _scatter(count: int) -> Callable[[Any], None]:
    return lambda comm: comm.Scatter(np.zeros(count * SIZE), np.zeros(count))


def _allgather(count: int) -> Callable[[Any], None]:
    return lambda comm: comm.Allgather(np.zeros(count), np.zeros(count * SIZE))


MISMATCHES = {
    "counts": (_allreduce(3), _allreduce(4)),
    "large counts": (_allreduce(3000), _allreduce(3001)),
    "small and large": (_allreduce(3), _allreduce(3000)),
    "dtypes": (_allreduce(3, "i8"), _allreduce(3, "f8")),
    "operations": (_allreduce(3, "i8", MPI.MIN), _allreduce(3, "i8", MPI.MAX)),
    "roots": (_reduce(0), _reduce(1)),
    "roots of a broadcast": (_bcast(5, 0), _bcast(5, 1)),
    "collectives": (_allreduce(9, "f8"), _reduce(0)),
    "a barrier": (lambda comm: comm.Barrier(), _bcast(700)),
    "sizes of a broadcast": (_bcast(5), _bcast(700)),
    "blocks": (_allgather(3), _allgather(400)),
    "blocks of a scatter": (_scatter(5), _scatter(600)),
}


@pytest.mark.skipif(SIZE == 1, reason="needs another rank")
@pytest.mark.parametrize("late", [0, 1] if SIZE == 2 else [SIZE - 1])
@pytest.mark.parametrize("what", MISMATCHES)
def test_ranks_in_different_calls_are_told(what: str, late: int) -> None:
    call = one_way_or_another(*MISMATCHES[what])

    def call_and_meet(comm: mpicoll.Communicator) -> None:
        call(comm)
        comm.Barrier()  # a rank that only sends may have left the other call before

    comm = communicator("narrow")
    comm.Barrier()
    if late == RANK:
        time.sleep(0.05)  # longer than a rank waits without a look around
    WORLD.Barrier()
    start = time.monotonic()
    with pytest.raises(MismatchError, match="the ranks are in different calls") as caught:
        call_and_meet(comm)
    assert time.monotonic() - start < PROMPT
    assert "test_shared.py:" in str(caught.value)
    with pytest.raises(MismatchError):
        comm.Barrier()
    assert time.monotonic() - start < 2 * PROMPT
    comm.Free()


@pytest.mark.skipif(SIZE == 1, reason="needs another rank")
def test_a_mismatch_names_both_calls() -> None:
    comm = communicator("narrow")
    with pytest.raises(MismatchError) as caught:
        one_way_or_another(_allreduce(3, "f4", MPI.MAX), _bcast(5))(comm)
    if RANK == 0:
        text = str(caught.value)
        assert "rank 0 in Allreduce(float32[3], MAX) at test_shared.py:" in text
        assert " in Bcast(40 bytes, root=0) at test_shared.py:" in text
    comm.Free()


@pytest.mark.skipif(SIZE == 1, reason="needs another rank")
def test_a_mismatch_on_a_duplicate_leaves_the_original_alone() -> None:
    with using(communicator("narrow")) as comm:
        with comm.Dup() as duplicate, pytest.raises((MismatchError, RankFailedError)):
            one_way_or_another(_allreduce(3), _allreduce(4))(duplicate)
        sums = np.zeros(700, np.int64)
        comm.Allreduce(data(RANK, 700), sums)
        np.testing.assert_array_equal(sums, total(SIZE, 700))


# -- which transport


def uses_shared_memory(comm: mpicoll.Communicator) -> bool:
    """What the collectives themselves show: only one that shares memory knows this algorithm."""
    sums = np.zeros(3, np.int64)
    try:
        comm.Allreduce(data(RANK, 3), sums, algorithm="shared")
    except ValueError:
        return False
    np.testing.assert_array_equal(sums, total(SIZE, 3))
    return True


def test_transports() -> None:
    for transport, expected in {"auto": True, "shared": True, "messages": False}.items():
        with mpicoll.Communicator(WORLD, transport=transport) as comm:
            assert uses_shared_memory(comm) is expected
            with comm.Dup() as duplicate, comm.Split(RANK % 2) as part:
                assert uses_shared_memory(duplicate) is expected
                part.Barrier()
            sums = np.zeros(700, np.int64)
            comm.Allreduce(data(RANK, 700), sums)
            np.testing.assert_array_equal(sums, total(SIZE, 700))
    with pytest.raises(ValueError, match="transport: expected one of auto, shared, messages; got 'tcp'"):
        mpicoll.Communicator(WORLD, transport="tcp")
    with pytest.raises(ValueError, match="transport: "):
        mpicoll.Communicator(WORLD, transport="Shared")


def test_the_shared_algorithm_needs_shared_memory() -> None:
    with mpicoll.Communicator(WORLD, transport="messages") as comm:
        for method in EXAMPLES:
            example = EXAMPLES[method](comm, 3, 0, False)
            with pytest.raises(ValueError, match=r"algorithm: .*shared"):
                getattr(comm, method)(*example.args, algorithm="shared")


def refuse_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Arena:
        raise ArenaError("no memory today")

    monkeypatch.setattr(shared, "own_arena", refuse)


def refuse_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **more: Any) -> Any:
        raise MemoryError("no memory today")

    monkeypatch.setattr(Arena, "take", refuse)


def refuse_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise ArenaError("no memory today")

    monkeypatch.setattr(Arena, "map", refuse)


@pytest.fixture(params=[refuse_arena, refuse_block, refuse_mapping])
def refused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The last rank, and only it, cannot share memory."""
    if RANK == SIZE - 1:
        request.param(monkeypatch)
    yield
    monkeypatch.undo()
    WORLD.Barrier()


@pytest.mark.usefixtures("refused")
def test_auto_sends_messages_where_one_rank_cannot_share_memory() -> None:
    with mpicoll.Communicator(WORLD) as comm:
        assert not uses_shared_memory(comm)
        for method in EXAMPLES:
            example = EXAMPLES[method](comm, 300, SIZE - 1, False)
            example.fill()
            getattr(comm, method)(*example.args)
            example.check(0, method)


@pytest.mark.usefixtures("refused")
def test_shared_says_on_all_ranks_why_it_cannot_be() -> None:
    with pytest.raises(RuntimeError, match=f"got shared, but rank {SIZE - 1}: no memory today"):
        mpicoll.Communicator(WORLD, transport="shared")


def test_no_call_after_free() -> None:
    comm = communicator("narrow")
    values, sums = np.ones(5), np.zeros(5)
    comm.Allreduce(values, sums)
    plan = comm.Allreduce_init(values, sums)
    plan.Free()
    comm.Free()
    with pytest.raises(RuntimeError, match="this communicator has been freed"):
        comm.Allreduce(values, sums)


# -- processes made by fork


def forget(held: list[Array], expected: Array) -> None:
    """What a child may do: read what its parent had, forget it, and have memory of its own."""
    np.testing.assert_array_equal(held[0], expected)
    held.clear()
    gc.collect()
    mine = new_array(5000, np.int64)
    mine[:] = -1
    assert not np.array_equal(mine, expected)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "pool"])
def test_children_between_collectives(start: str) -> None:
    comm = lasting("narrow")
    held = [comm.alloc(5000, np.int64)]
    held[0][:] = data(RANK, 5000)
    for salt in range(3):
        if start == "fork":
            in_child(partial(forget, held, data(RANK, 5000)))
        else:
            with multiprocessing.get_context("fork").Pool(2) as pool:
                assert pool.map(abs, [-1, -2, -3]) == [1, 2, 3]
        sums, whole = np.zeros(5000, np.int64), comm.alloc(5000, np.int64)
        comm.Allreduce(held[0], sums)
        np.testing.assert_array_equal(sums, total(SIZE, 5000))
        comm.Allreduce(held[0], whole)
        np.testing.assert_array_equal(whole, total(SIZE, 5000))
        random_call(comm, random.Random(salt), salt)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_lives_on_does_not_disturb() -> None:
    """Its copies of this process's pages must not be what others read."""
    comm = lasting("far")
    values, sums = data(RANK, 5000), np.zeros(5000, np.int64)
    ends, stay = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(stay)
        os.read(ends, 1)  # until the parent has closed the other end
        os._exit(0)
    os.close(ends)
    for salt in range(3):
        values[:] = data(RANK, 5000, salt)
        comm.Allreduce(values, sums)
        np.testing.assert_array_equal(sums, total(SIZE, 5000, salt))
        gathered = np.zeros((SIZE, 5000), np.int64)
        comm.Allgather(values, gathered)
        np.testing.assert_array_equal(gathered, [data(rank, 5000, salt) for rank in range(SIZE)])
    os.close(stay)
    assert os.waitpid(child, 0)[1] == 0
