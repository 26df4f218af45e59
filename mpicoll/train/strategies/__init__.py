"""Strategies: how ranks that hold parts of a batch arrive at new parameters. One file of equations each."""

from mpicoll.train.strategies.allreduce import Allreduce
from mpicoll.train.strategies.averaging import GRAPHS, Gossip, Local
from mpicoll.train.strategies.base import Strategy, check_choice
from mpicoll.train.strategies.fixed_order import FixedOrder
from mpicoll.train.strategies.parameter_server import AsyncParameterServer, ParameterServer
from mpicoll.train.strategies.sharded import Sharded

STRATEGIES: dict[str, type[Strategy]] = {
    kind.name: kind for kind in (Allreduce, Sharded, Local, Gossip, ParameterServer, AsyncParameterServer)
}


def strategy_named(name: str) -> type[Strategy]:
    """The class of this name; ValueError if there is none."""
    check_choice("strategy", name, list(STRATEGIES))
    return STRATEGIES[name]


__all__ = [
    "GRAPHS",
    "STRATEGIES",
    "Allreduce",
    "AsyncParameterServer",
    "FixedOrder",
    "Gossip",
    "Local",
    "ParameterServer",
    "Sharded",
    "Strategy",
    "strategy_named",
]
