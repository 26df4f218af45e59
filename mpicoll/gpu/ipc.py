"""The IPC transport: ranks of a node reach into each other's GPU memory.

CUDA opens an allocation of one process in another. So each rank reads the others' inputs where they lie,
reduces its slice, and writes it into everybody's output, with one kernel: 2n bytes move for each rank, as
few as can be.

    1. record an event on the caller's stream         my buffers are ready here
    2. tell the others where my buffers are           a collective of the host, of a few hundred bytes
    3. let the stream wait for all ranks' events, and put the work on it
    4. record another event, meet the others          my work is done here
    5. let the stream wait for all ranks' second events: my output is complete, my input may be overwritten

The host only says what is to be done, in which order; no kernel waits for another process, for those of one
GPU take turns. Where events cannot be opened by other processes, the host waits for its own stream before 2
and 4 instead.

Small reductions have **one shot**: each rank copies its input to a slot that the others know, tells them,
and reduces all slots into its output. Two slots take turns, so nobody needs steps 4 and 5: when a slot is
written again, everybody has met twice.

Memory is opened once, and stays open until its owner frees it and allocates other memory at the same place,
or too much is open. Not every allocation can be opened by others (CUDA's memory pools cannot, nor PyTorch's
expandable segments): if any rank's cannot, all ranks stage the call through the host; all know, for each has
told the others.

Source: NVIDIA, "CUDA C++ Programming Guide", interprocess communication.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mpicoll.gpu import driver
from mpicoll.gpu.driver import HANDLE_SIZE, Allocation, Driver, GpuError
from mpicoll.gpu.plans import GpuPlan, Waits
from mpicoll.watch import Watch

# Bytes up to which each rank reduces everything: moving so many p times takes less than meeting again.
ONE_SHOT = SLOT = 64 << 10
READY, FINISHED, SHOT, EVENTS = 0, 1, 2, 4  # events of a rank: SHOT and the one after it take turns
SHARING = "the sharing of GPU memory"  # in words, for errors
MOST_OPEN = 256  # allocations of others that stay open

# What a rank tells the others of a buffer.
_PLACE = np.dtype(
    [("handle", f"V{HANDLE_SIZE}"), ("number", "u8"), ("base", "u8"), ("offset", "i8"), ("known", "i8")]
)
_WORD = np.dtype([("send", _PLACE), ("recv", _PLACE)])

Exchange = Callable[[Any, str], list[Any]]  # all ranks' things, and what for, in words


class _Opened:
    """Others' allocations that are open in this process, the least recently used going first.

    What calls of ``lanes`` still use on the GPU is not closed before they have left.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._driver: Driver = driver.driver()
        self._lanes = lanes
        self._addresses: OrderedDict[bytes, int] = OrderedDict()

    def address(self, handle: bytes, device: int) -> int:
        """Where the allocation with this handle begins here."""
        if handle not in self._addresses:
            if len(self._addresses) >= MOST_OPEN:
                for lane in self._lanes:
                    lane.settle()
                self.forget(next(iter(self._addresses)))
            self._addresses[handle] = self._driver.open_memory(handle, device)
        self._addresses.move_to_end(handle)
        return self._addresses[handle]

    def forget(self, handle: bytes) -> None:
        """Its owner has freed the allocation, once all work on it was done; or too much is open."""
        address = self._addresses.pop(handle, None)
        if address is not None:
            self._driver.close_memory(address)

    def close(self) -> None:
        """Nothing of the others' memory is used any more."""
        for handle in list(self._addresses):
            self.forget(handle)


class Facts(NamedTuple):
    """What a rank offers the others; ``problem`` if it has no memory for them."""

    problem: str
    slots: bytes = b""
    events: tuple[bytes, ...] = ()


