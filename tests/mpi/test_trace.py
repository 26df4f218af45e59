"""Traces: which events, with what in them; one clock for all ranks; and nothing of it when it is off."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll import trace
from mpicoll.trace.chrome import COLLECTIVE, COMPUTE, PACK, PROGRAM, WAIT, Event, Trace, read
from mpicoll.trace.recorder import recorded
from mpicoll.trace.summary import summarise
from mpicoll.train.cli import USAGE_ERROR, parse, run, train

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
COMM = mpicoll.Communicator(WORLD)

several = pytest.mark.skipif(SIZE == 1, reason="for several ranks")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Rank 0's directory, on every rank."""
    return Path(WORLD.bcast(str(tmp_path)))


def reread(*paths: Path) -> Trace:
    """What rank 0 finds in the files, on every rank."""
    found: Trace = WORLD.bcast(read(paths) if RANK == 0 else None)
    return found


def own(found: Trace, *categories: str) -> list[Event]:
    return [e for e in found.events if e.rank == RANK and (not categories or e.category in categories)]


def facts(event: Event) -> tuple[Any, ...]:
    """What of an event is the same in every run."""
    return (event.name, *(event.args.get(key) for key in ("bytes", "dtype", "op", "match")))


def blocking(comm: mpicoll.Communicator) -> list[tuple[Any, ...]]:
    """A sequence of calls, and what is to be recorded of it on this rank."""
    n = 5
    a, b = np.arange(n, dtype=np.float32) + RANK, np.zeros(n, np.float32)
    whole = np.zeros(n * SIZE, np.float64)
    part = np.full(n, RANK, np.float64)
    counts = [rank + 1 for rank in range(SIZE)]
    uneven = np.zeros(sum(counts), np.int16)
    mine = np.full(RANK + 1, RANK, np.int16)
    comm.Allreduce(a, b)
    comm.Allreduce(MPI.IN_PLACE, b, op=MPI.MAX)
    comm.Allreduce([a, 2, MPI.FLOAT], [b, 2, MPI.FLOAT])
    comm.Bcast(b[:0], root=SIZE - 1)
    comm.Bcast(b, root=SIZE - 1)
    comm.Reduce(a, b if RANK == 0 else None, op=mpicoll.AVG)
    comm.Allgather(part, whole)
    comm.Reduce_scatter_block(whole, part)
    comm.Allgatherv(mine, [uneven, counts])
    comm.Barrier()
    comm.barrier()
    comm.allgather("something")
    comm.Allreduce_many([a, whole])
    return [
        ("Allreduce", 20, "float32", "SUM", "world:0"),
        ("Allreduce", 20, "float32", "MAX", "world:1"),
        ("Allreduce", 8, "float32", "SUM", "world:2"),
        ("Bcast", None, "float32", None, "world:3"),
        ("Bcast", 20, "float32", None, "world:4"),
        ("Reduce", 20, "float32", "AVG", "world:5"),
        ("Allgather", 40 * SIZE, "float64", None, "world:6"),
        ("Reduce_scatter_block", 40 * SIZE, "float64", "SUM", "world:7"),
        ("Allgatherv", 2 * sum(counts), "int16", None, "world:8"),
        ("Barrier", None, None, None, "world:9"),
        ("Barrier", None, None, None, "world:10"),
        ("allgather", None, None, None, "world:11"),
        ("Allreduce_many", 20 + 40 * SIZE, None, None, "world:12"),
    ]


@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_calls_are_recorded_with_what_they_are(place: Path, transport: str) -> None:
    path = place / "trace.json"
    with mpicoll.Communicator(WORLD, transport=transport) as comm, trace.record(comm, path):
        expected = blocking(comm)
    found = reread(place / "trace.json")
    assert [facts(event) for event in own(found)] == expected
    assert {event.thread for event in found.events} == {PROGRAM}
    assert found.communicators == {"world": list(range(SIZE))}
    by_algorithm = {event.args.get("algorithm") for event in own(found) if event.name == "Allreduce"}
    assert by_algorithm == ({"shared"} if transport == "shared" else {"recursive_doubling"})
    for event in found.events:
        assert event.args["ranks"] == SIZE and 0 <= event.begin <= event.end
    assert all(not each.dropped and each.at_the_end for each in found.ranks)
    assert [each.rank for each in found.ranks] == list(range(SIZE))


