"""The two judges: torch's class with one optimizer per parameter, and the formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.soak.config import KINDS, Param
from tests.support.kernels import HALF_SGD_ON_CPU
from tests.support.reference import AdamReference, SGDReference

# One step of a few roundings, relative to what is added up.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
RATE_TOLERANCE = 1e-5  # torch divides a rate that is a float32 tensor in float32


def plain_strides(tensor: Tensor) -> list[tuple[int, int]]:
    """Return ``(stride, size)`` of the dimensions along which memory is walked."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return [(stride, size) for stride, size in pairs if size != 1]


def without_gaps(tensor: Tensor) -> bool:
    """Tell whether the elements fill a piece of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(plain_strides(tensor)):
        if stride != expected:
            return False
        expected *= size
    return True


class Twin:
    """torch's optimizer for one parameter, with its own decay as the group's.

    torch steps groups one after another and tensors one by one, so one optimizer per
    parameter is the finest split by hand. It also lets each parameter of fused SGD
    start when it gets its first gradient, which torch's does not within a group.
    """

    def __init__(
        self, name: str, decoupled: bool, spec: Param, param: nn.Parameter
    ) -> None:
        default = "decoupled" if decoupled or name == "AdamW" else "l2"
        self.name, self.multiplier = name, spec.multiplier
        self.form = spec.form or default
        adam = {"l2": torch.optim.Adam, "decoupled": torch.optim.AdamW}[self.form]
        self.optimizer: Any = (torch.optim.SGD if name == "SGD" else adam)([param])

    @property
    def param(self) -> Tensor:
        return self.optimizer.param_groups[0]["params"][0]

    @property
    def state(self) -> dict[str, Any]:
        return self.optimizer.state.get(self.param) or {}

    def step(self, settings: dict[str, Any], kind: str) -> None:
        """Step with the hyperparameters and implementation of now."""
        if kind == "automatic":
            kind = "fused" if self._fused_is_right() else "for-loop"
        group = self.optimizer.param_groups[0]
        wd = settings["weight_decay"] * self.multiplier
        group.update({**settings, **KINDS[kind], "weight_decay": wd})
        if self.name == "SGD" and self.form == "decoupled":
            group["weight_decay"] = 0.0
            if self.param.grad is not None and wd != 0:
                self.param.data.mul_(1 - settings["lr"] * wd)
        self.optimizer.step()

    def _fused_is_right(self) -> bool:
        param, grad = self.param, self.param.grad
        if grad is None or grad.is_sparse or param.is_complex():
            return grad is None
        half = param.dtype in (torch.bfloat16, torch.float16)
        if self.name == "SGD" and half and not HALF_SGD_ON_CPU:
            return False
        moments = [v for k, v in self.state.items() if k != "step" and v is not None]
        return without_gaps(param) and all(
            param.numel() == 0 or plain_strides(other) == plain_strides(param)
            for other in (grad, *moments)
        )

    def formula(self, settings: dict[str, Any]) -> tuple[Any, Any] | None:
        """Work out the parameter after this step, and the error to allow; or ``None``.

        The formulas start from torch's state, which was found to be ours.
        """
        param, grad = self.param, self.param.grad
        tolerance = TOLERANCE.get(param.dtype)
        if tolerance is None or grad is None or grad.is_sparse:
            return None
        if isinstance(settings["lr"], Tensor):
            tolerance = max(tolerance, RATE_TOLERANCE)
        reference = self._sgd(settings) if self.name == "SGD" else self._adam(settings)
        g = grad.double()
        reference.step(g)
        update = reference.lr * g.abs() if self.name == "SGD" else reference.lr
        return reference.p, tolerance * (1 + reference.p.abs() + 10 * update)

    def _common(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {
            "p": self.param.detach().double().clone(),
            "lr": float(settings["lr"]),
            "wd": settings["weight_decay"] * self.multiplier,
            "form": self.form,
            "maximize": settings["maximize"],
        }

    def _sgd(self, settings: dict[str, Any]) -> SGDReference:
        own = {key: settings[key] for key in ("momentum", "dampening", "nesterov")}
        buffer = self.state.get("momentum_buffer")
        buffer = None if buffer is None else buffer.double().clone()
        return SGDReference(**self._common(settings), **own, buffer=buffer)

    def _adam(self, settings: dict[str, Any]) -> AdamReference:
        names = {"m": "exp_avg", "v": "exp_avg_sq", "v_max": "max_exp_avg_sq"}
        state = self.state
        moments = {
            short: state[name].double().clone() if name in state else 0.0
            for short, name in names.items()
        }
        beta1, beta2 = settings["betas"]
        return AdamReference(
            **self._common(settings),
            **moments,
            beta1=beta1,
            beta2=beta2,
            eps=settings["eps"],
            amsgrad=settings["amsgrad"],
            t=int(state["step"]) if state else 0,
        )
