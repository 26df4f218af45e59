"""``mpicoll bench kernels``: what it measures, checks and says; small lists of tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from mpicoll.bench import kernel_tasks, kernels, models
from mpicoll.bench.devices import Cpu
from mpicoll.bench.kernel_tasks import OURS, Data, Task
from mpicoll.kernels.packing import Packing, slots

from mpicoll.cli import main

SHAPES = ((40, 24), (8,), (3, 8, 32), (1 << 12,))


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", "kernels", *arguments])


# --- lists ---


def test_resnet50_has_the_parameters_of_its_paper() -> None:
    shapes = models.MODELS["resnet50"]
    assert len(shapes) == 161
    assert sum(models.counts(shapes)) == 25_557_032
    assert shapes[0] == (64, 3, 7, 7)
    assert shapes[-2:] == ((1000, 2048), (1000,))


def test_gpt2_has_124_million_parameters() -> None:
    shapes = models.MODELS["gpt2"]
    assert len(shapes) == 148
    assert sum(models.counts(shapes)) == 124_439_808


def test_the_other_lists_are_as_large_as_they_say() -> None:
    assert models.nbytes(models.LISTS["big"]) == 1 << 30
    assert {models.nbytes([shape]) for shape in models.LISTS["many"]} == {1024}
    assert len(models.LISTS["many"]) == 1000


@pytest.mark.parametrize("name", models.LISTS)
def test_slots_are_full(name: str) -> None:
    """So that a bucket is what `numpy.concatenate` makes."""
    counts = models.counts(models.LISTS[name])
    for itemsize in (2, 4):
        assert slots(counts, itemsize)[1] == sum(counts)


# --- measuring ---


def test_everyone_is_checked_and_has_a_row() -> None:
    report = kernels.measure(Cpu(), "small", SHAPES, repeat=2)
    assert report["tensors"] == len(SHAPES)
    assert report["size"] == models.nbytes(SHAPES)
    assert set(report["memcpy"]) == {"bytes", "time", "bandwidth"}
    for row in report["results"]:
        assert list(row) == ["kernel", "by", "bytes", "time", "bandwidth", "of_memcpy"]
        assert row["bandwidth"] == pytest.approx(row["bytes"] / row["time"] / 1000)
        assert row["of_memcpy"] == pytest.approx(row["bandwidth"] / report["memcpy"]["bandwidth"])
    ours = [row["kernel"] for row in report["results"] if row["by"] == OURS]
    assert len(ours) == len(set(ours)) == 12
    peers = {row["by"] for row in report["results"]} - {OURS}
    assert {"numpy.concatenate", "numpy slices"} < peers
    assert any(name.startswith("torch") for name in peers) == (find_spec("torch") is not None)


@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
def test_all_of_pytorchs_functions_are_beside_a_kernel() -> None:
    from mpicoll.bench.torch_peers import torch_peers

    data = Data(Cpu(), SHAPES)
    assert set(torch_peers(data)) < {task.kernel for task in kernel_tasks.tasks(data)}


def test_without_pytorch_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    rows = kernels.measure(Cpu(), "small", SHAPES, repeat=1)["results"]
    assert not [row for row in rows if row["by"].startswith("torch")]


def spoilt(make: Callable[[Data], Task]) -> Callable[[Data], Task]:
    """The task, with one element of our result wrong."""

    def made(data: Data) -> Task:
        task = make(data)

        def wrong() -> Any:
            result = task.contenders[OURS]()
            first = result[0] if isinstance(result, (list, tuple)) else result
            # A bit of the last element that counts, be it a float, an index or a code.
            first.reshape(-1)[-1:].view(np.uint8)[-1] ^= 0x40
            return result

        return Task(task.kernel, task.nbytes, {OURS: wrong}, task.prepare, task.check)

    return made


@pytest.mark.parametrize(
    "make",
    [
        "_pack",
        "_unpack",
        "_unpack_checked",
        "_update",
        "_quantise",
        "_dequantise",
        "_select",
        "_scatter_add",
    ],
)
def test_a_wrong_element_is_found(make: str) -> None:
    task = spoilt(getattr(kernel_tasks, make))(Data(Cpu(), SHAPES))
    with pytest.raises(
        click.ClickException, match=rf"{task.kernel}, mpicoll: .*1 of \d+ wrong; element \d+: expected"
    ):
        kernels._check(task)


def test_a_wrong_result_ends_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packing, "unpack", lambda self, *args, **kwargs: None)
    result = bench("--list", "many", "--repeat", "1")
    assert result.exit_code == 1
    assert "Error: unpack, mpicoll: 256000 of 256000 wrong; element 0: expected" in result.stderr
    assert result.stdout == ""


# --- the command ---


def test_the_table_and_the_json(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    result = bench("--list", "many", "--repeat", "1", "--json", str(file))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].strip() == "# many: 1000 tensors, 1.0 MB"
    assert lines[1].split() == "kernel by MB moved µs GB/s of memcpy × ours".split()
    assert lines[2].split()[:2] == ["memcpy", "2.05"]
    report = json.loads(file.read_text())
    assert report["command"] == f"mpicoll bench kernels --list many --repeat 1 --json {file}"
    assert {"date", "machine", "packages", "list", "tensors", "size", "memcpy", "results"} < set(report)
    assert report["flags"] == {"list": "many", "device": "cpu", "repeat": 1}
    assert len(lines) == 3 + len(report["results"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--list vgg", "'vgg' is not one of 'resnet50', 'gpt2', 'big', 'many'"),
        ("--device tpu", "'tpu' is not one of 'cpu', 'cuda'"),
        ("--repeat 0", "0 is not in the range x>=1"),
        ("--json /nowhere/kernels.json", "/nowhere/kernels.json: No such file or directory"),
    ],
)
def test_bad_input_names_the_option_and_what_is_allowed(arguments: str, message: str) -> None:
    result = bench(*arguments.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_lists_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cpu, "room", lambda self: 3 << 30)
    result = bench("--list", "big")
    assert result.exit_code == 2
    assert "--list big needs 13.0 GiB of memory, 3.0 GiB are free" in result.stderr


def test_a_gpu_needs_cupy_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpicoll.bench.devices.find_spec", lambda name: None)
    result = bench("--device", "cuda")
    assert result.exit_code == 2
    assert "--device cuda needs cupy, which is not installed: pip install 'mpicoll[cuda]'" in result.stderr
    monkeypatch.setattr("mpicoll.bench.devices.find_spec", lambda name: name)
    monkeypatch.setattr("mpicoll.bench.devices.visible_gpus", lambda: ([], "no libcuda"))
    result = bench("--device", "cuda")
    assert result.exit_code == 2
    assert "--device cuda needs a GPU, and none was found: no libcuda" in result.stderr


def test_it_is_listed_beside_the_collectives() -> None:
    text = " ".join(CliRunner().invoke(main, ["bench", "--help"]).stdout.split())
    assert "`mpicoll bench gradients --help`" in text
    assert "`mpicoll bench kernels --help`" in text
    assert "Usage: mpicoll bench kernels" in bench("--help").stdout
