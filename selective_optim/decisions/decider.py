"""Who decays: decided at construction, for groups that are added, and when they change.

To which tensor each decision applies is the business of ``_decision_table``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, repeat
from typing import Any

from torch import Tensor, nn

from selective_optim import _torch
from selective_optim._text import require_numbers
from selective_optim._warnings import (
    warn_if_idle,
    warn_of_misspelt,
    warn_of_small_multiplier,
    warn_of_unsteady_policy,
)
from selective_optim.decay import FULL, INIT, Decision
from selective_optim.decisions.copies import (
    correspond,
    refuse_flattened,
    require_members,
)
from selective_optim.decisions.initial_values import (
    base_rate,
    beside,
    is_moving,
    is_rate,
    require_rates,
)
from selective_optim.decisions.knowledge import Pending, describe
from selective_optim.decisions.table import (
    DecisionTable,
    Group,
    Infos,
    Row,
    may_be,
    trusted_names,
)
from selective_optim.parameters import (
    ModelIndex,
    ParameterInfo,
    as_modules,
)
from selective_optim.policies.base import Policy
from selective_optim.policies.decide import decide, require_matches
from selective_optim.policies.named import as_policy
from selective_optim.policies.selectors import Selector

# What a group may bring and does not keep; ZeroRedundancyOptimizer writes them back.
OWN_KEYS = ("wd_policy", "model")
WRITTEN = frozenset(OWN_KEYS)
_INSTEAD = {
    "wd_policy": "optimizer.wd_policy = ... to decide anew",
    "model": "optimizer.add_param_group(dict(params=..., model=model)) for new "
    "parameters",
}


def own_keys(group: Group) -> frozenset[str]:
    """Tell which of our keys a group brings; a text as ``model`` is the user's tag."""
    tag = {"model"} if isinstance(group.get("model"), str) else {}
    return WRITTEN & group.keys() - tag


@contextmanager
def kept_on_error(groups: Any) -> Iterator[None]:
    """Leave a caller's group dicts as they were where what is done with them raises.

    torch fills them in, and takes them one by one.
    """
    listed = groups if isinstance(groups, (list, tuple)) else []
    given = [(group, dict(group)) for group in listed if isinstance(group, dict)]
    try:
        yield
    except BaseException:
        for group, before in given:
            params = group.get("params")
            group.clear()
            group.update(before)
            if isinstance(before.get("params"), Iterator):  # used up by now
                group["params"] = params
        raise


