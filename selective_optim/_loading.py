"""Loading a state dict: refused whole if it does not fit, compared if it does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from selective_optim._module_tree import canonical_name
from selective_optim._text import shape_text
from selective_optim.decay import Decision, Form, is_zero
from selective_optim.step.kernel import Kernel

RECORD = "decay"  # the key of a state dict under which decisions are recorded
Decided = Sequence[Sequence[Decision]]
Record = list[list[list[Any]]]
# Tells the form of a group's parameters, given what was decided; None if unknown.
FormOf = Callable[[dict[str, Any], Form | None], Form | None]
SAME_MODEL = "Load a state dict of the same class, made for the same model."


def require_dict(state_dict: object) -> None:
    """Check that this is a dict at all.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"`state_dict` must be a dict, not {type(state_dict).__name__}. "
            f"Pass what optimizer.state_dict() returned."
        )


def require_groups_like(
    param_groups: Sequence[dict[str, Any]], decided: Decided, state_dict: Any
) -> None:
    """Check that a state dict has the groups of an optimizer, and their order.

    Raises:
        ValueError: It has other groups, or its names stand in another order.
    """
    _require_whole(state_dict)
    saved = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in saved]
    wanted = [len(group["params"]) for group in param_groups]
    if sizes != wanted:
        raise ValueError(
            f"the loaded state dict has groups of {sizes} parameters, and this "
            f"optimizer of {wanted}. If they were split by hand, type selective_optim."
            f"checkpoint.merge_groups(state_dict, order=[n for n, _ in "
            f"model.named_parameters()])."
        )
    for index, group in enumerate(saved):
        if "weight_decay" not in group:
            raise ValueError(
                f"group {index} of the loaded state dict has no 'weight_decay', which "
                f"this optimizer needs. {SAME_MODEL}"
            )
    _require_order(saved, decided)


def require_loadable(
    kernel: Kernel,
    param_groups: Sequence[dict[str, Any]],
    decided: Decided,
    state_dict: Any,
) -> None:
    """Check that a state dict is whole and fits, before anything is changed.

    How many groups and parameters it has is left to torch, which says it well.

    Raises:
        ValueError: A hyperparameter or state entry is missing, or belongs to
            another class or to a parameter of another shape.
    """
    _require_whole(state_dict)
    _require_groups(kernel, state_dict["param_groups"])
    saved = list(chain.from_iterable(g["params"] for g in state_dict["param_groups"]))
    params = list(chain.from_iterable(group["params"] for group in param_groups))
    if len(saved) != len(params):
        return
    owners = chain.from_iterable(
        [group] * len(group["params"]) for group in state_dict["param_groups"]
    )
    _require_order(state_dict["param_groups"], decided)
    labels = list(_labels(decided))
    for key, param, group, label in zip(saved, params, owners, labels):
        own = state_dict["state"].get(key) or {}
        _require_entries(kernel, group, param, label, own)


def _require_whole(state_dict: Any) -> None:
    if absent := {"state", "param_groups"} - state_dict.keys():
        raise ValueError(
            f"`state_dict` has no {min(absent)!r}, so it is none of an optimizer. "
            f"Pass what optimizer.state_dict() returned."
        )


def _labels(decided: Decided) -> Iterator[str]:
    for index, decisions in enumerate(decided):
        for position, decision in enumerate(decisions):
            yield decision.label(index, position)


def _require_groups(kernel: Kernel, groups: Sequence[dict[str, Any]]) -> None:
    for index, group in enumerate(groups):
        if absent := [name for name in kernel.required if name not in group]:
            raise ValueError(
                f"group {index} of the loaded state dict has no {absent[0]!r}, which "
                f"this optimizer needs. {SAME_MODEL}"
            )
        if len(set(group["params"])) < len(group["params"]):
            raise ValueError(
                f"group {index} of the loaded state dict lists a parameter twice. "
                f"{SAME_MODEL}"
            )


