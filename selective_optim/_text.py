"""How messages and tables show things: values on one line, columns aligned."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

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


def received(value: object) -> str:
    """Show a value of a wrong type, and its type."""
    if isinstance(value, (Tensor, nn.Module)):
        return brief(value)
    return f"{brief(value)} ({type(value).__name__})"


def aligned(lines: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Pad cells to the width of their column; those of ``right`` stand to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
