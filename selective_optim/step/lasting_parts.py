"""Parts of any other class: they last, so what the class writes stays with each.

What a user writes into a group goes down into its parts before the class runs; what
the class wrote into all of them alike shows in the group afterwards. A state dict
has the user's groups, and under ``"parts"`` what a part keeps that they do not show.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim._text import received
from selective_optim.decay import FORMS, FULL, DecayKey, Decision, Form, is_zero
from selective_optim.step.class_step import View
from selective_optim.step.setting import (
    FLAGS,
    PER_PARAM,
    WD,
    Group,
    Share,
    alike,
    chosen_form,
    pick,
    same,
    share_of,
    without,
)

# What is computed for each part from the group and the decay of the part.
DECAY_KEYS = (WD, *FLAGS)
# Not written from a group into its parts, nor back, as they stand.
NOT_SHARED = (*PER_PARAM, *DECAY_KEYS)
_ABSENT = object()


@dataclass(eq=False)
class LastingPart:
    """Parameters of one group with one decay, and the group that the class sees."""

    decay_key: DecayKey
    group: Group  # what the class sees and writes to
    # Where its parameters stand in the user's group. They are in the part's own while
    # the class sees it: one that leaves must be freed.
    positions: list[int]
    tokens: list[object]  # theirs and nobody else's, see `_torch.token_of`

    @property
    def hyper(self) -> Group:
        return without(self.group, NOT_SHARED)


@dataclass(eq=False)
class Split:
    """A user's group and its parts."""

    group: Group
    parts: list[LastingPart]  # at least one, also of a group without parameters
    form: Form | None = None  # of the class, where a group does not choose it
    seen: Group = field(default_factory=dict)  # the group when last looked at

    def place_params(self) -> None:
        for part in self.parts:
            part.group.update(pick(self.group, part.positions))

    def remove_params(self) -> None:
        """Take the parameters out again, in lists that the class does not know."""
        for part in self.parts:
            part.group.update(pick(self.group, ()))

    def adopt(self, groups: Sequence[Group], defaults: Collection[str]) -> None:
        """Take over the groups that the class made of the parts."""
        for part, group in zip(self.parts, groups, strict=True):
            part.group = group
        self.group.update(without(groups[0], PER_PARAM))
        self.share_tensors(defaults)
        self.seen = without(self.group, DECAY_KEYS)  # these are to be handed down
        self.remove_params()

    def _share(self, part: LastingPart) -> Share:
        return share_of(self.group, part.decay_key, self.form)

    def computed(self, part: LastingPart, key: str) -> Any:
        share = self._share(part)
        return share.wd if key == WD else share.form == "decoupled"

    def views(self, decisions: Sequence[Decision]) -> list[View]:
        views = []
        for part in self.parts:
            positions = part.positions if part.decay_key.decay.needs_init else []
            inits: list[Any] = [decisions[i].init for i in positions]
            views.append(View(part.group, inits, self._share(part).decay_pass))
        return views

    def hand_down(self, defaults: Collection[str]) -> None:
        """Write what has changed in the group into its parts."""
        # Asked for key by key: a group may be a dict that computes what is read.
        group, seen = {key: self.group[key] for key in self.group}, self.seen
        # A tensor that is the same object may have been written to.
        touched = [
            key
            for key, value in group.items()
            if isinstance(value, Tensor) or value is not seen.get(key, _ABSENT)
        ]
        forms = [part.decay_key.decay.form for part in self.parts]
        if "lr" in touched and any(form and FORMS[form].follows_lr for form in forms):
            touched += group.keys() & {WD}
        if WD in touched:  # of a decay of 0 no form was handed down
            touched += group.keys() & {*FLAGS}
        # Computed before any is written, so that an error leaves the parts alike.
        updates: list[tuple[Group, Group]] = []
        for key in touched:
            value = group[key]
            if key in DECAY_KEYS:
                updates += [(p.group, {key: self.computed(p, key)}) for p in self.parts]
            elif key not in PER_PARAM and not same(value, seen.get(key, _ABSENT)):
                self._require_common(key)
                values = {key: value}
                updates += [(p.group, _copied(values, defaults)) for p in self.parts]
        for part_group, values in updates:
            part_group.update(values)
        # A key that the user removed goes from the parts; one that is only there stays.
        for key in seen.keys() - group.keys():
            for part in self.parts:
                part.group.pop(key, None)
        self.seen = group

    def _require_common(self, key: str) -> None:
        # A schedule that goes on from the group's would go on from none of theirs.
        if _differing([{key: part.group.get(key, _ABSENT)} for part in self.parts]):
            raise ValueError(
                f"{key!r} was set in a group, and the class itself has set it for each "
                f"decay in that group apart. Split the groups by hand: "
                f"selective_optim.param_groups(model, ...)."
            )

    def recognize(self) -> None:
        """Take equal numbers for those that were seen: pickle makes new objects."""
        for key, value in self.seen.items():
            if same(value, now := self.group.get(key, _ABSENT)):
                self.seen[key] = now

    def hand_up(self) -> None:
        """Write what the class wrote into all parts alike into the group."""
        first, *others = [part.group for part in self.parts]
        for key, value in first.items():
            if key in NOT_SHARED or value is self.group.get(key, _ABSENT):
                continue
            tensor = isinstance(value, Tensor)
            # Of tensors the first part's: to compare them would wait for their device.
            if tensor or all(same(value, o.get(key, _ABSENT)) for o in others):
                self.group[key] = value
        for key in self.group.keys() - first.keys():
            if key not in NOT_SHARED and not any(key in other for other in others):
                del self.group[key]
        self.seen = dict(self.group)

    def share_tensors(self, defaults: Collection[str]) -> None:
        """Let all parts read one tensor: schedulers write into the one they see."""
        first, *others = [part.group for part in self.parts]
        for key in defaults:
            if key not in NOT_SHARED and isinstance(first.get(key), Tensor):
                for other in others:
                    other[key] = first[key]


