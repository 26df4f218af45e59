"""The same data on every rank: sent by rank 0, or mapped by each from the same files."""

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll.train.data import ARRAYS, Dataset, fitted, scaled, share
from mpicoll.train.errors import InputError
from mpicoll.train.mapped import Rows, open_mapped
from mpicoll.train.readers import read_npy
from mpicoll.train.sampling import global_batches, own_part, parts

COMM = mpicoll.Communicator(MPI.COMM_WORLD)


def images() -> Dataset:
    random = np.random.default_rng(3)
    x, y = random.integers(0, 256, (37, 2, 5, 3), np.uint8), np.arange(37) % 4
    transform = fitted([x[:30]], None)
    return Dataset("images", 4, x[:30], y[:30], x[30:], y[30:], transform, black=-1.5)


def values() -> Dataset:
    random = np.random.default_rng(4)
    x, y = random.standard_normal((37, 6)), random.standard_normal((37, 2))
    return scaled(Dataset("values", 0, x[:30], y[:30], x[30:], y[30:]), axis=0)


def check_same(data: Dataset, expected: Dataset) -> None:
    for field in fields(Dataset):
        if field.name not in (*ARRAYS, "transform"):
            assert getattr(data, field.name) == getattr(expected, field.name)
    for everything in (np.arange(len(expected.train_y)), np.array([3, 0, 3])):
        for got, wanted in zip(data.train_batch(everything), expected.train_batch(everything), strict=True):
            assert got.dtype == wanted.dtype
            np.testing.assert_array_equal(got, wanted)
    for got, wanted in zip(data.test_batch(slice(1, 6)), expected.test_batch(slice(1, 6)), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("make", [images, values])
def test_data_in_memory_come_from_rank_zero(make: Any) -> None:
    check_same(share(COMM, make() if COMM.rank == 0 else None), make())


def test_a_part_of_a_mapped_file_is_sent(tmp_path: Path) -> None:
    """Whoever cuts a map in two by hand has arrays like any others."""
    data = images()
    if COMM.rank == 0:
        np.save(tmp_path / "x.npy", data.train_x)
        x = np.load(tmp_path / "x.npy", mmap_mode="r")
        held = replace(
            data, train_x=x[:20], train_y=data.train_y[:20], test_x=x[20:], test_y=data.train_y[20:]
        )
    shared = share(COMM, held if COMM.rank == 0 else None)
    np.testing.assert_array_equal(shared.train_x, data.train_x[:20])
    np.testing.assert_array_equal(shared.test_x, data.train_x[20:])


@pytest.fixture
def everywhere(tmp_path: Path) -> Path:
    """Rank 0's directory, on every rank; the others see the same files."""
    directory: Path = COMM.bcast(tmp_path, root=0)
    return directory


@pytest.mark.parametrize("form", ["together", "apart"])
def test_every_rank_maps_the_files_itself(everywhere: Path, form: str) -> None:
    if COMM.rank == 0:
        data = images()
        if form == "together":
            names = {"x": data.train_x, "y": data.train_y}
        else:
            names = {name: getattr(data, name) for name in ARRAYS}
        for name, array in names.items():
            np.save(everywhere / f"{name}.npy", array)
    COMM.Barrier()
    data = share(COMM, read_npy(everywhere, seed=5) if COMM.rank == 0 else None)
    assert data.is_mapped and not share(COMM, values() if COMM.rank == 0 else None).is_mapped
    if form == "together":
        assert isinstance(data.train_x, Rows) and type(data.train_x.array) is np.memmap
    else:
        assert type(data.train_x) is type(data.test_x) is np.memmap
    check_same(data, read_npy(everywhere, seed=5))


@pytest.mark.parametrize("damage", ["missing", "other", "truncated"])
def test_a_rank_that_cannot_map_is_named_on_all(
    everywhere: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rank has another file in its place, as a node without the shared file system would."""
    bad = COMM.size - 1
    if COMM.rank == 0:
        np.save(everywhere / "x.npy", images().train_x)
        np.save(everywhere / "y.npy", images().train_y)
    COMM.Barrier()
    data = read_npy(everywhere) if COMM.rank == 0 else None
    COMM.Barrier()
    if COMM.rank == bad:
        elsewhere = everywhere / "elsewhere.npy"
        if damage == "other":
            np.save(elsewhere, images().train_x[:, :1])
        elif damage == "truncated":
            shutil.copy(everywhere / "x.npy", elsewhere)
            elsewhere.write_bytes(elsewhere.read_bytes()[:-1])
        monkeypatch.setattr("mpicoll.train.data.open_mapped", lambda path: open_mapped(elsewhere))
    expected = {
        "missing": "expected a file that can be read, but: No such file",
        "other": r"of shape \(30, 2, 5, 3\), as rank 0 has found, got .u1 of shape \(30, 1, 5, 3\)",
        "truncated": "expected a complete .npy file",
    }[damage]
    with pytest.raises(
        InputError, match=rf"{expected}.* \(rank {bad} on .*; 1 of {COMM.size} ranks .*put them where all can"
    ):
        share(COMM, data)


@pytest.mark.parametrize("shares", [None, "uneven"])
def test_ranks_agree_on_the_order_and_share_every_batch(shares: Any) -> None:
    for epoch in (1, 2):
        own = []
        for batch in global_batches(101, 13, seed=7, epoch=epoch):
            part = own_part(COMM.rank, COMM.size, len(batch))
            if shares:
                bounds = parts(len(batch), [rank + 0.5 for rank in range(COMM.size)])
                part = slice(bounds[COMM.rank], bounds[COMM.rank + 1])
            own.append(batch[part])
        steps = COMM.allgather(own)
        assert len({len(step) for step in steps}) == 1
        seen = np.concatenate([np.concatenate(step) for step in steps])
        np.testing.assert_array_equal(np.sort(seen), np.arange(101))
