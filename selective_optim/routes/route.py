"""Routes: which class steps which parameters, and with which arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from selective_optim._text import NUMBERS, received, require_numbers, shape_of, warn
from selective_optim.decay import FULL, Answer, Decision
from selective_optim.decisions.decider import Decider
from selective_optim.decisions.knowledge import Pending
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.named import as_policy
from selective_optim.policies.selectors import Policy, Selector, as_selector
from selective_optim.step.setting import PER_PARAM, WD, Group, pick, without

ROUTE = "route"  # key of a group, for the name of its route
Part = tuple[Group, Sequence[Decision], str]  # with the route
Taken = Sequence[tuple[Pending, "Route", list[int]]]  # positions in the group
EXAMPLE = '"adamw": ("*", selective_optim.AdamW, dict(lr=3e-4))'
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

    def group_of(
        self, group: Group, positions: Sequence[int], others: set[str]
    ) -> Group:
        """Make this route's group of a user's, without keys that others alone read."""
        part = without(group, others - self.keys) | pick(group, positions)
        for key in [k for k in NUMBERS if isinstance(part.get(k), Mapping)]:
            numbers = part.pop(key)
            if self.name in numbers:
                part[key] = numbers[self.name]
        lr, scale = part.pop("lr", self.lr), part.pop("lr_scale", 1)
        if lr is not None:
            part["lr"] = lr if scale == 1 else lr * scale
        return {**part, ROUTE: self.name}

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
        items = (f"{route.name!r}: {route.selector!r}" for route in self.routes)
        return f"{{{', '.join(items)}}}"

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


def _read(name: object, written: Any, selective: Callable[[Any], Any]) -> Route:
    fits = isinstance(written, (tuple, list)) and len(written) in (2, 3)
    if not isinstance(name, str) or not name or not fits:
        raise TypeError(
            f"route {name!r} must be a name with a selector, a class and its "
            f"arguments, not {received(written)}. Write for example {EXAMPLE}."
        )
    selector, cls = written[:2]
    arguments = written[2] if len(written) == 3 else {}
    if not isinstance(arguments, Mapping):
        raise TypeError(
            f"the arguments of route {name!r} must be a dict, not "
            f"{received(arguments)}. Write for example {EXAMPLE}."
        )
    selective_cls = selective(cls)
    parameters = inspect.signature(selective_cls).parameters
    keys = frozenset(parameters.keys() - {"params", "model"})
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in () if takes_any else arguments.keys() - keys:
        near = get_close_matches(key, keys, n=1, cutoff=0.0)
        raise TypeError(
            f"route {name!r} has an argument {key!r}, which {cls.__name__} does "
            f"not take. Did you mean {near[0]!r}?"
        )
    require_numbers(arguments, f" of route {name!r}")
    policy = arguments.get("wd_policy")
    policy = None if policy is None else as_policy(policy)
    arguments = without(arguments, ["wd_policy"])
    default = parameters["lr"].default if "lr" in parameters else None
    lr, selector = arguments.get("lr", default), as_selector(selector)
    return Route(name, selector, cls, selective_cls, arguments, keys, lr, policy)


def split_by_route(
    decider: Decider,
    routes: tuple[Route, ...],
    coming: Sequence[Pending],
    groups: Sequence[Group],
    strict: bool,
) -> Taken:
    """Tell which positions of each group that comes in each route takes."""
    pairs = [(pending, groups[pending.group].get(ROUTE)) for pending in coming]
    policy = RoutePolicy(routes)
    asked = [pending._replace(policy=policy) for pending, name in pairs if name is None]
    try:
        decided = iter(decider.ask(asked, [policy] if strict else []))
    except (TypeError, ValueError) as error:
        message = str(error).replace("`wd_policy`", "`routes`")
        message = message.replace(", or pass missing_ok=True to its policy", "")
        raise type(error)(message) from error
    taken = []
    for pending, name in pairs:
        if name is None:
            takers = _takers(pending, next(decided), routes)
        else:
            takers = [known_route(name, routes).name] * len(pending.params)
        for route in routes:
            positions = [i for i, taker in enumerate(takers) if taker == route.name]
            # A rank that shards groups by route may hold nothing of one.
            if positions or name == route.name:
                taken.append((pending, route, positions))
    return taken


def _takers(
    coming: Pending, decisions: Sequence[Decision], routes: tuple[Route, ...]
) -> list[str]:
    names = [decision.reason for decision in decisions]
    if NOBODY in names:
        position = names.index(NOBODY)
        label = decisions[position].label(coming.group, position)
        example = EXAMPLE if routes[0].cls else '"rest": "*"'
        raise ValueError(
            f"no route takes {label} ({shape_of(coming.params[position])}). Let the "
            f"last route take the rest: {example}."
        )
    return names


def known_route(name: object, routes: tuple[Route, ...]) -> Route:
    for route in routes:
        if route.name == name:
            return route
    raise ValueError(
        f"a group has the route {name!r}, and the routes are "
        f"{', '.join(repr(route.name) for route in routes)}. Leave it out to have it "
        f"decided."
    )


def require_used(routes: Sequence[Route], taken: Taken, warns: bool = False) -> None:
    """Raise, or warn, if a route takes no parameter and has no group."""
    used = {route.name for _, route, _ in taken}
    count = sum(len(positions) for _, _, positions in taken)
    for number, route in enumerate(routes):
        if route.name not in used:
            before = [repr(other.selector) for other in routes[:number]]
            after = f" that {' and '.join(before)} leave" if before else ""
            message = (
                f"route {route.name!r} takes none of {count} parameters: "
                f"{route.selector!r} matches none{after}. Leave the route out, or "
                f"correct its selector."
            )
            if not warns:
                raise ValueError(message)
            warn(message)
            return


# Groups for an optimizer of another project that steps all routes. Keys by which such
# choose Muon or Adam, and their values: Keller Jordan's Muon, pytorch_optimizer and
# ultralytics; timm; dion; nanochat.
KEYS: dict[str, Callable[[str, Sequence[str]], object]] = {
    "use_muon": lambda name, names: name == names[0],
    "use_fallback": lambda name, names: name != names[0],
    "algorithm": lambda name, names: name,
    "kind": lambda name, names: name,
}


def by_route(
    groups: Sequence[Group],
    decided: Sequence[Sequence[Decision]],
    decider: Decider,
    routes: Mapping[str, Any],
    marks: Mapping[str, Group],
) -> Iterator[Part]:
    """Split groups by route, and mark those of each so that they are told apart."""
    plain = tuple(Route(name, as_selector(item)) for name, item in routes.items())
    coming = [
        Pending(index, group["params"], group.get("param_names", ()), None)
        for index, group in enumerate(groups)
    ]
    taken = split_by_route(decider, plain, coming, groups, strict=True)
    require_used(plain, taken)
    for pending, route, positions in taken:
        group, decisions = groups[pending.group], decided[pending.group]
        params = [group["params"][i] for i in positions]
        part = {**without(group, PER_PARAM), **marks[route.name], "params": params}
        for key in [k for k in NUMBERS if isinstance(part.get(k), Mapping)]:
            if route.name not in part[key]:
                raise ValueError(
                    f"`{key}` has no number for route {route.name!r}. Write {key}="
                    f"{{{route.name!r}: ..., ...}}, one for each route."
                )
            part[key] = part[key][route.name]
        yield part, [decisions[i] for i in positions], route.name


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
