"""Buckets of gradients, what gradients are given as, and where they lie: all that needs no other rank."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from mpicoll.compression import Compression, Int8, RandomK
from mpicoll.fusion import Bucket, assign
from mpicoll.gradients import Gradient, Settings, check, check_agreement, on_all_ranks, parse
from mpicoll.grouped import Piece, check_apart, follows, memory, pieces

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
DTYPES = [FLOAT32, FLOAT64, np.dtype(ml_dtypes.bfloat16)]

# -- buckets


@st.composite
def models(draw: st.DrawFn) -> tuple[list[int], list[np.dtype[Any]], list[int], tuple[int, int]]:
    """Sizes in bytes, dtypes, an order, and limits."""
    nbytes = draw(st.lists(st.integers(0, 100), max_size=30))
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=len(nbytes), max_size=len(nbytes)))
    order = draw(st.permutations(range(len(nbytes))))
    limit = draw(st.integers(1, 300))
    return nbytes, dtypes, list(order), (draw(st.integers(1, limit)), limit)


@given(models())
def test_every_gradient_is_in_one_bucket_of_its_dtype(
    model: tuple[list[int], list[np.dtype[Any]], list[int], tuple[int, int]],
) -> None:
    nbytes, dtypes, order, limits = model
    buckets = assign(nbytes, dtypes, order, limits)
    assert sorted(i for bucket in buckets for i in bucket.members) == sorted(order)
    for bucket in buckets:
        assert bucket.members
        assert list(bucket.members) == sorted(bucket.members)
        assert {dtypes[i] for i in bucket.members} == {bucket.dtype}


@given(models())
def test_buckets_are_closed_at_the_limit(
    model: tuple[list[int], list[np.dtype[Any]], list[int], tuple[int, int]],
) -> None:
    """None could do without its last gradient, and only the last of each dtype may be smaller."""
    nbytes, dtypes, order, limits = model
    place = {i: position for position, i in enumerate(order)}
    open_ones = []
    for bucket in assign(nbytes, dtypes, order, limits):
        in_time = sorted(bucket.members, key=lambda i: place[i])
        assert sum(nbytes[i] for i in in_time[:-1]) < limits[1]
        if sum(nbytes[i] for i in in_time) < limits[0]:
            open_ones.append(bucket.dtype)
    assert len(open_ones) == len(set(open_ones))


@given(models())
def test_buckets_come_in_the_order_of_completion(
    model: tuple[list[int], list[np.dtype[Any]], list[int], tuple[int, int]],
) -> None:
    nbytes, dtypes, order, limits = model
    place = {i: position for position, i in enumerate(order)}
    complete = [max(place[i] for i in bucket.members) for bucket in assign(nbytes, dtypes, order, limits)]
    assert complete == sorted(complete)


@given(models())
def test_gradients_of_a_dtype_follow_each_other(
    model: tuple[list[int], list[np.dtype[Any]], list[int], tuple[int, int]],
) -> None:
    nbytes, dtypes, order, limits = model
    buckets = assign(nbytes, dtypes, order, limits)
    for dtype in DTYPES:
        of_dtype = [i for i in order if dtypes[i] == dtype]
        found = [bucket.members for bucket in buckets if bucket.dtype == dtype]
        ends = np.cumsum([0, *map(len, found)])
        expected = [tuple(sorted(of_dtype[a:b])) for a, b in pairwise(ends)]
        assert found == expected


def test_the_first_bucket_has_a_limit_of_its_own() -> None:
    found = assign([10] * 7, [FLOAT32] * 7, range(6, -1, -1), (10, 20))
    assert found == [Bucket(members, FLOAT32) for members in ((6,), (4, 5), (2, 3), (0, 1))]


def test_a_limit_is_reached_or_not() -> None:
    for limit, expected in ((20, [(0, 1), (2,)]), (21, [(0, 1, 2)]), (1, [(0,), (1,), (2,)])):
        found = assign([10] * 3, [FLOAT32] * 3, range(3), (limit, limit))
        assert [bucket.members for bucket in found] == expected


def test_dtypes_are_kept_apart() -> None:
    found = assign([10] * 4, [FLOAT32, FLOAT64, FLOAT32, FLOAT64], range(4), (20, 20))
    assert found == [Bucket((0, 2), FLOAT32), Bucket((1, 3), FLOAT64)]


def test_no_gradients_no_buckets() -> None:
    assert assign([], [], [], (1, 1)) == []


def test_many_gradients_are_assigned_quickly() -> None:
    """In a second, not in a minute: what is done for each must not look at all others."""
    n = 200_000
    assert len(assign([1] * n, [FLOAT32] * n, range(n), (n, n))) == 1


# -- what gradients are given as


def test_arrays_and_shapes() -> None:
    array = np.zeros((2, 3), np.float64)
    assert parse([array], None, FLOAT32) == [Gradient("0", (2, 3), FLOAT64, array)]
    expected = [Gradient(str(i), shape, FLOAT32, None) for i, shape in enumerate([(), (3,), (0, 2), (4,)])]
    assert parse([(), 3, [0, 2], np.int64(4)], None, FLOAT32) == expected


def test_names() -> None:
    assert [g.name for g in parse({"a": 3, "b": 4}, None, FLOAT32)] == ["a", "b"]
    assert [g.name for g in parse([3, 4], ["a", "b"], FLOAT32)] == ["a", "b"]
    assert [g.name for g in parse([3, 4], None, FLOAT32)] == ["0", "1"]
    assert parse([], None, FLOAT32) == []


def read_only() -> np.ndarray[Any, Any]:
    array = np.zeros(3)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("gradients", "names", "kind", "text"),
    [
        ({"a": 3}, ["a"], ValueError, "names: expected none beside a mapping"),
        ([3], ["a", "b"], ValueError, "names: expected 1 different names, got ['a', 'b']"),
        ([3, 4], ["a", "a"], ValueError, "names: expected 2 different names, got ['a', 'a']"),
        ({1: 3}, None, TypeError, "names: expected strings, got [1]"),
        ({"w": (2, -1)}, None, ValueError, "gradient 'w': expected dimensions of 0 or more, got (2, -1)"),
        ({"w": [1.5]}, None, TypeError, "gradient 'w': got [1.5]"),
        ({"w": 1.5}, None, TypeError, "gradient 'w': expected an array"),
        ({"w": None}, None, TypeError, "gradient 'w': expected an array"),
        ({"w": np.zeros(6)[::2]}, None, ValueError, "gradient 'w': expected contiguous memory"),
        ({"w": read_only()}, None, ValueError, "gradient 'w': expected memory that may be written"),
        ({"w": np.array([None])}, None, TypeError, "gradient 'w': expected numbers"),
        ([3, np.zeros(3)], None, TypeError, "gradients: expected either arrays or shapes, got both"),
    ],
)
def test_what_is_refused(gradients: Any, names: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        parse(gradients, names, FLOAT32)


def settings(**given: Any) -> Settings:
    default = {
        "average": True,
        "scale": 1.0,
        "wire_dtype": None,
        "compression": None,
        "bucket_bytes": None,
        "order": None,
        "nonfinite": "pass",
        "unused": "raise",
        "algorithm": None,
        "tune": False,
    }
    return Settings.of(**{**default, **given})


def test_settings_are_put_into_one_form() -> None:
    found = settings(scale=2, wire_dtype="bfloat16", bucket_bytes=np.int64(5), order=range(3))
    assert found == settings(scale=2.0, wire_dtype=ml_dtypes.bfloat16, bucket_bytes=5, order=np.arange(3))
    assert repr(found) == repr(settings(scale=2.0, wire_dtype="bfloat16", bucket_bytes=5, order=(0, 1, 2)))


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"scale": "twice"}, TypeError, "scale: got 'twice'"),
        ({"wire_dtype": "nonsense"}, TypeError, "wire_dtype: got 'nonsense'"),
        ({"wire_dtype": np.int32}, TypeError, "wire_dtype: expected 'float16' or"),
        ({"wire_dtype": "float16", "compression": Int8()}, ValueError, "wire_dtype: expected none beside"),
        ({"compression": "int8"}, TypeError, "compression: expected one of mpicoll.compression, got 'int8'"),
        ({"compression": Int8()}, TypeError, "gradient 'b': compression is for float32, got float64"),
        ({"bucket_bytes": 0}, ValueError, "bucket_bytes: expected a positive number, got 0"),
        ({"bucket_bytes": 1.5}, TypeError, "bucket_bytes: got 1.5"),
        ({"order": 3}, TypeError, "order: got 3"),
        ({"order": [0]}, ValueError, "order: expected the numbers from 0 to 2, each once"),
        ({"order": [0, 1, 1]}, ValueError, "order: expected the numbers from 0 to 2, each once"),
        ({"nonfinite": "stop"}, ValueError, "nonfinite: expected 'pass' or 'raise' or 'skip', got 'stop'"),
        ({"unused": "skip"}, ValueError, "unused: expected 'raise' or 'zero', got 'skip'"),
        ({}, TypeError, "gradient 'c': expected 'float16' or"),
        ({"average": False, "scale": 2}, TypeError, "only average=False without scale and wire_dtype"),
    ],
)
def test_settings_that_are_refused(given: dict[str, Any], kind: type[Exception], text: str) -> None:
    whole = {"a": np.zeros(3, FLOAT32), "b": np.zeros(3), "c": np.zeros(3, np.int32)}
    with pytest.raises(kind, match=re.escape(text)):
        check(parse(whole, None, FLOAT32), settings(**given))


def test_integers_are_summed_only() -> None:
    gradients = parse([3], None, np.dtype(np.int32))
    check(gradients, settings(average=False))
    for computing in ({}, {"average": False, "scale": 2}, {"average": False, "wire_dtype": "float32"}):
        with pytest.raises(TypeError, match="gradient '0'"):
            check(gradients, settings(**computing))


@pytest.mark.parametrize("dtype", ["M8[s]", "S3", ">f4", [("a", "f4")]], ids=str)
def test_no_numbers(dtype: Any) -> None:
    with pytest.raises(TypeError, match="gradient '0': expected numbers, got"):
        check(parse([3], None, np.dtype(dtype)), settings(average=False))


def test_overlapping_gradients_are_named() -> None:
    whole = np.zeros(10, FLOAT32)
    parsed = parse({"a": whole[:3], "b": whole[5:], "c": whole[2:5]}, None, FLOAT32)
    with pytest.raises(
        ValueError, match="gradient 'c': expected memory of its own, got some of gradient 'a'"
    ):
        check(parsed, settings())
    check(
        parse({"a": whole[:3], "b": whole[5:], "c": whole[3:5], "d": whole[4:4]}, None, FLOAT32), settings()
    )


class Ranks:
    """A communicator of two ranks of which this is the first, as far as gathering goes."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def allgather(self, own: Any) -> list[Any]:
        return [own, self.other]


