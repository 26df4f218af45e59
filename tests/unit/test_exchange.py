"""Schedules as MSCCL's XML and as GOAL: out, back, and run as MSCCL would; damaged files are named."""

from __future__ import annotations

import random
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mpicoll import algorithms, exchange
from mpicoll.algorithms.hierarchical import Topology
from mpicoll.cli import main
from mpicoll.exchange import ExchangeError, msccl
from mpicoll.schedule import COLLECTIVES, Round, Schedule, Transfer
from mpicoll.verify import ScheduleError, verify

from .full_disk import files_no_longer_than

RANKS = (1, 2, 3, 5, 8)


def schedules(collective: str, ranks: tuple[int, ...] = RANKS) -> Iterator[Schedule]:
    """Every algorithm, with the first, the second and the last rank as root, pipelined or not."""
    for name in algorithms.names(collective):
        counts = (1, 3) if algorithms.pipelines(collective, name) else (None,)
        for nranks in ranks:
            roots = {0, 1 % nranks, nranks - 1} if COLLECTIVES[collective].rooted else {0}
            for root in sorted(roots):
                for nchunks in counts:
                    yield algorithms.schedule(collective, name, nranks, root, nchunks)


def transfers(schedule: Schedule) -> Counter[Transfer]:
    return Counter(t for round_ in schedule.rounds for t in round_)


def same(schedule: Schedule, back: Schedule) -> None:
    verify(back)
    assert transfers(back) == transfers(schedule)
    for name in ("name", "collective", "nranks", "nchunks", "root"):
        assert getattr(back, name) == getattr(schedule, name)


@pytest.mark.parametrize("format", exchange.FORMATS)
@pytest.mark.parametrize("collective", algorithms.ALGORITHMS)
def test_every_algorithm_goes_out_and_back(collective: str, format: str) -> None:
    for schedule in schedules(collective):
        same(schedule, exchange.loads(exchange.dumps(schedule, format), format))


@pytest.mark.parametrize("format", exchange.FORMATS)
@pytest.mark.parametrize("collective", algorithms.HIERARCHICAL)
def test_hierarchical_schedules_go_out_and_back(collective: str, format: str) -> None:
    for across in algorithms.names(collective):
        schedule = algorithms.hierarchical_schedule(collective, Topology.of_sizes([2, 3, 1]), across)
        same(schedule, exchange.loads(exchange.dumps(schedule, format), format))


@pytest.mark.parametrize("format", exchange.FORMATS)
def test_the_rounds_of_a_pipeline_come_back(format: str) -> None:
    # Nothing but what must wait does: otherwise there would be more rounds.
    for name in ("ring", "rabenseifner", "direct"):
        schedule = algorithms.schedule("allreduce", name, 8)
        assert exchange.loads(exchange.dumps(schedule, format), format).nrounds == schedule.nrounds


# The interpreter: threadblocks as MSCCL runs them, in any order, one message under way on a connection.


class Gpu:
    """Buffers of one gpu. In place, a rank's own block is within the larger buffer."""

    def __init__(self, element: ElementTree.Element, schedule: Schedule) -> None:
        self.rank = rank = int(element.attrib["id"])
        nranks, coll = schedule.nranks, schedule.collective
        i, o, s = (np.full(int(element.attrib[f"{b}_chunks"]), -(10**9)) for b in "ios")
        own = {"allgather": True, "gather": rank == schedule.root}.get(coll, False)
        if own:
            i = o[rank : rank + 1]
        elif coll == "reduce_scatter" or (coll == "scatter" and rank == schedule.root):
            o = i[rank : rank + 1]
        elif coll not in ("gather", "scatter", "alltoall"):
            o = i
        self.buffers = {"i": i, "o": o, "s": s}
        if coll in ("allreduce", "reduce", "reduce_scatter", "barrier"):
            i[:] = 100**rank * (1 + np.arange(len(i)))
        elif coll in ("allgather", "gather"):
            i[:] = rank
        elif coll == "alltoall":
            i[:] = rank * nranks + np.arange(nranks)
        elif rank == schedule.root:
            i[:] = np.arange(len(i))

    def right(self, schedule: Schedule) -> None:
        rank, n, coll, o = self.rank, schedule.nchunks, schedule.collective, self.buffers["o"]
        sums = sum(100**r for r in range(schedule.nranks)) * (1 + np.arange(n))
        if coll in ("allreduce", "barrier") or (coll == "reduce" and rank == schedule.root):
            assert o.tolist() == sums.tolist()
        elif coll == "reduce_scatter":
            assert o[0] == sums[rank]
        elif coll in ("allgather", "broadcast") or (coll == "gather" and rank == schedule.root):
            assert o.tolist() == list(range(n))
        elif coll == "scatter":
            assert o[0] == rank
        elif coll == "alltoall":
            assert o.tolist() == [r * schedule.nranks + rank for r in range(schedule.nranks)]


