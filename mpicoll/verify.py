"""Proves that a schedule does what its collective promises, for every rank and chunk, without running it.

Vocabulary
----------
contribution  what a rank holds of a chunk at the start; the leaf ``r`` stands for rank r's.
tree          the expression that a chunk's value is: ``((0+1)+2)`` is rank 0's contribution plus rank 1's,
              and then rank 2's. Equal trees are stored once, so comparing them is comparing two numbers.
proof         what `verify` returns when it finds nothing wrong.

Instead of numbers, the trees themselves are sent through the schedule, by the rules of a round (see
``schedule``). Two values are the same bits on every machine exactly if their trees are the same, up to
exchanging the two sides of a sum; a set of contributions would hide both double counting and the order.

`verify` raises `ScheduleError` for

- a number out of range, or a transfer from a rank to itself;
- sending a chunk that is not there, or reducing into one;
- two writes to one place in one round: two copies, a copy and a reduction, a source reduced twice;
- a copy to a chunk that is sent in the same round (a buffer changed while it is sent);
- a copy of what the rank already has: wasted, and the root of a broadcast may only be read;
- a contribution counted twice;
- at the end, an output that is missing or lacks contributions. A copy that destroyed contributions, a wrong
  root and a lost transfer show up here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from mpicoll import algorithms
from mpicoll.algorithms.hierarchical import Topology
from mpicoll.schedule import COLLECTIVES, COPY, REDUCE, Round, Schedule, Transfer

# Chunks on all ranks together. Proving keeps a number for each; more is a damaged file, or a day's work.
MOST_PLACES = 1 << 24
EVERY_ROOT_UP_TO = 33  # ranks; beyond, four roots: the time for all of them grows with the cube of the ranks
# For pipelines: no pipeline, one chunk per tree, uneven, longer than the start-up.
CHUNK_COUNTS = (1, 2, 3, 8)


class ScheduleError(ValueError):
    """A schedule breaks a rule or does not compute its collective.

    ``round`` and ``transfer`` are where it shows: the transfer that breaks the rule or, for an output that
    is wrong at the end, the last one that wrote there (both None if none ever did). ``expected`` and ``got``
    are texts.
    """

    def __init__(
        self,
        schedule: Schedule,
        problem: str,
        expected: str,
        got: str,
        round: int | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        self.problem, self.expected, self.got = problem, expected, got
        self.round, self.transfer = round, transfer
        where = "no round, no transfer" if transfer is None else f"round {round}, transfer {_text(transfer)}"
        super().__init__(f"{_title(schedule)}: {where}: {problem}: expected {expected}; got {got}")


@dataclass(frozen=True)
class Proof:
    """A schedule is right: what is known about it now.

    ``transfers`` counts single chunks; ``volume`` is the largest number of chunks that any rank sends.
    ``identical``: ranks that end with the same chunk have computed it by the same tree, up to exchanging
    the two sides of a sum, and so get the same bits.
    """

    schedule: Schedule
    transfers: int
    volume: int
    identical: bool
    _trees: Trees = field(repr=False)
    _results: dict[int, int] = field(repr=False)

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        return self.schedule.nrounds

    def order(self, rank: int, chunk: int) -> str:
        """How ``rank`` gets its output ``chunk``, such as ``((0+1)+2)``; `ValueError` if it has none."""
        tree = self._results.get(rank * self.schedule.nchunks + chunk)
        if tree is None or chunk not in self.schedule.outputs(rank):
            raise ValueError(f"order: rank {rank} has no output chunk {chunk} in {_title(self.schedule)}")
        return self._trees.text(tree)


class Trees:
    """Expression trees as numbers: ``0`` to ``nranks - 1`` are the leaves; equal trees have equal numbers.

    ``members[tree]`` is the set of contributions as the bits of an integer. ``shape[tree]`` is equal for
    trees that differ only in the order of the two sides of a sum.
    """

    def __init__(self, nranks: int) -> None:
        self.members = [1 << rank for rank in range(nranks)]
        self.shape = list(range(nranks))
        self._sides: list[tuple[int, int]] = [(rank, rank) for rank in range(nranks)]
        self._numbers: dict[tuple[int, int], int] = {}
        self._shapes: dict[tuple[int, int], int] = {}

    def add(self, left: int, right: int) -> int:
        """The tree ``(left+right)``."""
        number = self._numbers.get((left, right))
        if number is None:
            number = self._numbers[left, right] = len(self._sides)
            self._sides.append((left, right))
            self.members.append(self.members[left] | self.members[right])
            a, b = self.shape[left], self.shape[right]
            # The first tree of a shape lends it its number, which no leaf has.
            self.shape.append(self._shapes.setdefault((a, b) if a < b else (b, a), number))
        return number

    def text(self, tree: int) -> str:
        """The tree in parentheses. Not recursive: a chain is as deep as it has ranks."""
        parts: list[str] = []
        todo: list[int | str] = [tree]
        while todo:
            item = todo.pop()
            if isinstance(item, str):
                parts.append(item)
            elif self._sides[item][0] == item:
                parts.append(str(item))
            else:
                left, right = self._sides[item]
                todo += [")", right, "+", left, "("]
        return "".join(parts)


def verify(schedule: Schedule) -> Proof:
    """Proof that ``schedule`` is right, or `ScheduleError`. `ValueError` if it has too many chunks."""
    nplaces = schedule.nranks * schedule.nchunks
    if nplaces > MOST_PLACES:
        raise ValueError(
            f"nranks: expected at most {MOST_PLACES:,} chunks on all ranks together to prove, "
            f"got {schedule.name} with {nplaces:,} on {schedule.nranks:,} ranks"
        )
    trees = Trees(schedule.nranks)
    held = _start(schedule)
    complete = _complete(schedule, held)
    sent = [0] * schedule.nranks
    for k, round_ in enumerate(schedule.rounds):
        _run_round(schedule, k, round_, trees, held, sent)
    identical = _check_outputs(schedule, trees, held, complete)
    return Proof(schedule, sum(sent), max(sent), identical, trees, held)


def _start(schedule: Schedule) -> dict[int, int]:
    """The tree held at each place at the start. A place is ``rank * nchunks + chunk``."""
    return {
        rank * schedule.nchunks + chunk: rank
        for rank in range(schedule.nranks)
        for chunk in schedule.inputs(rank).tolist()
    }


def _complete(schedule: Schedule, start: dict[int, int]) -> list[int]:
    """The contributions that there are to each chunk, as bits: all of them must be in the result."""
    complete = [0] * schedule.nchunks
    for place, rank in start.items():
        complete[place % schedule.nchunks] |= 1 << rank
    return complete


def _run_round(
    schedule: Schedule, k: int, round_: Round, trees: Trees, held: dict[int, int], sent: list[int]
) -> None:
    """Check round ``k`` and let it change ``held`` and ``sent``."""
    nranks, nchunks = schedule.nranks, schedule.nchunks
    reads: set[int] = set()
    copies: dict[int, int] = {}
    reductions: dict[int, dict[int, int]] = {}
    columns = (round_.src.tolist(), round_.dst.tolist(), round_.chunk.tolist(), round_.reduce.tolist())
    for src, dst, chunk, reduce in zip(*columns, strict=True):
        if not (0 <= src < nranks and 0 <= dst < nranks and 0 <= chunk < nchunks and src != dst):
            raise _out_of_range(schedule, k, _transfer(src, dst, chunk, reduce))
        source, target = src * nchunks + chunk, dst * nchunks + chunk
        tree = held.get(source)
        if tree is None or (reduce and target not in held):
            raise _not_there(schedule, k, _transfer(src, dst, chunk, reduce), src if tree is None else dst)
        if target in copies or (target in reductions and (not reduce or src in reductions[target])):
            raise _second_write(schedule, k, _transfer(src, dst, chunk, reduce))
        if reduce:
            reductions.setdefault(target, {})[src] = tree
        else:
            copies[target] = tree
        reads.add(source)
        sent[src] += 1
    if not reads.isdisjoint(copies):
        raise _changed_while_sent(schedule, k, round_, reads)
    for place, tree in copies.items():
        if held.get(place) == tree:
            raise _already_there(schedule, k, round_, place)
    # Both are computed before either is stored: every read sees the state at the round's start.
    sums = {place: _reduced(schedule, k, trees, held, place, reductions[place]) for place in reductions}
    held.update(copies)
    held.update(sums)


def _reduced(
    schedule: Schedule, k: int, trees: Trees, held: dict[int, int], place: int, sources: dict[int, int]
) -> int:
    """The tree at ``place`` after the reductions from ``sources`` (rank to tree) in one round."""
    dst, chunk = divmod(place, schedule.nchunks)
    members = trees.members
    counted = members[held[place]]
    for src, tree in sources.items():
        if counted & members[tree] and not COLLECTIVES[schedule.collective].idempotent:
            raise _counted_twice(schedule, k, Transfer(src, dst, chunk, REDUCE), counted, members[tree])
        counted |= members[tree]
    operands = {**sources, dst: held[place]}
    ranks = sorted(operands)
    total = operands[ranks[0]]
    for rank in ranks[1:]:
        total = trees.add(total, operands[rank])
    return total


def _check_outputs(schedule: Schedule, trees: Trees, held: dict[int, int], complete: list[int]) -> bool:
    """Check that all outputs are there and complete; return whether ranks agree on their trees' shapes."""
    shapes: dict[int, int] = {}
    identical = True
    for rank in range(schedule.nranks):
        for chunk in schedule.outputs(rank).tolist():
            tree = held.get(rank * schedule.nchunks + chunk)
            members = 0 if tree is None else trees.members[tree]
            if tree is None or members != complete[chunk]:
                raise _wrong_output(schedule, rank, chunk, complete[chunk], members)
            identical &= shapes.setdefault(chunk, trees.shape[tree]) == trees.shape[tree]
    return identical


