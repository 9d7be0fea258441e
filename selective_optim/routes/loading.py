"""States of several optimizers as one, and what others saved for one of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain, count, repeat
from typing import Any

import torch

from selective_optim._state_entries import (
    Entry,
    Hyper,
    StateDict,
    merged,
    read,
    without,
    write,
)
from selective_optim._warnings import SHOWN, warn
from selective_optim.decisions.state_dict import (
    PARTS,
    POLICIES,
    RECORD,
    Decided,
    require_dict,
    require_whole,
)
from selective_optim.step.lasting_parts import PER_PARAM, WD, pick

Group = dict[str, Any]
ROUTE, OTHERS = "route", "routes"  # of a group; what a route's class saves besides
RATES, USE_MUON = ("lr", "initial_lr"), "use_muon"
# What a state dict lists by group besides, and there of one that has no such list.
NOTHING: dict[str, Any] = {RECORD: [], POLICIES: None, PARTS: []}
# Keys by which optimizers of other projects choose Muon or Adam, and their values:
# Keller Jordan's Muon, pytorch_optimizer and ultralytics; timm; dion; nanochat.
KEYS: dict[str, Callable[[str, Sequence[str]], object]] = {
    "use_muon": lambda name, names: name == names[0],
    "use_fallback": lambda name, names: name != names[0],
    "algorithm": lambda name, names: name,
    "kind": lambda name, names: name,
}
NAME_THEM = (
    "Write names into it: for group, names in zip(state_dict['param_groups'], "
    "selective_optim.checkpoint.group_names(groups, model)): group['param_names'] = "
    "names, where groups are those that saved."
)


class States(MutableMapping[Any, Any]):
    """State by parameter, each where the optimizer that steps it keeps it."""

    def __init__(
        self, optimizers: Mapping[str, torch.optim.Optimizer], groups: Sequence[Group]
    ) -> None:
        self._states = {name: o.state for name, o in optimizers.items()}
        self._groups = groups

    def _owner(self, key: Any) -> Any:
        """Return the state that has a key, or else that of the route's optimizer."""
        for state in self._states.values():
            if key in state:
                return state
        for group in self._groups:
            if any(param is key for param in group["params"]):
                return self._states[group[ROUTE]]
        raise KeyError(key)

    def __getitem__(self, key: Any) -> Any:
        return self._owner(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._owner(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._owner(key)[key]

    # Not by `__getitem__`, as a mapping does: a defaultdict would make an entry.
    def __contains__(self, key: object) -> bool:
        return any(key in state for state in self._states.values())

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self._states.values())

    def __len__(self) -> int:
        return sum(map(len, self._states.values()))

    def __repr__(self) -> str:
        return repr(dict(self))


def in_order(by_route: Mapping[str, Any], order: Sequence[str]) -> list[Any]:
    """Take an item of a route each time that the order names the route."""
    items = {name: iter(own) for name, own in by_route.items()}
    return [next(items[name]) for name in order]


def joined(saved: Mapping[str, StateDict], order: Sequence[str]) -> StateDict:
    """Make one state dict of those of the routes, with groups in this order of them."""
    numbers, state, groups = count(), dict[Any, Any](), list[Group]()
    own = {name: each["param_groups"] for name, each in saved.items()}
    for name, group in zip(order, in_order(own, order)):
        keys = {key: next(numbers) for key in group["params"]}
        groups.append({**group, "params": list(keys.values())})
        states = saved[name]["state"]
        state |= {keys[key]: states[key] for key in keys if key in states}
    lists = {
        key: in_order({n: o.get(key, repeat(none)) for n, o in saved.items()}, order)
        for key, none in NOTHING.items()
        if any(key in own for own in saved.values())
    }
    known = ("state", "param_groups", *NOTHING)
    others = {name: without(own, known) for name, own in saved.items()}
    told = {OTHERS: others} if any(others.values()) else {}
    return {"state": state, "param_groups": groups, **lists, **told}


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
    others = state_dict.get(OTHERS, {})
    for index, group in enumerate(state_dict["param_groups"]):
        if ROUTE not in group:
            raise ValueError(
                f"group {index} of the state dict has no {ROUTE!r}, so it is none of a "
                f"Routed. Pass what its state_dict() returned."
            )
        new: StateDict = {"state": {}, "param_groups": []}
        own = saved.setdefault(group[ROUTE], new)
        own["param_groups"].append(without(group, [ROUTE]))
        state = state_dict["state"]
        own["state"] |= {key: state[key] for key in group["params"] if key in state}
        for key in NOTHING:
            if key in state_dict:
                own.setdefault(key, []).append(state_dict[key][index])
    return {name: {**own, **others.get(name, {})} for name, own in saved.items()}


def loadable(
    state_dict: Any,
    optimizers: Mapping[str, torch.optim.Optimizer],
    decided: Mapping[str, Decided],
) -> tuple[dict[str, StateDict], list[str]]:
    """Make the state dict of each route of what was saved.

    The labels that are returned are those of the parameters that begin anew.
    """
    saved = _by_route(state_dict, list(optimizers))
    if unknown := [name for name in saved if name not in optimizers]:
        raise ValueError(
            f"the loaded state dict has the route {unknown[0]!r}, and the routes here "
            f"are {', '.join(map(repr, optimizers))}. Load a mapping from these names "
            f"to the values of selective_optim.checkpoint.split_routes(state_dict)."
        )
    fitted, new = dict[str, StateDict](), list[str]()
    for name, optimizer in optimizers.items():
        own = saved.get(name, {"state": {}, "param_groups": []})
        if not _fits(own, optimizer, decided[name]):
            own = _by_name(name, own, optimizer.param_groups, decided[name], new)
        groups = [{**group, ROUTE: name} for group in own["param_groups"]]
        fitted[name] = {**own, "param_groups": groups}
    count = sum(len(own) for groups in decided.values() for own in groups)
    if new and len(new) == count:
        raise ValueError(
            f"the loaded state dict has nothing for any of {len(new)} parameters: it "
            f"is of another model, or of none. Load what optimizer.state_dict() "
            f"returned."
        )
    return fitted, new


def _by_route(state_dict: Any, names: list[str]) -> Any:
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
    """Give the groups of another project's one-object optimizer the routes here.

    Its hyperparameters stay its own, but for rates and decay.
    """
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


def _fits(saved: StateDict, optimizer: torch.optim.Optimizer, decided: Decided) -> bool:
    """Tell whether a state dict has these groups, and hyperparameters for all."""
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(group["params"]) for group in optimizer.param_groups]:
        return False
    # torch adds to the defaults of copies what no group has.
    pairs = zip(optimizer.param_groups, saved["param_groups"])
    defaults = optimizer.defaults.keys()
    if any(defaults & mine.keys() - own.keys() for mine, own in pairs):
        return False
    try:
        names = list(read(saved, None))
    except ValueError:  # without names the order is believed, as torch does
        return True
    mine = [decision.telling_name for own in decided for decision in own]
    return names == mine or None in mine or len(set(mine)) < len(mine)