class Lane:
    """Slots and events of all ranks, for calls that follow each other.

    Making one is collective; ``exchange`` gathers things from all ranks. ``reason`` says why it is of no
    use, on all ranks alike; it is None where it works. ``events`` says whether streams wait for other
    processes; else hosts do.
    """

    def __init__(self, rank: int, device: int, exchange: Exchange) -> None:
        self._rank, self._device = rank, device
        self._driver: Driver = driver.driver()
        self.turn = 0  # of the two slots
        self._left = self._driver.make_event(device)
        self._mine: list[int] = []
        self._theirs: list[list[int]] = []
        self._opened: list[int] = []
        with self._driver.on(device):
            offers = [Facts(*one) for one in exchange(tuple(self._offer()), SHARING)]
            found = exchange(self._open(offers), SHARING)
        self.events = not any(events for _memory, events in found)
        self.reason: str | None = next((memory for memory, _events in found if memory), None)
        events = [self._left, *self._mine, *(event for theirs in self._theirs for event in theirs)]
        weakref.finalize(self, _close_lane, self._driver, self._opened, events).atexit = False

    def _offer(self) -> Facts:
        """This rank's slots and events, for the others to open."""
        try:
            self.slots = self._driver.allocate(2 * SLOT, self._device)
            weakref.finalize(self, self._driver.free, self.slots).atexit = False
            slots = self._driver.export_memory(self.slots)
        except (GpuError, MemoryError) as error:
            return Facts(str(error))
        try:
            self._mine = [self._driver.make_event(self._device, shared=True) for _ in range(EVENTS)]
            return Facts("", slots, tuple(self._driver.export_event(event) for event in self._mine))
        except GpuError:
            return Facts("", slots)

    def _open(self, offers: Sequence[Facts]) -> tuple[str, str]:
        """Why memory, and events, cannot be opened here; empty where they can."""
        failed = [
            f"rank {rank} cannot share GPU memory: {offer.problem}"
            for rank, offer in enumerate(offers)
            if offer.problem
        ]
        if failed:
            return failed[0], ""
        try:
            self.peers = [self._peer(rank, offer) for rank, offer in enumerate(offers)]
        except GpuError as error:
            return f"rank {self._rank} cannot open another's GPU memory: {error}", ""
        if not all(offer.events for offer in offers):
            return "", "another rank's events cannot be opened"
        try:
            self._theirs = [
                []
                if rank == self._rank
                else [self._driver.open_event(event, self._device) for event in offer.events]
                for rank, offer in enumerate(offers)
            ]
        except GpuError as error:
            return "", str(error)
        return "", ""

    def _peer(self, rank: int, offer: Facts) -> int:
        if rank == self._rank:
            return self.slots
        self._opened.append(self._driver.open_memory(offer.slots, self._device))
        return self._opened[-1]

    def mark(self, which: int, stream: int) -> None:
        """What is on the stream so far is what others will wait for as event ``which``."""
        if self.events:
            self._driver.record(self._mine[which], stream)

    def await_all(self, which: int, stream: int) -> None:
        """Let the stream wait for all other ranks' event ``which``, which they have marked."""
        for theirs in self._theirs if self.events else ():
            if theirs:
                self._driver.wait(stream, theirs[which])

    def enter(self, stream: int) -> None:
        """What comes next on this stream follows the call before, whatever stream that was on.

        Events that others wait for must not be recorded again before they are done, nor slots be written that
        others read. (A stream's handle does not tell it from one that has ended.)
        """
        self._driver.wait(stream, self._left)

    def next_turn(self) -> int:
        """The slot for a call in one shot."""
        self.turn = 1 - self.turn
        return self.turn

    def leave(self, stream: int) -> None:
        """All work of a call is on the stream."""
        self._driver.record(self._left, stream)

    def settle(self) -> None:
        """Wait until the last call has left."""
        self._driver.wait_for(self._left)

    def finish(self) -> None:
        """`settle`, and close the others' slots, before they are freed there."""
        self.settle()
        while self._opened:
            self._driver.close_memory(self._opened.pop())


def _close_lane(found: Driver, opened: Sequence[int], events: Sequence[int]) -> None:
    for address in opened:
        found.close_memory(address)
    for event in events:
        found.destroy_event(event)


