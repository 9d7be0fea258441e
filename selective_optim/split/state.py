"""State dicts of split groups: joined to the user's groups, and taken apart again.

The class saves and loads its parts; outside stand the user's groups. What a part
keeps for itself and its group does not show stands beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from selective_optim._named import MEMBERS, PARTS
from selective_optim.split.parts import (
    COMPUTED,
    WD,
    Group,
    Part,
    Split,
    alike,
    apart,
    computed,
    same,
    wd_of,
    without_apart,
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
    if not same(part.group[WD], wd_of(group, part.decay)):
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
    numbers = {k: computed(saved, part.decay, k) for k in COMPUTED if k in saved}
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
