"""The training loop: the same steps on every rank, each with its own parts of every batch.

    for each epoch:
        for each global batch:                          the same on every rank
            for each own part of it:
                forward, loss, backward                 gradients of the batch's mean loss, from this part
            strategy.step()                             communicate, update
        evaluate on the test set                        each rank its parts, counts summed

With one rank this is ordinary SGD; with more, for synchronous strategies, the same up to the rounding of
sums.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter, time
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from mpicoll.communicator import Communicator
from mpicoll.faults import RankFailedError
from mpicoll.launch import usable_cpus
from mpicoll.schedule import chunk_bounds
from mpicoll.train.arrays import Array, array_module, on_host, synchronise
from mpicoll.train.augmentation import Augmentation
from mpicoll.train.backprop import Backprop, Part
from mpicoll.train.balance import Balance
from mpicoll.train.data import Dataset, check_labels
from mpicoll.train.devices import CPU, choose_device
from mpicoll.train.elastic import Lost, State, Tally, check_elastic, recover, whole_state
from mpicoll.train.errors import InputError, alone, raise_on_all
from mpicoll.train.keeping import Keeper, go_on
from mpicoll.train.layers import BatchNorm, Context, Layer
from mpicoll.train.losses import Loss, mean_squared_error, softmax_cross_entropy
from mpicoll.train.mesh import Mesh, build_model, make_mesh
from mpicoll.train.mirror import PARAMETERS
from mpicoll.train.optimizer import SGD, Optimizer
from mpicoll.train.pipeline import PipelineBackprop
from mpicoll.train.preemption import Rhythm, agreed
from mpicoll.train.prefetch import prefetched
from mpicoll.train.report import Progress
from mpicoll.train.sampling import class_weights, global_batches, sample_weights
from mpicoll.train.strategies import FixedOrder, Strategy, strategy_named

EVALUATED = 1024  # samples at a time
TALLIES = 3  # steps: survivors may be one step apart, and a tally is taken before its step has ended

T = TypeVar("T")


@dataclass(frozen=True)
class Epoch:
    """One epoch's figures over all ranks.

    ``train_loss`` is the mean over the epoch's samples, each at the step that learned from it; the test
    figures are those of the epoch's end. ``seconds`` is the slowest rank's time in the steps alone,
    ``communication`` the part of it that went into communicating and waiting, from 0 to 1 (mean over ranks).
    ``test_accuracy`` is None where there are no classes.
    """

    number: int
    step: int
    rate: float
    train_loss: float
    test_loss: float
    test_accuracy: float | None
    samples: int
    seconds: float
    communication: float


@dataclass
class Position:
    """Where training is: in this epoch, from 1, before this batch of it, from 0; ``step`` is of all."""

    epoch: int = 1
    batch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Batch:
    """This rank's part, or parts, of a global batch of ``count`` samples."""

    count: int
    parts: Sequence[tuple[int, Part]]  # with their numbers


@dataclass(frozen=True)
class Draft:
    """A batch before its samples are taken: which they are, and which of them are this rank's.

    ``rows``: by a part's number, what lies where in the batch; ``read``: what files have for it, if they do.
    """

    step: int
    epoch: int
    samples: npt.NDArray[np.int64]
    rows: Mapping[int, slice]
    read: Mapping[int, Array]


Stops = Callable[[], bool]


@dataclass(frozen=True)
class _Recipe:
    """What a trainer is made of, whichever ranks there are."""

    layers: Sequence[Layer]
    optimizer: Optimizer
    strategy: Callable[..., Strategy]
    options: Mapping[str, Any]
    pieces: int
    schedule: str
    balances: bool
    dtype: np.dtype[Any]
    allocate: Callable[[int, npt.DTypeLike], Array]


