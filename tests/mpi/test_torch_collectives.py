"""The backend of torch.distributed: every collective gives what gloo's gives, and refuses what gloo refuses.

Both groups live side by side in one job. What gloo cannot do is compared with values computed by hand.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
from mpi4py import MPI
from mpicoll.bench.mismatch_cases import ranks_named

from mpicoll import watch
from mpicoll.faults import FAULTS, DeadlineError, MismatchError, RankFailedError

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
import torch.distributed._functional_collectives as functional  # noqa: E402
from mpicoll.bench.gloo import end_groups  # noqa: E402
from torch._C import _distributed_c10d as _c10d  # noqa: E402
from torch._C._distributed_c10d import _make_nccl_premul_sum as premul_sum  # noqa: E402
from torch.distributed import ReduceOp  # noqa: E402

import mpicoll.torch  # noqa: E402

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
ODD = SIZE - 1  # the rank that does something else
NEXT, PREVIOUS = (RANK + 1) % SIZE, (RANK - 1) % SIZE
ROWS = 3  # of most tensors here
SHAPE = (ROWS, 5)
PROMPT = 5.0  # seconds within which all ranks know; it takes a tenth of one where the machine is idle
SHORT = timedelta(seconds=0.3)

# all_reduce_coalesced and others are deprecated, yet used.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
needs_others = pytest.mark.skipif(SIZE == 1, reason="needs another rank")

Tensor = Any
Group = Any
Make = Callable[[Any], Any]


class Pair(NamedTuple):
    """Two groups of all ranks."""

    ours: Group
    gloo: Group


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    mpicoll.torch.init()
    yield Pair(dist.new_group(), dist.new_group(backend="gloo"))
    end_groups()


@contextmanager
def of_no_use_afterwards(pair: Pair, timeout: timedelta) -> Iterator[Group]:
    """A group of all ranks, in which something goes wrong. The other groups must work."""
    with pytest.MonkeyPatch.context() as patch:  # ask soon: these tests have other things to do than to wait
        patch.setattr(watch, "FIRST_LOOK", 0.03)
        patch.setattr(watch, "SETTLED", 0.1)
        group = dist.new_group(timeout=timeout)
        yield group
        wait_for_all()
        dist.destroy_process_group(group)
        check_works(pair.ours)


@pytest.fixture
def doomed(pair: Pair) -> Iterator[Group]:
    with of_no_use_afterwards(pair, timedelta(seconds=30)) as group:
        yield group


@pytest.fixture
def hasty(pair: Pair) -> Iterator[Group]:
    with of_no_use_afterwards(pair, SHORT) as group:
        yield group


def wait_for_all() -> None:
    """Until all ranks are here, with MPI's own means and without a word to anybody."""
    barrier = MPI.Intracomm(WORLD).Ibarrier()
    while not barrier.Test():
        time.sleep(0.005)


def check_works(group: Group) -> None:
    tensor = torch.tensor([RANK + 1])
    dist.all_reduce(tensor, group=group)
    assert tensor.item() == SIZE * (SIZE + 1) // 2


# -- data: different on each rank and at each index, and small enough to be exact in every dtype


def data(rank: int = RANK, shape: Sequence[int] = SHAPE, dtype: Any = torch.float32, salt: int = 0) -> Tensor:
    """Below 100, so that they differ between ranks; for what only moves."""
    flat = (7 * torch.arange(torch.Size(shape).numel()) + 29 * rank + 13 * salt) % 97
    values = flat.reshape(shape)
    if dtype == torch.bool:
        return values % 3 == 0
    if dtype.is_complex:
        return torch.complex(values.double(), (values * 5 % 11).double()).to(dtype)
    return values.to(dtype)


def term(rank: int = RANK, dtype: Any = torch.float32) -> Tensor:
    """Of a reduction: from 1 to 3 with a sign, where there are signs, so products are below 82."""
    index = torch.arange(torch.Size(SHAPE).numel()).reshape(SHAPE)
    values = 1 + (2 * index + rank) % 3
    if dtype == torch.bool:
        return (values + rank) % 3 == 0
    if dtype.is_complex:
        return torch.complex(values.double(), ((index + rank) % 4).double()).to(dtype)
    signs = 1 - (index // 2 + rank // 2) % 2 * 2 if dtype.is_signed else 1
    return (values * signs).to(dtype)


def terms(dtype: Any) -> list[Tensor]:
    return [term(rank, dtype) for rank in range(SIZE)]


# How tensors lie in memory: the same values, in a tensor of one's own.


def strided(values: Tensor) -> Tensor:
    place = torch.zeros(*values.shape, 2, dtype=values.dtype)[..., 1]
    return place.copy_(values)


def transposed(values: Tensor) -> Tensor:
    return (
        values.clone(memory_format=torch.contiguous_format)
        .permute(*range(values.dim())[::-1])
        .clone(memory_format=torch.contiguous_format)
        .permute(*range(values.dim())[::-1])
    )


def at_an_offset(values: Tensor) -> Tensor:
    return torch.zeros(values.numel() + 3, dtype=values.dtype)[3:].view(values.shape).copy_(values)


def negative_view(values: Tensor) -> Tensor:
    """What lies in memory are the values with the other sign."""
    return torch._neg_view(-values)


def with_gradient(values: Tensor) -> Tensor:
    return values.clone().requires_grad_()


def parameter(values: Tensor) -> Tensor:
    return torch.nn.Parameter(values.clone())


LAYOUTS = [torch.clone, strided, transposed, at_an_offset, negative_view, with_gradient, parameter]
layouts = pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)


# -- every collective: makes its tensors with ``make``, and returns what waits for it, and what it wrote


