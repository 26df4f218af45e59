"""How ranks find each other where nobody has set an address: MPI has told them already.

``init_process_group`` without ``init_method`` asks the handler of ``env://`` for a store, rank and size.
Where none of its variables is set, that is ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import count
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch.distributed as dist
from mpi4py import MPI

from mpicoll.torch.store import job_store

VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
_meetings = count()


def meet_over_mpi() -> None:
    """Let MPI answer where the environment does not."""
    # torch.distributed has a function of this name, too.
    handlers = sys.modules["torch.distributed.rendezvous"]._rendezvous_handlers
    by_environment = handlers["env"]

    def handler(url: str, **more: Any) -> Iterator[tuple[dist.Store, int, int]]:
        if any(name in os.environ for name in VARIABLES):
            return by_environment(url, **more)  # type: ignore[no-any-return]
        return _by_mpi(url)

    handlers["env"] = handler


def _by_mpi(url: str) -> Iterator[tuple[dist.Store, int, int]]:
    world = MPI.COMM_WORLD
    asked = {name: int(values[0]) for name, values in parse_qs(urlsplit(url).query).items()}
    for name, number in (("rank", world.rank), ("world_size", world.size)):
        if asked.get(name, number) != number:
            raise ValueError(f"{name}: expected {number}, as MPI has it, got {asked[name]}; leave it out")
    # Keys that an earlier process group has left would be taken for the other ranks' words.
    yield dist.PrefixStore(f"meeting {next(_meetings)}", job_store()), world.rank, world.size
