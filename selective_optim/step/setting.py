"""What a step works with: decay shared out, numbers and tensors, a scale."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import copysign, inf
from numbers import Real
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import FORMS, Applied, DecayKey, Form, Target, is_zero

Group = dict[str, Any]
Groups = Sequence[Group]
State = dict[str, Any]
States = dict[Tensor, State]
Call = Callable[[], object]
PLAIN = (Tensor, torch.nn.Parameter)
WD = "weight_decay"
PER_PARAM = ("params", "param_names")  # what a group lists per parameter
# Keys by which classes let a group choose its form: of torch, timm, Prodigy and
# D-Adaptation, pytorch_optimizer, optimi. True is decoupled.
FLAGS = (
    *("decoupled_weight_decay", "decoupled_decay", "decouple"),
    *("weight_decouple", "decouple_wd"),
)


def without(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def pick(group: Group, chosen: Sequence[int]) -> Group:
    """Take some parameters of a group, with their names if it has any."""
    return {key: [group[key][i] for i in chosen] for key in PER_PARAM if key in group}


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return what picks these positions out of a list, in C."""
    if len(positions) == 0:
        return lambda items: ()
    if len(positions) == 1:
        return lambda items: (items[positions[0]],)
    return itemgetter(*positions)


def same(a: object, b: object) -> bool:
    """Tell whether two values are one object or, tensors apart, equal."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    # Not `==` for all: tensors would wait for a device, arrays may return anything.
    number_or_text = type(a) in (int, float, bool, str)
    return number_or_text and (a == b or (a != a and b != b))  # two NaNs


def alike(a: object, b: object) -> bool:
    """Tell whether two values are equal, tensors too."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return same(a, b)


class DecayPass(NamedTuple):
    """Decay that the class does not do, and that is done beside its step."""

    applied: Applied
    wd: float | Tensor  # the rate multiplies it, but for "l2"
    target: Target = 0.0  # "init" is a tensor per parameter


class Share(NamedTuple):
    """What of the decay is whose."""

    wd: Any  # what the class is given
    form: Form | None  # what it is told, where a group can tell it
    decay_pass: DecayPass | None = None
    fleeting: bool = False  # follows a tensor's value: to be read at every step


def share(
    group: Group,
    decay_key: DecayKey,
    default: Form | None,
    applies: Collection[str],
    reading: bool = True,
) -> Share:
    """Share out a part's decay: a pass takes what the class cannot be told."""
    decay, lr0, _ = decay_key
    wd = decay.of(group["weight_decay"])
    if is_zero(wd):
        return Share(0.0, default)
    name = decay.form or default
    if name is None:  # the class decays in its own way, which nobody states
        return Share(wd, None)
    form = FORMS[name]
    lr: Any = group.get("lr")
    fleeting = form.follows_lr and isinstance(lr, Tensor)
    # Where that waits for no device and leaves no graph of autograd. A compiled step
    # does not read: it would compile anew for each number.
    if fleeting and reading and lr.is_cpu and not lr.requires_grad:
        lr = lr.item()
    if lr0 is not None or not form.needs_lr0:
        wd = form.strength(wd, lr, lr0)
    # A kernel takes decay as a number, and a step must not wait for the device.
    waits = fleeting and isinstance(wd, Tensor)
    if form.applied in applies and not decay.target and not waits:
        return Share(wd, form.applied, None, fleeting)
    decay_pass = DecayPass(form.applied, wd, decay.target or 0.0)
    return Share(0.0, default, decay_pass, fleeting)


def chosen_form(group: Group) -> Form | None:
    """Tell the form that a group chooses, if its class lets it."""
    for flag in FLAGS:
        if flag in group:
            return "decoupled" if group[flag] else "l2"
    return None


def share_of(group: Group, decay_key: DecayKey, form: Form | None) -> Share:
    """Share the decay of a part out between a class, with its form, and a pass."""
    if chosen := chosen_form(group):
        return share(group, decay_key, chosen, ("l2", "decoupled"))
    return share(group, decay_key, form, (form,) if form else ())


