"""State dicts of several optimizers as one, and what others saved for one of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

from selective_optim._entries import (
    Entry,
    Hyper,
    StateDict,
    merged,
    read,
    recorded,
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
from selective_optim.step.lasting import PER_PARAM

Group = dict[str, Any]
ROUTE, OTHERS = "route", "routes"  # of a group; what a route's class saves besides
BY_GROUP = (RECORD, POLICIES, PARTS)
# What a class that keeps no record has for a group in each of those lists.
NOTHING: dict[str, Any] = {RECORD: [], POLICIES: None, PARTS: []}
# By which optimizers of other projects tell their halves, and what each reads there:
# Keller Jordan's Muon, pytorch_optimizer and ultralytics; timm; dion; nanochat.
KEYS: dict[str, Callable[[str, Sequence[str]], object]] = {
    "use_muon": lambda name, names: name == names[0],
    "use_fallback": lambda name, names: name != names[0],
    "algorithm": lambda name, names: name,
    "kind": lambda name, names: name,
}


def joined(saved: Mapping[str, StateDict], order: Sequence[str]) -> StateDict:
    """Make one state dict of those of the routes.

    Args:
        saved: By route.
        order: Routes of the groups, in the order that these get.
    """
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
    groups: Mapping[str, Sequence[Group]],
    decided: Mapping[str, Decided],
) -> tuple[dict[str, StateDict], list[str]]:
    """Make the state dict of each route of what was saved.

    Args:
        state_dict: As for ``Routed.load_state_dict``.
        groups: Of each route.
        decided: What was decided for their parameters.

    Returns:
        The state dicts, and labels of the parameters that begin anew.

    Raises:
        ValueError: It has other routes, or the names that it takes are not known.
    """
    saved = _by_route(state_dict, list(groups))
    if unknown := [name for name in saved if name not in groups]:
        raise ValueError(
            f"the loaded state dict has the route {unknown[0]!r}, and the routes here "
            f"are {', '.join(map(repr, groups))}. Load a mapping from these names to "
            f"the values of selective_optim.checkpoint.split_routes(state_dict)."
        )
    fitted, new = dict[str, StateDict](), list[str]()
    for name, own in groups.items():
        fitted[name] = saved.get(name, {"state": {}, "param_groups": []})
        if not _fits(fitted[name], own, decided[name]):
            fitted[name] = _by_name(name, fitted[name], own, decided[name], new)
        for group in fitted[name]["param_groups"]:
            group[ROUTE] = name
    count = sum(len(group["params"]) for own in groups.values() for group in own)
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
    groups = [dict(group) for group in state_dict["param_groups"]]
    for index, group in enumerate(groups):
        if ROUTE in group:
            continue
        key = next((key for key in KEYS if key in group), "")
        held = group.pop(key, None)
        group[ROUTE] = next(
            (n for n in names if key and KEYS[key](n, names) == held), held
        )
        if group[ROUTE] is None:
            raise ValueError(
                f"group {index} of the loaded state dict has no {ROUTE!r}: which of "
                f"{', '.join(map(repr, names))} saved it is not known. Load "
                f"{{{names[-1]!r}: state_dict}}, or one for each route."
            )
    return split_routes({**state_dict, "param_groups": groups})


def _copied(state_dict: Any) -> StateDict:
    """Copy the lists and groups of a state dict, into which the route is written."""
    require_dict(state_dict)
    require_whole(state_dict)
    groups = [dict(group) for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def _fits(saved: StateDict, groups: Sequence[Group], decided: Decided) -> bool:
    """Tell whether a state dict has these groups, and hyperparameters for all."""
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(group["params"]) for group in groups]:
        return False
    pairs = zip(saved["param_groups"], groups)
    if any(mine.keys() - old.keys() - {ROUTE} for old, mine in pairs):
        return False
    try:
        names = list(read(saved, None))
    except ValueError:  # without names the order is believed, as torch does
        return True
    mine = _names(decided)
    return names == mine or None in mine or len(set(mine)) < len(mine)


def _names(decided: Decided) -> list[str | None]:
    return [decision.telling_name for own in decided for decision in own]


def _by_name(
    name: str,
    saved: StateDict,
    groups: Sequence[Group],
    decided: Decided,
    new: list[str],
) -> StateDict:
    """Give each parameter the state that was saved under its name for its route.

    Args:
        name: Of the route.
        saved: What was saved for it.
        groups: Its groups, whose hyperparameters stay where nothing was saved.
        decided: What was decided for their parameters.
        new: Takes the labels of those for which nothing was saved.
    """
    way_out = (
        f"Load merge_groups(state_dict, group_names(groups, model), order=[row.name "
        f"for row in optimizer.decay_report() if row.route == {name!r}]) of "
        f"selective_optim.checkpoint in its place, where groups are those that saved."
    )
    entries = read(saved, None, way_out)
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
        hyper = {**rest, **without(merged(found, way_out), KEYS)} if found else rest
        packed.append((hyper, mine))
    whole = write(saved, packed)
    return whole | (recorded(saved, packed) if RECORD in saved else {})


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