# What each fault says. Kept apart from the checks, so that those can be read (and run) fast.


def _out_of_range(schedule: Schedule, k: int, transfer: Transfer) -> ScheduleError:
    expected = f"two different ranks below {schedule.nranks} and a chunk below {schedule.nchunks}"
    got = f"ranks {transfer.src} and {transfer.dst}, chunk {transfer.chunk}"
    return ScheduleError(schedule, "a number is out of range", expected, got, k, transfer)


def _not_there(schedule: Schedule, k: int, transfer: Transfer, rank: int) -> ScheduleError:
    problem = "a chunk that is not there yet is " + ("sent" if rank == transfer.src else "reduced into")
    expected = f"rank {rank} to hold chunk {transfer.chunk} when round {k} starts"
    return ScheduleError(schedule, problem, expected, "nothing there", k, transfer)


def _second_write(schedule: Schedule, k: int, transfer: Transfer) -> ScheduleError:
    writes = [t for t in schedule.make_round(k) if (t.dst, t.chunk) == (transfer.dst, transfer.chunk)]
    expected = (
        f"one copy, or reductions from different ranks, to chunk {transfer.chunk} of rank {transfer.dst}"
    )
    got = " and ".join(_text(t) for t in writes)
    return ScheduleError(schedule, "two writes to one place in one round", expected, got, k, transfer)


