"""The shared transport: ranks of one node read each other's memory.

Every rank has a **block** in its arena that the others map: two control lines, two **slots** for what it
brings in, and two **results** for what it has reduced. A collective is a few **steps**, the same number on
every rank. In a step a rank waits until the others have published the step before, works, and publishes the
step by writing its number into a control line, with a release store. Numbers go on from call to call, so
nothing is ever reset, and there is no barrier at the end.

Why two of everything are enough: step g writes into the lines and slots of g's parity, last used by step
g - 2, and read by the others in their step g - 1. They have all published g - 1 when g begins.

What the steps do depends on the size:

- **one shot**: everybody publishes its input and reduces everybody's. One step, one wait. A few bytes
  travel in the control line itself.
- **slices**: rank r reduces the r-th slice of each segment. In step t a rank brings in segment t, reduces its
  slice of segment t - 1 and copies out the others' slices of segment t - 2, so it seldom waits for long.
  Segments are small enough to stay in the caches.
- **blocks**: reduce-scatter; as slices, but the results stay where they are.
- **exchange**: everything that only moves bytes.
- **direct**: where inputs lie in the arena, or the system lets processes read each other's memory, nothing is
  brought in: ranks read inputs where they are, and write results where they belong.

Reductions fold the ranks in ascending order, whatever the way, so all give the same bits.
"""

from __future__ import annotations

from numba import njit, types

from mpicoll.kernels.memory import (
    as_float,
    call,
    call_long,
    copy_bytes,
    copy_lines,
    copy_streaming,
    fence,
    int64s,
)
from mpicoll.kernels.tasks import DONE, PENDING
from mpicoll.schedule import CACHE_LINE, chunk_start
from mpicoll.transports.machine import CACHED, load_acquire, pause, read_clock, store_release

# -- a channel's state: what all calls of a communicator share. All int64.
RANK = 0
NRANKS = 1
NEXT = 2  # the number of the next step
KNOWN = 3  # all ranks are known to have published this step
SLOT = 4  # bytes that a rank brings in at once, at most
RING = 5  # bytes of the ring in which it does
BLOCKS = 6  # address of a table: every rank's block
ARENAS = 7  # address of a table: every rank's arena
PIDS = 8  # address of a table: every rank's process number
ARENA = 9  # where the own arena begins, and ends
ARENA_END = 10
SCRATCH = 11  # address of 2 * FOLDED bytes
SPINS = 12  # polls before the core is yielded
YIELD = 13  # addresses of functions
CLOCK = 14
SLEEP = 15
READ_MEMORY = 16
TIME = 17  # address of a timespec that clock_gettime writes, and the timespec
NAP = 20  # address of the timespec that says how long to sleep, and the timespec
VECTORS = 23  # address of two iovec, and the two
SMALL = 28  # bytes up to which a reduction is one shot
QUIET = 29  # bytes up to which other calls do not ask where inputs lie
FAR = 30  # bytes of a block from which on others' memory is read
LARGE = 31  # bytes from which on results go past the caches
POSITION = 32  # where the ring is free
UNFENCED = 33  # whether that has happened since the last step was published
DROWSY = 39  # nanoseconds of waiting after which a rank sleeps between polls
BROKEN = 34  # whether no further call is possible
BRINGS = 35  # how often something large has been brought in
COSTS = 36  # address of two numbers: time per byte of doing so through the caches, and past them
EXPECTED = 40  # the call that not all have been seen to be in when it ended, or NOTHING, and its size
EXPECTED_SIZE = 41
CHANNEL_SIZE = 48

