"""What is decided for one parameter: how much decay, in which form, and why.

The one vocabulary that both wings share: policies yield it, steps apply it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Form = Literal["l2", "decoupled"]

REMEDY = "Use 0 to exempt a parameter, 1 to decay it in full."


def broken_rule(value: object) -> tuple[type[Exception], str] | None:
    """Tell which rule a multiplier breaks, if any, and the kind of error that is."""
    if not isinstance(value, Real):
        return TypeError, "a multiplier must be a number"
    if not 0 <= float(value) < math.inf:
        return ValueError, "a multiplier must be finite and >= 0"
    return None


@dataclass(frozen=True)
class Decay:
    """How one parameter decays.

    Args:
        multiplier: Factor on ``group["weight_decay"]``, finite and >= 0. A
            positive one means decayed, 0 means exempt.
        form: ``"l2"``, ``"decoupled"``, or ``None`` for what the optimizer does.

    Raises:
        TypeError: ``multiplier`` is not a number.
        ValueError: ``multiplier`` is negative, infinite or NaN, or ``form`` is unknown.
    """

    multiplier: float = 1.0
    form: Form | None = None

    def __post_init__(self) -> None:
        if broken := broken_rule(self.multiplier):
            kind, rule = broken
            raise kind(f"{rule}, not {self.multiplier!r}. {REMEDY}")
        if self.form not in (None, *get_args(Form)):
            raise ValueError(
                f'`form` must be "l2", "decoupled" or None, not {self.form!r}. '
                f'Write for example Decay(1, "l2").'
            )
        object.__setattr__(self, "multiplier", float(self.multiplier))

    def __mul__(self, other: object) -> Decay:
        if not isinstance(other, Decay):
            return NotImplemented
        return Decay(self.multiplier * other.multiplier, other.form or self.form)

    def __repr__(self) -> str:
        form = f", {self.form!r}" if self.form else ""
        return f"Decay({number_text(self.multiplier)}{form})"


def number_text(value: float) -> str:
    """Print a number as short as reads back the same: ``1`` and not ``1.0``."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def is_zero(value: float | Tensor) -> bool:
    """Tell whether a number is 0; a tensor may change and never counts as 0."""
    return not isinstance(value, Tensor) and value == 0


FULL, EXEMPT = Decay(1.0), Decay(0.0)


def as_decay(value: object) -> Decay:
    """Read what a policy may yield: a ``Decay``, a number, or a bool."""
    if isinstance(value, Decay):
        return value
    return Decay(value)  # type: ignore[arg-type]  # Decay checks it


class Verdict(NamedTuple):
    """A decay and the reason for it, in the words of the policy that decided."""

    decay: Decay
    reason: str


class Decision(NamedTuple):
    """A verdict on one parameter, with what was known of it when it was taken.

    Args:
        decay: How it decays.
        reason: The selector or policy that decided.
        name: Canonical name, or ``None`` where no name is known.
        shape: Original shape; the present one where that is lost.
        kinds: Class of the module that holds it, and that class's bases; empty
            where no module is known.
        own_name: The name that tells it from others that share ``name``: what a
            parametrization made several of, as weight norm; else ``None``.
    """

    decay: Decay
    reason: str
    name: str | None
    shape: torch.Size
    kinds: tuple[str, ...]
    own_name: str | None = None

    @property
    def telling_name(self) -> str | None:
        """The name by which reports tell it from every other parameter."""
        return self.own_name or self.name

    def label(self, group: int, position: int) -> str:
        """Name the parameter as a message should: by name if known, else by place."""
        name = self.telling_name
        return repr(name) if name else f"parameter {position} of group {group}"
