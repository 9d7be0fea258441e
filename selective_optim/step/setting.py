"""What a kernel is given: a setting of numbers, and a batch of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import copysign
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selective_optim.step.share import DecayPass

Group = dict[str, Any]
Groups = Sequence[Group]
State = dict[str, Any]
States = dict[Tensor, State]
Call = Callable[[], object]
PLAIN = (Tensor, torch.nn.Parameter)


class Setting(NamedTuple):
    """What a kernel is given besides tensors.

    Args:
        arguments: Of torch's functional, by name.
        decay_pass: Decay to apply before the kernel runs, which then decays nothing.
        fleeting: Whether it must be read anew at every step, as it depends on the
            value of a tensor.
    """

    arguments: dict[str, Any]
    decay_pass: DecayPass | None = None
    fleeting: bool = False

    @property
    def live(self) -> bool:
        """Tell whether calls must be bound anew at every step: a tensor may change."""
        own = isinstance(self.arguments["lr"], Tensor)
        other = self.decay_pass
        return own or (other is not None and isinstance(other.wd, Tensor))

    @property
    def key(self) -> tuple[Any, ...]:
        """What must be equal for parameters to share a call."""
        values = (*self.arguments.values(), *(self.decay_pass or ()))
        try:
            hash(values)
        except TypeError:  # an array as a rate, which is itself alone
            return tuple(map(id, values))
        # Equal numbers of other types, and zeros of other signs, compute otherwise.
        signs = [copysign(1, v) for v in values if isinstance(v, float) and v == 0]
        return (*values, *map(type, values), *signs)


@dataclass
class Batch:
    """The tensors of one kernel call, parameter by parameter in every list.

    Args:
        params: Parameters as the kernel gets them: local shards where sharded.
        moments: One list per state entry that is shaped like the parameter; ``None``
            stands for one that is yet to begin.
        steps: Step counters; empty where the kernel has none.
        targets: What parameters decay towards, where that is a tensor for each.
        grads: Gradients, filled anew at every step.
    """

    params: list[Tensor]
    moments: list[list[Any]]
    steps: list[Tensor]
    targets: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)


# Of a gradient and its moments before the step: what has the sign of the update.
Direction = Callable[[Tensor, Sequence[Tensor | None]], Tensor]


def lr_on_device(lr: float | Tensor, params: Sequence[Tensor]) -> float | Tensor:
    """Move a tensor learning rate to its parameters, as torch does; the CPU stays."""
    if isinstance(lr, Tensor) and not lr.is_cpu and params:
        device = params[0].device
        # See `Scalings.on` in `grad_scaler`.
        return lr.to(device, non_blocking=device.type != "cpu")
    return lr
