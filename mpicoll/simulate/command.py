"""``mpicoll simulate``: how long algorithms take on a machine that is described, not there."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mpicoll import algorithms
from mpicoll.schedule import COLLECTIVES
from mpicoll.schedule_options import MOST_CHUNKS, check_output
from mpicoll.simulate import candidates, training
from mpicoll.simulate.engine import Prediction, simulate_sizes
from mpicoll.simulate.machine import DEFAULT, Machine, MachineError
from mpicoll.simulate.pictures import SUFFIXES, draw_map, draw_scaling, format_seconds
from mpicoll.sizes import format_size, parse_size

MOST_DIGITS = 18  # what is longer is no number of ranks
MAP_RANKS = (4, 16, 64, 256, 1024, 4096, 16384)
MAP_SIZES = tuple(4**k for k in range(4, 16))  # 256 bytes to 1 GiB


def _numbers(ctx: click.Context, param: click.Parameter, text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= MOST_DIGITS and int(part) >= 1 for part in parts):
        raise click.BadParameter(f"expected numbers, 1 or more, such as 64,4096; got {text!r}")
    return sorted({int(part) for part in parts})


def _sizes(ctx: click.Context, param: click.Parameter, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return sorted({parse_size(part) for part in text.split(",")})
    except ValueError as error:
        raise click.BadParameter(str(error).removeprefix("size: ")) from None


def _machine(ctx: click.Context, param: click.Parameter, text: str) -> Machine:
    try:
        return Machine.load(text)
    except MachineError as error:
        raise click.BadParameter(str(error).removeprefix("machine: ")) from None


def _picture(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise click.BadParameter(f"expected a name that ends in {', '.join(SUFFIXES)}; got {str(path)!r}")
    return check_output(ctx, param, path)


_FILE = click.Path(path_type=Path)


@click.command("simulate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument(
    "collective", metavar="[COLLECTIVE]", required=False, type=click.Choice(list(algorithms.ALGORITHMS))
)
@click.option(
    "--algorithm", metavar="NAME", help="Only this one; hierarchical: with each algorithm across nodes."
)
@click.option(
    "--ranks", metavar="LIST", callback=_numbers, help="Rank counts, such as 64,4096.  [default: 64]"
)
@click.option(
    "--size", "sizes", metavar="LIST", callback=_sizes, help="Bytes, such as 4K,100M.  [default: 1M]"
)
@click.option(
    "--machine",
    metavar="NAME|FILE",
    default=DEFAULT,
    show_default=True,
    callback=_machine,
    help=f"One of {', '.join(Machine.names())}; or a TOML file.",
)
@click.option("--root", type=click.IntRange(0), help="The root of a collective that has one.  [default: 0]")
@click.option(
    "--chunks",
    type=click.IntRange(1, MOST_CHUNKS),
    help="Chunks of algorithms that pipeline.  [default: their own]",
)
@click.option(
    "--map", "map_path", metavar="FILE", type=_FILE, callback=_picture, help="Draw which is fastest where."
)
@click.option(
    "--training",
    "job",
    metavar="JOB",
    type=click.Choice(list(training.JOBS)),
    help="What a job gains: resnet50 or 7b.",
)
@click.option(
    "--plot", metavar="FILE", type=_FILE, callback=_picture, help="Draw the efficiency; for --training."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    collective: str | None,
    algorithm: str | None,
    ranks: list[int] | None,
    sizes: list[int] | None,
    machine: Machine,
    root: int | None,
    chunks: int | None,
    map_path: Path | None,
    job: str | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Predict how long collectives take on a machine of any size, without MPI.

    COLLECTIVE is one of allreduce, reduce_scatter, allgather, broadcast, reduce, gather, scatter, alltoall,
    barrier. Without --algorithm all of them are compared, the fastest first; what would send too many
    messages to look at is left out.

    --size is the whole vector, or all ranks' blocks together; in an alltoall, what one rank sends.

    With --map, a picture shows which algorithm is the fastest for which ranks and sizes. With --training, the
    step of a training job is predicted, its allreduces while it computes, beside published figures.

    \b
    Examples:
      mpicoll simulate allreduce --algorithm ring --ranks 4096 --size 100M
      mpicoll simulate broadcast --ranks 1024 --size 4K,64M --machine torus
      mpicoll simulate allreduce --map map.png
      mpicoll simulate --training resnet50 --plot scaling.png
    """
    _check_together(collective, job, map_path, plot)
    try:
        for nranks in ranks or ():
            machine.check_fits(nranks)
        if job is not None:
            _training(job, machine, ranks, plot, as_json)
        elif map_path is not None:
            _map(str(collective), machine, ranks, sizes, map_path, as_json)
        else:
            _table(
                str(collective),
                algorithm,
                machine,
                ranks or [64],
                sizes or [1 << 20],
                root or 0,
                chunks,
                as_json,
            )
    except MachineError as error:
        raise click.BadParameter(str(error).removeprefix("ranks: "), param_hint="--ranks") from None
    except ModuleNotFoundError as error:
        raise click.UsageError(str(error)) from None


