"""Learning rates that change: pure functions of the step, from 0, so that training goes on anywhere.

A rate is a function of the step that a strategy takes:

    rate(t) = peak * warm-up(t) * schedule(t)

The linear scaling rule (Goyal et al., arXiv:1706.02677): a batch k times as large takes steps k times as
long, after a warm-up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "step", "exponential", "cosine")


@dataclass(frozen=True)
class LearningRate:
    """``peak``, times what ``schedule`` says of the step; ``steps`` are those of the whole training.

    - constant: 1
    - step: ``factor`` to the power of the drops passed, one after every ``every`` steps
    - exponential: falls evenly, in logarithms, to ``factor`` at the end
    - cosine: (1 + cos(pi t / steps)) / 2

    In the first ``warmup`` steps it rises linearly to the peak, and the schedule begins then.
    """

    peak: float
    schedule: str = "constant"
    steps: int = 1
    warmup: int = 0
    factor: float = 0.1
    every: int = 1

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}; got {self.schedule!r}")
        if self.every < 1:
            raise ValueError(f"every: expected at least 1 step, got {self.every}")

    def __call__(self, step: int) -> float:
        """The rate of step ``step``, from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * self._decay(step - self.warmup, max(1, self.steps - self.warmup))

    def _decay(self, step: int, steps: int) -> float:
        done = min(1.0, step / steps)
        if self.schedule == "step":
            return float(self.factor ** (step // self.every))
        if self.schedule == "exponential":
            return float(self.factor**done)
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        return 1.0


def scaled_rate(rate: float, batch_size: int, base_batch: int) -> float:
    """The linear scaling rule: ``rate`` is right for ``base_batch`` samples a step."""
    return rate * batch_size / base_batch
