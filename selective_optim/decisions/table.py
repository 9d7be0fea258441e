"""To which tensor each decision applies, and what training began with.

A decision follows its tensor wherever that is moved, copied or reordered to. The
table holds no tensor, or an unsharded model would stay in memory; it holds what is
the tensor's own and nothing else's, see ``_torch.token_of``.

The rate that some forms divide by, and the values that ``"init"`` pulls to, stay
outside of groups and state, and are recorded in the state dict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, eq, is_
from typing import Any, NamedTuple

from torch import Tensor

from selective_optim import _torch
from selective_optim._text import shape_text
from selective_optim.decay import FULL, INIT, Decision
from selective_optim.parameters import ParameterInfo, owner_kinds
from selective_optim.policies.selectors import Policy
from selective_optim.step.setting import Group, Groups, base_rate, is_moving, is_rate

Infos = Sequence[ParameterInfo]


class Row(NamedTuple):
    """What was decided for one tensor, and by which policy."""

    token: object
    owner: int  # the id of the tensor that had the token
    decision: Decision
    policy: Policy | None


_token_of_row = attrgetter("token")
_owner_of_row = attrgetter("owner")


class DecisionTable:
    """What was decided, by tensor, and how the groups stood when last looked at."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}
        self.layout: list[list[Row]] = []
        self._waiting_in: object = None  # a layout in which nothing is yet to be taken

    def record(self, param: Tensor, decision: Decision, policy: Policy | None) -> Row:
        token = _torch.token_of(param)
        row = self._rows[id(token)] = Row(token, id(param), decision, policy)
        return row

    def row_of(self, param: Tensor) -> Row | None:
        # While a token is kept, no other object can get its id.
        return self._rows.get(id(_torch.token_of(param)))

    def rows_of(self, params: Iterable[Tensor]) -> list[Row] | None:
        found = list(map(self.row_of, params))
        known = [row for row in found if row is not None]
        return known if len(known) == len(found) else None

    def decided_by(self, params: Iterable[Tensor]) -> Policy | None:
        """Return the policy by which one of these decays otherwise than in full."""
        rows = filter(None, map(self.row_of, params))
        return next((row.policy for row in rows if row.decision.decay != FULL), None)

    def name_of(self, param: Tensor) -> str | None:
        row = self.row_of(param)
        return None if row is None else row.decision.telling_name

    def stands(self, groups: Groups) -> bool:
        """Tell whether the groups hold what they held when last looked at."""
        lists = [group["params"] for group in groups]
        if list(map(len, lists)) != list(map(len, self.layout)):
            return False
        params, rows = list(chain.from_iterable(lists)), [*chain(*self.layout)]
        tokens = map(_torch.token_of, params)
        same_tokens = all(map(is_, tokens, map(_token_of_row, rows)))
        return same_tokens and all(map(eq, map(id, params), map(_owner_of_row, rows)))

    def append(self, index: int, rows: list[Row]) -> None:
        if index < len(self.layout):  # decided anew: another list tells those who look
            self.layout = self.layout[:index]
        self.layout.append(rows)

    def lay_out(self, layout: list[list[Row]]) -> None:
        """Remember how the groups stand, and forget tensors long gone."""
        self.layout, self._waiting_in = layout, None  # holds rows of tensors that left
        # As a rule no tensor has left, and there is nothing to count.
        if len(self._rows) <= sum(map(len, layout)):
            return
        standing = self._standing()
        # Whoever rebuilds parameters again and again would fill the table otherwise.
        full = len(self._rows) > 2 * len(standing) + 64
        # One that was taken out may come back, so it is not forgotten at once; unless
        # its own dict, which is the token, keeps things alive.
        gone = {k: row for k, row in self._rows.items() if not (full or row.token)}
        self._rows = {**gone, **standing}

    def forget_absent(self) -> None:
        self._rows = self._standing()

    def _standing(self) -> dict[int, Row]:
        return {id(row.token): row for rows in self.layout for row in rows}

    def undo_swaps(self, groups: Groups, found: Sequence[list[Row | None]]) -> None:
        """Give objects the rows back whose tokens ``swap_tensors`` exchanged.

        It exchanges all but the objects, by which torch knows state and groups. Nobody
        else can give a token away: a row belongs to the object that it names as owner.
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

    def others(self, known: Iterable[Row]) -> dict[object, Row]:
        """Look up rows that are not found by token: by object, or by name."""
        rows = list(chain.from_iterable(self.layout))
        # Parameters of two models may have the same name, which then says nothing.
        bearers = Counter(row.decision.name for row in rows)
        named = {
            name: row
            for row in rows
            if (name := row.decision.name) and bearers[name] == 1
        }
        # Objects that had a row, whose token `swap_tensors` has given away.
        seen = {id(row.token) for row in known}
        return named | {row.owner: row for row in rows if id(row.token) not in seen}

    def found_again(
        self,
        infos: Infos,
        rows: Sequence[Row | None],
        before: Sequence[Row],
        others: Mapping[object, Row],
    ) -> list[Row | None]:
        """Let tensors without a row take over those of their places, or of others."""
        if not any(rows) and (inherited := self.inherited(infos, before)) is not None:
            return [*inherited]
        found = list(rows)
        for place, info in enumerate(infos):
            known = others.get(id(info.parameter)) or others.get(info.name)
            if rows[place] is None and known is not None and may_be(info, known):
                found[place] = self.take_over(info, known)
        return found

    # What training began with.

    def waits(self) -> bool:
        """Tell whether what some parameters decay towards is yet to be taken."""
        if self._waiting_in is self.layout:
            return False
        waiting = any(row.decision.waits for rows in self.layout for row in rows)
        self._waiting_in = None if waiting else self.layout
        return waiting

    def begin(self, groups: Groups) -> bool:
        """Take what parameters decay towards, in groups that a step now moves."""
        taken = False
        for group, rows in zip(groups, self.layout):
            for place, param in enumerate(group["params"] if is_moving(group) else ()):
                if rows[place].decision.waits:
                    self._renew(param, rows, place, init=param.detach().clone())
                    taken = True
        if taken:
            self._tell()
        return taken

    def fit(self, groups: Groups) -> None:
        """Bring what parameters decay towards to where these lie, and shard it."""
        for group, rows in zip(groups, self.layout):
            for place, (param, row) in enumerate(zip(group["params"], rows)):
                init, name = row.decision.init, row.decision.telling_name
                if init is None or _torch.lies_as(init, param):
                    continue
                if init.shape != param.shape:
                    raise ValueError(
                        f"{repr(name) if name else 'a parameter'} decays towards what "
                        f"it was in shape {shape_text(init.shape)}, and has shape "
                        f"{shape_text(param.shape)} now. Assign optimizer.wd_policy to "
                        f"decide anew."
                    )
                init = _torch.placed_as(init.to(param.device, param.dtype), param)
                self._renew(param, rows, place, init=init)

    def resume(
        self, groups: Groups, begins: Iterable[Mapping[str, Any]]
    ) -> tuple[list[str], list[str]]:
        """Take over what is recorded; list whose ``init`` and whose ``lr0`` is lost."""
        inits, rates, told = list[str](), list[str](), iter(begins)
        self._tell()
        for index, (group, rows) in enumerate(zip(groups, self.layout)):
            # torch's schedulers save where they began; OneCycleLR writes another rate.
            scheduled = None if "max_lr" in group else group.get("initial_lr")
            triples = zip(group["params"], rows, told)
            for place, (param, row, begin) in enumerate(triples):
                decay, label = row.decision.decay, row.decision.label(index, place)
                lr0, init = begin.get("lr0", scheduled), begin.get("init")
                if is_rate(lr0):  # also for a policy that is assigned later
                    self._renew(param, rows, place, lr0=lr0)
                elif decay.needs_lr0 and row.decision.lr0 != base_rate(group):
                    rates.append(f"{label} (here {row.decision.lr0:g})")
                if decay.needs_init:
                    recorded = getattr(init, "shape", None) == param.shape
                    self._renew(param, rows, place, init=init if recorded else None)
                    # Else it was saved before training began.
                    if not recorded and begin.get("target") != INIT:
                        inits.append(label)
        return inits, rates

    def _renew(self, param: Tensor, rows: list[Row], place: int, **begin: Any) -> None:
        decision, policy = rows[place].decision._replace(**begin), rows[place].policy
        rows[place] = self.record(param, decision, policy)

    def _tell(self) -> None:
        """Make another list of lists, which tells those who look that rows changed."""
        self.layout = list(map(list, self.layout))


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
    """Return names but those borne elsewhere, which edits by hand leave behind."""
    names = group.get("param_names")
    if names is None or len(names) != len(rows):
        return ()
    pairs = zip(names, rows)
    return [name if row or name not in borne else None for name, row in pairs]
