"""The policy algebra: what a policy yields, how rules are made, joined and printed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

from selective_optim.parameters import ParameterInfo
from selective_optim.selectors import NamePattern, Need, Selector, as_selector

Form = Literal["l2", "decoupled"]


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
        if not isinstance(self.multiplier, Real):
            raise TypeError(
                f"a multiplier must be a number, not {self.multiplier!r} "
                f"({type(self.multiplier).__name__}). Use 0 to exempt, 1 to decay."
            )
        if not 0 <= self.multiplier < math.inf:
            raise ValueError(
                f"a multiplier must be finite and >= 0, not {self.multiplier}. "
                f"Use 0 to exempt a parameter."
            )
        if self.form not in (None, *get_args(Form)):
            raise ValueError(
                f'`form` must be "l2", "decoupled" or None, not {self.form!r}.'
            )
        object.__setattr__(self, "multiplier", float(self.multiplier))

    def __mul__(self, other: Decay) -> Decay:
        return Decay(self.multiplier * other.multiplier, other.form or self.form)

    def __repr__(self) -> str:
        form = f", {self.form!r}" if self.form else ""
        return f"Decay({self.multiplier:g}{form})"


FULL, EXEMPT = Decay(1.0), Decay(0.0)


def as_decay(value: object) -> Decay:
    """Read what a policy may yield: a ``Decay``, a number, or a bool."""
    return value if isinstance(value, Decay) else Decay(value)  # type: ignore[arg-type]  # checked there


class Verdict(NamedTuple):
    """A decay and the reason for it, in the words of the policy that decided."""

    decay: Decay
    reason: str


class Policy:
    """A frozen map from :class:`ParameterInfo` to :class:`Decay`; ``a * b`` applies both."""

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

    @property
    def whole_model(self) -> bool:
        """Tell whether a verdict depends on the other parameters, too."""
        return False

    def bind(self, infos: Sequence[ParameterInfo]) -> Policy:
        """Return the policy with what it must know of all parameters filled in."""
        return self

    def __call__(self, info: ParameterInfo) -> Decay:
        return self.decide(info).decay

    def __mul__(self, other: object) -> Policy:
        return Product(self, other) if isinstance(other, Policy) else NotImplemented


@dataclass(frozen=True, repr=False)
class Product(Policy):
    """Two policies at once: multipliers multiply, the right-hand form wins."""

    left: Policy
    right: Policy

    def __repr__(self) -> str:
        return f"{self.left!r} * {self.right!r}"

    @property
    def selectors(self) -> tuple[Selector, ...]:
        return self.left.selectors + self.right.selectors

    @property
    def needs(self) -> frozenset[Need]:
        return self.left.needs | self.right.needs

    @property
    def required(self) -> tuple[Selector, ...]:
        return self.left.required + self.right.required

    @property
    def whole_model(self) -> bool:
        return self.left.whole_model or self.right.whole_model

    def bind(self, infos: Sequence[ParameterInfo]) -> Policy:
        return Product(self.left.bind(infos), self.right.bind(infos))

    def decide(self, info: ParameterInfo) -> Verdict:
        left, right = self.left.decide(info), self.right.decide(info)
        reasons = [v.reason for v in (left, right) if v.decay != FULL] or [right.reason]
        return Verdict(left.decay * right.decay, ", ".join(reasons))


@dataclass(frozen=True, repr=False)
class Rule(Policy):
    """One decay for the parameters that the selectors match, another for the rest."""

    verb: str
    chosen: tuple[Selector, ...]
    inside: Decay = FULL
    outside: Decay = FULL
    missing_ok: bool = False

    def __repr__(self) -> str:
        arguments = [repr(selector) for selector in self.chosen]
        if self.verb == "scale":
            arguments.append(f"by={self.inside.multiplier:g}")
        if self.verb == "form":
            arguments.insert(0, repr(self.inside.form))
        if self.missing_ok:
            arguments.append("missing_ok=True")
        return f"{self.verb}({', '.join(arguments)})"

    @property
    def selectors(self) -> tuple[Selector, ...]:
        return self.chosen

    @property
    def required(self) -> tuple[Selector, ...]:
        return () if self.missing_ok else super().required

    def decide(self, info: ParameterInfo) -> Verdict:
        for selector in self.chosen:
            if selector.matches(info):
                return Verdict(self.inside, f"{self.verb} {selector!r}")
        if not self.chosen:
            return Verdict(self.inside, repr(self))
        return Verdict(
            self.outside, f"not in {self!r}" if self.verb == "only" else "no match"
        )


@dataclass(frozen=True, repr=False)
class FirstMatch(Policy):
    """The decay of the first selector that matches; full decay where none does."""

    cases: tuple[tuple[Selector, Decay], ...]
    missing_ok: bool = False

    def __repr__(self) -> str:
        cases = ", ".join(f"{s!r}: {d.multiplier:g}" if d.form is None else f"{s!r}: {d!r}"
                          for s, d in self.cases)  # fmt: skip
        return (
            f"first_match({{{cases}}}{', missing_ok=True' if self.missing_ok else ''})"
        )

    @property
    def selectors(self) -> tuple[Selector, ...]:
        return tuple(selector for selector, _ in self.cases)

    @property
    def required(self) -> tuple[Selector, ...]:
        return () if self.missing_ok else super().required

    def decide(self, info: ParameterInfo) -> Verdict:
        for selector, decay in self.cases:
            if selector.matches(info):
                return Verdict(decay, repr(selector))
        return Verdict(FULL, "no match")


@dataclass(frozen=True, repr=False)
class Function(Policy):
    """Any callable from :class:`ParameterInfo` to number, bool or ``Decay``."""

    function: Callable[[ParameterInfo], Any]

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", None) or repr(self.function)

    def decide(self, info: ParameterInfo) -> Verdict:
        return Verdict(as_decay(self.function(info)), f"{self!r}")


def _selected(selectors: tuple[object, ...], verb: str) -> tuple[Selector, ...]:
    if not selectors:
        raise ValueError(
            f'`{verb}` needs at least one selector. Write for example {verb}("*.bias").'
        )
    return tuple(map(as_selector, selectors))


def exclude(*selectors: object, missing_ok: bool = False) -> Policy:
    """Exempt the matched parameters.

    Args:
        selectors: What to match: globs on the canonical name, compiled regular
            expressions, module classes or instances, parameters, predicates.
        missing_ok: Accept a glob or regular expression that matches nothing.

    Example:
        >>> exclude("*.bias", is_norm)
        exclude('*.bias', is_norm)
    """
    return Rule(
        "exclude", _selected(selectors, "exclude"), EXEMPT, missing_ok=missing_ok
    )


def only(*selectors: object, missing_ok: bool = False) -> Policy:
    """Exempt all but the matched parameters; arguments as for :func:`exclude`."""
    return Rule("only", _selected(selectors, "only"), FULL, EXEMPT, missing_ok)


def scale(*selectors: object, by: float, missing_ok: bool = False) -> Policy:
    """Multiply the decay of the matched parameters by ``by``, finite and >= 0."""
    return Rule(
        "scale", _selected(selectors, "scale"), Decay(by), missing_ok=missing_ok
    )


def form(kind: Form, *selectors: object, missing_ok: bool = False) -> Policy:
    """Decay the matched parameters, or all, in one form: ``"l2"`` or ``"decoupled"``."""
    if kind not in get_args(Form):
        raise ValueError(f'`form` takes "l2" or "decoupled" first, not {kind!r}.')
    chosen = tuple(map(as_selector, selectors))
    return Rule("form", chosen, Decay(1.0, kind), missing_ok=missing_ok)


def first_match(cases: Mapping[Any, Any], *, missing_ok: bool = False) -> Policy:
    """Let the first selector that matches decide, as a plain mapping does.

    Args:
        cases: From selector to number, bool or :class:`Decay`, in order.
        missing_ok: Accept a glob or regular expression that matches nothing.
    """
    return FirstMatch(tuple(_cases(cases)), missing_ok)


def _cases(cases: Mapping[Any, Any]) -> Iterator[tuple[Selector, Decay]]:
    for item, value in cases.items():
        selector = as_selector(item)
        try:
            yield selector, as_decay(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`wd_policy` at {selector!r}: {error}") from error


def unmatched(policy: Policy, infos: Sequence[ParameterInfo]) -> list[NamePattern]:
    """List the globs and regular expressions that match none of the parameters."""
    return [s for s in policy.required
            if isinstance(s, NamePattern) and not any(map(s.matches, infos))]  # fmt: skip
