"""Layers, each as its equations; the same source for NumPy and CuPy arrays.

Vocabulary: ``x`` what goes into a layer, ``y = f(x)`` what comes out, ``dx`` and ``dy`` the loss's gradients
with respect to them; ``saved`` what ``backward`` needs of ``forward``. Layers keep none of it themselves, so
several batches may be on their way through a model at once, as in a pipeline. The first axis is always the
sample. A batch may be empty: then a rank has no part in it, and all its gradients are zero.

Samples are vectors, [n, features], or images, [n, channels, height, width]. Everything is computed in the
dtype of x and of the parameters.

A **parameter** is trained by the optimizer. A **statistic** (of `BatchNorm`) follows the samples: its
"gradient" is what is taken away from it at each step. So it travels with the gradients, in every strategy.

Images are seen through **windows** of size x size pixels. Instead of windows, `Windows` takes places in them:
view q of an image has the pixel at place q of every window. A convolution, and a maximum or a mean over
windows, are then sums and maxima of a few views, and their gradients additions to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from mpicoll.train.arrays import Array, array_module, on_host
from mpicoll.train.seeds import hashed_uniform

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """What layers know of the samples that they are given.

    ``step`` counts from 0, over all epochs; ``positions`` [n] are the rows' places in the global batch, and
    ``share`` how much of it they are, from 0 to 1. The same samples have the same context at any rank count.
    """

    training: bool = False
    step: int = 0
    positions: Array | None = None
    share: float = 1.0
    seed: int = 0


EVALUATION = Context()


@dataclass(frozen=True)
class Placement:
    """The part of a tensor of ``shape`` that a rank holds: ``index``; ``split``: other ranks hold others."""

    shape: Shape
    index: tuple[slice, ...]
    split: bool = False


class Layer:
    """A function y = f(x; parameters)."""

    shapes: tuple[Shape, ...] = ()  # of the parameters, then of the statistics
    names: tuple[str, ...] = ()
    statistics = 0  # how many of these are statistics: the last ones
    number = 0  # which layer of the model this is: `Sequential` sets it
    is_first = False  # that learns: so nobody needs its dx, which may be anything then; `Sequential` sets it

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Which parts of the model's tensors these are, one for each shape."""
        return tuple(Placement(shape, tuple(map(slice, shape))) for shape in self.shapes)

    def bind(self, parameters: Sequence[Array], gradients: Sequence[Array]) -> None:
        """Take these views, one per shape, as parameters and as the place for their gradients."""

    def initialise(self, random: np.random.Generator) -> None:
        """Give the parameters their first values."""

    def connect(self, comm: MPI.Intracomm) -> None:
        """Learn of the ranks that have the other parts of each batch."""

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Any]:
        """y = f(x), and what ``backward`` needs."""
        raise NotImplementedError

    def backward(self, dy: Array, saved: Any) -> Array:
        """dx; writes (not adds) the parameters' gradients, summed over samples, on the way."""
        raise NotImplementedError

    def _expect(self, x: Array, *sizes: int | str) -> None:
        """Raise ValueError unless samples have these sizes; a word stands for any."""
        got = x.shape[1:]
        fits = (isinstance(size, str) or size == own for size, own in zip(sizes, got, strict=False))
        if len(got) != len(sizes) or not all(fits):
            raise self._error(f"expected samples of {_times(sizes)} numbers, got {_times(got)}")

    def _error(self, text: str) -> ValueError:
        return ValueError(f"layer {self.number} ({type(self).__name__}): {text}")


def _times(sizes: Sequence[int | str]) -> str:
    return " x ".join(map(str, sizes)) or "1"


