"""Recipes against restatements of each project's rule, on one awkward model."""

import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from selective_optim import AdamW
from selective_optim.parameters import ModuleIndex
from selective_optim.policies import Decay, diff, exclude, named
from selective_optim.policies.recipes import RECIPES


class RMSNorm2(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.gain = nn.Parameter(torch.ones(()))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2)
        self.input_layernorm = RMSNorm2(4)
        self.rmsnorm = RMSNorm2(4)
        self.ln_1 = nn.LayerNorm(4)
        self.q_norm = RMSNorm2(2)
        self.norm1 = nn.GroupNorm(2, 4)
        self.gamma = nn.Parameter(torch.ones(4, 1))
        self.relative_attention_bias = nn.Embedding(3, 2)
        self.debias_proj = nn.Linear(4, 4)


class Tower(nn.Module):
    """Names what several projects look for, and lists some of it itself."""

    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.ones(1, 1, 4))
        self.relative_position_bias_table = nn.Parameter(torch.ones(9, 2))
        self.logit_scale = nn.Parameter(torch.ones(1, 2))
        self.cpb_mlp = nn.Linear(4, 4)
        self.fourier_w = nn.Parameter(torch.ones(2, 2))
        self.encoder_norms = nn.Linear(4, 4)
        self.bn_stem = nn.Conv2d(1, 1, 3)
        self.own = type("LayerNorm", (nn.LayerNorm,), {})(4)
        self.local = nn.LayerNorm(4, elementwise_affine=False)
        self.time_maa_x = nn.Parameter(torch.ones(1, 1, 4))
        self.time_state = nn.Parameter(torch.ones(2, 2, 2))
        self.maa_w1 = nn.Parameter(torch.ones(4, 4))
        self.column = nn.Linear(4, 1, bias=False)
        self.D = nn.Parameter(torch.ones(2, 2))
        self.D._no_weight_decay = True

    def no_weight_decay(self):
        return {"class_token"}

    def no_weight_decay_patterns(self):
        return ["fourier_?"]

    def no_weight_decay_keywords(self):
        return {"position_bias_table", "cpb"}


