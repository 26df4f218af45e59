"""Tuning on the ranks of this job: who uses a table, what the command writes, the choice while training."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from mpi4py import MPI
from mpicoll.bench.jobs import USAGE_ERROR

import mpicoll
from mpicoll import info, tuning
from mpicoll.simulate import Machine
from mpicoll.train.cli import parse, train
from mpicoll.transports import hierarchical
from mpicoll.transports.program import Op
from mpicoll.tune import calibrate, command, measure, online, table
from mpicoll.tune.search import Candidate, Case, FloatArray
from mpicoll.tune.table import Choices, Entry, Rule

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
COMM = mpicoll.Communicator(WORLD)
PLACE = measure.place_of(WORLD)

several = pytest.mark.skipif(SIZE == 1, reason="for several ranks")
KIB = 1024
SMALL, LARGE = 40 * KIB, 2 << 20
STATIC = {n: tuning.choose("allreduce", SIZE, n) for n in (SMALL, LARGE)}
OTHER = {n: "direct" if STATIC[n] != "direct" else "ring" for n in STATIC}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rank 0's file, which only rank 0 is told of."""
    if RANK == 0:
        monkeypatch.setenv(table.VARIABLE, str(tmp_path / "tuning.json"))
    return Path(WORLD.bcast(str(tmp_path / "tuning.json")))


