"""What the other ranks say when one is killed, ends or fails in the middle of a step of gradients."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.unit import test_dead_ranks
from tests.unit.test_dead_ranks import NRANKS, VICTIM, Job

PROMPT = 3.0  # seconds within which the others know

run_job = test_dead_ranks.run_job  # the fixture

# Large gradients, which are reduced where they are, and small ones, which are packed.
PROGRAM = """
from mpicoll.compression import Int8

SHAPES = [(200_000,), (3,), (40, 30), (), (70_000,), (500,)]
kind = {kind!r}
made = [np.zeros(shape, np.float32) for shape in SHAPES] if kind == "arrays" else SHAPES
compression = Int8() if kind == "compressed" else None
sync = mpicoll.GradientSync(comm, made, bucket_bytes=4000, compression=compression, overlap=True)

def steps(turns):
    own = random.Random(rank)
    for _ in range(turns):
        for i in reversed(range(len(SHAPES))):
            if own.random() < 0.1:
                time.sleep(own.uniform(0, 0.003))  # the backward pass
            sync.ready(i)
        sync.wait()
"""

KINDS = ("shapes", "arrays", "compressed")
ENDS = ("leave()", "sys.exit()", "raise ValueError")
kinds = pytest.mark.parametrize("kind", KINDS)


def check_reports(job: Job, since: float, text: str) -> None:
    """All ranks but one know, soon, that it has failed; of two, one may hear it from the other."""
    for rank, report in job.reports().items():
        assert report["kind"] == "RankFailedError", (rank, report)
        assert f"rank {VICTIM}" in report["text"], (rank, report)
        assert text in report["text"], (rank, report)
        assert report["at"] - since < PROMPT, (rank, report)


@kinds
def test_a_rank_is_killed_at_any_time(run_job: Callable[[str], Job], kind: str) -> None:
    job = run_job(
        PROGRAM.format(kind=kind)
        + """
steps(2)
write(f"begun {rank}", True)
try:
    steps(10_000_000)
except BaseException as error:
    tell(error)
    leave(size - 1)
"""
    )
    for rank in range(NRANKS):  # what comes before talks in messages, which die with a rank
        assert job.said(f"begun {rank}")
    time.sleep(random.Random(kind).uniform(0.01, 0.3))
    killed = time.monotonic()
    os.kill(job.pids[VICTIM], signal.SIGKILL)
    check_reports(job, killed, "has ended")
    job.end()


# Where the rank stands still until it is killed.
PLACES = {
    "before it has anything": "pass",
    "between two gradients": "sync.ready(5); sync.ready(4)",
    "before the wait": "sync.ready_all()",
}


@pytest.mark.parametrize(("kind", "place"), [*zip(KINDS, PLACES, strict=True)])
def test_a_rank_is_killed_before_it_waits(run_job: Callable[[str], Job], kind: str, place: str) -> None:
    job = run_job(
        PROGRAM.format(kind=kind)
        + f"""
steps(2)
if rank == victim:
    {PLACES[place]}
    write("here", True)
    time.sleep(60)
try:
    steps(1)
except BaseException as error:
    tell(error)
    leave(size - 1)
"""
    )
    assert job.said("here")
    time.sleep(0.1)
    killed = time.monotonic()
    os.kill(job.pids[VICTIM], signal.SIGKILL)
    if place == "before the wait":  # its thread may have done all, but for what is said at the end
        assert {report["kind"] for report in job.reports().values()} == {"RankFailedError"}
    else:
        check_reports(job, killed, "has ended")
    job.end()


@kinds
def test_a_rank_is_killed_while_it_waits(run_job: Callable[[str], Job], kind: str) -> None:
    """The others come to the step when it is dead."""
    job = run_job(
        PROGRAM.format(kind=kind)
        + """
steps(2)
if rank != victim:
    while not (folder / "killed").exists():
        time.sleep(0.001)
else:
    write("here", True)
try:
    steps(1)
except BaseException as error:
    tell(error)
    leave(size - 1)
"""
    )
    assert job.said("here")
    time.sleep(0.2)
    killed = time.monotonic()
    os.kill(job.pids[VICTIM], signal.SIGKILL)
    (job.folder / "said" / "killed").write_text("true")
    check_reports(job, killed, "has ended")
    job.end()


@pytest.mark.parametrize(("kind", "end"), [*zip(KINDS, ENDS, strict=True)])
def test_a_rank_ends_in_the_middle_of_a_step(run_job: Callable[[str], Job], kind: str, end: str) -> None:
    job = run_job(
        PROGRAM.format(kind=kind)
        + f"""
steps(2)
if rank == victim:
    sync.ready(5)
    sync.ready(4)
    write("gone", time.monotonic())
    {end}
try:
    steps(10)
except BaseException as error:
    tell(error)
    leave(size - 1)
"""
    )
    check_reports(job, job.said("gone"), "has ended")
    if end == "leave()":  # ending MPI takes all ranks
        job.end()


@kinds
def test_ctrl_c_while_a_rank_waits(run_job: Callable[[str], Job], kind: str) -> None:
    """The rank itself lives on, so it is what it left behind that the others see."""
    job = run_job(
        PROGRAM.format(kind=kind)
        + """
steps(2)
if rank != victim:
    while not (folder / f"rank {victim}").exists():
        time.sleep(0.001)
else:
    write("waiting", True)
try:
    steps(1)
except BaseException as error:
    tell(error)
leave(size)
"""
    )
    assert job.said("waiting")
    time.sleep(0.3)
    interrupted = time.monotonic()
    os.kill(job.pids[VICTIM], signal.SIGINT)
    left = job.said(f"rank {VICTIM}")
    assert left["kind"] == "KeyboardInterrupt"
    assert left["at"] - interrupted < PROMPT
    check_reports(job, left["at"], "KeyboardInterrupt")
    job.end()


def test_an_exception_in_a_stage_of_a_compression(run_job: Callable[[str], Job]) -> None:
    """It is raised where the program waits, and the others learn of it."""
    job = run_job(
        PROGRAM.format(kind="compressed")
        + """
def fail():
    raise MemoryError("no more of it")

steps(2)
sync.close()
if rank == victim:
    Int8.bind = lambda *args: type("Codec", (), {"stages": [fail]})()
sync = mpicoll.GradientSync(comm, SHAPES, compression=Int8(), overlap=True)
try:
    steps(1)
except BaseException as error:
    tell(error)
leave(size)
"""
    )
    left = job.said(f"rank {VICTIM}")
    assert (left["kind"], left["text"]) == ("MemoryError", "no more of it")
    check_reports(job, left["at"], "MemoryError: no more of it")
    job.end()
