"""Communicator: an mpi4py communicator whose collectives are ours."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial, wraps
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll import algorithms, fastcalls, tuning
from mpicoll.calls import HIERARCHICAL, SHARED, CallMaker, Operation
from mpicoll.fastcalls import FastMethod
from mpicoll.fastmessages import CallCount, KnownMethod
from mpicoll.faults import RankFailedError, outlives_ranks
from mpicoll.gpu import calls as gpu
from mpicoll.gpu.plans import GpuPlan
from mpicoll.grouped import ManyCalls
from mpicoll.objects import ObjectCalls
from mpicoll.placement import check_world
from mpicoll.repeated import RepeatedCalls, signature
from mpicoll.requests import Call, PersistentCall, Request, Series
from mpicoll.transports import hierarchical
from mpicoll.transports.arena import new_array
from mpicoll.transports.hierarchical import HierarchicalPlan, Hierarchy
from mpicoll.transports.messages import count_cores
from mpicoll.transports.shared import Channel, Reduction, SharedPlan
from mpicoll.tune.table import NO_CHOICES, Choices, choices_for
from mpicoll.watch import Watch, What, checked_timeout, is_of_an_end, preparing, timeout_from, what

ONE_SHOT_TAGS = 16_384  # they count from 0, and begin anew long after a call with the same tag has ended
TRANSPORTS = ("auto", "shared", "messages")
PERSISTENT_TAGS = range(16_384, 32_768)  # MPI promises tags up to 32767

# Each collective is prepared by one method of `CallMaker`, which has mpi4py's signature, and completed in
# three ways. Where it prepares nothing, MPI does it all. The methods made here are typed as Any, for mpi4py's
# own types know neither ``algorithm`` nor bfloat16.
_Prepare = Callable[..., Call | None]


def _blocking(prepare: _Prepare, native: Callable[..., None], remembered: bool = True) -> Any:
    @wraps(prepare)
    def method(self: Communicator, /, *args: Any, **kwargs: Any) -> None:
        # Arguments that are refused on one rank only must not count: tags are equal on all ranks.
        key = signature(prepare, args, kwargs)
        known = self._repeated.match(key, args)
        if known is not None:
            known.run(self._next_tag(known.call))
            return
        call = prepare(self._maker, *args, **kwargs)
        if call is None:
            with self._watch.understanding():
                native(self, *args, **_without_algorithm(kwargs))
            return
        call.run(self._next_tag(call))
        self._learn(prepare.__name__, call, args, kwargs)
        if self._know(prepare.__name__, call, args, kwargs):
            return
        if not (remembered and self._repeated.remember(key, call, args)):
            self._maker.release(call)

    return method


def _nonblocking(prepare: _Prepare, native: Callable[..., MPI.Request]) -> Any:
    @wraps(prepare)
    def method(self: Communicator, /, *args: Any, **kwargs: Any) -> MPI.Request:
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise RuntimeError(
                "nonblocking collectives need MPI_THREAD_MULTIPLE for their progress thread; remove "
                "MPI4PY_RC_THREAD_LEVEL and mpi4py.rc.thread_level, or use the blocking or persistent form"
            )
        call = prepare(self._messages, *args, **kwargs)
        if call is None:
            return native(self, *args, **_without_algorithm(kwargs))
        return Request(call, self._next_tag(call), partial(self._messages.release, call))

    return method


def _persistent(prepare: _Prepare) -> Any:
    @wraps(prepare)
    def method(
        self: Communicator, /, *args: Any, info: MPI.Info = MPI.INFO_NULL, **kwargs: Any
    ) -> PersistentCall:
        if args and isinstance(args[-1], MPI.Info):
            args = args[:-1]  # hints to the MPI library, which has no part in this
        call = prepare(self._maker, *args, **kwargs)
        if call is None:
            raise TypeError(
                "persistent collectives take predefined operations and dtypes only; use the blocking form "
                "for operations or datatypes of your own"
            )
        # It counts as a call of its own, also where it sends nothing: a rank that leaves it out is found out.
        init = preparing(call.what)
        self._count.next_tag(init)
        self._begin(init)
        if isinstance(call.plan, SharedPlan):
            call.plan.move_to(call.plan.channel.twin(init.text))
        elif isinstance(call.plan, HierarchicalPlan) and self._hierarchy is not None:
            call.plan.move_to(self._hierarchy.twin(init.text))
        elif isinstance(call.plan, GpuPlan):
            source = self._channel or self._hierarchy
            call.plan.move_to(source.twin(init.text) if source is not None else None)
        tag = self._take_persistent_tag()
        self._watch.stands(tag, call.what)
        return PersistentCall(call, tag | call.what.mark, partial(self._watch.falls, tag))

    return method


def _without_algorithm(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that MPI's own method takes, too."""
    return {name: value for name, value in kwargs.items() if name != "algorithm"}


