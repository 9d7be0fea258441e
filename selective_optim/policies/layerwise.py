"""Layerwise decay: how far each parameter lies below the top of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from selective_optim.decay import Decay, Verdict
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.base import Policy
from selective_optim.policies.blocks import (
    final_norm,
    find_blocks,
    named_modules,
    require_arguments,
)
from selective_optim.policies.selectors import Need


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

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        return replace(self, distances=Distances(roots, self.layers) if roots else None)

    def decide(self, info: ParameterInfo) -> Verdict:
        distances = self.distances or Distances(info.path[:1], self.layers)
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
