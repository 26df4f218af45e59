"""The training command on the ranks of this job: what it refuses, with what words, and what it leaves behind.

Whatever is wrong, every rank ends with status 2, and one line from rank 0 says what it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll.train.cli import USAGE_ERROR, parse, run, train
from mpicoll.train.pipeline import SCHEDULES

COMM = mpicoll.Communicator(MPI.COMM_WORLD)
RANKS = COMM.size
SAMPLES = 40  # of which 32 to train with
BATCH = 16
PNG = b"\x89PNG\r\n\x1a\n"

several = pytest.mark.skipif(RANKS == 1, reason="for several ranks")

Arguments = list[str]
Said = Callable[..., str]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Rank 0's directory, on every rank."""
    return Path(COMM.bcast(str(tmp_path)))


@pytest.fixture
def data(place: Path) -> Arguments:
    """Points of three classes, and as little training as there can be."""
    return [*points(place, np.arange(SAMPLES) % 3), "--epochs", "2", "--hidden", "4"]


@pytest.fixture
def values(place: Path) -> Arguments:
    """Values to predict."""
    return points(place, np.random.default_rng(2).standard_normal((SAMPLES, 2)))


def points(place: Path, y: Any) -> Arguments:
    if COMM.rank == 0:
        np.save(place / "x.npy", np.random.default_rng(1).standard_normal((SAMPLES, 5)))
        np.save(place / "y.npy", y)
    return ["--data", "npy", "--data-dir", str(place), "--batch-size", str(BATCH)]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Said:
    """The error that these arguments end in, the same on every rank; nobody says anything else."""

    def said(*arguments: str) -> str:
        capfd.readouterr()
        assert COMM.allgather(run(COMM, list(arguments))) == [USAGE_ERROR] * RANKS
        printed = capfd.readouterr()
        assert printed.out == ""
        if COMM.rank:
            assert printed.err == ""
        else:
            assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        return str(COMM.bcast(printed.err))

    return said


def trained(*arguments: str) -> dict[str, Any]:
    options = parse(arguments, aloud=False)
    assert options is not None
    return train(COMM, options)


def on_rank_zero(function: Callable[[], Any]) -> Any:
    """What ``function`` gives there, on every rank."""
    return COMM.bcast(function() if COMM.rank == 0 else None)


# What needs no data to be wrong ---------------------------------------------------------------------