def _already_there(schedule: Schedule, k: int, round_: Round, place: int) -> ScheduleError:
    transfer = next(t for t in round_ if (t.dst, t.chunk) == divmod(place, schedule.nchunks))
    expected = f"rank {transfer.dst} to need chunk {transfer.chunk}"
    return ScheduleError(schedule, "a chunk is copied to where it is", expected, "it there", k, transfer)


def _changed_while_sent(schedule: Schedule, k: int, round_: Round, reads: set[int]) -> ScheduleError:
    nchunks = schedule.nchunks
    transfer = next(t for t in round_ if t.op == COPY and t.dst * nchunks + t.chunk in reads)
    send = next(t for t in round_ if (t.src, t.chunk) == (transfer.dst, transfer.chunk))
    expected = f"no copy to chunk {transfer.chunk} of rank {transfer.dst} while it is sent"
    return ScheduleError(schedule, "a buffer is changed while it is sent", expected, _text(send), k, transfer)


def _counted_twice(schedule: Schedule, k: int, transfer: Transfer, counted: int, added: int) -> ScheduleError:
    expected = f"no contribution of ranks {_ranks(counted)}, which rank {transfer.dst} has"
    got = f"contributions of ranks {_ranks(added)}, of which {_ranks(counted & added)} would count twice"
    return ScheduleError(schedule, "a contribution is counted twice", expected, got, k, transfer)


def _wrong_output(schedule: Schedule, rank: int, chunk: int, complete: int, members: int) -> ScheduleError:
    problem = f"chunk {chunk} of rank {rank} is not complete at the end"
    expected = f"contributions of ranks {_ranks(complete)}"
    got = f"ranks {_ranks(members)}, without {_ranks(complete & ~members)}" if members else "nothing there"
    writes = (
        (k, t)
        for k in reversed(range(schedule.nrounds))
        for t in schedule.make_round(k)
        if (t.dst, t.chunk) == (rank, chunk)
    )
    last_round, last_transfer = next(writes, (None, None))
    return ScheduleError(schedule, problem, expected, got, last_round, last_transfer)


