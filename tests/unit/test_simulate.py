"""The simulator: its closed forms, shared links, stragglers, and the machines that it reads."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from math import ceil, inf, log2
from pathlib import Path

import numpy as np
import pytest

from mpicoll import algorithms
from mpicoll.algorithms.hierarchical import Topology as Nodes
from mpicoll.schedule import COPY, REDUCE, RangeRound, Round, Schedule, Transfer, mirrored, run_lengths
from mpicoll.simulate import (
    Level,
    Machine,
    MachineError,
    Prediction,
    candidates,
    engine,
    simulate,
    simulate_sizes,
)
from mpicoll.simulate.machine import Curve
from mpicoll.simulate.topologies import Dragonfly, FloatArray, Switch, Torus

ALPHA, BETA, GAMMA, OVERHEAD = 5e-6, 1e-9, 3e-10, 0.7e-6
N = 840_000  # bytes; the ranks below divide it
HOP = ALPHA + 2 * OVERHEAD
FLAT = Machine(
    "flat",
    (Level("network", Switch(1 << 17), ALPHA, 1 / BETA),),
    overhead=OVERHEAD,
    reduce_bandwidth=1 / GAMMA,
)
NODES = Machine(
    "nodes",
    (
        Level("node", Switch(4), 1e-6, 20e9, total_bandwidth=30e9),
        Level("rack", Switch(3), 4e-6, 8e9, lanes=2),
        Level("network", Switch(5), 9e-6, 10e9),
    ),
    overhead=0.5e-6,
    reduce_bandwidth=10e9,
)
UNEVEN = replace(NODES, levels=(replace(NODES.levels[0], sizes=(3, 1, 4, 2, 4, 4, 1)), *NODES.levels[1:]))
SLOW = replace(NODES, stragglers={2: 3.0, 7: 1.5})
TORUS = Machine(
    "torus", (Level("network", Torus((2, 3, 5), 1e9, 1e-7), 1e-6, 4e9),), overhead=1e-6, reduce_bandwidth=5e9
)
DRAGONFLY = Machine("dragonfly", (Level("network", Dragonfly(5, 3, 2, 2e9, 1e9, 1e-7), 1e-6, 4e9),))


def times(collective: str, algorithm: str, nranks: int, nchunks: int | None = None) -> float:
    schedule = algorithms.schedule(collective, algorithm, nranks, nchunks=nchunks)
    return simulate(schedule, N, FLAT).seconds


def one_round(nranks: int, *pairs: tuple[int, int]) -> Schedule:
    """Each pair's first sends its second the whole vector."""
    return Schedule.from_rounds(
        "test", "broadcast", nranks, 1, [Round.of([a for a, _ in pairs], [b for _, b in pairs], 0, COPY)]
    )


def seconds(machine: Machine, nbytes: int, *pairs: tuple[int, int]) -> list[float]:
    """When each rank of the machine is done with one round."""
    rank_seconds: list[float] = simulate(
        one_round(machine.capacity, *pairs), nbytes, machine
    ).rank_seconds.tolist()
    return rank_seconds


# -- closed forms, where nothing is shared


@pytest.mark.parametrize("p", [1, 2, 3, 5, 8])
def test_ring(p: int) -> None:
    expected = 2 * (p - 1) * (HOP + N / p * BETA) + (p - 1) * N / p * GAMMA
    assert times("allreduce", "ring", p) == pytest.approx(expected)


@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_powers_of_two(p: int) -> None:
    rounds, moved = log2(p), N * (p - 1) / p
    assert times("allreduce", "recursive_doubling", p) == pytest.approx(rounds * (HOP + N * (BETA + GAMMA)))
    rabenseifner = 2 * rounds * HOP + 2 * moved * BETA + moved * GAMMA
    assert times("allreduce", "rabenseifner", p) == pytest.approx(rabenseifner)
    halving = rounds * HOP + moved * (BETA + GAMMA)
    assert times("reduce_scatter", "recursive_halving", p) == pytest.approx(halving)


@pytest.mark.parametrize("p", [3, 5, 6, 7, 12])
def test_folding_costs_two_rounds(p: int) -> None:
    expected = (int(log2(p)) + 2) * (HOP + N * BETA) + (int(log2(p)) + 1) * N * GAMMA
    assert times("allreduce", "recursive_doubling", p) == pytest.approx(expected)


