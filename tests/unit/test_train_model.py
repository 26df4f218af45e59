"""Models, optimizers and data, without MPI ranks: gradients, splits and readers."""

import gzip
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpicoll.kernels import packing

from mpicoll.train import data as train_data
from mpicoll.train.data import Dataset
from mpicoll.train.errors import InputError
from mpicoll.train.model import (
    Flatten,
    Linear,
    ReLU,
    Sequential,
    mean_squared_error,
    perceptron,
    softmax_cross_entropy,
)
from mpicoll.train.optimizer import SGD
from mpicoll.train.readers import read_csv, read_digits, read_idx, read_mnist
from mpicoll.train.seeds import random_stream

AnyArray = npt.NDArray[Any]
Table = Callable[[str | bytes], Path]

# Models ---------------------------------------------------------------------------------------------


def small_model(seed: int = 0) -> Sequential:
    layers = Flatten(), Linear(6, 5), ReLU(), Linear(5, 4), ReLU(), Linear(4, 3)
    return Sequential(*layers, seed=seed, dtype=np.float64)


def numerical_gradient(function: Callable[[], float], at: AnyArray, step: float = 1e-6) -> AnyArray:
    """(f(x + h) - f(x - h)) / 2h for each number in ``at``."""
    gradient = np.empty_like(at)
    for i in range(at.size):
        kept = at.flat[i]
        at.flat[i] = kept + step
        above = function()
        at.flat[i] = kept - step
        gradient.flat[i] = (above - function()) / (2 * step)
        at.flat[i] = kept
    return gradient


@pytest.mark.parametrize("loss", [softmax_cross_entropy, mean_squared_error])
def test_gradients_are_those_of_finite_differences(loss: Any) -> None:
    random = np.random.default_rng(1)
    x = random.standard_normal((7, 2, 3))
    y = random.integers(0, 3, 7) if loss is softmax_cross_entropy else random.standard_normal((7, 3))
    model = small_model()
    model.parameters += 0.1 * random.standard_normal(model.parameters.size)  # biases away from zero, too

    losses, dy = loss(model.forward(x), y)
    dx = model.backward(dy)

    def total() -> float:
        return float(loss(model.forward(x), y)[0].sum())

    assert losses.shape == (7,) and dx.shape == x.shape
    np.testing.assert_allclose(model.gradients, numerical_gradient(total, model.parameters), atol=1e-7)
    np.testing.assert_allclose(dx, numerical_gradient(total, x), atol=1e-7)


def test_cross_entropy_of_huge_scores_is_finite() -> None:
    losses, gradient = softmax_cross_entropy(np.array([[1e4, -1e4], [0.0, 0.0]]), np.array([1, 0]))
    np.testing.assert_allclose(losses, np.array([2e4, np.log(2)]))
    np.testing.assert_allclose(gradient, np.array([[1, -1], [-0.5, 0.5]]))


def test_parameters_and_gradients_are_views_into_two_vectors() -> None:
    model = perceptron(64, [32, 16], 10)
    linear = [layer for layer in model.layers if isinstance(layer, Linear)]
    assert model.parameters.dtype == model.gradients.dtype == np.float32
    assert model.parameters.size == 64 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10
    model.parameters[:] = np.arange(model.parameters.size)
    model.gradients[:] = -1
    together = np.concatenate([p.ravel() for layer in linear for p in (layer.weight, layer.bias)])
    np.testing.assert_array_equal(together, np.arange(model.parameters.size))
    assert all((layer.weight_gradient == -1).all() and (layer.bias_gradient == -1).all() for layer in linear)


def test_first_parameters_are_the_seed_s_and_of_he_s_variance() -> None:
    linear = Linear(500, 400)
    model = Sequential(linear, seed=3)
    np.testing.assert_array_equal(model.parameters, Sequential(Linear(500, 400), seed=3).parameters)
    assert (model.parameters != Sequential(Linear(500, 400), seed=4).parameters).any()
    assert linear.weight.std() == pytest.approx(np.sqrt(2 / 500), rel=0.02)
    assert (linear.bias == 0).all()


