"""What ranks of the shared transport say when another one is killed, ends or fails: jobs of their own."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpicoll import launch
from mpicoll.transports.shared import has_ended

NRANKS = 3
VICTIM = 1
LIMIT = 30.0  # seconds for what takes two or three
PROMPT = 1.0  # seconds within which the others know
# A rank's parent, which outlives it: what launchers do when a process ends is not to be seen here.
KEEPER = '"$@"; while [ ! -e end ]; do sleep 0.05; done'
LIBRARIES = ("sm_segment", "vader_segment", "mpich_shm", "psm", "ucx_shm")  # whose files may be left

PROGRAM = """
import json, os, random, sys, time
from pathlib import Path
import numpy as np
from mpi4py import MPI
import mpicoll

folder, victim = Path(sys.argv[1]), int(sys.argv[2])
comm = mpicoll.Communicator(MPI.COMM_WORLD, transport="shared")
rank, size = comm.rank, comm.size

def write(name, content):
    (folder / f"{name}.part").write_text(json.dumps(content))
    (folder / f"{name}.part").rename(folder / name)

def tell(error):
    write(f"rank {rank}", {"kind": type(error).__name__, "text": str(error), "at": time.monotonic()})

def leave(told=0):
    # Not before so many ranks have told: the others would learn of this one. MPI cannot be ended without all.
    while len(list(folder.glob("rank ?"))) < told:
        time.sleep(0.001)
    os._exit(0)

def collectives(counts, turns):
    # Other sizes, memory and collectives all the time, the same on all ranks.
    common = random.Random(7)
    for _ in range(turns):
        count = common.choice(counts)
        new = comm.alloc if common.random() < 0.3 else np.zeros
        whole, part = new(count * size), new(count)
        common.choice([
            lambda: comm.Allreduce(part, whole[:count]),
            lambda: comm.Bcast(part, common.randrange(size)),
            lambda: comm.Allgather(part, whole),
            lambda: comm.Alltoall(whole, whole.copy()),
            lambda: comm.Reduce_scatter_block(whole, part),
            lambda: comm.Barrier(),
        ])()

comm.Barrier()
write(f"process {rank}", os.getpid())
"""

Report = dict[str, Any]


class Job:
    """A running program of several ranks."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder = folder
        self.pids: list[int] = []
        (folder / "program.py").write_text(PROGRAM + textwrap.dedent(text))
        (folder / "said").mkdir()
        program = [sys.executable, str(folder / "program.py"), str(folder / "said"), str(VICTIM)]
        line = launch.command(NRANKS, ["sh", "-c", KEEPER, "sh", *program])
        # Without Open MPI's shared memory, whose files a killed rank leaves.
        environment = {**launch.environment(line[0]), "OMPI_MCA_btl": "self,tcp"}
        with (folder / "output").open("w") as output:
            self.process = subprocess.Popen(
                line, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder
            )
        self.pids = [int(self.said(f"process {rank}")) for rank in range(NRANKS)]

    def said(self, name: str) -> Any:
        """What a rank has written, or will write soon."""
        until = time.monotonic() + LIMIT
        file = self.folder / "said" / name
        while not file.exists():
            assert time.monotonic() < until, f"no {name}: {self.output()}"
            assert self.process.poll() is None, f"no {name}: {self.output()}"
            time.sleep(0.002)
        return json.loads(file.read_text())

    def reports(self) -> dict[int, Report]:
        """What the ranks but the victim say, and when."""
        return {rank: self.said(f"rank {rank}") for rank in range(NRANKS) if rank != VICTIM}

    def output(self) -> str:
        return (self.folder / "output").read_text()

    def end(self) -> None:
        """No rank may be left, and then the launcher ends."""
        until = time.monotonic() + LIMIT
        while any(is_running(pid) for pid in self.pids):
            assert time.monotonic() < until, "processes are left"
            time.sleep(0.01)
        (self.folder / "end").touch()
        self.process.wait(LIMIT)

    def kill(self) -> None:
        for pid in self.pids:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        (self.folder / "end").touch()
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(LIMIT)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture
def run_job(tmp_path: Path) -> Any:
    """Starts a job; afterwards nothing of it may be left."""
    try:
        launch.find_mpirun()
    except launch.LauncherError as error:
        pytest.skip(str(error))
    jobs: list[Job] = []
    files = set(os.listdir("/dev/shm"))

    def run_job(text: str) -> Job:
        jobs.append(Job.__new__(Job))
        jobs[-1].__init__(tmp_path, text)  # type: ignore[misc]
        return jobs[-1]

    yield run_job
    for job in jobs:
        job.kill()
    left = {name for name in set(os.listdir("/dev/shm")) - files if not name.startswith(LIBRARIES)}
    assert not left


