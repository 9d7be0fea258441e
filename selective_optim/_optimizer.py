"""What SGD, Adam and AdamW share: a stepper beside the decider; state and copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim._base import Model, PolicyOptimizer, alive
from selective_optim._decider import Decider
from selective_optim._loading import (
    RECORD,
    form_name,
    require_dict,
    require_loadable,
    warn_of_changes,
)
from selective_optim.decay import Decay, Form
from selective_optim.factories import given
from selective_optim.step.cells import Member, free_choice
from selective_optim.step.kernel import NO_SCALING, Kernel, Scaling, States
from selective_optim.step.stepper import Stepper


class SelectiveOptimizer(PolicyOptimizer):
    """Decides once for every parameter and applies the decisions in ``step()``.

    Stands before a class of ``torch.optim`` whose constructor, groups and state
    stay what they are. What is added lives in attributes of its own.
    """

    # Not ``state``: __dict__["state"] cannot be read inside a compiled step of 2.7.
    _states: States
    _stepper: Stepper

    # Construction.

    @contextmanager
    def _deciding(
        self, params: Any, wd_policy: object, model: Model, kernel: Kernel
    ) -> Iterator[Any]:
        """Give torch's constructor what it takes, then decide for all groups."""
        self._decider = Decider(*given(model, wd_policy))
        self._stepper = Stepper(kernel)
        self._decider.begin()
        yield self._decider.index.learn(params)
        self._decider.settle(self.param_groups)
        self._decider.index.let_go()
        alive.add(self)
        self._stepper = Stepper(kernel)  # torch has let go of the state it made

    # Stepping.

    @property
    def state(self) -> Any:
        """State tensors by parameter, as in torch."""
        if not torch.compiler.is_compiling():  # which cannot set attributes in 2.7
            self._stepper.lend(self._states)
        return self._states

    @state.setter
    def state(self, value: Any) -> None:
        self._stepper.lend({})  # what was there goes, and was seen by nobody
        self._states = value

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
        kernel = self._stepper.kernel
        if kernel.counts:
            _torch.check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling() or self.defaults["differentiable"]:
            for group in self.param_groups:
                self._step_traced(group)
            return loss
        scaling = Scaling(
            getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        )
        if type(self)._init_group is SelectiveOptimizer._init_group:
            self._stepper.step(self.param_groups, self._members, self._states, scaling)
        else:
            self._step_begun_elsewhere(scaling)
        return loss

    def _members(self) -> list[Member]:
        decided = self._decider.decisions(self.param_groups, self.defaults)
        return [
            Member(param, index, decision.decay, decision.label(index, position))
            for index, (group, decisions) in enumerate(zip(self.param_groups, decided))
            for position, (param, decision) in enumerate(
                zip(group["params"], decisions)
            )
        ]

    def _step_traced(self, group: dict[str, Any]) -> None:
        """Step a group as torch does, for compilation and autograd to trace."""
        lists: list[list[Any]] = [[] for _ in self._stepper.kernel.traced_lists]
        flag, parts = self._init_group(group, *lists, split=True)
        self._step_lists(group, lists, flag, parts, NO_SCALING)

    def _step_begun_elsewhere(self, scaling: Scaling) -> None:
        """Step as torch does where a subclass has its own ``_init_group``.

        It may make state, and choose or change the gradients, at every step.
        """
        for group in self.param_groups:
            lists: list[list[Any]] = [[] for _ in self._stepper.kernel.traced_lists]
            self._filling = True
            try:
                flag = self._init_group(group, *lists)
            finally:
                del self._filling
            parts = self._parts(group, lists[0])
            self._step_lists(group, lists, flag, parts, scaling)

    def _step_lists(
        self,
        group: dict[str, Any],
        lists: list[list[Any]],
        flag: bool,
        parts: Sequence[Any],
        scaling: Scaling,
    ) -> None:
        """Step lists that were filled as torch fills them, by torch's functional."""
        kernel = self._stepper.kernel
        for multiplier, form, chosen in parts:
            setting = kernel.setting(group, Decay(multiplier, form))
            mine = [[each[i] for i in chosen] if each else [] for each in lists]
            kernel.traced(setting, mine, flag, scaling)
            kernel.keep(self.state, mine)

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
        if not split and not hasattr(self, "_filling"):
            self._refuse_foreign_step(group)
        fill = getattr(super(), "_init_group", None)
        if fill is None:
            flag = self._stepper.kernel.fill(group, self.state, lists)
        else:
            flag = fill(group, *lists)
        return (flag, self._parts(group, lists[0])) if split else flag

    def _parts(self, group: dict[str, Any], params: Sequence[Tensor]) -> Sequence[Any]:
        """Tell which parameters of a group were decided alike."""
        index = next(i for i, own in enumerate(self.param_groups) if own is group)
        decided = self._decider.decisions(self.param_groups, self.defaults)[index]
        decays = {id(p): d.decay for p, d in zip(group["params"], decided)}
        parts: dict[tuple[Any, ...], list[int]] = {}
        for position, param in enumerate(params):
            decay = decays[id(param)]
            parts.setdefault((decay.multiplier, decay.form), []).append(position)
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

    def _form_of(self, group: dict[str, Any], form: Form | None) -> Form:
        return form_name(self._stepper.kernel.decoupled(group, form))

    def _decided_anew(self) -> None:
        self._stepper.forget()

    # State dicts and copies.

    @_torch.disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict and, under ``"decay"``, what decays how.

        ``"decay"`` holds, group by group, a ``[multiplier, form]`` per parameter.
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
            require_loadable(self._stepper.kernel, self.param_groups, decided, adapted)
            saved.append(adapted.get(RECORD))
            return {**adapted, "param_groups": self._left_open(adapted)}

        # Registered last: hooks of the user may adapt the state dict first.
        handle = self.register_load_state_dict_pre_hook(adapt)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        warn_of_changes(decided, before, self.param_groups, saved[0], self._record())

    def _left_open(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """Leave the implementation open where it is open now, whoever saved."""
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
                "kernel": self._stepper.kernel,
                "decider": self._decider.snapshot(self.param_groups, self.defaults),
                "states": id(self._states),
            },
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        rest = dict(state)
        copied = rest.pop("_copied", None)
        if copied is not None:
            self._stepper = Stepper(copied["kernel"])
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
