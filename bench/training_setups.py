"""What `mpicoll.bench.training` trains: every strategy and every mesh that a number of ranks has. No MPI."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

HIDDEN = (128, 64, 32)  # eight layers, so that each of up to eight stages has one
STAGES = SHARDS = MOST_RANKS = 8

EXACT = 0.0  # largest difference of a parameter where sums have one order at any number of ranks,
ROUNDING = 1e-10  # and where they have not, after `STEPS` in float64
SHORTFALL = 0.05  # of accuracy: own steps on few samples are noisy, but learn; what is broken does not
STEPS, BATCH = 20, 48  # for the difference; 48 samples are shared out unevenly by 5 and by 7 ranks


@dataclass(frozen=True)
class Setup:
    """One way to train; ``bound`` is the largest difference from one process, None if steps are others."""

    name: str
    bound: float | None = ROUNDING
    strategy: str = "allreduce"
    options: dict[str, Any] = field(default_factory=dict)
    mesh: dict[str, int] = field(default_factory=dict)
    shards: int | None = None


def setups(nranks: int) -> list[Setup]:
    """Every strategy with ranks that hold whole models, then every mesh of others, data axis first."""
    return [*_strategies(nranks), *_meshes(nranks)]


def _strategies(nranks: int) -> Iterator[Setup]:
    yield Setup("allreduce")
    yield Setup("sharded", strategy="sharded")
    yield Setup("deterministic", EXACT, shards=SHARDS)
    for strategy, bound in (("ps-sync", ROUNDING), ("ps-async", None)):
        yield Setup(strategy, bound, strategy)
        if nranks > 1:
            yield Setup(f"{strategy}, 1 server", bound, strategy, {"servers": 1})
    yield Setup("local", None, "local")
    for graph in ("ring", "exponential"):
        yield Setup(f"gossip, {graph}", None, "gossip", {"graph": graph})


def _meshes(nranks: int) -> Iterator[Setup]:
    """All sizes that multiply to ``nranks``, of at most `STAGES` stages; not those of the data axis alone."""
    for data, pipeline, tensor in product(range(nranks, 0, -1), repeat=3):
        if data * pipeline * tensor == nranks and pipeline * tensor > 1 and pipeline <= STAGES:
            sizes = {"data": data, "pipeline": pipeline, "tensor": tensor}
            name = ",".join(f"{axis}={size}" for axis, size in sizes.items())
            yield Setup(name, mesh=sizes)
