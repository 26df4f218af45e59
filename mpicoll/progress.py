"""Progress: a list of tasks that go on, in order, beside what the program does.

A thread of its own carries them out in compiled code, without the GIL: it waits for tasks to be released,
does them, waits for other ranks, all without a word of Python, so it needs no turn from a program that
computes. Whoever waits for the end takes the remaining tasks over, for then its core has nothing else to do:
`OWNED` says that somebody is at it.

    program:   release(2)   release(5)   ...             finish()
    thread:    tasks 0, 1   tasks 2, 3  -- hands over -->
    program:                                             tasks 4
"""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NoReturn

import numpy as np
from numba import njit, types

from mpicoll.kernels.memory import call, call_long, fence, int64s
from mpicoll.kernels.tasks import DONE, PENDING, Task
from mpicoll.transports.machine import (
    CACHED,
    address_of,
    aligned_zeros,
    load_acquire,
    store_release,
    try_claim,
)

# -- a queue's state, all int64
OWNED = 0  # whether a thread is at the tasks; words that different threads write have a cache line each
NEXT = 8  # the next task
RESULT = 9  # what the last one returned
RELEASED = 16  # tasks before this one may be done
WANTED = 17  # whether the program waits, and wants to go on with the tasks itself
STOP = 18
TASKS = 24  # address of their functions and states
WAIT = 25  # addresses of sem_wait, sem_post
POST = 26
WORK = 28  # a semaphore: something has been released
GIVEN = 32  # a semaphore: the thread has let go of the tasks
STATE_SIZE = 40

THREAD_PATIENCE = 100_000  # nanoseconds that the thread waits for other ranks before it looks who wants what
PATIENT = 20_000_000  # nanoseconds after which a waiting program handles signals
NAP = 2e-5  # seconds between two turns of Python's in the thread, in which the program has the GIL
FAILED = -100  # the result of a Python function that has raised; transports have other numbers


@njit(nogil=True)
def _is_open(s, state):  # type: ignore[no-untyped-def]
    """Whether there is a task to do; after an error there is none any more."""
    fine = s[RESULT] == DONE or s[RESULT] == PENDING
    return fine and s[NEXT] < load_acquire(state + 8 * RELEASED)


@njit(nogil=True)
def _go_on(s, state, patience):  # type: ignore[no-untyped-def]
    task = int64s(s[TASKS] + 16 * s[NEXT])
    s[RESULT] = call_long(task[0], (task[1], types.int64(patience)))
    if s[RESULT] == DONE:
        store_release(state + 8 * NEXT, s[NEXT] + 1)


@CACHED.cfunc("int64(int64, int64)")
def _work(state, patience):  # type: ignore[no-untyped-def]
    """Do what has been released, as the owner of the tasks; the last result."""
    s = int64s(state)
    while _is_open(s, state):
        _go_on(s, state, patience)
        if s[RESULT] == PENDING:
            break
    return s[RESULT]


@CACHED.cfunc("void(int64)")
def _serve(state):  # type: ignore[no-untyped-def]
    """What the thread does, to the end of its life."""
    s = int64s(state)
    while True:
        call(s[WAIT], (state + 8 * WORK,))
        if load_acquire(state + 8 * STOP) != 0:
            return
        if load_acquire(state + 8 * WANTED) != 0 or not try_claim(state + 8 * OWNED):
            continue  # the program is at it
        while load_acquire(state + 8 * WANTED) == 0 and _is_open(s, state):
            _go_on(s, state, THREAD_PATIENCE)
        store_release(state + 8 * OWNED, 0)
        fence()  # whoever does not find the tasks free has said before that he wants them
        if load_acquire(state + 8 * WANTED) != 0:
            call(s[POST], (state + 8 * GIVEN,))


@CACHED.cfunc("void(int64, int64, int64)")
def _release(state, end, wake):  # type: ignore[no-untyped-def]
    store_release(state + 8 * RELEASED, end)
    if wake != 0:
        call(int64s(state)[POST], (state + 8 * WORK,))


@CACHED.cfunc("int64(int64)")
def _claim(state):  # type: ignore[no-untyped-def]
    """Want the tasks; whether they are the program's now."""
    store_release(state + 8 * WANTED, 1)
    return try_claim(state + 8 * OWNED)