def interpret(text: str, schedule: Schedule, chosen: random.Random) -> None:
    gpus = {int(e.attrib["id"]): Gpu(e, schedule) for e in ElementTree.fromstring(text)}
    fifos: dict[tuple[int, int], deque[int]] = {}
    flags: dict[tuple[int, int], int] = {}
    blocks = [
        (gpus[int(gpu.attrib["id"])], tb, deque(tb)) for gpu in ElementTree.fromstring(text) for tb in gpu
    ]
    while left := [block for block in blocks if block[2]]:
        chosen.shuffle(left)
        assert any(run(*block, fifos, flags) for block in left), "all wait for each other"
    for gpu in gpus.values():
        gpu.right(schedule)
    assert not any(fifos.values())


def run(
    gpu: Gpu,
    tb: ElementTree.Element,
    steps: deque[ElementTree.Element],
    fifos: dict[tuple[int, int], deque[int]],
    flags: dict[tuple[int, int], int],
) -> bool:
    """One step of a threadblock, if it need not wait."""
    a: dict[str, Any] = {k: v if k.endswith(("buf", "type")) else int(v) for k, v in steps[0].attrib.items()}
    if a["depid"] >= 0 and flags.get((gpu.rank, a["depid"]), -1) < a["deps"]:
        return False
    out = fifos.setdefault((gpu.rank, int(tb.attrib["send"])), deque())
    into = fifos.setdefault((int(tb.attrib["recv"]), gpu.rank), deque())
    source, target = gpu.buffers[a["srcbuf"]], gpu.buffers[a["dstbuf"]]
    if (a["type"] == "s" and out) or (a["type"] in ("r", "rrc") and not into):
        return False
    match a["type"]:
        case "s":
            assert int(tb.attrib["send"]) >= 0
            out.append(int(source[a["srcoff"]]))
        case "r":
            target[a["dstoff"]] = into.popleft()
        case "rrc":
            target[a["dstoff"]] = source[a["srcoff"]] + into.popleft()
        case "cpy":
            target[a["dstoff"]] = source[a["srcoff"]]
        case other:
            assert other == "nop"
    if a["hasdep"]:
        flags[gpu.rank, int(tb.attrib["id"])] = a["s"]
    steps.popleft()
    return True


@pytest.mark.parametrize("collective", algorithms.ALGORITHMS)
def test_the_interpreter_gets_the_right_result_in_any_order(collective: str) -> None:
    chosen = random.Random(7)
    for schedule in schedules(collective, (1, 3, 4, 6)):
        if not COLLECTIVES[collective].idempotent:
            interpret(exchange.dumps(schedule, "msccl"), schedule, chosen)


def test_what_is_sent_goes_before_what_is_reduced_into_it_in_the_same_round() -> None:
    # To rank 1, chunk 1 is the second of the round; to rank 0 it is the first.
    first = [Transfer(0, 1, 0, "reduce"), Transfer(0, 1, 1, "reduce"), Transfer(1, 0, 1, "reduce")]
    rounds = [Round.from_transfers(first), Round.of(1, 0, 0, "copy")]
    schedule = Schedule.from_rounds("uneven", "allreduce", 2, 2, rounds)
    verify(schedule)
    interpret(exchange.dumps(schedule, "msccl"), schedule, random.Random(1))
    same(schedule, exchange.loads(exchange.dumps(schedule, "goal"), "goal"))


def test_peers_and_channels_are_unique_and_steps_that_others_wait_for_say_so() -> None:
    for schedule in schedules("allreduce", (6,)):
        for gpu in ElementTree.fromstring(exchange.dumps(schedule, "msccl")):
            for end in ("send", "recv"):
                peers = [tb.attrib[end] for tb in gpu if tb.attrib[end] != "-1"]
                assert len(peers) == len(set(peers))
            waited = {(s.attrib["depid"], s.attrib["deps"]) for s in gpu.iter("step")} - {("-1", "-1")}
            said = {(tb.attrib["id"], s.attrib["s"]) for tb in gpu for s in tb if s.attrib["hasdep"] == "1"}
            assert waited == said


