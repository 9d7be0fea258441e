"""How Adam and SGD reach torch's kernels: settings, state entries and calls.

A setting is everything but tensors that a kernel is given; parameters with equal
settings can share one call. State entries are torch's, created as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim._rules import Form

Group = dict[str, Any]
State = dict[str, Any]
States = dict[Tensor, State]
Scaling = tuple[Tensor | None, Tensor | None]  # grad_scale, found_inf
Lists = list[list[Tensor]]  # one list of tensors per state entry


class Setting(Protocol):
    """What the plan asks of a setting."""

    @property
    def shrinks(self) -> bool:
        """Tell whether a fused step multiplies parameters before the kernel runs."""

    def fused(
        self, params: list[Tensor], grads: list[Tensor], moments: Lists, steps: list[Tensor],
        scaling: Scaling, first: bool,
    ) -> None:  # fmt: skip
        """Step with torch's fused kernel; counters were advanced before."""

    def functional(
        self, params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> None:
        """Step with torch's functional: for-loop, foreach, or torch's own choice."""


def wd_of(group: Group, multiplier: float) -> float | Tensor:
    """Effective decay: the group's, read now, times the parameter's multiplier."""
    wd: float | Tensor = group["weight_decay"]
    return wd if multiplier == 1 else 0.0 if multiplier == 0 else wd * multiplier


def require_range(
    group: Group, index: int, name: str, value: Any, top: float = math.inf
) -> None:
    """Check a hyperparameter that may have been edited since construction.

    Raises:
        ValueError: It is NaN, negative, or not below ``top``.
    """
    if not isinstance(value, Tensor) and not (
        0 <= value < top or value == top == math.inf
    ):
        bound = ">= 0" if top == math.inf else f"in [0, {top:g})"
        raise ValueError(
            f"`{name}` of group {index} must be {bound}, not {value}. "
            f"Set optimizer.param_groups[{index}][{name!r}] to such a value."
        )


def follow_param_(state: State, param: Tensor, entries: Sequence[str]) -> None:
    """Move state to where ``model.to(...)`` moved the parameter, as loading would."""
    for entry in entries:
        value = state.get(entry)
        if isinstance(value, Tensor) and (value.device, value.dtype) != (
            param.device,
            param.dtype,
        ):
            state[entry] = value.to(device=param.device, dtype=param.dtype)


class AdamSetting(NamedTuple):
    """What Adam's kernels are given besides tensors."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    wd: float | Tensor
    decoupled: bool
    amsgrad: bool
    maximize: bool
    capturable: bool
    foreach: bool | None
    fused_flag: bool | None

    @property
    def shrinks(self) -> bool:
        return False  # the kernel decays

    def fused(
        self, params: list[Tensor], grads: list[Tensor], moments: Lists, steps: list[Tensor],
        scaling: Scaling, first: bool,
    ) -> None:  # fmt: skip
        kernel = _torch.fused_adamw_ if self.decoupled else _torch.fused_adam_
        lr = self.lr
        if isinstance(lr, Tensor) and not lr.is_cpu:
            lr = lr.to(params[0].device, non_blocking=True)
        kernel(
            params,
            grads,
            moments[0],
            moments[1],
            moments[2] if self.amsgrad else [],
            steps,
            lr=lr,  # type: ignore[arg-type]  # the stub of the overload for tensors is missing
            beta1=self.beta1,  # type: ignore[arg-type]
            beta2=self.beta2,  # type: ignore[arg-type]
            weight_decay=self.wd,  # type: ignore[arg-type]
            eps=self.eps,
            amsgrad=self.amsgrad,
            maximize=self.maximize,
            grad_scale=scaling[0],
            found_inf=scaling[1],
        )

    def functional(
        self, params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> None:
        _torch.adam(
            params,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["max_exp_avg_sq"] for s in states] if self.amsgrad else [],
            [s["step"] for s in states],
            **self.arguments(),
            has_complex=any(map(torch.is_complex, params)),
            differentiable=False,
        )

    def arguments(self) -> dict[str, Any]:
        """Name the arguments of ``torch.optim.adam.adam``."""
        return {
            "lr": self.lr,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "eps": self.eps,
            "weight_decay": self.wd,
            "decoupled_weight_decay": self.decoupled,
            "amsgrad": self.amsgrad,
            "maximize": self.maximize,
            "capturable": self.capturable,
            "foreach": self.foreach,
            "fused": self.fused_flag,
        }


class AdamKernel:
    """Adam and AdamW: two moments, a third with ``amsgrad``, and a step counter."""

    counts = True

    def decoupled(self, group: Group, form: Form | None) -> bool:
        """Tell whether this form, or the group's default, is the decoupled one."""
        return form == "decoupled" if form else bool(group["decoupled_weight_decay"])

    def setting(
        self, group: Group, multiplier: float, form: Form | None
    ) -> AdamSetting:
        """Read what the kernel is given from the group as it is now."""
        wd = wd_of(group, multiplier)
        exempt = (
            not isinstance(wd, Tensor) and wd == 0
        )  # then both forms are the same bits
        return AdamSetting(
            group["lr"],
            *group["betas"],
            group["eps"],
            wd,
            self.decoupled(group, None if exempt else form),
            group["amsgrad"],
            group["maximize"],
            group["capturable"],
            group["foreach"],
            group["fused"],
        )

    def require_ranges(self, group: Group, index: int) -> None:
        """Raise for a hyperparameter that torch's constructor would refuse."""
        for name, top in (
            ("lr", math.inf),
            ("eps", math.inf),
            ("weight_decay", math.inf),
        ):
            require_range(group, index, name, group[name], top)
        for beta in group["betas"]:
            require_range(group, index, "betas", beta, 1.0)

    def entries(self, group: Group) -> tuple[str, ...]:
        """Name the state tensors that are shaped like the parameter."""
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[
            : 3 if group["amsgrad"] else 2
        ]

    def structure(self, group: Group) -> tuple[object, ...]:
        """Read the flags that decide which tensors and which path a step uses."""
        return (group["amsgrad"], group["foreach"], group["fused"], group["capturable"])

    def state_of(self, states: States, param: Tensor, group: Group) -> State:
        """Return the state of a parameter, created at its first gradient as by torch."""
        state = states[param]
        if not state:
            if group["fused"]:
                _torch.require_fused_support(param)
            dtype = _torch.scalar_dtype(is_fused=group["fused"])
            device = param.device if group["capturable"] or group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=dtype, device=device)
        for entry in self.entries(group):
            if entry not in state:
                state[entry] = torch.zeros_like(
                    param, memory_format=torch.preserve_format
                )
        follow_param_(state, param, self.entries(group))
        return state

    def trusted(self, param: Tensor) -> bool:
        """Tell whether the fused kernel is right for this dtype and device."""
        return True

    def refuse_sparse(self, group: Group, multiplier: float, label: str) -> None:
        """Raise as torch does: Adam steps no sparse gradient, decayed or not."""
        raise RuntimeError(
            f"Adam does not support sparse gradients, please consider SparseAdam instead; "
            f"{label} has one. Use selective_optim.SGD with that parameter exempt, or sparse=False."
        )


