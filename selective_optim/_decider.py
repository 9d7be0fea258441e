"""Deciding: at construction, for every group that is added, and when groups change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from torch import Tensor

from selective_optim._decision_table import DecisionTable, Group, Infos, Known, Row
from selective_optim._model_index import ModelIndex
from selective_optim._text import require_numbers, warn
from selective_optim.decay import FULL, Decision, is_zero
from selective_optim.parameters import as_modules
from selective_optim.policies import Policy, as_policy
from selective_optim.policies.decide import decide, require_matches
from selective_optim.policies.selectors import Selector

# What a group may bring and does not keep; ZeroRedundancyOptimizer writes them back.
OWN_KEYS = ("wd_policy", "model")
# How alike a key must be to one that is read to be taken for it: "wd_polcy" is 0.94
# and "weight_decays" 0.96. Keys that others put there are less: "lr_scale" is 0.4.
RESEMBLANCE = 0.85


class Pending(NamedTuple):
    """A group on its way in: what is known of its parameters, and who decides."""

    group: int
    infos: Infos
    policy: Policy | None


class Decider:
    """Decides who decays, once for every tensor, and knows what was decided.

    Args:
        wd_policy: As for the optimizers.
        model: As for the optimizers.
    """

    def __init__(self, wd_policy: object = None, model: object = None) -> None:
        self.policy = _as_policy(wd_policy)
        self.index = ModelIndex(model)
        self._table = DecisionTable()
        self._pending: list[Pending] | None = None
        self._cleared: list[list[Row]] = []

    # Groups that arrive.

    def begin(self) -> None:
        """Collect the groups of a constructor, to decide for them together."""
        self._pending = []

    def open(self, group: Any, keys: Iterable[str]) -> tuple[Policy | None, Any]:
        """Take out what a group brings for us, and learn from its parameters.

        Args:
            group: As given to ``add_param_group``; a policy stays in the caller's
                dict, for a second optimizer.
            keys: torch's keys, which a misspelt one may resemble.

        Returns:
            The policy that decides, and the group for torch.
        """
        if not isinstance(group, dict) or "params" not in group:
            return self.policy, group  # torch says what is wrong
        _warn_of_misspelt(group, keys)
        require_numbers(group, " of a group")
        if "model" in group:
            self.index.add(as_modules(group["model"]))
        group["params"] = self.index.learn(group["params"])
        if group.keys().isdisjoint(OWN_KEYS):
            return self.policy, group
        if not isinstance(group["params"], Tensor):
            group["params"] = list(group["params"])
        policy = group.get("wd_policy", self.policy)
        rest = {key: value for key, value in group.items() if key not in OWN_KEYS}
        return _as_policy(policy), rest

    def arrive(self, groups: Sequence[Group], policy: Policy | None, own: bool) -> None:
        """Decide for the last group, or take note of it until :meth:`settle`.

        Args:
            groups: The optimizer's groups, the new one included.
            policy: Who decides.
            own: Whether the group brought that policy itself.

        Raises:
            ValueError: The policy cannot decide; nothing is recorded.
        """
        index, group = len(groups) - 1, groups[-1]
        infos = self.index.infos(group["params"], group.get("param_names"), index)
        if not own and (rows := self._come_again(index, infos)) is not None:
            self._table.append(index, rows)
            return
        self.index.require_members(infos)
        pending = Pending(index, infos, policy)
        if self._pending is not None:
            self._pending.append(pending)
        else:
            self._decide_for([pending], [policy] if own else [])

    def settle(self, groups: Sequence[Group]) -> None:
        """Decide for all groups of a constructor, and warn if nothing decays."""
        self.decide_pending()
        self.warn_if_idle(groups)

    def decide_pending(self) -> None:
        """Decide for all groups of a constructor."""
        pending, self._pending = self._pending or [], None
        self._decide_for(pending, [self.policy, *(each.policy for each in pending)])

    def _come_again(self, index: int, infos: Infos) -> list[Row] | None:
        """Return the rows of a group that was cleared and now comes again.

        Some frameworks clear the groups to shard the model, and add them anew.
        """
        if index == 0 and self._table.layout:
            self._cleared, self._table.layout = self._table.layout, []
        if index >= len(self._cleared):
            self._cleared = []
            return None
        rows = [self._table.row_of(info.parameter) for info in infos]
        known = [row for row in rows if row is not None]
        if len(known) == len(rows):
            return known
        return self._table.inherited(infos, self._cleared[index])

    def _decide_for(
        self, arriving: Sequence[Pending], strict: Iterable[Policy | None]
    ) -> None:
        """Decide for groups that arrive together, or raise with nothing recorded.

        Args:
            arriving: The groups.
            strict: Policies whose globs must each match something.
        """
        for policy in {id(p): p for p in strict if p is not None}.values():
            mine = [i for each in arriving if each.policy is policy for i in each.infos]
            require_matches(policy, mine, self._matches, self.index.everyone)
        decided = [self._ask(each.policy, each.infos) for each in arriving]
        for each, decisions in zip(arriving, decided):
            pairs = zip(each.infos, decisions, strict=True)
            rows = [self._table.record(i.parameter, d, each.policy) for i, d in pairs]
            self._table.append(each.group, rows)

    def _ask(
        self, policy: Policy | None, infos: Infos, places: Sequence[int] | None = None
    ) -> list[Decision]:
        return decide(policy and policy.bind(self.index.modules()), infos, places)

    def _matches(self, selector: Selector) -> bool:
        """Ask whether a selector matches anything in the model."""
        return self.index.remember(
            ("matches", selector),
            lambda: any(map(selector.matches, self.index.everyone())),
        )

    # Groups as they stand.

    def decided_by(self, params: Iterable[Tensor]) -> Policy | None:
        """Return the policy by which one of these decays otherwise than in full."""
        rows = [row for row in map(self._table.row_of, params) if row is not None]
        departing = (row.policy for row in rows if row.decision.decay != FULL)
        return next(departing, None)

    def rows(
        self, groups: Sequence[Group], defaults: Mapping[str, Any]
    ) -> list[list[Row]]:
        """Return what was decided for every parameter, on the spot where it is new.

        Args:
            groups: The optimizer's groups as they stand.
            defaults: The optimizer's, where a policy does not belong.

        Raises:
            ValueError: A policy stands where none is read, or cannot decide.
        """
        self._refuse_written(groups, defaults)
        if not self._table.stands(groups):
            known = Known(self.index.infos, self._ask)
            self._table.follow(groups, known, self.policy)
        return self._table.layout

    def decisions(
        self, groups: Sequence[Group], defaults: Mapping[str, Any]
    ) -> list[list[Decision]]:
        """Return the decisions alone; see :meth:`rows`."""
        return [[row.decision for row in rows] for rows in self.rows(groups, defaults)]

    def readable(
        self, groups: Sequence[Group], defaults: Mapping[str, Any]
    ) -> list[list[Decision]]:
        """Return the decisions for someone who reads, and must not be refused.

        What cannot be decided is told at the next step. Until then a tensor counts
        as what stood in its place: frameworks that shard put placeholders there.
        """
        with suppress(ValueError):
            return self.decisions(groups, defaults)
        before = {
            (index, position): row.decision
            for index, rows in enumerate(self._table.layout)
            for position, row in enumerate(rows)
        }

        def read(param: Tensor, place: tuple[int, int]) -> Decision:
            if row := self._table.row_of(param):
                return row.decision
            undecided = Decision(FULL, "not decided yet", None, param.shape, ())
            return before.get(place, undecided)

        return [
            [read(p, (i, position)) for position, p in enumerate(group["params"])]
            for i, group in enumerate(groups)
        ]

    def _refuse_written(
        self, groups: Sequence[Group], defaults: Mapping[str, Any]
    ) -> None:
        for index, group in enumerate(groups):
            if "wd_policy" in group and not self._obeyed(index, group["wd_policy"]):
                raise ValueError(
                    f"a `wd_policy` was written into group {index}, whose parameters "
                    f"were decided for before. Type optimizer.wd_policy = ... to "
                    f"decide anew, and del optimizer.param_groups[{index}]"
                    f"['wd_policy']."
                )
        if "wd_policy" in defaults:
            raise ValueError(
                "a `wd_policy` was written into optimizer.defaults, where nothing "
                "reads it. Type optimizer.wd_policy = ... to decide anew, and "
                "del optimizer.defaults['wd_policy']."
            )

    def _obeyed(self, index: int, written: object) -> bool:
        """Tell whether a group was decided by what now stands in it."""
        if index >= len(self._table.layout):
            return False
        try:
            policy = _as_policy(written)
        except (TypeError, ValueError):
            return False
        return all(row.policy == policy for row in self._table.layout[index])

    def assign(self, wd_policy: object, groups: Sequence[Group]) -> None:
        """Decide anew for every parameter, or raise with nothing changed."""
        policy = _as_policy(wd_policy)
        pending = []
        for index, group in enumerate(groups):
            rows = [self._table.row_of(param) for param in group["params"]]
            names = [row and row.decision.name for row in rows]
            infos = self.index.infos(list(group["params"]), names, index)
            pending.append(Pending(index, infos, policy))
        self._decide_for(pending, [policy])
        self._table.forget_absent()  # they are decided anew when they come back
        self.policy = policy
        self.warn_if_idle(groups)

    # Copies.

    def snapshot(
        self, groups: Sequence[Group], defaults: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write down what a copy must know: decisions by group and position."""
        with suppress(ValueError):  # what cannot be decided is told at the next step
            self.rows(groups, defaults)
        rows = [[self._table.row_of(p) for p in group["params"]] for group in groups]
        plain = [[row and (row.decision, row.policy) for row in own] for own in rows]
        return {"policy": self.policy, "index": self.index, "rows": plain}

    @classmethod
    def restored(cls, snapshot: Mapping[str, Any], groups: Sequence[Group]) -> Decider:
        """Make the decider of a copy, whose tensors stand where the originals stood."""
        decider = cls()
        decider.policy, decider.index = snapshot["policy"], snapshot["index"]
        layout = []
        for group, own in zip(groups, snapshot["rows"]):
            known = [(p, row) for p, row in zip(group["params"], own) if row]
            layout.append([decider._table.record(p, *row) for p, row in known])
        decider._table.lay_out(layout)
        return decider

    # Warnings.

    def warn_if_idle(self, groups: Sequence[Group]) -> None:
        """Warn once if a policy was given and nothing will decay."""
        rows = [row for rows in self._table.layout for row in rows]
        policy = next((row.policy for row in rows if row.policy is not None), None)
        if policy is None:
            return
        if all(map(is_zero, [group["weight_decay"] for group in groups])):
            warn(
                f"`weight_decay` is 0 in every group, so `wd_policy` {policy!r} "
                f"has no effect. Pass weight_decay=0.01, or the value you want."
            )
        # One optimizer per parameter is common, and most of them have an exempt one.
        elif len(rows) > 1 and not self._decays_anywhere(rows, policy):
            warn(
                f"`wd_policy` {policy!r} exempts all {len(rows)} parameters. "
                f"Pass weight_decay=0 instead if nothing is to decay."
            )

    def _decays_anywhere(self, rows: Sequence[Row], policy: Policy) -> bool:
        """Ask here, then about the whole model, of which ranks may hold parts."""

        def ask() -> bool:
            try:
                decisions = self._ask(policy, self.index.everyone())
            except ValueError:  # it was not asked to decide for these
                return False
            return any(decision.decay.multiplier for decision in decisions)

        here = any(row.decision.decay.multiplier for row in rows)
        return here or self.index.remember(("decays", policy), ask)


def _as_policy(value: object) -> Policy | None:
    return None if value is None else as_policy(value)


def _warn_of_misspelt(group: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Tell of keys that nobody reads and that look like one that is read."""
    known = [*keys, "params", "param_names", *OWN_KEYS]
    for key in group:
        if key in known or not isinstance(key, str):
            continue
        nearest = max(known, key=lambda k: SequenceMatcher(None, k, key).ratio())
        # "initial_lr" and "weight_decay_mult" are somebody's own, not misspelt.
        own = any(key.startswith(f"{k}_") or key.endswith(f"_{k}") for k in known)
        if not own and SequenceMatcher(None, nearest, key).ratio() >= RESEMBLANCE:
            warn(
                f"{key!r} in a parameter group is read by nobody. "
                f"Did you mean {nearest!r}?"
            )
