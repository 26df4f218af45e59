"""What comes next, computed while the present is worked on.

With t_f to compute an item and t_w to work on it, a step takes max(t_f, t_w) in place of t_f + t_w, as far as
the two let go of Python's lock: reading memory-mapped files and NumPy's arithmetic do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def prefetched(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """``items`` in their order, the next ``depth`` of them computed ahead in one thread.

    What ``items`` raises comes out where its item would have. When the generator ends or is closed, no thread
    of it is left: closing waits for the item that is being computed. A CUDA device that was chosen for the
    calling thread is not chosen in this one: compute on the host's arrays here.

    Raises `ValueError` for a depth below 1.
    """
    if depth < 1:
        raise ValueError(f"depth: expected at least 1, got {depth}")
    return _prefetched(iter(items), depth)


def _prefetched(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")  # joined at exit, too, if nobody closes
    try:
        ahead = deque(thread.submit(next, items) for _ in range(depth))
        with suppress(StopIteration):
            while True:
                item = ahead.popleft().result()
                ahead.append(thread.submit(next, items))
                yield item
    finally:
        thread.shutdown(cancel_futures=True)
