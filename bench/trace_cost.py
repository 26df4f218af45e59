"""What it costs to record a training: its steps with ``--trace`` and without, in turn.

    mpirun -np 2 python -m mpicoll.bench.trace_cost --json trace_cost.json

Three trainers of the same network on the same data take epochs in turn; one of them is recorded. A network's
cost is the median over epochs of the ratio of its time in steps (the slowest rank's) to that of one that is
not, less one. The other that is not recorded shows how far two trainers differ by themselves: by where their
memory lies, above all, so several sets are made, in different orders. What is asked is less than `ASKED`. A
small allreduce is measured as well: it shows what one event costs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import permutations, repeat
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
ROLES = "off", "on", "again"


def trainer(comm: mpicoll.Communicator, data: Dataset, hidden: tuple[int, ...]) -> Trainer:
    """As ``train.py`` makes it."""
    layers = perceptron(data.inputs, hidden, data.outputs, "relu", 0.0, "none")
    return Trainer(comm, layers, data, batch_size=BATCH, options={"algorithm": "ring"})


def measure_steps(
    world: MPI.Intracomm, data: Dataset, hidden: tuple[int, ...], epochs: int
) -> dict[str, Any]:
    """Microseconds of a step, off and on, the cost, and how far two differ anyway; on all ranks."""
    sets = [measure_set(world, data, hidden, epochs, order) for order in permutations(ROLES)]
    times = {role: [t for each in sets for t in each[role]] for role in ROLES}
    cost, difference = (
        median(time / off for time, off in zip(times[role], times["off"], strict=True)) - 1
        for role in ("on", "again")
    )
    return {
        "parameters": sets[0]["parameters"],
        "us_off": 1e6 * median(times["off"]),
        "us_on": 1e6 * median(times["on"]),
        "events_per_step": sets[0]["events_per_step"],
        "cost": cost,
        "below": cost < ASKED,
        "again": difference,
    }


def measure_set(
    world: MPI.Intracomm, data: Dataset, hidden: tuple[int, ...], epochs: int, order: Sequence[str]
) -> dict[str, Any]:
    """Seconds of a step in each epoch, by role; the trainers are made, and take turns, in this order."""
    comms = {role: mpicoll.Communicator(world) for role in order}
    recorder = Recorder(comms["on"], ROOM)
    recorder.attach(comms["on"])
    trainers = {role: trainer(comm, data, hidden) for role, comm in comms.items()}
    watch_training(recorder, trainers["on"], Keeper())
    steps = trainers["off"].steps_per_epoch
    times: dict[str, list[float]] = {role: [] for role in order}
    for epoch in range(1, epochs + 2):
        for role in order[:: 1 if epoch % 2 else -1]:
            last = trainers[role].train(epoch)[-1]
            if epoch > 1:  # the first compiles
                times[role].append(last.seconds / steps)
    recorder.detach()
    parameters = trainers["off"].parameter_count()
    for role, comm in comms.items():
        trainers[role].close()
        comm.Free()
    events = len(recorder._events) / (steps * (epochs + 1))
    return {**times, "parameters": parameters, "events_per_step": events}


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
@click.option("--epochs", type=click.IntRange(1), default=15, help="Of each trainer.")
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
        click.echo(f"{'hidden':12}{'µs off':>10}{'µs on':>10}{'events':>8}{'cost':>8}{'again':>8}")
        for row in rows:
            times = f"{row['us_off']:10.1f}{row['us_on']:10.1f}{row['events_per_step']:8.1f}"
            click.echo(f"{row['hidden']:12}{times}{row['cost']:8.1%}{row['again']:8.1%}")
        click.echo(f"{'4 B':12}{small['us_off']:10.2f}{small['us_on']:10.2f}")
        if json is not None:
            line = ["mpirun", "-np", str(world.size), "python", "-m", "mpicoll.bench.trace_cost"]
            found = {"ranks": world.size, "asked": ASKED, "rows": rows, "allreduce_of_4_bytes": small}
            json.write_text(layout({**about([*line, "--epochs", str(epochs)], {"epochs": epochs}), **found}))
    sys.exit(not all(row["below"] for row in rows))


if __name__ == "__main__":
    command(prog_name="python -m mpicoll.bench.trace_cost")
