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
from selective_optim.step.kernels import Kernel
from selective_optim.step.parts import free_choice

# Keys of a state dict: for what was decided, and for what split groups keep apart.
RECORD, PARTS, POLICIES = "decay", "parts", "decay_policies"
Groups = Sequence[dict[str, Any]]
Decided = Sequence[Sequence[Decision]]
Record = list[list[list[Any]]]
SAME_MODEL = "Load a state dict of the same class, made for the same model."


def require_dict(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"`state_dict` must be a dict, not {type(state_dict).__name__}. "
            f"Pass what optimizer.state_dict() returned."
        )


def require_groups_like(here: Groups, decided: Decided, state_dict: Any) -> None:
    require_whole(state_dict)
    saved = state_dict["param_groups"]
    sizes, wanted = _sizes(saved), _sizes(here)
    if sizes != wanted:
        raise ValueError(
            f"the loaded state dict has groups of {sizes} parameters, and this "
            f"optimizer of {wanted}. If they were split by hand, type selective_optim."
            f"checkpoint.merge_groups(state_dict, order=[n for n, _ in "
            f"model.named_parameters()])."
        )
    _require_keys(saved, ["weight_decay"], here)
    _require_order(saved, here, decided)


def require_loadable(
    kernel: Kernel, here: Groups, decided: Decided, state_dict: Any
) -> None:
    """Check that a state dict is whole and fits, before anything is changed."""
    require_whole(state_dict)
    groups = state_dict["param_groups"]
    _require_laid_out(groups)
    _require_keys(groups, kernel.required, here)
    _require_layout(groups, here)
    saved, params = _params(groups), _params(here)
    if len(saved) != len(params):
        return  # torch says it well
    _require_order(groups, here, decided)
    own = [state_dict["state"].get(key) or {} for key in saved]
    names = [kernel.loaded_entries(group) for group in groups for _ in group["params"]]
    for number, misfit in enumerate(map(_misfit, repeat(kernel), names, own, params)):
        if misfit:
            places = [
                (i, *place) for i, d in enumerate(decided) for place in enumerate(d)
            ]
            index, position, decision = places[number]
            label = decision.label(index, position)
            way_out = _way_out(groups, here, own, params)
            raise ValueError(misfit.format(label=label, out=way_out))


def _params(groups: Groups) -> list[Any]:
    return list(chain.from_iterable(group["params"] for group in groups))


def groups_to_load(
    kernel: Kernel, state_dict: Any, here: Groups
) -> list[dict[str, Any]]:
    """Prepare groups of a state dict for torch, which loads them into those here."""
    groups, own = [], {"foreach", "fused"}.intersection(kernel.choices)
    # More groups than there are here are torch's to refuse.
    for saved, mine in zip(state_dict["param_groups"], chain(here, repeat(None))):
        group = dict(saved)
        # What is open here stays open, and what is chosen here is not opened.
        if mine and (free_choice(mine) or free_choice(saved)):
            group.update({key: mine[key] for key in own})
        # torch looks the key of every tensor up, which in lists takes 4 s at 10,000.
        known = dict.fromkeys(saved["params"])
        if len(known) == len(saved["params"]):
            group["params"] = known
        groups.append(group)
    return groups


# Groups that were split by hand.


def _decays(groups: Groups) -> list[float]:
    return [float(group.get("weight_decay", 0)) for group in groups]


def _split_by_hand(groups: Groups) -> bool:
    return len(set(_decays(groups))) > 1


def _sizes(groups: Groups) -> list[int]:
    return [len(group["params"]) for group in groups]


def _require_laid_out(saved: Groups) -> None:
    """Check that ``torch.distributed.checkpoint`` had numbers for every group."""
    params = [group.get("params", ()) for group in saved]
    by_name = all(isinstance(key, str) for key in chain.from_iterable(params))
    if by_name and any(own and "lr" not in g for own, g in zip(params, saved)):
        raise ValueError(
            f"torch.distributed.checkpoint found no hyperparameters for one of the "
            f"{len(saved)} groups here: those of the checkpoint hold other parameters, "
            f"as when they were split by hand. Before set_optimizer_state_dict, "
            f"convert the state dict with {_regrouping('')} of "
            f"selective_optim.checkpoint."
        )


def _require_layout(saved: Groups, here: Groups) -> None:
    """Check that groups split by hand meet groups that are split like them."""
    if _split_by_hand(saved) and _sizes(saved) != _sizes(here):
        total, mine = len(_params(saved)), len(_params(here))
        of = "" if total == mine else f" of {total} parameters"
        own = "" if total == mine else f" of {mine}"
        raise ValueError(
            f"the loaded state dict has {_layout_text(saved)}{of}, and this optimizer "
            f"has {_groups_text(len(here))}{own}. {_conversion(saved, here)}"
        )


def _groups_text(count: int) -> str:
    return "1 group" if count == 1 else f"{count} groups"


def _layout_text(saved: Groups) -> str:
    decays = [f"{wd:g}" for wd in dict.fromkeys(_decays(saved))]
    told = f"{', '.join(decays[:-1])} and {decays[-1]}"
    return f"{_groups_text(len(saved))}, split by hand by weight_decay ({told})"


