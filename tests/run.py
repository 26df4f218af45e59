"""Run all tests: ``python tests/run.py [--only KIND] [--ranks 1,2] [-- PYTEST_ARGUMENT ...]``.

First the tests that need no MPI or start jobs themselves, then those that need it on 1, 2 and 3 ranks, and
those marked ``algorithms`` on 4, 5, 7 and 8; then those on several hosts and under Slurm, which this machine
pretends to be where it allows that. Ends with what failed and what it printed last, with a table of counts,
and with a status other than 0 if anything failed or nothing ran. Needs the standard library and
mpicoll.launch; run it with the Python that the tests are to use.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mpicoll import launch

ROOT = Path(__file__).resolve().parent.parent
RANKS = (1, 2, 3, 4, 5, 7, 8)
EVERY_TEST_UP_TO = 3  # ranks; above, only what depends on the number of ranks
LIMIT = 900.0  # seconds for one launch: an end to what the deadlines of single tests do not catch
DYING = 10.0  # seconds that a launcher gets to end its ranks
LAST_WORDS = 4000  # bytes of what a failed launch printed, to read at the end without looking for them
SEVERITY = ("skipped", "passed", "failed")  # ranks may differ: the last of their outcomes counts


@dataclass(frozen=True)
class Launch:
    """One run of pytest: what it is called, and its command."""

    name: str
    command: list[str]


@dataclass(frozen=True)
class Result:
    """What came of one launch: outcomes counted, the tests that failed, and the end of what it printed."""

    counts: Counter[str]
    failed: list[str]
    last_words: str


def launches(only: str | None, ranks: Sequence[int], extra: Sequence[str]) -> list[Launch]:
    """What to run, in order."""
    pytest = [sys.executable, "-m", "pytest", "-q"]
    mpi = [mpi_launch(nranks, [*pytest, "--with-mpi"], unless_given("tests/mpi", extra)) for nranks in ranks]
    kinds = {"unit": [], "mpi": mpi, "hosts": [], "slurm": []}
    for kind in ("unit", "hosts", "slurm"):
        # Two at once, file by file: many unit tests wait for jobs that they have started.
        workers = ["-n", "2", "--dist", "loadfile"] if kind == "unit" else []
        kinds[kind] = [Launch(f"tests/{kind}", [*pytest, *workers, *unless_given(f"tests/{kind}", extra)])]
    return [job for kind in kinds if only in (None, kind) for job in kinds[kind]]


def unless_given(tests: str, extra: Sequence[str]) -> list[str]:
    """The arguments ``extra``, after ``tests`` if they name no file or directory themselves."""
    given = any((ROOT / argument.partition("::")[0]).exists() for argument in extra)
    return [*extra] if given else [tests, *extra]


def mpi_launch(nranks: int, pytest: Sequence[str], extra: Sequence[str]) -> Launch:
    chosen = [] if nranks <= EVERY_TEST_UP_TO else ["-m", "algorithms"]
    return Launch(f"tests/mpi on {nranks} ranks", launch.command(nranks, [*pytest, *chosen, *extra]))


def run(job: Launch, limit: float) -> Result:
    """Run one launch to its end."""
    print(f"\n=== {job.name}: {shlex.join(job.command)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mpicoll-tests-", ignore_cleanup_errors=True) as directory:
        record = Path(directory, "record")
        record.touch()
        settings = {
            "MPICOLL_TEST_RECORD": str(record),
            "PY_COLORS": str(int(sys.stdout.isatty())),
            # A launcher that was killed leaves ompi.PID behind, and Open MPI's next of that number fails.
            "PRTE_MCA_prte_tmpdir_base": directory,
        }
        environment = {**launch.environment(job.command[0]), **settings}
        status, last_words = run_limited(job.command, environment, limit)
        found = outcomes(record.read_text())
    counts = Counter(found.values())
    nothing_selected = status == 5 and not counts
    if status and not nothing_selected and not counts["failed"]:
        print(f"=== {job.name} ended with status {status}, though no test said that it failed")
        counts["failed"] += 1
    return Result(counts, [test for test in found if found[test] == "failed"], last_words)


def outcomes(record: str) -> dict[str, str]:
    """What came of each test, from the lines that all ranks wrote."""
    found: dict[str, str] = {}
    for line in record.splitlines():
        outcome, test = line.split(" ", 1)
        found[test] = max(outcome, found.get(test, outcome), key=SEVERITY.index)
    return found


def run_limited(command: Sequence[str], environment: dict[str, str], limit: float) -> tuple[int, str]:
    """The command's status and last words; past ``limit`` seconds its whole process group is ended."""
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
    )
    words = bytearray()
    echo = threading.Thread(target=pass_on, args=(process.stdout, words), daemon=True)
    echo.start()
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"=== stopped: not done after {limit:g} s", flush=True)
        status = end(process)
    except KeyboardInterrupt:
        end(process)
        raise
    echo.join(DYING)  # what a survivor still holds open is not waited for
    return status, words[-LAST_WORDS:].decode(errors="replace")


def pass_on(source: BinaryIO, words: bytearray) -> None:
    """Print what comes from ``source`` as it comes, and keep the end of it in ``words``."""
    while piece := source.read(1 << 16):
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        words += piece
        del words[: -2 * LAST_WORDS]


def end(process: subprocess.Popen[bytes]) -> int:
    """End a process group: politely first, so that a launcher can end ranks in groups of their own."""
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(DYING)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() or 1


def summary(counts: Counter[str]) -> str:
    """The line that a run ends with."""
    line = f"{counts['passed']} passed, {counts['failed']} failed"
    return f"{line}, {counts['skipped']} skipped" if counts["skipped"] else line


def rank_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the tests and end with a line of counts.")
    parser.add_argument("--only", choices=["unit", "mpi", "hosts", "slurm"], help="leave the others out")
    parser.add_argument("--ranks", type=rank_list, default=RANKS, help="such as 1,2 (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for each launch")
    parser.add_argument("extra", nargs="*", help="arguments for pytest, after --")
    arguments = parser.parse_args()

    total: Counter[str] = Counter()
    table = []
    failures = []
    for job in launches(arguments.only, arguments.ranks, arguments.extra):
        start = time.monotonic()
        result = run(job, arguments.limit)
        table.append(f"{job.name:24}{summary(result.counts)}  ({time.monotonic() - start:.0f} s)")
        table += [f"    failed: {test}" for test in result.failed]
        if result.counts["failed"]:
            failures += [f"\n=== {job.name} failed, and printed last:", result.last_words.rstrip()]
        total += result.counts
    print(*failures, "\n=== in all", *table, summary(total), sep="\n")
    sys.exit(1 if total["failed"] or not total["passed"] else 0)


if __name__ == "__main__":
    main()
