"""Collectives on GPU memory: which transport, and its plan.

`CallMaker` has checked the arguments and laid them out when it comes here, as for host memory. What carries
a collective is decided once for a communicator, when it first meets GPU memory (that call is collective in
any case):

- **ipc** where all ranks share a node and each has proved that it can read what the others have written;
- **messages** between nodes, if the MPI library has proved that it can send GPU memory;
- **staged** through host memory everywhere else, and for what the others cannot do.

`Sharing.text` says which, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from mpi4py import MPI

from mpicoll import chunks
from mpicoll.buffers import BYTES, Blocks, Data, Dtype, Message
from mpicoll.chunks import Parts, byte_shape
from mpicoll.gpu import driver, ipc, probe
from mpicoll.gpu.ipc import Arithmetic, DirectPlan, Group, OneShotPlan, Work
from mpicoll.gpu.memory import DEFAULT_STREAM, LEGACY_STREAM, NO_DEVICE, THREADS_STREAM, GpuData
from mpicoll.gpu.messages import FLOAT32, PIPELINE, GpuMessagePlan, WideMessagePlan
from mpicoll.gpu.plans import GpuPlan
from mpicoll.gpu.staging import Pinned, Range, SectionsPlan, WholePlan, pool
from mpicoll.kernels import reduce
from mpicoll.requests import Call
from mpicoll.schedule import chunk_bounds
from mpicoll.transports.program import Program, compile_program
from mpicoll.transports.shared import SharedPlan
from mpicoll.watch import ON_GPU, Watch, What, what

if TYPE_CHECKING:
    from mpicoll.calls import CallMaker

TRANSPORTS = ("auto", "ipc", "messages", "staged")
PLACE = ON_GPU
NO_KERNELS = "numba-cuda is not installed: pip install 'mpicoll[cuda]'"

Shape = int | tuple[int, ...]


class Sharing:
    """What the ranks of a communicator know of each other's GPUs.

    ``wanted`` is one of `TRANSPORTS`; ``one_node`` says whether all ranks share memory. Nothing is asked
    before `decide`, which is collective. ``announce`` is to be told before which call decides: it may wait
    for ranks that are in another.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        watch: Watch,
        wanted: str,
        one_node: bool,
        announce: Callable[[What], None],
    ) -> None:
        self.announce = announce
        self._comm, self._watch, self.wanted, self._one_node = comm, watch, wanted, one_node
        self.device = NO_DEVICE
        self.group: Group | None = None
        self.used = ""
        self.text = "not chosen yet: no collective has met GPU memory"

    def decide(self, device: int, call: str) -> None:
        """Choose, if that has not been done; collective. ``call`` says in which call, for errors.

        Raises ValueError where ``device`` is not the one that this rank has used here before, RuntimeError
        on all ranks where what is wanted is impossible.
        """
        self.meet(device)
        if self.used:
            return
        missing = self._exchange(call, "" if has_kernels() else NO_KERNELS)
        reasons = [f"rank {rank}: {problem}" for rank, problem in enumerate(missing) if problem]
        reason = reasons[0] if reasons else self._try_ipc(call)
        if reason is None:
            self.used, self.text = "ipc", f"ipc: ranks open each other's GPU memory; {self._order()}"
            return
        aware, how = self._try_messages() if not reasons else (False, reason)
        if aware:
            self.used, self.text = "messages", f"messages: MPI takes GPU memory, for {how}; no ipc: {reason}"
            return
        if self.wanted in ("ipc", "messages"):
            why = reason if self.wanted == "ipc" else how
            raise RuntimeError(f"gpu_transport: expected one that works here, got {self.wanted}, but {why}")
        self.used, self.text = "staged", f"staged through host memory, because {reason}; {how}"

    def meet(self, device: int) -> None:
        """This rank works with memory of this device. Raises ValueError where it has with another's."""
        if self.device == NO_DEVICE:
            self.device = driver.driver().current_device if device == NO_DEVICE else device
        elif device not in (self.device, NO_DEVICE):
            raise ValueError(
                f"expected memory of GPU {self.device}, which this communicator has worked with on rank "
                f"{self._comm.Get_rank()}, got memory of GPU {device}; make another communicator for it"
            )

    def close(self) -> None:
        """The ranks give up what they know of each other's GPUs; collective."""
        if self.group is not None:
            self.group.close()

    def _try_ipc(self, call: str) -> str | None:
        """Make a group; why there is none, or None."""
        if self.wanted not in ("auto", "ipc"):
            return f"the communicator was made with gpu_transport={self.wanted!r}"
        if not self._one_node:
            return "the ranks are on several nodes"
        group = Group(
            self._comm.Get_rank(),
            self._comm.Get_size(),
            self.device,
            lambda thing, _: self._exchange(call, thing),
        )
        self.group = group if group.reason is None else None
        return group.reason

    def _exchange(self, call: str, thing: Any) -> list[Any]:
        return self._watch.allgather(self._comm, thing, f"{call}, {ipc.SHARING}")

    def _try_messages(self) -> tuple[bool, str]:
        """Whether to send GPU memory by MPI, and why. All ranks have come here: MPI's own calls end."""
        if self.wanted not in ("auto", "messages") or (self._one_node and self.wanted == "auto"):
            return False, "messages are for several nodes"
        return probe.is_cuda_aware(self._comm)

    def _order(self) -> str:
        assert self.group is not None
        return (
            "streams wait for each other's events"
            if self.group.lane.events
            else "hosts wait for their streams"
        )