class Decider:
    """Decides who decays, once for every tensor, and knows what was decided.

    Args:
        wd_policy: As for the optimizers.
        model: As for the optimizers.
        insists: Whether every parameter must live in that.
    """

    def __init__(
        self, wd_policy: object = None, model: object = None, insists: bool = True
    ) -> None:
        self.policy = _as_policy(wd_policy)
        self.index = ModelIndex(model if insists else None)
        self.index.add(() if insists else as_modules(model))
        self._table = DecisionTable()
        self._pending: list[Pending] | None = None
        self._cleared: list[list[Row]] = []
        self._waiting_in: object = None  # a layout in which nothing is yet to be taken
        # Decides for several optimizers together, one of which has this decider.
        self.whole: Decider | None = None

    # Groups that come in.

    def read(self, params: Any) -> Any:
        """Collect the groups of a constructor, to decide for them together.

        Returns:
            What torch's constructor takes instead of ``params``.
        """
        self._pending = []
        return self.index.learn(params)

    def unpack(self, group: Any, keys: Iterable[str]) -> tuple[Policy | None, Any]:
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
        if self.whole is None:  # else it was told
            warn_of_misspelt(group, [*keys, "params", "param_names", *OWN_KEYS])
        require_numbers(group, " of a group")
        own = own_keys(group)
        if "model" in own:
            self.index.add(as_modules(group["model"]))
        group["params"] = self.index.learn(group["params"])
        if not own:
            return self.policy, group
        if not isinstance(group["params"], (Tensor, set)):  # which torch refuses
            # torch fills a copy; a generator in the caller's dict would be used up.
            group["params"] = list(group["params"])
        policy = group.get("wd_policy", self.policy)
        rest = {key: value for key, value in group.items() if key not in own}
        return _as_policy(policy), rest

    def add_group(
        self, groups: Sequence[Group], policy: Policy | None, own: bool
    ) -> None:
        """Decide for the last group, or take note of it until :meth:`finish`.

        Args:
            groups: The optimizer's groups, the new one included.
            policy: Who decides.
            own: Whether the group brought that policy itself.

        Raises:
            ValueError: The policy cannot decide; nothing is recorded.
        """
        index, group = len(groups) - 1, groups[-1]
        names = group.get("param_names", ())
        lr0s = repeat(base_rate(group))
        pending = Pending(index, group["params"], names, policy, lr0s)
        # A constructor adds its groups one by one; a glob may match in the last alone.
        if self._pending is not None:
            self._pending.append(pending)
            return
        if self._taken_from_whole([pending]):
            return
        try:
            infos = describe(self.index, [pending])
            # With a policy of its own a group is decided anew, whatever it was before.
            if own or not self._comes_again(index, *infos):
                # Before the policy is asked: of a stranger no module is known either,
                # and a message about that would lead astray.
                require_members(self.index, zip(infos, [policy]))
                self._decide_for([pending], infos, [policy] if own else [])
        finally:
            self.index.release()

    def finish(self, groups: Sequence[Group]) -> None:
        """Decide for all groups of a constructor, and warn if nothing decays."""
        self.decide_pending()
        self.warn_if_weak(groups)

    def decide_pending(self) -> None:
        """Decide for all groups of a constructor."""
        if pending := self.take_pending():
            policies = [each.policy for each in pending]
            self.decide_for(pending, [self.policy, *policies])

    def take_pending(self) -> list[Pending]:
        """Hand over the groups that were read, to be decided for otherwise."""
        pending, self._pending = self._pending or [], None
        return pending

    def decide_for(
        self, coming: Sequence[Pending], strict: Iterable[Policy | None]
    ) -> None:
        """Decide for groups together; globs of strict policies match something."""
        if not self._taken_from_whole(coming):
            self._decide_for(coming, self._known_of(coming), strict)

    def ask(
        self, policy: Policy, coming: Sequence[Pending], strict: bool
    ) -> list[list[Decision]]:
        """Ask another policy about groups, and record nothing."""
        infos = self._known_of([each._replace(policy=policy) for each in coming])
        if strict:
            every = list(chain(*infos))
            require_matches(policy, every, self._matches, self.index.everyone)
        return [self._ask(policy, own) for own in infos]

    def _known_of(self, coming: Sequence[Pending]) -> list[list[ParameterInfo]]:
        infos = describe(self.index, coming)
        policies = [each.policy for each in coming]
        require_members(self.index, zip(infos, policies))
        return infos

    def _comes_again(self, index: int, infos: Infos) -> bool:
        """Take over the rows of a group that was cleared and now comes again.

        Some frameworks clear the groups to shard the model, and add them anew.
        """
        # The first group of an optimizer that had groups: they were cleared.
        if index == 0 and self._table.layout:
            self._cleared, self._table.layout = self._table.layout, []
        if index >= len(self._cleared):
            self._cleared = []
            return False
        found = [self._table.row_of(info.parameter) for info in infos]
        rows: list[Row] | None = [row for row in found if row is not None]
        if len(rows or ()) < len(found):
            rows = self._table.inherited(infos, self._cleared[index])
        if rows is not None:
            self._table.append(index, rows)
        if index + 1 == len(self._cleared):
            self._cleared = []
        return rows is not None

    def _decide_for(
        self,
        coming: Sequence[Pending],
        infos: Sequence[Infos],
        strict: Iterable[Policy | None],
    ) -> None:
        """Decide for groups that come in together, or raise with nothing recorded.

        Args:
            coming: The groups.
            infos: What is known of their parameters.
            strict: Policies whose globs must each match something.
        """
        together = list(zip(coming, infos, strict=True))
        for policy in {id(p): p for p in strict if p is not None}.values():
            mine = [i for each, own in together if each.policy is policy for i in own]
            require_matches(policy, mine, self._matches, self.index.everyone)
        # All are asked before anything is recorded, so that an error leaves nothing.
        bound = self._bound(each.policy for each in coming)
        decided = [
            decide(bound[id(each.policy)], own, lr0s=each.lr0s)
            for each, own in together
        ]
        require_rates(chain(*decided), chain(*infos))
        policies = [bound[id(each.policy)] for each in coming]
        self._warn_if_unsteady(policies, infos, decided)
        for (each, own), decisions in zip(together, decided):
            pairs = zip(own, decisions, strict=True)
            rows = [self._table.record(i.parameter, d, each.policy) for i, d in pairs]
            self._table.append(each.group, rows)

    def _taken_from_whole(self, coming: Sequence[Pending]) -> bool:
        """Take over what was decided with the parameters of other optimizers."""
        if self.whole is None:
            return False
        row_of = self.whole._table.row_of
        found = [[row_of(param) for param in each.params] for each in coming]
        if not all(chain(*found)):
            return False
        for each, own in zip(coming, found):
            pairs = zip(each.params, filter(None, own))
            rows = [self._table.record(p, r.decision, r.policy) for p, r in pairs]
            self._table.append(each.group, rows)
        return True

    def gather(self, part: Decider, groups: Sequence[Group]) -> None:
        """Take over what one of the optimizers has decided or inherited by itself."""
        for group, rows in zip(groups, part.rows(groups, {})):
            for param, row in zip(group["params"], rows):
                self._table.record(param, row.decision, row.policy)

    def _warn_if_unsteady(
        self,
        policies: Iterable[Policy | None],
        infos: Iterable[Infos],
        decided: Iterable[Sequence[Decision]],
    ) -> None:
        """Ask functions of the user's a second time, and warn of other answers."""
        for policy, own, decisions in zip(policies, infos, decided):
            if policy is None or "anything" not in policy.needs:
                continue
            for place, (info, first) in enumerate(zip(own, decisions)):
                then = None
                with suppress(Exception):  # it may fail where it did not before
                    then = policy.decide(info).decay.settled
                if then != first.decay:
                    label = first.label(info.group, place)
                    told = "an error" if then is None else repr(then)
                    warn_of_unsteady_policy(policy, label, repr(first.decay), told)
                    return

    def _bound(self, policies: Iterable[Policy | None]) -> dict[int, Policy | None]:
        """Give each policy a look at the model, once for all groups; by id."""
        modules = self.index.modules()
        each = {id(policy): policy for policy in policies}
        return {key: policy and policy.bind(modules) for key, policy in each.items()}

    def _ask(self, policy: Policy, infos: Infos) -> list[Decision]:
        return decide(self._bound([policy])[id(policy)], infos)

    def _matches(self, selector: Selector) -> bool:
        """Ask whether a selector matches anything in the model."""
        return self.index.remember(
            ("matches", selector),
            lambda: any(map(selector.matches, self.index.everyone())),
        )

    # Groups as they stand.

    @property
    def laid_out(self) -> list[list[Row]]:
        """What was decided by group and position, as they were last looked at."""
        return self._table.layout

    def decided_by(self, params: Iterable[Tensor]) -> Policy | None:
        """Return the policy by which one of these decays otherwise than in full."""
        rows = [row for row in map(self._table.row_of, params) if row is not None]
        departing = (row.policy for row in rows if row.decision.decay != FULL)
        return next(departing, None)

    def name_of(self, param: Tensor) -> str | None:
        """Return the name by which a parameter was decided."""
        row = self._table.row_of(param)
        return None if row is None else row.decision.telling_name

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
        self.refuse_written(groups, defaults)
        if not self._table.stands(groups):
            self._follow(groups)
        return self._table.layout

    def _follow(self, groups: Sequence[Group]) -> None:
        """Find, take over or decide a row for every parameter of the groups.

        A tensor keeps its own row wherever it stands. One that is new takes over
        that of its name, or, where all tensors of a group are new, those of their
        positions, unless what is known of it contradicts. Else a policy is asked:
        that of the tensors around it, or the constructor's.

        Raises:
            ValueError: The policy cannot decide; then the layout stays as it was.
        """
        found = [[self._table.row_of(p) for p in group["params"]] for group in groups]
        self._table.undo_swaps(groups, found)
        # A name counts only if no known tensor has it.
        borne = {row.decision.name for rows in found for row in rows if row}
        lacking = [
            Pending(index, list(group["params"]), names, None)
            for index, (group, rows) in enumerate(zip(groups, found))
            if not all(rows)
            for names in [trusted_names(group, rows, borne)]
        ]
        infos = iter(describe(self.index, lacking))
        # Objects that had a row, whose token `swap_tensors` has given away.
        seen = {id(row.token) for rows in found for row in rows if row}
        old = chain.from_iterable(self._table.layout)
        owned = {row.owner: row for row in old if id(row.token) not in seen}
        # After groups were added or removed by hand, positions say nothing.
        layout = self._table.layout if len(groups) == len(self._table.layout) else []
        self._waiting_in = None  # or the rows of tensors that left would stay
        self._table.lay_out(
            [
                [row for row in rows if row]
                if all(rows)
                else self._complete(next(infos), rows, before, owned, base_rate(group))
                for group, rows, before in zip(groups, found, layout or repeat([]))
            ]
        )

    def _complete(
        self,
        infos: Infos,
        rows: Sequence[Row | None],
        before: Sequence[Row],
        owned: Mapping[int, Row],
        lr0: float | None,
    ) -> list[Row]:
        """Give every parameter of a group a row, where ``None`` stands for none yet."""
        mine = [row for row in rows if row is not None]
        if not mine and (inherited := self._table.inherited(infos, before)) is not None:
            return inherited
        # What is new in a group begins as the others in it did.
        around = next(iter((*mine, *before)), None)
        policy = self.policy if around is None else around.policy
        lr0 = lr0 if around is None else around.decision.lr0 or lr0
        named = self._table.by_name()
        completed = []
        for info, row in zip(infos, rows):
            known = owned.get(id(info.parameter)) or named.get(info.name or "")
            if row is None and known is not None and may_be(info, known):
                row = self._table.take_over(info, known)
            completed.append(row)
        places = [i for i, row in enumerate(completed) if row is None]
        if len(places) == len(infos):
            old = [row.decision for row in before]
            if correspond(infos, old, policy):
                return list(map(self._table.take_over, infos, before))
            refuse_flattened(infos, old, policy)
        new = [infos[i] for i in places]
        bound = self._bound([policy])[id(policy)] if new else None
        decisions = decide(bound, new, places, repeat(lr0))
        require_rates(decisions, new)
        for i, decision in zip(places, decisions):
            completed[i] = self._table.record(infos[i].parameter, decision, policy)
        return [row for row in completed if row is not None]

    def decisions(
        self, groups: Sequence[Group], defaults: Mapping[str, Any]
    ) -> list[list[Decision]]:
        """Return the decisions alone; see :meth:`rows`."""
        return [[row.decision for row in rows] for rows in self.rows(groups, defaults)]

    def fitting(
        self, groups: Sequence[Group], defaults: Mapping[str, Any]
    ) -> list[list[Decision]]:
        """Return the decisions, of which ``init`` lies as its parameter does now.

        Raises:
            ValueError: As :meth:`rows`; or a parameter has another shape now.
        """
        for group, rows in zip(groups, self.rows(groups, defaults)):
            for place, (param, row) in enumerate(zip(group["params"], rows)):
                init = row.decision.init
                if init is not None and not _torch.lies_as(init, param):
                    fitted = beside(init, param, row.decision.telling_name)
                    rows[place] = self._renewed(param, row, init=fitted)
        return [[row.decision for row in rows] for rows in self._table.layout]

    @property
    def waits(self) -> bool:
        """Whether what some parameters decay towards is yet to be taken."""
        return self._waiting_in is not self._table.layout and self._look_for_waiting()

    def _look_for_waiting(self) -> bool:
        layout = self._table.layout
        waiting = any(row.decision.waits for rows in layout for row in rows)
        if not waiting:
            self._waiting_in = layout
        return waiting

    def begin_training(
        self, groups: Sequence[Group], defaults: Mapping[str, Any]
    ) -> bool:
        """Take what parameters decay towards, in groups that a step now moves.

        Returns:
            Whether anything was taken.
        """
        taken = False
        for group, rows in zip(groups, self.rows(groups, defaults)):
            if not is_moving(group):
                continue
            for place, (param, row) in enumerate(zip(group["params"], rows)):
                if row.decision.waits:
                    rows[place] = self._renewed(param, row, init=param.detach().clone())
                    taken = True
        if taken:  # another list tells those who look
            self._table.layout = list(map(list, self._table.layout))
        return taken

    def resume(
        self, groups: Sequence[Group], begins: Iterable[Mapping[str, Any]]
    ) -> tuple[list[str], list[str]]:
        """Take over what training began with, as a state dict records it.

        Args:
            groups: The optimizer's groups.
            begins: ``"lr0"`` and ``"init"`` of every parameter in order, where known.
                Else a rate that a scheduler left in the group stands for ``"lr0"``.

        Returns:
            Labels of the parameters whose ``init`` is not recorded, and of those whose
            ``lr0`` is not and differs from what the group says now, with that.
        """
        inits, rates, told = [], [], iter(begins)
        # Another list tells those who look.
        self._table.layout = list(map(list, self._table.layout))
        for index, (group, rows) in enumerate(zip(groups, self._table.layout)):
            # torch's schedulers save where they began; OneCycleLR writes another rate.
            scheduled = None if "max_lr" in group else group.get("initial_lr")
            pairs = zip(group["params"], rows, told)
            for place, (param, row, begin) in enumerate(pairs):
                decay, lr0 = row.decision.decay, begin.get("lr0", scheduled)
                if is_rate(lr0):  # also for a policy that is assigned later
                    row = self._renewed(param, row, lr0=lr0)
                elif decay.needs_lr0 and row.decision.lr0 != base_rate(group):
                    label = row.decision.label(index, place)
                    rates.append(f"{label} (here {row.decision.lr0:g})")
                init = begin.get("init")
                if decay.needs_init and getattr(init, "shape", None) == param.shape:
                    row = self._renewed(param, row, init=init)
                elif decay.needs_init:
                    row = self._renewed(param, row, init=None)
                    if begin.get("target") != INIT:  # or training had not begun
                        inits.append(row.decision.label(index, place))
                rows[place] = row
        return inits, rates

    def _renewed(self, param: Tensor, row: Row, **begin: Any) -> Row:
        decision = row.decision._replace(**begin)
        return self._table.record(param, decision, row.policy)

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

    def refuse_written(
        self, groups: Sequence[Group], defaults: Mapping[str, Any]
    ) -> None:
        """Check that no policy and no module stands where nothing reads it.

        Raises:
            ValueError: One does; nothing was read.
        """
        for index, group in enumerate(groups):
            for key in WRITTEN & group.keys():
                if not self._obeyed(index, key, group[key]):
                    raise ValueError(
                        f"a `{key}` was written into group {index}, where nothing "
                        f"reads it. Type {_INSTEAD[key]}, and "
                        f"del optimizer.param_groups[{index}][{key!r}]."
                    )
        for key in WRITTEN & defaults.keys():
            if key == "wd_policy" or _modules_in(defaults[key]):
                raise ValueError(
                    f"a `{key}` was written into optimizer.defaults, where nothing "
                    f"reads it. Type {_INSTEAD[key]}, and "
                    f"del optimizer.defaults[{key!r}]."
                )

    def _obeyed(self, index: int, key: str, written: object) -> bool:
        """Tell whether a group was decided by what now stands in it."""
        if key == "model":  # a user's own tag may be of any other kind
            known = self.index.modules()
            return all(any(m is k for k in known) for m in _modules_in(written))
        if index >= len(self._table.layout):
            return False
        try:
            policy = _as_policy(written)
        except (TypeError, ValueError):
            return False
        return all(row.policy == policy for row in self._table.layout[index])

    def policies(self) -> list[str | None]:
        """Write the policy of each group as text; ``None`` for a group without one."""
        firsts = [rows[0].policy if rows else None for rows in self._table.layout]
        return [None if policy is None else repr(policy) for policy in firsts]

    def assign(self, wd_policy: object, groups: Sequence[Group]) -> None:
        """Decide anew for every parameter, or raise with nothing changed."""
        policy = _as_policy(wd_policy)
        pending = []
        for index, group in enumerate(groups):
            rows = [self._table.row_of(param) for param in group["params"]]
            # The model may be deleted by now, but its names are still known.
            names = [row and row.decision.name for row in rows]
            lr0s = [row.decision.lr0 if row else base_rate(group) for row in rows]
            params = list(group["params"])
            pending.append(Pending(index, params, names, policy, lr0s))
        if not self._taken_from_whole(pending):
            self._decide_for(pending, describe(self.index, pending), [policy])
        self._table.forget_absent()  # they are decided anew when they come back
        self.policy = policy
        self.warn_if_weak(groups)

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

    def warn_if_weak(self, groups: Sequence[Group]) -> None:
        """Warn if nothing will decay, and of a multiplier that reads like a decay."""
        if self.whole is not None:
            return
        rows = [row for rows in self._table.layout for row in rows]
        policy = next((row.policy for row in rows if row.policy is not None), None)
        if policy is not None:
            decays = [group["weight_decay"] for group in groups]
            decays += [row.decision.decay.of(0.0) for row in rows]
            multipliers = [row.decision.decay.multiplier for row in rows]
            warn_if_idle(policy, decays, multipliers, self._decays_elsewhere)
        doubts = [
            (multiplier, group["weight_decay"], instead)
            for group, own in zip(groups, self._table.layout)
            for policy in {id(row.policy): row.policy for row in own}.values()
            for multiplier, instead in (policy.doubts if policy else ())
        ]
        if doubts:
            warn_of_small_multiplier(*doubts[0])

    def _decays_elsewhere(self, policy: Policy) -> bool:
        """Ask about the whole model, of which other ranks may hold parts."""

        def ask() -> bool:
            try:
                decisions = self._ask(policy, self.index.everyone())
            except (TypeError, ValueError):  # it was not asked to decide for these
                return False
            return any(decision.decay.multiplier for decision in decisions)

        return self.index.remember(("decays", policy), ask)


def part_of(whole: Decider) -> Decider:
    """Make the decider of an optimizer that steps some of the parameters."""
    decider = Decider()
    decider.policy, decider.index, decider.whole = whole.policy, whole.index, whole
    return decider


def _modules_in(value: object) -> list[nn.Module]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in items if isinstance(item, nn.Module)]


def _as_policy(value: object) -> Policy | None:
    return None if value is None else as_policy(value)
