"""What models list themselves: ``no_weight_decay()`` and its kin, and marks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from selective_optim import _torch
from selective_optim._canonical_names import canonical_name
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
        self._asked: dict[tuple[int, str], tuple[nn.Module, tuple[str, ...]]] = {}

    def names(self, module: nn.Module, method: str) -> tuple[str, ...]:
        """Return what ``module.method()`` lists; nothing where there is none.

        Only what the module's class or instance itself defines counts: a wrapper
        that passes attributes on would list names under the wrong root.
        """
        key = (id(module), method)
        if key not in self._asked:
            self._asked[key] = (module, tuple(_listed(module, method)))
        return self._asked[key][1]


def _listed(module: nn.Module, method: str) -> Iterable[str]:
    if not hasattr(type(module), method) and method not in vars(module):
        return ()
    found: Any = getattr(module, method)
    return map(canonical_name, found() if callable(found) else found)


def listing(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first name or glob in a list that matches, as timm matches it."""
    return next((p for p in patterns if fnmatchcase(name, p)), None)


def of_root(info: ParameterInfo, lists: Lists) -> str | None:
    """Tell what the root's ``no_weight_decay()`` lists, as names or globs."""
    root = unwrapped(info.path)[0]
    listed = listing(info.name or "", lists.names(root, "no_weight_decay"))
    return f"no_weight_decay() lists {listed!r}" if listed else None


def of_root_by_name(info: ParameterInfo, lists: Lists) -> str | None:
    """Tell what the root's ``no_weight_decay()`` lists, name for name."""
    listed = lists.names(unwrapped(info.path)[0], "no_weight_decay")
    return f"no_weight_decay() lists {info.name!r}" if info.name in listed else None


def of_root_or_keyword(info: ParameterInfo, lists: Lists) -> str | None:
    """Tell what the root lists name for name, or by a keyword in the name."""
    words = lists.names(unwrapped(info.path)[0], "no_weight_decay_keywords")
    word = next((word for word in words if word in (info.name or "")), None)
    by_word = f"no_weight_decay_keywords() lists {word!r}" if word else None
    return of_root_by_name(info, lists) or by_word


def of_any_module(info: ParameterInfo, lists: Lists) -> str | None:
    """Tell what any module lists: names, globs, and keywords at the end of a name."""
    for module, name in relative_names(info):
        if name in lists.names(module, "no_weight_decay"):
            return f"no_weight_decay() lists {name!r}"
        globs = lists.names(module, "no_weight_decay_patterns")
        words = lists.names(module, "no_weight_decay_keywords")
        globs = (*globs, *(f"*{word}" for word in words))
        if found := next((glob for glob in globs if fnmatchcase(name, glob)), None):
            return f"listed as {found!r}"
    return None
