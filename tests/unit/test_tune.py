"""``mpicoll tune``: what times lead to, what is kept of it, and the machine that is fitted. No MPI."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpicoll import algorithms, tuning
from mpicoll.simulate import Machine, simulate_sizes
from mpicoll.transports.program import Pipeline
from mpicoll.tune import calibrate, measure, online, search, table
from mpicoll.tune.search import Candidate, Case, Finding, FloatArray
from mpicoll.tune.table import Choices, Entry, Place, Rule

KIB = 1024
NAMES = ("ring", "two_shot", "direct")


class FakeTimes:
    """Times that a test makes up, of ``seconds[algorithm, segment]``; ``noise[turn]`` multiplies them."""

    def __init__(self, seconds: dict[tuple[str, int | None], float], noise: Sequence[float] = (1.0,)) -> None:
        self.seconds, self.noise = seconds, noise
        self.heats: list[tuple[list[Candidate], int]] = []

    def __call__(self, case: Case, candidates: Sequence[Candidate], turns: int) -> FloatArray:
        self.heats.append((list(candidates), turns))
        # Each candidate meets another part of the noise.
        factors = [
            [self.noise[(turn + 3 * i) % len(self.noise)] for i in range(len(candidates))]
            for turn in range(turns)
        ]
        own = [
            self.seconds.get((c.algorithm, c.segment), self.seconds[c.algorithm, None]) for c in candidates
        ]
        return np.asarray(np.array(factors) * np.array(own))


def case(nbytes: int, collective: str = "allreduce") -> Case:
    return Case(collective, nbytes, nbytes)


def examined(nbytes: int, times: FakeTimes, default: str = "ring") -> Finding:
    return search.examine(case(nbytes), default, NAMES, times)


# -- search


def test_the_crossovers_are_those_of_the_times() -> None:
    """Costs alpha + beta n: ring is worth its start from 10,000 bytes on, and is always the static choice."""
    alpha, beta = (
        {"ring": 11.0, "two_shot": 1.0, "direct": 30.0},
        {"ring": 1e-3, "two_shot": 2e-3, "direct": 3e-3},
    )
    findings = []
    for nbytes in [4**k for k in range(1, 9)]:
        seconds: dict[tuple[str, int | None], float]
        seconds = {(name, None): alpha[name] + beta[name] * nbytes for name in NAMES}
        findings.append(examined(nbytes, FakeTimes(seconds)))
    assert [f.pays for f in findings] == [4**k < 10_000 * 0.8 for k in range(1, 9)]
    (rule,) = search.rules(findings)
    assert rule == Rule("allreduce", 4, 8192, "ring", "two_shot", None, rule.gain)
    last = 1 - (1 + 2e-3 * 4096) / (11 + 1e-3 * 4096)
    assert rule.gain == pytest.approx(last, abs=1e-3), "what is gained at least"


@pytest.mark.parametrize("other", [0.95, 0.91, 1.0, 1.3])
def test_too_little_is_nothing(other: float) -> None:
    finding = examined(
        4 * KIB, FakeTimes({("ring", None): 1.0, ("two_shot", None): other, ("direct", None): 2.0})
    )
    assert (finding.pays, finding.best, finding.gain) == (False, Candidate("ring"), 0.0)
    assert search.rules([finding]) == []


def test_noise_gives_no_rule() -> None:
    """Candidates that are the same, in times that differ by a factor of 3, whatever the luck of a heat."""
    random = np.random.default_rng(1)
    for _ in range(200):
        noise = 1 + 2 * random.random(37)
        finding = examined(512 * KIB, FakeTimes({(name, None): 1.0 for name in NAMES}, noise.tolist()))
        assert not finding.pays


def test_a_gain_within_the_spread_is_noise() -> None:
    default = np.array([10.0, 20, 30, 40, 50])
    assert not search.pays(default, default * 0.85)
    assert search.pays(np.array([10.0, 10.1, 10.2, 9.9, 10]), np.array([8.0, 8.1, 8.2, 8.9, 8]))


def test_a_busy_machine_is_no_gain() -> None:
    """Another program takes away most turns of the one, and none of the other's."""
    default = np.array([3.0, 1, 3, 3, 3, 3])
    assert not search.pays(default, np.ones(6))


