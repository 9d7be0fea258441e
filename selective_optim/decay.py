"""The decision for one parameter: how much decay, in which form, and why.

A new form is a name in ``Form`` and a row of ``FORMS``, which all other code asks. Then
``Decay``, ``policies.form`` and ``docs/forms.md`` tell users what it does. A new way to
apply decay is also a word of ``Applied`` and a branch in ``_move_`` of
``step/decay_passes.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from numbers import Real
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Form = Literal["l2", "decoupled", "independent", "corrected", "cautious"]
# "l2" adds to the gradient, the others move the parameter or a part of it.
Applied = Literal["l2", "decoupled", "cautious"]
Number = float | Tensor


class FormKind(NamedTuple):
    """What a form does, per step and element, before torch's update."""

    applied: Applied
    # Of wd, lr, and lr0, which is known where it is needed.
    strength: Callable[..., Number] = lambda wd, lr, lr0: wd
    needs_lr0: bool = False
    follows_lr: bool = False  # the strength changes with the rate of now


# With rate lr, decay wd, parameter p, target t (0 by default), gradient g, and u, by lr
# times which torch lowers the parameter.
FORMS: dict[Form, FormKind] = {
    # g += wd * (p - t)
    "l2": FormKind("l2"),
    # p -= lr * wd * (p - t)
    "decoupled": FormKind("decoupled"),
    # p -= lr / lr0 * wd * (p - t)
    "independent": FormKind("decoupled", lambda wd, lr, lr0: wd / lr0, needs_lr0=True),
    # p -= lr ** 2 / lr0 * wd * (p - t)
    # The quotient first: where lr is lr0, it is 1 and wd stays as it is.
    "corrected": FormKind(
        "decoupled",
        lambda wd, lr, lr0: wd * (lr / lr0),
        needs_lr0=True,
        follows_lr=True,
    ),
    # p -= lr * wd * (p - t) where u * (p - t) >= 0
    "cautious": FormKind("cautious"),
}
FORM_NAMES = ", ".join(f'"{name}"' for name in FORMS)
INIT: Literal["init"] = "init"
Target = float | Literal["init"]

TARGET_RULE = f'a target must be a finite number or "{INIT}"'
TARGET_WAY_OUT = "Write for example towards(1.0, is_norm)."
REMEDY = "Use 0 to exempt a parameter, 1 to decay it in full."
FIXED_WAY_OUT = 'Write for example fixed(0.05, "head.*") or Decay(fixed=0.05).'
SMALL = 0.01  # multipliers under it read like decays


def broken_rule(
    value: object, what: str = "a multiplier"
) -> tuple[type[Exception], str] | None:
    """Tell which rule a number breaks, if any, and the kind of error that is."""
    if not isinstance(value, Real):
        return TypeError, f"{what} must be a number"
    if not 0 <= float(value) < math.inf:
        return ValueError, f"{what} must be finite and >= 0"
    return None


def _require(value: object, what: str, way_out: str) -> float:
    if broken := broken_rule(value, what):
        kind, rule = broken
        raise kind(f"{rule}, not {value!r}. {way_out}")
    return float(value)  # type: ignore[arg-type]  # the rule says so


@dataclass(frozen=True)
class Decay:
    """How one parameter decays.

    Args:
        multiplier: Factor on ``group["weight_decay"]``, finite and >= 0. A
            positive one means decayed, 0 means exempt.
        form: ``"l2"``, ``"decoupled"``, ``"independent"``, ``"corrected"`` or
            ``"cautious"``, see ``policies.form``; ``None`` for the optimizer's own.
        target: Value that it decays towards: a finite number, or ``"init"``, its value
            when training begins; ``None`` is 0.
        fixed: Decay in place of ``group["weight_decay"]``, finite and >= 0. A change
            of ``group["weight_decay"]`` does not change it. The multiplier applies.

    Raises:
        TypeError: ``multiplier``, ``target`` or ``fixed`` has a wrong type.
        ValueError: ``multiplier`` or ``fixed`` is negative, infinite or NaN, ``form``
            is unknown, or ``target`` is infinite or NaN.
    """

    multiplier: float = 1.0
    form: Form | None = None
    target: Target | None = None
    fixed: float | None = None

    def __post_init__(self) -> None:
        multiplier = _require(self.multiplier, "a multiplier", REMEDY)
        if self.fixed is not None:
            fixed = _require(self.fixed, "a fixed decay", FIXED_WAY_OUT)
            object.__setattr__(self, "fixed", fixed)
            multiplier = multiplier if fixed else 0.0  # exempt in every product
        if self.form is not None and self.form not in FORMS:
            raise ValueError(
                f"`form` must be {FORM_NAMES} or None, not {self.form!r}. "
                f'Write for example Decay(1, "l2").'
            )
        object.__setattr__(self, "multiplier", multiplier)
        object.__setattr__(self, "target", _as_target(self.target))

    def __mul__(self, other: object) -> Decay:
        if not isinstance(other, Decay):
            return NotImplemented
        target = self.target if other.target is None else other.target
        fixed = self.fixed if other.fixed is None else other.fixed
        product = self.multiplier * other.multiplier
        return Decay(product, other.form or self.form, target, fixed)

    def __repr__(self) -> str:
        form = f", {self.form!r}" if self.form else ""
        target = "" if self.target is None else f", target={target_text(self.target)}"
        fixed = "" if self.fixed is None else f", fixed={number_text(self.fixed)}"
        return f"Decay({number_text(self.multiplier)}{form}{target}{fixed})"

    def of(self, wd: Any) -> Any:
        """Return the effective decay, of that of a group unless it is fixed."""
        multiplier = self.multiplier
        wd = wd if self.fixed is None else self.fixed
        return wd if multiplier == 1 else 0.0 if multiplier == 0 else wd * multiplier

    @property
    def settled(self) -> Decay:
        """Without a target of 0, which only overrules, and with all of ``fixed``."""
        plain = replace(self, target=None) if self.target == 0 else self
        if self.fixed is None:
            return plain
        wd = self.of(0.0)
        return replace(plain, multiplier=float(wd > 0), fixed=wd or None)

    @property
    def stated(self) -> str:
        """What it says besides a multiplier, for messages; empty if nothing."""
        form = f"the form {self.form!r}" if self.form else ""
        target = f"the target {target_text(self.target)}" if self.target else ""
        return " and ".join(filter(None, [form, target]))

    @property
    def needs_lr0(self) -> bool:
        """Whether its strength depends on the rate that training began with."""
        return bool(self.form and FORMS[self.form].needs_lr0 and self.multiplier)

    @property
    def needs_init(self) -> bool:
        """Whether it pulls towards what the parameter was when it was decided."""
        return self.target == INIT and self.multiplier != 0


