"""Parameter servers: the steps of one process, bounds on staleness, whole reads, ranks that leave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll.faults import RankFailedError
from mpicoll.train.errors import InputError
from mpicoll.train.layers import BatchNorm, Layer, Linear
from mpicoll.train.model import Sequential
from mpicoll.train.optimizer import LARS, SGD, Adam, Optimizer
from mpicoll.train.strategies import AsyncParameterServer, ParameterServer
from mpicoll.train.strategies import server as protocol
from mpicoll.train.strategies.server import AsynchronousServer, Server, Worker

from .examples import Array

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
SERVERS = sorted({0, 1, SIZE - 1} & set(range(SIZE)))
STEPS = 7
BOTH = [ParameterServer, AsyncParameterServer]

every_rank_count = pytest.mark.algorithms
several_ranks = pytest.mark.skipif(SIZE == 1, reason="needs another rank")
servers_of_all = pytest.mark.parametrize("servers", SERVERS)


def layers() -> list[Layer]:
    """More than one shard, bounds of shards within tensors, statistics."""
    return [Linear(5, 7), BatchNorm(7), Linear(7, 3)]


def model_of(*parts: Layer, seed: int = RANK) -> Sequential:
    return Sequential(*(parts or layers()), seed=seed, dtype=np.float64)


def shares(workers: int, step: int) -> Array:
    """Uneven, different in every step; some workers have nothing."""
    samples = np.array([(5 * worker + 3 * step) % 4 for worker in range(workers)], np.float64)
    samples[step % workers] += 1
    return np.asarray(samples / samples.sum())


def gradient(w: Array, worker: int, step: int, share: float) -> Array:
    """What the worker's samples give at ``w``: other ones for each worker, step and element."""
    index = np.arange(w.size)
    curvature = 1 + (index * 7 + worker * 3 + step) % 5
    minimum = ((index * 3 + worker * 5 + step * 2) % 11 - 5) / 5
    return np.asarray(share * curvature * (w - minimum))


def train(strategy: ParameterServer, steps: range = range(STEPS), finishes: bool = True) -> None:
    """What a rank does in a training."""
    if strategy.serves_only:
        strategy.serve()
        return
    if not strategy._is_running:
        strategy.start()
    model = strategy.model
    for step in steps:
        share = float(shares(strategy.parts, step)[RANK])
        model.gradients[...] = gradient(model.parameters, RANK, step, share)
        strategy.step(0.01 * (step + 1), share)
    if finishes:
        strategy.finish()


def alone(optimizer: Optimizer, model: Sequential, workers: int, steps: range = range(STEPS)) -> None:
    """The same on one process."""
    optimizer.bind(model.parameters, model.tensors)
    for step in steps:
        parts = [gradient(model.parameters, i, step, c) for i, c in enumerate(shares(workers, step))]
        optimizer.step(sum(parts), 0.01 * (step + 1))


OPTIMIZERS: list[Callable[[], Optimizer]] = [
    lambda: SGD(momentum=0.0),
    lambda: SGD(weight_decay=0.1, nesterov=True),
    lambda: SGD(clip_norm=0.5),
    lambda: Adam(weight_decay=0.01),
    lambda: LARS(weight_decay=0.1),
]


@every_rank_count
@servers_of_all
@pytest.mark.parametrize("make", OPTIMIZERS, ids=["sgd", "nesterov", "clipped", "adam", "lars"])
def test_synchronous_steps_are_those_of_one_process(servers: int, make: Callable[[], Optimizer]) -> None:
    model, expected = model_of(), model_of(seed=0)
    strategy = ParameterServer(WORLD, model, make(), servers)
    reference = make()
    alone(reference, expected, strategy.parts)
    train(strategy)
    np.testing.assert_allclose(model.parameters, expected.parameters, rtol=0, atol=1e-12)
    assert len(set(WORLD.allgather(model.parameters.tobytes()))) == 1
    vectors = strategy.vectors()
    assert sorted(vectors) == ([] if RANK else sorted(reference.state))
    for name, vector in vectors.items():
        np.testing.assert_allclose(vector, reference.state[name], rtol=0, atol=1e-12)
    assert RANK or strategy.optimizer.steps == STEPS
    strategy.close()


