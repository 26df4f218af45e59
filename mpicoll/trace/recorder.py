"""The recorder: methods of its own before those of one communicator, for as long as it is attached.

    comm.Allreduce ----> the communicator's own, compiled or not            not recorded
    comm.Allreduce ----> t0; the same; t1; append (name, t0, t1, ...)       recorded: about a microsecond more

The recorded methods are attributes of that one object, so nothing asks anywhere whether there is a recorder.
Nonblocking and persistent calls are recorded twice: what the program spends on starting and waiting, and,
as a ``collective``, the time from start to completion, in which the program does something else.

A communicator's calls are counted, the same on all ranks: ``world:17`` is call 17 of the first communicator,
``world.2@4:0`` the first of the one that came of its second `Split` or `Dup`, the one whose first rank is
the world's rank 4; ``world/6:3`` is the fourth time of what was set up as call 6. Calls that raise something
do not count.

What is promised, when the block of `record` ends:

- without an exception: one file, of all ranks, written whole or not at all;
- with one, or if another rank has gone: every rank that gets there writes its own events, to
  ``trace.rank3.json`` beside ``trace.json``. `mpicoll trace trace.rank*.json` puts them together. A rank that
  is killed leaves nothing.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial, wraps
from itertools import count
from pathlib import Path
from platform import node
from threading import get_ident
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from mpi4py import MPI

from mpicoll.buffers import parse, parse_blocks
from mpicoll.calls import Average, operation_name
from mpicoll.communicator import Communicator
from mpicoll.faults import DeadlineError, MismatchError, RankFailedError
from mpicoll.files import why_unwritable
from mpicoll.requests import PersistentCall, Request
from mpicoll.trace.chrome import (
    COLLECTIVE,
    COMPUTE,
    NANOSECONDS,
    PROGRAM,
    WAIT,
    Part,
    RankFacts,
    Track,
    UnwritableError,
    lanes,
    process_lines,
    write,
)
from mpicoll.trace.clocks import Clock, Correction, Meeting, meet

if TYPE_CHECKING:
    from mpicoll.kernels.tasks import Task
    from mpicoll.requests import Series
    from mpicoll.trace.stamps import Stamps

LIMIT = 100_000  # events of a rank; 25 MB of memory, 20 MB in the file
IN_FLIGHT = 0  # in place of a thread: collectives beside the program; no thread has this number

# Methods with buffers, and the collective that their algorithm is one of.
BUFFERED = {
    "Allreduce": "allreduce",
    "Reduce": "reduce",
    "Reduce_scatter_block": "reduce_scatter",
    "Reduce_scatter": "reduce_scatter",
    "Bcast": "broadcast",
    "Gather": "gather",
    "Gatherv": "gather",
    "Scatter": "scatter",
    "Scatterv": "scatter",
    "Allgather": "allgather",
    "Allgatherv": "allgather",
    "Alltoall": "alltoall",
    "Alltoallv": "alltoall",
    "Barrier": "barrier",
}
ONLY = {"gather": ("direct",), "scatter": ("direct",), "alltoall": ("pairwise",)}  # with uneven blocks
REDUCTIONS = ("allreduce", "reduce", "reduce_scatter")
OBJECTS = ("bcast", "gather", "scatter", "allgather", "alltoall", "reduce", "allreduce", "Allreduce_many")

Method = Callable[..., Any]
_ABSENT: Any = object()


class Details(NamedTuple):
    """Of a collective; ``nbytes`` of the largest buffer that the rank has given it."""

    nbytes: int = 0
    dtype: str = ""
    op: str = ""
    algorithm: str = ""


NO_DETAILS = Details()


class Happened(NamedTuple):
    """An event; times in nanoseconds of this rank's clock.

    A collective is call ``number`` of its ``series``, in which ``size`` ranks take part; -1 if it is none.
    """

    name: str
    category: str
    begin: int
    end: int
    thread: int
    series: str = ""
    number: int = -1
    size: int = 0
    details: Details = NO_DETAILS
    error: str = ""


class Recorder:
    """Records what happens on this rank, ``limit`` events at most, by ``clock``, in nanoseconds.

    Making one is collective over ``comm``, with which clocks are compared. See `record`, which does it all.
    """

    def __init__(self, comm: Communicator, limit: int = LIMIT, clock: Clock = perf_counter_ns) -> None:
        self._comm, self._limit, self._clock = comm, limit, clock
        self._events: list[tuple[Any, ...]] = []  # arguments of `Happened`, which takes longer to make
        self.dropped = 0
        self.saved = False
        self._replaced: list[tuple[weakref.ref[Any], str, Any]] = []
        self._communicators: dict[str, list[int]] = {}
        self._streams: list[tuple[str, int, Stamps]] = []  # of gradients: series, ranks that take part
        self._program = get_ident()
        # Apart from the user's messages and ours, and without whatever is recorded.
        self._private = MPI.Intracomm.Dup(MPI.Intracomm(comm))
        self._origin: int = self._private.bcast(clock())
        self._first = meet(self._private, clock)

    # -- what is recorded

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the time spent in this block, as something that the program computes."""
        begin = self._clock()
        try:
            yield
        finally:
            self.add(name, COMPUTE, begin, self._clock())

    def add(
        self, name: str, category: str, begin: int, end: int, thread: int | None = None, *more: Any
    ) -> None:
        """Keep an event, or count it if there is no room; the thread is this one if not given."""
        if len(self._events) < self._limit:
            where = get_ident() if thread is None else thread
            self._events.append((name, category, begin, end, where, *more))
        else:
            self.dropped += 1

    def watch(self, thing: Any, method: str, name: str, category: str = COMPUTE) -> None:
        """Record every call of ``thing.method``, of this one object, under this name."""

        def recorded(original: Method) -> Method:
            clock, events, limit = self._clock, self._events, self._limit

            @wraps(original)
            def call(*args: Any, **kwargs: Any) -> Any:
                begin = clock()
                try:
                    return original(*args, **kwargs)
                finally:
                    end = clock()
                    if len(events) < limit:  # as `add`, in half the time
                        events.append((name, category, begin, end, get_ident()))
                    else:
                        self.dropped += 1

            return call

        self.replace(thing, method, recorded)

    def watch_block(self, thing: Any, method: str, name: str, category: str) -> None:
        """As `watch`, for a method that returns a context manager: the time in its block is recorded."""

        def recorded(original: Method) -> Method:
            def block(*args: Any, **kwargs: Any) -> _Block:
                return _Block(self, name, category, original(*args, **kwargs))

            return block

        self.replace(thing, method, recorded)

    def replace(self, thing: Any, name: str, make: Callable[[Method], Method]) -> None:
        """Put ``make(method)`` before a method of this one object, once, until `detach`."""
        if any(ref() is thing and name == replaced for ref, replaced, _ in self._replaced):
            return
        before = vars(thing).get(name, _ABSENT)
        setattr(thing, name, make(getattr(thing, name)))
        self._replaced.append((weakref.ref(thing), name, before))

    # -- communicators

    def attach(self, comm: Communicator, name: str = "world") -> None:
        """Record the collectives of ``comm`` and of communicators that are made from it."""
        ours = _Recorded(self, comm, name)
        self._communicators[name] = ours.members = self._members(comm)
        for method in BUFFERED:
            self.replace(comm, method, partial(ours.blocking, method))
            self.replace(comm, f"I{method.lower()}", partial(ours.nonblocking, method))
            self.replace(comm, f"{method}_init", partial(ours.persistent, method))
        for method in OBJECTS:
            self.replace(comm, method, partial(ours.blocking, method))
        self.replace(comm, "_adopt", ours.adopting)
        vars(comm)[_RECORDED] = ours

    def _members(self, comm: MPI.Intracomm) -> list[int]:
        """The ranks of ``comm``, as they are numbered in the first communicator."""
        own, first = comm.Get_group(), self._private.Get_group()
        ranks = MPI.Group.Translate_ranks(own, list(range(own.size)), first)
        own.Free()
        first.Free()
        return list(ranks)

    def add_stream(self, series: str, size: int) -> Stamps:
        """Room for what compiled code does by itself."""
        from mpicoll.trace.stamps import Stamps

        self._streams.append((series, size, Stamps(self._limit)))
        return self._streams[-1][2]

    def detach(self) -> None:
        """Give every object its own methods back. What is under way is not recorded to its end."""
        for ref, name, before in reversed(self._replaced):
            attributes = vars(ref()) if ref() is not None else {}
            if name not in attributes:
                continue  # gone with what it was before: a persistent call that has been freed
            if before is _ABSENT:
                del attributes[name]
            else:
                attributes[name] = before
            attributes.pop(_RECORDED, None)
        self._replaced.clear()

    # -- the end

    def save(self, path: Path) -> None:
        """Write all ranks' events; collective. Raises, on all ranks, `UnwritableError`.

        If another rank does not come, this one writes its own events, and raises what collectives raise.
        """
        self.saved = True
        try:
            self._comm.Barrier()  # which does not wait for ever
            last = meet(self._private, self._clock)
            parts = self._comm.gather(self.part(last))
            problem = self._comm.bcast(_try_to_write(path, parts) if parts is not None else "")
        except (RankFailedError, DeadlineError, MismatchError):
            self.save_alone(path)
            raise
        self._private.Free()
        if problem:
            raise UnwritableError(f"{path}: expected a file that can be written, but: {problem}")

    def save_alone(self, path: Path) -> None:
        """Write this rank's events beside ``path``; if that is impossible, say so on standard error."""
        self.saved = True
        part = self.part()
        own = path.with_name(f"{path.stem}.rank{part.facts.rank}{path.suffix}")
        if problem := _try_to_write(own, [part]):
            print(f"note: {own}: the events of this rank could not be written: {problem}", file=sys.stderr)

    def part(self, last: Meeting | None = None) -> Part:
        """This rank's events, by rank 0's clock, whose ``last`` meeting with this one may be missing."""
        corrected = Correction(self._first, last)
        rank = self._private.Get_rank()
        events = [*(Happened(*each) for each in self._events), *self._stamped()]
        lines = process_lines(rank, node())
        for number, (name, own) in enumerate(_tracks(events, self._program)):
            track = Track(rank, number, name)
            for event in own:
                begin, end = (corrected(at) - self._origin for at in (event.begin, event.end))
                track.add(event.name, event.category, begin, end, _args(event))
            lines += track.lines
        facts = RankFacts(
            rank,
            node(),
            corrected.uncertainty / NANOSECONDS,
            corrected.first.offset / NANOSECONDS,
            corrected.drift,
            last is not None,
            self.dropped + sum(stamps.dropped for _, _, stamps in self._streams),
        )
        return Part(facts, self._origin, self._private.Get_size(), self._communicators, lines)

    def _stamped(self) -> Iterator[Happened]:
        """What compiled code has done; each stream on a track of its own, numbered below all threads."""
        shift = 0 if self._clock is perf_counter_ns else self._clock() - perf_counter_ns()
        for stream, (series, size, stamps) in enumerate(self._streams, start=1):
            numbers = count()
            for label, begin, end in stamps.events():
                number = next(numbers) if label.category == COLLECTIVE else -1
                details = Details(label.nbytes, label.dtype, label.op, label.algorithm)
                times = begin + shift, end + shift
                yield Happened(label.name, label.category, *times, -stream, series, number, size, details)


