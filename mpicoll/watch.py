"""The watch: what a rank that waits learns of the others, so that it never waits for ever.

A rank that has waited for a quarter of a second asks the others where they are (`mpicoll.service`), then
again after twice as long, and so on. Meanwhile it goes on waiting: asking is another thread's work. From the
answers it judges:

- a rank has broken a collective off, or found another that has: this rank stops, too, with the same error;
- a rank that is waited for has ended: `RankFailedError`;
- two ranks are, or were, in different calls of the same number: `MismatchError`, with all ranks' calls; and
  so if all ranks share memory, where nothing is on its way, and have waited for seconds in different calls;
- nothing of this, and no progress for ``MPICOLL_TIMEOUT`` seconds: `DeadlineError`, with where every rank is.

Whoever finds an error tells the others. The calls of a communicator that travel in messages are **numbered**;
the number and a fingerprint, of this call's arguments and of all calls before, make the tag of its messages.
So messages of different calls never meet: a mismatch is a wait, of this call or a later one, which ends as
above, and never a wrong result. (Fingerprints have 14 bits or more, so one mismatch in 16384 escapes.) Ranks
that share memory compare every call: see `transports.steps`.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import Any, Protocol
from zlib import crc32

import numpy as np
from mpi4py import MPI

from mpicoll.faults import FAULTS, DeadlineError, MismatchError, RankFailedError, outlives_ranks
from mpicoll.service import Contact, EndedError, Handler, NoAnswerError, Service, ask, service_of

FIRST_LOOK = 0.25  # seconds without progress; far longer than a healthy step's differences between ranks
LONGEST_PAUSE = 10.0  # seconds between looks
SETTLED = 1.0  # seconds without progress after which what an ended rank has sent must have come
DEADLOCKED = 3.0  # seconds without progress on any rank; far longer than a turn on a crowded core takes
REMEMBERED = 10.0  # seconds after an error for which a rank says where it has met it
FRESH = 1.0  # seconds for which a rank that has looked counts as waiting
STALLED = 60.0  # seconds without progress after which the job's standard error hears of it, once
DEFAULT_TIMEOUT = 1800.0  # seconds: longer than evaluating or saving takes while others wait
TELLING = 0.5  # seconds to spend on telling others
AT_ONCE = 16  # ranks to ask or tell at the same time
LONGEST_NAP = 0.001  # seconds between two tests of a request of MPI's own
RECENT = 64  # calls that are remembered
BESIDE = "mpicoll-"  # with which the names of threads begin that work for a program which goes on
NUMBER_BITS = 15  # of a tag: MPI promises tags up to 32767


# -- calls in words


@dataclass(frozen=True)
class What:
    """A call in words, its algorithm, and the fingerprint of both as the upper bits of a tag."""

    text: str
    algorithm: str
    mark: int

    @property
    def whole(self) -> str:
        """What must be the same on all ranks."""
        return f"{self.text}{BY}{self.algorithm}"


_METHODS = {"broadcast": "Bcast"}
BY = " by "
ON_GPU = "on a GPU"  # where data are, in the words of a call


def call_text(collective: str, *arguments: str) -> str:
    """A call as in a program: ``call_text("allreduce", "float32[100]", "SUM")``."""
    return f"{_METHODS.get(collective, collective.capitalize())}({', '.join(filter(None, arguments))})"


@cache
def mark_bits() -> int:
    """The bits of a tag that say which call it is of, besides its number; as many as MPI has."""
    bound: int = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)  # type: ignore[assignment]
    return max(0, (1 << (bound + 1).bit_length() - 1) - (1 << NUMBER_BITS))


@lru_cache(4096)
def what(
    collective: str,
    algorithm: str,
    dtype: np.dtype[Any] | None,
    shape: Any,
    operation: str,
    root: int | None,
    place: str = "",
) -> What:
    """The call with these arguments, which are the same on all ranks; ``shape`` is in bytes without dtype.

    ``place`` says where data are that are not in the host's memory.
    """
    size = "" if shape is None else f"{shape} bytes" if dtype is None else f"{dtype}[{shape}]"
    size = f"{size} {place}" if place else size
    text = call_text(collective, size, operation, "" if root is None else f"root={root}")
    return _marked(text, algorithm)


def _marked(text: str, algorithm: str) -> What:
    fingerprint = crc32(f"{text} {algorithm}".encode()) << NUMBER_BITS
    return What(text, algorithm, fingerprint & mark_bits())


@lru_cache(4096)
def preparing(call: What) -> What:
    """What makes a persistent call: ``Allreduce_init(float32[100], SUM)``."""
    return _marked(call.text.replace("(", "_init(", 1), call.algorithm)


# -- where this process is

_PACKAGE = Path(__file__).parent
# What of the package waits for others on behalf of a program, which may well be another part of the package.
_INTERNAL = tuple(f"{_PACKAGE / part}{os.sep}" for part in ("transports", "gpu", "torch", "trace"))
_LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}lib{os.sep}python", "<")


def _is_internal(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return str(Path(name).parent) == str(_PACKAGE) or name.startswith(_INTERNAL)


def _is_library(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    inside = name.startswith(f"{_PACKAGE}{os.sep}")
    return not inside and any(part in name for part in _LIBRARIES)


def line_of(thread: int | None = None) -> str:
    """Where the program is in a thread, by default the main one: ``"train.py:57 in step"``."""
    frame = sys._current_frames().get(thread or threading.main_thread().ident or 0)
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    outside = [frame for frame in frames if not _is_internal(frame)]
    own = [frame for frame in outside if not _is_library(frame)]
    if not own and frames and thread not in (None, threading.main_thread().ident):
        return line_of()  # a thread of a library, which works for the program
    own = own or outside or frames
    if not own:
        return "an unknown place"
    return f"{Path(own[0].f_code.co_filename).name}:{own[0].f_lineno} in {own[0].f_code.co_name}"


# -- what ranks say of themselves, and what follows from it


@dataclass(frozen=True)
class Failure:
    """Why no collective of a communicator is possible any more.

    ``kind`` is a key of `ERRORS`, ``ranks`` those that have ended, ``dead`` their hosts and process numbers.
    """

    kind: str
    text: str
    ranks: tuple[int, ...] = ()
    dead: tuple[tuple[str, int], ...] = ()

    def error(self) -> Exception:
        if self.kind == "failed":
            return RankFailedError(self.text, self.ranks)
        return ERRORS[self.kind](self.text)

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Failure:
        """From what another rank says of it."""
        dead = tuple((host, pid) for host, pid in said["dead"])
        return cls(said["kind"], said["text"], tuple(said["ranks"]), dead)


ERRORS: dict[str, type[Exception]] = {
    "failed": RankFailedError,
    "mismatch": MismatchError,
    "deadline": DeadlineError,
}


@dataclass(frozen=True)
class Doing:
    """What a rank says of itself, or is found to be: ``silence`` says why it says nothing.

    ``call`` is what it waits in, for ``waited`` seconds; ``inside``: in the communicator in question, and the
    program itself, not a thread beside it; ``recent`` its last calls in messages, with their algorithms, by
    number.
    """

    line: str = ""
    call: str = ""
    waited: float = 0.0
    recent: dict[int, str] = field(default_factory=dict)
    failure: Failure | None = None
    silence: str = ""
    ended: bool = False
    inside: bool = False

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Doing:
        recent = {int(number): text for number, text in said["recent"].items()}
        failure = said["failure"] and Failure.of(said["failure"])
        return cls(said["line"], said["call"], said["waited"], recent, failure, inside=said["inside"])

    def __str__(self) -> str:
        if self.silence:
            return self.silence
        return f"in {self.call} at {self.line}" if self.call else f"in no collective, at {self.line}"


def numbers(ranks: Sequence[int]) -> str:
    """Ascending ranks in words: ``"rank 3"``, ``"ranks 0-2, 5"``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join('-'.join(map(str, run)) for run in runs)}"


