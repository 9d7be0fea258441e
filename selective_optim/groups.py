"""Parameter groups split by a policy, or made by rule: per layer, pattern or width."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import accumulate, repeat
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from selective_optim._optimizer import Model
from selective_optim._text import aligned, copied_groups, received
from selective_optim.any_class import AnyOptimizer
from selective_optim.decay import EXEMPT, FULL, Decision
from selective_optim.decisions.decider import Decider
from selective_optim.parameters import ModelIndex, ParameterInfo, as_modules
from selective_optim.policies.blocks import require_arguments
from selective_optim.policies.layerwise import Distances
from selective_optim.policies.named import as_policy, parse
from selective_optim.policies.selectors import Selector, as_selector
from selective_optim.report import DecayReport, Row, grouped, make_rows
from selective_optim.routes.route import Part, by_route, marks_of, with_one_decay
from selective_optim.step.lasting_parts import by_decay
from selective_optim.step.setting import WD, Group, pick, share_of

Modules = nn.Module | Sequence[nn.Module]
HEADERS = ("group", "lr", "decay", "tensors", "elements", "route", "reason")
NUMBER = re.compile(r"\d+")
MANY_PLACES = 8  # of a group; a table with a hundred biases in a line is unreadable


class SplitGroups(list[dict[str, Any]]):
    """Parameter groups, each with one weight decay; prints as a table."""

    rows: tuple[Row, ...] = ()

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [HEADERS]
        for index, group in enumerate(self):
            rows = [row for row in self.rows if row.group == index]
            lr = f"{float(group['lr']):.4g}" if "lr" in group else "-"
            decay = f"{float(group[WD]):g}"
            route = rows[0].route if rows else ""
            reasons = ", ".join(dict.fromkeys(row.reason for row in rows))
            table.append((str(index), lr, decay, *_counts(rows), route, reasons))
        if not any(row.route for row in self.rows):
            table = [(*line[:5], line[6]) for line in table]
        summary = DecayReport(self.rows).summary()
        return "\n".join([*aligned(table, right=range(5)), summary])


class Reader(AnyOptimizer):
    """Reads groups and decides for them; no class steps them here."""

    def __init__(self, params: Any, decider: Decider, keys: list[str], lr: Any) -> None:
        self._decider = decider
        self._read(decider.collect(params), keys, lr)


def param_groups(
    params: Any,
    wd_policy: Any,
    weight_decay: float | Tensor | None = None,
    lr: float | Tensor | Mapping[str, float] | None = None,
    *,
    model: Model = None,
    routes: Mapping[str, Any] | None = None,
    key: str = "",
    values: Mapping[str, Any] | None = None,
    **hyper: Any,
) -> SplitGroups:
    """Split parameters into groups with one weight decay each, as by hand.

    Use it for optimizers that ``selective`` refuses, and for other libraries. The
    groups are in the order in which each decay first appears. If you pass groups, each
    is split by itself.

    Args:
        params: A module, modules, or what an optimizer of torch takes: parameters,
            ``(name, parameter)`` pairs, groups. Values in a group, its ``"wd_policy"``
            too, override the arguments below.
        wd_policy: The policy: a name, mapping, callable or expression.
        weight_decay: Decay of parameters with multiplier 1, >= 0.
        lr: Learning rate, or one for each route; ``None`` leaves it to the optimizer.
        model: The module, or modules, that the parameters live in.
        routes: From names to selectors, for an optimizer that steps groups in two ways,
            such as Muon and Adam. A parameter goes to the first route that matches it.
        key: The key of a group from which that optimizer reads its way. ``"use_muon"``
            (Keller Jordan, pytorch_optimizer, ultralytics) is true on the first route,
            ``"use_fallback"`` (timm) on all others. ``"algorithm"`` (dion) and
            ``"kind"`` (nanochat) are the name of the route.
        values: The value of any other ``key``, by route.
        **hyper: Further hyperparameters for every group.

    Returns:
        A list of groups with ``"params"``, ``"weight_decay"`` and, where names are
        known, ``"param_names"``; ``print`` shows it as a table.

    Raises:
        ValueError: The policy cannot decide for a parameter or states a form, or a
            group has no weight decay.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
        >>> groups = param_groups(model, "no_bias_norm", weight_decay=0.1, lr=0.01)
        >>> print(groups)
        group    lr  decay  tensors  elements  reason
            0  0.01    0.1        1         6  decays in full
            1  0.01      0        3         6  exclude is_bias, exclude is_norm
        decayed: 1 tensor, 6 elements; exempt: 3 tensors, 6 elements
        >>> optimizer = torch.optim.RMSprop(groups)
    """
    common = {WD: weight_decay, "lr": lr}
    defaults = {k: v for k, v in common.items() if v is not None} | hyper
    decider = Decider.for_constructor(as_policy, wd_policy, model)
    # Forms, of which some need a rate, are refused below whatever it is.
    rate = 1.0 if lr is None else lr
    keys = [WD, "lr", *hyper]
    groups = Reader(copied_groups(params), decider, keys, rate).param_groups
    decided = decider.decisions_to_step(groups)
    groups = [{**defaults, **group} for group in groups]
    routed: Iterable[Part] = zip(groups, decided, repeat(""))
    named = all(decision.name for decisions in decided for decision in decisions)
    if routes is not None:
        named, marks = False, marks_of(routes, key, values)
        routed = by_route(groups, decided, decider, routes, marks)
    split, with_route, decided_by_part = SplitGroups(), list[Group](), []
    for group, decisions, route in routed:
        for part, part_decisions in _parts(group, decisions, named):
            split.append(part)
            with_route.append({**part, "route": route})
            decided_by_part.append(part_decisions)
    decider.warn_if_nothing_decays(list(map(with_one_decay, groups)))
    rows = make_rows(with_route, decided_by_part, lambda group: None, decider.index)
    split.rows = tuple(rows)
    decider.index.release()
    return split


def _parts(
    group: Group, decisions: Sequence[Decision], named: bool
) -> Iterator[tuple[Group, list[Decision]]]:
    """Split one group; equal decays are together, whatever decided them."""
    if WD not in group:
        raise ValueError(
            "`weight_decay` is missing, of which a policy gives each parameter its "
            "share. Pass weight_decay=0.1, or the value you want."
        )
    if named:
        group = {**group, "param_names": [decision.name for decision in decisions]}
    for decay_key, positions in by_decay(decisions).items():
        if stated := decay_key.decided.stated:
            raise ValueError(
                f"`wd_policy` states {stated}, and a group holds numbers alone. Leave "
                f"that out, or use selective_optim.AdamW."
            )
        wd = share_of(group, decay_key, None).wd
        # Whatever a group's decay is, it is that of its parameters already.
        decay = FULL if wd else EXEMPT
        part_decisions = [decisions[i]._replace(decay=decay) for i in positions]
        yield {**group, **pick(group, positions), WD: wd}, part_decisions


@dataclass(frozen=True)
class GroupRow:
    """Which group one parameter is in."""

    # A layer's distance from the top, a selector as text, or a width over the base's.
    place: Any
    name: str | None
    shape: torch.Size
    numel: int
    lr: float | Tensor | None  # times the group's "lr_scale"

    @property
    def layer(self) -> int:
        """Distance from the top layer, which is 0, in layerwise groups."""
        return int(self.place)


class RateGroups(list[dict[str, Any]]):
    """Parameter groups that ``by`` sets apart; prints which parameters share one."""

    rows: tuple[GroupRow, ...] = ()
    by = ""

    def __str__(self) -> str:
        table = [(self.by, "lr", "tensors", "elements", "parameters")]
        prefixes = _shortest_prefixes(self.rows)
        for place, rows in grouped(self.rows, lambda row: row.place).items():
            lr = "-" if rows[0].lr is None else f"{float(rows[0].lr):.4g}"
            names = list(dict.fromkeys(prefixes[row.name] for row in rows))
            if more := names[MANY_PLACES:]:
                names = [*names[:MANY_PLACES], f"{len(more)} more"]
            table.append((str(place), lr, *_counts(rows), ", ".join(names)))
        return "\n".join(aligned(table, right=range(4)))


def _counts(rows: Sequence[GroupRow | Row]) -> tuple[str, str]:
    return f"{len(rows):,}", f"{sum(row.numel for row in rows):,}"


def _shortest_prefixes(rows: Sequence[GroupRow]) -> dict[str | None, str]:
    """Find, by name, the shortest prefix of a name that lies in one group alone."""
    prefixes: dict[str | None, list[str]] = {}
    places = defaultdict[str, set[Any]](set)
    for row in rows:
        parts = (row.name or "").split(".")
        prefixes[row.name] = list(accumulate(parts, "{}.{}".format))
        for prefix in prefixes[row.name]:
            places[prefix].add(row.place)
    # `blocks.0`, and not each of its parameters.
    return {
        name: next((p for p in longer if len(places[p]) == 1), longer[-1])
        for name, longer in prefixes.items()
    }


def _distinct_infos(model: Modules) -> list[ParameterInfo]:
    # Modules may share parameters, and torch takes each in one group.
    same = grouped(ModelIndex(model).everyone(), lambda info: id(info.parameter))
    return [infos[0] for infos in same.values()]


def layerwise_groups(
    model: Modules,
    lr: float | Tensor | Mapping[str, float],
    rate: float,
    layers: str | Sequence[str] | None = None,
    lr_scale: bool = False,
) -> RateGroups:
    """Make one parameter group per layer, each with its own learning rate.

    The top layer, the head, is first and has the rate ``lr``. A layer ``n`` below it
    has the rate ``lr * rate ** n``. A norm directly after the last block belongs to
    that block. Embeddings and stem are one below the first block. Every parameter is
    in one group, a tied one in the group of its first name. The groups have no
    ``weight_decay``: pass ``wd_policy`` and ``model`` to the optimizer.

    Args:
        model: Module or modules that hold the parameters.
        lr: Learning rate of the top layer, or one for each route of ``Routed``.
        rate: Factor from a layer to the one below, finite and >= 0.
        layers: Which modules are layers, as for ``policies.layerwise``: a glob such as
            ``"blocks.*"``, or several; by default they are searched for.
        lr_scale: Give every group the rate ``lr`` and write the factor to its
            ``"lr_scale"``. Use it with schedules that multiply by it, as those of
            timm, MAE and BEiT do. torch's schedules do not.

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
    layer_of = Distances(roots, layers).of
    entries = []
    for layer, infos in sorted(grouped(_distinct_infos(roots), layer_of).items()):
        hyper: dict[str, Any] = {"lr": lr, "lr_scale": rate**layer}
        if not lr_scale and not isinstance(lr, Mapping):
            hyper = {"lr": lr * rate**layer}
        entries.append((layer, hyper, infos))
    return _as_groups("layer", entries, named=False)


