"""``mpicoll bench torch`` on the ranks of this job: its rows, its JSON, and what it finds wrong."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI
from mpicoll.bench import torch_backend
from mpicoll.bench.contenders import private_memory
from mpicoll.bench.jobs import USAGE_ERROR, WRONG
from mpicoll.bench.torch_backend import CALLS, run

import mpicoll

torch = pytest.importorskip("torch")
gloo = pytest.importorskip("mpicoll.bench.gloo").gloo
torch_steps = pytest.importorskip("mpicoll.bench.torch_steps")
group = pytest.importorskip("mpicoll.torch.group")

COMM = mpicoll.Communicator(MPI.COMM_WORLD)
QUICK = "-w 0 -n 2 --turns 1".split()
TINY = {
    "perceptron": torch_steps.Task(lambda: torch_steps.perceptron(5, 3), (5,), classes=5, batch=7, steps=2),
    "convolutions": torch_steps.Task(
        lambda: torch.nn.Sequential(torch_steps.Block(2, 3, 2), torch.nn.Flatten()), (2, 5, 3), 18, 4, 1
    ),
}


def report_of(capsys: pytest.CaptureFixture[str], file: Path, *arguments: str, status: int = 0) -> Any:
    """The report and what was said, on rank 0; the others say nothing, and get None."""
    assert run(COMM, [*arguments, "--json", str(file)]) == status
    said = capsys.readouterr()
    if COMM.rank == 0:
        return json.loads(file.read_text()), said.out, said.err
    assert said.out == said.err == ""
    return None


def test_groups_over_gloo_go_when_their_threads_have_long_been_idle() -> None:
    """What they do after the last collective takes Python's lock, which a destructor does not let go."""
    found = []
    for _ in range(2):
        with gloo(COMM, private_memory(0)):
            found.append(weakref.ref(torch.distributed.group.WORLD))
        assert not torch.distributed.is_initialized()
        assert found[-1]() is not None
    assert found[0]() is None


def test_collectives_beside_gloo_and_the_communicator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--min", "4", "--max", "4K", "--factor", "1024", *QUICK]
    found = report_of(capsys, tmp_path / "report.json", *arguments)
    if found is None:
        return
    report, out, _ = found
    assert report["command"].startswith(f"mpirun -np {COMM.size} mpicoll bench torch --min 4 --max 4K ")
    assert {"date", "mpi", "thread_level", "machine", "torch"} < set(report)
    assert (report["ranks"], report["flags"]["ddp"]) == (COMM.size, False)
    assert [row["call"] for row in report["rows"]] == [call for call in CALLS for _ in range(2)]
    for row in report["rows"]:
        blocks = COMM.size if CALLS[row["call"]] not in ("allreduce", "broadcast") else 1
        assert row["size"] == 4 * row["count"] * blocks
        assert row["count"] in (1, 1024 // blocks)
        assert row["nwrong"] == {"mpicoll": 0, "communicator": 0, "gloo": 0}
        assert min(row["mpicoll"], row["communicator"], row["gloo"], row["memcpy"]) > 0
        assert row["gloo_ratio"] == row["gloo"] / row["mpicoll"]
        assert row["overhead"] == row["mpicoll"] - row["communicator"]
        assert row["communicator_ratio"] == row["mpicoll"] / row["communicator"]
    assert [out.count(f"\n {call} ") for call in CALLS] == [2] * len(CALLS)


def test_some_collectives_only_and_turns_that_end_by_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--collective", "broadcast", "-b", "12", "-e", "40", "--turns", "1", "-w", "0"]
    found = report_of(capsys, tmp_path / "report.json", *arguments)
    if found is not None:
        assert [(row["call"], row["size"]) for row in found[0]["rows"]] == [("broadcast", 12)]


def test_wrong_results_are_counted_and_end_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = group.ProcessGroup.broadcast

    def wrong(self: Any, tensors: Any, *arguments: Any) -> Any:
        work = right(self, tensors, *arguments)
        tensors[0][[1, 5]] += 1
        return work

    monkeypatch.setattr(group.ProcessGroup, "broadcast", wrong)
    arguments = ["--collective", "broadcast", "-b", "1K", "-e", "1K", *QUICK]
    found = report_of(capsys, tmp_path / "report.json", *arguments, status=WRONG)
    if found is not None:
        assert found[0]["rows"][0]["nwrong"] == {"mpicoll": 2 * COMM.size, "communicator": 0, "gloo": 0}
        assert found[2].count(f"Error: broadcast 1K: {2 * COMM.size} wrong elements, mpicoll") == 1


def test_steps_of_ddp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch_steps, "TASKS", TINY)
    found = report_of(capsys, tmp_path / "report.json", "--ddp", "--turns", "3")
    if found is None:
        return
    report, out, _ = found
    assert report["command"].startswith(f"mpirun -np {COMM.size} mpicoll bench torch --ddp --turns 3")
    assert [(row["model"], row["parameters"]) for row in report["steps"]] == [
        ("perceptron", 3 * (25 + 5)),
        ("convolutions", 3 * 2 * 9 + 3 * 3 * 9 + 3 * 2 + 3 * 2 * 3),
    ]
    for row in report["steps"]:
        assert max(row["gradients_differ"], row["losses_differ"]) < 1e-5
        assert row["gloo_ratio"] == row["gloo"] / row["mpicoll"]
        assert row["not_hidden"] == pytest.approx((row["mpicoll"] - row["no_sync"]) / row["mpicoll"])
        assert row["gloo_not_hidden"] == pytest.approx((row["gloo"] - row["no_sync"]) / row["gloo"])
        assert {name: sorted(times)[1] for name, times in row["turns"].items()} == {
            name: pytest.approx(row[name]) for name in ("mpicoll", "gloo", "no_sync")
        }
    assert all(f"\n {name} " in out for name in TINY)