def grouped(places: Mapping[int, str]) -> str:
    """Where ranks are, those at the same place together: the fewest first, for they are the odd ones."""
    groups: dict[str, list[int]] = {}
    for rank, place in sorted(places.items()):
        groups.setdefault(place, []).append(rank)
    ordered = sorted(groups.items(), key=lambda group: len(group[1]))
    return "; ".join(f"{numbers(ranks)} {place}" for place, ranks in ordered)


def judge(doings: Sequence[Doing], own: int, waits_for: Collection[int], settled: bool) -> Failure | None:
    """What is wrong, as rank ``own`` sees it, ``doings`` being all ranks'; None if it had better wait on.

    ``settled``: whether all that ended ranks have sent must have come by now.
    """
    for doing in doings:
        if doing.failure is not None:
            return doing.failure
    gone = tuple(rank for rank in waits_for if doings[rank].ended) if settled else ()
    if gone:
        return Failure("failed", "; ".join(f"rank {rank}: {doings[rank].silence}" for rank in gone), gone)
    return _mismatch(doings, own)


def _mismatch(doings: Sequence[Doing], own: int) -> Failure | None:
    """Whether any rank was in another call than this one, both in their calls of the same number."""
    ours = doings[own].recent
    for number in sorted(ours):
        texts = {rank: doing.recent[number] for rank, doing in enumerate(doings) if number in doing.recent}
        if len(set(texts.values())) > 1:
            plain = {rank: text.partition(BY)[0] for rank, text in texts.items()}
            shown = plain if len(set(plain.values())) > 1 else texts  # algorithms, if nothing else differs
            places = {rank: str(doing) for rank, doing in enumerate(doings)}
            for rank, text in shown.items():
                doing = doings[rank]
                still = doing.call == plain[rank]
                places[rank] = f"in {text} at {doing.line}" if still else f"has been in {text}, is {doing}"
            return Failure("mismatch", f"the ranks are in different calls: {grouped(places)}")
    return None


