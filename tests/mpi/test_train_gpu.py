"""Training on a GPU, for which `fake_cupy` stands: the same steps as on the CPU, and the same checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll.compression import Int8
from mpicoll.gpu import driver
from mpicoll.train import SGD, Dataset, InputError, Linear
from mpicoll.train.checkpoint import load
from mpicoll.train.cli import USAGE_ERROR, run
from mpicoll.train.devices import choose_device
from tests import fake_cuda, fake_cupy
from tests.fake_cuda import FakeLibrary
from tests.fake_cupy import FakeCupy

from .training import (
    COMM,
    FEATURES,
    assert_same,
    closing,
    everywhere,
    interrupted,
    messages_of,
    new_trainer,
    resumed,
    step_files,
    trained,
    with_dropout,
)

pytest.importorskip("numba_cuda", reason="numba-cuda[cu13] is not installed")

RANKS = COMM.size
EPOCHS = 2

Settings = dict[str, Any]

several = pytest.mark.skipif(RANKS == 1, reason="for several ranks")


@pytest.fixture(scope="module")
def cupy() -> Iterator[FakeCupy]:
    with fake_cupy.in_use() as module:
        yield module


@pytest.fixture
def comm(cupy: FakeCupy) -> Iterator[MPI.Intracomm]:
    """One that has met no other GPU."""
    comm = COMM.Dup()
    yield comm
    comm.Free()


# Steps ------------------------------------------------------------------------------------------------

STEPS: dict[str, Settings] = {
    "allreduce": {"options": {"bucket_bytes": 256}, "pieces": 2},
    "allreduce, normalised": {**FEATURES["normalised"], **FEATURES["clipped"]},
    "sharded, adam": {"strategy": "sharded", **FEATURES["adam"]},
    "sharded, lars": {"strategy": "sharded", **FEATURES["lars"], **FEATURES["values"]},
    "local": {"strategy": "local", "options": {"every": 4}, "layers": with_dropout},
    "gossip": {"strategy": "gossip", **FEATURES["nesterov"], **FEATURES["augmented"]},
    "ps-sync": {"strategy": "ps-sync", **FEATURES["weighted"]},
    "tensor": {"mesh": {"tensor": RANKS}, "layers": with_dropout},
    "pipeline": {"mesh": {"pipeline": min(RANKS, 4)}, "pieces": 2},
}


@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
def test_the_steps_are_those_on_the_cpu(comm: MPI.Intracomm, settings: Settings) -> None:
    expected = trained(COMM, EPOCHS, **settings)
    assert_same(trained(comm, EPOCHS, device="cuda", **settings), expected, 1e-9)


@several
@pytest.mark.parametrize("servers", [0, 1])
def test_an_asynchronous_training_learns(comm: MPI.Intracomm, servers: int) -> None:
    settings: Settings = {"optimizer": partial(SGD, momentum=0.5), "learning_rate": 0.1}
    settings["options"] = {"servers": servers, "staleness": 1}
    outcome = trained(comm, 6, device="cuda", strategy="ps-async", **settings)
    if COMM.rank == 0:  # a rank that serves only hears of no figures
        assert outcome.history[-1].train_loss < 0.9 * outcome.history[0].train_loss


@pytest.mark.parametrize("strategy", ["sharded", "gossip"])
def test_mpi_s_own_calls_get_no_memory_of_a_gpu(
    cupy: FakeCupy, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would send what is there now, while the GPU is late."""
    monkeypatch.setattr(fake_cuda, "PAUSES", 1.0)
    plain = MPI.Intracomm(MPI.COMM_WORLD)
    assert_same(
        trained(plain, 1, device="cuda", strategy=strategy), trained(COMM, 1, strategy=strategy), 1e-9
    )


def test_everything_is_on_the_gpu(comm: MPI.Intracomm) -> None:
    with closing(new_trainer(comm, device="cuda", strategy="sharded")) as trainer:
        model, strategy = trainer.model, trainer.strategy
        arrays = [model.parameters, model.gradients, trainer.data.train_x, *strategy.optimizer.state.values()]
        assert all(isinstance(array, fake_cupy.Array) for array in arrays)


# Checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["allreduce", "sharded"])
def test_checkpoints_are_those_of_the_cpu(comm: MPI.Intracomm, tmp_path: Path, strategy: str) -> None:
    directory = everywhere(tmp_path)
    settings: Settings = {"strategy": strategy, **FEATURES["adam"]}
    on_cpu = interrupted(COMM, directory / "cpu", 8, 8, **settings)
    on_gpu = interrupted(comm, directory / "cuda", 8, 8, device="cuda", **settings)
    if COMM.rank == 0:
        one, other = (load(step_files(place)[-1]) for place in (on_cpu, on_gpu))
        assert sorted(one.arrays) == sorted(other.arrays) and one.step == other.step == 8
        for name, array in one.arrays.items():
            np.testing.assert_allclose(other.arrays[name], array, rtol=0, atol=1e-9, err_msg=name)
    expected = trained(COMM, EPOCHS, **settings)
    assert_same(resumed(comm, on_cpu, EPOCHS, device="cuda", **settings), expected, 1e-9)
    assert_same(resumed(COMM, on_gpu, EPOCHS, **settings), expected, 1e-9)


# GPUs -------------------------------------------------------------------------------------------------


class OneOfItsOwn(FakeLibrary):
    """Shows each rank its own GPU only, as the first one."""

    def cuDeviceGetPCIBusId(self, name: Any, length: int, device: int) -> int:
        name.value = b"0000:%02d:00.0" % COMM.rank
        return 0


def shared(ngpus: int) -> str:
    if ngpus >= RANKS:
        return ""
    return f"{RANKS} ranks share {ngpus} GPU{'s' if ngpus > 1 else ''} on node "


