"""Ranks that wait in vain are told why, however their collectives travel; those that wait long are not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from mpicoll.bench import mismatch_cases, mismatch_runs
from mpicoll.bench.mismatch_cases import ranks_named

import mpicoll
from mpicoll import watch
from mpicoll.faults import FAULTS, DeadlineError, MismatchError, RankFailedError

from .examples import data, total
from .test_hierarchical import TWO, has_several_nodes
from .test_hierarchical import communicator as on_nodes
from .test_interrupt import DELAY, interrupt_soon

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
ODD = SIZE - 1  # the rank that does something else
TIMEOUT = 0.4  # seconds
PROMPT = 5.0  # seconds within which all ranks know; it takes a tenth of one where the machine is idle

pytestmark = pytest.mark.skipif(SIZE == 1, reason="needs another rank")
TRANSPORTS = ["messages", "auto", *(["hierarchical"] if has_several_nodes(TWO) else [])]
transports = pytest.mark.parametrize("transport", TRANSPORTS)

Comm = mpicoll.Communicator
Do = Callable[[Comm], Any]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask soon: these tests have other things to do than to wait."""
    monkeypatch.setattr(watch, "FIRST_LOOK", 0.03)
    monkeypatch.setattr(watch, "SETTLED", 0.1)


def communicator(transport: str, **more: Any) -> Comm:
    if transport == "hierarchical":
        return on_nodes(TWO, algorithm="hierarchical", **more)
    return Comm(WORLD, transport=transport, **more)


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Comm]]:
    """Makes a communicator, and another of the same ranks before anything goes wrong: it must then work."""
    made: list[Comm] = []

    def make(transport: str, **more: Any) -> Comm:
        comm = communicator(transport, **more)
        made.extend((comm, communicator(transport) if transport == "hierarchical" else comm.Dup()))
        return comm

    yield make
    for comm, duplicate in zip(made[::2], made[1::2], strict=True):
        check_sums(duplicate)
        duplicate.Free()
        comm.timeout = 60  # it may be short, and all wait for each other here
        comm.Free()


def check_sums(comm: Comm, count: int = 37) -> None:
    sums = np.zeros(count, np.int64)
    comm.Allreduce(data(RANK, count), sums)
    np.testing.assert_array_equal(sums, total(SIZE, count))


def wait_for_all(pause: float = 0.01) -> None:
    """Until all ranks are here, with MPI's own means and without a word to anybody."""
    barrier = MPI.Intracomm(WORLD).Ibarrier()
    while not barrier.Test():
        time.sleep(pause)


# -- different calls


def allreduce(count: int = 5, dtype: str = "f4", op: MPI.Op = MPI.SUM, **more: Any) -> Do:
    return lambda comm: comm.Allreduce(np.ones(count, dtype), np.zeros(count, dtype), op, **more)


def reduce(root: int) -> Do:
    return lambda comm: comm.Reduce(np.ones(5), np.zeros(5), root=root)


def bcast(count: int, root: int = 0) -> Do:
    return lambda comm: comm.Bcast(np.ones(count), root)


def barrier(comm: Comm) -> None:
    comm.Barrier()


def in_order(*calls: Do) -> Do:
    return lambda comm: [call(comm) for call in calls]


def nonblocking(count: int) -> Do:
    return lambda comm: comm.Iallreduce(np.ones(count), np.zeros(count)).Wait()


def through_mpi(count: int) -> Do:
    """MPI's own function waits, while a thread of ours works; then the error waits for the next call."""
    return lambda comm: MPI.Request.Waitall([comm.Iallreduce(np.ones(count), np.zeros(count))])


def polled(count: int) -> Do:
    def test(comm: Comm) -> None:
        request = comm.Iallreduce(np.ones(count), np.zeros(count))
        while not request.Test():
            time.sleep(0.001)

    return test


def persistent(count: int, finish: str) -> Do:
    def run(comm: Comm) -> None:
        call = comm.Allreduce_init(np.ones(count), np.zeros(count))
        call.Start()
        if finish == "Wait":
            call.Wait()
        elif finish == "Waitall":
            call.Waitall([call])
        while not call.Test():
            time.sleep(0.001)

    return run


