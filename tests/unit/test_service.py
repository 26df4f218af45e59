"""Asking another process where it is: what it replies, and what each way of not replying says."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mpicoll import service
from mpicoll.service import ANSWER_WITHIN, Contact, EndedError, NoAnswerError, Service, ask, ask_here
from tests.children import in_child

LIMIT = 30.0  # seconds for what takes one or two
SECRET = b"0123456789abcdef"
LOOPBACK = ("127.0.0.1",)

# A process with a service of its own; it tells its port and secret, and lives until its input ends.
PROGRAM = """
import sys
from mpicoll.service import Service
service = Service({"twice": lambda number: 2 * number})
print(service.contact.port, service.contact.secret.hex(), flush=True)
sys.stdin.read()
"""

Make = Callable[..., Service]


_numbers = itertools.count()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes services of this process, each with a local socket of its own name."""
    made: list[Service] = []

    def make(**handlers: Callable[[Any], Any]) -> Service:
        number = next(_numbers)  # a name is free again only when the thread that accepts has ended
        monkeypatch.setattr(service, "local_name", lambda pid: f"\0mpicoll-test-{pid}-{number}")
        made.append(Service(handlers))
        return made[-1]

    yield make
    for each in made:
        for listener in each._listeners:
            listener.shutdown(socket.SHUT_RDWR)  # which ends the thread that accepts
        each._close()


def contact(port: int, secret: bytes = SECRET, addresses: tuple[str, ...] = LOOPBACK) -> Contact:
    return Contact(socket.gethostname(), os.getpid(), port, addresses, secret)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def other_process() -> Iterator[tuple[subprocess.Popen[bytes], Contact]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        port, secret = process.stdout.readline().decode().split()
        host = socket.gethostname()
        try:
            yield process, Contact(host, process.pid, int(port), LOOPBACK, bytes.fromhex(secret))
        finally:
            process.kill()


# -- replies


def test_a_reply_is_the_handlers_in_json(make: Make) -> None:
    asked = make(twice=lambda number: 2 * number, seven=lambda _: [7, {"seven": None}]).contact
    assert ask(asked, "twice", 21) == 42
    assert ask(asked, "twice", "ab") == "abab"
    assert ask(asked, "seven", None) == [7, {"seven": None}]
    assert ask(asked, "twice", "x" * 300_000) == "x" * 600_000  # many pieces of a stream


def test_requests_are_answered_beside_each_other(make: Make) -> None:
    """An answer may need others' answers, which may need this process's."""
    first: Service = make(one=lambda _: 1, ask=lambda _: ask(first.contact, "one", None) + 1)
    start = time.monotonic()
    assert ask(first.contact, "ask", None) == 2
    assert time.monotonic() - start < ANSWER_WITHIN


def test_the_contact_says_who_and_where(make: Make) -> None:
    asked = make().contact
    assert (asked.host, asked.pid) == (socket.gethostname(), os.getpid())
    assert "127.0.0.1" in asked.addresses
    assert [address.startswith("127.") for address in asked.addresses] == sorted(
        address.startswith("127.") for address in asked.addresses
    ), "the loopback's addresses come last"
    assert len(asked.secret) == service.SECRET_SIZE
    assert asked.secret != make().contact.secret


def test_the_first_address_that_answers_is_enough(make: Make) -> None:
    asked = make(seven=lambda _: 7).contact._replace(addresses=("127.0.0.77", "127.0.0.1"))
    with socket.create_server(("127.0.0.77", 0)):  # another port there refuses
        assert ask(asked, "seven", None) == 7


# -- no reply


def test_a_handler_that_knows_nothing_is_no_reply(make: Make) -> None:
    def freed(_: Any) -> None:
        raise NoAnswerError("this communicator has been freed here")

    with pytest.raises(NoAnswerError, match=rf"process {os.getpid()} on .* does not answer") as caught:
        ask(make(doing=freed).contact, "doing", "ident")
    assert not isinstance(caught.value, EndedError)


def test_a_wrong_secret_gets_no_reply(make: Make) -> None:
    called: list[Any] = []
    asked = make(note=called.append).contact
    for secret in (bytes(service.SECRET_SIZE), asked.secret[:-1] + bytes([asked.secret[-1] ^ 1])):
        with pytest.raises(NoAnswerError) as caught:
            ask(asked._replace(secret=secret), "note", 1)
        assert not isinstance(caught.value, EndedError)
    assert called == []
    assert ask(asked, "note", 2) is None
    assert called == [2], "and the right one is heard as before"


def test_a_message_that_is_too_long_is_not_read(make: Make) -> None:
    called: list[Any] = []
    asked = make(note=called.append).contact
    with socket.create_connection(("127.0.0.1", asked.port), LIMIT) as connection:
        connection.settimeout(LIMIT)
        connection.sendall(asked.secret + struct.pack(">I", service.MAX_MESSAGE + 1))
        assert connection.recv(1) == b"", "the connection is closed at once"
    assert called == []


@pytest.mark.parametrize("sent", [b"", SECRET[:5]], ids=["nothing", "a part of a secret"])
def test_who_says_nothing_is_not_waited_for_long(make: Make, sent: bytes) -> None:
    asked = make(seven=lambda _: 7).contact
    with socket.create_connection(("127.0.0.1", asked.port), LIMIT) as connection:
        connection.settimeout(LIMIT)
        connection.sendall(sent)
        assert ask(asked, "seven", None) == 7, "others are answered meanwhile"
        start = time.monotonic()
        assert connection.recv(1) == b""
        assert time.monotonic() - start < 3 * ANSWER_WITHIN


def test_what_is_no_json_is_no_reply(make: Make) -> None:
    asked = make(seven=lambda _: 7).contact
    with socket.create_connection(("127.0.0.1", asked.port), LIMIT) as connection:
        connection.settimeout(LIMIT)
        connection.sendall(asked.secret + struct.pack(">I", 3) + b"{[(")
        assert connection.recv(1) == b""
    assert ask(asked, "seven", None) == 7


def test_a_closed_port_is_the_end_of_the_process() -> None:
    with pytest.raises(EndedError, match=rf"process {os.getpid()} on {socket.gethostname()} has ended"):
        ask(contact(free_port()), "doing", None)


def test_an_address_that_is_silent_is_not_the_end() -> None:
    """One address refuses, the other accepts and says nothing: the process may be there."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(NoAnswerError) as caught:
            ask(contact(port, addresses=("127.0.0.77", "127.0.0.1")), "doing", None)
        assert not isinstance(caught.value, EndedError)
        assert ANSWER_WITHIN * 0.9 < time.monotonic() - start < 3 * ANSWER_WITHIN


def test_loopback_addresses_of_another_host_are_not_asked(make: Make) -> None:
    """They would be this host's."""
    asked = make(seven=lambda _: 7).contact
    elsewhere = asked._replace(host="elsewhere", addresses=LOOPBACK)
    with pytest.raises(NoAnswerError):
        ask(elsewhere, "seven", None)


# -- other processes


def test_a_process_that_is_stopped_is_silent_and_one_that_is_killed_has_ended() -> None:
    with other_process() as (process, asked):
        assert ask(asked, "twice", 4) == 8
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(NoAnswerError, match=rf"process {process.pid} on .* does not answer") as caught:
            ask(asked, "twice", 4)
        assert not isinstance(caught.value, EndedError)
        process.send_signal(signal.SIGCONT)
        assert ask(asked, "twice", 5) == 10
        process.kill()
        process.wait(LIMIT)
        with pytest.raises(EndedError, match=rf"process {process.pid} on .* has ended"):
            ask(asked, "twice", 4)


def test_a_forked_copy_does_not_keep_the_port(make: Make) -> None:
    """It would look as if the rank were still there when it has ended."""
    made = make(seven=lambda _: 7)
    asked = made.contact

    def look() -> None:
        assert all(listener.fileno() == -1 for listener in made._listeners)
        assert ask(asked, "seven", None) == 7  # of the parent, which goes on

    in_child(look)
    assert ask(asked, "seven", None) == 7


def test_a_forked_copy_has_a_service_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "local_name", lambda pid: f"\0mpicoll-test-{pid}")
    ours = service.service_of(os.getpid(), dict)
    assert service.service_of(os.getpid(), dict) is ours
    contact = ours.contact
    assert contact.pid == os.getpid()

    def look() -> None:
        theirs = service.service_of(os.getpid(), dict).contact
        assert theirs.pid == os.getpid() != contact.pid
        assert theirs.port != contact.port and theirs.secret != contact.secret

    in_child(look)


