"""What is built on torch.distributed, over the backend "mpicoll": trained for some steps on small models.

Each rank has its own data. What comes of it is compared with the same over gloo, or with one process that
has the data of all ranks.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from mpi4py import MPI
from mpicoll.bench.gloo import end_groups
from torch import nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import mpicoll
import mpicoll.torch
from mpicoll.faults import MismatchError, RankFailedError

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
LAST = SIZE - 1
EVERYONE = tuple(range(SIZE))
STEPS = 4
INPUTS, HIDDEN, OUTPUTS, BATCH = 7, 12, 5, 6
SMALL_BUCKETS = {"bucket_cap_mb": 0.0003}  # 314 bytes: a bucket for about one layer
CLOSE = 1e-6
HALF_CLOSE = 0.02  # of parameters below 1, trained in 16 bits
PROMPT = 10.0  # seconds within which a rank that waits in vain says so

several_ranks = pytest.mark.skipif(SIZE == 1, reason="needs another rank")

Group = Any
Network = Any
Tensors = list[torch.Tensor]


@pytest.fixture(scope="module")
def gloo() -> Iterator[Group]:
    """A group of all ranks over gloo, beside the default one, which is ours."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    mpicoll.torch.init()
    yield dist.new_group(backend="gloo")
    end_groups()
    torch.set_num_threads(threads)


# -- what is trained


class Branches(nn.Module):
    """Of two layers one is used: which, is another question on each rank and in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branches = nn.Linear(INPUTS, HIDDEN), nn.ModuleList()
        self.branches.extend([nn.Linear(HIDDEN, OUTPUTS), nn.Linear(HIDDEN, OUTPUTS)])
        self.turn = RANK

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.turn += 1
        return self.branches[self.turn // 2 % 2](self.first(x).tanh())


def plain() -> Network:
    return nn.Sequential(
        nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS)
    )


def normalised() -> Network:
    return nn.Sequential(
        nn.Linear(INPUTS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS)
    )


def frozen() -> Network:
    network = plain()
    network[2].requires_grad_(False)
    return network


def in_(dtype: torch.dtype) -> Callable[[], Network]:
    return lambda: plain().to(dtype)


def seeded(new: Callable[[], Network], seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return new()


def batch(step: int, ranks: Iterable[int] = (RANK,)) -> Tensors:
    """What these ranks have in this step: inputs and targets."""
    randoms = [torch.Generator().manual_seed(100 * step + rank) for rank in ranks]
    return [
        torch.cat([torch.randn(BATCH, width, generator=random) for random in randoms])
        for width in (INPUTS, OUTPUTS)
    ]


def loss(network: Network, step: int, ranks: Iterable[int] = (RANK,)) -> torch.Tensor:
    dtype = next(network.parameters()).dtype
    inputs, targets = (part.to(dtype) for part in batch(step, ranks))
    return nn.functional.mse_loss(network(inputs), targets)


def optimizer_of(network: Network) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def train(
    network: Network,
    optimizer: Any = None,
    ranks: Sequence[int] = (RANK,),
    steps: Iterable[int] = range(STEPS),
    clip: float | None = None,
) -> None:
    optimizer = optimizer or optimizer_of(network)
    for step in steps:
        optimizer.zero_grad()
        loss(network, step, ranks).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()


def trained_ddp(group: Group, new: Callable[[], Network] = plain, **settings: Any) -> Network:
    """From parameters that differ at first."""
    network = DistributedDataParallel(seeded(new, RANK), process_group=group, **settings)
    train(network)
    return network


def trained_alone(new: Callable[[], Network] = plain, **settings: Any) -> Network:
    """On the data of all ranks."""
    network = seeded(new)
    train(network, ranks=EVERYONE, **settings)
    return network


# -- what is compared


def values(network: Network) -> Tensors:
    """Parameters and buffers, whole."""
    with torch.no_grad():
        found = [value.detach() for value in network.state_dict().values()]
        return [value.full_tensor() if isinstance(value, DTensor) else value.clone() for value in found]


def check_close(
    ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor], tolerance: float = CLOSE
) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def check_alike(tensors: Iterable[torch.Tensor]) -> None:
    """The same bits on all ranks."""
    bits = [tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]
    digests = MPI.COMM_WORLD.allgather(hashlib.sha256(b"".join(bits)).hexdigest())
    assert len(set(digests)) == 1


def check_over_gloo(gloo: Group, run: Callable[[Group], Network], tolerance: float = CLOSE) -> None:
    """All parameters, and each rank's buffers."""
    ours, theirs = (run(group) for group in (dist.group.WORLD, gloo))
    check_close(values(ours), values(theirs), tolerance)
    check_alike(ours.parameters())


