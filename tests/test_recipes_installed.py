"""Recipes against the installed projects' own code, on models without weights."""

import logging
import warnings

import pytest
import torch
from torch import nn

from selective_optim import AdamW
from selective_optim.groups import layerwise_groups
from tests.projects import PROJECTS, decayed_by, decayed_in, installed, names_of

for package in ("timm", "torchvision", "transformers", "fastai", "mmengine"):
    pytest.importorskip(package)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what packages say on import is their own
    import timm
    import torchvision
    import transformers
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import SGD as FastaiSGD
    from fastai.tabular.model import TabularModel
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.vision.models.unet import DynamicUnet
    from fastai.vision.models.xresnet import xresnet18, xse_resnext18
    from timm.optim import param_groups_layer_decay
    from transformers import AutoConfig, Trainer, TrainingArguments

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

TIMM = (
    *("beit_base_patch16_224", "cait_xxs24_224", "coat_tiny", "convnextv2_atto"),
    *("deit_tiny_distilled_patch16_224", "efficientnet_b0", "eva02_tiny_patch14_224"),
    *("levit_128s", "mambaout_femto", "maxvit_pico_rw_256", "mixer_s32_224"),
    *("nfnet_l0", "resnetv2_50d_evos", "swinv2_tiny_window8_256", "tiny_vit_5m_224"),
    *("vit_relpos_small_patch16_224", "vit_tiny_patch16_224", "xcit_nano_12_p16_224"),
)
TORCHVISION = (
    *("alexnet", "convnext_tiny", "deeplabv3_resnet50", "densenet121", "maxvit_t"),
    *("fasterrcnn_resnet50_fpn_v2", "mobilenet_v3_small", "resnet18", "swin_v2_t"),
    *("vit_b_32", "vgg11_bn"),
)
TRANSFORMERS = {
    "bert": "MaskedLM",
    "clip": "ZeroShotImageClassification",
    "deberta-v2": "MaskedLM",
    "gpt2": "CausalLM",
    "llama": "CausalLM",
    "mamba": "CausalLM",
    "mixtral": "CausalLM",
    "olmo2": "CausalLM",
    "qwen3": "CausalLM",
    "swin": "ImageClassification",
    "t5": "Seq2SeqLM",
    "wav2vec2": "CTC",
}
SMALL = {"num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 96}
FASTAI = {
    "awd_lstm": lambda: AWD_LSTM(20, 8, 12, 2),
    "tabular": lambda: TabularModel([(4, 2), (5, 3)], 3, 2, [8, 4]),
    "unet": lambda: DynamicUnet(
        nn.Sequential(*list(xresnet18(pretrained=False).children())[:-4]), 2, (32, 32)
    ),
    "xresnet18": lambda: xresnet18(pretrained=False),
    "xse_resnext18": lambda: xse_resnext18(pretrained=False),
}
MODELS = {
    **{f"timm-{name}": lambda name=name: timm.create_model(name) for name in TIMM},
    **{
        f"torchvision-{name}": lambda name=name: torchvision.models.get_model(
            name,
            weights=None,
            **{"weights_backbone": None} if "resnet50" in name else {},
        )
        for name in TORCHVISION
    },
    **{
        f"transformers-{kind}": lambda kind=kind, head=head: getattr(
            transformers, f"AutoModelFor{head}"
        ).from_config(AutoConfig.for_model(kind))
        for kind, head in TRANSFORMERS.items()
    },
    **{f"fastai-{name}": build for name, build in FASTAI.items()},
}
ON_CPU = ("fastai-unet", "fastai-awd_lstm")  # run once, or copy, as they are built


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    device = "cpu" if request.param in ON_CPU else "meta"
    with torch.device(device):
        return MODELS[request.param]()


def test_models_are_at_least_thirty():
    assert len(MODELS) >= 30


@pytest.mark.parametrize("project", installed())
def test_recipe_decays_what_the_project_decays(model, project, monkeypatch):
    monkeypatch.setattr(logging.Logger, "handle", lambda *args: None)
    _, project_decays = PROJECTS[project]

    assert decayed_by(model, project) == project_decays(model)


OF_2026 = {
    "smollm3": ("smollm3", lambda n, p: n != "model.embed_tokens.weight"),
    # Megatron-LM, core/optimizer/__init__.py, by the names of transformers.
    "qwen3_next": (
        "qwen3_next",
        lambda n, p: p.ndim != 1 or "q_norm." in n or "k_norm." in n,
    ),
    "kimi": ("deepseek_v3", lambda n, p: True),
}


@pytest.mark.parametrize("recipe", OF_2026)
def test_recipes_of_2026_find_their_parameters_in_transformers(recipe):
    kind, decays = OF_2026[recipe]
    config = AutoConfig.for_model(kind)
    config.num_hidden_layers = 4
    config.layer_types = (getattr(config, "layer_types", None) or [])[:4] or None
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)

    expected = {n for n, p in model.named_parameters() if decays(n, p)}
    assert decayed_by(model, recipe) == expected


def test_huggingface_equals_groups_of_its_trainer(tmp_path):
    config = AutoConfig.for_model(
        "bert", hidden_size=24, num_attention_heads=2, **SMALL
    )
    model = transformers.AutoModelForMaskedLM.from_config(config)
    args = TrainingArguments(tmp_path, use_cpu=True, report_to=[], weight_decay=0.1)

    groups = Trainer(model, args).create_optimizer().param_groups

    assert decayed_by(model, "huggingface") == names_of(model, decayed_in(groups))


def test_fastai_equals_state_of_its_learner():
    model = xresnet18(pretrained=False)
    learner = Learner(DataLoaders([], []), model, nn.MSELoss(), opt_func=FastaiSGD)
    learner.create_opt()
    state = learner.opt.state

    expected = {id(p) for p in model.parameters() if state[p].get("do_wd", True)}

    assert decayed_by(model, "fastai") == names_of(model, expected)


VITS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "fc_norm": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "swin": ("swin_tiny_patch4_window7_224", {}),
    "resnet": ("resnet18", {}),
    "convnext": ("convnext_atto", {}),
}


@pytest.mark.parametrize("case", VITS)
def test_layerwise_groups_equal_layer_decay_of_timm(case):
    name, options = VITS[case]
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    listed = getattr(model, "no_weight_decay", set)()
    theirs = param_groups_layer_decay(model, 0.05, listed, layer_decay=0.75)
    expected = {
        id(p): (0.1 * group["lr_scale"], group["weight_decay"])
        for group in theirs
        for p in group["params"]
    }

    groups = layerwise_groups(model, lr=0.1, rate=0.75)
    optimizer = AdamW(groups, weight_decay=0.05, wd_policy="timm", model=model)
    rows = iter(optimizer.decay_report().rows)
    actual = {
        id(p): (row.lr, row.weight_decay)
        for group in optimizer.param_groups
        for p, row in zip(group["params"], rows, strict=False)
    }

    assert actual == expected
    assert len(theirs) - 1 <= 2 * len(groups) <= len(theirs) + 1
