"""DDP's gradients in fewer bytes: a communication hook with the compressions of `mpicoll.compression`.

state = mpicoll.torch.CompressedGradients("topk:0.01")
model.register_comm_hook(state, mpicoll.torch.compress)
"""

# No annotations from the future: DDP compares those of a hook with these types, so they may not be strings.

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.futures import Future

from mpicoll.compression import Bundle, Codec, Compression, Exchange, parse
from mpicoll.torch.group import ProcessGroup
from mpicoll.torch.tensors import owned
from mpicoll.torch.work import Work


class CompressedGradients:
    """The state of the hook `compress`: one compression of each of DDP's buckets, with its residual.

    ``compression``: one of `mpicoll.compression`, or its name, such as "bf16", "int8", "topk:0.01" or
    "powersgd:4". ``group``: the one that DDP uses (default: the default group).
    """

    def __init__(self, compression: str | Compression, group: ProcessGroup | None = None) -> None:
        found = parse(compression) if isinstance(compression, str) else compression
        if found is None:
            raise ValueError(f"compression: expected one such as bf16 or topk:0.01, got {compression!r}")
        self.compression = found
        self.group: Any = group if group is not None else dist.distributed_c10d._get_default_group()
        if not isinstance(self.group, ProcessGroup):
            raise TypeError('group: expected one of the backend "mpicoll"')
        self._codecs: dict[int, tuple[Any, Codec]] = {}

    def codec(self, bucket: dist.GradBucket) -> Codec:
        """The bucket's; a new one, without residual, when DDP has filled its buckets otherwise."""
        buffer = bucket.buffer()
        shapes = tuple(tuple(gradient.shape) for gradient in bucket.gradients())
        key = (buffer.data_ptr(), shapes)
        known = self._codecs.get(bucket.index())
        if known is None or known[0] != key:
            known = self._codecs[bucket.index()] = (key, self._bind(buffer, shapes))
        return known[1]

    def _bind(self, buffer: torch.Tensor, shapes: tuple[tuple[int, ...], ...]) -> Codec:
        if buffer.is_cuda or buffer.dtype != torch.float32:
            raise TypeError(
                f"gradients: expected float32 on the CPU, which is what is compressed, got {buffer.dtype} on "
                f"{buffer.device}"
            )
        counts = [int(np.prod(shape)) for shape in shapes]
        begins = np.cumsum([0, *counts[:-1]]).tolist()
        rank, nranks = self.group.rank(), self.group.size()
        return self.compression.bind(
            Bundle(owned(buffer), shapes, begins, rank, nranks, 1 / nranks, np.zeros)
        )


def compress(state: CompressedGradients, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """DDP's communication hook: the bucket's mean over all ranks, about."""
    buffer, codec = bucket.buffer(), state.codec(bucket)
    work: Work = state.group.run(lambda: _run(codec, state.group.comm), [buffer])
    return work.get_future().then(lambda future: future.value()[0])


def _run(codec: Codec, comm: Any) -> None:
    for stage in codec.stages:
        if not isinstance(stage, Exchange):
            stage()
        elif stage.collective == "Allreduce":
            comm.Allreduce(MPI.IN_PLACE, stage.recv)
        else:
            getattr(comm, stage.collective)(stage.send, stage.recv)
