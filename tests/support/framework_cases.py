"""What the tests of frameworks share: hand-split groups, small data, who moved."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

NORM = re.compile(r"Norm(?:Act)?(?:\dd)?$")  # how all norms in these tests are called


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def unmoved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Name the parameters that have the bits they had."""
    params = model.named_parameters()
    return {name for name, param in params if torch.equal(param, before[name])}


def exempt_names(model: nn.Module) -> set[str]:
    """Name the biases, and all that a norm owns, by a walk over the modules."""
    return {
        f"{prefix}.{leaf}" if prefix else leaf
        for prefix, module in model.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
        if leaf == "bias" or NORM.search(type(module).__name__)
    }


def hand_split(model: nn.Module) -> list[dict[str, Any]]:
    """Make the two groups that every tutorial makes."""
    exempt = exempt_names(model)
    named = list(model.named_parameters())
    return [
        {"params": [param for name, param in named if name not in exempt]},
        {"params": [p for name, p in named if name in exempt], "weight_decay": 0.0},
    ]


def batches(steps: int, *shape: int, classes: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Generate inputs and labels, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(*shape, generator=generator),
            torch.randint(classes, shape[:1], generator=generator),
        )
        for _ in range(steps)
    ]


def shrink(param: Tensor, rates: Iterable[float], weight_decay: float) -> Tensor:
    """Apply decoupled decay alone: ``param * (1 - lr * weight_decay)`` a step."""
    for lr in rates:
        param = param * (1 - lr * weight_decay)
    return param
