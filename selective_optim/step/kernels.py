"""What a kernel is: how an optimizer's numbers and tensors reach torch's own code.

There are two, one for Adam and AdamW and one for SGD. Each reads a setting from a
group, makes state as torch does, and binds torch's fused kernel to lists of tensors.
Which parameters go to it is chosen in ``parts``, from what a kernel answers here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import repeat
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import Applied, Decay, DecayKey, Form, is_zero
from selective_optim.step.setting import (
    Batch,
    Call,
    Group,
    Groups,
    Scaling,
    Setting,
    Share,
    State,
    lr_on_device,
    share,
)

NUMBERS = (float, int, Tensor, Real)  # the common ones first: asked at every change


class Kernel:
    """Reads settings, makes state, and calls torch; it keeps nothing of a step."""

    counts: bool  # whether state holds a step counter
    planned = True  # whether a plan may step by it
    required: tuple[str, ...]  # keys that a loaded group must have
    numbers: tuple[str, ...]  # keys that an edit may have made NaN
    flags: tuple[str, ...]  # keys that fused kernels take as bool alone
    choices: tuple[str, ...]  # keys by which a group chooses its implementation
    applies: tuple[Applied, ...]  # ways in which the class decays itself

    def default_form(self, group: Group) -> Form:
        """Return the form of parameters for which no other was decided."""
        raise NotImplementedError  # pragma: no cover

    def share(self, group: Group, decay_key: DecayKey, reading: bool = True) -> Share:
        """Share the decay of a part out: what the class does of it, and what a pass."""
        default = self.default_form(group)
        return share(group, decay_key, default, self.applies, reading)

    def setting(self, group: Group, share: Share) -> Setting:
        """Read what the fused kernel is given from the group as it is now."""
        arguments = {name: group[name] for name in (*self.numbers, *self.flags)}
        arguments["weight_decay"] = share.wd
        if "betas" in arguments:
            # As torch does: kernels take a tensor without dimensions alone.
            pair = arguments.pop("betas")
            pair = [b.squeeze() if getattr(b, "ndim", 0) else b for b in pair]
            arguments["beta1"], arguments["beta2"] = pair
        return Setting(arguments, share)

    @staticmethod
    def direction(
        setting: Setting, grad: Tensor, moments: Sequence[Tensor | None]
    ) -> Tensor:
        """Return what has the sign of the update; ``None`` is a moment yet to begin."""
        raise NotImplementedError  # pragma: no cover

    def entries(self, group: Group) -> tuple[str, ...]:
        """Name the state tensors that are shaped like the parameter."""
        raise NotImplementedError  # pragma: no cover

    def structure(self, group: Group) -> tuple[object, ...]:
        """Read what decides which tensors and which path a step uses."""
        choices = [group[name] for name in self.choices]  # as in torch none may lack
        return (*self.entries(group), *choices, self.takes_numbers(group))

    def trusted(self, param: Tensor) -> bool:
        """Tell whether the fused kernel is right for this dtype and device."""
        return True

    def takes_beside(self, param: Tensor, moment: Tensor) -> bool:
        """Tell whether the fused kernel reads a moment of this dtype."""
        return moment.dtype == param.dtype

    def has_state(self, own: State | None, group: Group) -> bool:
        return bool(own)

    def begin(
        self, own: State, param: Tensor, group: Group, step: Tensor | None
    ) -> None:
        """Make state as torch makes it, in one update, with this counter or its own."""
        if step is None:  # filled on the device: nothing is copied there
            step = torch.zeros((), dtype=torch.float32, device=param.device)
        moments = {
            entry: torch.zeros_like(param, memory_format=torch.preserve_format)
            for entry in self.entries(group)
        }
        own.update(step=step, **moments)  # at once: an interrupt leaves all or nothing

    def fused_call(self, setting: Setting, batch: Batch, scaling: Scaling) -> Call:
        raise NotImplementedError  # pragma: no cover

    def takes_numbers(self, group: Group) -> bool:
        """Tell whether fused kernels take the hyperparameters."""
        # They refuse arrays, flags that are not bool, and a decay in one element.
        values = [value for _, value in self.hyperparameters(group)]
        flags = [group[flag] for flag in self.flags]
        decay = group["weight_decay"]
        return (
            all(map(isinstance, values, repeat(NUMBERS)))
            and all(map(isinstance, flags, repeat(bool)))
            and not (isinstance(decay, Tensor) and decay.ndim)
        )

    def hyperparameters(self, group: Group) -> list[tuple[str, Any]]:
        named = [(name, group[name]) for name in self.numbers]
        if named[-1][0] == "betas":
            named += [("betas", beta) for beta in named.pop()[1]]
        return named

    def refuse_sparse(self, group: Group, decay: Decay, label: str) -> None:
        raise NotImplementedError  # pragma: no cover


class AdamKernel(Kernel):
    """Adam and AdamW: two moments, a third with ``amsgrad``, and a step counter."""

    counts = True
    required = ("lr", "betas", "eps", "weight_decay", "params")
    numbers = ("lr", "eps", "weight_decay", "betas")
    flags = ("amsgrad", "maximize")
    choices = ("foreach", "fused", "capturable", "differentiable")
    applies = ("l2", "decoupled")

    def default_form(self, group: Group) -> Form:
        return "decoupled" if group["decoupled_weight_decay"] else "l2"

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

    def entries(self, group: Group) -> tuple[str, ...]:
        moments = ("exp_avg", "exp_avg_sq")
        return (*moments, "max_exp_avg_sq") if group.get("amsgrad") else moments

    def takes_beside(self, param: Tensor, moment: Tensor) -> bool:
        pair = (param.dtype, moment.dtype)
        # Named in torch's documentation from 2.12 on; torch checks it again.
        mixed = param.is_cuda and pair == (torch.float32, torch.bfloat16)
        return mixed or super().takes_beside(param, moment)

    def fused_call(self, setting: Setting, batch: Batch, scaling: Scaling) -> Call:
        own = {**setting.arguments, **scaling._asdict()}
        own["lr"] = lr_on_device(own["lr"], batch.params)
        decoupled = setting.share.form == "decoupled"
        kernel = _torch.fused_adamw_ if decoupled else _torch.fused_adam_
        largest = batch.moments[2] if own["amsgrad"] else []
        lists = (*(batch.params, batch.grads), *batch.moments[:2], largest, batch.steps)
        return partial(kernel, *lists, **own)

    def refuse_sparse(self, group: Group, decay: Decay, label: str) -> None:
        """Raise as torch does: Adam steps no sparse gradient, decayed or not."""
        raise RuntimeError(
            f"Adam does not support sparse gradients, please consider SparseAdam "
            f"instead; {label} has one. Pass sparse=False to its embedding, or use "
            f"selective_optim.SGD with that parameter exempt."
        )


class SGDKernel(Kernel):
    """SGD: a momentum buffer that starts as the first gradient, and no counter."""

    counts = False
    numbers = ("lr", "momentum", "dampening", "weight_decay")
    required = (*numbers, "params")  # torch takes "nesterov" for False
    flags = ("nesterov", "maximize")
    choices = ("foreach", "fused")
    applies = ("l2",)

    def __init__(self, decoupled: bool = False) -> None:
        self._decoupled = decoupled  # torch's SGD has no key for it in a group

    def default_form(self, group: Group) -> Form:
        decoupled = group.get("decoupled_weight_decay", self._decoupled)
        return "decoupled" if decoupled else "l2"

    @staticmethod
    def direction(
        setting: Setting, grad: Tensor, moments: Sequence[Tensor | None]
    ) -> Tensor:
        """Return the update itself, of momentum and ``nesterov``."""
        own = setting.arguments
        grad = -grad if own["maximize"] else grad
        if not moments or not own["momentum"]:
            return grad
        buffer = grad  # which it begins as, undampened
        if moments[0] is not None:
            damped = (1 - own["dampening"]) * grad
            buffer = own["momentum"] * moments[0] + damped
        return grad + own["momentum"] * buffer if own["nesterov"] else buffer

    def entries(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def trusted(self, param: Tensor) -> bool:
        half = param.dtype in _torch.HALF and param.is_cpu
        return _torch.HALF_SGD_ON_CPU or not half

    def has_state(self, own: State | None, group: Group) -> bool:
        if not group["momentum"]:
            return True
        return (own or {}).get("momentum_buffer") is not None

    def fused_call(self, setting: Setting, batch: Batch, scaling: Scaling) -> Call:
        own = {**setting.arguments, **scaling._asdict(), "is_first_step": False}
        own["lr"] = lr_on_device(own["lr"], batch.params)
        buffers = batch.moments[0] if batch.moments else []
        return partial(_torch.fused_sgd_, batch.params, batch.grads, buffers, **own)

    def refuse_sparse(self, group: Group, decay: Decay, label: str) -> None:
        if not is_zero(decay.of(group["weight_decay"])):
            raise RuntimeError(
                f"{label} has a sparse gradient and decays, which would make the "
                f"gradient dense. Exempt it: wd_policy=exclude(nn.Embedding)."
            )


def require_no_nan(kernel: Kernel, groups: Groups) -> None:
    """Refuse NaN in a hyperparameter; torch steps with all else, as a rate below 0."""
    for index, group in enumerate(groups):
        for name, value in kernel.hyperparameters(group):
            if not isinstance(value, Tensor) and value != value:
                raise ValueError(
                    f"`{name}` of group {index} is {value}, which would make every "
                    f"parameter NaN. Set optimizer.param_groups[{index}][{name!r}] "
                    f"to a number."
                )
