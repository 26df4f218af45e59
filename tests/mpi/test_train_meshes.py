"""Models divided over the ranks of a mesh, as a pipeline, in slices, or both: the steps of one process."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest

from mpicoll.train import SGD, InputError, Layer, Linear, ReLU, Tanh, Trainer

from .training import (
    ALONE,
    CLASSES,
    COMM,
    FEATURES,
    INPUTS,
    Outcome,
    alone,
    assert_same,
    classes,
    closing,
    messages_of,
    new_trainer,
    on_a_part,
    plain,
    trained,
)

Sizes = dict[str, int]

every_rank_count = pytest.mark.algorithms
several_ranks = pytest.mark.skipif(COMM.size == 1, reason="a mesh of one rank divides nothing")

LAYERS = len(plain())


def meshes() -> list[Sizes]:
    """Every way to share out the ranks, without more stages than layers; one axis may be left out."""
    numbers = range(1, COMM.size + 1)
    return [
        {"pipeline": pipeline, "tensor": tensor}
        for pipeline in numbers[:LAYERS]
        for tensor in numbers
        if COMM.size % (pipeline * tensor) == 0
    ]


MESHES = meshes()
PIPELINES = [mesh for mesh in MESHES if mesh["pipeline"] > 1]
SLICES = [mesh for mesh in MESHES if mesh["tensor"] > 1]
DEEPEST = max(MESHES, key=lambda mesh: min(mesh.values()))


def features_on_meshes() -> list[tuple[str, Sizes, str]]:
    """Each feature with each axis, and all meshes by turns; each strategy on some of them."""
    found = []
    for axis, chosen in enumerate((PIPELINES, SLICES)):
        for i, feature in enumerate(FEATURES):
            if chosen:
                found.append((feature, chosen[i % len(chosen)], ("allreduce", "sharded")[(i + axis) % 2]))
    return found


def named(value: Any) -> str | None:
    """For the names of tests."""
    return "x".join(map(str, value.values())) if isinstance(value, dict) else None


def on_mesh(mesh: Sizes, feature: str, **settings: Any) -> Outcome:
    """Synchronised normalisation is over the parts of a batch, and one for each micro-batch of a pipeline."""
    pieces = 1 if feature == "normalised" else 3
    return trained(COMM, mesh=mesh, **{"pieces": pieces, **FEATURES.get(feature, {}), **settings})


@every_rank_count
@pytest.mark.parametrize(
    "mesh, schedule",
    [*((mesh, "1f1b") for mesh in MESHES), *((mesh, "gpipe") for mesh in PIPELINES)],
    ids=named,
)
def test_every_mesh_takes_the_steps_of_one_process(mesh: Sizes, schedule: str) -> None:
    assert_same(on_mesh(mesh, "", schedule=schedule), alone())


@several_ranks
@pytest.mark.parametrize("feature, mesh, strategy", features_on_meshes(), ids=named)
def test_every_feature_on_every_axis(feature: str, mesh: Sizes, strategy: str) -> None:
    assert_same(on_mesh(mesh, feature, strategy=strategy), alone(feature))


@several_ranks
@pytest.mark.parametrize("mesh", MESHES[1:], ids=named)
def test_all_ranks_have_the_same_history(mesh: Sizes) -> None:
    """Times as well: they are the slowest rank's of all, whatever part of the model it has."""
    history = trained(COMM, 1, mesh=mesh, pieces=3).history
    assert len(set(COMM.allgather(repr(history)))) == 1


@pytest.mark.parametrize("feature", ["clipped", "lars"])
@pytest.mark.parametrize("strategy", ["allreduce", "sharded"])
def test_norms_are_those_of_the_whole_model(strategy: str, feature: str) -> None:
    """Sums over stages, slices and shards."""
    assert_same(on_mesh(DEEPEST, feature, strategy=strategy), alone(feature))


