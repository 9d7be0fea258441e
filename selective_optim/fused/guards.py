"""Comparisons by which ``Plan.current_grads`` tells whether a plan can be replayed.

Identity suffices for numbers and parameters, which only someone outside can replace by
other objects. Lists, which can be edited in place, are compared with copies. Tensors,
which every backward pass may make anew, are compared by a plan itself.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor

from selective_optim import _torch
from selective_optim.step.setting import PLAIN, WD, Groups

# Keys of a group, beside "params", that kernels read; others belong to the user.
READ = frozenset(
    {
        *("lr", "weight_decay", "decoupled_weight_decay", "maximize"),
        *("betas", "eps", "amsgrad", "capturable"),
        *("momentum", "dampening", "nesterov", "differentiable", "foreach", "fused"),
    }
)
# Compared by identity: a kernel computes otherwise with -0.0 than with 0.0, and reads a
# tensor when it runs, so that the same tensor is the same argument.
NUMBERS = (int, float, tuple, Tensor)
FIXED = (*NUMBERS, str, type(None))  # which cannot be edited in place
_params_of = itemgetter("params")
_grad_of = attrgetter("grad")


def flat(lists: Iterable[Iterable[Any]]) -> list[Any]:
    joined: list[Any] = []
    deque(map(joined.extend, lists), maxlen=0)  # faster than a chain of short lists
    return joined


def same_objects(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def distinct(objects: Iterable[object]) -> int:
    return len(set(map(id, objects)))


def params_of(groups: Groups) -> list[Tensor]:
    return flat(map(_params_of, groups))


def _sizes_of(groups: Groups) -> list[int]:
    return list(map(len, map(_params_of, groups)))


def grads_of(params: Sequence[Tensor]) -> list[Any]:
    return list(map(_grad_of, params))


def equal(a: object, b: object) -> bool:
    """Compare values; what has no single truth value is different."""
    try:
        return bool(a == b)
    except (RuntimeError, ValueError, TypeError):
        return False


class _Unseen:
    """Stands for what is not compared, or by other means."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]  # equal to everything


class GroupsGuard:
    """The parameters and hyperparameters of all groups, as they were planned.

    Where the optimizer's state holds every parameter (``held``), it may be held here,
    too. Python then compares equal lists by identity first, all in C; else tokens are
    compared, at 0.04 us per parameter.
    """

    def __init__(self, groups: Groups, params: Sequence[Tensor], held: bool) -> None:
        self._sizes = _sizes_of(groups)
        self._held = held
        self._marks = self._marks_of(params)
        # Equal lists prove the same parameters, but for tensors of one element,
        # which compare equal by value.
        types = {*PLAIN, _torch.dtensor_class()}
        self.lists_tell = held and all(
            type(p) in types and p.numel() != 1 for p in self._marks
        )
        self.take(groups)

    def take(self, groups: Groups) -> None:
        """Take over new hyperparameters of the same parameters."""
        read = READ | {"params"} if self.lists_tell else READ
        # Objects that can be edited in place are compared by value.
        self._contents = [
            {
                name: _Unseen()
                if name not in read
                else (value if isinstance(value, FIXED) else copy.copy(value))
                for name, value in group.items()
            }
            for group in groups
        ]
        pairs = [pair for group in groups for pair in group.items() if pair[0] in READ]
        numbers = {
            n for n, v in pairs if isinstance(v, NUMBERS) and type(v) is not bool
        }
        # With the two that every group has, as a getter of one name returns no tuple.
        self._numbers_of = itemgetter(*numbers.intersection(*groups) | {"lr", WD})
        self._numbers = flat(map(self._numbers_of, groups))
        self._scales_tensors = any(isinstance(group[WD], Tensor) for group in groups)

    def holds(self, groups: Groups, params: Sequence[Tensor]) -> bool:
        """Tell whether nothing changed; ``params`` count where lists do not tell."""
        try:
            # First, so that no tensor is compared with another, which would wait for
            # the device; and -0.0 is not 0.0, nor float32's number the same double.
            numbers = flat(map(self._numbers_of, groups))
        except KeyError:
            return False
        return (
            same_objects(numbers, self._numbers)
            and equal([*groups], self._contents)
            and (self.lists_tell or self.holds_params(groups, params))
            and not self._scales_tensors
        )

    def holds_keys(self, groups: Groups) -> bool:
        return list(map(dict.keys, groups)) == list(map(dict.keys, self._contents))

    def holds_params(self, groups: Groups, params: Sequence[Tensor]) -> bool:
        alike = _sizes_of(groups) == self._sizes
        return alike and same_objects(self._marks_of(params), self._marks)

    def _marks_of(self, params: Sequence[Tensor]) -> Sequence[Any]:
        """List what is each parameter's own: itself where it may be held."""
        return params if self._held else list(map(_torch.token_of, params))
