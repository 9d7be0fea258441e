"""What a rule matches: names, modules, parameters and ready-made predicates.

:func:`as_selector` turns what a user writes into a frozen :class:`Selector` that
answers ``matches(info)``, says what it must know to answer, and prints as it was
written. A tied parameter matches when any of its places does. Selectors join with
``|`` (any), ``&`` (all) and ``~`` (not).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from itertools import chain
from typing import Any, Literal

from torch import Tensor, nn

from selective_optim._text import received
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.callables import StrictInfo, callable_text, picklable
from selective_optim.policies.recognition import (
    attribute,
    bias_part,
    embedding_part,
    layer_weight,
    norm_part,
    original_class,
    token_leaf,
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

    @property
    def required(self) -> tuple[Selector, ...]:
        """The selectors in this one that must match at least one parameter."""
        return (self,) if self.by_name else ()

    def __or__(self, other: object) -> Selector:
        return _joined(AnyOf, "|", self, other)

    def __ror__(self, other: object) -> Selector:
        return _joined(AnyOf, "|", other, self)

    def __and__(self, other: object) -> Selector:
        return _joined(AllOf, "&", self, other)

    def __rand__(self, other: object) -> Selector:
        return _joined(AllOf, "&", other, self)

    def __invert__(self) -> Selector:
        return Not(self)

    def told(self, info: ParameterInfo) -> str:
        """Write the selector as a reason that it selected a parameter."""
        return repr(self)


@dataclass(frozen=True, repr=False)
class NamePattern(Selector):
    """A glob on the whole canonical name, or a regular expression searched in it.

    The gain and the direction of weight norm share that name, and are also known by
    their own, which end in ``original0`` and ``original1``.
    """

    pattern: str | re.Pattern[str]
    needs = frozenset({"names"})
    by_name = True

    def __repr__(self) -> str:
        if isinstance(self.pattern, str):
            return repr(self.pattern)
        # Python's own repr of a pattern cuts it after 200 characters.
        flags = self.pattern.flags & ~re.UNICODE
        told = f", {re.RegexFlag(flags)!r}" if flags else ""
        return f"re.compile({self.pattern.pattern!r}{told})"

    @cached_property
    def _find(self) -> Callable[[str], object]:
        if isinstance(self.pattern, str):
            return re.compile(translate(self.pattern)).match
        return self.pattern.search

    def at(self, place: ParameterInfo) -> bool:
        return any(map(self._find, filter(None, (place.name, place.own_name))))

    def __getstate__(self) -> dict[str, Any]:
        return {"pattern": self.pattern}


@dataclass(frozen=True, repr=False)
class InsideClass(Selector):
    """Any parameter inside a module of a class."""

    cls: type[nn.Module]
    needs = frozenset({"modules"})

    def __repr__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        """The shortest name by which a policy's text finds the class."""
        name = self.cls.__name__
        if getattr(nn, name, None) is self.cls:
            return f"nn.{name}"
        # This walks all classes of modules that are loaded, hence once.
        unique = len(_classes_named(name)) == 1
        return name if unique else _path_of(self.cls)

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


def _plain(place: ParameterInfo) -> str | None:
    return None


@dataclass(frozen=True, repr=False)
class Predicate(Selector):
    """A ready-made selector that pickles and prints as its name."""

    name: str
    question: Callable[[ParameterInfo], bool]
    needs: frozenset[Need] = frozenset()
    # Tells how it was found, where that is not plain to see.
    found: Callable[[ParameterInfo], str | None] = _plain

    def __repr__(self) -> str:
        return self.name

    def told(self, info: ParameterInfo) -> str:
        places = (info, *info.elsewhere)
        how = next(filter(None, map(self.found, places)), None)
        return f"{self.name}: {how}" if how else self.name

    def __reduce__(self) -> str:
        return self.name

    def __call__(self, *infos: ParameterInfo) -> bool:
        if len(infos) != 1 or not isinstance(infos[0], ParameterInfo):
            raise TypeError(
                f"`{self.name}` is a selector as it stands, and not what makes one. "
                f"Write for example exclude({self.name})."
            )
        return self.matches(infos[0])

    def at(self, place: ParameterInfo) -> bool:
        return self.question(place)


@dataclass(frozen=True, repr=False)
class Joined(Selector):
    """Several selectors that answer together."""

    parts: tuple[Selector, ...]

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # that of the parts
        return frozenset[Need]().union(*(part.needs for part in self.parts))

    @property
    def required(self) -> tuple[Selector, ...]:
        return tuple(chain.from_iterable(part.required for part in self.parts))


class AnyOf(Joined):
    """Selects what any of its parts selects."""

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))

    def matches(self, info: ParameterInfo) -> bool:
        return any(part.matches(info) for part in self.parts)


