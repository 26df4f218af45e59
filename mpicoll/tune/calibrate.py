"""Fits the simulator's machine to times that were measured here.

A machine of one level has six numbers: what it takes to start a collective, what a message costs its two ends
(overhead o) and on its way (latency α), how fast a rank's link is (1/β), how fast all messages together are
(a memory's limit), and how fast a rank reduces (1/γ). Besides, two curves: by which factor the bytes of a
message, and their reduction, take longer than that, at the sizes `KNOTS`; between them on a line in
logarithms. They follow what the six cannot: a library that asks before it sends from some size on, data that
lie in a cache up to some size.

All are found by least squares on the logarithm of predicted over measured time, so an error of 10 % counts
the same for a microsecond and for a second. At first errors e above `LARGE` count as |e| rather than e^2: one
disturbed measurement is not to bend all others. At last, without those that are then more than `DISTURBED`
off, they count as e^2 + (e^2 / `SMALL`)^2: it is better to be 10 % off everywhere than 30 % at one size. The
curves are kept near 1, and smooth, by adding to the errors `NEAR` times each factor's logarithm and `SMOOTH`
times how far it is from the line between its neighbours.

The predictions are those of ``mpicoll.simulate``; they follow the numbers smoothly but where a maximum
changes sides. So Levenberg's and Marquardt's method serves: from the errors e and their derivatives J with
respect to the logarithms of the numbers, a step d with (J'J + λ diag(J'J)) d = -J'e is tried; λ becomes
smaller after a success, larger after a failure. The six come first, from several places, and then, from
the best end, all.

Sources: K. Levenberg, Quarterly of Applied Mathematics 2 (1944); D. Marquardt, SIAM Journal on Applied
Mathematics 11 (1963).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from datetime import date

import numpy as np
from mpi4py import MPI

from mpicoll import algorithms
from mpicoll.schedule import Schedule
from mpicoll.simulate import Level, Machine, simulate_sizes
from mpicoll.simulate.machine import Curve
from mpicoll.simulate.topologies import Switch
from mpicoll.transports.hierarchical import node_of
from mpicoll.transports.messages import count_cores
from mpicoll.tune import measure
from mpicoll.tune.search import Candidate, Case, FloatArray
from mpicoll.tune.table import machine_name

RANKS = (2, 3, 4)
SIZES = tuple(1 << k for k in range(6, 25, 2))  # 64 bytes to 16 MiB
TIMED = {
    "allreduce": ("ring", "recursive_doubling", "rabenseifner", "two_shot"),
    "reduce_scatter": ("ring", "direct"),
    "allgather": ("ring", "bruck", "direct"),
    "broadcast": ("binomial",),
}
TURNS = 15  # each after one of all others, for some machines are now and then slower for seconds
LEAST_TURNS = 3  # even if the time is up
TOTAL_ABOVE = 1e15  # bytes per second: more is no limit

# Where fits begin: the start, o, α in seconds; 1/β, the total and 1/γ in bytes per second.
NUMBERS = 6
STARTS = (
    (3e-7, 2e-7, 5e-7, 1e10, 2e10, 1e10),
    (1e-6, 2e-6, 1e-5, 1e9, 4e9, 5e9),
    (2e-7, 5e-7, 1e-7, 5e9, 5e9, 2e10),
)
LEAST, MOST = 1e-10, 1e16  # of any of the numbers, in its unit
KNOTS = tuple(1 << k for k in range(8, 25))  # bytes: 256 to 16 Mi; what is smaller is all latency
NEAR, SMOOTH = 0.02, 0.05
STEPS = 60  # of one fit of the six numbers, at most
CURVE_STEPS = 12  # of one fit of all
ENOUGH = 1e-7  # a step that improves the sum of squares by less, as a fraction, is the last
NUDGE = 1e-4  # of a logarithm, for derivatives
LARGE = 0.2  # an error from which on only its first power counts, at first
SMALL = 0.05  # an error from which on its fourth power counts more than its second, at last
DISTURBED = 0.6  # an error that is the measurement's


@dataclass(frozen=True)
class Row:
    """One measurement: the lower quartile, over turns, of the slowest rank's seconds.

    A machine that is now and then slower, as virtual ones are, is hardly so in most turns of one algorithm
    and in few of another. ``spread``: the least, and the median.
    """

    collective: str
    algorithm: str
    ranks: int
    nbytes: int
    seconds: float
    spread: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Parameters:
    """See the module; in seconds, and bytes per second; the curves' factors at `KNOTS`, or none."""

    start: float
    overhead: float
    latency: float
    bandwidth: float
    total_bandwidth: float
    reduce_bandwidth: float
    factors: tuple[float, ...] = ()
    reduce_factors: tuple[float, ...] = ()

    @classmethod
    def of_logarithms(cls, logarithms: FloatArray) -> Parameters:
        """From the logarithms of the six numbers, and maybe of both curves' factors."""
        numbers, *curves = np.split(np.exp(logarithms), [NUMBERS, NUMBERS + len(KNOTS)])
        return cls(*numbers.tolist(), *(tuple(curve.tolist()) for curve in curves))


