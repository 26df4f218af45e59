"""Rings along the rows and columns of a grid of ranks: torus and two-level allreduce.

Vocabulary: the ranks form a grid of ``rows`` x ``columns``, rank = row * columns + column, as square as the
number's factors allow (at most as many rows as columns). A ``line`` is one dimension of it: the rings along
all rows, or along all columns. The ``place`` of a rank in a line is its number in its ring.

The idea: a ring takes p - 1 rounds. Split into two dimensions it takes few: reduce-scatter along the rows
leaves every rank with the sum of its row for one part of the data, reduce-scatter along the columns completes
that part, and both allgathers bring it back the same way, (rows - 1) + (columns - 1) rounds there and as many
back. As much data as in the ring, and all of it goes to neighbours of the grid.

two_level   starts along the rows, which are groups of consecutive ranks (of a node, a rack): nearly all data
            stays in the group, and 1 / columns of it goes across.
torus       does that with half of the data, and with the other half begins along the columns: so both
            dimensions' links are busy at once. There are two chunks for each rank.

Torus reduce-scatter and allgather have one chunk for each rank, which cannot be halved: they take the columns
first, where the chunks that travel together, those of a row, are neighbours in memory too.

A prime number has no factors: one row, and each of these is the ring (torus allreduce: two of them, each with
half of the data).

Worked example, two_level on 4 ranks, groups 0, 1 and 2, 3, with the parts a, b, c, d. Chunks 0 and 1 are
summed in place 0 of a group, chunks 2 and 3 in place 1; ``*`` marks a complete sum, ``->`` to whom it is
sent:

                            rank 0             rank 1             rank 2             rank 3
    round 0  sends          a2 a3 -> 1         b0 b1 -> 0         c2 c3 -> 3         d0 d1 -> 2
             then holds     a+b of 0, 1        a+b of 2, 3        c+d of 0, 1        c+d of 2, 3
    round 1  sends          1 -> 2             3 -> 3             0 -> 0             2 -> 1
             then holds     0*                 2*                 1*                 3*
    round 2  sends          0* -> 2            2* -> 3            1* -> 0            3* -> 1
             then holds     0* 1*              2* 3*              0* 1*              2* 3*
    round 3  sends          0* 1* -> 1         2* 3* -> 0         0* 1* -> 3         2* 3* -> 2
             then holds     0* 1* 2* 3*        0* 1* 2* 3*        0* 1* 2* 3*        0* 1* 2* 3*

Cost for n bytes, a rows, b columns, p = ab, in latency α, time per byte β and per byte reduced γ: two_level
2(a+b-2)α + 2n(p-1)/p β + n(p-1)/p γ, of which 2n(b-1)/b β within the groups and 2n(a-1)/p β across; torus
the same, with half of the β term where a = b and both dimensions work at once; reduce-scatter and allgather
(a+b-2)α + n(p-1)/p β.

Source: P. Sack, W. Gropp, "Collective algorithms for multiported torus networks", ACM Trans. Parallel
Comput. 1 (2015); H. Mikami et al., "Massively distributed SGD: ImageNet/ResNet-50 training in a flash",
arXiv:1811.05233 (2018), for two dimensions.
"""

from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

import numpy as np

from mpicoll.schedule import REDUCE, IntArray, Round, Schedule, check_shape, in_sequence, mirrored


class Line(NamedTuple):
    """The rings along one dimension: their ``size``, and each rank's ``place`` and next rank in its own."""

    size: int
    place: IntArray
    send_to: IntArray


def torus_allreduce(nranks: int) -> Schedule:
    """Every rank ends with the sum of all ranks' data, in 2 (rows + columns - 2) rounds; 2 p chunks."""
    along_rows, along_columns = _lines(nranks)
    return _allreduce("torus", [(along_rows, along_columns), (along_columns, along_rows)])


def two_level_allreduce(nranks: int) -> Schedule:
    """Every rank ends with the sum of all ranks' data, in 2 (rows + columns - 2) rounds; p chunks."""
    return _allreduce("two_level", [_lines(nranks)])


def torus_reduce_scatter(nranks: int) -> Schedule:
    """Rank r ends with the sum of every rank's chunk r, in rows + columns - 2 rounds."""
    along_rows, along_columns = _lines(nranks)
    return _reduce_scatter("torus", [(along_columns, along_rows)])


def torus_allgather(nranks: int) -> Schedule:
    """Rank r starts with chunk r; every rank ends with all of them, in rows + columns - 2 rounds."""
    return mirrored(torus_reduce_scatter(nranks), "allgather")


def grid_shape(nranks: int) -> tuple[int, int]:
    """(rows, columns): their product is ``nranks``, rows <= columns, and they are as near as they can be."""
    rows = max(d for d in range(1, isqrt(nranks) + 1) if nranks % d == 0)
    return rows, nranks // rows


def _lines(nranks: int) -> tuple[Line, Line]:
    """Along the rows, whose ranks are consecutive, and along the columns."""
    check_shape(nranks)
    rows, columns = grid_shape(nranks)
    return _line(nranks, columns, 1), _line(nranks, rows, columns)


def _line(nranks: int, size: int, stride: int) -> Line:
    rank = np.arange(nranks)
    place = rank // stride % size
    return Line(size, place, rank + ((place + 1) % size - place) * stride)


def _allreduce(name: str, orders: Sequence[tuple[Line, Line]]) -> Schedule:
    reduce = _reduce_scatter(name, orders)
    return in_sequence(name, "allreduce", [reduce, mirrored(reduce, "allgather")])


def _reduce_scatter(name: str, orders: Sequence[tuple[Line, Line]]) -> Schedule:
    """An equal part of the data takes each of ``orders``: its first line, then its second, all at once.

    A part has one chunk for each rank; the rank in place i of the first line and j of the second ends with
    the sum of chunk i * (size of the second) + j.
    """
    first, second = orders[0]
    nranks = first.size * second.size

    def make_round(k: int) -> Round:
        parts = [_sent(one, other, k) for one, other in orders]
        return Round.of_ranges(
            src=np.tile(np.arange(nranks), len(parts)),
            dst=np.concatenate([send_to for send_to, _, _ in parts]),
            first=np.concatenate([chunk + i * nranks for i, (_, chunk, _) in enumerate(parts)]),
            count=np.repeat([count for _, _, count in parts], nranks),
            nchunks=nranks * len(parts),
            op=REDUCE,
        )

    nrounds = first.size + second.size - 2
    turns = sorted({0, *(one.size - 1 for one, _ in orders), nrounds})
    runs = tuple(np.diff(turns).tolist())
    return Schedule(name, "reduce_scatter", nranks, nranks * len(orders), nrounds, make_round, runs=runs)


def _sent(one: Line, other: Line, k: int) -> tuple[IntArray, IntArray, int]:
    """To whom each rank sends in round ``k``, from which chunk of the part on, and how many."""
    rounds_of_one = one.size - 1
    if k < rounds_of_one:
        block = (one.place - 1 - k) % one.size
        return one.send_to, block * other.size, other.size
    block = (other.place - 1 - (k - rounds_of_one)) % other.size
    return other.send_to, one.place * other.size + block, 1
