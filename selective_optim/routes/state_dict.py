"""State dicts of routes: one of all, those of separate optimizers, other projects'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from itertools import chain, count, repeat
from typing import Any

from torch.optim import Optimizer

from selective_optim._state_entries import (
    Entry,
    StateDict,
    is_foreign,
    merged,
    read,
    write,
)
from selective_optim._text import first_of, warn
from selective_optim.decisions.state_dict import (
    PER_GROUP,
    RECORD,
    Decided,
    require_dict,
    require_whole,
    sizes_of,
)
from selective_optim.routes.route import KEYS, ROUTE
from selective_optim.step.setting import PER_PARAM, WD, Group, pick, without

OTHERS = "routes"  # what the class of each route saves besides
RATES, USE_MUON = ("lr", "initial_lr"), "use_muon"
WRITE_NAMES = (
    "Write names into it: for group, names in zip(state_dict['param_groups'], "
    "selective_optim.checkpoint.group_names(groups, model)): group['param_names'] = "
    "names, where groups are those that saved."
)


class States(MutableMapping[Any, Any]):
    """State by parameter, each where the optimizer that steps it keeps it."""

    def __init__(self, by_route: Mapping[str, Any], groups: Sequence[Group]) -> None:
        self._states, self._groups = by_route, groups

    def _state_with(self, key: Any) -> Any:
        for state in self._states.values():
            if key in state:
                return state
        for group in self._groups:
            if any(param is key for param in group["params"]):
                return self._states[group[ROUTE]]
        raise KeyError(key)

    def __getitem__(self, key: Any) -> Any:
        return self._state_with(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._state_with(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._state_with(key)[key]

    # Neither by `__getitem__`, as in a mapping: a defaultdict would make an entry.
    def __contains__(self, key: object) -> bool:
        return any(key in state for state in self._states.values())

    def get(self, key: Any, default: Any = None) -> Any:
        states = self._states.values()
        return next((state[key] for state in states if key in state), default)

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self._states.values())

    def __len__(self) -> int:
        return sum(map(len, self._states.values()))

    def __repr__(self) -> str:
        return repr(dict(self))


def in_order(by_route: Mapping[str, Any], order: Sequence[str]) -> list[Any]:
    """Take an item of a route each time that the order names the route."""
    items = {route: iter(listed) for route, listed in by_route.items()}
    return [next(items[route]) for route in order]


def joined(saved: Mapping[str, StateDict], order: Sequence[str]) -> StateDict:
    """Make one state dict of those of the routes, with groups in this order of them."""
    numbers, state, groups = count(), dict[Any, Any](), list[Group]()
    saved_groups = {route: part["param_groups"] for route, part in saved.items()}
    for route, group in zip(order, in_order(saved_groups, order)):
        new_keys = {key: next(numbers) for key in group["params"]}
        groups.append({**group, "params": list(new_keys.values())})
        states = saved[route]["state"]
        state |= {new_keys[key]: states[key] for key in new_keys if key in states}
    lists = {
        key: in_order({r: p.get(key, repeat(none)) for r, p in saved.items()}, order)
        for key, none in PER_GROUP.items()
        if any(key in part for part in saved.values())
    }
    others = {route: _others_of(part) for route, part in saved.items()}
    whole = {"state": state, "param_groups": groups, **lists}
    return whole | ({OTHERS: others} if any(others.values()) else {})


def _others_of(saved: StateDict) -> StateDict:
    """Take what belongs to no group or parameter, as state that is a class's own."""
    keys = chain.from_iterable(group["params"] for group in saved["param_groups"])
    own = without(saved["state"], set(keys))
    others = without(saved, ("state", "param_groups", *PER_GROUP))
    return {**others, "state": own} if own else others


