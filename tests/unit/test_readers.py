"""Readers: what they make of good files, and what they say about bad ones."""

import gzip
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mpicoll.train.data import Dataset, check_labels
from mpicoll.train.errors import InputError
from mpicoll.train.mapped import Rows
from mpicoll.train.readers import (
    read_cifar10,
    read_csv,
    read_diabetes,
    read_digits,
    read_idx,
    read_mnist,
    read_npy,
)

AnyArray = npt.NDArray[Any]
Table = Callable[[str | bytes], Path]


# scikit-learn's ---------------------------------------------------------------------------------------


def test_digits() -> None:
    data = read_digits(seed=0)
    assert (data.train_x.shape, data.test_x.shape) == ((1438, 8, 8), (359, 8, 8))
    assert (data.inputs, data.outputs, data.classes) == (64, 10, 10)
    assert data.train_x.dtype == np.float32 and data.train_y.dtype == np.int64
    assert abs(data.train_x.mean()) < 1e-6 and data.train_x.std() == pytest.approx(1)
    assert data.train_x.min() == pytest.approx(data.black)
    check_labels(data)


def test_diabetes() -> None:
    data = read_diabetes(seed=0)
    assert (data.train_x.shape, data.test_x.shape) == ((354, 10), (88, 10))
    assert (data.inputs, data.outputs, data.classes) == (10, 1, 0)
    for array in (data.train_x, data.train_y):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array.mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(array.std(axis=0), 1, rtol=1e-5)
    weights = np.linalg.lstsq(data.train_x, data.train_y, rcond=None)[0]
    assert ((data.test_x @ weights - data.test_y) ** 2).mean() < 0.75  # x and y belong together
    assert (read_diabetes(seed=1).test_y != data.test_y).any()


@pytest.mark.parametrize("name, read", [("digits", read_digits), ("diabetes", read_diabetes)])
def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch, name: str, read: Any) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=f"{name}: expected scikit-learn to be installed"):
        read(seed=0)


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
        zipped.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
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
        (IMAGES, gzip.compress(idx(GOOD_IMAGES), mtime=0)[:-9], "expected a complete gzip file"),
        (IMAGES, b"\x1f\x8b is all that is gzip here", "expected a complete gzip file"),
        (IMAGES, idx(np.zeros((20, 5, 3), np.uint8)), "images of one size, found 5 x 3 and 4 x 3"),
        (LABELS, idx(GOOD_LABELS[:19]), "expected one label for each of the 20 images.*found 19"),
        (LABELS, idx(GOOD_IMAGES), "expected a row of whole numbers from 0, found 20 x 4 x 3"),
        (LABELS, idx(np.full(20, -1, "i1"), 9), "expected a row of whole numbers from 0"),
        (LABELS, idx(GOOD_LABELS * 100), "found 200 as the largest label"),
        (
            IMAGES,
            idx(np.where(np.eye(20, 12) > 0, np.nan, 1).reshape(20, 4, 3).astype(">f4"), 13),
            "found nan",
        ),
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
        (gzip.compress(WITH_HEADER.encode(), mtime=0), None),
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
        (gzip.compress(WITH_HEADER.encode(), mtime=0)[:-4], None, False, "expected a complete gzip file"),
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


# CIFAR-10 ---------------------------------------------------------------------------------------------

CIFAR_FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def cifar_records(file: int) -> tuple[AnyArray, AnyArray]:
    """As many images as there may be in a small file: another number in each."""
    random = np.random.default_rng(file)
    return random.integers(0, 256, (3 + file, 3, 32, 32), np.uint8), random.integers(0, 10, 3 + file)


def cifar_bytes(images: AnyArray, labels: AnyArray) -> bytes:
    return b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True))


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A directory with a small set in CIFAR-10's binary form."""
    for number, name in enumerate(CIFAR_FILES):
        (tmp_path / name).write_bytes(cifar_bytes(*cifar_records(number)))
    return tmp_path


