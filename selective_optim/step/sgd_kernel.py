"""How SGD reaches torch's kernels; state entries are torch's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import Decay, DecayKey, Form, is_zero
from selective_optim.step.grad_scaler import Scaling
from selective_optim.step.kernel import Kernel
from selective_optim.step.setting import (
    Batch,
    Call,
    Group,
    Setting,
    State,
    lr_on_device,
)


class SGDKernel(Kernel):
    """SGD: a momentum buffer that starts as the first gradient, and no counter.

    Args:
        decoupled: Decay the parameter itself where no form is stated; torch has
            no key for it in the group.
    """

    counts = False
    required = (
        *("lr", "momentum", "dampening"),
        *("weight_decay", "nesterov", "params"),
    )

    flags = ("nesterov", "maximize")

    def __init__(self, decoupled: bool = False) -> None:
        self._decoupled = decoupled

    own_forms = ("l2",)

    def default_form(self, group: Group) -> Form:
        decoupled = group.get("decoupled_weight_decay", self._decoupled)
        return "decoupled" if decoupled else "l2"

    def setting(
        self, group: Group, decay_key: DecayKey, reading: bool = True
    ) -> Setting:
        wd, _, decay_pass, fleeting = self.share(group, decay_key, reading)
        return Setting(
            {
                "lr": group["lr"],
                "momentum": group["momentum"],
                "dampening": group["dampening"],
                "weight_decay": wd,
                "nesterov": group["nesterov"],
                "maximize": group["maximize"],
                "foreach": group["foreach"],
                "fused": group["fused"],
            },
            decay_pass,
            fleeting,
        )

    def entries(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def structure(self, group: Group) -> tuple[object, ...]:
        numbers = (group["momentum"] != 0, group["dampening"] != 0)
        flags = [group[name] for name in ("foreach", "fused", "differentiable")]
        return (*numbers, *flags, self.takes_numbers(group))

    def trusted(self, param: Tensor) -> bool:
        half = param.dtype in _torch.HALF and param.is_cpu
        return _torch.HALF_SGD_ON_CPU or not half

    def has_state(self, own: State | None, group: Group) -> bool:
        if not group["momentum"]:
            return True
        return (own or {}).get("momentum_buffer") is not None

    def fused_call(self, setting: Setting, batch: Batch, scaling: Scaling) -> Call:
        own = dict(setting.arguments)
        del own["foreach"], own["fused"]
        own["lr"] = lr_on_device(own["lr"], batch.params)
        own |= {"is_first_step": False, **scaling._asdict()}
        buffers = batch.moments[0] if batch.moments else []
        return partial(_torch.fused_sgd_, batch.params, batch.grads, buffers, **own)

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

    def hyperparameters(self, group: Group) -> Iterable[tuple[str, Any]]:
        names = ("lr", "momentum", "dampening", "weight_decay")
        return [(name, group[name]) for name in names]

    def refuse_sparse(self, group: Group, decay: Decay, label: str) -> None:
        if not is_zero(decay.of(group["weight_decay"])):
            raise RuntimeError(
                f"{label} has a sparse gradient and decays, which would make the "
                f"gradient dense. Exempt it: wd_policy=exclude(nn.Embedding)."
            )
