"""Swing: a butterfly whose partners lie, alternately, to the right and to the left, nearer than 2^k.

Vocabulary: the ``core`` ranks are a power of two, every ``extra`` rank is folded into its neighbour (see
``doubling``). Step k pairs an even place of the core with the odd one at distance d(k) = (1 - (-2)^(k+1))/3,
modulo the core's size: 1, -1, 3, -5, 11, ... The ``reach`` of a place from a step on is everyone to whom it
is connected by the steps that are left; whoever shares a reach holds the same chunks in that step. A place's
``label`` is its number in an order in which every reach is a range: so what is sent is a range of blocks.

The idea: recursive doubling sends to distances 1, 2, 4, 8, ...; on a ring or torus a message over distance d
passes d links, and shares each with d - 1 others. Changing sides at every step, Swing reaches everyone by
distances 1, 1, 3, 5, 11, ..., a third less, in as many steps.

swing           reduce-scatter, near steps first (half of the data goes to a neighbour, a quarter too), then
                the same backwards as allgather. Labels number the blocks, so all messages are ranges.
swing_latency   partners exchange all they have in every step. Far steps first: in that order groups that have
                the same sum exchange with each other, and all ranks get the same bits; near steps first, as
                published, they get sums of different orders.
reduce-scatter  on its own, and allgather, have one chunk for each rank, which cannot be numbered anew: the
                chunks of a reach are sent one by one, in order.

Worked example, 4 ranks with the parts a, b, c, d. Distances are 1 and -1, labels 0, 2, 3, 1; ``*`` marks a
complete sum:

                            rank 0             rank 1             rank 2             rank 3
    round 0  sends          a2 a3 -> 1         b0 b1 -> 0         c0 c1 -> 3         d2 d3 -> 2
             then holds     a+b of 0, 1        a+b of 2, 3        c+d of 2, 3        c+d of 0, 1
    round 1  sends          1 -> 3             3 -> 2             2 -> 1             0 -> 0
             then holds     0*                 2*                 3*                 1*
    round 2  sends          0* -> 3            2* -> 2            3* -> 1            1* -> 0
             then holds     0* 1*              2* 3*              2* 3*              0* 1*
    round 3  sends          0* 1* -> 1         2* 3* -> 0         2* 3* -> 3         0* 1* -> 2

Cost for n bytes, p ranks, L = log2 p, in latency α, time per byte β and per byte reduced γ, for a power of
two: swing 2Lα + 2n(p-1)/p β + n(p-1)/p γ, swing_latency L(α + nβ + nγ), reduce-scatter Lα + n(p-1)/p (β +
γ), allgather Lα + n(p-1)/p β. Otherwise folding adds what it adds to Rabenseifner's allreduce, to recursive
doubling and to recursive halving, and to the allgather 2α + at most 2nβ.

Source: D. De Sensi, T. Bonato, D. Saam, T. Hoefler, "Swing: Short-cutting rings for higher bandwidth
allreduce", NSDI 2024, arXiv:2401.09356. The labels, and folding, are ours.
"""

import numpy as np

from mpicoll.algorithms.doubling import core_ranks
from mpicoll.algorithms.halving import fold
from mpicoll.schedule import (
    COPY,
    REDUCE,
    IntArray,
    Round,
    Schedule,
    check_shape,
    in_sequence,
    mirrored,
)


def swing_allreduce(nranks: int) -> Schedule:
    """Every rank ends with the sum of all ranks' data, in 2 log2 p rounds (+2 to fold)."""
    check_shape(nranks)
    ncore = len(core_ranks(nranks))
    reduce = in_sequence("reduce", "reduce_scatter", [fold(nranks, ncore), _butterfly(nranks, ncore)])
    return in_sequence("swing", "allreduce", [reduce, mirrored(reduce, "allgather")])


def swing_latency_allreduce(nranks: int) -> Schedule:
    """Every rank ends with the sum of all ranks' data, the same bits, in log2 p rounds (+2 to fold)."""
    check_shape(nranks)
    core = core_ranks(nranks)
    folding = fold(nranks, 1)
    steps = reversed(range(_nsteps(len(core))))
    exchanges = [Round.of(core, core[_partner(len(core), k)], 0, REDUCE) for k in steps]
    unfolding = mirrored(folding, "allgather")
    rounds = [*folding.rounds, *exchanges, *unfolding.rounds]
    return Schedule.from_rounds("swing_latency", "allreduce", nranks, 1, rounds)


