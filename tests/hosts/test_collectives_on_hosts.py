"""All collectives, on even and uneven numbers of ranks on two to four hosts."""

from __future__ import annotations

import sys

import pytest

from .rig import Rig

SHAPES = [(1, 1), (2, 2), (2, 1), (1, 1, 1), (3, 1, 2), (1, 1, 1, 1)]
LIMIT = 90.0  # seconds: more than a program's own deadline, after which every rank says where it is


@pytest.mark.parametrize("ranks_per_host", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_results(ranks_per_host: tuple[int, ...]) -> None:
    shape = ",".join(map(str, ranks_per_host))
    with Rig(len(ranks_per_host)) as rig:
        done = rig.run(ranks_per_host, [sys.executable, "-m", "tests.hosts.collectives", shape], LIMIT)
    assert done.returncode == 0, done.stdout
    assert "all right" in done.stdout
