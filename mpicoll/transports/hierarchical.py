"""Allreduce over several nodes: memory within each, messages between them.

Every node cuts the vector into the same L **slices**, L being the smallest node's number of ranks; slice i
belongs to the i-th rank of every node. Ranks beyond the L-th have no slice, but take part on their node.

1. **reduce-scatter** on the node, through its channel: rank i gets the node's sum of slice i;
2. **allreduce** of slice i among the i-th ranks of all nodes, in messages: a ring, whose links are all busy;
3. **allgather** on the node, through its channel.

Worked example: 2 nodes, the first with ranks a, b, the second with c, d, e; so L = 2. ``a1`` is rank a's part
of slice 1, ``*`` marks a complete sum.

                      a             b             c             d             e
    starts with       a0 a1         b0 b1         c0 c1         d0 d1         e0 e1
    reduce-scatter    a0+b0  .      .  a1+b1      c0+d0+e0 .    .  c1+d1+e1   .  .
    allreduce         0*  .         .  1*         0*  .         .  1*         .  .
    allgather         0*  1*        0*  1*        0*  1*        0*  1*        0*  1*

Every slice is summed in one place a node and then by one schedule, so every rank gets the same bits.

Cost for n bytes, N nodes of p ranks, in latency α and time per byte β between nodes, α' and β' in memory, and
time per byte reduced γ: 2α' + 2n(p-1)/p β' + n(p-1)/p γ on the nodes, and between them
2(N-1)α + 2(n/p)(N-1)/N β + (n/p)(N-1)/N γ. Each node sends 2n(N-1)/N bytes, the least possible, from p ranks
at once, and nobody waits for 2(pN-1) messages, as in a ring over all ranks. The stages follow each other:
what could overlap does not.

Sources: M. Cho, U. Finkler, D. Kung, H. Hunter, "BlueConnect: Decomposing All-Reduce for Deep Learning on
Heterogeneous Network Hierarchy", MLSys (2019); H. Mikami et al., "Massively Distributed SGD:
ImageNet/ResNet-50 Training in a Flash", arXiv:1811.05233 (2018), where it is the 2D-torus all-reduce.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from mpicoll import algorithms, tuning
from mpicoll.kernels import reduce as kernels
from mpicoll.kernels.tasks import Task, run
from mpicoll.schedule import chunk_bounds
from mpicoll.transports.arena import ArenaError, new_array
from mpicoll.transports.messages import MessagePlan
from mpicoll.transports.program import Layout, compile_program
from mpicoll.transports.shared import PATIENT, Channel, SharedPlan, Sizes, reduction
from mpicoll.transports.steps import BROKEN, NEXT
from mpicoll.watch import Watch

Stage = Callable[[int], bool]  # goes on for so many nanoseconds; whether it is complete


def node_of(comm: MPI.Intracomm) -> MPI.Intracomm:
    """The ranks of ``comm`` that are on this rank's node, in the same order; collective."""
    return MPI.Intracomm(comm.Split_type(MPI.COMM_TYPE_SHARED))


