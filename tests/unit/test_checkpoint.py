"""Checkpoint files: round trips, whatever can befall a file, and the thread that writes them."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpicoll.train import checkpoint
from mpicoll.train.checkpoint import CheckpointError, Snapshot, Writer, load, newest, save
from mpicoll.train.errors import InputError
from tests.children import in_child

SECONDS = 20  # for what another thread or process does, on a busy machine: an end to a hang
DTYPES = ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", ">f4", ">i8"]


def snapshot(step: int, count: int = 5) -> Snapshot:
    """Of ``count`` elements or so; no two steps alike."""
    arrays = {"weight": np.arange(count, dtype="f4") / 7 + step, "permutation": np.arange(3)[::-1] * step}
    return Snapshot(step, arrays, {"seed": 7, "position": [step, 0.1]})


def assert_same(got: Snapshot, expected: Snapshot) -> None:
    assert got.step == expected.step
    assert got.facts == expected.facts
    assert got.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert got.arrays[name].dtype == array.dtype.newbyteorder("="), name
        assert got.arrays[name].shape == array.shape, name
        # Bit for bit, NaNs too.
        assert got.arrays[name].tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes(), name


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Round trips ------------------------------------------------------------------------------------------


def test_file_is_named_after_its_step_or_as_told(tmp_path: Path) -> None:
    assert save(tmp_path, snapshot(40)) == tmp_path / "step-0000000040.safetensors"
    assert save(tmp_path, snapshot(41), name="best") == tmp_path / "best.safetensors"
    assert names(tmp_path) == ["best.safetensors", "step-0000000040.safetensors"]
    assert_same(load(tmp_path / "best.safetensors"), snapshot(41))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (5, 3), (2, 3, 5)])
def test_round_trip_of_every_dtype_and_shape(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.arange(np.prod(shape, dtype=int)) % 3).astype(dtype).reshape(shape)
    expected = Snapshot(
        0, {"a": array, "transposed": array.T, "every second": array[..., ::2] if shape else array}, {}
    )
    assert_same(load(save(tmp_path, expected)), expected)


@settings(max_examples=40)
@given(
    arrays=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
        st.sampled_from(DTYPES).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0))
        ),
        max_size=5,
    ),
    facts=st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    ),
    step=st.integers(0, 10**12),
)
def test_round_trip_of_anything(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Any], facts: dict[str, Any], step: int
) -> None:
    expected = Snapshot(step, arrays, facts)
    assert_same(load(save(tmp_path_factory.getbasetemp(), expected, name="anything")), expected)


def test_no_arrays_and_infinite_facts(tmp_path: Path) -> None:
    got = load(save(tmp_path, Snapshot(3, {}, {"best": float("inf"), "loss": float("nan")})))
    assert (got.step, got.arrays, got.facts["best"]) == (3, {}, float("inf"))
    assert np.isnan(got.facts["loss"])


def test_file_is_in_the_safetensors_format_and_aligned(tmp_path: Path) -> None:
    arrays = {
        "a": np.array([True]),
        "b": np.arange(3.0),
        "é": np.arange(5, dtype="f4"),
        'q"\\': np.arange(3, dtype="u2"),
    }
    path = save(tmp_path, Snapshot(1, arrays, {}))
    assert_same(Snapshot(1, safetensors.numpy.load_file(path), {}), Snapshot(1, arrays, {}))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    record = header.pop("__metadata__")["mpicoll-checkpoint"]
    assert json.loads(record)["mpicoll-checkpoint"] == 1
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % arrays[name].itemsize == 0


def test_equal_snapshots_make_equal_files(tmp_path: Path) -> None:
    arrays = {"w": np.arange(3.0), "b": np.arange(2.0), "permutation": np.arange(5, dtype="u1")}
    other = {name: arrays[name] for name in reversed(list(arrays))}
    first = save(tmp_path, Snapshot(5, arrays, {"seed": 7}), "first")
    assert first.read_bytes() == save(tmp_path, Snapshot(5, other, {"seed": 7}), "second").read_bytes()


def test_facts_that_look_like_a_digest(tmp_path: Path) -> None:
    expected = Snapshot(1, {'{"sha256":"': np.arange(2)}, {"sha256": "0" * 64, '\\"sha256\\":\\"': "1" * 64})
    assert_same(load(save(tmp_path, expected)), expected)


@pytest.mark.parametrize(
    "array", [np.array([None]), np.array(["a"]), np.zeros(2, "c16"), np.zeros(3, ml_dtypes.bfloat16)]
)
def test_arrays_that_cannot_be_read_back_are_not_written(tmp_path: Path, array: Any) -> None:
    with pytest.raises(TypeError, match=r"arrays\['velocity'\]: expected one of bool, .* got"):
        save(tmp_path, Snapshot(1, {"velocity": array}, {}))
    assert names(tmp_path) == []


def test_facts_and_names_that_cannot_be_read_back_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"facts: expected what JSON can hold, .* ndarray"):
        save(tmp_path, Snapshot(1, {}, {"x": np.zeros(2)}))
    with pytest.raises(ValueError, match="arrays: expected any name but '__metadata__'"):
        save(tmp_path, Snapshot(1, {"__metadata__": np.zeros(2)}, {}))
    assert names(tmp_path) == []


def test_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    def work() -> None:
        os.umask(0o027)
        save(tmp_path, snapshot(1))

    in_child(work)
    assert (tmp_path / "step-0000000001.safetensors").stat().st_mode & 0o777 == 0o640


# What befalls files -----------------------------------------------------------------------------------


def test_every_changed_byte_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, Snapshot(9, {"w": np.arange(3.0), "b": np.array([True, False])}, {"seed": 7}))
    content = path.read_bytes()
    for position, byte in enumerate(content):
        # A bit at either end, the other case; and white space, which JSON ignores.
        for other in {byte ^ 1, byte ^ 128, byte ^ 32, *b" \n"} - {byte}:
            path.write_bytes(content[:position] + bytes([other]) + content[position + 1 :])
            with pytest.raises(
                CheckpointError, match=r"step-0000000009.safetensors: expected a checkpoint, found "
            ):
                load(path)
    path.write_bytes(content)
    load(path)


def test_truncation_at_every_length_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, snapshot(9))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="found a torn file, or none in the safetensors format"):
            load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="found a torn file"):
        load(path)


def test_swapped_arrays_and_data_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, Snapshot(1, {"a": np.arange(3.0), "b": np.arange(3.0) + 1}, {}))
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"a":', b'"c":').replace(b'"b":', b'"a":').replace(b'"c":', b'"b":'))
    assert np.array_equal(safetensors.numpy.load_file(path)["a"], np.arange(3.0) + 1)  # the format allows it
    with pytest.raises(CheckpointError, match=r"found contents that were changed .* SHA-256 differs"):
        load(path)
    path.write_bytes(content[:-48] + content[-24:] + content[-48:-24])
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-0000000001.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3)}, path, {"mpicoll-checkpoint": "1"})
    with pytest.raises(CheckpointError, match="without the facts of a checkpoint; mpicoll did not write it"):
        load(path)
    path.write_bytes(b"\x80\x04\x95 a pickle, or whatever else" * 9)
    with pytest.raises(CheckpointError, match="none in the safetensors format"):
        load(path)
    with pytest.raises(CheckpointError, match=r"step-0000000002.safetensors: .* but: No such file"):
        load(tmp_path / "step-0000000002.safetensors")
    with pytest.raises(CheckpointError, match="but: Is a directory"):
        load(tmp_path)


def test_other_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 2)
        path = save(tmp_path, snapshot(1))
        load(path)
    with pytest.raises(CheckpointError, match=r"step-0000000001.* format 1, found format 2; load it with"):
        load(path)


# The newest good one ----------------------------------------------------------------------------------


def test_newest_falls_back_and_names_what_it_refuses(tmp_path: Path) -> None:
    paths = [save(tmp_path, snapshot(step)) for step in (7, 900, 20)]
    save(tmp_path, snapshot(5000), name="best")
    for foreign in (
        "step-12.safetensors",
        "step-0000009999.safetensors.bak",
        ".step-0000009999.safetensors.a.1.tmp",
    ):
        (tmp_path / foreign).write_bytes(b"not ours")

    found = newest(tmp_path)
    assert found is not None and found[1] == []
    assert_same(found[0], snapshot(900))

    os.truncate(paths[1], 100)
    paths[2].write_bytes(paths[2].read_bytes()[:-1] + b"\xff")
    found = newest(tmp_path)
    assert found is not None
    assert_same(found[0], snapshot(7))
    torn, changed = found[1]
    assert re.fullmatch(r".*step-0000000900\.safetensors: .* torn .*; using the one before it", torn)
    assert re.fullmatch(r".*step-0000000020\.safetensors: .* SHA-256 .*; using the one before it", changed)

    paths[0].write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        newest(tmp_path)
    text = str(error.value)
    assert [step in text for step in ("0007", "0020", "0900", "5000", "9999")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert "using the one before it" not in text and "\n" not in text


def test_newest_orders_steps_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, snapshot(9_999_999_999))
    save(tmp_path, snapshot(10_000_000_000))
    found = newest(tmp_path)
    assert found is not None and found[0].step == 10_000_000_000


def test_newest_of_nothing(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "missing") is None
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: expected a directory with checkpoints, but: Not a dir"):
        newest(tmp_path / "file")


# A full disk, a killed process ------------------------------------------------------------------------


def limit_files(nbytes: int) -> None:
    """From now on no file of this process can grow beyond ``nbytes``."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