def _check_setting(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")


class Linear(Layer):
    """y = x W + b, with x [n, inputs], W [inputs, outputs], b [outputs]."""

    def __init__(self, inputs: int, outputs: int):
        self.shapes = ((inputs, outputs), (outputs,))
        self.names = ("weight", "bias")

    def bind(self, parameters: Sequence[Array], gradients: Sequence[Array]) -> None:
        self.weight, self.bias = parameters
        self.weight_gradient, self.bias_gradient = gradients

    def initialise(self, random: np.random.Generator) -> None:
        """W ~ N(0, 2 / inputs): keeps the variance through ReLUs (He et al., ICCV 2015); b = 0."""
        inputs, outputs = self.weight.shape
        weight = random.standard_normal((inputs, outputs)) * math.sqrt(2 / inputs)
        self.weight[...] = array_module(self.weight).asarray(weight)
        self.bias[...] = 0

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Any]:
        self._expect(x, self.weight.shape[0])
        y = x @ self.weight
        y += self.bias
        return y, x

    def backward(self, dy: Array, saved: Any) -> Array:
        x = saved
        array_module(dy).matmul(x.T, dy, out=self.weight_gradient)
        dy.sum(axis=0, out=self.bias_gradient)
        return dy if self.is_first else dy @ self.weight.T


class ReLU(Layer):
    """y = max(x, 0)."""

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Any]:
        y = array_module(x).maximum(x, 0)
        return y, y  # y, which the next layer mostly keeps as well: then it costs no memory

    def backward(self, dy: Array, saved: Any) -> Array:
        return dy * (saved > 0)


class Tanh(Layer):
    """y = tanh(x)."""

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Any]:
        y = array_module(x).tanh(x)
        return y, y

    def backward(self, dy: Array, saved: Any) -> Array:
        y = saved
        return dy * (1 - y * y)


class GELU(Layer):
    """y = x (1 + t) / 2, with t = tanh(c (x + a x³)), c = sqrt(2 / pi), a = 0.044715.

    This is the usual approximation, within 0.0005, of x Phi(x), Phi being the normal distribution function.
    Source: D. Hendrycks, K. Gimpel, "Gaussian Error Linear Units (GELUs)", arXiv:1606.08415.
    """

    A = 0.044715
    C = math.sqrt(2 / math.pi)

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Any]:
        t = array_module(x).tanh(self.C * x * (1 + self.A * x * x))
        return 0.5 * x * (1 + t), (x, t)

    def backward(self, dy: Array, saved: Any) -> Array:
        """dx = dy ((1 + t) + x (1 - t²) c (1 + 3 a x²)) / 2."""
        x, t = saved
        slope = (1 - t * t) * (self.C + 3 * self.A * self.C * x * x)
        return dy * (0.5 * (1 + t + x * slope))


class Flatten(Layer):
    """[n, a, b, ...] to [n, a b ...]."""

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Any]:
        # Not reshape(n, -1): for an empty batch NumPy cannot tell what -1 stands for.
        return x.reshape(len(x), math.prod(x.shape[1:])), x.shape

    def backward(self, dy: Array, saved: Any) -> Array:
        return dy.reshape(saved)


class Dropout(Layer):
    """In training, y = x m / (1 - rate), m being 0 for a share ``rate`` of the numbers, by lot, else 1.

    The division keeps the mean of y that of x. Otherwise y = x. A number's lot is a hash of the seed, the
    layer, the step, the sample's position in the global batch and the feature: it is the same wherever the
    sample is computed, and with whatever others.

    ``first_feature`` is the first number of a sample that this layer sees: set it where others see those
    before it. Source: N. Srivastava et al., "Dropout", JMLR 15, 2014.
    """

    first_feature = 0

    def __init__(self, rate: float):
        if not 0 <= rate < 1:
            raise ValueError(f"rate: expected a share from 0 to below 1, got {rate}")
        self.rate = rate

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Any]:
        if not context.training or self.rate == 0:
            return x, None
        factor = self._factor(x, context)
        return x * factor, factor

    def backward(self, dy: Array, saved: Any) -> Array:
        return dy if saved is None else dy * saved

    def _factor(self, x: Array, context: Context) -> Array:
        """m / (1 - rate) for each number of ``x``."""
        if context.positions is None:
            raise self._error("expected the samples' positions in the context that it trains in, got none")
        xp = array_module(x)
        positions = xp.asarray(context.positions)[:, None]
        features = xp.arange(self.first_feature, self.first_feature + math.prod(x.shape[1:]))
        lot = hashed_uniform(context.seed, "dropout", self.number, context.step, positions, features)
        factor = (lot >= self.rate).astype(x.dtype)
        factor *= 1 / (1 - self.rate)
        return factor.reshape(x.shape)