RING_XML = """\
<algo name="ring" proto="Simple" nchannels="1" nchunksperloop="2" ngpus="2" coll="allreduce" inplace="1" \
outofplace="0" minBytes="0" maxBytes="1099511627776" root="0">
  <gpu id="0" i_chunks="2" o_chunks="2" s_chunks="0">
    <tb id="0" send="1" recv="1" chan="0">
      <step s="0" type="s" srcbuf="i" srcoff="1" dstbuf="i" dstoff="1" cnt="1" depid="-1" deps="-1" hasdep="0"/>
      <step s="1" type="rrc" srcbuf="i" srcoff="0" dstbuf="i" dstoff="0" cnt="1" depid="-1" deps="-1" hasdep="0"/>
      <step s="2" type="s" srcbuf="i" srcoff="0" dstbuf="i" dstoff="0" cnt="1" depid="-1" deps="-1" hasdep="0"/>
      <step s="3" type="r" srcbuf="i" srcoff="1" dstbuf="i" dstoff="1" cnt="1" depid="-1" deps="-1" hasdep="0"/>
    </tb>
  </gpu>
  <gpu id="1" i_chunks="2" o_chunks="2" s_chunks="0">
    <tb id="0" send="0" recv="0" chan="0">
      <step s="0" type="s" srcbuf="i" srcoff="0" dstbuf="i" dstoff="0" cnt="1" depid="-1" deps="-1" hasdep="0"/>
      <step s="1" type="rrc" srcbuf="i" srcoff="1" dstbuf="i" dstoff="1" cnt="1" depid="-1" deps="-1" hasdep="0"/>
      <step s="2" type="s" srcbuf="i" srcoff="1" dstbuf="i" dstoff="1" cnt="1" depid="-1" deps="-1" hasdep="0"/>
      <step s="3" type="r" srcbuf="i" srcoff="0" dstbuf="i" dstoff="0" cnt="1" depid="-1" deps="-1" hasdep="0"/>
    </tb>
  </gpu>
</algo>
"""  # noqa: E501

RING_GOAL = """\
num_ranks 2
// mpicoll: {"name": "ring", "collective": "allreduce", "nchunks": 2, "root": 0}

rank 0 {
l1: send 512b to 1 tag 1
l2: recv 512b from 1 tag 0
l3: calc 51
l3 requires l2
l4: send 512b to 1 tag 0
l4 requires l3
l5: recv 512b from 1 tag 1
l5 requires l1
}

rank 1 {
l1: send 512b to 0 tag 0
l2: recv 512b from 0 tag 1
l3: calc 51
l3 requires l2
l4: send 512b to 0 tag 1
l4 requires l3
l5: recv 512b from 0 tag 0
l5 requires l1
}
"""


def test_a_ring_of_two_is_written_as_it_should_be() -> None:
    schedule = algorithms.schedule("allreduce", "ring", 2)
    assert exchange.dumps(schedule, "msccl") == RING_XML
    assert exchange.dumps(schedule, "goal", size=1024) == RING_GOAL


def test_goal_has_the_sizes_of_the_chunks_and_the_time_to_reduce_them() -> None:
    schedule = algorithms.schedule("reduce", "chain", 2, nchunks=3)
    text = exchange.dumps(
        schedule, "goal", size=200, gamma=2.5
    )  # cache lines: 64 + 64 + 72 bytes, the last chunk first
    assert re.findall(r"send (\d+)b", text) == ["72", "64", "64"]
    assert re.findall(r"calc (\d+)", text) == ["180", "160", "160"]
    # An empty chunk is one byte: LogGOPSim subtracts one.
    assert re.findall(r"send (\d+)b", exchange.dumps(schedule, "goal", size=0)) == ["1", "1", "1"]
    for wrong in ({"size": -1}, {"gamma": float("nan")}, {"gamma": -1.0}):
        with pytest.raises(ValueError, match=r"expected .* 0 or more; got"):
            exchange.dumps(schedule, "goal", **wrong)


# Files as others write them.


def step(k: int, type_: str, source: str = "i0", target: str = "i0", count: int = 1, **more: int) -> str:
    wait = {"depid": -1, "deps": -1, "hasdep": 0, **more}
    places = f'srcbuf="{source[0]}" srcoff="{source[1:]}" dstbuf="{target[0]}" dstoff="{target[1:]}"'
    waits = " ".join(f'{name}="{value}"' for name, value in wait.items())
    return f'<step s="{k}" type="{type_}" {places} cnt="{count}" {waits}/>'


