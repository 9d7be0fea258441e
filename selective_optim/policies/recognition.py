"""How biases, norms, embeddings and weights of real models are recognized.

Biases by the name of the attribute, norms by the class of the module that holds
them or by what its methods do with them, embeddings by either. The rules were read
off the models of torchvision, timm and transformers, and are held to all of them.

A module that hands its own parameters to a functional norm is called after what it
does, a feature map or an attention, and its parameters after anything, so that no
name tells. The method's source does: the parameter itself stands among the arguments
of a call such as ``F.layer_norm``.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from textwrap import dedent
from types import CodeType, FunctionType, NoneType
from typing import Any

import torch
from torch import nn

from selective_optim.parameters import ParameterInfo, own_classes

NORM_CALL = re.compile(r"(?:\w+_)?(?:batch|group|instance|layer|rms)_?norm(?:_fn)?$")
# What may stand between the attribute and the call without making it another value.
CASTS = frozenset({"contiguous", "float", "to", "type", "type_as"})
NORM_INPUTS = frozenset({"input", "x"})


# Asked again for every layer of a class, and for every policy.
@lru_cache(4096)
def handed_to_norm(cls: type, leaf: str) -> str | None:
    """Tell which call takes an attribute of a class as a norm's gain or shift.

    Returns ``"layer_norm takes gamma in FeatureMap.forward"``, or ``None`` where no
    such call stands in the source, or there is no source.
    """
    # `vars` of a class holds none of its bases' methods.
    for base in own_classes(cls):
        for name, method in vars(base).items():
            if _mentions(method, leaf) and (call := _norm_call(method, leaf)):
                return f"{call} takes {leaf} in {base.__name__}.{name}"
    return None


def _mentions(method: object, leaf: str) -> bool:
    """Look into the byte code first: reading a source takes a thousand times longer."""
    method = inspect.unwrap(method) if isinstance(method, FunctionType) else method
    if not isinstance(method, FunctionType):
        return False
    names = set(_names(method.__code__))
    return leaf in names and any(map(NORM_CALL.match, names))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _norm_call(method: FunctionType, leaf: str) -> str | None:
    try:
        tree = ast.parse(dedent(inspect.getsource(inspect.unwrap(method))))
    except (OSError, SyntaxError, TypeError):  # written in no file, or not in Python
        return None
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = (
        _called(call.func)
        for call in calls
        if any(_attribute(argument) == leaf for argument in _beside_input(call))
    )
    return next(filter(NORM_CALL.match, found), None)


def _beside_input(call: ast.Call) -> Iterator[ast.expr]:
    """Yield the arguments but for the first, which is what the call normalizes."""
    yield from call.args[1:]
    yield from (word.value for word in call.keywords if word.arg not in NORM_INPUTS)


def _called(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        # self.layer_norm(x, self.mask) is a module, and takes what it likes.
        return "" if _attribute(function) else function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _attribute(value: ast.expr) -> str | None:
    """Return the attribute of ``self`` that an expression is, or is a cast of."""
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        if value.func.attr not in CASTS:
            return None
        value = value.func.value
    if not isinstance(value, ast.Attribute) or not isinstance(value.value, ast.Name):
        return None
    return value.attr if value.value.id == "self" else None


# What these hold is a weight, whatever else their class is called after.
WEIGHT_MODULES = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# GRN is the global response normalization of ConvNeXt V2, and an acronym that others
# are glued to: DiTGRN.
NORM_WORD = re.compile(r".*norm$|normali[sz]ation$|.*grn$")
# A class called after a norm and then after one of these is the other thing:
# LayerNormLinear, NormFreeBlock, NormHead.
OTHER_NOUNS = frozenset(
    (
        *("attention", "block", "cell", "conv", "embedding", "embeddings", "ffn"),
        *("free", "head", "linear", "lstm", "mlp", "model", "net", "network"),
        "wrapper",
    )
)
NOT_A_NORM = re.compile(r"_*(?:pre|post|add|weight|spectral)_?norm", re.IGNORECASE)
# The last part: bias_ih_l0 of recurrent layers, bias_k of attention, pos_bias_u.
BIAS = re.compile(r"(?:.*_)?bias\d*(?:_[ih]h(?:_l\d+(?:_reverse)?)?|_[a-z])?$")
# A table of biases, to be looked up by position: relative_attention_bias.
BIAS_TABLE = re.compile(r"(?:.*_)?(?:relative|position)_")
PARTS_OF_A_NAME = re.compile(r"[a-zA-Z]+")
EMBEDS = frozenset({"emb", "embed", "embeds", "embedding", "embeddings"})
POSITIONS = frozenset({"pos", "position", "positional", "rel"})
TOKENS = frozenset({"newline", "separator", "token", "tokens"})
# Learned inputs that are called after what they do in their model.
TOKEN_LEAVES = frozenset(
    (
        *("bos_latent", "image_begin", "image_end", "image_sep", "latent", "latents"),
        *("latent_query", "latents_1d", "latents_2d", "no_object_pointer", "probe"),
        *("pooling_attention_query", "queries", "query", "text_prompt"),
    )
)
# What an adapter adds to a lookup table is a part of it: lora_embedding_A of peft.
ADAPTERS = frozenset({"delta", "lora"})
SPECIAL = frozenset({"class", "cls", "eoi", "mask", "masked", "no"})
# What acts on embeddings, or beside them, and is none: pos_emb_alpha.
BESIDE = frozenset(
    (
        *("alpha", "bias", "const", "factor", "gain", "gate", "gating"),
        *("norm", "proj", "projection", "scale", "temperature", "weight", "weights"),
    )
)
TABLE = re.compile(
    r"(?:.*_)?(?:relative|position)_(?:\w+_)?bias(?:_table)?$|attention_biases$"
)
# Biases and gains that neither a name nor a call gives away, by package, class and
# attribute; `b1` and `beta` are other things elsewhere.
KNOWN_BIASES = {
    ("timm", "Affine"): {"beta"},
    ("transformers", "Phi4MultimodalAudioGluPointWiseConv"): {"b1", "b2"},
}
KNOWN_GAINS = {
    # Global response norms and norms of length one, written out where they are used.
    ("monai", "MedNeXtBlock"): {"global_resp_gamma", "global_resp_beta"},
    ("local_attention", "LocalMHA"): {"q_scale", "k_scale"},
    # Gains of a norm that is called without its own.
    ("transformers", "Gemma4TextRouter"): {"scale"},
    ("transformers", "DiffusionGemmaTextRouter"): {"scale"},
}
# A number per channel or head, or a state's own matrix, is no weight of a layer.
NO_WEIGHTS = frozenset(
    (
        *("a", "a_log", "alpha", "alphas", "beta", "gain", "gamma", "gate", "gates"),
        *("lambda", "lambdas", "layer_scale", "mask", "scale", "scales", "scaling"),
        *("sinks", "temp", "temperature"),
    )
)

Known = dict[tuple[str, str], set[str]]


@cache
def _name_says_norm(name: str) -> bool:
    words = [word.lower() for word in WORDS.findall(name)]
    norms = [i for i, word in enumerate(words) if NORM_WORD.match(word)]
    if not norms or NOT_A_NORM.match(name):
        return False
    return OTHER_NOUNS.isdisjoint(words[norms[-1] + 1 :])


def says_norm(cls: type) -> bool:
    """Tell whether a class, or one it derives from, is called a normalization."""
    return any(_name_says_norm(base.__name__) for base in cls.__mro__)


def original_class(module: nn.Module | None) -> str:
    """Name the class that a scripted or unflattened module was of; else ""."""
    # Modules of ExportedProgram.module() do not say what they were made of.
    if isinstance(module, torch.jit.ScriptModule):
        return str(module.original_name)
    if type(module).__module__ == "torch.export.unflatten":
        name = getattr(module, "type_name", str)()  # not so the root in 2.7
        return str(name).rpartition(".")[2]
    return ""


def norm_module(module: nn.Module | None) -> bool:
    """Tell whether a module normalizes: torch's classes and all that are named so.

    A wrapper around a norm that has parameters does not count, nor does a subclass
    of a linear, convolution or embedding layer, whatever it is called.
    """
    if isinstance(module, (NoneType, *WEIGHT_MODULES)):
        return False
    if not says_norm(type(module)) and not _name_says_norm(original_class(module)):
        return False
    return not any(norm_module(m) and has_parameters(m) for m in module.children())


def has_parameters(module: nn.Module) -> bool:
    """Tell whether a module or any inside it holds a parameter."""
    return next(module.parameters(), None) is not None


@cache
def bias_leaf(leaf: str | None) -> bool:
    """Tell whether an attribute is called as a bias is, and not as a table of them."""
    return bool(BIAS.match(leaf or "")) and not BIAS_TABLE.match(leaf or "")


def known_part(module: nn.Module | None, leaf: str | None, table: Known) -> bool:
    """Tell whether a table lists an attribute of a module's class or its bases."""
    return any(
        leaf in table.get((cls.__module__.partition(".")[0], cls.__name__), ())
        for cls in type(module).__mro__
    )


