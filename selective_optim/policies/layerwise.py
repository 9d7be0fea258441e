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


def matcher_distances(root: nn.Module) -> dict[str, int] | None:
    """Tell how far below the top parameters lie, as ``group_matcher`` orders them."""
    # Not getattr: wrappers answer for the module inside, whose names are others.
    speakers = (pair for pair in whole(root) if hasattr(type(pair[1]), "group_matcher"))
    prefix, model = next(speakers, ("", None))
    if model is None or not callable(model.group_matcher):
        return None
    order_of = _ordering(model.group_matcher(coarse=False))
    orders: dict[str, Order] = {}
    for name, _ in model.named_parameters():
        # Matchers are written for the names that the model itself gives.
        order = order_of(".".join(p for p in name.split(".") if p not in INSIDE))
        numbers = order if isinstance(order, Iterable) else (order,)
        orders[name] = tuple(map(float, numbers))
    layers, top = dict[Order, int](), -1
    for order in sorted(set(orders.values())):
        if not layers or order[-1] != WITH_THE_ONE_BEFORE:
            top += 1
        layers[order] = top
    if top < 1:
        return None
    return {canonical_name(prefix + n): top - layers[orders[n]] for n in orders}


def _ordering(matcher: Any) -> Callable[[str], Any]:
    """Make a function from name to order, as timm does (models/_manipulate.py)."""
    if not isinstance(matcher, Mapping):
        return lambda name: matcher(name)
    # Each part has one expression or several, with suffixes.
    single, parts = (str, re.Pattern), matcher.values()
    lists = [[(e, None)] if isinstance(e, single) else e or () for e in parts]
    rules = [
        (number, re.compile(expression), suffix or ())
        for number, expressions in enumerate(lists)
        for expression, suffix in expressions
    ]

    def order_of(name: str) -> Any:
        for part, expression, suffix in rules:
            if match := expression.match(name):
                return (part, *(n for n in match.groups() if n is not None), *suffix)
        return math.inf  # what no expression matches is the head

    return order_of


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
    of_blocks = {block: len(blocks) - i for i, block in enumerate(blocks)}
    below = following = len(blocks) + 1
    distances: dict[nn.Module, int] = {}
    for module in modules:
        if module in of_blocks:
            distances |= dict.fromkeys(module.modules(), of_blocks[module])
            following = of_blocks[module] - 1
        distances.setdefault(module, following)
    holders = [m for m in modules if m not in of_blocks and _span(m, of_blocks)]
    for parent in holders:
        distances |= _beside(parent, of_blocks)
        for key, child in parent.named_children():
            # Between two blocks it embeds what comes out of the first, and in the last
            # of several stages what that stage computes.
            if distances[child] == 0 and embedding_module(child):
                first = len(blocks) in _span(parent, of_blocks)
                distances |= dict.fromkeys(child.modules(), below if first else 1)
            if distances[child] == below and POOL.match(key):
                distances |= dict.fromkeys(child.modules(), 0)  # of what blocks give
    norm = _last_norm(modules, holders, blocks[-1])
    if norm is not None:
        distances |= dict.fromkeys(norm.modules(), 1)
    return distances


def _span(item: nn.Module, of_blocks: dict[nn.Module, int]) -> list[int]:
    return [of_blocks[module] for module in item.modules() if module in of_blocks]


def _beside(parent: nn.Module, of_blocks: dict[nn.Module, int]) -> dict[nn.Module, int]:
    """Place what stands in lists that count as the list of blocks beside them does."""
    lists = [m for m in parent.children() if isinstance(m, CONTAINERS)]
    spans = [[_span(item, of_blocks) for item in items.children()] for items in lists]
    main = next((span for span in spans if span and all(span)), [])
    distances: dict[nn.Module, int] = {}
    for i, items in enumerate(lists if main else ()):
        fewer = len(main) - len(items)
        if not isinstance(items, LISTS) or any(spans[i]) or fewer not in (0, 1):
            continue
        if fewer and all(map(norm_module, items.children())):
            continue  # norms of what comes out, which no stage follows
        # Before the blocks it belongs to the first of its number, after them the last.
        end = -1 if main in spans[:i] and not fewer else 0
        for item, span in zip(items.children(), main[fewer:]):
            distances |= dict.fromkeys(item.modules(), span[end])
    return distances


def _last_norm(modules: Modules, holders: Modules, last: nn.Module) -> nn.Module | None:
    inside = set(last.modules())
    for module in modules[modules.index(last) :]:
        keys = (key for key, _ in module.named_children())
        if module not in inside and _torch.WRAPPERS.isdisjoint(keys):
            if norm_module(module):
                return module
            break
    # One called ``norm`` may be registered before the list of blocks.
    for parent in holders:
        norm = dict(parent.named_children()).get("norm")
        lists = [child for child in parent.children() if isinstance(child, CONTAINERS)]
        beside = any(last is item for items in lists for item in items.children())
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
        ask_matcher = layers is None and len(roots) == 1
        self._of_names = matcher_distances(roots[0]) if ask_matcher else None
        if self._of_names is not None:
            return
        modules = [module for root in roots for module in root.modules()]
        self._measure(modules, find_stacks(roots, layers))
        # Where first names lie: a head tied to the embeddings is no layer of its own.
        first = {id(p): m for m in reversed(modules) for p in m.parameters(False)}
        self._lift = min(self._of_modules[module] for module in first.values())

    def _measure(self, modules: Modules, stacks: list[Modules]) -> None:
        blocks = {block for stack in stacks for block in stack}
        self._of_modules: dict[nn.Module, int] = {}
        for stack in stacks:
            others = blocks.difference(stack)
            inside = tower(modules, stack, others) if others else modules
            self._of_modules |= distances_in(inside, stack)
        # A head is the top, also where it is registered before the blocks.
        for head in heads(modules[0]):
            if blocks.isdisjoint(head.modules()) and not norm_module(head):
                self._of_modules |= dict.fromkeys(head.modules(), 0)
        self._below = max(map(len, stacks)) + 1
        self._holders = {m for m in modules if blocks & {*m.modules()}} - blocks
        self._outside = set(modules).difference(self._of_modules)
        first = min(map(modules.index, blocks))
        lowest = self._outside.difference(modules[first:], self._holders)
        self._of_modules |= dict.fromkeys(self._outside, 0)
        self._of_modules |= dict.fromkeys(lowest, self._below)

    def of(self, info: ParameterInfo) -> int:
        if info.owner is None:
            raise ValueError(
                f"`layerwise` needs modules, and of {info.describe(0)} none is known. "
                f"Pass model=model."
            )
        if self._of_names is not None:
            return self._of_names.get(info.name or "", 0)
        if POOL.match(info.leaf or "") and info.owner in self._holders:
            return 0  # queries that pool what the blocks give
        if info.owner in self._outside and embedding_part(info):
            return self._below - self._lift
        return self._of_modules[info.owner] - self._lift


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
