"""Which algorithm, and how finely cut, for which collective, rank count and size.

The thresholds are where the measured curves of the messages transport cross on one node; the shape of the
table follows from the costs in each algorithm's file: few rounds while latency rules, least volume when
bandwidth does.
"""

from __future__ import annotations

from collections.abc import Callable

from mpicoll.transports.program import Pipeline
from mpicoll.transports.shared import NOT_FAR, Sizes

KIB = 1024
MIB = 1024 * KIB
MILLISECOND = 1_000_000  # nanoseconds
SEQUENTIAL = 1 << 30  # stride: one segment goes through all rounds before the next, and stays in cache

FEW = 16  # ranks up to which messages to all others at once beat waiting for one neighbour after another


def choose(collective: str, nranks: int, nbytes: int) -> str:
    """The name of the algorithm for ``nbytes`` bytes: the whole vector, or all ranks' blocks together."""
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


def hierarchical_pays(nnodes: int, nbytes: int) -> bool:
    """Whether an allreduce of ``nbytes`` bytes on several nodes had better add on each node first.

    Its ring waits for 2(N-1) messages between N nodes; recursive doubling over all p ranks for log2(p), each
    as long as the vector. They break even at about 2N/log2(p) α/β bytes, with α/β of some 20 KiB on a fast
    network (2 µs, 10 GB/s) and log2(p) up to 10. This is calculated: no network has been measured.
    """
    return nbytes >= 4 * KIB * nnodes


def loose_from(shares_memory: bool) -> int:
    """Bytes of an array from which on it is reduced by itself, instead of packed with others.

    Packing costs two copies. In shared memory a call by itself costs a microsecond or two; over a network
    it costs a wait or several of some ten microseconds each, in which 10 GB/s copy a megabyte.
    """
    return 64 * KIB if shares_memory else 2 * MIB


def pipeline(nranks: int, nbytes: int) -> Pipeline:
    """How a program for ``nbytes`` bytes is cut into segments.

    Each message costs a handshake, which favours large segments; what was received should still be in the
    second-level cache when it is reduced, which favours small ones. With two ranks handshakes weigh
    more, until nothing fits into any cache.
    """
    if nranks == 2 and nbytes <= 16 * MIB:
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
