"""Calls that have been prepared, and the three ways of completing them.

A `Call` is one collective bound to its buffers. A blocking collective runs its call at once; a nonblocking
one gives it to the progress thread and returns a `Request`; a persistent one keeps it as a
`PersistentCall` to be started again and again.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from mpi4py import MPI

from mpicoll import fastcalls
from mpicoll.fastcalls import FastStart
from mpicoll.gpu.plans import GpuPlan
from mpicoll.kernels.tasks import Task
from mpicoll.progress import PythonTask, PythonTurns
from mpicoll.transports.hierarchical import HierarchicalPlan
from mpicoll.transports.messages import BRIEF, PATIENT, MessagePlan
from mpicoll.transports.shared import Channel, SharedPlan
from mpicoll.transports.steps import BROKEN
from mpicoll.watch import What

if TYPE_CHECKING:
    from mpicoll.calls import CallMaker

Plan = MessagePlan | SharedPlan | HierarchicalPlan | GpuPlan

SLICE = 20_000  # nanoseconds without progress after which the progress thread turns to the next call


# Calls that were broken off, by Ctrl-C for one: MPI may still write into their memory, so it is never freed.
_broken_off: list[Call] = []


class Call:
    """A plan with its buffers' addresses, and what must be done to the memory before and after."""

    __slots__ = ("after", "before", "keep", "key", "plan", "recv", "send", "what")

    def __init__(self, plan: Plan, key: Any, what: What, send: int, recv: int, keep: tuple[Any, ...]) -> None:
        self.plan = plan
        self.what = what  # in words, and what tells its messages from those of other calls
        self.key = key  # what the plan was made for
        self.send = send
        self.recv = recv
        self.keep = keep  # what owns the memory
        self.before: Callable[[], None] | None = None
        self.after: Callable[[], None] | None = None

    def bind(self, tag: int) -> None:
        """Get ready to be started."""
        self.plan.bind(tag, self.send, self.recv)

    def start(self) -> bool:
        """Begin without blocking; whether the collective is already complete on this rank."""
        if self.before is not None:
            self.before()
        return self.advance(BRIEF)

    def advance(self, patience: int = PATIENT) -> bool:
        """Go on until nothing comes for ``patience`` ns; whether the collective is complete on this rank."""
        if not self.plan.advance(patience):
            return False
        if self.after is not None:
            self.after()
        return True

    def look(self) -> None:
        """Raise what it means if nothing will come any more; `advance` looks only if it is patient."""
        try:
            self.plan.check()
        except BaseException as error:
            self.plan.give_up(error)
            _broken_off.append(self)
            raise

    def run(self, tag: int) -> None:
        """From start to end. Returns to Python now and then, so that signals are handled."""
        if self.before is not None:
            self.before()
        try:
            self.plan.run(tag, self.send, self.recv)
        except BaseException:
            _broken_off.append(self)
            raise
        if self.after is not None:
            self.after()


class _Progress:
    """One thread that advances whatever nonblocking calls are under way, in turn."""

    def __init__(self) -> None:
        self._incoming: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._started = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, request: Request) -> None:
        with self._started:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mpicoll-progress", daemon=True)
                self._thread.start()
        self._incoming.put(request)

    def _run(self) -> None:
        active: list[Request] = []
        while True:
            if not active:
                active.append(self._incoming.get())
            while not self._incoming.empty():
                active.append(self._incoming.get())
            active = [request for request in active if not request._progress()]


_progress = _Progress()


