"""MSCCL's XML: what its interpreter runs on GPUs, and what its compiler, tools and simulators write and read.

Vocabulary (MSCCL's, as far as it differs from ours)
----------------------------------------------------
gpu          a rank.
tb           threadblock: does its steps one after the other. It sends to one peer (``send``) and receives
             from one (``recv``), or none (-1), over the channel ``chan``. On a channel, one threadblock of
             a gpu sends to a peer, and one receives from it.
step         a line of a threadblock: ``s`` sends, ``r`` receives and stores, ``rrc`` receives and reduces,
             ``rcs`` and ``rrcs`` also send that on at once, ``re`` reduces and ``cpy`` copies on the gpu,
             ``nop`` only waits. ``cnt`` chunks from ``srcoff`` of ``srcbuf`` go to ``dstoff`` of ``dstbuf``,
             buffers being ``i`` (input), ``o`` (output) and ``s`` (scratch); at the other end of a message
             the peer's own step says where.
depid, deps  the threadblock of this gpu and its step that must be done before, -1 for none. That step has
             ``hasdep="1"`` so that it says when it is. A step waits for one; ``nop`` before it wait for more.

The ring of two ranks, as it is written (one of two gpus; in the file a step is one line):

    <algo name="ring" proto="Simple" nchannels="1" nchunksperloop="2" ngpus="2" coll="allreduce" inplace="1"
          outofplace="0" minBytes="0" maxBytes="1099511627776" root="0">
      <gpu id="0" i_chunks="2" o_chunks="2" s_chunks="0">
        <tb id="0" send="1" recv="1" chan="0">
          <step s="0" type="s" srcbuf="i" srcoff="1" dstbuf="i" dstoff="1" cnt="1" depid="-1" deps="-1"
                hasdep="0"/>
          <step s="1" type="rrc" srcbuf="i" srcoff="0" dstbuf="i" dstoff="0" .../>
          <step s="2" type="s" srcbuf="i" srcoff="0" .../>
          <step s="3" type="r" .../>

What is written
---------------
The i-th peer that a rank sends to and the i-th from which it receives share a threadblock, so a rank of a
ring has one. All is in place: the data of reduce, allreduce, reduce_scatter is the input, of broadcast and
allgather the output, and is worked on there. Chunks that only pass a rank (gather, scatter, alltoall) go
through its scratch. ``nchunksperloop`` is what the interpreter divides by to find a chunk's size: the chunks
of the data, for gather and scatter 1, as their count is that of one rank. Its XML has no root, so there is
an attribute ``root``, which it does not look at. It knows no barrier: that is for other tools only.

What is read
------------
Also what others wrote, if a `Schedule` can say it: in place (alltoall not), every chunk under one number
everywhere, and values that are not kept (``rrs``) not at all. A chunk that is received into scratch and
reduced from there later (``re``) is one reduction.

Sources: M. Cowan et al., "MSCCLang: Microsoft Collective Communication Language", ASPLOS (2023); the
interpreter and parser of github.com/microsoft/msccl and github.com/Azure/msccl-executor-nccl.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple
from xml.etree import ElementTree
from xml.sax.saxutils import escape

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
from mpicoll.schedule import REDUCE, Schedule

# What the interpreter takes; of the steps some builds take only 64.
MOST_STEPS = 256  # of a threadblock
MOST_BLOCKS = 32  # threadblocks of a gpu on one channel
MAX_BYTES = 1 << 40  # of data: no limit

# The runtime's names of collectives where they are not ours.
_NAMES = {"reduce_scatter": "reducescatter"}
_COLLECTIVES = {name: collective for collective, name in _NAMES.items()}

SENDS = ("s", "rcs", "rrcs")
RECEIVES = ("r", "rrc", "rcs", "rrcs")
TYPES = ("s", "r", "rrc", "rcs", "rrcs", "cpy", "re", "nop")

Place = tuple[str, int]  # a buffer and a chunk's offset in it


@dataclass(frozen=True)
class _Layout:
    """Where chunks lie in the buffers of the gpus."""

    collective: str
    nranks: int
    nchunks: int
    root: int

    def home(self, rank: int, chunk: int) -> Place | None:
        """Where ``chunk`` lies on ``rank``; None: it only passes, in scratch."""
        match self.collective:
            case "broadcast" | "allgather":
                return "o", chunk
            case "gather" if rank == self.root:
                return "o", chunk
            case "gather":
                return ("i", 0) if chunk == rank else None
            case "scatter" if rank == self.root:
                return "i", chunk
            case "scatter":
                return ("o", 0) if chunk == rank else None
            case "alltoall":
                sender, receiver = divmod(chunk, self.nranks)
                return ("i", receiver) if sender == rank else ("o", sender) if receiver == rank else None
            case _:
                return "i", chunk

    def sizes(self, rank: int) -> tuple[int, int]:
        """The chunks of the input and of the output."""
        n = self.nchunks
        match self.collective:
            case "allgather":
                return 1, n
            case "reduce_scatter":
                return n, 1
            case "gather":
                return 1, n if rank == self.root else 0
            case "scatter":
                return n if rank == self.root else 0, 1
            case "alltoall":
                return self.nranks, self.nranks
            case _:
                return n, n

    @property
    def per_loop(self) -> int:
        """``nchunksperloop``."""
        single = {"gather": 1, "scatter": 1, "alltoall": self.nranks}
        return single.get(self.collective, self.nchunks)

    def chunks(self, rank: int) -> dict[Place, int]:
        """The chunk at each place of input and output. In place, some of it is in both."""
        found = {home: c for c in range(self.nchunks) if (home := self.home(rank, c)) is not None}
        inputs, outputs = self.sizes(rank)
        if inputs == outputs:  # alltoall's are not in place, but the own block is in both when it is done
            other = [rank] if self.collective == "alltoall" else range(self.nchunks)
            both = {"i": "o", "o": "i"}
            found.update({(both[b], k): c for (b, k), c in list(found.items()) if k in other})
        elif 1 in (inputs, outputs):
            found.setdefault(("i" if inputs == 1 else "o", 0), rank)
        return found


def dumps(schedule: Schedule) -> str:
    """``schedule`` as MSCCL's XML."""
    layout = _Layout(schedule.collective, schedule.nranks, schedule.nchunks, schedule.root)
    alltoall = schedule.collective == "alltoall"
    head = {
        "name": schedule.name,
        "proto": "Simple",
        "nchannels": 1,
        "nchunksperloop": layout.per_loop,
        "ngpus": schedule.nranks,
        "coll": _NAMES.get(schedule.collective, schedule.collective),
        "inplace": int(not alltoall),
        "outofplace": int(alltoall),
        "minBytes": 0,
        "maxBytes": MAX_BYTES,
        "root": schedule.root,
    }
    lines = [f"<algo {_attributes(head)}>"]
    for rank, own in enumerate(actions(schedule)):
        lines += _gpu(layout, rank, own)
    return "\n".join([*lines, "</algo>", ""])


