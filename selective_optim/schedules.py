"""Schedules of weight decay, by the learning rate schedulers of torch.

They work on any ``torch.optim`` optimizer. Decoupled decay is multiplied by the rate,
so a schedule of the rate changes it too.
"""

from __future__ import annotations

import weakref
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from selective_optim import _torch
from selective_optim._text import held_optimizers, is_optimizer, require_decay
from selective_optim.decay import FORMS, is_zero, none_decays

Group = dict[str, Any]
Optimizer = torch.optim.Optimizer


@dataclass
class Record:
    """What schedulers of one optimizer's decay wrote, and whether it has stepped."""

    # By group: what they wrote, as "initial_lr", and whether it stays at 0.
    entries: list[tuple[Group, bool]] = field(default_factory=list)
    stepped: bool = False

    def views(self, groups: list[Group]) -> list[GroupView]:
        # If nothing decays yet, this is a warm-up of decay from 0.
        any_decays = not none_decays(groups)
        for group in groups[len(self.entries) :]:
            self.entries.append(({}, any_decays and is_zero(group["weight_decay"])))
        return [GroupView(group, *entry) for group, entry in zip(groups, self.entries)]

    def __call__(self, *_: object) -> None:
        self.stepped = True


class GroupView(ChainMap[str, Any]):
    """A parameter group whose ``"lr"`` is its ``"weight_decay"``."""

    # "initial_lr" and "max_lr" are kept apart: in the group are those of the rate.
    def __init__(self, group: Group, written: Group, stays_zero: bool) -> None:
        # A scheduler that finds an "initial_lr" goes on from it, and would go on from
        # that of the learning rate (torch/optim/lr_scheduler.py, 2.7 to 2.15).
        readable = {key: group[key] for key in group if not key.endswith("_lr")}
        super().__init__(written, readable)
        self._group, self._readable, self._stays_zero = group, readable, stays_zero

    def __getitem__(self, key: str) -> Any:
        return self._group["weight_decay"] if key == "lr" else super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "lr":
            self._group["weight_decay"] = 0.0 if self._stays_zero else value
        elif key in self._readable:
            raise ValueError(
                f"a schedule of weight decay sets {key!r}, which is not its own. Pass "
                f"cycle_momentum=False to the scheduler, or set it in "
                f"optimizer.param_groups."
            )
        else:
            super().__setitem__(key, value)


def stepping_optimizer(optimizer: object) -> Optimizer:
    """Find the optimizer inside wrappers such as Accelerate's, whose hooks fire."""
    if not is_optimizer(optimizer) and len(held := held_optimizers(optimizer)) == 1:
        optimizer = held[0]
    if not is_optimizer(optimizer):
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer, not {optimizer!r:.80} "
            f"({type(optimizer).__name__}). Write WeightDecay(optimizer)."
        )
    require_decay(optimizer, "schedule")
    return optimizer


# Attributes of the optimizer: its groups and state keep torch's keys alone.
RECORD = "_decay_schedule"
TIE = "_decay_tie"


class WeightDecay(torch.optim.Optimizer):
    """A view of an optimizer in which a group's ``"lr"`` is its ``"weight_decay"``.

    Any class of ``torch.optim.lr_scheduler`` over this view changes the weight decay.
    Another scheduler may change the learning rate. Exempt parameters stay exempt. A
    group with weight_decay=0 beside groups that decay stays at 0.

    Step the scheduler after the optimizer, and save its state dict beside that of the
    optimizer. Views of one optimizer are equal to each other and to the optimizer.

    Args:
        optimizer: Any optimizer whose groups have a ``"weight_decay"``.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``.
        ValueError: It has no weight decay, or ``proportional_to_lr`` sets it.

    Example:
        DINO raises the decay from 0.04 to 0.4 along a cosine:

        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.04)
        >>> schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        ...     WeightDecay(optimizer), T_max=2, eta_min=0.4
        ... )
        >>> for _ in range(2):
        ...     optimizer.step()
        ...     schedule.step()
        ...     print(round(optimizer.param_groups[0]["weight_decay"], 3))
        0.22
        0.4
    """

    optimizer: Optimizer
    record: Record

    def __init__(self, optimizer: Optimizer) -> None:
        optimizer = stepping_optimizer(optimizer)
        _refuse_tie(optimizer)
        record = vars(optimizer).get(RECORD) or Record()
        self.__setstate__({"optimizer": optimizer, "record": record})

    def __setstate__(self, state: Group) -> None:
        # No super(): everything that it makes, the optimizer has.
        vars(self).update(state)
        if RECORD not in vars(self.optimizer):
            # torch copies neither attributes nor hooks of an optimizer (__getstate__,
            # 2.7 to 2.15): both are here or neither.
            self.optimizer.register_step_post_hook(self.record)
        setattr(self.optimizer, RECORD, self.record)
        self.record.views(self.optimizer.param_groups)

    def __getstate__(self) -> Group:
        return vars(self)

    @property
    def param_groups(self) -> list[GroupView]:  # type: ignore[override]  # an attribute in torch
        return self.record.views(self.optimizer.param_groups)

    @property
    def defaults(self) -> Group:  # type: ignore[override]  # an attribute in torch
        defaults = self.optimizer.defaults
        return {**defaults, "lr": defaults["weight_decay"]}

    @_torch.not_to_be_patched
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: Group) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> Group:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Group) -> None:
        self.optimizer.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        if name in ("optimizer", "record"):  # asked for while a copy is being made
            raise AttributeError(name)
        if name == _torch.STEP_NOTE:  # a scheduler that steps first warns
            return self.record.stepped
        return getattr(self.optimizer, name)

    # Frameworks look for a scheduler's optimizer among those that they train
    # (Lightning, Accelerate), and SequentialLR compares those of its schedulers.
    def __eq__(self, other: object) -> bool:
        if isinstance(other, WeightDecay):
            other = other.optimizer
        return self.optimizer is other

    def __hash__(self) -> int:
        return hash(self.optimizer)

    def __repr__(self) -> str:
        return f"WeightDecay({self.optimizer!r})"


