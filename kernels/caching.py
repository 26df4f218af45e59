"""Compiled code that is kept on disk, and compiled anew when any source that it was made from has changed.

Numba looks at the file of the function alone: code that was compiled into it from other files would stay as
it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature


class CachedCode:
    """Compiles functions that are made from these source files."""

    def __init__(self, sources: Iterable[Path]) -> None:
        texts = [source.read_bytes() for source in sorted(sources)]
        self._stamp = hashlib.sha256(b"\0".join(texts)).hexdigest()

    def njit(self, signature: str) -> Callable[[Callable[..., Any]], Any]:
        """As `numba.njit` for one signature, without the GIL."""

        def decorate(function: Callable[..., Any]) -> Any:
            dispatcher = njit(nogil=True)(function)
            self._keep(dispatcher)
            dispatcher.compile(signature)
            dispatcher.disable_compile()
            return dispatcher

        return decorate

    def cfunc(self, signature: Any) -> Callable[[Callable[..., Any]], Any]:
        """As `numba.cfunc`."""

        def decorate(function: Callable[..., Any]) -> Any:
            compiled = CFunc(function, normalize_signature(signature), locals={}, options={})
            self._keep(compiled)
            compiled.compile()
            return compiled

        return decorate

    def _keep(self, compiled: Any) -> None:
        compiled.enable_caching()
        # Where a later Numba has none of these, its own stamp, of the function's file alone, remains.
        file = getattr(compiled._cache, "_cache_file", None)
        if file is not None and hasattr(file, "_source_stamp"):
            file._source_stamp = self._stamp
