"""What the tests of training share: small data, small models, and what comes of training one on the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

import mpicoll
from mpicoll.train import (
    LARS,
    SGD,
    Adam,
    Augmentation,
    BatchNorm,
    Checkpoints,
    Dataset,
    Dropout,
    Epoch,
    InputError,
    Keeper,
    Layer,
    Linear,
    Optimizer,
    ReLU,
    Tanh,
    Trainer,
    parameters_sha256,
    resume,
)
from mpicoll.train.keeping import assembled

Array = npt.NDArray[Any]
Parameters = dict[str, Array]

COMM = mpicoll.Communicator(MPI.COMM_WORLD)
ALONE = MPI.COMM_SELF

INPUTS, CLASSES = 6, 5
SAMPLES, BATCH = 61, 12  # in the last batch of each epoch is one sample: most ranks have none of it
STEPS_PER_EPOCH = 6
EPOCHS = 4  # 24 steps


def classes() -> Dataset:
    """Unbalanced classes, and numbers of samples that no rank count divides."""
    random = np.random.default_rng(3)
    x = random.standard_normal((SAMPLES + 17, INPUTS)).astype(np.float32)
    y = np.minimum((x[:, 0] + x[:, 1] * x[:, 2] + 1.5).clip(0), CLASSES - 1).astype(np.int64)
    return Dataset("classes", CLASSES, x[:SAMPLES], y[:SAMPLES], x[SAMPLES:], y[SAMPLES:])


def values() -> Dataset:
    """Two values to predict."""
    random = np.random.default_rng(4)
    x = random.standard_normal((SAMPLES + 17, INPUTS)).astype(np.float32)
    y = np.stack([x[:, 0] * x[:, 1], x[:, 2:].sum(axis=1)], axis=1)
    return Dataset("values", 0, x[:SAMPLES], y[:SAMPLES], x[SAMPLES:], y[SAMPLES:])


def plain(outputs: int = CLASSES) -> list[Layer]:
    """6-8-7-5: sizes that most rank counts do not divide."""
    return [Linear(INPUTS, 8), Tanh(), Linear(8, 7), ReLU(), Linear(7, outputs)]


def with_dropout() -> list[Layer]:
    """Dropout of what is split, where layers are."""
    return [Linear(INPUTS, 8), ReLU(), Dropout(0.3), Linear(8, 7), Tanh(), Dropout(0.2), Linear(7, CLASSES)]


def normalised(synchronised: bool = True) -> list[Layer]:
    """With statistics, which lie behind the parameters."""
    norms = [BatchNorm(size, synchronised=synchronised) for size in (8, 7)]
    return [Linear(INPUTS, 8), norms[0], ReLU(), Linear(8, 7), norms[1], ReLU(), Linear(7, CLASSES)]


# By names: settings of `new_trainer` that change what one process comes to.
FEATURES: dict[str, dict[str, Any]] = {
    "nesterov": {"optimizer": lambda: SGD(0.8, nesterov=True, weight_decay=0.02)},
    "adam": {"optimizer": lambda: Adam(weight_decay=0.01), "learning_rate": 0.01},
    "lars": {"optimizer": lambda: LARS(trust=0.05, weight_decay=0.02), "learning_rate": 0.2},
    "clipped": {"optimizer": lambda: SGD(clip_norm=0.1)},
    "decaying rate": {"learning_rate": lambda step: 0.1 / (1 + step)},
    "dropout": {"layers": with_dropout},
    "accumulated": {"pieces": 3},
    "weighted": {"weights": "balanced"},
    "resampled": {"resample": True},
    "augmented": {"augmentation": Augmentation(noise=0.2)},
    "normalised": {"layers": normalised},
    "values": {"data": values, "layers": partial(plain, 2)},
}


@dataclass(frozen=True)
class Outcome:
    """What a training ends with, the same on all ranks: whole parameters, the state, and figures."""

    parameters: Parameters
    history: list[Epoch]
    sha256: str
    notes: tuple[str, ...] = ()


def new_trainer(
    comm: MPI.Intracomm,
    layers: Callable[[], Sequence[Layer]] = plain,
    data: Callable[[], Dataset] = classes,
    optimizer: Callable[[], Optimizer] = SGD,
    dtype: npt.DTypeLike = np.float64,
    batch_size: int = BATCH,
    **settings: Any,
) -> Trainer:
    """A trainer of new layers, whose first values differ where ranks are to take those of another."""
    trainer = Trainer(
        comm, layers(), data(), optimizer=optimizer(), dtype=dtype, batch_size=batch_size, **settings
    )
    trainer.model.parameters[...] += trainer.mesh.data.rank
    return trainer


@contextmanager
def closing(trainer: Trainer) -> Iterator[Trainer]:
    """Without an error, the trainer is closed: that is collective."""
    yield trainer
    trainer.close()


def outcome_of(trainer: Trainer, notes: Sequence[str] = ()) -> Outcome:
    """Of a training that has ended. Collective."""
    digest = parameters_sha256(trainer)  # raises where ranks differ
    parameters = trainer.comm.bcast(assembled(trainer, {"": trainer.model.parameters}))
    return Outcome(parameters, trainer.history, digest, tuple(notes))


def trained(
    comm: MPI.Intracomm,
    epochs: int = EPOCHS,
    keeper: Keeper | None = None,
    patience: int | None = None,
    **settings: Any,
) -> Outcome:
    """What comes of training with these settings of `new_trainer`."""
    with closing(new_trainer(comm, **settings)) as trainer:
        trainer.train(epochs, keeper=keeper, patience=patience)
        return outcome_of(trainer)


@cache
def alone(feature: str = "") -> Outcome:
    """What a single process comes to, with one of `FEATURES`, or none."""
    return trained(ALONE, **FEATURES.get(feature, {}))


def figures(epoch: Epoch) -> tuple[Any, ...]:
    """Those that do not depend on the machine."""
    facts = asdict(epoch)
    del facts["seconds"], facts["communication"]
    return tuple(facts.values())


def assert_same(got: Outcome, expected: Outcome, tolerance: float = 1e-10) -> None:
    """The same parameters, the same figures, and these on all ranks.

    Times are other ones in every training.
    """
    assert sorted(got.parameters) == sorted(expected.parameters)
    for name, value in expected.parameters.items():
        np.testing.assert_allclose(got.parameters[name], value, rtol=0, atol=tolerance, err_msg=name)
    assert len(got.history) == len(expected.history)
    for epoch, other in zip(got.history, expected.history, strict=True):
        np.testing.assert_allclose(_numbers(epoch), _numbers(other), rtol=0, atol=tolerance)
    assert len(set(COMM.allgather(repr([figures(epoch) for epoch in got.history])))) == 1


def _numbers(epoch: Epoch) -> Array:
    return np.array([np.nan if figure is None else figure for figure in figures(epoch)], np.float64)


def everywhere(path: Path) -> Path:
    """Rank 0's directory, on every rank."""
    directory: Path = COMM.bcast(path, root=0)
    return directory


