"""How biases, norms, embeddings and weights of real models are recognized.

The rules were read off the models of torchvision, timm and transformers, and are held
to all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import takewhile
from types import FunctionType, NoneType
from typing import Any

from torch import nn

from selective_optim._torch import original_class, own_classes
from selective_optim.parameters import ParameterInfo, has_parameters, index_of
from selective_optim.policies.source import (
    goes_with,
    only_added,
    scales_normalized,
    squashes,
)


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# What these hold is a weight, whatever else their class is called after.
WEIGHT_MODULES = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# GRN is the global response normalization of ConvNeXt V2, and an acronym that others
# are glued to: DiTGRN. RevIN is the reversible instance normalization of forecasts.
NORM_WORD = re.compile(r".*norm$|normali[sz](?:ation|e)$|.*grn$|revin$")
# A class called after a norm and then after one of these is the other thing:
# LayerNormLinear, NormFreeBlock, NormHead.
LAYERS = _set(
    "attention block cell conv embedding embeddings ffn head linear lstm mlp projection"
)
OTHER_NOUNS = LAYERS | _set("free model net network wrapper")
NOT_A_NORM = re.compile(r"_*(?:pre|post|add|weight|spectral)_?norm", re.IGNORECASE)
# The last part: bias_ih_l0 of recurrent layers, bias_k of attention, pos_bias_u.
BIAS = re.compile(r"(?:.*_)?bias\d*(?:_[ih]h(?:_l\d+(?:_reverse)?)?|_[a-z])?$")
# Words beside which `bias` says that something acts on biases, or looks them up.
NO_BIAS = _set("emb embed gate noise raw scale table token var")
# A table of biases, to be looked up by position: relative_attention_bias.
BIAS_TABLE = re.compile(r"(?:.*_)?(?:relative|position)_|attention_biases$")
# Names of biases that are names of other things elsewhere: b_Q, b1, cross_layer_b.
MAY_BE_BIAS = re.compile(r"(?:.*_)?b\d*(?:_.*)?$")
# Not a modulation (scale_shift), nor a table (pos_offset).
MAY_SHIFT = re.compile(
    r"beta$|(?!.*(?:scale|pos|rel|table|emb))(?:.*_)?(?:offset|shift|translation)$"
)
METHODS = (FunctionType, classmethod, staticmethod)
PARTS_OF_A_NAME = re.compile(r"[a-zA-Z]+")
LISTS = (nn.ParameterList, nn.ParameterDict)
EMBEDS = _set("emb embed embeds embedding embeddings")
POSITIONS = _set("pos position positional positions rel")
TOKENS = _set("newline separator token tokens")
# Learned inputs are called after what they do: latent_queries, mem_kv, null_feature.
INPUTS = _set(
    "latent latents memories memory mems probe prompt prompts queries query register "
    "registers slots"
)
EMPTY = _set("mem memory null")
KEYS = _set("feature features k key kv v value")
TOKEN_LEAVES = _set("image_begin image_end image_sep no_object_pointer")
# What an adapter adds to a lookup table is a part of it: lora_embedding_A of peft.
ADAPTERS = _set("delta lora")
SPECIAL = _set("class cls eoi mask masked no")
# What acts on embeddings, or beside them, and is none: pos_emb_alpha.
BESIDE = _set(
    "alpha bias const factor gain gate gating norm per proj projection scale "
    "temperature weight weights"
)
TABLE = re.compile(
    r"(?:.*_)?(?:relative|position)_(?:\w+_)?bias(?:_table)?$|attention_biases$"
)
# Gains that neither a name nor a call gives away, by package, class and attribute.
KNOWN_GAINS = {
    # A global response norm, written out where it is used.
    ("monai", "MedNeXtBlock"): {"global_resp_gamma", "global_resp_beta"},
}
# Multiplies a product of normalized vectors, and sometimes one of the two.
TEMPERATURE = re.compile(r"(?:.*_)?(?:temp|temperature|logit_scale)$")
# A number per channel or head, or a state's own matrix, is no weight of a layer.
NO_WEIGHTS = _set(
    "a a_log alpha alphas beta gain gamma gate gates lambda lambdas layer_scale mask "
    "scale scales scaling sinks temp temperature"
)

# Names of layers that yield the answer of a model.
TELLING = re.compile(
    r"(?!pre_)(?:\w+_)?(?:heads?|classifier|logits|unembed)(?:_\w+)?$|aux\d*$"
    r"|(?:fc|(?:qa_)?outputs?|out|score|proj_out|output_\w+|last_linear|final_layer)$"
)


@cache
def _name_says_norm(name: str) -> bool:
    words = [word.lower() for word in WORDS.findall(name.replace("RevIN", "Revin"))]
    norms = [i for i, word in enumerate(words) if NORM_WORD.match(word)]
    if not norms or NOT_A_NORM.match(name):
        return False
    return OTHER_NOUNS.isdisjoint(words[norms[-1] + 1 :])


def _kind(module: nn.Module | None) -> Any:
    return type(module)  # mypy holds that classes of modules have no hash


@lru_cache(4096)
def says_norm(cls: Any) -> bool:
    """Tell whether a class, or one it derives from, is called a normalization."""
    return any(_name_says_norm(base.__name__) for base in cls.__mro__)


def norm_module(module: nn.Module | None) -> bool:
    """Tell whether a module normalizes: torch's classes and all that are named so."""
    if isinstance(module, (NoneType, *WEIGHT_MODULES)):
        return False
    if not says_norm(_kind(module)) and not _name_says_norm(original_class(module)):
        return _dynamic_tanh(module)
    # A wrapper around a norm does not count.
    return not any(norm_module(m) and has_parameters(m) for m in module.children())