def _attributes(values: Mapping[str, object]) -> str:
    return " ".join(f'{name}="{escape(str(value), {chr(34): "&quot;"})}"' for name, value in values.items())


@dataclass
class _Line:
    """A step to be written: what it waits for is a threadblock and a step of it."""

    type: str
    source: Place
    target: Place
    waits: tuple[int, int] = (-1, -1)
    is_waited_for: bool = False


def _gpu(layout: _Layout, rank: int, own: Sequence[Action]) -> Iterator[str]:
    """The lines of one gpu."""
    send_peers = list(dict.fromkeys(a.transfer.dst for a in own if a.sends))
    recv_peers = list(dict.fromkeys(a.transfer.src for a in own if not a.sends))
    peers = list(zip_longest(send_peers, recv_peers, fillvalue=-1))
    blocks: list[list[_Line]] = [[] for _ in peers]
    if layout.collective == "alltoall":
        if not blocks:  # one rank
            peers, blocks = [(-1, -1)], [[]]
        blocks[0].append(_Line("cpy", ("i", rank), ("o", rank)))
    scratch = _fill(layout, rank, own, peers, blocks)
    inputs, outputs = layout.sizes(rank)
    counts = {"id": rank, "i_chunks": inputs, "o_chunks": outputs, "s_chunks": scratch}
    yield f"  <gpu {_attributes(counts)}>"
    for number, ((send_to, recv_from), lines) in enumerate(zip(peers, blocks, strict=True)):
        tb = {"id": number, "send": send_to, "recv": recv_from, "chan": 0}
        yield f"    <tb {_attributes(tb)}>"
        yield from (f"      <step {_attributes(_step(k, line))}/>" for k, line in enumerate(lines))
        yield "    </tb>"
    yield "  </gpu>"