@cache
def has_kernels() -> bool:
    """Whether kernels for GPUs can be compiled here."""
    return find_spec("numba_cuda") is not None


class Where:
    """Where the buffers of one call are: one device, and the streams that they belong to.

    Raises TypeError and ValueError that name the argument if they are not all on one GPU.
    """

    def __init__(self, messages: Iterable[Message | None]) -> None:
        found = [message for message in messages if message is not None and message.data is not None]
        on_gpu = [message for message in found if isinstance(message.data, GpuData)]
        for message in found:
            if not isinstance(message.data, GpuData):
                raise TypeError(
                    f"{message.argument}: expected GPU memory, as {on_gpu[0].argument} is, got host memory"
                )
        self.data: list[GpuData] = [message.data for message in on_gpu]  # type: ignore[misc]
        self.device = NO_DEVICE
        for message, data in zip(on_gpu, self.data, strict=True):
            if self.device not in (NO_DEVICE, data.device) and data.device != NO_DEVICE:
                raise ValueError(
                    f"{message.argument}: expected memory of GPU {self.device}, as {on_gpu[0].argument} is, "
                    f"got memory of GPU {data.device}"
                )
            self.device = max(self.device, data.device)
        streams = [DEFAULT_STREAM if data.stream == LEGACY_STREAM else data.stream for data in self.data]
        self.stream = streams[-1]
        self.others = sorted({stream for stream in streams if stream != self.stream})
        self.waits = any(data.waits for data in self.data)


def on_gpu(*messages: Message | None) -> bool:
    """Whether any of these is GPU memory."""
    return any(message is not None and isinstance(message.data, GpuData) for message in messages)


