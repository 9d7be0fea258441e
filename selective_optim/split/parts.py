"""Parameter groups as a class sees them inside its step: one part per decay.

A user's group is split by what was decided into parts, which are groups in their
own right and live as long as the optimizer. What a user writes into the group goes
down into its parts before the class runs; what the class wrote into all of them
alike shows in the group afterwards.

In a state dict of the class stand the parts; outside, the user's groups. What a part
keeps for itself and its group does not show stands beside them, under ``"parts"``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selective_optim._state_dict import MEMBERS, PARTS
from selective_optim.decay import FORMS, FULLY, Decision, Terms

Group = dict[str, Any]
WD = "weight_decay"
# Keys by which classes let a group choose its form: of torch, timm, Prodigy and
# D-Adaptation, pytorch_optimizer, optimi. True is decoupled.
FLAGS = (
    *("decoupled_weight_decay", "decoupled_decay", "decouple"),
    *("weight_decouple", "decouple_wd"),
)
# What is computed for each part from the group and the decay of the part.
COMPUTED = (WD, *FLAGS)
# Not written from a group into its parts, nor back, as they stand.
APART = (*MEMBERS, *COMPUTED)
PLAIN = (int, float, bool, str)
_ABSENT = object()


def wd_of(group: Group, terms: Terms) -> Any:
    """Compute the decay of a part: a number that the class takes as its own."""
    decay, lr0 = terms
    wd = decay.of(group[WD])
    if decay.form is None or lr0 is None:
        return wd
    form, lr = FORMS[decay.form], group["lr"]
    # A number also where the rate is a tensor: classes take no other.
    return form.strength(wd, float(lr) if form.follows_lr else lr, lr0)


def flag_of(group: Group) -> str | None:
    """Find the key by which the class lets a group choose its form."""
    return next((key for key in FLAGS if key in group), None)


def computed(group: Group, terms: Terms, key: str) -> Any:
    """Compute what a part has under one of the keys in ``COMPUTED``."""
    if key == WD:
        return wd_of(group, terms)
    form = terms.decay.form
    return group[key] if form is None else FORMS[form].applied == "decoupled"


def same(a: object, b: object) -> bool:
    """Tell whether two values are one object or, if plain, equal.

    Tensors are not compared: that would wait for their device.
    """
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    # Not `==` for all: what an array or a user's object answers may be anything.
    return type(a) in PLAIN and (a == b or (a != a and b != b))  # two NaNs


def alike(a: object, b: object) -> bool:
    """Tell whether two values are equal, tensors too."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return same(a, b)


@dataclass(eq=False)
class Part:
    """Parameters of one group with one decay, and the group that the class sees.

    Args:
        terms: What was decided for them.
        group: What the class sees and writes to.
        held: The parameters and their names.
    """

    terms: Terms
    group: Group
    held: Group

    @property
    def own(self) -> Group:
        """What the part holds besides its parameters and their decay."""
        return without_apart(self.group)


@dataclass(eq=False)
class Split:
    """A user's group and its parts.

    Args:
        group: The user's.
        parts: At least one, which has no parameters where the group has none.
        shown: What stood in the group when it was last looked at.
    """

    group: Group
    parts: list[Part]
    shown: Group = field(default_factory=dict)

    def settle(self) -> None:
        """Give the parts their parameters, with the decay yet to be handed down."""
        for part in self.parts:
            part.group.update(part.held)

    def adopt(self, made: Sequence[Group], keys: Collection[str]) -> None:
        """Take over the groups that the class made of the parts, and show them."""
        for part, group in zip(self.parts, made, strict=True):
            part.group = group
        first = self.parts[0].group
        self.group.update({k: v for k, v in first.items() if k not in MEMBERS})
        self.share(keys)
        self.shown = without_computed(self.group)

    def hand_down(self, keys: Collection[str]) -> None:
        """Write what has changed in the group into its parts.

        Args:
            keys: Hyperparameters; their tensors serve all parts at once. Another
                tensor is one that each part keeps for itself.
        """
        group, shown = self.group, self.shown
        # A tensor that is the same object may have been written to.
        moved = {
            key
            for key, value in group.items()
            if isinstance(value, Tensor) or value is not shown.get(key, _ABSENT)
        }
        if "lr" in moved and self._follows_rate:
            moved.add(WD)
        for key, value in group.items():
            if key not in moved:
                continue
            if key in COMPUTED:
                for part in self.parts:
                    part.group[key] = computed(group, part.terms, key)
            elif key not in MEMBERS and not same(value, shown.get(key, _ABSENT)):
                self._require_common(key)
                for part in self.parts:
                    part.group[key] = value if key in keys else apart(value)
        # A key that the user removed goes from the parts; one that is only there stays.
        for key in shown.keys() - group.keys():
            for part in self.parts:
                part.group.pop(key, None)
        self.shown = dict(group)

    @property
    def _follows_rate(self) -> bool:
        """Whether the decay of a part is computed with the rate of the group."""
        forms = [part.terms.decay.form for part in self.parts]
        return any(FORMS[form].follows_lr for form in forms if form is not None)

    def _require_common(self, key: str) -> None:
        """Check that a value is not one that the class sets for each part apart.

        A schedule that goes on from the group's would go on from none of theirs.
        """
        first, *others = [part.group.get(key, _ABSENT) for part in self.parts]
        if not all(alike(first, other) for other in others):
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
            if key in APART or value is self.group.get(key, _ABSENT):
                continue
            tensor = isinstance(value, Tensor)
            # Compared, tensors of a device would make every step wait for it.
            if tensor or all(same(value, o.get(key, _ABSENT)) for o in others):
                self.group[key] = value
        for key in self.group.keys() - first.keys():
            if key not in APART and not any(key in other for other in others):
                del self.group[key]
        self.shown = dict(self.group)

    def share(self, keys: Collection[str]) -> None:
        """Let all parts read one tensor for each hyperparameter.

        Some classes turn a rate into a tensor of each group; schedulers write into
        the one that they see.
        """
        first, *others = [part.group for part in self.parts]
        for key in keys:
            if key not in APART and isinstance(first.get(key), Tensor):
                for other in others:
                    other[key] = first[key]


