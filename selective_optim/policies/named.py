"""Policies by name and as text, and what else ``wd_policy`` takes.

``ast.parse`` takes a text apart and runs nothing. What each part may mean is looked up
here, and everything else is refused at its place.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from types import FunctionType
from typing import Any, Literal, TypeAlias, TypeVar

from torch import nn

from selective_optim._text import loaded_class, received
from selective_optim.decay import FORMS, Decay
from selective_optim.parameters import ParameterInfo
from selective_optim.policies import predicates
from selective_optim.policies.layerwise import layerwise
from selective_optim.policies.predicates import (
    Predicate,
    everything,
    is_bias,
    is_embedding,
    is_layer_weight,
    is_norm,
    is_vector,
)
from selective_optim.policies.recipes import RECIPES, marked
from selective_optim.policies.rules import (
    Function,
    exclude,
    first_match,
    fixed,
    form,
    only,
    scale,
    towards,
)
from selective_optim.policies.selectors import Policy, Selector, as_selector, either

# The command line prints the first sentence above each.
NAMED: dict[str, Policy] = {
    # Decays everything.
    "all": only(everything),
    # Exempts everything.
    "none": exclude(everything),
    # Exempts biases.
    "no_bias": exclude(is_bias),
    # Exempts parameters of normalization layers.
    "no_norm": exclude(is_norm),
    # Exempts biases and parameters of normalization layers.
    "no_bias_norm": exclude(is_bias, is_norm),
    # Exempts biases, norms, embeddings and tokens.
    "no_bias_norm_embedding": exclude(is_bias, is_norm, is_embedding),
    # Exempts tensors of fewer than two dimensions; needs shapes only.
    "matrices": exclude(is_vector),
    # Decays weights of layers; exempts everything else.
    "layer_weights": only(is_layer_weight),
    **RECIPES,
}

# For editors, which offer the names. A test holds it to ``NAMED``.
# fmt: off
PolicyName: TypeAlias = Literal[
    "all", "none", "no_bias", "no_norm", "no_bias_norm", "no_bias_norm_embedding",
    "matrices", "layer_weights", "huggingface", "timm", "fastai", "mmengine",
    "detectron2", "torchvision", "torchvision_swin", "ultralytics", "yolox", "rtdetr",
    "sam2", "swin", "convnext", "mae", "dinov2", "dinov3", "open_clip",
    "open_clip_2025", "nanogpt", "mingpt", "megatron", "gptneox", "rwkv", "olmo",
    "smollm3", "qwen3_next", "kimi", "dion", "marin",
]
# fmt: on
# Any text: a policy may stand in a configuration, as an expression.
WdPolicy: TypeAlias = (
    PolicyName
    | str
    | Policy
    | Mapping[Any, float | Decay]
    | Callable[[ParameterInfo], float | Decay]
    | None
)

EXAMPLE = 'for example wd_policy="no_bias_norm"'
GLOB = re.compile(r"[*?[]")
GLOB_OR_PATH = re.compile(r"[*?[.]")
MAKERS: dict[Any, str] = {
    exclude: 'exclude("*.bias")',
    only: 'only("*.weight")',
    scale: 'scale("head.*", by=0.1)',
    form: 'form("l2", "head.*")',
    towards: "towards(1, is_norm)",
    fixed: 'fixed(0.05, "head.*")',
    layerwise: "layerwise(0.75)",
    marked: "marked()",
}
# More than a name or a glob: a glob has no parentheses, and no space beside its `*`.
EXPRESSION = re.compile(r"[({|&~]|\w\s*\*\s+\w|\w\s+\*\s*\w")
WORDS = re.compile(r"[a-z]+|[A-Z][a-z]*")
SPLIT = re.compile(r"[^a-z0-9]+")
ALIKE = 0.8  # "no_bias_nrom" is 0.92 of a name, "None" 0.75 of one that decays nothing
NORM_WORDS = {"norm", "norms", "layernorm", "batchnorm", "rmsnorm", "ln", "bn"}


def named(name: str) -> Policy:
    """Look up a ready-made policy or a recipe.

    Args:
        name: Name of the policy, such as ``"no_bias_norm"`` or ``"timm"``.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: No policy has that name; the message lists the known ones.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"`named` takes a name, not {received(name)}. "
            f'Write for example named("no_bias_norm").'
        )
    if name in NAMED:
        return NAMED[name]
    problem = "not the name of a policy"
    layer = name.removeprefix("nn.")
    is_class = isinstance(getattr(nn, layer, None), type)
    if is_class or GLOB_OR_PATH.search(name):
        problem = f"a selector and {problem}"
        advice = f"Write wd_policy={either(f'nn.{layer}' if is_class else repr(name))}."
    elif name in FORMS:
        problem = f"a form of decay and {problem}"
        advice = f'Write wd_policy=form("{name}"), of selective_optim.policies.'
    else:
        problem += "; known are " + ", ".join(f'"{policy}"' for policy in NAMED)
        advice = closest(name, NAMED, 'Did you mean wd_policy="{}"?')
    raise ValueError(f"`wd_policy` {name!r} is {problem}. {advice}".rstrip())


