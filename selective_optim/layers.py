"""Layerwise rates: how far each parameter lies below the top of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from selective_optim._blocks import (
    final_norm,
    find_blocks,
    named_modules,
    require_arguments,
)
from selective_optim._rules import Decay, Policy, Verdict
from selective_optim._table import aligned
from selective_optim.parameters import ModuleIndex, ParameterInfo, as_modules
from selective_optim.selectors import Need


@dataclass(frozen=True)
class LayerRow:
    """Where one parameter lies.

    Args:
        layer: Distance from the top layer, which is 0.
        name: Canonical name.
        shape: Original shape.
        numel: Number of elements.
        lr: Learning rate of its group.
    """

    layer: int
    name: str | None
    shape: torch.Size
    numel: int
    lr: float | Tensor


class LayerGroups(list[dict[str, Any]]):
    """Parameter groups, the top layer first; prints which parameters share a layer.

    Args:
        groups: The groups.
        rows: One record per parameter.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]] = (), rows: Iterable[LayerRow] = ()
    ) -> None:
        super().__init__(groups)
        self.rows = tuple(rows)

    def __str__(self) -> str:
        places = _places([(row.name or "", row.layer) for row in self.rows])
        lines = [("layer", "lr", "tensors", "elements", "parameters")]
        for layer, names in places.items():
            rows = [row for row in self.rows if row.layer == layer]
            tensors, elements = len(rows), sum(row.numel for row in rows)
            lr = f"{float(rows[0].lr):.4g}"
            cells = (str(layer), lr, f"{tensors:,}", f"{elements:,}", ", ".join(names))
            lines.append(cells)
        return "\n".join(aligned(lines, right=range(4)))


def _places(named: Sequence[tuple[str, int]]) -> dict[int, list[str]]:
    """Name what each layer holds by the shortest prefixes that lie in it alone."""
    layers: dict[str, set[int]] = {}
    for name, layer in named:
        for prefix in _prefixes(name):
            layers.setdefault(prefix, set()).add(layer)
    places: dict[int, list[str]] = {}
    for name, layer in named:
        prefix = next((p for p in _prefixes(name) if len(layers[p]) == 1), name)
        held = places.setdefault(layer, [])
        if prefix not in held:
            held.append(prefix)
    return dict(sorted(places.items()))


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


class Distances:
    """Distance of every parameter of some modules from their top layer.

    The stem lies one below the first block, what follows the last block is the
    top, and what lies between two blocks belongs to the one that follows it. A
    norm right after the last block belongs to that block, as in timm.

    Args:
        roots: The modules.
        layers: Glob on the names of the repeated blocks; ``None`` finds them.

    Raises:
        ValueError: No blocks are found, or more than one list of them.
    """

    def __init__(self, roots: Sequence[nn.Module], layers: str | None) -> None:
        self._layer: dict[nn.Module, int] = {}
        modules = [module for _, module in named_modules(roots)]
        self._number(modules, find_blocks(roots, layers))
        # Where first names lie: a head tied to the embeddings is no layer of its own.
        first = {id(p): m for m in reversed(modules) for p in m.parameters(False)}
        self._top = max(self._layer[module] for module in first.values())

    def _number(self, modules: list[nn.Module], blocks: list[nn.Module]) -> None:
        numbers = {block: i for i, block in enumerate(blocks, start=1)}
        begun = 0
        for module in modules:
            if module in numbers:
                begun = numbers[module]
                self._layer.update(dict.fromkeys(module.modules(), begun))
            self._layer.setdefault(module, begun + 1 if begun else 0)
        if norm := final_norm(modules, blocks[-1]):
            self._layer.update(dict.fromkeys(norm.modules(), len(blocks)))

    def of(self, info: ParameterInfo) -> int:
        """Return how many layers below the top a parameter's first place lies."""
        if info.owner is None:
            raise ValueError(
                f"`layerwise` needs modules, and of {info.describe(0)} none is known. "
                f"Pass model=model."
            )
        return self._top - self._layer[info.owner]


def _roots(infos: Iterable[ParameterInfo]) -> list[nn.Module]:
    return list(
        {id(info.path[0]): info.path[0] for info in infos if info.path}.values()
    )


