"""What each kind of selector matches, needs and prints."""

import copy
import dataclasses
import pickle
import re
from functools import cache, partial

import pytest
import torch
from torch import nn

from selective_optim import AdamW
from selective_optim.parameters import ModelIndex, wanted
from selective_optim.policies import exclude
from selective_optim.policies.predicates import (
    is_bias,
    is_embedding,
    is_layer_weight,
    is_norm,
    is_token,
    is_vector,
)
from selective_optim.policies.selectors import Selector, as_selector


class TiedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))


def info_of(module, param, name=None):
    [info] = ModelIndex(module).infos(wanted([param], [name]))
    return info


MODEL = TiedNet()
INFOS = {info.name: info for info in ModelIndex(MODEL).everyone()}


def test_what_an_object_asks_for():
    """A parameter is told by itself; what is inside a module, by the model alone."""
    assert as_selector(MODEL.scale).needs == frozenset()
    assert as_selector(MODEL.head).needs == {"modules"}


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
    "is_token": (is_token, []),
    "is_layer_weight": (is_layer_weight, ["embed.weight", "block.0.weight"]),
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
    "cached lambda": (cache(lambda info: True), "<lambda>"),
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


FROZEN = [
    *("*.bias", re.compile("bias"), nn.LayerNorm, MODEL.head, MODEL.head.bias),
    *(is_norm, matrix, is_norm | "*.bias", is_norm & matrix, ~is_norm),
]


@pytest.mark.parametrize("item", FROZEN, ids=repr)
def test_selector_is_frozen(item):
    selector = as_selector(item)
    field, *_ = dataclasses.fields(selector)
    with pytest.raises(AttributeError):
        setattr(selector, field.name, None)


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
    info = info_of(None, torch.ones(3), f"block.bias.{leaf}")
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
    "GRN glued to an acronym": (norm_class("AudioDiTGRN"), True),
    "RevIN": (norm_class("MaskedRevIN"), True),
    "Normalize": (norm_class("Normalize"), True),
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
    assert is_norm(info_of(owner, owner.weight)) is expected


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
    assert all(is_norm(info) for info in ModelIndex(norm).everyone())


EMBEDDINGS = {
    "table": (nn.Embedding(5, 3), True),
    "bag": (nn.EmbeddingBag(5, 3), True),
    "class name": (norm_class("VisionEmbeddings"), True),
    "linear": (nn.Linear(3, 3), False),
    "patches": (norm_class("PatchEmbedder"), False),
}


