"""Pipeline parallelism: a model's layers over ranks, and each batch in pieces that follow each other.

Rank s of P is **stage** s and has consecutive layers. A batch is cut into M **pieces** (micro-batches). A
stage's **actions** are the forward and the backward of each piece, F m and B m; it sends activations to the
stage after it and their gradients to the one before:

    F m on stage s begins after F m on stage s - 1
    B m on stage s begins after B m on stage s + 1, and after F m on stage s itself

A **schedule** is the order of each stage's actions. Two of them, of 3 stages and 4 pieces, a backward taking
as long as two forwards:

    gpipe    stage 0  F0 F1 F2 F3 .  .  .  .  .  .  B0 B0 B1 B1 B2 B2 B3 B3
             stage 1  .  F0 F1 F2 F3 .  .  .  B0 B0 B1 B1 B2 B2 B3 B3 .  .
             stage 2  .  .  F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3 .  .  .  .

    1f1b     stage 0  F0 F1 F2 .  .  .  .  B0 B0 F3 B1 B1 .  B2 B2 .  B3 B3
             stage 1  .  F0 F1 .  .  B0 B0 F2 B1 B1 F3 B2 B2 .  B3 B3 .  .
             stage 2  .  .  F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 .  .  .  .

Cost, with f and b the times of a forward and a backward on every stage alike:

    time = (M + P - 1) (f + b), of which the share (P - 1) / (M + P - 1) is waiting, the **bubble**
    pieces whose activations stage s keeps at once:  gpipe M,  1f1b min(P - s, M)

So pieces are cheap in memory with 1f1b, and many pieces make the bubble small. Both schedules go backward
through the pieces in the same order as `Backprop`, 0 first, so all three add up to the same bits.

Sources: Y. Huang et al., "GPipe", NeurIPS 2019; D. Narayanan et al., "Efficient Large-Scale Language Model
Training on GPU Clusters Using Megatron-LM", SC 2021 (1F1B with a flush at each step's end).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from statistics import median
from time import perf_counter, sleep
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.schedule import chunk_bounds
from mpicoll.train.arrays import Array, array_module, beside, on_host, synchronise
from mpicoll.train.backprop import Part, weighted_loss
from mpicoll.train.errors import InputError
from mpicoll.train.layers import Context, Layer, Shape
from mpicoll.train.losses import Loss
from mpicoll.train.model import Saved, Sequential

Kind = Literal["forward", "backward"]
FORWARD: Kind = "forward"
BACKWARD: Kind = "backward"


# Schedules ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Action:
    """What a stage does with one piece."""

    kind: Kind
    piece: int

    def __str__(self) -> str:
        return f"the {self.kind} of piece {self.piece}"


Order = Sequence[Sequence[Action]]  # each stage's actions


def gpipe(stages: int, pieces: int) -> list[list[Action]]:
    """All pieces forward, then all backward."""
    _check_at_least_one(stages=stages, pieces=pieces)
    return [[*_actions(FORWARD, range(pieces)), *_actions(BACKWARD, range(pieces))] for _ in range(stages)]


def one_forward_one_backward(stages: int, pieces: int) -> list[list[Action]]:
    """Each piece backward as soon as may be: a stage is ahead by no more pieces than stages follow it."""
    _check_at_least_one(stages=stages, pieces=pieces)
    order = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, pieces)
        forwards = _actions(FORWARD, range(ahead, pieces))
        backwards = _actions(BACKWARD, range(pieces - ahead))
        pairs = [action for pair in zip(forwards, backwards, strict=True) for action in pair]
        rest = _actions(BACKWARD, range(pieces - ahead, pieces))
        order.append([*_actions(FORWARD, range(ahead)), *pairs, *rest])
    return order


SCHEDULES: dict[str, Callable[[int, int], list[list[Action]]]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
}


def _actions(kind: Kind, pieces: range) -> list[Action]:
    return [Action(kind, piece) for piece in pieces]


def _check_at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name}: expected at least 1, got {number}")


# When what happens ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """When an action begins and ends, in the unit of the costs."""

    action: Action
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each stage does what; the step begins at 0."""

    stages: tuple[tuple[Span, ...], ...]

    @property
    def duration(self) -> float:
        """Until the last stage has done all."""
        return max(spans[-1].end for spans in self.stages)

    @property
    def bubble(self) -> float:
        """How much of the stages' time is waiting, from 0 to 1."""
        busy = sum(span.end - span.begin for spans in self.stages for span in spans)
        return 1 - busy / (len(self.stages) * self.duration)

    @property
    def most_kept(self) -> tuple[int, ...]:
        """How many pieces' activations each stage keeps at once, at most."""
        return tuple(
            max(accumulate(1 if span.action.kind == FORWARD else -1 for span in spans))
            for spans in self.stages
        )


