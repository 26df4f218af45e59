"""Small random changes to training samples that leave their labels true.

    shift:K     each image moved by whole pixels, by -K to K in either direction; black moves in
    flip        every second image mirrored, left to right
    noise:S     S times a standard normal number added to each number of a sample

They are done in this order, to batches as they are trained on (standardised: S is in standard deviations).
What happens to a sample is a function of the seed, the epoch and the sample's number alone. So the parameters
stay the same at any number of ranks, and when a run is taken up inside an epoch.

The normal numbers come from uniform ones u, v: sqrt(-2 ln(1 - u)) cos(2 pi v) (G. Box, M. Muller, "A Note
on the Generation of Random Normal Deviates", 1958).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mpicoll.train.arrays import Array, array_module
from mpicoll.train.errors import InputError
from mpicoll.train.seeds import hashed_uniform

EXAMPLE = "shift:1,flip,noise:0.1"


@dataclass(frozen=True)
class Augmentation:
    """What is done to training samples; see `parse_augmentation`."""

    shift: int = 0  # pixels
    flip: bool = False
    noise: float = 0.0  # standard deviations

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `InputError` unless samples of ``shape`` can be changed so: images for shifts and flips."""
        if (self.shift or self.flip) and len(shape) < 2:
            raise InputError(
                f"augmentation: expected images, of height and width, to shift or flip, got samples of shape "
                f"{shape}; for tables there is noise"
            )
        if self.shift and self.shift >= min(shape[-2:]):
            raise InputError(
                f"augmentation: expected shifts smaller than the images, {shape[-2]} x {shape[-1]}, "
                f"got shift:{self.shift}"
            )

    def apply(self, x: Array, sample_numbers: Array, seed: int, epoch: int, fill: float = 0.0) -> Array:
        """``x`` [n, ...] changed, a new array of its dtype; the samples have ``sample_numbers`` [n].

        ``fill`` is what a black pixel is in ``x``: `Dataset.black`. Raises `InputError` as `check` does.
        """
        self.check(x.shape[1:])
        numbers = array_module(x).asarray(sample_numbers)
        if self.shift:
            x = _shifted(x, numbers, self.shift, fill, seed, epoch)
        if self.flip:
            x = _flipped(x, numbers, seed, epoch)
        if self.noise:
            x = _noisy(x, numbers, self.noise, seed, epoch)
        return x


def _shifted(x: Array, numbers: Array, most: int, fill: float, seed: int, epoch: int) -> Array:
    """out[..., i, j] = x[..., i - down, j - right]."""
    xp = array_module(x)
    for axis, direction in ((-2, "down"), (-1, "right")):
        by = hashed_uniform(seed, f"shift {direction}", epoch, numbers) * (2 * most + 1) // 1 - most
        length = x.shape[axis]
        origin = xp.arange(length) - by.astype(np.int64)[:, None]
        form = [len(x)] + [1] * (x.ndim - 1)
        form[axis] = length
        inside = ((origin >= 0) & (origin < length)).reshape(form)
        moved = xp.take_along_axis(x, origin.clip(0, length - 1).reshape(form), axis)
        x = xp.where(inside, moved, xp.asarray(fill, x.dtype))
    return x


def _flipped(x: Array, numbers: Array, seed: int, epoch: int) -> Array:
    mirrored = hashed_uniform(seed, "flip", epoch, numbers) < 0.5
    return array_module(x).where(mirrored.reshape(-1, *[1] * (x.ndim - 1)), x[..., ::-1], x)


def _noisy(x: Array, numbers: Array, deviation: float, seed: int, epoch: int) -> Array:
    xp = array_module(x)
    counters = epoch, numbers[:, None], xp.arange(math.prod(x.shape[1:]))
    radius = xp.sqrt(-2 * xp.log1p(-hashed_uniform(seed, "noise radius", *counters)))
    normal = radius * xp.cos(2 * math.pi * hashed_uniform(seed, "noise angle", *counters))
    return x + (deviation * normal).astype(x.dtype).reshape(x.shape)


# Text -------------------------------------------------------------------------------------------------


def parse_augmentation(text: str) -> Augmentation | None:
    """What ``shift:1,flip,noise:0.1``, or some of it, names; None for ``none``. Raises `InputError`."""
    if text.strip() in ("", "none"):
        return None
    chosen: dict[str, Any] = {}
    for item in text.split(","):
        name, colon, value = (part.strip() for part in item.partition(":"))
        if name in chosen:
            raise InputError(f"augmentation: expected {name} once, got {text!r}")
        chosen[name] = _strength(item.strip(), name, colon, value)
    return Augmentation(**chosen)


def _strength(item: str, name: str, colon: str, value: str) -> Any:
    """What an `Augmentation` holds for this item."""
    names = [field.name for field in fields(Augmentation)]
    if name not in names:
        raise InputError(f"augmentation: expected some of {', '.join(names)}, as in {EXAMPLE}, got {item!r}")
    if name == "flip":
        if colon:
            raise InputError(f"augmentation: expected flip without a number, got {item!r}")
        return True
    if name == "shift":
        if not value.isdecimal() or not int(value):
            raise InputError(f"augmentation: expected shift:PIXELS, a whole number from 1, got {item!r}")
        return int(value)
    try:
        deviation = float(value)
    except ValueError:
        deviation = math.nan
    if not 0 < deviation < math.inf:
        raise InputError(f"augmentation: expected noise:DEVIATIONS, a finite number above 0, got {item!r}")
    return deviation
