"""The tensors of some models, as shapes in the order of their layers; all are float32.

The sizes of a model's tensors decide what fusing them is worth: most of ResNet-50's 161 are tiny, most of its
bytes are in a few. Sources: He et al. 2015, arXiv 1512.03385; Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import click
import numpy as np

Shape = tuple[int, ...]

ITEMSIZE = np.dtype(np.float32).itemsize


def _resnet50() -> Iterator[Shape]:
    """Bottleneck blocks: convolutions without biases, each with a batch normalisation's scale and shift."""
    yield from _convolution(3, 64, 7)
    channels = 64
    for width, nblocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(nblocks):
            yield from _convolution(channels, width, 1)
            yield from _convolution(width, width, 3)
            yield from _convolution(width, 4 * width, 1)
            if block == 0:  # the way around the block has to change its channels, too
                yield from _convolution(channels, 4 * width, 1)
            channels = 4 * width
    yield from _linear(channels, 1000)


def _convolution(channels: int, filters: int, side: int) -> list[Shape]:
    return [(filters, channels, side, side), (filters,), (filters,)]


def _gpt2() -> Iterator[Shape]:
    """GPT-2 small: its last layer shares the embedding of 50,257 tokens."""
    width = 768
    norm = [(width,), (width,)]
    yield from ((50257, width), (1024, width))
    for _ in range(12):
        yield from norm
        yield from _linear(width, 3 * width)
        yield from _linear(width, width)
        yield from norm
        yield from _linear(width, 4 * width)
        yield from _linear(4 * width, width)
    yield from norm


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


MODELS: dict[str, tuple[Shape, ...]] = {
    "resnet50": tuple(_resnet50()),
    "gpt2": tuple(_gpt2()),
    "mlp": (*_linear(784, 512), *_linear(512, 512), *_linear(512, 10)),
}
LISTS: dict[str, tuple[Shape, ...]] = {
    "resnet50": MODELS["resnet50"],
    "gpt2": MODELS["gpt2"],
    "big": ((1 << 28,),),  # 1 GiB
    "many": ((256,),) * 1000,  # of 1 KiB each
}


def counts(shapes: Sequence[Shape]) -> list[int]:
    """The elements of each tensor."""
    return [math.prod(shape) for shape in shapes]


def nbytes(shapes: Sequence[Shape]) -> int:
    """Of all tensors together."""
    return ITEMSIZE * sum(counts(shapes))


def check_room(what: str, needed: int, available: int) -> None:
    """Raise `click.UsageError` if ``needed`` bytes of memory for ``what`` are not to be had."""
    if needed > available:
        raise click.UsageError(
            f"{what} needs {_gibibytes(needed)} of memory, {_gibibytes(available)} are free"
        )


def _gibibytes(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.1f} GiB"
