"""``mpicoll bench WHAT``: which module measures it. They are slow to import, and not all need MPI."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

MODULES = {
    "kernels": "mpicoll.bench.kernels",
    "gradients": "mpicoll.bench.gradients",
    "torch": "mpicoll.bench.torch_backend",
}


def command(args: Sequence[str], prog_name: str) -> None:
    """Hand the arguments to the module that ``args`` begin with the name of, else to the collectives'."""
    if args and args[0] in MODULES:
        importlib.import_module(MODULES[args[0]]).command(args=args[1:], prog_name=f"{prog_name} {args[0]}")
    else:
        importlib.import_module("mpicoll.bench.collectives").command(args=args, prog_name=prog_name)