def _as_groups(
    by: str,
    entries: Iterable[tuple[Any, dict[str, Any], list[ParameterInfo]]],
    named: bool = True,
) -> RateGroups:
    groups, rows = RateGroups(), list[GroupRow]()
    for place, hyper, infos in entries:
        groups.append({**hyper, "params": [info.parameter for info in infos]})
        if named:
            groups[-1]["param_names"] = [info.telling_name for info in infos]
        single = isinstance(hyper.get("lr"), (Real, Tensor))  # or one for each route
        lr = hyper["lr"] * hyper.get("lr_scale", 1) if single else None
        for info in infos:
            shape = _shape(info)
            rows.append(GroupRow(place, info.name, shape, shape.numel(), lr))
    groups.rows, groups.by = tuple(rows), by
    return groups


def _shape(info: ParameterInfo) -> torch.Size:
    return info.parameter.shape if info.shape is None else info.shape


def rate_groups(model: Modules, rates: Mapping[Any, Any]) -> RateGroups:
    """Make one parameter group per entry; the first key that matches gets a parameter.

    Args:
        model: Module or modules that hold the parameters.
        rates: From selector to learning rate, or to a dict of hyperparameters. Keys
            are selectors as in policies, or their text, as in a YAML file:
            ``"backbone.*"``, ``"is_bias"``, ``"nn.LayerNorm & ~is_bias"``.

    Returns:
        The groups, with names; ``print`` shows which parameters share one.

    Raises:
        TypeError: A key is no selector, or a value is neither a rate nor a dict.
        ValueError: A key gets no parameter, or no key matches a parameter.

    Example:
        >>> model = nn.ModuleDict({"body": nn.Linear(3, 2), "head": nn.Linear(2, 1)})
        >>> print(rate_groups(model, {"body.*": 1e-5, "*": {"lr": 0.1, "eps": 1e-6}}))
        selector     lr  tensors  elements  parameters
        'body.*'  1e-05        2         8  body
             '*'    0.1        2         3  head
    """
    infos = _distinct_infos(model)
    names = [name for info in infos for name in info.names]
    selectors = [_selector(key, names) for key in rates]
    selected: list[list[ParameterInfo]] = [[] for _ in rates]
    for info in infos:
        place = next((i for i, s in enumerate(selectors) if s.matches(info)), None)
        if place is None:
            raise ValueError(
                f"{info.describe(0)} is selected by no key of `rates`. "
                f'Add a last entry for the rest: "*": 1e-3.'
            )
        selected[place].append(info)
    for selector in [s for s, its_infos in zip(selectors, selected) if not its_infos]:
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
    return _as_groups("selector", zip(map(repr, selectors), hypers, selected))


