"""States of several optimizers as one, and what others saved for one of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import count
from typing import Any

import torch

from selective_optim._state_entries import (
    Entry,
    Hyper,
    StateDict,
    merged,
    read,
    recorded,
    without,
    write,
)
from selective_optim._text import first_of, warn
from selective_optim.decisions.state_dict import (
    PARTS,
    POLICIES,
    RECORD,
    Decided,
    require_dict,
    require_whole,
)
from selective_optim.step.setting import PER_PARAM, WD, pick

Group = dict[str, Any]
ROUTE, OTHERS = "route", "routes"  # of a group; what a route's class saves besides
BY_GROUP = (RECORD, POLICIES, PARTS)
RATES, USE_MUON = ("lr", "initial_lr"), "use_muon"
# What a class that keeps no record has for a group in each of those lists.
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
        self._optimizers, self._groups = optimizers, groups

    def _owner(self, key: Any) -> Any:
        """Return the state that has a key, or else that of the route's optimizer."""
        for optimizer in self._optimizers.values():
            if key in optimizer.state:
                return optimizer.state
        for group in self._groups:
            if any(param is key for param in group["params"]):
                return self._optimizers[group["route"]].state
        raise KeyError(key)

    def __getitem__(self, key: Any) -> Any:
        return self._owner(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._owner(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._owner(key)[key]

    def __contains__(self, key: object) -> bool:
        return any(key in o.state for o in self._optimizers.values())

    def __iter__(self) -> Iterator[Any]:
        for optimizer in self._optimizers.values():
            yield from optimizer.state

    def __len__(self) -> int:
        return sum(len(o.state) for o in self._optimizers.values())

    def __repr__(self) -> str:
        return repr(dict(self))


def joined(saved: Mapping[str, StateDict], order: Sequence[str]) -> StateDict:
    """Make one state dict of those of the routes, with groups in this order of them."""
    numbers, state, groups = count(), dict[Any, Any](), list[Group]()
    lists: dict[str, list[Any]] = {
        key: [] for key in BY_GROUP if any(key in own for own in saved.values())
    }
    index = dict.fromkeys(saved, 0)
    for name in order:
        own, place = saved[name], index[name]
        index[name] += 1
        group = own["param_groups"][place]
        keys = {key: next(numbers) for key in group["params"]}
        groups.append({**group, "params": list(keys.values())})
        state |= {keys[key]: own["state"][key] for key in keys if key in own["state"]}
        for key, values in lists.items():
            values.append(own[key][place] if key in own else NOTHING[key])
    known = ("state", "param_groups", *BY_GROUP)
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
    require_dict(state_dict)
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
        for key in BY_GROUP:
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
        fitted[name] = saved.get(name, {"state": {}, "param_groups": []})
        if not _fits(fitted[name], optimizer, decided[name]):
            groups = optimizer.param_groups
            fitted[name] = _by_name(name, fitted[name], groups, decided[name], new)
        for group in fitted[name]["param_groups"]:
            group[ROUTE] = name
    count = sum(len(own) for groups in decided.values() for own in groups)
    if new and len(new) == count:
        raise ValueError(
            f"the loaded state dict has nothing for any of {len(new)} parameters: it "
            f"is of another model, or of none. Load what optimizer.state_dict() "
            f"returned."
        )
    return fitted, new


def _by_route(state_dict: Any, names: list[str]) -> dict[str, StateDict]:
    if isinstance(state_dict, (list, tuple)):
        if len(state_dict) != len(names):
            raise ValueError(
                f"{len(state_dict)} state dicts were given, and this optimizer has the "
                f"routes {', '.join(map(repr, names))}. Pass one for each, in this "
                f"order, or {{route: state_dict}}."
            )
        return {name: _copied(own) for name, own in zip(names, state_dict)}
    require_dict(state_dict)
    if "param_groups" not in state_dict and state_dict.keys() <= set(names):
        return {name: _copied(own) for name, own in state_dict.items()}
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


def _copied(state_dict: Any) -> StateDict:
    """Copy the lists and groups of a state dict, into which the route is written."""
    require_dict(state_dict)
    require_whole(state_dict)
    groups = [dict(group) for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


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
        mine, found, rest = list[Entry](), list[Entry](), without(group, PER_PARAM)
        for place, decision in enumerate(own):
            known = str(decision.telling_name)
            if known in entries:
                if entries[known] in mine:
                    raise ValueError(
                        f"{known!r} names two parameters of route {name!r}, so what "
                        f"was saved for each is not known. Make this optimizer of "
                        f"model.named_parameters() of one module that has both."
                    )
                found.append(entries[known])
            else:
                new.append(decision.label(index, place))
            mine.append(entries.get(known, Entry(known, known, hyper=rest)))
        way_out = "Make this optimizer with groups as they were saved."
        hyper = {**rest, **merged(found, way_out)} if found else rest
        packed.append((hyper, mine))
    whole = write(saved, packed)
    return whole | (recorded(saved, packed) if RECORD in saved else {})


def warn_of_new(labels: Sequence[str]) -> None:
    """Warn of parameters for which nothing was saved."""
    if labels:
        warn(
            f"nothing was saved for {first_of(labels, ', ')} by the route that steps "
            f"{'them' if labels[1:] else 'it'} now, so "
            f"{'they begin' if labels[1:] else 'it begins'} anew. Load with the routes "
            f"of the state dict to go on."
        )
