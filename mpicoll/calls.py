"""From the arguments of a collective to a `Call`: checked, laid out, with its plan found or made.

One method a collective. Reductions count in elements, everything else moves bytes. A method returns None
where only MPI itself can do what was asked: operations that users made, and datatypes without a NumPy name
in a reduction.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from mpicoll import algorithms, chunks, tuning
from mpicoll.buffers import BYTES, Blocks, Dtype, Message, check_same_type, parse, parse_blocks
from mpicoll.chunks import Parts, Shape, byte_shape
from mpicoll.gpu.calls import PLACE, GpuCalls, Sharing, on_gpu
from mpicoll.gpu.plans import GpuPlan
from mpicoll.kernels import reduce as kernels
from mpicoll.requests import Call, Plan
from mpicoll.schedule import Schedule
from mpicoll.transports.hierarchical import COLLECTIVES as HIERARCHICAL_COLLECTIVES
from mpicoll.transports.hierarchical import Hierarchy
from mpicoll.transports.messages import MessagePlan
from mpicoll.transports.program import Layout, compile_program
from mpicoll.transports.shared import NO_REDUCTION, Channel, Reduction, SharedPlan, reduction
from mpicoll.tune.table import NO_CHOICES, Choices, Rule
from mpicoll.watch import What, of, what

FLOAT32 = np.dtype(np.float32)
MAX_PLANS = 128  # kept for one-shot calls, the least recently used going first
MAX_SCRATCH = 256 << 20  # bytes that kept plans may hold together


class Average:
    """The operation `AVG`: the sum divided by the number of ranks, for floating dtypes."""

    def __repr__(self) -> str:
        return "mpicoll.AVG"


AVG = Average()
Operation = MPI.Op | Average

OPERATIONS = kernels.OPERATIONS  # names of MPI's own that we do by hand
_OPERATION_NAMES = {MPI._handleof(getattr(MPI, name)): name for name in OPERATIONS}


# Named where the others are algorithms: what the shared transport does, whatever the size, and what it does
# on each of several nodes, with messages between them.
SHARED = "shared"
HIERARCHICAL = "hierarchical"


class _Plans:
    """Plans that no call uses at the moment, by what they were made for; the progress thread returns some."""

    def __init__(self) -> None:
        self._free: OrderedDict[Any, list[Plan]] = OrderedDict()
        self._count = 0
        self._scratch = 0
        self._turn = threading.RLock()  # a plan that goes may give back others, which it has used

    def take(self, key: Any) -> Plan | None:
        with self._turn:
            plans = self._free.get(key)
            if not plans:
                return None
            self._free.move_to_end(key)
            return self._removed(plans.pop())

    def put(self, key: Any, plan: Plan) -> None:
        gone = []  # which may give back others when they go: not in here
        with self._turn:
            self._free.setdefault(key, []).append(plan)
            self._count += 1
            self._scratch += plan.scratch
            while self._count > MAX_PLANS or (self._scratch > MAX_SCRATCH and self._count > 1):
                oldest, plans = next(iter(self._free.items()))
                if plans:
                    gone.append(self._removed(plans.pop(0)))
                if not plans:
                    self._free.pop(oldest, None)

    def _removed(self, plan: Plan) -> Plan:
        self._count -= 1
        self._scratch -= plan.scratch
        return plan


class CallMaker:
    """Makes the calls of one communicator. ``private`` carries our messages, apart from the user's.

    ``channel`` leads to the ranks' shared memory, ``hierarchy`` to that of each node, where there are
    several. Without them everything travels in messages; ``no_hierarchy`` says why there is none, and
    ``network`` whether there are several nodes. ``sharing`` is about GPUs; ``nonblocking`` says that calls
    may overlap. ``choices``: what was measured to be better than the static choice; the same on all ranks.
    """

    def __init__(
        self,
        private: MPI.Intracomm,
        spins: int,
        algorithm: str,
        sharing: Sharing,
        channel: Channel | None = None,
        hierarchy: Hierarchy | None = None,
        no_hierarchy: str | None = None,
        network: bool = False,
        nonblocking: bool = False,
        choices: Choices = NO_CHOICES,
    ) -> None:
        self.private = private
        self.choices = choices
        self._channel = channel
        self._hierarchy = hierarchy
        self._no_hierarchy = no_hierarchy
        self.rank = private.Get_rank()
        self.nranks = private.Get_size()
        self.network = network
        self._spins = spins
        self._algorithm = algorithm
        self._plans = _Plans()
        self.watch = of(private)[0]
        self._gpu = GpuCalls(self, sharing, nonblocking)

    @property
    def on_one_node(self) -> bool:
        """Whether all ranks share memory."""
        return self._channel is not None

    def release(self, call: Call) -> None:
        """Keep the plan of a completed call for the next one like it."""
        if isinstance(call.plan, GpuPlan):
            call.plan.rest()
        if call.key is not None:
            self._plans.put(call.key, call.plan)

    def take(self, key: Any) -> Plan | None:
        """A kept plan for calls of this kind, or None."""
        return self._plans.take(key)

    # -- reductions

    def allreduce(
        self, sendbuf: Any, recvbuf: Any, op: Operation = MPI.SUM, *, algorithm: str | None = None
    ) -> Call | None:
        """Reduce all ranks' ``sendbuf`` into every rank's ``recvbuf``; ``sendbuf`` may be IN_PLACE."""
        recv = parse(recvbuf, "recvbuf", writable=True)
        send = recv if sendbuf is MPI.IN_PLACE else parse(sendbuf, "sendbuf")
        operation = _reduction(send, recv, op)
        if operation is None:
            return None
        _check_count(recv, send.count, "as in sendbuf")
        name = self.choose("allreduce", algorithm, send.count * send.size)
        return self.reduction_call("allreduce", name, operation, send, recv, send.count)

    def reduce(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Operation = MPI.SUM,
        root: int = 0,
        *,
        algorithm: str | None = None,
    ) -> Call | None:
        """Reduce all ranks' ``sendbuf`` into ``recvbuf`` of ``root``; others may pass None there."""
        self._check_root(root)
        at_root = self.rank == root
        if not at_root and sendbuf is MPI.IN_PLACE:
            raise ValueError(
                f"sendbuf: expected data on rank {self.rank}; only root {root} may pass IN_PLACE"
            )
        recv = parse(recvbuf, "recvbuf", writable=True) if at_root else None
        send = recv if sendbuf is MPI.IN_PLACE and recv is not None else parse(sendbuf, "sendbuf")
        operation = _reduction(send, recv or send, op)
        if operation is None:
            return None
        if recv is not None:
            _check_count(recv, send.count, "as in sendbuf")
        name = self.choose("reduce", algorithm, send.count * send.size)
        return self.reduction_call("reduce", name, operation, send, recv, send.count, root)

    def reduce_scatter_block(
        self, sendbuf: Any, recvbuf: Any, op: Operation = MPI.SUM, *, algorithm: str | None = None
    ) -> Call | None:
        """Reduce ``sendbuf``, nranks blocks of equal size; rank r gets block r in ``recvbuf``."""
        return self._reduce_scatter(sendbuf, recvbuf, None, op, algorithm, equal=True)

    def reduce_scatter(
        self,
        sendbuf: Any,
        recvbuf: Any,
        recvcounts: Sequence[int] | None = None,
        op: Operation = MPI.SUM,
        *,
        algorithm: str | None = None,
    ) -> Call | None:
        """As `Reduce_scatter_block` with blocks of ``recvcounts`` elements, by default ``recvbuf``s."""
        return self._reduce_scatter(sendbuf, recvbuf, recvcounts, op, algorithm, equal=False)

    def _reduce_scatter(
        self,
        sendbuf: Any,
        recvbuf: Any,
        recvcounts: Sequence[int] | None,
        op: Operation,
        algorithm: str | None,
        equal: bool,
    ) -> Call | None:
        in_place = sendbuf is MPI.IN_PLACE
        recv = parse(recvbuf, "recvbuf", writable=True, blocks=self.nranks if equal and in_place else 1)
        send = recv if in_place else parse(sendbuf, "sendbuf", blocks=self.nranks if equal else 1)
        operation = _reduction(send, recv, op)
        if operation is None:
            return None
        if equal:
            recvcounts = [recv.count] * self.nranks
        elif recvcounts is None:
            if in_place:
                raise ValueError("recvcounts: expected a count for each rank with IN_PLACE, got None")
            with self.watch.understanding():
                recvcounts = self.private.allgather(recv.count)
        counts = [int(count) for count in recvcounts]
        if len(counts) != self.nranks or min(counts) < 0:
            raise ValueError(f"recvcounts: expected {self.nranks} counts of 0 or more, got {counts}")
        if equal:
            _check_count(recv, send.count, f"as in each of the {self.nranks} blocks of sendbuf")
        elif not in_place:
            _check_count(send, sum(counts), "the sum of all ranks' receive counts")
            _check_count(recv, counts[self.rank], f"recvcounts[{self.rank}]")
        else:
            _check_count(recv, sum(counts), "the sum of recvcounts, being both input and output")
        name = self.choose("reduce_scatter", algorithm, sum(counts) * recv.size)
        return self.reduction_call("reduce_scatter", name, operation, send, recv, tuple(counts))

    def reduction_call(
        self,
        collective: str,
        algorithm: str,
        operation: str,
        send: Message,
        recv: Message | None,
        shape: int | tuple[int, ...],
        root: int = 0,
    ) -> Call:
        """A reduction whose arguments are known to be right; ``shape`` is a count, or one for each block."""
        if on_gpu(send, recv):
            nbytes = (shape if isinstance(shape, int) else sum(shape)) * send.size
            messages = self._of_messages(collective, algorithm, nbytes)
            return self._gpu.reduction(collective, algorithm, messages, operation, send, recv, shape, root)
        assert send.dtype is not None
        total = shape if isinstance(shape, int) else sum(shape)
        into = recv.address if recv is not None else 0
        in_place = recv is not None and recv.address == send.address
        widened = algorithm != SHARED and kernels.rounds_often(operation, send.dtype, self.nranks)
        # A scattered result moves to the front of its buffer, where an input may still be wanted.
        staged = in_place and collective == "reduce_scatter"
        dtype = FLOAT32 if widened else send.dtype
        in_place = (in_place and not staged) or (widened and collective != "reduce_scatter")
        key = (collective, algorithm, operation, dtype, shape, root, in_place)
        plan = self._plans.take(key) or self._reduction_plan(*key)
        rooted = root if collective == "reduce" else None
        named = what(collective, algorithm, send.dtype, shape, operation, rooted)
        call = Call(plan, key, named, send.address, into, (send.data, recv and recv.data))
        if widened:
            results = 0 if recv is None else total if isinstance(shape, int) else shape[self.rank]
            _widen(call, send.dtype, total, results, in_place)
        elif staged:
            _stage_input(call, total * send.size)
        return call

    def _reduction_plan(
        self,
        collective: str,
        algorithm: str,
        operation: str,
        dtype: Dtype,
        shape: int | tuple[int, ...],
        root: int,
        in_place: bool,
    ) -> Plan:
        if algorithm == SHARED:
            plan = self._shared_plan(reduction(operation, dtype, self.nranks))
            if isinstance(shape, int):
                return plan.set_up(collective, shape, root)
            begins = np.cumsum([0, *shape[:-1]]).tolist()
            return plan.set_up_blocks(collective, (begins, shape), ([0] * self.nranks, shape))
        if algorithm == HIERARCHICAL:
            assert self._hierarchy is not None
            if isinstance(shape, int):
                return self._hierarchy.allreduce_plan(operation, dtype, shape)
            return self._hierarchy.reduce_scatter_plan(operation, dtype, shape)
        parts = chunks.reduction(collective, algorithm, self.nranks, shape, root, dtype.itemsize, in_place)
        average = operation == "AVG"
        kernel = kernels.reduce_kernel("SUM" if average else operation, dtype)
        scale = kernels.scale_kernel(dtype) if average else 0
        return self._plan(parts, dtype.itemsize, kernel, scale)

    # -- one sends, or one receives

    def bcast(self, buf: Any, root: int = 0, *, algorithm: str | None = None) -> Call:
        """Copy ``buf`` of ``root`` into every rank's."""
        self._check_root(root)
        message = parse(buf, "buf", writable=self.rank != root)
        name = self.choose("broadcast", algorithm, message.count * message.size)
        return self.broadcast_call(message, name, root)

    def broadcast_call(self, message: Message, name: str, root: int) -> Call:
        """A broadcast by the algorithm of this name, whose arguments are known to be right."""
        if on_gpu(message):
            messages = self._of_messages("broadcast", name, message.count * message.size)
            return self._gpu.broadcast(message, name, messages, root)
        nbytes = message.count * message.size
        key = ("broadcast", name, nbytes, root)
        plan = self._plans.take(key) or self._broadcast_plan(*key)
        named = what("broadcast", name, None, nbytes, "", root)
        call = Call(plan, key, named, 0, message.address, (message.data,))
        if not message.plain:
            block = _one_block(message)
            call.recv = _stage_blocks(call, block, read=self.rank == root, write=self.rank != root)
        call.send = call.recv
        return call

    def _broadcast_plan(self, collective: str, algorithm: str, nbytes: int, root: int) -> Plan:
        if algorithm == SHARED:
            return self._shared_plan().set_up(collective, nbytes, root)
        if algorithm == HIERARCHICAL:
            assert self._hierarchy is not None
            return self._hierarchy.broadcast_plan(nbytes, root)
        return self._plan(chunks.broadcast(algorithm, self.nranks, nbytes, root))

    def gather(self, sendbuf: Any, recvbuf: Any, root: int = 0, *, algorithm: str | None = None) -> Call:
        """Collect every rank's ``sendbuf`` as blocks of equal size in ``recvbuf`` of ``root``."""
        return self._rooted("gather", sendbuf, recvbuf, root, algorithm, vector=False)

    def gatherv(self, sendbuf: Any, recvbuf: Any, root: int = 0, *, algorithm: str | None = None) -> Call:
        """As `Gather`, blocks of uneven size: ``[data, counts, displacements, datatype]``."""
        return self._rooted("gather", sendbuf, recvbuf, root, algorithm, vector=True)

    def scatter(self, sendbuf: Any, recvbuf: Any, root: int = 0, *, algorithm: str | None = None) -> Call:
        """Hand out ``sendbuf`` of ``root`` in blocks of equal size, block r to rank r's ``recvbuf``."""
        return self._rooted("scatter", recvbuf, sendbuf, root, algorithm, vector=False)

    def scatterv(self, sendbuf: Any, recvbuf: Any, root: int = 0, *, algorithm: str | None = None) -> Call:
        """As `Scatter`, blocks of uneven size: ``[data, counts, displacements, datatype]``."""
        return self._rooted("scatter", recvbuf, sendbuf, root, algorithm, vector=True)

    def _rooted(
        self, collective: str, own: Any, blocks: Any, root: int, algorithm: str | None, vector: bool
    ) -> Call:
        """Gather or scatter: a rank has its ``own`` block in one buffer, the root ``blocks`` in another."""
        self._check_root(root)
        at_root = self.rank == root
        in_place = at_root and own is MPI.IN_PLACE
        sends = collective == "gather"
        own_name, blocks_name = ("sendbuf", "recvbuf") if sends else ("recvbuf", "sendbuf")
        parsed = self._blocks(blocks, blocks_name, vector, writable=sends) if at_root else None
        if in_place and parsed is not None:
            mine = _own_block(parsed, root)
        else:
            mine = _one_block(parse(own, own_name, writable=not sends))
        if parsed is not None:
            _check_block(parsed, root, mine)
        return self._rooted_call(collective, mine, parsed, root, algorithm, vector, in_place)

    def _rooted_call(
        self,
        collective: str,
        own: Blocks,
        blocks: Blocks | None,
        root: int,
        algorithm: str | None,
        vector: bool,
        in_place: bool,
    ) -> Call:
        own_bytes = own.counts[0] * own.message.size
        # With uneven blocks a rank knows its own size only, so no rank can pass on another's block.
        only = ("direct",) if vector else None
        name = self.choose(collective, algorithm, own_bytes * self.nranks, only)
        sends = collective == "gather"
        counts = (0,) * self.nranks if vector else (own_bytes,) * self.nranks
        shape = Shape(counts, counts) if blocks is None else byte_shape(blocks)
        if blocks is None:
            shape.counts[self.rank] = own_bytes
        if on_gpu(own.message, blocks.message if blocks else None):
            named = _named(collective, name, None if vector else own_bytes, root, PLACE)
            messages = self._of_messages(collective, name, own_bytes * self.nranks, only)
            parts = chunks.rooted(collective, messages, self.nranks, shape, root, in_place)

            def hosted(sent: Blocks | None, received: Blocks | None) -> Call:
                mine, all_ = (sent, received) if sends else (received, sent)
                assert mine is not None
                return self._rooted_call(collective, mine, all_, root, algorithm, vector, in_place)

            sent, received = (own, blocks) if sends else (blocks, own)
            return self._gpu.blocks(collective, named, sent, received, hosted, parts, root)
        key = (collective, name, vector, shape.key, own_bytes, root, in_place)
        plan = self._plans.take(key)
        if plan is None and name == SHARED:
            plan = self._shared_rooted_plan(collective, own_bytes, shape if blocks else None, root, vector)
        elif plan is None:
            parts = chunks.rooted(collective, name, self.nranks, shape, root, in_place)
            plan = self._plan(parts, agreed=False)
        named = _named(collective, name, None if vector else own_bytes, root)
        call = Call(plan, key, named, 0, 0, (own.message.data, blocks and blocks.message.data))
        own_at = 0 if in_place else _stage_blocks(call, own, read=sends, write=not sends)
        blocks_at = (
            0 if blocks is None else _stage_blocks(call, blocks, read=not sends or in_place, write=sends)
        )
        if in_place and name == SHARED:
            own_at = blocks_at + shape.displacements[root]
        if in_place and name != SHARED:
            call.recv = blocks_at
        elif sends:
            call.send, call.recv = own_at, blocks_at
        else:
            call.send, call.recv = blocks_at, own_at
        return call

    def _shared_rooted_plan(
        self, collective: str, own_bytes: int, blocks: Shape | None, root: int, vector: bool
    ) -> SharedPlan:
        plan = self._shared_plan()
        if not vector:
            return plan.set_up(collective, own_bytes, root)
        nothing = [0] * self.nranks
        theirs = (blocks.displacements, blocks.counts) if blocks else (nothing, nothing)
        if collective == "gather":
            return plan.set_up_blocks(collective, (nothing, [own_bytes] * self.nranks), theirs, root, True)
        mine = [own_bytes if rank == root else 0 for rank in range(self.nranks)]
        return plan.set_up_blocks(collective, theirs, (nothing, mine), root, True)

    # -- everybody sends and receives

    def allgather(self, sendbuf: Any, recvbuf: Any, *, algorithm: str | None = None) -> Call:
        """Collect every rank's ``sendbuf`` as blocks of equal size in every rank's ``recvbuf``."""
        return self._allgather(sendbuf, recvbuf, algorithm, vector=False)

    def allgatherv(self, sendbuf: Any, recvbuf: Any, *, algorithm: str | None = None) -> Call:
        """As `Allgather`, blocks of uneven size: ``[data, counts, displacements, datatype]``."""
        return self._allgather(sendbuf, recvbuf, algorithm, vector=True)

    def _allgather(self, sendbuf: Any, recvbuf: Any, algorithm: str | None, vector: bool) -> Call:
        recv = self._blocks(recvbuf, "recvbuf", vector, writable=True)
        in_place = sendbuf is MPI.IN_PLACE
        shape = byte_shape(recv)
        send = _own_block(recv, self.rank) if in_place else _one_block(parse(sendbuf, "sendbuf"))
        _check_block(recv, self.rank, send)
        name = self.choose("allgather", algorithm, sum(shape.counts))
        return self._allgather_call(send, recv, name, vector, in_place)

    def _allgather_call(self, send: Blocks, recv: Blocks, name: str, vector: bool, in_place: bool) -> Call:
        shape = byte_shape(recv)
        size = tuple(shape.counts) if vector else shape.counts[0]
        if on_gpu(send.message, recv.message):
            named = what("allgather", name, None, size, "", None, PLACE)

            def hosted(sent: Any, received: Any) -> Call:
                return self._allgather_call(sent, received, name, vector, in_place)

            messages = self._of_messages("allgather", name, sum(shape.counts))
            parts = chunks.allgather(messages, self.nranks, shape, in_place)
            return self._gpu.blocks("allgather", named, send, recv, hosted, parts)
        key = ("allgather", name, shape.key, in_place)
        plan = self._plans.take(key)
        if plan is None and name == SHARED:
            plan = self._shared_allgather_plan(shape, vector)
        elif plan is None and name == HIERARCHICAL:
            assert self._hierarchy is not None
            plan = self._hierarchy.allgather_plan(shape.counts, shape.displacements)
        elif plan is None:
            plan = self._plan(chunks.allgather(name, self.nranks, shape, in_place))
        named = what("allgather", name, None, size, "", None)
        call = Call(plan, key, named, 0, 0, (send.message.data, recv.message.data))
        call.recv = _stage_blocks(call, recv, read=in_place, write=True)
        if in_place:
            call.send = call.recv + shape.displacements[self.rank]
        else:
            call.send = _stage_blocks(call, send, read=True)
        return call

    def _shared_allgather_plan(self, shape: Shape, vector: bool) -> SharedPlan:
        plan = self._shared_plan()
        if not vector:
            return plan.set_up("allgather", shape.counts[self.rank])
        nothing, own = [0] * self.nranks, [shape.counts[self.rank]] * self.nranks
        return plan.set_up_blocks("allgather", (nothing, own), (shape.displacements, shape.counts))

    def alltoall(self, sendbuf: Any, recvbuf: Any, *, algorithm: str | None = None) -> Call:
        """Send block j of ``sendbuf`` to rank j; block i of ``recvbuf`` comes from rank i."""
        return self._alltoall(sendbuf, recvbuf, algorithm, vector=False)

    def alltoallv(self, sendbuf: Any, recvbuf: Any, *, algorithm: str | None = None) -> Call:
        """As `Alltoall`, blocks of uneven size: ``[data, counts, displacements, datatype]``."""
        return self._alltoall(sendbuf, recvbuf, algorithm, vector=True)

    def _alltoall(self, sendbuf: Any, recvbuf: Any, algorithm: str | None, vector: bool) -> Call:
        recv = self._blocks(recvbuf, "recvbuf", vector, writable=True)
        in_place = sendbuf is MPI.IN_PLACE
        send = recv if in_place else self._blocks(sendbuf, "sendbuf", vector)
        _check_block(recv, self.rank, send, self.rank)
        shapes = byte_shape(send), byte_shape(recv)
        only = ("pairwise",) if vector else None
        name = self.choose("alltoall", algorithm, sum(shapes[0].counts) * self.nranks, only)
        return self._alltoall_call(send, recv, name, vector, in_place)

    def _alltoall_call(self, send: Blocks, recv: Blocks, name: str, vector: bool, in_place: bool) -> Call:
        shapes = byte_shape(send), byte_shape(recv)
        size = None if vector else shapes[0].counts[0]
        if on_gpu(send.message, recv.message):

            def hosted(sent: Any, received: Any) -> Call:
                return self._alltoall_call(sent, received, name, vector, in_place)

            named = _named("alltoall", name, size, None, PLACE)
            only = ("pairwise",) if vector else None
            messages = self._of_messages("alltoall", name, sum(shapes[0].counts) * self.nranks, only)
            parts = chunks.alltoall(messages, self.nranks, self.rank, *shapes)
            return self._gpu.blocks("alltoall", named, send, recv, hosted, parts, known=not vector)
        key = ("alltoall", name, vector, shapes[0].key, shapes[1].key)
        plan = self._plans.take(key)
        if plan is None and name == SHARED:
            plan = self._shared_alltoall_plan(*shapes, vector)
        elif plan is None:
            plan = self._plan(chunks.alltoall(name, self.nranks, self.rank, *shapes), agreed=False)
        named = _named("alltoall", name, size, None)
        call = Call(plan, key, named, 0, 0, (send.message.data, recv.message.data))
        call.recv = _stage_blocks(call, recv, read=in_place, write=True)
        call.send = call.recv if in_place else _stage_blocks(call, send, read=True)
        if in_place:
            _stage_input(call, shapes[0].end)
        return call

    def _shared_alltoall_plan(self, sent: Shape, received: Shape, vector: bool) -> SharedPlan:
        plan = self._shared_plan()
        if not vector:
            return plan.set_up("alltoall", sent.counts[0])
        places = (sent.displacements, sent.counts), (received.displacements, received.counts)
        return plan.set_up_blocks("alltoall", *places, uneven=True)

    def barrier(self, *, algorithm: str | None = None) -> Call:
        """Wait until every rank has come here."""
        name = self.choose("barrier", algorithm, 0)
        key = ("barrier", name)
        plan = self._plans.take(key)
        if plan is None and name == SHARED:
            plan = self._shared_plan().set_up("barrier", 0)
        elif plan is None:
            nothing = np.zeros(1, np.int64)
            layout = Layout(nothing, nothing, nothing)
            schedule = algorithms.schedule("barrier", name, self.nranks)
            plan = self._plan((schedule, layout), kernel=kernels.reduce_kernel("BOR", BYTES))
        return Call(plan, key, what("barrier", name, None, None, "", None), 0, 0, ())

    # -- shared by all

    def _plan(
        self, parts: Parts, itemsize: int = 1, kernel: int = 0, scale: int = 0, agreed: bool = True
    ) -> Plan:
        """``agreed``: whether all ranks know the sizes of all chunks."""
        schedule, layout = parts
        nbytes = int(layout.counts.sum()) * itemsize if agreed else None
        segment = None if nbytes is None else self._segment(schedule, nbytes)
        pipeline = tuning.pipeline(self.nranks, nbytes, self.network, segment)
        program = compile_program(schedule, self.rank, layout, itemsize, pipeline, average=bool(scale))
        return MessagePlan(program, self.private, self._spins, kernel, scale)

    def _shared_plan(self, what: Reduction = NO_REDUCTION) -> SharedPlan:
        assert self._channel is not None
        return SharedPlan(self._channel, what)

    def choose(
        self, collective: str, algorithm: str | None, nbytes: int, only: tuple[str, ...] | None = None
    ) -> str:
        """The algorithm's name, from the call, the communicator or the table of `tuning`.

        Where all ranks share memory, "auto" is what the shared transport does.
        """
        transports = (SHARED, HIERARCHICAL) if collective in HIERARCHICAL_COLLECTIVES else (SHARED,)
        allowed = (*(only or algorithms.names(collective)), *transports)
        if algorithm is None:
            algorithm = self._algorithm if self._algorithm in allowed else "auto"
        if algorithm in ("auto", SHARED) and self._channel is not None:
            return SHARED
        if algorithm == "auto":
            return only[0] if only else self._choose_messages(collective, nbytes)
        if algorithm == SHARED:
            raise ValueError("algorithm: expected auto or a name, got shared, but the ranks share no memory")
        if algorithm not in allowed:
            names = ", ".join(allowed)
            raise ValueError(
                f"algorithm: expected auto or one of {names} for {collective}, got {algorithm!r}"
            )
        if algorithm == HIERARCHICAL and self._hierarchy is None:
            raise ValueError(
                f"algorithm: expected auto or a name, got hierarchical, but {self._no_hierarchy}"
            )
        return algorithm

    def _of_messages(
        self, collective: str, algorithm: str, nbytes: int, only: tuple[str, ...] | None = None
    ) -> str:
        """The algorithm with which messages alone do what ``algorithm`` does."""
        if algorithm not in (SHARED, HIERARCHICAL):
            return algorithm
        return only[0] if only else tuning.choose(collective, self.nranks, nbytes, self.network)

    def _choose_messages(self, collective: str, nbytes: int) -> str:
        """The best algorithm where not all ranks share memory."""
        rule = self._rule(collective, nbytes)
        return self._static_choice(collective, nbytes) if rule is None else rule.algorithm

    def _static_choice(self, collective: str, nbytes: int) -> str:
        nodes = self._hierarchy
        if nodes and tuning.hierarchical_pays(collective, nodes.nnodes, nbytes):
            return HIERARCHICAL
        return tuning.choose(collective, self.nranks, nbytes, self.network)

    def _rule(self, collective: str, nbytes: int) -> Rule | None:
        """What was measured to be better than the static choice, if anything was."""
        if not self.choices.rules:
            return None
        rule = self.choices.rule(collective, nbytes, self._static_choice(collective, nbytes))
        if rule is not None and rule.algorithm == HIERARCHICAL and self._hierarchy is None:
            return None
        return rule

    def _segment(self, schedule: Schedule, nbytes: int) -> int | None:
        """The bytes of a segment, if those were measured for this algorithm and size."""
        rule = self._rule(schedule.collective, nbytes)
        return rule.segment if rule is not None and rule.algorithm == schedule.name else None

    def _check_root(self, root: int) -> None:
        if not isinstance(root, (int, np.integer)):
            raise TypeError(f"root: expected a rank from 0 to {self.nranks - 1}, got {root!r}")
        if not 0 <= root < self.nranks:
            raise ValueError(f"root: expected a rank from 0 to {self.nranks - 1}, got {root}")

    def _blocks(self, spec: Any, argument: str, vector: bool, writable: bool = False) -> Blocks:
        if vector:
            return parse_blocks(spec, argument, self.nranks, writable)
        message = parse(spec, argument, writable, blocks=self.nranks)
        counts = [message.count] * self.nranks
        return Blocks(message, counts, [rank * message.count for rank in range(self.nranks)])