def _step(number: int, line: _Line) -> dict[str, object]:
    return {
        "s": number,
        "type": line.type,
        "srcbuf": line.source[0],
        "srcoff": line.source[1],
        "dstbuf": line.target[0],
        "dstoff": line.target[1],
        "cnt": 1,
        "depid": line.waits[0],
        "deps": line.waits[1],
        "hasdep": int(line.is_waited_for),
    }


def _fill(
    layout: _Layout,
    rank: int,
    own: Sequence[Action],
    peers: Sequence[tuple[int, int]],
    blocks: Sequence[list[_Line]],
) -> int:
    """Put the lines of all actions into the threadblocks of their peers; return the chunks of scratch."""
    block_of = {(sends, pair[not sends]): k for k, pair in enumerate(peers) for sends in (True, False)}
    scratch: dict[int, int] = {}
    where: list[tuple[int, int]] = []
    reached: list[dict[int, int]] = [{} for _ in blocks]  # how far others were when a block waited for them
    for transfer, sends, after in own:
        block = block_of[sends, transfer.dst if sends else transfer.src]
        waits: dict[int, int] = {}
        for other, step in (where[number] for number in after):
            if other != block and step > reached[block].get(other, -1):
                waits[other] = reached[block][other] = step
                blocks[other][step].is_waited_for = True
        place = layout.home(rank, transfer.chunk)
        if place is None:
            place = "s", scratch.setdefault(transfer.chunk, len(scratch))
        kind = "s" if sends else "rrc" if transfer.op == REDUCE else "r"
        *more, last = list(waits.items()) or [(-1, -1)]
        blocks[block] += [_Line("nop", place, place, wait) for wait in more]
        where.append((block, len(blocks[block])))
        blocks[block].append(_Line(kind, place, place, last))
    return len(scratch)


def beyond_limits(text: str) -> list[str]:
    """In what a file is more than MSCCL's interpreter takes; other tools may well take it."""
    algo = ElementTree.fromstring(text)
    found = []
    steps = max((len(tb) for tb in algo.iter("tb")), default=0)
    blocks = max((len(gpu) for gpu in algo.iter("gpu")), default=0)
    if steps > MOST_STEPS:
        found.append(f"{steps} steps in a threadblock, at most {MOST_STEPS}")
    if blocks > MOST_BLOCKS:
        found.append(f"{blocks} threadblocks on a channel, at most {MOST_BLOCKS}")
    if algo.get("coll") == "barrier":
        found.append("a barrier, which it does not know")
    return found


@dataclass(frozen=True)
class _Instruction:
    """A step that was read: ``number`` counts those of all gpus; peers are the threadblock's."""

    number: int
    name: str
    gpu: int
    tb: int
    type: str
    source: Place
    target: Place
    count: int
    waits: tuple[int, int]
    is_waited_for: bool
    send_to: int
    recv_from: int
    channel: int


def loads(text: str, collective: str | None = None) -> Schedule:
    """The schedule in MSCCL's XML; `ExchangeError` names the element that is wrong, or a line of no XML."""
    algo = _parse(text)
    head = _head(algo)
    if collective not in (None, head.collective):
        raise ExchangeError(f"algo: expected coll to be {collective}, got {algo.get('coll')}")
    gpus = _numbered(algo, "gpu", "algo", head.nranks)
    instructions: list[_Instruction] = []
    for rank, gpu in enumerate(gpus):
        _read_gpu(gpu, rank, head.nranks, instructions)
    steps = [Step(i.gpu, i.name, after) for i, after in zip(instructions, _after(instructions), strict=True)]
    received = _match(instructions)
    order = in_order(steps, received)
    messages = _Tracing(head, gpus, instructions, received).run(order)
    return to_schedule(head, steps, messages, order)


def _parse(text: str) -> ElementTree.Element:
    # Without a document type there are no entities: none from other files, and none that grow when expanded.
    if "<!DOCTYPE" in text:
        raise ExchangeError("DOCTYPE: expected none, got one")
    try:
        algo = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ExchangeError(f"line {error.position[0]}: expected XML; got {error}") from None
    if algo.tag != "algo":
        raise ExchangeError(f"{algo.tag}: expected the element algo, got {algo.tag}")
    return algo


