"""Program: a schedule bound to one rank, one memory layout and one element count.

A program is a table of integers, one row an instruction, executed from top to bottom by a compiled loop.
It holds no pointers, only (buffer, offset) pairs, so it is compiled once and cached. Addresses join it when
it is executed.

How a schedule becomes a program
--------------------------------
- Every chunk is cut into **segments**. A segment goes through the schedule's rounds on its own, so segment
  1 can be reduced while segment 2 arrives, and what was received is sent on while it is still in cache. The
  instruction order is a wavefront: (round k, segment s) comes at ``stride * s + k``.
- What one rank sends another in one round is one message, unless it is large; then each segment is.
- Receives are posted ``lookahead`` steps early, as soon as nothing else uses their memory.
- A chunk is read where it lies: from the caller's input until it is first written, then from where it was
  written. Complete results are written where the caller wants them; a partial sum stays in the scratch slot
  that the message came into, which is in cache. So nothing is copied that does not have to be.
- Memory under a pending send is never written: a WAIT for the send comes first.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mpicoll.schedule import CACHE_LINE, IntArray, Schedule, chunk_bounds


class Op(IntEnum):
    """Instructions. ``count`` is in bytes, in elements for REDUCE and SCALE."""

    RECV = 0  # start receiving count bytes from peer into dst
    SEND = 1  # start sending count bytes at a to peer
    WAIT = 2  # wait for the RECV or SEND with this request number
    REDUCE = 3  # dst = a op b
    COPY = 4  # dst = a
    SCALE = 5  # dst *= factor


class Buffer(IntEnum):
    """What an offset is relative to."""

    INPUT = 0
    OUTPUT = 1
    SCRATCH = 2


COLUMNS = ("op", "request", "peer", "count", "dst", "dst_at", "a", "a_at", "b", "b_at")


@dataclass(frozen=True)
class Pipeline:
    """How a program overlaps: segment size in bytes; how many steps ahead receives are posted, and sends
    begun whose data are there already; and the wavefront's stride in steps."""

    segment: int
    lookahead: int = 2
    stride: int = 1
    early: int = 0


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each chunk lies in one rank's buffers, in elements; arrays of length nchunks.

    ``input_at`` and ``output_at`` matter for the chunks that the rank has as inputs and outputs only.
    ``in_place``: the inputs lie in the output buffer.
    """

    counts: IntArray
    input_at: IntArray
    output_at: IntArray
    in_place: bool = False


@dataclass(frozen=True, eq=False)
class Program:
    """``rows``: int64 [n, len(COLUMNS)]; ``scratch``: bytes of scratch memory; ``requests``: at once."""

    rows: IntArray
    scratch: int
    requests: int


class Place(NamedTuple):
    """A byte offset in a buffer."""

    buffer: Buffer
    at: int


NOWHERE = Place(Buffer.INPUT, 0)


_Key = tuple[int, int]  # a chunk and a segment


class _Piece(NamedTuple):
    """Elements ``start`` to ``start + length`` of a chunk: its segment number ``segment``."""

    chunk: int
    segment: int
    start: int
    length: int


@dataclass(eq=False)
class _Slot:
    """Scratch memory for one message, free again when it has no users: values in it, and pending sends."""

    place: Place
    nbytes: int
    users: int = 0


@dataclass(eq=False)
class _Message:
    peer: int
    outgoing: bool
    reduce: bool
    round: int
    pieces: list[_Piece]
    request: int = -1
    slot: _Slot | None = None  # where it is received or packed, if not where its pieces lie
    read_slots: list[_Slot] = field(default_factory=list)  # what an unfinished send reads

    @property
    def segment(self) -> int:
        return self.pieces[0].segment

    @property
    def count(self) -> int:
        return sum(piece.length for piece in self.pieces)


def compile_program(
    schedule: Schedule, rank: int, layout: Layout, itemsize: int, pipeline: Pipeline, average: bool = False
) -> Program:
    """The program of ``rank`` for ``schedule``; with ``average``, complete sums are scaled by a factor."""
    return _Compiler(schedule, rank, layout, itemsize, pipeline, average).compile()


def _messages(schedule: Schedule, rank: int, layout: Layout, segment: int) -> list[_Message]:
    """What ``rank`` sends and receives, round by round; ``segment`` in elements.

    Both ends of a message derive it from what both know, so they agree on its bounds and its place in order.
    """
    counts = layout.counts.tolist()
    join = max(counts, default=0) <= segment
    messages: list[_Message] = []
    for k, whole in enumerate(schedule.rounds):
        joined: dict[tuple[int, bool, bool], _Message] = {}
        for src, dst, chunk, op in whole.involving(rank):
            if not counts[chunk] and schedule.collective != "barrier":
                continue
            outgoing = src == rank
            end = (dst if outgoing else src, outgoing, op == "reduce")
            for piece in _pieces(chunk, counts[chunk], segment):
                if join and end in joined:
                    joined[end].pieces.append(piece)
                else:
                    joined[end] = _Message(*end, k, [piece])
                    messages.append(joined[end])
    return messages


def _pieces(chunk: int, count: int, segment: int) -> list[_Piece]:
    """The chunk in segments of at most ``segment`` elements, as even as can be."""
    if count <= segment:
        return [_Piece(chunk, 0, 0, count)]
    bounds = chunk_bounds(count, -(-count // segment)).tolist()
    return [_Piece(chunk, number, a, b - a) for number, (a, b) in enumerate(pairwise(bounds))]


def _last_uses(steps: list[list[_Message]]) -> dict[int, tuple[int, int]]:
    """For each message, by id: the last step before its own that writes, and that uses, any of its pieces."""
    written: dict[tuple[int, int], int] = {}
    used: dict[tuple[int, int], int] = {}
    last: dict[int, tuple[int, int]] = {}
    for number, step in enumerate(steps):
        for message in step:
            keys = [piece[:2] for piece in message.pieces]
            last[id(message)] = (max(written.get(k, -1) for k in keys), max(used.get(k, -1) for k in keys))
        for message in step:
            used.update((piece[:2], number) for piece in message.pieces)
            if not message.outgoing:
                written.update((piece[:2], number) for piece in message.pieces)
    return last


@dataclass
class _Compiler:
    schedule: Schedule
    rank: int
    layout: Layout
    itemsize: int
    pipeline: Pipeline
    average: bool
    rows: list[tuple[int, ...]] = field(default_factory=list)
    scratch: int = 0
    requests: int = 0

    def __post_init__(self) -> None:
        inputs = Buffer.OUTPUT if self.layout.in_place else Buffer.INPUT
        self.inputs = self._places(inputs, self.schedule.inputs(self.rank), self.layout.input_at)
        self.outputs = self._places(Buffer.OUTPUT, self.schedule.outputs(self.rank), self.layout.output_at)
        self.homes = dict(self.outputs)  # where a chunk is copied to; what only passes gets scratch memory
        self.moved: dict[_Key, tuple[Place, _Slot | None]] = {}  # where a written piece lies
        # Unfinished sends of a piece, and the place that each reads.
        self.pending: dict[_Key, list[tuple[_Message, Place]]] = defaultdict(list)
        self.unfinished: dict[int, _Message] = {}  # sends by request
        self.slot_sends: deque[tuple[int, _Message]] = deque()  # sends that keep slots, and their steps
        self.free_requests: list[int] = []
        self.free_slots: dict[int, list[_Slot]] = defaultdict(list)

    def _places(self, buffer: Buffer, chunks: IntArray, at: IntArray) -> dict[int, Place]:
        offsets = at[chunks] * self.itemsize
        return {c: Place(buffer, o) for c, o in zip(chunks.tolist(), offsets.tolist(), strict=True)}

    def compile(self) -> Program:
        steps = self._steps()
        unposted = deque(m for step in steps for m in step if not m.outgoing)
        unsent = deque(m for step in steps for m in step if m.outgoing)
        step_of = {id(m): number for number, step in enumerate(steps) for m in step}
        last = _last_uses(steps)
        for number, step in enumerate(steps):
            self._finish_slot_sends(before=number - self.pipeline.lookahead)
            while unposted and step_of[id(unposted[0])] <= number + self.pipeline.lookahead:
                message = unposted[0]
                due = step_of[id(message)] == number
                if not due and not self._may_post(message, *last[id(message)], number):
                    break
                self._post(unposted.popleft())
            while unsent and step_of[id(unsent[0])] <= number + self.pipeline.early:
                message = unsent[0]
                due = step_of[id(message)] == number
                if not due and last[id(message)][0] >= number:
                    break
                self._send(unsent.popleft(), step_of[id(message)])
            self._receive([m for m in step if not m.outgoing])
        self._copy_unmoved()
        for request in sorted(self.unfinished):
            self._finish_send(self.unfinished[request])
        rows = np.array(self.rows, np.int64).reshape(-1, len(COLUMNS))
        return Program(rows, self.scratch, self.requests)

    # -- order

    def _steps(self) -> list[list[_Message]]:
        """Messages of one round and segment are a step; steps in wavefront order."""
        segment = max(1, self.pipeline.segment // self.itemsize)
        steps: dict[tuple[int, int], list[_Message]] = defaultdict(list)
        self.last_write: dict[int, _Message] = {}
        self.last_copied_out: dict[int, int] = {}  # the last round in which a chunk is sent to be copied
        for message in _messages(self.schedule, self.rank, self.layout, segment):
            time = self.pipeline.stride * message.segment + message.round
            steps[time, message.segment].append(message)
            chunks = {piece.chunk for piece in message.pieces}
            if not message.outgoing:
                self.last_write.update(dict.fromkeys(chunks, message))
            elif not message.reduce:
                self.last_copied_out.update(dict.fromkeys(chunks, message.round))
        return [steps[key] for key in sorted(steps)]

    def _may_post(self, message: _Message, last_write: int, last_use: int, number: int) -> bool:
        """Whether a receive may be posted before its step: nothing still uses the memory it fills."""
        if message.reduce:
            return True
        for piece in message.pieces:
            if self._readers(piece) or (last_use >= number and self._place(piece) == self._home(piece)):
                return False
        return last_write < number

    # -- places

    def _home(self, piece: _Piece) -> Place:
        if piece.chunk not in self.homes:
            self.homes[piece.chunk] = self._allocate(int(self.layout.counts[piece.chunk]) * self.itemsize)
        home = self.homes[piece.chunk]
        return Place(home.buffer, home.at + piece.start * self.itemsize)

    def _place(self, piece: _Piece) -> Place | None:
        """Where the piece's present value lies; None if there is none yet."""
        if piece[:2] in self.moved:
            return self.moved[piece[:2]][0]
        start = self.inputs.get(piece.chunk)
        return start and Place(start.buffer, start.at + piece.start * self.itemsize)

    def _value(self, piece: _Piece) -> Place:
        """Where the piece's value lies, which verification has shown to be there."""
        place = self._place(piece)
        assert place is not None
        return place

    def _move(self, piece: _Piece, place: Place, slot: _Slot | None) -> None:
        """The piece's value lies at ``place`` from now on."""
        _, old = self.moved.get(piece[:2], (None, None))
        self.moved[piece[:2]] = (place, slot)
        if slot is not None:
            slot.users += 1
        if old is not None:
            self._release(old)

    def _joined(self, pieces: list[_Piece], places: list[Place]) -> bool:
        """Whether the pieces lie one after the other."""
        ends = [Place(p.buffer, p.at + q.length * self.itemsize) for p, q in zip(places, pieces, strict=True)]
        return ends[:-1] == places[1:]

    def _allocate(self, nbytes: int) -> Place:
        place = Place(Buffer.SCRATCH, self.scratch)
        self.scratch += -(-nbytes // CACHE_LINE) * CACHE_LINE
        return place

    def _take_slot(self, message: _Message) -> Place:
        nbytes = message.count * self.itemsize
        free = self.free_slots[nbytes]
        message.slot = free.pop() if free else _Slot(self._allocate(nbytes), nbytes)
        message.slot.users = 1
        return message.slot.place

    def _release(self, slot: _Slot) -> None:
        slot.users -= 1
        if not slot.users:
            self.free_slots[slot.nbytes].append(slot)

    def _in_slot(self, message: _Message) -> list[tuple[_Piece, Place]]:
        """The message's pieces with their places in its slot."""
        assert message.slot is not None
        offsets = np.cumsum([0] + [piece.length * self.itemsize for piece in message.pieces]).tolist()
        start = message.slot.place
        places = [Place(start.buffer, start.at + offset) for offset in offsets[:-1]]
        return list(zip(message.pieces, places, strict=True))

    # -- instructions

    def _emit(
        self,
        op: Op,
        count: int = 0,
        dst: Place = NOWHERE,
        a: Place = NOWHERE,
        b: Place = NOWHERE,
        request: int = -1,
        peer: int = -1,
    ) -> None:
        self.rows.append((op, request, peer, count, *dst, *a, *b))

    def _take_request(self, message: _Message) -> int:
        if not self.free_requests:
            self.free_requests.append(self.requests)
            self.requests += 1
        message.request = self.free_requests.pop()
        return message.request

    def _wait(self, message: _Message) -> None:
        self._emit(Op.WAIT, request=message.request)
        self.free_requests.append(message.request)

    def _finish_send(self, message: _Message) -> None:
        self._wait(message)
        del self.unfinished[message.request]
        for piece in message.pieces:
            reads = self.pending[piece[:2]]
            reads[:] = [(send, place) for send, place in reads if send is not message]
        for slot in message.read_slots:
            self._release(slot)

    def _finish_slot_sends(self, before: int) -> None:
        """Wait for the sends of steps ``before`` this one that keep slots, so that few slots go round."""
        while self.slot_sends and self.slot_sends[0][0] < before:
            _, message = self.slot_sends.popleft()
            if self.unfinished.get(message.request) is message:
                self._finish_send(message)

    def _readers(self, piece: _Piece) -> list[_Message]:
        """Pending sends that read the piece's home."""
        return [send for send, place in self.pending[piece[:2]] if place == self._home(piece)]

    def _claim(self, piece: _Piece) -> Place:
        """The piece's home, once no pending send reads it."""
        for message in self._readers(piece):
            self._finish_send(message)
        return self._home(piece)

    def _copy(self, piece: _Piece, dst: Place, src: Place) -> None:
        self._emit(Op.COPY, piece.length * self.itemsize, dst, src)

    def _send(self, message: _Message, number: int) -> None:
        places = [self._value(piece) for piece in message.pieces]
        start = places[0]
        if self._joined(message.pieces, places):
            self._keep_read(message, places)
        else:
            start = self._take_slot(message)
            message.read_slots = [message.slot] if message.slot else []
            for (piece, packed), place in zip(self._in_slot(message), places, strict=True):
                self._copy(piece, packed, place)
        request = self._take_request(message)
        nbytes = message.count * self.itemsize
        self._emit(Op.SEND, nbytes, a=start, request=request, peer=message.peer)
        self.unfinished[request] = message
        if message.read_slots:
            self.slot_sends.append((number, message))

    def _keep_read(self, message: _Message, places: list[Place]) -> None:
        """Note what a send reads until it is finished: neither changed nor given away before."""
        for piece, place in zip(message.pieces, places, strict=True):
            self.pending[piece[:2]].append((message, place))
            _, slot = self.moved.get(piece[:2], (None, None))
            if slot is not None:
                slot.users += 1
                message.read_slots.append(slot)

    def _post(self, message: _Message) -> None:
        if message.reduce:
            into = self._take_slot(message)
        else:
            homes = [self._claim(piece) for piece in message.pieces]
            into = homes[0] if self._joined(message.pieces, homes) else self._take_slot(message)
        request = self._take_request(message)
        self._emit(Op.RECV, message.count * self.itemsize, into, request=request, peer=message.peer)

    def _receive(self, messages: list[_Message]) -> None:
        """Wait for a step's messages, then copy and reduce what they brought."""
        terms: dict[_Piece, list[tuple[int, Place, _Slot]]] = defaultdict(list)
        for message in messages:
            self._wait(message)
        for message in messages:
            for piece, place in self._in_slot(message) if message.slot else []:
                if message.reduce and message.slot:
                    terms[piece].append((message.peer, place, message.slot))
                else:
                    self._copy(piece, self._home(piece), place)
            if not message.reduce:
                for piece in message.pieces:
                    self._move(piece, self._home(piece), None)
        for piece, received in terms.items():
            self._reduce(piece, sorted(received, key=lambda term: term[0]), messages[0].round)
        for message in messages:
            if message.slot is not None:
                self._release(message.slot)

    def _reduce(self, piece: _Piece, received: list[tuple[int, Place, _Slot]], round: int) -> None:
        """Fold what came from other ranks and the own value, in ascending rank order."""
        own = self._value(piece)
        lower = [place for peer, place, _ in received if peer < self.rank]
        higher = [place for peer, place, _ in received if peer > self.rank]
        for place in lower[1:]:
            self._emit(Op.REDUCE, piece.length, lower[0], lower[0], place)
        terms = lower[:1] + higher
        if self._is_result(piece, round):
            total, slot = self._claim(piece), None
            self._emit(Op.REDUCE, piece.length, total, own, terms[0])
        else:
            # A partial sum stays where its first term came in. Exchanging the two sides changes no bit.
            total, slot = next((place, slot) for _, place, slot in received if place == terms[0])
            self._emit(Op.REDUCE, piece.length, total, total, own)
        for place in terms[1:]:
            self._emit(Op.REDUCE, piece.length, total, total, place)
        self._move(piece, total, slot)
        self._scale_if_complete(piece, round)

    def _is_result(self, piece: _Piece, round: int) -> bool:
        """Whether what is reduced in this round is the rank's output."""
        last = self.last_write[piece.chunk]
        return piece.chunk in self.outputs and last.reduce and last.round == round

    def _scale_if_complete(self, piece: _Piece, round: int) -> None:
        # The last reduction into what is an output, here or on ranks that only copy it, is the complete one.
        last = self.last_write[piece.chunk]
        wanted = piece.chunk in self.outputs or self.last_copied_out.get(piece.chunk, -1) > last.round
        if self.average and wanted and last.reduce and last.round == round:
            self._emit(Op.SCALE, piece.length, self._value(piece))

    def _copy_unmoved(self) -> None:
        """Outputs that no message brought are the rank's own inputs."""
        for chunk in self.outputs:
            piece = _Piece(chunk, 0, 0, int(self.layout.counts[chunk]))
            if chunk not in self.last_write and piece.length and self._value(piece) != self._home(piece):
                self._copy(piece, self._home(piece), self._value(piece))
