"""Convert optimizer state dicts by name: to other groups, and to a changed model.

A state dict keeps state by position, so one saved with a group of decayed and a
group of exempt parameters does not fit an optimizer with one group, nor does that of
a model that has other layers by now. Here names say which state belongs to which
parameter: state dicts go in, and new ones come out that share the tensors. The form
of ``torch.distributed.checkpoint.state_dict`` (not flattened), which lists parameters
by name, is taken too and kept.

A flattened one keeps one ``weight_decay`` per parameter, that of its group. Loaded
into other groups, torch takes for each group that of one of its parameters, and so it
does with a full one, which may be broadcast from rank 0: one of this library gives
torch's hand-split exempt group the full decay. Set
``group["weight_decay"] = 0.0`` there after loading, or convert the plain form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from inspect import signature
from itertools import chain, islice, product
from typing import Any

from torch import Size, Tensor, nn
from torch.optim import Optimizer

from selective_optim._state_entries import (
    Entry,
    Hyper,
    Names,
    StateDict,
    agreed,
    choose,
    form_of,
    is_foreign,
    merged,
    read,
    write,
)
from selective_optim._text import aligned, received, shape_text
from selective_optim._torch import telling_name, without_wrappers
from selective_optim.decisions.state_dict import (
    PARTS,
    RECORD,
    begin_in,
    require_whole,
    sizes_of,
    with_begin,
)
from selective_optim.parameters import as_modules
from selective_optim.routes.route import ROUTE
from selective_optim.routes.state_dict import split_routes as split_routes
from selective_optim.step.setting import PER_PARAM, WD, without

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


def _named_parameters(model: Any) -> list[tuple[Tensor, str, str]]:
    """List parameters with their canonical names, and with those that DCP gives."""
    named = [pair for m in as_modules(model) for pair in m.named_parameters()]
    # Modules may share parameters.
    pairs = {id(param): (param, name) for name, param in named}.values()
    return [(param, telling_name(n), without_wrappers(n)) for param, n in pairs]


def group_names(
    param_groups: Iterable[Mapping[str, Any]],
    model: nn.Module | Sequence[nn.Module],
    *,
    missing_ok: bool = False,
) -> list[list[str]]:
    """Name the parameters of every group, for a state dict saved without names.

    Args:
        param_groups: ``optimizer.param_groups``, or the groups given to a constructor.
        model: The module, or modules, that the parameters live in.
        missing_ok: Give unused names to parameters that are no longer in the model.

    Returns:
        The names, group by group. Parameters that a parametrization made of one, as
        weight norm does, have their full names.

    Raises:
        TypeError: The arguments are no groups, or no modules.
        ValueError: A parameter is in none of the modules.
    """
    names = {id(param): name for param, name, _ in _named_parameters(model)}
    groups = param_groups if isinstance(param_groups, Iterable) else [param_groups]
    listed: list[list[str]] = []
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping):
            raise TypeError(
                f"`param_groups` must be a list of dicts, and holds "
                f"{received(group)}. Pass optimizer.param_groups."
            )
        listed.append([])
        for position, param in enumerate(group["params"]):
            if id(param) not in names and not missing_ok:
                raise ValueError(
                    f"parameter {position} of group {index} (shape "
                    f"{shape_text(param.shape)}) is in none of the modules given as "
                    f"`model`. Pass every module that holds parameters: [model, ...]."
                )
            gone = f"(group {index}, parameter {position})"
            listed[-1].append(names.get(id(param), gone))
    return listed


def merge_groups(
    state_dict: StateDict,
    names: Names | None = None,
    *,
    order: Iterable[str] | None = None,
    by: str | Sequence[str] = (),
) -> StateDict:
    """Merge the hand-split groups of a state dict into one group.

    Its ``weight_decay`` is the largest of the merged groups. The state dict records the
    share that each parameter had. So an optimizer whose policy decides differently
    warns on loading.

    Args:
        state_dict: Of an optimizer of this library or of torch; not changed.
        names: Names of the parameters, group by group; by default those
            that the state dict has.
        order: All names in the order of the optimizer that will load the result. For
            ``model.parameters()`` that is
            ``[name for name, _ in model.named_parameters()]``. By default the order is
            that of the groups, for example decayed before exempt. An optimizer made
            from ``model.parameters()`` would then give parameters the state of others.
        by: Hyperparameters by which groups stay separate: with ``"lr"`` there is one
            group per learning rate.

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
    keys = [by] if isinstance(by, str) else list(by)
    together: list[tuple[list[Any], list[Entry]]] = []
    for entry in ordered:
        values = [entry.hyper.get(key) for key in keys]
        # Compared, not hashed: a learning rate may be a tensor.
        group = next((group for shared, group in together if shared == values), None)
        if group is None:
            together.append((values, group := []))
        group.append(entry)
    listed = "".join(f"{key!r}, " for key in keys)
    way_out = f"Keep such groups apart: by=[{listed}{{!r}}]."
    groups = [(merged(group, way_out), group) for _, group in together]
    return write(state_dict, groups)


