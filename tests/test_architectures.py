"""``"no_bias_norm"`` on chosen architectures, against what their modules compute."""

import pytest
import torch
from torch import nn

from selective_optim.parameters import ModuleIndex
from selective_optim.policies import named
from selective_optim.policies.decide import decide
from tests import zoo
from tests.judgement import disagreements

pytestmark = [
    pytest.mark.integration,
    # transformers scripts parts of some models, against which torch warns since 2.11.
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
]


def mistakes(model):
    """List what is exempt and should decay, and what decays and should be exempt."""
    return disagreements(ModuleIndex(model).everyone(), exempt(model))


def exempt(model):
    infos = ModuleIndex(model).everyone()
    decisions = decide(named("no_bias_norm"), infos)
    pairs = zip(infos, decisions, strict=True)
    return {info.name for info, decision in pairs if decision.decay.multiplier == 0}


TORCHVISION = [
    *("resnet18", "densenet121", "mobilenet_v3_small", "efficientnet_b0", "vgg11_bn"),
    *("convnext_tiny", "swin_t", "swin_v2_t", "vit_b_16", "maxvit_t", "mnasnet0_5"),
    *(
        "squeezenet1_1",
        "wide_resnet50_2",
        "r3d_18",
        "swin3d_t",
        "mvit_v2_s",
        "raft_small",
    ),
    *("lraspp_mobilenet_v3_large", "fcn_resnet50", "alexnet", "shufflenet_v2_x0_5"),
]


@pytest.mark.parametrize("name", TORCHVISION)
def test_no_bias_norm_makes_no_mistake_in_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    extra = {"weights_backbone": None} if name.startswith(("fcn", "lraspp")) else {}
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **extra)
    assert mistakes(model) == set()


TIMM = [
    *("vit_tiny_patch16_224", "beit_base_patch16_224", "convnextv2_atto", "levit_128"),
    *("resnetv2_50d_evos", "resnetv2_50d_frn", "nf_resnet50", "dm_nfnet_f0"),
    *("swinv2_tiny_window8_256", "eva02_tiny_patch14_224", "mobilenetv4_conv_small"),
    *("coatnet_0_rw_224", "xcit_nano_12_p16_224", "resmlp_12_224", "mixer_s32_224"),
    *("sequencer2d_s", "efficientvit_m0", "caformer_s18", "fastvit_t8", "volo_d1_224"),
    *("efficientformer_l1", "vit_relpos_small_patch16_224", "hiera_tiny_224"),
]


@pytest.mark.parametrize("name", TIMM)
def test_no_bias_norm_makes_no_mistake_in_timm(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    assert mistakes(model) == set()


TRANSFORMERS = [
    *("bert", "gpt2", "llama", "t5", "mamba", "mamba2", "gpt_neox", "opt", "qwen3"),
    *("bloom", "falcon", "gemma", "gemma2", "olmo2", "phi3", "mixtral", "deepseek_v3"),
    *("deberta-v2", "xlnet", "mobilebert", "albert", "bart", "whisper"),
    *("wav2vec2", "wav2vec2-conformer", "clip", "siglip", "dinov2", "convnextv2"),
    *("vits", "longt5", "cpmant", "rwkv", "recurrent_gemma", "nemotron_h", "zamba2"),
    *("swin", "encodec", "qwen3_next", "gpt_oss", "imagegpt", "bit", "segformer"),
]


def shallow(config):
    for name in ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers"):
        if isinstance(vars(config).get(name), int):
            setattr(config, name, min(getattr(config, name), 4))
    return config


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_no_bias_norm_makes_no_mistake_in_transformers(name):
    transformers = pytest.importorskip("transformers")
    config = shallow(transformers.AutoConfig.for_model(name))
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert mistakes(model) == set()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, num_layers=2, bidirectional=True)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.norm = nn.LayerNorm((2, 3, 4))


def test_no_bias_norm_exempts_torchs_own_biases_and_wide_norms():
    layers = [f"l{i}{end}" for i in (0, 1) for end in ("", "_reverse")]
    assert exempt(Recurrent()) == {
        *(f"rnn.bias_{part}_{layer}" for part in ("ih", "hh") for layer in layers),
        *(f"attention.{leaf}" for leaf in ("in_proj_bias", "bias_k", "bias_v")),
        *("attention.out_proj.bias", "norm.weight", "norm.bias"),
    }


KNOWN = {
    "gpt2": ("h.0.ln_1.weight", "h.0.attn.c_attn.weight"),
    "mamba": ("norm_f.weight", "layers.0.mixer.A_log"),
    "qwen3": ("layers.0.self_attn.q_norm.weight", "layers.0.self_attn.q_proj.weight"),
    "convnextv2": (
        "encoder.stages.0.layers.0.grn.weight",
        "encoder.stages.0.layers.0.pwconv1.weight",
    ),
    "t5": (
        "encoder.block.0.layer.0.layer_norm.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    "swin": (
        "layernorm.weight",
        "encoder.layers.0.blocks.0.attention.relative_position_bias"
        ".relative_position_bias_table",
    ),
}


@pytest.mark.parametrize(("name", "pair"), KNOWN.items(), ids=KNOWN)
def test_no_bias_norm_tells_these_two_apart(name, pair):
    transformers = pytest.importorskip("transformers")
    config = shallow(transformers.AutoConfig.for_model(name))
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    names = {info.name for info in ModuleIndex(model).everyone()}
    exempted, decayed = pair
    assert names >= {exempted, decayed}
    assert (exempted in exempt(model), decayed in exempt(model)) == (True, False)


# What "layer_weights" exempts of these beside norms and biases, by its last part.
BESIDE_WEIGHTS = {
    ("timm", "vit_tiny_patch16_224"): {"cls_token", "pos_embed"},
    ("timm", "convnext_atto"): {"gamma"},
    ("timm", "levit_128s"): {"attention_biases"},
    ("torchvision", "swin_t"): {"relative_position_bias_table"},
    ("transformers", "mamba"): {"A_log", "D"},
    ("transformers", "clip"): {"class_embedding", "logit_scale"},
    ("transformers", "gpt2"): set(),
}


@pytest.mark.parametrize(("library", "name"), BESIDE_WEIGHTS)
def test_layer_weights_leaves_tokens_tables_scales_and_states(library, name):
    pytest.importorskip(library)
    model = zoo.build(library, name)
    infos = ModuleIndex(model).everyone()
    weights, rest = (named(policy) for policy in ("layer_weights", "no_bias_norm"))

    found = {info.leaf for info in infos if weights(info) != rest(info)}

    assert found == BESIDE_WEIGHTS[library, name]
    assert not any(weights(i).multiplier > rest(i).multiplier for i in infos)
