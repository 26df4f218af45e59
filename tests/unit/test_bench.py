"""``mpicoll bench`` without MPI: its flags and what it says of bad ones, factors, data, tables, picture."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from mpicoll.bench import kinds, report
from mpicoll.bench.data import Problem
from mpicoll.bench.options import Options, check_here, command
from rich.console import Console

from mpicoll.cli import main


def options(*arguments: str) -> Any:
    return command.main(list(arguments), "mpicoll bench", standalone_mode=False)


def problem(collective: str = "allreduce", **changes: Any) -> Any:
    kind = kinds.KINDS[collective]
    usual = {"rank": 0, "nranks": 4, "count": 100, "type": "float"}
    about = {"redop": "sum" if kind.reduces else "none", "root": 0 if kind.rooted else -1}
    return Problem(**{"collective": collective, **usual, **about, **changes})


def results(sizes: list[int], microseconds: float, in_place: bool = True) -> list[report.Entry]:
    """Rows of a contender that takes so long for a kilobyte, and in place twice as long."""
    rows = []
    for size in sizes:
        seconds = microseconds * size / 1024e6
        timed = [SimpleNamespace(in_place=False, seconds=seconds, wrong=0)]
        timed += [SimpleNamespace(in_place=True, seconds=2 * seconds, wrong=None)] * in_place
        rows.append(report.entry(problem(count=size // 4), timed))
    return rows


def two_contenders() -> dict[str, Any]:
    sizes = [1024, 65536, 131072]
    return {
        "collective": "allreduce",
        "ranks": 4,
        "mpi": "An MPI",
        "contenders": [
            {"name": "auto", "results": results(sizes, 1)},
            {"name": "native", "results": results(sizes, 3)},
            {"name": "gloo", "results": results(sizes[1:], 30)},
        ],
        "memcpy": [{"size": size, "time": size / 4096} for size in sizes],
    }


# --- factors and sizes ---


@pytest.mark.parametrize(
    ("collective", "factor"),
    [
        ("allreduce", 1.5),
        ("reduce_scatter", 0.75),
        ("allgather", 0.75),
        ("alltoall", 0.75),
        ("broadcast", 1),
        ("reduce", 1),
        ("sendrecv", 1),
    ],
)
def test_bus_bandwidth_has_the_factors_of_nccl_tests(collective: str, factor: float) -> None:
    whole = problem(collective)
    timed = SimpleNamespace(in_place=False, seconds=2e-6, wrong=0)
    place = report.entry(whole, [timed])["out_of_place"]
    assert place["time"] == pytest.approx(2)
    assert place["alg_bw"] == pytest.approx(whole.size / 2e-6 / 1e9)
    assert place["bus_bw"] == pytest.approx(place["alg_bw"] * factor)


@pytest.mark.parametrize("collective", kinds.KINDS)
def test_sizes_count_the_blocks_of_all_ranks(collective: str) -> None:
    kind = kinds.KINDS[collective]
    blocks = collective in ("reduce_scatter", "allgather", "alltoall")
    assert kinds.count_of(kind, 1000, 4, 3) == (83 if blocks else 250)
    assert problem(collective, nranks=3).size == (1200 if blocks else 400)
    assert kinds.count_of(kind, 4, 4, 3) == 1  # one element for each rank is the least


def test_steps_multiply_or_add() -> None:
    assert list(options("allreduce", "-e", "64").sizes()) == [8, 16, 32, 64]
    assert list(options("allreduce", "-b", "1K", "-e", "20K", "-f", "3").sizes()) == [1024, 3072, 9216]
    assert list(options("allreduce", "-b", "4", "-e", "13", "-i", "4").sizes()) == [4, 8, 12]


# --- data ---


@pytest.mark.parametrize("nranks", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("redop", kinds.OPERATIONS)
@pytest.mark.parametrize("dtype", kinds.DTYPES)
def test_reductions_are_exact_in_every_dtype(dtype: str, redop: str, nranks: int) -> None:
    """In order, in the dtype itself: no sum is rounded and none overflows."""
    functions: dict[str, Callable[..., Any]] = {
        "sum": np.add,
        "prod": np.multiply,
        "min": np.minimum,
        "max": np.maximum,
        "avg": np.add,
    }
    if redop == "avg" and dtype not in kinds.SIGNIFICANT_BITS:
        return
    parts = [problem(rank=rank, nranks=nranks, type=dtype, redop=redop, count=2500) for rank in range(nranks)]
    total = parts[0].given
    for part in parts[1:]:
        total = functions[redop](total, part.given)
    exact = np.array([part.given.astype(object) for part in parts])
    if redop == "sum":
        assert (exact.sum(axis=0) == total.astype(object)).all()
    average = (total.astype(np.float64) / nranks).astype(total.dtype)
    assert parts[0].count_wrong(average if redop == "avg" else total) == 0
    assert parts[0].dtype == total.dtype


@pytest.mark.parametrize("dtype", kinds.DTYPES)
def test_data_differ_for_each_rank_and_index(dtype: str) -> None:
    inputs = [problem(rank=rank, type=dtype).given for rank in range(4)]
    assert all((inputs[0] != other).any() for other in inputs[1:])
    assert all((values[1:] != values[:-1]).all() for values in inputs)


@pytest.mark.parametrize("collective", kinds.KINDS)
def test_a_single_wrong_element_is_counted(collective: str) -> None:
    one = problem(collective)
    got = one.expected.copy()
    assert one.count_wrong(got) == 0
    got[17] += 1
    assert one.count_wrong(got) == 1
    assert problem("allreduce", redop="avg").count_wrong(np.full(100, np.nan)) == 100


# --- flags ---


def test_defaults() -> None:
    chosen = options("broadcast")
    assert isinstance(chosen, Options)
    assert (chosen.minbytes, chosen.maxbytes, chosen.stepfactor, chosen.stepbytes) == (8, 64 << 20, 2, None)
    assert (chosen.iters, chosen.check, chosen.turns, chosen.root) == (None, True, 5, 0)
    assert (chosen.algorithms, chosen.compare) == (("auto",), ())
    assert chosen.combinations() == [("float", "none")]


def test_all_types_and_operations_but_averages_of_integers() -> None:
    pairs = options("reduce", "-d", "all", "-o", "all").combinations()
    assert len(pairs) == 10 * 5 - 6
    assert ("half", "avg") in pairs
    assert ("int8", "avg") not in pairs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("allsum", "'allsum' is not one of 'allreduce', 'reduce_scatter', 'broadcast'"),
        ("", "Missing argument 'COLLECTIVE'"),
        ("allreduce -d flot", "'flot' is not one of 'float', 'double', 'half', 'bfloat16'"),
        ("allreduce -o xor", "'xor' is not one of 'sum', 'prod', 'min', 'max', 'avg', 'all'"),
        ("allreduce --algorithm ring,rings", "expected one of auto, ring, recursive_doubling, "),
        ("allreduce --algorithm ring,rings", "for allreduce, or several with commas; got 'rings'"),
        ("sendrecv --algorithm ring", "expected one of auto for sendrecv"),
        ("sendrecv --persistent", "--alloc and --persistent are for our collectives; sendrecv is MPI's own"),
        ("allreduce -b 2K -e 1K", "expected -b/--minbytes up to -e/--maxbytes; got 2K and 1K"),
        ("allreduce -b 6", "-b/--minbytes: expected a multiple of 4, the bytes of an element; got 6"),
        ("allreduce -i 6 -d double", "-i/--stepbytes: expected a multiple of 8"),
        ("allreduce -b large", "expected a number with K, M, G or T behind it, such as 64K, got 'large'"),
        ("allreduce -b 0", "expected at least 1 byte, got '0'"),
        ("allreduce -f 1", "1 is not in the range x>=2"),
        ("allreduce -f 2 -i 8", "expected -f/--stepfactor or -i/--stepbytes; got both"),
        ("allreduce -r 0", "-r/--root is for broadcast and reduce; allreduce has no root"),
        ("broadcast -o sum", "-o/--op is for reductions; broadcast is none"),
        ("allreduce -o avg -d int8", "avg is for floating data types; int8 is none"),
        ("allreduce -c 2", "2 is not in the range 0<=x<=1"),
        ("allreduce --compare mvapich", "'mvapich' is not one of 'native', 'gloo'"),
    ],
)
def test_bad_flags_are_named_with_what_is_allowed(arguments: str, message: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        options(*arguments.split())
    assert message in caught.value.format_message()


def test_what_is_not_there_is_found_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*arguments: str, rank: int = 0) -> str:
        try:
            check_here(options("reduce", *arguments), rank, nranks=2)
        except click.UsageError as error:
            return error.format_message()
        return ""

    assert "-r/--root: expected a rank from 0 to 1, got 2" in said("-r", "2", rank=1)
    assert "-r/--root: expected a rank from 0 to 1, got -1" in said("-r", "-1")
    nowhere = str(tmp_path / "nowhere" / "a.json")
    assert f"--json: expected a file that can be written, but {nowhere}: No such file" in said(
        "--json", nowhere
    )
    assert said("--json", nowhere, rank=1) == ""  # rank 0 writes
    assert "Is a directory" in said("--json", str(tmp_path))
    assert "expected a name in .png" in said("--plot", "picture.pdf")
    for module, flags, install in (
        ("matplotlib", ("--plot", "a.png"), "pip install 'mpicoll[plots]'"),
        ("torch", ("--compare", "gloo"), "pip install 'mpicoll[torch]'"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        assert install in said(*flags)
    assert said("--json", str(tmp_path / "good.json")) == ""
    assert list(tmp_path.iterdir()) == []


def test_it_is_a_subcommand_of_mpicoll() -> None:
    assert "bench " in CliRunner().invoke(main, ["--help"]).stdout
    line = [sys.executable, "-m", "mpicoll", "bench"]
    text = subprocess.run([*line, "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "mpirun -np 2 mpicoll bench allreduce -e 1M" in text
    wrong = subprocess.run([*line, "reduce", "-r", "1"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert wrong.stderr.count("expected a rank from 0 to 0, got 1") == 1


# --- tables ---


def test_the_table_has_the_columns_of_nccl_tests() -> None:
    lines = report.nccl_table("title", results([1024, 1 << 20], 1), outside=0).splitlines()
    assert lines[0] == "# title"
    assert lines[1].split() == ["#", "out-of-place", "in-place"]
    columns = ["time", "algbw", "busbw", "#wrong"]
    assert lines[2].split() == ["#", "size", "count", "type", "redop", "root", *columns, *columns]
    assert lines[4].split() == "1024 256 float sum -1 1.00 1.02 1.54 0 2.00 0.51 0.77 N/A".split()
    assert lines[5].split()[5:9] == ["1024.0", "1.02", "1.54", "0"]
    assert lines[-2] == "# Out of bounds values : 0 OK"
    assert lines[-1] == "# Avg bus bandwidth    : 1.152"
    assert len({len(line) for line in lines[2:3] + lines[4:6]}) == 1, "columns are aligned"


def test_the_table_shows_what_was_not_measured_or_went_wrong() -> None:
    lines = report.nccl_table("title", results([1024], 1, in_place=False), outside=3).splitlines()
    assert lines[4].split()[9:] == ["N/A"] * 4
    assert lines[-2] == "# Out of bounds values : 3 FAILED"
    assert "# Out of bounds values : N/A" in report.nccl_table("title", results([1024], 1), outside=None)


def test_the_comparison_has_times_limits_and_ratios_to_native() -> None:
    output = StringIO()
    Console(file=output, width=200).print(report.comparison(two_contenders()))
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert lines[1] == "size type redop memcpy µs auto µs (×) native µs gloo µs (×)".split()
    assert lines[2] == "1K float sum 0.25 1.00 (3.00) 3.00 -".split()
    assert lines[3] == "64K float sum 16.00 64.00 (3.00) 192.0 1920.0 (0.10)".split()
    assert lines[5] == ["mean", "≥", "64K", "3.00", "0.10"]


def test_the_comparison_without_native_has_no_ratios() -> None:
    output = StringIO()
    both = two_contenders()
    del both["contenders"][1]
    Console(file=output, width=200).print(report.comparison(both))
    assert "(" not in output.getvalue()


def test_the_picture_has_a_line_for_each_and_one_for_memcpy(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "picture.png"
    report.plot(two_contenders(), file)
    assert file.read_bytes().startswith(b"\x89PNG")