def deadlock(doings: Sequence[Doing]) -> Failure | None:
    """Whether all ranks wait for each other in different calls, nothing being on its way between them."""
    stuck = all(doing.inside and doing.waited >= DEADLOCKED for doing in doings)
    if not stuck or len({doing.call for doing in doings}) == 1:
        return None
    places = {rank: str(doing) for rank, doing in enumerate(doings)}
    return Failure("mismatch", f"the ranks wait for each other in different calls: {grouped(places)}")


# -- a rank's own view


class Breakable(Protocol):
    """What carries calls without numbers, between ``nranks`` ranks that share memory."""

    nranks: int

    def shut(self) -> None:
        """Let no further call begin on this rank."""


class Watch:
    """Knows where the ranks of one communicator are to be asked, and whether it still works.

    Making one is collective over ``comm``, which carries the collectives' messages; ``users`` is the
    communicator that they are for. ``timeout`` in seconds.
    """

    def __init__(self, comm: MPI.Intracomm, users: MPI.Intracomm, timeout: float) -> None:
        self.rank, self.nranks, self.timeout = comm.Get_rank(), comm.Get_size(), timeout
        self.failure: Failure | None = None
        self._comms: tuple[MPI.Intracomm, ...] = (comm, users)
        self._recent: list[tuple[int, What] | None] = [None] * RECENT
        self._standing: dict[int, What] = {}
        self._waits: weakref.WeakSet[Waiting] = weakref.WeakSet()
        self._channels: weakref.WeakSet[Breakable] = weakref.WeakSet()
        self._failed_in = ("", "", -math.inf)
        self.contacts: list[Contact] = []
        if self.nranks > 1:
            self.contacts = comm.allgather(service().contact)
            self.ident: str = comm.bcast(os.urandom(8).hex())
            _watches[self.ident] = self
            _report_on_signal()

    def attach(self, comm: MPI.Intracomm) -> None:
        """Let `of` find this watch by ``comm``, some or all of whose ranks it watches."""
        whole, part = self._comms[0].Get_group(), comm.Get_group()
        ranks = MPI.Group.Translate_ranks(part, list(range(part.Get_size())), whole)
        comm.Set_attr(_keyval(), (self, ranks))
        whole.Free()
        part.Free()

    def breaks(self, channel: Breakable) -> None:
        """Let no call begin in ``channel``, either, once the communicator is broken."""
        self._channels.add(channel)

    @property
    def on_one_node(self) -> bool:
        """Whether all ranks share memory."""
        return any(channel.nranks == self.nranks for channel in self._channels)

    def begin(self, number: int, call: What) -> None:
        """The call of this number begins. Raises what has broken the communicator."""
        if self.failure is not None:
            raise self.failure.error()
        self._recent[number % RECENT] = (number, call)

    def stands(self, number: int, call: What) -> None:
        """All calls of this number are ``call``: those of a persistent call, until it `falls`."""
        self._standing[number] = call

    def falls(self, number: int) -> None:
        """There will be no more calls of this number."""
        self._standing.pop(number, None)

    def text_of(self, tag: int) -> str:
        """The call whose messages have this tag, in words."""
        number = tag % (1 << NUMBER_BITS)
        entry = self._recent[number % RECENT]
        call = self._standing.get(number) or (entry[1] if entry is not None and entry[0] == number else None)
        return call.text if call is not None else "a collective"

    # -- what others hear

    def doing(self) -> dict[str, Any]:
        """What this rank says of itself."""
        now = monotonic()
        beside = {thread.ident for thread in threading.enumerate() if thread.name.startswith(BESIDE)}
        waits = sorted(
            (w for w in _all_waits() if w.goes_on(now)), key=lambda w: (w.thread in beside, w.since)
        )
        here = [wait_ for wait_ in waits if wait_ in self._waits]
        call, line, then = self._failed_in
        call, line, waited = (call, line, 0.0) if now - then < REMEMBERED else ("", "", 0.0)
        for wait_ in here[:1] or ([] if call else waits[:1]):
            call, line, waited = wait_.call, line_of(wait_.thread), now - wait_.since
        recent = [entry for entry in self._recent if entry is not None]
        return {
            "line": line or line_of(),
            "call": call,
            "waited": waited,
            "inside": bool(here) and here[0].thread not in beside,
            "recent": {number: call.whole for number, call in (*recent, *self._standing.items())},
            "failure": self.failure and asdict(self.failure),
        }

    def ask_all(self) -> list[Doing]:
        """What every rank is doing, this one among them."""
        others = [rank for rank in range(self.nranks) if rank != self.rank]
        with ThreadPoolExecutor(AT_ONCE, "mpicoll-ask") as pool:
            answers = dict(zip(others, pool.map(self._ask, others), strict=True))
        return [answers.get(rank) or Doing.of(self.doing()) for rank in range(self.nranks)]

    def _ask(self, rank: int) -> Doing:
        try:
            return Doing.of(ask(self.contacts[rank], "doing", self.ident))
        except EndedError as error:
            return Doing(silence=str(error), ended=True)
        except NoAnswerError as error:
            return Doing(silence=str(error))

    # -- failing

    def fail(self, failure: Failure, aloud: bool = True) -> Failure:
        """No further collective is possible; the others hear of it if ``aloud``. The first failure stays."""
        if self.failure is None:
            dead = tuple((c.host, c.pid) for c in (self.contacts[rank] for rank in failure.ranks))
            failure = Failure(failure.kind, failure.text, failure.ranks, failure.dead or dead)
            self._fail(failure)
            for other in list(_watches.values()):
                other.hear(failure, self.ident)
            if aloud:
                self._tell(failure)
        return self.failure or failure

    def _fail(self, failure: Failure) -> None:
        self.failure = failure
        for channel in list(self._channels):
            channel.shut()

    def give_up(self, error: BaseException) -> None:
        """This rank leaves a collective with ``error``: the others are not to wait for it."""
        if self.nranks > 1 and self.failure is None:
            kind = next((kind for kind, cls in ERRORS.items() if isinstance(error, cls)), "failed")
            known = isinstance(error, FAULTS)
            met = f"rank {self.rank} has broken off a collective: {type(error).__name__}: {error}"
            self.fail(Failure(kind, str(error) if known else met, getattr(error, "ranks", ())))
            self.revoke()

    def hear(self, failure: Failure, ident: str) -> None:
        """What has befallen the communicator ``ident``, or processes that may be in this one, too."""
        if self.failure is not None:
            return
        if ident == self.ident:
            self._fail(failure)
            return
        gone = tuple(r for r, c in enumerate(self.contacts) if (c.host, c.pid) in failure.dead)
        if gone:
            text = "; ".join(f"rank {r} (process {self.contacts[r].pid}) has ended" for r in gone)
            self._fail(Failure("failed", text, gone, failure.dead))

    def _tell(self, failure: Failure) -> None:
        said = [self.ident, asdict(failure)]
        others = [c for r, c in enumerate(self.contacts) if r != self.rank and r not in failure.ranks]
        pool = ThreadPoolExecutor(AT_ONCE, "mpicoll-tell")
        wait([pool.submit(_tell_one, contact, said) for contact in others], TELLING)
        pool.shutdown(wait=False, cancel_futures=True)

    def failed_in(self, call: str) -> None:
        """For others that ask later: in which call, and where, this rank has failed."""
        self._failed_in = (call, line_of(threading.get_ident()), monotonic())

    def error_of(self, error: MPI.Exception) -> Exception:
        """What an error of MPI means: a rank that has ended, or the error itself."""
        if error.Get_error_class() not in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED):
            return error
        return self._lost().error()

    def _lost(self) -> Failure:
        """The failure that MPI's own knowledge of ended ranks amounts to."""
        failed = self._comms[0].Get_failed()
        whole = self._comms[0].Get_group()
        ranks = tuple(MPI.Group.Translate_ranks(failed, list(range(failed.Get_size())), whole))
        failed.Free()
        whole.Free()
        text = "; ".join(f"rank {r} (process {self.contacts[r].pid}) has ended" for r in ranks)
        failure = self.fail(Failure("failed", text or "another rank has ended", ranks), aloud=bool(ranks))
        self.revoke()
        return failure

    @contextmanager
    def understanding(self) -> Iterator[None]:
        """What MPI's own functions raise in here is raised as what it means; see `error_of`."""
        if self.failure is not None:
            raise self.failure.error()
        try:
            yield
        except MPI.Exception as error:
            meant = self.error_of(error)
            if meant is error:
                raise
            raise meant from error
        except Exception as error:
            if self._comms and is_of_an_end(self._comms[0]):
                raise self._lost().error() from error
            raise
        if self._comms and has_lost(self._comms[0]):
            raise self._lost().error()

    def close(self) -> None:
        """Its communicators are about to be freed: nobody is to touch them any more."""
        self._comms = ()
        if self.nranks > 1:
            _watches.pop(self.ident, None)
            _last_words[self.ident] = self.doing()  # others may ask only now what this rank has met
            while len(_last_words) > RECENT:
                _last_words.pop(next(iter(_last_words)), None)

    def allgather(self, comm: MPI.Intracomm, thing: Any, call: str) -> list[Any]:
        """As MPI's ``comm.allgather``, but not for ever: raises what `Waiting.look` does."""
        mine = np.frombuffer(pickle.dumps(thing), np.uint8)
        sizes = np.zeros(comm.Get_size(), np.int64)
        others = tuple(rank for rank in of(comm)[1] if rank != self.rank)
        self.complete(comm.Iallgather(np.array([mine.size]), sizes), call, others)
        everything = np.zeros(sizes.sum(), np.uint8)
        self.complete(comm.Iallgatherv(mine, [everything, sizes]), call, others)
        return [pickle.loads(part.tobytes()) for part in np.split(everything, np.cumsum(sizes)[:-1])]

    def complete(
        self, request: MPI.Request, call: str, others: Collection[int], status: MPI.Status | None = None
    ) -> None:
        """Wait for a request of MPI's own, and so for ranks ``others``; raises what `Waiting.look` does."""
        waiting, pause = Waiting(self, lambda: 0), 0.0
        try:
            with self.understanding():
                while not request.Test(status):
                    waiting.look(lambda: call, lambda: others)
                    sleep(pause)
                    pause = min(2 * pause + 1e-6, LONGEST_NAP)
        except BaseException as error:
            _broken_off.append(request)  # which keeps the memory that MPI may still write into
            self.give_up(error)
            raise

    def revoke(self) -> None:
        """Get ranks that are in MPI's own functions out of them, where MPI can do that."""
        if not outlives_ranks() or self.failure is None or self.failure.kind != "failed":
            return
        for watch in list(_watches.values()):
            if watch.failure is not None:
                for comm in watch._comms:
                    if comm != MPI.COMM_NULL and not comm.Is_revoked():
                        comm.Revoke()


