"""A process group of `torch.distributed` whose collectives are a `Communicator`'s.

Each collective has torch's own signature, in which `torch.distributed` and DDP's C++ call it: lists of
tensors, and options with the operation, the root and whether the program goes on meanwhile (``asyncOp``).
Arguments are checked at once; what goes wrong later is raised by ``wait()``.

Source of the interface: ``torch.distributed.ProcessGroup``.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from sys import getrefcount
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch._C import _distributed_c10d as _c10d

from mpicoll.communicator import Communicator
from mpicoll.faults import FAULTS
from mpicoll.torch.backward import EndOfPass
from mpicoll.torch.cuda import Ordered
from mpicoll.torch.messages import Messages
from mpicoll.torch.tensors import (
    Reduction,
    Tensor,
    check_pair,
    checked,
    is_plain,
    joined,
    memory,
    plain,
    premultiplied,
    put_back,
    raw,
    reduction,
    same_kind,
    written_parts,
)
from mpicoll.torch.work import Done, Line, Work

NAME = "mpicoll"

# DDP's `join` keeps the work of one number in C++, which keeps nothing of what is Python about it. So that is
# kept here, of the last works that have small results.
KEPT, SMALL = 64, 64  # works, bytes

ALONE = 2  # references to what one attribute has, as getrefcount sees it
SMALL_MEMORY = 65536  # bytes: what may wait to be freed until the next collective

# What torch passes if it wants nothing special.
_ALL_TO_ALL = _c10d.AllToAllOptions()
_ALLGATHER = _c10d.AllgatherOptions()
_ALLREDUCE = _c10d.AllreduceOptions()
_ALLREDUCE_COALESCED = _c10d.AllreduceCoalescedOptions()
_BARRIER = _c10d.BarrierOptions()
_BROADCAST = _c10d.BroadcastOptions()
_GATHER = _c10d.GatherOptions()
_REDUCE = _c10d.ReduceOptions()
_REDUCE_SCATTER = _c10d.ReduceScatterOptions()
_SCATTER = _c10d.ScatterOptions()


class ProcessGroup(dist.ProcessGroup):
    """The ranks of ``comm``, which belongs to the group. Collective over them."""

    supports_splitting = True  # torch asks these of a group's backend, which this group is itself
    supports_coalescing = False
    options: Any = None

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm.rank, comm.size)
        self.comm = comm
        self._rank, self._size = comm.rank, comm.size
        self._line = Line(NAME)
        self._end_of_pass = EndOfPass(self._line.finish)
        self._messages = Messages(comm)
        self._name = self._desc = "undefined"
        self._splits = 0
        self._done = Done(())
        self._coalesced: list[Work] | None = None
        self._kept: deque[Work] = deque(maxlen=KEPT)

    # -- what torch asks of a group

    def getBackendName(self) -> str:
        return NAME

    def name(self) -> str:
        return NAME

    def getGroupName(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    setGroupName = _set_group_name

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_desc(self, desc: str) -> None:
        self._desc = desc

    @property
    def group_desc(self) -> str:
        return self._desc

    @property
    def _device_types(self) -> list[torch.device]:
        cuda = [torch.device("cuda")] if torch.cuda.is_available() else []
        return [torch.device("cpu"), *cuda]

    def _get_backend(self, device: torch.device) -> ProcessGroup:
        return self

    def set_timeout(self, timeout: timedelta) -> None:
        """Collectives that make no progress for so long are errors from now on."""
        self.comm.timeout = timeout.total_seconds()

    def _wait_for_pending_works(self) -> None:
        self._line.finish()

    def shutdown(self) -> None:
        """Free the communicator; collective, unless a collective has failed."""
        self._line.end()
        with suppress(*FAULTS):  # of a rank that does not shut down: nothing is to come any more
            self.comm.Free()

    def abort(self) -> None:
        """Let no other rank wait for this one; they get a `RankFailedError`."""
        self._line.end()
        self.comm.give_up(RuntimeError("the process group was aborted"))

    def split_group(
        self,
        ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Any = None,
    ) -> ProcessGroup | None:
        """A group of some of this group's ranks, in this order; collective over those."""
        self._splits += 1
        if self._rank not in ranks:
            return None
        group = ProcessGroup(subset(self.comm, ranks, timeout, group_name or ""))
        group._set_group_name(group_name or "undefined")
        group._set_group_desc(group_desc or "undefined")
        return group

    splitGroup = split_group

    def comm_split_count(self) -> int:
        return self._splits

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        """Whether tensors may lie in memory of the group's own."""
        return False

    def eager_connect_single_device(self, device: torch.device) -> None:
        """All ranks are connected already."""

    def _set_sequence_number_for_group(self) -> None:
        """Our communicators count for themselves."""

    # -- how all is done

    def run(self, run: Callable[[], None], tensors: Sequence[Tensor]) -> Work:
        """Work of one's own on `comm`, in line with the collectives; ``tensors`` are its result."""
        return self._do(tensors, True, run)

    def _do(
        self, tensors: Sequence[Tensor], asynchronous: bool, run: Callable[..., None], *given: Any
    ) -> Work:
        """``run(*given)``, whose result are ``tensors``."""
        if not asynchronous:
            self._line.do(run, *given)
            return self._done_at_once(tensors)
        if given:
            run = partial(run, *given)
        on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
        work = Work(self._line, run, tensors, Ordered(run, on_gpu) if on_gpu else None)
        if sum(tensor.nbytes for tensor in tensors) <= SMALL:
            self._kept.append(work)
        if self._coalesced is not None:
            self._coalesced.append(work)
        if not self.comm.has_spare_cores and self._end_of_pass.awaits():
            self._line.leave(work)
        else:
            self._line.add(work)
        return work

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: torch.device) -> Work:
        """The work since `_start_coalescing` as one."""
        works, self._coalesced = self._coalesced or [], None
        return self._do([], True, lambda: _all_done(works))

    def _done_at_once(self, tensors: Sequence[Tensor]) -> Work:
        """A `Done` takes longer to make than a small collective: so one serves while nobody else has it."""
        if len(tensors) != 1 or tensors[0].nbytes > SMALL_MEMORY:
            return Done(tensors)
        if getrefcount(self._done) > ALONE:
            self._done = Done(tensors)
        else:
            self._done.renew(tensors)
        return self._done

    def _root(self, opts: Any) -> int:
        root: int = opts.rootRank
        if not 0 <= root < self._size:
            raise RuntimeError(f"root: expected a rank from 0 to {self._size - 1}, got {root}")
        return root

    # -- reductions

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = _ALLREDUCE) -> Work:
        tensor = _only(tensors, "tensors")
        op = opts.reduceOp
        return self._do(tensors, opts.asyncOp, self._allreduce, tensor, op, reduction(op, tensor))

    def _allreduce(self, tensor: Tensor, op: Any, ours: Reduction) -> None:
        if ours.scaled:
            tensor.detach().mul_(op.factor)
        place = plain(tensor)
        self.comm.Allreduce(MPI.IN_PLACE, memory(place), ours.operation)
        put_back(tensor, place)

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = _ALLREDUCE_COALESCED) -> Work:
        checked(tensors, "tensors")
        ours = [reduction(opts.reduceOp, tensor) for tensor in tensors]

        def run() -> None:
            if all(is_plain(tensor) and not tensor.is_cuda for tensor in tensors) and _all_equal(ours):
                self.comm.Allreduce_many([memory(tensor) for tensor in tensors], ours[0].operation)
                return
            for tensor, each in zip(tensors, ours, strict=True):
                self._allreduce(tensor, opts.reduceOp, each)

        if opts.reduceOp.op == dist.ReduceOp.PREMUL_SUM:
            raise RuntimeError("op: PREMUL_SUM is not defined for several tensors at once")
        return self._do(tensors, opts.asyncOp, run)

    def reduce(self, tensors: Sequence[Tensor], opts: Any = _REDUCE) -> Work:
        tensor, root = _only(tensors, "tensors"), self._root(opts)
        op = opts.reduceOp
        ours = reduction(op, tensor)

        def run() -> None:
            if self._rank != root:
                given = plain(premultiplied(op, ours, tensor))
                self.comm.Reduce(memory(given), None, ours.operation, root)
                return
            if ours.scaled:
                tensor.detach().mul_(op.factor)
            place = plain(tensor)
            self.comm.Reduce(MPI.IN_PLACE, memory(place), ours.operation, root)
            put_back(tensor, place)

        return self._do(tensors, opts.asyncOp, run)

    def reduce_scatter(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Sequence[Tensor]],
        opts: Any = _REDUCE_SCATTER,
    ) -> Work:
        output, parts = _only(outputs, "outputs"), _only_list(inputs, "inputs")
        _check_parts(parts, self._size, "inputs")
        same_kind([output, *parts], "inputs")
        if output.numel() != parts[self._rank].numel():
            raise RuntimeError(
                f"outputs: expected {parts[self._rank].numel()} elements, as this rank's input, got "
                f"{output.numel()}"
            )
        op = opts.reduceOp
        ours = reduction(op, output)
        counts = [part.numel() for part in parts]

        def run() -> None:
            whole, place = premultiplied(op, ours, joined(parts)), plain(output)
            self.comm.Reduce_scatter(memory(whole), memory(place), counts, ours.operation)
            put_back(output, place)

        return self._do(outputs, opts.asyncOp, run)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = _REDUCE_SCATTER) -> Work:
        op = opts.reduceOp
        ours = self._check_reduce_scatter(output, input, op)
        return self._do([output], opts.asyncOp, self._reduce_scatter_single, output, input, op, ours)

    _reduce_scatter_base = reduce_scatter_single

    def _check_reduce_scatter(self, output: Tensor, input: Tensor, op: Any) -> Reduction:
        check_pair(output, input)
        _check_size(input, self._size * output.numel(), "input", "as many as all ranks' outputs")
        return reduction(op, output)

    def _reduce_scatter_single(self, output: Tensor, input: Tensor, op: Any, ours: Reduction) -> None:
        whole, place = plain(premultiplied(op, ours, input) if ours.scaled else input), plain(output)
        self.comm.Reduce_scatter_block(memory(whole), memory(place), ours.operation)
        put_back(output, place)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = _REDUCE_SCATTER
    ) -> Work:
        op = opts.reduceOp
        runs = [
            partial(self._reduce_scatter_single, *pair, op, self._check_reduce_scatter(*pair, op))
            for pair in _pairs(outputs, inputs)
        ]
        return self._do(outputs, opts.asyncOp, _each, runs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # -- movements

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = _BROADCAST) -> Work:
        given = [tensors[opts.rootTensor]] if len(tensors) > 1 else tensors
        tensor = _only(given, "tensors")
        return self._do(tensors, opts.asyncOp, self._broadcast, tensor, self._root(opts))

    def _broadcast(self, tensor: Tensor, root: int) -> None:
        place = plain(tensor)
        self.comm.Bcast(memory(place), root)
        put_back(tensor, place)

    def allgather(
        self,
        outputs: Sequence[Sequence[Tensor]],
        inputs: Sequence[Tensor],
        opts: Any = _ALLGATHER,
    ) -> Work:
        parts, tensor = _only_list(outputs, "outputs"), _only(inputs, "inputs")
        run = self._allgather(parts, tensor)
        return self._do(parts, opts.asyncOp, run)

    def _allgather(self, parts: Sequence[Tensor], tensor: Tensor) -> Callable[[], None]:
        _check_parts(parts, self._size, "outputs")
        same_kind([tensor, *parts], "outputs")
        _check_size(parts[self._rank], tensor.numel(), "outputs", "as many as this rank's input")
        counts = [part.nbytes for part in parts]

        def run() -> None:
            own = plain(tensor)
            with written_parts(parts) as whole:
                self.comm.Allgatherv(raw(own), [raw(whole), counts])

        return run

    def allgather_coalesced(
        self,
        outputs: Sequence[Sequence[Tensor]],
        inputs: Sequence[Tensor],
        opts: Any = _ALLGATHER,
    ) -> Work:
        """``outputs[r]``: what rank ``r`` has, one tensor for each of ``inputs``."""
        of_ranks = [_pairs(part, inputs) for part in outputs]
        by_input = [[pair[0] for pair in pairs] for pairs in zip(*of_ranks, strict=True)]
        runs = [self._allgather(parts, tensor) for parts, tensor in zip(by_input, inputs, strict=True)]
        return self._do([tensor for part in outputs for tensor in part], opts.asyncOp, _each, runs)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = _ALLGATHER) -> Work:
        self._check_allgather(output, input)
        return self._do([output], opts.asyncOp, self._all_gather_single, output, input)

    _allgather_base = all_gather_single

    def _check_allgather(self, output: Tensor, input: Tensor) -> None:
        check_pair(output, input)
        _check_size(output, self._size * input.numel(), "output", "as many as all ranks' inputs")

    def _all_gather_single(self, output: Tensor, input: Tensor) -> None:
        own, place = plain(input), plain(output)
        self.comm.Allgather(memory(own), memory(place))
        put_back(output, place)

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = _ALLGATHER
    ) -> Work:
        pairs = _pairs(outputs, inputs)
        for pair in pairs:
            self._check_allgather(*pair)
        runs = [partial(self._all_gather_single, *pair) for pair in pairs]
        return self._do(outputs, opts.asyncOp, _each, runs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(
        self,
        outputs: Sequence[Sequence[Tensor]],
        inputs: Sequence[Tensor],
        opts: Any = _GATHER,
    ) -> Work:
        tensor, root = _only(inputs, "inputs"), self._root(opts)
        if self._rank != root:
            return self._do([], opts.asyncOp, self._give, tensor, root)
        parts = _only_list(outputs, "outputs")
        _check_parts(parts, self._size, "outputs")
        same_kind([tensor, *parts], "outputs")
        for part in parts:
            _check_size(part, tensor.numel(), "outputs", "as many as the input")

        def collect() -> None:
            own = plain(tensor)
            with written_parts(parts) as whole:
                self.comm.Gather(raw(own), raw(whole), root)

        return self._do(parts, opts.asyncOp, collect)

    def _give(self, tensor: Tensor, root: int) -> None:
        own = plain(tensor)
        self.comm.Gather(raw(own), None, root)

    def scatter(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Sequence[Tensor]],
        opts: Any = _SCATTER,
    ) -> Work:
        output, root = _only(outputs, "outputs"), self._root(opts)
        parts: Sequence[Tensor] = []
        if self._rank == root:
            parts = _only_list(inputs, "inputs")
            _check_parts(parts, self._size, "inputs")
            same_kind([output, *parts], "inputs")
            for part in parts:
                _check_size(part, output.numel(), "inputs", "as many as the output")

        def run() -> None:
            whole, place = joined(parts) if parts else None, plain(output)
            self.comm.Scatter(None if whole is None else memory(whole), memory(place), root)
            put_back(output, place)

        return self._do(outputs, opts.asyncOp, run)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_sizes: Sequence[int],
        input_sizes: Sequence[int],
        opts: Any = _ALL_TO_ALL,
    ) -> Work:
        """``output_sizes``, ``input_sizes``: rows from and to each rank; empty where all are equal."""
        check_pair(output, input)
        if not output_sizes and not input_sizes:
            for tensor, argument in ((output, "output"), (input, "input")):
                _check_rows(tensor, self._size, argument)
            return self._do([output], opts.asyncOp, self._all_to_all_single, output, input)
        gets = _row_bytes(output, output_sizes, self._size, "output")
        gives = _row_bytes(input, input_sizes, self._size, "input")

        def run() -> None:
            whole, place = plain(input), plain(output)
            self.comm.Alltoallv([raw(whole), gives], [raw(place), gets])
            put_back(output, place)

        return self._do([output], opts.asyncOp, run)

    def _all_to_all_single(self, output: Tensor, input: Tensor) -> None:
        whole, place = plain(input), plain(output)
        self.comm.Alltoall(memory(whole), memory(place))
        put_back(output, place)

    alltoall_base = all_to_all_single

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = _ALL_TO_ALL) -> Work:
        _check_parts(outputs, self._size, "outputs")
        _check_parts(inputs, self._size, "inputs")
        same_kind([*outputs, *inputs], "inputs")
        gets, gives = ([t.numel() * t.element_size() for t in tensors] for tensors in (outputs, inputs))

        def run() -> None:
            given = joined(inputs)
            with written_parts(outputs) as whole:
                self.comm.Alltoallv([raw(given), gives], [raw(whole), gets])

        return self._do(outputs, opts.asyncOp, run)

    def barrier(self, opts: Any = _BARRIER) -> Work:
        return self._do([], opts.asyncOp, self.comm.Barrier)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier that says who is missing, with where all ranks are, after ``timeout``.

        Every barrier of ours does so, after the group's own timeout.
        """
        before = self.comm.timeout
        if timeout is not None:
            self.comm.timeout = timeout.total_seconds()
        try:
            self.barrier().wait()
        finally:
            self.comm.timeout = before

    # -- messages

    def send(self, tensors: Sequence[Tensor], dstRank: int, tag: int = 0) -> dist.Work:
        tensor = _only(tensors, "tensors")
        return self._messages.send(tensor, dstRank, tag)

    def recv(self, tensors: Sequence[Tensor], srcRank: int, tag: int = 0) -> dist.Work:
        tensor = _only(tensors, "tensors")
        return self._messages.receive(tensor, srcRank, tag)

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> dist.Work:
        tensor = _only(tensors, "tensors")
        return self._messages.receive(tensor, None, tag)


# -- groups


def subset(comm: MPI.Intracomm, ranks: Sequence[int], timeout: timedelta | None, name: str) -> Communicator:
    """A communicator of some ranks of ``comm``, in this order; collective over those."""
    whole = comm.Get_group()
    part = whole.Incl(list(ranks))
    # Groups that share ranks may be made at the same time: the tag keeps them apart.
    made = MPI.Intracomm(comm).Create_group(part, zlib.crc32(name.encode()) % 32_768)
    whole.Free()
    part.Free()
    found = Communicator(made, timeout=None if timeout is None else timeout.total_seconds())
    found._owned = True
    return found


def create(options: Any, _: Any = None) -> ProcessGroup:
    """What torch calls for each new group, with its ``DistributedBackendOptions``."""
    world = MPI.COMM_WORLD
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    if options.group_size > world.size or (not options.global_ranks_in_group and len(ranks) != world.size):
        raise RuntimeError(
            f"expected as many ranks as MPI has started, {world.size}, got world_size={options.group_size}; "
            "start the job with mpirun or srun"
        )
    if ranks[options.group_rank] != world.rank:
        raise RuntimeError(
            f"rank: expected MPI's rank, {world.rank}, got {ranks[options.group_rank]}; leave rank and "
            "world_size out"
        )
    group = ProcessGroup(subset(world, ranks, options.timeout, str(options.group_id)))
    group._set_group_name(str(options.group_id))
    return group


def register() -> None:
    """Let ``init_process_group("mpicoll")`` find us."""
    if not hasattr(dist.Backend, NAME.upper()):
        dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])


# -- arguments


def _only(tensors: Sequence[Tensor], argument: str) -> Tensor:
    if len(tensors) != 1:
        raise RuntimeError(f"{argument}: expected one tensor, got {len(tensors)}")
    checked(tensors, argument)
    return tensors[0]


def _only_list(lists: Sequence[Sequence[Tensor]], argument: str) -> Sequence[Tensor]:
    if len(lists) != 1:
        raise RuntimeError(f"{argument}: expected one list of tensors, got {len(lists)}")
    return lists[0]


def _check_parts(parts: Sequence[Tensor], nranks: int, argument: str) -> None:
    if len(parts) != nranks:
        raise RuntimeError(f"{argument}: expected {nranks} tensors, one for each rank, got {len(parts)}")
    checked(parts, argument)


def _check_size(tensor: Tensor, expected: int, argument: str, why: str) -> None:
    if tensor.numel() != expected:
        raise RuntimeError(f"{argument}: expected {expected} elements, {why}, got {tensor.numel()}")


def _pairs(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    if len(outputs) != len(inputs):
        raise RuntimeError(f"outputs: expected as many tensors as inputs, {len(inputs)}, got {len(outputs)}")
    return list(zip(outputs, inputs, strict=True))


def _check_rows(tensor: Tensor, nranks: int, argument: str) -> int:
    """How many rows there are, which all ranks must share evenly."""
    shape = tensor.shape
    rows: int = shape[0] if shape else 1
    if rows % nranks:
        raise RuntimeError(f"{argument}: expected rows in equal parts for {nranks} ranks, got {rows}")
    return rows


def _row_bytes(tensor: Tensor, sizes: Sequence[int], nranks: int, argument: str) -> list[int]:
    """Bytes for each rank: of so many rows."""
    rows: int = tensor.shape[0] if tensor.dim() else 1
    if not sizes:
        sizes = [_check_rows(tensor, nranks, argument) // nranks] * nranks
    if len(sizes) != nranks or sum(sizes) != rows or min(sizes) < 0:
        raise RuntimeError(
            f"{argument} split sizes: expected {nranks} that sum to its {rows} rows, got {list(sizes)}"
        )
    row = tensor.numel() * tensor.element_size() // max(rows, 1)
    return [size * row for size in sizes]


def _all_equal(operations: Sequence[Reduction]) -> bool:
    return all(operation_ is operations[0] for operation_ in operations) and bool(operations)


def _each(runs: Iterable[Callable[[], None]]) -> None:
    for run in runs:
        run()


def _all_done(works: Iterable[Work]) -> None:
    for work in works:
        error = work.exception()
        if error is not None:
            raise error
