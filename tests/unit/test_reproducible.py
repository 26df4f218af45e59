"""One order of additions for any number of ranks, any algorithm and any chunks: proved, and in numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpicoll import algorithms, reproducible
from mpicoll.algorithms import schedule as make
from mpicoll.reproducible import FixedTree, Node, Piece, join, plan, verify_order, verify_orders
from mpicoll.schedule import COPY, REDUCE, Round, Schedule, Transfer, chunk_bounds
from mpicoll.verify import ScheduleError, Trees

Array = npt.NDArray[Any]
NAMES = algorithms.names("allreduce")


def partial(first: int, end: int, nshards: int) -> list[Node]:
    return FixedTree(nshards).merge(Node(shard, shard + 1) for shard in range(first, end))[1]


# --- the tree ---


@pytest.mark.parametrize(
    ("nshards", "order"),
    [
        (1, "0"),
        (2, "(0+1)"),
        (3, "((0+1)+2)"),
        (5, "(((0+1)+(2+3))+4)"),
        (7, "(((0+1)+(2+3))+((4+5)+6))"),
        (11, "((((0+1)+(2+3))+((4+5)+(6+7)))+((8+9)+10))"),
    ],
)
def test_the_tree_of_few_shards(nshards: int, order: str) -> None:
    trees = Trees(nshards)
    values = {Node(shard, shard + 1): shard for shard in range(nshards)}
    join(values, FixedTree(nshards).merge(values)[0], trees.add)
    assert list(values) == [Node(0, nshards)]
    assert trees.text(values[Node(0, nshards)]) == order
    assert verify_order(make("allreduce", "ring", 1), nshards).order == order


def test_a_partial_holds_the_largest_nodes_that_it_can() -> None:
    assert partial(1, 7, 13) == [(1, 2), (2, 4), (4, 6), (6, 7)]
    assert partial(8, 13, 13) == [(8, 13)]  # the last nodes of a tree that is not full are complete
    assert partial(4, 4, 13) == []


@given(st.integers(1, 70), st.randoms())
def test_a_partial_does_not_depend_on_the_order_in_which_shards_come(nshards: int, random: Any) -> None:
    tree = FixedTree(nshards)
    shards = [shard for shard in range(nshards) if random.random() < 0.8]
    random.shuffle(shards)
    one_by_one: list[Node] = []
    for shard in shards:
        one_by_one = tree.merge([*one_by_one, Node(shard, shard + 1)])[1]
    additions, at_once = tree.merge(Node(shard, shard + 1) for shard in shards)
    assert one_by_one == at_once
    assert len(additions) == len(shards) - len(at_once)
    covered = [shard for node in at_once for shard in range(*node)]
    assert covered == sorted(shards)


def test_a_tree_without_shards_is_refused() -> None:
    with pytest.raises(ValueError, match="nshards: expected at least 1, got 0"):
        FixedTree(0)


# --- the proof ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nranks", range(1, 9))
def test_every_algorithm_has_the_order_at_every_rank_count(name: str, nranks: int) -> None:
    schedule = make("allreduce", name, nranks)
    shards = {nranks, nranks + 1, 8, 9, 13}
    proofs = [verify_order(schedule, nshards) for nshards in sorted(shards)]
    assert {proof.order for proof in proofs if proof.nshards == 9} == {"((((0+1)+(2+3))+((4+5)+(6+7)))+8)"}
    assert all(proof.volume >= proof.plain for proof in proofs if proof.nshards >= nranks)
    assert all(proof.nranks == nranks and proof.algorithm == name for proof in proofs)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_may_have_no_shards(name: str) -> None:
    for nranks in range(2, 9):
        for nshards in range(1, nranks):
            verify_order(make("allreduce", name, nranks), nshards)


@pytest.mark.parametrize("nchunks", [1, 2, 3, 9])
def test_pipelines_have_the_order_with_any_number_of_chunks(nchunks: int) -> None:
    assert verify_order(make("allreduce", "double_tree", 6, nchunks=nchunks), 11).nchunks == nchunks


@pytest.mark.parametrize("name", ["recursive_doubling", "direct", "two_shot"])
def test_siblings_that_meet_cost_nothing(name: str) -> None:
    proof = verify_order(make("allreduce", name, 8), 32)
    assert proof.volume == proof.plain


def test_partials_that_are_no_single_node_cost_more() -> None:
    proof = verify_order(make("allreduce", "ring", 2), 3)
    # Of its two chunks rank 1 sends one as shards 1 and 2, and the other, which is summed, as one node.
    assert (proof.volume, proof.plain) == (3, 2)


def test_all_proofs_in_turn() -> None:
    seen = []
    proofs = verify_orders(5, [2, 5], progress=lambda done, total: seen.append((done, total)))
    assert [(proof.algorithm, proof.nranks) for proof in proofs] == [(n, p) for n in NAMES for p in (2, 5)]
    assert seen[-1] == (len(proofs), len(proofs))
    assert [proof.algorithm for proof in verify_orders(5, [2, 5], "direct")] == ["direct", "direct"]


def test_another_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that are added from left to right: all ranks agree, but on a tree of another shape."""

    class Chain(FixedTree):
        def __init__(self, nshards: int) -> None:
            super().__init__(nshards)
            self._addition = {}
            for shard in range(1, nshards):
                addition = (Node(0, shard), Node(shard, shard + 1), Node(0, shard + 1))
                self._addition[addition[0]] = self._addition[addition[1]] = addition

    monkeypatch.setattr(reproducible, "FixedTree", Chain)
    assert verify_order(make("allreduce", "ring", 2), 3).order == "((0+1)+2)"  # the same as the fixed tree
    with pytest.raises(ScheduleError, match=r"chunk 0 of rank 0 is not added in the fixed order") as caught:
        verify_order(make("allreduce", "ring", 2), 4)
    assert (caught.value.expected, caught.value.got) == ("((0+1)+(2+3))", "(((0+1)+2)+3)")


