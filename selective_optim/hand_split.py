"""Parameter groups split by a policy, for every optimizer that takes groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from selective_optim._arguments import NUMBERS, copied_groups
from selective_optim._optimizer import Model, decider_for
from selective_optim._text import aligned
from selective_optim.any_class import AnyOptimizer
from selective_optim.decay import FULL, Decision
from selective_optim.decisions.decider import Decider
from selective_optim.decisions.knowledge import Pending
from selective_optim.policies.selectors import as_selector
from selective_optim.report import DecayReport, Row, make_row
from selective_optim.routes.loading import KEYS
from selective_optim.routes.route import Route, ask_routes, unused
from selective_optim.step.lasting import PER_PARAM, WD, Group, by_decay, pick, share_of

Part = tuple[Group, Sequence[Decision], str]
HEADERS = ("group", "lr", "decay", "tensors", "elements", "route", "reason")


class SplitGroups(list[dict[str, Any]]):
    """Parameter groups, each with one weight decay; prints as a table.

    Args:
        groups: The groups.
        rows: One record per parameter.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]] = (), rows: Iterable[Row] = ()
    ) -> None:
        super().__init__(groups)
        self.rows = tuple(rows)

    def __str__(self) -> str:
        lines = [_line(index, group, self.rows) for index, group in enumerate(self)]
        shown = [i for i, cell in enumerate(HEADERS) if cell != "route" or self._routed]
        table = [[line[i] for i in shown] for line in (HEADERS, *lines)]
        summary = DecayReport(self.rows).summary()
        return "\n".join([*aligned(table, right=range(5)), summary])

    @property
    def _routed(self) -> bool:
        return any(row.route for row in self.rows)


class Reader(AnyOptimizer):
    """Reads groups and decides for them; no class steps them here."""

    def __init__(
        self, params: Any, decider: Decider, keys: Iterable[str], lr: Any
    ) -> None:
        self._decider = decider
        self._read(params, keys, lr)


def _line(index: int, group: Group, rows: Iterable[Row]) -> tuple[str, ...]:
    mine = [row for row in rows if row.group == index]
    lr = f"{float(group['lr']):.4g}" if "lr" in group else "-"
    reasons = ", ".join(dict.fromkeys(row.reason for row in mine))
    elements = f"{sum(row.numel for row in mine):,}"
    return (
        str(index),
        lr,
        f"{float(group[WD]):g}",
        f"{len(mine):,}",
        elements,
        mine[0].route if mine else "",
        reasons,
    )


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

    For optimizers that ``selective`` cannot serve, and for other libraries. Groups come
    in the order in which their decay first appears. Groups that are given stay apart,
    so layerwise groups come out split.

    Args:
        params: A module, modules, or what an optimizer of torch takes: parameters,
            ``(name, parameter)`` pairs, groups. A group's own values, its
            ``"wd_policy"`` too, go before the arguments here.
        wd_policy: The policy: a name, mapping, callable or expression.
        weight_decay: Decay of parameters with multiplier 1, >= 0.
        lr: Learning rate, or one for each route; ``None`` leaves it to the optimizer.
        model: The module, or modules, that the parameters live in.
        routes: From names to selectors, for an optimizer that steps some groups by one
            class and others by another; the first that matches takes a parameter.
        key: Under which that optimizer reads which groups are which. ``"use_muon"``
            (Keller Jordan, pytorch_optimizer, ultralytics) is true on the first route,
            ``"use_fallback"`` (timm) on all others. ``"algorithm"`` (dion) and
            ``"kind"`` (nanochat) hold the name of the route.
        values: What stands under another ``key``, by route.
        **hyper: Further hyperparameters for every group.

    Returns:
        A list of groups with ``"params"``, ``"weight_decay"`` and, where names are
        known, ``"param_names"``; ``print`` shows it as a table.

    Raises:
        ValueError: The policy cannot be decided or states a form, or a group has no
            weight decay.

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
    decider = decider_for(model, wd_policy)
    # Forms, of which some need a rate, are refused below whatever it is.
    rate = 1.0 if lr is None else lr
    keys = [WD, "lr", *hyper]
    groups = Reader(copied_groups(params), decider, keys, rate).param_groups
    decided = decider.decisions(groups, {})
    whole: Iterable[Part] = [
        ({**defaults, **group}, decisions, "")
        for group, decisions in zip(groups, decided)
    ]
    named = all(decision.name for decisions in decided for decision in decisions)
    if routes is not None:
        named, marks = False, _marks_of(routes, key, values)
        whole = _by_route(
            [group for group, *_ in whole], decided, decider, routes, marks
        )
    split = [
        (part, [decisions[i] for i in chosen], route)
        for group, decisions, route in whole
        for part, chosen in _parts(group, decisions, named)
    ]
    decider.warn_if_weak([_with_one_decay({**defaults, **group}) for group in groups])
    decider.index.release()
    rows = [
        _row(index, group, decision, param, route)
        for index, (group, decisions, route) in enumerate(split)
        for decision, param in zip(decisions, group["params"])
    ]
    return SplitGroups((group for group, *_ in split), rows)


