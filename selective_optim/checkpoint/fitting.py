"""State that survives a changed model; users find it in ``checkpoint``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from inspect import signature
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selective_optim._entries import (
    WD,
    Entry,
    Hyper,
    Names,
    StateDict,
    merged,
    named_parameters,
    read,
    recorded,
    require_agreement,
    with_rate_of,
    without,
    write,
)
from selective_optim._text import aligned
from selective_optim._torch import told_apart, without_wrappers
from selective_optim.decisions.state_dict import RECORD, require_dict, require_whole
from selective_optim.step.lasting import PER_PARAM

SHOWN = 5  # names that a line of ``Fit`` gives
# Entries that torch's classes begin at 0, and so can begin for new rows alone. Others,
# such as an average of weights, cannot.
MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"}
MOMENTS |= {"square_avg", "grad_avg", "acc_delta", "sum", "prev", "init"}
SEVERAL = "Pass the new optimizer, whose {!r} counts: fit(state_dict, optimizer)."
OLD_NAMES = (
    "Pass names=group_names(old_optimizer.param_groups, old_model).",
    "Pass names=[n for n, _ in old_model.named_parameters()].",
)


@dataclass(frozen=True)
class Fit:
    """A state dict for a changed model; ``print`` tells how much of it was kept.

    Args:
        state_dict: State dict to load into the new optimizer.
        kept: Parameters whose state stays as it was.
        resized: Parameters of which one dimension changed: the leading part keeps its
            moments, those of the rest are 0, and both share the step counter.
        new: Parameters that begin without state.
        dropped: Old parameters whose state is left out.
    """

    state_dict: StateDict = field(repr=False)
    kept: list[str]
    resized: list[str]
    new: list[str]
    dropped: list[str]

    def __str__(self) -> str:
        lines = [("kept", f"{len(self.kept)}", "")]
        for fate in ("resized", "new", "dropped"):
            names = getattr(self, fate)
            told = ", ".join([*names[:SHOWN], *(["..."] if names[SHOWN:] else [])])
            if names and fate == "resized":
                told += "; what was added has moments of 0 and shares the step counter"
            lines.append((fate, f"{len(names)}", told))
        return "\n".join(aligned(lines, right=[1]))


def fit(
    state_dict: StateDict,
    model: nn.Module | Sequence[nn.Module] | Optimizer,
    names: Iterable[str] | Names | None = None,
) -> Fit:
    """Keep, by name, what still fits of the state saved for a model that has changed.

    Layers may have come, gone or moved, vocabularies and heads grown or shrunk, parts
    been frozen or unfrozen. A parameter without a counterpart begins anew.

    Args:
        state_dict: Of any optimizer, with any groups; stays as it is.
        model: The changed model, for an optimizer with one group over
            ``model.parameters()`` and the hyperparameters of the state dict. Or the
            new optimizer: then groups and hyperparameters are its own, and what its
            class counts in its groups goes on.
        names: Names of the parameters in the order that was saved, one list per
            group or, of a single group, a list. They go before those of the state
            dict: where layers were renumbered, give the names that the old parameters
            have in ``model``. ``group_names(old_optimizer.param_groups, model,
            missing_ok=True)`` reads them from a model that was changed in place.

    Returns:
        The state dict to load, and what became of each parameter.

    Raises:
        TypeError: ``model`` is neither, or ``names`` is one list for several groups.
        ValueError: A parameter has no name, or another's; no name is in both; or
            groups that become one differ in more than ``weight_decay``.

    Example:
        >>> import torch
        >>> old, new = torch.nn.Linear(2, 3), torch.nn.Linear(2, 5)
        >>> optimizer = torch.optim.SGD(old.parameters(), momentum=0.9)
        >>> old(torch.ones(2)).sum().backward()
        >>> optimizer.step()
        >>> fitted = fit(optimizer.state_dict(), new, names=["weight", "bias"])
        >>> print(fitted.resized, fitted.state_dict["state"][1]["momentum_buffer"])
        ['weight', 'bias'] tensor([1., 1., 1., 0., 0.])
    """
    require_dict(state_dict)
    require_whole(state_dict)
    single = len(state_dict["param_groups"]) == 1
    per_group: Any = names
    if single and isinstance(names, Iterable) and not isinstance(names, str):
        flat = list(names)
        per_group = [flat] if all(isinstance(name, str) for name in flat) else flat
    old = read(state_dict, per_group, OLD_NAMES[single])
    fates: dict[str, list[str]] = {"kept": [], "resized": [], "new": []}
    written, decided, rest = [], [], dict(old)
    for hyper, places in _layout(model):
        mine = []
        for param, new in places:
            fate, entry = _fitted(new, param, rest.pop(new.name, None))
            fates[fate].append(new.name)
            mine.append(entry)
        fitted = [entry for entry in mine if entry.hyper]
        written.append((_hyper(model, hyper, fitted), mine))
        # Of the old groups: an optimizer may have another decay by now.
        decays = [entry.hyper.get(WD, 1.0) for entry in fitted]
        decided.append(({WD: max(decays, key=float, default=1.0)}, mine))
    fitting = {*fates["kept"], *fates["resized"]}
    if not fitting:
        first = next(iter(old), "")
        near = get_close_matches(first, fates["new"], n=1, cutoff=0.0) or ["..."]
        raise ValueError(
            f"none of the {len(old)} parameters of the state dict, {first!r} among "
            f"them, is in the model. Pass names=[...] that say what each is called "
            f"there, as {near[0]!r}."
        )
    dropped = [name for name in old if name not in fitting]
    whole = write(state_dict, written) | recorded(state_dict, decided)
    return Fit(whole, **fates, dropped=dropped)


def _layout(model: Any) -> list[tuple[Hyper, list[tuple[Tensor, Entry]]]]:
    if not isinstance(model, Optimizer):
        places = [(p, Entry(name, key)) for p, name, key in named_parameters(model)]
        return [({}, places)]
    saved, groups = model.state_dict(), model.param_groups
    names = [name for group in groups for name in group.get("param_names", ())]
    if hasattr(model, "decay_report"):
        names = [row.name for row in model.decay_report().rows]
    params = [param for group in groups for param in group["params"]]
    if len(names) < len(params) or None in names:
        raise ValueError(
            f"the new {type(model).__name__} knows no names of its {len(params)} "
            f"parameters. Make it of model.named_parameters(), or pass the model."
        )
    records = chain(*saved.get(RECORD, [[()] * len(params)]))
    # A class may have made state when it was constructed, as Adagrad does.
    keys = chain.from_iterable(group["params"] for group in saved["param_groups"])
    states = map(saved["state"].get, keys)
    columns = zip(told_apart(names), map(without_wrappers, names), states, records)
    entries = (
        Entry(n, key, state=own, record=record) for n, key, own, record in columns
    )
    return [
        (without(saved_group, PER_PARAM), list(zip(group["params"], entries)))
        for saved_group, group in zip(saved["param_groups"], groups)
    ]


def _fitted(new: Entry, param: Tensor, entry: Entry | None) -> tuple[str, Entry]:
    if entry is None:
        return "new", new
    state = dict(entry.state) if isinstance(entry.state, Mapping) else {}
    record = with_rate_of(entry.record, new.record)
    begin = dict(*record[2:])
    if "name" in begin:  # loading goes by it
        begin["name"] = new.name
    dims = _changed_dims({**state, **begin}, param.shape)
    if dims is None:
        return "new", new
    for dim, values in product(dims, (state, begin)):
        for key in MOMENTS & values.keys():
            saved, now = values[key], param.detach()
            # A new row decays towards what it is now.
            whole = now.clone() if key == "init" else saved.new_zeros(now.shape)
            kept = min(saved.shape[dim], whole.shape[dim])
            whole.narrow(dim, 0, kept).copy_(saved.narrow(dim, 0, kept))
            values[key] = whole
    record = [*record[:2], *([begin] if begin else [])]
    fate, state = "resized" if dims else "kept", state or entry.state
    return fate, replace(entry, name=new.name, key=new.key, state=state, record=record)


def _changed_dims(values: Mapping[str, Any], shape: torch.Size) -> list[int] | None:
    """Tell the dimension in which a parameter's state has another size, if any.

    ``None``: it fits not at all, or nobody knows what its new rows begin with.
    """
    tensors = {k: v for k, v in values.items() if isinstance(v, Tensor) and k != "step"}
    like = {k: v.shape for k, v in tensors.items() if v.ndim == len(shape)}
    if not like:  # nothing, or sums over rows and columns, as of Adafactor
        sizes = {size for value in tensors.values() for size in value.shape}
        return [] if sizes <= {1, *shape} and MOMENTS.isdisjoint(tensors) else None
    saved = tuple(map(max, zip(*like.values())))
    if shape in like.values() or saved == shape:
        return []
    others = [value for key, value in tensors.items() if key not in like]
    plain = MOMENTS.issuperset(like) and all(value.numel() == 1 for value in others)
    changed = [dim for dim, size in enumerate(shape) if saved[dim] != size]
    return changed if plain and len(changed) == 1 else None


def _hyper(model: Any, hyper: Hyper, entries: Sequence[Entry]) -> Hyper:
    """Choose the hyperparameters of a group: those of old, or a new optimizer's."""
    if not entries:
        return hyper
    if not isinstance(model, Optimizer):
        return merged(entries, SEVERAL)
    while isinstance(inner := getattr(model, "optimizer", None), Optimizer):
        model = inner
    own = {name for cls in type(model).__mro__ for name in signature(cls).parameters}
    # What users and schedulers wrote stays; what the class counts, as Prodigy does
    # the size of its steps, goes on.
    own |= hyper.keys() - model.defaults.keys()
    own |= {key for entry in entries for key in entry.hyper if key.endswith("_lr")}
    counted = [without(entry.hyper, own) for entry in entries]
    require_agreement(entries, counted, (), "Make it two groups of the new optimizer.")
    return hyper | counted[0]
