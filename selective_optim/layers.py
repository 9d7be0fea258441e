"""Layerwise learning rates: one parameter group per layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selective_optim._text import aligned
from selective_optim.parameters import ModelIndex, ParameterInfo, as_modules
from selective_optim.policies.blocks import require_arguments
from selective_optim.policies.layerwise import Distances


@dataclass(frozen=True)
class LayerRow:
    """Where one parameter lies.

    Args:
        layer: Distance from the top layer, which is 0.
        name: Canonical name.
        shape: Original shape.
        numel: Number of elements.
        lr: Learning rate of its group, times its ``"lr_scale"``.
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
        # `blocks.0`, and not each of its parameters.
        prefix = next((p for p in _prefixes(name) if len(layers[p]) == 1), name)
        held = places.setdefault(layer, [])
        if prefix not in held:
            held.append(prefix)
    return dict(sorted(places.items()))


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def layerwise_groups(
    model: nn.Module | Sequence[nn.Module],
    lr: float | Tensor,
    rate: float,
    layers: str | Sequence[str] | None = None,
    lr_scale: bool = False,
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
            ``"blocks.*"``, or the name of their list, ``"blocks"``; a list of
            globs for several stacks, such as two towers, each with its own depth.
            By default the model's ``group_matcher`` is asked, or they are found.
        lr_scale: Leave every group's rate at ``lr`` and write the factor to its
            ``"lr_scale"`` instead, for a schedule that multiplies by it: timm's,
            MAE's and BEiT's do, torch's do not.

    Returns:
        The groups; ``print`` shows which parameters share a layer.

    Raises:
        TypeError: ``layers`` is neither string nor strings, or ``rate`` no number.
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
    # Modules may share parameters, and torch takes each in one group.
    infos = {id(i.parameter): i for i in ModelIndex(roots).everyone()}
    for info in infos.values():
        found.setdefault(distances.of(info), []).append(info)
    layered = [(n, lr * rate**n, held) for n, held in sorted(found.items())]
    return LayerGroups(
        (
            {"params": [i.parameter for i in held], **_rate(lr, rate**n, lr_scale)}
            for n, _, held in layered
        ),
        (_row(n, own, info) for n, own, held in layered for info in held),
    )


def _rate(lr: float | Tensor, factor: float, lr_scale: bool) -> dict[str, Any]:
    return {"lr": lr, "lr_scale": factor} if lr_scale else {"lr": lr * factor}


def _row(layer: int, lr: float | Tensor, info: ParameterInfo) -> LayerRow:
    shape = info.parameter.shape if info.shape is None else info.shape
    return LayerRow(layer, info.name, shape, shape.numel(), lr)
