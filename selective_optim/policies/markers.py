"""What authors wrote on their own models: marks on parameters and lists of names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, TypeVar

from torch import Tensor, nn

from selective_optim import _torch
from selective_optim._text import received
from selective_optim.decay import EXEMPT, FULL, Decay, Verdict, number_text
from selective_optim.parameters import ParameterInfo, canonical_name
from selective_optim.policies.base import Policy
from selective_optim.policies.selectors import Need

MARK = "_no_weight_decay"
# S4 and what follows it write a parameter's own settings there.
SETTINGS = "_optim"
Target = TypeVar("Target", nn.Module, Tensor)


def exempt_(target: Target) -> Target:
    """Mark a parameter, or every parameter of a module, as exempt for :func:`marked`.

    Sets ``_no_weight_decay = True``, the attribute that Mamba and others set, on
    the parameters. A module is marked, too, so that its mark outlives a wrapper
    that makes new parameters.

    Args:
        target: Marked in place.

    Returns:
        ``target``.

    Raises:
        TypeError: ``target`` is neither a parameter nor a module.

    Example:
        >>> layer = exempt_(nn.Linear(2, 2))
        >>> layer.weight._no_weight_decay
        True
    """
    if not isinstance(target, (nn.Module, Tensor)):
        raise TypeError(
            f"`exempt_` takes a module or a parameter, not {target!r} "
            f"({type(target).__name__}). Write for example exempt_(model.head)."
        )
    setattr(target, MARK, True)
    if isinstance(target, nn.Module):
        for param in target.parameters():
            setattr(param, MARK, True)
    return target


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


@dataclass(frozen=True, repr=False)
class Marked(Policy):
    """Exempts what the model's author marked; see :func:`marked`."""

    weight_decay: float | None = None
    lists: Lists | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        own = self.weight_decay
        return "marked()" if own is None else f"marked(weight_decay={own!r})"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"names", "modules"})

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        return replace(self, lists=Lists())

    def decide(self, info: ParameterInfo) -> Verdict:
        if getattr(info.parameter, MARK, False):
            return Verdict(EXEMPT, MARK)
        lists = self.lists or Lists()
        for place in info.places:
            for module, name in relative_names(place):
                if reason := _mark(module, name, lists):
                    return Verdict(EXEMPT, reason)
        own = _own_decay(info.parameter)
        return Verdict(FULL, "not marked") if own is None else self._by_own(own)

    def _by_own(self, own: float) -> Verdict:
        """Decide for a parameter whose settings name a decay of its own."""
        told = f"{SETTINGS} has weight_decay {number_text(own)}"
        if own == 0:
            return Verdict(EXEMPT, told)
        if not self.weight_decay:
            raise ValueError(
                f"its {told}, which scales the optimizer's own, and that is not "
                f"known. Write marked(weight_decay=...) with the optimizer's."
            )
        return Verdict(Decay(own / self.weight_decay), told)


def _own_decay(param: Tensor) -> float | None:
    settings = getattr(param, SETTINGS, None)
    own = settings.get("weight_decay") if isinstance(settings, Mapping) else None
    return None if own is None else float(own)


def _mark(module: nn.Module, name: str, lists: Lists) -> str | None:
    who = type(module).__name__
    # Not getattr: wrappers answer for the module inside, which is asked itself.
    if vars(module).get(MARK) is True:
        return f"{MARK} of {who}"
    for method in ("no_weight_decay", "no_weight_decay_patterns"):
        if listed := listing(name, lists.names(module, method)):
            return f"{who}.{method}() lists {listed!r}"
    for keyword in lists.names(module, "no_weight_decay_keywords"):
        if keyword in name:
            return f"{who}.no_weight_decay_keywords() lists {keyword!r}"
    return None


def marked(weight_decay: float | None = None) -> Policy:
    """Exempt what the model's author marked, and decay the rest.

    A parameter is marked by a true attribute ``_no_weight_decay``, by standing in
    the list that ``no_weight_decay()`` or ``no_weight_decay_patterns()`` of any
    module above it returns (names or globs, as seen from that module), or by a name
    that contains one of the module's ``no_weight_decay_keywords()``. Modules inside
    DDP, FSDP and ``torch.compile`` wrappers are asked, too. A parameter's own
    settings, ``_optim = {"weight_decay": 0}``, exempt it, too.

    Args:
        weight_decay: The optimizer's own, above 0. Settings with another decay than
            0 scale it: ``_optim = {"weight_decay": 0.05}`` decays half as much
            where it is 0.1. By default such a parameter is an error.

    Raises:
        TypeError: ``weight_decay`` is no number.
        ValueError: ``weight_decay`` is not above 0, infinite or NaN.

    Example:
        >>> marked() * marked(weight_decay=0.1)
        marked() * marked(weight_decay=0.1)
    """
    if weight_decay is not None and not isinstance(weight_decay, Real):
        raise TypeError(
            f"`weight_decay` must be a number, not {received(weight_decay)}. "
            f"Write for example marked(weight_decay=0.1)."
        )
    if weight_decay is not None and not 0 < float(weight_decay) < math.inf:
        raise ValueError(
            f"`weight_decay` must be finite and > 0, not {weight_decay}. "
            f"Write for example marked(weight_decay=0.1)."
        )
    return Marked(weight_decay)