def timeline(
    schedule: Order, forward: float | Sequence[float] = 1.0, backward: float | Sequence[float] = 2.0
) -> Timeline:
    """When each action of ``schedule`` begins and ends, if each does so as soon as it can.

    ``forward`` and ``backward``: what a piece costs, on every stage or on each. This proves a schedule right:
    `InputError` names an action that is missing, is there twice, or can never begin.
    """
    costs = {
        FORWARD: _of_each_stage("forward", forward, len(schedule)),
        BACKWARD: _of_each_stage("backward", backward, len(schedule)),
    }
    _check_complete(schedule)
    ends: dict[tuple[int, Action], float] = {}
    spans: list[list[Span]] = [[] for _ in schedule]
    moves = True
    while moves:
        moves = False
        for stage, action in _next_actions(schedule, spans):
            needs = _needs(stage, action, len(schedule))
            if all(need in ends for need in needs):
                free = spans[stage][-1].end if spans[stage] else 0.0
                begin = max([free, *(ends[need] for need in needs)])
                ends[stage, action] = begin + costs[action.kind][stage]
                spans[stage].append(Span(action, begin, ends[stage, action]))
                moves = True
    for stage, action in _next_actions(schedule, spans):
        lacking = next(need for need in _needs(stage, action, len(schedule)) if need not in ends)
        raise InputError(
            f"schedule: expected an order in which every action can begin, but on stage {stage} {action} "
            f"waits for ever for {lacking[1]} on stage {lacking[0]}"
        )
    return Timeline(tuple(map(tuple, spans)))


def _next_actions(schedule: Order, spans: Sequence[Sequence[Span]]) -> list[tuple[int, Action]]:
    """(stage, what it does next) of the stages that have not done all."""
    return [
        (stage, actions[len(done)])
        for stage, (actions, done) in enumerate(zip(schedule, spans, strict=True))
        if len(done) < len(actions)
    ]


def _needs(stage: int, action: Action, stages: int) -> list[tuple[int, Action]]:
    """(stage, action) of what must end before: see the module."""
    if action.kind == FORWARD:
        return [(stage - 1, action)] if stage > 0 else []
    after = [(stage + 1, action)] if stage < stages - 1 else []
    return [(stage, Action(FORWARD, action.piece)), *after]


def _check_complete(schedule: Order) -> None:
    pieces = 1 + max((action.piece for actions in schedule for action in actions), default=-1)
    if pieces < 1:
        raise InputError("schedule: expected at least one stage and one piece, got none")
    every = [*_actions(FORWARD, range(pieces)), *_actions(BACKWARD, range(pieces))]
    for stage, actions in enumerate(schedule):
        found = Counter(actions)
        for action in [*every, *found]:
            expected = int(action in every)
            if found[action] != expected:
                raise InputError(
                    f"schedule: expected {action} {expected} times on stage {stage}, got {found[action]}"
                )


def _of_each_stage(name: str, cost: float | Sequence[float], stages: int) -> list[float]:
    costs = np.array(cost, float)
    if costs.shape not in ((), (stages,)) or not (costs > 0).all():
        raise InputError(f"{name}: expected a time above 0, or one for each of {stages} stages, got {cost!r}")
    every: list[float] = np.broadcast_to(costs, stages).tolist()
    return every


