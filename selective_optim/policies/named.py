"""Policies by name, and what else ``wd_policy`` takes: mappings and callables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from types import FunctionType

from torch import nn

from selective_optim._text import received
from selective_optim.policies.base import Policy
from selective_optim.policies.layerwise import layerwise
from selective_optim.policies.markers import marked
from selective_optim.policies.recipes import RECIPES
from selective_optim.policies.rules import (
    Function,
    exclude,
    first_match,
    form,
    only,
    scale,
)
from selective_optim.policies.selectors import (
    Selector,
    as_selector,
    everything,
    is_bias,
    is_embedding,
    is_layer_weight,
    is_norm,
    is_vector,
)

NAMED: dict[str, Policy] = {
    "all": only(everything),
    "none": exclude(everything),
    "no_bias": exclude(is_bias),
    "no_norm": exclude(is_norm),
    "no_bias_norm": exclude(is_bias, is_norm),
    "no_bias_norm_embedding": exclude(is_bias, is_norm, is_embedding),
    "matrices": exclude(is_vector),
    "layer_weights": only(is_layer_weight),
    **RECIPES,
}

GLOB = re.compile(r"[*?[]")
GLOB_OR_PATH = re.compile(r"[*?[.]")
MAKERS: dict[object, str] = {
    exclude: 'exclude("*.bias")',
    only: 'only("*.weight")',
    scale: 'scale("head.*", by=0.1)',
    form: 'form("l2", "head.*")',
    layerwise: "layerwise(0.75)",
    marked: "marked()",
}


def named(name: str) -> Policy:
    """Look up a ready-made policy or a recipe.

    Raises:
        ValueError: No policy has that name; the message lists the known ones.
    """
    if name in NAMED:
        return NAMED[name]
    if GLOB_OR_PATH.search(name):
        raise ValueError(
            f"`wd_policy` {name!r} is a selector and not the name of a policy. "
            f'Write wd_policy=exclude("{name}").'
        )
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
    if isinstance(value, FunctionType) and value in MAKERS:
        raise TypeError(
            f"`wd_policy` must be a policy, and {value.__name__} is what makes one. "
            f"Write for example wd_policy={MAKERS[value]}."
        )
    if callable(value) and not isinstance(value, (type, Selector, nn.Module)):
        return Function(value)
    raise TypeError(
        f"`wd_policy` must be a name, a mapping, a callable or a policy, not "
        f"{received(value)}. Write {_meant(value)}."
    )


def _meant(value: object) -> str:
    """Write the policy that a user may have meant who gave selectors or names."""
    several = isinstance(value, (list, tuple, set, frozenset))
    items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
    items = list(items) if several else [items]  # type: ignore[call-overload]
    try:
        texts = [_selector_text(item) for item in items]
    except TypeError:
        texts = []
    if several and texts and all(isinstance(i, str) and i in NAMED for i in items):
        return "wd_policy=" + " * ".join(f'named("{name}")' for name in items)
    if texts and not any(text.startswith("<") for text in texts):
        return f"wd_policy=exclude({', '.join(texts)})"
    return 'for example wd_policy="no_bias_norm"'


def _selector_text(item: object) -> str:
    if not isinstance(item, str):
        return repr(as_selector(item))
    # Lists of plain words are searched for words, as in transformers' examples.
    return f'"{item}"' if GLOB.search(item) else f'"*{item}*"'
