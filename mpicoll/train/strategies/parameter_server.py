"""A sharded parameter server: servers hold and update the parameters, workers push gradients and pull.

The vector of parameters w is cut into K shards, one for each server, which has the optimizer's state s[k] of
its shard. Worker i = 0, 1, ... W-1 has the gradients g_i of its samples, over the size of the global batch.

**Synchronous** (`ParameterServer`), in every step

    g[k] = g_0[k] + g_1[k] + ... + g_(W-1)[k]               all workers push, server k adds, in this order
    w[k], s[k] = optimizer(w[k], g[k], s[k], rate)
    w = w[0], w[1], ... w[K-1]                              workers pull

which is what `Allreduce` and `Sharded` arrive at.

**Asynchronous** (`AsyncParameterServer`): each gradient that comes is an update, and nobody waits for it but
the worker that has pushed it. With c_i the share of the batch that worker i's samples are, g_i / c_i is their
mean gradient, and server k makes of it

    w[k], s[k] = optimizer(w[k], g_i[k] / c_i, s[k], rate c_i min(1, W / t))

where t is the gradient's **staleness**: the number of updates of the shard since worker i has pulled it. The
W updates of a round together take a step as long as a synchronous one. With equal shares c_i = 1/W and t of W
or more this is staleness-aware SGD: rate / t for a mean gradient (W. Zhang et al., IJCAI 2016, who do the
same where t is less than W, with longer steps). If the optimizer clips, then the workers do, by the norm of
their g_i / c_i. Statistics of layers change by what the workers give, each once. Updates are slowed, not
gradients, so momentum keeps a stale gradient whole: without a bound (see below), use little of it.

With **bounded staleness** S (stale synchronous parallel: Ho et al., NIPS 2013), a worker that has finished c
steps goes on when every other one that trains has finished at least c - S. With S = 0 they take steps
together, though each gradient is an update; without a bound they never wait for each other. Nobody waits for
a worker that dies: the others train on, without its samples, where ranks serve only (``servers`` > 0).

Cost per step for n bytes of parameters: a worker sends n bytes and reads n; a server receives W n / K, and as
many are read from it. Source of the scheme: M. Li et al., "Scaling Distributed Machine Learning with the
Parameter Server", OSDI 2014.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.faults import RankFailedError
from mpicoll.schedule import chunk_bounds
from mpicoll.train.arrays import Array, array_module, on_host
from mpicoll.train.errors import InputError
from mpicoll.train.model import Sequential
from mpicoll.train.optimizer import LARS, Optimizer
from mpicoll.train.strategies import server as protocol
from mpicoll.train.strategies.base import Strategy
from mpicoll.train.strategies.server import (
    AsynchronousServer,
    Head,
    Patience,
    Server,
    SynchronousServer,
    Watch,
    Window,
    new_head,
)

HELD_PARAMETERS = "; it held a part of the parameters"

# From `start` on, and for good where they were broken off: MPI may still read and write their memory.
_in_use: set[ParameterServer] = set()


class ParameterServer(Strategy):
    """See the module. The last ``servers`` ranks serve only; with 0, every rank is a worker and a server.

    A rank is a server beside its work in a thread: RuntimeError without MPI_THREAD_MULTIPLE. A rank that
    ``serves_only`` calls `serve`, where the others call `start`, and train.

    ``lost``: the ranks that are known to have ended or left, after `finish` or `serve`; where there are any,
    nothing collective can follow.
    """

    name = "ps-sync"
    in_step = False
    kind: type[Server] = SynchronousServer

    def __init__(self, comm: MPI.Intracomm, model: Sequential, optimizer: Optimizer, servers: int = 0):
        self._check(comm, optimizer, servers)
        super().__init__(comm, model, optimizer)
        nranks, rank = comm.size, comm.rank
        workers = range(nranks - servers)
        self.servers = range(nranks - servers, nranks) if servers else workers
        self.serves_only = rank not in workers
        self.parts = len(workers)
        self.own_parts = range(rank, rank + 1) if rank in workers else range(0)
        self.lost: tuple[int, ...] = ()

        plain = MPI.Intracomm(comm)
        self._messages = plain.Dup()
        self._messages.Set_errhandler(MPI.ERRORS_RETURN)
        self._workers = MPI.Intracomm(
            plain.Split(self.serves_only, rank)
        )  # on ranks that serve only: the servers
        self._updates = MPI.Intracomm(plain.Split(rank in self.servers, rank))
        self._watch = Watch(plain)
        bounds = chunk_bounds(model.parameters.size, len(self.servers), model.parameters.itemsize)
        self._bounds: list[int] = bounds.tolist()
        self._trained = np.diff(np.minimum(bounds, model.tensors.trainable)).tolist()
        self._window = Window(plain, self.servers, self._bounds, model.parameters.dtype)
        self._on_host = array_module(model.parameters) is np
        self._host = (
            model.parameters if self._on_host else np.empty(model.parameters.size, model.parameters.dtype)
        )
        self._versions = [0] * len(self.servers)
        self._final: dict[str, Array] = {}  # the optimizer's state of the end
        self._memory: Any = None  # that MPI may use
        self._is_running = self._is_broken = self._stops = False
        self._thread: threading.Thread | None = None
        self._thread_error: BaseException | None = None
        self._culprit = protocol.GRANTED, 0  # what has become of the rank on whom all is lost, and its number
        self._bytes_served = 0
        self.server = self._make_server(workers) if rank in self.servers else None

    def _check(self, comm: MPI.Intracomm, optimizer: Optimizer, servers: int) -> None:
        if servers < 0:
            raise ValueError(f"servers: expected 0 or more, got {servers}")
        if servers >= comm.size:
            raise ValueError(
                f"servers: expected at most {comm.size - 1} (one rank has to work), got {servers}"
            )
        if servers == 0 and MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise RuntimeError(
                "servers: expected at least 1, for this MPI was started without MPI_THREAD_MULTIPLE, got 0, "
                "with which ranks serve in a thread beside their work"
            )

    def _make_server(self, workers: range) -> Server:
        own = self.servers.index(self.comm.rank)
        begin, end = self._bounds[own : own + 2]
        shard = np.zeros(end - begin, self._host.dtype)
        self.optimizer.bind(shard, self.model.tensors.cut(begin, end, self._updates))
        fatal = (
            [protocol.DIED, protocol.LEFT] if self.synchronous else [protocol.DIED] * (not self.serves_only)
        )
        return self.kind(self._messages, workers, self._window, shard, self.optimizer, self._watch, fatal)

    # -- the course of a training

    def start(self) -> None:
        """Workers and servers have rank 0's parameters, and the servers serve. Collective, with `serve`."""
        super().start()
        self._fetch(self.model.parameters, self._host)
        if self.server is not None:
            own = self.servers.index(self.comm.rank)
            self.server.begin(self._host[self._bounds[own] : self._bounds[own + 1]])
            if not self.serves_only:
                self._thread = threading.Thread(target=self._serve_beside, name="parameter server")
                self._thread.start()
        self._is_running = True
        _in_use.add(self)
        self.comm.Barrier()

    def serve(self) -> None:
        """Serve until all workers have finished or are lost; the model gets the last parameters.

        Raises `RankFailedError` if a worker has ended without which the others cannot go on, and `InputError`
        if one has left, as all do where input is bad.
        """
        assert self.server is not None
        self.start()
        self._is_broken = True  # until it is known better
        self.server.run()
        self._count_served()
        self.lost = tuple(sorted(self.server.lost))
        if self.server.failure:
            rank, why = self.server.failure
            if why == protocol.LEFT:
                raise InputError(f"{self._watch.name(rank)} has left the training")
            raise self._failed(rank, why)
        counts = np.diff(self._bounds).tolist()
        self._updates.Allgatherv(self.server.shard, [self._host, counts])
        self._put_back()
        self._is_running, self._is_broken = False, bool(self.lost)

    def step(self, rate: float, share: float) -> None:
        """Push the gradients, and pull when it is time to."""
        gradients = self._gradients(share)
        with self.communicating():
            parts = [gradients[begin:end] for begin, end in pairwise(self._bounds)]
            heads = [new_head(protocol.PUSH, version, rate, share) for version in self._versions]
            self._ask(heads, parts)
            self._pull()
        sizes = {rank: part.nbytes for rank, part in zip(self.servers, parts, strict=True)}
        self.bytes_sent += sum(sizes.values()) - sizes.get(self.comm.rank, 0)
        self._count_served()

    def finish(self) -> None:
        """Wait until all workers are done or lost, and pull the last parameters."""
        if not self._is_running:
            return
        replies = self._ask([new_head(protocol.DONE) for _ in self.servers])
        counts = [int(reply[protocol.LENGTH]) for reply in replies]
        lost = np.concatenate(self._answers(counts, np.dtype(np.float64)))
        self._pull()
        self._final = self.vectors()
        self._tell(protocol.BYE)
        if self._thread is not None:
            self._thread.join()
        self._count_served()
        self.lost = tuple(sorted({int(rank) for rank in lost}))
        self._is_running, self._is_broken = False, bool(self.lost)

    def close(self) -> None:
        """Give up what was allocated. Collective if the training has ended well, else each rank's own.

        A rank that leaves an asynchronous training serves the others, if it does, until they end.
        """
        if self._is_running and not self.serves_only:
            self._is_broken = True
            self._tell(protocol.LEAVE, *self._culprit)
            self._stops = self.synchronous  # else others go on with what this rank holds
            if self._thread is not None:
                self._thread.join()
            self._is_running = False
        if self._is_broken:
            return
        _in_use.discard(self)
        self._window.free()
        for comm in (self._messages, self._workers, self._updates):
            comm.Free()

    # -- figures and state

    def total(self, values: Sequence[float], op: MPI.Op = MPI.SUM) -> npt.NDArray[np.float64]:
        """Each of ``values`` over all workers. Collective over workers."""
        totals = np.array(values, np.float64)
        if not self.lost:
            self._workers.Allreduce(MPI.IN_PLACE, totals, op=op)
        return totals

    def vectors(self) -> dict[str, Array]:
        """The optimizer's state for all of the model's parameters, on rank 0; nothing on others.

        Rank 0 alone asks the servers for it, between two of its steps; after `finish` it is that of the end.
        """
        if self.comm.rank:
            return {}
        if not self._is_running:
            return self._final
        return {name: self._vector(i) for i, name in enumerate(self.optimizer.vectors)}

    def _vector(self, i: int) -> Array:
        replies = self._ask([new_head(protocol.STATE, i) for _ in self.servers])
        parts = self._answers(self._trained, self._host.dtype)
        if self.server is None:
            self.optimizer.steps = int(max(reply[protocol.STEPS] for reply in replies))
        return array_module(self.model.parameters).asarray(np.concatenate(parts))

    def restore(self, vectors: dict[str, Array], steps: int) -> None:
        """Take up the optimizer's state again. On every rank, also those that serve only, before `start`."""
        self.optimizer.steps = steps
        if self.server is None:
            return
        own = self.servers.index(self.comm.rank)
        for name, vector in vectors.items():
            part = vector[self._bounds[own] : self._bounds[own + 1]]
            self._fetch(part, self.optimizer.state[name])

    # -- what a worker does

    def _count_served(self) -> None:
        """What workers have read here since the last time."""
        if self.server is not None:
            served = self.server.bytes_sent
            self.bytes_sent += served - self._bytes_served
            self._bytes_served = served

    def _gradients(self, share: float) -> npt.NDArray[Any]:
        """What is pushed, in the host's memory."""
        return on_host(self.model.gradients)

    def _pull(self) -> None:
        """w = w[0], w[1], ... w[K-1], each as new as it is."""
        self._versions = self._window.read(self._host)
        self._put_back()

    def _put_back(self) -> None:
        """From the host's memory to the model."""
        if not self._on_host:
            self.model.parameters[...] = array_module(self.model.parameters).asarray(self._host)

    def _fetch(self, array: Array, host: npt.NDArray[Any]) -> None:
        """From the model's device to the host's memory."""
        if array is not host:
            host[...] = on_host(array)

    def _ask(self, heads: Sequence[Head], data: Sequence[npt.NDArray[Any]] = ()) -> list[Head]:
        """Send requests to the first servers, as many as there are ``heads``, and wait for their replies."""
        servers = self.servers[: len(heads)]
        replies = {rank: new_head() for rank in servers}
        self._memory = heads, data, replies  # kept, should this be broken off
        waiting = {rank: self._messages.Irecv(reply, rank, protocol.REPLY) for rank, reply in replies.items()}
        requests = zip(servers, heads, strict=True)
        sent = [self._messages.Isend(head, rank, protocol.REQUEST) for rank, head in requests]
        for rank, array in zip(servers, data, strict=False):
            sent.append(self._messages.Isend(_raw(array), rank, protocol.REQUEST_DATA))
        self._wait(waiting, replies)
        MPI.Request.Waitall(sent)  # they have been received
        return list(replies.values())

    def _wait(self, waiting: dict[int, MPI.Request], replies: Mapping[int, Head]) -> None:
        patience = Patience()
        while waiting:
            arrived = [rank for rank, request in waiting.items() if self._has_come(rank, request)]
            for rank in arrived:
                del waiting[rank]
                self._check_reply(replies[rank])
            if arrived:
                patience.reset()
            else:
                patience.sleep()
            if self._thread_error is not None:
                raise self._thread_error
            if patience.is_time_to_look():
                for rank in waiting:
                    if self._watch.has_ended(rank):
                        raise self._failed(rank, protocol.DIED, HELD_PARAMETERS)

    def _has_come(self, rank: int, request: MPI.Request) -> bool:
        try:
            return request.Test()
        except MPI.Exception as error:
            raise self._failed(rank, protocol.DIED, HELD_PARAMETERS) from error

    def _check_reply(self, reply: Head) -> None:
        if reply[protocol.STATUS] != protocol.GRANTED:
            raise self._failed(int(reply[protocol.RANK]), int(reply[protocol.STATUS]))

    def _answers(self, counts: Sequence[int], dtype: np.dtype[Any]) -> list[npt.NDArray[Any]]:
        """The data of replies, from the first servers: as many as there are ``counts``."""
        answers = [np.empty(count, dtype) for count in counts]
        ranks = self.servers[: len(counts)]
        self._memory = answers
        pairs = zip(ranks, answers, strict=True)
        waiting = {
            rank: self._messages.Irecv(_raw(array), rank, protocol.REPLY_DATA) for rank, array in pairs
        }
        self._wait(waiting, dict.fromkeys(ranks, new_head()))
        return answers

    def _tell(self, *request: float) -> None:
        """A request that nobody replies to."""
        for rank in self.servers:
            with suppress(MPI.Exception):  # of a server that has ended
                self._messages.Send(new_head(*request), rank, protocol.REQUEST)

    def _failed(self, rank: int, why: int, what: str = "") -> RankFailedError:
        self._culprit = why, rank
        how = "has ended" if why == protocol.DIED else "has left the training"
        return RankFailedError(f"{self._watch.name(rank)} {how}{what}")

    def _serve_beside(self) -> None:
        """The thread of a rank that works, too."""
        assert self.server is not None
        try:
            # Not after the program: the interpreter waits for this thread, and then ends MPI.
            self.server.run(lambda: self._stops or not threading.main_thread().is_alive())
        except BaseException as error:
            self._thread_error = error