# Which layers on which stage ------------------------------------------------------------------------


def partition(costs: Sequence[float], stages: int) -> list[slice]:
    """Consecutive layers for each stage, at least one, so that the costliest stage costs least.

    With C(s, n) the cost of the costliest of s stages that share the first n layers, at best,

        C(s, n) = min over k of max(C(s - 1, k), costs[k] + ... + costs[n - 1])

    and the k of each minimum says where a stage begins. Time O(stages layers²).
    """
    _check_at_least_one(stages=stages)
    layers = len(costs)
    if layers < stages:
        raise InputError(
            f"stages: expected at least as many layers as stages, got {layers} layers and {stages} stages"
        )
    if not all(0 <= cost < np.inf for cost in costs):
        raise InputError(f"costs: expected numbers of at least 0, got {list(costs)}")
    sums = np.cumsum([0, *costs])
    best = np.full((stages + 1, layers + 1), np.inf)
    best[0, 0] = 0
    begins = np.zeros((stages + 1, layers + 1), int)
    for stage in range(1, stages + 1):
        for end in range(stage, layers + 1):
            costliest = np.maximum(best[stage - 1, :end], sums[end] - sums[:end])
            begins[stage, end] = costliest.argmin()
            best[stage, end] = costliest.min()

    bounds = [layers]
    for stage in range(stages, 0, -1):
        bounds.append(int(begins[stage, bounds[-1]]))
    return [slice(begin, end) for begin, end in pairwise(reversed(bounds))]


def measure_costs(
    layers: Sequence[Layer], x: Array, dtype: npt.DTypeLike = np.float32, repeats: int = 5
) -> list[float]:
    """Seconds of each layer's forward and backward on the micro-batch ``x`` [n, ...]: the median of some.

    Their parameters are of ``dtype``, and where ``x`` is; the layers themselves stay as they are. Each rank
    measures other times: measure on one, and let it tell the others.
    """
    xp = array_module(x)
    costs = []
    context = Context(training=True, positions=xp.arange(len(x)))
    for layer in layers:
        model = Sequential(layer, dtype=dtype, allocate=xp.zeros)
        _seconds(model, x, context)  # what is compiled or allocated at the first call is not its cost
        costs.append(median(_seconds(model, x, context) for _ in range(repeats)))
        x = model.forward(x, context)[0]
    return costs


def _seconds(model: Sequential, x: Array, context: Context) -> float:
    begin = _now(x)
    y, saved = model.forward(x, context)
    between = _now(y)
    dy = array_module(y).ones_like(y)
    resumed = _now(dy)
    model.backward(dy, saved)
    return between - begin + _now(dy) - resumed


def _now(x: Array) -> float:
    """The time when ``x`` is there, in seconds."""
    synchronise(x)
    return perf_counter()


# A stage's work -------------------------------------------------------------------------------------


class Form(NamedTuple):
    """What arrays that go from stage to stage have in common: all but the number of rows."""

    shape: Shape
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, array: Array) -> Form:
        return cls(array.shape[1:], array.dtype)

    def rows(self, number: int) -> npt.NDArray[Any]:
        return np.empty((number, *self.shape), self.dtype)


@dataclass
class Step:
    """One pass through a stage's actions: the pieces' ``rows``, and the form of what crosses to its sides.

    ``kept``: by piece, what its backward needs: what the layers saved, and on the last stage the gradient.
    """

    rows: Sequence[int]
    before: Form
    after: Form
    kept: dict[int, tuple[Saved, Array | None]] = field(default_factory=dict)
    loss: Array = 0.0
    backwards: int = 0  # done so far


