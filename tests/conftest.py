"""What all tests share: reproducible property tests, and a record of outcomes for ``tests/run.py``."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every rank and in every run: ranks that draw different ones would wait for each other.
# A slow machine is no reason to fail.
settings.register_profile(
    "mpicoll", derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("mpicoll")

RECORD = os.environ.get("MPICOLL_TEST_RECORD")
os.environ["MPICOLL_TUNING"] = "off"  # what somebody has measured on this machine is no part of a test


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append what came of a test to the record: its summary survives a job that is aborted."""
    decides = report.when == "call" or report.outcome != "passed"
    if RECORD and decides:
        with open(RECORD, "a") as record:
            record.write(f"{report.outcome} {report.nodeid}\n")