class Communicator(MPI.Intracomm):
    """An mpi4py intracommunicator whose collectives run mpicoll's algorithms.

    Put it where a program has ``MPI.COMM_WORLD``: ``comm = mpicoll.Communicator(MPI.COMM_WORLD)``. It is the
    same communicator for everything else, so its point-to-point messages meet those of ``MPI.COMM_WORLD``.
    Creating one is collective.

    Every buffer form of mpi4py works, also float16 and bfloat16 arrays (sums are accumulated in float32 and
    rounded once), and ``op=mpicoll.AVG``. Collectives take ``algorithm=``, one of
    ``mpicoll.algorithms.names(collective)`` or "auto", the default; the constructor's ``algorithm`` sets it
    for every collective that has an algorithm of this name. Operations that users made and other
    collectives than those here are MPI's own.

    Arguments are checked before anything is sent: TypeError and ValueError name the argument, what it was
    and what is allowed. What goes wrong in MPI is an `MPI.Exception`. Ranks that are in different calls get a
    `MismatchError`, ranks that wait for one that has ended a `RankFailedError`, and those that wait for more
    than ``timeout`` seconds (by default ``MPICOLL_TIMEOUT``; 0: for ever) without progress a `DeadlineError`;
    no further collective is possible then, except on communicators made before. Where every process of a
    job believes to be rank 0 of 1, making one is a `mpicoll.placement.LaunchError`.

    Source of the interface: mpi4py's ``Comm`` and ``Intracomm``.
    """

    _maker: CallMaker

    def __new__(
        cls,
        comm: MPI.Intracomm | None = None,
        algorithm: str = "auto",
        transport: str = "auto",
        timeout: float | None = None,
        gpu_transport: str = "auto",
    ) -> Communicator:
        if comm is not None and not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"comm: expected an mpi4py intracommunicator, got {type(comm).__name__}")
        return super().__new__(cls, comm)

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        algorithm: str = "auto",
        transport: str = "auto",
        timeout: float | None = None,
        gpu_transport: str = "auto",
    ) -> None:
        known = {name for collective in algorithms.ALGORITHMS for name in algorithms.names(collective)}
        known |= {SHARED, HIERARCHICAL}
        if transport not in TRANSPORTS:
            raise ValueError(f"transport: expected one of {', '.join(TRANSPORTS)}; got {transport!r}")
        if gpu_transport not in gpu.TRANSPORTS:
            raise ValueError(
                f"gpu_transport: expected one of {', '.join(gpu.TRANSPORTS)}; got {gpu_transport!r}"
            )
        if algorithm != "auto" and algorithm not in known:
            raise ValueError(
                f"algorithm: expected auto or one of {', '.join(sorted(known))}; got {algorithm!r}"
            )
        check_world(MPI.COMM_WORLD.Get_size(), os.environ, MPI.Get_library_version())
        self._owned = False  # whether the communicator itself, not only what we added, is ours to free
        self._algorithm = algorithm
        self._transport = transport
        self._gpu_transport = gpu_transport
        self._timeout = timeout_from(os.environ) if timeout is None else checked_timeout(timeout, "timeout")
        self._used = "none"
        if self != MPI.COMM_NULL:
            self._set_up()

    def _set_up(self) -> None:
        # Our messages travel apart from the user's. Intracomm.Dup would give a Communicator again.
        self._private = MPI.Intracomm.Dup(MPI.Intracomm(self))
        self._private.Set_errhandler(MPI.ERRORS_RETURN)
        try:
            self._connect()
        except MPI.Exception:
            if outlives_ranks():
                self._private.Revoke()  # so that others do not wait for this rank in there
            raise

    def _connect(self) -> None:
        self._watch = Watch(self._private, MPI.Intracomm(self), self._timeout)
        self._watch.attach(self._private)
        node = hierarchical.node_of(self._private)
        cores = min(count_cores(node), hierarchical.share_of_cores(self._private, node))
        network = node.Get_size() < self.Get_size()
        spins = 0 if node.Get_size() > cores else 1000
        self._choices = self._find_choices(node.Get_size(), network, crowded=spins == 0)
        self._channel: Channel | None = None
        self._hierarchy: Hierarchy | None = None
        reason = self._share_memory(node, cores, spins)
        if self._hierarchy is None:
            node.Free()
        if self._transport == "shared" and reason is not None:
            raise RuntimeError(f"transport: expected auto or messages, got shared, but {reason}")
        self._used = self._describe(reason)
        self._make_callers(spins, reason, network)
        self._repeated = RepeatedCalls(self._maker.release)
        self._count = CallCount(ONE_SHOT_TAGS)
        self._quicken()
        self._persistent_tag = 0
        self._many = ManyCalls(self._maker, self._channel, self._take_persistent_tag())
        self._objects = ObjectCalls(self.rank, self.size, self._run_once)

    def _find_choices(self, ranks_per_node: int, network: bool, crowded: bool) -> Choices:
        """What was measured for such a communicator: rank 0 reads it, for all must choose alike."""
        if self._private.Get_size() == 1:
            return Choices(origin="none: there is one rank")
        found, problem = NO_CHOICES, ""
        if self._private.Get_rank() == 0:
            library = MPI.Get_library_version()
            size = self._private.Get_size()
            found, problem = choices_for(library, size, ranks_per_node, network, crowded, os.environ)
        choices: Choices = self._private.bcast(found)
        if problem:
            warnings.warn(problem, RuntimeWarning, stacklevel=5)  # where the program makes it
        return choices

    def _share_memory(self, node: MPI.Intracomm, cores: int, spins: int) -> str | None:
        """Use what memory the ranks share; if there is none, why messages must do."""
        if self._transport == "messages":
            return "the communicator was made with transport='messages'"
        sizes = tuning.sizes(node.Get_size(), cores)
        if node.Get_size() == self.Get_size():
            channel = Channel(self._private, sizes)
            if channel.reason is None:
                self._channel = channel
                self._watch.breaks(channel)
            return channel.reason
        if self._transport == "shared":
            return "the ranks are on several nodes"
        if self._private.allreduce(node.Get_size(), MPI.MAX) == 1:
            return "every rank is on a node of its own"
        hierarchy = Hierarchy(self._private, node, sizes, spins)
        if hierarchy.reason is None:
            self._hierarchy = hierarchy
            hierarchy.attach(self._watch)
        else:
            hierarchy.close()
        return hierarchy.reason

    def _describe(self, reason: str | None) -> str:
        if self._channel is not None:
            reads = "yes" if self._channel.reads_foreign_memory else "no"
            return f"shared memory (memory files; other ranks' memory is read directly: {reads})"
        if self._hierarchy is not None:
            return f"hierarchical: shared memory on {self._hierarchy.nnodes} nodes, messages between"
        return f"messages, because {reason}"

    def _make_callers(self, spins: int, reason: str | None, network: bool) -> None:
        """What prepares calls: the nonblocking ones, which only messages can do, and all others."""
        default = "auto" if self._algorithm in (SHARED, HIERARCHICAL) else self._algorithm
        unable = "nonblocking calls only send messages"
        self._sharing = gpu.Sharing(
            self._private, self._watch, self._gpu_transport, not network, self._foresee
        )
        self._messages = CallMaker(
            self._private,
            spins,
            default,
            self._sharing,
            no_hierarchy=unable,
            network=network,
            nonblocking=True,
            choices=self._choices,
        )
        why = "all ranks are on one node" if self._channel is not None else reason
        self._maker = CallMaker(
            self._private,
            spins,
            self._algorithm,
            self._sharing,
            self._channel,
            self._hierarchy,
            why,
            network,
            choices=self._choices,
        )

    @property
    def transport(self) -> str:
        """How the collectives of this communicator travel, and why, in words."""
        return self._used

    @property
    def choices(self) -> Choices:
        """What was measured here to be better than the static choice of algorithms; see `mpicoll.tune`.

        May be set before the first collective, to the same on all ranks.
        """
        return self._choices

    @choices.setter
    def choices(self, choices: Choices) -> None:
        self._choices = self._messages.choices = self._maker.choices = choices

    def choose(self, collective: str, nbytes: int) -> str:
        """What "auto" stands for: the algorithm of ``collective`` for ``nbytes`` bytes.

        They are those of the whole vector, or of all ranks' blocks together. Raises ValueError if there is
        no such collective.
        """
        return self._maker.choose(collective, None, nbytes)

    @property
    def has_spare_cores(self) -> bool:
        """Whether a thread beside the program has a core to itself, or mostly waits for the network."""
        return self._channel is None or self._channel.sizes.alone

    @property
    def gpu_transport(self) -> str:
        """How the collectives of this communicator travel that are on GPU memory, and why, in words.

        It is chosen in the first of them, or by `choose_gpu_transport`.
        """
        return self._sharing.text

    def choose_gpu_transport(self, device: int) -> str:
        """`gpu_transport`, chosen now, for memory of the GPU that has this number here; collective.

        Raises `gpu.driver.GpuError` where there is no driver.
        """
        self._sharing.decide(device, "choose_gpu_transport")
        return self._sharing.text

    def _quicken(self) -> None:
        """Put compiled methods before the Python methods of the same names."""
        self._fast: dict[str, FastMethod] = {}
        self._known: dict[str, KnownMethod] = {}
        if not fastcalls.available():
            return
        plan = SharedPlan(self._channel) if self._channel is not None else None
        for name in fastcalls.METHODS:
            if getattr(type(self), name) is not getattr(Communicator, name):
                continue  # a subclass does it in its own way
            slow = getattr(self, name)
            if plan is not None:
                fast = self._fast[name.lower()] = FastMethod(name, plan, slow)
                setattr(self, name, fast.call)
            else:
                known = self._known[name.lower()] = KnownMethod(name, slow, self._count)
                setattr(self, name, known.call)

    def _run_once(self, prepare: Callable[..., Call], *args: Any) -> None:
        """A blocking call that will hardly come again like this: nothing is remembered of it."""
        call = prepare(self._maker, *args)
        call.run(self._next_tag(call))
        self._maker.release(call)

    def _next_tag(self, call: Call) -> int:
        """A tag for a call; those that need none must not count, for some are compiled and cannot."""
        if not call.plan.tagged:
            return 0
        tag = self._count.next_tag(call.what)
        self._begin(call.what)
        return tag

    def _foresee(self, what: What) -> None:
        """The call that will be numbered next is under way already."""
        self._watch.begin((self._count.number + 1) % ONE_SHOT_TAGS, what)

    def _begin(self, what: What) -> None:
        """The call that has been numbered last has begun."""
        self._watch.begin(self._count.number, what)

    def _know(self, name: str, call: Call, args: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
        """Whether the compiled method does calls like this one, in messages, from now on."""
        known = self._known.get(name)
        if known is None or named.keys() - {"op", "root"}:
            return False
        return known.learn(call, self._begin, args, named)

    def _learn(self, name: str, call: Call, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Let the compiled method do calls like this one from now on."""
        fast = self._fast.get(name)
        arrays = [arg for arg in args[:2] if type(arg) is np.ndarray]
        if (
            fast is None
            or "algorithm" in named
            or not arrays
            or not arrays[-1].dtype.isbuiltin
            or type(call.plan) is not SharedPlan
        ):
            return
        dtype, reduction = arrays[-1].dtype, call.plan.reduction
        if reduction.number:
            fast.learn(dtype, named.get("op", args[2] if len(args) > 2 else MPI.SUM), reduction)
        else:
            fast.learn(dtype, None, Reduction(0, dtype.itemsize, 0, 0))

    def _adopt(self, comm: MPI.Comm) -> Any:
        """A communicator that MPI made from this one, as a `Communicator` that owns it."""
        if comm == MPI.COMM_NULL or not isinstance(comm, MPI.Intracomm):
            return comm
        child = type(self)(comm, self._algorithm, self._transport, self._timeout, self._gpu_transport)
        child._owned = True
        return child

    def Free(self) -> None:
        """Free what was added to the communicator, and a communicator from `Split` or `Dup` itself, too.

        The communicator that was passed to the constructor stays its owner's. Collective, but waits for
        nobody once a collective has failed.
        """
        failure = self._watch.failure
        if failure is None:
            self._give_back()
        # After a failure, the number of ours stays taken: what the last call has sent may still be on its
        # way, and MPI would give it to the next communicator of that number.
        self._watch.close()
        if failure is not None and failure.dead:
            return  # MPI would wait for ranks that do not come any more
        if failure is None:
            self._private.Free()
        if self._owned:
            super().Free()

    def _give_back(self) -> None:
        """What was added, other than MPI's communicator; no rank is in another call."""
        self._sharing.close()
        if self._channel is not None:
            self._channel.close()
        elif self.size > 1:
            call = self._messages.barrier()
            call.what = what("free", call.what.algorithm, None, None, "", None)
            call.run(self._next_tag(call))
        if self._hierarchy is not None:
            self._hierarchy.free()

    def shrink(self) -> Communicator:
        """A communicator of the ranks that are left, in the same order; collective over them.

        To be called when a collective has raised `RankFailedError`, which the others get from theirs, too.
        From then on this communicator, those made from it, and what was set up on it are of no use; `Free` on
        it waits for nobody. Ranks that end meanwhile are left out, too. Needs an MPI that lets a job outlive
        a rank, Open MPI started by ``mpirun --with-ft ulfm``; raises RuntimeError elsewhere.
        """
        if not outlives_ranks():
            raise RuntimeError(
                "shrink: expected an MPI in which a job outlives a rank: start it with Open MPI's "
                "`mpirun --with-ft ulfm`, or `python -m mpicoll.launch --elastic`"
            )
        while True:
            survivors = MPI.Intracomm(MPI.Intracomm(self).Shrink())
            survivors.Set_errhandler(MPI.ERRORS_RETURN)
            child = self._try_adopt(survivors)
            try:
                whole = survivors.Agree(int(child is not None))
            except MPI.Exception:  # one more has ended; everyone learns so
                whole = 0
            if whole and child is not None:
                return child

    def _try_adopt(self, comm: MPI.Intracomm) -> Communicator | None:
        """As `_adopt`; None if a rank ends meanwhile."""
        try:
            return self._adopt(comm)  # type: ignore[no-any-return]
        except (MPI.Exception, RankFailedError):
            return None
        except Exception:
            if is_of_an_end(comm):
                return None
            raise

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.give_up(error)
        self.Free()

    def give_up(self, error: BaseException) -> None:
        """Take part no more: the others, which may be waiting for this rank, get what ``error`` says."""
        channel = self._hierarchy.channel if self._hierarchy is not None else self._channel
        if channel is not None:
            channel.give_up(f"{type(error).__name__}: {error}")
        self._watch.give_up(error)

    @property
    def timeout(self) -> float:
        """Seconds without progress after which a collective is a `DeadlineError`; may be set at any time."""
        return self._watch.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._watch.timeout = checked_timeout(seconds, "timeout")

    def complete(
        self, request: MPI.Request, call: str, others: Collection[int], status: MPI.Status | None = None
    ) -> None:
        """Wait for a request of MPI's own on this communicator, but not for ever.

        ``call`` says in words what it is, ``others`` which ranks it takes. Raises what collectives raise: an
        error that names ranks that have ended, or where all are after `timeout`.
        """
        self._watch.complete(request, call, others, status)

    def alloc(self, shape: int | Sequence[int], dtype: npt.DTypeLike = np.float64) -> np.ndarray[Any, Any]:
        """An array of zeros in memory that the other ranks of the node reach: collectives on it copy nothing.

        A call of each rank by itself, of any size. The memory is given back when the array and its views are
        gone. Raises MemoryError if the machine has not that much left, OSError where memory cannot be shared.
        """
        return new_array(shape, dtype)

    def Allreduce_many(
        self, arrays: Sequence[Any], op: Operation = MPI.SUM, *, algorithm: str | None = None
    ) -> None:
        """Reduce many arrays in place, each as `Allreduce` would, in few large messages.

        ``arrays``, of any sizes and dtypes, are the same in number, sizes and dtypes on all ranks, and do not
        overlap. What was prepared for a list serves again while the arrays stay where they are. Raises
        TypeError and ValueError that name the array.
        """
        arrays = arrays if isinstance(arrays, (list, tuple)) else list(arrays)  # it is gone through twice
        many = self._many.find(arrays, op, algorithm)
        if many is None:
            for array in arrays:
                self.Allreduce(MPI.IN_PLACE, array, op)
        else:
            many.finish()

    def series(self) -> Series:
        """What makes calls that follow each other, beside all other calls of this one; collective."""
        source = self._channel or self._hierarchy
        with self._watch.understanding():
            channel = source.twin("the preparation of many calls") if source is not None else None
        return Series(self._maker, channel, self._take_persistent_tag())

    def _take_persistent_tag(self) -> int:
        self._persistent_tag = (self._persistent_tag + 1) % len(PERSISTENT_TAGS)
        return PERSISTENT_TAGS[self._persistent_tag]

    # -- communicators from this one

    def Dup(self, info: MPI.Info | None = None) -> Communicator:
        """A duplicate of this communicator, with the same default algorithm."""
        with self._watch.understanding():
            return self._adopt(MPI.Intracomm(self).Dup(info))  # type: ignore[no-any-return]

    def Clone(self) -> Communicator:
        """As `Dup`."""
        return self.Dup()

    def Split(self, color: int = 0, key: int = 0) -> Communicator:
        """One communicator for each color, ranks ordered by key; COMM_NULL for ``MPI.UNDEFINED``."""
        with self._watch.understanding():
            return self._adopt(MPI.Intracomm(self).Split(color, key))  # type: ignore[no-any-return]

    def Split_type(self, split_type: int, key: int = 0, info: MPI.Info = MPI.INFO_NULL) -> Communicator:
        """One communicator for each group of ranks of a kind, such as those that share memory."""
        with self._watch.understanding():
            return self._adopt(MPI.Intracomm(self).Split_type(split_type, key, info))  # type: ignore[no-any-return]

    def Create(self, group: MPI.Group) -> Communicator:
        """A communicator of the group's ranks; COMM_NULL on the others."""
        with self._watch.understanding():
            return self._adopt(MPI.Intracomm(self).Create(group))  # type: ignore[no-any-return]

    def Create_group(self, group: MPI.Group, tag: int = 0) -> Communicator:
        """A communicator of the group's ranks; only they call it."""
        with self._watch.understanding():
            return self._adopt(MPI.Intracomm(self).Create_group(group, tag))  # type: ignore[no-any-return]

    Allreduce = _blocking(CallMaker.allreduce, MPI.Intracomm.Allreduce)
    Reduce = _blocking(CallMaker.reduce, MPI.Intracomm.Reduce)
    Reduce_scatter_block = _blocking(CallMaker.reduce_scatter_block, MPI.Intracomm.Reduce_scatter_block)
    # The counts may come from other ranks' buffers, which may change where our own do not.
    Reduce_scatter = _blocking(CallMaker.reduce_scatter, MPI.Intracomm.Reduce_scatter, remembered=False)
    Bcast = _blocking(CallMaker.bcast, MPI.Intracomm.Bcast)
    Gather = _blocking(CallMaker.gather, MPI.Intracomm.Gather)
    Gatherv = _blocking(CallMaker.gatherv, MPI.Intracomm.Gatherv)
    Scatter = _blocking(CallMaker.scatter, MPI.Intracomm.Scatter)
    Scatterv = _blocking(CallMaker.scatterv, MPI.Intracomm.Scatterv)
    Allgather = _blocking(CallMaker.allgather, MPI.Intracomm.Allgather)
    Allgatherv = _blocking(CallMaker.allgatherv, MPI.Intracomm.Allgatherv)
    Alltoall = _blocking(CallMaker.alltoall, MPI.Intracomm.Alltoall)
    Alltoallv = _blocking(CallMaker.alltoallv, MPI.Intracomm.Alltoallv)
    Barrier = _blocking(CallMaker.barrier, MPI.Intracomm.Barrier)

    def bcast(self, obj: Any = None, root: int = 0) -> Any:
        """Rank ``root``'s object, on all ranks."""
        return self._objects.bcast(obj, root)

    def gather(self, sendobj: Any, root: int = 0) -> list[Any] | None:
        """All ranks' objects, on rank ``root``; None on the others."""
        return self._objects.gather(sendobj, root)

    def scatter(self, sendobj: Sequence[Any] | None, root: int = 0) -> Any:
        """Of rank ``root``'s sequence the object with this rank's number."""
        return self._objects.scatter(sendobj, root)

    def allgather(self, sendobj: Any) -> list[Any]:
        """All ranks' objects, on all ranks."""
        return self._objects.allgather(sendobj)

    def alltoall(self, sendobj: Sequence[Any]) -> list[Any]:
        """From each rank the object that has this rank's number in its sequence."""
        return self._objects.alltoall(sendobj)

    def reduce(self, sendobj: Any, op: Any = MPI.SUM, root: int = 0) -> Any:
        """All ranks' objects folded in the order of ranks, on rank ``root``; ``op`` takes two."""
        return self._objects.reduce(sendobj, op, root)

    def allreduce(self, sendobj: Any, op: Any = MPI.SUM) -> Any:
        """All ranks' objects folded in the order of ranks, on all ranks; ``op`` takes two."""
        return self._objects.allreduce(sendobj, op)

    def barrier(self) -> None:
        """As `Barrier`."""
        self.Barrier()

    Iallreduce = _nonblocking(CallMaker.allreduce, MPI.Intracomm.Iallreduce)
    Ireduce = _nonblocking(CallMaker.reduce, MPI.Intracomm.Ireduce)
    Ireduce_scatter_block = _nonblocking(CallMaker.reduce_scatter_block, MPI.Intracomm.Ireduce_scatter_block)
    Ireduce_scatter = _nonblocking(CallMaker.reduce_scatter, MPI.Intracomm.Ireduce_scatter)
    Ibcast = _nonblocking(CallMaker.bcast, MPI.Intracomm.Ibcast)
    Igather = _nonblocking(CallMaker.gather, MPI.Intracomm.Igather)
    Igatherv = _nonblocking(CallMaker.gatherv, MPI.Intracomm.Igatherv)
    Iscatter = _nonblocking(CallMaker.scatter, MPI.Intracomm.Iscatter)
    Iscatterv = _nonblocking(CallMaker.scatterv, MPI.Intracomm.Iscatterv)
    Iallgather = _nonblocking(CallMaker.allgather, MPI.Intracomm.Iallgather)
    Iallgatherv = _nonblocking(CallMaker.allgatherv, MPI.Intracomm.Iallgatherv)
    Ialltoall = _nonblocking(CallMaker.alltoall, MPI.Intracomm.Ialltoall)
    Ialltoallv = _nonblocking(CallMaker.alltoallv, MPI.Intracomm.Ialltoallv)
    Ibarrier = _nonblocking(CallMaker.barrier, MPI.Intracomm.Ibarrier)

    Allreduce_init = _persistent(CallMaker.allreduce)
    Reduce_init = _persistent(CallMaker.reduce)
    Reduce_scatter_block_init = _persistent(CallMaker.reduce_scatter_block)
    Reduce_scatter_init = _persistent(CallMaker.reduce_scatter)
    Bcast_init = _persistent(CallMaker.bcast)
    Gather_init = _persistent(CallMaker.gather)
    Gatherv_init = _persistent(CallMaker.gatherv)
    Scatter_init = _persistent(CallMaker.scatter)
    Scatterv_init = _persistent(CallMaker.scatterv)
    Allgather_init = _persistent(CallMaker.allgather)
    Allgatherv_init = _persistent(CallMaker.allgatherv)
    Alltoall_init = _persistent(CallMaker.alltoall)
    Alltoallv_init = _persistent(CallMaker.alltoallv)
    Barrier_init = _persistent(CallMaker.barrier)
