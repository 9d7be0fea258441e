"""A state dict taken apart into named parameters, and put together in other groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from selective_optim._loading import RECORD, require_dict
from selective_optim._module_tree import canonical_name, without_wrappers
from selective_optim._text import received

StateDict = dict[str, Any]
Hyper = dict[str, Any]  # of a group: all but its parameters and their names
Names = Sequence[Sequence[str]]
Record = list[Any]  # a multiplier and a form

MEMBERS = ("params", "param_names")
PARTS = "parts"  # the key of a state dict for what split groups keep for themselves


@dataclass(frozen=True)
class Entry:
    """One parameter of a state dict: its name, where its state is, how it decays."""

    name: str
    key: int | str
    group: int
    hyper: Hyper
    multiplier: float = 1.0
    form: str | None = None

    @property
    def wd(self) -> Any:
        """Effective decay: the group's times the multiplier."""
        wd = self.hyper["weight_decay"]
        return wd if self.multiplier == 1 else wd * self.multiplier

    def label(self) -> str:
        """Name the parameter and its group, as a message should."""
        return f"{self.name!r} (group {self.group})"


def form_of(hyper: Hyper) -> str | None:
    """Tell the form that torch's class gives a group; Adam before 2.7 does not say."""
    if "betas" in hyper and "decoupled_weight_decay" not in hyper:
        return None
    return "decoupled" if hyper.get("decoupled_weight_decay") else "l2"


def told_apart(names: Sequence[str]) -> list[str]:
    """Make names canonical, but for those that a parametrization's parameters share."""
    canonical = list(map(canonical_name, names))
    bearers = Counter(canonical)
    return [
        short if bearers[short] == 1 else without_wrappers(name)
        for name, short in zip(names, canonical)
    ]


def _require_lists(names: object) -> None:
    listed = names if isinstance(names, Iterable) else [names]
    if isinstance(names, str) or any(isinstance(name, str) for name in listed):
        raise TypeError(
            f"`names` must be one list of names per group, not {received(names)}. "
            f"Pass names=group_names(optimizer.param_groups, model)."
        )


def read(state_dict: StateDict, names: Names | None) -> dict[str, Entry]:
    """List the parameters of a state dict by canonical name.

    Raises:
        TypeError: The state dict is no dict, or ``names`` no list of lists.
        ValueError: A parameter has no name, or two have the same.
    """
    require_dict(state_dict)
    _require_lists(names)
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            f"`state_dict` must hold 'state' and 'param_groups', not "
            f"{sorted(state_dict)[:3]}. Pass optimizer.state_dict()."
        )
    listed = [
        entry
        for index, group in enumerate(state_dict["param_groups"])
        for entry in _entries_of(state_dict, group, index, names)
    ]
    entries: dict[str, Entry] = {}
    for key, entry in zip(told_apart([entry.name for entry in listed]), listed):
        known = entries.setdefault(key, entry)
        if known is not entry:
            raise ValueError(
                f"{entry.name!r} names two parameters of the state dict, in groups "
                f"{known.group} and {entry.group}. Name each once: names=[[...], ...]."
            )
    return entries


def _entries_of(
    state_dict: StateDict, group: Mapping[str, Any], index: int, names: Names | None
) -> Iterable[Entry]:
    keys = group["params"]
    own = _names_of(group, index, names)
    hyper = {key: value for key, value in group.items() if key not in MEMBERS}
    records: list[Record] = [[1.0, form_of(hyper)]] * len(keys)
    if RECORD in state_dict:
        records = state_dict[RECORD][index]
    for name, key, record in zip(own, keys, records, strict=True):
        yield Entry(name, key, index, hyper, *record)


def _names_of(group: Mapping[str, Any], index: int, names: Names | None) -> list[str]:
    keys = group["params"]
    if names is not None:
        own = list(names[index]) if index < len(names) else []
    elif "param_names" in group:
        own = list(group["param_names"])
    else:  # torch.distributed.checkpoint lists parameters by name
        own = [key for key in keys if isinstance(key, str)]
    if len(own) < len(keys):
        raise ValueError(
            f"parameter {len(own)} of group {index} of the state dict has no name. "
            f"Pass names=group_names(optimizer.param_groups, model)."
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
    """Put all parameters into the order of ``names``.

    Raises:
        ValueError: A name is missing, doubled or unknown.
    """
    chosen: dict[str, Entry] = {}
    for name in names:
        key = canonical_name(name)
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


def recorded(
    state_dict: StateDict, groups: Iterable[tuple[Hyper, Sequence[Entry]]]
) -> list[list[Record]] | None:
    """Record what part of its group's decay each parameter has, where known."""
    records = [
        [_record(entry, hyper["weight_decay"]) for entry in mine]
        for hyper, mine in groups
    ]
    known = RECORD in state_dict or all(
        hyper["weight_decay"] and entry.form for hyper, mine in groups for entry in mine
    )
    return records if known else None


def _record(entry: Entry, largest: Any) -> Record:
    if entry.hyper["weight_decay"] == largest:
        return [entry.multiplier, entry.form]
    # To 15 digits, so that 0.01 of 0.1 is the 0.1 that a policy says.
    return [float(f"{float(entry.wd) / float(largest):.15g}"), entry.form]


def write(
    state_dict: StateDict,
    groups: Sequence[tuple[Hyper, Sequence[Entry]]],
    records: list[list[Record]] | None,
) -> StateDict:
    """Put a state dict together: these groups, and the state of their parameters.

    Parameters that were numbered are numbered anew. Dicts and lists are new, tensors
    and what else a state dict of ``state_dict`` holds are shared.
    """
    entries = list(chain.from_iterable(mine for _, mine in groups))
    numbers = count()
    keys = {e.key: e.key if isinstance(e.key, str) else next(numbers) for e in entries}
    state = {
        keys.get(key, key): dict(own) if isinstance(own, dict) else own
        for key, own in state_dict["state"].items()
    }
    named = any("param_names" in group for group in state_dict["param_groups"])
    packed = [
        {
            **hyper,
            "params": [keys[entry.key] for entry in mine],
            **({"param_names": [entry.name for entry in mine]} if named else {}),
        }
        for hyper, mine in groups
    ]
    # What parts of other groups kept for themselves fits no group of these.
    left = (RECORD, PARTS)
    others = {key: value for key, value in state_dict.items() if key not in left}
    record = {} if records is None else {RECORD: records}
    return {**others, "state": state, "param_groups": packed, **record}
