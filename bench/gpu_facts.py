"""``mpirun -np 2 python -m mpicoll.bench.gpu_facts``: what a GPU and its driver allow.

How fast memory is copied, whether processes can open each other's GPU memory, what a kernel's launch costs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from mpi4py import MPI

from mpicoll import Communicator

from .about import layout
from .contenders import Action, Memory, Unsupported
from .gpu_arrays import Arrays, cupy_arrays, gpu_facts
from .gpu_contenders import transport
from .gpu_limits import measure_limits
from .jobs import about_job, agreed, main, refusing
from .options import check_writable, json_option

PROGRAM = "python -m mpicoll.bench.gpu_facts"
LAUNCHES = 1000
SMALL = 4  # bytes

Facts = dict[str, Any]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@json_option
def _command(json: Path | None) -> tuple[Path | None]:
    """Find out what the GPU and its driver allow, on all ranks that mpirun started; two are enough."""
    return (json,)


@refusing
def run(comm: Communicator, args: Sequence[str], prog_name: str = PROGRAM) -> int:
    """0, on every rank."""
    options = agreed(comm, partial(_parse, comm, args, prog_name))
    if options is None:
        return 0
    arrays = cupy_arrays(comm)
    report = {**about_job(comm, prog_name, args, {}), "gpus": [gpu_facts(arrays.device)]}
    if comm.rank == 0:
        report["limits"] = measure_limits(arrays.device, arrays.room())._asdict()
        report["launches"] = [
            _launches(name, launch, arrays.synchronise) for name, launch in _launchers(arrays)
        ]
    comm.Barrier()
    report["ipc"] = sharing(comm, arrays)
    if comm.rank == 0:
        click.echo(layout(report), nl=False)
        if options[0] is not None:
            options[0].write_text(layout(report))
    return 0


command = partial(main, run)


def _parse(comm: Communicator, args: Sequence[str], prog_name: str) -> tuple[Path | None] | None:
    """None if only ``--help`` was wanted."""
    outcome = _command.main(list(args), prog_name, standalone_mode=False)
    if not isinstance(outcome, tuple):
        return None
    if outcome[0] is not None and comm.rank == 0:
        check_writable("--json", outcome[0])
    return outcome


def sharing(comm: MPI.Intracomm, arrays: Arrays) -> str:
    """Whether ranks can open each other's GPU memory, in words. Collective."""
    try:
        with transport(comm, Memory(arrays.empty, SMALL), "ipc"):
            return "works"
    except Unsupported as error:
        return str(error)


def _launchers(arrays: Arrays) -> Iterator[tuple[str, Action]]:
    """A kernel that does nothing, as each library launches it; and ours, which checks its arguments."""
    import cupy
    from mpicoll.kernels import reduce_cuda
    from numba import cuda

    nothing = cupy.RawKernel('extern "C" __global__ void nothing() {}', "nothing")
    yield "CuPy", partial(nothing, (1,), (1,), ())
    yield "Numba", cuda.jit(lambda: None)[1, 1]
    one, other = (arrays.empty(SMALL).view(np.float32) for _ in range(2))
    for array in (one, other):
        arrays.fill(array, 0)
    yield "reduce_cuda.reduce", partial(reduce_cuda.reduce, "SUM", one, other)


def _launches(name: str, launch: Action, synchronise: Callable[[], None]) -> Facts:
    """Microseconds of one launch among many: until it is ordered, and until it is done."""
    launch()
    synchronise()
    start = time.perf_counter()
    for _ in range(LAUNCHES):
        launch()
    ordered = time.perf_counter() - start
    synchronise()
    done = time.perf_counter() - start
    return {"by": name, "ordered": ordered / LAUNCHES * 1e6, "done": done / LAUNCHES * 1e6}


if __name__ == "__main__":
    command(sys.argv[1:], PROGRAM)