@pytest.mark.parametrize(("owner", "expected"), EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_is_embedding_goes_by_the_owner(owner, expected):
    assert is_embedding(info_of(owner, owner.weight)) is expected


def holding(leaf, shape=(2, 3), name="Model"):
    module = type(name, (nn.Module,), {})()
    setattr(module, leaf, nn.Parameter(torch.ones(shape)))
    return info_of(module, getattr(module, leaf))


# Attribute, class that holds it in a real model, whether it is an embedding, a token.
EMBEDDED = {
    "cls_token": ("ViTEmbeddings", True, True),
    "class_token": ("VisionTransformer", True, True),
    "class_embedding": ("CLIPVisionEmbeddings", True, True),
    "mask_emb": ("XLNetModel", True, True),
    "masked_spec_embed": ("HubertModel", True, True),
    "register_tokens": ("Dinov2WithRegistersEmbeddings", True, True),
    "query_tokens": ("Blip2Model", True, True),
    "image_newline": ("LlavaNextModel", True, True),
    "probe": ("SiglipMultiheadAttentionPoolingHead", True, True),
    "latents": ("PerceiverEmbeddings", True, True),
    "pos_embed": ("VisionTransformer", True, False),
    "pos_embed_1": ("CrossVit", True, False),
    "embedding": ("MllamaPrecomputedPositionEmbedding", True, False),
    "position_embedding_table": ("Gemma4PatchEmbed", True, False),
    "spatial_pos": ("PositionalEncoding", True, False),
    "temporal_pos": ("PositionalEncoding", True, False),
    "class_pos": ("PositionalEncoding", True, False),
    "patch_pos": ("TNT", True, False),
    "seg_embed": ("XLNetRelativeAttention", True, False),
    "cls_pos_embed": ("VisionTransformer", True, False),
    "mask_embed_scale": ("MaskDecoder", False, False),
    "pos_token": ("Model", True, False),
    "rel_pos_h": ("MultiScaleAttention", True, False),
    "relative_position_bias_table": ("WindowAttention", True, False),
    "relative_attention_bias": ("CpmAntSegmentPosition", True, False),
    "attention_biases": ("LevitAttention", True, False),
    "position_bias": ("DeepseekV4Indexer", True, False),
    "token_embedding": ("TextTransformer", True, False),
    "lora_embedding_A": ("Embedding", True, False),
    "lora_embedding_B": ("Embedding", True, False),
    "trainable_tokens_delta": ("TrainableTokensLayer", True, False),
    "bias": ("MMGroundingDinoContrastiveEmbedding", False, False),
    "pos_bias_u": ("Wav2Vec2ConformerSelfAttention", False, False),
    "pos_emb_alpha": ("SeamlessM4Tv2TextToUnitDecoder", False, False),
    "gru_rel_pos_const": ("WavLMAttention", False, False),
    "per_token_scale": ("Attention", False, False),
    "text_projection": ("CLIP", False, False),
    "unembedded": ("Model", False, False),
}


@pytest.mark.parametrize("leaf", EMBEDDED)
def test_is_embedding_and_is_token_hold_on_attributes_of_real_models(leaf):
    name, embedding, token = EMBEDDED[leaf]
    info = holding(leaf, name=name)
    assert (is_embedding(info), is_token(info)) == (embedding, token)


def test_gate_of_one_number_inside_an_embedding_is_none():
    assert not is_embedding(holding("gate", (1,), "MllamaPrecomputedPositionEmbedding"))
    assert is_embedding(holding("weight", (1, 3), "PrecomputedPositionEmbedding"))


def test_embedding_of_one_row_and_one_column_is_one():
    table = nn.Embedding(1, 1)
    assert is_embedding(info_of(table, table.weight))


@pytest.mark.parametrize("leaf", ["lora_embedding_A", "trainable_tokens_delta"])
def test_is_embedding_asks_the_list_that_an_adapter_stands_in(leaf):
    table = nn.ParameterDict({"default": nn.Parameter(torch.ones(2, 3))})
    model = nn.ModuleDict({leaf: table})
    (info,) = ModelIndex(model).everyone()
    assert (info.leaf, is_embedding(info)) == ("default", True)


# Attribute, shape and class of what is, or is not, the weight of a layer.
WEIGHTS = {
    "expert": ("gate_up_proj", (4, 8, 6), "MixtralExperts", True),
    "mixing": ("fn", (24, 64), "HyperConnection", True),
    "adapter": ("lora_embedding_A", (8, 10), "Embedding", True),
    "projection": ("text_projection", (4, 4), "CLIP", True),
    "table of one row": ("weight", (1, 8), "VocabParallelEmbedding", True),
    "layer scale": ("gamma", (4, 1, 1), "ConvNeXtBlock", False),
    "wide scale": ("scale", (48, 128), "ScaledClip", False),
    "gate": ("cross_attn_attn_gate", (1,), "DecoderLayer", False),
    "logit scale": ("logit_scale", (), "CLIPModel", False),
    "state": ("A_log", (16, 8), "MambaMixer", False),
    "skip": ("D", (16,), "MambaMixer", False),
    "token": ("cls_token", (1, 1, 8), "VisionTransformer", False),
    "tokens": ("mask_tokens", (4, 8), "MaskDecoder", False),
    "positions": ("pos_embed", (1, 5, 8), "VisionTransformer", False),
    "table": ("relative_position_bias_table", (9, 2), "WindowAttention", False),
    "bias": ("gate_up_proj_bias", (4, 8), "GptOssExperts", False),
    "wide norm": ("weight", (4, 8), "RMSNorm", False),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_is_layer_weight_tells_matrices_of_layers_from_others(case):
    leaf, shape, name, expected = WEIGHTS[case]
    assert is_layer_weight(holding(leaf, shape, name)) is expected


LAYERS = [
    *(nn.Linear(3, 2), nn.Conv2d(3, 6, 3, groups=3), nn.ConvTranspose1d(2, 2, 1)),
    *(nn.LSTM(2, 3), nn.MultiheadAttention(4, 2, kdim=3), nn.Embedding(5, 2)),
    *(nn.EmbeddingBag(5, 2), nn.Linear(1, 1), nn.Bilinear(1, 1, 1)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_is_layer_weight_takes_of_torchs_layers_all_but_biases(layer):
    for info in ModelIndex(layer).everyone():
        assert is_layer_weight(info) is ("bias" not in info.leaf)


def test_is_layer_weight_leaves_the_gain_of_a_standardized_convolution():
    conv = nn.Conv2d(3, 4, 1)
    conv.gain = nn.Parameter(torch.ones(4, 1, 1, 1))
    infos = ModelIndex(conv).everyone()
    assert [i.name for i in infos if is_layer_weight(i)] == ["weight"]


@pytest.mark.parametrize("leaf", ["pos_embed", "embedding", "pos_embed_1", "embeds"])
def test_is_embedding_goes_by_the_attribute_too(leaf):
    model = nn.ParameterDict({leaf: nn.Parameter(torch.ones(2, 3))})
    assert all(is_embedding(info) for info in ModelIndex(model).everyone())


def test_embedding_called_relative_attention_bias_is_no_bias():
    model = nn.ModuleDict({"relative_attention_bias": nn.Embedding(8, 2)})
    (info,) = ModelIndex(model).everyone()
    assert (is_bias(info), is_embedding(info)) == (False, True)


def test_parameter_selects_itself_where_nothing_else_is_known():
    param = nn.Parameter(torch.ones(3))
    base = exclude(param)
    optimizer = AdamW(
        [param], weight_decay=0.1, wd_policy=lambda info: base.decide(info).decay
    )
    assert [row.weight_decay for row in optimizer.decay_report()] == [0.0]
