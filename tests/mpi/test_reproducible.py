"""`ReproducibleSum`: the bits of the fixed tree, whatever the ranks, the algorithm and the bucket size."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll import algorithms
from mpicoll.reproducible import ReproducibleSum, verify_order

from .examples import everyday

Array = npt.NDArray[Any]
COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
SHARDS = [SIZE, 8, 13]


def shard_vectors(nshards: int, count: int, dtype: str, salt: int = 0) -> list[Array]:
    """Numbers of very different magnitudes, so that every order of their additions has a sum of its own."""
    rng = np.random.default_rng([nshards, salt])
    digits = np.finfo(dtype).precision
    scales = 10.0 ** rng.integers(-digits // 2, digits // 2 + 1, (nshards, count))
    return list((rng.standard_normal((nshards, count)) * scales).astype(dtype))


def fixed_sum(vectors: list[Array]) -> Array:
    """The sum by the tree, straight from its definition: pairs, pairs of pairs, and an odd one as it is."""
    while len(vectors) > 1:
        pairs = [a + b for a, b in zip(vectors[::2], vectors[1::2], strict=False)]
        vectors = pairs + vectors[len(vectors) // 2 * 2 :]
    return vectors[0]


def check(total: ReproducibleSum, nshards: int, count: int, dtype: str, salt: int = 0) -> None:
    """One sum, and every rank's bits."""
    vectors = shard_vectors(nshards, count, dtype, salt)
    out = np.full(count, np.nan, dtype)
    vector = np.empty(count, dtype)
    for shard in total.own_shards:
        vector[:] = vectors[shard]  # one array for all shards, as a model's gradients are
        total.add(shard, vector)
    total.finish(out)
    assert out.tobytes() == fixed_sum(vectors).tobytes()


@pytest.mark.algorithms
@pytest.mark.parametrize("name", everyday("allreduce"))
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_every_algorithm_gives_the_bits_of_the_fixed_tree(name: str, dtype: str) -> None:
    for nshards in SHARDS:
        for bucket_bytes in (300, 1000, 1 << 20):
            total = ReproducibleSum(COMM, nshards, name, bucket_bytes)
            for step in range(2):
                check(total, nshards, 333, dtype, salt=step)
            total.close()


@pytest.mark.algorithms
@pytest.mark.parametrize("count", [0, 1, SIZE - 1, SIZE + 1, 100])
def test_vectors_of_any_size(count: int) -> None:
    for name in everyday("allreduce"):
        total = ReproducibleSum(COMM, 9, name, bucket_bytes=40)
        check(total, 9, count, "f4")
        check(total, 9, count, "f4", salt=1)
        total.close()


def test_a_bucket_has_at_least_one_element() -> None:
    total = ReproducibleSum(COMM, 9, bucket_bytes=1)
    check(total, 9, 7, "f8")
    total.close()


def test_sixteen_bits() -> None:
    total = ReproducibleSum(COMM, 9, "two_shot")
    check(total, 9, 100, "f2")
    total.close()


def test_a_communicator_of_ours_serves_and_stays_usable() -> None:
    with mpicoll.Communicator(COMM) as comm:
        total = ReproducibleSum(comm, 9, "recursive_doubling")
        check(total, 9, 50, "f4")
        ranks = np.array([RANK])
        comm.Allreduce(MPI.IN_PLACE, ranks)
        check(total, 9, 50, "f4", salt=1)
        total.close()
    assert ranks == SIZE * (SIZE - 1) // 2


def test_every_shard_belongs_to_one_rank() -> None:
    total = ReproducibleSum(COMM, 11)
    everyones = COMM.allgather(total.own_shards)
    assert [shard for own in everyones for shard in own] == list(range(11))
    total.close()


@pytest.mark.parametrize("name", everyday("allreduce"))
def test_the_bytes_sent_are_those_of_the_proof(name: str) -> None:
    schedule = algorithms.schedule("allreduce", name, SIZE)
    count = 10 * schedule.nchunks  # even chunks
    total = ReproducibleSum(COMM, 13, name)
    assert total.bytes_sent == 0
    check(total, 13, count, "f8")
    check(total, 13, count, "f8")
    most = COMM.allreduce(total.bytes_sent, MPI.MAX)
    assert most == 2 * verify_order(schedule, 13).volume * 10 * 8
    total.close()


