"""Checkpoints: files that hold a state of the training whole, or are refused.

A **snapshot** is named arrays, and facts about them that JSON can hold, at one step. Its file is in the
safetensors format, which other frameworks read, too, and says in its header what belongs in it:

    file   = length of the header in 8 bytes | header | data
    header = {"__metadata__": {"mpicoll-checkpoint": record}, name: {dtype, shape, data_offsets}, ...}
    record = {"sha256": digest, "mpicoll-checkpoint": 1, "step": ..., "facts": ...}, as JSON in a string
    digest = SHA-256 of the file without the digest, which always lies at the same place

The format alone would load changed weights without a word; with the digest every changed byte is found. It
tells accidents, not forgers: who can write the file can write its digest.

A file comes into being as: write to a temporary name, sync, rename, sync the directory. So what is named
``step-0000000040.safetensors`` was whole once, and older files are removed only after that. Loading never
unpickles.

Cost: n bytes are hashed once and written once, from where they are, without Python's lock, so that training
goes on. The library's own `save` copies them under that lock, which is why the header, all that the format
is, is made here; the library reads it. Loading takes 2 n bytes of memory.

Sources: the format, https://github.com/huggingface/safetensors; T. S. Pillai et al., "All File Systems Are
Not Created Equal", OSDI 2014 (what has to be synced for a rename to be atomic in a crash).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from mpicoll.train.errors import InputError

AnyArray = npt.NDArray[Any]

KEY = "mpicoll-checkpoint"
FORMAT = 1
DIGITS = 64  # of the digest, hexadecimal
HEAD = b'{"__metadata__":{"mpicoll-checkpoint":"{\\"sha256\\":\\"'  # where the header begins, in every format
DIGEST = slice(8 + len(HEAD), 8 + len(HEAD) + DIGITS)
ALIGNMENT = 8  # bytes: of the data, as of the largest element
STEP_FILE = re.compile(r"step-(\d{10,})\.safetensors")
TEMPORARY = re.compile(r"\..+\.safetensors\.(?P<host>.+)\.(?P<pid>\d+)\.tmp")
ABANDONED = 86_400  # seconds without a write after which a temporary file is nobody's

CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}  # NumPy's names of dtypes, and the format's


class CheckpointError(InputError):
    """A file that is no checkpoint, or not any more: names it and says what is wrong."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state at ``step`` (0 or more): ``arrays`` in host memory, and ``facts``, what JSON gives back.

    JSON gives back lists for tuples, and strings for keys that are none. ``arrays`` that were loaded may be
    read-only.
    """

    step: int
    arrays: Mapping[str, AnyArray]
    facts: Mapping[str, Any]


# Writing ----------------------------------------------------------------------------------------------


def save(directory: Path, snapshot: Snapshot, name: str | None = None) -> Path:
    """Write ``snapshot`` to ``directory``, whole or not at all; its file, ``step-...`` or that of ``name``.

    Raises `InputError` if the file cannot be written, TypeError for arrays and facts that it cannot hold.
    """
    return _write(directory / _file_name(snapshot.step, name), *_encode(snapshot))


def _file_name(step: int, name: str | None) -> str:
    return f"{f'step-{step:010}' if name is None else name}.safetensors"


def _encode(snapshot: Snapshot) -> tuple[bytes, list[memoryview]]:
    """The file: up to the data, with an empty digest, and the data."""
    arrays = {name: _little_endian(name, array) for name, array in snapshot.arrays.items()}
    # The largest elements first: so all of them are aligned.
    arrays = dict(sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])))
    try:
        record = _json({"sha256": "0" * DIGITS, KEY: FORMAT, "step": snapshot.step, "facts": snapshot.facts})
    except TypeError as error:
        raise TypeError(f"facts: expected what JSON can hold, got more: {error}") from error
    header: dict[str, Any] = {"__metadata__": {KEY: record}}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": CODES[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    text = _json(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, [_bytes(array) for array in arrays.values()]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _little_endian(name: str, array: AnyArray) -> AnyArray:
    """``array`` as the format has it: itself, unless it is big-endian or not contiguous."""
    if name == "__metadata__":
        raise ValueError("arrays: expected any name but '__metadata__', which the safetensors format needs")
    if array.dtype.name not in CODES:
        raise TypeError(f"arrays[{name!r}]: expected one of {', '.join(CODES)}, got {array.dtype}")
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")


def _bytes(array: AnyArray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _sha256(head: bytes | memoryview, data: Iterable[memoryview]) -> str:
    """The digest of a file, given as ``head``, in which its place is, and ``data``."""
    digest = hashlib.sha256(head[: DIGEST.start])
    digest.update(head[DIGEST.stop :])
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def _write(path: Path, head: bytes, data: list[memoryview]) -> Path:
    head = head[: DIGEST.start] + _sha256(head, data).encode() + head[DIGEST.stop :]
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(head)
                file.writelines(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)
    except OSError as error:
        nbytes = len(head) + sum(part.nbytes for part in data)
        raise InputError(
            f"{path}: expected to write a checkpoint of {nbytes:,} bytes, but: {error.strerror}; "
            "make room for it, or choose another directory"
        ) from error
    return path


def _sync(directory: Path) -> None:
    """Make the names in ``directory`` outlast a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Writer:
    """Writes snapshots to ``directory`` while the training goes on, and keeps the last ``keep`` of them.

    Makes the directory, and removes from it temporary files that killed writers left. At most one snapshot is
    being written at a time, by a thread; what that thread meets is raised by the next `write`, `wait` or
    `close`. Raises `InputError` if the directory cannot be made or written to.
    """

    def __init__(self, directory: Path, keep: int = 3):
        if keep < 1:
            raise InputError(f"keep: expected 1 checkpoint or more, got {keep}")
        _prepare(directory)
        self.directory = directory
        self.keep = keep
        self._written: list[Path] = []  # of those that count for `keep`, the last one last
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def write(self, snapshot: Snapshot, name: str | None = None) -> None:
        """Begin to write ``snapshot``, whose arrays nobody may change from now on; waits for the one before.

        With a ``name``, such as "best", its file has that name and stays until the next of that name.

        Raises what the write before has met; TypeError for arrays and facts that a file cannot hold.
        """
        self.wait()
        path = self.directory / _file_name(snapshot.step, name)
        self._pending = self._thread.submit(self._work, path, name is None, *_encode(snapshot))

    def wait(self) -> None:
        """Wait until all is written. Raises `InputError` if it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait until all is written, and end the thread. Raises `InputError` if it could not be written."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # what has ended the training is to be seen, not what the last write met
            self._thread.shutdown()

    def _work(self, path: Path, counts: bool, head: bytes, data: list[memoryview]) -> None:
        _write(path, head, data)
        if counts:
            # A run that began at an older step leaves its own files, not those of the run before.
            self._written = [*(file for file in self._written if file != path), path][-self.keep :]
            self._remove_older()

    def _remove_older(self) -> None:
        others = [file for file in _step_files(self.directory) if file not in self._written]
        for file in others[self.keep - len(self._written) :]:
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(
                    f"{file}: expected to remove this older checkpoint, but: {error.strerror}"
                ) from error


def _prepare(directory: Path) -> None:
    """Make ``directory``, try to write to it, and clear it."""
    try:
        if directory.is_file():
            raise NotADirectoryError(None, "it is a file")
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
        for path in directory.iterdir():
            _remove_if_abandoned(path)
    except OSError as error:
        raise InputError(
            f"{directory}: expected a directory that checkpoints can be written to, but: {error.strerror}"
        ) from error


def _remove_if_abandoned(path: Path) -> None:
    match = TEMPORARY.fullmatch(path.name)
    if match is None:
        return
    dead = match["host"] == platform.node() and not Path("/proc", match["pid"]).exists()
    with suppress(OSError):  # it is gone, or another user's: no reason not to train
        # Of processes on other machines only the time tells.
        if dead or time.time() - path.stat().st_mtime > ABANDONED:
            path.unlink()


# Reading ----------------------------------------------------------------------------------------------


def load(path: Path) -> Snapshot:
    """The snapshot in the file ``path``. Raises `CheckpointError` unless every byte is as it was written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: expected a checkpoint to read, but: {error.strerror}") from error
    view = memoryview(content)
    ours = content[8 : DIGEST.start] == HEAD
    if not ours or _sha256(view, ()).encode() != content[DIGEST]:
        raise CheckpointError(f"{path}: expected a checkpoint, found {_fault(path, ours)}")
    length = int.from_bytes(content[:8], "little")
    record = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][KEY])
    if record[KEY] != FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of format {FORMAT}, found format {record[KEY]}; "
            "load it with the version of mpicoll that wrote it"
        )
    return Snapshot(record["step"], safetensors.numpy.load(content), record["facts"])