@pytest.mark.parametrize("limit", [0, 100, 5000, 300_000])
def test_file_that_does_not_fit_leaves_nothing(tmp_path: Path, limit: int) -> None:
    save(tmp_path, snapshot(1))

    def work() -> None:
        limit_files(limit)
        with pytest.raises(
            InputError,
            match=r"step-0000000002.safetensors: .* 400,\d{3} bytes, but: File too large; make room",
        ):
            save(tmp_path, snapshot(2, 100_000))

    in_child(work)
    assert names(tmp_path) == ["step-0000000001.safetensors"]
    found = newest(tmp_path)
    assert found is not None
    assert_same(found[0], snapshot(1))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk_at_the_last_moment_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path if function == "replace" else os, function, full)
    with pytest.raises(
        InputError, match=r"step-0000000002.safetensors: .* but: No space left on device; make room"
    ):
        save(tmp_path, snapshot(2))
    assert names(tmp_path) == []


def test_file_is_synced_before_it_has_its_name_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append((os.path.realpath(f"/proc/self/fd/{descriptor}"), names(tmp_path)))

    monkeypatch.setattr(os, "fsync", fsync)
    path = save(tmp_path, snapshot(2))
    (temporary, before), (directory, after) = synced
    assert before == [Path(temporary).name] != [path.name]
    assert (directory, after) == (str(tmp_path.resolve()), [path.name])