def test_steps_after_the_first_use_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    total = ReproducibleSum(COMM, 2 * SIZE + 1, bucket_bytes=1024)
    check(total, 2 * SIZE + 1, 1000, "f4")
    monkeypatch.setattr("mpicoll.reproducible.np.empty", None)  # calling it would fail
    vectors = [np.ones(1000, "f4").view(Uncopied) for _ in range(2 * SIZE + 1)]
    for shard in total.own_shards:
        total.add(shard, vectors[shard])
    out = np.zeros(1000, "f4")
    total.finish(out)
    assert (out == 2 * SIZE + 1).all()
    total.close()


class Uncopied(np.ndarray[Any, Any]):
    """An array whose ``copy`` would be new memory."""

    def copy(self, order: Any = "C") -> Any:
        raise AssertionError("copied to new memory")


class OnDevice:
    """What is used of a CuPy array, in host memory: mpi4py and NumPy would not see what is in it."""

    def __init__(self, data: Array) -> None:
        self.data = data
        self.ndim, self.shape, self.size, self.dtype = data.ndim, data.shape, data.size, data.dtype

    def get(self) -> Array:
        return np.array(self.data)

    def set(self, host: Array) -> None:
        self.data[...] = host

    def copy(self) -> OnDevice:
        return OnDevice(self.data.copy())

    def __setitem__(self, where: Any, value: Any) -> None:
        self.data[where] = value.data if isinstance(value, OnDevice) else value

    def __iadd__(self, other: OnDevice) -> OnDevice:
        self.data += other.data
        return self

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        raise TypeError("CuPy's arrays are not converted implicitly")


def test_arrays_on_a_device_go_through_host_memory() -> None:
    total = ReproducibleSum(COMM, 9, "rabenseifner", bucket_bytes=100)
    vectors = shard_vectors(9, 77, "f4")
    for _ in range(2):
        for shard in total.own_shards:
            total.add(shard, OnDevice(vectors[shard]))
        out = OnDevice(np.zeros(77, "f4"))
        total.finish(out)
        assert out.data.tobytes() == fixed_sum(vectors).tobytes()
    total.close()


# --- bad input: found before anything is sent, here on every rank alike ---


def test_more_ranks_than_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="shards: expected at least as many as ranks") as caught:
        ReproducibleSum(COMM, SIZE - 1)
    assert str(caught.value).endswith(f"ranks ({SIZE}), got {SIZE - 1}")


def test_other_arguments_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="bucket_bytes: expected at least 1, got 0"):
        ReproducibleSum(COMM, 8, bucket_bytes=0)
    with pytest.raises(ValueError, match=r"algorithm: expected one of ring, .*; got 'rings'"):
        ReproducibleSum(COMM, 8, "rings")


def test_shards_in_another_order_are_refused() -> None:
    total = ReproducibleSum(COMM, 2 * SIZE)
    own, vector = total.own_shards, np.ones(5, "f4")
    with pytest.raises(ValueError, match=rf"shard: expected shard {own[0]} \(own_shards is .*got {own[1]}"):
        total.add(own[1], vector)
    total.add(own[0], vector)
    with pytest.raises(ValueError, match=rf"shard: expected shard {own[1]} .*, got {own[0]}"):
        total.add(own[0], vector)
    with pytest.raises(ValueError, match=rf"shard: expected {own[1]} before finish\(\)"):
        total.finish(vector)
    total.add(own[1], vector)
    with pytest.raises(ValueError, match=rf"shard: expected finish\(\) next .*, got {own.stop}"):
        total.add(own.stop, vector)
    total.finish(vector)
    assert (vector == 2 * SIZE).all()
    total.close()


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.ones(6, "f4"), "expected 5 elements of float32, got 6 of float32"),
        (np.ones(5, "f8"), "expected 5 elements of float32, got 5 of float64"),
        (np.ones(5, "i4"), r"expected a flat float vector, got int32 \(5,\)"),
        (np.ones((5, 1), "f4"), r"expected a flat float vector, got float32 \(5, 1\)"),
    ],
)
def test_other_vectors_are_refused(vector: Array, message: str) -> None:
    total = ReproducibleSum(COMM, 2 * SIZE)
    ones = np.ones(5, "f4")
    first, second = total.own_shards
    total.add(first, ones)
    with pytest.raises(ValueError, match=f"vector: {message}"):
        total.add(second, vector)
    total.add(second, ones)
    with pytest.raises(ValueError, match=f"out: {message}"):
        total.finish(vector)
    total.finish(ones)
    assert (ones == 2 * SIZE).all()
    total.close()
