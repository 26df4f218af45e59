"""``mpicoll.bench.gpu_collectives`` on a GPU that is none: all contenders, their rows, wrong results."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

pytest.importorskip("numba_cuda", reason="numba-cuda[cu13] is not installed")

from mpicoll.bench import gpu_contenders, gpu_timing
from mpicoll.bench.gpu_collectives import COLLECTIVES, run
from mpicoll.bench.gpu_facts import sharing
from mpicoll.bench.gpu_limits import PATTERN, measure_limits
from mpicoll.bench.jobs import USAGE_ERROR, WRONG

import mpicoll
from mpicoll.gpu import calls, driver, probe, staging
from tests import fake_cuda
from tests.fake_cuda import FakeLibrary

COMM = mpicoll.Communicator(MPI.COMM_WORLD)
LIMITS = ["--copied", "4K"]
MEMORY = 1 << 26  # bytes of the GPU


class Piece:
    """A part of the memory of a GPU that is none, as `mpicoll.bench.gpu_arrays` wants arrays."""

    def __init__(self, address: int, dtype: Any, shape: tuple[int, ...], owner: Any) -> None:
        self.address, self.dtype, self.shape, self.owner = address, np.dtype(dtype), shape, owner
        self.size = int(np.prod(shape))
        self.nbytes = self.size * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        typestr = self.dtype.str if self.dtype.kind in "biuf" else f"<V{self.dtype.itemsize}"
        data = (self.address, False)
        return {"shape": self.shape, "typestr": typestr, "data": data, "version": 3, "stream": 1}

    def __getitem__(self, part: slice) -> Piece:
        begin, end, _ = part.indices(self.size)
        address = self.address + begin * self.dtype.itemsize
        return Piece(address, self.dtype, (max(end - begin, 0),), self.owner)

    def view(self, dtype: Any) -> Piece:
        size = self.nbytes // np.dtype(dtype).itemsize
        return Piece(self.address, dtype, (size,), self.owner)

    def reshape(self, *shape: int) -> Piece:
        return Piece(self.address, self.dtype, shape, self.owner)

    def host(self) -> Any:
        return fake_cuda._array(self.address, self.dtype, self.size).reshape(self.shape)


class FakeArrays:
    """Arrays that are on a `FakeLibrary`, and written on its stream, sometime."""

    device, stream, note = 0, 1, "this is no GPU"

    def empty(self, nbytes: int) -> Piece:
        return Piece(driver.driver().allocate(nbytes, 0), np.uint8, (nbytes,), self)

    def write(self, array: Piece, values: Any) -> None:
        self.put(lambda: np.copyto(array.host(), values.reshape(array.shape)))

    def read(self, array: Piece) -> Any:
        self.synchronise()
        return array.host().copy()

    def fill(self, array: Piece, byte: int) -> None:
        self.put(lambda: array.view(np.uint8).host().fill(byte))

    def copy(self, target: Piece, source: Piece) -> None:
        self.put(lambda: np.copyto(target.view(np.uint8).host(), source.view(np.uint8).host()))

    def count_different(self, found: Piece, wanted: Piece) -> int:
        a, b = (self.read(array).view(f"u{array.dtype.itemsize}") for array in (found, wanted))
        return int(np.count_nonzero(a != b))

    def put(self, thing: Any) -> None:
        fake_cuda.in_use().stream(1).put(thing)

    def synchronise(self) -> None:
        fake_cuda.in_use().stream(1).synchronise()

    def room(self) -> int:
        return fake_cuda.in_use()._free_memory()


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    monkeypatch.setattr(gpu_timing, "TURN", 0.001)
    monkeypatch.setattr(fake_cuda, "LONGEST_PAUSE", 0.0002)
    monkeypatch.setattr(probe, "is_cuda_aware", lambda comm: (True, "its GPU memory is the host's"))
    pool = staging._Pool()  # what is pinned is pinned for one library
    for module in (staging, calls):
        monkeypatch.setattr(module, "pool", pool)
    library = fake_cuda.use(monkeypatch, FakeLibrary(memory=MEMORY))
    yield library
    library.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "report.json"


def bench(file: Path, *arguments: str, status: int = 0) -> Any:
    """The report, on every rank; ``file`` matters on rank 0."""
    line = [*arguments, *LIMITS, "--json", str(file)]
    assert run(COMM, line, make_arrays=lambda comm: FakeArrays()) == status
    return COMM.bcast(json.loads(file.read_text()) if COMM.rank == 0 else None)


# -- what is measured


def test_every_transport_has_a_row_for_each_size(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(file, "-b", "64", "-e", "4K", "-f", "64", "--turns", "2")
    assert report["command"].startswith(f"mpirun -np {COMM.size} python -m mpicoll.bench.gpu_collectives -b")
    assert (report["ranks"], report["ranks_per_gpu"]) == (COMM.size, COMM.size)
    assert report["gpus"] == [{"name": "Fake GPU", "pci": "0000:00:00.0", "memory": MEMORY, "driver": None}]
    assert set(report["limits"]) == {"copy", "pinned"}
    names = [kind + form for kind in gpu_contenders.OURS for form in ("", " persistent")]
    for collective in ("allreduce", "reduce_scatter", "broadcast", "allgather"):
        rows = [row for row in report["results"] if row["collective"] == collective]
        assert sorted({row["by"] for row in rows} & {*names}) == names
        for name in names:
            sizes = [row["size"] for row in rows if row["by"] == name]
            assert len(sizes) == len(set(sizes)) == 2
    for row in report["results"]:
        check_row(row, report["limits"])
    said = capsys.readouterr().out
    if COMM.rank == 0:
        lines = file.read_text().splitlines()
        assert all(json.loads(line.strip(" ,")) for line in lines if '"by"' in line), "a row is a line"
        count = len(report["results"])
        assert f"# right: {count} of {count}" in said
        assert said.count("(share of the limit)") == 4
    else:
        assert said == ""


def check_row(row: Any, limits: Any) -> None:
    assert (row["nwrong"], row["outside"], row["in_place"]) == (0, 0, False)
    bandwidth = row["size"] / row["time"] / 1e3
    assert row["alg_bw"] == pytest.approx(bandwidth)
    part = row["count"] * 4 if row["collective"] != "allreduce" else row["size"]
    moved = {
        "allreduce": 2 * COMM.size * row["size"],
        "reduce_scatter": COMM.size * (row["size"] + part),
        "broadcast": COMM.size * row["size"],
        "allgather": COMM.size * (row["size"] + part),
    }[row["collective"]]
    limit = limits["pinned" if row["by"].startswith(("staged", "copied")) else "copy"]
    assert row["of_limit"] == pytest.approx(moved / row["time"] / 1e3 / limit)


@pytest.mark.parametrize("kind", gpu_contenders.OURS)
def test_without_turns_all_is_checked_in_place_too(file: Path, kind: str) -> None:
    given = ["--collectives", "all", "-d", "half,int32", "-o", "sum,max", "--transports", kind]
    report = bench(file, *given, "-b", "40", "-e", "40", "--turns", "0")
    rows = report["results"]
    assert {row["collective"] for row in rows} == set(COLLECTIVES)
    assert {row["in_place"] for row in rows} == {True, False}
    assert not [row for row in rows if row["nwrong"] or row["outside"] or "time" in row]
    assert {row["by"] for row in rows} == {kind, f"{kind} persistent"}


def test_wrong_elements_are_counted_and_named(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One element too many, and so the first is wrong, and the guard behind the last is written, too."""
    from mpicoll.kernels import reduce_cuda

    def one_off(
        op: str, dtype: Any, targets: Any, sources: Any, count: int, factor: float, stream: int
    ) -> None:
        fake_cuda.fold(op, dtype, targets, sources, count + 1, factor, stream)
        first = fake_cuda._array(targets[0], dtype, 1)
        fake_cuda.in_use().stream(stream).put(lambda: np.copyto(first, -5))

    monkeypatch.setattr(reduce_cuda, "fold", one_off, raising=False)
    given = ["--collectives", "allreduce", "--transports", "ipc", "-b", "1K", "-e", "1K", "--turns", "0"]
    rows = bench(file, *given, status=WRONG)["results"]
    assert rows
    for row in rows:
        assert (row["nwrong"], row["outside"]) == (COMM.size, COMM.size), row
    said = capsys.readouterr()
    if COMM.rank == 0:
        assert f"Error: wrong elements: {4 * COMM.size} of ipc, {4 * COMM.size} of ipc persistent" in said.err
        assert f"# right: 0 of {len(rows)}" in said.out