# --- what is wrong ---


def exchange(*transfers: Transfer) -> Round:
    return Round.from_transfers(transfers)


def test_a_shard_that_is_counted_twice_is_found() -> None:
    both = exchange(Transfer(0, 1, 0, REDUCE), Transfer(1, 0, 0, REDUCE))
    schedule = Schedule.from_rounds("twice", "allreduce", 2, 1, [both, both])
    with pytest.raises(ScheduleError, match="a shard is counted twice") as caught:
        plan(schedule, [0, 2, 5], [0])
    assert (caught.value.round, caught.value.transfer) == (1, Transfer(0, 1, 0, REDUCE))
    assert caught.value.got == "shards 0-4, 0-4"


def test_a_node_inside_another_is_counted_twice() -> None:
    rounds = [
        exchange(Transfer(1, 0, 0, REDUCE), Transfer(3, 2, 0, REDUCE)),
        exchange(Transfer(2, 0, 0, REDUCE)),
        exchange(Transfer(1, 0, 0, REDUCE)),
    ]
    with pytest.raises(ScheduleError, match="a shard is counted twice") as caught:
        plan(Schedule.from_rounds("twice", "allreduce", 4, 1, rounds), [0, 1, 2, 3, 4], [])
    assert (caught.value.round, caught.value.transfer) == (2, Transfer(1, 0, 0, REDUCE))
    assert caught.value.got == "shards 0-3, 1-1"


def test_a_shard_that_is_missing_at_the_end_is_found() -> None:
    one_way = Schedule.from_rounds("lost", "allreduce", 2, 1, [exchange(Transfer(0, 1, 0, REDUCE))])
    with pytest.raises(ScheduleError, match="chunk 0 of rank 0 lacks shards at the end") as caught:
        plan(one_way, [0, 3, 8], [0, 1])
    assert (caught.value.expected, caught.value.got) == ("shards 0-7", "shards 0-1, 2-2")


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_with_a_round_left_out_is_refused(name: str) -> None:
    whole = make("allreduce", name, 5)
    for missing in range(whole.nrounds):
        rounds = [round_ for k, round_ in enumerate(whole.rounds) if k != missing]
        broken = Schedule.from_rounds(name, "allreduce", 5, whole.nchunks, rounds)
        with pytest.raises(ScheduleError):
            plan(broken, [0, 1, 2, 4, 6, 8], [])
        with pytest.raises(ScheduleError):
            verify_order(broken, 8)