def _raw(array: npt.NDArray[Any]) -> list[Any]:
    raw = array.view(np.uint8)
    return [raw, raw.size, MPI.BYTE]


class AsyncParameterServer(ParameterServer):
    """See the module. ``staleness``: how many steps a worker may be ahead of the slowest; None for no bound.

    Between `start` and `finish` nothing is collective: a worker's calls take it and the servers. So rank 0
    evaluates the whole test set (``own_test_parts``), and `total` is as good as what is known.

    Raises ValueError for `LARS` with more than one shard: norms of whole tensors would be those of no moment.
    """

    name = "ps-async"
    synchronous = False
    kind = AsynchronousServer

    def __init__(
        self,
        comm: MPI.Intracomm,
        model: Sequential,
        optimizer: Optimizer,
        servers: int = 0,
        staleness: int | None = None,
    ):
        if staleness is not None and staleness < 0:
            raise ValueError(f"staleness: expected 0 or more steps, or None for no bound, got {staleness}")
        if isinstance(optimizer, LARS) and (servers or comm.size) > 1:
            raise ValueError(
                f"optimizer: expected one without norms of whole tensors, whose parts {servers or comm.size} "
                "servers change independently, got LARS; use ps-sync, or servers=1"
            )
        self._clip_norm = optimizer.clip_norm
        updates = copy.copy(optimizer)
        updates.clip_norm = None  # it is the workers that clip
        super().__init__(comm, model, updates, servers)
        self._reports = 0
        if isinstance(self.server, AsynchronousServer):
            self.server.staleness = math.inf if staleness is None else staleness

    @property
    def own_test_parts(self) -> range:
        """All on rank 0, which has to wait for nobody then."""
        return range(self.parts) if self.comm.rank == 0 else range(0)

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """The newest parameters, which this worker then goes on from."""
        if self._is_running:
            self._pull()
        yield

    def total(self, values: Sequence[float], op: MPI.Op = MPI.SUM) -> npt.NDArray[np.float64]:
        """Each of at most 4096 ``values`` over the workers that have called this as often as this one has.

        Where it is a sum, the others are taken to be like those: it is that of m workers, times W / m. So
        ratios of sums are right, and an early caller's figures are estimates. Before `start`, and after
        `finish` if no rank is lost, it is exact, and collective over workers.
        """
        if not self._is_running:
            return super().total(values, op)
        figures = np.array(values, np.float64)
        if figures.size > protocol.FIGURES:
            raise ValueError(f"values: expected at most {protocol.FIGURES}, got {figures.size}")
        head = new_head(protocol.REPORT, self._reports, protocol.OPERATIONS.index(op), figures.size)
        self._reports += 1
        self._ask([head], [figures])
        return self._answers([figures.size], figures.dtype)[0]

    def _gradients(self, share: float) -> npt.NDArray[Any]:
        """The mean gradient of the own samples, clipped; statistics' changes as they are."""
        trained = self.model.gradients[: self.model.tensors.trainable]
        if share > 0:
            trained /= share
        if self._clip_norm is not None:
            norm = self.model.tensors.norm(trained)
            if norm > self._clip_norm:
                trained *= self._clip_norm / norm
        return super()._gradients(share)
