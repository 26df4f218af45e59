"""A mesh of ranks: which of them share a batch, which are stages of one pipeline, which split layers.

    rank = (data * pipelines + pipeline) * tensors + tensor

Ranks with the same ``data`` coordinate hold one model together (the ``model`` communicator), those that
differ in nothing else hold the same part of it, and share each batch (``data``). Tensor parallelism, which
communicates most, is among ranks that are next to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt
from mpi4py import MPI

from mpicoll.train.arrays import Array
from mpicoll.train.errors import InputError, on_rank_zero
from mpicoll.train.layers import Layer
from mpicoll.train.model import Sequential
from mpicoll.train.pipeline import measure_costs, partition
from mpicoll.train.tensor_parallel import parallel_layers

AXES = ("data", "pipeline", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """From ``data=2,pipeline=2``, in any order. Raises ValueError that says what is wrong."""
    sizes: dict[str, int] = {}
    for item in text.split(","):
        axis, _, size = (piece.strip() for piece in item.partition("="))
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh: expected sizes such as data=2,pipeline=2,tensor=1, each axis once; got {text!r}"
            )
        sizes[axis] = int(size)
    return sizes


@dataclass(frozen=True)
class Mesh:
    """The communicators along each axis, and of all that hold one model together."""

    world: MPI.Intracomm
    data: MPI.Intracomm
    pipeline: MPI.Intracomm
    tensor: MPI.Intracomm
    model: MPI.Intracomm

    @property
    def sizes(self) -> dict[str, int]:
        """How many ranks there are along each axis."""
        return {axis: getattr(self, axis).size for axis in AXES}

    @property
    def speaks(self) -> bool:
        """Whether this rank, of those that hold one model, has the outputs and reports on them."""
        return self.pipeline.rank == self.pipeline.size - 1 and self.tensor.rank == 0

    def free(self) -> None:
        """Give up the communicators that were made. Collective."""
        made = {id(comm): comm for comm in (self.data, self.pipeline, self.tensor, self.model)}
        made.pop(id(self.world), None)
        for comm in made.values():
            comm.Free()


def make_mesh(comm: MPI.Intracomm, sizes: Mapping[str, int]) -> Mesh:
    """The mesh of ``comm``'s ranks with these sizes; ``data`` is what is left if it is not among them.

    Collective. Raises `InputError` where the sizes do not multiply to the ranks.
    """
    pipelines, tensors = sizes.get("pipeline", 1), sizes.get("tensor", 1)
    data = sizes.get("data", max(1, comm.size // (pipelines * tensors)))
    if data * pipelines * tensors != comm.size:
        raise InputError(
            f"mesh: expected sizes that multiply to the {comm.size} ranks of this job, "
            f"got data={data}, pipeline={pipelines}, tensor={tensors}"
        )
    tensor_rank, rest = comm.rank % tensors, comm.rank // tensors
    stage, replica = rest % pipelines, rest // pipelines
    alone = comm if comm.size == 1 else MPI.Intracomm(MPI.COMM_SELF).Dup()
    return Mesh(
        world=comm,
        data=comm if data == comm.size else _split(comm, stage * tensors + tensor_rank),
        pipeline=_split(comm, replica * tensors + tensor_rank) if pipelines > 1 else alone,
        tensor=_split(comm, replica * pipelines + stage) if tensors > 1 else alone,
        model=_split(comm, replica) if pipelines * tensors > 1 else alone,
    )


def _split(comm: MPI.Intracomm, colour: int) -> MPI.Intracomm:
    """Of ``comm``, in its order; typed, for mpi4py's own type of it says too little."""
    part: Any = comm.Split(colour, comm.rank)
    return part  # type: ignore[no-any-return]


def build_model(
    layers: Sequence[Layer],
    mesh: Mesh,
    sample: Array,
    seed: int,
    dtype: npt.DTypeLike,
    allocate: Callable[[int, npt.DTypeLike], Array],
) -> Sequential:
    """This rank's part of the model: its stage of the ``layers``, and of that its slices. Collective.

    ``sample`` [n, ...] are inputs like those of a step, where the model is to be: layers go to stages by the
    time that they take there.
    """
    numbers: Sequence[int] = range(len(layers))
    if mesh.pipeline.size > 1:
        own = _stage(layers, mesh, sample, dtype)
        layers, numbers = layers[own], numbers[own]
    needs_dx = mesh.pipeline.rank > 0
    if mesh.tensor.size > 1:
        layers, numbers = parallel_layers(layers, mesh.tensor, numbers, input_gradient=needs_dx)
    model = Sequential(
        *layers, seed=seed, dtype=dtype, allocate=allocate, numbers=numbers, input_gradient=needs_dx
    )
    if mesh.model.size > 1:
        weights = tuple(1.0 if place.split else 1 / mesh.tensor.size for place in model.placements)
        trained = mesh.pipeline.allgather(model.tensors.trained)
        model.tensors = replace(
            model.tensors,
            weights=weights,
            comms=(mesh.model,),
            offset=sum(trained[: mesh.pipeline.rank]),
            total=sum(trained),
        )
    for layer in model.layers:
        layer.connect(mesh.data)
    return model


def _stage(layers: Sequence[Layer], mesh: Mesh, sample: Array, dtype: Any) -> slice:
    """Which layers are this rank's."""
    stages = mesh.pipeline.size
    if stages > len(layers):
        raise InputError(
            f"pipeline: expected at most as many stages as the model has layers ({len(layers)}), got {stages}"
        )
    costs = on_rank_zero(mesh.world, lambda: _costs(layers, sample, dtype))
    return partition(costs, stages)[mesh.pipeline.rank]


def _costs(layers: Sequence[Layer], sample: Array, dtype: Any) -> list[float]:
    try:
        return measure_costs(layers, sample, dtype=dtype)
    except ValueError as error:  # layers that do not go with each other
        raise InputError(str(error)) from error
