"""Biases and gains that are called otherwise, as real packages write them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from selective_optim import AdamW
from selective_optim.parameters import ModuleIndex
from selective_optim.policies import is_bias, is_embedding, is_norm, is_token, named


def holding(cls, *leaves, shape=(3,)):
    """Make a module of a class with a parameter under each name."""
    module = cls()
    for leaf in leaves:
        setattr(module, leaf, nn.Parameter(torch.ones(shape)))
    return module


def selected(module, selector):
    infos = ModuleIndex(module).everyone()
    return {info.name for info in infos if selector.matches(info)}


def exempt(module, policy="no_bias_norm"):
    infos = ModuleIndex(module).everyone()
    return {info.name for info in infos if not named(policy)(info).multiplier}


# By a word in the name; after each the package that calls it so.
BIASES = {
    "bias_orig": True,  # torch's pruning
    "bias_mu": True,  # torchrl
    "bias_ic": True,  # neuralforecast
    "dt_bias_atk": True,  # fla
    "fc1_biases": True,  # speechbrain
    "value_bias_weight": True,  # speechbrain
    "latent_bias_factor": True,  # transformers, VibeVoice
    "_bias_": True,  # xlstm
    "recurrent_gate_bias": True,  # transformers, RecurrentGemma
    "attention_biases": False,  # timm, a table of LeViT
    "relative_position_bias_table": False,
    "position_bias": False,  # transformers, DeepseekV4
    "raw_bias_var": False,  # botorch, of a kernel
    "bias_scale": False,
    "bias_gate": False,
    "qbiases": False,  # transformers, zeros of a quantization
    "debias_proj": False,
}


@pytest.mark.parametrize("leaf", BIASES)
def test_is_bias_goes_by_words(leaf):
    module = holding(nn.Module, leaf, shape=(2, 3))
    assert (selected(module, is_bias) == {leaf}) is BIASES[leaf]


def test_pruned_bias_stays_a_bias():
    layer = prune.l1_unstructured(nn.Linear(4, 8), "bias", 0.5)
    assert exempt(layer) == {"bias_orig"}


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        vectors = [nn.Parameter(torch.ones(3)) for _ in range(5)]
        self.biases = nn.ParameterList(vectors[:1])
        self.cross_layer_b = nn.ParameterList(vectors[1:2])
        self.table = nn.ParameterDict({"bias": vectors[2], "rows": vectors[3]})
        self.nested = nn.ParameterList([nn.ParameterList(vectors[4:])])
        self.user_bias = nn.Embedding(2, 3)

    def forward(self, x):
        return x + self.cross_layer_b[0]


def test_parameter_in_a_list_goes_by_the_name_of_the_list():
    assert exempt(Lists()) == {"biases.0", "cross_layer_b.0", "table.bias"}
    report = AdamW(Lists(), wd_policy="no_bias").decay_report()
    unknown = {row.name for row in report if "kind unknown" in row.reason}
    assert unknown == {"table.bias", "table.rows", "nested.0.0"}


class Attention(nn.Module):
    """Transformer Lens: biases of heads, beside the weights they go with."""

    def forward(self, x):
        q = self.project(x, self.W_Q, self.b_Q)
        if self.b_O.device != q.device:
            q = q.to(self.b_O.device)
        return F.linear(q, self.W_O[0]) + self.b_O

    def project(self, x, weight, bias):
        return x @ weight + bias


class Autoencoder(nn.Module):
    """SAE Lens: a decoder's bias that the encoder takes off before."""

    def forward(self, x):
        bias = self.b_dec * self.cfg.use_b_dec
        return F.relu((x - bias) @ self.W_enc + self.b_enc) @ self.W_dec + self.b_dec

    @torch.no_grad()
    def reset_parameters(self):
        nn.init.zeros_(self.b_enc)
        self.b_dec.data /= 2


class Gated(nn.Module):
    """Phi-4 multimodal: biases of two dimensions in slices of a product."""

    def forward(self, x):
        return (x[:, :3] + self.b1) * F.gelu(x[:, 3:] + self.b2[None])


class Complex(nn.Module):
    """SpeechBrain: handed to a function with the weights."""

    def forward(self, x):
        return complex_linear(x, self.real_weight, self.imag_weight, self.b)


class Affine(nn.Module):
    """timm's ResMLP."""

    def forward(self, x):
        return torch.addcmul(self.beta, self.alpha, x)


class Snake(nn.Module):
    """An activation of vocoders."""

    def forward(self, x):
        beta = torch.exp(self.beta[None, :, None])
        return x + torch.sin(x * self.alpha) ** 2 / (beta + 1e-9)


class Threshold(nn.Module):
    """monai's AUC margin loss."""

    def forward(self, x):
        return (x - self.b) ** 2


