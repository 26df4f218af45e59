"""Networks that the training command builds: perceptrons, and small convolutional ones for images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpicoll.train.arrays import Array
from mpicoll.train.errors import InputError
from mpicoll.train.layers import (
    EVALUATION,
    GELU,
    BatchNorm,
    Context,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Shape,
    Tanh,
)

ACTIVATIONS: dict[str, type[Layer]] = {"relu": ReLU, "gelu": GELU, "tanh": Tanh}
BATCH_NORMS = ("none", "rank", "synchronised")
CHANNELS = (8, 16)  # of the convolutions


class OneChannel(Layer):
    """[n, height, width] to [n, 1, height, width]."""

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Any]:
        return x[:, None], None

    def backward(self, dy: Array, saved: Any) -> Array:
        return dy[:, 0]


def perceptron(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    activation: str = "relu",
    dropout: float = 0.0,
    batch_norm: str = "none",
) -> list[Layer]:
    """Linear layers of the ``hidden`` sizes, each with its activation, for samples of any shape."""
    layers: list[Layer] = [Flatten()]
    for size in hidden:
        layers += [Linear(inputs, size), *_after(size, activation, batch_norm)]
        layers += [Dropout(dropout)] if dropout else []
        inputs = size
    return [*layers, Linear(inputs, outputs)]


def convolutional(
    shape: Shape,
    hidden: Sequence[int],
    outputs: int,
    activation: str = "relu",
    dropout: float = 0.0,
    batch_norm: str = "none",
) -> list[Layer]:
    """Convolutions of 3 x 3, each with its activation and a pooling that halves, and then a perceptron.

    ``shape`` is a sample's: (height, width) or (channels, height, width), of 4 x 4 pixels or more. Raises
    `InputError` for others.
    """
    least = 2 ** len(CHANNELS)
    if len(shape) not in (2, 3) or min(shape[-2:]) < least:
        raise InputError(
            f"model: expected images of {least} x {least} pixels or more for a cnn, got samples of shape "
            f"{shape}; see --model"
        )
    channels, height, width = shape if len(shape) == 3 else (1, *shape)
    layers: list[Layer] = [OneChannel()] if len(shape) == 2 else []
    for size in CHANNELS:
        layers += [Conv2d(channels, size, 3, padding=1), *_after(size, activation, batch_norm), MaxPool2d(2)]
        channels, height, width = size, height // 2, width // 2
    inputs = channels * height * width
    return [*layers, *perceptron(inputs, hidden, outputs, activation, dropout, batch_norm)]


def _after(size: int, activation: str, batch_norm: str) -> list[Layer]:
    """What comes after a layer that is linear."""
    norm = [] if batch_norm == "none" else [BatchNorm(size, synchronised=batch_norm == "synchronised")]
    return [*norm, ACTIVATIONS[activation]()]