def test_cifar10(cifar: Path) -> None:
    data = read_cifar10(cifar)
    pieces = [cifar_records(number) for number in range(5)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    assert (data.name, data.classes, data.sample_shape) == (f"cifar10:{cifar}", 10, (3, 32, 32))
    np.testing.assert_array_equal(data.train_x, images)
    np.testing.assert_array_equal(data.train_y, labels)
    np.testing.assert_array_equal(data.test_x, cifar_records(5)[0])
    np.testing.assert_array_equal(data.test_y, cifar_records(5)[1])
    assert data.train_x.dtype == np.uint8 and data.train_y.dtype == np.int64

    indices = np.array([24, 0, 7])
    x, y = data.train_batch(indices)
    np.testing.assert_allclose(x, (images[indices] - images.mean()) / images.std(), atol=1e-5)
    np.testing.assert_array_equal(y, labels[indices])
    assert data.black == pytest.approx(-images.mean() / images.std(), rel=1e-5)


GOOD_RECORDS = cifar_bytes(*cifar_records(0))


@pytest.mark.parametrize("name", ["data_batch_4.bin", "test_batch.bin"])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "NAME: expected records of 3073 bytes, found 0 and 0 bytes more"),
        (GOOD_RECORDS[:-1], "NAME: expected records of 3073 bytes, found 2 and 3072 bytes more; truncated"),
        (GOOD_RECORDS + b"x", "NAME: expected records of 3073 bytes, found 3 and 1 bytes more"),
        (GOOD_RECORDS + b"\x0a" + bytes(3072), "NAME: expected labels from 0 to 9, found 10 in record 3"),
        (None, "expected data_batch_1.bin to data_batch_5.bin .*not found: NAME; see --data-dir"),
    ],
)
def test_cifar10_of_bad_files(cifar: Path, name: str, content: Any, message: str) -> None:
    (cifar / name).unlink()
    if content is not None:
        (cifar / name).write_bytes(content)
    with pytest.raises(InputError, match=message.replace("NAME", name)) as error:
        read_cifar10(cifar)
    assert str(cifar) in str(error.value)


@pytest.mark.parametrize("read", [read_cifar10, read_npy])
def test_no_directory(tmp_path: Path, read: Any) -> None:
    with pytest.raises(InputError, match=r"nowhere: expected a directory.*--data-dir"):
        read(tmp_path / "nowhere")


# NumPy's files ----------------------------------------------------------------------------------------


def table_and_classes(count: int) -> tuple[AnyArray, AnyArray]:
    """Features of different sizes, one that tells the row, one that never varies; classes 0 to 3."""
    x = np.random.default_rng(count).standard_normal((count, 3)) * [1, 100, 0] + [5, 0, 7]
    x[:, 0] = np.arange(count)
    return x, np.arange(count) % 4


def save(directory: Path, **arrays: AnyArray) -> None:
    for name, array in arrays.items():
        np.save(directory / f"{name}.npy", array)


