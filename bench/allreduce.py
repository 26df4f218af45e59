"""Allreduce through messages beside the MPI library's own, in one run.

    python -m mpicoll.launch -np 2 python -m mpicoll.bench.allreduce --json allreduce.json

For each size the contenders take turns: some calls of one, then of the next, several times over. A
contender's time is the median over the turns of the slowest rank's mean time per call. Every result is
compared with the right sum. "memcpy" is the limit: all ranks copying as many bytes in their own memory.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
from mpi4py import MPI
from rich.console import Console
from rich.table import Table

from mpicoll import Communicator
from mpicoll.sizes import format_size, parse_size

LAUNCH = ("python", "-m", "mpicoll.launch", "-np")
PROGRAM = ("python", "-m", "mpicoll.bench.allreduce")
THREAD_LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}
LARGE = 64 << 10  # bytes from which on the mean is taken
TURN = 0.02  # seconds each contender gets in a turn


def contenders(
    comm: Communicator, algorithms: list[str], send: np.ndarray[Any, Any], recv: np.ndarray[Any, Any]
) -> dict[str, Callable[[], None]]:
    """Functions that do one allreduce of ``send`` into ``recv``, by name; "native" is the library's own."""
    native = MPI.Intracomm(comm)
    functions: dict[str, Callable[[], None]] = {"native": lambda: native.Allreduce(send, recv)}
    for name in algorithms:
        functions[name] = _one_shot(comm, send, recv, name)
        functions[f"{name} persistent"] = _persistent(comm, send, recv, name)
    return functions


def _one_shot(comm: Communicator, send: Any, recv: Any, algorithm: str) -> Callable[[], None]:
    if algorithm == "auto":
        return lambda: comm.Allreduce(send, recv)  # as users write it
    return lambda: comm.Allreduce(send, recv, algorithm=algorithm)


def _persistent(comm: Communicator, send: Any, recv: Any, algorithm: str) -> Callable[[], None]:
    plan = comm.Allreduce_init(send, recv, algorithm=algorithm)

    def run() -> None:
        plan.Start()
        plan.Wait()

    return run


def measure(comm: Communicator, nbytes: int, algorithms: list[str], turns: int) -> dict[str, float]:
    """Microseconds per call of each contender for ``nbytes`` bytes of float32."""
    count = max(1, nbytes // 4)
    index = np.arange(count, dtype=np.float32) % 1000  # sums of these are exact
    send, recv = index + comm.rank, np.empty_like(index)
    expected = index * comm.size + sum(range(comm.size))
    functions = contenders(comm, algorithms, send, recv)
    for name, function in functions.items():
        recv.fill(-1)
        function()
        if not np.array_equal(recv, expected):
            raise RuntimeError(f"{name}: wrong sums at {nbytes} bytes on rank {comm.rank}")
    functions["memcpy"] = lambda: np.copyto(recv, send)
    calls = {name: _calls_per_turn(comm, function) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            times[name].append(_turn(comm, function, calls[name]))
    return {name: float(np.median(turn)) * 1e6 for name, turn in times.items()}


def _calls_per_turn(comm: Communicator, function: Callable[[], None]) -> int:
    seconds = min(_turn(comm, function, 3) for _ in range(2))
    return int(np.clip(TURN / seconds, 2, 5000))


def _turn(comm: Communicator, function: Callable[[], None], calls: int) -> float:
    """Mean seconds per call on the slowest rank."""
    comm.Barrier()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    seconds = np.array([(time.perf_counter() - start) / calls])
    comm.Allreduce(MPI.IN_PLACE, seconds, op=MPI.MAX)
    return float(seconds[0])


def geometric_mean(ratios: list[float]) -> float:
    return float(np.exp(np.mean(np.log(ratios))))


def render(rows: list[dict[str, Any]], console: Console) -> None:
    """A line per size; times in microseconds, and how many times faster than the library's own."""
    names = [name for name in rows[0]["microseconds"] if name not in ("native", "memcpy")]
    table = Table("bytes", "memcpy µs", "native µs", *(f"{name} µs (×)" for name in names), box=None)
    for row in rows:
        times = row["microseconds"]
        cells = [f"{times[name]:.1f} ({times['native'] / times[name]:.2f})" for name in names]
        table.add_row(format_size(row["bytes"]), f"{times['memcpy']:.1f}", f"{times['native']:.1f}", *cells)
    large = [row["microseconds"] for row in rows if row["bytes"] >= LARGE]
    if large:
        means = [f"{geometric_mean([t['native'] / t[name] for t in large]):.2f}" for name in names]
        table.add_row(f"mean ≥ {format_size(LARGE)}", "", "", *means)
    console.print(table)


def describe(comm: Communicator) -> dict[str, Any]:
    """What a row was measured on."""
    cpu = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "command": shlex.join([*LAUNCH, str(comm.size), *PROGRAM, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "ranks": comm.size,
        "cpu": f"{len(cpu)} × {cpu[0]}" if cpu else platform.processor(),
        "mpi": MPI.Get_library_version().split("\n")[0].split(",")[0],
        "thread_level": THREAD_LEVELS[MPI.Query_thread()],
        "dtype": "float32",
    }


@click.command(help=__doc__)
@click.option(
    "--sizes", default="4,1K,16K,64K,256K,1M,4M,16M,64M", show_default=True, help="Bytes, by comma."
)
@click.option("--algorithm", default="auto", show_default=True, help="Algorithms to time, by comma.")
@click.option("--turns", default=5, show_default=True, help="Turns of each contender.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows here."
)
def main(sizes: str, algorithm: str, turns: int, json_file: Path | None) -> None:
    comm = Communicator(MPI.COMM_WORLD)
    rows = []
    for size in sizes.split(","):
        nbytes = parse_size(size)
        rows.append({"bytes": nbytes, "microseconds": measure(comm, nbytes, algorithm.split(","), turns)})
        if comm.rank == 0:
            click.echo(f"{size}: {rows[-1]['microseconds']}", err=True)
    if comm.rank == 0:
        render(rows, Console(width=200))
        if json_file is not None:
            json_file.write_text(json.dumps({**describe(comm), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
