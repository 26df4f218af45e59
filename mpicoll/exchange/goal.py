"""GOAL: the schedules that LogGOPSim, and by way of it other simulators of networks, run.

A file, as it is written (the ring of two ranks, 1 KiB, one rank of two):

    num_ranks 2
    // mpicoll: {"name": "ring", "collective": "allreduce", "nchunks": 2, "root": 0}

    rank 0 {
    l1: send 512b to 1 tag 1
    l2: recv 512b from 1 tag 0
    l3: calc 51
    l3 requires l2
    l4: send 512b to 1 tag 0
    l4 requires l3
    l5: recv 512b from 1 tag 1
    l5 requires l1
    }

What requires nothing starts at once. ``a requires b``: a starts when b has ended; ``a irequires b``: when b
has started, which orders no data, so here only its labels are checked. ``cpu`` and ``nic`` are read over.

What is written: the tag is the chunk, so it comes back. A reduction is a receive, and a calc that requires
it: its time in ns, the simulator's unit, is the bytes times gamma. GOAL has comments but no collectives, so
a comment says what the file is. A chunk of no bytes is sent as 1 byte, as the simulator takes off one from
every size.

What is read: also files by others, if the collective is given; then every tag is a chunk. Where the
collective reduces, a calc that requires a receive is its reduction; any other calc is only time.

Sources: T. Hoefler, C. Siebert, A. Lumsdaine, "Group Operation Assembly Language", ICPP (2009); T. Hoefler,
T. Schneider, A. Lumsdaine, "LogGOPSim", LSAP (2010); the scanner txt2bin of github.com/spcl/LogGOPSim.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from mpicoll.exchange.steps import (
    Action,
    ExchangeError,
    Head,
    Message,
    Step,
    actions,
    check_head,
    in_order,
    to_schedule,
)
from mpicoll.schedule import COLLECTIVES, REDUCE, IntArray, Schedule, chunk_bounds

SIZE = 1 << 20  # bytes
GAMMA = 0.1  # ns a byte, 10 GB/s: what one core of a server reduces of data in memory

_HEAD = re.compile(r"\s*//\s*mpicoll:\s*(.*)")
_LABEL = r"[a-zA-Z][a-zA-Z0-9_]*"
_NUM_RANKS = re.compile(r"num_ranks\s+(\d{1,9})")
_RANK = re.compile(r"rank\s+(\d{1,9})\s*\{")
_OPERATION = re.compile(
    rf"(?:(?P<label>{_LABEL})\s*:\s*)?"
    r"(?:(?P<kind>send|recv)\s+(?P<size>\d{1,18})\s*b\s+(?P<way>to|from)\s+(?P<peer>\d{1,9}|-1)"
    r"(?:\s+tag\s+(?P<tag>\d{1,9}|-1))?|calc\s+\d+)"
    r"(?:\s+cpu\s+\d+)?(?:\s+nic\s+\d+)?"
)
_REQUIRES = re.compile(rf"({_LABEL})\s+(i?)requires\s+({_LABEL})")


def dumps(schedule: Schedule, size: int = SIZE, gamma: float = GAMMA) -> str:
    """``schedule`` in GOAL: ``size`` bytes of data, all chunks together, ``gamma`` ns to reduce a byte."""
    if size < 0:
        raise ValueError(f"size: expected bytes, 0 or more; got {size}")
    if size * schedule.nchunks >= 1 << 63:  # which bounds of chunks are computed from
        most = ((1 << 63) - 1) // schedule.nchunks
        raise ValueError(f"size: expected at most {most} bytes in {schedule.nchunks} chunks, got {size}")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma: expected ns a byte, 0 or more; got {gamma}")
    head = {
        "name": schedule.name,
        "collective": schedule.collective,
        "nchunks": schedule.nchunks,
        "root": schedule.root,
    }
    bounds = chunk_bounds(size, schedule.nchunks, itemsize=1)
    lines = [f"num_ranks {schedule.nranks}", f"// mpicoll: {json.dumps(head)}"]
    for rank, own in enumerate(actions(schedule)):
        lines += ["", f"rank {rank} {{", *_lines(own, bounds, gamma), "}"]
    return "\n".join([*lines, ""])


def _lines(own: Sequence[Action], bounds: IntArray, gamma: float) -> Iterator[str]:
    """The lines of one rank. The label of an action is that of the line that ends it."""
    labels: list[str] = []
    line = 0
    for transfer, sends, after in own:
        line += 1
        nbytes = max(1, int(bounds[transfer.chunk + 1] - bounds[transfer.chunk]))
        what = f"send {nbytes}b to {transfer.dst}" if sends else f"recv {nbytes}b from {transfer.src}"
        yield f"l{line}: {what} tag {transfer.chunk}"
        if not sends and transfer.op == REDUCE:
            line += 1
            yield f"l{line}: calc {round(nbytes * gamma)}"
            yield f"l{line} requires l{line - 1}"
        labels.append(f"l{line}")
        for number in after:
            yield f"l{line} requires {labels[number]}"


@dataclass
class _Operation:
    """A send, recv or calc of a file; ``size`` in bytes. ``after``: numbers of operations of all ranks."""

    name: str
    rank: int
    kind: str
    size: int
    peer: int
    tag: int
    after: list[int] = field(default_factory=list)


def loads(text: str, collective: str | None = None) -> Schedule:
    """The schedule in GOAL; `ExchangeError` names the line that is wrong.

    ``collective``: what a file by others does; one of ours says it, and must say the same.
    """
    nranks, operations = _Reader().read(text)
    tags = [operation.tag for operation in operations if operation.kind != "calc"]
    head = _head(text, nranks, max(tags, default=0) + 1, collective)
    steps = [Step(o.rank, o.name, tuple(o.after)) for o in operations]
    received = _match(operations)
    order = in_order(steps, received)
    reductions = _reductions(operations) if COLLECTIVES[head.collective].reduces else {}
    messages = [
        Message(send, recv, reductions.get(recv, recv), operations[recv].tag, recv in reductions)
        for recv, send in received.items()
    ]
    return to_schedule(head, steps, messages, order)


def _head(text: str, nranks: int, nchunks: int, collective: str | None) -> Head:
    """What the comment says, or what the tags and the caller do."""
    for number, line in enumerate(text.splitlines(), start=1):
        found = _HEAD.match(line)
        if found:
            return _said(found[1], f"line {number}", nranks, collective)
    if collective is None:
        raise ExchangeError(
            "collective: expected the file to say it in a comment, or to be told, as by "
            "mpicoll verify COLLECTIVE --file FILE; got neither"
        )
    own_count = {"alltoall": nranks**2, "barrier": 1}
    fixed = collective in ("reduce_scatter", "allgather", "gather", "scatter")
    head = Head("goal", collective, nranks, nranks if fixed else own_count.get(collective, nchunks), None)
    check_head(head, "num_ranks")
    return head


def _said(text: str, where: str, nranks: int, collective: str | None) -> Head:
    try:
        said = json.loads(text)
        head = Head(str(said["name"]), said["collective"], nranks, said["nchunks"], said["root"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ExchangeError(
            f"{where}: expected name, collective, nchunks and root in JSON; got {text[:60]!r}"
        ) from None
    if not all(type(number) is int for number in (head.nchunks, head.root)):
        raise ExchangeError(f"{where}: expected integers as nchunks and root; got {text[:60]!r}")
    check_head(head, where)
    if collective not in (None, head.collective):
        raise ExchangeError(f"{where}: expected the collective to be {collective}, got {head.collective}")
    return head


class _Reader:
    """Reads a file line by line."""

    def __init__(self) -> None:
        self.nranks: int | None = None
        self.rank: int | None = None
        self.ranks: set[int] = set()
        self.labels: dict[str, int] = {}
        self.operations: list[_Operation] = []

    def read(self, text: str) -> tuple[int, list[_Operation]]:
        """The number of ranks, and all operations."""
        for number, line in enumerate(_without_comments(text), start=1):
            # A brace may stand on the line of an operation.
            for part in re.split(r"(?<=[{}])|(?=\})", line):
                if part.strip():
                    self._read_statement(part.strip(), f"line {number}")
        if self.rank is not None:
            raise ExchangeError(f"rank {self.rank}: expected a closing brace, got the end of the file")
        if self.nranks is None:
            raise ExchangeError("num_ranks: expected a line that says it, got none")
        missing = next((rank for rank in range(self.nranks) if rank not in self.ranks), None)
        if missing is not None:
            raise ExchangeError(
                f"rank {missing}: expected its operations, as num_ranks is {self.nranks}; got none"
            )
        return self.nranks, self.operations

    def _read_statement(self, text: str, where: str) -> None:
        if self.rank is not None:
            self._read_in_rank(text, where, self.rank)
        elif found := _NUM_RANKS.fullmatch(text):
            self.nranks = int(found[1])
        elif (found := _RANK.fullmatch(text)) and self.nranks is not None:
            self.rank = int(found[1])
            self._check_rank(self.rank, "a rank", where)
            if self.rank in self.ranks:
                raise ExchangeError(f"{where}: expected one block of rank {self.rank}, got a second one")
            self.ranks.add(self.rank)
            self.labels = {}
        else:
            allowed = "num_ranks N, and then rank R {"
            raise ExchangeError(f"{where}: expected {allowed}; got {text[:60]!r}")

    def _read_in_rank(self, text: str, where: str, rank: int) -> None:
        if text == "}":
            self.rank = None
        elif found := _REQUIRES.fullmatch(text):
            self._require(found, where)
        elif found := _OPERATION.fullmatch(text):
            self._operate(found, where, rank)
        else:
            allowed = "send Nb to R tag T, recv Nb from R tag T, calc N, A requires B, A irequires B or }"
            raise ExchangeError(f"{where}: expected {allowed}; got {text[:60]!r}")

    def _require(self, found: re.Match[str], where: str) -> None:
        for label in (found[1], found[3]):
            if label not in self.labels:
                raise ExchangeError(f"{where}: expected a label of this rank from a line above, got {label}")
        if not found[2]:
            self.operations[self.labels[found[1]]].after.append(self.labels[found[3]])

    def _operate(self, found: re.Match[str], where: str, rank: int) -> None:
        kind = found["kind"] or "calc"
        if found["label"] is not None:
            if found["label"] in self.labels:
                raise ExchangeError(f"{where}: expected a new label, got {found['label']} again")
            self.labels[found["label"]] = len(self.operations)
        peer, tag, size = (int(found[name] or 0) for name in ("peer", "tag", "size"))
        if -1 in (peer, tag):
            raise ExchangeError(f"{where}: expected one rank and one tag, got -1, which stands for any")
        if kind != "calc":
            self._check_rank(peer, "another rank", where)
            if peer == rank or found["way"] != ("from" if kind == "recv" else "to"):
                raise ExchangeError(
                    f"{where}: expected a send to or a recv from another rank; got {found[0]!r}"
                )
        self.operations.append(_Operation(f"{where} ({kind} of rank {rank})", rank, kind, size, peer, tag))

    def _check_rank(self, rank: int, what: str, where: str) -> None:
        if self.nranks is None or rank >= self.nranks:
            raise ExchangeError(f"{where}: expected {what} below num_ranks, {self.nranks}; got {rank}")


def _without_comments(text: str) -> list[str]:
    """The lines without what is behind // and between /* and */."""
    kept = re.sub(r"//[^\n]*|/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.DOTALL)
    return kept.split("\n")


def _match(operations: Sequence[_Operation]) -> dict[int, int]:
    """The send of every receive: of one pair of ranks and one tag, the k-th of the k-th."""
    sends: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    recvs: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for number, o in enumerate(operations):
        if o.kind == "send":
            sends[o.rank, o.peer, o.tag].append(number)
        elif o.kind == "recv":
            recvs[o.peer, o.rank, o.tag].append(number)
    found: dict[int, int] = {}
    for key in {**sends, **recvs}:
        src, dst, tag = key
        for send, recv in zip_longest(sends[key], recvs[key]):
            if recv is None:
                name = operations[send].name
                raise ExchangeError(f"{name}: expected a recv of it with tag {tag} on rank {dst}, got none")
            if send is None:
                name = operations[recv].name
                raise ExchangeError(f"{name}: expected a send of it with tag {tag} on rank {src}, got none")
            a, b = operations[send], operations[recv]
            if a.size != b.size:
                raise ExchangeError(f"{b.name}: expected {a.size}b, as in {a.name}; got {b.size}b")
            found[recv] = send
    return found


def _reductions(operations: Sequence[_Operation]) -> dict[int, int]:
    """The calc that reduces what a receive has brought, for each receive that has one."""
    found: dict[int, int] = {}
    for number, o in enumerate(operations):
        for earlier in o.after if o.kind == "calc" else ():
            if operations[earlier].kind != "recv":
                continue
            if earlier in found:
                first = f"{operations[earlier].name} to be reduced once, in {operations[found[earlier]].name}"
                raise ExchangeError(f"{o.name}: expected {first}; got a second time")
            found[earlier] = number
    return found
