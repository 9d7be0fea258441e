"""Parameter groups by rule: a learning rate per layer, per pattern or per width.

They say nothing about decay: pass ``wd_policy`` to the optimizer for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from selective_optim._text import aligned
from selective_optim.parameters import ModelIndex, ParameterInfo, as_modules
from selective_optim.policies.blocks import require_arguments
from selective_optim.policies.layerwise import Distances

Model = nn.Module | Sequence[nn.Module]
MANY_PLACES = 8  # of a group; a table with a hundred biases in a line is unreadable


@dataclass(frozen=True)
class GroupRow:
    """Which group one parameter is in.

    Args:
        place: What makes the group: the distance of its layer from the top layer,
            its selector as text, or its width over that of the base.
        name: Canonical name.
        shape: Original shape.
        numel: Number of elements.
        lr: Learning rate of its group, times its ``"lr_scale"``; ``None`` where the
            group leaves it to the optimizer.
    """

    place: Any
    name: str | None
    shape: torch.Size
    numel: int
    lr: float | Tensor | None

    @property
    def layer(self) -> int:
        """Distance from the top layer, which is 0, in layerwise groups."""
        return int(self.place)


class RateGroups(list[dict[str, Any]]):
    """Parameter groups; ``print`` shows which parameters share one.

    Args:
        groups: The groups.
        rows: One record per parameter.
        by: What sets the groups apart, as a word.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]] = (),
        rows: Iterable[GroupRow] = (),
        by: str = "",
    ) -> None:
        super().__init__(groups)
        self.rows = tuple(rows)
        self.by = by

    def __str__(self) -> str:
        lines = [(self.by, "lr", "tensors", "elements", "parameters")]
        for place, names in _prefixes_by_place(self.rows).items():
            rows = [row for row in self.rows if row.place == place]
            lr = "-" if rows[0].lr is None else f"{float(rows[0].lr):.4g}"
            if more := names[MANY_PLACES:]:
                names = [*names[:MANY_PLACES], f"{len(more)} more"]
            numel = sum(row.numel for row in rows)
            cells = str(place), lr, f"{len(rows):,}", f"{numel:,}", ", ".join(names)
            lines.append(cells)
        return "\n".join(aligned(lines, right=range(4)))


def _prefixes_by_place(rows: Sequence[GroupRow]) -> dict[Any, list[str]]:
    """Name what each group holds by the shortest prefixes that lie in it alone."""
    prefixes = [list(accumulate(_parts(row.name or ""))) for row in rows]
    places: dict[str, set[Any]] = {}
    for row, own in zip(rows, prefixes):
        for prefix in own:
            places.setdefault(prefix, set()).add(row.place)
    found: dict[Any, dict[str, None]] = {}
    for row, own in zip(rows, prefixes):
        # `blocks.0`, and not each of its parameters.
        prefix = next((p for p in own if len(places[p]) == 1), own[-1])
        found.setdefault(row.place, {})[prefix] = None
    return {place: list(held) for place, held in found.items()}


def _parts(name: str) -> list[str]:
    first, *others = name.split(".")
    return [first, *(f".{part}" for part in others)]


def _infos(roots: Sequence[nn.Module]) -> list[ParameterInfo]:
    # Modules may share parameters, and torch takes each in one group.
    everyone = ModelIndex(roots).everyone()
    return list({id(info.parameter): info for info in everyone}.values())


def layerwise_groups(
    model: Model,
    lr: float | Tensor,
    rate: float,
    layers: str | Sequence[str] | None = None,
    lr_scale: bool = False,
) -> RateGroups:
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
    for info in _infos(roots):
        found.setdefault(distances.of(info), []).append(info)
    layers_up = sorted(found.items())
    groups = [
        {
            "params": [info.parameter for info in held],
            **({"lr": lr, "lr_scale": rate**n} if lr_scale else {"lr": lr * rate**n}),
        }
        for n, held in layers_up
    ]
    rows = [_row(n, info, lr * rate**n) for n, held in layers_up for info in held]
    return RateGroups(groups, rows, "layer")


def _row(place: Any, info: ParameterInfo, lr: float | Tensor | None) -> GroupRow:
    shape = info.parameter.shape if info.shape is None else info.shape
    return GroupRow(place, info.name, shape, shape.numel(), lr)