LIBRARIES: dict[str, tuple[Callable[[], FakeLibrary], int, str]] = {
    "one": (FakeLibrary, 0, shared(1)),
    "two": (lambda: FakeLibrary(ndevices=2), COMM.rank % 2, shared(2)),
    "many": (lambda: FakeLibrary(ndevices=99), COMM.rank, ""),
    "each its own": (OneOfItsOwn, 0, ""),
}


@pytest.mark.parametrize("gpus", LIBRARIES)
def test_ranks_take_gpus_in_turn(gpus: str) -> None:
    library, device, note = LIBRARIES[gpus]
    with fake_cupy.in_use(library()) as cupy:
        chosen = choose_device(COMM, "cuda")
        assert cupy.chosen.device == device
    assert chosen.note.startswith(note) and bool(chosen.note) == bool(note)
    assert len(set(COMM.allgather(chosen.note))) == 1


def test_a_gpu_that_one_rank_has_not_is_told_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    last = RANKS - 1
    with fake_cupy.in_use():
        if COMM.rank == last:
            found = driver.Driver(FakeLibrary(ndevices=0))
            monkeypatch.setattr(driver, "driver", lambda: found)
        messages = messages_of(lambda: choose_device(COMM, "cuda"))
        monkeypatch.undo()
    assert len(set(messages)) == 1
    assert messages[0].startswith("device: expected a GPU for cuda, but: the driver shows none")
    assert f"(rank {last} on " in messages[0]


def test_a_cupy_that_cannot_compute_is_told_before_the_training() -> None:
    def full(*arguments: Any) -> Any:
        raise ImportError("libcublas.so.13: cannot open shared object file\nand more")

    with fake_cupy.in_use() as cupy:
        cupy.__dict__["full"] = full
        with pytest.raises(InputError) as info:
            new_trainer(COMM, device="cuda")
    others = {1: "", 2: " and 1 other"}.get(RANKS, f" and {RANKS - 1} others")
    beginning, end = str(info.value).split(" (rank 0 on ")
    assert beginning == (
        "device: expected CuPy to compute on GPU 0 (Fake GPU), but: libcublas.so.13: cannot open shared "
        "object file; pip install 'mpicoll[cuda]' has all that it needs"
    )
    assert end.endswith(f"{others})")


def test_samples_that_do_not_fit_are_told_on_all() -> None:
    x = np.zeros((2 * fake_cupy.CHUNK // 4, 1), np.float32)
    y = np.zeros(len(x), np.int64)
    large = Dataset("large", 2, x, y, x[:1], y[:1])
    room = fake_cupy.CHUNK * (2 if COMM.rank == RANKS - 1 else 9)
    with fake_cupy.in_use(FakeLibrary(memory=room)):
        messages = messages_of(
            lambda: new_trainer(COMM, lambda: [Linear(1, 2)], lambda: large, device="cuda")
        )
    assert len(set(messages)) == 1
    assert messages[0].startswith("device: expected room for the samples of large on the GPU, but: GPU 0: ")
    assert f"(rank {RANKS - 1} on " in messages[0]


# The command ------------------------------------------------------------------------------------------


def test_the_command(comm: MPI.Intracomm, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = everywhere(tmp_path)
    common = ["--epochs", "2", "--batch-size", "512", "--lr", "0.5", "--hidden", "32"]
    for device in ("cpu", "cuda"):
        path = directory / f"{device}.json"
        assert run(comm, [*common, "--device", device, "--json", str(path)]) == 0
    said = capfd.readouterr()
    told = [line for line in said.err.splitlines() if "share 1 GPU" in line]
    assert len(told) == int(RANKS > 1 and COMM.rank == 0)
    if COMM.rank == 0:
        paths = directory / "cpu.json", directory / "cuda.json"
        on_cpu, on_gpu = (json.loads(path.read_text()) for path in paths)
        assert (on_cpu["device"], on_gpu["device"]) == ("cpu", "cuda")
        assert on_gpu["train_loss"] == pytest.approx(on_cpu["train_loss"], rel=1e-5)
        assert on_gpu["test_accuracy"] > 0.5 and 0 <= on_gpu["communication"] <= 1
    COMM.Barrier()


def test_without_cupy_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    path = tmp_path / "kept"
    assert run(COMM, ["--device", "cuda", "--checkpoint", str(path)]) == USAGE_ERROR
    said = capfd.readouterr().err
    assert said.count("error: device: expected CuPy for cuda, but: ") == int(COMM.rank == 0)
    assert ("pip install 'mpicoll[cuda]' (rank 0 on " in said) == (COMM.rank == 0)
    assert "Traceback" not in said and not path.exists()


@pytest.mark.parametrize("option", ["--deterministic", "--elastic", "--compression=int8"])
def test_what_a_gpu_is_not_for(option: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(COMM, ["--device", "cuda", option]) == USAGE_ERROR
    said, name = capfd.readouterr().err, option.partition("=")[0]
    assert said.count(f"error: {name} is for --device cpu, not cuda: ") == int(COMM.rank == 0)
    assert "Traceback" not in said


def test_what_a_gpu_is_not_for_in_a_program(comm: MPI.Intracomm) -> None:
    refused: Settings = {"shards": 8, "elastic": True, "options": {"compression": Int8()}}
    for name, value in refused.items():
        words = f"{name}: ".replace("options", "compression")
        with pytest.raises(InputError, match=f"device: expected cpu, got cuda beside {words}"):
            new_trainer(comm, device="cuda", **{name: value})
    with pytest.raises(InputError, match="device: expected cpu or cuda, got 'gpu'"):
        new_trainer(comm, device="gpu")
