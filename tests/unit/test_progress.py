"""Task queues: every task once and in order, whoever does it, and an end for every thread."""

from __future__ import annotations

import gc
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
import pytest
from mpicoll.kernels.memory import int64s
from mpicoll.kernels.tasks import DONE, PENDING, Task
from numba import cfunc, types

from mpicoll.progress import PATIENT, PythonTask, PythonTurns, TaskQueue
from mpicoll.transports.machine import aligned_zeros, load_acquire

SOON = 10.0  # seconds within which happens what takes milliseconds
PROMPT = 1.0  # seconds within which Ctrl-C is heard
ERROR = 7  # what a task that fails returns

usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


@cfunc("int64(int64, int64)")
def _note(state, patience):
    """Add the own number to a log: its length, then what is in it."""
    own = int64s(state)
    log = int64s(own[0])
    log[1 + log[0]] = own[1]
    log[0] += 1
    return DONE


@cfunc("int64(int64, int64)")
def _pass_gate(state, patience):
    """Done as soon as the gate is open."""
    if load_acquire(state) == 0:
        usleep(types.uint32(200))
        return PENDING
    return DONE


@cfunc("int64(int64, int64)")
def _fail(state, patience):
    return ERROR


class Log:
    """What has been done, in order."""

    def __init__(self) -> None:
        self.words = aligned_zeros(100_000)

    def task(self, number: int) -> Task:
        own = np.array([self.words.ctypes.data, number])
        return Task(_note.address, own.ctypes.data, (own, self.words))

    def tasks(self, count: int) -> list[Task]:
        return [self.task(i) for i in range(count)]

    def read(self) -> list[int]:
        return self.words[1 : 1 + self.words[0]].tolist()  # type: ignore[no-any-return]

    def clear(self) -> None:
        self.words[0] = 0


class Gate:
    """What a task waits for."""

    def __init__(self) -> None:
        self.words = aligned_zeros(1)
        self.task = Task(_pass_gate.address, self.words.ctypes.data, self)
        self.asked = 0
        self.error: BaseException | None = None

    def open(self, after: float = 0) -> None:
        threading.Timer(after, self.words.fill, (1,)).start()

    def check(self) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error


class Calls:
    """What a queue has called."""

    def __init__(self) -> None:
        self.given_up: list[BaseException] = []

    def queue(self, tasks: Sequence[Task], threaded: bool) -> TaskQueue:
        return TaskQueue(tasks, None, threaded, self.given_up.append)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "it never comes"
        time.sleep(0.0005)


def task_threads() -> int:
    return sum(thread.name == "mpicoll-tasks" for thread in threading.enumerate())


threads = pytest.mark.parametrize("threaded", [True, False], ids=["thread", "no thread"])


# -- every task once, in order


@threads
@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_tasks_are_done_in_order(count: int, threaded: bool) -> None:
    log = Log()
    queue = Calls().queue(log.tasks(count), threaded)
    for _ in range(3):
        queue.finish()
        assert log.read() == list(range(count))
        log.clear()
    queue.close()


@threads
def test_released_in_steps(threaded: bool) -> None:
    log = Log()
    queue = Calls().queue(log.tasks(20), threaded)
    for end in (1, 5, 5, 19):
        queue.release(end)
        time.sleep(0.002)
        assert log.read() == list(range(len(log.read())))
        assert len(log.read()) <= end
    queue.finish()
    assert log.read() == list(range(20))
    queue.close()


@threads
def test_many_steps_of_any_pattern(threaded: bool) -> None:
    """No task is lost or done twice, however the thread and the program meet."""
    chance, log = random.Random(0), Log()
    count, words = 12, np.zeros(0)
    queue = Calls().queue(log.tasks(count), threaded)
    for step in range(20_000):
        end = 0
        while chance.random() < 0.7:
            end = chance.randint(end, count)
            queue.release(end, wake=chance.random() < 0.8)
            if chance.random() < 0.2:
                words = np.ones(chance.choice([10, 10_000]))  # the program computes
            if chance.random() < 0.02:
                time.sleep(chance.uniform(0, 3e-4))
        queue.finish()
        assert log.read() == list(range(count)), step
        log.clear()
    assert words.all()
    queue.close()


