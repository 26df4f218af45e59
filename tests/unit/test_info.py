"""``mpicoll info`` without a launcher, and its parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mpicoll import info, launch
from mpicoll.gpu import driver, probe
from tests import fake_cuda


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
    aware = probe.NO_GPU._asdict()
    facts = {"mpi": {"error": "none"}, "ranks": ranks, "transport": "none", "gpu_transport": "none"}
    facts |= {"cuda_aware": aware, "tuning": "none"}
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


def test_gpus_are_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = driver.Driver(fake_cuda.FakeLibrary(ndevices=2, memory=3 << 30))
    monkeypatch.setattr(driver, "driver", lambda: gpus)
    facts = info.rank_facts()
    assert facts["gpus_looked_for"] == "libcuda.so.1"
    assert [gpu["pci"] for gpu in facts["gpus"]] == ["0000:00:00.0", "0000:01:00.0"]
    assert info.gpu_text(facts).endswith(", Fake GPU 3.0 GiB at 0000:01:00.0")


def test_settings_are_commands_of_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"LD_LIBRARY_PATH": "/my env/lib:/b", "LIST": "A;B"}
    monkeypatch.setattr(launch, "cuda_settings", lambda: settings)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    text = CliRunner().invoke(info.command, ["--env"]).stdout
    shown = ["sh", "-c", f'{text}printf "%s|%s" "$LD_LIBRARY_PATH" "$LIST"']
    assert subprocess.run(shown, capture_output=True, text=True, timeout=60).stdout == "/my env/lib:/b|A;B"
    assert json.loads(CliRunner().invoke(info.command, ["--env", "--json"]).stdout) == settings


def test_settings_of_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, str]:
        raise launch.LauncherError("no UCX: pip install it")

    monkeypatch.setattr(launch, "cuda_settings", fail)
    result = CliRunner().invoke(info.command, ["--env"])
    assert (result.exit_code, result.stdout) == (1, ""), "nothing that a shell would run"
    assert result.stderr == "Error: no UCX: pip install it\n"


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
