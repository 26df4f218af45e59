"""What a collective of a process group gives: its `Work`, and the line in which work is done.

Each process group does its work in the order in which it was asked for, as all ranks must. Whoever waits
does it himself: the work before his, and his own. Beside the program a thread does it, woken for work that
was asked for with ``async_op=True``: transports wait and reduce without the GIL, so a backward pass goes on
meanwhile.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.futures import Future

from mpicoll.faults import FAULTS, DeadlineError
from mpicoll.torch.cuda import Ordered

NAP = 0.0002  # seconds between looks at work that somebody else does, where a time limit is given
UNLIMITED = timedelta()  # torch's word for it
GRACE = 1.0  # seconds after which the thread does what somebody should have come for

# Work that was broken off by one of these: MPI may still write into its tensors, so they are never freed.
BREAKS = (*FAULTS, MPI.Exception, KeyboardInterrupt)
_broken_off: list[Any] = []


class Work(dist.Work):
    """One collective under way. ``result``: the tensors that it writes, which `result` gives."""

    def __init__(
        self,
        line: Line | None,
        run: Callable[[], None] | None,
        result: Sequence[torch.Tensor],
        ordered: Ordered | None = None,
    ) -> None:
        super().__init__()
        self._line, self._result, self._ordered = line, list(result), ordered
        self._run = run if ordered is None else ordered.run
        self._done = False
        self._error: BaseException | None = None
        self._future: Future[Any] | None = None
        self._unset: list[Future[Any]] = []

    def do(self) -> None:
        """In the line's turn."""
        assert self._run is not None
        try:
            self._run()
        except BaseException as error:
            self._error = error
            if isinstance(error, BREAKS):
                _broken_off.append(self._run)
            if not isinstance(error, Exception):
                raise
        finally:
            self._done = True
            self._run = self._line = None  # and with it the memory that it uses

    def wait(self, timeout: timedelta = UNLIMITED) -> bool:
        """Until it is done. Raises what the collective raised, and `DeadlineError` after ``timeout``."""
        if not self._done:
            self._wait(timeout.total_seconds())
        if self._error is not None:
            raise self._error
        if self._ordered is not None:
            self._ordered.join()
        return True

    def _wait(self, seconds: float) -> None:
        line = self._line
        if line is None:
            return  # it has just been done
        if seconds <= 0:
            line.reach(self)
            return
        line.wake()
        until = time.monotonic() + seconds
        while not self._done:
            if time.monotonic() > until:
                raise DeadlineError(f"wait: the collective was not done after {seconds:g} s")
            time.sleep(NAP)

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    def is_completed(self) -> bool:
        return self._done

    def is_success(self) -> bool:
        return self._done and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> list[torch.Tensor]:
        """The tensors that were written; waits for them."""
        self.wait()
        return self._result

    def get_future(self) -> Future[Any]:
        """A future of `result`, completed in whatever thread does the work."""
        if self._future is None:
            devices = sorted({tensor.device for tensor in self._result if tensor.is_cuda}, key=str)
            unset: Future[Any] = Future(devices=devices)
            # An error of a future is one that a callback raises: torch's C++ takes no other for one.
            self._future = unset.then(self._outcome)
            self._unset.append(unset)
            if self._done:
                self.settle()
        return self._future

    def _outcome(self, _: Future[Any]) -> list[torch.Tensor]:
        if self._error is not None:
            raise self._error
        return self._result

    def settle(self) -> None:
        """Complete the future, when done and out of the turn: its callbacks may ask for collectives."""
        with suppress(IndexError):  # two may come here at the same time: the first one gets it
            unset = self._unset.pop()
            # A future of CUDA tensors takes the current stream for that of the work.
            with nullcontext() if self._ordered is None else torch.cuda.stream(self._ordered.side):
                unset.set_result(None)


class Done(Work):
    """Work that has been done at once: made quickly, since a collective of little data takes no longer."""

    _line = _run = _ordered = _error = _future = None
    _done = True

    def __init__(self, result: Sequence[torch.Tensor]) -> None:
        dist.Work.__init__(self)
        self._unset = []
        self._result = list(result)

    def renew(self, result: Sequence[torch.Tensor]) -> None:
        """Serve for another collective; nobody else may have it."""
        self._result, self._future = list(result), None


class Line:
    """Work in the order in which it was asked for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: deque[Work] = deque()
        self._turn = threading.Lock()
        self._called = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._ended = False
        self._is_left, self._left_at = False, 0.0

    def do(self, run: Callable[..., None], *given: Any) -> None:
        """Do ``run(*given)`` after all that has been asked for."""
        if self._waiting:
            self.finish()
        try:
            with self._turn:
                run(*given)
        except BREAKS:
            _broken_off.append((run, given))
            raise

    def add(self, work: Work) -> None:
        """Let the thread do it, or whoever waits for it."""
        self._is_left = False
        self._waiting.append(work)
        self.wake()

    def leave(self, work: Work) -> None:
        """Leave it, and all before it, to somebody who will call `finish` soon."""
        self._is_left, self._left_at = True, time.monotonic()
        self._waiting.append(work)
        self._have_a_thread()

    def is_the_thread_s(self) -> bool:
        """Whether there is work for the thread: also what was left, if nobody comes.

        So it is when a backward pass is broken off.
        """
        if self._is_left and time.monotonic() - self._left_at <= GRACE:
            return False
        return bool(self._waiting)

    def wake(self) -> None:
        """There is something to do for the thread.

        If it asks itself, in a callback of a future that may wait for this, another one takes its place.
        """
        self._have_a_thread()
        self._called.release()

    def _have_a_thread(self) -> None:
        if self._thread in (None, threading.current_thread()) and not self._ended:
            own = weakref.ref(self)
            self._thread = threading.Thread(
                target=_serve, args=(own, self._called), name=f"mpicoll-{self._name}", daemon=True
            )
            self._thread.start()

    def reach(self, work: Work) -> None:
        """Do what is to be done, up to ``work``."""
        while not work.is_completed():
            self._step()

    def _step(self) -> None:
        work = None
        try:
            with self._turn:
                if self._waiting:
                    work = self._waiting.popleft()
                    work.do()
        finally:
            if work is not None:
                work.settle()

    def finish(self) -> None:
        """Do all that is to be done."""
        while self._waiting:
            self._step()

    def end(self) -> None:
        """There will be no more."""
        self._ended = True
        self._called.release()


def _serve(own: weakref.ref[Line], called: threading.Semaphore) -> None:
    while True:
        called.acquire(timeout=GRACE)
        line = own()
        if line is None:
            return
        while line._thread is threading.current_thread() and line.is_the_thread_s():
            line._step()
        if line._thread is not threading.current_thread() or (line._ended and not line._waiting):
            return
        del line  # while the thread sleeps, the group may go
