"""The key-value store that `torch.distributed` sets groups up with, kept by rank 0 of the job.

Ranks reach it as they reach each other when they wait in vain (`mpicoll.service`): with what MPI has told
them, so there is no address to choose. It is for setting up, not for data: who waits for a key asks again
and again.

Source of the interface: ``torch.distributed.Store``.
"""

from __future__ import annotations

import os
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from operator import index
from typing import Any

import torch.distributed as dist
from mpi4py import MPI

from mpicoll.service import Contact, EndedError, NoAnswerError, ask
from mpicoll.watch import service

ONCE = ("add", "append", "compare_set")  # what must not be done twice
REMEMBERED = 10_000  # such requests
SHORTEST_NAP, LONGEST_NAP = 0.001, 0.05  # seconds between two questions for a key


class _Table:
    """Rank 0's dictionary. Each method is one request; what is kept and sent is text."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._answered: dict[str, Any] = {}  # the last requests that change something, by what marks them
        self._turn = threading.Lock()

    def answer(self, request: Sequence[Any]) -> Any:
        """``[mark, name, *arguments]``; one that comes again, since its answer came too late, counts once."""
        mark, name, *arguments = request
        with self._turn:
            if mark in self._answered:
                return self._answered[mark]
            answer = getattr(self, name)(*arguments)
            if name in ONCE:
                self._answered[mark] = answer
                while len(self._answered) > REMEMBERED:
                    self._answered.pop(next(iter(self._answered)))
            return answer

    def set(self, key: str, value: str) -> None:
        self._values[key] = value

    def get(self, key: str) -> str | None:
        return self._values.get(key)

    def add(self, key: str, amount: int) -> int | None:
        """The sum; None if what is there is no number."""
        try:
            total = int(_bytes(self._values.get(key, "")) or b"0") + amount
        except ValueError:
            return None
        self._values[key] = _text(str(total))
        return total

    def append(self, key: str, value: str) -> None:
        self._values[key] = _text(_bytes(self._values.get(key, "")) + _bytes(value))

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        """What is there afterwards; ``expected`` if there is nothing and something else was expected."""
        found = self._values.get(key)
        if found == expected or (found is None and not expected):
            self._values[key] = desired
        return self._values.get(key, expected)

    def delete(self, key: str) -> bool:
        return self._values.pop(key, None) is not None

    def has(self, keys: Sequence[str]) -> bool:
        return all(key in self._values for key in keys)

    def keys(self) -> list[str]:
        return list(self._values)


class Store(dist.Store):
    """The job's store, as one rank sees it."""

    def __init__(self, contact: Contact) -> None:
        super().__init__()
        self._contact = contact

    def _ask(self, *request: Any) -> Any:
        """Rank 0's answer, which may take its time: Python there may be busy for seconds."""
        until, marked = time.monotonic() + self.timeout.total_seconds(), [os.urandom(8).hex(), *request]
        while True:
            try:
                return ask(self._contact, "store", marked)
            except NoAnswerError as error:
                if isinstance(error, EndedError) or time.monotonic() > until:
                    raise dist.DistStoreError(f"the store, which is rank 0's: {error}") from error
            time.sleep(LONGEST_NAP)

    def set(self, key: str, value: str | bytes) -> None:
        self._ask("set", key, _text(value))

    def get(self, key: str) -> bytes:
        """The value; waits for it. Raises ``DistStoreError`` after the timeout."""
        self.wait([key], self.timeout)
        return _bytes(self._ask("get", key) or "")

    def add(self, key: str, amount: int) -> int:
        """The sum, which is kept; ValueError if the value is no number."""
        total: int | None = self._ask("add", key, index(amount))
        if total is None:
            raise ValueError(f"add: expected a number as the value of {key}, got something else")
        return total

    def append(self, key: str, value: str | bytes) -> None:
        self._ask("append", key, _text(value))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        return _bytes(self._ask("compare_set", key, _text(expected), _text(desired)))

    def delete_key(self, key: str) -> bool:
        return bool(self._ask("delete", key))

    deleteKey = delete_key  # so torch's C++ calls it, for PrefixStore

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._ask("has", list(keys)))

    def num_keys(self) -> int:
        return len(self.list_keys())

    getNumKeys = num_keys  # the same

    def list_keys(self) -> list[str]:
        return list(self._ask("keys"))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Until all keys are there. Raises ``DistStoreError`` after ``timeout``."""
        seconds = (timeout or self.timeout).total_seconds()
        until, nap = time.monotonic() + seconds, SHORTEST_NAP
        while not self.check(keys):
            if time.monotonic() > until:
                missing = ", ".join(key for key in keys if not self.check([key]))
                raise dist.DistStoreError(f"wait: nobody has set {missing} within {seconds:g} s")
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def has_extended_api(self) -> bool:
        return True

    def clone(self) -> Store:
        """This one, for each request has a connection of its own; C++ would not keep another alive."""
        return self


@cache
def job_store() -> Store:
    """The store of all ranks of the job; collective over them when first called."""
    table = _Table()
    here = service()
    if MPI.COMM_WORLD.rank == 0:
        here.handle("store", table.answer)
    return Store(MPI.COMM_WORLD.bcast(here.contact, 0))


def _text(value: str | bytes) -> str:
    return b64encode(value.encode() if isinstance(value, str) else memoryview(value)).decode()


def _bytes(text: str) -> bytes:
    return b64decode(text)
