"""What all readers do with files."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

from mpicoll.train.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"


def content_of(path: Path) -> bytes:
    """All bytes of the file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a file that can be read, but: {error.strerror}") from error


def unzipped(path: Path) -> bytes:
    """All bytes of the file, or, if it is gzipped, of the one inside."""
    content = content_of(path)
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: expected a complete gzip file, but: {error}; truncated?") from error


def as_text(shape: Sequence[int]) -> str:
    """3 x 32 x 32"""
    return " x ".join(map(str, shape)) or "of no dimensions"
