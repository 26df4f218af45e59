"""Draw the pictures of these pages: ``python docs/make_pictures.py [NAME ...]``, into docs/pictures.

Equal schedules give equal files, so what has changed is what git shows as changed. Needs the extra ``plots``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mpicoll import draw
from mpicoll.algorithms import hierarchical_schedule, schedule
from mpicoll.algorithms.hierarchical import Topology
from mpicoll.schedule import Schedule
from mpicoll.simulate import Machine, training
from mpicoll.simulate.command import command
from mpicoll.simulate.machine import DEFAULT
from mpicoll.simulate.pictures import draw_scaling

PICTURES = Path(__file__).resolve().parent / "pictures"

# Few ranks, so that every message can be read; enough of them to show the pattern.
SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "ring-allreduce": lambda: schedule("allreduce", "ring", 4),
    "recursive_doubling-allreduce": lambda: schedule("allreduce", "recursive_doubling", 8),
    "rabenseifner-allreduce": lambda: schedule("allreduce", "rabenseifner", 4),
    "recursive_halving-reduce_scatter": lambda: schedule("reduce_scatter", "recursive_halving", 6),
    "double_tree-broadcast": lambda: schedule("broadcast", "double_tree", 6, nchunks=4),
    "direct-allreduce": lambda: schedule("allreduce", "direct", 4),
    "two_shot-allreduce": lambda: schedule("allreduce", "two_shot", 4),
    "binomial-broadcast": lambda: schedule("broadcast", "binomial", 8),
    "binomial-scatter": lambda: schedule("scatter", "binomial", 8),
    "scatter_allgather-broadcast": lambda: schedule("broadcast", "scatter_allgather", 4),
    "chain-broadcast": lambda: schedule("broadcast", "chain", 4, nchunks=4),
    "bruck-allgather": lambda: schedule("allgather", "bruck", 5),
    "pairwise-alltoall": lambda: schedule("alltoall", "pairwise", 4),
    "bruck-alltoall": lambda: schedule("alltoall", "bruck", 4),
    "dissemination-barrier": lambda: schedule("barrier", "dissemination", 5),
    "hierarchical-allreduce": lambda: hierarchical_schedule("allreduce", Topology.of_sizes([2, 3]), "ring"),
    "bidirectional_ring-allgather": lambda: schedule("allgather", "bidirectional_ring", 5),
    "torus-allreduce": lambda: schedule("allreduce", "torus", 4),
    "two_level-allreduce": lambda: schedule("allreduce", "two_level", 4),
    "swing-allreduce": lambda: schedule("allreduce", "swing", 4),
    "swing_latency-allreduce": lambda: schedule("allreduce", "swing_latency", 8),
    "bine-broadcast": lambda: schedule("broadcast", "bine", 8),
    "pat-allgather": lambda: schedule("allgather", "pat", 5),
}

# Machines whose map of the fastest allreduce is drawn, as ``mpicoll simulate allreduce --map`` draws it.
MAPS = ("dgx-h100", "torus")


def main(names: list[str]) -> None:
    """Draw those of ``names``; all if there are none. SystemExit names one that is not known."""
    known = pictures()
    for name in names or known:
        if name not in known:
            raise SystemExit(f"NAME: expected one of {', '.join(known)}; got {name!r}")
        known[name]()


def pictures() -> dict[str, Callable[[], None]]:
    """What draws each picture, by its name without suffix."""
    schedules = {name: partial(_draw_schedule, name) for name in SCHEDULES}
    maps = {f"map-allreduce-{machine}": partial(_draw_map, machine) for machine in MAPS}
    return {**schedules, **maps, "scaling": _draw_scaling}


def _draw_schedule(name: str) -> None:
    draw.picture(SCHEDULES[name](), PICTURES / f"{name}.svg")


def _draw_map(machine: str) -> None:
    path = PICTURES / f"map-allreduce-{machine}.png"
    command.main(["allreduce", "--machine", machine, "--map", str(path)], standalone_mode=False)


def _draw_scaling() -> None:
    """Every job on the default machine; published figures each on the machine that they were measured on."""
    scalings = [training.scale(job, Machine.load(DEFAULT)) for job in training.JOBS.values()]
    published = [(figure, training.predict_published(figure).efficiency) for figure in training.PUBLISHED]
    draw_scaling(scalings, published, PICTURES / "scaling.png")


if __name__ == "__main__":
    main(sys.argv[1:])