# -- a job's state: one collective call.
CHANNEL = 0  # address of the channel's state
KIND = 1
STEP = 2  # the next step
LAST = 3  # steps that are published; the wait and the work that follow them end the job
BASE = 4  # the number of step 0
CALL = 5  # what is called, for the ranks to compare
SIZE = 6  # elements or bytes, to be compared, too; where ranks do not know each other's, pieces needed
SEND = 7  # addresses of the caller's buffers
RECV = 8
COUNT = 9  # elements of the vector
ITEM = 10  # bytes of an element
FIRST = 11  # kernels: sum = element op element
FOLD = 12  # sum = sum op element
AVERAGE = 13  # sum *= FACTOR; 0 for none
NARROW = 14  # element = sum; 0 where sums are of the elements' own type
FACTOR = 15  # a float64
SENDER = 16  # the rank that alone sends, or receives, or EVERYONE
RECEIVER = 17
PIECE = 18  # elements of a segment, or bytes of a block, that go through a slot in one step
PIECES = 19
SHARED = 20  # whether a rank's block goes to all others, not one to each
UNEVEN = 21  # whether ranks know only their own sizes
SETTLES = 22  # whether step 1 looks where inputs lie; small calls have no time for that
EXPOSED = 23  # where after SEND others may begin to read; NEVER where they may not read directly
REMOTE = 24  # where after that this rank begins to read
FOREIGN = 25  # whether others' memory outside the arena is read, too
DIRECT = 26  # found in step 1: whether nothing goes through slots
LENT = 27  # found in step 1: whether others read inputs in the arena to the end
STREAM = 28  # whether results are too large for the caches
SOURCES = 29  # tables of one entry a rank. Found in step 1: where inputs lie in the arena, 0 for in slots
TERMS = 30  # addresses of what is reduced, in the order of ranks
SEND_AT = 31  # the block for each rank in SEND, in bytes, for reductions in elements
SEND_LENGTH = 32
RECV_AT = 33  # the block from each rank in RECV
RECV_LENGTH = 34
CULPRIT = 35  # the rank that is in another call, or whose memory cannot be read
STRIDE = 37  # bytes of the ring for a step, the same on all ranks
PLACE = 38  # where in the ring this step's are, and the ones before
PREVIOUS = 39
RESULTS = 40  # where after that the results begin
OPERATION = 36  # a number for operation and dtype, for the ranks to compare
JOB_SIZE = 48
TABLES = (SOURCES, TERMS, SEND_AT, SEND_LENGTH, RECV_AT, RECV_LENGTH)

# -- a block: two control lines, the line that says whether the rank has given up, then slots and results.
LINE_CALL = 1  # words of a control line; word 0 is the step's number
LINE_SIZE = 2
LINE_SEND = 3
LINE_RECV = 4
DATA = 32  # bytes after which a control line has room for data, if there is no need of LINE_RECV
INLINE = 32  # bytes of room
GIVEN_UP = 2 * CACHE_LINE
CONTROL = 4096  # bytes before the slots: a page

ONE_SHOT, SLICES, BLOCKWISE, EXCHANGE = range(4)

MISMATCH = -2
UNREADABLE = -3
CLOSED = -4

SPIN = 1  # nanoseconds to wait: spin, but do not yield the core

GAVE_UP, FREED = 1, 2  # why a channel is closed

EVERYONE = -1
NOBODY = -2
NEVER = -1
NOTHING = -1
ANY_SIZE = -1

STREAMABLE = 4 << 10  # bytes of a copy from which on the caches may be passed by
TIMED_ONCE_IN = 32  # copies, the cost of one is measured
TRIED_ONCE_IN = 8  # measurements, one is of the way that has seemed to be the slower one

FOLDED = 16 << 10  # bytes that are reduced over all ranks before the next: they stay in the first-level cache
POLLS_BETWEEN_LOOKS = 64  # at the clock
NAP_LENGTH = 1000  # nanoseconds; the system makes some fifty thousand of it


_chunk_start = njit(inline="always")(chunk_start)


@njit(nogil=True)
def _line(c, rank, step):  # type: ignore[no-untyped-def]
    """The control line in which a rank publishes a step."""
    return int64s(c[BLOCKS])[rank] + (step & 1) * CACHE_LINE


@njit(nogil=True)
def _slot(c, rank, place):  # type: ignore[no-untyped-def]
    """Where in a rank's ring a place is: all ranks use the same places in the same steps."""
    return int64s(c[BLOCKS])[rank] + CONTROL + place


@njit(nogil=True)
def _take_place(c, j, t):  # type: ignore[no-untyped-def]
    """Remember the place of the step before, and go on in the ring if this step needs one."""
    j[PREVIOUS] = j[PLACE]
    if t < j[LAST] or t == 0:
        j[PLACE] = c[POSITION] if c[POSITION] + j[STRIDE] <= c[RING] else 0
        c[POSITION] = j[PLACE] + j[STRIDE]


# -- waiting and publishing


@njit(nogil=True)
def _poll(c, line, step, patience):  # type: ignore[no-untyped-def]
    """Wait until a line says ``step`` or more; false after ``patience`` nanoseconds."""
    if load_acquire(line) >= step:
        return True
    if patience == 0:
        return False
    for _ in range(c[SPINS]):
        if load_acquire(line) >= step:
            return True
        pause()
    if patience == SPIN:
        return False
    began = read_clock(c[CLOCK], c[TIME])
    polls = 0
    while load_acquire(line) < step:
        call(c[YIELD], ())
        polls += 1
        if polls % POLLS_BETWEEN_LOOKS == 0:
            waited = read_clock(c[CLOCK], c[TIME]) - began
            if waited >= patience:
                return False
            if waited >= c[DROWSY]:
                # Yielding on and on, a rank may be passed over for milliseconds; woken up, it runs at once.
                call(c[SLEEP], (c[NAP], types.int64(0)))
    return True


