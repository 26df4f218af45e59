"""Tensors from one rank to another, by MPI's own messages on the group's communicator."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.futures import Future

from mpicoll.communicator import Communicator
from mpicoll.faults import DeadlineError, MismatchError
from mpicoll.torch.tensors import Tensor, is_plain, owned, plain
from mpicoll.torch.work import NAP, UNLIMITED

PIECE = 1 << 30  # bytes: MPI's counts end at two billion


class Message(dist.Work):
    """A message under way."""

    def __init__(
        self,
        comm: Communicator,
        call: str,
        requests: Sequence[MPI.Request],
        finish: Callable[[], None],
        result: Sequence[Tensor],
        source: int,
        others: Collection[int],
        sizes: Sequence[int] = (),
    ) -> None:
        """``sizes``: bytes that are to be received with each request."""
        super().__init__()
        self._comm, self._call, self._requests, self._finish = comm, call, list(requests), finish
        self._result, self._source = list(result), source
        self._others, self._sizes = others, list(sizes)
        self._turn = threading.Lock()
        self._future: Future[Any] | None = None

    def wait(self, timeout: timedelta = UNLIMITED) -> bool:
        """Until it has been sent, or received. Raises what a collective raises if the other rank ends."""
        if timeout > UNLIMITED:
            self._wait_until(time.monotonic() + timeout.total_seconds())
        with self._turn:
            while self._requests:
                status = MPI.Status()
                with self._understanding():
                    self._comm.complete(self._requests[0], self._call, self._others, status)
                self._received(status)
        return True

    @contextmanager
    def _understanding(self) -> Iterator[None]:
        try:
            yield
        except MPI.Exception as error:
            if error.Get_error_class() != MPI.ERR_TRUNCATE:
                raise
            raise MismatchError(f"{self._call}: the other rank has sent more") from error

    def _wait_until(self, end: float) -> None:
        while not self.is_completed():
            if time.monotonic() > end:
                raise DeadlineError(f"wait: {self._call} was not done in time")
            time.sleep(NAP)

    def _received(self, status: MPI.Status) -> None:
        if self._source == MPI.ANY_SOURCE:
            self._source = status.Get_source()
        del self._requests[0]
        if self._sizes and status.Get_count(MPI.BYTE) != (expected := self._sizes.pop(0)):
            got = status.Get_count(MPI.BYTE)
            raise MismatchError(
                f"{self._call}: expected {expected} bytes, got {got} from rank {self._source}"
            )
        if not self._requests:
            self._finish()

    def is_completed(self) -> bool:
        if not self._turn.acquire(blocking=False):
            return False  # another thread waits for it
        try:
            while self._requests:
                status = MPI.Status()
                with self._understanding():
                    if not self._requests[0].Test(status):
                        return False
                self._received(status)
        finally:
            self._turn.release()
        return True

    def is_success(self) -> bool:
        return self.is_completed()

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    def result(self) -> list[Tensor]:
        """The tensor that was received; waits for it."""
        self.wait()
        return self._result

    def source_rank(self) -> int:
        """Whose message it is, once it has come."""
        return self._source

    _source_rank = source_rank

    def get_future(self) -> Future[Any]:
        """A future of `result`, for which a thread waits."""
        if self._future is None:
            begun: Future[Any] = Future()
            self._future = begun.then(lambda _: self.result())
            threading.Thread(
                target=begun.set_result, args=(None,), name="mpicoll-future", daemon=True
            ).start()
        return self._future


class Messages:
    """Sends and receives tensors on ``comm``."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._last_tag = int(MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 32_767)

    def send(self, tensor: Tensor, target: int, tag: int) -> Message:
        self._check(target, tag, "dst")
        data = owned(plain(tensor).cpu()).view(np.uint8)
        requests = [self._comm.Isend(piece, target, tag) for piece in _pieces(data)]
        call = f"send({_text(tensor)}, dst={target}, tag={tag})"
        # The message lives as long as its memory.
        return Message(self._comm, call, requests, lambda: data.shape, [tensor], self._comm.rank, [target])

    def receive(self, tensor: Tensor, source: int | None, tag: int) -> Message:
        """``source``: None for any."""
        self._check(0 if source is None else source, tag, "src")
        direct = is_plain(tensor) and not tensor.is_cuda
        place = tensor if direct else torch.empty(tensor.shape, dtype=tensor.dtype)
        pieces = _pieces(owned(place).view(np.uint8))
        if source is None and len(pieces) > 1:
            raise RuntimeError(f"recv from any rank: expected at most {PIECE} bytes, got {_text(tensor)}")
        given = MPI.ANY_SOURCE if source is None else source
        requests = [self._comm.Irecv(piece, given, tag) for piece in pieces]
        call = f"recv({_text(tensor)}, src={'any' if source is None else source}, tag={tag})"

        def finish() -> None:
            if not direct:
                tensor.detach().copy_(place)

        others = range(self._comm.size) if source is None else [source]
        sizes = [piece.size for piece in pieces]
        return Message(self._comm, call, requests, finish, [tensor], given, others, sizes)

    def _check(self, rank: int, tag: int, argument: str) -> None:
        if not 0 <= rank < self._comm.size:
            raise RuntimeError(f"{argument}: expected a rank from 0 to {self._comm.size - 1}, got {rank}")
        if not 0 <= tag <= self._last_tag:
            raise RuntimeError(f"tag: expected a number from 0 to {self._last_tag}, got {tag}")


def _pieces(data: Any) -> list[Any]:
    return [data[begin : begin + PIECE] for begin in range(0, max(data.size, 1), PIECE)]


def _text(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
