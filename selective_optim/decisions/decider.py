"""Decides who decays: at construction, for groups added, and when groups change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from itertools import chain, repeat
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from selective_optim._text import require_numbers
from selective_optim.decay import FULL, Decision
from selective_optim.decisions import knowledge
from selective_optim.decisions.knowledge import Pending
from selective_optim.decisions.table import DecisionTable, Infos, Row, trusted_names
from selective_optim.decisions.warnings import (
    warn_if_nothing_decays,
    warn_if_unsteady,
    warn_of_misspelt,
)
from selective_optim.parameters import ModelIndex, as_modules
from selective_optim.policies.decide import decide, require_matches
from selective_optim.policies.selectors import Policy, Selector
from selective_optim.step.setting import Group, Groups, base_rate, is_rate

Policies = Iterable[Policy | None]
Decided = list[list[Decision]]
_policy_of = attrgetter("policy")
# What a group may bring and does not keep, and what is typed in place of writing it.
_INSTEAD = {
    "wd_policy": "optimizer.wd_policy = ... to decide anew",
    "model": "optimizer.add_param_group(dict(params=..., model=model)) for new "
    "parameters",
}
WRITTEN = frozenset(_INSTEAD)  # ZeroRedundancyOptimizer writes them back


def own_keys(group: Group) -> frozenset[str]:
    """Tell which of our keys a group brings; a text as ``model`` is the user's tag."""
    tag = {"model"} if isinstance(group.get("model"), str) else {}
    return WRITTEN & group.keys() - tag


class Block(NamedTuple):
    """What ``deciding_for`` gives the optimizers that are made inside it."""

    policy: Policy | None
    model: Any  # or a function that returns it
    made: list[bool]  # one for each

    def modules(self) -> list[nn.Module]:
        is_function = callable(self.model) and not isinstance(self.model, nn.Module)
        return as_modules(self.model() if is_function else self.model)


# Not a global: two threads, or two async tasks, may build two models.
current_block: ContextVar[Block | None] = ContextVar("selective_optim", default=None)


