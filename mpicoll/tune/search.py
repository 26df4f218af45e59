"""From times to rules: which candidate is better than the static choice, by more than noise.

Vocabulary
----------
case       a collective and a size.
candidate  an algorithm, and the bytes of a segment if they are not the usual ones.
turn       all candidates, one after the other, for some milliseconds each; what disturbs a machine for a
           while disturbs all of them.

A case goes through up to four heats:

    survey     every algorithm, in few turns
    segments   the two best with other segments, where messages are large enough to be cut
    final      the best against the static choice, in many turns
    reach      the two again at other sizes, if the best has won

Who wins the first two counts for nothing: among many candidates it is often the luckiest. The winner is kept
if its median and its least are `GAIN` less than those of the static choice, and three quarters of its turns
are quicker than three quarters of the other's: what another program takes away is never in the least.

A rule holds for up to twice the size, and for down to half of it, as far as the best is better there, too:
somewhere on the way a library may begin to ask before it sends. Where two sizes have the same best, and their
ranges meet, they have one rule.

Example, medians in µs of an allreduce whose static choice is ring:

    size     ring   two_shot   direct
    64K        40         39       60       two_shot gains 2 %: no rule
    256K      120         90      200       rule: from 128K to 512K two_shot instead of ring
    1M        400        300      900       the same, so one rule: from 128K to 2M

Nothing here knows of MPI: times are a function of a case, candidates and a number of turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt

from mpicoll.sizes import format_size
from mpicoll.tune.table import Rule

FloatArray = npt.NDArray[np.float64]

GAIN = 0.1  # of the time, at least: the same program's runs differ by half of that
SURVEY, FINAL = 3, 11  # turns
REACH = (2**0.5, 2)  # times a size, or the size over it: where rules are tried, one after the other
SEGMENTED = 128 << 10  # bytes from which on other segments are tried
SEGMENTS = (
    64 << 10,
    256 << 10,
    1 << 20,
    8 << 20,
)  # bytes; half of a core's second-level cache, and around it
BEST = 2  # candidates that go from the survey to the heat of segments

UNSEGMENTED = ("gather", "scatter", "alltoall")  # ranks do not know the sizes of each other's blocks


@dataclass(frozen=True)
class Case:
    """``size`` is that of the vector or of all blocks that one rank has; ``nbytes`` what rules count.

    Sizes are multiples of ``unit``, an item of each block.
    """

    collective: str
    size: int
    nbytes: int
    unit: int = 4

    def at(self, size: float) -> Case:
        """The same at another size, rounded down."""
        whole = int(size) // self.unit * self.unit
        return replace(self, size=whole, nbytes=whole * self.nbytes // self.size)


@dataclass(frozen=True)
class Candidate:
    """``segment`` is None where messages are cut as usual."""

    algorithm: str
    segment: int | None = None

    def __str__(self) -> str:
        return self.algorithm if self.segment is None else f"{self.algorithm}/{format_size(self.segment)}"


Times = Callable[[Case, Sequence[Candidate], int], FloatArray]  # seconds, [turns, candidates]


@dataclass(frozen=True)
class Finding:
    """What came of a case: times in seconds, and whether ``best`` is worth a rule, for which bytes."""

    case: Case
    default: Candidate
    default_seconds: float
    best: Candidate
    best_seconds: float
    pays: bool
    begin: int = 0
    end: int = 0

    @property
    def gain(self) -> float:
        """The part of the default's time that the best saves."""
        return 1 - self.best_seconds / self.default_seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "collective": self.case.collective,
            "size": self.case.size,
            "bytes": self.case.nbytes,
            "default": self.default.algorithm,
            "default_seconds": self.default_seconds,
            "best": self.best.algorithm,
            "segment": self.best.segment,
            "best_seconds": self.best_seconds,
            "gain": self.gain,
            "kept": self.pays,
        }


