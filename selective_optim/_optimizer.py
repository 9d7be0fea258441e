"""The mechanism of every class: each step splits the user's groups into parts."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from threading import local
from types import CodeType
from typing import Any

import torch
from torch import nn

from selective_optim import _torch
from selective_optim._text import keep, put_back, require_numbers, warn
from selective_optim.decay import Form, none_decays
from selective_optim.decisions.decider import WRITTEN, Decider, own_keys
from selective_optim.decisions.state_dict import (
    POLICIES,
    RECORD,
    Decided,
    Record,
    begin_in,
    entries_of,
    groups_to_load,
    record_of,
    require_dict,
    require_loadable,
)
from selective_optim.decisions.warnings import (
    alive,
    warn_of_changes,
    warn_of_lost,
    warn_of_origin,
)
from selective_optim.decisions.watch import Watch, loss_of
from selective_optim.fused.guards import READ, params_of
from selective_optim.fused.stepper import Stepper
from selective_optim.policies.named import WdPolicy, as_policy
from selective_optim.policies.selectors import Policy
from selective_optim.report import DecayReport, form_of_class, make_rows, report_on
from selective_optim.step.class_step import AroundStep, View, view_of
from selective_optim.step.kernels import Kernel
from selective_optim.step.parts import DecidedParam, Part
from selective_optim.step.setting import scaling_of

Group = dict[str, Any]
Model = nn.Module | Sequence[nn.Module] | None

COPIED = "_copied"
# Attributes that copies do not take over as they are, where a class copies all it has.
TRANSIENT = (
    *("_decider", "_groups", "_states", "_kernel", "_stepper", "_shown", "_watch"),
    *("_threads_inside", "_splits", "_parts", "_class_adds", "_layout"),
)


def constants_of(function: Any) -> set[Any]:
    """List the constants in the code of a function and of those that it defines."""
    codes = [getattr(inspect.unwrap(function), "__code__", None)]
    found: set[Any] = set()
    for code in codes:
        for constant in getattr(code, "co_consts", ()):
            if isinstance(constant, CodeType):
                codes.append(constant)
            found.add(constant)
    return found


class Shown(local):
    """What stands for the groups in a thread that is inside a step; else ``None``.

    ``torch.compile`` runs ``_init_group`` as it is for groups under this name alone.
    """

    def __init__(self) -> None:  # in every thread anew
        # The compiler of 2.7 takes what a class has for what each thread has.
        self.param_groups: list[Group] | None = None


class StateAttribute:
    """Notes the first look at the state from outside: someone may edit it from then on.

    Then it is a plain attribute, as in torch: a class reads it for every parameter.
    """

    def __get__(self, optimizer: Any, cls: object = None) -> Any:
        if optimizer is None:
            return self
        stepper = optimizer._stepper
        if torch.compiler.is_compiling():
            stepper.seen = True
            return optimizer._states
        states = vars(optimizer).get("state", optimizer._states)  # threads look, too
        if not optimizer._inside:  # the class's own step is no outsider
            stepper.expose(states)
        if stepper.exposed:
            # In one place: what is assigned in its stead is to free it.
            vars(optimizer)["state"], optimizer._states = states, None
        return states


class SelectiveOptimizer(torch.optim.Optimizer):
    """Decides once for every parameter, and shows its class the groups as parts.

    Stands before a class of ``torch.optim`` whose constructor, groups and state
    stay what they are. What is added lives in attributes of its own.
    """

    _kernel: Kernel
    _decider: Decider
    _groups: list[Group]
    _states: Any = None
    _stepper: Stepper
    _keys: Sequence[str] = ()  # that are read in a group beside the defaults
    _stated: frozenset[str]  # keywords that the constructor was given
    _reached = False  # whether a step came here
    _warned_of_origin = False  # that it was made of another's numbers
    _untouched = False  # no step, load or copy yet, and no state of its own
    _watch: Watch | None = None  # of steps, while there may be something to tell
    _class_step_code: object = None  # the code of the class's own step, if parts last

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        make = super().__new__
        made = make(cls) if make is object.__new__ else make(cls, *args, **kwargs)
        made._stated = frozenset(kwargs)  # a default is nothing that a user said
        return made

    def _construct_deciding(
        self,
        params: Any,
        wd_policy: object,
        model: Model,
        numbers: Mapping[str, object],
        make: Callable[..., None],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Give a constructor (``make``) what torch takes, and decide for all groups."""
        require_numbers(numbers)
        self._decider = Decider.for_constructor(as_policy, wd_policy, model)
        kept = keep(params)
        try:
            # By position what torch's signature has so: a class may stand between.
            make(self._decider.collect(params), *args, **kwargs)
            self._decider.decide_pending()
            self._decider.warn_if_nothing_decays(self._groups)
            self._made()
        except BaseException:
            put_back(kept)
            raise

    def _made(self) -> None:
        """Take note of an optimizer that is whole now."""
        self._decider.index.release()
        if "weight_decay" in self._stated and self._decider.policy is None:
            # What a user may have typed: not what is a default of the signature.
            unsaid = inspect.signature(type(self)).parameters.keys() - self._stated
            said = {k: v for k, v in self.defaults.items() if k not in unsaid}
            warn_of_origin(self, said, ())
        alive.add(self)
        self._untouched = not any(self._take_state().values())
        # If nothing decays now, that is meant, or `warn_if_nothing_decays` has told.
        alone = self._decider.parent is None  # else other routes may decay
        decays = alone and not none_decays(self._groups)
        self._watch = Watch(decays, rounding=True)
        self._compare_ranks()
        self._watch_own_step()

    def _watch_own_step(self) -> None:
        """Warn once if the first step of a subclass decays and never reaches ours."""
        step: Any = type(self).step  # `wraps` copies where the innermost is defined
        if step.__module__ == __name__ or "weight_decay" not in constants_of(step):
            return

        def look(optimizer: SelectiveOptimizer, *_: object) -> None:
            handle.remove()
            if not optimizer._reached:
                warn(
                    f"the step of {type(optimizer).__name__} reads group["
                    f"'weight_decay'] itself and never reaches the step of its base, "
                    f"so `wd_policy` has no effect. Call super().step(closure) in it, "
                    f"or split the groups by hand: selective_optim.param_groups(model, "
                    f"...)."
                )

        handle = self.register_step_post_hook(look)

    @_torch.disable_dynamo
    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, as torch does, and decide for its parameters.

        Args:
            param_group: As for ``torch.optim``; ``"params"`` may also be a module or
                a sequence of modules. ``"wd_policy"`` is a policy for this group
                alone. ``"model"`` is the module that holds its parameters.

        Raises:
            ValueError: The policy cannot decide for a parameter; nothing is added.
        """
        kept = keep([param_group])
        given = kept[0][1] if kept else {}
        groups = self._groups
        count = len(groups)
        try:
            keys = [*self.defaults, *self._keys]
            policy, group = self._decider.unpack(param_group, keys)
            self._append_group(group)
            decided = self._decider.add_group(groups, policy, group is not param_group)
            if policy is None:
                warn_of_origin(self, given, group["params"])
            self._split_last_group(given)
        except BaseException:
            # torch appended it, and would refuse its parameters the next time.
            del groups[count:]
            put_back(kept)
            raise
        if decided:  # else a constructor goes on
            self._compare_ranks()

    def _compare_ranks(self: Any) -> None:  # also of `Routed`
        """Have what is decided now compared with other ranks at the next step."""
        self._watch = self._watch or Watch()
        if self._decider.parent is None:  # else all routes are compared together
            self._watch.found = bool(self._decider.index.discovered)

    def _append_group(self, group: Group) -> None:
        super().add_param_group(group)

    def _split_last_group(self, given: Group) -> None:
        """Make lasting parts of a group that came like this, now that it is decided."""

    @property
    def param_groups(self) -> list[Group]:
        """The user's groups, as in torch; inside a step its class sees the parts."""
        shown = self._shown.param_groups
        if shown is not None:
            return shown
        # The step of the class itself, called on this object, would see no parts.
        own = self._class_step_code
        if own is not None and sys._getframe(1).f_code is own:
            self._refuse_foreign_step(self._groups)
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        self._groups = groups
        if "_shown" not in vars(self):  # torch's constructor, or a copy
            self._shown = Shown()
            self._threads_inside: set[int] = set()
            self._stepper = Stepper(self._kernel)
            if self._kernel.planned:  # a dict that is nobody's yet
                self._states = vars(self).pop("state", None)

    @property
    def _inside(self) -> bool:
        return self._shown.param_groups is not None

    def _show(self, parts: list[Group] | None) -> None:
        """Let the class see parts where its groups are, in this thread alone."""
        self._shown.param_groups = parts

    state: Any = StateAttribute()

    def _take_state(self) -> Any:
        """Return the state, which may have been seen, assigned, or kept elsewhere."""
        stepper, states = self._stepper, self._states
        if "state" in vars(self) or states is None:
            self._states = None
            if not stepper.exposed:
                stepper.expose({})  # what was there goes; counters need no parting
            states = self.state
        elif stepper.seen:
            stepper.expose(states)
        return states

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient, each with its own decay.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            ValueError: A hyperparameter is NaN, or a new parameter cannot be decided.
            RuntimeError: A parameter with a sparse gradient decays.
        """
        # Only code that is compiled can tell that it is.
        if torch.compiler.is_compiling():
            return self._step_groups_as_is(closure, True)
        return _torch.uncompiled(self._step_groups, closure, False)

    def _step_groups(self, closure: Callable[[], Any] | None, compiling: bool) -> Any:
        """Step the parts: the class those that are not planned, then the plan."""
        self._reached = True
        if self._kernel.counts:
            # As torch does: Adam asks, whose counters must then live on the device, and
            # SGD does not.
            _torch.check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        may_choose = not (compiling or self.defaults["differentiable"])
        states = self._take_state()
        waiting = self._untouched or self._decider.waits()
        # In groups the decider looks for new keys.
        if compiling or waiting or not WRITTEN.isdisjoint(self.defaults):
            self._begin_training()
        stepper, groups = self._stepper, self.param_groups
        # A plan serves one thread at a time; others let the class step all parts. No
        # lock: after an interrupt anywhere the next step of a thread plans again.
        mine = stepper.claim()
        try:
            plans = may_choose and mine and stepper.plans_for(groups)
            if plans and self._is_torchs():
                given = (groups, self.decided_params, states)
                stepper.step(*given, scaling_of(self), self._step_planned_parts)
            else:
                self._step_unplanned(may_choose, compiling)
        finally:
            stepper.finish(mine, states)
        if not compiling and self._watch is not None:
            self._look()
        return loss

    _step_groups_as_is = _torch.run_as_is(_step_groups)

    @_torch.disable_dynamo
    def _look(self) -> None:
        if (watch := self._watch) is not None:  # another thread may end it
            self._watch = watch.look(self._groups, self._decider.layout, self._kernel)

    @_torch.disable_dynamo
    def _begin_training(self) -> None:
        """Take what parameters decay towards, if that is what they are now."""
        decider = self._decider
        decider.refuse_written(self.defaults)
        if self._untouched:
            self._untouched = False
            # State that is there now was written past `load_state_dict`, with no
            # record: by ZeroRedundancyOptimizer, whose attribute `optim` this is.
            states = self._take_state()
            if any(map(states.get, params_of(self.param_groups))):
                now = list(chain(*self._record()))
                self._resume([None] * len(now), now, "optimizer.optim")
        if decider.begin_training(self.param_groups):
            self._decided_anew()

    @_torch.use_grad_for_differentiable
    @_torch.run_as_is
    def _step_unplanned(self, may_choose: bool, compiling: bool) -> None:
        given = (self.param_groups, self.decided_params, self._take_state())
        if parts := self._stepper.unplanned_parts(*given, may_choose):
            self._step_parts_as_is(parts, compiling, planned=False)

    def _step_parts(
        self, parts: Sequence[Part], compiling: bool = False, planned: bool = True
    ) -> None:
        """Let the class of torch step parts, as if they were groups split by hand."""
        step = _torch.unhooked(super().step)
        around = AroundStep(self, self._take_state())
        call: Any = _torch.uncompiled if compiling else lambda f, *args: f(*args)
        views: list[View] = []
        try:
            views = call(self._views, parts, not compiling, planned)
            if call(around.begin, views):
                self._show([view.group for view in views])
                # One that bears torch's mark runs the hooks, which ran before.
                hooked = getattr(step, "hooked", False)
                with _torch.without_step_hooks(self) if hooked else nullcontext():
                    step(self)
                call(around.finish)
        finally:
            self._shown.param_groups = None  # no call, which an interrupt may precede
            call(around.restore)
            for view in views:
                view.group["params"] = []  # one that leaves must be freed

    _step_parts_as_is = _torch.run_as_is(_step_parts)
    # Not a block: an interrupt between a block and its end would leave autograd off.
    _step_planned_parts = torch.no_grad()(_step_parts)

    def _views(self, parts: Sequence[Part], reading: bool, planned: bool) -> list[View]:
        groups = self.param_groups
        params = params_of(groups)
        # torch's own read the keys that a plan guards, and their views may be kept.
        keeps = READ.issuperset(self.defaults) and (planned or self._is_torchs())
        views = []
        for part in parts:
            if (view := part.view) is None or not keeps:
                group = groups[part.key.group]
                # Asked for key by key: a group may be a dict that computes its values.
                shown = {key: group[key] for key in group if key in READ or not keeps}
                view = view_of(part, shown, self._kernel, params, reading)
                part.view = view if keeps and not view.fleeting else None
            view.group["params"] = list(part.pick_params(params))
            views.append(view)
        return views

    def _is_torchs(self) -> bool:
        """Tell whether torch alone steps; others may make state, or read any key."""
        methods = super().step, super()._init_group  # type: ignore[misc]  # torch's
        ours = type(self)._init_group is SelectiveOptimizer._init_group
        ours = ours and "_init_group" not in vars(self)
        return ours and all(map(_torch.is_torchs, methods))

    def decided_params(self) -> list[DecidedParam]:
        """List every parameter, in order, with what was decided for it."""
        groups = self.param_groups
        self._decider.decisions_to_step(groups)
        return list(self._decider.decided(groups))

    def _init_group(self, group: Group, *lists: Any, **named: Any) -> Any:
        """Fill the lists in a step of ours alone: torch's own knows no policy."""
        if not self._inside:
            self._refuse_foreign_step([group])
        return super()._init_group(group, *lists, **named)  # type: ignore[misc]  # torch's

    def _refuse_foreign_step(self, groups: Iterable[Group]) -> None:
        for group in groups:
            policy = self._decider.decided_by(group["params"])
            fixed = any(known.decision.decay.fixed for known in self.decided_params())
            if policy is not None and (fixed or group["weight_decay"]):
                raise RuntimeError(
                    f"the step of another class was called on this "
                    f"{type(self).__name__}: it would decay parameters that "
                    f"{policy!r} exempts. Type optimizer.step()."
                )

    @property
    def wd_policy(self) -> Policy | None:
        """The policy. If you assign one, it decides again for every parameter."""
        return self._decider.policy

    @wd_policy.setter
    def wd_policy(self, wd_policy: WdPolicy) -> None:
        before = self._decider.snapshot(self.param_groups)
        # First: an interrupt must not leave the old one in force.
        self._stepper.forget()
        self._decider.assign(wd_policy, self.param_groups)
        try:
            self._decided_anew()
        except BaseException:
            # There may be parts that cannot come together.
            self._decider = Decider.restored(before, self.param_groups)
            raise
        self._compare_ranks()

    def _decided_anew(self) -> None:
        """Take note of other decisions, or refuse them."""
        self._stepper.forget()

    def decay_report(self) -> DecayReport:
        """Report what decays: ``print`` shows a table, ``rows`` has each parameter."""
        decided = self._decider.decisions_to_read(self.param_groups)
        groups, index = self.param_groups, self._decider.index
        rows = make_rows(groups, decided, self._form_of, index)
        return report_on(rows, groups, index, loss_of(self._kernel, groups, decided))

    def _form_of(self, group: Group) -> Form | None:
        return self._kernel.default_form(group) or form_of_class(self, group)

    def __repr__(self) -> str:
        text = super().__repr__()
        if self.wd_policy is None:
            return text
        return f"{text.removesuffix(')')}wd_policy: {self.wd_policy!r}\n)"

    @_torch.disable_dynamo
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return torch's state dict, with what was decided.

        ``"decay"`` holds, group by group, ``[multiplier, form]`` for each parameter. A
        third item is a dict of what else is known: ``"name"``, ``"fixed"``,
        ``"target"``, and the first rate and value, ``"lr0"`` and ``"init"``.
        ``"decay_policies"`` holds the policy of each group as text, and ``"parts"``
        what a class of ``selective`` keeps for each decay in a group.
        """

        def record(_: object, state_dict: dict[str, Any]) -> dict[str, Any]:
            for group in state_dict["param_groups"]:
                for name in own_keys(group):
                    del group[name]
            return {**state_dict, **self._own_entries()}

        # Before the user's hooks, which may change the state dict.
        with self.register_state_dict_post_hook(record, prepend=True):
            saved: dict[str, Any] = super().state_dict(*args, **kwargs)
        return saved

    def _own_entries(self) -> dict[str, Any]:
        return {RECORD: self._record(), POLICIES: self._decider.policies()}

    def _record(self, decided: Decided | None = None) -> Record:
        if decided is None:
            decided = self._decider.decisions_to_read(self.param_groups)
        forms = list(map(self._kernel.default_form, self.param_groups))
        return record_of(forms, decided)

    @_torch.disable_dynamo
    def load_state_dict(
        self, state_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Load a state dict of this class, or of torch's class of the same name.

        The policy does not change. If you did not choose an implementation, the
        optimizer chooses it again.

        Raises:
            TypeError: It is not a dict.
            ValueError: It does not fit this optimizer; then nothing is loaded.

        Warns:
            UserWarning: It records other decisions than those of the policy, or its
                groups decay with 0 parameters that the policy decays.
        """
        require_dict(state_dict)
        decided = self._decider.decisions_to_read(self.param_groups)
        before = [group["weight_decay"] for group in self.param_groups]
        loaded = state_dict  # some classes run no hooks

        def adapt(optimizer: Any, adapted: dict[str, Any]) -> dict[str, Any]:
            nonlocal loaded
            self._require_loadable(adapted, decided)
            loaded = adapted
            groups = groups_to_load(self._kernel, adapted, self.param_groups)
            return {**adapted, "param_groups": groups}

        # Registered last: hooks of the user may adapt the state dict first.
        with self.register_load_state_dict_pre_hook(adapt):
            super().load_state_dict(state_dict, *args, **kwargs)
        record, texts = loaded.get(RECORD), loaded.get(POLICIES)
        entries = entries_of(record, decided)
        saved = None if record is None else entries
        groups, now = self.param_groups, list(chain(*self._record(decided)))
        warn_of_changes(decided, before, groups, saved, now, texts, as_policy)
        self._untouched = False
        self._resume(entries, now)
        self._loaded(loaded)

    def _require_loadable(self, state_dict: dict[str, Any], decided: Decided) -> None:
        require_loadable(self._kernel, self.param_groups, decided, state_dict)

    def _loaded(self, state_dict: dict[str, Any]) -> None:
        """Take over what a state dict holds beside torch's entries and the record."""

    def _resume(
        self, entries: Iterable[Any], now: Iterable[Any], whose: str = "optimizer"
    ) -> None:
        """Go on from where training began, if a state dict records that."""
        begins = list(map(begin_in, entries))
        # Mostly no rate, target or value is recorded, here or there.
        if {"name", "fixed"}.issuperset(chain(*begins, *map(begin_in, now))):
            return
        lost = self._decider.resume(self.param_groups, begins)
        warn_of_lost(*lost, whose)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Not `__getstate__`, which subclasses override with torch's three keys.
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, state, *rest = reduced
        groups = self._groups
        copied = {
            "decider": self._decider.snapshot(groups),
            "watch": self._watch,
            "kernel": self._kernel,
            "states": id(self.state),
        }
        own = {"state": self.state, "param_groups": groups, COPIED: copied}
        state = {k: v for k, v in state.items() if k not in TRANSIENT}
        return (make, args, {**state, **own}, *rest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        rest = dict(state)
        copied = rest.pop(COPIED, {})
        if copied:
            self._kernel = copied["kernel"]
        # Loading sets these by this method, too. torch would write them into __dict__,
        # past the property.
        for name in ("param_groups", "state"):
            if name in rest:
                setattr(self, name, rest.pop(name))
        states = self._take_state()
        super().__setstate__(rest)
        if copied:
            self._decider = Decider.restored(copied["decider"], self.param_groups)
            alive.add(self)
            self._watch = copied["watch"]
        # `copy.copy` shares the state, whose counters the original has in hand.
        if (
            self._kernel.planned
            and "state" in state
            and copied.get("states") != id(states)
        ):
            self._stepper.adopt(self.param_groups, states)