class Decider(DecisionTable):
    """Decides once for every tensor: by ``policy``, unless its group brings another.

    A constructor calls ``collect``, for each group ``unpack`` and ``add_group``, and
    ``decide_pending`` for all. A group that is added later is decided at once. After
    edits of the groups ``updated_rows`` brings the table up to date.
    """

    def __init__(
        self,
        as_policy: Callable[[object], Policy],
        policy: Policy | None,
        index: ModelIndex,
        parent: Decider | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.index, self.as_policy = policy, index, as_policy
        self._pending: list[Pending] | None = None
        self._cleared: list[list[Row]] = []
        # That of a `Routed`, if this one is of a route: it decides and warns for all.
        self.parent = parent

    @classmethod
    def for_constructor(
        cls, as_policy: Callable[[object], Policy], wd_policy: object, model: object
    ) -> Decider:
        """Make the decider of a constructor, unless it is given that of a route."""
        if isinstance(wd_policy, Decider):
            return wd_policy
        policy = None if wd_policy is None else as_policy(wd_policy)
        index = ModelIndex(model)
        if (block := current_block.get()) is not None:
            block.made.append(True)
            policy = policy or block.policy
            # Without a policy nothing of a model needs to be known.
            if model is None and policy is not None:
                modules = block.modules()
                # What is made inside may be a copy of tensors, which shapes decide.
                index = ModelIndex(None if policy.needs == {"shapes"} else modules)
                index.add(modules)
        return cls(as_policy, policy, index)

    def _read_policy(self, value: object) -> Policy | None:
        return None if value is None else self.as_policy(value)

    def collect(self, params: Any) -> Any:
        """Let groups wait until all are there; return what torch takes instead."""
        self._pending = []
        return self.index.learn(params)

    def unpack(self, group: Any, keys: Iterable[str]) -> tuple[Policy | None, Any]:
        """Return a group's policy, which the caller's dict keeps, and torch's group."""
        if not isinstance(group, dict) or "params" not in group:
            return self.policy, group  # torch says what is wrong
        if self.parent is None:  # else that has warned
            warn_of_misspelt(group, [*keys, "params", "param_names", *_INSTEAD])
        require_numbers(group, " of a group")
        ours = own_keys(group)
        if "model" in ours:
            self.index.add(as_modules(group["model"]))
        group["params"] = self.index.learn(group["params"])
        if not ours:
            return self.policy, group
        if not isinstance(group["params"], (Tensor, set)):  # which torch refuses
            # torch fills a copy; a generator in the caller's dict would be used up.
            group["params"] = list(group["params"])
        policy = group.get("wd_policy", self.policy)
        torchs = {key: value for key, value in group.items() if key not in ours}
        return self._read_policy(policy), torchs

    def add_group(self, groups: Groups, policy: Policy | None, anew: bool) -> bool:
        """Decide for the last group, but not yet in a constructor; tell if decided."""
        index, group = len(groups) - 1, groups[-1]
        names, lr0s = group.get("param_names", ()), repeat(base_rate(group))
        coming = Pending(index, group["params"], names, policy, lr0s)
        # A constructor adds its groups one by one; a glob may match in the last alone.
        if self._pending is not None:
            self._pending.append(coming)
            return False
        try:
            # With a policy or model of its own it is decided anew, whatever was before.
            if anew or not self._decided_before(coming):
                self.decide_for([coming], [policy] if anew else [])
        finally:
            self.index.release()
        return True

    def decide_pending(self) -> None:
        if pending := self.take_pending():
            self.decide_for(pending, [self.policy, *map(_policy_of, pending)])

    def take_pending(self) -> list[Pending]:
        pending, self._pending = self._pending or [], None
        return pending

    def decide_for(
        self, pending: Sequence[Pending], strict: Policies, strangers: bool = False
    ) -> None:
        """Decide for groups that come in together, or raise with nothing recorded."""
        if self._taken_from_parent(pending):
            return
        decided = self.ask(pending, strict, strangers, twice=True)
        for coming, decisions in zip(pending, decided):
            pairs = zip(coming.params, decisions, strict=True)
            rows = [self.record(p, decision, coming.policy) for p, decision in pairs]
            self.append(coming.group, rows)

    def ask(
        self,
        pending: Sequence[Pending],
        strict: Policies,
        strangers: bool = False,
        twice: bool = False,
    ) -> Decided:
        """Ask policies, record nothing; globs of ``strict`` ones must match.

        With ``strangers`` parameters may be in no module: the model may be gone by now.
        With ``twice`` it warns of functions that answer otherwise at a second call.
        """
        infos = knowledge.describe(self.index, pending)
        policies = list(map(_policy_of, pending))
        # First: of a stranger no module is known either, and a message about that
        # would lead astray.
        if not strangers:
            knowledge.require_members(self.index, infos, policies)
        for policy in {id(p): p for p in strict if p is not None}.values():
            asked = list(chain(*[i for i, p in zip(infos, policies) if p is policy]))
            require_matches(policy, asked, self._matches, self.index.everyone)
        bound: dict[int, Policy | None] = {}
        decided: Decided = []
        for by, group, coming in zip(policies, infos, pending):
            if id(by) not in bound:
                bound[id(by)] = self._bind(by)
            decided.append(_decide(bound[id(by)], group, coming.lr0s))
        if twice:
            warn_if_unsteady(map(bound.get, map(id, policies)), infos, decided)
        return decided

    def _bind(self, policy: Policy | None) -> Policy | None:
        return policy and policy.bind(self.index.modules())

    def _matches(self, selector: Selector) -> bool:
        return self.index.remember(
            ("matches", selector),
            lambda: any(map(selector.matches, self.index.everyone())),
        )

    def _taken_from_parent(self, pending: Sequence[Pending]) -> bool:
        """Take over what was decided with the parameters of other optimizers."""
        if self.parent is None:
            return False
        rows_by_group = [self.parent.rows_of(coming.params) for coming in pending]
        if None in rows_by_group:
            return False
        for coming, rows in zip(pending, rows_by_group):
            pairs = zip(coming.params, rows or ())
            own_rows = [self.record(p, row.decision, row.policy) for p, row in pairs]
            self.append(coming.group, own_rows)
        return True

    def _decided_before(self, coming: Pending) -> bool:
        """Take over what was decided with other optimizers, or for a cleared group."""
        if self._taken_from_parent([coming]):
            return True
        index = coming.group
        # A first group while rows are known: frameworks clear the groups to shard the
        # model, and add them again.
        if index == 0 and self.layout:
            self._cleared, self.layout = self.layout, []
        if index >= len(self._cleared):
            self._cleared = []
            return False
        rows = self.rows_of(coming.params)
        if rows is None:
            (infos,) = knowledge.describe(self.index, [coming])
            rows = self.inherit(infos, self._cleared[index])
        if rows is not None:
            self.append(index, rows)
            if index + 1 == len(self._cleared):
                self._cleared = []
        return rows is not None

    def updated_rows(self, groups: Groups) -> list[list[Row]]:
        """Return what was decided for every parameter, on the spot where it is new."""
        for index, group in enumerate(groups):
            self.refuse_written(group, index)
        if not self.is_current(groups):
            self._follow(groups)
        return self.layout

    def decisions_to_read(self, groups: Groups) -> Decided:
        """Return decisions for a reader; the next step tells what cannot be decided."""
        with suppress(ValueError):
            return [
                [row.decision for row in rows] for rows in self.updated_rows(groups)
            ]

        def read(index: int, place: int, param: Tensor) -> Decision:
            if row := self.row_of(param):
                return row.decision
            with suppress(IndexError):  # a placeholder, as frameworks that shard put
                return self.layout[index][place].decision
            return Decision(FULL, "not decided yet", None, param.shape, ())

        return [
            [read(index, *pair) for pair in enumerate(group["params"])]
            for index, group in enumerate(groups)
        ]

    def _follow(self, groups: Groups) -> None:
        """Give every parameter its own row, that of its name or place, or a new one.

        Places count where all tensors of a group are new. For a new row that policy is
        asked that the tensors around have. If it cannot decide, the layout stays.
        """
        rows_by_group = [[self.row_of(p) for p in group["params"]] for group in groups]
        self.undo_swaps(groups, rows_by_group)
        known_rows = [row for row in chain(*rows_by_group) if row is not None]
        # A name counts only if no known tensor has it.
        used = {row.decision.name for row in known_rows}
        incomplete = [
            Pending(i, list(group["params"]), trusted_names(group, rows, used), None)
            for i, (group, rows) in enumerate(zip(groups, rows_by_group))
            if None in rows
        ]
        elsewhere = self.rows_elsewhere(known_rows) if incomplete else {}
        layout = [[row for row in rows if row] for rows in rows_by_group]
        described = knowledge.describe(self.index, incomplete)
        for coming, infos in zip(incomplete, described):
            i = coming.group
            rows, lr0 = rows_by_group[i], base_rate(groups[i])
            # After groups were added or removed by hand, positions say nothing.
            before = self.layout[i] if len(groups) == len(self.layout) else []
            layout[i] = self._complete(infos, rows, before, elsewhere, lr0)
        self.set_layout(layout)

    def _complete(
        self,
        infos: Infos,
        rows: Sequence[Row | None],
        before: Sequence[Row],
        elsewhere: Mapping[object, Row],
        lr0: float | None,
    ) -> list[Row]:
        """Give every parameter of a group a row, where ``None`` stands for none yet."""
        inherited = None if any(rows) else self.inherit(infos, before)
        if inherited is not None:
            return inherited
        policy = self.policy
        # What is new in a group begins as the others in it did.
        if neighbor := next(filter(None, (*rows, *before)), None):
            policy, lr0 = neighbor.policy, neighbor.decision.lr0 or lr0
        completed = self.recover(infos, rows, elsewhere)
        if not any(completed):
            old = [row.decision for row in before]
            if knowledge.correspond(infos, old, policy):
                return list(map(self.take_over, infos, before))
            knowledge.refuse_flattened(infos, old, policy)
        places = [i for i, row in enumerate(completed) if row is None]
        new = [infos[i] for i in places]
        bound = self._bind(policy) if new else None
        for i, decision in zip(places, _decide(bound, new, repeat(lr0), places)):
            completed[i] = self.record(infos[i].parameter, decision, policy)
        return [row for row in completed if row is not None]

    def refuse_written(self, group: Group, index: int | None = None) -> None:
        """Raise ValueError if a policy or module stands where nothing reads it.

        A group without an index is ``optimizer.defaults``, by which nothing is decided.
        """
        for key in WRITTEN & group.keys():
            if self._in_force(key, group[key], index):
                continue
            place, path = f"group {index}", f"param_groups[{index}]"
            if index is None:
                place, path = "optimizer.defaults", "defaults"
            raise ValueError(
                f"a `{key}` was written into {place}, where nothing reads it. Type "
                f"{_INSTEAD[key]}, and del optimizer.{path}[{key!r}]."
            )

    def _in_force(self, key: str, written: object, index: int | None) -> bool:
        """Tell whether a group was decided by what now stands in it."""
        if key == "model":  # a user's own tag may be of any other kind
            items = written if isinstance(written, (list, tuple)) else [written]
            modules = {id(item) for item in items if isinstance(item, nn.Module)}
            asked = [] if index is None else self.index.modules()
            return modules <= set(map(id, asked))
        if index is None or index >= len(self.layout):
            return False
        with suppress(TypeError, ValueError):
            policy = self._read_policy(written)
            return all(row.policy == policy for row in self.layout[index])
        return False

    def policies(self) -> list[str | None]:
        firsts = [rows[0].policy if rows else None for rows in self.layout]
        return [None if policy is None else repr(policy) for policy in firsts]

    def assign(self, wd_policy: object, groups: Groups) -> None:
        """Decide anew for every parameter, or raise with nothing changed."""
        policy, pending = self._read_policy(wd_policy), []
        for index, group in enumerate(groups):
            rows = [self.row_of(param) for param in group["params"]]
            # The model may be deleted by now, but its names are still known.
            names = [row and row.decision.name for row in rows]
            lr0s = [row.decision.lr0 if row else base_rate(group) for row in rows]
            pending.append(Pending(index, list(group["params"]), names, policy, lr0s))
        self.decide_for(pending, [policy], strangers=True)
        self._rows = self._present()  # others are decided anew when they come back
        self.policy = policy
        self.warn_if_nothing_decays(groups)

    def decisions_to_step(self, groups: Groups) -> Decided:
        """Return the decisions, of which ``init`` lies as its parameter does now."""
        self.updated_rows(groups)
        self.place_inits(groups)
        return [[row.decision for row in rows] for rows in self.layout]

    def begin_training(self, groups: Groups) -> bool:
        if not self.waits():
            return False
        self.updated_rows(groups)
        return self.take_inits(groups)

    def snapshot(self, groups: Groups) -> dict[str, Any]:
        """Write down what a copy must know: decisions by group and position."""
        with suppress(ValueError):  # what cannot be decided is told at the next step
            self.updated_rows(groups)
        rows = [[self.row_of(p) for p in group["params"]] for group in groups]
        plain = [[r and (r.decision, r.policy) for r in group] for group in rows]
        return {"plain": (self.as_policy, self.policy, self.index), "rows": plain}

    @classmethod
    def restored(cls, snapshot: Mapping[str, Any], groups: Groups) -> Decider:
        """Make the decider of a copy, whose tensors stand where the originals stood."""
        decider, layout = cls(*snapshot["plain"]), []
        for group, plain in zip(groups, snapshot["rows"]):
            pairs = zip(group["params"], plain)
            layout.append([decider.record(p, *row) for p, row in pairs if row])
        decider.set_layout(layout)
        return decider

    def gather(self, part: Decider, groups: Groups) -> None:
        """Take over what one of the optimizers has decided or inherited by itself."""
        for group, rows in zip(groups, part.updated_rows(groups)):
            for param, row in zip(group["params"], rows):
                self.record(param, row.decision, row.policy)

    def warn_if_nothing_decays(self, groups: Groups) -> None:
        if self.parent is None:
            warn_if_nothing_decays(groups, self.layout, self._decays_elsewhere)

    def _decays_elsewhere(self, policy: Policy) -> bool:
        """Ask about the whole model, of which other ranks may hold parts."""

        def ask() -> bool:
            with suppress(TypeError, ValueError):  # it cannot decide for some of these
                decided = decide(self._bind(policy), self.index.everyone())
                return any(decision.decay.multiplier for decision in decided)
            return False

        return self.index.remember(("decays", policy), ask)


def _decide(
    policy: Policy | None,
    infos: Infos,
    lr0s: Iterable[float | None],
    places: Sequence[int] | None = None,
) -> list[Decision]:
    """Ask a policy that has seen the model; a form may need the first rate."""
    decisions = decide(policy, infos, places, lr0s)
    for decision, info in zip(decisions, infos):
        if decision.decay.needs_lr0 and not is_rate(decision.lr0):
            name = decision.telling_name
            label = repr(name) if name else f"a parameter of group {info.group}"
            raise ValueError(
                f"{label} decays in form {decision.decay.form!r}, which divides by the "
                f"rate that training begins with, and that is {decision.lr0}. Give its "
                f"group that rate: dict(params=..., lr=0.0, initial_lr=3e-4)."
            )
    return decisions
