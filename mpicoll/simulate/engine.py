"""The engine: when each rank is done, from what each message costs.

Vocabulary
----------
clock      the time at which a rank has done all its transfers of the rounds so far.
costs      what the messages of a round take, from the machine and from each other (see ``network``).
overhead   o, the time of a rank for each message that it sends or receives; the latency α is on top.

The equations, for message m of b bytes from rank s to rank d in a round, where rank r sends S(r) messages and
receives R(r), reduces B(r) bytes of them, and takes f(r) times as long as others (1 for all but stragglers):

    begin(m) = max(clock(s), clock(d))                             it begins when both ends are there
    end(m)   = begin(m) + α + o (f(s) S(s) + f(d) R(d)) + b β'     β': of the slowest shared link of its path
    clock(r) = max(clock(r), end(m) of its messages) + f(r) γ B(r)

At first all clocks stand at f(r) times the machine's ``start``: what it takes to begin a collective at all.
Where a machine has a curve for it, b β' or γ B is multiplied by the curve's factor for messages of b bytes: a
cache that they fit into, a protocol that changes.

So a rank waits for its own messages only, and there is no barrier between rounds: rule 4 of ``schedule``. All
chunks are taken to be equally large, n / nchunks bytes, which may be a fraction; in an alltoall n is what one
rank sends.

Not in it: eager messages that do not wait for their receiver, the pipelining of segments within a message,
what data an earlier round has left in which cache, noise, other jobs.

A ring of p ranks has p^2 messages in p rounds, which are the same but for their chunks: one run (see
``schedule``). A round moves all clocks by as much as the round before as soon as it has moved all of them by
one and the same time, because adding a number to all clocks adds it to everything above. From then on the
rest of the run is one multiplication. A rank that has no message in the run stays where it is.

Worked example, 2 ranks, recursive doubling of n bytes without overhead: both ranks begin at 0, both messages
end at α + nβ, both clocks then stand at α + nβ + nγ.

Sources: R. W. Hockney, "The communication challenge for MPP", Parallel Computing 20 (1994); D. Culler et al.,
"LogP: towards a realistic model of parallel computation", PPoPP 1993, for the overhead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpicoll.schedule import IntArray, Messages, Schedule, run_lengths
from mpicoll.simulate.machine import Machine
from mpicoll.simulate.network import Costs, Network
from mpicoll.simulate.topologies import FloatArray

SAME = 1e-9  # relative; two times that differ by less differ by rounding


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a schedule takes: ``seconds``, and for each rank ``rank_seconds``, float64 ``[nranks]``.

    ``messages``: how many there are. ``level_bytes``: by the name of the level, the bytes of the messages
    that travel within it (a message between nodes counts for the network alone). ``busiest_link`` is named,
    and busy for ``busiest_seconds``; the name is empty if no byte is sent.
    """

    algorithm: str
    collective: str
    nranks: int
    nbytes: int
    seconds: float
    rank_seconds: FloatArray
    messages: int
    level_bytes: dict[str, float]
    busiest_link: str
    busiest_seconds: float


def simulate(schedule: Schedule, nbytes: int, machine: Machine) -> Prediction:
    """How long ``schedule`` takes for ``nbytes`` bytes on ``machine``.

    ``nbytes`` are those of the whole vector, or of all ranks' blocks together. Raises `MachineError` if the
    ranks do not fit.
    """
    return simulate_sizes(schedule, [nbytes], machine)[0]


def simulate_sizes(schedule: Schedule, sizes: Sequence[int], machine: Machine) -> list[Prediction]:
    """`simulate` for several numbers of bytes in little more time than for one: each round is made once."""
    network = Network(machine, schedule.nranks)
    chunk = _chunk_bytes(schedule, np.asarray(sizes, np.float64))[:, None]
    clocks = np.tile(machine.start * network.slowness, (len(sizes), 1))
    tally = _Tally(network)
    step: _Step | None = None
    first = 0
    for length in run_lengths(schedule):
        messages = schedule.make_round(first).messages()
        if step is None or not _equal(messages, step.messages):
            step = _Step(network, messages, chunk)
        clocks = _run(step, clocks, length)
        tally.add(step, length)
        first += length
    return [tally.prediction(schedule, n, clocks[i], float(chunk[i, 0])) for i, n in enumerate(sizes)]


def _chunk_bytes(schedule: Schedule, sizes: FloatArray) -> FloatArray:
    """The bytes of a chunk."""
    if schedule.collective == "barrier":
        return np.zeros_like(sizes)
    if schedule.collective == "alltoall":
        return sizes / schedule.nranks
    return sizes / schedule.nchunks