# -- the local socket


def test_processes_of_this_host_are_asked_by_number() -> None:
    with other_process() as (process, _):
        assert ask_here(process.pid, "twice", 3, LIMIT) == 6
        process.kill()
        process.wait(LIMIT)
        with pytest.raises(NoAnswerError, match=rf"process {process.pid} does not answer: .*refused"):
            ask_here(process.pid, "twice", 3, LIMIT)


def test_a_stopped_process_is_given_up_in_time() -> None:
    with other_process() as (process, _):
        process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(NoAnswerError, match="timed out"):
            ask_here(process.pid, "twice", 3, 0.3)
        assert time.monotonic() - start < 0.3 + ANSWER_WITHIN


@pytest.mark.parametrize(("own", "peer", "heard"), [(7, 7, True), (7, 0, True), (7, 8, False), (0, 7, False)])
def test_the_local_socket_hears_its_user_and_root_only(
    make: Make, monkeypatch: pytest.MonkeyPatch, own: int, peer: int, heard: bool
) -> None:
    make(seven=lambda _: 7)
    monkeypatch.setattr(os, "geteuid", lambda: own)
    monkeypatch.setattr(service, "_peer_uid", lambda connection: peer)
    if heard:
        assert ask_here(os.getpid(), "seven", None, LIMIT) == 7
    else:
        with pytest.raises(NoAnswerError):
            ask_here(os.getpid(), "seven", None, LIMIT)


def test_the_system_says_whose_process_the_peer_is() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert service._peer_uid(ours) == os.geteuid()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused(make: Make) -> None:
    make(seven=lambda _: 7)
    pid = os.getpid()

    def look() -> None:
        os.setuid(65534)  # nobody
        with pytest.raises(NoAnswerError):
            ask_here(pid, "seven", None, LIMIT)

    in_child(look)


def test_the_local_socket_leaves_no_file(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make()
    assert list(tmp_path.iterdir()) == []