@dataclass(frozen=True)
class _Normalised:
    """What `BatchNorm` keeps of a batch; ``count`` 0: it was normalised with the running statistics."""

    x_hat: Array
    scale: Array  # 1 / sqrt(variance + epsilon)
    mean: Array
    variance: Array
    count: int
    share: float


class BatchNorm(Layer):
    """y = gamma x_hat + beta, x_hat = (x - mean) / sqrt(variance + epsilon), for each feature (or channel).

    In training mean and variance are those of the samples at hand (of all ranks' if ``synchronised``):

        mean = sum x / N,   variance = sum (x - mean)² / N,   over N = n, or n height width, numbers
        dx = gamma scale (dy - sum dy / N - x_hat sum (dy x_hat) / N),   scale = 1 / sqrt(variance + epsilon)

    Else they are the running ones, the layer's two statistics, which each step moves towards the samples':

        running -= momentum share (running - new),   new = mean,   or N / (N - 1) variance

    (biased to normalise with, unbiased to keep, as is common), summed over the parts of the batch: as the
    shares add up to 1, running moves by ``momentum`` towards the parts' mean. A single number (N = 1) is
    normalised to 0, and says nothing of the running variance.

    Synchronised, a layer takes part in two sums over ranks forward and one backward, also on a rank without
    samples; they go through the ``comm`` given to `connect`, and in evaluation there are none. Before
    `connect`, there are no other ranks. Gamma's and beta's gradients are of the own samples.

    Source: S. Ioffe, C. Szegedy, "Batch Normalization", ICML 2015.
    """

    names = ("gamma", "beta", "mean", "variance")
    statistics = 2

    def __init__(
        self, features: int, momentum: float = 0.1, epsilon: float = 1e-5, synchronised: bool = False
    ):
        self.shapes = ((features,),) * 4
        self.momentum = momentum
        self.epsilon = epsilon
        self.synchronised = synchronised
        self._comm: MPI.Intracomm | None = None

    def bind(self, parameters: Sequence[Array], gradients: Sequence[Array]) -> None:
        self.gamma, self.beta, self.mean, self.variance = parameters
        self.gamma_gradient, self.beta_gradient, self.mean_gradient, self.variance_gradient = gradients

    def initialise(self, random: np.random.Generator) -> None:
        """gamma = 1, beta = 0; mean 0, variance 1."""
        for values, first in (self.gamma, 1), (self.beta, 0), (self.mean, 0), (self.variance, 1):
            values[...] = first

    def connect(self, comm: MPI.Intracomm) -> None:
        if self.synchronised and comm.size > 1:
            self._comm = comm

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Any]:
        self._expect(x, len(self.gamma), *("height", "width")[: max(0, x.ndim - 2)])
        mean, variance, count = self.mean, self.variance, 0
        if context.training:
            mean, variance, count = self._batch_statistics(x)
        scale = 1 / array_module(x).sqrt(variance + self.epsilon)
        x_hat = x - _along_features(mean, x)
        x_hat *= _along_features(scale, x)
        y = x_hat * _along_features(self.gamma, x)
        y += _along_features(self.beta, x)
        return y, _Normalised(x_hat, scale, mean, variance, count, context.share)

    def backward(self, dy: Array, saved: Any) -> Array:
        kept: _Normalised = saved
        axes = _other_axes(dy)
        dy.sum(axis=axes, out=self.beta_gradient)
        (dy * kept.x_hat).sum(axis=axes, out=self.gamma_gradient)
        self._follow(kept)
        dx = dy
        if kept.count:
            xp = array_module(dy)
            sums, _ = self._total(xp.concatenate([self.beta_gradient, self.gamma_gradient]))
            mean, slope = sums.reshape(2, -1) / kept.count
            dx = dx - _along_features(mean, dy) - kept.x_hat * _along_features(slope, dy)
        return dx * _along_features(self.gamma * kept.scale, dy)

    def _batch_statistics(self, x: Array) -> tuple[Array, Array, int]:
        """Mean and variance [features], and the number of numbers (of each feature) that they are of."""
        axes = _other_axes(x)
        total, count = self._total(x.sum(axis=axes), x.size // len(self.gamma))
        mean = total / max(count, 1)
        deviations = x - _along_features(mean, x)
        squares, _ = self._total((deviations * deviations).sum(axis=axes))
        return mean, squares / max(count, 1), count

    def _total(self, sums: Array, count: int = 0) -> tuple[Array, int]:
        """Both over all samples that are normalised together, in the dtype of ``sums``."""
        if self._comm is None:
            return sums, count
        totals = np.append(on_host(sums).astype(np.float64), count)  # which has room for any count
        self._comm.Allreduce(MPI.IN_PLACE, totals)
        return array_module(sums).asarray(totals[:-1], dtype=sums.dtype), int(totals[-1])

    def _follow(self, kept: _Normalised) -> None:
        """The statistics' gradients."""
        step = self.momentum * float(kept.share) if kept.count else 0.0
        self.mean_gradient[...] = step * (self.mean - kept.mean)
        unbiased = kept.variance * (kept.count / max(kept.count - 1, 1))
        self.variance_gradient[...] = step * (self.variance - unbiased) if kept.count > 1 else 0


def _other_axes(x: Array) -> tuple[int, ...]:
    """All axes but that of the features, or channels."""
    return (0, *range(2, x.ndim))


def _along_features(values: Array, x: Array) -> Array:
    """``values`` [features] in a shape that broadcasts against ``x``."""
    return values.reshape(values.shape + (1,) * (x.ndim - 2))


@dataclass(frozen=True)
class Windows:
    """Squares of ``size`` pixels a side, every ``stride`` pixels; what does not fit at the end is left."""

    size: int
    stride: int

    def counts(self, height: int, width: int) -> tuple[int, int]:
        """How many fit, down and across."""
        return (height - self.size) // self.stride + 1, (width - self.size) // self.stride + 1

    def views(self, x: Array) -> list[Array]:
        """View q: of each image the pixels at place q, row by row, of every window: [n, c, down, across]."""
        down, across = self.counts(*x.shape[2:])
        s = self.stride
        rows = [slice(i, i + (down - 1) * s + 1, s) for i in range(self.size)]
        columns = [slice(j, j + (across - 1) * s + 1, s) for j in range(self.size)]
        return [x[:, :, i, j] for i in rows for j in columns]


class _Windowed(Layer):
    """A layer that sees images through windows."""

    def __init__(self, name: str, size: int, stride: int):
        _check_setting(name, size, 1)
        _check_setting("stride", stride, 1)
        self.windows = Windows(size, stride)

    def _expect_images(self, x: Array, channels: int | str, padding: int = 0) -> None:
        """Raise ValueError unless these are images, of one window or more."""
        self._expect(x, channels, "height", "width")
        least = self.windows.size - 2 * padding
        if min(x.shape[2:]) < least:
            raise self._error(f"expected images of {least} x {least} or more, got {_times(x.shape[2:])}")


class Conv2d(_Windowed):
    """y = W * x + b, with x [n, inputs, h, w], W [outputs, inputs, kernel, kernel], b [outputs].

        y[s, o, i, j] = b[o] + sum over c, k, l of  W[o, c, k, l] x[s, c, i stride + k, j stride + l]

    with ``padding`` rows and columns of zeros around x, and so y [n, outputs, h', w'] with
    h' = (h + 2 padding - kernel) // stride + 1. Computed as one matrix product, W [outputs, inputs kernel²]
    with the windows' pixels [inputs kernel², n h' w']: these take kernel² times the memory of x, so they are
    not kept for `backward` but copied anew.
    """

    names = ("weight", "bias")

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0):
        super().__init__("kernel", kernel, stride)
        _check_setting("padding", padding, 0)
        self.padding = padding
        self.shapes = ((outputs, inputs, kernel, kernel), (outputs,))

    def bind(self, parameters: Sequence[Array], gradients: Sequence[Array]) -> None:
        self.weight, self.bias = parameters
        self.weight_gradient, self.bias_gradient = gradients

    def initialise(self, random: np.random.Generator) -> None:
        """W ~ N(0, 2 / (inputs kernel²)), see `Linear`; b = 0."""
        weight = random.standard_normal(self.weight.shape) * math.sqrt(2 / self.weight[0].size)
        self.weight[...] = array_module(self.weight).asarray(weight)
        self.bias[...] = 0

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Any]:
        self._expect_images(x, self.weight.shape[1], self.padding)
        xp = array_module(x)
        p = self.padding
        padded = xp.pad(x, ((0, 0), (0, 0), (p, p), (p, p))) if p else x
        outputs = len(self.bias)
        product = self.weight.reshape(outputs, -1) @ self._pixels(padded)
        down, across = self.windows.counts(*padded.shape[2:])
        y = xp.empty((len(x), outputs, down, across), product.dtype)
        by_output = product.reshape(outputs, len(x), down, across)
        xp.add(by_output.swapaxes(0, 1), self.bias[:, None, None], out=y)
        return y, padded

    def backward(self, dy: Array, saved: Any) -> Array:
        xp = array_module(dy)
        padded = saved
        n, outputs, down, across = dy.shape
        by_output = dy.swapaxes(0, 1).reshape(outputs, n * down * across)
        pixels = self._pixels(padded)
        xp.matmul(by_output, pixels.T, out=self.weight_gradient.reshape(outputs, -1))
        by_output.sum(axis=1, out=self.bias_gradient)
        if self.is_first:
            return dy

        inputs = padded.shape[1]
        d_pixels = self.weight.reshape(outputs, -1).T @ by_output
        d_pixels = d_pixels.reshape(inputs, self.windows.size**2, n, down, across)
        d_padded = xp.zeros(padded.shape, dy.dtype)
        for q, view in enumerate(self.windows.views(d_padded)):
            view += d_pixels[:, q].swapaxes(0, 1)
        p, (height, width) = self.padding, padded.shape[2:]
        return xp.ascontiguousarray(d_padded[:, :, p : height - p, p : width - p])

    def _pixels(self, padded: Array) -> Array:
        """The windows' pixels [inputs kernel², n h' w']."""
        n, inputs, *size = padded.shape
        down, across = self.windows.counts(*size)
        views = self.windows.views(padded)
        pixels = array_module(padded).empty((inputs, len(views), n, down, across), padded.dtype)
        for q, view in enumerate(views):
            pixels[:, q] = view.swapaxes(0, 1)
        return pixels.reshape(inputs * len(views), n * down * across)