@CACHED.cfunc("void(int64)")
def _let_go(state):  # type: ignore[no-untyped-def]
    store_release(state + 8 * WANTED, 0)
    store_release(state + 8 * OWNED, 0)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class _CallsPython:
    """A task in Python. It has to wait for the GIL, which others may hold for milliseconds."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        own = weakref.ref(self)  # so that what a task uses goes with it, and does not wait for the collector

        def call(state: int, patience: int) -> int:
            task = own()
            assert task is not None
            return task._call(patience)

        self._entry = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(call)

    def _call(self, patience: int) -> int:
        try:
            return int(DONE) if self._turn(patience) else int(PENDING)
        except BaseException as error:  # for whoever waits for the tasks
            self._error = error
            return FAILED

    def _turn(self, patience: int) -> bool:
        """Go on; whether that was all."""
        raise NotImplementedError

    @property
    def task(self) -> Task:
        """To be kept in a `TaskQueue`."""
        return Task(address_of(self._entry), 0, self)

    def fail(self, result: int) -> NoReturn:
        """Raise what the function raised."""
        assert self._error is not None
        raise self._error


class PythonTask(_CallsPython):
    """A Python function as a task."""

    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__()
        self._function = function

    def _turn(self, patience: int) -> bool:
        self._function()
        return True


class PythonTurns(_CallsPython):
    """A Python function as a task that takes several turns: ``advance(patience)`` says which is the last.

    ``check()`` is called while it takes long; see `TaskQueue`.
    """

    def __init__(self, advance: Callable[[int], bool], check: Callable[[], None]) -> None:
        super().__init__()
        self._advance, self.check = advance, check

    def _turn(self, patience: int) -> bool:
        waits = patience >= PATIENT  # as does the program, which has nothing else to do
        done = self._advance(patience if waits else 0)
        if not done and not waits:
            time.sleep(NAP)
        return done


class TaskQueue:
    """Tasks that are done in order, again and again: `release`, `finish`, and so on.

    ``keep`` is what else they use. ``threaded``: whether a thread does them beside the program; without one
    `finish` does them all. What a task keeps may have ``check()``, called while it waits for long, and
    ``fail(result)``, which raises what its result means. ``give_up(error)`` is called when the tasks are not
    gone on with.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        keep: Any,
        threaded: bool,
        give_up: Callable[[BaseException], None],
    ) -> None:
        self._tasks, self._keep = tuple(tasks), keep
        self._table = np.array([(task.function, task.state) for task in tasks], np.int64).reshape(-1, 2)
        self._state = state = aligned_zeros(STATE_SIZE)
        self._address = state.ctypes.data
        state[TASKS] = self._table.ctypes.data
        state[WAIT], state[POST] = address_of(_libc().sem_wait), address_of(_libc().sem_post)
        for semaphore in (WORK, GIVEN):
            _libc().sem_init(ctypes.c_void_p(self._address + 8 * semaphore), 0, 0)
        self._threaded = threaded
        self._give_up = give_up
        self._thread: threading.Thread | None = None
        self._ended = ""  # why nothing can be done any more
        owned = (state, self._table, self._tasks, keep)
        self._stop = weakref.finalize(self, _stop, self._address, state, owned)
        self._stop.atexit = False

    def release(self, end: int, wake: bool = True) -> None:
        """Let the tasks before the one of number ``end`` be done; ``wake`` the thread for it."""
        self._check_whole()
        wake = wake and self._threaded
        if wake and self._thread is None:
            self._start()
        _release.ctypes(self._address, end, wake)

    def finish(self) -> None:
        """Do all tasks that are left, and begin anew. Raises what went wrong; then the queue is of no use."""
        self._check_whole()
        _release.ctypes(self._address, len(self._tasks), False)
        try:
            self._take_over()
            while (result := _work.ctypes(self._address, PATIENT)) == PENDING:
                self._ask("check")
            if result != DONE:
                self._ask("fail", result)
        except BaseException as error:
            self._ended = f"it has been broken off by {type(error).__name__}: {error}"
            self._give_up(error)
            raise
        self._state[NEXT] = self._state[RELEASED] = 0
        _let_go.ctypes(self._address)

    def close(self) -> None:
        """End the thread."""
        self._ended = "it has been closed"
        self._stop()
        if self._thread is not None:
            self._thread.join()
        self._tasks, self._keep = (), None

    def _check_whole(self) -> None:
        if self._ended:
            raise RuntimeError(f"this cannot be used any more, for {self._ended}")

    def _start(self) -> None:
        owned = (
            self._state,
            self._table,
            self._tasks,
            self._keep,
        )  # not the queue, which stops the thread when it goes

        def serve(address: int = self._address, keep: Any = owned) -> None:
            _serve.ctypes(address)

        self._thread = threading.Thread(target=serve, name="mpicoll-tasks", daemon=True)
        self._thread.start()

    def _take_over(self) -> None:
        while not _claim.ctypes(self._address):
            deadline = time.time() + PATIENT * 1e-9
            timespec = np.array([int(deadline), int(deadline % 1 * 1e9)])
            semaphore, until = (
                ctypes.c_void_p(at) for at in (self._address + 8 * GIVEN, timespec.ctypes.data)
            )
            if _libc().sem_timedwait(semaphore, until):
                self._ask("check")

    def _ask(self, method: str, *args: int) -> None:
        """Call a method of what the current task keeps, if it has that."""
        index = int(self._state[NEXT])
        if index < len(self._tasks) and hasattr(self._tasks[index].keep, method):
            getattr(self._tasks[index].keep, method)(*args)


# What tasks use that were dropped half-way: other ranks, or MPI, may still write into it.
_abandoned: list[Any] = []


def _stop(address: int, state: Any, owned: Any) -> None:
    if state[NEXT] < state[RELEASED]:
        _abandoned.append(owned)
    state[STOP] = state[WANTED] = 1
    _release.ctypes(address, 0, True)
