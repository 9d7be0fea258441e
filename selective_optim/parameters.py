"""What is known of parameters: names, shapes, and the modules around them.

A model is walked once, though people make an optimizer for every parameter to save
memory. What was read is checked, place by place, where it is used.
"""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import chain, repeat
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from selective_optim import _torch
from selective_optim._text import received, shape_of
from selective_optim._torch import canonical_name, name_of_its_own


@dataclass(frozen=True, eq=False)
class ParameterInfo:
    """A parameter as a policy sees it; ``None`` or empty if something is not known.

    Args:
        name: Dotted name (``"encoder.0.weight"``), without the parts that wrappers
            and parametrizations add.
        names: All names; a tied parameter has several.
        leaf: Last part of the name (``"weight"``, ``"in_proj_bias"``).
        owner: Module that holds the parameter.
        path: Modules from the root to the owner, both included.
        parameter: The tensor itself.
        shape: Its original shape, also where a wrapper flattened it; ``None``
            where that shape is lost.
        ndim: Length of ``shape``.
        group: Index of the parameter group.
        elsewhere: The other places of a tied parameter.
        own_name: If a parametrization made several parameters of one, the full name
            of this one, such as ``"0.parametrizations.weight.original0"``, where
            ``name`` is ``"0.weight"``. Else ``None``.
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
        """Every place where the parameter is registered, this one first."""
        return (self, *self.elsewhere)

    def describe(self, position: int) -> str:
        name = repr(self.telling_name) if self.name else f"parameter {position}"
        group = "" if self.name else f" of group {self.group}"
        return f"{name}{group} ({shape_of(self.parameter)})"


def shape_now(param: Tensor) -> torch.Size:
    """Return the shape that a parameter has now; a lazy one has no elements yet."""
    return torch.Size((0,)) if is_lazy(param) else param.shape


# A parameter that is asked about, its group, and shape and name if known.
Asked = tuple[Tensor, int, torch.Size | None, str | None]


def wanted(
    params: Sequence[Tensor], names: Iterable[str | None] = (), group: int = 0
) -> list[Asked]:
    """Ask about parameters; a shape that is lost or not there yet is ``None``."""
    asked: list[Asked] = []
    interned: dict[Any, Any] = {}  # torch makes another shape at each look
    for param, name in zip(params, chain(names, repeat(None))):
        shape = None
        if not (is_lazy(param) or _torch.is_flattened(param)):
            shape = getattr(param, "ds_shape", param.shape)  # DeepSpeed's note
        asked.append((param, group, interned.setdefault(shape, shape), name))
    return asked


def owner_kinds(info: ParameterInfo) -> tuple[str, ...]:
    """Name the class of the module that holds a parameter, and that class's bases."""
    if info.owner is None:
        return ()
    cls: Any = type(info.owner)  # mypy holds that classes of modules have no hash
    return _kinds_of(cls)


@lru_cache(4096)
def _kinds_of(cls: Any) -> tuple[str, ...]:
    return tuple([f"{c.__module__}.{c.__qualname__}" for c in _torch.own_classes(cls)])


def _named_info(
    param: Tensor, group: int, shape: torch.Size | None, name: str | None
) -> ParameterInfo:
    own_name = name and name_of_its_own(name)
    name = canonical_name(name) if name else None
    names = (name,) if name else ()
    leaf = name.rpartition(".")[2] if name else None
    ndim = None if shape is None else len(shape)
    return ParameterInfo(
        name, names, leaf, None, (), param, shape, ndim, group, own_name=own_name
    )


def as_modules(model: object) -> list[nn.Module]:
    """Read ``model=``: nothing, a module, or a sequence of modules."""
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


# Iterators that hand on what others yield. What one refers to is what it reads.
RELAYS: tuple[type, ...] = (filter, map, chain, type(iter([])), type(iter(())))


def modules_behind(params: object) -> list[nn.Module]:
    """Find the modules that ``params`` is, lists, or is being generated from."""
    if isinstance(params, nn.Module):
        return [params]
    if isinstance(params, (list, tuple, Sequence)):  # the last is slow to ask
        listed = all(map(isinstance, params, repeat(nn.Module)))
        return list(params) if listed else []
    if isinstance(params, RELAYS):
        sources = gc.get_referents(params)
        sources += chain(*(s for s in sources if isinstance(s, (list, tuple))))
        return [module for source in sources for module in modules_behind(source)]
    if inspect.isgenerator(params):
        # Until it has run, its frame holds the module, or what an expression reads.
        frame = inspect.getgeneratorlocals(params)
        return modules_behind(frame.get("self", frame.get(".0")))
    return []


# By id of the module, of which some compare by what they hold. An index holds neither
# its module nor any parameter, and goes with its module.
_indices: dict[int, ModuleIndex] = {}