WRONG = {
    # one kind of data has what another has not
    "--data-dir here": "--data-dir is for --data mnist or cifar10 or npy, not digits",
    "--label y": "--label is for --data csv, not digits",
    "--data csv": "--data csv needs --data-file",
    "--data npy": "--data npy needs --data-dir",
    "--data cifar10": "--data cifar10 needs --data-dir",
    "--data npy --data-dir here --data-file there": "--data-file is for --data csv, not npy",
    "--data diabetes --task regression": "--task regression is for --data csv; diabetes has values",
    # one strategy has what another has not
    "--strategy local --algorithm ring": "--algorithm is for --strategy allreduce, not local",
    "--strategy sharded --bucket-mb 1": "--bucket-mb is for --strategy allreduce, not sharded",
    "--strategy local --dtype f16": "--dtype is for --strategy allreduce, not local",
    "--strategy gossip --compression int8": "--compression is for --strategy allreduce, not gossip",
    "--strategy local --balance": "--balance is for --strategy allreduce or sharded, not local",
    "--servers 1": "--servers is for --strategy ps-sync or ps-async, not allreduce",
    "--strategy ps-sync --staleness 2": "--staleness is for --strategy ps-async, not ps-sync",
    "--average-every 3": "--average-every is for --strategy local, not allreduce",
    "--graph exponential": "--graph is for --strategy gossip, not allreduce",
    # what does not go together
    "--dtype f16 --compression int8": "--dtype and --compression both say how gradients travel",
    "--precision f64 --dtype f16": "--dtype and --compression are for --precision f32",
    "--precision f64 --compression int8": "--dtype and --compression are for --precision f32",
    "--deterministic --dtype bf16": "--dtype does not go with --deterministic",
    "--deterministic --compression int8": "--compression does not go with --deterministic",
    "--shards 3": "--shards is for --deterministic",
    "--mesh data=1 --tensor-parallel 1": "--tensor-parallel is short for --mesh tensor=...",
    "--mesh data=1 --pipeline-parallel 1": "--pipeline-parallel is short for --mesh pipeline=...",
    "--micro-batches 2": "--micro-batches is for a pipeline; see --pipeline-parallel",
    "--mesh tensor=2 --micro-batches 2": "--micro-batches is for a pipeline; see --pipeline-parallel",
    "--draw-pipeline it.png": "--draw-pipeline is for a pipeline; see --pipeline-parallel",
    "--pipeline-parallel 2 --accumulate 2": "--accumulate is not for a pipeline, which has --micro-batches",
    "--checkpoint-every 3": "--checkpoint-every needs --checkpoint",
    "--resume": "--resume needs --checkpoint",
    "--nesterov --optimizer adam": "--nesterov is for --optimizer sgd, not adam",
    "--nesterov --optimizer lars": "--nesterov is for --optimizer sgd, not lars",
    # what is no value
    "--mesh data=0": "'--mesh': mesh: expected sizes such as data=2,pipeline=2,tensor=1",
    "--mesh data=1,data=1": "each axis once; got 'data=1,data=1'",
    "--mesh rows=2": "each axis once; got 'rows=2'",
    "--augment blur": "'--augment': augmentation: expected some of shift, flip, noise",
    "--compression gzip": "'--compression': compression: expected none, fp16",
    "--hidden 4,x": "'--hidden': '4,x': expected whole numbers from 1",
    "--epochs many": "'--epochs': 'many' is not a valid integer",
} | {
    f"--{name} nan": f"'--{name}': nan: expected a finite number"
    for name in ("dropout", "lr", "momentum", "weight-decay", "clip-norm", "lr-factor", "bucket-mb")
}
FROM_1 = "lr-every lr-batch batch-size accumulate average-every tensor-parallel pipeline-parallel "
FROM_1 += "micro-batches shards checkpoint-every keep patience"
WRONG |= {f"--{name} 0": f"'--{name}': 0 is not in the range x>=1" for name in FROM_1.split()}
WRONG |= {
    f"--{name} -1": f"'--{name}': -1 is not in the range x>=0"
    for name in ("warmup", "seed", "servers", "staleness")
}
WRONG |= {f"--{name} 1": f"'--{name}': 1.0 is not in the range 0<=x<1" for name in ("dropout", "momentum")}
CHOICES = "data task model activation batch-norm precision optimizer lr-schedule "
CHOICES += "strategy algorithm dtype graph pipeline-schedule"
WRONG |= {f"--{name} other": f"'--{name}': 'other' is not one of " for name in CHOICES.split()}


@pytest.mark.parametrize("arguments", WRONG)
def test_options_that_are_wrong_by_themselves(refused: Said, arguments: str) -> None:
    assert WRONG[arguments] in refused(*arguments.split())


# What is wrong for these ranks, or these data -------------------------------------------------------

UNFIT = {
    f"--mesh data={RANKS + 1}": f"mesh: expected sizes that multiply to the {RANKS} ranks of this job",
    f"--tensor-parallel {2 * RANKS}": f"pipeline=1, tensor={2 * RANKS}",
    f"--pipeline-parallel {2 * RANKS}": f"pipeline={2 * RANKS}, tensor=1",
    "--deterministic --shards 17": "batch size: expected at least 17 samples",
    "--deterministic --balance": "shards: deterministic training is for the strategy allreduce",
    "--deterministic --strategy sharded": "shards: deterministic training is for the strategy allreduce",
    "--model cnn": "expected images of 4 x 4 pixels or more for a cnn, got samples of shape (5,)",
    "--augment flip": "augmentation: expected images, of height and width, to shift or flip",
    "--class-weights 0:1,7:2": "class weights: expected a class from 0 to 2, got 7",
    "--class-weights heavy": "class weights: expected CLASS:WEIGHT",
    "--class-weights 1:2,1:2": "class weights: expected each class once",
    "--lr 1e30": "expected the training loss to be a number, found nan in epoch 1; lower the learn",
    "--strategy local --batch-norm synchronised": "got synchronised, which needs ranks in step",
    "--strategy gossip --batch-norm synchronised": "got synchronised, which needs ranks in step",
    "--deterministic --batch-norm synchronised": "got synchronised",
}
UNFIT_SEVERAL = {
    f"--batch-size {RANKS - 1}": f"batch size: expected at least {RANKS} samples",
    f"--deterministic --shards {RANKS - 1}": f"shards: expected at least as many as ranks ({RANKS})",
    f"--deterministic --tensor-parallel {RANKS}": "shards: deterministic training is for the strategy allr",
    f"--strategy ps-sync --tensor-parallel {RANKS}": "strategy: expected allreduce, sharded, local or gossip",
}