def test_what_is_too_slow_gets_fewer_turns(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    measured = gpu_timing._turn

    def noting(comm: Any, arrays: Any, action: Any, calls: int) -> Any:
        turns.append(calls)
        return measured(comm, arrays, action, calls)

    monkeypatch.setattr(gpu_timing, "_turn", noting)
    monkeypatch.setattr(gpu_timing, "BUDGET", 1e-9)
    given = ["--collectives", "broadcast", "--transports", "staged", "-b", "64", "-e", "64"]
    bench(file, *given, "--turns", "7")
    assert len(turns) == 2 * (1 + 1), "for each of two contenders a trial, and one turn"


# -- others


def test_a_cuda_aware_library_is_beside_ours(file: Path) -> None:
    rows = bench(file, "--compare", "native", "--transports", "", "-e", "64", "--turns", "1")["results"]
    assert {row["by"] for row in rows} == {"native"}
    assert {row["collective"] for row in rows} == {"allreduce", "reduce_scatter", "broadcast", "allgather"}


def test_the_library_on_copies_is_beside_ours(file: Path, gpu: FakeLibrary) -> None:
    report = bench(file, "--compare", "copied", "--transports", "", "-e", "64", "--turns", "1")
    assert {row["by"] for row in report["results"]} == {"copied"}
    given = ["--collectives", "all", "-b", "64", "-e", "64", "--turns", "0"]
    report = bench(file, "--compare", "copied", "--transports", "", *given)
    assert {row["collective"] for row in report["results"]} == set(COLLECTIVES)
    assert {row["in_place"] for row in report["results"]} == {True, False}
    assert gpu.registered == {}


class Clique:
    """A communicator of NCCL's, as CuPy has them; it waits for what is on the stream."""

    def __init__(self, size: int, token: bytes, rank: int) -> None:
        assert (size, token, rank) == (COMM.size, b"token", COMM.rank)
        self.destroyed = False

    def destroy(self) -> None:
        self.destroyed = True

    def allReduce(self, send: int, recv: int, count: int, dtype: int, op: int, stream: int) -> None:
        assert (dtype, op) == (7, 0)
        given, found = self.on_host(stream, (send, count), (recv, count))
        MPI.COMM_WORLD.Allreduce(given, found)

    def reduceScatter(self, send: int, recv: int, count: int, dtype: int, op: int, stream: int) -> None:
        given, found = self.on_host(stream, (send, count * COMM.size), (recv, count))
        MPI.COMM_WORLD.Reduce_scatter_block(given, found)

    def allGather(self, send: int, recv: int, count: int, dtype: int, stream: int) -> None:
        given, found = self.on_host(stream, (send, count), (recv, count * COMM.size))
        MPI.COMM_WORLD.Allgather(given, found)

    def broadcast(self, send: int, recv: int, count: int, dtype: int, root: int, stream: int) -> None:
        (both,) = self.on_host(stream, (recv, count))
        assert send == recv
        MPI.COMM_WORLD.Bcast(both, root)

    def on_host(self, stream: int, *parts: tuple[int, int]) -> list[Any]:
        fake_cuda.in_use().stream(stream).synchronise()
        return [fake_cuda._array(address, np.dtype(np.float32), count) for address, count in parts]


class Nccl(types.ModuleType):
    """`cupy.cuda.nccl`."""

    NCCL_FLOAT32, NCCL_SUM, available, NcclCommunicator = 7, 0, True, Clique

    def __init__(self, version: int = gpu_contenders.SHARING_NCCL) -> None:
        super().__init__("cupy.cuda.nccl")
        self.get_version = lambda: version

    def get_unique_id(self) -> bytes:
        assert os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] == "1" or COMM.size == 1
        return b"token"


