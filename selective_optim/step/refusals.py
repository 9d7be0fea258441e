"""What cannot be served by splitting groups inside a step: the reason, and the way out.

Each check raises before anything has changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from selective_optim._text import received
from selective_optim.decay import is_zero
from selective_optim.step.lasting_parts import Split, flag_of
from selective_optim.step.setting import WD, Group

# Arguments by which a class takes something else than parameters.
INNER = ("optimizer", "base_optimizer")
OURS = ("wd_policy", "model")
WAY_OUT = "Split the groups by hand: {}(selective_optim.param_groups(model, ...))."


def _way_out(optimizer: object) -> str:
    return WAY_OUT.format(type(optimizer).__name__)


def require_class(cls: object) -> None:
    """Check that this is a class of optimizers that are made from parameters."""
    if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer):
        raise TypeError(
            f"`optimizer_class` must be a subclass of torch.optim.Optimizer, not "
            f"{received(cls)}. Write selective(torch.optim.NAdam)(model.parameters())."
        )
    names = list(inspect.signature(cls).parameters)
    if inner := [name for name in names if name in INNER]:
        raise TypeError(
            f"{cls.__name__} takes {inner[0]!r}, another optimizer, and steps that. "
            f"Make that one selective: {cls.__name__}(selective(...)(...))."
        )
    if taken := [name for name in names if name in OURS]:
        raise TypeError(
            f"{cls.__name__} takes {taken[0]!r} itself and makes groups of its own, "
            f"where nothing can be split. Use a class that takes parameters."
        )


def require_parts(optimizer: Any, splits: Sequence[Split]) -> None:
    """Check that the class made its groups of the parts that it was given."""
    made = [list(map(id, group["params"])) for group in optimizer.param_groups]
    given = [
        list(map(id, part.group["params"])) for split in splits for part in split.parts
    ]
    name = type(optimizer).__name__
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


def require_no_inner_optimizer(optimizer: Any) -> None:
    """Check that the class hands its step to no other, which sees groups unsplit."""
    for key, value in vars(optimizer).items():
        if isinstance(value, torch.optim.Optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} keeps another optimizer in {key!r}, which "
                f"steps groups of its own. {_way_out(optimizer)}"
            )


def require_forms(optimizer: Any, split: Split) -> None:
    """Check that it is known what each part is to be decayed like."""
    known = flag_of(split.group) is not None or split.form is not None
    for part in split.parts:
        decay = part.decay_key.decay
        if is_zero(decay.multiplier) or not (decay.form or decay.target):
            continue
        name = type(optimizer).__name__
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
    manager = getattr(optimizer, "mng", None)
    if getattr(optimizer, "initialized", True) or len(groups) == len(
        optimizer.param_groups
    ):
        return
    if getattr(manager, "index2config", None):
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
