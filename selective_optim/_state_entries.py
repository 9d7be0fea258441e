"""The parameters of a state dict by name: read from any layout, written into any.

It may be torch's, one of this library, or one of ``torch.distributed.checkpoint``
(not flattened), which lists parameters by name.
"""

from __future__ import annotations

from collections.abc import (
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass, field
from itertools import chain, count, repeat
from typing import Any

import torch

from selective_optim._text import first_of, received, warn
from selective_optim._torch import canonical_name, told_apart, without_wrappers
from selective_optim.decay import Decay
from selective_optim.decisions.state_dict import (
    PARTS,
    POLICIES,
    RECORD,
    Decided,
    begin_in,
    require_whole,
)
from selective_optim.step.setting import PER_PARAM, WD, Group

StateDict = dict[str, Any]
Hyper = dict[str, Any]  # of a group: all but its parameters and their names
Names = Sequence[Sequence[str]]
Groups = Sequence[tuple[Hyper, Sequence["Entry"]]]
ROUTE, OTHERS = "route", "routes"  # of a group; what a route's class saves besides
# What a state dict lists by group besides, and there of one that has no such list.
NOTHING: dict[str, Any] = {RECORD: [], POLICIES: None, PARTS: []}
NAME_THEM = "Pass names=group_names(optimizer.param_groups, model)."
WRITE_NAMES = (
    "Write names into it: for group, names in zip(state_dict['param_groups'], "
    "selective_optim.checkpoint.group_names(groups, model)): group['param_names'] = "
    "names, where groups are those that saved."
)


@dataclass(frozen=True)
class Entry:
    """One parameter of a state dict: its name, its state and how it decays."""

    name: str
    key: int | str
    group: int = 0
    hyper: Hyper = field(default_factory=dict)
    state: Any = None
    # What its class keeps for its part of the group alone.
    part_values: Mapping[str, Any] | None = None
    # Multiplier, form, and a dict of what training began with where that is needed.
    record: Sequence[Any] = ()

    @property
    def wd(self) -> Any:
        """Effective decay."""
        decay = Decay(self.record[0], fixed=begin_in(self.record).get("fixed"))
        return (self.part_values or {}).get(WD, decay.of(self.hyper[WD]))

    def label(self) -> str:
        return f"{self.name!r} (group {self.group})"


def without(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Copy a dict, but for some keys."""
    return {key: value for key, value in values.items() if key not in keys}


def form_of(hyper: Hyper) -> str | None:
    """Tell the form that torch's class gives a group; Adam before 2.7 does not say."""
    if "betas" in hyper and "decoupled_weight_decay" not in hyper:
        return None
    return "decoupled" if hyper.get("decoupled_weight_decay") else "l2"


def read(
    state_dict: StateDict, names: Names | None, way_out: str = NAME_THEM
) -> dict[str, Entry]:
    """List the parameters of a state dict by canonical name."""
    require_whole(state_dict)
    listed: list[Entry] = []
    for index, group in enumerate(state_dict["param_groups"]):
        keys = group["params"]
        hyper = without(group, PER_PARAM)
        plain = [[1.0, form_of(hyper)]] * len(keys)
        records = state_dict[RECORD][index] if RECORD in state_dict else plain
        part_values: list[Any] = [None] * len(keys)
        for part in state_dict[PARTS][index] if PARTS in state_dict else ():
            shared = without(part, ["positions"])
            for position in part["positions"]:
                part_values[position] = shared
        own = _names_of(group, index, names, records, way_out)
        columns = own, keys, records, part_values
        for name, key, record, values in zip(*columns, strict=True):
            state = state_dict["state"].get(key)
            listed.append(Entry(name, key, index, hyper, state, values, record))
    entries: dict[str, Entry] = {}
    for name, entry in zip(told_apart([entry.name for entry in listed]), listed):
        known = entries.setdefault(name, entry)
        if known is not entry:
            raise ValueError(
                f"{entry.name!r} names two parameters of the state dict, in groups "
                f"{known.group} and {entry.group}. Name each once: names=[[...], ...]."
            )
    return entries


def _names_of(
    group: Mapping[str, Any],
    index: int,
    names: Names | None,
    records: Iterable[Any],
    way_out: str,
) -> list[str]:
    keys = group["params"]
    if names is None:
        by_name = [key for key in keys if isinstance(key, str)]
        noted = (begin_in(entry).get("name") for entry in records)
        own = list(group.get("param_names", by_name or filter(None, noted)))
    else:
        listed = names if isinstance(names, Iterable) else [names]
        if isinstance(names, str) or any(isinstance(name, str) for name in listed):
            raise TypeError(
                f"`names` must be one list of names per group, not {received(names)}. "
                f"{way_out}"
            )
        own = list(names[index]) if index < len(names) else []
    if len(own) < len(keys):
        raise ValueError(
            f"parameter {len(own)} of group {index} of the state dict has no name. "
            f"{way_out}"
        )
    if len(own) > len(keys):
        raise ValueError(
            f"{own[len(keys)]!r} is one name too many for group {index} of the state "
            f"dict, which has {len(keys)} parameters. Leave it out of `names`."
        )
    return own


def choose(
    entries: dict[str, Entry], names: Iterable[str], argument: str
) -> list[Entry]:
    """Put all parameters into the order of ``names``, which names each once."""
    chosen: dict[str, Entry] = {}
    for name in names:
        key = canonical_name(name)
        # What a parametrization made several of goes by names of its own.
        key = key if key in entries else without_wrappers(name)
        if key not in entries:
            raise ValueError(
                f"{name!r} in `{argument}` names no parameter of the state dict. "
                f"Correct it, or leave it out."
            )
        if key in chosen:
            raise ValueError(
                f"{name!r} stands in `{argument}` twice. Leave one of them out."
            )
        chosen[key] = entries[key]
    missing = [entry for name, entry in entries.items() if name not in chosen]
    if missing:
        more = f", and so are {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{missing[0].label()} is missing in `{argument}`{more}. Add its name."
        )
    return list(chosen.values())


def write(state_dict: StateDict, groups: Groups, record: bool = True) -> StateDict:
    """Put a state dict together: these groups, and the state of their parameters.

    Dicts and lists are new, tensors and what else ``state_dict`` holds are shared. If
    ``record``, it says what part of its group's decay each parameter has, where known.
    """
    saved = state_dict["param_groups"]
    named = any("param_names" in group for group in saved)
    listed = set(chain.from_iterable(group["params"] for group in saved))
    state = {key: own for key, own in state_dict["state"].items() if key not in listed}
    by_name, numbers = any(isinstance(key, str) for key in listed), count()
    packed: list[Hyper] = []
    for hyper, mine in groups:
        # torch numbers parameters through all groups; DCP's names stay.
        keys = [entry.key if by_name else next(numbers) for entry in mine]
        names = {"param_names": [entry.name for entry in mine]} if named else {}
        packed.append({**hyper, "params": keys, **names})
        for key, entry in zip(keys, mine):
            if entry.state is not None:
                own = entry.state
                state[key] = dict(own) if isinstance(own, dict) else own
    whole = without(state_dict, [RECORD, PARTS, POLICIES])
    whole |= {"state": state, "param_groups": packed}
    if record and PARTS in state_dict:
        whole[PARTS] = [_parts(mine) for _, mine in groups]
    return whole | _recorded(state_dict, groups) if record else whole


def _parts(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Collect what parts of other groups kept, for their parameters in this one."""
    parts: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        if (own := entry.part_values) is not None:
            part = parts.setdefault(id(own), {"positions": [], **own})
            part["positions"].append(position)
    return list(parts.values())


def _recorded(state_dict: StateDict, groups: Groups) -> dict[str, Any]:
    records, known = list[list[Any]](), True
    for _, mine in groups:
        # Of the old groups: an optimizer may have another decay by now.
        decays = [entry.hyper.get(WD, 0.0) for entry in mine if entry.hyper]
        largest = max(decays, key=float, default=1.0)
        known &= all(not entry.record or entry.record[1] for entry in mine)
        known &= bool(largest)
        records.append([_record(entry, largest) for entry in mine])
    return {RECORD: records} if known or RECORD in state_dict else {}


def _record(entry: Entry, largest: Any) -> list[Any]:
    if "fixed" in begin_in(entry.record) or entry.hyper.get(WD, largest) == largest:
        return list(entry.record)
    # To 15 digits, so that 0.01 of 0.1 is the 0.1 that a policy says.
    multiplier = float(f"{float(entry.wd) / float(largest):.15g}")
    return [multiplier, *entry.record[1:]]


def merged(entries: Sequence[Entry], way_out: str) -> Hyper:
    """Make the hyperparameters of one group from several that differ in decay alone."""
    hyper = agreed(entries, [entry.hyper for entry in entries], [WD], way_out)
    decays = [entry.hyper[WD] for entry in entries if WD in entry.hyper]
    return hyper | ({WD: max(decays, key=float)} if decays else {})  # Rprop has none


def agreed(
    entries: Sequence[Entry], hypers: Sequence[Hyper], free: Iterable[str], way_out: str
) -> Hyper:
    """Return the values of one group from several that differ in `free` alone."""
    first, own = entries[0], hypers[0]
    for entry, hyper in zip(entries, hypers, strict=True):
        for key in [key for key in {**own, **hyper} if key not in free]:
            if (mine := own.get(key)) != (other := hyper.get(key)):
                raise ValueError(
                    f"{key!r} is {mine} for {first.label()} and {other} for "
                    f"{entry.label()}, but one group has one. {way_out.format(key)}"
                )
    return own


# Of an optimizer of several.


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
    saved: Mapping[str, StateDict],
    optimizers: Mapping[str, torch.optim.Optimizer],
    decided: Mapping[str, Decided],
) -> tuple[dict[str, StateDict], list[str]]:
    """Make the state dict of each route of what was saved.

    The labels that are returned are those of the parameters that begin anew.
    """
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
    entries = read(saved, None, WRITE_NAMES)
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
        warn(
            f"nothing was saved for {first_of(labels, ', ')} by the route that steps "
            f"{'them' if labels[1:] else 'it'} now, so "
            f"{'they begin' if labels[1:] else 'it begins'} anew. Load with the routes "
            f"of the state dict to go on."
        )
