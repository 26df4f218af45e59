"""PyTorch on many ranks without torch.distributed: mpicoll averages the gradients, over any MPI.

    mpirun -np 4 python slurm/torch_example.py --steps 200
    sbatch slurm/torch.sbatch

The model learns a function that is drawn from the seed, from samples that differ on every rank. To make a
program of your own out of it, keep the three lines marked with (1), (2) and (3).
"""

from __future__ import annotations

import argparse
import math

import torch
from mpi4py import MPI

import mpicoll
from mpicoll.faults import abort_on_exception

INPUTS, HIDDEN, OUTPUTS = 16, 64, 4
SAMPLES = 32  # of one rank, in one step


@abort_on_exception()
def main() -> None:
    """Train, and check at the end that all ranks have the same parameters."""
    parser = argparse.ArgumentParser(description="Train a PyTorch model on all ranks of the job.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate (default %(default)s)")
    arguments = parser.parse_args()

    comm = mpicoll.Communicator(MPI.COMM_WORLD)  # (1)
    # mpicoll.placement, in torch.sbatch, has seen to it that a rank sees its own GPU alone.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)  # the same on all ranks: they begin with the same parameters,
    target = torch.randn(INPUTS, OUTPUTS) / math.sqrt(INPUTS)
    model = torch.nn.Sequential(
        torch.nn.Linear(INPUTS, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, OUTPUTS)
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr, momentum=0.9)
    samples = torch.Generator().manual_seed(arguments.seed + 1 + comm.rank)  # but see samples of their own

    for step in range(arguments.steps):
        x = torch.randn(SAMPLES, INPUTS, generator=samples)
        optimizer.zero_grad(set_to_none=False)  # gradients stay where mpicoll knows them
        loss = torch.nn.functional.mse_loss(model(x.to(device)), torch.sin(x @ target).to(device))
        loss.backward()
        average([parameter.grad for parameter in model.parameters()], comm)  # (2)
        optimizer.step()
        mean_loss = comm.allreduce(loss.item()) / comm.size  # (3), where a figure of all ranks is wanted
        if comm.rank == 0 and (step % 20 == 0 or step == arguments.steps - 1):
            print(f"step {step} loss {mean_loss:.4f}", flush=True)
    check_equal(model, comm)
    comm.Free()


def average(gradients: list[torch.Tensor | None], comm: mpicoll.Communicator) -> None:
    """The mean of each gradient over all ranks, in place."""
    present = [gradient for gradient in gradients if gradient is not None]
    on_host = [gradient.cpu() for gradient in present]  # on the CPU these are the gradients themselves
    comm.Allreduce_many(on_host, op=mpicoll.AVG)
    for gradient, mean in zip(present, on_host, strict=True):
        if gradient.is_cuda:
            gradient.copy_(mean)


def check_equal(model: torch.nn.Module, comm: mpicoll.Communicator) -> None:
    """Raise RuntimeError on all ranks if parameters differ in a single bit."""
    flat = torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])
    first = flat.clone()
    comm.Bcast(first, root=0)
    different = comm.allgather(int((flat.view(torch.int32) != first.view(torch.int32)).sum()))
    if any(different):
        raise RuntimeError(f"parameters: expected equal ones, got so many unlike rank 0's: {different}")
    if comm.rank == 0:
        norm = math.sqrt(float((flat.double() ** 2).sum()))
        print(f"{comm.size} ranks have equal parameters, {flat.numel()} of norm {norm:.6f}", flush=True)


if __name__ == "__main__":
    main()