class Hierarchy:
    """The nodes of a communicator: a channel on each, and for each slice its ranks of all nodes.

    Making one is collective, over all ranks of ``whole``; ``node`` has those of this rank's node. ``reason``
    says why they cannot share memory, the same on all ranks; it is None where they can.
    """

    def __init__(self, whole: MPI.Intracomm, node: MPI.Intracomm, sizes: Sizes, spins: int) -> None:
        self._whole, self._node, self._spins = whole, node, spins
        self._rank, self._nranks = node.Get_rank(), node.Get_size()
        first = node.bcast(whole.Get_rank())
        nranks_of = Counter(whole.allgather(first))
        self.nnodes = len(nranks_of)
        self._nslices = min(nranks_of.values())
        has_slice = self._rank < self._nslices
        self._across = MPI.Intracomm(whole.Split(self._rank if has_slice else MPI.UNDEFINED, key=first))
        for comm in (node, self._across) if has_slice else (node,):
            comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.channel = Channel(node, sizes)
        refused = self.channel.reason and f"on the node of rank {first}, {self.channel.reason}"
        self.reason = self._first_reason(refused)

    def _first_reason(self, reason: str | None) -> str | None:
        """The first that any rank has, on all ranks: what one node cannot do, the others must not begin."""
        return next((reason for reason in self._whole.allgather(reason) if reason), None)

    def close(self) -> None:
        """No further call is possible; ``node`` stays. Collective."""
        if self.channel.reason is None:
            self.channel.close()
        if self._across != MPI.COMM_NULL:
            self._across.Free()

    def free(self) -> None:
        """`close`, and free ``node``, too."""
        self.close()
        self._node.Free()

    def attach(self, watch: Watch) -> None:
        """Let what happens on a node, and between nodes, be looked after with all the rest."""
        for comm in (self._node, self._across):
            if comm != MPI.COMM_NULL:
                watch.attach(comm)

    def twin(self) -> Channel:
        """Another channel of this node, for calls that do not wait for other calls; collective.

        Raises `ArenaError` on all ranks if a node has no memory left for it.
        """
        twin, reason = None, None
        try:
            twin = self.channel.twin()
        except (ArenaError, MemoryError) as error:
            reason = str(error)
        reason = self._first_reason(reason)
        if twin is None or reason is not None:
            if twin is not None:
                twin.retired = True
            raise ArenaError(reason)
        return twin

    def allreduce_plan(self, operation: str, dtype: np.dtype[Any], count: int) -> HierarchicalPlan:
        """Reduce ``count`` elements, rounding to ``dtype`` in every stage: callers widen 16-bit floats."""
        kernel = "SUM" if operation == "AVG" else operation
        bounds = chunk_bounds(count, self._nslices, dtype.itemsize)
        nothing = [0] * (self._nranks - self._nslices)
        begins, counts = [*bounds[:-1].tolist(), *nothing], [*np.diff(bounds).tolist(), *nothing]
        mine = counts[self._rank]
        part = _memory(max(1, mine * dtype.itemsize))  # an address, also where there is no slice
        scale = None
        if operation == "AVG":
            # Once, by the number of all ranks: what the stages know is the number of their own.
            elements = part[: mine * dtype.itemsize].view(dtype)
            scale = kernels.scale_task(elements, 1 / self._whole.Get_size())
        return HierarchicalPlan(
            self._scatter_plan(kernel, dtype, begins, counts),
            self._slice_plan(kernel, dtype, mine),
            scale,
            self._gather_plan(dtype.itemsize, begins, counts),
            part,
        )

    def _scatter_plan(
        self, kernel: str, dtype: np.dtype[Any], begins: list[int], counts: list[int]
    ) -> SharedPlan:
        plan = SharedPlan(self.channel, reduction(kernel, dtype, self._nranks))
        return plan.set_up_blocks("reduce_scatter", (begins, counts), ([0] * self._nranks, counts))

    def _slice_plan(self, kernel: str, dtype: np.dtype[Any], count: int) -> MessagePlan | None:
        """The allreduce of this rank's slice, in place, among its ranks of all nodes."""
        if self._across == MPI.COMM_NULL:
            return None
        nbytes = count * dtype.itemsize
        name = tuning.choose("allreduce", 2, nbytes) if self.nnodes == 2 else "ring"
        schedule = algorithms.schedule("allreduce", name, self.nnodes)
        bounds = chunk_bounds(count, schedule.nchunks, dtype.itemsize)
        layout = Layout(np.diff(bounds), bounds[:-1], bounds[:-1], in_place=True)
        pipeline = tuning.pipeline(self.nnodes, nbytes)
        program = compile_program(schedule, self._across.Get_rank(), layout, dtype.itemsize, pipeline)
        return MessagePlan(program, self._across, self._spins, kernels.reduce_kernel(kernel, dtype))

    def _gather_plan(self, itemsize: int, begins: list[int], counts: list[int]) -> SharedPlan:
        at, lengths = [begin * itemsize for begin in begins], [count * itemsize for count in counts]
        nothing, own = [0] * self._nranks, [lengths[self._rank]] * self._nranks
        return SharedPlan(self.channel).set_up_blocks("allgather", (nothing, own), (at, lengths))


