"""What the plans of collectives on GPU memory have in common.

Such a plan is a Python generator, for a GPU's work is worth far more than the microseconds that Python takes
to order it: it puts work on streams, yields where it has to wait, and is entered again by `GpuPlan.advance`.
So the blocking, nonblocking and persistent form of a call are one piece of code, as for host memory.

    record an event on the caller's stream     the input is complete when the GPU gets here
    ... copies, kernels, collectives of the host ...
    let the caller's stream wait               what the caller puts on it next finds the result

A call is complete for the *host* when all of this has been ordered; the GPU may still be at it. Nothing
waits for a whole device, and nothing runs on the GPU while it waits for another process.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic_ns, sleep
from typing import Any

from mpicoll.gpu import driver
from mpicoll.gpu.driver import Driver
from mpicoll.transports.hierarchical import HierarchicalPlan
from mpicoll.transports.messages import PATIENT
from mpicoll.transports.shared import SharedPlan
from mpicoll.watch import Watch

Waits = Iterator[None]  # of a generator that yields wherever it waits


class GpuPlan:
    """A collective on memory of one GPU, to be bound to buffers and run many times.

    ``_steps`` of a subclass is the generator. ``stream`` is the caller's; it may be changed between two
    runs, and so may ``waits``: whether the end of a run is that of its work on the GPU, too, because nobody
    knows the stream.
    """

    tagged = True  # its messages are told from others by a tag
    scratch = 0  # bytes of host memory of its own

    def __init__(self, watch: Watch, device: int) -> None:
        self.watch = watch
        self.device = device
        self.driver: Driver = driver.driver()
        self.stream = 0
        self.waits = False
        self.tag = 0
        self.send = self.recv = 0
        self.patience = PATIENT
        self._going: Waits | None = None
        self.others: list[int] = []  # streams of the caller, besides ``stream``
        self.calls: list[Any] = []  # of the host
        self.lent: list[Any] = []  # those of them whose plans others may have later
        self._waiting_in: Any = None  # which of them it waits in

    def _steps(self) -> Waits:
        raise NotImplementedError

    # -- as any plan

    def bind(self, tag: int, send: int, recv: int) -> None:
        """Use the caller's buffers at these addresses."""
        self.tag, self.send, self.recv = tag, send, recv

    def run(self, tag: int, send: int, recv: int) -> None:
        """`bind` and `advance` to the end."""
        self.bind(tag, send, recv)
        while not self.advance():
            pass

    def advance(self, patience: int = PATIENT) -> bool:
        """Go on; whether all has been ordered, and the host's part is done.

        Returns false after ``patience`` nanoseconds. Raises `GpuError`, MemoryError, and what the collectives
        of the host raise.
        """
        self.patience = patience
        deadline = monotonic_ns() + patience
        try:
            with self.driver.on(self.device):
                if self._going is None:
                    self._going = self._whole()
                for _ in self._going:
                    if monotonic_ns() >= deadline:
                        return False
                    sleep(0)  # other threads may have something to do
        except BaseException as error:
            self._going = None
            self.give_up(error)
            raise
        self._going = None
        return True

    def _whole(self) -> Waits:
        for other in self.others:
            self._follow(self.stream, other)
        yield from self._steps()
        for other in self.others:
            self._follow(other, self.stream)
        if self.waits:
            yield from self._finished(self.stream)

    def _follow(self, stream: int, other: int) -> None:
        """Let what comes next on a stream wait for what is on another."""
        event = self.driver.make_event(self.device)
        self.driver.record(event, other)
        self.driver.wait(stream, event)
        self.driver.destroy_event(event)

    def move_to(self, channel: Any) -> None:
        """Overlap with other calls from now on: ``channel``, if there is one, is this call's alone."""
        self.lent.clear()
        for call in self.calls:
            if isinstance(call.plan, (SharedPlan, HierarchicalPlan)):
                call.plan.move_to(channel)

    def set_factor(self, factor: float) -> None:
        """What sums are multiplied by where the operation is AVG, instead of one over the number of ranks."""
        for call in self.calls:
            call.plan.set_factor(factor)

    def check(self) -> None:
        """Raise if a rank that is waited for will never come."""
        if self._waiting_in is not None:
            self._waiting_in.plan.check()

    def give_up(self, error: BaseException) -> None:
        """The others are not to wait for this rank, which has met ``error``."""
        if self._waiting_in is not None:
            self._waiting_in.plan.give_up(error)
        self.watch.give_up(error)

    def retire(self) -> None:
        """The caller needs the plan, and a channel of its own, no more."""
        for call in self.calls if not self.lent else ():
            call.plan.retire()

    def rest(self) -> None:
        """Forget the caller's buffers until the plan is used again."""

    # -- for generators

    def _host(self, call: Any) -> Waits:
        """Complete a call of host memory, with this one's tag."""
        self._waiting_in = call
        call.bind(self.tag)
        if call.before is not None:
            call.before()
        while not call.advance(self.patience):
            yield
        self._waiting_in = None

    def _done(self, event: int) -> Waits:
        """Until the event is done."""
        while not self.driver.is_done(event):
            yield

    def _finished(self, stream: int) -> Waits:
        """Until all that is on the stream now is done."""
        event = self.driver.make_event(self.device)
        self.driver.record(event, stream)
        yield from self._done(event)
        self.driver.destroy_event(event)