def agreement(gradients: Any, given: Settings) -> Any:
    """What a rank tells the others."""

    class Listener(Ranks):
        def allgather(self, own: Any) -> list[Any]:
            self.other = own
            return [own, own]

    listener = Listener(None)
    check_agreement(listener, gradients, given)  # type: ignore[arg-type]
    return listener.other


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"a": 3, "b": (4, 2)}, "gradient 'b': expected float32[4] as on rank 0; rank 1 has float32[4, 2]"),
        ({"a": 3, "c": 4}, "gradients: expected 'b' as on rank 0; rank 1 has 'c' in its place"),
        ({"b": 4, "a": 3}, "gradients: expected 'a' as on rank 0; rank 1 has 'b' in its place"),
        ({"a": 3}, "gradients: expected 2 as on rank 0; rank 1 has 1"),
        ({"a": np.zeros(3, FLOAT32), "b": np.zeros(4, FLOAT32)}, "gradients: expected shapes as on rank 0"),
    ],
)
def test_gradients_that_differ(other: Any, text: str) -> None:
    theirs = agreement(parse(other, None, FLOAT32), settings())
    with pytest.raises(ValueError, match=re.escape(text)):
        check_agreement(Ranks(theirs), parse({"a": 3, "b": 4}, None, FLOAT32), settings())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given",
    [
        {"average": False},
        {"scale": 2},
        {"wire_dtype": "float16"},
        {"compression": RandomK(0.5, seed=1)},
        {"bucket_bytes": 4},
        {"order": [0]},
        {"nonfinite": "skip"},
        {"unused": "zero"},
        {"algorithm": "ring"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_settings_that_differ(given: dict[str, Any]) -> None:
    parsed = parse([3], None, FLOAT32)
    (name,) = given
    compression: Compression | None = RandomK(0.5, seed=0) if name == "compression" else None
    theirs = agreement(parsed, settings(**given))
    with pytest.raises(ValueError, match=f"{name}: expected .* as on rank 0; rank 1 has "):
        check_agreement(Ranks(theirs), parsed, settings(compression=compression))  # type: ignore[arg-type]


def test_memory_order_counts() -> None:
    """What is added up is memory; where axes are short it lies the same in both orders."""
    theirs = agreement(parse({"w": np.zeros((2, 3), FLOAT32, "F")}, None, FLOAT32), settings())
    with pytest.raises(ValueError, match="gradient 'w': "):
        check_agreement(
            Ranks(theirs),  # type: ignore[arg-type]
            parse({"w": np.zeros((2, 3), FLOAT32)}, None, FLOAT32),
            settings(),
        )


@pytest.mark.parametrize("other", [None, "ValueError: theirs"])
def test_an_exception_on_one_rank_is_one_on_all(other: str | None) -> None:
    comm: Any = Ranks(other)
    with pytest.raises(ZeroDivisionError), on_all_ranks(comm):
        raise ZeroDivisionError
    if other is None:
        with on_all_ranks(comm):
            pass
    else:
        with (
            pytest.raises(RuntimeError, match="rank 1 could not take part: ValueError: theirs"),
            on_all_ranks(comm),
        ):
            pass


# -- where they lie


def split(*counts: int) -> list[np.ndarray[Any, Any]]:
    whole = np.arange(sum(counts), dtype=FLOAT32)
    return np.split(whole, np.cumsum(counts)[:-1])


def test_follows() -> None:
    a, b = split(3, 4)
    assert follows(b, a)
    assert not follows(a, b)
    assert not follows(b[1:], a)
    assert not follows(b.view(np.int32), a)
    assert follows(b.reshape(2, 2), a.reshape(3, 1))
    assert not follows(b.copy(), a)


def found(*given: Any) -> list[tuple[tuple[int, ...], list[float]]]:
    return [(piece.members, piece.data.tolist()) for piece in pieces(*given)]


def test_arrays_that_are_joined_are_one_piece() -> None:
    arrays = split(2, 1, 3)
    assert found(arrays, (0, 1, 2), [False, True, True]) == [((0, 1, 2), [0, 1, 2, 3, 4, 5])]
    assert found(arrays, (0, 1, 2), [False, True, False]) == [((0, 1), [0, 1, 2]), ((2,), [3, 4, 5])]
    assert found(arrays, (0, 2), [False, True, True]) == [((0,), [0, 1]), ((2,), [3, 4, 5])]
    assert found(arrays, (1, 2), [False, True, True]) == [((1, 2), [2, 3, 4, 5])]
    assert found(arrays, (), [False, True, True]) == []


def test_pieces_are_the_arrays_memory() -> None:
    arrays = [np.zeros((2, 2), FLOAT32), np.zeros((2, 3), FLOAT32, "F"), np.zeros((), FLOAT32)]
    for piece, array in zip(pieces(arrays, (0, 1, 2), [False] * 3), arrays, strict=True):
        assert isinstance(piece, Piece)
        piece.data[-1] = 7
        assert array.flat[-1] == 7
        assert piece.data.shape == (array.size,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_at_an_address(dtype: np.dtype[Any]) -> None:
    array = np.arange(6).astype(dtype)
    seen = memory(array.ctypes.data, array.nbytes, dtype, array)
    seen[2] = 9
    assert array.tolist() == [0, 1, 9, 3, 4, 5]
    assert memory(array.ctypes.data, 0, dtype).size == 0


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=8))
def test_apart_is_as_pairs_say(spans: list[tuple[int, int]]) -> None:
    whole = np.zeros(50, np.uint8)
    arrays = [whole[begin : begin + count] for begin, count in spans]
    taken = [set(range(begin, begin + count)) for begin, count in spans]
    overlap = any(a & b for i, a in enumerate(taken) for b in taken[:i])
    names = [str(i) for i in range(len(arrays))]
    if overlap:
        with pytest.raises(ValueError, match="expected memory of its own"):
            check_apart(arrays, names)
    else:
        check_apart(arrays, names)


def test_no_gradients_on_one_rank() -> None:
    check_agreement(MPI.COMM_SELF, [], settings())
