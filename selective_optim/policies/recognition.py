"""How biases, norms and embeddings of real models are recognized.

Biases by the name of the attribute, norms by the class of the module that holds
them, embeddings by either. The rules were read off the models of torchvision, timm
and transformers.
"""

from __future__ import annotations

import re
from functools import cache
from types import NoneType

import torch
from torch import nn

# What these hold is a weight, whatever else their class is called after.
WEIGHT_MODULES = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# GRN is the global response normalization of ConvNeXt V2.
NORM_WORD = re.compile(r".*norm$|normali[sz]ation$|grn$")
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
EMBEDDING = re.compile(r"(?:.*_)?embed(?:s|ding|dings)?(?:_?\d+)?$")


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
    """Name the class that a scripted or unflattened module was of; else "".

    ``torch.jit`` and ``torch.export.unflatten`` make modules of their own classes,
    which say what they were made of. Those of ``ExportedProgram.module()`` do not.
    """
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
    return not any(norm_module(m) and _has_parameters(m) for m in module.children())


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


@cache
def bias_leaf(leaf: str | None) -> bool:
    """Tell whether an attribute is called as a bias is, and not as a table of them."""
    return bool(BIAS.match(leaf or "")) and not BIAS_TABLE.match(leaf or "")


@cache
def embedding_leaf(leaf: str | None) -> bool:
    """Tell whether an attribute is called as an embedding is."""
    return bool(EMBEDDING.match(leaf or ""))


def embedding_module(module: nn.Module | None) -> bool:
    """Tell whether a module embeds: torch's classes and all that are named so."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return True
    name = original_class(module) or type(module).__name__
    words = WORDS.findall(name.removesuffix("Bag"))
    return bool(words) and words[-1] in ("Embedding", "Embeddings")