class PipelineBackprop:
    """Gradients of a model whose layers lie on the ranks of ``comm``; collective, in the order of stages.

    ``model`` has this rank's layers, ``comm.rank`` is its stage. ``schedule``: a name from `SCHEDULES`, or
    each stage's actions. Every rank passes equal ``pieces`` and ``schedule``, and the same parts: of these
    the first stage uses ``x``, the last ``y`` and ``counts``, and each of them the ``context`` and the form
    of ``x``: its shape and dtype. With one stage it is a `Backprop`.

    ``bytes_sent``: by this rank, in all steps so far. ``most_kept``: of how many pieces this stage has kept
    activations at once. `close` gives MPI's communicator back; it is collective.

    The model may be on a GPU: what stages exchange then goes through the host's memory.

    Raises `InputError`, on all ranks, where arguments are wrong or differ. After an exception in a step make
    a new one: messages are still on their way.
    """

    def __init__(
        self, model: Sequential, loss: Loss, comm: MPI.Intracomm, pieces: int, schedule: str | Order = "1f1b"
    ):
        order = _agreed_order(comm, pieces, schedule)
        self.model = model
        self.loss = loss
        self.pieces = pieces
        self.bytes_sent = 0
        self.most_kept = 0
        self._comm = MPI.Intracomm(comm).Dup()  # no message of others is taken for one of these
        self._actions = order[comm.rank]
        self._evaluation = _actions(FORWARD, range(pieces))
        before = comm.rank - 1 if comm.rank > 0 else None
        after = comm.rank + 1 if comm.rank < comm.size - 1 else None
        self._source = {FORWARD: before, BACKWARD: after}
        self._target = {FORWARD: after, BACKWARD: before}
        self._forms: dict[Form, tuple[Form, Form]] = {}
        # Requests keep their buffers alive: others may write there, or read, also if a step is broken off.
        self._sends: list[MPI.Request] = []
        self._receives: list[MPI.Request] = []

    def gradients(self, part: Part, ready: Callable[[int], None]) -> Array:
        """Fill ``model.gradients``; the part's loss on the last stage, 0.0 on others.

        ``ready(i)``: the stage's gradient i is complete.
        """
        pieces = list(part.pieces(self.pieces))
        step = Step([len(piece) for piece in pieces], *self._find_forms(part.x))
        for action, received in self._arrivals(self._actions, step):
            if action.kind == FORWARD:
                self._forward(action, pieces[action.piece], received, step)
            else:
                self._backward(action, received, step, ready)
        self._finish_sends()
        return step.loss

    def outputs(self, x: Array) -> Array | None:
        """The model's outputs, as in use, on the last stage; None on others.

        In as many pieces, so that all stages are at work.
        """
        bounds = list(pairwise(chunk_bounds(len(x), self.pieces).tolist()))
        step = Step([end - begin for begin, end in bounds], *self._find_forms(x))
        results = []
        for action, received in self._arrivals(self._evaluation, step):
            y, _ = self.model.forward(x[slice(*bounds[action.piece])] if received is None else received)
            if self._is_last:
                results.append(y)
            self._send(y, action, step.after)
        self._finish_sends()
        return array_module(results[0]).concatenate(results) if self._is_last else None

    def close(self) -> None:
        """Free the communicator; collective."""
        self._comm.Free()

    @property
    def _is_last(self) -> bool:
        return self._target[FORWARD] is None

    def _forward(self, action: Action, piece: Part, received: Array | None, step: Step) -> None:
        y, saved = self.model.forward(piece.x if received is None else received, piece.context)
        self._send(y, action, step.after)
        dy = None
        if self._is_last:
            loss, dy = weighted_loss(self.loss, y, piece)
            step.loss += loss
        step.kept[action.piece] = saved, dy
        self.most_kept = max(self.most_kept, len(step.kept))

    def _backward(
        self, action: Action, received: Array | None, step: Step, ready: Callable[[int], None]
    ) -> None:
        saved, dy = step.kept.pop(action.piece)
        step.backwards += 1
        is_last = step.backwards == self.pieces
        told = ready if is_last else _nobody
        dx = self.model.backward(dy if received is None else received, saved, told, add=step.backwards > 1)
        self._send(dx, action, step.before)

    # -- messages

    def _find_forms(self, x: Array) -> tuple[Form, Form]:
        """Of what this stage gets and what it gives, where the first stage gets rows of ``x``.

        The first time a batch without rows goes through all stages.
        """
        key = Form.of(x)
        if key not in self._forms:
            before, after = self._source[FORWARD], self._target[FORWARD]
            own = key if before is None else self._comm.recv(source=before)
            given = Form.of(self.model.forward(beside(own.rows(0), self.model.parameters))[0])
            if after is not None:
                self._comm.send(given, dest=after)
            self._forms[key] = own, given
        return self._forms[key]

    def _arrivals(self, actions: Sequence[Action], step: Step) -> Iterator[tuple[Action, Array | None]]:
        """Each action, and what has come for it from a neighbour, if it needs any.

        An action's receive is posted one action earlier, so that the message comes beside the computation.
        """
        posted = self._receive(actions[0], step)
        for action, following in zip(actions, [*actions[1:], None], strict=True):
            arriving = posted
            posted = None if following is None else self._receive(following, step)
            if arriving is not None:
                self._wait(*arriving)
            yield action, None if arriving is None else beside(arriving[1], self.model.parameters)

    def _receive(self, action: Action, step: Step) -> tuple[MPI.Request, npt.NDArray[Any]] | None:
        source = self._source[action.kind]
        if source is None:
            return None
        form = step.before if action.kind == FORWARD else step.after
        buffer = form.rows(step.rows[action.piece])
        request = self._comm.Irecv(_words(buffer), source, tag=action.piece)
        self._receives.append(request)
        return request, buffer

    def _wait(self, request: MPI.Request, buffer: npt.NDArray[Any]) -> None:
        status = MPI.Status()
        while not request.Test(status):
            sleep(0)  # lets other threads and ranks have the core, and Ctrl-C through
        self._receives.remove(request)
        if status.Get_count(MPI.BYTE) != buffer.nbytes:
            raise RuntimeError(
                f"part: expected the same rows on all stages, but stage {status.source} has sent "
                f"{status.Get_count(MPI.BYTE)} bytes and stage {self._comm.rank} expects {buffer.nbytes}"
            )

    def _send(self, array: Array, action: Action, form: Form) -> None:
        """Begin to: the message goes out beside the computation."""
        target = self._target[action.kind]
        if target is None:
            return
        sent = np.ascontiguousarray(on_host(array), form.dtype)
        self._sends.append(self._comm.Isend(_words(sent), target, tag=action.piece))
        self.bytes_sent += sent.nbytes
        self._drop_finished_sends()

    def _finish_sends(self) -> None:
        while self._sends:
            self._drop_finished_sends()
            sleep(0)

    def _drop_finished_sends(self) -> None:
        self._sends = [request for request in self._sends if not request.Test()]


def _agreed_order(comm: MPI.Intracomm, pieces: int, schedule: str | Order) -> Order:
    """Each stage's actions, verified; compares what the ranks ask for."""
    every = comm.allgather((pieces, schedule))
    for rank, given in enumerate(every):
        for name, expected, got in zip(("pieces", "schedule"), every[0], given, strict=True):
            if got != expected:
                raise InputError(
                    f"{name}: expected the same on all ranks, got {expected!r} on rank 0, {got!r} on {rank}"
                )
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise InputError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
        return SCHEDULES[schedule](comm.size, pieces)
    timeline(schedule)
    if (len(schedule), len(schedule[0])) != (comm.size, 2 * pieces):
        raise InputError(
            f"schedule: expected one of {comm.size} stages and {pieces} pieces, "
            f"got one of {len(schedule)} stages and {len(schedule[0]) // 2} pieces"
        )
    return schedule


def _words(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same memory as unsigned integers: MPI knows integers of every size, but no 16-bit floats."""
    return array.reshape(-1).view(f"u{array.dtype.itemsize}")


def _nobody(i: int) -> None:
    """Where there is more to come, nothing is ready."""