@pytest.mark.parametrize("p", [2, 3, 5, 6, 8, 12])
def test_any_number_of_ranks(p: int) -> None:
    rounds = ceil(log2(p))
    assert times("broadcast", "binomial", p) == pytest.approx(rounds * (HOP + N * BETA))
    assert times("reduce", "binomial", p) == pytest.approx(rounds * (HOP + N * (BETA + GAMMA)))
    assert times("allgather", "bruck", p) == pytest.approx(rounds * HOP + N * (p - 1) / p * BETA)
    assert times("broadcast", "chain", p, 4) == pytest.approx((p + 2) * (HOP + N / 4 * BETA))
    assert times("alltoall", "pairwise", p) == pytest.approx((p - 1) * (HOP + N / p * BETA))
    assert times("barrier", "dissemination", p) == pytest.approx(rounds * HOP)
    one_shot = ALPHA + (p - 1) * (2 * OVERHEAD + N * (BETA + GAMMA))
    assert times("allreduce", "direct", p) == pytest.approx(one_shot)


@pytest.mark.parametrize("collective", list(algorithms.ALGORITHMS))
def test_the_equations_message_by_message(collective: str) -> None:
    for algorithm in algorithms.names(collective):
        schedule = algorithms.schedule(collective, algorithm, 11)
        got = simulate(schedule, N, replace(FLAT, stragglers={3: 2.5})).rank_seconds
        assert got == pytest.approx(reference(schedule, {3: 2.5})), algorithm


def reference(schedule: Schedule, slowness: dict[int, float]) -> list[float]:
    """The equations of the engine, one message after the other; each rank's link is the only one."""
    parts = {"barrier": inf, "alltoall": schedule.nranks}.get(schedule.collective, schedule.nchunks)
    factor = [slowness.get(rank, 1.0) for rank in range(schedule.nranks)]
    clocks = [0.0] * schedule.nranks
    for round_ in schedule.rounds:
        chunks = Counter((t.src, t.dst, t.op) for t in round_)
        sent = Counter(src for src, _, _ in chunks)
        received = Counter(dst for _, dst, _ in chunks)
        out, into = Counter(t.src for t in round_), Counter(t.dst for t in round_)
        after = list(clocks)
        for (src, dst, _), n in chunks.items():
            slowest = max(
                factor[src] * min(sent[src] * n, out[src]), factor[dst] * min(received[dst] * n, into[dst])
            )
            end = max(clocks[src], clocks[dst]) + ALPHA + N / parts * BETA * slowest
            end += OVERHEAD * (factor[src] * sent[src] + factor[dst] * received[dst])
            after[src], after[dst] = max(after[src], end), max(after[dst], end)
        for t in round_:
            after[t.dst] += factor[t.dst] * GAMMA * N / parts * (t.op == REDUCE)
        clocks = after
    return clocks


# -- shared links


def test_two_messages_on_one_link_take_twice_as_long_and_on_two_lanes_once() -> None:
    pair = Machine("pair", (Level("node", Switch(2), 0, inf), Level("network", Switch(2), 0, 1e9)))
    assert seconds(pair, 1000, (0, 2)) == pytest.approx([1e-6, 0, 1e-6, 0])
    assert seconds(pair, 1000, (0, 2), (1, 3)) == pytest.approx([2e-6] * 4)
    assert seconds(pair, 1000, (0, 2), (3, 1)) == pytest.approx([1e-6] * 4)  # one each way
    lanes = replace(pair, levels=(pair.levels[0], replace(pair.levels[1], lanes=2)))
    assert seconds(lanes, 1000, (0, 2), (1, 3)) == pytest.approx([1e-6] * 4)
    assert seconds(lanes, 1000, (0, 2), (0, 3)) == pytest.approx([2e-6, 0, 2e-6, 2e-6])


def test_oversubscription() -> None:
    levels = (Level("node", Switch(4), 0, 1e9), Level("network", Switch(2), 0, 4e9 / 3))  # 3 to 1
    machine = Machine("tree", levels)
    assert seconds(machine, 1000, (0, 4)) == pytest.approx([1e-6, 0, 0, 0, 1e-6, 0, 0, 0])
    assert seconds(machine, 1000, (0, 4), (1, 5), (2, 6), (3, 7)) == pytest.approx([3e-6] * 8)


