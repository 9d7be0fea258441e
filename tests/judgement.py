"""What is a norm and what a bias in real models, told without the package's help.

A norm is told by what the methods of its class compute, a bias by a list of all
the names that biases have in torchvision, timm and transformers. Where this is wrong
the reason stands beside the name.
"""

import inspect
from functools import cache

from torch import nn

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.RMSNorm),
)
LAYERS = (
    *(nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d),
    *(nn.ConvTranspose1d, nn.Embedding, nn.EmbeddingBag, nn.LSTM, nn.GRU),
    nn.MultiheadAttention,
)
# Words that stand in the code of what divides by a spread or a length.
COMPUTES_A_SPREAD = (
    *("_norm(", "_norm_act(", "rsqrt(", ".norm(", "vector_norm(", "_rms(", "_std("),
    *("_norm2d(", "inst_norm(", "F.normalize(", "inv_std", "**-0.5", "** -0.5"),
)
BIASES = frozenset(
    (
        *("bias", "in_proj_bias", "q_bias", "v_bias", "bias_u", "bias_v", "bias_k"),
        *("bias_ih_l0", "bias_hh_l0", "bias_ih_l1", "bias_hh_l1"),
        *("bias_ih_l0_reverse", "bias_hh_l0_reverse", "dense_bias", "mlp_bias"),
        *("dt_bias", "dt_proj_bias", "gate_bias", "expert_bias", "residual_bias"),
        *("e_score_correction_bias", "gate_up_proj_bias", "down_proj_bias"),
        *("hidden_states_bias", "input_hidden_states_bias", "input_gate_bias"),
        *("recurrent_gate_bias", "pos_bias_u", "pos_bias_v", "r_r_bias", "r_s_bias"),
        *("r_w_bias", "logit_bias", "audio_plus_text_logit_bias", "b1", "b2"),
        *("audio_video_logit_bias", "text_audio_logit_bias", "text_video_logit_bias"),
        *("text_audio_video_logit_bias", "video_plus_text_logit_bias"),
        "latent_bias_factor",
    )
)

CONNECTION = "mixes residual streams by weights of the normalized ones"
SPELLED_OUT = "a norm that spells out the root of its variance"
# Class and attribute that the judgement gets wrong, and why.
REASONS = {
    ("DebertaLayerNorm", "weight"): SPELLED_OUT,
    ("IntLayerNorm", "weight"): SPELLED_OUT,
    ("ImageGPTLayerNorm", "weight"): SPELLED_OUT,
    ("MoonshineStreamingLayerNorm", "gamma"): "a norm that hands on to nn.LayerNorm",
    ("NoNorm", "weight"): "scales where MobileBERT calls it its norm",
    ("SSDFeatureExtractorVGG", "scale_weight"): "scales what is normalized elsewhere",
    ("Affine", "beta"): "the bias of ResMLP's affine, which is no norm",
    ("Inkling2BlockAttentionResidual", "query"): "a query for normalized keys",
    ("Inkling2ScaledL2Clip", "scale"): "clips long vectors, and leaves short ones",
    ("NeoMMEExclusiveSelfAttention", "alpha"): "how much of a projection is taken off",
    **{
        (f"{model}HyperConnection", leaf): CONNECTION
        for model in ("DeepseekV4", "HYV4", "Glm5NextText")
        for leaf in ("base", "fn", "scale")
    },
    **{
        (f"{model}HyperHead", f"hc_{leaf}"): CONNECTION
        for model in ("DeepseekV4", "HYV4")
        for leaf in ("base", "fn", "scale")
    },
}


@cache
def own_code(cls):
    """Return the source of what a class and its bases define, up to ``nn.Module``."""
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    methods = [item for base in bases for item in vars(base).values()]
    methods = [getattr(item, "__wrapped__", item) for item in methods]
    found = [m for m in methods if inspect.isfunction(m) and m.__name__ != "__init__"]
    return "\n".join(map(inspect.getsource, found))


@cache
def computes_a_spread(cls):
    return any(word in own_code(cls) for word in COMPUTES_A_SPREAD)


def normalizes(module):
    """Tell whether a module divides by a spread and does nothing with weights."""
    if isinstance(module, (*NORMS, *LAYERS)):
        return isinstance(module, NORMS)
    around = any(True for child in module.children() for _ in child.parameters())
    return not around and computes_a_spread(type(module))


def should_be_exempt(info):
    """Judge one parameter under ``"no_bias_norm"``."""
    return normalizes(info.owner) or info.leaf in BIASES


def disagreements(infos, exempt):
    """List class and attribute of what is judged otherwise, less what has a reason."""
    found = [i for i in infos if should_be_exempt(i) != (i.name in exempt)]
    return {(type(info.owner).__name__, info.leaf) for info in found} - set(REASONS)