class Request(MPI.Grequest):
    """A nonblocking collective: a generalized MPI request.

    MPI's own functions wait for it beside any other request. Its own ``Wait`` and ``Test`` do the work
    themselves instead of waiting for the progress thread to do it.
    """

    _call: Call
    _release: Callable[[], None]
    _grequest: MPI.Grequest
    _turn: threading.Lock  # held by the thread that advances the call
    _adopted: bool  # whether a thread that waits has taken the work over
    _complete: bool
    _error: Exception | None
    _looked: int  # when, in nanoseconds, the progress thread has last asked where the others are

    def __new__(cls, call: Call, tag: int, release: Callable[[], None]) -> Request:
        grequest = MPI.Grequest.Start()
        self = super().__new__(cls, grequest)
        self._call = call
        self._release = release
        self._grequest = grequest
        self._turn = threading.Lock()
        self._adopted = self._complete = False
        self._error = None
        self._looked = monotonic_ns()
        call.bind(tag)
        if call.start():
            self._finish()
        else:
            _progress.add(self)
        return self

    def _finish(self) -> None:
        self._complete = True
        if self._error is None:
            self._release()
        self._grequest.Complete()

    def _advance(self, patience: int) -> None:
        """Go on; only with ``_turn`` held."""
        if not self._complete and self._try_advance(patience):
            self._finish()

    def _try_advance(self, patience: int) -> bool:
        # An error belongs to whoever waits for the request, not to the thread that met it.
        try:
            return self._call.advance(patience)
        except Exception as error:
            self._error = error
            _broken_off.append(self._call)
            return True

    def _progress(self) -> bool:
        """A slice of work by the progress thread; whether that thread is done with the request."""
        # Never block here: whoever holds the lock may wait for long, and other calls must go on meanwhile.
        if not self._turn.acquire(blocking=False):
            return self._adopted
        try:
            if not self._adopted:
                self._advance(SLICE)
                self._look()
            return self._complete or self._adopted
        finally:
            self._turn.release()

    def _look(self) -> None:
        """See now and then whether what is waited for will come: nobody may ever call `Wait`."""
        now = monotonic_ns()
        if self._complete or now - self._looked < PATIENT:
            return
        self._looked = now
        try:
            self._call.look()
        except Exception as error:
            self._error = error
            self._finish()

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def Wait(self, status: MPI.Status | None = None) -> Literal[True]:
        """Complete the collective. Raises what went wrong in it."""
        self._adopted = True
        with self._turn:
            while not self._complete:
                self._advance(PATIENT)
        super().Wait(status)
        self._raise_error()
        return True

    def Test(self, status: MPI.Status | None = None) -> bool:
        """Whether the collective is complete; goes on with it if not. Raises what went wrong in it."""
        if not self._turn.acquire(blocking=False):
            return False  # the progress thread is at it, and MPI may not know yet what it has done
        try:
            self._advance(BRIEF)
            complete = self._complete
        finally:
            self._turn.release()
        if not complete:
            return False
        super().Test(status)
        self._raise_error()
        return True

    def wait(self, status: MPI.Status | None = None) -> Any:
        """As `Wait`."""
        return self.Wait(status)

    def test(self, status: MPI.Status | None = None) -> tuple[bool, Any]:
        """As `Test`, in the form of mpi4py's lower-case functions."""
        return self.Test(status), None


class Series:
    """Makes calls that follow each other, in the same order on every rank, as tasks for a `TaskQueue`.

    ``maker`` prepares them; ``channel`` is theirs alone, or None where they travel in messages, with ``tag``.
    """

    def __init__(self, maker: CallMaker, channel: Channel | None, tag: int) -> None:
        self.maker = maker
        self._tag = tag
        self.channel = channel
        self.calls: list[Call] = []  # made so far, with the memory that their tasks use

    def tasks(
        self, collective: str, *args: Any, factor: float | None = None, mark: int = 0, **named: Any
    ) -> list[Task]:
        """A collective as tasks, ``collective`` being a method of `CallMaker`, with mpi4py's arguments.

        ``factor`` is for ``op=AVG``: what sums are multiplied by, instead of one over the number of ranks.
        ``mark``: what the ranks of a node compare, besides the arguments.
        """
        call = getattr(self.maker, collective)(*args, **named)
        if call is None:
            raise TypeError(f"{collective}: expected a predefined operation and dtype")
        if isinstance(call.plan, GpuPlan):
            call.plan.move_to(self.channel)
        if self.channel is not None and isinstance(call.plan, (SharedPlan, HierarchicalPlan)):
            call.plan.move_to(self.channel)
        if factor is not None:
            call.plan.set_factor(factor)
        if isinstance(call.plan, SharedPlan):
            call.plan.mark(mark)
        call.bind(self._tag | call.what.mark)
        before, after = ([PythonTask(f).task] if f is not None else [] for f in (call.before, call.after))
        self.calls.append(call)
        if isinstance(call.plan, GpuPlan):
            return [*before, PythonTurns(call.plan.advance, call.plan.check).task, *after]
        return [*before, *call.plan.tasks, *after]

    def may_have_a_thread(self) -> bool:
        """Whether a thread may do the tasks made so far: those that call MPI take MPI_THREAD_MULTIPLE."""
        calls_mpi = any(call.plan.tagged for call in self.calls)
        return not calls_mpi or MPI.Query_thread() == MPI.THREAD_MULTIPLE

    @property
    def has_spare_cores(self) -> bool:
        """Whether a thread beside the program has a core to itself, or mostly waits for the network."""
        return self.channel is None or self.channel.sizes.alone or not self.maker.on_one_node

    def give_up(self, error: BaseException) -> None:
        """The other ranks of the node learn that nothing more comes from this one."""
        if self.channel is not None and not self.channel.state[BROKEN]:
            self.channel.give_up(f"{type(error).__name__}: {error}")
        if not self.maker.on_one_node:  # what travels in messages has nothing else to break
            self.maker.watch.give_up(error)

    def close(self) -> None:
        """This rank needs the channel no more."""
        if self.channel is not None:
            self.channel.retired = True

    __del__ = close


