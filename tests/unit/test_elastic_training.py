"""Trainings whose ranks die at chosen moments, each in a job of its own.

What is left comes to what one process comes to.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mpicoll import launch
from mpicoll.train.checkpoint import newest

from .test_train_cli import ROOT

LIMIT = 60.0  # seconds for a job of two or three
PROMPT = 5.0  # seconds to go on within; it takes a hundredth where the machine has nothing else to do
STEPS = 24  # of 4 epochs
EXACT = 1e-10

# A rank dies when it comes to a function for the n-th time.
PROGRAM = """
import json, os, signal, sys
from pathlib import Path

from mpicoll.train import elastic, hashes
from mpicoll.train.backprop import Backprop
from mpicoll.train.errors import InputError
from mpicoll.train.keeping import Checkpoints
from mpicoll.train.loop import Trainer
from mpicoll.train.mirror import Mirror
from mpicoll.train.optimizer import Optimizer
from mpicoll.train.report import Progress
from mpicoll.train.strategies import Allreduce, Sharded
from tests.mpi.training import ALONE, COMM, FEATURES, new_trainer, outcome_of, trained

folder, job = Path(sys.argv[1]), json.loads(sys.argv[2])
features = {name: value for feature in job["features"] for name, value in FEATURES[feature].items()}
settings = {"shards": job["shards"], **features}
expected = trained(ALONE, **settings)
origin = COMM.rank

def die_in(path, nth):
    owner, name = eval(path.rpartition(".")[0]), path.rpartition(".")[2]
    before, calls = getattr(owner, name), []
    def dying(*args, **kwargs):
        calls.append(None)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*args, **kwargs)
    setattr(owner, name, dying)

if str(origin) in job["deaths"]:
    die_in(*job["deaths"][str(origin)])

def finish():
    keeper = Checkpoints(trainer.comm, folder / "kept", 5) if job["keeps"] else None
    trainer.train(4, Progress(), keeper)
    return outcome_of(trainer)

told = {}
trainer = new_trainer(COMM, strategy=job["strategy"], elastic=True, balance=job["balance"], **settings)
try:
    outcome = trainer.elastically(finish)
    pairs = [(outcome.parameters[name], value) for name, value in expected.parameters.items()]
    told = {
        "difference": max(float(abs(a - b).max()) for a, b in pairs),
        "same": outcome.sha256 == expected.sha256,
        "history": [[e.number, e.step, e.test_loss, e.train_loss] for e in outcome.history],
        "expected": [[e.number, e.step, e.test_loss, e.train_loss] for e in expected.history],
    }
except InputError as error:
    told = {"error": str(error)}
