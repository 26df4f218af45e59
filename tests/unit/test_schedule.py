"""The description itself: columns, rounds made when asked for, chunk bounds."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpicoll import algorithms
from mpicoll.schedule import (
    CACHE_LINE,
    COPY,
    REDUCE,
    Round,
    Schedule,
    Transfer,
    check_shape,
    chunk_bounds,
    in_sequence,
    mirrored,
)

TRANSFERS = [Transfer(0, 1, 5, COPY), Transfer(1, 2, 0, REDUCE), Transfer(2, 0, 3, COPY)]


def test_a_round_gives_back_the_transfers_it_was_made_of() -> None:
    assert list(Round.from_transfers(TRANSFERS)) == TRANSFERS
    assert list(Round.from_transfers([])) == []


def test_single_numbers_are_repeated_in_a_round() -> None:
    assert list(Round.of(3, [0, 1], 7, REDUCE)) == [Transfer(3, 0, 7, REDUCE), Transfer(3, 1, 7, REDUCE)]


def test_ranges_wrap_around_and_stay_in_ascending_order() -> None:
    ranges = Round.of_ranges([0, 1, 2], [1, 2, 0], first=[4, 1, 0], count=[3, 2, 0], nchunks=6, op=COPY)
    chunks = [(t.src, t.dst, t.chunk) for t in ranges]
    assert chunks == [(0, 1, 0), (0, 1, 4), (0, 1, 5), (1, 2, 1), (1, 2, 2)]


def test_union_and_involving_keep_the_order_and_the_operation() -> None:
    first, rest = Round.from_transfers(TRANSFERS[:1]), Round.from_transfers(TRANSFERS[1:])
    union = Round.union([first, rest])
    assert list(union) == TRANSFERS
    assert list(union.involving(1)) == TRANSFERS[:2]


def test_a_schedule_from_rounds_leaves_out_empty_ones() -> None:
    rounds = [Round.from_transfers(ts) for ts in ([], TRANSFERS[:1], [], TRANSFERS[1:])]
    schedule = Schedule.from_rounds("test", "allgather", 3, 6, rounds)
    assert schedule.nrounds == 2
    assert [list(r) for r in schedule.rounds] == [TRANSFERS[:1], TRANSFERS[1:]]


def test_phases_run_one_after_the_other_and_may_be_empty() -> None:
    rounds = [Round.from_transfers([t]) for t in TRANSFERS]
    phases = [
        Schedule.from_rounds("phase", "allgather", 3, 6, part)
        for part in ([], rounds[:1], [], rounds[1:], [])
    ]
    joined = in_sequence("joined", "allgather", phases)
    assert (joined.name, joined.nranks, joined.nchunks) == ("joined", 3, 6)
    assert [list(r) for r in joined.rounds] == [[t] for t in TRANSFERS]


def test_the_mirror_of_a_broadcast_reduces_and_its_mirror_is_the_broadcast() -> None:
    broadcast = algorithms.schedule("broadcast", "binomial", 6, root=2)
    reduce = mirrored(broadcast, "reduce")
    assert (reduce.collective, reduce.root, reduce.nrounds) == ("reduce", 2, broadcast.nrounds)
    last = [Transfer(t.dst, t.src, t.chunk, REDUCE) for t in broadcast.make_round(0)]
    assert list(reduce.make_round(reduce.nrounds - 1)) == last
    again = mirrored(reduce, "broadcast")
    assert [list(r) for r in again.rounds] == [list(r) for r in broadcast.rounds]


@given(
    count=st.integers(0, 10_000),
    nchunks=st.integers(1, 130),
    itemsize=st.sampled_from([1, 2, 4, 8, 16, 64, 128]),
)
def test_chunk_bounds_cover_everything_in_even_whole_cache_lines(
    count: int, nchunks: int, itemsize: int
) -> None:
    bounds = chunk_bounds(count, nchunks, itemsize)
    sizes = np.diff(bounds)
    per_line = max(1, CACHE_LINE // itemsize)
    assert (len(bounds), bounds[0], bounds[-1]) == (nchunks + 1, 0, count)
    assert (sizes >= 0).all()
    assert (bounds[bounds < count] % per_line == 0).all()
    assert sizes.max() - sizes.min() < 2 * per_line


def test_chunk_bounds_beyond_32_bits() -> None:
    assert chunk_bounds(2**40 + 1, 2).tolist() == [0, 2**39, 2**40 + 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nranks": 0}, "nranks: expected at least 1, got 0"),
        ({"nranks": 3, "root": 3}, "root: expected a rank from 0 to 2, got 3"),
        ({"nranks": 3, "root": -1}, "root: expected a rank from 0 to 2, got -1"),
        ({"nranks": 3, "nchunks": 0}, "nchunks: expected at least 1, got 0"),
    ],
)
def test_impossible_shapes_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_shape(**arguments)


def test_a_ring_of_4096_ranks_is_made_round_by_round() -> None:
    started = time.perf_counter()
    ring = algorithms.schedule("allreduce", "ring", 4096)
    one = ring.make_round(5000)
    seconds = time.perf_counter() - started
    assert ring.nrounds == 2 * 4095
    assert len(one) == 4096
    assert seconds < 0.05


def test_one_ranks_part_of_a_ring_of_4096_ranks_fits_in_little_memory() -> None:
    ring = algorithms.schedule("allreduce", "ring", 4096)
    tracemalloc.start()
    mine = [round_.involving(7) for round_ in ring.rounds]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(round_) for round_ in mine) == 2 * ring.nrounds
    assert {(t.src, t.dst) for t in mine[-1]} == {(6, 7), (7, 8)}
    assert peak < 20e6  # bytes; all 33 million transfers as columns alone would take 0.8 GB