@pytest.mark.parametrize("arguments", UNFIT)
def test_options_that_do_not_fit_the_data_or_the_ranks(
    refused: Said, data: Arguments, arguments: str
) -> None:
    assert UNFIT[arguments] in refused(*data, *arguments.split())


@several
@pytest.mark.parametrize("arguments", UNFIT_SEVERAL)
def test_options_that_do_not_fit_several_ranks(refused: Said, data: Arguments, arguments: str) -> None:
    assert UNFIT_SEVERAL[arguments] in refused(*data, *arguments.split())


@pytest.mark.parametrize("servers", [RANKS, RANKS + 3])
@pytest.mark.parametrize("strategy", ["ps-sync", "ps-async"])
def test_somebody_has_to_work(refused: Said, data: Arguments, strategy: str, servers: int) -> None:
    said = refused(*data, "--strategy", strategy, "--servers", str(servers))
    assert f"servers: expected at most {RANKS - 1}" in said and f"got {servers}" in said


@pytest.mark.skipif(RANKS < 5, reason="for more stages than there are layers")
def test_more_stages_than_layers(refused: Said, data: Arguments) -> None:
    said = refused(*data, "--pipeline-parallel", str(RANKS))
    assert "pipeline: expected at most as many stages as the model has layers (4)" in said


@pytest.mark.parametrize("arguments", ["--class-weights balanced", "--class-weights 0:2", "--resample"])
def test_values_have_no_classes(refused: Said, values: Arguments, arguments: str) -> None:
    assert "class" in refused(*values, *arguments.split())


@pytest.mark.parametrize(
    "label, message",
    [
        (-1, "/y.npy: expected classes, whole numbers from 0, found -1 in sample 7"),
        (
            99,
            "/y.npy: expected classes numbered from 0, at least 2 and fewer than there are samples, found 99",
        ),
    ],
)
def test_labels_that_are_no_classes(refused: Said, place: Path, label: int, message: str) -> None:
    y = np.arange(SAMPLES) % 3
    y[7] = label
    assert f"{place}{message}" in refused(*points(place, y))


# Checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture
def kept(data: Arguments, place: Path) -> Arguments:
    """A training that keeps a checkpoint after each of its four steps."""
    return [*data, "--checkpoint", str(place / "kept"), "--checkpoint-every", "1"]


def tear(place: Path, newest: int) -> list[Path]:
    """Cut the ``newest`` checkpoints in two; their files, the newest first."""

    def cut() -> list[Path]:
        files = sorted((place / "kept").glob("step-*.safetensors"), reverse=True)
        for file in files[:newest]:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        return files

    files: list[Path] = on_rank_zero(cut)
    return files


def test_of_checkpoints_the_last_stay_and_the_best(kept: Arguments, place: Path) -> None:
    trained(*kept, "--keep", "2")
    names = on_rank_zero(lambda: sorted(path.name for path in (place / "kept").iterdir()))
    assert names == ["best.safetensors", "step-0000000003.safetensors", "step-0000000004.safetensors"]


@pytest.mark.parametrize("torn", [0, 1, 2])
def test_what_is_torn_is_named_and_the_one_before_it_is_taken(
    capfd: pytest.CaptureFixture[str], kept: Arguments, place: Path, torn: int
) -> None:
    expected = trained(*kept)
    files = tear(place, torn)
    capfd.readouterr()
    result = trained(*kept, "--resume")
    notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")]
    assert result["parameters_sha256"] == expected["parameters_sha256"]
    assert (result["steps"], result["epochs"]) == (4, 2)
    assert len(notes) == (torn if COMM.rank == 0 else 0)
    for note, file in zip(notes, files, strict=False):
        assert note.startswith(f"note: {file}: expected a checkpoint, found a torn file")
        assert note.endswith("; using the one before it")


def test_nothing_to_resume_from_but_torn_checkpoints(refused: Said, kept: Arguments, place: Path) -> None:
    trained(*kept)
    files = tear(place, 3)
    said = refused(*kept, "--resume")
    assert f"error: {place / 'kept'}: expected a good checkpoint, found none; move these away" in said
    assert len(files) == 3 and all(str(file) in said for file in files)


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_to_resume_from(refused: Said, kept: Arguments, place: Path, exists: bool) -> None:
    if exists:
        on_rank_zero((place / "kept").mkdir)
    said = refused(*kept, "--resume")
    assert said == f"error: {place / 'kept'}: expected checkpoints to resume from, found none\n"


