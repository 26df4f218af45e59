"""Allreduce of many arrays at once: as a loop of Allreduce, whatever the arrays are and wherever they lie."""

from __future__ import annotations

import gc
import itertools
import random
import time
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from mpicoll.kernels.reduce import DTYPES, OPERATIONS, supports

import mpicoll
from mpicoll.faults import MismatchError, RankFailedError
from mpicoll.grouped import MAX_LISTS

from .examples import Array, data, everyday, total
from .test_hierarchical import TWO, needs_nodes
from .test_hierarchical import communicator as on_nodes
from .test_operations import contribution, reference

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
LAST = SIZE - 1
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Elements: nothing, odd numbers, enough to be reduced by itself where memory is shared, and everywhere.
COUNTS = (3, 0, 1, 700, 20_001, 17, 0, 64, 5)
LARGE = (600_000, 3, 300_000)
TRANSPORTS = ["shared", "messages", pytest.param("nodes", marks=needs_nodes)]

several_ranks = pytest.mark.skipif(SIZE == 1, reason="needs another rank")


@cache
def communicator(transport: str) -> mpicoll.Communicator:
    """One for all tests that leave it as it was."""
    if transport == "nodes":
        return on_nodes(TWO, algorithm="hierarchical")
    return mpicoll.Communicator(WORLD, transport=transport)


def filled(counts: Sequence[int], salt: int = 0) -> list[Array]:
    return [data(RANK, count, salt + i) for i, count in enumerate(counts)]


def check(arrays: Sequence[Array], salt: int = 0) -> None:
    for i, array in enumerate(arrays):
        about = f"array {i} of {array.size}, {salt=}, {RANK=}"
        np.testing.assert_array_equal(array, total(SIZE, array.size, salt + i).reshape(array.shape), about)


def sum_once(comm: mpicoll.Communicator, counts: Sequence[int], salt: int = 0, **named: Any) -> None:
    arrays = filled(counts, salt)
    comm.Allreduce_many(arrays, **named)
    check(arrays, salt)


# -- what comes out


@pytest.mark.algorithms
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_sums(transport: str) -> None:
    comm = communicator(transport)
    arrays = filled(COUNTS)
    for salt in range(4):  # what was prepared serves again
        for array, values in zip(arrays, filled(COUNTS, salt), strict=True):
            array[:] = values
        comm.Allreduce_many(arrays)
        check(arrays, salt)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_large_arrays(transport: str) -> None:
    sum_once(communicator(transport), LARGE)


@pytest.mark.parametrize("counts", [(), (0,), (0, 0), (1,), (20_001,), (1,) * 1000], ids=len)
def test_few_and_many(counts: tuple[int, ...]) -> None:
    for transport in ("shared", "messages"):
        for salt in range(2):
            sum_once(communicator(transport), counts, salt)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_on_every_dtype(op: str) -> None:
    """All dtypes that it is defined for at once, in turn."""
    dtypes = sorted((dtype for dtype in DTYPES if supports(op, dtype)), key=str)
    kinds = [(dtype, count) for count in (37, 1, 0, 9001) for dtype in dtypes]
    for transport in ("shared", "messages"):
        arrays = [contribution(dtype, RANK, op, count) for dtype, count in kinds]
        communicator(transport).Allreduce_many(arrays, getattr(MPI, op))
        for array, (dtype, count) in zip(arrays, kinds, strict=True):
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, reference(op, dtype, count), f"{op} of {count} {dtype}")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_average(transport: str) -> None:
    dtypes = sorted((dtype for dtype in DTYPES if dtype.kind in "fcV"), key=str)
    kinds = [(dtype, count) for dtype in dtypes for count in (37, 9001)]
    arrays = [contribution(dtype, RANK, "SUM", count) for dtype, count in kinds]
    communicator(transport).Allreduce_many(arrays, mpicoll.AVG)
    for array, (dtype, count) in zip(arrays, kinds, strict=True):
        wide = np.dtype(np.complex128 if dtype.kind == "c" else np.float64)
        tolerance = 2 * float(ml_dtypes.finfo(np.zeros(1, dtype).real.dtype).eps)
        wanted = reference("SUM", wide, count) / SIZE
        np.testing.assert_allclose(array.astype(wide), wanted, rtol=tolerance, atol=tolerance / 8)


