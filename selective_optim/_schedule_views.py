"""Parameter groups as a schedule of weight decay sees them, and what it notes there."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]


@dataclass
class Record:
    """What schedulers of one optimizer's decay wrote, and whether it has stepped.

    Args:
        written: Group by group, keys such as ``"initial_lr"``.
        held: Group by group, whether its decay stays at 0.
        stepped: Whether ``optimizer.step()`` ran since the record was made.
    """

    written: list[Group] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)
    stepped: bool = False

    def views(self, groups: list[Group]) -> list[GroupView]:
        """View every group, with room for those that were added."""
        any_decays = not all(_is_zero(group["weight_decay"]) for group in groups)
        for group in groups[len(self.written) :]:
            self.written.append({})
            self.held.append(any_decays and _is_zero(group["weight_decay"]))
        return list(map(GroupView, groups, self.written, self.held))


class GroupView(MutableMapping[str, Any]):
    """A parameter group whose ``"lr"`` is its ``"weight_decay"``.

    What a scheduler writes beside the rate (``"initial_lr"``, ``"max_lr"``) is kept
    apart from the group, where a scheduler of the learning rate keeps its own.
    """

    def __init__(self, group: Group, written: Group, held: bool) -> None:
        self._group = group
        self._written = written
        self._held = held

    def __getitem__(self, key: str) -> Any:
        if key == "lr":
            return self._group["weight_decay"]
        if key in self._written or _is_rate(key):
            return self._written[key]
        return self._group[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "lr":
            self._group["weight_decay"] = 0.0 if self._held else value
        elif key in self._group and not _is_rate(key):
            raise ValueError(
                f"a schedule of weight decay sets {key!r}, which is not its own. Pass "
                f"cycle_momentum=False to the scheduler, or set it in "
                f"optimizer.param_groups."
            )
        else:
            self._written[key] = value

    def __delitem__(self, key: str) -> None:
        del self._written[key]

    def __iter__(self) -> Iterator[str]:
        own = (key for key in self._group if key != "lr" and not _is_rate(key))
        return iter(dict.fromkeys([*own, "lr", *self._written]))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _is_rate(key: str) -> bool:
    """Tell whether a scheduler keeps a learning rate of its own under this key."""
    return key.endswith("_lr")


def _is_zero(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 0


def stepping_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """Find the optimizer inside wrappers such as Accelerate's, whose hooks fire.

    Raises:
        TypeError: There is none.
        ValueError: A group of it has no weight decay.
    """
    while isinstance(
        inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer
    ):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer, not {optimizer!r:.80} "
            f"({type(optimizer).__name__}). Write WeightDecay(optimizer)."
        )
    for index, group in enumerate(optimizer.param_groups):
        if "weight_decay" not in group:
            raise ValueError(
                f"group {index} of `optimizer` ({type(optimizer).__name__}) has no "
                f"weight_decay to schedule. Use one that decays: selective_optim.AdamW."
            )
    return optimizer
