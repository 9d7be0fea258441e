"""How SGD reaches torch's kernels; state entries are torch's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import Decay, Form, is_zero
from selective_optim.step.kernel import (
    NO_SCALING,
    Batch,
    Call,
    Group,
    Kernel,
    Scaling,
    Setting,
    State,
    States,
    lr_on_device,
    wd_of,
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
    traced_lists = ("params", "grads", "momentum_buffer")

    def __init__(self, decoupled: bool = False) -> None:
        self._decoupled = decoupled

    def decoupled(self, group: Group, form: Form | None) -> bool:
        default = group.get("decoupled_weight_decay", self._decoupled)
        return form == "decoupled" if form else bool(default)

    def setting(self, group: Group, decay: Decay, first: bool = False) -> Setting:
        wd = wd_of(group, decay)
        decoupled = self.decoupled(group, decay.form)
        return Setting(
            {
                "lr": group["lr"],
                "momentum": group["momentum"],
                # See `begin`: a buffer begins as the gradient, undampened.
                "dampening": 0.0 if first else group["dampening"],
                "weight_decay": 0.0 if decoupled else wd,
                "nesterov": group["nesterov"],
                "maximize": group["maximize"],
                "foreach": group["foreach"],
                "fused": group["fused"],
            },
            shrink=wd if decoupled else 0.0,
        )

    def entries(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def structure(self, group: Group) -> tuple[object, ...]:
        numbers = (group["momentum"] != 0, group["dampening"] != 0)
        flags = [group[name] for name in ("foreach", "fused", "differentiable")]
        return (*numbers, *flags, self.takes_numbers(group))

    def trusted(self, param: Tensor) -> bool:
        half = param.dtype in _torch.HALF and param.is_cpu
        right = _torch.HALF_SGD_ON_CPU or not half
        return right and _torch.fused_sgd_ is not None

    def has_state(self, own: State | None, group: Group) -> bool:
        if not group["momentum"]:
            return True
        return (own or {}).get("momentum_buffer") is not None

    def begin(
        self, own: State, param: Tensor, group: Group, fused: bool, step: Tensor | None
    ) -> None:
        """Make a buffer from which the fused kernel computes what torch's begins with.

        torch copies the first gradient. ``momentum * -0.0 + grad`` is that gradient
        to the bit, zeros and their signs included, and stays so through any number
        of steps that a scaler drops, of which the host then need not know.
        """
        if fused:
            own["momentum_buffer"] = torch.full_like(
                param, -0.0, memory_format=torch.preserve_format
            )

    def unbegin(self, own: State, group: Group) -> None:
        """Take back a buffer that holds no gradient where dampening would tell.

        It is as `begin` made it. Asking waits for the device, which it does when
        dampening is switched on, and never again.
        """
        buffer = own.get("momentum_buffer")
        if buffer is None or not group["dampening"]:
            return
        buffer = _torch.shard_of(buffer)
        if buffer.numel() and not buffer.any() and torch.signbit(buffer).all():
            del own["momentum_buffer"]

    def calls(self, setting: Setting, batch: Batch, scaling: Scaling) -> list[Call]:
        own = dict(setting.arguments)
        del own["foreach"], own["fused"]
        own["lr"] = lr_on_device(own["lr"], batch.params)
        buffers = batch.moments[0] if batch.moments else []
        own |= {"is_first_step": False, **scaling._asdict()}
        kernel = partial(_torch.fused_sgd_, batch.params, batch.grads, buffers, **own)
        return [*self._shrinking(setting, batch.params, scaling.found_inf), kernel]

    def _shrinking(
        self, setting: Setting, params: list[Tensor], found_inf: Tensor | None = None
    ) -> list[Call]:
        """Return the calls of decoupled decay: ``param = param * (1 - lr * wd)``."""
        if is_zero(setting.shrink) or not params:
            return []
        factor = 1 - lr_on_device(setting.arguments["lr"], params) * setting.shrink
        if isinstance(factor, Tensor):
            factor = factor.squeeze()
        if found_inf is not None:
            return [partial(_shrink_unless_, params, factor, found_inf)]
        # On the CPU foreach rounds the factor to half precision first, mul_ does not.
        if any(param.is_cpu and param.dtype in _torch.HALF for param in params):
            return [partial(torch.Tensor.mul_, param, factor) for param in params]
        return [partial(_torch.foreach_mul_, params, factor)]

    def functional(
        self,
        setting: Setting,
        params: list[Tensor],
        grads: list[Tensor],
        owns: Sequence[State],
    ) -> None:
        buffers = [own.get("momentum_buffer") for own in owns]
        sparse = any(grad.is_sparse for grad in grads)
        self.traced(setting, [params, grads, buffers], sparse)
        if setting.arguments["momentum"]:
            for own, buffer in zip(owns, buffers):
                own["momentum_buffer"] = buffer

    def traced(
        self,
        setting: Setting,
        lists: list[list[Any]],
        flag: bool,
        scaling: Scaling = NO_SCALING,
    ) -> None:
        for call in self._shrinking(setting, lists[0], scaling.found_inf):
            call()
        given = {} if scaling == NO_SCALING else scaling._asdict()
        _torch.sgd(*lists, has_sparse_grad=flag, **setting.arguments, **given)

    def keep(self, states: States, lists: list[list[Any]]) -> None:
        params, _, buffers = lists
        for param, buffer in zip(params, buffers):
            states[param]["momentum_buffer"] = buffer

    def multiplied(self, setting: Setting, fused: bool) -> float | Tensor:
        rate: float | Tensor = setting.arguments["lr"] * setting.shrink
        return rate

    def hyperparameters(self, group: Group) -> Iterable[tuple[str, Any]]:
        names = ("lr", "momentum", "dampening", "weight_decay")
        return [(name, group[name]) for name in names]

    def refuse_sparse(self, group: Group, decay: Decay, label: str) -> None:
        if not is_zero(wd_of(group, decay)):
            raise RuntimeError(
                f"{label} has a sparse gradient and decays, which would make the "
                f"gradient dense. Exempt it: wd_policy=exclude(nn.Embedding)."
            )


def _shrink_unless_(
    params: list[Tensor], factor: float | Tensor, found_inf: Tensor
) -> None:
    """Multiply in place where no infinity was found, without asking the device."""
    dropped = found_inf.bool()
    for param in params:
        param.copy_(torch.where(dropped, param, param * factor))
