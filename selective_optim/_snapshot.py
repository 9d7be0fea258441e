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


def _frozen(group: Group) -> Group:
    """Copy what can be edited in place: the list of parameters, betas from JSON."""
    return {k: [*v] if isinstance(v, list) else v for k, v in group.items()}


def _types_of(groups: Groups) -> list[type]:
    return [type(value) for group in groups for value in group.values()]


class Snapshot:
    """The parameters and hyperparameters of all groups.

    Python compares equal containers by identity first, all in C. Only a replaced
    tensor of exactly one element could pass for an equal one; where there are such
    parameters, or tensors among the hyperparameters, objects are compared one by
    one, and no tensor is asked for its value, which would wait for the device.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = [_frozen(group) for group in groups]
        self._types = _types_of(groups) if len(groups) <= FEW else None
        self.params = params_of(groups)
        self._values = self._values_of(groups)
        betas = flat(group.get("betas", ()) for group in groups)
        tensors = any(isinstance(value, Tensor) for value in self._values + betas)
        self._compares_in_c = not tensors and all(map(self._is_array, self.params))
        self._same = same_objects if tensors else equal
        self._scales_tensors = any(
            isinstance(group["weight_decay"], Tensor) for group in groups
        )

    @staticmethod
    def _is_array(param: Tensor) -> bool:
        known = type(param) in (*PLAIN, _torch.dtensor_class())
        return known and param.numel() != 1

    @staticmethod
    def _values_of(groups: Groups) -> list[Any]:
        names = ([name for name in group if name != "params"] for group in groups)
        return [g[name] for g, own in zip(groups, names) for name in own]

    def holds(self, groups: Groups) -> bool:
        """Tell whether nothing changed, nor is to be multiplied anew."""
        if self._compares_in_c:
            # Equal numbers of other types, as float32's, need not be the same double.
            return equal(groups, self._groups) and self._types in (
                None,
                _types_of(groups),
            )
        return (
            not self._scales_tensors
            and self.has_params(groups)
            and self._same(self._values_of(groups), self._values)
        )

    def has_params(self, groups: Groups) -> bool:
        """Tell whether the parameters are the same and stand in the same order."""
        sizes = [len(group["params"]) for group in groups]
        return sizes == [len(group["params"]) for group in self._groups] and (
            same_objects(params_of(groups), self.params)
        )
