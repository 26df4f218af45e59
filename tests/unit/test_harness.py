"""The test harness itself: what happens when an MPI test hangs, fails on one rank, or never runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from mpicoll import launch
from tests import run

TESTS = Path(__file__).resolve().parents[1]
LIMIT = 60  # seconds for a job that should take five, on a busy machine

Outcome = tuple[int, str]


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., Outcome]:
    """Run the text of a test file under the harness; gives the job's status and what it printed."""

    def run_ranks(text: str, nranks: int = 2, conftest: str = "") -> Outcome:
        package = tmp_path / "tests"
        for name in ("__init__.py", "conftest.py", "mpi/__init__.py", "mpi/conftest.py", "mpi/watchdog.py"):
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TESTS / name, package / name)
        case = package / "mpi" / "case"
        case.mkdir()
        (case / "conftest.py").write_text(textwrap.dedent(conftest))
        (case / "test_case.py").write_text(
            "from mpi4py import MPI\nimport pytest\ncomm = MPI.COMM_WORLD\n" + textwrap.dedent(text)
        )
        options = ["-q", "--color=no", "--with-mpi", "-p", "no:cacheprovider"]
        settings = ["-c", str(TESTS.parent / "pyproject.toml")]
        line = launch.command(nranks, [sys.executable, "-m", "pytest", *options, *settings, str(case)])
        # Not into the record of the run that this test is part of.
        environment = {**launch.environment(line[0]), "MPICOLL_TEST_RECORD": ""}
        job = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment
        )
        with job:
            try:
                output, _ = job.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                job.terminate()  # the launcher ends its ranks
                raise
        return job.returncode, output

    try:
        launch.find_mpirun()
    except launch.LauncherError as error:
        pytest.skip(str(error))
    return run_ranks


def test_passing_tests_end_well(run_ranks: Callable[..., Outcome]) -> None:
    status, output = run_ranks(
        """
        @pytest.mark.parametrize("n", range(50))
        def test_sum(n):
            assert comm.allreduce(n + comm.rank) == n * comm.size + 1
        """
    )
    assert status == 0
    assert output.count("50 passed") == 1, "only rank 0 prints"


def test_hang_names_every_rank(run_ranks: Callable[..., Outcome]) -> None:
    status, output = run_ranks(
        """
        @pytest.mark.deadline(1)
        def test_hang():
            if comm.rank == 0:
                comm.Barrier()  # rank 1 never comes
        """
    )
    assert status != 0
    for rank in (0, 1):
        assert re.search(rf"rank {rank} of 2 was here in test .*test_hang:\n.*most recent call first", output)
    assert re.search(r'test_case.py", line \d+ in test_hang', output)
    assert "in wait_for_other_ranks" in output, "where rank 1 is"


def test_hang_in_c_is_seen(run_ranks: Callable[..., Outcome]) -> None:
    status, output = run_ranks(
        """
        import itertools

        @pytest.mark.deadline(1)
        def test_endless_sum():
            sum(itertools.repeat(0))  # never lets go of Python's lock, never looks at signals
        """
    )
    assert status != 0
    assert all(f"rank {rank} of 2 was here in test" in output for rank in (0, 1))
    assert len(re.findall(r'test_case.py", line \d+ in test_endless_sum', output)) == 2


def test_late_end_of_a_test_is_no_success(run_ranks: Callable[..., Outcome]) -> None:
    status, _ = run_ranks(
        """
        import ctypes

        @pytest.mark.deadline(1)
        def test_interrupted():
            ctypes.PyDLL(None).pause()  # comes back when the watchdog's signal arrives
        """
    )
    assert status != 0


def test_failure_on_one_rank_ends_the_job(run_ranks: Callable[..., Outcome]) -> None:
    start = time.monotonic()
    status, output = run_ranks(
        """
        def test_one_fails():
            print("seen before")
            assert comm.rank != 1, "planted"
            comm.Barrier()
        """
    )
    assert status != 0
    assert "rank 1 of 2: " in output
    assert "AssertionError: planted" in output
    assert "seen before" in output
    assert "was here" not in output, "no deadline was needed"
    assert time.monotonic() - start < LIMIT / 2


def test_failure_of_a_property_on_one_rank_ends_the_job(run_ranks: Callable[..., Outcome]) -> None:
    status, output = run_ranks(
        """
        from hypothesis import given, strategies

        @given(n=strategies.integers(0, 100))
        def test_property(n):
            assert comm.allreduce(n) == 2 * n
            assert comm.rank == 0 or n < 50
        """
    )
    assert status != 0
    assert re.search(r"rank 1 of 2: test_property with {'n': \d+} failed", output)
    assert "was here" not in output


def test_ranks_that_draw_different_examples(run_ranks: Callable[..., Outcome]) -> None:
    status, output = run_ranks(
        """
        from hypothesis import given, strategies

        @given(strategies.integers(0, 1000 + comm.rank * 100000))
        def test_property(n):
            pass
        """
    )
    assert status != 0
    assert "the ranks drew different examples" in output


