"""The parameters of a state dict by name: read from any layout, written into any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

from selective_optim._text import received
from selective_optim._torch import telling_name
from selective_optim.decay import Decay
from selective_optim.decisions.state_dict import (
    PARTS,
    PER_GROUP,
    RECORD,
    begin_in,
    require_whole,
)
from selective_optim.step.setting import PER_PARAM, WD, without

StateDict = dict[str, Any]
Hyper = dict[str, Any]  # of a group: all but its parameters and their names
Names = Sequence[Sequence[str]]
Groups = Sequence[tuple[Hyper, Sequence["Entry"]]]
NAME_THEM = "Pass names=group_names(optimizer.param_groups, model)."


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
        decay = Decay(self.record[0], fixed=begin_in(self.record).get("fixed"))
        return (self.part_values or {}).get(WD, decay.of(self.hyper[WD]))

    def label(self) -> str:
        return f"{self.name!r} (group {self.group})"


def _telling_numbers(hyper: Hyper) -> set[str]:
    """Name the numbers that tell a class from others: all have a rate and a decay."""
    items = without(hyper, ("weight_decay", "eps", "lr_scale")).items()
    return {k for k, v in items if type(v) in (float, int, tuple) and k[-2:] != "lr"}


def is_foreign(entry: Entry, optimizer: Any) -> bool:
    """Tell whether there is state, and its group has numbers, but none of a class's."""
    # Some: other projects' classes that keep the same state have fewer.
    theirs, own = map(_telling_numbers, (entry.hyper, optimizer.defaults))
    return bool(entry.state and theirs and own) and theirs.isdisjoint(own)


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
        keys, hyper = group["params"], without(group, PER_PARAM)
        plain = [[1.0, form_of(hyper)]] * len(keys)
        records = state_dict[RECORD][index] if RECORD in state_dict else plain
        part_values: list[Any] = [None] * len(keys)
        for part in state_dict[PARTS][index] if PARTS in state_dict else ():
            values = without(part, ["positions"])
            for position in part["positions"]:
                part_values[position] = values
        group_names = _names_of(group, index, names, records, way_out)
        columns = group_names, keys, records, part_values
        for name, key, record, values in zip(*columns, strict=True):
            state = state_dict["state"].get(key)
            listed.append(Entry(name, key, index, hyper, state, values, record))
    entries: dict[str, Entry] = {}
    for entry in listed:
        first = entries.setdefault(telling_name(entry.name), entry)
        if first is not entry:
            raise ValueError(
                f"{entry.name!r} names two parameters of the state dict, in groups "
                f"{first.group} and {entry.group}. Name each once: names=[[...], ...]."
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
        recorded = (begin_in(record).get("name") for record in records)
        group_names = list(group.get("param_names", by_name or filter(None, recorded)))
    else:
        lists = names if isinstance(names, Sequence) else [""]
        if any(isinstance(n, str) or not isinstance(n, Iterable) for n in lists):
            raise TypeError(
                f"`names` must be one list of names per group, not {received(names)}. "
                f"{way_out}"
            )
        group_names = list(lists[index]) if index < len(lists) else []
    if len(group_names) < len(keys):
        raise ValueError(
            f"parameter {len(group_names)} of group {index} of the state dict has no "
            f"name. {way_out}"
        )
    if len(group_names) > len(keys):
        raise ValueError(
            f"{group_names[len(keys)]!r} is one name too many for group {index} of the "
            f"state dict, which has {len(keys)} parameters. Leave it out of `names`."
        )
    return group_names


def choose(
    entries: dict[str, Entry], names: Iterable[str], argument: str
) -> list[Entry]:
    """Put all parameters into the order of ``names``, which names each once."""
    chosen: dict[str, Entry] = {}
    for name in names:
        key = telling_name(name)
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
    if missing := [entry for name, entry in entries.items() if name not in chosen]:
        more = f", and so are {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{missing[0].label()} is missing in `{argument}`{more}. Add its name."
        )
    return list(chosen.values())


def write(state_dict: StateDict, groups: Groups, record: bool = True) -> StateDict:
    """Put a state dict of these groups together; it is new, and shares the tensors."""
    saved_groups = state_dict["param_groups"]
    named = any("param_names" in group for group in saved_groups)
    saved_keys = set(chain.from_iterable(group["params"] for group in saved_groups))
    by_name, numbers = any(isinstance(key, str) for key in saved_keys), count()
    state: dict[Any, Any] = without(state_dict["state"], saved_keys)
    packed: list[Hyper] = []
    for hyper, entries in groups:
        # torch numbers parameters through all groups; DCP's names stay.
        keys = [entry.key if by_name else next(numbers) for entry in entries]
        names = {"param_names": [entry.name for entry in entries]} if named else {}
        packed.append({**hyper, "params": keys, **names})
        for key, entry in zip(keys, entries):
            if entry.state is not None:
                is_dict = isinstance(entry.state, dict)
                state[key] = dict(entry.state) if is_dict else entry.state
    whole = without(state_dict, PER_GROUP)
    whole |= {"state": state, "param_groups": packed}
    if record and PARTS in state_dict:
        whole[PARTS] = [_parts(entries) for _, entries in groups]
    return whole | _recorded(state_dict, groups) if record else whole


def _parts(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Collect what parts of other groups kept, for their parameters in this one."""
    parts: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        if (values := entry.part_values) is not None:
            part = parts.setdefault(id(values), {"positions": [], **values})
            part["positions"].append(position)
    return list(parts.values())


def _recorded(state_dict: StateDict, groups: Groups) -> dict[str, Any]:
    records, complete = list[list[Any]](), True
    for _, entries in groups:
        # Of the old groups: an optimizer may have another decay by now.
        decays = [entry.hyper.get(WD, 0.0) for entry in entries if entry.hyper]
        largest = max(decays, key=float, default=1.0)
        forms = [entry.record[1] for entry in entries if entry.record]
        complete = complete and all(forms) and bool(largest)
        records.append([_record(entry, largest) for entry in entries])
    return {RECORD: records} if complete or RECORD in state_dict else {}


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
    first, common = entries[0], hypers[0]
    for entry, hyper in zip(entries, hypers, strict=True):
        for key in [key for key in {**common, **hyper} if key not in free]:
            if (value := common.get(key)) != (other := hyper.get(key)):
                raise ValueError(
                    f"{key!r} is {value} for {first.label()} and {other} for "
                    f"{entry.label()}, but one group has one. {way_out.format(key)}"
                )
    return common