class SGDSetting(NamedTuple):
    """What SGD's kernels are given besides tensors."""

    lr: float | Tensor
    momentum: float
    dampening: float
    wd: float | Tensor
    decoupled: bool
    nesterov: bool
    maximize: bool
    foreach: bool | None
    fused_flag: bool | None

    @property
    def shrinks(self) -> bool:
        return self.decoupled

    def fused(
        self, params: list[Tensor], grads: list[Tensor], moments: Lists, steps: list[Tensor],
        scaling: Scaling, first: bool,
    ) -> None:  # fmt: skip
        self.shrink(params)
        lr = self.lr
        if isinstance(lr, Tensor) and not lr.is_cpu:
            lr = lr.to(params[0].device, non_blocking=True)
        _torch.fused_sgd_(
            params,
            grads,
            moments[0] if self.momentum else [],
            weight_decay=0.0 if self.decoupled else self.wd,  # type: ignore[arg-type]
            momentum=self.momentum,
            lr=lr,  # type: ignore[arg-type]  # the stub of the overload for tensors is missing
            dampening=self.dampening,
            nesterov=self.nesterov,
            maximize=self.maximize,
            is_first_step=first,
            grad_scale=scaling[0],
            found_inf=scaling[1],
        )

    def shrink(self, params: list[Tensor]) -> None:
        """Apply decoupled decay: ``param = param * (1 - lr * wd)``."""
        if not self.decoupled:
            return
        factor = 1 - self.lr * self.wd
        if self.foreach is False and self.fused_flag is False:
            for param in params:
                param.mul_(factor)
        else:
            _torch.foreach_mul_(params, factor)  # type: ignore[arg-type]  # takes tensors too

    def functional(
        self, params: list[Tensor], grads: list[Tensor], states: Sequence[State]
    ) -> None:
        self.shrink(params)
        buffers = [s.get("momentum_buffer") for s in states]
        _torch.sgd(
            params,
            grads,
            buffers,
            **self.arguments(),
            has_sparse_grad=any(grad.is_sparse for grad in grads),
        )
        if self.momentum:
            for state, buffer in zip(states, buffers, strict=True):
                state["momentum_buffer"] = buffer

    def arguments(self) -> dict[str, Any]:
        """Name the arguments of ``torch.optim.sgd.sgd``."""
        return {
            "lr": self.lr,
            "momentum": self.momentum,
            "dampening": self.dampening,
            "weight_decay": 0.0 if self.decoupled else self.wd,
            "nesterov": self.nesterov,
            "maximize": self.maximize,
            "foreach": self.foreach,
            "fused": self.fused_flag,
        }


