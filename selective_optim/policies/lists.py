"""What authors wrote on their models: marks, and lists of names that do not decay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from selective_optim import _torch
from selective_optim._torch import canonical_name
from selective_optim.parameters import ParameterInfo

MARK = "_no_weight_decay"


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
