"""Programs on GPU memory, whatever the GPU's pace; that memory is the host's here, so any MPI can send it.

The adversary is `LateLibrary`: a GPU that does nothing before somebody has asked for it several times. What
does not wait for the GPU's work finds garbage there, always.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll import algorithms, watch
from mpicoll.faults import DeadlineError, MismatchError, RankFailedError
from mpicoll.gpu import driver
from mpicoll.gpu.driver import GpuError
from mpicoll.gpu.messages import PIPELINE, GpuMessagePlan, WideMessagePlan
from mpicoll.requests import Call, Request
from mpicoll.schedule import Schedule, chunk_bounds
from mpicoll.transports.messages import BRIEF
from mpicoll.transports.program import Layout, Pipeline, Program, compile_program
from mpicoll.watch import what

from .examples import Array, data, everyday, total, uneven

pytest.importorskip("numba_cuda", reason="numba-cuda[cu13] is not installed")

from mpicoll.kernels import reduce_cuda
from mpicoll.kernels.reduce import rounds_often

from tests import fake_cuda
from tests.fake_cuda import FakeArray, FakeLibrary

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
ODD = SIZE - 1  # the rank that does something else
Comm = mpicoll.Communicator
INT64, FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)
FLOAT16, BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
SMALL = Pipeline(segment=512, lookahead=2)  # bytes: few elements make many segments
LARGE = 1003  # elements: 16 segments of 8-byte elements
COLLECTIVES = ("allreduce", "reduce_scatter", "broadcast", "allgather", "reduce")
CASES = [(collective, name) for collective in COLLECTIVES for name in everyday(collective)]
COUNTS = sorted({0, 1, SIZE - 1, SIZE, SIZE + 1, 37})
TIMEOUT = 0.4  # seconds
PROMPT = 5.0  # seconds within which all ranks know; it takes a tenth of one where the machine is idle

several_ranks = pytest.mark.skipif(SIZE == 1, reason="needs another rank")


# -- GPUs


class _LateStream(fake_cuda._Stream):
    """Does what is put on it when it must."""

    def __init__(self) -> None:
        self.things: deque[Callable[[], object]] = deque()

    def put(self, thing: Callable[[], object] | None) -> None:
        if thing is not None:
            self.things.append(thing)

    def step(self) -> None:
        self.things.popleft()()

    def synchronise(self) -> None:
        while self.things:
            self.step()


class LateLibrary(FakeLibrary):
    """A GPU that does nothing before somebody has asked for an event, or has waited for all of a stream."""

    ASKING = 3  # times

    def __init__(self) -> None:
        super().__init__()
        self._late: dict[int, _LateStream] = defaultdict(_LateStream)
        self._recorded: dict[int, _LateStream] = {}
        self._asked: dict[int, int] = defaultdict(int)

    def stream(self, handle: int | None) -> _LateStream:
        return self._late[0 if handle in (None, 1) else handle]

    def cuEventRecord(self, event: int, stream: int | None) -> int:
        self._recorded[event] = self.stream(stream)
        return super().cuEventRecord(event, stream)

    def cuEventQuery(self, event: int) -> int:
        self._asked[event] += 1
        if self._asked[event] % self.ASKING == 0:
            self._finisher(event)()
        return super().cuEventQuery(event)

    def cuStreamWaitEvent(self, stream: int | None, event: int, flags: int) -> int:
        self.stream(stream).put(self._finisher(event))
        return 0

    def _finisher(self, event: int) -> Callable[[], None]:
        """Do what is before the event as it is recorded now."""
        words, stream = self.events[event].words, self._recorded.get(event)
        number = int(words[0])

        def finish() -> None:
            while words[1] < number:
                assert stream is not None
                stream.step()

        return finish


def fake_gpu(kind: str) -> Iterator[FakeLibrary]:
    with pytest.MonkeyPatch.context() as patch:
        library = fake_cuda.use(patch, LateLibrary() if kind == "late" else FakeLibrary())
        if kind == "threads":
            patch.setattr(fake_cuda, "PAUSES", 0.5)
        yield library
        library.close()


@pytest.fixture
def late() -> Iterator[FakeLibrary]:
    yield from fake_gpu("late")


@pytest.fixture
def threads() -> Iterator[FakeLibrary]:
    """A GPU that works meanwhile, with pauses."""
    yield from fake_gpu("threads")


@pytest.fixture(params=["late", "threads"])
def gpu(request: pytest.FixtureRequest) -> Iterator[FakeLibrary]:
    yield from fake_gpu(request.param)


@pytest.fixture(scope="module")
def comm() -> Iterator[Comm]:
    with mpicoll.Communicator(WORLD, transport="messages") as made:
        yield made


# -- collectives, as `mpicoll.calls` lays them out


def layout_of(schedule: Schedule, count: int, itemsize: int, in_place: bool) -> Layout:
    """``count`` elements in all, or about so many in each rank's block."""
    nothing = np.zeros(schedule.nchunks, np.int64)
    if schedule.collective in ("reduce_scatter", "allgather"):
        counts = uneven(count, SIZE)
        at = np.cumsum([0, *counts])[:-1]
        if schedule.collective == "allgather":
            return Layout(np.array(counts), at if in_place else nothing, at, in_place)
        return Layout(np.array(counts), at, nothing)
    bounds = chunk_bounds(count, schedule.nchunks, itemsize)
    return Layout(np.diff(bounds), bounds[:-1], bounds[:-1], in_place or schedule.collective == "broadcast")