def all_reduce(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    tensor = make(data())
    return dist.all_reduce(tensor, group=group, **how), [tensor]


def all_reduce_max(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    tensor = make(data())
    return dist.all_reduce(tensor, ReduceOp.MAX, group, **how), [tensor]


def all_reduce_coalesced(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    tensors = [make(data()), make(data(shape=(7,), salt=1)), make(data(shape=(2, 1, 3), salt=2))]
    return dist.all_reduce_coalesced(tensors, group=group, **how), tensors


def broadcast(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    tensor = make(data())
    return dist.broadcast(tensor, root, group, **how), [tensor]


def reduce(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    tensor = make(data())
    handle = dist.reduce(tensor, root, group=group, **how)
    return handle, [tensor] if root == RANK else []


def empty(make: Make, shape: Sequence[int] = SHAPE, count: int = SIZE) -> list[Tensor]:
    return [make(torch.full(tuple(shape), -7.0)) for _ in range(count)]


def all_gather(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    parts = empty(make)
    return dist.all_gather(parts, make(data()), group, **how), parts


def all_gather_into_tensor(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    (whole,) = empty(make, (SIZE * ROWS, 5), 1)
    return dist.all_gather_into_tensor(whole, make(data()), group, **how), [whole]


def all_gather_coalesced(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    inputs = [make(data()), make(data(shape=(7,), salt=1))]
    parts = [[*empty(make, SHAPE, 1), *empty(make, (7,), 1)] for _ in range(SIZE)]
    handle = dist.all_gather_coalesced(parts, inputs, group, **how)
    return handle, [tensor for part in parts for tensor in part]


def gather(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    parts = empty(make) if root == RANK else []
    return dist.gather(make(data()), parts or None, root, group, **how), parts


def scatter(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    parts = [make(data(salt=rank)) for rank in range(SIZE)] if root == RANK else None
    (part,) = empty(make, count=1)
    return dist.scatter(part, parts, root, group, **how), [part]


def reduce_scatter(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    (part,) = empty(make, count=1)
    parts = [make(data(salt=rank)) for rank in range(SIZE)]
    return dist.reduce_scatter(part, parts, group=group, **how), [part]


def reduce_scatter_tensor(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    (part,) = empty(make, count=1)
    whole = make(data(shape=(SIZE * ROWS, 5)))
    return dist.reduce_scatter_tensor(part, whole, group=group, **how), [part]


def all_to_all(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    parts, inputs = empty(make), [make(data(salt=rank)) for rank in range(SIZE)]
    return dist.all_to_all(parts, inputs, group, **how), parts


def all_to_all_single(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    (whole,) = empty(make, (SIZE * 2, 3), 1)
    return dist.all_to_all_single(whole, make(data(shape=(SIZE * 2, 3))), group=group, **how), [whole]


def rows(source: int, target: int) -> int:
    return (2 * source + target) % 4


def all_to_all_with_splits(group: Group, make: Make, root: int, **how: bool) -> tuple[Any, list[Tensor]]:
    gives, gets = [rows(RANK, rank) for rank in range(SIZE)], [rows(rank, RANK) for rank in range(SIZE)]
    (whole,) = empty(make, (sum(gets), 3), 1)
    return dist.all_to_all_single(whole, make(data(shape=(sum(gives), 3))), gets, gives, group, **how), [
        whole
    ]


CALLS = [
    all_reduce,
    all_reduce_max,
    all_reduce_coalesced,
    broadcast,
    reduce,
    all_gather,
    all_gather_into_tensor,
    all_gather_coalesced,
    gather,
    scatter,
    reduce_scatter,
    reduce_scatter_tensor,
    all_to_all,
    all_to_all_single,
    all_to_all_with_splits,
]
ROOTED = (broadcast, reduce, gather, scatter)
calls = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)


def roots(call: Any) -> range:
    return range(SIZE if call in ROOTED else 1)


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.detach().resolve_neg(), other.detach()), (one, other)


def by_gloo(pair: Pair, call: Any, root: int) -> list[Tensor]:
    _, tensors = call(pair.gloo, torch.clone, root)
    return list(tensors)


@layouts
@calls
def test_as_gloo(pair: Pair, call: Any, make: Make) -> None:
    """In every layout what gloo gives with tensors of their own memory."""
    for root in roots(call):
        handle, found = call(pair.ours, make, root)
        assert handle is None
        assert_same(found, by_gloo(pair, call, root))


@calls
def test_as_gloo_while_the_program_goes_on(pair: Pair, call: Any) -> None:
    for root in roots(call):
        handle, found = call(pair.ours, strided, root, async_op=True)
        handle.wait()
        assert_same(found, by_gloo(pair, call, root))


def test_who_only_gives_keeps_its_tensor(pair: Pair) -> None:
    for root in range(SIZE):
        tensor = data()
        dist.reduce(tensor, root, group=pair.ours)
        if root != RANK:
            assert torch.equal(tensor, data())


# -- reductions: every dtype and operation

SUM, AVG, PRODUCT, MIN, MAX = ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX
BAND, BOR, BXOR = ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR
OPERATIONS = {
    SUM: torch.add,
    PRODUCT: torch.mul,
    MIN: torch.minimum,
    MAX: torch.maximum,
    BAND: torch.bitwise_and,
    BOR: torch.bitwise_or,
    BXOR: torch.bitwise_xor,
}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]  # with which torch itself hardly computes
DTYPES = [*FLOATS, *COMPLEX, *INTEGERS, *UNSIGNED, torch.bool]
GLOO_KNOWS = [*FLOATS, *COMPLEX, torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool]
CASES = [
    (op, dtype)
    for op in (*OPERATIONS, AVG)
    for dtype in DTYPES
    if not (op in (BAND, BOR, BXOR) and dtype in (*FLOATS, *COMPLEX))
    and not (op in (PRODUCT, MIN, MAX) and dtype in COMPLEX)
    and not (op == AVG and dtype not in (*FLOATS, *COMPLEX))
]
cases = pytest.mark.parametrize(("op", "dtype"), CASES, ids=lambda value: str(value).split(".")[-1])


def reduced(op: Any, values: list[Tensor]) -> Tensor:
    dtype = values[0].dtype
    if op == AVG:
        return (functools.reduce(torch.add, values) / SIZE).to(dtype)
    wide = [value.long() if dtype in UNSIGNED else value for value in values]
    return functools.reduce(OPERATIONS[op], wide).to(dtype)


def multiplied(op: Any, values: list[Tensor]) -> list[Tensor]:
    """By 12: the mean of up to four ranks' is an integer, too."""
    return [12 * value for value in values] if op == AVG else values


@cases
def test_reductions(pair: Pair, op: Any, dtype: Any) -> None:
    values = multiplied(op, terms(dtype))
    expected = reduced(op, values)
    whole = torch.cat([values[RANK].roll(rank, 0) for rank in range(SIZE)])  # rank r gets it rolled r times

    tensor = values[RANK].clone()
    dist.all_reduce(tensor, op, pair.ours)
    at_root = values[RANK].clone()
    dist.reduce(at_root, ODD, op, pair.ours)
    part, other = torch.zeros_like(tensor), torch.zeros_like(tensor)
    dist.reduce_scatter_tensor(part, whole, op, pair.ours)
    dist.reduce_scatter(other, list(whole.chunk(SIZE)), op, pair.ours)
    many = [values[RANK].clone(), values[RANK].roll(1, 0).contiguous()]
    dist.all_reduce_coalesced(many, op, pair.ours)

    assert_same([tensor], [expected])
    if RANK == ODD:
        assert_same([at_root], [expected])
    assert_same([part, other], [expected.roll(RANK, 0)] * 2)
    assert_same(many, [expected, expected.roll(1, 0)])
    if dtype in GLOO_KNOWS:
        by_gloo = values[RANK].clone()
        dist.all_reduce(by_gloo, op, pair.gloo)
        if dtype == torch.bool:  # whose sum is, with gloo, a byte of any value
            by_gloo = by_gloo.view(torch.uint8).clamp(max=1).view(torch.bool)
        assert_same([tensor], [by_gloo])


@layouts
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_of_multiples(pair: Pair, make: Make, dtype: Any) -> None:
    """PREMUL_SUM, which NCCL has and gloo has not."""
    factors = [0.5, torch.tensor(3.0).to(dtype)]
    for factor in factors:
        op = premul_sum(factor)
        expected = reduced(SUM, [4 * value * factor for value in terms(dtype)])
        mine = 4 * term(dtype=dtype)
        tensor, at_root, part = make(mine), make(mine), make(torch.zeros_like(mine))
        dist.all_reduce(tensor, op, pair.ours)
        dist.reduce(at_root, ODD, op, pair.ours)
        dist.reduce_scatter(part, [make(mine.roll(rank, 0)) for rank in range(SIZE)], op, pair.ours)
        assert_same([tensor, part], [expected, expected.roll(RANK, 0)])
        assert_same([at_root], [expected if RANK == ODD else mine])
        whole = make(torch.cat([mine] * SIZE))
        dist.reduce_scatter_tensor(part, whole, op, pair.ours)
        assert_same([part, whole], [expected, torch.cat([mine] * SIZE)])


# -- movements: every dtype, also those with which nobody computes

MOVED = [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2]


def bytes_of(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_movements_of_every_dtype(pair: Pair, dtype: Any) -> None:
    group = pair.ours
    everyones = [data(rank, dtype=dtype) for rank in range(SIZE)]
    mine = everyones[RANK]
    tensor = mine.clone()
    dist.broadcast(tensor, ODD, group)
    assert bytes_of(tensor) == bytes_of(everyones[ODD])
    parts = [torch.empty_like(mine) for _ in range(SIZE)]
    dist.all_gather(parts, mine, group)
    assert [bytes_of(part) for part in parts] == [bytes_of(values) for values in everyones]
    whole = torch.empty((SIZE, *SHAPE), dtype=dtype)
    dist.all_gather_into_tensor(whole, mine, group)
    assert bytes_of(whole) == [byte for values in everyones for byte in bytes_of(values)]
    dist.all_to_all_single(torch.empty_like(whole), whole, group=group)
    dist.all_to_all(parts, [mine] * SIZE, group)
    assert [bytes_of(part) for part in parts] == [bytes_of(values) for values in everyones]
    dist.scatter(tensor, parts if RANK == 0 else None, 0, group)
    assert bytes_of(tensor) == bytes_of(mine)
    dist.gather(mine, parts if RANK == ODD else None, ODD, group)
    requests = [dist.isend(mine, NEXT, group), dist.irecv(tensor, PREVIOUS, group)]
    for request in requests:
        request.wait()
    assert bytes_of(tensor) == bytes_of(everyones[PREVIOUS])


def test_parts_of_other_sizes(pair: Pair) -> None:
    """For which gloo has no collective. Of ranks 0 and 3 there is nothing."""
    shapes = [(rank % 3, 2 + rank) for rank in range(SIZE)]
    everyones = [data(rank, shape) for rank, shape in enumerate(shapes)]
    parts = [torch.zeros(shape) for shape in shapes]
    dist.all_gather(parts, everyones[RANK], pair.ours)
    assert_same(parts, everyones)
    part = torch.zeros(shapes[RANK])
    dist.reduce_scatter(part, [data(RANK, shape) for shape in shapes], group=pair.ours)
    assert_same([part], [reduced(SUM, [data(rank, shapes[RANK]) for rank in range(SIZE)])])
    others = [torch.zeros(rank + RANK, 2) for rank in range(SIZE)]
    dist.all_to_all(others, [data(shape=(rank + RANK, 2), salt=rank) for rank in range(SIZE)], pair.ours)
    assert_same(others, [data(rank, (rank + RANK, 2), salt=RANK) for rank in range(SIZE)])


@pytest.mark.parametrize("make", LAYOUTS[:2], ids=lambda make: make.__name__)
def test_tensors_without_dimensions(pair: Pair, make: Make) -> None:
    def scalar(rank: int = RANK) -> Tensor:
        return make(torch.tensor(3.0 * rank + 1))

    group = pair.ours
    everyones = [scalar(rank) for rank in range(SIZE)]
    tensor, other, part = scalar(), scalar(), scalar()
    dist.all_reduce(tensor, group=group)
    dist.broadcast(other, ODD, group)
    assert_same([tensor, other], [reduced(SUM, everyones), everyones[ODD]])
    whole, parts = make(torch.zeros(SIZE)), [make(torch.zeros(())) for _ in range(SIZE)]
    dist.all_gather_into_tensor(whole, scalar(), group)
    dist.all_gather(parts, scalar(), group)
    assert_same([whole, *parts], [torch.stack(everyones), *everyones])
    dist.reduce_scatter_tensor(part, whole, group=group)
    assert_same([part], [SIZE * scalar()])
    dist.all_to_all(parts, [scalar()] * SIZE, group)
    assert_same(parts, everyones)
    dist.scatter(part, parts if RANK == 0 else None, group=group)
    assert_same([part], [scalar()])
    dist.reduce(part, 0, group=group)
    for request in (dist.isend(scalar(), NEXT, group), dist.irecv(other, PREVIOUS, group)):
        request.wait()
    assert_same([other], [everyones[PREVIOUS]])


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)], ids=str)
def test_tensors_without_elements(pair: Pair, shape: Sequence[int]) -> None:
    def nothing(*more: int) -> Tensor:
        return torch.zeros(*more, *shape)

    group = pair.ours
    parts = [nothing() for _ in range(SIZE)]
    for tensor in (nothing(), nothing().mT if len(shape) == 2 else nothing()):
        dist.all_reduce(tensor, group=group)
        dist.broadcast(tensor, ODD, group)
        dist.reduce(tensor, ODD, group=group)
        assert tensor.numel() == 0
    dist.all_reduce_coalesced([nothing(), torch.ones(1), nothing()], group=group)
    dist.all_gather(parts, nothing(), group)
    dist.all_gather_into_tensor(nothing(SIZE), nothing(), group)
    dist.reduce_scatter(nothing(), parts, group=group)
    dist.reduce_scatter_tensor(nothing(), nothing(SIZE), group=group)
    dist.all_to_all(parts, parts, group)
    dist.all_to_all_single(nothing(SIZE), nothing(SIZE), group=group)
    dist.gather(nothing(), parts if RANK == ODD else None, ODD, group)
    dist.scatter(nothing(), parts if RANK == ODD else None, ODD, group)
    for request in (dist.isend(nothing(), NEXT, group), dist.irecv(nothing(), PREVIOUS, group)):
        request.wait()
    check_works(group)


def test_much_data(pair: Pair) -> None:
    """Beyond what MPI sends eagerly."""
    mine = data(shape=(300_001,))
    tensor, by_gloo = mine.clone(), mine.clone()
    dist.all_reduce(tensor, group=pair.ours)
    dist.all_reduce(by_gloo, group=pair.gloo)
    received = torch.empty_like(mine)
    for request in (dist.isend(mine, NEXT, pair.ours), dist.irecv(received, PREVIOUS, pair.ours)):
        request.wait()
    assert_same([tensor, received], [by_gloo, data(PREVIOUS, (300_001,))])


# -- several collectives as one


def coalesced(group: Group, device: Any = None, **how: bool) -> Any:
    return dist.distributed_c10d._coalescing_manager(group, device, **how)


@pytest.mark.parametrize("at_once", [False, True], ids=["later", "at once"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_coalescing(pair: Pair, device: str | None, at_once: bool) -> None:
    """Without a device torch gives us all calls as one, and with one it marks where they begin and end."""
    group, how = pair.ours, {} if at_once else {"async_ops": True}
    sums, wholes, parts = [], [], []
    where = None if device is None else torch.device(device)
    made = []
    with coalesced(group, where, **how) as manager:
        for shape in (SHAPE, (7,)):
            sums.append(data(shape=shape))
            dist.all_reduce(sums[-1], group=group)
    made.append(manager)
    with coalesced(group, where, **how) as manager:
        for shape in (SHAPE, (7, 1)):
            wholes.append(torch.zeros(SIZE * shape[0], shape[1]))
            dist.all_gather_into_tensor(wholes[-1], data(shape=shape), group)
    made.append(manager)
    with coalesced(group, where, **how) as manager:
        for shape in (SHAPE, (7, 1)):
            parts.append(torch.zeros(shape))
            dist.reduce_scatter_tensor(parts[-1], data(shape=(SIZE * shape[0], shape[1])), group=group)
    made.append(manager)
    if not at_once:
        for manager in made:
            manager.wait()
    for tensor in sums:
        assert_same([tensor], [reduced(SUM, [data(rank, tensor.shape) for rank in range(SIZE)])])
    for tensor, part in zip(wholes, parts, strict=True):
        assert_same([tensor], [torch.cat([data(rank, part.shape) for rank in range(SIZE)])])
        total = reduced(SUM, [data(rank, tensor.shape) for rank in range(SIZE)])
        assert_same([part], [total.chunk(SIZE)[RANK]])


def test_coalesced_sums_of_several_dtypes(pair: Pair) -> None:
    tensors = [data(dtype=dtype) for dtype in (torch.float32, torch.int32, torch.float32)]
    with coalesced(pair.ours):
        for tensor in tensors:
            dist.all_reduce(tensor, group=pair.ours)
    for tensor in tensors:
        assert_same([tensor], [reduced(SUM, [data(rank, dtype=tensor.dtype) for rank in range(SIZE)])])


# -- barriers


@pytest.mark.parametrize("barrier", ["barrier", "monitored_barrier"])
def test_nobody_leaves_a_barrier_before_all_have_come(pair: Pair, barrier: str) -> None:
    wait = {
        "barrier": lambda: dist.barrier(pair.ours),
        "monitored_barrier": lambda: pair.ours.monitored_barrier(timedelta(seconds=20)),
    }[barrier]
    for late in range(SIZE):
        if late == RANK:
            time.sleep(0.02)
        entered = time.clock_gettime(time.CLOCK_MONOTONIC)  # one clock for all processes of a machine
        wait()
        left = time.clock_gettime(time.CLOCK_MONOTONIC)
        assert left >= max(WORLD.allgather(entered))
    work = dist.barrier(pair.ours, async_op=True)
    assert work.wait() and work.is_completed()


# -- messages


@needs_others
@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_messages(pair: Pair, make: Make) -> None:
    """From each rank to the next, in both ways of waiting."""
    for tag in (0, 5):
        tensor = make(torch.zeros(SHAPE))
        if RANK % 2 == 0:
            dist.send(make(data(salt=tag)), NEXT, pair.ours, tag)
            assert dist.recv(tensor, PREVIOUS, pair.ours, tag) == PREVIOUS
        else:
            assert dist.recv(tensor, PREVIOUS, pair.ours, tag) == PREVIOUS
            dist.send(make(data(salt=tag)), NEXT, pair.ours, tag)
        assert_same([tensor], [data(PREVIOUS, salt=tag)])


@needs_others
def test_messages_meet_by_their_tags(pair: Pair) -> None:
    """And messages of one tag in the order in which they were sent."""
    tags = [3, 0, 3, 1]
    sent = [dist.isend(data(salt=number), NEXT, pair.ours, tag) for number, tag in enumerate(tags)]
    received = {}
    for number in (3, 1, 0, 2):
        received[number] = torch.zeros(SHAPE)
        assert dist.recv(received[number], PREVIOUS, pair.ours, tags[number]) == PREVIOUS
    assert_same([received[n] for n in range(4)], [data(PREVIOUS, salt=n) for n in range(4)])
    assert all(work.wait() for work in sent)


@needs_others
def test_batches_of_messages(pair: Pair) -> None:
    tensors = [torch.zeros(SHAPE) for _ in range(SIZE)]
    others = [rank for rank in range(SIZE) if rank != RANK]
    batch = [dist.P2POp(dist.irecv, tensors[rank], rank, pair.ours) for rank in others]
    batch += [dist.P2POp(dist.isend, data(salt=rank), rank, pair.ours) for rank in others]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
        assert work.is_completed()
    assert_same([tensors[rank] for rank in others], [data(rank, salt=RANK) for rank in others])


@needs_others
@pytest.mark.parametrize("root", [0, ODD])
def test_messages_from_any_rank(pair: Pair, root: int) -> None:
    if root != RANK:
        dist.send(data(), root, pair.ours, tag=7)
        return
    sources = []
    for _ in range(SIZE - 1):
        tensor = torch.zeros(SHAPE)
        sources.append(dist.recv(tensor, group=pair.ours, tag=7))
        assert_same([tensor], [data(sources[-1])])
    assert sorted(sources) == [rank for rank in range(SIZE) if rank != root]


def test_what_a_message_says_of_itself(pair: Pair) -> None:
    tensor = torch.zeros(SHAPE)
    received = dist.irecv(tensor, PREVIOUS, pair.ours)
    future = received.get_future()
    if SIZE > 1:
        assert not received.is_completed()
        with pytest.raises(DeadlineError, match="recv"):
            received.wait(timedelta(seconds=0.02))
        wait_for_all()
    sent = dist.isend(data(), NEXT, pair.ours)
    assert received.wait(timedelta(seconds=30)) and sent.wait()
    assert received.is_completed() and received.is_success() and sent.is_completed()
    assert received.source_rank() == PREVIOUS
    assert received.result()[0] is tensor
    assert_same(future.wait(), [data(PREVIOUS)])


# -- objects


def test_objects(pair: Pair) -> None:
    group, mine = pair.ours, {"rank": RANK, "more": "x" * 1000 * RANK}
    everyones = [{"rank": rank, "more": "x" * 1000 * rank} for rank in range(SIZE)]
    found: list[Any] = [None] * SIZE
    dist.all_gather_object(found, mine, group)
    assert found == everyones
    for root in range(SIZE):
        some = [mine, root] if root == RANK else [None, None]
        dist.broadcast_object_list(some, root, group)
        assert some == [everyones[root], root]
        collected = [None] * SIZE if root == RANK else None
        dist.gather_object(mine, collected, root, group)
        assert collected == (everyones if root == RANK else None)
        part = [None]
        dist.scatter_object_list(part, everyones if root == RANK else None, root, group)
        assert part == [everyones[RANK]]


@needs_others
def test_objects_as_messages(pair: Pair) -> None:
    objects: list[Any] = [None, None]
    if RANK == 0:
        dist.send_object_list([{"a": 1}, (2, "b")], ODD, pair.ours)
    if RANK == ODD:
        assert dist.recv_object_list(objects, 0, pair.ours) == 0
        assert objects == [{"a": 1}, (2, "b")]


# -- functional collectives, which give new tensors


def test_functional_collectives(pair: Pair) -> None:
    def both(call: Callable[[Group], Any]) -> None:
        found, expected = (functional.wait_tensor(call(group)) for group in pair)
        assert_same([found], [expected])

    for name in ("sum", "max", "product", "avg"):
        both(functools.partial(functional.all_reduce, 12 * term(), name))
    both(lambda group: functional.broadcast(data(), ODD, group))
    both(lambda group: functional.all_gather_tensor(data(), 0, group))
    both(lambda group: functional.all_gather_tensor(data(), 1, group))
    both(lambda group: functional.reduce_scatter_tensor(data(shape=(SIZE * ROWS, 5)), "sum", 0, group))
    both(lambda group: functional.reduce_scatter_tensor(data(shape=(5, SIZE * 2)), "sum", 1, group))
    both(lambda group: functional.all_to_all_single(data(shape=(SIZE * 2, 3)), None, None, group))
    gives, gets = [rows(RANK, rank) for rank in range(SIZE)], [rows(rank, RANK) for rank in range(SIZE)]
    both(lambda group: functional.all_to_all_single(data(shape=(sum(gives), 3)), gets, gives, group))
    both(lambda group: functional.permute_tensor(data(shape=(7,)), [*range(1, SIZE), 0], group))


def test_functional_collectives_of_many_tensors(pair: Pair) -> None:
    group, mine = pair.ours, [data(), data(shape=(7, 1), salt=1)]
    sums = functional.all_reduce_coalesced(mine, "sum", group)
    wholes = functional.all_gather_into_tensor_coalesced(mine, group)
    parts = functional.reduce_scatter_tensor_coalesced(
        [torch.cat([tensor] * SIZE) for tensor in mine], "sum", [0, 0], group
    )
    everyones = [[data(rank), data(rank, (7, 1), salt=1)] for rank in range(SIZE)]
    totals = [reduced(SUM, [tensors[n] for tensors in everyones]) for n in range(2)]
    assert_same([functional.wait_tensor(tensor) for tensor in sums], totals)
    assert_same([functional.wait_tensor(tensor) for tensor in parts], totals)
    expected = [torch.cat([tensors[n] for tensors in everyones]) for n in range(2)]
    assert_same([functional.wait_tensor(tensor) for tensor in wholes], expected)


def test_functional_collectives_with_gradients(pair: Pair) -> None:
    """The gradient of a gathering is a scattered sum, and the other way round."""
    gradients = []
    for group in pair:
        tensor = data().requires_grad_()
        whole = functional.all_gather_tensor_autograd(tensor, 0, group)
        (whole * data(shape=(SIZE * ROWS, 5), salt=3)).sum().backward()
        gradients.append(tensor.grad)
    assert_same(gradients[:1], gradients[1:])


# -- groups


def test_groups_of_some_ranks(pair: Pair) -> None:
    """All groups of two neighbours, made by all ranks; each rank uses its own."""
    for first in range(0, SIZE - 1, 2):
        ranks = [first, first + 1]
        group = dist.new_group(ranks)
        if RANK not in ranks:
            assert group == dist.GroupMember.NON_GROUP_MEMBER
            continue
        assert (dist.get_rank(group), dist.get_world_size(group)) == (RANK - first, 2)
        tensor = data()
        dist.all_reduce(tensor, group=group)
        assert_same([tensor], [data(first) + data(first + 1)])
        other = data()
        dist.broadcast(other, first + 1, group)
        assert_same([other], [data(first + 1)])
        if first == RANK:
            dist.send(data(), first + 1, group)
        else:
            assert dist.recv(other, group=group) == first
            assert_same([other], [data(first)])
        dist.destroy_process_group(group)
    check_works(pair.ours)


def test_groups_in_another_order(pair: Pair) -> None:
    ranks = list(range(SIZE))[::-1]
    ours, gloo = (dist.new_group(ranks, backend=name, sort_ranks=False) for name in (None, "gloo"))
    assert dist.get_rank(ours) == dist.get_rank(gloo) == ODD - RANK
    found = []
    for group in (ours, gloo):
        parts = [torch.zeros(SHAPE) for _ in ranks]
        dist.all_gather(parts, data(), group)
        tensor = data()
        dist.broadcast(tensor, ODD, group)
        part = torch.zeros(SHAPE)
        dist.reduce_scatter(part, [data(salt=n) for n in ranks], group=group)
        collected = [torch.zeros(SHAPE) for _ in ranks] if RANK == 0 else None
        dist.gather(data(), collected, 0, group)
        found.append([*parts, tensor, part, *(collected or [])])
    assert_same(*found)
    if SIZE > 1 and RANK == 0:
        dist.send(data(), ODD, ours)
    if SIZE > 1 and RANK == ODD:
        tensor = torch.zeros(SHAPE)
        assert dist.recv(tensor, group=ours) == 0
        assert_same([tensor], [data(0)])
    for group in (ours, gloo):
        dist.destroy_process_group(group)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch splits groups where there is a GPU")
def test_torch_does_not_split_groups_without_a_gpu(pair: Pair) -> None:
    errors = [error_of(dist.split_group, group, [list(range(SIZE))]) for group in pair]
    assert errors[0] is errors[1] is RuntimeError


def test_our_groups_split_themselves(pair: Pair) -> None:
    ranks = list(range(0, SIZE, 2))[::-1]
    part = pair.ours.split_group(ranks, timedelta(seconds=20))
    assert (part is None) == (RANK not in ranks)
    if part is not None:
        assert part.rank() == ranks.index(RANK) and part.size() == len(ranks)
        tensor = data()
        part.allreduce([tensor]).wait()
        assert_same([tensor], [reduced(SUM, [data(rank) for rank in ranks])])
        part.shutdown()


# -- work


def test_work(pair: Pair) -> None:
    tensor = data()
    work = dist.all_reduce(tensor, group=pair.ours, async_op=True)
    assert work.wait() is True and work.wait(timedelta(seconds=1)) is True
    assert work.is_completed() and work.is_success() and work.exception() is None
    assert len(work.result()) == 1 and work.result()[0] is tensor
    work.synchronize()
    expected = reduced(SUM, [data(rank) for rank in range(SIZE)])
    assert_same([tensor], [expected])
    assert_same(work.get_future().wait(), [expected])


def test_blocking_works_have_results_of_their_own(pair: Pair) -> None:
    options = _c10d.AllreduceOptions()
    options.asyncOp = False
    tensors = [term(dtype=torch.float64).add(salt) for salt in range(3)]
    works = [pair.ours.allreduce([tensor], options) for tensor in tensors]
    futures = [work.get_future() for work in works]
    for tensor, work, future in zip(tensors, works, futures, strict=True):
        assert work.result()[0] is tensor and future.wait()[0] is tensor
    del work, works, futures, future
    pair.ours.allreduce([tensors[1]], options)  # which nobody keeps
    work = pair.ours.allreduce([tensors[2]], options)
    assert work.result()[0] is tensors[2] and work.get_future().wait()[0] is tensors[2]


def test_memory_that_serves_again(pair: Pair) -> None:
    """Tensors of all kinds and sizes that lie where others have lain before."""
    pool = torch.zeros(256, dtype=torch.uint8)
    dtypes = [torch.float32, torch.int64, torch.bfloat16, torch.bool, torch.uint8, torch.float64]
    for number, dtype in enumerate(3 * dtypes):
        shape, root = (2 + number,), number % SIZE
        tensor = pool.view(dtype)[: 2 + number]
        tensor.copy_(data(shape=shape, dtype=dtype, salt=number))
        dist.broadcast(tensor, root, group=pair.ours)
        assert torch.equal(tensor, data(root, shape=shape, dtype=dtype, salt=number))


def test_work_goes_on_without_anybody_waiting(pair: Pair) -> None:
    work = dist.all_reduce(data(), group=pair.ours, async_op=True)
    until = time.monotonic() + PROMPT
    while not work.is_completed():
        assert time.monotonic() < until
        time.sleep(0.001)
    assert work.is_success()


def test_waiting_in_any_order(pair: Pair) -> None:
    tensors = [data(salt=number) for number in range(6)]
    works = [dist.all_reduce(tensor, group=pair.ours, async_op=True) for tensor in tensors]
    more = data()
    dist.all_reduce(more, group=pair.ours)  # comes after them, whoever waits for what
    order = reversed(works) if RANK % 2 else works
    for work in order:
        assert work.wait()
    expected = [reduced(SUM, [data(rank, salt=number) for rank in range(SIZE)]) for number in range(6)]
    assert_same([*tensors, more], [*expected, expected[0]])


def test_futures(pair: Pair) -> None:
    tensors = [data(salt=number) for number in range(3)]
    works = [dist.all_reduce(tensor, group=pair.ours, async_op=True) for tensor in tensors]
    futures = [work.get_future() for work in works]
    doubled = [future.then(lambda done: 2 * done.value()[0]) for future in futures]
    expected = [reduced(SUM, [data(rank, salt=number) for rank in range(SIZE)]) for number in range(3)]
    assert_same([found for (found,) in torch.futures.wait_all(futures)], expected)
    assert_same(torch.futures.wait_all(doubled), [2 * total for total in expected])
    collected = torch.futures.collect_all(doubled).wait()
    assert_same([future.value() for future in collected], [2 * total for total in expected])
    assert all(future.done() for future in (*futures, *doubled))
    assert works[0].get_future() is futures[0]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        futures[0].then(lambda done: 1 / 0).wait()


@needs_others
def test_waiting_for_some_time(pair: Pair) -> None:
    """A time limit on waiting breaks nothing."""
    tensor = data()
    if RANK == ODD:
        wait_for_all()
        dist.all_reduce(tensor, group=pair.ours)
    else:
        work = dist.all_reduce(tensor, group=pair.ours, async_op=True)
        start = time.monotonic()
        with pytest.raises(DeadlineError, match=r"0\.05 s"):
            work.wait(timedelta(seconds=0.05))
        assert 0.05 <= time.monotonic() - start < PROMPT
        assert not work.is_completed() and not work.is_success() and work.exception() is None
        wait_for_all()
        assert work.wait(timedelta(seconds=30))
    assert_same([tensor], [reduced(SUM, [data(rank) for rank in range(SIZE)])])


# -- bad input


def error_of(call: Callable[..., Any], *args: Any) -> type[BaseException] | None:
    try:
        call(*args)
    except Exception as error:
        return type(error)
    return None


def some(count: int, *shape: int, dtype: Any = torch.float32) -> list[Tensor]:
    return [torch.zeros(*shape, dtype=dtype) for _ in range(count)]


def zeros(*shape: int, dtype: Any = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def sparse() -> Tensor:
    return torch.eye(3).to_sparse()


I32, F8, C64 = torch.int32, torch.float8_e4m3fn, torch.complex64
BAD: dict[str, Callable[[Group], Any]] = {
    "all_reduce: no tensor": lambda g: dist.all_reduce([1], group=g),
    "all_reduce: no operation": lambda g: dist.all_reduce(zeros(3), "sum", g),
    "all_reduce: bits of floats": lambda g: dist.all_reduce(zeros(3), BAND, g),
    "all_reduce: order of complex": lambda g: dist.all_reduce(zeros(3, dtype=C64), MAX, g),
    "all_reduce: product of complex": lambda g: dist.all_reduce(zeros(3, dtype=C64), PRODUCT, g),
    "all_reduce: mean of integers": lambda g: dist.all_reduce(zeros(3, dtype=I32), AVG, g),
    "all_reduce: mean of truth": lambda g: dist.all_reduce(zeros(3, dtype=torch.bool), AVG, g),
    "all_reduce: 8-bit floats": lambda g: dist.all_reduce(zeros(3, dtype=F8), group=g),
    "all_reduce: several dtypes": lambda g: dist.all_reduce_coalesced(
        [zeros(3), zeros(3, dtype=I32)], group=g
    ),
    "all_reduce: sparse among others": lambda g: dist.all_reduce_coalesced([zeros(3), sparse()], group=g),
    "broadcast: root": lambda g: dist.broadcast(zeros(3), SIZE, g),
    "broadcast: negative root": lambda g: dist.broadcast(zeros(3), -1, g),
    "broadcast: root in group": lambda g: dist.broadcast(zeros(3), group_src=SIZE, group=g),
    "broadcast: negative in group": lambda g: dist.broadcast(zeros(3), group_src=-1, group=g),
    "broadcast: later": lambda g: dist.broadcast(zeros(3), group_src=SIZE, group=g, async_op=True),
    "broadcast: sparse": lambda g: dist.broadcast(sparse(), 0, g),
    "reduce: root": lambda g: dist.reduce(zeros(3), SIZE, group=g),
    "reduce: root in group": lambda g: dist.reduce(zeros(3), group_dst=SIZE, group=g),
    "reduce: bits of floats": lambda g: dist.reduce(zeros(3), 0, BOR, g),
    "reduce: sparse": lambda g: dist.reduce(sparse(), 0, group=g),
    "reduce: 8-bit floats": lambda g: dist.reduce(zeros(3, dtype=F8), 0, group=g),
    "all_gather: too few": lambda g: dist.all_gather(some(SIZE - 1, 3), zeros(3), g),
    "all_gather: too many": lambda g: dist.all_gather(some(SIZE + 1, 3), zeros(3), g),
    "all_gather: no list": lambda g: dist.all_gather(zeros(3), zeros(3), g),
    "all_gather: dtypes": lambda g: dist.all_gather(some(SIZE, 3, dtype=I32), zeros(3), g),
    "all_gather: complex into real": lambda g: dist.all_gather(some(SIZE, 3, dtype=C64), zeros(3), g),
    "all_gather: size": lambda g: dist.all_gather(some(SIZE, 4), zeros(3), g),
    "all_gather: sparse": lambda g: dist.all_gather([sparse() for _ in range(SIZE)], sparse(), g),
    "all_gather: two inputs": lambda g: g.allgather([some(SIZE, 3)] * 2, some(2, 3)),
    "all_gather: no outputs": lambda g: g.allgather([], [zeros(3)]),
    "all_gather_into: size": lambda g: dist.all_gather_into_tensor(zeros(3 * SIZE + 1), zeros(3), g),
    "all_gather_into: dtype": lambda g: dist.all_gather_into_tensor(zeros(3 * SIZE, dtype=I32), zeros(3), g),
    "all_gather_into: sparse": lambda g: dist.all_gather_into_tensor(sparse(), sparse(), g),
    "all_gather_coalesced: ranks": lambda g: dist.all_gather_coalesced(
        [some(1, 3)] * (SIZE + 1), some(1, 3), g
    ),
    "all_gather_coalesced: tensors": lambda g: dist.all_gather_coalesced([some(2, 3)] * SIZE, some(1, 3), g),
    "all_gather_coalesced: size": lambda g: dist.all_gather_coalesced(
        [some(1, 4) for _ in range(SIZE)], some(1, 3), g
    ),
    "all_gather_coalesced: dtypes": lambda g: dist.all_gather_coalesced(
        [[zeros(3), zeros(3, dtype=I32)] for _ in range(SIZE)], [zeros(3), zeros(3, dtype=I32)], g
    ),
    "gather: root in group": lambda g: dist.gather(zeros(3), group_dst=SIZE, group=g),
    "gather: dtypes": lambda g: dist.gather(zeros(3), some(SIZE, 3, dtype=I32), 0, g),
    "scatter: root in group": lambda g: dist.scatter(zeros(3), group_src=SIZE, group=g),
    "scatter: dtypes": lambda g: dist.scatter(zeros(3), some(SIZE, 3, dtype=I32), 0, g),
    "reduce_scatter: too few": lambda g: dist.reduce_scatter(zeros(3), some(SIZE - 1, 3), group=g),
    "reduce_scatter: dtypes": lambda g: dist.reduce_scatter(zeros(3), some(SIZE, 3, dtype=I32), group=g),
    "reduce_scatter: bits of floats": lambda g: dist.reduce_scatter(zeros(3), some(SIZE, 3), BAND, g),
    "reduce_scatter: 8-bit floats": lambda g: dist.reduce_scatter(
        zeros(3, dtype=F8), some(SIZE, 3, dtype=F8), group=g
    ),
    "reduce_scatter: sparse": lambda g: dist.reduce_scatter(
        sparse(), [sparse() for _ in range(SIZE)], group=g
    ),
    "reduce_scatter: bits of one tensor's floats": lambda g: dist.reduce_scatter_tensor(
        zeros(3), zeros(3 * SIZE), BAND, g
    ),
    "all_to_all: too few outputs": lambda g: dist.all_to_all(some(SIZE - 1, 3), some(SIZE, 3), g),
    "all_to_all: too few inputs": lambda g: dist.all_to_all(some(SIZE, 3), some(SIZE - 1, 3), g),
    "all_to_all: dtypes": lambda g: dist.all_to_all(some(SIZE, 3), some(SIZE, 3, dtype=I32), g),
    "all_to_all: output rows": lambda g: dist.all_to_all_single(
        zeros(2 * SIZE), zeros(2 * SIZE), [1] * SIZE, [2] * SIZE, g
    ),
    "all_to_all: input rows": lambda g: dist.all_to_all_single(
        zeros(2 * SIZE), zeros(2 * SIZE), [2] * SIZE, [1] * SIZE, g
    ),
    "all_to_all: number of parts": lambda g: dist.all_to_all_single(
        zeros(2 * SIZE), zeros(2 * SIZE), [SIZE] * (SIZE + 1), [SIZE] * (SIZE + 1), g
    ),
    "all_to_all: one dtype": lambda g: dist.all_to_all_single(
        zeros(2 * SIZE), zeros(2 * SIZE, dtype=I32), group=g
    ),
    "all_to_all: sparse": lambda g: dist.all_to_all_single(sparse(), sparse(), group=g),
    "send: to oneself": lambda g: dist.send(zeros(3), RANK, g),
    "send: rank": lambda g: dist.send(zeros(3), SIZE, g),
    "send: no tensor": lambda g: dist.isend([1], NEXT, g),
    "send: sparse": lambda g: dist.isend(sparse(), NEXT, g),
    "send: two": lambda g: g.send(some(2, 3), NEXT, 0),
    "recv: sparse": lambda g: dist.irecv(sparse(), PREVIOUS, g),
    "objects: root": lambda g: dist.broadcast_object_list([None], SIZE, g),
}


@pytest.mark.parametrize("what", BAD)
def test_what_gloo_refuses(pair: Pair, what: str) -> None:
    """On all ranks: ours refuses it with the same exception, before anything is sent."""
    found, expected = (error_of(BAD[what], group) for group in pair)
    assert expected is not None
    assert found is expected
    check_works(pair.ours)


BAD_AT_ROOT: dict[str, Callable[[Group], Any]] = {
    "gather: no list": lambda g: dist.gather(zeros(3), None, 0, g),
    "gather: too few": lambda g: dist.gather(zeros(3), some(SIZE + 1, 3), 0, g),
    "gather: size": lambda g: dist.gather(zeros(3), some(SIZE, 4), 0, g),
    "gather: sparse": lambda g: dist.gather(sparse(), [sparse() for _ in range(SIZE)], 0, g),
    "gather: two": lambda g: g.gather([some(SIZE, 3)] * 2, some(2, 3)),
    "scatter: no list": lambda g: dist.scatter(zeros(3), None, 0, g),
    "scatter: too few": lambda g: dist.scatter(zeros(3), some(SIZE + 1, 3), 0, g),
    "scatter: size": lambda g: dist.scatter(zeros(3), some(SIZE, 4), 0, g),
    "scatter: sparse": lambda g: dist.scatter(sparse(), [sparse() for _ in range(SIZE)], 0, g),
}


@pytest.mark.parametrize("what", BAD_AT_ROOT)
def test_what_gloo_refuses_at_the_root(pair: Pair, what: str) -> None:
    if RANK == 0:
        found, expected = (error_of(BAD_AT_ROOT[what], group) for group in pair)
        assert expected is not None
        assert found is expected
    check_works(pair.ours)


# With gloo the first of these end the process, or its connections, or nothing is said.
BAD_ONLY_HERE: dict[str, Callable[[Group], Any]] = {
    "tensors: expected one": lambda g: g.allreduce(some(2, 3)),
    "tensors: expected one tensor": lambda g: g.broadcast([]),
    "outputs: expected 3 elements": lambda g: dist.reduce_scatter(zeros(4), some(SIZE, 3)),
    "input: expected": lambda g: dist.reduce_scatter_tensor(zeros(4), zeros(4 * SIZE - 1), group=g),
    "tensors.1.: expected torch.int32": lambda g: dist.reduce_scatter_tensor(
        zeros(3, dtype=I32), zeros(3 * SIZE), group=g
    ),
    "output split sizes: expected": lambda g: dist.all_to_all_single(
        zeros(SIZE), zeros(SIZE), [SIZE + 1] + [0] * (SIZE - 2) + [-1], [1] * SIZE, g
    ),
    "dst: expected a rank": lambda g: dist.isend(zeros(3), group_dst=SIZE, group=g),
    "src: expected a rank": lambda g: dist.irecv(zeros(3), group_src=-1, group=g),
    "tag: expected a number": lambda g: dist.isend(zeros(3), NEXT, g, tag=-1),
    "expected a CPU or CUDA tensor, got one on meta": lambda g: dist.all_reduce(
        torch.zeros(3, device="meta"), group=g
    ),
    "PREMUL_SUM": lambda g: dist.all_reduce_coalesced(some(2, 3), premul_sum(2.0), g),
    "outputs: expected as many tensors": lambda g: g.reduce_scatter_single_coalesced(
        some(2, 3), some(1, 3 * SIZE)
    ),
}


@pytest.mark.parametrize("what", BAD_ONLY_HERE)
def test_what_we_refuse(pair: Pair, what: str) -> None:
    with pytest.raises(RuntimeError, match=what):
        BAD_ONLY_HERE[what](pair.ours)
    check_works(pair.ours)


# -- ranks that disagree


def refused(call: Callable[[], Any], *errors: type[Exception]) -> str:
    """What the error says, which comes soon."""
    start = time.monotonic()
    with pytest.raises(errors) as caught:
        call()
    assert time.monotonic() - start < PROMPT
    return str(caught.value)


MISMATCHES: dict[str, tuple[Callable[[Group], Any], Callable[[Group], Any]]] = {
    "collective": (lambda g: dist.all_reduce(zeros(3), group=g), lambda g: dist.broadcast(zeros(3), 0, g)),
    "size": (lambda g: dist.all_reduce(zeros(3), group=g), lambda g: dist.all_reduce(zeros(4), group=g)),
    "operation": (lambda g: dist.all_reduce(zeros(3), group=g), lambda g: dist.all_reduce(zeros(3), MAX, g)),
    "dtype": (
        lambda g: dist.all_reduce(zeros(3), group=g),
        lambda g: dist.all_reduce(zeros(3, dtype=I32), group=g),
    ),
    "root": (lambda g: dist.broadcast(zeros(3), 0, g), lambda g: dist.broadcast(zeros(3), ODD, g)),
    "root of a reduction": (
        lambda g: dist.reduce(zeros(3), 0, group=g),
        lambda g: dist.reduce(zeros(3), ODD, group=g),
    ),
    "gathered sizes": (
        lambda g: dist.all_gather_into_tensor(zeros(3 * SIZE), zeros(3), g),
        lambda g: dist.all_gather_into_tensor(zeros(4 * SIZE), zeros(4), g),
    ),
    "scattered sizes": (
        lambda g: dist.reduce_scatter_tensor(zeros(3), zeros(3 * SIZE), group=g),
        lambda g: dist.reduce_scatter_tensor(zeros(4), zeros(4 * SIZE), group=g),
    ),
    "barrier": (lambda g: dist.all_reduce(zeros(3), group=g), dist.barrier),
}


@needs_others
@pytest.mark.parametrize("what", MISMATCHES)
def test_ranks_that_disagree_are_told(doomed: Group, what: str) -> None:
    usual, other = MISMATCHES[what]

    def call() -> None:
        (other if RANK == ODD else usual)(doomed)
        dist.barrier(doomed)  # who only sends may leave the first

    text = refused(call, MismatchError)
    assert "different calls" in text and ranks_named(text) == list(range(SIZE)), text
    with pytest.raises(FAULTS):
        dist.barrier(doomed)


@needs_others
def test_work_of_ranks_that_disagree(doomed: Group) -> None:
    tensor = zeros(3 + (RANK == ODD))
    work = dist.all_reduce(tensor, group=doomed, async_op=True)
    future = work.get_future()
    then = future.then(lambda done: done.value())
    refused(work.wait, MismatchError)
    assert work.is_completed() and not work.is_success()
    assert isinstance(work.exception(), MismatchError)
    for failed in (future, then):
        with pytest.raises(RuntimeError, match="different calls"):
            failed.wait()
    with pytest.raises(FAULTS):
        work.result()


@needs_others
@pytest.mark.parametrize(("sent", "received"), [(3, 4), (4, 3)])
@pytest.mark.parametrize("source", [0, None], ids=["from one rank", "from any"])
def test_messages_of_another_size(doomed: Group, sent: int, received: int, source: int | None) -> None:
    if RANK == 0:
        dist.send(zeros(sent), ODD, doomed)
    if RANK == ODD:
        text = refused(lambda: dist.recv(zeros(received), source, doomed), MismatchError)
        assert f"recv(float32[{received}], src={'any' if source is None else source}, tag=0)" in text, text


@needs_others
def test_ranks_that_compute_are_waited_for(doomed: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although a thread of theirs waits in something else."""
    monkeypatch.setattr(watch, "DEADLOCKED", 0.1)
    tensor, other = data(), torch.zeros(SHAPE)
    if RANK == ODD:
        work = dist.all_reduce(tensor, group=doomed, async_op=True)
        time.sleep(0.6)
        dist.send(data(), 0, doomed)
        work.wait()
    else:
        if RANK == 0:
            dist.recv(other, ODD, doomed)
            assert_same([other], [data(ODD)])
        dist.all_reduce(tensor, group=doomed)
    assert_same([tensor], [reduced(SUM, [data(rank) for rank in range(SIZE)])])


@needs_others
@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_a_rank_that_leaves(doomed: Group, later: bool) -> None:
    if RANK == ODD:
        doomed.abort()
    else:

        def call() -> None:
            work = dist.all_reduce(zeros(3), group=doomed, async_op=later)
            if later:
                work.wait()

        text = refused(call, RankFailedError)
        assert "the process group was aborted" in text, text


@needs_others
@pytest.mark.parametrize("source", [ODD, None], ids=["this rank", "any rank"])
def test_a_rank_that_leaves_is_not_received_from(doomed: Group, source: int | None) -> None:
    if RANK == ODD:
        doomed.abort()
    else:
        refused(lambda: dist.recv(zeros(3), source, doomed), RankFailedError)


@needs_others
@pytest.mark.parametrize("what", ["all_reduce", "later", "recv"])
def test_a_rank_that_does_not_come(hasty: Group, what: str) -> None:
    """After the group's timeout the others are told where all are."""
    waiting = {
        "all_reduce": lambda: dist.all_reduce(zeros(3), group=hasty),
        "later": lambda: dist.all_reduce(zeros(3), group=hasty, async_op=True).wait(),
        "recv": lambda: dist.recv(zeros(3), ODD, hasty),
    }
    check_missing(waiting[what])


@needs_others
def test_a_monitored_barrier_has_a_timeout_of_its_own(doomed: Group) -> None:
    check_missing(lambda: doomed.monitored_barrier(SHORT))


def check_missing(call: Callable[[], Any]) -> None:
    if RANK == ODD:
        wait_for_all()
    else:
        start = time.monotonic()
        text = refused(call, DeadlineError)
        assert time.monotonic() - start >= SHORT.total_seconds()
        assert ranks_named(text) == list(range(SIZE)), text
        assert f"rank {ODD} in no collective, at test_torch_collectives.py:" in text, text
        wait_for_all()


@needs_others
def test_another_timeout(hasty: Group) -> None:
    hasty.set_timeout(timedelta(seconds=30))
    if RANK == ODD:
        time.sleep(1.5 * SHORT.total_seconds())
    check_works(hasty)
    hasty.monitored_barrier(timedelta(seconds=20))
    assert hasty.comm.timeout == 30


# -- the end


def test_a_job_may_begin_again(pair: Pair) -> None:
    """After which the fixture's groups are no more: keep this test the last one."""
    dist.destroy_process_group()
    mpicoll.torch.init(timedelta(seconds=20))
    for group in (dist.group.WORLD, dist.new_group(), dist.new_group(backend="gloo")):
        check_works(group)