def has_lost(comm: MPI.Intracomm) -> bool:
    """Whether MPI knows of ranks of ``comm`` that have ended."""
    if not outlives_ranks():
        return False
    failed = comm.Get_failed()
    some = bool(failed.Get_size())
    failed.Free()
    return some


def is_of_an_end(comm: MPI.Intracomm) -> bool:
    """Whether an exception may come of a rank's end: MPI's collectives then may hand out what is no data.

    They may do so a moment before MPI knows of the end.
    """
    until = monotonic() + SETTLED
    while outlives_ranks() and not has_lost(comm) and monotonic() < until:
        sleep(LONGEST_NAP)
    return has_lost(comm)


def _tell_one(contact: Contact, said: Any) -> None:
    with suppress(NoAnswerError):  # it will find out by itself, if it is still there
        ask(contact, "hear", said)


class Waiting:
    """A plan that waits for others: `look` is called again and again while it makes no progress.

    ``progress`` gives a number that changes when the plan goes on.
    """

    def __init__(self, watch: Watch, progress: Callable[[], int]) -> None:
        self.call = ""
        self.since = self.seen = -math.inf
        self.thread: int | None = None
        self._watch, self._current = watch, progress
        self._progress = -1
        self._pause = self._next = 0.0
        self._inquiry: Future[list[Doing]] | None = None
        self._asked = 0.0
        self._noticed = False
        watch._waits.add(self)

    def goes_on(self, now: float) -> bool:
        """Whether it waits still, as far as one can tell."""
        whole = self._watch.failure is None  # else it has been broken off, or will be at once
        return whole and now - self.seen < FRESH and self._current() == self._progress

    def end(self) -> None:
        """The plan has been broken off."""
        self.seen = -math.inf

    def look(self, call: Callable[[], str], waits_for: Callable[[], Collection[int]]) -> None:
        """``call`` gives what the plan does in words, ``waits_for`` ranks of the watch.

        Raises `RankFailedError`, `MismatchError` or `DeadlineError` if waiting on is of no use.
        """
        now, progress = monotonic(), self._current()
        if progress != self._progress:
            self._progress, self.since, self.call = progress, now, call()
            self._pause, self._next = FIRST_LOOK, now + FIRST_LOOK
            self._inquiry, self._noticed = None, False
        self.seen, self.thread = now, threading.get_ident()
        watch = self._watch
        if watch.failure is not None:
            self._raise(watch.failure)
        if self._inquiry is not None and self._inquiry.done():
            self._heed(self._inquiry.result(), waits_for())
            self._inquiry = None
        overdue = now - self.since >= watch.timeout and self._asked < self.since + watch.timeout
        if self._inquiry is None and (now >= self._next or overdue):
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._next, self._asked = now + self._pause, now
            self._inquiry = _in_thread(watch.ask_all)

    def _heed(self, doings: Sequence[Doing], waits_for: Collection[int]) -> None:
        """Raise if what the ranks say means that there is nothing to wait for."""
        watch, waited = self._watch, self._asked - self.since
        failure = judge(doings, watch.rank, waits_for, waited >= SETTLED)
        if failure is None and watch.on_one_node:
            failure = deadlock(doings)
        places = {rank: str(doing) for rank, doing in enumerate(doings)}
        if failure is None and waited >= watch.timeout:
            text = f"no progress for {waited:.3g} s (MPICOLL_TIMEOUT={watch.timeout:g}): {grouped(places)}"
            failure = Failure("deadline", text)
        if failure is not None:
            heard = any(doing.failure is not None for doing in doings)
            self._raise(watch.fail(failure, aloud=not heard))
        if waited >= STALLED and not self._noticed:
            self._noticed = True
            if not any(doing.waited > STALLED for doing in doings[: watch.rank]):  # else another rank says it
                print(
                    f"mpicoll: no progress for {waited:.0f} s: {grouped(places)}", file=sys.stderr, flush=True
                )

    def _raise(self, failure: Failure) -> None:
        self._watch.failed_in(self.call)
        self._watch.revoke()
        raise failure.error()