@pytest.mark.parametrize("loss", [softmax_cross_entropy, mean_squared_error])
def test_an_empty_part_of_a_batch_gives_zero_gradients(loss: Any) -> None:
    model = small_model()
    model.gradients[:] = 7  # left over from the step before
    y = np.empty(0, np.int64) if loss is softmax_cross_entropy else np.empty((0, 3))
    losses, dy = loss(model.forward(np.empty((0, 2, 3))), y)
    assert model.backward(dy).shape == (0, 2, 3)
    assert losses.shape == (0,)
    assert (model.gradients == 0).all()


def test_momentum_follows_its_equations() -> None:
    parameters = np.array([1.0, -2.0])
    optimizer = SGD(parameters, learning_rate=0.1, momentum=0.5)
    optimizer.step(np.array([1.0, 10.0]))  # v = g
    np.testing.assert_allclose(parameters, [0.9, -3.0])
    optimizer.step(np.array([1.0, 0.0]))  # v = 0.5 v + g = [1.5, 5]
    np.testing.assert_allclose(parameters, [0.75, -3.5])


class ForeignArray:
    """An array that NumPy's functions refuse, as they do CuPy's: only its own module's take it."""

    __module__ = "cupy"
    __array_ufunc__ = None

    def __init__(self, host: Any) -> None:
        self.host = host

    def __array_function__(self, function: Callable[..., Any], kinds: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} got an array of another module")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("an array of another module must not become NumPy's by itself")

    def __len__(self) -> int:
        return len(self.host)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.host, name)
        return foreign_function(value) if callable(value) else foreign(value)


def foreign(value: Any) -> Any:
    return ForeignArray(value) if isinstance(value, np.ndarray) else value


def to_host(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(to_host(item) for item in value)
    return value.host if isinstance(value, ForeignArray) else value


def foreign_function(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return foreign(function(*to_host(args), **{name: to_host(value) for name, value in kwargs.items()}))

    return call


OPERATIONS = "add radd sub rsub mul rmul truediv matmul pow neg gt getitem setitem iadd isub imul"

for name in (f"__{operation}__" for operation in OPERATIONS.split(" ")):
    method = foreign_function(lambda a, *rest, name=name: getattr(a, name)(*rest))
    setattr(ForeignArray, name, method)


class ForeignModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return foreign_function(getattr(np, name))


@pytest.mark.parametrize("loss", [softmax_cross_entropy, mean_squared_error])
def test_the_same_source_trains_on_arrays_of_cupy(monkeypatch: pytest.MonkeyPatch, loss: Any) -> None:
    """A stand-in for CuPy, which needs a GPU: no function of NumPy's may get its arrays."""
    cupy = ForeignModule("cupy")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    kernels = SimpleNamespace(Update=lambda *arrays: packing.Update(*map(to_host, arrays)))
    monkeypatch.setitem(sys.modules, "mpicoll.kernels.packing_cuda", kernels)
    random = np.random.default_rng(2)
    x = random.standard_normal((5, 6))
    y = random.integers(0, 3, 5) if loss is softmax_cross_entropy else random.standard_normal((5, 3))

    def trained(model: Sequential, x: Any, y: Any) -> Any:
        optimizer = SGD(model.parameters, 0.1)
        for _ in range(3):
            _, dy = loss(model.forward(x), y)
            model.backward(dy / len(x))
            optimizer.step(model.gradients)
        return model.parameters

    layers = Linear(6, 4), ReLU(), Linear(4, 3)
    expected = trained(Sequential(*layers, dtype=np.float64), x, y).copy()
    there = trained(Sequential(*layers, dtype=np.float64, allocate=cupy.zeros), foreign(x), foreign(y))
    assert isinstance(there, ForeignArray)
    np.testing.assert_array_equal(there.host, expected)


# Data -----------------------------------------------------------------------------------------------


@given(
    count=st.integers(1, 300),
    batch_size=st.integers(1, 70),
    nranks=st.integers(1, 40),
    epoch=st.integers(1, 9),
)
def test_the_parts_of_all_ranks_are_the_global_batch(
    count: int, batch_size: int, nranks: int, epoch: int
) -> None:
    seen = []
    for batch in train_data.global_batches(count, batch_size, 5, epoch):
        parts = [batch[train_data.own_part(rank, nranks, len(batch))] for rank in range(nranks)]
        np.testing.assert_array_equal(np.concatenate(parts), batch)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert len(batch) <= batch_size
        seen.append(batch)
    assert all(len(batch) == batch_size for batch in seen[:-1])
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(count))


@given(count=st.integers(1, 50), nranks=st.integers(1, 9))
def test_the_sum_over_ranks_is_the_mean_gradient_of_the_batch(count: int, nranks: int) -> None:
    random = np.random.default_rng(count)
    x, y = random.standard_normal((count, 6)), random.integers(0, 3, count)
    model = small_model()

    def gradients(part: slice) -> AnyArray:
        _, dy = softmax_cross_entropy(model.forward(x[part]), y[part])
        model.backward(dy / count)
        return np.array(model.gradients)

    parts = [gradients(train_data.own_part(rank, nranks, count)) for rank in range(nranks)]
    np.testing.assert_allclose(np.sum(parts, axis=0), gradients(slice(None)), atol=1e-12)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [int(i) for batch in train_data.global_batches(100, 32, seed, epoch) for i in batch]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}) == 4
    assert random_stream(0, "split").random() != random_stream(0, "shuffle").random()


