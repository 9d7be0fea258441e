"""What a model says of its own layers: timm's ``group_matcher``.

A model that has the method answers ``group_matcher(coarse=False)`` with regular
expressions on the names of its parameters, whose groups are the place of a layer,
or with a function from name to place. timm's layer decay counts by it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from selective_optim import _torch
from selective_optim._module_tree import canonical_name

Order = tuple[float, ...]
# What ends in this number is no layer of its own but goes with the one before.
WITH_THE_ONE_BEFORE = 99999
# A model may well call a module of its own `module`.
INSIDE = _torch.WRAPPERS - {"module"}


def own_layers(roots: Sequence[nn.Module]) -> dict[str, int] | None:
    """Number the layers by what the model says, from 0 at the bottom.

    Args:
        roots: Where to look. A model that holds nothing but another, as a wrapper or
            a training module does, has the other speak.

    Returns:
        The layer of every parameter by its canonical name; ``None`` where the model
        says nothing, or no more than one layer.
    """
    if len(roots) != 1:
        return None
    prefix, model = _speaker(roots[0])
    matcher = getattr(model, "group_matcher", None)
    if not callable(matcher):
        return None
    place = _placing(matcher(coarse=False))
    places = {name: place(_plain(name)) for name, _ in model.named_parameters()}
    numbers = _numbers(set(places.values()))
    if len(set(numbers.values())) < 2:
        return None
    return {canonical_name(prefix + name): numbers[places[name]] for name in places}


def _speaker(model: nn.Module, prefix: str = "") -> tuple[str, nn.Module]:
    """Return the module that a model consists of, and what its names begin with."""
    if hasattr(type(model), "group_matcher"):
        return prefix, model
    held = {id(param) for param in model.parameters()}
    for key, child in model.named_children():
        if held and {id(param) for param in child.parameters()} == held:
            return _speaker(child, f"{prefix}{key}.")
    return prefix, model


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in INSIDE)


def _placing(said: Any) -> Callable[[str], Order]:
    """Make a function from name to place of what a model said."""
    if isinstance(said, Mapping):
        rules = list(_rules(said))
        return lambda name: _by_rules(rules, name)
    return lambda name: _order(said(name))


def _order(place: Any) -> Order:
    return tuple(map(float, place)) if isinstance(place, Iterable) else (float(place),)


def _rules(said: Mapping[str, Any]) -> Iterator[tuple[int, re.Pattern[str], Any]]:
    """Yield expressions in order, each with the number of its part and a suffix."""
    for part, expressions in enumerate(said.values()):
        if isinstance(expressions, (str, re.Pattern)):
            expressions = [(expressions, None)]
        for expression, suffix in expressions or ():
            yield part, re.compile(expression), suffix


def _by_rules(rules: Sequence[tuple[int, re.Pattern[str], Any]], name: str) -> Order:
    for part, expression, suffix in rules:
        if found := expression.match(name):
            numbers = (number for number in found.groups() if number is not None)
            return (part, *map(float, numbers), *map(float, suffix or ()))
    return (math.inf,)  # what no expression matches is the head


def _numbers(places: set[Order]) -> dict[Order, int]:
    numbers: dict[Order, int] = {}
    for place in sorted(places):
        last = max(numbers.values(), default=-1)
        goes_with = numbers and place[-1] == WITH_THE_ONE_BEFORE
        numbers[place] = last if goes_with else last + 1
    return numbers
