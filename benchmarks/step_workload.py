"""The tensors that all arms of a case share: parameters and fresh gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.step_cases import Case


class Workload:
    """Parameters by group, and gradients that are new objects at every step.

    Memory for gradients is filled once. Arms share parameters and gradients, so a
    large model fits beside the moments of six optimizers.
    """

    def __init__(self, case: Case, device: torch.device, mesh: Any = None) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.case = case
        self.groups = [
            [nn.Parameter(_normal(shape, device, generator, mesh)) for shape in group]
            for group in case.groups
        ]
        self.params = [param for group in self.groups for param in group]
        self._grads = [
            _normal(param.shape, device, generator, mesh) for param in self.params
        ]

    def refresh(self) -> None:
        """Give every parameter a gradient that no step has seen, as training does."""
        for param, grad in zip(self.params, self._grads, strict=True):
            param.grad = grad.detach()


def _normal(
    shape: Any, device: torch.device, generator: torch.Generator, mesh: Any
) -> Tensor:
    tensor = torch.randn(tuple(shape), device=device, generator=generator)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)


def local(tensor: Tensor) -> Tensor:
    """Return the shard that this process holds, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@contextmanager
def one_process_mesh(device: torch.device) -> Iterator[Any]:
    """Make a mesh of this process alone; nothing leaves it."""
    from torch.distributed.device_mesh import init_device_mesh

    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,))
    finally:
        dist.destroy_process_group()