MISMATCHES: dict[str, tuple[Do, Do, str, str]] = {
    "collective": (allreduce(), bcast(5), "Allreduce(float32[5], SUM)", "Bcast(40 bytes, root=0)"),
    "count": (allreduce(5), allreduce(6), "Allreduce(float32[5], SUM)", "Allreduce(float32[6], SUM)"),
    "large count": (
        allreduce(70_000),
        allreduce(70_001),
        "Allreduce(float32[70000], SUM)",
        "Allreduce(float32[70001], SUM)",
    ),
    "dtype": (allreduce(), allreduce(dtype="i4"), "Allreduce(float32[5], SUM)", "Allreduce(int32[5], SUM)"),
    "operation": (
        allreduce(),
        allreduce(op=MPI.MAX),
        "Allreduce(float32[5], SUM)",
        "Allreduce(float32[5], MAX)",
    ),
    "root": (reduce(0), reduce(1), "Reduce(float64[5], SUM, root=0)", "Reduce(float64[5], SUM, root=1)"),
    "two roots": (  # which both only send, and leave
        bcast(5),
        bcast(5, root=ODD),
        "Bcast(40 bytes, root=0)",
        f"Bcast(40 bytes, root={ODD})",
    ),
    "order": (
        in_order(allreduce(), barrier),
        in_order(barrier, allreduce()),
        "Allreduce(float32[5], SUM)",
        "Barrier()",
    ),
    "skipped": (
        in_order(allreduce(), bcast(5)),
        bcast(5),
        "Allreduce(float32[5], SUM)",
        "Bcast(40 bytes, root=0)",
    ),
    "nonblocking": (
        nonblocking(5),
        nonblocking(6),
        "Allreduce(float64[5], SUM)",
        "Allreduce(float64[6], SUM)",
    ),
    "nonblocking, MPI waits": (
        through_mpi(5),
        through_mpi(6),
        "Allreduce(float64[5], SUM)",
        "Allreduce(float64[6], SUM)",
    ),
    "nonblocking, tested": (polled(5), polled(6), "Allreduce(float64[5], SUM)", "Allreduce(float64[6], SUM)"),
    "persistent": (
        persistent(5, "Wait"),
        persistent(6, "Wait"),
        "Allreduce(float64[5], SUM)",
        "Allreduce(float64[6], SUM)",
    ),
    "persistent, tested": (
        persistent(5, "Test"),
        persistent(6, "Test"),
        "Allreduce(float64[5], SUM)",
        "Allreduce(float64[6], SUM)",
    ),
    "persistent, many": (
        persistent(5, "Waitall"),
        persistent(6, "Waitall"),
        "Allreduce(float64[5], SUM)",
        "Allreduce(float64[6], SUM)",
    ),
}


# Nonblocking calls always travel in messages.
CASES = [
    (what, transport)
    for what in MISMATCHES
    for transport in TRANSPORTS
    if transport == "messages" or not what.startswith("nonblocking")
]


@pytest.mark.parametrize(("what", "transport"), CASES)
def test_ranks_in_different_calls_are_told(make: Callable[..., Comm], what: str, transport: str) -> None:
    usual, other, usual_text, other_text = MISMATCHES[what]
    comm = make(transport)
    start = time.monotonic()
    with pytest.raises(MismatchError, match="the ranks are in different calls") as caught:
        in_order(other if RANK == ODD else usual, barrier)(comm)  # who only sends may leave the first
    assert time.monotonic() - start < PROMPT
    text = str(caught.value)
    assert ranks_named(text) == list(range(SIZE)), text
    for expected in (usual_text, other_text):
        # Of a persistent call, what has prepared it may be found to differ first.
        prepared = expected.replace("(", "_init(", 1)
        assert expected in text or (what.startswith("persistent") and prepared in text), text
    assert len(re.findall(r" at test_watch.py:\d+ in \S+", text)) == text.count(";") + 1, text
    if transport != "auto":
        check_broken(comm, MismatchError)
    elif "persistent" not in what:  # those have memory of their own, and nothing else is broken with it
        with pytest.raises(FAULTS):
            comm.Barrier()