def test_many_queues_at_once() -> None:
    chance = random.Random(0)
    logs = [Log() for _ in range(4)]
    queues = [Calls().queue(log.tasks(6), threaded=True) for log in logs]
    for step in range(500):
        for queue in chance.choices(queues, k=3):
            queue.release(3)
        for queue, log in zip(queues, logs, strict=True):
            queue.finish()
            assert log.read() == list(range(6)), step
            log.clear()
    for queue in queues:
        queue.close()


@threads
def test_python_functions_among_compiled_tasks(threaded: bool) -> None:
    log, found = Log(), []
    tasks = log.tasks(3)
    tasks.insert(1, PythonTask(lambda: found.append(log.read())).task)
    tasks.append(PythonTask(lambda: found.append(log.read())).task)
    queue = Calls().queue(tasks, threaded)
    for step in range(300):
        queue.release(step % 6)
        queue.finish()
        assert found == [[0], [0, 1, 2]], step
        log.clear()
        found.clear()
    queue.close()


# -- who does it


def test_a_thread_does_what_is_released() -> None:
    log = Log()
    queue = Calls().queue(log.tasks(5), threaded=True)
    for end in (2, 4):
        queue.release(end)
        until(lambda end=end: log.read() == list(range(end)))  # type: ignore[misc]
        time.sleep(0.005)
        assert log.read() == list(range(end))
    queue.close()


def test_without_a_thread_nothing_is_done_before_the_end() -> None:
    log = Log()
    before = task_threads()
    queue = Calls().queue(log.tasks(5), threaded=False)
    queue.release(5)
    time.sleep(0.005)
    assert log.read() == []
    assert task_threads() == before
    queue.finish()
    assert log.read() == list(range(5))


def test_what_does_not_wake_the_thread_is_left() -> None:
    log = Log()
    queue = Calls().queue(log.tasks(3), threaded=True)
    queue.release(1)
    until(lambda: log.read() == [0])
    queue.release(2, wake=False)
    time.sleep(0.005)
    assert log.read() == [0]
    queue.finish()
    assert log.read() == [0, 1, 2]
    queue.close()


def test_the_program_takes_the_remaining_tasks_over() -> None:
    gate = Gate()
    doers: list[int] = []
    note = PythonTask(lambda: doers.append(threading.get_ident())).task
    queue = Calls().queue([note, gate.task, note], threaded=True)
    queue.release(2)
    until(lambda: len(doers) == 1)
    gate.open(after=0.1)
    queue.finish()
    assert doers[1] == threading.get_ident() != doers[0]
    assert gate.asked > 1  # it looks around while it waits
    queue.close()


def test_a_thread_that_is_at_a_long_task_is_waited_for() -> None:
    log = Log()
    queue = Calls().queue([PythonTask(lambda: time.sleep(0.1)).task, *log.tasks(2)], threaded=True)
    for _ in range(3):
        queue.release(1)
        time.sleep(0.005)
        queue.finish()
        assert log.read() == [0, 1]
        log.clear()
    queue.close()


def test_a_program_that_waits_gets_the_tasks_at_once() -> None:
    """Not when it looks around the next time."""
    queue = Calls().queue([PythonTask(lambda: time.sleep(0.003)).task, *Log().tasks(2)], threaded=True)
    times = []
    for _ in range(20):
        queue.release(1)
        time.sleep(0.001)
        start = time.monotonic()
        queue.finish()
        times.append(time.monotonic() - start)
    assert median(times) < 0.6e-9 * PATIENT
    queue.close()


def test_python_takes_turns() -> None:
    """Short ones in the thread, and as long as may be where the program has nothing else to do."""
    log, patience, checks = Log(), list[int](), list[bool]()

    def advance(patient: int) -> bool:
        patience.append(patient)
        return len(patience) % 5 == 0

    turns = PythonTurns(advance, lambda: checks.append(True)).task
    queue = Calls().queue([log.task(0), turns, log.task(1)], threaded=True)
    queue.release(3)
    until(lambda: log.read() == [0, 1])
    queue.finish()
    assert patience == [0] * 5
    assert not checks
    queue.finish()
    assert log.read() == [0, 1, 0, 1]
    assert patience[5:] == [PATIENT] * 5
    assert len(checks) == 4
    queue.close()


def test_an_exception_of_a_turn_arrives_in_finish() -> None:
    turns = PythonTurns(lambda patience: bool(1 / 0), lambda: None)
    with pytest.raises(ZeroDivisionError):
        Calls().queue([turns.task], threaded=False).finish()


# -- errors