class Setting(NamedTuple):
    """What a kernel is given besides tensors."""

    arguments: dict[str, Any]  # of torch's fused kernel, by name
    share: Share

    @property
    def live(self) -> bool:
        """Whether calls must be bound anew at every step: a tensor may change."""
        decay_pass = self.share.decay_pass
        return isinstance(self.arguments["lr"], Tensor) or (
            decay_pass is not None and isinstance(decay_pass.wd, Tensor)
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """What must be equal for parameters to share a call."""
        decay_pass = self.share.decay_pass or ()
        values = (*self.arguments.values(), self.share.form, *decay_pass)
        try:
            hash(values)
        except TypeError:  # an array as a rate, which is itself alone
            return tuple(map(id, values))
        # Equal numbers of other types, and zeros of other signs, compute otherwise.
        signs = [copysign(1, v) for v in values if isinstance(v, float) and v == 0]
        return (*values, *map(type, values), *signs)


@dataclass
class Batch:
    """The tensors of one kernel call, parameter by parameter in every list."""

    params: list[Tensor]  # local shards where sharded
    moments: list[list[Any]]  # by entry of the state; None is one that is yet to begin
    steps: list[Tensor]  # empty where the kernel has no counters
    targets: list[Tensor] = field(default_factory=list)  # where that is a tensor each
    grads: list[Tensor] = field(default_factory=list)  # filled anew at every step


# Of a gradient and its moments before the step: what has the sign of the update.
Direction = Callable[[Tensor, Sequence[Tensor | None]], Tensor]


def lr_on_device(lr: float | Tensor, params: Sequence[Tensor]) -> float | Tensor:
    """Move a tensor learning rate to its parameters, as torch does; the CPU stays."""
    moves = isinstance(lr, Tensor) and not lr.is_cpu and params
    return _moved(lr, params[0].device) if moves else lr


def _moved(scalar: Any, device: torch.device) -> Any:
    # To the CPU without waiting would be read before it is there.
    return scalar.to(device, non_blocking=device.type != "cpu")


class Scaling(NamedTuple):
    """What a ``GradScaler`` hands over, on one device; fused kernels see to it."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


NO_SCALING = Scaling()


def scaling_of(optimizer: object) -> Scaling:
    """Read what a ``GradScaler`` sets on an optimizer (torch/amp/grad_scaler.py)."""
    grad_scale = getattr(optimizer, "grad_scale", None)
    found_inf = getattr(optimizer, "found_inf", None)
    if grad_scale is None and found_inf is None:
        return NO_SCALING
    return Scaling(grad_scale, found_inf)


def scaling_on(scaling: Scaling, device: torch.device) -> Scaling:
    scale, found_inf = scaling
    return Scaling(
        None if scale is None else _moved(scale, device),
        # GradScaler sums over devices, and kernels look for exactly 1.
        None if found_inf is None else _moved(found_inf, device).clamp(max=1.0),
    )


def unscale_(grads: Sequence[Tensor], grad_scale: Tensor) -> None:
    """Divide gradients of one device by the scale, as ``GradScaler.unscale_`` does."""
    device = grads[0].device
    inverse = grad_scale.double().reciprocal().float().to(device)
    values = [_torch.sparse_values(g) if g.is_sparse else g for g in grads]
    unread = torch.zeros((), dtype=torch.float32, device=device)
    _torch.amp_unscale_(values, unread, inverse)


def unless_dropped(found_inf: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return what is new, or where infinity was found what is old, on the device."""
    return torch.where(found_inf.bool(), old, new)


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


def is_moving(group: Mapping[str, Any]) -> bool:
    """Tell whether a step moves parameters, as it may if the rate is not known."""
    return rate_now(group) != 0


def is_rate(value: Any) -> bool:
    """Tell whether this is a rate to divide by, without another polarity."""
    return isinstance(value, Real) and 0 < float(value) < inf
