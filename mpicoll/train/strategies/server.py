"""The serving side of a parameter server: a shard of the parameters, its optimizer, and what workers ask for.

**Messages.** A request is a header of 8 numbers, and data with some; a worker sends one, and waits for the
reply before it sends the next. So a server never has more than one of each worker's:

    request   with data               reply comes                               with data
    PUSH      the shard's gradient    when the worker may take its next step
    STATE                             at once                                   a vector of the optimizer
    REPORT    figures                 at once                                   everyone's figures
    DONE                              when every worker that is left is done    ranks that were lost
    BYE                               never: the worker has the last parameters
    LEAVE                             never: the worker gives up; it may say on whom all is lost

**Parameters** travel the other way by one-sided operations: see `Window`.

**Lost workers.** A receive for the next header of each worker is always there, and fails if MPI says that the
worker has (ULFM). Workers on the server's own node are looked at, too, which any MPI allows.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.train.arrays import Array
from mpicoll.train.optimizer import Optimizer
from mpicoll.transports.shared import has_ended

Head = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

# Tags. Data comes after its header, from the same rank.
REQUEST, REQUEST_DATA, REPLY, REPLY_DATA = range(1, 5)

PUSH, STATE, REPORT, DONE, BYE, LEAVE = range(6)  # kinds of requests
# What stands where in a request's header,
KIND = 0
VERSION, RATE, SHARE = 1, 2, 3  # of a PUSH: of the parameters that the gradient is of
VECTOR = 1  # of a STATE: which one
NUMBER, OPERATION, COUNT = 1, 2, 3  # of a REPORT: which one it is of this worker, of how many figures
WHY, WHO = 1, 2  # of a LEAVE: what has become of which rank
# and in a reply's.
STATUS, RANK, LENGTH, STEPS = range(4)
GRANTED, DIED, LEFT = range(3)  # all is well, or what has become of the rank on whom all is lost
HEAD = 8  # numbers

FIGURES = 4096  # that a REPORT may have
OPERATIONS = MPI.SUM, MPI.MAX, MPI.MIN  # that put them together,
REDUCTIONS: tuple[Callable[..., Any], ...] = np.sum, np.max, np.min  # and what these are here

LINE = 64  # bytes of a cache line
SMALL, MOST_KEPT = 1 << 16, 16  # bytes and number of the versions of a shard that are kept, if more than 2
SHORTEST, LONGEST = 1e-5, 1e-3  # seconds that one who waits sleeps: others may need the processor
LOOK = 0.1  # seconds between looks at other processes


def new_head(*values: float) -> Head:
    """A header with these values."""
    head = np.zeros(HEAD)
    head[: len(values)] = values
    return head


class Patience:
    """Sleeps that become longer while nothing happens, and the time to look whether others live."""

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self.reset()

    def reset(self) -> None:
        """Something has happened."""
        self._seconds = SHORTEST

    def sleep(self) -> None:
        """Nothing has happened."""
        time.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, LONGEST)

    def is_time_to_look(self) -> bool:
        """Now and then."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return False
        self._looked = now
        return True


class Watch:
    """Which ranks' processes have ended, as far as can be seen from here: on this node. Collective."""

    def __init__(self, comm: MPI.Intracomm):
        # The same process numbers mean the same processes where machine and container are the same.
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/pid").st_ino
        self.pids: dict[int, int] = {}
        for rank, (other, pid) in enumerate(comm.allgather((machine, os.getpid()))):
            if other == machine and not has_ended(pid):  # else it cannot be seen
                self.pids[rank] = pid

    def has_ended(self, rank: int) -> bool:
        return rank in self.pids and has_ended(self.pids[rank])

    def name(self, rank: int) -> str:
        """The rank as error messages call it."""
        return f"rank {rank} (process {self.pids[rank]})" if rank in self.pids else f"rank {rank}"


