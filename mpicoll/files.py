"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def why_unwritable(path: Path) -> str:
    """Why ``path`` could not be written later, with `replacing`; empty if it could."""
    path = _target(path)
    if _is_special(path):
        return "" if os.access(path, os.W_OK) else "Permission denied"
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        return error.strerror or str(error)
    return ""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``: what the block writes to it is synced, then renamed to ``path``.

    So a reader finds the old file or the new one, whole. What is no file, such as /dev/null or a pipe, is
    not replaced but written to. Raises OSError.
    """
    path = _target(path)
    if _is_special(path):
        yield path
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _target(path: Path) -> Path:
    """The file itself, where ``path`` is a link to it: the link stays."""
    return Path(os.path.realpath(path))


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()