def test_a_copy_replaces_what_was_there() -> None:
    rounds = [exchange(Transfer(0, 1, 0, REDUCE)), exchange(Transfer(1, 0, 0, COPY))]
    programs = plan(Schedule.from_rounds("to and fro", "allreduce", 2, 1, rounds), [0, 3, 5], [0])
    assert list(programs) == [0]
    first, second = programs[0]
    assert first.sends == {1: [(0, (0, 2)), (0, (2, 3))]}
    assert second.receives == {1: [(0, (0, 5))]}
    assert first.additions == second.additions == []


def test_other_collectives_are_refused() -> None:
    with pytest.raises(ValueError, match="schedule: expected an allreduce, got ring allgather"):
        plan(make("allgather", "ring", 3), [0, 1, 2, 3], [0])
    with pytest.raises(ScheduleError):  # what is wrong with any schedule
        verify_order(replace(make("allreduce", "ring", 3), nranks=2), 4)


# --- in numbers ---


def shard_vectors(nshards: int, count: int, dtype: str) -> list[Array]:
    """Numbers of very different magnitudes, so that every order of their additions has a sum of its own."""
    rng = np.random.default_rng(nshards)
    scales = 10.0 ** rng.integers(-6, 7, (nshards, count))
    return list((rng.standard_normal((nshards, count)) * scales).astype(dtype))


def fixed_sum(vectors: list[Array]) -> Array:
    """The sum by the tree, straight from its definition: pairs, pairs of pairs, and an odd one as it is."""
    while len(vectors) > 1:
        pairs = [a + b for a, b in zip(vectors[::2], vectors[1::2], strict=False)]
        vectors = pairs + vectors[len(vectors) // 2 * 2 :]
    return vectors[0]


def run(schedule: Schedule, bounds: list[int], vectors: list[Array]) -> list[Array]:
    """Every rank's result: all ranks' programs on arrays, in this process."""
    chunks = chunk_bounds(len(vectors[0]), schedule.nchunks)
    values: list[dict[Piece, Array]] = []
    for first, end in pairwise(bounds):
        held = {Node(s, s + 1): vectors[s] for s in range(first, end)}
        join(held, FixedTree(len(vectors)).merge(held)[0], np.add)
        parts = {node: np.split(vector, chunks[1:-1]) for node, vector in held.items()}
        values.append({Piece(c, node): part for node in held for c, part in enumerate(parts[node])})
    programs = plan(schedule, bounds, range(schedule.nranks))
    for steps in zip(*programs.values(), strict=True):
        before = [dict(own) for own in values]
        for rank, step in enumerate(steps):
            for src, pieces in step.receives.items():
                assert pieces == steps[src].sends[rank]
                values[rank].update({piece: before[src][piece] for piece in pieces})
            join(values[rank], step.additions, np.add)
    root = Node(0, len(vectors))
    return [np.concatenate([own[Piece(c, root)] for c in range(schedule.nchunks)]) for own in values]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nshards", [8, 9, 13])
def test_every_rank_has_the_bits_of_the_fixed_tree(name: str, nshards: int) -> None:
    vectors = shard_vectors(nshards, 37, "f4")
    wanted = fixed_sum(vectors)
    assert wanted.tobytes() != sum(vectors).tobytes()  # type: ignore[union-attr]
    for nranks in range(1, 9):
        results = run(make("allreduce", name, nranks), chunk_bounds(nshards, nranks).tolist(), list(vectors))
        assert {result.tobytes() for result in results} == {wanted.tobytes()}


@given(st.data())
def test_ranks_may_have_any_numbers_of_shards(data: st.DataObject) -> None:
    nshards = data.draw(st.integers(1, 20))
    inner = sorted(data.draw(st.lists(st.integers(0, nshards), max_size=7)))
    bounds = [0, *inner, nshards]
    schedule = make("allreduce", data.draw(st.sampled_from(NAMES)), len(bounds) - 1)
    vectors = shard_vectors(nshards, 11, "f4")
    results = run(schedule, bounds, list(vectors))
    assert {result.tobytes() for result in results} == {fixed_sum(vectors).tobytes()}