class AllOf(Joined):
    """Selects what all of its parts select."""

    def __repr__(self) -> str:
        return " & ".join(map(_inner_text, self.parts))

    def matches(self, info: ParameterInfo) -> bool:
        return all(part.matches(info) for part in self.parts)


@dataclass(frozen=True, repr=False)
class Not(Selector):
    """Selects what another does not select at any place."""

    part: Selector

    def __repr__(self) -> str:
        return f"~{_inner_text(self.part)}"

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # that of the part
        return self.part.needs

    @property
    def required(self) -> tuple[Selector, ...]:
        return self.part.required

    def matches(self, info: ParameterInfo) -> bool:
        return not self.part.matches(info)


def _inner_text(part: Selector) -> str:
    return f"({part!r})" if isinstance(part, Joined) else repr(part)


def _joined(kind: type[Joined], sign: str, *items: object) -> Selector:
    """Join two selectors, and what they are joined of in the same way.

    Raises:
        TypeError: One of them is no selector.
    """
    try:
        chosen = list(map(as_selector, items))
    except TypeError as error:
        raise TypeError(f"`{sign}` joins selectors: {error}") from None
    parts = (s.parts if type(s) is kind else (s,) for s in chosen)
    return kind(tuple(chain.from_iterable(parts)))


def _classes(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for child in cls.__subclasses__():
        yield child
        yield from _classes(child)


def _classes_named(name: str) -> list[type[nn.Module]]:
    """List the module classes of a name, without those that another replaced.

    A notebook's cell that ran twice leaves two classes behind, of which the path
    leads to the second.
    """
    found = list({c: None for c in _classes(nn.Module) if c.__name__ == name})
    reached = [cls for cls in found if _at_path(_path_of(cls)) is cls]
    return reached or found


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _at_path(path: str) -> object:
    """Return what stands at a dotted path in the modules that are loaded."""
    parts = path.split(".")
    for size in range(len(parts) - 1, 0, -1):
        found: object = sys.modules.get(".".join(parts[:size]))
        if found is not None:
            for part in parts[size:]:
                found = getattr(found, part, None)
            return found
    return None


def loaded_class(name: str) -> type[nn.Module] | None:
    """Find a module class by name, or by its path, among those that are loaded.

    Raises:
        ValueError: Several classes bear the name.
    """
    at_path = _at_path(f"torch.{name}") or _at_path(name)
    if isinstance(at_path, type) and issubclass(at_path, nn.Module):
        return at_path
    found = [] if "." in name else _classes_named(name)
    if len(found) > 1:
        paths = " or ".join(sorted(map(_path_of, found)))
        raise ValueError(f"{name} is the name of {len(found)} classes. Write {paths}.")
    return found[0] if found else None


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
    return bias_part(place.owner, place.leaf)


def _how_norm(place: ParameterInfo) -> str | None:
    return norm_part(place.owner, place.leaf)


def _is_norm(place: ParameterInfo) -> bool:
    return _how_norm(place) is not None


def _is_embedding(place: ParameterInfo) -> bool:
    leaf = attribute(place.name, place.path)
    return embedding_part(place.owner, leaf, place.shape)


def _is_token(place: ParameterInfo) -> bool:
    return token_leaf(attribute(place.name, place.path))


def _is_layer_weight(place: ParameterInfo) -> bool:
    leaf = attribute(place.name, place.path)
    return layer_weight(place.owner, leaf, place.shape)


def _is_vector(place: ParameterInfo) -> bool:
    return place.ndim is not None and place.ndim < 2


def _is_anything(place: ParameterInfo) -> bool:
    return True


# A bias is added to what its module computes, whatever its shape.
is_bias = Predicate("is_bias", _is_bias, frozenset({"names"}))
# What belongs to a norm scales or shifts what has just been normalized.
is_norm = Predicate("is_norm", _is_norm, frozenset({"modules"}), _how_norm)
# An embedding is a learned row for an index, a position or a special token: lookup
# tables, tables of positions and of relative ones, and all that is_token selects.
is_embedding = Predicate("is_embedding", _is_embedding, frozenset({"modules"}))
# A token is a learned row that stands in the input for no index: class, mask and
# register tokens, separators, queries.
is_token = Predicate("is_token", _is_token, frozenset({"names"}))
# The weight of a linear, convolution, attention, recurrent or embedding layer.
is_layer_weight = Predicate(
    "is_layer_weight", _is_layer_weight, frozenset({"modules", "shapes"})
)
is_vector = Predicate("is_vector", _is_vector, frozenset({"shapes"}))
everything = Predicate("everything", _is_anything)

# What a parameter is; the first that matches says so, so a norm's bias is a norm's.
KINDS = {
    "norm": is_norm,
    "bias": is_bias,
    "embedding": is_embedding,
    "vector": is_vector,
}


def kind_of(info: ParameterInfo) -> str:
    """Say what a parameter is: norm, bias, embedding, vector or weight."""
    return next((k for k, known in KINDS.items() if known.matches(info)), "weight")