def rule(nbytes: int, **given: Any) -> Rule:
    fields = {"instead_of": STATIC[nbytes], "algorithm": OTHER[nbytes], **given}
    return Rule("allreduce", nbytes // 2, nbytes * 2, **fields)


def store(file: Path, *rules: Rule, **place: Any) -> None:
    if RANK == 0:
        table.write(file, Entry(table.Place(**{**vars(PLACE), **place}), "2026-03-01", rules))


def messages() -> mpicoll.Communicator:
    return mpicoll.Communicator(WORLD, transport="messages")


def check_sums(comm: mpicoll.Communicator, nbytes: int, **given: Any) -> None:
    """An allreduce, several times, for the second goes another way than the first."""
    data = np.arange(nbytes // 4, dtype=np.float32) % 1000 + RANK
    expected = SIZE * (np.arange(nbytes // 4, dtype=np.float32) % 1000) + SIZE * (SIZE - 1) // 2
    for _ in range(3):
        result = np.zeros_like(data)
        comm.Allreduce(data, result, **given)
        np.testing.assert_array_equal(result, expected)


def sends(comm: mpicoll.Communicator, nbytes: int, algorithm: str | None = None) -> tuple[str, list[int]]:
    """The algorithm of an allreduce's plan, and the bytes of each message that this rank sends."""
    data = np.zeros(nbytes // 4, np.float32)
    call = comm._maker.allreduce(data, np.zeros_like(data), algorithm=algorithm)
    assert call is not None
    rows = call.plan._rows  # type: ignore[union-attr]
    return call.what.algorithm, rows[rows[:, 0] == Op.SEND][:, 3].tolist()


# -- a table is used


@several
def test_auto_is_what_was_measured(file: Path) -> None:
    """Rank 0 alone reads the file; all ranks choose alike, for otherwise this would hang."""
    store(file, rule(SMALL), rule(LARGE))
    with messages() as comm:
        assert comm.choices.origin == f"{file}: 2 rules, measured 2026-03-01"
        for nbytes in (SMALL, LARGE):
            assert sends(comm, nbytes)[0] == comm.choose("allreduce", nbytes) == OTHER[nbytes]
            check_sums(comm, nbytes)
            assert sends(comm, nbytes, STATIC[nbytes])[0] == STATIC[nbytes], "what is named is done"
        assert comm.choose("allreduce", 8) == tuning.choose("allreduce", SIZE, 8)
        with comm.Dup() as child:
            assert child.choose("allreduce", SMALL) == OTHER[SMALL]


@several
def test_segments_are_what_was_measured(file: Path) -> None:
    store(file, rule(LARGE, segment=64 * KIB, algorithm="ring", instead_of=STATIC[LARGE]))
    with messages() as comm:
        name, sizes = sends(comm, LARGE)
        assert name == "ring"
        assert 32 * KIB < max(sizes) <= 64 * KIB
        check_sums(comm, LARGE)
        assert max(sends(comm, LARGE, "two_shot")[1]) > 64 * KIB, "another algorithm's"
        check_sums(comm, LARGE, algorithm="two_shot")
        assert max(sends(comm, 4 * LARGE, "ring")[1]) > 64 * KIB, "another size's"


@several
@pytest.mark.parametrize(
    "other", [{"ranks": SIZE + 1}, {"mpi": "another"}, {"machine": "1 × abacus"}, {"network": True}], ids=str
)
def test_elsewhere_the_static_choice_stays(other: dict[str, Any], file: Path) -> None:
    store(file, rule(SMALL), **other)
    with messages() as comm:
        assert comm.choices.rules == ()
        assert sends(comm, SMALL)[0] == STATIC[SMALL]


@several
def test_off(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(file, rule(SMALL))
    monkeypatch.setenv(table.VARIABLE, "off")
    with messages() as comm:
        assert comm.choices == Choices((), "none: MPICOLL_TUNING is off")


@pytest.mark.skipif(SIZE < 3, reason="for a part of several ranks")
def test_fewer_ranks_have_rules_of_their_own(file: Path) -> None:
    store(file, rule(SMALL))
    with messages() as comm, comm.Split(RANK == 0, RANK) as part:
        assert part.choices.rules == ()


@several
def test_a_damaged_table_is_a_warning_on_rank_zero(file: Path) -> None:
    if RANK == 0:
        file.write_text('{"format": "mpicoll tuning", "version": 7}')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with messages() as comm:
            check_sums(comm, SMALL)
            assert comm.choose("allreduce", SMALL) == STATIC[SMALL]
    said = [str(each.message) for each in caught]
    assert said == ([f"{file}: not used for tuning: expected version 1, got 7"] if RANK == 0 else [])


@several
def test_shared_memory_has_no_choice_but_nonblocking_calls_have(file: Path) -> None:
    store(file, rule(SMALL))
    with mpicoll.Communicator(WORLD) as comm:
        assert comm.choose("allreduce", SMALL) == "shared"
        assert comm._messages.choose("allreduce", None, SMALL) == OTHER[SMALL]
        data = np.full(SMALL // 4, RANK + 1, np.float32)
        result = np.zeros_like(data)
        comm.Iallreduce(data, result).Wait()
        assert (result == SIZE * (SIZE + 1) // 2).all()


@pytest.mark.skipif(SIZE < 3, reason="for several nodes of different size")
def test_between_nodes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hierarchical, "node_of", lambda comm: comm.Split(comm.rank // 2))
    monkeypatch.setattr(measure, "node_of", lambda comm: comm.Split(comm.rank // 2))
    place = measure.place_of(WORLD)
    assert (place.ranks_per_node, place.network) == (2, True)
    fields: dict[str, Any] = {"instead_of": "hierarchical", "algorithm": "two_shot"}
    small = Rule("reduce_scatter", 1, 100, tuning.choose("reduce_scatter", SIZE, 64, True), "hierarchical")
    store(file, rule(LARGE, **fields), small, **vars(place))
    with mpicoll.Communicator(WORLD) as comm:
        assert measure.candidates(comm, "allreduce")[-1] == "hierarchical"
        assert "hierarchical" not in measure.candidates(comm, "reduce")
        assert comm.choose("allreduce", LARGE) == "two_shot"
        check_sums(comm, LARGE)
        assert comm.choose("reduce_scatter", 64) == "hierarchical"
        assert comm._messages.choose("reduce_scatter", None, 64) == small.instead_of


@several
def test_info_says_which_table(file: Path) -> None:
    store(file, rule(SMALL))
    facts = info.gather()
    assert facts["tuning"] == f"{file}: 1 rules, measured 2026-03-01"
    assert f"tuning      {facts['tuning']}\n" in info.render(facts)


# -- the command


@several
def test_times_of_every_collective() -> None:
    """Real ones; all ranks get the same."""
    with measure.measured_communicator(WORLD, PLACE) as comm:
        measurer = measure.Measurer(comm, PLACE.crowded)
        measurer.seconds_per_turn = 1e-5
        for case in measure.cases(list(measure.METHODS), 256 * KIB, 256 * KIB, SIZE):
            names = measure.candidates(comm, case.collective)
            asked = [*map(Candidate, names), Candidate(names[0], 64 * KIB)]
            seconds = measurer.times(case, asked, 2)
            assert seconds.shape == (2, len(asked))
            assert (seconds > 0).all()
            np.testing.assert_array_equal(WORLD.bcast(seconds), seconds)
        assert comm.choices == Choices()


def test_a_candidate_is_cut_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    if SIZE == 1:
        pytest.skip("for several ranks")
    with measure.measured_communicator(WORLD, PLACE) as comm:
        measurer = measure.Measurer(comm, PLACE.crowded)
        case = Case("allreduce", LARGE, LARGE)
        for segment in (64 * KIB, 256 * KIB, None):
            plan = measurer._timed(case, Candidate("ring", segment), measure._arguments(case, comm)).plan
            rows = plan._call.plan._rows
            most = rows[rows[:, 0] == Op.SEND][:, 3].max()
            assert segment is None or segment // 2 < most <= segment
            plan.Free()


@several
@pytest.mark.parametrize(("limit", "turns"), [(0.0, calibrate.LEAST_TURNS), (60.0, calibrate.TURNS)])
def test_a_calibration_ends_when_its_time_is_up(
    limit: float, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Case] = []
    lengths: set[float] = set()

    def times(self: Any, case: Case, candidates: Sequence[Candidate], turns: int) -> FloatArray:
        asked.append(case)
        lengths.add(self.seconds_per_turn)
        return np.full((turns, len(candidates)), 1e-6 * len(asked))

    monkeypatch.setattr(measure.Measurer, "times", times)
    monkeypatch.setattr(calibrate, "SIZES", (64, 1024))
    shown: list[int] = []
    own_limit = limit + RANK  # as each rank's clock says it
    rows = list(calibrate._rows(WORLD, own_limit, "", lambda done, what: shown.append(done)))
    assert len(set().union(*WORLD.allgather(lengths))) == 1
    cases = 2 * len(calibrate.TIMED)
    assert len(asked) == turns * cases
    assert shown == sorted(shown) and shown[-1] < cases
    assert len(rows) == 2 * sum(map(len, calibrate.TIMED.values()))
    own = [1e-6 * (1 + turn * cases) for turn in range(turns)]  # each turn after one of all other cases
    assert rows[0].seconds == pytest.approx(np.quantile(own, 0.25))
    assert rows[0].spread == pytest.approx((own[0], own[turns // 2]))


def fake_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ring takes half as long as all others from 1 KiB on."""

    def times(self: Any, case: Case, candidates: Sequence[Candidate], turns: int) -> FloatArray:
        fast = [c.algorithm == "ring" and case.nbytes >= KIB for c in candidates]
        return np.tile(np.where(fast, 1e-6, 2e-6), (turns, 1))

    monkeypatch.setattr(measure.Measurer, "times", times)


@several
def test_what_is_found_is_kept_beside_what_was(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_times(monkeypatch)
    store(file, rule(SMALL), ranks=SIZE + 1)
    store(file, rule(SMALL))
    WORLD.Barrier()
    chosen = ["--collective", "allgather", "--collective", "broadcast", "--min", "64", "--max", "64K"]
    assert command.run(COMM, chosen) == 0
    text = capsys.readouterr().out
    entries = WORLD.bcast(table.read(file) if RANK == 0 else None)
    assert [entry.place.ranks for entry in entries] == [SIZE + 1, SIZE]
    assert entries[1].place == PLACE
    rules = entries[1].rules
    assert {(each.collective, each.algorithm, each.gain) for each in rules} == {("allgather", "ring", 0.5)}
    with messages() as comm:
        assert comm.choose("allgather", 10 * KIB) == "ring"
    if RANK == 0:
        assert "50%*" in text
        assert f"{file}: {len(rules)} rules for {SIZE} ranks" in text
    else:
        assert text == ""


@several
@pytest.mark.filterwarnings("ignore:.*not used for tuning")  # it is not there yet
def test_json(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a real measurement, into a file that is named."""
    out = tmp_path / "cluster.json"
    wanted = ["--collective", "allreduce", "--min", "4", "--max", "64", "--quick", "--json", "-o", str(out)]
    assert command.run(COMM, wanted) == 0
    text = capsys.readouterr().out
    if RANK == 0:
        result = json.loads(text)
        assert result["place"] == vars(PLACE)
        assert [each["size"] for each in result["findings"]] == [4, 16, 64]
        assert result["left_out"] == []
        assert out.exists()
        assert not file.exists()


@several
@pytest.mark.filterwarnings("ignore:.*not used for tuning")  # it is not there yet
def test_it_ends_in_time(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "QUICK_LIMIT", 0.0)
    assert command.run(COMM, ["--quick", "--max", "4"]) == 0
    if RANK == 0:
        assert "no time was left for: allreduce 4, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--collective alreduce", "Invalid value for '--collective': 'alreduce' is not one of 'allreduce', "),
        ("--max 10Q", "Invalid value for '--max': expected a number with K, M, G or T behind it, such as"),
        ("--min 1M --max 1K", "Invalid value for --min: expected at most --max (1K), got 1M"),
        ("--calibrate --max 1K", "Invalid value for --max: expected none beside --calibrate"),
        ("-o NOWHERE/file.json", "expected a file that can be written, got NOWHERE/file.json: No such file"),
        ("-o NOWHERE", "expected a file that can be written, got NOWHERE: it is a directory"),
        ("-o DAMAGED", "DAMAGED: expected JSON, got "),
        ("", "Error: MPICOLL_TUNING=off: expected -o FILE beside it"),
    ],
)
def test_bad_input(
    arguments: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "NOWHERE/" not in arguments:
        Path("NOWHERE").mkdir()
    Path("DAMAGED").write_text("{")
    assert command.run(COMM, arguments.split()) == USAGE_ERROR
    said = capsys.readouterr().err
    if SIZE == 1 and "Invalid value for" not in text:
        text = "Error: expected 2 ranks or more, got 1: start it as `mpirun -np 2 mpicoll tune`"
    assert (text in said) if RANK == 0 else said == ""


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(COMM, ["--help"]) == 0
    text = capsys.readouterr().out
    assert ("mpirun -np 2 mpicoll tune --quick" in text) if RANK == 0 else text == ""


@several
def test_calibrate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "SIZES", (64, 16 * KIB))
    monkeypatch.setattr(calibrate, "TURNS", 1)
    monkeypatch.setattr(calibrate, "count_cores", lambda node: SIZE)
    monkeypatch.setattr(calibrate, "STEPS", 3)
    monkeypatch.setattr(calibrate, "CURVE_STEPS", 1)
    out = tmp_path / "machine.toml"
    assert command.run(COMM, ["--calibrate", "--quick", "--json", "-o", str(out)]) == 0
    text = capsys.readouterr().out
    if RANK == 0:
        result = json.loads(text)
        assert Machine.load(out).overhead == pytest.approx(result["machine"]["overhead"], rel=1e-3)
        found = {(row["ranks"], row["collective"]) for row in result["measurements"]}
        ranks = [n for n in calibrate.RANKS if n <= SIZE]
        assert found == {(n, name) for n in ranks for name in calibrate.TIMED}
        fields = {"algorithm", "nbytes", "seconds", "spread", "predicted_seconds", "error"}
        assert fields < set(result["measurements"][0])


def test_calibration_of_one_level(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibrate.level_name(WORLD) == "node"
    monkeypatch.setattr(calibrate, "node_of", lambda comm: comm.Split(comm.rank // 2))
    if SIZE > 2:
        with pytest.raises(ValueError, match="expected all ranks on one node, or one on each, got nodes of"):
            calibrate.level_name(WORLD)
    monkeypatch.setattr(calibrate, "node_of", lambda comm: comm.Split(comm.rank))
    assert calibrate.level_name(WORLD) == ("node" if SIZE == 1 else "network")


# -- while a program trains

COUNTS = (7, 300_000, 13, 270_000, 5)
STEPS = 2 + (online.WARMUP + online.TIMED) * (1 + len(online.CANDIDATES))


def gradients() -> list[np.ndarray[Any, Any]]:
    return [np.zeros(count, np.float32) for count in COUNTS]


def check_steps(sync: mpicoll.GradientSync, nsteps: int) -> Iterator[str]:
    """Sums in each step, which differ from the step before; what `tuning` says after it."""
    for step in range(nsteps):
        for i, array in enumerate(sync.gradients):
            array[...] = np.arange(array.size) % 100 + (step + 1) * (i + 1) * (RANK + 1)
        sync.ready_all()
        assert sync.wait()
        for i, array in enumerate(sync.gradients):
            own = SIZE * (np.arange(array.size) % 100)
            np.testing.assert_array_equal(array, own + (step + 1) * (i + 1) * SIZE * (SIZE + 1) // 2)
        yield sync.tuning


@several
@pytest.mark.parametrize("given", ["arrays", "shapes"])
def test_the_first_steps_try_algorithms(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def best(seconds: Any, candidates: Sequence[str]) -> list[str]:
        seen.append((seconds, list(candidates)))
        return [candidates[1 + b] for b in range(seconds.shape[1])]

    monkeypatch.setattr(online, "best", best)
    what = gradients() if given == "arrays" else [(count,) for count in COUNTS]
    with (
        messages() as comm,
        mpicoll.GradientSync(comm, what, average=False, bucket_bytes=1 << 20, tune=True) as sync,
    ):
        said = list(check_steps(sync, STEPS))
        nbuckets = len(sync.buckets)
        used = [call.what.algorithm for call in sync._series.calls]
    assert nbuckets == 3
    assert said[0] == "not done yet"
    assert said[-1] == "bucket 0: ring, bucket 1: two_shot, bucket 2: rabenseifner"
    assert used[:3] == ["ring", "two_shot", "rabenseifner"]
    ((seconds, candidates),) = seen
    assert candidates == ["auto", *online.CANDIDATES]
    assert seconds.shape == (len(candidates), nbuckets)
    assert ((seconds > 0) & (seconds < 60)).all()
    np.testing.assert_array_equal(WORLD.bcast(seconds), seconds)


def no_choice(**given: Any) -> str:
    with mpicoll.GradientSync(COMM, gradients(), average=False, tune=True, **given) as sync:
        (said,) = check_steps(sync, 1)
    return said


def test_where_there_is_no_choice() -> None:
    reason = "there is one rank" if SIZE == 1 else "the ranks share memory, in which there is one way"
    assert no_choice() == f"none: {reason}"
    with mpicoll.GradientSync(COMM, gradients()) as sync:
        assert sync.tuning == ""


@several
def test_halves_have_no_choice() -> None:
    with messages() as comm, mpicoll.GradientSync(comm, [(5,)], dtype=np.float16, tune=True) as sync:
        assert sync.tuning == "none: 16-bit floats are summed in one way"


def test_an_algorithm_that_is_named_is_not_looked_for() -> None:
    with pytest.raises(ValueError, match="tune: expected no algorithm beside it, got 'ring'"):
        mpicoll.GradientSync(COMM, gradients(), algorithm="ring", tune=True)


@several
def test_all_ranks_tune_or_none() -> None:
    with pytest.raises(ValueError, match="tune: expected True as on rank 0; rank 1 has False"):
        mpicoll.GradientSync(COMM, gradients(), tune=RANK == 0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            "--tune --deterministic",
            "--tune does not go with --deterministic: each algorithm adds in an order",
        ),
        ("--tune --algorithm ring", "--tune looks for an algorithm: expected no --algorithm ring"),
        ("--tune --strategy gossip", "--tune is for --strategy allreduce, not gossip"),
    ],
)
def test_options_that_do_not_go_with_it(arguments: str, text: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        parse(arguments.split(), aloud=False)
    assert text in str(caught.value)


def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(["--epochs", "2", "--batch-size", "96", "--hidden", "8", "--tune"], aloud=False)
    assert options is not None
    with messages() as comm:
        result = train(comm, options)
    said = capsys.readouterr().err
    assert result["algorithm"] == "auto"
    if SIZE == 1:
        assert result["tuning"] == "none: there is one rank"
        assert "note: --tune: none: there is one rank" in said
    else:
        names = "|".join(("auto", *online.CANDIDATES))
        assert re.fullmatch(rf"bucket 0: ({names})", result["tuning"])
        assert "--tune" not in said


@several
def test_ranks_that_share_cores_are_no_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "count_cores", lambda node: 2)
    assert calibrate.rank_counts(WORLD) == [2]
    monkeypatch.setattr(calibrate, "count_cores", lambda node: 1)
    assert calibrate.rank_counts(WORLD) == []
    assert command.run(COMM, ["--calibrate"]) == USAGE_ERROR
    said = capsys.readouterr().err
    assert ("--calibrate: expected a core for each of 2 ranks at least, got one core" in said) == (RANK == 0)
    monkeypatch.setattr(calibrate, "node_of", lambda comm: comm.Split(comm.rank))
    assert calibrate.rank_counts(WORLD) == [n for n in calibrate.RANKS if n <= SIZE], "a core on each node"