def norm_part(module: nn.Module | None, leaf: str | None) -> str | None:
    """Tell how an attribute is known to belong to a norm; ``None`` if it does not.

    The class of its module says so ("" then), or the module hands it to a norm in
    a method of its own, or a table lists it.
    """
    if norm_module(module):
        return ""
    if module is None or leaf is None or isinstance(module, WEIGHT_MODULES):
        return None
    if known_part(module, leaf, KNOWN_GAINS):
        return f"{type(module).__name__}.{leaf} is known as a gain"
    kind: Any = type(module)  # mypy holds that classes of modules have no hash
    return handed_to_norm(kind, leaf)


def bias_part(module: nn.Module | None, leaf: str | None) -> bool:
    """Tell whether an attribute is a bias, by its name or by a table."""
    return bias_leaf(leaf) or known_part(module, leaf, KNOWN_BIASES)


def attribute(place: ParameterInfo) -> str | None:
    """Return what a class calls its parameter: of one in a list, the list's name."""
    parts = (place.name or "").split(".")
    inside = isinstance(place.owner, (nn.ParameterList, nn.ParameterDict))
    return parts[-2] if inside and len(parts) > 1 else parts[-1] or None


@cache
def embedding_leaf(leaf: str | None) -> bool:
    """Tell whether an attribute is called as an embedding or a token is."""
    words = _parts(leaf)
    if TABLE.match(leaf or "") or token_leaf(leaf):
        return not bias_leaf(leaf)
    return bool(words & (EMBEDS | POSITIONS | TOKENS)) and words.isdisjoint(BESIDE)


