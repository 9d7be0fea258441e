"""What every selective optimizer has, and what SGD, Adam and AdamW share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from threading import RLock, local
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from selective_optim import _torch
from selective_optim._arguments import require_numbers
from selective_optim._decider import OWN_KEYS, Decider
from selective_optim._deciding_for import given
from selective_optim._state_dict import (
    RECORD,
    Decided,
    Record,
    begins_of,
    record_of,
    require_dict,
    require_loadable,
)
from selective_optim._warnings import (
    warn_of_changes,
    warn_of_lost_inits,
    warn_of_lost_policy,
    warn_of_lost_rates,
)
from selective_optim.decay import Form
from selective_optim.fused.guards import params_of
from selective_optim.fused.stepper import Stepper
from selective_optim.policies.base import Policy
from selective_optim.policies.named import WdPolicy
from selective_optim.report import DecayReport, make_report
from selective_optim.step.grad_scaler import scaling_of
from selective_optim.step.implementation import free_choice
from selective_optim.step.kernel import Kernel
from selective_optim.step.parts import DecidedParam, Part
from selective_optim.step.setting import States
from selective_optim.step.views import ClassStep, View

Model = nn.Module | Sequence[nn.Module] | None


# Whoever writes a group by hand names a few keys; an optimizer fills in these.
FILLED = {"lr", "weight_decay", "maximize", "foreach", "differentiable"}
# Every optimizer that decided, while it lives.
alive: WeakSet[PolicyOptimizer] = WeakSet()


class Shown(local):
    """What stands for the groups in a thread that is inside a step; else ``None``.

    ``torch.compile`` runs ``_init_group`` as it is for groups under this name alone.
    """

    param_groups: list[dict[str, Any]] | None = None


class PolicyOptimizer(torch.optim.Optimizer):
    """Knows who decays in its groups; how that is applied is left to subclasses."""

    _decider: Decider
    _groups: list[dict[str, Any]]
    _shown: Shown
    _lock: Any

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The user's groups, as in torch; inside a step its class sees the parts."""
        shown = self._shown.param_groups
        return self._groups if shown is None else shown

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups
        if "_shown" not in vars(self):  # torch's constructor, or a copy
            self._shown, self._lock = Shown(), RLock()

    @property
    def _inside(self) -> bool:
        return self._shown.param_groups is not None

    def _default_form(self, group: dict[str, Any]) -> Form | None:
        """Tell in which form a group decays by itself; ``None`` if unknown."""
        raise NotImplementedError  # pragma: no cover

    def _decided_anew(self) -> None:
        """Take note that the policy was assigned, or refuse it."""

    def _group_keys(self) -> Iterable[str]:
        """List the keys that are read in a group, which a misspelt one resembles."""
        return self.defaults

    @_torch.disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch does, and decide for its parameters.

        Args:
            param_group: As for ``torch.optim``; ``"params"`` may also be a module or
                a sequence of modules, ``"wd_policy"`` overrides the constructor's,
                and ``"model"`` adds to the modules that are known.

        Raises:
            ValueError: The policy cannot be decided; then nothing is added.
        """
        filled = isinstance(param_group, dict) and param_group.keys() >= FILLED
        policy, group = self._decider.open(param_group, self._group_keys())
        super().add_param_group(group)
        try:
            self._decider.arrive(self.param_groups, policy, group is not param_group)
        except BaseException:
            # torch appended it already, and would refuse its parameters the next time.
            self.param_groups.pop()
            raise
        if filled and policy is None and group["weight_decay"]:
            self._warn_of_lost_policy(group)

    def _warn_of_lost_policy(self, group: dict[str, Any]) -> None:
        """Warn if a group was another optimizer's: it does not bring the policy along.

        Nor can the policy be taken along: a dict that was given to two optimizers,
        one with a policy and one without, looks the same.
        """
        for other in [each for each in alive if each is not self]:
            if policy := other._decider.decided_by(group["params"]):
                warn_of_lost_policy(policy)
                return

    @property
    def wd_policy(self) -> Policy | None:
        """Who decays. Assigning decides anew for every parameter, or raises."""
        return self._decider.policy

    @wd_policy.setter
    def wd_policy(self, wd_policy: WdPolicy) -> None:
        before = self._decider.snapshot(self.param_groups, self.defaults)
        self._decider.assign(wd_policy, self.param_groups)
        try:
            self._decided_anew()
        except BaseException:
            # A split optimizer may find parts that cannot come together.
            self._decider = Decider.restored(before, self.param_groups)
            raise

    def decay_report(self) -> DecayReport:
        """Tell what decays: in sum when printed, per parameter in ``rows``."""
        # Not `decisions`: who looks is told later, by the step, what is wrong.
        decided = self._decider.readable(self.param_groups, self.defaults)
        return make_report(self.param_groups, decided, self._default_form)

    def __repr__(self) -> str:
        text = super().__repr__()
        if self.wd_policy is None:
            return text
        return f"{text.removesuffix(')')}wd_policy: {self.wd_policy!r}\n)"

    def _record(self, decided: Decided | None = None) -> Record:
        """Write down how every parameter decays, as a state dict holds it."""
        if decided is None:
            decided = self._decider.readable(self.param_groups, self.defaults)
        forms = [self._default_form(group) for group in self.param_groups]
        return record_of(forms, decided)

    def _resume(self, saved: Any, now: Record) -> None:
        """Go on from where training began, if a state dict records that."""
        begins = begins_of(saved, self.param_groups)
        # As a rule nothing depends on it, here or there: no third places.
        if not any(begins) and max(map(len, chain(*now)), default=0) < 3:
            return
        inits, rates = self._decider.resume(self.param_groups, begins)
        if inits:
            warn_of_lost_inits(inits)
        if rates:
            warn_of_lost_rates(rates)

    def _recorded(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Add the record to torch's state dict, and take out what torch lacks."""
        for group in state_dict["param_groups"]:
            for name in OWN_KEYS:
                group.pop(name, None)
        state_dict[RECORD] = self._record()
        return state_dict


