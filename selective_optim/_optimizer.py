"""What every selective optimizer has, and what SGD, Adam and AdamW share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

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
from selective_optim.decay import Decay, Form, Terms
from selective_optim.policies.base import Policy
from selective_optim.policies.named import WdPolicy
from selective_optim.report import DecayReport, make_report
from selective_optim.step.cells import Member
from selective_optim.step.fused import free_choice
from selective_optim.step.grad_scaler import NO_SCALING, Scaling, scaling_of
from selective_optim.step.kernel import Kernel
from selective_optim.step.setting import States
from selective_optim.step.stepper import Stepper

Model = nn.Module | Sequence[nn.Module] | None


# Whoever writes a group by hand names a few keys; an optimizer fills in these.
FILLED = {"lr", "weight_decay", "maximize", "foreach", "differentiable"}
# Every optimizer that decided, while it lives.
alive: WeakSet[PolicyOptimizer] = WeakSet()


class PolicyOptimizer(torch.optim.Optimizer):
    """Knows who decays in its groups; how that is applied is left to subclasses."""

    _decider: Decider

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
        groups, index = self.param_groups, self._decider.index
        return make_report(groups, decided, self._default_form, index)

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

    # Not ``state``: __dict__["state"] cannot be read inside a compiled step of 2.7.
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
        if not torch.compiler.is_compiling():  # which cannot set attributes in 2.7
            self._stepper.lend(self._states)
        return self._states

    @state.setter
    def state(self, value: Any) -> None:
        self._states = value
        if "_stepper" in vars(self):
            self._stepper.lend({})  # what was there goes; counters need no parting
        else:  # torch's constructor, which does not keep the dict that it makes
            self._stepper = Stepper(self._kernel)

    @_torch.use_grad_for_differentiable
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
        kernel = self._kernel
        if kernel.counts:
            # As torch does: Adam asks, whose counters must then live on the device, and
            # SGD does not.
            _torch.check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling() or self.defaults["differentiable"]:
            for group in self.param_groups:
                self._step_traced(group)
            return loss
        scaling = scaling_of(self)
        if type(self)._init_group is SelectiveOptimizer._init_group:
            self._stepper.step(self.param_groups, self._members, self._states, scaling)
        else:
            self._step_begun_elsewhere(scaling)
        return loss

    def _members(self) -> list[Member]:
        decided = self._decider.fitting(self.param_groups, self.defaults)
        return [
            Member(param, index, position, decision)
            for index, (group, decisions) in enumerate(zip(self.param_groups, decided))
            for position, (param, decision) in enumerate(
                zip(group["params"], decisions)
            )
        ]

    def _step_traced(self, group: dict[str, Any]) -> None:
        """Step a group as torch does, for compilation and autograd to trace."""
        lists: list[list[Any]] = [[] for _ in (*self._kernel.traced_lists, "inits")]
        flag, parts = self._init_group(group, *lists, split=True)
        self._step_lists(group, lists, flag, parts, NO_SCALING)

    def _step_begun_elsewhere(self, scaling: Scaling) -> None:
        """Step as torch does where a subclass has its own ``_init_group``.

        It may make state, and choose or change the gradients, at every step.
        """
        for group in self.param_groups:
            lists: list[list[Any]] = [[] for _ in self._kernel.traced_lists]
            self._filling = True
            try:
                flag = self._init_group(group, *lists)
            finally:
                del self._filling
            inits: list[Any] = []
            parts = self._parts(group, lists[0], inits)
            self._step_lists(group, [*lists, inits], flag, parts, scaling)

    def _step_lists(
        self,
        group: dict[str, Any],
        lists: list[list[Any]],
        flag: bool,
        parts: Sequence[Any],
        scaling: Scaling,
    ) -> None:
        """Step lists that were filled as torch fills them, by torch's functional."""
        for multiplier, form, target, lr0, chosen in parts:
            terms = Terms(Decay(multiplier, form, target), lr0)
            setting = self._kernel.setting(group, terms)
            *mine, inits = ([each[i] for i in chosen] if each else [] for each in lists)
            self._kernel.traced(setting, mine, flag, inits, scaling)
            states = self.state
            self._kernel.keep((states[param] for param in mine[0]), mine)

    @_torch.disable_dynamo
    def _init_group(
        self, group: dict[str, Any], *lists: list[Any], split: bool = False
    ) -> Any:
        """Fill the lists as torch does; also return which of them were decided alike.

        ``torch.compile`` runs a method of this name as it is, and compiles what is
        done with the lists.

        Args:
            group: A parameter group.
            lists: What to fill.
            split: Whether to return the parts, too. torch's own step does not ask.

        Raises:
            RuntimeError: torch's own step asks, which knows no policy.
        """
        *filled, inits = lists if split else (*lists, [])
        if not split and not hasattr(self, "_filling"):
            self._refuse_foreign_step(group)
        fill = getattr(super(), "_init_group", None)
        if fill is None:
            flag = self._kernel.fill(group, self.state, filled)
        else:
            flag = fill(group, *filled)
        return (flag, self._parts(group, filled[0], inits)) if split else flag

    def _parts(
        self, group: dict[str, Any], params: Sequence[Tensor], inits: list[Any]
    ) -> Sequence[Any]:
        """Tell which parameters of a group were decided alike, and fill ``inits``."""
        index = next(i for i, own in enumerate(self.param_groups) if own is group)
        decided = self._decider.fitting(self.param_groups, self.defaults)[index]
        known = {id(p): d for p, d in zip(group["params"], decided)}
        present = [known[id(param)] for param in params]
        if any(decision.init is not None for decision in present):
            inits.extend(decision.init for decision in present)
        # Plain values: the compiler guards on what leaves this method, and knows how
        # to for numbers, texts and tuples.
        parts: dict[tuple[Any, ...], list[int]] = {}
        for position, decision in enumerate(present):
            decay, lr0 = decision.terms
            key = (decay.multiplier, decay.form, decay.target, lr0)
            parts.setdefault(key, []).append(position)
        return tuple((*key, tuple(chosen)) for key, chosen in parts.items())

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
        """Leave the implementation open where it is open now, whoever saved."""
        # More groups than there are here are torch's to refuse.
        now = chain(self.param_groups, repeat(None))
        open_choice = {"foreach": None, "fused": None}
        return [
            {**group, **open_choice} if mine and free_choice(mine) else group
            for group, mine in zip(state_dict["param_groups"], now)
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
        # Loading sets the state by this method, too, with neither kernel nor decider.
        if "state" in rest:  # torch would write it into __dict__, past the property
            self.state = rest.pop("state")
        super().__setstate__(rest)
        if copied is not None:
            self._decider = Decider.restored(copied["decider"], self.param_groups)
            alive.add(self)
        # `copy.copy` shares the state, whose counters the original has in hand.
        shared = copied is not None and copied["states"] == id(self._states)
        if "state" in state and not shared:
            self._stepper.settle(self.param_groups, self._states)
