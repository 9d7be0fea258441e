"""How the decay of a part is shared out: a number for its class, or a pass."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from torch import Tensor

from selective_optim.decay import FORMS, DecayKey, Form, Target, is_zero

Group = dict[str, Any]


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
