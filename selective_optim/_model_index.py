"""Every parameter of a model, looked up by tensor.

A model is walked once and not for every optimizer or group that asks: one
optimizer per parameter, stepped in a hook, is how people save memory. What was
read is checked where it is used, place by place, and costs nothing to keep:
modules are referred to weakly, and parameters by identity alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from selective_optim import _torch
from selective_optim._module_tree import Place, modules_behind, places
from selective_optim.parameters import (
    ParameterInfo,
    as_modules,
    named_info,
    original_shape,
)

_T = TypeVar("_T")
# Weak on both sides: an index holds neither its module nor any parameter.
_indices: weakref.WeakKeyDictionary[nn.Module, ModuleIndex] = (
    weakref.WeakKeyDictionary()
)
_watching: list[Any] = []


def _forget_all(*_: object) -> None:
    """Forget every index: somewhere a parameter or module was registered.

    A place that is gone shows when it is looked up; one that is new, as when two
    weights are tied, would not.
    """
    _indices.clear()


def index_of(module: nn.Module) -> ModuleIndex:
    """Return what is known of a module, walked now or since nothing was registered."""
    if not _watching:
        _watching.append(register_module_parameter_registration_hook(_forget_all))
        _watching.append(register_module_module_registration_hook(_forget_all))
    index = _indices.get(module)
    if index is None:
        index = _indices[module] = ModuleIndex(module)
    return index


class ModuleIndex:
    """Every place of every parameter of a module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._answers: dict[Hashable, Any] = {}
        self._read(module)

    def _read(self, module: nn.Module) -> None:
        self._places: dict[int, list[Place]] = {}
        self._answers.clear()
        self._shapes = _torch.original_shapes(module)
        for param, place in places(module):
            self._places.setdefault(id(param), []).append(place)

    def info(self, param: Tensor) -> ParameterInfo | None:
        """Describe a parameter; ``None`` if the module does not hold it."""
        [info] = self.infos([param])
        return info

    def infos(
        self, params: Sequence[Tensor], group: int = 0
    ) -> list[ParameterInfo | None]:
        """Describe parameters; ``None`` for those that the module does not hold."""
        found = [self._look_up(param, group) for param in params]
        module = self._module()
        if None in found and module is not None:
            self._read(module)  # they may have come, or moved, since the last reading
            found = [self._look_up(param, group) for param in params]
        return found

    def _look_up(self, param: Tensor, group: int) -> ParameterInfo | None:
        known = self._places.get(id(param), ())
        paths = [path for place in known if (path := place.path(param)) is not None]
        if not known or len(paths) < len(known):
            return None
        names = tuple(dict.fromkeys([place.name for place in known]))
        shape = self._shapes.get(id(param), original_shape(param))
        here = (param, shape, None if shape is None else len(shape), group)
        first, *elsewhere = [
            ParameterInfo(
                *(place.name, names, place.leaf, path[-1], path, *here),
                own_name=place.own_name,
            )
            for place, path in zip(known, paths)
        ]
        return replace(first, elsewhere=tuple(elsewhere)) if elsewhere else first

    def everyone(self) -> list[ParameterInfo]:
        """Describe every parameter of the module, each once."""
        module = self._module()
        params = {} if module is None else {id(p): p for p, _ in places(module)}
        found = self.infos(list(params.values()))
        return [info for info in found if info is not None]

    def remember(self, question: Hashable, ask: Callable[[], _T]) -> _T:
        """Answer a question about the whole module once, until it changes."""
        if question not in self._answers:
            self._answers[question] = ask()
        answer: _T = self._answers[question]
        return answer


class ModelIndex:
    """What is known of an optimizer's parameters, from the best source at hand.

    In this order: ``model=``; a module, or the generator of one, given as
    parameters; names; else shapes alone.

    Args:
        model: A module, modules, or ``None``.
    """

    def __init__(self, model: object = None) -> None:
        modules = as_modules(model)
        self._given = bool(modules)
        self._modules = list(map(weakref.ref, modules))
        # Until it is decided for, a module may live through a generator alone.
        self._held = modules

    @property
    def explicit(self) -> bool:
        """Tell whether ``model=`` was given, and is still alive to be asked."""
        return self._given and all(ref() is not None for ref in self._modules)

    def modules(self) -> list[nn.Module]:
        """Return the known modules that are still alive."""
        return [module for ref in self._modules if (module := ref()) is not None]

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Learn of further modules."""
        for module in modules:
            self._held.append(module)
            if module not in self.modules():
                self._modules.append(weakref.ref(module))

    def let_go(self) -> None:
        """Keep no module alive from now on."""
        self._held.clear()

    def learn(self, params: Any) -> Any:
        """Note the modules behind ``params`` and return what torch takes instead."""
        modules = modules_behind(params)
        if not self.explicit:
            self.add(modules)
        if modules and isinstance(params, (nn.Module, Sequence)):
            params = chain(*[module.parameters() for module in modules])
            return list({id(param): param for param in params}.values())
        return params

    def infos(
        self,
        params: Sequence[Tensor],
        names: Sequence[str | None] | None,
        group: int,
    ) -> list[ParameterInfo]:
        """Describe the parameters of a group, each as well as it is known.

        Args:
            params: The parameters.
            names: Their names, which serve where no module holds them.
            group: Index of the group.
        """
        found: list[ParameterInfo | None] = [None] * len(params)
        for module in self.modules():
            here = index_of(module).infos(params, group)
            found = [a or b for a, b in zip(found, here)]
        return [
            info or named_info(param, name, group)
            for info, param, name in zip(found, params, names or repeat(None))
        ]

    def remember(self, question: Hashable, ask: Callable[[], _T]) -> _T:
        """Answer a question about the whole model once, until the model changes."""
        modules = self.modules()
        try:
            hash(question)
        except TypeError:
            return ask()
        return (
            index_of(modules[0]).remember(question, ask) if len(modules) == 1 else ask()
        )

    def everyone(self) -> list[ParameterInfo]:
        """Describe every parameter of the known modules, in the optimizer or not."""
        return [info for m in self.modules() for info in index_of(m).everyone()]

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

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelIndex:
        """Follow the modules that were copied along with the optimizer."""
        modules = self.modules()
        twin = ModelIndex([memo.get(id(module), module) for module in modules])
        # Copied before its model, it cannot insist that tensors live in that.
        twin._given = self._given and all(id(module) in memo for module in modules)
        twin.let_go()
        return twin

    def __reduce__(self) -> tuple[type[ModelIndex], tuple[()]]:
        # To pickle the modules would be to pickle the model with the optimizer.
        return ModelIndex, ()
