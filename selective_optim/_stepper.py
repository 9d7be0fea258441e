"""Keeping a plan between steps, and making a new one when it is no longer true."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

from selective_optim._cells import Cell, Member
from selective_optim._kernels import Kernel, Scaling, States
from selective_optim._plan import AllCounters, Plan, make_counters
from selective_optim._snapshot import Groups, params_of


class Stepper:
    """Keeps the plan of an optimizer and makes a new one when the old is not true."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._plan: Plan | None = None
        self._counters: AllCounters = {}
        self._counted: list[tuple[int, torch.device]] = []
        self._active: set[int] = set()
        self._warned = False
        self.touched = False  # whether anyone outside may have changed the state

    def forget(self) -> None:
        """Plan anew for a state that was just made, and that nobody else holds."""
        self._plan, self._counters, self._counted = None, {}, []
        self.touched = False

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
            ValueError: A hyperparameter was set to a value out of range.
            RuntimeError: A gradient is sparse where that cannot be stepped.
        """
        plan, grads = self._plan, None
        if plan is not None:
            grads = plan.prove(groups, states if self.touched else None)
        if plan is None or grads is None:
            plan = self._plan = self._new_plan(groups, members(), states)
            grads = plan.gradients()
        if plan.vanishing and not self._warned:
            self._warn_of_vanishing(plan.vanishing)
        plan.run(grads, scaling)
        if plan.once:
            self._plan = None

    def _new_plan(
        self, groups: Groups, members: Sequence[Member], states: States
    ) -> Plan:
        self._plan = None
        counted = [(id(param), param.device) for param in params_of(groups)]
        if counted != self._counted:
            counts = self._kernel.counts
            self._counters = make_counters(params_of(groups)) if counts else {}
            self._counted = counted
        plan = Plan(self._kernel, groups, members, states, self._counters, self._active)
        self._active = plan.active
        return plan

    def _warn_of_vanishing(self, cell: Cell) -> None:
        self._warned = True
        dtype = str(cell.key.dtype).removeprefix("torch.")
        warnings.warn(
            f"1 - lr * weight_decay rounds to 1 or to its neighbor in {dtype}, so "
            f"{cell.label} hardly decays. Keep the parameters in float32, or use fused "
            f"Adam or AdamW, which decay in float32.",
            stacklevel=5,
        )
