"""How Adam and SGD reach torch's kernels: settings, state entries and calls.

A setting is everything but tensors that a kernel is given; parameters with equal
settings can share one call. State entries are torch's, created as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim._rules import Form

Group = dict[str, Any]
State = dict[str, Any]
States = dict[Tensor, State]
Scaling = tuple[Tensor | None, Tensor | None]  # grad_scale, found_inf
Lists = list[list[Tensor]]  # one list of tensors per state entry
HALF = (torch.float16, torch.bfloat16)


class Setting(NamedTuple):
    """What a kernel is given besides tensors.

    Args:
        arguments: Of torch's functional, by name.
        shrink: Decay to apply to the parameters before the kernel runs, which
            torch's kernel does not do; 0 where there is none.
    """

    arguments: dict[str, Any]
    shrink: float | Tensor = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """What must be equal for parameters to share a call."""
        return (*self.arguments.values(), self.shrink)


# Parameters, gradients, moments, counters, scaling, and whether it is the first step:
# local shards where sharded.
FusedCall = Callable[
    [list[Tensor], list[Tensor], Lists, list[Tensor], Scaling, bool], None
]


def wd_of(group: Group, multiplier: float) -> float | Tensor:
    """Effective decay: the group's, read now, times the parameter's multiplier."""
    wd: float | Tensor = group["weight_decay"]
    return wd if multiplier == 1 else 0.0 if multiplier == 0 else wd * multiplier


def is_zero(value: float | Tensor) -> bool:
    """Tell whether a number is 0; a tensor may change and never counts as 0."""
    return not isinstance(value, Tensor) and value == 0


def require_range(
    group: Group, index: int, name: str, value: Any, top: float = math.inf
) -> None:
    """Check a hyperparameter that may have been edited since construction.

    Raises:
        ValueError: It is NaN, negative, or not below ``top``.
    """
    if isinstance(value, Tensor) or 0 <= value < top or value == top == math.inf:
        return
    bound = ">= 0" if top == math.inf else f"in [0, {top:g})"
    raise ValueError(
        f"`{name}` of group {index} must be {bound}, not {value}. "
        f"Set optimizer.param_groups[{index}][{name!r}] to such a value."
    )


def follow_param_(state: State, param: Tensor, entries: Sequence[str]) -> None:
    """Move state to where ``model.to(...)`` moved the parameter, as loading would."""
    for entry in entries:
        value = state.get(entry)
        if isinstance(value, Tensor) and (
            value.device != param.device or value.dtype != param.dtype
        ):
            state[entry] = value.to(device=param.device, dtype=param.dtype)


def lr_on_device(lr: float | Tensor, params: Sequence[Tensor]) -> float | Tensor:
    """Move a tensor learning rate to its parameters, as torch does; the CPU stays."""
    if isinstance(lr, Tensor) and not lr.is_cpu:
        return lr.to(params[0].device, non_blocking=True)
    return lr


def _rounds_away(lr: float | Tensor, wd: float | Tensor, dtype: torch.dtype) -> bool:
    if dtype not in HALF or isinstance(lr, Tensor) or isinstance(wd, Tensor):
        return False
    return 0 < lr * wd < torch.finfo(dtype).eps / 2


class AdamKernel:
    """Adam and AdamW: two moments, a third with ``amsgrad``, and a step counter."""

    counts = True
    lists = 6  # that torch's _init_group fills
    required = ("lr", "betas", "eps", "weight_decay", "params")

    def decoupled(self, group: Group, form: Form | None) -> bool:
        """Tell whether this form, or the group's default, is the decoupled one."""
        return form == "decoupled" if form else bool(group["decoupled_weight_decay"])

    def setting(self, group: Group, multiplier: float, form: Form | None) -> Setting:
        """Read what the kernel is given from the group as it is now."""
        wd = wd_of(group, multiplier)
        beta1, beta2 = group["betas"]
        return Setting(
            {
                "lr": group["lr"],
                "beta1": beta1,
                "beta2": beta2,
                "eps": group["eps"],
                "weight_decay": wd,
                # Without decay both forms give the same bits: one call for both.
                "decoupled_weight_decay": self.decoupled(
                    group, None if is_zero(wd) else form
                ),
                "amsgrad": group["amsgrad"],
                "maximize": group["maximize"],
                "capturable": group["capturable"],
                "differentiable": group["differentiable"],
                "foreach": group["foreach"],
                "fused": group["fused"],
            }
        )

    def bind(self, setting: Setting) -> FusedCall:
        """Return torch's fused kernel with everything but tensors filled in."""
        own = dict(setting.arguments)
        lr, amsgrad = own.pop("lr"), own["amsgrad"]
        for name in ("capturable", "differentiable", "foreach", "fused"):
            del own[name]
        decoupled = own.pop("decoupled_weight_decay")
        kernel = partial(
            _torch.fused_adamw_ if decoupled else _torch.fused_adam_, **own
        )

        def call(
            params: list[Tensor],
            grads: list[Tensor],
            moments: Lists,
            steps: list[Tensor],
            scaling: Scaling,
            first: bool,
        ) -> None:
            kernel(
                *(params, grads, moments[0], moments[1]),
                moments[2] if amsgrad else [],
                steps,
                lr=lr_on_device(lr, params),
                grad_scale=scaling[0],
                found_inf=scaling[1],
            )

        return call

    def functional(
        self,
        setting: Setting,
        params: list[Tensor],
        grads: list[Tensor],
        states: Sequence[State],
    ) -> None:
        """Step with torch's functional: for-loop, foreach, or torch's own choice."""
        entries = ["exp_avg", "exp_avg_sq"]
        amsgrad = setting.arguments["amsgrad"]
        _torch.adam(
            params,
            grads,
            *([state[entry] for state in states] for entry in entries),
            [state["max_exp_avg_sq"] for state in states] if amsgrad else [],
            [state["step"] for state in states],
            has_complex=any(map(torch.is_complex, params)),
            **setting.arguments,
        )

    def traced(self, setting: Setting, lists: Lists, flag: bool) -> None:
        """Step the lists that torch's ``_init_group`` filled."""
        _torch.adam(*lists, has_complex=flag, **setting.arguments)

    def keep(self, states: States, lists: Lists) -> None:
        """Nothing is new: the state was updated in place."""

    def require_ranges(self, group: Group, index: int) -> None:
        """Raise for a hyperparameter that torch's constructor would refuse."""
        for name in ("lr", "eps", "weight_decay"):
            require_range(group, index, name, group[name])
        for beta in group["betas"]:
            require_range(group, index, "betas", beta, 1.0)

    def entries(self, group: Group) -> tuple[str, ...]:
        """Name the state tensors that are shaped like the parameter."""
        moments = ("exp_avg", "exp_avg_sq")
        return (*moments, "max_exp_avg_sq") if group.get("amsgrad") else moments

    def loaded_entries(self, group: Group) -> tuple[str, ...]:
        """Name what a checkpoint must hold of a parameter that has state."""
        return ("step", *self.entries(group))

    def structure(self, group: Group) -> tuple[object, ...]:
        """Read the flags that decide which tensors and which path a step uses."""
        names = ("amsgrad", "foreach", "fused", "capturable")
        return tuple(group[name] for name in names)

    def state_of(self, states: States, param: Tensor, group: Group) -> State:
        """Return the state of a parameter, created at its first gradient."""
        state = states[param]
        if not state:
            if group["fused"]:
                _torch.require_fused_support(param)
            on_device = group["capturable"] or group["fused"]
            dtype = _torch.scalar_dtype(is_fused=group["fused"])
            device = param.device if on_device else "cpu"
            state["step"] = torch.zeros((), dtype=dtype, device=device)
        for entry in self.entries(group):
            if entry not in state:
                state[entry] = torch.zeros_like(
                    param, memory_format=torch.preserve_format
                )
        follow_param_(state, param, self.entries(group))
        return state

    def has_state(self, states: States, param: Tensor, group: Group) -> bool:
        """Tell whether the parameter has stepped before."""
        return bool(states.get(param))

    def trusted(self, param: Tensor) -> bool:
        """Tell whether the fused kernel is right for this dtype and device."""
        return True

    def decay_vanishes(self, setting: Setting, fused: bool, dtype: torch.dtype) -> bool:
        """Tell whether decoupled decay outside the fused kernel rounds to nothing."""
        own = setting.arguments
        outside = own["decoupled_weight_decay"] and not fused
        return outside and _rounds_away(own["lr"], own["weight_decay"], dtype)

    def refuse_sparse(self, group: Group, multiplier: float, label: str) -> None:
        """Raise as torch does: Adam steps no sparse gradient, decayed or not."""
        raise RuntimeError(
            f"Adam does not support sparse gradients, please consider SparseAdam "
            f"instead; {label} has one. Pass sparse=False to its embedding, or use "
            f"selective_optim.SGD with that parameter exempt."
        )


