"""What a rank concludes from where the others are, and how it says so; without other ranks."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll import watch
from mpicoll.faults import DeadlineError, MismatchError, RankFailedError
from mpicoll.watch import (
    ERRORS,
    NUMBER_BITS,
    Doing,
    Failure,
    call_text,
    checked_timeout,
    deadlock,
    grouped,
    judge,
    line_of,
    numbers,
    report,
    timeout_from,
    what,
)
from tests.unit.rank_jobs import needs_launcher, running

F4, F8, I8 = np.dtype("f4"), np.dtype("f8"), np.dtype("i8")


# -- calls in words


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (("allreduce", "ring", F4, 100, "SUM", None), "Allreduce(float32[100], SUM)"),
        (("reduce", "tree", I8, 0, "MAX", 3), "Reduce(int64[0], MAX, root=3)"),
        (("broadcast", "tree", None, 800, "", 1), "Bcast(800 bytes, root=1)"),
        (("barrier", "tree", None, None, "", None), "Barrier()"),
        (("gather", "tree", None, None, "", 2), "Gather(root=2)"),
        (("reduce_scatter", "ring", F8, (3, 0, 5), "AVG", None), "Reduce_scatter(float64[(3, 0, 5)], AVG)"),
    ],
)
def test_a_call_in_words(given: tuple[Any, ...], text: str) -> None:
    assert what(*given).text == text


def test_arguments_that_a_call_does_not_have_are_left_out() -> None:
    assert call_text("allgather", "", "3 bytes", "") == "Allgather(3 bytes)"


def test_fingerprints_differ_with_each_argument() -> None:
    call = ("reduce", "tree", F4, 100, "SUM", 0)
    others = [
        ("gather", "tree", F4, 100, "SUM", 0),
        ("reduce", "direct", F4, 100, "SUM", 0),  # the text has no algorithm, yet messages would not meet
        ("reduce", "tree", I8, 100, "SUM", 0),
        ("reduce", "tree", None, 100, "SUM", 0),
        ("reduce", "tree", F4, 101, "SUM", 0),
        ("reduce", "tree", F4, (50, 50), "SUM", 0),
        ("reduce", "tree", F4, 100, "MAX", 0),
        ("reduce", "tree", F4, 100, "SUM", 1),
    ]
    marks = [what(*arguments).mark for arguments in (call, *others)]
    assert len(set(marks)) == len(marks)
    assert what(*call).mark == marks[0]


def test_a_fingerprint_leaves_room_for_the_number_and_makes_a_valid_tag() -> None:
    bound = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
    assert bound is not None
    marks = [what("allreduce", "ring", F4, count, "SUM", None).mark for count in range(300)]
    assert all(mark % (1 << NUMBER_BITS) == 0 for mark in marks)
    assert max(marks) + (1 << NUMBER_BITS) - 1 <= bound
    assert len(set(marks)) > 280, "they are spread over all values"


# -- ranks in words


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([0, 1], "ranks 0-1"),
        ([0, 1, 2, 5], "ranks 0-2, 5"),
        ([0, 2, 4, 5, 6, 9, 10], "ranks 0, 2, 4-6, 9-10"),
    ],
)
def test_ranks_in_words(ranks: list[int], text: str) -> None:
    assert numbers(ranks) == text


def test_ranks_at_the_same_place_are_named_together_the_odd_ones_first() -> None:
    places = {3: "in A", 0: "in A", 1: "in A", 2: "in B", 5: "has ended"}
    assert grouped(places) == "rank 2 in B; rank 5 has ended; ranks 0-1, 3 in A"


# -- judging

A, B = "Allreduce(float32[3], SUM)", "Bcast(12 bytes, root=0)"


def at(line: int, call: str, number: int = 7, **more: Any) -> Doing:
    return Doing(f"train.py:{line} in step", call, 1.0, {number: call} if call else {}, **more)


def judged(doings: Sequence[Doing], own: int = 0, waits: Sequence[int] = (), settled: bool = True) -> Any:
    return judge(doings, own, waits, settled)


def test_ranks_in_the_same_call_are_waited_for() -> None:
    assert judged([at(1, A), at(2, A), at(3, A)]) is None


def test_a_rank_that_has_not_come_yet_is_waited_for() -> None:
    assert judged([at(1, A), Doing("train.py:9 in load")], waits=[1]) is None
    assert judged([at(1, A), Doing(silence="process 12 on n2 does not answer")], waits=[1]) is None
    assert judged([at(1, A), at(2, B, number=6)], waits=[1]) is None, "it is in an earlier call"


def test_different_calls_of_one_number_are_a_mismatch() -> None:
    failure = judged([at(1, A), at(2, B), at(1, A)], own=2)
    assert (failure.kind, failure.ranks) == ("mismatch", ())
    assert failure.text == (
        f"the ranks are in different calls: rank 1 in {B} at train.py:2 in step; "
        f"ranks 0, 2 in {A} at train.py:1 in step"
    )


def test_a_mismatch_is_found_though_the_other_rank_has_gone_on() -> None:
    """A root of a broadcast may be done when the others find out."""
    gone_on = Doing("train.py:9 in step", A, 1.0, {7: B, 8: A})
    failure = judged([at(1, A), gone_on])
    assert failure.text == (
        f"the ranks are in different calls: rank 0 in {A} at train.py:1 in step; "
        f"rank 1 has been in {B}, is in {A} at train.py:9 in step"
    )
    computing = Doing("train.py:9 in load", "", 0.0, {7: B})
    assert (
        f"rank 1 has been in {B}, is in no collective, at train.py:9 in load"
        in judged([at(1, A), computing]).text
    )


def test_algorithms_are_named_if_nothing_else_differs() -> None:
    ring, tree = (Doing("a.py:1 in f", A, 1.0, {7: f"{A} by {name}"}) for name in ("ring", "tree"))
    assert judged([ring, tree]).text == (
        f"the ranks are in different calls: rank 0 in {A} by ring at a.py:1 in f; "
        f"rank 1 in {A} by tree at a.py:1 in f"
    )
    assert judged([ring, ring]) is None
    other = Doing("a.py:2 in f", B, 1.0, {7: f"{B} by tree"})
    assert " by " not in judged([ring, other]).text


def test_a_mismatch_of_others_alone_is_theirs_to_find() -> None:
    """This rank may not be in that call at all: of a part of the communicator, for one."""
    assert judged([at(1, A, number=3), at(2, B), at(3, A)]) is None


def test_the_first_different_call_counts() -> None:
    """What follows differs because of it."""
    ours, theirs = (
        Doing("a.py:1 in f", B, 1.0, {6: A, 7: A, 8: B}),
        Doing("a.py:2 in f", A, 1.0, {6: A, 7: B, 8: A}),
    )
    assert f"rank 0 has been in {A}, is in {B}" in judged([ours, theirs]).text


def test_only_a_rank_that_is_waited_for_must_be_there() -> None:
    ended = Doing(silence="process 12 on n2 has ended", ended=True)
    assert judged([at(1, A), ended, at(1, A)], waits=[2]) is None
    assert judged([at(1, A), ended], waits=[1], settled=False) is None, "what it has sent may be on its way"
    failure = judged([at(1, A), ended, at(1, A)], waits=[1, 2])
    assert failure == Failure("failed", "rank 1: process 12 on n2 has ended", (1,))


def test_what_another_rank_has_found_counts_before_everything_else() -> None:
    found = Failure("deadline", "no progress", ())
    assert judged([at(1, A), at(2, B), at(1, A, failure=found)], waits=[1]) is found


# -- from one rank to another


def test_all_waiting_for_each_other_in_different_calls_is_a_deadlock() -> None:
    def waiting(call: str, waited: float = 5.0, inside: bool = True) -> Doing:
        return Doing("train.py:9 in step", call, waited, inside=inside)

    failure = deadlock([waiting(A), waiting(B), waiting(A)])
    assert failure is not None and failure.kind == "mismatch"
    assert f"rank 1 in {B} at train.py:9 in step; ranks 0, 2 in {A}" in failure.text
    for other in (waiting(A), waiting(B, 0.5), waiting(B, inside=False), Doing("train.py:2 in load")):
        assert deadlock([waiting(A), other]) is None


def test_what_a_rank_says_of_itself_survives_the_journey() -> None:
    failure = Failure("failed", "rank 1: process 12 on n2 has ended", (1, 3), (("n2", 12), ("n3", 5)))
    doing = Doing("train.py:57 in step", A, 2.5, {7: A, 16384: B}, failure)
    assert Doing.of(json.loads(json.dumps(asdict(doing)))) == doing
    assert Failure.of(json.loads(json.dumps(asdict(failure)))) == failure
    assert Doing.of(json.loads(json.dumps(asdict(Doing("a", "b"))))) == Doing("a", "b")


@pytest.mark.parametrize(
    ("kind", "error"),
    [("failed", RankFailedError), ("mismatch", MismatchError), ("deadline", DeadlineError)],
)
def test_the_error_of_a_failure(kind: str, error: type[Exception]) -> None:
    raised = Failure(kind, "what it was", (1, 2)).error()
    assert type(raised) is error and str(raised) == "what it was"
    assert getattr(raised, "ranks", (1, 2)) == (1, 2)
    assert ERRORS[kind] is error


def test_a_rank_in_words() -> None:
    assert str(at(57, A)) == f"in {A} at train.py:57 in step"
    assert str(Doing("train.py:9 in load")) == "in no collective, at train.py:9 in load"
    assert str(Doing("x", A, silence="process 12 on n2 has ended")) == "process 12 on n2 has ended"


def test_the_report_has_a_line_for_each_rank() -> None:
    row = {"host": "n1", "pid": 12, "call": None, "waited": 0.0, "line": "a.py:1 in f", "silence": None}
    rows = [
        {**row, "rank": 0, "call": A, "waited": 12.34},
        {**row, "rank": 1},
        {**row, "rank": 2, "line": None, "silence": "process 13 on n2 has ended"},
    ]
    assert report(rows).splitlines() == [
        f"rank 0 (n1, process 12): in {A} at a.py:1 in f, waiting for 12.3 s",
        "rank 1 (n1, process 12): in no collective, at a.py:1 in f",
        "rank 2 (n1, process 12): process 13 on n2 has ended",
    ]


# -- how long to wait


@pytest.mark.parametrize(
    ("given", "seconds"), [("30", 30.0), (0.5, 0.5), (7, 7.0), (0, math.inf), ("0", math.inf)]
)
def test_timeouts(given: Any, seconds: float) -> None:
    assert checked_timeout(given, "timeout") == seconds


@pytest.mark.parametrize("given", ["soon", "", -1, "-0.1", math.nan, None, [3]])
def test_what_is_no_timeout_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="timeout: expected seconds, or 0 for no deadline; got ") as caught:
        checked_timeout(given, "timeout")
    assert repr(given) in str(caught.value)


def test_the_timeout_of_the_environment() -> None:
    assert timeout_from({}) == watch.DEFAULT_TIMEOUT
    assert timeout_from({"MPICOLL_TIMEOUT": "2.5"}) == 2.5
    with pytest.raises(ValueError, match="MPICOLL_TIMEOUT: expected seconds"):
        timeout_from({"MPICOLL_TIMEOUT": "2 minutes"})


def test_a_communicator_refuses_what_is_no_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="timeout: expected seconds"):
        mpicoll.Communicator(MPI.COMM_SELF, timeout=-3)
    monkeypatch.setenv("MPICOLL_TIMEOUT", "ten")
    with pytest.raises(ValueError, match=r"MPICOLL_TIMEOUT: expected seconds.* got 'ten'"):
        mpicoll.Communicator(MPI.COMM_SELF)
    mpicoll.Communicator(MPI.COMM_SELF, timeout=1).Free()


# -- where the program is


def test_the_line_is_the_programs() -> None:
    def step() -> str:
        return line_of()

    assert line_of().startswith("test_watch.py:")
    assert line_of().endswith("in test_the_line_is_the_programs")
    assert step().endswith("in step")


def test_the_line_passes_over_libraries_and_the_package() -> None:
    """NumPy calls back here, from a function that the program has called."""
    found: list[str] = []

    def note(row: Any) -> int:
        found.append(line_of())
        found.append(_from_the_package())
        return 0

    np.apply_along_axis(note, 0, np.zeros(1))
    assert len(found) == 2 and all(line.startswith("test_watch.py:") for line in found), found


def _from_the_package() -> str:
    """As if a function of mpicoll asked."""
    globals_: dict[str, Any] = {"line_of": line_of}
    exec(compile("def f():\n    return line_of()", str(watch._PACKAGE / "requests.py"), "exec"), globals_)
    return str(globals_["f"]())


def test_another_threads_line() -> None:
    ready, end, found = threading.Event(), threading.Event(), []

    def wait_in_here() -> None:
        ready.set()
        end.wait()

    thread = threading.Thread(target=wait_in_here)
    thread.start()
    ready.wait()
    found = [line_of(thread.ident), line_of()]
    end.set()
    thread.join()
    assert found[0].endswith("in wait_in_here") and found[1].endswith("in test_another_threads_line")
    assert line_of(thread.ident) == "an unknown place", "it has ended"


# -- a rank whose program has ended, though MPI keeps its process until the others' have, too

ENDS = """
comm = mpicoll.Communicator(MPI.COMM_WORLD, transport={transport!r})
comm.Barrier()
if world == 0:
    sys.exit()
began = time.monotonic()
try:
    {call}
except RankFailedError as error:
    write(f"told {{world}}", [str(error), error.ranks, time.monotonic() - began])
"""


@needs_launcher
@pytest.mark.parametrize(
    ("transport", "call"),
    [
        ("messages", "comm.Allreduce(np.ones(5), np.zeros(5))"),
        ("messages", "MPI.Request.Waitall([comm.Ibarrier()]); comm.Barrier()"),
        ("auto", "comm.Barrier_init()"),  # for which memory is shared anew
    ],
)
def test_a_rank_whose_program_has_ended_is_not_waited_for(tmp_path: Path, transport: str, call: str) -> None:
    with running(tmp_path, 3, ENDS.format(transport=transport, call=call)) as job:
        for rank in (1, 2):
            text, ranks, seconds = job.said(f"told {rank}")
            assert text == f"rank 0: process {job.pid(0)} on {socket.gethostname()} has ended"
            assert ranks == [0]
            assert seconds < 10 * watch.SETTLED
        job.status()
        assert "Traceback" not in job.output()