def test_ranks_that_have_imported_different_modules_draw_the_same_examples(
    run_ranks: Callable[..., Outcome],
) -> None:
    """Hypothesis tries the numbers that stand in a project's modules."""
    status, output = run_ranks(
        """
        from hypothesis import given, settings, strategies

        def test_import():
            if comm.rank == 1:
                import mpicoll.draw.figure, mpicoll.exchange.msccl, mpicoll.simulate.training

        @settings(max_examples=500)
        @given(strategies.integers(0, 10**6), strategies.integers(0, 10**6))
        def test_property(a, b):
            pass
        """
    )
    assert status == 0, output


def test_ranks_that_collect_different_tests(run_ranks: Callable[..., Outcome]) -> None:
    status, output = run_ranks(
        """
        if comm.rank == 1:
            raise ValueError("planted")

        def test_something():
            pass
        """
    )
    assert status != 0
    assert "the ranks collected different tests" in output
    assert "ValueError: planted" in output


def test_status_of_any_rank_is_the_status_of_the_job(run_ranks: Callable[..., Outcome]) -> None:
    status, output = run_ranks(
        "def test_something(): pass",
        conftest="""
        from mpi4py import MPI

        def pytest_sessionfinish(session):
            session.exitstatus = 4 * MPI.COMM_WORLD.rank
        """,
    )
    assert "1 passed" in output
    assert status != 0


def test_one_rank_fails_like_plain_pytest(run_ranks: Callable[..., Outcome]) -> None:
    status, output = run_ranks("def test_a(): assert False\ndef test_b(): pass", nranks=1)
    assert status != 0
    assert "1 failed, 1 passed" in output


def test_runner_stops_what_takes_too_long(tmp_path: Path) -> None:
    survivor = tmp_path / "survivor"
    job = run.Launch("sleep", ["sh", "-c", f"(sleep 3; touch {survivor}) & sleep 60"])
    start = time.monotonic()
    assert run.run(job, limit=0.5).counts == Counter(failed=1)
    assert time.monotonic() - start < 30
    time.sleep(3.5)
    assert not survivor.exists(), "the whole process group ends"


def test_runner_gives_launchers_a_directory_of_their_own(tmp_path: Path) -> None:
    told = tmp_path / "told"
    code = f"import os; open({str(told)!r}, 'w').write(os.environ['PRTE_MCA_prte_tmpdir_base'])"
    run.run(run.Launch("one that is told where", [sys.executable, "-c", code]), limit=LIMIT)
    directory = Path(told.read_text())
    assert directory.is_absolute()
    assert not directory.exists()  # any more


def test_runner_counts_a_crash_as_a_failure() -> None:
    assert run.run(run.Launch("crash", ["sh", "-c", "exit 3"]), limit=10).counts["failed"] == 1


def test_runner_counts_nothing_selected_as_nothing() -> None:
    assert run.run(run.Launch("nothing", ["sh", "-c", "exit 5"]), limit=10).counts["failed"] == 0


def test_runner_says_at_the_end_what_failed(tmp_path: Path) -> None:
    """Where only the end of a long output is kept, it is enough to know what to mend."""
    tests = tmp_path / "test_planted.py"
    more = "".join(f"def test_{n}(): pass\n" for n in range(30))
    tests.write_text(f"def test_planted(): assert 1 == 2\n{more}")
    shutil.copy(TESTS / "conftest.py", tmp_path / "conftest.py")
    line = [sys.executable, str(TESTS / "run.py"), "--only", "hosts", "--", str(tests)]
    environment = launch.environment(line[0])
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, env=environment)
    assert done.returncode == 1
    once, again, end = re.split("=== tests/hosts failed, and printed last:\n|\n=== in all\n", done.stdout)
    assert "assert 1 == 2" in once and "assert 1 == 2" in again
    assert re.search(r"tests/hosts +30 passed, 1 failed .*\n    failed: .*test_planted\n", end)


def test_runner_does_not_wait_for_a_survivor_that_holds_its_output(capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    result = run.run(run.Launch("survivor", ["sh", "-c", "echo said; setsid sleep 30 & exit 3"]), limit=20)
    assert result.last_words == "said\n"
    assert time.monotonic() - start < 25
    assert "said" in capfd.readouterr().out


def test_outcome_is_the_worst_of_all_ranks() -> None:
    record = "skipped a[x y]\npassed a[x y]\npassed b\nfailed b\nskipped c\npassed b\n"
    assert run.outcomes(record) == {"a[x y]": "passed", "b": "failed", "c": "skipped"}


@pytest.mark.parametrize(
    ("counts", "line"),
    [({"passed": 3}, "3 passed, 0 failed"), ({"failed": 1, "skipped": 2}, "0 passed, 1 failed, 2 skipped")],
)
def test_summary(counts: dict[str, int], line: str) -> None:
    assert run.summary(Counter(counts)) == line


def test_many_ranks_run_what_depends_on_their_number() -> None:
    *_, three, four = run.launches("mpi", run.RANKS[:4], ["-k", "ring"])
    assert "algorithms" not in three.command
    assert four.command[-5:] == ["-m", "algorithms", "tests/mpi", "-k", "ring"]
    assert four.name == "tests/mpi on 4 ranks"


def test_given_tests_replace_all_tests() -> None:
    one = ["tests/unit/test_harness.py::test_summary", "-x"]
    assert run.unless_given("tests/unit", one) == one
    assert run.unless_given("tests/unit", ["-x"]) == ["tests/unit", "-x"]
