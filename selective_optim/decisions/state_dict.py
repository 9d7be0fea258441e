"""What a state dict must hold to be loaded, and what it records of decisions.

Beside torch's own keys it has ``"decay"``, see ``record_of``; ``"decay_policies"``, the
text of each policy; and ``"parts"`` of ``step.lasting_parts``. One of torch, whose
groups were split by hand into decayed and exempt, is recognized by its layout, and
answered with the call of ``checkpoint`` that converts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from selective_optim._text import shape_text
from selective_optim._torch import canonical_name
from selective_optim.decay import Decision, Form
from selective_optim.fused.guards import params_of
from selective_optim.step.kernels import Kernel
from selective_optim.step.parts import free_choice
from selective_optim.step.setting import Group, Groups

# Keys of a state dict: for what was decided, and for what split groups keep apart.
RECORD, PARTS, POLICIES = "decay", "parts", "decay_policies"
# Each has an item by group; where there is no such list, the items are these.
PER_GROUP: dict[str, Any] = {RECORD: [], POLICIES: None, PARTS: []}
Decided = Sequence[Sequence[Decision]]
Record = list[list[list[Any]]]
SAME_MODEL = "Load a state dict of the same class, made for the same model."
ORDER = "order=[n for n, _ in model.named_parameters()]"
ORDER_TRAINED = "order=[n for n, p in model.named_parameters() if p.requires_grad]"


def sizes_of(groups: Groups) -> list[int]:
    return [len(group["params"]) for group in groups]


def require_dict(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"`state_dict` must be a dict, not {type(state_dict).__name__}. "
            f"Pass what optimizer.state_dict() returned."
        )


def require_whole(state_dict: Any) -> None:
    """Raise TypeError or ValueError if this is no state dict of an optimizer."""
    require_dict(state_dict)
    if any(str(key).startswith("param_groups.") for key in state_dict):
        raise ValueError(
            "`state_dict` is flattened, and a full one must be plain to be loaded or "
            "converted. Save and load it with flatten_optimizer_state_dict=False."
        )
    if absent := {"state", "param_groups"} - state_dict.keys():
        raise ValueError(
            f"`state_dict` has no {min(absent)!r}, so it is none of an optimizer. "
            f"Pass what optimizer.state_dict() returned."
        )


def require_groups_like(groups: Groups, decided: Decided, state_dict: Any) -> None:
    require_whole(state_dict)
    saved = state_dict["param_groups"]
    if sizes_of(saved) != sizes_of(groups):
        raise ValueError(
            f"the loaded state dict has groups of {sizes_of(saved)} parameters, "
            f"and this optimizer of {sizes_of(groups)}. If they were split by hand, "
            f"type selective_optim.checkpoint.merge_groups(state_dict, {ORDER})."
        )
    _require_keys(saved, ["weight_decay"], groups)
    _require_order(state_dict, groups, decided)


def require_loadable(
    kernel: Kernel, groups: Groups, decided: Decided, state_dict: Any
) -> None:
    """Check that a state dict is whole and fits, before anything is changed."""
    require_whole(state_dict)
    saved = state_dict["param_groups"]
    _require_laid_out(saved)
    _require_keys(saved, kernel.required, groups)
    _require_layout(saved, groups)
    params, keys = params_of(groups), params_of(saved)
    if len(keys) != len(params):
        return  # torch says it well
    _require_order(state_dict, groups, decided)
    states = [state_dict["state"].get(key) or {} for key in keys]
    counter = ("step",) if kernel.counts else ()
    entries = [counter + kernel.entries(g) for g in saved for _ in g["params"]]
    labels = (
        decision.label(index, position)
        for index, decisions in enumerate(decided)
        for position, decision in enumerate(decisions)
    )
    for names, state, param, label in zip(entries, states, params, labels):
        if misfit := _misfit(kernel, names, state, param):
            way_out = _way_out(saved, groups, states)
            raise ValueError(misfit.format(label=label, out=way_out))


def _require_keys(saved: Groups, required: Sequence[str], groups: Groups) -> None:
    """Check that groups have hyperparameters, and list none twice that is not here."""
    distinct = [len(set(map(id, group["params"]))) for group in groups]
    for index, saved_group in enumerate(saved):
        if absent := [key for key in required if key not in saved_group]:
            raise ValueError(
                f"group {index} of the loaded state dict has no {absent[0]!r}, which "
                f"this optimizer needs. {SAME_MODEL}"
            )
        keys = saved_group["params"]
        count = len(keys) if index >= len(groups) else distinct[index]
        if len(set(keys)) < min(count, len(keys)):
            raise ValueError(
                f"group {index} of the loaded state dict lists a parameter twice. "
                f"{SAME_MODEL}"
            )


def _require_order(state_dict: Any, groups: Groups, decided: Decided) -> None:
    """Check that names, if both sides know them all, stand in one order."""
    saved_names = _names_in(state_dict["param_groups"])
    if saved_names and saved_names == _names_in(groups):
        return  # also where someone reordered the tensors of a group by hand
    names = [d.name if saved_names else d.telling_name for d in chain(*decided)]
    renamed = ""
    if not saved_names and state_dict["state"]:
        saved_names = [str(n) for n in _read(state_dict.get(RECORD))[1] if n]
        renamed = f" If they were only renamed, del state_dict[{RECORD!r}] before."
    if saved_names == names or sorted(saved_names) != sorted(n or "" for n in names):
        return  # torch goes by position: another model may have other names
    position = next(i for i, name in enumerate(names) if name != saved_names[i])
    ordered = (
        f"merge_groups(state_dict, {ORDER})" if len(groups) == 1 else _regrouping()
    )
    raise ValueError(
        f"parameter {position} of the loaded state dict is {saved_names[position]!r}, "
        f"and here {names[position]!r} stands there. Order it with selective_optim."
        f"checkpoint.{ordered}.{renamed}"
    )


def _names_in(groups: Groups) -> list[str]:
    return [canonical_name(n) for group in groups for n in group.get("param_names", ())]


def _misfit(kernel: Kernel, names: Iterable[str], state: Any, param: Tensor) -> str:
    """Say what is wrong with a parameter's state, with room for its label."""
    for name in names if state else ():
        if name not in state and kernel.counts:
            return f"{{label}} has no {name!r} in the loaded state dict. {SAME_MODEL}"
        value = state.get(name)
        if value is None and not kernel.counts:
            continue  # SGD's buffer before the first gradient, or entries of a user's
        shape = getattr(value, "shape", None)
        wanted = torch.Size() if name == "step" else param.shape
        if name == "step" and isinstance(shape, torch.Size) and shape.numel() == 1:
            continue  # some keep it in one element
        if shape != wanted and not (name == "step" and isinstance(value, (int, float))):
            got = "no tensor" if shape is None else f"shape {shape_text(shape)}"
            return (
                f"{name!r} of {{label}} in the loaded state dict has {got}, and must "
                f"have shape {shape_text(wanted)}. {{out}}"
            )
    return ""