@pytest.mark.parametrize("label_type", ["u1", "i4", ">i8"])
@pytest.mark.parametrize("type_", ["f8", "f4", ">f4", "i2"])
def test_npy_that_is_split(tmp_path: Path, type_: str, label_type: str) -> None:
    x, y = table_and_classes(53)
    x = x.astype(type_)
    save(tmp_path, x=x, y=y.astype(label_type))
    data = read_npy(tmp_path, seed=4)
    assert (data.name, data.classes, data.inputs, len(data.train_y)) == (f"npy:{tmp_path}", 4, 3, 42)
    assert data.train_y.dtype == np.int64 and data.train_y.dtype.isnative
    for part in (data.train_x, data.test_x):
        assert isinstance(part, Rows) and isinstance(part.array, np.memmap)  # not in memory
        assert str(part.array.filename) == str((tmp_path / "x.npy").resolve())
        assert not part.array.flags.writeable
    rows = np.concatenate([data.train_x[:][:, 0], data.test_x[:][:, 0]])
    np.testing.assert_array_equal(np.sort(rows), np.arange(53))  # each once
    np.testing.assert_array_equal(np.concatenate([data.train_y, data.test_y]), rows % 4)

    train_x, train_y = data.train_batch(np.arange(42))
    chosen = data.train_x[:]
    assert train_x.dtype == np.float32 and train_x.dtype.isnative
    np.testing.assert_allclose(train_x.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train_x.std(axis=0), [1, 1, 0], rtol=1e-5)
    np.testing.assert_array_equal(train_y, chosen[:, 0] % 4)
    test_x, _ = data.test_batch(slice(3, 6))
    scale = (chosen[:, 1].astype("f8").mean(), chosen[:, 1].astype("f8").std())
    np.testing.assert_allclose(test_x[:, 1], (data.test_x[3:6][:, 1] - scale[0]) / scale[1], rtol=1e-4)
    check_labels(data)
    assert (read_npy(tmp_path, seed=5).train_x.numbers != data.train_x.numbers).any()
    np.testing.assert_array_equal(read_npy(tmp_path, seed=4).train_x.numbers, data.train_x.numbers)


def test_npy_in_two_parts(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, 2, 4, 3), np.uint8)
    others = random.integers(0, 256, (9, 2, 4, 3), np.uint8)
    save(tmp_path, train_x=images, train_y=np.arange(20) % 2, test_x=others, test_y=np.arange(9) % 3)
    data = read_npy(tmp_path)
    assert (data.classes, data.sample_shape) == (3, (2, 4, 3))
    assert type(data.train_x) is type(data.test_x) is np.memmap
    x, y = data.train_batch(np.array([19, 2]))
    np.testing.assert_allclose(x, (images[[19, 2]] - images.mean()) / images.std(), atol=1e-5)
    np.testing.assert_array_equal(y, [1, 0])
    np.testing.assert_allclose(
        data.test_batch(slice(0, 9))[0], (others - images.mean()) / images.std(), atol=1e-5
    )
    assert data.black == pytest.approx(-images.mean() / images.std(), rel=1e-5)


def test_npy_of_values(tmp_path: Path) -> None:
    x, _ = table_and_classes(40)
    y = np.stack([3 * x[:, 0] + 1, x[:, 1]], axis=1)
    save(tmp_path, x=x, y=y)
    data = read_npy(tmp_path, seed=1)
    assert (data.classes, data.outputs, data.black) == (0, 2, 0)
    train_x, train_y = data.train_batch(np.arange(32))
    assert train_y.dtype == np.float32
    np.testing.assert_allclose(train_y, train_x[:, :2], atol=1e-5)  # both standardised, linear in each other
    test_x, test_y = data.test_batch(slice(None))
    np.testing.assert_allclose(test_y, test_x[:, :2], atol=1e-5)


def with_value(array: AnyArray, row: int, value: Any) -> AnyArray:
    array = array.copy()
    array[row] = value
    return array