def _parts(
    group: Group, decisions: Sequence[Decision], named: bool
) -> Iterator[tuple[Group, list[int]]]:
    """Split one group; equal decays are together, whatever decided them."""
    if WD not in group:
        raise ValueError(
            "`weight_decay` is missing, of which a policy gives each parameter its "
            "share. Pass weight_decay=0.1, or the value you want."
        )
    if named:
        group = {**group, "param_names": [decision.name for decision in decisions]}
    for decay_key, chosen in by_decay(decisions).items():
        if stated := decay_key.decay.stated:
            raise ValueError(
                f"`wd_policy` states {stated}, and a group holds numbers alone. Leave "
                f"that out, or use selective_optim.AdamW."
            )
        yield (
            {**group, **pick(group, chosen), WD: share_of(group, decay_key, None).wd},
            chosen,
        )


def _row(
    index: int, group: Group, decision: Decision, param: Tensor, route: str
) -> Row:
    # The group's decay is that of its parameters already.
    share = decision._replace(decay=FULL)
    row = make_row(index, {"lr": float("nan"), **group}, share, None, param)
    return replace(row, route=route)


def _by_route(
    groups: Sequence[Group],
    decided: Sequence[Sequence[Decision]],
    decider: Decider,
    routes: Mapping[str, Any],
    marks: Group,
) -> Iterator[Part]:
    """Split groups by route, and mark those of each so that they are told apart."""
    known = tuple(Route(name, as_selector(item)) for name, item in routes.items())
    coming = [
        Pending(index, group["params"], group.get("param_names", ()), None)
        for index, group in enumerate(groups)
    ]
    taken = ask_routes(decider, known, coming, groups, strict=True)
    if told := unused(known, taken):
        raise ValueError(told)
    for group, decisions, names in zip(groups, decided, taken):
        for name in routes:
            chosen = [i for i, own in enumerate(names) if own == name]
            values = {
                k: _of(name, k, v) for k, v in group.items() if k not in PER_PARAM
            }
            params = [group["params"][i] for i in chosen]
            part = {"params": params, **values, **marks[name]}
            if chosen:
                yield part, [decisions[i] for i in chosen], name


def _of(name: str, key: str, value: Any) -> Any:
    if key not in NUMBERS or not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ValueError(
            f"`{key}` has no number for route {name!r}. Write {key}="
            f"{{{name!r}: ..., ...}}, one for each route."
        )
    return value[name]


def _with_one_decay(group: Group) -> Group:
    wd = group.get(WD)
    return {**group, WD: max(wd.values())} if isinstance(wd, Mapping) else group


def _marks_of(
    routes: Mapping[str, Any], key: str, values: Mapping[str, Any] | None
) -> dict[str, Group]:
    names = list(routes)
    if values is not None and (missing := [n for n in names if n not in values]):
        raise ValueError(
            f"`values` has none for route {missing[0]!r}. Write one for each route."
        )
    if values is None and key not in KEYS:
        raise ValueError(
            f"what {key!r} holds is not known; known keys are "
            f"{', '.join(map(repr, KEYS))}. Pass one of these, or say what your "
            f"optimizer reads there: values={{{names[0]!r}: True, ...}}."
        )
    own = values or {name: KEYS[key](name, names) for name in names}
    return {name: {key: own[name]} for name in names}