@dataclass(eq=False)
class Tie:
    """A hook that sets the decay of every group in the proportion of its rate."""

    bases: list[tuple[float, float]] = field(default_factory=list)  # decay, rate
    policy: object = None  # who decided when that was checked

    def __call__(self, optimizer: Optimizer, *_: object) -> None:
        groups, policy = optimizer.param_groups, getattr(optimizer, "wd_policy", None)
        if len(self.bases) < len(groups) or policy is not self.policy:
            _refuse_corrected(optimizer)
            self.policy = policy
        for index in range(len(self.bases), len(groups)):
            lr = float(groups[index]["lr"])
            if lr == 0:
                raise ValueError(
                    f"`lr` of group {index} is 0, so no decay is in proportion to it. "
                    f"Make the optimizer with its base rate, for example lr=3e-4."
                )
            self.bases.append((float(groups[index]["weight_decay"]), lr))
        for group, (base_wd, base_lr) in zip(groups, self.bases):
            # The quotient first: where lr is the base, it is 1 and wd exactly the base.
            group["weight_decay"] = base_wd * (float(group["lr"]) / base_lr)


def _refuse_tie(optimizer: Optimizer) -> None:
    # The hook alone keeps its Tie alive, so removing the hook ends the refusal.
    tie = vars(optimizer).get(TIE)
    if tie is not None and tie() is not None:
        raise ValueError(
            "proportional_to_lr already sets the weight_decay of this optimizer. "
            "End it first: handle = proportional_to_lr(optimizer); handle.remove()."
        )


def _refuse_corrected(optimizer: Optimizer) -> None:
    report = getattr(optimizer, "decay_report", None)
    for row in report().rows if report else ():
        follows = row.fixed is None and FORMS[row.form or "l2"].follows_lr
        if follows and row.weight_decay:
            name = repr(row.name) if row.name else f"a parameter of group {row.group}"
            raise ValueError(
                f"{name} decays in form {row.form!r}, which follows the rate already. "
                f"Leave out proportional_to_lr(optimizer), or that form."
            )


def proportional_to_lr(optimizer: Optimizer) -> RemovableHandle:
    """Set weight decay in proportion to the learning rate before every step.

    For each group::

        weight_decay = base_weight_decay * (lr / base_lr)

    The base values are those of the group now. Decoupled decay is then ``lr ** 2``
    times a constant, as in AdamC: weights before a norm keep their size.

    Args:
        optimizer: Any optimizer whose groups have a ``"weight_decay"``. The base
            values of a group that you add later are those at its first step.

    Returns:
        A handle whose ``remove()`` ends it. State dicts do not save it. When you
        resume, call this function again before you load a state dict.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``.
        ValueError: It has no weight decay, or its rate is 0.
        ValueError: A scheduler has changed its rate, or another one sets its decay.
        ValueError: A parameter has the form ``"corrected"``, which does the same.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.2)
        >>> handle = proportional_to_lr(optimizer)
        >>> optimizer.param_groups[0]["lr"] = 0.05
        >>> optimizer.step()
        >>> optimizer.param_groups[0]["weight_decay"]
        0.1

    Source:
        Defazio 2025, "Why Gradients Rapidly Increase Near the End of Training".
    """
    optimizer = stepping_optimizer(optimizer)
    _refuse_tie(optimizer)
    if RECORD in vars(optimizer):
        raise ValueError(
            "a schedule on WeightDecay(optimizer) already sets the weight_decay of "
            "this optimizer. Leave out that schedule, or proportional_to_lr(optimizer)."
        )
    for index, group in enumerate(optimizer.param_groups):
        for key in ("max_lr", "initial_lr"):
            if group.get(key, group["lr"]) != group["lr"]:
                raise ValueError(
                    f"`lr` of group {index} is {group['lr']}, moved by a scheduler "
                    f"from its {key}, {group[key]}. Call proportional_to_lr(optimizer) "
                    f"before making the scheduler."
                )
    tie = Tie()
    tie(optimizer)
    setattr(optimizer, TIE, weakref.ref(tie))
    return optimizer.register_step_pre_hook(tie)