def split_groups(
    state_dict: StateDict,
    groups: Iterable[Mapping[str, Any]],
    *,
    names: Names | None = None,
) -> StateDict:
    """Split the groups of a state dict into hand-split groups.

    Args:
        state_dict: Of an optimizer of this library or of torch; not changed.
        groups: The new groups, in order: dicts with names under ``"params"`` and the
            hyperparameters to set. Other hyperparameters stay, and ``weight_decay`` is
            the one that the state dict records.
        names: Names of the parameters of ``state_dict``, group by group; by default
            those that it has.

    Returns:
        The split state dict, for an optimizer that has these groups and no policy.

    Raises:
        ValueError: A name is missing, doubled or unknown.
        ValueError: Parameters of one group differ in a value that it does not set.
        ValueError: A parameter decays in a form that torch's class does not have.

    Example:
        >>> import torch
        >>> from selective_optim import SGD
        >>> named = torch.nn.Linear(2, 1).named_parameters()
        >>> merged = SGD(named, weight_decay=0.1, wd_policy="no_bias").state_dict()
        >>> split = split_groups(merged, [{"params": ["weight"]}, {"params": ["bias"]}])
        >>> [group["weight_decay"] for group in split["param_groups"]]
        [0.1, 0.0]
    """
    hypers = [dict(group) for group in groups]
    listed = [list(hyper.pop("params")) for hyper in hypers]
    entries = read(state_dict, names)
    chosen = iter(choose(entries, chain.from_iterable(listed), "groups"))
    parts = [list(islice(chosen, len(part))) for part in listed]
    # A group without parameters takes its hyperparameters from any.
    first = list(entries.values())[:1]
    pairs = zip(hypers, parts, strict=True)
    split = [(_split(part or first, stated), part) for stated, part in pairs]
    return write(state_dict, split, record=False)


def _split(entries: Sequence[Entry], stated: Hyper) -> Hyper:
    hypers = [{**e.hyper, **(e.part_values or {}), WD: e.wd} for e in entries]
    way_out = "Make it two groups, or set {!r} in this one."
    hyper = {**agreed(entries, hypers, stated, way_out), **stated}
    form = form_of(hyper)
    for entry in entries if hyper[WD] and form else ():
        multiplier, recorded_form = entry.record[:2]
        target = begin_in(entry.record).get("target")
        if multiplier and (recorded_form not in (None, form) or target):
            towards = f" towards {target!r}" if target else ""
            raise ValueError(
                f"{entry.label()} decays in form {recorded_form!r}{towards}, and torch "
                f"gives its group form {form!r}. If it is to change, set weight_decay "
                f"in every group and del state_dict['decay'] first."
            )
    return hyper


