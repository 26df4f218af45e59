"""Elastic training: when ranks die, the others go on, without losing a step.

A **survivor** learns of a death in a collective, which raises `RankFailedError`. Then all survivors

    1. shrink   to a communicator of those who are left, numbered anew, in the same order
    2. agree    on the newest **state** that they have, which all get: the vectors of parameters and of the
                optimizer, whole, and where training is
    3. move     make everything anew that depends on the ranks (shares of a batch, shards, channels), and take
                the state up, as a training that goes on from a checkpoint does

and take the next step, or again the one that nobody had finished. If more ranks die on the way, they begin
with 1 again. Everything random is a function of the position, so the steps are those of a run in which nobody
died; with deterministic sums to the last bit.

Which state is the newest? With parameters on all ranks, an update needs nothing but sums that have come. So
each survivor has a whole state, after step k or after step k + 1, and the largest is taken:

    rank 0 of 3     has all sums of step 8, and updates     stopped in the sums of step 9, with 8 steps
    rank 1          waits for the last of them              stopped in those of step 8, with 7 steps
    rank 2          dies in them
    both            shrink; rank 1 gets rank 0's state; step 9 on two ranks

With shards a state is put together from those who have its parts, after the newest step of which all have
theirs: see `mpicoll.train.mirror`. Until a rank has taken a step with the others, or ended an epoch, it keeps
the whole state that it has begun with, or was given in 2. After that, all others have been through 3.

A rank that dies before the training, while data are read or the trainer is made, ends the job as ever:
nothing is lost then. From then on, to the last report, any may die.

Lost are, of the epoch in which ranks die, the losses that they alone knew (its training loss is that of the
other samples), and what a compression has not sent yet.

Cost: as long as nobody dies, nothing, or what `mpicoll.train.mirror` says. A recovery makes the trainer's
parts anew and broadcasts the state once.

Source of the scheme: W. Bland et al., "Post-failure recovery of MPI communication capability", IJHPCA 2013
(revoke, shrink, agree).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import perf_counter, time
from typing import TYPE_CHECKING, Any, NoReturn

from mpi4py import MPI

from mpicoll.communicator import Communicator
from mpicoll.faults import RankFailedError, outlives_ranks
from mpicoll.train.arrays import Array, array_module
from mpicoll.train.errors import InputError
from mpicoll.train.keeping import facts_of
from mpicoll.train.mirror import PARAMETERS, Mirror

if TYPE_CHECKING:
    from mpicoll.train.loop import Trainer

ELASTIC = ("allreduce", "sharded")  # strategies in which every step is all ranks'


class StateLostError(InputError):
    """Those who have died had between them all copies of something. On all survivors."""


@dataclass(frozen=True, eq=False)
class State:
    """All of a training between two steps: whole vectors, `PARAMETERS` among them, and `facts_of` it."""

    vectors: dict[str, Array]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Tally:
    """After ``step`` steps: the samples of the epoch that this rank has had, and the sum of their losses."""

    step: int
    samples: int
    loss: float


@dataclass(frozen=True)
class Lost:
    """``ranks``, as they were numbered at the start, have died, and the others gone on after ``step`` steps.

    ``seconds``: from the moment when this rank learned of it to the end of the next step, if there is one;
    that was ``at`` so many seconds since 1970.
    """

    ranks: tuple[int, ...]
    step: int
    seconds: float
    at: float

    def __str__(self) -> str:
        who = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        return f"{who} died after step {self.step}"


def check_elastic(comm: MPI.Intracomm, sizes: Mapping[str, int], strategy: str) -> None:
    """Raise `InputError` where a training cannot go on without some of its ranks."""
    if strategy not in ELASTIC:
        raise InputError(f"elastic: expected the strategy {' or '.join(ELASTIC)}, got {strategy}")
    if sizes["pipeline"] * sizes["tensor"] > 1:
        raise InputError(
            "elastic: expected whole models on all ranks, got a mesh with "
            f"pipeline={sizes['pipeline']}, tensor={sizes['tensor']}"
        )
    if not isinstance(comm, Communicator):
        raise InputError(f"elastic: expected an mpicoll.Communicator, got {type(comm).__name__}")
    if comm.size > 1 and not outlives_ranks():
        raise InputError(
            "elastic: expected an MPI in which a job outlives a rank: start it with Open MPI's "
            "`mpirun --with-ft ulfm`, or `python -m mpicoll.launch --elastic`"
        )


def whole_state(trainer: Trainer) -> State:
    """A copy of the state, on every rank. Collective."""
    vectors = {PARAMETERS: trainer.model.parameters, **trainer.strategy.vectors()}
    facts = facts_of(trainer, trainer.loss_so_far())
    return State({name: vector.copy() for name, vector in vectors.items()}, facts)


def leave(status: int = 0) -> NoReturn:
    """End this process where others have died: MPI's own end, part of Python's, may wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# What is left ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Remains:
    """What a survivor has: a whole ``state``, or a ``mirror`` of shards, and then only the state's facts.

    ``rank``: its number in the communicator that the mirror is of. ``tallies`` of the last steps.
    """

    rank: int
    facts: dict[str, Any]
    state: State | None
    mirror: Mirror | None
    tallies: dict[int, Tally]
    module: Any  # NumPy, or CuPy

    @staticmethod
    def of(trainer: Trainer) -> Remains:
        """Of a training in which a collective has failed; nothing is copied."""
        tallies = {tally.step: tally for tally in trainer.tallies}
        state, mirror = trainer.saved, getattr(trainer.strategy, "mirror", None)
        facts = state.facts if state is not None else facts_of(trainer, None)
        if state is None and mirror is None:
            state = State({PARAMETERS: trainer.model.parameters, **trainer.strategy.optimizer.state}, facts)
        elif state is None and mirror is not None:
            facts["optimizer_steps"] = mirror.newest  # it may have begun one more
        xp = array_module(trainer.model.parameters)
        return Remains(trainer.comm.rank, facts, state, mirror, tallies, xp)