def test_segments_are_tried_for_the_best_two() -> None:
    times = FakeTimes(
        {("ring", None): 10.0, ("two_shot", None): 9.0, ("direct", None): 20.0, ("ring", 64 * KIB): 5.0}
    )
    finding = examined(256 * KIB, times)
    assert (finding.best, finding.pays) == (Candidate("ring", 64 * KIB), True)
    assert finding.gain == pytest.approx(0.5)
    tried = [candidate for candidate in times.heats[1][0] if candidate.segment is not None]
    assert {c.algorithm for c in tried} == {"ring", "two_shot"}
    assert {c.segment for c in tried} == {64 * KIB, 256 * KIB}, "none larger than the whole"
    assert times.heats[2] == ([Candidate("ring"), finding.best], search.FINAL)
    assert times.heats[3:] == [([Candidate("ring"), finding.best], search.FINAL)] * 4, "how far it reaches"
    small = FakeTimes(times.seconds)
    examined(64 * KIB, small)
    assert all(c.segment is None for candidates, _ in small.heats for c in candidates)


def test_blocks_that_others_do_not_know_have_no_segments() -> None:
    times = FakeTimes({("pairwise", None): 1.0, ("bruck", None): 0.5})
    finding = search.examine(case(1 << 20, "alltoall"), "pairwise", ("pairwise", "bruck"), times)
    assert finding.best == Candidate("bruck")