def program_of(
    collective: str,
    name: str,
    count: int,
    dtype: np.dtype[Any] = INT64,
    pipeline: Pipeline = SMALL,
    root: int = 0,
    in_place: bool = False,
    average: bool = False,
) -> Program:
    schedule = algorithms.schedule(collective, name, SIZE, root)
    layout = layout_of(schedule, count, dtype.itemsize, in_place)
    return compile_program(schedule, RANK, layout, dtype.itemsize, pipeline, average)


class Example:
    """One collective of int64, with its arrays on the GPU: what goes in, and what must come out.

    In place where the collective can be done so and ``in_place`` says so.
    """

    def __init__(self, collective: str, count: int, root: int, in_place: bool) -> None:
        self.collective, self.count, self.root = collective, count, root
        self.at_root = root == RANK
        able = {"reduce_scatter": False, "reduce": self.at_root}.get(collective, True)
        self.in_place = in_place and able
        self.blocks = uneven(count, SIZE)
        self.begin, self.mine = sum(self.blocks[:RANK]), self.blocks[RANK]
        size = sum(self.blocks) if collective in ("reduce_scatter", "allgather") else count
        out = self.mine if collective == "reduce_scatter" else size
        own = self.mine if collective == "allgather" else size
        self.target = FakeArray(np.zeros(out, np.int64))
        inside = self.in_place or collective == "broadcast"
        self.source = self.target if inside else FakeArray(np.zeros(own, np.int64))

    @property
    def addresses(self) -> tuple[int, int]:
        return self.source.address, self.target.address

    def given(self, salt: int) -> Array:
        return data(RANK, self.mine if self.collective == "allgather" else self.source.size, salt)

    def put(self, salt: int) -> None:
        """Write the input, late, into what else is garbage."""
        garbage = np.full(self.target.size, -7)
        self.target.put(garbage)
        if self.in_place and self.collective == "allgather":
            garbage[self.begin : self.begin + self.mine] = self.given(salt)
            self.target.put(garbage)
        elif self.collective != "broadcast" or self.at_root:
            self.source.put(self.given(salt))

    def check(self, salt: int, about: str) -> None:
        found = self.target.get()
        if self.collective == "broadcast":
            wanted = data(self.root, self.count, salt)
        elif self.collective == "allgather":
            wanted = np.concatenate([data(rank, n, salt) for rank, n in enumerate(self.blocks)])
        elif self.collective == "reduce_scatter":
            wanted = total(SIZE, sum(self.blocks), salt)[self.begin : self.begin + self.mine]
        elif self.collective == "reduce" and not self.at_root:
            wanted = np.full(self.count, -7)
        else:
            wanted = total(SIZE, self.count, salt)
        np.testing.assert_array_equal(found, wanted, f"{about}, {RANK=}")
        if self.source is not self.target:
            np.testing.assert_array_equal(self.source.get(), self.given(salt), f"input changed; {about}")

    def free(self) -> None:
        for array in {self.source, self.target}:
            array.free()