@threads
@pytest.mark.parametrize("released", [0, 2, 4])
def test_an_exception_arrives_in_finish(released: int, threaded: bool) -> None:
    error, log, calls = ZeroDivisionError("mine"), Log(), Calls()

    def fail() -> None:
        raise error

    queue = calls.queue([log.task(0), PythonTask(fail).task, *log.tasks(2)], threaded)
    queue.release(released)
    time.sleep(0.01)
    with pytest.raises(ZeroDivisionError) as caught:
        queue.finish()
    assert caught.value is error
    assert log.read() == [0]
    assert calls.given_up == [error]
    for use in (queue.finish, lambda: queue.release(1)):
        with pytest.raises(RuntimeError, match="ZeroDivisionError: mine"):
            use()
    assert log.read() == [0]
    assert calls.given_up == [error]
    queue.close()


class Failing:
    """Says what a task's result means."""

    def fail(self, result: int) -> None:
        raise OSError(f"result {result}")


@threads
def test_a_result_is_explained_by_its_task(threaded: bool) -> None:
    log, calls = Log(), Calls()
    queue = calls.queue([*log.tasks(2), Task(_fail.address, 0, Failing()), log.task(9)], threaded)
    queue.release(4)
    with pytest.raises(OSError, match=f"result {ERROR}"):
        queue.finish()
    assert log.read() == [0, 1]
    assert [str(error) for error in calls.given_up] == [f"result {ERROR}"]
    queue.close()


@threads
def test_a_check_may_end_the_wait(threaded: bool) -> None:
    gate, calls = Gate(), Calls()
    gate.error = OSError("the other one has ended")
    queue = calls.queue([gate.task], threaded)
    queue.release(1)
    with pytest.raises(OSError, match="the other one"):
        queue.finish()
    assert calls.given_up == [gate.error]
    queue.close()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """As in a terminal: a shell that starts the tests in the background has switched it off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@threads
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_wait(threaded: bool) -> None:
    gate, calls = Gate(), Calls()
    queue = calls.queue([gate.task], threaded)
    queue.release(1)
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        queue.finish()
    assert time.monotonic() - start < 0.1 + PROMPT
    assert [type(error) for error in calls.given_up] == [KeyboardInterrupt]
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        queue.finish()
    queue.close()


# -- the end


def test_closing_ends_the_thread() -> None:
    before = task_threads()
    queue = Calls().queue(Log().tasks(3), threaded=True)
    queue.release(1)
    assert task_threads() == before + 1
    queue.close()
    assert task_threads() == before
    queue.close()
    for use in (queue.finish, lambda: queue.release(1)):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_closing_while_a_task_waits_for_others() -> None:
    before, gate = task_threads(), Gate()
    queue = Calls().queue([gate.task], threaded=True)
    queue.release(1)
    time.sleep(0.01)
    queue.close()
    assert task_threads() == before


@pytest.mark.parametrize("pending", [True, False])
def test_a_dropped_queue_ends_its_thread(pending: bool) -> None:
    before, log = task_threads(), Log()
    for _ in range(20):
        tasks = [*log.tasks(3), *([Gate().task] if pending else [])]
        queue = Calls().queue(tasks, threaded=True)
        queue.release(len(tasks))
        del queue
    until(lambda: task_threads() == before)


def test_an_abandoned_step_is_not_gone_on_with() -> None:
    log = Log()
    queue = Calls().queue([PythonTask(lambda: time.sleep(0.05)).task, *log.tasks(3)], threaded=True)
    queue.release(4)
    time.sleep(0.01)
    queue.close()
    assert log.read() == []


@pytest.mark.parametrize("used", [True, False])
def test_memory_is_given_back(used: bool) -> None:
    class Memory:
        pass

    memory: Any = Memory()
    reference, log = weakref.ref(memory), Log()
    queue = TaskQueue([*log.tasks(2)], memory, True, Calls().given_up.append)
    if used:
        queue.release(1)
        queue.finish()
    del memory
    assert reference() is not None
    del queue
    gc.collect()
    until(lambda: reference() is None)


def test_memory_of_a_step_that_is_dropped_half_way_stays() -> None:
    """Other ranks, or MPI, may still write into it; that of a complete step is given back."""
    for released, stays in ((0, False), (1, True)):
        memory = np.zeros(1)
        gone = weakref.ref(memory)
        gate = Gate()
        queue = TaskQueue([gate.task], memory, True, Calls().given_up.append)
        if released:
            queue.release(1)
        del queue, memory
        gc.collect()
        assert (gone() is not None) is stays
        gate.open()
