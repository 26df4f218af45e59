"""The messages transport: executes programs with MPI's point-to-point functions.

`_advance` is a compiled loop without the GIL. It reads a program's rows and calls MPI_Isend, MPI_Irecv and
MPI_Test itself, through their addresses, so a step costs no Python. It returns whenever it has polled for a
while, and goes on where it stopped when called again: signals reach Python, deadlines hold, and a request
can be advanced a little at a time.

One code path serves all MPI libraries: handles are passed in 64-bit registers whether the library's are
4 bytes wide (MPICH, Intel MPI) or pointers (Open MPI), and request arrays have the library's stride.
"""

from __future__ import annotations

import ctypes
import math
import os
from functools import cache
from typing import NoReturn

import numpy as np
from mpi4py import MPI
from numba import njit, types

from mpicoll.kernels.memory import as_float, call, copy_bytes, int64s
from mpicoll.kernels.tasks import DONE, PENDING, Task
from mpicoll.launch import cgroup_cpus
from mpicoll.transports.machine import CACHED, address_of, read_clock, read_int32
from mpicoll.transports.program import COLUMNS, Op, Program
from mpicoll.watch import Waiting, of

# Slots of a plan's state, all int64.
PC = 0  # the next row
NROWS = 1
ROWS = 2  # address of the program's rows
BUFFERS = 3  # addresses of INPUT, OUTPUT, SCRATCH
REQUESTS = 6  # address of the MPI_Request array
STRIDE = 7  # bytes of one MPI_Request
COMM = 8
BYTE = 9  # the handle of MPI_BYTE
TAG = 10
REDUCE_KERNEL = 11
SCALE_KERNEL = 12
FACTOR = 13  # a float64
ISEND = 14  # addresses of functions
IRECV = 15
TEST = 16
YIELD = 17
CLOCK = 18
SPINS = 19  # polls before yielding the core
FLAG = 20  # address of an int that MPI_Test writes, and the int
TIME = 22  # address of a timespec that clock_gettime writes, and the timespec
SLEEP = 25
NAP = 26  # address of the timespec that says how long, and the timespec
STATUS = 29  # address of an MPI_Status that nobody reads, and the status
FAILED = 62  # MPI's error, which is the result from then on: a request that has failed looks complete
EXECUTED = 63  # rows in all
STATE_SIZE = 64

# Nanoseconds to wait for a message before `_advance` returns to Python.
PATIENT = 20_000_000  # often enough for signals
BRIEF = 0  # one look, for calls that must not block

YIELDS = 300  # polls, of ranks that share cores, before they sleep: some hundred microseconds
SHORT_SLEEP = 1000  # nanoseconds; the kernel makes some 50 microseconds of it
POLLS_BETWEEN_LOOKS = 16  # at the clock, which costs as much as a few polls

_WIDTH = len(COLUMNS)
_RECV, _SEND, _WAIT, _REDUCE, _COPY = (int(op) for op in (Op.RECV, Op.SEND, Op.WAIT, Op.REDUCE, Op.COPY))


@njit(nogil=True)
def _wait(s, request, patience):  # type: ignore[no-untyped-def]
    """Poll one request: DONE, PENDING after ``patience`` nanoseconds, or an error code."""
    flag, status = s[FLAG], s[STATUS]
    spins = s[SPINS]
    deadline = types.int64(0)
    poll = 0
    while True:
        error = call(s[TEST], (request, flag, status))
        if error != 0:
            return types.int64(error)
        if read_int32(flag) != 0:
            return DONE
        poll += 1
        if spins == 0 and poll > YIELDS:
            # Yielding on and on, a rank loses its turn: the scheduler may pass it over for milliseconds
            # when its message has come. A rank that wakes from sleep runs at once.
            call(s[SLEEP], (s[NAP], types.int64(0)))
        elif poll > spins:
            call(s[YIELD], ())
        elif patience != BRIEF and poll % POLLS_BETWEEN_LOOKS != 0:
            continue
        # Counting polls is no substitute: where ranks share cores, one yield may take milliseconds.
        now = read_clock(s[CLOCK], s[TIME])
        if deadline == 0:
            deadline = now + patience
        if now >= deadline:
            return PENDING