def _require_order(groups: Sequence[dict[str, Any]], decided: Decided) -> None:
    """Check that a state dict with names does not have them in another order."""
    saved = [
        canonical_name(n) for group in groups for n in group.get("param_names", ())
    ]
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


def _require_entries(
    kernel: Kernel, group: dict[str, Any], param: Tensor, label: str, own: Any
) -> None:
    for name in kernel.loaded_entries(group) if own else ():
        if name not in own and not kernel.counts:
            continue  # entries of the user's own, before the first gradient
        if name not in own:
            raise ValueError(
                f"{label} has no {name!r} in the loaded state dict. {SAME_MODEL}"
            )
        value = own[name]
        if value is None and not kernel.counts:
            continue  # SGD's buffer before the first gradient
        shape = getattr(value, "shape", None)
        wanted = torch.Size() if name == "step" else param.shape
        if name == "step" and isinstance(shape, torch.Size) and shape.numel() == 1:
            continue  # some keep it in one element
        if shape != wanted and not (name == "step" and isinstance(value, (int, float))):
            got = "no tensor" if shape is None else f"shape {shape_text(shape)}"
            raise ValueError(
                f"{name!r} of {label} in the loaded state dict has {got}, and must "
                f"have shape {shape_text(wanted)}. {SAME_MODEL}"
            )


def form_name(decoupled: bool) -> Form:
    """Name a form as reports and state dicts do."""
    return "decoupled" if decoupled else "l2"


def record_of(
    form_of: FormOf, param_groups: Sequence[dict[str, Any]], decided: Decided
) -> Record:
    """Write down the multiplier and form of every parameter, in plain values."""
    return [
        [[decay.multiplier, form_of(group, decay.form)] for decay, *_ in decisions]
        for group, decisions in zip(param_groups, decided)
    ]


def warn_of_changes(
    decided: Decided,
    param_groups: Sequence[dict[str, Any]],
    saved: Any,
    now: Record,
    stacklevel: int,
) -> None:
    """Warn once if a checkpoint was made with other decisions than those now taken.

    A record that cannot be read, as of another version, is not compared. Without
    one, a checkpoint that sets every decay to 0 is told: groups split by hand that
    became one group do.
    """
    if changes := _changes(decided, saved, now):
        more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
        warnings.warn(
            f"the loaded checkpoint was made with another weight decay policy: "
            f"{'; '.join(changes[:3])}{more}. The policy of the constructor is kept; "
            f"pass the old one as wd_policy to continue as before.",
            stacklevel=stacklevel,
        )
    elif saved is None and _stopped(param_groups, now):
        warnings.warn(
            "the loaded checkpoint sets weight_decay to 0 in every group, so nothing "
            "decays any more. Convert it with selective_optim.checkpoint.merge_groups, "
            "or set weight_decay in optimizer.param_groups.",
            stacklevel=stacklevel,
        )


def _stopped(param_groups: Sequence[dict[str, Any]], now: Record) -> bool:
    exempting = any(multiplier == 0 for multiplier, _ in _joined(now))
    return exempting and all(is_zero(group["weight_decay"]) for group in param_groups)


def _changes(decided: Decided, saved: Any, now: Record) -> list[str]:
    try:
        pairs = [
            (label, (float(old[0]), old[1]), (new[0], new[1]))
            for label, old, new in zip(_labels(decided), _joined(saved), _joined(now))
        ]
    except (TypeError, ValueError, IndexError, KeyError):
        return []
    return [
        f"{label} decayed {_text(*old)} and now {_text(*new)}"
        for label, old, new in pairs
        if old != new and (old[0] or new[0])
    ]


def _joined(record: Any) -> list[Any]:
    return [entry for group in record for entry in group]


def _text(multiplier: float, form: str | None) -> str:
    how = f" ({form})" if form else ""
    return f"{multiplier:g} times{how}" if multiplier else "not at all"
