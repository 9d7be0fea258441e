"""How texts show values and classes, and what several files check of arguments."""

from __future__ import annotations

import gc
import inspect
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from types import FunctionType, ModuleType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

WIDTH = 60  # a dict of modules prints as pages
SHOWN = 3  # parameters that a warning names
INSIDE = ("selective_optim", "torch", "contextlib")  # packages that warnings skip


def warn(message: str) -> None:
    """Warn at the line, outside this library and torch, that led here."""
    # From Python 3.12 on, `skip_file_prefixes` of warnings.warn does this.
    level, frame = 1, inspect.currentframe()
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def first_of(items: Sequence[str], separator: str) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{separator.join(items[:SHOWN])}{more}"


def shape_text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def shape_of(param: Tensor) -> str:
    return "no shape yet" if is_lazy(param) else f"shape {shape_text(param.shape)}"


def shortened(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 3]}..."


def received(value: object) -> str:
    """Show a value of a wrong type: a module by its class, a tensor by its shape."""
    if isinstance(value, Tensor):
        return f"a tensor ({shape_of(value)})"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    text = " ".join(repr(value).split())
    shown = text if len(text) <= WIDTH else f"{text[:WIDTH]}..."
    return f"{shown} ({type(value).__name__})"


def aligned(lines: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


NUMBERS = ("lr", "lr_scale", "weight_decay", "momentum", "dampening", "eps", "betas")


def require_numbers(group: Mapping[str, object], where: str = "") -> None:
    """Raise TypeError for hyperparameters that are texts, as YAML makes of ``1e-3``."""
    for name, value in group.items():
        values = value if name == "betas" and isinstance(value, tuple) else (value,)
        for number in values if name in NUMBERS else ():
            if isinstance(number, str):
                raise TypeError(
                    f"`{name}`{where} must be a number, not {received(number)}. "
                    f"{_as_number(name, number)}"
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
    listed = isinstance(params, (list, tuple))
    if not (listed and all(isinstance(group, dict) for group in params)):
        return params
    for group in params:
        if isinstance(group.get("params"), Iterator):  # else used up by an error
            group["params"] = list(group["params"])
    return [dict(group) for group in params]


def keep(groups: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Copy a caller's groups, which torch fills in, to be put back if it raises."""
    listed = groups if isinstance(groups, (list, tuple)) else ()
    return [(group, dict(group)) for group in listed if isinstance(group, dict)]


def put_back(kept: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for group, before in kept:
        params = group.get("params")
        group.clear()
        group.update(before)
        if isinstance(before.get("params"), Iterator):  # used up by now
            group["params"] = params


def require_decay(optimizer: Any, purpose: str) -> None:
    for index, group in enumerate(optimizer.param_groups):
        if "weight_decay" not in group:
            raise ValueError(
                f"group {index} of `optimizer` ({type(optimizer).__name__}) has no "
                f"weight_decay to {purpose}. Use one that decays: "
                f"selective_optim.AdamW."
            )


def is_optimizer(item: object) -> TypeGuard[torch.optim.Optimizer]:
    """Tell whether this is one of torch, and no wrapper that skips its constructor."""
    return isinstance(item, torch.optim.Optimizer) and "defaults" in vars(item)


# Leads to the process and not to what a wrapper holds, or to nothing.
NOT_SEARCHED = (type, ModuleType, FunctionType, Tensor, nn.Module, str)


def held_optimizers(wrapper: object) -> list[Any]:
    """List the nearest optimizers that a wrapper holds and whose parameters it has."""
    trained, optimizers, covered = param_ids(wrapper), [], set[int]()
    level, seen = [wrapper], {id(wrapper)}
    # Of references; a dict or list takes one. An optimizer may lead far, to a trainer.
    for _ in range(3 if is_optimizer(wrapper) else 6):
        # The collector reads lists from behind.
        referents = chain.from_iterable(
            item if isinstance(item, (list, tuple)) else gc.get_referents(item)
            for item in level
        )
        new = {id(item): item for item in referents if id(item) not in seen}
        level = [item for item in new.values() if not isinstance(item, NOT_SEARCHED)]
        seen.update(new)
        for item in filter(is_optimizer, level):
            ids = param_ids(item)
            if ids and covered.isdisjoint(ids) and (ids <= trained or not trained):
                optimizers.append(item)
                covered |= ids
        if optimizers and covered >= trained:
            break
    return optimizers


def param_ids(optimizer: object) -> set[int]:
    groups = getattr(optimizer, "param_groups", None)
    if not (isinstance(groups, (list, tuple)) and hasattr(optimizer, "step")):
        return set()
    return {id(param) for group in groups for param in group["params"]}


def _subclasses(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _classes_named(name: str) -> list[type[nn.Module]]:
    # A notebook's cell that ran twice leaves two classes: the path leads to the second.
    classes = list({c: None for c in _subclasses(nn.Module) if c.__name__ == name})
    reached = [cls for cls in classes if _at_path(_path_of(cls)) is cls]
    return reached or classes


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _at_path(path: str) -> object:
    parts = path.split(".")
    for size in range(len(parts) - 1, 0, -1):
        value: object = sys.modules.get(".".join(parts[:size]))
        if value is not None:
            for part in parts[size:]:
                value = getattr(value, part, None)
            return value
    return None


def class_text(cls: type[nn.Module]) -> str:
    """Return the shortest name by which a policy's text finds a class."""
    name = cls.__name__
    if getattr(nn, name, None) is cls:
        return f"nn.{name}"
    return name if len(_classes_named(name)) == 1 else _path_of(cls)


def loaded_class(name: str) -> type[nn.Module] | None:
    # A bare name is torch.nn's first, which has quantized namesakes.
    paths = (f"torch.{name}", f"torch.nn.{name}", name)
    cls = next(filter(None, map(_at_path, paths)), None)
    if isinstance(cls, type) and issubclass(cls, nn.Module):
        return cls
    classes = [] if "." in name else _classes_named(name)
    if len(classes) > 1:
        ways = " or ".join(sorted(map(_path_of, classes)))
        raise ValueError(f"{name} is the name of {len(classes)} classes. Write {ways}.")
    return classes[0] if classes else None