def _memory(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """For a slice: where the other ranks of the node can read it, so that nothing is copied for them."""
    try:
        return new_array(nbytes, np.uint8)
    except MemoryError:
        return np.empty(nbytes, np.uint8)


class HierarchicalPlan:
    """An allreduce over several nodes, to be bound to buffers and run again and again.

    ``part`` is the memory of this rank's slice, ``across`` its allreduce, ``scale`` what makes it a mean.
    """

    tagged = True  # calls are told from each other by a tag

    def __init__(
        self,
        scatter: SharedPlan,
        across: MessagePlan | None,
        scale: Task | None,
        gather: SharedPlan,
        part: np.ndarray[Any, np.dtype[np.uint8]],
    ) -> None:
        self._scatter, self._across, self._scale, self._gather = scatter, across, scale, gather
        self._part = part
        self.scratch = part.nbytes + (across.scratch if across else 0)  # bytes
        self._stages: list[Stage] = [scatter.advance, self._advance_across, gather.advance]
        self._stage = 0

    @property
    def _channel(self) -> Channel:
        return self._scatter.channel

    def move_to(self, channel: Channel) -> None:
        """Go through a twin of the node's channel."""
        self._scatter.move_to(channel)
        self._gather.move_to(channel)

    @property
    def tasks(self) -> list[Task]:
        """The stages, once bound, for other compiled code."""
        across = self._across.tasks if self._across is not None else []
        scale = [self._scale] if self._scale is not None else []
        return [*self._scatter.tasks, *across, *scale, *self._gather.tasks]

    def set_factor(self, factor: float) -> None:
        """What sums are multiplied by where the operation is AVG, instead of one over the number of ranks."""
        assert self._scale is not None
        elements, _ = self._scale.keep
        self._scale = kernels.scale_task(elements, factor)

    def retire(self) -> None:
        """The caller needs the plan, and its own channel, no more."""
        self._scatter.retire()

    def bind(self, tag: int, send: int, recv: int) -> None:
        """Use the caller's buffers at these addresses; nothing is published or sent yet."""
        part = self._part.ctypes.data
        self._scatter.bind(tag, send, part)
        if self._across is not None:
            self._across.bind(tag, part, part)
        self._gather.bind(tag, part, recv)

    def run(self, tag: int, send: int, recv: int) -> None:
        """`bind` and `advance` to the end."""
        self.bind(tag, send, recv)
        while not self.advance():
            pass

    def advance(self, patience: int = PATIENT) -> bool:
        """Go on; whether the allreduce is complete on this rank.

        Returns false when nothing has come for ``patience`` nanoseconds. Raises as `SharedPlan.advance` and
        `MessagePlan.advance` do.
        """
        try:
            while self._stage < len(self._stages):
                if not self._stages[self._stage](patience):
                    return False
                self._stage += 1
        except BaseException as error:
            self._break_off(error)
            raise
        self._stage = 0
        return True

    def _advance_across(self, patience: int) -> bool:
        if self._across is not None and not self._across.advance(patience):
            if patience == PATIENT:
                self._channel.check(int(self._channel.state[NEXT]))  # the gathering's first step
            return False
        if self._scale is not None:
            run(self._scale)
        return True

    def _break_off(self, error: BaseException) -> None:
        # The last stage looks after itself. Before that, the others of the node wait for what will not come.
        if self._stage < len(self._stages) - 1 and not self._channel.state[BROKEN]:
            self._channel.give_up(f"{type(error).__name__}: {error}")
