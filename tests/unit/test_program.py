"""Compiled programs keep their schedule's meaning: every algorithm, run by a strict interpreter.

The result must have the bits of `reference.execute`, which runs the schedule itself: so what is compared is
not only which ranks' data were added, but also in which order.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicoll import algorithms
from mpicoll.schedule import IntArray, Schedule, chunk_bounds
from mpicoll.transports import program as compiler
from mpicoll.transports.program import COLUMNS, Buffer, Layout, Op, Pipeline, Program, compile_program
from tests.unit import interpreter, reference
from tests.unit.interpreter import DELIVERIES, Memory, ProgramError
from tests.unit.reference import AT_SCALE, CASES, ROOTED, SUMS, Array

RANKS = range(1, 10)
FEW_RANKS = (6,)  # for algorithms at scale: folded, on a grid, in trees that are not full
COUNTS = (0, 1, 7, 24, 101)  # elements in all; 24 is a multiple of every segment
LOOKAHEADS = (0, 1, 2, 5)
STRIDES = (1, 2, 1000)
SEGMENTS = (16, 64)  # bytes
CONFIGURATIONS = len(COUNTS) * len(LOOKAHEADS) * len(STRIDES)
PER_RANK_COUNT = 20  # configurations tried for each number of ranks: any three in a row try all of them
FLOAT64 = np.dtype(np.float64)
BYTE = np.dtype(np.uint8)


@dataclass(frozen=True)
class Case:
    """Everything a program depends on, and how its messages travel. Repr is what hypothesis prints."""

    collective: str
    name: str
    nranks: int
    root: int
    nchunks: int | None
    count: int
    pipeline: Pipeline
    uneven: bool  # chunks of any size at any place, each rank having places of its own
    in_place: bool
    average: bool
    delivery: str
    seed: int

    @property
    def dtype(self) -> np.dtype[np.float64] | np.dtype[np.uint8]:
        return FLOAT64 if self.collective in SUMS else BYTE

    def schedule(self) -> Schedule:
        return _schedule(self.collective, self.name, self.nranks, self.root, self.nchunks)


@cache
def _schedule(collective: str, name: str, nranks: int, root: int, nchunks: int | None) -> Schedule:
    return algorithms.schedule(collective, name, nranks, root, nchunks)


# -- layouts


def chunk_counts(case: Case, schedule: Schedule, choice: random.Random) -> IntArray:
    """Elements of each chunk; as `calls` does it, or uneven."""
    if case.collective == "barrier":
        return np.zeros(1, np.int64)
    if case.name == "bruck" and case.collective == "alltoall":
        return np.full(schedule.nchunks, case.count // schedule.nranks)
    if case.uneven:
        most = 2 * case.count // schedule.nchunks + 1
        return np.array([choice.randint(0, most) for _ in range(schedule.nchunks)])
    return np.diff(chunk_bounds(case.count, schedule.nchunks, case.dtype.itemsize))


def places(case: Case, chunks: IntArray, counts: IntArray, choice: random.Random) -> IntArray:
    """Where chunks lie: one after the other, or shuffled with gaps."""
    at = np.zeros(len(counts), np.int64)
    order, end = chunks.tolist(), 3
    if case.uneven:
        choice.shuffle(order)
    for chunk in order:
        at[chunk] = end
        end += int(counts[chunk]) + (choice.randint(0, 2) if case.uneven else 0)
    return at


def rank_layout(case: Case, schedule: Schedule, rank: int, counts: IntArray) -> Layout:
    """The rank's layout, with nothing but what the rank itself would know."""
    choice = random.Random(f"{case.seed} {rank}")
    inputs, outputs = schedule.inputs(rank), schedule.outputs(rank)
    if case.name in ("direct", "pairwise") and case.uneven:
        # The v-collectives: others' counts are not known, so they must not matter.
        known = np.zeros_like(counts)
        concerned = np.union1d(inputs, outputs)
        known[concerned] = counts[concerned]
        counts = known
    in_place = case.in_place and case.collective != "alltoall"
    both = np.union1d(inputs, outputs) if in_place else inputs
    input_at = places(case, both, counts, choice)
    output_at = input_at if in_place else places(case, outputs, counts, choice)
    return Layout(counts, input_at, output_at, in_place)


