"""What each kind of selector matches, needs and prints."""

import copy
import pickle
import re
from functools import partial

import pytest
import torch
from torch import nn

from selective_optim._model_index import ModuleIndex
from selective_optim.parameters import named_info
from selective_optim.policies.selectors import (
    Selector,
    as_selector,
    is_bias,
    is_embedding,
    is_norm,
    is_vector,
)


class TiedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))


MODEL = TiedNet()
INFOS = {info.name: info for info in ModuleIndex(MODEL).everyone()}


def matrix(info):
    return info.ndim >= 2


MATCHES = {
    "glob": ("*.bias", ["block.0.bias", "block.1.bias", "head.bias"]),
    "glob crosses dots": ("block*", [n for n in INFOS if n.startswith("block")]),
    "glob is whole": ("block", []),
    "glob is case-sensitive": ("*.BIAS", []),
    "glob of the second name": ("head.*", ["embed.weight", "head.bias"]),
    "regex searches": (re.compile(r"\.1\."), ["block.1.weight", "block.1.bias"]),
    "class": (nn.LayerNorm, ["block.1.weight", "block.1.bias"]),
    "class around": (nn.Sequential, [n for n in INFOS if n.startswith("block")]),
    "class of the second place": (
        nn.Linear,
        ["embed.weight", "block.0.weight", "block.0.bias", "head.bias"],
    ),
    "module": (MODEL.block[0], ["block.0.weight", "block.0.bias"]),
    "module of the second place": (MODEL.head, ["embed.weight", "head.bias"]),
    "parameter": (MODEL.scale, ["scale"]),
    "is_bias": (is_bias, ["block.0.bias", "block.1.bias", "head.bias"]),
    "is_norm": (is_norm, ["block.1.weight", "block.1.bias"]),
    "is_embedding": (is_embedding, ["embed.weight"]),
    "is_vector": (
        is_vector,
        ["scale", "block.0.bias", "block.1.weight", "block.1.bias", "head.bias"],
    ),
    "callable": (matrix, ["embed.weight", "block.0.weight"]),
    "callable of the second place": (
        lambda i: i.name == "head.weight",
        ["embed.weight"],
    ),
    "torch bool": (lambda i: torch.tensor(i.ndim == 0), ["scale"]),
}


@pytest.mark.parametrize(("item", "expected"), MATCHES.values(), ids=MATCHES)
def test_selector_matches_exactly(item, expected):
    selector = as_selector(item)
    assert [n for n, info in INFOS.items() if selector.matches(info)] == expected


REPRS = {
    "glob": ("*.bias", "'*.bias'"),
    "regex": (re.compile("a.b"), "re.compile('a.b')"),
    "torch class": (nn.LayerNorm, "nn.LayerNorm"),
    "own class": (TiedNet, "TiedNet"),
    "module": (MODEL.head, "<Linear instance>"),
    "parameter": (MODEL.head.bias, "<parameter of shape (5,)>"),
    "predicate": (is_norm, "is_norm"),
    "function": (matrix, "matrix"),
    "method": (str.islower, "str.islower"),
    "partial": (partial(print, 1), "functools.partial(<built-in function print>, 1)"),
}


@pytest.mark.parametrize(("item", "expected"), REPRS.values(), ids=REPRS)
def test_selector_prints_as_it_was_written(item, expected):
    assert repr(as_selector(item)) == expected


def test_lambda_prints_the_line_that_made_it():
    text = repr(as_selector(lambda info: True))
    assert re.fullmatch(r"<lambda at test_selectors\.py:\d+>", text)


EVAL = {"nn": nn, "re": re, "is_norm": is_norm, "is_bias": is_bias}
WRITTEN = ["'*.bias'", "re.compile('a.b')", "nn.LayerNorm", "is_norm"]


@pytest.mark.parametrize("text", WRITTEN)
def test_selector_reads_back_from_its_repr(text):
    selector = as_selector(eval(text, EVAL))
    assert repr(selector) == text
    assert as_selector(eval(repr(selector), EVAL)) == selector


SAVED = ["*.bias", re.compile("a", re.IGNORECASE), nn.LayerNorm, is_norm, matrix]


@pytest.mark.parametrize("item", SAVED, ids=repr)
@pytest.mark.parametrize(
    "twin", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy, copy.copy]
)
def test_selector_survives_copies_equal_and_hashable(item, twin):
    selector = as_selector(item)
    selector.matches(INFOS["embed.weight"])  # fills what is cached
    assert twin(selector) == selector
    assert hash(twin(selector)) == hash(selector)


@pytest.mark.parametrize("item", [*SAVED, MODEL.head, MODEL.scale], ids=type)
def test_selector_equals_one_made_of_the_same_thing(item):
    assert as_selector(item) == as_selector(item)
    assert as_selector(item) != as_selector("something else")
    assert len({as_selector(item), as_selector(item)}) == 1


def test_selectors_of_two_equal_modules_differ():
    assert as_selector(nn.Linear(2, 2)) != as_selector(nn.Linear(2, 2))


def test_selector_is_frozen():
    with pytest.raises(AttributeError):
        as_selector("*.bias").pattern = "*"