def examine(case: Case, default: str, algorithms: Sequence[str], times: Times) -> Finding:
    """Find the best of ``algorithms`` for ``case``; ``default`` is the static choice, and one of them."""
    usual = Candidate(default)
    survey = [usual, *(Candidate(name) for name in algorithms if name != default)]
    surveyed = times(case, survey, SURVEY)
    ratios = _ratios(survey, surveyed)
    if others := _segmented(case, sorted(ratios, key=ratios.__getitem__)[:BEST]):
        ratios |= _ratios([usual, *others], times(case, [usual, *others], SURVEY))
    best = min(ratios, key=ratios.__getitem__)
    if best == usual or ratios[best] > 1 - GAIN:
        seconds = float(np.median(surveyed[:, 0]))
        return Finding(case, usual, seconds, usual, seconds, False)
    final = times(case, [usual, best], FINAL)
    seconds, best_seconds = np.median(final, axis=0).tolist()
    if best_seconds >= seconds:
        return Finding(case, usual, seconds, usual, seconds, False)
    finding = Finding(case, usual, seconds, best, best_seconds, pays(final[:, 0], final[:, 1]))
    return _reaching(finding, times) if finding.pays else finding


def _reaching(finding: Finding, times: Times) -> Finding:
    """With the range in which the best pays, as far as it is tried."""
    case = finding.case

    def holds(other: Case) -> bool:
        if not other.size:
            return False
        seconds = times(other, [finding.default, finding.best], FINAL)
        return pays(seconds[:, 0], seconds[:, 1])

    below = list(takewhile(holds, (case.at(case.size / factor) for factor in REACH)))
    above = list(takewhile(holds, (case.at(case.size * factor - 1) for factor in REACH)))
    begin, last = ([case, *found][-1] for found in (below, above))
    return replace(finding, begin=begin.nbytes, end=last.at(last.size + last.unit).nbytes)


def _ratios(candidates: Sequence[Candidate], seconds: FloatArray) -> dict[Candidate, float]:
    """The median time of each over that of the first."""
    medians = np.median(seconds, axis=0)
    return dict(zip(candidates, (medians / medians[0]).tolist(), strict=True))


def _segmented(case: Case, best: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with other segments."""
    if case.nbytes < SEGMENTED or case.collective in UNSEGMENTED:
        return []
    useful = [segment for segment in SEGMENTS if segment <= case.nbytes]
    return [replace(candidate, segment=segment) for candidate in best for segment in useful]


def pays(default: FloatArray, other: FloatArray) -> bool:
    """Whether ``other`` takes less time than ``default``, by `GAIN` and beyond their spread."""
    enough = all(f(other) <= (1 - GAIN) * f(default) for f in (np.median, np.min))
    return bool(enough and np.quantile(other, 0.75) < np.quantile(default, 0.25))


def rules(findings: Sequence[Finding]) -> list[Rule]:
    """The rules that follow; in order of collectives and sizes."""
    made: list[Rule] = []
    for collective in dict.fromkeys(finding.case.collective for finding in findings):
        own = [finding for finding in findings if finding.case.collective == collective]
        made += _of_one_collective(sorted(own, key=lambda finding: finding.case.nbytes))
    return made


def _of_one_collective(findings: Sequence[Finding]) -> list[Rule]:
    """One rule for neighbours that say the same; where the ranges of two winners overlap they are cut."""
    made: list[Rule] = []
    before: Finding | None = None  # the size before, if it has a rule, the last one made
    for finding in findings:
        if not finding.pays:
            before = None
            continue
        rule = _rule(finding)
        if before is None or before.best != finding.best or rule.begin > made[-1].end:
            made += _apart(made, rule)
        elif before.default == finding.default:
            made[-1] = replace(made[-1], end=rule.end, gain=min(made[-1].gain, rule.gain))  # true of both
        else:  # of all sizes between, some have one static choice and some the other
            made[-1] = replace(made[-1], end=finding.case.nbytes)
            made.append(replace(rule, begin=before.case.nbytes))
        before = finding
    return made


def _apart(made: list[Rule], rule: Rule) -> list[Rule]:
    """The rule that follows those, of which the last is cut off where it begins."""
    if made and made[-1].end > rule.begin:
        middle = (made[-1].end + rule.begin) // 2
        made[-1], rule = replace(made[-1], end=middle), replace(rule, begin=middle)
    return [rule]


def _rule(finding: Finding) -> Rule:
    return Rule(
        finding.case.collective,
        finding.begin,
        finding.end,
        finding.default.algorithm,
        finding.best.algorithm,
        finding.best.segment,
        round(finding.gain, 3),
    )