def operation_name(op: Operation) -> str | None:
    """The operation's name, None for one that users made; TypeError for anything else."""
    if isinstance(op, Average):
        return "AVG"
    if not isinstance(op, MPI.Op):
        raise TypeError(f"op: expected an MPI operation such as MPI.SUM, or mpicoll.AVG; got {op!r}")
    return _OPERATION_NAMES.get(MPI._handleof(op))


def _reduction(send: Message, recv: Message, op: Operation) -> str | None:
    """The operation's name, None if MPI must do it; TypeError if the dtype cannot do it."""
    check_same_type(send, recv, arithmetic=True)
    dtype = send.dtype
    if isinstance(op, Average):
        if dtype is None or not kernels.supports("SUM", dtype) or dtype.kind in "iu":
            raise TypeError(f"op: AVG is defined for floating and complex dtypes, got {send.type_name}")
        return "AVG"
    name = operation_name(op)
    if name is None or dtype is None or dtype not in kernels.DTYPES:
        if on_gpu(send, recv):  # MPI would look for it in the host's memory
            raise TypeError(
                f"op: expected a predefined operation on numbers for GPU memory, got {name or op} of "
                f"{send.type_name}; copy the data to the host for operations or datatypes of your own"
            )
        return None
    kernels.check_supported(name, dtype)
    return str(name)