def killed(work: Callable[[], None], when: Callable[[], bool] | None = None) -> int:
    """The signal that ends a process that does ``work``: it is killed once ``when()``."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    deadline = time.monotonic() + SECONDS
    while when is not None and not when() and time.monotonic() < deadline:
        time.sleep(0.001)
    if when is not None:
        os.kill(child, signal.SIGKILL)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_process_killed_in_the_midst_of_a_file_leaves_the_older_one(tmp_path: Path) -> None:
    save(tmp_path, snapshot(1))

    def work() -> None:  # the kernel kills it at the 5000th byte
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        limit_files(5000)
        save(tmp_path, snapshot(2, 100_000))

    assert killed(work) == signal.SIGXFSZ
    assert_leftover(tmp_path, 5000)


def test_process_killed_before_a_file_is_synced_leaves_the_older_one(tmp_path: Path) -> None:
    save(tmp_path, snapshot(1))
    reached = tmp_path.with_name(tmp_path.name + "-reached")

    def stop(_: int) -> None:
        reached.touch()
        time.sleep(10 * SECONDS)

    def work() -> None:
        checkpoint.os.fsync = stop  # type: ignore[attr-defined]
        with Writer(tmp_path) as writer:
            writer.write(snapshot(2, 100_000))

    assert killed(work, reached.exists) == signal.SIGKILL
    assert_leftover(tmp_path, 400_000)


def assert_leftover(directory: Path, least: int) -> None:
    """Of a second snapshot there is a temporary file, which the next writer removes; the first is good."""
    leftover, first = names(directory)
    assert leftover.endswith(".tmp") and (directory / leftover).stat().st_size >= least
    found = newest(directory)
    assert found is not None and found[1] == []
    assert_same(found[0], snapshot(1))
    Writer(directory).close()
    assert names(directory) == [first]


# The writer -------------------------------------------------------------------------------------------


def test_writer_keeps_the_last_and_the_named(tmp_path: Path) -> None:
    with Writer(tmp_path / "new" / "directory", keep=2) as writer:
        for step in range(0, 60, 10):
            writer.write(snapshot(step))
            if step == 10:
                writer.write(snapshot(step), name="best")
            writer.wait()
            assert len([name for name in names(writer.directory) if name.startswith("step")]) == min(
                2, step // 10 + 1
            )
    expected = ["best.safetensors", "step-0000000040.safetensors", "step-0000000050.safetensors"]
    assert names(writer.directory) == expected
    for name, step in zip(expected, (10, 40, 50), strict=True):
        assert_same(load(writer.directory / name), snapshot(step))


def test_writer_keeps_its_own_files_before_those_of_other_runs(tmp_path: Path) -> None:
    for step in (100, 110, 120):
        save(tmp_path, snapshot(step))
    kept = []
    with Writer(tmp_path, keep=3) as writer:
        for step in (30, 40, 40, 50, 60):
            writer.write(snapshot(step))
            writer.wait()
            kept.append([int(name[5:15]) for name in names(tmp_path)])
    assert kept == [[30, 110, 120], [30, 40, 120], [30, 40, 120], [30, 40, 50], [40, 50, 60]]


def test_writer_leaves_foreign_files(tmp_path: Path) -> None:
    foreign = ["notes.txt", "model.safetensors", ".hidden.tmp", "step-1.safetensors"]
    for name in foreign:
        (tmp_path / name).touch()
    with Writer(tmp_path, keep=1) as writer:
        writer.write(snapshot(1))
        writer.write(snapshot(2))
    assert names(tmp_path) == sorted([*foreign, "step-0000000002.safetensors"])


def test_writer_removes_only_temporary_files_of_the_dead(tmp_path: Path) -> None:
    host, now = os.uname().nodename, time.time()
    no_process = 2**22 + 1  # more than any process's number
    dead = f".step-0000000007.safetensors.{host}.{no_process}.tmp"
    alive = f".step-0000000007.safetensors.{host}.{os.getpid()}.tmp"
    elsewhere = f".best.safetensors.{host}-other.{no_process}.tmp"
    forgotten = f".step-0000000008.safetensors.{host}-other.{no_process}.tmp"
    for name, age in ((dead, 0), (alive, 3600), (elsewhere, 3600), (forgotten, 2 * 86_400)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age, now - age))
    Writer(tmp_path).close()
    assert names(tmp_path) == sorted([alive, elsewhere])


def test_writer_refuses_what_is_no_directory_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: expected a directory .* but: it is a file"):
        Writer(tmp_path / "file")
    with pytest.raises(InputError, match=r"below: expected a directory .* but: Not a directory"):
        Writer(tmp_path / "file" / "below")
    with pytest.raises(
        InputError, match="/proc/self: expected a directory that checkpoints can be written to"
    ):
        Writer(Path("/proc/self"))
    with pytest.raises(InputError, match="keep: expected 1 checkpoint or more, got 0"):
        Writer(tmp_path, keep=0)
    assert names(tmp_path) == ["file"]


class Gate:
    """An ``os.fsync`` that lets nobody pass until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        self.reached.set()
        assert self.opened.wait(SECONDS)
        self.fsync(descriptor)