def closest(name: str, names: Iterable[str], question: str) -> str:
    """Ask for the name of the same words, or but for a letter or two, if any."""
    words = sorted({*SPLIT.split(name.lower())} - {"and"})
    # "None" is a setting that was left out, and "none" turns decay off.
    candidates = [candidate for candidate in names if candidate != "none"]
    same = [c for c in candidates if sorted(SPLIT.split(c.lower())) == words]
    close = same or get_close_matches(name, candidates, n=1, cutoff=ALIKE)
    return question.format(close[0]) if close else ""


def parse(text: str) -> Policy:
    """Read a policy from text: a name, or an expression as ``repr`` prints it.

    An expression may contain the functions ``exclude``, ``only``, ``scale``, ``form``,
    ``towards``, ``fixed``, ``layerwise``, ``marked``, ``first_match`` and ``named``,
    names of policies, selectors, numbers and ``*``. A selector is a glob in quotes,
    ``re.compile('...')``, a predicate, or a loaded module class such as
    ``nn.LayerNorm``. ``|``, ``&`` and ``~`` join selectors. The function evaluates no
    code and imports nothing, so the text need not be trusted.

    Args:
        text: The policy, on one or several lines.

    Returns:
        The policy. ``parse(repr(policy)) == policy``, unless the policy holds
        callables, modules or parameters, which have no text.

    Raises:
        TypeError: ``text`` is not a string.
        ValueError: ``text`` is not a policy; the message shows the place.

    Example:
        >>> parse("no_bias_norm * scale('head.*' & ~is_bias, by=0.1)")
        exclude(is_bias, is_norm) * scale('head.*' & ~is_bias, by=0.1)
    """
    if not isinstance(text, str):
        raise TypeError(
            f"`parse` takes a text, not {received(text)}. "
            f"Write for example parse(\"exclude('*.bias')\")."
        )
    text = text.strip()
    if text in NAMED:
        return NAMED[text]
    if EXPRESSION.search(text) or text in FUNCTIONS or text in PREDICATES:
        return Reader(re.sub(r"\s*\n\s*", " ", text)).read()
    return named(text)


PREDICATES = {p.name: p for p in vars(predicates).values() if isinstance(p, Predicate)}
FUNCTIONS: dict[str, Callable[..., Policy]] = {
    function.__name__: function for function in (*MAKERS, first_match, named)
}


def as_policy(value: object) -> Policy:
    """Make a policy of a name, a text, a mapping, a callable or a policy object.

    Args:
        value: As ``wd_policy`` of an optimizer.

    Raises:
        TypeError: ``value`` is none of these.
        ValueError: No policy has the name, or the text is not a policy.
    """
    if isinstance(value, Policy):
        return value
    if isinstance(value, str):
        return parse(value)
    if isinstance(value, Mapping):
        return first_match(value)
    if isinstance(value, FunctionType) and value in MAKERS:
        raise TypeError(
            f"`wd_policy` must be a policy, and {value.__name__} is what makes one. "
            f"Write for example wd_policy={MAKERS[value]}."
        )
    if callable(value) and not isinstance(value, (type, Selector, nn.Module)):
        return Function(value)
    raise TypeError(
        f"`wd_policy` must be a name, a mapping, a callable or a policy, not "
        f"{received(value)}. Write {_meant(value)}."
    )