def _selector(key: Any, names: Iterable[str]) -> Selector:
    # A configuration contains only text. Of globs, only plain words are expressions.
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


def width_groups(model: Modules, base_model: Modules, lr: float | Tensor) -> RateGroups:
    """Make one parameter group per width, with the rates of muP for Adam.

    A matrix of which two dimensions differ from the base model has the rate ``lr``,
    divided by the ratio of the two fan-ins. All other parameters have the rate ``lr``.
    CompleteP with alpha 1 has the same rates, since they do not depend on depth.

    ``wd_policy=form("independent")`` with ``weight_decay=lr * wd`` decays as
    ``mup.MuAdamW(lr=lr, weight_decay=wd)``. Set the initial values, the multiplier of
    the output and Adam's ``eps`` yourself.

    Args:
        model: Module or modules that hold the parameters.
        base_model: The model with the width for which you know ``lr``, with as many
            layers or fewer. Only the shapes of its parameters are read, so you may
            make it under ``torch.device("meta")``.
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
    for info in _distinct_infos(base_model):
        for name in info.names:
            for key in (name, NUMBER.sub("*", name)):
                base.setdefault(key, set()).add(_shape(info))
    widths = grouped(_distinct_infos(model), lambda info: _width(info, base))
    entries = [(f"{w:g}", {"lr": lr / w}, infos) for w, infos in sorted(widths.items())]
    return _as_groups("width", entries)


def _width(info: ParameterInfo, base: Mapping[str, set[torch.Size]]) -> float:
    name, shape = info.name or "", _shape(info)
    # A model with more layers has names that the base lacks.
    shapes = base.get(name) or base.get(NUMBER.sub("*", name), set())
    candidates = [base_shape for base_shape in shapes if len(base_shape) == len(shape)]
    sides = zip(shape, candidates[0]) if len(candidates) == 1 else ()
    ratios = [size / base_size for size, base_size in sides if size != base_size]
    if len(candidates) != 1 or len(ratios) > 2:
        raise ValueError(
            f"{info.describe(0)} has no counterpart in `base_model` of which at most "
            f"two dimensions differ. Make that of the same class, with another width."
        )
    return ratios[-1] if len(ratios) == 2 else 1.0
