"""Parts of any other class: they last, so what the class writes stays with each.

A user's group is split by what was decided into parts, which are groups in their
own right and live as long as the optimizer. What a user writes into the group goes
down into its parts before the class runs; what the class wrote into all of them
alike shows in the group afterwards. In a state dict stand the user's groups, and under
``"parts"`` what a part keeps that its group does not show.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import FORMS, FULL_KEY, DecayKey, Decision, Form
from selective_optim.step.class_step import View
from selective_optim.step.setting import (
    PER_PARAM,
    WD,
    Group,
    Share,
    alike,
    pick,
    same,
    share,
)

# Keys by which classes let a group choose its form: of torch, timm, Prodigy and
# D-Adaptation, pytorch_optimizer, optimi. True is decoupled.
FLAGS = (
    *("decoupled_weight_decay", "decoupled_decay", "decouple"),
    *("weight_decouple", "decouple_wd"),
)
# What is computed for each part from the group and the decay of the part.
DECAY_KEYS = (WD, *FLAGS)
# Not written from a group into its parts, nor back, as they stand.
NOT_SHARED = (*PER_PARAM, *DECAY_KEYS)
_ABSENT = object()


def flag_of(group: Group) -> str | None:
    """Find the key by which the class lets a group choose its form."""
    return next((key for key in FLAGS if key in group), None)


def chosen_form(group: Group) -> Form | None:
    """Tell the form that a group chooses, if its class lets it."""
    flag = flag_of(group)
    return None if flag is None else "decoupled" if group[flag] else "l2"


def share_of(group: Group, decay_key: DecayKey, form: Form | None) -> Share:
    """Share the decay of a part out between the class and a pass."""
    if chosen := chosen_form(group):
        return share(group, decay_key, chosen, ("l2", "decoupled"))
    return share(group, decay_key, form, (form,) if form else ())


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
        """Give the parts their parameters, for the class to see."""
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
        written: list[tuple[Group, str, Any]] = []
        for key in group.keys() & moved:
            value = group[key]
            if key in DECAY_KEYS:
                written += [(p.group, key, self.computed(p, key)) for p in self.parts]
            elif key not in PER_PARAM and not same(value, shown.get(key, _ABSENT)):
                self._require_common(key)
                own = (value if key in keys else _own_copy(value) for _ in self.parts)
                written += [(p.group, key, v) for p, v in zip(self.parts, own)]
        for part_group, key, value in written:
            part_group[key] = value
        # A key that the user removed goes from the parts; one that is only there stays.
        for key in shown.keys() - group.keys():
            for part in self.parts:
                part.group.pop(key, None)
        self.shown = dict(group)

    def _require_common(self, key: str) -> None:
        # A schedule that goes on from the group's would go on from none of theirs.
        if not _agree(part.group.get(key, _ABSENT) for part in self.parts):
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


def _agree(values: Iterable[Any]) -> bool:
    first, *others = values
    return all(alike(first, other) for other in others)


def _own_copy(value: Any) -> Any:  # of a tensor that each part counts in by itself
    return value.detach().clone() if isinstance(value, Tensor) else value


def by_decay(decisions: Sequence[Decision]) -> dict[DecayKey, list[int]]:
    """List the positions of a group by decay_key, in the order of first appearance."""
    found: dict[DecayKey, list[int]] = {}
    for position, decision in enumerate(decisions):
        found.setdefault(decision.decay_key, []).append(position)
    # An empty group still needs a part: torch's classes iterate over groups.
    return found or {FULL_KEY: []}


def split_group(
    group: Group, decisions: Sequence[Decision], form: Form | None
) -> Split:
    """Split a group that no class has seen yet; decay is still that of the group."""
    parts = []
    for decay_key, chosen in by_decay(decisions).items():
        shown = {**group, **pick(group, chosen)}
        tokens = list(map(_torch.token_of, shown["params"]))
        parts.append(Part(decay_key, shown, chosen, tokens))
    return Split(group, parts, form)


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
    origin = mine or [split for split, _ in _holders(group["params"], before)]
    # A new dict for tensors of several groups: hyperparameters are those it says.
    settled = {} if mine else _disputed(group, before, keys)
    shown = {**(origin[0].shown if origin else {}), **settled}
    going_on = {part.decay_key: part for split in mine for part in split.parts}
    parts = []
    for decay_key, chosen in by_decay(decisions).items():
        params = [group["params"][i] for i in chosen]
        known = [part for _, part in _holders(params, mine or before)]
        lasting = [going_on[decay_key]] if decay_key in going_on else []
        _require_agreement([*lasting, *known], decisions, settled)
        # The same dict, which the class may know by identity.
        if lasting:
            own = lasting[0].group
        else:
            # A counter that the class keeps in a group follows its parameters.
            # One that comes from none begins with what the others were last given.
            last = _without({**group, **shown}, NOT_SHARED)
            values = {**(known[0].own if known else last), **settled}
            own = {k: v if k in keys else _own_copy(v) for k, v in values.items()}
        tokens = list(map(_torch.token_of, params))
        parts.append(Part(decay_key, own, chosen, tokens))
    # Else all go on, and the class may have written their decay.
    if any(part.decay_key not in going_on for part in parts):
        shown = _without(shown, DECAY_KEYS)
    return Split(group, parts, before[0].form if before else None, shown)


def _disputed(
    group: Group, before: Sequence[Split], keys: Collection[str]
) -> dict[str, Any]:
    """Take hyperparameters in which the parts that a group comes from differ."""
    owns = [part.own for _, part in _holders(group["params"], before)] or [{}]
    return {
        key: group[key]
        for key in group.keys() & owns[0].keys() & set(keys)
        if not _agree(own.get(key, _ABSENT) for own in owns)
    }


def _holders(
    params: Sequence[Tensor], splits: Sequence[Split]
) -> list[tuple[Split, Part]]:
    wanted = set(map(id, map(_torch.token_of, params)))
    return [
        (split, part)
        for split in splits
        for part in split.parts
        if not wanted.isdisjoint(map(id, part.tokens))
    ]


def _require_agreement(
    parts: Sequence[Part], decisions: Sequence[Decision], settled: Collection[str]
) -> None:
    owns = [part.own for part in parts] or [{}]
    for key in owns[0]:
        if key not in settled and not _agree(own.get(key, _ABSENT) for own in owns):
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
    shown = split.group
    own = {k: v for k, v in part.own.items() if not same(v, shown.get(k, _ABSENT))}
    # A new part has none yet where handing it down raised; the step will tell.
    if not same(part.group.get(WD, wd := split.computed(part, WD)), wd):
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
            values = _without(group, NOT_SHARED).items()
            common = {k: v if k in keys else _own_copy(v) for k, v in values}
            part.group = {**numbers, **common, **copy.deepcopy(own)}
        split.share_tensors(keys)
        split.empty()
        split.shown = dict(group)


def _saved_own(
    saved: Group, positions: Sequence[int], record: Sequence[Group]
) -> Group:
    mine = [own for own in record if not set(positions).isdisjoint(own["positions"])]
    for key in set[str]().union(*mine) - {"positions"}:
        if not _agree(own.get(key, saved.get(key)) for own in mine):
            raise ValueError(
                f"{key!r} differs between the parts that the loaded state dict was "
                f"saved with, and this policy joins them. Load it with the policy "
                f"that it was saved with."
            )
    return _without(mine[0], ["positions"]) if mine else {}