def _meant(value: object) -> str:
    """Write what to type for a value that is no policy, such as a list of selectors."""
    if not isinstance(value, (list, tuple, set, frozenset)):
        selector = _typed(value)
        return f"wd_policy={either(selector)}" if selector else EXAMPLE
    items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
    texts = [item for item in items if isinstance(item, str)]
    names, why = [text for text in texts if text in NAMED], ""
    words = [text for text in texts if not GLOB.search(text)]
    norms = [w for w in words if NORM_WORDS & {p.lower() for p in WORDS.findall(w)}]
    used = names
    # ["bias", "LayerNorm.weight"] is in many notebooks; in a ResNet it finds no norm.
    if norms and not names:
        biases = [word for word in words if word.lower().strip(".") == "bias"]
        names, used = ["no_bias_norm" if biases else "no_norm"], norms + biases
        why = (
            f", which knows norms by their class: a word such as {norms[0]!r} misses "
            f"those that a model calls otherwise"
        )
    selectors = [_typed(item) for item in items if item not in used]
    if not value or not all(selectors):
        return EXAMPLE
    if len(names) == 1 and not selectors:
        return f'wd_policy="{names[0]}"{why}'
    policies = [f'named("{name}")' for name in names]
    policies += [f"exclude({', '.join(selectors)})"] if selectors else []
    return f"wd_policy={' * '.join(policies)}{why}"


def _typed(item: object) -> str:
    """Write a selector as it is typed, or nothing where that cannot be done."""
    if isinstance(item, str):
        # Lists of plain words are searched for words, as in transformers' examples.
        return f'"{item}"' if GLOB.search(item) else f'"*{item}*"'
    try:
        text = repr(as_selector(item))
    except TypeError:
        return ""
    return "" if text.startswith("<") else text


TYPE_THIS = "Write for example exclude('*.bias', is_norm) * layerwise(0.75)."
WIDTH = 76  # of a text that a message shows; more is cut around the place
T = TypeVar("T")


class PolicyTextError(ValueError):
    """A policy's text cannot be read; the message points at the place."""