def _check_together(
    collective: str | None, job: str | None, map_path: Path | None, plot: Path | None
) -> None:
    """Whether the options belong to one and the same of the three things the command does."""
    if (collective is None) == (job is None):
        given = "neither" if job is None else f"{collective!r} and --training"
        raise click.UsageError(f"expected either a COLLECTIVE or --training; got {given}")
    if plot is not None and job is None:
        raise click.BadParameter("expected only together with --training", param_hint="--plot")
    if job is not None:
        _expect_none("--training", "algorithm", "sizes", "root", "chunks", "map_path")
    elif map_path is not None:
        _expect_none("--map", "algorithm", "root", "chunks")
    elif not COLLECTIVES[str(collective)].rooted:
        _expect_none(str(collective), "root")


def _expect_none(beside: str, *names: str) -> None:
    context = click.get_current_context()
    options = {param.name: param.opts[0] for param in context.command.params}
    for name in names:
        if context.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise click.BadParameter(f"expected none beside {beside}", param_hint=options[name])


# -- one table


def _table(
    collective: str,
    algorithm: str | None,
    machine: Machine,
    ranks: list[int],
    sizes: list[int],
    root: int,
    chunks: int | None,
    as_json: bool,
) -> None:
    found: list[tuple[str, Prediction]] = []
    left_out: list[dict[str, Any]] = []
    for nranks in ranks:
        if root >= nranks:
            raise click.BadParameter(
                f"expected a rank from 0 to {nranks - 1}, got {root}", param_hint="--root"
            )
        names = candidates.names(collective, machine, nranks)
        chosen = names if algorithm is None else _chosen(algorithm, names)
        if chunks is not None and not any(candidates.pipelines(collective, name) for name in chosen):
            raise click.BadParameter(f"expected none for {', '.join(chosen)}", param_hint="--chunks")
        rows, without = _predictions(collective, machine, nranks, sizes, chosen, root, chunks, algorithm)
        found += sorted(rows, key=lambda row: (row[1].nbytes, row[1].seconds))
        left_out += [{"algorithm": name, "ranks": nranks} for name in without]
    if as_json:
        results = [_row(collective, name, prediction) for name, prediction in found]
        click.echo(json.dumps({"machine": machine.name, "results": results, "left_out": left_out}, indent=2))
        return
    _print_table(f"{collective} on {machine.name}: {machine.about}", found)
    if left_out:
        texts = [f"{entry['algorithm']} ({entry['ranks']} ranks)" for entry in left_out]
        click.echo(f"left out, for they send too many messages to look at: {'; '.join(texts)}")


def _predictions(
    collective: str,
    machine: Machine,
    nranks: int,
    sizes: list[int],
    chosen: list[str],
    root: int,
    chunks: int | None,
    algorithm: str | None,
) -> tuple[list[tuple[str, Prediction]], list[str]]:
    """Every prediction; and the names that are left out, which is an error if it was named."""
    if algorithm in chosen:
        own = chunks if candidates.pipelines(collective, str(algorithm)) else None
        try:
            schedule = candidates.schedule(collective, str(algorithm), machine, nranks, root, own)
        except candidates.TooManyError as error:
            message = str(error).removeprefix("algorithm: ")
            raise click.BadParameter(message, param_hint="--algorithm") from None
        return [(str(algorithm), p) for p in simulate_sizes(schedule, sizes, machine)], []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{nranks} ranks", total=len(chosen))

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done)

        found, without = candidates.predict(collective, machine, nranks, sizes, chosen, root, chunks, show)
    return [(name, p) for name, ps in found.items() for p in ps], without


def _chosen(algorithm: str, names: list[str]) -> list[str]:
    """The names that an --algorithm stands for."""
    chosen = [name for name in names if algorithm in (name, name.partition(",")[0])]
    if not chosen:
        expected = ", ".join(dict.fromkeys(name.partition(",")[0] for name in names))
        raise click.BadParameter(f"expected one of {expected}; got {algorithm!r}", param_hint="--algorithm")
    return chosen


