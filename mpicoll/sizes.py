"""Sizes as people write them: ``4K``, ``64M``, ``1G``, powers of 1024."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LIMIT = 1 << 63  # bytes: NumPy's integers end here


def parse_size(text: str) -> int:
    """Bytes in ``text``; ValueError says what is allowed."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise ValueError(f"size: expected a number with K, M, G or T behind it, such as 64K, got {text!r}")
    size = float(match[1]) * _UNITS[match[2]]
    if size >= _LIMIT:
        raise ValueError(f"size: expected less than {format_size(_LIMIT)}, got {text!r}")
    return int(match[1]) * _UNITS[match[2]] if match[1].isdecimal() else int(size)


def format_size(nbytes: int) -> str:
    """``nbytes`` in the largest unit that divides it."""
    unit = max(
        (u for u in _UNITS if nbytes % _UNITS[u] == 0 and nbytes >= _UNITS[u]),
        key=_UNITS.__getitem__,
        default="",
    )
    return f"{nbytes // _UNITS[unit]}{unit}"
