"""Pictures of predictions: the map of the fastest algorithms, and the efficiency of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpicoll.files import replacing
from mpicoll.simulate.engine import Prediction
from mpicoll.simulate.training import Published, Scaling
from mpicoll.sizes import format_size

SUFFIXES = (".png", ".svg", ".pdf")
CELL = (0.95, 0.55)  # inches of a cell of the map


def draw_map(best: dict[tuple[int, int], tuple[str, Prediction]], title: str, path: Path | str) -> None:
    """Write the map to ``path``: ``best[ranks, bytes]`` is the fastest algorithm and its prediction.

    A cell for each pair, coloured by algorithm, with the time in it. Raises OSError, and
    `ModuleNotFoundError` where matplotlib is missing.
    """
    figure_class = _figure_class()
    from matplotlib import color_sequences
    from matplotlib.patches import Patch

    ranks, sizes = (sorted({key[i] for key in best}) for i in (0, 1))
    names = list(dict.fromkeys(best[n, nbytes][0] for n in ranks for nbytes in sizes))
    palette = color_sequences["Set3"]
    colours = {name: palette[i % len(palette)] for i, name in enumerate(names)}
    width, height = CELL[0] * len(sizes) + 1.5, CELL[1] * (len(ranks) + (len(names) + 2) // 3) + 1.4
    figure = figure_class(figsize=(max(7.0, width), height), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="bytes", ylabel="ranks")
    axes.imshow(
        [[colours[best[n, nbytes][0]] for nbytes in sizes] for n in ranks], origin="lower", aspect="auto"
    )
    for row, n in enumerate(ranks):
        for column, nbytes in enumerate(sizes):
            time = format_seconds(best[n, nbytes][1].seconds)
            axes.text(column, row, time, ha="center", va="center", fontsize="small")
    for edges, line in ((range(len(sizes)), axes.axvline), (range(len(ranks)), axes.axhline)):
        for edge in edges:
            line(edge + 0.5, color="white", linewidth=1)
    axes.set_xticks(range(len(sizes)), [format_size(nbytes) for nbytes in sizes])
    axes.set_yticks(range(len(ranks)), [f"{n:,}" for n in ranks])
    handles = [Patch(color=colours[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small")
    _save(figure, path)


def draw_scaling(
    scalings: Sequence[Scaling], published: Sequence[tuple[Published, float]], path: Path | str
) -> None:
    """Write the efficiencies to ``path``: a panel for each job, and published figures beside predictions.

    Raises as `draw_map`.
    """
    figure = _figure_class()(figsize=(5.0 * (len(scalings) + 1), 4.2), layout="constrained")
    panels = figure.subplots(1, len(scalings) + 1, squeeze=False)[0]
    for axes, scaling in zip(panels, scalings, strict=False):
        for points, label, style in ((scaling.weak, "weak", "o-"), (scaling.strong, "strong", "s--")):
            batch = (
                f"{scaling.job.local_batch} a GPU"
                if label == "weak"
                else f"{scaling.job.global_batch} in all"
            )
            xs, ys = [p.nranks for p in points], [100 * p.efficiency for p in points]
            axes.plot(xs, ys, style, label=f"{label}, batch {batch}")
        axes.set(title=scaling.job.title, xlabel=f"GPUs of {scaling.machine}", ylim=(0, 105))
        axes.title.set_wrap(True)
        axes.title.set_fontsize("medium")
        axes.set_ylabel("efficiency / %")
        axes.set_xscale("log")
        ticks = [p.nranks for p in scaling.weak]
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=45)
        axes.minorticks_off()
        axes.legend(loc="lower left")
        axes.grid(alpha=0.3)
    _draw_published(panels[-1], published)
    _save(figure, path)


def _draw_published(axes: Any, published: Sequence[tuple[Published, float]]) -> None:
    for shift, label, values in (
        (-0.2, "predicted", [100 * predicted for _, predicted in published]),
        (0.2, "published", [100 * figure.efficiency for figure, _ in published]),
    ):
        bars = axes.bar([i + shift for i in range(len(values))], values, 0.38, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize="small")
    names = [f"{figure.job.name}\n{figure.nranks} GPUs" for figure, _ in published]
    axes.set_xticks(range(len(names)), names, fontsize="small")
    axes.set(title="published figures, weak scaling", ylim=(0, 120))
    axes.set_ylabel("efficiency / %")
    axes.title.set_fontsize("medium")
    axes.legend(loc="upper center", ncols=2)


def format_seconds(seconds: float) -> str:
    """Three digits and a unit, such as ``12.3 µs``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:
            return (
                f"{seconds / size:.3g} {unit}" if seconds < 999.5 * size else f"{seconds / size:.0f} {unit}"
            )
    return f"{seconds / 1e-9:.3g} ns"


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure  # optional, and slow to import
    except ImportError:
        raise ModuleNotFoundError("picture: matplotlib is missing: pip install 'mpicoll[plots]'") from None
    return Figure


def _save(figure: Any, path: Path | str) -> None:
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower(), dpi=120)