@every_rank_count
@servers_of_all
def test_what_is_sent(servers: int) -> None:
    model = model_of()
    strategy = ParameterServer(WORLD, model, SGD(), servers)
    train(strategy)
    workers, n = SIZE - servers, model.parameters.nbytes
    total = WORLD.allreduce(strategy.bytes_sent)
    # Every worker pushes and reads all, but for what it holds itself.
    assert total == STEPS * 2 * (workers * n - (0 if servers else n))
    strategy.close()


@every_rank_count
@servers_of_all
@pytest.mark.parametrize("kind", BOTH)
def test_fewer_parameters_than_servers(servers: int, kind: type[ParameterServer]) -> None:
    model, expected = model_of(Linear(1, 1)), model_of(Linear(1, 1), seed=0)
    strategy = kind(WORLD, model, SGD(), servers)
    train(strategy)
    assert len(set(WORLD.allgather(model.parameters.tobytes()))) == 1
    if kind is ParameterServer or strategy.parts == 1:
        alone(SGD(), expected, strategy.parts)
        np.testing.assert_allclose(model.parameters, expected.parameters, rtol=0, atol=1e-12)
    strategy.close()


@servers_of_all
def test_gradients_of_megabytes(servers: int) -> None:
    model, expected = model_of(Linear(600, 501)), model_of(Linear(600, 501), seed=0)
    strategy = ParameterServer(WORLD, model, SGD(), servers)
    alone(SGD(), expected, strategy.parts)
    train(strategy)
    np.testing.assert_allclose(model.parameters, expected.parameters, rtol=0, atol=1e-12)
    strategy.close()


@servers_of_all
@pytest.mark.parametrize("kind", BOTH)
def test_training_goes_on_from_a_state(servers: int, kind: type[ParameterServer]) -> None:
    strategy = kind(WORLD, model_of(), Adam(), servers)
    if strategy.parts > 1 and not strategy.synchronous:
        strategy.close()
        pytest.skip("asynchronous workers take other steps each time")
    state: dict[str, Array] = {}
    begun = np.zeros_like(strategy.model.parameters)
    if strategy.serves_only:
        strategy.serve()
    else:
        train(strategy, range(5), finishes=False)
        state = strategy.vectors()  # between two steps of rank 0's
        begun[...] = strategy.model.parameters
        train(strategy, range(5, STEPS))
    vectors = WORLD.bcast(state)
    assert set(vectors) == {"mean", "square"}
    again = kind(WORLD, model_of(), Adam(), servers)
    again.model.parameters[...] = WORLD.bcast(begun)
    again.restore(vectors, 5)
    train(again, range(5, STEPS))
    np.testing.assert_allclose(again.model.parameters, strategy.model.parameters, rtol=0, atol=1e-12)
    again.vectors()
    assert RANK or again.optimizer.steps == STEPS
    strategy.close()
    again.close()


# -- asynchronous


def descend(strategy: ParameterServer, steps: int, rate: float = 0.3) -> float:
    """Minimise functions of the workers that have the same minimum; how far it is in the end."""
    model = strategy.model
    minimum = np.arange(model.parameters.size) % 7 - 3.0
    curvature = 0.5 + (np.arange(minimum.size) + RANK) % 3 / 2
    curvature[model.tensors.trainable :] = 0.3  # statistics move by as much as they are told
    if strategy.serves_only:
        strategy.serve()
    else:
        strategy.start()
        for step in range(steps):
            share = float(shares(strategy.parts, step)[RANK])
            model.gradients[...] = share * curvature * (model.parameters - minimum)
            strategy.step(rate, share)
        strategy.finish()
    return float(np.abs(model.parameters - minimum).max())


