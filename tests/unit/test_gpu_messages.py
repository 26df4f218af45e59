"""What the CUDA-aware transport makes of a program's rows: as few kernels as can be."""

from __future__ import annotations

import numpy as np
import pytest

from mpicoll import algorithms
from mpicoll.gpu import messages
from mpicoll.gpu.messages import MOST_SOURCES, _Range, _rows, _Use
from mpicoll.schedule import chunk_bounds
from mpicoll.transports.program import Layout, Op, Pipeline, Program, compile_program

COUNT, ITEMSIZE = 1000, 4


def program_of(name: str, nranks: int, rank: int, average: bool = False) -> Program:
    schedule = algorithms.schedule("allreduce", name, nranks)
    bounds = chunk_bounds(COUNT, schedule.nchunks, 1)
    layout = Layout(np.diff(bounds), bounds[:-1], bounds[:-1])
    return compile_program(schedule, rank, layout, ITEMSIZE, Pipeline(1 << 20), average)


def sources(program: Program) -> list[int]:
    """Of each kernel, how many; negative where it scales."""
    return [(-1 if r.scales else 1) * len(r.sources) for r in _rows(program) if r.op == Op.REDUCE]


def test_reductions_into_one_place_are_one_kernel() -> None:
    assert sources(program_of("direct", 4, rank=0)) == [4]
    assert sources(program_of("direct", 4, rank=1)) == [4]
    # What comes from several lower ranks is added up first, for the order of addition is that of ranks.
    assert sources(program_of("direct", 4, rank=2)) == [2, 3]


def test_an_average_is_scaled_by_the_last_kernel() -> None:
    assert sources(program_of("direct", 4, rank=2, average=True)) == [2, -3]
    assert sources(program_of("ring", 3, rank=0, average=True)) == [2, -2]


def test_other_places_are_other_kernels() -> None:
    assert sources(program_of("ring", 5, rank=1)) == [2, 2, 2, 2]


def test_a_kernel_has_only_so_many_sources() -> None:
    found = sources(program_of("direct", 21, rank=0))
    assert max(found) == MOST_SOURCES
    assert sum(count - 1 for count in found) == 20  # each further kernel goes on with the sum


def test_what_is_scaled_is_complete() -> None:
    """No schedule adds to it, but were there one, that would be another kernel."""
    reduce, scale = (
        [(Op.REDUCE, -1, -1, 5, 1, 0, a, 0, 0, 40) for a in (0, 1)],
        (Op.SCALE, -1, -1, 5, 1, 0, 0, 0, 0, 0),
    )
    rows = np.array([reduce[0], scale, reduce[1]], np.int64)
    assert sources(Program(rows, 0, 0)) == [-2, 2]


def test_everything_else_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for a row where nothing is joined."""
    monkeypatch.setattr(messages, "MOST_SOURCES", 1)
    for name in algorithms.names("allreduce"):
        program = program_of(name, 6, rank=4)
        rows = _rows(program)
        assert [row.op for row in rows] == program.rows[:, 0].tolist()
        for row, (op, request, peer, size, dst, dst_at, a, a_at, b, b_at) in zip(
            rows, program.rows.tolist(), strict=True
        ):
            assert (row.request, row.peer, row.size) == (request, peer, size)
            assert row.targets == (((dst, dst_at),) if op not in (Op.WAIT, Op.SEND) else ())
            read = {Op.REDUCE: ((a, a_at), (b, b_at)), Op.COPY: ((a, a_at),), Op.SEND: ((a, a_at),)}
            assert row.sources == read.get(Op(op), ())


A, B, BOTH, LATER = _Range(0, 8), _Range(8, 16), _Range(4, 12), _Range(16, 24)


@pytest.mark.parametrize(
    ("first", "second", "excludes"),
    [
        (_Use([A], []), _Use([A], []), False),
        (_Use([A], []), _Use([], [A]), True),
        (_Use([], [A]), _Use([A], []), True),
        (_Use([], [A]), _Use([], [A]), True),
        (_Use([], [A]), _Use([B], [LATER]), False),
        (_Use([B, LATER], [A]), _Use([], [BOTH]), True),
        (_Use([LATER], [BOTH]), _Use([A], []), True),
        (_Use([], [BOTH]), _Use([LATER, B], []), True),
    ],
)
def test_what_excludes_what(first: _Use, second: _Use, excludes: bool) -> None:
    assert first.excludes(second) == second.excludes(first) == excludes
