"""Keeping a plan between steps, and making a new one when it is no longer true."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim._warnings import warn_of_vanishing
from selective_optim.step.cells import Member
from selective_optim.step.counters import Counters
from selective_optim.step.fused import counts_beside, fused_choice, wants_fused
from selective_optim.step.grad_scaler import Scaling
from selective_optim.step.guards import params_of
from selective_optim.step.kernel import Kernel
from selective_optim.step.plan import Plan
from selective_optim.step.setting import Groups, State, States

Place = tuple[torch.dtype, torch.device]


class Stepper:
    """Keeps the plan of an optimizer and makes a new one when the old is not true.

    Args:
        kernel: Of the optimizer's class.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.plans = 0  # how many were made
        self._plan: Plan | None = None
        self._counters = Counters()
        self._stepping: Mapping[int, object] = {}
        self._lent = False
        self._busy, self._seen = False, False  # in a step; state was seen in it
        self._sure = True  # whether state began under the flags of now
        self._warned = False
        # Where each parameter was when its state was last known to fit it.
        self._places: dict[int, tuple[object, Place]] = {}

    def lend(self, states: States) -> None:
        """Take note that someone outside has the state in hand, now or from now on.

        Until then nothing outside can edit it: a step need not look at state, and
        may hold its tensors, and counters may be views of one tensor.

        Args:
            states: The state that is about to be seen.
        """
        if self._busy:  # a mode around the step reads it, between operations
            self._seen = True
        elif not self._lent:
            if self._plan is not None:
                self._plan.lend()
            self._counters.part(states, self._seen)
            # Last: what an interrupt leaves undone is done the next time.
            self._lent, self._seen = True, False

    def forget(self) -> None:
        """Plan anew at the next step, sure of nothing."""
        self._plan, self._sure = None, False

    def settle(self, groups: Groups, states: States) -> None:
        """Take over a state that was loaded or copied.

        Counters that a fused kernel can read stay the tensors that they are, as in
        torch. Others, as those that a for-loop left on the CPU, are made readable.
        """
        self.forget()
        self.note_places(params_of(groups))
        if self.kernel.counts:
            self._fit_counters(groups, states)

    def note_places(self, params: Iterable[Tensor]) -> None:
        """Remember dtype and device of parameters, which their state now fits."""
        self._places = {
            id(token): (token, (param.dtype, param.device))
            for param in params
            for token in [_torch.token_of(param)]
        }

    def _fit_counters(self, groups: Groups, states: States) -> None:
        """Exchange counters that would keep a parameter from the fused kernel."""
        moving: dict[tuple[torch.device, torch.device], list[State]] = {}
        for group in groups:
            choice = fused_choice(self.kernel, group)
            for param in group["params"]:
                own = states.get(param) or {}
                step = own.get("step")
                if (
                    isinstance(step, Tensor)
                    and not counts_beside(param, step)
                    and wants_fused(self.kernel, choice, param)
                ):
                    moving.setdefault((step.device, param.device), []).append(own)
        for (_, device), owns in moving.items():
            # One copy between devices for all.
            values = torch.stack([own["step"].reshape(()).float() for own in owns])
            for own, value in zip(owns, values.to(device).unbind()):
                own["step"] = value.clone()

    def step(
        self,
        groups: Groups,
        members: Callable[[], Sequence[Member]],
        states: States,
        scaling: Scaling,
    ) -> None:
        """Step every parameter that has a gradient.

        Args:
            groups: The optimizer's parameter groups.
            members: Gives every parameter, in order, with what was decided for it.
            states: The optimizer's state, by parameter.
            scaling: ``grad_scale`` and ``found_inf`` of a ``GradScaler``, or ``None``.

        Raises:
            ValueError: A hyperparameter is NaN.
            RuntimeError: A gradient is sparse where that cannot be stepped.
        """
        self._busy = True
        try:
            self._step(groups, members, states, scaling)
        finally:
            self._busy = False
            if self._seen:
                self.lend(states)

    def _step(
        self,
        groups: Groups,
        members: Callable[[], Sequence[Member]],
        states: States,
        scaling: Scaling,
    ) -> None:
        plan = self._plan
        grads = None if plan is None else plan.current_grads(groups, states)
        if plan is None or grads is None:
            plan = self._new_plan(groups, members(), states)
            grads = plan.first_grads()
        if plan.vanishing is not None and not self._warned:
            self._warned, key = True, plan.vanishing.key
            warn_of_vanishing(plan.vanishing.label, key.dtype, key.fused)
        try:
            plan.run(grads, states, scaling)
        except BaseException:
            self.forget()  # how far a failed step came is not known
            raise
        if plan.once:
            self._plan = None

    def _new_plan(
        self, groups: Groups, members: Sequence[Member], states: States
    ) -> Plan:
        # Momentum that a scaler's dropped step left unbegun looks begun; under flags
        # that are new it would be dampened at its first gradient.
        if not self._sure:
            self._unbegin(groups, states)
        elif self._plan is not None:
            self._unbegin(self._plan.changed(groups), states)
        self._plan, self._sure = None, True
        self.plans += 1
        self._follow_moved(groups, members, states)
        if any(group.get("capturable") for group in groups):
            # A CUDA graph remembers where counters lie: they must not move later.
            self._counters.part(states)
        plan = Plan(
            *(self.kernel, groups, members, states),
            *(self._counters, self._lent, self._stepping),
        )
        self.note_places([member.param for member in members])
        self._stepping, self._plan = plan.stepping, plan
        return plan

    def _unbegin(self, groups: Groups, states: States) -> None:
        """Take back state that was begun under other flags, if that matters."""
        for group in groups:
            for param in group["params"]:
                self.kernel.unbegin(states.get(param) or {}, group)

    def _follow_moved(
        self, groups: Groups, members: Sequence[Member], states: States
    ) -> None:
        """Move state to where ``model.to(...)`` moved parameters, as loading would.

        What never fitted its parameter was put there on purpose, as moments of less
        precision are, and stays.
        """
        for param, group, *_ in members:
            token, was = self._places.get(id(_torch.token_of(param)), (None, None))
            now = (param.dtype, param.device)
            # Not seen before, another tensor under the same id, or not moved.
            if was is None or token is not _torch.token_of(param) or was == now:
                continue
            own = states.get(param) or {}
            moving = set(self.kernel.entries(groups[group]))
            choice = fused_choice(self.kernel, groups[group])
            if wants_fused(self.kernel, choice, param):
                moving.add("step")  # which a fused kernel reads beside the parameter
            for entry in moving & own.keys():
                value = own[entry]
                if isinstance(value, Tensor):
                    dtype, device = value.dtype, value.device
                    own[entry] = value.to(
                        now[0] if dtype == was[0] and entry != "step" else dtype,
                    ).to(now[1] if device == was[1] else device)
