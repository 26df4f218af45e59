"""Algorithms that pay at scale: how far and over which links data goes; large rounds are made fast."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from mpicoll import algorithms
from mpicoll.algorithms.torus import grid_shape
from mpicoll.schedule import IntArray, Round, Schedule, run_lengths

RANKS = [2, 3, 5, 6, 8, 12, 13, 16, 31, 32]


def make(collective: str, name: str, nranks: int) -> Schedule:
    return algorithms.schedule(collective, name, nranks)


def distances(round_: Round, nranks: int) -> IntArray:
    """Around a ring of all ranks, the shorter way."""
    way = (round_.dst - round_.src) % nranks
    shorter: IntArray = np.minimum(way, nranks - way)
    return shorter


def way_of_all(schedule: Schedule) -> int:
    """Chunks times the distance that they go, in all rounds."""
    return sum(int(distances(round_, schedule.nranks).sum()) for round_ in schedule.rounds)


def directions(round_: Round, nranks: int) -> set[int]:
    return set(((round_.dst - round_.src) % nranks).tolist())


# --- both ways around the ring ---


@pytest.mark.parametrize("collective", ["allreduce", "reduce_scatter", "allgather"])
@pytest.mark.parametrize("nranks", RANKS)
def test_a_bidirectional_ring_uses_both_directions_of_every_link_at_once(
    collective: str, nranks: int
) -> None:
    schedule = make(collective, "bidirectional_ring", nranks)
    one_way = 0
    for round_ in schedule.rounds:
        links = Counter(zip(round_.src.tolist(), round_.dst.tolist(), strict=True))
        assert set(links.values()) == {1}
        assert directions(round_, nranks) <= {1, nranks - 1}
        one_way += len(round_) == nranks
    # The rank opposite of the owner is served from one side.
    assert one_way == (2 if collective == "allreduce" else 1) * (nranks % 2 == 0)


# --- grids ---


def test_grids_are_as_square_as_factors_allow() -> None:
    shapes = {
        1: (1, 1),
        2: (1, 2),
        7: (1, 7),
        8: (2, 4),
        12: (3, 4),
        36: (6, 6),
        30: (5, 6),
        65536: (256, 256),
    }
    assert {nranks: grid_shape(nranks) for nranks in shapes} == shapes


@pytest.mark.parametrize(
    ("collective", "name"),
    [("allreduce", "torus"), ("allreduce", "two_level"), ("reduce_scatter", "torus"), ("allgather", "torus")],
)
@pytest.mark.parametrize("nranks", RANKS)
def test_a_torus_sends_to_neighbours_of_the_grid_only(collective: str, name: str, nranks: int) -> None:
    rows, columns = grid_shape(nranks)
    for round_ in make(collective, name, nranks).rounds:
        down = (round_.dst // columns - round_.src // columns) % rows
        right = (round_.dst - round_.src) % columns
        # Down a column or right along a row; the other way in an allgather.
        allowed = {(1 % rows, 0), (0, 1), (rows - 1, 0), (0, columns - 1)}
        assert set(zip(down.tolist(), right.tolist(), strict=True)) <= allowed


@pytest.mark.parametrize("nranks", [4, 9, 16, 36])
def test_a_square_torus_uses_both_dimensions_in_every_round(nranks: int) -> None:
    _, columns = grid_shape(nranks)
    for round_ in make("allreduce", "torus", nranks).rounds:
        in_row = round_.src // columns == round_.dst // columns
        assert in_row.sum() == len(round_) // 2


@pytest.mark.parametrize("nranks", [4, 6, 12, 16, 30])
def test_two_levels_send_little_across_groups(nranks: int) -> None:
    rows, columns = grid_shape(nranks)
    sent = Counter[bool]()
    for round_ in make("allreduce", "two_level", nranks).rounds:
        sent.update((round_.src // columns != round_.dst // columns).tolist())
    # In chunks of n/p, all ranks together: 2n(a-1)/p across and 2n(b-1)/b within for each rank.
    assert sent == {True: nranks * 2 * (rows - 1), False: nranks * 2 * (columns - 1) * rows}


@pytest.mark.parametrize("nranks", [2, 3, 7, 13])
def test_without_factors_a_grid_is_a_ring(nranks: int) -> None:
    ring = make("reduce_scatter", "ring", nranks)
    for a, b in zip(make("reduce_scatter", "torus", nranks).rounds, ring.rounds, strict=True):
        assert list(a) == list(b)


# --- swing ---


@pytest.mark.parametrize("nranks", [4, 8, 16, 64])
def test_swing_goes_to_the_published_distances_on_alternate_sides(nranks: int) -> None:
    steps = nranks.bit_length() - 1
    published = [1, -1, 3, -5, 11, -21][:steps]
    near_first = list(make("allreduce", "swing", nranks).rounds)[:steps]
    far_first = list(make("allreduce", "swing_latency", nranks).rounds)
    for rounds, expected in ((near_first, published), (far_first, published[::-1])):
        for round_, distance in zip(rounds, expected, strict=True):
            even = round_.src % 2 == 0
            assert directions(round_.where(even), nranks) == {distance % nranks}
            assert directions(round_.where(~even), nranks) == {-distance % nranks}


@pytest.mark.parametrize("collective", ["allreduce", "reduce_scatter", "allgather"])
def test_swing_sends_half_of_the_data_to_neighbours_and_one_chunk_far(collective: str) -> None:
    rounds = list(make(collective, "swing", 32).rounds)
    near = rounds[-1] if collective == "allgather" else rounds[0]
    far = rounds[0] if collective == "allgather" else rounds[4]
    assert len(near) == 32 * 16 and set(distances(near, 32).tolist()) == {1}
    assert len(far) == 32 and set(distances(far, 32).tolist()) == {11}


# --- Bine trees ---


@pytest.mark.parametrize("nranks", [2, 4, 8, 16, 32, 64])
def test_a_bine_root_serves_the_published_distances(nranks: int) -> None:
    steps = nranks.bit_length() - 1
    published = [1, -1, 3, -5, 11, -21][:steps]
    for round_, distance in zip(make("broadcast", "bine", nranks).rounds, published[::-1], strict=True):
        assert round_.dst[round_.src == 0].tolist() == [distance % nranks]


@pytest.mark.parametrize("collective", ["broadcast", "reduce", "scatter", "gather"])
@pytest.mark.parametrize("nranks", [8, 12, 13, 16, 31, 32, 100, 128])
def test_bine_trees_are_shorter_than_binomial_ones(collective: str, nranks: int) -> None:
    bine, binomial = (make(collective, name, nranks) for name in ("bine", "binomial"))
    assert way_of_all(bine) < way_of_all(binomial)
    farthest = max(distances(round_, nranks).max() for round_ in bine.rounds)
    assert farthest <= nranks // 3 + 1


# --- PAT ---


@pytest.mark.parametrize("nranks", [5, 8, 13, 16, 33])
def test_pat_sends_few_chunks_far_and_many_near(nranks: int) -> None:
    sizes = [len(round_) // nranks for round_ in make("allgather", "pat", nranks).rounds]
    assert sizes[0] == 1 and sizes[-1] == nranks // 2 and sizes == sorted(sizes)
    forward = [directions(round_, nranks) for round_ in make("allgather", "pat", nranks).rounds]
    assert forward == [{1 << k} for k in reversed(range(len(sizes)))]
    assert way_of_all(make("allgather", "pat", nranks)) < way_of_all(make("allgather", "bruck", nranks))


# --- scale ---


@pytest.mark.parametrize(
    ("collective", "name"),
    [
        ("allreduce", "bidirectional_ring"),
        ("allreduce", "torus"),
        ("allreduce", "two_level"),
        ("reduce_scatter", "torus"),
        ("allgather", "bidirectional_ring"),
    ],
)
@pytest.mark.parametrize("nranks", [1, 2, 7, 8, 12, 16, 30])
def test_runs_are_rounds_of_the_same_messages(collective: str, name: str, nranks: int) -> None:
    schedule = make(collective, name, nranks)
    lengths = run_lengths(schedule)
    assert sum(lengths) == schedule.nrounds and len(lengths) <= 6
    messages = [[column.tolist() for column in round_.messages()] for round_ in schedule.rounds]
    for end, length in zip(itertools.accumulate(lengths), lengths, strict=True):
        assert messages[end - length : end] == [messages[end - 1]] * length


@pytest.mark.parametrize(
    ("collective", "name", "nranks"),
    [
        ("allreduce", "bidirectional_ring", 65_536),
        ("allreduce", "torus", 65_536),
        ("allreduce", "two_level", 65_536),
        ("allreduce", "swing", 65_536),
        ("allreduce", "swing_latency", 65_536),
        ("broadcast", "bine", 100_000),
        ("reduce", "bine", 65_536),
        ("gather", "bine", 65_536),
        ("allgather", "torus", 65_536),
        ("allgather", "pat", 1024),
    ],
)
def test_rounds_of_many_ranks_are_made_fast(collective: str, name: str, nranks: int) -> None:
    schedule = make(collective, name, nranks)
    started = time.perf_counter()
    for k in (0, schedule.nrounds // 2, schedule.nrounds - 1):
        assert len(schedule.make_round(k)) >= 1
    assert time.perf_counter() - started < 5