@CACHED.cfunc("int64(int64, int64)")
def _advance(state, patience):  # type: ignore[no-untyped-def]
    """Execute rows from PC on, until done, an MPI error code, or a message that does not come for a while."""
    s = int64s(state)
    rows = int64s(s[ROWS])
    pc = s[PC]
    nrows = s[NROWS]
    result = s[FAILED]
    while pc < nrows and result == DONE:
        r = pc * _WIDTH
        op, count = rows[r], rows[r + 3]
        request = s[REQUESTS] + rows[r + 1] * s[STRIDE]
        dst = s[BUFFERS + rows[r + 4]] + rows[r + 5]
        a = s[BUFFERS + rows[r + 6]] + rows[r + 7]
        if op == _WAIT:
            result = _wait(s, request, patience)
        elif op == _RECV:
            ends = (types.int32(rows[r + 2]), types.int32(s[TAG]))
            result = call(s[IRECV], (dst, types.int32(count), s[BYTE], ends[0], ends[1], s[COMM], request))
        elif op == _SEND:
            ends = (types.int32(rows[r + 2]), types.int32(s[TAG]))
            result = call(s[ISEND], (a, types.int32(count), s[BYTE], ends[0], ends[1], s[COMM], request))
        elif op == _REDUCE:
            b = s[BUFFERS + rows[r + 8]] + rows[r + 9]
            call(s[REDUCE_KERNEL], (dst, a, b, count))
        elif op == _COPY:
            copy_bytes(dst, a, count)
        else:
            call(s[SCALE_KERNEL], (dst, count, as_float(s[FACTOR])))
        if result != DONE:
            break
        pc += 1
    if result > DONE:
        s[FAILED] = result
    s[EXECUTED] += pc - s[PC]
    s[PC] = pc if pc < nrows else 0  # ready for the next start
    return result


_call_advance = _advance.ctypes  # other Python threads go on meanwhile


@cache
def _functions() -> dict[int, int]:
    """Addresses of the C functions that programs call, by their state slot."""
    # Looked up through mpi4py's extension module, they are those of the library that it is linked to,
    # which need not be the first on any search path.
    mpi, libc = ctypes.CDLL(MPI.__file__), ctypes.CDLL(None)
    found = {ISEND: mpi.MPI_Isend, IRECV: mpi.MPI_Irecv, TEST: mpi.MPI_Test}
    found |= {YIELD: libc.sched_yield, CLOCK: libc.clock_gettime, SLEEP: libc.nanosleep}
    return {slot: address_of(f) for slot, f in found.items()}


def count_cores(node: MPI.Intracomm) -> int:
    """How many cores the ranks of ``node``, which share memory, may keep busy together; collective."""
    bound = set().union(*node.allgather(os.sched_getaffinity(0)))
    limit: float = min(node.allgather(cgroup_cpus() or math.inf))
    return math.ceil(min(len(bound), limit))


def _handle(thing: MPI.Intracomm | MPI.Datatype) -> int:
    """The C handle of an MPI object, without the sign that a 4-byte handle is extended with."""
    bits = 8 * MPI._sizeof(thing)
    return int(MPI._handleof(thing)) & ((1 << bits) - 1)