class GpuCalls:
    """Makes the calls of one `CallMaker` whose buffers are GPU memory."""

    def __init__(self, maker: CallMaker, sharing: Sharing, nonblocking: bool) -> None:
        self._maker, self._sharing = maker, sharing
        self._nonblocking = nonblocking  # a group's events are for calls that follow each other

    # -- the collectives, as `CallMaker` has laid them out

    def reduction(
        self,
        collective: str,
        algorithm: str,
        messages: str,
        operation: str,
        send: Message,
        recv: Message | None,
        shape: Shape,
        root: int,
    ) -> Call:
        """Allreduce, reduce, reduce-scatter; ``shape`` is a count, or one for each rank's block.

        ``algorithm`` is that of the host, ``messages`` that of messages between GPUs.
        """
        where = Where((send, recv))
        assert send.dtype is not None
        dtype, rank, nranks = send.dtype, self._maker.rank, self._maker.nranks
        rooted = root if collective == "reduce" else None
        named = what(collective, algorithm, dtype, shape, operation, rooted, PLACE)
        group = self._group(where, named)
        into = recv.address if recv is not None else 0
        in_place = recv is not None and send.address == into

        def staged() -> GpuPlan:
            return self._staged_reduction(named, collective, algorithm, operation, send, recv, shape, root)

        moved = in_place and collective == "reduce_scatter"  # to where an input may still be wanted
        if not self._reaches or moved or not _can_fold(operation, dtype, nranks):
            return self._staged(staged(), named, where, send.address, into)
        if group is None:
            plan = self._reducing(collective, messages, operation, dtype, shape, root, in_place)
            return _call(*plan, named, where, send.address, into)
        arithmetic = Arithmetic(
            "SUM" if operation == "AVG" else operation, dtype, 1 / nranks if operation == "AVG" else 1.0
        )
        size = dtype.itemsize
        if isinstance(shape, int) and collective == "allreduce" and 0 < shape * size <= ipc.ONE_SHOT:
            key, host = ("one shot", named.whole), _Compared(self._maker, named)
            one = self._maker.take(key)
            if not isinstance(one, OneShotPlan):
                one = OneShotPlan(self._maker.watch, group, arithmetic, shape, host)
            return _call(one, key, named, where, send.address, into)
        bounds = chunk_bounds(shape, nranks, size) if isinstance(shape, int) else np.cumsum([0, *shape])
        begin, count = int(bounds[rank]) * size, int(bounds[rank + 1] - bounds[rank])

        def work(sends: list[int], recvs: list[int]) -> Work:
            sources = [address + begin for address in sends]
            if collective == "reduce_scatter":
                return Work([], ([recvs[rank]], sources, count))
            targets = recvs if collective == "allreduce" else [recvs[root]]
            return Work([], ([address + begin for address in targets], sources, count))

        return self._direct(named, where, group, send.address, into, work, staged, arithmetic)

    def broadcast(self, message: Message, algorithm: str, messages: str, root: int) -> Call:
        """Copy ``root``'s data into all others'. Raises TypeError for a datatype with holes."""
        _check_plain(message)
        where, nbytes = Where((message,)), message.count * message.size
        named = what("broadcast", algorithm, None, nbytes, "", root, PLACE)
        group, rank, nranks = self._group(where, named), self._maker.rank, self._maker.nranks

        def staged() -> GpuPlan:
            return self._staged_broadcast(named, message, algorithm, root)

        def work(sends: list[int], recvs: list[int]) -> Work:
            return Work([(recvs[rank], sends[root], nbytes)] if rank != root else [])

        at = message.address
        if not self._reaches:
            return self._staged(staged(), named, where, at, at)
        if group is None:
            parts = chunks.broadcast(messages, nranks, nbytes, root)
            return _call(*self._moving(named, parts, None), named, where, at, at)
        return self._direct(named, where, group, at, at, work, staged)

    def blocks(
        self,
        collective: str,
        named: What,
        sent: Blocks | None,
        received: Blocks | None,
        make: Callable[[Blocks | None, Blocks | None], Call],
        parts: Parts,
        root: int | None = None,
        known: bool = True,
    ) -> Call:
        """Gather, scatter, allgather, alltoall: of each side one block, or one for each rank.

        ``make`` makes the call for such blocks of host memory, ``parts`` is the schedule for messages.
        ``known``: whether a rank knows where the others' blocks lie, which it does if all are equal or lie
        where one of them is to put them.
        """
        messages = [blocks.message if blocks is not None else None for blocks in (sent, received)]
        where = Where(messages)
        group = self._group(where, named)
        own = _begin(sent, collective in ("gather", "allgather"))
        into = _begin(received, collective == "scatter")
        same = sent is not None and received is not None and sent.message is received.message

        if self._nonblocking:
            _check_plain(messages[1])  # another call may write between these elements meanwhile

        def staged() -> GpuPlan:
            return self._staged_blocks(sent, received, make)

        plain = all(message is None or message.plain for message in messages)
        moved = same and collective == "alltoall"  # to where an input may still be wanted
        if not self._reaches or moved or (group is not None and not known):
            return self._staged(staged(), named, where, own, into)
        if group is None:
            _check_plain(*messages)
            shapes = [byte_shape(blocks).key if blocks is not None else None for blocks in (sent, received)]
            base = next(message.address for message in messages if message is not None) if same else into
            return _call(*self._moving(named, parts, (*shapes, same)), named, where, own, base)
        work = _copies(collective, sent, received, self._maker.rank, root)
        return self._direct(named, where, group, own, into, work, staged, plain=plain)

    # -- plans

    def _group(self, where: Where, named: What) -> Group | None:
        if self._nonblocking and THREADS_STREAM in (where.stream, *where.others):
            raise ValueError(
                "a nonblocking call: expected buffers of a stream that all threads share, got the default "
                "stream of this thread (2)"
            )
        if self._nonblocking and not self._sharing.used:
            self._sharing.meet(where.device)  # to choose would be to wait for the others: it is staged
        else:
            if not self._sharing.used:
                self._sharing.announce(named)
            self._sharing.decide(where.device, named.text)
        return None if self._nonblocking else self._sharing.group

    @property
    def _reaches(self) -> bool:
        """Whether anything but staging can do these calls."""
        return self._sharing.used == "messages" or (self._sharing.used == "ipc" and not self._nonblocking)

    def _reducing(
        self,
        collective: str,
        algorithm: str,
        operation: str,
        dtype: Dtype,
        shape: Shape,
        root: int,
        in_place: bool,
    ) -> tuple[GpuPlan, Any]:
        """A plan for a reduction by messages, and its key."""
        nranks, maker = self._maker.nranks, self._maker
        key = ("gpu messages", collective, algorithm, operation, dtype, shape, root, in_place)
        kept = maker.take(key)
        if isinstance(kept, GpuMessagePlan):
            return kept, key
        wide = reduce.rounds_often(operation, dtype, nranks)
        travels = FLOAT32 if wide else dtype
        own = in_place or (wide and collective != "reduce_scatter")
        parts = chunks.reduction(collective, algorithm, nranks, shape, root, travels.itemsize, own)
        program = self._program(parts, travels.itemsize, operation == "AVG")
        where = maker.private, self._sharing.device, DEFAULT_STREAM
        if not wide:
            return GpuMessagePlan(program, *where, operation, dtype, 1 / nranks), key
        count = shape if isinstance(shape, int) else sum(shape)
        results = count if isinstance(shape, int) else shape[maker.rank]
        if collective == "reduce" and maker.rank != root:
            results = 0
        factor = 1 / nranks
        return WideMessagePlan(program, *where, operation, dtype, factor, count, results, own), key

    def _moving(self, named: What, parts: Parts, more: Any) -> tuple[GpuPlan, Any]:
        """A plan for what only moves, by messages, and its key, in which ``more`` adds to the call's name."""
        key = ("gpu messages", named.whole, more)
        kept = self._maker.take(key)
        if isinstance(kept, GpuMessagePlan):
            return kept, key
        program, device = self._program(parts, 1, average=False), self._sharing.device
        return GpuMessagePlan(program, self._maker.private, device, DEFAULT_STREAM, None, BYTES, 1.0), key

    def _program(self, parts: Parts, itemsize: int, average: bool) -> Program:
        schedule, layout = parts
        return compile_program(schedule, self._maker.rank, layout, itemsize, PIPELINE, average=average)

    def _staged(self, plan: GpuPlan, named: What, where: Where, send: int, recv: int) -> Call:
        compared = _Compared(self._maker, named)
        for call in plan.calls:
            compared.marked(call)
        key = ("sections", named.whole) if isinstance(plan, SectionsPlan) else None
        return _call(plan, key, named, where, send, recv)

    def _direct(
        self,
        named: What,
        where: Where,
        group: Group,
        send: int,
        recv: int,
        work: Callable[[list[int], list[int]], Work],
        staged: Callable[[], GpuPlan],
        arithmetic: Arithmetic | None = None,
        plain: bool = True,
    ) -> Call:
        key = ("direct", named.whole)
        plan = self._maker.take(key)
        if not isinstance(plan, DirectPlan):
            plan = DirectPlan(self._maker.watch, group, arithmetic, _Compared(self._maker, named))
        plan.use(work, staged, plain)
        return _call(plan, key, named, where, send, recv)

    def _staged_reduction(
        self,
        named: What,
        collective: str,
        algorithm: str,
        operation: str,
        send: Message,
        recv: Message | None,
        shape: Shape,
        root: int,
    ) -> GpuPlan:
        if not isinstance(shape, int):
            return self._staged_whole(
                (send, recv),
                sum(shape),
                lambda s, r: self._maker.reduction_call(collective, algorithm, operation, s, r, shape, root),
            )
        reads, writes = True, recv is not None

        def make(slot: np.ndarray[Any, Any], count: int) -> Call:
            section = _section(send, slot, count)
            into = section if writes else None
            return self._maker.reduction_call(collective, algorithm, operation, section, into, count, root)

        assert send.dtype is not None
        return self._sections(named, (shape, send.dtype.itemsize), make, reads, writes)

    def _staged_broadcast(self, named: What, message: Message, algorithm: str, root: int) -> GpuPlan:
        mine = self._maker.rank == root
        as_bytes = replace(message, dtype=BYTES, datatype=None, size=1, extent=1)

        def make(slot: np.ndarray[Any, Any], count: int) -> Call:
            return self._maker.broadcast_call(_section(as_bytes, slot, count), algorithm, root)

        return self._sections(named, (message.count * message.size, 1), make, reads=mine, writes=not mine)

    def _sections(
        self,
        named: What,
        size: tuple[int, int],
        make: Callable[[np.ndarray[Any, Any], int], Call],
        reads: bool,
        writes: bool,
    ) -> GpuPlan:
        maker, device = self._maker, self._sharing.device
        plan = maker.take(("sections", named.whole))
        if isinstance(plan, SectionsPlan):
            return plan
        return SectionsPlan(maker.watch, device, size, make, self._release, reads, writes)

    def _release(self, call: Call) -> None:
        """Keep the plan of a call of the host for others, who are in no call on a GPU."""
        if isinstance(call.plan, SharedPlan):
            call.plan.mark(0)
        self._maker.release(call)

    def _staged_whole(
        self,
        messages: tuple[Message, Message | None],
        count: int,  # of elements that are sent; a message may be one of several blocks
        make: Callable[[Message, Message | None], Call],
    ) -> GpuPlan:
        send, recv = messages
        sent = Blocks(send, [count], [0])
        received = None if recv is None else sent if recv is send else Blocks(recv, [recv.count], [0])
        return self._staged_blocks(
            sent,
            received,
            lambda s, r: make(s.message, None if r is None else r.message),  # type: ignore[union-attr]
        )

    def _staged_blocks(
        self,
        sent: Blocks | None,
        received: Blocks | None,
        make: Callable[[Blocks | None, Blocks | None], Call],
    ) -> GpuPlan:
        mirrors = _Mirrors()
        hosted = mirrors.of(sent), mirrors.of(received)
        inputs = [*mirrors.ranges(sent)]
        outputs = [*mirrors.ranges(received)]
        if received is not None and not received.message.plain:
            inputs += outputs  # what lies between the elements must come back as it was
        maker, device = self._maker, self._sharing.device
        return WholePlan(maker.watch, device, make(*hosted), mirrors.pinned, inputs, outputs, self._release)


