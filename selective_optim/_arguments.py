"""What is checked of arguments in more than one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
