"""What every policy can do: decide, say what it needs, be multiplied by another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from torch import nn

from selective_optim._text import received
from selective_optim.decay import FULL, Decay, Verdict
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.selectors import Need, Selector


class Policy:
    """A frozen map from parameters to decays; ``a * b`` applies both."""

    selectors: tuple[Selector, ...] = ()  # which this policy asks
    missing_ok: bool = False  # whether they may all match nothing

    @property
    def needs(self) -> frozenset[Need]:
        """What must be known of a parameter before this policy can decide."""
        return frozenset[Need]().union(*[selector.needs for selector in self.selectors])

    @property
    def required(self) -> tuple[Selector, ...]:
        """The selectors that must match at least one parameter."""
        asked = () if self.missing_ok else self.selectors
        return tuple([each for selector in asked for each in selector.required])

    def decide(self, info: ParameterInfo) -> Verdict:
        """Decide for one parameter and say why."""
        raise NotImplementedError  # pragma: no cover

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        """Return the policy after a look at the modules that it will be asked about."""
        return self

    def __call__(self, info: ParameterInfo) -> Decay:
        return self.decide(info).decay

    def __mul__(self, other: object) -> Policy:
        if isinstance(other, Policy):
            return Product(self, other)
        raise TypeError(_not_joined(self, "*", other))

    def __rmul__(self, other: object) -> Policy:
        raise TypeError(_not_joined(other, "*", self))

    def __add__(self, other: object) -> Policy:
        raise TypeError(_not_joined(self, "+", other))

    def __or__(self, other: object) -> Policy:
        raise TypeError(_not_joined(self, "|", other))

    def __and__(self, other: object) -> Policy:
        raise TypeError(_not_joined(self, "&", other))


def _not_joined(left: object, sign: str, right: object) -> str:
    """Tell how two things are joined that someone tried to join otherwise."""
    what = "policies multiply with policies" if sign == "*" else "policies are joined"
    shown = f"{what}, not {received(left)} {sign} {received(right)}"
    policy, other = (left, right) if isinstance(left, Policy) else (right, left)
    if isinstance(other, Real):
        way_out = f"{policy!r} * scale(everything, by={other})"
    elif isinstance(other, Policy):
        shown = f"policies are joined with `*`, not with `{sign}`"
        way_out = f"{left!r} * {right!r}"
    elif isinstance(other, str):
        way_out = f"{policy!r} * named({other!r})"
    elif isinstance(other, Selector):
        way_out = f"{policy!r} * exclude({other!r})"
    else:
        way_out = f"{policy!r} * as_policy(...)"
    return f"{shown}. Write {way_out}."


@dataclass(frozen=True, repr=False)
class Product(Policy):
    """Two policies at once: multipliers multiply, the right-hand form wins."""

    left: Policy
    right: Policy

    def __repr__(self) -> str:
        nested = isinstance(self.right, Product)
        return f"{self.left!r} * " + (
            f"({self.right!r})" if nested else f"{self.right!r}"
        )

    @property
    def needs(self) -> frozenset[Need]:
        return self.left.needs | self.right.needs

    @property
    def required(self) -> tuple[Selector, ...]:
        return self.left.required + self.right.required

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        return Product(self.left.bind(roots), self.right.bind(roots))

    def decide(self, info: ParameterInfo) -> Verdict:
        left, right = self.left.decide(info), self.right.decide(info)
        reasons = [v.reason for v in (left, right) if v.decay != FULL] or [right.reason]
        return Verdict(left.decay * right.decay, ", ".join(reasons))