def test_nonblocking_and_persistent_calls_last_until_they_are_complete(place: Path) -> None:
    a, b, c = (np.full(7, RANK + i, np.float64) for i in range(3))
    with trace.record(COMM, place / "trace.json"):
        first, second = COMM.Iallreduce(a, b), COMM.Ibcast(c)
        time.sleep(0.002)
        first.Wait()
        MPI.Request.Waitall([second])  # MPI's own, which knows nothing of a recorder
        plan = COMM.Allreduce_init(a, b)
        for wait in (plan.Wait, plan.Test):
            plan.Start()
            while not wait():
                pass
        plan.Free()
    found = reread(place / "trace.json")
    np.testing.assert_array_equal(b, SIZE * (SIZE - 1) / 2)
    flying = [facts(event) for event in sorted(own(found, COLLECTIVE), key=lambda e: e.args["match"])]
    assert flying == [
        ("Allreduce", 56, "float64", "SUM", "world/2:0"),
        ("Allreduce", 56, "float64", "SUM", "world/2:1"),
        ("Iallreduce", 56, "float64", "SUM", "world:0"),
        ("Ibcast", 56, "float64", None, "world:1"),
    ]
    assert all(event.thread.startswith("in flight") for event in own(found, COLLECTIVE))
    waits = [event.name for event in own(found, WAIT)]
    assert waits[:3] == ["Iallreduce: start", "Ibcast: start", "Iallreduce: wait"]
    assert waits[3:6] == ["Allreduce_init", "Allreduce: start", "Allreduce: wait"]
    assert waits[6:] == ["Allreduce: start"]  # tests are not recorded, there may be millions


def test_what_goes_to_mpi_itself_is_said(place: Path) -> None:
    op = MPI.Op.Create(lambda a, b, dtype: None)
    a, b = np.ones(3), np.ones(3)
    with trace.record(COMM, place / "trace.json"):
        COMM.Allreduce(a, b, op=op)
        COMM.Iallreduce(a, b, op=op).Wait()
    op.Free()
    calls = own(reread(place / "trace.json"))
    assert [(e.name, e.category, e.args["op"], e.args["algorithm"]) for e in calls] == [
        ("Allreduce", COLLECTIVE, "a user's", "MPI's own"),
        ("Iallreduce", COLLECTIVE, "a user's", "MPI's own"),
    ]


def test_communicators_made_from_it_are_recorded_too(place: Path) -> None:
    a, b = np.ones(3), np.ones(3)
    with trace.record(COMM, place / "trace.json"):
        copy = COMM.Dup()
        part = COMM.Split(RANK % 2)
        copy.Allreduce(a, b)
        part.Allreduce(a, b)
        own_members = [rank for rank in range(SIZE) if rank % 2 == RANK % 2]
        name = f"world.2@{RANK % 2}"
    assert recorded(copy) is recorded(part) is None and "Split" not in vars(part)
    part.Free()
    copy.Free()
    found = reread(place / "trace.json")
    matches = [(event.args["match"], event.args["ranks"]) for event in own(found)]
    assert matches == [("world.1@0:0", SIZE), (f"{name}:0", len(own_members))]
    assert found.communicators[name] == own_members


def test_gradients_are_recorded_where_compiled_code_reduces_them(place: Path) -> None:
    shapes = {"a": (3,), "b": (40, 5), "c": (7,)}
    with trace.record(COMM, place / "trace.json") as recorder:
        gradients = {name: np.full(shape, RANK, np.float32) for name, shape in shapes.items()}
        sync = mpicoll.GradientSync(COMM, gradients, wire_dtype="float16", bucket_bytes=1, overlap=False)
        for _ in range(2):
            with recorder.phase("backward"):
                sync.ready_all()
            sync.wait()
    stamped = sync._queue._tasks
    np.testing.assert_array_equal(gradients["b"], (SIZE - 1) / 2 if SIZE > 1 else 0)
    assert "wait" not in vars(sync)
    sync.ready_all()
    assert sync.wait()  # also when nobody records any more
    sync.close()
    found = reread(place / "trace.json")
    events = [event for event in own(found) if event.thread == "gradients 1"]
    reduced = [] if SIZE == 1 else ["Allreduce"]
    names = 3 * ["pack", *reduced, "unpack"] + ["Allreduce"]
    assert [event.name for event in events[: len(names)]] == names
    assert [event.name for event in events[len(names) : 2 * len(names)]][:2] == names[:2]
    waits = [(e.begin, e.end) for e in own(found) if e.name == "gradients: wait"]
    assert all(any(begin <= e.begin <= e.end <= end for begin, end in waits) for e in events)
    calls = [event for event in events if event.category == COLLECTIVE]
    everyones = WORLD.allgather([event.args["match"] for event in calls])
    assert all(matches == everyones[0] for matches in everyones) and len(set(everyones[0])) == len(calls)
    packs = [event.args["bytes"] for event in events[: len(names)] if event.category == PACK]
    assert packs == [28, 28, 800, 800, 12, 12]  # the last gradient is ready first
    if SIZE > 1:
        assert [e.args["op"] for e in calls[:4]] == ["AVG", "AVG", "AVG", "MAX"]
        assert {e.args["dtype"] for e in calls[:3]} == {"float16"}
    program = [event.name for event in own(found) if event.thread == PROGRAM and event.category != COLLECTIVE]
    assert program == ["backward", "gradients: wait"] * 2
    apart = mpicoll.GradientSync(COMM, {"a": (3,)}, bucket_bytes=1)
    assert len(stamped) > len(apart._queue._tasks) == (2 if SIZE > 1 else 1)  # no stamps without a recorder
    apart.close()


