"""Adam with selective weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selective_optim._optimizer import Model, SelectiveOptimizer
from selective_optim.policies.named import WdPolicy
from selective_optim.step.kernels import AdamKernel


class Adam(SelectiveOptimizer, torch.optim.Adam):
    """``torch.optim.Adam`` with a policy that decides per parameter how much decays.

    With ``wd = weight_decay * multiplier``, before torch's update::

        l2:         grad  = grad + wd * param    (grad negated if maximize)
        decoupled:  param = param * (1 - lr * wd)

    Args:
        params: As for torch; also a module or a sequence of modules. A group may
            have its own ``"wd_policy"``.
        lr: Learning rate, >= 0; a number or a tensor of one element.
        betas: Decay rates of the running averages of gradient and squared gradient.
        eps: Added to the denominator.
        weight_decay: Decay of parameters whose multiplier is 1, >= 0.
        amsgrad: Divide by the largest running average of the squared gradient so far.
        foreach: Step lists of tensors in each call. By default, fused kernels step if
            all tensors support them, and else torch's choice.
        maximize: Increase the objective instead of decreasing it.
        capturable: Keep step counters on the device, for CUDA graphs.
        differentiable: Let autograd run through ``step()``.
        fused: Step many tensors in one kernel. If you pass ``True`` and use a
            ``GradScaler``, the step itself divides by the scale.
        decoupled_weight_decay: If the policy states no form, decay the parameters
            directly (AdamW) instead of adding ``wd * param`` to the gradient.
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
        >>> optimizer = Adam(model.parameters(), weight_decay=0.5, wd_policy="no_bias")
        >>> [(row.name, row.weight_decay) for row in optimizer.decay_report().rows]
        [('weight', 0.5), ('bias', 0.0)]

    Source:
        ``torch/optim/adam.py``.
    """

    _kernel = AdamKernel()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        wd_policy: WdPolicy = None,
        model: Model = None,
    ) -> None:
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        flags = {"maximize": maximize, "foreach": foreach, "fused": fused}
        flags |= {"capturable": capturable, "differentiable": differentiable}
        flags["decoupled_weight_decay"] = decoupled_weight_decay
        ours = (params, wd_policy, model, numbers, super().__init__)
        self._construct_deciding(*ours, *numbers.values(), amsgrad, **flags)