@dataclass(frozen=True, repr=False)
class Layerwise(Policy):
    """Multiplies decay by ``rate`` per layer below the top; see :func:`layerwise`."""

    rate: float
    layers: str | None = None
    distances: Distances | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        layers = "" if self.layers is None else f", layers={self.layers!r}"
        return f"layerwise({self.rate!r}{layers})"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"names", "modules"})

    @property
    def whole_model(self) -> bool:
        return True

    def bind(self, infos: Sequence[ParameterInfo]) -> Policy:
        roots = _roots(infos)
        return replace(self, distances=Distances(roots, self.layers) if roots else None)

    def decide(self, info: ParameterInfo) -> Verdict:
        distances = self.distances or Distances(_roots([info]), self.layers)
        distance = distances.of(info)
        return Verdict(Decay(self.rate**distance), f"{self!r} at {distance}")


def layerwise(rate: float, layers: str | None = None) -> Policy:
    """Multiply the decay of each parameter by ``rate`` ** distance from the top layer.

    Args:
        rate: Factor from a layer to the one below, finite and >= 0.
        layers: Glob on the module names of the repeated blocks, such as
            ``"blocks.*"``, or the name of their list, ``"blocks"``; by default
            they are found.

    Raises:
        TypeError: ``layers`` is no string, or ``rate`` no number.
        ValueError: ``rate`` is out of range. Blocks that are not found are told of
            when an optimizer asks.

    Example:
        >>> layerwise(0.75) * layerwise(0.5, layers="blocks.*")
        layerwise(0.75) * layerwise(0.5, layers='blocks.*')
    """
    require_arguments(rate, layers)
    return Layerwise(rate, layers)


def layerwise_groups(
    model: nn.Module | Sequence[nn.Module],
    lr: float | Tensor,
    rate: float,
    layers: str | None = None,
) -> LayerGroups:
    """Make one parameter group per layer, each with its own learning rate.

    The top layer, the head, comes first and learns at ``lr``; a layer that lies
    ``n`` below it at ``lr * rate ** n``. A norm right after the last block goes
    with that block; embeddings and stem lie one below the first block. Every
    parameter is in one group; a tied one in the group of its first name. The
    groups say nothing about decay: pass ``wd_policy`` and ``model`` for that.

    Args:
        model: Module or modules that hold the parameters.
        lr: Learning rate of the top layer.
        rate: Factor from a layer to the one below, finite and >= 0.
        layers: Glob on the module names of the repeated blocks, such as
            ``"blocks.*"``, or the name of their list, ``"blocks"``; by default
            they are found.

    Returns:
        The groups; ``print`` shows which parameters share a layer.

    Raises:
        TypeError: ``layers`` is no string, or ``rate`` no number.
        ValueError: No repeated blocks are found, or more than one list of them, or
            ``layers`` matches no module that holds parameters, or only one.

    Example:
        >>> blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        >>> parts = {"stem": nn.Linear(3, 2), "blocks": blocks, "head": nn.Linear(2, 1)}
        >>> model = nn.ModuleDict(parts)
        >>> print(layerwise_groups(model, lr=0.1, rate=0.5, layers="blocks.*"))
        layer      lr  tensors  elements  parameters
            0     0.1        2         3  head
            1    0.05        2         6  blocks.1
            2   0.025        2         6  blocks.0
            3  0.0125        2         8  stem
    """
    require_arguments(rate, layers)
    roots = as_modules(model)
    distances = Distances(roots, layers)
    found: dict[int, list[ParameterInfo]] = {}
    infos = {id(i.parameter): i for root in roots for i in ModuleIndex(root).infos()}
    for info in infos.values():
        found.setdefault(distances.of(info), []).append(info)
    layered = [(n, lr * rate**n, held) for n, held in sorted(found.items())]
    return LayerGroups(
        (
            {"params": [i.parameter for i in held], "lr": own}
            for _, own, held in layered
        ),
        (_row(n, own, info) for n, own, held in layered for info in held),
    )


def _row(layer: int, lr: float | Tensor, info: ParameterInfo) -> LayerRow:
    shape = info.parameter.shape if info.shape is None else info.shape
    return LayerRow(layer, info.name, shape, shape.numel(), lr)