def gpu(rank: int, *blocks: tuple[int, int, list[str]], chunks: int = 2, scratch: int = 0) -> str:
    tbs = (
        f'<tb id="{k}" send="{send}" recv="{recv}" chan="0">{"".join(steps)}</tb>'
        for k, (send, recv, steps) in enumerate(blocks)
    )
    head = f'<gpu id="{rank}" i_chunks="{chunks}" o_chunks="{chunks}" s_chunks="{scratch}">'
    return head + "".join(tbs) + "</gpu>"


def algo(*gpus: str, chunks: int = 2, coll: str = "allreduce") -> str:
    head = f'name="by others" proto="LL" nchannels="1" nchunksperloop="{chunks}" ngpus="{len(gpus)}"'
    return f'<algo {head} coll="{coll}" inplace="1">{"".join(gpus)}</algo>'


def test_steps_that_receive_and_send_on_are_read() -> None:
    text = algo(
        gpu(0, (1, 1, [step(0, "s", count=2), step(1, "r", target="o0", count=2)])),
        gpu(1, (2, 0, [step(0, "rrcs", count=2)]), (0, 2, [step(0, "rcs", target="o0", count=2)])),
        gpu(2, (1, 1, [step(0, "rrc", count=2), step(1, "s", count=2)])),
    )
    back = exchange.loads(text, "msccl")
    verify(back)
    pairs = [(0, 1, "reduce"), (1, 2, "reduce"), (2, 1, "copy"), (1, 0, "copy")]
    assert transfers(back) == Counter(Transfer(a, b, c, op) for a, b, op in pairs for c in (0, 1))
    assert (back.name, back.nrounds) == ("by others", 4)


def all_pairs(rank: int, forgotten: bool = False) -> str:
    """A gpu of three: it receives the others' data into scratch, and reduces what is there afterwards."""
    first, second = (r for r in range(3) if r != rank)
    late = [] if forgotten else [step(2, "nop", depid=1, deps=1)]
    more = [*late, *(step(len(late) + 2 + k, "re", source=f"s{k}") for k in (0, 1))]
    return gpu(
        rank,
        (first, first, [step(0, "s"), step(1, "r", target="s0"), *more]),
        (second, second, [step(0, "s"), step(1, "r", target="s1", hasdep=1)]),
        chunks=1,
        scratch=2,
    )


def test_what_is_received_into_scratch_and_reduced_later_is_one_reduction() -> None:
    back = exchange.loads(algo(*(all_pairs(rank) for rank in range(3)), chunks=1), "msccl")
    verify(back)
    assert back.nrounds == 1
    assert transfers(back) == transfers(algorithms.schedule("allreduce", "direct", 3))


def test_a_reduction_that_does_not_wait_for_what_it_reduces_is_named() -> None:
    text = algo(all_pairs(0), all_pairs(1), all_pairs(2, forgotten=True), chunks=1)
    with pytest.raises(
        ExchangeError, match=r"gpu 2, tb [01], step \d \(re\): expected it|gpu 2.*expected a chunk"
    ):
        exchange.loads(text, "msccl")


def test_goal_by_others_needs_its_collective_and_finds_its_root() -> None:
    text = """\
    /* a tree,
       by hand */
    num_ranks 3
    rank 0 { recv 8b from 2 tag 0 cpu 1 nic 0
    }
    rank 1 {
    recv 8b from 2
    }
    rank 2 {
    a: send 8b to 0 tag 0 // first
    b: send 8b to 1 nic 3
    c: calc 100 cpu 2
    b requires a
    c irequires b
    }
    """
    with pytest.raises(ExchangeError, match="collective: expected the file to say it"):
        exchange.loads(text, "goal")
    back = exchange.loads(text, "goal", "broadcast")
    verify(back)
    assert (back.root, back.nchunks, back.nrounds) == (2, 1, 1)
    with pytest.raises(ScheduleError, match="not complete at the end"):
        verify(exchange.loads(text, "goal", "allreduce"))


def test_waiting_by_way_of_another_rank_is_waiting() -> None:
    # Rank 0 overwrites what it sent only with what rank 1 made of it, so nothing need say that it waits.
    text = re.sub(
        r"l5 requires l1\n", "", exchange.dumps(algorithms.schedule("allreduce", "ring", 2), "goal")
    )
    assert "requires l1" not in text
    verify(exchange.loads(text, "goal"))