def _head(algo: ElementTree.Element) -> Head:
    name = _text(algo, "coll", "algo")
    collective = _COLLECTIVES.get(name, name)
    nranks, per_loop = _integer(algo, "ngpus", "algo"), _integer(algo, "nchunksperloop", "algo")
    # The others have as many chunks as ranks.
    free = collective in ("allreduce", "reduce", "broadcast", "barrier")
    nchunks = per_loop if free else nranks**2 if collective == "alltoall" else nranks
    root = _integer(algo, "root", "algo") if "root" in algo.attrib else None
    head = Head(algo.get("name", "msccl"), collective, nranks, nchunks, root)
    check_head(head, "algo")
    expected = _Layout(collective, nranks, nchunks, 0).per_loop
    if per_loop != expected:
        raise ExchangeError(f"algo: expected nchunksperloop {expected} for {collective}, got {per_loop}")
    in_place = _integer(algo, "inplace", "algo")
    if in_place != (collective != "alltoall"):
        wanted = int(not in_place)
        raise ExchangeError(f"algo: expected inplace {wanted}, as a schedule for {name} is; got {in_place}")
    return head


def _text(element: ElementTree.Element, name: str, where: str) -> str:
    value = element.get(name)
    if value is None:
        raise ExchangeError(f"{where}: expected the attribute {name}, got none")
    return value


def _integer(element: ElementTree.Element, name: str, where: str) -> int:
    value = _text(element, name, where)
    # No number in a file is longer; the square of a very long one could not even be printed.
    if not re.fullmatch(r"-?[0-9]{1,18}", value):
        raise ExchangeError(f"{where}: expected {name} to be an integer, got {value[:40]!r}")
    return int(value)


def _numbered(
    parent: ElementTree.Element, tag: str, where: str, count: int | None = None
) -> list[ElementTree.Element]:
    """The children by their ``id``, which must be 0, 1 and so on, up to ``count``."""
    found: dict[int, ElementTree.Element] = {}
    for child in parent:
        if child.tag != tag:
            raise ExchangeError(f"{where}: expected elements {tag}, got {child.tag}")
        number = _integer(child, "id", f"{where}, {tag} {len(found)}")
        if number in found:
            raise ExchangeError(f"{where}: expected one {tag} with id {number}, got two")
        found[number] = child
    count = len(found) if count is None else count
    if len(found) != count or sorted(found) != list(range(count)):
        missing = next((k for k in range(count) if k not in found), None)
        got = f"{len(found)} of them" if missing is None else f"none with id {missing}"
        raise ExchangeError(f"{where}: expected {count} {tag} with ids from 0 on, got {got}")
    return [found[k] for k in range(count)]


def _read_gpu(gpu: ElementTree.Element, rank: int, nranks: int, instructions: list[_Instruction]) -> None:
    """Append what a gpu does, threadblock by threadblock."""
    sizes = {buffer: _integer(gpu, f"{buffer}_chunks", f"gpu {rank}") for buffer in "ios"}
    for tb, block in enumerate(_numbered(gpu, "tb", f"gpu {rank}")):
        where = f"gpu {rank}, tb {tb}"
        peers = [_integer(block, name, where) for name in ("send", "recv")]
        for name, peer in zip(("send", "recv"), peers, strict=True):
            if not -1 <= peer < nranks or peer == rank:
                allowed = f"-1 or another gpu from 0 to {nranks - 1}"
                raise ExchangeError(f"{where}: expected {name} to be {allowed}; got {peer}")
        channel = _integer(block, "chan", where)
        for k, element in enumerate(block):
            name = f"{where}, step {k}"
            if element.tag != "step" or _integer(element, "s", name) != k:
                raise ExchangeError(f"{name}: expected a step with s={k}, got {element.tag} {element.attrib}")
            instructions.append(
                _instruction(element, name, sizes, len(instructions), rank, tb, (*peers, channel))
            )


