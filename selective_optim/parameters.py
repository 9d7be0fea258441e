"""What is known of a parameter: its names, its modules, its shape."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from selective_optim import _torch
from selective_optim._module_tree import canonical_name, name_of_its_own
from selective_optim._text import received, shape_of


@dataclass(frozen=True, eq=False)
class ParameterInfo:
    """What a policy sees of one parameter. What is not known is ``None`` or empty.

    Args:
        name: Canonical dotted name (``"encoder.0.weight"``): names that wrappers
            add are stripped, a parametrized tensor keeps the name it had.
        names: All canonical names; a tied parameter has several.
        leaf: Last part of the name (``"weight"``, ``"in_proj_bias"``).
        owner: Module that holds the parameter.
        path: Modules from the root to the owner, both included.
        parameter: The tensor itself.
        shape: Its original shape, also where a wrapper flattened it; ``None``
            where that shape is lost.
        ndim: Length of ``shape``.
        group: Index of the parameter group.
        elsewhere: The other places of a tied parameter.
        own_name: Dotted name of its own where a parametrization made several
            parameters of one, which all keep the ``name`` that one had: weight norm's
            gain is ``"0.parametrizations.weight.original0"``. Else ``None``.
    """

    name: str | None
    names: tuple[str, ...]
    leaf: str | None
    owner: nn.Module | None
    path: tuple[nn.Module, ...]
    parameter: Tensor
    shape: torch.Size | None
    ndim: int | None
    group: int = 0
    elsewhere: tuple[ParameterInfo, ...] = field(default=(), repr=False)
    own_name: str | None = None

    @property
    def telling_name(self) -> str | None:
        """The name by which reports tell it from every other parameter."""
        return self.own_name or self.name

    @property
    def places(self) -> tuple[ParameterInfo, ...]:
        """Every place where the parameter lives, this one first."""
        return (self, *self.elsewhere)

    def describe(self, position: int) -> str:
        """Name the parameter as a message should: by name if known, else by place."""
        name = repr(self.telling_name) if self.name else f"parameter {position}"
        group = "" if self.name else f" of group {self.group}"
        return f"{name}{group} ({shape_of(self.parameter)})"


def shape_now(param: Tensor) -> torch.Size:
    """Return the shape that a parameter has now; a lazy one has no elements yet."""
    return torch.Size((0,)) if is_lazy(param) else param.shape


def original_shape(param: Tensor) -> torch.Size | None:
    """Return the shape a user knows, or ``None`` where it is lost or not there yet."""
    return None if is_lazy(param) or _torch.is_flattened(param) else param.shape


def owner_kinds(info: ParameterInfo) -> tuple[str, ...]:
    """Name the class of the module that holds a parameter, and that class's bases."""
    if info.owner is None:
        return ()
    own = own_classes(type(info.owner))
    return tuple([f"{cls.__module__}.{cls.__qualname__}" for cls in own])


def own_classes(cls: type[nn.Module]) -> list[type]:
    """List a module class and its bases, up to ``nn.Module``."""
    return list(takewhile(lambda base: base is not nn.Module, cls.__mro__))


def named_info(param: Tensor, name: str | None, group: int) -> ParameterInfo:
    """Describe a parameter of which at most a name is known."""
    own_name = name and name_of_its_own(name)
    name = canonical_name(name) if name else None
    shape = original_shape(param)
    return ParameterInfo(
        name=name,
        names=(name,) if name else (),
        leaf=name.rpartition(".")[2] if name else None,
        owner=None,
        path=(),
        parameter=param,
        shape=shape,
        ndim=None if shape is None else len(shape),
        group=group,
        own_name=own_name,
    )


def as_modules(model: object) -> list[nn.Module]:
    """Read ``model=``: nothing, a module, or a sequence of modules.

    Raises:
        TypeError: It is something else.
    """
    if model is None or isinstance(model, nn.Module):
        return [] if model is None else [model]
    # A generator is read once; a text is a sequence of texts, and refused.
    items: list[Any] = list(model) if isinstance(model, Iterable) else [model]
    if not all(isinstance(item, nn.Module) for item in items):
        raise TypeError(
            f"`model` must be a module or a sequence of modules, not "
            f"{received(model)}. Pass model=model."
        )
    return items