def _title(schedule: Schedule) -> str:
    root = f", root {schedule.root}" if COLLECTIVES[schedule.collective].rooted else ""
    return f"{schedule.name} {schedule.collective} on {schedule.nranks} ranks{root}"


def _transfer(src: int, dst: int, chunk: int, reduce: bool) -> Transfer:
    return Transfer(src, dst, chunk, REDUCE if reduce else COPY)


def _text(transfer: Transfer) -> str:
    return f"{transfer.src} -> {transfer.dst} ({transfer.op} chunk {transfer.chunk})"


def _ranks(members: int) -> str:
    return rank_list([rank for rank in range(members.bit_length()) if members >> rank & 1])


def rank_list(ranks: Sequence[int]) -> str:
    """Ascending numbers as text, such as ``0-3,5``."""
    firsts = [rank for rank in ranks if rank - 1 not in ranks]
    lasts = [rank for rank in ranks if rank + 1 not in ranks]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))


@dataclass(frozen=True)
class Row:
    """One algorithm, verified at one number of ranks: ``schedules`` of them, for ``roots`` different roots.

    ``rounds``, ``transfers`` and ``volume`` are the largest of those schedules; ``identical`` holds for all.
    """

    collective: str
    algorithm: str
    nranks: int
    roots: int
    schedules: int
    rounds: int
    transfers: int
    volume: int
    identical: bool


def verify_all(
    ranks: Sequence[int],
    collectives: Iterable[str] | None = None,
    algorithm: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Verify every algorithm (of ``collectives``; named ``algorithm``) at each number of ``ranks``.

    Up to 33 ranks with every root, beyond with four; algorithms that pipeline with several numbers of chunks.
    ``progress`` is called with how many of how many rows are done. Raises the first `ScheduleError`.
    """
    cases = [
        (collective, name, nranks)
        for collective in (algorithms.ALGORITHMS if collectives is None else collectives)
        for name in algorithms.names(collective)
        if algorithm in (None, name)
        for nranks in ranks
    ]
    rows = []
    for done, case in enumerate(cases, start=1):
        rows.append(_row(*case))
        if progress:
            progress(done, len(cases))
    return rows


def verify_hierarchical(
    collective: str, topology: Topology, progress: Callable[[int, int], None] | None = None
) -> list[Row]:
    """Verify the hierarchical schedules of ``collective`` with every algorithm across; see `verify_all`."""
    names = algorithms.names(collective)
    roots = _roots(collective, topology.nranks)
    rows = []
    for done, across in enumerate(names, start=1):
        counts = CHUNK_COUNTS if algorithms.pipelines(collective, across) else (None,)
        made = (
            algorithms.hierarchical_schedule(collective, topology, across, root, nchunks)
            for root in roots
            for nchunks in counts
        )
        rows.append(_summary(collective, f"hierarchical, {across}", topology.nranks, roots, made))
        if progress:
            progress(done, len(names))
    return rows


def one_row(schedule: Schedule) -> Row:
    """Verify a single schedule, wherever it is from."""
    return _summary(schedule.collective, schedule.name, schedule.nranks, [schedule.root], [schedule])


def _row(collective: str, algorithm: str, nranks: int) -> Row:
    roots = _roots(collective, nranks)
    return _summary(collective, algorithm, nranks, roots, _schedules(collective, algorithm, nranks, roots))


def _summary(
    collective: str, algorithm: str, nranks: int, roots: Sequence[int], schedules: Iterable[Schedule]
) -> Row:
    proofs = [verify(schedule) for schedule in schedules]
    return Row(
        collective,
        algorithm,
        nranks,
        roots=len(roots),
        schedules=len(proofs),
        rounds=max(proof.rounds for proof in proofs),
        transfers=max(proof.transfers for proof in proofs),
        volume=max(proof.volume for proof in proofs),
        identical=all(proof.identical for proof in proofs),
    )


def _schedules(collective: str, algorithm: str, nranks: int, roots: Iterable[int]) -> Iterator[Schedule]:
    counts = CHUNK_COUNTS if algorithms.pipelines(collective, algorithm) else (None,)
    for root in roots:
        for nchunks in counts:
            yield algorithms.schedule(collective, algorithm, nranks, root, nchunks)


def _roots(collective: str, nranks: int) -> list[int]:
    if not COLLECTIVES[collective].rooted:
        return [0]
    if nranks <= EVERY_ROOT_UP_TO:
        return list(range(nranks))
    return sorted({0, 1, nranks // 2, nranks - 1})
