"""Tables of tuning: what ``mpicoll tune`` has found, in a file that people can read and hand on.

Vocabulary
----------
place   what times depend on: the machine, the MPI library, how many ranks there are, how many of them on a
        node, whether a network joins them, and whether more ranks than cores share a node.
rule    for one collective and a range of sizes: what is faster there than the static choice of
        ``mpicoll.tuning``, which it names. Where that is another one, the rule says nothing.
entry   the rules of one place, and when they were measured.

A file:

    {
      "format": "mpicoll tuning",
      "version": 1,
      "entries": [
        {
          "machine": "64 × AMD EPYC 9334", "mpi": "Open MPI v5.0.8 [1f0c...]", "ranks": 8,
          "ranks_per_node": 8, "network": false, "crowded": false, "measured": "2026-03-01",
          "rules": [
            {"collective": "allreduce", "begin": 32768, "end": 131072, "instead_of": "rabenseifner",
             "algorithm": "two_shot", "segment": null, "gain": 0.21}
          ]
        }
      ]
    }

Bytes are counted as in ``tuning.choose``: the whole vector, or all ranks' blocks together; ``end`` is not in
the range. ``segment``: bytes of the segments of messages, null where they stay as they are. ``gain``: by how
much less time it took, as a fraction.

The file is ``tuning.json`` in the user's cache directory, or what ``MPICOLL_TUNING`` names; ``off`` stands
for none. Machines that look alike share an entry, so a file serves all nodes of a cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from mpicoll import algorithms
from mpicoll.files import replacing

FORMAT, VERSION = "mpicoll tuning", 1
VARIABLE = "MPICOLL_TUNING"
OFF = "off"


class TableError(ValueError):
    """A file that is no table, or one of another version; names the file."""


@dataclass(frozen=True)
class Place:
    """See the module. ``ranks_per_node`` is that of the node of rank 0."""

    machine: str
    mpi: str
    ranks: int
    ranks_per_node: int
    network: bool
    crowded: bool


@dataclass(frozen=True)
class Rule:
    """See the module."""

    collective: str
    begin: int
    end: int
    instead_of: str
    algorithm: str
    segment: int | None = None
    gain: float = 0.0


@dataclass(frozen=True)
class Entry:
    """See the module; ``measured`` is a date."""

    place: Place
    measured: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Choices:
    """The rules that hold for one communicator; ``origin`` says in words where they are from."""

    rules: tuple[Rule, ...] = ()
    origin: str = "none"

    def rule(self, collective: str, nbytes: int, default: str) -> Rule | None:
        """The rule for so many bytes, for which the static choice is ``default``."""
        for rule in self.rules:
            same = rule.collective == collective and rule.instead_of == default
            if same and rule.begin <= nbytes < rule.end:
                return rule
        return None


NO_CHOICES = Choices()


def file_of(environ: Mapping[str, str]) -> Path | None:
    """The file that is read and written; None where tables are off."""
    named = environ.get(VARIABLE, "")
    if named == OFF:
        return None
    return Path(named) if named else Path(platformdirs.user_cache_dir("mpicoll")) / "tuning.json"


def mpi_build(version: str) -> str:
    """The MPI library in a line, from all that it says of itself: two builds of one version differ."""
    text = version.strip("\0").strip()
    build = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{' '.join(text.splitlines()[0].split())} [{build}]"


@cache
def machine_name() -> str:
    """The processors of this machine: nodes of a cluster that have the same are the same to a table."""
    from mpicoll.info import cpu_model  # with all that bug reports need, which few programs do

    return f"{os.cpu_count()} × {cpu_model()}"


def choices_for(
    version: str, ranks: int, ranks_per_node: int, network: bool, crowded: bool, environ: Mapping[str, str]
) -> tuple[Choices, str]:
    """What the table says for such a communicator; and what is wrong with the table, empty if nothing is.

    ``version`` is what the MPI library says of itself.
    """
    path = file_of(environ)
    if path is None:
        return Choices(origin=f"none: {VARIABLE} is {OFF}"), ""
    if not path.exists() and not environ.get(VARIABLE):
        return Choices(origin=f"none: there is no {path}; `mpicoll tune` makes it"), ""
    try:
        entries = read(path)
    except (TableError, OSError) as error:
        problem = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")
        return Choices(origin=f"none: {path}: {problem}"), f"{path}: not used for tuning: {problem}"
    place = Place(machine_name(), mpi_build(version), ranks, ranks_per_node, network, crowded)
    for entry in entries:
        if entry.place == place:
            origin = f"{path}: {len(entry.rules)} rules, measured {entry.measured}"
            return Choices(entry.rules, origin), ""
    on = f"{ranks} ranks, {ranks_per_node} on a node, with this machine and MPI library"
    return Choices(origin=f"none: {path} has nothing for {on}"), ""


def read(path: Path) -> list[Entry]:
    """The entries of a file. Raises `TableError`, or OSError if it cannot be read."""
    try:
        table = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise TableError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise TableError(f'{path}: expected "format": "{FORMAT}", got another file')
    if table.get("version") != VERSION:
        raise TableError(f"{path}: expected version {VERSION}, got {table.get('version')!r}")
    entries = table.get("entries")
    if not isinstance(entries, list):
        raise TableError(f"{path}: entries: expected a list, got {entries!r}")
    return [_entry(f"{path}: entries[{i}]", given) for i, given in enumerate(entries)]


def write(path: Path, entry: Entry) -> None:
    """Put ``entry`` into the file, in place of the one for its place; all others stay.

    Raises `TableError` if there is a file that is no table, OSError if it cannot be written.
    """
    kept = [old for old in read(path) if old.place != entry.place] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(_text([*kept, entry]), "utf-8")


def _text(entries: Sequence[Entry]) -> str:
    """JSON with a rule in each line."""
    texts = []
    for entry in entries:
        fields = {**asdict(entry.place), "measured": entry.measured}
        lines = [f"      {_quoted(name)}: {_quoted(value)}," for name, value in fields.items()]
        rules = ",\n".join(f"        {_quoted(asdict(rule))}" for rule in entry.rules)
        listed = f"[\n{rules}\n      ]" if rules else "[]"
        texts.append("\n".join(["    {", *lines, f'      "rules": {listed}', "    }"]))
    head = f'  "format": {_quoted(FORMAT)},\n  "version": {VERSION},\n'
    return f'{{\n{head}  "entries": [\n{",".join(texts)}\n  ]\n}}\n'


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_PLACE = {"machine": str, "mpi": str, "ranks": int, "ranks_per_node": int, "network": bool, "crowded": bool}
_RULE = {"collective": str, "begin": int, "end": int, "instead_of": str, "algorithm": str}


def _entry(where: str, given: Any) -> Entry:
    fields = _Fields(where, given)
    place = Place(**{name: fields.take(name, kind) for name, kind in _PLACE.items()})
    rules = fields.take("rules", list)
    measured = fields.take("measured", str)
    return Entry(place, measured, tuple(_rule(f"{where}.rules[{i}]", rule) for i, rule in enumerate(rules)))


def _rule(where: str, given: Any) -> Rule:
    fields = _Fields(where, given)
    rule = Rule(
        **{name: fields.take(name, kind) for name, kind in _RULE.items()},
        segment=None if fields.given.get("segment") is None else fields.take("segment", int),
        gain=float(fields.take("gain", (int, float))),
    )
    if rule.collective not in algorithms.ALGORITHMS:
        raise TableError(f"{where}.collective: expected a collective, got {rule.collective!r}")
    allowed = known_algorithms(rule.collective)
    if rule.algorithm not in allowed:
        raise TableError(f"{where}.algorithm: expected one of {', '.join(allowed)}; got {rule.algorithm!r}")
    if rule.segment is not None and rule.segment < 1:
        raise TableError(f"{where}.segment: expected bytes, 1 or more, got {rule.segment}")
    return rule


def known_algorithms(collective: str) -> tuple[str, ...]:
    """What a rule may name."""
    several_nodes = ("hierarchical",) if collective in algorithms.HIERARCHICAL else ()
    return (*algorithms.names(collective), *several_nodes)


class _Fields:
    """The fields of an object in a file."""

    def __init__(self, where: str, given: Any) -> None:
        if not isinstance(given, dict):
            raise TableError(f"{where}: expected an object, got {given!r}")
        self.where, self.given = where, given

    def take(self, name: str, kind: type | tuple[type, ...]) -> Any:
        value = self.given.get(name)
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits:
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join(each.__name__ for each in kinds)
            raise TableError(f"{self.where}.{name}: expected {expected}, got {value!r}")
        return value
