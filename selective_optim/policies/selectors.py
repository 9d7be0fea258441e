"""What a rule matches: names, modules, parameters and ready-made predicates.

:func:`as_selector` turns what a user writes into a frozen :class:`Selector` that
answers ``matches(info)``, says what it must know to answer, and prints as it was
written. A tied parameter matches when any of its places does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from selective_optim._text import received
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.callables import StrictInfo, callable_text, picklable
from selective_optim.policies.recognition import (
    bias_leaf,
    embedding_leaf,
    embedding_module,
    norm_module,
    original_class,
)

Need = Literal["names", "modules", "shapes"]


class Selector:
    """A question with the answer yes or no, asked of one parameter."""

    needs: frozenset[Need] = frozenset()
    # Whether matching no parameter is a mistake: so it is for a name or an object,
    # not for a class or a predicate, which are written for any model.
    by_name = False

    def matches(self, info: ParameterInfo) -> bool:
        """Tell whether the parameter is selected at any of its places."""
        return self.at(info) or any(map(self.at, info.elsewhere))

    def at(self, place: ParameterInfo) -> bool:
        """Tell whether one place of the parameter is selected."""
        raise NotImplementedError  # pragma: no cover


@dataclass(frozen=True, repr=False)
class NamePattern(Selector):
    """A glob on the whole canonical name, or a regular expression searched in it."""

    pattern: str | re.Pattern[str]
    needs = frozenset({"names"})
    by_name = True

    def __repr__(self) -> str:
        return repr(self.pattern)

    @cached_property
    def _find(self) -> Callable[[str], object]:
        if isinstance(self.pattern, str):
            return re.compile(translate(self.pattern)).match
        return self.pattern.search

    def at(self, place: ParameterInfo) -> bool:
        return bool(self._find(place.name or ""))

    def __getstate__(self) -> dict[str, Any]:
        return {"pattern": self.pattern}


@dataclass(frozen=True, repr=False)
class InsideClass(Selector):
    """Any parameter inside a module of a class."""

    cls: type[nn.Module]
    needs = frozenset({"modules"})

    def __repr__(self) -> str:
        public = getattr(nn, self.cls.__name__, None) is self.cls
        return f"nn.{self.cls.__name__}" if public else self.cls.__name__

    def at(self, place: ParameterInfo) -> bool:
        return any(
            isinstance(module, self.cls) or original_class(module) == self.cls.__name__
            for module in place.path
        )


@dataclass(frozen=True, eq=False, repr=False)
class Identity(Selector):
    """One parameter, or any parameter inside one module, told by identity."""

    target: nn.Module | Tensor
    by_name = True

    def __repr__(self) -> str:
        if isinstance(self.target, nn.Module):
            return f"<{type(self.target).__name__} instance>"
        return f"<parameter of shape {tuple(self.target.shape)}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.target is other.target

    def __hash__(self) -> int:
        return id(self.target)

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # depends on target
        return frozenset({"modules"} if isinstance(self.target, nn.Module) else ())

    def at(self, place: ParameterInfo) -> bool:
        return self.target is place.parameter or any(
            m is self.target for m in place.path
        )


@dataclass(frozen=True, repr=False)
class Question(Selector):
    """Any callable from :class:`ParameterInfo` to bool."""

    function: Callable[[ParameterInfo], bool]

    def __repr__(self) -> str:
        return callable_text(self.function)

    def at(self, place: ParameterInfo) -> bool:
        answer = self.function(StrictInfo(place))
        # No `bool(answer)`: a forgotten `return` would select nothing, silently.
        if answer not in (True, False):
            raise TypeError(
                f"the selector {self!r} must return True or False, not "
                f"{received(answer)}. Write for example return bool(...)."
            )
        return bool(answer)

    def __deepcopy__(self, memo: object) -> Question:
        return self  # frozen, and functions are not copied

    def __reduce__(self) -> tuple[Any, ...]:
        return Question, (picklable(self.function),)


@dataclass(frozen=True, repr=False)
class Predicate(Selector):
    """A ready-made selector that pickles and prints as its name."""

    name: str
    question: Callable[[ParameterInfo], bool]
    needs: frozenset[Need] = frozenset()

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> str:
        return self.name

    def __call__(self, info: ParameterInfo) -> bool:
        return self.matches(info)

    def at(self, place: ParameterInfo) -> bool:
        return self.question(place)


def as_selector(item: object) -> Selector:
    """Make a selector of a glob, pattern, class, module, parameter or callable.

    Raises:
        TypeError: ``item`` is none of these.
    """
    if isinstance(item, Selector):
        return item
    if isinstance(item, (str, re.Pattern)):
        return NamePattern(item)
    if isinstance(item, type) and issubclass(item, nn.Module):
        return InsideClass(item)
    if isinstance(item, (nn.Module, Tensor)):
        return Identity(item)
    if callable(item) and not isinstance(item, type):
        return Question(item)
    raise TypeError(
        f"a selector must be a glob, a compiled regular expression, a module class, "
        f"a module, a parameter or a callable, not {received(item)}. "
        f'Write for example "*.bias" or nn.LayerNorm.'
    )


def _is_bias(place: ParameterInfo) -> bool:
    return bias_leaf(place.leaf)


def _is_norm(place: ParameterInfo) -> bool:
    return norm_module(place.owner)


def _is_embedding(place: ParameterInfo) -> bool:
    return embedding_module(place.owner) or embedding_leaf(place.leaf)


def _is_vector(place: ParameterInfo) -> bool:
    return place.ndim is not None and place.ndim < 2


def _is_anything(place: ParameterInfo) -> bool:
    return True


is_bias = Predicate("is_bias", _is_bias, frozenset({"names"}))
is_norm = Predicate("is_norm", _is_norm, frozenset({"modules"}))
is_embedding = Predicate("is_embedding", _is_embedding, frozenset({"modules"}))
is_vector = Predicate("is_vector", _is_vector, frozenset({"shapes"}))
everything = Predicate("everything", _is_anything)
