"""What a step works with: how decay is shared out, settings, batches of tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from math import copysign
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from selective_optim.decay import FORMS, DecayKey, Form, Target, is_zero

Group = dict[str, Any]
Groups = Sequence[Group]
State = dict[str, Any]
States = dict[Tensor, State]
Call = Callable[[], object]
PLAIN = (Tensor, torch.nn.Parameter)


class DecayPass(NamedTuple):
    """Decay that the class does not do, and that is done beside its step.

    Args:
        applied: What it does to the tensors, see ``decay.FORMS``.
        wd: How strongly; the rate multiplies it, but for ``"l2"``.
        target: Towards what; ``"init"`` is a tensor per parameter.
    """

    applied: Literal["l2", "decoupled", "cautious"]
    wd: float | Tensor
    target: Target = 0.0


class Share(NamedTuple):
    """What of the decay is whose.

    Args:
        wd: The decay that the class is given.
        form: The form that it is told, where a group can tell it.
        decay_pass: What is done beside its step.
        fleeting: Whether this must be read anew at every step, as it depends on the
            value of a tensor.
    """

    wd: Any
    form: Form | None
    decay_pass: DecayPass | None = None
    fleeting: bool = False


def share(
    group: Group,
    decay_key: DecayKey,
    default: Form | None,
    own_forms: Collection[str],
    reading: bool = True,
) -> Share:
    """Share the decay of a part out between its class and a pass.

    Args:
        group: The user's group.
        decay_key: What was decided for the part.
        default: The form in which the class decays by itself, if that is known.
        own_forms: The forms that it can be told, given a number.
        reading: Whether to read the number in a rate that is a tensor on the CPU. A
            compiled step compiles anew where that number is another.
    """
    decay, lr0 = decay_key
    wd = decay.of(group["weight_decay"])
    if is_zero(wd):
        return Share(0.0, default)
    kind = decay.form or default
    if kind is None:  # the class decays in its own way, which nobody states
        return Share(wd, None)
    form = FORMS[kind]
    fleeting = form.follows_lr and isinstance(group["lr"], Tensor)
    if lr0 is not None:
        lr = _rate(group["lr"]) if fleeting and reading else group["lr"]
        wd = form.strength(wd, lr, lr0)
    # A kernel's decay is a number; one on a device is not to be waited for.
    waits = fleeting and isinstance(wd, Tensor)
    if form.applied in own_forms and not decay.target and not waits:
        return Share(wd, form.applied, None, fleeting)
    beside = DecayPass(form.applied, wd, decay.target or 0.0)
    return Share(0.0, default, beside, fleeting)


def _rate(lr: Tensor) -> float | Tensor:
    """Read a rate where that waits for no device and leaves no graph of autograd."""
    return lr.item() if lr.is_cpu and not lr.requires_grad else lr


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