def without_computed(group: Group) -> Group:
    """Take what a group has shown; the rest is yet to be handed down."""
    return {key: value for key, value in group.items() if key not in COMPUTED}


def without_apart(group: Group) -> Group:
    """Take what is neither parameters nor their decay."""
    return {key: value for key, value in group.items() if key not in APART}


def apart(value: Any) -> Any:
    """Copy a tensor that each part counts in by itself."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def members(group: Group, chosen: Sequence[int]) -> Group:
    """Take some parameters of a group, with their names if it has any."""
    return {key: [group[key][i] for i in chosen] for key in MEMBERS if key in group}


def by_terms(decisions: Sequence[Decision]) -> dict[Terms, list[int]]:
    """List the positions of a group by terms, in the order of first appearance."""
    found: dict[Terms, list[int]] = {}
    for position, decision in enumerate(decisions):
        found.setdefault(decision.terms, []).append(position)
    # An empty group still needs a part: torch's classes iterate over groups.
    return found or {FULLY: []}


def split_group(group: Group, decisions: Sequence[Decision]) -> Split:
    """Split a group that no class has seen yet; decay is still that of the group."""
    return Split(
        group,
        [
            Part(terms, {**group, **held}, held)
            for terms, chosen in by_terms(decisions).items()
            for held in [members(group, chosen)]
        ],
    )


def split_again(
    group: Group,
    decisions: Sequence[Decision],
    before: Sequence[Split],
    keys: Collection[str],
) -> Split:
    """Split a group whose parameters or decisions have changed; see :meth:`settle`.

    The part with the same decay goes on. A new one takes over what the parts that its
    parameters come from keep for themselves.

    Raises:
        ValueError: They come from parts that keep different values.
    """
    mine = [split for split in before if split.group is group]
    shown = mine[0].shown if mine else None
    parts = []
    for terms, chosen in by_terms(decisions).items():
        held = members(group, chosen)
        known = _holders(held["params"], mine or before)
        going_on = [p for split in mine for p in split.parts if p.terms == terms]
        _require_agreement([*going_on, *(part for _, part in known)], decisions)
        if known and shown is None:
            shown = known[0][0].shown
        # The same dict, which the class may know by identity.
        if going_on:
            parts.append(Part(terms, going_on[0].group, held))
        else:
            # A counter that the class keeps in a group goes where its parameters go.
            own = known[0][1].own if known else without_apart(group)
            taken = {k: v if k in keys else apart(v) for k, v in own.items()}
            parts.append(Part(terms, taken, held))
    going = {p.terms for split in mine for p in split.parts}
    if shown is not None and going.issuperset(part.terms for part in parts):
        return Split(group, parts, shown)  # the class may have written their decay
    return Split(group, parts, without_computed(shown or {}))


def _holders(
    params: Sequence[Tensor], splits: Sequence[Split]
) -> list[tuple[Split, Part]]:
    wanted = set(map(id, params))
    return [
        (split, part)
        for split in splits
        for part in split.parts
        if not wanted.isdisjoint(map(id, part.group["params"]))
    ]


def _require_agreement(parts: Sequence[Part], decisions: Sequence[Decision]) -> None:
    """Check that parts that become one keep the same of their own."""
    for part in parts[1:]:
        for key, value in parts[0].own.items():
            other = part.own.get(key, _ABSENT)
            if not alike(value, other):
                name = next((repr(d.name) for d in decisions if d.name), "a parameter")
                raise ValueError(
                    f"{name} would come together with parameters whose {key!r} differs "
                    f"by now, which this class keeps for each group. Make a new "
                    f"optimizer with the new policy or groups."
                )


StateDict = dict[str, Any]


def joined(state_dict: StateDict, splits: Sequence[Split]) -> StateDict:
    """Turn what the class saved of its parts into a state dict of the user's groups."""
    numbers = _numbers([split.group for split in splits])
    parts = [part for split in splits for part in split.parts]
    renumbered = {
        number: numbers[id(param)]
        for part, packed in zip(parts, state_dict["param_groups"], strict=True)
        for number, param in zip(packed["params"], part.group["params"], strict=True)
    }
    result = {
        **state_dict,
        "state": {renumbered.get(k, k): v for k, v in state_dict["state"].items()},
        "param_groups": [_packed(split.group, numbers) for split in splits],
    }
    kept = [_kept(split) for split in splits]
    if any(own for group in kept for _, own in group):
        result[PARTS] = [
            [{"positions": positions, **own} for positions, own in group]
            for group in kept
        ]
    return result


