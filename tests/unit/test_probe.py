"""``mpicoll.gpu.probe``: what becomes of the process that sends GPU memory, and what is remembered of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from mpicoll.gpu import driver, probe
from mpicoll.gpu.probe import Verdict
from tests import fake_cuda

CRASH = """
from mpi4py import MPI
bad = [MPI.buffer.fromaddress(64, 4096), MPI.BYTE]
print("sending", flush=True)
MPI.COMM_SELF.Sendrecv(bad, 0, recvbuf=bad, source=0)
"""
MAPS = """
7f-80 r-xp 0 fe:00 1    /lib/libmpi4py_other.so
7f-80 rw-p 0 00:00 0
7f-80 r-xp 0 fe:00 2    /opt/my mpi/lib/libmpi.so.40
7f-80 rw-p 0 fe:00 2    /opt/my mpi/lib/libmpi.so.40
7f-80 r-xp 0 fe:00 3    /opt/ucx/libucp.so.0
7f-80 r-xp 0 fe:00 4    /opt/ucx/libuct.so.0
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An MPI library; verdicts on it are remembered beside it."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    file = tmp_path / "libmpi.so"
    file.touch()
    return str(file)


def answers(monkeypatch: pytest.MonkeyPatch, *verdicts: Verdict) -> None:
    """What the next probes find out."""
    coming = iter(verdicts)
    monkeypatch.setattr(probe, "probe", lambda: next(coming))


def test_loaded_libraries() -> None:
    assert probe.loaded(probe.MPI_FILE, MAPS) == ["/opt/my mpi/lib/libmpi.so.40"]
    assert probe.loaded(probe.NETWORK_FILE, MAPS) == ["/opt/ucx/libucp.so.0"]
    assert probe.loaded(probe.MPI_FILE, "7f-80 r-xp 0 fe:00 1   /lib/libc.so.6") == []


def test_crash_of_the_probe_stays_there() -> None:
    verdict = probe.probe(CRASH)
    assert verdict.aware is False
    assert "crashed" in verdict.how


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
    verdict = probe.verdict_on(status, output, errors)
    assert verdict.aware is aware
    assert how in verdict.how


def test_probe_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PROBE_LIMIT", 0.5)
    assert probe.probe("import time; time.sleep(60)").aware is False


def test_verdict_is_remembered(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    answers(monkeypatch, Verdict(True, "first"), Verdict(False, "second"), Verdict(True, "third"))
    assert probe.cached_probe([library]) == Verdict(True, "first")
    again = probe.cached_probe([library])
    assert again.aware is True
    assert again.how.startswith("first; remembered in ")
    os.utime(library, (1, 1))  # another build
    assert probe.cached_probe([library]).how == "second"
    assert probe.cached_probe([library], [__file__]).how == "third", "sent through another library"


@pytest.mark.parametrize("remains", ["", "{", "[]", '{"aware": true}'])
def test_what_remains_of_a_file(remains: str, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    answers(monkeypatch, Verdict(True, "first"), Verdict(False, "second"))
    probe.cached_probe([library])
    (file,) = (Path(library).parent / "mpicoll").iterdir()
    file.write_text(remains)
    assert probe.cached_probe([library]).how == "second"


def test_what_could_not_be_tried_is_tried_again(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    answers(monkeypatch, Verdict(None, "the GPU is another job's"), Verdict(True, "second"))
    assert probe.cached_probe([library]).aware is None
    assert probe.cached_probe([library]) == Verdict(True, "second")


def test_no_place_to_remember(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: f"{library}/below a file")
    answers(monkeypatch, Verdict(True, "asked"), Verdict(True, "asked"))
    assert probe.cached_probe([library]) == probe.cached_probe([library]) == Verdict(True, "asked")


def test_unknown_libraries_are_not_remembered(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    answers(monkeypatch, Verdict(True, "first"), Verdict(True, "second"))
    assert [probe.cached_probe([]).how, probe.cached_probe([]).how] == ["first", "second"]


def test_what_a_verdict_holds_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [__file__, probe.__file__]
    plain = probe.build_key(files, {})
    assert probe.build_key(files, {"OMPI_MCA_initial_wdir": "/tmp", "HOME": "/"}) == plain
    version = tmp_path / "version"
    version.write_text("NVRM 580")
    monkeypatch.setattr(probe, "DRIVER_VERSION", version)
    keys = [
        plain,
        probe.build_key(files, {}),
        probe.build_key(files, {"OMPI_MCA_pml": "ucx"}),
        probe.build_key(files[:1], {}),
    ]
    assert len(set(keys)) == len(keys)


def test_seeing_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for ngpus in (0, 1):
        gpu = driver.Driver(fake_cuda.FakeLibrary(ngpus))
        monkeypatch.setattr(driver, "driver", lambda gpu=gpu: gpu)
        assert probe.sees_gpu() is (ngpus > 0)


def test_without_a_driver_no_gpu_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-of-nobody.so")
    monkeypatch.setattr(driver, "driver", driver.Driver)
    assert not probe.sees_gpu()


def test_a_verdict_that_cannot_be_had_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Verdict:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(probe, "cached_probe", fail)
    verdict = probe.verdict_here()
    assert verdict.aware is None
    assert verdict.how.endswith("Cannot allocate memory")


def test_the_worst_node_decides() -> None:
    yes, no, unknown = Verdict(True, "right"), Verdict(False, "crashed"), Verdict(None, "busy")
    assert probe.together({}) == probe.NO_GPU
    assert probe.together({"a": no}) == no
    assert probe.together({"a": yes, "b": yes}) == yes
    assert probe.together({"a": yes, "b": unknown}) == Verdict(None, "node b: busy")
    assert probe.together({"a": yes, "b": unknown, "c": no}) == Verdict(False, "node c: crashed")