def _in_thread(function: Callable[[], list[Doing]]) -> Future[list[Doing]]:
    future: Future[list[Doing]] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="mpicoll-look", daemon=True).start()
    return future


_broken_off: list[MPI.Request] = []
_last_words: dict[str, dict[str, Any]] = {}  # of communicators that have been freed, by what names them
_watches: weakref.WeakValueDictionary[str, Watch] = weakref.WeakValueDictionary()


def _all_waits() -> list[Waiting]:
    return [wait_ for watch in list(_watches.values()) for wait_ in list(watch._waits)]


@cache
def _keyval() -> int:
    return MPI.Comm.Create_keyval()


def of(comm: MPI.Intracomm) -> tuple[Watch, Sequence[int]]:
    """The watch of a communicator, and which of its ranks each rank of ``comm`` is; see `Watch.attach`."""
    return comm.Get_attr(_keyval())  # type: ignore[return-value]


def watch_of(comm: MPI.Intracomm) -> Watch | None:
    """The watch of a communicator, if it has one already."""
    return None if comm.Get_attr(_keyval()) is None else of(comm)[0]


def timeout_from(environment: Mapping[str, str]) -> float:
    """Seconds without progress after which a collective is an error; 0 stands for never."""
    text = environment.get("MPICOLL_TIMEOUT", str(DEFAULT_TIMEOUT))
    return checked_timeout(text, "MPICOLL_TIMEOUT")


