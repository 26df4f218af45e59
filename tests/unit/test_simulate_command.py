"""`mpicoll simulate` as a user types it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mpicoll.simulate import training
from mpicoll.simulate.command import command
from mpicoll.simulate.machine import Machine
from mpicoll.simulate.pictures import format_seconds

PNG = b"\x89PNG"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_one_algorithm() -> None:
    result = call("allreduce", "--algorithm", "ring", "--ranks", "64", "--size", "1M", "--machine", "torus")
    assert result.exit_code == 0
    assert "allreduce on torus: 64 x 32 x 32 torus" in result.stdout
    (row,) = [line for line in result.stdout.splitlines() if "ring" in line]
    assert "8,064" in row  # messages: 126 rounds of 64


def test_all_algorithms_the_fastest_first() -> None:
    result = call("broadcast", "--ranks", "5,16", "--size", "1K,4M", "--machine", "two-hosts", "--json")
    rows = json.loads(result.stdout)["results"]
    for ranks, nbytes in ((5, 1024), (5, 4 << 20), (16, 1024), (16, 4 << 20)):
        some = [row["seconds"] for row in rows if (row["ranks"], row["bytes"]) == (ranks, nbytes)]
        assert some == sorted(some)
    names = {row["algorithm"] for row in rows if row["ranks"] == 5}
    assert "binomial" in names
    assert not any(name.startswith("hierarchical") for name in names)
    assert "hierarchical, chain" in {row["algorithm"] for row in rows if row["ranks"] == 16}
    assert all(row["first_rank_seconds"] <= row["seconds"] for row in rows)


def test_hierarchical_is_every_algorithm_across_nodes_and_one_can_be_named() -> None:
    options = ("allreduce", "--ranks", "16", "--machine", "two-hosts", "--json", "--algorithm")
    rows = json.loads(call(*options, "hierarchical").stdout)["results"]
    assert len(rows) > 2
    assert all(row["algorithm"].startswith("hierarchical, ") for row in rows)
    (row,) = json.loads(call(*options, "hierarchical, ring").stdout)["results"]
    assert row["algorithm"] == "hierarchical, ring"


def test_what_is_left_out_is_said() -> None:
    result = call("gather", "--ranks", "20000", "--machine", "torus", "--json")
    assert json.loads(result.stdout)["left_out"] == []
    result = call("alltoall", "--ranks", "20000", "--machine", "torus")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "left out, for they send too many messages to look at: pairwise (20000 ranks); bruck" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("allreduce", "--size", "10Q"), "'--size': expected a number with K, M, G or T behind it"),
        (("allreduce", "--size", "10Q"), "got '10Q'"),
        (("allreduce", "--ranks", "0"), "'--ranks': expected numbers, 1 or more, such as 64,4096; got '0'"),
        (
            ("allreduce", "--ranks", "9", "--machine", "laptop"),
            "for --ranks: expected 1 to 8, for which laptop",
        ),
        (("allreduce", "--machine", "none.toml"), "'--machine': expected a TOML file or one of"),
        (("allreduce", "--algorithm", "bruck"), "for --algorithm: expected one of ring, "),
        (
            ("allreduce", "--algorithm", "hierarchical", "--machine", "laptop", "--ranks", "4"),
            "got 'hierarchical'",
        ),
        (("allreduce", "--algorithm", "direct", "--ranks", "65536"), "expected one with at most"),
        (("allreduce", "--root", "1"), "for --root: expected none beside allreduce"),
        (("broadcast", "--root", "64"), "for --root: expected a rank from 0 to 63, got 64"),
        (("allreduce", "--algorithm", "ring", "--chunks", "2"), "for --chunks: expected none for ring"),
        (
            ("allreduce", "--map", "map.txt"),
            "'--map': expected a name that ends in .png, .svg, .pdf; got 'map.txt'",
        ),
        (
            ("allreduce", "--map", "no/map.png"),
            "'--map': expected a file that can be written, got 'no/map.png': No",
        ),
        (
            ("allreduce", "--map", "m.png", "--algorithm", "ring"),
            "for --algorithm: expected none beside --map",
        ),
        (("allreduce", "--plot", "m.png"), "for --plot: expected only together with --training"),
        (
            ("allreduce", "--training", "7b"),
            "expected either a COLLECTIVE or --training; got 'allreduce' and",
        ),
        (("--training", "7b", "--size", "1K"), "for --size: expected none beside --training"),
        (("--training", "7b", "--ranks", "8,512", "--machine", "big-basin"), "expected 1 to 256"),
        ((), "expected either a COLLECTIVE or --training; got neither"),
        (("allreduce", "--size", "8388608T"), "'--size': expected less than 8388608T, got '8388608T'"),
        (("allreduce", "--size", "9" * 400), "'--size': expected less than 8388608T, got '999"),
        (("allreduce", "--ranks", "9" * 5000), "'--ranks': expected numbers, 1 or more"),
        (("allreduce", "--machine", ""), "got '': Is a directory"),
        (("broadcast", "--chunks", "100001"), "100001 is not in the range 1<=x<=100000"),
    ],
)
def test_wrong_input_is_named(arguments: tuple[str, ...], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("Error:") == 1


def test_a_machine_file_with_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nabout = "a test"\n[rank]\noverhead = -1.0\nreduce_bandwidth = 1e9\n')
    result = call("allreduce", "--machine", str(path))
    assert result.exit_code == 2
    assert f"{path}: rank.overhead: expected seconds, 0 or more, got -1.0" in result.stderr


def test_ranks_that_do_not_fit_are_named_before_anything_is_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpicoll.simulate.candidates.predict", None)
    for options in ((), ("--map", str(tmp_path / "map.png"))):
        result = call("allreduce", "--ranks", "4,9", "--machine", "laptop", *options)
        assert (result.exit_code, "for --ranks: expected 1 to 8" in result.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_a_map(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "map.png"
    options = ("--ranks", "4,8", "--size", "64,4M", "--machine", "laptop", "--json")
    result = call("allreduce", "--map", str(path), *options)
    assert path.read_bytes().startswith(PNG)
    assert [name.name for name in tmp_path.iterdir()] == ["map.png"]
    cells = json.loads(result.stdout)["map"]
    assert [(cell["ranks"], cell["bytes"]) for cell in cells] == [
        (4, 64),
        (4, 4 << 20),
        (8, 64),
        (8, 4 << 20),
    ]
    table = json.loads(call("allreduce", *options).stdout)["results"]
    for cell in cells:
        same = [row for row in table if (row["ranks"], row["bytes"]) == (cell["ranks"], cell["bytes"])]
        assert cell == same[0]


@pytest.fixture
def few_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicting one figure at few ranks takes little time."""
    monkeypatch.setattr(training, "PUBLISHED", (replace(training.PUBLISHED[0], nranks=16),))