@transports
@pytest.mark.parametrize("then", [barrier, bcast(5)], ids=["barrier", "bcast"])
def test_a_rank_that_makes_no_persistent_call_is_told(
    make: Callable[..., Comm], transport: str, then: Do, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "DEADLOCKED", 0.3)
    comm = make(transport)
    with pytest.raises(MismatchError, match="different calls") as caught:
        in_order(then if RANK == ODD else persistent(5, "Wait"), then, barrier)(comm)
    text = str(caught.value)
    assert ranks_named(text) == list(range(SIZE)), text
    assert "Allreduce_init(float64[5], SUM)" in text, text
    assert ("Barrier()" if then is barrier else "Bcast(40 bytes, root=0)") in text, text


@transports
def test_a_rank_that_does_not_free_is_told(
    make: Callable[..., Comm], transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "DEADLOCKED", 0.3)
    comm = make(transport)
    with pytest.raises(MismatchError) as caught:
        in_order(barrier if RANK == ODD else Comm.Free, barrier)(comm)
    assert "in Free()" in str(caught.value) and "in Barrier()" in str(caught.value)


def check_broken(comm: Comm, error: type[Exception]) -> None:
    """Every further call is an error, also those that do not travel as the one that failed."""
    objects: Do = lambda comm: comm.allgather(RANK)  # noqa: E731
    for call in (barrier, allreduce(), bcast(70_000), nonblocking(5), Comm.Dup, objects):
        with pytest.raises(error):
            call(comm)


def test_what_is_found_in_messages_holds_in_shared_memory(make: Callable[..., Comm]) -> None:
    comm = make("auto")
    with pytest.raises(MismatchError):
        nonblocking(5 + (RANK == ODD))(comm)
    check_broken(comm, MismatchError)


def test_algorithms_are_a_part_of_a_call_in_messages(make: Callable[..., Comm]) -> None:
    """Their messages would meet otherwise, with other contents."""
    comm = make("messages")
    with pytest.raises(MismatchError) as caught:
        allreduce(algorithm="ring" if RANK == ODD else "recursive_doubling")(comm)
    text = str(caught.value)
    assert f"rank {ODD} in Allreduce(float32[5], SUM) by ring at" in text
    assert "in Allreduce(float32[5], SUM) by recursive_doubling at" in text


@pytest.mark.parametrize("known", [False, True])
def test_calls_in_which_all_ranks_only_send_are_told_by_the_next(
    make: Callable[..., Comm], known: bool
) -> None:
    comm = make("messages")
    values = np.zeros(5)
    for root in range(SIZE) if known else ():
        comm.Bcast(values, root=root)
        comm.Bcast(values, root=root)
    comm.Bcast(values, root=RANK)
    with pytest.raises(MismatchError, match="Bcast"):
        comm.Barrier()


def test_a_request_that_nobody_waits_for_is_watched(make: Callable[..., Comm]) -> None:
    comm = make("messages")
    request = comm.Iallreduce(np.ones(5 + RANK), np.zeros(5 + RANK))
    until = time.monotonic() + PROMPT
    while comm._watch.failure is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    with pytest.raises(MismatchError):
        comm.Barrier()
    with pytest.raises(MismatchError):
        request.Wait()


# -- a rank that does not come


def skip_and_compute(comm: Comm) -> None:
    wait_for_all()


@transports
def test_a_rank_that_computes_too_long(make: Callable[..., Comm], transport: str) -> None:
    comm = make(transport, timeout=TIMEOUT)
    start = time.monotonic()
    if RANK == ODD:
        skip_and_compute(comm)
    else:
        with pytest.raises(DeadlineError) as caught:
            allreduce()(comm)
        text = str(caught.value)
        assert TIMEOUT <= time.monotonic() - start < TIMEOUT + PROMPT
        assert re.match(r"no progress for [\d.]+ s \(MPICOLL_TIMEOUT=0\.4\): ", text)
        assert ranks_named(text) == list(range(SIZE)), text
        assert re.search(rf"rank {ODD} in no collective, at test_watch.py:\d+ in wait_for_all", text), text
        assert re.search(r"in Allreduce\(float32\[5\], SUM\) at test_watch.py:\d+ in <lambda>", text), text
        wait_for_all()
    with pytest.raises(DeadlineError):
        comm.Barrier()


