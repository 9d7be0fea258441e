"""What is checked of arguments in more than one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from selective_optim._text import received

NUMBERS = ("lr", "weight_decay", "momentum", "dampening", "eps", "betas")


def require_numbers(group: Mapping[str, object], where: str = "") -> None:
    """Check that hyperparameters are no texts, as YAML makes of ``1e-3``.

    Raises:
        TypeError: One is.
    """
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


def require_decay(optimizer: Any, purpose: str) -> None:
    """Check that every group of an optimizer has a weight decay.

    Raises:
        ValueError: One has none.
    """
    for index, group in enumerate(optimizer.param_groups):
        if "weight_decay" not in group:
            raise ValueError(
                f"group {index} of `optimizer` ({type(optimizer).__name__}) has no "
                f"weight_decay to {purpose}. Use one that decays: "
                f"selective_optim.AdamW."
            )


def held_optimizers(wrapper: object) -> list[Any]:
    """List the optimizers that a wrapper steps: those in its attributes and lists.

    If it has groups, the parameters must be its own. What it holds is looked into, too,
    down to the first of three levels on which there is an optimizer.
    """
    groups = groups_of(wrapper)
    own = None if groups is None else _ids(groups)
    level = _attributes(wrapper)
    for _ in range(3):
        found, taken = [], set[int]()
        for item in level:
            ids = _ids(groups_of(item) or ()) if item is not wrapper else set()
            # One that is held twice, or a twin with the same parameters, counts once.
            if ids and taken.isdisjoint(ids) and (own is None or ids <= own):
                found.append(item)
                taken |= ids
        if found:
            return found
        inside = (item for item in level if not isinstance(item, NOT_SEARCHED))
        level = [each for item in inside for each in _attributes(item)]
    return []


NOT_SEARCHED = (type, ModuleType, FunctionType, Tensor, nn.Module)


def groups_of(optimizer: object) -> Any:
    """Return the parameter groups of what steps, or ``None`` of all else."""
    groups = getattr(optimizer, "param_groups", None)
    steps = isinstance(groups, (list, tuple)) and hasattr(optimizer, "step")
    return groups if steps else None


def _ids(groups: Iterable[Any]) -> set[int]:
    return {id(param) for group in groups for param in group["params"]}


def _attributes(item: object) -> list[object]:
    """List the values of attributes, and what is in dicts and lists among them."""
    slots = chain(*[getattr(c, "__slots__", ()) for c in type(item).__mro__])
    values = [getattr(item, name, None) for name in slots]
    stack = [*getattr(item, "__dict__", {}).values(), *values][::-1]
    flat: list[object] = []
    seen: set[int] = set()  # a list may hold itself
    while stack:
        value = stack.pop()
        if not isinstance(value, (dict, list, tuple, set)):
            flat.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            stack += [*(value.values() if isinstance(value, dict) else value)][::-1]
    return flat