class _Step:
    """One round, ready to move clocks; ``chunk``: bytes of a chunk, ``[sizes, 1]``."""

    def __init__(self, network: Network, messages: Messages, chunk: FloatArray) -> None:
        machine, slowness, nranks = network.machine, network.slowness, network.nranks
        self.messages = messages
        self.costs: Costs = network.costs(messages)
        sends, receives = (np.bincount(end, minlength=nranks) for end in (messages.src, messages.dst))
        ends = (slowness * sends)[messages.src] + (slowness * receives)[messages.dst]
        self.fixed = self.costs.latency + machine.overhead * ends
        # Per byte of a chunk; for all sizes alike, or, with curves, [sizes, ...].
        self.chunk = chunk
        self.seconds = self.costs.seconds_per_byte * _factors(machine, self.costs.level, messages, chunk)
        self.reduce_seconds = slowness * _reduced(machine, messages, chunk, nranks) / machine.reduce_bandwidth
        self.taking_part = (sends + receives) > 0
        self.by_end = [_Groups(end) for end in (messages.src, messages.dst)]

    def move(self, clocks: FloatArray) -> FloatArray:
        """The clocks, ``[sizes, ranks]``, after the round."""
        begin = np.maximum(clocks[:, self.messages.src], clocks[:, self.messages.dst])
        end = begin + self.fixed + self.chunk * self.seconds
        after: FloatArray = clocks.copy()
        for groups in self.by_end:
            after[:, groups.ranks] = np.maximum(after[:, groups.ranks], groups.latest(end))
        after += self.chunk * self.reduce_seconds
        return after


def _factors(machine: Machine, level: IntArray, messages: Messages, chunk: FloatArray) -> FloatArray | float:
    """How many times as long the bytes of messages take as bandwidths alone say: 1, or ``[sizes, m]``."""
    if not any(at.curve for at in machine.levels):
        return 1.0
    factors = np.ones((len(chunk), len(level)))
    for i, at in enumerate(machine.levels):
        own = level == i
        factors[:, own] = at.curve(chunk * messages.nchunks[own])
    return factors


def _reduced(machine: Machine, messages: Messages, chunk: FloatArray, nranks: int) -> FloatArray:
    """The chunks that each rank reduces, times the curve's factors: ``[ranks]``, or ``[sizes, ranks]``."""
    nchunks = messages.nchunks * messages.reduce
    if not machine.reduce_curve:
        return np.bincount(messages.dst, nchunks, nranks).astype(np.float64)
    weighed = nchunks * machine.reduce_curve(chunk * messages.nchunks)
    return np.array([np.bincount(messages.dst, own, nranks) for own in weighed])


class _Groups:
    """The messages of each rank at one end."""

    def __init__(self, end: IntArray) -> None:
        self.order = np.argsort(end, kind="stable")
        self.ranks, self.starts = np.unique(end[self.order], return_index=True)
        if len(self.ranks) == len(end):  # one message each: no need to sort
            self.ranks = end

    def latest(self, ends: FloatArray) -> FloatArray:
        """The latest of each rank's, ``[sizes, ranks]``."""
        if len(self.ranks) == ends.shape[1]:
            return ends
        latest: FloatArray = np.maximum.reduceat(ends[:, self.order], self.starts, axis=1)
        return latest


def _run(step: _Step, clocks: FloatArray, length: int) -> FloatArray:
    """The clocks after ``length`` equal rounds."""
    for left in reversed(range(length)):
        after = step.move(clocks)
        if left:
            moved = (after - clocks)[:, step.taking_part]
            least, most = moved.min(axis=1), moved.max(axis=1)
            if (most - least <= SAME * most).all():
                return after + np.outer(left * most, step.taking_part)
        clocks = after
    return clocks


def _equal(a: Messages, b: Messages) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class _Tally:
    """What was sent, summed up over rounds; in chunks."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.messages = 0
        self.level_chunks = np.zeros(len(network.machine.levels))
        self.link_seconds = np.zeros(len(network.link_seconds))

    def add(self, step: _Step, length: int) -> None:
        sent = step.messages
        self.messages += length * len(sent.src)
        self.level_chunks += length * np.bincount(step.costs.level, sent.nchunks, len(self.level_chunks))
        self.link_seconds += length * step.costs.link_seconds

    def prediction(self, schedule: Schedule, nbytes: int, clocks: FloatArray, chunk: float) -> Prediction:
        names = [level.name for level in self.network.machine.levels]
        busiest = int(self.link_seconds.argmax())
        busy = float(self.link_seconds[busiest]) * chunk
        return Prediction(
            schedule.name,
            schedule.collective,
            schedule.nranks,
            nbytes,
            float(clocks.max()),
            clocks,
            self.messages,
            dict(zip(names, (self.level_chunks * chunk).tolist(), strict=True)),
            self.network.link_name(busiest) if busy else "",
            busy,
        )