def found(nbytes: int, best: str, default: str = "ring", gain: float = 0.5, **more: Any) -> Finding:
    seconds, reach = (1.0, 1 - gain), (-(-nbytes // 2), 2 * nbytes)
    one, other = Candidate(default), Candidate(best)
    return Finding(case(nbytes, **more), one, seconds[0], other, seconds[1], best != default, *reach)


def test_rules_are_joined_and_do_not_overlap() -> None:
    findings = [
        found(16, "direct"),
        found(8, "two_shot"),
        found(64, "direct", gain=0.2),
        found(256, "ring"),
        found(1024, "direct"),
        found(4096, "direct", default="two_shot"),
        found(16384, "ring", default="two_shot"),
        found(4096, "two_shot", collective="allgather"),
    ]
    assert search.rules(findings) == [
        Rule("allreduce", 4, 12, "ring", "two_shot", None, 0.5),
        Rule("allreduce", 12, 128, "ring", "direct", None, 0.2),
        Rule("allreduce", 512, 4096, "ring", "direct", None, 0.5),
        Rule("allreduce", 1024, 8192, "two_shot", "direct", None, 0.5),
        Rule("allreduce", 8192, 32768, "two_shot", "ring", None, 0.5),
        Rule("allgather", 2048, 8192, "ring", "two_shot", None, 0.5),
    ]


# What a library does at 4096 bytes: from there on it asks before it sends.
@pytest.mark.parametrize(
    ("good", "begin", "end"),
    [
        ((4096, 1 << 30), 4096, 8192),
        ((3000, 6000), 4096, 5792),
        ((2500, 8192), 2896, 8192),
        ((0, 4097), 2048, 4100),
        ((0, 1 << 30), 2048, 8192),
    ],
)
def test_a_rule_reaches_as_far_as_it_was_tried(good: tuple[int, int], begin: int, end: int) -> None:
    tried: list[int] = []

    def times(case: Case, candidates: Sequence[Candidate], turns: int) -> FloatArray:
        assert case.nbytes == 2 * case.size and case.size % 2 == 0
        tried.append(case.nbytes)
        fast = 0.5 if good[0] <= case.nbytes < good[1] else 3.0
        return np.tile([fast if c.algorithm == "direct" else 1.0 for c in candidates], (turns, 1))

    finding = search.examine(Case("alltoall", 2048, 4096, 2), "pairwise", ("pairwise", "direct"), times)
    (rule,) = search.rules([finding])
    assert (rule.begin, rule.end) == (begin, end)
    assert begin in tried and end - 4 in tried


def test_rules_that_do_not_meet_are_two() -> None:
    """Of sizes between, nothing is known."""
    findings = [replace(found(16, "direct"), end=20), found(64, "direct")]
    assert [(rule.begin, rule.end) for rule in search.rules(findings)] == [(8, 20), (32, 128)]


@pytest.mark.parametrize("nranks", [2, 3, 8])
def test_cases_are_whole_and_each_once(nranks: int) -> None:
    made = measure.cases(list(measure.METHODS), 4, 4 * KIB, nranks)
    assert len(set(made)) == len(made)
    for each in made:
        assert each.size % (4 * (nranks if measure.METHODS[each.collective][1] else 1)) == 0
        assert each.nbytes == each.size * (nranks if each.collective == "alltoall" else 1)
    assert [each.size for each in made if each.collective == "allreduce"] == [4, 16, 64, 256, 1024, 4096]


# -- the static choice gives way


def test_a_measured_segment_replaces_the_usual_one() -> None:
    assert tuning.pipeline(2, 1 << 20, segment=KIB) == Pipeline(KIB, 1, tuning.SEQUENTIAL)
    assert tuning.pipeline(4, 1 << 20, True, KIB) == replace(tuning.EAGER, segment=KIB)
    assert tuning.pipeline(4, 1 << 20, True) is tuning.EAGER


def test_a_rule_is_for_its_sizes_and_for_one_static_choice() -> None:
    rule = Rule("allreduce", 100, 200, "ring", "direct")
    choices = Choices((rule, Rule("reduce", 0, 1000, "chain", "binomial")))
    assert [choices.rule("allreduce", n, "ring") for n in (99, 100, 199, 200)] == [None, rule, rule, None]
    assert choices.rule("allreduce", 150, "two_shot") is None
    assert choices.rule("allgather", 150, "ring") is None


def test_an_algorithms_schedule_has_its_name() -> None:
    """By which a rule finds the schedule whose segments it knows."""
    for collective, functions in algorithms.ALGORITHMS.items():
        for name in functions:
            schedule = algorithms.schedule(collective, name, 4)
            assert (schedule.collective, schedule.name) == (collective, name)


# -- the file

VERSION = "Open MPI v5.0.8, made by somebody\nmore of it\0"
RULES = (
    Rule("allreduce", 1024, 4096, "ring", "two_shot", None, 0.25),
    Rule("broadcast", 4096, 1 << 40, "chain", "hierarchical", 65536, 0.125),
)


def place(**given: Any) -> Place:
    default = {"ranks": 2, "ranks_per_node": 2, "network": False, "crowded": False}
    return Place(table.machine_name(), table.mpi_build(VERSION), **{**default, **given})


def entry(rules: tuple[Rule, ...] = RULES, **given: Any) -> Entry:
    return Entry(place(**given), "2026-03-01", rules)


def choices(file: Path, version: str = VERSION, **given: Any) -> tuple[Choices, str]:
    asked = {"ranks": 2, "ranks_per_node": 2, "network": False, "crowded": False, **given}
    return table.choices_for(version, **asked, environ={"MPICOLL_TUNING": str(file)})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "not yet there" / "tuning.json"
    table.write(file, entry())
    table.write(file, entry(RULES[:1], ranks=3))
    table.write(file, entry((), ranks=4))
    assert table.read(file) == [entry(), entry(RULES[:1], ranks=3), entry((), ranks=4)]
    assert choices(file) == (Choices(RULES, f"{file}: 2 rules, measured 2026-03-01"), "")
    assert choices(file, ranks=3)[0].rules == RULES[:1]
    assert [path.name for path in file.parent.iterdir()] == ["tuning.json"]
    assert len(file.read_text().splitlines()) < 50, "for people to read"


def test_only_the_same_place_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    table.write(file, entry())
    table.write(file, entry(network=True))
    table.write(file, replace(entry(RULES[1:]), measured="2026-03-02"))
    assert table.read(file) == [entry(network=True), replace(entry(RULES[1:]), measured="2026-03-02")]


@pytest.mark.parametrize(
    "other",
    [
        {"ranks": 3},
        {"ranks_per_node": 1},
        {"network": True},
        {"crowded": True},
        {"version": VERSION.replace("somebody", "others")},
        {"version": VERSION.replace("more", "less")},
    ],
    ids=str,
)
def test_elsewhere_nothing_holds(other: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    table.write(file, entry())
    found, problem = choices(file, **other)
    assert (found.rules, problem) == ((), "")
    assert found.origin.startswith(f"none: {file} has nothing for {other.get('ranks', 2)} ranks, ")


def test_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tuning.json"
    table.write(file, entry())
    monkeypatch.setattr(table, "machine_name", lambda: "1 × abacus")
    assert choices(file)[0].rules == ()


def test_off_and_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    asked: dict[str, Any] = {"ranks": 2, "ranks_per_node": 2, "network": False, "crowded": False}
    found, problem = table.choices_for(VERSION, **asked, environ={})
    file = tmp_path / "mpicoll" / "tuning.json"
    assert (found.rules, problem) == ((), ""), "most people have none"
    assert found.origin == f"none: there is no {file}; `mpicoll tune` makes it"
    table.write(file, entry())
    assert table.choices_for(VERSION, **asked, environ={})[0].rules == RULES
    off = table.choices_for(VERSION, **asked, environ={"MPICOLL_TUNING": "off"})
    assert off == (Choices((), "none: MPICOLL_TUNING is off"), "")
    _, problem = choices(tmp_path / "typo.json")
    assert problem == f"{tmp_path / 'typo.json'}: not used for tuning: No such file or directory"


def damaged(**changes: Any) -> dict[str, Any]:
    """A table with one entry that has one rule, and something wrong in the rule."""
    rule = {"collective": "allreduce", "begin": 1, "end": 2, "instead_of": "ring", "algorithm": "direct"}
    fields = {**rule, "segment": None, "gain": 0.1, **changes}
    own = {"machine": "m", "mpi": "l", "ranks": 2, "ranks_per_node": 2, "network": False, "crowded": False}
    return {"format": table.FORMAT, "version": 1, "entries": [{**own, "measured": "d", "rules": [fields]}]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "expected JSON, got "),
        ("[1, 2]", 'expected "format": "mpicoll tuning", got another file'),
        ('{"format": "mpicoll tuning", "version": 7}', "expected version 1, got 7"),
        ('{"format": "mpicoll tuning", "version": 1}', "entries: expected a list, got None"),
        (
            damaged(collective="alreduce"),
            "entries[0].rules[0].collective: expected a collective, got 'alreduce'",
        ),
        (damaged(algorithm="rign"), "entries[0].rules[0].algorithm: expected one of ring, "),
        (damaged(begin="1K"), "entries[0].rules[0].begin: expected int, got '1K'"),
        (damaged(end=True), "entries[0].rules[0].end: expected int, got True"),
        (damaged(segment=0), "entries[0].rules[0].segment: expected bytes, 1 or more, got 0"),
        (damaged(gain=None), "entries[0].rules[0].gain: expected int or float, got None"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_damaged_file_is_named(text: str | dict[str, Any], problem: str, tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    found, said = choices(file)
    assert found.rules == ()
    assert said.startswith(f"{file}: not used for tuning: {problem}"), said
    assert found.origin.startswith(f"none: {file}: {problem}")
    before = file.read_text()
    with pytest.raises(table.TableError):
        table.write(file, entry())
    assert file.read_text() == before, "what cannot be read is not lost"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert choices(tmp_path)[1] == f"{tmp_path}: not used for tuning: Is a directory"


def test_whoever_runs_the_tests_has_no_table() -> None:
    assert table.file_of(os.environ) is None


# -- times


class Told:
    """Whoever calls any of its methods is told on."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def __getattr__(self, method: str) -> Any:
        return lambda *given: self.told.append(f"{self.name}.{method}")


def test_buffers_are_written_and_ranks_meet_before_each_call() -> None:
    """What is not: an input that others have in their caches; a rank that has already begun the next call."""
    told: list[str] = []
    comm, plan, output, source = (Told(name, told) for name in ("comm", "plan", "output", "input"))
    timed: Any = measure._Timed(comm.Barrier, plan, [output, source])
    assert timed.turn(2) > 0
    once = ["output.fill", "input.fill", "comm.Barrier", "plan.Start", "plan.Wait"]
    assert told == 3 * once, "the first call warms caches up"


# -- calibration

TRUE = calibrate.Parameters(4e-7, 3e-7, 8e-7, 7e9, 1.3e10, 1.5e10)
FITTED_RANKS, FITTED_SIZES = (2, 3), (240, 24_000, 240_000, 2_400_000)


def simulated(parameters: calibrate.Parameters) -> list[calibrate.Row]:
    machine = calibrate.machine_of(parameters, "node", 4)
    return [
        calibrate.Row(collective, name, nranks, prediction.nbytes, prediction.seconds)
        for nranks in FITTED_RANKS
        for collective, names in calibrate.TIMED.items()
        for name in names
        for prediction in simulate_sizes(algorithms.schedule(collective, name, nranks), FITTED_SIZES, machine)
    ]


@pytest.fixture(scope="module")
def fitted() -> calibrate.Fit:
    return calibrate.fit(simulated(TRUE))


def test_the_fit_recovers_what_times_were_made_of(fitted: calibrate.Fit) -> None:
    found = fitted.parameters
    assert astuple(found)[:6] == pytest.approx(astuple(TRUE)[:6], rel=1e-3)
    assert found.factors + found.reduce_factors == pytest.approx([1] * 2 * len(calibrate.KNOTS), abs=1e-3)
    assert fitted.worst_error < 1e-4
    assert fitted.share_within(1e-4) == 1


def test_the_machine_file_is_one(fitted: calibrate.Fit) -> None:
    text = calibrate.to_toml(fitted, "node", 2)
    machine = Machine.loads(text, "machine.toml")
    (level,) = machine.levels
    assert machine.capacity == 4, "room for all ranks that were measured"
    found = machine.start, machine.overhead, level.latency
    assert found == pytest.approx((4e-7, 3e-7, 8e-7), rel=1e-3)
    found = level.bandwidth, level.total_bandwidth, machine.reduce_bandwidth
    assert found == pytest.approx((7e9, 1.3e10, 1.5e10), rel=1e-3)
    assert [size for size, _ in level.curve.points] == list(calibrate.KNOTS)
    assert [size for size, _ in machine.reduce_curve.points] == list(calibrate.KNOTS)
    free = replace(fitted, parameters=replace(fitted.parameters, total_bandwidth=1e16))
    assert "total_bandwidth" not in calibrate.to_toml(free, "network", 16)
    assert Machine.loads(calibrate.to_toml(free, "network", 16), "machine.toml").capacity == 16


def test_the_fit_follows_a_library_that_asks_before_it_sends_and_a_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrate, "CURVE_STEPS", 0)
    factors = tuple(3.0 if 2048 < size < 32_768 else 1.0 for size in calibrate.KNOTS)
    reduce_factors = tuple(2.0 if size > 300_000 else 1.0 for size in calibrate.KNOTS)
    rows = simulated(replace(TRUE, factors=factors, reduce_factors=reduce_factors))
    without = calibrate.fit(rows)
    assert without.worst_error > 0.2
    monkeypatch.setattr(calibrate, "CURVE_STEPS", 8)
    assert calibrate.fit(rows).worst_error < 0.05


def test_one_disturbed_time_bends_nothing() -> None:
    rows = simulated(TRUE)
    rows[7] = replace(rows[7], seconds=50 * rows[7].seconds)
    fit = calibrate.fit(rows)
    assert fit.median_error < 0.02
    assert fit.errors[7] == pytest.approx(-0.98, abs=0.01)


def test_errors_are_relative() -> None:
    fit = calibrate.Fit(TRUE, (0.1, -0.3, 0.2, -0.05, 0.0))
    assert (fit.median_error, fit.worst_error, fit.share_within(0.2)) == (0.1, 0.3, 0.8)


# -- online


def test_the_best_of_each_bucket() -> None:
    seconds = np.array([[10.0, 10, 10], [9.5, 20, 8], [11, 5, 7]])
    assert online.best(seconds, ["auto", "ring", "direct"]) == ["auto", "direct", "direct"]
