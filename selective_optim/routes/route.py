"""Routes: which class steps which parameters, and with which arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain
from typing import Any

from torch import Tensor

from selective_optim._entries import without
from selective_optim._optimizer import SelectiveOptimizer
from selective_optim._text import NUMBERS, received, require_numbers, shape_of
from selective_optim.any_class import selective
from selective_optim.decay import FULL, Answer, Decision
from selective_optim.decisions.decider import Decider
from selective_optim.decisions.knowledge import Pending
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.base import Policy
from selective_optim.policies.selectors import Selector, as_selector
from selective_optim.step.lasting import pick

Group = dict[str, Any]
EXAMPLE = '"adamw": ("*", selective_optim.AdamW, dict(lr=3e-4))'
NOBODY = ""  # the route of a parameter that none takes
NameOf = Callable[[Tensor], "str | None"]


@dataclass(frozen=True)
class Route:
    """One class, what it steps, and its arguments.

    Args:
        name: Of the route; stands in its groups under ``"route"``.
        selector: What it takes, unless a route before it does.
        cls: Class of its optimizer, as it was given.
        arguments: For the class, ``weight_decay`` and ``wd_policy`` among them.
        keys: What the class reads in a group.
    """

    name: str
    selector: Selector
    cls: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()

    @property
    def lr(self) -> Any:
        """The rate of a group that brings none; ``None`` if the class has no rate."""
        parameter = inspect.signature(self.cls).parameters.get("lr")
        default = None if parameter is None else parameter.default
        return self.arguments.get("lr", default)

    def part(
        self, group: Group, positions: Sequence[int] | None, others: set[str]
    ) -> Group:
        """Make the group of this route of a user's.

        Args:
            group: The user's.
            positions: Where the parameters of this route stand in it; ``None`` is all.
            others: Keys that other routes read, and perhaps not this one.
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
        """Make the optimizer of this route with these arguments.

        Raises:
            TypeError, ValueError: The class refuses an argument or a parameter.
        """
        try:
            return selective(self.cls)(groups, **arguments)
        except (TypeError, ValueError) as error:
            params = chain(*(group["params"] for group in groups))
            raise self._explained(error, params, name_of) from error

    def require_served(self, params: Sequence[Tensor], name_of: NameOf) -> None:
        """Check that the class takes parameters, which some ask in constructors alone.

        Raises:
            TypeError, ValueError: It does not.
        """
        if error := self._refusal(params):
            raise self._explained(error, params, name_of) from error

    def _refusal(self, params: Sequence[Tensor]) -> Exception | None:
        """Ask the class itself, with nothing of this library around it."""
        if issubclass(self.cls, SelectiveOptimizer):
            return None  # those take every parameter
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


def read_routes(routes: object) -> tuple[Route, ...]:
    """Read routes as a user writes them: from name to selector, class and arguments.

    Raises:
        TypeError: They are something else, or a class does not take an argument.
        ValueError: There is none.
    """
    if not isinstance(routes, Mapping):
        raise TypeError(
            f"`routes` must be a mapping from names to selector, class and arguments, "
            f"not {received(routes)}. Write for example {{{EXAMPLE}}}."
        )
    if not routes:
        raise ValueError(f"`routes` is empty. Write for example {{{EXAMPLE}}}.")
    return tuple(_read(*item) for item in routes.items())


def _read(name: object, given: object) -> Route:
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
    parameters = inspect.signature(selective(cls)).parameters
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
    return Route(name, as_selector(selector), cls, dict(arguments), frozenset(known))


def ask_routes(
    decider: Decider,
    routes: tuple[Route, ...],
    coming: Sequence[Pending],
    groups: Sequence[Group],
    strict: bool,
) -> list[list[str]]:
    """Tell which route takes each parameter of groups that come in.

    Args:
        decider: Knows the parameters.
        routes: The routes.
        coming: The groups.
        groups: The same, among others; a ``"route"`` in one takes all of it.
        strict: Whether every glob must match.

    Raises:
        ValueError: A parameter is left over, or it cannot be told which route takes it.
        TypeError: A selector fails.
    """
    given = [groups[each.group].get("route") for each in coming]
    asked = [each for each, route in zip(coming, given) if route is None]
    try:
        decided = iter(decider.ask(RoutePolicy(routes), asked, strict))
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
    """Find the route that a group names.

    Raises:
        ValueError: There is none of that name.
    """
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
