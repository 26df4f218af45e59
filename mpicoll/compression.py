"""Gradients in fewer bytes: 16-bit and 8-bit numbers, the largest or random ones, low rank.

A compression is bound to a **bucket**, a flat float32 array that holds this rank's gradients, and gives a
`Codec`: a list of stages, to be run in order, the same on every rank. A stage is a function without
arguments or an `Exchange`, a collective that the caller makes. When all have run, the bucket holds, with the
same bits on every rank, about

    sum over ranks of (factor * gradient + residual)

and the residual what is missing there: **error feedback** (Seide et al. 2014, Interspeech; Karimireddy et al.
2019, arXiv 1901.09847). It is added in the next step, so the sum of all steps' results stays as near to the
truth as one step's is, however rough the compression. The exception is said where it applies: 16-bit sums.

    codec = TopK(0.01).bind(Bundle(bucket, shapes, offsets, rank, nranks, 1 / nranks, numpy.zeros))
    for stage in codec.stages:
        if isinstance(stage, Exchange): communicate(stage)
        else: stage()

| name | what is sent | bytes that a rank sends for n numbers, p ranks |
|---|---|---|
| fp16, bf16 | 16-bit floats | 4 n (p-1)/p; float32 would be 8 n (p-1)/p |
| int8 | 8-bit integers, a scale for each 256 of them | 2.03 n (p-1)/p |
| topk:f | the fraction f that is largest, with indices | 8 f n (p-1) |
| randomk:f | the random fraction f, the same on all ranks | 8 f n (p-1)/p |
| powersgd:r | two factors of rank r for each matrix [a, b] | 8 r (a + b) (p-1)/p |

**NaN and infinity** in any rank's gradients show in the result of the same step, as NaN or infinity on every
rank; each class says where. They do not stay in residuals: what a spoilt step took with it is lost, and the
next step starts afresh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mpicoll.kernels import lowrank, quantise, sparse

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Allocate = Callable[[int, npt.DTypeLike], Array]


class Bundle(NamedTuple):
    """One rank's gradients in a bucket, and what a codec has to know of them.

    ``bucket`` is flat float32. ``shapes`` are those of the tensors in it and ``offsets`` where each begins,
    in elements; between them it holds zeros. Gradients are scaled by ``factor``, 1 / ``nranks`` for their
    mean. ``allocate(count, dtype)`` gives flat zeros that the collectives can send.
    """

    bucket: Array
    shapes: Sequence[Shape]
    offsets: Sequence[int]
    rank: int
    nranks: int
    factor: float
    allocate: Allocate


class Exchange(NamedTuple):
    """A collective between two stages, with the same sizes on all ranks.

    ``collective`` is "Allreduce" (a sum in place: ``send`` is ``recv``), "Allgather" (``recv`` has a part of
    ``send``'s size for each rank) or "Alltoall" (both have a part for each rank). Arrays are flat.
    """

    collective: str
    send: Array
    recv: Array


Stage = Callable[[], None] | Exchange


class Codec(Protocol):
    """A compression that is bound to one rank's bucket.

    ``stages`` are run once a step. ``arrays`` is what must be kept from one step to the next, and so what a
    checkpoint saves and writes back in place.
    """

    @property
    def stages(self) -> list[Stage]: ...

    @property
    def arrays(self) -> dict[str, Array]: ...

    @property
    def residual(self) -> Array:
        """Float32, as long as the bucket: what this rank has not yet got across."""
        ...


class Compression(Protocol):
    """The settings of a compression."""

    @property
    def name(self) -> str:
        """As `parse` takes it."""
        ...

    def bind(self, bundle: Bundle) -> Codec:
        """Make the stages for a bucket."""
        ...

    def volume(self, count: int, shapes: Sequence[Shape], nranks: int) -> float:
        """Bytes that one rank sends in a step for a bucket of ``count`` elements.

        For a message of b bytes, an Allreduce sends 2 b (p-1)/p as a ring does, an Allgather b (p-1), an
        Alltoall of b bytes in all b (p-1)/p.
        """
        ...


# -- 16-bit floats ---------------------------------------------------------------------------------------


class HalfCodec:
    """x = factor * gradient + residual; half = x in 16 bits; residual = x - half; result = sum of half.

    The sum is made in float32 and rounded to 16 bits, which no residual can make up for: of every step's
    result that is a part of up to 2**-11 (float16) or 2**-8 (bfloat16).

    Where x is NaN, infinite or too large for the 16 bits, the result is NaN or infinite, there only.
    """

    def __init__(self, bundle: Bundle, dtype: npt.DTypeLike) -> None:
        self.bucket = bucket = bundle.bucket
        self.factor = bundle.factor
        self.residual = np.zeros(len(bucket), np.float32)
        self.arrays = {"residual": self.residual}
        self.halves = bundle.allocate(len(bucket), dtype)
        self.stages: list[Stage] = [
            self.compress,
            Exchange("Allreduce", self.halves, self.halves),
            self.decompress,
        ]

    def compress(self) -> None:
        """half = x in 16 bits; residual = x - half."""
        quantise.narrow_feedback(self.bucket, self.factor, self.residual, self.halves)

    def decompress(self) -> None:
        """Result = sum of half."""
        quantise.widen(self.halves, self.bucket)


class _SixteenBits:
    dtype: ClassVar[npt.DTypeLike]

    def bind(self, bundle: Bundle) -> Codec:
        """See `Compression.bind`."""
        return HalfCodec(bundle, self.dtype)

    def volume(self, count: int, shapes: Sequence[Shape], nranks: int) -> float:
        """2 (p-1)/p of 2 n bytes, for n numbers and p ranks."""
        return 2 * (nranks - 1) / nranks * 2 * count


@dataclass(frozen=True)
class Float16(_SixteenBits):
    """IEEE half precision: 11 significant bits, numbers from 6e-8 to 65504. See `HalfCodec`."""

    name: ClassVar[str] = "fp16"
    dtype: ClassVar[npt.DTypeLike] = np.float16


@dataclass(frozen=True)
class BFloat16(_SixteenBits):
    """The upper half of a float32: 8 significant bits, numbers as large and small. See `HalfCodec`."""

    name: ClassVar[str] = "bf16"
    dtype: ClassVar[npt.DTypeLike] = ml_dtypes.bfloat16


# -- 8-bit integers --------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A slice of numbers as it travels: the scales of its blocks, then the codes."""

    scales: Array
    codes: Array


class Int8Codec:
    """Integers cannot be added up on their way, so each rank adds up one slice of the bucket.

        quantise, Alltoall      rank r gets every rank's slice r: codes, and a scale for each 256 of them
        sum                     of slice r, in float32, in the order of ranks
        quantise, Allgather     every rank gets every slice

    Both roundings have error feedback: the residual is of the own gradients, and ``sum_residual`` of the own
    slice of the sum.

    A NaN or infinity, or an x that overflows float32, makes the 256 elements around it NaN.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bucket = bucket = bundle.bucket
        self.factor = bundle.factor
        rank, nranks, allocate = bundle.rank, bundle.nranks, bundle.allocate
        length, self.row_bytes = _slice_length(len(bucket), nranks), _row_bytes(len(bucket), nranks)
        starts = [min(r * length, len(bucket)) for r in range(nranks + 1)]
        self.slices = [slice(starts[r], starts[r + 1]) for r in range(nranks)]
        self.own = self.slices[rank]
        own_length = self.own.stop - self.own.start

        self.residual = np.zeros(len(bucket), np.float32)
        self.sum_residual = np.zeros(own_length, np.float32)
        self.arrays = {"residual": self.residual, "sum_residual": self.sum_residual}
        self.total = np.zeros(own_length, np.float32)

        parts, received, everything = (allocate(nranks * self.row_bytes, np.uint8) for _ in range(3))
        own_sum = allocate(self.row_bytes, np.uint8)
        self.parts = [self._row(parts, r, part) for r, part in enumerate(self.slices)]
        self.received = [self._row(received, r, self.own) for r in range(nranks)]
        self.own_sum = self._row(own_sum, 0, self.own)
        self.everything = [self._row(everything, r, part) for r, part in enumerate(self.slices)]
        self.stages: list[Stage] = [
            self.compress,
            Exchange("Alltoall", parts, received),
            self.add_up,
            Exchange("Allgather", own_sum, everything),
            self.decompress,
        ]

    def compress(self) -> None:
        """Codes of x = factor * gradient + residual, slice by slice; residual = x - decoded."""
        for part, row in zip(self.slices, self.parts, strict=True):
            quantise.quantise_feedback(
                self.bucket[part], self.factor, self.residual[part], row.codes, row.scales
            )

    def add_up(self) -> None:
        """Total = sum of all ranks' own slice; codes of total + sum_residual."""
        self.total.fill(0)
        for row in self.received:
            quantise.dequantise_add(row.codes, row.scales, self.total)
        quantise.quantise_feedback(self.total, 1, self.sum_residual, self.own_sum.codes, self.own_sum.scales)

    def decompress(self) -> None:
        """Result = decoded slices."""
        for part, row in zip(self.slices, self.everything, strict=True):
            quantise.dequantise(row.codes, row.scales, self.bucket[part])

    def _row(self, rows: Array, r: int, part: slice) -> _Row:
        count = part.stop - part.start
        row = rows[r * self.row_bytes :]
        begin = 4 * quantise.blocks(count)
        return _Row(row[:begin].view(np.float32), row[begin : begin + count].view(np.int8))


def _slice_length(count: int, nranks: int) -> int:
    """Numbers in a slice, the last slices may have fewer: a multiple of 4, so that scales are aligned."""
    return -(-count // (4 * nranks)) * 4


def _row_bytes(count: int, nranks: int) -> int:
    length = _slice_length(count, nranks)
    scales: int = quantise.blocks(length)
    return 4 * scales + length


@dataclass(frozen=True)
class Int8:
    """Blocks of 256 integers from -127 to 127 with a float32 scale each. See `Int8Codec`."""

    name: ClassVar[str] = "int8"

    def bind(self, bundle: Bundle) -> Codec:
        """See `Compression.bind`."""
        return Int8Codec(bundle)

    def volume(self, count: int, shapes: Sequence[Shape], nranks: int) -> float:
        """2 (p-1) (m + 4 ceil(m / 256)); m = n / p rounded up to a multiple of 4, n numbers, p ranks."""
        return 2 * (nranks - 1) * _row_bytes(count, nranks)


# -- a few numbers of many -------------------------------------------------------------------------------


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected a number above 0 and up to 1, got {fraction}")


def _chosen(fraction: float, count: int) -> int:
    """How many of ``count`` numbers are sent: at least one, if there is any."""
    return min(count, max(1, round(fraction * count)))


class TopKCodec:
    """Each rank sends the k entries of x = factor * gradient + residual with the largest magnitudes.

        residual = x without them; result = sum of all ranks' entries, in the order of ranks

    NaN and infinity are the largest, so they are always sent, and the result is NaN or infinite there. Of
    more than k of them, the NaNs and then the lowest indices are sent.
    """

    def __init__(self, bundle: Bundle, k: int) -> None:
        self.bucket = bucket = bundle.bucket
        self.k = k
        self.factor = bundle.factor
        nranks, allocate = bundle.nranks, bundle.allocate
        self.residual = np.zeros(len(bucket), np.float32)
        self.arrays = {"residual": self.residual}
        own, everyone = allocate(2 * k, np.int32), allocate(nranks * 2 * k, np.int32)
        self.own = self._entries(own)
        self.received = [self._entries(row) for row in everyone.reshape(nranks, 2 * k)]
        self.stages: list[Stage] = [
            self.compress,
            Exchange("Allgather", own, everyone),
            self.decompress,
        ]

    def compress(self) -> None:
        """Take the k largest of x out of the residual."""
        indices, values = self.own
        sparse.select(self.bucket, self.factor, self.residual, self.k, indices, values)

    def decompress(self) -> None:
        """Result = sum of all ranks' entries."""
        self.bucket.fill(0)
        for indices, values in self.received:
            sparse.scatter_add(indices, values, self.bucket)

    def _entries(self, row: Array) -> tuple[Array, Array]:
        return row[: self.k], row[self.k :].view(np.float32)


@dataclass(frozen=True)
class TopK:
    """The largest ``fraction`` of the numbers, above 0 and up to 1 (Lin et al. 2018, arXiv 1712.01887).

    Ranks choose for themselves, so what a rank receives grows with their number. See `TopKCodec`.
    """

    fraction: float

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)

    @property
    def name(self) -> str:
        """As `parse` takes it."""
        return f"topk:{self.fraction}"

    def bind(self, bundle: Bundle) -> Codec:
        """See `Compression.bind`."""
        return TopKCodec(bundle, _chosen(self.fraction, len(bundle.bucket)))

    def volume(self, count: int, shapes: Sequence[Shape], nranks: int) -> float:
        """(p-1) 8 k, with k = the fraction of n, rounded, at least 1, for n numbers and p ranks."""
        return (nranks - 1) * 8 * _chosen(self.fraction, count)


class RandomKCodec:
    """All ranks send x = factor * gradient + residual at the same k random places, others in every step.

        residual = x without them; result = sum over ranks there, 0 elsewhere

    One more number is summed with them: NaN from a rank that has a NaN or infinity anywhere in x. Then the
    whole result is NaN, for the places that are sent would most often not show it.
    """

    def __init__(self, bundle: Bundle, k: int, seed: int) -> None:
        self.bucket = bucket = bundle.bucket
        self.k = k
        self.seed = seed
        self.factor = bundle.factor
        self.residual = np.zeros(len(bucket), np.float32)
        self.step = np.zeros(1, np.int64)
        self.arrays: dict[str, Array] = {"residual": self.residual, "step": self.step}
        self.indices = np.zeros(k, np.int32)
        self.values = bundle.allocate(k + 1, np.float32)
        self.stages: list[Stage] = [
            self.compress,
            Exchange("Allreduce", self.values, self.values),
            self.decompress,
        ]

    def compress(self) -> None:
        """Take this step's places out of the residual."""
        self.indices = sparse.random_indices(self.seed, int(self.step[0]), len(self.bucket), self.k)
        self.step += 1
        sparse.select_at(self.bucket, self.factor, self.residual, self.indices, self.values)

    def decompress(self) -> None:
        """Result = sums at this step's places."""
        self.bucket.fill(self.values[-1])  # 0 or NaN
        sparse.scatter_add(self.indices, self.values[:-1], self.bucket)


@dataclass(frozen=True)
class RandomK:
    """A random ``fraction`` of the numbers, above 0 and up to 1, the same on all ranks (Stich et al. 2018,
    arXiv 1809.07599).

    A gradient waits 1 / ``fraction`` steps on average, which may call for a lower learning rate. See
    `RandomKCodec`.
    """

    fraction: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)

    @property
    def name(self) -> str:
        """As `parse` takes it."""
        return f"randomk:{self.fraction}"

    def bind(self, bundle: Bundle) -> Codec:
        """See `Compression.bind`."""
        return RandomKCodec(bundle, _chosen(self.fraction, len(bundle.bucket)), self.seed)

    def volume(self, count: int, shapes: Sequence[Shape], nranks: int) -> float:
        """2 (p-1)/p of 4 (k + 1), with k = the fraction of n, rounded, at least 1, for n numbers, p ranks."""
        return 2 * (nranks - 1) / nranks * 4 * (_chosen(self.fraction, count) + 1)