# Damaged files.


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('coll="allreduce"', "", "algo: expected the attribute coll, got none"),
        ('coll="allreduce"', 'coll="sort"', "algo: expected a collective of .*; got 'sort'"),
        ('coll="allreduce"', 'coll="gather"', "algo: expected nchunksperloop 1 for gather, got 2"),
        ('inplace="1"', 'inplace="0"', "algo: expected inplace 1, .*; got 0"),
        ('ngpus="2"', 'ngpus="3"', "algo: expected 3 gpu with ids from 0 on, got none with id 2"),
        ('ngpus="2"', 'ngpus="1"', "algo: expected 1 gpu with ids from 0 on, got 2 of them"),
        ('ngpus="2"', 'ngpus="two"', "algo: expected ngpus to be an integer, got 'two'"),
        ('ngpus="2"', f'ngpus="{"9" * 5000}"', "algo: expected ngpus to be an integer, got '999"),
        ('nchunksperloop="2"', 'nchunksperloop="999999999"', "algo: expected .* at most 16777216 chunks"),
        ('root="0"', 'root="2"', "algo: expected a root from 0 to 1, got 2"),
        ('gpu id="1"', 'gpu id="0"', "algo: expected one gpu with id 0, got two"),
        ('i_chunks="2"', "", "gpu 0: expected the attribute i_chunks, got none"),
        ('i_chunks="2"', 'i_chunks="1"', r"gpu 0, tb 0, step 0 \(s\): expected chunks .*1 from i\[1\]"),
        ('send="1"', 'send="0"', "gpu 0, tb 0: expected send to be -1 or another gpu .*; got 0"),
        ('send="1"', 'send="-1"', r"gpu 0, tb 0, step 0 \(s\): expected its tb to have a send peer, got -1"),
        ('cnt="1"', "", r"gpu 0, tb 0, step 0 \(s\): expected the attribute cnt, got none"),
        ('cnt="1"', 'cnt="0"', r"gpu 0, tb 0, step 0 \(s\): expected chunks that are there"),
        ('type="s"', 'type="x"', r"gpu 0, tb 0, step 0 \(x\): expected a type of .*; got 'x'"),
        ('type="rrc"', 'type="rrs"', r"gpu 0, tb 0, step 1 \(rrs\): expected a sum that is kept"),
        (' s="1"', ' s="2"', "gpu 0, tb 0, step 1: expected a step with s=1"),
        ('depid="-1"', 'depid="4"', r"gpu 0, tb 0, step 0 \(s\): expected deps to be a step of tb 4, got -1"),
        (
            'depid="-1" deps="-1"',
            'depid="0" deps="2"',
            r"gpu 0, tb 0, step 2 \(s\): expected hasdep 1, as gpu 0, tb 0, step 0 \(s\) waits for it; got 0",
        ),
        (
            'type="rrc"',
            'type="cpy"',
            r"gpu 1, tb 0, step 2 \(s\): expected a receive of it on gpu 0, got none",
        ),
        ('type="s"', 'type="cpy"', r"gpu 1, tb 0, step 3 \(r\): expected a send of it on gpu 0, got none"),
        (
            'srcbuf="i" srcoff="1" dstbuf="i" dstoff="1"',
            'srcbuf="i" srcoff="0" dstbuf="i" dstoff="1"',
            r"gpu 1, tb 0, step 1 \(rrc\): expected chunk 0 at its own place; got i\[1\], chunk 1's",
        ),
        ('srcbuf="i"', 'srcbuf="q"', r"gpu 0, tb 0, step 0 \(s\): expected chunks .*; got 1 from q\[1\]"),
        ("</algo>", "", "line 1[0-9]: expected XML; got no element found"),
        ("<algo ", '<!DOCTYPE algo SYSTEM "file:///etc/passwd"><algo ', "DOCTYPE: expected none, got one"),
    ],
)
def test_damaged_xml_is_named(old: str, new: str, message: str) -> None:
    assert old in RING_XML
    with pytest.raises(ExchangeError, match=message):
        exchange.loads(RING_XML.replace(old, new, 1), "msccl")


def test_steps_of_xml_that_wait_for_each_other_are_named() -> None:
    waits = re.sub(
        r'( s="0" .*?)depid="-1" deps="-1" hasdep="0"(.*\n.*\n.*\n.* s="3" .*)hasdep="0"',
        r'\1depid="0" deps="3" hasdep="0"\2hasdep="1"',
        RING_XML.replace("<step s", "<step  s"),
        count=1,
    )
    with pytest.raises(
        ExchangeError, match=r"gpu 0, tb 0, step \d.*: expected an order .*, got a circle: gpu"
    ):
        exchange.loads(waits, "msccl")


