"""Collectives over several nodes: memory within each, messages between them.

`stages` says what a rank does, step by step; here each step gets a plan: of the node's channel, or of
messages between the owners of a slice. `lanes` goes through them. The stages are those that
`algorithms.hierarchical` describes and `verify` proves.

Plans whose steps look alike are one, used again and again: all pieces but the last are equally large. Across,
two pieces may be under way at once; each of the two has messages of its own, in a communicator of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from mpi4py import MPI

from mpicoll import algorithms, tuning
from mpicoll.algorithms.hierarchical import Topology
from mpicoll.kernels import reduce as kernels
from mpicoll.kernels.tasks import DONE, PENDING, Task
from mpicoll.schedule import Schedule
from mpicoll.transports import lanes, stages
from mpicoll.transports.arena import ArenaError, new_array
from mpicoll.transports.lanes import Lanes, Row
from mpicoll.transports.messages import BUFFERS, PC, MessagePlan
from mpicoll.transports.program import Layout, Place, compile_program
from mpicoll.transports.shared import NO_REDUCTION, PATIENT, Channel, Reduction, SharedPlan, Sizes, reduction
from mpicoll.transports.stages import AcrossStep, NodeStep, Range, Steps, View
from mpicoll.transports.steps import BROKEN, NEXT, RECV, SEND, STEP
from mpicoll.watch import Watch, of

COLLECTIVES = ("allreduce", "reduce_scatter", "broadcast", "allgather")  # that can be done so


def node_of(comm: MPI.Intracomm) -> MPI.Intracomm:
    """The ranks of ``comm`` that are on this rank's node, in the same order; collective."""
    return MPI.Intracomm(comm.Split_type(MPI.COMM_TYPE_SHARED))


def share_of_cores(whole: MPI.Intracomm, node: MPI.Intracomm) -> int:
    """How many of its machine's cores fall to this rank's node; collective.

    Containers, and hosts that are namespaces, share no memory and yet their cores: a rank that polls keeps
    others from working. What runs on the same system has the same boot identifier.
    """
    bound = os.sched_getaffinity(0)
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        machine = f"that of rank {node.bcast(whole.Get_rank())}"
    here = [cores for name, cores in whole.allgather((machine, bound)) if name == machine]
    return len(set().union(*here)) * node.Get_size() // len(here)


class Arithmetic(NamedTuple):
    """What is done to elements, where a collective reduces: addresses of kernels, see `MessagePlan`."""

    itemsize: int
    on_node: Reduction
    kernel: int = 0
    scale: int = 0


MOVING = Arithmetic(1, NO_REDUCTION)