class Group:
    """The ranks of a node, which can open each other's GPU memory.

    Making one is collective. ``reason`` says why it is of no use, on all ranks alike; it is None where it
    works, which every rank has proved by reading what the others have written.
    """

    def __init__(self, rank: int, nranks: int, device: int, exchange: Exchange) -> None:
        self.rank, self.nranks, self.device = rank, nranks, device
        self._driver: Driver = driver.driver()
        self._exchange = exchange
        self._lanes: list[Lane] = []
        self._opened = _Opened(self._lanes)
        weakref.finalize(self, self._opened.close).atexit = False
        self._exported: OrderedDict[int, bytes | None] = OrderedDict()
        self._seen: list[dict[int, tuple[int, bytes]]] = [{} for _ in range(nranks)]
        self._idle: set[int] = set()  # numbers of lanes that no plan of this rank has any more
        self.lane = self._make_lane()
        self.reason = self.lane.reason or self._disprove()

    def _make_lane(self) -> Lane:
        self._lanes.append(Lane(self.rank, self.device, self._exchange))
        return self._lanes[-1]

    def lane_for(self, plan: object) -> Lane:
        """One for a plan whose calls do not wait for others; collective.

        It is new, unless all ranks have given the same one up. Lanes stay as long as the group does, for a
        slower rank may still be reading the slots of its last call.
        """
        idle = self._exchange(sorted(self._idle.copy()), SHARING)
        common = set.intersection(*map(set, idle))
        number = min(common) if common else len(self._lanes)
        if common:
            self._idle.remove(number)
        lane = self._lanes[number] if common else self._make_lane()
        weakref.finalize(plan, self._idle.add, number).atexit = False
        return lane

    def close(self) -> None:
        """Nobody reads other ranks' slots any more when this returns; collective."""
        for lane in self._lanes:
            lane.finish()
        self._opened.close()
        self._exchange(None, SHARING)

    def _disprove(self) -> str | None:
        """Read what the others have written to their slots; why those are not what they seem, or None."""
        pattern = np.array([0x6D706963, self.rank], np.int64)
        self._copied(self.lane.slots, pattern.ctypes.data, pattern.nbytes)
        self._exchange(None, SHARING)
        wrong = []
        for rank, slots in enumerate(self.lane.peers):
            found = np.zeros_like(pattern)
            self._copied(found.ctypes.data, slots, found.nbytes)
            if found.tolist() != [pattern[0], rank]:
                wrong.append(rank)
        for rank, others in enumerate(self._exchange(wrong, SHARING)):
            if others:
                return f"rank {rank} has read wrong data from GPU memory of rank {others[0]}"
        return None

    def _copied(self, target: int, source: int, nbytes: int) -> None:
        with self._driver.on(self.device):
            self._driver.copy(target, source, nbytes, 0)
            self._driver.synchronise(0)

    # -- buffers

    def describe(self, address: int, plain: bool = True) -> Any:
        """A buffer, for the others, who are not to reach into one that is not ``plain``."""
        place = np.zeros((), _PLACE)
        place["known"] = plain
        if not address or not plain:  # there is none, or nothing in it
            return place
        try:
            allocation = self._driver.allocation_of(address)
        except GpuError:  # the end of an allocation, or memory that the driver cannot tell from other memory
            allocation = Allocation(address, 0, 0)
        handle = self._handle(allocation) if allocation.number else None
        if handle is None:
            place["known"] = 0
        else:
            place["handle"] = np.void(handle)
            place["number"], place["base"] = allocation.number, allocation.base
            place["offset"] = address - allocation.base
        return place

    def _handle(self, allocation: Allocation) -> bytes | None:
        """For the others to open; None for a kind of memory that cannot be opened."""
        if allocation.number not in self._exported:
            try:
                handle = self._driver.export_memory(allocation.base)
            except GpuError:
                handle = None
            self._exported[allocation.number] = handle
            while len(self._exported) > MOST_OPEN:
                self._exported.popitem(last=False)
        return self._exported[allocation.number]

    def address(self, rank: int, place: Any, own: int) -> int:
        """Where another rank's buffer is here; ``own`` is this rank's."""
        number, base = int(place["number"]), int(place["base"])
        if rank == self.rank or not number:
            return own if rank == self.rank else 0
        handle = place["handle"].tobytes()
        known = self._seen[rank].get(base)
        if known is not None and known[0] != number:
            self._opened.forget(known[1])  # its owner has freed it, and has other memory there now
        self._seen[rank][base] = number, handle
        return self._opened.address(handle, self.device) + int(place["offset"])


class Work(NamedTuple):
    """What a rank does, once it knows where all buffers are.

    ``copies``: (target, source, bytes). ``fold``: (targets, sources, elements), or None.
    """

    copies: list[tuple[int, int, int]]
    fold: tuple[list[int], list[int], int] | None = None


class Host(Protocol):
    """Makes collectives of host memory, which compare that all ranks are in the same call."""

    def gather(self, word: Any, words: Any) -> Any:
        """All ranks' ``word``, in ``words``."""
        ...

    def meet(self) -> Any:
        """A barrier."""
        ...


class Arithmetic(NamedTuple):
    """A reduction: MPI's name of the operation, the dtype, and what results are multiplied by."""

    operation: str
    dtype: np.dtype[Any]
    factor: float


