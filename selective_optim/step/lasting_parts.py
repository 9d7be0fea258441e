"""Parts of any other class: they last, so what the class writes stays with each.

A user's group is split by what was decided into parts, which are groups in their
own right and live as long as the optimizer. What a user writes into the group goes
down into its parts before the class runs; what the class wrote into all of them
alike shows in the group afterwards. In a state dict stand the user's groups, and under
``"parts"`` what a part keeps that its group does not show.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
)

# What is computed for each part from the group and the decay of the part.
DECAY_KEYS = (WD, *FLAGS)
# Not written from a group into its parts, nor back, as they stand.
NOT_SHARED = (*PER_PARAM, *DECAY_KEYS)
_ABSENT = object()


@dataclass(eq=False)
class Part:
    """Parameters of one group with one decay, and the group that the class sees."""

    decay_key: DecayKey
    group: Group  # what the class sees and writes to
    # Where its parameters stand in the user's group. They are in the part's own while
    # the class sees it: one that leaves must be freed.
    positions: list[int]
    tokens: list[object]  # theirs and nobody else's, see `_torch.token_of`

    @property
    def own(self) -> Group:
        """What the part holds besides its parameters and their decay."""
        return _without(self.group, NOT_SHARED)


@dataclass(eq=False)
class Split:
    """A user's group and its parts."""

    group: Group
    parts: list[Part]  # at least one, with no parameters where the group has none
    form: Form | None = None  # of the class, if it is known and no group can choose it
    shown: Group = field(default_factory=dict)  # the group when last looked at

    def fill(self) -> None:
        for part in self.parts:
            part.group.update(pick(self.group, part.positions))

    def empty(self) -> None:
        """Take the parameters out again, in lists that the class does not know."""
        for part in self.parts:
            part.group.update({key: [] for key in PER_PARAM if key in self.group})

    def adopt(self, made: Sequence[Group], keys: Collection[str]) -> None:
        """Take over the groups that the class made of the parts, and show them."""
        for part, group in zip(self.parts, made, strict=True):
            part.group = group
        first = self.parts[0].group
        self.group.update({k: v for k, v in first.items() if k not in PER_PARAM})
        self.share_tensors(keys)
        self.shown = _without(self.group, DECAY_KEYS)  # the rest is to be handed down

    def _share(self, part: Part) -> Share:
        return share_of(self.group, part.decay_key, self.form)

    def computed(self, part: Part, key: str) -> Any:
        """Compute what a part has under one of the keys in ``DECAY_KEYS``."""
        shared = self._share(part)
        return shared.wd if key == WD else shared.form == "decoupled"

    def views(self, decisions: Sequence[Decision]) -> list[View]:
        """Show the parts with the decay that the class does not do.

        Decisions are asked for what parameters decay towards, if that is a tensor each.
        """
        views = []
        for part in self.parts:
            positions = part.positions if part.decay_key.decay.needs_init else []
            inits: list[Any] = [decisions[i].init for i in positions]
            views.append(View(part.group, inits, self._share(part).decay_pass))
        return views

    def hand_down(self, keys: Collection[str]) -> None:
        """Write what has changed in the group into its parts.

        Tensors under ``keys`` serve all parts; each part keeps others for itself.
        """
        # Asked for key by key: a group may be a dict that computes what is read.
        group, shown = {key: self.group[key] for key in self.group}, self.shown
        # A tensor that is the same object may have been written to.
        moved = {
            key
            for key, value in group.items()
            if isinstance(value, Tensor) or value is not shown.get(key, _ABSENT)
        }
        forms = [part.decay_key.decay.form for part in self.parts]
        if "lr" in moved and any(form and FORMS[form].follows_lr for form in forms):
            moved.add(WD)
        # Computed before any is written, so that an error leaves the parts alike.
        written: list[tuple[Group, Group]] = []
        for key in group.keys() & moved:
            value = group[key]
            if key in DECAY_KEYS:
                written += [(p.group, {key: self.computed(p, key)}) for p in self.parts]
            elif key not in PER_PARAM and not same(value, shown.get(key, _ABSENT)):
                self._require_common(key)
                written += [(p.group, _copied({key: value}, keys)) for p in self.parts]
        for part_group, values in written:
            part_group.update(values)
        # A key that the user removed goes from the parts; one that is only there stays.
        for key in shown.keys() - group.keys():
            for part in self.parts:
                part.group.pop(key, None)
        self.shown = dict(group)

    def _require_common(self, key: str) -> None:
        # A schedule that goes on from the group's would go on from none of theirs.
        if _differing([{key: p.group.get(key, _ABSENT)} for p in self.parts]):
            raise ValueError(
                f"{key!r} was set in a group, and the class itself has set it for each "
                f"decay in that group apart. Split the groups by hand: "
                f"selective_optim.param_groups(model, ...)."
            )

    def recognize(self) -> None:
        """Take equal numbers for those that were shown: pickle makes new objects."""
        for key, value in self.shown.items():
            if same(value, now := self.group.get(key, _ABSENT)):
                self.shown[key] = now

    def show(self) -> None:
        """Write what the class wrote into all parts alike into the group.

        Of tensors the first part's shows. What differs between parts does not: there
        the group keeps what it said before.
        """
        first, *others = [part.group for part in self.parts]
        for key, value in first.items():
            if key in NOT_SHARED or value is self.group.get(key, _ABSENT):
                continue
            tensor = isinstance(value, Tensor)
            # Compared, tensors of a device would make every step wait for it.
            if tensor or all(same(value, o.get(key, _ABSENT)) for o in others):
                self.group[key] = value
        for key in self.group.keys() - first.keys():
            if key not in NOT_SHARED and not any(key in other for other in others):
                del self.group[key]
        self.shown = dict(self.group)

    def share_tensors(self, keys: Collection[str]) -> None:
        """Let all parts read one tensor for each hyperparameter.

        Some classes make a tensor of a rate; schedulers write into the one they see.
        """
        first, *others = [part.group for part in self.parts]
        for key in keys:
            if key not in NOT_SHARED and isinstance(first.get(key), Tensor):
                for other in others:
                    other[key] = first[key]


