"""Every form of a buffer in every collective, beside what MPI itself makes of it."""

from __future__ import annotations

import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll

from .examples import EXAMPLES, Array, data, in_place_or_not, total

WORLD = MPI.COMM_WORLD
COMM = mpicoll.Communicator(WORLD)
RANK, SIZE = WORLD.rank, WORLD.size
COUNT = 6
Call = Callable[[MPI.Intracomm, Array, Array], None]


def same_as_mpi(call: Call, send_size: int, recv_size: int) -> None:
    """``call`` on both communicators, with the same data: every byte of both buffers must agree."""
    results = []
    for comm in (WORLD, COMM):
        send, recv = data(RANK, send_size, salt=1), np.full(recv_size, -1, np.int64)
        call(comm, send, recv)
        results.append((send, recv))
    for ours, mpis in zip(results[1], results[0], strict=True):
        np.testing.assert_array_equal(ours, mpis)
    unchanged = (data(RANK, send_size, salt=1), np.full(recv_size, -1))
    changed = any((x != y).any() for x, y in zip(results[1], unchanged, strict=True))
    assert SIZE == 1 or WORLD.allreduce(changed), "this example moves nothing"


SIMPLE: dict[str, Callable[[Array], Any]] = {
    "array": lambda x: x[: COUNT * (len(x) // COUNT)],
    "data, count": lambda x: [x, COUNT],
    "data, datatype": lambda x: [x, MPI.LONG],
    "data, code": lambda x: (x, "l"),
    "data, count, datatype": lambda x: [x, COUNT, MPI.LONG],
    "data, pair": lambda x: [x, (COUNT, 0)],
    "data, pair, datatype": lambda x: [x, (COUNT, 0), MPI.LONG],
    "four": lambda x: [x, COUNT, 0, MPI.LONG],
    "none": lambda x: [x, None, "l"],
    "view": lambda x: x.data,
}


@pytest.mark.parametrize("form", SIMPLE)
def test_simple_forms(form: str) -> None:
    make = SIMPLE[form]
    same_as_mpi(lambda comm, x, y: comm.Allreduce(make(x), make(y)), COUNT, COUNT)
    same_as_mpi(lambda comm, x, y: comm.Reduce(make(x), make(y), root=SIZE - 1), COUNT, COUNT)
    same_as_mpi(lambda comm, x, y: comm.Bcast(make(x), SIZE - 1), COUNT, 0)
    same_as_mpi(lambda comm, x, y: comm.Allgather(make(x), make(y)), COUNT, COUNT * SIZE)
    same_as_mpi(lambda comm, x, y: comm.Gather(make(x), make(y), SIZE - 1), COUNT, COUNT * SIZE)
    same_as_mpi(lambda comm, x, y: comm.Scatter(make(x), make(y), SIZE - 1), COUNT * SIZE, COUNT)
    same_as_mpi(lambda comm, x, y: comm.Alltoall(make(x), make(y)), COUNT * SIZE, COUNT * SIZE)
    same_as_mpi(lambda comm, x, y: comm.Reduce_scatter_block(make(x), make(y)), COUNT * SIZE, COUNT)
    counts = [COUNT] * SIZE
    # The counts of Reduce_scatter are those of all blocks together.
    same_as_mpi(lambda comm, x, y: comm.Reduce_scatter(x, make(y), counts), COUNT * SIZE, COUNT)
    same_as_mpi(lambda comm, x, y: comm.Reduce_scatter([x, SIZE * COUNT, "l"], make(y)), COUNT * SIZE, COUNT)


def test_displacements_of_simple_forms() -> None:
    def shifted(x: Array) -> list[Any]:
        return [x, (COUNT, 2), MPI.LONG]

    same_as_mpi(lambda comm, x, y: comm.Allreduce(shifted(x), shifted(y)), COUNT + 3, COUNT + 3)
    same_as_mpi(lambda comm, x, y: comm.Bcast(shifted(x)), COUNT + 3, 0)
    size = COUNT * SIZE + 3
    same_as_mpi(lambda comm, x, y: comm.Allgather(shifted(x), shifted(y)), COUNT + 3, size)
    same_as_mpi(lambda comm, x, y: comm.Scatter(shifted(x), shifted(y)), size, COUNT + 3)
    same_as_mpi(lambda comm, x, y: comm.Reduce_scatter_block(shifted(x), shifted(y)), size, COUNT + 3)


COUNTS = [(rank * 2 + 1) % 4 for rank in range(SIZE)]
GAPS = [5 * (SIZE - 1 - rank) for rank in range(SIZE)]
ROOM = 5 * SIZE
VECTOR: dict[str, Callable[[Array], Any]] = {
    "counts": lambda x: [x, COUNTS],
    "array of counts": lambda x: [x, np.array(COUNTS)],
    "counts, datatype": lambda x: [x, COUNTS, MPI.LONG],
    "pair": lambda x: [x, (COUNTS, GAPS)],
    "pair, datatype": lambda x: [x, (COUNTS, GAPS), "l"],
    "pair without displacements": lambda x: [x, (COUNTS, None), "l"],
    "four": lambda x: (x, COUNTS, GAPS, MPI.LONG),
}


def rank_blocks(form: str) -> list[int]:
    """Displacements, to which the data at rank r must be fitted for a comparison of everything."""
    return GAPS if form in ("pair", "pair, datatype", "four") else np.cumsum([0, *COUNTS[:-1]]).tolist()


@pytest.mark.parametrize("form", VECTOR)
def test_vector_forms(form: str) -> None:
    make, mine = VECTOR[form], COUNTS[RANK]
    same_as_mpi(lambda comm, x, y: comm.Allgatherv([x, mine], make(y)), 4, ROOM)
    same_as_mpi(lambda comm, x, y: comm.Gatherv([x, mine], make(y), SIZE - 1), 4, ROOM)
    same_as_mpi(lambda comm, x, y: comm.Scatterv(make(x), [y, mine], SIZE - 1), ROOM, 4)
    start = rank_blocks(form)[RANK]

    def in_place(comm: MPI.Intracomm, x: Array, y: Array) -> None:
        y[start : start + mine] = x[:mine]
        comm.Allgatherv(MPI.IN_PLACE, make(y))

    same_as_mpi(in_place, 4, ROOM)


def test_counts_and_distances_that_are_the_same_for_all() -> None:
    def spread(x: Array) -> list[Any]:
        return [x, (2, 3), MPI.LONG]  # two elements for each rank, three apart

    same_as_mpi(lambda comm, x, y: comm.Allgatherv([x, 2], spread(y)), 2, 3 * SIZE)
    same_as_mpi(lambda comm, x, y: comm.Alltoallv(spread(x), spread(y)), 3 * SIZE, 3 * SIZE)
    same_as_mpi(lambda comm, x, y: comm.Scatterv([x, 2], [y, 2]), 2 * SIZE, 2)


def test_counts_that_are_left_out_divide_the_data() -> None:
    size = 3 * SIZE + 1
    mine = size // SIZE + (size % SIZE > RANK)
    same_as_mpi(lambda comm, x, y: comm.Scatterv(x, y), size, mine)
    same_as_mpi(lambda comm, x, y: comm.Allgatherv(x, y), mine, size)


def test_every_pair_of_ranks_may_exchange_another_amount() -> None:
    def counts(src: int) -> list[int]:
        return [(src * 3 + dst) % 4 for dst in range(SIZE)]

    sent = counts(RANK)
    received = [counts(src)[RANK] for src in range(SIZE)]
    gaps = [4 * dst for dst in reversed(range(SIZE))]
    same_as_mpi(
        lambda comm, x, y: comm.Alltoallv([x, (sent, gaps)], [y, (received, gaps[::-1])]), 4 * SIZE, 4 * SIZE
    )
    same_as_mpi(lambda comm, x, y: comm.Alltoallv([x, sent], [y, received]), 4 * SIZE, 4 * SIZE)


@pytest.mark.parametrize("method", [m for m in EXAMPLES if len(in_place_or_not(m)) == 2])
def test_in_place(method: str) -> None:
    """Where MPI leaves open what becomes of some elements, the example checks the others."""
    for comm in (WORLD, COMM):
        for count in (0, 1, 5):
            example = EXAMPLES[method](comm, count, SIZE - 1, True)
            example.fill(2)
            getattr(comm, method)(*example.args)
            example.check(2, f"{method} {count} {type(comm).__name__}")


def test_the_same_array_as_input_and_output_is_in_place() -> None:
    x = data(RANK, 7)
    COMM.Allreduce(x, x)
    np.testing.assert_array_equal(x, total(SIZE, 7))
    y = data(RANK, 7)
    COMM.Reduce(y, y if RANK == 0 else None)
    np.testing.assert_array_equal(y, total(SIZE, 7) if RANK == 0 else data(RANK, 7))


def test_zero_counts() -> None:
    nothing, where = np.empty(0), [0] * SIZE
    COMM.Allreduce(nothing, nothing)
    COMM.Bcast([None, 0, MPI.DOUBLE])
    COMM.Allgather([None, 0, MPI.INT], [None, 0, MPI.INT])
    COMM.Alltoallv([nothing, where], [nothing, where])
    COMM.Gatherv(nothing, [nothing, where] if RANK == 0 else None)
    COMM.Reduce_scatter(nothing, nothing, where)
    one = np.ones(1)
    COMM.Allreduce(MPI.IN_PLACE, one)
    assert one[0] == SIZE


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_several_dimensions_are_their_memory(order: Any) -> None:
    x = np.asarray(data(RANK, 24).reshape(2, 3, 4), order=order)
    y = np.zeros_like(x)
    COMM.Allreduce(x, y)
    np.testing.assert_array_equal(y, sum(data(r, 24).reshape(2, 3, 4) for r in range(SIZE)))
    COMM.Bcast(x, SIZE - 1)
    np.testing.assert_array_equal(x, data(SIZE - 1, 24).reshape(2, 3, 4))


def test_memory_of_other_kinds() -> None:
    x, y = array.array("d", [RANK, 2.0]), array.array("d", [0, 0])
    COMM.Allreduce(x, y)
    assert y.tolist() == [sum(range(SIZE)), 2.0 * SIZE]
    letters = bytearray(SIZE)
    COMM.Allgather(bytes([65 + RANK]), letters)
    assert letters == bytes(range(65, 65 + SIZE))
    COMM.Bcast(memoryview(letters)[1:], 0)


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    x = torch.arange(5, dtype=torch.bfloat16) * (RANK + 1)
    COMM.Allreduce(MPI.IN_PLACE, x)
    assert x.tolist() == [i * SIZE * (SIZE + 1) // 2 for i in range(5)]


# -- derived datatypes


@pytest.fixture(params=["vector", "resized", "struct", "indexed"])
def derived(request: pytest.FixtureRequest) -> Any:
    """A datatype of two int64 within eight."""
    make: dict[str, Callable[[], MPI.Datatype]] = {
        "vector": lambda: MPI.LONG.Create_vector(2, 1, 3).Create_resized(0, 64),
        "resized": lambda: MPI.LONG.Create_contiguous(2).Create_resized(0, 64),
        "struct": lambda: MPI.Datatype.Create_struct([1, 1], [8, 48], [MPI.LONG, MPI.LONG]).Create_resized(
            0, 64
        ),
        "indexed": lambda: MPI.LONG.Create_indexed([1, 1], [5, 2]).Create_resized(0, 64),
    }
    datatype = make[request.param]().Commit()
    yield datatype
    datatype.Free()


def test_derived_datatypes(derived: MPI.Datatype) -> None:
    n = 8
    same_as_mpi(lambda comm, x, y: comm.Bcast([x, 3, derived], SIZE - 1), 3 * n, 0)
    same_as_mpi(lambda comm, x, y: comm.Allgather([x, 1, derived], [y, 1, derived]), n, n * SIZE)
    same_as_mpi(lambda comm, x, y: comm.Gather([x, 2, derived], [y, 2, derived]), 2 * n, 2 * n * SIZE)
    same_as_mpi(lambda comm, x, y: comm.Scatter([x, 2, derived], [y, 2, derived]), 2 * n * SIZE, 2 * n)
    same_as_mpi(lambda comm, x, y: comm.Alltoall([x, 1, derived], [y, 1, derived]), n * SIZE, n * SIZE)
    counts, gaps = [1] * SIZE, [2 * r for r in range(SIZE)]
    vector = (counts, gaps)
    same_as_mpi(lambda comm, x, y: comm.Allgatherv([x, 1, derived], [y, vector, derived]), n, 2 * n * SIZE)
    same_as_mpi(
        lambda comm, x, y: comm.Alltoallv([x, vector, derived], [y, vector, derived]),
        2 * n * SIZE,
        2 * n * SIZE,
    )


def test_a_datatype_with_holes_on_one_side_only(derived: MPI.Datatype) -> None:
    """The other side has the same data one after the other."""

    def at_root(comm: MPI.Intracomm, x: Array, y: Array) -> None:
        comm.Bcast([x, 3, derived] if RANK == 0 else [x, 6])

    same_as_mpi(at_root, 24, 0)
    same_as_mpi(lambda comm, x, y: comm.Allgather([x, 2], [y, 1, derived]), 2, 8 * SIZE)
    same_as_mpi(lambda comm, x, y: comm.Allgather([x, 1, derived], [y, 2]), 8, 2 * SIZE)
    same_as_mpi(lambda comm, x, y: comm.Scatter([x, 1, derived], [y, 2]), 8 * SIZE, 2)
    same_as_mpi(lambda comm, x, y: comm.Gather([x, 2], [y, 1, derived]), 2, 8 * SIZE)
    same_as_mpi(lambda comm, x, y: comm.Alltoall([x, 1, derived], [y, 2]), 8 * SIZE, 2 * SIZE)


def test_derived_datatypes_in_place(derived: MPI.Datatype) -> None:
    same_as_mpi(lambda comm, x, y: comm.Allgather(MPI.IN_PLACE, [x, 1, derived]), 8 * SIZE, 0)
    same_as_mpi(lambda comm, x, y: comm.Alltoall(MPI.IN_PLACE, [x, 1, derived]), 8 * SIZE, 0)
    same_as_mpi(
        lambda comm, x, y: comm.Gather(MPI.IN_PLACE if RANK == 0 else [x, 1, derived], [x, 1, derived]),
        8 * SIZE,
        0,
    )


def test_a_column_of_a_matrix() -> None:
    """The way to send what is not contiguous, and what the error for a strided array says."""
    column = MPI.DOUBLE.Create_vector(4, 1, 5).Create_resized(0, 8).Commit()
    matrix = np.arange(20.0).reshape(4, 5) + 100 * RANK
    with pytest.raises(ValueError, match="derived MPI datatype"):
        COMM.Bcast(matrix[:, 2])
    COMM.Bcast([matrix, (1, 2), column], SIZE - 1)
    assert matrix[:, 2].tolist() == [2 + 100 * (SIZE - 1) + 5 * i for i in range(4)]
    assert matrix[0, 1] == 1 + 100 * RANK
    column.Free()


def test_absolute_addresses() -> None:
    x, y = data(RANK, 3), np.full(3, RANK)
    both = MPI.Datatype.Create_struct(
        [3, 3], [MPI.Get_address(x), MPI.Get_address(y)], [MPI.LONG, MPI.LONG]
    ).Commit()
    COMM.Bcast([MPI.BOTTOM, 1, both], SIZE - 1)
    np.testing.assert_array_equal(x, data(SIZE - 1, 3))
    assert y.tolist() == [SIZE - 1] * 3
    both.Free()