def _named(collective: str, algorithm: str, nbytes: int | None, root: int | None, place: str = "") -> What:
    """The call, with the size of all its blocks or, as ranks do not know each other's, without."""
    return what(
        collective if nbytes is not None else f"{collective}v", algorithm, None, nbytes, "", root, place
    )


def _check_count(message: Message, count: int, why: str) -> None:
    if message.count != count:
        raise ValueError(f"{message.argument}: expected {count} elements, {why}; got {message.count}")


def _check_block(blocks: Blocks, rank: int, own: Blocks, own_index: int = 0) -> None:
    """What a rank exchanges with itself must be of one type and size."""
    check_same_type(own.message, blocks.message)
    ours = own.counts[own_index] * own.message.size
    there = blocks.counts[rank] * blocks.message.size
    if ours != there:
        raise ValueError(
            f"{blocks.message.argument}: expected {ours} bytes for rank {rank}, as much as "
            f"{own.message.argument} has, got {there}"
        )


def _one_block(message: Message) -> Blocks:
    return Blocks(message, [message.count], [0])


def _own_block(blocks: Blocks, rank: int) -> Blocks:
    """The block of ``rank`` alone, where it lies: its own data with IN_PLACE."""
    return Blocks(blocks.message, [blocks.counts[rank]], [blocks.displacements[rank]])


