"""What a strategy is: how ranks that hold parts of a batch arrive at new parameters.

Each global batch is divided into ``parts``; a rank works on its ``own_parts``. With c_i what sample i counts
for in the batch (1 / batch size), ``model.gradients`` holds for each part

    g_part = sum over its samples of c_i dl_i/dw

so that the sum over all parts is the mean gradient of the batch, however unevenly it is divided. In a step:

    for each own part:  backward pass, which calls ready(i) when gradient i is complete
                        complete(part)
    step(rate, share)   from gradients to new parameters

``share`` is what the rank's samples count for together: 1/p where ranks have equally many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpicoll.train.arrays import Array, beside
from mpicoll.train.model import Sequential
from mpicoll.train.optimizer import Optimizer
from mpicoll.train.stopwatch import stopwatch


class Strategy:
    """The parts that are the same in most. ``comm`` has the ranks that share each batch.

    ``bytes_sent`` counts what this rank has given to others in its steps, ``seconds`` the time that it, or
    its GPU, spent on communicating and waiting, beside computing.
    """

    name = ""
    synchronous = True  # every step is that of a single process on the whole batch
    in_step = True  # all ranks are at the same step, so anything collective may come between two steps
    serves_only = False  # this rank does not train: it calls `serve` instead
    lost: tuple[int, ...] = ()  # ranks that have ended before the training has; nothing collective can follow

    def __init__(self, comm: MPI.Intracomm, model: Sequential, optimizer: Optimizer):
        self.comm = comm
        self.model = model
        self.optimizer = optimizer
        self.parts = comm.size
        self.own_parts = range(comm.rank, comm.rank + 1)
        self.bytes_sent = 0.0
        self._stopwatch = stopwatch(model.parameters)

    def start(self) -> None:
        """Before the first step: w_r = w_0, rank 0's parameters on all ranks. Collective."""
        self.comm.Bcast(self.model.parameters, root=0)

    def serve(self) -> None:
        """Do what other ranks ask for, until they have finished."""
        raise NotImplementedError

    @property
    def own_test_parts(self) -> range:
        """Which parts of the test set this rank evaluates, of as many as there are parts of a batch."""
        return self.own_parts

    def ready(self, i: int) -> None:
        """In the backward pass, when ``model.gradient_views[i]`` is complete."""

    def complete(self, part: int) -> None:
        """After the backward pass of one of ``own_parts``."""

    def step(self, rate: float, share: float) -> None:
        """From the gradients to new parameters, with this learning rate."""
        raise NotImplementedError

    def finish(self) -> None:
        """After the last step: all ranks arrive at the same parameters. Collective."""

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """A time in which the model has the parameters that all ranks together stand for. Collective."""
        yield

    def total(self, values: Sequence[float], op: MPI.Op = MPI.SUM) -> npt.NDArray[np.float64]:
        """Each of ``values`` over all ranks that train."""
        totals = np.array(values, np.float64)
        self.comm.Allreduce(MPI.IN_PLACE, totals, op=op)
        return totals

    def vectors(self) -> dict[str, Array]:
        """The optimizer's state for all of the model's parameters. Collective."""
        return {name: self.whole(vector) for name, vector in self.optimizer.state.items()}

    def restore(self, vectors: dict[str, Array], steps: int) -> None:
        """Take up the optimizer's state again. Collective."""
        self.optimizer.steps = steps
        for name, vector in vectors.items():
            state = self.optimizer.state[name]
            state[...] = beside(self.own(vector), state)

    def own_arrays(self) -> dict[str, Array]:
        """What only this rank has and needs to go on: a checkpoint keeps it, for as many ranks."""
        return {}

    def whole(self, own: Array) -> Array:
        """From this rank's part of a vector as long as the model's parameters, all of it. Collective."""
        return own

    def own(self, whole: Array) -> Array:
        """This rank's part of such a vector."""
        return whole

    def break_off(self) -> None:
        """A rank has died, and this one takes no further step: get the others out that wait for it in one."""

    def close(self) -> None:
        """Give up what was allocated. Collective."""

    @property
    def seconds(self) -> float:
        """See the class. Waits for a GPU to have done what it was given."""
        return self._stopwatch.seconds

    def communicating(self) -> AbstractContextManager[None]:
        """Count the time spent here."""
        return self._stopwatch.running()


def check_choice(argument: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of them."""
    if value not in choices:
        raise ValueError(f"{argument}: expected one of {', '.join(choices)}; got {value!r}")