def _row(collective: str, name: str, prediction: Prediction) -> dict[str, Any]:
    return {
        "collective": collective,
        "algorithm": name,
        "ranks": prediction.nranks,
        "bytes": prediction.nbytes,
        "seconds": prediction.seconds,
        "first_rank_seconds": float(prediction.rank_seconds.min()),
        "messages": prediction.messages,
        "level_bytes": prediction.level_bytes,
        "busiest_link": prediction.busiest_link,
        "busiest_seconds": prediction.busiest_seconds,
    }


def _print_table(title: str, rows: list[tuple[str, Prediction]]) -> None:
    """What is the same in all rows stands in the title."""
    ranks = {f"{p.nranks:,}" for _, p in rows}
    sizes = {format_size(p.nbytes) for _, p in rows}
    title += f"; {ranks.pop()} ranks" if len(ranks) == 1 else ""
    title += f"; {sizes.pop()}" if len(sizes) == 1 else ""
    table = Table(title=title, caption="busy: how much of the time the busiest link is in use")
    for heading, several in (("ranks", ranks), ("size", sizes)):
        if several:
            table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("algorithm", no_wrap=True)
    for heading in ("time", "messages", "busy"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("busiest link", overflow="fold")
    for name, p in rows:
        busy = p.busiest_seconds / p.seconds if p.seconds else 0.0
        cells = [f"{p.nranks:,}"] * bool(ranks) + [format_size(p.nbytes)] * bool(sizes)
        cells += [name, format_seconds(p.seconds), f"{p.messages:,}", f"{busy:.0%}", p.busiest_link]
        table.add_row(*cells)
    Console().print(table)


# -- the map


def _map(
    collective: str,
    machine: Machine,
    ranks: list[int] | None,
    sizes: list[int] | None,
    path: Path,
    as_json: bool,
) -> None:
    wanted = ranks or [n for n in MAP_RANKS if n <= machine.capacity]
    best: dict[tuple[int, int], tuple[str, Prediction]] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for nranks in progress.track(wanted, description="simulating"):
            found, _ = candidates.predict(collective, machine, nranks, sizes or MAP_SIZES)
            for i, nbytes in enumerate(sizes or MAP_SIZES):
                name = min(found, key=lambda name: found[name][i].seconds)
                best[nranks, nbytes] = name, found[name][i]
    draw_map(best, f"fastest {collective} on {machine.name}: {machine.about}", path)
    if as_json:
        rows = [_row(collective, name, prediction) for name, prediction in best.values()]
        click.echo(json.dumps({"machine": machine.name, "map": rows}, indent=2))


# -- training


def _training(name: str, machine: Machine, ranks: list[int] | None, plot: Path | None, as_json: bool) -> None:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        scaling = training.scale(training.JOBS[name], machine, ranks or training.RANKS, show)
        published = [(figure, training.predict_published(figure)) for figure in training.PUBLISHED]
    if plot is not None:
        draw_scaling([scaling], [(figure, point.efficiency) for figure, point in published], plot)
    if as_json:
        figures = [{**asdict(figure), "predicted": asdict(point)} for figure, point in published]
        click.echo(json.dumps({**asdict(scaling), "published": figures}, indent=2))
        return
    _print_scaling(scaling)
    _print_published(published)


def _print_scaling(scaling: training.Scaling) -> None:
    job = scaling.job
    click.echo(
        f"{job.title}, {job.gradient_bytes / 1e6:,.0f} MB in buckets of {format_size(job.bucket_bytes)}"
    )
    click.echo(f"on {scaling.machine}, {job.speed:.3g} samples/s a GPU: {job.source}")
    for label, points in (("weak", scaling.weak), ("strong", scaling.strong)):
        table = Table(title=f"{label} scaling")
        for heading in ("GPUs", "batch a GPU", "compute", "step", "efficiency"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("allreduce of a bucket")
        for p in points:
            times = [format_seconds(seconds) for seconds in (p.compute_seconds, p.step_seconds)]
            cells = f"{p.nranks:,}", f"{p.local_batch:g}", *times, f"{p.efficiency:.1%}", p.algorithm or "-"
            table.add_row(*cells)
        Console().print(table)


def _print_published(published: list[tuple[training.Published, training.Point]]) -> None:
    table = Table(title="published figures, weak scaling", caption="the model leaves out all but allreduces")
    for heading in ("source", "model", "machine"):
        table.add_column(heading)
    for heading in ("GPUs", "published", "predicted"):
        table.add_column(heading, justify="right")
    for figure, point in published:
        efficiencies = f"{figure.efficiency:.0%}", f"{point.efficiency:.0%}"
        table.add_row(figure.source, figure.job.name, figure.machine, str(figure.nranks), *efficiencies)
    Console().print(table)
