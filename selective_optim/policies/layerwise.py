"""Layerwise decay: how far each parameter lies below the top of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from selective_optim import _torch
from selective_optim._torch import canonical_name
from selective_optim.decay import Answer, Decay
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.blocks import (
    CONTAINERS,
    LISTS,
    Layers,
    Modules,
    find_stacks,
    named_modules,
    require_arguments,
)
from selective_optim.policies.recognition import (
    embedding_module,
    embedding_part,
    heads,
    norm_module,
    whole,
)
from selective_optim.policies.selectors import MODULES, NAMES, Policy

Order = tuple[float, ...]
# A last number by which timm's matchers join a layer to the one before it.
WITH_THE_ONE_BEFORE = 99999
# A model may well call a module of its own `module`.
INSIDE = _torch.WRAPPERS - {"module"}
POOL = re.compile(r"(?:.*_)?pool(?:ing|er)?(?:_.*)?$")


def own_layers(roots: Sequence[nn.Module]) -> dict[str, int] | None:
    """Number layers, from 0 at the bottom, as the model's ``group_matcher`` says."""
    # Not getattr: wrappers answer for the module inside, whose names are others.
    every = (pair for root in roots for pair in whole(root))
    speakers = (pair for pair in every if hasattr(type(pair[1]), "group_matcher"))
    prefix, model = next(speakers, ("", None))
    if len(roots) != 1 or model is None or not callable(model.group_matcher):
        return None
    place = _placing(model.group_matcher(coarse=False))
    places: dict[str, Order] = {}
    for name, _ in model.named_parameters():
        # Matchers are written for the names that the model itself gives.
        places[name] = place(".".join(p for p in name.split(".") if p not in INSIDE))
    numbers, last = dict[Order, int](), -1
    for here in sorted(set(places.values())):
        last += not (numbers and here[-1] == WITH_THE_ONE_BEFORE)
        numbers[here] = last
    if len(set(numbers.values())) < 2:
        return None
    return {canonical_name(prefix + name): numbers[places[name]] for name in places}


def _order(place: Any) -> Order:
    return tuple(map(float, place)) if isinstance(place, Iterable) else (float(place),)


def _placing(said: Any) -> Callable[[str], Order]:
    """Make a function from name to place, as timm does (models/_manipulate.py)."""
    if not isinstance(said, Mapping):
        return lambda name: _order(said(name))
    # Each part has one expression or several, with suffixes.
    single = (str, re.Pattern)
    lists = [[(e, None)] if isinstance(e, single) else e or () for e in said.values()]
    rules = [
        (part, re.compile(expression), suffix or ())
        for part, expressions in enumerate(lists)
        for expression, suffix in expressions
    ]

    def place(name: str) -> Order:
        for part, expression, suffix in rules:
            if found := expression.match(name):
                numbers = (number for number in found.groups() if number is not None)
                return (part, *map(float, numbers), *map(float, suffix))
        return (math.inf,)  # what no expression matches is the head

    return place


def tower(modules: Modules, stack: Modules, others: set[nn.Module]) -> Modules:
    """Return the modules of the outermost one around a stack and none of the others."""
    # Parents come first, so the first that fits is the outermost.
    for module in modules:
        inside = set(module.modules())
        if stack[0] in inside and others.isdisjoint(inside):
            if inside.issuperset(stack):
                return [m for m in modules if m in inside]
            break
    # The blocks of several stacks stand in one list.
    return [module for block in stack for module in block.modules()]


def distances_in(modules: Modules, blocks: Modules) -> dict[nn.Module, int]:
    """Tell how far above each module, parents first, the top of a stack lies."""
    numbers = {block: i for i, block in enumerate(blocks, start=1)}
    layer: dict[nn.Module, int] = {}

    def place(module: nn.Module, number: int) -> None:
        layer.update(dict.fromkeys(module.modules(), number))

    block = 0
    for module in modules:
        if module in numbers:
            block = numbers[module]
            place(module, block)
        layer.setdefault(module, block + 1 if block else 0)
    around = [m for m in modules if m not in numbers and _span(m, numbers)]
    for parent in around:
        layer.update(_beside(parent, numbers))
        for key, child in parent.named_children():
            # Between two blocks it embeds what comes out of the first, and in the last
            # of several stages what that stage computes.
            if layer[child] > len(blocks) and embedding_module(child):
                place(child, 0 if 1 in _span(parent, numbers) else len(blocks))
            if layer[child] == 0 and POOL.match(key):  # it pools what the blocks give
                place(child, len(blocks) + 1)
    norm = _final_norm(modules, around, blocks[-1])
    if norm is not None:
        place(norm, len(blocks))
    return {module: len(blocks) + 1 - layer[module] for module in modules}


def _beside(parent: nn.Module, numbers: dict[nn.Module, int]) -> dict[nn.Module, int]:
    """Number what stands in lists that count as the list of blocks beside them does."""
    lists = [m for m in parent.children() if isinstance(m, CONTAINERS)]
    spans = [[_span(item, numbers) for item in each.children()] for each in lists]
    main = next((span for span in spans if span and all(span)), [])
    found: dict[nn.Module, int] = {}
    for i, each in enumerate(lists if main else ()):
        fewer = len(main) - len(each)
        if not isinstance(each, LISTS) or any(spans[i]) or fewer not in (0, 1):
            continue
        if fewer and all(norm_module(item) for item in each.children()):
            continue  # norms of what comes out, which no stage follows
        # Before the blocks it belongs to the first of its number, after them the last.
        last = -1 if main in spans[:i] and not fewer else 0
        for item, span in zip(each.children(), main[fewer:]):
            found.update(dict.fromkeys(item.modules(), span[last]))
    return found