def test_an_operation_of_the_users_own() -> None:
    def add(a: Any, b: Any, datatype: MPI.Datatype) -> None:
        np.frombuffer(b, np.int64)[:] += np.frombuffer(a, np.int64)

    op = MPI.Op.Create(add, commute=True)
    sum_once(communicator("shared"), COUNTS, op=op)
    op.Free()


@pytest.mark.algorithms
@pytest.mark.parametrize("name", [*everyday("allreduce"), "auto"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_algorithm(transport: str, name: str) -> None:
    for salt in range(2):
        sum_once(communicator(transport), COUNTS, salt, algorithm=name)


def floats(rank: int, count: int, salt: int) -> Array:
    """Of sizes so different that the order of addition shows."""
    generator = np.random.default_rng([rank, count, salt])
    return generator.standard_normal(count) * 10.0 ** generator.integers(-6, 6, count)


@pytest.mark.algorithms
@pytest.mark.parametrize("dtype", [np.dtype(np.float64), np.dtype(np.float32), BFLOAT16], ids=str)
def test_same_bits_as_a_loop_of_allreduce(dtype: np.dtype[Any]) -> None:
    comm = communicator("shared")
    for op in (MPI.SUM, mpicoll.AVG):
        together = [floats(RANK, count, i).astype(dtype) for i, count in enumerate(COUNTS)]
        one_by_one = [array.copy() for array in together]
        comm.Allreduce_many(together, op)
        for array in one_by_one:
            comm.Allreduce(MPI.IN_PLACE, array, op)
        assert [array.tobytes() for array in together] == [array.tobytes() for array in one_by_one]


# -- forms of lists and arrays


FORMS: dict[str, Callable[[list[Array]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": iter,
    "mapping's values": lambda arrays: dict(enumerate(arrays)).values(),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_lists(form: str) -> None:
    for salt in range(2):
        arrays = filled(COUNTS, salt)
        communicator("shared").Allreduce_many(FORMS[form](arrays))
        check(arrays, salt)


def test_rows_of_a_matrix() -> None:
    matrix = np.array(filled((30, 30, 30)))
    communicator("shared").Allreduce_many(matrix)  # type: ignore[arg-type]
    check(matrix)  # type: ignore[arg-type]


def test_forms_of_arrays() -> None:
    """Several axes, in either order, none, part of another array, in shared memory, and a subclass."""
    comm = communicator("shared")
    arrays = [
        np.zeros((4, 5), np.int64),
        np.zeros((4, 5), np.int64, "F"),
        np.zeros((), np.int64),
        np.zeros(30, np.int64)[7:9],
        comm.alloc(33, np.int64),
        np.zeros(6, np.int64).view(np.recarray),
        np.zeros((9, 1), np.int64)[::3, :].T[:, :1],
    ]
    for salt in range(2):
        for i, array in enumerate(arrays):
            array[...] = data(RANK, array.size, salt + i).reshape(array.shape)
        comm.Allreduce_many(arrays)
        check(arrays, salt)


def test_pytorch_tensors() -> None:
    torch = pytest.importorskip("torch")
    tensors = [torch.zeros(count, dtype=torch.int64) for count in COUNTS]
    for salt in range(2):
        for tensor, values in zip(tensors, filled(COUNTS, salt), strict=True):
            tensor.copy_(torch.from_numpy(values))
        communicator("shared").Allreduce_many(tensors)
        check([tensor.numpy() for tensor in tensors], salt)
    halves = [torch.full((5,), float(RANK + 1), dtype=torch.bfloat16, requires_grad=True), torch.ones(700)]
    communicator("shared").Allreduce_many(halves)
    assert halves[0].tolist() == [SIZE * (SIZE + 1) / 2] * 5
    assert halves[1].tolist() == [SIZE] * 700


# -- lists again and again


def test_new_arrays_in_each_call() -> None:
    """Memory that one list has left is that of another one soon, with other sizes and dtypes."""
    common = random.Random(0)
    for salt in range(100):
        counts = [common.choice((0, 1, 5, 64, 700)) for _ in range(common.randrange(1, 6))]
        dtype = common.choice([np.int64, np.int32, np.float64])
        arrays = [array.astype(dtype) for array in filled(counts, salt)]
        communicator("shared").Allreduce_many(arrays)
        check(arrays, salt)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_more_lists_than_are_remembered(transport: str) -> None:
    """Ranks may forget at different times: what they remember is theirs."""
    comm = communicator(transport)
    lists = [filled((3, 5 + i)) for i in range(MAX_LISTS + 3)]
    for turn in range(3):
        for i in random.Random(turn).choices(range(len(lists)), k=2 * len(lists)):
            salt = turn + i
            if random.Random(f"{RANK} {turn} {i}").random() < 0.3:
                lists[i] = filled((3, 5 + i))
            for array, values in zip(lists[i], filled((3, 5 + i), salt), strict=True):
                array[:] = values
            comm.Allreduce_many(lists[i])
            check(lists[i], salt)


def test_what_was_prepared_does_not_keep_arrays() -> None:
    arrays = filled(COUNTS)
    references = [weakref.ref(array) for array in arrays]
    communicator("shared").Allreduce_many(arrays)
    del arrays
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_the_list_is_read_anew() -> None:
    """The same list object with other arrays, an array replaced, and one appended."""
    comm, arrays = communicator("shared"), filled((3, 4))
    comm.Allreduce_many(arrays)
    arrays[1] = data(RANK, 9, 1)
    arrays.append(data(RANK, 5, 2))
    arrays[0][:] = data(RANK, 3)
    comm.Allreduce_many(arrays)
    check(arrays)


@pytest.mark.algorithms
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_in_quick_succession_with_other_calls(transport: str) -> None:
    comm, own = communicator(transport), random.Random(RANK)
    lists = [filled(COUNTS), filled((5, 6)), filled((20_001,))]
    sums = np.zeros(700, np.int64)
    for salt in range(60 if transport == "shared" else 15):
        arrays = lists[salt % 3]
        for array, values in zip(arrays, filled([array.size for array in arrays], salt), strict=True):
            array[:] = values
        if own.random() < 0.1:
            time.sleep(0.001)
        comm.Allreduce_many(arrays)
        comm.Allreduce(data(RANK, 700, salt), sums)
        check(arrays, salt)
        np.testing.assert_array_equal(sums, total(SIZE, 700, salt))


def test_communicators_made_from_others() -> None:
    comm = communicator("shared")
    with comm.Dup() as duplicate, comm.Split(RANK % 2) as part:
        sum_once(duplicate, COUNTS)
        members = range(RANK % 2, SIZE, 2)
        arrays = filled((3, 5))
        part.Allreduce_many(arrays)
        for i, array in enumerate(arrays):
            np.testing.assert_array_equal(array, np.sum([data(rank, array.size, i) for rank in members], 0))
    with mpicoll.Communicator(MPI.COMM_SELF) as alone:
        arrays = filled(COUNTS)
        alone.Allreduce_many(arrays)
        for array, own in zip(arrays, filled(COUNTS), strict=True):
            np.testing.assert_array_equal(array, own)


# -- what a program may do wrong


def read_only() -> Array:
    array = np.zeros(3)
    array.flags.writeable = False
    return array


WHOLE = np.zeros(20)
GOOD = np.zeros(4)
Bad = tuple[Callable[[], Any], type[Exception], str]
BAD: dict[str, Bad] = {
    "read-only": (
        lambda: [GOOD, read_only()],
        ValueError,
        r"arrays\[1\]: expected memory that may be written",
    ),
    "bytes": (lambda: [b"12345678"], ValueError, r"arrays\[0\]: expected memory that may be written"),
    "strided": (lambda: [GOOD, WHOLE[::2]], ValueError, r"arrays\[1\]: expected contiguous memory"),
    "no array": (lambda: [GOOD, "text"], TypeError, r"arrays\[1\]: expected an array"),
    "nothing": (lambda: [GOOD, None], TypeError, r"arrays\[1\]: expected an array"),
    "in place": (lambda: [MPI.IN_PLACE, GOOD], ValueError, r"arrays\[0\]: expected data, got IN_PLACE"),
    "objects": (lambda: [np.array([None])], TypeError, r"arrays\[0\]: expected numbers"),
    "dates": (lambda: [GOOD, np.zeros(3, "M8[s]")], TypeError, r"arrays\[1\]"),
    "twice the same": (lambda: [GOOD, WHOLE, GOOD], ValueError, r"arrays\[2\]: .* some of arrays\[0\]"),
    "overlapping": (lambda: [WHOLE[:5], WHOLE[4:]], ValueError, r"arrays\[1\]: .* some of arrays\[0\]"),
    "inside another": (lambda: [WHOLE[3:4], GOOD, WHOLE], ValueError, r"arrays\[2\]: .* some of arrays\[0\]"),
    "far inside another": (
        lambda: [WHOLE, WHOLE[1:2], WHOLE[9:10]],
        ValueError,
        r"arrays\[1\]: .* some of arrays\[0\]",
    ),
    "overlapping as other dtypes": (
        lambda: [WHOLE[:5], WHOLE[4:5].view(np.int32)],
        ValueError,
        r"arrays\[1\]: expected memory of its own",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arrays(what: str) -> None:
    make, kind, text = BAD[what]
    comm = communicator("shared")
    for _ in range(2):
        with pytest.raises(kind, match=text):
            comm.Allreduce_many(make())
    sum_once(comm, COUNTS)


@pytest.mark.parametrize(
    ("op", "algorithm", "kind", "text"),
    [
        (mpicoll.AVG, None, TypeError, "AVG is defined for floating and complex dtypes, got int64"),
        (MPI.BAND, None, TypeError, "BAND is not defined for float64"),
        ("SUM", None, TypeError, "op: expected an MPI operation"),
        (MPI.SUM, "rings", ValueError, "algorithm: expected auto or one of .* got 'rings'"),
    ],
    ids=["average of integers", "bits of floats", "a name", "unknown algorithm"],
)
def test_bad_operations(op: Any, algorithm: str | None, kind: type[Exception], text: str) -> None:
    comm = communicator("shared")
    for _ in range(2):
        with pytest.raises(kind, match=text):
            comm.Allreduce_many([np.zeros(3), np.zeros(3, np.int64)], op, algorithm=algorithm)
    sum_once(comm, COUNTS)


def test_arrays_that_touch_do_not_overlap() -> None:
    whole = np.zeros(20, np.int64)
    arrays = [whole[5:9], whole[:5], whole[9:9], whole[9:]]
    for i, array in enumerate(arrays):
        array[:] = data(RANK, array.size, i)
    communicator("shared").Allreduce_many(arrays)
    check(arrays)


def differing(odd: Sequence[Array], common: Sequence[Array]) -> Sequence[Array]:
    """What the last rank has, and what the others have."""
    return odd if RANK == LAST else common


def zeros(*counts: int, dtype: Any = np.int64) -> list[Array]:
    return [np.zeros(count, dtype) for count in counts]


DIFFERENT: dict[str, Callable[[], Sequence[Array]]] = {
    "sizes": lambda: differing(zeros(3, 4), zeros(3, 8)),
    "sizes in another order": lambda: differing(zeros(4, 8), zeros(8, 4)),
    "number": lambda: differing(zeros(3), zeros(3, 4)),
    "dtypes": lambda: differing(zeros(3, 4, dtype=np.float64), zeros(3, 4)),
    "large sizes": lambda: differing(zeros(20_000, 3), zeros(20_001, 3)),
    "large and small": lambda: differing(zeros(20_000), zeros(3)),
}


@several_ranks
@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_whose_lists_differ_are_told(what: str) -> None:
    comm = communicator("shared").Dup()
    comm.Barrier()
    start = time.monotonic()
    with pytest.raises((MismatchError, RankFailedError)) as caught:
        call_and_meet(comm, DIFFERENT[what]())
    assert time.monotonic() - start < 5
    assert MismatchError in WORLD.allgather(caught.type)
    with pytest.raises((MismatchError, RankFailedError, RuntimeError)):
        comm.Allreduce_many(zeros(5))
    comm.Free()
    sum_once(communicator("shared"), COUNTS)


def call_and_meet(comm: mpicoll.Communicator, arrays: Sequence[Array]) -> None:
    comm.Allreduce_many(arrays)
    comm.Barrier()  # a rank that has all it needs may have left the other call before


@several_ranks
def test_other_operations_are_told() -> None:
    for odd, common in itertools.permutations((MPI.SUM, MPI.MAX), 2):
        comm = communicator("shared").Dup()
        with pytest.raises((MismatchError, RankFailedError)) as caught:
            comm.Allreduce_many(zeros(3, 4), odd if RANK == LAST else common)
        assert MismatchError in WORLD.allgather(caught.type)
        comm.Free()
