"""What is checked of arguments in more than one place."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from itertools import chain
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from selective_optim._text import received

NUMBERS = ("lr", "lr_scale", "weight_decay", "momentum", "dampening", "eps", "betas")


def require_numbers(group: Mapping[str, object], where: str = "") -> None:
    """Raise TypeError for hyperparameters that are texts, as YAML makes of ``1e-3``."""
    for name, value in group.items():
        values = value if name == "betas" and isinstance(value, tuple) else (value,)
        for each in values if name in NUMBERS else ():
            if isinstance(each, str):
                raise TypeError(
                    f"`{name}`{where} must be a number, not {received(each)}. "
                    f"{_as_number(name, each)}"
                )


def _as_number(name: str, text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return f"Pass for example {name}=0.01."
    shown = f"{name}={value:g}" if name != "betas" else f"{value:g}"
    return f"Pass {shown}; YAML reads a number with e and without a dot as a text."


def copied_groups(params: Any) -> Any:
    """Copy groups, into which torch writes as it reads them."""
    groups = isinstance(params, (list, tuple)) and all(
        isinstance(group, dict) for group in params
    )
    for group in params if groups else ():
        if isinstance(group.get("params"), Iterator):  # else used up by an error
            group["params"] = list(group["params"])
    return [dict(group) for group in params] if groups else params


def require_decay(optimizer: Any, purpose: str) -> None:
    """Raise ValueError if a group of an optimizer has no weight decay."""
    for index, group in enumerate(optimizer.param_groups):
        if "weight_decay" not in group:
            raise ValueError(
                f"group {index} of `optimizer` ({type(optimizer).__name__}) has no "
                f"weight_decay to {purpose}. Use one that decays: "
                f"selective_optim.AdamW."
            )


def is_optimizer(item: object) -> bool:
    """Tell whether this is one of torch, and no wrapper that skips its constructor."""
    return isinstance(item, torch.optim.Optimizer) and "defaults" in vars(item)


# Leads to the process and not to what a wrapper holds, or to nothing.
NOT_SEARCHED = (type, ModuleType, FunctionType, Tensor, nn.Module, str)


def held_optimizers(wrapper: object) -> list[Any]:
    """List the nearest optimizers that a wrapper holds, and that step its parameters."""
    own, found, covered = param_ids(wrapper), [], set[int]()
    level, seen = [wrapper], {id(wrapper)}
    # Of references; a dict or list takes one. An optimizer may lead far, to a trainer.
    for _ in range(3 if is_optimizer(wrapper) else 6):
        # The collector reads lists from behind.
        near = chain.from_iterable(
            item if isinstance(item, (list, tuple)) else gc.get_referents(item)
            for item in level
        )
        new = {id(item): item for item in near if id(item) not in seen}
        level = [item for item in new.values() if not isinstance(item, NOT_SEARCHED)]
        seen.update(new)
        for item in filter(is_optimizer, level):
            ids = param_ids(item)
            if ids and covered.isdisjoint(ids) and (ids <= own or not own):
                found.append(item)
                covered |= ids
        if found and covered >= own:
            break
    return found


def param_ids(optimizer: object) -> set[int]:
    """Identify the parameters of what has groups and steps; none of all else."""
    groups = getattr(optimizer, "param_groups", None)
    if not (isinstance(groups, (list, tuple)) and hasattr(optimizer, "step")):
        return set()
    return {id(param) for group in groups for param in group["params"]}