def test_write_returns_at_once_and_the_next_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Writer(tmp_path) as writer:
        facts = {"seed": 7, "position": [1, 0.1]}
        writer.write(Snapshot(1, snapshot(1).arrays, facts))
        facts["seed"] = 8  # those of the call count
        assert gate.reached.wait(SECONDS)
        second = threading.Thread(target=writer.write, args=[snapshot(2)])
        second.start()
        second.join(0.05)
        assert second.is_alive()
        assert [name for name in names(tmp_path) if not name.endswith(".tmp")] == []
        gate.opened.set()
        second.join(SECONDS)
        assert (tmp_path / "step-0000000001.safetensors").exists()
        writer.wait()
        assert names(tmp_path) == ["step-0000000001.safetensors", "step-0000000002.safetensors"]
    assert_same(load(tmp_path / "step-0000000001.safetensors"), snapshot(1))
    assert_same(load(tmp_path / "step-0000000002.safetensors"), snapshot(2))


@pytest.mark.parametrize("call", ["write", "wait", "close"])
def test_error_of_the_thread_comes_out_once(tmp_path: Path, call: str) -> None:
    directory = tmp_path / "gone"
    writer = Writer(directory)
    directory.rmdir()
    writer.write(snapshot(1))
    with pytest.raises(InputError, match=r"step-0000000001.safetensors: .* but: No such file or directory"):
        writer.write(snapshot(2)) if call == "write" else getattr(writer, call)()
    directory.mkdir()
    if call != "close":
        writer.write(snapshot(3))
    writer.close()
    assert names(directory) == ([] if call == "close" else ["step-0000000003.safetensors"])