def test_messages_of_other_counts_and_chunks_that_nobody_holds_are_named() -> None:
    first = gpu(0, (1, 1, [step(0, "s", count=2)]))
    other = algo(first, gpu(1, (0, 0, [step(0, "rrc", count=1)])))
    with pytest.raises(ExchangeError, match=r"gpu 1.*: expected cnt 2, as gpu 0, tb 0, step 0 \(s\); got 1"):
        exchange.loads(other, "msccl")
    empty = algo(gpu(0, (1, -1, [step(0, "s", source="s0")]), scratch=1), gpu(1, (-1, 0, [step(0, "r")])))
    with pytest.raises(ExchangeError, match=r"gpu 0.*: expected a chunk of this rank in s\[0\], got nothing"):
        exchange.loads(empty, "msccl")
    left = algo(first, gpu(1, (-1, 0, [step(0, "r", target="s0", count=2)]), scratch=2))
    with pytest.raises(ExchangeError, match=r"gpu 1, tb 0, step 0 \(r\): expected a re of s\[0\] of gpu 1"):
        exchange.loads(left, "msccl")
    twice = algo(gpu(0, (1, -1, [step(0, "s")]), (1, -1, [step(0, "s")])), gpu(1, (-1, 0, [step(0, "rrc")])))
    with pytest.raises(ExchangeError, match=r"gpu 0, tb 1, step 0 \(s\): expected one tb for this peer"):
        exchange.loads(twice, "msccl")


def test_an_alltoall_must_copy_the_own_block() -> None:
    text = exchange.dumps(algorithms.schedule("alltoall", "pairwise", 3), "msccl")
    with pytest.raises(ExchangeError, match=r"gpu 1: expected a cpy of its own block to o\[1\], got none"):
        exchange.loads(re.sub(r'type="cpy"(.*dstoff="1")', r'type="nop"\1', text), "msccl")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_ranks 2\n", "", r"line 3: expected num_ranks N, and then rank R {; got 'rank 0 {'"),
        ("num_ranks 2", "num_ranks 3", "rank 2: expected its operations, as num_ranks is 3; got none"),
        ("num_ranks 2", "num_ranks 1", "expected another rank below num_ranks, 1; got 1"),
        ("rank 1 {", "rank 0 {", "line 15: expected one block of rank 0, got a second one"),
        ('"allreduce"', '"sort"', "line 2: expected a collective of .*; got 'sort'"),
        ('"nchunks": 2', '"nchunks": "2"', "line 2: expected integers as nchunks and root"),
        ('"nchunks": 2', '"nchunks": 999999999', "line 2: expected .* at most 16777216 chunks"),
        ('"nchunks": 2, ', "", "line 2: expected name, collective, nchunks and root in JSON"),
        ('"root": 0', '"root": -1', "line 2: expected a root from 0 to 1, got -1"),
        ("l1: send 512b to 1", "l1: put 512b to 1", "line 5: expected send Nb to R .*; got 'l1: put"),
        (
            "l1: send 512b to 1",
            "l1: send 512b from 1",
            "line 5: expected a send to or a recv from another rank; got 'l1: send 512b from",
        ),
        (
            "l1: send 512b to 1",
            "l1: send 512b to 0",
            "line 5: expected a send to or a recv from another rank",
        ),
        (
            "l1: send 512b to 1",
            "l1: send 511b to 1",
            r"line 17 \(recv of rank 1\): expected 511b, as in line 5",
        ),
        ("tag 1\nl2", "tag 7\nl2", r"line 5 \(send of rank 0\): expected a recv of it with tag 7 on rank 1"),
        (
            "l2: recv 512b from 1 tag 0",
            "l2: recv 512b from 1 tag -1",
            "line 6: .*got -1, which stands for any",
        ),
        ("l2: recv 512b from 1", "l1: recv 512b from 1", "line 6: expected a new label, got l1 again"),
        (
            "l5: recv 512b from 1 tag 1\n",
            "l5: calc 1\n",
            r"line 20 \(send of rank 1\): expected a recv of it",
        ),
        (
            "l3 requires l2",
            "l3 requires l9",
            "line 8: expected a label of this rank from a line above, got l9",
        ),
        (
            "l4 requires l3",
            "l4 requires l3\nl3 requires l4",
            r"line (7|9) .*: expected an order of the steps, got a circle: line",
        ),
        (
            "l4 requires l3\n",
            "",
            r"line . \((send|calc) of rank 0\): expected it to wait for line.*chunk 0 of rank 0; got no",
        ),
        ("}\n\nrank 1", "\n\nrank 1", "line 15: expected send Nb to R"),
        ("l5 requires l1\n}\n", "l5 requires l1\n", "line 14: expected send Nb"),
    ],
)
def test_damaged_goal_is_named(old: str, new: str, message: str) -> None:
    assert old in RING_GOAL
    with pytest.raises(ExchangeError, match=message):
        exchange.loads(RING_GOAL.replace(old, new, 1), "goal")


