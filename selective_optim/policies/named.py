"""Policies by name, and what else ``wd_policy`` takes: mappings and callables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from types import FunctionType
from typing import Any, Literal, TypeAlias

from torch import nn

from selective_optim._text import received
from selective_optim.decay import FORMS, Decay
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.base import Policy
from selective_optim.policies.layerwise import layerwise
from selective_optim.policies.markers import marked
from selective_optim.policies.parser import PREDICATES, is_expression, read_policy
from selective_optim.policies.recipes import RECIPES
from selective_optim.policies.rules import (
    Function,
    exclude,
    first_match,
    form,
    only,
    scale,
    towards,
)
from selective_optim.policies.selectors import (
    Selector,
    as_selector,
    everything,
    is_bias,
    is_embedding,
    is_layer_weight,
    is_norm,
    is_vector,
)

NAMED: dict[str, Policy] = {
    "all": only(everything),
    "none": exclude(everything),
    "no_bias": exclude(is_bias),
    "no_norm": exclude(is_norm),
    "no_bias_norm": exclude(is_bias, is_norm),
    "no_bias_norm_embedding": exclude(is_bias, is_norm, is_embedding),
    "matrices": exclude(is_vector),
    "layer_weights": only(is_layer_weight),
    **RECIPES,
}

# For editors, which offer the names. A test holds it to ``NAMED``.
PolicyName: TypeAlias = Literal[
    "all",
    "none",
    "no_bias",
    "no_norm",
    "no_bias_norm",
    "no_bias_norm_embedding",
    "matrices",
    "layer_weights",
    "huggingface",
    "timm",
    "fastai",
    "mmengine",
    "detectron2",
    "torchvision",
    "torchvision_swin",
    "ultralytics",
    "yolox",
    "rtdetr",
    "sam2",
    "swin",
    "convnext",
    "mae",
    "dinov2",
    "dinov3",
    "open_clip",
    "open_clip_2025",
    "nanogpt",
    "mingpt",
    "megatron",
    "gptneox",
    "rwkv",
    "olmo",
]
# Any text: a policy may stand in a configuration, as an expression.
WdPolicy: TypeAlias = (
    PolicyName
    | str
    | Policy
    | Mapping[Any, float | Decay]
    | Callable[[ParameterInfo], float | Decay]
    | None
)

GLOB = re.compile(r"[*?[]")
GLOB_OR_PATH = re.compile(r"[*?[.]")
MAKERS: dict[Any, str] = {
    exclude: 'exclude("*.bias")',
    only: 'only("*.weight")',
    scale: 'scale("head.*", by=0.1)',
    form: 'form("l2", "head.*")',
    towards: "towards(1, is_norm)",
    layerwise: "layerwise(0.75)",
    marked: "marked()",
}
WORDS = re.compile(r"[a-z]+|[A-Z][a-z]*")
NORM_WORDS = frozenset(
    {"norm", "norms", "layernorm", "batchnorm", "rmsnorm", "ln", "bn"}
)


def named(name: str) -> Policy:
    """Look up a ready-made policy or a recipe.

    Raises:
        ValueError: No policy has that name; the message lists the known ones.
    """
    if name in NAMED:
        return NAMED[name]
    if GLOB_OR_PATH.search(name):
        raise ValueError(
            f"`wd_policy` {name!r} is a selector and not the name of a policy. "
            f'Write wd_policy=exclude("{name}").'
        )
    if name in FORMS:
        raise ValueError(
            f"`wd_policy` {name!r} is a form of decay and not the name of a policy. "
            f'Write wd_policy=form("{name}"), of selective_optim.policies.'
        )
    close = get_close_matches(name, NAMED, n=1, cutoff=0.0)[0]
    known = ", ".join(f'"{known}"' for known in NAMED)
    raise ValueError(
        f"`wd_policy` {name!r} is not the name of a policy; known are {known}. "
        f'Did you mean wd_policy="{close}"?'
    )


def parse(text: str) -> Policy:
    """Read a policy from text: a name, or what ``repr`` prints of a policy.

    The text is an expression of :func:`exclude`, :func:`only`, :func:`scale`,
    :func:`form`, :func:`towards`, :func:`layerwise`, :func:`marked`,
    :func:`first_match` and :func:`named`, of names of policies, selectors, numbers and
    ``*``. Selectors are globs in quotes, ``re.compile('...')``, the predicates, module
    classes that are loaded (``nn.LayerNorm``, ``LlamaRMSNorm``), and these joined with
    ``|``, ``&`` and ``~``. Nothing is evaluated or imported, so a text may come from
    anywhere.

    Args:
        text: As in a configuration file or on a command line; lines may break.

    Returns:
        The policy. ``parse(repr(policy)) == policy``, but for policies that hold
        callables, modules or parameters, which no text names.

    Raises:
        TypeError: ``text`` is no text.
        ValueError: It cannot be read; the message points at the place.

    Example:
        >>> parse("no_bias_norm * scale('head.*' & ~is_bias, by=0.1)")
        exclude(is_bias, is_norm) * scale('head.*' & ~is_bias, by=0.1)
    """
    if not isinstance(text, str):
        raise TypeError(
            f"`parse` takes a text, not {received(text)}. "
            f"Write for example parse(\"exclude('*.bias')\")."
        )
    plain = text.strip()
    # Before the reader of expressions, which most optimizers never need.
    if plain in NAMED:
        return NAMED[plain]
    functions = {function.__name__: function for function in (*MAKERS, *BY_TEXT)}
    if is_expression(plain) or plain in functions or plain in PREDICATES:
        return read_policy(plain, functions, NAMED)
    return named(plain)


BY_TEXT: tuple[Any, ...] = (first_match, named)


def as_policy(value: object) -> Policy:
    """Make a policy of a name, a text, a mapping, a callable or a policy object.

    Raises:
        TypeError: ``value`` is none of these.
        ValueError: ``value`` is a name that no policy has, or cannot be read.
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