def test_wrong_arguments_are_raised_by_the_call_itself(tmp_path: Path) -> None:
    with Writer(tmp_path) as writer:
        with pytest.raises(TypeError, match="facts: expected what JSON can hold"):
            writer.write(Snapshot(1, {}, {"x": object()}))
        writer.write(snapshot(2))
    assert names(tmp_path) == ["step-0000000002.safetensors"]


def test_context_lets_the_error_of_the_training_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(directory: Path, meanwhile: Callable[[], object]) -> None:
        with Writer(directory) as writer:
            meanwhile()
            writer.write(snapshot(1))
            raise KeyboardInterrupt

    gone = tmp_path / "gone"
    with pytest.raises(KeyboardInterrupt):
        train(gone, gone.rmdir)

    gate = Gate(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, threading.Timer(0.05, gate.opened.set).start)
    assert_same(load(tmp_path / "step-0000000001.safetensors"), snapshot(1))  # what was begun is completed


def test_older_file_that_cannot_be_removed(tmp_path: Path) -> None:
    (tmp_path / "step-0000000001.safetensors").mkdir()
    writer = Writer(tmp_path, keep=1)
    writer.write(snapshot(2))
    with pytest.raises(
        InputError, match=r"step-0000000001.* expected to remove this older checkpoint, but: "
    ):
        writer.close()
    assert_same(load(tmp_path / "step-0000000002.safetensors"), snapshot(2))


def test_arrays_are_not_copied(tmp_path: Path) -> None:
    array = np.arange(5.0)
    _, data = checkpoint._encode(Snapshot(1, {"a": array}, {}))
    assert np.shares_memory(np.frombuffer(data[0], np.uint8), array)
