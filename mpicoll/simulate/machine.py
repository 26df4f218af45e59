"""Machine: what a simulation knows of a machine, read from a TOML file.

Vocabulary
----------
level   what joins ranks, or the groups of the level before, into larger groups: socket, node, rack, network,
        from the inside out. The outermost level is one group. Its **parts** are what it joins.
path    a message from one rank to another goes up to the first level that both are in, through the links of
        the parts on its way: the rank's into its node, the node's into its rack, and so on; and down the same
        way.
lane    each of several links that a part has side by side, such as a node's network cards. The ranks of the
        part are divided among them in order, so eight ranks with eight cards have one each.

A file, with seconds and bytes per second:

    name = "two nodes"
    about = "an example"

    [rank]
    start = 1e-6                 # optional: seconds of a rank before its first message
    overhead = 0.5e-6            # seconds of a rank for each message that it sends or receives
    reduce_bandwidth = 20e9      # bytes per second that a rank reduces
    reduce_curve = [[4e6, 1.0], [64e6, 2.0]]   # optional: see curve, for what is reduced of a message

    [[levels]]
    name = "node"
    size = [8, 6]                # parts, here ranks; of each group where they differ, in the first level only
    latency = 1e-6               # seconds, of a message within this level
    bandwidth = 10e9             # of each part's link, each way
    total_bandwidth = 30e9       # optional: of all messages within one group together, such as a memory's
    curve = [[1e3, 1.0], [8e3, 4.0]]   # optional: the bytes of a message of 8 kB take four times as long as
                                 # bandwidths say, of 1 kB and less once, between them as a line in logarithms

    [[levels]]
    name = "network"
    size = 2
    latency = 10e-6
    bandwidth = 1.6e9
    lanes = 2                    # optional: links of each part

    [[stragglers]]               # optional: a rank whose start, overhead, reductions and link take longer
    rank = 3
    factor = 2.0

A level with ``topology = "torus"`` has ``dims``, ``link_bandwidth`` and ``hop_latency``, one with
``"dragonfly"`` ``groups``, ``routers``, ``ends``, ``local_bandwidth``, ``global_bandwidth`` and
``hop_latency`` instead of ``size``; see ``topologies``. A fat tree's oversubscription is a ``bandwidth`` of
racks below that of all their nodes. ``inf`` is a bandwidth, too: what costs nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from itertools import pairwise
from math import inf, isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np

from mpicoll.simulate.topologies import Dragonfly, FloatArray, Switch, Topology, Torus

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same library under its older name
    import tomli as tomllib

DEFAULT = "dgx-h100"

# More are typing errors, which would end in a lack of memory.
MOST_PARTS = 1_000_000_000  # of a level
MOST_LINKS = 100_000_000  # inside a topology, of which each takes some 8 bytes, several times
MOST_LANES = 1024  # of a part


class MachineError(ValueError):
    """A machine file that is wrong, or ranks that do not fit: names the file and the field."""


@dataclass(frozen=True)
class Curve:
    """Factors for sizes, see the module; without points it is 1 everywhere. ``points``: bytes, factor."""

    points: tuple[tuple[float, float], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.points)

    def __call__(self, nbytes: FloatArray) -> FloatArray | float:
        """The factors of messages of ``nbytes`` bytes each, of any shape."""
        if not self.points:
            return 1.0
        sizes, factors = np.log(np.array(self.points).T)
        return np.asarray(np.exp(np.interp(np.log(np.maximum(nbytes, 1e-3)), sizes, factors)))


NO_CURVE = Curve()


@dataclass(frozen=True)
class Level:
    """One level, see the module; ``sizes``: the ranks of each group, where those differ."""

    name: str
    topology: Topology
    latency: float
    bandwidth: float
    lanes: int = 1
    total_bandwidth: float = inf
    sizes: tuple[int, ...] | None = None
    curve: Curve = NO_CURVE


@dataclass(frozen=True)
class Machine:
    """A machine; ``levels`` from the inside out. ``stragglers``: how many times as long a rank takes."""

    name: str
    levels: tuple[Level, ...]
    overhead: float = 0.0
    reduce_bandwidth: float = inf
    stragglers: Mapping[int, float] = field(default_factory=dict)
    about: str = ""
    reduce_curve: Curve = NO_CURVE
    start: float = 0.0

    @property
    def capacity(self) -> int:
        """The ranks that there is room for."""
        sizes = self.levels[0].sizes
        return prod(level.topology.size for level in self.levels) if sizes is None else sum(sizes)

    def check_fits(self, nranks: int) -> None:
        """Raise `MachineError` if there is no room for so many ranks."""
        if not 1 <= nranks <= self.capacity:
            room = " x ".join(f"{level.topology.size} in a {level.name}" for level in self.levels)
            if self.levels[0].sizes is not None:
                room = " + ".join(map(str, self.levels[0].sizes))
            expected = f"1 to {self.capacity}, for which {self.name} has room ({room})"
            raise MachineError(f"ranks: expected {expected}, got {nranks}")

    def node_sizes(self, nranks: int) -> list[int]:
        """The ranks of each node: the level of that name, or else the first. `MachineError` as above."""
        self.check_fits(nranks)
        depth = next((i for i, level in enumerate(self.levels) if level.name == "node"), 0)
        if depth == 0 and self.levels[0].sizes is not None:
            most = list(self.levels[0].sizes)
        else:
            most = [prod(level.topology.size for level in self.levels[: depth + 1])] * nranks
        sizes: list[int] = []
        left = nranks
        while left > 0:
            sizes.append(min(left, most[len(sizes)]))
            left -= sizes[-1]
        return sizes

    @classmethod
    def load(cls, name_or_path: str | Path) -> Machine:
        """A machine that comes with mpicoll, see `names`, or one in a file. Raises `MachineError`."""
        if name_or_path in cls.names():
            text = _shipped().joinpath(f"{name_or_path}.toml").read_text("utf-8")
            return cls.loads(text, f"{name_or_path}.toml")
        path = Path(name_or_path)
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            expected = f"a TOML file or one of {', '.join(cls.names())}"
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise MachineError(f"machine: expected {expected}; got {str(name_or_path)!r}: {reason}") from None
        return cls.loads(text, str(path))

    @classmethod
    def loads(cls, text: str, file: str) -> Machine:
        """A machine from the text of a file; ``file`` is what errors call it."""
        try:
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # syntax, a number too long, brackets too deep
            raise MachineError(f"{file}: expected TOML, got a syntax error: {error}") from None
        return _machine(_Fields(file, "", table))

    @staticmethod
    def names() -> tuple[str, ...]:
        """The machines that come with mpicoll."""
        files = (entry.name for entry in _shipped().iterdir())
        return tuple(sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml")))


def _shipped() -> Any:
    return resources.files("mpicoll.simulate").joinpath("machines")


class _Fields:
    """The fields of one table of a file; each is taken once, and none may be left."""

    def __init__(self, file: str, where: str, table: Any) -> None:
        self.file, self.where = file, where
        if not isinstance(table, dict):
            raise MachineError(f"{file}: {where}: expected a table, got {table!r}")
        self.left = dict(table)

    def error(self, name: str, expected: str, got: str) -> MachineError:
        place = f"{self.where}.{name}" if self.where else name
        return MachineError(f"{self.file}: {place}: expected {expected}, got {got}")

    def take(self, name: str, expected: str) -> Any:
        if name not in self.left:
            raise self.error(name, expected, "nothing")
        return self.left.pop(name)

    def text(self, name: str) -> str:
        value = self.take(name, "a text")
        if not isinstance(value, str) or not value:
            raise self.error(name, "a text", repr(value))
        return value

    def number(self, name: str, expected: str, least: float, default: float | None = None) -> float:
        """A number above ``least``, or equal to it if that is 0 seconds."""
        if name not in self.left and default is not None:
            return default
        value = self.take(name, expected)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
            raise self.error(name, expected, repr(value))
        try:
            return float(value)
        except OverflowError:
            raise self.error(name, expected, repr(value)) from None

    def seconds(self, name: str, default: float | None = None) -> float:
        value = self.number(name, "seconds, 0 or more", 0, default)
        if not isfinite(value):
            raise self.error(name, "seconds, 0 or more", repr(value))
        return value

    def bandwidth(self, name: str, default: float | None = None) -> float:
        return self.number(name, "bytes per second, 1 or more", 1, default)

    def count(self, name: str, default: int | None = None, most: int = MOST_PARTS) -> int:
        if name not in self.left and default is not None:
            return default
        value = self.take(name, "a whole number, 1 or more")
        if type(value) is not int or value < 1:
            raise self.error(name, "a whole number, 1 or more", repr(value))
        if value > most:
            raise self.error(name, f"at most {most}", repr(value))
        return value

    def counts(self, name: str) -> tuple[int, ...]:
        value = self.take(name, "a list of whole numbers, 1 or more")
        if not isinstance(value, list) or not value or any(type(n) is not int or n < 1 for n in value):
            raise self.error(name, "a list of whole numbers, 1 or more", repr(value))
        if max(value) > MOST_PARTS:
            raise self.error(name, f"at most {MOST_PARTS}", repr(max(value)))
        return tuple(value)

    def curve(self, name: str) -> Curve:
        if name not in self.left:
            return NO_CURVE
        expected = "pairs of bytes, ascending, and a factor, both above 0"
        value = self.take(name, expected)
        pairs = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
        numbers = [number for pair in value for number in pair] if pairs else []
        if not numbers or not all(type(n) in (int, float) and 0 < n < inf for n in numbers):
            raise self.error(name, expected, repr(value))
        if not all(a < b for a, b in pairwise(numbers[::2])):
            raise self.error(name, expected, repr(value))
        return Curve(tuple((float(size), float(factor)) for size, factor in value))

    def table(self, name: str) -> _Fields:
        return _Fields(self.file, name, self.take(name, "a table"))

    def tables(self, name: str, default: list[Any] | None = None) -> list[_Fields]:
        if name not in self.left and default is not None:
            return []
        value = self.take(name, f"tables [[{name}]]")
        if not isinstance(value, list) or not value:
            raise self.error(name, f"tables [[{name}]]", repr(value))
        return [_Fields(self.file, f"{name}[{i}]", table) for i, table in enumerate(value)]

    def done(self) -> None:
        for name, value in self.left.items():
            raise self.error(name, "no such field", repr(value))


def _machine(fields: _Fields) -> Machine:
    name, about = fields.text("name"), fields.text("about")
    rank = fields.table("rank")
    overhead, reduce_bandwidth = rank.seconds("overhead"), rank.bandwidth("reduce_bandwidth")
    reduce_curve, start = rank.curve("reduce_curve"), rank.seconds("start", 0.0)
    rank.done()
    tables = fields.tables("levels")
    levels = tuple(_level(table, depth) for depth, table in enumerate(tables))
    _check_names(tables, levels)
    _check_groups(tables[0], levels)
    stragglers = _stragglers(fields.tables("stragglers", default=[]))
    fields.done()
    machine = Machine(name, levels, overhead, reduce_bandwidth, stragglers, about, reduce_curve, start)
    for straggler in stragglers:
        if straggler >= machine.capacity:
            raise fields.error("stragglers", f"ranks below {machine.capacity}", str(straggler))
    return machine


def _level(fields: _Fields, depth: int) -> Level:
    name, latency, bandwidth = fields.text("name"), fields.seconds("latency"), fields.bandwidth("bandwidth")
    lanes, total = fields.count("lanes", 1, MOST_LANES), fields.bandwidth("total_bandwidth", inf)
    curve = fields.curve("curve")
    kind = fields.text("topology") if "topology" in fields.left else "switch"
    sizes: tuple[int, ...] | None = None
    topology: Topology
    if kind == "torus":
        topology = Torus(
            fields.counts("dims"), fields.bandwidth("link_bandwidth"), fields.seconds("hop_latency")
        )
    elif kind == "dragonfly":
        topology = Dragonfly(
            groups=fields.count("groups"),
            routers=fields.count("routers"),
            ends=fields.count("ends"),
            local_bandwidth=fields.bandwidth("local_bandwidth"),
            global_bandwidth=fields.bandwidth("global_bandwidth"),
            hop_latency=fields.seconds("hop_latency"),
        )
    elif kind == "switch" and depth == 0 and isinstance(fields.left.get("size"), list):
        sizes = fields.counts("size")
        topology = Switch(max(sizes))
    elif kind == "switch":
        topology = Switch(fields.count("size"))
    else:
        raise fields.error("topology", '"switch", "torus" or "dragonfly"', repr(kind))
    fields.done()
    if topology.nlinks > MOST_LINKS:
        raise fields.error("topology", f"a {kind} of at most {MOST_LINKS:,} links", f"{topology.nlinks:,}")
    return Level(name, topology, latency, bandwidth, lanes, total, sizes, curve)


def _check_names(tables: list[_Fields], levels: tuple[Level, ...]) -> None:
    """Whether each level has a name of its own: bytes are counted by it."""
    names = [level.name for level in levels]
    for i, (table, name) in enumerate(zip(tables, names, strict=True)):
        if name in names[:i]:
            raise table.error("name", "a name that no level before has", repr(name))


def _check_groups(first: _Fields, levels: tuple[Level, ...]) -> None:
    """Whether the groups that the first level lists fit into the levels above."""
    room = prod(level.topology.size for level in levels[1:])
    sizes = levels[0].sizes
    if sizes is not None and len(sizes) > room:
        raise first.error(
            "size", f"at most {room} groups, for which the levels above have room", str(len(sizes))
        )


def _stragglers(tables: list[_Fields]) -> dict[int, float]:
    found: dict[int, float] = {}
    for table in tables:
        rank, factor = _straggler(table)
        if rank in found:
            raise table.error("rank", "a rank that no straggler before has", str(rank))
        found[rank] = factor
    return found


def _straggler(fields: _Fields) -> tuple[int, float]:
    expected = "a rank, 0 or more"
    rank = fields.take("rank", expected)
    if type(rank) is not int or rank < 0:
        raise fields.error("rank", expected, repr(rank))
    factor = fields.number("factor", "a number, 1 or more", 1)
    if not isfinite(factor):
        raise fields.error("factor", "a number, 1 or more", repr(factor))
    fields.done()
    return rank, factor