def test_selector_passes_through():
    assert as_selector(is_norm) is is_norm
    assert isinstance(is_norm, Selector)


def test_predicate_can_be_called_in_a_policy_of_ones_own():
    assert [n for n, info in INFOS.items() if is_norm(info)] == [
        "block.1.weight",
        "block.1.bias",
    ]


BIASES = {
    "bias": True,
    "in_proj_bias": True,
    "bias_k": True,
    "bias_ih_l0": True,
    "bias_hh_l1_reverse": True,
    "bias_hh": True,
    "q_bias": True,
    "pos_bias_u": True,
    "e_score_correction_bias": True,
    "bias1": True,
    "relative_position_bias_table": False,
    "relative_attention_bias": False,
    "attention_biases": False,
    "debias_weight": False,
    "unbias": False,
    "bias_table": False,
    "weight": False,
}


@pytest.mark.parametrize(("leaf", "expected"), BIASES.items(), ids=BIASES)
def test_is_bias_goes_by_the_last_part_of_the_name(leaf, expected):
    info = named_info(torch.ones(3), f"block.bias.{leaf}", 0)
    assert is_bias(info) is expected


def norm_class(name, *bases, child=None):
    def init(self):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(3))
        self.register_module("child", child)

    return type(name, bases or (nn.Module,), {"__init__": init})()


OWNERS = {
    "LlamaRMSNorm": (norm_class("LlamaRMSNorm"), True),
    "T5LayerNorm": (norm_class("T5LayerNorm"), True),
    "LayerNorm2d": (norm_class("LayerNorm2d"), True),
    "EvoNorm2dS0": (norm_class("EvoNorm2dS0"), True),
    "GroupNormAct": (norm_class("GroupNormAct"), True),
    "RMSNormGated": (norm_class("RMSNormGated"), True),
    "RMS_norm": (norm_class("WanRMS_norm"), True),
    "LayerNormalization": (norm_class("LayerNormalization"), True),
    "GRN": (norm_class("ConvNextV2GRN"), True),
    "derived": (norm_class("Centered", nn.LayerNorm), True),
    "around a norm without parameters": (
        norm_class("ScaledLayerNorm", child=nn.LayerNorm(3, elementwise_affine=False)),
        True,
    ),
    "around a norm": (norm_class("ScaledNorm", child=nn.LayerNorm(3)), False),
    "PreNorm": (norm_class("PreNorm"), False),
    "LayerNormLinear": (norm_class("LayerNormLinear"), False),
    "NormFreeBlock": (norm_class("NormFreeBlock"), False),
    "NormalCell": (norm_class("NormalCell"), False),
    "NormConv": (norm_class("Conv2dNorm", nn.Conv2d), False),
    "NormEmbedding": (norm_class("EmbeddingNorm", nn.Embedding), False),
    "LayerScale": (norm_class("LayerScale"), False),
}


@pytest.mark.parametrize(("owner", "expected"), OWNERS.values(), ids=OWNERS)
def test_is_norm_goes_by_the_class_of_the_owner(owner, expected):
    assert is_norm(ModuleIndex(owner).info(owner.weight)) is expected


TORCH_NORMS = [
    nn.BatchNorm1d(3),
    nn.BatchNorm2d(3),
    nn.BatchNorm3d(3),
    nn.SyncBatchNorm(3),
    nn.InstanceNorm1d(3, affine=True),
    nn.InstanceNorm2d(3, affine=True),
    nn.InstanceNorm3d(3, affine=True),
    nn.GroupNorm(1, 3),
    nn.LayerNorm(3),
    nn.LayerNorm((2, 3, 4)),
    nn.RMSNorm(3),
]


@pytest.mark.parametrize("norm", TORCH_NORMS, ids=repr)
def test_is_norm_knows_all_of_torch_in_any_number_of_dimensions(norm):
    assert all(is_norm(info) for info in ModuleIndex(norm).everyone())


EMBEDDINGS = {
    "table": (nn.Embedding(5, 3), True),
    "bag": (nn.EmbeddingBag(5, 3), True),
    "class name": (norm_class("VisionEmbeddings"), True),
    "linear": (nn.Linear(3, 3), False),
    "patches": (norm_class("PatchEmbedder"), False),
}


@pytest.mark.parametrize(("owner", "expected"), EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_is_embedding_goes_by_the_owner(owner, expected):
    assert is_embedding(ModuleIndex(owner).info(owner.weight)) is expected


@pytest.mark.parametrize("leaf", ["pos_embed", "embedding", "pos_embed_1", "embeds"])
def test_is_embedding_goes_by_the_attribute_too(leaf):
    model = nn.ParameterDict({leaf: nn.Parameter(torch.ones(2, 3))})
    assert all(is_embedding(info) for info in ModuleIndex(model).everyone())


def test_embedding_called_relative_attention_bias_is_no_bias():
    model = nn.ModuleDict({"relative_attention_bias": nn.Embedding(8, 2)})
    (info,) = ModuleIndex(model).everyone()
    assert (is_bias(info), is_embedding(info)) == (False, True)
