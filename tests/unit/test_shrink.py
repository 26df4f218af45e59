"""Ranks are killed, and the others go on: jobs of their own, under ``mpirun --with-ft ulfm``."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.rank_jobs import needs_launcher, needs_ulfm, running

PROMPT = 5.0  # seconds within which all know, and go on; it takes a tenth of one where the machine is idle

# One rank after the other dies, each in another kind of call.
PROGRAM = """
comm = mpicoll.Communicator(MPI.COMM_WORLD, transport={transport!r})
deaths = {deaths!r}

def allreduce(comm):
    while True:
        comm.Allreduce(np.ones(100), np.zeros(100))

def large_allreduce(comm):
    while True:
        comm.Allreduce(np.ones(300_000), np.zeros(300_000))

def objects(comm):
    while True:
        comm.allgather({{"rank": comm.rank}})

def barrier(comm):
    while True:
        comm.Barrier()

def nonblocking(comm):
    while True:
        requests = [comm.Iallreduce(np.ones(100), np.zeros(100)) for _ in range(3)]
        MPI.Request.Waitall(requests)

def persistent(comm):
    call = comm.Allreduce_init(np.ones(100), np.zeros(100))
    while True:
        call.Start()
        call.Wait()

def gradients(comm):
    sync = mpicoll.GradientSync(comm, [(20_000,), (3,), (500,)], bucket_bytes=4000, overlap=True)
    while True:
        sync.ready_all()
        sync.wait()

def computing(comm):
    time.sleep(0.3)  # the victim is dead by then, in no collective
    comm.Barrier()
    time.sleep(60)

def check(comm):
    sums = np.zeros(37, np.int64)
    comm.Allreduce(np.arange(37) + world, sums)
    ranks = comm.allgather(world)
    assert ranks == sorted(ranks), ranks
    assert sums.tolist() == (len(ranks) * np.arange(37) + sum(ranks)).tolist()
    got = np.full(5, world)
    comm.Bcast(got, root=comm.size - 1)
    assert (got == ranks[-1]).all()
    comm.Iallreduce(np.arange(37) + world, sums).Wait()
    assert sums.tolist() == (len(ranks) * np.arange(37) + sum(ranks)).tolist()
    comm.Barrier()
    return ranks

reports = []
for victim, scene, delay in deaths:
    ranks = check(comm)
    before = comm.Dup()
    if world == victim:
        if scene == "computing":
            die()
        threading.Timer(delay, die).start()
    try:
        globals()[scene](comm)
    except RankFailedError as error:
        failed = error
    began = time.monotonic()
    try:
        before.Barrier()
    except RankFailedError as error:
        duplicates = error.ranks
    new = comm.shrink()
    shrunk = time.monotonic()
    before.Free()
    comm.Free()
    freed = time.monotonic()
    reports.append({{
        "scene": scene,
        "failed": [ranks[rank] for rank in failed.ranks],
        "duplicate": [ranks[rank] for rank in duplicates],
        "text": str(failed),
        "seconds to shrink": shrunk - began,
        "seconds to free": freed - shrunk,
        "left": check(new),
        "world": world,
        "rank": new.rank,
    }})
    comm = new
