"""The service: how processes of a job, and `mpicoll where`, ask a process where it is, without MPI.

A rank that waits for ever can learn why from its peers only beside MPI: they may be in another call,
computing, stopped, or gone. So every process that has a `Communicator` listens: on a TCP port, for the other
ranks, which have been told the port and a secret; and on a local socket named after the process number, for
commands of the same user. A sleeping thread accepts, so this costs nothing until somebody asks.

    request    secret (16 bytes), length (4 bytes), JSON
    reply      length (4 bytes), JSON

What a closed port says: a process that has ended has none, so its host refuses the connection at once. A host
that cannot be reached says nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

ANSWER_WITHIN = 1.0  # seconds for each of connecting, asking and answering
SECRET_SIZE = 16
MAX_MESSAGE = 1 << 20  # bytes
SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface
_LENGTH = struct.Struct(">I")

Handler = Callable[[Any], Any]  # from a request to its reply, both as JSON has it


class Contact(NamedTuple):
    """What another process needs to ask this one."""

    host: str
    pid: int
    port: int
    addresses: tuple[str, ...]
    secret: bytes


class NoAnswerError(Exception):
    """A process did not answer; the message says why."""


class EndedError(NoAnswerError):
    """The process has ended: its host refuses connections to its port."""


def _addresses() -> tuple[str, ...]:
    """IPv4 addresses of this host's interfaces, the loopback's last."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # an interface without an address
                reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                found.append(socket.inet_ntoa(reply[20:24]))
    return tuple(sorted(set(found), key=lambda address: address.startswith("127.")))


def local_name(pid: int) -> str:
    """The local socket of a process: in the abstract namespace, which leaves no file behind."""
    return f"\0mpicoll-{pid}"


class Service:
    """Answers requests with ``handlers``, by the name that a request begins with: ``[name, argument]``."""

    def __init__(self, handlers: dict[str, Handler]) -> None:
        self._handlers = handlers
        self._pid = os.getpid()
        self._secret = secrets.token_bytes(SECRET_SIZE)
        self._remote = socket.create_server(("", 0), backlog=128)
        listeners = [self._remote]
        with contextlib.suppress(OSError):  # a sandbox without local sockets: then `where` cannot ask
            local = socket.socket(socket.AF_UNIX)
            local.bind(local_name(self._pid))
            local.listen()
            listeners.append(local)
        for listener in listeners:
            threading.Thread(
                target=self._accept, args=(listener,), name="mpicoll-service", daemon=True
            ).start()
        # A copy of the process that fork made must not keep the port open when the rank has ended.
        self._listeners = listeners
        os.register_at_fork(after_in_child=self._close)
        # Nor must a rank whose program has ended: MPI may keep the process until the others have ended, too.
        atexit.register(self._end)

    def _close(self) -> None:
        for listener in self._listeners:
            listener.close()

    def _end(self) -> None:
        for listener in self._listeners:
            with contextlib.suppress(OSError):  # it has been closed
                listener.shutdown(socket.SHUT_RDWR)  # `_accept` keeps it open otherwise
        self._close()

    @property
    def contact(self) -> Contact:
        port = self._remote.getsockname()[1]
        return Contact(socket.gethostname(), self._pid, port, _addresses(), self._secret)

    def handle(self, name: str, handler: Handler) -> None:
        """Answer requests of this name, too."""
        self._handlers[name] = handler

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # the interpreter ends, or this is a copy of the process
            # In a thread of its own, for an answer may have to ask others, which may ask this process.
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, ValueError, NoAnswerError):
            connection.settimeout(ANSWER_WITHIN)
            if connection.family == socket.AF_UNIX:
                allowed = _peer_uid(connection) in (0, os.geteuid())
            else:
                allowed = secrets.compare_digest(_receive(connection, SECRET_SIZE), self._secret)
            if allowed:
                name, argument = _receive_json(connection)
                _send_json(connection, self._handlers[name](argument))


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _receive(connection: socket.socket, nbytes: int) -> bytes:
    parts = b""
    while len(parts) < nbytes:
        part = connection.recv(nbytes - len(parts))
        if not part:
            raise NoAnswerError("the connection was closed")
        parts += part
    return parts


def _receive_json(connection: socket.socket) -> Any:
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    if length > MAX_MESSAGE:
        raise NoAnswerError(f"a message of {length} bytes")
    return json.loads(_receive(connection, length))


def _send_json(connection: socket.socket, message: Any) -> None:
    text = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)


def ask(contact: Contact, name: str, argument: Any) -> Any:
    """What a process of the job replies. Raises `EndedError`, and `NoAnswerError` if it is silent."""
    here = contact.host == socket.gethostname()
    refused = True
    for address in contact.addresses:
        if address.startswith("127.") and not here:
            continue
        try:
            with socket.create_connection((address, contact.port), ANSWER_WITHIN) as connection:
                connection.settimeout(ANSWER_WITHIN)
                connection.sendall(contact.secret)
                _send_json(connection, [name, argument])
                return _receive_json(connection)
        except ConnectionRefusedError:
            continue
        except (OSError, ValueError, NoAnswerError):
            refused = False
    if refused:
        raise EndedError(f"process {contact.pid} on {contact.host} has ended")
    raise NoAnswerError(f"process {contact.pid} on {contact.host} does not answer")


def ask_here(pid: int, name: str, argument: Any, within: float) -> Any:
    """What a process of this host and user replies within so many seconds. Raises `NoAnswerError`."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(within)
        try:
            connection.connect(local_name(pid))
            _send_json(connection, [name, argument])
            return _receive_json(connection)
        except (OSError, ValueError) as error:
            raise NoAnswerError(f"process {pid} does not answer: {error}") from error


@cache
def service_of(pid: int, handlers: Callable[[], dict[str, Handler]]) -> Service:
    """The service of the process with this number, which is this one: a forked process makes its own."""
    return Service(handlers())