told["left"] = [trainer.comm.rank, trainer.comm.size]
told["lost"] = [[list(lost.ranks), lost.step, lost.seconds] for lost in trainer.lost]
(folder / f"rank {origin}").write_text(json.dumps(told))
trainer.close()
elastic.leave()
"""

Told = dict[str, Any]
Deaths = dict[int, tuple[str, int]]


@pytest.fixture(scope="module")
def mpirun() -> list[str]:
    """The launcher in which a job outlives its ranks."""
    try:
        return launch.command(4, [], elastic=True)[:-2]
    except launch.LauncherError as error:  # there is none, or it is not Open MPI's
        pytest.skip(str(error))


def environment(mpirun: list[str]) -> dict[str, str]:
    # Shared memory files of Open MPI's would be left by killed ranks.
    return {**launch.environment(mpirun[0]), "PYTHONPATH": str(ROOT), "OMPI_MCA_btl": "self,tcp"}


def survivors(
    mpirun: list[str],
    folder: Path,
    nranks: int,
    deaths: Deaths,
    strategy: str = "allreduce",
    features: tuple[str, ...] = (),
    shards: int | None = None,
    balance: bool = False,
    keeps: bool = False,
) -> dict[int, Told]:
    """What the ranks say that are left, by their first numbers."""
    (folder / "program.py").write_text(PROGRAM)
    job = {
        "deaths": deaths,
        "strategy": strategy,
        "features": features,
        "shards": shards,
        "balance": balance,
        "keeps": keeps,
    }
    line = [*mpirun, "-np", str(nranks), sys.executable, str(folder / "program.py"), str(folder)]
    ran = subprocess.run(
        [*line, json.dumps(job)],
        env=environment(mpirun),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    told = {int(path.name[5:]): json.loads(path.read_text()) for path in folder.glob("rank ?")}
    assert sorted(told) == [rank for rank in range(nranks) if rank not in deaths], ran.stdout + ran.stderr
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return told


def check(told: Mapping[int, Told], lost: list[list[Any]], bits: bool = False) -> None:
    """All survivors have come to what one process comes to, and know who was lost when."""
    for number, rank in enumerate(sorted(told)):
        said = told[rank]
        assert said["left"] == [number, len(told)], said
        assert [entry[:2] for entry in said["lost"]] == lost, said
        assert all(0 < seconds < PROMPT for _, _, seconds in said["lost"]), said
        assert said["difference"] < EXACT, said
        assert said["same"] or not bits, said
        steps = {step for _, step in lost}
        for (number_, step, test, train), wanted in zip(said["history"], said["expected"], strict=True):
            assert [number_, step] == wanted[:2]
            assert abs(test - wanted[2]) < EXACT
            # The dead have taken losses with them.
            known = not any(step - 6 < at <= step for at in steps)
            assert abs(train - wanted[3]) < (EXACT if known else 0.5), (step, train, wanted)


def test_one_after_the_other_until_one_is_left(tmp_path: Path, mpirun: list[str]) -> None:
    """Rank 0 when it has all sums, another while it evaluates, and one between two steps."""
    deaths = {0: ("Optimizer.step", 8), 2: ("Trainer.evaluate", 2), 3: ("Progress.step", 20)}
    told = survivors(mpirun, tmp_path, 4, deaths)
    assert told[1]["lost"][0][1] in (7, 8)  # whether another one has all sums, too, is a matter of luck
    check(told, [[[0], told[1]["lost"][0][1]], [[2], 12], [[3], 20]])


def test_with_shards(tmp_path: Path, mpirun: list[str]) -> None:
    """Between the two collectives of a step, in the one after them, and before it."""
    deaths = {1: ("Optimizer.step", 4), 3: ("Mirror.keep", 10), 0: ("Sharded.step", 15)}
    told = survivors(mpirun, tmp_path, 4, deaths, "sharded", ("adam", "dropout"))
    # Mirror.keep is called before the first step, too, and after each move.
    check(told, [[[1], 3], [[3], 7], [[0], told[2]["lost"][2][1]]])
    assert told[2]["lost"][2][1] in (12, 13, 14)


def test_the_same_bits_and_checkpoints(tmp_path: Path, mpirun: list[str]) -> None:
    """Rank 0, which writes them, dies before one; another while the others recover from that."""
    deaths = {0: ("Checkpoints.keep", 2), 2: ("Trainer.move", 1)}
    told = survivors(mpirun, tmp_path, 4, deaths, features=("augmented",), shards=6, keeps=True)
    check(told, [[[0, 2], 10]], bits=True)
    found = newest(tmp_path / "kept")
    assert found is not None and not found[1]
    assert found[0].step == STEPS and found[0].facts["ranks"] == 2


def test_before_the_first_step_and_after_the_last(tmp_path: Path, mpirun: list[str]) -> None:
    """Rank 0 dies when all that is left is to report."""
    deaths = {2: ("Allreduce.start", 1), 0: ("hashes._digest", 1)}
    told = survivors(mpirun, tmp_path, 3, deaths, features=("decaying rate",))
    check(told, [[[2], 0], [[0], STEPS]])


def test_in_the_backward_pass(tmp_path: Path, mpirun: list[str]) -> None:
    """With statistics over all ranks, and pieces that are accumulated."""
    deaths = {1: ("Backprop.gradients", 9)}
    told = survivors(mpirun, tmp_path, 3, deaths, features=("normalised", "nesterov"))
    check(told, [[[1], 8]])


def test_neighbours_that_die_one_after_the_other(tmp_path: Path, mpirun: list[str]) -> None:
    """The second one before it has taken a step without the first. With uneven parts of batches."""
    deaths = {0: ("Optimizer.step", 18), 1: ("Trainer._train", 2)}
    told = survivors(mpirun, tmp_path, 3, deaths, "sharded", ("accumulated",), balance=True)
    check(told, [[[0], 17], [[1], 17]])


def test_neighbours_that_die_together(tmp_path: Path, mpirun: list[str]) -> None:
    deaths = {1: ("Optimizer.step", 5), 2: ("Optimizer.step", 5)}
    told = survivors(mpirun, tmp_path, 4, deaths, "sharded")
    for rank in (0, 3):
        assert re.search(r"rank 2 is lost: .*got \[1, 2\] of 4 at once; .*--resume", told[rank]["error"])
        assert told[rank]["left"] == [rank // 3, 2]
