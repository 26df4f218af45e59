"""Programs of several ranks, some of which may die: each with an end, and nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mpicoll import launch

LIMIT = 60.0  # seconds for what takes three where the machine has nothing else to do

# What every program begins with. What a rank writes is there as a whole or not at all.
PROGRAM = """
import json, os, signal, sys, threading, time
from pathlib import Path
import numpy as np
from mpi4py import MPI
import mpicoll
from mpicoll.faults import FAULTS, RankFailedError

folder = Path(sys.argv[1])
world = MPI.COMM_WORLD.rank

def write(name, content):
    (folder / f"{name}.part").write_text(json.dumps(content))
    (folder / f"{name}.part").rename(folder / name)

def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.002)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

write(f"process {world}", os.getpid())
"""


class Job:
    """A program under way."""

    def __init__(self, folder: Path, nranks: int, text: str, elastic: bool, more: Mapping[str, str]) -> None:
        self.folder, self.nranks = folder, nranks
        (folder / "program.py").write_text(PROGRAM + textwrap.dedent(text))
        (folder / "said").mkdir()
        program = [sys.executable, str(folder / "program.py"), str(folder / "said")]
        line = launch.command(nranks, program, elastic)
        # Without Open MPI's shared memory, whose files a killed rank leaves.
        environment = {**launch.environment(line[0]), "OMPI_MCA_btl": "self,tcp", **more}
        with (folder / "output").open("w") as output:
            self.process = subprocess.Popen(
                line, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder
            )

    def said(self, name: str) -> Any:
        """What a rank has written, or will write soon."""
        until = time.monotonic() + LIMIT
        file = self.folder / "said" / name
        while not file.exists():
            assert time.monotonic() < until, f"no {name}: {self.output()}"
            assert self.process.poll() is None or file.exists(), f"no {name}: {self.output()}"
            time.sleep(0.005)
        return json.loads(file.read_text())

    def write(self, name: str) -> None:
        """Let ranks that wait for it go on."""
        (self.folder / "said" / name).write_text("null")

    def pid(self, rank: int) -> int:
        return int(self.said(f"process {rank}"))

    def output(self) -> str:
        return (self.folder / "output").read_text()

    def status(self) -> int:
        """Of the launcher, when all has ended."""
        return self.process.wait(LIMIT)

    def kill(self) -> None:
        """Whatever is left."""
        for rank in range(self.nranks):
            with suppress(OSError, ValueError):
                pid = int((self.folder / "said" / f"process {rank}").read_text())
                if str(self.folder) in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            self.process.kill()


@contextmanager
def running(
    folder: Path, nranks: int, text: str, elastic: bool = False, more: Mapping[str, str] | None = None
) -> Iterator[Job]:
    """A job of this program, which is killed at the end if it has not ended."""
    job = Job(folder, nranks, text, elastic, more or {})
    try:
        yield job
    finally:
        job.kill()


def library() -> str | None:
    """Whose launcher there is; None if there is none."""
    try:
        return launch.launcher_library()
    except launch.LauncherError:
        return None


needs_launcher = pytest.mark.skipif(library() is None, reason="needs mpirun")
needs_ulfm = pytest.mark.skipif(
    library() != launch.OPEN_MPI, reason="needs Open MPI, whose jobs can outlive a rank"
)
