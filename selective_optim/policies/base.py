"""What every policy can do: decide, say what it needs, be multiplied by another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from selective_optim.decay import FULL, Decay, Verdict
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.selectors import Need, Selector


class Policy:
    """A frozen map from parameters to decays; ``a * b`` applies both."""

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """The selectors this policy asks."""
        return ()

    @property
    def needs(self) -> frozenset[Need]:
        """What must be known of a parameter before this policy can decide."""
        return frozenset[Need]().union(*(selector.needs for selector in self.selectors))

    @property
    def required(self) -> tuple[Selector, ...]:
        """The selectors that must match at least one parameter."""
        return tuple(selector for selector in self.selectors if selector.by_name)

    def decide(self, info: ParameterInfo) -> Verdict:
        """Decide for one parameter and say why."""
        raise NotImplementedError  # pragma: no cover

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        """Return the policy after a look at the modules that it will be asked about."""
        return self

    def __call__(self, info: ParameterInfo) -> Decay:
        return self.decide(info).decay

    def __mul__(self, other: object) -> Policy:
        return Product(self, other) if isinstance(other, Policy) else NotImplemented


def unmatched(policy: Policy, infos: Sequence[ParameterInfo]) -> list[Selector]:
    """List the selectors that had to match some parameter and match none."""
    return [s for s in policy.required if not any(map(s.matches, infos))]


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
    def selectors(self) -> tuple[Selector, ...]:
        return self.left.selectors + self.right.selectors

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