# -- data


def contribution(case: Case, counts: IntArray) -> reference.Contribution:
    """Numbers whose sum depends on the order of addition; for what only moves, random bytes."""

    def contribute(rank: int, chunk: int) -> Array:
        random = np.random.default_rng((case.seed, rank, chunk))
        size = int(counts[chunk])
        if case.dtype == BYTE:
            return random.integers(0, 256, size).astype(np.uint8)
        return random.standard_normal(size) * 10.0 ** random.integers(-4, 5, size)

    return contribute


def fill(memory: list[Memory], schedule: Schedule, rank: int, layout: Layout, state: reference.State) -> None:
    buffer = memory[Buffer.OUTPUT if layout.in_place else Buffer.INPUT]
    for chunk in schedule.inputs(rank).tolist():
        values = state[rank][chunk]
        start, stop = interpreter.extent(layout.input_at, layout, chunk, values.dtype)
        buffer.data[start:stop] = values.view(np.uint8)
        buffer.defined[start:stop] = True


# -- one case, from schedule to checked result


def compile_all(case: Case, layouts: list[Layout]) -> list[Program]:
    args = (case.dtype.itemsize, case.pipeline, case.average)
    return [compile_program(case.schedule(), rank, layout, *args) for rank, layout in enumerate(layouts)]


def run(case: Case) -> None:
    """Compile all ranks' programs, execute them, compare every byte with the schedule's own result."""
    schedule = case.schedule()
    counts = chunk_counts(case, schedule, random.Random(case.seed))
    layouts = [rank_layout(case, schedule, rank, counts) for rank in range(case.nranks)]
    programs = compile_all(case, layouts)
    contribute = contribution(case, counts)
    start = reference.start(schedule, contribute)
    end = reference.execute(schedule, contribute)
    size = 2 * int(counts.sum()) + 3 * schedule.nchunks + 8
    memories = []
    for rank, (layout, program) in enumerate(zip(layouts, programs, strict=True)):
        memory = interpreter.memory_of(schedule, rank, layout, case.dtype, program.scratch, size)
        fill(memory, schedule, rank, layout, start)
        memories.append(memory)
    before = [[m.data.copy() for m in memory[:2]] for memory in memories]
    interpreter.execute(programs, memories, case.dtype, case.delivery, case.seed)
    factor = interpreter.FACTOR if case.average and case.nranks > 1 else 1
    for rank, layout in enumerate(layouts):
        for chunk in schedule.outputs(rank).tolist():
            wanted = (end[rank][chunk] * factor).astype(case.dtype)
            first, last = interpreter.extent(layout.output_at, layout, chunk, case.dtype)
            before[rank][Buffer.OUTPUT][first:last] = wanted.view(np.uint8)
        for buffer in (Buffer.INPUT, Buffer.OUTPUT):
            np.testing.assert_array_equal(memories[rank][buffer].data, before[rank][buffer], f"rank {rank}")
    if case.collective != "barrier":
        check_no_empty_rows(programs)


def check_no_empty_rows(programs: list[Program]) -> None:
    for program in programs:
        columns = dict(zip(COLUMNS, program.rows.T, strict=True))
        assert (columns["count"][columns["op"] != Op.WAIT] > 0).all()


