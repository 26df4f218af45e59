"""``mpirun -np N python -m mpicoll.bench.compression``: accuracy beside the bytes that gradients take.

What was measured before is shown again without MPI: ``python -m mpicoll.bench.compression --from FILE``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import compression_options

PROGRAM = "python -m mpicoll.bench.compression"


def main(args: Sequence[str]) -> None:
    """Train, on all ranks, or show a stored result."""
    if any(arg.partition("=")[0] == "--from" for arg in args):
        compression_options.command.main(list(args), PROGRAM)
    from .compression_runs import command  # needs MPI

    command(args, PROGRAM)


if __name__ == "__main__":
    main(sys.argv[1:])
