"""The hash of a model's parameters, wherever their parts are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mpicoll.train.arrays import on_host
from mpicoll.train.keeping import Tensor, assembled

if TYPE_CHECKING:
    from mpicoll.train.loop import Trainer


def parameters_sha256(trainer: Trainer) -> str:
    """The SHA-256 of all parameters' bytes, tensor by tensor in the order of their names, on every rank.

    The same for every mesh. Raises `RuntimeError`, on all ranks, where ranks that should hold the same
    parameters differ. Collective; where ranks were lost, each rank's own.
    """
    if trainer.strategy.lost:
        return _digest(assembled(trainer, {"": trainer.model.parameters}))
    comm, mesh = trainer.comm, trainer.mesh
    own = hashlib.sha256(on_host(trainer.model.parameters).tobytes()).hexdigest()
    peers = mesh.data.allgather((comm.rank, own))
    differing = [rank for rank, digest in peers if digest != peers[0][1]]
    everywhere = sorted({rank for ranks in comm.allgather(differing) for rank in ranks})
    if everywhere:
        raise RuntimeError(
            f"expected the same parameters on ranks that share batches, those of {everywhere} differ "
            f"from rank {peers[0][0]}'s"
        )
    tensors = assembled(trainer, {"": trainer.model.parameters})
    text: str = comm.bcast(_digest(tensors))
    return text


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
