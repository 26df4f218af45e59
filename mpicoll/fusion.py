"""Gradient synchronisation: many gradients as few buckets, while the backward pass goes on.

    sync = mpicoll.GradientSync(comm, gradients)     # arrays, or shapes: then sync.gradients are the arrays
    for each step:
        backward pass:  sync.ready(i)                # as soon as gradient i is complete
        sync.wait()                                  # now every rank has the mean

Gradients become ready from the last layer to the first. Consecutive ones form a **bucket**; when all of a
bucket are ready, a thread starts its allreduce in compiled code, while Python computes the gradients of the
layers before. The first bucket is small, so that communication begins early. `wait` does what is left.

Where gradients are allocated here they are views of buckets in memory that the node's other ranks reach, and
nothing is packed: the best copy is no copy. Gradients that lie elsewhere are reduced where they are if they
are large, and packed if they are small.

Gradients on a GPU are packed, reduced and unpacked there, beside the kernels of the backward pass: see
`gpu.fusion`.

Every rank starts the buckets in the same order, so a rank whose gradients come in another order waits with
some (`late` names them). After the first step the buckets are made anew, in the order that rank 0 has seen.

Sources: S. Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020
(buckets in reverse order, views); A. Sergeev, M. Del Balso, "Horovod", arXiv:1802.05799 (tensor fusion).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from types import TracebackType
from typing import Any

import ml_dtypes  # noqa: F401  (so that NumPy knows "bfloat16")
import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.calls import AVG
from mpicoll.communicator import Communicator
from mpicoll.compression import Bundle, Codec, Compression, Exchange
from mpicoll.gpu.fusion import GpuArray, OnGpu
from mpicoll.gradients import Gradient, Settings, check, check_agreement, on_all_ranks, parse
from mpicoll.grouped import (
    HOST,
    AnyArray,
    Array,
    Flags,
    Group,
    Piece,
    Place,
    address,
    follows,
    new_bucket,
    pieces,
    reduction_tasks,
)
from mpicoll.kernels.packing import Packing, nonfinite_task, slots
from mpicoll.kernels.reduce import rounds_often
from mpicoll.kernels.tasks import Task
from mpicoll.progress import PythonTask, TaskQueue
from mpicoll.requests import Series
from mpicoll.trace.recorder import recorded
from mpicoll.tune.online import NOT_YET, Trials

FIRST_BUCKET = 1 << 20  # bytes of the first bucket, at most: communication begins early
TRIED_BUCKETS = [1 << 18, 1 << 20, 1 << 22, 1 << 24]  # bytes
TRIALS = 5
ENOUGH = 1.15  # times the least time per byte that a bucket's size may cost

PROBLEMS = MISSING, NONFINITE_BEFORE, NONFINITE_AFTER = range(3)  # of a gradient
NAMED = 10  # gradients that an error names, at most
SENT = {"Allreduce": 2, "Alltoall": 1, "Allgather": 1}  # portions of (p - 1)/p of the data, for p ranks


@dataclass(frozen=True)
class Bucket:
    """Gradients that are reduced together: their numbers, ascending, and their dtype."""

    members: tuple[int, ...]
    dtype: np.dtype[Any]


def assign(
    nbytes: Sequence[int], dtypes: Sequence[np.dtype[Any]], order: Sequence[int], limits: tuple[int, int]
) -> list[Bucket]:
    """Buckets of gradients that follow each other in ``order``, the one that is complete first coming first.

    ``limits``: bytes from which on a bucket is closed, of the first and of the others.
    """
    closed: list[list[int]] = []
    open_: dict[np.dtype[Any], list[int]] = {}
    filled: dict[np.dtype[Any], int] = {}  # bytes
    for i in order:
        open_.setdefault(dtypes[i], []).append(i)
        filled[dtypes[i]] = filled.get(dtypes[i], 0) + nbytes[i]
        if filled[dtypes[i]] >= limits[bool(closed)]:
            closed.append(open_.pop(dtypes[i]))
            del filled[dtypes[i]]
    place = {i: position for position, i in enumerate(order)}
    buckets = sorted([*closed, *open_.values()], key=lambda bucket: place[bucket[-1]])
    return [Bucket(tuple(sorted(bucket)), dtypes[bucket[0]]) for bucket in buckets]


def tune_bucket_bytes(comm: Communicator, place: Place = HOST) -> int:
    """Bytes of the smallest bucket that is reduced about as quickly, byte for byte, as larger ones;
    collective.

    Measured, in a tenth of a second or so: the median of a few allreduces of each size, of the slowest rank.
    """
    costs = []
    whole = place.bucket(max(TRIED_BUCKETS) // 4, np.float32)
    for nbytes in TRIED_BUCKETS:
        data = whole[: nbytes // 4]
        times = []
        for _ in range(TRIALS):
            comm.Barrier()
            start = perf_counter()
            comm.Allreduce(MPI.IN_PLACE, data)
            place.finish()
            times.append(perf_counter() - start)
        costs.append(comm.allreduce(median(times), MPI.MAX) / nbytes)
    place.forget()
    return next(n for n, cost in zip(TRIED_BUCKETS, costs, strict=True) if cost <= ENOUGH * min(costs))


class GradientSync:
    """Sums or averages gradients over the ranks of ``comm``, in buckets, beside the backward pass.

    ``gradients``: contiguous arrays that are reduced in place (NumPy, PyTorch, whatever has a buffer; or all
    on one GPU: CuPy, PyTorch, Numba), or shapes, for which arrays of ``dtype`` are allocated on the host: use
    them as ``sync.gradients``. A mapping gives names, too; so does ``names``. Making one is collective; where
    ranks disagree all get a ValueError that names the gradient.

    For a gradient on a GPU, `ready` says that what completes it has been put on the stream on which its
    library works at that moment. After `wait` all these streams go on when the gradients are reduced; the
    program itself waits for the GPU only if ``nonfinite`` lets it look.

    - ``average``: the mean over ranks (for floats), else the sum; times ``scale``.
    - ``wire_dtype``: the dtype that gradients travel in, such as "bfloat16"; 16-bit sums are accumulated in
      float32.
    - ``compression``: one of `mpicoll.compression`, for float32 on the host.
    - ``bucket_bytes``: the size of a bucket; measured if not given.
    - ``order``: the numbers of the gradients as they become ready; by default the last is the first.
    - ``nonfinite``: what a NaN or infinity does: "pass" (nobody looks), "raise" (FloatingPointError on all
      ranks, with the gradient's name and the rank), or "skip" (`wait` returns false on all ranks).
    - ``unused``: what a gradient does that was not ready before `wait`: "raise" (RuntimeError on all ranks),
      or "zero" (it counts as zeros).
    - ``overlap``: whether a thread communicates beside the program; else `wait` does all. By default it does
      between nodes, and on one node if there are two cores for each rank: in shared memory communication is
      work for a core, which a program that computes on it cannot spare. Set it where a device computes; for
      gradients on a GPU it is set. Where gradients travel in messages, or are on a GPU, it takes
      MPI_THREAD_MULTIPLE.
    - ``algorithm``: of the allreduce, as for ``comm.Allreduce``.
    - ``tune``: whether the first steps try algorithms, and each bucket keeps the best, where gradients travel
      in messages: see `mpicoll.tune.online`. ``sync.tuning`` says what came of it, or why there is no choice.

    After an error of the communication (a rank that has ended, see `mpicoll.faults`) make a new one.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        gradients: Mapping[str, Any] | Sequence[Any],
        *,
        names: Sequence[str] | None = None,
        dtype: npt.DTypeLike = np.float32,
        average: bool = True,
        scale: float = 1.0,
        wire_dtype: npt.DTypeLike | None = None,
        compression: Compression | None = None,
        bucket_bytes: int | None = None,
        order: Sequence[int] | None = None,
        nonfinite: str = "pass",
        unused: str = "raise",
        overlap: bool | None = None,
        algorithm: str | None = None,
        tune: bool = False,
    ) -> None:
        with on_all_ranks(comm):
            self._settings = Settings.of(
                average=average,
                scale=scale,
                wire_dtype=wire_dtype,
                compression=compression,
                bucket_bytes=bucket_bytes,
                order=order,
                nonfinite=nonfinite,
                unused=unused,
                algorithm=algorithm,
                tune=tune,
            )
            parsed = parse(gradients, names, np.dtype(dtype))
            check(parsed, self._settings)
        check_agreement(comm, parsed, self._settings)
        self._comm = comm if isinstance(comm, Communicator) else Communicator(comm)
        self._frees_comm = self._comm is not comm
        self._factor = self._settings.scale / comm.size if average else self._settings.scale
        self._synchronises = True
        self._series = self._comm.series()
        given = [gradient.array for gradient in parsed if gradient.array is not None]
        on_gpu = [array for array in given if isinstance(array, GpuArray)]
        self._place: Place = OnGpu(on_gpu, [f"gradient {g.name!r}" for g in parsed]) if on_gpu else HOST
        spare = self._place.has_spare_cores or self._series.has_spare_cores
        self._overlap = (spare if overlap is None else overlap) and comm.size > 1
        recorder = recorded(self._comm)
        self._stamped = recorder.stamped() if recorder is not None else _as_they_are
        self._lay_out(parsed, given)
        if recorder is not None:
            recorder.watch(self, "wait", "gradients: wait")

    # -- setting up

    def _lay_out(self, parsed: Sequence[Gradient], given: Sequence[AnyArray]) -> None:
        """Find or make the arrays, and all that reduces them."""
        self.names = [gradient.name for gradient in parsed]
        self._numbers = {name: i for i, name in enumerate(self.names)}
        self._dtypes = [gradient.dtype for gradient in parsed]
        self._nbytes = [int(np.prod(g.shape, dtype=np.int64)) * g.dtype.itemsize for g in parsed]
        self._order = self._settings.order or tuple(reversed(range(len(parsed))))
        self._limit = self._bucket_limit()
        self.buckets = self._assign(self._order)
        self._allocated: dict[Bucket, Array] = {}
        self._arrays: Sequence[AnyArray] = given or self._allocate(parsed)
        self.gradients: list[Any] = [a.owner if isinstance(a, GpuArray) else a for a in self._arrays]
        pairs = zip(self._arrays[1:], self._arrays, strict=False)
        joined = np.array([False, *(follows(array, previous) for array, previous in pairs)])
        self._comm.Allreduce(MPI.IN_PLACE, joined, MPI.LAND)
        self._joined = joined.tolist()
        learns = self._settings.order is None and not self._allocated and self._settings.compression is None
        self._observed: list[int] | None = [] if learns and len(self.buckets) > 1 else None
        self.late: list[str] = []  # gradients that held complete buckets up in the last step
        self._late: list[str] = []
        reason = self._without_choice()
        self.tuning = "" if not self._settings.tune else f"none: {reason}" if reason else NOT_YET
        self._trials: Trials | None = None
        if self._observed is None:
            self._begin_trials()
        self._make_tasks()

    def _bucket_limit(self) -> int:
        if self._settings.bucket_bytes is not None:
            return self._settings.bucket_bytes
        if sum(self._nbytes) <= FIRST_BUCKET:
            return FIRST_BUCKET
        return tune_bucket_bytes(self._comm, self._place)

    def _assign(self, order: Sequence[int]) -> list[Bucket]:
        return assign(self._nbytes, self._dtypes, order, (min(self._limit, FIRST_BUCKET), self._limit))

    def _allocate(self, parsed: Sequence[Gradient]) -> list[Array]:
        """Gradients as views of buckets."""
        views: dict[int, Array] = {}
        for bucket in self.buckets:
            members = [parsed[i] for i in bucket.members]
            counts = [self._nbytes[i] // bucket.dtype.itemsize for i in bucket.members]
            begins, count = slots(counts, bucket.dtype.itemsize)
            self._allocated[bucket] = whole = new_bucket(count, bucket.dtype)
            for i, gradient, begin, length in zip(bucket.members, members, begins, counts, strict=True):
                views[i] = whole[begin : begin + length].reshape(gradient.shape)
        return [views[i] for i in range(len(parsed))]

    def _make_tasks(self) -> None:
        n = len(self.names)
        self._problems, self._agreed = (new_bucket(3 * n, np.int32).reshape(3, n) for _ in range(2))
        looks = self._settings.nonfinite != "pass"
        found = self._problems[NONFINITE_BEFORE:].reshape(-1)
        flags_at = self._place.flags(found) if looks else found
        self._flag_of = [0] * n  # where in a row of these a gradient's flag is
        self.codecs: list[Codec] = []
        tasks: list[Task] = []
        ends = []
        flagged = 0
        for b, bucket in enumerate(self.buckets):
            end = flagged + len(bucket.members)
            flags = Flags(flags_at[flagged:end], flags_at[n + flagged : n + end])
            algorithm = self._settings.algorithm if self._trials is None else self._trials.algorithm(b)
            made, members = self._bucket_tasks(bucket, flags if looks else None, algorithm)
            if self._trials is not None:
                made = self._trials.timed(b, made, self._series)
            for position, member in enumerate(members):
                self._flag_of[member] = flagged + position
            flagged += len(members)
            tasks += self._stamped([*self._place.input_task(b), *made], self._series)
            ends.append(len(tasks))
        self._ends = ends
        if looks:
            tasks += self._place.collect_task(found)
        agreement = self._series.tasks("allreduce", self._problems, self._agreed, MPI.MAX)
        tasks += self._stamped(agreement, self._series)
        self._bucket_of = {i: b for b, bucket in enumerate(self.buckets) for i in bucket.members}
        threaded = self._overlap and self._series.may_have_a_thread()
        keep = (list(self._series.calls), self._arrays, self._problems, self._agreed)
        self._queue = TaskQueue(tasks, keep, threaded, self._series.give_up)
        self._begin_step()

    def _bucket_tasks(
        self, bucket: Bucket, flags: Flags | None, algorithm: str | None
    ) -> tuple[list[Task], tuple[int, ...]]:
        """What reduces a bucket, and its members in the order of ``flags``."""
        if bucket in self._allocated:
            parts = [Piece(bucket.members, self._allocated[bucket])]
        else:
            parts = pieces(self._arrays, bucket.members, self._joined, self._place)
        if self._settings.compression is not None:
            return self._compressed(self._settings.compression, bucket, parts, flags), bucket.members
        least = self._place.least(self._series.channel is not None)
        group = Group(self._arrays, parts, self._settings.wire_dtype or bucket.dtype, least, self._place)
        return group.tasks(partial(self._reduction, algorithm=algorithm), flags), group.members

    def _reduction(self, array: AnyArray, algorithm: str | None) -> list[Task]:
        """The reduction of a flat array, in place."""
        if self._comm.size == 1:
            return [] if self._factor == 1 else [self._place.scale_task(array, self._factor)]
        if self._factor == 1 and not self._settings.average:
            return reduction_tasks(self._series, array, MPI.SUM, None, algorithm)
        return reduction_tasks(self._series, array, AVG, self._factor, algorithm)

    def _compressed(
        self, compression: Compression, bucket: Bucket, parts: Sequence[Piece], flags: Flags | None
    ) -> list[Task]:
        arrays = [self.gradients[i] for i in bucket.members]
        begins, count = slots([array.size for array in arrays], bucket.dtype.itemsize)
        before, after = [], []
        if len(parts) == 1:
            data = parts[0].data
            begins = [(address(array) - address(data)) // bucket.dtype.itemsize for array in arrays]
            after = _gaps_task(data, arrays, begins)
        else:
            data = new_bucket(count, bucket.dtype)
            packing = Packing(arrays, data)
            before, after = [packing.pack_task()], [packing.unpack_task()]
        shapes = [array.shape for array in arrays]
        rank, nranks = self._comm.rank, self._comm.size
        codec = compression.bind(Bundle(data, shapes, begins, rank, nranks, self._factor, new_bucket))
        self.codecs.append(codec)
        stages = [task for stage in codec.stages for task in self._stage_tasks(stage)]
        if flags is not None:
            before = [nonfinite_task(arrays, flags.before), *before]
            after = [*after, nonfinite_task(arrays, flags.after)]
        return [*before, *stages, *after]

    def _stage_tasks(self, stage: Any) -> list[Task]:
        if not isinstance(stage, Exchange):
            return [PythonTask(stage).task]
        if stage.collective == "Allreduce":
            return reduction_tasks(self._series, stage.recv, algorithm=self._settings.algorithm)
        return self._series.tasks(stage.collective.lower(), stage.send, stage.recv)

    # -- at work

    def _begin_step(self) -> None:
        self._ready = [False] * len(self.names)
        self._left = [len(bucket.members) for bucket in self.buckets]
        self._head = 0  # the first bucket that is not complete
        self._problems[:] = 0

    def ready(self, gradient: int | str) -> None:
        """The gradient of this number, or name, is complete: it may be reduced from now on.

        Raises RuntimeError if it has been ready before in this step, ValueError if there is none such.
        """
        i = self._number(gradient)
        if not self._synchronises:
            return
        if self._ready[i]:
            raise RuntimeError(
                f"gradient {self.names[i]!r} was marked ready twice in one step on rank {self._comm.rank}; "
                "call wait() after each backward pass, or use no_sync() to accumulate"
            )
        self._ready[i] = True
        self._place.ready(i)
        if self._observed is not None:
            self._observed.append(i)
        b = self._bucket_of[i]
        self._left[b] -= 1
        if b == self._head and self._left[b] == 0:
            self._release(i)

    def _number(self, gradient: int | str) -> int:
        try:
            i = self._numbers[gradient] if isinstance(gradient, str) else operator.index(gradient)
        except (KeyError, TypeError):
            i = -1
        if not 0 <= i < len(self.names):
            raise ValueError(
                f"gradient: expected a name or a number below {len(self.names)}, got {gradient!r}"
            )
        return i

    def _release(self, last: int) -> None:
        """Let the buckets be reduced that are complete now that ``last`` is."""
        before = self._head
        while self._head < len(self.buckets) and self._left[self._head] == 0:
            self._head += 1
        if self._head > before + 1:
            self._late.append(self.names[last])  # complete buckets had to wait for it
        # What remains is for `wait`, which comes soon: to hand a little over to a thread costs more than it.
        self._place.complete(range(before, self._head))
        worth = self._head < len(self.buckets) or self._nbytes_of(self.buckets[-1]) >= FIRST_BUCKET
        self._queue.release(self._ends[self._head - 1], wake=worth)

    def _nbytes_of(self, bucket: Bucket) -> int:
        return sum(self._nbytes[i] for i in bucket.members)

    def wait(self) -> bool:
        """Complete the step: all gradients are reduced, the same bits on every rank; collective.

        False if the step is to be skipped, which is so on all ranks: something was not finite, with
        ``nonfinite="skip"``. Within `no_sync` nothing is done, and false returned.
        """
        if not self._synchronises:
            return False
        for i in [i for i, ready in enumerate(self._ready) if not ready]:
            if self._settings.unused == "zero":
                self.gradients[i][...] = 0
            else:
                self._problems[MISSING, self._flag_of[i]] = 1
            self._place.ready(i)
        self._place.complete(range(self._head, len(self.buckets)))
        self._queue.finish()
        self._place.end()
        own = self._problems[:, self._flag_of].tolist() if self._agreed.any() else None
        self.late, self._late = self._late, []
        self._begin_step()
        if self._observed is not None:
            self._learn_order()
        else:
            self._try_next()
        return True if own is None else self._judge(own)

    @property
    def bytes_sent_per_step(self) -> float:
        """What a rank sends to others in each step, at the least and on average over ranks."""
        itemsizes = [(self._settings.wire_dtype or bucket.dtype).itemsize for bucket in self.buckets]
        counts = [self._nbytes_of(bucket) // bucket.dtype.itemsize for bucket in self.buckets]
        nbytes = SENT["Allreduce"] * sum(a * b for a, b in zip(counts, itemsizes, strict=True))
        if self.codecs:
            stages = [stage for codec in self.codecs for stage in codec.stages]
            exchanges = [stage for stage in stages if isinstance(stage, Exchange)]
            nbytes = sum(SENT[exchange.collective] * exchange.recv.nbytes for exchange in exchanges)
        return nbytes * (self._comm.size - 1) / self._comm.size

    def ready_all(self) -> None:
        """All gradients that are not yet are ready, in the expected order."""
        for i in self._order:
            if not self._ready[i]:
                self.ready(i)

    def _learn_order(self) -> None:
        """Make buckets in the order in which rank 0 has seen gradients become ready, if that differs."""
        observed, self._observed = self._observed or [], None
        unseen = set(self._order) - set(observed)
        self._order = self._comm.bcast((*observed, *(i for i in self._order if i in unseen)))
        before, self.buckets = self.buckets, self._assign(self._order)
        self._begin_trials()
        if self.buckets != before or self._trials is not None:
            self._remake_tasks()

    def _remake_tasks(self) -> None:
        self._queue.close()
        self._series.calls.clear()
        self._place.forget()
        self._make_tasks()

    def _without_choice(self) -> str:
        """Why all algorithms come to the same; empty if they do not."""
        if self._comm.size == 1:
            return "there is one rank"
        if self._place is not HOST:
            return "gradients on a GPU have a transport of their own"
        if self._settings.compression is not None:
            return "compressed gradients travel in their own way"
        if self._series.maker.on_one_node:
            return "the ranks share memory, in which there is one way"
        wire = [self._settings.wire_dtype or bucket.dtype for bucket in self.buckets]
        op = "AVG" if self._settings.average or self._factor != 1 else "SUM"
        if all(rounds_often(op, dtype, self._comm.size) for dtype in wire):
            return "16-bit floats are summed in one way"
        return ""

    def _begin_trials(self) -> None:
        """Try algorithms from the next step on, if that is wanted and there is a choice."""
        if self._settings.tune and not self._without_choice():
            self._trials = Trials(len(self.buckets))

    def _try_next(self) -> None:
        """After a step: turn to the next algorithm if this one has been tried for long enough."""
        if self._trials is not None and self._trials.end_step(self._comm):
            self.tuning = self._trials.outcome
            self._remake_tasks()

    def _judge(self, own: list[list[int]]) -> bool:
        """What comes of problems on any rank; ``own`` are this rank's, each with a flag for each gradient."""
        mine = [[name for name, flag in zip(self.names, flags, strict=True) if flag] for flags in own]
        everyones = self._comm.allgather(mine)
        missing, before, after = (
            [(rank, name) for rank, names in enumerate(everyones) for name in names[problem]]
            for problem in PROBLEMS
        )
        if missing:
            raise RuntimeError(
                f"gradients never marked ready in this step: {_on_ranks(missing)}; what wait() has summed "
                "for them is of no use. unused='zero' lets them count as zeros"
            )
        if self._settings.nonfinite == "skip":
            return False
        if before:
            raise FloatingPointError(f"NaN or infinity in gradients: {_on_ranks(before)}")
        names = ", ".join(repr(name) for rank, name in after if rank == 0)
        raise FloatingPointError(f"gradients that are finite on every rank have sums that are not: {names}")

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients: in this block `ready` and `wait` do nothing. On all ranks alike."""
        before, self._synchronises = self._synchronises, False
        try:
            yield
        finally:
            self._synchronises = before

    def close(self) -> None:
        """End the thread, and give up what was allocated beside the gradients. Collective."""
        self._queue.close()
        self._series.calls.clear()
        self._series.close()
        self._place.close()
        if self._frees_comm:
            self._comm.Free()
            self._frees_comm = False

    def __enter__(self) -> GradientSync:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # the other ranks may be waiting for this one: they learn what it met
            self._series.give_up(error)
            self._queue.close()


def _as_they_are(tasks: list[Task], series: Series) -> list[Task]:
    """Tasks whose times nobody records."""
    return tasks


def _gaps_task(data: Array, arrays: Sequence[Array], begins: Sequence[int]) -> list[Task]:
    """Zeros where no array lies: what a codec leaves there would be a gradient in the next step."""
    unused = np.ones(data.size, bool)
    for array, begin in zip(arrays, begins, strict=True):
        unused[begin : begin + array.size] = False
    gaps = np.flatnonzero(unused)
    return [PythonTask(partial(np.put, data, gaps, 0)).task] if gaps.size else []


def _on_ranks(found: Sequence[tuple[int, str]]) -> str:
    """Names, and the ranks of each."""
    ranks: dict[str, list[int]] = {}
    for rank, name in found:
        ranks.setdefault(name, []).append(rank)
    shown = [f"{name!r} on rank {', '.join(map(str, where))}" for name, where in ranks.items()]
    more = f" and {len(shown) - NAMED} more" if len(shown) > NAMED else ""
    return "; ".join(shown[:NAMED]) + more
