"""The verifier proves what is right and, above all, finds what is wrong: every kind of fault is planted."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpicoll import algorithms
from mpicoll.algorithms import schedule as make
from mpicoll.schedule import COPY, REDUCE, Round, Schedule, Transfer
from mpicoll.verify import ScheduleError, verify, verify_all
from tests.unit import reference
from tests.unit.reference import CASES

# --- what is right ---


def test_everything_is_right_at_every_rank_count_that_the_command_checks() -> None:
    started = time.perf_counter()
    rows = verify_all([*range(1, 34), 64, 127, 128])
    assert time.perf_counter() - started < 120
    assert {(row.collective, row.algorithm) for row in rows} == set(CASES)
    assert len(rows) == 36 * len(CASES)
    different = {row.algorithm for row in rows if not row.identical}
    assert different == {"dissemination"}, "all ranks must get the same bits"
    assert all(row.roots == row.nranks for row in rows if row.collective == "reduce" and row.nranks <= 33)


def test_rows_report_what_was_verified() -> None:
    done: list[tuple[int, int]] = []
    rows = verify_all([3, 40], ["reduce"], "chain", lambda *state: done.append(state))
    assert [(row.nranks, row.roots, row.schedules) for row in rows] == [(3, 3, 12), (40, 4, 16)]
    assert [(row.rounds, row.transfers, row.volume) for row in rows] == [(9, 16, 8), (46, 312, 8)]
    assert done == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("name", "nranks", "chunk", "order"),
    [
        ("ring", 3, 0, "(0+(1+2))"),
        ("recursive_doubling", 3, 0, "((0+1)+2)"),
        ("recursive_doubling", 8, 0, "(((0+1)+(2+3))+((4+5)+(6+7)))"),
        ("rabenseifner", 3, 1, "((0+1)+2)"),
        ("rabenseifner", 4, 3, "((0+2)+(1+3))"),
        ("direct", 5, 0, "((((0+1)+2)+3)+4)"),
    ],
)
def test_the_order_of_a_sum_is_known(name: str, nranks: int, chunk: int, order: str) -> None:
    proof = verify(make("allreduce", name, nranks))
    assert [proof.order(rank, chunk) for rank in range(nranks)] == [order] * nranks


def test_the_order_of_copied_data_is_its_owner() -> None:
    assert verify(make("alltoall", "bruck", 5)).order(3, 2 * 5 + 3) == "2"


def test_the_order_of_something_that_is_no_output_is_refused() -> None:
    proof = verify(make("reduce_scatter", "ring", 4))
    with pytest.raises(ValueError, match="rank 1 has no output chunk 2 in ring reduce_scatter on 4 ranks"):
        proof.order(1, 2)


def test_a_deep_order_does_not_exhaust_the_stack() -> None:
    order = verify(make("reduce", "chain", 3000, nchunks=1)).order(0, 0)
    assert order.startswith("(0+(1+(2+") and order.count("+") == 2999


@pytest.mark.parametrize(("collective", "name"), [case for case in CASES if case[0] in reference.SUMS])
@pytest.mark.parametrize("nranks", [2, 3, 6, 8, 11])
def test_the_order_predicts_every_bit_of_a_float_sum(collective: str, name: str, nranks: int) -> None:
    schedule = make(collective, name, nranks)
    # Twelve decades: nearly every other order gives another sum.
    values = np.float32(10) ** np.random.default_rng(nranks).uniform(-6, 6, nranks).astype(np.float32)
    state = reference.execute(schedule, lambda rank, chunk: values[rank])
    proof = verify(schedule)
    for rank in range(nranks):
        for chunk in schedule.outputs(rank).tolist():
            expression = re.sub(r"\d+", lambda match: f"v[{match[0]}]", proof.order(rank, chunk))
            assert state[rank][chunk] == eval(expression, {"v": values})


def test_ranks_that_sum_in_different_orders_are_reported() -> None:
    rounds = [
        reductions((0, 1), (1, 0)),
        reductions((2, 0), (3, 0), (2, 3), (3, 2)),
        reductions((1, 2), (1, 3), (2, 1)),
    ]
    proof = verify(Schedule.from_rounds("test", "allreduce", 4, 1, rounds))
    assert proof.order(0, 0) == "(((0+1)+2)+3)"
    assert proof.order(1, 0) == "((0+1)+(2+3))"
    assert not proof.identical


def test_the_two_sides_of_a_sum_may_be_exchanged() -> None:
    # Ranks 0 and 2 have the same (0+2), but rank 1's part comes after rank 0's and before rank 2's.
    rounds = [reductions((0, 2), (2, 0)), reductions((0, 1), (1, 0), (1, 2))]
    proof = verify(Schedule.from_rounds("test", "allreduce", 3, 1, rounds))
    assert [proof.order(rank, 0) for rank in range(3)] == ["((0+2)+1)", "((0+2)+1)", "(1+(0+2))"]
    assert proof.identical


# --- planted faults ---


def reductions(*pairs: tuple[int, int]) -> Round:
    """A round of reductions of chunk 0 from and to these ranks."""
    return Round.from_transfers([Transfer(src, dst, 0, REDUCE) for src, dst in pairs])


def changed(schedule: Schedule, k: int, transfers: list[Transfer]) -> Schedule:
    """``schedule`` with other transfers in round ``k``."""
    rounds = [Round.from_transfers(transfers) if k == j else r for j, r in enumerate(schedule.rounds)]
    return replace(schedule, make_round=rounds.__getitem__)


def with_extra(schedule: Schedule, k: int, transfer: Transfer) -> Schedule:
    return changed(schedule, k, [*schedule.make_round(k), transfer])


def without(schedule: Schedule, k: int, transfer: Transfer) -> Schedule:
    transfers = list(schedule.make_round(k))
    transfers.remove(transfer)
    return changed(schedule, k, transfers)


def with_other(schedule: Schedule, k: int, transfer: Transfer, **fields: Any) -> Schedule:
    transfers = list(schedule.make_round(k))
    transfers[transfers.index(transfer)] = transfer._replace(**fields)
    return changed(schedule, k, transfers)


def fault(schedule: Schedule) -> ScheduleError:
    """The error that ``schedule`` must raise; its message must say all that its attributes say."""
    with pytest.raises(ScheduleError) as raised:
        verify(schedule)
    error = raised.value
    message = str(error)
    assert f"expected {error.expected}" in message
    assert f"got {error.got}" in message
    assert error.problem in message
    assert f"{schedule.name} {schedule.collective} on {schedule.nranks} ranks" in message
    if error.transfer is not None:
        src, dst, chunk, op = error.transfer
        assert f"round {error.round}, transfer {src} -> {dst} ({op} chunk {chunk})" in message
    return error


def test_double_counting_is_found() -> None:
    ring = make("reduce_scatter", "ring", 4)
    # In round 0 rank 1 has got rank 0's part of chunk 3; rank 0 sends it once more.
    error = fault(with_extra(ring, 1, Transfer(0, 1, 3, REDUCE)))
    assert (error.round, error.transfer) == (1, (0, 1, 3, REDUCE))
    assert error.problem == "a contribution is counted twice"
    assert error.expected == "no contribution of ranks 0-1, which rank 1 has"
    assert error.got == "contributions of ranks 0, of which 0 would count twice"


def test_double_counting_among_several_sources_of_one_sum_is_found() -> None:
    rounds = [reductions((1, 0)), reductions((0, 2), (1, 2))]
    error = fault(Schedule.from_rounds("test", "reduce", 3, 1, rounds, root=2))
    assert (error.round, error.transfer) == (1, (1, 2, 0, REDUCE))


def test_counting_twice_is_no_fault_in_a_barrier() -> None:
    verify(make("barrier", "dissemination", 6))


def test_a_dropped_copy_is_found_where_the_chunk_is_sent_on() -> None:
    ring = make("allgather", "ring", 4)
    error = fault(without(ring, 0, Transfer(0, 1, 0, COPY)))
    assert (error.round, error.transfer) == (1, (1, 2, 0, COPY))
    assert error.problem == "a chunk that is not there yet is sent"
    assert error.expected == "rank 1 to hold chunk 0 when round 1 starts"


def test_a_dropped_reduction_is_found_in_the_result() -> None:
    doubling = make("allreduce", "recursive_doubling", 4)
    error = fault(without(doubling, 1, Transfer(0, 2, 0, REDUCE)))
    assert (error.round, error.transfer) == (0, (3, 2, 0, REDUCE)), "the last write to the wrong output"
    assert error.problem == "chunk 0 of rank 2 is not complete at the end"
    assert (error.expected, error.got) == ("contributions of ranks 0-3", "ranks 2-3, without 0-1")


def test_a_dropped_last_copy_is_found_and_no_transfer_blamed() -> None:
    error = fault(without(make("broadcast", "direct", 3), 0, Transfer(0, 2, 0, COPY)))
    assert (error.round, error.transfer) == (None, None)
    assert (error.expected, error.got) == ("contributions of ranks 0", "nothing there")
    assert "no round, no transfer" in str(error)


def test_a_swapped_source_is_found() -> None:
    ring = make("allgather", "ring", 4)
    error = fault(with_other(ring, 1, Transfer(0, 1, 3, COPY), src=2))
    assert (error.round, error.transfer) == (1, (2, 1, 3, COPY))

    binomial = make("reduce", "binomial", 8)
    error = fault(with_other(binomial, 1, Transfer(6, 4, 0, REDUCE), src=5))
    assert (error.round, error.transfer) == (1, (5, 4, 0, REDUCE))
    assert error.problem == "a contribution is counted twice"

    direct = make("allreduce", "direct", 4)
    error = fault(with_other(direct, 0, Transfer(1, 0, 0, REDUCE), src=2))
    assert (error.round, error.transfer) == (0, (2, 0, 0, REDUCE))
    assert error.problem == "two writes to one place in one round"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Transfer(0, 2, 0, COPY), Transfer(1, 2, 0, COPY)),
        (Transfer(0, 2, 0, COPY), Transfer(1, 2, 0, REDUCE)),
        (Transfer(0, 2, 0, REDUCE), Transfer(1, 2, 0, COPY)),
        (Transfer(0, 2, 0, REDUCE), Transfer(0, 2, 0, REDUCE)),
    ],
)
def test_two_writes_to_one_place_are_found(first: Transfer, second: Transfer) -> None:
    error = fault(
        Schedule.from_rounds("test", "reduce", 3, 1, [Round.from_transfers([first, second])], root=2)
    )
    assert (error.round, error.transfer) == (0, second)
    assert error.problem == "two writes to one place in one round"
    assert error.got == " and ".join(f"{t.src} -> 2 ({t.op} chunk 0)" for t in (first, second))


def test_a_copy_to_a_chunk_that_is_being_sent_is_found() -> None:
    chain = make("broadcast", "chain", 4, nchunks=2)
    # Rank 1 sends chunk 0 on in round 1; rank 0 sends it to rank 1 again.
    error = fault(with_extra(chain, 1, Transfer(0, 1, 0, COPY)))
    assert (error.round, error.transfer) == (1, (0, 1, 0, COPY))
    assert error.problem == "a buffer is changed while it is sent"
    assert error.expected == "no copy to chunk 0 of rank 1 while it is sent"
    assert error.got == "1 -> 2 (copy chunk 0)"


def test_a_chunk_may_be_sent_while_it_is_reduced_into() -> None:
    verify(Schedule.from_rounds("test", "allreduce", 2, 1, [reductions((0, 1), (1, 0))]))


@pytest.mark.parametrize("name", algorithms.names("broadcast"))
def test_a_wrong_root_is_found_in_a_broadcast(name: str) -> None:
    error = fault(replace(make("broadcast", name, 4, root=0), root=1))
    assert error.round == 0
    assert error.transfer is not None
    assert error.transfer.src == 0
    assert error.problem == "a chunk that is not there yet is sent"


@pytest.mark.parametrize("name", algorithms.names("reduce"))
def test_a_wrong_root_is_found_in_a_reduce(name: str) -> None:
    error = fault(replace(make("reduce", name, 4, root=0), root=3))
    assert "of rank 3 is not complete at the end" in error.problem


def test_reducing_into_what_is_not_there_is_found() -> None:
    error = fault(with_other(make("allgather", "ring", 3), 0, Transfer(0, 1, 0, COPY), op=REDUCE))
    assert (error.round, error.transfer) == (0, (0, 1, 0, REDUCE))
    assert error.problem == "a chunk that is not there yet is reduced into"
    assert error.expected == "rank 1 to hold chunk 0 when round 0 starts"


def test_a_chunk_can_not_be_sent_on_in_the_round_in_which_it_comes() -> None:
    arriving = Round.from_transfers([Transfer(0, 1, 0, COPY), Transfer(1, 2, 0, COPY)])
    error = fault(Schedule.from_rounds("test", "broadcast", 3, 1, [arriving]))
    assert (error.round, error.transfer) == (0, (1, 2, 0, COPY))


def test_a_copy_over_a_contribution_that_is_needed_is_found_in_the_result() -> None:
    rounds = [Round.from_transfers([Transfer(1, 2, 0, COPY)]), reductions((2, 0))]
    error = fault(Schedule.from_rounds("test", "reduce", 3, 1, rounds))
    assert (error.round, error.transfer) == (1, (2, 0, 0, REDUCE))
    assert (error.expected, error.got) == ("contributions of ranks 0-2", "ranks 0-1, without 2")


@pytest.mark.parametrize(
    "fields", [{"src": 4}, {"src": -1}, {"dst": 4}, {"dst": -1}, {"chunk": 4}, {"chunk": -1}, {"dst": 0}]
)
def test_numbers_out_of_range_and_transfers_to_oneself_are_found(fields: dict[str, Any]) -> None:
    error = fault(with_other(make("allgather", "ring", 4), 2, Transfer(0, 1, 2, COPY), **fields))
    assert (error.round, error.transfer) == (2, Transfer(0, 1, 2, COPY)._replace(**fields))
    assert error.problem == "a number is out of range"
    assert error.expected == "two different ranks below 4 and a chunk below 4"


# --- any fault at all: what the verifier lets pass, numbers must find right ---


def mutations(schedule: Schedule) -> list[Schedule]:
    """Every change of one field of one transfer, and every transfer dropped."""
    mutants = []
    for k, round_ in enumerate(schedule.rounds):
        for transfer in round_:
            mutants.append(without(schedule, k, transfer))
            for field, values in (
                ("src", range(schedule.nranks)),
                ("dst", range(schedule.nranks)),
                ("chunk", range(schedule.nchunks)),
                ("op", (COPY, REDUCE)),
            ):
                others = [value for value in values if value != getattr(transfer, field)]
                mutants += [with_other(schedule, k, transfer, **{field: value}) for value in others]
    return mutants


def is_accepted(schedule: Schedule) -> bool:
    try:
        verify(schedule)
    except ScheduleError:
        return False
    return True


@pytest.mark.parametrize(("collective", "name"), CASES)
@pytest.mark.parametrize("nranks", [3, 4])
def test_every_single_mutation_is_rejected_or_harmless(collective: str, name: str, nranks: int) -> None:
    mutants = mutations(make(collective, name, nranks, root=1))
    accepted = [mutant for mutant in mutants if is_accepted(mutant)]
    for mutant in accepted:
        assert reference.wrong_outputs(mutant) == []
    # Some copies may as well come from another rank that has the chunk, or are not needed.
    assert len(accepted) < len(mutants) / 3


@settings(max_examples=300)
@given(st.data())
def test_random_mutations_are_rejected_or_harmless(data: st.DataObject) -> None:
    collective, name = data.draw(st.sampled_from(CASES))
    nranks = data.draw(st.integers(2, 9))
    schedule = make(collective, name, nranks, root=data.draw(st.integers(0, nranks - 1)))
    k = data.draw(st.integers(0, schedule.nrounds - 1))
    transfers = list(schedule.make_round(k))
    transfer = data.draw(st.sampled_from(transfers))
    field = data.draw(st.sampled_from(Transfer._fields))
    rank = st.integers(-1, nranks)
    values: dict[str, st.SearchStrategy[Any]] = {
        "src": rank,
        "dst": rank,
        "chunk": st.integers(-1, schedule.nchunks),
        "op": st.sampled_from([COPY, REDUCE]),
    }
    value = data.draw(values[field])
    assume(value != getattr(transfer, field))
    mutant = with_other(schedule, k, transfer, **{field: value})
    if is_accepted(mutant):
        assert reference.wrong_outputs(mutant) == []


def test_a_copy_to_where_the_chunk_already_is_is_found() -> None:
    back = [Transfer(0, 1, 0, COPY)], [Transfer(1, 0, 0, COPY)]
    rounds = [Round.from_transfers(transfers) for transfers in back]
    with pytest.raises(ScheduleError, match="copied to where it is") as caught:
        verify(Schedule.from_rounds("there and back", "broadcast", 2, 1, rounds))
    assert (caught.value.round, caught.value.transfer) == (1, Transfer(1, 0, 0, COPY))
