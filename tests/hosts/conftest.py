"""Tests on several hosts, which this machine pretends to be; skipped where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from .rig import Rig

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session", autouse=True)
def possible() -> None:
    reason = Rig.reason()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``python -m tests.hosts.PROGRAM`` works."""
    monkeypatch.chdir(ROOT)