@several
def test_what_a_thread_reduces_beside_the_program_is_hidden(place: Path) -> None:
    with trace.record(COMM, place / "trace.json") as recorder:
        sync = mpicoll.GradientSync(COMM, {"a": (3,), "b": (4,)}, bucket_bytes=1, overlap=True)
        with recorder.phase("backward"):
            sync.ready("b")
            time.sleep(0.1)  # in which the thread gets its turn on every rank
            sync.ready("a")
        sync.wait()
    sync.close()
    found = reread(place / "trace.json")
    backward = next(event for event in own(found, COMPUTE))
    first = next(event for event in own(found, COLLECTIVE) if event.thread == "gradients 1")
    assert backward.begin < first.begin < first.end < backward.end
    hidden = next(each.hidden for each in summarise(found).overlap if each.rank == RANK)
    assert hidden >= 0.99e-6 * (first.end - first.begin) > 0


OFFSET = 5_000_000_000  # nanoseconds for each rank


def shifted(rank: int) -> Callable[[], int]:
    """A clock that is wrong, and goes wrong, by a part in a thousand for each rank."""
    return lambda: (now := time.perf_counter_ns()) + rank * (OFFSET + now // 1000)


@several
def test_clocks_that_differ_are_brought_together(place: Path) -> None:
    with trace.record(COMM, place / "trace.json", clock=shifted(RANK)):
        for _ in range(10):
            COMM.Barrier()
            time.sleep(0.003)
    found = reread(place / "trace.json")
    exact = {each.rank: each.uncertainty for each in found.ranks}
    assert exact[0] == 0 and all(0 < exact[rank] < 1e5 for rank in range(1, SIZE))
    assert all(each.offset >= each.rank * OFFSET / 1000 - exact[each.rank] for each in found.ranks)
    barriers = [[e for e in found.events if e.args["match"] == f"world:{i}"] for i in range(10)]
    for events in barriers:
        last, first = max(events, key=lambda e: e.begin), min(events, key=lambda e: e.end)
        # Nobody leaves a barrier before everybody has come.
        assert last.begin <= first.end + exact[last.rank] + exact[first.rank]
    spans = [e[0].end - e[0].begin for e in barriers]
    assert barriers[-1][0].begin - barriers[0][0].begin < 1e6 + sum(spans)  # not 5 s away


def test_ranks_on_one_machine_read_one_clock(place: Path) -> None:
    with trace.record(COMM, place / "trace.json"):
        COMM.Barrier()
    found = reread(place / "trace.json")
    hosts = {each.host for each in found.ranks}
    assert len(hosts) > 1 or {(e.offset, e.uncertainty) for e in found.ranks} == {(0, 0)}
    assert max(e.begin for e in found.events) <= min(e.end for e in found.events)


@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_nothing_is_left_after_the_block(place: Path, transport: str) -> None:
    with mpicoll.Communicator(WORLD, transport=transport) as comm:
        before = dict(vars(comm))
        with trace.record(comm, place / "trace.json"):
            assert vars(comm)["Allreduce"] is not before.get("Allreduce")
            assert recorded(comm) is not None
        assert set(vars(comm)) == set(before)
        assert all(vars(comm)[name] is before[name] for name in mpicoll.fastcalls.METHODS if name in before)
        with pytest.raises(ZeroDivisionError), trace.record(comm, place / "trace.json"):
            raise ZeroDivisionError
        assert set(vars(comm)) == set(before)


def test_an_exception_leaves_each_ranks_own_events(place: Path) -> None:
    path = place / "trace.json"

    def program() -> None:
        COMM.Barrier()
        if RANK == 0:
            with pytest.raises(TypeError):
                COMM.Allreduce("no array", None)
        COMM.Barrier()
        raise KeyError("told")

    with pytest.raises(KeyError), trace.record(COMM, path):
        program()
    WORLD.Barrier()
    assert not path.exists()
    parts = [place / f"trace.rank{rank}.json" for rank in range(SIZE)]
    found = reread(*parts)
    calls = [(e.name, e.args.get("match"), e.args.get("error")) for e in own(found)]
    refused = [("Allreduce", None, "TypeError")] if RANK == 0 else []  # no call of all ranks: no match
    assert calls == [("Barrier", "world:0", None), *refused, ("Barrier", "world:1", None)]
    assert not any(each.at_the_end for each in found.ranks)
    if SIZE > 1:
        assert "1 of" in " ".join(summarise(reread(*parts[1:])).notes)


@several
def test_errors_name_the_programs_line() -> None:
    comm = mpicoll.Communicator(WORLD)
    recorder = trace.Recorder(comm)
    recorder.attach(comm)
    with pytest.raises(mpicoll.MismatchError) as raised:
        comm.Bcast(np.zeros(2)) if RANK else comm.Barrier()
    recorder.detach()
    assert "at test_trace.py:" in str(raised.value) and "recorder.py" not in str(raised.value)
    comm.Free()


def test_exceptions_of_all_ranks_leave_a_whole_file(place: Path) -> None:
    with pytest.raises(KeyError), trace.record(COMM, place / "trace.json", alike=(LookupError,)):
        _ = {COMM.Barrier(): 0}["no such key"]
    assert len(reread(place / "trace.json").events) == SIZE


def test_events_beyond_the_limit_are_counted(place: Path) -> None:
    with trace.record(COMM, place / "trace.json", limit=3):
        for _ in range(5):
            COMM.Barrier()
    found = reread(place / "trace.json")
    assert [event.args["match"] for event in own(found)] == ["world:0", "world:1", "world:2"]
    assert [each.dropped for each in found.ranks] == [2] * SIZE
    assert "rank 0: no room for the last 2 events" in summarise(found).notes


def test_bad_arguments_are_refused_on_all_ranks(place: Path) -> None:
    path = place / "trace.json"
    with pytest.raises(TypeError, match=r"comm: expected an mpicoll.Communicator, got Intracomm"):
        trace.record(WORLD, path).__enter__()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit: expected at least 1 event, got 0"):
        trace.record(COMM, path, limit=0).__enter__()
    with pytest.raises(OSError, match=r"path: expected a file that can be written, got .*No such file"):
        trace.record(COMM, path / "trace.json").__enter__()


# -- training


def arguments(place: Path, *more: str) -> list[str]:
    if RANK == 0:
        random = np.random.default_rng(1)
        np.save(place / "x.npy", random.standard_normal((60, 5)))
        np.save(place / "y.npy", np.arange(60) % 3)
    data = ["--data", "npy", "--data-dir", str(place), "--batch-size", "16", "--hidden", "4"]
    return [*data, "--epochs", "2", "--trace", str(place / "trace.json"), *more]


@pytest.mark.parametrize("strategy", ["allreduce", "sharded", "local"])
def test_training_writes_its_phases(place: Path, strategy: str) -> None:
    options = parse(arguments(place, "--strategy", strategy), aloud=False)
    assert options is not None
    before = set(vars(COMM))
    result = train(COMM, options)
    assert set(vars(COMM)) == before
    found = reread(place / "trace.json")
    counts = dict.fromkeys(("forward", "loss", "backward", "update", "evaluation", "setup"), 0)
    for event in own(found, COMPUTE):
        if event.name in counts:
            counts[event.name] += 1
    steps = result["steps"]
    assert steps == 6  # of two epochs
    assert counts["loss"] == counts["backward"] == counts["update"] == steps
    assert counts["evaluation"] == 2 and counts["setup"] == 1
    assert counts["forward"] >= steps + 2
    waits = [event.name for event in own(found, WAIT)]
    expected = {
        "allreduce": ["gradients: wait"] * (steps + 1),  # one before the first step
        "sharded": ["communication"] * 2 * steps,
        "local": ["communication"] * steps,
    }
    assert waits == expected[strategy]
    if strategy == "allreduce" and SIZE > 1:
        reduced = [e for e in own(found, COLLECTIVE) if e.args.get("algorithm") == "ring"]
        assert len(reduced) == steps + 1
        assert {e.args["bytes"] for e in reduced} == {4 * result["parameters"]}
    summary = summarise(found)
    assert sum(summary.phases[RANK].values()) == pytest.approx(summary.seconds)


def test_training_names_a_trace_that_it_cannot_write(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = arguments(place, "--trace", str(place / "missing" / "trace.json"))
    capfd.readouterr()
    assert WORLD.allgather(run(COMM, given)) == [USAGE_ERROR] * SIZE
    said = capfd.readouterr().err
    if RANK == 0:
        assert said.count("\n") == 1 and "(--trace), but: No such file or directory" in said