def messages_of(function: Callable[[], Any]) -> list[str]:
    """What the `InputError` says that ``function`` raises, on each rank. Collective."""
    message = ""
    try:
        function()
    except InputError as error:
        message = str(error)
    every: list[str] = COMM.allgather(message)
    return every


def on_a_part(size: int, function: Callable[[MPI.Intracomm], Outcome]) -> Outcome:
    """What ``function`` comes to on the first ``size`` ranks alone, on all ranks. Collective."""
    takes_part = COMM.rank < size
    part = COMM.Split(int(takes_part), COMM.rank)
    outcome = function(part) if takes_part else None
    part.Free()
    result: Outcome = COMM.bcast(outcome)
    return result


# Checkpoints ------------------------------------------------------------------------------------------


def interrupted(
    comm: MPI.Intracomm, directory: Path, every: int, step: int, epochs: int = 2, **settings: Any
) -> Path:
    """What a training leaves in ``directory`` that ends after ``step``, of which it has kept the state.

    With a checkpoint each ``every`` steps; the later ones are removed, as if they had never come to be.
    Returns ``directory``, which all ranks can read then.
    """
    trained(comm, epochs, Checkpoints(comm, directory, every, keep=100), **settings)
    comm.Barrier()
    if comm.rank == 0:
        for path in step_files(directory):
            if path.stem > f"step-{step:010}":
                path.unlink()
        assert step_files(directory)[-1].stem == f"step-{step:010}"
    comm.Barrier()
    return directory


def resumed(comm: MPI.Intracomm, directory: Path, epochs: int = EPOCHS, **settings: Any) -> Outcome:
    """What comes of going on from the newest checkpoint in ``directory``."""
    with closing(new_trainer(comm, **settings)) as trainer:
        notes = resume(trainer, directory)
        trainer.train(epochs)
        return outcome_of(trainer, notes)


def step_files(directory: Path) -> list[Path]:
    """The oldest first."""
    return sorted(directory.glob("step-*.safetensors"))