@every_rank_count
@servers_of_all
@pytest.mark.parametrize(
    "staleness, make",
    [
        (0, lambda: SGD(momentum=0.5)),
        (3, lambda: SGD(momentum=0.0, clip_norm=20.0)),
        (None, lambda: SGD(momentum=0.0)),
    ],
    ids=["together", "bounded", "unbounded"],
)
def test_asynchronous_steps_converge(servers: int, staleness: Any, make: Callable[[], Optimizer]) -> None:
    strategy = AsyncParameterServer(WORLD, model_of(), make(), servers, staleness)
    assert descend(strategy, 80) < 1e-3
    assert len(set(WORLD.allgather(strategy.model.parameters.tobytes()))) == 1
    assert strategy.lost == ()
    strategy.close()


def test_asynchronous_steps_of_one_worker_are_those_of_one_process() -> None:
    """Its staleness is 0; a mean gradient is what it is, and so are statistics."""
    model, expected, servers = model_of(), model_of(seed=0), SIZE - 1
    strategy = AsyncParameterServer(WORLD, model, SGD(weight_decay=0.1, clip_norm=0.5), servers)
    train(strategy)
    alone(SGD(weight_decay=0.1, clip_norm=0.5), expected, 1)
    np.testing.assert_allclose(model.parameters, expected.parameters, rtol=0, atol=1e-12)
    strategy.close()


@every_rank_count
@servers_of_all
def test_an_asynchronous_update(servers: int) -> None:
    """One push of each worker, all from the first parameters: mean gradients at rates of their shares."""
    model, expected = model_of(), model_of(seed=0)
    strategy = AsyncParameterServer(WORLD, model, SGD(momentum=0.0), servers, staleness=0)
    parts = strategy.parts
    begun = expected.parameters.copy()
    trained = model.tensors.trainable
    for worker in range(parts):
        c = (worker + 1) / (parts * (parts + 1) / 2)
        g = gradient(begun, worker, 0, c)
        expected.parameters[:trained] -= 0.1 * g[:trained]
        expected.parameters[trained:] -= g[trained:]
    if strategy.serves_only:
        strategy.serve()
    else:
        strategy.start()
        c = (RANK + 1) / (parts * (parts + 1) / 2)
        model.gradients[...] = gradient(begun, RANK, 0, c)
        strategy.step(0.1, c)
        strategy.finish()
    np.testing.assert_allclose(model.parameters, expected.parameters, rtol=0, atol=1e-12)
    strategy.close()


