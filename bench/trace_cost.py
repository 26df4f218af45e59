"""What it costs to record a training: its steps with ``--trace`` and without, in turn.

    mpirun -np 2 python -m mpicoll.bench.trace_cost --json trace_cost.json

Two trainers of the same network on the same data take epochs in turn; one of them is recorded. A network's
cost is the median over epochs of the ratio of their times in steps (the slowest rank's), less one. What is
asked is less than `ASKED`. A small allreduce is measured as well: it shows what one event costs.
"""

from __future__ import annotations

import sys
import time
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from mpi4py import MPI

import mpicoll
from mpicoll.trace.recorder import Recorder
from mpicoll.trace.training import watch_training
from mpicoll.train.data import Dataset, share
from mpicoll.train.keeping import Keeper
from mpicoll.train.loop import Trainer
from mpicoll.train.networks import perceptron
from mpicoll.train.readers import read_digits

from .about import about, layout
from .options import check_writable, json_option

ASKED = 0.02  # of the time of a step that is not recorded
NETWORKS = {"128": (128,), "1024,1024": (1024, 1024)}  # hidden layers; the first is train.py's
BATCH = 32
ROOM = 2_000_000  # events
CALLS = 200  # of the allreduce, in a turn
TURNS = 41


def trainer(comm: mpicoll.Communicator, data: Dataset, hidden: tuple[int, ...]) -> Trainer:
    """As ``train.py`` makes it."""
    layers = perceptron(data.inputs, hidden, data.outputs, "relu", 0.0, "none")
    return Trainer(comm, layers, data, batch_size=BATCH, options={"algorithm": "ring"})


def measure_steps(
    world: MPI.Intracomm, data: Dataset, hidden: tuple[int, ...], epochs: int
) -> dict[str, Any]:
    """Microseconds of a step, off and on, and the cost; on all ranks."""
    comms = [mpicoll.Communicator(world) for _ in range(2)]
    recorder = Recorder(comms[1], ROOM)
    recorder.attach(comms[1])
    off, on = trainers = [trainer(comm, data, hidden) for comm in comms]
    watch_training(recorder, on, Keeper())
    seconds: list[tuple[float, float]] = []
    for epoch in range(1, epochs + 2):
        for each in trainers[:: 1 if epoch % 2 else -1]:
            each.train(epoch)
        if epoch > 1:  # the first compiles
            seconds.append((off.history[-1].seconds, on.history[-1].seconds))
    recorder.detach()
    steps = off.steps_per_epoch
    parameters = off.parameter_count()
    for each, comm in zip(trainers, comms, strict=True):
        each.close()
        comm.Free()
    cost = median(with_trace / without for without, with_trace in seconds) - 1
    return {
        "parameters": parameters,
        "us_off": 1e6 * median(without for without, _ in seconds) / steps,
        "us_on": 1e6 * median(with_trace for _, with_trace in seconds) / steps,
        "events_per_step": len(recorder._events) / (steps * (epochs + 1)),
        "cost": cost,
        "below": cost < ASKED,
    }


def measure_call(world: MPI.Intracomm) -> dict[str, float]:
    """Microseconds of an allreduce of 4 bytes, off and on; on all ranks."""
    comms = [mpicoll.Communicator(world) for _ in range(2)]
    recorder = Recorder(comms[1], ROOM)
    recorder.attach(comms[1])
    send, recv = np.zeros(1, np.float32), np.zeros(1, np.float32)
    times: list[list[float]] = [[], []]
    for turn in range(TURNS):
        for way in (0, 1) if turn % 2 else (1, 0):
            call = comms[way].Allreduce
            world.Barrier()
            start = time.perf_counter()
            for _ in repeat(None, CALLS):
                call(send, recv)
            times[way].append(float(world.allreduce(time.perf_counter() - start, MPI.MAX)) / CALLS)
    recorder.detach()
    for comm in comms:
        comm.Free()
    return {"us_off": 1e6 * median(times[0]), "us_on": 1e6 * median(times[1])}


@click.command("trace_cost", context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--epochs", type=click.IntRange(1), default=15, help="Of each network, off and on.")
@json_option
def command(epochs: int, json: Path | None) -> None:
    """Measure what recording costs, on all ranks that mpirun started. Exit status 1: more than asked.

    Example: mpirun -np 2 python -m mpicoll.bench.trace_cost --json trace_cost.json
    """
    world = MPI.COMM_WORLD
    if json is not None:
        check_writable("--json", json)
    data = share(world, read_digits(0) if world.rank == 0 else None)
    rows = [{"hidden": name, **measure_steps(world, data, own, epochs)} for name, own in NETWORKS.items()]
    small = measure_call(world)
    if world.rank == 0:
        click.echo(f"{'hidden':12}{'µs off':>10}{'µs on':>10}{'events':>8}{'cost':>8}")
        for row in rows:
            times = f"{row['us_off']:10.1f}{row['us_on']:10.1f}{row['events_per_step']:8.1f}"
            click.echo(f"{row['hidden']:12}{times}{row['cost']:8.1%}")
        click.echo(f"{'4 B':12}{small['us_off']:10.2f}{small['us_on']:10.2f}")
        if json is not None:
            line = ["mpirun", "-np", str(world.size), "python", "-m", "mpicoll.bench.trace_cost"]
            found = {"ranks": world.size, "asked": ASKED, "rows": rows, "allreduce_of_4_bytes": small}
            json.write_text(layout({**about([*line, "--epochs", str(epochs)], {"epochs": epochs}), **found}))
    sys.exit(not all(row["below"] for row in rows))


if __name__ == "__main__":
    command(prog_name="python -m mpicoll.bench.trace_cost")
