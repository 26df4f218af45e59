"""Parameter servers when a rank is killed: jobs of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpicoll import launch
from mpicoll.launch import library_of
from tests.unit import test_dead_ranks
from tests.unit.test_dead_ranks import LIMIT, VICTIM, Job

run_job = test_dead_ranks.run_job  # the fixture


@pytest.fixture(autouse=True)
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where messages come through sockets, Open MPI ends the job with a rank."""
    options = launch.options
    more = ["--mca", "btl", "self,sm"]

    def with_more(library: str, nranks: int, elastic: bool) -> list[str]:
        return options(library, nranks, elastic) + more * (library == launch.OPEN_MPI)

    monkeypatch.setattr(launch, "options", with_more)


PROMPT = 3.0  # seconds within which the others know

TRAINING = """
from mpicoll.train.layers import Linear
from mpicoll.train.model import Sequential
from mpicoll.train.optimizer import SGD
from mpicoll.train.strategies import AsyncParameterServer, ParameterServer

model = Sequential(Linear(50, 30), seed=rank)
strategy = {strategy}
write(f"made {{rank}}", True)

def train(steps):
    strategy.start()
    for step in range(steps):
        if rank == victim and step == {last}:
            write("here", True)
            time.sleep(60)
        model.gradients[...] = 0.1 * model.parameters / strategy.parts
        strategy.step(0.1, 1 / strategy.parts)
        if step == 10:
            write(f"begun {{rank}}", True)
        if rank != victim and step > 10:
            time.sleep(0.001)
    write(f"trained {{rank}}", steps)
    strategy.finish()
"""

OUTCOME = """
try:
    strategy.serve() if strategy.serves_only else train({steps})
    lost = list(strategy.lost)
    strategy.close()
    total = float(model.parameters.astype("f8").sum())
    write(f"rank {{rank}}", {{"kind": "finished", "lost": lost, "sum": total, "at": time.monotonic()}})
except BaseException as error:
    tell(error)
leave(size - 1)
"""


def program(strategy: str, steps: int, last: int = -1) -> str:
    """Train by ``strategy``; the victim stands still before step ``last``."""
    return TRAINING.format(strategy=strategy, last=last) + OUTCOME.format(steps=steps)


@pytest.mark.parametrize("staleness", [None, 0, 2])
def test_asynchronous_workers_go_on(run_job: Callable[[str], Job], staleness: int | None) -> None:
    """Ranks 0 and 1 work, 2 serves; rank 1 is killed in the middle of its steps."""
    made = f"AsyncParameterServer(MPI.COMM_WORLD, model, SGD(), servers=1, staleness={staleness})"
    job = run_job(program(made, steps=500))
    assert job.said("begun 0") and job.said("begun 1")
    os.kill(job.pids[VICTIM], signal.SIGKILL)
    reports = job.reports()
    assert [reports[rank]["kind"] for rank in (0, 2)] == ["finished"] * 2, reports
    assert [reports[rank]["lost"] for rank in (0, 2)] == [[VICTIM]] * 2
    assert reports[0]["sum"] == reports[2]["sum"]
    job.end()


def test_a_bound_on_staleness_waits_for_no_dead_worker(run_job: Callable[[str], Job]) -> None:
    """Rank 0 waits for rank 1, which stands still; when that is killed, rank 0 takes all its steps."""
    job = run_job(
        program("AsyncParameterServer(MPI.COMM_WORLD, model, SGD(), servers=1, staleness=3)", 300, last=20)
    )
    assert job.said("here")
    time.sleep(0.3)
    assert not (job.folder / "said" / "trained 0").exists()
    os.kill(job.pids[VICTIM], signal.SIGKILL)
    assert job.said("trained 0") == 300
    assert job.reports()[0]["lost"] == [VICTIM]
    job.end()


FATAL = {
    "a worker of a synchronous training": "ParameterServer(MPI.COMM_WORLD, model, SGD(), servers=1)",
    "a worker that serves, too": "AsyncParameterServer(MPI.COMM_WORLD, model, SGD(), servers=0)",
    "a synchronous server and worker": "ParameterServer(MPI.COMM_WORLD, model, SGD(), servers=0)",
    "a server": "AsyncParameterServer(MPI.COMM_WORLD, model, SGD(), servers=2)",
    "a synchronous server": "ParameterServer(MPI.COMM_WORLD, model, SGD(), servers=2)",
}


@pytest.mark.parametrize("strategy", FATAL.values(), ids=[*FATAL])
def test_what_cannot_go_on_ends_with_an_error(run_job: Callable[[str], Job], strategy: str) -> None:
    job = run_job(program(strategy, steps=10_000_000))
    assert job.said("begun 0")
    killed = time.monotonic()
    os.kill(job.pids[VICTIM], signal.SIGKILL)
    first = job.said("rank 0")
    assert first["kind"] == "RankFailedError", first
    assert f"rank {VICTIM} (process {job.pids[VICTIM]}) has ended" in first["text"]
    assert first["at"] - killed < PROMPT
    if "servers=2" not in strategy:  # else rank 2 has lost nobody yet
        other = job.said("rank 2")
        assert other["kind"] == "RankFailedError" and f"rank {VICTIM} " in other["text"], other
        assert other["at"] - killed < PROMPT


WITH_ULFM = """
import json, os, signal, sys
from pathlib import Path
from mpi4py import MPI

rank, size, victim = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, 1
folder = Path(sys.argv[1])
from mpicoll.train.layers import Linear
from mpicoll.train.model import Sequential
from mpicoll.train.optimizer import SGD
from mpicoll.train.strategies import AsyncParameterServer
from mpicoll.train.strategies.server import Watch

Watch.has_ended = lambda self, rank: False  # it is MPI that tells
model = Sequential(Linear(50, 30), seed=rank)
strategy = AsyncParameterServer(MPI.COMM_WORLD, model, SGD(), servers=1, staleness=2)
if strategy.serves_only:
    strategy.serve()
else:
    strategy.start()
    for step in range(100):
        if rank == victim and step == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        model.gradients[...] = 0.1 * model.parameters / strategy.parts
        strategy.step(0.1, 1 / strategy.parts)
    strategy.finish()
(folder / f"rank {rank}").write_text(json.dumps([list(strategy.lost), model.parameters.tolist()]))
strategy.close()
"""


def test_mpi_tells_who_has_died(tmp_path: Path) -> None:
    """Four ranks under ULFM, one of which kills itself; the others end MPI as usual."""
    try:
        mpirun = launch.find_mpirun()
    except launch.LauncherError as error:
        pytest.skip(str(error))
    if library_of(mpirun) != launch.OPEN_MPI:
        pytest.skip("ULFM is Open MPI's")
    (tmp_path / "program.py").write_text(WITH_ULFM)
    program = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    command = launch.command(4, program, elastic=True)
    ended = subprocess.run(
        command,
        env=launch.environment(command[0]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    said = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("rank ?")}
    assert sorted(said) == ["rank 0", "rank 2", "rank 3"], ended.stdout + ended.stderr
    assert all(lost == [1] for lost, _ in said.values())
    assert said["rank 0"][1] == said["rank 2"][1] == said["rank 3"][1]
