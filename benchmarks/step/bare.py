"""The floor: torch's fused kernels on lists that were prepared before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.step.workload import local


class Call(NamedTuple):
    """The tensors and numbers of one kernel call."""

    owners: list[Tensor]
    params: list[Tensor]
    moments: list[list[Tensor]]
    steps: list[Tensor]
    lr: float | Tensor
    wd: float
    alone: bool


class BareKernel:
    """One kernel call per learning rate and decay, and no other work.

    Step counters stay at one: advancing them is the optimizer's work and not part
    of the floor. On shards the kernel runs on what this process holds.

    Args:
        groups: Parameter groups split by decay.
        optimizer: ``"adamw"``, ``"adam"`` or ``"sgd"``.
        settings: The optimizer's arguments, ``"weight_decay"`` for groups without.
        alone: Elements up to which a tensor is stepped on one thread, in a call of
            its own with others like it.
        scaling: What a ``GradScaler`` hands over.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        optimizer: str,
        settings: dict[str, float],
        alone: int = 0,
        **scaling: Tensor,
    ) -> None:
        self._momentum = settings.get("momentum", 0.0)
        self._scaling = scaling
        self._kernel = self._sgd if optimizer == "sgd" else _adam(optimizer, scaling)
        merged: dict[tuple[bool, float | Tensor, float], list[Tensor]] = {}
        for group in groups:
            wd = group.get("weight_decay", settings["weight_decay"])
            for param in group["params"]:
                key = (local(param).numel() <= alone, group["lr"], wd)
                merged.setdefault(key, []).append(param)
        moments = 1 if optimizer == "sgd" else 2
        self.calls = [
            _call(merged[key], moments, *key)
            for key in sorted(merged, key=lambda key: key[0])
        ]
        self._grads: list[list[Tensor]] = []

    def fetch(self) -> None:
        """Prepare the lists of this step's gradients."""
        self._grads = [
            [local(owner.grad) for owner in call.owners] for call in self.calls
        ]

    @torch.no_grad()
    def step(self) -> None:
        threads = torch.get_num_threads()
        for call, grads in zip(self.calls, self._grads, strict=True):
            if call.alone and torch.get_num_threads() > 1:
                torch.set_num_threads(1)
            self._kernel(call, grads)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    def _sgd(self, call: Call, grads: list[Tensor]) -> None:
        torch._fused_sgd_(
            call.params,
            grads,
            call.moments[0],
            weight_decay=call.wd,
            momentum=self._momentum,
            lr=call.lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            **self._scaling,
        )


def _call(
    owners: list[Tensor], moments: int, alone: bool, lr: float | Tensor, wd: float
) -> Call:
    params = [local(owner.detach()) for owner in owners]
    zeros = [[torch.zeros_like(param) for param in params] for _ in range(moments)]
    steps = [torch.ones((), device=param.device) for param in params]
    return Call(owners, params, zeros, steps, lr, wd, alone)


def _adam(
    optimizer: str, scaling: dict[str, Tensor]
) -> Callable[[Call, list[Tensor]], None]:
    kernel = torch._fused_adamw_ if optimizer == "adamw" else torch._fused_adam_

    def step(call: Call, grads: list[Tensor]) -> None:
        kernel(
            call.params,
            grads,
            *call.moments,
            [],
            call.steps,
            lr=call.lr,
            beta1=0.9,
            beta2=0.999,
            weight_decay=call.wd,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
            **scaling,
        )

    return step
