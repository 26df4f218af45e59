"""The store of a job does what torch's own does. Rank 0's service is one in this process here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

import mpicoll.service
from mpicoll.service import Service

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402

from mpicoll.torch.store import Store, _Table  # noqa: E402

SHORT = timedelta(seconds=0.05)
LONG = timedelta(seconds=20)
NTHREADS = 4


@pytest.fixture(scope="module")
def service() -> Service:
    return Service({})


@pytest.fixture
def store(service: Service) -> Store:
    """Of an empty table."""
    service.handle("store", _Table().answer)
    return Store(service.contact)


Call = Callable[[Any], Any]
# What each does to an empty store, and what it finds.
CALLS: dict[str, list[Call]] = {
    "set, get": [
        lambda s: s.set("k", "v"),
        lambda s: s.get("k"),
        lambda s: s.set("k", "w"),
        lambda s: s.get("k"),
    ],
    "bytes": [lambda s: s.set("b", bytes(range(256))), lambda s: s.get("b")],
    "nothing": [lambda s: s.set("e", ""), lambda s: s.get("e"), lambda s: s.check(["e"])],
    "text": [lambda s: s.set("ключ/ü", "é"), lambda s: s.get("ключ/ü")],
    "add": [lambda s: s.add("n", 3), lambda s: s.add("n", -5), lambda s: s.add("n", 0), lambda s: s.get("n")],
    "add to a number": [lambda s: s.set("n", "41"), lambda s: s.add("n", 1)],
    "add much": [lambda s: s.add("n", 2**62), lambda s: s.get("n")],
    "add to a text": [lambda s: s.set("k", "v"), lambda s: s.add("k", 1), lambda s: s.get("k")],
    "append": [lambda s: s.append("a", "x"), lambda s: s.append("a", b"\0\xff"), lambda s: s.get("a")],
    "append to": [lambda s: s.set("a", "1"), lambda s: s.append("a", "2"), lambda s: s.add("a", 1)],
    "delete": [
        lambda s: s.set("k", "v"),
        lambda s: s.delete_key("k"),
        lambda s: s.delete_key("k"),
        lambda s: s.check(["k"]),
    ],
    "check": [
        lambda s: s.multi_set(["p", "q"], ["1", "2"]),
        lambda s: [s.check(keys) for keys in (["p"], ["p", "q"], ["p", "r"], [])],
    ],
    "many": [
        lambda s: s.multi_set(["p", "q"], ["1", b"\2"]),
        lambda s: s.multi_get(["q", "p"]),
        lambda s: s.multi_get([]),
    ],
    "keys": [
        lambda s: s.num_keys(),
        lambda s: s.multi_set(["p", "q", "p"], ["1", "2", "3"]),
        lambda s: s.add("n", 1),
        lambda s: s.num_keys(),
        lambda s: s.delete_key("q"),
        lambda s: s.num_keys(),
    ],
    "compare_set: nothing there": [
        lambda s: s.compare_set("c", "x", "y"),
        lambda s: s.check(["c"]),
        lambda s: s.compare_set("c", "", "y"),
        lambda s: s.get("c"),
    ],
    "compare_set": [
        lambda s: s.set("c", "1"),
        lambda s: s.compare_set("c", "0", "2"),
        lambda s: s.get("c"),
        lambda s: s.compare_set("c", "1", "2"),
        lambda s: s.get("c"),
        lambda s: s.compare_set("c", "", "3"),
        lambda s: s.get("c"),
    ],
    "compare_set: an empty value": [
        lambda s: s.set("c", ""),
        lambda s: s.compare_set("c", "", b"\0"),
        lambda s: s.get("c"),
    ],
    "wait": [
        lambda s: s.set("k", "v"),
        lambda s: s.wait(["k"]),
        lambda s: s.wait(["k"], SHORT),
        lambda s: s.wait([]),
    ],
    "wait in vain": [lambda s: s.set("k", "v"), lambda s: s.wait(["k", "other"], SHORT)],
    "get in vain": [lambda s: s.set_timeout(SHORT), lambda s: s.timeout, lambda s: s.get("other")],
    "many in vain": [
        lambda s: s.set("k", "v"),
        lambda s: s.set_timeout(SHORT),
        lambda s: s.multi_get(["k", "x"]),
    ],
    "no text": [lambda s: s.set("k", 5), lambda s: s.append("k", 5), lambda s: s.compare_set("k", "", 5)],
    "no number": [lambda s: s.add("n", "1"), lambda s: s.add("n", 1.5), lambda s: s.num_keys()],
    "extended": [lambda s: s.has_extended_api()],
}


def outcome(call: Call, store: Any) -> Any:
    try:
        return call(store)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: dist.PrefixStore("a", s)], ids=["itself", "PrefixStore"]
)
@pytest.mark.parametrize("what", CALLS)
def test_as_torchs_own(store: Store, what: str, wrap: Call) -> None:
    """Which sees ours through C++ where it is wrapped, as in every process group."""
    ours, own = wrap(store), wrap(dist.HashStore())
    for call in CALLS[what]:
        assert outcome(call, ours) == outcome(call, own)


def test_prefixes(store: Store) -> None:
    inner = dist.PrefixStore("b", dist.PrefixStore("a", store))
    inner.set("k", "v")
    assert store.list_keys() == ["a/b/k"]
    assert store.get("a/b/k") == b"v"
    assert not dist.PrefixStore("b", store).check(["k"])


def test_clones(store: Store) -> None:
    store.set("k", "v")
    assert store.clone().get("k") == b"v"
    assert dist.PrefixStore("a", store).clone().add("n", 2) == 2
    assert store.get("a/n") == b"2"


def test_large_values(store: Store) -> None:
    value = bytes(range(256)) * 2500
    store.set("k", value)
    assert store.get("k") == value


def test_whoever_waits_in_vain_is_told_for_what(store: Store) -> None:
    store.set("k", "v")
    start = time.monotonic()
    with pytest.raises(dist.DistStoreError, match=r"nobody has set x, y within 0\.05 s"):
        store.wait(["x", "k", "y"], SHORT)
    assert SHORT.total_seconds() <= time.monotonic() - start < 5


def test_whoever_waits_goes_on(store: Store) -> None:
    found: list[bytes] = []

    def get() -> None:
        found.append(store.get("k"))

    def wait() -> None:
        store.wait(["k", "l"], LONG)
        found.append(store.get("l"))

    threads = [threading.Thread(target=target) for target in (get, wait)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    assert not found
    store.multi_set(["k", "l"], ["v", "w"])
    for thread in threads:
        thread.join(20)
    assert sorted(found) == [b"v", b"w"]


def test_many_threads(store: Store) -> None:
    """Each request is done whole: no sum and no exchange is lost, and exactly one comes first."""
    sums: list[int] = []
    firsts: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            sums.append(store.add("n", 1))
            store.append("a", "x")
        if store.compare_set("first", "", str(number)) == str(number).encode():
            firsts.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(NTHREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(sums) == list(range(1, 10 * NTHREADS + 1))
    assert store.get("a") == b"x" * 10 * NTHREADS
    assert [str(number).encode() for number in firsts] == [store.get("first")]


def test_a_rank_0_that_is_busy_for_a_while(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gets no answer asks again, and what has been done is not done twice."""
    monkeypatch.setattr(mpicoll.service, "ANSWER_WITHIN", 0.2)
    table, asked = _Table(), threading.Event()

    def answer(request: Any) -> Any:
        found = table.answer(request)
        if not asked.is_set():
            asked.set()
            time.sleep(0.5)
        return found

    service.handle("store", answer)
    store = Store(service.contact)
    assert store.add("n", 1) == 1
    assert store.add("n", 1) == 2


def test_a_rank_0_that_does_not_answer(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpicoll.service, "ANSWER_WITHIN", 0.05)
    service.handle("store", lambda request: time.sleep(0.2))
    store = Store(service.contact)
    store.set_timeout(SHORT)
    with pytest.raises(dist.DistStoreError, match=r"rank 0's: process .* does not answer"):
        store.check(["k"])


def test_a_rank_0_that_has_ended() -> None:
    service = Service({"store": _Table().answer})
    store = Store(service.contact)
    store.set("k", "v")
    service._end()
    with pytest.raises(dist.DistStoreError, match=r"the store, which is rank 0's: process .* has ended"):
        store.get("k")
