"""What is known of a parameter: its names, its modules, its shape.

Knowledge is read once, from the best source at hand (a module, the generator
that a module made, names, or bare tensors), and handed to policies as
:class:`ParameterInfo`. Nothing here knows policies or optimizers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from selective_optim import _torch
from selective_optim._text import received, shape_of
from selective_optim._text import shape_text as shape_text
from selective_optim._walk import WRAPPERS as WRAPPERS
from selective_optim._walk import Place, is_modules, modules_behind, places
from selective_optim._walk import canonical_name as canonical_name


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

    @property
    def places(self) -> tuple[ParameterInfo, ...]:
        """Every place where the parameter lives, this one first."""
        return (self, *self.elsewhere)

    def describe(self, position: int) -> str:
        """Name the parameter as a message should: by name if known, else by place."""
        name = repr(self.name) if self.name else f"parameter {position}"
        group = "" if self.name else f" of group {self.group}"
        return f"{name}{group} ({shape_of(self.parameter)})"


def shape_now(param: Tensor) -> torch.Size:
    """Return the shape that a parameter has now; a lazy one has no elements yet."""
    return torch.Size((0,)) if is_lazy(param) else param.shape


def original_shape(param: Tensor) -> torch.Size | None:
    """Return the shape a user knows, or ``None`` where it is lost or not there yet."""
    return None if is_lazy(param) or _torch.is_flattened(param) else param.shape


class ModuleIndex:
    """Every place of every parameter of a module, looked up by tensor."""

    def __init__(self, module: nn.Module) -> None:
        self._places: dict[int, list[Place]] = {}
        self._params: dict[int, Tensor] = {}
        self._shapes = _torch.original_shapes(module)
        for param, place in places(module):
            self._params[id(param)] = param
            self._places.setdefault(id(param), []).append(place)

    def __contains__(self, param: Tensor) -> bool:
        return id(param) in self._places

    def info(self, param: Tensor, group: int = 0) -> ParameterInfo:
        """Describe a parameter that lives in the module."""
        places = self._places[id(param)]
        names = tuple(dict.fromkeys(place.name for place in places))
        shape = self._shapes.get(id(param), original_shape(param))
        ndim = None if shape is None else len(shape)

        def at(place: Place, *elsewhere: ParameterInfo) -> ParameterInfo:
            where = (place.name, names, place.leaf, place.path[-1], place.path)
            return ParameterInfo(*where, param, shape, ndim, group, elsewhere)

        return at(places[0], *map(at, places[1:]))

    def infos(self) -> list[ParameterInfo]:
        """Describe every parameter of the module, each once."""
        return list(map(self.info, self._params.values()))


def named_info(param: Tensor, name: str | None, group: int) -> ParameterInfo:
    """Describe a parameter of which at most a name is known."""
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
    )


def as_modules(model: object) -> list[nn.Module]:
    """Read ``model=``: nothing, a module, or a sequence of modules.

    Raises:
        TypeError: It is something else.
    """
    modules = (
        [] if model is None else [model] if isinstance(model, nn.Module) else model
    )
    if not isinstance(modules, Iterable) or not all(
        isinstance(m, nn.Module) for m in modules
    ):
        raise TypeError(
            f"`model` must be a module or a sequence of modules, not "
            f"{received(model)}. Pass model=model."
        )
    return list(modules)


class Knowledge:
    """What is known of an optimizer's parameters, from the best source at hand.

    In this order: ``model=``; a module, or the generator of one, given as
    parameters; names; else shapes alone. Modules are referred to weakly, and read
    again for every group that is added after construction.
    """

    def __init__(self, model: object = None) -> None:
        modules = as_modules(model)
        self._given = bool(modules)
        self._modules = list(map(weakref.ref, modules))
        self._indices: list[ModuleIndex] | None = None

    @property
    def explicit(self) -> bool:
        """Tell whether ``model=`` was given, and is still alive to be asked."""
        return self._given and all(ref() is not None for ref in self._modules)

    def learn(self, params: Any) -> Any:
        """Note the modules behind ``params`` and return what torch takes instead."""
        modules = modules_behind(params)
        if not self.explicit:
            indices = self._read()
            for module in modules:
                if all(ref() is not module for ref in self._modules):
                    self._modules.append(weakref.ref(module))
                    indices.append(ModuleIndex(module))
        if isinstance(params, nn.Module) or is_modules(params):
            return list(
                {id(p): p for module in modules for p in module.parameters()}.values()
            )
        return params

    def infos(
        self, params: Sequence[Tensor], names: Sequence[str] | None, group: int
    ) -> list[ParameterInfo]:
        """Describe the parameters of a group, each as well as it is known."""
        return [
            self._info(param, name, group)
            for param, name in zip(params, names or repeat(None))
        ]

    def _info(self, param: Tensor, name: str | None, group: int) -> ParameterInfo:
        for index in self._read():
            if param in index:
                return index.info(param, group)
        return named_info(param, name, group)

    def name_of(self, param: Tensor) -> str | None:
        """Return the name under which a known module holds a parameter."""
        return self._info(param, None, 0).name

    def everyone(self) -> list[ParameterInfo]:
        """Describe every parameter of the known modules, in the optimizer or not."""
        return [info for index in self._read() for info in index.infos()]

    def require_members(self, infos: Iterable[ParameterInfo]) -> None:
        """Check that every parameter lives in ``model=``, if that was given.

        Raises:
            ValueError: One does not; the message gives its shape and position.
        """
        for position, info in enumerate(infos) if self.explicit else ():
            if info.owner is None:
                raise ValueError(
                    f"{info.describe(position)}, at position {position} of group "
                    f"{info.group}, is in none of the modules given as `model`. "
                    f"Pass every module that holds parameters: model=[model, ...]."
                )

    def _read(self) -> list[ModuleIndex]:
        if self._indices is None:
            self._indices = [
                ModuleIndex(m) for ref in self._modules if (m := ref()) is not None
            ]
        return self._indices

    def forget_places(self) -> None:
        """Drop what was read; the modules may change before they are asked again."""
        self._indices = None
