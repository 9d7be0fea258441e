"""What schedules and loops do to the rates and decays of routes."""

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

from selective_optim import Muon, layerwise_groups, proportional_to_lr, rate_groups
from selective_optim.schedules import WeightDecay
from tests.support.routes import loss_of, needs_muon, routed, separate, twins

RATES = [0.02, 3e-3]


def rates(optimizer, key="lr"):
    return [group[key] for group in optimizer.param_groups]


def train(model, *optimizers, steps=4):
    for number in range(steps):
        loss_of(model, number).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_one_number_of_one_cycle_is_the_highest_rate_of_every_route():
    one = routed(twins()[0])
    cycle = OneCycleLR(
        one, max_lr=0.1, total_steps=10, pct_start=0.5, cycle_momentum=False
    )
    seen = []
    for _ in range(4):
        one.step()
        cycle.step()
        seen.append(rates(one))
    assert max(seen) == pytest.approx([0.1, 0.1])


def test_one_cycle_with_a_rate_for_each_route_keeps_their_ratio():
    one = routed(twins()[0])
    cycle = OneCycleLR(one, max_lr=rates(one), total_steps=9, cycle_momentum=False)
    for _ in range(8):
        muon, adamw = rates(one)
        assert muon / adamw == pytest.approx(RATES[0] / RATES[1])
        one.step()
        cycle.step()


def test_cyclic_rates_need_the_same():
    one = routed(twins()[0])
    with pytest.raises(ValueError, match="momentum or beta1"):
        CyclicLR(one, base_lr=[0.0, 0.0], max_lr=RATES, step_size_up=2)
    cycle = CyclicLR(
        one, base_lr=[0.0, 0.0], max_lr=RATES, step_size_up=2, cycle_momentum=False
    )
    for _ in range(2):
        one.step()
        cycle.step()
    assert rates(one) == pytest.approx(RATES)


def test_cosine_leads_every_rate_to_one_least_rate():
    one = routed(twins()[0])
    cosine = CosineAnnealingLR(one, T_max=4, eta_min=1e-4)
    for _ in range(2):
        one.step()
        cosine.step()
    assert rates(one) == pytest.approx([1e-4 + (lr - 1e-4) / 2 for lr in RATES])
    for _ in range(2):
        one.step()
        cosine.step()
    assert rates(one) == pytest.approx([1e-4, 1e-4])


def test_plateaus_have_a_least_rate_for_each_route():
    one = routed(twins()[0])
    plateau = ReduceLROnPlateau(one, patience=0, factor=0.1, min_lr=[0.01, 0.0])
    for _ in range(2):
        plateau.step(1.0)
    assert rates(one) == pytest.approx([0.01, 3e-4])


def test_a_loop_that_writes_one_rate_into_every_group_gives_all_routes_that():
    """As nanoGPT does."""
    model, twin = twins()
    one, others = routed(model), separate(twin)
    for optimizer in (one, *others):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
    train(model, one)
    train(twin, *others)
    assert rates(one) == [1e-3, 1e-3]
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@needs_muon
def test_decay_of_every_route_has_a_schedule_of_its_own():
    model, _ = twins()
    one = Muon(model, weight_decay=0.2, rest={"weight_decay": 0.1})
    decay = CosineAnnealingLR(WeightDecay(one), T_max=2, eta_min=0.0)
    train(model, one, steps=1)
    decay.step()
    assert rates(one, "weight_decay") == pytest.approx([0.1, 0.05])
    assert rates(one) == [1e-3, 1e-3]


def test_decay_follows_the_rate_of_its_route():
    model, _ = twins()
    one = routed(model)
    proportional_to_lr(one)
    one.param_groups[1]["lr"] = 3e-4
    train(model, one, steps=1)
    assert rates(one, "weight_decay") == pytest.approx([0.1, 0.01])


@needs_muon
def test_layers_scale_the_rate_of_every_route():
    model, _ = twins()
    scales = layerwise_groups(
        model, {"muon": 0.02, "adamw": 3e-3}, rate=0.5, layers="blocks.*"
    )
    assert "blocks.1" in str(scales)
    one = Muon(scales, model=model)
    found = {row.name: one.param_groups[row.group]["lr"] for row in one.decay_report()}
    assert found["head.weight"] == 3e-3
    assert found["blocks.1.0.weight"] == 0.01
    assert found["blocks.0.0.weight"] == 0.005
    assert found["blocks.0.0.bias"] == found["embed.weight"] * 2 == 7.5e-4


@needs_muon
def test_patterns_give_a_rate_for_every_route():
    model, _ = twins()
    low = {"lr": {"muon": 0.002, "adamw": 3e-4}}
    one = Muon(rate_groups(model, {"blocks.0.*": low, "*": {"lr": 1e-3}}), model=model)
    assert [group["lr"] for group in one.param_groups] == [0.002, 3e-4, 1e-3, 1e-3]