def _span(item: nn.Module, numbers: dict[nn.Module, int]) -> list[int]:
    return [numbers[module] for module in item.modules() if module in numbers]


def _final_norm(modules: Modules, around: Modules, last: nn.Module) -> nn.Module | None:
    inside = set(last.modules())
    for module in modules[modules.index(last) :]:
        keys = (key for key, _ in module.named_children())
        if module not in inside and _torch.WRAPPERS.isdisjoint(keys):
            if norm_module(module):
                return module
            break
    # One called ``norm`` may be registered before the list of blocks.
    for parent in around:
        norm = dict(parent.named_children()).get("norm")
        lists = [child for child in parent.children() if isinstance(child, CONTAINERS)]
        beside = any(last is block for each in lists for block in each.children())
        if beside and norm_module(norm):
            return norm
    return None


class Distances:
    """Distance of every parameter of some modules from their top layer.

    A model that says what its layers are is believed. Elsewhere the stem lies one
    below the first block, what follows the last block is the top, and what lies
    between two blocks belongs to the one that follows it.

    Of several stacks of blocks each has its own depth, for the module around it. What
    is around all stacks is the top; embeddings and modules before them lie lowest.
    """

    def __init__(self, roots: Sequence[nn.Module], layers: Layers) -> None:
        self._own = own_layers(roots) if layers is None else None
        if self._own is not None:
            self._top = max(self._own.values())
            return
        modules = [module for _, module in named_modules(roots)]
        self._measure(modules, find_stacks(roots, layers))
        # Where first names lie: a head tied to the embeddings is no layer of its own.
        first = {id(p): m for m in reversed(modules) for p in m.parameters(False)}
        self._lift = min(self._distance[module] for module in first.values())

    def _measure(self, modules: Modules, stacks: list[list[nn.Module]]) -> None:
        blocks = {block for stack in stacks for block in stack}
        self._distance: dict[nn.Module, int] = {}
        for stack in stacks:
            others = blocks.difference(stack)
            inside = tower(modules, stack, others) if others else modules
            self._distance.update(distances_in(inside, stack))
        # A head is the top, also where it is registered before the blocks.
        for head in heads(modules[0]):
            if blocks.isdisjoint(head.modules()) and not norm_module(head):
                self._distance.update(dict.fromkeys(head.modules(), 0))
        self._below = max(map(len, stacks)) + 1
        self._around = {m for m in modules if m not in self._distance}
        self._holders = {m for m in modules if blocks & {*m.modules()}} - blocks
        first = min(modules.index(block) for block in blocks)
        for place, module in enumerate(modules):
            if module in self._around:
                lowest = place < first and module not in self._holders
                self._distance[module] = self._below if lowest else 0

    def of(self, info: ParameterInfo) -> int:
        if info.owner is None:
            raise ValueError(
                f"`layerwise` needs modules, and of {info.describe(0)} none is known. "
                f"Pass model=model."
            )
        if self._own is not None:
            return self._top - self._own.get(info.name or "", self._top)
        if POOL.match(info.leaf or "") and info.owner in self._holders:
            return 0  # queries that pool what the blocks give
        if info.owner in self._around and embedding_part(info):
            return self._below - self._lift
        return self._distance[info.owner] - self._lift


@dataclass(frozen=True, repr=False)
class Layerwise(Policy):
    """Multiplies decay by ``rate`` per layer below the top; see :func:`layerwise`."""

    rate: float
    layers: Layers = None
    distances: Distances | None = field(default=None, compare=False)
    needs = NAMES | MODULES

    def __repr__(self) -> str:
        shown = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        layers = "" if shown is None else f", layers={shown!r}"
        return f"layerwise({self.rate!r}{layers})"

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        # Computed once for all parameters, since it reads the model several times.
        return replace(self, distances=Distances(roots, self.layers) if roots else None)

    def decide(self, info: ParameterInfo) -> Answer:
        distances = self.distances or Distances(info.path[:1], self.layers)
        distance = distances.of(info)
        return Answer(Decay(self.rate**distance), f"{self!r} at {distance}")


def layerwise(rate: float, layers: Layers = None) -> Policy:
    """Multiply the decay of each parameter by ``rate`` ** distance from the top layer.

    Args:
        rate: Factor from a layer to the one below, finite and >= 0.
        layers: Glob on the module names of the repeated blocks, such as
            ``"blocks.*"``, or the name of their list, ``"blocks"``. Pass a list of
            globs for several stacks, such as two towers; each has its own depth. By
            default they come from the model's ``group_matcher`` or are searched for.

    Raises:
        TypeError: ``layers`` is neither string nor strings, or ``rate`` no number.
        ValueError: ``rate`` is out of range. If no blocks are found, the optimizer
            raises when it is made.

    Example:
        >>> layerwise(0.75) * layerwise(0.5, layers="blocks.*")
        layerwise(0.75) * layerwise(0.5, layers='blocks.*')
    """
    require_arguments(rate, layers)
    if layers is not None and not isinstance(layers, str):
        layers = tuple(layers)
    return Layerwise(rate, layers)