@cache
def clear_at_registration(clear: Callable[[], None]) -> None:
    """Have a cache cleared whenever a parameter or module is registered somewhere."""
    # A place that is gone shows when it is looked up; a new one, of a tie, would not.
    # Not at import: torch calls these at every registration in the process.
    nn.modules.module.register_module_parameter_registration_hook(lambda *_: clear())
    nn.modules.module.register_module_module_registration_hook(lambda *_: clear())


def index_of(module: nn.Module) -> ModuleIndex:
    """Return what is known of a module, walked now or since nothing was registered."""
    clear_at_registration(_indices.clear)
    index = _indices.get(id(module))
    if index is None:
        index = _indices[id(module)] = ModuleIndex(module)
    return index


ModuleRef = weakref.ref[nn.Module]


def living(refs: Sequence[ModuleRef]) -> list[nn.Module]:
    """Return the modules that are still alive."""
    return [module for ref in refs if (module := ref()) is not None] if refs else []


def has_parameters(module: nn.Module, recurse: bool = True) -> bool:
    """Tell whether a module or, unless told not to look there, one inside holds any."""
    return next(module.parameters(recurse), None) is not None


_T = TypeVar("_T")
Path = tuple[nn.Module, ...]
# The number of the module, the key there, the name, and one of its own. Python's
# collector walks named tuples, and no tuples of plain values.
Place = tuple[int, str, str, str | None]


class ModuleIndex:
    """Every place of every parameter of a module; modules inside go by number."""

    def __init__(self, module: nn.Module) -> None:
        key = id(module)
        self._module = weakref.ref(module, lambda _: _indices.pop(key, None))
        self._answers: dict[Hashable, Any] = {}
        self._places: dict[int, tuple[Place, ...]] = {}

    def _read(self, root: nn.Module) -> dict[int, Path]:
        self._places = {}
        self._answers.clear()
        paths, places = dict[int, Path](), dict[int, tuple[Place, ...]]()
        # The number of the module above, and under which key that registered it.
        parents: list[tuple[int, str]] = []
        stack: list[tuple[Path, tuple[int, str], str]] = [((root,), (0, ""), "")]
        while stack:
            path, parent, prefix = stack.pop()
            number, plain = len(paths), _torch.without_wrappers(prefix)
            paths[number] = path
            parents.append(parent)
            for key, param in _torch.registered(path[-1]).items():
                place: Place = (number, key, f"{plain}{key}", None)
                if key.startswith("original"):
                    name = f"{prefix}{key}"
                    place = (number, key, canonical_name(name), name_of_its_own(name))
                if param is not None:
                    places[id(param)] = (*places.get(id(param), ()), place)
            stack += [
                ((*path, child), (number, key), f"{prefix}{key}.")
                for key, child in reversed([*_torch.children(path[-1]).items()])
                # One that contains itself has endless aliases.
                if child is not None and child not in path
            ]
        self._parents = parents
        self._shapes = _torch.original_shapes(path[-1] for path in paths.values())
        self._places = places  # last: what an interrupt leaves is read again
        return paths

    def infos(self, asked: Sequence[Asked]) -> list[ParameterInfo | None]:
        """Describe parameters; ``None`` for those that the module does not hold."""
        module = self._module()
        if module is None:
            return [None] * len(asked)
        paths: dict[int, Path] = {0: (module,)}
        infos = list(map(self._look_up, asked, repeat(paths)))
        if None in infos:
            # They may have come, or moved, since the last reading.
            infos = list(map(self._look_up, asked, repeat(self._read(module))))
        return infos

    def _look_up(self, asked: Asked, paths: dict[int, Path]) -> ParameterInfo | None:
        """Describe one parameter; ``paths`` are those of modules looked up before."""
        param, group, shape, _ = asked
        if id(param) not in self._places:
            return None
        infos, places = [], self._places[id(param)]
        shape = self._shapes.get(id(param), shape)
        ndim = None if shape is None else len(shape)
        names = tuple(dict.fromkeys([name for _, _, name, _ in places]))
        for number, key, name, own_name in places:
            path = self._path(number, paths)
            params = _torch.registered(path[-1]) if path else {}
            # Not `get`: scripted modules keep theirs in mappings without it.
            if key not in params or params[key] is not param:
                return None
            if key.startswith("original") and isinstance(path[-1], ParametrizationList):
                path = path[:-2]  # originals belong to the module with the parameter
            leaf = name.rpartition(".")[2]
            of_param = (path[-1], path, param, shape, ndim, group)
            infos.append(ParameterInfo(name, names, leaf, *of_param, own_name=own_name))
        if len(infos) > 1:
            return replace(infos[0], elsewhere=tuple(infos[1:]))
        return infos[0]

    def _path(self, number: int, paths: dict[int, Path]) -> Path:
        """Return the modules from the root to this as they are now, none if it left."""
        if number not in paths:
            parent, key = self._parents[number]
            path = self._path(parent, paths)
            children = _torch.children(path[-1]) if path else {}
            registered = key in children and children[key] is not None
            paths[number] = (*path, children[key]) if registered else ()
        return paths[number]

    def everyone(self) -> list[ParameterInfo]:
        module = self._module()
        params = [] if module is None else [*module.parameters()]
        return [info for info in self.infos(wanted(params)) if info is not None]

    def remember(self, question: Hashable, ask: Callable[[], _T]) -> _T:
        """Answer a question about the whole module once, until it changes."""
        if question not in self._answers:
            self._answers[question] = ask()
        answer: _T = self._answers[question]
        return answer