@pytest.mark.usefixtures("few_published")
def test_training(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "scaling.svg"
    arguments = ("--training", "resnet50", "--ranks", "1,8,64")
    result = call(*arguments, "--plot", str(path), "--json")
    assert "<svg" in path.read_text()
    found = json.loads(result.stdout)
    for kind in ("weak", "strong"):
        efficiencies = [point["efficiency"] for point in found[kind]]
        assert efficiencies[0] == 1
        assert 1 > efficiencies[1] > efficiencies[2] > 0.5
    assert found["published"][0]["predicted"]["nranks"] == 16
    text = " ".join(call(*arguments).stdout.split())
    assert "ResNet-50, float32 gradients, 102 MB in buckets of 25M" in text
    assert all(part in text for part in ("weak scaling", "strong scaling", "Inception V3", "90%", "A100"))


def test_a_step_with_its_allreduces_under_way() -> None:
    # Two buckets of 30 and one of 15 bytes; 3 s, so forward 1 s, and ready at 1.8, 2.6 and 3 s.
    assert training.step_seconds(3.0, [30, 30, 15], (0.0, 0.0, "")) == pytest.approx(3.0)
    assert training.step_seconds(3.0, [30, 30, 15], (0.5, 0.25, "")) == pytest.approx(3.35)
    assert training.step_seconds(3.0, [30, 30, 15], (1.0, 0.4, "")) == pytest.approx(4.2)


def test_buckets_and_strong_scaling_end_with_what_is_left() -> None:
    job = replace(training.JOBS["resnet50"], gradient_bytes=10, bucket_bytes=4, global_batch=8)
    found = training.scale(job, Machine.load("laptop"), [1, 2, 8, 16])
    assert [point.nranks for point in found.weak] == [1, 2, 8]
    assert [point.local_batch for point in found.strong] == [8, 4, 1]
    none = training.scale(replace(job, global_batch=4), Machine.load("laptop"), [1, 8])
    assert [point.nranks for point in none.strong] == [1]


def test_seconds_with_a_unit() -> None:
    texts = {
        0.0: "0 ns",
        3.2e-9: "3.2 ns",
        1.234e-5: "12.3 µs",
        0.9999e-3: "1 ms",
        1.5: "1.5 s",
        4321.0: "4321 s",
    }
    assert {seconds: format_seconds(seconds) for seconds in texts} == texts


def test_help_shows_examples() -> None:
    text = call("--help").stdout
    assert "mpicoll simulate allreduce --algorithm ring --ranks 4096 --size 100M" in text
