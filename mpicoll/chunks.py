"""Where the chunks of a schedule lie in a rank's buffers, for each collective.

A schedule moves chunks, and knows neither sizes nor addresses. Here it meets the arguments of a call: how
many elements a chunk has, and where it begins in the input and in the output, counted from their beginnings.
What comes out is compiled to a `Program`, for host memory and for a GPU's alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpicoll import algorithms
from mpicoll.buffers import Blocks
from mpicoll.schedule import Schedule, chunk_bounds
from mpicoll.transports.program import Layout

Parts = tuple[Schedule, Layout]


class Shape:
    """Blocks in bytes, one for each rank."""

    def __init__(self, counts: Sequence[int], displacements: Sequence[int]) -> None:
        self.counts = list(counts)
        self.displacements = list(displacements)

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(self.counts), tuple(self.displacements)

    @property
    def end(self) -> int:
        return max((d + c for c, d in zip(self.counts, self.displacements, strict=True)), default=0)


def byte_shape(blocks: Blocks) -> Shape:
    """Where blocks lie in bytes; those of a datatype with holes lie packed, one after the other."""
    size = blocks.message.size
    counts = [count * size for count in blocks.counts]
    if blocks.message.plain:
        return Shape(counts, [displacement * size for displacement in blocks.displacements])
    return Shape(counts, np.cumsum([0, *counts[:-1]]).tolist())


def reduction(
    collective: str,
    algorithm: str,
    nranks: int,
    shape: int | tuple[int, ...],
    root: int,
    itemsize: int,
    in_place: bool,
) -> Parts:
    """Allreduce and reduce of ``shape`` elements, reduce-scatter of blocks of so many."""
    schedule = algorithms.schedule(collective, algorithm, nranks, root)
    if isinstance(shape, int):
        bounds = chunk_bounds(shape, schedule.nchunks, itemsize)
        output_at = bounds[:-1]
    else:
        bounds = np.cumsum([0, *shape])
        output_at = np.zeros(nranks, np.int64)
    return schedule, Layout(np.diff(bounds), bounds[:-1], output_at, in_place)


def broadcast(algorithm: str, nranks: int, nbytes: int, root: int) -> Parts:
    """Bytes that all ranks have in one place."""
    schedule = algorithms.schedule("broadcast", algorithm, nranks, root)
    bounds = chunk_bounds(nbytes, schedule.nchunks, 1)
    return schedule, Layout(np.diff(bounds), bounds[:-1], bounds[:-1], in_place=True)


def rooted(collective: str, algorithm: str, nranks: int, shape: Shape, root: int, in_place: bool) -> Parts:
    """Gather and scatter; ``shape`` is that of the root's blocks; another rank knows its own alone."""
    schedule = algorithms.schedule(collective, algorithm, nranks, root)
    counts, blocks_at = np.array(shape.counts), np.array(shape.displacements)
    own_at = blocks_at if in_place else np.zeros(nranks, np.int64)
    sides = (own_at, blocks_at) if collective == "gather" else (blocks_at, own_at)
    return schedule, Layout(counts, sides[0], sides[1], in_place)


def allgather(algorithm: str, nranks: int, shape: Shape, in_place: bool) -> Parts:
    """``shape`` is that of all blocks, where they are to come together."""
    schedule = algorithms.schedule("allgather", algorithm, nranks)
    at = np.array(shape.displacements)
    return schedule, Layout(
        np.array(shape.counts), at if in_place else np.zeros(nranks, np.int64), at, in_place
    )


def alltoall(algorithm: str, nranks: int, rank: int, sent: Shape, received: Shape) -> Parts:
    """Blocks to and from each rank."""
    schedule = algorithms.schedule("alltoall", algorithm, nranks)
    # Bruck passes others' blocks on; all are as large as ours then.
    counts = np.full(schedule.nchunks, sent.counts[0])
    input_at, output_at = np.zeros((2, schedule.nchunks), np.int64)
    ours, theirs = schedule.inputs(rank), schedule.outputs(rank)
    counts[ours], input_at[ours] = sent.counts, sent.displacements
    counts[theirs], output_at[theirs] = received.counts, received.displacements
    return schedule, Layout(counts, input_at, output_at)
