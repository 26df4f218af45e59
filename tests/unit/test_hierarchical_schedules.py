"""Hierarchical schedules are proved right; the stages that are executed do what the schedules say."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicoll import algorithms
from mpicoll.algorithms import hierarchical
from mpicoll.algorithms.hierarchical import Topology
from mpicoll.schedule import REDUCE, Round, Schedule, Transfer
from mpicoll.transports import stages
from mpicoll.transports.program import Buffer, Place
from mpicoll.transports.stages import AcrossStep, NodeStep, Range, Steps, View
from mpicoll.verify import ScheduleError, verify
from tests.unit import reference

COLLECTIVES = ("allreduce", "reduce_scatter", "allgather", "broadcast")
SHAPES = [sizes for n in (1, 2, 3) for sizes in itertools.product((1, 2, 3, 4), repeat=n)]
MANY = [
    (1, 1, 1, 1),
    (2, 2, 2, 2),
    (4, 1, 3, 2),
    (2, 4, 2, 4),
    (3, 3, 3, 3, 3),
    (4, 2, 3, 2, 4),
    (1, 4, 1, 4, 1),
]
SCATTERED = [(0, 1, 0, 1), (0, 1, 2, 0, 1, 2, 0), (1, 0, 0, 2, 1, 0, 2, 2), (0, 1, 1, 0, 2, 3, 2, 0)]
TOPOLOGIES = [*map(Topology.of_sizes, SHAPES + MANY), *map(Topology.of_ranks, SCATTERED)]


def schedules(collective: str, topology: Topology, across: str) -> Iterator[Schedule]:
    """With every root."""
    for root in reference.roots(collective, topology.nranks):
        yield algorithms.hierarchical_schedule(collective, topology, across, root)


# -- topologies


def test_a_topology_from_the_node_of_each_rank() -> None:
    topology = Topology.of_ranks(["x", "y", "x", "x", "y"])
    assert topology == Topology(((0, 2, 3), (1, 4)))
    assert (topology.nranks, topology.nnodes, topology.nslices, topology.even) == (5, 2, 2, False)
    assert topology.teams == (((0,), (2, 3)), ((1,), (4,)))
    assert [topology.owners(i) for i in (0, 1)] == [(0, 1), (2, 4)]
    assert [topology.node_of(rank) for rank in range(5)] == [0, 1, 0, 0, 1]


def test_a_topology_from_sizes() -> None:
    topology = Topology.of_sizes([2, 1, 2])
    assert topology == Topology(((0, 1), (2,), (3, 4))) and topology.nslices == 1
    assert Topology.of_sizes([3, 3]).even


@pytest.mark.parametrize(
    ("nodes", "problem"),
    [
        ((), "each rank from 0 on once"),
        (((0, 1), ()), "no empty node"),
        (((0, 1), (1, 2)), "each rank from 0 on once"),
        (((1, 2),), "each rank from 0 on once"),
        (((1, 0), (2,)), "in ascending order"),
    ],
)
def test_impossible_topologies_are_refused(nodes: tuple[tuple[int, ...], ...], problem: str) -> None:
    with pytest.raises(ValueError, match=rf"nodes: expected .*{problem}.*; got \("):
        Topology(nodes)


# -- schedules


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_topology_root_and_algorithm_across_is_proved(collective: str) -> None:
    for topology, across in itertools.product(TOPOLOGIES, algorithms.names(collective)):
        for schedule in schedules(collective, topology, across):
            proof = verify(schedule)
            assert proof.identical, (topology, across)
            assert (schedule.collective, schedule.name, schedule.nranks) == (
                collective,
                "hierarchical",
                topology.nranks,
            )


@given(st.lists(st.integers(0, 4), min_size=1, max_size=18), st.data())
@settings(max_examples=40, deadline=None)
def test_any_placement_of_ranks(nodes: list[int], data: st.DataObject) -> None:
    topology = Topology.of_ranks(nodes)
    collective = data.draw(st.sampled_from(COLLECTIVES))
    across = data.draw(st.sampled_from(algorithms.names(collective)))
    root = data.draw(st.integers(0, len(nodes) - 1)) if collective == "broadcast" else 0
    schedule = algorithms.hierarchical_schedule(collective, topology, across, root)
    assert verify(schedule).identical
    if topology.nranks <= 12:  # numbers say how often up to so many ranks were counted
        assert reference.wrong_outputs(schedule) == []


def test_with_one_slice_only_first_ranks_of_nodes_exchange_messages() -> None:
    topology = replace(Topology.of_sizes([2, 3, 2]), most=1)
    schedule = algorithms.hierarchical_schedule("allreduce", topology, "ring")
    assert verify(schedule).identical and schedule.nchunks == 3
    across = {
        rank
        for src, dst, _, _ in itertools.chain.from_iterable(schedule.rounds)
        for rank in (src, dst)
        if topology.node_of(src) != topology.node_of(dst)
    }
    assert across == {0, 2, 5}


def test_the_sums_are_those_of_nodes_first() -> None:
    topology = Topology.of_ranks([0, 1, 0, 1, 1])
    proof = verify(algorithms.hierarchical_schedule("allreduce", topology, "direct"))
    assert {proof.order(rank, 0) for rank in range(5)} == {"((0+2)+((1+3)+4))"}


def test_a_node_sends_others_no_more_than_it_must() -> None:
    """As the docstring says: 2 (N - 1) / N of the data, from p ranks at once, or half of that."""
    topology = Topology.of_sizes([4] * 3)
    home = [topology.node_of(rank) for rank in range(12)]
    sent = {"allreduce": 2 * 2 / 3, "reduce_scatter": 2 / 3, "allgather": 2 / 3, "broadcast": 1.0}
    for collective, volume in sent.items():
        across = "chain" if collective == "broadcast" else "ring"
        schedule = algorithms.hierarchical_schedule(collective, topology, across)
        out = Counter[int]()
        for src, dst, _, _ in itertools.chain.from_iterable(schedule.rounds):
            out[src] += home[src] != home[dst]
        assert max(out.values()) * 4 == round(volume * schedule.nchunks)


def test_what_does_not_fit_is_refused() -> None:
    topology = Topology.of_sizes([2, 2])
    cases: list[tuple[Any, ...]] = [
        (hierarchical.hierarchical_allreduce, algorithms.schedule("allreduce", "ring", 3)),
        (hierarchical.hierarchical_allgather, algorithms.schedule("allreduce", "ring", 2)),
        (hierarchical.hierarchical_broadcast, algorithms.schedule("broadcast", "chain", 2), 2),
    ]
    for make, *args in cases:
        with pytest.raises(ValueError, match=r"across: expected a schedule of .* on 2 ranks with root"):
            make(topology, *args)
    with pytest.raises(ValueError, match="root: expected a rank from 0 to 3, got 4"):
        hierarchical.hierarchical_broadcast(topology, cases[2][1], 4)
    with pytest.raises(ValueError, match=r"collective: expected one of allreduce, .*; got 'gather'"):
        algorithms.hierarchical_schedule("gather", topology, "direct")


def test_a_missing_transfer_is_found() -> None:
    """The proof does look at the composed schedule."""
    schedule = algorithms.hierarchical_schedule("allgather", Topology.of_sizes([2, 1]), "ring")
    rounds = list(schedule.rounds)
    rounds[-1] = rounds[-1].where(np.arange(len(rounds[-1])) > 0)
    with pytest.raises(ScheduleError, match="is not complete at the end"):
        verify(Schedule.from_rounds("x", "allgather", 3, 3, rounds))


def test_a_chunk_may_stand_for_several_or_none() -> None:
    round_ = Round.from_transfers(
        [Transfer(0, 1, 0, REDUCE), Transfer(1, 2, 1, REDUCE), Transfer(2, 0, 2, REDUCE)]
    )
    small = Schedule.from_rounds("x", "allreduce", 3, 3, [round_])
    part = hierarchical.Part(small, [5, 3, 8], [[4, 2], [], [7]])
    assert list(part.make_round(0)) == [
        Transfer(5, 3, 4, REDUCE),
        Transfer(5, 3, 2, REDUCE),
        Transfer(8, 5, 7, REDUCE),
    ]


# -- the steps that are executed


class Machine:
    """All ranks' steps, carried out on plain arrays in an order of chance that their ``after`` allows."""

    def __init__(self, topology: Topology, steps: Sequence[Steps], item: int, seed: int) -> None:
        self.topology, self.steps, self.item = topology, steps, item
        self.memory: list[dict[Buffer, Any]] = [{} for _ in steps]
        self.complete = [[0, 0] for _ in steps]  # of each rank, steps on the node and across
        self.chance = random.Random(seed)
        self.moved = Counter[str]()  # elements that went from one rank to another, on nodes and across
        self.most = 0  # steps across that were under way, or could have been, at once

    def run(self) -> None:
        while self._left():
            possible = [*self._node_turns(), *self._across_turns()]
            assert possible, "the ranks wait for each other"
            self.chance.choice(possible)()
        for steps, (node, across) in zip(self.steps, self.complete, strict=True):
            assert (node, across) == (len(steps.node), len(steps.across))

    def _left(self) -> bool:
        return any(
            self.complete[rank] != [len(steps.node), len(steps.across)]
            for rank, steps in enumerate(self.steps)
        )

    def _node_turns(self) -> Iterator[Callable[[], None]]:
        for node in self.topology.nodes:
            numbers = {self.complete[rank][0] for rank in node}
            assert len(numbers) == 1
            (number,) = numbers
            if number == len(self.steps[node[0]].node):
                continue
            present = [self.steps[rank].node[number] for rank in node]
            if all(step.after <= self.complete[rank][1] for rank, step in zip(node, present, strict=True)):
                yield partial(self._on_node, node, present)

    def _across_turns(self) -> Iterator[Callable[[], None]]:
        for i in range(self.topology.nslices):
            owners = self.topology.owners(i)
            numbers = {self.complete[rank][1] for rank in owners}
            assert len(numbers) == 1
            (number,) = numbers
            if number == len(self.steps[owners[0]].across):
                continue
            present = [self.steps[rank].across[number] for rank in owners]
            if all(step.after <= self.complete[rank][0] for rank, step in zip(owners, present, strict=True)):
                yield partial(self._across, owners, present)

    def _at(self, rank: int, place: Place, at: int, length: int) -> Any:
        begin = place.at + at
        found = self.memory[rank][place.buffer][begin : begin + length]
        assert begin >= 0 and len(found) == length, "beyond the end of a buffer"
        return found

    def _on_node(self, node: Sequence[int], present: Sequence[NodeStep]) -> None:
        assert len({(step.collective, step.root) for step in present}) == 1
        getattr(self, f"_{present[0].collective}")(node, present)
        for rank in node:
            self.complete[rank][0] += 1

    def _reduce_scatter(self, node: Sequence[int], present: Sequence[NodeStep]) -> None:
        assert len({step.sent for step in present}) == 1, "offsets must be the same on all ranks of the node"
        parts = [
            [self._at(rank, step.source, *block).copy() for block in zip(*step.sent, strict=True)]
            for rank, step in zip(node, present, strict=True)
        ]
        for q, (rank, step) in enumerate(zip(node, present, strict=True)):
            total = np.sum([part[q] for part in parts], axis=0)
            self._at(rank, step.target, 0, step.received.lengths[q])[:] = total
            self.moved["node"] += total.size * (len(node) - 1)

    def _reduce(self, node: Sequence[int], present: Sequence[NodeStep]) -> None:
        root, length = present[0].root, present[0].sent.lengths[0]
        total = np.sum([self._at(r, s.source, 0, length) for r, s in zip(node, present, strict=True)], axis=0)
        self._at(node[root], present[root].target, 0, length)[:] = total
        self.moved["node"] += length * (len(node) - 1)

    def _allgather(self, node: Sequence[int], present: Sequence[NodeStep]) -> None:
        found = [
            self._at(r, s.source, s.sent.at[0], s.sent.lengths[0]).copy()
            for r, s in zip(node, present, strict=True)
        ]
        for q, (rank, step) in enumerate(zip(node, present, strict=True)):
            assert step.received.lengths == tuple(len(part) for part in found)
            for other, (at, length) in enumerate(zip(*step.received, strict=True)):
                self._at(rank, step.target, at, length)[:] = found[other]
                self.moved["node"] += length * (other != q)

    def _alltoall(self, node: Sequence[int], present: Sequence[NodeStep]) -> None:
        found = [
            [self._at(rank, step.source, *block).copy() for block in zip(*step.sent, strict=True)]
            for rank, step in zip(node, present, strict=True)
        ]
        for q, (rank, step) in enumerate(zip(node, present, strict=True)):
            for other, (at, length) in enumerate(zip(*step.received, strict=True)):
                self._at(rank, step.target, at, length)[:] = found[other][q]
                self.moved["node"] += length * (other != q)

    def _broadcast(self, node: Sequence[int], present: Sequence[NodeStep]) -> None:
        root, length = present[0].root, present[0].sent.lengths[0]
        data = self._at(node[root], present[root].source, 0, length).copy()
        for q, (rank, step) in enumerate(zip(node, present, strict=True)):
            self._at(rank, step.target, 0, length)[:] = data
            self.moved["node"] += length * (q != root)

    def _across(self, owners: Sequence[int], present: Sequence[AcrossStep]) -> None:
        schedule, counts = present[0].schedule, present[0].counts
        assert all(step.counts == counts and step.rank == q for q, step in enumerate(present))
        state = [
            {c: self._at(rank, step.source, step.input_at[c], counts[c]).copy() for c in schedule.inputs(q)}
            for q, (rank, step) in enumerate(zip(owners, present, strict=True))
        ]
        for transfers in schedule.rounds:
            before = [dict(held) for held in state]
            for src, dst, chunk, op in transfers:
                value = before[src][chunk]
                state[dst][chunk] = state[dst][chunk] + value if op == REDUCE else value
                self.moved["across"] += counts[chunk]
        for q, (rank, step) in enumerate(zip(owners, present, strict=True)):
            for chunk in schedule.outputs(q):
                self._at(rank, step.target, step.output_at[chunk], counts[chunk])[:] = state[q][chunk]
            self.complete[rank][1] += 1


