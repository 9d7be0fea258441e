"""How SGD reaches torch's kernels; state entries are torch's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim._rules import Form
from selective_optim._settings import (
    HALF,
    FusedCall,
    Group,
    Lists,
    Scaling,
    Setting,
    State,
    States,
    follow_param_,
    is_zero,
    lr_on_device,
    require_range,
    rounds_away,
    wd_of,
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
        # On the CPU foreach rounds the factor to half precision first, mul_ does not.
        if any(param.is_cpu and param.dtype in HALF for param in params):
            for param in params:
                param.mul_(factor)
        else:
            _torch.foreach_mul_(params, factor)

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
        return rounds_away(setting.arguments["lr"], setting.shrink, dtype)

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
