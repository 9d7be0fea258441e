"""Weight decay driven by torch's schedulers: against the rate and by hand."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers

import selective_optim
from selective_optim.schedules import WeightDecay
from tests.support.schedule_cases import (
    one_cycle,
    optimizers,
    run,
    schedules,
    sequential,
    two_groups,
    values,
)

# A view against the rate

# SequentialLR of torch 2.7 calls the step of its parts in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")


@schedules
@optimizers
def test_decay_moves_as_the_learning_rate_would(kind, make):
    by_decay = two_groups(kind, lr=0.1, weight_decay=0.04)
    by_rate = two_groups(kind, lr=0.04, weight_decay=0.1)
    decay, rate = make(WeightDecay(by_decay)), make(by_rate)
    assert run(by_decay, decay, 10, "weight_decay") == run(by_rate, rate, 10, "lr")
    assert decay.get_last_lr() == rate.get_last_lr()
    assert values(by_decay, "lr") == [0.1, 0.05]


@optimizers
def test_plateau_lowers_decay(kind):
    optimizer = two_groups(kind)
    plateau = torch_schedulers.ReduceLROnPlateau(
        WeightDecay(optimizer), factor=0.5, patience=1
    )
    for loss in (1.0, 1.0, 1.0):
        optimizer.step()
        plateau.step(loss)
    assert values(optimizer, "weight_decay") == [0.02, 0.01]


@schedules
@optimizers
def test_view_writes_nothing_but_decay(kind, make):
    optimizer = two_groups(kind)
    before = [set(group) for group in optimizer.param_groups]
    run(optimizer, make(WeightDecay(optimizer)), 3, "lr")
    assert [set(group) for group in optimizer.param_groups] == before


# By hand


def dino_decay(step: int, steps: int) -> float:
    """Give ``cosine_scheduler(0.04, 0.4)`` of facebookresearch/dino, utils.py."""
    return 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * step / steps))


def test_cosine_is_the_schedule_of_dino():
    optimizer = two_groups(selective_optim.AdamW)
    scheduler = torch_schedulers.CosineAnnealingLR(
        WeightDecay(optimizer), T_max=100, eta_min=0.4
    )
    actual = [first for first, _ in run(optimizer, scheduler, 100, "weight_decay")]
    expected = [dino_decay(step, 100) for step in range(1, 101)]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert actual[-1] == 0.4


def model_and_grads(seed: int = 0) -> tuple[nn.Module, list[list[torch.Tensor]]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    grads = [[torch.randn_like(p) for p in model.parameters()] for _ in range(7)]
    return model, grads


def set_grads(model: nn.Module, grads: list[torch.Tensor]) -> None:
    for param, grad in zip(model.parameters(), grads, strict=True):
        param.grad = grad.clone()


def split_by_hand(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [param for param in model.parameters() if param.ndim > 1]
    vectors = [param for param in model.parameters() if param.ndim < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_schedule_equals_a_loop_over_hand_split_groups(name):
    """One scheduled group has the bits of two groups with the decay set by hand."""
    model, grads = model_and_grads()
    other = copy.deepcopy(model)
    settings = {"lr": 0.1, "weight_decay": 0.04, "foreach": True}
    ours = getattr(selective_optim, name)(
        model.parameters(), wd_policy="no_bias_norm", **settings
    )
    torchs = getattr(torch.optim, name)(split_by_hand(other), **settings)
    decay = torch_schedulers.LinearLR(WeightDecay(ours), 0.5, total_iters=4)
    rate = torch_schedulers.ExponentialLR(ours, 0.9)
    for step, grad in enumerate(grads):
        factor = 0.5 + 0.5 * min(step, 4) / 4
        torchs.param_groups[0]["weight_decay"] = ours.param_groups[0]["weight_decay"]
        torch.testing.assert_close(
            ours.param_groups[0]["weight_decay"], 0.04 * factor, rtol=1e-12, atol=0
        )
        for group in torchs.param_groups:
            group["lr"] = ours.param_groups[0]["lr"]
        set_grads(model, grad)
        set_grads(other, grad)
        ours.step()
        torchs.step()
        decay.step()
        rate.step()
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


# Two schedulers on one optimizer


@schedules
@optimizers
@pytest.mark.parametrize("decay_first", [True, False])
def test_schedules_of_decay_and_rate_do_not_meet(kind, make, decay_first):
    both, decay_alone, rate_alone = (two_groups(kind) for _ in range(3))
    make_decay, make_rate = (lambda o: make(WeightDecay(o))), one_cycle
    makers = [make_decay, make_rate][:: 1 if decay_first else -1]
    schedulers = [make(both) for make in makers]
    expected_decay = run(decay_alone, make_decay(decay_alone), 6, "weight_decay")
    expected_rate = run(rate_alone, make_rate(rate_alone), 6, "lr")
    for decays, rates in zip(expected_decay, expected_rate):
        both.step()
        for scheduler in schedulers:
            scheduler.step()
        assert values(both, "weight_decay") == decays
        assert values(both, "lr") == rates


def test_rate_may_cycle_momentum_beside_a_schedule_of_decay():
    optimizer = two_groups(selective_optim.AdamW)
    decay = torch_schedulers.ExponentialLR(WeightDecay(optimizer), 0.5)
    rate = torch_schedulers.OneCycleLR(optimizer, 0.3, total_steps=10)
    optimizer.step()
    decay.step()
    rate.step()
    assert values(optimizer, "weight_decay") == [0.02, 0.01]
    assert optimizer.param_groups[0]["betas"][0] == pytest.approx(0.9)


class Wrapper(torch.optim.Optimizer):
    """Stands before an optimizer, as Accelerate's does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_view_is_of_the_optimizer_inside_wrappers():
    optimizer = two_groups(selective_optim.SGD)
    assert WeightDecay(Wrapper(Wrapper(optimizer))).optimizer is optimizer


def test_views_of_one_optimizer_are_one():
    """SequentialLR takes schedulers whose views were made one by one."""
    first, second = two_groups(torch.optim.SGD), two_groups(torch.optim.SGD)
    one = WeightDecay(first)
    parts = [
        torch_schedulers.LinearLR(WeightDecay(first), 0.1, total_iters=4),
        torch_schedulers.CosineAnnealingLR(WeightDecay(first), 6, eta_min=0.4),
    ]
    many = torch_schedulers.SequentialLR(WeightDecay(first), parts, [4])
    actual = run(first, many, 8, "weight_decay")
    assert actual == run(second, sequential(WeightDecay(second)), 8, "weight_decay")
    assert one == WeightDecay(first) == first
    assert one != WeightDecay(second)
    assert len({one, WeightDecay(first)}) == 1