def _as_target(value: object) -> Target | None:
    if value is None or (isinstance(value, str) and value == INIT):
        return value
    message = f"{TARGET_RULE}, not {value!r}. {TARGET_WAY_OUT}"
    if not isinstance(value, (Real, str)):
        raise TypeError(message)
    if isinstance(value, str) or not math.isfinite(value):
        raise ValueError(message)
    return float(value)


def target_text(target: Target) -> str:
    """Print a target as it is written: ``1`` or ``'init'``."""
    return repr(target) if isinstance(target, str) else number_text(target)


def number_text(value: float) -> str:
    """Print a number as short as reads back the same: ``1`` and not ``1.0``."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def is_zero(value: float | Tensor) -> bool:
    """Tell whether a number is 0; a tensor may change and never counts as 0."""
    return not isinstance(value, Tensor) and value == 0


def none_decays(groups: Iterable[dict[str, Any]]) -> bool:
    """Tell whether the decay of every group is 0 now."""
    return all(map(is_zero, map(itemgetter("weight_decay"), groups)))


FULL, EXEMPT = Decay(1.0), Decay(0.0)


def as_decay(value: Any) -> Decay:
    """Read what a policy may yield: a ``Decay``, a number, or a bool."""
    return value if isinstance(value, Decay) else Decay(value)


class DecayKey(NamedTuple):
    """All of a decision that a number depends on; what is equal in it decays alike."""

    decay: Decay
    lr0: float | None = None  # where the form needs it
    later: Decay | None = None  # once there is a target, which is waited for

    @property
    def decided(self) -> Decay:
        """What the policy says, also if it waits."""
        return self.later or self.decay


class Answer(NamedTuple):
    """A decay and the reason for it, in the words of the policy that decided."""

    decay: Decay
    reason: str


class Decision(NamedTuple):
    """A policy's answer for one parameter, and what was then known of that."""

    decay: Decay
    reason: str  # the selector or policy that decided
    name: str | None  # canonical
    shape: torch.Size  # original; the present one where that is lost
    kinds: tuple[str, ...]  # class of the module that holds it, and that class's bases
    # Of what a parametrization made several of, as weight norm, which share `name`.
    own_name: str | None = None
    # The group's rate when it was added, or the "initial_lr" that it came with.
    lr0: float | None = None
    init: Tensor | None = None  # from the beginning of training on, if that is a target

    @property
    def waits(self) -> bool:
        """Whether what it decays towards is yet to be taken, and nothing pulls."""
        return self.init is None and self.decay.needs_init

    @property
    def decay_key(self) -> DecayKey:
        if self.waits:
            return DecayKey(EXEMPT, None, self.decay)
        return DecayKey(self.decay, self.lr0 if self.decay.needs_lr0 else None)

    def begin(self) -> dict[str, Any]:
        """Return what its decay depends on besides multiplier and form, if anything."""
        known = {
            "fixed": self.decay.fixed,
            "target": self.decay.target if self.decay.multiplier else None,
            "lr0": self.decay_key.lr0,
            "init": self.init,
        }
        return {key: value for key, value in known.items() if value is not None}

    @property
    def telling_name(self) -> str | None:
        """The name by which reports tell it from every other parameter."""
        return self.own_name or self.name

    def label(self, group: int, position: int) -> str:
        name = self.telling_name
        return repr(name) if name else f"parameter {position} of group {group}"
