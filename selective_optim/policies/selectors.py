"""What a rule matches: names, modules, parameters and ready-made predicates.

:func:`as_selector` turns what a user writes into a frozen :class:`Selector` that
answers ``matches(info)``, says what it must know to answer, and prints as it was
written. A tied parameter matches when any of its places does. Selectors join with
``|`` (any), ``&`` (all) and ``~`` (not).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from itertools import chain
from typing import Any, Literal

from torch import Tensor, nn

from selective_optim._text import received
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.outputs import is_hidden, is_output_of
from selective_optim.policies.recognition import (
    bias_part,
    embedding_part,
    holder,
    layer_weight,
    norm_part,
    original_class,
    says_nothing,
    telling_places,
    token_leaf,
)
from selective_optim.policies.user_code import (
    StrictInfo,
    UnknownError,
    callable_text,
    class_text,
    picklable,
)

# "leaves" are names of attributes; a callable may read "anything".
Need = Literal["names", "leaves", "modules", "shapes", "anything"]


# What a parameter is can be known without its name in the model.
KINDS: frozenset[Need] = frozenset({"leaves", "modules"})


def lacking(needs: frozenset[Need], info: ParameterInfo) -> str:
    """Say what a policy needs that is not known of a parameter; "" if nothing."""
    if "modules" in needs and info.owner is None:
        return "module types"
    if "names" in needs and info.name is None:
        return "names"
    if "leaves" in needs and info.leaf is None:
        return "names"
    return ""


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
    def leaves(self) -> tuple[Selector, ...]:
        """The selectors that this one is joined of, or itself."""
        return (self,)

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
        # This walks all classes of modules that are loaded, hence once.
        return class_text(self.cls)

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
    """Any callable from ``ParameterInfo`` to bool."""

    function: Callable[[ParameterInfo], bool]
    needs = frozenset({"anything"})

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
    # Tells how it was recognized; empty where that is plain to see, None if it is not.
    question: Callable[[ParameterInfo], str | bool | None]
    needs: frozenset[Need] = frozenset()

    def __repr__(self) -> str:
        return self.name

    def told(self, info: ParameterInfo) -> str:
        found = map(self.question, telling_places(info))
        how = next((each for each in found if each and each is not True), None)
        return f"{self.name}: {how}" if how else self.name

    def __reduce__(self) -> str:
        return self.name

    def __call__(self, *infos: ParameterInfo) -> bool:
        if len(infos) != 1 or not isinstance(infos[0], ParameterInfo):
            raise TypeError(
                f"`{self.name}` is a selector as it stands, and not what makes one. "
                f"Write for example exclude({self.name})."
            )
        (info,) = infos
        known = ParameterInfo(**vars(info))
        # A callable that asks has not said before what it must know.
        asked = isinstance(info, StrictInfo) and self.needs & KINDS
        if asked and known.owner is not None and says_nothing(known):
            raise UnknownError("owner")
        return self.matches(info)

    def matches(self, info: ParameterInfo) -> bool:
        # A list beside the module that uses a parameter does not say what it is.
        return any(map(self.at, telling_places(info)))

    def at(self, place: ParameterInfo) -> bool:
        return self.question(place) not in (None, False)


@dataclass(frozen=True, repr=False)
class Joined(Selector):
    """Several selectors that answer together."""

    parts: tuple[Selector, ...]

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # that of the parts
        return frozenset[Need]().union(*(part.needs for part in self.parts))

    @property
    def leaves(self) -> tuple[Selector, ...]:
        return tuple(chain.from_iterable(part.leaves for part in self.parts))


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
    def leaves(self) -> tuple[Selector, ...]:
        return self.part.leaves

    def matches(self, info: ParameterInfo) -> bool:
        return not self.part.matches(info)


def _inner_text(part: Selector) -> str:
    return f"({part!r})" if isinstance(part, Joined) else repr(part)


def _joined(kind: type[Joined], sign: str, *items: object) -> Selector:
    try:
        chosen = list(map(as_selector, items))
    except TypeError as error:
        raise TypeError(f"`{sign}` joins selectors: {error}") from None
    parts = (s.parts if type(s) is kind else (s,) for s in chosen)
    return kind(tuple(chain.from_iterable(parts)))


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


# A bias is added to what its module computes, whatever its shape.
is_bias = Predicate("is_bias", bias_part, frozenset({"leaves"}))
# What belongs to a norm scales or shifts what has just been normalized.
is_norm = Predicate("is_norm", norm_part, frozenset({"modules"}))
# An embedding is a learned row for an index, a position or a special token: lookup
# tables, tables of positions and of relative ones, and all that is_token selects.
is_embedding = Predicate("is_embedding", embedding_part, frozenset({"modules"}))
# A token is a learned row that stands in the input for no index: class, mask and
# register tokens, separators, queries.
is_token = Predicate(
    "is_token", lambda place: token_leaf(holder(place)[1]), frozenset({"leaves"})
)
# The weight of a linear, convolution, attention, recurrent or embedding layer.
is_layer_weight = Predicate(
    "is_layer_weight", layer_weight, frozenset({"modules", "shapes"})
)


def is_weight(place: ParameterInfo) -> bool:
    """Tell whether a place is that of a matrix or more that embeds nothing."""
    # Of a tie the embedding may stand elsewhere, and the tie is then an output.
    wide = place.ndim is not None and place.ndim >= 2
    return wide and layer_weight(place) and not embedding_part(place)


KNOWN: frozenset[Need] = frozenset({"names", "modules", "shapes"})
# The layer that yields the model's answer, its bias included.
is_output = Predicate("is_output", lambda p: is_output_of(p, is_weight), KNOWN)
# A weight of two dimensions between embedding and output: what Muon is made for.
is_hidden_matrix = Predicate(
    "is_hidden_matrix", lambda p: p.ndim == 2 and is_hidden(p, is_weight), KNOWN
)
# The same of two or more, convolutions and stacked experts included.
is_hidden_weight = Predicate(
    "is_hidden_weight", lambda place: is_hidden(place, is_weight), KNOWN
)
# A weight of two dimensions, be it an embedding or an output.
is_matrix = Predicate("is_matrix", lambda p: p.ndim == 2 and layer_weight(p), KNOWN)
is_vector = Predicate(
    "is_vector",
    lambda place: place.ndim is not None and place.ndim < 2,
    frozenset({"shapes"}),
)
everything = Predicate("everything", lambda place: True)

# What a parameter is; the first that matches says so, so a norm's bias is a norm's.
PREDICATES = (is_norm, is_bias, is_embedding, is_vector)


def kind_of(info: ParameterInfo) -> str:
    """Say what a parameter is: norm, bias, embedding, vector or weight."""
    found = next((kind.name for kind in PREDICATES if kind.matches(info)), "weight")
    return found.removeprefix("is_")
