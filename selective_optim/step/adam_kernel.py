"""How Adam and AdamW reach torch's kernels; state entries are torch's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import Decay, DecayKey, Form
from selective_optim.step.grad_scaler import Scaling
from selective_optim.step.kernel import Kernel
from selective_optim.step.setting import (
    Batch,
    Call,
    Group,
    Setting,
    Share,
    State,
    lr_on_device,
)

# What a group says and torch's fused kernel is not told.
CHOICES = ("capturable", "differentiable", "foreach", "fused", "decoupled_weight_decay")


class AdamKernel(Kernel):
    """Adam and AdamW: two moments, a third with ``amsgrad``, and a step counter."""

    counts = True
    required = ("lr", "betas", "eps", "weight_decay", "params")
    flags = ("amsgrad", "maximize")
    own_forms = ("l2", "decoupled")

    def default_form(self, group: Group) -> Form:
        return "decoupled" if group["decoupled_weight_decay"] else "l2"

    def setting(
        self, group: Group, decay_key: DecayKey, reading: bool = True
    ) -> Setting:
        wd, form, decay_pass, fleeting = self.share(group, decay_key, reading)
        beta1, beta2 = group["betas"]
        return Setting(
            {
                "lr": group["lr"],
                "beta1": beta1,
                "beta2": beta2,
                "eps": group["eps"],
                "weight_decay": wd,
                "decoupled_weight_decay": form == "decoupled",
                "amsgrad": group["amsgrad"],
                "maximize": group["maximize"],
                "capturable": group["capturable"],
                "differentiable": group["differentiable"],
                "foreach": group["foreach"],
                "fused": group["fused"],
            },
            decay_pass,
            fleeting,
        )

    def show(self, group: Group, shared: Share) -> None:
        super().show(group, shared)
        group["decoupled_weight_decay"] = shared.form == "decoupled"

    def entries(self, group: Group) -> tuple[str, ...]:
        moments = ("exp_avg", "exp_avg_sq")
        return (*moments, "max_exp_avg_sq") if group.get("amsgrad") else moments

    def structure(self, group: Group) -> tuple[object, ...]:
        names = ("amsgrad", "foreach", "fused", "capturable", "differentiable")
        return (*[group[name] for name in names], self.takes_numbers(group))

    def trusted(self, param: Tensor) -> bool:
        return True

    def takes_beside(self, param: Tensor, moment: Tensor) -> bool:
        if moment.dtype == param.dtype:
            return True
        pair = (param.dtype, moment.dtype)
        # Named in torch's documentation from 2.12 on; torch checks it again.
        return param.is_cuda and pair == (torch.float32, torch.bfloat16)

    def has_state(self, own: State | None, group: Group) -> bool:
        return bool(own)

    def begin(
        self, own: State, param: Tensor, group: Group, step: Tensor | None
    ) -> None:
        if step is None:  # filled on the device: nothing is copied there
            step = torch.zeros((), dtype=torch.float32, device=param.device)
        moments = {
            entry: torch.zeros_like(param, memory_format=torch.preserve_format)
            for entry in self.entries(group)
        }
        own.update(step=step, **moments)  # at once: an interrupt leaves all or nothing

    def fused_call(self, setting: Setting, batch: Batch, scaling: Scaling) -> Call:
        own = {k: v for k, v in setting.arguments.items() if k not in CHOICES}
        own["lr"] = lr_on_device(own["lr"], batch.params)
        decoupled = setting.arguments["decoupled_weight_decay"]
        kernel = _torch.fused_adamw_ if decoupled else _torch.fused_adam_
        largest = batch.moments[2] if own["amsgrad"] else []
        lists = (*(batch.params, batch.grads), *batch.moments[:2], largest, batch.steps)
        return partial(kernel, *lists, **own, **scaling._asdict())

    @staticmethod
    def direction(
        setting: Setting, grad: Tensor, moments: Sequence[Tensor | None]
    ) -> Tensor:
        """Return the new first moment: the update has its sign, with any ``eps``."""
        beta1, first = setting.arguments["beta1"], moments[0]
        grad = -grad if setting.arguments["maximize"] else grad
        if first is None:  # begins as zeros, in this step
            first = torch.zeros_like(grad)
        if isinstance(beta1, Tensor) or first.dtype != grad.dtype:
            moment: Tensor = beta1 * first + (1 - beta1) * grad
            return moment
        return torch.lerp(first, grad, 1 - beta1)  # as torch's own is computed

    def hyperparameters(self, group: Group) -> Iterable[tuple[str, Any]]:
        return [
            ("lr", group["lr"]),
            ("eps", group["eps"]),
            ("weight_decay", group["weight_decay"]),
            *zip(repeat("betas"), group["betas"]),
        ]

    def refuse_sparse(self, group: Group, decay: Decay, label: str) -> None:
        """Raise as torch does: Adam steps no sparse gradient, decayed or not."""
        raise RuntimeError(
            f"Adam does not support sparse gradients, please consider SparseAdam "
            f"instead; {label} has one. Pass sparse=False to its embedding, or use "
            f"selective_optim.SGD with that parameter exempt."
        )