@pytest.mark.parametrize(
    "other, message",
    [
        ("--hidden 5", "a checkpoint of this model, found one of another: 1.bias is 5 here and 4 there"),
        ("--hidden 4,4", "a checkpoint of this model, found one of another: 3.bias is 4 here and 3 there"),
        (
            "--batch-norm rank",
            "a checkpoint of this model, found one of another: 2.beta is 4 here and missing",
        ),
        ("--batch-size 12", "a checkpoint with batch size 12, as in this run, found 16"),
        ("--optimizer adam", "a checkpoint with optimizer Adam, as in this run, found SGD"),
        ("--seed 3", "a checkpoint with seed 3, as in this run, found 0"),
        ("--deterministic", "a checkpoint with shards 8, as in this run, found None"),
        ("--data diabetes", "a checkpoint with training samples 354, as in this run, found 32"),
    ],
)
def test_checkpoints_of_another_training(
    refused: Said, kept: Arguments, place: Path, other: str, message: str
) -> None:
    trained(*kept)
    data = 4 if "--data" in other else 0  # so many arguments say what the data are
    kept = [*kept[data:], *other.split()]
    assert f"error: {place / 'kept'}: expected {message}" in refused(*kept, "--resume")


def test_a_directory_that_cannot_be_written_to(refused: Said, data: Arguments, place: Path) -> None:
    """Found before the training; under a file, where not even root can."""
    on_rank_zero((place / "file").touch)
    for path, reason in (place / "file", "it is a file"), (place / "file" / "kept", "Not a directory"):
        said = refused(*data, "--checkpoint", str(path))
        assert said == (
            f"error: {path}: expected a directory that checkpoints can be written to, but: {reason}\n"
        )


def test_training_goes_on_where_it_was(data: Arguments, place: Path) -> None:
    """Two epochs and two more are four; with what they have written."""
    metrics = place / "metrics.jsonl"
    files = "--metrics", str(metrics), "--checkpoint", str(place / "kept")
    trained(*data, *files)
    result = trained(*data, *files, "--resume", "--epochs", "4")
    alone = trained(*data, "--epochs", "4")
    assert result["parameters_sha256"] == alone["parameters_sha256"]
    assert (result["epochs"], result["steps"], result["test_loss"]) == (4, 8, alone["test_loss"])
    lines = on_rank_zero(lambda: [json.loads(line) for line in metrics.read_text().splitlines()])
    assert [line.get("number") for line in lines] == [None, 1, 2, None, 3, 4]


def test_nothing_is_left_to_do(data: Arguments, place: Path) -> None:
    data += ["--checkpoint", str(place / "kept")]
    expected = trained(*data)
    result = trained(*data, "--resume", "--epochs", "1")
    assert (result["epochs"], result["steps"]) == (2, 4)
    assert result["parameters_sha256"] == expected["parameters_sha256"]


# The end, and what is left ---------------------------------------------------------------------------


@pytest.mark.parametrize("patience, epochs", [(1, 2), (3, 4), (8, 6)])
def test_patience(data: Arguments, patience: int, epochs: int) -> None:
    """With steps too small to move a parameter the first epoch's loss stays the smallest."""
    result = trained(*data, "--epochs", "6", "--lr", "1e-30", "--patience", str(patience))
    assert (result["epochs"], result["steps"]) == (epochs, 2 * epochs)


def test_who_learns_is_not_stopped(data: Arguments) -> None:
    assert trained(*data, "--epochs", "6", "--lr", "1e-3", "--patience", "1")["epochs"] == 6


def test_the_result_is_written(data: Arguments, place: Path) -> None:
    result = trained(*data, "--json", str(place / "result.json"))
    written = on_rank_zero(lambda: json.loads((place / "result.json").read_text()))
    assert written == {**result, "seconds": written["seconds"]}  # of which each rank has its own
    assert (written["ranks"], written["epochs"], written["steps"]) == (RANKS, 2, 4)
    assert (written["data"], written["hidden"]) == (f"npy:{place}", [4])
    assert written["parameters"] == 5 * 4 + 4 + 4 * 3 + 3
    nbytes = 2 * (RANKS - 1) / RANKS * 4 * written["parameters"]
    assert written["bytes_sent_per_step"] == pytest.approx(nbytes)
    assert len(set(COMM.allgather(result["parameters_sha256"]))) == 1


