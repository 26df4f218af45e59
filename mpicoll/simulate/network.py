"""Which links the messages of a round take, and how much of each link each of them gets.

The links of a machine with some number of ranks, in one numbering, level by level:

    ports    link ((part * lanes + lane) * 2), from a part into its level, and the next one, back from there
    totals   one for each group, where a level has a total bandwidth: all messages within the group take it
    inner    those of each group's topology

Messages of one round share links. With b bytes of its own, on a link that takes β seconds a byte and carries
``flows`` messages with ``load`` bytes together in this round, a message takes β min(flows b, load) seconds:
the link's share for b bytes while all others still send, but never longer than all of it takes. That is exact
for messages of one size, and for the shortest and the longest of a link. The slowest link of its path counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import numpy as np

from mpicoll.schedule import IntArray, Messages
from mpicoll.simulate.machine import Machine
from mpicoll.simulate.topologies import FloatArray, Hop


@dataclass(frozen=True, eq=False)
class Costs:
    """What the messages of one round cost; sizes in chunks, so that they hold for any number of bytes.

    ``latency``, ``seconds_per_byte``, ``level``: ``[m]``, a message of all its chunks takes latency +
    (bytes of a chunk) * seconds_per_byte. ``link_seconds``: ``[nlinks]``, for how many seconds per byte of a
    chunk each link is busy.
    """

    latency: FloatArray
    seconds_per_byte: FloatArray
    level: IntArray
    link_seconds: FloatArray


class Network:
    """A machine as ``nranks`` ranks fill it, the first groups first; `MachineError` if they do not fit."""

    def __init__(self, machine: Machine, nranks: int) -> None:
        machine.check_fits(nranks)
        self.machine, self.nranks = machine, nranks
        self.slowness = np.ones(nranks)
        for rank, factor in machine.stragglers.items():
            if rank < nranks:
                self.slowness[rank] = factor
        self.parts = _parts(machine, nranks)  # parts[i][rank]: its part in level i; of the last, its group
        self.lanes = [self._lanes(i) for i in range(len(machine.levels))]
        self.starts, self.link_seconds = self._number_links()

    def costs(self, messages: Messages) -> Costs:
        """What it costs to send all ``messages`` at once."""
        level = self._levels(messages)
        latency = np.array([at.latency for at in self.machine.levels])[level]
        seconds = np.zeros(len(level))
        hops = list(self._hops(messages, level, latency))
        flows, loads = np.zeros((2, len(self.link_seconds)))
        for sent, links in hops:
            flows += np.bincount(links, minlength=len(flows))
            loads += np.bincount(links, messages.nchunks[sent], minlength=len(loads))
        for sent, links in hops:
            share = self.link_seconds[links] * np.minimum(flows[links] * messages.nchunks[sent], loads[links])
            seconds[sent] = np.maximum(seconds[sent], share)
        return Costs(latency, seconds, level, loads * self.link_seconds)

    def _levels(self, messages: Messages) -> IntArray:
        """The first level that both ends of each message are in the same group of."""
        level = np.zeros(len(messages.src), np.int64)
        for i in range(1, len(self.machine.levels)):
            level[self.parts[i][messages.src] != self.parts[i][messages.dst]] = i
        return level

    def _hops(self, messages: Messages, level: IntArray, latency: FloatArray) -> Iterator[Hop]:
        """Every link of every message's path; adds what links take to ``latency``."""
        src, dst = messages.src, messages.dst
        for i, at in enumerate(self.machine.levels):
            ports, totals, inner = self.starts[i]
            through = np.flatnonzero(level >= i)
            yield through, ports + (self.parts[i][src] * at.lanes + self.lanes[i][src])[through] * 2
            yield through, ports + (self.parts[i][dst] * at.lanes + self.lanes[i][dst])[through] * 2 + 1
            turning = np.flatnonzero(level == i)
            group = self.parts[i + 1][src[turning]]
            if at.total_bandwidth < inf:
                yield turning, totals + group
            size = at.topology.size
            nlinks = len(at.topology.link_seconds)
            ends = (self.parts[i][end[turning]] - group * size for end in (src, dst)) if nlinks else None
            for sent, links in at.topology.hops(*ends) if ends else ():
                latency[turning[sent]] += at.topology.hop_latency
                yield turning[sent], inner + group[sent] * nlinks + links

    def _lanes(self, i: int) -> IntArray:
        """The lane of each rank on the way from its part of level i: the part's ranks, divided in order."""
        part, lanes = self.parts[i], self.machine.levels[i].lanes
        ranks = np.bincount(part)
        nth = np.arange(self.nranks) - (np.cumsum(ranks) - ranks)[part]
        return nth * lanes // ranks[part]

    def _number_links(self) -> tuple[list[tuple[int, int, int]], FloatArray]:
        """Where ports, totals and inner links of each level begin; the seconds per byte of every link."""
        starts: list[tuple[int, int, int]] = []
        seconds: list[FloatArray] = []
        end = 0
        for i, level in enumerate(self.machine.levels):
            nparts, ngroups = int(self.parts[i].max()) + 1, int(self.parts[i + 1].max()) + 1
            ports = np.full(nparts * level.lanes * 2, 1 / level.bandwidth)
            if i == 0:
                ports *= np.repeat(self.slowness, level.lanes * 2)
            totals = np.full(ngroups, 1 / level.total_bandwidth)
            inner = np.tile(level.topology.link_seconds, ngroups)
            starts.append((end, end + len(ports), end + len(ports) + len(totals)))
            seconds += ports, totals, inner
            end += len(ports) + len(totals) + len(inner)
        return starts, np.concatenate(seconds)

    def link_name(self, link: int) -> str:
        """What a link is called, such as ``node 3 lane 0 out, network``."""
        i = max(i for i, start in enumerate(self.starts) if start[0] <= link)
        level, (ports, totals, inner) = self.machine.levels[i], self.starts[i]
        if link >= inner:
            group, own = divmod(link - inner, len(level.topology.link_seconds))
            return f"{level.name} {group}: {level.topology.link_name(own)}"
        if link >= totals:
            return f"all of {level.name} {link - totals}"
        (part, lane), back = divmod((link - ports) // 2, level.lanes), (link - ports) % 2
        below = self.machine.levels[i - 1].name if i else "rank"
        side = f" lane {lane}" if level.lanes > 1 else ""
        return f"{below} {part}{side} {'in' if back else 'out'}"


def _parts(machine: Machine, nranks: int) -> list[IntArray]:
    """For each level the part that each rank is in; and at the end the outermost group, which all are in."""
    parts = [np.arange(nranks)]
    sizes = machine.levels[0].sizes
    for level in machine.levels:
        if sizes is not None and len(parts) == 1:
            parts.append(np.searchsorted(np.cumsum(sizes), parts[0], side="right"))
        else:
            parts.append(parts[-1] // level.topology.size)
    return parts
