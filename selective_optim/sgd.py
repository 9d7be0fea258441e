"""SGD with selective weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selective_optim._optimizer import Model, SelectiveOptimizer
from selective_optim.policies.named import WdPolicy
from selective_optim.step.kernels import SGDKernel


class SGD(SelectiveOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` with a policy that decides per parameter how much decays.

    With ``wd = weight_decay * multiplier``, before torch's update::

        l2:         grad  = grad + wd * param    (grad negated if maximize)
        decoupled:  param = param * (1 - lr * wd)

    Args:
        params: As for torch; also a module or a sequence of modules. A group may
            have its own ``"wd_policy"``.
        lr: Learning rate, >= 0; a number or a tensor of one element.
        momentum: Factor of the running sum of gradients; 0 keeps none.
        dampening: ``1 - dampening`` is the factor of a gradient in that sum.
        weight_decay: Decay of parameters whose multiplier is 1, >= 0.
        nesterov: Use Nesterov's momentum; needs ``momentum`` > 0 and no dampening.
        foreach: Step lists of tensors in each call. By default, fused kernels step if
            all tensors support them, and else torch's choice.
        maximize: Increase the objective instead of decreasing it.
        differentiable: Let autograd run through ``step()``.
        fused: Step many tensors in one kernel. If you pass ``True`` and use a
            ``GradScaler``, the step itself divides by the scale.
        decoupled_weight_decay: If the policy states no form, decay the parameters
            directly (SGDW) instead of adding ``wd * param`` to the gradient.
        wd_policy: Which parameters decay: a name, a text, a mapping from selectors to
            multipliers, a callable or a policy of ``selective_optim.policies``. A
            multiplier of 0 exempts. With ``None`` all parameters decay.
        model: The module, or modules, that hold the parameters. By default the
            optimizer finds them from ``params``, or searches all modules that exist.

    Raises:
        TypeError: A hyperparameter is a text, or ``wd_policy`` is no policy.
        ValueError: The policy lacks what it needs to decide, or a glob matches nothing.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = SGD(model.parameters(), weight_decay=1.0, wd_policy="no_bias")
        >>> [(row.name, row.weight_decay) for row in optimizer.decay_report().rows]
        [('weight', 1.0), ('bias', 0.0)]

    Source:
        ``torch/optim/sgd.py``; decoupled: Loshchilov and Hutter 2019, Algorithm 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        wd_policy: WdPolicy = None,
        model: Model = None,
    ) -> None:
        numbers = {"lr": lr, "momentum": momentum}
        numbers |= {"dampening": dampening, "weight_decay": weight_decay}
        self._kernel = SGDKernel(decoupled_weight_decay)
        flags = {"maximize": maximize, "foreach": foreach, "fused": fused}
        flags["differentiable"] = differentiable
        ours = (params, wd_policy, model, numbers, super().__init__)
        self._construct_deciding(*ours, *numbers.values(), nesterov, **flags)