class LowRank(nn.Module):
    def forward(self, x):
        return x @ (self.weight_a @ self.weight_b)


class Sparse(nn.Module):
    """Sparsify: what the decoder adds is taken off before the encoder."""

    def forward(self, x):
        return F.relu((x - self.b_dec) @ self.W_enc) @ self.W_dec + self.b_dec


class Gates(nn.Module):
    """PyTorch Geometric Temporal: made in a method that is called after a gate."""

    def create_gate(self):
        self.b_i = nn.Parameter(torch.zeros(1, 3))
        self.weight_b = nn.Parameter(torch.zeros(1, 3))

    def forward(self, x):
        return x + self.b_i


class Interaction(nn.Module):
    """PyKEEN: a sum of several."""

    def forward(self, x):
        return tensor_sum(x, x**2, self.b_c) + x.add(self.b_p.detach())


class Multiplied(nn.Module):
    """deepchem: added here, and multiplied there."""

    def forward(self, x):
        return x + self.b_df, x * self.b_df


class Flow(nn.Module):
    """FrEIA: a shift that goes with a scale, and back again."""

    def forward(self, x, rev=False):
        if rev:
            return (x - self.global_offset - self.shift) / self.scale
        x = x + self.scale_shift  # diffusers: a modulation, of two parts
        x = weighted_sum(x + self.pos_offset, self.b_mix)  # a table, and what it weighs
        return x * self.scale + self.global_offset + self.shift


class Basis(nn.Module):
    """SchNetPack: where functions of a basis stand."""

    def forward(self, x):
        return torch.exp(-((x - self.offset) ** 2) * self.shift)


class States(nn.Module):
    """mambapy's vision Mamba: the second of two directions."""

    def forward(self, x):
        return scan(x, A_log=self.A_log_b, D=self.D_b)


def weighted_sum(x, weight):
    return x @ weight


def tensor_sum(*terms):
    return sum(terms)


def complex_linear(x, real, imag, bias):
    return F.linear(x, real + imag, bias)


def scan(x, A_log, D):
    return x * A_log + D


ADDED = {
    Attention: (("W_Q", "b_Q", "W_O", "b_O"), {"b_Q", "b_O"}),
    Autoencoder: (("W_enc", "b_enc", "W_dec", "b_dec"), {"b_enc", "b_dec"}),
    Gated: (("b1", "b2"), {"b1", "b2"}),
    Complex: (("real_weight", "imag_weight", "b"), {"b"}),
    Affine: (("alpha", "beta"), {"beta"}),
    Snake: (("alpha", "beta"), set()),
    Threshold: (("b",), set()),
    LowRank: (("weight_a", "weight_b"), set()),
    States: (("A_log_b", "D_b"), set()),
    Sparse: (("b_dec", "W_enc", "W_dec"), {"b_dec"}),
    Gates: (("b_i", "weight_b"), {"b_i"}),
    Interaction: (("b_c", "b_p"), {"b_c", "b_p"}),
    Multiplied: (("b_df",), set()),
    Flow: (
        ("scale", "global_offset", "shift", "scale_shift", "pos_offset", "b_mix"),
        {"global_offset", "shift"},
    ),
    Basis: (("offset", "shift", "translation"), set()),
}


@pytest.mark.parametrize("cls", ADDED)
def test_parameter_called_b_is_a_bias_where_methods_only_add_it(cls):
    leaves, biases = ADDED[cls]
    assert selected(holding(cls, *leaves, shape=(2, 3, 3)), is_bias) == biases


def test_unused_parameter_called_b_is_a_bias_beside_its_weight_or_as_a_vector():
    module = holding(nn.Module, "W_Q", "b_Q", "lora_b", shape=(2, 4, 4))
    module.b_dec = nn.Parameter(torch.zeros(4))
    module.beta = nn.Parameter(torch.zeros(4))

    assert selected(module, is_bias) == {"b_Q", "b_dec"}
    assert exempt(module, "layer_weights") == {"b_Q", "b_dec", "beta"}


class OnePlus(nn.Module):
    """A gain that is learned as its difference from 1."""

    def forward(self, x):
        return F.rms_norm(x, (3,), weight=1 + self.w, eps=self.eps)


class Scaled(nn.Module):
    """Local attention: gains of normalized queries and keys."""

    def forward(self, x):
        q, k = map(l2norm, (x, x))
        q, k = q * self.q_scale, k * self.k_scale[None]
        return (q @ k.T) * self.logit + x * self.gate


class Rescaled(nn.Module):
    """torchvision's SSD."""

    def forward(self, x):
        return self.scale_weight.view(1, -1, 1, 1) * F.normalize(x) * self.gate.exp()


