"""Groups by route, for an optimizer of another project that steps both halves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from selective_optim._text import NUMBERS
from selective_optim.decay import Decision
from selective_optim.decisions.decider import Decider
from selective_optim.decisions.knowledge import Pending
from selective_optim.policies.selectors import as_selector
from selective_optim.routes.loading import KEYS
from selective_optim.routes.route import Route, ask_routes, unused
from selective_optim.step.lasting import PER_PARAM, WD, Group

Part = tuple[Group, Sequence[Decision], str]


def by_route(
    groups: Sequence[Group],
    decided: Sequence[Sequence[Decision]],
    decider: Decider,
    routes: Mapping[str, Any],
    marks: Group,
) -> Iterator[Part]:
    """Split groups by route.

    Args:
        groups: With the hyperparameters that they are to have.
        decided: What was decided for their parameters.
        decider: Knows these.
        routes: From names to selectors.
        marks: What stands in the groups of each route besides.

    Raises:
        ValueError: A parameter or a route is left over, or cannot be told.
    """
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
    """Take a route's own number of a mapping."""
    if key not in NUMBERS or not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ValueError(
            f"`{key}` has no number for route {name!r}. Write {key}="
            f"{{{name!r}: ..., ...}}, one for each route."
        )
    return value[name]


def with_one_decay(group: Group) -> Group:
    """Take the largest decay of a group that has one for each route."""
    wd = group.get(WD)
    return {**group, WD: max(wd.values())} if isinstance(wd, Mapping) else group


def marks_of(
    routes: Mapping[str, Any], key: str, values: Mapping[str, Any] | None
) -> dict[str, Group]:
    """Tell what stands in the groups of each route, so that they are told apart.

    Raises:
        ValueError: ``key`` is not known, and there are no values for it.
    """
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
