"""The shared transport, as Python sees it: channels between the ranks of a node, and plans that use them.

What happens in a collective, step by step, is in `steps`.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import select
from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
from mpi4py import MPI

from mpicoll.faults import FAULTS, MismatchError, RankFailedError
from mpicoll.kernels import reduce as kernels
from mpicoll.kernels.tasks import DONE, PENDING, Task
from mpicoll.schedule import CACHE_LINE
from mpicoll.transports import steps
from mpicoll.transports.arena import ArenaError, own_arena
from mpicoll.transports.machine import address_of, aligned_zeros
from mpicoll.transports.steps import (
    ARENA,
    ARENA_END,
    ARENAS,
    AVERAGE,
    BASE,
    BLOCKS,
    BROKEN,
    CALL,
    CHANNEL,
    CHANNEL_SIZE,
    CLOCK,
    CLOSED,
    COLLECTIVES,
    CONTROL,
    COSTS,
    CULPRIT,
    DIRECT,
    DROWSY,
    EXPECTED,
    FACTOR,
    FAR,
    FIRST,
    FOLD,
    FOLDED,
    FREED,
    GAVE_UP,
    GIVEN_UP,
    ITEM,
    JOB_SIZE,
    LARGE,
    LAST,
    LENT,
    LINE_CALL,
    LINE_SIZE,
    NAP,
    NAP_LENGTH,
    NARROW,
    NEXT,
    NOTHING,
    NRANKS,
    OPERATION,
    PIDS,
    QUIET,
    RANK,
    READ_MEMORY,
    RECV,
    RING,
    SCRATCH,
    SEND,
    SIZE,
    SLEEP,
    SLOT,
    SMALL,
    SPINS,
    STEP,
    TABLES,
    TIME,
    UNREADABLE,
    VECTORS,
    YIELD,
)
from mpicoll.watch import BY, ON_GPU, Doing, Waiting, Watch, call_text, grouped, judge, of, watch_of

PATIENT = 20_000_000  # nanoseconds to wait before Python handles signals
NOT_FAR = np.iinfo(np.int64).max  # bytes that no block has
MARK_AT, MARK_BITS = 44, 19  # where in what is compared a plan's mark is
NO_STEP = np.iinfo(np.int64).max  # which nobody has published


class Reduction(NamedTuple):
    """The kernels of one operation on one dtype, and a number that tells it from others."""

    number: int
    item: int  # bytes of an element
    first: int  # addresses of kernels, see the words of a job
    fold: int
    average: int = 0
    narrow: int = 0


NO_REDUCTION = Reduction(0, 1, 0, 0)


_FLOAT32 = np.dtype(np.float32)
_DTYPES = tuple(sorted(kernels.DTYPES, key=str))
_NAMES = (*kernels.OPERATIONS, "AVG")


@cache
def reduction(operation: str, dtype: np.dtype[Any], nranks: int) -> Reduction:
    """What reduces elements of ``dtype``; sums of several 16-bit floats are rounded once, at the end."""
    number = 1 + _NAMES.index(operation) * len(_DTYPES) + _DTYPES.index(dtype)
    average = operation == "AVG"
    kernel = "SUM" if average else operation
    if not kernels.rounds_often(operation, dtype, nranks):
        address = kernels.reduce_kernel(kernel, dtype)
        scale = kernels.scale_kernel(dtype) if average else 0
        return Reduction(number, dtype.itemsize, address, address, scale)
    return Reduction(
        number,
        dtype.itemsize,
        kernels.reduce_kernel(kernel, dtype, _FLOAT32),
        kernels.reduce_kernel(kernel, dtype, _FLOAT32, _FLOAT32),
        kernels.scale_kernel(_FLOAT32) if average else 0,
        kernels.cast_kernel_address(dtype, _FLOAT32),
    )


def operation_name(number: int) -> str:
    """The operation with this number."""
    return str(_NAMES[(number - 1) // len(_DTYPES)])


@cache
def _functions() -> dict[int, int]:
    libc = ctypes.CDLL(None)
    found = {YIELD: libc.sched_yield, CLOCK: libc.clock_gettime, SLEEP: libc.nanosleep}
    return {slot: address_of(f) for slot, f in found.items()} | {
        READ_MEMORY: address_of(libc.process_vm_readv)
    }


class Sizes(NamedTuple):
    """How a channel works: in bytes, but for the last three."""

    slot: int  # what a rank brings in at once
    ring: int  # where it does so, one piece after the other; at least five slots
    small: int  # up to which a reduction is one shot
    quiet: int  # up to which other calls do not ask where inputs lie
    far: int  # of a block from which on it is read from the other process's own memory
    large: int  # from which on results go past the caches
    spins: int  # polls before a waiting rank yields its core
    drowsy: int  # nanoseconds of waiting after which it sleeps between polls
    alone: bool  # whether there is a core for each rank's thread beside the one for its program


_Made = TypeVar("_Made")

# What it costs to bring data in depends on where the system has put the ranks, not on the channel.
_costs = aligned_zeros(2)

# Channels whose memory other ranks may be reading, even when nothing here refers to them.
_in_use: set[Channel] = set()


@atexit.register
def _leave() -> None:
    """Tell ranks that wait for this one; MPI lets the process end only when they have ended, too."""
    for channel in _in_use:
        channel.give_up("its program has ended")


class Channel:
    """What the calls of one communicator share; they go through it one after the other, in one order.

    Making one is collective. ``reason`` says why the ranks cannot share memory; it is None where they can.
    """

    def __init__(self, comm: MPI.Intracomm, sizes: Sizes) -> None:
        self.comm = comm
        self.sizes = sizes
        self._pid = os.getpid()
        self.nranks, self.rank = comm.Get_size(), comm.Get_rank()
        self.state = aligned_zeros(CHANNEL_SIZE)
        self._tables = aligned_zeros(3 * self.nranks).reshape(3, self.nranks)
        self._scratch = aligned_zeros(2 * FOLDED // 8)
        self.address = self.state.ctypes.data
        self._set_state()
        self.within = "the preparation of calls"  # in words, for errors
        self._twins: dict[int, Channel] = {}
        self._made = 0  # twins
        self.retired = False  # whether this rank needs it no more
        self.reason: str | None = None
        self.broken_by: BaseException | None = None  # on this rank
        try:
            self._connect()
        except (ArenaError, MemoryError) as error:
            self.reason = str(error)

    def _set_state(self) -> None:
        state, sizes = self.state, self.sizes
        state[RANK], state[NRANKS], state[NEXT], state[EXPECTED] = self.rank, self.nranks, 1, NOTHING
        state[SLOT], state[RING] = sizes.slot, sizes.ring
        state[SMALL], state[QUIET], state[FAR] = sizes.small, sizes.quiet, sizes.far
        state[LARGE], state[SPINS] = sizes.large, sizes.spins
        state[SCRATCH] = self._scratch.ctypes.data
        state[[BLOCKS, ARENAS, PIDS]] = [table.ctypes.data for table in self._tables]
        state[[TIME, NAP, VECTORS]] = self.address + 8 * (np.array([TIME, NAP, VECTORS]) + 1)
        state[COSTS] = _costs.ctypes.data
        state[NAP + 2], state[DROWSY] = NAP_LENGTH, sizes.drowsy
        for slot, address in _functions().items():
            state[slot] = address

    def _connect(self) -> None:
        """Exchange where the blocks are, and map them; an exception on one rank is one on all."""
        arena = self._agreed(own_arena)
        self.state[ARENA], self.state[ARENA_END] = arena.address, arena.address + arena.size
        handles = self._allgather((arena.handle, self.address))
        _blocks, arenas, pids = self._tables
        pids[:] = [handle.pid for handle, _ in handles]
        arenas[:] = self._agreed(lambda: [arena.map(handle) for handle, _ in handles])
        self._make_block()
        if not all(self._allgather(self._can_read_memory([state for _, state in handles]))):
            self.state[FAR] = NOT_FAR

    def _make_block(self) -> None:
        nbytes = CONTROL + self.sizes.ring
        self._block = self._agreed(lambda: own_arena().take(nbytes, touched=CONTROL))
        self._control = np.asarray(self._block)[:CONTROL]
        self._tables[0] = self._tables[1] + self._allgather(self._block.offset)
        _in_use.add(self)

    def _agreed(self, make: Callable[[], _Made]) -> _Made:
        """What ``make`` returns, if it raises on no rank."""
        made, reason = None, None
        try:
            made = make()
        except (ArenaError, MemoryError) as error:
            reason = f"rank {self.rank}: {error}"
        reasons = [reason for reason in self._allgather(reason) if reason]
        if reasons:
            raise ArenaError(reasons[0])
        return made  # type: ignore[return-value]

    def _allgather(self, thing: Any) -> list[Any]:
        """All ranks' things; not for ever, once there is a watch that knows the ranks."""
        watch = watch_of(self.comm)
        if watch is None:
            return self.comm.allgather(thing)
        return watch.allgather(self.comm, thing, self.within)

    def _can_read_memory(self, states: Sequence[int]) -> bool:
        """Whether the system lets this process read the next rank's memory: some containers forbid it."""
        rank = (self.rank + 1) % self.nranks
        found = np.zeros(2, np.int64)
        vectors = np.array([found.ctypes.data, found.nbytes, states[rank], found.nbytes])
        at = vectors.ctypes.data
        arguments = (int(self._tables[2][rank]), at, 1, at + 16, 1, 0)
        copied = ctypes.CDLL(None).process_vm_readv(*map(ctypes.c_long, arguments))
        return bool(copied == found.nbytes and found.tolist() == [rank, self.nranks])

    def twin(self, within: str) -> Channel:
        """Another channel of the same ranks, for calls that do not wait for this one's; collective.

        ``within`` says in which call, for errors.
        """
        self.within = within
        self._release_twins()
        twin = copy(self)
        twin.state, twin._tables, twin._scratch = (
            aligned_zeros(table.size).reshape(table.shape)
            for table in (self.state, self._tables, self._scratch)
        )
        twin.address = twin.state.ctypes.data
        twin._tables[:] = self._tables
        twin._set_state()
        twin.state[[ARENA, ARENA_END, FAR]] = self.state[[ARENA, ARENA_END, FAR]]
        twin._make_block()
        twin.retired = False
        self.watch.breaks(twin)
        self._twins[self._made] = twin
        self._made += 1
        return twin

    def _release_twins(self) -> None:
        """Give back the memory of twins that no rank needs any more: one rank alone cannot know that."""
        retired = {number for number, twin in self._twins.items() if twin.retired}
        for number in set.intersection(*self._allgather(retired)):
            _in_use.discard(self._twins.pop(number))

    def close(self) -> None:
        """No further call is possible; memory is given back. Collective."""
        if self.state[BROKEN]:
            return  # others may be anywhere: what they may be reading stays where it is
        self.state[BROKEN] = FREED
        self.within = "Free()"
        self._release_twins()  # which all ranks come to: until then others may be reading what is here
        _in_use.discard(self)

    @property
    def reads_foreign_memory(self) -> bool:
        """Whether ranks read each other's memory outside the arena, too."""
        return bool(self.state[FAR] != NOT_FAR)

    @property
    def watch(self) -> Watch:
        """That of the communicator, whose ranks may be more than those of this node."""
        return of(self.comm)[0]

    def named(self, rank: int) -> int:
        """Which rank of the watched communicator a rank of this node is."""
        return of(self.comm)[1][rank]

    def check(self, step: int = NO_STEP) -> None:
        """Raise `RankFailedError` if a rank that has not published ``step`` never will."""
        blocks, _, pids = self._tables.tolist()
        gone, reasons = {}, {}
        for rank in range(self.nranks):
            lines = int64_at(blocks[rank]), int64_at(blocks[rank] + CACHE_LINE)
            if rank == self.rank or max(lines) >= step:
                continue  # it may well have ended by now: all that it had to give is there
            if reason := ctypes.string_at(blocks[rank] + GIVEN_UP).decode(errors="replace"):
                reasons[self.named(rank)] = reason
            elif has_ended(pids[rank]):
                gone[self.named(rank)] = pids[rank]
        if gone:
            ended = "; ".join(f"rank {rank} (process {pid}) has ended" for rank, pid in gone.items())
            raise RankFailedError(ended, tuple(gone))
        if reasons and self.watch.failure is not None:
            raise self.watch.failure.error()
        for rank, reason in reasons.items():
            raise _meaning(rank, reason)

    def shut(self) -> None:
        """Let no further call begin on this rank."""
        if not self.state[BROKEN]:
            self.state[BROKEN] = GAVE_UP

    def give_up(self, reason: str) -> None:
        """No further call is possible on any rank; those that wait in one learn of it."""
        if os.getpid() != self._pid:
            return  # a copy of the process that fork made is not the rank
        self.state[BROKEN] = GAVE_UP
        if self._control[GIVEN_UP]:
            return  # the first reason stays: the program may end before the others have read it
        text = reason.encode()[: CONTROL - GIVEN_UP - 1] + b"\0"
        self._control[GIVEN_UP : GIVEN_UP + len(text)] = np.frombuffer(text, np.uint8)