def at_both(first: ParameterInfo, second: ParameterInfo) -> ParameterInfo:
    """Join what two modules tell; a place in a module that both contain counts once."""
    owners = [id(place.owner) for place in first.places]
    new = [place for place in second.places if id(place.owner) not in owners]
    if not new:
        return first
    names = dict.fromkeys((*first.names, *(place.name for place in new if place.name)))
    elsewhere = (*first.elsewhere, *(replace(place, elsewhere=()) for place in new))
    return replace(first, names=tuple(names), elsewhere=elsewhere)


class ModelIndex:
    """What is known of an optimizer's parameters, from the best source at hand.

    In this order: ``model=``; a module, or the generator of one, given as
    parameters; living modules that were found to hold them; names; else only shapes.
    """

    def __init__(self, model: object = None) -> None:
        # Until it is decided for, nothing but a generator may keep a module alive.
        self._held = as_modules(model)
        self._insists = bool(self._held)
        self._passed = list(map(weakref.ref, self._held))
        self._discovered: list[ModuleRef] = []

    @property
    def explicit(self) -> bool:
        """Tell whether ``model=`` was given, and is still alive to be asked."""
        return self._insists and len(self.passed) == len(self._passed)

    def modules(self) -> list[nn.Module]:
        return living(self._passed + self._discovered)

    @property
    def passed(self) -> list[nn.Module]:
        """Modules that the user passed, or that generate the parameters."""
        return living(self._passed)

    @property
    def discovered(self) -> list[nn.Module]:
        return living(self._discovered)

    def add(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            self._held.append(module)
            if id(module) not in map(id, self.passed):
                self._passed.append(weakref.ref(module))

    def find(self, modules: Iterable[nn.Module]) -> None:
        present = set(map(id, self.modules()))
        self._discovered += [weakref.ref(m) for m in modules if id(m) not in present]

    def release(self) -> None:
        """Keep no module alive from now on."""
        self._held.clear()

    def learn(self, params: Any) -> Any:
        """Note the modules behind ``params`` and return what torch takes instead."""
        modules = modules_behind(params)
        if modules and not self.explicit:
            self.add(modules)
        if modules and isinstance(params, (nn.Module, Sequence)):
            params = chain(*[module.parameters() for module in modules])
            # Modules may share parameters, which torch refuses to take twice.
            return list({id(param): param for param in params}.values())
        return params

    def infos(self, asked: Sequence[Asked]) -> list[ParameterInfo]:
        # One pass per module over all parameters: an optimizer may have 1,000 groups.
        infos: list[ParameterInfo | None] = [None] * len(asked)
        for module in self.modules():
            pairs = zip(infos, index_of(module).infos(asked))
            infos = [at_both(a, b) if a and b else a or b for a, b in pairs]
        return [info or _named_info(*each) for info, each in zip(infos, asked)]

    def remember(self, question: Hashable, ask: Callable[[], _T]) -> _T:
        modules = self.modules()
        try:
            hash(question)
        except TypeError:  # a user's policy may hold a list
            return ask()
        if len(modules) != 1:
            return ask()
        return index_of(modules[0]).remember(question, ask)

    def everyone(self) -> list[ParameterInfo]:
        """Describe every parameter of the known modules, in the optimizer or not."""
        return [info for m in self.modules() for info in index_of(m).everyone()]

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelIndex:
        """Follow the modules that were copied along with the optimizer."""
        twin = ModelIndex([memo.get(id(module), module) for module in self.passed])
        twin.find(memo.get(id(module), module) for module in self.discovered)
        # Copied before its model, it cannot insist that tensors live in that.
        twin._insists = self._insists and all(id(m) in memo for m in self.passed)
        twin.release()
        return twin

    def __reduce__(self) -> tuple[type[ModelIndex], tuple[()]]:
        # To pickle the modules would be to pickle the model with the optimizer.
        return ModelIndex, ()
