"""How MPI tests behave: ``mpirun -np N python -m pytest --with-mpi tests/mpi``.

- Rank 0 prints; the others are silent unless something goes wrong on them.
- All ranks begin a test together, and each test has a deadline (60 s, or ``@pytest.mark.deadline(seconds)``)
  after which every rank says where it is, and the job ends.
- A test that fails on any one of several ranks ends the job at once, so that no rank waits for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import is_hypothesis_test
from hypothesis.errors import HypothesisException

from . import watchdog

HERE = Path(__file__).parent
DEADLINE = 60.0  # seconds; a test that needs longer says so
POLL = 0.0002  # seconds between looks at a barrier: waiting ranks leave the processor to those that work
OTHER_REPORTS = 0.5  # seconds that ranks which fail at the same time get to print, before the job ends


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before pytest makes its terminal reporter, which prints to what is `sys.stdout` then."""
    if config.getoption("with_mpi"):
        config.pluginmanager.register(Rank())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import what has no test to run: many ranks on few cores need long for PyTorch alone."""
    if config.option.markexpr != "algorithms" or collection_path.is_dir():
        return None
    return None if "mark.algorithms" in collection_path.read_text() else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here is an MPI test; pytest-mpi skips those without ``--with-mpi``."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.mpi)


class Rank:
    """What one rank does at each step of a test run."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self.world = MPI.COMM_WORLD
        self.comm = self.world.Dup()  # what tests leave unmatched does not meet the harness
        self.stderr = os.dup(2)  # pytest takes the other one away while a test runs
        self.orders = self.start_watchdog()
        self.collection_errors: list[str] = []
        self.set_deadline(DEADLINE, "the collection of tests")
        if self.comm.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the same)

    def start_watchdog(self) -> int:
        """Start the process that watches this rank; returns the file that takes its orders."""
        self.dump = tempfile.TemporaryFile()  # noqa: SIM115 (as long as this process)
        faulthandler.register(watchdog.SIGNAL, file=self.dump, all_threads=True)
        given = [str(number) for number in (self.comm.rank, self.comm.size, self.dump.fileno())]
        orders, orders_end = os.pipe()
        subprocess.Popen(
            [sys.executable, "-ES", watchdog.__file__, *given], stdin=orders, pass_fds=[self.dump.fileno()]
        )
        os.close(orders)
        return orders_end

    def set_deadline(self, seconds: float, place: str) -> None:
        try:
            os.write(self.orders, f"{seconds} {place}\n".encode())
        except BrokenPipeError:  # too late: this rank's place is being printed, and then it is killed
            time.sleep(10 * watchdog.OTHERS)

    def wait_for_other_ranks(self) -> None:
        barrier = self.comm.Ibarrier()
        while not barrier.Test():
            time.sleep(POLL)

    def say(self, text: str) -> None:
        """Print in one piece, which keeps the ranks' words apart."""
        os.write(self.stderr, f"\nrank {self.comm.rank} of {self.comm.size}: {text.rstrip()}\n".encode())

    def abort(self, text: str) -> NoReturn:
        """Print what went wrong on this rank, and end the job on all of them."""
        self.say(text)
        time.sleep(OTHER_REPORTS)
        self.world.Abort(1)
        raise AssertionError("MPI_Abort came back")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.collection_errors.append(report.longreprtext)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        tests = {id(test): test for test in (getattr(item, "function", None) for item in items)}
        handles = [test.hypothesis for test in tests.values() if test and is_hypothesis_test(test)]
        for handle in handles:
            handle.inner_test = self.watched_example(handle.inner_test)

    def watched_example(self, test: Callable[..., None]) -> Callable[..., None]:
        """The body of a property test, whose failure must not reach hypothesis on one rank of several.

        Hypothesis would run it again, with smaller examples, and the other ranks would not.
        """

        @functools.wraps(test)
        def run(*args: Any, **drawn: Any) -> None:
            example = f"{test.__qualname__} with {drawn}"
            if len(set(self.comm.allgather(example))) > 1:
                self.abort(f"the ranks drew different examples, this one {example}")
            try:
                test(*args, **drawn)
            except HypothesisException:  # the example does not count
                raise
            except (Exception, pytest.fail.Exception):
                if self.comm.size == 1:
                    raise
                self.abort(f"{example} failed\n{traceback.format_exc()}")

        return run

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Ranks that run different tests would wait for each other in the wrong ones."""
        found = ([item.nodeid for item in session.items], self.collection_errors)
        if all(other == found for other in self.comm.allgather(found)):
            return
        if self.comm.rank and self.collection_errors:
            self.say("\n".join(self.collection_errors))
        pytest.exit("the ranks collected different tests", returncode=1)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """The previous deadline holds until every rank is here: then all ranks' deadlines begin together."""
        self.wait_for_other_ranks()
        marker = item.get_closest_marker("deadline")
        self.set_deadline(marker.args[0] if marker else DEADLINE, f"test {item.nodeid}")
        if is_hypothesis_test(getattr(item, "function", None)):
            self.import_alike()
        return (yield)

    def import_alike(self) -> None:
        """Hypothesis tries numbers that stand in a project's modules, so all ranks import the same."""
        own = {name for name in sys.modules if name.partition(".")[0] in ("mpicoll", "tests")}
        for name in sorted(set().union(*self.comm.allgather(own)) - own):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.comm.size > 1:
            captured = [f"-- {title} --\n{text}" for title, text in report.sections]
            lines = [f"{report.nodeid} failed ({report.when})", report.longreprtext, *captured]
            self.abort("\n".join(lines))

    def pytest_internalerror(self, excrepr: object) -> None:
        if self.comm.size > 1:
            self.abort(f"pytest itself failed\n{excrepr}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """The last test's deadline holds until every rank is here; ending MPI has a deadline as well."""
        self.wait_for_other_ranks()
        self.set_deadline(DEADLINE, "the end of the run")