def install(monkeypatch: pytest.MonkeyPatch, nccl: Nccl) -> None:
    cuda = types.ModuleType("cupy.cuda")
    cuda.nccl = nccl  # type: ignore[attr-defined]
    for name, module in (("cupy", types.ModuleType("cupy")), ("cupy.cuda", cuda), ("cupy.cuda.nccl", nccl)):
        monkeypatch.setitem(sys.modules, name, module)


def test_nccl_is_beside_ours(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Nccl())
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "0")
    rows = bench(file, "--compare", "nccl", "--transports", "", "-e", "64", "--turns", "1")["results"]
    assert {row["by"] for row in rows} == {"nccl"}
    assert {row["collective"] for row in rows} == {"allreduce", "reduce_scatter", "broadcast", "allgather"}


def test_who_cannot_take_part_is_left_out_with_a_reason(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Nccl(22809))
    monkeypatch.setattr(probe, "is_cuda_aware", lambda comm: (False, "it crashed"))
    monkeypatch.setitem(sys.modules, "torch", None)
    report = bench(
        file, "--compare", "native,nccl,gloo", "--transports", "messages,staged", "-e", "4", "--turns", "1"
    )
    assert {row["by"] for row in report["results"]} == {"staged", "staged persistent"}
    reasons = {text.split(":")[0]: text for text in report["left_out"]}
    assert "messages: gpu_transport: expected one that works here, got messages, but" in reasons["messages"]
    assert reasons["native"] == "native: this MPI library is not CUDA-aware: it crashed"
    if COMM.size > 1:
        assert "nccl: rank 0: NCCL 22809 lets no ranks share a GPU" in reasons["nccl"]
    assert reasons["gloo"] == "gloo: rank 0: PyTorch is not installed: pip install 'mpicoll[torch]'"


