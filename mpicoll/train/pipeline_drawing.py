"""Pictures of pipeline schedules: who does what when, as text and as a picture.

stage 0  F0 F1 .  .  .  B0 B0 B1 B1        a row for each stage, a column for each unit of time:
stage 1  .  F0 B0 B0 F1 B1 B1 .  .         F forward, B backward, and the number of the piece
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpicoll.train.errors import InputError
from mpicoll.train.pipeline import Action, Kind, Order, Timeline, timeline

COLOURS: dict[Kind, str] = {"forward": "tab:blue", "backward": "tab:orange"}
WIDEST = 60.0  # inches; what is longer is drawn smaller


def draw_text(schedule: Order, forward: int | Sequence[int] = 1, backward: int | Sequence[int] = 2) -> str:
    """A row for each stage, then the bubble and how many pieces each stage keeps; costs in whole units.

    Raises `InputError` where the schedule is wrong, as `timeline` does, or costs are not whole.
    """
    drawn = timeline(schedule, forward, backward)
    if any(span.end != int(span.end) for spans in drawn.stages for span in spans):
        raise InputError(f"forward, backward: expected whole units of time, got {forward!r}, {backward!r}")
    rows = [["."] * int(drawn.duration) for _ in drawn.stages]
    for row, spans in zip(rows, drawn.stages, strict=True):
        for span in spans:
            begin, end = int(span.begin), int(span.end)
            row[begin:end] = [_label(span.action)] * (end - begin)
    width = max(len(cell) for row in rows for cell in row)
    titles = [f"stage {stage}" for stage in range(len(rows))]
    lines = [
        f"{title:{len(titles[-1])}}  {' '.join(cell.ljust(width) for cell in row)}".rstrip()
        for title, row in zip(titles, rows, strict=True)
    ]
    return "\n".join([*lines, _summary(drawn)])


def draw_png(
    schedule: Order,
    file: Path | str,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
    unit: str = "forwards of a piece",
) -> None:
    """Write a picture with a bar for each action to ``file``; ``unit``: of the costs, for the time axis.

    Raises `InputError` where the schedule is wrong, as `timeline` does, or matplotlib is missing.
    """
    draw_figure(timeline(schedule, forward, backward), unit).savefig(file, format="png", dpi=120)


def draw_figure(drawn: Timeline, unit: str) -> Any:
    """The picture as a matplotlib Figure."""
    try:
        from matplotlib.figure import Figure  # optional, and slow to import
        from matplotlib.patches import Patch
    except ImportError:
        raise InputError("the picture needs matplotlib: pip install 'mpicoll[plots]'") from None

    stages = len(drawn.stages)
    columns = max(2 * len(spans) for spans in drawn.stages)
    size = min(WIDEST, 3 + 0.25 * columns), 1.5 + 0.5 * stages
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xlabel=f"time / {unit}", ylabel="stage", title=_summary(drawn))
    for stage, spans in enumerate(drawn.stages):
        for span in spans:
            colour = COLOURS[span.action.kind]
            bar = axes.barh(stage, span.end - span.begin, left=span.begin, color=colour, edgecolor="white")
            axes.bar_label(bar, [str(span.action.piece)], label_type="center", fontsize="small")
    axes.set_xlim(0, drawn.duration)
    axes.set_yticks(range(stages))
    axes.invert_yaxis()
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _label(action: Action) -> str:
    return f"{action.kind[0].upper()}{action.piece}"


def _summary(drawn: Timeline) -> str:
    return f"bubble {drawn.bubble:.0%}, pieces kept {' '.join(map(str, drawn.most_kept))}"