@njit(nogil=True)
def _differs(line, kind, size):  # type: ignore[no-untyped-def]
    """Whether a rank that has published a step by this line is in another call than is expected."""
    words = int64s(line)
    if words[LINE_CALL] == kind and words[LINE_SIZE] == size:
        return False
    return kind != NOTHING and (words[LINE_CALL] != kind or size != ANY_SIZE)


@njit(nogil=True)
def _await(c, j, whom, step, kind, size, patience):  # type: ignore[no-untyped-def]
    """Wait until everyone, or one rank, has published ``step``, of the call that is expected.

    Only lines that have been waited for are looked at: to fetch another from another core costs as much as a
    small call. Who has not waited for everyone expects the same call at the beginning of the next, where all
    wait for all: a call of one step, the only one that may wait for less, leaves its lines until then.
    """
    if whom == NOBODY or c[KNOWN] >= step:
        return DONE
    nranks = c[NRANKS]
    rank = c[RANK] if whom == EVERYONE else whom - 1
    for _ in range(nranks - 1 if whom == EVERYONE else 1):
        rank = rank + 1 if rank + 1 < nranks else 0
        line = _line(c, rank, step)
        if not _poll(c, line, step, patience):
            return PENDING
        if _differs(line, kind, size):
            j[CULPRIT] = rank
            return MISMATCH
    if whom == EVERYONE:
        c[KNOWN] = step
    return DONE


@njit(nogil=True)
def _whom(c, j, t):  # type: ignore[no-untyped-def]
    """Who must have published step t - 1 before this rank begins step t."""
    alone = j[SENDER] if j[SENDER] != EVERYONE else j[RECEIVER]
    if alone == EVERYONE or t == 0 or (t == 1 and j[SETTLES] != 0):
        return EVERYONE
    if t == j[LAST] and j[DIRECT] == 0 and j[LENT] == 0:  # the last step only takes what others bring
        receives = j[RECEIVER] == c[RANK] or (j[RECEIVER] == EVERYONE and j[SENDER] != c[RANK])
        if not receives:
            return NOBODY
    if alone == c[RANK] or j[KIND] != EXCHANGE:
        return EVERYONE
    return alone


@njit(nogil=True)
def _exposure(c, address):  # type: ignore[no-untyped-def]
    """How others get at memory: its address, or in the arena its offset, as a negative number."""
    if c[ARENA] <= address < c[ARENA_END]:
        return c[ARENA] - address - 1
    return address


@njit(nogil=True)
def _publish(c, j, t):  # type: ignore[no-untyped-def]
    step = j[BASE] + t
    line = _line(c, c[RANK], step)
    if t == 0:
        words = int64s(line)
        words[LINE_CALL] = j[CALL]
        words[LINE_SIZE] = j[SIZE]
        if j[SETTLES] != 0:
            words[LINE_SEND] = _exposure(c, max(1, j[SEND] + j[EXPOSED])) if j[EXPOSED] != NEVER else 0
            words[LINE_RECV] = _exposure(c, j[RECV])
    if c[UNFENCED] != 0:
        fence()
        c[UNFENCED] = 0
    store_release(line, step)


@njit(nogil=True)
def _sends(c, j, rank):  # type: ignore[no-untyped-def]
    return j[SENDER] == EVERYONE or j[SENDER] == rank


@njit(nogil=True)
def _settle(c, j):  # type: ignore[no-untyped-def]
    """After step 0: where everything lies, and so how all ranks go on. They all come to the same answer."""
    sources, arenas = int64s(j[SOURCES]), int64s(c[ARENAS])
    lent = 0
    direct = True
    if j[UNEVEN] != 0:
        j[PIECES] = 1
    for rank in range(c[NRANKS]):
        words = int64s(_line(c, rank, j[BASE]))
        at, into = words[LINE_SEND], words[LINE_RECV]
        sources[rank] = arenas[rank] - at - 1 if at < 0 else 0
        if _sends(c, j, rank):
            lent += at < 0
            direct = direct and (at < 0 or (j[FOREIGN] != 0 and at != 0))
        if j[KIND] == SLICES:
            direct = direct and into < 0 and j[RECEIVER] == EVERYONE
        if j[UNEVEN] != 0:
            j[PIECES] = max(j[PIECES], words[LINE_SIZE])
    j[DIRECT] = direct
    j[LENT] = lent
    if direct:
        j[LAST] = 2
    elif j[KIND] == SLICES:
        j[LAST] = j[PIECES] + 1
    else:
        j[LAST] = j[PIECES] + (lent != 0)


# -- moving and reducing