def test_a_memory_is_shared_by_all_messages_within_a_node() -> None:
    machine = Machine("memory", (Level("node", Switch(4), 0, 1e9, total_bandwidth=1.6e9),))
    assert seconds(machine, 1000, (0, 1)) == pytest.approx([1e-6, 1e-6, 0, 0])
    assert seconds(machine, 1600, (0, 1), (2, 3)) == pytest.approx([2e-6] * 4)


def test_a_short_message_beside_a_long_one() -> None:
    transfers = [Transfer(0, 1, 0, COPY), *(Transfer(0, 2, chunk, COPY) for chunk in range(4))]
    schedule = Schedule.from_rounds("test", "broadcast", 3, 4, [Round.from_transfers(transfers)])
    machine = Machine("flat", (Level("network", Switch(3), 0, 1e9),))
    # 1000 and 4000 bytes: the short one has half of the link, the long one is done when all is sent.
    assert simulate(schedule, 4000, machine).rank_seconds == pytest.approx([5e-6, 2e-6, 5e-6])


@pytest.mark.parametrize(("distance", "hops"), [(1, 1), (3, 3), (4, 4), (5, 3), (7, 1)])
def test_a_torus_goes_the_shorter_way_and_shares_what_it_passes(distance: int, hops: int) -> None:
    machine = Machine("ring", (Level("network", Torus((8,), 1e9, 1e-7), 1e-6, inf),))
    pairs = [(rank, (rank + distance) % 8) for rank in range(8)]
    assert seconds(machine, 1000, *pairs) == pytest.approx([1e-6 + hops * 1e-7 + hops * 1e-6] * 8)
    assert seconds(machine, 1000, pairs[0])[0] == pytest.approx(2e-6 + hops * 1e-7)


