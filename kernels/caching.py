"""Compiled code that is kept on disk, and compiled anew when any source that it was made from has changed.

Numba looks at the file of the function alone: code that was compiled into it from other files would stay as
it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature


class CachedCode:
    """Compiles functions that are made from these source files."""

    def __init__(self, sources: Iterable[Path]) -> None:
        texts = [source.read_bytes() for source in sorted(sources)]
        self._stamp = hashlib.sha256(b"\0".join(texts)).hexdigest()

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


# For kernels that run on the CPU. Those for GPUs are compiled by another compiler, and kept by it.
CACHED = CachedCode(path for path in Path(__file__).parent.glob("*.py") if "_cuda" not in path.stem)