def split_routes(state_dict: StateDict) -> dict[str, StateDict]:
    """Make the state dicts of separate optimizers of one of ``Routed``.

    Args:
        state_dict: Of a ``Routed``; stays as it is.

    Returns:
        A state dict by route, for an optimizer of its class over its parameters.

    Raises:
        ValueError: A group has no route.
    """
    require_whole(state_dict)
    saved: dict[str, StateDict] = {}
    state, others = state_dict["state"], state_dict.get(OTHERS, {})
    for index, group in enumerate(state_dict["param_groups"]):
        if ROUTE not in group:
            raise ValueError(
                f"group {index} of the state dict has no {ROUTE!r}, so it is none of a "
                f"Routed. Pass what its state_dict() returned."
            )
        new: StateDict = {"state": {}, "param_groups": []}
        part = saved.setdefault(group[ROUTE], new)
        part["param_groups"].append(without(group, [ROUTE]))
        part["state"] |= {key: state[key] for key in group["params"] if key in state}
        for key in PER_GROUP:
            if key in state_dict:
                part.setdefault(key, []).append(state_dict[key][index])
    for route, part in saved.items():
        other = others.get(route, {})
        part |= {**other, "state": {**part["state"], **other.get("state", {})}}
    return saved


def _by_route(state_dict: Any, routes: list[str]) -> Any:
    """Take a state dict of several optimizers apart, whoever saved it."""
    if isinstance(state_dict, (list, tuple)):
        if len(state_dict) != len(routes):
            raise ValueError(
                f"{len(state_dict)} state dicts were given, and this optimizer has the "
                f"routes {', '.join(map(repr, routes))}. Pass one for each, in this "
                f"order, or {{route: state_dict}}."
            )
        state_dict = dict(zip(routes, state_dict))
    require_dict(state_dict)
    if "param_groups" not in state_dict and state_dict.keys() <= set(routes):
        for saved in state_dict.values():
            require_whole(saved)
        return state_dict
    require_whole(state_dict)
    if any(ROUTE not in group for group in state_dict["param_groups"]):
        state_dict = _with_routes(state_dict, routes)
    return split_routes(state_dict)


def _with_routes(state_dict: StateDict, routes: Sequence[str]) -> StateDict:
    """Give another project's groups the routes here; they keep only rates and decay."""
    groups, state = list[Group](), dict[Any, Any](state_dict["state"])
    for index, group in enumerate(state_dict["param_groups"]):
        keys = group["params"]
        takers = [_route_of(group, state.get(key, {}), routes) for key in keys]
        if takers and not any(takers):
            raise ValueError(
                f"group {index} of the loaded state dict has no {ROUTE!r}: which of "
                f"{', '.join(map(repr, routes))} saved it is not known. Load "
                f"{{{routes[-1]!r}: state_dict}}, or one for each route."
            )
        for key in keys:
            state[key] = without(state.get(key, {}), [USE_MUON])
            if "step" in group and "exp_avg" in state[key]:  # pytorch_optimizer's
                state[key].setdefault("step", group["step"])
        for route in dict.fromkeys(filter(None, takers)):
            positions = [i for i, taker in enumerate(takers) if taker == route]
            # timm's groups have the rate of Muon, and a factor for that of AdamW.
            scale = group.get("fallback_lr_scale", 1) if route != routes[0] else 1
            kept = {key: group[key] for key in (*RATES, WD) if key in group}
            kept |= {key: kept[key] * scale for key in RATES if key in kept}
            groups.append({ROUTE: route, **pick(group, positions), **kept})
    return {**state_dict, "state": state, "param_groups": groups}


def _route_of(group: Group, state: Group, routes: Sequence[str]) -> Any:
    """Tell the route of a parameter by its state, as in timm, or else by its group."""
    marked = state if USE_MUON in state else group
    key = next((key for key in KEYS if key in marked), None)
    if key is None:
        return group.get(ROUTE)
    return next((r for r in routes if KEYS[key](r, routes) == marked[key]), marked[key])