def test_a_part_of_a_communicator_waits_for_its_own_ranks(make: Callable[..., Comm]) -> None:
    """What has befallen a part is no business of the whole."""
    comm = make("messages", timeout=TIMEOUT)
    part = comm.Split(RANK == 0)
    if RANK == ODD:
        wait_for_all()
    elif part.size > 1:
        with pytest.raises(DeadlineError) as caught:
            part.Barrier()
        assert ranks_named(str(caught.value)) == list(range(SIZE - 1))
        wait_for_all()
    else:
        part.Barrier()
        wait_for_all()
    check_sums(comm)


@transports
def test_a_late_rank_does_no_harm(make: Callable[..., Comm], transport: str) -> None:
    """Many waits, each with some looks at the others, do not add up to a long one."""
    comm = make(transport, timeout=0.8)
    start = time.monotonic()
    for turn in range(5):
        if turn % SIZE == RANK:
            time.sleep(0.2)
        check_sums(comm, 37 + turn)
    assert time.monotonic() - start > 0.8


def test_progress_is_no_stall(make: Callable[..., Comm]) -> None:
    """One call that takes longer than the timeout, a bit at a time."""
    comm = make("auto", timeout=1.0)
    count = 2_000_000
    values, sums = data(RANK, count), np.zeros(count, np.int64)
    call = comm.Allreduce_init(values, sums)
    start = time.monotonic()
    call.Start()
    if RANK == ODD:
        while not call.Test():
            time.sleep(0.2)
    call.Wait()
    np.testing.assert_array_equal(sums, total(SIZE, count))
    assert time.monotonic() - start > 1.0


