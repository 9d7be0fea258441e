"""What a kernel is: how an optimizer's numbers and tensors reach torch's own code.

There are two, one for Adam and AdamW and one for SGD. Each reads a setting from a
group, makes state as torch does, and turns a setting and lists of tensors into
calls: of torch's fused kernel, or of torch's functional.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import FORMS, Decay, Form, Terms, is_zero
from selective_optim.step.decay_ahead import ahead_calls
from selective_optim.step.grad_scaler import NO_SCALING, Scaling
from selective_optim.step.setting import (
    Ahead,
    Batch,
    Call,
    Group,
    Groups,
    Setting,
    State,
    States,
)

NUMBERS = (float, int, Tensor, Real)  # the common ones first: asked at every change


class Share(NamedTuple):
    """How the decay of parameters is parted.

    Args:
        form: The form that torch's kernel is told.
        wd: The decay that it is given.
        ahead: What goes ahead of it.
        fleeting: See :class:`Setting`.
    """

    form: Form
    wd: float | Tensor
    ahead: Ahead | None = None
    fleeting: bool = False


class Kernel:
    """Reads settings, makes state, and calls torch; it keeps nothing of a step."""

    counts: bool  # whether state holds a step counter
    required: tuple[str, ...]  # keys that a loaded group must have
    flags: tuple[str, ...]  # keys that fused kernels take as bool alone
    # What torch's `_init_group` fills for a step that is traced: state entries after
    # the parameters and their gradients.
    traced_lists: tuple[str, ...]

    # The forms that torch's kernel applies by itself, given a number.
    own_forms: tuple[Form, ...]

    def default_form(self, group: Group) -> Form:
        """Return the form of parameters for which no other was decided."""
        raise NotImplementedError  # pragma: no cover

    def setting(self, group: Group, terms: Terms, first: bool = False) -> Setting:
        """Read what the kernel is given from the group as it is now.

        Args:
            group: A parameter group.
            terms: What was decided for the parameters.
            first: Whether their momentum buffers are yet to begin.
        """
        raise NotImplementedError  # pragma: no cover

    def share(self, group: Group, terms: Terms) -> Share:
        """Part the decay: what torch's kernel does by itself, and what goes ahead."""
        (decay, lr0), default = terms, self.default_form(group)
        wd = decay.of(group["weight_decay"])
        if is_zero(wd):
            return Share(default, 0.0)
        form = FORMS[decay.form or default]
        fleeting = form.follows_lr and isinstance(group["lr"], Tensor)
        if lr0 is not None:
            wd = form.strength(wd, _rate(group["lr"]) if fleeting else group["lr"], lr0)
        # A kernel's decay is a number; one on a device is not to be waited for.
        waits = fleeting and isinstance(wd, Tensor)
        if form.applied in self.own_forms and not decay.target and not waits:
            return Share(form.applied, wd, None, fleeting)
        ahead = Ahead(form.applied, wd, decay.target or 0.0)
        return Share(default, 0.0, ahead, fleeting)

    @staticmethod
    def direction(
        setting: Setting, grad: Tensor, moments: Sequence[Tensor | None]
    ) -> Tensor:
        """Return what has the sign of the update, of which torch subtracts a multiple.

        Args:
            setting: What the kernel is given.
            grad: A gradient.
            moments: Its moments as they are before the step; ``None`` where one is
                yet to begin.
        """
        raise NotImplementedError  # pragma: no cover

    def entries(self, group: Group) -> tuple[str, ...]:
        """Name the state tensors that are shaped like the parameter."""
        raise NotImplementedError  # pragma: no cover

    def loaded_entries(self, group: Group) -> tuple[str, ...]:
        """Name what a checkpoint must hold of a parameter that has state."""
        return ("step", *self.entries(group)) if self.counts else self.entries(group)

    def structure(self, group: Group) -> tuple[object, ...]:
        """Read the flags that decide which tensors and which path a step uses."""
        raise NotImplementedError  # pragma: no cover

    def trusted(self, param: Tensor) -> bool:
        """Tell whether the fused kernel is right for this dtype and device."""
        raise NotImplementedError  # pragma: no cover

    def takes_beside(self, param: Tensor, moment: Tensor) -> bool:
        """Tell whether the fused kernel reads a moment of this dtype."""
        return moment.dtype == param.dtype

    def has_state(self, own: State | None, group: Group) -> bool:
        """Tell whether a parameter has stepped before."""
        raise NotImplementedError  # pragma: no cover

    def unbegin(self, own: State, group: Group) -> None:
        """Take back state of a first step that a scaler dropped, if it matters."""

    def begin(
        self, own: State, param: Tensor, group: Group, fused: bool, step: Tensor | None
    ) -> None:
        """Make state as torch does at a first gradient, in one update.

        Args:
            own: The state to fill.
            param: Whose it is.
            group: The parameter's group.
            fused: Whether the parameter goes to the fused kernel.
            step: The counter to use; ``None`` for one of its own.
        """
        raise NotImplementedError  # pragma: no cover

    def calls(self, setting: Setting, batch: Batch, scaling: Scaling) -> list[Call]:
        """Return calls that step a batch: torch's fused kernel, bound to its lists.

        The lists are read when the calls run, so a batch whose gradients are
        replaced in place is stepped again by the same calls.
        """
        before, scaling = self._ahead(setting, batch, scaling)
        return [*before, self.fused_call(setting, batch, scaling)]

    def _ahead(
        self, setting: Setting, batch: Batch, scaling: Scaling
    ) -> tuple[list[Call], Scaling]:
        """Return what goes ahead of the kernel, and what scale is left for it."""
        if setting.ahead is None:
            return [], scaling
        return ahead_calls(setting.ahead, setting, batch, self.direction, scaling)

    def fused_call(self, setting: Setting, batch: Batch, scaling: Scaling) -> Call:
        """Bind torch's fused kernel."""
        raise NotImplementedError  # pragma: no cover

    def functional(
        self,
        setting: Setting,
        params: list[Tensor],
        grads: list[Tensor],
        owns: Sequence[State],
        targets: list[Tensor],
    ) -> None:
        """Step with torch's functional: for-loop, foreach, or torch's own choice."""
        lists = [params, grads, *self.columns(setting, owns)]
        self.traced(setting, lists, self.flag(params, grads), targets)
        self.keep(owns, lists)

    def columns(self, setting: Setting, owns: Sequence[State]) -> list[list[Any]]:
        """List the state as torch's functional takes it: see ``traced_lists``."""
        raise NotImplementedError  # pragma: no cover

    def flag(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Tell what torch's ``_init_group`` tells beside its lists."""
        raise NotImplementedError  # pragma: no cover

    def fill(self, group: Group, states: States, lists: Sequence[list[Any]]) -> bool:
        """Fill the lists of a traced step where torch has no method for it.

        Returns:
            Whether any parameter is complex, or any gradient sparse.
        """
        flag = False
        for param in group["params"]:
            if param.grad is not None:
                flag |= torch.is_complex(param) or param.grad.is_sparse
                own = states[param] if self.entries(group) else {}
                if not self.has_state(own, group):
                    self.begin(own, param, group, False, None)
                entries = [own.get(entry) for entry in self.traced_lists[2:]]
                for each, item in zip(lists, [param, param.grad, *entries]):
                    if item is not None or not self.counts:
                        each.append(item)
        return flag

    def traced(
        self,
        setting: Setting,
        lists: list[list[Any]],
        flag: bool,
        targets: list[Any],
        scaling: Scaling = NO_SCALING,
    ) -> None:
        """Step the lists that torch's ``_init_group`` filled."""
        params, grads, *moments = lists[:3]
        begun = [moment for moment in moments if moment]  # 2.7 traces no `filter`
        batch = Batch(params, begun, [], targets, grads)
        before, scaling = self._ahead(setting, batch, scaling)
        for call in before:
            call()
        given = {} if scaling == NO_SCALING else scaling._asdict()
        self.call_functional(lists, flag, {**setting.arguments, **given})

    def call_functional(
        self, lists: list[list[Any]], flag: bool, arguments: dict[str, Any]
    ) -> None:
        """Call torch's functional."""
        raise NotImplementedError  # pragma: no cover

    def keep(self, owns: Iterable[State], lists: list[list[Any]]) -> None:
        """Write into the state what a step on lists made anew."""

    def takes_numbers(self, group: Group) -> bool:
        """Tell whether fused kernels take the hyperparameters.

        They refuse arrays, flags that are not ``bool``, and a decay in one element.
        """
        values = [value for _, value in self.hyperparameters(group)]
        flags = [group[flag] for flag in self.flags]
        decay = group["weight_decay"]
        return (
            all(map(isinstance, values, repeat(NUMBERS)))
            and all(map(isinstance, flags, repeat(bool)))
            and not (isinstance(decay, Tensor) and decay.ndim)
        )

    def hyperparameters(self, group: Group) -> Iterable[tuple[str, Any]]:
        """Name the numbers that an edit may have spoiled."""
        raise NotImplementedError  # pragma: no cover

    def refuse_sparse(self, group: Group, decay: Decay, label: str) -> None:
        """Raise if a parameter with a sparse gradient cannot be stepped."""
        raise NotImplementedError  # pragma: no cover


def _rate(lr: Tensor) -> float | Tensor:
    """Read a rate where that waits for no device and breaks no trace."""
    readable = lr.is_cpu and not torch.compiler.is_compiling() and not lr.requires_grad
    return lr.item() if readable else lr


def require_no_nan(kernel: Kernel, groups: Groups) -> None:
    """Check hyperparameters that may have been edited since construction.

    What torch steps with, it steps with here, a negative rate included.

    Raises:
        ValueError: One is NaN, which torch would write into every parameter.
    """
    for index, group in enumerate(groups):
        for name, value in kernel.hyperparameters(group):
            if not isinstance(value, Tensor) and value != value:
                raise ValueError(
                    f"`{name}` of group {index} is {value}, which would make every "
                    f"parameter NaN. Set optimizer.param_groups[{index}][{name!r}] "
                    f"to a number."
                )


def decay_vanishes(setting: Setting, fused: bool, dtype: torch.dtype) -> bool:
    """Tell whether ``1 - lr * wd`` is 1 in half precision, or next to it.

    Fused kernels decay in float32, and L2 adds to the gradient: only a multiply of its
    own rounds, ahead of the kernel or in torch's functional.
    """
    own, ahead = setting.arguments, setting.ahead
    wd: float | Tensor = 0.0
    if ahead is not None:
        wd = 0.0 if ahead.applied == "l2" else ahead.wd
    elif not fused and own.get("decoupled_weight_decay"):
        wd = own["weight_decay"]
    rate = own["lr"] * wd
    if dtype not in _torch.HALF or isinstance(rate, Tensor):
        return False
    return bool(0 < rate < torch.finfo(dtype).eps / 2)