class MaxPool2d(_Windowed):
    """y = the largest number in each window of each channel; the first of several takes the gradient."""

    def __init__(self, size: int, stride: int | None = None):
        super().__init__("size", size, size if stride is None else stride)

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Any]:
        self._expect_images(x, "channels")
        xp = array_module(x)
        first, *others = self.windows.views(x)
        y = first.copy()
        where = xp.zeros(y.shape, np.int32)  # the place in its window
        for q, view in enumerate(others, start=1):
            where[view > y] = q
            xp.maximum(y, view, out=y)
        return y, (where, x.shape)

    def backward(self, dy: Array, saved: Any) -> Array:
        where, shape = saved
        dx = array_module(dy).zeros(shape, dy.dtype)
        for q, view in enumerate(self.windows.views(dx)):
            view += dy * (where == q)
        return dx


class AveragePool2d(_Windowed):
    """y = the mean of each window of each channel; windows lie side by side."""

    def __init__(self, size: int):
        super().__init__("size", size, size)

    def forward(self, x: Array, context: Context = EVALUATION) -> tuple[Array, Any]:
        self._expect_images(x, "channels")
        first, *others = self.windows.views(x)
        y = first.copy()
        for view in others:
            y += view
        y /= 1 + len(others)
        return y, x.shape

    def backward(self, dy: Array, saved: Any) -> Array:
        dx = array_module(dy).zeros(saved, dy.dtype)
        share = dy / self.windows.size**2
        for view in self.windows.views(dx):
            view[...] = share
        return dx