class SGDKernel:
    """SGD: a momentum buffer that starts as the first gradient, and no counter.

    Args:
        decoupled: Decay the parameter itself where no form is stated; torch has
            no key for it in the group.
    """

    counts = False
    lists = 3  # that torch's _init_group fills
    required = (
        *("lr", "momentum", "dampening"),
        *("weight_decay", "nesterov", "params"),
    )

    def __init__(self, decoupled: bool = False) -> None:
        self._decoupled = decoupled

    def decoupled(self, group: Group, form: Form | None) -> bool:
        """Tell whether this form, or the group's default, is the decoupled one."""
        default = group.get("decoupled_weight_decay", self._decoupled)
        return form == "decoupled" if form else bool(default)

    def setting(self, group: Group, multiplier: float, form: Form | None) -> Setting:
        """Read what the kernel is given from the group as it is now."""
        wd = wd_of(group, multiplier)
        decoupled = self.decoupled(group, form)
        return Setting(
            {
                "lr": group["lr"],
                "momentum": group["momentum"],
                "dampening": group["dampening"],
                "weight_decay": 0.0 if decoupled else wd,
                "nesterov": group["nesterov"],
                "maximize": group["maximize"],
                "foreach": group["foreach"],
                "fused": group["fused"],
            },
            shrink=wd if decoupled else 0.0,
        )

    def bind(self, setting: Setting) -> FusedCall:
        """Return torch's fused kernel with everything but tensors filled in."""
        own = dict(setting.arguments)
        lr = own.pop("lr")
        del own["foreach"], own["fused"]
        kernel = partial(_torch.fused_sgd_, **own)

        def call(
            params: list[Tensor],
            grads: list[Tensor],
            moments: Lists,
            steps: list[Tensor],
            scaling: Scaling,
            first: bool,
        ) -> None:
            self.shrink_(setting, params)
            kernel(
                *(params, grads, moments[0] if moments else []),
                lr=lr_on_device(lr, params),
                is_first_step=first,
                grad_scale=scaling[0],
                found_inf=scaling[1],
            )

        return call

    def functional(
        self,
        setting: Setting,
        params: list[Tensor],
        grads: list[Tensor],
        states: Sequence[State],
    ) -> None:
        """Step with torch's functional: for-loop, foreach, or torch's own choice."""
        buffers = [state.get("momentum_buffer") for state in states]
        sparse = any(grad.is_sparse for grad in grads)
        self.traced(setting, [params, grads, buffers], sparse)  # type: ignore[list-item]  # None until the first step
        if setting.arguments["momentum"]:
            for state, buffer in zip(states, buffers):
                state["momentum_buffer"] = buffer

    def traced(self, setting: Setting, lists: Lists, flag: bool) -> None:
        """Step the lists that torch's ``_init_group`` filled."""
        self.shrink_(setting, lists[0])
        _torch.sgd(*lists, has_sparse_grad=flag, **setting.arguments)

    def keep(self, states: States, lists: Lists) -> None:
        """Write the momentum buffers that a step on lists made into the state."""
        params, _, buffers = lists
        for param, buffer in zip(params, buffers):
            states[param]["momentum_buffer"] = buffer

    def shrink_(self, setting: Setting, params: list[Tensor]) -> None:
        """Apply decoupled decay: ``param = param * (1 - lr * wd)``."""
        if is_zero(setting.shrink):
            return
        if not params:
            return
        factor = 1 - lr_on_device(setting.arguments["lr"], params) * setting.shrink
        if isinstance(factor, Tensor):
            factor = factor.squeeze()
        # On the CPU foreach rounds the factor to half precision first.
        half = any(param.is_cpu and param.dtype in HALF for param in params)
        if setting.arguments["foreach"] or not (half or self._by_hand(setting)):
            _torch.foreach_mul_(params, factor)
        else:
            for param in params:
                param.mul_(factor)

    @staticmethod
    def _by_hand(setting: Setting) -> bool:
        return setting.arguments["foreach"] is False and not setting.arguments["fused"]

    def require_ranges(self, group: Group, index: int) -> None:
        """Raise for a hyperparameter that torch's constructor would refuse."""
        for name in ("lr", "momentum", "weight_decay"):
            require_range(group, index, name, group[name])

    def entries(self, group: Group) -> tuple[str, ...]:
        """Name the state tensors that are shaped like the parameter."""
        return ("momentum_buffer",) if group["momentum"] else ()

    def loaded_entries(self, group: Group) -> tuple[str, ...]:
        """Name what a checkpoint must hold of a parameter that has state."""
        return self.entries(group)

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

    def has_state(self, states: States, param: Tensor, group: Group) -> bool:
        """Tell whether the parameter has stepped before."""
        if not group["momentum"]:
            return True
        return (states.get(param) or {}).get("momentum_buffer") is not None

    def decay_vanishes(self, setting: Setting, fused: bool, dtype: torch.dtype) -> bool:
        """Tell whether decoupled decay, here always a multiply, rounds to nothing."""
        return _rounds_away(setting.arguments["lr"], setting.shrink, dtype)

    def trusted(self, param: Tensor) -> bool:
        """Tell whether the fused kernel is right for this dtype and device."""
        half = param.dtype in HALF
        return _torch.HALF_SGD_ON_CPU or not (half and param.is_cpu)

    def refuse_sparse(self, group: Group, multiplier: float, label: str) -> None:
        """Raise if a parameter with a sparse gradient decays."""
        if not is_zero(wd_of(group, multiplier)):
            raise RuntimeError(
                f"{label} has a sparse gradient and decays, which would make the "
                f"gradient dense. Exempt it: wd_policy=exclude(nn.Embedding)."
            )


Kernel = AdamKernel | SGDKernel
