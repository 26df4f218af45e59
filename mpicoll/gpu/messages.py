"""The CUDA-aware transport: executes programs on GPU memory, with an MPI that takes its addresses.

The program is the one for host memory (see `transports.program`), and MPI moves its messages. Copies and
reductions are work for the GPU: the host puts them on two streams and goes on, so that one segment is reduced
while another arrives and a third is sent. But MPI knows of no stream, and a stream of no message. So each
row waits for what uses the same memory:

    WAIT            the host polls MPI
    SEND            the host polls the GPU, until nothing is under way that writes these bytes
    RECV            ... that reads or writes these bytes
    REDUCE, COPY    go on a stream at once, where they wait for work on the other that writes what they read
                    or write, or reads what they write

What is under way is known from the events behind it. What MPI must be done with before the GPU gets there,
the program itself waits for. The caller's stream comes in at both ends:

    both streams wait for what is on the caller's; so do messages from and to the caller's buffers
    ... rows ...
    the caller's stream waits for the last work on both

Receives into scratch memory do not wait for the start: they are posted before the input is complete.

Reductions that follow each other into one place, and the scaling of averages, are one kernel, which reads and
writes the memory once.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from time import sleep
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from mpicoll.gpu.driver import Driver
from mpicoll.gpu.plans import GpuPlan, Waits
from mpicoll.transports.messages import BRIEF, PATIENT
from mpicoll.transports.program import Buffer, Op, Pipeline, Place, Program
from mpicoll.watch import Waiting, of

# Python takes some 25 microseconds to order a segment's messages, and as much to launch a kernel; meanwhile a
# network of 400 Gb/s moves 2 MiB. So twice that. The same for all sizes: where each rank has blocks of its
# own, none knows the size of all.
PIPELINE = Pipeline(segment=4 << 20, lookahead=2)

MOST_SOURCES = 8  # of a kernel: it keeps their addresses in registers
POLLS = 100  # before a waiting rank sleeps between polls: some hundred microseconds
NAP = 1e-6  # seconds; the kernel makes some 50 microseconds of it

FLOAT32 = np.dtype(np.float32)


class _Row(NamedTuple):
    """An instruction: one of a program, or several reductions that one kernel does."""

    op: Op
    request: int
    peer: int
    size: int  # bytes; of REDUCE, elements
    targets: tuple[Place, ...]
    sources: tuple[Place, ...]
    scales: bool = False


def _rows(program: Program) -> list[_Row]:
    """The program's instructions; SCALE is a reduction of one source."""
    rows: list[_Row] = []
    for number, request, peer, size, dst, dst_at, a, a_at, b, b_at in program.rows.tolist():
        op = Op(number)
        target, one, other = Place(Buffer(dst), dst_at), Place(Buffer(a), a_at), Place(Buffer(b), b_at)
        targets = (target,) if op not in (Op.WAIT, Op.SEND) else ()
        sources = {Op.SEND: (one,), Op.COPY: (one,), Op.REDUCE: (one, other), Op.SCALE: (target,)}.get(op, ())
        scales = op == Op.SCALE
        row = _Row(Op.REDUCE if scales else op, request, peer, size, targets, sources, scales)
        if rows and _continues(row, rows[-1]):
            rows[-1] = rows[-1]._replace(sources=rows[-1].sources + sources[1:], scales=scales)
        else:
            rows.append(row)
    return rows


def _continues(row: _Row, last: _Row) -> bool:
    """Whether ``row`` goes on reducing where ``last`` has ended, so that one kernel can do both."""
    both_reduce = row.op == last.op == Op.REDUCE and not last.scales
    goes_on = row.targets == last.targets == row.sources[:1] and row.size == last.size
    return both_reduce and goes_on and len(last.sources) + len(row.sources) - 1 <= MOST_SOURCES


class _Range(NamedTuple):
    """Addresses from ``start`` on, before ``stop``."""

    start: int
    stop: int


def _meet(some: Iterable[_Range], others: Sequence[_Range]) -> bool:
    return any(one.start < other.stop and other.start < one.stop for one in some for other in others)


class _Use(NamedTuple):
    """What memory something reads, and what it writes."""

    reads: Sequence[_Range]
    writes: Sequence[_Range]

    def excludes(self, other: _Use) -> bool:
        """Whether the one must be done before the other begins."""
        return _meet(self.writes, [*other.reads, *other.writes]) or _meet(self.reads, other.writes)