def test_a_goal_file_that_ends_too_early_is_named() -> None:
    with pytest.raises(ExchangeError, match="rank 1: expected a closing brace, got the end of the file"):
        exchange.loads(RING_GOAL.rstrip("}\n"), "goal")


@pytest.mark.parametrize("format", exchange.FORMATS)
def test_whatever_is_cut_out_or_exchanged_is_named_or_still_a_schedule(format: str) -> None:
    chosen = random.Random(3)
    words = re.split(r'([ "\n]+)', exchange.dumps(algorithms.schedule("gather", "binomial", 4), format))
    found = Counter[str]()
    messages = []
    for _ in range(400):
        damaged = list(words)
        a, b = chosen.randrange(len(words)), chosen.randrange(len(words))
        damaged[a] = chosen.choice(["", words[b], "-1", "7", "x"])
        try:
            verify(exchange.loads("".join(damaged), format))
            found["right"] += 1
        except (ExchangeError, ScheduleError) as error:
            found[type(error).__name__] += 1
            messages.append(str(error))
    assert all(re.search(r": expected .*[,;] got", message) for message in messages)
    assert found["ExchangeError"] > found["right"] > 0


def test_unknown_formats_and_collectives_that_are_not_the_files_are_refused(tmp_path: Path) -> None:
    schedule = algorithms.schedule("allreduce", "ring", 2)
    functions: list[Callable[[], object]] = [
        lambda: exchange.dumps(schedule, "json"),
        lambda: exchange.loads("", "json"),
        lambda: exchange.save(schedule, tmp_path / "ring.txt"),
    ]
    for function in functions:
        with pytest.raises(ValueError, match=r"expected (one of msccl, goal|a name that ends in \.xml)"):
            function()
    for text, format in ((RING_XML, "msccl"), (RING_GOAL, "goal")):
        with pytest.raises(ExchangeError, match=r"expected .* to be broadcast, got allreduce"):
            exchange.loads(text, format, "broadcast")


def test_files_are_saved_and_loaded_by_what_is_in_them(tmp_path: Path) -> None:
    schedule = algorithms.schedule("scatter", "binomial", 5, root=3)
    for name, format in (("a.xml", None), ("b.goal", None), ("c.txt", "msccl")):
        exchange.save(schedule, tmp_path / name, format)
        same(schedule, exchange.load(tmp_path / name))


# The commands.


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_the_examples_of_the_help_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^\s+mpicoll (.*)$", call("export", "--help").stdout, re.MULTILINE)
    assert len(examples) == 4
    for example in examples:
        outcome = call(*example.split())
        assert outcome.exit_code == 0, outcome.output
    assert "proved right at 8 ranks" in call("verify", "--file", "ring.xml").stdout
    assert '"ok": true' in call("verify", "--file", "ring.xml", "--json").stdout