def _fault(path: Path, ours: bool) -> str:
    """What is wrong with a file whose digest is not right."""
    try:
        with safe_open(path, framework="numpy"):  # it checks the header, and the length
            pass
    except (SafetensorError, OSError) as error:
        return f"a torn file, or none in the safetensors format ({error})"
    if not ours:
        return "a safetensors file without the facts of a checkpoint; mpicoll did not write it"
    return "contents that were changed after they were written: the SHA-256 differs"


def newest(directory: Path) -> tuple[Snapshot, list[str]] | None:
    """The snapshot of the newest step file that is good, and a line for each newer one, which was refused.

    None if there is no step file at all. Raises `CheckpointError`, naming all, if none is good.
    """
    refused: list[str] = []
    for path in _listed(directory):
        try:
            return load(path), [f"{line}; using the one before it" for line in refused]
        except CheckpointError as error:
            refused.append(str(error))
    if refused:
        raise CheckpointError(
            f"{directory}: expected a good checkpoint, found none; move these away to begin anew: "
            + "; ".join(refused)
        )
    return None


def _listed(directory: Path) -> list[Path]:
    try:
        return _step_files(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"{directory}: expected a directory with checkpoints, but: {error.strerror}"
        ) from error


def _step_files(directory: Path) -> list[Path]:
    """Those of the newest step first."""
    found = [(STEP_FILE.fullmatch(path.name), path) for path in directory.iterdir()]
    steps = [(int(match[1]), path) for match, path in found if match]
    return [path for _, path in sorted(steps, reverse=True)]