def _dynamic_tanh(module: nn.Module) -> bool:
    # Stands where a norm stood: gamma * tanh(alpha * x) + beta, alpha of one number.
    if not squashes(_kind(module)) or next(module.children(), None):
        return False
    shapes = sorted(param.shape for param in module.parameters())
    if len(shapes) < 3:
        return False
    *scalars, gain, shift = shapes
    wide = gain == shift and len(gain) == 1 < gain.numel()
    return wide and all(shape.numel() == 1 for shape in scalars)


def holder(place: ParameterInfo) -> tuple[nn.Module | None, str]:
    """Return the module, lists left out, that uses a parameter, and its name for it."""
    module = place.owner
    if not isinstance(module, LISTS) or not place.name:
        return module, place.leaf or ""
    lists = list(takewhile(lambda m: isinstance(m, LISTS), reversed(place.path[1:])))
    return place.path[-1 - len(lists)], place.name.split(".")[-1 - len(lists)]


@lru_cache(4096)
def _tells(cls: Any, leaf: str | None) -> bool:
    """Tell whether a class says by its name or methods what its parameter is."""
    # Those of tensordict are mappings; "fc1__weight" was a part of another module.
    if issubclass(cls, (*LISTS, Mapping)) or "__" in (leaf or "").strip("_"):
        return False
    words = {word.lower() for word in WORDS.findall(cls.__name__)}
    if says_norm(cls) or not LAYERS.isdisjoint(words):
        return True
    defined = [item for base in own_classes(cls) for item in vars(base).items()]
    methods = [name for name, value in defined if isinstance(value, METHODS)]
    return not all(name.startswith("__") for name in methods)


def _list_tells(place: ParameterInfo) -> bool:
    """Tell whether the list that holds a parameter is called after what it holds."""
    module, _ = holder(place)
    if module is None or module is place.owner or not _tells(_kind(module), ""):
        return False
    listed = replace(place, leaf="")  # a key in it is a name of other code
    return any(asks(listed) for asks in (bias_part, embedding_part, norm_part))


def _telling(info: ParameterInfo) -> list[ParameterInfo]:
    places = info.places
    owned = [place for place in places if _tells(_kind(place.owner), place.leaf)]
    return owned or list(filter(_list_tells, places))


def telling_places(info: ParameterInfo) -> Sequence[ParameterInfo]:
    """Return the places of a parameter that say what it is, or all if none does."""
    if not info.elsewhere:
        return (info,)
    return _telling(info) or info.places


def kind_known(info: ParameterInfo) -> bool:
    """Tell whether any module that holds a parameter says what it is."""
    return bool(_telling(info))


def says_nothing(info: ParameterInfo) -> bool:
    """Tell whether no module says what it holds, as in a program that was exported."""
    if kind_known(info):
        return False
    index = index_of(info.path[0])
    return not index.remember("tells", lambda: any(map(kind_known, index.everyone())))


@cache
def bias_leaf(leaf: str | None) -> bool:
    """Tell whether an attribute is called as a bias is, and not as a table of them."""
    if BIAS_TABLE.match(leaf or ""):
        return False
    if BIAS.match(leaf or ""):
        return True
    words = _parts(leaf)
    return not words.isdisjoint(("bias", "biases")) and words.isdisjoint(NO_BIAS)


def bias_part(place: ParameterInfo) -> bool:
    """Tell whether a parameter is a bias: by its name, or since it is only added."""
    if bias_leaf(place.leaf):  # first: of some the name alone is known
        return True
    module, leaf = holder(place)
    if bias_leaf(leaf):
        return True
    called_b = MAY_BE_BIAS.match(leaf)
    if module is None or not (called_b or MAY_SHIFT.match(leaf)):
        return False
    added = only_added(_kind(module), leaf)
    if added is None and called_b:  # other modules use it
        keys = (key for key, _ in module.named_parameters("", recurse=False))
        return place.ndim == 1 or goes_with(leaf, keys)
    return bool(added)


