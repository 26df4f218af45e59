"""Many arrays reduced together: where they lie, and the tasks that reduce them.

Large pieces of memory are reduced where they are; small ones are packed into a bucket, which the node's other
ranks can read, and unpacked again:

    [a........] [b..] [c.] [d...........]          a, d large: allreduce in place
                pack -> [b..|c.] -> allreduce -> unpack

Arrays that are cast, to travel in another dtype, are all packed. All this is alike for arrays of the host and
of a GPU; what is not, a `Place` knows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.buffers import Dtype, host_data
from mpicoll.calls import SHARED, CallMaker, Operation, operation_name
from mpicoll.fastcalls import described
from mpicoll.gpu.fusion import GpuArray, OnGpu
from mpicoll.gpu.memory import on_gpu
from mpicoll.kernels.packing import Packing, nonfinite_task, slots
from mpicoll.kernels.reduce import DTYPES, rounds_often, scale_task, sum_rows_task
from mpicoll.kernels.tasks import Task
from mpicoll.progress import TaskQueue
from mpicoll.requests import Series
from mpicoll.schedule import chunk_bounds
from mpicoll.transports.arena import ArenaError, new_array
from mpicoll.transports.shared import Channel
from mpicoll.tuning import loose_from

Array = npt.NDArray[Any]
AnyArray = Any  # an Array, or a GpuArray: always the same of the two in one call

MAX_LISTS = 16  # of arrays, for which what was prepared is kept


def new_bucket(count: int, dtype: npt.DTypeLike) -> Array:
    """Zeros that the other ranks of the node can read, if that is possible."""
    try:
        return new_array(count, dtype)
    except (ArenaError, MemoryError):
        return np.zeros(count, dtype)


def address(array: AnyArray) -> int:
    """Where an array begins."""
    return array.address if isinstance(array, GpuArray) else int(array.__array_interface__["data"][0])


class _Memory:
    """Bytes at an address, for NumPy; ``owner`` lives as long as the arrays made of them."""

    def __init__(self, begin: int, nbytes: int, owner: Any) -> None:
        self.owner = owner
        interface = {"version": 3, "data": (begin, False), "shape": (nbytes,), "typestr": "|u1"}
        self.__array_interface__ = interface


def memory(begin: int, nbytes: int, dtype: np.dtype[Any], owner: Any = None) -> Array:
    """The elements at an address, as a flat array."""
    return np.asarray(_Memory(begin, nbytes, owner)).view(dtype)


def follows(array: AnyArray, other: AnyArray) -> bool:
    """Whether an array begins where another ends."""
    return bool(array.dtype == other.dtype and address(array) == address(other) + other.nbytes)


@dataclass(frozen=True)
class Piece:
    """Arrays that lie in one piece of memory: their numbers, and all of it as one flat array."""

    members: tuple[int, ...]
    data: AnyArray


def _flat(arrays: Sequence[Array]) -> Array:
    """Arrays that lie one behind the other, as one."""
    nbytes = sum(array.nbytes for array in arrays)
    return memory(address(arrays[0]), nbytes, arrays[0].dtype, list(arrays))


class OnHost:
    """How arrays in the host's memory are reduced; `gpu.fusion.OnGpu` says it for those on a GPU."""

    has_spare_cores = False  # whatever there is computes
    bucket = staticmethod(new_bucket)
    flat = staticmethod(_flat)
    least = staticmethod(loose_from)
    packing = staticmethod(Packing)
    nonfinite_task = staticmethod(nonfinite_task)
    scale_task = staticmethod(scale_task)

    def flags(self, host: Array) -> Array:
        """What kernels write in place of these."""
        return host

    def input_task(self, bucket: int) -> list[Task]:
        """What waits until the bucket of this number is complete."""
        return []

    def collect_task(self, host: Array) -> list[Task]:
        """What brings the `flags` to ``host``."""
        return []

    def ready(self, i: int) -> None:
        """Array i is complete."""

    def complete(self, buckets: range) -> None:
        """The tasks of these buckets may be done."""

    def end(self) -> None:
        """All tasks are done."""

    def finish(self) -> None:
        """Wait until all that has been ordered is done."""

    def forget(self) -> None:
        """Nobody uses a bucket any more."""

    def close(self) -> None:
        """Give everything back."""


