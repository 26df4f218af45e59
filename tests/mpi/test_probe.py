"""Whether MPI takes GPU memory, asked by several ranks."""

from __future__ import annotations

import pytest
from mpi4py import MPI

from mpicoll.gpu import driver, probe
from mpicoll.gpu.probe import Verdict
from tests import fake_cuda

COMM = MPI.COMM_WORLD
NODES = max(COMM.size // 2, 1)


def place(monkeypatch: pytest.MonkeyPatch, *, last_sees: bool = True) -> list[int]:
    """Ranks in turn on ``NODES`` nodes, all with a GPU, or without the last; notes who is asked."""
    asked: list[int] = []

    def tell() -> Verdict:
        asked.append(COMM.rank)
        return Verdict(COMM.rank != 1, f"asked rank {COMM.rank}")

    sees = last_sees or COMM.rank < COMM.size - 1
    monkeypatch.setattr(MPI, "Get_processor_name", lambda: f"node{COMM.rank % NODES}")
    monkeypatch.setattr(probe, "sees_gpu", lambda: sees)
    monkeypatch.setattr(probe, "verdict_here", tell)
    return asked


def test_one_rank_of_each_node_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = place(monkeypatch)
    expected = (True, "asked rank 0") if NODES == 1 else (False, "node node1: asked rank 1")
    assert probe.is_cuda_aware(COMM) == expected
    assert [rank for ranks in COMM.allgather(asked) for rank in ranks] == list(range(NODES))


def test_ranks_that_see_no_gpu_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = place(monkeypatch, last_sees=False)
    aware, how = probe.is_cuda_aware(COMM)
    if COMM.size == 1:
        assert (aware, how) == (False, probe.NO_GPU.how)
    assert COMM.allgather((aware, how)) == [(aware, how)] * COMM.size
    assert COMM.size - 1 not in asked


def use_fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is the host's, so that every MPI can send it."""
    gpu = driver.Driver(fake_cuda.FakeLibrary())
    monkeypatch.setattr(driver, "driver", lambda: gpu)


def test_memory_is_sent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_fake_gpu(monkeypatch)
    probe.send_from_gpu()
    assert capsys.readouterr().out == "sending\nsending\nright\n"


def test_wrong_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Elsewhere:
        """An MPI that takes the address for one of the host's, which happens to be there."""

        def Sendrecv(self, *arguments: object, **more: object) -> None: ...

    use_fake_gpu(monkeypatch)
    monkeypatch.setattr(MPI, "COMM_SELF", Elsewhere())
    probe.send_from_gpu()
    assert capsys.readouterr().out == "sending\nwrong\n"


def test_probe_is_not_part_of_this_job() -> None:
    """A rank starts another MPI program, which must not take itself for a rank of this job."""
    program = "from mpi4py import MPI; print('sending', MPI.COMM_WORLD.allreduce(1) == 1 and 'right')"
    assert probe.probe(program).aware is True