def test_every_route_in_a_torus_leads_from_link_to_link_to_its_end() -> None:
    torus = Torus((2, 3, 5), 1e9, 0)
    src, dst = (part.ravel() for part in np.indices((30, 30)))
    here, steps = src.copy(), np.zeros(len(src), np.int64)
    for moving, links in torus.hops(src, dst):
        dimension, rest = np.divmod(links, 60)
        assert (rest // 2 == here[moving]).all()
        place = np.array(np.unravel_index(here[moving], torus.dims))
        place[dimension, np.arange(len(moving))] += np.where(rest % 2, -1, 1)
        here[moving] = np.ravel_multi_index(tuple(place), torus.dims, mode="wrap")
        steps[moving] += 1
    apart = abs(np.array(np.unravel_index(src, torus.dims)) - np.array(np.unravel_index(dst, torus.dims)))
    dims = np.array(torus.dims)[:, None]
    assert (here == dst).all()
    assert (steps == np.minimum(apart, dims - apart).sum(axis=0)).all()


def test_every_route_in_a_dragonfly_leads_from_link_to_link_to_its_end() -> None:
    dragonfly = Dragonfly(5, 3, 2, 1e9, 1e9, 0)
    src, dst = (part.ravel() for part in np.indices((30, 30)))
    here = src // 2  # routers
    entry: dict[tuple[int, int], int] = {}
    for moving, links in dragonfly.hops(src, dst):
        crosses = links >= 45
        across = moving[crosses]
        group, other = np.divmod(links[crosses] - 45, 5)
        assert (here[across] // 3 == group).all()
        assert (dst[across] // 6 == other).all()
        for g, h, router in zip(group.tolist(), other.tolist(), here[across].tolist(), strict=True):
            assert entry.setdefault((g, h), router) == router  # a link begins at one router
        local = moving[~crosses]
        assert (links[~crosses] // 3 == here[local]).all()
        here[local] = here[local] // 3 * 3 + links[~crosses] % 3
        here[across] = [
            other * 3 + ((g - other) % 5 - 1) * 3 // 4 for g, other in zip(group, other, strict=True)
        ]
    assert (here == dst // 2).all()
    assert len(entry) == 20


def test_groups_of_a_dragonfly_share_the_link_between_them() -> None:
    between = [(rank, 6 + rank) for rank in range(6)]  # the six ranks of group 0 to those of group 1
    assert max(seconds(DRAGONFLY, 1000, *between)) == pytest.approx(6e-6 + 1e-6 + 3e-7)
    assert seconds(DRAGONFLY, 1000, (0, 1))[0] == pytest.approx(1000 / 4e9 + 1e-6)  # of one router
    assert seconds(DRAGONFLY, 1000, (0, 2))[0] == pytest.approx(1000 / 2e9 + 1e-6 + 1e-7)  # of one group


# -- what the levels see


def test_bytes_of_each_level_and_the_busiest_link() -> None:
    ring = simulate(algorithms.schedule("allreduce", "ring", 24), 24_000, NODES)
    # 46 rounds: 18 messages stay on their node, 4 in their rack, 2 go between the two racks.
    assert ring.level_bytes == pytest.approx({"node": 46e3 * 18, "rack": 46e3 * 4, "network": 46e3 * 2})
    assert ring.messages == 46 * 24
    tree = simulate(one_round(24, (0, 23), (1, 22), (2, 21)), 1000, NODES)
    assert tree.level_bytes == {"node": 0, "rack": 0, "network": 3000}
    assert tree.busiest_link == "rack 0 out"
    assert tree.busiest_seconds == pytest.approx(3e-7)


def test_names_of_links() -> None:
    assert simulate(one_round(24, (5, 9)), 1000, NODES).busiest_link == "node 1 lane 0 out"
    assert simulate(one_round(8, (5, 6), (7, 4)), 1000, NODES).busiest_link == "all of node 1"
    name = "network 0: from (0, 1, 0) down in dimension 1"
    assert simulate(one_round(30, (5, 0)), 1000, TORUS).busiest_link == name
    half_around = Machine("ring", (Level("network", Torus((8,), 1e9, 0), 0, inf),))
    name = "network 0: from (2,) up in dimension 0"
    assert simulate(one_round(8, (2, 6)), 1000, half_around).busiest_link == name
    name = "network 0: from group 0 to group 1"
    assert simulate(one_round(30, (0, 6)), 1000, DRAGONFLY).busiest_link == name
    assert simulate(algorithms.schedule("barrier", "dissemination", 4), 0, FLAT).busiest_link == ""


def test_nodes_of_unequal_size() -> None:
    assert UNEVEN.capacity == 19
    assert UNEVEN.node_sizes(19) == [3, 1, 4, 2, 4, 4, 1]
    assert UNEVEN.node_sizes(9) == [3, 1, 4, 1]
    assert NODES.node_sizes(9) == [4, 4, 1]
    sent = simulate(one_round(19, (0, 2), (2, 3), (3, 4), (7, 8), (18, 4)), 1000, UNEVEN)
    assert sent.level_bytes == {"node": 1000, "rack": 2000, "network": 2000}


# -- the start


@pytest.mark.parametrize("algorithm", ["ring", "recursive_doubling", "two_shot"])
def test_a_collective_is_started_once(algorithm: str) -> None:
    schedule = algorithms.schedule("allreduce", algorithm, 8)
    usual, later = (simulate(schedule, N, replace(FLAT, start=start)).rank_seconds for start in (0, 3e-6))
    np.testing.assert_allclose(later, usual + 3e-6, rtol=1e-12)


def test_whoever_waits_for_a_rank_that_starts_late_is_late() -> None:
    machine = replace(FLAT, start=1e-6, stragglers={2: 3.0})
    found = simulate(one_round(6, (0, 1), (4, 5), (3, 2)), 0, machine).rank_seconds
    slow = ALPHA + OVERHEAD + 3 * OVERHEAD
    assert found.tolist() == pytest.approx([1e-6 + HOP] * 2 + [3e-6 + slow] * 2 + [1e-6 + HOP] * 2)


# -- stragglers


def test_a_straggler_delays_those_who_depend_on_it_and_nobody_else() -> None:
    pairs = one_round(6, (0, 1), (2, 3), (4, 5))
    usual, slow = (simulate(pairs, N, replace(FLAT, stragglers=s)).rank_seconds for s in ({}, {2: 3.0}))
    assert (slow > usual).tolist() == [False, False, True, True, False, False]
    chain = algorithms.schedule("broadcast", "chain", 8, nchunks=1)
    usual, slow = (simulate(chain, N, replace(FLAT, stragglers=s)).rank_seconds for s in ({}, {5: 2.0}))
    assert (slow > usual).tolist() == [False] * 4 + [True] * 4  # rank 4 waits until it has sent to rank 5


def test_ranks_do_not_wait_for_a_round_of_others() -> None:
    first = Round.from_transfers([Transfer(0, 1, 0, COPY), *(Transfer(2, 3, c, COPY) for c in range(9))])
    second = Round.from_transfers([Transfer(1, 0, 0, COPY)])
    schedule = Schedule.from_rounds("test", "broadcast", 4, 9, [first, second])
    machine = Machine("flat", (Level("network", Switch(4), 0, 1e9),))
    assert simulate(schedule, 9000, machine).rank_seconds == pytest.approx([2e-6, 2e-6, 9e-6, 9e-6])


# -- runs


def every_schedule(nranks: int) -> list[Schedule]:
    made = [
        algorithms.schedule(collective, name, nranks, root=nranks // 2 if collective == "broadcast" else 0)
        for collective in algorithms.ALGORITHMS
        for name in algorithms.names(collective)
    ]
    for sizes in ((nranks - nranks // 2, nranks // 2), (2,) * (nranks // 2) + (1,) * (nranks % 2)):
        nodes = Nodes.of_sizes([size for size in sizes if size])
        made += [
            algorithms.hierarchical_schedule(collective, nodes, across)
            for collective in algorithms.HIERARCHICAL
            for across in algorithms.names(collective)
        ]
    return made


@pytest.mark.parametrize("nranks", [1, 2, 3, 8, 13])
def test_the_rounds_of_a_run_have_the_same_messages(nranks: int) -> None:
    for schedule in every_schedule(nranks):
        lengths = run_lengths(schedule)
        assert sum(lengths) == schedule.nrounds, schedule
        first = 0
        for length in lengths:
            head = schedule.make_round(first).messages()
            for k in range(first + 1, first + length):
                for a, b in zip(head, schedule.make_round(k).messages(), strict=True):
                    assert a.tolist() == b.tolist(), (schedule.name, schedule.collective, k)
            first += length
    assert len(run_lengths(algorithms.schedule("allreduce", "ring", 13))) == 2


@pytest.mark.parametrize("nranks", [2, 13, 19])
@pytest.mark.parametrize("machine", ["flat", "nodes", "uneven", "slow", "torus", "dragonfly"])
def test_runs_change_nothing_but_the_time_it_takes(machine: str, nranks: int) -> None:
    known = {
        "flat": FLAT,
        "nodes": NODES,
        "uneven": UNEVEN,
        "slow": SLOW,
        "torus": TORUS,
        "dragonfly": DRAGONFLY,
    }
    nodes = Nodes.of_sizes([2] * (nranks // 2 - nranks % 2) + [3] * (nranks % 2))
    for schedule in (
        algorithms.schedule("allreduce", "ring", nranks),
        algorithms.schedule("allreduce", "torus", nranks),
        algorithms.schedule("reduce_scatter", "bidirectional_ring", nranks),
        algorithms.hierarchical_schedule("allreduce", nodes, "ring"),
        algorithms.hierarchical_schedule("allgather", nodes, "ring"),
    ):
        assert schedule.runs is not None
        same(simulate(schedule, N, known[machine]), simulate(replace(schedule, runs=None), N, known[machine]))


def same(a: Prediction, b: Prediction) -> None:
    assert a.rank_seconds == pytest.approx(b.rank_seconds, rel=1e-9)
    assert a.level_bytes == pytest.approx(b.level_bytes)
    assert a.messages == b.messages
    assert a.busiest_seconds == pytest.approx(b.busiest_seconds)


def test_curves_multiply_what_bytes_take() -> None:
    curve, reduce_curve = Curve(((1e3, 1.0), (4e3, 4.0))), Curve(((1e3, 3.0),))
    machine = Machine("test", (replace(FLAT.levels[0], curve=curve),), 0.0, 1e9, reduce_curve=reduce_curve)
    level, schedule = machine.levels[0], algorithms.schedule("allreduce", "recursive_doubling", 2)
    for nbytes, factor in ((500, 1), (1000, 1), (2000, 2), (4000, 4), (9000, 4)):
        expected = level.latency + nbytes * (factor / level.bandwidth + 3e-9)  # 3 ns: 1 / 1e9 times 3
        assert simulate(schedule, nbytes, machine).seconds == pytest.approx(expected), nbytes
    sizes = [500, 2000, 9000]
    together = simulate_sizes(algorithms.schedule("allreduce", "rabenseifner", 4), sizes, machine)
    alone = [simulate(algorithms.schedule("allreduce", "rabenseifner", 4), n, machine) for n in sizes]
    assert [p.seconds for p in together] == pytest.approx([p.seconds for p in alone])


def test_ranks_outside_of_a_run_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[int] = []
    move = engine._Step.move

    def counted(step: engine._Step, clocks: FloatArray) -> FloatArray:
        moves.append(len(clocks))
        return move(step, clocks)

    monkeypatch.setattr(engine._Step, "move", counted)
    pair = one_round(3, (0, 1))
    schedule = Schedule("test", "broadcast", 3, 1, 1000, lambda k: pair.make_round(0), runs=(1000,))
    assert simulate(schedule, N, FLAT).rank_seconds == pytest.approx([1000 * (HOP + N * BETA)] * 2 + [0])
    assert len(moves) == 1


def test_several_sizes_at_once_are_the_same_as_one_after_the_other() -> None:
    sizes = [0, 1, 1000, N]
    for name in ("ring", "rabenseifner", "direct"):
        schedule = algorithms.schedule("allreduce", name, 11)
        for prediction, nbytes in zip(simulate_sizes(schedule, sizes, SLOW), sizes, strict=True):
            same(prediction, simulate(schedule, nbytes, SLOW))
            assert prediction.nbytes == nbytes


# -- rounds of ranges


def test_a_round_of_ranges_is_compact_until_its_columns_are_read() -> None:
    ranges = Round.of_ranges([0, 1, 2], [1, 2, 0], first=[4, 1, 0], count=[3, 2, 0], nchunks=6, op=REDUCE)
    back = ranges.backwards(False)
    both = Round.union([ranges, back])
    messages = both.messages()
    assert [column.tolist() for column in messages] == [
        [0, 1, 1, 2], [1, 2, 0, 1], [3, 2, 3, 2], [True, True, False, False],
    ]  # fmt: skip
    assert (len(ranges), len(both)) == (5, 10)
    assert all("chunk" not in vars(made) and "src" not in vars(made) for made in (ranges, back, both))
    assert list(both) == [*ranges, *back]
    assert [(t.src, t.dst, t.chunk, t.op) for t in back][:3] == [(1, 0, c, COPY) for c in (0, 4, 5)]
    assert list(both.involving(0)) == [t for t in both if 0 in t[:2]]
    assert isinstance(both.involving(0), RangeRound)
    plain = Round(both.src, both.dst, both.chunk, both.reduce).messages()
    assert sorted(zip(*messages, strict=True)) == sorted(zip(*plain, strict=True))


def test_ranges_that_wrap_at_different_ends_are_joined_all_the_same() -> None:
    rounds = [Round.of_ranges([r], [r + 1], [2], [2], nchunks, COPY) for r, nchunks in ((0, 3), (5, 9))]
    assert list(Round.union(rounds)) == [t for r in rounds for t in r]
    assert [t.chunk for t in Round.union(rounds)] == [0, 2, 2, 3]


def test_transfers_of_a_pair_are_one_message_for_each_operation() -> None:
    transfers = [
        Transfer(0, 1, 5, COPY),
        Transfer(2, 1, 0, COPY),
        Transfer(0, 1, 7, COPY),
        Transfer(0, 1, 6, REDUCE),
    ]
    messages = Round.from_transfers(transfers).messages()
    assert [column.tolist() for column in messages] == [[0, 0, 2], [1, 1, 1], [2, 1, 1], [False, True, False]]
    assert [len(column) for column in Round.from_transfers([]).messages()] == [0] * 4


def test_a_mirrored_schedule_keeps_its_rounds_compact_and_its_runs_in_order() -> None:
    half = algorithms.schedule("reduce_scatter", "recursive_halving", 16)
    assert isinstance(mirrored(half, "allgather").make_round(0), RangeRound)
    runs = Schedule("test", "broadcast", 3, 1, 5, half.make_round, runs=(2, 3))
    assert mirrored(runs, "reduce").runs == (3, 2)


# -- scale


def test_many_ranks_take_seconds() -> None:
    started = time.process_time()
    dgx = Machine.load("dgx-h100")
    assert simulate(algorithms.schedule("allreduce", "ring", 4096), 100 << 20, dgx).messages == 8190 * 4096
    assert time.process_time() - started < 1  # measured: 0.3
    started = time.process_time()
    p, n = 1 << 17, 100 << 20
    expected = 2 * (p - 1) * (HOP + n / p * BETA) + (p - 1) * n / p * GAMMA
    assert simulate(algorithms.schedule("allreduce", "ring", p), n, FLAT).seconds == pytest.approx(expected)
    made = algorithms.schedule("allreduce", "rabenseifner", 1 << 16)
    assert simulate(made, n, dgx).messages == 32 << 16
    assert time.process_time() - started < 6  # measured: 1.5


def test_what_sends_too_many_messages_is_left_out_before_it_is_made() -> None:
    dgx = Machine.load("dgx-h100")
    found, left_out = candidates.predict("allgather", dgx, 1 << 16, [1000], ["bruck", "direct"])
    assert (list(found), left_out) == (["bruck"], ["direct"])
    with pytest.raises(candidates.TooManyError, match="got direct, which has about 4,"):
        candidates.schedule("allgather", "direct", dgx, 1 << 16)
    exact = candidates.estimated_rows("alltoall", "pairwise", 128)
    assert exact == pytest.approx(128 * 127, rel=0.02)


def test_hierarchical_algorithms_are_candidates_where_there_are_nodes() -> None:
    assert "hierarchical, ring" in candidates.names("allreduce", NODES, 9)
    assert "hierarchical, ring" not in candidates.names("allreduce", NODES, 4)
    assert "hierarchical, ring" not in candidates.names("allreduce", FLAT, 9)
    made = candidates.schedule("allreduce", "hierarchical, ring", UNEVEN, 8)
    within = simulate(made, 8000, UNEVEN).level_bytes
    flat = simulate(algorithms.schedule("allreduce", "ring", 8), 8000, UNEVEN).level_bytes
    assert within["rack"] < flat["rack"]


# -- machines


@pytest.mark.parametrize("name", Machine.names())
def test_machines_that_come_with_it(name: str) -> None:
    machine = Machine.load(name)
    assert (machine.name, bool(machine.about)) == (name, True)
    ranks = min(machine.capacity, 64)
    assert 0 < simulate(algorithms.schedule("allreduce", "rabenseifner", ranks), 1000, machine).seconds < 1


GOOD = """
name = "good"
about = "for the test"
[rank]
overhead = 1e-6
reduce_bandwidth = inf
[[levels]]
name = "node"
size = [3, 2]
latency = 0
bandwidth = 1e9
[[levels]]
name = "network"
topology = "torus"
dims = [2, 2]
latency = 1e-6
bandwidth = 1e9
link_bandwidth = 2e9
hop_latency = 1e-7
lanes = 2
[[stragglers]]
rank = 4
factor = 2.0
"""


def test_a_machine_file(tmp_path: Path) -> None:
    path = tmp_path / "good.toml"
    path.write_text(GOOD)
    machine = Machine.load(path)
    assert machine == Machine.load(str(path))
    assert (machine.capacity, machine.stragglers) == (5, {4: 2.0})
    assert machine.levels[1] == Level("network", Torus((2, 2), 2e9, 1e-7), 1e-6, 1e9, lanes=2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name = ", "name ? ", "expected TOML, got a syntax error"),
        ('about = "for the test"', "", "f: about: expected a text, got nothing"),
        ("overhead = 1e-6", "", "f: rank.overhead: expected seconds, 0 or more, got nothing"),
        ("overhead = 1e-6", "overhead = -1e-6", "f: rank.overhead: expected seconds, 0 or more, got -1e-06"),
        ("overhead = 1e-6", "overhead = nan", "f: rank.overhead: expected seconds, 0 or more, got nan"),
        ("overhead = 1e-6", 'overhead = "1"', "f: rank.overhead: expected seconds, 0 or more, got '1'"),
        (
            "overhead = 1e-6",
            "overhead = 0\nstart = -1.0",
            "f: rank.start: expected seconds, 0 or more, got -1.0",
        ),
        ("overhead = 1e-6", "overhead = 1\nspeed = 3", "f: rank.speed: expected no such field, got 3"),
        ("[rank]", "[rank.x]", "f: rank.overhead: expected seconds, 0 or more, got nothing"),
        ("latency = 0", "latency = inf", "f: levels[0].latency: expected seconds, 0 or more, got inf"),
        (
            "bandwidth = 1e9\n[[l",
            "bandwidth = 0\n[[l",
            "levels[0].bandwidth: expected bytes per second, 1 or more",
        ),
        (
            "lanes = 2",
            "curve = [[1, 2], [1, 3]]",
            "levels[1].curve: expected pairs of bytes, ascending",
        ),
        ("lanes = 2", "curve = [[1, -2]]", "levels[1].curve: expected pairs of bytes, ascending"),
        ("lanes = 2", "curve = [3]", "levels[1].curve: expected pairs of bytes, ascending"),
        (
            "overhead = 1e-6",
            "overhead = 0\nreduce_curve = []",
            "rank.reduce_curve: expected pairs",
        ),
        ("size = [3, 2]", "size = 0", "f: levels[0].size: expected a whole number, 1 or more, got 0"),
        ("size = [3, 2]", "size = [3, 0]", "f: levels[0].size: expected a list of whole numbers, 1 or more"),
        ("size = [3, 2]", "size = [3, 2, 1, 1, 1]", "f: levels[0].size: expected at most 4 groups"),
        ("dims = [2, 2]", "", "f: levels[1].dims: expected a list of whole numbers, 1 or more, got nothing"),
        (
            "dims = [2, 2]",
            "dims = 4",
            "f: levels[1].dims: expected a list of whole numbers, 1 or more, got 4",
        ),
        ("dims = [2, 2]", "dims = [2, 2]\nsize = 4", "f: levels[1].size: expected no such field, got 4"),
        ('"torus"', '"tor"', 'f: levels[1].topology: expected "switch", "torus" or "dragonfly", got \'tor\''),
        ("lanes = 2", "lanes = 1.5", "f: levels[1].lanes: expected a whole number, 1 or more, got 1.5"),
        ("rank = 4", "rank = 5", "f: stragglers: expected ranks below 5, got 5"),
        ("factor = 2.0", "factor = 0.5", "f: stragglers[0].factor: expected a number, 1 or more, got 0.5"),
        ("factor = 2.0", "", "f: stragglers[0].factor: expected a number, 1 or more, got nothing"),
        ("factor = 2.0", "factor = inf", "f: stragglers[0].factor: expected a number, 1 or more, got inf"),
        (
            "factor = 2.0",
            "factor = 2\n[[stragglers]]\nrank = 4\nfactor = 3",
            "f: stragglers[1].rank: expected a rank that no straggler before has, got 4",
        ),
        ('name = "network"', 'name = "node"', "f: levels[1].name: expected a name that no level before has"),
        (
            "overhead = 1e-6",
            f"overhead = {10**400}",
            "f: rank.overhead: expected seconds, 0 or more, got 1000",
        ),
        ("overhead = 1e-6", f"overhead = {'9' * 5000}", "f: expected TOML, got a syntax error: Exceeds"),
        ("overhead = 1e-6", "overhead = " + "[" * 5000, "f: expected TOML, got a syntax error: maximum"),
        ("size = [3, 2]", "size = 1000000001", "f: levels[0].size: expected at most 1000000000, got 1"),
        ("size = [3, 2]", "size = [3, 1000000001]", "f: levels[0].size: expected at most 1000000000, got 1"),
        ("lanes = 2", "lanes = 1025", "f: levels[1].lanes: expected at most 1024, got 1025"),
        (
            "dims = [2, 2]",
            "dims = [10000, 10000]",
            "f: levels[1].topology: expected a torus of at most 100,000,000 links, got 400,000,000",
        ),
    ],
)
def test_what_is_wrong_in_a_machine_file_is_named(old: str, new: str, message: str) -> None:
    assert GOOD.count(old) == 1 or old == "name = "
    with pytest.raises(MachineError) as raised:
        Machine.loads(GOOD.replace(old, new, 1), "f")
    assert message in str(raised.value)


def test_ranks_that_do_not_fit() -> None:
    with pytest.raises(MachineError, match=r"ranks: expected 1 to 5, .* good has room \(3 \+ 2\), got 6"):
        Machine.loads(GOOD, "f").check_fits(6)
    schedule = algorithms.schedule("allreduce", "ring", 61)
    with pytest.raises(
        MachineError, match=r"expected 1 to 60, .* \(4 in a node x 3 in a rack x 5 in a network\)"
    ):
        simulate(schedule, 1, NODES)
    with pytest.raises(
        MachineError, match=r"expected a TOML file or one of .*laptop.*; got 'lap': No such file"
    ):
        Machine.load("lap")
