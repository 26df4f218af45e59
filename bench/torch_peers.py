"""PyTorch's functions for the tasks of ``mpicoll bench kernels``, in one thread, on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch._utils

from .devices import Action
from .kernel_tasks import LEARNING_RATE, MOMENTUM, SCALE, Data

_flatten_dense_tensors: Callable[..., Any] = torch._utils._flatten_dense_tensors
_unflatten_dense_tensors: Callable[..., Any] = torch._utils._unflatten_dense_tensors

Peers = dict[str, dict[str, Action]]  # by kernel, and by name


def torch_peers(data: Data) -> Peers:
    """What PyTorch has, for the kernels that it has something for."""
    torch.set_num_threads(1)
    tensors = [torch.as_tensor(tensor) for tensor in data.tensors]
    targets = [torch.as_tensor(target) for target in data.targets]
    bucket = torch.as_tensor(data.bucket)
    slots = _unflatten_dense_tensors(bucket, tensors)
    first, second = (_half(half, "bfloat16") for half in data.halves)

    def copy_into_slots() -> Any:
        torch._foreach_copy_(slots, tensors)
        return data.bucket

    def copy_from_slots() -> Any:
        torch._foreach_copy_(targets, _unflatten_dense_tensors(bucket, targets))
        return data.targets

    return {
        "pack": {
            "torch _flatten_dense_tensors": lambda: _flatten_dense_tensors(tensors),
            "torch _foreach_copy_": copy_into_slots,
        },
        "unpack": {"torch _unflatten_dense_tensors, _foreach_copy_": copy_from_slots},
        **_scaled(data, tensors, "bfloat16"),
        **_scaled(data, tensors, "float16"),
        **_sgd(data, targets, slots),
        **_add(data.bucket, bucket, torch.as_tensor(data.second), "float32"),
        **_add(data.halves[0], first, second, "bfloat16"),
    }


def _half(array: Any, dtype: str) -> torch.Tensor:
    """PyTorch does not know ml_dtypes' bfloat16."""
    return torch.as_tensor(array.view(np.int16)).view(getattr(torch, dtype))


def _scaled(data: Data, tensors: list[torch.Tensor], dtype: str) -> Peers:
    half = _half(data.halves[0], dtype)

    def flatten() -> Any:
        half.copy_(_flatten_dense_tensors(tensors).mul_(SCALE))
        return data.halves[0].view(dtype)

    return {f"pack, scale, to {dtype}": {"torch _flatten_dense_tensors, mul_, copy_": flatten}}


def _sgd(data: Data, targets: list[torch.Tensor], gradients: tuple[torch.Tensor, ...]) -> Peers:
    """Its fused optimizer, whose gradients are views of the bucket: that needs no unpacking."""
    parameters = [torch.nn.Parameter(target) for target in targets]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)
    for parameter, gradient, velocity in zip(parameters, gradients, data.velocities, strict=True):
        parameter.grad = gradient
        optimizer.state[parameter]["momentum_buffer"] = torch.as_tensor(velocity)

    def step() -> Any:
        optimizer.step()
        return data.targets

    return {"unpack, update by SGD": {"torch SGD(fused=True)": step}}


def _add(out: Any, dst: torch.Tensor, src: torch.Tensor, dtype: str) -> Peers:
    def add() -> Any:
        dst.add_(src)
        return out

    return {f"reduce, {dtype} SUM": {"torch add_": add}}