# -- the same parameters on all ranks, without a process group


class Mixed(nn.Module):
    """Parameters and buffers of several dtypes and layouts, one of them empty; others on each rank."""

    def __init__(self, seed: int = RANK) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=random)
        self.column = nn.Parameter(draw(5, 4).t())
        self.part = nn.Parameter(draw(7, 6)[::2, 1:4])
        self.short = nn.Parameter(draw(3, 3).to(torch.bfloat16))
        self.single = nn.Parameter(draw(()).to(torch.float64))
        self.frozen = nn.Parameter(draw(2, 3), requires_grad=False)
        self.empty = nn.Parameter(draw(0, 3))
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("mask", draw(9) > 0)
        self.register_buffer("phase", draw(3, dtype=torch.complex64).conj())


@pytest.mark.parametrize("root", sorted({0, LAST}))
def test_a_module_is_given_to_all_ranks(root: int) -> None:
    assert not dist.is_initialized()
    module = Mixed()
    places = [parameter.data_ptr() for parameter in module.parameters()]
    mpicoll.torch.sync_parameters(module, root=root)
    check_close(module.state_dict().values(), Mixed(root).state_dict().values(), 0)
    assert places == [parameter.data_ptr() for parameter in module.parameters()]
    assert not any(parameter.grad_fn for parameter in module.parameters())


def test_tensors_are_given_to_the_ranks_of_a_communicator() -> None:
    with mpicoll.Communicator(MPI.COMM_WORLD) as comm, comm.Split(RANK % 2, -RANK) as half:
        tensors = [torch.full((3, number), RANK + number / 8) for number in range(5)]
        mpicoll.torch.sync_parameters((tensor for tensor in tensors), half, root=half.size - 1)
        lowest = RANK % 2  # the last one in the order of minus ranks
        for number, tensor in enumerate(tensors):
            assert torch.equal(tensor, torch.full((3, number), lowest + number / 8))
        mpicoll.torch.sync_parameters(tensors, comm, root=LAST)
        assert tensors[4][0, 0] == LAST % 2 + 0.5


def test_much_is_given_in_several_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpicoll.torch.parameters.MESSAGE", 64)
    module = seeded(plain, RANK)
    mpicoll.torch.sync_parameters(module)
    check_close(values(module), values(seeded(plain)), 0)


def test_what_cannot_be_given_is_named() -> None:
    with pytest.raises(TypeError, match=r"model\[1\]: expected a tensor, got int"):
        mpicoll.torch.sync_parameters([torch.zeros(2), 3])
    with pytest.raises(RuntimeError, match=r"model\[0\]: .* meta"):
        mpicoll.torch.sync_parameters(nn.Linear(2, 3, device="meta"))


# -- DistributedDataParallel

DDP: dict[str, tuple[Callable[[], Network], dict[str, Any], float]] = {
    "one bucket": (plain, {}, CLOSE),
    "several buckets": (plain, SMALL_BUCKETS, CLOSE),
    "views of buckets": (plain, {"gradient_as_bucket_view": True, **SMALL_BUCKETS}, CLOSE),
    "static graph": (plain, {"static_graph": True, **SMALL_BUCKETS}, CLOSE),
    "unused parameters": (Branches, {"find_unused_parameters": True, **SMALL_BUCKETS}, CLOSE),
    "frozen parameters": (frozen, SMALL_BUCKETS, CLOSE),
    "buffers": (normalised, {}, CLOSE),
    "float64": (in_(torch.float64), SMALL_BUCKETS, CLOSE),
    "bfloat16": (in_(torch.bfloat16), SMALL_BUCKETS, HALF_CLOSE),
}


