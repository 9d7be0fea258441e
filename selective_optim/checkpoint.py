"""Convert optimizer state dicts between hand-split groups and one group, by name.

A state dict keeps state by position, so one saved with a group of decayed and a
group of exempt parameters does not fit an optimizer with one group. Here names say
which state belongs to which parameter: state dicts go in, and new ones come out
that share the tensors. The form of ``torch.distributed.checkpoint.state_dict``
(not flattened), which lists parameters by name, is taken too and kept.

A flattened one keeps one ``weight_decay`` per parameter, that of its group. Loaded
into other groups, torch takes for each group that of one of its parameters: one of
this library gives torch's hand-split exempt group the full decay. Set
``group["weight_decay"] = 0.0`` there after loading, or convert the plain form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Any

from torch import nn

from selective_optim._canonical_names import (
    canonical_name,
    told_apart,
    without_wrappers,
)
from selective_optim._text import received, shape_text
from selective_optim.decisions.state_dict import (
    PARTS,
    RECORD,
    require_dict,
    require_whole,
)
from selective_optim.parameters import as_modules
from selective_optim.step.lasting import PER_PARAM

StateDict = dict[str, Any]
Hyper = dict[str, Any]  # of a group: all but its parameters and their names
Names = Sequence[Sequence[str]]
Record = list[Any]  # a multiplier, a form, and where needed what training began with


@dataclass(frozen=True)
class Entry:
    """One parameter of a state dict: its name, where its state is, how it decays."""

    name: str
    key: int | str
    group: int
    hyper: Hyper
    multiplier: float = 1.0
    form: str | None = None
    begin: Mapping[str, Any] = field(default_factory=dict)

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
    require_whole(state_dict)
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
    hyper = {key: value for key, value in group.items() if key not in PER_PARAM}
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
    multiplier = entry.multiplier
    if entry.hyper["weight_decay"] != largest:
        # To 15 digits, so that 0.01 of 0.1 is the 0.1 that a policy says.
        multiplier = float(f"{float(entry.wd) / float(largest):.15g}")
    return [multiplier, entry.form, *([entry.begin] if entry.begin else [])]


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
    # torch numbers parameters through all groups; DCP's names stay.
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


def group_names(
    param_groups: Iterable[Mapping[str, Any]], model: nn.Module | Sequence[nn.Module]
) -> list[list[str]]:
    """Name the parameters of every group, for a state dict saved without names.

    Args:
        param_groups: ``optimizer.param_groups``, or the groups given to a constructor.
        model: The module, or modules, that the parameters live in.

    Returns:
        Canonical names, group by group; where a parametrization made several
        parameters of one, as weight norm does, their own names.

    Raises:
        TypeError: The arguments are no groups, or no modules.
        ValueError: A parameter is in none of the modules.
    """
    named = [pair for m in as_modules(model) for pair in m.named_parameters()]
    own = told_apart([name for name, _ in named])
    names = {id(param): name for name, (_, param) in zip(own, named)}

    def name_of(index: int, position: int, param: Any) -> str:
        if id(param) not in names:
            raise ValueError(
                f"parameter {position} of group {index} (shape "
                f"{shape_text(param.shape)}) is in none of the modules given as "
                f"`model`. Pass every module that holds parameters: [model, ...]."
            )
        return names[id(param)]

    return [
        [name_of(index, position, p) for position, p in enumerate(group["params"])]
        for index, group in enumerate(_as_groups(param_groups))
    ]


def _as_groups(param_groups: Any) -> list[Mapping[str, Any]]:
    groups = list(
        param_groups if isinstance(param_groups, Iterable) else [param_groups]
    )
    for group in groups:
        if not isinstance(group, Mapping):
            raise TypeError(
                f"`param_groups` must be a list of dicts, and holds "
                f"{received(group)}. Pass optimizer.param_groups."
            )
    return groups


def merge_groups(
    state_dict: StateDict,
    names: Names | None = None,
    *,
    order: Iterable[str] | None = None,
    by: str | Sequence[str] = (),
) -> StateDict:
    """Turn a state dict of hand-split groups into one of one group.

    Its ``weight_decay`` is the largest of those merged. What each parameter's was in
    relation to it is recorded, so that an optimizer whose policy decides otherwise
    warns on loading.

    Args:
        state_dict: Of an optimizer of this library or of torch; stays as it is.
        names: Names of the parameters, group by group; by default the
            ``"param_names"`` of the groups.
        order: All names in the order of the optimizer that is to load the result, as
            a rule ``[name for name, _ in model.named_parameters()]``. Without it the
            order of the groups is kept, decayed before exempt as a rule, which is
            not that of ``model.parameters()``: where shapes agree, an optimizer made
            from that would give parameters the state of others.
        by: Hyperparameters that keep groups apart: with ``"lr"`` there is one group
            per learning rate.

    Returns:
        The merged state dict; its groups come in the order of their first parameters.

    Raises:
        ValueError: A name is missing, doubled or unknown; or merged groups differ in
            another hyperparameter than ``weight_decay``.

    Example:
        >>> import torch
        >>> named = list(torch.nn.Linear(2, 1).named_parameters())
        >>> split = torch.optim.SGD(
        ...     [{"params": named[1:]}, {"params": named[:1], "weight_decay": 0.1}]
        ... )
        >>> merged = merge_groups(split.state_dict(), order=[name for name, _ in named])
        >>> [group] = merged["param_groups"]
        >>> group["param_names"], group["weight_decay"]
        (['weight', 'bias'], 0.1)
    """
    entries = read(state_dict, names)
    ordered = entries.values() if order is None else choose(entries, order, "order")
    apart = (by,) if isinstance(by, str) else tuple(by)
    groups = [(_merged(mine, apart), mine) for mine in _kept_apart(ordered, apart)]
    return write(state_dict, groups, recorded(state_dict, groups))


def split_groups(
    state_dict: StateDict,
    groups: Iterable[Mapping[str, Any]],
    *,
    names: Names | None = None,
) -> StateDict:
    """Turn a state dict of merged groups into one of hand-split groups.

    Args:
        state_dict: Of an optimizer of this library or of torch; stays as it is.
        groups: The groups wanted, in order: dicts with names under ``"params"`` and
            the hyperparameters to set. What a group does not set stays as it was, and
            ``weight_decay`` is what the state dict records of the parameters.
        names: Names of the parameters of ``state_dict``, group by group; by default
            the ``"param_names"`` of its groups.

    Returns:
        The split state dict, for an optimizer that has these groups and no policy.

    Raises:
        ValueError: A name is missing, doubled or unknown; parameters of one group
            differ in what the group does not set; or one decays in a form that
            torch's class does not give the group.

    Example:
        >>> import torch
        >>> from selective_optim import SGD
        >>> named = torch.nn.Linear(2, 1).named_parameters()
        >>> merged = SGD(named, weight_decay=0.1, wd_policy="no_bias").state_dict()
        >>> split = split_groups(merged, [{"params": ["weight"]}, {"params": ["bias"]}])
        >>> [group["weight_decay"] for group in split["param_groups"]]
        [0.1, 0.0]
    """
    wanted = [dict(group) for group in groups]
    listed = [list(group.pop("params")) for group in wanted]
    entries = read(state_dict, names)
    chosen = iter(choose(entries, chain.from_iterable(listed), "groups"))
    parts = [list(islice(chosen, len(part))) for part in listed]
    # A group without parameters takes its hyperparameters from any.
    anyone = list(entries.values())[:1]
    return write(
        state_dict,
        [
            (_split(part or anyone, own), part)
            for part, own in zip(parts, wanted, strict=True)
        ],
        None,
    )


def _kept_apart(
    entries: Iterable[Entry], apart: tuple[str, ...]
) -> Iterator[list[Entry]]:
    """Collect the parameters whose groups agree on what keeps groups apart."""
    together: list[tuple[list[Any], list[Entry]]] = []
    for entry in entries:
        values = [entry.hyper.get(key) for key in apart]
        # Compared, not hashed: a learning rate may be a tensor.
        for known, mine in together:
            if known == values:
                mine.append(entry)
                break
        else:
            together.append((values, [entry]))
    return (mine for _, mine in together)


def _merged(entries: list[Entry], apart: tuple[str, ...]) -> Hyper:
    way_out = (
        f"Keep such groups apart: by=[{''.join(f'{key!r}, ' for key in apart)}{{!r}}]."
    )
    hypers = [entry.hyper for entry in entries]
    _require_agreement(entries, hypers, ["weight_decay"], way_out)
    largest = max((hyper["weight_decay"] for hyper in hypers), key=float)
    return {**hypers[0], "weight_decay": largest}


def _split(entries: list[Entry], own: Hyper) -> Hyper:
    hypers = [{**entry.hyper, "weight_decay": entry.wd} for entry in entries]
    _require_agreement(
        entries, hypers, own, "Make it two groups, or set {!r} in this one."
    )
    hyper = {**hypers[0], **own}
    _require_form(entries, hyper)
    return hyper


def _require_agreement(
    entries: Sequence[Entry],
    hypers: Sequence[Hyper],
    free: Iterable[str],
    way_out: str,
) -> None:
    """Check that parameters that come together differ in nothing but what is free."""
    first, own = entries[0], hypers[0]
    for entry, hyper in zip(entries, hypers, strict=True):
        for key in [key for key in {**own, **hyper} if key not in free]:
            if (mine := own.get(key)) != (other := hyper.get(key)):
                raise ValueError(
                    f"{key!r} is {mine} for {first.label()} and {other} for "
                    f"{entry.label()}, but one group has one. {way_out.format(key)}"
                )


def _require_form(entries: Iterable[Entry], hyper: Hyper) -> None:
    """Check that torch decays these parameters in the form that was recorded."""
    form = form_of(hyper)
    for entry in entries if hyper["weight_decay"] and form else ():
        target = entry.begin.get("target")
        if entry.multiplier and (entry.form != form or target):
            towards = f" towards {target!r}" if target else ""
            raise ValueError(
                f"{entry.label()} decays in form {entry.form!r}{towards}, and torch "
                f"gives its group form {form!r}. If it is to change, set weight_decay "
                f"in every group and del state_dict['decay'] first."
            )