def test_a_file_that_does_not_verify_is_status_1_and_one_that_is_no_schedule_2(tmp_path: Path) -> None:
    (tmp_path / "wrong.goal").write_text(RING_GOAL.replace("allreduce", "reduce_scatter"))
    (tmp_path / "late.xml").write_text(RING_XML.replace('type="rrc"', 'type="r"'))
    (tmp_path / "broken.xml").write_text(RING_XML.replace('cnt="1"', ""))
    (tmp_path / "binary.xml").write_bytes(b"<algo \xff")
    (tmp_path / "empty.goal").write_text("\n")
    (tmp_path / "deep.goal").write_text(RING_GOAL.replace("mpicoll: {", "mpicoll: " + "[" * 100_000))
    outcome = call("verify", "--file", str(tmp_path / "late.xml"))
    assert outcome.exit_code == 1
    assert re.search(
        r"Error: ring allreduce on 2 ranks: round 1, transfer . -> . \(copy chunk .\): .*expected .*; got ",
        outcome.stderr,
    )
    for name, message in (
        ("broken.xml", "gpu 0, tb 0, step 0 (s): expected"),
        ("binary.xml", "byte 6:"),
        ("empty.goal", "expected MSCCL's XML or GOAL, got an empty file"),
        ("deep.goal", "line 2: expected name, collective, nchunks and root in JSON"),
    ):
        outcome = call("verify", "--file", str(tmp_path / name))
        assert (outcome.exit_code, message in outcome.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("allreduce --algorithm nope --ranks 3 --to goal", "--algorithm: expected one of ring, "),
        (
            "allreduce --algorithm ring --ranks 10001 --to goal",
            "--ranks: expected at most 10000 ranks",
        ),
        ("allreduce --algorithm ring --ranks 3 --chunks 3 --to goal", "--chunks: expected none"),
        ("allreduce --algorithm ring --ranks 3 --size 10Q --to goal", "'--size': expected a number"),
        ("allreduce --algorithm ring --ranks 3 --size 1K --to msccl", "--size: expected only with --to goal"),
        ("allreduce --algorithm ring --ranks 3 --root 1 --to goal", "--root: expected none beside allreduce"),
        ("allreduce --algorithm ring --ranks 3 --across ring --to goal", "--across: expected none beside"),
        ("broadcast --algorithm chain --ranks 3 --root 5 --to goal", "--root: expected a rank from 0 to 2"),
        ("allreduce --algorithm hierarchical --to goal", "--nodes: expected together with"),
        ("allreduce --algorithm hierarchical --nodes 0 --to goal", "'--nodes': expected the number of ranks"),
        ("allreduce --algorithm hierarchical --nodes 2 --across x --to goal", "--across: expected one of"),
        ("gather --algorithm hierarchical --nodes 2 --to goal", "--nodes: expected COLLECTIVE to be one of"),
        ("allreduce --algorithm ring --ranks 2 --to goal -o /dev/null/x", "got '/dev/null/x': Not a dir"),
        ("allreduce --algorithm ring --ranks 2 --to goal -o no/x", "got 'no/x': No such file or directory"),
        ("allreduce --algorithm ring --ranks 2 --gamma nan --to goal", "--gamma: expected ns a byte, 0 or m"),
        (
            "allreduce --algorithm ring --ranks 4 --size 4194304T --to goal",
            "--size: expected at most 2305843",
        ),
        ("broadcast --algorithm chain --chunks 1000000000000 --to goal", "is not in the range 1<=x<=100000"),
        (
            "allreduce --algorithm ring --ranks 10000 --to goal",
            "expected at most 2,097,152 transfers to export, got ring with 199,980,000 on 10,000 ranks",
        ),
    ],
)
def test_wrong_options_are_status_2(arguments: str, message: str) -> None:
    outcome = call("export", *arguments.split())
    assert outcome.exit_code == 2
    assert message in outcome.stderr


def test_other_options_of_verify_do_not_go_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "ring.xml").write_text(RING_XML)
    outcome = call("verify", "--file", str(tmp_path / "ring.xml"), "--all")
    assert (outcome.exit_code, "--file: expected no --all beside it" in outcome.stderr) == (2, True)


def test_what_is_too_much_for_the_interpreter_is_said() -> None:
    assert msccl.beyond_limits(RING_XML) == []
    outcome = call("export", "barrier", "--algorithm", "dissemination", "--ranks", "2", "--to", "msccl")
    assert outcome.exit_code == 0
    assert "does not take a barrier" in outcome.stderr
    long = Schedule.from_rounds("long", "broadcast", 2, 300, [Round.of(0, 1, np.arange(300), "copy")])
    wide = algorithms.schedule("broadcast", "direct", 40)
    for schedule, message in ((long, "300 steps in a"), (wide, "39 threadblocks on a")):
        assert message in msccl.beyond_limits(exchange.dumps(schedule, "msccl"))[0]


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    for name, text in (("ring.xml", RING_XML), ("ring.goal", RING_GOAL)):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert exchange.load(tmp_path / name).nranks == 2


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "ring.xml"
    with files_no_longer_than(100):
        outcome = call("export", *"allreduce --algorithm ring --ranks 4 --to msccl -o".split(), str(path))
    assert (outcome.exit_code, list(tmp_path.iterdir())) == (2, [])