@dataclass(frozen=True)
class Offer:
    """What a survivor says of its `Remains`: whether it has a whole state, and of when."""

    rank: int
    is_whole: bool
    step: int
    epoch: int

    @staticmethod
    def of(remains: Remains) -> Offer:
        return Offer(remains.rank, remains.state is not None, remains.facts["step"], remains.facts["epoch"])


def newest(comm: MPI.Intracomm, remains: Remains) -> State:
    """The newest state that the ranks of ``comm`` have between them, on all of them. Collective.

    Raises `StateLostError`, on all of them, if they have none.
    """
    offers: list[Offer] = comm.allgather(Offer.of(remains))
    wholes = [offer for offer in offers if offer.is_whole]
    # With shards, a step counts when all have finished it.
    step = max(offer.step for offer in wholes) if wholes else min(offer.step for offer in offers)
    sources = [offer for offer in wholes or offers if offer.step == step]
    root = offers.index(max(sources, key=lambda offer: offer.epoch))
    facts: dict[str, Any] = comm.bcast(remains.facts, root)
    if facts["loss_of_epoch"] is None:
        facts["loss_of_epoch"] = _loss(comm, facts, remains.tallies.get(step))
    if wholes:
        own = remains.state.vectors if comm.rank == root and remains.state is not None else {}
        return State(_sent(comm, own, remains.module, root), facts)
    assert remains.mirror is not None
    behind = remains.facts["step"] - step
    return State(_joined(comm, remains.mirror, behind, [offer.rank for offer in offers]), facts)


def _loss(comm: MPI.Intracomm, facts: Mapping[str, Any], tally: Tally | None) -> float:
    """The sum of the epoch's losses, as if those that nobody knows any more were like the others."""
    tallies: list[Tally] = [tally for tally in comm.allgather(tally) if tally is not None]
    known = sum(tally.samples for tally in tallies)
    if not (facts["samples_of_epoch"] and known):
        return 0.0
    samples: int = facts["samples_of_epoch"]
    return sum(tally.loss for tally in tallies) * samples / known


def _sent(comm: MPI.Intracomm, own: dict[str, Array], xp: Any, root: int) -> dict[str, Array]:
    """The vectors that are rank ``root``'s ``own``, on all ranks."""
    forms = comm.bcast([(name, vector.size, vector.dtype) for name, vector in own.items()], root)
    vectors = own or {name: xp.empty(size, dtype) for name, size, dtype in forms}
    for vector in vectors.values():
        comm.Bcast(vector, root)
    return vectors


def _joined(comm: MPI.Intracomm, mirror: Mirror, behind: int, held: list[int]) -> dict[str, Array]:
    """Whole vectors of the shards after the newest step but ``behind``; ``held``: who the ranks were."""
    nranks = mirror.comm.size
    lost = [rank for rank in range(nranks) if rank not in held and (rank - 1) % nranks not in held]
    if lost or mirror.newest < 0:
        raise StateLostError(
            f"the optimizer's state of rank {lost[0] if lost else mirror.rank} is lost: expected ranks that "
            f"have died not to be neighbours, got {sorted({*range(nranks)} - {*held})} of {nranks} at once; "
            "go on from a checkpoint (--resume)"
        )
    kept = mirror.after(mirror.newest - behind)
    like = kept[mirror.rank][PARAMETERS]
    xp = array_module(like)
    whole = {name: xp.empty(bounds[-1], like.dtype) for name, bounds in mirror.bounds.items()}
    for rank in range(nranks):
        root = held.index(rank if rank in held else (rank - 1) % nranks)
        for name, vector in whole.items():
            begin, end = mirror.bounds[name][rank : rank + 2]
            if comm.rank == root:
                vector[begin:end] = kept[rank][name]
            if begin < end:
                comm.Bcast(vector[begin:end], root)
    return whole


# Recovery ----------------------------------------------------------------------------------------------


def recover(trainer: Trainer, error: RankFailedError) -> Lost:
    """Let ``trainer`` go on with the ranks that are left, after one of its collectives has raised ``error``.

    Collective over them. Raises ``error`` if nobody has died, `StateLostError` if they do not have it all.
    """
    began = perf_counter()
    remains = Remains.of(trainer)
    before, comm = trainer.origins, trainer.comm
    trainer.strategy.break_off()
    while True:
        assert isinstance(comm, Communicator)
        own = before[remains.rank]
        comm = comm.shrink()
        if comm.size == len(before):
            raise error
        try:
            origins: list[int] = comm.allgather(own)
            trainer.comm, trainer.origins = comm, origins
            state = newest(comm, remains)
            remains = replace(remains, facts=state.facts, state=state)
            trainer.move(comm, state)
        except RankFailedError:
            continue
        lost = tuple(rank for rank in before if rank not in origins)
        return Lost(lost, state.facts["step"], perf_counter() - began, time())
