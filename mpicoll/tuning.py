"""Which algorithm, and how finely cut, for which collective, rank count and size: the static choice.

What `mpicoll.tune` has measured on a machine goes before it.

The thresholds are where the measured curves of the messages transport cross on one node, unless they say
that they are of a network; the shape of the table follows from the costs in each algorithm's file: few rounds
while latency rules, least volume when bandwidth does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mpicoll.transports.program import Pipeline
from mpicoll.transports.shared import NOT_FAR, Sizes

KIB = 1024
MIB = 1024 * KIB
MILLISECOND = 1_000_000  # nanoseconds
SEQUENTIAL = 1 << 30  # stride: one segment goes through all rounds before the next, and stays in cache

# Over a network. Open MPI sends up to 64 KiB over TCP at once, headers included, larger messages after an
# answer. Some 18 of them under way keep both directions busy: 4 MiB took 0.6 of the time of messages of
# 512 KiB. A pair of those takes a tenth less time than 1 MiB in these, or twice as long, as it happens.
EAGER = Pipeline(segment=63 * KIB, lookahead=18, early=18)

FEW = 16  # ranks up to which messages to all others at once beat waiting for one neighbour after another


def choose(collective: str, nranks: int, nbytes: int, network: bool = False) -> str:
    """The name of the algorithm for ``nbytes`` bytes: the whole vector, or all ranks' blocks together.

    ``network``: whether messages travel between nodes.
    """
    if network and nranks == 2 and collective == "allreduce":
        # Both send everything, as in two shots, but at once; to add all of it is cheap beside.
        return "recursive_doubling"
    return _CHOICES[collective](nranks, nbytes)


def _allreduce(nranks: int, nbytes: int) -> str:
    if nranks == 2:
        return "recursive_doubling" if nbytes <= 256 * KIB else "ring"
    power_of_two = nranks & (nranks - 1) == 0  # other rank counts pay for folding
    if nbytes <= (32 if power_of_two else 64) * KIB:
        return "recursive_doubling"
    if power_of_two and nbytes <= (16 if nranks == 4 else 128) * KIB * nranks:
        return "rabenseifner"
    return "two_shot" if nranks <= FEW else "ring"


def _reduce_scatter(nranks: int, nbytes: int) -> str:
    return "recursive_halving" if nbytes < 16 * KIB else _large_blocks(nranks)


def _allgather(nranks: int, nbytes: int) -> str:
    return "bruck" if nbytes < 16 * KIB else _large_blocks(nranks)


def _large_blocks(nranks: int) -> str:
    return "direct" if nranks <= FEW else "ring"


def _broadcast_or_reduce(nranks: int, nbytes: int) -> str:
    return "binomial" if nbytes < 64 * KIB or nranks == 2 else "chain"


def _gather_or_scatter(nranks: int, nbytes: int) -> str:
    return "binomial" if nbytes < 16 * KIB else "direct"


def _alltoall(nranks: int, nbytes: int) -> str:
    # Bruck sends every byte log2(p) / 2 times; it pays while a block costs less than a message.
    return "bruck" if nranks > 8 and nbytes < 256 * nranks**2 else "pairwise"


_CHOICES: dict[str, Callable[[int, int], str]] = {
    "allreduce": _allreduce,
    "reduce_scatter": _reduce_scatter,
    "allgather": _allgather,
    "broadcast": _broadcast_or_reduce,
    "reduce": _broadcast_or_reduce,
    "gather": _gather_or_scatter,
    "scatter": _gather_or_scatter,
    "alltoall": _alltoall,
    "barrier": lambda nranks, nbytes: "dissemination",
}


# -- several nodes. Measured over TCP between two hosts on one machine, 10 µs and 1.6 GB/s, on its two cores.


def hierarchical_pays(collective: str, nnodes: int, nbytes: int) -> bool:
    """Whether ``nbytes`` bytes had better travel in memory on each of several nodes, in messages between.

    Reduce-scatter and allgather go through memory once for each node's blocks, which takes some µs each time;
    their ``nbytes`` are those of all blocks together.
    """
    least = {"allreduce": 1, "reduce_scatter": 8 * KIB * nnodes, "allgather": 16 * KIB * nnodes}
    return nbytes >= least.get(collective, 32 * KIB) and collective in (*least, "broadcast")


def one_slice_pays(nbytes: int) -> bool:
    """Whether only one rank of each node had better exchange messages, in an allreduce of ``nbytes`` bytes.

    A message costs its sender and its receiver some 8 µs each; until then one that is twice as long costs
    less than two.
    """
    return nbytes <= 16 * KIB


def piece(nranks: int) -> int:
    """Bytes of a vector, or of each of ``nranks`` blocks, that go through the stages of a hierarchy at once.

    Small enough to stay in the caches between stages, and large beside what it costs to begin; with 256 KiB
    nearly everything took longer.
    """
    return max(64 * KIB, MIB // nranks)


def loose_from(shares_memory: bool) -> int:
    """Bytes of an array from which on it is reduced by itself, instead of packed with others.

    Packing costs two copies. In shared memory a call by itself costs a microsecond or two; over a network
    it costs a wait or several of some ten microseconds each, in which 10 GB/s copy a megabyte.
    """
    return 64 * KIB if shares_memory else 2 * MIB


def pipeline(nranks: int, nbytes: int | None, network: bool = False, segment: int | None = None) -> Pipeline:
    """How a program for ``nbytes`` bytes is cut into segments; None stands for what ranks may not agree on.

    ``segment``: bytes of a segment, where those were measured (`mpicoll.tune`).

    Each message costs a handshake, which favours large segments; what was received should still be in the
    second-level cache when it is reduced, which favours small ones. With two ranks handshakes weigh
    more, until nothing fits into any cache. Over a network, whose latency is to be hidden, many
    segments are under way at once.
    """
    if network:
        return EAGER if segment is None else replace(EAGER, segment=segment)
    if segment is not None:
        return Pipeline(segment, lookahead=1, stride=SEQUENTIAL)
    if nranks == 2 and (nbytes is None or nbytes <= 16 * MIB):
        return Pipeline(segment=8 * MIB, lookahead=1)
    return Pipeline(segment=256 * KIB, lookahead=1, stride=SEQUENTIAL)


def sizes(nranks: int, cores: int) -> Sizes:
    """How the shared transport works with ``nranks`` ranks on ``cores`` cores.

    Where ranks share cores each wait costs a turn of the others, so more is done between two waits. The ring
    is larger than a second-level cache, so that the lines that are written anew are in no other core's any
    more: taking them back from there costs several times as much. Reading another process's memory through
    the system costs a fault's worth for every page, and pays for large blocks only.
    """
    crowded = nranks > cores
    return Sizes(
        slot=256 * KIB,
        ring=(1280 if crowded else 3072) * KIB,
        small=(16 if crowded else 6) * KIB,
        quiet=16 * KIB,
        far=NOT_FAR if crowded else MIB,
        large=16 * MIB,
        spins=0 if crowded else 2000,
        drowsy=0 if crowded else MILLISECOND,
        alone=2 * nranks <= cores,
    )