class SelectiveOptimizer(PolicyOptimizer):
    """Decides once for every parameter and applies the decisions in ``step()``.

    Stands before a class of ``torch.optim`` whose constructor, groups and state
    stay what they are. What is added lives in attributes of its own.
    """

    _states: States
    _kernel: Kernel
    _stepper: Stepper

    # Construction.

    @contextmanager
    def _deciding(
        self,
        params: Any,
        wd_policy: object,
        model: Model,
        kernel: Kernel,
        numbers: Mapping[str, object],
    ) -> Iterator[Any]:
        """Give torch's constructor what it takes, then decide for all groups."""
        require_numbers(numbers)
        self._decider = Decider(*given(model, wd_policy))
        self._kernel = kernel
        yield self._decider.begin(params)
        self._decider.settle(self.param_groups)
        self._decider.index.let_go()
        alive.add(self)

    # Stepping.

    @property
    def state(self) -> Any:
        """State tensors by parameter, as in torch."""
        # The class's own step is no outsider. And 2.7 cannot set attributes as it
        # compiles.
        if not self._inside and not torch.compiler.is_compiling():
            self._stepper.expose(self._states)
        return self._states

    @state.setter
    def state(self, value: Any) -> None:
        self._states = value
        if "_stepper" in vars(self):
            self._stepper.expose({})  # what was there goes; counters need no parting
        else:  # torch's constructor, which does not keep the dict that it makes
            self._stepper = Stepper(self._kernel)

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
        return self._step(closure, torch.compiler.is_compiling())

    @_torch.run_as_is
    def _step(self, closure: Callable[[], Any] | None, compiling: bool) -> Any:
        if self._kernel.counts:
            # As torch does: Adam asks, whose counters must then live on the device, and
            # SGD does not.
            _torch.check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        differentiable = self.defaults["differentiable"]
        # A subclass's own `_init_group` may make state, and choose the gradients.
        own = type(self)._init_group is not SelectiveOptimizer._init_group
        planned = not (compiling or differentiable or own)
        step, stepper = _torch.unhooked(super().step), self._stepper
        scaling = scaling_of(self)
        with torch.set_grad_enabled(differentiable):
            parts = stepper.begin(self.param_groups, self, self._states, planned)
            try:
                if parts:
                    views = self._views(parts, reading=not compiling)
                    around = (self, views, self._kernel, self._states, scaling)
                    with ClassStep(*around) as stepping:
                        if stepping:
                            step(self)
                stepper.run(scaling)
            except BaseException:
                stepper.forget()  # how far a failed step came is not known
                raise
            finally:
                stepper.end(self._states)
        return loss

    def decided_params(self) -> list[DecidedParam]:
        """List every parameter, in order, with what was decided for it."""
        decided = self._decider.fitting(self.param_groups, self.defaults)
        return [
            DecidedParam(param, index, position, decision)
            for index, (group, decisions) in enumerate(zip(self.param_groups, decided))
            for position, (param, decision) in enumerate(
                zip(group["params"], decisions)
            )
        ]

    @_torch.disable_dynamo
    def _views(self, parts: Sequence[Part], reading: bool) -> list[View]:
        params, groups = params_of(self.param_groups), self.param_groups
        return [
            View(part, groups[part.key.group], self._kernel, params, reading)
            for part in parts
        ]

    def _show(self, views: list[dict[str, Any]] | None) -> None:
        """Let the class see parts where its groups are, in this thread alone."""
        self._shown.param_groups = views

    @_torch.disable_dynamo
    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> Any:
        """Fill the lists as torch does, for a step of ours alone.

        Raises:
            RuntimeError: torch's own step asks, which knows no policy.
        """
        if not self._inside:
            self._refuse_foreign_step(group)
        return super()._init_group(group, *lists)  # type: ignore[misc]  # torch's

    def _refuse_foreign_step(self, group: dict[str, Any]) -> None:
        policy = self._decider.decided_by(group["params"])
        if policy is not None and group["weight_decay"]:
            name = type(self).__name__
            raise RuntimeError(
                f"the step of a class of torch.optim was called on this {name}: it "
                f"would decay parameters that {policy!r} exempts. "
                f"Type optimizer.step()."
            )

    # The policy.

    def _default_form(self, group: dict[str, Any]) -> Form:
        return self._kernel.default_form(group)

    def _decided_anew(self) -> None:
        self._stepper.forget()

    # State dicts and copies.

    @_torch.disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict and, under ``"decay"``, what decays how.

        ``"decay"`` holds, group by group, a ``[multiplier, form]`` per parameter, and
        in a third place what training began with, where the form or target needs it.
        """

        def record(_: object, state_dict: dict[str, Any]) -> dict[str, Any]:
            return self._recorded(state_dict)

        # Before hooks of the user's, which may put the state dict into another.
        handle = self.register_state_dict_post_hook(record, prepend=True)
        try:
            saved: dict[str, Any] = super().state_dict()
        finally:
            handle.remove()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch's class of the same name.

        The policy stays the constructor's, and an implementation that was chosen
        automatically is chosen again.

        Raises:
            TypeError: It is not a dict.
            ValueError: It does not fit this optimizer; then nothing is loaded.

        Warns:
            UserWarning: It records other decisions than this policy's, or takes the
                decay from parameters that the policy decays.
        """
        require_dict(state_dict)
        decided = self._decider.readable(self.param_groups, self.defaults)
        before = [group["weight_decay"] for group in self.param_groups]
        saved: list[Any] = []

        def adapt(optimizer: Any, adapted: dict[str, Any]) -> dict[str, Any]:
            require_loadable(self._kernel, self.param_groups, decided, adapted)
            saved.append(adapted.get(RECORD))
            return {**adapted, "param_groups": self._left_open(adapted)}

        # Registered last: hooks of the user may adapt the state dict first.
        handle = self.register_load_state_dict_pre_hook(adapt)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        now = self._record(decided)
        warn_of_changes(decided, before, self.param_groups, saved[0], now)
        self._resume(saved[0], now)

    def _left_open(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """Leave the implementation open where it is open now, whoever saved.

        Where it is not, a choice that the checkpoint left open does not undo it.
        """
        # More groups than there are here are torch's to refuse.
        pairs = zip(state_dict["param_groups"], chain(self.param_groups, repeat(None)))
        return [
            {**saved, **{key: mine[key] for key in ("foreach", "fused")}}
            if mine and (free_choice(mine) or free_choice(saved))
            else saved
            for saved, mine in pairs
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_copied": {
                "kernel": self._kernel,
                "decider": self._decider.snapshot(self.param_groups, self.defaults),
                "states": id(self._states),
            },
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        rest = dict(state)
        copied = rest.pop("_copied", None)
        if copied is not None:
            self._kernel = copied["kernel"]
            self._stepper = Stepper(self._kernel)
        # Loading sets these by this method, too, with neither kernel nor decider. torch
        # would write them into __dict__, past the properties.
        for name in rest.keys() & {"state", "param_groups"}:
            setattr(self, name, rest.pop(name))
        super().__setstate__(rest)
        if copied is not None:
            self._decider = Decider.restored(copied["decider"], self.param_groups)
            alive.add(self)
        # `copy.copy` shares the state, whose counters the original has in hand.
        shared = copied is not None and copied["states"] == id(self._states)
        if "state" in state and not shared:
            self._stepper.adopt(self.param_groups, self._states)