class _Block:
    """A context manager, with a record of the time in its block; a generator would take twice as long."""

    __slots__ = ("_begin", "_category", "_inner", "_name", "_recorder")

    def __init__(
        self, recorder: Recorder, name: str, category: str, inner: AbstractContextManager[Any]
    ) -> None:
        self._recorder, self._name, self._category, self._inner = recorder, name, category, inner

    def __enter__(self) -> Any:
        self._begin = self._recorder._clock()
        return self._inner.__enter__()

    def __exit__(self, *given: Any) -> bool | None:
        try:
            return self._inner.__exit__(*given)
        finally:
            self._recorder.add(self._name, self._category, self._begin, self._recorder._clock())


def _try_to_write(path: Path, parts: list[Part]) -> str:
    """What went wrong; empty if nothing did."""
    try:
        write(path, parts)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _tracks(events: list[Happened], program: int) -> Iterator[tuple[str, list[Happened]]]:
    """Names of threads, the program first, each with its events in the order of their begins."""
    threads: dict[int, list[Happened]] = defaultdict(list)
    threads[program] = []
    for event in sorted(events, key=lambda event: (event.begin, -event.end)):
        threads[event.thread].append(event)
    in_flight = threads.pop(IN_FLIGHT, [])
    running = {thread.ident: thread.name for thread in threading.enumerate()}
    for thread, own in threads.items():
        if thread == program:
            yield PROGRAM, own
        elif thread < 0:
            yield f"gradients {-thread}", own
        else:
            yield running.get(thread, "thread"), own
    beside: dict[int, list[Happened]] = defaultdict(list)
    for lane, event in zip(lanes((e.begin, e.end) for e in in_flight), in_flight, strict=True):
        beside[lane].append(event)
    for lane, own in sorted(beside.items()):
        yield f"in flight {lane + 1}", own