def configurations(collective: str, name: str, nranks: int) -> list[Case]:
    """Every count with every lookahead and stride over the numbers of ranks; the rest drawn at random."""
    choice = random.Random(f"{collective} {name} {nranks}")
    roots = reference.roots(collective, nranks)
    chunk_numbers = (1, 2, 3, 8, None) if algorithms.pipelines(collective, name) else (None,)
    cases = []
    for i in range(nranks * PER_RANK_COUNT, (nranks + 1) * PER_RANK_COUNT):
        # The three lengths have no common factor, so counting through all of them at once meets every triple.
        lookahead, stride = LOOKAHEADS[i % 4], STRIDES[i % 3]
        cases.append(
            Case(
                collective,
                name,
                nranks,
                root=roots[i % len(roots)],
                nchunks=choice.choice(chunk_numbers),
                count=COUNTS[i % 5],
                pipeline=Pipeline(
                    choice.choice(SEGMENTS), lookahead, stride, choice.choice((0, 0, 1, 4, 12))
                ),
                uneven=choice.random() < 0.5,
                in_place=choice.random() < 0.5,
                average=collective in SUMS and choice.random() < 0.5,
                delivery=choice.choice(DELIVERIES),
                seed=i,
            )
        )
    return cases


@pytest.mark.parametrize(("collective", "name"), CASES)
def test_programs_do_what_their_schedule_says(collective: str, name: str) -> None:
    assert 3 * PER_RANK_COUNT == CONFIGURATIONS
    for nranks in FEW_RANKS if name in AT_SCALE else RANKS:
        for case in configurations(collective, name, nranks):
            try:
                run(case)
            except AssertionError as error:
                raise AssertionError(f"{case}\n{error}") from error


@st.composite
def cases(draw: st.DrawFn) -> Case:
    collective, name = draw(st.sampled_from(CASES))
    nranks = draw(st.integers(1, 9))
    pipelines = algorithms.pipelines(collective, name)
    return Case(
        collective,
        name,
        nranks,
        root=draw(st.integers(0, nranks - 1)) if collective in ROOTED else 0,
        nchunks=draw(st.integers(1, 9)) if pipelines else None,
        count=draw(st.integers(0, 200)),
        pipeline=Pipeline(
            draw(st.integers(1, 100)),
            draw(st.integers(0, 8)),
            draw(st.sampled_from((1, 2, 3, 5, 999))),
            draw(st.integers(0, 8)),
        ),
        uneven=draw(st.booleans()),
        in_place=draw(st.booleans()),
        average=collective in SUMS and draw(st.booleans()),
        delivery=draw(st.sampled_from(DELIVERIES)),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=300)
@given(cases())
def test_any_combination_does_what_the_schedule_says(case: Case) -> None:
    run(case)


# -- what else a program promises


def ring_program(segment: int, lookahead: int = 2, count: int = 96) -> list[tuple[int, ...]]:
    """Rank 0 of 3, allreduce of float64, in INPUT and OUTPUT."""
    schedule = algorithms.schedule("allreduce", "ring", 3)
    bounds = chunk_bounds(count, 3, 8)
    layout = Layout(np.diff(bounds), bounds[:-1], bounds[:-1])
    rows = compile_program(schedule, 0, layout, 8, Pipeline(segment, lookahead)).rows
    return [tuple(row[:4]) for row in rows.tolist()]


def test_the_longest_chunk_is_cut_into_segments_and_short_ones_are_not() -> None:
    whole = [row for row in ring_program(segment=256) if row[0] == Op.SEND]
    halves = [row for row in ring_program(segment=128) if row[0] == Op.SEND]
    assert [row[3] for row in whole] == [256] * 4
    assert [row[3] for row in halves] == [128] * 8


def test_receives_are_posted_ahead_but_no_farther_than_asked() -> None:
    def posted_at_once(lookahead: int) -> int:
        ops = [row[0] for row in ring_program(segment=64, lookahead=lookahead, count=960)]
        outstanding = np.cumsum([{Op.RECV: 1, Op.WAIT: 0}.get(Op(op), 0) for op in ops])
        return int(outstanding[ops.index(Op.SEND)])

    assert [posted_at_once(ahead) for ahead in (0, 1, 2, 5)] == [1, 2, 3, 6]