def data(rank: int, count: int) -> Any:
    """Differs per rank and index, and sums exactly."""
    return np.arange(count) * 3 + (1 << 20) * (rank + 1)


def total(topology: Topology, count: int) -> Any:
    return np.sum([data(rank, count) for rank in range(topology.nranks)], axis=0)


@cache
def views(topology: Topology) -> list[View]:
    return [View(topology, rank) for rank in range(topology.nranks)]


def machine(
    topology: Topology, steps: Sequence[Steps], inputs: Sequence[Any], output: Sequence[int], seed: int
) -> Machine:
    made = Machine(topology, steps, 8, seed)
    for rank, each in enumerate(steps):
        made.memory[rank] = {
            Buffer.INPUT: inputs[rank],
            Buffer.OUTPUT: np.full(output[rank], -7),
            Buffer.SCRATCH: np.full(each.scratch, -9),
        }
    return made


def small(collective: str, topology: Topology, root: int = 0) -> Schedule:
    name = {"broadcast": "binomial"}.get(collective, "ring")
    return algorithms.schedule(collective, name, topology.nnodes, root)


TRIED = [t for t in TOPOLOGIES if t.nnodes > 1][::7] + TOPOLOGIES[-6:]
COUNTS = (0, 1, 7, 64, 333)
PIECE = 40  # elements: several pieces for the larger counts