@pytest.mark.parametrize("name", DDP)
def test_ddp(gloo: Group, name: str) -> None:
    new, settings, tolerance = DDP[name]
    check_over_gloo(gloo, partial(trained_ddp, new=new, **settings), tolerance)


@pytest.mark.parametrize("settings", [{}, SMALL_BUCKETS], ids=["one bucket", "several buckets"])
def test_ddp_is_as_one_process(gloo: Group, settings: dict[str, Any]) -> None:
    network = trained_ddp(dist.group.WORLD, **settings)
    check_close(values(network), values(trained_alone()))
    buckets = network._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")
    assert (len(buckets) > 1) == bool(settings)


@pytest.mark.parametrize("spare", [False, True])
def test_who_sums_gradients(gloo: Group, spare: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread if it has a core to itself, and else the program, when its backward pass is at the end."""
    monkeypatch.setattr(mpicoll.Communicator, "has_spare_cores", spare)
    group = dist.new_group()
    network = seeded(plain)
    model = DistributedDataParallel(network, process_group=group, **SMALL_BUCKETS)
    by: list[str] = []
    allreduce = group._allreduce

    def noted(*given: Any) -> None:
        by.append(threading.current_thread().name)
        allreduce(*given)

    monkeypatch.setattr(group, "_allreduce", noted)
    train(model)
    assert len(by) > STEPS, "several buckets in a step"
    assert {name == "MainThread" for name in by} == {not spare}
    single = seeded(plain)
    train(single, ranks=EVERYONE)
    check_close(network.parameters(), single.parameters(), CLOSE)


def test_a_hook_of_ones_own_need_not_wait_for_the_end_of_the_pass(
    gloo: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpicoll.Communicator, "has_spare_cores", False)
    done: list[float] = []

    def hook(gradient: torch.Tensor) -> None:
        work = dist.all_reduce(gradient, async_op=True)
        end = time.monotonic() + PROMPT
        while not work.is_completed():
            assert time.monotonic() < end
            time.sleep(0.001)
        done.append(float(gradient))

    x = torch.ones((), requires_grad=True)
    y = x * (RANK + 1)
    y.register_hook(hook)
    (y * 2).backward()
    assert done == [2 * SIZE]


def test_gradients_are_accumulated(gloo: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    allreduce = mpicoll.torch.ProcessGroup.allreduce

    def counted(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        return allreduce(self, *arguments)

    monkeypatch.setattr(mpicoll.torch.ProcessGroup, "allreduce", counted)

    def run(group: Group) -> Network:
        network = DistributedDataParallel(seeded(plain), process_group=group)
        optimizer = optimizer_of(network)
        for step in range(2 * STEPS):
            before = len(calls)
            with nullcontext() if step % 2 else network.no_sync():
                loss(network, step).backward()
            assert len(calls) - before == (step % 2 if group != gloo else 0)
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
        return network

    check_over_gloo(gloo, run)


@pytest.mark.parametrize("name", ["of all ranks", "of those with data", "sharded optimizer"])
def test_uneven_inputs(gloo: Group, name: str) -> None:
    def run(group: Group) -> Network:
        network: Any = DistributedDataParallel(seeded(plain), process_group=group, **SMALL_BUCKETS)
        optimizer, joined = optimizer_of(network), [network]
        if name == "sharded optimizer":
            optimizer = ZeroRedundancyOptimizer(
                network.parameters(), torch.optim.SGD, process_group=group, lr=0.1
            )
            joined.append(optimizer)
        with Join(joined, divide_by_initial_world_size=name == "of all ranks"):
            train(network, optimizer, steps=range(2 + RANK))
        return network

    check_over_gloo(gloo, run)


@several_ranks
def test_uneven_inputs_that_are_not_wanted(gloo: Group) -> None:
    network = DistributedDataParallel(seeded(plain))
    with pytest.raises(RuntimeError, match="exhausted"), network.join(throw_on_early_termination=True):
        train(network, steps=range(1 if RANK == LAST else 3))
    dist.barrier()


# -- communication hooks

TORCHS_HOOKS = {
    "allreduce": (default_hooks.allreduce_hook, CLOSE),
    "bf16": (default_hooks.bf16_compress_hook, HALF_CLOSE),
    "fp16": (default_hooks.fp16_compress_hook, HALF_CLOSE),
}


@pytest.mark.parametrize("name", TORCHS_HOOKS)
def test_hooks_of_torch(gloo: Group, name: str) -> None:
    hook, tolerance = TORCHS_HOOKS[name]

    def run(group: Group) -> Network:
        network = DistributedDataParallel(seeded(plain), process_group=group, **SMALL_BUCKETS)
        # DDP looks at a hook's name, and wants NCCL for the one of bfloat16.
        network.register_comm_hook(group, lambda state, bucket: hook(state, bucket))
        train(network)
        return network

    check_over_gloo(gloo, run, tolerance)


def test_powersgd_of_torch(gloo: Group) -> None:
    """Its callbacks begin collectives and wait for them; so one bucket, for an order that all ranks share."""

    def run(group: Group) -> Network:
        state = powerSGD_hook.PowerSGDState(
            group, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=0.5
        )
        network = DistributedDataParallel(seeded(plain), process_group=group)
        network.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        train(network, steps=range(2 * STEPS))
        return network

    check_over_gloo(gloo, run, 1e-5)


def compressed(name: str, group: Group = None, new: Callable[[], Network] = plain) -> Network:
    state = mpicoll.torch.CompressedGradients(name, group)
    network = DistributedDataParallel(seeded(new), process_group=group, **SMALL_BUCKETS)
    network.register_comm_hook(state, mpicoll.torch.compress)
    return network


@pytest.mark.parametrize("name", ["bf16", "fp16", "int8", "topk:0.5", "randomk:0.5", "powersgd:2"])
def test_compressed_gradients(gloo: Group, name: str) -> None:
    """On the same data in all steps."""
    exact = seeded(plain)
    first = loss(exact, 0, EVERYONE).item()
    steps = [0] * 40
    train(exact, torch.optim.SGD(exact.parameters(), 0.2), EVERYONE, steps)
    network = compressed(name)
    train(network, torch.optim.SGD(network.parameters(), 0.2), steps=steps)
    check_alike(values(network))
    least, reached = loss(exact, 0, EVERYONE).item(), loss(network.module, 0, EVERYONE).item()
    assert reached - least < 0.2 * (first - least), (first, reached, least)
    if name.endswith("16"):
        check_close(values(network.module), values(exact), HALF_CLOSE)


def test_compressed_gradients_of_a_group(gloo: Group) -> None:
    """Of every second rank; and a state serves a second model."""
    pairs = [dist.new_group([rank for rank in EVERYONE if rank % 2 == half]) for half in range(min(SIZE, 2))]
    group = pairs[RANK % 2]
    state = mpicoll.torch.CompressedGradients("bf16", group)
    results = []
    for _ in range(2):
        network = DistributedDataParallel(seeded(plain), process_group=group, **SMALL_BUCKETS)
        network.register_comm_hook(state, mpicoll.torch.compress)
        train(network)
        results.append(values(network))
    check_close(results[0], results[1], 0)
    exact = seeded(plain)
    train(exact, ranks=[rank for rank in EVERYONE if rank % 2 == RANK % 2])
    check_close(results[0], values(exact), HALF_CLOSE)
    dist.destroy_process_group(group)


def test_gradients_that_cannot_be_compressed(gloo: Group) -> None:
    with pytest.raises(ValueError, match="bf17"):
        mpicoll.torch.CompressedGradients("bf17")
    with pytest.raises(ValueError, match="compression: expected one such as bf16"):
        mpicoll.torch.CompressedGradients("none")
    with pytest.raises(TypeError, match='group: expected one of the backend "mpicoll"'):
        mpicoll.torch.CompressedGradients("bf16", gloo)
    network = compressed("bf16", new=in_(torch.float64))
    with pytest.raises(TypeError, match=r"gradients: expected float32 on the CPU.*float64"):
        train(network)


# -- sharded models and optimizers


@pytest.mark.parametrize("reshard", [True, False], ids=["resharded", "kept whole"])
def test_fully_shard(gloo: Group, reshard: bool) -> None:
    network: Any = sharded(init_device_mesh("cpu", (SIZE,)), reshard_after_forward=reshard)
    network.set_allocate_memory_from_process_group_for_comm(not reshard)
    train(network, clip=0.5)
    check_close(values(network), values(trained_alone(clip=0.5)))


def sharded(mesh: Any, seed: int = 0, **settings: Any) -> Network:
    network = seeded(plain, seed)
    for layer in network[::2]:
        fully_shard(layer, mesh=mesh, **settings)
    fully_shard(network, mesh=mesh, **settings)
    return network


def test_fully_shard_in_16_bits(gloo: Group) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    network = sharded(init_device_mesh("cpu", (SIZE,)), mp_policy=policy)
    train(network)
    check_close(values(network), values(trained_alone()), 2 * HALF_CLOSE)


@pytest.mark.skipif(SIZE % 2 == 1, reason="needs an even number of ranks")
def test_fully_shard_of_replicas(gloo: Group) -> None:
    mesh = init_device_mesh("cpu", (2, SIZE // 2), mesh_dim_names=("replicas", "shards"))
    network = sharded(mesh)
    train(network)
    check_close(values(network), values(trained_alone()))


def test_fsdp(gloo: Group) -> None:
    """The older one."""

    def run(group: Group) -> Network:
        network = seeded(plain)
        network[0] = FullyShardedDataParallel(network[0], group, device_id=torch.device("cpu"))
        network = FullyShardedDataParallel(network, group, device_id=torch.device("cpu"))
        train(network)
        return network

    def whole(network: Network) -> Tensors:
        with FullyShardedDataParallel.summon_full_params(network):
            return [parameter.detach().clone() for parameter in network.parameters()]

    ours, theirs = (whole(run(group)) for group in (dist.group.WORLD, gloo))
    check_close(ours, theirs)
    check_close(ours, values(trained_alone()))


def test_sharded_optimizer(gloo: Group) -> None:
    networks, optimizers = [], []
    for shards in (True, False):
        network = DistributedDataParallel(seeded(plain))
        optimizer: Any = (
            ZeroRedundancyOptimizer(network.parameters(), torch.optim.Adam, lr=0.01)
            if shards
            else torch.optim.Adam(network.parameters(), lr=0.01)
        )
        train(network, optimizer)
        networks.append(network)
        optimizers.append(optimizer)
    check_close(values(networks[0]), values(networks[1]))
    optimizers[0].consolidate_state_dict(to=LAST)
    if RANK == LAST:
        ours, theirs = (optimizer.state_dict()["state"] for optimizer in optimizers)
        for number, state in theirs.items():
            check_close(ours[number].values(), state.values())


def test_optimizer_state_from_one_rank(gloo: Group) -> None:
    """To a sharded model, from a rank that has trained a whole one alone."""
    options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    source = seeded(plain)
    momentum = optimizer_of(source)
    train(source, momentum, EVERYONE)
    given: list[dict[str, Any]] = [{}, {}]
    if RANK == 0:
        given = list(states.get_state_dict(source, momentum))

    network = sharded(init_device_mesh("cpu", (SIZE,)), seed=1 + RANK)
    optimizer = optimizer_of(network)
    states.set_model_state_dict(network, given[0], options=options)
    states.set_optimizer_state_dict(network, optimizer, given[1], options=options)
    more = range(STEPS, 2 * STEPS)
    train(network, optimizer, steps=more)
    train(source, momentum, EVERYONE, more)
    check_close(values(network), values(source))


# -- meshes and distributed tensors

SHAPE = (2, SIZE // 2) if SIZE % 2 == 0 else (1, SIZE)


@pytest.mark.parametrize("shape", sorted({(SIZE,), SHAPE, SHAPE[::-1]}))
def test_meshes(gloo: Group, shape: tuple[int, ...]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("rows", "columns")[: len(shape)])
    ranks = torch.arange(SIZE).reshape(shape)
    place = [int(index) for index in (ranks == RANK).nonzero()[0]]
    assert list(mesh.get_coordinate()) == place
    for axis in range(len(shape)):
        others = ranks.movedim(axis, -1)[tuple(place[:axis] + place[axis + 1 :])].tolist()
        group = mesh.get_group(axis)
        assert dist.get_process_group_ranks(group) == others
        assert isinstance(group, mpicoll.torch.ProcessGroup)
        total = torch.tensor([1.0 + rank for rank in others]).sum()
        mine = torch.tensor(1.0 + RANK)
        assert functional.all_reduce(mine, "sum", (mesh, axis)) == total
        dist.all_reduce(mine, group=group)
        assert mine == total
        parts = functional.all_gather_tensor(torch.tensor([RANK]), 0, (mesh, axis))
        assert parts.tolist() == others


def test_distributed_tensors(gloo: Group) -> None:
    mesh = init_device_mesh("cpu", (SIZE,))
    whole = torch.arange(7.0 * (SIZE + 1)).reshape(7, SIZE + 1)  # parts of different sizes, empty ones too
    given = distribute_tensor(whole if RANK == 0 else whole * 0, mesh, [Shard(0)])
    assert given.to_local().shape[0] == len(torch.arange(7).chunk(SIZE)[RANK : RANK + 1][0])
    for placement in (Replicate(), Shard(1), Shard(0), Replicate()):
        given = given.redistribute(mesh, [placement])
        assert torch.equal(given.full_tensor(), whole)
    own = DTensor.from_local(whole * (RANK + 1), mesh, [Partial()], run_check=False)
    for placement in (Replicate(), Shard(0), Shard(1)):
        total = own.redistribute(mesh, [placement])
        assert torch.equal(total.full_tensor(), whole * sum(range(1, SIZE + 1)))
    across = distribute_tensor(whole.t().contiguous(), mesh, [Shard(0)])
    product = given.redistribute(mesh, [Shard(1)]) @ across
    torch.testing.assert_close(product.full_tensor(), whole @ whole.t())


def test_tensor_parallelism(gloo: Group) -> None:
    mesh = init_device_mesh("cpu", (SIZE,))
    split, whole = seeded(plain), seeded(plain)
    parallelize_module(split, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert split[0].weight.to_local().shape == (HIDDEN // SIZE, INPUTS)
    for network in (split, whole):
        train(network, ranks=[0])
    check_close(values(split), values(whole))


@several_ranks
def test_groups_are_split(gloo: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """As meshes do it where a GPU belongs to the default group; torch refuses to where there is none."""
    world = dist.distributed_c10d._get_default_group()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu", 0))
    monkeypatch.setattr(world, "bound_device_id", torch.device("cpu", 0))
    splits = world.comm_split_count()
    mesh = init_device_mesh("cpu", (SIZE, 1))
    assert world.comm_split_count() == splits + 1
    group = mesh.get_group(1)
    assert dist.get_process_group_ranks(group) == [RANK]
    mine = torch.tensor([1.0 + RANK])
    dist.all_reduce(mine, group=group)
    assert mine == 1 + RANK
    dist.destroy_process_group(group)


# -- checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One of all ranks."""
    return Path(MPI.COMM_WORLD.bcast(str(tmp_path), 0))


@pytest.mark.parametrize("kind", ["ddp", "fully_shard"])
def test_checkpoints(gloo: Group, folder: Path, kind: str) -> None:
    def made(seed: int) -> tuple[Network, Any]:
        if kind == "ddp":
            network = DistributedDataParallel(seeded(plain, seed))
        else:
            network = sharded(init_device_mesh("cpu", (SIZE,)), seed)
        return network, torch.optim.Adam(network.parameters(), lr=0.01)

    def content(network: Network, optimizer: Any) -> dict[str, Any]:
        parameters, state = states.get_state_dict(network, optimizer)
        return {"network": parameters, "optimizer": state}

    saved, loaded = made(0), made(1)
    train(*saved)
    checkpoint.save(content(*saved), checkpoint_id=folder)
    found = content(*loaded)
    checkpoint.load(found, checkpoint_id=folder)
    states.set_state_dict(*loaded, model_state_dict=found["network"], optim_state_dict=found["optimizer"])
    check_close(values(loaded[0]), values(saved[0]), 0)
    for network, optimizer in (saved, loaded):
        train(network, optimizer, steps=range(STEPS, 2 * STEPS))
    check_close(values(loaded[0]), values(saved[0]), 0)


# -- pipelines


def test_pipeline(gloo: Group) -> None:
    """Each rank has a layer."""
    whole = seeded(lambda: nn.Sequential(*[nn.Linear(INPUTS, INPUTS) for _ in EVERYONE]))
    layer = seeded(lambda: nn.Linear(INPUTS, INPUTS))
    layer.load_state_dict(whole[RANK].state_dict())
    stage = PipelineStage(layer, RANK, SIZE, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 3, loss_fn=nn.functional.mse_loss)
    optimizers = [optimizer_of(layer), optimizer_of(whole)]
    for step in range(STEPS):
        inputs = batch(step, [0])[0]
        targets = inputs.roll(1, 1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        schedule.step(*[inputs] * (RANK == 0), target=targets if RANK == LAST else None)
        nn.functional.mse_loss(whole(inputs), targets).backward()
        for optimizer in optimizers:
            optimizer.step()
    check_close(layer.parameters(), whole[RANK].parameters())


# -- what goes wrong


class Failing(nn.Module):
    """Its backward pass fails on the last rank in the third step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.steps = nn.Linear(INPUTS, 3), nn.Linear(3, OUTPUTS), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        between = self.first(x)
        if RANK == LAST and self.steps == 3:
            between.register_hook(fail)
        return self.second(between)


def fail(gradient: torch.Tensor) -> None:
    raise ArithmeticError("no such gradient")


@several_ranks
@pytest.mark.parametrize("compression", [None, "int8"])
def test_a_backward_pass_fails(gloo: Group, compression: str | None) -> None:
    """The other ranks learn of it when the rank gives up."""
    group = dist.new_group()
    network = DistributedDataParallel(seeded(Failing), process_group=group, **SMALL_BUCKETS)
    if compression is not None:
        state = mpicoll.torch.CompressedGradients(compression, group)
        network.register_comm_hook(state, mpicoll.torch.compress)
    began = time.monotonic()
    if RANK == LAST:
        with pytest.raises(ArithmeticError, match="no such gradient"):
            train(network)
        group.abort()
    else:
        # DDP waits for futures in C++, which makes every error a RuntimeError.
        with pytest.raises(RuntimeError, match=f"RankFailedError: rank {LAST} has broken off"):
            train(network)
        with pytest.raises(RankFailedError):
            dist.barrier(group)
    assert time.monotonic() - began < PROMPT
    dist.destroy_process_group(group)


@several_ranks
def test_models_with_different_numbers_of_layers(gloo: Group) -> None:
    layers = [nn.Linear(4, 4) for _ in range(3 if RANK == LAST else 2)]
    with pytest.raises(RuntimeError, match="DDP expects same model across all ranks"):
        DistributedDataParallel(nn.Sequential(*layers))


@several_ranks
def test_models_with_different_shapes(gloo: Group) -> None:
    """Torch says so on the rank that differs from rank 0; the others learn of it when that one gives up."""
    group = dist.new_group()
    network = nn.Linear(INPUTS, OUTPUTS + 1) if RANK == LAST else nn.Linear(INPUTS, OUTPUTS)
    if RANK == LAST:
        with pytest.raises(RuntimeError, match="appears not to match sizes of the same param in process 0"):
            DistributedDataParallel(network, process_group=group)
        group.abort()
    else:
        with pytest.raises(RuntimeError, match=f"rank {LAST} has broken off"):
            train(DistributedDataParallel(network, process_group=group))
    dist.destroy_process_group(group)


@several_ranks
def test_steps_that_differ(gloo: Group) -> None:
    """A rank takes a step less, and then adds up something else."""
    group = dist.new_group()
    network = DistributedDataParallel(seeded(plain), process_group=group)
    train(network)
    other = partial(dist.all_reduce, torch.zeros(3), group=group)
    here = f"{Path(__file__).name}:[0-9]+ in test_steps_that_differ"
    with pytest.raises(RuntimeError, match=rf"float32\[3\], SUM\) at {here}") as caught:
        other() if RANK == LAST else train(network)
    assert RANK != LAST or caught.type is MismatchError
    dist.destroy_process_group(group)
