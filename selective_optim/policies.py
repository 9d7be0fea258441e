"""Policies: who decays, how much and in which form.

A policy maps a :class:`~selective_optim.ParameterInfo` to a :class:`Decay`. Write
it as a name, a mapping, a callable, or an expression of :func:`exclude`,
:func:`only`, :func:`scale`, :func:`form` and ``*``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from torch import nn

from selective_optim._rules import (
    Decay,
    Form,
    Function,
    Policy,
    exclude,
    first_match,
    form,
    only,
    scale,
)
from selective_optim.differences import Difference, Differences, compare
from selective_optim.layers import layerwise
from selective_optim.markers import exempt_, marked
from selective_optim.recipes import RECIPES
from selective_optim.selectors import (
    Selector,
    everything,
    is_bias,
    is_embedding,
    is_norm,
    is_vector,
)

__all__ = [
    "Decay",
    "Difference",
    "Differences",
    "Form",
    "Policy",
    "Selector",
    "as_policy",
    "diff",
    "everything",
    "exclude",
    "exempt_",
    "first_match",
    "form",
    "is_bias",
    "is_embedding",
    "is_norm",
    "is_vector",
    "layerwise",
    "marked",
    "named",
    "only",
    "scale",
]

NAMED: dict[str, Policy] = {
    "all": only(everything),
    "none": exclude(everything),
    "no_bias": exclude(is_bias),
    "no_norm": exclude(is_norm),
    "no_bias_norm": exclude(is_bias, is_norm),
    "no_bias_norm_embedding": exclude(is_bias, is_norm, is_embedding),
    "matrices": exclude(is_vector),
    **RECIPES,
}


def named(name: str) -> Policy:
    """Look up a ready-made policy or a recipe.

    Raises:
        ValueError: No policy has that name; the message lists the known ones.
    """
    if name in NAMED:
        return NAMED[name]
    close = get_close_matches(name, NAMED, n=1, cutoff=0.0)[0]
    known = ", ".join(f'"{known}"' for known in NAMED)
    raise ValueError(
        f"`wd_policy` {name!r} is not the name of a policy; known are {known}. "
        f'Did you mean wd_policy="{close}"?'
    )


def as_policy(value: object) -> Policy:
    """Make a policy of a name, a mapping, a callable or a policy object.

    Raises:
        TypeError: ``value`` is none of these.
        ValueError: ``value`` is a name that no policy has.
    """
    if isinstance(value, Policy):
        return value
    if isinstance(value, str):
        return named(value)
    if isinstance(value, Mapping):
        return first_match(value)
    if callable(value) and not isinstance(value, (type, Selector, nn.Module)):
        return Function(value)
    raise TypeError(
        f"`wd_policy` must be a name, a mapping, a callable or a policy, not {value!r} "
        f'({type(value).__name__}). Write for example wd_policy="no_bias_norm".'
    )


def diff(model: nn.Module | Sequence[nn.Module], a: object, b: object) -> Differences:
    """List the parameters of a model on which two policies disagree.

    Args:
        model: Module or modules whose parameters are asked about; it may stand on
            the meta device.
        a: A policy, in any form that ``wd_policy`` takes.
        b: Another.

    Raises:
        ValueError: One of them cannot decide for a parameter.

    Example:
        >>> print(diff(nn.Linear(2, 3), "all", "nanogpt").rows[0].reason_b)
        nanogpt: ndim < 2
    """
    return compare(model, as_policy(a), as_policy(b))