write(f"reports {{world}}", reports)
comm.Free()
"""

SCENES = (
    "allreduce",
    "objects",
    "barrier",
    "gradients",
    "computing",
    "large_allreduce",
    "nonblocking",
    "persistent",
)
ORDERS = ([0], [1, 0], [1, 3, 2], [0, 2, 3])  # ranks in the order of their deaths

Death = tuple[int, str, float]  # who, in which function, after how many seconds there


def deaths(order: Sequence[int], transport: str) -> list[Death]:
    """One after the other; every function in some job of each transport."""
    first = sum(len(other) for other in ORDERS[: ORDERS.index(list(order))])
    chosen = random.Random(f"{order} {transport}")
    return [
        (rank, SCENES[(first + i) % len(SCENES)], chosen.uniform(0.02, 0.15)) for i, rank in enumerate(order)
    ]


@needs_ulfm
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("transport", ["messages", "auto"])
def test_the_others_go_on(tmp_path: Path, transport: str, order: list[int]) -> None:
    nranks = {1: 2, 2: 3, 3: 4}[len(order)]
    planned = deaths(order, transport)
    with running(tmp_path, nranks, PROGRAM.format(transport=transport, deaths=planned), elastic=True) as job:
        survivors = sorted(set(range(nranks)) - set(order))
        for rank in survivors:
            check_reports(job.said(f"reports {rank}"), planned, list(range(nranks)))
        assert job.status() == 0, job.output()
        assert "Traceback" not in job.output()


def check_reports(reports: list[dict[str, Any]], planned: list[Death], ranks: list[int]) -> None:
    for report, (victim, scene, _) in zip(reports, planned, strict=True):
        where = ranks.index(victim)
        ranks.remove(victim)
        assert report["scene"] == scene
        assert report["failed"] == [victim], report
        assert report["duplicate"] == [victim], report
        assert f"rank {where}" in report["text"] and "has ended" in report["text"], report
        assert report["left"] == ranks, report
        assert ranks[report["rank"]] == report["world"]
        assert report["seconds to shrink"] < PROMPT, report
        assert report["seconds to free"] < 0.5, report


# Two more die while the others make the communicator of those that are left.
WHILE_SHRINKING = """
comm = mpicoll.Communicator(MPI.COMM_WORLD, transport={transport!r})
comm.Barrier()
if world == 0:
    die()
dies = {{1: "_connect", 3: "_make_callers"}}.get(world)  # before, and after, it has talked to the others
if dies:
    setattr(mpicoll.Communicator, dies, lambda *args: die())
try:
    while True:
        comm.Allreduce(np.ones(5), np.zeros(5))
except RankFailedError:
    new = comm.shrink()
sums = np.zeros(5, np.int64)
new.Allreduce(np.full(5, world), sums)
write(f"left {{world}}", [new.allgather(world), sums.tolist()])
new.Free()
"""


@needs_ulfm
@pytest.mark.parametrize("transport", ["messages", "auto"])
def test_ranks_die_while_the_others_shrink(tmp_path: Path, transport: str) -> None:
    with running(tmp_path, 5, WHILE_SHRINKING.format(transport=transport), elastic=True) as job:
        for rank in (2, 4):
            assert job.said(f"left {rank}") == [[2, 4], [6] * 5]
        assert job.status() == 0, job.output()


@needs_launcher
def test_elsewhere_there_is_no_shrinking(tmp_path: Path) -> None:
    text = """
    comm = mpicoll.Communicator(MPI.COMM_WORLD)
    try:
        comm.shrink()
    except RuntimeError as error:
        write(f"refused {world}", str(error))
    comm.Barrier()
    """
    with running(tmp_path, 2, text) as job:
        assert (
            job.said("refused 0")
            == job.said("refused 1")
            == (
                "shrink: expected an MPI in which a job outlives a rank: start it with Open MPI's "
                "`mpirun --with-ft ulfm`, or `python -m mpicoll.launch --elastic`"
            )
        )
        assert job.status() == 0


@needs_ulfm
@pytest.mark.parametrize("end", ["sys.exit()", "os._exit(0)"])
def test_who_has_done_its_part_may_end(tmp_path: Path, end: str) -> None:
    """The last rank of a chain waits, for long, for one that is late; the first one has ended meanwhile."""
    text = f"""
    comm = mpicoll.Communicator(MPI.COMM_WORLD, transport="messages")
    values = np.arange(100) * (world == 0)
    if world == 1:
        time.sleep(2 * mpicoll.watch.SETTLED)
    comm.Bcast(values, root=0, algorithm="chain")
    if world == 0:
        {end}
    write(f"values {{world}}", values.tolist())
    if world == 1:
        wait_for("values 2")
        os._exit(0)
    wait_for("values 1")
    """
    with running(tmp_path, 3, text, elastic=True) as job:
        assert job.said("values 1") == job.said("values 2") == list(range(100))
        assert job.status() == 0, job.output()
