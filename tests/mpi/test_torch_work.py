"""Work of a process group: in which order it is done, by whom, and what becomes of its errors."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from mpicoll.faults import DeadlineError
from mpicoll.torch import cuda
from mpicoll.torch.work import Line, Work

BRIEF = timedelta(milliseconds=30)
LIMIT = 10.0  # seconds


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line("test")
    yield made
    made.end()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.0005)


def added(line: Line, run: Callable[[], None], result: Any = ()) -> Work:
    work = Work(line, run, result)
    line.add(work)
    return work


def test_order_is_that_of_asking(line: Line) -> None:
    done: list[int] = []
    works = [added(line, lambda number=number: done.append(number)) for number in range(20)]  # type: ignore[misc]
    works[10].wait()
    assert done[:11] == list(range(11))
    line.do(lambda: done.append(20))
    assert done == list(range(21))
    assert all(work.is_completed() and work.is_success() for work in works)


def test_a_thread_does_what_nobody_waits_for(line: Line) -> None:
    by: list[str] = []
    work = added(line, lambda: by.append(threading.current_thread().name))
    until(work.is_completed)
    assert by == ["mpicoll-test"]


def test_who_waits_does_it_himself_if_nobody_is_at_it(line: Line) -> None:
    by: list[int] = []
    works = [Work(line, lambda: by.append(threading.get_ident()), ()) for _ in range(3)]
    line._waiting.extend(works)  # and nobody is woken
    works[2].wait()
    assert by == 3 * [threading.get_ident()]


def test_what_is_left_waits_for_whoever_comes(line: Line) -> None:
    by: list[str] = []
    works = [Work(line, lambda: by.append(threading.current_thread().name), ()) for _ in range(3)]
    for work in works[:2]:
        line.leave(work)
    line.wake()  # late, for something that is done by now
    time.sleep(0.05)
    assert by == []
    line.finish()
    assert by == ["MainThread", "MainThread"]
    line.leave(works[2])
    until(works[2].is_completed)  # nobody comes
    assert by[2] == "mpicoll-test"


def test_several_threads_wait(line: Line) -> None:
    done: list[int] = []

    def slow() -> None:
        time.sleep(0.001)
        done.append(len(done))

    works = [added(line, slow) for _ in range(40)]
    waiting = [threading.Thread(target=work.wait) for work in works[::-1]]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert done == list(range(40))


def test_an_error_is_whoever_waits_s(line: Line) -> None:
    def fail() -> None:
        raise ZeroDivisionError("of the work")

    failing, next_one = added(line, fail), added(line, lambda: None)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="of the work"):
            failing.wait()
    assert failing.is_completed()
    assert not failing.is_success()
    assert isinstance(failing.exception(), ZeroDivisionError)
    assert next_one.wait()
    with pytest.raises(ZeroDivisionError):
        line.do(fail)


def test_an_interrupt_ends_the_work_and_is_raised(line: Line) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    work = Work(line, interrupt, ())
    line._waiting.append(work)
    with pytest.raises(KeyboardInterrupt):
        line.reach(work)
    assert work.is_completed()
    with pytest.raises(KeyboardInterrupt):
        work.wait()


def test_a_time_limit(line: Line) -> None:
    free = threading.Event()

    def wait() -> None:
        free.wait(LIMIT)

    work = added(line, wait)
    with pytest.raises(DeadlineError, match=r"not done after 0\.03 s"):
        work.wait(BRIEF)
    free.set()
    assert work.wait(timedelta(seconds=LIMIT))


def test_futures(line: Line) -> None:
    values = torch.arange(3.0)
    before, after = added(line, lambda: None, [values]), added(line, lambda: None, [values])
    future = before.get_future()
    assert future is before.get_future()
    assert future.wait() == [values]
    after.wait()
    assert after.get_future().done()
    assert after.get_future().then(lambda f: f.value()[0].sum().item()).wait() == 3
    assert after.result() == [values]


def test_an_error_of_a_future(line: Line) -> None:
    def fail() -> None:
        raise ZeroDivisionError("of the work")

    for asked_first in (True, False):
        work = Work(line, fail, ())
        future = work.get_future() if asked_first else None
        line.add(work)
        until(work.is_completed)
        with pytest.raises(RuntimeError, match="of the work"):
            (future or work.get_future()).wait()


def test_memory_is_let_go_when_the_work_is_done(line: Line) -> None:
    class Memory:
        gone = False

        def use(self) -> None:
            pass

        def __del__(self) -> None:
            Memory.gone = True

    work = added(line, Memory().use)
    work.wait()
    until(lambda: Memory.gone)


def test_a_line_that_has_ended_has_no_thread() -> None:
    own = Line("ended")
    added(own, lambda: None).wait()
    own.end()
    until(lambda: all(thread.name != "mpicoll-ended" for thread in threading.enumerate()))


# -- on GPUs, whose streams are lists of what was put on them


class FakeStream:
    def __init__(self, device: Any = None) -> None:
        self.put: list[tuple[str, Any]] = []

    def wait_event(self, event: Any) -> None:
        self.put.append(("wait", event))


class FakeEvent:
    def record(self, stream: FakeStream) -> None:
        stream.put.append(("record", self))


class FakeTensor:
    device = "gpu"

    def __init__(self) -> None:
        self.used_on: list[FakeStream] = []

    def record_stream(self, stream: FakeStream) -> None:
        self.used_on.append(stream)


class FakeCuda:
    """What is there of ``torch.cuda``."""

    Event, Stream = FakeEvent, FakeStream

    def __init__(self) -> None:
        self.current = FakeStream()

    def current_stream(self, device: Any) -> FakeStream:
        return self.current

    def stream(self, stream: FakeStream) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self, "current", stream)
            yield


def test_streams_are_ordered_by_events(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(FakeCuda, "stream", contextmanager(FakeCuda.stream))
    monkeypatch.setattr(torch, "cuda", fake)
    cuda._side_stream.cache_clear()
    tensor, program = FakeTensor(), fake.current
    ordered = cuda.Ordered(lambda: fake.current.put.append(("work", None)), [tensor])
    work = Work(line, lambda: None, (), ordered)
    line.add(work)
    work.wait()
    (ready, done), side = [event for _, event in program.put], tensor.used_on[0]
    assert [what for what, _ in program.put] == ["record", "wait"], "what is put on the program's stream"
    assert side.put == [("wait", ready), ("work", None), ("record", done)]
    cuda._side_stream.cache_clear()


def test_what_is_broken_off_keeps_its_memory(line: Line) -> None:
    """MPI may still write into it."""

    def fail(tensor: torch.Tensor) -> None:
        raise DeadlineError("no progress")

    def refuse(tensor: torch.Tensor) -> None:
        raise ValueError("a wrong argument")

    def tried(run: Callable[[torch.Tensor], None], by: str) -> weakref.ref[torch.Tensor]:
        tensor = torch.zeros(3)
        with suppress(DeadlineError, ValueError):
            if by == "do":
                line.do(run, tensor)
            else:
                added(line, partial(run, tensor)).wait()
        return weakref.ref(tensor)

    for by in ("do", "add"):
        assert tried(fail, by)() is not None
        kept = tried(refuse, by)
        # An error refers to where it was raised, and that to the work, whose error it is.
        until(lambda kept=kept: gc.collect() >= 0 and kept() is None)  # type: ignore[misc]