class Trainer:
    """Trains the model that ``layers`` make on ``data``, in batches of ``batch_size`` samples over all ranks.

    ``comm`` is any communicator with mpi4py's interface; every rank passes equal arguments. Making one is
    collective. What can be chosen:

    - ``loss``: by default softmax cross-entropy for classes, else the mean squared error.
    - ``optimizer``, ``learning_rate``: a number, or a function of the step such as `LearningRate`.
    - ``strategy``: a name, with ``options`` for it; see `mpicoll.train.strategies`.
    - ``mesh``: sizes such as ``{"data": 2, "pipeline": 2}``; see `mpicoll.train.mesh`.
    - ``pieces``: into how many a part of a batch is cut: micro-batches of the pipeline, else gradient
      accumulation. ``schedule``: of the pipeline, "1f1b" or "gpipe".
    - ``shards``: train deterministically, with every batch in as many logical shards, to the same bits at any
      number of ranks up to that.
    - ``balance``: give each rank the share of each batch that it is fast enough for.
    - ``weights`` [classes]: what the classes count for; "balanced" makes all count the same.
    - ``resample``: draw samples so that all classes are seen equally often.
    - ``augmentation``: see `mpicoll.train.augmentation`.
    - ``elastic``: when ranks die, the others go on; see `mpicoll.train.elastic`. For ranks with whole models,
      the strategies allreduce and sharded, and an MPI in which a job outlives a rank.
    - ``dtype``: of parameters and gradients.
    - ``device``: "cpu", or "cuda" for one of the node's GPUs, with CuPy; see `mpicoll.train.devices`. Not for
      ``shards``, ``elastic`` and compression.
    - ``allocate``: as for `Sequential`; by default vectors are where ``device`` says.

    Raises `InputError`, on all ranks, for what does not go together.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        layers: Sequence[Layer],
        data: Dataset,
        *,
        loss: Loss | None = None,
        optimizer: Optimizer | None = None,
        learning_rate: float | Callable[[int], float] = 0.05,
        strategy: str = "allreduce",
        options: Mapping[str, Any] | None = None,
        mesh: Mapping[str, int] | None = None,
        batch_size: int = 32,
        pieces: int = 1,
        schedule: str = "1f1b",
        shards: int | None = None,
        balance: bool = False,
        weights: npt.ArrayLike | str | None = None,
        resample: bool = False,
        augmentation: Augmentation | None = None,
        elastic: bool = False,
        seed: int = 0,
        dtype: npt.DTypeLike = np.float32,
        device: str = CPU,
        allocate: Callable[[int, npt.DTypeLike], Array] | None = None,
    ):
        self.batch_size, self.seed, self.shards, self.elastic = batch_size, seed, shards, elastic
        check_labels(data)
        _check_shards(comm, shards)
        _check_device(device, shards, elastic, options or {})
        self.device = choose_device(comm, device)
        self._parts = ExitStack()  # what is to be given up
        if self.device.is_gpu and not isinstance(comm, Communicator):
            comm = Communicator(comm)  # which knows of GPU memory, as many an MPI does not
            self._parts.callback(comm.Free)
        parts = make_mesh(comm, mesh or {})
        _check_together(parts, strategy, shards, balance)
        _check_layers(layers, strategy, shards, balance)
        if elastic:
            check_elastic(comm, parts.sizes, strategy)
        self.rate = learning_rate if callable(learning_rate) else lambda step: float(learning_rate)
        self.loss = loss or (softmax_cross_entropy if data.classes else mean_squared_error)
        self.data = data
        self._recipe = _Recipe(
            layers,
            optimizer or SGD(),
            FixedOrder if shards else strategy_named(strategy),
            {**_given(strategy, shards, elastic), **(options or {})},
            pieces,
            schedule,
            balance,
            np.dtype(dtype),
            allocate or self.device.zeros,
        )
        self.position = Position()
        self.samples = 0  # of the epoch so far
        self.history: list[Epoch] = []
        self._start = self._seconds_before = 0.0
        self.origins = list(range(comm.size))  # how this communicator's ranks were numbered at first
        self.lost: list[Lost] = []
        self.saved: State | None = None  # of the last state that all ranks had, until they have another
        self._lost_at = math.nan
        self.stopped = False
        self._make_parts(parts)
        self._check_outputs()
        self._labels = data.train_y
        self.class_weights = _class_weights(data, weights)
        self.sample_weights = _sample_weights(data) if resample else None
        self.augmentation = augmentation

    def _make_parts(self, mesh: Mesh) -> None:
        """All that depends on which ranks there are. Collective."""
        recipe = self._recipe
        self.comm, self.mesh = mesh.world, mesh
        self._parts.callback(mesh.free)
        sample = self.device.module.asarray(self._sample())
        self.model = build_model(recipe.layers, mesh, sample, self.seed, recipe.dtype, recipe.allocate)
        self._move_data()
        try:
            self.strategy = recipe.strategy(mesh.data, self.model, recipe.optimizer, **recipe.options)
        except ValueError as error:
            raise InputError(str(error)) from error
        self._parts.callback(self.strategy.close)
        _check_batch(self.batch_size, self.strategy.parts)
        self.backprop: Backprop | PipelineBackprop = Backprop(self.model, self.loss, recipe.pieces)
        if mesh.pipeline.size > 1:
            pipeline = PipelineBackprop(self.model, self.loss, mesh.pipeline, recipe.pieces, recipe.schedule)
            self._parts.callback(pipeline.close)
            self.backprop = pipeline
        self.balance = Balance(mesh.data) if recipe.balances else None
        self._set_sums(0.0)

    def _move_data(self) -> None:
        """To where the model is. Collective."""
        problem = ""
        try:
            self.data = self.data.beside(self.model.parameters)
        except MemoryError as error:
            problem = f"device: expected room for the samples of {self.data.name} on the GPU, but: {error}"
        if self.device.is_gpu:
            raise_on_all(self.comm, problem)

    def _sample(self) -> Array:
        """Inputs like those of a step."""
        numbers = np.arange(min(len(self.data.train_y), self.batch_size))
        return self.data.train_batch(numbers)[0].astype(self._recipe.dtype)

    def _set_sums(self, loss: float) -> None:
        """The epoch has had ``samples`` so far, whose losses add up to ``loss``."""
        xp = array_module(self.model.parameters)
        self.loss_sums = xp.zeros(self.strategy.parts)  # of the epoch so far, each own part's
        self.own_samples = 0  # that these are of
        is_first = 0 in self.strategy.own_parts
        if is_first:
            self.loss_sums[0], self.own_samples = loss, self.samples
        self.tallies = deque([Tally(self.position.step, self.own_samples, loss * is_first)], TALLIES)

    # -- the loop

    def train(
        self,
        epochs: int,
        progress: Progress | None = None,
        keeper: Keeper | None = None,
        patience: int | None = None,
        stops: Callable[[], bool] | None = None,
    ) -> list[Epoch]:
        """Train up to epoch ``epochs``; every epoch's figures, on the ranks that train.

        ``keeper`` writes checkpoints. With ``patience`` training ends after as many epochs without a
        smaller test loss. With ``stops``, on all ranks or on none, it ends soon after that returns true on
        any rank, all ranks at the same step, also within an epoch; ``stopped`` says so. (Where ranks are not
        in step, as in ps-async, each for itself.)

        With ``elastic`` what begins on many ranks may end on fewer: ``comm`` has those, ``lost`` says who
        died and when. Then nothing collective may follow on the communicator that the trainer was made with,
        and `mpicoll.train.leave` is the way to end the program.

        Raises `InputError`, on all ranks, when the loss is no number any more; `StateLostError`, on all that
        are left, if the others have taken something with them that nobody else had.
        """
        self._check_patience(patience)
        given = progress or Progress(), keeper or Keeper(), stops
        return self.elastically(lambda: self._train(epochs, patience, *given))

    def elastically(self, action: Callable[[], T]) -> T:
        """What ``action()`` returns; if ranks die meanwhile, with ``elastic``, it begins again on the others.

        For what is to follow the training, the training included: it goes on from where it is. The others are
        at the same step again when ``action`` begins again. Collective.
        """
        while True:
            try:
                return action()
            except RankFailedError as error:
                if not self.elastic:
                    raise
                self._lost_at = perf_counter()
                self.lost.append(recover(self, error))

    def move(self, comm: MPI.Intracomm, state: State) -> None:
        """Go on from ``state`` with the ranks of ``comm``. Collective over them."""
        bytes_sent = self.strategy.bytes_sent
        self._parts.close()
        self._make_parts(make_mesh(comm, {}))
        self.strategy.bytes_sent = bytes_sent
        vectors = dict(state.vectors)
        self.model.parameters[...] = vectors.pop(PARAMETERS)
        go_on(self, vectors, state.facts)
        self.saved = state

    def _train(
        self, epochs: int, patience: int | None, progress: Progress, keeper: Keeper, stops: Stops | None
    ) -> list[Epoch]:
        if self.elastic and self.saved is None:
            self.saved = whole_state(self)
        keeper.begin(self)
        self.stopped, self._rhythm = False, Rhythm(self.position.step)
        steps = self.steps_per_epoch
        threads = 1 if self.shards else blas_threads(self.comm)
        # A learning rate that is too high ends in the check of the loss, not in warnings from every rank.
        with (
            self._sharing_errors(),
            threadpool_limits(threads, user_api="blas"),
            np.errstate(over="ignore", invalid="ignore"),
            self._observed(progress.of(epochs, steps, self.position.step)),
        ):
            if self.strategy.serves_only:
                self.strategy.serve()
            else:
                self.strategy.start()
                self._tell_of_losses(progress)
                while self.position.epoch <= epochs and not (self.stopped or self._had_enough(patience)):
                    self._epoch(progress, keeper, stops)
            self.strategy.finish()
        keeper.close(self)
        return self.history

    def _tell_of_losses(self, progress: Progress) -> None:
        """Of the last ones, if they are new."""
        if math.isnan(self._lost_at):
            return
        progress.note(f"{self.lost[-1]}; {self.comm.size} left")
        if self.strategy.own_arrays():
            progress.note("the error feedback of compression begins anew")

    @property
    def steps_per_epoch(self) -> int:
        """How many batches there are."""
        return math.ceil(len(self.data.train_y) / self.batch_size)

    def evaluate(self) -> tuple[float, float | None]:
        """Mean loss and, with classes, accuracy over the whole test set. Collective."""
        parts = self.strategy.parts
        sums = array_module(self.model.parameters).zeros((3, parts))
        bounds = chunk_bounds(len(self.data.test_y), parts).tolist()
        for part in self.strategy.own_test_parts:
            for begin in range(bounds[part], bounds[part + 1], EVALUATED):
                rows = slice(begin, min(begin + EVALUATED, bounds[part + 1]))
                self._add_evaluation(rows, sums[:, part])
        loss, right, count = self._total(on_host(sums))
        if not count:
            return math.nan, None
        return loss / count, right / count if self.data.classes else None

    def parameter_count(self) -> int:
        """How many parameters and statistics the whole model has. Collective."""
        placements = zip(self.model.names, self.model.placements, strict=True)
        own = {name: math.prod(placement.shape) for name, placement in placements}
        counts: dict[str, int] = {}
        for sizes in self.mesh.model.allgather(own):
            counts |= sizes
        return sum(counts.values())

    def _check_outputs(self) -> None:
        """Raise `InputError`, on all ranks, unless the layers go with the data, and with each other."""
        try:
            outputs = self.backprop.outputs(self._sample()[:0])
        except ValueError as error:  # a pipeline's layers were tried before: see `mpicoll.train.mesh`
            raise InputError(str(error)) from error
        shapes = self.comm.allgather(None if outputs is None else outputs.shape[1:])
        got = next(shape for shape in shapes if shape is not None)
        if got != (self.data.outputs,):
            raise InputError(
                f"layers: expected outputs of {self.data.outputs} numbers for each sample of "
                f"{self.data.name}, got {' x '.join(map(str, got))}"
            )

    def loss_so_far(self) -> float:
        """The sum of the losses of the epoch so far, over all samples; as if they had all counted alike.

        Where ranks take steps of their own, and are not at the same one, an estimate from this rank's.
        """
        if not (self.strategy.in_step or self.strategy.synchronous):
            return float(self.loss_sums.sum()) * self.strategy.parts
        return self._total(on_host(self.loss_sums)[None])[0]

    def seconds_so_far(self) -> float:
        """Those of the epoch, in this run and the ones before it."""
        return perf_counter() - self._start

    def go_on(self, facts: Mapping[str, Any]) -> None:
        """Be where a checkpoint's facts say; see `mpicoll.train.keeping`."""
        self.position = Position(facts["epoch"], facts["batch"], facts["step"])
        self.history = [Epoch(**epoch) for epoch in facts["history"]]
        self.samples = facts["samples_of_epoch"]
        self._seconds_before = facts["seconds_of_epoch"]
        self._start = perf_counter() - self._seconds_before
        self._set_sums(facts["loss_of_epoch"])

    def close(self) -> None:
        """Give up threads, and communicators, but not ``comm``. Collective."""
        self._parts.close()

    @contextmanager
    def _sharing_errors(self) -> Iterator[None]:
        """An `InputError` that only one rank meets, as on a disk that is full, is raised on all of them."""
        error: InputError | None = None
        try:
            yield
        except InputError as met:
            error = met
        errors = self.comm.allgather(error) if self.strategy.in_step else [error]
        for met_by_any in filter(None, [error, *errors]):
            raise met_by_any

    @contextmanager
    def _observed(self, observer: AbstractContextManager[None]) -> Iterator[None]:
        """``observer`` around the training, whose own errors only this rank meets."""
        observer.__enter__()
        try:
            yield
        except BaseException as error:
            observer.__exit__(type(error), error, error.__traceback__)
            raise
        with alone(self.strategy.in_step):
            observer.__exit__(None, None, None)

    def _check_patience(self, patience: int | None) -> None:
        reasons = {
            "rank 0 alone evaluates in ps-async, and the others would not hear of it": not (
                self.strategy.in_step or self.strategy.synchronous
            ),
            f"there are no test samples in {self.data.name}": not len(self.data.test_y),
        }
        for reason, applies in reasons.items():
            if patience is not None and applies:
                raise InputError(f"patience: expected none, got {patience}, but {reason}")

    def _had_enough(self, patience: int | None) -> bool:
        losses = [epoch.test_loss for epoch in self.history]
        return patience is not None and bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience

    def _epoch(self, progress: Progress, keeper: Keeper, stops: Stops | None) -> None:
        communicated = self.strategy.seconds
        self._start = perf_counter() - self._seconds_before
        with closing(self._batches()) as batches:
            for batch in batches:
                self._step(batch)
                progress.step(batch.count)
                # At the end of an epoch its figures come first: the keeper hears of them below.
                if keeper.is_due(self.position.step) and self.position.batch < self.steps_per_epoch:
                    synchronise(self.model.parameters)
                    begin = perf_counter()
                    self._check_loss()
                    keeper.keep(self)
                    self._start += perf_counter() - begin  # that was no training
                self.stopped = stops is not None and self._agree_to_stop(stops)
                if self.stopped:
                    return
        synchronise(self.model.parameters)  # or a GPU's work would be nobody's time
        epoch = self._figures(self.seconds_so_far(), self.strategy.seconds - communicated)
        self.history.append(epoch)
        self.position.epoch += 1
        self.position.batch = 0
        self.samples = 0
        self._set_sums(0.0)
        self._seconds_before = 0.0
        self._all_have_gone_on()
        with self._sharing_errors(), alone(self.strategy.in_step):
            progress.epoch(epoch)
        keeper.epoch(self, epoch)

    def _agree_to_stop(self, stops: Stops) -> bool:
        if not (self.strategy.in_step or self.strategy.synchronous):
            return stops()
        slowest = partial(self._over_ranks, op=MPI.MAX)
        return agreed(self._rhythm, self.position.step, stops, slowest)

    def _all_have_gone_on(self) -> None:
        """All ranks have been here, so nobody goes back to the state that was saved."""
        self.saved = None
        if not math.isnan(self._lost_at):
            seconds = perf_counter() - self._lost_at
            self.lost[-1] = replace(self.lost[-1], seconds=seconds, at=time())
            self._lost_at = math.nan

    def _figures(self, seconds: float, communicated: float) -> Epoch:
        train_loss = self._check_loss()
        slowest = self._over_ranks([seconds], MPI.MAX)[0]
        waited, ranks = self._over_ranks([communicated / seconds if seconds else 0.0, 1.0], MPI.SUM)
        with self.strategy.consensus():
            test_loss, test_accuracy = self.evaluate()
        position, rate = self.position, self.rate(self.position.step - 1)
        figures = train_loss, test_loss, test_accuracy, self.samples, slowest, waited / ranks
        return Epoch(position.epoch, position.step, rate, *figures)

    def _check_loss(self) -> float:
        """The mean loss of the epoch so far; `InputError`, on all ranks, if it is no number."""
        train_loss = self._total(on_host(self.loss_sums)[None])[0] / max(1, self.samples)
        if not math.isfinite(train_loss):
            raise InputError(
                f"expected the training loss to be a number, found {train_loss} in epoch "
                f"{self.position.epoch}; lower the learning rate (--lr)"
            )
        return train_loss

    # -- steps

    def _step(self, batch: Batch) -> None:
        """One step on this rank's parts of a global batch."""
        share, computed, start = 0.0, 0, perf_counter()
        losses, step = self.loss_sums.copy(), self.position.step
        for number, part in batch.parts:
            loss = self.backprop.gradients(part, self.strategy.ready)
            self.strategy.complete(number)
            losses[number] += loss * batch.count
            share += part.context.share
            computed += len(part)
        if self.balance is not None:
            synchronise(self.model.gradients)
        seconds = perf_counter() - start
        if self.elastic:
            # Should this rank be stopped in the step, another one may have finished it.
            self.tallies.append(Tally(step + 1, self.own_samples + computed, float(losses.sum())))
        self.strategy.step(self.rate(step), share)
        self.loss_sums = losses
        self.own_samples += computed
        self.samples += batch.count
        self.position.step += 1
        self.position.batch += 1
        if self.saved is not None:
            self._all_have_gone_on()
        if self.balance is not None:
            # Ranks that hold one model together have the same parts.
            slowest = self.mesh.model.allreduce(seconds, MPI.MAX)
            self.balance.record(step, computed, slowest)

    def _batches(self) -> Generator[Batch, None, None]:
        """The rest of the epoch's batches.

        Made ahead in a thread where making one takes time. For a GPU, which makes them by itself, that thread
        reads files only: it does not know which GPU is meant.
        """
        position = self.position
        numbers = global_batches(
            len(self.data.train_y),
            self.batch_size,
            self.seed,
            position.epoch,
            self.sample_weights,
            position.batch,
        )
        first, epoch = position.step, position.epoch
        drafts = (self._draft(first + i, epoch, samples) for i, samples in enumerate(numbers))
        if array_module(self.model.parameters) is not np:
            return self._made(prefetched(drafts) if self.data.is_mapped else drafts)
        batches = self._made(drafts)
        return prefetched(batches) if self.augmentation or self.data.is_mapped else batches

    def _made(self, drafts: Generator[Draft, None, None]) -> Generator[Batch, None, None]:
        with closing(drafts):
            for draft in drafts:
                yield self._batch(draft)

    def _draft(self, step: int, epoch: int, samples: npt.NDArray[np.int64]) -> Draft:
        count = len(samples)
        bounds = (
            self.balance.bounds(step, count) if self.balance else chunk_bounds(count, self.strategy.parts)
        )
        slices = [slice(begin, end) for begin, end in pairwise(bounds.tolist())]
        rows = {number: slices[number] for number in self.strategy.own_parts}
        read = {number: self.data.read(samples[own]) for number, own in rows.items() if self.data.is_mapped}
        return Draft(step, epoch, samples, rows, read)

    def _batch(self, draft: Draft) -> Batch:
        counts = self._counts(draft.samples)
        parts = [(number, self._part(draft, number, counts)) for number in draft.rows]
        return Batch(len(draft.samples), parts)

    def _counts(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """What each sample of a batch counts for in its loss: 1 altogether."""
        if self.class_weights is None:
            return np.full(len(samples), 1 / len(samples))
        weights = self.class_weights[self._labels[samples]]
        total = float(weights.sum())
        counts: npt.NDArray[np.float64] = weights / total if total > 0 else weights
        return counts

    def _part(self, draft: Draft, number: int, counts: Array) -> Part:
        rows = draft.rows[number]
        own = draft.samples[rows]
        x, y = self.data.train_batch(own, draft.read.get(number))
        if self.augmentation is not None:
            x = self.augmentation.apply(x, own, self.seed, draft.epoch, self.data.black)
        xp, dtype = array_module(x), self.model.parameters.dtype
        positions = xp.arange(rows.start, rows.stop)
        share = (rows.stop - rows.start) / len(draft.samples)
        context = Context(True, draft.step, positions, share, self.seed)
        return Part(x.astype(dtype, copy=False), y, xp.asarray(counts[rows]), context)

    def _add_evaluation(self, rows: slice, sums: Array) -> None:
        """Add to ``sums`` [3] those of some test samples: of losses, of right answers, and their number."""
        x, y = self.data.test_batch(rows)
        outputs = self.backprop.outputs(x.astype(self.model.parameters.dtype, copy=False))
        if outputs is None:
            return
        losses, _ = self.loss(outputs, y)
        sums[0] += losses.sum()
        if self.data.classes:
            sums[1] += (outputs.argmax(axis=1) == y).sum()
        sums[2] += len(x)

    def _total(self, sums: npt.NDArray[np.float64]) -> list[float]:
        """Each row of ``sums`` [rows, parts], of which every part is one rank's, over all parts.

        A part's sum is added to zeros only, and then all are added exactly: the same at any rank count.
        """
        own = sums if self.mesh.speaks else np.zeros_like(sums)
        if self.mesh.model.size > 1:
            own = own.copy()
            self.mesh.model.Allreduce(MPI.IN_PLACE, own)
        every = self.strategy.total(own.ravel().tolist()).reshape(own.shape)
        return [math.fsum(row) if np.isfinite(row).all() else math.nan for row in every]

    def _over_ranks(self, values: list[float], op: MPI.Op) -> list[float]:
        """Each of ``values`` over all ranks that train."""
        own = np.array(values)
        self.mesh.model.Allreduce(MPI.IN_PLACE, own, op=op)
        every: list[float] = self.strategy.total(own.tolist(), op).tolist()
        return every


def blas_threads(comm: MPI.Intracomm) -> int:
    """How many threads this rank's BLAS may use: its cores, shared with the ranks that use them too.

    Each rank's BLAS would otherwise start a thread per core, and the ranks would keep each other waiting.
    """
    own = os.sched_getaffinity(0)
    machine = Path("/proc/sys/kernel/random/boot_id").read_text()
    everyones = comm.allgather((machine, own))
    sharers: int = sum(other == machine and bool(own & cores) for other, cores in everyones)
    return max(1, usable_cpus() // sharers)


def _class_weights(data: Dataset, weights: npt.ArrayLike | str | None) -> npt.NDArray[np.float64] | None:
    if weights is None:
        return None
    if not data.classes:
        raise InputError(f"class weights: expected a data set with classes, got {data.name}, which has none")
    if isinstance(weights, str):
        return class_weights(data.train_y, data.classes).astype(np.float64)
    return np.asarray(weights, np.float64)


def _sample_weights(data: Dataset) -> npt.NDArray[np.float64]:
    if not data.classes:
        raise InputError(f"resample: expected a data set with classes, got {data.name}, which has none")
    return sample_weights(data.train_y, data.classes)


def _given(strategy: str, shards: int | None, elastic: bool) -> dict[str, Any]:
    """Options of a strategy that follow from the trainer's."""
    if shards is not None:
        return {"shards": shards}
    return {"mirrored": True} if elastic and strategy == "sharded" else {}


def _check_shards(comm: MPI.Intracomm, shards: int | None) -> None:
    if shards is not None and comm.size > shards:
        raise InputError(
            f"shards: expected at least as many as ranks ({comm.size}), got {shards}; "
            "raise --shards or start fewer ranks"
        )


def _check_device(device: str, shards: int | None, elastic: bool, options: Mapping[str, Any]) -> None:
    """Raise `InputError` for what a GPU is not for."""
    reasons = {
        "shards: a GPU's sums are not shown to have the same bits at any number of ranks": shards,
        "elastic: what a GPU is doing when a rank dies cannot be broken off": elastic,
        "compression: it is work for a CPU; wire_dtype makes messages smaller": options.get("compression"),
    }
    for reason, applies in reasons.items():
        if device != CPU and applies:
            raise InputError(f"device: expected cpu, got {device} beside {reason}")


def _check_batch(batch_size: int, parts: int) -> None:
    if batch_size < parts:
        raise InputError(
            f"batch size: expected at least {parts} samples, one for each rank or shard that shares a batch, "
            f"got {batch_size}; raise --batch-size or start fewer ranks"
        )


def _check_together(mesh: Mesh, strategy: str, shards: int | None, balance: bool) -> None:
    """Raise `InputError` for choices that do not go together."""
    if mesh.model.size > 1 and strategy.startswith("ps"):
        raise InputError(
            f"strategy: expected allreduce, sharded, local or gossip with a mesh whose ranks hold parts of a "
            f"model, got {strategy}"
        )
    if shards is not None and (strategy != "allreduce" or mesh.model.size > 1 or balance):
        raise InputError(
            "shards: deterministic training is for the strategy allreduce, with whole models on all ranks "
            f"and without balance; got {strategy}, mesh {mesh.sizes}, balance {balance}"
        )
    if balance and strategy not in ("allreduce", "sharded"):
        raise InputError(
            "balance: expected the strategy allreduce or sharded, where ranks wait for each other, "
            f"got {strategy}"
        )


def _check_layers(layers: Sequence[Layer], strategy: str, shards: int | None, balance: bool) -> None:
    """Raise `InputError` where layers that wait for other ranks do not go with the rest."""
    if not any(isinstance(layer, BatchNorm) and layer.synchronised for layer in layers):
        return
    reasons = {
        "sums over all ranks, in an order that depends on them, which is not deterministic": shards
        is not None,
        "waits for the other ranks, so how fast a rank is cannot be measured for balance": balance,
        f"needs ranks in step, which the strategy {strategy} is not": strategy
        not in ("allreduce", "sharded"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise InputError(f"batch norm: expected it per rank, got synchronised, which {reason}")
