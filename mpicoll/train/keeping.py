"""Keeping the state of a training, and taking it up again, at any rank count.

A checkpoint has whole tensors under the names of the model (``3.weight``), the optimizer's state for each
(``velocity/3.weight``), and as facts where training is. Random numbers need nothing but the seed: each is a
function of the position (`mpicoll.train.seeds`). So what was written on 4 ranks, as a pipeline or in shards,
is taken up on 3, or on one. Only what a rank alone has (what a compression has not sent yet) is dropped where
the number of ranks has changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.train.arrays import Array, beside, host_copy
from mpicoll.train.checkpoint import Snapshot, Writer, newest
from mpicoll.train.errors import InputError, alone, on_rank_zero
from mpicoll.train.layers import Placement, Shape
from mpicoll.train.model import views

if TYPE_CHECKING:
    from mpicoll.train.loop import Epoch, Trainer

Tensor = npt.NDArray[Any]
Held = tuple[str, Placement, Tensor]  # the part of a whole tensor that a rank has
BEST = "best"


class Keeper:
    """Hears what the loop does, and keeps its state; this one keeps nothing."""

    def begin(self, trainer: Trainer) -> None:
        """Before the first step, and again where ranks were lost: they may have other numbers. Collective."""

    def is_due(self, step: int) -> bool:
        """Whether `keep` is to be called after this step, counted from 1, if it does not end an epoch."""
        return False

    def keep(self, trainer: Trainer) -> None:
        """Keep the state. Collective."""

    def epoch(self, trainer: Trainer, epoch: Epoch) -> None:
        """After each epoch. Collective."""

    def close(self, trainer: Trainer) -> None:
        """After the training. Collective."""


class Checkpoints(Keeper):
    """Writes checkpoints to ``directory``: after ``every`` steps, or each epoch, and at the end.

    The last ``keep`` stay, and ``best.safetensors``, of the epoch with the smallest test loss. Files are
    written by a thread of rank 0, while training goes on. Raises `InputError`, on all ranks. Collective.

    Where rank 0 is lost, the new rank 0 writes. What it was writing just then may be missing, never torn.
    """

    def __init__(self, comm: MPI.Intracomm, directory: Path, every: int | None = None, keep: int = 3):
        self.comm = comm
        self.directory, self.every, self.number = directory, every, keep
        self._last_step = -1
        self._writer: Writer | None = None
        on_rank_zero(comm, self._open)

    def begin(self, trainer: Trainer) -> None:
        if trainer.comm is not self.comm:
            self.comm = trainer.comm
            on_rank_zero(self.comm, self._open)

    def _open(self) -> None:
        self._writer = self._writer or Writer(self.directory, self.number)

    def is_due(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0

    def keep(self, trainer: Trainer) -> None:
        self._write(trainer, None)
        self._last_step = trainer.position.step

    def epoch(self, trainer: Trainer, epoch: Epoch) -> None:
        if self.every is None or self.is_due(trainer.position.step):
            self.keep(trainer)
        earlier = [before.test_loss for before in trainer.history[:-1]]
        if epoch.test_loss < min(earlier, default=np.inf):
            self._write(trainer, BEST)

    def close(self, trainer: Trainer) -> None:
        if self._last_step != trainer.position.step:
            self.keep(trainer)
        self._on_rank_zero(trainer, lambda: self._writer.close() if self._writer else None)

    def _write(self, trainer: Trainer, name: str | None) -> None:
        snapshot = capture(trainer)
        if snapshot is not None or trainer.strategy.in_step:
            self._on_rank_zero(trainer, lambda: self._hand_over(snapshot, name))

    def _hand_over(self, snapshot: Snapshot | None, name: str | None) -> None:
        assert self._writer is not None and snapshot is not None
        self._writer.write(snapshot, name)

    def _on_rank_zero(self, trainer: Trainer, function: Callable[[], None]) -> None:
        """``function()`` on rank 0, whose error is all ranks', if they are here, too."""
        if trainer.strategy.in_step:
            on_rank_zero(self.comm, function)
        elif self.comm.rank == 0:
            with alone(in_step=False):
                function()


# From the ranks to a snapshot --------------------------------------------------------------------------


def capture(trainer: Trainer) -> Snapshot | None:
    """The state of the training, on rank 0; None on the others. Collective where ranks are in step."""
    model, mesh, strategy = trainer.model, trainer.mesh, trainer.strategy
    total = trainer.loss_so_far()
    with strategy.consensus():
        arrays = assembled(trainer, {"": model.parameters} | strategy.vectors())
    own = {f"rank{trainer.comm.rank}/{name}": host_copy(a) for name, a in strategy.own_arrays().items()}
    everyones = trainer.comm.gather(own) if strategy.in_step else [own]
    if everyones is None or trainer.comm.rank:
        return None
    for own in everyones:
        arrays |= own
    facts = {
        **facts_of(trainer, total),
        **_identity(trainer),
        "strategy": strategy.name,
        "ranks": trainer.comm.size,
        "mesh": mesh.sizes,
        "rate": trainer.rate(max(0, trainer.position.step - 1)),
    }
    return Snapshot(trainer.position.step, arrays, facts)


def facts_of(trainer: Trainer, loss: float | None) -> dict[str, Any]:
    """Where training is, as `Trainer.go_on` takes it; ``loss`` is the sum of the epoch's so far."""
    return {
        **dataclasses.asdict(trainer.position),
        "samples_of_epoch": trainer.samples,
        "loss_of_epoch": loss,
        "seconds_of_epoch": trainer.seconds_so_far() if trainer.samples else 0.0,
        "optimizer_steps": trainer.strategy.optimizer.steps,
        "history": [dataclasses.asdict(epoch) for epoch in trainer.history],
    }