@dataclass(frozen=True)
class Fit:
    """``errors``: (predicted - measured) / measured, of each row."""

    parameters: Parameters
    errors: tuple[float, ...]

    @property
    def median_error(self) -> float:
        return float(np.median(np.abs(self.errors)))

    @property
    def worst_error(self) -> float:
        return float(np.max(np.abs(self.errors)))

    def share_within(self, error: float) -> float:
        """The part of the rows that are predicted with at most this error."""
        return float(np.mean(np.abs(self.errors) <= error))


# -- measuring


def level_name(comm: MPI.Intracomm) -> str:
    """What joins the ranks: ``node`` or ``network``. Raises ValueError if both do. Collective."""
    whole = MPI.Intracomm(comm)
    node = node_of(whole)
    sizes = set(whole.allgather(node.Get_size()))
    node.Free()
    if sizes == {comm.size}:
        return "node"
    if sizes == {1}:
        return "network"
    raise ValueError(
        f"--calibrate: expected all ranks on one node, or one on each, got nodes of {sorted(sizes)}"
    )


def rank_counts(comm: MPI.Intracomm) -> list[int]:
    """The numbers of ranks to measure with: as many as have a core each, if they are on one node. Collective.

    Ranks that share cores wait for these more than for messages, of which the simulator knows nothing.
    """
    whole = MPI.Intracomm(comm)
    node = node_of(whole)
    most = comm.size if node.Get_size() < comm.size else min(comm.size, count_cores(node))
    node.Free()
    most = whole.bcast(most)
    return [count for count in RANKS if count <= most]


def measure_rows(
    comm: MPI.Intracomm, counts: Sequence[int], limit: float, progress: Callable[[int, int, str], None]
) -> list[Row]:
    """Times of several algorithms on so many of the ranks; on rank 0. Collective."""
    begin = time.perf_counter()
    rows: list[Row] = []
    for done, count in enumerate(counts):
        part = MPI.Intracomm(comm).Split(0 if comm.rank < count else MPI.UNDEFINED, comm.rank)
        left = limit - (time.perf_counter() - begin)
        if comm.rank < count:
            share = len(TIMED) * len(SIZES)

            def show(each: int, what: str, first: int = done * share, share: int = share) -> None:
                progress(first + each, share * len(counts), what)

            rows += _rows(MPI.Intracomm(part), left / (len(counts) - done), f"{count} ranks", show)
            part.Free()
        _wait_quietly(comm)
    return rows


