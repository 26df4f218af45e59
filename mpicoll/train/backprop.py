"""From samples to gradients: forward, loss, backward, for a part of a batch, in one piece or in several.

With l_i the loss of sample i, and c_i what it counts for in its batch (1 / batch size, or more for a rare
class), a rank computes of its part

    loss = sum of c_i l_i,      gradients = sum of c_i dl_i/dw

so that the sums over all ranks are the batch's loss and gradient, however unevenly it is divided.

In several pieces (gradient accumulation) one piece's activations are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from mpicoll.schedule import chunk_bounds
from mpicoll.train.arrays import Array
from mpicoll.train.layers import Context
from mpicoll.train.losses import Loss
from mpicoll.train.model import Sequential


@dataclass(frozen=True)
class Part:
    """Samples of a batch: ``x``, ``y``, ``counts`` [n] (see the module) and the layers' ``context``."""

    x: Array
    y: Array
    counts: Array
    context: Context

    def __len__(self) -> int:
        return len(self.x)

    def pieces(self, number: int) -> Iterator[Part]:
        """As many, as even as it goes; some may be empty."""
        for begin, end in pairwise(chunk_bounds(len(self), number).tolist()):
            rows = slice(begin, end)
            positions = self.context.positions
            context = replace(
                self.context,
                positions=None if positions is None else positions[rows],
                share=self.context.share * (end - begin) / max(1, len(self)),
            )
            yield Part(self.x[rows], self.y[rows], self.counts[rows], context)


def weighted_loss(loss: Loss, outputs: Array, part: Part) -> tuple[Array, Array]:
    """The part's loss, and its gradient with respect to ``outputs``.

    The loss is a number where the samples are: a GPU's stays there, for the host would have to wait for it.
    """
    losses, gradient = loss(outputs, part.y)
    gradient *= part.counts[:, None].astype(gradient.dtype)
    return losses @ part.counts, gradient


class Backprop:
    """Gradients of a whole model, in ``pieces`` of each part."""

    def __init__(self, model: Sequential, loss: Loss, pieces: int = 1):
        self.model = model
        self.loss = loss
        self.pieces = pieces

    def gradients(self, part: Part, ready: Callable[[int], None]) -> Array:
        """Fill ``model.gradients``; the part's loss. ``ready(i)``: the model's gradient i is complete."""
        loss: Array = 0.0
        for number, piece in enumerate(part.pieces(self.pieces), start=1):
            outputs, saved = self.model.forward(piece.x, piece.context)
            piece_loss, dy = weighted_loss(self.loss, outputs, piece)
            told = ready if number == self.pieces else _nobody
            self.model.backward(dy, saved, told, add=number > 1)
            loss += piece_loss
        return loss

    def outputs(self, x: Array) -> Array | None:
        """The model's outputs, as in use."""
        return self.model.forward(x)[0]


def _nobody(i: int) -> None:
    """Where there is more to come, nothing is ready."""
