"""MPI for stock PyTorch: ``import mpicoll.torch``, and `torch.distributed` has a backend "mpicoll".

    import mpicoll.torch
    mpicoll.torch.init()                       # or torch.distributed.init_process_group("mpicoll")
    model = DistributedDataParallel(model)     # and whatever else is built on torch.distributed

Started by ``mpirun`` or ``srun``; rank and size are MPI's, and there is no address or port to set.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from mpicoll.torch.group import NAME, ProcessGroup, register
from mpicoll.torch.hooks import CompressedGradients, compress
from mpicoll.torch.parameters import sync_parameters
from mpicoll.torch.rendezvous import meet_over_mpi

__all__ = ["CompressedGradients", "ProcessGroup", "compress", "init", "sync_parameters"]

register()
meet_over_mpi()


def init(timeout: timedelta | None = None) -> None:
    """Make the default process group of all ranks of the job; collective.

    After ``timeout`` without progress (torch's default: half an hour) a collective is a
    `mpicoll.faults.DeadlineError`, which says where every rank is.
    """
    dist.init_process_group(NAME, timeout=timeout)
