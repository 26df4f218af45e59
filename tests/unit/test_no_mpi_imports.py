"""Studying schedules needs NumPy only: no MPI library, no compiler, no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKED = ("mpi4py", "numba", "llvmlite", "cupy")
PROGRAM = f"""
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
importlib.import_module(sys.argv[1])
assert not set({BLOCKED}) & set(sys.modules)
"""


@pytest.mark.parametrize(
    "module",
    [
        "mpicoll",
        "mpicoll.schedule",
        "mpicoll.algorithms",
        "mpicoll.verify",
        "mpicoll.cli",
        "mpicoll.exchange",
        "mpicoll.draw.command",
        "mpicoll.simulate.command",
        "mpicoll.trace.command",
        "mpicoll.tune.search",
        "mpicoll.tune.table",
    ],
)
def test_imports_without_mpi_numba_and_cupy(module: str) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, module], check=True, timeout=60)


def test_the_block_works() -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", PROGRAM, "mpi4py.MPI"], capture_output=True, text=True, timeout=60
    )
    assert outcome.returncode == 1
    assert "ImportError: mpi4py" in outcome.stderr
