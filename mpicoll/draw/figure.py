"""A schedule as a picture: a row for each rank, time from left to right, an arrow for each message.

Between two rounds every rank shows what it holds: a box for each chunk, filled as far as its sum has come,
with a dark edge once it is complete. What is not needed again is left out. A dashed arrow and a ``+`` mean
that the receiver adds, a solid arrow that it copies; the label is the chunks. Colours tell chunks apart; an
arrow with several chunks is grey.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpicoll.draw.story import Held, Message, Step, Story, chunk_name, chunk_names, colours, tell, title
from mpicoll.files import replacing
from mpicoll.schedule import COLLECTIVES, Schedule

SUFFIXES = (".svg", ".png")
MOST_RANKS = 32
ELSEWHERE = "mpicoll simulate tells its time at any number of ranks"
MOST_BOXES = 16  # of a rank; where there are more chunks, none are drawn
LONGEST = 14  # letters of a label
MOST_LABELS = 100  # of a round; where there are more messages, none can be read

# Inches.
ROW = 0.62
SIDE = 1.0  # left and right of the rows together
HEAD = 1.25  # above and below them
BOX = 0.11, 0.24  # of a chunk: width, height
LEAST = 0.03  # of a box that is filled at all
LETTER = 0.085, 0.17  # of a label: width, height
NARROWEST = 8.0  # so that the title and the legend fit

GREY = "#666666"
FRAME = "#c8c8c8"
ALONG = (0.3, 0.42, 0.2, 0.54, 0.66, 0.78, 0.12, 0.88)  # where on its arrow a label may be, the best first

Boxes = npt.NDArray[np.float64]  # [n, 2], centres in inches


def picture(schedule: Schedule, path: Path | str) -> None:
    """Write a picture of ``schedule`` to ``path``, an SVG or PNG file as its suffix says.

    Raises `ValueError` for another suffix, and for more than 32 ranks, 64 rounds, or 64 chunks on a rank;
    `ModuleNotFoundError` where matplotlib is missing.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"path: expected a name that ends in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    story = tell(schedule, MOST_RANKS, ELSEWHERE)
    try:
        import matplotlib as mpl  # optional, and slow to import
    except ImportError:
        raise ModuleNotFoundError("picture: matplotlib is missing: pip install 'mpicoll[plots]'") from None

    # Text stays text, and equal schedules give equal files.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mpicoll"}):
        dated = {"metadata": {"Date": None}} if suffix == ".svg" else {}
        with replacing(Path(path)) as temporary:
            draw_figure(story).savefig(temporary, format=suffix[1:], dpi=110, **dated)


@dataclass(frozen=True)
class _Layout:
    """Where things are, in inches. ``strip``: the width of a rank's boxes; ``pitch``: of a round."""

    nboxes: int
    strip: float
    pitch: float

    @classmethod
    def of(cls, story: Story) -> _Layout:
        schedule = story.schedule
        nboxes = schedule.nchunks if schedule.nchunks <= MOST_BOXES else 0
        strip = max(nboxes, 1) * BOX[0]
        busiest = max((_most_sent(step) for step in story.steps), default=0)
        labels = [len(_label(story, message)) for step in story.steps for message in step.messages]
        room = max(1.1, max(labels, default=0) * LETTER[0] * (1.5 + 0.5 * busiest))
        return cls(nboxes, strip, strip + min(room, 6.0))

    def ends(self, k: int, message: Message) -> npt.NDArray[np.float64]:
        """Where an arrow of round ``k`` begins and ends: float64 ``[2, 2]``."""
        gap = self.strip / 2 + 0.05
        begin = k * self.pitch + gap, message.src * ROW
        return np.array([begin, ((k + 1) * self.pitch - gap, message.dst * ROW)])


def draw_figure(story: Story) -> Any:
    """The picture as a matplotlib Figure."""
    from matplotlib.figure import Figure

    schedule = story.schedule
    layout = _Layout.of(story)
    width, height = schedule.nrounds * layout.pitch, (schedule.nranks - 1) * ROW
    size = max(NARROWEST, width + layout.strip + SIDE), height + ROW + HEAD
    figure = Figure(figsize=size)
    figure.suptitle(title(schedule), x=0.5, y=1 - 0.3 / size[1], fontsize=13)
    # One unit of the axes is one inch, so that boxes and labels have the size that the layout gave them.
    below = 0.45
    axes = figure.add_axes((0.0, below / size[1], 1.0, 1 - (below + 0.5) / size[1]))
    axes.set_axis_off()
    left = -(size[0] - width) / 2 - (SIDE - 0.55) / 2
    axes.set_xlim(left, left + size[0])
    axes.set_ylim(height + ROW / 2, height + ROW / 2 - (size[1] - below - 0.5))
    _draw_frame(axes, schedule, layout)
    palette = colours(schedule)
    for k, step in enumerate(story.steps):
        _draw_messages(axes, story, layout, palette, k, step.messages)
    for k, held in enumerate([story.start, *(step.held for step in story.steps)]):
        _draw_held(axes, story, layout, palette, k * layout.pitch, held)
    _draw_legend(figure, story, palette)
    return figure