# -- low rank --------------------------------------------------------------------------------------------


class _Matrix(NamedTuple):
    """A tensor in the bucket, as a matrix [rows, columns], and its factors P and Q. All flat views."""

    rows: int
    columns: int
    result: Array  # in the bucket
    residual: Array
    p: Array  # [rows, rank]
    q: Array  # [rank, columns]
    first_q: Array


class PowerSGDCodec:
    """One step of subspace iteration for each matrix, started where the last step ended.

        M = factor * gradient + residual        [rows, columns], of this rank
        P = sum over ranks of M Q^T             Allreduce of all matrices' P together
        P = orthonormal columns of P
        Q = P^T M;  residual = M - P Q          what this rank's M has outside of P's columns
        Q = sum over ranks of Q                 Allreduce of all matrices' Q together
        result = P Q

    What has no two factors that are smaller than itself, such as a vector, is sent as it is, with the Ps.

    Other than in the paper, a rank's residual is what P misses of its own M, not the difference between M and
    the ranks' mean. Their sum over ranks is the same, of smaller numbers. Still, what has opposite signs on
    different ranks cancels in P and piles up: where each rank sees data of its own kind, residuals grow,
    while their sum does not.

    A NaN or infinity makes its whole matrix NaN; where a tensor is sent as it is, only the element.
    """

    def __init__(self, bundle: Bundle, rank: int, seed: int) -> None:
        self.bucket = bucket = bundle.bucket
        self.rank = rank
        self.factor = bundle.factor
        shapes, offsets, allocate = bundle.shapes, bundle.offsets, bundle.allocate
        self.residual = np.zeros(len(bucket), np.float32)
        ps_count, qs_count = _factor_counts(shapes, rank)
        ps, qs = allocate(ps_count, np.float32), allocate(qs_count, np.float32)
        self.arrays = {"residual": self.residual, "q": qs}

        self.matrices: list[_Matrix] = []
        self.plain: list[tuple[slice, Array]] = []  # where in the bucket, and where among the Ps
        p_at = q_at = 0
        for number, (shape, offset) in enumerate(zip(shapes, offsets, strict=True)):
            rows, columns = _as_matrix(shape)
            part = slice(offset, offset + rows * columns)
            if not _pays(rows, columns, rank):
                self.plain.append((part, ps[p_at : p_at + rows * columns]))
                p_at += rows * columns
                continue
            p, q = ps[p_at : p_at + rows * rank], qs[q_at : q_at + rank * columns]
            p_at, q_at = p_at + len(p), q_at + len(q)
            # Uniform numbers, not normal ones: they take no logarithms, which might differ between machines.
            q[:] = np.random.default_rng([seed, number]).random(len(q)) - 0.5
            views = (bucket[part], self.residual[part], p, q, q.copy())
            self.matrices.append(_Matrix(rows, columns, *views))

        self.stages: list[Stage] = [self.compress, Exchange("Allreduce", ps, ps), self.decompress]
        if self.matrices:
            self.stages[2:2] = [self.project, Exchange("Allreduce", qs, qs)]

    def compress(self) -> None:
        """P = M Q^T."""
        with np.errstate(over="ignore", invalid="ignore"):
            np.multiply(self.bucket, np.float32(self.factor), out=self.bucket)
            self.residual += self.bucket
            for matrix in self.matrices:
                m = matrix.residual.reshape(matrix.rows, matrix.columns)
                q = matrix.q.reshape(self.rank, matrix.columns)
                np.matmul(m, q.T, out=matrix.p.reshape(matrix.rows, self.rank))
        for part, sent in self.plain:
            sent[:] = self.residual[part]
            self.residual[part] = 0

    def project(self) -> None:
        """P = orthonormal columns of P; Q = P^T M; residual = M - P Q."""
        for matrix in self.matrices:
            lowrank.orthogonalise(matrix.p, self.rank)
            m = matrix.residual.reshape(matrix.rows, matrix.columns)
            p = matrix.p.reshape(matrix.rows, self.rank)
            with np.errstate(over="ignore", invalid="ignore"):
                np.matmul(p.T, m, out=matrix.q.reshape(self.rank, matrix.columns))
            lowrank.add_product(-1, matrix.p, matrix.q, matrix.residual, self.rank)

    def decompress(self) -> None:
        """Result = P Q."""
        for part, received in self.plain:
            self.bucket[part] = received
        for matrix in self.matrices:
            matrix.result.fill(0)
            lowrank.add_product(1, matrix.p, matrix.q, matrix.result, self.rank)
            self._renew(matrix)

    def _renew(self, matrix: _Matrix) -> None:
        """Make this step's Q the next one's beginning.

        Its rows are scaled, or M Q^T would have the square of the gradients' magnitude, and might overflow.
        The first Q comes back after a spoilt step, and in rows that are 0, for they would stay so for ever.
        """
        q = matrix.q.reshape(self.rank, matrix.columns)
        first_q = matrix.first_q.reshape(q.shape)
        largest = np.abs(q).max(axis=1)
        if not np.isfinite(largest).all():
            q[:] = first_q
            matrix.residual.fill(0)
            return
        zero = largest == 0
        q[zero] = first_q[zero]
        q[~zero] /= largest[~zero, None]