@njit(nogil=True)
def _bring(c, dst, src, nbytes):  # type: ignore[no-untyped-def]
    """To memory that others read.

    Which way is faster depends on where the other ranks' cores are: lines that another core has read may have
    to be fetched back one by one. It is measured now and then, a while after which the costs are forgotten.
    """
    if nbytes < STREAMABLE:
        copy_bytes(dst, src, nbytes)
        return
    costs = int64s(c[COSTS])
    c[BRINGS] += 1
    timed = c[BRINGS] % TIMED_ONCE_IN == 0 or costs[0] == 0 or costs[1] == 0
    way = 0 if costs[0] <= costs[1] else 1
    if costs[way] == 0 and costs[1 - way] == 0:
        way = 0
    if timed and c[BRINGS] % (TRIED_ONCE_IN * TIMED_ONCE_IN) == 0:
        way = 1 - way
    began = read_clock(c[CLOCK], c[TIME]) if timed else 0
    if way == 0:
        copy_bytes(dst, src, nbytes)
    else:
        c[UNFENCED] = 1
        copy_streaming(dst, src, nbytes)
        if timed:
            fence()
    if timed:
        cost = ((read_clock(c[CLOCK], c[TIME]) - began) << 10) // nbytes + 1
        if way == 1:
            cost += cost // 4  # those who read it have to fetch it from further away
        costs[way] = min(cost, costs[way] + costs[way] // 4) if costs[way] != 0 else cost


@njit(nogil=True)
def _copy_out(j, dst, src, nbytes):  # type: ignore[no-untyped-def]
    """To the caller's memory."""
    if j[STREAM] != 0:
        copy_streaming(dst, src, nbytes)
    else:
        copy_lines(dst, src, nbytes)


@njit(nogil=True)
def _fold(c, j, dst, count):  # type: ignore[no-untyped-def]
    """Reduce ``count`` elements at each of TERMS, in the order of ranks; ``dst`` overlaps none of them."""
    terms, nranks, item = int64s(j[TERMS]), c[NRANKS], j[ITEM]
    block = FOLDED // max(item, 4)
    if nranks == 2 and j[NARROW] == 0:
        block = max(count, 1)
    for start in range(0, count, block):
        length = min(block, count - start)
        at = start * item
        total = c[SCRATCH] if j[NARROW] != 0 else dst + at
        call(j[FIRST], (total, terms[0] + at, terms[1] + at, length))
        for rank in range(2, nranks):
            call(j[FOLD], (total, total, terms[rank] + at, length))
        if j[AVERAGE] != 0:
            call(j[AVERAGE], (total, length, as_float(j[FACTOR])))
        if j[NARROW] != 0:
            call(j[NARROW], (dst + at, total, length))


@njit(nogil=True)
def _fold_twice(c, j, result, into, count):  # type: ignore[no-untyped-def]
    """As `_fold`, to where the others read it, and to the caller's memory if he gets it."""
    item = j[ITEM]
    terms, nranks = int64s(j[TERMS]), c[NRANKS]
    block = FOLDED // max(item, 4)
    folded = c[SCRATCH] + FOLDED
    # In place, an input would be overwritten before it has been read.
    straight = into != 0 and j[SEND] != j[RECV] and j[STREAM] == 0
    for start in range(0, count, block):
        length = min(block, count - start)
        total = into + start * item if straight else folded
        _fold(c, j, total, length)
        _bring(c, result + start * item, total, length * item)
        if into != 0 and not straight:
            _copy_out(j, into + start * item, total, length * item)
        for rank in range(nranks):
            terms[rank] += length * item


@njit(nogil=True)
def _one_shot(c, j, t):  # type: ignore[no-untyped-def]
    nbytes = j[COUNT] * j[ITEM]
    inline = nbytes <= INLINE
    step = j[BASE]
    if t == 0:
        own = _line(c, c[RANK], step) + DATA if inline else _slot(c, c[RANK], j[PLACE])
        _bring(c, own, j[SEND], nbytes)
    elif j[RECEIVER] == EVERYONE or j[RECEIVER] == c[RANK]:
        terms = int64s(j[TERMS])
        for rank in range(c[NRANKS]):
            terms[rank] = _line(c, rank, step) + DATA if inline else _slot(c, rank, j[PREVIOUS])
        _fold(c, j, j[RECV], j[COUNT])


@njit(nogil=True)
def _lends(c, j):  # type: ignore[no-untyped-def]
    """Whether the others read this rank's input where it lies."""
    return j[SETTLES] != 0 and j[EXPOSED] != NEVER and _exposure(c, j[SEND]) < 0


@njit(nogil=True)
def _slices(c, j, t):  # type: ignore[no-untyped-def]
    if j[DIRECT] != 0:
        if t == 1:
            _slice_directly(c, j)
        return
    nranks, me, item, segment = c[NRANKS], c[RANK], j[ITEM], j[PIECE]
    receives = j[RECEIVER] == EVERYONE or j[RECEIVER] == me
    if t < j[PIECES] and not _lends(c, j):
        start = t * segment
        length = min(segment, j[COUNT] - start)
        begin, end = _chunk_start(length, nranks, me, item), _chunk_start(length, nranks, me + 1, item)
        slot, at = _slot(c, me, j[PLACE]), j[SEND] + start * item
        _bring(c, slot, at, begin * item)
        _bring(c, slot + end * item, at + end * item, (length - end) * item)
    if 1 <= t <= j[PIECES]:
        start = (t - 1) * segment
        length = min(segment, j[COUNT] - start)
        begin, end = _chunk_start(length, nranks, me, item), _chunk_start(length, nranks, me + 1, item)
        sources, terms = int64s(j[SOURCES]), int64s(j[TERMS])
        for rank in range(nranks):
            lent = sources[rank] + start * item
            terms[rank] = (lent if sources[rank] != 0 else _slot(c, rank, j[PREVIOUS])) + begin * item
        terms[me] = j[SEND] + (start + begin) * item
        into = j[RECV] + (start + begin) * item if receives else 0
        _fold_twice(c, j, _slot(c, me, j[PLACE]) + j[RESULTS], into, end - begin)
    if t >= 2 and receives:
        start = (t - 2) * segment
        length = min(segment, j[COUNT] - start)
        for i in range(1, nranks):
            rank = (me + i) % nranks
            begin, end = (
                _chunk_start(length, nranks, rank, item),
                _chunk_start(length, nranks, rank + 1, item),
            )
            into = j[RECV] + (start + begin) * item
            _copy_out(j, into, _slot(c, rank, j[PREVIOUS]) + j[RESULTS], (end - begin) * item)


@njit(nogil=True)
def _slice_directly(c, j):  # type: ignore[no-untyped-def]
    """Reduce the own slice of all inputs and write it to all outputs, which lie in arenas."""
    nranks, me, item, count = c[NRANKS], c[RANK], j[ITEM], j[COUNT]
    begin, end = _chunk_start(count, nranks, me, item), _chunk_start(count, nranks, me + 1, item)
    sources, terms, arenas = int64s(j[SOURCES]), int64s(j[TERMS]), int64s(c[ARENAS])
    block = FOLDED // max(item, 4)
    folded = c[SCRATCH] + FOLDED
    for start in range(begin, end, block):
        length = min(block, end - start)
        for rank in range(nranks):
            terms[rank] = sources[rank] + start * item
        _fold(c, j, folded, length)
        for i in range(nranks):
            rank = (me + i) % nranks
            into = arenas[rank] - int64s(_line(c, rank, j[BASE]))[LINE_RECV] - 1
            if rank == me:
                _copy_out(j, into + start * item, folded, length * item)
            else:
                _bring(c, into + start * item, folded, length * item)


@njit(nogil=True)
def _blockwise(c, j, t):  # type: ignore[no-untyped-def]
    nranks, me, item = c[NRANKS], c[RANK], j[ITEM]
    at, lengths = int64s(j[SEND_AT]), int64s(j[SEND_LENGTH])
    piece = j[PIECE]
    if t < j[PIECES] and j[DIRECT] == 0 and not _lends(c, j):
        for rank in range(nranks):
            length = min(piece, lengths[rank] - t * piece)
            if rank != me and length > 0:
                source = j[SEND] + (at[rank] + t * piece) * item
                _bring(c, _slot(c, me, j[PLACE]) + rank * piece * item, source, length * item)
    if t == 0:
        return
    if j[DIRECT] != 0:
        start, length = 0, lengths[me] if t == 1 else 0
    else:
        start = (t - 1) * piece
        length = min(piece, lengths[me] - start)
    if length <= 0:
        return
    sources, terms = int64s(j[SOURCES]), int64s(j[TERMS])
    for rank in range(nranks):
        lent = sources[rank] + (at[me] + start) * item
        terms[rank] = (
            lent
            if j[SETTLES] != 0 and sources[rank] != 0
            else _slot(c, rank, j[PREVIOUS]) + me * piece * item
        )
    terms[me] = j[SEND] + (at[me] + start) * item
    _fold(c, j, j[RECV] + start * item, length)


@njit(nogil=True)
def _own_block(c, j):  # type: ignore[no-untyped-def]
    """What a rank sends itself."""
    me = c[RANK]
    source, into = j[SEND] + int64s(j[SEND_AT])[me], j[RECV] + int64s(j[RECV_AT])[me]
    length = int64s(j[RECV_LENGTH])[me]
    if source != into and length > 0:
        _copy_out(j, into, source, length)


@njit(nogil=True)
def _exchange(c, j, t):  # type: ignore[no-untyped-def]
    nranks, me, piece = c[NRANKS], c[RANK], j[PIECE]
    if t < j[PIECES] and j[DIRECT] == 0 and j[FOREIGN] == 0 and _sends(c, j, me) and not _lends(c, j):
        at, lengths = int64s(j[SEND_AT]), int64s(j[SEND_LENGTH])
        slot = _slot(c, me, j[PLACE])
        for i in range(1, 2 if j[SHARED] != 0 else nranks):
            rank = (me + i) % nranks
            length = min(piece, lengths[rank] - t * piece)
            if length > 0:
                into = slot if j[SHARED] != 0 else slot + rank * piece
                _bring(c, into, j[SEND] + at[rank] + t * piece, length)
    if t == 0:
        return DONE
    into, lengths, sources = int64s(j[RECV_AT]), int64s(j[RECV_LENGTH]), int64s(j[SOURCES])
    if j[DIRECT] != 0:
        return _fetch(c, j) if t == 1 else DONE
    start = (t - 1) * piece
    for i in range(1, nranks):
        rank = (me + i) % nranks
        length = min(piece, lengths[rank] - start)
        if length > 0:
            slot = _slot(c, rank, j[PREVIOUS])
            source = slot if j[SHARED] != 0 else slot + me * piece
            if j[SETTLES] != 0 and sources[rank] != 0:
                source = sources[rank] + j[REMOTE] + start
            _copy_out(j, j[RECV] + into[rank] + start, source, length)
    return DONE


@njit(nogil=True)
def _fetch(c, j):  # type: ignore[no-untyped-def]
    """Copy blocks from where the others have them."""
    nranks, me = c[NRANKS], c[RANK]
    into, lengths, sources = int64s(j[RECV_AT]), int64s(j[RECV_LENGTH]), int64s(j[SOURCES])
    for i in range(1, nranks):
        rank = (me + i) % nranks
        if lengths[rank] > 0 and sources[rank] != 0:
            _copy_out(j, j[RECV] + into[rank], sources[rank] + j[REMOTE], lengths[rank])
        elif lengths[rank] > 0:
            source = int64s(_line(c, rank, j[BASE]))[LINE_SEND] + j[REMOTE]
            if not _read_memory(c, rank, j[RECV] + into[rank], source, lengths[rank]):
                j[CULPRIT] = rank
                return UNREADABLE
    return DONE


@njit(nogil=True)
def _read_memory(c, rank, dst, src, nbytes):  # type: ignore[no-untyped-def]
    """Copy from another process's memory, which the system does."""
    vectors = int64s(c[VECTORS])
    done = types.int64(0)
    one, none = types.int64(1), types.int64(0)
    while done < nbytes:
        vectors[0], vectors[1] = dst + done, nbytes - done
        vectors[2], vectors[3] = src + done, nbytes - done
        arguments = (int64s(c[PIDS])[rank], c[VECTORS], one, c[VECTORS] + 16, one, none)
        copied = call_long(c[READ_MEMORY], arguments)
        if copied <= 0:
            return False
        done += copied
    return True


# -- a job from begin to end


@njit(nogil=True)
def _work(c, j, t):  # type: ignore[no-untyped-def]
    kind = j[KIND]
    if kind == ONE_SHOT:
        _one_shot(c, j, t)
    elif kind == SLICES:
        _slices(c, j, t)
    elif kind == BLOCKWISE:
        _blockwise(c, j, t)
    else:
        return _exchange(c, j, t)
    return DONE


@CACHED.cfunc("int64(int64, int64)")
def _advance(job, patience):  # type: ignore[no-untyped-def]
    """Go on with a job until it is done, an error, or nobody publishes for ``patience`` nanoseconds."""
    j = int64s(job)
    c = int64s(j[CHANNEL])
    t = j[STEP]
    if t == 0:
        if c[BROKEN] != 0:
            return CLOSED
        j[BASE] = c[NEXT]
        j[DIRECT] = j[LENT] = 0
        if j[UNEVEN] != 0:
            j[PIECES] = j[SIZE]
    kind, size = NOTHING, types.int64(ANY_SIZE)
    if t == 0:
        kind, size = c[EXPECTED], c[EXPECTED_SIZE]
    elif t == 1:
        kind, size = j[CALL], j[SIZE] if j[UNEVEN] == 0 else ANY_SIZE
    while True:
        whom = _whom(c, j, t)
        result = _await(c, j, whom, j[BASE] + t - 1, kind, size, patience)
        if result != DONE:
            j[STEP] = t
            return result
        if t == 0:
            kind, size = j[CALL], j[SIZE] if j[UNEVEN] == 0 else ANY_SIZE
        elif t == 1:
            c[EXPECTED], c[EXPECTED_SIZE] = kind if whom != EVERYONE else NOTHING, size
            kind = NOTHING
            if j[SETTLES] != 0:
                _settle(c, j)
        _take_place(c, j, t)
        result = _work(c, j, t)
        if result != DONE:
            j[STEP] = t
            return result
        if t == j[LAST]:
            break
        _publish(c, j, t)
        if t == 0 and j[KIND] == EXCHANGE:
            _own_block(c, j)  # while the others publish
        t += 1
    c[NEXT] = j[BASE] + j[LAST]
    j[STEP] = 0
    return DONE


# -- setting a job up

COLLECTIVES = (
    "allreduce",
    "reduce",
    "reduce_scatter",
    "broadcast",
    "allgather",
    "gather",
    "scatter",
    "alltoall",
    "barrier",
)
ALLREDUCE, REDUCE, REDUCE_SCATTER, BROADCAST, ALLGATHER, GATHER, SCATTER, ALLTOALL, BARRIER = range(9)


@njit(nogil=True)
def _whole_lines(nbytes):  # type: ignore[no-untyped-def]
    return (nbytes + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


@njit(nogil=True)
def _reduction(c, j, count):  # type: ignore[no-untyped-def]
    j[COUNT] = count
    nbytes = count * j[ITEM]
    if nbytes <= c[SMALL]:
        j[KIND], j[SETTLES], j[PIECES], j[LAST] = ONE_SHOT, 0, 1, 1
        j[STRIDE] = _whole_lines(nbytes) if nbytes > INLINE else 0
        return
    # Segments as even as can be, each but the last a whole number of cache lines for every rank. From the
    # size of a slot on there are at least two, so that there is something to do while the others work.
    pieces = (nbytes + c[SLOT] - 1) // c[SLOT] + (nbytes == c[SLOT])
    unit = c[NRANKS] * CACHE_LINE
    segment = (nbytes // pieces + unit) // unit * unit
    j[KIND], j[SETTLES] = SLICES, 1
    j[PIECE] = min(segment, c[SLOT]) // j[ITEM]
    j[PIECES] = (count + j[PIECE] - 1) // j[PIECE]
    j[LAST] = j[PIECES] + 1
    j[EXPOSED] = 0
    j[RESULTS] = _whole_lines(j[PIECE] * j[ITEM])
    j[STRIDE] = j[RESULTS] + _whole_lines(j[RESULTS] // c[NRANKS]) + CACHE_LINE
    j[STREAM] = nbytes >= c[LARGE]


@njit(nogil=True)
def _largest(lengths, nranks):  # type: ignore[no-untyped-def]
    largest = types.int64(0)
    for rank in range(nranks):
        largest = max(largest, lengths[rank])
    return largest


@njit(nogil=True)
def _total(lengths, nranks):  # type: ignore[no-untyped-def]
    total = types.int64(0)
    for rank in range(nranks):
        total += lengths[rank]
    return total


@njit(nogil=True)
def _set_pieces(j, largest, nbytes, quiet):  # type: ignore[no-untyped-def]
    j[PIECES] = max(1, (largest + j[PIECE] - 1) // j[PIECE])
    j[SETTLES] = nbytes > quiet or j[PIECES] > 1 or j[UNEVEN] != 0
    j[LAST] = j[PIECES]


@njit(nogil=True)
def _blocks_to_reduce(c, j):  # type: ignore[no-untyped-def]
    """Reduce-scatter, the tables of blocks being filled."""
    nranks = c[NRANKS]
    j[KIND] = BLOCKWISE
    largest = _largest(int64s(j[SEND_LENGTH]), nranks)
    j[STRIDE] = min(c[SLOT] // nranks // CACHE_LINE * CACHE_LINE, _whole_lines(largest * j[ITEM]))
    j[PIECE] = max(1, j[STRIDE] // j[ITEM])
    j[STRIDE] *= nranks
    _set_pieces(j, largest, largest * j[ITEM] * nranks, c[QUIET])
    j[EXPOSED] = 0


@njit(nogil=True)
def _blocks_to_move(c, j, collective):  # type: ignore[no-untyped-def]
    """Any collective that only moves bytes, the tables of blocks being filled."""
    nranks, me = c[NRANKS], c[RANK]
    j[KIND] = EXCHANGE
    j[SHARED] = collective in (BROADCAST, ALLGATHER, GATHER)
    largest = _largest(int64s(j[RECV_LENGTH]), nranks)
    if j[UNEVEN] != 0 or j[SENDER] != EVERYONE or j[RECEIVER] != EVERYONE:
        largest = max(largest, _largest(int64s(j[SEND_LENGTH]), nranks))
    parts = 1 if j[SHARED] != 0 else nranks
    j[PIECE] = c[SLOT] // parts // CACHE_LINE * CACHE_LINE
    if j[UNEVEN] == 0:
        j[PIECE] = max(CACHE_LINE, min(j[PIECE], _whole_lines(largest)))
    j[STRIDE] = j[PIECE] * parts
    _set_pieces(j, largest, largest, c[QUIET])
    j[SIZE] = j[PIECES] if j[UNEVEN] != 0 else largest
    j[EXPOSED] = int64s(j[SEND_AT])[(me + 1) % nranks] if j[SHARED] != 0 else 0
    j[REMOTE] = 0
    # With one sender or receiver slots are as fast: bringing in and taking out go on at the same time.
    everyone = j[SENDER] == EVERYONE and j[RECEIVER] == EVERYONE
    j[FOREIGN] = everyone and j[UNEVEN] == 0 and largest >= c[FAR] and j[SETTLES] != 0
    j[STREAM] = largest * nranks >= c[LARGE]


@CACHED.cfunc("void(int64, int64, int64, int64)")
def _set_up(job, collective, count, root):  # type: ignore[no-untyped-def]
    """Make a job of a collective whose blocks have ``count`` elements, or bytes where nothing is added."""
    j = int64s(job)
    c = int64s(j[CHANNEL])
    nranks, me = c[NRANKS], c[RANK]
    j[SENDER] = root if collective in (BROADCAST, SCATTER) else EVERYONE
    j[RECEIVER] = root if collective in (REDUCE, GATHER) else EVERYONE
    j[CALL] = collective + 256 * root + (j[OPERATION] << 32)
    j[SIZE] = count
    j[UNEVEN] = j[FOREIGN] = j[STREAM] = j[STEP] = 0
    reduces = collective <= REDUCE_SCATTER
    if collective <= REDUCE and nranks > 1:
        _reduction(c, j, count)
        return
    sent, received = int64s(j[SEND_AT]), int64s(j[RECV_AT])
    sent_lengths, received_lengths = int64s(j[SEND_LENGTH]), int64s(j[RECV_LENGTH])
    one_for_each = collective in (REDUCE_SCATTER, SCATTER, ALLTOALL)
    for rank in range(nranks):
        sent[rank] = rank * count if one_for_each else 0
        sent_lengths[rank] = count if _sends(c, j, me) else 0
        received[rank] = 0 if collective in (BROADCAST, SCATTER) else rank * count
        wanted = j[RECEIVER] == EVERYONE or j[RECEIVER] == me
        received_lengths[rank] = count if wanted and _sends(c, j, rank) else 0
    if reduces and nranks > 1:
        _blocks_to_reduce(c, j)
        return
    if reduces:  # a single rank's sum is its input
        received_lengths[0] *= j[ITEM]
    if collective == BROADCAST and j[SENDER] == me:
        received_lengths[me] = 0
    _blocks_to_move(c, j, collective)
    if one_for_each and not reduces:
        j[REMOTE] = me * count


@CACHED.cfunc("void(int64, int64, int64, int64)")
def _set_up_blocks(job, collective, root, uneven):  # type: ignore[no-untyped-def]
    """Make a job of a collective whose tables of blocks have been filled.

    ``uneven``: the ranks do not know each other's sizes.
    """
    j = int64s(job)
    c = int64s(j[CHANNEL])
    j[SENDER] = root if collective == SCATTER else EVERYONE
    j[RECEIVER] = root if collective == GATHER else EVERYONE
    j[CALL] = collective + 256 * root + (j[OPERATION] << 32)
    j[UNEVEN] = uneven
    j[FOREIGN] = j[STREAM] = j[STEP] = 0
    if collective == REDUCE_SCATTER and c[NRANKS] > 1:
        _blocks_to_reduce(c, j)
        j[SIZE] = _total(int64s(j[SEND_LENGTH]), c[NRANKS])
        return
    if collective == REDUCE_SCATTER:
        int64s(j[RECV_LENGTH])[0] *= j[ITEM]
    _blocks_to_move(c, j, collective)
    if j[SHARED] == 0:
        j[EXPOSED] = NEVER  # nobody knows where in another's buffer his block begins
        j[FOREIGN] = 0


# For Python, which lets other threads run meanwhile; and for other compiled code by their addresses, for they
# would be compiled once more if they were compiled into it.
advance, set_up, set_up_blocks = _advance.ctypes, _set_up.ctypes, _set_up_blocks.ctypes
ADVANCE, SET_UP = _advance.address, _set_up.address