class Hierarchy:
    """The nodes of a communicator: a channel on each, and for each slice its owners on all nodes.

    Making one is collective, over all ranks of ``whole``; ``node`` has those of this rank's node. ``reason``
    says why they cannot share memory, the same on all ranks; it is None where they can.
    """

    def __init__(self, whole: MPI.Intracomm, node: MPI.Intracomm, sizes: Sizes, spins: int) -> None:
        self.whole, self.node, self.spins = whole, node, spins
        first = node.bcast(whole.Get_rank())
        self.topology = Topology.of_ranks(whole.allgather(first))
        self.view = View(self.topology, whole.Get_rank())
        self.one_slice = View(replace(self.topology, most=1), whole.Get_rank())
        self.across = [self._owners() for _ in range(stages.SLOTS)]
        for comm in (node, *self.across):
            if comm != MPI.COMM_NULL:
                comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.channel = Channel(node, sizes)
        refused = self.channel.reason and f"on the node of rank {first}, {self.channel.reason}"
        self.reason = self._first_reason(refused, self.channel.within)

    def _owners(self) -> MPI.Intracomm:
        """The owners of this rank's slice, in the order of nodes; collective."""
        color = MPI.UNDEFINED if self.view.slice is None else self.view.slice
        return MPI.Intracomm(self.whole.Split(color, key=self.view.home))

    def _first_reason(self, reason: str | None, call: str) -> str | None:
        """The first that any rank has, on all ranks: what one node cannot do, the others must not begin."""
        reasons = of(self.whole)[0].allgather(self.whole, reason, call)
        return next((reason for reason in reasons if reason), None)

    @property
    def nnodes(self) -> int:
        return self.topology.nnodes

    def close(self) -> None:
        """No further call is possible; ``node`` stays. Collective."""
        if self.channel.reason is None:
            self.channel.close()
        for comm in self.across:
            if comm != MPI.COMM_NULL:
                comm.Free()

    def free(self) -> None:
        """`close`, and free ``node``, too."""
        self.close()
        self.node.Free()

    def attach(self, watch: Watch) -> None:
        """Let what happens on a node, and between nodes, be looked after with all the rest."""
        for comm in (self.node, *self.across):
            if comm != MPI.COMM_NULL:
                watch.attach(comm)
        watch.breaks(self.channel)

    def twin(self, within: str) -> Channel:
        """Another channel of this node, for calls that do not wait for other calls; collective.

        ``within`` says in which call, for errors. Raises `ArenaError` on all ranks if a node has no memory
        left for it.
        """
        twin, reason = None, None
        try:
            twin = self.channel.twin(within)
        except (ArenaError, MemoryError) as error:
            reason = str(error)
        reason = self._first_reason(reason, within)
        if twin is None or reason is not None:
            if twin is not None:
                twin.retired = True
            raise ArenaError(reason)
        return twin

    def allreduce_plan(self, operation: str, dtype: np.dtype[Any], count: int) -> HierarchicalPlan:
        """Reduce ``count`` elements, rounding to ``dtype`` in every stage: callers widen 16-bit floats."""
        item, nbytes = dtype.itemsize, count * dtype.itemsize
        view = self.one_slice if tuning.one_slice_pays(nbytes) else self.view
        piece = _elements(tuning.piece(1), item)
        travels = min(nbytes, piece * item) // view.topology.nslices
        steps = stages.allreduce_steps(view, self._between("allreduce", travels), count, piece, item)
        return HierarchicalPlan(self, steps, self._arithmetic(operation, dtype))

    def reduce_scatter_plan(
        self, operation: str, dtype: np.dtype[Any], counts: Sequence[int]
    ) -> HierarchicalPlan:
        """Reduce blocks of ``counts`` elements, one for each rank, as `allreduce_plan` does."""
        item, piece = dtype.itemsize, _elements(tuning.piece(len(counts)), dtype.itemsize)
        across = self._between("reduce_scatter", min(max(counts), piece) * item * self.nnodes)
        steps = stages.reduce_scatter_steps(self.view, across, counts, piece, item)
        return HierarchicalPlan(self, steps, self._arithmetic(operation, dtype))

    def broadcast_plan(self, nbytes: int, root: int) -> HierarchicalPlan:
        """Copy ``nbytes`` bytes of ``root``."""
        piece, home = tuning.piece(1), self.topology.node_of(root)
        across = self._between("broadcast", min(nbytes, piece) // self.topology.nslices, home)
        return HierarchicalPlan(self, stages.broadcast_steps(self.view, across, nbytes, piece, root), MOVING)

    def allgather_plan(self, counts: Sequence[int], displacements: Sequence[int]) -> HierarchicalPlan:
        """Collect ``counts[r]`` bytes of rank r at ``displacements[r]``."""
        piece = tuning.piece(len(counts))
        across = self._between("allgather", min(max(counts), piece) * self.nnodes)
        blocks = [Range(*block) for block in zip(displacements, counts, strict=True)]
        return HierarchicalPlan(self, stages.allgather_steps(self.view, across, blocks, piece), MOVING)

    def _between(self, collective: str, nbytes: int, root: int = 0) -> Schedule:
        """What the owners of a slice do with ``nbytes`` bytes of it."""
        name = tuning.choose(collective, self.nnodes, nbytes, network=True)
        return algorithms.schedule(collective, name, self.nnodes, root)

    def _arithmetic(self, operation: str, dtype: np.dtype[Any]) -> Arithmetic:
        average = operation == "AVG"
        kernel = "SUM" if average else operation
        return Arithmetic(
            dtype.itemsize,
            reduction(kernel, dtype, self.node.Get_size()),
            kernels.reduce_kernel(kernel, dtype),
            # Scaled once, where a sum is complete: across.
            kernels.scale_kernel(dtype) if average else 0,
        )


def _elements(nbytes: int, itemsize: int) -> int:
    return max(1, nbytes // itemsize)


def _memory(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """For slices: where the other ranks of the node can read them, so that nothing is copied for them."""
    try:
        return new_array(nbytes, np.uint8)
    except MemoryError:
        return np.empty(nbytes, np.uint8)


class HierarchicalPlan:
    """A collective over several nodes, to be bound to buffers and run again and again."""

    tagged = True  # calls are told from each other by a tag

    def __init__(self, hierarchy: Hierarchy, steps: Steps, arithmetic: Arithmetic) -> None:
        self._hierarchy, self._arithmetic = hierarchy, arithmetic
        self._channel = hierarchy.channel
        self._shared: dict[Any, SharedPlan] = {}
        self._messages: dict[Any, MessagePlan] = {}
        self._memory = _memory(max(1, steps.scratch * arithmetic.itemsize))
        self._on_node = [self._node_plan(step) for step in steps.node]
        self._across = [self._across_plan(step, number) for number, step in enumerate(steps.across)]
        self._lanes = Lanes(
            [self._node_row(*pair) for pair in zip(self._on_node, steps.node, strict=True)],
            [self._across_row(*pair) for pair in zip(self._across, steps.across, strict=True)],
            self._memory.ctypes.data,
            hierarchy.spins,
        )
        self.set_factor(1 / hierarchy.whole.Get_size())
        # Bytes of memory of its own.
        self.scratch = self._memory.nbytes + sum(plan.scratch for plan in self._messages.values())

    # -- a plan for each step

    def _node_plan(self, step: NodeStep) -> SharedPlan:
        key = (step.collective, step.sent, step.received, step.root)
        if key not in self._shared:
            self._shared[key] = self._new_node_plan(step)
        return self._shared[key]

    def _new_node_plan(self, step: NodeStep) -> SharedPlan:
        reduces = step.collective in ("reduce", "reduce_scatter")
        plan = SharedPlan(self._channel, self._arithmetic.on_node if reduces else NO_REDUCTION)
        unit = 1 if reduces else self._arithmetic.itemsize  # what only moves is counted in bytes
        if step.collective in ("reduce", "broadcast"):  # one block for all
            return plan.set_up(step.collective, step.sent.lengths[0] * unit, step.root)
        sent, received = (
            ([at * unit for at in blocks.at], [n * unit for n in blocks.lengths])
            for blocks in (step.sent, step.received)
        )
        return plan.set_up_blocks(step.collective, sent, received, uneven=step.collective == "alltoall")

    def _across_plan(self, step: AcrossStep, number: int) -> MessagePlan:
        slot = number % stages.SLOTS
        key = (slot, step.counts, step.input_at, step.output_at, step.source == step.target)
        if key not in self._messages:
            self._messages[key] = self._new_across_plan(step, slot)
        return self._messages[key]

    def _new_across_plan(self, step: AcrossStep, slot: int) -> MessagePlan:
        arithmetic = self._arithmetic
        counts, *places = (np.array(table) for table in (step.counts, step.input_at, step.output_at))
        layout = Layout(counts, places[0], places[1], in_place=step.source == step.target)
        pipeline = tuning.pipeline(step.schedule.nranks, sum(step.counts) * arithmetic.itemsize, network=True)
        average = bool(arithmetic.scale)
        program = compile_program(step.schedule, step.rank, layout, arithmetic.itemsize, pipeline, average)
        comm, spins = self._hierarchy.across[slot], self._hierarchy.spins
        return MessagePlan(program, comm, spins, arithmetic.kernel, arithmetic.scale)

    def _node_row(self, plan: SharedPlan, step: NodeStep) -> Row:
        progress, send, recv = (plan.address + 8 * word for word in (STEP, SEND, RECV))
        places = self._in_bytes(step.source), self._in_bytes(step.target)
        return Row(plan.tasks[0], progress, send, recv, *places, step.after)

    def _across_row(self, plan: MessagePlan, step: AcrossStep) -> Row:
        (task,) = plan.tasks
        progress, send, recv = (task.state + 8 * word for word in (PC, BUFFERS, BUFFERS + 1))
        places = self._in_bytes(step.source), self._in_bytes(step.target)
        return Row(task, progress, send, recv, *places, step.after)

    def _in_bytes(self, place: Place) -> tuple[int, int]:
        return int(place.buffer), place.at * self._arithmetic.itemsize

    # -- what every plan can do

    def move_to(self, channel: Channel) -> None:
        """Go through a twin of the node's channel."""
        self._channel = channel
        for plan in self._shared.values():
            plan.move_to(channel)

    @property
    def tasks(self) -> list[Task]:
        """The collective, once bound, for other compiled code."""
        return [self._lanes.task(self)]

    def set_factor(self, factor: float) -> None:
        """What sums are multiplied by where the operation is AVG, instead of one over the number of ranks."""
        for plan in self._messages.values():
            plan.set_factor(factor)

    def retire(self) -> None:
        """The caller needs the plan, and its own channel, no more."""
        self._channel.retired = True

    def bind(self, tag: int, send: int, recv: int) -> None:
        """Use the caller's buffers at these addresses; nothing is published or sent yet."""
        for plan in self._messages.values():
            plan.bind(tag, send, recv)
        self._lanes.bind(send, recv)

    @property
    def bound_words(self) -> tuple[int, int, list[int]]:
        """Addresses of what `bind` writes: where the buffers' addresses go, and the tags."""
        send = self._lanes.address + 8 * lanes.BUFFERS
        return send, send + 8, [tag for plan in self._messages.values() for tag in plan.bound_words[2]]

    def run(self, tag: int, send: int, recv: int) -> None:
        """`bind` and `advance` to the end."""
        self.bind(tag, send, recv)
        while not self.advance():
            pass

    def advance(self, patience: int = PATIENT) -> bool:
        """Go on; whether the collective is complete on this rank.

        Returns false when nothing has come for ``patience`` nanoseconds. Raises as `SharedPlan.advance` and
        `MessagePlan.advance` do.
        """
        try:
            result = lanes.advance(self._lanes.address, patience)
            if result == DONE:
                return True
            if result != PENDING:
                self.fail(result)
            if patience == PATIENT:
                self.check()
            return False
        except BaseException as error:
            self.give_up(error)
            raise

    def check(self) -> None:
        """Raise if a rank that is waited for will never come."""
        number = self._lanes.on_node
        if number is not None and self._on_node[number].words[STEP]:
            self._on_node[number].check()
        elif number is not None:
            self._channel.check(int(self._channel.state[NEXT]))  # the first step of what is to come
        for number in self._lanes.across:
            self._across[number].check()

    def fail(self, result: int) -> NoReturn:
        """Raise the error that `advance` of compiled code has met."""
        number = self._lanes.on_node
        if self._lanes.failed_on_node and number is not None:
            self._on_node[number].fail(result)
        self._across[self._lanes.across[0]].fail(result)

    def give_up(self, error: BaseException) -> None:
        """The others are not to wait for this rank, which has met ``error``."""
        # Those of the node wait for what will not come.
        if self._lanes.on_node is not None and not self._channel.state[BROKEN]:
            self._channel.give_up(f"{type(error).__name__}: {error}")
        self._channel.watch.give_up(error)