class PersistentCall:
    """A collective that is set up once and started many times: the fastest way.

    ``Start`` and then ``Wait``, or ``Test`` until it is true. Communication goes on inside these calls. The
    memory given at the beginning is read and written at each start. ``freed`` is told that it is freed.
    """

    def __init__(self, call: Call, tag: int, freed: Callable[[], None]) -> None:
        self._call: Call | None = call
        self._freed = freed
        self._looked = 0  # when, in nanoseconds, `Test` has last asked where the others are
        self._state = np.zeros(fastcalls.STATE_SIZE, np.int64)
        call.bind(tag)
        if not (call.before or call.after or isinstance(call.plan, GpuPlan)) and fastcalls.available():
            # These shadow the methods below, which do the same and handle whatever goes wrong.
            fast = FastStart(call.plan.tasks[0], self.Start, self.Wait)
            self._state, self.Start, self.Wait = fast.state, fast.start, fast.wait  # type: ignore[method-assign]

    @property
    def _active(self) -> bool:
        """Whether a start has not been completed."""
        return bool(self._state[fastcalls.ACTIVE])

    @_active.setter
    def _active(self, active: bool) -> None:
        self._state[fastcalls.ACTIVE] = active

    def Start(self) -> None:
        """Begin. Raises RuntimeError if the previous start has not been completed."""
        if self._active:
            raise RuntimeError("Start: the previous start is not complete; call Wait() first")
        if self._call is None:
            raise RuntimeError("Start: this persistent call has been freed")
        self._active = True
        self._active = not self._call.start()

    def Wait(self) -> bool:
        """Complete what `Start` began; returns at once if nothing is under way."""
        while self._active:
            self._active = not self._call.advance()  # type: ignore[union-attr]
        return True

    def Test(self) -> bool:
        """Whether what `Start` began is complete; goes on with it if not."""
        if self._active:
            self._active = not self._call.advance(BRIEF)  # type: ignore[union-attr]
            self._look()
        return not self._active

    def _look(self) -> None:
        """See now and then whether what is waited for will come: a program may test for ever."""
        now = monotonic_ns()
        if self._active and now - self._looked >= PATIENT:
            self._looked = now
            self._call.look()  # type: ignore[union-attr]

    def Free(self) -> None:
        """Give up buffers and scratch memory. Raises RuntimeError if a start is not complete."""
        if self._active:
            raise RuntimeError("Free: a start is not complete; call Wait() first")
        if self._call is not None:
            self._call.plan.retire()
            self._freed()
        self._call = None
        for compiled in ("Start", "Wait"):
            self.__dict__.pop(compiled, None)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if is_finalizing():
            return  # what this module has imported may be gone already
        if self._active and self._call is not None:
            _broken_off.append(self._call)  # the other ranks, or MPI, still use its memory
        else:
            self.Free()

    @staticmethod
    def Startall(calls: Iterable[PersistentCall]) -> None:
        """Start several, in this order on every rank."""
        for call in calls:
            call.Start()

    @staticmethod
    def Waitall(calls: Sequence[PersistentCall]) -> bool:
        """Complete several, whichever comes first going on first."""
        waiting = list(calls)
        while waiting:
            waiting = [call for call in waiting if not call.Test()]
        return True