EXAMPLE = 'for example wd_policy="no_bias_norm"'


def _meant(value: object) -> str:
    """Write the policy that a user may have meant who gave selectors or names."""
    several = isinstance(value, (list, tuple, set, frozenset))
    items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
    items = list(items) if several else [items]  # type: ignore[call-overload]
    names = [i for i in items if several and isinstance(i, str) and i in NAMED]
    if several and not names and (meant := _meant_by_words(items)):
        return meant
    rest = [i for i in items if not isinstance(i, str) or i not in names]
    try:
        texts = [_selector_text(item) for item in rest]
    except TypeError:
        return EXAMPLE
    if not items or any(text.startswith("<") for text in texts):
        return EXAMPLE
    excluded = [f"exclude({', '.join(texts)})"] if rest else []
    return "wd_policy=" + " * ".join([*(f'named("{n}")' for n in names), *excluded])


def _meant_by_words(items: Sequence[object]) -> str | None:
    """Answer a list of words for biases and norms, which miss what is called otherwise.

    ``["bias", "LayerNorm.weight"]`` stands in many notebooks; in a ResNet it finds
    no norm.
    """
    words = [i for i in items if isinstance(i, str) and not GLOB.search(i)]
    norms = [word for word in words if _means_norm(word)]
    if not norms:
        return None
    biases = [word for word in words if word.lower().strip(".") == "bias"]
    name = "no_bias_norm" if biases else "no_norm"
    rest = [item for item in items if item not in (*norms, *biases)]
    try:
        texts = ", ".join(map(_selector_text, rest))
    except TypeError:
        return None
    policy = f'named("{name}") * exclude({texts})' if rest else f'"{name}"'
    return (
        f"wd_policy={policy}, which knows norms by their class: a word such as "
        f"{norms[0]!r} misses those that a model calls otherwise"
    )


def _means_norm(word: str) -> bool:
    parts = {part.lower() for part in WORDS.findall(word)}
    return not parts.isdisjoint(NORM_WORDS)


def _selector_text(item: object) -> str:
    if not isinstance(item, str):
        return repr(as_selector(item))
    # Lists of plain words are searched for words, as in transformers' examples.
    return f'"{item}"' if GLOB.search(item) else f'"*{item}*"'
