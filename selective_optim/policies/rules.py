"""Policies that people write: verbs, mappings and callables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from selective_optim.decay import (
    EXEMPT,
    FIXED_WAY_OUT,
    FORM_NAMES,
    FORMS,
    FULL,
    SMALL,
    TARGET_RULE,
    TARGET_WAY_OUT,
    Answer,
    Decay,
    Form,
    Target,
    as_decay,
    broken_rule,
    number_text,
    target_text,
)
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.selectors import (
    ANYTHING,
    AnswerError,
    Callback,
    Policy,
    Selector,
    StrictInfo,
    as_selector,
)

UNMATCHED = "decays in full"  # the reason where no selector matches


@dataclass(frozen=True, repr=False)
class Rule(Policy):
    """One decay for the parameters that the selectors match, another for the rest."""

    verb: str  # as it is printed, and before what its selectors match
    selectors: tuple[Selector, ...]
    inside: Decay = FULL
    outside: Decay = FULL
    missing_ok: bool = False

    def __repr__(self) -> str:
        decay = self.inside
        stated: tuple[Any, ...] = (decay.form, decay.target, decay.fixed)
        # Of which a verb states one.
        arguments = [target_text(value) for value in stated if value is not None]
        arguments += map(repr, self.selectors)
        if self.verb == "scale":
            arguments.append(f"by={number_text(decay.multiplier)}")
        if self.missing_ok:
            arguments.append("missing_ok=True")
        return f"{self.verb}({', '.join(arguments)})"

    @property
    def doubts(self) -> tuple[tuple[float, str], ...]:  # type: ignore[override]  # read only
        by = self.inside.multiplier
        if self.verb != "scale" or not 0 < by < SMALL:
            return ()
        fixed = replace(self, verb="fixed", inside=Decay(fixed=by))
        decays = (self.inside,) * len(self.selectors)
        scaled = FirstMatch(self.selectors, decays, self.missing_ok)
        return ((by, f"{fixed!r} if that is the decay itself, or {scaled!r}"),)

    def decide(self, info: ParameterInfo) -> Answer:
        for selector in self.selectors:
            if selector.matches(info):
                return Answer(self.inside, f"{self.verb} {selector.told(info)}")
        if not self.selectors:
            return Answer(self.inside, repr(self))
        reason = f"not in {self!r}" if self.verb == "only" else UNMATCHED
        return Answer(self.outside, reason)


@dataclass(frozen=True, repr=False)
class FirstMatch(Policy):
    """The decay of the first selector that matches; full decay where none does."""

    selectors: tuple[Selector, ...]
    decays: tuple[Decay, ...] = ()
    missing_ok: bool = False
    bare: tuple[float, ...] = field(default=(), compare=False)  # written as numbers

    @property
    def doubts(self) -> tuple[tuple[float, str], ...]:  # type: ignore[override]  # read only
        advice = "Decay(fixed={0}) if that is the decay itself, or Decay({0})"
        return tuple([(n, advice.format(number_text(n))) for n in self.bare])

    def __repr__(self) -> str:
        cases = []
        for selector, decay in zip(self.selectors, self.decays):
            n = decay.multiplier
            plain = decay == Decay(n) and (n in self.bare or not 0 < n < SMALL)
            cases.append(f"{selector!r}: {number_text(n) if plain else decay}")
        missing = ", missing_ok=True" if self.missing_ok else ""
        return f"first_match({{{', '.join(cases)}}}{missing})"

    def decide(self, info: ParameterInfo) -> Answer:
        for selector, decay in zip(self.selectors, self.decays):
            if selector.matches(info):
                return Answer(decay, selector.told(info))
        return Answer(FULL, UNMATCHED)


@dataclass(frozen=True, repr=False)
class Function(Callback, Policy):
    """Any callable from ``ParameterInfo`` to number, bool or ``Decay``."""

    needs = ANYTHING

    def decide(self, info: ParameterInfo) -> Answer:
        value = self.function(StrictInfo(info))
        if not isinstance(value, Decay) and (broken := broken_rule(value)):
            raise AnswerError(value, *broken)
        return Answer(as_decay(value), repr(self))


def _rule(
    verb: str,
    selectors: tuple[object, ...],
    inside: Decay,
    missing_ok: bool,
    outside: Decay = FULL,
) -> Rule:
    if not selectors and verb not in ("form", "towards", "fixed"):
        raise ValueError(
            f'`{verb}` needs at least one selector. Write for example {verb}("*.bias").'
        )
    return Rule(verb, tuple(map(as_selector, selectors)), inside, outside, missing_ok)


def exclude(*selectors: object, missing_ok: bool = False) -> Policy:
    """Exempt the matched parameters.

    Args:
        selectors: Globs on the canonical name, compiled regular expressions, module
            classes, modules, parameters, or predicates such as ``is_bias``.
        missing_ok: Accept a glob or regular expression that matches nothing.

    Example:
        >>> from selective_optim.policies import is_norm
        >>> exclude("*.bias", is_norm)
        exclude('*.bias', is_norm)
    """
    return _rule("exclude", selectors, EXEMPT, missing_ok)


def only(*selectors: object, missing_ok: bool = False) -> Policy:
    """Exempt all but the matched parameters; arguments as for ``exclude``."""
    return _rule("only", selectors, FULL, missing_ok, outside=EXEMPT)


def scale(*selectors: object, by: float, missing_ok: bool = False) -> Policy:
    """Multiply the decay of the matched parameters by ``by``.

    Args:
        selectors: As for ``exclude``.
        by: Factor on the decay, finite and >= 0; 0 exempts.
        missing_ok: As for ``exclude``.

    Raises:
        TypeError: ``by`` is not a number.
        ValueError: ``by`` is negative, infinite or NaN.
    """
    return _rule("scale", selectors, Decay(by), missing_ok)


def form(kind: Form, *selectors: object, missing_ok: bool = False) -> Policy:
    """Decay the matched parameters, or all, in one form.

    Per step, before torch's update of a parameter ``p`` with gradient ``g``::

        "l2"           g += wd * (p - t)         -= if the optimizer maximizes
        "decoupled"    p -= lr * wd * (p - t)
        "independent"  p -= lr / lr0 * wd * (p - t)
        "corrected"    p -= lr ** 2 / lr0 * wd * (p - t)
        "cautious"     p -= lr * wd * (p - t)    if u * (p - t) >= 0

    ``wd`` is the group's decay times the multiplier. ``t`` is the target, 0 unless
    ``towards`` states another. ``lr0`` is the group's rate when it was added, or the
    ``"initial_lr"`` that it came with.

    ``u`` is torch's update: the optimizer lowers ``p`` by ``lr * u``. Its sign is that
    of the new first moment for Adam and AdamW. For SGD it is that of the gradient, of
    the new momentum buffer, or with ``nesterov`` of the sum of both. A gradient counts
    negated if the optimizer maximizes.

    Args:
        kind: The form.
        selectors: As for ``exclude``; without any, all parameters.
        missing_ok: As for ``exclude``.

    Raises:
        ValueError: ``kind`` is no form.

    Source:
        "decoupled": Loshchilov and Hutter 2019, Algorithm 2. "corrected": Defazio
        2025, "Why Gradients Rapidly Increase Near the End of Training", AdamC.
        "cautious": Chen et al. 2025, "Cautious Weight Decay", Algorithm 1.
    """
    if kind not in FORMS:
        raise ValueError(
            f"`form` takes one of {FORM_NAMES} first, not {kind!r}. "
            f'Write for example form("l2", "*.weight").'
        )
    return _rule("form", selectors, Decay(1.0, kind), missing_ok)


def towards(target: Target, *selectors: object, missing_ok: bool = False) -> Policy:
    """Decay the matched parameters, or all, towards ``target`` instead of 0.

    Args:
        target: A finite number, such as 1 for the gains of norms, or ``"init"``: the
            value of the parameter when training begins. ``"init"`` keeps one tensor
            per parameter and saves it in the state dict.
            ``torch.distributed.checkpoint`` leaves it out: save and load
            ``optimizer.state_dict()`` beside it, on each rank.
        selectors: As for ``exclude``; without any, all parameters.
        missing_ok: As for ``exclude``.

    Raises:
        TypeError: ``target`` is neither a number nor a text.
        ValueError: It is infinite, NaN, or another text than ``"init"``.

    Example:
        >>> from selective_optim.policies import is_norm
        >>> towards(1, is_norm)
        towards(1, is_norm)

    Source:
        Li, Grandvalet and Davoine 2018, "Explicit Inductive Bias for Transfer Learning
        with Convolutional Networks", L2-SP, Eq. 2, for ``"init"``.
    """
    if target is None:
        raise TypeError(f"{TARGET_RULE}, not None. {TARGET_WAY_OUT}")
    return _rule("towards", selectors, Decay(1.0, target=target), missing_ok)


def fixed(wd: float, *selectors: object, missing_ok: bool = False) -> Policy:
    """Decay the matched parameters, or all, by ``wd`` instead of the group's decay.

    A change of ``group["weight_decay"]`` does not change it. The form says how the
    learning rate multiplies it. Multipliers of other policies multiply it:
    ``scale("*", by=0.1) * fixed(0.05, "*")`` decays by 0.005, and ``exclude`` exempts.
    Of two fixed decays the right-hand one applies.

    Args:
        wd: Decay in place of ``group["weight_decay"]``, finite and >= 0; 0 exempts.
        selectors: As for ``exclude``; without any, all parameters.
        missing_ok: As for ``exclude``.

    Raises:
        TypeError: ``wd`` is not a number.
        ValueError: ``wd`` is negative, infinite or NaN.

    Example:
        >>> from torch import nn
        >>> from selective_optim import SGD
        >>> policy = fixed(0.0001, "weight")
        >>> optimizer = SGD(nn.Linear(2, 1), weight_decay=0.01, wd_policy=policy)
        >>> [row.weight_decay for row in optimizer.decay_report()]
        [0.0001, 0.01]
    """
    if wd is None:
        raise TypeError(f"a fixed decay must be a number, not None. {FIXED_WAY_OUT}")
    return _rule("fixed", selectors, Decay(fixed=wd), missing_ok)


def first_match(cases: Mapping[Any, Any], *, missing_ok: bool = False) -> Policy:
    """Let the first selector that matches decide, as a plain mapping does.

    Args:
        cases: From selector to number, bool or ``Decay``, in order. A number is a
            multiplier; ``Decay(fixed=...)`` is a decay itself.
        missing_ok: Accept a glob or regular expression that matches nothing.
    """
    selectors, decays, bare = [], [], []
    for item, value in cases.items():
        selectors.append(as_selector(item))
        try:
            decays.append(as_decay(value))
        except (TypeError, ValueError) as error:
            raise type(error)(f"`wd_policy` at {selectors[-1]!r}: {error}") from error
        if not isinstance(value, Decay) and 0 < value < SMALL:
            bare.append(float(value))
    return FirstMatch(tuple(selectors), tuple(decays), missing_ok, tuple(bare))
