"""Every algorithm on plain numbers, against NumPy; and its costs, against what its docstring says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mpicoll import algorithms
from mpicoll.schedule import REDUCE, Schedule
from tests.unit import reference
from tests.unit.reference import CASES

RANKS = [*range(1, 10), 12, 16, 17]
CHUNK_COUNTS = (1, 2, 3, 8)
# Everybody to everybody, or all to one; or to neighbours on several sides.
SEVERAL_AT_ONCE = ("direct", "two_shot", "bidirectional_ring", "torus")


def variants(collective: str, name: str, nranks: int) -> list[Schedule]:
    """The algorithm with every root and, if it pipelines, several numbers of chunks."""
    counts = CHUNK_COUNTS if algorithms.pipelines(collective, name) else (None,)
    return [
        algorithms.schedule(collective, name, nranks, root, nchunks)
        for root in reference.roots(collective, nranks)
        for nchunks in counts
    ]


@pytest.mark.parametrize("nranks", RANKS)
@pytest.mark.parametrize(("collective", "name"), CASES)
def test_results_are_numpys(collective: str, name: str, nranks: int) -> None:
    for schedule in variants(collective, name, nranks):
        assert reference.wrong_outputs(schedule) == []


@pytest.mark.parametrize(("collective", "name"), CASES)
def test_inputs_and_outputs_are_those_of_the_collective(collective: str, name: str) -> None:
    for schedule in variants(collective, name, 5):
        chunks = range(schedule.nchunks)
        for rank in range(5):
            owned = [c for c in chunks if rank in reference.owners(collective, c, 5, schedule.root)]
            wanted = [c for c in chunks if rank in reference.receivers(collective, c, 5, schedule.root)]
            assert schedule.inputs(rank).tolist() == owned
            assert schedule.outputs(rank).tolist() == wanted


@pytest.mark.parametrize(("collective", "name"), CASES)
def test_a_schedule_says_what_it_is(collective: str, name: str) -> None:
    for nranks in (1, 2, 6):
        for schedule in variants(collective, name, nranks):
            assert (schedule.collective, schedule.name, schedule.nranks) == (collective, name, nranks)
    assert algorithms.schedule(collective, name, 1).nrounds == 0


def costs(collective: str, name: str, p: int, k: int) -> tuple[int, int]:
    """Rounds, and chunks sent by the busiest rank, as the docstrings say, for p >= 2 ranks and k chunks."""
    up, down = (p - 1).bit_length(), p.bit_length() - 1  # log2 p, rounded up and down
    folded = int(up != down)
    rows = max(d for d in range(1, p) if p % d == 0 and d * d <= p)
    grid = rows + p // rows - 2
    return {
        ("allreduce", "ring"): (2 * (p - 1), 2 * (p - 1)),
        ("allreduce", "recursive_doubling"): (down + 2 * folded, down + folded),
        ("allreduce", "rabenseifner"): (2 * down + 2 * folded, 2 * (2**down - 1) + folded * 2**down),
        ("allreduce", "double_tree"): (2 * (2 * up - 2 + k), 2 * k + k % 2),
        ("allreduce", "direct"): (1, p - 1),
        ("allreduce", "two_shot"): (2, 2 * (p - 1)),
        ("allreduce", "bidirectional_ring"): (2 * (p // 2), 2 * (p - 1)),
        ("allreduce", "torus"): (2 * grid, 4 * (p - 1)),
        ("allreduce", "two_level"): (2 * grid, 2 * (p - 1)),
        ("allreduce", "swing"): (2 * down + 2 * folded, 2 * (2**down - 1) + folded * 2**down),
        ("allreduce", "swing_latency"): (down + 2 * folded, down + folded),
        ("reduce_scatter", "ring"): (p - 1, p - 1),
        ("reduce_scatter", "recursive_halving"): (down + 2 * folded, p - 1 + folded),
        ("reduce_scatter", "direct"): (1, p - 1),
        ("reduce_scatter", "bidirectional_ring"): (p // 2, p - 1),
        ("reduce_scatter", "torus"): (grid, p - 1),
        ("reduce_scatter", "swing"): (down + 2 * folded, p - 1 + folded),
        ("reduce_scatter", "pat"): (up, p - 1),
        ("allgather", "ring"): (p - 1, p - 1),
        ("allgather", "bruck"): (up, p - 1),
        ("allgather", "direct"): (1, p - 1),
        ("allgather", "bidirectional_ring"): (p // 2, p - 1),
        ("allgather", "torus"): (grid, p - 1),
        ("allgather", "swing"): (down + 2 * folded, p - 1 + folded * 2 * (2**down - 1)),
        ("allgather", "pat"): (up, p - 1),
        ("broadcast", "binomial"): (up, up),
        ("broadcast", "scatter_allgather"): (up + p - 1, 2 * (p - 1)),
        ("broadcast", "chain"): (p - 2 + k, k),
        ("broadcast", "double_tree"): (2 * up - 2 + k, k + k % 2),
        ("broadcast", "direct"): (1, p - 1),
        ("broadcast", "bine"): (up, up),
        ("reduce", "binomial"): (up, 1),
        ("reduce", "chain"): (p - 2 + k, k),
        ("reduce", "double_tree"): (2 * up - 2 + k, k),
        ("reduce", "direct"): (1, 1),
        ("reduce", "bine"): (up, 1),
        ("gather", "binomial"): (up, p // 2),
        ("gather", "direct"): (1, 1),
        ("gather", "bine"): (up, p // 2),
        ("scatter", "binomial"): (up, p - 1),
        ("scatter", "direct"): (1, p - 1),
        ("scatter", "bine"): (up, p - 1),
        ("alltoall", "pairwise"): (p - 1, p - 1),
        ("alltoall", "bruck"): (up, up * p // 2),
        ("barrier", "dissemination"): (up, up),
    }[collective, name]


# Exact for some rank counts, never more for the others.
UPPER_BOUNDS = {
    ("allgather", "swing"),
    ("allreduce", "double_tree"),
    ("broadcast", "double_tree"),
    ("reduce", "double_tree"),
    ("gather", "binomial"),
    ("alltoall", "bruck"),
}


@pytest.mark.parametrize(("collective", "name"), CASES)
def test_costs_are_those_of_the_docstring(collective: str, name: str) -> None:
    for nranks in [*RANKS[1:], 31, 32, 33]:
        for schedule in variants(collective, name, nranks)[:8]:
            sent = Counter[int]()
            for round_ in schedule.rounds:
                sent.update(round_.src.tolist())
            claimed = costs(collective, name, nranks, schedule.nchunks)
            found = (schedule.nrounds, max(sent.values()))
            if (collective, name) in UPPER_BOUNDS:
                assert all(a <= b for a, b in zip(found, claimed, strict=True))
            else:
                assert found == claimed


@pytest.mark.parametrize(
    ("collective", "name"), [("broadcast", "double_tree"), ("alltoall", "bruck"), ("allgather", "swing")]
)
def test_upper_bounds_are_reached_at_powers_of_two(collective: str, name: str) -> None:
    schedule = algorithms.schedule(collective, name, 16)
    sent = Counter(src for round_ in schedule.rounds for src in round_.src.tolist())
    claimed = costs(collective, name, 16, schedule.nchunks)
    assert (schedule.nrounds, max(sent.values())) == claimed


@pytest.mark.parametrize("nranks", RANKS)
@pytest.mark.parametrize(("collective", "name"), [case for case in CASES if case[1] not in SEVERAL_AT_ONCE])
def test_a_rank_sends_to_one_and_receives_from_one_in_a_round(
    collective: str, name: str, nranks: int
) -> None:
    for schedule in variants(collective, name, nranks):
        for round_ in schedule.rounds:
            pairs = set(zip(round_.src.tolist(), round_.dst.tolist(), strict=True))
            assert len({src for src, _ in pairs}) == len({dst for _, dst in pairs}) == len(pairs)


@pytest.mark.parametrize(("collective", "name"), CASES)
def test_what_goes_from_one_rank_to_another_in_a_round_is_listed_in_ascending_order(
    collective: str, name: str
) -> None:
    for schedule in variants(collective, name, 11):
        for round_ in schedule.rounds:
            latest: dict[tuple[int, int], int] = {}
            for src, dst, chunk, _ in round_:
                assert chunk > latest.get((src, dst), -1)
                latest[src, dst] = chunk


@pytest.mark.parametrize(
    ("collective", "name"),
    [
        ("reduce_scatter", "recursive_halving"),
        ("allreduce", "rabenseifner"),
        ("allreduce", "swing"),
        ("reduce_scatter", "torus"),
        ("allreduce", "two_level"),
    ],
)
@pytest.mark.parametrize("nranks", [3, 4, 6, 8, 13])
def test_vector_ranges_stay_contiguous(collective: str, name: str, nranks: int) -> None:
    for round_ in algorithms.schedule(collective, name, nranks).rounds:
        pair = round_.src * nranks + round_.dst
        same_pair = pair[1:] == pair[:-1]
        assert (np.diff(round_.chunk)[same_pair] == 1).all()


@pytest.mark.parametrize(("collective", "name"), CASES)
def test_no_round_is_empty_and_no_collective_that_moves_data_reduces(collective: str, name: str) -> None:
    for schedule in variants(collective, name, 12):
        # One chunk leaves the second tree, and so every second round, unused.
        if name == "double_tree" and schedule.nchunks == 1:
            continue
        for round_ in schedule.rounds:
            assert len(round_) > 0
            reduces = any(t.op == REDUCE for t in round_)
            assert not reduces or collective in reference.SUMS | {"barrier"}


def test_unknown_names_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(
        ValueError, match=r"algorithm: expected one of ring, bruck, direct, .*pat for allgather; got 'x'"
    ):
        algorithms.schedule("allgather", "x", 4)
    with pytest.raises(ValueError, match=r"collective: expected one of allreduce, .*barrier; got 'x'"):
        algorithms.names("x")


@pytest.mark.parametrize(("collective", "name"), CASES)
def test_impossible_arguments_are_refused(collective: str, name: str) -> None:
    with pytest.raises(ValueError, match="nranks: expected at least 1, got 0"):
        algorithms.schedule(collective, name, 0)
    if collective in reference.ROOTED:
        with pytest.raises(ValueError, match="root: expected a rank from 0 to 2, got 3"):
            algorithms.schedule(collective, name, 3, root=3)
    if algorithms.pipelines(collective, name):
        with pytest.raises(ValueError, match="nchunks: expected at least 1, got 0"):
            algorithms.schedule(collective, name, 3, nchunks=0)