def test_split_keeps_every_sample_once() -> None:
    x = np.arange(50.0).reshape(50, 1)
    data = train_data.split("numbers", 50, x, np.arange(50), seed=4)
    assert len(data.test_x) == 10
    np.testing.assert_array_equal(data.train_x[:, 0], data.train_y)
    np.testing.assert_array_equal(data.test_x[:, 0], data.test_y)
    assert sorted([*data.train_y, *data.test_y]) == list(range(50))
    assert (train_data.split("numbers", 50, x, np.arange(50), seed=5).test_y != data.test_y).any()


def test_standardise_uses_the_training_samples_only() -> None:
    train = np.array([[1.0, 5.0], [3.0, 5.0]])
    scaled, test = train_data.standardise(train, np.array([[5.0, 6.0]]), axis=0)
    np.testing.assert_array_equal(scaled, [[-1, 0], [1, 0]])
    np.testing.assert_array_equal(test, [[3, 1]])
    assert scaled.dtype == test.dtype == np.float32


def test_digits() -> None:
    data = read_digits(seed=0)
    assert (data.train_x.shape, data.test_x.shape) == ((1438, 8, 8), (359, 8, 8))
    assert (data.inputs, data.outputs, data.classes) == (64, 10, 10)
    assert data.train_x.dtype == np.float32 and data.train_y.dtype == np.int64
    assert abs(data.train_x.mean()) < 1e-6 and data.train_x.std() == pytest.approx(1)


# IDX ------------------------------------------------------------------------------------------------


def idx(array: AnyArray, code: int = 0x08) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + array.tobytes()


def images_and_labels(count: int, seed: int) -> tuple[AnyArray, AnyArray]:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 4, 3), np.uint8)
    return images, np.arange(count, dtype=np.uint8) % 3


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A directory with a small set in MNIST's form."""
    for part, count in (("train", 20), ("t10k", 9)):
        images, labels = images_and_labels(count, seed=count)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


@pytest.mark.parametrize(
    "code, dtype", [(8, "u1"), (9, "i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")]
)
def test_idx_of_every_type(tmp_path: Path, code: int, dtype: Any) -> None:
    array = np.arange(-3, 3).astype(dtype).reshape(2, 3)
    path = tmp_path / "array"
    path.write_bytes(idx(array, code))
    read = read_idx(path)
    np.testing.assert_array_equal(read, array)
    assert read.dtype.isnative


def test_mnist(mnist: Path) -> None:
    data = read_mnist(mnist)
    assert (data.train_x.shape, data.test_x.shape, data.classes) == ((20, 4, 3), (9, 4, 3), 3)
    images, labels = images_and_labels(20, seed=20)
    np.testing.assert_allclose(data.train_x, (images - images.mean()) / images.std(), atol=1e-5)
    np.testing.assert_array_equal(data.train_y, labels)


def test_mnist_gzipped_and_with_dots_in_its_names(mnist: Path) -> None:
    plain = read_mnist(mnist)
    for path in sorted(mnist.iterdir()):
        zipped = path.with_name(path.name.replace("-idx", ".idx") + ".gz")
        zipped.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    np.testing.assert_array_equal(read_mnist(mnist).test_x, plain.test_x)


IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"
GOOD_IMAGES, GOOD_LABELS = images_and_labels(20, seed=20)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (IMAGES, b"", "expected an IDX file.*found nothing"),
        (IMAGES, b"<html>not found</html>", "expected an IDX file.*found 3c 68 74 6d"),
        (IMAGES, b"\0\0\x08\x03\0\0", "expected 3 dimensions of 4 bytes.*truncated"),
        (IMAGES, idx(GOOD_IMAGES)[:-1], "expected 256 bytes for shape 20 x 4 x 3, found 255; truncated"),
        (IMAGES, idx(GOOD_IMAGES) + b"x", "expected 256 bytes .*found 257; not an IDX file, or damaged"),
        (IMAGES, idx(GOOD_LABELS), "expected images of height x width, found 20"),
        (IMAGES, gzip.compress(idx(GOOD_IMAGES))[:-9], "expected a complete gzip file"),
        (IMAGES, b"\x1f\x8b is all that is gzip here", "expected a complete gzip file"),
        (IMAGES, idx(np.zeros((20, 5, 3), np.uint8)), "images of one size, found 5 x 3 and 4 x 3"),
        (LABELS, idx(GOOD_LABELS[:19]), "expected one label for each of the 20 images.*found 19"),
        (LABELS, idx(GOOD_IMAGES), "expected a row of whole numbers from 0, found 20 x 4 x 3"),
        (LABELS, idx(np.full(20, -1, "i1"), 9), "expected a row of whole numbers from 0"),
        (LABELS, idx(GOOD_LABELS * 100), "found 200 as the largest label"),
        (LABELS, None, f"expected {LABELS} or {LABELS}.gz in it, found neither"),
    ],
)
def test_mnist_of_bad_files(mnist: Path, name: str, content: Any, message: str) -> None:
    (mnist / name).unlink()
    if content is not None:
        (mnist / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_mnist(mnist)
    assert str(mnist) in str(error.value)
    assert "\n" not in str(error.value)


def test_mnist_of_no_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: expected a directory.*--data-dir"):
        read_mnist(tmp_path / "nowhere")


# CSV ------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Writes a CSV file and returns its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "table.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


ROWS = ["1,2,red", "3,5,blue", "4,9,red", "6,7,green", "8,8,blue"]
WITHOUT_HEADER = "\n".join(ROWS)
WITH_HEADER = "width,height,colour\n" + WITHOUT_HEADER


def all_labels(data: Dataset) -> list[int]:
    return sorted([*data.train_y.tolist(), *data.test_y.tolist()])


@pytest.mark.parametrize(
    "content, label",
    [
        (WITHOUT_HEADER, None),
        (WITHOUT_HEADER, "3"),
        (WITH_HEADER, None),
        (WITH_HEADER, "colour"),
        (WITH_HEADER, "3"),
        (WITH_HEADER.replace(",", ";"), "colour"),
        (WITH_HEADER.replace(",", "\t"), None),
        (WITH_HEADER.replace("\n", "\r\n") + "\r\n\r\n", None),
        ("0,1,colour\n" + WITHOUT_HEADER, "colour"),
        ("\ufeff" + WITH_HEADER, "colour"),
        (gzip.compress(WITH_HEADER.encode()), None),
        ("width,height,colour\n" + WITHOUT_HEADER.replace("red", '" red"'), "colour"),
    ],
)
def test_csv_of_classes(table: Table, content: Any, label: str | None) -> None:
    data = read_csv(table(content), label, regression=False, seed=0)
    assert (data.train_x.shape, data.test_x.shape, data.classes) == ((4, 2), (1, 2), 3)
    assert all_labels(data) == [0, 0, 1, 2, 2]  # blue, blue, green, red, red
    np.testing.assert_allclose(data.train_x.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(data.train_x.std(axis=0), 1, rtol=1e-6)


def test_csv_with_the_label_in_another_column(table: Table) -> None:
    content = "colour,width\n" + "\n".join(f"c{i % 2},{i}" for i in range(10))
    data = read_csv(table(content), "colour", regression=False, seed=0)
    assert all_labels(data) == [0] * 5 + [1] * 5
    x = np.concatenate([data.train_x, data.test_x])[:, 0]
    y = np.concatenate([data.train_y, data.test_y])
    order = np.argsort(x)
    np.testing.assert_array_equal(y[order], [0, 1] * 5)


def test_csv_of_values(table: Table) -> None:
    content = "a,b\n" + "\n".join(f"{i},{100 + 3 * i}" for i in range(20))
    data = read_csv(table(content), None, regression=True, seed=0)
    assert (data.classes, data.outputs, data.train_y.shape) == (0, 1, (16, 1))
    np.testing.assert_allclose(data.train_y, data.train_x, atol=1e-5)  # both standardised, b linear in a
    assert data.train_y.dtype == np.float32


@pytest.mark.parametrize(
    "content, label, regression, message",
    [
        ("", None, False, "found it empty"),
        (" \n\n", None, False, "found it empty"),
        (",,\n,,\n", None, False, "found only empty cells"),
        (b"\x89PNG\r\n\x1a\n\0\xff", None, False, "which is text in UTF-8"),
        (idx(GOOD_LABELS), None, False, "found bytes of zero"),
        ("1\n2\n3", None, False, "found one column"),
        ("width,height,colour", None, False, "expected at least 2 lines with samples, found 0"),
        ("width,height,colour\n1,2,red", None, False, "expected at least 2 lines with samples, found 1"),
        (WITH_HEADER + "\n1,2", None, False, "expected 3 columns as in line 1, line 7 has 2"),
        (WITH_HEADER + "\n1,2,3,4", None, False, "expected 3 columns as in line 1, line 7 has 4"),
        (WITH_HEADER + "\n1,x,red", None, False, "finite number in line 7, column 2, found 'x'"),
        (WITH_HEADER + "\n\n1,,red", None, False, "finite number in line 8, column 2, found ''"),
        (WITH_HEADER + "\ninf,1,red", None, False, "finite number in line 7, column 1, found 'inf'"),
        (WITH_HEADER + "\n1,1,", None, False, "expected a label in line 7, column 3, found it empty"),
        (WITH_HEADER + '\n1,1,"red', None, False, "line 7: unexpected end of data"),
        (WITH_HEADER, None, True, "finite number in line 2, column 3, found 'red'"),
        (WITH_HEADER, "color", False, "found 'color'; the first line is: width, height, colour"),
        (WITH_HEADER, "4", False, "by number from 1 to 3 or by name, found '4'"),
        (WITH_HEADER, "0", False, "by number from 1 to 3 or by name, found '0'"),
        ("1,2,red\n3,4,red", None, False, "expected at least 2 classes, found one, 'red'"),
        ("1,2,1.5\n3,4,2.5\n5,6,3.5", None, False, "all 3 labels differ.*--task regression"),
        (gzip.compress(WITH_HEADER.encode())[:-4], None, False, "expected a complete gzip file"),
    ],
)
def test_csv_of_bad_files(
    table: Table, content: Any, label: str | None, regression: bool, message: str
) -> None:
    path = table(content)
    with pytest.raises(InputError, match=message) as error:
        read_csv(path, label, regression, seed=0)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, message", [("nowhere.csv", "No such file"), ("", "Is a directory")])
def test_csv_that_cannot_be_read(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_csv(tmp_path / name, None, regression=False, seed=0)


def test_no_line_of_a_csv_is_taken_for_a_header_by_a_bad_cell(table: Table) -> None:
    with pytest.raises(InputError, match="line 1, column 1, found 'oops'"):
        read_csv(table("oops,2,red\n" + WITHOUT_HEADER), None, regression=False, seed=0)


# what becomes ready when ----------------------------------------------------------------------------


def test_gradients_are_ready_from_the_last_layer_to_the_first_and_complete() -> None:
    model = perceptron(5, [4, 3], 2, dtype=np.float64)
    x, dy = np.arange(15.0).reshape(3, 5), np.ones((3, 2))
    model.forward(x)
    model.backward(dy)
    expected = model.gradients.copy()
    model.gradients[:] = np.nan
    order: list[int] = []

    def ready(i: int) -> None:
        order.append(i)
        offset = sum(view.size for view in model.gradient_views[:i])
        np.testing.assert_array_equal(
            model.gradient_views[i].ravel(), expected[offset : offset + model.gradient_views[i].size]
        )

    model.forward(x)
    model.backward(dy, ready)
    assert order == [5, 4, 3, 2, 1, 0]
    assert model.names == ["1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias"]
