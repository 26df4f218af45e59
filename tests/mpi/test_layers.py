"""BatchNorm over ranks: as on one process that has the whole batch, however it is divided."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll.train.layers import BatchNorm, Context
from mpicoll.train.model import Sequential

COMM = mpicoll.Communicator(MPI.COMM_WORLD)

FEATURES = 5
AnyArray = npt.NDArray[Any]


@dataclass(frozen=True)
class Result:
    """``gradients``: of gamma, beta, the mean and the variance, one after the other."""

    y: AnyArray
    dx: AnyArray
    gradients: AnyArray


def batch_norm(comm: Any, dtype: npt.DTypeLike = np.float64) -> Sequential:
    model = Sequential(BatchNorm(FEATURES, momentum=0.3, synchronised=True), dtype=dtype)
    model.parameters += np.linspace(0, 1, model.parameters.size, dtype=dtype)
    model.layers[0].connect(comm)
    return model


def step(model: Sequential, x: AnyArray, dy: AnyArray, share: float) -> Result:
    y, saved = model.forward(x, Context(training=True, share=share))
    model.gradients[...] = 77
    dx = model.backward(dy, saved)
    return Result(y, dx, model.gradients.copy())


def batch(n: int, image: tuple[int, ...] = ()) -> tuple[AnyArray, AnyArray]:
    """``n`` samples and the gradients that come to them, the same on every rank."""
    random = np.random.default_rng(n)
    x = 3 * random.standard_normal((n, FEATURES, *image)) + np.arange(n).reshape(-1, 1, *[1] * len(image))
    return x, random.standard_normal(x.shape)


def bounds(division: str, n: int) -> list[int]:
    """Where each rank's part begins, and the last one ends."""
    ends = {
        "even": [n * (rank + 1) // COMM.size for rank in range(COMM.size)],
        "growing": [n * (rank + 1) ** 2 // COMM.size**2 for rank in range(COMM.size)],
        "odd ranks empty": [min(n, 6 * (rank // 2 + 1)) for rank in range(COMM.size - 1)] + [n],
        "all on one": [n if rank >= COMM.size // 2 else 0 for rank in range(COMM.size)],
        "one each": [min(n, rank + 1) for rank in range(COMM.size - 1)] + [n],
    }
    return [0, *ends[division]]


def own(division: str, n: int) -> slice:
    return slice(*list(pairwise(bounds(division, n)))[COMM.rank])


def assert_as_on_one_process(parts: Result, rows: Any, whole: Result, tolerance: float = 1e-12) -> None:
    """The own ``rows``, and the sums over ranks."""
    gradients = np.empty_like(parts.gradients)
    COMM.Allreduce(parts.gradients, gradients)
    np.testing.assert_allclose(parts.y, whole.y[rows], rtol=0, atol=tolerance)
    np.testing.assert_allclose(parts.dx, whole.dx[rows], rtol=0, atol=tolerance)
    np.testing.assert_allclose(gradients, whole.gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("image", [(), (2, 3)], ids=["vectors", "images"])
@pytest.mark.parametrize("division", ["even", "growing", "odd ranks empty", "all on one", "one each"])
def test_ranks_normalise_as_one_process(division: str, image: tuple[int, ...]) -> None:
    n = 23
    x, dy = batch(n, image)
    whole = step(batch_norm(MPI.COMM_SELF), x, dy, 1.0)
    rows = own(division, n)
    part = step(batch_norm(COMM), x[rows], dy[rows], len(x[rows]) / n)
    assert_as_on_one_process(part, rows, whole)


def test_pieces_of_parts_are_batches_of_their_own() -> None:
    """As in gradient accumulation: piece k of every rank's part, together, is normalised as a batch."""
    n, pieces = 23, 3
    x, dy = batch(n)
    alone, model = batch_norm(MPI.COMM_SELF), batch_norm(COMM)
    parts = [np.arange(a, b) for a, b in pairwise(bounds("growing", n))]
    for piece in range(pieces):
        rows_of = [np.array_split(part, pieces)[piece] for part in parts]
        rows = np.concatenate(rows_of)
        whole = step(alone, x[rows], dy[rows], len(rows) / n)
        mine = rows_of[COMM.rank]
        part = step(model, x[mine], dy[mine], len(mine) / n)
        begin = sum(map(len, rows_of[: COMM.rank]))
        assert_as_on_one_process(part, slice(begin, begin + len(mine)), whole)


@pytest.mark.filterwarnings("error")
def test_nobody_has_a_sample() -> None:
    x, dy = batch(0)
    result = step(batch_norm(COMM), x, dy, 0.0)
    assert result.y.shape == result.dx.shape == (0, FEATURES) and (result.gradients == 0).all()


def test_float32_stays_float32_and_all_ranks_have_the_same_statistics() -> None:
    n = 23
    x, dy = (array.astype(np.float32) for array in batch(n))
    whole = step(batch_norm(MPI.COMM_SELF, np.float32), x, dy, 1.0)
    rows = own("growing", n)
    part = step(batch_norm(COMM, np.float32), x[rows], dy[rows], 1.0)
    assert part.y.dtype == part.dx.dtype == np.float32
    assert len({statistics.tobytes() for statistics in COMM.allgather(part.gradients[2 * FEATURES :])}) == 1
    np.testing.assert_allclose(part.dx, whole.dx[rows], rtol=0, atol=1e-5)


def test_ranks_go_by_themselves_where_not_synchronised() -> None:
    model = Sequential(BatchNorm(FEATURES), dtype=np.float64)
    model.layers[0].connect(COMM)
    x = batch(6)[0] * (COMM.rank + 1) + COMM.rank
    y, _ = model.forward(x, Context(training=True))
    np.testing.assert_allclose(y.mean(axis=0), np.zeros(FEATURES), atol=1e-12)