@pytest.mark.parametrize("in_place", [False, True])
def test_steps_of_allreduce(in_place: bool) -> None:
    for seed, (topology, count) in enumerate(itertools.product(TRIED, COUNTS)):
        for most in (None, 1):
            across = small("allreduce", topology)
            seen = views(replace(topology, most=most))
            steps = [stages.allreduce_steps(view, across, count, PIECE, 8) for view in seen]
            inputs = [data(rank, count) for rank in range(topology.nranks)]
            job = machine(seen[0].topology, steps, inputs, [count] * topology.nranks, seed)
            for memory in job.memory if in_place else ():
                memory[Buffer.OUTPUT] = memory[Buffer.INPUT]
            job.run()
            for rank, memory in enumerate(job.memory):
                np.testing.assert_array_equal(memory[Buffer.OUTPUT], total(topology, count))
                if not in_place:
                    np.testing.assert_array_equal(memory[Buffer.INPUT], data(rank, count))


def test_steps_of_reduce_scatter() -> None:
    for seed, (topology, count) in enumerate(itertools.product(TRIED, COUNTS)):
        nranks = topology.nranks
        counts = [(count + 5 * rank) % 90 if rank % 4 != 3 else 0 for rank in range(nranks)]
        begins = np.cumsum([0, *counts])
        across = small("reduce_scatter", topology)
        steps = [stages.reduce_scatter_steps(view, across, counts, PIECE, 8) for view in views(topology)]
        inputs = [data(rank, sum(counts)) for rank in range(nranks)]
        job = machine(topology, steps, inputs, counts, seed)
        job.run()
        wanted = total(topology, sum(counts))
        for rank, memory in enumerate(job.memory):
            mine = wanted[begins[rank] : begins[rank + 1]]
            np.testing.assert_array_equal(memory[Buffer.OUTPUT], mine, f"{topology} {counts} {rank}")


