"""A glob, regular expression or object that matches no parameter is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from functools import cache

from selective_optim.parameters import ParameterInfo
from selective_optim.policies.base import Policy
from selective_optim.policies.selectors import NamePattern, Selector

SHOWN = 3  # names that a message gives


def require_matches(
    policy: Policy,
    infos: Sequence[ParameterInfo],
    elsewhere: Callable[[Selector], bool],
    everyone: Callable[[], Sequence[ParameterInfo]],
) -> None:
    """Check that every glob, regular expression and object matches some parameter.

    Args:
        policy: The policy that decides for ``infos``.
        infos: What is known of the optimizer's parameters.
        elsewhere: Tells whether a selector matches any parameter of the model, a
            frozen part included.
        everyone: Gives what is known of the model's parameters.

    Raises:
        ValueError: One matches none; the message gives the closest names.
    """
    missing = [s for s in policy.required if not any(map(s.matches, infos))]
    for selector in missing:
        if elsewhere(selector):
            continue
        # Who trains a part of a model may have written for all of it.
        infos = [*infos, *everyone()]
        names = list(dict.fromkeys(name for info in infos for name in info.names))
        # A pattern without names to search in: deciding raises and says so.
        if names or not isinstance(selector, NamePattern):
            count = len({id(info.parameter) for info in infos})
            closest, way_out = _advice(selector, names)
            raise ValueError(
                f"{selector!r} in `wd_policy` matches none of {count} parameters"
                f"{closest}. {way_out}, or pass missing_ok=True to its policy."
            )


def _advice(selector: Selector, names: Sequence[str]) -> tuple[str, str]:
    """Tell the names that come closest, and what to write instead."""
    if not isinstance(selector, NamePattern):
        return "", "Correct it"
    pattern = selector.pattern
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    word = text.strip("*.^$\\")
    holders = [name for name in names if word and word.lower() in name.lower()]
    close = (holders or _closest(word, names))[:SHOWN]
    told = f"; the closest names are {', '.join(map(repr, close))}"
    if isinstance(pattern, str) and holders:
        start = holders[0].lower().index(word.lower())
        meant = holders[0][start : start + len(word)]
        meant = f"*.{meant}" if holders[0].endswith(f".{meant}") else f"*{meant}*"
        if fnmatchcase(holders[0], meant):
            why = "Case counts" if pattern[:1] == "*" else "A glob is for whole names"
            return told, f'{why}: write "{meant}"'
    return told, "Correct it"


def _closest(text: str, names: Sequence[str]) -> list[str]:
    """Sort names by how much some part of each is like a text, in any case.

    A name is long, as ``base_model.model.layers.0.lora_A.default.weight``, and what
    was misspelt is as a rule a word of it.
    """
    size = text.count(".") + 1

    @cache
    def likeness(part: str) -> float:
        return SequenceMatcher(None, text.lower(), part.lower()).ratio()

    def best(name: str) -> float:
        parts = name.split(".")
        ends = range(min(size, len(parts)), len(parts) + 1)
        return max(likeness(".".join(parts[max(0, i - size) : i])) for i in ends)

    return sorted(names, key=best, reverse=True)
