"""What training on a GPU does on one rank, with `fake_cupy` for CuPy, and what is said where none is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll import launch
from mpicoll.train import (
    SGD,
    Augmentation,
    Context,
    Conv2d,
    Dataset,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Trainer,
)
from mpicoll.train.devices import _note, _Place
from mpicoll.train.mapped import open_mapped
from mpicoll.train.pipeline import measure_costs
from mpicoll.train.stopwatch import stopwatch

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # for one job, on a busy machine
SAMPLES = 40


@pytest.fixture
def cupy() -> Iterator[Any]:
    pytest.importorskip("numba_cuda", reason="numba-cuda[cu13] is not installed")
    from tests import fake_cupy

    with fake_cupy.in_use() as module:
        module.cuda.Device(0).use()
        yield module


# One rank ---------------------------------------------------------------------------------------------


def images(folder: Path | None = None) -> Dataset:
    """6 x 6 pixels of 3 classes; in files, if there is a folder for them."""
    random = np.random.default_rng(1)
    x = random.standard_normal((SAMPLES, 6, 6)).astype(np.float32)
    y = np.arange(SAMPLES) % 3
    train_x: Any = x[:31]
    if folder is not None:
        np.save(folder / "x.npy", x[:31])
        train_x = open_mapped(folder / "x.npy")
    return Dataset("images", 3, train_x, y[:31], x[31:], y[31:])


class OneChannel(Layer):
    def forward(self, x: Any, context: Any = None) -> Any:
        return x[:, None], None

    def backward(self, dy: Any, saved: Any) -> Any:
        return dy[:, 0]


def network() -> list[Layer]:
    convolution = [OneChannel(), Conv2d(1, 2, 3, padding=1), ReLU(), MaxPool2d(2), Flatten()]
    return [*convolution, Dropout(0.2), Linear(18, 3)]


def trained(device: str, data: Dataset, **settings: Any) -> tuple[Any, list[Any]]:
    """The parameters and the losses after two epochs."""
    trainer = Trainer(
        MPI.COMM_SELF, network(), data, optimizer=SGD(), dtype=np.float64, device=device, **settings
    )
    history = trainer.train(2)
    parameters = trainer.model.parameters
    trainer.close()
    return parameters, [(epoch.train_loss, epoch.test_loss, epoch.test_accuracy) for epoch in history]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("augmentation", [None, Augmentation(shift=1, flip=True, noise=0.1)])
def test_samples_come_to_the_gpu(cupy: Any, tmp_path: Path, mapped: bool, augmentation: Any) -> None:
    """From files by way of a thread, which must not touch the GPU: none was chosen for it."""
    data = images(tmp_path if mapped else None)
    settings = {"batch_size": 8, "augmentation": augmentation}
    expected, losses = trained("cpu", data, **settings)
    parameters, found = trained("cuda", data, **settings)
    np.testing.assert_allclose(parameters.get(), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found, losses, rtol=0, atol=1e-10)


@pytest.mark.parametrize("strategy", ["allreduce", "sharded", "local"])
def test_the_host_waits_for_the_gpu_once_an_epoch_not_once_a_step(cupy: Any, strategy: str) -> None:
    def waits(batch_size: int) -> int:
        before = cupy.transfers
        trained("cuda", images(), batch_size=batch_size, strategy=strategy)
        return int(cupy.transfers - before)

    assert waits(5) == waits(20) <= 12


def test_layers_are_timed_where_they_are(cupy: Any) -> None:
    costs = measure_costs(network()[1:4], cupy.asarray(np.ones((2, 1, 6, 6))), np.float64, repeats=2)
    assert len(costs) == 3 and min(costs) > 0


def test_context_of_layers_may_be_on_a_gpu(cupy: Any) -> None:
    x = np.ones((4, 5))
    expected, _ = Dropout(0.5).forward(x, Context(True, positions=np.arange(4)))
    found, _ = Dropout(0.5).forward(cupy.asarray(x), Context(True, positions=cupy.arange(4)))
    np.testing.assert_array_equal(found.get(), expected)


# Time -------------------------------------------------------------------------------------------------


def test_a_stopwatch_counts_the_time_of_the_gpu(cupy: Any) -> None:
    from tests.fake_cupy import stream

    on_host, on_gpu = stopwatch(np.zeros(1)), stopwatch(cupy.zeros(1))
    for _ in range(3):
        with on_host.running(), on_gpu.running():
            stream().put(lambda: time.sleep(0.05))
    assert on_host.seconds < 0.15 <= on_gpu.seconds < 2  # nobody has waited on the host
    assert on_gpu.seconds == on_gpu.seconds


def test_a_stopwatch_keeps_few_events(cupy: Any) -> None:
    watch = stopwatch(cupy.zeros(1))
    for _ in range(50):
        with watch.running():
            pass
        cupy.zeros(1).get()
    assert len(watch._pairs) < 10  # type: ignore[attr-defined]


def test_what_ends_in_an_error_is_not_counted(cupy: Any) -> None:
    for watch in (stopwatch(np.zeros(1)), stopwatch(cupy.zeros(1))):
        with pytest.raises(KeyError), watch.running():
            raise KeyError
        assert watch.seconds == 0


# Notes and errors -------------------------------------------------------------------------------------


def test_a_note_tells_of_the_first_node_and_counts_the_others() -> None:
    def places(node: str, *buses: str) -> list[_Place]:
        return [_Place(f"machine {node}", bus, node) for bus in buses]

    assert _note(places("a", "0", "1") + places("b", "0", "1")) == ""
    shared = _note(places("a", "0", "1", "0") + places("b", "0"))
    assert shared.startswith("3 ranks share 2 GPUs on node a: ")
    more = _note(places("a", "0", "0") + places("b", "1", "1", "1"))
    assert more.startswith("2 ranks share 1 GPU on node a (and on 1 other node): ")


def test_what_is_missing_is_said_once_and_ends_the_job(tmp_path: Path) -> None:
    """There is something that calls itself CuPy, and no GPU that CUDA shows."""
    (tmp_path / "cupy.py").touch()
    try:
        prefix = launch.command(2, [])
    except launch.LauncherError as error:
        pytest.skip(str(error))
    environment = launch.environment(prefix[0]) | {"CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT), environment.get("PYTHONPATH", "")])
    command = [*prefix, sys.executable, str(ROOT / "train.py"), "--device", "cuda"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.count("error: device: expected a GPU for cuda, but: ") == 1
    assert ran.stderr.count("error: ") == 1 and " and 1 other)" in ran.stderr
    assert "Traceback" not in ran.stderr and "epoch" not in ran.stderr
