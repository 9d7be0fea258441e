"""What a kernel is: how an optimizer's numbers and tensors reach torch's own code.

There are two, one for Adam and AdamW and one for SGD. Each reads a setting from a
group, makes state as torch does, and binds torch's fused kernel to lists of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from numbers import Real
from typing import Any

from torch import Tensor

from selective_optim.decay import Decay, DecayKey, Form
from selective_optim.step.grad_scaler import Scaling
from selective_optim.step.setting import (
    Batch,
    Call,
    Group,
    Groups,
    Setting,
    Share,
    State,
    share,
)

NUMBERS = (float, int, Tensor, Real)  # the common ones first: asked at every change


class Kernel:
    """Reads settings, makes state, and calls torch; it keeps nothing of a step."""

    counts: bool  # whether state holds a step counter
    required: tuple[str, ...]  # keys that a loaded group must have
    flags: tuple[str, ...]  # keys that fused kernels take as bool alone
    # The forms that torch's kernel applies by itself, given a number.
    own_forms: tuple[Form, ...]

    def default_form(self, group: Group) -> Form:
        """Return the form of parameters for which no other was decided."""
        raise NotImplementedError  # pragma: no cover

    def setting(
        self, group: Group, decay_key: DecayKey, reading: bool = True
    ) -> Setting:
        """Read what the kernel is given from the group as it is now.

        Args:
            group: A parameter group.
            decay_key: What was decided for the parameters.
            reading: Whether to read the number in a rate that is a tensor. A compiled
                step compiles anew where that number is another.
        """
        raise NotImplementedError  # pragma: no cover

    def share(self, group: Group, decay_key: DecayKey, reading: bool) -> Share:
        """Share the decay of a part out: what the class does of it, and what a pass."""
        default = self.default_form(group)
        return share(group, decay_key, default, self.own_forms, reading)

    def show(self, group: Group, shared: Share) -> None:
        """Write into a group, as its class reads it, how a part of it decays."""
        group["weight_decay"] = shared.wd

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

    def begin(
        self, own: State, param: Tensor, group: Group, step: Tensor | None
    ) -> None:
        """Make state as torch makes it for its fused kernel, in one update.

        Args:
            own: The state to fill.
            param: Whose it is.
            group: The parameter's group.
            step: The counter to use; ``None`` for one of its own.
        """
        raise NotImplementedError  # pragma: no cover

    def fused_call(self, setting: Setting, batch: Batch, scaling: Scaling) -> Call:
        """Bind torch's fused kernel."""
        raise NotImplementedError  # pragma: no cover

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
