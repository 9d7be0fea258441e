"""Routes: which class steps which parameters, and with which arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain
from typing import Any

from torch import Tensor

from selective_optim._state_entries import ROUTE, StateDict, split_routes, without
from selective_optim._text import NUMBERS, received, require_numbers, shape_of, warn
from selective_optim.decay import FULL, Answer, Decision
from selective_optim.decisions.decider import Decider
from selective_optim.decisions.knowledge import Pending
from selective_optim.decisions.state_dict import require_dict, require_whole
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.named import as_policy
from selective_optim.policies.selectors import Policy, Selector, as_selector
from selective_optim.step.setting import PER_PARAM, WD, Group, pick

RATES, USE_MUON = ("lr", "initial_lr"), "use_muon"
Part = tuple[Group, Sequence[Decision], str]  # with the route
EXAMPLE = '"adamw": ("*", selective_optim.AdamW, dict(lr=3e-4))'
# Keys by which optimizers of other projects choose Muon or Adam, and their values:
# Keller Jordan's Muon, pytorch_optimizer and ultralytics; timm; dion; nanochat.
KEYS: dict[str, Callable[[str, Sequence[str]], object]] = {
    "use_muon": lambda name, names: name == names[0],
    "use_fallback": lambda name, names: name != names[0],
    "algorithm": lambda name, names: name,
    "kind": lambda name, names: name,
}
NOBODY = ""  # the route of a parameter that none takes


@dataclass(frozen=True)
class Route:
    """One class, what it steps, and its arguments."""

    name: str  # stands in its groups under "route"
    selector: Selector  # what it takes, unless a route before it does
    cls: Any = None  # as it was given
    selective: Any = None  # the same, or made of it, which decides
    arguments: Mapping[str, Any] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()  # what the class reads in a group
    lr: Any = None  # of a group that brings none; ``None`` if the class has no rate
    policy: Policy | None = None  # its own

    def part(self, group: Group, positions: Sequence[int], others: set[str]) -> Group:
        """Make this route's group of a user's, without keys that others alone read."""
        own = without(group, others - self.keys) | pick(group, positions)
        for key in [k for k in NUMBERS if isinstance(own.get(k), Mapping)]:
            numbers = own.pop(key)
            own |= {key: numbers[self.name]} if self.name in numbers else {}
        lr, scale = own.pop("lr", self.lr), own.pop("lr_scale", 1)
        if lr is not None:
            own["lr"] = lr if scale == 1 else lr * scale
        return {**own, ROUTE: self.name}

    def check(self, params: Sequence[Tensor]) -> None:
        """Ask the class itself, with nothing of this library around it."""
        if self.selective is not self.cls:  # else it is ours, and takes every parameter
            self.cls(params, **self.arguments)

    def _refuses(self, param: Tensor) -> bool:
        try:
            self.check([param])
        except Exception:  # whatever it raises
            return True
        return False

    @contextmanager
    def explaining(
        self, params: Sequence[Tensor], name_of: Callable[[Tensor], str | None]
    ) -> Iterator[None]:
        """Name the parameter that the class refuses even if it is alone."""
        try:
            yield
        except Exception as error:
            refused = next(filter(self._refuses, params), None)
            if refused is None:
                raise type(error)(f"route {self.name!r}: {error}") from error
            name = name_of(refused)
            label = f"{repr(name) if name else 'a parameter'} ({shape_of(refused)})"
            raise type(error)(
                f"route {self.name!r} gives {label} to {self.cls.__name__}, which "
                f"refuses it: {error}. Narrow its selector, as with is_hidden_matrix, "
                f"or put a route before it that takes this parameter."
            ) from error


@dataclass(frozen=True, repr=False)
class RoutePolicy(Policy):
    """Which route takes a parameter, said as the reason of a decision."""

    routes: tuple[Route, ...]

    @property
    def selectors(self) -> tuple[Selector, ...]:  # type: ignore[override]  # no field
        return tuple(route.selector for route in self.routes)

    def __repr__(self) -> str:
        told = (f"{route.name!r}: {route.selector!r}" for route in self.routes)
        return f"{{{', '.join(told)}}}"

    def decide(self, info: ParameterInfo) -> Answer:
        names = (r.name for r in self.routes if r.selector.matches(info))
        return Answer(FULL, next(names, NOBODY))


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
    own = without(arguments, ["wd_policy"])
    policy = arguments.get("wd_policy")
    policy = None if policy is None else as_policy(policy)
    lr = own.get("lr", parameters["lr"].default if "lr" in parameters else None)
    selector = as_selector(selector)
    return Route(name, selector, cls, made, own, frozenset(known), lr, policy)


def split_by_route(
    decider: Decider,
    routes: tuple[Route, ...],
    coming: Sequence[Pending],
    groups: Sequence[Group],
    strict: bool,
    may_be_empty: bool = False,
) -> list[tuple[Pending, Route, list[int]]]:
    """Tell which positions of each group that comes in each route takes."""
    given = [groups[each.group].get(ROUTE) for each in coming]
    policy, pairs = RoutePolicy(routes), zip(coming, given)
    asked = [each._replace(policy=policy) for each, route in pairs if route is None]
    try:
        decided = iter(decider.ask(asked, [policy] if strict else []))
    except (TypeError, ValueError) as error:
        told = str(error).replace("`wd_policy`", "`routes`")
        told = told.replace(", or pass missing_ok=True to its policy", "")
        raise type(error)(told) from error
    taken = [
        _names(each, next(decided), routes)
        if route is None
        else [known_route(route, routes).name] * len(each.params)
        for each, route in zip(coming, given)
    ]
    if strict and (told := _unused(routes, {*chain(*taken, given)}, coming)):
        if not may_be_empty:
            raise ValueError(told)
        warn(told)
    parts = []
    for each, names, own in zip(coming, taken, given):
        for route in routes:
            chosen = [i for i, name in enumerate(names) if name == route.name]
            # A rank that shards groups by route may hold nothing of one.
            if chosen or own == route.name:
                parts.append((each, route, chosen))
    return parts


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


def _unused(
    routes: tuple[Route, ...], used: set[Any], coming: Sequence[Pending]
) -> str:
    # Empty if each takes some, or has a group.
    for number, route in enumerate(routes):
        if route.name not in used:
            before = [f"{other.selector!r}" for other in routes[:number]]
            after = f" that {' and '.join(before)} leave" if before else ""
            return (
                f"route {route.name!r} takes none of "
                f"{sum(len(each.params) for each in coming)} parameters: "
                f"{route.selector!r} matches none{after}. Leave the route out, or "
                f"correct its selector."
            )
    return ""


# Groups for an optimizer of another project that steps all routes.


def by_route(
    groups: Sequence[Group],
    decided: Sequence[Sequence[Decision]],
    decider: Decider,
    routes: Mapping[str, Any],
    marks: Mapping[str, Group],
) -> Iterator[Part]:
    """Split groups by route, and mark those of each so that they are told apart."""
    known = tuple(Route(name, as_selector(item)) for name, item in routes.items())
    coming = [
        Pending(index, group["params"], group.get("param_names", ()), None)
        for index, group in enumerate(groups)
    ]
    for each, route, chosen in split_by_route(decider, known, coming, groups, True):
        group, decisions = groups[each.group], decided[each.group]
        params = [group["params"][i] for i in chosen]
        part = {**without(group, PER_PARAM), **marks[route.name], "params": params}
        for key in [k for k in NUMBERS if isinstance(part.get(k), Mapping)]:
            if route.name not in part[key]:
                raise ValueError(
                    f"`{key}` has no number for route {route.name!r}. Write {key}="
                    f"{{{route.name!r}: ..., ...}}, one for each route."
                )
            part[key] = part[key][route.name]
        yield part, [decisions[i] for i in chosen], route.name


def with_one_decay(group: Group) -> Group:
    """Take the largest decay of a group that has one for each route."""
    wd = group.get(WD)
    return {**group, WD: max(wd.values())} if isinstance(wd, Mapping) else group


def marks_of(
    routes: Mapping[str, Any], key: str, values: Mapping[str, Any] | None
) -> dict[str, Group]:
    """Tell what stands in the groups of each route, so that they are told apart."""
    names = list(routes)
    if values is None:
        if key not in KEYS:
            raise ValueError(
                f"what {key!r} holds is not known; known keys are "
                f"{', '.join(map(repr, KEYS))}. Pass one of these, or say what your "
                f"optimizer reads there: values={{{names[0]!r}: True, ...}}."
            )
        values = {name: KEYS[key](name, names) for name in names}
    if missing := [name for name in names if name not in values]:
        raise ValueError(
            f"`values` has none for route {missing[0]!r}. Write one for each route."
        )
    return {name: {key: values[name]} for name in names}


# State dicts.


def state_by_route(state_dict: Any, names: list[str]) -> Any:
    """Take a state dict of several optimizers apart, whoever saved it."""
    if isinstance(state_dict, (list, tuple)):
        if len(state_dict) != len(names):
            raise ValueError(
                f"{len(state_dict)} state dicts were given, and this optimizer has the "
                f"routes {', '.join(map(repr, names))}. Pass one for each, in this "
                f"order, or {{route: state_dict}}."
            )
        state_dict = dict(zip(names, state_dict))
    require_dict(state_dict)
    if "param_groups" not in state_dict and state_dict.keys() <= set(names):
        for own in state_dict.values():
            require_whole(own)
        return state_dict
    require_whole(state_dict)
    if any(ROUTE not in group for group in state_dict["param_groups"]):
        state_dict = _routed(state_dict, names)
    return split_routes(state_dict)


def _routed(state_dict: StateDict, names: Sequence[str]) -> StateDict:
    """Give another project's groups the routes here; they keep only rates and decay."""
    groups, state = list[Group](), dict[Any, Any](state_dict["state"])
    for index, group in enumerate(state_dict["param_groups"]):
        keys = group["params"]
        told = [_route_told(group, state.get(key, {}), names) for key in keys]
        if told and not any(told):
            raise ValueError(
                f"group {index} of the loaded state dict has no {ROUTE!r}: which of "
                f"{', '.join(map(repr, names))} saved it is not known. Load "
                f"{{{names[-1]!r}: state_dict}}, or one for each route."
            )
        for key in keys:
            state[key] = without(state.get(key, {}), [USE_MUON])
            if "step" in group and "exp_avg" in state[key]:  # pytorch_optimizer's
                state[key].setdefault("step", group["step"])
        for name in dict.fromkeys(filter(None, told)):
            chosen = [place for place, own in enumerate(told) if own == name]
            # timm's groups have the rate of Muon, and a factor for that of AdamW.
            scale = group.get("fallback_lr_scale", 1) if name != names[0] else 1
            kept = [key for key in (*RATES, WD) if key in group]
            own = {key: group[key] * (scale if key in RATES else 1) for key in kept}
            groups.append({ROUTE: name, **pick(group, chosen), **own})
    return {**state_dict, "state": state, "param_groups": groups}


def _route_told(group: Group, own: Group, names: Sequence[str]) -> Any:
    """Tell the route of a parameter by its state, as in timm, or else by its group."""
    told = own if USE_MUON in own else group
    key = next((key for key in KEYS if key in told), None)
    if key is None:
        return group.get(ROUTE)
    return next((n for n in names if KEYS[key](n, names) == told[key]), told[key])