def groups_to_load(kernel: Kernel, state_dict: Any, groups: Groups) -> list[Group]:
    """Prepare groups of a state dict for torch, which loads them into ``groups``."""
    prepared, choices = [], {"foreach", "fused"}.intersection(kernel.choices)
    # More groups than the optimizer has are torch's to refuse.
    pairs = zip(state_dict["param_groups"], chain(groups, repeat(None)))
    for saved_group, group in pairs:
        new = dict(saved_group)
        # An open choice stays open, and one that was made is not opened.
        if group and (free_choice(group) or free_choice(saved_group)):
            new.update({key: group[key] for key in choices})
        # torch looks the key of every tensor up, which in lists takes 4 s at 10,000.
        keys = dict.fromkeys(saved_group["params"])
        if len(keys) == len(saved_group["params"]):
            new["params"] = keys
        prepared.append(new)
    return prepared


def _decays(groups: Groups) -> list[float]:
    return [float(group.get("weight_decay", 0)) for group in groups]


def _split_by_hand(groups: Groups) -> bool:
    return len(set(_decays(groups))) > 1


def _require_laid_out(saved: Groups) -> None:
    """Check that ``torch.distributed.checkpoint`` had numbers for every group."""
    keys = chain.from_iterable(group.get("params", ()) for group in saved)
    incomplete = any(group.get("params") and "lr" not in group for group in saved)
    if incomplete and all(isinstance(key, str) for key in keys):
        raise ValueError(
            f"torch.distributed.checkpoint found no hyperparameters for one of the "
            f"{len(saved)} groups here: those of the checkpoint hold other "
            f"parameters, as when they were split by hand. Before "
            f"set_optimizer_state_dict, convert the state dict with {_regrouping()} of "
            f"selective_optim.checkpoint."
        )


def _require_layout(saved: Groups, groups: Groups) -> None:
    """Check that groups split by hand meet groups that are split like them."""
    if _split_by_hand(saved) and sizes_of(saved) != sizes_of(groups):
        total, count = sum(sizes_of(saved)), sum(sizes_of(groups))
        of_saved = "" if total == count else f" of {total} parameters"
        of_groups = "" if total == count else f" of {count}"
        raise ValueError(
            f"the loaded state dict has {_layout_text(saved)}{of_saved}, and "
            f"this optimizer has {_groups_text(groups)}{of_groups}. "
            f"{_conversion(saved, groups)}"
        )


