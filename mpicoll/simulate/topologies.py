"""What joins the parts of one level: a switch, a torus, a dragonfly; and which of its links a message takes.

Vocabulary
----------
part   what a level joins, such as the ranks of a node or the nodes of a network; numbered from 0.
link   one direction of a cable inside a topology, numbered from 0. The parts' own links, from each of them
       into the topology and back, belong to the level (see ``machine``).
hop    a link that each of some messages takes: ``(messages, links)``, two int64 columns. A path is a list of
       hops in which a message is at most once in each hop.

Routes are the shortest of fixed rules: dimension by dimension in a torus, the shorter way around (the way up
if both are equally long); in a dragonfly at most one link within the group, one to the other group and one
within that.

Sources: W. J. Dally, C. L. Seitz, "Deadlock-free message routing in multiprocessor interconnection networks",
IEEE Trans. Comput. C-36 (1987); J. Kim, W. J. Dally, S. Scott, D. Abts, "Technology-driven, highly-scalable
dragonfly topology", ISCA 2008.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mpicoll.schedule import IntArray

FloatArray = npt.NDArray[np.float64]
Hop = tuple[IntArray, IntArray]


class Topology(Protocol):
    """What a level needs to know of what joins its ``size`` parts."""

    @property
    def size(self) -> int: ...

    @property
    def nlinks(self) -> int: ...

    @property
    def link_seconds(self) -> FloatArray:
        """Seconds per byte of each link."""

    @property
    def hop_latency(self) -> float:
        """Seconds for each link that a message takes."""

    def hops(self, src: IntArray, dst: IntArray) -> Iterator[Hop]:
        """The path of each message from part ``src`` to part ``dst``, which are others."""

    def link_name(self, link: int) -> str: ...


@dataclass(frozen=True)
class Switch:
    """Joins ``size`` parts without links of its own: a crossbar, a bus, a fat tree's core."""

    size: int
    hop_latency: float = 0.0
    nlinks: int = field(default=0, init=False)

    @cached_property
    def link_seconds(self) -> FloatArray:
        """None."""
        return np.zeros(0)

    def hops(self, src: IntArray, dst: IntArray) -> Iterator[Hop]:
        """None: a switch is its parts' links."""
        return iter(())

    def link_name(self, link: int) -> str:
        """There are no links."""
        raise IndexError(f"link: expected none in a switch, got {link}")


@dataclass(frozen=True)
class Torus:
    """A grid with ``dims[d]`` parts in dimension d, the last one counting fastest, and its ends joined.

    ``bandwidth``: of each link, bytes per second; ``hop_latency``: seconds.
    """

    dims: tuple[int, ...]
    bandwidth: float
    hop_latency: float

    @property
    def size(self) -> int:
        return prod(self.dims)

    @property
    def nlinks(self) -> int:
        return len(self.dims) * self.size * 2

    @cached_property
    def link_seconds(self) -> FloatArray:
        """Two links for each part and dimension: link (d * size + part) * 2 goes up, the next one down."""
        return np.full(self.nlinks, 1 / self.bandwidth)

    def hops(self, src: IntArray, dst: IntArray) -> Iterator[Hop]:
        """One step of all messages that have not arrived in the dimension at hand."""
        here = src.copy()
        for d, length in enumerate(self.dims):
            stride = prod(self.dims[d + 1 :])
            ahead = (dst // stride - here // stride) % length
            down = 2 * ahead > length
            moving = np.flatnonzero(ahead)
            left = np.where(down, length - ahead, ahead)[moving]
            step = np.where(down, -1, 1)[moving]
            for nth in range(int(left.max(initial=0))):
                still = left > nth
                moving, left, step = moving[still], left[still], step[still]
                at = here[moving]
                yield moving, (d * self.size + at) * 2 + (step < 0)
                place = at // stride % length
                here[moving] = at + ((place + step) % length - place) * stride

    def link_name(self, link: int) -> str:
        """Such as ``from (0, 3, 1) up in dimension 2``."""
        rest, down = divmod(link, 2)
        d, part = divmod(rest, self.size)
        place = tuple(int(n) for n in np.unravel_index(part, self.dims))
        return f"from {place} {'down' if down else 'up'} in dimension {d}"


@dataclass(frozen=True)
class Dragonfly:
    """``groups`` of ``routers`` routers with ``ends`` parts each; parts are numbered router by router.

    All routers of a group have links to each other (``local_bandwidth``), and all groups
    (``global_bandwidth``): the links from a group are divided among its routers in order. Bytes per second;
    ``hop_latency``: seconds.
    """

    groups: int
    routers: int
    ends: int
    local_bandwidth: float
    global_bandwidth: float
    hop_latency: float

    @property
    def size(self) -> int:
        return self.groups * self.routers * self.ends

    @property
    def nlinks(self) -> int:
        return self.groups * self.routers**2 + self.groups**2

    @cached_property
    def link_seconds(self) -> FloatArray:
        """Link ``router * routers + b`` goes to router b of the group; then those from group to group."""
        local = np.full(self.groups * self.routers**2, 1 / self.local_bandwidth)
        return np.append(local, np.full(self.groups**2, 1 / self.global_bandwidth))

    def hops(self, src: IntArray, dst: IntArray) -> Iterator[Hop]:
        """To the router that has the link to the other group, over that link, to the router of ``dst``."""
        router, end = src // self.ends, dst // self.ends
        group, end_group = router // self.routers, end // self.routers
        across = group != end_group
        leave = np.where(across, self._gateway(group, end_group), end)
        enter = np.where(across, self._gateway(end_group, group), end)
        yield self._local(router, leave)
        crossing = np.flatnonzero(across)
        nlocal = self.groups * self.routers**2
        yield crossing, nlocal + (group * self.groups + end_group)[crossing]
        yield self._local(enter, end)

    def _gateway(self, group: IntArray, other: IntArray) -> IntArray:
        """The router of ``group`` that has the link to the ``other`` group."""
        nth = (other - group) % self.groups - 1
        return group * self.routers + nth * self.routers // max(1, self.groups - 1)

    def _local(self, router: IntArray, other: IntArray) -> Hop:
        moving = np.flatnonzero(router != other)
        return moving, router[moving] * self.routers + other[moving] % self.routers

    def link_name(self, link: int) -> str:
        """Such as ``from group 0 to group 3``."""
        nlocal = self.groups * self.routers**2
        if link >= nlocal:
            group, other = divmod(link - nlocal, self.groups)
            return f"from group {group} to group {other}"
        router, other = divmod(link, self.routers)
        group, own = divmod(router, self.routers)
        return f"from router {own} to router {other} of group {group}"