def plan_for(comm: Comm, example: Example, name: str, pipeline: Pipeline) -> GpuMessagePlan:
    collective, in_place = example.collective, example.in_place
    if "reduce" in collective:
        program = program_of(collective, name, example.count, INT64, pipeline, example.root, in_place)
        return summing(comm, program)
    program = program_of_bytes(example, name, pipeline)
    return GpuMessagePlan(program, comm._private, 0, 0, None, np.dtype(np.uint8), 1.0)


def summing(comm: Comm, program: Program, stream: int = 0) -> GpuMessagePlan:
    return GpuMessagePlan(program, comm._private, 0, stream, "SUM", INT64, 1.0)


def program_of_bytes(example: Example, name: str, pipeline: Pipeline) -> Program:
    """What only moves is counted in bytes."""
    schedule = algorithms.schedule(example.collective, name, SIZE, example.root)
    elements = layout_of(schedule, example.count, 8, example.in_place)
    counts, input_at, output_at = (8 * e for e in (elements.counts, elements.input_at, elements.output_at))
    in_bytes = Layout(counts, input_at, output_at, elements.in_place)
    return compile_program(schedule, RANK, in_bytes, 1, pipeline)


def check(comm: Comm, collective: str, name: str, count: int, pipeline: Pipeline, runs: int = 2) -> None:
    """Out of place and in place, by several runs of one plan."""
    root = SIZE // 2
    for in_place in (False, True):
        example = Example(collective, count, root, in_place)
        plan = plan_for(comm, example, name, pipeline)
        for salt in range(runs):
            example.put(salt)
            plan.run(5, *example.addresses)
            example.check(salt, f"{collective} by {name}, {count=}, {in_place=}, {salt=}")
        del plan
        example.free()


# -- what comes out


@pytest.mark.algorithms
@pytest.mark.parametrize(("collective", "name"), CASES)
def test_results(late: FakeLibrary, comm: Comm, collective: str, name: str) -> None:
    for count in COUNTS:
        check(comm, collective, name, count, PIPELINE, runs=1)


@pytest.mark.algorithms
@pytest.mark.parametrize(("collective", "name"), CASES)
def test_results_in_many_segments(late: FakeLibrary, comm: Comm, collective: str, name: str) -> None:
    check(comm, collective, name, LARGE, SMALL)