def _instruction(
    element: ElementTree.Element,
    name: str,
    sizes: dict[str, int],
    number: int,
    rank: int,
    tb: int,
    connection: Sequence[int],
) -> _Instruction:
    """One step; ``connection`` is the threadblock's peers and its channel."""
    type_ = _text(element, "type", name)
    name = f"{name} ({type_})"
    if type_ == "rrs":
        raise ExchangeError(
            f"{name}: expected a sum that is kept where it is made (rrcs); got one that is not"
        )
    if type_ not in TYPES:
        raise ExchangeError(f"{name}: expected a type of {', '.join(TYPES)}; got {type_!r}")
    source, target = (
        (_text(element, f"{end}buf", name), _integer(element, f"{end}off", name)) for end in ("src", "dst")
    )
    count = _integer(element, "cnt", name)
    # The other end's buffer is the peer's affair; so is whatever a nop names.
    used = {"nop": [], "s": [source], "r": [target], "rcs": [target]}.get(type_, [source, target])
    for buffer, offset in used:
        if buffer not in sizes or offset < 0 or count < 1 or offset + count > sizes[buffer]:
            allowed = ", ".join(f"{size} of {name}" for name, size in sizes.items())
            raise ExchangeError(
                f"{name}: expected chunks that are there ({allowed}); got {count} from {buffer}[{offset}] on"
            )
    send_to, recv_from, channel = connection
    for does, peer, verb in ((SENDS, send_to, "send"), (RECEIVES, recv_from, "recv")):
        if type_ in does and peer < 0:
            raise ExchangeError(f"{name}: expected its tb to have a {verb} peer, got -1")
    waits = (_integer(element, "depid", name), _integer(element, "deps", name))
    is_waited_for = _integer(element, "hasdep", name) == 1
    return _Instruction(
        number,
        name,
        rank,
        tb,
        type_,
        source,
        target,
        count,
        waits,
        is_waited_for,
        send_to,
        recv_from,
        channel,
    )


def _after(instructions: Sequence[_Instruction]) -> Iterator[tuple[int, ...]]:
    """For each step the numbers of those that it waits for: the one before it, and the one it names."""
    blocks: dict[tuple[int, int], list[_Instruction]] = defaultdict(list)
    for i in instructions:
        blocks[i.gpu, i.tb].append(i)
    for i in instructions:
        own = blocks[i.gpu, i.tb]
        before = (i.number - 1,) if i is not own[0] else ()
        if i.waits[0] < 0:
            yield before
            continue
        tb, step = i.waits
        others = blocks.get((i.gpu, tb), [])
        if not 0 <= step < len(others):
            raise ExchangeError(f"{i.name}: expected deps to be a step of tb {tb}, got {step}")
        # A threadblock tells how far it is at steps with hasdep only.
        told = next((o for o in others[step:] if o.is_waited_for and o.type != "nop"), None)
        if told is None:
            raise ExchangeError(f"{others[step].name}: expected hasdep 1, as {i.name} waits for it; got 0")
        yield (*before, told.number)


def _match(instructions: Sequence[_Instruction]) -> dict[int, int]:
    """The send of every receive: on a connection, the k-th of one is the k-th of the other."""
    sends: dict[tuple[int, int, int], list[_Instruction]] = defaultdict(list)
    recvs: dict[tuple[int, int, int], list[_Instruction]] = defaultdict(list)
    for i in instructions:
        if i.type in SENDS:
            sends[i.gpu, i.send_to, i.channel].append(i)
        if i.type in RECEIVES:
            recvs[i.recv_from, i.gpu, i.channel].append(i)
    found: dict[int, int] = {}
    for key in {**sends, **recvs}:
        for half in (sends[key], recvs[key]):
            other = next((i for i in half if i.tb != half[0].tb), None)
            if other is not None:
                raise ExchangeError(
                    f"{other.name}: expected one tb for this peer and channel, as tb {half[0].tb}; got two"
                )
        for send, recv in zip_longest(sends[key], recvs[key]):
            if recv is None:
                raise ExchangeError(f"{send.name}: expected a receive of it on gpu {key[1]}, got none")
            if send is None:
                raise ExchangeError(f"{recv.name}: expected a send of it on gpu {key[0]}, got none")
            if send.count != recv.count:
                raise ExchangeError(
                    f"{recv.name}: expected cnt {send.count}, as {send.name}; got {recv.count}"
                )
            found[recv.number] = send.number
    return found


class _Held(NamedTuple):
    """A chunk in scratch. ``recv``: the receive of one that is to be reduced; None if it only passes."""

    chunk: int
    recv: int | None