def _args(event: Happened) -> dict[str, Any]:
    """What else there is to say, without what is empty."""
    details = event.details
    named: Mapping[str, Any] = {
        "match": f"{event.series}:{event.number}" if event.number >= 0 else "",
        "ranks": event.size if event.number >= 0 else 0,
        "bytes": details.nbytes,
        "dtype": details.dtype,
        "op": details.op,
        "algorithm": details.algorithm,
        "error": event.error,
    }
    return {name: value for name, value in named.items() if value}


_RECORDED = "_recorded"  # the attribute of a communicator that says who records it


def recorded(comm: MPI.Intracomm) -> _Recorded | None:
    """Who records this communicator."""
    ours: _Recorded | None = getattr(comm, _RECORDED, None)
    return ours


class _Recorded:
    """One communicator's methods, each with what records it."""

    members: list[int]

    def __init__(self, recorder: Recorder, comm: Communicator, name: str) -> None:
        self._recorder, self._name = recorder, name
        self._size = comm.size
        self._makers = comm._maker, comm._messages
        self._numbers, self._children = count(), count(1)
        self._known: dict[Any, Details] = {}
        self._ops: dict[int, Any] = {}  # whose ids are known, so that nothing else gets these

    def blocking(self, name: str, original: Method) -> Method:
        """A method that returns when the collective is complete."""
        recorder, series, numbers, size = self._recorder, self._name, self._numbers, self._size
        clock, events, limit = recorder._clock, recorder._events, recorder._limit
        details = partial(self._details, name, False) if name in BUFFERED else self._of_objects

        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = clock()
            try:
                result = original(*args, **kwargs)
            except BaseException as error:
                why = type(error).__name__
                recorder.add(name, COLLECTIVE, begin, clock(), None, "", -1, size, NO_DETAILS, why)
                raise
            end, number = clock(), next(numbers)
            if len(events) < limit:  # as `Recorder.add`, too
                more = series, number, size, details(args, kwargs)
                events.append((name, COLLECTIVE, begin, end, get_ident(), *more))
            else:
                recorder.dropped += 1
            return result

        return call

    def nonblocking(self, name: str, original: Method) -> Method:
        """A method that returns a request."""
        recorder, shown = self._recorder, f"I{name.lower()}"

        @wraps(original)
        def start(*args: Any, **kwargs: Any) -> MPI.Request:
            begin = recorder._clock()
            request: MPI.Request = original(*args, **kwargs)
            end = recorder._clock()
            details = self._details(name, True, args, kwargs)
            more = self._name, next(self._numbers), self._size, details
            if isinstance(request, Request):
                recorder.add(f"{shown}: start", WAIT, begin, end)
                _follow_request(recorder, request, shown, begin, more)
            else:  # MPI's own, of which nobody hears when it is complete
                recorder.add(shown, COLLECTIVE, begin, end, None, *more)
            return request

        return start

    def persistent(self, name: str, original: Method) -> Method:
        """A method that returns a persistent call."""
        recorder = self._recorder

        @wraps(original)
        def init(*args: Any, **kwargs: Any) -> PersistentCall:
            begin = recorder._clock()
            made: PersistentCall = original(*args, **kwargs)
            recorder.add(f"{name}_init", WAIT, begin, recorder._clock())
            series = f"{self._name}/{next(self._numbers)}"
            details = self._details(name, False, args, kwargs)
            _follow_persistent(recorder, made, name, series, self._size, details)
            return made

        return init

    def adopting(self, original: Method) -> Method:
        """What makes communicators from this one."""

        @wraps(original)
        def adopt(comm: MPI.Comm) -> Any:
            child, number = original(comm), next(self._children)
            if isinstance(child, Communicator) and child != MPI.COMM_NULL:
                first = self._recorder._members(child)[0]
                self._recorder.attach(child, f"{self._name}.{number}@{first}")
            return child

        return adopt

    def stamped(self) -> Callable[[list[Task], Series], list[Task]]:
        """What puts stamps between the tasks of a list that is done again and again."""
        return self._recorder.add_stream(f"{self._name}/{next(self._numbers)}", self._size).between

    def watch(self, thing: Any, method: str, name: str) -> None:
        """Record that the program waits there."""
        self._recorder.watch(thing, method, name, WAIT)

    def _of_objects(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Details:
        """What is pickled has a size that nobody asks for twice; of lists of arrays it is known."""
        arrays = args[0] if args and isinstance(args[0], (list, tuple)) else ()
        return Details(sum(array.nbytes for array in arrays if isinstance(array, np.ndarray)))

    def _details(
        self, method: str, in_messages: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Details:
        """Of a call with these arguments, that has not raised anything."""
        key: list[Any] = [method, in_messages]
        for each in (*args, *kwargs, *kwargs.values()) if kwargs else args:
            kind = type(each)
            if kind is np.ndarray:
                key += each.nbytes, each.dtype
            elif kind in _LASTING:
                key.append(id(each))
            elif kind is int or kind is str:
                key.append(each)
            else:
                return self._looked_up(method, in_messages, args, kwargs)
        known = tuple(key)
        if known not in self._known:
            self._known[known] = self._looked_up(method, in_messages, args, kwargs)
        return self._known[known]

    def _looked_up(
        self, method: str, in_messages: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Details:
        nbytes, dtype = 0, ""
        given = (*args, *kwargs.values())
        for each in given:
            size, kind = _look(each, method, self._size)
            if size > nbytes or not dtype:
                nbytes, dtype = max(size, nbytes), kind or dtype
        collective, operation = BUFFERED[method], ""
        if collective in REDUCTIONS:
            op = next((each for each in given if isinstance(each, (MPI.Op, Average))), MPI.SUM)
            self._ops[id(op)] = op
            operation = operation_name(op) or ""
            if not operation:
                return Details(nbytes, dtype, "a user's", "MPI's own")
        only = ONLY.get(collective) if method.endswith("v") else None
        maker = self._makers[in_messages]
        return Details(
            nbytes, dtype, operation, maker.choose(collective, kwargs.get("algorithm"), nbytes, only)
        )


_LASTING = (MPI.Op, Average, type(MPI.IN_PLACE), type(None))  # their ids say which they are


def _look(buffer: Any, method: str, nranks: int) -> tuple[int, str]:
    """Bytes and dtype of an argument; nothing of one that is no buffer."""
    if isinstance(buffer, np.ndarray):
        return buffer.nbytes, str(buffer.dtype)
    if isinstance(buffer, (list, tuple)):
        with suppress(TypeError, ValueError):
            if method.endswith("v"):
                blocks = parse_blocks(buffer, "", nranks)
                return sum(blocks.counts) * blocks.message.size, blocks.message.type_name
            message = parse(buffer, "")
            return message.count * message.size, message.type_name
        return 0, ""
    nbytes = getattr(buffer, "nbytes", 0)  # PyTorch, CuPy, memoryview
    return (nbytes, str(getattr(buffer, "dtype", "")).removeprefix("torch.")) if nbytes else (0, "")


def _follow_request(
    recorder: Recorder, request: Request, name: str, begin: int, more: tuple[str, int, int, Details]
) -> None:
    """Record when the request is complete, and how long the program waits for it."""
    begun = [begin]  # until somebody has recorded the end: this thread, or the one of progress
    finish, wait, clock, add = request._finish, request.Wait, recorder._clock, recorder.add

    def done() -> None:
        with suppress(IndexError):
            add(name, COLLECTIVE, begun.pop(), clock(), IN_FLIGHT, *more)

    def finish_and_record() -> None:
        finish()
        done()

    def wait_and_record(status: MPI.Status | None = None) -> Any:
        since = clock()
        try:
            return wait(status)
        finally:
            add(f"{name}: wait", WAIT, since, clock())
            vars(request).pop("Wait", None)  # or it would refer to itself

    vars(request).update(_finish=finish_and_record, Wait=wait_and_record)
    if request._complete:
        done()


def _follow_persistent(
    recorder: Recorder, made: PersistentCall, name: str, series: str, size: int, details: Details
) -> None:
    """Record each start, wait, and what lies between."""
    numbers, clock, add = count(), recorder._clock, recorder.add
    begun: list[int] = []

    def done() -> None:
        if begun and not made._active:
            add(name, COLLECTIVE, begun.pop(), clock(), IN_FLIGHT, series, next(numbers), size, details)

    def starting(original: Method) -> Method:
        def start() -> None:
            since = clock()
            original()
            begun.append(since)
            add(f"{name}: start", WAIT, since, clock())
            done()

        return start

    def waiting(original: Method) -> Method:
        def wait() -> bool:
            since = clock()
            original()
            done()
            add(f"{name}: wait", WAIT, since, clock())
            return True

        return wait

    def testing(original: Method) -> Method:
        def test() -> bool:  # a program may test very often
            complete: bool = original()
            done()
            return complete

        return test

    for method, make in (("Start", starting), ("Wait", waiting), ("Test", testing)):
        recorder.replace(made, method, make)


@contextmanager
def record(
    comm: Communicator,
    path: str | Path,
    limit: int = LIMIT,
    alike: tuple[type[BaseException], ...] = (),
    clock: Clock = perf_counter_ns,
) -> Iterator[Recorder]:
    """Record what all ranks of ``comm`` do in this block, and write it to ``path`` at its end. Collective.

    Recorded are the collectives of ``comm`` and of communicators made from it in the block, what a
    `GradientSync` made in it does, and each `Recorder.phase`; at most ``limit`` events of a rank, the first
    ones. ``alike``: exceptions that end the block on all ranks or on none: the file is whole then, too.
    ``clock`` gives nanoseconds.

    Raises TypeError for a communicator that is not an `mpicoll.Communicator`, ValueError for a limit below 1,
    `UnwritableError`, an OSError, on all ranks, if the file cannot be written. What becomes of the trace when
    something goes wrong in the block is said in the module.
    """
    if not isinstance(comm, Communicator):
        raise TypeError(f"comm: expected an mpicoll.Communicator, got {type(comm).__name__}")
    if limit < 1:
        raise ValueError(f"limit: expected at least 1 event, got {limit}")
    path = Path(path)
    if reason := comm.bcast(why_unwritable(path) if comm.rank == 0 else ""):
        raise UnwritableError(f"path: expected a file that can be written, got {path}: {reason}")
    recorder = Recorder(comm, limit, clock)
    recorder.attach(comm)
    try:
        yield recorder
    except BaseException as error:
        recorder.detach()
        if not recorder.saved:
            recorder.save(path) if isinstance(error, alike) else recorder.save_alone(path)
        raise
    recorder.detach()
    if not recorder.saved:
        recorder.save(path)