def test_metrics_are_written(data: Arguments, place: Path) -> None:
    result = trained(*data, "--metrics", str(place / "metrics.jsonl"))
    lines = on_rank_zero(lambda: (place / "metrics.jsonl").read_text().splitlines())
    about, *epochs = map(json.loads, lines)
    assert about["about"] == {"data": f"npy:{place}", "strategy": "allreduce", "ranks": RANKS}
    assert [(epoch["number"], epoch["step"], epoch["samples"]) for epoch in epochs] == [
        (1, 2, 32),
        (2, 4, 32),
    ]
    assert epochs[-1]["test_loss"] == result["test_loss"]
    assert epochs[-1]["train_loss"] == result["train_loss"]


def test_the_loss_is_drawn(data: Arguments, place: Path) -> None:
    pytest.importorskip("matplotlib")
    trained(*data, "--plot", str(place / "loss.png"))
    assert on_rank_zero(lambda: (place / "loss.png").read_bytes()[:8]) == PNG


@several
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_pipeline_is_drawn(data: Arguments, place: Path, schedule: str) -> None:
    pytest.importorskip("matplotlib")
    picture = place / "pipeline.png"
    options = "--draw-pipeline", str(picture), "--pipeline-schedule", schedule, "--hidden", "4,4,4"
    result = trained(*data, "--pipeline-parallel", str(RANKS), *options)
    assert result["mesh"] == {"data": 1, "pipeline": RANKS, "tensor": 1}
    assert on_rank_zero(lambda: picture.read_bytes()[:8]) == PNG


@pytest.mark.parametrize(
    "flag, name, reason",
    [
        ("--json", "file/x", "(--json), but: Not a directory"),
        ("--json", ".", "(--json), but: it is a directory"),
        ("--metrics", "file/x", "expected to write metrics there, but: Not a directory"),
        ("--metrics", "x.npy", "expected a new file, or one that a training has written its metrics to"),
        ("--plot", "file/x.png", "(the loss curve), but: Not a directory"),
        ("--plot", "x.pdf", "expected a name that ends in .png for the loss curve"),
    ],
)
def test_files_that_cannot_be_written_are_found_before_the_training(
    refused: Said, data: Arguments, place: Path, flag: str, name: str, reason: str
) -> None:
    if (flag, name) == ("--plot", "file/x.png"):
        pytest.importorskip("matplotlib")
    on_rank_zero((place / "file").touch)
    said = refused(*data, flag, str(place / name))
    assert said.startswith(f"error: {place / name}: expected ") and reason in said


@pytest.mark.parametrize(
    "flag, name, modules, message",
    [
        (
            "--tensorboard",
            "board",
            ["tensorboardX", "torch.utils.tensorboard"],
            "expected tensorboardX, or PyTorch with tensorboard, to write",
        ),
        ("--plot", "x.png", ["matplotlib.figure"], "expected matplotlib, which draws the loss curve, but: "),
    ],
)
def test_a_package_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    refused: Said,
    data: Arguments,
    place: Path,
    flag: str,
    name: str,
    modules: list[str],
    message: str,
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    assert f"error: {place / name}: {message}" in refused(*data, flag, str(place / name))


@several
def test_a_pipeline_cannot_be_drawn(
    monkeypatch: pytest.MonkeyPatch, refused: Said, data: Arguments, place: Path
) -> None:
    on_rank_zero((place / "file").touch)
    options = "--pipeline-parallel", str(RANKS), "--hidden", "4,4,4", "--draw-pipeline"
    picture = str(place / "file" / "pipeline.png")
    said = refused(*data, *options, picture)
    assert f"{picture}: expected a file that can be written (--draw-pipeline)" in said
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib" in refused(*data, *options, str(place / "pipeline.png"))


def test_only_rank_zero_speaks(capfd: pytest.CaptureFixture[str], data: Arguments) -> None:
    assert run(COMM, data) == 0
    printed = capfd.readouterr()
    speaks = COMM.rank == 0
    assert printed.err.count("epoch 1/2") == printed.err.count("epoch 2/2") == speaks
    assert printed.out.count("parameters sha256") == speaks
    if not speaks:
        assert printed.out == printed.err == ""