def _by_name(
    name: str,
    saved: StateDict,
    groups: Sequence[Group],
    decided: Decided,
    new: list[str],
) -> StateDict:
    """Give each parameter the state that was saved under its name for its route.

    Hyperparameters of ``groups`` stay where nothing was saved, and ``new`` takes the
    labels of such parameters.
    """
    entries = read(saved, None, NAME_THEM)
    packed: list[tuple[Hyper, list[Entry]]] = []
    for index, (group, own) in enumerate(zip(groups, decided)):
        mine, hyper = list[Entry](), without(group, PER_PARAM)
        for place, decision in enumerate(own):
            known = str(decision.telling_name)
            entry = entries.get(known)
            if entry is None:
                new.append(decision.label(index, place))
            elif entry in mine:
                raise ValueError(
                    f"{known!r} names two parameters of route {name!r}, so what was "
                    f"saved for each is not known. Make this optimizer of "
                    f"model.named_parameters() of one module that has both."
                )
            mine.append(entry or Entry(known, known))
        if found := [entry for entry in mine if entry.hyper]:
            hyper |= merged(
                found, "Make this optimizer with groups as they were saved."
            )
        packed.append((hyper, mine))
    return write(saved, packed, record=RECORD in saved)


def warn_of_new(labels: Sequence[str]) -> None:
    """Warn of parameters for which nothing was saved."""
    if labels:
        first = ", ".join(labels[:SHOWN])
        more = f" and {len(labels) - SHOWN} more" if labels[SHOWN:] else ""
        warn(
            f"nothing was saved for {first}{more} by the route that steps "
            f"{'them' if labels[1:] else 'it'} now, so "
            f"{'they begin' if labels[1:] else 'it begins'} anew. Load with the routes "
            f"of the state dict to go on."
        )
