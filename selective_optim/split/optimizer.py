"""An optimizer of any class, which sees groups split by decay inside its step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from operator import is_
from typing import Any

from selective_optim import _torch
from selective_optim._decider import Decider
from selective_optim._deciding_for import given
from selective_optim._optimizer import Model, PolicyOptimizer
from selective_optim._state_dict import (
    MEMBERS,
    RECORD,
    require_dict,
    require_groups_like,
)
from selective_optim._warnings import warn_of_changes
from selective_optim.decay import Form
from selective_optim.split import refusals
from selective_optim.split.parts import (
    COMPUTED,
    Group,
    Split,
    flag_of,
    joined,
    split_again,
    split_group,
    taken_apart,
)

STEP_HOOKS = ("step_pre", "step_post")
SAVE_HOOKS = ("state_dict_pre", "state_dict_post")
LOAD_HOOKS = ("load_state_dict_pre", "load_state_dict_post")
COPIED = "_copied"
# Attributes that copies do not take over as they are.
TRANSIENT = ("_decider", "_splits", "_groups", "_outer", "_inside", "_layout")


class Arrivals(PolicyOptimizer):
    """Reads parameters as torch does and decides for them; it never steps.

    Args:
        params: As for the optimizer's class.
        decider: Decides for them.
        keys: What the class reads in a group.
        lr: The rate of groups that bring none, if the class has rates.
    """

    def __init__(
        self, params: Any, decider: Decider, keys: Iterable[str], lr: Any
    ) -> None:
        self._decider = decider
        self._keys = tuple(keys)
        # Differentiable: torch leaves it to the class to refuse tensors that are no
        # leaves.
        defaults = {"differentiable": True, "lr": lr}
        super().__init__(decider.begin(params), defaults)
        decider.decide_pending()

    @classmethod
    def after(
        cls, groups: Sequence[Group], decider: Decider, keys: Any, lr: Any
    ) -> Arrivals:
        """Begin where groups have been decided for already."""
        arrivals = cls.__new__(cls)
        arrivals._decider, arrivals._keys = decider, tuple(keys)
        arrivals.defaults = {"differentiable": True, "lr": lr}
        arrivals.param_groups = list(groups)
        return arrivals

    def _group_keys(self) -> Iterable[str]:
        return self._keys

    def add_param_group(self, param_group: Group) -> None:
        given = set(param_group) if isinstance(param_group, dict) else ()
        super().add_param_group(param_group)
        for key in self.defaults:
            if key not in given:
                del self.param_groups[-1][key]


class SplitOptimizer(PolicyOptimizer):
    """Stands before a class, which finds groups split wherever it reads or writes them.

    Outside, ``param_groups`` are the user's. While the class constructs, steps, saves
    or loads, they are the parts, which live from one step to the next.
    """

    _splits: list[Split]
    _groups: list[Group]  # the parts, in the list that the class made
    _outer: list[Group]  # the user's groups, while the class sees the parts
    _inside = False
    _layout: object = None

    # Construction.

    def __init__(
        self,
        params: Any,
        *args: Any,
        wd_policy: Any = None,
        model: Model = None,
        **kwargs: Any,
    ) -> None:
        # Decided before the class exists: it is given the parts.
        self._decider = Decider(*given(model, wd_policy))
        signature = inspect.signature(type(self))
        bound = signature.bind_partial(params, *args, **kwargs)
        bound.apply_defaults()
        lr, keys = bound.arguments.get("lr"), signature.parameters
        groups = Arrivals(params, self._decider, keys, lr).param_groups
        decided = self._decider.decisions(groups, {})
        self._splits = list(map(split_group, groups, decided))
        self._inside = True
        parts = [part.group for split in self._splits for part in split.parts]
        super().__init__(parts, *args, **kwargs)
        self._inside = False
        # Only now is there something to look at: what the constructor made.
        refusals.require_parts(self, self._splits)
        refusals.require_no_inner_optimizer(self)
        self._groups, self.param_groups = self.param_groups, groups
        self._adopt(self._splits, self._groups)
        refusals.require_forms(self, self._splits)
        self._decider.warn_if_idle(groups)
        self._decider.index.let_go()

    def _adopt(self, splits: Iterable[Split], made: Iterable[Group]) -> None:
        """Take over the groups that the class made of parts."""
        groups = iter(made)
        for split in splits:
            split.adopt([next(groups) for _ in split.parts], self.defaults)

    def _group_keys(self) -> Iterable[str]:
        return [*self.defaults, *inspect.signature(type(self)).parameters]

    @_torch.disable_dynamo
    def add_param_group(self, param_group: Group) -> None:
        if self._inside:  # the class adds what it was given
            super(PolicyOptimizer, self).add_param_group(param_group)
            return
        self._drop_removed()
        arrivals = Arrivals.after(
            *(self.param_groups, self._decider, self._group_keys()),
            self.defaults.get("lr"),
        )
        arrivals.add_param_group(param_group)
        groups = arrivals.param_groups
        decided = self._decider.decisions(groups, self.defaults)
        split = split_group(groups[-1], decided[-1])
        refusals.require_forms(self, [split])
        self._add_parts(split)
        self._splits.append(split)
        self.param_groups.append(groups[-1])

    def _add_parts(self, split: Split) -> None:
        count = len(self._groups)
        self._show_parts()
        try:
            # Past the method that decides: parts were decided for as a group.
            for part in split.parts:
                super(PolicyOptimizer, self).add_param_group(part.group)
        except BaseException:
            del self._groups[count:]
            raise
        finally:
            self._show_groups()
        self._adopt([split], self._groups[count:])

    def _drop_removed(self) -> None:
        """Drop the parts of groups that were taken out, or the class finds them twice.

        Some frameworks clear the groups to shard the model, and add them anew.
        """
        here = set(map(id, self.param_groups))
        self._splits = [split for split in self._splits if id(split.group) in here]
        self._groups[:] = [p.group for split in self._splits for p in split.parts]

    # What the class sees.

    def _show_parts(self) -> None:
        self._outer, self.param_groups = self.param_groups, self._groups
        self._inside = True

    def _show_groups(self) -> None:
        self._groups, self.param_groups = self.param_groups, self._outer
        self._inside = False

    @_torch.disable_dynamo
    def _enter(self) -> None:
        """Bring the parts up to date and show them to the class."""
        self._arrange()
        for split in self._splits:
            split.hand_down(self.defaults)
        refusals.require_no_index_overrides(self, self._groups)
        self._show_parts()

    @_torch.disable_dynamo
    def _leave(self) -> None:
        """Show the user's groups again, with what the class wrote into their parts."""
        self._show_groups()
        for split in self._splits:
            split.show()

    def _arrange(self) -> None:
        """Split the groups as they now stand, or raise with nothing changed."""
        layout = self._decider.rows(self.param_groups, self.defaults)
        known = [split.group for split in self._splits]
        # A list that the user changed in place, or made anew, shows in one of the two.
        same = len(known) == len(self.param_groups)
        # The decider lays out anew whenever anything moved, so identity suffices.
        if layout is self._layout and same and all(map(is_, known, self.param_groups)):
            return
        decided = self._decider.decisions(self.param_groups, self.defaults)
        splits = [
            split_again(group, decisions, self._splits, self.defaults)
            for group, decisions in zip(self.param_groups, decided)
        ]
        refusals.require_forms(self, splits)
        parts = [part.group for split in splits for part in split.parts]
        if list(map(id, parts)) != list(map(id, self._groups)):
            refusals.require_no_lists(self, len(self._groups))
        for split in splits:
            split.settle()
        self._splits, self._layout = splits, layout
        self._groups[:] = parts

    def _decided_anew(self) -> None:
        self._arrange()

    def _default_form(self, group: Group) -> Form | None:
        flag = flag_of(group)
        return None if flag is None else "decoupled" if group[flag] else "l2"

    # Stepping.

    @_torch.run_as_is
    def step(
        self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Step every parameter that has a gradient, each with its own decay.

        Args:
            closure: Reevaluates the model and returns the loss.
            *args: As the class takes them.
            **kwargs: As the class takes them.

        Returns:
            What the class returns.

        Raises:
            ValueError: A new parameter cannot be decided, or the class cannot be
                served; then nothing is stepped.
        """
        refusals.require_plain_arguments(self, (*args, *kwargs.values()))
        if closure is not None or args:
            args = (closure and self._outside(closure), *args)
        step = _torch.unhooked(super().step)
        self._enter()
        try:
            # Hooks ran before; a class that calls its base's step has them run again.
            with _torch.without_hooks(self, *STEP_HOOKS):
                return step(self, *args, **kwargs)
        finally:
            self._leave()

    def _seeing_parts(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run a method of the class with its groups split."""
        own = getattr(super(), method)
        if self._inside:
            return own(*args, **kwargs)
        self._enter()
        try:
            return own(*args, **kwargs)
        finally:
            self._leave()

    def _outside(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Let a closure see the user's groups."""

        def called(*args: Any, **kwargs: Any) -> Any:
            self._leave()
            try:
                return closure(*args, **kwargs)
            finally:
                self._enter()

        return called

    # State dicts and copies.

    @_torch.disable_dynamo
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return a state dict of the user's groups, as the class makes it.

        ``"decay"`` holds, group by group, a ``[multiplier, form]`` per parameter, and
        ``"parts"``, where there is any, what the class keeps for a part alone.
        """
        before, after = (_torch.hooks_of(self, kind) for kind in SAVE_HOOKS)
        for hook in before:
            hook(self)
        self._enter()
        try:
            with _torch.without_hooks(self, *SAVE_HOOKS):
                saved = super().state_dict(*args, **kwargs)
        finally:
            self._leave()
        state_dict = self._recorded(joined(saved, self._splits))
        for hook in after:
            adapted = hook(self, state_dict)
            state_dict = state_dict if adapted is None else adapted
        return state_dict

    @_torch.disable_dynamo
    def load_state_dict(
        self, state_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Load a state dict of this class, or of the class that it stands before.

        The policy stays the constructor's.

        Raises:
            TypeError: It is not a dict.
            ValueError: It does not fit this optimizer; then nothing is loaded.

        Warns:
            UserWarning: It records other decisions than this policy's, or stops all
                decay.
        """
        require_dict(state_dict)
        before, after = (_torch.hooks_of(self, kind) for kind in LOAD_HOOKS)
        state_dict = dict(state_dict)
        # Hooks see the user's groups, as they do in `step`; so they run here.
        for hook in before:
            adapted = hook(self, state_dict)
            state_dict = state_dict if adapted is None else adapted
        decided = self._decider.readable(self.param_groups, self.defaults)
        decays = [group["weight_decay"] for group in self.param_groups]
        require_groups_like(self.param_groups, decided, state_dict)
        saved, now = state_dict.get(RECORD), self._record(decided)
        standing = self._decider.snapshot(self.param_groups, self.defaults)
        self._resume(saved, now)  # first: parts are what was decided, rates included
        try:
            self._load_parts(state_dict, *args, **kwargs)
        except BaseException:
            self._decider = Decider.restored(standing, self.param_groups)
            raise
        warn_of_changes(decided, decays, self.param_groups, saved, now)
        for hook in after:
            hook(self)

    def _load_parts(self, state_dict: dict[str, Any], *args: Any, **kw: Any) -> None:
        self._arrange()
        parts = taken_apart(state_dict, self._splits, self.defaults)
        parts.pop(RECORD, None)
        self._show_parts()
        try:
            with _torch.without_hooks(self, *LOAD_HOOKS):
                super().load_state_dict(parts, *args, **kw)
            self._adopt_loaded(state_dict["param_groups"])
            # torch makes new dicts on loading, and hands those to the user.
            self._outer = [split.group for split in self._splits]
        finally:
            self._show_groups()

    def _adopt_loaded(self, saved: Sequence[Group]) -> None:
        """Make new groups for the user, as torch does on loading."""
        for split, own in zip(self._splits, saved):
            names = {key: own[key] for key in MEMBERS[1:] if key in own}
            split.group = {k: v for k, v in split.group.items() if k in MEMBERS} | names
        self._adopt(self._splits, self.param_groups)
        for split, own in zip(self._splits, saved):
            computed = {key: own[key] for key in COMPUTED if key in own}
            split.group.update(copy.deepcopy(computed))
            # The parts have it, or what the class had made of it when it was saved.
            split.shown.update({key: split.group[key] for key in computed})

    def __getstate__(self) -> dict[str, Any]:
        # What was written into a group since the last step is not in its parts yet.
        with suppress(ValueError):  # what cannot be decided is told at the next step
            self._enter()
            self._leave()
        state = super().__getstate__()
        return {
            **{key: value for key, value in state.items() if key not in TRANSIENT},
            COPIED: {
                "decider": self._decider.snapshot(self.param_groups, self.defaults),
                "splits": self._splits,
            },
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        rest = dict(state)
        copied = rest.pop(COPIED, None)
        super().__setstate__(rest)
        if copied is None:
            return
        self._decider = Decider.restored(copied["decider"], self.param_groups)
        self._splits = copied["splits"]
        for split in self._splits:
            split.recognize()
        self._groups = [p.group for split in self._splits for p in split.parts]