def _differing(groups: Sequence[Group]) -> list[str]:
    """Name what the first of some groups holds, and another holds otherwise or not."""
    first, *others = groups or [{}]
    return [
        key
        for key, value in first.items()
        if not all(alike(value, other.get(key, _ABSENT)) for other in others)
    ]


def _copied(group: Group, defaults: Collection[str]) -> Group:
    """Copy a group for a part, which counts by itself in tensors under other keys."""
    tensors = {k: v for k, v in group.items() if isinstance(v, Tensor)}
    copies = {k: v.detach().clone() for k, v in tensors.items() if k not in defaults}
    return {**group, **copies}


def by_decay(decisions: Sequence[Decision]) -> dict[DecayKey, list[int]]:
    """List the positions of a group by decay_key, in the order of first appearance."""
    positions: dict[DecayKey, list[int]] = {}
    for position, decision in enumerate(decisions):
        positions.setdefault(decision.decay_key, []).append(position)
    # An empty group still needs a part: torch's classes iterate over groups.
    return positions or {DecayKey(FULL): []}


def split_group(group: Group, decisions: Sequence[Decision]) -> Split:
    """Split a group that no class has seen yet; decay is still that of the group."""
    split = split_again(group, decisions, (), group)
    for part in split.parts:
        part.group = {**group, **pick(group, part.positions)}
    return split


def split_again(
    group: Group,
    decisions: Sequence[Decision],
    splits: Sequence[Split],
    defaults: Collection[str],
) -> Split:
    """Split a group anew, or raise ValueError; parts with the same decay go on."""
    params = group["params"]
    origins = [split for split in splits if split.group is group]
    going_on = {part.decay_key: part for split in origins for part in split.parts}
    stated = {}
    if not origins:
        # Known ahead: a part of new parameters may come before those that were seen.
        origins = [split for split in splits if _hyper_of(params, [split])]
        # A new dict for tensors of several groups: hyperparameters are those it says.
        differing = _differing(_hyper_of(params, origins))
        stated = {k: group[k] for k in differing if k in group and k in defaults}
    seen = {**(origins[0].seen if origins else {}), **stated}
    parts = []
    for decay_key, positions in by_decay(decisions).items():
        own_params = [params[i] for i in positions]
        hypers = _hyper_of(own_params, origins)
        if (part := going_on.get(decay_key)) is not None:
            # The same dict, which the class may know by identity.
            part_group, hypers = part.group, [part.hyper, *hypers]
        else:
            # A counter that the class keeps in a group follows its parameters.
            # One that comes from none begins with what the others were last given.
            first = hypers[0] if hypers else without({**group, **seen}, NOT_SHARED)
            part_group = _copied({**first, **stated}, defaults)
        _require_agreement(hypers, decisions, stated)
        tokens = list(map(_torch.token_of, own_params))
        parts.append(LastingPart(decay_key, part_group, positions, tokens))
    # Else all go on, and the class may have written their decay.
    if any(part.decay_key not in going_on for part in parts):
        seen = without(seen, DECAY_KEYS)
    return Split(group, parts, splits[0].form if splits else None, seen)