def _draw_frame(axes: Any, schedule: Schedule, layout: _Layout) -> None:
    top = -ROW / 2 - 0.12
    left = -layout.strip / 2 - 0.12
    for rank in range(schedule.nranks):
        axes.plot([0, schedule.nrounds * layout.pitch], [rank * ROW] * 2, color="#ebebeb", zorder=0)
        axes.text(left, rank * ROW, f"rank {rank}", ha="right", va="center")
    for k in range(schedule.nrounds):
        axes.text((k + 0.5) * layout.pitch, top, f"round {k}", ha="center", va="center", color=GREY)


def _draw_messages(
    axes: Any, story: Story, layout: _Layout, palette: list[str], k: int, messages: Sequence[Message]
) -> None:
    from matplotlib.patches import FancyArrowPatch

    placed: Boxes = np.empty((0, 2))
    for message in messages:
        begin, end = layout.ends(k, message)
        colour = palette[message.chunks[0]] if len(message.chunks) == 1 else GREY
        arrow = FancyArrowPatch(
            begin,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            shrinkA=0,
            shrinkB=0,
            linestyle=(0, (3, 1.5)) if message.reduce else "solid",
            color=colour,
            linewidth=1.4,
            gid=f"message-{k}-{message.src}-{message.dst}",
            zorder=1,
        )
        axes.add_patch(arrow)
        label = _label(story, message)
        if not label or len(messages) > MOST_LABELS:
            continue
        spot = _free_spot(begin, end, placed, len(label) * LETTER[0])
        placed = np.vstack([placed, spot])
        bare = len(message.chunks) > 1
        axes.text(
            *spot,
            label,
            ha="center",
            va="center",
            fontsize=8,
            color="black" if bare else _readable_on(colour),
            bbox={
                "boxstyle": "round,pad=0.22",
                "facecolor": "white" if bare else colour,
                "edgecolor": GREY if bare else "white",
                "linewidth": 0.7,
            },
            zorder=2,
        )


def _free_spot(begin: Any, end: Any, placed: Boxes, width: float) -> Any:
    """Where on its arrow a label of ``width`` overlaps the labels in ``placed`` least."""
    spots = [begin + along * (end - begin) for along in ALONG]
    if not len(placed):
        return spots[0]
    room = np.array([width + 0.08, LETTER[1] + 0.04])
    overlaps = [np.clip(1 - abs(placed - spot) / room, 0, None).prod(axis=1).sum() for spot in spots]
    return spots[int(np.argmin(overlaps))]


def _draw_held(axes: Any, story: Story, layout: _Layout, palette: list[str], x: float, held: Held) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    schedule = story.schedule
    if not layout.nboxes:
        axes.plot([x] * schedule.nranks, np.arange(schedule.nranks) * ROW, "o", color=GREY, markersize=4)
        return
    width, height = BOX
    left = x - layout.strip / 2
    frames = [
        Rectangle((left + chunk * width, rank * ROW - height / 2), width, height)
        for rank in range(schedule.nranks)
        for chunk in range(schedule.nchunks)
    ]
    axes.add_collection(PatchCollection(frames, facecolor="white", edgecolor=FRAME, linewidth=0.6, zorder=3))
    filled, faces, edges = [], [], []
    for (rank, chunk), contributions in held.items():
        part = max(LEAST, height * len(contributions) / max(1, len(story.complete[chunk])))
        # Rows count downwards, so a box is filled from its bottom by going up.
        filled.append(Rectangle((left + chunk * width, rank * ROW + height / 2), width, -part))
        faces.append(palette[chunk])
        edges.append("black" if story.is_complete((rank, chunk), contributions) else FRAME)
    axes.add_collection(PatchCollection(filled, facecolor=faces, edgecolor=edges, linewidth=0.8, zorder=4))


def _draw_legend(figure: Any, story: Story, palette: list[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    schedule = story.schedule
    handles: list[Any] = []
    if COLLECTIVES[schedule.collective].reduces:
        handles.append(Line2D([], [], color=GREY, linestyle=(0, (3, 1.5)), label="+ added to the receiver's"))
    handles.append(Line2D([], [], color=GREY, label="copied"))
    if schedule.nchunks <= MOST_BOXES:
        handles.append(Patch(facecolor="white", edgecolor="black", linewidth=0.8, label="a whole chunk"))
    if 1 < schedule.nchunks <= MOST_BOXES // 2:
        handles += [
            Patch(color=colour, label=chunk_name(schedule, chunk)) for chunk, colour in enumerate(palette)
        ]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=len(handles),
        fontsize=9,
        frameon=False,
        columnspacing=1.2,
        handlelength=2.4,
    )


def _label(story: Story, message: Message) -> str:
    """What a message carries; nothing where there is one chunk only."""
    if story.schedule.nchunks == 1:
        return ""
    names = chunk_names(story.schedule, message.chunks)
    short = names if len(names) <= LONGEST else f"{len(message.chunks)} chunks"
    return ("+" if message.reduce else "") + short


def _most_sent(step: Step) -> int:
    """The most messages that one rank sends in a round; 0 in an empty one."""
    return max(Counter(message.src for message in step.messages).values(), default=0)


def _readable_on(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
