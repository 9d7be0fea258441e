"""timm's factory and schedulers, and mmengine's registry, with one group."""

from typing import Any

import pytest
import torch
from torch import nn

import selective_optim
from selective_optim.schedules import WeightDecay
from tests.support.compare import assert_same
from tests.support.framework_cases import (
    batches,
    exempt_names,
    hand_split,
    snapshot,
    unmoved,
)

pytestmark = pytest.mark.integration


def images(steps: int = 5) -> Any:
    return batches(steps, 4, 3, 16, 16, classes=4)


# timm


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=16,
        num_heads=2,
        depth=2,
        num_classes=4,
    )


def train_as_timm(model: nn.Module, optimizer: Any, *schedulers: Any) -> None:
    """Step and schedule as timm's training script does, by updates."""
    model.train()
    for update, (inputs, labels) in enumerate(images(), start=1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step_update(num_updates=update)


def cosine(optimizer: Any, **arguments: Any) -> Any:
    scheduler = pytest.importorskip("timm.scheduler")
    warm_up = {"warmup_t": 2, "warmup_lr_init": 1e-4, "t_in_epochs": False}
    return scheduler.CosineLRScheduler(optimizer, 6, **warm_up, **arguments)


def test_timm_recipe_trains_to_the_bits_of_its_factory():
    optim = pytest.importorskip("timm.optim")
    ours, theirs = vit(), vit()
    one = selective_optim.AdamW(
        ours.parameters(), lr=1e-2, weight_decay=0.1, wd_policy="timm"
    )
    two = optim.create_optimizer_v2(
        theirs, "adamw", lr=1e-2, weight_decay=0.1, fused=True
    )
    train_as_timm(ours, one, cosine(one))
    train_as_timm(theirs, two, cosine(two))
    assert (len(one.param_groups), len(two.param_groups)) == (1, 2)
    assert_same(ours, theirs)


def test_class_registered_with_timm_comes_from_its_factory():
    optim = pytest.importorskip("timm.optim")
    factory = pytest.importorskip("timm.optim._optim_factory")
    info = factory.OptimInfo(
        name="selectiveadamw",
        opt_class=selective_optim.AdamW,
        description="AdamW that decides per parameter what decays",
        has_betas=True,
    )
    factory.default_registry.register(info)
    model = vit()
    optimizer = optim.create_optimizer_v2(
        model,
        "selectiveadamw",
        lr=1e-2,
        weight_decay=0.1,
        param_group_fn=nn.Module.parameters,
        wd_policy="timm",
    )
    assert isinstance(optimizer, selective_optim.AdamW)
    assert len(optimizer.param_groups) == 1
    decayed = {row.name for row in optimizer.decay_report().rows if row.weight_decay}
    groups = optim.param_groups_weight_decay(
        model, 0.1, no_weight_decay_list=model.no_weight_decay()
    )
    names = {id(param): name for name, param in model.named_parameters()}
    assert decayed == {names[id(param)] for param in groups[1]["params"]}


def test_scheduler_of_timm_drives_decay_through_the_view():
    model = vit()
    optimizer = selective_optim.AdamW(
        model.parameters(), lr=1e-2, weight_decay=0.1, wd_policy="timm"
    )
    rate, decay = cosine(optimizer), cosine(WeightDecay(optimizer), lr_min=0.01)
    train_as_timm(model, optimizer, rate, decay)
    group = optimizer.param_groups[0]
    assert group["lr"] == rate._get_lr(5)[0]
    assert group["weight_decay"] == decay._get_lr(5)[0]
    assert group["initial_lr"] == 1e-2


# mmengine


def convnet() -> nn.Module:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    return nn.Sequential(backbone, head)


@pytest.fixture(scope="module")
def registered() -> Any:
    """Register the classes beside torch's, which hold the plain names."""
    optim = pytest.importorskip("mmengine.optim")
    registry = pytest.importorskip("mmengine.registry")
    for cls in (selective_optim.SGD, selective_optim.AdamW):
        name = f"Selective{cls.__name__}"
        registry.OPTIMIZERS.register_module(name=name, module=cls, force=True)
    return optim


def train_as_mmengine(model: nn.Module, wrapper: Any) -> None:
    """Accumulate over two batches and clip, as the wrapper's settings say."""
    wrapper.initialize_count_status(model, 0, 6)
    for inputs, labels in images(6):
        with wrapper.optim_context(model):
            loss = nn.functional.cross_entropy(model(inputs), labels)
        wrapper.update_params(loss)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}),
        ("SGD", {"lr": 1e-1, "weight_decay": 0.1, "momentum": 0.9}),
    ],
)
def test_wrapper_from_the_registry_has_the_bits_of_two_groups(
    registered, name, settings
):
    ours, torchs = convnet(), convnet()
    own = {"type": f"Selective{name}", "wd_policy": "no_bias_norm", **settings}
    wrapping = {"accumulative_counts": 2, "clip_grad": {"max_norm": 1.0}}
    wrapper = registered.build_optim_wrapper(
        ours, {"type": "OptimWrapper", "optimizer": own, **wrapping}
    )
    two = getattr(torch.optim, name)(hand_split(torchs), **settings, fused=True)
    train_as_mmengine(ours, wrapper)
    train_as_mmengine(torchs, registered.OptimWrapper(two, **wrapping))
    assert len(wrapper.param_groups) == 1
    assert_same(ours, torchs)


def test_paramwise_rates_leave_the_exemptions_alone(registered):
    """mmengine#846: with its own rules a rate for ``backbone`` resets its norms."""
    model = convnet()
    own = {"type": "SelectiveSGD", "lr": 0.1, "weight_decay": 0.5}
    wrapper = registered.build_optim_wrapper(
        model,
        {
            "optimizer": {**own, "wd_policy": "matrices"},
            "paramwise_cfg": {"custom_keys": {"0.": {"lr_mult": 0.1}}},
        },
    )
    before = snapshot(model)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    wrapper.step()
    assert unmoved(before, model) == exempt_names(model)
    for name, lr in {"0.0.weight": 0.01, "1.2.weight": 0.1}.items():
        torch.testing.assert_close(
            dict(model.named_parameters())[name], before[name] * (1 - lr * 0.5)
        )