def _hyper_of(params: Sequence[Tensor], splits: Sequence[Split]) -> list[Group]:
    """List the hyperparameters of the parts that these parameters were in."""
    tokens = set(map(id, map(_torch.token_of, params)))
    parts = (part for split in splits for part in split.parts)
    return [p.hyper for p in parts if not tokens.isdisjoint(map(id, p.tokens))]


def _require_agreement(
    hypers: Sequence[Group], decisions: Sequence[Decision], stated: Collection[str]
) -> None:
    for key in _differing(hypers):
        if key not in stated:
            name = next((repr(d.name) for d in decisions if d.name), "a parameter")
            raise ValueError(
                f"{name} would come together with parameters whose {key!r} differs "
                f"by now, which this class keeps for each group. Make a new "
                f"optimizer with the new policy or groups."
            )


def record_of_parts(splits: Sequence[Split]) -> list[list[Group]] | None:
    """Write down what parts keep that no group shows; ``None`` if nothing."""
    record = [[_record_of(split, part) for part in split.parts] for split in splits]
    return record if any(len(row) > 1 for rows in record for row in rows) else None


def _record_of(split: Split, part: LastingPart) -> Group:
    group, wd = split.group, split.computed(part, WD)
    kept = {k: v for k, v in part.hyper.items() if not same(v, group.get(k, _ABSENT))}
    # A new part has none yet where handing it down raised; the step will tell.
    if not same(part.group.get(WD, wd), wd):
        kept[WD] = part.group[WD]  # the class writes it itself
    return {"positions": part.positions, **kept}


def saved_parts(
    state_dict: Mapping[str, Any], record: Any, splits: Sequence[Split]
) -> list[list[Group]]:
    """Read what a state dict holds for each part alone, before anything is loaded."""
    groups = state_dict["param_groups"]
    return [
        [_saved_for(part, group, rows) for part in split.parts]
        for split, group, rows in zip(splits, groups, record or repeat(()))
    ]


def _saved_for(part: LastingPart, group: Group, rows: Sequence[Group]) -> Group:
    places = set(part.positions)
    joined = [row for row in rows if not places.isdisjoint(row["positions"])]
    keys = set[str]().union(*joined) - {"positions"}
    for key in _differing([{k: r.get(k, group.get(k)) for k in keys} for r in joined]):
        raise ValueError(
            f"{key!r} differs between the parts that the loaded state dict was saved "
            f"with, and this policy joins them. Load it with the policy that it was "
            f"saved with."
        )
    return without(joined[0], ["positions"]) if joined else {}


def load_parts(
    splits: Sequence[Split], saved: Sequence[Sequence[Group]], defaults: Collection[str]
) -> None:
    """Give the parts what was saved for them, in the groups that loading has made."""
    for split, rows in zip(splits, saved):
        group = split.group
        for part, row in zip(split.parts, rows):
            decay = {k: split.computed(part, k) for k in DECAY_KEYS if k in group}
            common = _copied(without(group, NOT_SHARED), defaults)
            part.group = {**decay, **common, **copy.deepcopy(row)}
        split.share_tensors(defaults)
        split.remove_params()
        split.seen = dict(group)


# What cannot be served by splitting: each check raises before anything has changed.


def _way_out(optimizer: object) -> str:
    by_hand = f"{type(optimizer).__name__}(selective_optim.param_groups(model, ...))"
    return f"Split the groups by hand: {by_hand}."