def test_steps_of_allgather() -> None:
    for seed, (topology, count) in enumerate(itertools.product(TRIED, COUNTS)):
        nranks = topology.nranks
        counts = [(count + 5 * rank) % 90 if rank % 4 != 3 else 0 for rank in range(nranks)]
        # In any order, with gaps.
        order = random.Random(seed).sample(range(nranks), nranks)
        begins = {rank: sum(counts[r] + 3 for r in order[:i]) for i, rank in enumerate(order)}
        blocks = [Range(begins[rank], counts[rank]) for rank in range(nranks)]
        size = sum(counts) + 3 * nranks
        across = small("allgather", topology)
        steps = [stages.allgather_steps(view, across, blocks, PIECE) for view in views(topology)]
        job = machine(topology, steps, [data(r, counts[r]) for r in range(nranks)], [size] * nranks, seed)
        job.run()
        wanted = np.full(size, -7)
        for rank, (at, length) in enumerate(blocks):
            wanted[at : at + length] = data(rank, length)
        for memory in job.memory:
            np.testing.assert_array_equal(memory[Buffer.OUTPUT], wanted, f"{topology} {counts}")


def test_steps_of_broadcast() -> None:
    for seed, (topology, count) in enumerate(itertools.product(TRIED, COUNTS)):
        for root in {0, seed % topology.nranks, topology.nranks - 1}:
            across = small("broadcast", topology, topology.node_of(root))
            steps = [stages.broadcast_steps(view, across, count, PIECE, root) for view in views(topology)]
            job = machine(topology, steps, [()] * topology.nranks, [count] * topology.nranks, seed)
            job.memory[root][Buffer.OUTPUT][:] = data(root, count)
            job.run()
            for memory in job.memory:
                np.testing.assert_array_equal(memory[Buffer.OUTPUT], data(root, count), f"{topology} {root}")


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_the_steps_move_what_the_schedule_says(collective: str) -> None:
    """On the nodes and between them, for data that divide evenly."""
    for topology in TRIED:
        across = small(collective, topology)
        schedule = algorithms.hierarchical_schedule(collective, topology, across.name)
        each = 192  # elements, or bytes, of a chunk: whole cache lines
        wanted = Counter[str]()
        for src, dst, _, _ in itertools.chain.from_iterable(schedule.rounds):
            near = topology.node_of(src) == topology.node_of(dst)
            wanted["node" if near else "across"] += each
        job = _even_job(collective, topology, across, schedule.nchunks, each)
        job.run()
        assert job.moved == +wanted, (topology, collective)


