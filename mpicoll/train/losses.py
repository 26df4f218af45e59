"""Losses: from a model's outputs and the targets to each sample's loss and gradient.

They are not averaged: a rank sees its part of a batch only, not the batch's size.
"""

from __future__ import annotations

from collections.abc import Callable

from mpicoll.train.arrays import Array, array_module

Loss = Callable[[Array, Array], tuple[Array, Array]]


def softmax_cross_entropy(outputs: Array, labels: Array) -> tuple[Array, Array]:
    """loss = -log p[label] with p = exp(outputs) / sum(exp(outputs)); gradient = p - onehot(label).

    ``outputs`` [n, classes], ``labels`` [n] class numbers from 0; losses [n], gradient [n, classes].
    """
    xp = array_module(outputs)
    shifted = outputs - outputs.max(axis=1, keepdims=True)  # the same p, and exp cannot overflow
    log_p = shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))
    own = (xp.arange(len(labels)), labels)
    losses = -log_p[own]
    gradient = xp.exp(log_p)
    gradient[own] -= 1
    return losses, gradient


def mean_squared_error(outputs: Array, targets: Array) -> tuple[Array, Array]:
    """loss = mean over k outputs of (output - target)²; gradient = 2 (output - target) / k.

    ``targets`` has the shape of ``outputs``, [n, k]; losses [n], gradient [n, k].
    """
    difference = outputs - targets
    return (difference**2).mean(axis=1), difference * (2 / difference.shape[1])