def _rows(
    comm: MPI.Intracomm, limit: float, what: str, progress: Callable[[int, str], None]
) -> Iterator[Row]:
    """All algorithms at all sizes on all ranks of ``comm``; ``progress`` gets how many cases are done."""
    begin = time.perf_counter()
    limit = comm.bcast(limit)  # ranks that give turns different lengths would wait for each other
    place = measure.place_of(comm)
    with measure.measured_communicator(comm, place) as measured:
        measurer = measure.Measurer(measured, place.crowded)
        turns = len(SIZES) * TURNS * sum(map(len, TIMED.values()))
        measurer.seconds_per_turn = float(np.clip(limit / turns / 2, measure.LEAST_TURN, measure.TURN))
        unit = measure.ITEM.itemsize * comm.size  # equal chunks, as the simulator takes them to be
        sizes = [size // unit * unit for size in SIZES]
        cases = [Case(collective, size, size) for size in sizes for collective in TIMED]
        taken: dict[Case, list[FloatArray]] = {case: [] for case in cases}
        for number in range(TURNS):
            if number >= LEAST_TURNS and comm.bcast(time.perf_counter() - begin > limit):
                break
            for done, case in enumerate(cases):
                progress((number * len(cases) + done) // TURNS, what)
                names = [Candidate(name) for name in TIMED[case.collective]]
                taken[case].append(measurer.times(case, names, 1))
        for case, seconds in taken.items():
            found = np.quantile(np.concatenate(seconds), (0.25, 0, 0.5), axis=0).T.tolist()
            for name, (quartile, *spread) in zip(TIMED[case.collective], found, strict=True):
                yield Row(case.collective, name, comm.size, case.nbytes, quartile, (spread[0], spread[1]))


def _wait_quietly(comm: MPI.Intracomm) -> None:
    """A barrier in which those that wait leave their cores to those that are measured."""
    barrier = MPI.Intracomm(comm).Ibarrier()
    while not barrier.Test():
        time.sleep(1e-3)


# -- fitting


class _Predictor:
    """Predictions for some rows, each schedule with all of its sizes at once."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._groups: dict[tuple[str, str, int], list[int]] = {}
        for i, row in enumerate(rows):
            self._groups.setdefault((row.collective, row.algorithm, row.ranks), []).append(i)
        self._schedules: dict[tuple[str, str, int], Schedule] = {
            key: algorithms.schedule(*key) for key in self._groups
        }
        self._sizes = [row.nbytes for row in rows]
        self._most = max(row.ranks for row in rows)

    def __call__(self, parameters: Parameters) -> FloatArray:
        """Seconds of each row."""
        machine = machine_of(parameters, "node", self._most)
        seconds = np.zeros(len(self._sizes))
        for key, members in self._groups.items():
            found = simulate_sizes(self._schedules[key], [self._sizes[i] for i in members], machine)
            seconds[members] = [prediction.seconds for prediction in found]
        return seconds


def machine_of(parameters: Parameters, level: str, size: int, name: str = "calibrated") -> Machine:
    """The machine of one level that has these numbers."""
    own = Level(
        level,
        Switch(size),
        parameters.latency,
        parameters.bandwidth,
        total_bandwidth=parameters.total_bandwidth,
        curve=_curve(parameters.factors),
    )
    reduce_curve = _curve(parameters.reduce_factors)
    return Machine(
        name,
        (own,),
        parameters.overhead,
        parameters.reduce_bandwidth,
        reduce_curve=reduce_curve,
        start=parameters.start,
    )


def _curve(factors: Sequence[float]) -> Curve:
    return Curve(tuple(zip(map(float, KNOTS), factors, strict=True))) if factors else Curve()


def fit(rows: Sequence[Row]) -> Fit:
    """The parameters with which predictions come closest to ``rows``, of which there is one at least."""
    predict = _Predictor(rows)
    measured = np.log([row.seconds for row in rows])

    def errors(logarithms: FloatArray) -> FloatArray:
        return np.asarray(np.log(predict(Parameters.of_logarithms(logarithms))) - measured)

    def tempered(logarithms: FloatArray) -> FloatArray:
        return np.concatenate([_tempered(errors(logarithms)), _stiffness(logarithms[NUMBERS:])])

    ends = [_least_squares(tempered, np.log(start), STEPS) for start in STARTS]
    best = min(ends, key=lambda end: float(np.square(tempered(end)).sum()))
    best = _least_squares(tempered, np.append(best, np.zeros(2 * len(KNOTS))), CURVE_STEPS)
    sound = np.abs(errors(best)) <= DISTURBED

    def weighed(logarithms: FloatArray) -> FloatArray:
        return np.concatenate([_weighed(errors(logarithms)[sound]), _stiffness(logarithms[NUMBERS:])])

    best = _least_squares(weighed, best, CURVE_STEPS)
    return Fit(Parameters.of_logarithms(best), tuple(np.expm1(errors(best)).tolist()))


def _stiffness(factors: FloatArray) -> FloatArray:
    """What is added to the errors for the logarithms of both curves' factors, if there are any."""
    curves = factors.reshape(-1, len(KNOTS))
    return np.concatenate([(NEAR * curves).ravel(), (SMOOTH * np.diff(curves, 2, axis=1)).ravel()])


def _tempered(errors: FloatArray) -> FloatArray:
    """Numbers whose squares are those of small errors, and grow as large errors do."""
    scaled = errors / LARGE
    squares = 2 * scaled**2 / (np.sqrt(1 + scaled**2) + 1)  # is 2 (sqrt(1 + x^2) - 1), without cancellation
    return np.asarray(np.sign(errors) * LARGE * np.sqrt(squares))


def _weighed(errors: FloatArray) -> FloatArray:
    """Numbers whose squares are those of small errors, and grow as the fourth power of others."""
    return np.asarray(errors * np.sqrt(1 + (errors / SMALL) ** 2))


def _least_squares(errors: Callable[[FloatArray], FloatArray], start: FloatArray, most: int) -> FloatArray:
    """Where the sum of squares of ``errors`` is smallest, near ``start``, in ``most`` steps at most."""
    at, damping = start, 1e-2
    here = errors(at)
    for _ in range(most):
        steps = NUDGE * np.eye(len(at))
        slopes = np.stack([(errors(at + step) - here) / NUDGE for step in steps], axis=1)
        normal = slopes.T @ slopes
        # A number that changes nothing here, such as a limit that is not reached, stays as it is.
        scale = np.diag(np.maximum(np.diag(normal), 1e-12))
        step = np.linalg.solve(normal + damping * scale, -slopes.T @ here)
        tried = np.clip(at + np.clip(step, -1, 1), np.log(LEAST), np.log(MOST))
        there = errors(tried)
        before, after = np.square(here).sum(), np.square(there).sum()
        if after < before:
            at, here, damping = tried, there, damping / 3
            if before - after <= ENOUGH * before:
                break
        else:
            damping *= 5
            if damping > 1e8:
                break
    return at


# -- writing


def to_toml(fitted: Fit, level: str, size: int) -> str:
    """A machine file, see ``mpicoll.simulate.machine``, with room for ``size`` ranks."""
    start, overhead, latency, bandwidth, total, reduce_bandwidth, factors, reduce_factors = astuple(
        fitted.parameters
    )
    limit = f"total_bandwidth = {total:.4g}\n" if total < TOTAL_ABOVE else ""
    about = f"{machine_name()}, measured {date.today().isoformat()}"
    return f"""\
# Made by `mpicoll tune --calibrate`. Predictions for what was measured have an error of
# {fitted.median_error:.0%} (median), {fitted.worst_error:.0%} (worst).
name = "calibrated"
about = {_quoted(about)}

[rank]
start = {start:.4g}
overhead = {overhead:.4g}
reduce_bandwidth = {reduce_bandwidth:.4g}
reduce_curve = {_points(reduce_factors)}

[[levels]]
name = "{level}"
size = {max(size, *RANKS)}
latency = {latency:.4g}
bandwidth = {bandwidth:.4g}
{limit}curve = {_points(factors)}
"""


def _points(factors: Sequence[float]) -> str:
    """As an array of TOML."""
    return f"[{', '.join(f'[{size}, {factor:.4g}]' for size, factor in zip(KNOTS, factors, strict=True))}]"


def _quoted(text: str) -> str:
    """As a string of TOML."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