@several_ranks
@every_rank_count
@pytest.mark.parametrize("strategy", ["allreduce", "sharded"])
def test_a_stage_without_parameters(strategy: str) -> None:
    """Every layer is a stage, so those of activations train nothing, and have no state."""
    stages = 3 if COMM.size % 3 == 0 else 2
    if COMM.size % stages:
        pytest.skip("for rank counts that have such a pipeline")

    def layers() -> list[Layer]:
        return [Linear(INPUTS, CLASSES), Tanh(), ReLU()][:stages]

    divided = trained(COMM, mesh={"pipeline": stages}, pieces=2, layers=layers, strategy=strategy)
    assert_same(divided, trained(ALONE, layers=layers))


@several_ranks
@every_rank_count
def test_a_stage_holds_its_layers_only() -> None:
    stages = min(COMM.size, LAYERS)
    if COMM.size % stages:
        pytest.skip("for rank counts that have such a pipeline")
    with closing(new_trainer(COMM, mesh={"pipeline": stages}, pieces=2)) as trainer:
        numbers = trainer.mesh.pipeline.allgather([layer.number for layer in trainer.model.layers])
        assert list(chain(*numbers)) == list(range(LAYERS))
        assert all(numbers)
        sizes = trainer.mesh.pipeline.allgather(trainer.model.parameters.size)
        whole = sum(value.size for value in alone().parameters.values())
        assert sum(sizes) == whole == trainer.parameter_count()
        assert {v.size for v in trainer.strategy.optimizer.state.values()} == {trainer.model.parameters.size}


@several_ranks
@every_rank_count
def test_slices_are_a_part_of_the_layers() -> None:
    with closing(new_trainer(COMM, mesh={"tensor": COMM.size})) as trainer:
        weights = sum(value.size for value in alone().parameters.values() if value.ndim == 2)
        held = sum(view.size for view in trainer.model.parameter_views if view.ndim == 2)
        assert COMM.allreduce(held) == weights
        assert trainer.parameter_count() == sum(value.size for value in alone().parameters.values())


@several_ranks
@pytest.mark.parametrize("way", [{"strategy": "local", "options": {"every": 3}}, {"strategy": "gossip"}])
def test_averaging_models_that_are_divided(way: dict[str, Any]) -> None:
    """As many ranks as there are divided models come to the same, each with a whole model."""
    for size, axis in ((2, "pipeline"), (2, "tensor"), (COMM.size, "tensor")):
        if COMM.size % size == 0:
            whole = on_a_part(COMM.size // size, lambda comm: trained(comm, **way))
            assert_same(trained(COMM, mesh={axis: size}, pieces=2, **way), whole)


@several_ranks
@pytest.mark.parametrize("mesh", MESHES[1:], ids=named)
def test_shares_of_uneven_machines_are_those_of_whole_models(mesh: Sizes) -> None:
    """Ranks that hold one model together have the same samples, however fast each of them is."""
    settings: dict[str, Any] = {"mesh": mesh, "pieces": 2, "balance": True}
    assert_same(trained(COMM, **settings), alone())


@several_ranks
@pytest.mark.parametrize("mesh", MESHES[1:], ids=named)
def test_a_learning_rate_that_is_too_high_ends_on_all_ranks(mesh: Sizes) -> None:
    with closing(new_trainer(COMM, mesh=mesh, learning_rate=1e200, pieces=2)) as trainer:
        messages = messages_of(lambda: trainer.train(3))
    assert len(set(messages)) == 1
    assert "expected the training loss to be a number" in messages[0]


@several_ranks
def test_more_stages_than_layers_are_an_error_on_all_ranks() -> None:
    messages = messages_of(
        lambda: new_trainer(COMM, layers=lambda: [Linear(INPUTS, 5)], mesh={"pipeline": COMM.size})
    )
    assert len(set(messages)) == 1
    assert f"as many stages as the model has layers (1), got {COMM.size}" in messages[0]


def test_an_unknown_schedule_is_an_error_on_all_ranks() -> None:
    if COMM.size == 1:
        pytest.skip("there is no pipeline")
    with pytest.raises(InputError, match="schedule: expected one of gpipe, 1f1b, got 'zigzag'"):
        Trainer(COMM, plain(), classes(), optimizer=SGD(), mesh={"pipeline": COMM.size}, schedule="zigzag")