def _check_plain(*messages: Message | None) -> None:
    """Raise TypeError for elements with holes between them, which GPUs do not pack."""
    for message in messages:
        if message is not None and not message.plain:
            raise TypeError(
                f"{message.argument}: expected elements without holes between them in GPU memory, got "
                f"{message.type_name}"
            )


def _call(plan: GpuPlan, key: Any, named: What, where: Where, send: int, recv: int) -> Call:
    plan.stream, plan.others, plan.waits = where.stream, where.others, where.waits
    return Call(plan, key, named, send, recv, tuple(where.data))


class _Compared:
    """Collectives of the host that ranks in different calls do not confuse with each other."""

    def __init__(self, maker: CallMaker, named: What) -> None:
        self._maker = maker
        self._text = named.text
        self._mark = crc32(named.whole.encode()) | 1

    def gather(self, word: Any, words: Any) -> Call:
        """All ranks' ``word``, in ``words``."""
        return self.marked(self._maker.allgather(word.view(np.uint8), words.view(np.uint8)))

    def meet(self) -> Call:
        """A barrier."""
        return self.marked(self._maker.barrier())

    def marked(self, call: Call) -> Call:
        """The call, as one that is a part of this."""
        if isinstance(call.plan, SharedPlan):
            call.plan.mark(self._mark, self._text)
        return call


