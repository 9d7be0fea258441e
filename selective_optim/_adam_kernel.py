"""How Adam and AdamW reach torch's kernels; state entries are torch's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim._rules import Form
from selective_optim._settings import (
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
        return outside and rounds_away(own["lr"], own["weight_decay"], dtype)

    def refuse_sparse(self, group: Group, multiplier: float, label: str) -> None:
        """Raise as torch does: Adam steps no sparse gradient, decayed or not."""
        raise RuntimeError(
            f"Adam does not support sparse gradients, please consider SparseAdam "
            f"instead; {label} has one. Pass sparse=False to its embedding, or use "
            f"selective_optim.SGD with that parameter exempt."
        )
