"""The step: by a kept plan, or, for compilation and autograd, as torch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from selective_optim import _torch
from selective_optim._cells import Member, free_choice
from selective_optim._deciding import DecidingOptimizer
from selective_optim._kernels import Group, Kernel, States
from selective_optim._rules import Form
from selective_optim._stepper import Stepper


class SteppingOptimizer(DecidingOptimizer):
    """Steps every parameter with the decay that was decided for it."""

    # Not ``state``: __dict__["state"] cannot be read inside a compiled step of 2.7.
    _states: States

    def _take_kernel(self, kernel: Kernel) -> None:
        super()._take_kernel(kernel)
        self._stepper = Stepper(kernel)

    def _plan_anew(self) -> None:
        self._stepper.forget()

    @property
    def state(self) -> Any:
        """State tensors by parameter, as in torch; once looked at, checked every step.

        Nobody can change what nobody has seen: until then a step need not look.
        """
        if not torch.compiler.is_compiling():  # which cannot set attributes in 2.7
            # Not an attribute of self: wrappers such as Fabric's share our class.
            self._stepper.touched = True
        return self._states

    @state.setter
    def state(self, value: Any) -> None:
        self._stepper.touched = True
        self._states = value

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient, each with its own decay.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            ValueError: A hyperparameter was set to a value out of range.
            RuntimeError: A parameter with a sparse gradient decays.
        """
        if torch.compiler.is_compiling() or self.defaults["differentiable"]:
            return self._functional_step(closure)
        if self._kernel.counts:
            _torch.check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._stepper.step(
                self.param_groups,
                self._members,
                self._states,
                (getattr(self, "grad_scale", None), getattr(self, "found_inf", None)),
            )
        return loss

    def _members(self) -> list[Member]:
        return [
            Member(param, index, d.multiplier, d.form, d.label(index, position))
            for index, (group, decisions) in enumerate(
                zip(self.param_groups, self._decided())
            )
            for position, (param, d) in enumerate(zip(group["params"], decisions))
        ]

    @_torch.use_grad_for_differentiable  # type: ignore[untyped-decorator]
    def _functional_step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step as torch's own ``step`` does, group by group, verdict by verdict."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lists: list[list[Any]] = [[] for _ in range(self._kernel.lists)]
            flag, parts = self._init_group(group, *lists)
            for multiplier, form, chosen in parts:
                setting = self._kernel.setting(group, multiplier, form)
                mine = _pick(lists, chosen)
                self._kernel.traced(setting, mine, flag)
                self._kernel.keep(self.state, mine)
        return loss

    @_torch.disable_dynamo
    def _init_group(self, group: Group, *lists: list[Any]) -> Any:
        """Fill the lists as torch does; also return which of them were decided alike.

        ``torch.compile`` runs a method of this name as it is, and compiles what is
        done with the lists.
        """
        flag = super()._init_group(group, *lists)  # type: ignore[misc]  # of torch's
        index = next(i for i, own in enumerate(self.param_groups) if own is group)
        decided = zip(group["params"], self._decided()[index])
        parts: dict[tuple[float, Form | None], list[int]] = {}
        present = [decision for param, decision in decided if param.grad is not None]
        for position, decision in enumerate(present):
            key = (decision.multiplier, decision.form)
            parts.setdefault(key, []).append(position)
        return flag, tuple((*key, tuple(chosen)) for key, chosen in parts.items())

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tell ``GradScaler`` to hand over its scale instead of synchronizing."""
        return all(group["fused"] or free_choice(group) for group in self.param_groups)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignore what torch's constructor writes: the groups know."""


def _pick(lists: list[list[Any]], chosen: Sequence[int]) -> list[list[Any]]:
    return [[entry[i] for i in chosen] if entry else [] for entry in lists]