class _Queue:
    """A stream of the plan's own, and the work on it that may be under way, with the event behind each."""

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.work: deque[tuple[int, _Use]] = deque()

    def last(self, use: _Use) -> int | None:
        """The event of the last work that excludes ``use``."""
        return next((event for event, other in reversed(self.work) if other.excludes(use)), None)


class GpuMessagePlan(GpuPlan):
    """A program bound to a communicator, and to kernels; its scratch memory is the GPU's.

    ``operation`` is MPI's name of the reduction, or AVG; None for what only moves, whatever its ``dtype``.
    ``factor`` is what a program made for averages multiplies sums with. Raises MemoryError, `GpuError`.
    """

    def __init__(
        self,
        program: Program,
        comm: MPI.Intracomm,
        device: int,
        stream: int,
        operation: str | None,
        dtype: np.dtype[Any],
        factor: float,
    ) -> None:
        watch, self._ranks = of(comm)
        super().__init__(watch, device)
        self.stream = stream
        self._comm = comm
        self._program = _rows(program)
        self._row: _Row | None = None  # the one that is executed
        self._operation, self._dtype, self._factor = "SUM" if operation == "AVG" else operation, dtype, factor
        self._kernels: Any = _kernels() if operation is not None else None
        self._requests = [MPI.Request() for _ in range(program.requests)]
        self._peers = [-1] * program.requests
        self._executed = executed = [0]  # rows in all; apart from the plan, so that nothing keeps it alive
        self._waiting = Waiting(watch, lambda: executed[0])
        self._memory: list[int] = []
        self._streams: list[int] = []
        self._events: list[int] = []
        owned = (self._memory, self._streams, self._events)
        weakref.finalize(self, _release, self.driver, device, *owned).atexit = False
        self._buffers = [0, 0, self._allocate(program.scratch)]
        self._streams.extend(self.driver.make_stream(device) for _ in range(2))
        self._queues = [_Queue(own) for own in self._streams]
        self._begun = self._new_event()
        self._free_events: list[int] = []

    def _allocate(self, nbytes: int) -> int:
        """The address of scratch memory."""
        if not nbytes:
            return 0
        self._memory.append(self.driver.allocate(nbytes, self.device))
        self.scratch += nbytes
        return self._memory[-1]

    def _new_event(self) -> int:
        self._events.append(self.driver.make_event(self.device))
        return self._events[-1]

    def set_factor(self, factor: float) -> None:
        """What sums are multiplied by where the operation is AVG."""
        self._factor = factor

    # -- one run

    def _steps(self) -> Waits:
        if self.watch.failure is not None:
            raise self.watch.failure.error()  # what has been broken off cannot begin anew
        self._begin()
        try:
            for row in self._program:
                self._row = row
                yield from self._execute(row)
                self._executed[0] += 1
        except MPI.Exception as error:
            meant = self.watch.error_of(error)
            raise meant from (None if meant is error else error)
        self._end()

    def _begin(self) -> None:
        self._buffers[:2] = self.send, self.recv
        self.driver.record(self._begun, self.stream)
        for queue in self._queues:
            self.driver.wait(queue.stream, self._begun)

    def _end(self) -> None:
        for queue in self._queues:
            if queue.work:
                self.driver.wait(self.stream, queue.work[-1][0])

    def _execute(self, row: _Row) -> Waits:
        if row.op == Op.WAIT:
            yield from self._until(self._requests[row.request].Test)
        elif row.op in (Op.SEND, Op.RECV):
            use = self._use(row)
            yield from self._until(lambda: self._may_move(row, use))
            self._start(row, use)
        else:
            use = self._use(row)
            self._put(use, lambda stream: self._compute(row, use, stream))

    def _use(self, row: _Row) -> _Use:
        nbytes = row.size * (self._dtype.itemsize if row.op == Op.REDUCE else 1)
        return _Use(*([self._range(p, nbytes) for p in places] for places in (row.sources, row.targets)))

    def _range(self, place: Place, nbytes: int) -> _Range:
        start = self._buffers[place.buffer] + place.at
        return _Range(start, start + nbytes)

    # -- messages

    def _until(self, ready: Callable[[], bool]) -> Waits:
        polls = 0
        while not ready():
            polls += 1
            if polls > POLLS and self.patience != BRIEF:
                sleep(NAP)
            if polls > POLLS and self.patience == PATIENT:
                self.check()
            yield

    def _may_move(self, row: _Row, use: _Use) -> bool:
        """Whether the GPU is done with what excludes a message's ``use`` of memory."""
        events = [queue.last(use) for queue in self._queues]
        if any(place.buffer != Buffer.SCRATCH for place in row.sources + row.targets):
            events.append(self._begun)
        if all(event is None or self.driver.is_done(event) for event in events):
            return True
        for request in self._requests:
            if request:
                request.Test()  # so that MPI gets on with all its messages meanwhile
                break
        return False

    def _start(self, row: _Row, use: _Use) -> None:
        (memory,) = (*use.reads, *use.writes)
        message = [MPI.memory.fromaddress(memory.start, memory.stop - memory.start), MPI.BYTE]
        start = self._comm.Isend if row.op == Op.SEND else self._comm.Irecv
        self._requests[row.request] = start(message, row.peer, self.tag)
        self._peers[row.request] = row.peer

    # -- work for the GPU

    def _put(self, use: _Use, work: Callable[[int], None]) -> None:
        """Let ``work`` put something on a stream, in order with all that excludes its ``use`` of memory."""
        for queue in self._queues:
            while queue.work and self.driver.is_done(queue.work[0][0]):
                self._free_events.append(queue.work.popleft()[0])
        found = [(queue, queue.last(use)) for queue in self._queues]
        # Behind what it waits for anyway, else beside what was put last.
        queue = next((queue for queue, event in found if event is not None), self._queues[0])
        for other, event in found:
            if event is not None and other is not queue:
                self.driver.wait(queue.stream, event)
        work(queue.stream)
        event = self._free_events.pop() if self._free_events else self._new_event()
        self.driver.record(event, queue.stream)
        queue.work.append((event, use))
        self._queues.sort(key=lambda other: other is queue)

    def _compute(self, row: _Row, use: _Use, stream: int) -> None:
        targets, sources = ([memory.start for memory in ranges] for ranges in (use.writes, use.reads))
        if row.op == Op.COPY:
            self.driver.copy(targets[0], sources[0], row.size, stream)
            return
        factor = self._factor if row.scales else 1.0
        self._kernels.fold(self._operation, self._dtype, targets, sources, row.size, factor, stream)

    # -- waiting for others

    def check(self) -> None:
        """Raise if a rank that is waited for will never come."""
        self._waiting.look(lambda: self.watch.text_of(self.tag), self._waits_for)

    def _waits_for(self) -> tuple[int, ...]:
        """Whose message, or whose readiness for one, must come next."""
        row = self._row
        return (self._ranks[self._peers[row.request]],) if row is not None and row.op == Op.WAIT else ()