def _without(group: Group, keys: Collection[str]) -> Group:
    return {key: value for key, value in group.items() if key not in keys}


def _differing(owns: Sequence[Group]) -> list[str]:
    """Name what the first of some groups holds, and another holds otherwise or not."""
    first, *others = owns or [{}]
    return [
        key
        for key, value in first.items()
        if not all(alike(value, other.get(key, _ABSENT)) for other in others)
    ]


def _copied(group: Group, keys: Collection[str]) -> Group:
    """Copy a group for a part, which counts by itself in tensors under other keys."""
    tensors = {k: v for k, v in group.items() if isinstance(v, Tensor)}
    own = {k: v.detach().clone() for k, v in tensors.items() if k not in keys}
    return {**group, **own}


def by_decay(decisions: Sequence[Decision]) -> dict[DecayKey, list[int]]:
    """List the positions of a group by decay_key, in the order of first appearance."""
    found: dict[DecayKey, list[int]] = {}
    for position, decision in enumerate(decisions):
        found.setdefault(decision.decay_key, []).append(position)
    # An empty group still needs a part: torch's classes iterate over groups.
    return found or {DecayKey(FULL): []}


def split_group(group: Group, decisions: Sequence[Decision]) -> Split:
    """Split a group that no class has seen yet; decay is still that of the group."""
    parts = []
    for decay_key, chosen in by_decay(decisions).items():
        shown = {**group, **pick(group, chosen)}
        tokens = list(map(_torch.token_of, shown["params"]))
        parts.append(Part(decay_key, shown, chosen, tokens))
    return Split(group, parts)


def split_again(
    group: Group,
    decisions: Sequence[Decision],
    before: Sequence[Split],
    keys: Collection[str],
) -> Split:
    """Split a group whose parameters or decisions have changed, or raise ValueError.

    The part with the same decay goes on. A new one takes over what the parts that its
    parameters come from keep for themselves, which must be the same.
    """
    mine = [split for split in before if split.group is group]
    # Known ahead: a part of new parameters alone may come before those that were shown.
    origin = mine or [s for s in before if _parts_of(group["params"], [s])]
    settled = {}
    if not mine:
        # A new dict for tensors of several groups: hyperparameters are those it says.
        owns = [part.own for part in _parts_of(group["params"], origin)]
        settled = {k: group[k] for k in _differing(owns) if k in group and k in keys}
    shown = {**(origin[0].shown if origin else {}), **settled}
    going_on = {part.decay_key: part for split in mine for part in split.parts}
    parts = []
    for decay_key, chosen in by_decay(decisions).items():
        params = [group["params"][i] for i in chosen]
        tokens = list(map(_torch.token_of, params))
        owns = [part.own for part in _parts_of(params, origin)]
        if (part := going_on.get(decay_key)) is not None:
            # The same dict, which the class may know by identity.
            own, owns = part.group, [part.own, *owns]
        else:
            # A counter that the class keeps in a group follows its parameters.
            # One that comes from none begins with what the others were last given.
            first = owns[0] if owns else _without({**group, **shown}, NOT_SHARED)
            own = _copied({**first, **settled}, keys)
        _require_agreement(owns, decisions, settled)
        parts.append(Part(decay_key, own, chosen, tokens))
    # Else all go on, and the class may have written their decay.
    if any(part.decay_key not in going_on for part in parts):
        shown = _without(shown, DECAY_KEYS)
    return Split(group, parts, before[0].form if before else None, shown)