def norm_part(place: ParameterInfo) -> str | bool:
    """Tell whether a parameter belongs to a norm; by a text how, if not by class."""
    module, leaf = holder(place)
    if module is None or isinstance(module, WEIGHT_MODULES):
        return False
    if norm_module(module):
        return True
    children = module.named_children()
    norms = (k for k, m in children if says_norm(_kind(m)) and not has_parameters(m))
    return _gain(_kind(module), leaf, frozenset(norms)) or False


@lru_cache(4096)
def _gain(cls: Any, leaf: str, norms: frozenset[str]) -> str | None:
    for base in own_classes(cls):
        package = base.__module__.partition(".")[0]
        if leaf in KNOWN_GAINS.get((package, base.__name__), ()):
            return f"{cls.__name__}.{leaf} is known as a gain"
    return None if TEMPERATURE.match(leaf) else scales_normalized(cls, leaf, norms)


@cache
def embedding_leaf(leaf: str) -> bool:
    """Tell whether an attribute is called as an embedding or a token is."""
    words = _parts(leaf)
    if TABLE.match(leaf) or token_leaf(leaf):
        return not bias_leaf(leaf)
    return bool(words & (EMBEDS | POSITIONS | TOKENS)) and words.isdisjoint(BESIDE)


@cache
def token_leaf(leaf: str) -> bool:
    """Tell whether an attribute is called as a learned input without an index is."""
    words = _parts(leaf)
    if words & EMBEDS:  # token_embedding is a table, class_embedding a token
        return bool(words & SPECIAL) and words.isdisjoint(POSITIONS | BESIDE)
    last = [word for word in PARTS_OF_A_NAME.findall(leaf) if len(word) > 1][-1:]
    called = not INPUTS.isdisjoint(last) or (words & EMPTY and words & KEYS)
    if leaf in TOKEN_LEAVES or (called and words.isdisjoint(BESIDE)):
        return True
    return bool(words & TOKENS) and words.isdisjoint(POSITIONS | BESIDE | ADAPTERS)


def _parts(leaf: str | None) -> set[str]:
    return set(PARTS_OF_A_NAME.findall((leaf or "").lower().replace("_", " ")))


def embedding_module(module: nn.Module | None) -> bool:
    """Tell whether a module embeds: torch's classes and all that are named so."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return True
    name = original_class(module) or type(module).__name__
    words = WORDS.findall(name.removesuffix("Bag"))
    return bool(words) and words[-1] in ("Embedding", "Embeddings")


def embedding_part(place: ParameterInfo) -> bool:
    """Tell whether a parameter is an embedding: called so, or a row held by one."""
    module, leaf = holder(place)
    if embedding_leaf(leaf):
        return True
    scalar = place.shape is not None and place.shape.numel() == 1
    # Beside its rows it may hold a bias, or a gate of one number.
    rows = not (bias_leaf(leaf) or scalar) or isinstance(module, nn.Embedding)
    return embedding_module(module) and rows


def layer_weight(place: ParameterInfo) -> bool:
    """Tell whether a parameter is the weight of a layer: torch's own, or a matrix."""
    module, leaf = holder(place)
    if isinstance(module, WEIGHT_MODULES):
        return "weight" in _parts(leaf)
    if embedding_module(module) and leaf == "weight":
        return True
    if norm_part(place) or bias_part(place):
        return False
    table = embedding_leaf(leaf) and ADAPTERS.isdisjoint(_parts(leaf))
    if table or leaf.lower() in NO_WEIGHTS or place.shape is None:
        return False
    return sum(size != 1 for size in place.shape) >= 2


# What a parameter is; the first that matches says so, so a norm's bias is a norm's.
KINDS: dict[str, Callable[[ParameterInfo], str | bool]] = {
    "norm": norm_part,
    "bias": bias_part,
    "embedding": embedding_part,
    "vector": lambda place: place.ndim in (0, 1),
}


def kind_of(info: ParameterInfo) -> str:
    """Say what a parameter is: norm, bias, embedding, vector or weight."""
    places = telling_places(info)
    kinds = (kind for kind, asks in KINDS.items() if any(map(asks, places)))
    return next(kinds, "weight")


def whole(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a model, then the one that it wraps, each with the prefix of its names."""
    yield prefix, module
    params = set(map(id, module.parameters()))
    for key, child in module.named_children():
        if params and params == set(map(id, child.parameters())):
            yield from whole(child, f"{prefix}{key}.")


def heads(root: nn.Module) -> list[nn.Module]:
    """Return what a model calls its head, at the outermost level."""
    children = [pair for _, module in whole(root) for pair in module.named_children()]
    return [child for key, child in children if TELLING.match(key)]