LOOP = """
try:
    collectives({counts}, 10_000_000)
except BaseException as error:
    tell(error)
    leave(size - 1)
"""


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("counts", [(1, 3, 100), (2000, 50_000), (1, 300_000, 1_000_000)], ids=str)
def test_the_others_learn_of_a_killed_rank(
    run_job: Callable[[str], Job], counts: tuple[int, ...], seed: int
) -> None:
    job = run_job(LOOP.format(counts=counts))
    time.sleep(random.Random(f"{counts} {seed}").uniform(0.01, 0.3))
    killed = time.monotonic()
    os.kill(job.pids[VICTIM], signal.SIGKILL)
    for rank, report in job.reports().items():
        assert report["kind"] == "RankFailedError", report
        # Of two ranks that wait, one may hear it from the other.
        assert f"rank {VICTIM} (process {job.pids[VICTIM]}) has ended" in report["text"], (rank, report)
        assert report["at"] - killed < PROMPT
    job.end()


@pytest.mark.parametrize(
    ("count", "end"),
    [(1, "leave()"), (1_000_000, "leave()"), (1_000_000, "sys.exit()"), (1, "raise ValueError")],
)
def test_the_others_learn_of_a_rank_that_ends(run_job: Callable[[str], Job], count: int, end: str) -> None:
    job = run_job(
        f"""
        if rank == victim:
            collectives([{count}], 5)
            write("gone", time.monotonic())
            {end}
        try:
            collectives([{count}], 10)
        except BaseException as error:
            tell(error)
            leave(size - 1)
        """
    )
    for report in job.reports().values():
        assert report["kind"] == "RankFailedError", report
        assert f"rank {VICTIM}" in report["text"]
        assert report["at"] - job.said("gone") < PROMPT
    if end == "leave()":  # ending MPI takes all ranks
        job.end()


@pytest.mark.parametrize("count", [30_000, 1_000_000])
def test_the_others_learn_of_ctrl_c_in_a_collective(run_job: Callable[[str], Job], count: int) -> None:
    """The rank itself lives on, so it is what it left behind that the others see."""
    job = run_job(
        f"""
        values, sums = np.ones({count}), np.zeros({count})
        if rank != victim:
            while not (folder / f"rank {{victim}}").exists():
                time.sleep(0.001)
        else:
            write("waiting", True)
        try:
            comm.Allreduce(values, sums, mpicoll.AVG)
        except BaseException as error:
            tell(error)
        leave(size)
        """
    )
    assert job.said("waiting")
    time.sleep(0.2)
    os.kill(job.pids[VICTIM], signal.SIGINT)
    left = job.said(f"rank {VICTIM}")
    assert left["kind"] == "KeyboardInterrupt"
    for report in job.reports().values():
        assert report["kind"] == "RankFailedError", report
        assert "KeyboardInterrupt" in report["text"]
        assert report["at"] - left["at"] < PROMPT
    job.end()


def test_the_others_learn_why_a_rank_leaves_the_block(run_job: Callable[[str], Job]) -> None:
    """An exception between two collectives, that leaves ``with Communicator(...)``."""
    job = run_job(
        """
        try:
            with comm:
                for turn in range(10):
                    if turn == 5 and rank == victim:
                        raise ValueError("no more data")
                    comm.Allreduce(np.ones(3), np.zeros(3))
        except BaseException as error:
            tell(error)
        leave(size)
        """
    )
    left = job.said(f"rank {VICTIM}")
    assert left["kind"] == "ValueError"
    for report in job.reports().values():
        assert report["kind"] == "RankFailedError", report
        assert "ValueError: no more data" in report["text"]
        assert report["at"] - left["at"] < PROMPT
    job.end()


@pytest.mark.parametrize("end", ["leave()", "sys.exit()"])
def test_who_has_done_its_part_may_end(run_job: Callable[[str], Job], end: str) -> None:
    """The root still waits for a third rank, longer than it waits without a look around."""
    job = run_job(
        f"""
        values, sums = np.full(3, rank), np.zeros(3, int)
        if rank == 2:
            time.sleep(0.2)
        try:
            comm.Reduce(values, sums, root=0)
            if rank == 0:
                write("sums", sums.tolist())
        except BaseException as error:
            tell(error)
        if rank == victim:
            {end}
        while not (folder / "sums").exists() and not (folder / "rank 0").exists():
            time.sleep(0.001)
        leave()
        """
    )
    until = time.monotonic() + LIMIT
    while not (job.folder / "said" / "rank 0").exists() and not (job.folder / "said" / "sums").exists():
        assert time.monotonic() < until, job.output()
        time.sleep(0.002)
    assert not (job.folder / "said" / "rank 0").exists(), job.said("rank 0")
    assert job.said("sums") == [sum(range(NRANKS))] * 3


def test_a_program_with_many_open_files_sees_who_has_ended() -> None:
    with subprocess.Popen(["sleep", "60"]) as process, contextlib.ExitStack() as files:
        for _ in range(1100):
            files.enter_context(open(os.devnull))
        assert not has_ended(process.pid)
        process.kill()
        process.wait(10)
        assert has_ended(process.pid)
