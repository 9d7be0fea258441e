"""Checkpoints of transformers, timm and fastai, continued with one group and back."""

import pytest
import torch
from torch import nn

from selective_optim import AdamW
from selective_optim.checkpoint import group_names, merge_groups, split_groups
from tests.support.compare import assert_same
from tests.support.problems import IMPLEMENTATIONS
from tests.support.resuming import (
    assert_same_run,
    through_file,
)

pytestmark = pytest.mark.integration
FIRST, SECOND = range(3), range(3, 6)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for _, param in sorted(model.named_parameters()):
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def transformers_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def trainer_optimizer(tmp_path, model, **choice):
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        tmp_path, weight_decay=0.1, learning_rate=0.01, report_to="none", use_cpu=True
    )
    trainer = transformers.Trainer(model, arguments)
    groups = trainer.create_optimizer().param_groups
    return torch.optim.AdamW(
        [{key: group[key] for key in ("params", "weight_decay")} for group in groups],
        lr=0.01,
        **choice,
    )


def timm_vit():
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=3)


def timm_optimizer(tmp_path, model, **choice):
    optim = pytest.importorskip("timm.optim")
    groups = optim.param_groups_weight_decay(model, 0.1)
    return torch.optim.AdamW(groups, lr=0.01, **choice)


def timm_layer_decay_optimizer(tmp_path, model, **choice):
    optim = pytest.importorskip("timm.optim")
    groups = optim.param_groups_layer_decay(model, 0.1, layer_decay=0.7)
    for group in groups:  # as timm's schedulers do
        group["lr"] = 0.01 * group["lr_scale"]
    return torch.optim.AdamW(groups, lr=0.01, **choice)


def fastai_net():
    body = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    return nn.Sequential(body, nn.Linear(5, 4))


def fastai_optimizer(tmp_path, model, **choice):
    """Layer groups with own rates, each split by what fastai calls norm and bias."""
    optimizer = pytest.importorskip("fastai.optimizer")
    core = pytest.importorskip("fastai.torch_core")
    exempt = {id(p) for p in core.norm_bias_params(model, with_bias=True)}
    groups = [
        {
            "params": [p for p in part.parameters() if (id(p) in exempt) is not decays],
            "lr": lr,
            "weight_decay": 0.1 if decays else 0.0,
        }
        for part, lr in zip(model, (0.001, 0.01))
        for decays in (True, False)
    ]
    return optimizer.OptimWrapper(opt=torch.optim.AdamW(groups, **choice)).opt


LAYOUTS = {
    "transformers": (transformers_bert, trainer_optimizer, ()),
    "timm": (timm_vit, timm_optimizer, ()),
    "timm-layers": (timm_vit, timm_layer_decay_optimizer, ("lr", "lr_scale")),
    "fastai": (fastai_net, fastai_optimizer, "lr"),
}
each_layout = pytest.mark.parametrize(
    ("make_model", "make_optimizer", "by"), LAYOUTS.values(), ids=LAYOUTS
)


def make_saved(make_model, make_optimizer, tmp_path, **choice):
    torch.manual_seed(0)
    model = make_model()
    return model, make_optimizer(tmp_path, model, **choice)


def make_merged(model, saved_dict, exempt, **choice):
    """Build ours with the groups of a merged state dict and the decisions given."""
    params = dict(model.named_parameters())
    groups = [
        {**group, "params": [(n, params[n]) for n in group["param_names"]]}
        for group in saved_dict["param_groups"]
    ]
    for group in groups:
        del group["param_names"]
    return AdamW(groups, wd_policy=lambda info: info.name not in exempt, **choice)


def named(state_dict, names):
    """Write names into a state dict that was saved without."""
    groups = [
        {**group, "param_names": own}
        for group, own in zip(state_dict["param_groups"], names)
    ]
    return {**state_dict, "param_groups": groups}


@each_layout
@pytest.mark.parametrize("choice", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_training_continues_in_merged_groups(
    make_model, make_optimizer, by, choice, tmp_path
):
    model, saved = make_saved(make_model, make_optimizer, tmp_path, **choice)
    train(model, saved, FIRST)
    names = group_names(saved.param_groups, model)
    wds = [group["weight_decay"] for group in saved.param_groups]
    exempt = {n for own, wd in zip(names, wds) if not wd for n in own}
    order = [name for name, _ in model.named_parameters()]
    state_dict = named(through_file(saved.state_dict()), names)
    merged = merge_groups(state_dict, order=order, by=by)
    resumed = make_model()
    resumed.load_state_dict(model.state_dict())
    ours = make_merged(resumed, merged, exempt, **choice)
    ours.load_state_dict(merged)
    whole = make_saved(make_model, make_optimizer, tmp_path, **choice)
    train(resumed, ours, SECOND)
    train(*whole, [*FIRST, *SECOND])
    assert exempt
    assert_same_run(resumed, ours, *whole)
    layout = [{"params": own, "weight_decay": wd} for own, wd in zip(names, wds)]
    again = split_groups(ours.state_dict(), layout)
    assert_same(again, named(whole[1].state_dict(), names))


@each_layout
def test_merged_and_split_again_is_the_same_without_names(
    make_model, make_optimizer, by, tmp_path
):
    model, saved = make_saved(make_model, make_optimizer, tmp_path)
    train(model, saved, FIRST)
    original = saved.state_dict()
    names = group_names(saved.param_groups, model)
    merged = merge_groups(original, names, by=by)
    with_names = merge_groups(named(original, names), by=by)["param_groups"]
    layout = [
        {"params": own, "weight_decay": group["weight_decay"]}
        for own, group in zip(names, original["param_groups"])
    ]
    merged_names = [group["param_names"] for group in with_names]
    assert_same(split_groups(merged, layout, names=merged_names), original)
