"""The Python of the documentation's pages, between ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from mpicoll.bench import collectives

import mpicoll
from mpicoll.train import cli as train
from tests.unit.test_docs import DOCS, PAGES, add_circulant, blocks, commands, needs_ranks, run_python
from tests.unit.test_docs import run as run_alone

# Pages whose Python is run elsewhere, or not at all, and why.
ELSEWHERE = {
    "adding.md": "files, which tests/unit/test_docs.py puts where they go",
    "algorithms.md": "needs no ranks: tests/unit/test_docs.py",
    "at-scale.md": "needs no ranks: tests/unit/test_docs.py",
    "gpu.md": "needs a GPU; bench/gpu.sh makes the same calls",
    "torch.md": "lines of larger programs; examples/torch_ddp.py is one that is tested",
    "training.md": "goes on from checkpoints, and loses ranks; its first block is run below",
    "tutorial.md": "programs in files, run below",
}
HERE = ["coming-from.md", "trace.md"]


def test_every_page_with_python_is_run_somewhere() -> None:
    assert {page for page in PAGES if any(b.language == "python" for b in blocks(page))} == {
        *ELSEWHERE,
        *HERE,
    }


@pytest.mark.parametrize("page", HERE)
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(page)


def test_the_training_program_runs(capfd: pytest.CaptureFixture[str]) -> None:
    program = blocks("training.md")[0].text.replace("epochs=5", "epochs=1")
    exec(compile(program, "training.md", "exec"), {"__name__": "training.md"})
    assert ("test accuracy" in capfd.readouterr().out) == (MPI.COMM_WORLD.rank == 0)


def test_the_programs_of_the_tutorial_print_what_it_shows(capfd: pytest.CaptureFixture[str]) -> None:
    first, more = (b for b in blocks("tutorial.md") if b.file is not None)
    exec(compile(first.text, "first.py", "exec"), {})
    said = capfd.readouterr().out.strip()
    comm = MPI.COMM_WORLD
    if comm.size == 2:
        assert f"    {said}\n" in (DOCS / "tutorial.md").read_text(encoding="utf-8")
    exec(compile(more.text, "more.py", "exec"), {})
    assert ("algorithm: expected auto or one of ring" in capfd.readouterr().out) == (comm.rank == 0)


def test_the_commands_of_the_tutorial_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On as many ranks as there are, without starting them anew."""
    monkeypatch.chdir(tmp_path)
    lines = [line for line in commands("tutorial.md") if needs_ranks(line) and not line.endswith(".py")]
    training, reading, measuring = (line.split() for line in lines)
    assert training[:6] == ["mpirun", "-np", "2", "python", "-m", "mpicoll.train"]
    assert measuring[:5] == ["mpirun", "-np", "2", "mpicoll", "bench"]
    with mpicoll.Communicator(MPI.COMM_WORLD) as comm:
        assert train.run(comm, training[6:]) == 0
        if comm.rank == 0:
            assert "stragglers" in run_alone(" ".join(reading))
            assert Path("trace.html").stat().st_size
        assert collectives.run(comm, measuring[5:]) == 0
        said = capfd.readouterr().out
        assert ("test accuracy" in said and "native" in said) == (comm.rank == 0)


@pytest.mark.algorithms
def test_the_algorithm_that_is_added_reduces_between_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_circulant(tmp_path, monkeypatch)
    with mpicoll.Communicator(MPI.COMM_WORLD, transport="messages") as comm:
        counts = [3 * rank % 5 for rank in range(comm.size)]  # uneven, and 0
        index = np.arange(sum(counts))
        part = np.full(counts[comm.rank], -7, "i8")
        comm.Reduce_scatter((index + 1) * (comm.rank + 1), part, counts, algorithm="circulant")
        first = sum(counts[: comm.rank])
        weights = comm.size * (comm.size + 1) // 2
        assert part.tolist() == ((index + 1) * weights)[first : first + len(part)].tolist()