class Window:
    """Every server's shard, to be read at any time with one-sided operations, while it changes.

    A server has room for the last m versions of its shard, and two counters:

        publish version v:                      read:
            begun = v                               v = done
            slot[v mod m] = shard                   shard = slot[v mod m]
            done = v                                again, if begun >= v + m

    So nobody sees half a version, and nobody holds a lock: a reader that dies leaves nothing behind, and a
    server is never kept waiting. A reader begins again where m versions come while it reads one; but who
    pushes has to read, too, before it pushes again. m is 2, and more where shards are small.

    ``bounds`` say where the shards lie in the vector of parameters, ``servers`` whose they are. Collective.
    """

    def __init__(
        self, comm: MPI.Intracomm, servers: Sequence[int], bounds: Sequence[int], dtype: np.dtype[Any]
    ):
        self._comm, self._servers, self._bounds, self._dtype = comm, servers, bounds, dtype
        self._sizes = [int(size) for size in np.diff(bounds) * dtype.itemsize]
        self._kept = [min(max(SMALL // max(1, size), 2), MOST_KEPT) for size in self._sizes]
        own = servers.index(comm.rank) if comm.rank in servers else None
        room = 0 if own is None else self._slot(own, self._kept[own] - 1) + self._sizes[own]
        self._win = MPI.Win.Allocate(room, 1, comm=comm)
        self._win.Set_errhandler(MPI.ERRORS_RETURN)
        if own is not None:
            memory: Bytes = np.asarray(self._win.tomemory())
            memory[:] = 0
            self._begun, self._done = (memory[at : at + 8].view(np.int64) for at in (0, LINE))
            starts = [self._slot(own, version) for version in range(self._kept[own])]
            self._slots = [memory[at : at + self._sizes[own]].view(dtype) for at in starts]
        # For as long as the window lasts. Nobody asks for another kind of lock, so nothing is sent for these.
        for server in servers:
            self._win.Lock(server, MPI.LOCK_SHARED, MPI.MODE_NOCHECK)

    def _slot(self, server: int, version: int) -> int:
        """Where a version begins, in bytes."""
        return 2 * LINE + version % self._kept[server] * -(-self._sizes[server] // LINE) * LINE

    def publish(self, shard: Array, version: int) -> None:
        """Make ``shard`` the newest version: one more than the last, from 0."""
        self._begun[0] = version
        self._win.Sync()
        self._slots[version % len(self._slots)][...] = shard
        self._win.Sync()
        self._done[0] = version
        self._win.Sync()

    def read(self, parameters: npt.NDArray[Any]) -> list[int]:
        """Fill the vector with every shard's newest version, and say which each is."""
        versions = [0] * len(self._servers)
        missing = list(range(len(self._servers)))
        while missing:
            found = self._counters(missing, LINE)
            self._get([(i, self._slot(i, found[i]), self._part(parameters, i)) for i in missing])
            begun = self._counters(missing, 0)
            for i in missing:
                versions[i] = found[i]
            missing = [i for i in missing if begun[i] >= found[i] + self._kept[i]]
        return versions

    def _part(self, parameters: npt.NDArray[Any], i: int) -> npt.NDArray[Any]:
        return parameters[self._bounds[i] : self._bounds[i + 1]]

    def _counters(self, servers: Iterable[int], offset: int) -> dict[int, int]:
        values = {i: np.zeros(1, np.int64) for i in servers}
        self._get([(i, offset, value) for i, value in values.items()])
        return {i: int(value[0]) for i, value in values.items()}

    def _get(self, pieces: Sequence[tuple[int, int, npt.NDArray[Any]]]) -> None:
        """Read from (server, offset in bytes) into (array)."""
        for i, offset, array in pieces:
            raw = array.view(np.uint8)
            self._win.Get([raw, raw.size, MPI.BYTE], self._servers[i], [offset, raw.size, MPI.BYTE])
        for i, _, _ in pieces:
            self._win.Flush(self._servers[i])

    def free(self) -> None:
        """Collective."""
        for server in self._servers:
            self._win.Unlock(server)
        self._win.Free()


@dataclass(eq=False)
class Worker:
    """What a server knows of a worker."""

    rank: int
    data: Bytes  # of the last request
    request: Head = field(default_factory=new_head)  # the last one
    arriving: Head = field(default_factory=new_head)  # the next one
    head_request: MPI.Request | None = None
    data_request: MPI.Request | None = None  # while there is data to come
    replies: list[tuple[Any, MPI.Request]] = field(default_factory=list)  # memory that is being sent
    waits_for: int | None = None  # the kind of its request, until it is replied to
    clock: int = 0  # steps that it has finished
    is_here: bool = True
    is_done: bool = False


class Server:
    """One server's shard, for ``workers`` (ranks); see `SynchronousServer` and `AsynchronousServer`.

    ``shard`` is the optimizer's vector. ``fatal``: on a worker that has DIED, or LEFT, all is lost.
    ``bytes_sent``: gradients come in, parameters go out.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        workers: Sequence[int],
        window: Window,
        shard: npt.NDArray[Any],
        optimizer: Optimizer,
        watch: Watch,
        fatal: Collection[int],
    ):
        self.comm, self.window, self.shard, self.optimizer, self.watch = comm, window, shard, optimizer, watch
        self.fatal = fatal
        room = max(shard.nbytes, 8 * FIGURES)
        self.workers = [Worker(rank, np.zeros(room, np.uint8)) for rank in workers]
        self.version = 0  # updates of the shard
        self.lost: dict[int, int] = {}  # rank: DIED or LEFT
        self.bytes_sent = 0
        self._figures: dict[tuple[int, int, int], dict[int, npt.NDArray[np.float64]]] = {}

    def begin(self, parameters: Array) -> None:
        """Take the first parameters of the shard, and be ready for requests; also after an earlier `run`."""
        self.shard[...] = parameters
        self.window.publish(self.shard, self.version)
        for worker in self.workers:
            worker.is_here, worker.is_done, worker.clock = True, False, 0
            if worker.head_request is None:  # else the one that followed its last request is still there
                self._receive(worker)

    def run(self, stops: Callable[[], bool] = lambda: False) -> None:
        """Do what workers ask for until all have gone, or it ``stops``."""
        patience = Patience()
        while not stops() and any(worker.is_here for worker in self.workers):
            if self._turn():
                patience.reset()
            else:
                patience.sleep()
            if patience.is_time_to_look():
                for worker in self.workers:
                    if worker.is_here and self.watch.has_ended(worker.rank):
                        self._lose(worker, DIED)

    @property
    def failure(self) -> tuple[int, int] | None:
        """The rank without which nothing goes on, and what has become of it."""
        nobody = all(worker.rank in self.lost for worker in self.workers)
        return next(((rank, why) for rank, why in self.lost.items() if nobody or why in self.fatal), None)

    def pushed(self, worker: Worker) -> None:
        """Its gradient has come."""
        raise NotImplementedError

    def go_on(self) -> None:
        """Reply to those who have waited long enough: the others are further, or lost."""
        here = [worker for worker in self.workers if worker.is_here]
        if all(worker.is_done for worker in here):
            lost = np.array(sorted(self.lost), np.float64)
            for worker in here:
                if worker.waits_for == DONE:
                    self._reply(worker, lost)

    def _turn(self) -> bool:
        """Whether anything has happened."""
        happened = False
        for worker in self.workers:
            if not worker.is_here:
                continue
            try:
                happened |= self._hear(worker)
            except MPI.Exception:  # with ULFM: MPI knows that it has ended
                self._lose(worker, DIED)
        return happened

    def _receive(self, worker: Worker) -> None:
        worker.head_request = self.comm.Irecv(worker.arriving, worker.rank, REQUEST)

    def _hear(self, worker: Worker) -> bool:
        if worker.data_request is not None:
            if not worker.data_request.Test():
                return False
            worker.data_request = None
            self._handle(worker)
            return True
        if worker.head_request is None or not worker.head_request.Test():
            return False
        worker.request[:] = worker.arriving
        self._receive(worker)
        kind = worker.waits_for = int(worker.request[KIND])
        if kind in (PUSH, REPORT):
            nbytes = self.shard.nbytes if kind == PUSH else 8 * int(worker.request[COUNT])
            data = [worker.data, nbytes, MPI.BYTE]
            worker.data_request = self.comm.Irecv(data, worker.rank, REQUEST_DATA)
        else:
            self._handle(worker)
        return True

    def _handle(self, worker: Worker) -> None:
        kind = int(worker.request[KIND])
        if kind == BYE:
            worker.is_here = False
        elif kind == LEAVE:
            why, who = int(worker.request[WHY]), int(worker.request[WHO])
            if why != GRANTED:
                self.lost.setdefault(who, why)
            self._lose(worker, LEFT)
        elif self.failure:
            self._refuse(worker)
        elif kind == PUSH:
            worker.clock += 1
            self.pushed(worker)
        elif kind == STATE:
            self._reply(worker, list(self.optimizer.state.values())[int(worker.request[VECTOR])])
        elif kind == REPORT:
            self._reply(worker, self._everyones_figures(worker))
        else:
            worker.is_done = True
            self.go_on()

    def _reply(self, worker: Worker, data: npt.NDArray[Any] | None = None) -> None:
        """Let the worker go on, with a copy of ``data``."""
        length = 0 if data is None else data.size
        self._send(worker, new_head(GRANTED, 0, length, self.optimizer.steps), REPLY)
        if data is not None:
            self._send(worker, data.copy(), REPLY_DATA)
        if worker.waits_for == PUSH and worker.rank != self.comm.rank:
            self.bytes_sent += self.shard.nbytes  # which it reads now
        worker.waits_for = None

    def _refuse(self, worker: Worker) -> None:
        """Tell the worker on whom all is lost; there is nothing more to be said to it."""
        assert self.failure is not None
        rank, why = self.failure
        self._send(worker, new_head(why, rank), REPLY)
        worker.is_here = False

    def _send(self, worker: Worker, array: npt.NDArray[Any], tag: int) -> None:
        raw = array.view(np.uint8)
        with suppress(MPI.Exception):  # it has ended, which is seen where its next request is expected
            worker.replies = [(memory, request) for memory, request in worker.replies if not request.Test()]
            worker.replies.append((raw, self.comm.Isend([raw, raw.size, MPI.BYTE], worker.rank, tag)))

    def _lose(self, worker: Worker, why: int) -> None:
        """Go on without the worker, if that is possible; what it was about to push is not counted."""
        worker.is_here = False
        self.lost.setdefault(worker.rank, why)
        if not self.failure:
            self.go_on()
            return
        for other in self.workers:
            if other.is_here and other.waits_for is not None and other.data_request is None:
                self._refuse(other)

    def _everyones_figures(self, worker: Worker) -> npt.NDArray[np.float64]:
        """Put the worker's figures together with those that others have given so far, as often as it has."""
        number, operation, count = (int(worker.request[i]) for i in (NUMBER, OPERATION, COUNT))
        known = self._figures.setdefault((number, operation, count), {})
        known[worker.rank] = worker.data[: 8 * count].view(np.float64).copy()
        together: npt.NDArray[np.float64] = REDUCTIONS[operation](list(known.values()), axis=0)
        if OPERATIONS[operation] == MPI.SUM:
            together *= len(self.workers) / len(known)
        if all(other.rank in known or other.rank in self.lost for other in self.workers):
            del self._figures[number, operation, count]
        return together


class SynchronousServer(Server):
    """Waits for all gradients of a step, adds them up in the order of ranks, and makes one update."""

    def pushed(self, worker: Worker) -> None:
        if any(other.clock < worker.clock for other in self.workers):
            return
        gradients = [other.data[: self.shard.nbytes].view(self.shard.dtype) for other in self.workers]
        for gradient in gradients[1:]:
            gradients[0] += gradient
        self.optimizer.step(gradients[0], float(worker.request[RATE]))
        self.version += 1
        self.window.publish(self.shard, self.version)
        for other in self.workers:
            self._reply(other)


class AsynchronousServer(Server):
    """Makes an update of each gradient as it comes; see `mpicoll.train.strategies.parameter_server`.

    ``staleness``: how many steps a worker may be ahead of the slowest one.
    """

    staleness = math.inf

    def pushed(self, worker: Worker) -> None:
        rate, share = float(worker.request[RATE]), float(worker.request[SHARE])
        if share > 0:
            gradient = worker.data[: self.shard.nbytes].view(self.shard.dtype)
            self.optimizer.step(gradient, rate * share * self.slowed(self.version - worker.request[VERSION]))
            self.version += 1
            self.window.publish(self.shard, self.version)
        self.go_on()

    def slowed(self, updates: float) -> float:
        """What the rate is multiplied by, after so many updates since the worker read the parameters."""
        return min(1.0, len(self.workers) / max(1.0, updates))

    def go_on(self) -> None:
        training = [worker for worker in self.workers if worker.is_here and not worker.is_done]
        slowest = min((worker.clock for worker in training), default=0)
        for worker in training:
            arrived = worker.waits_for == PUSH and worker.data_request is None
            if arrived and worker.clock <= slowest + self.staleness:
                self._reply(worker)
        super().go_on()
