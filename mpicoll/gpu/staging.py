"""The staged transport: GPU memory by way of the host's, for any MPI and any place of the GPUs.

Data are copied to host memory, a collective of the host does the rest, and its result is copied back. The
host memory is **pinned**, so that copies go on beside everything else, and within the arena, so that ranks
of a node work on it where it lies.

Reductions and broadcasts go in **sections** through three slots, so that three things happen at once:

    copy in     section 0   section 1   section 2   ...
    host                    section 0   section 1   section 2
    copy out                            section 0   section 1

All others copy what they send as a whole, and then what they have received.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpicoll.gpu import driver
from mpicoll.gpu.driver import Driver, GpuError
from mpicoll.gpu.plans import GpuPlan, Waits
from mpicoll.transports.arena import ArenaError, new_array
from mpicoll.watch import Watch

SECTION = 4 << 20  # bytes: starting a copy takes 10 microseconds, moving a section ten times that
SLOTS = 3
SMALLEST = 1 << 16  # bytes of pinned memory
MOST_KEPT = 1 << 30  # bytes of pinned memory that nobody uses at present: pinning takes longer than copying


class Pinned:
    """Host memory that copies of a GPU go to and from."""

    def __init__(self, nbytes: int) -> None:
        self.driver = driver.driver()
        try:
            self.array = new_array(nbytes, np.uint8)
        except ArenaError:
            self.array = np.empty(nbytes, np.uint8)
        self.address = self.array.ctypes.data
        self._pinned = True
        try:
            self.driver.register(self.address, nbytes)
        except GpuError:  # a limit on locked memory: copies are slower then, and wait, but as right
            self._pinned = False

    def unpin(self) -> None:
        """Nobody uses it any more."""
        if self._pinned:
            self.driver.unregister(self.address)


class _Pool:
    """Pinned memory that no plan has, with the event of the last copy from it."""

    def __init__(self) -> None:
        self._free: list[tuple[Pinned, int]] = []
        self._turn = threading.RLock()  # a plan may be collected, and give its memory back, at any moment

    def take(self, nbytes: int) -> Pinned:
        """At least so many bytes."""
        wanted, here = max(SMALLEST, 1 << (nbytes - 1).bit_length()), driver.driver()
        with self._turn:
            for i, (pinned, event) in enumerate(self._free):
                if pinned.array.size == wanted and pinned.driver is here and here.is_done(event):
                    del self._free[i]
                    here.destroy_event(event)
                    return pinned
        return Pinned(wanted)

    def give(self, pinned: Pinned, event: int) -> None:
        """It is free when the event is done."""
        with self._turn:
            self._free.append((pinned, event))
            while sum(one.array.size for one, _ in self._free) > MOST_KEPT:
                oldest, last = self._free.pop(0)
                oldest.driver.wait_for(last)
                oldest.driver.destroy_event(last)
                oldest.unpin()


pool = _Pool()


class Section(NamedTuple):
    """A part of the data, in bytes, and the call of the host that works on its slot."""

    begin: int
    nbytes: int
    slot: int
    call: Any


class SectionsPlan(GpuPlan):
    """A collective that does the same to all elements, section by section.

    ``make`` makes the call of the host for elements in a slot, in place: ``make(slot, count)``. ``reads`` and
    ``writes`` say whether this rank's input, and output, take part in it.
    """

    def __init__(
        self,
        watch: Watch,
        device: int,
        size: tuple[int, int],
        make: Callable[[np.ndarray[Any, Any], int], Any],
        release: Callable[[Any], None],
        reads: bool,
        writes: bool,
    ) -> None:
        super().__init__(watch, device)
        count, itemsize = size
        self._reads, self._writes = reads, writes
        whole = SECTION // itemsize
        begins = range(0, max(count, 1), whole)  # where there is nothing, ranks still compare their calls
        slots = min(SLOTS, len(begins))
        self._pinned = [pool.take(min(count * itemsize, SECTION)) for _ in range(slots)]
        self.scratch = sum(pinned.array.size for pinned in self._pinned)
        made: dict[tuple[int, int], Any] = {}
        self._sections = []
        for number, begin in enumerate(begins):
            key = number % slots, min(whole, count - begin)
            if key not in made:
                made[key] = make(self._pinned[key[0]].array, key[1])
            self._sections.append(Section(begin * itemsize, key[1] * itemsize, key[0], made[key]))
        self.calls, self.lent = list(made.values()), list(made.values())
        self._streams = [self.driver.make_stream(device) for _ in range(2)]
        self._begun = self.driver.make_event(device)
        self._arrived, self._left = ([self.driver.make_event(device) for _ in range(slots)] for _ in range(2))
        events = [self._begun, *self._arrived]
        owned = (self.driver, self._streams, events, self._pinned, self._left, self.lent, release)
        weakref.finalize(self, _leave, *owned).atexit = False

    def _steps(self) -> Waits:
        copying_in, copying_out = self._streams
        self.driver.record(self._begun, self.stream)
        for stream in self._streams:
            self.driver.wait(stream, self._begun)
        for number, section in enumerate(self._sections):
            if number == 0:
                yield from self._bring(section, copying_in)
            if number + 1 < len(self._sections):
                yield from self._bring(self._sections[number + 1], copying_in)
            if self._reads:
                yield from self._done(self._arrived[section.slot])
            yield from self._host(section.call)
            if self._writes:
                source = self._pinned[section.slot].address
                self.driver.copy(self.recv + section.begin, source, section.nbytes, copying_out)
            self.driver.record(self._left[section.slot], copying_out)
        self.driver.wait(self.stream, self._left[self._sections[-1].slot])

    def _bring(self, section: Section, stream: int) -> Waits:
        """Start copying a section to its slot, once what was there has left."""
        yield from self._done(self._left[section.slot])
        if self._reads:
            source = self.send + section.begin
            self.driver.copy(self._pinned[section.slot].address, source, section.nbytes, stream)
            self.driver.record(self._arrived[section.slot], stream)


class Range(NamedTuple):
    """Bytes of GPU memory, and where they are on the host."""

    gpu: int
    host: int
    nbytes: int


class WholePlan(GpuPlan):
    """Any collective: copy ``inputs`` to the host, let ``call`` do its work there, copy ``outputs`` back."""

    def __init__(
        self,
        watch: Watch,
        device: int,
        call: Any,
        pinned: Sequence[Pinned],
        inputs: Sequence[Range],
        outputs: Sequence[Range],
        release: Callable[[Any], None],
    ) -> None:
        super().__init__(watch, device)
        self.calls, self.lent = [call], [call]
        self._inputs, self._outputs = inputs, outputs
        self._arrived = self.driver.make_event(device)
        left = [self.driver.make_event(device) for _ in pinned]
        self._left = left
        owned = (self.driver, (), [self._arrived], list(pinned), left, self.lent, release)
        weakref.finalize(self, _leave, *owned).atexit = False

    def bind(self, tag: int, send: int, recv: int) -> None:
        """The buffers are those of ``inputs`` and ``outputs``, always."""
        self.tag = tag

    def _steps(self) -> Waits:
        for event in self._left:  # the host memory is in use until the last run's results have left
            yield from self._done(event)
        for gpu, host, nbytes in self._inputs:
            self.driver.copy(host, gpu, nbytes, self.stream)
        self.driver.record(self._arrived, self.stream)
        yield from self._done(self._arrived)
        yield from self._host(self.calls[0])
        for gpu, host, nbytes in self._outputs:
            self.driver.copy(gpu, host, nbytes, self.stream)
        for event in self._left:
            self.driver.record(event, self.stream)


def _leave(
    found: Driver,
    streams: Sequence[int],
    events: Sequence[int],
    pinned: Sequence[Pinned],
    left: Sequence[int],
    calls: Sequence[Any],
    release: Callable[[Any], None],
) -> None:
    """Give back what a plan has used; copies from its memory may still be under way."""
    for one, event in zip(pinned, left, strict=True):
        pool.give(one, event)
    for event in events:
        found.destroy_event(event)
    for stream in streams:
        found.destroy_stream(stream)
    for call in calls:
        release(call)