@several_ranks
@pytest.mark.parametrize("staleness", [0, 2, None])
@pytest.mark.parametrize("servers", [n for n in SERVERS if n < SIZE - 1])
def test_nobody_is_further_ahead(
    servers: int, staleness: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    leads: list[int] = []
    reply = Server._reply

    def recorded(self: Server, worker: Worker, data: Any = None) -> None:
        others = [other.clock for other in self.workers if not other.is_done]
        if worker.waits_for == protocol.PUSH:
            leads.append(worker.clock - min(others))
        reply(self, worker, data)

    monkeypatch.setattr(Server, "_reply", recorded)
    strategy = AsyncParameterServer(WORLD, model_of(), SGD(), servers, staleness)
    if strategy.serves_only:
        strategy.serve()
    else:
        strategy.start()
        for _ in range(20):
            time.sleep(0.005 if RANK == 0 else 0)
            strategy.model.gradients[...] = 0
            strategy.step(0.1, 1 / strategy.parts)
        strategy.finish()
    if strategy.server:
        assert max(leads) > 2 if staleness is None else max(leads) == staleness
    strategy.close()


@pytest.mark.skipif(SIZE < 3, reason="needs two workers and a server")
def test_a_slow_worker_stops_nobody() -> None:
    """Worker 0 does not take its second step before the others have taken all of theirs."""
    strategy = AsyncParameterServer(WORLD, model_of(), SGD(), servers=1)
    if strategy.serves_only:
        strategy.serve()
    else:
        strategy.start()
        for step in range(50):
            if RANK == 0 and step == 1:
                for other in range(1, strategy.parts):
                    assert WORLD.recv(source=other) == 50
            strategy.model.gradients[...] = 0
            strategy.step(0.1, 1 / strategy.parts)
        if RANK:
            WORLD.send(50, 0)
        strategy.finish()
    strategy.close()


def test_rates_by_staleness() -> None:
    """The paper's 1/t of a mean gradient, from as many updates on as there are workers."""
    window, watch = protocol.Window(WORLD, [0], [0, 3], np.dtype("f8")), protocol.Watch(WORLD)
    server = AsynchronousServer(WORLD, range(4), window, np.zeros(3), SGD(), watch, fatal=())
    assert [server.slowed(t) for t in (0, 1, 4, 5, 8, 40)] == [1, 1, 1, 0.8, 0.5, 0.1]
    window.free()


@pytest.mark.parametrize("op, expected", [(MPI.SUM, 1), (MPI.MAX, 0), (MPI.MIN, -1)])
@pytest.mark.parametrize("servers", [n for n in SERVERS if n < 2])
def test_totals_are_those_of_who_has_called(servers: int, op: MPI.Op, expected: int) -> None:
    strategy = AsyncParameterServer(WORLD, model_of(), SGD(), servers)
    known = np.arange(RANK + 1)
    totals = {1: (known + 1).sum() * strategy.parts / known.size, 0: RANK + 1, -1: 1}
    if strategy.serves_only:
        strategy.serve()
    else:
        assert strategy.total([1.0])[0] == strategy.parts  # nothing runs yet
        strategy.start()
        for _ in range(3):
            if RANK:  # one worker after the other
                WORLD.recv(source=RANK - 1)
            found = strategy.total([RANK + 1.0, -float(RANK), 7.0], op)
            assert found.shape == (3,)
            assert found[0] == pytest.approx(totals[expected], abs=1e-12)
            if strategy.parts > 1:
                WORLD.send(None, (RANK + 1) % strategy.parts)
            if strategy.parts > 1 and RANK == 0:
                WORLD.recv(source=strategy.parts - 1)
        strategy.finish()
        assert strategy.total([1.0])[0] == strategy.parts
    strategy.close()


def test_only_rank_0_evaluates() -> None:
    strategy = AsyncParameterServer(WORLD, model_of(), SGD(), SERVERS[-1])
    assert strategy.own_test_parts == (range(strategy.parts) if RANK == 0 else range(0))
    strategy.close()


def test_the_newest_parameters_are_what_all_stand_for() -> None:
    """Worker 0 sees what the others have done since."""
    strategy = AsyncParameterServer(WORLD, model_of(Linear(3, 3)), SGD(momentum=0.0))
    strategy.start()
    before = strategy.model.parameters.copy()
    if RANK:
        strategy.model.gradients[...] = 1 / strategy.parts
        strategy.step(1.0, 1 / strategy.parts)
    WORLD.Barrier()
    with strategy.consensus():
        moved = before - strategy.model.parameters
    np.testing.assert_allclose(moved, (SIZE - 1) / SIZE, rtol=0, atol=1e-12)
    strategy.finish()
    strategy.close()


# -- the window


@pytest.mark.parametrize("count", [1, 5, 40_001])
def test_reads_are_never_torn(count: int) -> None:
    """Every version has one value everywhere; it is read while it is written, by all ranks from all."""
    bounds = [count * rank // 2 for rank in range(SIZE + 1)]
    window = protocol.Window(WORLD, range(SIZE), bounds, np.dtype("f8"))
    shard = np.zeros(bounds[RANK + 1] - bounds[RANK])
    window.publish(shard, 0)
    WORLD.Barrier()
    stop = threading.Event()

    def publish() -> None:
        version = 0
        while not stop.is_set():
            for _ in range(20):
                version += 1
                shard[...] = version
                window.publish(shard, version)
            time.sleep(0.0003)

    writer = threading.Thread(target=publish)
    writer.start()
    try:
        parameters, last, until, reads = np.zeros(bounds[-1]), [0] * SIZE, time.monotonic() + 0.2, 0
        while time.monotonic() < until or reads < 10:
            versions = window.read(parameters)
            reads += 1
            for rank, version in enumerate(versions):
                assert version >= last[rank]
                assert (parameters[bounds[rank] : bounds[rank + 1]] == version).all()
            last = versions
        done = WORLD.Ibarrier()
        while not done.Test():
            time.sleep(0.001)
    finally:
        stop.set()
        writer.join()
    assert sum(last) > 0
    WORLD.Barrier()
    window.free()


# -- what goes wrong


@pytest.mark.parametrize("servers, limit", [(SIZE, f"at most {SIZE - 1}"), (-1, "0 or more")])
def test_impossible_numbers_of_servers(servers: int, limit: str) -> None:
    with pytest.raises(ValueError, match=f"servers: expected {limit}.*got {servers}"):
        ParameterServer(WORLD, model_of(), SGD(), servers)


def test_impossible_staleness() -> None:
    with pytest.raises(ValueError, match=r"staleness: expected 0 or more steps, or None.*got -1"):
        AsyncParameterServer(WORLD, model_of(), SGD(), staleness=-1)


@several_ranks
def test_norms_of_shards_that_move_apart() -> None:
    with pytest.raises(ValueError, match=r"optimizer: expected one without norms.*got LARS; use ps-sync"):
        AsyncParameterServer(WORLD, model_of(), LARS())
    AsyncParameterServer(WORLD, model_of(), LARS(), servers=1).close()


def test_threads_are_needed_to_serve_and_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MPI, "Query_thread", lambda: MPI.THREAD_SERIALIZED)
    with pytest.raises(RuntimeError, match=r"servers: expected at least 1.*MPI_THREAD_MULTIPLE, got 0"):
        ParameterServer(WORLD, model_of(), SGD())
    if SIZE > 1:
        ParameterServer(WORLD, model_of(), SGD(), servers=1).close()


@pytest.mark.parametrize("servers", [n for n in SERVERS if n < 2])
def test_a_worker_leaves_a_synchronous_training(servers: int) -> None:
    strategy = ParameterServer(WORLD, model_of(), SGD(), servers)
    leaver = strategy.parts - 1
    if strategy.serves_only:
        with pytest.raises(InputError, match=f"rank {leaver} .*has left the training"):
            strategy.serve()
    elif leaver == RANK:
        train(strategy, range(3), finishes=False)
    else:
        with pytest.raises(RankFailedError, match=f"rank {leaver} .*has left the training"):
            train(strategy, range(4))
    strategy.close()
    assert strategy._thread is None or not strategy._thread.is_alive()


@pytest.mark.skipif(SIZE < 3, reason="needs two workers and a server")
@pytest.mark.parametrize("staleness", [0, None])
@servers_of_all
def test_a_worker_leaves_an_asynchronous_training(servers: int, staleness: int | None) -> None:
    servers = min(servers, SIZE - 2)
    strategy = AsyncParameterServer(WORLD, model_of(), SGD(), servers, staleness)
    leaver = strategy.parts - 1
    if leaver == RANK:
        train(strategy, range(3), finishes=False)
    else:
        train(strategy)
        assert strategy.lost == (leaver,)
        assert np.isfinite(strategy.model.parameters).all()
        assert strategy.total([3.0]) == [3.0]  # nothing is collective any more
    strategy.close()


def test_an_error_of_the_server_is_raised_by_its_worker() -> None:
    class Failing(SGD):
        def update(self, g: Array, rate: float) -> None:
            raise MemoryError("no more of it")

    strategy = ParameterServer(MPI.COMM_SELF, model_of(), Failing())
    strategy.start()
    with pytest.raises(MemoryError, match="no more of it"):
        strategy.step(0.1, 1.0)
    strategy.close()
    assert strategy._thread is not None and not strategy._thread.is_alive()
