"""Selectors, which tell what a rule matches, and what every policy can do with them.

A tied parameter matches when any of its places does. A lambda that reads ``info.name``
where no name is known must not decide on ``None``: the strict view raises.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from itertools import chain
from numbers import Real
from typing import Any, Literal

from torch import Tensor, nn

from selective_optim._text import class_text, received
from selective_optim._torch import original_class
from selective_optim.decay import FULL, Answer, Decay
from selective_optim.parameters import ParameterInfo

# "leaves" are names of attributes; a callable may read "anything".
Need = Literal["names", "leaves", "modules", "shapes", "anything"]
NAMES = frozenset[Need]({"names"})
LEAVES = frozenset[Need]({"leaves"})
MODULES = frozenset[Need]({"modules"})
SHAPES = frozenset[Need]({"shapes"})
ANYTHING = frozenset[Need]({"anything"})
# What a parameter is can be known without its name in the model.
KINDS = LEAVES | MODULES
# What a callable of the user's may not read unless it is known.
REQUIRED = frozenset({"name", "names", "leaf", "owner", "path", "shape", "ndim"})


def lacking(needs: frozenset[Need], info: ParameterInfo) -> str:
    """Say what a policy needs that is not known of a parameter; "" if nothing."""
    if "modules" in needs and info.owner is None:
        return "module types"
    no_name = "names" in needs and info.name is None
    no_leaf = "leaves" in needs and info.leaf is None
    return "names" if no_name or no_leaf else ""


class UnknownError(Exception):
    """A callable read a field that is not known of the parameter."""


class AnswerError(Exception):
    """A callable policy returned no decay: the value, kind of error, broken rule."""


class UnsureError(ValueError):
    """A selector asks for the output layer, and it is not known: text, likeliest."""

    def __str__(self) -> str:
        return str(self.args[0])


class StrictInfo(ParameterInfo):
    """The same knowledge; reading what is not there raises instead of ``None``."""

    def __init__(self, info: ParameterInfo) -> None:
        vars(self).update(vars(info))
        vars(self)["elsewhere"] = tuple(map(StrictInfo, info.elsewhere))

    def __getattribute__(self, field: str) -> Any:
        value = super().__getattribute__(field)
        # The shape of a scalar is empty and known, and of another type.
        unknown = value is None or (type(value) is tuple and not value)
        if unknown and field in REQUIRED:
            raise UnknownError(field)
        return value

    def __getattr__(self, field: str) -> Any:
        fields = ", ".join(vars(self))
        raise AttributeError(
            f"ParameterInfo has no attribute {field!r}. Read one of {fields}."
        )

    def __repr__(self) -> str:
        return repr(ParameterInfo(**vars(self)))


@dataclass(frozen=True)
class LostCallable:
    """Stands for a callable that does not pickle; raises where it is asked."""

    text: str

    def __repr__(self) -> str:
        return self.text

    def __call__(self, info: ParameterInfo) -> Any:
        raise ValueError(
            f"{self.text} did not pickle, and a new parameter is to be decided for. "
            f"Type optimizer.wd_policy = ..., or write the policy as a function."
        )


@dataclass(frozen=True, repr=False)
class Callback:
    """A function of the user's: it prints as its name or line, and need not pickle."""

    function: Callable[[ParameterInfo], Any]

    def __repr__(self) -> str:
        function: Any = self.function
        if isinstance(function, partial) or not hasattr(function, "__qualname__"):
            return repr(function)
        name: str = function.__qualname__.rpartition("<locals>.")[2]
        code = getattr(function, "__code__", None)
        if name != "<lambda>" or code is None:
            return name
        file = code.co_filename.rpartition("/")[2]
        return f"<lambda at {file}:{code.co_firstlineno}>"

    def __deepcopy__(self, memo: object) -> Callback:
        return self  # frozen, and functions are not copied

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            # Tried at once: an error inside pickle names neither policy nor remedy.
            pickle.dumps(self.function)
        except (pickle.PicklingError, AttributeError, TypeError):
            # Decisions are pickled with their optimizer: only a new parameter asks it.
            return type(self), (LostCallable(repr(self)),)
        return type(self), (self.function,)