HOST = OnHost()
Place = OnHost | OnGpu


def pieces(
    arrays: Sequence[AnyArray], members: Sequence[int], joined: Sequence[bool], place: Place = HOST
) -> list[Piece]:
    """Those of ``arrays`` that ``members`` numbers, ascending, in as few pieces as can be.

    ``joined[i]`` says that array i begins where array i - 1 ends, on all ranks: they must come to the same.
    """
    groups: list[list[int]] = []
    for i in members:
        if groups and joined[i] and groups[-1][-1] == i - 1:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [Piece(tuple(group), place.flat([arrays[i] for i in group])) for group in groups]


class Flags(NamedTuple):
    """For each of some arrays an int32 that becomes 1 if it is not finite, before it is reduced and after."""

    before: AnyArray
    after: AnyArray

    def split(self, at: int) -> tuple[Flags, Flags]:
        """Those of the first ``at`` arrays, and those of the others."""
        return Flags(self.before[:at], self.after[:at]), Flags(self.before[at:], self.after[at:])


class Group:
    """Arrays of one dtype that are reduced together in place: the ``parts`` of ``arrays``.

    ``travels`` is the dtype that they travel in, ``least`` the bytes of a piece from which on it is reduced
    by itself. ``members`` has the arrays' numbers, in the order in which flags for them lie.
    """

    def __init__(
        self,
        arrays: Sequence[AnyArray],
        parts: Sequence[Piece],
        travels: np.dtype[Any],
        least: int,
        place: Place = HOST,
    ) -> None:
        self._place = place
        cast = any(part.data.dtype != travels for part in parts)
        self.loose: list[Piece] = []
        rest: list[Piece] = []
        for part in parts:
            alone = not cast and (len(parts) == 1 or part.data.nbytes >= least)
            (self.loose if alone else rest).append(part)
        loose, packed = ([i for part in some for i in part.members] for some in (self.loose, rest))
        self.members = (*loose, *packed)
        self._loose, self._packed = ([arrays[i] for i in numbers] for numbers in (loose, packed))
        count = slots([array.size for array in self._packed], travels.itemsize)[1]
        self._bucket: AnyArray | None = place.bucket(count, travels) if packed else None

    def tasks(self, reduce: Callable[[AnyArray], list[Task]], flags: Flags | None = None) -> list[Task]:
        """``reduce`` makes the tasks that reduce a flat array in place; ``flags`` are the ``members``'s."""
        on_loose, on_packed = (None, None) if flags is None else flags.split(len(self._loose))
        found = [task for part in self.loose for task in reduce(part.data)]
        if on_loose is not None and self._loose:
            before, after = (self._place.nonfinite_task(self._loose, each) for each in on_loose)
            found = [before, *found, after]
        if self._bucket is None:
            return found
        packing, inside = self._place.packing(self._packed, self._bucket), reduce(self._bucket)
        before, after = (None, None) if on_packed is None else on_packed
        return [*found, packing.pack_task(1, before), *inside, packing.unpack_task(1, after)]


def reduction_tasks(
    series: Series,
    array: AnyArray,
    op: Operation = MPI.SUM,
    factor: float | None = None,
    algorithm: str | None = None,
    mark: int = 0,
) -> list[Task]:
    """The allreduce of a flat array, in place; see `Series.tasks`.

    16-bit floats are summed in float32, and also in messages travel in 16 bits.
    """
    given: dict[str, Any] = {} if algorithm is None else {"algorithm": algorithm}
    if isinstance(array, GpuArray):
        return series.tasks("allreduce", MPI.IN_PLACE, array, op, factor=factor, **given)
    name = operation_name(op)
    shared = series.maker.choose("allreduce", algorithm, array.nbytes) == SHARED
    alone = series.maker.nranks == 1
    if (
        alone
        or shared
        or name not in ("SUM", "AVG")
        or not rounds_often(name, array.dtype, series.maker.nranks)
    ):
        return series.tasks("allreduce", MPI.IN_PLACE, array, op, factor=factor, mark=mark, **given)
    if name == "AVG" and factor is None:
        factor = 1 / series.maker.nranks
    return _sum_of_halves(series, array, factor)