def _as_matrix(shape: Shape) -> tuple[int, int]:
    """Rows and columns: the first axis against all others; a vector, or a number, is one column."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _pays(rows: int, columns: int, rank: int) -> bool:
    """Whether the two factors are smaller than the matrix; the rank is then below both its sides."""
    return rank * (rows + columns) < rows * columns


def _factor_counts(shapes: Sequence[Shape], rank: int) -> tuple[int, int]:
    """How many numbers the first and the second Allreduce have."""
    sizes = [_as_matrix(shape) for shape in shapes]
    first = sum(rank * rows if _pays(rows, columns, rank) else rows * columns for rows, columns in sizes)
    second = sum(rank * columns for rows, columns in sizes if _pays(rows, columns, rank))
    return first, second


@dataclass(frozen=True)
class PowerSGD:
    """Matrices as products of two factors of ``rank`` columns and rows, 1 or more (Vogels et al. 2019, arXiv
    1905.13727). See `PowerSGDCodec`.
    """

    rank: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: expected 1 or more, got {self.rank}")

    @property
    def name(self) -> str:
        """As `parse` takes it."""
        return f"powersgd:{self.rank}"

    def bind(self, bundle: Bundle) -> Codec:
        """See `Compression.bind`."""
        return PowerSGDCodec(bundle, self.rank, self.seed)

    def volume(self, count: int, shapes: Sequence[Shape], nranks: int) -> float:
        """2 (p-1)/p of 4 (sum of r (a + b) over matrices [a, b] + elements of other tensors), with p ranks.

        A matrix is a tensor with r (a + b) < a b, a being its first axis and b the product of all others.
        """
        return 2 * (nranks - 1) / nranks * 4 * sum(_factor_counts(shapes, self.rank))


# -- by name ---------------------------------------------------------------------------------------------

_PLAIN: dict[str, Callable[[], Compression]] = {"fp16": Float16, "bf16": BFloat16, "int8": Int8}
_SET: dict[str, Callable[[str], Compression]] = {
    "topk": lambda value: TopK(float(value)),
    "randomk": lambda value: RandomK(float(value)),
    "powersgd": lambda value: PowerSGD(int(value)),
}


def parse(text: str) -> Compression | None:
    """The compression that ``text`` names, None for "none". Raises ValueError that says what is allowed."""
    kind, colon, value = text.partition(":")
    try:
        if text == "none":
            return None
        return _SET[kind](value) if colon else _PLAIN[kind]()
    except (KeyError, ValueError):
        raise ValueError(
            "compression: expected none, fp16, bf16, int8, topk:FRACTION or randomk:FRACTION "
            f"(above 0, up to 1), or powersgd:RANK (1 or more), got {text!r}"
        ) from None
