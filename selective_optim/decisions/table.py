"""To which tensor each decision applies.

A decision follows its tensor wherever that is moved, copied or reordered to. The
table holds no tensor, or an unsharded model would stay in memory; it holds what is
the tensor's own and nothing else's, see ``_torch.token_of``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from itertools import chain
from operator import attrgetter, eq, is_
from typing import Any, NamedTuple

from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import FULL, Decision
from selective_optim.parameters import ParameterInfo, owner_kinds
from selective_optim.policies.selectors import Policy

Group = dict[str, Any]
Infos = Sequence[ParameterInfo]


class Row(NamedTuple):
    """What was decided for one tensor, and by which policy.

    ``owner`` is the ``id`` of the tensor that had the token.
    """

    token: object
    owner: int
    decision: Decision
    policy: Policy | None


_token_of_row = attrgetter("token")
_owner_of_row = attrgetter("owner")


class DecisionTable:
    """What was decided, by tensor, and how the groups stood when last looked at."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}
        self.layout: list[list[Row]] = []

    def record(self, param: Tensor, decision: Decision, policy: Policy | None) -> Row:
        """Write down what was decided for a tensor."""
        token = _torch.token_of(param)
        row = self._rows[id(token)] = Row(token, id(param), decision, policy)
        return row

    def row_of(self, param: Tensor) -> Row | None:
        """Return what was decided for a tensor."""
        # While a token is kept, no other object can get its id.
        return self._rows.get(id(_torch.token_of(param)))

    def rows_of(self, params: Iterable[Tensor]) -> list[Row] | None:
        """Return what was decided for tensors, if that is known of each."""
        found = list(map(self.row_of, params))
        known = [row for row in found if row is not None]
        return known if len(known) == len(found) else None

    def decided_by(self, params: Iterable[Tensor]) -> Policy | None:
        """Return the policy by which one of these decays otherwise than in full."""
        rows = filter(None, map(self.row_of, params))
        return next((row.policy for row in rows if row.decision.decay != FULL), None)

    def name_of(self, param: Tensor) -> str | None:
        """Return the name by which a parameter was decided."""
        row = self.row_of(param)
        return None if row is None else row.decision.telling_name

    def stands(self, groups: Sequence[Group]) -> bool:
        """Tell whether the groups hold what they held when last looked at."""
        lists = [group["params"] for group in groups]
        if list(map(len, lists)) != list(map(len, self.layout)):
            return False
        params, rows = list(chain.from_iterable(lists)), [*chain(*self.layout)]
        tokens = map(_torch.token_of, params)
        same_tokens = all(map(is_, tokens, map(_token_of_row, rows)))
        return same_tokens and all(map(eq, map(id, params), map(_owner_of_row, rows)))

    def append(self, index: int, rows: list[Row]) -> None:
        """Remember a group that arrived at this index, at the end."""
        if index < len(self.layout):  # decided anew: another list tells those who look
            self.layout = self.layout[:index]
        self.layout.append(rows)

    def lay_out(self, layout: list[list[Row]]) -> None:
        """Remember how the groups stand, and forget tensors long gone."""
        self.layout = layout
        # As a rule no tensor has left, and there is nothing to count.
        if len(self._rows) <= sum(map(len, layout)):
            return
        standing = self._standing()
        # Whoever rebuilds parameters again and again would fill the table otherwise.
        if len(self._rows) > 2 * len(standing) + 64:
            self._rows = standing
        elif len(self._rows) > len(standing):
            # One that was taken out may come back, so it is not forgotten at once;
            # unless its own dict, which is the token, keeps things alive.
            gone = {k: row for k, row in self._rows.items() if not row.token}
            self._rows = {**gone, **standing}

    def forget_absent(self) -> None:
        """Forget the tensors that stand in no group now."""
        self._rows = self._standing()

    def _standing(self) -> dict[int, Row]:
        return {id(row.token): row for rows in self.layout for row in rows}

    def undo_swaps(
        self, groups: Sequence[Group], found: Sequence[list[Row | None]]
    ) -> None:
        """Give objects the rows back whose tokens ``swap_tensors`` exchanged.

        It exchanges all but the objects, by which torch knows state and groups. A
        token on another object than before was swapped there, for nobody else can
        give one away; so the row of an object is the one that names it as owner.
        """
        owned = {row.owner: row for row in chain(*found) if row is not None}
        for group, rows in zip(groups, found):
            for position, (param, row) in enumerate(zip(group["params"], rows)):
                if row is not None and row.owner != id(param):
                    own = owned.get(id(param), row)
                    rows[position] = self.record(param, own.decision, own.policy)

    def inherited(self, infos: Infos, rows: Sequence[Row]) -> list[Row] | None:
        """Give new tensors the rows of their places, unless something contradicts."""
        if len(infos) != len(rows) or not all(map(may_be, infos, rows)):
            return None
        return [self.take_over(*pair) for pair in zip(infos, rows)]

    def take_over(self, info: ParameterInfo, row: Row) -> Row:
        """Let what was decided for one tensor hold for another."""
        if row.decision.init is not None:
            # Of a model that was sharded, the whole one would stay in memory.
            self._rows.pop(id(row.token), None)
        return self.record(info.parameter, row.decision, row.policy)

    def by_name(self) -> dict[object, Row]:
        """Look up rows by a name that only one of them bears."""
        rows = list(chain.from_iterable(self.layout))
        # Parameters of two models may have the same name, which then says nothing.
        bearers = Counter(row.decision.name for row in rows)
        return {
            name: row
            for row in rows
            if (name := row.decision.name) and bearers[name] == 1
        }


def may_be(info: ParameterInfo, row: Row) -> bool:
    """Tell whether nothing known of a parameter contradicts what was decided on."""
    decided, kinds = row.decision, owner_kinds(info)
    # A wrapper or a parametrization makes a subclass of the module's class.
    related = not kinds or not decided.kinds or kinds[0] in decided.kinds
    same_kind = related or decided.kinds[0] in kinds
    same_name = info.name in (None, decided.name) or decided.name is None
    return same_kind and same_name and info.shape in (None, decided.shape)


def trusted_names(
    group: Group, rows: Sequence[Row | None], borne: Container[str | None]
) -> Sequence[str | None]:
    """Return the names in a group, without those that tensors elsewhere bear.

    Whoever edits the list of parameters by hand leaves the list of names alone.
    """
    names = group.get("param_names")
    if names is None or len(names) != len(rows):
        return ()
    pairs = zip(names, rows)
    return [name if row or name not in borne else None for name, row in pairs]