def _even_job(collective: str, topology: Topology, across: Schedule, nchunks: int, each: int) -> Machine:
    nranks, count = topology.nranks, nchunks * each
    blocks = [Range(rank * each, each) for rank in range(nranks)]
    make: dict[str, Callable[[View], Steps]] = {
        "allreduce": lambda view: stages.allreduce_steps(view, across, count, count, 8),
        "reduce_scatter": lambda view: stages.reduce_scatter_steps(view, across, [each] * nranks, each, 8),
        "allgather": lambda view: stages.allgather_steps(view, across, blocks, each),
        "broadcast": lambda view: stages.broadcast_steps(view, across, count, count, 0),
    }
    inputs = [data(rank, count) for rank in range(nranks)]
    return machine(
        topology, [make[collective](view) for view in views(topology)], inputs, [count] * nranks, 0
    )


def test_pieces_overlap() -> None:
    """While one piece is across, the next one is reduced on the node, and the one before handed out."""
    topology = Topology.of_sizes([2, 2])
    steps = stages.allreduce_steps(View(topology, 0), small("allreduce", topology), 4 * 64, 64, 8)
    order = [(step.collective, step.after) for step in steps.node]
    assert order == [
        ("reduce_scatter", 0),
        ("reduce_scatter", 0),
        ("allgather", 1),
        ("reduce_scatter", 1),
        ("allgather", 2),
        ("reduce_scatter", 2),
        ("allgather", 3),
        ("allgather", 4),
    ]
    assert [step.after for step in steps.across] == [1, 2, 4, 6]


def test_pieces_that_look_alike_do() -> None:
    """So they share a plan: all but the last, in either slot."""
    topology = Topology.of_sizes([2, 2])
    steps = stages.allreduce_steps(View(topology, 1), small("allreduce", topology), 1000, 96, 4)
    assert len({(step.collective, step.sent, step.received) for step in steps.node}) == 4
    assert len({step.counts for step in steps.across}) == 2