def _conversion(saved: Groups, here: Groups) -> str:
    """Write the call that converts groups split by hand into those of here."""
    params = _params(here)
    first, total = "", len(_params(saved))
    if total != len(params):
        if total != sum(param.requires_grad for param in params):
            return SAME_MODEL
        first = (
            "Make it of filter(lambda p: p.requires_grad, model.parameters()), since "
            "frozen parameters were left out, and load "
        )
    named = all(
        "param_names" in group or all(isinstance(key, str) for key in group["params"])
        for group in saved
    )
    several_rates = len({float(group.get("lr", 0)) for group in saved}) > 1
    if len(here) > 1 and not several_rates:
        call = _regrouping("" if named else "names=group_names(groups, model)")
    else:
        names = "" if named else "group_names(groups, model), "
        by = ', by="lr"' if several_rates else ""
        trained = " if p.requires_grad" if first else ""
        item = "n for n, p in" if first else "n for n, _ in"
        order = f"[{item} model.named_parameters(){trained}]"
        call = f"merge_groups(state_dict, {names}order={order}{by})"
    where = "" if named else "; groups are the param_groups of your old optimizer"
    return f"{first or 'Load '}{call} of selective_optim.checkpoint instead{where}."


def _regrouping(names: str) -> str:
    """Write the call that gives a state dict the groups of this optimizer."""
    return (
        "split_groups(state_dict, [{**g, 'params': own} for g, own in zip("
        "optimizer.param_groups, group_names(optimizer.param_groups, model))]"
        f"{names and ', '}{names})"
    )


def _way_out(
    saved: Groups,
    here: Groups,
    own: Sequence[Any],
    params: Sequence[Tensor],
) -> str:
    """Tell what to load where shapes do not fit: as a rule their order is another."""
    if _split_by_hand(saved) and not _split_by_hand(here):
        return f"It has {_layout_text(saved)}. {_conversion(saved, here)}"
    moments = [
        [v for k, v in entries.items() if isinstance(v, Tensor) and k != "step"]
        for entries in own
    ]
    shapes = sorted(tuple(tensors[0].shape) for tensors in moments if tensors)
    if shapes == sorted(tuple(param.shape) for param in params):
        return (
            "Its shapes are those of this model in another order: load merge_groups("
            "state_dict, names, order=[n for n, _ in model.named_parameters()]) of "
            "selective_optim.checkpoint, where names are in the order that was saved."
        )
    return SAME_MODEL


# What a state dict must hold.


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


def _require_keys(groups: Groups, names: Sequence[str], here: Groups) -> None:
    """Check that groups have hyperparameters, and list none twice that is not here."""
    distinct = [len(set(map(id, group["params"]))) for group in here]
    for index, group in enumerate(groups):
        if absent := [name for name in names if name not in group]:
            raise ValueError(
                f"group {index} of the loaded state dict has no {absent[0]!r}, which "
                f"this optimizer needs. {SAME_MODEL}"
            )
        listed = len(group["params"]) if index >= len(here) else distinct[index]
        if len(set(group["params"])) < min(listed, len(group["params"])):
            raise ValueError(
                f"group {index} of the loaded state dict lists a parameter twice. "
                f"{SAME_MODEL}"
            )


def _names_in(groups: Groups) -> list[str]:
    return [canonical_name(n) for group in groups for n in group.get("param_names", ())]


def _require_order(groups: Groups, here: Groups, decided: Decided) -> None:
    saved = _names_in(groups)
    if saved == _names_in(here):
        return  # also where someone reordered the tensors of a group by hand
    names = [decision.name for decisions in decided for decision in decisions]
    if saved == names or sorted(saved) != sorted(name or "" for name in names):
        return  # torch goes by position: another model may have other names
    position = next(i for i, name in enumerate(names) if name != saved[i])
    raise ValueError(
        f"parameter {position} of the loaded state dict is {saved[position]!r}, and "
        f"here {names[position]!r} stands there. Order it with selective_optim."
        f"checkpoint.merge_groups(state_dict, order=[n for n, _ in "
        f"model.named_parameters()])."
    )


def _misfit(kernel: Kernel, names: Iterable[str], own: Any, param: Tensor) -> str:
    """Say what is wrong with a parameter's state, with room for its label."""
    for name in names if own else ():
        if name not in own and kernel.counts:
            return f"{{label}} has no {name!r} in the loaded state dict. {SAME_MODEL}"
        value = own.get(name)
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


def record_of(forms: Sequence[Form | None], decided: Decided) -> Record:
    """List ``[multiplier, form]`` by parameter, and what else is known of it."""
    return [
        [_entry(decision, default) for decision in decisions]
        for default, decisions in zip(forms, decided)
    ]


def _entry(decision: Decision, default: Form | None) -> list[Any]:
    decay, name = decision.decay, decision.telling_name
    known = {} if name is None else {"name": name}
    known |= decision.begin()
    entry = [decay.multiplier, decay.form or default]
    return [*entry, known] if known else entry


def entries_of(saved: Any, decided: Decided) -> list[Any]:
    """List what a record holds for each parameter here, by name or else by place."""
    here = [decision.telling_name for own in decided for decision in own]
    try:
        entries = [list(entry) for entry in chain.from_iterable(saved)]
        names = [begin_in(entry).get("name") for entry in entries]
    except TypeError:  # a record of another version tells nothing
        return [None] * len(here)
    named = dict(zip(names, entries))
    common = len(named) == len(names) and not {None}.intersection(names, here)
    if common and not named.keys().isdisjoint(here):
        return [named.get(name) for name in here]
    return entries if len(entries) == len(here) else [None] * len(here)


def begin_in(entry: Any) -> dict[str, Any]:
    """Read the third place of an entry; empty where there is none."""
    third = entry[2] if entry is not None and len(entry) > 2 else {}
    return third if isinstance(third, dict) else {}