def _identity(trainer: Trainer) -> dict[str, Any]:
    """What must be the same in the training that goes on."""
    return {
        "optimizer": type(trainer.strategy.optimizer).__name__,
        "batch_size": trainer.batch_size,
        "seed": trainer.seed,
        "shards": trainer.shards,
        "training_samples": len(trainer.data.train_y),
    }


def assembled(trainer: Trainer, vectors: Mapping[str, Array]) -> dict[str, Tensor]:
    """Whole tensors from ``vectors`` of parameters, and what is as long or shorter, on rank 0. Collective.

    Their names are ``3.weight`` for the vector "", and ``velocity/3.weight`` for "velocity".
    """
    held = [part for name, vector in vectors.items() for part in _held(trainer, name, vector)]
    tensors: dict[str, Tensor] = {}
    for parts in trainer.mesh.model.gather(held) or []:
        for name, placement, part in parts:
            if name not in tensors:
                tensors[name] = np.empty(placement.shape, part.dtype)
            tensors[name][placement.index] = part
    return tensors


def _held(trainer: Trainer, name: str, vector: Array) -> Iterator[Held]:
    model, prefix, host = trainer.model, f"{name}/" if name else "", host_copy(vector)
    bounds = model.tensors.bounds
    for tensor, placement, shape, (begin, end) in zip(
        model.names, model.placements, model.shapes, bounds, strict=True
    ):
        if end <= host.size:
            yield prefix + tensor, placement, host[begin:end].reshape(shape)


# From a snapshot to the ranks --------------------------------------------------------------------------


def resume(trainer: Trainer, directory: Path) -> list[str]:
    """Take up the newest good checkpoint in ``directory``; what was refused or dropped, a line for each.

    Collective. Raises `InputError`, on all ranks, if there is none, or none of this model and training.
    """
    held: list[Snapshot] = []

    def read() -> tuple[list[str], dict[str, Any], dict[str, tuple[Shape, str]]]:
        found = newest(directory)
        if found is None:
            raise InputError(f"{directory}: expected checkpoints to resume from, found none")
        snapshot, notes = found
        held.append(snapshot)
        forms = {name: (array.shape, array.dtype.str) for name, array in snapshot.arrays.items()}
        return notes, dict(snapshot.facts), forms

    notes, facts, forms = on_rank_zero(trainer.comm, read)
    _check(trainer, directory, facts, forms)
    own_names = {name for name in forms if name.startswith("rank")}
    alike = facts["ranks"] == trainer.comm.size and facts["mesh"] == trainer.mesh.sizes
    if own_names and not alike:
        notes.append("the error feedback of compression begins anew, for the number of ranks has changed")
    _take(trainer, facts, forms, held[0].arrays if held else {}, alike)
    return notes


def _check(trainer: Trainer, directory: Path, facts: Mapping[str, Any], forms: Mapping[str, Any]) -> None:
    """Raise `InputError` unless the checkpoint is of this model, this data and these batches."""
    for name, expected in _identity(trainer).items():
        if facts[name] != expected:
            raise InputError(
                f"{directory}: expected a checkpoint with {name.replace('_', ' ')} {expected}, as in this "
                f"run, found {facts[name]}"
            )
    model = trainer.model
    shapes = dict(zip(model.names, (placement.shape for placement in model.placements), strict=True))
    every: dict[str, Shape] = {}
    for own in trainer.mesh.model.allgather(shapes):
        every |= own
    found = {name: tuple(form[0]) for name, form in forms.items() if "/" not in name}
    if found != every:
        name = next(name for name in sorted({*every, *found}) if every.get(name) != found.get(name))
        raise InputError(
            f"{directory}: expected a checkpoint of this model, found one of another: {name} is "
            f"{_shape(every.get(name))} here and {_shape(found.get(name))} there"
        )


def _shape(shape: Shape | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape)) or "a number"


def _take(
    trainer: Trainer,
    facts: Mapping[str, Any],
    forms: Mapping[str, tuple[Shape, str]],
    arrays: Mapping[str, Tensor],
    alike: bool,
) -> None:
    """Send each array around, and let every rank take its part."""
    model, strategy = trainer.model, trainer.strategy
    parameters = dict(zip(model.names, model.parameter_views, strict=True))
    trained = model.tensors.trainable
    vectors = {name: np.zeros(trained, model.parameters.dtype) for name in strategy.optimizer.vectors}
    shapes = model.shapes[: model.tensors.trained]
    targets = dict(parameters)
    for vector, flat in vectors.items():
        for name, view in zip(model.names, views(flat, shapes), strict=False):
            targets[f"{vector}/{name}"] = view
    places = dict(zip(model.names, model.placements, strict=True))
    own = {f"rank{trainer.comm.rank}/{name}": array for name, array in strategy.own_arrays().items()}
    for name in sorted(forms):
        shape, dtype = forms[name]
        whole = np.ascontiguousarray(arrays[name]) if arrays else np.empty(shape, dtype)
        trainer.comm.Bcast(whole, root=0)
        if name in targets:
            part = whole[places[name.rpartition("/")[2]].index]
            targets[name][...] = beside(part, targets[name])
        elif alike and name in own:
            own[name][...] = beside(whole, own[name])
    go_on(trainer, vectors, facts)


def go_on(trainer: Trainer, vectors: dict[str, Array], facts: Mapping[str, Any]) -> None:
    """Take up the optimizer's ``vectors``, whole ones, and be where the facts say. Collective."""
    trainer.strategy.restore(vectors, facts["optimizer_steps"])
    trainer.go_on(facts)