def _numbers(groups: Sequence[Group]) -> dict[int, int]:
    """Number parameters as torch does."""
    numbers: dict[int, int] = {}
    start = 0
    for group in groups:
        for number, param in enumerate(group["params"], start):
            numbers.setdefault(id(param), number)
        start += len(group["params"])
    return numbers


def _packed(group: Group, numbers: Mapping[int, int]) -> Group:
    return {**group, "params": [numbers[id(param)] for param in group["params"]]}


def _kept(split: Split) -> list[tuple[list[int], Group]]:
    """List what each part keeps that its group does not show."""
    return [(_positions(split, part), _own(split.group, part)) for part in split.parts]


def _positions(split: Split, part: Part) -> list[int]:
    places = {id(param): i for i, param in enumerate(split.group["params"])}
    return [places[id(param)] for param in part.group["params"]]


def _own(group: Group, part: Part) -> Group:
    own = {k: v for k, v in part.own.items() if not same(v, group.get(k, _own))}
    if not same(part.group[WD], wd_of(group, part.terms)):
        own[WD] = part.group[WD]  # the class writes it itself
    return own


def taken_apart(
    state_dict: StateDict, splits: Sequence[Split], keys: Collection[str]
) -> StateDict:
    """Turn a state dict of the user's groups into one of the class's parts.

    Args:
        state_dict: Of an optimizer whose groups were not split, or of :func:`joined`.
        splits: The groups and parts that it is for.
        keys: Hyperparameters, whose tensors serve all parts at once.

    Raises:
        ValueError: Parameters of one part were saved in parts that differ.
    """
    records = state_dict.get(PARTS) or [[] for _ in splits]
    groups = [
        _part_dict(part, saved, _positions(split, part), record, keys)
        for split, saved, record in zip(splits, state_dict["param_groups"], records)
        for part in split.parts
    ]
    rest = {key: value for key, value in state_dict.items() if key != PARTS}
    return {**rest, "param_groups": groups}


def _part_dict(
    part: Part,
    saved: Group,
    positions: Sequence[int],
    record: Sequence[Group],
    keys: Collection[str],
) -> Group:
    held = {key: [saved[key][i] for i in positions] for key in MEMBERS if key in saved}
    own = {**without_apart(saved), **_saved_own(saved, positions, record)}
    values = {key: v if key in keys else apart(v) for key, v in own.items()}
    numbers = {k: computed(saved, part.terms, k) for k in COMPUTED if k in saved}
    return {**numbers, **values, **held}


def _saved_own(
    saved: Group, positions: Sequence[int], record: Sequence[Group]
) -> Group:
    mine = [own for own in record if not set(positions).isdisjoint(own["positions"])]
    for other in mine[1:]:
        for key in {**mine[0], **other}.keys() - {"positions"}:
            pair = [own.get(key, saved.get(key)) for own in (mine[0], other)]
            if not alike(*pair):
                raise ValueError(
                    f"{key!r} differs between the parts that the loaded state dict was "
                    f"saved with, and this policy joins them. Load it with the policy "
                    f"that it was saved with."
                )
    return {k: v for own in mine[:1] for k, v in own.items() if k != "positions"}