class SGDKernel:
    """SGD: a momentum buffer that starts as the first gradient, and no counter.

    Args:
        decoupled: Decay the parameter itself where no form is stated; torch has
            no key for it in the group.
    """

    counts = False

    def __init__(self, decoupled: bool = False) -> None:
        self.decoupled_by_default = decoupled

    def decoupled(self, group: Group, form: Form | None) -> bool:
        """Tell whether this form, or the group's default, is the decoupled one."""
        default = group.get("decoupled_weight_decay", self.decoupled_by_default)
        return form == "decoupled" if form else bool(default)

    def setting(self, group: Group, multiplier: float, form: Form | None) -> SGDSetting:
        """Read what the kernel is given from the group as it is now."""
        wd = wd_of(group, multiplier)
        exempt = not isinstance(wd, Tensor) and wd == 0
        return SGDSetting(
            group["lr"],
            group["momentum"],
            group["dampening"],
            wd,
            self.decoupled(group, form) and not exempt,
            group["nesterov"],
            group["maximize"],
            group["foreach"],
            group["fused"],
        )

    def require_ranges(self, group: Group, index: int) -> None:
        """Raise for a hyperparameter that torch's constructor would refuse."""
        for name in ("lr", "momentum", "weight_decay"):
            require_range(group, index, name, group[name])

    def entries(self, group: Group) -> tuple[str, ...]:
        """Name the state tensors that are shaped like the parameter."""
        return ("momentum_buffer",) if group["momentum"] else ()

    def structure(self, group: Group) -> tuple[object, ...]:
        """Read the flags that decide which tensors and which path a step uses."""
        return (group["momentum"] != 0, group["foreach"], group["fused"])

    def state_of(self, states: States, param: Tensor, group: Group) -> State:
        """Return the state of a parameter; its first gradient becomes the buffer."""
        if group["fused"]:
            _torch.require_fused_support(param)
        if not group["momentum"]:
            return {}
        follow_param_(states[param], param, self.entries(group))
        return states[param]

    def trusted(self, param: Tensor) -> bool:
        """Tell whether the fused kernel is right for this dtype and device."""
        half = param.dtype in (torch.float16, torch.bfloat16)
        return _torch.HALF_SGD_ON_CPU or not (half and param.is_cpu)

    def refuse_sparse(self, group: Group, multiplier: float, label: str) -> None:
        """Raise if a parameter with a sparse gradient decays."""
        if wd_of(group, multiplier) != 0:
            raise RuntimeError(
                f"{label} has a sparse gradient and decays, which would make the gradient dense. "
                f"Exempt it, for example with wd_policy=exclude(nn.Embedding)."
            )


Kernel = AdamKernel | SGDKernel
