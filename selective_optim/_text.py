"""How messages and tables show things: values on one line, columns aligned."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

NUMBERS = ("lr", "weight_decay", "momentum", "dampening", "eps", "betas")
WIDTH = 60  # a dict of modules prints as pages


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape as ``10 x 64``; a zero-dimensional one as ``scalar``."""
    return " x ".join(map(str, shape)) or "scalar"


def shape_of(param: Tensor) -> str:
    """Tell the shape of a parameter; a lazy one has none."""
    return "no shape yet" if is_lazy(param) else f"shape {shape_text(param.shape)}"


def brief(value: object) -> str:
    """Show a value: a module by its class, a tensor by its shape, all else cut."""
    if isinstance(value, Tensor):
        return f"a tensor ({shape_of(value)})"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}..."


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


def received(value: object) -> str:
    """Show a value of a wrong type, and its type."""
    if isinstance(value, (Tensor, nn.Module)):
        return brief(value)
    return f"{brief(value)} ({type(value).__name__})"


def aligned(lines: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Pad the cells of each column to one width.

    Args:
        lines: Rows of as many cells each, the headers first.
        right: Indices of the columns that stand to the right, as numbers do.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def warn(message: str) -> None:
    """Warn at the line, outside this library and torch, that led here."""
    # From Python 3.12 on, `skip_file_prefixes` of warnings.warn does this.
    level, frame = 1, inspect.currentframe()
    while frame is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("selective_optim", "torch", "contextlib")