def _parts_of(params: Sequence[Tensor], splits: Sequence[Split]) -> list[Part]:
    """List the parts that hold some of these parameters."""
    wanted = set(map(id, map(_torch.token_of, params)))
    parts = (part for split in splits for part in split.parts)
    return [part for part in parts if not wanted.isdisjoint(map(id, part.tokens))]


def _require_agreement(
    owns: Sequence[Group], decisions: Sequence[Decision], settled: Collection[str]
) -> None:
    for key in _differing(owns):
        if key not in settled:
            name = next((repr(d.name) for d in decisions if d.name), "a parameter")
            raise ValueError(
                f"{name} would come together with parameters whose {key!r} differs "
                f"by now, which this class keeps for each group. Make a new "
                f"optimizer with the new policy or groups."
            )


# State dicts.


def record_of_parts(splits: Sequence[Split]) -> list[list[Group]] | None:
    """Write down what parts keep that no group shows; ``None`` if nothing."""
    kept = [[_kept(split, part) for part in split.parts] for split in splits]
    return kept if any(len(own) > 1 for group in kept for own in group) else None


def _kept(split: Split, part: Part) -> Group:
    shown, wd = split.group, split.computed(part, WD)
    own = {k: v for k, v in part.own.items() if not same(v, shown.get(k, _ABSENT))}
    # A new part has none yet where handing it down raised; the step will tell.
    if not same(part.group.get(WD, wd), wd):
        own[WD] = part.group[WD]  # the class writes it itself
    return {"positions": part.positions, **own}


def saved_parts(
    state_dict: Mapping[str, Any], record: Any, splits: Sequence[Split]
) -> list[list[Group]]:
    """Read what a state dict holds for each part alone, before anything is loaded."""
    records = record or [[] for _ in splits]
    return [
        [_saved_own(saved, part.positions, own) for part in split.parts]
        for split, saved, own in zip(splits, state_dict["param_groups"], records)
    ]


def load_parts(
    splits: Sequence[Split],
    groups: Sequence[Group],
    saved: Sequence[Sequence[Group]],
    keys: Collection[str],
) -> None:
    """Give the parts what was saved for them, in the groups that loading has made."""
    for split, group, owns in zip(splits, groups, saved):
        split.group = group
        for part, own in zip(split.parts, owns):
            numbers = {k: split.computed(part, k) for k in DECAY_KEYS if k in group}
            common = _copied(_without(group, NOT_SHARED), keys)
            part.group = {**numbers, **common, **copy.deepcopy(own)}
        split.share_tensors(keys)
        split.empty()
        split.shown = dict(group)


def _saved_own(
    saved: Group, positions: Sequence[int], record: Sequence[Group]
) -> Group:
    mine = [own for own in record if not set(positions).isdisjoint(own["positions"])]
    keys = set[str]().union(*mine) - {"positions"}
    for key in _differing([{k: o.get(k, saved.get(k)) for k in keys} for o in mine]):
        raise ValueError(
            f"{key!r} differs between the parts that the loaded state dict was saved "
            f"with, and this policy joins them. Load it with the policy that it was "
            f"saved with."
        )
    return _without(mine[0], ["positions"]) if mine else {}


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


def require_parts(optimizer: Any, splits: Sequence[Split]) -> None:
    """Check that the class made its groups of the parts, and steps them itself."""
    name, parts = type(optimizer).__name__, [p for split in splits for p in split.parts]
    made, given = (
        [list(map(id, group["params"])) for group in groups]
        for groups in (optimizer.param_groups, [part.group for part in parts])
    )
    if made != given:
        raise ValueError(
            f"{name} makes groups of its own from those that it is given, so their "
            f"decay cannot be told apart. {_way_out(optimizer)}"
        )
    if any(WD not in group for group in optimizer.param_groups):
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
    known = chosen_form(split.group) or split.form
    for decay in (part.decay_key.decay for part in split.parts):
        if is_zero(decay.multiplier) or not (decay.form or decay.target):
            continue
        if decay.form is None and not known:
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


def require_plain_arguments(optimizer: Any, given: Iterable[Any]) -> None:
    """Check that a step is given no list, whose order is that of unsplit groups."""
    for value in given:
        if isinstance(value, (list, tuple)):
            raise ValueError(
                f"step() of {type(optimizer).__name__} was given a list of "
                f"{len(value)} items, whose order is not that of the split groups. "
                f"{_way_out(optimizer)}"
            )