class Selector:
    """A question with the answer yes or no, asked of one parameter."""

    needs: frozenset[Need] = frozenset()
    # To match nothing is a mistake of a name or object; other selectors fit any model.
    by_name = False

    def matches(self, info: ParameterInfo) -> bool:
        """Tell whether the parameter is selected at any of its places."""
        return any(map(self.at, info.places))

    def at(self, place: ParameterInfo) -> bool:
        raise NotImplementedError  # pragma: no cover

    @property
    def leaves(self) -> tuple[Selector, ...]:
        """The selectors that this one is joined of, or itself."""
        return (self,)

    def __or__(self, other: object) -> Selector:
        return _joined("|", self, other)

    def __ror__(self, other: object) -> Selector:
        return _joined("|", other, self)

    def __and__(self, other: object) -> Selector:
        return _joined("&", self, other)

    def __rand__(self, other: object) -> Selector:
        return _joined("&", other, self)

    def __invert__(self) -> Selector:
        return Joined("~", (self,))

    def told(self, info: ParameterInfo) -> str:
        """Write the selector as a reason that it selected a parameter."""
        return repr(self)


@dataclass(frozen=True, repr=False)
class NamePattern(Selector):
    """A glob on the whole canonical name, or a regular expression searched in it."""

    pattern: str | re.Pattern[str]
    needs = NAMES
    by_name = True

    def __repr__(self) -> str:
        if isinstance(self.pattern, str):
            return repr(self.pattern)
        # Python's own repr of a pattern cuts it after 200 characters.
        flags = self.pattern.flags & ~re.UNICODE
        flags_text = f", {re.RegexFlag(flags)!r}" if flags else ""
        return f"re.compile({self.pattern.pattern!r}{flags_text})"

    def at(self, place: ParameterInfo) -> bool:
        names = filter(None, (place.name, place.own_name))
        if isinstance(self.pattern, str):
            return any(fnmatchcase(name, self.pattern) for name in names)
        return any(map(self.pattern.search, names))


@dataclass(frozen=True, repr=False)
class InsideClass(Selector):
    """Any parameter inside a module of a class."""

    cls: type[nn.Module]
    needs = MODULES

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
        return MODULES if isinstance(self.target, nn.Module) else frozenset()

    def at(self, place: ParameterInfo) -> bool:
        # Of a parameter alone no modules may be known, and asking for them raises.
        return self.target is place.parameter or any(
            module is self.target for module in place.path
        )


@dataclass(frozen=True, repr=False)
class Question(Callback, Selector):
    """Any callable from ``ParameterInfo`` to bool."""

    needs = ANYTHING

    def at(self, place: ParameterInfo) -> bool:
        answer = self.function(StrictInfo(place))
        # No `bool(answer)`: a forgotten `return` would select nothing, silently.
        if answer not in (True, False):
            raise TypeError(
                f"the selector {self!r} must return True or False, not "
                f"{received(answer)}. Write for example return bool(...)."
            )
        return bool(answer)


@dataclass(frozen=True, repr=False)
class Joined(Selector):
    """Selects what any of its parts does (``|``), all (``&``) or its one does not."""

    sign: Literal["|", "&", "~"]
    parts: tuple[Selector, ...]

    def __repr__(self) -> str:
        texts = list(map(repr, self.parts))
        for i, part in enumerate(self.parts if self.sign != "|" else ()):
            if isinstance(part, Joined) and part.sign != "~":
                texts[i] = f"({texts[i]})"
        return f"~{texts[0]}" if self.sign == "~" else f" {self.sign} ".join(texts)

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # that of the parts
        return frozenset[Need]().union(*(part.needs for part in self.parts))

    @property
    def leaves(self) -> tuple[Selector, ...]:
        return tuple(chain.from_iterable(part.leaves for part in self.parts))

    def matches(self, info: ParameterInfo) -> bool:
        matched = (part.matches(info) for part in self.parts)
        if self.sign == "~":
            return not any(matched)
        return any(matched) if self.sign == "|" else all(matched)


def _joined(sign: Literal["|", "&"], *items: object) -> Selector:
    try:
        selectors = list(map(as_selector, items))
    except TypeError as error:
        raise TypeError(f"`{sign}` joins selectors: {error}") from None
    parts = [
        s.parts if isinstance(s, Joined) and s.sign == sign else (s,) for s in selectors
    ]
    return Joined(sign, tuple(chain.from_iterable(parts)))