class Grug(nn.Module):
    """Names of language models of 2026."""

    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(3, 4)
        self.embed_tokens = nn.Embedding(3, 4)
        self.wte = nn.Embedding(3, 4)
        self.lm_head = nn.Linear(4, 3)
        self.attn_gate = nn.Parameter(torch.ones(4, 2))
        self.router = nn.Linear(4, 2)
        self.router_bias = nn.Parameter(torch.ones(2))
        self.k_layernorm = nn.LayerNorm(4)


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.grug = Grug()
        self.attn_gate = nn.Linear(4, 2)
        self.pos_embed = nn.Parameter(torch.ones(1, 3, 4))
        self.embeddings = nn.Embedding(3, 4)
        self.tower = Tower()
        self.scale = nn.Parameter(torch.ones(()))
        self.embed = nn.Embedding(5, 4)
        self.stem = weight_norm(nn.Conv2d(3, 4, 1))
        self.bn1 = nn.BatchNorm2d(4)
        self.inst = nn.InstanceNorm1d(4, affine=True)
        self.sync = nn.SyncBatchNorm(4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.rnn = nn.LSTM(4, 4)
        self.wide = nn.Module()
        self.wide.bias = nn.Parameter(torch.ones(2, 3))
        self.norm = RMSNorm2(4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight

    def no_weight_decay(self):
        return {"pos_embed", "blocks.0.debias_proj.weight"}

    def no_weight_decay_keywords(self):
        return {"relative_position_bias_table", "cpb_mlp"}


def exempt(model, recipe):
    infos = ModuleIndex(model).everyone()
    policy = named(recipe).bind(infos)
    return {info.name for info in infos if not policy(info).multiplier}


def by_name(rule):
    return {name for name, p in Zoo().named_parameters() if rule(name, p)}


def by_owner(rule):
    return {
        f"{prefix}.{leaf}".lstrip(".")
        for prefix, module in Zoo().named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
        if rule(module, leaf)
    }


TORCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
HUGGINGFACE = (
    *("bias", "layernorm", ".norm.", "norm.weight", "norm.gain", "ln_1", "tower.own"),
)
FASTAI = (nn.BatchNorm2d, nn.InstanceNorm1d, nn.LayerNorm)
TORCHVISION = (*TORCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
EMBEDDINGS = ("class_token", "position_embedding", "relative_position_bias_table")
RWKV = ("time_mix", "time_maa", "time_decay", "time_daaaa", "time_faaaa", "time_first")
LISTED = tuple(Zoo().no_weight_decay())
EXPECTED = {
    # transformers 5.23.0, trainer.py: the five patterns, met here by these words;
    # norm1 (a GroupNorm), bn1 and sync decay, but for their biases.
    "huggingface": by_name(lambda n, p: any(word in n for word in HUGGINGFACE)),
    # timm 1.0.31, optim/_param_groups.py, with the list of no_weight_decay().
    "timm": by_name(
        lambda n, p: p.ndim <= 1 or n.endswith((".bias", *Zoo().no_weight_decay()))
    ),
    # fastai 2.8.12, torch_core.py: no GroupNorm or SyncBatchNorm weight, no
    # in_proj_bias, and nothing of an LSTM, whose `bias` is a bool.
    "fastai": by_owner(lambda m, leaf: isinstance(m, FASTAI) or leaf == "bias"),
    # mmengine 0.10.7, optim/optimizer/default_constructor.py.
    "mmengine": by_owner(
        lambda m, leaf: (
            isinstance(m, (*TORCH_NORMS, nn.GroupNorm, nn.LayerNorm)) or leaf == "bias"
        )
    ),
    # detectron2, solver/build.py and config/defaults.py.
    "detectron2": by_owner(
        lambda m, leaf: isinstance(m, (*TORCH_NORMS, nn.GroupNorm, nn.LayerNorm))
    ),
    # nanoGPT, model.py.
    "nanogpt": by_name(lambda n, p: p.dim() < 2),
    # Megatron-LM, core/optimizer/__init__.py.
    "megatron": by_name(lambda n, p: len(p.shape) == 1 or n.endswith(".bias")),
    # torchvision, references/classification/utils.py, with norm_weight_decay 0, and
    # with its custom keys, each of which is compared with the leaf.
    "torchvision": by_owner(lambda m, leaf: isinstance(m, TORCHVISION)),
    "torchvision_swin": by_owner(
        lambda m, leaf: leaf in ("bias", *EMBEDDINGS) or isinstance(m, TORCHVISION)
    ),
    # ultralytics 8.4.190, engine/trainer.py: of torch's norms, as isinstance tells.
    "ultralytics": by_name(lambda n, p: "bias" in n or "logit_scale" in n)
    | by_owner(
        lambda m, leaf: isinstance(m, (*TORCH_NORMS, nn.GroupNorm, nn.LayerNorm))
    ),
    # YOLOX, yolox/exp/yolox_base.py; what it never trains is exempt.
    "yolox": by_name(
        lambda n, p: not n.endswith((".weight", ".weight.original0", ".original1"))
    )
    | by_owner(lambda m, leaf: isinstance(m, nn.BatchNorm2d))
    | {"tower.bn_stem.weight"},
    # RT-DETRv2, rtdetrv2_r50vd_6x_coco.yml.
    "rtdetr": by_name(
        lambda n, p: ("encoder" in n or "decoder" in n) and ("norm" in n or "bn" in n)
    ),
    # SAM 2, sam2.1_hiera_b+_MOSE_finetune.yaml: the class itself, no subclass.
    "sam2": by_name(lambda n, p: "bias" in n)
    | by_owner(lambda m, leaf: type(m) is nn.LayerNorm),
    # Swin-Transformer, optimizer.py.
    "swin": by_name(
        lambda n, p: (
            len(p.shape) == 1
            or n.endswith(".bias")
            or n in LISTED
            or any(word in n for word in Zoo().no_weight_decay_keywords())
        )
    ),
    # ConvNeXt, optim_factory.py.
    "convnext": by_name(
        lambda n, p: len(p.shape) == 1 or n.endswith(".bias") or n in LISTED
    ),
    # MAE, util/lr_decay.py.
    "mae": by_name(lambda n, p: p.ndim == 1 or n in LISTED),
    # DINOv3, dinov3/train/param_groups.py.
    "dinov3": by_name(
        lambda n, p: (
            n.endswith("bias")
            or any(word in n for word in ("norm", "gamma", "fourier_w"))
        )
    ),
    # open_clip, src/open_clip_train/optim.py: what the tower lists, seen from it;
    # keywords are ends of names, so cpb_mlp.weight decays.
    "open_clip": by_name(
        lambda n, p: (
            p.ndim <= 1
            or n in LISTED
            or n.endswith(("position_bias_table", "tower.fourier_w"))
            or n == "tower.class_token"
        )
    ),
    # open_clip 3.3.0, src/open_clip_train/main.py.
    "open_clip_2025": by_name(
        lambda n, p: (
            p.ndim < 2 or any(w in n for w in ("bn", "ln", "bias", "logit_scale"))
        )
    ),
    # GPT-NeoX, megatron/model/utils.py; classes by name.
    "gptneox": by_owner(
        lambda m, leaf: type(m).__name__ == "LayerNorm" or leaf == "bias"
    )
    | {"tower.D"},
    # RWKV-LM, RWKV-v5/src/model.py, with layerwise_lr 1.
    "rwkv": by_name(
        lambda n, p: (
            "_w1" in n
            or (
                "time_sta" not in n
                and (
                    any(word in n for word in RWKV)
                    or len(p.squeeze().shape) < 2
                    or ".weight" not in n
                )
            )
        )
    ),
    # OLMo-core, src/scripts/train/OLMo3.
    "olmo": {"embeddings.weight"},
    # nanotron, src/nanotron/helpers.py, and the name that transformers gives.
    "smollm3": by_name(
        lambda n, p: re.match(".*token_embedding.*", n) or ".embed_tokens." in n
    ),
    # Megatron-LM, core/optimizer/__init__.py, and the names that transformers gives.
    "qwen3_next": by_name(
        lambda n, p: (
            (len(p.shape) == 1 or n.endswith(".bias"))
            and not any(f"{w}norm." in n for w in ("q_layer", "k_layer", "q_", "k_"))
        )
    ),
    "kimi": set(),
    # dion, train.py.
    "dion": {"grug.wte.weight", "grug.lm_head.weight", "grug.lm_head.bias"},
    # marin, experiments/grug/moe_hero_ep/optimizer.py; a gate may be a layer here.
    "marin": by_name(
        lambda n, p: (
            "router_bias" in n
            or not (n.endswith((".attn_gate", "attn_gate.weight")) or ".router" in n)
        )
    ),
    # dinov2, utils/param_groups.py.
    "dinov2": by_name(lambda n, p: n.endswith(".bias") or "norm" in n or "gamma" in n),
}


def canonical(names):
    original = re.compile(r"parametrizations\.weight\.original\d")
    return {original.sub("weight", name) for name in names}


@pytest.mark.parametrize("recipe", EXPECTED)
def test_recipe_exempts_what_the_rule_says(recipe):
    assert exempt(Zoo(), recipe) == canonical(EXPECTED[recipe])


GPT = {
    "wte": nn.Embedding(5, 4),
    "ln": nn.LayerNorm(4),
    "fc": nn.Linear(4, 4),
    "head": nn.Linear(4, 5, bias=False),
}


class GainedLinear(nn.Linear):
    """Holds something that is called neither weight nor bias."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(2))


def test_mingpt_decays_linear_weights_alone():
    # minGPT, mingpt/model.py.
    expected = {"wte.weight", "ln.weight", "ln.bias", "fc.bias"}

    assert exempt(nn.ModuleDict(GPT), "mingpt") == expected


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 1)), r"'0.weight', held by Conv2d, nowhere"),
        (nn.Sequential(nn.BatchNorm1d(3)), r"'0.weight', held by BatchNorm1d, nowhere"),
        (nn.MultiheadAttention(4, 2), r"'in_proj_weight', held by .*, nowhere"),
        (GainedLinear(2, 2), r"'gain', held by GainedLinear, nowhere"),
    ],
)
def test_mingpt_names_what_it_cannot_place(model, words):
    with pytest.raises(ValueError, match=words):
        AdamW(model.parameters(), wd_policy="mingpt")


def test_mingpt_refuses_a_head_tied_to_the_embedding():
    model = nn.ModuleDict({"wte": nn.Embedding(5, 4), "head": nn.Linear(4, 5, False)})
    model["head"].weight = model["wte"].weight

    with pytest.raises(ValueError, match=r"'wte.weight', .* in two ways"):
        AdamW(model.parameters(), wd_policy="mingpt")


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


# Of torchvision's, say, module types are asked for, and of nanoGPT's shapes alone.
ASKS_NAMES = {"rtdetr", "dinov2", "dinov3", "olmo", "smollm3", "dion", "marin"}
ASKS_NAMES_AND_SHAPES = {"open_clip_2025", "megatron", "rwkv", "qwen3_next"}
ASKS_NOTHING = {"kimi"}
ASKS_SHAPES = {"nanogpt"}
ASKS_ALL = {"timm", "swin", "convnext", "mae", "open_clip"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_says_what_it_has_to_know(recipe):
    by_name = recipe in ASKS_NAMES | ASKS_NAMES_AND_SHAPES
    by_shape = recipe in ASKS_SHAPES | ASKS_NAMES_AND_SHAPES | ASKS_ALL
    types = not by_name and recipe not in ASKS_SHAPES | ASKS_NOTHING
    needs = RECIPES[recipe].needs
    assert ("modules" in needs, "shapes" in needs) == (types, by_shape)
    of_modules = {"fastai", "detectron2"}  # by the attribute alone, whatever its name
    nameless = ASKS_SHAPES | ASKS_NOTHING | of_modules
    assert ("names" in needs) == (recipe not in nameless)


@pytest.mark.parametrize("recipe", EXPECTED)
def test_recipe_decides_alike_behind_a_wrapper(recipe):
    assert exempt(Wrapper(Zoo()), recipe) == exempt(Zoo(), recipe)


@pytest.mark.parametrize(
    ("module", "name", "decays"),
    [
        ("mmcv.ops.deform_conv", "DeformConv2d", True),
        ("mmcv.ops.modulated_deform_conv", "ModulatedDeformConv2d", True),
        ("torchvision.ops.deform_conv", "DeformConv2d", False),
        ("mmcv.cnn.bricks", "ConvModule", False),
    ],
)
def test_mmengine_decays_biases_inside_the_deformable_convolutions_of_mmcv(
    module, name, decays
):
    made = type(name, (nn.Module,), {"__module__": module})()
    made.conv_offset = nn.Conv2d(1, 1, 1)
    model = nn.ModuleDict({"dcn": made})

    assert ("dcn.conv_offset.bias" not in exempt(model, "mmengine")) == decays


def test_timm_asks_the_root_alone():
    inner = nn.ModuleDict({"zoo": Zoo()})

    assert "zoo.pos_embed" not in exempt(inner, "timm")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_prints_and_pickles_as_its_name(recipe):
    policy = named(recipe)

    assert repr(policy) == f"named({recipe!r})"
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert len({repr(p) for p in RECIPES.values() if p == policy}) == 1


REASONS = {
    ("huggingface", "blocks.0.ln_1.weight"): "huggingface: inside LayerNorm",
    ("huggingface", "norm.weight"): r"huggingface: name has '(?:^|\\.)norm(?:$|\\.)'",
    ("timm", "pos_embed"): "timm: no_weight_decay() lists 'pos_embed'",
    ("timm", "wide.bias"): "timm: *.bias",
    ("fastai", "bn1.weight"): "fastai: inside BatchNorm2d",
    ("mmengine", "head.bias"): "mmengine: bias",
    ("detectron2", "sync.bias"): "detectron2: held by SyncBatchNorm",
    ("nanogpt", "scale"): "nanogpt: ndim < 2",
    ("megatron", "bn1.weight"): "megatron: ndim == 1",
    ("dinov2", "blocks.1.gamma"): "dinov2: name has 'gamma'",
    ("dinov2", "embed.weight"): "dinov2: decays",
    ("torchvision", "bn1.weight"): "torchvision: held by BatchNorm2d",
    ("torchvision_swin", "tower.class_token"): "torchvision_swin: called class_token",
    ("ultralytics", "tower.logit_scale"): "ultralytics: name has 'logit_scale'",
    ("yolox", "tower.bn_stem.weight"): "yolox: module's name has 'bn'",
    ("yolox", "scale"): "yolox: neither weight nor bias",
    ("swin", "tower.cpb_mlp.weight"): (
        "swin: no_weight_decay_keywords() lists 'cpb_mlp'"
    ),
    ("convnext", "pos_embed"): "convnext: no_weight_decay() lists 'pos_embed'",
    ("open_clip", "tower.class_token"): (
        "open_clip: no_weight_decay() lists 'class_token'"
    ),
    ("open_clip", "tower.fourier_w"): "open_clip: listed as 'fourier_?'",
    ("dinov3", "tower.fourier_w"): "dinov3: name has 'fourier_w'",
    ("sam2", "blocks.0.ln_1.weight"): "sam2: held by LayerNorm",
    ("rtdetr", "tower.encoder_norms.bias"): "rtdetr: norm of encoder or decoder",
    ("gptneox", "tower.D"): "gptneox: _no_weight_decay",
    ("rwkv", "tower.maa_w1"): "rwkv: name has '_w1'",
    ("rwkv", "tower.time_state"): "rwkv: decays",
    ("rwkv", "tower.column.weight"): "rwkv: no .weight of two dimensions",
    ("olmo", "embeddings.weight"): "olmo: embeddings.weight",
    ("smollm3", "grug.token_embedding.weight"): "smollm3: name has 'token_embedding'",
    ("qwen3_next", "grug.lm_head.bias"): "qwen3_next: ndim == 1",
    ("qwen3_next", "grug.k_layernorm.bias"): "qwen3_next: decays",
    ("kimi", "norm.weight"): "kimi: decays",
    ("dion", "grug.wte.weight"): "dion: in wte",
    ("marin", "grug.router_bias"): "marin: neither attn_gate nor router",
    ("marin", "attn_gate.weight"): "marin: decays",
}


@pytest.mark.parametrize(("recipe", "name"), REASONS)
def test_reason_names_the_rule_that_decided(recipe, name):
    model = Zoo()
    infos = ModuleIndex(model).everyone()
    policy = named(recipe).bind([model])

    actual = next(policy.decide(i).reason for i in infos if i.name == name)

    assert actual == REASONS[recipe, name]


def test_smollm3_exempts_an_output_layer_tied_to_the_embedding():
    model = nn.ModuleDict({"head": nn.Linear(4, 5), "embed_tokens": nn.Embedding(5, 4)})
    model["embed_tokens"].weight = model["head"].weight

    assert exempt(model, "smollm3") == {"head.weight"}


def test_diff_lists_what_two_policies_decide_differently():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "fc": nn.Linear(4, 3)})

    found = diff(model, "nanogpt", "mingpt")

    row = found.rows[0]
    assert (row.name, row.shape, row.a, row.b) == (
        *("embed.weight", (5, 4)),
        *(Decay(1), Decay(0)),
    )
    assert str(found).splitlines() == [
        "a: named('nanogpt')",
        "b: named('mingpt')",
        "name          shape  a        reason           b       reason",
        "embed.weight  5 x 4  decayed  nanogpt: decays  exempt  mingpt: "
        "inside Embedding",
        "1 parameter differs",
    ]


def test_diff_says_when_there_is_none():
    found = diff(nn.Linear(2, 2), "nanogpt", {"bias": 0})

    assert not found
    assert str(found).startswith("no difference between named('nanogpt') and ")


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ({"weight": 0.5}, "decayed x 0.5"),
        ({"weight": Decay(1, "l2")}, "decayed l2"),
        ({"weight": Decay(2, "decoupled")}, "decayed x 2 decoupled"),
        ({"weight": False}, "exempt"),
    ],
)
def test_diff_tells_multipliers_and_forms_apart(policy, text):
    found = diff(nn.Linear(2, 2), policy, "all")

    assert f"weight  2 x 2  {text}" in str(found)


def test_diff_refuses_a_glob_that_matches_nothing():
    with pytest.raises(ValueError, match=r"'biass' in .* matches none of 2 param"):
        diff(nn.Linear(2, 2), exclude("biass"), "all")