class MessagePlan:
    """A program bound to a communicator, a tag and kernels, with its requests and scratch memory.

    `bind` the buffers' addresses, then call `advance` until it says true; the next `advance` begins anew. The
    handles, the scratch memory and the compiled rows are made once and serve every time.
    """

    tagged = True  # calls are told from each other by a tag

    def __init__(
        self, program: Program, comm: MPI.Intracomm, spins: int, kernel: int = 0, scale: int = 0
    ) -> None:
        stride = MPI._sizeof(MPI.Request)
        self._rows = program.rows
        self.scratch = program.scratch  # bytes
        self._requests = np.zeros(max(1, program.requests) * stride, np.uint8)
        self._scratch = np.empty(program.scratch + 64, np.uint8)
        self._state = state = np.zeros(STATE_SIZE, np.int64)
        state[NROWS], state[ROWS] = len(program.rows), self._rows.ctypes.data
        state[BUFFERS + 2] = -(-self._scratch.ctypes.data // 64) * 64
        state[REQUESTS], state[STRIDE] = self._requests.ctypes.data, stride
        state[COMM], state[BYTE] = _handle(comm), _handle(MPI.BYTE)
        state[REDUCE_KERNEL], state[SCALE_KERNEL] = kernel, scale
        self.set_factor(1 / comm.Get_size())
        state[SPINS] = spins
        for slot, address in _functions().items():
            state[slot] = address
        self._address = state.ctypes.data
        for slot in (FLAG, TIME, NAP, STATUS):
            state[slot] = self._address + 8 * (slot + 1)
        state[NAP + 2] = SHORT_SLEEP
        self._watch, self._ranks = of(comm)
        self._waiting = Waiting(self._watch, lambda: int(state[EXECUTED]))
        self._memory = memoryview(state.data)  # item assignment at a fraction of NumPy's cost

    def retire(self) -> None:
        """The caller needs the plan no more."""

    def bind(self, tag: int, send: int, recv: int) -> None:
        """Use the caller's buffers at these addresses; nothing is sent yet."""
        memory = self._memory
        memory[TAG] = tag
        memory[BUFFERS] = send
        memory[BUFFERS + 1] = recv

    def run(self, tag: int, send: int, recv: int) -> None:
        """`bind` and `advance` to the end, in one function: each one more is felt in small messages."""
        memory = self._memory
        memory[TAG] = tag
        memory[BUFFERS] = send
        memory[BUFFERS + 1] = recv
        try:
            result = _call_advance(self._address, PATIENT)
            while result != DONE and not self._heed(result, PATIENT):
                result = _call_advance(self._address, PATIENT)
        except BaseException as error:
            self._break_off(error)
            raise

    def advance(self, patience: int = PATIENT) -> bool:
        """Go on; whether the program has ended.

        Returns false when a message has not come for ``patience`` nanoseconds. Raises `MPI.Exception` if MPI
        reports an error, `RankFailedError`, `MismatchError` or `DeadlineError` if waiting is of no use.
        """
        try:
            return self._heed(_call_advance(self._address, patience), patience)
        except BaseException as error:
            self._break_off(error, waiting=patience == PATIENT)
            raise

    def _heed(self, result: int, patience: int) -> bool:
        """Whether this result means the end of the program; raises what it means otherwise."""
        if result > DONE:
            self.fail(result)
        if result == PENDING and patience == PATIENT:
            self.check()
        return bool(result == DONE)

    def _break_off(self, error: BaseException, waiting: bool = True) -> None:
        # Ctrl-C between two looks breaks nothing off, nor does it when the program is at its end.
        if isinstance(error, Exception) or (waiting and self._state[PC]):
            self.give_up(error)

    def give_up(self, error: BaseException) -> None:
        """The others are not to wait for this rank, which has met ``error``."""
        self._watch.give_up(error)

    def check(self) -> None:
        """Raise if a rank that is waited for will never come."""
        self._waiting.look(self._describe, self._waits_for)

    def fail(self, result: int) -> NoReturn:
        """Raise the error that MPI has reported."""
        raise self._watch.error_of(MPI.Exception(result))

    def _describe(self) -> str:
        return self._watch.text_of(int(self._state[TAG]))

    def _waits_for(self) -> tuple[int, ...]:
        """Whose message, or whose readiness for one, must come next."""
        done = self._rows[: int(self._state[PC]) + 1]
        started = done[(done[:, 0] != _WAIT) & (done[:, 1] == done[-1, 1])]
        return (self._ranks[int(started[-1, 2])],) if done[-1, 0] == _WAIT and len(started) else ()

    @property
    def tasks(self) -> list[Task]:
        """The program, once bound, for other compiled code."""
        return [Task(_advance.address, self._address, self)]

    @property
    def bound_words(self) -> tuple[int, int, list[int]]:
        """Addresses of what `bind` writes: where the buffers' addresses go, and the tag."""
        send = self._address + 8 * BUFFERS
        return send, send + 8, [self._address + 8 * TAG]

    def set_factor(self, factor: float) -> None:
        """What sums are multiplied by where the operation is AVG, instead of one over the number of ranks."""
        self._state[FACTOR : FACTOR + 1].view(np.float64)[0] = factor
