"""``mpicoll info`` without a launcher, and its parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mpicoll import info

CRASH = """
from mpi4py import MPI
bad = [MPI.buffer.fromaddress(64, 4096), MPI.BYTE]
print("sending", flush=True)
MPI.COMM_SELF.Sendrecv(bad, 0, recvbuf=bad, source=0)
"""


def facts_of(node: str, **changes: Any) -> info.Facts:
    facts = {
        "node": node,
        "cpu": "A processor",
        "cpus": [0, 1, 2, 3],
        "cpus_of_node": 4,
        "cgroup_cpus": None,
        "dev_shm": {"size": 64 << 20, "free": 32 << 20},
        "gpus": [],
        "gpus_looked_for": "no driver",
    }
    return {**facts, **changes}


def everything(ranks: list[info.Facts], **changes: Any) -> info.Facts:
    facts = {"mpi": {"error": "none"}, "ranks": ranks, "transport": "none", "cuda_aware": info.no_gpu_here()}
    return {**info.software(), **facts, **changes}


def test_command() -> None:
    """In a process of its own: a process that has begun MPI had better not start jobs, as other tests do."""
    program = "from mpicoll.info import command; command()"
    line = [sys.executable, "-c", program]
    text = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "ranks       1 on 1 node" in text
    assert "transport   shared memory (memory files; other ranks' memory is read directly: " in text
    assert len(text.splitlines()) < 25, "one screen"
    output = subprocess.run([*line, "--json"], capture_output=True, text=True, timeout=60, check=True).stdout
    facts = json.loads(output)
    assert facts["packages"]["mpi4py"] in text
    assert Path(facts["mpi"]["file"]).exists()
    assert facts["transport"].startswith("shared memory ")
    assert facts["ranks"][0]["cpus"] == sorted(os.sched_getaffinity(0))


def test_without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    result = CliRunner().invoke(info.command)
    assert result.exit_code == 0
    assert "mpi4py cannot be used" in result.output
    assert "transport   none: there is no MPI" in result.output
    assert "ranks       1 on 1 node" in result.output


def test_loaded_library() -> None:
    maps = (
        "7f-80 r-xp 0 fe:00 1    /lib/libmpi4py_other.so\n"
        "7f-80 rw-p 0 00:00 0 \n"
        "7f-80 r-xp 0 fe:00 2    /opt/my mpi/lib/libmpi.so.40\n"
    )
    assert info.loaded_library(maps) == "/opt/my mpi/lib/libmpi.so.40"
    assert info.loaded_library("7f-80 r-xp 0 fe:00 1   /lib/libc.so.6") is None


def test_crash_of_the_probe_stays_there() -> None:
    answer = info.probe(CRASH)
    assert answer["aware"] is False
    assert "crashed" in answer["how"]


@pytest.mark.parametrize(
    ("status", "output", "errors", "aware", "how"),
    [
        (0, "sending\nsending\nright\n", "", True, "right data"),
        (0, "sending\nwrong\n", "", False, "wrong data"),
        (-signal.SIGSEGV, "sending\n", "noise", False, "crashed (status -11)"),
        (1, "", "Traceback\nOSError: no driver", None, "could not be tried (status 1): OSError: no driver"),
        (1, "", "", None, "no message"),
    ],
)
def test_verdict(status: int, output: str, errors: str, aware: bool | None, how: str) -> None:
    answer = info.verdict(status, output, errors)
    assert answer["aware"] is aware
    assert how in answer["how"]


def test_probe_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "PROBE_LIMIT", 0.5)
    assert info.probe("import time; time.sleep(60)")["aware"] is False


def test_answer_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "libmpi.so"
    library.touch()
    answers = iter([{"aware": True, "how": "first"}, {"aware": False, "how": "second"}])
    monkeypatch.setattr(info, "probe", lambda: next(answers))
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    assert info.cached_probe(str(library)) == {"aware": True, "how": "first"}
    again = info.cached_probe(str(library))
    assert again["aware"] is True
    assert again["how"].startswith("first; remembered in ")
    os.utime(library, (1, 1))  # another build
    assert info.cached_probe(str(library))["how"] == "second"


def test_no_place_to_remember(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "libmpi.so"
    library.touch()
    monkeypatch.setattr(info, "probe", lambda: {"aware": True, "how": "asked"})
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(library / "below a file"))
    assert info.cached_probe(str(library)) == info.cached_probe(str(library)) == info.probe()


def test_settings_are_part_of_the_build(tmp_path: Path) -> None:
    library = str(tmp_path)
    plain = info.build_key(library, {})
    assert info.build_key(library, {"OMPI_MCA_initial_wdir": "/tmp", "HOME": "/"}) == plain
    assert info.build_key(library, {"OMPI_MCA_pml": "ucx"}) != plain


def test_render_groups_ranks_by_node() -> None:
    gpu = {"name": "GPU A", "pci": "0000:01:00.0", "memory": 80 << 30}
    ranks = [
        facts_of("n1", gpus=[gpu]),
        facts_of("n2", cpus=[0, 1], cgroup_cpus=1.5),
        facts_of("n2", cpus=[3], dev_shm=None),
    ]
    text = info.render(everything(ranks, cuda_aware={"aware": True, "how": "seen"}))
    assert "ranks       3 on 2 nodes" in text
    assert "n1: rank 0; A processor" in text
    assert "n2: ranks 1-2; A processor" in text
    assert "0-3 (all, not bound)" in text
    assert "rank 1: 0-1 (bound); rank 2: 3 (bound)" in text
    assert "control group: 1.5 CPUs" in text
    assert "GPU A 80.0 GiB at 0000:01:00.0" in text
    assert "none (no driver)" in text
    assert "CUDA-aware  yes: seen" in text


def test_many_nodes_fit_on_a_screen() -> None:
    text = info.render(everything([facts_of(f"n{index}") for index in range(1000)]))
    assert len(text.splitlines()) < 50
    assert "... and 992 more nodes" in text


@pytest.mark.parametrize(("numbers", "text"), [([0, 1, 2, 8], "0-2,8"), ([5], "5"), ([], "")])
def test_number_list(numbers: list[int], text: str) -> None:
    assert info.number_list(numbers) == text