def _meaning(rank: int, reason: str) -> Exception:
    """What this rank raises where ``rank`` has broken a collective off."""
    name, _, text = reason.partition(": ")
    for fault in FAULTS:
        if fault.__name__ == name:
            return fault(text)  # it has met what all ranks meet
    return RankFailedError(f"rank {rank} has broken off a collective: {reason}")


def int64_at(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


@cache
def _process(pid: int) -> int | None:
    """A descriptor of a process, readable when it has ended; None where there is no such process."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def has_ended(pid: int) -> bool:
    """Whether a process of this node has ended, be it that nobody has asked for its status yet."""
    descriptor = _process(pid)
    if descriptor is None:
        return True
    waiting = select.poll()  # select() takes no descriptor above 1023
    waiting.register(descriptor, select.POLLIN)
    return bool(waiting.poll(0))


class SharedPlan:
    """A job's words and tables: a collective over a channel, to be bound to buffers and run many times."""

    tagged = False
    scratch = 0  # bytes of its own: the channel has all there is

    def __init__(self, channel: Channel, reduction: Reduction = NO_REDUCTION) -> None:
        self.channel = channel
        self.reduction = reduction
        self.words = words = aligned_zeros(JOB_SIZE)
        self._tables = aligned_zeros(len(TABLES) * channel.nranks).reshape(len(TABLES), channel.nranks)
        words[CHANNEL] = channel.address
        words[list(TABLES)] = [table.ctypes.data for table in self._tables]
        self.set_factor(1 / channel.nranks)
        words[OPERATION], words[ITEM] = reduction.number, reduction.item
        words[FIRST], words[FOLD] = reduction.first, reduction.fold
        words[AVERAGE], words[NARROW] = reduction.average, reduction.narrow
        self.address = words.ctypes.data
        self._memory = memoryview(words.data)  # item assignment at a fraction of NumPy's cost
        self._waiting: Waiting | None = None
        self._text = ""

    def set_up(self, collective: str, count: int, root: int = 0) -> SharedPlan:
        """For blocks that are equally large: ``count`` elements, or bytes where nothing is added."""
        steps.set_up(self.address, COLLECTIVES.index(collective), count, root)
        return self

    def set_up_blocks(
        self,
        collective: str,
        sent: tuple[Sequence[int], Sequence[int]],
        received: tuple[Sequence[int], Sequence[int]],
        root: int = 0,
        uneven: bool = False,
    ) -> SharedPlan:
        """For blocks of any size: where those sent to, and received from, each rank are, and how long.

        ``uneven``: the ranks do not know each other's sizes.
        """
        self._tables[2:] = [*sent, *received]
        steps.set_up_blocks(self.address, COLLECTIVES.index(collective), root, uneven)
        return self

    def move_to(self, channel: Channel) -> None:
        """Go through a `Channel.twin` of the channel that the plan was made for."""
        self.channel = channel
        self.words[CHANNEL] = channel.address

    def bind(self, tag: int, send: int, recv: int) -> None:
        """Use the caller's buffers at these addresses. ``tag`` is for transports that need one."""
        self._memory[SEND] = send
        self._memory[RECV] = recv

    def run(self, tag: int, send: int, recv: int) -> None:
        """`bind` and `advance` to the end."""
        self._memory[SEND] = send
        self._memory[RECV] = recv
        try:
            if steps.advance(self.address, PATIENT) != DONE:
                self.finish()
        except BaseException as error:
            if self.words[STEP]:  # else it was complete, or had not begun, when Ctrl-C came
                self.give_up(error)
            raise

    def finish(self) -> None:
        """Go on to the end, looking after signals and the other ranks now and then."""
        while not self.advance():
            pass

    def advance(self, patience: int = PATIENT) -> bool:
        """Go on; whether the collective is complete on this rank.

        Returns false when nobody has published anything for ``patience`` nanoseconds. Raises
        `RankFailedError` if a rank has ended or given up, `MismatchError` if one is in another collective.
        """
        result = PENDING
        try:
            result = steps.advance(self.address, patience)
            if result == DONE:
                return True
            if result != PENDING:
                self.fail(result)
            if patience == PATIENT:
                self.check()
            return False
        except BaseException as error:
            self._break_off(error, waiting=result == PENDING)
            raise

    def check(self) -> None:
        """Raise if a rank that is waited for will never come."""
        step = int(self.words[BASE] + self.words[STEP])
        self.channel.check(step - 1)
        if self._waiting is None:
            words = self.words
            self._waiting = Waiting(self.channel.watch, lambda: int(words[BASE] + words[STEP]))
        self._waiting.look(self._describe, tuple)

    def _describe(self) -> str:
        return self._text or describe(self.words[CALL], self.words[SIZE])

    @property
    def tasks(self) -> list[Task]:
        """The job, once bound, for other compiled code."""
        return [Task(steps.ADVANCE, self.address, self)]

    def set_factor(self, factor: float) -> None:
        """What sums are multiplied by where the operation is AVG, instead of one over the number of ranks."""
        self.words[FACTOR : FACTOR + 1].view(np.float64)[0] = factor

    def mark(self, number: int, text: str = "") -> None:
        """Let ranks whose numbers differ be in different calls; this is a part of the call ``text``."""
        self._text = text
        self.words[CALL] = int(self.words[CALL]) % (1 << MARK_AT) + ((number % (1 << MARK_BITS)) << MARK_AT)

    def retire(self) -> None:
        """The caller needs the plan, and its own channel, no more."""
        self.channel.retired = True

    def give_up(self, error: BaseException) -> None:
        """This rank, which waits, leaves the collective with ``error``: the others are not to wait for it."""
        self._break_off(error, waiting=True)

    def _break_off(self, error: BaseException, waiting: bool) -> None:
        words = self.words
        if self._waiting is not None:
            self._waiting.end()
        if isinstance(error, FAULTS):
            self.channel.watch.failed_in(self._describe())
        if self.channel.state[BROKEN]:
            return
        finished = words[STEP] == words[LAST] > 0 and not words[DIRECT] and not words[LENT]
        if waiting and finished and not isinstance(error, FAULTS):
            # The others have all that they need from this rank: it may go on to the next call.
            self.channel.state[NEXT] = words[BASE] + words[LAST]
            self.channel.state[EXPECTED] = NOTHING
            words[STEP] = 0
        else:
            if getattr(error, "ranks", ()):  # no channel of theirs is of use any more
                self.channel.watch.give_up(error)
            self.channel.broken_by = error
            self.channel.give_up(f"{type(error).__name__}: {error}")

    def fail(self, result: int) -> NoReturn:
        """Raise the error that `advance` of compiled code has met."""
        culprit = int(self.words[CULPRIT])
        if result == CLOSED and self.channel.state[BROKEN] == FREED:
            raise RuntimeError("this communicator has been freed")
        watch = self.channel.watch
        if result == CLOSED and watch.failure is not None:
            raise watch.failure.error()
        if result == CLOSED and isinstance(self.channel.broken_by, FAULTS):
            raise type(self.channel.broken_by)(*self.channel.broken_by.args)
        if result == CLOSED:
            raise RankFailedError(
                "a collective of this communicator was broken off, so no further one is possible: use "
                "another communicator, such as a Dup() made before"
            )
        if result == UNREADABLE:
            raise OSError(f"the memory of rank {culprit} could not be read")
        watch.failed_in(self._describe())
        doings = watch.ask_all()
        failure = judge(doings, watch.rank, (), settled=False)
        if failure is not None:  # where this is a part of a call between nodes
            raise failure.error()
        places = {rank: str(doing) for rank, doing in enumerate(doings)}
        before = self.words[STEP] == 0  # it was the call before this one, in which not all waited for all
        step = int(self.words[BASE]) - before
        for rank in range(self.channel.nranks):
            line = self.channel._tables[0][rank] + (step & 1) * CACHE_LINE
            theirs = np.frombuffer(ctypes.string_at(int(line), CACHE_LINE), np.int64)
            if theirs[0] == step:
                name = self.channel.named(rank)
                whole = _whole_call(doings[name]) if theirs[LINE_CALL] >> MARK_AT else ""
                text = whole or describe(theirs[LINE_CALL], theirs[LINE_SIZE])
                place = f" at {doings[name].line}" if doings[name].line else ""
                places[name] = (
                    f"has been in {text}, is{place or ' elsewhere'}" if before else f"in {text}{place}"
                )
        raise MismatchError(f"the ranks are in different calls: {grouped(places)}")


def _whole_call(doing: Doing) -> str:
    """The call that a rank's part belongs to: what it waits in, or has begun last, in words."""
    begun = doing.recent[max(doing.recent)].partition(BY)[0] if doing.recent else ""
    return doing.call or (begun if ON_GPU in begun else "")


ROOTED = ("reduce", "broadcast", "gather", "scatter")


def describe(code: int, size: int) -> str:
    """A call as a person would write it, from what a control line says."""
    call = int(code) % (1 << MARK_AT)
    collective, root, operation = COLLECTIVES[call & 255], call >> 8 & 0xFFFFFF, call >> 32
    dtype = f"{_DTYPES[(operation - 1) % len(_DTYPES)]}[{size}]"
    data = (
        (f"{size} bytes" if collective != "barrier" else "",)
        if operation == 0
        else (dtype, operation_name(operation))
    )
    rooted = f"root={root}" if collective in ROOTED else ""
    mark = f"sizes #{int(code) >> MARK_AT}" if int(code) >> MARK_AT else ""
    return call_text(collective, *data, rooted, mark)
