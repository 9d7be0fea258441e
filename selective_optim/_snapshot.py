"""What the parameter groups said when they were planned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from selective_optim import _torch
from selective_optim._cells import PLAIN
from selective_optim._kernels import Group

Groups = Sequence[Group]
FEW = 64  # groups of which types are compared, too, at 0.5 us each
_params_of = itemgetter("params")


def flat(lists: Iterable[Iterable[Any]]) -> list[Any]:
    """Join lists into one."""
    return list(chain.from_iterable(lists))


def same_objects(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Tell whether two sequences hold the same objects in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))


def params_of(groups: Groups) -> list[Tensor]:
    """Join the parameters of all groups."""
    return flat(map(_params_of, groups))


def equal(a: object, b: object) -> bool:
    """Compare values; a replaced tensor that has no truth value is different."""
    try:
        return bool(a == b)
    except (RuntimeError, ValueError, TypeError):
        return False


def _values_of(groups: Groups) -> list[Any]:
    return flat(map(dict.values, groups))


def _sizes_of(groups: Groups) -> list[int]:
    return [len(group["params"]) for group in groups]


def _is_array(param: Tensor) -> bool:
    known = type(param) in (*PLAIN, _torch.dtensor_class())
    return known and param.numel() != 1


def _identical(values: list[Any], planned: list[Any]) -> bool:
    pairs = zip(values, planned)
    same = (a is b or (type(a) is list and equal(a, b)) for a, b in pairs)
    return len(values) == len(planned) and all(same)


class Snapshot:
    """The parameters and hyperparameters of all groups.

    Python compares equal lists by identity first, all in C. Only a replaced tensor
    of exactly one element could pass for an equal one; where there are such
    parameters, or tensors among the hyperparameters, objects are compared one by
    one, and no tensor is asked for its value, which would wait for the device.
    """

    def __init__(self, groups: Groups) -> None:
        self.params = params_of(groups)
        self._sizes = _sizes_of(groups)
        self._arrays = all(map(_is_array, self.params))
        self.take_values(groups)

    def take_values(self, groups: Groups) -> None:
        """Take over new hyperparameters of the same parameters."""
        # Lists can be edited in place: those of parameters, and betas from JSON.
        self._values = [
            [*value] if isinstance(value, list) else value
            for value in _values_of(groups)
        ]
        self._types = list(map(type, self._values)) if len(groups) <= FEW else None
        betas = flat(group.get("betas", ()) for group in groups)
        tensors = any(isinstance(value, Tensor) for value in self._values + betas)
        self._same_values = _identical if tensors else equal
        self._values_tell_params = not tensors and self._arrays
        self._scales_tensors = any(
            isinstance(group["weight_decay"], Tensor) for group in groups
        )

    def holds(self, groups: Groups) -> bool:
        """Tell whether nothing changed, nor is to be multiplied anew."""
        values = _values_of(groups)
        return (
            self._same_values(values, self._values)
            # Equal numbers of another type, as float32's, need not be the same double.
            and (self._types is None or list(map(type, values)) == self._types)
            and (self._values_tell_params or self.has_params(groups))
            and not self._scales_tensors
        )

    def has_params(self, groups: Groups) -> bool:
        """Tell whether the parameters are the same and stand in the same places."""
        same = same_objects(params_of(groups), self.params)
        return same and _sizes_of(groups) == self._sizes