def loadable(
    state_dict: Any, optimizers: Mapping[str, Optimizer], decided: Mapping[str, Decided]
) -> tuple[dict[str, StateDict], list[str], list[str]]:
    """Make each route's state dict, and list what begins anew and what nobody takes."""
    saved = _by_route(state_dict, list(optimizers))
    if unknown := [route for route in saved if route not in optimizers]:
        raise ValueError(
            f"the loaded state dict has the route {unknown[0]!r}, and the routes here "
            f"are {', '.join(map(repr, optimizers))}. Load a mapping from these names "
            f"to the values of selective_optim.checkpoint.split_routes(state_dict)."
        )
    fitting, new, unused = dict[str, StateDict](), list[str](), list[str]()
    all_decisions = [d for groups in decided.values() for d in chain(*groups)]
    here = {str(decision.telling_name) for decision in all_decisions}
    for route, optimizer in optimizers.items():
        part = saved.get(route, {"state": {}, "param_groups": []})
        if not _fits(part, optimizer, decided[route]):
            entries = read(part, None, WRITE_NAMES)
            unused += [repr(n) for n, e in entries.items() if e.state and n not in here]
            loaded = _by_name(route, entries, optimizer, decided[route], new)
            part = write(part, loaded, record=RECORD in part)
        groups = [{**group, ROUTE: route} for group in part["param_groups"]]
        fitting[route] = {**part, "param_groups": groups}
    if new and len(new) == len(all_decisions):
        raise ValueError(
            f"the loaded state dict has nothing for any of {len(new)} parameters: it "
            f"is of another model, or of none. Load what optimizer.state_dict() "
            f"returned."
        )
    return fitting, new, unused


def _fits(state_dict: StateDict, optimizer: Optimizer, decided: Decided) -> bool:
    """Tell whether a state dict has these groups, and hyperparameters for all."""
    saved_groups, groups = state_dict["param_groups"], optimizer.param_groups
    if sizes_of(saved_groups) != sizes_of(groups):
        return False
    # torch adds to the defaults of copies what no group has.
    defaults = optimizer.defaults.keys()
    pairs = zip(groups, saved_groups)
    if any((defaults & group.keys()) - saved.keys() for group, saved in pairs):
        return False
    try:
        saved_names = list(read(state_dict, None))
    except ValueError:  # without names the order is believed, as torch does
        return True
    names = [decision.telling_name for decisions in decided for decision in decisions]
    return saved_names == names or None in names or len(set(names)) < len(names)


def _by_name(
    route: str,
    saved: Mapping[str, Entry],
    optimizer: Optimizer,
    decided: Decided,
    new: list[str],
) -> list[tuple[Group, list[Entry]]]:
    """Give each parameter what its name was saved with; ``new`` gets others' labels."""
    written, names = [], set[str]()
    for index, (group, decisions) in enumerate(zip(optimizer.param_groups, decided)):
        entries, hyper = list[Entry](), without(group, PER_PARAM)
        for position, decision in enumerate(decisions):
            name = str(decision.telling_name)
            entry = saved.get(name)
            if entry is None or is_foreign(entry, optimizer):
                entry = None
                new.append(decision.label(index, position))
            elif name in names:
                raise ValueError(
                    f"{name!r} names two parameters of route {route!r}, so what was "
                    f"saved for each is not known. Make this optimizer of "
                    f"model.named_parameters() of one module that has both."
                )
            names.add(name)
            entries.append(entry or Entry(name, name))
        if loaded := [entry for entry in entries if entry.hyper]:
            way_out = "Make this optimizer with groups as they were saved."
            hyper |= merged(loaded, way_out)
        written.append((hyper, entries))
    return written


def warn_of_new(labels: Sequence[str]) -> None:
    if labels:
        warn(
            f"nothing was saved for {first_of(labels, ', ')} by the route and class "
            f"that step {'them' if labels[1:] else 'it'} now, so "
            f"{'they begin' if labels[1:] else 'it begins'} anew. Load with the routes "
            f"of the state dict to go on."
        )


def warn_of_unused(names: Sequence[str], state_dict: Any) -> None:
    if names:
        whole = "param_groups" in state_dict
        new = "optimizer" if whole else "optimizer.optimizers[route]"
        warn(
            f"no route steps {first_of(names, ', ')} now, so the state that was saved "
            f"for {'them' if names[1:] else 'it'} is left out. If "
            f"{'they have other names' if names[1:] else 'it has another name'} here, "
            f"load selective_optim.checkpoint.fit(state_dict, {new}, names).state_dict"
            f"{'' if whole else ' for each route'}."
        )
