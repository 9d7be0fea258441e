"""The policies a user writes: verbs over selectors, mappings and callables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from selective_optim.decay import (
    EXEMPT,
    FORM_NAMES,
    FORMS,
    FULL,
    TARGET_RULE,
    TARGET_WAY_OUT,
    Decay,
    Form,
    Target,
    Verdict,
    as_decay,
    broken_rule,
    number_text,
    target_text,
)
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.base import Policy
from selective_optim.policies.callables import StrictInfo, callable_text, picklable
from selective_optim.policies.selectors import Selector, as_selector

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
        arguments = [repr(selector) for selector in self.selectors]
        if self.verb == "scale":
            arguments.append(f"by={number_text(self.inside.multiplier)}")
        if self.verb == "form":
            arguments.insert(0, repr(self.inside.form))
        if self.inside.target is not None:
            arguments.insert(0, target_text(self.inside.target))
        if self.missing_ok:
            arguments.append("missing_ok=True")
        return f"{self.verb}({', '.join(arguments)})"

    def decide(self, info: ParameterInfo) -> Verdict:
        for selector in self.selectors:
            if selector.matches(info):
                return Verdict(self.inside, f"{self.verb} {selector.told(info)}")
        if not self.selectors:
            return Verdict(self.inside, repr(self))
        return Verdict(
            self.outside, f"not in {self!r}" if self.verb == "only" else UNMATCHED
        )


@dataclass(frozen=True, repr=False)
class FirstMatch(Policy):
    """The decay of the first selector that matches; full decay where none does."""

    selectors: tuple[Selector, ...]
    decays: tuple[Decay, ...] = ()
    missing_ok: bool = False

    def __repr__(self) -> str:
        pairs = zip(self.selectors, self.decays)
        cases = ", ".join(f"{s!r}: {_decay_text(d)}" for s, d in pairs)
        missing = ", missing_ok=True" if self.missing_ok else ""
        return f"first_match({{{cases}}}{missing})"

    def decide(self, info: ParameterInfo) -> Verdict:
        for selector, decay in zip(self.selectors, self.decays):
            if selector.matches(info):
                return Verdict(decay, selector.told(info))
        return Verdict(FULL, UNMATCHED)


def _decay_text(decay: Decay) -> str:
    plain = decay == Decay(decay.multiplier)
    return number_text(decay.multiplier) if plain else repr(decay)


class AnswerError(Exception):
    """A callable policy returned what is not a decay.

    Args:
        value: What it returned.
        kind: ``TypeError`` or ``ValueError``.
        rule: The rule that the value breaks.
    """

    def __init__(self, value: object, kind: type[Exception], rule: str) -> None:
        super().__init__(value, kind, rule)
        self.value = value
        self.kind = kind
        self.rule = rule


@dataclass(frozen=True, repr=False)
class Function(Policy):
    """Any callable from :class:`ParameterInfo` to number, bool or ``Decay``."""

    function: Callable[[ParameterInfo], Any]

    def __repr__(self) -> str:
        return callable_text(self.function)

    def decide(self, info: ParameterInfo) -> Verdict:
        value = self.function(StrictInfo(info))
        broken = None if isinstance(value, Decay) else broken_rule(value)
        if broken is not None:
            raise AnswerError(value, *broken)
        return Verdict(as_decay(value), repr(self))

    def __deepcopy__(self, memo: object) -> Function:
        return self  # frozen, and functions are not copied

    def __reduce__(self) -> tuple[Any, ...]:
        return Function, (picklable(self.function),)


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
        >>> from selective_optim.policies import is_norm
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
    """Multiply the decay of the matched parameters by ``by``, finite and >= 0.

    Raises:
        TypeError: ``by`` is not a number.
        ValueError: ``by`` is negative, infinite or NaN.
    """
    return Rule(
        "scale", _selected(selectors, "scale"), Decay(by), missing_ok=missing_ok
    )


def form(kind: Form, *selectors: object, missing_ok: bool = False) -> Policy:
    """Decay the matched parameters, or all, in one form.

    Per step, for a parameter ``p`` with gradient ``g``, rate ``lr`` and effective
    decay ``wd``, towards ``t``, which is 0 but for :func:`towards`, and before torch's
    update, which lowers ``p`` by ``lr * u``::

        "l2"           g += wd * (p - t)         -= where the optimizer maximizes
        "decoupled"    p -= lr * wd * (p - t)
        "independent"  p -= lr / lr0 * wd * (p - t)
        "corrected"    p -= lr ** 2 / lr0 * wd * (p - t)
        "cautious"     p -= lr * wd * (p - t)    where u * (p - t) >= 0

    ``lr0`` is the rate of the group when it was added, or the ``"initial_lr"`` that it
    came with. The sign of ``u`` is for Adam and AdamW that of the new first moment;
    for SGD ``u`` is the gradient, its new momentum buffer, or with ``nesterov`` the
    sum of both. Where the optimizer maximizes, gradients count negated.

    Args:
        kind: The form.
        selectors: As for :func:`exclude`; none is all parameters.
        missing_ok: As for :func:`exclude`.

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
    chosen = tuple(map(as_selector, selectors))
    return Rule("form", chosen, Decay(1.0, kind), missing_ok=missing_ok)


def towards(target: Target, *selectors: object, missing_ok: bool = False) -> Policy:
    """Decay the matched parameters, or all, towards ``target`` instead of 0.

    Args:
        target: A finite number, as 1 for the gains of norms; or ``"init"``, what a
            parameter was when it was decided, which costs one tensor per parameter
            and is saved in the state dict. ``torch.distributed.checkpoint`` leaves
            that out: decide before it loads, while the values are those.
        selectors: As for :func:`exclude`; none is all parameters.
        missing_ok: As for :func:`exclude`.

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
    chosen = tuple(map(as_selector, selectors))
    return Rule("towards", chosen, Decay(1.0, target=target), missing_ok=missing_ok)


def first_match(cases: Mapping[Any, Any], *, missing_ok: bool = False) -> Policy:
    """Let the first selector that matches decide, as a plain mapping does.

    Args:
        cases: From selector to number, bool or :class:`Decay`, in order.
        missing_ok: Accept a glob or regular expression that matches nothing.
    """
    read = list(_cases(cases))
    selectors, decays = tuple([s for s, _ in read]), tuple([d for _, d in read])
    return FirstMatch(selectors, decays, missing_ok)


def _cases(cases: Mapping[Any, Any]) -> Iterator[tuple[Selector, Decay]]:
    for item, value in cases.items():
        selector = as_selector(item)
        try:
            yield selector, as_decay(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`wd_policy` at {selector!r}: {error}") from error
