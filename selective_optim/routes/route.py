"""Routes: which class steps which parameters, and with which arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain
from typing import Any

from torch import Tensor

from selective_optim._state_entries import without
from selective_optim._text import NUMBERS, received, require_numbers, shape_of
from selective_optim.decay import FULL, Answer, Decision
from selective_optim.decisions.decider import Decider
from selective_optim.decisions.knowledge import Pending
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.selectors import Policy, Selector, as_selector
from selective_optim.routes.loading import KEYS
from selective_optim.step.setting import PER_PARAM, WD, pick

Group = dict[str, Any]
Part = tuple[Group, Sequence[Decision], str]  # with the route
EXAMPLE = '"adamw": ("*", selective_optim.AdamW, dict(lr=3e-4))'
NOBODY = ""  # the route of a parameter that none takes
NameOf = Callable[[Tensor], "str | None"]


@dataclass(frozen=True)
class Route:
    """One class, what it steps, and its arguments."""

    name: str  # stands in its groups under "route"
    selector: Selector  # what it takes, unless a route before it does
    cls: Any = None  # as it was given
    selective: Any = None  # the same, or made of it, which decides
    arguments: Mapping[str, Any] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()  # what the class reads in a group

    @property
    def lr(self) -> Any:
        """The rate of a group that brings none; ``None`` if the class has no rate."""
        parameter = inspect.signature(self.cls).parameters.get("lr")
        default = None if parameter is None else parameter.default
        return self.arguments.get("lr", default)

    def part(
        self, group: Group, positions: Sequence[int] | None, others: set[str]
    ) -> Group:
        """Make the group of this route of a user's, and of all it has if ``None``.

        Keys that ``others`` read, and not this route, are left out.
        """
        not_read = others - self.keys
        own = {k: v for k, v in group.items() if k not in not_read}
        if positions is not None:
            own |= pick(group, positions)
        for key in [k for k in NUMBERS if isinstance(own.get(k), Mapping)]:
            numbers = own.pop(key)
            own |= {key: numbers[self.name]} if self.name in numbers else {}
        lr, scale = own.pop("lr", self.lr), own.pop("lr_scale", 1)
        if lr is not None:
            own["lr"] = lr if scale == 1 else lr * scale
        return {**own, "route": self.name}

    def make(
        self, groups: Sequence[Group], arguments: Mapping[str, Any], name_of: NameOf
    ) -> Any:
        """Make the optimizer of this route, or name the parameter that it refuses."""
        try:
            return self.selective(groups, **arguments)
        except (TypeError, ValueError) as error:
            params = chain(*(group["params"] for group in groups))
            raise self._explained(error, params, name_of) from error

    def require_served(self, params: Sequence[Tensor], name_of: NameOf) -> None:
        """Check that the class takes parameters, as some ask in constructors alone."""
        if error := self._refusal(params):
            raise self._explained(error, params, name_of) from error

    def _refusal(self, params: Sequence[Tensor]) -> Exception | None:
        """Ask the class itself, with nothing of this library around it."""
        if self.selective is self.cls:
            return None  # it is ours, and takes every parameter
        try:
            self.cls(params, **without(self.arguments, ["wd_policy"]))
        except Exception as error:  # whatever it raises
            return error
        return None

    def _explained(
        self, error: Exception, params: Iterable[Tensor], name_of: NameOf
    ) -> Exception:
        """Name the parameter that the class refuses even if it is alone."""
        for param in params:
            if self._refusal([param]) is not None:
                name = name_of(param)
                label = f"{repr(name) if name else 'a parameter'} ({shape_of(param)})"
                return type(error)(
                    f"route {self.name!r} gives {label} to {self.cls.__name__}, which "
                    f"refuses it: {error}. Narrow its selector, as with "
                    f"is_hidden_matrix, or put a route before it that takes this "
                    f"parameter."
                )
        return type(error)(f"route {self.name!r}: {error}")


@dataclass(frozen=True, repr=False)
class RoutePolicy(Policy):
    """Which route takes a parameter, said as the reason of a decision."""

    routes: tuple[Route, ...]

    @property
    def selectors(self) -> tuple[Selector, ...]:  # type: ignore[override]  # no field
        """What the routes ask."""
        return tuple(route.selector for route in self.routes)

    def __repr__(self) -> str:
        told = (f"{route.name!r}: {route.selector!r}" for route in self.routes)
        return f"{{{', '.join(told)}}}"

    def decide(self, info: ParameterInfo) -> Answer:
        for route in self.routes:
            if route.selector.matches(info):
                return Answer(FULL, route.name)
        return Answer(FULL, NOBODY)


def read_routes(routes: object, selective: Callable[[Any], Any]) -> tuple[Route, ...]:
    """Read routes as a user writes them: from name to selector, class and arguments."""
    if not isinstance(routes, Mapping):
        raise TypeError(
            f"`routes` must be a mapping from names to selector, class and arguments, "
            f"not {received(routes)}. Write for example {{{EXAMPLE}}}."
        )
    if not routes:
        raise ValueError(f"`routes` is empty. Write for example {{{EXAMPLE}}}.")
    return tuple(_read(*item, selective) for item in routes.items())


def _read(name: object, given: object, selective: Callable[[Any], Any]) -> Route:
    fits = isinstance(given, (tuple, list)) and len(given) in (2, 3)
    if not isinstance(name, str) or not name or not fits:
        raise TypeError(
            f"route {name!r} must be a name with a selector, a class and its "
            f"arguments, not {received(given)}. Write for example {EXAMPLE}."
        )
    selector, cls, *rest = list(given)  # type: ignore[call-overload]  # checked
    arguments = rest[0] if rest else {}
    if not isinstance(arguments, Mapping):
        raise TypeError(
            f"the arguments of route {name!r} must be a dict, not "
            f"{received(arguments)}. Write for example {EXAMPLE}."
        )
    made = selective(cls)
    parameters = inspect.signature(made).parameters
    known = parameters.keys() - {"params", "model"}
    loose = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in arguments.keys() - known:
        near = get_close_matches(key, known, n=1, cutoff=0.0)
        if not loose:
            raise TypeError(
                f"route {name!r} has an argument {key!r}, which {cls.__name__} does "
                f"not take. Did you mean {near[0]!r}?"
            )
    require_numbers(arguments, f" of route {name!r}")
    keys = frozenset(known)
    return Route(name, as_selector(selector), cls, made, dict(arguments), keys)


def ask_routes(
    decider: Decider,
    routes: tuple[Route, ...],
    coming: Sequence[Pending],
    groups: Sequence[Group],
    strict: bool,
) -> list[list[str]]:
    """Tell which route takes each parameter of groups that come in.

    ``groups`` has these among others; a ``"route"`` in one takes all of it. If
    ``strict``, every glob must match.
    """
    given = [groups[each.group].get("route") for each in coming]
    policy, pairs = RoutePolicy(routes), zip(coming, given)
    asked = [each._replace(policy=policy) for each, route in pairs if route is None]
    try:
        decided = iter(decider.ask(asked, [policy] if strict else []))
    except (TypeError, ValueError) as error:
        told = str(error).replace("`wd_policy`", "`routes`")
        told = told.replace(", or pass missing_ok=True to its policy", "")
        raise type(error)(told) from error
    taken = []
    for each, route in zip(coming, given):
        if route is None:
            taken.append(_names(each, next(decided), routes))
        else:
            taken.append([known_route(route, routes).name] * len(each.params))
    return taken


def _names(
    coming: Pending, decided: Sequence[Decision], routes: tuple[Route, ...]
) -> list[str]:
    names = [decision.reason for decision in decided]
    if NOBODY in names:
        place = names.index(NOBODY)
        label = decided[place].label(coming.group, place)
        example = EXAMPLE if routes[0].cls else '"rest": "*"'
        raise ValueError(
            f"no route takes {label} ({shape_of(coming.params[place])}). Let the last "
            f"route take the rest: {example}."
        )
    return names


def known_route(name: object, routes: tuple[Route, ...]) -> Route:
    """Find the route that a group names, or raise ValueError."""
    found = next((route for route in routes if route.name == name), None)
    if found is None:
        raise ValueError(
            f"a group has the route {name!r}, and the routes are "
            f"{', '.join(repr(route.name) for route in routes)}. Leave it out to have "
            f"it decided."
        )
    return found


def unused(
    routes: tuple[Route, ...],
    taken: Sequence[Sequence[str]],
    groups: Sequence[Group] = (),
) -> str:
    """Say which route takes no parameter; empty if each takes some, or has a group."""
    used = {*chain(*taken), *(group.get("route") for group in groups)}
    for number, route in enumerate(routes):
        if route.name not in used:
            before = [f"{other.selector!r}" for other in routes[:number]]
            after = f" that {' and '.join(before)} leave" if before else ""
            return (
                f"route {route.name!r} takes none of {sum(map(len, taken))} "
                f"parameters: {route.selector!r} matches none{after}. Leave the route "
                f"out, or correct its selector."
            )
    return ""


# Groups for an optimizer of another project that steps all routes.


def by_route(
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


def with_one_decay(group: Group) -> Group:
    """Take the largest decay of a group that has one for each route."""
    wd = group.get(WD)
    return {**group, WD: max(wd.values())} if isinstance(wd, Mapping) else group


def marks_of(
    routes: Mapping[str, Any], key: str, values: Mapping[str, Any] | None
) -> dict[str, Group]:
    """Tell what stands in the groups of each route, so that they are told apart."""
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
