"""To which tensor each decision applies now.

Decisions are kept by group and position and follow frameworks that replace the
tensors of a group, regroup them, or clear the groups and add them again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from selective_optim._decay import Form
from selective_optim.parameters import ParameterInfo, shape_now, shape_text


@dataclass(frozen=True)
class Decision:
    """The verdict on one parameter, and what is remembered of it."""

    name: str | None
    shape: torch.Size
    multiplier: float
    form: Form | None
    reason: str

    def label(self, group: int, position: int) -> str:
        """Name the parameter as a message should: by name if known, else by place."""
        return (
            repr(self.name) if self.name else f"parameter {position} of group {group}"
        )


def _may_be(info: ParameterInfo, decided: Decision) -> bool:
    """Tell whether nothing known of a parameter contradicts what was decided on."""
    same_name = info.name in (None, decided.name) or decided.name is None
    return same_name and info.shape in (None, decided.shape)


class Ledger:
    """Decisions by group and position, followed through changes of the tensors.

    It holds no reference to a parameter, weak or strong: a strong one would keep
    the unsharded model in memory, and ``torch.utils.swap_tensors``, which
    ``model.to`` uses on ``DTensor``s, refuses a tensor that has a weak one.
    """

    def __init__(self) -> None:
        self.groups: list[list[Decision]] = []
        self._ids: list[list[int]] = []
        self._cleared: Ledger | None = None

    def remembered(
        self, index: int, infos: Sequence[ParameterInfo]
    ) -> list[Decision] | None:
        """Return the decisions of a group that was cleared and now comes again."""
        if index == 0 and self.groups:
            self._cleared = Ledger()
            self._cleared.groups, self._cleared._ids = [*self.groups], [*self._ids]
        old = self._cleared
        if old is None or index >= len(old.groups):
            self._cleared = None
            return None
        by_id = old._by_id()
        known = [_by_identity(info.parameter, by_id) for info in infos]
        if (own := [d for d in known if d is not None]) and len(own) == len(known):
            return own
        decided = old.groups[index]
        same = len(decided) == len(infos) and all(map(_may_be, infos, decided))
        return decided if same else None

    def record(
        self, index: int, params: Sequence[Tensor], decisions: list[Decision]
    ) -> None:
        """Write down what was decided for the group at ``index``."""
        self.groups[index : index + 1] = [decisions]
        self._ids[index : index + 1] = [list(map(id, params))]

    def settle(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Take the tensors as they stand in a copy for those that were decided."""
        self._ids = [list(map(id, group["params"])) for group in param_groups]

    def follow(
        self,
        param_groups: Sequence[dict[str, Any]],
        name_of: Callable[[Tensor], str | None],
    ) -> list[list[Decision]]:
        """Return a decision for every parameter as the groups stand now.

        A parameter that the model knows by name, or that stood in a group before,
        keeps its decision wherever it stands; any other takes over the decision of
        its position.

        Args:
            param_groups: The optimizer's groups.
            name_of: Gives the name under which the model holds a tensor now.

        Raises:
            RuntimeError: A group holds other parameters than were decided for.
        """
        ids = [list(map(id, group["params"])) for group in param_groups]
        if ids != self._ids:
            by_name, by_id = self._by_name(), self._by_id()
            if not by_id.keys() >= set(chain.from_iterable(ids)):
                by_id = {}  # something is new: an id may have come again

            def known(param: Tensor) -> Decision | None:
                return by_name.get(name_of(param)) or _by_identity(param, by_id)

            lists = [group["params"] for group in param_groups]
            found = [
                self._of_group(index, params, list(map(known, params)))
                for index, params in enumerate(lists)
            ]
            self.groups, self._ids = found, ids
        return self.groups

    def _by_name(self) -> dict[str | None, Decision]:
        decisions = [decision for group in self.groups for decision in group]
        counts = Counter(decision.name for decision in decisions)
        return {d.name: d for d in decisions if d.name and counts[d.name] == 1}

    def _by_id(self) -> dict[int, Decision]:
        return {
            own: decision
            for ids, decisions in zip(self._ids, self.groups)
            for own, decision in zip(ids, decisions)
        }

    def _of_group(
        self, index: int, params: Sequence[Tensor], known: list[Decision | None]
    ) -> list[Decision]:
        own = [decision for decision in known if decision is not None]
        if len(own) == len(known):
            return own
        decided = self.groups[index] if index < len(self.groups) else []
        if len(decided) != len(params):
            new = next(p for p, decision in zip(params, known) if decision is None)
            shape = shape_text(shape_now(new))
            raise RuntimeError(
                f"group {index} holds a parameter of shape {shape} that nothing was "
                f"decided for. Add it through "
                f"optimizer.add_param_group({{'params': ...}})."
            )
        return [mine or by_place for mine, by_place in zip(known, decided)]

    def __getstate__(self) -> dict[str, Any]:
        return {"groups": self.groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.groups, self._ids, self._cleared = state["groups"], [], None


def _by_identity(param: Tensor, by_id: dict[int, Decision]) -> Decision | None:
    """Find the decision of a tensor that stood in a group before.

    An ``id`` can come again for another tensor, made after the first was freed: so
    this is asked only where no tensor is new, and shapes must agree. ``DTensor``s
    replace others.
    """
    decision = by_id.get(id(param)) if type(param) in (Tensor, Parameter) else None
    return decision if decision and decision.shape == shape_now(param) else None