@dataclass
class _Tracing:
    """Follows the chunks through the buffers, to find which chunk each message carries."""

    head: Head
    gpus: Sequence[ElementTree.Element]
    instructions: Sequence[_Instruction]
    received: dict[int, int]
    messages: list[Message] = field(default_factory=list)
    scratch: dict[tuple[int, int], _Held] = field(default_factory=dict)
    sent: dict[tuple[int, int], int] = field(default_factory=dict)

    def run(self, order: Sequence[int]) -> list[Message]:
        """The messages, found by doing all steps in this order."""
        layout = self.layout = _Layout(*self.head[1:4], self._root())
        self.chunks = [layout.chunks(rank) for rank in range(self.head.nranks)]
        for number in order:
            i = self.instructions[number]
            for k in range(i.count if i.type != "nop" else 0):
                source, target = (i.source[0], i.source[1] + k), (i.target[0], i.target[1] + k)
                self._do(i, k, source, target)
        for (gpu, offset), held in self.scratch.items():
            if held.recv is not None:
                name = self.instructions[held.recv].name
                raise ExchangeError(f"{name}: expected a re of s[{offset}] of gpu {gpu}, got none")
        self._check_own_blocks()
        return self.messages

    def _root(self) -> int:
        """Where the root is, for the places of gather and scatter: it has the large buffer."""
        if self.head.root is not None:
            return self.head.root
        buffer = {"gather": "o_chunks", "scatter": "i_chunks"}.get(self.head.collective)
        if buffer is None:
            return 0
        sizes = [_integer(gpu, buffer, f"gpu {rank}") for rank, gpu in enumerate(self.gpus)]
        return sizes.index(max(sizes))

    def _do(self, i: _Instruction, k: int, source: Place, target: Place) -> None:
        """The k-th chunk of a step."""
        if i.type in RECEIVES:
            self._receive(i, k, source, target)
        elif i.type == "re":
            self._reduce(i, source, target)
        elif i.type == "cpy":
            # In place, and of a chunk under one number, this moves nothing.
            self._expect(i, self._chunk(i, source), target)
        if i.type in SENDS:
            self.sent[i.number, k] = self._chunk(i, source if i.type == "s" else target)

    def _chunk(self, i: _Instruction, place: Place) -> int:
        """Which chunk is at a place; `ExchangeError` if none is, or one that is there for a reduction."""
        buffer, offset = place
        if buffer != "s":
            chunk = self.chunks[i.gpu].get(place)
            if chunk is None:
                raise ExchangeError(f"{i.name}: expected a place of the data, got {buffer}[{offset}]")
            return chunk
        held = self.scratch.get((i.gpu, offset))
        if held is None or held.recv is not None:
            got = (
                "nothing"
                if held is None
                else f"chunk {held.chunk} of {self.instructions[held.recv or 0].name}"
            )
            raise ExchangeError(f"{i.name}: expected a chunk of this rank in s[{offset}], got {got}")
        return held.chunk

    def _expect(self, i: _Instruction, chunk: int, place: Place) -> None:
        found = self._chunk(i, place)
        if found != chunk:
            buffer, offset = place
            raise ExchangeError(
                f"{i.name}: expected chunk {chunk} at its own place; got {buffer}[{offset}], chunk {found}'s"
            )

    def _receive(self, i: _Instruction, k: int, source: Place, target: Place) -> None:
        send = self.received[i.number]
        chunk = self.sent[send, k]
        buffer, offset = target
        reduces = i.type in ("rrc", "rrcs")
        if reduces:
            self._expect(i, chunk, source)
        if buffer == "s" and not reduces:
            self._receive_into_scratch(i, send, chunk, offset)
            return
        self._expect(i, chunk, target)
        self.messages.append(Message(send, i.number, i.number, chunk, reduces))

    def _receive_into_scratch(self, i: _Instruction, send: int, chunk: int, offset: int) -> None:
        before = self.scratch.get((i.gpu, offset))
        if before is not None and before.recv is not None:
            name = self.instructions[before.recv].name
            raise ExchangeError(f"{i.name}: expected s[{offset}] to be free, got what {name} left there")
        passes = self.layout.home(i.gpu, chunk) is None
        self.scratch[i.gpu, offset] = _Held(chunk, None if passes else i.number)
        if passes:
            self.messages.append(Message(send, i.number, i.number, chunk, False))

    def _reduce(self, i: _Instruction, source: Place, target: Place) -> None:
        held = self.scratch.pop((i.gpu, source[1]), None) if source[0] == "s" else None
        if held is None or held.recv is None:
            raise ExchangeError(
                f"{i.name}: expected a chunk that was received into scratch, got {source[0]}[{source[1]}]"
            )
        self._expect(i, held.chunk, target)
        self.messages.append(Message(self.received[held.recv], held.recv, i.number, held.chunk, True))

    def _check_own_blocks(self) -> None:
        """What a rank sends to itself in an alltoall is no transfer, but it must be copied."""
        if self.head.collective != "alltoall":
            return
        copied = {i.gpu for i in self.instructions if i.type == "cpy" and i.target == ("o", i.gpu)}
        for rank in range(self.head.nranks):
            if rank not in copied:
                raise ExchangeError(f"gpu {rank}: expected a cpy of its own block to o[{rank}], got none")