def test_ipc_that_is_refused_is_left_out(file: Path, gpu: FakeLibrary) -> None:
    gpu.without.add("cuIpcOpenMemHandle_v2")
    report = bench(file, "--transports", "ipc,staged", "-e", "4", "--turns", "1")
    if COMM.size > 1:
        assert {row["by"] for row in report["results"]} == {"staged", "staged persistent"}
        assert "ipc: gpu_transport: expected one that works here, got ipc, but" in report["left_out"][0]


def test_whether_memory_can_be_shared_is_said(gpu: FakeLibrary) -> None:
    assert sharing(COMM, FakeArrays()) == "works"
    gpu.without.add("cuIpcOpenMemHandle_v2")
    if COMM.size > 1:
        assert "cuIpcOpenMemHandle_v2: CUDA_ERROR_NOT_SUPPORTED" in sharing(COMM, FakeArrays())


def test_an_exception_of_anothers_is_a_reason_on_all_ranks() -> None:
    def fail() -> None:
        if COMM.rank == COMM.size - 1:
            raise ValueError("no\nluck")

    with pytest.raises(gpu_contenders.Unsupported, match=f"^rank {COMM.size - 1}: ValueError: no luck$"):
        gpu_contenders.attempt(COMM, fail)


# -- memory and time


def test_sizes_that_do_not_fit_are_left_out(file: Path, gpu: FakeLibrary) -> None:
    gpu.memory = COMM.size * 6 * (3 << 18)  # room for buffers of 768 KiB, so for those of 512
    report = bench(file, "--collectives", "allreduce", "-b", "256K", "-e", "2M", "-f", "2", "--turns", "0")
    assert {row["size"] for row in report["results"]} == {1 << 18, 1 << 19}
    assert "sizes above 512K: there is no more room on the GPU" in report["left_out"]
    assert run(COMM, ["-b", "8M"], make_arrays=lambda comm: FakeArrays()) == USAGE_ERROR


def test_nothing_begins_after_the_limit(file: Path) -> None:
    report = bench(file, "-e", "4", "--limit", "1e-9")
    assert report["results"] == []
    assert "allreduce float sum 4 and what comes after it: 1e-09 s are over" in report["left_out"]


def test_limits_are_of_copies_of_the_whole_memory(gpu: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are counted, and no memory stays behind."""
    nbytes = 3 * PATTERN + 100
    copies: list[tuple[int, int, int]] = []
    copy = gpu.cuMemcpyAsync

    def noting(target: int, source: int, size: int, stream: int | None) -> int:
        copies.append((target, source, size))
        return copy(target, source, size, stream)

    monkeypatch.setattr(gpu, "cuMemcpyAsync", noting)
    limits = measure_limits(0, MEMORY, nbytes, nbytes)
    assert min(limits) > 0
    whole = [one for one in copies if one[2] == nbytes]
    assert len(whole) == 6 * (3 + 2), "six times three on the GPU, and one each way"
    assert gpu.allocated == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--collectives allsum", "expected all or some of allreduce, reduce_scatter, "),
        ("-d flot", "expected all or some of float, double, half, bfloat16"),
        ("-o avg", "expected all or some of sum, prod, min, max; got 'avg'"),
        ("-b 2K -e 1K", "expected --min up to --max; got 2K and 1K"),
        ("--transports pigeon", "expected all or some of ipc, messages, staged"),
        ("--json /nowhere/report.json", "No such file or directory"),
    ],
)
def test_bad_input_is_said_once_and_ends_every_rank(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(COMM, arguments.split(), make_arrays=lambda comm: FakeArrays()) == USAGE_ERROR
    said = capsys.readouterr()
    assert " ".join(said.err.split()).count(message) == (1 if COMM.rank == 0 else 0)


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert run(COMM, []) == USAGE_ERROR
    if COMM.rank == 0:
        assert "benchmarks of GPUs need CuPy for cuda" in " ".join(capsys.readouterr().err.split())