def swing_reduce_scatter(nranks: int) -> Schedule:
    """Rank r ends with the sum of every rank's chunk r, in log2 p rounds (+2 to fold)."""
    check_shape(nranks)
    return in_sequence("swing", "reduce_scatter", [fold(nranks, nranks), _scatter(nranks)])


def swing_allgather(nranks: int) -> Schedule:
    """Rank r starts with chunk r; every rank ends with all of them, in log2 p rounds (+2 to fold)."""
    check_shape(nranks)
    core = core_ranks(nranks)
    host = core[: nranks - len(core)]
    # An extra rank has its own chunk; the others begin with the one after it.
    to_extra = Round.of_ranges(host, host + 1, host + 2, nranks - 1, nranks, COPY)
    unfold = Schedule.from_rounds("unfold", "allgather", nranks, nranks, [to_extra])
    return in_sequence("swing", "allgather", [mirrored(_scatter(nranks), "allgather"), unfold])


def _butterfly(nranks: int, nchunks: int) -> Schedule:
    """The core rank of label i ends with the sum over the core of chunk i."""
    core = core_ranks(nranks)

    def make_round(k: int) -> Round:
        partner, first, half = _exchange(len(core), k)
        return Round.of_ranges(core, core[partner], first, half, nchunks, REDUCE)

    return Schedule("butterfly", "reduce_scatter", nranks, nchunks, _nsteps(len(core)), make_round)


def _scatter(nranks: int) -> Schedule:
    """Rank r ends with the sum over the core of chunk r: a butterfly, then extra ranks get their chunks."""
    core = core_ranks(nranks)
    host = core[: nranks - len(core)]
    places = _places(len(core))
    # A place's block: its rank's own chunk and, if that one has an extra rank, the extra rank's.
    bounds = np.append(core, nranks)

    def make_round(k: int) -> Round:
        partner, first, half = _exchange(len(core), k)
        reach = np.sort(places[first[:, None] + np.arange(half)], axis=1).ravel()
        src, dst = np.repeat(core, half), np.repeat(core[partner], half)
        return Round.of_ranges(src, dst, bounds[reach], np.diff(bounds)[reach], nranks, REDUCE)

    nsteps = _nsteps(len(core))
    butterfly = Schedule("butterfly", "reduce_scatter", nranks, nranks, nsteps, make_round)
    to_extra = Round.of(host, host + 1, host + 1, COPY)
    unfold = Schedule.from_rounds("unfold", "reduce_scatter", nranks, nranks, [to_extra])
    return in_sequence("scatter", "reduce_scatter", [butterfly, unfold])


def _nsteps(ncore: int) -> int:
    return ncore.bit_length() - 1


def _distance(k: int) -> int:
    """From an even place to its partner in step ``k``; odd, and so the partner's place is."""
    return (1 - int((-2) ** (k + 1))) // 3


def _partner(ncore: int, k: int) -> IntArray:
    """The place of each place's partner in step ``k``."""
    place = np.arange(ncore)
    partner: IntArray = (place + np.where(place % 2 == 0, 1, -1) * _distance(k)) % ncore
    return partner


def _exchange(ncore: int, k: int) -> tuple[IntArray, IntArray, int]:
    """Each place's partner in step ``k``; the first label that the partner then reaches, and how many."""
    partner = _partner(ncore, k)
    half = ncore >> (k + 1)
    label = np.argsort(_places(ncore))
    return partner, label[partner] // half * half, half


def _places(ncore: int) -> IntArray:
    """The places in the order of their labels: first place 0's reach, then its partner's, in every step."""
    reach = np.zeros(1, np.int64)
    for k in reversed(range(_nsteps(ncore))):
        # An odd place's reach is an even one's, mirrored.
        reach = np.concatenate([reach, (_distance(k) - reach) % ncore])
    return reach