@cache
def token_leaf(leaf: str | None) -> bool:
    """Tell whether an attribute is called as a learned input without an index is."""
    words = _parts(leaf)
    if leaf in TOKEN_LEAVES:
        return True
    if words & EMBEDS:  # token_embedding is a table, class_embedding a token
        return bool(words & SPECIAL) and words.isdisjoint(POSITIONS | BESIDE)
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


def embedding_part(
    module: nn.Module | None, leaf: str | None, shape: torch.Size | None
) -> bool:
    """Tell whether an attribute is an embedding: called so, or held by one.

    What an embedding holds beside its rows, a bias or a gate of one number, is none.
    """
    if embedding_leaf(leaf):
        return True
    beside = bias_leaf(leaf) or (shape is not None and shape.numel() == 1)
    return embedding_module(module) and (not beside or isinstance(module, nn.Embedding))


def layer_weight(
    module: nn.Module | None, leaf: str | None, shape: torch.Size | None
) -> bool:
    """Tell whether an attribute is the weight of a layer.

    It is where a linear, convolution, attention, recurrent or embedding layer of
    torch's holds it as one; elsewhere where it is a matrix, dimensions of one left
    out, and neither norm, bias, embedding, token, gate nor scale.
    """
    if isinstance(module, WEIGHT_MODULES):
        return "weight" in _parts(leaf)
    if embedding_module(module) and leaf == "weight":
        return True
    if norm_part(module, leaf) is not None or bias_part(module, leaf):
        return False
    table = embedding_leaf(leaf) and ADAPTERS.isdisjoint(_parts(leaf))
    if table or (leaf or "").lower() in NO_WEIGHTS:
        return False
    return shape is not None and sum(size != 1 for size in shape) >= 2