def _groups_text(groups: Groups) -> str:
    return "1 group" if len(groups) == 1 else f"{len(groups)} groups"


def _layout_text(groups: Groups) -> str:
    *decays, last = (f"{wd:g}" for wd in dict.fromkeys(_decays(groups)))
    listed = f"{', '.join(decays)} and {last}"
    return f"{_groups_text(groups)}, split by hand by weight_decay ({listed})"


def _conversion(saved: Groups, groups: Groups) -> str:
    """Write the call that converts groups split by hand into those of the optimizer."""
    load, order, total = "Load ", ORDER, sum(sizes_of(saved))
    if total != sum(sizes_of(groups)):
        if total != sum(param.requires_grad for param in params_of(groups)):
            return SAME_MODEL
        order = ORDER_TRAINED
        load = (
            "Make it of filter(lambda p: p.requires_grad, model.parameters()), since "
            "frozen parameters were left out, and load "
        )
    named = all(
        "param_names" in group or all(isinstance(key, str) for key in group["params"])
        for group in saved
    )
    several_rates = len({float(group.get("lr", 0)) for group in saved}) > 1
    if len(groups) > 1 and not several_rates:
        call = _regrouping("" if named else ", names=group_names(groups, model)")
    else:
        names = "" if named else "group_names(groups, model), "
        by = ', by="lr"' if several_rates else ""
        call = f"merge_groups(state_dict, {names}{order}{by})"
    where = "" if named else "; groups are the param_groups of your old optimizer"
    return f"{load}{call} of selective_optim.checkpoint instead{where}."


def _regrouping(names: str = "") -> str:
    """Write the call that gives a state dict the groups of this optimizer."""
    return (
        "split_groups(state_dict, [{**g, 'params': own} for g, own in zip("
        f"optimizer.param_groups, group_names(optimizer.param_groups, model))]{names})"
    )


def _way_out(saved: Groups, groups: Groups, states: Sequence[Any]) -> str:
    """Tell what to load where shapes do not fit: as a rule their order is another."""
    if _split_by_hand(saved) and not _split_by_hand(groups):
        return f"It has {_layout_text(saved)}. {_conversion(saved, groups)}"
    moments = [
        [v for k, v in state.items() if isinstance(v, Tensor) and k != "step"]
        for state in states
    ]
    shapes = sorted(tuple(tensors[0].shape) for tensors in moments if tensors)
    if shapes == sorted(tuple(param.shape) for param in params_of(groups)):
        return (
            f"Its shapes are those of this model in another order: load merge_groups("
            f"state_dict, names, {ORDER}) of selective_optim.checkpoint, where names "
            f"are in the order that was saved."
        )
    return SAME_MODEL


def record_of(forms: Sequence[Form | None], decided: Decided) -> Record:
    """List ``[multiplier, form]`` by parameter, and what else is known of it."""
    pairs = zip(forms, decided)
    return [[_entry(d, form) for d in decisions] for form, decisions in pairs]


def _entry(decision: Decision, default: Form | None) -> list[Any]:
    decay, name = decision.decay, decision.telling_name
    named = {} if name is None else {"name": name}
    entry = [decay.multiplier, decay.form or default]
    return with_begin(entry, named | decision.begin())


def entries_of(record: Any, decided: Decided) -> list[Any]:
    """List what a record holds for each parameter here, by name or else by place."""
    names = [decision.telling_name for decisions in decided for decision in decisions]
    entries, saved_names = _read(record)
    named = dict(zip(saved_names, entries))
    nameless = None in saved_names and None in names
    unique = len(named) == len(entries) and not nameless
    if unique and not named.keys().isdisjoint(names):
        return [named.get(name) for name in names]
    return entries if len(entries) == len(names) else [None] * len(names)


def _read(record: Any) -> tuple[list[Any], list[Any]]:
    """List the entries of a record, and the name in each or ``None``."""
    try:
        entries = [list(entry) for entry in chain.from_iterable(record)]
        return entries, [begin_in(entry).get("name") for entry in entries]
    except TypeError:  # there is none, or one of another version, which tells nothing
        return [], []


def begin_in(entry: Any) -> dict[str, Any]:
    """Read the third place of an entry; empty where there is none."""
    third = entry[2] if entry is not None and len(entry) > 2 else {}
    return third if isinstance(third, dict) else {}


def with_begin(entry: Sequence[Any], begin: dict[str, Any]) -> list[Any]:
    """Write the third place of an entry, unless nothing stands there."""
    return [*entry[:2], begin] if begin else [*entry[:2]]