def _sum_of_halves(series: Series, array: Array, factor: float | None) -> list[Task]:
    """Each rank sums one slice: an alltoall, a sum that is rounded once, an allgather.

    For n elements and p ranks a rank sends 4 n (p-1)/p bytes, half of what float32 would take.
    """
    rank, nranks = series.maker.rank, series.maker.nranks
    bounds = chunk_bounds(array.size, nranks, array.itemsize)
    own = array[bounds[rank] : bounds[rank + 1]]
    rows = np.zeros((nranks, own.size), array.dtype)
    # MPI knows no bfloat16, and not every library float16: what travels is bits.
    bits, received = array.view(np.uint16), rows.view(np.uint16).reshape(-1)
    counts, begins = np.diff(bounds).tolist(), bounds[:-1].tolist()
    equal = [own.size] * nranks, [rank * own.size for rank in range(nranks)]
    return [
        *series.tasks("alltoallv", [bits, counts, begins], [received, *equal]),
        sum_rows_task(rows, own, factor),
        *series.tasks("allgatherv", MPI.IN_PLACE, [bits, counts, begins]),
    ]


class ManyCalls:
    """The lists of arrays that one communicator reduces again and again."""

    def __init__(self, maker: CallMaker, channel: Channel | None, tag: int) -> None:
        self._series = Series(maker, channel, tag)
        self._queues: OrderedDict[Any, TaskQueue] = OrderedDict()

    def find(self, arrays: Sequence[Any], op: Operation, algorithm: str | None) -> TaskQueue | None:
        """What reduces these arrays in place; None for arrays on a GPU, or an ``op`` that is a user's own."""
        name = operation_name(op)
        if name is None:
            return None
        looks = described(arrays)
        if looks is None and any(map(on_gpu, arrays)):
            return None
        if looks is None:
            arrays = [host_data(array, f"arrays[{i}]", writable=True).array for i, array in enumerate(arrays)]
            looks = described(arrays) or repr([_look(array) for array in arrays]).encode()
        key = (name, algorithm, looks)
        if key not in self._queues:
            self._queues[key] = self._queue(arrays, op, algorithm)
            if len(self._queues) > MAX_LISTS:
                self._queues.popitem(last=False)
        self._queues.move_to_end(key)
        return self._queues[key]

    def _queue(self, arrays: Sequence[Array], op: Operation, algorithm: str | None) -> TaskQueue:
        names = [f"arrays[{i}]" for i in range(len(arrays))]
        for array, argument in zip(arrays, names, strict=True):
            host_data(array, argument, writable=True)
            check_dtype(array.dtype, argument)
        check_apart(arrays, names)
        # The arrays are the caller's; what is kept must not keep them alive.
        views = [memory(address(array), array.nbytes, array.dtype) for array in arrays]
        least = loose_from(self._series.channel is not None)
        tasks: list[Task] = []
        # Equally long buckets may be packed from different arrays; the ranks of a node compare this, too.
        layout = crc32(repr([(array.size, str(array.dtype)) for array in arrays]).encode())
        for dtype in dict.fromkeys(array.dtype for array in arrays):
            members = [i for i, array in enumerate(views) if array.dtype == dtype]
            parts = pieces(views, members, [False] * len(views))
            reduce = partial(reduction_tasks, self._series, op=op, algorithm=algorithm, mark=layout)
            tasks += Group(views, parts, dtype, least).tasks(reduce)
        calls, self._series.calls = self._series.calls, []
        return TaskQueue(tasks, calls, False, self._series.give_up)


_look = attrgetter("dtype", "size", "flags.num", "ctypes.data")


def check_dtype(dtype: Dtype, argument: str) -> None:
    """Raise TypeError, naming the argument, for a dtype that nothing is reduced in."""
    if dtype not in DTYPES:
        raise TypeError(f"{argument}: expected numbers, got {dtype}")


def check_apart(arrays: Sequence[AnyArray], names: Sequence[str]) -> None:
    """Raise ValueError, naming them, if any two arrays have memory in common."""
    ordered = sorted((address(array), i) for i, array in enumerate(arrays) if array.size)
    for (begin, i), (after, j) in pairwise(ordered):
        if after < begin + arrays[i].nbytes:
            shared, other = names[max(i, j)], names[min(i, j)]
            raise ValueError(f"{shared}: expected memory of its own, got some of {other}")
