"""What both kernels share: settings, decay read from a group, checks and moves.

A setting is everything but tensors that a kernel is given; parameters with equal
settings can share one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
        device = params[0].device
        # To the CPU without waiting would be read before it is there.
        return lr.to(device, non_blocking=device.type != "cpu")
    return lr


def rounds_away(lr: float | Tensor, wd: float | Tensor, dtype: torch.dtype) -> bool:
    """Tell whether ``1 - lr * wd`` is 1, or next to it, in half precision."""
    if dtype not in HALF or isinstance(lr, Tensor) or isinstance(wd, Tensor):
        return False
    return 0 < lr * wd < torch.finfo(dtype).eps / 2