def as_selector(item: object) -> Selector:
    """Make a selector of a glob, pattern, class, module, parameter or callable."""
    if isinstance(item, Selector):
        return item
    if isinstance(item, (str, re.Pattern)):
        return NamePattern(item)
    if isinstance(item, type) and issubclass(item, nn.Module):
        return InsideClass(item)
    if isinstance(item, (nn.Module, Tensor)):
        return Identity(item)
    if callable(item) and not isinstance(item, (type, Policy)):
        return Question(item)
    raise TypeError(
        f"a selector must be a glob, a compiled regular expression, a module class, "
        f"a module, a parameter or a callable, not {received(item)}. "
        f'Write for example "*.bias" or nn.LayerNorm.'
    )


class Policy:
    """A frozen map from parameters to decays; ``a * b`` applies both."""

    selectors: tuple[Selector, ...] = ()  # which this policy asks
    missing_ok: bool = False  # whether they may all match nothing
    # Multipliers that read like decays, and what to write instead.
    doubts: tuple[tuple[float, str], ...] = ()

    @cached_property
    def needs(self) -> frozenset[Need]:
        """What must be known of a parameter before this policy can decide."""
        return frozenset[Need]().union(*[selector.needs for selector in self.selectors])

    @property
    def required(self) -> tuple[Selector, ...]:
        """The selectors that should match at least one parameter."""
        if self.missing_ok:
            return ()
        return tuple([leaf for s in self.selectors for leaf in s.leaves])

    def decide(self, info: ParameterInfo) -> Answer:
        """Decide for one parameter and say why."""
        raise NotImplementedError  # pragma: no cover

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        """Return the policy after a look at the modules that it will be asked about."""
        return self

    def __call__(self, info: ParameterInfo) -> Decay:
        return self.decide(info).decay

    def __mul__(self, other: object) -> Policy:
        if isinstance(other, Policy):
            return Product(self, other)
        raise TypeError(_not_joined(self, "*", other))

    def __rmul__(self, other: object) -> Policy:
        raise TypeError(_not_joined(other, "*", self))

    def __add__(self, other: object) -> Policy:
        raise TypeError(_not_joined(self, "+", other))

    def __or__(self, other: object) -> Policy:
        raise TypeError(_not_joined(self, "|", other))

    def __and__(self, other: object) -> Policy:
        raise TypeError(_not_joined(self, "&", other))


def either(selector: str) -> str:
    """Write both policies that a selector by itself may have been meant as."""
    return f"exclude({selector}) to exempt it, or only({selector}) to decay no other"


def _not_joined(left: object, sign: str, right: object) -> str:
    policy, other = (left, right) if isinstance(left, Policy) else (right, left)
    if isinstance(other, Policy):
        rule = f"policies are joined with `*`, not with `{sign}`"
        return f"{rule}. Write {left!r} * {right!r}."
    factor = "as_policy(...)"
    if isinstance(other, Real):
        factor = f"scale(everything, by={other})"
    elif isinstance(other, str):
        factor = f"named({other!r})"
    elif isinstance(other, Selector):
        factor = either(repr(other))
    rule = "policies multiply with policies" if sign == "*" else "policies are joined"
    written = f"{received(left)} {sign} {received(right)}"
    return f"{rule}, not {written}. Write {policy!r} * {factor}."


@dataclass(frozen=True, repr=False)
class Product(Policy):
    """Two policies at once: multipliers multiply, else the right-hand one wins."""

    left: Policy
    right: Policy

    def __repr__(self) -> str:
        right = f"({self.right!r})" if isinstance(self.right, Product) else self.right
        return f"{self.left!r} * {right}"

    @cached_property
    def needs(self) -> frozenset[Need]:
        return self.left.needs | self.right.needs

    @cached_property
    def required(self) -> tuple[Selector, ...]:
        return self.left.required + self.right.required

    @property
    def doubts(self) -> tuple[tuple[float, str], ...]:  # type: ignore[override]  # read only
        return self.left.doubts + self.right.doubts

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        return Product(self.left.bind(roots), self.right.bind(roots))

    def decide(self, info: ParameterInfo) -> Answer:
        left, right = self.left.decide(info), self.right.decide(info)
        reasons = [answer.reason for answer in (left, right) if answer.decay != FULL]
        return Answer(left.decay * right.decay, ", ".join(reasons or [right.reason]))