class WideMessagePlan(GpuMessagePlan):
    """Sums of 16-bit floats: float32 in all messages, and rounded once.

    ``program`` is one for float32; ``in_place`` says where it looks for its inputs. ``dtype`` is that of the
    caller's ``count`` inputs and ``results`` outputs.
    """

    def __init__(
        self,
        program: Program,
        comm: MPI.Intracomm,
        device: int,
        stream: int,
        operation: str,
        dtype: np.dtype[Any],
        factor: float,
        count: int,
        results: int,
        in_place: bool,
    ) -> None:
        super().__init__(program, comm, device, stream, operation, FLOAT32, factor)
        self._narrow, self._count, self._results = dtype, count, results
        inputs = self._allocate(count * FLOAT32.itemsize)
        self._wide = inputs, inputs if in_place else self._allocate(results * FLOAT32.itemsize)

    def _begin(self) -> None:
        super()._begin()
        self._buffers[:2] = self._wide
        self._cast(FLOAT32, self._narrow, self._wide[0], self.send, self._count)

    def _end(self) -> None:
        self._cast(self._narrow, FLOAT32, self.recv, self._wide[1], self._results)
        super()._end()

    def _cast(self, dst: np.dtype[Any], src: np.dtype[Any], target: int, source: int, count: int) -> None:
        from mpicoll.kernels import cast_cuda

        reads = _Range(source, source + count * src.itemsize)
        writes = _Range(target, target + count * dst.itemsize)
        if count:
            use = _Use([reads], [writes])
            self._put(use, lambda stream: cast_cuda.cast(dst, src, target, source, count, stream))


def _kernels() -> Any:
    """Now, not within a collective: it takes a while to import. Needs numba-cuda."""
    from mpicoll.kernels import reduce_cuda

    return reduce_cuda


def _release(
    gpu: Driver, device: int, memory: Sequence[int], streams: Sequence[int], events: Sequence[int]
) -> None:
    """Give back what a plan has used, once the last work on it is done."""
    with gpu.on(device):
        for stream in streams:
            gpu.synchronise(stream)
            gpu.destroy_stream(stream)
        for event in events:
            gpu.destroy_event(event)
        for address in memory:
            gpu.free(address)
