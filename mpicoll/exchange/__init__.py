"""Schedules as files that other tools read, and back: MSCCL's XML and LogGOPSim's GOAL.

    exchange.save(algorithms.schedule("allreduce", "ring", 8), "ring.xml")
    verify(exchange.load("ring.xml"))

``msccl`` and ``goal`` say what is written, ``steps`` how the steps of a file become rounds again. A schedule
that comes back has the transfers that went out; its rounds may be others. Needs NumPy only.
"""

from __future__ import annotations

from pathlib import Path

from mpicoll.exchange import goal, msccl
from mpicoll.exchange.steps import ExchangeError
from mpicoll.schedule import Schedule

FORMATS = ("msccl", "goal")
_FORMAT_OF_SUFFIX = {".xml": "msccl", ".goal": "goal"}

__all__ = ["FORMATS", "ExchangeError", "dumps", "load", "loads", "save"]


def dumps(schedule: Schedule, format: str, *, size: int = goal.SIZE, gamma: float = goal.GAMMA) -> str:
    """``schedule`` as text in ``format`` (``msccl`` or ``goal``); `ValueError` for another one.

    GOAL needs the ``size`` of the data in bytes, all chunks together, and the time ``gamma`` in ns to reduce
    a byte. MSCCL's XML has neither.
    """
    _check_format(format)
    return msccl.dumps(schedule) if format == "msccl" else goal.dumps(schedule, size, gamma)


def loads(text: str, format: str, collective: str | None = None) -> Schedule:
    """The schedule in ``text``; `ExchangeError` names the line or element that is wrong.

    It may compute the wrong thing: that is for `mpicoll.verify` to say. ``collective`` is what a GOAL file by
    others is; files that say it themselves must say the same.
    """
    _check_format(format)
    return msccl.loads(text, collective) if format == "msccl" else goal.loads(text, collective)


def load(path: str | Path, collective: str | None = None) -> Schedule:
    """The schedule in a file, of whichever format; see `loads`. `OSError` if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ExchangeError(f"byte {error.start}: expected text in UTF-8") from None
    if not text.strip():
        raise ExchangeError("expected MSCCL's XML or GOAL, got an empty file")
    return loads(text, "msccl" if text.lstrip().startswith("<") else "goal", collective)


def save(
    schedule: Schedule,
    path: str | Path,
    format: str | None = None,
    *,
    size: int = goal.SIZE,
    gamma: float = goal.GAMMA,
) -> None:
    """Write `dumps` to a file; without ``format`` its name ends in ``.xml`` (MSCCL) or ``.goal``."""
    chosen = format or _FORMAT_OF_SUFFIX.get(Path(path).suffix)
    if chosen is None:
        raise ValueError(f"path: expected a name that ends in .xml or .goal, or a format; got {str(path)!r}")
    Path(path).write_text(dumps(schedule, chosen, size=size, gamma=gamma), encoding="utf-8")


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}; got {format!r}")
