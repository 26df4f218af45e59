"""``mpicoll bench kernels``: what one rank does by itself, beside NumPy or CuPy, PyTorch, and memcpy's speed.

All who are measured take turns, many times over. A turn is a call that is not timed, which brings into the
caches what fits there, whoever was before, and one that is. Results are checked before that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from mpicoll.info import package_version

from .about import about
from .devices import DEVICES, Action, Device
from .kernel_tasks import OURS, ROOM, Data, Task, WrongResult, memcpy, tasks
from .models import LISTS, Shape, check_room, nbytes
from .options import check_writable, json_option

WIDTH = 160  # characters; the table is not to be broken into lines

Facts = dict[str, Any]


def command(args: Sequence[str], prog_name: str) -> None:
    """Measure as ``args`` say, and exit: 0, 1 after a wrong result, 2 if the user erred."""
    _command.main(list(args), prog_name, obj=[*prog_name.split(), *args])


@click.command("kernels", context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--list", type=click.Choice(list(LISTS)), default="resnet50", help="Which tensors.")
@click.option("--device", type=click.Choice(list(DEVICES)), default="cpu", help="Where they are.")
@click.option("--repeat", type=click.IntRange(min=1), default=9, help="Turns of each; the median counts.")
@json_option
@click.pass_obj
def _command(line: Sequence[str], /, **flags: Any) -> None:
    """Measure the kernels that pack, reduce and compress gradients, in one process and one thread.

    Tensors are those of ResNet-50 (161), of GPT-2 small (148), one of 1 GiB, or a thousand of 1 KiB.

    Bytes are those that a task must read and write; who does it may move more. The limit is memcpy: a copy of
    as many bytes as the tensors have. "× ours" is how many times as long as ours it takes.

    \b
    Examples:
      mpicoll bench kernels
      mpicoll bench kernels --list gpt2 --repeat 15 --json kernels.json
      mpicoll bench kernels --device cuda
    """
    file: Path | None = flags["json"]
    if file is not None:
        check_writable("--json", file)
    device, name = DEVICES[flags["device"]](), flags["list"]
    check_room(f"--list {name}", ROOM * nbytes(LISTS[name]), device.room())
    report = {**_about(line, device, flags), **measure(device, name, LISTS[name], flags["repeat"])}
    # Open MPI gives ranks a terminal, also where what they say goes to a file.
    Console(width=WIDTH, force_terminal=False).print(table(report))
    if file is not None:
        file.write_text(dumps(report, indent=1) + "\n")


def _about(line: Sequence[str], device: Device, flags: Facts) -> Facts:
    found = about(line, flags)
    found["machine"]["gpus"] = device.gpus()
    return {**found, "packages": {package: package_version(package) for package in device.packages}}


def measure(device: Device, name: str, shapes: Sequence[Shape], repeat: int) -> Facts:
    """Everybody's times on tensors of these shapes. Raises `click.ClickException` for a wrong result."""
    data = Data(device, shapes)
    found = list(_with_torch(data))
    for task in found:
        click.echo(f"checking: {task.kernel}", err=True)
        _check(task)
    contenders = [(task, by) for task in found for by in task.contenders]
    click.echo(f"measuring: {len(contenders)} contenders", err=True)
    actions = [task.contenders[by] for task, by in contenders]
    *seconds, copying = _take_turns(device, [*actions, memcpy(data)], repeat)
    limit = 2 * data.nbytes / copying
    rows = [_row(*contender, each, limit) for contender, each in zip(contenders, seconds, strict=True)]
    return {
        "list": name,
        "tensors": len(shapes),
        "size": data.nbytes,
        "memcpy": {"bytes": 2 * data.nbytes, "time": copying * 1e6, "bandwidth": limit / 1e9},
        "results": rows,
    }


def _with_torch(data: Data) -> Iterator[Task]:
    """All tasks, and PyTorch among their contenders, where it is installed."""
    if find_spec("torch") is None:
        click.echo("PyTorch is left out, for it is not installed: pip install 'mpicoll[torch]'", err=True)
        yield from tasks(data)
        return
    from .torch_peers import torch_peers  # takes seconds to import

    peers = torch_peers(data)
    for task in tasks(data):
        yield replace(task, contenders={**task.contenders, **peers.get(task.kernel, {})})


def _check(task: Task) -> None:
    """Each contender once, on fresh data."""
    for by, action in task.contenders.items():
        task.prepare()
        try:
            task.check(action())
        except WrongResult as error:
            raise click.ClickException(f"{task.kernel}, {by}: {error}") from None


def _take_turns(device: Device, actions: Sequence[Action], repeat: int) -> list[float]:
    """Each action's seconds: the median over the turns."""
    seconds = [[_turn(device, action) for action in actions] for _ in range(repeat)]
    return [float(middle) for middle in np.median(seconds, axis=0)]


def _turn(device: Device, action: Action) -> float:
    action()
    return device.seconds(action)


def _row(task: Task, by: str, seconds: float, limit: float) -> Facts:
    """Times are in microseconds, bandwidths in 10^9 bytes per second."""
    bandwidth = task.nbytes / seconds
    return {
        "kernel": task.kernel,
        "by": by,
        "bytes": task.nbytes,
        "time": seconds * 1e6,
        "bandwidth": bandwidth / 1e9,
        "of_memcpy": bandwidth / limit,
    }


def table(report: Facts) -> Table:
    """A line for each kernel and contender."""
    heading = f"# {report['list']}: {report['tensors']} tensors, {report['size'] / 1e6:.1f} MB"
    found = Table(box=None, title=heading, title_justify="left")
    for title in ("kernel", "by"):
        found.add_column(title)
    for title in ("MB moved", "µs", "GB/s", "of memcpy", "× ours"):
        found.add_column(title, justify="right")
    copy = report["memcpy"]
    found.add_row("memcpy", "", *_figures(copy), "1.00", "")
    for row in report["results"]:
        if row["by"] == OURS:
            ours = row["time"]
        kernel = row["kernel"] if row["by"] == OURS else ""
        ratio = "" if row["by"] == OURS else f"{row['time'] / ours:.2f}"
        found.add_row(kernel, row["by"], *_figures(row), f"{row['of_memcpy']:.2f}", ratio)
    return found


def _figures(row: Facts) -> list[str]:
    return [f"{row['bytes'] / 1e6:.2f}", f"{row['time']:.1f}", f"{row['bandwidth']:.2f}"]
