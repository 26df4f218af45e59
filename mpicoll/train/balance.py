"""Uneven machines: each rank gets a share of every batch that it can do in the time the others need.

With n_r the samples that rank r was given in the last steps and t_r the seconds it computed on them,

    speed_r = n_r / t_r,      share_r = speed_r / sum of all speeds

and half-way from the old shares to these, every `EVERY` steps. Where all ranks need equally long, shares stay
as they are. The gradient stays that of the whole batch, for every sample counts as before.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.train.sampling import parts

EVERY = 8  # steps; new shares count from as many later on, when batches made ahead of time are used up

Shares = npt.NDArray[np.float64]


class Balance:
    """The shares of all ranks of ``comm`` at each step, the same on every rank."""

    def __init__(self, comm: MPI.Intracomm):
        self.comm = comm
        self.history: list[tuple[int, Shares]] = [(0, np.full(comm.size, 1 / comm.size))]
        self.samples = 0
        self.seconds = 0.0

    def bounds(self, step: int, count: int) -> npt.NDArray[np.int64]:
        """Where each rank's part of a batch of ``count`` samples begins and ends at this step [ranks + 1].

        Each rank has a sample at least, if there are enough: without one it would not be measured.
        """
        shares = next(shares for first, shares in reversed(self.history) if first <= step)
        nranks = len(shares)
        if count < nranks:
            return parts(count, shares)
        return parts(count - nranks, shares) + np.arange(nranks + 1)

    def record(self, step: int, samples: int, seconds: float) -> None:
        """After each step: how many samples this rank computed on, and for how long. Collective."""
        self.samples += samples
        self.seconds += seconds
        if (step + 1) % EVERY:
            return
        measured = np.empty((self.comm.size, 2))
        self.comm.Allgather(np.array([self.samples, self.seconds]), measured)
        self.samples, self.seconds = 0, 0.0
        if measured.all():
            self._adjust(step + 1 + EVERY, measured[:, 0] / measured[:, 1])

    def _adjust(self, first: int, speeds: Shares) -> None:
        last = self.history[-1][1]
        self.history = [*self.history[-2:], (first, (last + speeds / speeds.sum()) / 2)]