class Reader:
    """Reads one text as a policy; see :func:`parse`."""

    def __init__(self, text: str) -> None:
        self.text = text

    def read(self) -> Policy:
        try:
            return self._policy(ast.parse(self.text, mode="eval").body)
        except PolicyTextError:
            raise
        except SyntaxError as error:
            place = min((error.offset or 1) - 1, len(self.text))
            raise self._wrong(place, f"{error.msg}.") from None
        except ValueError as error:
            raise self._wrong(0, f"{error}.") from None
        except (RecursionError, MemoryError):
            raise self._wrong(0, "it is nested too deeply.") from None

    def _policy(self, node: ast.expr) -> Policy:
        match node:
            case ast.BinOp(left, ast.Mult(), right):
                return self._policy(left) * self._policy(right)
            case ast.Call(function) if (name := _dotted(function)) in FUNCTIONS:
                return self._call(node, FUNCTIONS[name])
            case ast.Name(name) if name in NAMED:
                return NAMED[name]
            case ast.Dict():
                return self._called(node, first_match, self._value(node))
        raise self._not_a_policy(node)

    def _not_a_policy(self, node: ast.expr) -> PolicyTextError:
        text, advice = ast.unparse(node), TYPE_THIS
        name = _dotted(getattr(node, "func", node))
        if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.BitOr):
            problem = f"{text} joins policies with no `*`."
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            problem = f"{text} is a number, and no policy."
            advice = f"Write scale(everything, by={text})."
        elif name in FUNCTIONS:
            problem = f"{name} is what makes a policy, and not called."
        elif name and name not in PREDICATES:
            kind, names = "name", [*NAMED]
            if isinstance(node, ast.Call):
                kind, names = "function", [*FUNCTIONS]
            problem = f"{name!r} is the {kind} of no policy."
            advice = closest(name, names, "Did you mean {}?") or TYPE_THIS
        else:
            self._selector(node)  # which raises if it is none
            problem = f"{text} is a selector, and no policy."
            advice = f"Write {either(text)}."
        return self._wrong(node, problem, advice)

    def _call(self, node: ast.Call, function: Callable[..., T]) -> T:
        arguments = list(map(self._value, node.args))
        keywords = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self._wrong(keyword.value, "`**` cannot stand here.")
            keywords[keyword.arg] = self._value(keyword.value)
        return self._called(node, function, *arguments, **keywords)

    def _called(
        self, node: ast.expr, function: Callable[..., T], *args: Any, **kwargs: Any
    ) -> T:
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError, re.error) as error:
            problem = f"{str(error).removesuffix('.')}."
            advice = "" if ". " in problem else TYPE_THIS
            raise self._wrong(node, problem, advice) from error

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(str() | int() | float() | None as value):
                return value
            case ast.UnaryOp(ast.USub(), part):
                if isinstance(value := self._value(part), int | float):
                    return -value
            case ast.UnaryOp(ast.Invert(), part):
                return ~self._selector(part)
            case ast.BinOp(left, ast.BitOr(), right):
                return self._selector(left) | self._selector(right)
            case ast.BinOp(left, ast.BitAnd(), right):
                return self._selector(left) & self._selector(right)
            case ast.Dict(keys, values) if None not in keys:  # as `**` gives
                selectors = [self._selector(key) for key in keys if key]
                return dict(zip(selectors, map(self._value, values)))
            case ast.Call(function) if _dotted(function) == "Decay":
                return self._call(node, Decay)
            case ast.Call(function) if _dotted(function) == "re.compile":
                return self._pattern(node)
            case ast.Call(function) if (name := _dotted(function)) in PREDICATES:
                problem = f"{name} is a selector and takes nothing."
                raise self._wrong(node, problem, f"Write {name}.")
            case ast.Name() | ast.Attribute() if name := _dotted(node):
                return self._named_selector(node, name)
        raise self._wrong(node, f"{ast.unparse(node)} is no selector, number or text.")

    def _selector(self, node: ast.expr) -> Selector:
        return self._called(node, as_selector, self._value(node))

    def _named_selector(self, node: ast.expr, name: str) -> Selector:
        if name in PREDICATES:
            return PREDICATES[name]
        if (cls := self._called(node, loaded_class, name)) is not None:
            return as_selector(cls)
        problem = f"{name} is no selector, and no module class that is loaded."
        layers = [f"nn.{layer}" for layer in dir(nn)] if "nn." in name else []
        names = [*PREDICATES, *layers]
        advice = closest(name, names, "Did you mean {}? Else import") or "Import"
        raise self._wrong(node, problem, f"{advice} the module of the class.")

    def _pattern(self, node: ast.Call) -> re.Pattern[str]:
        match [*node.args, *(keyword.value for keyword in node.keywords)]:
            case [ast.Constant(str(text))]:
                return self._called(node, re.compile, text)
            case [ast.Constant(str(text)), flags]:
                return self._called(node, re.compile, text, self._flags(flags))
        problem = "re.compile takes a text and flags."
        raise self._wrong(node, problem, r"Write for example re.compile('\\.bias$').")

    def _flags(self, node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return self._flags(node.left) | self._flags(node.right)
        module, _, name = _dotted(node).partition(".")
        if module != "re" or name not in re.RegexFlag.__members__:
            problem = f"{ast.unparse(node)} is no flag."
            raise self._wrong(node, problem, "Write for example re.IGNORECASE.")
        return int(re.RegexFlag[name])

    def _wrong(
        self, place: ast.expr | int, problem: str, advice: str = TYPE_THIS
    ) -> PolicyTextError:
        if isinstance(place, ast.expr):
            # Python counts in bytes of UTF-8.
            place = len(self.text.encode()[: place.col_offset].decode())
        start = max(0, place - WIDTH // 2)
        line = self.text[start : start + WIDTH]
        return PolicyTextError(
            f"`wd_policy` cannot be read at character {place + 1}: {problem}\n"
            f"    {line}\n    {' ' * (place - start)}^\n{advice}".rstrip()
        )


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        parent = _dotted(node.value)
        return f"{parent}.{node.attr}" if parent else ""
    return node.id if isinstance(node, ast.Name) else ""  # no name at all
