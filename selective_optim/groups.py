"""Parameter groups by rule: a learning rate per layer, per pattern or per width.

They say nothing about decay: pass ``wd_policy`` to the optimizer for that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import accumulate
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from selective_optim._text import aligned, received
from selective_optim.parameters import ModelIndex, ParameterInfo, as_modules
from selective_optim.policies.blocks import require_arguments
from selective_optim.policies.layerwise import Distances
from selective_optim.policies.named import parse
from selective_optim.policies.selectors import Selector, as_selector

Model = nn.Module | Sequence[nn.Module]
NUMBER = re.compile(r"\d+")
MANY_PLACES = 8  # of a group; a table with a hundred biases in a line is unreadable


@dataclass(frozen=True)
class GroupRow:
    """Which group one parameter is in.

    Args:
        place: What makes the group: a layer's distance from the top layer, a selector
            as text, or a width over that of the base.
        name: Canonical name.
        shape: Original shape.
        numel: Number of elements.
        lr: Rate of the group, times its ``"lr_scale"``; ``None`` where it has none.
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
    found: dict[int, ParameterInfo] = {}
    for info in ModelIndex(roots).everyone():
        found.setdefault(id(info.parameter), info)
    return list(found.values())


def layerwise_groups(
    model: Model,
    lr: float | Tensor | Mapping[str, float],
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
        lr: Learning rate of the top layer, or one for each route of ``Routed``.
        rate: Factor from a layer to the one below, finite and >= 0.
        layers: Glob on the module names of the repeated blocks, such as
            ``"blocks.*"``, or the name of their list, ``"blocks"``. Pass a list of
            globs for several stacks, such as two towers; each has its own depth. By
            default the model's ``group_matcher`` tells the layers, or they are found.
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
    entries = []
    for n, held in sorted(found.items()):
        own: dict[str, Any] = {"lr": lr, "lr_scale": rate**n}
        if not lr_scale and not isinstance(lr, Mapping):
            own = {"lr": lr * rate**n}
        entries.append((n, own, held))
    return _listed("layer", entries, named=False)


def _listed(
    by: str,
    entries: Iterable[tuple[Any, dict[str, Any], list[ParameterInfo]]],
    named: bool = True,
) -> RateGroups:
    groups, rows = [], []
    for place, hyper, held in entries:
        groups.append({**hyper, "params": [info.parameter for info in held]})
        if named:
            groups[-1]["param_names"] = [info.telling_name for info in held]
        one = isinstance(hyper.get("lr"), (Real, Tensor))  # or one for each route
        lr = hyper["lr"] * hyper.get("lr_scale", 1) if one else None
        for info in held:
            shape = _shape(info)
            rows.append(GroupRow(place, info.name, shape, shape.numel(), lr))
    return RateGroups(groups, rows, by)


def _shape(info: ParameterInfo) -> torch.Size:
    return info.parameter.shape if info.shape is None else info.shape


def rate_groups(model: Model, rates: Mapping[Any, Any]) -> RateGroups:
    """Make one parameter group per entry; the first key that matches takes a parameter.

    Args:
        model: Module or modules that hold the parameters.
        rates: From selector to learning rate, or to a dict of hyperparameters. Keys
            are selectors as in policies, or their text as a YAML file holds it:
            ``"backbone.*"``, ``"is_bias"``, ``"nn.LayerNorm & ~is_bias"``.

    Returns:
        The groups, with names; ``print`` shows which parameters share one.

    Raises:
        TypeError: A key is no selector, or a value neither a rate nor a dict.
        ValueError: A key gets no parameter, or a parameter no group.

    Example:
        >>> model = nn.ModuleDict({"body": nn.Linear(3, 2), "head": nn.Linear(2, 1)})
        >>> print(rate_groups(model, {"body.*": 1e-5, "*": {"lr": 0.1, "eps": 1e-6}}))
        selector     lr  tensors  elements  parameters
        'body.*'  1e-05        2         8  body
             '*'    0.1        2         3  head
    """
    infos = _infos(as_modules(model))
    names = [name for info in infos for name in info.names]
    selectors = [_selector(key, names) for key in rates]
    held: list[list[ParameterInfo]] = [[] for _ in rates]
    for info in infos:
        place = next((i for i, s in enumerate(selectors) if s.matches(info)), None)
        if place is None:
            raise ValueError(
                f"{info.describe(0)} is selected by no key of `rates`. "
                f'Add a last entry for the rest: "*": 1e-3.'
            )
        held[place].append(info)
    for selector in [s for s, own in zip(selectors, held) if not own]:
        if any(map(selector.matches, infos)):
            raise ValueError(
                f"entries of `rates` before {selector!r} take all that it selects. "
                f"Put it before them."
            )
        near = get_close_matches(repr(selector), names, n=3, cutoff=0.0)
        raise ValueError(
            f"{selector!r} in `rates` selects none of {len(infos)} parameters; the "
            f"closest names are {', '.join(map(repr, near))}. Correct it, or leave it "
            f"out."
        )
    hypers = [_hyper(key, value) for key, value in rates.items()]
    return _listed("selector", zip(map(repr, selectors), hypers, held))


def _selector(key: Any, names: Iterable[str]) -> Selector:
    # A configuration holds text alone. A glob is no expression but for plain words.
    if isinstance(key, str) and not any(fnmatchcase(name, key) for name in names):
        with suppress(ValueError):
            selector: Selector = parse(f"exclude({key})").selectors[0]
            return selector
    return as_selector(key)


def _hyper(key: Any, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (Real, Tensor)):
        return {"lr": value}
    raise TypeError(
        f"`rates` at {key!r} must be a learning rate or a dict of hyperparameters, not "
        f"{received(value)}. Write a number, in YAML with a point: 1.0e-5."
    )


def width_groups(model: Model, base_model: Model, lr: float | Tensor) -> RateGroups:
    """Make one parameter group per width, with the rates of muP for Adam.

    A matrix learns at ``lr`` over the ratio of its fan-in to the base model's, if two
    of its dimensions differ from there. All else learns at ``lr``. CompleteP's rates
    are the same, since those of alpha 1 do not depend on depth.

    ``wd_policy=form("independent")`` with ``weight_decay=lr * wd`` decays as
    ``mup.MuAdamW(lr=lr, weight_decay=wd)``. Initial values, multipliers of the output
    and Adam's ``eps`` are left to the model and to you.

    Args:
        model: Module or modules that hold the parameters.
        base_model: The model in the width that ``lr`` was found for, with as many
            layers or fewer. Only shapes of its parameters are read, so you may make it
            under ``torch.device("meta")``.
        lr: Learning rate at the width of the base.

    Returns:
        The groups, with names; ``print`` shows which parameters share one.

    Raises:
        ValueError: A parameter has no counterpart in the base, or differs from it in
            more than two dimensions.

    Example:
        >>> def mlp(width):
        ...     return nn.Sequential(nn.Linear(3, width), nn.Linear(width, width))
        >>> print(width_groups(mlp(8), mlp(4), lr=0.1))
        width    lr  tensors  elements  parameters
            1   0.1        3        40  0, 1.bias
            2  0.05        1        64  1.weight

    Source:
        Yang et al. 2022, "Tensor Programs V", Table 8; ``MuAdam`` in mup 1.0.0.
    """
    base: dict[str, set[torch.Size]] = {}
    for info in _infos(as_modules(base_model)):
        for name in info.names:
            for key in (name, NUMBER.sub("*", name)):
                base.setdefault(key, set()).add(_shape(info))
    held: dict[float, list[ParameterInfo]] = {}
    for info in _infos(as_modules(model)):
        held.setdefault(_width(info, base), []).append(info)
    entries = [(f"{w:g}", {"lr": lr / w}, infos) for w, infos in sorted(held.items())]
    return _listed("width", entries)


def _width(info: ParameterInfo, base: Mapping[str, set[torch.Size]]) -> float:
    name, shape = info.name or "", _shape(info)
    # A model with more layers has names that the base lacks.
    shapes = base.get(name) or base.get(NUMBER.sub("*", name), set())
    alike = [each for each in shapes if len(each) == len(shape)]
    pairs = zip(shape, alike[0]) if len(alike) == 1 else ()
    ratios = [size / of for size, of in pairs if size != of]
    if len(alike) != 1 or len(ratios) > 2:
        raise ValueError(
            f"{info.describe(0)} has no counterpart in `base_model` of which at most "
            f"two dimensions differ. Make that of the same class, with another width."
        )
    return ratios[-1] if len(ratios) == 2 else 1.0