@transports
def test_the_job_hears_of_a_stall(
    make: Callable[..., Comm],
    transport: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(watch, "STALLED", 0.2)
    comm = make(transport)
    if RANK == ODD:
        time.sleep(0.8)
    check_sums(comm)
    said = capfd.readouterr().err
    everywhere = WORLD.allgather(said)
    assert not everywhere[ODD]
    notices = [text for text in everywhere if text]
    assert notices
    for text in notices:
        assert text.count("mpicoll: no progress for 0 s: ") == 1, "once in a call"
        assert f"rank {ODD} in no collective, at test_watch.py:" in text
        assert "in Allreduce(int64[37], SUM) at test_watch.py:" in text
        assert ranks_named(text) == list(range(SIZE))


# -- a rank that leaves


@transports
def test_who_leaves_the_block_with_an_exception_is_not_waited_for(transport: str) -> None:
    comm = communicator(transport)
    wait_for_all()
    if RANK == ODD:
        with pytest.raises(ValueError, match="no more data"), comm:
            raise ValueError("no more data")
    else:
        start = time.monotonic()
        with pytest.raises(RankFailedError, match="ValueError: no more data") as caught, comm:
            allreduce()(comm)
        assert f"rank {ODD}" in str(caught.value)
        assert caught.value.ranks == (), "it lives on"
        assert time.monotonic() - start < PROMPT
    wait_for_all()


@transports
def test_ctrl_c_in_a_call_is_heard_of(make: Callable[..., Comm], transport: str) -> None:
    """The rank that is interrupted waits, as do the others, for one that comes late."""
    comm = make(transport)
    check_sums(comm)
    if RANK == 0:
        interrupt_soon()
        with pytest.raises(KeyboardInterrupt):
            allreduce(70_000)(comm)
    else:
        if RANK == ODD:
            time.sleep(2 * DELAY)
        with pytest.raises(RankFailedError, match="rank 0 has broken off a collective: KeyboardInterrupt"):
            allreduce(70_000)(comm)
    wait_for_all()
    with pytest.raises(RankFailedError, match=r"KeyboardInterrupt|was broken off"):
        allreduce(70_000)(comm)


@transports
def test_bad_arguments_break_nothing(make: Callable[..., Comm], transport: str) -> None:
    """They are refused on one rank, before anything is sent, and it may come again with better ones."""
    comm = make(transport, timeout=30.0)
    if RANK == ODD:
        with pytest.raises((TypeError, ValueError)):
            comm.Allreduce(np.ones(3), np.zeros(4))
    check_sums(comm)


@pytest.mark.parametrize("method", mismatch_cases.METHODS)
def test_the_benchmark_knows_what_is_right(method: str) -> None:
    """Its calls are no mismatches if all ranks make the same, and it sees data that are wrong."""
    comm = communicator("auto")
    call = mismatch_cases.Call(method, 7, "float64", "MAX", ODD, "blocking")
    case = mismatch_cases.Case(0, "count", "auto", SIZE, 0, (call,), (call,))
    outcome = mismatch_runs.meet(comm, case)
    assert (outcome.error, outcome.returned, outcome.wrong) == ("", 1, 0)
    arguments, target, result = mismatch_runs.prepared(call)
    if target is not None:
        assert result is not None and target.shape == result.shape and target.dtype == result.dtype
        assert len(arguments[0]) and (result != 0).all()
    comm.Free()


def test_faults_are_what_a_watch_finds() -> None:
    assert set(FAULTS) == set(watch.ERRORS.values())


def test_what_a_broken_call_has_sent_reaches_no_later_communicator() -> None:
    """MPI gives the number of a communicator that has been freed to the next one."""
    for _ in range(10):
        comm = Comm(WORLD, transport="messages")
        comm.Alltoall(np.ones(SIZE), np.zeros(SIZE))
        wait_for_all()
        if RANK == ODD:
            with pytest.raises(ZeroDivisionError), comm:
                raise ZeroDivisionError
            wait_for_all()
        else:
            wait_for_all()
            with pytest.raises(RankFailedError), comm:
                comm.Alltoall(np.ones(SIZE), np.zeros(SIZE))  # which sends before it waits
        wait_for_all()
        for color in (RANK, RANK // 2):
            part = MPI.Intracomm(MPI.Intracomm(WORLD).Split(color, -RANK))
            with Comm(part, transport="messages") as again:
                assert again.allreduce(1) == part.Get_size()
                assert part.allreduce(1) == part.Get_size()
            part.Free()


def test_a_program_that_goes_on_beside_a_call_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank waits for a message of another, which waits in a call that is under way beside it."""
    monkeypatch.setattr(watch, "DEADLOCKED", 0.2)
    word = np.zeros(1)
    with Comm(WORLD) as comm:
        if RANK == ODD:
            comm.complete(comm.Irecv(word, source=0, tag=3), "recv", [0])
            request = comm.Iallreduce(np.ones(5), np.zeros(5))
        else:
            request = comm.Iallreduce(np.ones(5), np.zeros(5))
            time.sleep(1.0)  # in which the others ask again and again
        if RANK == 0:
            comm.Send(np.full(1, 7.0), dest=ODD, tag=3)
        request.Wait()
    assert word[0] == (7 if RANK == ODD else 0)


@pytest.mark.parametrize("limit", [0.4, 0.0])
def test_completing_a_request_of_mpis_own(limit: float) -> None:
    """Which nobody answers, in time or ever."""
    comm = Comm(WORLD, transport="messages", timeout=TIMEOUT)
    wait_for_all()
    if RANK == ODD:
        comm.timeout = limit or 60.0
        request = MPI.Intracomm(comm).Irecv(np.zeros(1), source=0, tag=3)
        with pytest.raises(DeadlineError if limit else RankFailedError, match=r"recv of a word|ZeroDivision"):
            comm.complete(request, "recv of a word", [0])
        with pytest.raises(FAULTS):
            comm.Barrier()
    elif RANK == 0 and not limit:
        time.sleep(0.1)
        comm.give_up(ZeroDivisionError("over"))
    wait_for_all()
    with pytest.raises(FAULTS):  # which all have heard of
        comm.Barrier()
    comm.Free()