@pytest.mark.parametrize("name", everyday("allreduce"))
def test_a_gpu_that_works_meanwhile(threads: FakeLibrary, comm: Comm, name: str) -> None:
    check(comm, "allreduce", name, LARGE // 4, SMALL)


def contribution(dtype: np.dtype[Any], rank: int, count: int, op: str) -> Array:
    """Small numbers, so that sums and products are exact in 16 bits, too."""
    index = np.arange(count) + 3 * rank
    values = index % 2 + 1 if op == "PROD" else index % 5
    return values.astype(dtype)


OPERATIONS = [
    (op, np.dtype(code))
    for op, codes in {
        "SUM": "bHifd",
        "PROD": "lf",
        "MIN": "hf",
        "MAX": "Bd",
        "BAND": "i",
        "BOR": "B",
        "BXOR": "L",
        "LAND": "?i",
        "LOR": "?",
        "LXOR": "b",
    }.items()
    for code in codes
] + [("MAX", FLOAT16), ("MIN", BFLOAT16)]


@pytest.mark.parametrize(("op", "dtype"), OPERATIONS, ids=str)
def test_operations(late: FakeLibrary, comm: Comm, op: str, dtype: np.dtype[Any]) -> None:
    for name in ("ring", "direct"):
        plan = GpuMessagePlan(program_of("allreduce", name, 300, dtype), comm._private, 0, 0, op, dtype, 1.0)
        given, found = FakeArray(contribution(dtype, RANK, 300, op)), FakeArray(np.zeros(300, dtype))
        plan.run(5, given.address, found.address)
        wanted = contribution(dtype, 0, 300, op)
        for rank in range(1, SIZE):
            wanted = fake_cuda._FOLDS[op](wanted, contribution(dtype, rank, 300, op)).astype(dtype)
        np.testing.assert_array_equal(found.get(), wanted, f"{op} of {dtype} by {name}")


@pytest.mark.algorithms
@pytest.mark.parametrize("name", everyday("allreduce"))
def test_average(late: FakeLibrary, comm: Comm, name: str) -> None:
    program = program_of("allreduce", name, LARGE, FLOAT32, average=True)
    plan = GpuMessagePlan(program, comm._private, 0, 0, "AVG", FLOAT32, 1 / SIZE)
    given, found = FakeArray(SIZE * data(RANK, LARGE).astype(np.float32)), FakeArray(np.zeros(LARGE, "f4"))
    wanted = total(SIZE, LARGE).astype(np.float64)
    for factor in (1.0, 0.25):
        plan.run(5, given.address, found.address)
        if SIZE > 1:  # else there is no sum to scale
            np.testing.assert_allclose(found.get(), wanted * factor, rtol=1e-5)
        plan.set_factor(0.25 / SIZE)


# -- 16-bit floats


def halves(rank: int, count: int, dtype: np.dtype[Any]) -> Array:
    """Numbers whose sum in 16 bits depends on where it is rounded; in float32 it is exact."""
    index = np.arange(count)
    return ((index * 37 + rank * 101) % 257 + 256 * (rank == 0)).astype(dtype)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("collective", ["allreduce", "reduce_scatter", "reduce"])
def test_sums_of_halves_are_rounded_once(
    gpu: FakeLibrary, comm: Comm, collective: str, dtype: np.dtype[Any]
) -> None:
    root = SIZE // 2
    for count, average in ((0, False), (1, True), (SIZE + 1, False), (901, False), (900, True)):
        blocks = uneven(count, SIZE)
        size = sum(blocks) if collective == "reduce_scatter" else count
        begin, results = 0, size
        if collective == "reduce_scatter":
            begin, results = sum(blocks[:RANK]), blocks[RANK]
        elif collective == "reduce" and root != RANK:
            results = 0
        in_place = collective != "reduce_scatter"
        name = "chain" if collective == "reduce" else "ring"
        program = program_of(collective, name, count, FLOAT32, SMALL, root, in_place, average)
        operation, factor = ("AVG", 1 / SIZE) if average else ("SUM", 1.0)
        plan = WideMessagePlan(
            program, comm._private, 0, 0, operation, dtype, factor, size, results, in_place
        )
        given, found = FakeArray(halves(RANK, size, dtype)), FakeArray(np.full(results, -7, dtype))
        exact = np.sum([halves(rank, size, dtype).astype(np.float32) for rank in range(SIZE)], axis=0)
        wanted = (exact * np.float32(factor)).astype(dtype)[begin : begin + results]
        for _ in range(2):
            plan.run(5, given.address, found.address)
            np.testing.assert_array_equal(found.get(), wanted, f"{collective}, {count=}, {average=}")
            found.put(np.full(results, -7, dtype))
        np.testing.assert_array_equal(given.get(), halves(RANK, size, dtype))


@pytest.mark.skipif(SIZE > 2, reason="more ranks widen")
def test_two_ranks_sum_in_16_bits(late: FakeLibrary, comm: Comm) -> None:
    assert not rounds_often("SUM", FLOAT16, SIZE)
    plan = GpuMessagePlan(
        program_of("allreduce", "ring", 300, FLOAT16), comm._private, 0, 0, "SUM", FLOAT16, 1.0
    )
    given, found = FakeArray(halves(RANK, 300, FLOAT16)), FakeArray(np.zeros(300, FLOAT16))
    plan.run(5, given.address, found.address)
    wanted = np.sum([halves(rank, 300, FLOAT16).astype(np.float32) for rank in range(SIZE)], axis=0)
    np.testing.assert_array_equal(found.get(), wanted.astype(FLOAT16))


# -- order


def copied(source: FakeArray, target: FakeArray) -> None:
    """Copy on the caller's stream."""
    found = driver.driver()
    with found.on(0):
        found.copy(target.address, source.address, 8 * source.size, 0)


@pytest.mark.parametrize("name", everyday("allreduce"))
def test_runs_follow_each_other_without_a_wait(gpu: FakeLibrary, comm: Comm, name: str) -> None:
    """The host is ahead of the GPU: what one run leaves in its scratch memory, the next must not disturb."""
    count = 301
    plan = summing(comm, program_of("allreduce", name, count))
    given, found = FakeArray(np.zeros(count, np.int64)), FakeArray(np.zeros(count, np.int64))
    kept = [FakeArray(np.zeros(count, np.int64)) for _ in range(6)]
    for salt, copy in enumerate(kept):
        given.put(data(RANK, count, salt))
        plan.run(5, given.address, found.address)
        copied(found, copy)
    for salt, copy in enumerate(kept):
        np.testing.assert_array_equal(copy.get(), total(SIZE, count, salt), f"{salt=}, {RANK=}")


@pytest.mark.parametrize(("collective", "name"), [("broadcast", "chain"), ("allgather", "ring")])
def test_the_output_may_still_be_read(late: FakeLibrary, comm: Comm, collective: str, name: str) -> None:
    """By what is on the caller's stream before the call; messages come right into the output."""
    example = Example(collective, 37, root=0, in_place=False)
    plan = plan_for(comm, example, name, SMALL)
    before = np.arange(example.target.size) * 11
    example.target.put(before)
    copy = FakeArray(np.zeros_like(before))
    copied(example.target, copy)
    if collective == "allgather" or example.at_root:
        example.source.put(example.given(1))
    plan.run(5, *example.addresses)
    example.check(1, collective)
    np.testing.assert_array_equal(copy.get(), before)


def test_advance_comes_back_while_the_input_is_not_there(threads: FakeLibrary, comm: Comm) -> None:
    gate = threading.Event()
    given, found = FakeArray(np.zeros(37, np.int64)), FakeArray(np.zeros(37, np.int64))
    plan = summing(comm, program_of("allreduce", "ring", 37))
    fake_cuda.in_use().stream(0).put(lambda: gate.wait(PROMPT))
    given.put(data(RANK, 37))
    plan.bind(5, given.address, found.address)
    for patience in (BRIEF, 1_000_000):
        begun = time.monotonic()
        complete = plan.advance(patience)
        assert time.monotonic() - begun < 1
        assert not complete or SIZE == 1
    gate.set()
    while not (SIZE == 1 or plan.advance()):
        pass
    np.testing.assert_array_equal(found.get(), total(SIZE, 37))


def test_what_kernels_use_is_known(late: FakeLibrary, comm: Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of it; and the two streams have about as many kernels each."""
    uses: list[Any] = []
    launches: list[Any] = []
    put, fold = GpuMessagePlan._put, fake_cuda.fold

    def noting(plan: GpuMessagePlan, use: Any, work: Callable[[int], None]) -> None:
        uses.append((list(use.writes), list(use.reads)))
        put(plan, use, work)

    def folding(
        op: str, dtype: Any, targets: Any, sources: Any, count: int, factor: float, stream: int
    ) -> None:
        ranges = ([(at, at + 8 * count) for at in places] for places in (targets, sources))
        launches.append((tuple(ranges), stream))
        fold(op, dtype, targets, sources, count, factor, stream)

    monkeypatch.setattr(GpuMessagePlan, "_put", noting)
    monkeypatch.setattr(reduce_cuda, "fold", folding)
    check(comm, "allreduce", "ring", LARGE, SMALL)
    assert [use for use, _ in launches] == (uses if SIZE > 1 else [])
    streams = [stream for _, stream in launches]
    assert 0 not in streams
    assert all(streams.count(stream) >= len(streams) / 6 for stream in set(streams))


@pytest.mark.skipif(MPI.Query_thread() < MPI.THREAD_MULTIPLE, reason="needs threads")
def test_nonblocking_on_several_streams(threads: FakeLibrary, comm: Comm) -> None:
    requests, results = [], []
    for number in range(3):
        stream = driver.driver().make_stream(0)
        given, found = (FakeArray(np.zeros(301, np.int64), stream=stream) for _ in range(2))
        given.put(data(RANK, 301, number))
        program = program_of("allreduce", "ring", 301)
        plan = summing(comm, program, stream)
        named = what("allreduce", "ring", INT64, 301, "SUM", None)
        call = Call(plan, None, named, given.address, found.address, (given, found))
        requests.append(Request(call, 7 + number, lambda: None))
        results.append(found)
    MPI.Request.Waitall(requests)
    for number, found in enumerate(results):
        np.testing.assert_array_equal(found.get(), total(SIZE, 301, number))


# -- memory


def test_memory_is_given_back(late: FakeLibrary, comm: Comm) -> None:
    given = FakeArray(data(RANK, LARGE))
    allocated, events = len(late.allocated), len(late.events)
    plan = summing(comm, program_of("allreduce", "ring", LARGE))
    assert len(late.allocated) == allocated + (SIZE > 1)
    assert (plan.scratch > 0) == (SIZE > 1)
    plan.run(5, given.address, given.address)
    del plan
    assert len(late.allocated) == allocated
    assert len(late.events) == events


@several_ranks
def test_there_is_no_memory(comm: Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_cuda.use(monkeypatch, FakeLibrary(memory=1000))
    with pytest.raises(MemoryError, match=r"GPU 0: expected room for \d+ bytes, got 1000 free"):
        summing(comm, program_of("allreduce", "ring", LARGE))
    library.close()


# -- others that do not come


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Comm]]:
    """Makes communicators that ask soon: these tests have other things to do than to wait."""
    monkeypatch.setattr(watch, "FIRST_LOOK", 0.03)
    monkeypatch.setattr(watch, "SETTLED", 0.1)
    made = []

    def make() -> Comm:
        made.append(mpicoll.Communicator(WORLD, transport="messages", timeout=TIMEOUT))
        return made[-1]

    yield make
    wait_for_all()
    for comm in made:
        comm.Free()


def wait_for_all() -> None:
    """Until all ranks are here, with MPI's own means."""
    barrier = MPI.Intracomm(WORLD).Ibarrier()
    while not barrier.Test():
        time.sleep(0.01)


def run_once(comm: Comm, count: int = 37, number: int = 3) -> GpuMessagePlan:
    call = what("allreduce", "ring", INT64, count, "SUM", None)
    comm._watch.begin(number, call)
    plan = summing(comm, program_of("allreduce", "ring", count))
    array = FakeArray(data(RANK, count))
    kept.append((plan, array, list(fake_cuda.in_use().allocated.values())))
    plan.run(number | call.mark, array.address, array.address)
    return plan


kept: list[Any] = []  # what has been broken off: MPI may still write there


@several_ranks
def test_a_rank_that_does_not_come(late: FakeLibrary, impatient: Callable[[], Comm]) -> None:
    comm = impatient()
    begun = time.monotonic()
    if RANK != ODD:
        with pytest.raises(DeadlineError, match=r"Allreduce\(int64\[37\], SUM\) at test_gpu_messages.py:"):
            run_once(comm)
        assert time.monotonic() - begun < PROMPT
        with pytest.raises(DeadlineError):
            kept[-1][0].advance()  # it does not begin anew
    wait_for_all()


@several_ranks
def test_ranks_in_different_calls(late: FakeLibrary, impatient: Callable[[], Comm]) -> None:
    comm = impatient()
    begun = time.monotonic()
    with pytest.raises(MismatchError, match=r"Allreduce\(int64\[38\], SUM\)"):
        run_once(comm, 38 if RANK == ODD else 37)
    assert time.monotonic() - begun < PROMPT


@several_ranks
def test_a_rank_whose_gpu_fails(
    late: FakeLibrary, impatient: Callable[[], Comm], monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = impatient()
    begun = time.monotonic()
    if RANK == ODD:
        late.without.add("cuEventRecord")
        with pytest.raises(GpuError, match="cuEventRecord: CUDA_ERROR_NOT_SUPPORTED"):
            run_once(comm)
        late.without.clear()
    else:
        with pytest.raises(RankFailedError, match=f"rank {ODD} has broken off a collective: GpuError"):
            run_once(comm)
    assert time.monotonic() - begun < PROMPT
