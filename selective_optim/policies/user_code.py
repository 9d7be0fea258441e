"""What users write: callables, classes, and the lists of names on their models.

A lambda that reads ``info.name`` where no name is known must not decide on ``None``:
the strict view raises, and the message says what was missing.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

from selective_optim import _torch
from selective_optim._canonical_names import canonical_name
from selective_optim.parameters import ParameterInfo

MARK = "_no_weight_decay"


class UnknownError(Exception):
    """A callable read a field that is not known of the parameter."""


def _known(field: str) -> Any:
    def read(info: ParameterInfo) -> Any:
        value = vars(info)[field]
        # The shape of a scalar and its length are empty, and known.
        if value is None or (value == () and not isinstance(value, torch.Size)):
            raise UnknownError(field)
        return value

    return property(read)


class StrictInfo(ParameterInfo):
    """The same knowledge; reading what is not there raises instead of ``None``."""

    def __init__(self, info: ParameterInfo) -> None:
        vars(self).update(vars(info))
        vars(self)["elsewhere"] = tuple(map(StrictInfo, info.elsewhere))

    # Properties come before what stands in the instance's own dict.
    name, names, leaf = _known("name"), _known("names"), _known("leaf")
    owner, path = _known("owner"), _known("path")
    shape, ndim = _known("shape"), _known("ndim")

    def __getattr__(self, field: str) -> Any:
        fields = ", ".join(vars(self))
        raise AttributeError(
            f"ParameterInfo has no attribute {field!r}. Read one of {fields}."
        )

    def __repr__(self) -> str:
        return repr(ParameterInfo(**vars(self)))


@dataclass(frozen=True)
class LostCallable:
    """Stands for a callable that does not pickle; raises where it is asked.

    Decisions are pickled with their optimizer: only a new parameter asks it.
    """

    text: str

    def __repr__(self) -> str:
        return self.text

    def __call__(self, info: ParameterInfo) -> Any:
        raise ValueError(
            f"{self.text} did not pickle, and a new parameter is to be decided for. "
            f"Type optimizer.wd_policy = ..., or write the policy as a function."
        )


def picklable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a callable, or, if it does not pickle, a stand-in that raises."""
    try:
        # Tried at once: an error inside pickle would name neither policy nor remedy.
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError):
        return LostCallable(callable_text(function))
    return function


def callable_text(function: Callable[..., Any]) -> str:
    """Print a callable by its name; a lambda also by the line that made it."""
    if isinstance(function, partial) or not hasattr(function, "__qualname__"):
        return repr(function)
    name = function.__qualname__.rpartition("<locals>.")[2]
    code = getattr(function, "__code__", None)
    if name != "<lambda>" or code is None:
        return name
    return f"<lambda at {code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}>"


def _subclasses(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _classes_named(name: str) -> list[type[nn.Module]]:
    # A notebook's cell that ran twice leaves two classes behind, of which the path
    # leads to the second.
    found = list({c: None for c in _subclasses(nn.Module) if c.__name__ == name})
    reached = [cls for cls in found if _at_path(_path_of(cls)) is cls]
    return reached or found


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _at_path(path: str) -> object:
    parts = path.split(".")
    for size in range(len(parts) - 1, 0, -1):
        found: object = sys.modules.get(".".join(parts[:size]))
        if found is not None:
            for part in parts[size:]:
                found = getattr(found, part, None)
            return found
    return None


def class_text(cls: type[nn.Module]) -> str:
    """Return the shortest name by which a policy's text finds a class."""
    name = cls.__name__
    if getattr(nn, name, None) is cls:
        return f"nn.{name}"
    return name if len(_classes_named(name)) == 1 else _path_of(cls)


def loaded_class(name: str) -> type[nn.Module] | None:
    """Find a module class by name, or by its path, among those that are loaded.

    Raises:
        ValueError: Several classes bear the name.
    """
    # A bare name is torch.nn's first, which has quantized namesakes.
    at_path = _at_path(f"torch.{name}") or _at_path(f"torch.nn.{name}")
    at_path = at_path or _at_path(name)
    if isinstance(at_path, type) and issubclass(at_path, nn.Module):
        return at_path
    found = [] if "." in name else _classes_named(name)
    if len(found) > 1:
        paths = " or ".join(sorted(map(_path_of, found)))
        raise ValueError(f"{name} is the name of {len(found)} classes. Write {paths}.")
    return found[0] if found else None


def unwrapped(path: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """Drop the wrappers at the beginning of a path, so that it starts at the model."""
    while len(path) > 1 and _key(path[0], path[1]) in _torch.WRAPPERS:
        path = path[1:]
    return path


def _key(parent: nn.Module, child: nn.Module) -> str | None:
    return next((k for k, module in parent.named_children() if module is child), None)


def relative_names(place: ParameterInfo) -> Iterator[tuple[nn.Module, str]]:
    """Yield each module above a parameter with the parameter's name as seen from it."""
    parts, size = (place.name or "").split("."), 1
    for i in range(len(place.path) - 1, -1, -1):
        yield place.path[i], ".".join(parts[-size:])
        # A wrapper's own name is no part of the canonical one.
        if i and _key(place.path[i - 1], place.path[i]) not in _torch.WRAPPERS:
            size += 1


class Lists:
    """The lists of names that modules give, each module asked once."""

    def __init__(self) -> None:
        self._asked: dict[tuple[int, str], tuple[nn.Module, list[str]]] = {}

    def names(self, module: nn.Module, method: str) -> list[str]:
        """Return what ``module.method()`` lists; nothing where there is none.

        Only what the module's class or instance itself defines counts: a wrapper
        that passes attributes on would list names under the wrong root.
        """
        key = (id(module), method)
        if key not in self._asked:
            listed: Any = ()
            if hasattr(type(module), method) or method in vars(module):
                listed = getattr(module, method)
                listed = listed() if callable(listed) else listed
            self._asked[key] = (module, list(map(canonical_name, listed)))
        return self._asked[key][1]

    def told(
        self,
        module: nn.Module,
        method: str,
        name: str | None,
        matches: Callable[[str, str], bool] = fnmatchcase,
    ) -> str | None:
        """Tell what ``module.method()`` lists that matches a name, if anything."""
        for listed in self.names(module, method):
            if matches(name or "", listed):
                return f"{method}() lists {listed!r}"
        return None
