"""A short form of ``mpicoll.bench.stress`` on two hosts: random calls are right, and leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .rig import Rig

SHAPE = (2, 1)
LIMIT = 90.0  # seconds
OPTIONS = "--random-calls 600 --warm-up 200 --calls 2000 --seed 9 --largest 65536 --json"


def test_random_calls(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    with Rig(len(SHAPE)) as rig:
        program = [sys.executable, "-m", "mpicoll.bench.stress", *OPTIONS.split(), str(file)]
        done = rig.run(SHAPE, program, LIMIT)
        assert done.returncode == 0, done.stdout
        left = [
            subprocess.check_output(rig.on(host, ["ls", "/dev/shm"]), timeout=LIMIT) for host in rig.hosts
        ]
    assert left == [b""] * len(SHAPE)
    report = json.loads(file.read_text())
    assert (report["ranks"], report["random_calls"], report["small_calls"]) == (3, 608, 2000)
    assert [*map(set, report["holdings"])] == [{"before", "after"}] * 3