def checked_timeout(given: Any, name: str) -> float:
    """Seconds, infinite for 0. Raises ValueError that names the argument."""
    try:
        seconds = float(given)
    except (TypeError, ValueError):
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError(f"{name}: expected seconds, or 0 for no deadline; got {given!r}")
    return seconds or math.inf


# -- what the service does for others


def service() -> Service:
    """This process's, which the watches use."""
    return service_of(os.getpid(), _handlers)


def _handlers() -> dict[str, Handler]:
    return {"doing": _say, "hear": _hear, "where": _where, "print": _print}


def _say(ident: str) -> dict[str, Any]:
    said = _last_words.get(ident)
    return _known(ident).doing() if said is None else said


def _known(ident: str) -> Watch:
    watch = _watches.get(ident)
    if watch is None:
        raise NoAnswerError("this communicator has been freed here")
    return watch


def _hear(said: tuple[str, Mapping[str, Any]]) -> None:
    ident, failure = said
    for watch in list(_watches.values()):
        watch.hear(Failure.of(failure), ident)


def _largest() -> Watch:
    watches = list(_watches.values())
    if not watches:
        raise NoAnswerError("there is no communicator")
    return max(watches, key=lambda watch: watch.nranks)


def _where(_: Any) -> list[dict[str, Any]]:
    """What every rank of this process's largest communicator is doing, for `mpicoll where`."""
    watch = _largest()
    rows = zip(watch.contacts, watch.ask_all(), strict=True)
    return [
        {
            "rank": rank,
            "host": contact.host,
            "pid": contact.pid,
            "call": doing.call or None,
            "waited": doing.waited,
            "line": doing.line or None,
            "silence": doing.silence or None,
        }
        for rank, (contact, doing) in enumerate(rows)
    ]


