"""The same parameters on all ranks, for programs with a training loop of their own."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from mpi4py import MPI

from mpicoll.communicator import Communicator
from mpicoll.torch.tensors import checked, raw, written_parts

MESSAGE = 1 << 25  # bytes that travel together; a larger tensor travels alone


def sync_parameters(
    model: torch.nn.Module | Iterable[torch.Tensor], comm: MPI.Intracomm | None = None, root: int = 0
) -> None:
    """Give all ranks of ``comm`` (default: the job's) rank ``root``'s parameters and buffers; collective.

    ``model``: a module, or tensors, alike on all ranks. Gradients are `mpicoll.GradientSync`'s work. Raises
    what ``comm.Bcast`` raises.
    """
    tensors = list(_tensors(model))
    checked(tensors, "model")
    if isinstance(comm, Communicator):
        _broadcast(tensors, comm, root)
        return
    with Communicator(comm or MPI.COMM_WORLD) as own:
        _broadcast(tensors, own, root)


def _tensors(model: Any) -> Iterable[torch.Tensor]:
    return chain(model.parameters(), model.buffers()) if isinstance(model, torch.nn.Module) else model


def _broadcast(tensors: Iterable[torch.Tensor], comm: Communicator, root: int) -> None:
    for bundle in _bundles(tensors):
        with torch.no_grad(), written_parts(bundle) as whole:
            if comm.rank == root:
                torch.cat([tensor.detach().reshape(-1) for tensor in bundle], out=whole)
            comm.Bcast(raw(whole), root)


def _bundles(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Tensors of one dtype and device each, few enough to travel together."""
    closed: list[list[torch.Tensor]] = []
    open_: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        bundle = open_.setdefault((tensor.dtype, tensor.device), [])
        bundle.append(tensor)
        if sum(t.numel() * t.element_size() for t in bundle) >= MESSAGE:
            closed.append(open_.pop((tensor.dtype, tensor.device)))
    return [*closed, *open_.values()]
