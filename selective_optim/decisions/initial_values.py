"""What training began with: the rate and the values that some decay depends on.

Forms that follow a schedule divide by the rate that a group was added with; decay
towards ``"init"`` pulls to the values before the first step in which the rate of the
group is not 0. Both stay outside of groups and state, and are recorded in the state
dict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from selective_optim import _torch
from selective_optim._text import shape_text
from selective_optim.decay import Decision
from selective_optim.parameters import ParameterInfo


def base_rate(group: Mapping[str, Any]) -> float | None:
    """Return the rate that schedules of a group start from, if that is a number."""
    rate: Any = group.get("initial_lr", group.get("lr"))
    try:
        return float(rate.detach() if isinstance(rate, Tensor) else rate)
    except (TypeError, ValueError, RuntimeError):  # None, or a tensor without a value
        return None


def rate_now(group: Mapping[str, Any]) -> float | None:
    """Return the rate of a group, if that is a number that waits for no device."""
    rate = group.get("lr")
    waits = isinstance(rate, Tensor) and not rate.is_cpu
    return None if waits else base_rate({"lr": rate})


def require_rates(
    decisions: Iterable[Decision], infos: Iterable[ParameterInfo]
) -> None:
    """Check that training begins with a rate where a form needs it.

    Raises:
        ValueError: There is none.
    """
    for decision, info in zip(decisions, infos):
        if decision.decay.needs_lr0 and not is_rate(decision.lr0):
            known = decision.telling_name
            name = repr(known) if known else f"a parameter of group {info.group}"
            raise ValueError(
                f"{name} decays in form {decision.decay.form!r}, which divides by the "
                f"rate that training begins with, and that is {decision.lr0}. Give its "
                f"group that rate: dict(params=..., lr=0.0, initial_lr=3e-4)."
            )


def is_moving(group: Mapping[str, Any]) -> bool:
    """Tell whether a step moves parameters; a rate on a device is not waited for."""
    rate = group.get("lr", 1.0)
    on_device = isinstance(rate, Tensor) and not rate.is_cpu
    return on_device or bool(rate != 0)


def is_rate(value: Any) -> bool:
    """Tell whether this is a rate to divide by, without another polarity."""
    return isinstance(value, Real) and 0 < float(value) < math.inf


def beside(init: Tensor, param: Tensor, name: str | None) -> Tensor:
    """Bring what a parameter decays towards to where that lies now, and shard it.

    Raises:
        ValueError: Their shapes are others.
    """
    if init.shape != param.shape:
        raise ValueError(
            f"{repr(name) if name else 'a parameter'} decays towards what it was in "
            f"shape {shape_text(init.shape)}, and has shape {shape_text(param.shape)} "
            f"now. Assign optimizer.wd_policy to decide anew."
        )
    return _torch.placed_as(init.to(param.device, param.dtype), param)
