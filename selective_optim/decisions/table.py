"""To which tensor each decision applies, and what training began with.

A tensor finds its decision in the first of these ways, when groups were edited:

1. by its token, wherever it was moved, or after ``swap_tensors`` by object
2. by its place, if all tensors of a group are new and none contradicts (``inherit``)
3. by object or name, if it stood in another place (``recover``)
4. by its place, if an engine put other forms there (``knowledge.correspond``)

Else the policy decides anew. The table holds no tensor, or an unsharded model would
stay in memory; a token is the tensor's own and nothing else's, see ``_torch.token_of``.

The rate that some forms divide by, and the values that ``"init"`` pulls to, stay
outside of groups and state, and are recorded in the state dict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter, eq, is_
from typing import Any, NamedTuple

from torch import Tensor

from selective_optim import _torch
from selective_optim._text import shape_text
from selective_optim.decay import FULL, INIT, Decision
from selective_optim.parameters import ParameterInfo, owner_kinds
from selective_optim.policies.selectors import Policy
from selective_optim.step.parts import DecidedParam
from selective_optim.step.setting import Group, Groups, base_rate, is_moving, is_rate

Infos = Sequence[ParameterInfo]


class Row(NamedTuple):
    """What was decided for one tensor, and by which policy."""

    token: object
    owner: int  # the id of the tensor that had the token
    decision: Decision
    policy: Policy | None


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

    def rows_of(self, params: Sequence[Tensor]) -> list[Row] | None:
        """Return the rows of all these, or ``None`` if one has none."""
        rows = [row for row in map(self.row_of, params) if row is not None]
        return rows if len(rows) == len(params) else None

    def decided_by(self, params: Iterable[Tensor]) -> Policy | None:
        """Return the policy by which one of these decays otherwise than in full."""
        rows = filter(None, map(self.row_of, params))
        return next((row.policy for row in rows if row.decision.decay != FULL), None)

    def name_of(self, param: Tensor) -> str | None:
        row = self.row_of(param)
        return None if row is None else row.decision.telling_name

    def is_current(self, groups: Groups) -> bool:
        """Tell whether the groups hold what they held when last looked at."""
        lists = [group["params"] for group in groups]
        if list(map(len, lists)) != list(map(len, self.layout)):
            return False
        params, rows = list(chain(*lists)), list(chain(*self.layout))
        # Not a loop: some classes ask at every step.
        tokens, owners = map(attrgetter("token"), rows), map(attrgetter("owner"), rows)
        same_tokens = all(map(is_, map(_torch.token_of, params), tokens))
        return same_tokens and all(map(eq, map(id, params), owners))

    def append(self, index: int, rows: list[Row]) -> None:
        if index < len(self.layout):  # decided anew: another list tells those who look
            self.layout = self.layout[:index]
        self.layout.append(rows)

    def set_layout(self, layout: list[list[Row]]) -> None:
        """Remember how the groups stand, and forget tensors long gone."""
        self.layout, self._waiting_in = layout, None  # holds rows of tensors that left
        if len(self._rows) <= sum(map(len, layout)):  # no tensor has left
            return
        present = self._present()
        # Whoever rebuilds parameters again and again would fill the table otherwise.
        full = len(self._rows) > 2 * len(present) + 64
        # One that was taken out may come back, so it is not forgotten at once; unless
        # its own dict, which is the token, keeps things alive.
        gone = {k: row for k, row in self._rows.items() if not (full or row.token)}
        self._rows = {**gone, **present}

    def _present(self) -> dict[int, Row]:
        return {id(row.token): row for row in chain(*self.layout)}

    def undo_swaps(self, groups: Groups, rows_by_group: list[list[Row | None]]) -> None:
        """Give objects the rows back whose tokens ``swap_tensors`` exchanged.

        It exchanges all but the objects, by which torch knows state and groups. Nobody
        else can give a token away: a row belongs to the object that it names as owner.
        """
        by_owner = {row.owner: row for row in chain(*rows_by_group) if row is not None}
        for group, rows in zip(groups, rows_by_group):
            for place, (param, row) in enumerate(zip(group["params"], rows)):
                if row is not None and row.owner != id(param):
                    row = by_owner.get(id(param), row)
                    rows[place] = self.record(param, row.decision, row.policy)

    def inherit(self, infos: Infos, rows: Sequence[Row]) -> list[Row] | None:
        """Give new tensors the rows of their places, unless something contradicts."""
        if len(infos) != len(rows) or not all(map(may_match, infos, rows)):
            return None
        return list(map(self.take_over, infos, rows))

    def take_over(self, info: ParameterInfo, row: Row) -> Row:
        """Let what was decided for one tensor hold for another."""
        if row.decision.init is not None:
            # Of a model that was sharded, the whole one would stay in memory.
            self._rows.pop(id(row.token), None)
        return self.record(info.parameter, row.decision, row.policy)

    def rows_elsewhere(self, known_rows: Iterable[Row]) -> dict[object, Row]:
        """Look up rows that are not found by token: by object, or by name."""
        rows = list(chain(*self.layout))
        # Parameters of two models may have the same name, which then says nothing.
        counts = Counter(row.decision.name for row in rows)
        del counts[None]
        named = {r.decision.name: r for r in rows if counts[r.decision.name] == 1}
        # Objects that had a row, whose token `swap_tensors` has given away.
        seen = {id(row.token) for row in known_rows}
        return named | {row.owner: row for row in rows if id(row.token) not in seen}

    def recover(
        self, infos: Infos, rows: Sequence[Row | None], elsewhere: Mapping[object, Row]
    ) -> list[Row | None]:
        """Let tensors without a row take over one that is found by object or name."""
        recovered = list(rows)
        for place, info in enumerate(infos):
            row = elsewhere.get(id(info.parameter)) or elsewhere.get(info.name)
            if rows[place] is None and row is not None and may_match(info, row):
                recovered[place] = self.take_over(info, row)
        return recovered

    def waits(self) -> bool:
        """Tell whether what some parameters decay towards is yet to be taken."""
        if self._waiting_in is self.layout:
            return False
        waiting = any(row.decision.waits for row in chain(*self.layout))
        self._waiting_in = None if waiting else self.layout
        return waiting

    def take_inits(self, groups: Groups) -> bool:
        """Take what parameters decay towards, in groups that a step now moves."""
        taken = False
        for param, index, place, decision in self.decided(groups):
            if decision.waits and is_moving(groups[index]):
                self._renew(index, place, param, init=param.detach().clone())
                taken = True
        if taken:
            self._copy_layout()
        return taken

    def place_inits(self, groups: Groups) -> None:
        """Bring what parameters decay towards to where these lie, and shard it."""
        for param, index, place, decision in self.decided(groups):
            init, name = decision.init, decision.telling_name
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
            self._renew(index, place, param, init=init)

    def resume(
        self, groups: Groups, begins: Iterable[Mapping[str, Any]]
    ) -> tuple[list[str], list[str]]:
        """Take over what is recorded; list whose ``init`` and whose ``lr0`` is lost."""
        lost_inits, lost_rates = list[str](), list[str]()
        self._copy_layout()
        for (param, index, place, decision), begin in zip(self.decided(groups), begins):
            group, label = groups[index], decision.label(index, place)
            # torch's schedulers save where they began; OneCycleLR writes another rate.
            scheduled = None if "max_lr" in group else group.get("initial_lr")
            lr0, init = begin.get("lr0", scheduled), begin.get("init")
            if is_rate(lr0):  # also for a policy that is assigned later
                self._renew(index, place, param, lr0=lr0)
            elif decision.decay.needs_lr0 and decision.lr0 != base_rate(group):
                lost_rates.append(f"{label} (here {decision.lr0:g})")
            if decision.decay.needs_init:
                recorded = getattr(init, "shape", None) == param.shape
                self._renew(index, place, param, init=init if recorded else None)
                # Else it was saved before training began.
                if not recorded and begin.get("target") != INIT:
                    lost_inits.append(label)
        return lost_inits, lost_rates

    def decided(self, groups: Groups) -> Iterator[DecidedParam]:
        for index, (group, rows) in enumerate(zip(groups, self.layout)):
            for place, (param, row) in enumerate(zip(group["params"], rows)):
                yield DecidedParam(param, index, place, row.decision)

    def _renew(self, index: int, place: int, param: Tensor, **begin: Any) -> None:
        rows = self.layout[index]
        decision, policy = rows[place].decision._replace(**begin), rows[place].policy
        rows[place] = self.record(param, decision, policy)

    def _copy_layout(self) -> None:
        """Make another list of lists, which tells those who look that rows changed."""
        self.layout = list(map(list, self.layout))


def may_match(info: ParameterInfo, row: Row) -> bool:
    """Tell whether nothing known of a parameter contradicts what was decided on."""
    decision, kinds = row.decision, owner_kinds(info)
    # A wrapper or a parametrization makes a subclass of the module's class.
    related = not kinds or not decision.kinds or kinds[0] in decision.kinds
    same_kind = related or decision.kinds[0] in kinds
    same_name = info.name in (None, decision.name) or decision.name is None
    return same_kind and same_name and info.shape in (None, decision.shape)


def trusted_names(
    group: Group, rows: Sequence[Row | None], used: Container[str | None]
) -> Sequence[str | None]:
    """Return names but those used elsewhere, which edits by hand leave behind."""
    names = group.get("param_names")
    if names is None or len(names) != len(rows):
        return ()
    pairs = zip(names, rows)
    return [name if row or name not in used else None for name, row in pairs]