class Reversible(nn.Module):
    """pytorch-forecasting's RevIN."""

    def forward(self, x):
        x = x - self.mean
        x = x / self.stdev
        x = x * self.affine_weight
        return x + self.affine_bias


class Chosen(nn.Module):
    """x-transformers: a norm that a setting turns on."""

    def forward(self, q):
        q = l2norm(q) if self.qk_norm else q
        return q * self.q_scale


class Cosine(nn.Module):
    """timm's XCiT: a temperature that fused attention takes with the queries."""

    def forward(self, q, k):
        q, k = F.normalize(q) * self.temperature, F.normalize(k)
        return q @ k.T


class Direction(nn.Module):
    """Weight norm written out: its gain is a part of the weight."""

    def forward(self, x):
        return x @ (F.normalize(self.v) * self.g)


class Features(nn.Module):
    """PyTorch Frame: layers of one standardized number each."""

    def forward(self, x):
        x = (x - self.mean) / self.std
        waves = torch.sin(2 * torch.pi * self.linear[None] * x[..., None])
        return waves, self.W_1[None] * x[:, :, None], x * self.gain


class Routed(nn.Module):
    """Gemma's router: a norm without a gain, and a gain for it outside."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3, elementwise_affine=False)
        self.post_norm = nn.LayerNorm(3)

    def forward(self, x):
        x = self.norm(x)
        x = x * (self.norm_gamma + 1) * 3**-0.5
        return x + self.layer_scale * self.post_norm(x)


class Overwritten(nn.Module):
    """What multiplies a value that was normalized, and is so no more."""

    def forward(self, x):
        y = F.normalize(x)
        y = F.linear(y, self.weight)
        return y * self.gamma / math.sqrt(3)


def l2norm(x):
    return F.normalize(x, dim=-1)


GAINS = {
    OnePlus: (("w",), {"w"}),
    Scaled: (("q_scale", "k_scale", "logit", "gate"), {"q_scale", "k_scale"}),
    Rescaled: (("scale_weight", "gate"), {"scale_weight"}),
    Reversible: (("affine_weight", "affine_bias"), {"affine_weight"}),
    Chosen: (("q_scale",), {"q_scale"}),
    Cosine: (("temperature",), set()),
    Direction: (("v", "g"), set()),
    Features: (("linear", "W_1", "gain"), {"gain"}),
    Routed: (("norm_gamma", "layer_scale"), {"norm_gamma"}),
    Overwritten: (("weight", "gamma"), set()),
}


@pytest.mark.parametrize("cls", GAINS)
def test_gain_is_what_multiplies_normalized_values(cls):
    leaves, gains = GAINS[cls]
    found = selected(holding(cls, *leaves), is_norm)
    assert found & set(leaves) == gains


class DynamicTanh(nn.Module):
    def __init__(self, **shapes):
        super().__init__()
        shapes = {"alpha": (1,), "gamma": (3,), "beta": (3,), **shapes}
        for leaf, shape in shapes.items():
            setattr(self, leaf, nn.Parameter(torch.ones(shape)))

    def forward(self, x):
        return self.gamma * torch.tanh(self.alpha * x) + self.beta


class Gate(DynamicTanh):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)


class Sine(DynamicTanh):
    def forward(self, x):
        return self.gamma * torch.sin(self.alpha * x)


def test_dynamic_tanh_stands_where_a_norm_stood():
    assert selected(DynamicTanh(), is_norm) == {"alpha", "gamma", "beta"}
    assert selected(DynamicTanh(beta=(3, 3)), is_norm) == set()
    assert selected(Gate(), is_norm) == set()
    assert selected(Sine(), is_norm) == set()


# Attribute, whether it is an embedding and a token; siblings stand together.
TOKENS = (
    *("null_position_feature", "null_text_feature", "null_kv", "mem_kv", "mem_k"),
    *("registers", "register_tokens", "learnable_registers", "persistent_memory"),
    *("queries", "latent_queries", "attn_pool_query", "memory_tokens", "latents_1d"),
)
LEARNED = {
    **dict.fromkeys(TOKENS, (True, True)),
    "image_positions": (True, False),
    "rel_pos_w": (True, False),
    "weight_query": (False, False),
    "query_proj": (False, False),
    "values_per_latent": (False, False),
    "memory_model_parameters": (False, False),
    "mem_gate": (False, False),
}


@pytest.mark.parametrize("leaf", LEARNED)
def test_learned_inputs_are_known_as_their_siblings_are(leaf):
    module = holding(nn.Module, leaf, shape=(4, 3))
    found = (bool(selected(module, is_embedding)), bool(selected(module, is_token)))
    assert found == LEARNED[leaf]