def _can_fold(operation: str, dtype: Dtype, nranks: int) -> bool:
    from mpicoll.kernels import reduce_cuda

    supported = reduce_cuda.supports("SUM" if operation == "AVG" else operation, dtype)
    return bool(supported and nranks <= reduce_cuda.MOST)


def _section(message: Message, slot: np.ndarray[Any, Any], count: int) -> Message:
    """``count`` elements like those of ``message``, in a slot."""
    assert message.dtype is not None
    array = slot[: count * message.size].view(message.dtype)
    return replace(message, data=Data(array, slot.ctypes.data), address=slot.ctypes.data, count=count)


def _begin(blocks: Blocks | None, only: bool) -> int:
    """The address from which displacements count, or, where there is one block only, of that."""
    if blocks is None:
        return 0
    return blocks.message.address + (blocks.displacements[0] * blocks.message.extent if only else 0)


def _copies(
    collective: str, sent: Blocks | None, received: Blocks | None, rank: int, root: int | None
) -> Callable[[list[int], list[int]], Work]:
    """What this rank copies in a collective that moves blocks."""

    def place(blocks: Blocks, number: int) -> tuple[int, int]:
        """Where a block begins, and its length, in bytes."""
        return blocks.displacements[number] * blocks.message.extent, blocks.counts[
            number
        ] * blocks.message.size

    def work(sends: list[int], recvs: list[int]) -> Work:
        copies = []
        for other in range(len(sends)):
            if collective == "scatter" and rank == root and sent is not None:
                at, nbytes = place(sent, other)
                copies.append((recvs[other], sends[rank] + at, nbytes))
            elif collective in ("gather", "allgather") and received is not None:
                at, nbytes = place(received, other)
                copies.append((recvs[rank] + at, sends[other], nbytes))
            elif collective == "alltoall" and sent is not None and received is not None:
                at, nbytes = place(received, other)
                copies.append((recvs[rank] + at, sends[other] + place(sent, rank)[0], nbytes))
        return Work(copies)

    return work