def test_sends_begin_ahead_but_not_before_their_data_are_there() -> None:
    """With two ranks all that is sent first is input; in the second shot every segment must come first."""

    def begun_at_once(algorithm: str, early: int) -> int:
        schedule = algorithms.schedule("allreduce", algorithm, 2)
        bounds = chunk_bounds(960, schedule.nchunks, 8)
        layout = Layout(np.diff(bounds), bounds[:-1], bounds[:-1])
        pipeline = Pipeline(960 * 8 // 8 // schedule.nchunks, 0, 1, early)
        ops: list[int] = compile_program(schedule, 0, layout, 8, pipeline).rows[:, 0].tolist()
        return ops[: ops.index(Op.WAIT)].count(Op.SEND)

    assert [begun_at_once("recursive_doubling", early) for early in (0, 1, 4, 99)] == [1, 2, 5, 8]
    assert begun_at_once("two_shot", 99) < 16


def test_what_one_rank_sends_another_in_a_round_is_one_message() -> None:
    schedule = algorithms.schedule("alltoall", "bruck", 8)
    counts = np.full(64, 5)
    at = np.arange(64) * 5
    program = compile_program(schedule, 3, Layout(counts, at, at), 1, Pipeline(4096))
    sent = [row for row in program.rows.tolist() if row[0] == Op.SEND]
    assert [row[3] for row in sent] == [4 * 5] * 3  # four of the eight distances have any one bit set


def test_no_program_copies_an_input_that_it_only_sends() -> None:
    schedule = algorithms.schedule("broadcast", "chain", 4, nchunks=4)
    bounds = chunk_bounds(1000, 4, 1)
    layout = Layout(np.diff(bounds), bounds[:-1], bounds[:-1], in_place=True)
    for rank in range(4):
        program = compile_program(schedule, rank, layout, 1, Pipeline(64))
        assert program.scratch == 0
        assert not (program.rows[:, 0] == Op.COPY).any()


def test_counts_and_offsets_beyond_32_bits_are_cut_into_messages_that_mpi_can_send() -> None:
    schedule = algorithms.schedule("broadcast", "binomial", 2)
    counts = np.array([(1 << 32) + 5])
    layout = Layout(counts, np.zeros(1, np.int64), np.zeros(1, np.int64), in_place=True)
    rows = compile_program(schedule, 0, layout, 8, Pipeline(1 << 30)).rows
    sent = rows[rows[:, 0] == Op.SEND]
    assert sent[:, 3].sum() == 8 * counts[0]
    assert sent[:, 3].max() <= 1 << 30
    assert sent[:, 7].tolist() == [0, *np.cumsum(sent[:-1, 3])]


# -- the proof can fail: planted faults in the compiler, and in programs


def is_caught(collective: str, name: str) -> str:
    """What the interpreter says of the compiler as it now is; empty if it finds nothing."""
    for nranks in (2, 3, 4, 5):
        for case in configurations(collective, name, nranks):
            try:
                run(case)
            except AssertionError as error:
                return str(error)
    return ""


ORIGINAL = {name: getattr(compiler._Compiler, name) for name in ("_reduce", "_allocate", "_steps", "_emit")}


def fold_descending(self: Any, piece: Any, received: list[Any], round: int) -> None:
    ORIGINAL["_reduce"](self, piece, received[::-1], round)


def half_as_much(self: Any, nbytes: int) -> Any:
    return ORIGINAL["_allocate"](self, nbytes // 2)


def odd_ranks_backwards(self: Any) -> list[Any]:
    steps: list[Any] = ORIGINAL["_steps"](self)
    return [step[::-1] for step in steps][:: -1 if self.rank % 2 else 1]


def no_waits(self: Any, op: Op, *args: Any, **named: Any) -> None:
    if op != Op.WAIT:
        ORIGINAL["_emit"](self, op, *args, **named)


FAULTS = [
    ("_readers", lambda self, piece: [], "allreduce", "double_tree", "sends from it"),
    ("_readers", lambda self, piece: [], "allreduce", "recursive_doubling", "sends from it"),
    ("_may_post", lambda *args: True, "allreduce", "ring", "it"),
    ("_may_post", lambda *args: True, "allreduce", "rabenseifner", "it"),
    ("_reduce", fold_descending, "allreduce", "direct", "not equal"),
    ("_allocate", half_as_much, "gather", "binomial", ""),
    ("_steps", odd_ranks_backwards, "allgather", "ring", ""),
    ("_emit", no_waits, "broadcast", "binomial", "request"),
    ("_scale_if_complete", lambda *args: None, "allreduce", "double_tree", "not equal"),
    ("_copy_unmoved", lambda self: None, "alltoall", "pairwise", "not equal"),
]


@pytest.mark.parametrize("method, fault, collective, name, words", FAULTS)
def test_a_planted_fault_is_caught(
    monkeypatch: pytest.MonkeyPatch, method: str, fault: Any, collective: str, name: str, words: str
) -> None:
    monkeypatch.setattr(compiler._Compiler, method, fault)
    said = is_caught(collective, name)
    assert said
    assert words in said


def row(op: Op, request: int = -1, peer: int = -1, count: int = 0, dst: int = 0, a: int = 0) -> list[int]:
    """A row on OUTPUT, at these offsets."""
    return [op, request, peer, count, Buffer.OUTPUT, dst, Buffer.OUTPUT, a, Buffer.OUTPUT, 0]


def outcome(first: list[list[int]], second: list[list[int]], delivery: str, requests: int = 1) -> str:
    """What the interpreter says of two hand-written programs on 16 bytes each, of which 8 have a value."""
    programs = [Program(np.array(rows).reshape(-1, len(COLUMNS)), 0, requests) for rows in (first, second)]
    memories = [[Memory.of(0), Memory.of(16, writable=True)] for _ in programs]
    for memory in memories:
        memory[Buffer.OUTPUT].defined[:8] = True
    try:
        interpreter.execute(programs, memories, BYTE, delivery)
    except ProgramError as error:
        return str(error)
    return ""


def send(count: int = 8, a: int = 0, request: int = 0, peer: int = 1) -> list[int]:
    return row(Op.SEND, request, peer, count, a=a)


def recv(count: int = 8, dst: int = 8, request: int = 0, peer: int = 0) -> list[int]:
    return row(Op.RECV, request, peer, count, dst=dst)


WAIT = row(Op.WAIT, 0)


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize(
    "first, second, words",
    [
        ([send(), WAIT], [recv(), WAIT], ""),
        ([send()], [recv(), WAIT], "never waited for"),
        ([send(), WAIT, WAIT], [recv(), WAIT], "not in use"),
        ([send(), send(), WAIT], [recv(), WAIT], "still in use"),
        ([send(request=1), WAIT], [recv(), WAIT], "expected a request below 1"),
        ([send(count=7), WAIT], [recv(), WAIT], "7 sent, 8 received"),
        ([send(), WAIT], [recv(dst=9), WAIT], "not within 16 bytes"),
        ([send(a=4), WAIT], [recv(), WAIT], "no value yet"),
        ([send(), row(Op.COPY, count=8, dst=0, a=0), WAIT], [recv(), WAIT], "copies to where it reads"),
        ([send(), row(Op.SCALE, count=8), WAIT], [recv(), WAIT], "sends from it"),
        ([send(), WAIT], [recv(), row(Op.COPY, count=4, dst=0, a=8), WAIT], "receives into it"),
        ([send(), WAIT], [recv(), row(Op.SCALE, count=1, dst=9), WAIT], "receives into it"),
        ([send(peer=0), WAIT], [recv(), WAIT], "no such peer"),
        ([], [recv(), WAIT], "deadlock"),
    ],
)
def test_the_interpreter_objects(first: list[Any], second: list[Any], words: str, delivery: str) -> None:
    said = outcome(first, second, delivery)
    assert words in said
    assert bool(said) == bool(words)


def test_a_send_does_not_end_before_its_receive_is_posted() -> None:
    first = [send(), WAIT, recv(peer=1), WAIT]
    second = [send(peer=0), WAIT, recv(peer=0), WAIT]
    said = {delivery: outcome(first, second, delivery)[:8] for delivery in DELIVERIES}
    assert said == {"rendezvous": "deadlock", "late": "deadlock", "eager": ""}