class IpcPlan(GpuPlan):
    """What plans of a group have in common."""

    def __init__(self, watch: Watch, group: Group, arithmetic: Arithmetic | None) -> None:
        super().__init__(watch, group.device)
        self._group, self._lane, self._arithmetic = group, group.lane, arithmetic
        self._channel: tuple[Any, ...] = ()  # for this plan alone, if it has moved

    def move_to(self, channel: Any) -> None:
        """As any plan, with events of its own; collective."""
        super().move_to(channel)
        self._channel = (channel,)
        self._lane = self._group.lane_for(self)
        if self._lane.reason is not None:
            raise GpuError(f"a persistent call: {self._lane.reason}")

    def set_factor(self, factor: float) -> None:
        """As any plan."""
        assert self._arithmetic is not None
        self._arithmetic = self._arithmetic._replace(factor=factor)

    def _mark(self, which: int) -> Waits:
        """Let others wait for what is on the stream; without events, wait for it here."""
        if not self._lane.events:
            yield from self._finished(self.stream)
        self._lane.mark(which, self.stream)

    def _fold(self, targets: Sequence[int], sources: Sequence[int], count: int) -> None:
        from mpicoll.kernels import reduce_cuda  # takes a while to import, and needs numba-cuda

        assert self._arithmetic is not None
        operation, dtype, factor = self._arithmetic
        reduce_cuda.fold(operation, dtype, targets, sources, count, factor, self.stream)


def _unused(*arguments: Any) -> Any:
    raise AssertionError("a plan that is at rest")


class DirectPlan(IpcPlan):
    """A collective in two steps, which `use` says: ``work(sends, recvs)`` is what this rank does with all
    ranks' buffers.

    ``otherwise`` makes the plan that does the same by another way, which all ranks go if the memory of one
    cannot be opened, or its buffers are not ``plain``, with holes between their elements.
    """

    def __init__(
        self,
        watch: Watch,
        group: Group,
        arithmetic: Arithmetic | None,
        host: Host,
    ) -> None:
        super().__init__(watch, group, arithmetic)
        self._word = np.zeros(1, _WORD)
        self._words = np.zeros(group.nranks, _WORD)
        self._gather, self._meet = host.gather(self._word, self._words), host.meet()
        self.calls = [self._gather, self._meet]
        self._work = self._otherwise = _unused
        self._plain = True
        self._other: GpuPlan | None = None

    def use(
        self, work: Callable[[list[int], list[int]], Work], otherwise: Callable[[], GpuPlan], plain: bool
    ) -> None:
        """What the next runs are to do."""
        self._work, self._otherwise, self._plain = work, otherwise, plain

    def rest(self) -> None:
        """Forget the caller's buffers."""
        self._work, self._otherwise, self._other = _unused, _unused, None

    def _steps(self) -> Waits:
        group = self._group
        for side, address in (("send", self.send), ("recv", self.recv)):
            self._word[side] = group.describe(address, self._plain)
        self._lane.enter(self.stream)
        yield from self._mark(READY)
        yield from self._host(self._gather)
        if not (self._words["send"]["known"] & self._words["recv"]["known"]).all():
            yield from self._stage()
            self._lane.leave(self.stream)
            return
        ranks = range(group.nranks)
        sends = [group.address(rank, self._words[rank]["send"], self.send) for rank in ranks]
        recvs = [group.address(rank, self._words[rank]["recv"], self.recv) for rank in ranks]
        self._lane.await_all(READY, self.stream)
        work = self._work(sends, recvs)
        for target, source, nbytes in work.copies:
            self.driver.copy(target, source, nbytes, self.stream)
        if work.fold is not None:
            self._fold(*work.fold)
        self._lane.leave(self.stream)  # before another call closes what this one uses
        yield from self._mark(FINISHED)
        yield from self._host(self._meet)
        self._lane.await_all(FINISHED, self.stream)
        self._lane.leave(self.stream)

    def _stage(self) -> Waits:
        if self._other is None:
            self._other = self._otherwise()
            for channel in self._channel:
                self._other.move_to(channel)
            if self._arithmetic is not None:
                self._other.set_factor(self._arithmetic.factor)
        other = self._other
        other.stream = self.stream
        other.bind(self.tag, self.send, self.recv)
        for _ in other._steps():
            yield
            other.patience = self.patience


class OneShotPlan(IpcPlan):
    """An allreduce of few bytes: everybody reduces everything."""

    def __init__(self, watch: Watch, group: Group, arithmetic: Arithmetic, count: int, host: Host) -> None:
        super().__init__(watch, group, arithmetic)
        self._count, self._nbytes = count, count * arithmetic.dtype.itemsize
        self._meet = host.meet()
        self.calls = [self._meet]

    def _steps(self) -> Waits:
        lane = self._lane
        lane.enter(self.stream)
        turn = lane.next_turn()
        self.driver.copy(lane.slots + turn * SLOT, self.send, self._nbytes, self.stream)
        yield from self._mark(SHOT + turn)
        yield from self._host(self._meet)
        lane.await_all(SHOT + turn, self.stream)
        self._fold([self.recv], [slots + turn * SLOT for slots in lane.peers], self._count)
        lane.leave(self.stream)