def _stage_blocks(call: Call, blocks: Blocks, read: bool = False, write: bool = False) -> int:
    """Address of the blocks for the program; a datatype with holes is packed before and unpacked after."""
    message = blocks.message
    if message.plain:
        return message.address
    packed = np.empty(sum(byte_shape(blocks).counts), np.uint8)
    call.keep += (packed,)
    kept = Blocks(_with_own_datatype(message, packed), blocks.counts, blocks.displacements)
    if read:
        call.before = _then(call.before, partial(_pack, kept, packed))
    if write:
        call.after = _then(call.after, partial(_unpack, kept, packed))
    return packed.ctypes.data


def _with_own_datatype(message: Message, owner: np.ndarray[Any, Any]) -> Message:
    """The message with a duplicate of its datatype that lives as long as ``owner``.

    MPI lets the caller free a datatype as soon as a nonblocking call has begun.
    """
    assert message.datatype is not None
    datatype = message.datatype.Dup()

    def free() -> None:
        if not MPI.Is_finalized():
            datatype.Free()

    weakref.finalize(owner, free).atexit = False
    return replace(message, datatype=datatype)


def _then(first: Any, second: Any) -> Any:
    """Both, one after the other."""
    if first is None:
        return second

    def both() -> None:
        first()
        second()

    return both