X, Y = table_and_classes(30)
OBJECTS = np.array([{"a": 1}, None] * 15)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x", None, "DIR: expected either x.npy and y.npy or train_x.npy.*found y.npy; see --data-dir"),
        ("train_x", X, "DIR: expected either .*found x.npy, y.npy, train_x.npy"),
        ("x", b"", "DIR/x.npy: expected a complete .npy file of numbers, but: "),
        ("x", b"PK\x03\x04 is how .npz files begin", "DIR/x.npy: expected a complete .npy file"),
        ("x", b"<html>not found</html>", "DIR/x.npy: expected a complete .npy file"),
        ("y", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f8' }", "DIR/y.npy: expected a complete .npy file"),
        ("x", OBJECTS, "DIR/x.npy: expected a complete .npy file of numbers, but: .*Python objects"),
        ("y", OBJECTS, "DIR/y.npy: expected a complete .npy file of numbers, but: .*Python objects"),
        ("x", X.astype(str), r"DIR/x.npy: expected numbers, \[samples, features\].*found <U"),
        ("x", X.astype(complex), "DIR/x.npy: expected numbers, .*found complex128 of shape 30 x 3"),
        ("x", X[:, 0], "DIR/x.npy: expected numbers, .*found float64 of shape 30$"),
        ("x", X[:, :0], "DIR/x.npy: expected numbers, .*found float64 of shape 30 x 0"),
        (
            "y",
            Y.astype(float),
            r"DIR/y.npy: expected whole numbers.*found float64 of shape 30; save .*y\[:, None\]",
        ),
        ("y", Y[:, None], "DIR/y.npy: expected whole numbers .*found int64 of shape 30 x 1"),
        ("y", Y[:29], "DIR/y.npy: expected one for each of the 30 samples in x.npy, found 29"),
        (
            "y",
            with_value(Y, 17, -2),
            "DIR/y.npy: expected classes, whole numbers from 0, found -2 in sample 17",
        ),
        ("y", with_value(Y, 3, 30), "DIR/y.npy: expected classes .*found 30 as the largest of 24"),
        (
            "y",
            Y.astype("u8") + 2**63,
            "DIR/y.npy: expected classes .*found 9223372036854775811 as the largest",
        ),
        ("y", Y * 0, "DIR/y.npy: expected classes numbered from 0, at least 2 and .*found 0 as the largest"),
        ("y", with_value(X, 5, np.nan), "DIR/y.npy: expected finite numbers, found nan in sample 5"),
        *(
            ("x", with_value(X, row, bad), f"DIR/x.npy: expected finite numbers, found {bad} in sample {row}")
            for row in (0, 11, 29)
            for bad in (np.nan, -np.inf)
        ),
    ],
)
def test_npy_of_bad_files(tmp_path: Path, name: str, content: Any, message: str) -> None:
    save(tmp_path, x=X, y=Y)
    path = tmp_path / f"{name}.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        path.unlink()
    else:
        np.save(path, content)
    with pytest.raises(InputError, match=message.replace("DIR", str(tmp_path))) as error:
        read_npy(tmp_path)
    assert "\n" not in str(error.value)


def test_npy_that_is_cut_short(tmp_path: Path) -> None:
    save(tmp_path, x=X, y=Y)
    for name in ("x", "y"):
        path = tmp_path / f"{name}.npy"
        content = path.read_bytes()
        for length in (len(content) - 1, len(content) // 2, 100, 9, 1):
            path.write_bytes(content[:length])
            with pytest.raises(InputError, match=f"{path}: expected a complete .npy file"):
                read_npy(tmp_path)
        path.write_bytes(content)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "test_x",
            X[:9, :2],
            "test_x.npy: expected samples like those to train with, .*30 x 3, found .*9 x 2",
        ),
        ("test_y", X[:9], "test_y.npy: expected samples like those to train with, int64 .*, found float64"),
        ("test_y", Y[:8], "test_y.npy: expected one for each of the 9 samples in test_x.npy, found 8"),
        (
            "test_x",
            with_value(X[:9], 8, np.nan),
            "test_x.npy: expected finite numbers, found nan in sample 8",
        ),
        ("test_x", None, "expected either .*found train_x.npy, train_y.npy, test_y.npy"),
    ],
)
def test_npy_in_two_parts_that_do_not_fit(tmp_path: Path, name: str, content: Any, message: str) -> None:
    save(tmp_path, train_x=X, train_y=Y, test_x=X[:9], test_y=Y[:9])
    read_npy(tmp_path)
    (tmp_path / f"{name}.npy").unlink()
    if content is not None:
        np.save(tmp_path / f"{name}.npy", content)
    with pytest.raises(InputError, match=message):
        read_npy(tmp_path)


def test_npy_that_is_too_short_to_split(tmp_path: Path) -> None:
    save(tmp_path, x=X[:1], y=X[:1])
    with pytest.raises(InputError, match=f"npy:{tmp_path}: expected at least 2 samples"):
        read_npy(tmp_path)
