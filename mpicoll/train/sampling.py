"""Which samples are learned from when, by which rank, and how much each counts.

Every rank draws the same order of samples for every epoch. Each *global* batch is then cut into one part per
rank: the union of the parts is the same at any rank count, so that 1 rank and 100 ranks take the same steps.
A part may be empty, and nothing but its size depends on the rank: a mean over the batch is the sum over all
parts, divided by the batch's size.

    epoch's order     a permutation of 0 ... n - 1, of (seed, epoch); or, with weights w, n draws with
                      replacement, sample i with probability w_i / sum(w)
    batch b           order[b size : (b + 1) size]; the last may be smaller
    rank r's part     batch[bounds[r] : bounds[r + 1]], as even as it goes, or in proportion to shares

Unbalanced classes, with n_c of the n samples in class c, are evened out either in the loss, by the weights
n / (classes n_c), or in the order, by drawing each sample with probability in proportion to 1 / n_c.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from mpicoll.schedule import chunk_bounds
from mpicoll.train.errors import InputError
from mpicoll.train.seeds import random_stream

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


# Order ------------------------------------------------------------------------------------------------


def global_batches(
    count: int, batch_size: int, seed: int, epoch: int, weights: Floats | None = None, first: int = 0
) -> Iterator[Indices]:
    """An epoch's batches of sample numbers, int64 [batch_size], the same on every rank.

    The last may be smaller.
    ``weights`` [count], not negative: then the epoch has as many samples, drawn with replacement, each with
    probability in proportion to its weight. The first ``first`` batches are left out: so a run is taken up
    inside an epoch. Raises `ValueError` for weights that cannot be probabilities.
    """
    if weights is None:
        order = random_stream(seed, "shuffle", epoch).permutation(count)
    else:
        order = _drawn(count, weights, random_stream(seed, "resample", epoch))
    return (order[start : start + batch_size] for start in range(first * batch_size, count, batch_size))


def _drawn(count: int, weights: Floats, random: np.random.Generator) -> Indices:
    below = np.cumsum(_shares("weights", weights, count))
    # No draw reaches the total, and none meets a sample of weight 0: it has no room between two sums.
    drawn: Indices = np.searchsorted(below, random.random(count) * below[-1], side="right")
    return drawn


# Parts ------------------------------------------------------------------------------------------------


def own_part(rank: int, nranks: int, count: int) -> slice:
    """Which of ``count`` samples, a global batch or the test set, ``rank`` works on."""
    bounds = chunk_bounds(count, nranks)
    return slice(int(bounds[rank]), int(bounds[rank + 1]))


def parts(count: int, shares: Sequence[float] | Floats) -> Indices:
    """``count`` samples cut in proportion to ``shares`` [nparts]: bounds from 0 to count, int64 [nparts + 1].

    By largest remainder: part i has floor(count share_i / sum) samples, and those left over go to the parts
    that lost the most by rounding down, so that none is a whole sample away from its due. A part without a
    share is empty. Equal shares give the bounds of `own_part`. Raises `ValueError` for shares that are
    negative, not finite, or all zero.
    """
    due = _shares("shares", shares, len(shares))
    if (due == due[0]).all():
        return chunk_bounds(count, len(due))
    due = count * (due / due.sum())
    sizes = np.floor(due).astype(np.int64)
    by_loss = np.argsort(sizes - due, kind="stable")  # of equals the first, on every machine
    sizes[by_loss[: count - sizes.sum()]] += 1
    return np.concatenate([[0], np.cumsum(sizes)])


def _shares(name: str, values: Sequence[float] | Floats, count: int) -> Floats:
    """As float64 [count], none negative, with a sum above 0."""
    array = np.asarray(values, np.float64)
    if array.shape != (count,) or count == 0:
        raise ValueError(f"{name}: expected {max(count, 1)} numbers, got shape {array.shape}")
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(f"{name}: expected finite numbers from 0, got {array[i]} as number {i}")
    if not 0 < array.sum() < math.inf:
        raise ValueError(f"{name}: expected a finite sum above 0, got {array.sum()}")
    return array


# Classes ----------------------------------------------------------------------------------------------


def class_weights(y: npt.NDArray[np.integer], classes: int) -> npt.NDArray[np.float32]:
    """What each class counts in the loss, so that all count alike: n / (classes n_c), float32 [classes].

    A class that no sample has gets 0. ``y`` are the training samples' class numbers [n]. Raises `InputError`
    for data without classes.
    """
    return (len(y) * _per_sample_of_class(y, classes)).astype(np.float32)


def sample_weights(y: npt.NDArray[np.integer], classes: int) -> Floats:
    """Probabilities [n] for `global_batches`, with which every class that occurs is drawn equally often."""
    weights = _per_sample_of_class(y, classes)[y]
    probabilities: Floats = weights / weights.sum()
    return probabilities


def _per_sample_of_class(y: npt.NDArray[np.integer], classes: int) -> Floats:
    """1 / (classes n_c), [classes]; 0 where n_c = 0."""
    if not classes:
        raise InputError("class weights: expected data with classes, got values to predict (regression)")
    counts = np.bincount(y, minlength=classes)
    return np.where(counts > 0, 1 / np.maximum(counts * classes, 1), 0)


def parse_class_weights(text: str, classes: int) -> npt.NDArray[np.float32]:
    """``0:1,3:2.5``: classes and what they count in the loss, as float32 [classes]; others count 1.

    Raises `InputError` for anything else, a class that there is not, or one that is named twice.
    """
    weights = np.ones(classes, np.float32)
    named: set[int] = set()
    for item in text.split(","):
        number, weight = _class_and_weight(item, classes)
        if number in named:
            raise InputError(f"class weights: expected each class once, got class {number} twice in {text!r}")
        named.add(number)
        weights[number] = weight
    if not weights.any():
        raise InputError(f"class weights: expected one above 0, got only zeros in {text!r}")
    return weights


def _class_and_weight(item: str, classes: int) -> tuple[int, float]:
    name, _, value = (part.strip() for part in item.partition(":"))
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not name.isdecimal() or not 0 <= weight < math.inf:
        raise InputError(
            f"class weights: expected CLASS:WEIGHT, such as 0:1,3:2.5, with finite weights from 0, "
            f"got {item.strip()!r}"
        )
    if int(name) >= classes:
        raise InputError(f"class weights: expected a class from 0 to {classes - 1}, got {name}")
    return int(name), weight
