"""The tensors that all arms of a case share: parameters and fresh gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.step.cases import Case


class Workload:
    """Parameters by group, and gradients that change at every step.

    Memory for gradients is filled once. Several sets of tensors view it and take
    turns, so a step never meets the objects of the one before, and changing them
    is as cheap, and as kind to the caches, for sharded tensors as for plain ones.
    Arms share parameters and gradients, so a large model fits beside the moments
    of six optimizers.
    """

    def __init__(self, case: Case, device: torch.device, mesh: Any = None) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: Sequence[int]) -> Tensor:
            own = {"device": device, "dtype": case.dtype, "generator": generator}
            tensor = torch.randn(tuple(shape), **own)
            return tensor if mesh is None else _sharded(tensor, mesh)

        self.case = case
        self.groups = [
            [nn.Parameter(normal(shape)) for shape in group] for group in case.groups
        ]
        self.params = [param for group in self.groups for param in group]
        grads = [normal(param.shape) for param in self.params]
        self._turns = cycle([[g.detach() for g in grads] for _ in range(3)])

    def refresh(self) -> None:
        """Give every parameter a gradient tensor that the last step has not seen."""
        for param, grad in zip(self.params, next(self._turns), strict=True):
            param.grad = grad

    def rate(self, group: int, base: float) -> float | Tensor:
        """Return the learning rate of a group, in a tensor where the case says so."""
        lr = self.case.lr_of(group, base)
        where = self.params[0].device
        return torch.tensor(lr, device=where) if self.case.tensor_lr else lr

    def scaling(self) -> dict[str, Tensor]:
        """Return what a ``GradScaler`` hands over, if the case has one."""
        if not self.case.scaled:
            return {}
        where = self.params[0].device
        return {
            "grad_scale": torch.ones((), device=where),
            "found_inf": torch.zeros((), device=where),
        }


def _sharded(tensor: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)


def local(tensor: Tensor) -> Tensor:
    """Return the shard that this process holds, or the tensor itself."""
    # Not `to_local()`: it makes a new tensor, and 1,000 of them cool the caches.
    return getattr(tensor, "_local_tensor", tensor)


@contextmanager
def one_process_mesh(device: torch.device) -> Iterator[Any]:
    """Make a mesh of this process alone; nothing leaves it."""
    from torch.distributed.device_mesh import init_device_mesh

    # On a GPU not gloo beside it, which fails where there is no network at all.
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,))
    finally:
        dist.destroy_process_group()