def test_gradients_that_differ_from_gloos_end_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = group.ProcessGroup.allreduce

    def wrong(self: Any, tensors: Any, *arguments: Any) -> Any:
        work = right(self, tensors, *arguments)
        work.wait()
        tensors[0][0] += 1
        return work

    monkeypatch.setattr(torch_steps, "TASKS", {"perceptron": TINY["perceptron"]})
    monkeypatch.setattr(group.ProcessGroup, "allreduce", wrong)
    found = report_of(capsys, tmp_path / "report.json", "--ddp", "--turns", "1", status=WRONG)
    if found is not None:
        message = "Error: perceptron: expected gradients over mpicoll and gloo that agree to 0.001, got a"
        assert found[2].count(message) == 1


def test_the_sizes_of_the_models() -> None:
    for name, count in (("MLP, 10 layers of 256", 657_920), ("ResNet-18, 64 × 64 pixels", 11_689_512)):
        task = torch_steps.TASKS[name]
        model = task.model()
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        assert model(torch.zeros(2, *task.shape)).shape == (2, task.classes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--collective allsum", "'allsum' is not one of 'all_reduce', 'broadcast'"),
        ("-b 2K -e 1K", "expected -b/--min up to -e/--max; got 2K and 1K"),
        ("-b 6", "expected a multiple of 4, the bytes of an element; got 6"),
        ("--max large", "expected a number with K, M, G or T behind it, such as 64K, got 'large'"),
        ("--turns 0", "0 is not in the range x>=1"),
        ("--ddp --min 4K", "--min is for collectives; expected only --turns and --json with --ddp"),
        ("--ddp --collective broadcast", "--collective is for collectives; expected only"),
        ("allreduce", "Got unexpected extra argument (allreduce)"),
        ("--json /nowhere/report.json", "No such file or directory"),
    ],
)
def test_bad_input_is_said_once_and_ends_every_rank(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(COMM, arguments.split()) == USAGE_ERROR
    said = capsys.readouterr()
    assert said.err.count(message) == (1 if COMM.rank == 0 else 0)
    assert said.out == ""


def test_pytorch_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch_backend, "find_spec", lambda name: None)
    assert run(COMM, []) == USAGE_ERROR
    said = capsys.readouterr()
    assert said.err.count("pip install 'mpicoll[torch]'") == (1 if COMM.rank == 0 else 0)


def test_help_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(COMM, ["--help"]) == 0
    assert capsys.readouterr().out.count("--ddp") == (3 if COMM.rank == 0 else 0)