def report(rows: Iterable[Mapping[str, Any]]) -> str:
    """What `mpicoll where` shows, a line for each rank."""
    lines = []
    for row in rows:
        doing = Doing(row["line"] or "", row["call"] or "", silence=row["silence"] or "")
        waited = f", waiting for {row['waited']:.1f} s" if row["call"] else ""
        lines.append(f"rank {row['rank']} ({row['host']}, process {row['pid']}): {doing}{waited}")
    return "\n".join(lines)


_printed = -math.inf


def _print(_: Any) -> None:
    """Print where all ranks are; once, though the launcher may have signalled every rank."""
    global _printed
    if monotonic() - _printed < FRESH:
        return
    _printed = monotonic()
    print(report(_where(None)), file=sys.stderr, flush=True)


def _on_signal(number: int, frame: FrameType | None) -> None:
    def run() -> None:
        with suppress(NoAnswerError):  # there is nothing to say
            watch = _largest()
            try:
                _print(None) if watch.rank == 0 else ask(watch.contacts[0], "print", None)
            except NoAnswerError:
                _print(None)

    threading.Thread(target=run, name="mpicoll-report", daemon=True).start()


def _report_on_signal() -> None:
    """SIGUSR2 prints where all ranks are, unless the program has its own use for it."""
    if threading.current_thread() is threading.main_thread() and not _has_use_for(signal.SIGUSR2):
        signal.signal(signal.SIGUSR2, _on_signal)


def _has_use_for(number: int) -> bool:
    """Whether the process handles or ignores a signal, be it in C, as `faulthandler` does."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return any(int(status[mask], 16) >> (number - 1) & 1 for mask in ("SigCgt", "SigIgn"))