class _Mirrors:
    """Pinned host memory in the place of the GPU memory that messages are in."""

    def __init__(self) -> None:
        self.pinned: list[Pinned] = []
        self._mirrors: dict[tuple[int, int], Pinned] = {}  # by address and size on the GPU

    def of(self, blocks: Blocks | None) -> Blocks | None:
        """The same blocks on the host."""
        if blocks is None or not isinstance(blocks.message.data, GpuData):
            return blocks
        message, data = blocks.message, blocks.message.data
        place = data.address, data.nbytes
        if place not in self._mirrors:
            self._mirrors[place] = pool.take(max(data.nbytes, 1))
            self.pinned.append(self._mirrors[place])
        mirror = self._mirrors[place]
        host = Data(mirror.array[: data.nbytes], mirror.address)
        address = message.address + mirror.address - data.address
        return replace(blocks, message=replace(message, data=host, address=address))

    def ranges(self, blocks: Blocks | None) -> list[Range]:
        """The blocks' memory on the GPU, and on the host."""
        if blocks is None or not isinstance(blocks.message.data, GpuData):
            return []
        message, data = blocks.message, blocks.message.data
        offset = self._mirrors[data.address, data.nbytes].address - data.address
        if not message.plain:
            return [Range(data.address, data.address + offset, data.nbytes)]
        places = zip(blocks.counts, blocks.displacements, strict=True)
        begins = [
            (message.address + at * message.extent, count * message.size) for count, at in places if count
        ]
        return [Range(begin, begin + offset, nbytes) for begin, nbytes in begins]
