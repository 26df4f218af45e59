"""``mpicoll info`` on several ranks."""

from __future__ import annotations

import os

import pytest
from mpi4py import MPI

from mpicoll import info
from mpicoll.gpu import probe
from mpicoll.transports import hierarchical
from mpicoll.transports.arena import Arena, ArenaError
from tests import fake_cuda


def transport(comm: MPI.Intracomm) -> str:
    nothing = {"node": "n", "gpus": []}
    return str(info.transports(comm, [nothing] * comm.size)["transport"])


def test_every_rank_gets_the_same() -> None:
    comm = MPI.COMM_WORLD
    facts = info.gather()
    assert comm.allgather(facts) == [facts] * comm.size
    assert len(facts["ranks"]) == comm.size
    assert facts["ranks"][comm.rank]["cpus"] == sorted(os.sched_getaffinity(0))
    assert f"{comm.size} on 1 node" in info.render(facts)


def test_transport_on_one_node() -> None:
    facts = info.gather()
    assert facts["transport"].startswith("shared memory (memory files; ")
    assert f"transport   {facts['transport']}\n" in info.render(facts)


def test_transport_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> object:
        raise ArenaError("no memory today")

    comm = MPI.COMM_WORLD
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(Arena, "take", refuse)
    assert transport(comm) == f"messages, because rank {comm.size - 1}: no memory today"


def test_transport_on_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    comm = MPI.COMM_WORLD
    nnodes = (comm.size + 1) // 2
    monkeypatch.setattr(hierarchical, "node_of", lambda comm: comm.Split(comm.rank // 2))
    wanted = "shared memory (" if nnodes == 1 else f"hierarchical: shared memory on {nnodes} nodes, messages"
    assert transport(comm).startswith(wanted)


@pytest.mark.parametrize("where", ["import_failure", "__init__"])
def test_what_is_broken_is_no_error(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> object:
        raise OSError("no cache\ntoday")

    comm = MPI.COMM_WORLD
    if where == "__init__":
        monkeypatch.setattr("mpicoll.communicator.Communicator.__init__", fail)
    elif comm.rank == comm.size - 1:
        monkeypatch.setattr(info, "import_failure", lambda: "OSError: no cache today")
    assert transport(comm).startswith("unknown, because ")
    assert transport(comm).endswith(": OSError: no cache today")


def test_where_all_ranks_see_a_gpu_its_transport_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "verdict_here", lambda: probe.NO_GPU)
    fake_cuda.use(monkeypatch, fake_cuda.FakeLibrary(ndevices=2))
    facts = info.gather()
    assert [len(rank["gpus"]) for rank in facts["ranks"]] == [2] * MPI.COMM_WORLD.size
    assert facts["gpu_transport"].startswith("ipc: ranks open each other's GPU memory")
    assert f"  on GPUs   {facts['gpu_transport']}\n" in info.render(facts)
    if MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
        fake_cuda.use(monkeypatch, fake_cuda.FakeLibrary(ndevices=0))
    assert info.gather()["gpu_transport"] == f"none: rank {MPI.COMM_WORLD.size - 1} sees no GPU"