@contextmanager
def _as_one_element(blocks: Blocks, origin: np.ndarray[Any, Any]) -> Iterator[MPI.Datatype]:
    """A datatype of which all blocks are one element, placed as seen from ``origin``; its extent is a byte.

    So the memory that MPI's Pack and Unpack are given may begin anywhere, which serves ``MPI.BOTTOM``, too.
    """
    message = blocks.message
    assert message.datatype is not None
    start = message.address - origin.ctypes.data
    at = [start + displacement * message.extent for displacement in blocks.displacements]
    indexed = message.datatype.Create_hindexed(blocks.counts, at)
    whole = indexed.Create_resized(0, 1).Commit()
    indexed.Free()
    try:
        yield whole
    finally:
        whole.Free()


def _pack(blocks: Blocks, packed: np.ndarray[Any, Any]) -> None:
    if packed.size:
        with _as_one_element(blocks, packed) as whole:
            whole.Pack(packed[:1], packed, 0, MPI.COMM_SELF)


def _unpack(blocks: Blocks, packed: np.ndarray[Any, Any]) -> None:
    if packed.size:
        with _as_one_element(blocks, packed) as whole:
            whole.Unpack(packed, 0, packed[:1], MPI.COMM_SELF)


def _stage_input(call: Call, nbytes: int) -> None:
    """Read the input from a copy, because the output overwrites it before all of it has been read."""
    copy, source = np.empty(nbytes, np.uint8), call.send

    def take_copy() -> None:
        ctypes.memmove(copy.ctypes.data, source, nbytes)

    call.before = _then(call.before, take_copy)
    call.send = copy.ctypes.data
    call.keep += (copy,)


def _widen(call: Call, dtype: Dtype, count: int, results: int, in_place: bool) -> None:
    """Run the call on float32 copies: ``count`` inputs, and ``results`` outputs rounded once at the end."""
    inputs = np.empty(count, np.float32)
    outputs = inputs if in_place else np.empty(results, np.float32)
    widen, narrow = kernels.cast_kernel(FLOAT32, dtype), kernels.cast_kernel(dtype, FLOAT32)
    source, target = call.send, call.recv
    call.before = partial(widen, inputs.ctypes.data, source, count)
    call.after = partial(narrow, target, outputs.ctypes.data, results)
    call.send, call.recv = inputs.ctypes.data, outputs.ctypes.data
    call.keep += (inputs, outputs)