def require_class(cls: object) -> None:
    """Check that this is a class of optimizers that are made from parameters."""
    if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer):
        raise TypeError(
            f"`optimizer_class` must be a subclass of torch.optim.Optimizer, not "
            f"{received(cls)}. Write selective(torch.optim.NAdam)(model.parameters())."
        )
    # Arguments by which a class takes something else than parameters.
    for name in inspect.signature(cls).parameters:
        if name in ("optimizer", "base_optimizer"):
            raise TypeError(
                f"{cls.__name__} takes {name!r}, another optimizer, and steps that. "
                f"Make that one selective: {cls.__name__}(selective(...)(...))."
            )
        if name in ("wd_policy", "model"):
            raise TypeError(
                f"{cls.__name__} takes {name!r} itself and makes groups of its own, "
                f"where nothing can be split. Use a class that takes parameters."
            )


def require_parts(optimizer: Any, parts: Sequence[Group]) -> None:
    """Check that the class made its groups of the parts, and steps them itself."""
    name, groups = type(optimizer).__name__, optimizer.param_groups
    param_ids = [list(map(id, group["params"])) for group in groups]
    if param_ids != [list(map(id, part["params"])) for part in parts]:
        raise ValueError(
            f"{name} makes groups of its own from those that it is given, so their "
            f"decay cannot be told apart. {_way_out(optimizer)}"
        )
    if any(WD not in group for group in groups):
        raise ValueError(
            f"{name} has no 'weight_decay' in its groups, so there is nothing to "
            f"decide. Use a class that decays, as selective_optim.AdamW does."
        )
    for key, value in vars(optimizer).items():
        if isinstance(value, torch.optim.Optimizer):
            raise ValueError(
                f"{name} keeps another optimizer in {key!r}, which "
                f"steps groups of its own. {_way_out(optimizer)}"
            )


def require_forms(optimizer: Any, split: Split) -> None:
    """Check that it is known what each part is to be decayed like."""
    name = type(optimizer).__name__
    default = chosen_form(split.group) or split.form
    for decay in (part.decay_key.decided for part in split.parts):
        if is_zero(decay.multiplier) or not (decay.form or decay.target):
            continue
        if decay.form is None and not default:
            raise ValueError(
                f"`wd_policy` states {decay.stated}, and {name} does not say in which "
                f"form it decays. State that too: ... * form('decoupled')."
            )
        if "lr" not in split.group:
            raise ValueError(
                f"`wd_policy` states {decay.stated}, which follows a rate, and {name} "
                f"has no 'lr' in its groups. Leave that out, or use "
                f"selective_optim.AdamW or SGD."
            )


def require_no_lists(optimizer: Any, count: int) -> None:
    """Check that nothing has one item for each of so many parts, as until now."""
    for key, value in vars(optimizer).items():
        if key == "param_groups" or key.startswith("_"):
            continue
        indexed = isinstance(value, Mapping) and set(value) == set(range(count))
        if (isinstance(value, (list, tuple)) or indexed) and len(value) == count:
            raise ValueError(
                f"{type(optimizer).__name__} made {key!r} at construction, with one "
                f"item per group, so its groups cannot be split otherwise now. Make a "
                f"new optimizer with the new policy or groups."
            )


def require_no_index_overrides(optimizer: Any, groups: Collection[Group]) -> None:
    """Check that bitsandbytes overrides nothing by an index in groups not split."""
    split = len(groups) != len(optimizer.param_groups)
    overrides = getattr(getattr(optimizer, "mng", None), "index2config", None)
    if split and overrides and not getattr(optimizer, "initialized", True):
        raise ValueError(
            f"GlobalOptimManager overrides settings of {type(optimizer).__name__} by "
            f"the index of a parameter in its group, and split groups have others. Use "
            f"register_module_override(module, 'weight', ...) instead."
        )


def require_plain_arguments(optimizer: Any, arguments: Iterable[Any]) -> None:
    """Check that a step is given no list, whose order is that of unsplit groups."""
    for value in arguments:
        if isinstance(value, (list, tuple)):
            raise ValueError(
                f"step() of {type(optimizer).__name__} was given a list of "
                f"{len(value)} items, whose order is not that of the split groups. "
                f"{_way_out(optimizer)}"
            )