def _with_rate_of(record: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    """Let training begin with the rate that another record says, if it says one."""
    rate = {key: value for key, value in begin_in(other).items() if key == "lr0"}
    return with_begin(record, begin_in(record) | rate)


def keep_hyperparameters(
    optimizer: Optimizer, state_dict: StateDict, key: str, *keys: str
) -> StateDict:
    """Write hyperparameters of an optimizer into a state dict before loading it.

    ``load_state_dict`` takes all hyperparameters from the state dict, as torch's does.
    To resume with another rate or decay, load the result of this function.

    Args:
        optimizer: The optimizer that will load, with the values to keep in its groups.
        state_dict: Of an optimizer with the same groups; not changed.
        key: A key of a group to keep, such as ``"weight_decay"`` or ``"lr"``. With
            ``"lr"`` the first rate of schedules and forms is kept too.
        *keys: Further keys.

    Raises:
        TypeError: The state dict is no dict.
        ValueError: No group has the key, or the groups differ.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> saved = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        >>> kept = keep_hyperparameters(optimizer, saved.state_dict(), "lr")
        >>> optimizer.load_state_dict(kept)
        >>> [(group["lr"], group["momentum"]) for group in optimizer.param_groups]
        [(0.02, 0.9)]
    """
    require_whole(state_dict)
    own_record = optimizer.state_dict().get(RECORD)
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    group_keys = dict.fromkeys(chain.from_iterable(groups))
    for wanted in (key, *keys):
        if wanted not in group_keys:
            near = get_close_matches(wanted, group_keys, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"no group of this {type(optimizer).__name__} has {wanted!r}. "
                f"Did you mean {near!r}?"
            )
    for what, read_groups in (("parameters", sizes_of), ("routes", _routes_of)):
        here, saved = read_groups(groups), read_groups(saved_groups)
        if here != saved and None not in saved:  # other projects know no routes
            raise ValueError(
                f"the state dict has groups of {saved} {what}, and the optimizer of "
                f"{here}. Load fit(state_dict, optimizer).state_dict, which keeps all "
                f"hyperparameters of the optimizer."
            )
    kept = {key, *keys} | ({"initial_lr"} if "lr" in (key, *keys) else set())
    new_groups = [
        without(saved_group, kept) | without(group, group.keys() - kept)
        for saved_group, group in zip(saved_groups, groups)
    ]
    whole = {**state_dict, "param_groups": new_groups}
    if PARTS in whole:
        whole[PARTS] = [[without(p, kept) for p in parts] for parts in whole[PARTS]]
    if RECORD in whole and own_record is not None and "lr" in kept:
        pairs = zip(whole[RECORD], own_record)
        whole[RECORD] = [list(map(_with_rate_of, *pair)) for pair in pairs]
    return whole


def _routes_of(groups: Sequence[Hyper]) -> list[Any]:
    return [group.get(ROUTE) for group in groups]


@dataclass(frozen=True)
class Fit:
    """A state dict for a changed model; ``print`` shows how much of it was kept.

    Args:
        state_dict: State dict to load into the new optimizer.
        kept: Parameters whose state stays as it was.
        resized: Parameters of which one dimension changed. The leading part keeps its
            moments, the rest gets moments of 0, and both share the step counter.
        new: Parameters without state.
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
            shown = ", ".join(names[:SHOWN]) + (", ..." if names[SHOWN:] else "")
            if names and fate == "resized":
                shown += "; what was added has moments of 0 and shares the step counter"
            lines.append((fate, f"{len(names)}", shown))
        return "\n".join(aligned(lines, right=[1]))


def fit(
    state_dict: StateDict,
    model: nn.Module | Sequence[nn.Module] | Optimizer,
    names: Iterable[str] | Names | None = None,
) -> Fit:
    """Keep, by name, the saved state that still fits after the model has changed.

    You may have added, removed or moved layers, changed the size of a vocabulary or a
    head, or frozen parts. A parameter without a counterpart gets no state, nor does one
    whose class has other numbers than the saved group, as Muon and AdamW.

    Args:
        state_dict: Of any optimizer, with any groups; not changed.
        model: The changed model. The result is then for an optimizer with one group
            over ``model.parameters()`` and the hyperparameters of the state dict. Or
            the new optimizer: then its groups and hyperparameters stay, and counters
            that its class keeps in groups continue.
        names: Names of the parameters in the order in which they were saved: a list
            per group, or one list for one group. They override those of the state
            dict. If layers were renumbered, give the names that the old parameters
            have in ``model``. If the model was changed in place, use
            ``group_names(old_optimizer.param_groups, model, missing_ok=True)``.

    Returns:
        The state dict to load, and lists of what was kept.

    Raises:
        TypeError: ``model`` is neither, or ``names`` is one list for several groups.
        ValueError: A parameter has no name, or two have the same one; no name is in
            both; or merged groups differ in more than ``weight_decay``.
        ValueError: No state fits.

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
    require_whole(state_dict)
    single = len(state_dict["param_groups"]) == 1
    per_group: Any = names
    if single and isinstance(names, Iterable) and not isinstance(names, str):
        flat = list(names)
        per_group = [flat] if all(isinstance(name, str) for name in flat) else flat
    old = read(state_dict, per_group, OLD_NAMES[single])
    fates: dict[str, list[str]] = {"kept": [], "resized": [], "new": []}
    written, unused = [], dict(old)
    for hyper, places in _layout(model):
        entries, owner = [], _owner(model, hyper)
        for param, new in places:
            old_entry = unused.pop(new.name, None)
            # Of another class: what that kept under a name may be another thing.
            if old_entry and owner is not None and is_foreign(old_entry, owner):
                old_entry = None
            fate, entry = _fitted(new, param, old_entry)
            fates[fate].append(new.name)
            entries.append(entry)
        saved = [entry for entry in entries if entry.hyper]
        written.append((_hyper(owner, hyper, saved), entries))
    fitting = {*fates["kept"], *fates["resized"]}
    if not fitting and not old.keys().isdisjoint(fates["new"]):
        raise ValueError(
            f"no state of the {len(old)} parameters of the state dict fits: it is of "
            f"another class, or of other shapes. Begin without it."
        )
    if not fitting:
        first = next(iter(old), "")
        near = get_close_matches(first, fates["new"], n=1, cutoff=0.0) or ["..."]
        raise ValueError(
            f"none of the {len(old)} parameters of the state dict, {first!r} among "
            f"them, is in the model. Pass names=[...] that say what each is called "
            f"there, as {near[0]!r}."
        )
    dropped = [name for name in old if name not in fitting]
    return Fit(write(state_dict, written), **fates, dropped=dropped)


def _layout(model: Any) -> list[tuple[Hyper, list[tuple[Tensor, Entry]]]]:
    if not isinstance(model, Optimizer):
        places = [(p, Entry(name, key)) for p, name, key in _named_parameters(model)]
        return [({}, places)]
    saved, groups = model.state_dict(), model.param_groups
    names = [name for group in groups for name in group.get("param_names", ())]
    if hasattr(model, "decay_report"):
        names = [row.name for row in model.decay_report().rows]
    count = sum(sizes_of(groups))
    if len(names) < count or None in names:
        raise ValueError(
            f"the new {type(model).__name__} knows no names of its {count} "
            f"parameters. Make it of model.named_parameters(), or pass the model."
        )
    keys = chain.from_iterable(group["params"] for group in saved["param_groups"])
    # A class may have made state when it was constructed, as Adagrad does.
    states = map(saved["state"].get, keys)
    records = chain(*saved.get(RECORD, [[()] * count]))
    columns = zip(
        map(telling_name, names), map(without_wrappers, names), states, records
    )
    entries = (Entry(n, key, state=s, record=r) for n, key, s, r in columns)
    return [
        (without(saved_group, PER_PARAM), list(zip(group["params"], entries)))
        for saved_group, group in zip(saved["param_groups"], groups)
    ]


def _fitted(new: Entry, param: Tensor, saved: Entry | None) -> tuple[str, Entry]:
    """Tell the fate of a parameter, and give it what was saved as far as that fits."""
    if saved is None:
        return "new", new
    state = dict(saved.state) if isinstance(saved.state, Mapping) else {}
    record = _with_rate_of(saved.record, new.record)
    begin = dict(begin_in(record))
    if "name" in begin:  # loading goes by it
        begin["name"] = new.name
    dims = _changed_dims({**state, **begin}, param.shape)
    if dims is None:
        return "new", new
    for dim, values in product(dims, (state, begin)):
        for key in MOMENTS & values.keys():
            old, now = values[key], param.detach()
            # A new row decays towards what it is now.
            whole = now.clone() if key == "init" else old.new_zeros(now.shape)
            size = min(old.shape[dim], whole.shape[dim])
            whole.narrow(dim, 0, size).copy_(old.narrow(dim, 0, size))
            values[key] = whole
    state, record = state or saved.state, with_begin(record, begin)
    fitted = replace(saved, name=new.name, key=new.key, state=state, record=record)
    return "resized" if dims else "kept", fitted


def _changed_dims(values: Mapping[str, Any], shape: Size) -> list[int] | None:
    # The dimension in which the state has another size, if any. ``None``: it fits not
    # at all, or it is not known with which values its new rows begin.
    tensors = {k: v for k, v in values.items() if isinstance(v, Tensor) and k != "step"}
    like = {k: v.shape for k, v in tensors.items() if v.ndim == len(shape)}
    if not like:  # nothing, or sums over rows and columns, as of Adafactor
        sizes = {size for tensor in tensors.values() for size in tensor.shape}
        return [] if sizes <= {1, *shape} and MOMENTS.isdisjoint(tensors) else None
    saved = tuple(map(max, zip(*like.values())))
    if shape in like.values() or saved == shape:
        return []
    others = [tensor for key, tensor in tensors.items() if key not in like]
    plain = MOMENTS.issuperset(like) and all(other.numel() == 1 for other in others)
    changed = [dim for dim, size in enumerate(shape) if saved[dim] != size]
    return changed if plain and len(changed) == 1 else None


def _owner(model: Any, hyper: Hyper) -> Any:
    """Return the optimizer that steps a group: inside wrappers, or that of a route."""
    if not isinstance(model, Optimizer):
        return None
    while isinstance(inner := getattr(model, "optimizer", None), Optimizer):
        model = inner
    routes, route = getattr(model, "optimizers", None), hyper.get(ROUTE)
    # Of a `Routed`, and not of another's wrapper.
    return routes[route] if isinstance(routes, dict) and route in routes else model


def _hyper(owner: Any, hyper: Hyper, entries: Sequence[Entry]) -> Hyper:
    if not entries:
        return hyper
    if owner is None:
        return merged(entries, SEVERAL)
    kept = {name for cls in type(owner).__mro__ for name in signature(cls).parameters}
    # What users and schedulers wrote stays; what the class counts, as Prodigy does
    # the size of its steps, goes on.
    kept |= hyper.keys() - owner.defaults.keys()
    kept |= {key for entry in entries for key in entry.hyper if key.endswith("_lr")}
    counted = [without(entry.hyper, kept) for entry in entries]
    way_out = "Make it two groups of the new optimizer."
    return hyper | agreed(entries, counted, (), way_out)
